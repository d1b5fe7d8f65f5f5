"""a model and molecular dynamics that it has not seen -> figures side by side, with error bars.

    comparison = validate(model, test, train, topology=topology)

Latent runs begin where the test runs begin (after a few frames that give the memory) and are as long as these, so that
both sides have the same starts, and the same lengths. Sources in a comparison:

    MD            the test runs
    autoencoder   the test runs, encoded and decoded: what the decoder alone changes
    LED           latent runs, decoded
    MSM, linear   the baselines, with the same encoder (if asked for)

Time scales, passages and Chapman-Kolmogorov tests are made twice, in latent space and of decoded frames; states and
metastable sets are those of MD (of the training runs, where they are given) and the same for all sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from openmm import app

from openmm_led.features import Features
from openmm_led.trajectories import Trajectories, check_separate
from openmm_led.views import Geometry, GeometryChecks, View, Views
from openmm_mlff.analysis.chapman_kolmogorov import ChapmanKolmogorov, chapman_kolmogorov, metastable_sets
from openmm_mlff.analysis.distributions import floor, jensen_shannon, populations, wasserstein
from openmm_mlff.analysis.kinetics import Clusters, ImpliedTimescales, implied_timescales
from openmm_mlff.analysis.passages import FirstPassages, NamedRegion, hitting_times
from openmm_mlff.sampling.propagators import Propagator

#: lags (frames) at which time scales are looked at, as far as the runs allow
LAGS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
#: multiples of the lag in Chapman-Kolmogorov tests
MULTIPLES = (1, 2, 3, 4, 5)
#: frames decoded at once
BLOCK = 4096
#: a state belongs to the core of a metastable set from this membership on
CORE = 0.8
#: share of frames from which states without a way back and forth to the others count as a set of their own
ISLAND = 0.01
MD, AUTOENCODER, LED = "MD", "autoencoder", "LED"


@dataclass(frozen=True)
class Settings:
    """How a comparison is made.

    Attributes:
        lag: frames, of the figures that need one; None chooses by the length of the runs.
        sets: metastable sets. states: of Markov models. copies: latent runs from the start of each test run.
        history: frames of each test run that the memory of a latent run begins with.
        timescales: how many. resamples: of the bootstrap. bins: of distributions, per dimension.
        baselines: compare a Markov state model and a linear model as well. seed: of everything random.
    """

    lag: int | None = None
    sets: int = 2
    states: int = 100
    copies: int = 4
    history: int = 10
    timescales: int = 2
    resamples: int = 30
    bins: int = 36
    baselines: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"sets": 2, "states": 2, "copies": 1, "history": 1, "timescales": 1, "resamples": 2, "bins": 2}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name}: expected at least {bound}, got {getattr(self, name)!r}")
        if self.lag is not None and not self.lag >= 1:
            raise ValueError(f"lag: expected at least 1 frame, got {self.lag!r}")


@dataclass
class Seen:
    """Frames of one source as they are compared: per run, latent coordinates ``(n_frames, latent_dim)`` and columns of
    every view, and sums over their geometry. A source has `copies` times as many runs as there are test runs."""

    z: list[np.ndarray] = field(default_factory=list)
    views: dict[str, list[np.ndarray]] = field(default_factory=dict)
    geometry: Geometry | None = None

    def copy(self, name: str, k: int, n_runs: int) -> np.ndarray:
        """All frames of one copy in a view, or of the latent coordinates (``latent``), one run after the other."""
        runs = self.z if name == "latent" else self.views[name]
        return np.concatenate(runs[k * n_runs : (k + 1) * n_runs])


@dataclass(frozen=True)
class Kinetics:
    """What states say about one source.

    Attributes:
        timescales: against the lag. tests: Chapman-Kolmogorov, None where the runs are too short. passages: between
            the cores of the metastable sets. shares: of frames in these cores, with errors.
    """

    timescales: ImpliedTimescales
    test: ChapmanKolmogorov | None
    passages: dict[tuple[str, str], FirstPassages]
    shares: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: figures ``(value, error)`` by source; `best` says what a faithful model would have."""

    section: str
    quantity: str
    unit: str
    values: dict[str, tuple[float, float]]


@dataclass
class Comparison:
    """Everything that `validate` found; `report.write_report` makes files of it.

    Attributes:
        rows: of the table. seen: frames by source. kinetics: by space (``latent``, ``decoded``) and source.
        views: that frames were looked at by. floors: JSD of MD against MD by view, with the spread.
        lag: frames. interval: ps. settings, notes: how it was made, and what could not be.
        about: plain facts about model and data.
    """

    rows: list[Row]
    seen: dict[str, Seen]
    kinetics: dict[str, dict[str, Kinetics]]
    views: list[View]
    floors: dict[str, tuple[float, float]]
    lag: int
    interval: float
    settings: Settings
    notes: list[str]
    about: dict[str, Any]


def validate(
    model: Propagator,
    test: Trajectories,
    train: Trajectories | None = None,
    *,
    topology: app.Topology | None,
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Hold a model against test runs.

    Args:
        test: runs that the model has not seen. train: those it was trained on: states, slow coordinates and the floor
            of the distributions come from them; None takes the test runs instead. topology: of the solute; None for a
            model potential.
        say: told one line per stage.

    Raises `ValueError` for data of another molecule or interval than the model's, runs that are too short, frames that
    are both in `test` and in `train`, and baselines without `train`.
    """
    chosen = settings or Settings()
    _check(model, test, train, topology, chosen)
    reference = train or test
    lengths = [len(f) - chosen.history for f in test.frames]
    lag = chosen.lag or (5 if np.median(lengths) >= 100 else 1)
    if lag >= max(lengths):
        raise ValueError(
            f"lag: expected fewer than the {max(lengths)} frames of the longest test run after the {chosen.history} of "
            f"history, got {lag}"
        )
    features = getattr(model, "features", None) or Features.internal(topology)
    views = Views(features, topology, reference.frames, lag)
    checks = None if features.kind == "raw" or topology is None else GeometryChecks(features, topology,
                                                                                   reference.frames)  # fmt: skip
    say("encoding molecular dynamics")
    known = _molecular(model, reference, views, checks, 0)
    seen = {MD: _molecular(model, test, views, checks, chosen.history)}
    z = [model.encode(f[: chosen.history].astype(np.float64)) for f in test.frames]
    random = np.random.default_rng([chosen.seed, 11])
    say("decoding the latent coordinates of molecular dynamics")
    seen[AUTOENCODER] = _decoded(model, seen[MD].z, views, checks, random)
    models = {LED: model} | (_baselines(model, train, lag, chosen, features) if chosen.baselines and train else {})
    for name, propagator in models.items():
        say(f"latent runs of {name}")
        runs = latent_runs(propagator, z, lengths * chosen.copies, chosen.copies, random)
        seen[name] = _decoded(propagator, runs, views, checks, random)
    notes: list[str] = []
    say("time scales")
    kinetics = _kinetics(known, seen, views, lag, test.interval, chosen, notes)
    floors = _floors(reference, known, seen[MD], train is not None, views.views, chosen, notes)
    rows = [
        *_distribution_rows(seen, known if train else None, views, floors, len(lengths), chosen),
        *_kinetic_rows(kinetics, lag * test.interval),
        *_geometry_rows(seen),
    ]
    about = {
        "interval_ps": test.interval, "latent_dim": model.latent_dim, "temperature_K": model.temperature,
        "test": {"runs": len(test.frames), "frames": test.n_frames, "names": list(test.names)},
        "train": None if train is None else {"runs": len(train.frames), "frames": train.n_frames},
    }  # fmt: skip
    return Comparison(rows, seen, kinetics, views.views, floors, lag, test.interval, chosen, notes, about)


def _check(
    model: Propagator, test: Trajectories, train: Trajectories | None, topology: app.Topology | None, chosen: Settings
) -> None:
    if topology is not None:
        model.check_topology(topology)
    sets = {"test": test} | ({"train": train} if train is not None else {})
    for name, data in sets.items():
        if data.frames[0].shape[1] != model.n_atoms:
            raise ValueError(
                f"trajectories: expected the {model.n_atoms} atoms of the model, got {data.frames[0].shape[1]} ({name})"
            )
        if abs(data.interval / model.interval - 1.0) > 1e-3:
            raise ValueError(
                f"trajectories: expected the model's {model.interval:g} ps between frames, {name} has "
                f"{data.interval:g} ps"
            )
    check_separate(sets)
    for name, frames in zip(test.names, test.frames, strict=True):
        if len(frames) < chosen.history + 10:
            raise ValueError(
                f"trajectories: expected at least {chosen.history + 10} frames for a comparison, {name} has "
                f"{len(frames)}"
            )
    if chosen.baselines and train is None:
        raise ValueError("baselines: expected the training runs beside the test runs, got none")


# -- frames of the sources -----------------------------------------------------------------------------------------


def latent_runs(
    model: Propagator, history: Sequence[np.ndarray], lengths: Sequence[int], copies: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Latent runs ``(length, latent_dim)`` from histories ``(n, latent_dim)`` of equal length, all at once.

    Args:
        lengths: frames of each run, `copies` times as many as histories: the first run of each, then the second, ...
    """
    state = model.start(np.tile(np.stack(history), (copies, 1, 1)))
    path, _ = model.run(state, max(lengths), random)
    return [run[:length] for run, length in zip(path, lengths, strict=True)]


def _molecular(model: Propagator, data: Trajectories, views: Views, checks: GeometryChecks | None, skip: int) -> Seen:
    def frames(k: int, start: int) -> np.ndarray:
        return data.frames[k][skip + start : skip + start + BLOCK].astype(np.float64)

    z = [model.encode(f[skip:].astype(np.float64)) for f in data.frames]
    return _look(z, frames, views, checks)


def _decoded(
    model: Propagator, z: list[np.ndarray], views: Views, checks: GeometryChecks | None, random: np.random.Generator
) -> Seen:
    return _look(z, lambda k, start: model.decode(z[k][start : start + BLOCK], random), views, checks)


def _look(
    z: list[np.ndarray], frames: Callable[[int, int], np.ndarray], views: Views, checks: GeometryChecks | None
) -> Seen:
    seen = Seen([np.asarray(run, dtype=np.float64) for run in z], {view.name: [] for view in views.views},
                None if checks is None else Geometry())  # fmt: skip
    total = sum(len(run) for run in z)
    for k, run in enumerate(z):
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, len(run), BLOCK):
            positions = frames(k, start)
            parts.append(views(positions))
            if checks is not None and seen.geometry is not None:
                checks.add(seen.geometry, positions, total)
        for view in views.views:
            seen.views[view.name].append(np.concatenate([part[view.name] for part in parts]))
    return seen


def _baselines(
    model: Propagator, train: Trajectories, lag: int, chosen: Settings, features: Features
) -> dict[str, Propagator]:
    from openmm_led.baselines import fit_baselines

    return fit_baselines(model, train, chosen.states, chosen.seed)


# -- kinetics ------------------------------------------------------------------------------------------------------


def _kinetics(
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
        except (ValueError, np.linalg.LinAlgError, RuntimeError) as error:
            notes.append(f"no metastable sets in {space} space ({' '.join(str(error).split())[:120]})")
        found[space] = {}
        for name, runs in sources.items():
            try:
                found[space][name] = _source_kinetics([states.assign(r) for r in runs], members, lag, interval, chosen)
            except (ValueError, np.linalg.LinAlgError, RuntimeError) as error:
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
    for k in range(members.shape[1]):
        inside = members[states, k] >= CORE
        if not inside.any():
            yield f"core {_letter(k)}, {space}: no frame of MD"
            continue
        places = []
        for view in views[:2]:
            for c, column in enumerate(view.columns[:2]):
                x = np.concatenate(known.views[view.name])[inside, c]
                middle = x.mean() if view.period is None else _circular_mean(x, view.period)
                places.append(f"{_named(view, column)} {middle:.3g}")
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


def _kinetic_rows(kinetics: dict[str, dict[str, Kinetics]], lag: float) -> Iterator[Row]:
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
    return found.rate_time.value, found.rate_time.error


# -- distributions and geometry ------------------------------------------------------------------------------------


def divergence(view: View, a: np.ndarray, b: np.ndarray, bins: int) -> float:
    """JSD in nats: of the first two columns together, or of the only one."""
    return jensen_shannon(a[:, :2], b[:, :2], bins, period=view.period)


def _floors(
    reference: Trajectories,
    known: Seen,
    test: Seen,
    separate: bool,
    views: Sequence[View],
    chosen: Settings,
    notes: list[str],
) -> dict[str, tuple[float, float]]:
    """JSD of MD against MD: two sets of whole runs, each with as many frames as the training runs (or half of all)."""
    found: dict[str, tuple[float, float]] = {}
    wanted = reference.n_frames
    for view in (View("latent", ("z",), ""), *views):
        runs = [*_runs(known, view), *(_runs(test, view) if separate else [])]
        n = min(wanted, sum(len(r) for r in runs) // 2)
        for _ in range(8):
            try:
                estimate = floor(runs, n, partial(divergence, view, bins=chosen.bins), 10, chosen.seed)
            except ValueError:
                n = int(0.85 * n)
                continue
            found[view.name] = (estimate.value, estimate.error)
            break
    if found:
        notes.append(f"the floor compares sets of {n} frames of MD; the training runs have {wanted}")
    return found


def _runs(seen: Seen, view: View) -> list[np.ndarray]:
    return seen.z if view.name == "latent" else seen.views[view.name]


def _distribution_rows(
    seen: dict[str, Seen],
    train: Seen | None,
    views: Views,
    floors: dict[str, tuple[float, float]],
    n_runs: int,
    chosen: Settings,
) -> Iterator[Row]:
    """JSD and W1 of every source against the test runs; several copies give the error bar."""
    latent = View("latent", tuple(f"z{k}" for k in range(seen[MD].z[0].shape[1])), "")
    for view in (latent, *views.views):
        target = seen[MD].copy(view.name, 0, n_runs)
        others = {name: s for name, s in seen.items() if name != MD and not (view is latent and name == AUTOENCODER)}
        samples = {
            name: [s.copy(view.name, k, n_runs) for k in range(len(_runs(s, view)) // n_runs)]
            for name, s in others.items()
        }
        if train is not None:
            samples["training MD"] = [np.concatenate(_runs(train, view))]
        values = {name: _mean([divergence(view, target, x, chosen.bins) for x in xs]) for name, xs in samples.items()}
        if view.name in floors:
            values["MD floor"] = floors[view.name]
        yield Row("distributions", f"JSD of {view.name}", "nats", values)
        for c, column in enumerate(view.columns):
            away = {
                n: _mean([wasserstein(target[:, c], x[:, c], view.period) for x in xs]) for n, xs in samples.items()
            }
            yield Row("distributions", f"W1 of {_named(view, column)}", view.unit, away)


def _named(view: View, column: str) -> str:
    return f"{column}{view.name.removeprefix('torsions')}" if view.name.startswith("torsions") else column


def _mean(values: Sequence[float]) -> tuple[float, float]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), spread


def _geometry_rows(seen: dict[str, Seen]) -> Iterator[Row]:
    tables = {name: s.geometry.rows() for name, s in seen.items() if s.geometry is not None}
    if MD not in tables:
        return
    for quantity in tables[MD]:
        unit = "degrees" if quantity.startswith("s.d.") else ""
        values = {name: (table[quantity], float("nan")) for name, table in tables.items() if quantity in table}
        yield Row("geometry", quantity, unit, values)
