"""The kernel matrix of a training set: blocks between geometries, and the whole of it as a linear operator.

Two geometries r, r' of N atoms are compared by their inverse distances x = 1/|r_a - r_b| with a Matern-5/2 kernel
kappa(d) = (1 + d + d^2/3) e^-d, d = sqrt(5) |x - x'| / sigma. Forces are derivatives of the energy, so that their
covariance is the second derivative of the kernel (Chmiela et al., Sci. Adv. 3, e1603015 (2017), eq. 5):

    K(r, r') = J(r)^T [c2 1 - c1 u u^T] J(r'),   u = x - x',   J = dx/dr
    c1 = 25/(3 sigma^4) e^-d,   c2 = 5/(3 sigma^2) (1 + d) e^-d

summed over the permutations of equal atoms, which act on the second geometry (Chmiela et al., Nat. Commun. 9, 3887
(2018)). Blocks of forces with energies follow from the same kernel with one derivative or none. All of it is positive
semi-definite, and in the unit of x (1/angstrom): the covariance of forces carries 1/angstrom^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_gdml import native_blocks
from openmm_gdml.descriptors import Gradients, pair_gradients, pair_indices, pair_permutations

#: numbers that one temporary array of a blocked loop may hold (16 MB in float64).
TEMPORARY = 1 << 21


class Operator(Protocol):
    """What the solvers ask of a kernel matrix: symmetric, positive semi-definite, float64.

    Attributes:
        n: order of the matrix. block: rows ``[k * block, (k + 1) * block)`` belong to geometry k (energies follow).
        n_points: number of geometries. working_memory: bytes that the methods use besides what they return.
    """

    n: int
    block: int
    n_points: int

    @property
    def working_memory(self) -> int: ...

    def matvec(self, v: Tensor) -> Tensor:
        """K v for ``v (n,)``."""
        ...

    def columns(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Columns of K, ``(n, len(indices))``."""
        ...

    def diagonal(self) -> Tensor:
        """``(n,)``."""
        ...

    def dense(self) -> Tensor:
        """The whole matrix, ``(n, n)``; the caller may overwrite it."""
        ...

    def point(self, index: int) -> int:
        """Which geometry a row belongs to."""
        ...


@dataclass(frozen=True)
class PairTables:
    """Inverse distances of geometries as symmetric tables, with their derivatives.

    Attributes:
        x: ``(n, N, N)`` 1/angstrom, zero on the diagonal.
        h: ``(n, N, N, 3)``, h[a, b] = d x[a, b] / d r_a = -(r_a - r_b) / |r_a - r_b|^3, antisymmetric in a, b.
    """

    x: Tensor
    h: Tensor

    @classmethod
    def of(cls, positions: Tensor, lattice: Tensor | None = None, gradients: Gradients = pair_gradients) -> PairTables:
        """Tables of ``positions (n, N, 3)`` in angstrom; `lattice` holds box vectors as rows.

        With a lattice a pair is taken at the image that `descriptors.pair_vectors` chooses. `gradients` are those of
        another pair descriptor (`descriptors.gradients_of`), which then takes the place of inverse distances.
        """
        n, (i, j) = positions.shape[1], (k.to(positions.device) for k in pair_indices(positions.shape[1]))
        values, slopes = gradients(positions, lattice)
        x, h = positions.new_zeros(len(positions), n, n), positions.new_zeros(len(positions), n, n, 3)
        x[:, i, j], x[:, j, i] = values, values
        h[:, i, j], h[:, j, i] = -slopes, slopes
        return cls(x, h)

    def __getitem__(self, chosen: slice | Tensor) -> PairTables:
        return PairTables(self.x[chosen], self.h[chosen])

    def __len__(self) -> int:
        return len(self.x)


def matern_factors(square: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """kappa, c1 and c2 (module docstring) for squared distances ``|u|^2``."""
    d = (5.0 * square.clamp_min(0.0)).sqrt() / sigma
    e = torch.exp(-d)
    return (1 + d + d * d / 3) * e, (25 / (3 * sigma**4)) * e, (5 / (3 * sigma**2)) * (1 + d) * e


def as_tensor(values: Tensor | np.ndarray) -> Tensor:
    """float64, wherever it lies."""
    return torch.as_tensor(values).to(torch.float64)


def as_permutations(permutations: Tensor | np.ndarray | None, n_atoms: int) -> Tensor:
    """``(S, N)`` int64; None is the identity alone."""
    if permutations is None:
        return torch.arange(n_atoms)[None]
    return torch.as_tensor(np.asarray(permutations)).to(torch.int64)


def force_blocks(
    positions_a: Tensor | np.ndarray,
    positions_b: Tensor | np.ndarray,
    sigma: float,
    permutations: Tensor | np.ndarray | None = None,
    lattice: Tensor | np.ndarray | None = None,
    gradients: Gradients = pair_gradients,
) -> Tensor:
    """Covariances of forces between two sets of geometries.

    Args:
        positions_a, positions_b: ``(a, N, 3)`` and ``(b, N, 3)`` angstrom.
        sigma: length scale in 1/angstrom.
        permutations: ``(S, N)``, a group; None is the identity alone.
        lattice: box vectors as rows, ``(3, 3)`` angstrom, or None.
        gradients: of the pair descriptor.

    Returns ``(a, 3N, b, 3N)``, positive semi-definite as a matrix if the two sets are one.
    """
    one, other = as_tensor(positions_a), as_tensor(positions_b)
    cell = None if lattice is None else as_tensor(lattice).to(one.device)
    n = one.shape[1]
    out = one.new_empty(len(one), 3 * n, len(other), 3 * n)
    symmetry = as_permutations(permutations, n)
    fill_force_blocks(PairTables.of(one, cell, gradients), PairTables.of(other, cell, gradients), sigma, symmetry, out)
    return out


def fill_force_blocks(a: PairTables, b: PairTables, sigma: float, permutations: Tensor, out: Tensor) -> None:
    """`force_blocks` of two sets of tables into ``out (a, 3N, b, 3N)``, which may be a view with strides."""
    if native_blocks.available(out):
        native_blocks.fill(a, b, sigma, permutations, out)
        return
    n = a.x.shape[1]
    per_pair = max(9 * n * n, 8 * n * n + 6 * n * len(permutations))
    size = max(1, int(sqrt(TEMPORARY / per_pair)))
    for i in range(0, len(a), size):
        for j in range(0, len(b), size):
            out[i : i + size, :, j : j + size] = _torch_blocks(a[i : i + size], b[j : j + size], sigma, permutations)


def _torch_blocks(a: PairTables, b: PairTables, sigma: float, permutations: Tensor) -> Tensor:
    """`force_blocks` in one go: ``(a, 3N, b, 3N)``.

    In terms of the tables, permuted geometry b' = b[p], the block of atoms (i, p_j) gets for i != j
    c2 h_a[i, j] h_b'[j, i]^T, for i = j the sum of c2 h_a[i, k] h_b'[i, k]^T over k, and always -c1 s_i t_j^T with
    s_i = sum_k h_a[i, k] u[i, k], and t_j likewise from b'.
    """
    n_a, n_b, n = len(a), len(b), a.x.shape[1]
    block = a.x.new_zeros(n_a, n_b, n, n, 3, 3)
    left, right = [], []
    atoms = torch.arange(n, device=a.x.device)
    for p in permutations.to(a.x.device):
        inverse = torch.argsort(p)
        x, h = b.x[:, p][:, :, p], b.h[:, p][:, :, p]
        u = a.x[:, None] - x[None]
        _, c1, c2 = matern_factors((u * u).sum((-1, -2)) / 2, sigma)
        s = torch.einsum("akld,abkl->abkd", a.h, u)
        t = torch.einsum("bkld,abkl->abkd", h, u)[:, :, inverse]
        left.append(s.flatten(2) * c1[..., None])
        right.append(t.flatten(2))
        row = c2[:, :, None, None, None] * a.h[:, None, :, inverse]
        column = b.h[:, :, p].transpose(1, 2)
        block += row[..., None] * column[None, :, :, :, None]
        same = torch.einsum("akld,bkle->abkde", a.h, h)
        block[:, :, atoms, p] += c2[:, :, None, None, None] * same
    result = block.permute(0, 1, 2, 4, 3, 5).reshape(n_a, n_b, 3 * n, 3 * n)
    result = result - torch.stack(left, -1) @ torch.stack(right, -2)
    return result.transpose(1, 2)


class KernelOperator:
    """The kernel matrix of a training set with inverse distances (see `Operator`).

    Rows are the ``3N`` force components of geometry 0, 1, ..., then, with energy constraints, the energies of all.

    Args:
        positions: ``(M, N, 3)`` angstrom.
        sigma: length scale, 1/angstrom.
        permutations: ``(S, N)``, a group of permutations of equal atoms; None is the identity alone.
        lattice: box vectors as rows, ``(3, 3)`` angstrom, or None.
        energies: whether energies are observed besides forces.
        memory: bytes that `matvec` may use to keep what does not depend on its argument.
        gradients: of the pair descriptor (`descriptors.gradients_of`).

    Raises `ValueError` naming the argument for impossible shapes or values, or permutations that are no group.
    """

    def __init__(
        self,
        positions: Tensor | np.ndarray,
        sigma: float,
        permutations: Tensor | np.ndarray | None = None,
        lattice: Tensor | np.ndarray | None = None,
        energies: bool = False,
        memory: int = 1 << 29,
        gradients: Gradients = pair_gradients,
    ) -> None:
        self.positions = as_tensor(positions)
        if self.positions.ndim != 3 or self.positions.shape[2] != 3 or not len(self.positions):
            raise ValueError(f"positions: expected shape (n_points, n_atoms, 3), got {tuple(self.positions.shape)}")
        if not sigma > 0:
            raise ValueError(f"sigma: expected a positive number, got {sigma}")
        self.n_points, n_atoms = self.positions.shape[:2]
        self.block = 3 * n_atoms
        self.energies = energies
        self.n = self.n_points * (self.block + energies)
        self.sigma = float(sigma)
        self.lattice = None if lattice is None else as_tensor(lattice).to(self.positions.device)
        self.permutations = _checked_group(as_permutations(permutations, n_atoms), n_atoms)
        self.memory = memory
        self.tables = PairTables.of(self.positions, self.lattice, gradients)
        device = self.positions.device
        self._pairs = tuple(k.to(device) for k in pair_indices(n_atoms))
        self._pair_permutations = pair_permutations(self.permutations).to(device)
        x = self.tables.x[:, self._pairs[0], self._pairs[1]]
        self._centre = x.mean(0)
        self._centred = x - self._centre
        self._factors: list[tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def n_forces(self) -> int:
        """Rows of forces; those of energies follow."""
        return self.n_points * self.block

    @property
    def working_memory(self) -> int:
        """Bytes that the methods use besides what they return: kept factors, and a few temporary arrays."""
        factors = 24 * len(self.permutations) * self.n_points**2
        return (factors if factors <= self.memory else 0) + 6 * 8 * TEMPORARY + 8 * 5 * self.tables.x.numel()

    def point(self, index: int) -> int:
        """Which geometry a row belongs to."""
        return index // self.block if index < self.n_forces else index - self.n_forces

    def jacobian_times(self, v: Tensor) -> Tensor:
        """J v: ``(M, N, 3)`` -> ``(M, n_pairs)``, pairs in the order of ``tril_indices(N, -1)``."""
        i, j = self._pairs
        return (self.tables.h[:, i, j] * (v[:, i] - v[:, j])).sum(-1)

    def model_terms(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """What the model holds for coefficients ``(n,)`` of the rows: A ``(M, n_pairs)`` and energies' ``(M,)``."""
        forces = coefficients[: self.n_forces].view(self.n_points, -1, 3)
        return -self.jacobian_times(forces), coefficients[self.n_forces :] if self.energies else None, None

    @property
    def descriptors(self) -> Tensor:
        """x of the geometries, ``(M, n_pairs)``."""
        return self._centred + self._centre

    def _transpose_times(self, w: Tensor, chosen: slice) -> Tensor:
        """J^T w of some geometries: ``(m, n_pairs)`` -> ``(m, 3N)``."""
        i, j = self._pairs
        table = w.new_zeros(len(w), *self.tables.x.shape[1:])
        table[:, i, j] = w
        table[:, j, i] = w
        return (self.tables.h[chosen] * table[..., None]).sum(2).flatten(1)

    def matvec(self, v: Tensor) -> Tensor:
        """K v for ``v (n,)``, without the matrix: as forces (and energies) predicted at the training geometries."""
        v = as_tensor(v)
        if v.shape != (self.n,):
            raise ValueError(f"v: expected shape ({self.n},), got {tuple(v.shape)}")
        forces, energies = v[: self.n_forces], v[self.n_forces :] if self.energies else None
        a = self.jacobian_times(forces.view(self.n_points, -1, 3))
        out = torch.empty_like(v)
        for chosen, kept in self._blocks():
            self._predict(a, energies, chosen, kept, out)
        return out

    def _blocks(self) -> list[tuple[slice, tuple[Tensor, Tensor, Tensor] | None]]:
        """Slices of geometries that fit into memory together, with their factors if these are kept."""
        per_point = len(self.permutations) * self.n_points
        size = max(1, min(self.n_points, TEMPORARY // (4 * per_point)))
        slices = [slice(i, min(i + size, self.n_points)) for i in range(0, self.n_points, size)]
        if 24 * per_point * self.n_points > self.memory:
            return [(s, None) for s in slices]
        if self._factors is None:
            self._factors = [self._factors_of(self._queries(s)) for s in slices]
        return list(zip(slices, self._factors, strict=True))

    def _queries(self, chosen: slice) -> Tensor:
        """Permuted, centred descriptors of some geometries, ``(m * S, n_pairs)``."""
        x = self._centred[chosen] + self._centre
        return (x[:, self._pair_permutations] - self._centre).flatten(0, 1)

    def _factors_of(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        square = (q * q).sum(1)[:, None] + (self._centred**2).sum(1) - 2 * (q @ self._centred.T)
        return matern_factors(square, self.sigma)

    def _predict(
        self,
        a: Tensor,
        energies: Tensor | None,
        chosen: slice,
        kept: tuple[Tensor, Tensor, Tensor] | None,
        out: Tensor,
    ) -> None:
        """Rows of K v that belong to the geometries `chosen`, from ``a = J v (M, n_pairs)``."""
        q = self._queries(chosen)
        kappa, c1, c2 = self._factors_of(q) if kept is None else kept
        x = self._centred
        dot = q @ a.T - (a * x).sum(1)
        first = c1 * dot
        if energies is not None:
            first = first - c2 * energies
        # sum_j c2 a_j - (c1 u.a_j - c2 e_j) u, with u = q - x_j
        w = c2 @ a + first @ x - first.sum(1, keepdim=True) * q
        m = chosen.stop - chosen.start
        index = self._pair_permutations.repeat(m, 1)
        w = torch.zeros_like(w).scatter_(1, index, w).view(m, -1, w.shape[1]).sum(1)
        out[chosen.start * self.block : chosen.stop * self.block] = self._transpose_times(w, chosen).flatten()
        if energies is not None:
            # cov(E, F') = -d kappa / d r' = -c2 J'^T u
            value = (kappa @ energies - (c2 * dot).sum(1)).view(m, -1).sum(1)
            out[self.n_forces + chosen.start : self.n_forces + chosen.stop] = value

    def dense(self) -> Tensor:
        """The whole matrix, ``(n, n)`` float64; the caller may overwrite it."""
        k = self.positions.new_empty(self.n, self.n)
        m, f = self.n_points, self.n_forces
        size = max(1, -(-m // 16))
        for i in range(0, m, size):
            rows, last = self.tables[i : i + size], min(i + size, m)
            part = k[i * self.block : last * self.block, i * self.block : f]
            view = part.unflatten(1, (m - i, self.block)).unflatten(0, (last - i, self.block))
            fill_force_blocks(rows, self.tables[i:], self.sigma, self.permutations, view)
            k[last * self.block : f, i * self.block : last * self.block] = part[:, (last - i) * self.block :].T
        if self.energies:
            mixed, pure = self._energy_blocks(slice(0, m))
            k[:f, f:], k[f:, :f], k[f:, f:] = mixed, mixed.T, pure
        return k

    def _energy_blocks(self, chosen: slice) -> tuple[Tensor, Tensor]:
        """Covariances of all forces, ``(n_forces, m)``, and of all energies, ``(M, m)``, with some energies."""
        x = self._centred + self._centre
        mixed, pure = [], []
        for j in range(*chosen.indices(self.n_points)):
            w, e = torch.zeros_like(x), x.new_zeros(len(x))
            for p in self._pair_permutations:
                u = x - x[j, p]
                kappa, _, c2 = matern_factors((u * u).sum(1), self.sigma)
                w += c2[:, None] * u
                e += kappa
            mixed.append(self._transpose_times(w, slice(None)).flatten())
            pure.append(e)
        return torch.stack(mixed, 1), torch.stack(pure, 1)

    def columns(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Columns of K, ``(n, len(indices))`` float64."""
        index = torch.as_tensor(np.asarray(indices)).to(torch.int64)
        if index.ndim != 1 or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.n):
            raise ValueError(f"indices: expected one row of numbers from 0 to {self.n - 1}, got {index.tolist()[:8]}")
        out = self.positions.new_empty(self.n, len(index))
        points = torch.where(index < self.n_forces, index // self.block, index - self.n_forces)
        size = max(1, TEMPORARY // (self.n_forces * self.block))
        of_force = index < self.n_forces
        for group in torch.unique(points[of_force]).split(size):
            chosen = torch.nonzero(of_force & torch.isin(points, group)).flatten()
            block = self.positions.new_empty(self.n_points, self.block, len(group), self.block)
            fill_force_blocks(self.tables, self.tables[group], self.sigma, self.permutations, block)
            where = torch.searchsorted(group, points[chosen]) * self.block + index[chosen] % self.block
            out[: self.n_forces, chosen] = block.view(self.n_forces, -1)[:, where]
        if self.energies:
            self._energy_columns(index, out)
        return out

    def _energy_columns(self, index: Tensor, out: Tensor) -> None:
        """Rows and columns of energies of `columns`, in place."""
        of_force = index < self.n_forces
        mixed, pure = self._energy_blocks(slice(0, self.n_points))
        out[self.n_forces :, of_force] = mixed[index[of_force]].T
        energy = index[~of_force] - self.n_forces
        out[: self.n_forces, ~of_force] = mixed[:, energy]
        out[self.n_forces :, ~of_force] = pure[:, energy]

    def diagonal(self) -> Tensor:
        """``(n,)`` float64."""
        parts = []
        for k in range(self.n_points):
            one = self.tables[k : k + 1]
            block = self.positions.new_empty(1, self.block, 1, self.block)
            fill_force_blocks(one, one, self.sigma, self.permutations, block)
            parts.append(block[0, :, 0].diagonal())
        if self.energies:
            x = self._centred + self._centre
            u = x[:, None] - x[:, self._pair_permutations]
            parts.append(matern_factors((u * u).sum(-1), self.sigma)[0].sum(1))
        return torch.cat(parts)


def _checked_group(permutations: Tensor, n_atoms: int) -> Tensor:
    """Refuse what is no set of permutations with the inverse of each (or K would not be symmetric)."""
    if permutations.ndim != 2 or permutations.shape[1] != n_atoms or not len(permutations):
        raise ValueError(f"permutations: expected shape (S, {n_atoms}), got {tuple(permutations.shape)}")
    if not bool((permutations.sort(1).values == torch.arange(n_atoms)).all()):
        raise ValueError(f"permutations: expected every row to hold 0 to {n_atoms - 1} once")
    rows = {tuple(p) for p in permutations.tolist()}
    missing = [p for p in torch.argsort(permutations, 1).tolist() if tuple(p) not in rows]
    if missing or len(rows) != len(permutations):
        what = f"the inverse {missing[0]} is missing" if missing else "a permutation occurs twice"
        raise ValueError(f"permutations: expected a group, but {what}")
    return permutations
