"""The example of a proton that moves in water: its machinery in a few steps, and what it makes of known samples."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import openmm
import pytest

from openmm_mlff.analysis.umbrella import Bias, Reweighted
from openmm_mlff.potentials.family import find_family, load_potential
from openmm_mlff.sampling.umbrella import WindowRun

NAME = "08_zwitterion_in_water.py"


@pytest.fixture(scope="module")
def example(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("zwitterion_in_water", repository / "examples" / NAME)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zwitterion_in_water"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(shared: Path) -> str:
    """The model for which the example is, or the published one where it is not there."""
    shipped = [m for m in find_family("spookynet").bundled if m.name == "spookynet-gfn2-bio" and m.path.is_file()]
    return shipped[0].name if shipped else str(shared / "models" / "spookynet_parameters.pth")


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [NAME, *map(str, arguments)])
    example.main()


def test_a_few_steps(
    example: ModuleType,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(example, monkeypatch, "--quick", "--model", model, "--output", tmp_path)
    said = capsys.readouterr().out
    # in vacuum GFN2-xTB has no zwitterion: a carboxylic acid has an O-H bond of 0.97 to 1.0 angstrom
    gone = re.search(r"GFN2-xTB +(-[\d.]+) kcal/mol; then N-H ([\d.]+) Å, O-H ([\d.]+) Å", said)
    assert gone is not None and float(gone[1]) < -10 and float(gone[2]) > 1.6 and 0.95 < float(gone[3]) < 1.02
    rows = re.findall(r"^(zwitterion|transfer\S+|turn\d+) +([+-][\d.]+) \+-", said, re.MULTILINE)
    assert [name for name, _ in rows] == [
        "zwitterion", "transfer-0.750", "transfer-0.250", "transfer+0.250", "transfer+0.750", "turn0", "turn90",
        "turn180",
    ]  # fmt: skip
    found = re.search(r"neutral less zwitterion +([+-][\d.]+) \+- ([\d.]+) kcal/mol", said)
    assert found is not None and float(found[2]) > 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["in water"]["neutral less zwitterion"][0] == pytest.approx(float(found[1]), abs=0.006)
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    runs = [WindowRun.read(path) for path in (tmp_path / "windows").iterdir()]
    assert len(runs) == 8 and all(run.recorded.shape == (20, 10, 3) for run in runs)
    # the pull led the proton all the way, and the recorded positions are those of the coordinates
    first = WindowRun.read(tmp_path / "windows" / "zwitterion.safetensors")
    x = first.recorded.astype(np.float64)
    transfer = np.linalg.norm(x[:, 5] - x[:, 0], axis=1) - np.linalg.norm(x[:, 5] - x[:, 3], axis=1)
    np.testing.assert_allclose(transfer, first.values[:, 0], atol=1e-4)
    assert float(rows[0][1]) < -0.4 < float(rows[-1][1])


def test_water_can_induce_dipoles(example: ModuleType, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = example.model_path(model)
    potential = load_potential(path)

    def energy() -> float:
        _, system, positions = example.in_water(path, potential, 1.5, induced=True)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
        context.setPositions(0.1 * positions)
        return float(context.getState(energy=True).getPotentialEnergy()._value)

    whole = energy()
    # the same damping of charges; what differs is the energy of the dipoles, which is negative
    monkeypatch.setattr(example, "INDUCTION", {"dampingLength": example.INDUCTION["dampingLength"]})
    assert -400.0 < whole - energy() < -4.0


def test_one_of_six_neutral_molecules_is_sampled(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    # as many frames on both sides, and twice as many of the neutral ones with the hydroxyl group turned away; the
    # proton is nearest in a sixth of the zwitterions
    transfer = np.concatenate([rng.uniform(-0.9, -0.1, 600), rng.uniform(0.1, 1.0, 600)])
    turn = np.concatenate([np.zeros(600), np.tile([10.0, 170.0, 170.0], 200)])
    values = np.stack([transfer, turn], axis=1)
    order = rng.permutation(1200)
    same = (Bias.umbrella(0.0, 1e-9), None)
    samples = Reweighted.of([same, same], [values[order[:600]], values[order[600:]]], 298.15)
    nearest = (samples.values[:, 0] > 0) | (rng.random(1200) < 1 / 6)
    regions = example.Regions(samples.values[:, 0], samples.values[:, 1], nearest)
    share = regions.masks["zwitterion"].sum() / 600
    example.report(samples, regions)
    said = capsys.readouterr().out
    # -RT ln 6, by the share there is, and -RT ln 2 at 298.15 K
    found = re.search(r"neutral less zwitterion +([+-][\d.]+) \+- ([\d.]+)", said)
    assert found is not None and 0.1 < share < 0.25
    assert float(found[1]) == pytest.approx(0.5925 * np.log(share), abs=0.011) and float(found[2]) < 0.09
    assert re.search(r"turned away less towards +-0\.41 ", said)
    example.draw(samples, regions, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 10_000


def test_a_sixth_of_the_zwitterion(example: ModuleType) -> None:
    frames = np.stack([example.ZWITTERION] * 3)
    # another proton, and another oxygen, come nearer
    frames[1, [example.PROTON, 6]] = frames[1, [6, example.PROTON]]
    frames[2, [example.O1, example.O2]] = frames[2, [example.O2, example.O1]]
    assert example.regions_of(frames).masks["zwitterion"].tolist() == [True, False, False]


def test_barriers(example: ModuleType) -> None:
    def found(counts: dict[float, int]) -> dict[str, list[float]]:
        transfer = np.repeat(list(counts), list(counts.values()))
        values = np.stack([transfer, np.zeros(len(transfer))], axis=1)
        order = np.random.default_rng(1).permutation(len(values))
        same = (Bias.umbrella(0.0, 1e-9), None)
        samples = Reweighted.of([same, same], [values[order[::2]], values[order[1::2]]], 298.15)
        every = np.ones(len(values), dtype=bool)
        return example.barriers(samples, example.Regions(samples.values[:, 0], samples.values[:, 1], every))

    heights = found({-0.85: 800, -0.45: 300, 0.05: 100, 0.45: 200, 0.95: 400})
    # RT ln 8 and RT ln 4
    assert heights["barrier from zwitterion"][0] == pytest.approx(1.23, abs=0.01)
    assert heights["barrier from neutral"][0] == pytest.approx(0.82, abs=0.01)
    assert found({-0.85: 10, -0.55: 20, 0.05: 40, 0.45: 80, 0.95: 160}) == {}


def test_what_it_says_without_a_model(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="There is no file at"):
        run(example, monkeypatch, "--model", tmp_path / "none.safetensors", "--output", tmp_path)
