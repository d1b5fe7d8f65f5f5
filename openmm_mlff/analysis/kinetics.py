"""trajectories -> Markov state models: implied timescales and Chapman-Kolmogorov tests with error bars.

    grid = Grid.spanning(trajs, bins=20)
    dtrajs = [grid.assign(t) for t in trajs]
    implied_timescales(dtrajs, lags=[1, 2, 5, 10], n=2, interval=0.5)

Estimation is deeptime's (extra ``led``). Error bars resample whole runs, or long pieces of them where there are few;
a transition belongs to the piece where it begins, so that none is lost. First passages are in `analysis.passages`,
populations and distances of distributions in `analysis.distributions`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from openmm_mlff.analysis.distributions import LEAST_UNITS, checked_trajectories, units

#: share of the bootstrap inside the intervals.
CONFIDENCE = 0.95
#: iterations at most of an estimate with detailed balance, and of one of the bootstrap. Convergence is slow where sets
#: of states are joined by a few counts; figures that depend on these have errors as large as themselves.
ITERATIONS, BOOTSTRAP_ITERATIONS = 10_000, 1000


def deeptime_module(name: str) -> Any:
    """A module of deeptime, or an `ImportError` that says what to install."""
    from importlib import import_module

    try:
        return import_module(f"deeptime.{name}")
    except ImportError as error:
        raise ImportError(
            f"kinetics need the package deeptime ({error}); install it with: pip install 'openmm-mlff[led]'"
        ) from error


# -- states ----------------------------------------------------------------------------------------------------


class Discretization(Protocol):
    """Points -> numbers of states."""

    @property
    def n_states(self) -> int: ...

    def assign(self, points: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Grid:
    """Equal bins in one to three dimensions; points beyond the edges belong to the outermost bins.

    Attributes:
        low, high: edges per dimension. bins: per dimension. periodic: per dimension; such a point is wrapped into
            ``[low, high)`` first.

    Raises `ValueError` naming the field for other numbers of dimensions, edges or bins.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    bins: tuple[int, ...]
    periodic: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.low) <= 3 or len({len(self.low), len(self.high), len(self.bins), len(self.periodic)}) > 1:
            raise ValueError(
                "low, high, bins, periodic: expected one entry for each of 1 to 3 dimensions, got "
                f"{len(self.low)}, {len(self.high)}, {len(self.bins)}, {len(self.periodic)}"
            )
        if not all(a < b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low, high: expected low < high, got {self.low} and {self.high}")
        if not all(b >= 1 for b in self.bins):
            raise ValueError(f"bins: expected at least one per dimension, got {self.bins}")

    @classmethod
    def spanning(
        cls, trajs: Sequence[np.ndarray], bins: int | Sequence[int], periods: Sequence[float | None] | None = None
    ) -> Grid:
        """The grid that just holds the trajectories; periodic dimensions go from -period/2 to period/2."""
        arrays = checked_trajectories(trajs)
        points = np.concatenate([a.reshape(len(a), -1) for a in arrays])
        n_dims = points.shape[1]
        given = [None] * n_dims if periods is None else list(periods)
        numbers = [bins] * n_dims if isinstance(bins, int) else list(bins)
        low, high = points.min(0).tolist(), points.max(0).tolist()
        for k, period in enumerate(given[:n_dims]):
            if period is not None:
                low[k], high[k] = -0.5 * period, 0.5 * period
        return cls(tuple(low), tuple(high), tuple(numbers), tuple(p is not None for p in given))

    @property
    def n_states(self) -> int:
        return int(np.prod(self.bins))

    def assign(self, points: np.ndarray) -> np.ndarray:
        """States ``(n,)`` of points ``(n, n_dims)`` (or ``(n,)`` in one dimension); the last dimension runs fastest."""
        values = np.asarray(points, dtype=np.float64)
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != len(self.bins):
            raise ValueError(f"points: expected shape (n, {len(self.bins)}), got {np.shape(points)}")
        if not np.isfinite(values).all():
            raise ValueError("points: expected finite numbers, got NaN or infinity")
        state = np.zeros(len(values), dtype=np.int64)
        for column, low, high, n, wraps in zip(values.T, self.low, self.high, self.bins, self.periodic, strict=True):
            cell = np.floor((column - low) / (high - low) * n).astype(np.int64)
            state = state * n + (cell % n if wraps else np.clip(cell, 0, n - 1))
        return state


@dataclass(frozen=True, eq=False)
class Clusters:
    """States around centres, ``(n_states, n_dims)``: a point belongs to the nearest one."""

    centres: np.ndarray

    @classmethod
    def fit(cls, trajs: Sequence[np.ndarray], n_states: int, seed: int = 0, most_frames: int = 50_000) -> Clusters:
        """k-means on at most `most_frames` frames, taken evenly."""
        arrays = checked_trajectories(trajs)
        points = np.concatenate([a.reshape(len(a), -1) for a in arrays]).astype(np.float64)
        if not 1 <= n_states <= len(points):
            raise ValueError(f"n_states: expected from 1 to the {len(points)} frames, got {n_states}")
        stride = max(1, len(points) // max(most_frames, n_states))
        kmeans = deeptime_module("clustering").KMeans(n_states, max_iter=200, fixed_seed=seed, n_jobs=1)
        return cls(np.array(kmeans.fit(points[::stride]).fetch_model().cluster_centers))

    @property
    def n_states(self) -> int:
        return len(self.centres)

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import KDTree

        return KDTree(self.centres)

    def assign(self, points: np.ndarray) -> np.ndarray:
        """States ``(n,)`` of points ``(n, n_dims)`` (or ``(n,)`` in one dimension)."""
        values = np.asarray(points, dtype=np.float64)
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != self.centres.shape[1]:
            raise ValueError(f"points: expected shape (n, {self.centres.shape[1]}), got {np.shape(points)}")
        return self._tree.query(values)[1].astype(np.int64)


def checked_states(dtrajs: Sequence[np.ndarray]) -> list[np.ndarray]:
    arrays = checked_trajectories(dtrajs, "dtrajs")
    for k, array in enumerate(arrays):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
            raise ValueError(f"dtrajs: expected integers >= 0 of shape (n_frames,), got others in trajectory {k}")
    return arrays


# -- transitions -----------------------------------------------------------------------------------------------


class Transitions:
    """Counted transitions at one lag (frames), by the unit in which they begin."""

    def __init__(self, dtrajs: Sequence[np.ndarray], lag: int, pieces: Sequence[tuple[int, int, int]]) -> None:
        if lag < 1:
            raise ValueError(f"lag: expected at least 1 frame, got {lag}")
        if lag >= max(len(d) for d in dtrajs):
            raise ValueError(
                f"lag: expected less than the longest trajectory ({max(len(d) for d in dtrajs)} frames), got {lag}"
            )
        self.lag, self.n_units = lag, len(pieces)
        self.n_states = n = 1 + max(int(d.max()) for d in dtrajs)
        unit, code = [], []
        for k, (t, start, stop) in enumerate(pieces):
            begin = dtrajs[t][start : min(stop, max(len(dtrajs[t]) - lag, start))]
            pair, count = np.unique(begin * n + dtrajs[t][start + lag : start + lag + len(begin)], return_counts=True)
            unit.append(np.full(len(pair), k))
            code.append(np.stack([pair, count]))
        self._unit = np.concatenate(unit)
        self._pair, self._count = np.concatenate(code, axis=1)

    def counts(self, multiplicity: np.ndarray | None = None) -> Any:
        """Sparse count matrix ``(n_states, n_states)``; each unit counts `multiplicity` times."""
        from scipy.sparse import coo_matrix

        weight = self._count * (1.0 if multiplicity is None else multiplicity[self._unit])
        there = weight > 0
        where = np.divmod(self._pair[there], self.n_states)
        return coo_matrix((weight[there], where), shape=(self.n_states, self.n_states)).tocsr()

    def model(self, reversible: bool = True, multiplicity: np.ndarray | None = None) -> Chain:
        """The maximum-likelihood Markov model of the largest connected set of states."""
        counts = self.counts(multiplicity)
        markov = deeptime_module("markov")
        whole = markov.TransitionCountModel(counts, counting_mode="sliding", lagtime=self.lag)
        largest = whole.submodel_largest()
        limit = ITERATIONS if multiplicity is None else BOOTSTRAP_ITERATIONS
        estimator = deeptime_module("markov.msm").MaximumLikelihoodMSM(reversible=reversible, maxiter=limit)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*didn't converge")
            fitted = estimator.fit(largest).fetch_model()
        matrix = fitted.transition_matrix
        kept = float(largest.count_matrix.sum() / counts.sum())
        dense = matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
        return Chain(dense, np.asarray(fitted.stationary_distribution), np.asarray(largest.state_symbols), kept)


@dataclass(frozen=True)
class Chain:
    """A Markov chain on the states `symbols`; `kept` is the share of counted transitions within them."""

    matrix: np.ndarray
    stationary: np.ndarray
    symbols: np.ndarray
    kept: float

    def timescales(self, n: int, lag: float, reversible: bool) -> np.ndarray:
        """The n slowest, -lag / ln |eigenvalue|; NaN where there are no more states."""
        if reversible:
            root = np.sqrt(self.stationary)
            symmetric = root[:, None] * self.matrix / root
            values = np.abs(np.linalg.eigvalsh(0.5 * (symmetric + symmetric.T)))
        else:
            values = np.abs(np.linalg.eigvals(self.matrix))
        found = np.full(n, np.nan)
        rest = np.sort(values)[::-1][1 : n + 1]
        with np.errstate(divide="ignore"):
            found[: len(rest)] = -lag / np.log(np.minimum(rest, 1.0 - 1e-15))
        return found


@dataclass(frozen=True)
class ImpliedTimescales:
    """Timescales against the lag.

    Attributes:
        lags: ``(n_lags,)`` in the unit of `interval`. values: ``(n_lags, n)``, slowest first. low, high: 95 %
            bootstrap intervals, same shape. error: standard deviation of the bootstrap. kept: ``(n_lags,)`` share of
            the transitions that lie in the largest connected set of states, the only one that is modelled.
    """

    lags: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray
    kept: np.ndarray


def implied_timescales(
    dtrajs: Sequence[np.ndarray],
    lags: Sequence[int],
    n: int = 1,
    *,
    interval: float = 1.0,
    reversible: bool = True,
    resamples: int = 50,
    least_units: int = LEAST_UNITS,
    seed: int = 0,
) -> ImpliedTimescales:
    """Implied timescales of maximum-likelihood Markov models, -lag / ln lambda.

    Args:
        dtrajs: states ``(n_frames,)`` per trajectory. lags: frames. n: how many timescales. interval: between frames.
        reversible: with detailed balance. resamples: of the bootstrap; 0 leaves the intervals NaN.
        least_units: see `distributions.units`.

    Raises `ValueError` naming the argument for bad trajectories, lags that do not fit, or numbers below one.
    """
    arrays = checked_states(dtrajs)
    if n < 1 or resamples < 0 or len(lags) == 0:
        raise ValueError(
            f"n, resamples, lags: expected n >= 1, resamples >= 0, at least one lag, got {n}, {resamples}, {len(lags)}"
        )
    pieces = units([len(a) for a in arrays], least_units)
    random = np.random.default_rng(seed)
    values, spread, kept = [], [], []
    for lag in lags:
        transitions = Transitions(arrays, int(lag), pieces)
        chain = transitions.model(reversible)
        values.append(chain.timescales(n, lag * interval, reversible))
        kept.append(chain.kept)
        spread.append(
            [
                transitions.model(reversible, resample(random, len(pieces))).timescales(n, lag * interval, reversible)
                for _ in range(resamples)
            ]
        )
    low, high, error = intervals(np.array(spread).reshape(len(lags), resamples, n), axis=1)
    return ImpliedTimescales(np.array(lags) * interval, np.array(values), low, high, error, np.array(kept))


def resample(random: np.random.Generator, n: int) -> np.ndarray:
    return random.multinomial(n, np.full(n, 1.0 / n)).astype(float)


def intervals(spread: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Low and high end and standard deviation along the axis of resamples; NaN without any."""
    if spread.shape[axis] < 2:
        nothing = np.full(np.delete(spread.shape, axis), np.nan)
        return nothing, nothing.copy(), nothing.copy()
    tail = 0.5 * (1.0 - CONFIDENCE)
    low, high = np.quantile(spread, [tail, 1.0 - tail], axis=axis)
    return low, high, spread.std(axis=axis, ddof=1)


# -- without states --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearTimescales:
    """Slowest timescales ``(n,)`` of linear combinations, 95 % bootstrap intervals, and their standard deviation."""

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray


def implied_timescale_of(
    trajs: Sequence[np.ndarray],
    lag: int,
    n: int = 1,
    *,
    interval: float = 1.0,
    resamples: int = 50,
    least_units: int = LEAST_UNITS,
    seed: int = 0,
) -> LinearTimescales:
    """Timescales of the slowest linear combinations of the coordinates (TICA, reversible, mean free).

    Source: Perez-Hernandez et al., J. Chem. Phys. 2013, 139, 015102; covariances symmetrised over both ends of the lag.

    Args:
        trajs: ``(n_frames,)`` or ``(n_frames, n_dims)``. lag: frames. interval: between frames.

    Raises `ValueError` naming the argument for bad trajectories, a lag that does not fit, or more timescales than
    independent coordinates. Timescales of negative eigenvalues are NaN.
    """
    arrays = [a.reshape(len(a), -1).astype(np.float64) for a in checked_trajectories(trajs)]
    longest = max(len(a) for a in arrays)
    if not 1 <= lag < longest:
        raise ValueError(f"lag: expected from 1 to {longest - 1} frames, got {lag}")
    middle = np.concatenate(arrays).mean(0)
    sums = []
    pieces = units([len(a) for a in arrays], least_units)
    for k, start, stop in pieces:
        whole = arrays[k] - middle
        first = whole[start : min(stop, max(len(whole) - lag, start))]
        second = whole[start + lag : start + lag + len(first)]
        sums.append((len(first), first.sum(0) + second.sum(0), first.T @ first + second.T @ second, first.T @ second))
    number, linear, same, lagged = (np.array(column, dtype=float) for column in zip(*sums, strict=True))

    def estimate(weight: np.ndarray) -> np.ndarray:
        count = weight @ number
        mean = weight @ linear / (2.0 * count)
        c0 = np.tensordot(weight, same, 1) / (2.0 * count) - np.outer(mean, mean)
        ct = np.tensordot(weight, lagged, 1) / count
        return _slowest(c0, 0.5 * (ct + ct.T) - np.outer(mean, mean), n, lag * interval)

    random = np.random.default_rng(seed)
    spread = [estimate(resample(random, len(pieces))) for _ in range(resamples)]
    low, high, error = intervals(np.array(spread).reshape(resamples, n), axis=0)
    return LinearTimescales(estimate(np.ones(len(pieces))), low, high, error)


def _slowest(c0: np.ndarray, ct: np.ndarray, n: int, lag: float) -> np.ndarray:
    """Timescales from the generalised eigenvalues of the covariances, in their directions of nonzero variance."""
    variance, direction = np.linalg.eigh(c0)
    good = variance > 1e-10 * max(float(variance[-1]), 1e-300)
    if n > good.sum():
        raise ValueError(f"n: expected at most {int(good.sum())} timescales, one per independent coordinate, got {n}")
    whiten = direction[:, good] / np.sqrt(variance[good])
    values = np.sort(np.linalg.eigvalsh(whiten.T @ ct @ whiten))[::-1][:n]
    with np.errstate(divide="ignore", invalid="ignore"):
        return -lag / np.log(np.where(values > 0, np.minimum(values, 1.0 - 1e-15), np.nan))
