"""Regression of mean forces: kernel matrices without the six motions that no descriptor feels, and normal equations.

A descriptor x(r) does not change when the whole molecule moves, so J = dx/dr has rank 3N - 6 at most. With an
orthonormal basis Q of the row space of J, every force that a model can predict is Q f, and every coefficient that has
any effect is Q a. In these coordinates the regression is the same as in all 3N, and its matrices are smaller.

Noisy labels ask for many frames, a smooth mean force for few basis functions: the subset-of-regressors approximation
(Smola, Bartlett, NIPS 2000; Quinonero-Candela, Rasmussen, J. Mach. Learn. Res. 6, 1939 (2005), sec. 5.1) keeps m of the
geometries as regressors and minimises over all frames

    |y - K_nm a|^2 + lambda a^T K_mm a

With all frames as regressors this is the full regression. Only sums over frames are needed (`NormalEquations`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openmm_gdml.descriptors import INVERSE_DISTANCES, descriptor, pair_gradients, pair_indices
from openmm_gdml.operators import matern_factors
from openmm_mlff.data.files import read_arrays, write_arrays

FORMAT = "openmm-gdml-normal-equations-2"
#: of the largest diagonal element, added to K_mm, which is singular for equal regressors; ten times more if need be
JITTER = 1e-14


@dataclass(frozen=True)
class Representation:
    """A descriptor by name with its options, and the permutations ``(S, N)`` of equal beads (a group)."""

    n_atoms: int
    name: str = INVERSE_DISTANCES
    options: tuple[tuple[str, object], ...] = ()
    permutations: tuple[tuple[int, ...], ...] = ()

    def jacobian(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x ``(n, D)`` and dx/dr ``(n, D, 3N)`` of positions ``(n, N, 3)``."""
        if self.name == INVERSE_DISTANCES:
            x, g = pair_gradients(positions)
            i, j = pair_indices(self.n_atoms)
            jacobian = positions.new_zeros(*x.shape, self.n_atoms, 3)
            pair = torch.arange(x.shape[1])
            jacobian[:, pair, i], jacobian[:, pair, j] = -g, g
            return x, jacobian.flatten(2)
        function = descriptor(self.name, dict(self.options))
        jacobian = torch.func.vmap(torch.func.jacrev(function))(positions)
        return function(positions), jacobian.flatten(2)

    def all_permutations(self) -> list[list[int]]:
        return [list(p) for p in self.permutations] or [list(range(self.n_atoms))]


@dataclass(frozen=True)
class Internal:
    """Geometries as the kernel sees them.

    Attributes:
        x: descriptors of all permuted geometries, ``(S, n, D)``.
        g: (J Q)^T of all permuted geometries, ``(S, n, r, D)``.
        q: orthonormal bases, ``(n, 3N, r)``.
    """

    x: Tensor
    g: Tensor
    q: Tensor

    @classmethod
    def of(cls, positions: Tensor, representation: Representation, permuted: bool = False) -> Internal:
        """Of positions ``(n, N, 3)`` angstrom; queries need the identity only, regressors all permutations."""
        x, jacobian = representation.jacobian(positions)
        rank = min(jacobian.shape[1], jacobian.shape[2] - 6 if representation.n_atoms > 2 else 1)
        # right singular vectors, from the eigenvectors of the smaller of J^T J and J J^T would lose digits
        q = torch.linalg.svd(jacobian, full_matrices=False).Vh[:, :rank].mT.contiguous()
        xs, gs = [x], [(jacobian @ q).mT]
        if permuted and representation.permutations:
            xs, gs = [], []
            for p in representation.all_permutations():
                x_p, jacobian_p = representation.jacobian(positions[:, p])
                # d x(r[p]) / d r
                jacobian_p = jacobian_p.unflatten(2, (-1, 3))[:, :, np.argsort(p)].flatten(2)
                xs.append(x_p)
                gs.append((jacobian_p @ q).mT)
        return cls(torch.stack(xs), torch.stack(gs).contiguous(), q)

    @property
    def rank(self) -> int:
        return self.q.shape[2]

    def __len__(self) -> int:
        return self.q.shape[0]

    def project(self, vectors: Tensor) -> Tensor:
        """``(n, N, 3)`` -> ``(n, r)`` in the bases Q."""
        return torch.einsum("nk,nkr->nr", vectors.flatten(1), self.q)

    def coefficients(self, a: Tensor) -> Tensor:
        """A_j = -J_j Q_j a_j ``(n, D)`` of a model from coefficients ``a (n r,)``."""
        return -torch.einsum("nr,nrd->nd", a.view(len(self), self.rank), self.g[0])


def kernel_matrix(a: Internal, b: Internal, sigma: float, out: Tensor | None = None) -> Tensor:
    """Covariances of the internal forces, ``(n_a r, n_b r)``; positive semi-definite if a and b are one.

    The Hessian kernel of facts: G_a [c2 - c1 u u^T] G_b^T with u = x_a - x_b, summed over the permutations of b
    (Chmiela et al., Sci. Adv. 3, e1603015 (2017); Matern, nu = 5/2).
    """
    x, g = a.x[0], a.g[0]
    n, m, r = len(a), len(b), a.rank
    total: Tensor | None = None
    for x_b, g_b in zip(b.x, b.g, strict=True):
        u = x[:, None] - x_b
        _, c1, c2 = matern_factors(u.square().sum(-1), sigma)
        left = torch.matmul(u, g.mT).transpose(1, 2)  # (n, r, m): G_a u
        right = torch.matmul(u.transpose(0, 1), g_b.mT).transpose(0, 1)  # (n, m, r): G_b u
        block = torch.matmul(g.reshape(n * r, -1), g_b.reshape(m * r, -1).T, out=out if total is None else None)
        block = block.view(n, r, m, r)
        block *= c2[:, None, :, None]
        block.addcmul_((left * c1[:, None])[..., None], right[:, None], value=-1.0)
        total = block if total is None else total.add_(block)
    assert total is not None
    return total.view(n * r, m * r)


class NormalEquations:
    """Sums over frames of the subset-of-regressors problem for one sigma; can be stopped, stored and taken up again.

    With K_mm = L L^T the columns of K_nm L^-T are functions of unit norm, and what is left is ridge regression in them.
    The sums are taken of these columns: K_nm itself has a condition number of 1e5 and more, and its square would leave
    nothing of a small lambda.

    Attributes:
        points: the regressors. gram: of the columns, weighted. moment: of the columns with the labels. frames: how many
            were added.
    """

    def __init__(self, points: Internal, sigma: float) -> None:
        n = len(points) * points.rank
        self.points, self.sigma = points, sigma
        self.gram, self.moment, self.frames = np.zeros((n, n)), np.zeros(n), 0
        self._factor = _factor(kernel_matrix(points, points, sigma))

    def add(self, frames: Internal, forces: Tensor, weights: Tensor | None = None) -> None:
        """Add frames with forces ``(n, N, 3)`` and weights ``(n,)``."""
        k, y = kernel_matrix(frames, self.points, self.sigma), frames.project(forces).flatten()
        columns = torch.linalg.solve_triangular(self._factor.T, k, upper=True, left=False)
        if weights is not None:
            root = weights.sqrt().repeat_interleave(frames.rank)
            columns, y = columns * root[:, None], y * root
        rows, labels = columns.contiguous().numpy(), y.numpy()
        # numpy recognises the product of a matrix with its own transpose and computes one triangle of it
        self.gram += rows.T @ rows
        self.moment += rows.T @ labels
        self.frames += len(frames)

    def solver(self) -> Callable[[float], Tensor]:
        """Decompose once; the result gives the coefficients ``(m r,)`` for any lambda > 0."""
        spectrum, rotation = np.linalg.eigh(self.gram)
        spectrum, moment = np.maximum(spectrum, 0.0), rotation.T @ self.moment

        def solve(lam: float) -> Tensor:
            b = torch.from_numpy(rotation @ (moment / (spectrum + lam)))
            return torch.linalg.solve_triangular(self._factor.T, b[:, None], upper=True)[:, 0]

        return solve

    def save(self, path: Path, fingerprint: str) -> None:
        """Store the sums; `fingerprint` says of which data and settings."""
        header = {"fingerprint": fingerprint, "frames": self.frames}
        write_arrays(path, FORMAT, {"gram": self.gram, "moment": self.moment}, header)

    def load(self, path: Path, fingerprint: str) -> bool:
        """Take up stored sums; False if there are none. Raises `ValueError` if they are of other data or settings."""
        if not path.is_file():
            return False
        header, tensors = read_arrays(path, FORMAT, "sums over frames")
        if header["fingerprint"] != fingerprint:
            raise ValueError(f"folder: {path.name} belongs to other frames or settings; choose another folder")
        self.gram, self.moment = tensors["gram"], tensors["moment"]
        self.frames = int(header["frames"])
        return True


def _factor(k: Tensor) -> Tensor:
    """Lower Cholesky factor of K_mm with the least jitter that it takes."""
    jitter = JITTER * float(k.diagonal().max())
    while True:
        k.diagonal().add_(jitter)
        factor, info = torch.linalg.cholesky_ex(k)
        if int(info) == 0:
            return factor
        jitter *= 10.0


def batch_size(points: int, rank: int, memory: int) -> int:
    """Frames at a time, so that K_nm and its factors fit into `memory` bytes beside the normal equations.

    Raises `ValueError` saying how much is needed.
    """
    # the sums, one product, the factor, and what the solver decomposes
    fixed = 8 * 6 * (points * rank) ** 2
    per_frame = 8 * (3 * rank * points * rank + 60 * points)
    if fixed + per_frame > memory:
        raise ValueError(
            f"memory: expected at least {(fixed + per_frame) / 1e9:.3g} GB for {points} regressors, got "
            f"{memory / 1e9:.3g} GB; lower n_inducing or raise memory"
        )
    return max(1, min(512, (memory - fixed) // per_frame))


def exact(
    points: Internal, forces: Tensor, sigma: float, lams: Sequence[float], memory: int
) -> list[tuple[float, Tensor]]:
    """The full regression, all points being regressors: coefficients ``(n r,)`` for each lambda, by Cholesky.

    Args:
        forces: ``(n, N, 3)``. memory: bytes for the matrix and its factor.

    A lambda for which the matrix is not positive definite is left out; `ValueError` naming the most similar points if
    that leaves none, or if the memory is too small.
    """
    n = len(points) * points.rank
    needed = 16 * n * n
    if needed > memory:
        raise ValueError(
            f"memory: expected at least {needed / 1e9:.3g} GB for {len(points)} geometries, got {memory / 1e9:.3g} GB"
        )
    k, y = kernel_matrix(points, points, sigma), points.project(forces).flatten()
    diagonal = k.diagonal().clone()
    found = []
    for lam in lams:
        k.diagonal().copy_(diagonal + lam)
        factor, info = torch.linalg.cholesky_ex(k)
        if int(info) == 0:
            found.append((lam, torch.cholesky_solve(y[:, None], factor)[:, 0]))
    if not found:
        x = points.x[0]
        distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
        i, j = divmod(int(distance.argmin()), len(x))
        raise ValueError(
            f"lam: the kernel matrix with lam up to {max(lams):g} is not positive definite; geometries {i} and {j} are "
            f"the most similar ({float(distance.min()):.3g} apart in the descriptor). Remove duplicates, or choose a "
            "larger lam or a smaller sigma"
        )
    return found
