"""SO3krates learns from energies, forces, dipoles and charges by the project's own trainer."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmm_mlff.cli import main
from openmm_mlff.data.datasets import split_dataset, write_dataset
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_so3krates import SO3krates

CHARGES = np.array([-0.6, 0.3, 0.3])
REFERENCE = np.array([[0.0, 0.0, 0.0], [0.97, 0.0, 0.0], [-0.243, 0.939, 0.0]])
#: eV/angstrom^2 and angstrom, of the springs between all atoms
SPRINGS = {(0, 1): (30.0, 0.97), (0, 2): (30.0, 0.97), (1, 2): (8.0, 1.53)}
ORIGIN = -50.0  # eV
NO_CHARGES = {"use_electrostatics": False, "predict_charges": False}


def spring_molecules(n: int) -> list[Structure]:
    """Three atoms on springs, with exact labels and fixed charges."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        positions = REFERENCE + rng.normal(0.0, 0.08, (3, 3))
        energy, forces = ORIGIN, np.zeros((3, 3))
        for (a, b), (stiffness, length) in SPRINGS.items():
            bond = positions[b] - positions[a]
            r = float(np.linalg.norm(bond))
            energy += 0.5 * stiffness * (r - length) ** 2
            pull = stiffness * (r - length) * bond / r
            forces[a] += pull
            forces[b] -= pull
        found.append(
            Structure(
                np.array([8, 1, 1]),
                positions,
                energy=energy,
                forces=forces,
                dipole=CHARGES @ positions,
                charges=CHARGES,
                group=f"g{i // 8}",
            )
        )
    return found


@pytest.mark.parametrize(
    "model",
    [
        {"use_dispersion": False, "predict_hirshfeld": False},
        pytest.param(
            {"initial_euclidean": "neighbors", "degrees": [1, 2], "use_charge_embed": False, "use_spin_embed": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"degrees": [], "residual_scalars": True, "qk_normalization": True, "normalization": "rms"} | NO_CHARGES,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["equivariant", "as before SO3LR", "distances alone"],
)
def test_the_loss_falls(model: dict[str, Any], tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", spring_molecules(128), name="springs", method={"method": "exact"}, sampling={})
    split_dataset(tmp_path / "data", {"train": 0.75, "valid": 0.125, "test": 0.125}, seed=1)
    small = {"num_features": 16, "num_layers": 2, "num_basis_functions": 12, "elements": [1, 8]}
    charges = float(model.get("predict_charges", True))
    small |= {"hirshfeld_features": 4, "avg_num_neighbors": 2.0}
    recipe = {
        "family": "so3krates",
        "seed": 4,
        "batch_size": 8,
        "model": small | model,
        "loop": {"steps": 120, "validate_every": 40, "warmup_steps": 5, "learning_rate": 5e-3, "ema_decay": 0.9},
        "loss": {"energy": 1.0, "forces": 1.0, "dipole": 0.5 * charges, "charges": 0.5 * charges},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    arguments = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--quiet"]
    assert main(["train", *arguments, "--config", str(tmp_path / "recipe.json")]) == 0
    with (tmp_path / "run" / "history.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]
    for name in ("train_energy", "train_forces", *(("train_charges",) if charges else ())):
        assert float(rows[-1][name]) < 0.3 * float(rows[0][name]), name
    trained = load_potential(tmp_path / "run" / "model.safetensors")
    assert isinstance(trained, SO3krates)
    test = [s for s in spring_molecules(128) if s.group == "g0"]
    result = trained.evaluate(trained.batch(test))
    labels = np.concatenate([s.forces for s in test if s.forces is not None])
    assert result.forces is not None
    assert np.abs(result.forces.numpy() - labels).mean() < 0.5 * np.abs(labels).mean()
    if result.charges is not None:
        assert np.abs(result.charges.numpy().reshape(-1, 3) - CHARGES).mean() < 0.5 * np.abs(CHARGES).mean()
    # the origin of energies is found before the first step
    assert np.abs(result.energy.numpy() - ORIGIN).max() < 3.0
