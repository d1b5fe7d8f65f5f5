"""The density of a mean and principal axes: against the analytic Gaussian, against sums over kernels, and trained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from openmm_led.principal import LEAST_VARIANCE, Principal


def data(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``(n, 3)`` and correlated coordinates ``(n, d)`` about a linear mean."""
    random = np.random.default_rng(seed)
    h = random.standard_normal((n, 3))
    y = h @ random.standard_normal((3, d)) + random.standard_normal((n, d)) @ random.standard_normal((d, d)) / d**0.5
    return torch.as_tensor(h, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)


def settled(kernels: int, width: float, n: int, d: int, period: torch.Tensor | None = None) -> Principal:
    h, y = data(n, d)
    density = Principal(3, torch.full((d,), math.inf) if period is None else period, kernels, width)
    solution = torch.linalg.lstsq(torch.cat([h, torch.ones(n, 1)], 1), y).solution
    with torch.no_grad():
        density.head.weight.copy_(solution[:3].T)
        density.head.bias.copy_(solution[3])
    density.settle(h, y)
    return density


def test_one_kernel_is_the_gaussian_of_the_residuals() -> None:
    density = settled(1, 0.3, 200, 5)
    h, y = data(200, 5)
    r = (y - density.head(h)).detach().double().numpy()
    covariance = r.T @ r / len(r) + LEAST_VARIANCE * np.eye(5)
    expected = -multivariate_normal(np.zeros(5), covariance).logpdf(r)
    np.testing.assert_allclose(density.nll(h, y).detach(), expected, rtol=1e-4, atol=1e-4)


def test_likelihood_is_a_sum_over_kernels() -> None:
    density = settled(20, 0.4, 60, 4)
    h, y = data(70, 4, seed=1)  # more than are looked at together
    r = (y - density.head(h)).detach().double().numpy()
    axes = density.axes.double().numpy()
    kernel = multivariate_normal(np.zeros(4), 0.4**2 * axes.T @ axes)
    far = torch.cdist(h, density.places).double().numpy() ** 2 / float(density.reach) ** 2
    logw = -0.5 * far - logsumexp(-0.5 * far, axis=1, keepdims=True)
    terms = np.stack([kernel.logpdf(r - math.sqrt(1 - 0.4**2) * k) for k in density.residuals.double().numpy()], 1)
    np.testing.assert_allclose(density.nll(h, y).detach(), -logsumexp(logw + terms, axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [1, 400])
def test_samples_have_the_covariance_of_the_data_where_frames_are_few(kernels: int) -> None:
    """More coordinates than frames: every direction that the data have is kept, and the others stay empty."""
    n, d = (40, 60) if kernels == 1 else (400, 6)
    density = settled(kernels, 0.5, n, d)
    h, y = data(n, d)
    random = np.random.default_rng(3)
    repeats = 500 if kernels == 1 else 50
    drawn = density.sampler()(np.repeat(h.numpy(), repeats, axis=0), random)
    r = (y - density.head(h)).detach().numpy()
    made = drawn - np.repeat(density.head(h).detach().numpy(), repeats, axis=0)
    expected = r.T @ r / n + LEAST_VARIANCE * np.eye(d)
    found = made.T @ made / len(made)
    assert np.abs(found - expected).max() < 0.06 * np.diag(expected).max()
    if kernels == 1:
        empty = np.linalg.svd(r)[2][n:]
        assert (made @ empty.T).std() < 2 * math.sqrt(LEAST_VARIANCE)


def test_samples_follow_the_likelihood() -> None:
    density = settled(30, 0.3, 80, 2)
    h = data(1, 2, seed=5)[0]
    drawn = density.sampler()(h.numpy().repeat(40_000, axis=0), np.random.default_rng(0))
    middle, span = drawn.mean(0), 6 * drawn.std(0)
    axes = [torch.linspace(float(m - s), float(m + s), 161) for m, s in zip(middle, span, strict=True)]
    grid = torch.cartesian_prod(*axes)
    with torch.no_grad():
        p = (-density.nll(h.expand(len(grid), -1), grid)).exp().double().numpy()
    area = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    assert p.sum() * area == pytest.approx(1.0, abs=2e-3)
    mean = (p[:, None] * grid.numpy()).sum(0) * area
    weights = density._log_weights(h).exp()
    expected = (density.head(h) + math.sqrt(1.0 - 0.3**2) * weights @ density.residuals)[0].detach()
    np.testing.assert_allclose(mean, expected, atol=5e-3 * span.max())
    np.testing.assert_allclose(drawn.mean(0), mean, atol=4 * drawn.std(0).max() / 200)
    below = p[grid[:, 0].numpy() < mean[0]].sum() * area
    assert (drawn[:, 0] < mean[0]).mean() == pytest.approx(below, abs=0.02)


def test_residuals_are_taken_around_the_circle() -> None:
    """Angles on both sides of the seam are near each other, not a full turn apart."""
    period = torch.tensor([2 * math.pi])
    density = Principal(1, period, 1, 0.1)
    angles = torch.tensor([[math.pi - 0.1], [-math.pi + 0.1]] * 50)
    with torch.no_grad():
        density.head.weight.zero_()
        density.head.bias.fill_(math.pi)
    density.settle(torch.zeros(100, 1), angles)
    assert float(density.axes.abs()) == pytest.approx(math.hypot(0.1, math.sqrt(LEAST_VARIANCE)), rel=1e-3)


def test_least_squares_before_it_is_settled() -> None:
    h, y = data(10, 3)
    density = Principal(3, torch.full((3,), math.inf), 1, 0.1)
    expected = 0.5 * (y - density.head(h)).square().sum(-1) + 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(density.nll(h, y), expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="decoder_floor: expected a width between 0 and 1"):
        Principal(3, torch.full((2,), math.inf), 5, 1.0)
    density = Principal(3, torch.full((2,), math.inf), 11, 0.3)
    with pytest.raises(ValueError, match="decoder_kernels: expected at most the 10 training frames, got 11"):
        density.settle(*data(10, 2))


def test_weights_reach_about_the_square_root_of_all_kernels() -> None:
    density = settled(100, 0.3, 100, 2)
    logw = density._log_weights(density.places)
    assert float((-(logw.exp() * logw).sum(-1)).exp().median()) == pytest.approx(10.0, rel=0.01)
