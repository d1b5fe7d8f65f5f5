"""Preconditioned conjugate gradients with a state that is written to disk and gone on from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from openmm_gdml import preconditioners
from openmm_gdml.operators import Operator
from openmm_mlff.data.files import write_atomically

#: iterations after which progress is judged; too little of it enlarges the preconditioner.
WINDOW = 100
#: the residual has to fall to this fraction within a window.
ENOUGH = 0.5
#: factor by which the preconditioner grows, and how often it may.
GROWTH, MOST_RESTARTS = 1.5, 6


@dataclass
class State:
    """Everything that the next iteration depends on.

    Attributes:
        x: solution so far, ``(n,)``. r: residual ``y - (K + lam) x``. p: search direction. z: preconditioned residual.
        rho: r.z. m: inducing columns, `columns` which ones. iteration: all so far; `since`: since the last start,
            zero where the search has to start anew from r.
        residual: true relative residual at the last check. history: relative residual after every iteration.
    """

    x: Tensor
    r: Tensor
    p: Tensor
    z: Tensor
    m: int
    columns: Tensor
    rho: float = 0.0
    iteration: int = 0
    since: int = 0
    restarts: int = 0
    residual: float = 1.0
    history: list[float] = field(default_factory=list)

    @classmethod
    def first(cls, y: Tensor, m: int) -> State:
        """Where the iterations begin: at x = 0."""
        zero = torch.zeros_like(y)
        return cls(zero.clone(), y.clone(), zero.clone(), zero.clone(), m, torch.empty(0, dtype=torch.int64))


def run(
    operator: Operator,
    y: Tensor,
    lam: float,
    choice: str,
    m: int,
    most: int,
    tolerance: float,
    max_iterations: int,
    checkpoint: Path | None,
    checkpoint_seconds: float,
    seed: int,
    progress: Callable[[int, int, float], None] | None,
) -> State:
    """Iterate until ``|y - (K + lam) x| <= tolerance |y|`` or `max_iterations`; see `solvers.solve`.

    Args:
        m, most: inducing columns at first, and how many there may be later.

    Raises `ArithmeticError` if the residual is no number any more (the checkpoint keeps the state before), `ValueError`
    if the checkpoint belongs to another problem.
    """
    problem = _fingerprint(operator, y, lam, choice, seed)
    state = None if checkpoint is None else read_checkpoint(checkpoint, problem)
    state = state or State.first(y, m)
    saved = time.monotonic()
    norm = float(y.norm()) or 1.0

    def write() -> None:
        if checkpoint is not None:
            write_checkpoint(checkpoint, state, problem)

    inverse = None
    while state.residual > tolerance and state.iteration < max_iterations:
        if inverse is None:
            known = state.columns if len(state.columns) else None
            inverse = preconditioners.build(operator, state.m, choice, lam, seed + state.restarts, known)
        if state.since == 0:
            state.columns = inverse.columns
            _start(state, inverse)
            write()
        while state.iteration < max_iterations:
            _step(state, operator, inverse, lam, norm)
            if not state.history[-1] < float("inf"):
                raise ArithmeticError(f"the residual became {state.history[-1]} at iteration {state.iteration}")
            if progress is not None:
                progress(state.iteration, 0, state.history[-1])
            if state.history[-1] <= tolerance or _stalled(state, most, operator.n):
                break
            if time.monotonic() - saved > checkpoint_seconds:
                write()
                saved = time.monotonic()
        # the residual of the recurrence drifts away from the true one
        state.r = y - operator.matvec(state.x) - lam * state.x
        state.residual = float(state.r.norm()) / norm
        if state.residual > tolerance and state.history[-1] > tolerance and state.iteration < max_iterations:
            state.m = min(most, int(GROWTH * state.m) + 1, operator.n)
            state.columns = torch.empty(0, dtype=torch.int64)
            state.restarts += 1
            inverse = None
        state.since = 0
        write()
    return state


def _start(state: State, inverse: preconditioners.LowRank) -> None:
    state.z = inverse.apply(state.r)
    state.p = state.z.clone()
    state.rho = float(state.r @ state.z)


def _step(state: State, operator: Operator, inverse: preconditioners.LowRank, lam: float, norm: float) -> None:
    """One iteration; Polak and Ribiere's beta forgives a preconditioner that rounding makes inexact."""
    q = operator.matvec(state.p) + lam * state.p
    step = state.rho / float(state.p @ q)
    state.x += step * state.p
    before = state.r
    state.r = before - step * q
    state.z = inverse.apply(state.r)
    rho = float(state.r @ state.z)
    beta = max(0.0, (rho - float(before @ state.z)) / state.rho)
    state.p = state.z + beta * state.p
    state.rho = rho
    state.iteration += 1
    state.since += 1
    state.history.append(float(state.r.norm()) / norm)


def _stalled(state: State, most: int, n: int) -> bool:
    if state.since < 2 * WINDOW or state.since % WINDOW or state.restarts >= MOST_RESTARTS:
        return False
    if state.m >= min(most, n // 2):
        return False
    now, before = state.history[-WINDOW:], state.history[-2 * WINDOW : -WINDOW]
    return min(now) > ENOUGH * min(before)


def _fingerprint(operator: Operator, y: Tensor, lam: float, choice: str, seed: int) -> str:
    """Tells one linear problem from another: its right-hand side, some of its matrix, and the settings."""
    probe = operator.columns(torch.tensor([0, operator.n - 1]))
    digest = hashlib.sha256(y.cpu().numpy().tobytes() + probe.cpu().numpy().round(9).tobytes())
    digest.update(json.dumps([operator.n, lam, choice, seed]).encode())
    return digest.hexdigest()


def write_checkpoint(path: Path, state: State, problem: str) -> None:
    """Write the state; it appears at `path` only when it is complete."""
    numbers = {k: getattr(state, k) for k in ("m", "rho", "iteration", "since", "restarts", "residual", "history")}
    tensors = {k: getattr(state, k).contiguous().cpu() for k in ("x", "r", "p", "z", "columns")}
    write_atomically(path, save(tensors, {"problem": problem, "state": json.dumps(numbers)}))


def read_checkpoint(path: Path, problem: str) -> State | None:
    """The state in a checkpoint, or None if there is no file. Raises `ValueError` if it is of another problem."""
    if not path.exists():
        return None
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if header["problem"] != problem:
        raise ValueError(f"checkpoint: {path} belongs to other data or settings; choose another file or remove it")
    state: dict[str, Any] = {**load(content), **json.loads(header["state"])}
    return State(**state)
