"""Loss terms against numpy, missing labels, and weights that change on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Evaluation
from openmm_mlff.training.force_matching import fit_atomic_energies
from openmm_mlff.training.losses import Labels, LossWeights, loss_terms, mean_square, weighted_loss


def random_case(seed: int) -> tuple[Evaluation, Labels, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    counts = torch.tensor([2, 5, 3])
    predicted = Evaluation(draw(3), draw(10), draw(3, 3), forces=draw(10, 3))
    return predicted, Labels(draw(3), draw(10, 3), draw(3, 3), draw(10)), counts


def test_terms_are_the_means_they_say() -> None:
    predicted, labels, counts = random_case(0)
    difference = (predicted.energy - labels.energy).numpy()
    expected = [
        np.mean(difference**2 / counts.numpy()),
        np.mean((predicted.forces - labels.forces).numpy() ** 2),
        np.mean((predicted.dipole - labels.dipole).numpy() ** 2),
        np.mean((predicted.charges - labels.charges).numpy() ** 2),
        0.0,
    ]
    np.testing.assert_allclose(loss_terms(predicted, labels, counts).numpy(), expected, rtol=1e-14)
    weights = LossWeights(1.0, 2.0, 3.0, 4.0, 5.0).tensor(torch.float64, torch.device("cpu"))
    total, terms = weighted_loss(predicted, labels, counts, weights)
    assert float(total) == pytest.approx(float(np.dot([1, 2, 3, 4, 5], expected)), rel=1e-14)
    np.testing.assert_allclose(terms.numpy(), expected, rtol=1e-14)
    predicted.surplus = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    more, _ = weighted_loss(predicted, labels, counts, weights)
    assert float(more - total) == pytest.approx(5.0 * (0.25 + 1.0 + 4.0) / 3.0, rel=1e-14)


def test_missing_labels_count_nowhere() -> None:
    predicted, labels, counts = random_case(1)
    labels.dipole[1] = torch.nan
    labels.charges = None
    predicted.dipole.requires_grad_(True)
    terms = loss_terms(predicted, labels, counts)
    known = (predicted.dipole - labels.dipole).detach()[[0, 2]]
    assert float(terms[2].detach()) == pytest.approx(float(known.square().mean()), rel=1e-14)
    assert float(terms[3].detach()) == 0.0
    (slope,) = torch.autograd.grad(terms[2], predicted.dipole)
    assert torch.equal(slope[1], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(slope[[0, 2]], 2 * known / 6, rtol=1e-14, atol=0)


def test_no_known_label_is_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    predicted = torch.ones(3, requires_grad=True)
    loss = mean_square(predicted, torch.full((3,), torch.nan))
    loss.backward()
    assert float(loss.detach()) == 0.0 and torch.equal(predicted.grad, torch.zeros(3))


def test_weights_move_geometrically_or_from_and_to_zero_in_a_straight_line() -> None:
    start, end = LossWeights(0.1, 1.0, 0.5, 0.0), LossWeights(10.0, 1.0, 0.0, 0.4)
    half = start.towards(end, 0.5)
    assert half.energy == pytest.approx(1.0) and half.forces == 1.0
    assert half.dipole == pytest.approx(0.25) and half.charges == pytest.approx(0.2)
    assert start.towards(end, 0.0) == start and start.towards(end, 7.0) == end and start.towards(None, 0.5) is start


def test_impossible_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="forces: expected a weight >= 0, got -1"):
        LossWeights(forces=-1)
    with pytest.raises(ValueError, match="energy: expected a weight >= 0, got nan"):
        LossWeights(energy=float("nan"))
    with pytest.raises(ValueError, match="at least one weight above 0"):
        LossWeights(0.0, 0.0)


def test_energies_of_elements_are_not_those_of_charges() -> None:
    rng = np.random.default_rng(0)
    own, costs = {1: -3.0, 6: -9.0, 8: -7.5, 11: 1.0}, np.array([11.0, 5.0, 4.0])
    structures, residuals = [], []
    for _ in range(60):
        numbers = rng.choice([1, 6, 8], 6)
        charge, unpaired = int(rng.integers(-2, 3)), int(rng.integers(0, 3))
        if charge == 2:
            numbers = np.append(numbers, 11)
        structures.append(Structure(numbers, rng.normal(size=(len(numbers), 3)), charge, 1 + unpaired))
        features = np.array([max(charge, 0), max(-charge, 0), unpaired])
        residuals.append(sum(own[int(z)] for z in numbers) + float(costs @ features))
    found = fit_atomic_energies(structures, np.array(residuals))
    assert found == pytest.approx(own, abs=1e-9)
    # one charge throughout belongs to the elements: nothing else could take it
    same = [s.replace(charge=1) for s in structures]
    plain = np.array([sum(own[int(z)] for z in s.numbers) for s in same]) + 6.0 * np.array([len(s) for s in same])
    plain += np.array([costs[2] * (s.multiplicity - 1) for s in same])
    shifted = fit_atomic_energies(same, plain)
    assert shifted == pytest.approx({z: e + 6.0 for z, e in own.items()}, abs=1e-9)
