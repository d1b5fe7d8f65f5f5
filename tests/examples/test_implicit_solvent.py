"""The example of a pair in two phases: exact where the two potentials differ by a constant."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import mdtraj
import numpy as np
import pytest

from openmm_mlff.potentials.family import find_family, load_potential
from openmm_mlff.units import EV_PER_KCAL_PER_MOL
from openmm_resolv import save_pair

NAME = "07_implicit_solvent.py"
SHIFT = -4.7  # kcal/mol


@pytest.fixture(scope="module")
def example(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("implicit_solvent", repository / "examples" / NAME)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shifted(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One potential in both phases; in water each of the twelve hydrogens of capped alanine is worth a little more."""
    shipped = find_family("spookynet").bundled[0].path
    path = shipped if shipped.is_file() else shared / "models" / "spookynet_parameters.pth"
    water, vacuum = load_potential(path), load_potential(path)
    water.shift_atomic_energies({1: SHIFT * EV_PER_KCAL_PER_MOL / 12})
    return save_pair(water, vacuum, tmp_path_factory.mktemp("pair") / "shifted.safetensors")


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [NAME, *map(str, arguments)])
    example.main()


def test_a_constant_is_the_hydration_free_energy(
    example: ModuleType,
    shifted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ("--picoseconds", 0.12, "--timestep", 2, "--minimization", 10)
    run(example, monkeypatch, "--pair", shifted, *small, "--output", tmp_path)
    said = capsys.readouterr().out
    found = re.search(r"hydration free energy: (-?[\d.]+) \+- ([\d.]+) kcal/mol", said)
    assert found is not None and float(found[1]) == pytest.approx(SHIFT, abs=0.011) and float(found[2]) < 0.01
    assert "overlap of the two ensembles: 0.50" in said
    sizes = re.search(r"radius of gyration +([\d.]+) \+- [\d.]+ Å +([\d.]+) \+-", said)
    assert sizes is not None and all(2.0 < float(size) < 4.0 for size in sizes.groups())
    assert said.count("population of") == 5
    runs = [mdtraj.load(str(tmp_path / f"{name}.dcd"), top=str(tmp_path / "start.pdb")) for name in ("vacuum", "water")]
    assert [len(run) for run in runs] == [5, 5]
    # the same forces, but random numbers of their own: the error of the estimate takes the two to be independent
    assert np.abs(runs[0].xyz - runs[1].xyz).max() > 1e-3
    assert (tmp_path / "phases.png").stat().st_size > 10_000


def test_every_frame_is_in_one_basin(example: ModuleType) -> None:
    phi, psi = (x.ravel() for x in np.meshgrid(np.linspace(-180, 180, 73), np.linspace(-180, 180, 73)))
    found = example.basins(phi, psi)
    np.testing.assert_array_equal(sum(basin.astype(int) for basin in found.values()), 1)
    # ideal values of the textbooks
    for name, angles in {"C7eq": (-80, 75), "C5": (-155, 160), "PII": (-75, 150), "alpha R": (-65, -40),
                         "phi > 0": (55, 45)}.items():  # fmt: skip
        assert [key for key, basin in example.basins(*(np.array([a]) for a in angles)).items() if basin[0]] == [name]


def test_what_it_says_without_a_pair_or_an_element(
    example: ModuleType, shifted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        (["--pair", tmp_path / "none.safetensors"], "There is no file at"),
        (["--pair", shifted, "--smiles", "[He]", "--output", tmp_path], "This pair cannot describe .*: elements"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(example, monkeypatch, *arguments)
