"""``openmm-mlff calibrate`` on members that disagree by a known amount."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_mlff.cli import main
from openmm_mlff.data.datasets import Dataset, split_dataset, write_dataset
from openmm_mlff.data.model_file import load_card
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import save_ensemble, spread_of
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_spookynet import SpookyNet, SpookyNetConfig

WATER = np.array([[0.0, 0.0, 0.0], [0.97, 0.0, 0.0], [-0.243, 0.939, 0.0]])


def members(n: int) -> list[SpookyNet]:
    """One network whose output is scaled differently: spreads of forces are proportional to their sizes."""
    torch.manual_seed(0)
    config = SpookyNetConfig(
        num_features=8, num_basis_functions=6, num_modules=1, num_random_features=8, elements=(1, 8),
        use_zbl_repulsion=False, use_electrostatics=False,
    )  # fmt: skip
    first = SpookyNet(config).double()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    models = []
    for scale in np.linspace(0.8, 1.2, n):
        model = SpookyNet(config).double()
        model.load_state_dict(first.state_dict())
        with torch.no_grad():
            model.output.weight[0] *= scale
        models.append(model.requires_grad_(False))
    return models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose forces are 3 spreads away from the mean, in random directions, and the ensemble."""
    path = tmp_path_factory.mktemp("calibrate")
    models = members(4)
    rng = np.random.default_rng(0)
    structures = []
    for i in range(60):
        bare = Structure(np.array([8, 1, 1]), WATER + rng.normal(0, 0.08, (3, 3)))
        every = [m.energy_and_forces(bare) for m in models]
        energies, forces = np.array([[e] for e, _ in every]), np.stack([f for _, f in every])
        energy_spread, force_spread = spread_of(energies, forces)
        direction = rng.normal(size=(3, 3))
        direction *= 3.0 * force_spread[:, None] / np.linalg.norm(direction, axis=1)[:, None]
        energy = float(energies.mean() + 2.0 * energy_spread[0] * rng.choice([-1, 1]))
        info = {"class": "first" if i % 2 else "second"}
        structures.append(bare.replace(energy=energy, forces=forces.mean(0) + direction, group=f"g{i // 3}", info=info))
    write_dataset(path / "data", structures, name="waters", method={"method": "made up"}, sampling={})
    split_dataset(path / "data", {"train": 0.2, "valid": 0.4, "test": 0.4}, seed=0)
    save_ensemble(models, path / "ensemble.safetensors", name="four", licence="MIT")
    save_potential(models[0], path / "member.safetensors")
    return path


def command(folder: Path, model: str, *more: str) -> list[str]:
    return ["calibrate", "--model", str(folder / model), "--data", str(folder / "data"), "--output", str(folder), *more]


def test_factors_are_found_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = folder / "calibrated.safetensors"
    assert main(command(folder, "ensemble.safetensors", "--by", "class", "--save", str(saved), "--margin", "1.5")) == 0
    printed = capsys.readouterr().out
    assert "limit of a simulation" in printed and "…" not in printed
    result = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    factors = result["factors"]
    assert factors["force_factor"] == pytest.approx(3.0, rel=1e-6)
    assert factors["energy_factor"] == pytest.approx(2.0, rel=1e-6)
    rows = {row["name"]: row for row in result["forces"]["rows"]}
    assert set(rows) == {"all", "first", "second"}
    # every error is 3 spreads: their order is kept, and the largest errors have the largest spreads
    assert rows["all"]["spearman"] == pytest.approx(1.0)
    assert rows["all"]["area_rescaled"] < rows["all"]["area"]
    frames = {row["name"]: row for row in result["frames"]["rows"]}
    assert frames["all"]["flagged"] == 1.0 and frames["all"]["n"] == result["structures"]["test"]
    model, card = load_potential(saved), load_card(saved)
    assert (
        model.config.force_factor == factors["force_factor"] and model.config.energy_factor == factors["energy_factor"]
    )
    assert (
        card["name"] == "four" and card["licence"] == "MIT" and set(card["members"]) == {f"member{k}" for k in range(4)}
    )
    assert card["calibration"]["forces"]["spearman"] == pytest.approx(1.0)
    valid = json.loads((folder / "data" / "card.json").read_text(encoding="utf-8"))["splits"]["groups"]["valid"]
    largest = 0.0
    ensemble = load_potential(folder / "ensemble.safetensors")
    for s in Dataset(folder / "data").load():
        if s.group in valid:
            spread = ensemble.evaluate(ensemble.batch(s)).force_spread
            assert spread is not None
            largest = max(largest, float(spread.max()))
    assert model.config.force_limit == pytest.approx(1.5 * 3.0 * largest, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("member.safetensors", (), "--model: expected an ensemble, got a spookynet model"),
        ("ensemble.safetensors", ("--margin", "0"), "--margin: expected a positive number, got 0.0"),
        ("ensemble.safetensors", ("--data", "nowhere"), "data: no folder or file at nowhere"),
        ("ensemble.safetensors", ("--by", "colour"), "key: expected one of all, formula"),
    ],
)
def test_what_cannot_be_calibrated(
    folder: Path, capsys: pytest.CaptureFixture[str], model: str, more: tuple[str, ...], message: str
) -> None:
    assert main(command(folder, model, *more)) == 1
    assert message in capsys.readouterr().err
