"""Training against sgdml's models of the same geometries, and what training refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmm_gdml.model import GDMLPotential
from openmm_gdml.training import GDML
from openmm_gdml.training_set import TrainingSet, energies_fit, stratified
from openmm_mlff.cli import main
from openmm_mlff.data.formats import read_sgdml_npz
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.units import ANGSTROM_PER_BOHR, EV_PER_KCAL_PER_MOL


@pytest.fixture(scope="module")
def water() -> list[Structure]:
    """Geometries with the energies and forces of springs between all atoms, in eV and angstrom."""
    rng = np.random.default_rng(0)
    base = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    found = []
    for k in range(80):
        r = base + rng.normal(0, 0.08, base.shape)
        energy, forces = 0.0, np.zeros_like(r)
        for i, j, d0, stiffness in ((0, 1, 0.96, 20.0), (0, 2, 0.96, 20.0), (1, 2, 1.52, 5.0)):
            v = r[j] - r[i]
            d = np.linalg.norm(v)
            energy += 0.5 * stiffness * (d - d0) ** 2
            forces[j] -= stiffness * (d - d0) * v / d
            forces[i] += stiffness * (d - d0) * v / d
        found.append(Structure([8, 1, 1], r, energy=energy, forces=forces, group=str(k // 10)))
    return found


@pytest.mark.parametrize("name", ["ethanol_nosym_M200_S1", "cu27_M60_S27"])
def test_the_same_geometries_give_the_model_of_sgdml(shared: Path, name: str) -> None:
    folder = shared / "data" / "gdml"
    stored = np.load(folder / f"{name}_model.npz", allow_pickle=False)
    reference = np.load(folder / f"{name}_ref.npz", allow_pickle=False)
    structures = read_sgdml_npz(folder / f"dataset_{name.split('_')[0]}.npz")
    train = [structures[i] for i in stored["idxs_train"].astype(int)]
    model = GDML(float(stored["sig"]), float(stored["lam"]), stored["perms"].astype(int)).fit(train)
    test = TrainingSet.of([structures[i] for i in reference["idx"].astype(int)], like=TrainingSet.of(train))
    energy, forces = (x.numpy() / EV_PER_KCAL_PER_MOL for x in test.predict(model))
    # two direct solutions of a matrix with a condition number of 1e12 differ by about this
    assert np.abs(forces - reference["F_pred"]).max() < 2e-3
    assert np.abs(energy - reference["E_pred"].ravel()).max() < 2e-3


def test_forces_and_energies_of_springs_are_learnt(water: list[Structure]) -> None:
    trainer = GDML(sigma=[0.5, 2.0, 8.0], lam=[1e-12, 1e-6], permutations="auto")
    model = trainer.fit(water[:40], water[40:60])
    assert model.config.n_permutations == 2
    assert len(trainer.selection) == 6
    best = min(trainer.selection, key=lambda row: row["forces_rmse"])
    assert (model.config.sigma, model.config.lam) == (best["sigma"], best["lam"])
    errors = TrainingSet.of(water[60:]).errors(model)
    spread = float(np.std([s.forces for s in water]))
    assert errors["forces_rmse"] < 0.01 * spread
    assert errors["energy_mae"] < 0.01 * float(np.std([s.energy for s in water]))


def test_energy_constraints_fit_energies(water: list[Structure]) -> None:
    train = water[:12]
    free = GDML(2.0, 1e-10, None).fit(train)
    bound = GDML(2.0, 1e-10, None, energy_constraints=True).fit(train)
    data = TrainingSet.of(train)
    assert bound.config.energy_constraints
    assert data.errors(bound)["energy_mae"] < 0.1 * data.errors(free)["energy_mae"]
    assert data.errors(bound)["energy_mae"] < 1e-4


def test_conjugate_gradients_give_the_same_model(water: list[Structure]) -> None:
    direct = GDML(2.0, 1e-8, None).fit(water[:30])
    trainer = GDML(2.0, 1e-8, None, solver="cg", columns=0.5, tolerance=1e-8)
    iterative = trainer.fit(water[:30])
    assert trainer.solution is not None and trainer.solution.method == "cg"
    test = TrainingSet.of(water[60:])
    assert torch.allclose(test.predict(direct)[1], test.predict(iterative)[1], atol=1e-4)


def test_an_interrupted_choice_goes_on(water: list[Structure], tmp_path: Path) -> None:
    first = GDML([1.0, 2.0], 1e-8, None)
    model = first.fit(water[:20], water[40:60], tmp_path)
    (tmp_path / "sigma2_lam1e-08.json").unlink()
    again = GDML([1.0, 2.0], 1e-8, None)
    other = again.fit(water[:20], water[40:60], tmp_path)
    assert torch.equal(model.coefficients, other.coefficients)
    assert again.selection[0] == first.selection[0]
    with pytest.raises(ValueError, match=r"folder: .* other data or settings"):
        again.fit(water[:21], water[40:60], tmp_path)


def changed(structures: list[Structure], k: int, **changes: Any) -> list[Structure]:
    return [s.replace(**changes) if i == k else s for i, s in enumerate(structures)]


def test_bad_data_is_named(water: list[Structure]) -> None:
    few = water[:10]
    half_energies = [s.replace(energy=s.energy / 27.2) for s in water]  # type: ignore[operator]
    gradients = [s.replace(forces=-s.forces) for s in water]  # type: ignore[operator]
    for structures, options, message in (
        (few[:1], {}, "at least 2 geometries"),
        ([*few, few[3]], {}, r"expected different geometries, got 1 pairs of equal ones \(3 and 10\)"),
        (changed(few, 2, forces=None), {}, "structure 2 has none"),
        (changed(few, 4, numbers=[1, 8, 1]), {}, "structure 4|as structure 4"),
        (changed(few, 4, charge=1, multiplicity=2), {}, "one charge and multiplicity"),
        (half_energies, {}, "different units"),
        (gradients, {}, "gradients"),
        (few, {"lattice": np.eye(3) * 9}, "open molecules"),
        (few, {"sigma": -1.0}, "sigma: expected a positive"),
        (few, {"sigma": [1.0, 2.0]}, "validation: expected"),
        (few, {"permutations": np.array([[0, 1, 2], [1, 0, 2]])}, "permutations: row 1"),
        (few, {"permutations": "all"}, "permutations: expected 'auto'"),
        (changed(few, 0, energy=None), {"energy_constraints": True}, "energy_constraints"),
        (few, {"memory": "1 kB", "solver": "cholesky"}, "limit is"),
    ):
        settings: dict[str, Any] = {"sigma": 2.0, "permutations": None} | options
        with pytest.raises((ValueError, MemoryError), match=message):
            GDML(**settings).fit(structures)


@pytest.mark.parametrize("factor", [0.75, 1.0, 1.4])
def test_energies_of_a_poor_fit_are_not_taken_for_other_units(factor: float) -> None:
    rng = np.random.default_rng(2)
    integrated = torch.from_numpy(rng.normal(size=60))
    energies_fit(factor * integrated, integrated)
    # lengths in bohr instead of angstrom, the least that units differ by
    for mistaken in (ANGSTROM_PER_BOHR, 1 / ANGSTROM_PER_BOHR):
        with pytest.raises(ValueError, match="different units"):
            energies_fit(mistaken * integrated, integrated)


def test_stratified_choice_follows_the_energies() -> None:
    rng = np.random.default_rng(0)
    energies = np.concatenate([rng.normal(0, 1, 900), rng.normal(20, 1, 100)])
    chosen = stratified(energies, 100, np.random.default_rng(1))
    assert len(set(chosen.tolist())) == 100
    assert 8 <= int((energies[chosen] > 10).sum()) <= 12
    with pytest.raises(ValueError, match="n: expected"):
        stratified(energies, 1001, rng)


def test_the_command_trains_a_model_that_loads(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(shared / "data" / "gdml" / "dataset_ethanol.npz")
    arguments = ["train", "--family", "gdml", "--data", data, "--output", str(tmp_path / "run"), "--quiet"]
    options = ["data.block_size=100", "n_train=30", "n_valid=50", "sigma=10,20", "lam=1e-8"]
    for option in options:
        arguments += ["--set", option]
    assert main([*arguments, "--seed", "1"]) == 0
    run = tmp_path / "run"
    model = load_potential(run / "model.safetensors")
    assert isinstance(model, GDMLPotential) and model.config.n_train == 30 and model.config.n_permutations in (6, 12)
    report = json.loads((run / "fit.json").read_text(encoding="utf-8"))
    assert len(report["candidates"]) == 2 and report["chosen"]["sigma"] == model.config.sigma
    assert (run / "test_parity.png").exists()
    test = json.loads((run / "test_errors.json").read_text(encoding="utf-8"))
    assert 10 < test["tables"]["all"][0]["forces_mae"] < 400  # meV/angstrom
    before = (run / "model.safetensors").stat().st_mtime_ns
    assert main(["train", "--data", data, "--output", str(run), "--resume", "--quiet"]) == 0
    assert (run / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "sigmas=3"], "no option is called 'sigmas'"),
        (["--set", "sigma"], "expected NAME=VALUE"),
        (["--set", "n_train=1"], "n_train: expected at least 2"),
        (["--steps", "10"], "--steps: this family is fitted"),
    ],
)
def test_the_command_names_wrong_options(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    data = str(shared / "data" / "gdml" / "dataset_ethanol.npz")
    arguments = ["train", "--family", "gdml", "--data", data, "--output", str(tmp_path / "run"), "--quiet"]
    assert main([*arguments, "--set", "data.block_size=100", *options]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
