"""The kernel matrix of any descriptor, whose derivatives are taken by algorithmic differentiation.

A descriptor is a function of positions, and nothing else is written down: `torch.func` pushes directions forward
through it (J v), pulls gradients back (J^T g), and pushes a direction through the pull-back for Hessian-vector products
(Schmitz, Mueller, Chmiela, J. Phys. Chem. Lett. 13, 10183 (2022)). `AlgorithmicOperator.matvec` does that once per
multiplication and has no Jacobian; only blocks of the matrix itself (`dense`, `columns`) need those of the geometries
at hand. Derivatives of the Matern kernel are those of `matern_jets`, which are safe at zero distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd, vjp, vmap

from openmm_gdml.descriptors import Descriptor
from openmm_gdml.differentiation import batched, push
from openmm_gdml.matern_jets import Expansion, Jets, PairProducts, SecondOrder
from openmm_gdml.operators import TEMPORARY, as_permutations, as_tensor

#: numbers in Jacobians that may be kept while the blocks of a matrix are made (512 MB)
KEPT = 1 << 26
#: rows that are mirrored together
PANEL = 512


class AlgorithmicOperator:
    """The kernel matrix of a training set with any descriptor (see `operators.Operator`).

    Rows are the 3N force components of geometry 0, 1, ..., then, with energies, the energies of all geometries, then
    the 3N components of H v for every direction v in `directions`, H the Hessian of the energy (+H v, not the change of
    the forces, which is -H v).

    Args:
        positions: ``(M, N, 3)`` angstrom.
        sigma: length scale in the unit of the descriptor.
        descriptor: positions -> ``(..., D)``, differentiable three times (twice without directions).
        permutations: ``(S, N)``, a group of permutations of equal atoms; None is the identity alone.
        energies: whether energies are observed besides forces.
        directions: ``(L, N, 3)``, in which Hessians were applied at the geometries `at`, ``(L,)``.

    Attributes:
        descriptors: x of the geometries in their given order of atoms, ``(M, D)``, not scaled.

    Raises `ValueError` naming the argument for impossible shapes or values, permutations without the identity, or a
    descriptor whose derivatives are not finite at one of the geometries.
    """

    def __init__(
        self,
        positions: Tensor | np.ndarray,
        sigma: float,
        descriptor: Descriptor,
        permutations: Tensor | np.ndarray | None = None,
        energies: bool = False,
        directions: Tensor | np.ndarray | None = None,
        at: Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> None:
        self.positions = as_tensor(positions)
        if self.positions.ndim != 3 or self.positions.shape[2] != 3 or not len(self.positions):
            raise ValueError(f"positions: expected shape (n_points, n_atoms, 3), got {tuple(self.positions.shape)}")
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma: expected a positive number, got {sigma}")
        self.n_points, self.n_atoms = self.positions.shape[:2]
        self.block = 3 * self.n_atoms
        self.sigma, self.scale = float(sigma), sqrt(5.0) / float(sigma)
        self.energies = energies
        self.permutations = _with_identity_first(as_permutations(permutations, self.n_atoms), self.n_atoms)
        self.permutations = self.permutations.to(self.positions.device)
        self._directions(directions, at)
        self.n = self.n_forces + energies * self.n_points + len(self.at) * self.block
        self.descriptor = batched(descriptor, self.positions)
        self.descriptors = self.descriptor(self.positions)
        self.size = self.descriptors.shape[-1]
        self._check_derivatives()
        self._check_symmetry()

    def _directions(
        self, directions: Tensor | np.ndarray | None, at: Sequence[int] | np.ndarray | Tensor | None
    ) -> None:
        if (directions is None) != (at is None):
            raise ValueError("at: expected the geometry of each direction, and directions, or neither of them")
        device = self.positions.device
        self.at = torch.as_tensor(np.asarray(at if at is not None else [], dtype=np.int64)).to(device)
        shape = (len(self.at), self.n_atoms, 3)
        self.directions = self.positions.new_zeros(shape) if directions is None else as_tensor(directions).to(device)
        if self.directions.shape != shape:
            raise ValueError(f"directions: expected shape {shape}, got {tuple(self.directions.shape)}")
        if len(self.at) and not 0 <= int(self.at.min()) <= int(self.at.max()) < self.n_points:
            raise ValueError(f"at: expected geometries 0 to {self.n_points - 1}, got {self.at.tolist()[:8]}")
        if len(self.at) and not bool((self.directions.flatten(1).norm(dim=1) > 0).all()):
            raise ValueError("directions: expected vectors that are not zero")

    def _check_derivatives(self) -> None:
        random = torch.from_numpy(np.random.default_rng(0).normal(size=self.positions.shape)).to(self.positions.device)
        try:
            _, change = push(self._described, (self.positions,), (random,))
        except NotImplementedError as error:
            raise ValueError(f"descriptor: torch cannot differentiate one of its operations: {error}") from error
        finite = torch.isfinite(self.descriptors).all(1) & torch.isfinite(change).flatten(1).all(1)
        if not bool(finite.all()):
            bad = int(torch.nonzero(~finite)[0])
            raise ValueError(
                f"descriptor: its value or derivative is not finite at geometry {bad} (a root or quotient of zero? "
                "leave out the distance of an atom to itself)"
            )

    def _check_symmetry(self) -> None:
        """The kernel is symmetric, and the model's sum over orders of the query the same, if orders keep distances."""
        x = self._described(self.positions[:64])
        distance = torch.stack([torch.pdist(x[:, p]) for p in range(x.shape[1])], 1)
        change = (distance - distance[:, :1]).abs().amax(0) / distance.abs().amax().clamp_min(1e-30)
        if len(distance) and float(change.max()) > 1e-8:
            row = self.permutations[int(change.argmax())].tolist()
            raise ValueError(
                f"permutations: the order of atoms {row} changes how far geometries are from one another in this "
                "descriptor, so that it cannot be used with these permutations: let it treat equal atoms alike (all "
                "equivalent dihedrals, for example), or use permutations=None"
            )

    @property
    def n_forces(self) -> int:
        """Rows of forces; those of energies follow, then those of Hessian-vector products."""
        return self.n_points * self.block

    @property
    def n_first(self) -> int:
        """Rows of forces and energies."""
        return self.n_forces + self.energies * self.n_points

    @property
    def working_memory(self) -> int:
        """Bytes that the methods use besides what they return: derivatives of all descriptors, and temporary arrays."""
        orders = self.positions.numel() + self.descriptors.numel()
        return 8 * (6 * TEMPORARY + 12 * len(self.permutations) * orders + self._left_size())

    def _left_size(self) -> int:
        """Numbers in the jets of all geometries in their given order, if they are kept while blocks are made."""
        size = (self.n_points + 2 * len(self.at)) * self.size * self.block
        return size if size <= KEPT else 0

    def point(self, index: int) -> int:
        """Which geometry a row belongs to."""
        if index < self.n_forces:
            return index // self.block
        if index < self.n_first:
            return index - self.n_forces
        return int(self.at[(index - self.n_first) // self.block])

    # -- descriptor and its derivatives ------------------------------------------------------------------------------

    def _ordered(self, x: Tensor) -> Tensor:
        """``(n, N, 3)`` -> all orders of equal atoms, ``(n, S, N, 3)``."""
        return x[:, self.permutations]

    def _described(self, positions: Tensor) -> Tensor:
        """Unscaled descriptors in all orders, ``(n, N, 3)`` -> ``(n, S, D)``."""
        return self.descriptor(self._ordered(positions))

    def jacobian_times(self, v: Tensor) -> Tensor:
        """J v, unscaled and in the given order of atoms: ``(M, N, 3)`` -> ``(M, D)``."""
        return push(self.descriptor, (self.positions,), (v,))[1]

    def second_derivative(self, v: Tensor, w: Tensor) -> Tensor:
        """d^2 x[v, w] at the geometries of the directions, unscaled: ``(L, N, 3)`` twice -> ``(L, D)``."""
        return push(lambda r: push(self.descriptor, (r,), (v,))[1], (self.positions[self.at],), (w,))[1]

    def model_terms(self, coefficients: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        """What `Expansion` and the model hold for coefficients ``(n,)`` of the rows, in unscaled descriptors.

        Returns A ``(M, D)``, e ``(M,)`` or None, and x, a, b ``(L, D)`` of Hessian-vector products, or None.
        """
        forces = coefficients[: self.n_forces].view(self.n_points, -1, 3)
        first = -self.jacobian_times(forces)
        energies = coefficients[self.n_forces : self.n_first] if self.energies else None
        if not len(self.at):
            return first, energies, None
        w = coefficients[self.n_first :].view(-1, self.n_atoms, 3)
        where = self.positions[self.at]
        x, a = push(self.descriptor, (where,), (self.directions,))
        _, b = push(self.descriptor, (where,), (w,))
        first = first.index_add(0, self.at, self.second_derivative(self.directions, w))
        return first, energies, (x, a, b)

    def _jets(self, chosen: slice | Tensor, as_given: bool = False) -> Jets:
        """Scaled jets of some geometries in all orders of atoms."""
        r = self.positions[chosen]
        keep = slice(0, 1) if as_given else slice(None)
        ordered = self.permutations[keep]

        def f(one: Tensor) -> Tensor:
            return self.scale * self.descriptor(one.view(-1, 3)[ordered])

        flat = r.flatten(1)
        return Jets(vmap(f)(flat), vmap(jacfwd(f))(flat))

    def _product_jets(self, chosen: slice | Tensor, as_given: bool = False) -> Jets:
        """Scaled jets at the geometries of some directions, with a and dJ."""
        flat, v = self.positions[self.at[chosen]].flatten(1), self.directions[chosen].flatten(1)
        ordered = self.permutations[slice(0, 1) if as_given else slice(None)]

        def f(one: Tensor) -> Tensor:
            return self.scale * self.descriptor(one.view(-1, 3)[ordered])

        def both(one: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            x, a = push(f, (one,), (direction,))
            jacobian, curvature = push(jacfwd(f), (one,), (direction,))
            return x, jacobian, a, curvature

        return Jets(*vmap(both)(flat, v))

    # -- products with the matrix ------------------------------------------------------------------------------------

    def _expansion(self, v: Tensor) -> Expansion:
        """The predictor of coefficients ``v (n,)``, over all orders of the training geometries."""
        m, n_atoms = self.n_points, self.n_atoms

        def spread(x: Tensor) -> Tensor:
            return self.scale * x.flatten(0, 1)

        w = self._ordered(v[: self.n_forces].view(m, n_atoms, 3))
        r = self._ordered(self.positions)
        x, first = push(self.descriptor, (r,), (w,))
        first = -first
        energies = v[self.n_forces : self.n_first].repeat_interleave(len(self.permutations)) if self.energies else None
        second = None
        if len(self.at):
            w, direction = self._ordered(v[self.n_first :].view(-1, n_atoms, 3)), self._ordered(self.directions)
            where = r[self.at]
            z, a = push(self.descriptor, (where,), (direction,))
            b, c = push(lambda t: push(self.descriptor, (t,), (w,))[1], (where,), (direction,))
            first = first.index_add(0, self.at, c)
            second = SecondOrder(spread(z), spread(a), spread(b))
        return Expansion(spread(x), spread(first), energies, second)

    def matvec(self, v: Tensor) -> Tensor:
        """K v for ``v (n,)``, without the matrix or a Jacobian: as predictions at the training geometries."""
        v = as_tensor(v)
        if v.shape != (self.n,):
            raise ValueError(f"v: expected shape ({self.n},), got {tuple(v.shape)}")
        expansion, out = self._expansion(v), torch.empty_like(v)
        size = max(1, TEMPORARY // (4 * len(expansion.x) + 4 * len(self.at) * len(self.permutations)))
        forces = out[: self.n_forces].view(self.n_points, -1, 3)
        for i in range(0, self.n_points, size):
            chosen = slice(i, min(i + size, self.n_points))
            x, pull_back, *_ = vjp(self.descriptor, self.positions[chosen])
            x = self.scale * x
            forces[chosen] = -pull_back(self.scale * expansion.gradient(x))[0]
            if self.energies:
                out[self.n_forces + chosen.start : self.n_forces + chosen.stop] = expansion.value(x)
        products = out[self.n_first :].view(-1, self.n_atoms, 3)
        for i in range(0, len(self.at), size):
            products[i : i + size] = self._hessian_rows(expansion, slice(i, min(i + size, len(self.at))))
        return out

    def _hessian_rows(self, expansion: Expansion, chosen: slice) -> Tensor:
        """H v of an expansion at the geometries of some directions, forward over reverse: ``(l, N, 3)``."""
        r, v = self.positions[self.at[chosen]], self.directions[chosen]
        x, a = push(self.descriptor, (r,), (v,))
        x, a = self.scale * x, self.scale * a
        gradient, change = expansion.gradient(x), expansion.hessian_times(x, a)

        def pulled(positions: Tensor, g: Tensor) -> Tensor:
            return vjp(self.descriptor, positions)[1](self.scale * g)[0]

        return push(pulled, (r, gradient), (v, change))[1]

    # -- the matrix itself -------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """The whole matrix, ``(n, n)`` float64; the caller may overwrite it."""
        k = self.positions.new_zeros(self.n, self.n)
        self._fill(k, torch.arange(self.n_points), torch.arange(len(self.at)), lower=True)
        for i in range(0, self.n, PANEL):
            rows = slice(i, i + PANEL)
            k[rows, rows] = k[rows, rows].tril() + k[rows, rows].tril(-1).T
            k[rows, i + PANEL :] = k[i + PANEL :, rows].T
        return k

    def columns(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Columns of K, ``(n, len(indices))`` float64."""
        index = torch.as_tensor(np.asarray(indices)).to(torch.int64)
        if index.ndim != 1 or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.n):
            raise ValueError(f"indices: expected one row of numbers from 0 to {self.n - 1}, got {index.tolist()[:8]}")
        product = index >= self.n_first
        force = index < self.n_forces
        points = torch.unique(torch.cat([index[force] // self.block, index[~force & ~product] - self.n_forces]))
        at = torch.unique((index[product] - self.n_first) // self.block)
        out = self.positions.new_empty(self.n, len(index))
        step = max(1, TEMPORARY // (self.n * self.block))
        for group in points.split(step):
            block = self._group(group, at[:0])
            column = torch.searchsorted(group, torch.where(force, index // self.block, index - self.n_forces))
            column = column.clamp_max(len(group) - 1)
            here = ~product & (group[column] == torch.where(force, index // self.block, index - self.n_forces))
            place = torch.where(force, column * self.block + index % self.block, len(group) * self.block + column)
            out[:, here] = block[:, place[here]]
        for group in at.split(step):
            block = self._group(points[:0], group)
            number = (index - self.n_first).div(self.block, rounding_mode="floor")
            column = torch.searchsorted(group, number).clamp_max(len(group) - 1)
            here = product & (group[column] == number)
            out[:, here] = block[:, (column * self.block + (index - self.n_first) % self.block)[here]]
        return out

    def _group(self, points: Tensor, at: Tensor) -> Tensor:
        """All columns of some geometries and directions: forces, energies, products."""
        width = len(points) * (self.block + self.energies) + len(at) * self.block
        out = self.positions.new_zeros(self.n, width)
        self._fill(out, points, at)
        return out

    def _fill(self, out: Tensor, points: Tensor, at: Tensor, lower: bool = False) -> None:
        """Columns of the forces and energies of `points` and of the products `at` into ``out``, in that order.

        With `lower`, which takes all points and products, only blocks on and below the diagonal are needed.
        """
        per_pair = len(self.permutations) * (self.size * (self.block + 2) + 4 * self.block) + 6 * self.block**2
        size = max(1, int(sqrt(TEMPORARY / per_pair)))
        n_force, n_first = len(points) * self.block, len(points) * (self.block + self.energies)
        kept: dict[tuple[bool, int], Jets] = {}
        for j in range(0, len(points), size):
            group = points[j : j + size]
            right = self._jets(group)
            force = slice(j * self.block, (j + len(group)) * self.block)
            energy = slice(n_force + j, n_force + j + len(group)) if self.energies else None
            for i in range(0 if self.energies or not lower else j, self.n_points, size):
                rows = slice(i, min(i + size, self.n_points))
                pairs = PairProducts(self._left(False, rows, kept), right)
                self._fill_of_points(out, pairs, rows, force, energy)
            for i in range(0, len(self.at), size):
                rows = slice(i, min(i + size, len(self.at)))
                pairs = PairProducts(self._left(True, rows, kept), right)
                out[self._of_products(rows), force] = _matrix(pairs.product_force())
                if energy is not None:
                    out[self._of_products(rows), energy] = pairs.product_energy().transpose(1, 2).flatten(0, 1)
        for j in range(0, len(at), size):
            right = self._product_jets(at[j : j + size])
            product = slice(n_first + j * self.block, n_first + (j + len(right)) * self.block)
            for i in range(0, 0 if lower else self.n_points, size):
                rows = slice(i, min(i + size, self.n_points))
                pairs = PairProducts(self._left(False, rows, kept), right)
                out[rows.start * self.block : rows.stop * self.block, product] = _matrix(pairs.force_product())
                if self.energies:
                    out[self.n_forces + rows.start : self.n_forces + rows.stop, product] = (
                        pairs.energy_product().flatten(1)
                    )
            for i in range(j if lower else 0, len(self.at), size):
                rows = slice(i, min(i + size, len(self.at)))
                pairs = PairProducts(self._left(True, rows, kept), right)
                out[self._of_products(rows), product] = _matrix(pairs.product_product())

    def _of_products(self, rows: slice) -> slice:
        return slice(self.n_first + rows.start * self.block, self.n_first + rows.stop * self.block)

    def _left(self, product: bool, rows: slice, kept: dict[tuple[bool, int], Jets]) -> Jets:
        """Jets of a few rows, computed once if there is room for all."""
        if (product, rows.start) in kept:
            return kept[product, rows.start]
        jets = (self._product_jets if product else self._jets)(rows, as_given=True)
        if self._left_size():
            kept[product, rows.start] = jets
        return jets

    def _fill_of_points(
        self, out: Tensor, pairs: PairProducts, rows: slice, force: slice, energy: slice | None
    ) -> None:
        """Rows of forces and energies of some geometries in columns of others."""
        of_force = slice(rows.start * self.block, rows.stop * self.block)
        out[of_force, force] = _matrix(pairs.force_force())
        if energy is not None:
            of_energy = slice(self.n_forces + rows.start, self.n_forces + rows.stop)
            out[of_energy, force] = pairs.energy_force().flatten(1)
            out[of_energy, energy] = pairs.energy_energy()
            out[of_force, energy] = pairs.force_energy().transpose(1, 2).flatten(0, 1)

    def diagonal(self) -> Tensor:
        """``(n,)`` float64."""
        out = self.positions.new_empty(self.n)
        for k in range(self.n_points):
            pairs = PairProducts(self._jets(slice(k, k + 1), as_given=True), self._jets(slice(k, k + 1)))
            out[k * self.block : (k + 1) * self.block] = pairs.force_force()[0, 0].diagonal()
            if self.energies:
                out[self.n_forces + k] = pairs.energy_energy()[0, 0]
        for k in range(len(self.at)):
            one = slice(k, k + 1)
            pairs = PairProducts(self._product_jets(one, as_given=True), self._product_jets(one))
            at = self.n_first + k * self.block
            out[at : at + self.block] = pairs.product_product()[0, 0].diagonal()
        return out


def _matrix(blocks: Tensor) -> Tensor:
    """``(i, j, m, n)`` -> ``(i m, j n)``."""
    i, j, m, n = blocks.shape
    return blocks.transpose(1, 2).reshape(i * m, j * n)


def _with_identity_first(permutations: Tensor, n_atoms: int) -> Tensor:
    if permutations.ndim != 2 or permutations.shape[1] != n_atoms or not len(permutations):
        raise ValueError(f"permutations: expected shape (S, {n_atoms}), got {tuple(permutations.shape)}")
    same = (permutations.cpu() == torch.arange(n_atoms)).all(1)
    if int(same.sum()) != 1:
        raise ValueError(f"permutations: expected the identity among them once, got {int(same.sum())} times")
    order = torch.cat([torch.nonzero(same).flatten(), torch.nonzero(~same).flatten()])
    return permutations[order.to(permutations.device)]
