"""latent coordinates and decoded frames -> Markov states, time scales and passages of every source, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from openmm_led.comparison import AUTOENCODER, MD, Kinetics, Row, Seen, Settings
from openmm_led.views import FEW_RESIDUES, View, Views
from openmm_mlff.analysis.chapman_kolmogorov import chapman_kolmogorov, metastable_sets
from openmm_mlff.analysis.distributions import populations
from openmm_mlff.analysis.kinetics import Clusters, ImpliedTimescales, implied_timescales
from openmm_mlff.analysis.passages import FirstPassages, NamedRegion, hitting_times

#: what the estimators of deeptime raise for data that are too few
UNFIT = (ValueError, RuntimeError, AssertionError)
#: lags (frames) at which time scales are looked at, as far as the runs allow
LAGS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
#: multiples of the lag in Chapman-Kolmogorov tests
MULTIPLES = (1, 2, 3, 4, 5)
#: a state belongs to the core of a metastable set from this membership on
CORE = 0.8
#: share of frames from which states without a way back and forth to the others count as a set of their own
ISLAND = 0.01


def compare_kinetics(
    known: Seen, seen: dict[str, Seen], views: Views, lag: int, interval: float, chosen: Settings, notes: list[str]
) -> dict[str, dict[str, Kinetics]]:
    """By space and source; in latent space the autoencoder changes nothing, so it has no row there."""
    spaces: dict[str, tuple[list[np.ndarray], dict[str, list[np.ndarray]]]] = {
        "latent": (known.z, {name: s.z for name, s in seen.items() if name != AUTOENCODER}),
        "decoded": (views.space(known.views), {name: views.space(s.views) for name, s in seen.items()}),
    }
    found: dict[str, dict[str, Kinetics]] = {}
    for space, (points, sources) in spaces.items():
        total = sum(len(p) for p in points)
        states = Clusters.fit(points, min(chosen.states, max(2, total // 20)), chosen.seed)
        dtrajs = [states.assign(p) for p in points]
        members: np.ndarray | None = None
        try:
            members = _sets(dtrajs, lag, chosen.sets)
            notes += _describe_cores(space, dtrajs, members, known, views.views)
        except UNFIT as error:
            notes.append(f"no metastable sets in {space} space ({' '.join(str(error).split())[:120]})")
        found[space] = {}
        for name, runs in sources.items():
            try:
                found[space][name] = _source_kinetics([states.assign(r) for r in runs], members, lag, interval, chosen)
            except UNFIT as error:
                notes.append(f"no time scales of {name} in {space} space ({' '.join(str(error).split())[:120]})")
    return found


def _sets(dtrajs: list[np.ndarray], lag: int, n_sets: int) -> np.ndarray:
    """Memberships ``(n_states, n)`` of metastable sets, the largest first.

    States that MD leaves and never enters, or the other way round, are in no Markov model; together they are one more
    set if they hold enough frames.
    """
    members = metastable_sets(dtrajs, lag, n_sets)
    share = np.bincount(np.concatenate(dtrajs), minlength=len(members)) / sum(len(d) for d in dtrajs)
    members = members[:, np.argsort(-(share @ members))]
    alone = (members.sum(1) == 0).astype(float)
    return np.column_stack([members, alone]) if share @ alone >= ISLAND else members


def _describe_cores(
    space: str, dtrajs: list[np.ndarray], members: np.ndarray, known: Seen, views: Sequence[View]
) -> Iterator[str]:
    """One line per core: where it is."""
    states = np.concatenate(dtrajs)
    torsions = [v for v in views if v.name.startswith("torsions")]
    others = [v for v in views if v not in torsions]
    telling = torsions or others if len(torsions) <= FEW_RESIDUES else others
    for k in range(members.shape[1]):
        inside = members[states, k] >= CORE
        if not inside.any():
            yield f"core {_letter(k)}, {space}: no frame of MD"
            continue
        places = []
        for view in telling:
            for c, column in enumerate(view.columns[:2]):
                x = np.concatenate(known.views[view.name])[inside, c]
                middle = x.mean() if view.period is None else _circular_mean(x, view.period)
                places.append(f"{named(view, column)} {middle:.3g}")
        yield f"core {_letter(k)}, {space}: {', '.join(places)}; {inside.mean():.1%} of the frames of MD"


def _circular_mean(x: np.ndarray, period: float) -> float:
    return float(np.angle(np.exp(2j * np.pi * x / period).mean()) * period / (2 * np.pi))


def _source_kinetics(
    dtrajs: list[np.ndarray], members: np.ndarray | None, lag: int, interval: float, chosen: Settings
) -> Kinetics:
    middle = float(np.median([len(d) for d in dtrajs]))
    lags = sorted({lag, *(x for x in LAGS if 5 * x <= middle)})
    times = implied_timescales(
        dtrajs, lags, chosen.timescales, interval=interval, resamples=chosen.resamples, seed=chosen.seed
    )
    if members is None:
        return Kinetics(times, None, {}, {})
    multiples = [k for k in MULTIPLES if 2 * k * lag <= middle]
    padded = np.zeros((max(len(members), 1 + max(int(d.max()) for d in dtrajs)), members.shape[1]))
    padded[: len(members)] = members
    test = None
    if multiples:
        test = chapman_kolmogorov(
            dtrajs, lag, multiples, chosen.sets, memberships=padded[:, : chosen.sets], interval=interval,
            resamples=chosen.resamples, seed=chosen.seed,
        )  # fmt: skip
    cores = [_core(_letter(k), padded[:, k] >= CORE) for k in range(members.shape[1])]
    return Kinetics(
        times, test, hitting_times(dtrajs, cores, interval), populations(dtrajs, {c.name: c for c in cores})
    )


def _core(name: str, inside: np.ndarray) -> NamedRegion:
    return NamedRegion(name, lambda states: inside[states])


def _letter(k: int) -> str:
    return chr(ord("A") + k)


def kinetic_rows(kinetics: dict[str, dict[str, Kinetics]], lag: float) -> Iterator[Row]:
    for space, sources in kinetics.items():
        if MD not in sources:
            continue
        section = f"time scales, {space}"
        times = {name: k.timescales for name, k in sources.items()}
        for n in range(times[MD].values.shape[1]):
            values = {name: _at_lag(t, n, lag) for name, t in times.items()}
            if np.isfinite(values[MD][0]):
                yield Row(section, f"implied time scale {n + 1}", "ps", values)
        for name in sources[MD].shares:
            shares = {s: k.shares.get(name) for s, k in sources.items()}
            yield Row(section, f"share of core {name}", "", {s: (e.value, e.error) for s, e in shares.items() if e})
        for pair in sources[MD].passages:
            values = {s: _passage(k.passages[pair]) for s, k in sources.items() if pair in k.passages}
            yield Row(section, f"first passage {pair[0]} to {pair[1]}", "ps", values)
        worst = {s: (k.test.worst, float("nan")) for s, k in sources.items() if k.test is not None}
        if worst:
            yield Row(section, "Chapman-Kolmogorov, worst", "s.e.", worst)


def _at_lag(times: ImpliedTimescales, n: int, lag: float) -> tuple[float, float]:
    k = int(np.argmin(np.abs(times.lags - lag)))
    return float(times.values[k, n]), float(times.error[k, n])


def _passage(found: FirstPassages) -> tuple[float, float]:
    error = found.rate_time.error
    return found.rate_time.value, error if np.isfinite(error) else found.residence.error


def named(view: View, column: str) -> str:
    """A column with the residue that it belongs to."""
    return f"{column}{view.name.removeprefix('torsions')}" if view.name.startswith("torsions") else column
