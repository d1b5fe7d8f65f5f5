"""Weights, averages and free energies in PyTorch against formulas, finite differences, quadrature and pymbar."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmm_mlff.training import reweighting

pymbar = pytest.importorskip("pymbar")


def frames(n: int = 400, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=n))


def energy(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """A quartic with three parameters; theta = (0.5, 0, 0) is the harmonic well that `frames` come from."""
    return theta[0] * x**2 + theta[1] * x + theta[2] * x**4


OLD = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
NEW = torch.tensor([0.6, 0.3, 0.02], dtype=torch.float64)


def test_the_weights_average_under_the_new_potential() -> None:
    """<x> and <x^2> against quadrature, within the error of so many frames."""
    x = frames(200_000)
    w = reweighting.weights(energy(x, NEW), energy(x, OLD))
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-energy(grid, NEW))
    exact = torch.stack([(density * grid**k).sum() / density.sum() for k in (1, 2)])
    found = reweighting.average(w, torch.stack([x, x**2], dim=1))
    effective = reweighting.effective_sample_size(w)
    assert 0.5 * len(x) < float(effective) < len(x)
    assert torch.all((found - exact).abs() < 4 / effective.sqrt())
    ratio = torch.exp(-energy(grid, NEW)).sum() / torch.exp(-energy(grid, OLD)).sum()
    assert abs(float(reweighting.zwanzig(energy(x, NEW) - energy(x, OLD)) + torch.log(ratio))) < 4 / len(x) ** 0.5


def test_effective_sample_size_of_known_weights() -> None:
    even = torch.full((10,), 0.1)
    assert float(reweighting.effective_sample_size(even)) == pytest.approx(10.0, rel=1e-6)
    one = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    size = reweighting.effective_sample_size(one)
    assert size.item() == pytest.approx(1.0)
    size.backward()
    assert torch.isfinite(one.grad).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("quantity", ["free energy", "average"])
def test_gradients_are_the_covariance_formula_and_finite_differences(quantity: str) -> None:
    x = frames()
    old = energy(x, OLD)

    def value(theta: torch.Tensor) -> torch.Tensor:
        if quantity == "free energy":
            return reweighting.zwanzig(energy(x, theta) - old)
        return reweighting.average(reweighting.weights(energy(x, theta), old), torch.cos(x))

    theta = NEW.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(theta), theta)
    derivative = torch.stack([x**2, x, x**4], dim=1)  # du/dtheta
    w = torch.exp(-(energy(x, NEW) - old))
    w = w / w.sum()
    mean = w @ derivative
    formula = mean if quantity == "free energy" else -((w * torch.cos(x)) @ derivative - (w @ torch.cos(x)) * mean)
    torch.testing.assert_close(gradient, formula, rtol=1e-12, atol=1e-13)
    h = 1e-5
    for k in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[k] = h
        difference = (value(NEW + step) - value(NEW - step)) / (2 * h)
        assert float(gradient[k]) == pytest.approx(float(difference), rel=1e-7)


@pytest.mark.parametrize(("n_f", "n_r", "offset"), [(300, 300, 0.0), (50, 400, -7.3), (200, 100, 4321.0)])
def test_bisection_equals_pymbar(n_f: int, n_r: int, offset: float) -> None:
    rng = np.random.default_rng(3)
    w_f, w_r = rng.normal(1.5 + offset, 1.5, n_f), rng.normal(0.5 - offset, 1.4, n_r)
    found = reweighting.bar(torch.from_numpy(w_f), torch.from_numpy(w_r))
    assert not found.requires_grad
    assert float(found) == pytest.approx(pymbar.bar(w_f, w_r)["Delta_f"], abs=1e-6)


def test_bisection_finds_the_root_where_the_work_has_no_overlap() -> None:
    """Two far peaks: the root is where both sides of Bennett's equation are equal, whatever it is worth."""
    w_f, w_r = torch.tensor([80.0, 81.0]), torch.tensor([60.0, 61.0])
    df = float(reweighting.bar(w_f, w_r))
    left, right = torch.sigmoid(df - w_f.double()).sum(), torch.sigmoid(-df - w_r.double()).sum()
    assert float(left / right) == pytest.approx(1.0, abs=1e-9)


def test_float32_energies_lose_nothing_after_the_difference() -> None:
    du = torch.tensor([1e-4, 2e-4, 3e-4], dtype=torch.float32)
    assert reweighting.zwanzig(du).dtype == torch.float64
    assert float(reweighting.zwanzig(du)) == pytest.approx(2e-4, rel=1e-4)


def test_bad_input_is_named() -> None:
    good = torch.zeros(3)
    with pytest.raises(ValueError, match=r"u_old: expected shape \(3,\)"):
        reweighting.weights(good, torch.zeros(4))
    with pytest.raises(ValueError, match="u_new: expected finite numbers, got 1 of 3"):
        reweighting.weights(torch.tensor([0.0, float("nan"), 1.0]), good)
    with pytest.raises(ValueError, match="du: expected shape"):
        reweighting.zwanzig(torch.zeros(0))
    with pytest.raises(ValueError, match="values: expected 3 rows"):
        reweighting.average(good, torch.zeros(4, 2))
