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
from functools import partial

import numpy as np
from openmm import app

from openmm_led.comparison import AUTOENCODER, LED, MD, Comparison, Row, Seen, Settings
from openmm_led.features import Features
from openmm_led.state_kinetics import compare_kinetics, kinetic_rows, named
from openmm_led.trajectories import Trajectories, check_separate
from openmm_led.views import Geometry, GeometryChecks, View, Views
from openmm_mlff.analysis.distributions import floor, jensen_shannon, wasserstein
from openmm_mlff.sampling.propagators import Propagator

#: frames decoded at once
BLOCK = 4096


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
    notes: list[str] = []
    models = {LED: model} | (_baselines(model, train, chosen, notes) if chosen.baselines and train else {})
    for name, propagator in models.items():
        say(f"latent runs of {name}")
        runs = latent_runs(propagator, z, lengths * chosen.copies, chosen.copies, random)
        seen[name] = _decoded(propagator, runs, views, checks, random)
    say("decoding the latent coordinates of molecular dynamics")
    seen[AUTOENCODER] = _decoded(model, seen[MD].z, views, checks, random)
    say("time scales")
    kinetics = compare_kinetics(known, seen, views, lag, test.interval, chosen, notes)
    floors = _floors(reference, known, seen[MD], train is not None, views.views, chosen, notes)
    rows = [
        *_distribution_rows(seen, known if train else None, views, floors, len(lengths), chosen),
        *kinetic_rows(kinetics, lag * test.interval),
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


def _baselines(model: Propagator, train: Trajectories, chosen: Settings, notes: list[str]) -> dict[str, Propagator]:
    """A Markov state model and a linear model in the latent space of the model, one frame per step."""
    from openmm_led.baselines import LinearGaussian, MSMPropagator

    n_states = min(chosen.states, max(2, train.n_frames // 20))
    found: dict[str, Propagator] = {"MSM": MSMPropagator.fit(model, train, n_states=n_states, seed=chosen.seed)}
    try:
        found["linear"] = LinearGaussian.fit(model, train, seed=chosen.seed)
    except ValueError as error:
        notes.append(f"no linear baseline ({error})")
    return found


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
            yield Row("distributions", f"W1 of {named(view, column)}", view.unit, away)


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
