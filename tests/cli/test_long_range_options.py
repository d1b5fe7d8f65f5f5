"""``--long-range-method`` and ``--long-range-cutoff``: water at constant pressure, and errors against labels."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from openmm import app, unit

from openmm_mlff import cli
from openmm_mlff.analysis.observables import read_table
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_so3krates import SO3krates, SO3kratesConfig

#: nm
BOX = np.array([[0.9, 0.0, 0.0], [0.1, 0.85, 0.0], [-0.15, 0.2, 0.8]])
WATER = np.array([[0.0, 0.0, 0.0], [0.0757, 0.0586, 0.0], [-0.0757, 0.0586, 0.0]])
SITES = np.array([[0.1, 0.1, 0.1], [0.6, 0.1, 0.6], [0.1, 0.6, 0.6], [0.6, 0.6, 0.1]])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = SO3kratesConfig(
        num_features=16, num_layers=1, num_heads=2, degrees=(1, 2), num_basis_functions=4, hirshfeld_features=8,
        elements=(1, 8),
    )  # fmt: skip
    model = SO3krates(config).double()
    with torch.no_grad():
        model.charge_bias[1], model.charge_bias[8] = 0.4, -0.8
    return save_potential(model.eval(), tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def water(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four molecules in a triclinic box, as a PDB file."""
    topology = app.Topology()
    chain = topology.addChain()
    for _ in SITES:
        residue = topology.addResidue("HOH", chain)
        atoms = [topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")]
        topology.addBond(atoms[0], atoms[1])
        topology.addBond(atoms[0], atoms[2])
    topology.setPeriodicBoxVectors(BOX * unit.nanometer)
    path = tmp_path_factory.mktemp("input") / "water.pdb"
    positions = np.concatenate([WATER + site @ BOX for site in SITES])
    with open(path, "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    return path


def simulate(*arguments: object) -> int:
    return cli.main(["simulate", *map(str, arguments), "--quiet"])


def test_constant_pressure_and_its_continuation(model_path: Path, water: Path, tmp_path: Path) -> None:
    options = [water, "--model-path", model_path, "--long-range-cutoff", 0.6, "--long-range-method", "pme"]
    options += ["--ml-region", "all", "--ensemble", "npt", "--timestep", 0.1, "--report", 25, "--checkpoint", 50]
    options += ["--minimize", 0, "--ignore-bonds", "--compile", "no", "--seed", 4]
    assert simulate(*options, "-o", tmp_path / "whole", "--steps", 150) == 0
    assert simulate(*options, "-o", tmp_path / "parts", "--steps", 100) == 0
    assert simulate("--resume", "-o", tmp_path / "parts", "--steps", 150) == 0
    whole, parts = (read_table(tmp_path / name / "log.csv") for name in ("whole", "parts"))
    assert whole["volume_nm3"][-1] != whole["volume_nm3"][0]
    # the run that was interrupted is the same to the last digit that is written
    for column, values in whole.items():
        np.testing.assert_array_equal(parts[column], values)
    settings = json.loads((tmp_path / "parts" / "run.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["long_range_method"], settings["long_range_cutoff"]) == ("pme", 0.6)
    assert '"long_range_method":"pme"' in _options(tmp_path / "parts" / "system.xml")


def _options(system: Path) -> str:
    from openmm_mlff.forces.running import computations
    from openmm_mlff.forces.serialization import load_system

    return computations(load_system(system.read_text(encoding="utf-8")))[0].options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-box", "--long-range-method", "pme"], "longRangeMethod: 'pme' sums over the images"),
        (["--long-range-method", "pme"], "longRangeCutoff: a periodic system needs one"),
    ],
)
def test_wrong_box(
    options: list[str], message: str, model_path: Path, water: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(water, "--model-path", model_path, "--ml-region", "all", "-o", tmp_path / "run", *options) == 1
    error = capsys.readouterr().err
    assert message in error and "(here: --long-range-" in error and error.count("\n") == 1


@pytest.mark.parametrize("method", ["shifted", "ewald"])
def test_evaluate(method: str, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels by the same model, method and cutoff have no errors; by another method they do."""
    model = load_potential(model_path)
    assert isinstance(model, SO3krates)
    model.long_range_cutoff, model.long_range_method = 5.0, method
    frames = []
    for seed in range(3):
        positions = np.concatenate([10 * WATER + site @ BOX * 10 for site in SITES])
        positions = positions + np.random.default_rng(seed).normal(0.0, 0.1, positions.shape)
        structure = Structure(np.tile([8, 1, 1], 4), positions, cell=10 * BOX)
        energy, forces = model.energy_and_forces(structure)
        atoms = Atoms(structure.numbers, positions, cell=10 * BOX, pbc=True)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        frames.append(atoms)
    ase.io.write(tmp_path / "water.extxyz", frames)
    common = ["evaluate", "--model", str(model_path), "--data", str(tmp_path / "water.extxyz"), "--device", "cpu"]
    common += ["--output", str(tmp_path), "--long-range-cutoff", "0.5"]
    errors = {}
    for name in ("shifted", "ewald"):
        assert cli.main([*common, "--name", name, "--long-range-method", name]) == 0
        report = json.loads((tmp_path / f"{name}_errors.json").read_text(encoding="utf-8"))
        errors[name] = report["tables"]["all"][0]["forces_rmse"]
        config = json.loads((tmp_path / f"{name}_config.json").read_text(encoding="utf-8"))
        assert (config["long_range_method"], config["long_range_cutoff_angstrom"]) == (name, 5.0)
    other = "ewald" if method == "shifted" else "shifted"
    assert errors[method] < 1e-2 < errors[other]
    capsys.readouterr()
