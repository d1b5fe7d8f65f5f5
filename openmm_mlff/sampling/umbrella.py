"""a System, coordinates and windows -> values of the coordinates in every window, for `analysis.umbrella`.

    coordinates = (proton_transfer(donor, proton, acceptor), torsion(proton, acceptor, carbon, alpha))
    windows = [UmbrellaWindow("donor", (Bias(-4.0, -0.6, 5.0), None)), ...]
    runs = sample_windows(system, positions, coordinates, windows, UmbrellaSettings(), "run")
    samples = Reweighted.of([w.biases for w in windows], [run.values for run in runs], 298.15)

Windows are a path: a pull along it makes the start of each window from that of the one before. Then they run
independently of one another, in stretches, each kept when it is over; a run that was stopped, or is made longer, goes
on from there. Coordinates and their biases are those of `umbrella_bias`.

Lengths in angstrom, angles in degrees, biases in eV; OpenMM's units stay inside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_mlff.data.campaigns import check_workers, run_campaign
from openmm_mlff.data.files import read_arrays, write_arrays
from openmm_mlff.data.jobs import claim_folder
from openmm_mlff.forces import running
from openmm_mlff.forces.serialization import load_system, system_digest
from openmm_mlff.sampling.checkpoints import seed_for
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.platforms import choose_platform
from openmm_mlff.sampling.umbrella_bias import BIAS_GROUP, Coordinate, UmbrellaWindow, biased_system, set_window
from openmm_mlff.units import ANGSTROM_PER_NM, NM_PER_ANGSTROM

FORMAT = "openmm-mlff-umbrella-window-1"
#: parts of a pull between two windows, in which the bias stands still.
PULL_PARTS = 40
Say = Callable[[str], None]


@dataclass(frozen=True)
class UmbrellaSettings:
    """How windows are sampled.

    Attributes:
        temperature: K. timestep: fs. friction: 1/ps.
        pull: ps from one window to the next. equilibration: ps in a window before frames count.
        length, interval: ps in each window, and between its frames. stretch: ps between two times that work is saved.
        seed: of velocities and thermostat. minimization_steps: at most, of the start; 0 for none.
        platform: by name; None chooses.

    Raises `ValueError` naming the field.
    """

    temperature: float = 298.15
    timestep: float = 1.0
    friction: float = 1.0
    pull: float = 2.0
    equilibration: float = 5.0
    length: float = 20.0
    interval: float = 0.02
    stretch: float = 5.0
    seed: int = 0
    minimization_steps: int = 200
    platform: str | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "timestep", "friction", "pull", "length", "interval", "stretch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if not self.equilibration >= 0:
            raise ValueError(f"equilibration: expected a time >= 0 (ps), got {self.equilibration!r}")
        if self.seed < 0 or self.minimization_steps < 0:
            raise ValueError("seed, minimization_steps: expected whole numbers >= 0")
        if self.steps(self.interval) < 1 or self.interval > self.length:
            raise ValueError(f"interval: expected from a time step to length = {self.length} ps, got {self.interval!r}")

    def steps(self, time: float) -> int:
        """Time steps in `time` (ps)."""
        return round(1000.0 * time / self.timestep)

    @property
    def frames(self) -> int:
        """Of every window."""
        return int(self.length / self.interval + 1e-6)


# -- one stretch of one window -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowRun:
    """What was sampled of a window.

    Attributes:
        values: of the coordinates, ``(n, C)``. spreads: uncertainty of the force on the worst atom of an ensemble,
            ``(n,)`` eV/angstrom; NaN for other models.
        recorded: positions of the recorded atoms, ``(n, n_recorded, 3)`` angstrom.
        positions, velocities, box: ``(n_particles, 3)`` angstrom and nm/ps, and ``(3, 3)`` angstrom, to go on from.
        header: window (its biases), time (ps that were simulated), seeds.
    """

    values: np.ndarray
    spreads: np.ndarray
    recorded: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    box: np.ndarray
    header: dict[str, Any]

    def joined(self, later: WindowRun) -> WindowRun:
        """This run and the stretch after it."""
        frames = {
            name: np.concatenate([getattr(self, name), getattr(later, name)])
            for name in ("values", "spreads", "recorded")
        }
        header = {**later.header, "seeds": self.header["seeds"] + later.header["seeds"]}
        header["time"] = self.header["time"] + later.header["time"]
        return dataclasses.replace(later, **frames, header=header)

    def bare(self) -> WindowRun:
        """The state alone."""
        none = {name: getattr(self, name)[:0] for name in ("values", "spreads", "recorded")}
        return dataclasses.replace(self, **none)

    def write(self, path: str | Path) -> None:
        """See `write_arrays`."""
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "header"}
        write_arrays(path, FORMAT, arrays, self.header)

    @classmethod
    def read(cls, path: str | Path) -> WindowRun:
        """Raises what `read_arrays` raises."""
        header, arrays = read_arrays(path, FORMAT, "a window of umbrella sampling")
        return cls(**arrays, header=header)


@dataclass(frozen=True)
class Stretch:
    """A task: some frames of one window, from a state; all that it needs travels with it."""

    system: str = field(repr=False)
    coordinates: tuple[str, ...]
    window: UmbrellaWindow
    settings: UmbrellaSettings
    start: WindowRun = field(repr=False)
    equilibration: int
    frames: int
    record: tuple[int, ...]
    seed: int


@functools.lru_cache(maxsize=1)
def _context(system: str, settings: UmbrellaSettings) -> openmm.Context:
    """One per process, kept for the next stretch."""
    loaded = load_system(system)
    integrator = openmm.LangevinMiddleIntegrator(
        settings.temperature, settings.friction / unit.picosecond, settings.timestep * unit.femtosecond
    )
    choice = choose_platform(loaded.getNumParticles(), settings.platform)
    return openmm.Context(loaded, integrator, choice.platform, choice.properties)


def _enter(system: str, settings: UmbrellaSettings, seed: int, start: WindowRun) -> openmm.Context:
    """The context in a state, with random numbers of its own."""
    context = _context(system, dataclasses.replace(settings, length=settings.interval, seed=0))
    context.getIntegrator().setRandomNumberSeed(seed)
    context.reinitialize()
    if start.box.any():
        context.setPeriodicBoxVectors(*(start.box * NM_PER_ANGSTROM))
    context.setPositions(start.positions * NM_PER_ANGSTROM)
    if start.velocities.any():
        context.setVelocities(start.velocities)
    else:
        context.setVelocitiesToTemperature(settings.temperature, seed)
    return context


def _leave(
    context: openmm.Context, header: dict[str, Any], values: np.ndarray, spreads: np.ndarray, recorded: np.ndarray
) -> WindowRun:
    """Frames, with the state to go on from."""
    state = context.getState(positions=True, velocities=True)
    box = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value) * ANGSTROM_PER_NM
    positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    velocities = state.getVelocities(asNumpy=True)._value
    return WindowRun(values, spreads, recorded, positions, velocities, box, header)


def run_stretch(task: Stretch) -> WindowRun:
    """Simulate a stretch; raises `RunFailed` naming the window if the simulation breaks or becomes NaN."""
    context = _enter(task.system, task.settings, task.seed, task.start)
    set_window(context, task.coordinates, task.window)
    system = context.getSystem()
    bias = next(f for f in system.getForces() if f.getForceGroup() == BIAS_GROUP)
    every, atoms = task.settings.steps(task.settings.interval), list(task.record)
    values, spreads = np.zeros((task.frames, len(task.coordinates))), np.full(task.frames, np.nan)
    recorded = np.zeros((task.frames, len(atoms), 3), dtype=np.float32)
    done = task.start.header["time"]
    try:
        context.getIntegrator().step(task.equilibration)
        for k in range(task.frames):
            context.getIntegrator().step(every)
            values[k] = bias.getCollectiveVariableValues(context)
            positions = context.getState(positions=True).getPositions(asNumpy=True)._value
            if not (np.isfinite(positions).all() and np.isfinite(values[k]).all()):
                raise FloatingPointError("positions became NaN or infinite")
            recorded[k] = positions[atoms] * ANGSTROM_PER_NM
            found = running.most_uncertain(system)
            spreads[k] = np.nan if found is None else found[1]
            done += task.settings.interval
    except (openmm.OpenMMException, FloatingPointError) as error:
        reason = running.last_error(system) or error
        raise RunFailed(f"window {task.window.name!r} broke after {done:.2f} ps: {reason}") from error
    header = {
        "window": task.window.plain(),
        "time": (task.equilibration + task.frames * every) * task.settings.timestep * 1e-3,
        "seeds": [task.seed],
    }
    return _leave(context, header, values, spreads, recorded)


# -- all windows -------------------------------------------------------------------------------------------------


def sample_windows(
    system: openmm.System,
    positions: np.ndarray,
    coordinates: Sequence[Coordinate],
    windows: Sequence[UmbrellaWindow],
    settings: UmbrellaSettings,
    folder: str | Path,
    *,
    record: Sequence[int] = (),
    processes: int = 1,
    scheduler: str | None = None,
    progress: bool = False,
    say: Say = lambda text: None,
) -> list[WindowRun]:
    """Sample every window; one result each, in their order.

    Args:
        system: without bias. Forces that act in all windows, such as walls, are part of it.
        positions: ``(n_particles, 3)`` angstrom, near the first window.
        windows: along a path, neighbours near enough to share frames.
        folder: begun before, it goes on: with longer runs, and with windows put in between or behind the others.
        record: atoms whose positions are kept in every frame.
        processes, scheduler, progress: see `run_campaign`. say: is told what happens, in a line each.

    Raises `ValueError` naming the argument or what differs from the folder, and `RunFailed` naming the windows that
    broke, after all others are done; what was saved of them stays.
    """
    check_workers(processes, scheduler)
    folder, record = Path(folder), tuple(int(i) for i in record)
    _check(system, positions, coordinates, windows, record)
    names = tuple(c.name for c in coordinates)
    biased = biased_system(system, coordinates)
    xml = openmm.XmlSerializer.serialize(biased)
    plain = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("length", "stretch")}
    claim_folder(folder, {**plain, "coordinates": names, "record": record, "system": system_digest(biased)})
    missing = [w for w in windows if not (folder / "windows" / f"{w.name}.safetensors").exists()]
    if missing:
        _pull(xml, names, windows, settings, positions, folder, say)
    tasks = {}
    for window in windows:
        tasks.update(_next(xml, names, window, settings, record, folder))

    def keep(name: str, result: WindowRun) -> Mapping[str, Stretch]:
        window = next(w for w in windows if w.name == name.rpartition("@")[0])
        path = folder / "windows" / f"{window.name}.safetensors"
        (WindowRun.read(path).joined(result) if path.exists() else result).write(path)
        return _next(xml, names, window, settings, record, folder)

    total = sum(-(-(settings.frames - _known(folder, w)) // _chunk(settings)) for w in windows)
    failed = run_campaign(tasks, run_stretch, keep, processes=processes, scheduler=scheduler, progress=progress,
                          title="stretches of windows", total=total)  # fmt: skip
    if failed:
        raise RunFailed("; ".join(f.error for f in failed.values()), folder)
    return [WindowRun.read(folder / "windows" / f"{w.name}.safetensors") for w in windows]


def _check(
    system: openmm.System,
    positions: np.ndarray,
    coordinates: Sequence[Coordinate],
    windows: Sequence[UmbrellaWindow],
    record: Sequence[int],
) -> None:
    n = system.getNumParticles()
    if np.shape(positions) != (n, 3):
        raise ValueError(f"positions: expected shape ({n}, 3), got {np.shape(positions)}")
    if not all(0 <= i < n for i in record):
        raise ValueError(f"record: expected indices of atoms below {n}, got {list(record)}")
    names = [w.name for w in windows]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"windows: expected at least one, with different names, got {names}")
    for window in windows:
        periods = [c.period if b is None else b.period for b, c in zip(window.biases, coordinates, strict=False)]
        if len(window.biases) != len(coordinates) or periods != [c.period for c in coordinates]:
            raise ValueError(
                f"windows: expected a bias with the period of its coordinate, or None, for each of "
                f"{[c.name for c in coordinates]}, got {window}"
            )


def _chunk(settings: UmbrellaSettings) -> int:
    return max(1, round(settings.stretch / settings.interval))


def _known(folder: Path, window: UmbrellaWindow) -> int:
    path = folder / "windows" / f"{window.name}.safetensors"
    return len(WindowRun.read(path).values) if path.exists() else 0


def _next(xml: str, names: tuple[str, ...], window: UmbrellaWindow, settings: UmbrellaSettings,
          record: tuple[int, ...], folder: Path) -> dict[str, Stretch]:  # fmt: skip
    """The stretch that comes next in a window; none if it is complete."""
    path = folder / "windows" / f"{window.name}.safetensors"
    begun = path.exists()
    start = WindowRun.read(path if begun else folder / "starts" / f"{window.name}.safetensors")
    if start.header["window"] != window.plain():
        raise ValueError(f"windows: {window.name!r} had other biases when {folder} was begun")
    done = len(start.values) if begun else 0
    frames = min(_chunk(settings), settings.frames - done)
    if frames <= 0:
        return {}
    seed = seed_for(settings.seed, f"umbrella/{window.name}", done)
    equilibration = 0 if begun else settings.steps(settings.equilibration)
    task = Stretch(xml, names, window, settings, start.bare(), equilibration, frames, record, seed)
    return {f"{window.name}@{done}": task}


def _pull(xml: str, names: tuple[str, ...], windows: Sequence[UmbrellaWindow], settings: UmbrellaSettings,
          positions: np.ndarray, folder: Path, say: Say) -> None:  # fmt: skip
    """Make the start of each window that has none from that of the window before."""
    none = np.zeros((0, len(names))), np.zeros(0), np.zeros((0, 0, 3), dtype=np.float32)
    first = np.array(positions, dtype=np.float64)
    state = WindowRun(*none, first, np.zeros_like(first), np.zeros((3, 3)), {"time": 0.0})
    for k, window in enumerate(windows):
        path = folder / "starts" / f"{window.name}.safetensors"
        if path.exists():
            state = WindowRun.read(path)
            continue
        say(f"pulling to window {window.name} ({k + 1} of {len(windows)})")
        context = _enter(xml, settings, seed_for(settings.seed, f"pull/{window.name}", 0), state)
        set_window(context, names, window, 0.0 if k else 1.0, windows[k - 1] if k else None)
        try:
            if k == 0 and settings.minimization_steps:  # OpenMM takes 0 for no limit
                with running.without_force_limit(context.getSystem()):
                    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=settings.minimization_steps)
                context.setVelocitiesToTemperature(settings.temperature, seed_for(settings.seed, "start", 0))
            for part in range(PULL_PARTS):
                set_window(context, names, window, (part + 1) / PULL_PARTS, windows[k - 1] if k else None)
                context.getIntegrator().step(max(1, round(settings.steps(settings.pull) / PULL_PARTS)))
        except openmm.OpenMMException as error:
            reason = running.last_error(context.getSystem()) or error
            raise RunFailed(f"the pull to window {window.name!r} broke: {reason}", folder) from error
        state = _leave(context, {"window": window.plain(), "time": 0.0, "seeds": []}, *none)
        if not np.isfinite(state.positions).all():
            raise RunFailed(f"the pull to window {window.name!r} broke: positions became NaN or infinite", folder)
        state.write(path)
