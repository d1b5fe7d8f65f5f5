"""Molecules far apart: what the published form of SpookyNet gets wrong, and its local options get right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure, collate
from openmm_mlff.potentials.potential import Evaluation
from openmm_spookynet import SpookyNet, SpookyNetConfig
from openmm_spookynet.layers import softmax_by_structure
from openmm_spookynet.terms import COULOMB

LOCAL: dict[str, Any] = {"attention": "none", "charge_conservation": "local", "embed_after": 1}
WATER = Structure(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.97, 0, 0], [-0.243, 0.939, 0]]))
FORMALDEHYDE = Structure(
    np.array([6, 8, 1, 1]), np.array([[0.0, 0, 0.1], [1.21, 0, 0], [-0.55, 0.94, 0], [-0.6, -0.9, 0.05]])
)


def random_model(seed: int = 0, **options: Any) -> SpookyNet:
    torch.manual_seed(seed)
    small: dict[str, Any] = {"num_features": 12, "num_modules": 3, "num_basis_functions": 8, "num_random_features": 12}
    model = SpookyNet(SpookyNetConfig(**small | {"elements": (1, 6, 8)} | options)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "raw" not in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def apart(distance: float, *others: Structure) -> Structure:
    """Formaldehyde at the origin and others around it, `distance` angstrom away and from one another."""
    parts = [FORMALDEHYDE, *others]
    places = [np.zeros(3), *(distance * np.array([k + 1.0, 0.6 * k, -0.3]) for k in range(len(others)))]
    positions = np.concatenate([p.positions + x for p, x in zip(parts, places, strict=True)])
    return Structure(np.concatenate([p.numbers for p in parts]), positions)


def evaluate(model: SpookyNet, structure: Structure) -> Evaluation:
    return model.evaluate(model.batch(structure))


def coulomb(structure: Structure, charges: np.ndarray, fragments: np.ndarray) -> float:
    """Energy of point charges in different fragments, eV."""
    i, j = np.triu_indices(len(structure), 1)
    i, j = i[fragments[i] != fragments[j]], j[fragments[i] != fragments[j]]
    r = np.linalg.norm(structure.positions[i] - structure.positions[j], axis=1)
    return float((COULOMB * charges[i] * charges[j] / r).sum())


@pytest.mark.parametrize("distance", [8.0, 30.0, 100.0])
@pytest.mark.parametrize("n_waters", [1, 5])
def test_neutral_singlets_add_up(distance: float, n_waters: int) -> None:
    model = random_model(**LOCAL)
    together = apart(distance, *[WATER] * n_waters)
    result = evaluate(model, together)
    alone, water = evaluate(model, FORMALDEHYDE), evaluate(model, WATER)
    fragments = np.repeat(np.arange(n_waters + 1), [4, *[3] * n_waters])
    assert result.charges is not None and alone.charges is not None and water.charges is not None
    expected = torch.cat([alone.charges, *[water.charges] * n_waters]).numpy()
    assert np.abs(expected).max() > 0.01, "this test wants charges"
    np.testing.assert_allclose(result.charges.numpy(), expected, rtol=0, atol=1e-12)
    sums = float(alone.energy + n_waters * water.energy)
    interaction = coulomb(together, expected, fragments)
    assert float(result.energy) - sums == pytest.approx(interaction, abs=1e-9)
    if distance >= 30.0:
        assert abs(float(result.energy) - sums) < 1e-3


def test_as_published_they_do_not() -> None:
    """The difference that the options remove, and that each of the two is needed."""
    differences = {}
    for name, options in {
        "published": {},
        "no attention": {"attention": "none"},
        "local charges": {"charge_conservation": "local"},
        "both": LOCAL,
    }.items():
        model = random_model(**options)
        energies = [float(evaluate(model, s).energy) for s in (apart(300.0, WATER), FORMALDEHYDE, WATER)]
        differences[name] = abs(energies[0] - energies[1] - energies[2])
    assert differences.pop("both") < 1e-6
    assert min(differences.values()) > 1e-3, differences


@pytest.mark.parametrize(("charge", "multiplicity"), [(0, 1), (1, 2), (-2, 1), (0, 3)])
def test_charges_add_up_to_the_total(charge: int, multiplicity: int) -> None:
    for conservation in ("uniform", "shared", "local"):
        model = random_model(**LOCAL | {"charge_conservation": conservation})
        structure = apart(3.0, WATER).replace(charge=charge, multiplicity=multiplicity)
        charges = evaluate(model, structure).charges
        assert charges is not None and float(charges.sum()) == pytest.approx(charge, abs=1e-12)


def test_shared_charges_leave_neutral_molecules_alone_where_the_network_says_so() -> None:
    """The surplus goes where its share is; a network whose charges of a water add up to zero loses nothing to it."""
    model = random_model(**LOCAL | {"charge_conservation": "shared"})
    with torch.no_grad():
        # charges by element alone: those of water add up to zero; shares by element: carbon takes everything
        model.output.weight[1:] = 0.0
        model.element_bias[:, 1:] = 0.0
        model.element_bias[8, 1], model.element_bias[1, 1] = -0.8, 0.4
        model.element_bias[6, 2] = 60.0
    for charge in (0, 1, -1):
        ion = apart(40.0, WATER, WATER).replace(charge=charge, multiplicity=1 + charge % 2)
        result = evaluate(model, ion)
        assert result.charges is not None and result.surplus is not None
        np.testing.assert_allclose(result.charges[4:].numpy(), [-0.8, 0.4, 0.4] * 2, atol=1e-12)
        assert float(result.charges[:4].sum()) == pytest.approx(charge, abs=1e-12)
        # formaldehyde's oxygen and hydrogens add up to zero too
        assert float(result.surplus) == pytest.approx(charge, abs=1e-12)


def test_shares_are_a_softmax_of_each_structure() -> None:
    batch = collate([WATER, FORMALDEHYDE, WATER])
    torch.manual_seed(0)
    x = 50.0 * torch.randn(batch.n_atoms, dtype=torch.float64)
    expected = torch.cat([torch.softmax(part, 0) for part in x.split([3, 4, 3])])
    torch.testing.assert_close(softmax_by_structure(x, batch), expected, rtol=1e-12, atol=1e-15)
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda y: softmax_by_structure(y / 50.0, batch), x)


def test_embedding_later_sees_the_surroundings() -> None:
    """Two equal atoms in different surroundings share a charge equally as published, and need not with the option."""
    pair = apart(40.0, WATER).replace(charge=1, multiplicity=2)
    for options, equal in (({}, True), (LOCAL, False)):
        model = random_model(**options)
        seen: list[torch.Tensor] = []
        hook = model.charge_embedding.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.detach()))
        evaluate(model, pair)
        hook.remove()
        (embedded,) = seen
        carbonyl, water = embedded[1], embedded[4]
        assert (float((carbonyl - water).norm()) < 1e-12) == equal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "some"}, "attention: expected 'all' or 'none', got 'some'"),
        ({"charge_conservation": "no"}, "charge_conservation: expected 'uniform', 'shared' or 'local', got 'no'"),
        ({"embed_after": 3}, "embed_after: expected 0 to num_modules - 1 = 2, got 3"),
    ],
    ids=str,
)
def test_impossible_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpookyNetConfig(**change)
