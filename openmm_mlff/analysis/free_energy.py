"""work values, reduced energies -> free-energy differences with error bars and overlap.

All energies here are reduced (dimensionless), u = U/kT, and so are the free energies f = F/kT; `thermal_energy` gives
kT in eV. The forward work of a frame sampled in state 0 is u_1 - u_0, the reverse work of one of state 1 is u_0 - u_1.
Frames of one state may be one series or a list of them (independent runs), in order of time.

The estimates are pymbar's (extra ``analysis``). Their errors are those of an estimating equation: to first order each
frame moves the estimate by its influence a_n, so that var = sum_k g_k N_k var_k(a), where g_k is the statistical
inefficiency of the a_n of state k. Uncorrelated frames (g = 1) have the asymptotic error of M. R. Shirts,
J. D. Chodera, J. Chem. Phys. 129, 124105 (2008); correlated ones need no thinning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openmm_mlff.units import BOLTZMANN_EV

#: one series, or one for each independent run, in order of time
Series = np.ndarray | Sequence[np.ndarray]

#: least element of the overlap matrix between neighbouring states: P. V. Klimovich, M. R. Shirts, D. L. Mobley,
#: J. Comput. Aided Mol. Des. 29, 397 (2015)
LEAST_OVERLAP = 0.03


class InsufficientOverlap(ValueError):
    """Two ensembles share too few frames for a free energy between them.

    Attributes:
        pair: names of the two. overlap: what was found. least: what is accepted.
    """

    def __init__(self, pair: tuple[str, str], overlap: float, least: float) -> None:
        self.pair, self.overlap, self.least = pair, overlap, least
        super().__init__(
            f"overlap: expected at least {least:g} between the ensembles {pair[0]!r} and {pair[1]!r}, got "
            f"{overlap:.2g}; sample longer, or put states between them"
        )


@dataclass(frozen=True)
class FreeEnergy:
    """A difference of free energies in kT.

    Attributes:
        delta: f_1 - f_0. error: its standard error.
        inefficiency: of the frames of each sampled state (frames per independent one).
        overlap: matrix of the two states, ``(2, 2)``; [i, j] is the probability that a frame of i is met in j, 0.5
            everywhere for equal ensembles with equally many frames. None for one-sided estimates.
        influence: of each frame, one array per sampled state.
    """

    delta: float
    error: float
    inefficiency: tuple[float, ...]
    overlap: np.ndarray | None = field(default=None, repr=False)
    influence: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)

    def times(self, energy: float) -> tuple[float, float]:
        """Value and error in the unit of `energy`, which is kT."""
        return self.delta * energy, self.error * energy


@dataclass(frozen=True)
class FreeEnergies:
    """Free energies of K states in kT.

    Attributes:
        delta: f_k - f_0, ``(K,)``. error: their standard errors, ``(K,)``.
        overlap: matrix, ``(K, K)``, rows with sum 1. inefficiency: of the frames of each state, for f_K-1 - f_0.
    """

    delta: np.ndarray
    error: np.ndarray
    overlap: np.ndarray
    inefficiency: tuple[float, ...]


def thermal_energy(temperature: float) -> float:
    """kT in eV; raises `ValueError` for a temperature (K) that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number (K), got {temperature!r}")
    return BOLTZMANN_EV * temperature


@contextmanager
def _quiet() -> Iterator[None]:
    """pymbar without its notices and without its change of numpy's settings for the whole process."""
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        logger.setLevel(level)


def pymbar_module(name: str = "pymbar") -> Any:
    """pymbar or one of its modules, or an `ImportError` that says what to install."""
    from importlib import import_module

    try:
        with _quiet():
            return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"free energies need the package pymbar ({error}); install it with: pip install 'openmm-mlff[analysis]'"
        ) from error


def _runs(name: str, values: Series, rows: int | None = None) -> list[np.ndarray]:
    """The runs in float64, ``(n,)`` each or ``(rows, n)``; `ValueError` naming the argument for anything else."""
    single = isinstance(values, np.ndarray) and values.ndim == (1 if rows is None else 2)
    runs = [np.asarray(run, dtype=np.float64) for run in ([values] if single else values)]
    shape = "(n,)" if rows is None else f"({rows}, n)"
    for run in runs:
        if run.ndim != (1 if rows is None else 2) or (rows is not None and len(run) != rows):
            raise ValueError(f"{name}: expected runs of shape {shape}, got {run.shape}")
        if not np.isfinite(run).all():
            raise ValueError(f"{name}: expected finite numbers, got {int((~np.isfinite(run)).sum())} that are not")
    if sum(run.shape[-1] for run in runs) < 2:
        raise ValueError(f"{name}: expected at least 2 frames, got {sum(run.shape[-1] for run in runs)}")
    return runs


# -- correlated samples ------------------------------------------------------------------------------------------


def statistical_inefficiency(values: Series) -> float:
    """How many correlated frames are worth one independent one, g = 1 + 2 tau, between 1 and their number.

    J. D. Chodera et al., J. Chem. Theory Comput. 3, 26 (2007), by pymbar. Runs are taken about their common mean, so
    that runs which sit in different places count as correlated.
    """
    runs = [run for run in _runs("values", values) if len(run) > 0]
    everything = np.concatenate(runs)
    if np.ptp(everything) <= 1e-12 * np.abs(everything).max(initial=1e-300):
        return 1.0
    timeseries = pymbar_module("pymbar.timeseries")
    if len(runs) == 1:
        g = timeseries.statistical_inefficiency(everything)
    elif len({len(run) for run in runs}) == 1 and len(runs[0]) < 3:
        return 1.0
    else:
        g = timeseries.statistical_inefficiency_multiple(runs)
    return float(np.clip(g, 1.0, len(everything)))


def decorrelated(values: np.ndarray) -> np.ndarray:
    """Indices of frames of one series, ``(n,)``, that are independent of one another: every g-th."""
    (series,) = _runs("values", np.asarray(values))
    g = statistical_inefficiency(series)
    indices = pymbar_module("pymbar.timeseries").subsample_correlated_data(series, g=g)
    return np.asarray(indices, dtype=np.int64)


def effective_samples(work: Series) -> float:
    """exp(-sum_i w_i ln w_i) for w_i ~ exp(-work_i): how many frames of a state carry the averages of the other one."""
    values = np.concatenate(_runs("work", work))
    logarithm = -values - _log_sum(-values)
    return float(np.exp(-np.sum(np.exp(logarithm) * logarithm)))


def _log_sum(x: np.ndarray, axis: int | None = None) -> Any:
    """ln sum exp(x) without overflow."""
    top = x.max(axis=axis, keepdims=True)
    total = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return total.squeeze(axis) if axis is not None else float(total.squeeze())


def _spread(influence: np.ndarray, lengths: Sequence[int]) -> tuple[float, float]:
    """Variance of the sum of the influences of one state, g N var(a), and g."""
    runs = np.split(influence, np.cumsum(lengths)[:-1])
    g = statistical_inefficiency(runs)
    return g * len(influence) * float(np.var(influence, ddof=1)), g


# -- estimators --------------------------------------------------------------------------------------------------


def zwanzig(work: Series, reverse: bool = False) -> FreeEnergy:
    """f_1 - f_0 from frames of one state: -ln <exp(-w)>_0, or ln <exp(-w)>_1 from reverse work.

    R. W. Zwanzig, J. Chem. Phys. 22, 1420 (1954). Trust it only where `effective_samples` is near their number.
    """
    runs = _runs("work", work)
    values = np.concatenate(runs)
    log_mean = _log_sum(-values) - math.log(len(values))
    sign = 1.0 if reverse else -1.0
    influence = sign * (np.exp(-values - log_mean) - 1.0) / len(values)
    variance, g = _spread(influence, [len(run) for run in runs])
    return FreeEnergy(sign * log_mean, math.sqrt(variance), (g,), None, (influence,))


def bar(
    forward: Series,
    reverse: Series,
    least_overlap: float | None = LEAST_OVERLAP,
    names: tuple[str, str] = ("0", "1"),
) -> FreeEnergy:
    """f_1 - f_0 by the Bennett acceptance ratio (C. H. Bennett, J. Comput. Phys. 22, 245 (1976)).

    Args:
        forward: u_1 - u_0 of frames of state 0. reverse: u_0 - u_1 of frames of state 1.
        least_overlap: least off-diagonal element of the overlap matrix that is accepted; None accepts any.
        names: of the two ensembles, for messages.

    Raises `InsufficientOverlap`, and `ValueError` for work that is not finite or fewer than two frames.
    """
    f_runs, r_runs = _runs("forward", forward), _runs("reverse", reverse)
    w_f, w_r = np.concatenate(f_runs), np.concatenate(r_runs)
    f = np.array([0.0, _bennett(w_f, w_r, least_overlap, names)])
    u = np.zeros((2, len(w_f) + len(w_r)))
    u[1, : len(w_f)], u[0, len(w_f) :] = w_f, w_r
    lengths = [[len(run) for run in f_runs], [len(run) for run in r_runs]]
    overlap, influences = _response(u, f, [len(w_f), len(w_r)], least_overlap, names)
    parts = tuple(np.split(influences[1], [len(w_f)]))
    spreads = [_spread(part, length) for part, length in zip(parts, lengths, strict=True)]
    variance = sum(v for v, _ in spreads)
    return FreeEnergy(float(f[1]), math.sqrt(variance), tuple(g for _, g in spreads), overlap, parts)


def _bennett(w_f: np.ndarray, w_r: np.ndarray, least_overlap: float | None, names: tuple[str, str]) -> float:
    """The estimate by pymbar."""
    ends = np.concatenate([w_f, -w_r])
    if np.ptp(ends) < 1e-9:  # equal ensembles: the estimate lies within, where pymbar's search has no room
        return float(ends.mean())
    # pymbar stops at a relative change, which says nothing about a difference near 0: shift it to about 10
    shift = 10.0 - 0.5 * (np.median(w_f) - np.median(w_r))
    try:
        with _quiet():
            found = pymbar_module().bar(w_f + shift, w_r - shift, compute_uncertainty=False)
    except Exception as error:
        raise InsufficientOverlap(names, 0.0, least_overlap or 0.0) from error
    return float(found["Delta_f"]) - shift


def mbar(
    energies: Sequence[Series],
    least_overlap: float | None = LEAST_OVERLAP,
    names: Sequence[str] | None = None,
) -> FreeEnergies:
    """Free energies of K states by MBAR (M. R. Shirts, J. D. Chodera, J. Chem. Phys. 129, 124105 (2008)).

    Args:
        energies: for each state k its frames' reduced energies under all states, ``(K, n_k)`` or a list of such runs.
        least_overlap: least element of the overlap matrix between neighbouring states (k and k+1) that is accepted.
        names: of the states, for messages.

    Raises as `bar`, and `RuntimeError` if the equations were not solved.
    """
    K = len(energies)
    if K < 2:
        raise ValueError(f"energies: expected at least 2 states, got {K}")
    runs = [_runs(f"energies[{k}]", state, rows=K) for k, state in enumerate(energies)]
    names = [str(k) for k in range(K)] if names is None else list(names)
    u = np.concatenate([run for state in runs for run in state], axis=1)
    u = u - u.min(axis=0)  # a constant per frame cancels
    lengths = [[run.shape[1] for run in state] for state in runs]
    counts = [sum(length) for length in lengths]
    try:
        with _quiet():
            solver = pymbar_module().MBAR(u, counts, relative_tolerance=1e-10)
    except Exception as failure:
        raise RuntimeError(f"MBAR did not converge ({type(failure).__name__}: {failure})") from failure
    f = np.asarray(solver.f_k, dtype=np.float64)
    f = f - f[0]
    overlap, influences = _response(u, f, counts, least_overlap, names)
    error, inefficiency = np.zeros(K), (1.0,) * K
    for k in range(1, K):
        parts = np.split(influences[k], np.cumsum(counts)[:-1])
        spreads = [_spread(part, length) for part, length in zip(parts, lengths, strict=True)]
        error[k], inefficiency = math.sqrt(sum(v for v, _ in spreads)), tuple(g for _, g in spreads)
    return FreeEnergies(f, error, overlap, inefficiency)


def _response(
    u: np.ndarray, f: np.ndarray, counts: Sequence[int], least: float | None, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Overlap matrix ``(K, K)``, and the influence of each frame on f_k - f_0, ``(K, N)``.

    p_k(x) = N_k exp(f_k - u_k(x)) / sum_l N_l exp(f_l - u_l(x)) is the probability that x comes from k. MBAR solves
    sum_n p_k(x_n) = N_k, whose derivative by f is H = sum_n [diag(p) - p p^T]; so a frame moves f by -H^-1 p(x_n),
    where f_0 = 0 takes the first row and column away.
    """
    logarithm = np.log(counts)[:, None] + f[:, None] - u
    p = np.exp(logarithm - _log_sum(logarithm, axis=0))
    imbalance = float(np.abs(p.sum(axis=1) - counts).max() / np.sum(counts))
    overlap = (p @ p.T) / np.asarray(counts)[:, None]
    for k in range(len(counts) - 1):
        found = min(overlap[k, k + 1], overlap[k + 1, k])
        if found < (1e-12 if least is None else least):
            raise InsufficientOverlap((names[k], names[k + 1]), float(found), least or 0.0)
    if imbalance > 1e-6:
        raise RuntimeError(f"the equations for the free energies were not solved (imbalance {imbalance:.1e})")
    derivative = np.diag(p.sum(axis=1)) - p @ p.T
    influence = np.zeros_like(p)
    influence[1:] = -np.linalg.solve(derivative[1:, 1:], p[1:])
    return overlap, influence


def block_bootstrap(
    estimator: Callable[..., float], *states: Series, block: int | None = None, samples: int = 200, seed: int = 0
) -> float:
    """Standard error of ``estimator(*states)`` from resampled blocks of frames, each state by itself.

    Circular blocks (D. N. Politis, J. P. Romano, in Exploring the Limits of Bootstrap (1992), p. 263) keep the
    correlation of neighbouring frames.

    Args:
        states: arrays with the frames on the last axis, or lists of such runs; handed to the estimator concatenated.
        block: frames in a block; None takes 5 statistical inefficiencies (of the differences to the first row where
            there are several), which misses about a tenth of the variance of correlated frames.
    """
    rng = np.random.default_rng(seed)
    runs = [[state] if isinstance(state, np.ndarray) else list(state) for state in states]
    sizes = [_block(state) if block is None else block for state in runs]
    results = []
    for _ in range(samples):
        drawn = [
            np.concatenate([_resampled(run, size, rng) for run in state], axis=-1)
            for state, size in zip(runs, sizes, strict=True)
        ]
        results.append(estimator(*drawn))
    return float(np.std(results, ddof=1))


def _block(runs: Sequence[np.ndarray]) -> int:
    """Five statistical inefficiencies, of the slowest row."""
    if runs[0].ndim == 1:
        return math.ceil(5 * statistical_inefficiency(runs))
    rows = [[run[k] - run[0] for run in runs] for k in range(1, len(runs[0]))]
    return math.ceil(5 * max(statistical_inefficiency(row) for row in rows))


def _resampled(run: np.ndarray, block: int, rng: np.random.Generator) -> np.ndarray:
    n = run.shape[-1]
    block = min(block, n)
    starts = rng.integers(0, n, size=math.ceil(n / block))
    indices = (starts[:, None] + np.arange(block)).ravel()[:n] % n
    return run[..., indices]


# -- along time and along training -----------------------------------------------------------------------------


def convergence(
    estimator: Callable[..., tuple[float, float]], *states: Series, points: int = 10
) -> dict[str, np.ndarray]:
    """An estimate from growing parts of the frames, from the start and from the end.

    Args:
        estimator: ``estimator(*states) -> (value, error)`` from lists of runs.
        states: arrays with the frames on the last axis, or lists of such runs.

    Returns ``fraction`` ``(points,)``, and ``from_start``, ``from_end`` ``(points, 2)`` with value and error; NaN where
    the estimator raises `ValueError` (too few frames, no overlap) or `RuntimeError` (equations that few frames do not
    solve). Bands that overlap say that the result does not drift.
    """
    runs = [[state] if isinstance(state, np.ndarray) else list(state) for state in states]
    fractions = np.arange(1, points + 1) / points
    table = {
        "fraction": fractions,
        "from_start": np.full((points, 2), np.nan),
        "from_end": np.full((points, 2), np.nan),
    }
    for i, fraction in enumerate(fractions):
        for name, part in (("from_start", _first), ("from_end", _last)):
            with suppress(ValueError, RuntimeError):
                table[name][i] = estimator(*([part(run, fraction) for run in state] for state in runs))
    return table


def _first(run: np.ndarray, fraction: float) -> np.ndarray:
    return run[..., : round(fraction * run.shape[-1])]


def _last(run: np.ndarray, fraction: float) -> np.ndarray:
    return run[..., run.shape[-1] - round(fraction * run.shape[-1]) :]


class AccumulatedFreeEnergy:
    """f of the latest ensemble minus f of the first, as a sum of BAR steps between ensembles that follow one another.

    Two steps share the ensemble between them; with ``shared=True`` (the same frames, in the same order, were the
    reverse side of the last step and are the forward side of this one) their covariance counts.
    """

    def __init__(self) -> None:
        self.delta = 0.0
        self.steps = 0
        self._closed = 0.0  # variance of all ensembles but the last
        self._last = np.zeros(0)  # influence of the frames of the last ensemble

    def add(self, step: FreeEnergy, shared: bool = True) -> None:
        """Add a step from `bar`; raises `ValueError` if a shared ensemble changed its number of frames."""
        if len(step.influence) != 2:
            raise ValueError("step: expected an estimate from frames of both ends (bar), got a one-sided one")
        first, last = step.influence
        if shared and self.steps:
            if len(first) != len(self._last):
                raise ValueError(
                    f"step: expected {len(self._last)} forward frames, as the last step had, got {len(first)}"
                )
            first = first + self._last
        elif self.steps:
            self._closed += _spread(self._last, [len(self._last)])[0]
        self._closed += _spread(first, [len(first)])[0]
        self._last = last
        self.delta += step.delta
        self.steps += 1

    @property
    def error(self) -> float:
        """Standard error of `delta`, kT."""
        return math.sqrt(self._closed + (_spread(self._last, [len(self._last)])[0] if self.steps else 0.0))

    def state(self) -> dict[str, Any]:
        """Plain data to go on from."""
        return {"delta": self.delta, "steps": self.steps, "closed": self._closed, "last": self._last.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AccumulatedFreeEnergy:
        """What `state` described."""
        self = cls()
        self.delta, self.steps, self._closed = float(state["delta"]), int(state["steps"]), float(state["closed"])
        self._last = np.asarray(state["last"], dtype=np.float64)
        return self
