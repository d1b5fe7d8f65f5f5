"""Evaluators timed in turn: what the benchmarks of single models and of ensembles share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from _common import summary

from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.potential import Potential

#: residues of a peptide (see `_common.peptide`) by its number of atoms
RESIDUES = {3: 0, 22: 1, 62: 5, 152: 14}
FRAMES = 10


@dataclass
class Times:
    """Seconds by kind of code, one number for each round: while the thread was running, and as a clock shows them."""

    cpu: dict[str, list[float]] = field(default_factory=dict)
    wall: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, call: Callable[[], object], parts: int) -> None:
        """Time one call, as so many seconds for each of its parts."""
        clock, thread = time.perf_counter(), time.thread_time()
        call()
        self.cpu.setdefault(name, []).append((time.thread_time() - thread) / parts)
        self.wall.setdefault(name, []).append((time.perf_counter() - clock) / parts)

    def summary(self, name: str) -> dict[str, dict[str, float]]:
        return {"cpu": summary(self.cpu[name]), "wall": summary(self.wall[name])}

    def ratio(self, slow: str, fast: str, clock: str = "cpu") -> float:
        """Median over rounds of the time of one kind over that of another."""
        seconds = getattr(self, clock)
        return round(float(np.median(np.array(seconds[slow]) / np.array(seconds[fast]))), 2)


def in_turn(kinds: Mapping[str, Evaluator], frames: Sequence[np.ndarray], rounds: int) -> Times:
    """Seconds per evaluation of the same geometries, by all kinds in every round."""
    times = Times()
    for _ in range(rounds):
        for name, evaluator in kinds.items():
            # after another kind has run, memory has to be fetched again
            evaluator.arrays(frames[0])
            times.add(name, partial(_every, evaluator, frames), len(frames))
    return times


def _every(evaluator: Evaluator, frames: Sequence[np.ndarray]) -> None:
    for positions in frames:
        evaluator.arrays(positions)


def randomised(model: Potential) -> Potential:
    """All weights random, in single precision; but not the raw numbers of the repulsion."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "raw" not in name:
                width = 0.1 / max(1.0, parameter.shape[-1] ** 0.5 if parameter.dim() else 1.0)
                parameter.add_(width * torch.randn_like(parameter))
    return model.float().eval().requires_grad_(False)
