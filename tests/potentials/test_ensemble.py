"""Ensembles against their members, evaluated alone and put together by numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.composition import Interpolated
from openmm_mlff.potentials.ensemble import Ensemble, EnsembleConfig, save_ensemble, spread_of
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.testing import PotentialContract
from openmm_mlff.testing.systems import cluster, crystal
from openmm_so3krates import SO3krates, SO3kratesConfig
from openmm_spookynet import SpookyNet, SpookyNetConfig


def randomised(model: Any) -> Any:
    """All weights random, of the size that training gives."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "raw" not in name:
                parameter += 0.3 * torch.randn_like(parameter) / max(1.0, math.sqrt(parameter.shape[-1]))
    return model.double().eval().requires_grad_(False)


def spookynet(seed: int, **options: Any) -> SpookyNet:
    torch.manual_seed(seed)
    # sizes whose native code other tests compile too
    small = {"num_features": 16, "num_random_features": 16, "num_modules": 2, "num_basis_functions": 8}
    return randomised(SpookyNet(SpookyNetConfig(**{**small, **options})))


def so3krates(seed: int) -> SO3krates:
    torch.manual_seed(seed)
    off = dict.fromkeys(("use_electrostatics", "use_dispersion", "predict_charges", "predict_hirshfeld"), False)
    # sizes whose native code other tests compile too
    small: dict[str, Any] = {"num_features": 16, "num_layers": 1, "num_heads": 4, "num_basis_functions": 6, **off}
    return randomised(SO3krates(SO3kratesConfig(degrees=(2, 3), elements=(1, 6, 7, 8), **small)))


@pytest.fixture(scope="module")
def members() -> list[SpookyNet]:
    return [spookynet(seed) for seed in (1, 2, 3)]


def alone(members: list[Any], structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """Energies ``(n_members,)`` and forces ``(n_members, n_atoms, 3)``, each member by itself."""
    found = [m.energy_and_forces(structure) for m in members]
    return np.array([e for e, _ in found]), np.stack([f for _, f in found])


class TestContractOfSpookyNets(PotentialContract):
    separable = False  # as SpookyNet: charges and embeddings are spread over all atoms
    extensive = False

    def make(self) -> Ensemble:
        return Ensemble([spookynet(4), spookynet(5)])


@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize("make", [spookynet, so3krates])
def test_numbers_are_those_of_the_members(make: Any, compile: bool | str) -> None:
    members = [make(seed) for seed in (1, 2, 3)]
    ensemble = Ensemble(members)
    structure = cluster(ensemble, 7, seed=1)
    energies, forces = alone(members, structure)
    # the definition of a sample's standard deviation, term by term
    energy_spread = math.sqrt(sum((e - energies.mean()) ** 2 for e in energies) / 2)
    away = forces - forces.mean(axis=0)
    force_spread = np.sqrt((away**2).sum(axis=(0, 2)) / 2)
    evaluator = ensemble.evaluator(structure, ("energy", "forces", "spread"), compile)
    for result in (ensemble.evaluate(ensemble.batch(structure)), evaluator(structure.positions)):
        assert result.forces is not None and result.spread is not None and result.force_spread is not None
        assert float(result.energy[0]) == pytest.approx(energies.mean(), abs=1e-10)
        np.testing.assert_allclose(result.forces, forces.mean(axis=0), rtol=0, atol=1e-10)
        assert float(result.spread[0]) == pytest.approx(energy_spread, abs=1e-10)
        np.testing.assert_allclose(result.force_spread, force_spread, rtol=0, atol=1e-10)
    fresh = ensemble.evaluator(structure, compile=compile)
    found = fresh.arrays(structure.positions)
    assert fresh.spreads is not None
    np.testing.assert_allclose(found[0], [energies.mean()], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found[1], forces.mean(axis=0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(fresh.spreads[0], [energy_spread], rtol=0, atol=1e-10)
    np.testing.assert_allclose(fresh.spreads[1], force_spread, rtol=0, atol=1e-10)
    assert force_spread.min() > 1e-5, "the members should differ"


def test_equal_members_agree(members: list[SpookyNet]) -> None:
    twins = Ensemble([members[0], members[0]])
    structure = cluster(twins, 6, seed=2)
    result = twins.evaluate(twins.batch([structure, structure]))
    assert result.spread is not None and result.force_spread is not None
    assert result.spread.tolist() == [0.0, 0.0] and not result.force_spread.any()
    assert result.force_spread.shape == (12,)


def test_spread_of_known_numbers() -> None:
    energies = np.array([[1.0, 5.0], [3.0, 5.0]])
    forces = np.zeros((2, 3, 3))
    forces[0, 1], forces[1, 1] = [1.0, 0.0, 2.0], [-1.0, 0.0, 0.0]
    energy_spread, force_spread = spread_of(energies, forces)
    np.testing.assert_allclose(energy_spread, [math.sqrt(2.0), 0.0])
    np.testing.assert_allclose(force_spread, [0.0, math.sqrt(2.0 + 2.0), 0.0])


def test_boxes_and_batches(members: list[SpookyNet]) -> None:
    ensemble = Ensemble(members)
    ensemble.long_range_cutoff = 6.0
    assert all(m.long_range_cutoff == 6.0 for m in members)
    cell = np.array([[5.1, 0.0, 0.0], [1.3, 4.9, 0.0], [-1.1, 0.8, 5.3]])
    structure = crystal(ensemble, 6, cell, seed=3)
    energies, forces = alone(members, structure)
    evaluator = ensemble.evaluator([structure, structure])
    box = np.stack([cell, cell])
    found = evaluator.arrays(np.concatenate([structure.positions] * 2), box)
    np.testing.assert_allclose(found[0], [energies.mean()] * 2, atol=1e-9)
    np.testing.assert_allclose(found[1], np.tile(forces.mean(axis=0), (2, 1)), atol=1e-9)
    assert evaluator.spreads is not None and evaluator.spreads[1].shape == (12,)
    for m in members:
        m.long_range_cutoff = None


def test_charges_answer_to_a_potential(members: list[SpookyNet]) -> None:
    """dE/dphi_i = q_i for the means, and the spread is that of the energies in the potential."""
    ensemble = Ensemble(members)
    structure = cluster(ensemble, 5, seed=4)
    batch, phi = ensemble.batch(structure), torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)
    inside = ensemble.evaluate(batch.replace(external_potential=phi))
    outside = ensemble.evaluate(batch)
    assert outside.charges is not None and inside.spread is not None
    torch.testing.assert_close(inside.energy - outside.energy, (outside.charges * phi).sum()[None])
    every = [m.evaluate(batch.replace(external_potential=phi)).energy for m in members]
    torch.testing.assert_close(inside.spread, torch.stack(every).std(0))
    moved = ensemble.evaluator(structure, ("energy", "forces", "charges"))(structure.positions, potential=phi)
    torch.testing.assert_close(moved.energy, inside.energy)
    torch.testing.assert_close(moved.spread, inside.spread)
    without = Ensemble([so3krates(1), so3krates(2)])
    with pytest.raises(ValueError, match="external_potential"):
        without.evaluator(structure)(structure.positions, potential=phi)


def test_files_keep_members_cards_and_calibration(members: list[SpookyNet], tmp_path: Path) -> None:
    files = [save_potential(m, tmp_path / f"{k}.safetensors", licence=f"L{k}") for k, m in enumerate(members)]
    calibration = {"force_factor": 2.5, "force_limit": 0.4}
    path = save_ensemble([*files[:2], members[2]], tmp_path / "all.safetensors", calibration, name="three")
    card = model_file.load_card(path)
    assert card["kind"] == "composite" and card["name"] == "three"
    assert [card["members"][f"member{k}"].get("licence") for k in range(3)] == ["L0", "L1", None]
    loaded = load_potential(path)
    assert isinstance(loaded, Ensemble)
    assert loaded.config == EnsembleConfig(3, 1.0, 2.5, 0.4)
    structure = cluster(loaded, 6, seed=5)
    energies, forces = alone(members, structure)
    found = loaded.energy_and_forces(structure)
    assert found[0] == pytest.approx(energies.mean(), abs=1e-10)
    np.testing.assert_allclose(found[1], forces.mean(axis=0), atol=1e-10)


def test_bad_members_are_refused(members: list[SpookyNet], tmp_path: Path) -> None:
    other: list[tuple[type[Exception], str, list[Any]]] = [
        (ValueError, "at least two", members[:1]),
        (TypeError, "expected potentials, got a str", [members[0], "file"]),
        (ValueError, "one family, got 'spookynet' and 'so3krates'", [members[0], so3krates(1)]),
        (ValueError, "num_features = 16 for member 0 and 8", [members[0], spookynet(1, num_features=8)]),
        (ValueError, "'interpolated' of several", [Interpolated(members[0], members[1])] * 2),
    ]
    for error, words, given in other:
        with pytest.raises(error, match=words):
            Ensemble(given)
    for name, value in (("force_factor", 0.0), ("energy_factor", math.nan), ("force_limit", -1.0)):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number"):
            Ensemble(members, **{name: value})
    with pytest.raises(ValueError, match="calibration: expected names among"):
        save_ensemble(members, tmp_path / "x.safetensors", {"factor": 2.0})
    with pytest.raises(ValueError, match="outputs: expected names among"):
        Ensemble(members).evaluator(cluster(members[0], 3, seed=1), ("energy", "warmth"))


def test_members_of_another_number_are_refused(members: list[SpookyNet]) -> None:
    found: dict[str, Potential] = {"member0": members[0], "member1": members[1]}
    with pytest.raises(ValueError, match="expected member0, member1, member2"):
        Ensemble.compose(EnsembleConfig(3), found)
