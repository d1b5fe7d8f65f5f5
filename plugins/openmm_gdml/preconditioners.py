"""Low-rank preconditioners of K + lambda 1, and the choices of the columns that they are made from.

From m columns of K the Nystroem approximation is K~ = K_nm K_mm^-1 K_mn = B0^T B0 with K_mm = L L^T, B0 = L^-1 K_mn.
With inner = B0 B0^T + lambda 1 = U U^T and B = U^-1 B0, Woodbury's identity gives

    (K~ + lambda 1)^-1 v = (v - B^T B v) / lambda

(Chmiela et al., J. Chem. Theory Comput. 19, 4619 (2023), arXiv:2212.12737.) The better K~ catches the large eigenvalues
of K, the fewer iterations conjugate gradients need. Columns are single Cartesian components, chosen

* ``uniform``: at random;
* ``leverage``: at random, with probabilities from approximate ridge leverage scores;
* ``cholesky``: by pivoted incomplete Cholesky factorisation, always the component that the columns so far describe
  worst, which gives B0 itself;
* ``eigen``: not columns but the m largest eigenpairs, the best approximation of rank m; needs the whole matrix, for
  comparison only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_gdml.operators import Operator

CHOICES = ("uniform", "leverage", "cholesky", "eigen")
#: rows that are transformed at a time.
ROWS = 4096
#: candidates of one block of the pivoted factorisation.
CANDIDATES = 96


@dataclass(frozen=True)
class LowRank:
    """``(K~ + lam 1)^-1`` as above.

    Attributes:
        factor: B^T, ``(n, m)``. columns: which columns of K it is made from, ``(m,)`` int64 (empty for ``eigen``).
    """

    factor: Tensor
    lam: float
    columns: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """``(n,) -> (n,)``."""
        return (v - self.factor @ (self.factor.T @ v)) / self.lam

    def leverage(self) -> Tensor:
        """Approximate ridge leverage scores, ``diag(K~ (K~ + lam 1)^-1)``, ``(n,)``."""
        return (self.factor * self.factor).sum(1)


def build(operator: Operator, m: int, choice: str, lam: float, seed: int = 0, columns: Tensor | None = None) -> LowRank:
    """A preconditioner of rank m.

    Args:
        choice: one of `CHOICES`.
        seed: of random choices.
        columns: take these instead of choosing (to build a preconditioner again).

    Raises `ValueError` for another choice, or m beyond the order of the matrix.
    """
    if choice not in CHOICES:
        raise ValueError(f"preconditioner: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if not 1 <= m <= operator.n:
        raise ValueError(f"columns: expected 1 to {operator.n}, got {m}")
    if choice == "eigen":
        return _eigen(operator, m, lam)
    if columns is not None:
        return nystroem(operator, columns, lam)
    generator = torch.Generator().manual_seed(seed)
    if choice == "cholesky":
        factor, pivots = incomplete_cholesky(operator, m)
        return LowRank(_against(factor, lam), lam, pivots)
    chosen = torch.randperm(operator.n, generator=generator)[:m]
    if choice == "leverage":
        first = nystroem(operator, chosen[: min(m, 10 * operator.block)].sort().values, lam)
        scores = first.leverage().cpu()
        del first
        chosen = torch.multinomial(scores.clamp_min(1e-12), m, replacement=False, generator=generator)
    return nystroem(operator, chosen.sort().values, lam)


def nystroem(operator: Operator, columns: Tensor, lam: float) -> LowRank:
    """The preconditioner of given columns, ``(m,)`` int64; uses ``8 (n m + 3 m^2)`` bytes."""
    factor = operator.columns(columns)
    lower = shifted_cholesky(factor[columns.to(factor.device)])
    _solve_rows(factor, lower)
    return LowRank(_against(factor, lam), lam, columns)


def _against(factor: Tensor, lam: float) -> Tensor:
    """B0^T -> B^T, in place."""
    inner = factor.T @ factor
    inner.diagonal().add_(lam)
    _solve_rows(factor, shifted_cholesky(inner))
    return factor


def shifted_cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor of a matrix that rounding may have made indefinite: shifted as little as needed.

    Raises `ArithmeticError` for a matrix that is far from positive definite, or not finite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    scale = float(matrix.diagonal().mean())
    shift = torch.finfo(matrix.dtype).eps * scale
    while int(info):
        if not shift < 1e-3 * scale:
            raise ArithmeticError("the kernel matrix of the chosen columns is not positive semi-definite")
        shifted = matrix.clone()
        shifted.diagonal().add_(shift)
        lower, info = torch.linalg.cholesky_ex(shifted)
        shift *= 10
    return lower


def _solve_rows(factor: Tensor, lower: Tensor) -> None:
    """``factor @ lower^-T`` in place, some rows at a time."""
    for i in range(0, len(factor), ROWS):
        rows = factor[i : i + ROWS]
        rows.copy_(torch.linalg.solve_triangular(lower.T, rows, upper=True, left=False))


def incomplete_cholesky(
    operator: Operator, m: int, on_step: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """m steps of the pivoted Cholesky factorisation of K.

    Candidates are brought up to date in blocks; inside a block the largest is taken as long as it exceeds what the
    diagonal outside can still be, so that the pivots are (within a factor of two) those of the greedy rule.

    Returns the factor ``(n, m)`` with K ~ factor factor^T, and the pivots ``(m,)``; fewer than m columns where the rest
    of K is zero to rounding.
    """
    diagonal = operator.diagonal().clone()
    factor = diagonal.new_zeros(operator.n, m)
    smallest = 4 * torch.finfo(diagonal.dtype).eps * float(diagonal.max())
    pivots: list[int] = []
    while len(pivots) < m:
        k = len(pivots)
        candidates = torch.topk(diagonal, min(CANDIDATES, operator.n)).indices
        outside = diagonal.clone()
        outside[candidates] = 0.0
        bound = max(float(outside.max()) / 2, smallest)
        block = operator.columns(candidates.cpu())
        block -= factor[:, :k] @ factor[candidates, :k].T
        taken = _eliminate(block, candidates, bound, m - k)
        if not taken:
            if float(diagonal[candidates].max()) <= smallest:
                break
            # rounding left the stored diagonal too large
            diagonal[candidates] = block[candidates, torch.arange(len(candidates))].clamp_min(0.0)
            continue
        new = block[:, taken]
        factor[:, k : k + len(taken)] = new
        diagonal = (diagonal - (new * new).sum(1)).clamp_min(0.0)
        chosen = candidates[torch.tensor(taken)]
        diagonal[chosen] = 0.0
        pivots += chosen.tolist()
        if on_step is not None:
            on_step(len(pivots))
    return factor[:, : len(pivots)], torch.tensor(pivots, dtype=torch.int64)


def _eliminate(block: Tensor, candidates: Tensor, bound: float, most: int) -> list[int]:
    """Turn columns of the Schur complement into columns of the factor, in place, largest pivot first.

    Works on the small square of the candidates' own rows, then on all rows by one triangular solve. Returns the
    columns in the order of their elimination.
    """
    square = block[candidates].clone()
    taken: list[int] = []
    left = torch.ones(len(candidates), dtype=torch.bool)
    while len(taken) < most and bool(left.any()):
        values = torch.where(left, square.diagonal(), -torch.inf)
        best = int(values.argmax())
        if float(values[best]) < bound:
            break
        taken.append(best)
        left[best] = False
        column = square[:, best] / square[best, best].sqrt()
        square -= torch.outer(column, column)
    if taken:
        chosen = torch.tensor(taken)
        lower = shifted_cholesky(block[candidates[chosen]][:, chosen])
        block[:, chosen] = torch.linalg.solve_triangular(lower.T, block[:, chosen], upper=True, left=False)
    return taken


def _eigen(operator: Operator, m: int, lam: float) -> LowRank:
    values, vectors = torch.linalg.eigh(operator.dense())
    kept = values[-m:].clamp_min(0.0)
    factor = vectors[:, -m:] * (kept / (kept + lam)).sqrt()
    return LowRank(factor, lam, torch.empty(0, dtype=torch.int64))
