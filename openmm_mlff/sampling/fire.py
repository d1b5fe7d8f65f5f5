"""The FIRE minimiser for many molecules at once, each with a step and velocities of its own.

E. Bitzek, P. Koskinen, F. Gaehler, M. Moseler, P. Gumbsch, Phys. Rev. Lett. 97, 170201 (2006).
"""

from __future__ import annotations

import numpy as np

#: amu; all particles alike, so that bonds to hydrogen allow the same step as others
MASS = 12.0
#: ps; the largest is still stable for a triple bond between particles of this mass
FIRST_STEP, LARGEST_STEP = 0.001, 0.005
#: nm; no particle moves farther in one iteration
LARGEST_MOVE = 0.01
#: of the paper: downhill iterations before the step grows, factors of growth and decline, mixing and its decline
PATIENCE, GROWTH, DECLINE, MIXING, MIXING_DECLINE = 5, 1.1, 0.5, 0.1, 0.99


class Fire:
    """``move = fire.step(forces, moving)`` until ``fire.rms(forces)`` is small.

    Args:
        offsets: where each molecule begins among the particles, ``(n + 1,)``. mobile: which particles move.
    """

    def __init__(self, offsets: np.ndarray, mobile: np.ndarray) -> None:
        n, sizes = len(offsets) - 1, np.diff(offsets)
        self._starts, self._segment = offsets[:-1], np.repeat(np.arange(n), sizes)
        self._mobile = mobile[:, None]
        self._count = np.maximum(self._sums(mobile.astype(np.float64)), 1.0)
        self._velocities = np.zeros((len(mobile), 3))
        self._dt, self._mixing, self._downhill = np.full(n, FIRST_STEP), np.full(n, MIXING), np.zeros(n, dtype=int)

    def rms(self, forces: np.ndarray) -> np.ndarray:
        """Root-mean-square length of the forces ``(n_particles, 3)`` of each molecule, ``(n,)``."""
        return np.sqrt(self._sums(np.square(forces * self._mobile).sum(axis=1)) / self._count)

    def step(self, forces: np.ndarray, moving: np.ndarray) -> np.ndarray:
        """Displacements ``(n_particles, 3)`` nm along forces in kJ/mol/nm; zero for molecules that are not `moving`."""
        forces = forces * self._mobile * moving[self._segment, None]
        v = self._velocities
        power = self._sums((forces * v).sum(axis=1))
        uphill = power < 0.0
        self._downhill = np.where(uphill, 0, self._downhill + 1)
        faster = self._downhill > PATIENCE
        self._dt = np.where(faster, np.minimum(self._dt * GROWTH, LARGEST_STEP), self._dt) * np.where(
            uphill, DECLINE, 1.0
        )
        self._mixing = np.where(uphill, MIXING, np.where(faster, self._mixing * MIXING_DECLINE, self._mixing))
        speed, pull = (np.sqrt(self._sums(np.square(x).sum(axis=1))) for x in (v, forces))
        turned = (self._mixing * speed / np.maximum(pull, 1e-30))[self._segment, None] * forces
        v = np.where(uphill[self._segment, None], 0.0, (1.0 - self._mixing)[self._segment, None] * v + turned)
        dt = self._dt[self._segment, None]
        v = (v + dt * forces / MASS) * moving[self._segment, None]
        move = dt * v
        longest = np.maximum.reduceat(np.sqrt(np.square(move).sum(axis=1)), self._starts)
        shrink = np.minimum(1.0, LARGEST_MOVE / np.maximum(longest, 1e-30))[self._segment, None]
        self._velocities = v * shrink
        return move * shrink

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self._starts)
