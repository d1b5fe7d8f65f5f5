"""samples of biased windows -> free-energy profiles and differences of the unbiased ensemble, with errors.

    samples = Reweighted.of(windows, values, temperature=300.0)
    profile = samples.profile(samples.values[:, 0], edges)
    step = samples.difference(samples.values[:, 0] < 0, samples.values[:, 0] > 0)

Umbrella sampling (G. M. Torrie, J. P. Valleau, J. Comput. Phys. 23, 187 (1977)) with MBAR (M. R. Shirts, J. D.
Chodera, J. Chem. Phys. 129, 124105 (2008)): a frame x of any window has the weight w(x) = 1 / sum_k N_k exp(f_k -
u_k(x)) in the unbiased ensemble, u_k being the reduced bias of window k. A region A has the free energy -ln sum_A w.
Errors are those of `free_energy`: each frame's influence on the result, by its own weight and by way of the f_k, with
the statistical inefficiency of these influences in every window.

Coordinates are in angstrom and degrees where they are lengths and angles, biases in eV, free energies in kT.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from openmm_mlff.analysis.free_energy import (
    LEAST_OVERLAP,
    FreeEnergies,
    FreeEnergy,
    _log_sum,
    _response,
    _spread,
    mbar,
    thermal_energy,
)


@dataclass(frozen=True)
class Bias:
    """Zero from `low` to `high`, and k d^2 / 2 at a distance d outside; an umbrella where the two are equal.

    Attributes:
        low, high: finite, in the unit of the coordinate. stiffness: k, eV per its square.
        period: of the coordinate (360 for torsions in degrees); None for one without.

    Raises `ValueError` naming the field.
    """

    low: float
    high: float
    stiffness: float
    period: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"low, high: expected finite numbers in this order, got {self.low!r} and {self.high!r}")
        if not (math.isfinite(self.stiffness) and self.stiffness > 0):
            raise ValueError(f"stiffness: expected a positive number, got {self.stiffness!r}")
        if self.period is not None and not self.period > self.high - self.low:
            raise ValueError(
                f"period: expected more than high - low = {self.high - self.low:g}, or None, got {self.period!r}"
            )

    @classmethod
    def umbrella(cls, center: float, stiffness: float, period: float | None = None) -> Bias:
        """Harmonic about a center."""
        return cls(center, center, stiffness, period)

    @property
    def center(self) -> float:
        return 0.5 * (self.low + self.high)

    def energy(self, values: np.ndarray) -> np.ndarray:
        """eV at each value, ``(n,)``."""
        away = np.asarray(values, dtype=np.float64) - self.center
        if self.period is not None:
            away = away - self.period * np.rint(away / self.period)
        outside = np.maximum(np.abs(away) - 0.5 * (self.high - self.low), 0.0)
        return 0.5 * self.stiffness * outside**2


#: what acts in a window: for each coordinate a bias, or None
Window = Sequence[Bias | None]


def reduced_biases(windows: Sequence[Window], values: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
    """Energies of each window's frames under the biases of all K windows, in kT: ``(K, n_k)`` for each window k.

    Args:
        values: of the C coordinates in the frames of each window, ``(n_k, C)``. temperature: K.

    Raises `ValueError` naming the argument.
    """
    if len(windows) != len(values):
        raise ValueError(f"values: expected an array for each of {len(windows)} windows, got {len(values)}")
    kT, found = thermal_energy(temperature), []
    for k, frames in enumerate(values):
        frames = np.asarray(frames, dtype=np.float64)
        if frames.ndim != 2 or any(len(window) != frames.shape[1] for window in windows):
            raise ValueError(
                f"values[{k}]: expected shape (n, {len(windows[0])}) as the windows have biases, got {frames.shape}"
            )
        energies = np.zeros((len(windows), len(frames)))
        for row, window in zip(energies, windows, strict=True):
            for c, bias in enumerate(window):
                if bias is not None:
                    row += bias.energy(frames[:, c]) / kT
        found.append(energies)
    return found


@dataclass(frozen=True)
class Profile:
    """A free energy along a coordinate, in kT.

    Attributes:
        edges: ``(bins + 1,)``. delta: -ln of the probability of each bin by its width, less that of the zero,
            ``(bins,)``; NaN where there are fewer than two frames. error: standard error of it, ``(bins,)``.
    """

    edges: np.ndarray
    delta: np.ndarray
    error: np.ndarray

    @property
    def centers(self) -> np.ndarray:
        return 0.5 * (self.edges[1:] + self.edges[:-1])


@dataclass(frozen=True)
class Reweighted:
    """Frames of all windows with their weights in the unbiased ensemble.

    Attributes:
        values: of the coordinates, ``(N, C)``, window by window. counts: frames of each window.
        windows: free energies of the windows. log_weights: ``(N,)``; their exponentials sum to one.
    """

    values: np.ndarray
    counts: tuple[int, ...]
    windows: FreeEnergies
    log_weights: np.ndarray = field(repr=False)
    _shares: np.ndarray = field(repr=False)
    _influences: np.ndarray = field(repr=False)

    @classmethod
    def of(
        cls,
        windows: Sequence[Window],
        values: Sequence[np.ndarray],
        temperature: float,
        least_overlap: float | None = LEAST_OVERLAP,
        names: Sequence[str] | None = None,
    ) -> Reweighted:
        """Solve MBAR for windows that follow one another; arguments as for `reduced_biases` and `mbar`.

        Raises `InsufficientOverlap` (a `ValueError`) naming two neighbouring windows that share too few frames,
        `ValueError`, and `RuntimeError` if the equations were not solved.
        """
        energies = reduced_biases(windows, values, temperature)
        names = [str(k) for k in range(len(windows))] if names is None else list(names)
        found = mbar(energies, least_overlap, names)
        u, counts = np.concatenate(energies, axis=1), [len(frames) for frames in values]
        logarithm = np.log(counts)[:, None] + found.delta[:, None] - u
        total = _log_sum(logarithm, axis=0)
        log_weights = -total - _log_sum(-total)
        _, influences = _response(u, found.delta, counts, least_overlap, names)
        joined = np.concatenate([np.asarray(frames, dtype=np.float64) for frames in values])
        return cls(joined, tuple(counts), found, log_weights, np.exp(logarithm - total), influences)

    def _region(self, name: str, inside: np.ndarray) -> tuple[float, np.ndarray]:
        """Free energy of a region, and the influence of every frame on it, ``(N,)``."""
        inside = np.asarray(inside)
        if inside.shape != self.log_weights.shape or inside.dtype != np.bool_:
            raise ValueError(
                f"{name}: expected a boolean for each of {len(self.log_weights)} frames, got {inside.dtype} "
                f"of shape {inside.shape}"
            )
        if not inside.any():
            raise ValueError(f"{name}: expected at least one frame in the region, got none")
        log_sum = _log_sum(self.log_weights[inside])
        weights = np.where(inside, np.exp(self.log_weights - log_sum), 0.0)
        # a weight depends on f_k as dw/df_k = -w p_k, p_k being the probability that the frame comes from window k
        return -log_sum, -weights + (self._shares @ weights) @ self._influences

    def difference(self, start: np.ndarray, end: np.ndarray) -> FreeEnergy:
        """Free energy of the region `end` minus that of `start`, kT; each a boolean per frame, ``(N,)``.

        The regions may overlap. Raises `ValueError` naming an empty region.
        """
        a, influence_a = self._region("start", start)
        b, influence_b = self._region("end", end)
        parts = tuple(np.split(influence_b - influence_a, np.cumsum(self.counts)[:-1]))
        spreads = [_spread(part, [len(part)]) for part in parts]
        error = math.sqrt(sum(variance for variance, _ in spreads))
        return FreeEnergy(b - a, error, tuple(g for _, g in spreads), None, parts)

    def mean(self, values: np.ndarray, inside: np.ndarray | None = None) -> float:
        """Average of a property of the frames, ``(N,)``, over the unbiased ensemble or a region of it."""
        chosen = np.ones(len(self.log_weights), dtype=bool) if inside is None else inside
        weights = np.exp(self.log_weights[chosen] - self.log_weights[chosen].max())
        return float(np.average(np.asarray(values)[chosen], weights=weights))

    def profile(
        self,
        coordinate: np.ndarray,
        edges: np.ndarray,
        inside: np.ndarray | None = None,
        zero: np.ndarray | None = None,
    ) -> Profile:
        """Free energy along a coordinate.

        Args:
            coordinate: of the frames, ``(N,)``; a column of `values` or any other function of the frames.
            edges: of the bins, ascending, ``(bins + 1,)``. inside: frames that count; None takes all.
            zero: region (a boolean per frame) whose free energy is the zero; None takes the lowest bin.

        Raises `ValueError` naming the argument.
        """
        coordinate, edges = np.asarray(coordinate, dtype=np.float64), np.asarray(edges, dtype=np.float64)
        if coordinate.shape != self.log_weights.shape:
            raise ValueError(f"coordinate: expected shape {self.log_weights.shape}, got {coordinate.shape}")
        if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise ValueError("edges: expected at least two ascending numbers")
        chosen = np.ones(len(coordinate), dtype=bool) if inside is None else inside
        bins = [(coordinate >= a) & (coordinate < b) & chosen for a, b in itertools.pairwise(edges)]
        filled = [k for k, frames in enumerate(bins) if frames.sum() >= 2]
        if not filled:
            raise ValueError("edges: expected bins that hold frames, got none with two of them")
        delta, error = np.full(len(bins), np.nan), np.full(len(bins), np.nan)
        widths = np.log(np.diff(edges))
        free = {k: self._region("inside", bins[k])[0] + widths[k] for k in filled}
        lowest = min(filled, key=free.__getitem__)
        reference, shift = (bins[lowest], widths[lowest]) if zero is None else (zero, 0.0)
        for k in filled:
            found = self.difference(reference, bins[k])
            delta[k], error[k] = found.delta + widths[k] - shift, found.error
        return Profile(edges, delta, error)
