"""Blocks of NequIP: radial functions, equivariant linear maps, convolution and gate.

Symbols: N atoms, S slots for neighbours, F features, B Bessel functions, P paths. Features of an irrep of degree l are
``(N, 2l+1, F)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from openmm_nequip.angular import Plan, clebsch_gordan, degree_of
from openmm_nequip.config import NequIPConfig
from openmm_nequip.messages import Messages

#: Root mean squares of swish and tanh over a normal distribution, as the published networks hold them: means over a
#: million quantiles. The integrals are 0.5964692 and 0.6279287, which would change energies by 1e-4 of themselves.
SWISH_RMS = 0.5964586854233045
TANH_RMS = 0.6279282481638502

Features = dict[str, Tensor]


@dataclass
class Geometry:
    """Neighbourhoods of all atoms."""

    index: Tensor  # (N, S)
    basis: Tensor  # (N, S, B), zero for padding and beyond the cutoff
    harmonics: list[Tensor]  # (N, 2l+1, S) for every degree
    couplings: Couplings
    # for the C++ kernel; None where second derivatives may be needed
    active: Tensor | None = None  # (N, S), zero for padding and beyond the cutoff
    pair_couplings: Tensor | None = None  # (N, S, couplings.size)


@dataclass
class ByElement:
    """Atoms sorted by element: ``rows[k]`` holds for the atoms ``atoms[k]``; ``restore`` undoes the sorting."""

    rows: list[int]
    atoms: list[Tensor]
    restore: Tensor

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x_i W[element of i]: ``(N, m, F)``, ``(elements, F, out)`` -> ``(N, m, out)``."""
        parts = [x[atoms] @ weight[row] for row, atoms in zip(self.rows, self.atoms, strict=True)]
        return torch.cat(parts)[self.restore]


# -- radial functions ------------------------------------------------------------------------------------------------


def switch(r: Tensor, onset: float, cutoff: float) -> Tensor:
    """1 below the onset, 0 beyond the cutoff, in between (rc^2-r^2)^2 (rc^2+2r^2-3ro^2) / (rc^2-ro^2)^3; C1."""
    square = r.square().clamp(onset**2, cutoff**2)
    return (cutoff**2 - square) ** 2 * (cutoff**2 + 2.0 * square - 3.0 * onset**2) / (cutoff**2 - onset**2) ** 3


class BesselBasis(nn.Module):
    """b_n(r) = (2/rc) sin(f_n r/rc) / r times the switch, with trained frequencies f_n that start as n pi."""

    def __init__(self, c: NequIPConfig) -> None:
        super().__init__()
        self.cutoff, self.onset = c.cutoff, c.cutoff_onset
        self.frequencies = nn.Parameter(math.pi * torch.arange(1.0, c.num_basis_functions + 1.0))

    def forward(self, r: Tensor) -> Tensor:
        """``(...)`` -> ``(..., B)``."""
        waves = torch.sin(self.frequencies * (r / self.cutoff)[..., None])
        return (2.0 / self.cutoff) * waves * (switch(r, self.onset, self.cutoff) / r)[..., None]


class RadialNetwork(nn.Module):
    """Weights of the P products of a convolution from the distance: swish layers without biases, so that 0 gives 0."""

    def __init__(self, c: NequIPConfig, num_paths: int) -> None:
        super().__init__()
        widths = [c.num_basis_functions, *[c.radial_features] * c.radial_layers, num_paths * c.num_features]
        # variances 4/n in hidden layers and 1/n in the last one, as published
        gains = [2.0] * c.radial_layers + [1.0]
        self.weights = nn.ParameterList(
            gain / math.sqrt(n) * torch.randn(n, m) for gain, n, m in zip(gains, widths[:-1], widths[1:], strict=True)
        )

    def forward(self, basis: Tensor) -> Tensor:
        """``(N, S, B)`` -> ``(N, S, P F)``."""
        x = basis
        for weight in self.weights[:-1]:
            x = silu(x @ weight)
        return x @ self.weights[-1]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W / sqrt(K): ``(N, m, K)``, ``(K, F)`` -> ``(N, m, F)``."""
    rows = x.reshape(-1, x.shape[-1]) @ weight
    return rows.view(*x.shape[:-1], -1) / math.sqrt(weight.shape[0])


# -- convolution -----------------------------------------------------------------------------------------------------


class Couplings(nn.Module):
    """sqrt(2c+1) times the Clebsch-Gordan coefficients of all kinds (a, b, c) of products that a network makes.

    Attributes:
        start: where the block ``(2c+1, 2a+1)`` of each kind begins in `of_pairs`. size: numbers per pair there.
    """

    def __init__(self, kinds: Iterable[tuple[int, int, int]]) -> None:
        super().__init__()
        self._exact: dict[str, Tensor] = {}
        self.start: dict[tuple[int, int, int], int] = {}
        self.size = 0
        by_degree: dict[int, list[Tensor]] = {}
        for a, b, c in sorted(kinds, key=lambda kind: kind[1]):
            block = torch.from_numpy(math.sqrt(2 * c + 1) * clebsch_gordan(a, b, c))
            self._exact[f"moments_{a}{b}{c}"] = block.permute(2, 1, 0).reshape(2 * c + 1, -1)
            by_degree.setdefault(b, []).append(block.permute(1, 2, 0).reshape(2 * b + 1, -1))
            self.start[a, b, c] = self.size
            self.size += (2 * c + 1) * (2 * a + 1)
        self.degrees = sorted(by_degree)
        self._exact |= {f"pairs_{b}": torch.cat(blocks, 1) for b, blocks in by_degree.items()}
        for name, exact in self._exact.items():
            self.register_buffer(name, exact.contiguous(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Couplings:
        super()._apply(fn, recurse)
        # a model that was float32 and becomes float64 must not keep coefficients rounded to float32
        for name, exact in self._exact.items():
            setattr(self, name, exact.contiguous().to(getattr(self, name)))
        return self

    def of_moments(self, kind: tuple[int, int, int], moments: Tensor) -> Tensor:
        """sum_ij C_ijk M_ji: ``(N, (2b+1)(2a+1), F)`` -> ``(N, 2c+1, F)``."""
        return getattr(self, "moments_{}{}{}".format(*kind)) @ moments

    def of_pairs(self, harmonics: list[Tensor]) -> Tensor:
        """sum_j C_ijk Y_j of every pair, from Y ``(N, S, 2b+1)``: all kinds one after the other, ``(N, S, size)``."""
        blocks = [harmonics[b] @ getattr(self, f"pairs_{b}") for b in self.degrees]
        return torch.cat(blocks, -1)


class Convolution(nn.Module):
    """One layer: messages along products with spherical harmonics, self-connection and gate.

    h_i' = gate( W_sc[Z_i] h_i + W_out sum_j sum_paths w_p(r_ij) (W_in h_j (x) Y(u_ij))_p / num_neighbors )
    """

    table: Tensor

    def __init__(self, c: NequIPConfig, plan: Plan, couplings: Couplings) -> None:
        super().__init__()
        self.plan, features = plan, c.num_features
        self.num_features, self.num_neighbors = features, c.num_neighbors
        self.divisor = math.sqrt(features * c.one_hot_length)
        # scalars, and one block of scalars for the gate of every other irrep
        widths = {x: features * (1 + len(plan.gated) if x == "0e" else 1) for x in plan.outputs}
        fan_in = {x: features * len(plan.into(x)) for x in plan.outputs}
        rows, std = len(c.elements), math.sqrt(c.one_hot_length)
        self.self_connection = nn.ParameterDict(
            {x: std * torch.randn(rows, features, widths[x]) for x in plan.outputs if x in plan.inputs}
        )
        self.linear_in = nn.ParameterDict({x: torch.randn(features, features) for x in plan.sources})
        self.radial = RadialNetwork(c, len(plan.paths))
        self.linear_out = nn.ParameterDict({x: torch.randn(n, widths[x]) for x, n in fan_in.items() if n})
        table, self.targets = kernel_table(plan, couplings)
        self.register_buffer("table", table, persistent=False)

    def forward(self, h: Features, elements: ByElement, g: Geometry) -> Features:
        source = {x: linear(h[x], self.linear_in[x]) for x in self.plan.sources}
        messages = self.messages if g.pair_couplings is None else self.kernel_messages
        received = messages(source, self.radial(g.basis), g)
        out = {}
        for x in self.plan.outputs:
            terms = []
            if x in received:
                terms.append(linear(received[x], self.linear_out[x]) / self.num_neighbors)
            if x in self.self_connection:
                terms.append(elements.linear(h[x], self.self_connection[x]) / self.divisor)
            out[x] = sum(terms[1:], terms[0])
        return self.gate(out)

    def messages(self, source: Features, weights: Tensor, g: Geometry) -> Features:
        """Sums over neighbours of all paths, one after the other for every target: ``(N, 2c+1, paths F)``.

        The sum over neighbours comes first, M_ji = sum_s Y_j[s] w[s] h_i[s], as products of matrices; the
        Clebsch-Gordan coefficients then act on one such moment per atom instead of on every pair.
        """
        n, slots = g.index.shape
        neighbor = {x: v[g.index] for x, v in source.items()}  # (N, S, 2a+1, F)
        per_path = weights.view(n, slots, len(self.plan.paths), 1, self.num_features)
        found: dict[str, list[Tensor]] = {}
        k = 0
        while k < len(self.plan.paths):
            # paths that differ in their target only follow one another
            x, degree = self.plan.paths[k].source, self.plan.paths[k].degree
            together = [p for p in self.plan.paths[k:] if (p.source, p.degree) == (x, degree)]
            weighted = per_path[:, :, k : k + len(together)] * neighbor[x][:, :, None]  # (N, S, P, 2a+1, F)
            moments = (g.harmonics[degree] @ weighted.flatten(2)).unflatten(2, weighted.shape[2:])
            for path, moment in zip(together, moments.unbind(2), strict=True):  # (N, 2b+1, 2a+1, F)
                found.setdefault(path.target, []).append(g.couplings.of_moments(path.kind, moment.flatten(1, 2)))
            k += len(together)
        return {x: torch.cat(parts, -1) for x, parts in found.items()}

    def kernel_messages(self, source: Features, weights: Tensor, g: Geometry) -> Features:
        """The same by the C++ kernel, which has first derivatives only."""
        stacked = torch.cat(list(source.values()), 1)
        rows = [n * m for n, m in self.targets.values()]
        out = Messages.apply(stacked, weights, g.pair_couplings, g.active, g.index, self.table, sum(rows))
        parts = zip(self.targets.items(), out.split(rows, 1), strict=True)
        return {x: part.reshape(len(part), m, -1) for (x, (_, m)), part in parts}

    def gate(self, x: Features) -> Features:
        """Scalars through swish or, where they change sign in a mirror, tanh; the others times a swish of scalars."""
        scalars, *gates = x["0e"].split(self.num_features, -1)
        out = {"0e": silu(scalars) / SWISH_RMS}
        if "0o" in x:
            out["0o"] = torch.tanh(x["0o"]) / TANH_RMS
        for name, gate in zip(self.plan.gated, gates, strict=True):
            out[name] = x[name] * silu(gate) / SWISH_RMS
        return out


def kernel_table(plan: Plan, couplings: Couplings) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """What the C++ kernel is told of the paths, ``(paths, 6)`` int64, and (number of paths, 2c+1) of every target.

    The kernel writes the first component of all paths to a target, then the second, and so on.
    """
    starts, row = {}, 0
    for x in plan.sources:
        starts[x] = row
        row += 2 * degree_of(x) + 1
    targets = {x: (len(plan.into(x)), 2 * degree_of(x) + 1) for x in plan.outputs if plan.into(x)}
    first, row = {}, 0
    for x, (n, m) in targets.items():
        first[x] = row
        row += n * m
    lines = []
    for p in plan.paths:
        a, _, c = p.kind
        n, _ = targets[p.target]
        place = first[p.target] + plan.into(p.target).index(p)
        lines.append([starts[p.source], 2 * a + 1, 2 * c + 1, couplings.start[p.kind], place, n])
    return torch.tensor(lines, dtype=torch.int64), targets


def element_table(elements: tuple[int, ...], largest: int) -> Any:
    """Row of every atomic number among the model's elements, ``(largest + 1,)`` int64; -1 for others."""
    table = torch.full((largest + 1,), -1, dtype=torch.int64)
    table[torch.tensor(elements)] = torch.arange(len(elements))
    return table
