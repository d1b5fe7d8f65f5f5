"""mixture densities: trunk features h -> a distribution of y, its likelihood (torch) and samples of it (numpy).

Coordinates come scaled, y = (x - centre) / scale; a coordinate with a finite `period` lives on a circle, and its
distance to a kernel's centre is taken around it. Widths never fall below a floor: with an encoder that is a function of
x, the likelihood grows without bound as the kernels shrink onto the data.

Samples need one matrix product per layer for all walkers; they are drawn by numpy, which spends a few microseconds
where a tensor library spends tens (one walker, one frame).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: ``(h (n, n_in), random) -> y (n, D)``
Sampler = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def wrapped(residual: Tensor, period: Tensor) -> Tensor:
    """The residual of least size around the circle; `period` is infinite where there is none."""
    turns = torch.where(torch.isinf(period), torch.zeros_like(residual), torch.round(residual / period))
    return residual - torch.where(turns == 0, torch.zeros_like(turns), turns * period)


class Density(nn.Module, abc.ABC):
    """What all mixtures share. Attributes: n_in, n_out; period ``(n_out,)``, in scaled units, infinite off circles."""

    period: Tensor

    def __init__(self, n_in: int, period: Tensor) -> None:
        super().__init__()
        self.n_in, self.n_out = n_in, len(period)
        self.register_buffer("period", period.clone())

    def set_period(self, period: Tensor) -> None:
        """Take periods that became known with the data."""
        self.period.copy_(period)

    @abc.abstractmethod
    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        """Negative logarithm of the density of y ``(n, n_out)`` given h ``(n, n_in)``, ``(n,)`` nats."""

    @abc.abstractmethod
    def sampler(self) -> Sampler:
        """Draws y for h with the parameters of this moment."""


class JointMixture(Density):
    """K Gaussians over all coordinates together: p(y | h) = sum_k w_k(h) N(y; m_k(h), S_k A_k^-1 A_k^-T S_k).

    S is diagonal, A unit lower triangular: coordinate i given those before it is Gaussian of width S_i about a linear
    function of them, so that coordinates that share a bond are drawn together.

    Args:
        coupling: "constant" (A is a parameter of each kernel) or "input" (A depends on h too).
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        n_in: int,
        period: Tensor,
        kernels: int,
        floor: float,
        coupling: Literal["constant", "input"] = "constant",
    ) -> None:
        super().__init__(n_in, period)
        self.kernels, self.floor, self.coupling = kernels, floor, coupling
        d = self.n_out
        n_low = d * (d - 1) // 2
        self.n_low = n_low if coupling == "input" else 0
        self.head = nn.Linear(n_in, kernels * (1 + 2 * d + self.n_low))
        rows, columns = np.tril_indices(d, -1)
        self.register_buffer("rows", torch.as_tensor(rows), persistent=False)
        self.register_buffer("columns", torch.as_tensor(columns), persistent=False)
        if coupling == "constant":
            self.low = nn.Parameter(torch.zeros(kernels, n_low))
        with torch.no_grad():
            self.head.weight.mul_(0.5)
            bias = self.head.bias.zero_()
            bias[kernels : kernels * (1 + d)] = 0.5 * torch.randn(kernels * d)

    def parts(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log weights ``(n, K)``, centres and widths ``(n, K, D)``, and the free entries of A if they depend on h."""
        k, d = self.kernels, self.n_out
        raw = self.head(h)
        w, m, s, low = raw.split([k, k * d, k * d, k * self.n_low], dim=-1)
        sigma = self.floor + F.softplus(s.view(-1, k, d))
        return F.log_softmax(w, -1), m.view(-1, k, d), sigma, low.view(-1, k, self.n_low) if self.n_low else None

    def _matrix(self, low: Tensor) -> Tensor:
        a = torch.zeros(*low.shape[:-1], self.n_out, self.n_out, dtype=low.dtype, device=low.device)
        a[..., self.rows, self.columns] = low
        return a

    def nll(self, h: Tensor, y: Tensor, origin: Tensor | None = None) -> Tensor:
        """As `Density.nll`.

        Args:
            origin: ``(n, n_out)``, added to the centres of all kernels.
        """
        logw, m, sigma, low = self.parts(h)
        if origin is not None:
            m = m + origin[:, None]
        u = wrapped(y[:, None] - m, self.period) / sigma
        e = u
        if low is not None:
            e = u + torch.einsum("nkij,nkj->nki", self._matrix(low), u)
        elif self.n_out > 1:
            e = u + torch.einsum("kij,nkj->nki", self._matrix(self.low), u)
        logp = -0.5 * e.square().sum(-1) - sigma.log().sum(-1) - 0.5 * self.n_out * math.log(2 * math.pi)
        return -torch.logsumexp(logw + logp, -1)

    def sampler(self) -> JointSampler:
        return JointSampler(self)


class JointSampler:
    """Draws from a `JointMixture` by its parameters at the time of making."""

    def __init__(self, mixture: JointMixture) -> None:
        k, d, n_low = mixture.kernels, mixture.n_out, mixture.n_low
        self.kernels, self.n_out, self.n_low, self.floor = k, d, n_low, mixture.floor
        weight, bias = (p.detach().cpu().numpy() for p in (mixture.head.weight, mixture.head.bias))
        self._weight, self._bias = np.ascontiguousarray(weight[:k].T), bias[:k]
        # parameters of the chosen kernel only: one small matrix per kernel, (n_in, 2 D + n_low)
        own = [
            np.r_[k + j * d : k + (j + 1) * d, k + (k + j) * d : k + (k + j + 1) * d,
                  k + 2 * k * d + j * n_low : k + 2 * k * d + (j + 1) * n_low]
            for j in range(k)
        ]  # fmt: skip
        self._own = [(np.ascontiguousarray(weight[rows].T), bias[rows]) for rows in own]
        self._matrices, self._offsets = (np.stack(part) for part in zip(*self._own, strict=True))
        self._lower = [(i, j) for i in range(d) for j in range(i)]
        self._inverse = None
        if mixture.coupling == "constant" and d > 1:
            low = mixture._matrix(mixture.low).detach().cpu().numpy()
            self._inverse = np.linalg.inv(np.eye(d) + low).astype(weight.dtype).transpose(0, 2, 1).copy()

    def __call__(self, h: np.ndarray, random: np.random.Generator) -> np.ndarray:
        kernel = pick(h @ self._weight + self._bias, random)
        e = random.standard_normal((len(h), self.n_out), dtype=np.float32)
        if len(h) == 1:
            weight, bias = self._own[kernel[0]]
            return self._placed(h @ weight + bias, e, kernel)
        if len(h) <= FEW:
            raw = np.matmul(h[:, None], self._matrices[kernel])[:, 0] + self._offsets[kernel]
            return self._placed(raw, e, kernel)
        # walkers with the same kernel next to each other, so that each kernel's matrix is applied once
        order = np.argsort(kernel.astype(np.int16), kind="stable")
        h, kernel = h[order], kernel[order]
        raw = np.empty((len(h), 2 * self.n_out + self.n_low), h.dtype)
        ends = np.searchsorted(kernel, np.arange(self.kernels + 1)).tolist()
        for (weight, _), first, last in zip(self._own, ends[:-1], ends[1:], strict=True):
            if last > first:
                np.matmul(h[first:last], weight, out=raw[first:last])
        raw += self._offsets[kernel]
        out = np.empty_like(e)
        out[order] = self._placed(raw, e[order], kernel)
        return out

    def _placed(self, raw: np.ndarray, e: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        """Centre and width of each row's kernel, about which e ``(n, n_out)`` become draws; e is overwritten."""
        d = self.n_out
        return raw[:, :d] + (self.floor + softplus(raw[:, d : 2 * d])) * self._coupled(e, raw[:, 2 * d :], kernel)

    def _coupled(self, e: np.ndarray, low: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        """u = A^-1 e of each row's kernel."""
        if self._inverse is not None:
            if len(e) == 1:
                return e @ self._inverse[kernel[0]]
            u = np.empty_like(e)
            for j in np.unique(kernel):
                u[kernel == j] = e[kernel == j] @ self._inverse[j]
            return u
        if self.n_low:
            # forward substitution, row after row of A; there are few dimensions where A depends on the input
            if len(e) == 1:
                u, factors = e[0].tolist(), low[0].tolist()
                for (i, j), a in zip(self._lower, factors, strict=True):
                    u[i] -= a * u[j]
                return np.array([u], e.dtype)
            columns, factors = np.ascontiguousarray(e.T), np.ascontiguousarray(low.T)
            for (i, j), a in zip(self._lower, factors, strict=True):
                columns[i] -= a * columns[j]
            return columns.T
        return e


#: rows up to which numpy's cost per call matters more than how the numbers lie in memory
FEW = 16
#: choices up to which weights are cumulated column by column
NARROW = 64


def pick(logits: np.ndarray, random: np.random.Generator, least: float = 0.0) -> np.ndarray:
    """One index per row from the softmax of the last axis, by inversion of the cumulated weights.

    Weights below `least` times the largest one are left out.
    """
    if logits.ndim == 2 and len(logits) > FEW and logits.shape[1] <= NARROW:
        return _pick_columns(logits.T.copy(), random, least)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    if least:
        p[p < least] = 0.0
    c = np.cumsum(p, -1)
    level = random.random((*c.shape[:-1], 1)) * c[..., -1:]
    return np.minimum((c < level).sum(-1), c.shape[-1] - 1)


def _pick_columns(p: np.ndarray, random: np.random.Generator, least: float) -> np.ndarray:
    """`pick` of logits ``(choices, n)``, which are overwritten: the same numbers, many rows at a time."""
    p -= p.max(0)
    np.exp(p, out=p)
    if least:
        p[p < least] = 0.0
    for k in range(1, len(p)):
        p[k] += p[k - 1]
    level = random.random(p.shape[1]) * p[-1]
    return np.minimum((p < level).sum(0), len(p) - 1)


def softplus(x: np.ndarray) -> np.ndarray:
    """ln(1 + e^x), without overflow, to the last digits of 1; log1p would be right for tiny values too, and slow."""
    return np.maximum(x, 0) + np.log(1 + np.exp(-np.abs(x)))


class DiagonalMixture(Density):
    """K Gaussians per coordinate, independent of one another: p(y | h) = prod_i sum_k w_ik N(y_i; m_ik, s_ik^2)."""

    def __init__(self, n_in: int, period: Tensor, kernels: int, floor: float) -> None:
        super().__init__(n_in, period)
        self.kernels, self.floor = kernels, floor
        self.head = nn.Linear(n_in, 3 * self.n_out * kernels)
        with torch.no_grad():
            self.head.weight.mul_(0.5)
            self.head.bias.zero_()
            self.head.bias.view(3, -1)[1] = 0.5 * torch.randn(self.n_out * kernels)

    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        w, m, s = self.head(h).view(-1, 3, self.n_out, self.kernels).unbind(1)
        sigma = self.floor + F.softplus(s)
        r = wrapped(y[..., None] - m, self.period[:, None]) / sigma
        logp = -0.5 * r.square() - sigma.log() - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(F.log_softmax(w, -1) + logp, -1).sum(-1)

    def sampler(self) -> Sampler:
        weight, bias = self.head.weight.detach().cpu().numpy().T.copy(), self.head.bias.detach().cpu().numpy()
        d, k, floor = self.n_out, self.kernels, self.floor

        def draw(h: np.ndarray, random: np.random.Generator) -> np.ndarray:
            raw = (h @ weight + bias).reshape(-1, 3, d, k)
            chosen = pick(raw[:, 0], random)[..., None]
            m, s = (np.take_along_axis(raw[:, i], chosen, -1)[..., 0] for i in (1, 2))
            return m + (floor + softplus(s)) * random.standard_normal(m.shape, dtype=np.float32)

        return draw


class FixedKernels(Density):
    """The published decoder: constant kernels, fitted to all data; only their weights depend on h.

    Coordinates off circles are logits of (x - min) / (max - min) and have Gaussian kernels; those on circles have von
    Mises kernels in radians. First `unconditional` (the kernels and constant weights are fitted), then frozen.

    Args:
        joint: one mixture over all coordinates (full covariance, none on a circle), instead of one per coordinate.
    """

    circular: Tensor

    def __init__(self, n_in: int, period: Tensor, kernels: int, sigma_max: float, joint: bool) -> None:
        super().__init__(n_in, period)
        if joint and bool(torch.isfinite(period).any()):
            raise ValueError("decoder: 'fixed_joint' has Gaussian kernels only, expected no coordinate on a circle")
        self.kernels, self.sigma_max, self.joint = kernels, sigma_max, joint
        shape = (kernels,) if joint else (self.n_out, kernels)
        self.register_buffer("circular", torch.isfinite(period), persistent=False)
        self.prior = nn.Parameter(torch.zeros(shape))
        self.centre = nn.Parameter(torch.randn(self.n_out, kernels))
        self.width = nn.Parameter(torch.zeros(self.n_out, kernels))
        self.low = nn.Parameter(torch.full((kernels, self.n_out, self.n_out), 1e-3))
        self.head = nn.Linear(n_in, self.prior.numel())
        self.unconditional = True

    def place(self, y: np.ndarray, seed: int) -> None:
        """Put the kernels where scaled coordinates ``(n, n_out)`` are, by k-means; the likelihood has poor maxima."""
        from scipy.cluster.vq import kmeans2

        groups = [np.arange(self.n_out)] if self.joint else [np.array([i]) for i in range(self.n_out)]
        for group in groups:
            centres, _ = kmeans2(y[:, group].astype(np.float64), self.kernels, minit="++", seed=seed)
            with torch.no_grad():
                self.centre[group] = torch.as_tensor(centres.T, dtype=self.centre.dtype)

    def freeze(self) -> None:
        """Second stage: kernels as they are, weights from h."""
        self.unconditional = False
        for p in (self.prior, self.centre, self.width, self.low):
            p.requires_grad_(False)

    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        weights = self.prior.expand(len(y), *self.prior.shape) if self.unconditional else self.head(h)
        logw = F.log_softmax(weights.reshape(len(y), *self.prior.shape), -1)
        if self.joint:
            factor = torch.tril(self.low, -1) + torch.diag_embed(
                math.sqrt(self.sigma_max) * F.softplus(self.width.T) + 1e-4
            )
            kernel = torch.distributions.MultivariateNormal(self.centre.T, scale_tril=factor)
            return -torch.logsumexp(logw + kernel.log_prob(y[:, None]), -1)
        sigma = self.sigma_max * torch.sigmoid(self.width)
        r = (y[..., None] - self.centre) / sigma
        normal = -0.5 * r.square() - sigma.log() - 0.5 * math.log(2 * math.pi)
        kappa = F.softplus(self.width)
        log_i0 = torch.log(torch.special.i0e(kappa)) + kappa
        mises = kappa * torch.cos(y[..., None] - self.centre) - log_i0 - math.log(2 * math.pi)
        logp = torch.where(self.circular[:, None], mises, normal)
        return -torch.logsumexp(logw + logp, -1).sum(-1)

    def sampler(self) -> Sampler:
        weight, bias = self.head.weight.detach().cpu().numpy().T.copy(), self.head.bias.detach().cpu().numpy()
        centre, shape = self.centre.detach().cpu().numpy(), tuple(self.prior.shape)
        raw = self.width.detach().cpu().numpy().astype(np.float64)
        if self.joint:
            factors = np.tril(self.low.detach().cpu().numpy(), -1).astype(np.float64)
            index = np.arange(self.n_out)
            factors[:, index, index] = math.sqrt(self.sigma_max) * softplus(raw.T) + 1e-4

            def draw_joint(h: np.ndarray, random: np.random.Generator) -> np.ndarray:
                chosen = pick(h @ weight + bias, random)
                e = random.standard_normal((len(h), centre.shape[0]))
                return centre.T[chosen] + np.einsum("nij,nj->ni", factors[chosen], e)

            return draw_joint
        sigma, kappa = self.sigma_max / (1 + np.exp(-raw)), softplus(raw)
        circular, column = self.circular.cpu().numpy(), np.arange(self.n_out)

        def draw(h: np.ndarray, random: np.random.Generator) -> np.ndarray:
            chosen = pick((h @ weight + bias).reshape(-1, *shape), random)
            out = centre[column, chosen] + sigma[column, chosen] * random.standard_normal(chosen.shape)
            at = (column[circular], chosen[:, circular])
            out[:, circular] = random.vonmises(centre[at], kappa[at])
            return out

        return draw
