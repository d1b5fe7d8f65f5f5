"""Mixture densities: likelihoods against torch.distributions, samples against likelihoods."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_led.autoregressive import Autoregressive
from openmm_led.mixtures import Density, DiagonalMixture, FixedKernels, JointMixture, pick, softplus

OPEN = torch.full((3,), math.inf)


def randomised(density: Density, seed: int = 0) -> Density:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in density.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return density


@pytest.fixture
def h() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("coupling", ["constant", "input"])
def test_joint_mixture_is_a_mixture_of_multivariate_gaussians(
    coupling: Literal["constant", "input"], h: Tensor
) -> None:
    density = randomised(JointMixture(4, OPEN, kernels=2, floor=0.1, coupling=coupling))
    assert isinstance(density, JointMixture)
    y = torch.randn(5, 3)
    logw, m, sigma, low = density.parts(h)
    a = torch.eye(3) + density._matrix(density.low.expand(5, -1, -1) if low is None else low)
    factor = torch.diag_embed(sigma) @ torch.linalg.inv(a)
    kernels = torch.distributions.MultivariateNormal(m, covariance_matrix=factor @ factor.mT)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logw), kernels)
    np.testing.assert_allclose(density.nll(h, y).detach(), -mixture.log_prob(y).detach(), rtol=2e-4)
    assert float(sigma.detach().min()) > 0.1


def test_origin_shifts_the_kernels(h: Tensor) -> None:
    density = randomised(JointMixture(4, OPEN, 3, 0.1))
    assert isinstance(density, JointMixture)
    y, origin = torch.randn(5, 3), torch.randn(5, 3)
    np.testing.assert_allclose(
        density.nll(h, y + origin, origin).detach(), density.nll(h, y).detach(), rtol=1e-4, atol=1e-4
    )


def test_diagonal_mixture_is_a_product_of_mixtures(h: Tensor) -> None:
    density = randomised(DiagonalMixture(4, OPEN, kernels=3, floor=0.05))
    assert isinstance(density, DiagonalMixture)
    y = torch.randn(5, 3)
    w, m, s = density.head(h).view(-1, 3, 3, 3).unbind(1)
    kernels = torch.distributions.Normal(m, 0.05 + torch.nn.functional.softplus(s))
    each = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=w), kernels).log_prob(y)
    np.testing.assert_allclose(density.nll(h, y).detach(), -each.sum(-1).detach(), rtol=2e-5)


def test_fixed_kernels_are_gaussians_and_von_mises(h: Tensor) -> None:
    period = torch.tensor([math.inf, 2 * math.pi])
    density = randomised(FixedKernels(4, period, kernels=2, sigma_max=0.6, joint=False))
    assert isinstance(density, FixedKernels)
    y = torch.tensor([[0.3, 3.0]] * 5)
    before = density.nll(h, y)
    assert float(before.detach().std()) < 1e-5  # no dependence on h in the first stage
    density.freeze()
    w = torch.log_softmax(density.head(h).view(5, 2, 2), -1)
    normal = torch.distributions.Normal(density.centre[0], 0.6 * torch.sigmoid(density.width[0])).log_prob(y[0, 0])
    mises = torch.distributions.VonMises(density.centre[1], torch.nn.functional.softplus(density.width[1])).log_prob(
        y[0, 1]
    )
    expected = torch.logsumexp(w[:, 0] + normal, -1) + torch.logsumexp(w[:, 1] + mises, -1)
    np.testing.assert_allclose(density.nll(h, y).detach(), -expected.detach(), rtol=1e-4)
    assert [name for name, p in density.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_joint_fixed_kernels_refuse_angles() -> None:
    with pytest.raises(ValueError, match="fixed_joint"):
        FixedKernels(4, torch.tensor([2 * math.pi]), 2, 0.6, joint=True)


def one_dimensional(kind: str) -> tuple[Density, float]:
    """A density of one coordinate, and how far to integrate."""
    period = torch.tensor([2 * math.pi if kind == "circle" else math.inf])
    if kind == "diagonal":
        return DiagonalMixture(4, period, 3, 0.05), 12.0
    if kind == "fixed":
        density = FixedKernels(4, period, 3, 0.6, joint=False)
        density.freeze()
        return density, 12.0
    return JointMixture(4, period, 3, 0.05), math.pi if kind == "circle" else 12.0


@pytest.mark.parametrize("kind", ["joint", "diagonal", "fixed"])
def test_samples_follow_the_likelihood(kind: str, h: Tensor) -> None:
    density, far = one_dimensional(kind)
    randomised(density)
    grid = torch.linspace(-far, far, 4001)[:, None]
    with torch.no_grad():
        p = torch.exp(-density.nll(h[:1].expand(4001, -1), grid)).double().numpy()
    step = 2 * far / 4000
    assert p.sum() * step == pytest.approx(1.0, abs=1e-4)
    draws = density.sampler()(h[:1].expand(20_000, -1).numpy(), np.random.default_rng(0))[:, 0]
    cumulated = np.interp(np.sort(draws), grid[:, 0], np.cumsum(p) * step)
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is exceeded once in a thousand
    assert np.abs(cumulated - (np.arange(20_000) + 0.5) / 20_000).max() < 1.95 / math.sqrt(20_000)


def test_correlated_samples_have_the_covariance_of_their_kernel() -> None:
    couplings: tuple[Literal["constant", "input"], ...] = ("constant", "input")
    for coupling in couplings:
        density = randomised(JointMixture(2, OPEN, kernels=1, floor=0.1, coupling=coupling), seed=3)
        assert isinstance(density, JointMixture)
        h = torch.tensor([[0.3, -0.2]])
        _, m, sigma, low = density.parts(h)
        a = torch.eye(3) + density._matrix(density.low if low is None else low[0])[0]
        factor = (torch.diag(sigma[0, 0]) @ torch.linalg.inv(a)).detach().numpy()
        draws = density.sampler()(h.expand(40_000, -1).numpy(), np.random.default_rng(1))
        expected = factor @ factor.T
        np.testing.assert_allclose(np.cov(draws.T), expected, atol=0.04 * np.abs(expected).max())
        np.testing.assert_allclose(draws.mean(0), m[0, 0].detach(), atol=0.02)


def test_one_walker_draws_from_the_same_distribution_as_many(h: Tensor) -> None:
    density = randomised(JointMixture(4, OPEN, 3, 0.1, coupling="input"))
    draw, random = density.sampler(), np.random.default_rng(2)
    single = np.concatenate([draw(h[:1].numpy(), random) for _ in range(4000)])
    many = draw(h[:1].expand(4000, -1).numpy(), random)
    error = np.sqrt(single.var(0) / 4000 + many.var(0) / 4000)
    assert (np.abs(single.mean(0) - many.mean(0)) < 4 * error).all()
    np.testing.assert_allclose(single.std(0), many.std(0), rtol=0.1)


def test_angles_are_compared_around_the_circle(h: Tensor) -> None:
    period = torch.tensor([2 * math.pi, math.inf])
    for density in (JointMixture(4, period, 2, 0.1), DiagonalMixture(4, period, 2, 0.1)):
        y = torch.tensor([[3.0, 0.4]]).expand(5, -1)
        around = y + torch.tensor([2 * math.pi, 0.0])
        np.testing.assert_allclose(density.nll(h, y).detach(), density.nll(h, around).detach(), rtol=1e-4)


def test_pick_follows_the_weights_and_softplus_does_not_overflow() -> None:
    logits = np.log(np.array([[0.1, 0.6, 0.3]])).repeat(30_000, 0)
    shares = np.bincount(pick(logits, np.random.default_rng(0)), minlength=3) / 30_000
    np.testing.assert_allclose(shares, [0.1, 0.6, 0.3], atol=0.012)
    np.testing.assert_allclose(softplus(np.array([-800.0, 0.0, 800.0])), [0.0, math.log(2.0), 800.0])


@pytest.mark.parametrize("least", [0.0, 0.2])
def test_picks_of_many_rows_are_those_of_one_after_another(least: float) -> None:
    logits = np.random.default_rng(1).normal(scale=3.0, size=(200, 7)).astype(np.float32)
    before = logits.copy()
    many = pick(logits, np.random.default_rng(0), least)
    # with a middle axis numpy goes row by row
    np.testing.assert_array_equal(many, pick(logits[:, None], np.random.default_rng(0), least)[:, 0])
    np.testing.assert_array_equal(logits, before)
    assert len(np.unique(many)) == 7


def autoregressive() -> Autoregressive:
    period = torch.tensor([4.0, math.inf, 7.0, math.inf])
    density = Autoregressive(4, period, np.array([True, False, True, False]), kernels=4, floor=0.05)
    randomised(density)
    return density


def test_torsions_come_one_after_the_other(h: Tensor) -> None:
    density = autoregressive()
    y = torch.randn(5, 4)
    around = y + torch.tensor([4.0, 0.0, 14.0, 0.0])
    np.testing.assert_allclose(density.nll(h, y).detach(), density.nll(h, around).detach(), rtol=1e-4)
    # integrated over the second torsion and the rest, the density of the first is left: it integrates to one
    first = torch.linspace(-2.0, 2.0, 401)[:-1]
    with torch.no_grad():
        second = torch.linspace(-3.5, 3.5, 401)[:-1]
        grid = torch.cartesian_prod(first, second)
        density.rest_index = torch.zeros(0, dtype=torch.long)
        full = torch.zeros(len(grid), 4)
        full[:, [0, 2]] = grid
        p = torch.exp(-density.nll(h[:1].expand(len(grid), -1), full)).double()
    assert float(p.sum()) * (4.0 / 400) * (7.0 / 400) == pytest.approx(1.0, abs=2e-3)


def test_autoregressive_marginals_are_those_of_its_conditionals(h: Tensor) -> None:
    density = autoregressive()
    draws = density.sampler()(h[:1].expand(20_000, -1).numpy(), np.random.default_rng(3))
    with torch.no_grad():
        w, m, s = density.heads[0](torch.tanh(density.hidden[0](h[:1]))).chunk(3, -1)
        sigma = density.floor + torch.nn.functional.softplus(s)
        turn = 2 * math.pi / 4.0
        # first circular moment of a wrapped Gaussian: exp(i m - s^2 / 2)
        expected = (w.softmax(-1) * torch.exp(1j * turn * m - 0.5 * (turn * sigma) ** 2)).sum().numpy()
    found = np.exp(1j * turn * draws[:, 0]).mean()
    assert abs(found - expected) < 4 / math.sqrt(20_000)


def test_autoregressive_samples_follow_the_likelihood_of_both_torsions(h: Tensor) -> None:
    density = autoregressive()
    draws = density.sampler()(h[:1].expand(40_000, -1).numpy(), np.random.default_rng(4))[:, [0, 2]]
    draws = draws - np.array([4.0, 7.0]) * np.round(draws / np.array([4.0, 7.0]))
    edges = [np.linspace(-2, 2, 9), np.linspace(-3.5, 3.5, 9)]
    counts = np.histogram2d(draws[:, 0], draws[:, 1], edges)[0]
    fine = 8  # midpoints in every cell of the histogram
    x, y = (torch.as_tensor((e[:-1, None] + (np.arange(fine) + 0.5) / fine * (e[1] - e[0])).ravel()) for e in edges)
    grid = torch.cartesian_prod(x, y).float()
    full = torch.zeros(len(grid), 4)
    full[:, [0, 2]] = grid
    with torch.no_grad():
        density.rest_index = torch.zeros(0, dtype=torch.long)
        p = torch.exp(-density.nll(h[:1].expand(len(grid), -1), full)).double().numpy()
    p = p.reshape(8, fine, 8, fine).sum((1, 3))
    expected = 40_000 * p / p.sum()
    chi2 = float(np.sum((counts - expected) ** 2 / expected))
    assert chi2 < 63 + 4.5 * math.sqrt(2 * 63)


@pytest.mark.parametrize("joint", [True, False])
def test_fixed_kernels_begin_where_the_data_are(joint: bool) -> None:
    random = np.random.default_rng(0)
    y = np.concatenate([random.normal(-4, 0.1, (900, 2)), random.normal(5, 0.1, (100, 2))])
    density = FixedKernels(3, torch.full((2,), math.inf), 2, 0.6, joint)
    density.place(y, seed=0)
    np.testing.assert_allclose(np.sort(density.centre.detach(), axis=1), [[-4, 5], [-4, 5]], atol=0.1)
