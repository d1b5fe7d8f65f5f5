"""states of trajectories -> does a Markov model at one lag predict the transitions at longer ones?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openmm_mlff.analysis.distributions import LEAST_UNITS, units
from openmm_mlff.analysis.kinetics import Chain, Transitions, checked_states, deeptime_module, intervals, resample


@dataclass(frozen=True)
class ChapmanKolmogorov:
    """Probabilities to be in set j a time after having been in set i.

    Attributes:
        times: ``(n_times,)`` multiples of the lag, the first one zero, in the unit of `interval`.
        predicted: ``(n_times, n_sets, n_sets)``, from powers of the model at the lag. estimated: the same, from a
            model at each multiple. *_low, *_high: their 95 % bootstrap intervals. *_error: standard deviations.
        memberships: ``(n_states, n_sets)`` of the sets.
    """

    times: np.ndarray
    predicted: np.ndarray
    predicted_low: np.ndarray
    predicted_high: np.ndarray
    predicted_error: np.ndarray
    estimated: np.ndarray
    estimated_low: np.ndarray
    estimated_high: np.ndarray
    estimated_error: np.ndarray
    memberships: np.ndarray

    @property
    def worst(self) -> float:
        """Largest difference of predicted and estimated probabilities, in units of their joint standard error."""
        error = np.hypot(self.predicted_error[1:], self.estimated_error[1:])
        gap = np.abs(self.predicted - self.estimated)[1:]
        return float(np.nanmax(np.where(error > 0, gap / np.where(error > 0, error, 1.0), 0.0)))


def metastable_sets(dtrajs: Sequence[np.ndarray], lag: int, n_sets: int, crisp: bool = False) -> np.ndarray:
    """Memberships ``(n_states, n_sets)`` by PCCA+ of the reversible Markov model at `lag` frames.

    Source: Roeblitz, Weber, Adv. Data Anal. Classif. 2013, 7, 147 (deeptime). States outside the largest connected set
    belong to no set (a row of zeros). With `crisp` every other state belongs to one set, that of its largest
    membership.
    """
    arrays = checked_states(dtrajs)
    transitions = Transitions(arrays, lag, units([len(a) for a in arrays], 1))
    chain = transitions.model()
    if not 2 <= n_sets <= len(chain.symbols):
        raise ValueError(f"n_sets: expected from 2 to the {len(chain.symbols)} connected states, got {n_sets}")
    with warnings.catch_warnings():
        # rounding gives the fast eigenvectors imaginary parts; the slow ones, which are used, are real
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        found = deeptime_module("markov").pcca(chain.matrix, n_sets, stationary_distribution=chain.stationary)
    memberships = np.zeros((transitions.n_states, n_sets))
    memberships[chain.symbols] = np.eye(n_sets)[found.memberships.argmax(axis=1)] if crisp else found.memberships
    return memberships


def chapman_kolmogorov(
    dtrajs: Sequence[np.ndarray],
    lag: int,
    multiples: Sequence[int],
    n_sets: int = 2,
    *,
    memberships: np.ndarray | None = None,
    interval: float = 1.0,
    reversible: bool = True,
    resamples: int = 50,
    least_units: int = LEAST_UNITS,
    seed: int = 0,
) -> ChapmanKolmogorov:
    """The Chapman-Kolmogorov test: T(k lag) against T(lag)^k, between sets of states.

    Source: Prinz et al., J. Chem. Phys. 2011, 134, 174105, section IV F.

    Args:
        dtrajs: states ``(n_frames,)`` per trajectory. lag: frames. multiples: k > 0, without the zero that the result
            begins with. n_sets: metastable sets, found by PCCA+ at `lag` unless `memberships` gives them
            (``(n_states, n_sets)``, for example those of other data on the same states; states beyond its rows belong
            to no set).
        interval: between frames. resamples, least_units, seed: of the bootstrap, as in `implied_timescales`.

    Raises `ValueError` naming the argument for bad trajectories, lags that do not fit, or other shapes.
    """
    arrays = checked_states(dtrajs)
    if len(multiples) == 0 or min(multiples) < 1:
        raise ValueError(f"multiples: expected at least one number >= 1, got {list(multiples)}")
    sets = metastable_sets(arrays, lag, n_sets) if memberships is None else np.asarray(memberships, dtype=float)
    n_states = 1 + max(int(a.max()) for a in arrays)
    if sets.ndim != 2:
        raise ValueError(f"memberships: expected shape (n_states, n_sets), got {sets.shape}")
    sets = np.pad(sets, ((0, max(0, n_states - len(sets))), (0, 0)))
    pieces = units([len(a) for a in arrays], least_units)
    base = Transitions(arrays, lag, pieces)
    longer = [Transitions(arrays, lag * int(k), pieces) for k in multiples]

    def both(weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        chain = base.model(reversible, weight)
        start = np.zeros(len(sets))
        start[chain.symbols] = chain.stationary
        zero = _between(chain, np.eye(len(chain.matrix)), sets, start)
        powers = [_between(chain, np.linalg.matrix_power(chain.matrix, int(k)), sets, start) for k in multiples]
        models = [transitions.model(reversible, weight) for transitions in longer]
        return np.stack([zero, *powers]), np.stack([zero, *(_between(m, m.matrix, sets, start) for m in models)])

    predicted, estimated = both(None)
    random = np.random.default_rng(seed)
    spread = np.array([both(resample(random, len(pieces))) for _ in range(resamples)])
    spread = spread.reshape(resamples, 2, *predicted.shape)
    of_predicted, of_estimated = intervals(spread[:, 0], axis=0), intervals(spread[:, 1], axis=0)
    times = np.array([0, *multiples]) * lag * interval
    return ChapmanKolmogorov(times, predicted, *of_predicted, estimated, *of_estimated, sets)


def _between(chain: Chain, matrix: np.ndarray, memberships: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Probability to be in set j, having started in set i with the weights `start` of the states, ``(n_sets, n_sets)``.

    The weights are those of the model at the lag, for all multiples.
    """
    member = memberships[chain.symbols]
    weight = start[chain.symbols, None] * member
    with np.errstate(invalid="ignore"):
        return (weight.T @ matrix @ member) / weight.sum(0)[:, None]
