"""Where the training data were in latent space, and the rare transitions between states that they hold.

A mixture density spreads some probability everywhere. Within a well-sampled region that does no harm; but between
states that rarely exchange, a step taken once in a thousand leads into space where nothing was learned, and the walker
may come out in the other state: the rates would be those of the mixtures' tails. A network learns the rate of a
transition from hundreds of events, not from a few. So the slowest latent coordinates are cut into cells; cells with
enough training frames that touch one another, and sparser ones at their edge, make up regions; and regions that
exchanged often enough are one. If more than one is left, a walker leaves its region only along a transition that was
observed, and as often as in the training data. With few data the steps of a propagator do not know where these end, and
in a long run its walkers drift away from them: no step leads beyond the range of the data in any latent coordinate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

#: neighbours whose distance tells how well the training data support a latent point
NEIGHBOURS = 5
#: latent coordinates, the slowest ones, in which regions are told apart
SLOW = 2
#: training frames that make a cell part of a region
ENOUGH = 5
#: share of the training frames that makes a region a state, and passages between two from which on they are one: rates
#: of so many events are the propagator's business
STATE, OFTEN = 0.01, 100
_WIDTHS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6)


@dataclass(frozen=True, eq=False)
class Regions:
    """Cells of the slowest latent coordinates, and the regions that they make up.

    Attributes:
        width: of the cells. cells: ``(n_cells, slow)`` int. numbers: ``(n_cells,)``, the region of each, from 1.
    """

    width: float
    cells: np.ndarray
    numbers: np.ndarray

    @property
    def count(self) -> int:
        """Largest number of a region, 0 if there is none."""
        return int(self.numbers.max(initial=0))

    @cached_property
    def _map(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Numbers on a flat grid with a margin of empty cells; its lowest cell, last index, stride per dimension."""
        low = self.cells.min(0) - 1
        grid = np.zeros(np.ptp(self.cells, axis=0) + 3, np.int32)
        grid[tuple((self.cells - low).T)] = self.numbers
        stride = np.array(grid.strides) // grid.itemsize
        return grid.ravel(), low.astype(np.float64), np.array(grid.shape) - 1.0, stride.astype(np.float64)

    def region(self, z: np.ndarray) -> np.ndarray:
        """The region of points ``(n, latent_dim)``, ``(n,)``; 0 outside of all."""
        if not len(self.cells):
            return np.zeros(len(z), np.int32)
        grid, low, last, stride = self._map
        cell = np.floor(z[:, : len(low)] / self.width) - low
        return grid[(np.minimum(np.maximum(cell, 0.0), last) @ stride).astype(np.int64)]


@dataclass(frozen=True, eq=False)
class Support:
    """The training data in latent space.

    Attributes:
        points: ``(m, latent_dim)``. distance: to the `NEIGHBOURS`-th nearest point; the largest one of any validation
            frame. spread: of the members' predictions, likewise; infinite with one member.
        regions: between which the propagator's steps are watched. pairs: ``(p, 2, latent_dim)``, observed transitions:
            those out of, into, outside of or between regions, and a sample of the others.
        accept: ``(n_regions + 1, n_regions + 1)``, the probability to accept a step of the propagator from one region
            to another (0 is the space outside): how many there are in the training data, over how many the propagator
            would make in the same places, at most 1. extra: likewise, the probability per step of a transition that the
            propagator does not propose often enough.
        limits: ``(2, latent_dim)``, lowest and highest latent coordinates of the training data; infinite in models of
            before, which did not keep them.
    """

    points: np.ndarray
    distance: float
    spread: float
    regions: Regions
    pairs: np.ndarray
    accept: np.ndarray
    extra: np.ndarray
    limits: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` needs beside distance, spread and width of the cells, by the names in the model file."""
        return {
            "points": self.points,
            "cells": self.regions.cells,
            "regions": self.regions.numbers,
            "pairs": self.pairs,
            "accept": self.accept,
            "extra": self.extra,
            "limits": self.limits,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], distance: float, spread: float, width: float) -> Support:
        """The inverse of `arrays`; `limits` may be missing, in models of before.

        Raises `KeyError` if another is missing, `ValueError` if they do not fit each other.
        """
        regions = Regions(width, arrays["cells"], arrays["regions"])
        d, between = arrays["points"].shape[-1], (regions.count + 1,) * 2
        found = cls(
            arrays["points"], distance, spread, regions, arrays["pairs"], arrays["accept"], arrays["extra"],
            arrays.get("limits", np.full((2, d), [[-np.inf], [np.inf]])),
        )  # fmt: skip
        expected = {
            "points": (len(found.points), d),
            "cells": (len(regions.cells), min(SLOW, d)),
            "regions": (len(regions.cells),),
            "pairs": (len(found.pairs), 2, d),
            "accept": between,
            "extra": between,
            "limits": (2, d),
        }
        for name, value in found.arrays().items():
            if value.shape != expected[name]:
                raise ValueError(f"support.{name}: expected shape {expected[name]}, got {value.shape}")
        return found

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(self.points)

    def far(self, z: np.ndarray) -> np.ndarray:
        """Distance to the `NEIGHBOURS`-th nearest point, ``(n,)``."""
        return self._tree.query(z, k=NEIGHBOURS)[0][:, -1]

    @property
    def confines(self) -> bool:
        """Whether there are states that exchange too rarely for the propagator."""
        return len(self.accept) > 2

    @cached_property
    def extra_total(self) -> np.ndarray:
        """Sums of the rows of `extra`."""
        return self.extra.sum(1)

    @cached_property
    def _outside(self) -> tuple[Any, np.ndarray]:
        """The transitions that begin outside of all regions (all, if there are none), as a tree of their beginnings."""
        from scipy.spatial import cKDTree

        outside = self.pairs[self.regions.region(self.pairs[:, 0]) == 0]
        pairs = outside if len(outside) else self.pairs
        return cKDTree(pairs[:, 0]), pairs

    def beyond(self, z: np.ndarray, later: np.ndarray) -> np.ndarray:
        """Indices of the steps from z to later, ``(n, latent_dim)`` both, that leave `limits` or lead further away."""
        low, high = self.limits
        outside = later < low
        outside |= later > high
        if not outside.any():
            return np.empty(0, np.intp)
        found = np.flatnonzero(outside.any(1))
        z, later = z[found], later[found]
        return found[(((later < low) & (later < z)) | ((later > high) & (later > z))).any(1)]

    def continued(self, z: np.ndarray) -> np.ndarray:
        """The end of the observed transition outside of all regions whose beginning is nearest to z.

        A walker that is there came along an observed transition; it goes on as the trajectory did.
        """
        tree, pairs = self._outside
        return pairs[tree.query(z)[1], 1]

    @cached_property
    def _ends(self) -> dict[tuple[int, int], np.ndarray]:
        """Ends of the observed transitions between regions, by the regions."""
        before, after = self.regions.region(self.pairs[:, 0]), self.regions.region(self.pairs[:, 1])
        found = {}
        for i, j in {*zip(before.tolist(), after.tolist(), strict=True)}:
            if i != j:
                found[i, j] = self.pairs[(before == i) & (after == j), 1]
        return found

    def jump(self, before: np.ndarray, after: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Ends ``(n, latent_dim)`` of observed transitions between these regions, drawn at random."""
        out = np.empty((len(before), self.pairs.shape[2]))
        for k, key in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            out[k] = self._ends[key][random.integers(len(self._ends[key]))]
        return out


def build(train: Sequence[np.ndarray], valid: np.ndarray, *, n_points: int, seed: int, share: float = 0.995) -> Support:
    """Points, regions and transitions of latent training trajectories; `distance` and `spread` are left infinite.

    Args:
        train: ``(n_frames, latent_dim)`` each. valid: ``(n, latent_dim)``, of which `share` must lie within the
            regions; the narrowest cells for which this holds are taken. n_points: kept of points, and of transitions.
    """
    everything = np.concatenate(train)
    random = np.random.default_rng([seed, 2])
    points = choose_points(everything, n_points, random)
    for width in _WIDTHS:
        found = _cut(everything, width)
        if (found.region(valid) > 0).mean() >= share:
            break
    regions = _states(found, train)
    pairs = np.concatenate([np.stack([z[:-1], z[1:]], axis=1) for z in train])
    before, after = regions.region(pairs[:, 0]), regions.region(pairs[:, 1])
    special = (before != after) | (after == 0)
    ordinary = pairs[~special]
    some = ordinary[np.sort(random.choice(len(ordinary), min(len(ordinary), n_points // 4), replace=False))]
    every = np.ones((regions.count + 1,) * 2)
    limits = np.stack([everything.min(0), everything.max(0)])
    return Support(points, np.inf, np.inf, regions, np.concatenate([pairs[special], some]), every, 0 * every, limits)


def _cut(z: np.ndarray, width: float) -> Regions:
    """Cells with enough frames, which are one region where they touch one another (corners count), and the others that
    touch just one of these regions."""
    from scipy.ndimage import label, maximum_filter, minimum_filter

    slow = min(SLOW, z.shape[1])
    cells, counts = np.unique(np.floor(z[:, :slow] / width).astype(np.int64), axis=0, return_counts=True)
    if not (counts >= ENOUGH).any():
        return Regions(width, cells[:0], np.empty(0, np.int32))
    at = tuple((cells - cells.min(0)).T)
    dense = np.zeros(np.ptp(cells, axis=0) + 1, bool)
    dense[at] = counts >= ENOUGH
    labels, n = label(dense, structure=np.ones((3,) * slow))
    highest = maximum_filter(labels, 3, mode="constant")
    lowest = minimum_filter(np.where(labels > 0, labels, n + 1), 3, mode="constant", cval=n + 1)
    grown = np.where(labels > 0, labels, np.where(highest == lowest, highest, 0))[at]
    return Regions(width, cells[grown > 0], grown[grown > 0].astype(np.int32))


def _states(found: Regions, train: Sequence[np.ndarray]) -> Regions:
    """Those with few frames left out, those that exchanged often made one."""
    n = found.count + 1
    labels = [found.region(z) for z in train]
    share = np.bincount(np.concatenate(labels), minlength=n) / sum(len(x) for x in labels)
    large = share >= STATE
    large[0] = False
    passages = np.zeros((n, n), np.int64)
    for run in labels:
        visited = run[large[run]]
        np.add.at(passages, (visited[:-1], visited[1:]), 1)
    passages += passages.T
    group = np.arange(n)
    for i, j in np.argwhere(np.triu(passages, 1) >= OFTEN):
        group[group == group[j]] = group[i]
    names = {g: k + 1 for k, g in enumerate(sorted({int(group[i]) for i in np.flatnonzero(large)}))}
    new = np.array([names[int(group[i])] if large[i] else 0 for i in range(n)], dtype=np.int32)[found.numbers]
    return Regions(found.width, found.cells[new > 0], new[new > 0])


def calibration(observed: np.ndarray, proposed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Support.accept` and `Support.extra` from counts of steps between regions, ``(n_regions + 1, n_regions + 1)``.

    Steps within a region, and those of walkers outside of all, are always accepted; those that were never observed
    never, as there is no transition to follow.
    """
    ratio = np.divide(observed, proposed, out=(observed > 0).astype(np.float64), where=proposed > 0)
    frames = observed.sum(1, keepdims=True)
    extra = np.divide(np.maximum(observed - proposed, 0.0), frames, out=np.zeros(observed.shape), where=frames > 0)
    for values, inside in ((ratio, 1.0), (extra, 0.0)):
        values[np.diag_indices(len(values))] = inside
        values[0] = inside
    return np.minimum(ratio, 1.0), extra


def choose_points(points: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """At most n of the points, drawn evenly over the space that they occupy rather than in time.

    So rare states are supported as well as frequent ones.
    """
    if len(points) <= n:
        return points
    cells = np.unique(np.floor(points / _WIDTHS[0]), axis=0, return_inverse=True)[1].ravel()
    weight = 1.0 / np.bincount(cells)[cells]
    chosen = random.choice(len(points), n, replace=False, p=weight / weight.sum())
    return points[np.sort(chosen)]
