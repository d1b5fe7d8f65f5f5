"""Prior energies by hand, and their fit to samples of known distributions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from openmm_mlff.potentials.priors import PriorTerms, angles_of, fit_priors, repulsion

RIGHT_ANGLE = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 2, 0]], dtype=torch.float64)


def all_terms() -> PriorTerms:
    return PriorTerms(
        bonds=[[0, 1], [1, 2]],
        bond_lengths=[1.5, 1.5],
        bond_constants=[10.0, 4.0],
        angles=[[0, 1, 2]],
        angle_values=[np.pi / 3],
        angle_constants=[2.0],
        pairs=[[0, 2]],
        pair_lengths=[2.0],
        exponent=6,
    )


def test_energy_by_hand() -> None:
    expected = 0.5 * 10 * 0.25 + 0.5 * 4 * 0.25 + 0.5 * 2 * (np.pi / 6) ** 2 + (2.0 / np.sqrt(5.0)) ** 6
    assert float(all_terms().energy(RIGHT_ANGLE)) == pytest.approx(expected, rel=1e-14)


def test_forces_are_minus_the_gradient() -> None:
    torch.manual_seed(0)
    x = RIGHT_ANGLE + 0.3 * torch.randn(4, 2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(all_terms().energy, x.requires_grad_(True))
    energy, forces = all_terms().energy_and_forces(x)
    assert energy.shape == (4, 2) and not energy.requires_grad
    step = torch.zeros_like(x)
    step[..., 2, 1] = 1e-5
    difference = (all_terms().energy(x + step) - all_terms().energy(x - step)) / 2e-5
    np.testing.assert_allclose(forces[..., 2, 1], -difference.detach(), rtol=1e-7, atol=1e-8)
    # no net force, no net torque
    assert float(forces.sum(-2).abs().max()) < 1e-12
    assert float(torch.linalg.cross(x.detach(), forces).sum(-2).abs().max()) < 1e-11
    many = x.detach().reshape(-1, 3, 3).numpy()
    np.testing.assert_allclose(all_terms().forces(many, chunk=3), forces.reshape(-1, 3, 3), rtol=1e-12, atol=1e-13)


def test_straight_angle_has_finite_forces() -> None:
    terms = PriorTerms(angles=[[0, 1, 2]], angle_values=[2.0], angle_constants=[1.0])
    straight = torch.tensor([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.float64)
    energy, forces = terms.energy_and_forces(straight)
    assert float(energy) == pytest.approx(0.5 * (np.pi - 2) ** 2, rel=1e-5)
    assert bool(torch.isfinite(forces).all())


def test_no_terms() -> None:
    energy, forces = PriorTerms().energy_and_forces(RIGHT_ANGLE)
    assert float(energy) == 0 and not forces.any()


def test_fit_finds_the_constants_of_the_distribution() -> None:
    """Bonds and an angle drawn from Gaussians of variance kT / k."""
    rng, kT, n = np.random.default_rng(1), 0.025, 40_000
    k_bond, k_angle = 20.0, 3.0
    r1, r2 = (b + np.sqrt(kT / k_bond) * rng.normal(size=n) for b in (1.5, 1.2))
    theta = 1.9 + np.sqrt(kT / k_angle) * rng.normal(size=n)
    x = np.zeros((n, 3, 3))
    x[:, 0, 0] = r1
    x[:, 2, :2] = r2[:, None] * np.stack([np.cos(theta), np.sin(theta)], -1)
    found = fit_priors(x, [(0, 1), (1, 2)], kT)
    assert found.angles.tolist() == [[0, 1, 2]]
    # relative error of a variance of n samples: sqrt(2 / n) = 0.7 %
    np.testing.assert_allclose(found.bond_constants, k_bond, rtol=0.03)
    np.testing.assert_allclose(found.angle_constants, k_angle, rtol=0.03)
    np.testing.assert_allclose(found.bond_lengths, [1.5, 1.2], atol=5 * np.sqrt(kT / k_bond / n))
    np.testing.assert_allclose(found.angle_values, 1.9, atol=5 * np.sqrt(kT / k_angle / n))
    # whole-number weights are the same as repeated frames
    repeats = rng.integers(0, 3, size=500)
    weighted = fit_priors(x[:500], [(0, 1)], kT, weights=repeats.astype(float))
    repeated = fit_priors(np.repeat(x[:500], repeats, axis=0), [(0, 1)], kT)
    np.testing.assert_allclose(weighted.bond_constants, repeated.bond_constants, rtol=1e-10)


def test_fit_of_a_single_bond_has_no_angles() -> None:
    x = np.zeros((2, 2, 3))
    x[:, 1, 0] = [1.0, 1.2]
    found = fit_priors(x, [(0, 1)], kT=0.02)
    np.testing.assert_allclose(found.bond_constants, 0.02 / 0.01)
    assert len(found.angles) == 0


def test_angles_between_all_bonds() -> None:
    assert angles_of([(0, 1), (2, 1), (1, 3)]).tolist() == [[0, 1, 2], [0, 1, 3], [2, 1, 3]]
    assert angles_of([(0, 1)]).shape == (0, 3)


def test_repulsion_has_its_energy_where_the_data_end() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 2, 3)) + np.array([[0.0, 0, 0], [6, 0, 0]])
    pairs, lengths = repulsion(x, [(0, 1)], energy=0.1, exponent=8, quantile=0.01)
    terms = PriorTerms(pairs=pairs, pair_lengths=lengths, exponent=8)
    energies = terms.energy(torch.from_numpy(x))
    assert float((energies > 0.1).double().mean()) == pytest.approx(0.01, abs=0.0011)


def test_plain_data_round_trip() -> None:
    plain = json.loads(json.dumps(all_terms().to_dict()))
    assert float(PriorTerms.from_dict(plain).energy(RIGHT_ANGLE)) == float(all_terms().energy(RIGHT_ANGLE))
    with pytest.raises(ValueError, match="does not know 'torsions'"):
        PriorTerms.from_dict(plain | {"torsions": []})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bonds": [[0, 0]], "bond_lengths": [1.0], "bond_constants": [1.0]}, "bonds: expected rows of 2 different"),
        ({"bonds": [[0, 1]], "bond_lengths": [1.0], "bond_constants": [-1.0]}, "bond_constants: expected 1 positive"),
        ({"pairs": [[0, 1]]}, "pair_lengths: expected 1 positive"),
        ({"angles": [[0, 1, 2]], "angle_values": [4.0], "angle_constants": [1.0]}, "angle_values: .*up to pi"),
        ({"exponent": 0}, "exponent: expected a whole number of at least 1"),
    ],
)
def test_impossible_terms(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorTerms(**arguments)


def test_impossible_data() -> None:
    x = np.random.default_rng(0).normal(size=(5, 3, 3))
    for given, message in (
        ({"positions": x[:1]}, "positions: expected shape"),
        ({"kT": 0.0}, "kT: expected a positive"),
        ({"weights": np.ones(4)}, "weights: expected 5 weights"),
        ({"bonds": [(0, 3)]}, "bonds: expected particles from 0 to 2"),
        ({"positions": np.repeat(x[:1], 4, axis=0)}, r"bonds: \[0, 1\] never varies"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_priors(**({"positions": x, "bonds": [(0, 1)], "kT": 0.025} | given))
    with pytest.raises(ValueError, match="energy: expected a positive number"):
        repulsion(x, [(0, 1)], energy=0.0)
