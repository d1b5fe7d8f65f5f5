"""Building blocks of SO3krates (Frank, Unke, Mueller, Chmiela, Nat. Commun. 15, 6539 (2024), Methods).

Symbols: N atoms, S slots for neighbours, F features, K radial functions, D degrees, M components of the Euclidean
variables (2l+1 per degree). The sum over an atom's neighbours is a sum over its slots; empty slots lie beyond the
cutoff, where the cutoff function is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu, softplus

from openmm_mlff.data.structures import Batch
from openmm_so3krates.config import Z_MAX, SO3kratesConfig

NORM_EPS = 1e-6


@dataclass
class Geometry:
    """Neighbourhoods of all atoms."""

    index: Tensor  # (N, S) neighbours
    r: Tensor  # (N, S) float64
    cutoff: Tensor  # (N, S) float64, cutoff function phi(r); zero in empty slots
    phi: Tensor  # (N, S) the same in the model's precision, divided by the normalisation of messages
    basis: Tensor  # (N, S, K)
    harmonics: Tensor  # (N, S, M)


def lecun_normal_(weight: Tensor, inputs: int) -> Tensor:
    """Normal numbers of variance 1/inputs, cut at two standard deviations."""
    std = 1.0 / math.sqrt(inputs) / 0.87962566103423978  # standard deviation of a normal cut at +-2
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def dense(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Linear layer that starts with LeCun-normal weights and no bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    lecun_normal_(layer.weight, inputs)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """W2 silu(W1 x + b1) + b2."""

    def __init__(self, inputs: int, hidden: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.first = dense(inputs, hidden, bias)
        self.second = dense(hidden, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(silu(self.first(x)))


class Norm(nn.Module):
    """Layer normalisation (biased variance) or, with kind 'rms', division by the root mean square."""

    def __init__(self, kind: str, features: int) -> None:
        super().__init__()
        self.features = features
        self.scale = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return unit_rms(x) * self.scale
        return layer_norm(x, (self.features,), self.scale, self.bias, NORM_EPS)


def unit_rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)


# -- geometry ----------------------------------------------------------------------------------------------------------


def cutoff_function(kind: str, r: Tensor, cutoff: float) -> Tensor:
    """phi(r): 1 at the atom, 0 beyond the cutoff; 'polynomial' or 'cosine'."""
    x = (r / cutoff).clamp(max=1.0)
    if kind == "cosine":
        return 0.5 * (torch.cos(math.pi * x) + 1.0)
    return 1.0 + x**3 * (-10.0 + x * (15.0 - 6.0 * x))


class BernsteinBasis(nn.Module):
    """b_k(r) = C(n, k) t^k (1-t)^(n-k), t = exp(-gamma r), k = 0..n, n = K-1."""

    def __init__(self, c: SO3kratesConfig) -> None:
        super().__init__()
        self.gamma = c.bernstein_gamma
        n = c.num_basis_functions - 1
        self.binomial = [float(math.comb(n, k)) for k in range(n + 1)]

    def forward(self, r: Tensor, dtype: torch.dtype) -> Tensor:
        """``(...)`` float64 distances -> ``(..., K)``."""
        exponent = -self.gamma * r
        # t and 1-t each to full precision before they are rounded to the model's
        t, rest = (powers(x.to(dtype), len(self.binomial)) for x in (torch.exp(exponent), -torch.expm1(exponent)))
        return t.new_tensor(self.binomial) * t * rest.flip(-1)


class PhysNetBasis(nn.Module):
    """exp(-beta (exp(-r) - mu_k)^2), mu_k from exp(-cutoff) to 1 (Unke and Meuwly 2019, eq. 7, without its cutoff)."""

    def __init__(self, c: SO3kratesConfig) -> None:
        super().__init__()
        lowest = math.exp(-c.cutoff)
        k = c.num_basis_functions
        self.centers = [lowest + (1.0 - lowest) * i / (k - 1) for i in range(k)]
        self.beta = (2.0 / k * (1.0 - lowest)) ** -2

    def forward(self, r: Tensor, dtype: torch.dtype) -> Tensor:
        """``(...)`` float64 distances -> ``(..., K)``."""
        x = torch.exp(-r).to(dtype)[..., None]
        return torch.exp(-self.beta * (x - x.new_tensor(self.centers)).square())


def powers(x: Tensor, n: int) -> Tensor:
    """1, x, x^2, ..., x^(n-1) in a new last dimension, by doubling (all derivatives exist at x = 0)."""
    factor = x[..., None]
    table = torch.ones_like(factor)
    while table.shape[-1] < n:
        table = torch.cat([table, table * factor], -1)
        factor = factor * factor
    return table[..., :n]


def spherical_harmonics(u: Tensor, degrees: tuple[int, ...]) -> Tensor:
    """Real, orthonormal spherical harmonics of unit vectors ``(..., 3)`` -> ``(..., M)``, m = -l..l for every l.

    Up to l = 4; the order m = -1, 0, 1 of l = 1 is y, z, x.
    """
    x, y, z = u.unbind(-1)
    components: list[Tensor] = []
    for degree in degrees:
        components += _HARMONICS[degree](x, y, z)
    return torch.stack(components, -1) if components else u[..., :0]


def _degree0(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    return [torch.full_like(x, 0.5 / math.sqrt(math.pi))]


def _degree1(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    c = math.sqrt(3.0 / (4.0 * math.pi))
    return [c * y, c * z, c * x]


def _degree2(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    c = 0.5 * math.sqrt(15.0 / math.pi)
    c0 = 0.25 * math.sqrt(5.0 / math.pi)
    return [c * x * y, c * y * z, c0 * (3.0 * z * z - 1.0), c * x * z, 0.5 * c * (x * x - y * y)]


def _degree3(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    c3 = 0.25 * math.sqrt(35.0 / (2.0 * math.pi))
    c2 = 0.25 * math.sqrt(105.0 / math.pi)
    c1 = 0.25 * math.sqrt(21.0 / (2.0 * math.pi))
    c0 = 0.25 * math.sqrt(7.0 / math.pi)
    xx, yy, zz = x * x, y * y, z * z
    near = c1 * (5.0 * zz - 1.0)
    return [
        c3 * y * (3.0 * xx - yy),
        2.0 * c2 * x * y * z,
        near * y,
        c0 * z * (5.0 * zz - 3.0),
        near * x,
        c2 * z * (xx - yy),
        c3 * x * (xx - 3.0 * yy),
    ]


def _degree4(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    c4 = 0.75 * math.sqrt(35.0 / math.pi)
    c3 = 0.75 * math.sqrt(35.0 / (2.0 * math.pi))
    c2 = 0.75 * math.sqrt(5.0 / math.pi)
    c1 = 0.75 * math.sqrt(5.0 / (2.0 * math.pi))
    c0 = 3.0 / 16.0 / math.sqrt(math.pi)
    xx, yy, zz = x * x, y * y, z * z
    near = c2 * (7.0 * zz - 1.0)
    tilted = c1 * z * (7.0 * zz - 3.0)
    return [
        c4 * x * y * (xx - yy),
        c3 * y * z * (3.0 * xx - yy),
        near * x * y,
        tilted * y,
        c0 * (zz * (35.0 * zz - 30.0) + 3.0),
        tilted * x,
        0.5 * near * (xx - yy),
        c3 * x * z * (xx - 3.0 * yy),
        0.25 * c4 * (xx * (xx - 3.0 * yy) - yy * (3.0 * xx - yy)),
    ]


_HARMONICS = (_degree0, _degree1, _degree2, _degree3, _degree4)


class Degrees(nn.Module):
    """Which degree each of the M components of a Euclidean variable belongs to."""

    contraction: Tensor
    degree: Tensor

    def __init__(self, degrees: tuple[int, ...]) -> None:
        super().__init__()
        degree = [d for d, order in enumerate(degrees) for _ in range(2 * order + 1)]
        self._exact = torch.zeros(len(degree), len(degrees), dtype=torch.float64)
        for component, d in enumerate(degree):
            self._exact[component, d] = 1.0 / math.sqrt(2 * degrees[d] + 1)
        self.register_buffer("contraction", self._exact.clone(), persistent=False)
        self.register_buffer("degree", torch.tensor(degree, dtype=torch.int64), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Degrees:
        super()._apply(fn, recurse)
        # a model that was float32 and becomes float64 must not keep square roots rounded to float32
        self.contraction = self._exact.to(self.contraction)
        return self

    def invariants(self, v: Tensor) -> Tensor:
        """I_l(v) = sum_m v_lm^2 / sqrt(2l+1): ``(..., M)`` -> ``(..., D)``."""
        return v.square() @ self.contraction

    def spread(self, per_degree: Tensor) -> Tensor:
        """One number per degree -> the same for all its components: ``(..., D)`` -> ``(..., M)``."""
        return per_degree[..., self.degree]


# -- embedding ---------------------------------------------------------------------------------------------------------


class ElectronicEmbedding(nn.Module):
    """Spreads a total charge, or number of unpaired electrons, over the atoms (Unke et al. 2021, eqs. 10 and 11).

    One row of keys and values serves psi >= 0, the other psi < 0; psi = 0 gives exactly zero.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        std = 1.0 / math.sqrt(features)
        self.queries = nn.Parameter(torch.randn(Z_MAX + 1, features) * std)
        self.keys = nn.Parameter(torch.randn(2, features) * std)
        self.values = nn.Parameter(torch.randn(2, features) * std)
        self.residual = MLP(features, features, features, bias=False)

    def forward(self, psi: Tensor, batch: Batch) -> Tensor:
        """psi ``(n_structures,)`` -> ``(N, F)``."""
        row = batch.per_atom((psi < 0).to(torch.int64))  # (N,)
        q = self.queries[batch.numbers]
        y = softplus((q * self.keys[row]).sum(-1) / math.sqrt(q.shape[-1]))
        share = batch.per_atom(psi) * y / batch.per_atom(batch.sum_by_structure(y))
        e = share[:, None] * self.values[row]
        return e + self.residual_of(e)

    def residual_of(self, e: Tensor) -> Tensor:
        return self.residual(silu(e))


# -- message passing ---------------------------------------------------------------------------------------------------


class Filter(nn.Module):
    """w_ij = R2 silu(R1 b(r_ij)) + S2 silu(S1 I(ev_j - ev_i)): ``(N, S, F)``.

    The first is a function of the distance alone, and w_ij = w_ji.
    """

    def __init__(self, c: SO3kratesConfig) -> None:
        super().__init__()
        features = c.num_features
        self.radial = MLP(c.num_basis_functions, features, features)
        self.spherical = MLP(len(c.degrees), features // 4, features) if c.degrees else None

    def forward(self, basis: Tensor, invariants: Tensor) -> Tensor:
        w = self.radial(basis)
        return w if self.spherical is None else w + self.spherical(invariants)


class Attention(nn.Module):
    """alpha_ij,h = phi_ij sum_c q_i,hc w_ij,hc k_j,hc for heads h of equal width; no softmax."""

    def __init__(self, c: SO3kratesConfig, heads: int) -> None:
        super().__init__()
        width = c.num_features // heads
        self.heads, self.normalized = heads, c.qk_normalization
        self.query = nn.Parameter(lecun_normal_(torch.empty(heads, width, width), width))  # (head, out, in)
        self.key = nn.Parameter(lecun_normal_(torch.empty(heads, width, width), width))

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, F)`` -> twice ``(N, heads, width)``."""
        split = x.view(len(x), self.heads, -1)
        q, k = head_linear(self.query, split), head_linear(self.key, split)
        return (unit_rms(q), unit_rms(k)) if self.normalized else (q, k)

    def forward(self, x: Tensor, w: Tensor, g: Geometry) -> Tensor:
        """Features ``(N, F)`` and filters ``(N, S, F)`` -> ``(N, S, heads)``."""
        q, k = self.queries_and_keys(x)
        products = q.flatten(1)[:, None] * k.flatten(1)[g.index] * w
        return products.unflatten(-1, (self.heads, -1)).sum(-1) * g.phi[..., None]


def head_linear(weight: Tensor, x: Tensor) -> Tensor:
    """out_i = sum_j W[h, i, j] x[h, j]: ``(N, heads, width)`` -> the same shape."""
    return torch.einsum("hij,nhj->nhi", weight, x)


class AttentionBlock(nn.Module):
    """Updates of features and Euclidean variables by sums over neighbours (eqs. 9-14).

    Both are weighted by attention coefficients, one per head for the features and one per degree for the harmonics.
    """

    def __init__(self, c: SO3kratesConfig) -> None:
        super().__init__()
        self.filter_features = Filter(c)
        self.attention_features = Attention(c, c.num_heads)
        width = c.num_features // c.num_heads
        self.value = nn.Parameter(lecun_normal_(torch.empty(c.num_heads, width, width), width))
        self.filter_euclidean = Filter(c) if c.degrees else None
        self.attention_euclidean = Attention(c, len(c.degrees)) if c.degrees else None
        self.degrees = Degrees(c.degrees)

    def forward(self, x: Tensor, ev: Tensor | None, g: Geometry) -> tuple[Tensor, Tensor]:
        """The updates, ``(N, F)`` and ``(N, M)``; ev None means Euclidean variables that are all zero."""
        invariants = self.invariants(ev, g)  # (N, S, D)
        alpha = self.attention_features(x, self.filter_features(g.basis, invariants), g)  # (N, S, heads)
        v = head_linear(self.value, x.view(len(x), alpha.shape[-1], -1))  # (N, heads, width)
        dx = torch.einsum("nsh,nshc->nhc", alpha, v[g.index]).flatten(1)
        if self.filter_euclidean is None or self.attention_euclidean is None:
            return dx, x.new_zeros(len(x), 0)
        alpha = self.attention_euclidean(x, self.filter_euclidean(g.basis, invariants), g)  # (N, S, D)
        return dx, (self.degrees.spread(alpha) * g.harmonics).sum(1)

    def invariants(self, ev: Tensor | None, g: Geometry) -> Tensor:
        """I(ev_j - ev_i): ``(N, S, D)``, or ``(1, 1, D)`` zeros."""
        if ev is None:
            return g.basis.new_zeros(1, 1, self.degrees.contraction.shape[1])
        return self.degrees.invariants(ev[g.index] - ev[:, None])


class Exchange(nn.Module):
    """Features and Euclidean variables of one atom inform each other through the invariants of the latter (eq. 15).

    (a, b) = W [x, I(ev)] + bias; x grows by a, ev_l by b_l ev_l.
    """

    def __init__(self, c: SO3kratesConfig) -> None:
        super().__init__()
        size = c.num_features + len(c.degrees)
        self.linear = dense(size, size)
        self.degrees = Degrees(c.degrees)
        self.num_features = c.num_features

    def forward(self, x: Tensor, ev: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(torch.cat([x, self.degrees.invariants(ev)], -1))
        return y[:, : self.num_features], self.degrees.spread(y[:, self.num_features :]) * ev


class Layer(nn.Module):
    """Attention, normalisation, residual network, exchange, normalisation (Fig. 1 of the paper)."""

    def __init__(self, c: SO3kratesConfig) -> None:
        super().__init__()
        features = c.num_features
        self.attention = AttentionBlock(c)
        self.norm_1 = Norm(c.normalization, features) if c.layer_normalization_1 else None
        self.mlp_1 = MLP(features, features, features) if c.residual_mlp_1 else None
        self.exchange = Exchange(c)
        self.norm_2 = Norm(c.normalization, features) if c.layer_normalization_2 else None
        self.mlp_2 = MLP(features, features, features) if c.residual_mlp_2 else None
        # weights of the updates by attention, residual network, exchange, residual network
        self.scalars = nn.Parameter(torch.ones(4)) if c.residual_scalars else None

    def forward(self, x: Tensor, ev: Tensor | None, g: Geometry) -> tuple[Tensor, Tensor]:
        """New features ``(N, F)`` and Euclidean variables ``(N, M)``; ev None means zeros."""
        dx, dev = self.attention(x, ev, g)
        return self.refine(self.add(x, dx, 0), dev if ev is None else ev + dev)

    def refine(self, x: Tensor, ev: Tensor) -> tuple[Tensor, Tensor]:
        """What follows the attention and happens on every atom by itself."""
        if self.norm_1 is not None:
            x = self.norm_1(x)
        if self.mlp_1 is not None:
            x = self.add(x, self.mlp_1(silu(x)), 1)
        dx, dev = self.exchange(x, ev)
        x = self.add(x, dx, 2)
        if self.norm_2 is not None:
            x = self.norm_2(x)
        if self.mlp_2 is not None:
            x = self.add(x, self.mlp_2(silu(x)), 3)
        return x, ev + dev

    def add(self, x: Tensor, update: Tensor, k: int) -> Tensor:
        return x + update if self.scalars is None else x + self.scalars[k] * update
