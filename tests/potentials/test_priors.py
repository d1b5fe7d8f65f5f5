"""Priors: values by hand, forces by finite differences, OpenMM's own forces, and fits to data with known answers."""

from __future__ import annotations

import json

import numpy as np
import openmm
import pytest
import torch

from openmm_mlff.forces.prior_forces import prior_forces
from openmm_mlff.potentials.priors import PriorTerms, angles_of, fit_priors, repulsion
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV, NM_PER_ANGSTROM

KT = 0.02585
BONDS = [(0, 1), (1, 2), (2, 3), (2, 4), (4, 5)]


def terms() -> PriorTerms:
    angles = angles_of(BONDS)
    return PriorTerms(
        bonds=np.array(BONDS),
        bond_lengths=np.array([1.33, 1.47, 1.54, 1.55, 1.34]),
        bond_constants=np.array([42.0, 29.0, 27.0, 28.0, 41.0]),
        angles=angles,
        angle_values=np.linspace(1.8, 2.2, len(angles)),
        angle_constants=np.linspace(7.0, 10.0, len(angles)),
        pairs=np.array([[0, 3], [0, 5]]),
        pair_lengths=np.array([2.0, 2.5]),
    )


def positions(n: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    chain = np.array([[0, 0, 0], [1.3, 0, 0], [2.0, 1.3, 0], [1.5, 2.2, 1.1], [3.5, 1.2, 0.2], [4.2, 2.3, 0.6]])
    return chain + rng.normal(scale=0.1, size=(n, 6, 3))


def test_energies_by_hand() -> None:
    right_angle = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    prior = PriorTerms(
        bonds=np.array([[0, 1], [1, 2]]),
        bond_lengths=np.array([1.5, 1.5]),
        bond_constants=np.array([2.0, 4.0]),
        angles=np.array([[0, 1, 2]]),
        angle_values=np.array([np.pi / 3]),
        angle_constants=np.array([0.5]),
        pairs=np.array([[0, 2]]),
        pair_lengths=np.array([2.0]),
        exponent=4,
    )
    expected = 0.5 * 2 * 0.25 + 0.5 * 4 * 0.25 + 0.25 * (np.pi / 6) ** 2 + (2 / np.sqrt(5)) ** 4
    assert float(prior.energy(right_angle)) == pytest.approx(expected, abs=1e-12)


def test_forces_are_the_slope_of_the_energy_in_batches() -> None:
    prior, x = terms(), torch.from_numpy(positions(4))
    energy, forces = prior.energy_and_forces(x.reshape(2, 2, 6, 3))
    assert energy.shape == (2, 2) and forces.shape == (2, 2, 6, 3)
    step = 1e-5
    for i in range(6):
        for a in range(3):
            moved = torch.zeros_like(x)
            moved[:, i, a] = step
            slope = (prior.energy(x + moved) - prior.energy(x - moved)) / (2 * step)
            assert forces.reshape(4, 6, 3)[:, i, a].numpy() == pytest.approx(-slope.numpy(), abs=1e-6)
    assert prior.forces(x.numpy(), chunk=3) == pytest.approx(forces.reshape(4, 6, 3).numpy(), abs=1e-14)


def test_openmm_forces_are_the_same() -> None:
    prior, x = terms(), positions(3)
    system = openmm.System()
    for _ in range(6):
        system.addParticle(12.0)
    forces = prior_forces(prior, group=3)
    assert len(forces) == 3 and all(f.getForceGroup() == 3 for f in forces)
    for force in forces:
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    energies, gradients = prior.energy_and_forces(torch.from_numpy(x))
    for k in range(3):
        context.setPositions(x[k] * NM_PER_ANGSTROM)
        state = context.getState(energy=True, forces=True)
        assert state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV == pytest.approx(float(energies[k]), abs=1e-9)
        found = state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
        assert found == pytest.approx(gradients[k].numpy(), abs=1e-8)


def test_only_terms_that_are_there_become_forces() -> None:
    assert prior_forces(PriorTerms()) == []
    x = torch.zeros(2, 3, 3, dtype=torch.float64)
    energy, forces = PriorTerms().energy_and_forces(x)
    assert energy.tolist() == [0.0, 0.0] and not forces.any()


def test_a_straight_angle_has_finite_forces() -> None:
    prior = PriorTerms(angles=np.array([[0, 1, 2]]), angle_values=np.array([2.0]), angle_constants=np.array([1.0]))
    straight = torch.tensor([[-1.0, 0, 0], [0, 0, 0], [1.0, 0, 0]], dtype=torch.float64)
    energy, forces = prior.energy_and_forces(straight)
    assert float(energy) == pytest.approx(0.5 * (np.pi - 2.0) ** 2, abs=1e-5) and torch.isfinite(forces).all()


def test_all_angles_between_bonds() -> None:
    assert angles_of(BONDS).tolist() == [[0, 1, 2], [1, 2, 3], [1, 2, 4], [3, 2, 4], [2, 4, 5]]


def test_fit_gives_back_a_harmonic_triangle() -> None:
    # lengths and angle drawn from their own Gaussians: mean and kT / variance are known
    rng = np.random.default_rng(0)
    n, k_bond, k_angle = 200_000, 30.0, 8.0
    a = 1.4 + rng.normal(scale=np.sqrt(KT / k_bond), size=n)
    b = 1.5 + rng.normal(scale=np.sqrt(KT / k_bond), size=n)
    theta = 2.0 + rng.normal(scale=np.sqrt(KT / k_angle), size=n)
    x = np.zeros((n, 3, 3))
    x[:, 0, 0] = a
    x[:, 2, 0], x[:, 2, 1] = b * np.cos(theta), b * np.sin(theta)
    prior = fit_priors(x, [(0, 1), (1, 2)], KT)
    assert prior.bond_lengths == pytest.approx([1.4, 1.5], abs=3e-4)
    assert prior.bond_constants == pytest.approx([k_bond, k_bond], rel=0.015)
    assert prior.angles.tolist() == [[0, 1, 2]]
    assert prior.angle_values == pytest.approx([2.0], abs=6e-4)
    assert prior.angle_constants == pytest.approx([k_angle], rel=0.015)


def test_weights_undo_a_bias() -> None:
    # lengths drawn about 1.6 instead of 1.4, with weights p/q of the two Gaussians
    rng = np.random.default_rng(0)
    s = np.sqrt(KT / 30.0)
    r = 1.42 + rng.normal(scale=1.5 * s, size=100_000)
    weights = np.exp(-0.5 * ((r - 1.4) / s) ** 2 + 0.5 * ((r - 1.42) / (1.5 * s)) ** 2)
    x = np.zeros((len(r), 2, 3))
    x[:, 1, 0] = r
    prior = fit_priors(x, [(0, 1)], KT, weights=weights)
    assert prior.bond_lengths == pytest.approx([1.4], abs=5e-4)
    assert prior.bond_constants == pytest.approx([30.0], rel=0.02)


def test_repulsion_reaches_its_energy_at_the_shortest_distances_of_the_data() -> None:
    x = positions(2000)
    pairs, lengths = repulsion(x, [(0, 5)], energy=0.05, exponent=6, quantile=0.01)
    closest = np.quantile(np.linalg.norm(x[:, 0] - x[:, 5], axis=1), 0.01)
    prior = PriorTerms(pairs=pairs, pair_lengths=lengths, exponent=6)
    two = torch.zeros(6, 3, dtype=torch.float64)
    two[5, 0] = closest
    assert float(prior.energy(two)) == pytest.approx(0.05, rel=1e-9)


def test_priors_pass_through_json() -> None:
    prior = terms()
    again = PriorTerms.from_dict(json.loads(json.dumps(prior.to_dict())))
    x = torch.from_numpy(positions(2))
    assert torch.equal(again.energy(x), prior.energy(x))
    assert PriorTerms.from_dict(json.loads(json.dumps(PriorTerms().to_dict()))).bonds.shape == (0, 2)
    with pytest.raises(ValueError, match="this version does not know 'dihedrals'"):
        PriorTerms.from_dict({"dihedrals": []})


def test_wrong_input_is_named() -> None:
    x = positions(10)
    with pytest.raises(ValueError, match=r"positions: expected shape \(n, n_particles, 3\)"):
        fit_priors(x[0], BONDS, KT)
    with pytest.raises(ValueError, match="kT: expected a positive energy"):
        fit_priors(x, BONDS, 0.0)
    with pytest.raises(ValueError, match="bonds: expected particles from 0 to 5, got 0 to 6"):
        fit_priors(x, [(0, 6)], KT)
    with pytest.raises(ValueError, match=r"bonds: \[0, 1\] never varies in the data"):
        fit_priors(np.repeat(x[:1], 5, axis=0), [(0, 1)], KT)
    with pytest.raises(ValueError, match="weights: expected 10 weights"):
        fit_priors(x, BONDS, KT, weights=np.ones(3))
    with pytest.raises(ValueError, match=r"bonds: expected rows of 2 different particles, got \[\[1, 1\]\]"):
        PriorTerms(bonds=np.array([[1, 1]]), bond_lengths=np.ones(1), bond_constants=np.ones(1))
    with pytest.raises(ValueError, match="bond_constants: expected 1 positive numbers"):
        PriorTerms(bonds=np.array([[0, 1]]), bond_lengths=np.ones(1), bond_constants=-np.ones(1))
