"""SO3krates models that nobody published, against a second implementation; their parts against known mathematics."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_so3krates import SO3kratesConfig
from openmm_so3krates.layers import BernsteinBasis, Degrees, cutoff_function, spherical_harmonics
from openmm_so3krates.terms import Electrostatics, switch_off

from .random_models import NETWORK_ALONE, so3krates

POSITIONS = np.array(
    [[0, 0, 0.0], [0.9, 0.1, 0], [-0.8, 1.0, 0.3], [-1.5, 0.2, 0.9], [0.3, -1.2, 0.8], [3.3, 1.9, 0.4]]
)
NUMBERS = np.array([8, 1, 6, 1, 7, 17])
NARROW = np.array([[5.0, 0, 0], [1.0, 4.5, 0], [-0.5, 0.7, 5.2]])
PAPER = NETWORK_ALONE | {
    "initial_euclidean": "neighbors",
    "degrees": (1, 2, 3),
    "num_heads": 3,
    "num_features": 12,
    "cutoff": 5.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as SO3LR": {},
    "long-range cutoff": {"long_range_cutoff": 4.5},
    "as the papers before": PAPER,
    "distances alone": {"degrees": (), "num_heads": 1},
    "degree 0": {"degrees": (0,)},
    "degrees 0 and 4": {"degrees": (0, 4), "initial_euclidean": "neighbors"},
    "other radial functions": {"radial_basis": "physnet", "cutoff_function": "cosine"},
    "root mean squares": {"normalization": "rms", "qk_normalization": True, "residual_scalars": True},
    "both residual networks": {"residual_mlp_2": True, "message_normalization": "sqrt_num_features"},
    "no normalisation": {
        "layer_normalization_1": False,
        "layer_normalization_2": False,
        "residual_mlp_1": False,
        "message_normalization": "none",
    },
    "charges without electrostatics": {"use_electrostatics": False, "use_dispersion": False, "use_spin_embed": False},
}


@pytest.mark.parametrize("cell", [None, NARROW], ids=["open", "periodic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_against_the_second_implementation(
    variant: str, cell: np.ndarray | None, so3krates_plain: ModuleType
) -> None:
    options = dict(VARIANTS[variant])
    if cell is not None:
        options.setdefault("long_range_cutoff", 5.0)
    model = so3krates(3, **options)
    c = model.config
    states = [(-2, 3 if c.use_spin_embed else 1)] if c.use_charge_embed else [(0, 1)]
    for charge, multiplicity in states:
        structure = Structure(NUMBERS, POSITIONS, charge, multiplicity, cell)
        expected = so3krates_plain.PlainSO3krates(model).evaluate(NUMBERS, POSITIONS, charge, multiplicity - 1, cell)
        batch = model.batch(structure)
        result = model.evaluate(batch)
        assert float(result.energy) == pytest.approx(expected["energy"], abs=1e-10)
        assert (result.charges is None) == (expected["charges"] is None)
        if result.charges is not None:
            np.testing.assert_allclose(result.charges, expected["charges"], rtol=0, atol=1e-12)
        fixed = model.fixed(batch)
        ratios = model.hirshfeld_ratios(model.features(fixed, model.geometry(batch))[0], fixed)
        if expected["hirshfeld"] is not None:
            assert ratios is not None
            np.testing.assert_allclose(ratios.detach(), expected["hirshfeld"], rtol=0, atol=1e-12)
        for name, value in result.terms.items():
            assert float(value) == pytest.approx(expected[name], abs=1e-10), name
            assert abs(expected[name]) > 1e-3, f"{name}: too small to be compared"
        moved = model.evaluator(structure)(POSITIONS, cell)
        assert float(moved.energy) == pytest.approx(expected["energy"], abs=1e-10)


# -- parts --------------------------------------------------------------------------------------------------------


def test_spherical_harmonics_are_those_of_scipy(so3krates_plain: ModuleType) -> None:
    u = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1)
    ours = spherical_harmonics(u, (0, 1, 2, 3, 4))
    expected = np.array([so3krates_plain.harmonics(v, (0, 1, 2, 3, 4)) for v in u.numpy()])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-13)


def test_spherical_harmonics_are_orthonormal_and_ordered() -> None:
    z, weight = np.polynomial.legendre.leggauss(12)
    phi = 2 * np.pi * np.arange(24) / 24
    s = np.sqrt(1 - z**2)
    grid = np.stack([np.outer(s, np.cos(phi)), np.outer(s, np.sin(phi)), np.outer(z, np.ones(24))], -1).reshape(-1, 3)
    y = spherical_harmonics(torch.from_numpy(grid), (0, 1, 2, 3, 4)).numpy()
    overlap = y.T @ (np.repeat(weight, 24)[:, None] * y) * 2 * np.pi / 24
    np.testing.assert_allclose(overlap, np.eye(25), atol=1e-13)
    first = spherical_harmonics(torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64), (1,))[0]
    np.testing.assert_allclose(first / math.sqrt(3 / (4 * math.pi)), [0.0, 0.8, 0.6], atol=1e-15)  # y, z, x


def test_contraction_keeps_full_precision_after_single() -> None:
    degrees = Degrees((1, 2, 4)).float().double()
    v = torch.randn(5, 17, dtype=torch.float64)
    expected = [v[:, a:b].square().sum(1) / math.sqrt(b - a) for a, b in ((0, 3), (3, 8), (8, 17))]
    torch.testing.assert_close(degrees.invariants(v), torch.stack(expected, 1), rtol=0, atol=1e-15)


def test_bernstein_functions_sum_to_one_and_stay_finite_in_single_precision() -> None:
    r = torch.tensor([1e-3, 0.4, 1.0, 4.5, 9.0], dtype=torch.float64)
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        values = BernsteinBasis(SO3kratesConfig())(r, dtype)
        assert values.dtype == dtype and bool((values >= 0).all())
        torch.testing.assert_close(values.sum(-1), torch.ones(5, dtype=dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["polynomial", "cosine"])
def test_cutoff_functions_end_smoothly(kind: str) -> None:
    r = torch.tensor([0.0, 2.0, 4.5, 4.6, 100.0], dtype=torch.float64, requires_grad=True)
    f = cutoff_function(kind, r, 4.5)
    (slope,) = torch.autograd.grad(f.sum(), r)
    assert f[0] == 1 and bool((f[2:].abs() < 1e-15).all())
    assert bool((slope[2:].abs() < 1e-15).all()) and slope[1] < 0
    assert f[3] == 0 and f[4] == 0


def test_switch_has_its_ends_and_its_middle() -> None:
    r = torch.tensor([-1.0, 0.0, 0.75, 1.5, 7.0], dtype=torch.float64)
    np.testing.assert_allclose(switch_off(r, 0.0, 1.5), [1, 1, 0.5, 0, 0], atol=1e-300)


def test_shifted_electrostatics_and_its_force_vanish_at_the_cutoff() -> None:
    term = Electrostatics(4.0)
    q = torch.ones(3, dtype=torch.float64)
    for limit in (6.0, 12.0):
        r = torch.tensor([limit - 1e-6, limit, limit + 1e-6], dtype=torch.float64, requires_grad=True)
        energy = term(q, q, r, limit)
        (force,) = torch.autograd.grad(energy.sum(), r)
        assert float(energy.detach().abs().max()) < 1e-11 and float(force.abs().max()) < 1e-5
    # the finite potential at contact, 2 / (sigma sqrt(pi))
    contact = term(q, q, torch.full((3,), 1e-6, dtype=torch.float64), None)
    np.testing.assert_allclose(contact, 14.399645351950548 * 2 / (4.0 * math.sqrt(math.pi)), rtol=1e-9)


def test_features_of_every_degree_turn_with_the_molecule() -> None:
    """Euclidean variables transform like harmonics, features not at all: by a rotation that scipy knows."""
    from scipy.spatial.transform import Rotation

    model = so3krates(5, degrees=(1, 2), num_features=8)
    turn = Rotation.from_euler("zyx", [0.4, -1.1, 2.0]).as_matrix()
    states = []
    for positions in (POSITIONS, POSITIONS @ turn.T):
        batch = model.batch(Structure(NUMBERS, positions))
        states.append(model.features(model.fixed(batch), model.geometry(batch)))
    (x, ev), (x_turned, ev_turned) = states
    torch.testing.assert_close(x, x_turned, rtol=0, atol=1e-12)
    order = torch.tensor([2, 0, 1])  # y, z, x -> x, y, z
    vectors, turned = ev[:, :3][:, order], ev_turned[:, :3][:, order]
    torch.testing.assert_close(turned, vectors @ torch.from_numpy(turn).T, rtol=0, atol=1e-12)
    assert float(ev.detach()[:, 3:].abs().max()) > 1e-2


# -- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 10}, "num_heads: expected 4 to divide num_features"),
        ({"degrees": (1, 2, 3)}, "degrees: expected 3 to divide num_features"),
        ({"degrees": (2, 1)}, "degrees: expected ascending numbers from 0 to 4"),
        ({"degrees": (5,)}, "degrees: expected ascending numbers from 0 to 4"),
        ({"num_layers": 0}, "num_layers: expected a whole number >= 1, got 0"),
        ({"cutoff": -1.0}, "cutoff: expected a positive number"),
        ({"radial_basis": "bessel"}, "radial_basis: expected one of bernstein, physnet, got 'bessel'"),
        ({"predict_charges": False}, "predict_charges: expected True, because use_electrostatics needs it"),
        ({"predict_hirshfeld": False}, "predict_hirshfeld: expected True, because use_dispersion needs it"),
        ({"elements": (1, 110)}, "elements: expected atomic numbers 1 to 102"),
        ({"long_range_cutoff": 0.0}, "long_range_cutoff: expected a positive length"),
        ({"dispersion_damping": -1.0}, "dispersion_damping: expected a length >= 0"),
    ],
)
def test_impossible_hyperparameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SO3kratesConfig(**options)


def test_elements_beyond_the_dispersion_tables_without_dispersion() -> None:
    assert SO3kratesConfig(elements=(1, 110), use_dispersion=False).elements == (1, 110)


def test_lattice_sums_need_a_box() -> None:
    model = so3krates(6)
    model.long_range_method = "ewald"
    with pytest.raises(ValueError, match="longRangeMethod: 'ewald' sums over periodic images"):
        model.energy_and_forces(Structure(NUMBERS, POSITIONS))


@pytest.mark.parametrize("method", ["ewald", "pme"])
def test_lattice_sums_replace_the_shifted_charges_and_nothing_else(method: str) -> None:
    """Against a sum over wave vectors written out here."""
    model = so3krates(7, long_range_cutoff=6.0)
    box = np.diag([9.0, 8.0, 10.0])
    structure = Structure(NUMBERS, POSITIONS, 0, 1, box)
    shifted = model.evaluate(model.batch(structure))
    model.long_range_method = method
    summed = model.evaluate(model.batch(structure))
    for name in ("network", "repulsion", "dispersion"):
        assert float(summed.terms[name]) == float(shifted.terms[name])
    assert summed.charges is not None
    expected = reciprocal_sum(summed.charges.numpy(), POSITIONS, box, 4.0)
    atol = 1e-8 if method == "ewald" else 1e-3
    assert float(summed.terms["electrostatics"]) == pytest.approx(expected, abs=atol)


def reciprocal_sum(q: np.ndarray, r: np.ndarray, cell: np.ndarray, sigma: float) -> float:
    """(2 pi ke / V) sum_k exp(-sigma^2 k^2 / 4) / k^2 |S(k)|^2 - ke sum q^2 / (sigma sqrt pi)."""
    n = np.stack(np.meshgrid(*[np.arange(-8, 9)] * 3, indexing="ij"), -1).reshape(-1, 3)
    k = 2 * np.pi * n[np.any(n != 0, axis=1)] @ np.linalg.inv(cell).T
    k2 = (k**2).sum(1)
    factor = np.abs(np.exp(1j * k @ r.T) @ q) ** 2
    ke = 14.399645351950548
    total = (np.exp(-(sigma**2) * k2 / 4) / k2 * factor).sum()
    return float(2 * np.pi * ke / abs(np.linalg.det(cell)) * total - ke * (q**2).sum() / (sigma * math.sqrt(np.pi)))


def test_config_survives_its_dictionary() -> None:
    config = SO3kratesConfig(degrees=(1, 3), num_features=8, elements=(1, 8), charges=(0,))
    assert SO3kratesConfig(**dataclasses.asdict(config)) == config
