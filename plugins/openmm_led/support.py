"""Where the training data were in latent space: how far a point is from them, and whether it is among them at all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

#: neighbours whose distance tells how well the training data support a latent point
NEIGHBOURS = 5
#: up to this dimension all cells around an occupied one count as occupied; above it those that share a face
_ALL_AROUND = 4
_WIDTHS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6)


@dataclass(frozen=True, eq=False)
class Support:
    """The training data in latent space.

    Attributes:
        points: ``(m, latent_dim)``. distance: to the `NEIGHBOURS`-th nearest point; the largest one of any validation
            frame. spread: of the members' predictions, likewise; infinite with one member.
        width: of the cells that `inside` looks at.
    """

    points: np.ndarray
    distance: float
    spread: float
    width: float

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(self.points)

    def far(self, z: np.ndarray) -> np.ndarray:
        """Distance to the `NEIGHBOURS`-th nearest point, ``(n,)``."""
        return self._tree.query(z, k=NEIGHBOURS)[0][:, -1]

    @cached_property
    def _cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Lowest cell, number of cells and stride per dimension, and the sorted numbers of the occupied cells."""
        d = self.points.shape[1]
        cells = np.unique(np.floor(self.points / self.width).astype(np.int64), axis=0)
        if d <= _ALL_AROUND:
            around = np.array(list(itertools.product((-1, 0, 1), repeat=d)))
        else:
            around = np.concatenate([np.zeros((1, d), np.int64), np.eye(d, dtype=np.int64), -np.eye(d, dtype=np.int64)])
        low, n = cells.min(0) - 1, np.ptp(cells, axis=0) + 3
        stride = np.append(np.cumprod(n[::-1])[::-1][1:], 1)
        numbers = ((cells[:, None] + around - low) @ stride).ravel()
        return low, n, stride, np.unique(numbers)

    def inside(self, z: np.ndarray) -> np.ndarray:
        """Whether points ``(n, latent_dim)`` lie in or beside a cell that holds training data, ``(n,)``."""
        low, n, stride, numbers = self._cells
        cell = np.floor(z / self.width).astype(np.int64) - low
        within = ((cell >= 0) & (cell < n)).all(-1)
        number = cell @ stride
        at = np.minimum(np.searchsorted(numbers, number), len(numbers) - 1)
        return within & (numbers[at] == number)


def cell_width(points: np.ndarray, valid: np.ndarray, share: float = 0.999) -> float:
    """The narrowest cells for which `share` of the validation points ``(n, latent_dim)`` is inside."""
    for width in _WIDTHS:
        if Support(points, np.inf, np.inf, width).inside(valid).mean() >= share:
            return width
    return 2 * _WIDTHS[-1]


def choose_points(points: np.ndarray, n: int, seed: int) -> np.ndarray:
    """At most n of the points, drawn evenly over the space that they occupy rather than in time.

    So rare states are supported as well as frequent ones.
    """
    if len(points) <= n:
        return points
    cells = np.unique(np.floor(points / _WIDTHS[0]), axis=0, return_inverse=True)[1].ravel()
    weight = 1.0 / np.bincount(cells)[cells]
    chosen = np.random.default_rng([seed, 2]).choice(len(points), n, replace=False, p=weight / weight.sum())
    return points[np.sort(chosen)]
