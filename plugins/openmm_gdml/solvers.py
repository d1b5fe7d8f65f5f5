"""(K + lambda 1) alpha = y: a direct solution where the matrix fits into memory, an iterative one where it does not.

``cholesky`` assembles K and factorises it in place: ``8 n^2`` bytes, ``n^3 / 3`` operations. ``cg`` never makes the
matrix: conjugate gradients (Hestenes and Stiefel 1952), preconditioned by m columns of K (see `preconditioners`).
``eigen`` diagonalises K: one decomposition serves every lambda, in three times the memory. All work in float64, as the
condition number of K + lambda 1 reaches 1e12.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from openmm_gdml import conjugate_gradients, preconditioners
from openmm_gdml.operators import Operator, as_tensor

METHODS = ("auto", "cholesky", "cg", "eigen")
#: columns of one panel of the factorisation.
PANEL = 512
#: share of the matrix's order that is used as inducing columns if nothing else is asked for.
DEFAULT_COLUMNS = 0.25

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Solution:
    """Coefficients and how they were found.

    Attributes:
        alpha: ``(n,)``. residual: ``|y - (K + lam) alpha| / |y|`` at the end, computed anew.
        iterations, n_columns: of conjugate gradients. history: relative residual after every iteration.
        restarts: how often the preconditioner was enlarged. memory: bytes that the plan counted on.
    """

    alpha: Tensor
    method: str
    lam: float
    residual: float
    converged: bool = True
    iterations: int = 0
    n_columns: int = 0
    restarts: int = 0
    history: list[float] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0


class NotPositiveDefinite(ValueError):
    """K + lambda 1 has no Cholesky factor; the message says which geometries are to blame."""


def parse_memory(memory: int | float | str | None) -> int:
    """Bytes of ``"4 GB"``, ``"500 MB"``, a number of bytes, or (None) half of what the machine has free.

    Raises `ValueError` for anything else.
    """
    if memory is None:
        return _free_memory() // 2
    if isinstance(memory, (int, float)) and not isinstance(memory, bool):
        number = float(memory)
    else:
        text = str(memory).strip().upper().removesuffix("B")
        scale = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:], 1.0)
        try:
            number = float(text[:-1] if scale != 1.0 else text) * scale
        except ValueError:
            number = -1.0
    if not 0 < number < float("inf"):
        raise ValueError(f"memory: expected a number of bytes or a text such as '4 GB', got {memory!r}")
    return int(number)


def _free_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 * 10**9


@contextmanager
def progress_bar(title: str, shown: bool = True) -> Iterator[Progress | None]:
    """A `Progress` that draws a bar of steps, or the residual where their number is unknown; None if not shown."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None, state="")

        def show(step: int, steps: int, residual: float) -> None:
            state = f"{step} of {steps}" if steps else f"iteration {step}"
            state += f", residual {residual:.1e}" if residual == residual else ""
            bars.update(task, completed=step, total=steps or None, state=state)

        yield show


def cholesky_memory(operator: Operator) -> int:
    """Bytes of the direct solution."""
    return 8 * (operator.n**2 + 2 * operator.n * PANEL) + operator.working_memory


def cg_memory(operator: Operator, m: int) -> int:
    """Bytes of conjugate gradients with m inducing columns."""
    return 8 * (operator.n * (m + 12) + 3 * m * m) + operator.working_memory


def eigen_memory(operator: Operator) -> int:
    """Bytes of a full diagonalisation."""
    return 8 * 4 * operator.n**2 + operator.working_memory


def most_columns(operator: Operator, memory: int) -> int:
    """How many inducing columns fit into so many bytes; 0 if none."""
    low, high = 0, operator.n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cg_memory(operator, middle) <= memory else (low, middle - 1)
    return low


def solve(
    operator: Operator,
    y: Tensor,
    method: str = "auto",
    lam: float = 1e-10,
    *,
    preconditioner: str = "leverage",
    columns: int | float | None = None,
    enlarge: bool = True,
    memory: int | float | str | None = None,
    tolerance: float = 1e-4,
    max_iterations: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 120.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Solution:
    """Solve ``(K + lam 1) alpha = y``.

    Args:
        operator: K. y: ``(n,)`` float64.
        method: ``cholesky``, ``cg``, ``eigen``; ``auto`` is ``cholesky`` if it fits into `memory`, else ``cg``.
        lam: regularisation, positive.
        preconditioner: how ``cg`` chooses inducing columns (`preconditioners.CHOICES`).
        columns: how many, or which fraction of n; default a quarter of n, or what fits into `memory`.
        enlarge: let ``cg`` take more columns, as far as `memory` goes, where it hardly gets on.
        memory: limit in bytes, or a text such as "4 GB"; default half of the free memory.
        tolerance: of ``cg``, ``|residual| / |y|``.
        max_iterations: of ``cg``; default 10,000.
        checkpoint: file that ``cg`` writes every `checkpoint_seconds` and goes on from if it is there.
        seed: of random columns.
        progress: called with (step, steps, relative residual) after every iteration or panel; steps is 0 if unknown,
            the residual NaN where there is none.

    Raises `ValueError` naming the argument, `MemoryError` with the bytes needed, `NotPositiveDefinite`, and
    `ArithmeticError` if the residual is no number any more. A ``cg`` that stops at `max_iterations` comes back with
    ``converged=False``.
    """
    started = time.perf_counter()
    y = as_tensor(y)
    if y.shape != (operator.n,) or not bool(torch.isfinite(y).all()) or not bool(y.any()):
        raise ValueError(f"y: expected {operator.n} finite numbers, not all zero, got shape {tuple(y.shape)}")
    if not lam > 0:
        raise ValueError(f"lam: expected a positive number, got {lam}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a number between 0 and 1, got {tolerance}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    limit = parse_memory(memory)
    if method == "auto":
        method = "cholesky" if cholesky_memory(operator) <= limit else "cg"
    if method == "cg":
        m = _planned_columns(operator, columns, preconditioner, limit)
        found = conjugate_gradients.run(
            operator,
            y,
            lam,
            preconditioner,
            m,
            most_columns(operator, limit) if enlarge else m,
            tolerance,
            10_000 if max_iterations is None else max_iterations,
            None if checkpoint is None else Path(checkpoint),
            checkpoint_seconds,
            seed,
            progress,
        )
        return Solution(
            found.x,
            "cg",
            lam,
            found.residual,
            found.residual <= tolerance,
            found.iteration,
            found.m,
            found.restarts,
            found.history,
            time.perf_counter() - started,
            cg_memory(operator, found.m),
        )
    needed = cholesky_memory(operator) if method == "cholesky" else eigen_memory(operator)
    _check_memory(needed, limit, method)
    alpha = _direct(operator, y, lam, progress) if method == "cholesky" else eigen(operator)(y, lam)
    residual = float((y - operator.matvec(alpha) - lam * alpha).norm() / y.norm())
    return Solution(alpha, method, lam, residual, seconds=time.perf_counter() - started, memory=needed)


def _planned_columns(operator: Operator, columns: int | float | None, choice: str, limit: int) -> int:
    if choice not in preconditioners.CHOICES:
        raise ValueError(f"preconditioner: expected one of {', '.join(preconditioners.CHOICES)}, got {choice!r}")
    possible = most_columns(operator, limit)
    if choice == "eigen":
        _check_memory(eigen_memory(operator), limit, "a preconditioner from all eigenvectors")
    if columns is None:
        least = max(operator.block, operator.n // 100)
        if possible < least:
            _check_memory(cg_memory(operator, least), limit, f"cg with {least} inducing columns")
        return min(possible, max(least, round(DEFAULT_COLUMNS * operator.n)))
    fraction = isinstance(columns, float) and columns <= 1
    m = round(columns * operator.n) if fraction else int(columns)
    if not 1 <= m <= operator.n:
        raise ValueError(f"columns: expected 1 to {operator.n}, or a fraction of them, got {columns}")
    _check_memory(cg_memory(operator, m), limit, f"cg with {m} inducing columns")
    return m


def _check_memory(needed: int, limit: int, what: str) -> None:
    if needed > limit:
        raise MemoryError(f"memory: {what} needs {needed / 1e9:.2f} GB, the limit is {limit / 1e9:.2f} GB")


def cholesky_in_place(k: Tensor, progress: Progress | None = None) -> int:
    """Overwrite the lower triangle of ``k (n, n)`` with its Cholesky factor, panel by panel.

    Returns the row at which a pivot is not positive, or -1 if all are.
    """
    n = len(k)
    for i in range(0, n, PANEL):
        j = min(i + PANEL, n)
        if i:
            k[i:, i:j].addmm_(k[i:, :i], k[i:j, :i].T, alpha=-1.0)
        lower, info = torch.linalg.cholesky_ex(k[i:j, i:j])
        if int(info):
            return i + int(info) - 1
        k[i:j, i:j] = lower
        if j < n:
            k[j:, i:j] = torch.linalg.solve_triangular(lower.T, k[j:, i:j], upper=True, left=False)
        if progress is not None:
            progress(j, n, float("nan"))
    return -1


def cholesky_solve_in_place(lower: Tensor, y: Tensor) -> Tensor:
    """Solve ``lower lower^T x = y`` for ``y (n,)``, which is overwritten and returned."""
    n = len(lower)
    starts = range(0, n, PANEL)
    for i in starts:
        j = min(i + PANEL, n)
        y[i:j] -= lower[i:j, :i] @ y[:i]
        y[i:j] = torch.linalg.solve_triangular(lower[i:j, i:j], y[i:j, None], upper=False)[:, 0]
    for i in reversed(starts):
        j = min(i + PANEL, n)
        y[i:j] -= lower[j:, i:j].T @ y[j:]
        y[i:j] = torch.linalg.solve_triangular(lower[i:j, i:j].T, y[i:j, None], upper=True)[:, 0]
    return y


def _direct(operator: Operator, y: Tensor, lam: float, progress: Progress | None) -> Tensor:
    k = operator.dense()
    k.diagonal().add_(lam)
    failed = cholesky_in_place(k, progress)
    if failed >= 0:
        del k
        raise NotPositiveDefinite(_blame(operator, failed, lam))
    return cholesky_solve_in_place(k, y.clone())


def _blame(operator: Operator, row: int, lam: float) -> str:
    """Which geometries make the matrix numerically singular: that of the failed pivot, and the one most like it."""
    start = operator.point(row) * operator.block
    own = torch.arange(start, start + operator.block)
    blocks = operator.columns(own)[: operator.n_points * operator.block]
    overlap = blocks.view(operator.n_points, -1).norm(dim=1)
    norms = torch.stack([_block_norm(operator, p) for p in range(operator.n_points)])
    likeness = overlap / (norms * norms[operator.point(row)]).sqrt()
    likeness[operator.point(row)] = -1.0
    other = int(likeness.argmax())
    return (
        f"lam: the kernel matrix with lam = {lam:g} is not positive definite at geometry {operator.point(row)}; the "
        f"geometry most like it is {other} (likeness {float(likeness[other]):.9f}, 1 means equal). Remove duplicates, "
        "or choose a larger lam or a smaller sigma"
    )


def _block_norm(operator: Operator, point: int) -> Tensor:
    own = torch.arange(point * operator.block, (point + 1) * operator.block)
    return operator.columns(own)[own].norm()


def eigen(operator: Operator) -> Callable[[Tensor, float], Tensor]:
    """Diagonalise K once; the result solves for any ``(y, lam)``."""
    values, vectors = torch.linalg.eigh(operator.dense())
    values = values.clamp_min(0.0)

    def solve_for(y: Tensor, lam: float) -> Tensor:
        return vectors @ ((vectors.T @ y) / (values + lam))

    return solve_for
