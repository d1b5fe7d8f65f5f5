"""trajectories -> times of first passage between core sets, and mean residence times.

A core set is a region deep inside a state. A trajectory belongs to the core that it visited last, so that crossings of
a barrier that turn back at once do not count. From the moment of entering core A (coming from B) until B is entered
for the first time is one first passage A -> B.

Such times depend on how often one looks: compare them at the same spacing of frames only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Protocol

import numpy as np

from openmm_mlff.analysis.distributions import LEAST_UNITS, checked_trajectories, jackknife_ratio, units
from openmm_mlff.analysis.observables import Estimate


class Core(Protocol):
    """A named region: calling it with points ``(n, n_dims)`` gives a mask ``(n,)``."""

    @property
    def name(self) -> str: ...

    def __call__(self, points: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Ellipse:
    """An ellipse in the plane (a disc with equal semi-axes).

    Attributes:
        centre, semi_axes: in the unit of the points. angle: degrees, from the first axis to the first semi-axis,
            counter-clockwise. period: of both coordinates (360 for torsions in degrees); None on a plane.
    """

    name: str
    centre: tuple[float, float]
    semi_axes: tuple[float, float]
    angle: float = 0.0
    period: float | None = None

    def __post_init__(self) -> None:
        if not all(s > 0 for s in self.semi_axes):
            raise ValueError(f"semi_axes: expected two positive numbers, got {self.semi_axes}")

    def __call__(self, points: np.ndarray) -> np.ndarray:
        dx, dy = points[..., 0] - self.centre[0], points[..., 1] - self.centre[1]
        if self.period is not None:
            dx, dy = (d - self.period * np.round(d / self.period) for d in (dx, dy))
        c, s = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        u, v = (c * dx + s * dy) / self.semi_axes[0], (c * dy - s * dx) / self.semi_axes[1]
        return u * u + v * v <= 1.0


@dataclass(frozen=True)
class NamedRegion:
    """Any region as a core: ``NamedRegion("phi>0", lambda points: points[:, 0] > 0)``."""

    name: str
    inside: Callable[[np.ndarray], np.ndarray]

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return np.asarray(self.inside(points), dtype=bool)


@dataclass(frozen=True)
class Residence:
    """Mean time until an event, from runs that may have ended before it.

    Attributes:
        mean: total time / events, infinite without events. error: mean / sqrt(events), or from resampled runs where
            stated. low, high: the exact 95 % interval of an exponential distribution. events, total_time: counted.
    """

    mean: float
    error: float
    low: float
    high: float
    events: int
    total_time: float


def exponential_residence(runs: Sequence[tuple[float, bool]]) -> Residence:
    """Maximum-likelihood mean of exponentially distributed times with censoring.

    The estimate is total time / events; its 95 % interval comes from the chi-squared distribution of 2 t / tau, with
    2 n degrees of freedom above and 2 n + 2 below for watching that stops at a given time (Lawless, Statistical Models
    and Methods for Lifetime Data, 2003, section 4.1).

    Args:
        runs: duration and whether it ended by the event (False: the run stopped first).

    Raises `ValueError` for no runs, or durations that are negative or not finite.
    """
    durations = np.array([float(duration) for duration, _ in runs])
    if len(durations) == 0 or not (np.isfinite(durations).all() and (durations >= 0).all() and durations.sum() > 0):
        raise ValueError("runs: expected at least one finite duration >= 0 with a positive sum, got none such")
    return residence(float(durations.sum()), sum(bool(ended) for _, ended in runs))


def residence(total_time: float, events: int) -> Residence:
    """`exponential_residence` from its two sums."""
    from scipy.stats import chi2

    low = 2.0 * total_time / float(chi2.ppf(0.975, 2 * events + 2))
    if events == 0:
        return Residence(float("inf"), float("nan"), low, float("inf"), 0, total_time)
    high = 2.0 * total_time / float(chi2.ppf(0.025, 2 * events))
    mean = total_time / events
    return Residence(mean, float(mean / np.sqrt(events)), low, high, events, total_time)


@dataclass(frozen=True)
class FirstPassages:
    """First passages from core `start` to core `end`, in the unit of time of the frames.

    Attributes:
        start, end: names of the cores.
        times: ``(n,)`` durations of completed passages, whose beginning was seen.
        open_times: passages whose beginning was seen and that the trajectory's end cut off.
        time_at_risk: total time that belonged to `start` (also before the first entry that was seen, if the
            trajectory began in `start`). events: entries of `end` out of it.
        rate_time: time_at_risk / events. For stationary trajectories their ends do not bias it, unlike the mean of
            `times`, which misses the long ones. Their beginnings do a little, where it is not known yet which core
            they come from; a burn-in takes that away. Its error is the jackknife's over runs.
        from_core: mean time until `end`, averaged over all frames inside core `start`; NaN where that was not asked
            for. Frames after which `end` was not reached do not count, which makes short trajectories biased.
    """

    start: str
    end: str
    times: np.ndarray
    open_times: np.ndarray
    time_at_risk: float
    events: int
    rate_time: Estimate
    from_core: Estimate = field(default_factory=lambda: Estimate(float("nan"), float("nan"), 0.0))

    @property
    def n(self) -> int:
        """Completed passages."""
        return len(self.times)

    @property
    def mean(self) -> float:
        """Of the completed passages; NaN if there is none."""
        return float(self.times.mean()) if self.n else float("nan")

    @property
    def sem(self) -> float:
        """Standard error of `mean`, the passages being independent of one another."""
        return float(self.times.std(ddof=1) / np.sqrt(self.n)) if self.n > 1 else float("nan")

    @property
    def residence(self) -> Residence:
        """`time_at_risk` and `events` as an exponential mean with its interval."""
        return residence(self.time_at_risk, self.events)

    def summary(self) -> dict[str, float | int | str | None]:
        """The figures without the lists, for tables and JSON; None for what is not known."""
        figures: dict[str, float | int | str] = {
            "start": self.start, "end": self.end, "mean": self.mean, "sem": self.sem, "n": self.n,
            "rate_time": self.rate_time.value, "rate_time_error": self.rate_time.error,
            "time_at_risk": self.time_at_risk, "events": self.events, "censored": len(self.open_times),
            "from_core": self.from_core.value, "from_core_error": self.from_core.error,
        }  # fmt: skip
        return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in figures.items()}


def hitting_times(
    trajs: Sequence[np.ndarray],
    cores: Sequence[Core],
    interval: float = 1.0,
    *,
    burn_in: float = 0.0,
    least_units: int = LEAST_UNITS,
) -> dict[tuple[str, str], FirstPassages]:
    """First passages between each ordered pair of cores; trajectories are kept apart.

    With more than two cores each pair is looked at by itself: the others count as the space between.

    Args:
        trajs: ``(n_frames, n_dims)`` each. interval: between frames.
        burn_in: time at the beginning of each trajectory that tells which core it comes from, but does not count as
            time at risk, nor its events. least_units: see `distributions.units`; if there are fewer trajectories,
            their pieces carry the error bars (no passage is cut by that).

    Returns passages by the names ``(start, end)``. Raises `ValueError` naming the argument for fewer than two cores,
    names that repeat, cores that overlap in a frame, or bad trajectories.
    """
    arrays = checked_trajectories(trajs)
    _check_cores(cores)
    if not interval > 0:
        raise ValueError(f"interval: expected a positive time, got {interval!r}")
    skip = round(burn_in / interval)
    if not 0 <= skip < max(len(a) for a in arrays):
        raise ValueError(f"burn_in: expected a time >= 0 shorter than the longest trajectory, got {burn_in!r}")
    masks = {core.name: [np.asarray(core(a), dtype=bool) for a in arrays] for core in cores}
    pieces = units([len(a) for a in arrays], least_units)
    found = {}
    for start, end in permutations([core.name for core in cores], 2):
        found[start, end] = _pair(masks[start], masks[end], start, end, interval, skip, pieces)
    return found


def _check_cores(cores: Sequence[Core]) -> None:
    names = [core.name for core in cores]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"cores: expected at least two with names of their own, got {names}")


def _pair(
    starts: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
    start: str,
    end: str,
    interval: float,
    skip: int,
    pieces: Sequence[tuple[int, int, int]],
) -> FirstPassages:
    times: list[np.ndarray] = []
    cut_off: list[float] = []
    at_risk, hits, waits, inside = [], [], [], []
    for in_start, in_end in zip(starts, ends, strict=True):
        if (in_start & in_end).any():
            raise ValueError(f"cores: expected {start} and {end} not to overlap, but a frame is in both")
        last = _last_core(in_start, in_end)
        changes = np.flatnonzero((last[1:] != last[:-1]) & (last[:-1] >= 0)) + 1
        entries, exits = changes[last[changes] == 0], changes[last[changes] == 1]
        later = np.searchsorted(exits, entries, "right")
        done = later < len(exits)
        times.append((exits[later[done]] - entries[done]) * interval)
        cut_off += [float(len(last) - 1 - e) * interval for e in entries[~done]]
        risk = np.append(last[:-1] == 0, False)
        risk[:skip] = False
        at_risk.append(risk)
        hit = np.zeros(len(last), dtype=bool)
        hit[exits[exits > skip]] = True
        hits.append(hit)
        # the next frame in `end` after each frame in `start`
        arrivals = np.flatnonzero(in_end)
        next_one = np.searchsorted(arrivals, np.arange(len(last)))
        counted = in_start & (next_one < len(arrivals))
        wait = np.zeros(len(last))
        wait[counted] = (arrivals[next_one[counted]] - np.flatnonzero(counted)) * interval
        waits.append(wait)
        inside.append(counted)

    def totals(rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([rows[k][a:b].sum() for k, a, b in pieces], dtype=float)

    risk_time, events = totals(at_risk) * interval, totals(hits)
    return FirstPassages(
        start, end, np.concatenate(times), np.array(cut_off), float(risk_time.sum()), int(events.sum()),
        jackknife_ratio(risk_time, events), jackknife_ratio(totals(waits), totals(inside)),
    )  # fmt: skip


def _last_core(in_first: np.ndarray, in_second: np.ndarray) -> np.ndarray:
    """The core visited last, per frame: 0, 1, or -1 before the first visit."""
    label = np.where(in_first, 0, np.where(in_second, 1, -1))
    where = np.maximum.accumulate(np.where(label >= 0, np.arange(len(label)), -1))
    return np.where(where >= 0, label[np.maximum(where, 0)], -1)


class PassageWatch:
    """First passages of many walkers watched as they go, without keeping frames.

        watch = PassageWatch(cores, n_walkers)
        for each look: watch.update(points, time)
        watch.passages()

    Walkers are the units of the error bars. Raises `ValueError` as `hitting_times` does.
    """

    def __init__(self, cores: Sequence[Core], n_walkers: int) -> None:
        _check_cores(cores)
        self.cores = list(cores)
        self.pairs = list(combinations(range(len(self.cores)), 2))
        shape = (len(self.pairs), n_walkers)
        self._last = np.full(shape, -1)
        self._since = np.full(shape, np.nan)  # when the core was entered, NaN if that was not seen
        self._counted = np.full(shape, np.nan)  # until when time at risk has been booked
        self._risk = np.zeros((*shape, 2))
        self._events = np.zeros((*shape, 2), dtype=np.int64)
        self._times: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in self.pairs]
        self._now = 0.0

    def update(self, points: np.ndarray, time: float) -> None:
        """Look at all walkers: points ``(n_walkers, n_dims)`` at this time, later than the last one."""
        inside = [core(points) for core in self.cores]
        self._now = time
        for p, (first, second) in enumerate(self.pairs):
            last = self._last[p]
            arrived = (inside[first] & (last != 0)) | (inside[second] & (last != 1))
            if arrived.any():
                self._arrive(p, np.flatnonzero(arrived), inside[first], inside[second])

    def _arrive(self, p: int, walkers: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        if (first[walkers] & second[walkers]).any():
            raise ValueError("cores: expected them not to overlap, but a walker is in two")
        before = self._last[p, walkers]
        known = before >= 0
        passed, side = walkers[known], before[known]
        self._risk[p, passed, side] += self._now - self._counted[p, passed]
        self._events[p, passed, side] += 1
        durations = self._now - self._since[p, passed]
        for s in (0, 1):
            seen = durations[(side == s) & np.isfinite(durations)]
            if len(seen):
                self._times[p][s].append(seen)
        self._since[p, passed] = self._now
        self._counted[p, walkers] = self._now
        self._last[p, walkers] = np.where(first[walkers], 0, 1)

    def forget(self) -> None:
        """Start counting from the last look on; walkers keep the core they come from, and since when."""
        self._risk[:] = 0.0
        self._events[:] = 0
        self._counted = np.where(self._last >= 0, self._now, np.nan)
        self._times = [([], []) for _ in self.pairs]

    def passages(self) -> dict[tuple[str, str], FirstPassages]:
        """What has been seen up to the last look, by the names ``(start, end)``."""
        found = {}
        for p, pair in enumerate(self.pairs):
            names = [self.cores[k].name for k in pair]
            for side in (0, 1):
                here = self._last[p] == side
                risk = self._risk[p, :, side] + np.where(here, self._now - self._counted[p], 0.0)
                events = self._events[p, :, side]
                open_times = (self._now - self._since[p])[here]
                times = self._times[p][side]
                start, end = names[side], names[1 - side]
                found[start, end] = FirstPassages(
                    start, end, np.concatenate(times) if times else np.empty(0),
                    open_times[np.isfinite(open_times)], float(risk.sum()), int(events.sum()),
                    jackknife_ratio(risk, events.astype(float)),
                )  # fmt: skip
        return found
