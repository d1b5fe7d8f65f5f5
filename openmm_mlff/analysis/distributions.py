"""trajectories -> populations, and how far two distributions are apart, beside the floor that sampling sets.

Trajectories are arrays ``(n_frames,)`` or ``(n_frames, n_dims)``, one per run; frames of one run are correlated, so
that error bars come from whole runs, or from long pieces of them where there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from openmm_mlff.analysis.observables import Estimate

#: fewer runs than this are cut into about as many pieces for error bars.
LEAST_UNITS = 20

#: where a point is: ``(n, n_dims)`` (or ``(n,)``) -> boolean mask ``(n,)``
Region = Callable[[np.ndarray], np.ndarray]


def checked_trajectories(trajs: Sequence[np.ndarray], name: str = "trajs") -> list[np.ndarray]:
    """The trajectories as arrays of numbers with the same number of dimensions.

    Raises `ValueError` naming the argument for no trajectory, an empty one, other shapes, NaN or infinity.
    """
    arrays = [np.asarray(t) for t in trajs]
    if not arrays:
        raise ValueError(f"{name}: expected at least one trajectory, got none")
    shapes = {a.shape[1:] for a in arrays}
    if any(a.ndim not in (1, 2) or len(a) == 0 for a in arrays) or len(shapes) > 1:
        raise ValueError(
            f"{name}: expected a list of arrays (n_frames,) or (n_frames, n_dims), alike and not empty, "
            f"got shapes {sorted({a.shape for a in arrays})[:4]}"
        )
    for k, array in enumerate(arrays):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in trajectory {k}")
    return arrays


def units(lengths: Sequence[int], least: int = LEAST_UNITS) -> list[tuple[int, int, int]]:
    """Pieces ``(trajectory, start, stop)`` that error bars resample.

    Whole trajectories if there are at least `least`; else each is cut into pieces of equal length, about `least` in
    all, whose frames are then taken for independent of the next piece's.
    """
    cuts = 1 if len(lengths) >= least else -(-least // len(lengths))
    found = []
    for k, length in enumerate(lengths):
        edges = np.linspace(0, length, min(cuts, length) + 1).astype(int)
        found += [(k, int(a), int(b)) for a, b in pairwise(edges)]
    return found


def jackknife_ratio(top: np.ndarray, bottom: np.ndarray) -> Estimate:
    """sum(top) / sum(bottom) over independent units, with the jackknife error.

    `samples` of the result is the number of units. The value is NaN where the denominator is zero.
    """
    n = len(top)
    if bottom.sum() == 0:
        return Estimate(float("nan"), float("nan"), float(n))
    value = float(top.sum() / bottom.sum())
    rest = bottom.sum() - bottom
    if n < 2 or (rest == 0).any():
        return Estimate(value, float("nan"), float(n))
    left_out = (top.sum() - top) / rest
    return Estimate(value, float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))), float(n))


def populations(
    trajs: Sequence[np.ndarray], regions: Mapping[str, Region], least_units: int = LEAST_UNITS
) -> dict[str, Estimate]:
    """Share of all frames in each region, with the jackknife error over runs (or pieces of them, see `units`)."""
    arrays = checked_trajectories(trajs)
    pieces = units([len(a) for a in arrays], least_units)
    size = np.array([stop - start for _, start, stop in pieces], dtype=float)
    found = {}
    for name, region in regions.items():
        masks = [np.asarray(region(a), dtype=bool) for a in arrays]
        inside = np.array([masks[k][start:stop].sum() for k, start, stop in pieces], dtype=float)
        found[name] = jackknife_ratio(inside, size)
    return found


# -- how far apart ---------------------------------------------------------------------------------------------


def jensen_shannon(
    a: np.ndarray,
    b: np.ndarray,
    bins: int | Sequence[int] | Sequence[np.ndarray] = 36,
    bounds: Sequence[tuple[float, float]] | None = None,
    period: float | None = None,
) -> float:
    """Jensen-Shannon divergence of two sets of samples on a grid, in nats: from 0 to ln 2.

    Args:
        a, b: ``(n,)`` or ``(n, n_dims)``.
        bins: per dimension, or the edges of each dimension.
        bounds: lowest and highest edge per dimension; by default those of both sets together. Samples beyond them are
            counted in the outermost bins.
        period: of every dimension; samples are wrapped, and the grid covers ``-period/2`` to ``period/2``.

    Raises `ValueError` naming the argument for empty sets, other shapes, NaN, or edges that do not increase.
    """
    x, y = (_points(values, name) for values, name in ((a, "a"), (b, "b")))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"b: expected {x.shape[1]} dimensions as a has, got {y.shape[1]}")
    if period is not None:
        x, y = (np.mod(values + 0.5 * period, period) - 0.5 * period for values in (x, y))
        bounds = [(-0.5 * period, 0.5 * period)] * x.shape[1]
    edges = _edges(x, y, bins, bounds)
    p, q = (_histogram(values, edges) for values in (x, y))
    middle = 0.5 * (p + q)
    return 0.5 * sum(float(np.sum(w[w > 0] * np.log(w[w > 0] / middle[w > 0]))) for w in (p, q))


def _points(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name}: expected samples (n,) or (n, n_dims), got shape {np.shape(values)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array


def _edges(
    x: np.ndarray,
    y: np.ndarray,
    bins: int | Sequence[int] | Sequence[np.ndarray],
    bounds: Sequence[tuple[float, float]] | None,
) -> list[np.ndarray]:
    n_dims = x.shape[1]
    per_axis: list[Any] = [bins] * n_dims if isinstance(bins, int) else list(bins)
    if len(per_axis) != n_dims:
        raise ValueError(f"bins: expected one entry for each of {n_dims} dimensions, got {len(per_axis)}")
    if bounds is None:
        low, high = np.minimum(x.min(0), y.min(0)), np.maximum(x.max(0), y.max(0))
        bounds = list(zip(low, np.where(high > low, high, low + 1.0), strict=True))
    if len(bounds) != n_dims:
        raise ValueError(f"bounds: expected one pair for each of {n_dims} dimensions, got {len(bounds)}")
    edges = []
    for axis, (low, high) in zip(per_axis, bounds, strict=True):
        edge = np.linspace(low, high, int(axis) + 1) if np.ndim(axis) == 0 else np.asarray(axis, dtype=float)
        if len(edge) < 2 or not (np.diff(edge) > 0).all():
            raise ValueError(f"bins, bounds: expected at least one bin and edges that increase, got {edge}")
        edges.append(edge)
    return edges


def _histogram(values: np.ndarray, edges: Sequence[np.ndarray]) -> np.ndarray:
    inside = [np.clip(column, edge[0], edge[-1]) for column, edge in zip(values.T, edges, strict=True)]
    counts = np.histogramdd(np.stack(inside, axis=1), bins=list(edges))[0]
    return counts.ravel() / counts.sum()


def wasserstein(a: np.ndarray, b: np.ndarray, period: float | None = None) -> float:
    """Wasserstein-1 (earth mover's) distance of two sets of numbers, in their unit.

    On a line it is the area between the two cumulative distributions; on a circle of `period` the least area between
    them over all constant shifts, which the median difference attains (Rabin, Delon, Gousseau, J. Math. Imaging Vis.
    2011, 41, 147).

    Raises `ValueError` naming the argument for an empty set, more than one dimension, NaN, or a period <= 0.
    """
    x, y = (_points(values, name) for values, name in ((a, "a"), (b, "b")))
    if x.shape[1] != 1 or y.shape[1] != 1:
        raise ValueError(f"a, b: expected numbers in one dimension, got shapes {np.shape(a)} and {np.shape(b)}")
    if period is not None and not period > 0:
        raise ValueError(f"period: expected a positive number, got {period!r}")
    u, v = (np.sort(s[:, 0] if period is None else np.mod(s[:, 0], period)) for s in (x, y))
    every = np.sort(np.concatenate([u, v]))
    widths = np.diff(every)
    gap = np.searchsorted(u, every[:-1], "right") / len(u) - np.searchsorted(v, every[:-1], "right") / len(v)
    if period is not None:
        # the arc over the seam, where both distributions are complete
        widths, gap = np.append(widths, period - (every[-1] - every[0])), np.append(gap, 0.0)
        order = np.argsort(gap)
        half = int(np.searchsorted(np.cumsum(widths[order]), 0.5 * period))
        gap = gap - gap[order[min(half, len(gap) - 1)]]
    return float(np.sum(np.abs(gap) * widths))


def floor(
    trajs: Sequence[np.ndarray],
    n_frames: int,
    measure: Callable[[np.ndarray, np.ndarray], float],
    splits: int = 20,
    seed: int = 0,
) -> Estimate:
    """What sampling alone leaves between two sets of `n_frames` frames each, from the same dynamics.

    Runs are shuffled and shared out: whole runs go to the first set until it has `n_frames` (the last one cut short),
    then to the second; no run gives frames to both, except where a single run is cut into halves.

    Args:
        measure: of two sets of frames, for example ``lambda a, b: jensen_shannon(a, b, 36, period=360.0)``.

    Returns the mean over `splits` ways to share out, and their standard deviation (the spread of one comparison, not
    the error of the mean). Raises `ValueError` if the runs do not hold two such sets.
    """
    arrays = checked_trajectories(trajs)
    if n_frames < 1:
        raise ValueError(f"n_frames: expected at least 1, got {n_frames}")
    if len(arrays) == 1:
        half = len(arrays[0]) // 2
        arrays = [arrays[0][:half], arrays[0][half:]]
    random = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = list(random.permutation(len(arrays)))
        sets = [_take(arrays, order, n_frames), _take(arrays, order, n_frames)]
        found.append(float(measure(*sets)))
    return Estimate(float(np.mean(found)), float(np.std(found, ddof=1)) if splits > 1 else float("nan"), float(splits))


def _take(arrays: Sequence[np.ndarray], order: list[int], n_frames: int) -> np.ndarray:
    """`n_frames` frames from the runs named last in `order`, which are taken off it."""
    taken: list[np.ndarray] = []
    wanted = n_frames
    while wanted > 0:
        if not order:
            total = sum(len(a) for a in arrays)
            raise ValueError(
                f"n_frames: expected two sets of whole runs to fit into {len(arrays)} runs with {total} frames, "
                f"got {n_frames} frames each"
            )
        piece = arrays[order.pop()][:wanted]
        taken.append(piece)
        wanted -= len(piece)
    return np.concatenate(taken)
