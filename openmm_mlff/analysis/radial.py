"""trajectories -> radial distribution functions and coordination numbers, in boxes and in droplets.

Positions and lengths in angstrom, densities in 1/angstrom^3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: distances that are held at a time
_BATCH = 4_000_000


@dataclass(frozen=True)
class RadialDistribution:
    """How many atoms are at which distance of another.

    Attributes:
        edges: of the bins, ``(n_bins + 1,)`` angstrom.
        g: density in the bin over the mean density, ``(n_bins,)``.
        coordination: atoms up to the upper edge of the bin, per centre, ``(n_bins,)``.
        density: that g is relative to, 1/angstrom^3.
    """

    edges: np.ndarray
    g: np.ndarray
    coordination: np.ndarray
    density: float

    @property
    def middles(self) -> np.ndarray:
        """Of the bins, ``(n_bins,)`` angstrom."""
        return 0.5 * (self.edges[1:] + self.edges[:-1])


def radial_distribution(
    positions: np.ndarray,
    centers: np.ndarray,
    others: np.ndarray,
    edges: np.ndarray,
    box: np.ndarray | None = None,
    density: float | None = None,
) -> RadialDistribution:
    """g(r) of `others` about `centers`, averaged over frames and centres.

    Args:
        positions: ``(n_frames, n_atoms, 3)``. centers, others: indices; an atom that is both is no neighbour of itself.
        edges: of the bins, ``(n_bins + 1,)`` and increasing.
        box: vectors as rows in OpenMM's reduced form, ``(3, 3)``; None for an open system.
        density: of `others`, which g is relative to; None takes that of the box. A droplet has none of its own, so that
            one has to be given, for example that of the bulk liquid.

    Raises `ValueError` naming the argument for other shapes, bins that do not increase or reach beyond half of the box,
    or an open system without a density.
    """
    frames, first, second = _checked(positions, centers, others, box)
    bins = np.asarray(edges, dtype=float)
    if bins.ndim != 1 or len(bins) < 2 or bins[0] < 0.0 or not (np.diff(bins) > 0).all():
        raise ValueError(f"edges: expected at least two numbers >= 0 that increase, got {edges!r}")
    if density is None:
        if box is None:
            raise ValueError("density: expected a number (1/angstrom^3) for an open system, got None")
        same = len(np.intersect1d(first, second))
        density = (len(second) - same / len(first)) / abs(float(np.linalg.det(box)))
    if not density > 0.0:
        raise ValueError(f"density: expected a positive number (1/angstrom^3), got {density!r}")
    if box is not None:
        _check_reach("edges", float(bins[-1]), np.asarray(box, dtype=float))
    counts, below = np.zeros(len(bins) - 1), 0.0
    for apart in _distances(frames, first, second, box):
        counts += np.histogram(apart, bins)[0]
        below += float(np.sum(apart < bins[0]))
    shells = 4.0 / 3.0 * np.pi * np.diff(bins**3)
    per_center = counts / (len(frames) * len(first))
    start = below / (len(frames) * len(first))
    return RadialDistribution(bins, per_center / (shells * density), start + np.cumsum(per_center), float(density))


def neighbors_within(
    positions: np.ndarray, centers: np.ndarray, others: np.ndarray, radius: float, box: np.ndarray | None = None
) -> np.ndarray:
    """Number of `others` closer than `radius` to each of the `centers`, mean over centres, ``(n_frames,)``.

    Arguments and errors are those of `radial_distribution`.
    """
    frames, first, second = _checked(positions, centers, others, box)
    if not radius > 0.0:
        raise ValueError(f"radius: expected a positive number (angstrom), got {radius!r}")
    if box is not None:
        _check_reach("radius", radius, np.asarray(box, dtype=float))
    found = [(apart < radius).sum(axis=(1, 2)) / len(first) for apart in _distances(frames, first, second, box)]
    return np.concatenate(found)


def _checked(
    positions: np.ndarray, centers: np.ndarray, others: np.ndarray, box: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    frames = np.asarray(positions)
    if frames.ndim != 3 or frames.shape[2] != 3 or len(frames) == 0:
        raise ValueError(f"positions: expected shape (n_frames, n_atoms, 3), got {frames.shape}")
    chosen = []
    for name, values in (("centers", centers), ("others", others)):
        index = np.asarray(values)
        if index.ndim != 1 or len(index) == 0 or index.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected indices of atoms, got {values!r}")
        if index.min() < 0 or index.max() >= frames.shape[1]:
            raise ValueError(f"{name}: expected indices from 0 to {frames.shape[1] - 1}, got {values!r}")
        chosen.append(index)
    if box is not None and np.shape(box) != (3, 3):
        raise ValueError(f"box: expected vectors as rows (3, 3), got shape {np.shape(box)}")
    return frames, chosen[0], chosen[1]


def _check_reach(name: str, reach: float, box: np.ndarray) -> None:
    # beyond half the smallest edge the nearest image is not the only one
    half = 0.5 * float(np.diag(box).min())
    if reach > half:
        raise ValueError(f"{name}: expected at most half of the box ({half:.3f} angstrom), got {reach:.3f}")


def _distances(
    frames: np.ndarray, first: np.ndarray, second: np.ndarray, box: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Batches ``(n, n_centers, n_others)``; infinite from an atom to itself."""
    itself = first[:, None] == second[None]
    step = max(1, _BATCH // (len(first) * len(second)))
    for k in range(0, len(frames), step):
        some = frames[k : k + step].astype(float)
        d = some[:, None, second] - some[:, first, None]
        if box is not None:
            for axis in (2, 1, 0):
                d -= np.rint(d[..., axis : axis + 1] / box[axis, axis]) * box[axis]
        yield np.where(itself, np.inf, np.linalg.norm(d, axis=-1))
