"""What a run notes beside its physics: progress of the minimiser, degrees of freedom, versions of the programs."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import openmm

import openmm_mlff
from openmm_mlff.sampling import guards


class MinimizationProgress(openmm.MinimizationReporter):
    """Stops the minimiser on a signal, and says where it is."""

    def __init__(self, stop: guards.StopRequest, limit: int, say: Callable[[str], None] | None) -> None:
        super().__init__()
        self._stop, self._limit, self._say = stop, limit, say
        self._last = time.monotonic()
        self._text = ""

    def report(self, iteration: int, x: Any, grad: Any, args: Mapping[str, float]) -> bool:
        self._text = (
            f"minimize: {iteration + 1} of at most {self._limit} iterations, {args['system energy']:.1f} kJ/mol"
        )
        if time.monotonic() - self._last > 10.0:
            self._last = time.monotonic()
            self.done()
        return bool(self._stop)

    def done(self) -> None:
        if self._say is not None and self._text:
            self._say(self._text)


def degrees_of_freedom(system: openmm.System) -> int:
    """3 per massive particle, less constraints and, with a `CMMotionRemover`, the motion of the whole; at least 1."""
    massive = [system.getParticleMass(i)._value > 0 for i in range(system.getNumParticles())]
    constraints = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
    held = sum(massive[a] or massive[b] for a, b, _ in constraints)
    drift = 3 if any(isinstance(f, openmm.CMMotionRemover) for f in system.getForces()) else 0
    return max(1, 3 * sum(massive) - held - drift)


def programs() -> dict[str, str]:
    """Versions of everything that decides the bits of a run, and the kind of machine."""
    names = ("openmm", "openmmml", "torch", "numpy")
    return {
        "openmm-mlff": openmm_mlff.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    } | {name: version(name) for name in names}
