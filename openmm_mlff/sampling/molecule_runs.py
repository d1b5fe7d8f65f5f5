"""Equilibrium samples of many different molecules by Langevin dynamics, in memory.

    samples = sample(potential, structures, LangevinSettings(temperature=298.15, length=50.0))
    samples[0].positions                                   # (frames, n_atoms, 3) angstrom

Molecules run in batches (`Molecules`). One that breaks starts anew from its structure with fresh velocities and
equilibrates again, so that its frames are fewer than those of the others; if it goes on breaking, it is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import openmm

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.molecule_force import Failure
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.sampling import guards
from openmm_mlff.sampling.checkpoints import seed_for
from openmm_mlff.sampling.molecules import Molecules
from openmm_mlff.sampling.reporters import ProgressBar
from openmm_mlff.units import ANGSTROM_PER_NM, BOLTZMANN_KJ_PER_MOL, KJ_PER_MOL_PER_EV

#: seconds between two looks at Ctrl-C and the progress bar.
GLANCE = 0.25
#: steps between two looks for broken molecules, so that it does not depend on the time when they start anew.
LOOK = 100
#: a molecule that has broken this often is given up.
MOST_FAILURES = 3


@dataclass(frozen=True)
class LangevinSettings:
    """How molecules are sampled.

    Attributes:
        temperature: K. timestep: fs. friction: 1/ps.
        equilibration, length, interval: ps, of what is discarded at the start, of what follows, between its frames.
        seed: of velocities and of the thermostat.
        minimization_steps: at most, before the dynamics; 0 starts from the positions given.
        batch: molecules in one System.

    Raises `ValueError` naming the field.
    """

    temperature: float = 298.15
    timestep: float = 1.0
    friction: float = 1.0
    equilibration: float = 10.0
    length: float = 50.0
    interval: float = 1.0
    seed: int = 0
    minimization_steps: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        for name in ("temperature", "timestep", "friction", "length", "interval"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if not self.equilibration >= 0:
            raise ValueError(f"equilibration: expected a time >= 0 (ps), got {self.equilibration!r}")
        for name, least in (("seed", 0), ("minimization_steps", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or int(value) != value or value < least:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
        if self.interval > self.length:
            raise ValueError(f"interval: expected at most length = {self.length} ps, got {self.interval!r}")

    def steps(self, time: float) -> int:
        """Time steps in `time` (ps)."""
        return round(1000.0 * time / self.timestep)


@dataclass(frozen=True)
class MoleculeSamples:
    """What was sampled of one molecule.

    Attributes:
        positions: ``(frames, n_atoms, 3)`` angstrom, float64. energies: ``(frames,)`` eV, of the sampling potential.
        last: ``(n_atoms, 3)`` angstrom, and velocities: ``(n_atoms, 3)`` nm/ps, to go on from; of a molecule that was
            given up, its structure at rest.
        temperature: mean over the frames, K; NaN without frames.
        failures: every time that the molecule broke; `Failure.molecule` is its index in `structures`.
        finished: False if a signal came first, or if the molecule was given up.
    """

    positions: np.ndarray
    energies: np.ndarray
    last: np.ndarray
    velocities: np.ndarray
    temperature: float
    failures: tuple[Failure, ...] = ()
    finished: bool = True


class SamplingStopped(KeyboardInterrupt):
    """Ctrl-C while molecules were sampled.

    Attributes:
        samples: what there was by then, in the order of the structures.
    """

    def __init__(self, samples: list[MoleculeSamples]) -> None:
        super().__init__("sampling was interrupted")
        self.samples = samples


def sample(
    potential: Potential,
    structures: Sequence[Structure],
    settings: LangevinSettings | None = None,
    *,
    velocities: Sequence[np.ndarray] | None = None,
    precision: str | None = "single",
    compile: bool | str = "auto",
    threads: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[MoleculeSamples]:
    """Sample every molecule by Langevin dynamics (`openmm.LangevinMiddleIntegrator`).

    Args:
        potential: its weights as they are now.
        structures: open molecules, positions in angstrom; bonds between them are those that must stay whole.
        velocities: ``(n_atoms, 3)`` nm/ps of each molecule, to go on from an earlier call (with the structures at its
            `last` positions); None draws them.
        precision, compile, threads: as for `Molecules.from_potential`.
        progress: show a bar. say: is told, in a line each, of molecules that broke.

    Returns: one result per structure, in their order. The same arguments give the same numbers on the CPU, as long as
    no other simulation runs in this process at the same time: OpenMM's Reference platform has one stream of random
    numbers for all of them.

    Raises `ValueError` naming the argument. Ctrl-C and SIGTERM end the run: whoever handles the signal gets the
    results so far with ``finished=False``; where nobody does, `SamplingStopped` holds them.
    """
    settings = LangevinSettings() if settings is None else settings
    structures = list(structures)
    if velocities is not None and [np.shape(v) for v in velocities] != [s.positions.shape for s in structures]:
        raise ValueError("velocities: expected an array (n_atoms, 3) for each structure")
    found: dict[int, MoleculeSamples] = {}
    stop = guards.StopRequest()
    groups = batches([len(s) for s in structures], settings.batch)
    with stop:
        for number, members in enumerate(groups):
            chosen = [structures[k] for k in members]
            molecules = Molecules.from_potential(potential, chosen, precision, compile, threads)
            given = None if velocities is None else [np.asarray(velocities[k]) for k in members]
            title = f"molecules, batch {number + 1} of {len(groups)}"
            run = _Run(molecules, chosen, members, settings, stop, say)
            if not stop:
                run.go(given, ProgressBar(title, run.end, settings.timestep * 1e-3, 0, progress))
            found.update(zip(members, run.results(), strict=True))
    results = [found[k] for k in range(len(structures))]
    if stop.signal is not None:
        _pass_on(stop.signal, results)
    return results


def batches(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices of molecules in groups of at most `most`, of equal number as far as possible, large ones together."""
    order = sorted(range(len(sizes)), key=lambda k: (-sizes[k], k))
    n_groups = -(-len(order) // most)
    return [part.tolist() for part in np.array_split(np.array(order, dtype=np.int64), n_groups)] if order else []


def _pass_on(signal_number: int, results: list[MoleculeSamples]) -> None:
    """Hand a signal to whoever handled it before, now that the results are safe."""
    import signal

    try:
        signal.raise_signal(signal_number)
    except KeyboardInterrupt as error:
        raise SamplingStopped(results) from error


@dataclass
class _Record:
    """Frames of one molecule so far."""

    positions: list[np.ndarray] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    #: the step from which frames count
    ready: int = 0
    given_up: bool = False


class _Run:
    """One batch of molecules from its start to its end."""

    def __init__(
        self,
        molecules: Molecules,
        structures: Sequence[Structure],
        names: Sequence[int],
        settings: LangevinSettings,
        stop: guards.StopRequest,
        say: Callable[[str], None] | None,
    ) -> None:
        self.molecules, self.structures, self.names, self.settings = molecules, structures, names, settings
        self._stop, self._say = stop, say
        self._equilibration, self._interval = settings.steps(settings.equilibration), settings.steps(settings.interval)
        self.end = self._equilibration + settings.steps(settings.length)
        self.records = [_Record(ready=self._equilibration) for _ in names]
        self._seen, self._chunk, self._done = 0, 1, False
        self._last = [s.positions for s in structures]
        self._velocities = [np.zeros_like(s.positions) for s in structures]

    def go(self, velocities: Sequence[np.ndarray] | None, bar: ProgressBar) -> None:
        """Run all steps, or until a signal comes."""
        s, molecules = self.settings, self.molecules
        integrator = openmm.LangevinMiddleIntegrator(s.temperature, s.friction, s.timestep * 1e-3)
        integrator.setRandomNumberSeed(seed_for(s.seed, "molecules", int(self.names[0])))
        context = molecules.context(integrator)
        molecules.set_positions(context)
        if s.minimization_steps:
            molecules.minimize(context, max_iterations=s.minimization_steps)
            self._begin_at(context)
        if velocities is None:
            molecules.set_velocities(context, s.temperature, [(s.seed, k) for k in self.names])
        else:
            context.setVelocities(np.concatenate(velocities))
        step = 0
        due = self._equilibration + self._interval
        with bar:
            while step <= self.end and not self._stop:
                # forces of a frame are those that the step after it begins with: then its energies cost nothing
                step += self._advance(context, step, min(due + 1, self.end + 1, (step // LOOK + 1) * LOOK))
                if step % LOOK == 0 or step == due + 1:
                    self._mend(context, step)
                if step == due + 1:
                    self._record(context)
                    due += self._interval
                bar.update(min(step, self.end))
        held = molecules.held
        for k, (x, v) in enumerate(zip(molecules.positions(context), molecules.velocities(context), strict=True)):
            if not held[k]:
                self._last[k], self._velocities[k] = x * ANGSTROM_PER_NM, v.copy()
        self._done = not self._stop

    def _begin_at(self, context: openmm.Context) -> None:
        """Let molecules that break start anew from where they are now, unless they are broken."""
        starts, held = self.molecules.starts, self.molecules.held
        assert starts is not None
        now = self.molecules.positions(context)
        self.molecules.starts = [start if held[k] else now[k].copy() for k, start in enumerate(starts)]

    def _advance(self, context: openmm.Context, step: int, target: int) -> int:
        """Some steps towards `target`, in about the time between two glances; returns how many."""
        n = min(self._chunk, target - step)
        before = time.monotonic()
        try:
            context.getIntegrator().step(n)
        except openmm.OpenMMException as error:
            raise (self.molecules.last_error or error) from None
        pace = GLANCE / max(time.monotonic() - before, 1e-6)
        self._chunk = int(np.clip(round(n * pace), 1, 2 * self._chunk + 1))
        return n

    def _mend(self, context: openmm.Context, step: int) -> None:
        """Start molecules anew that have broken since the last look."""
        s = self.settings
        failures = self.molecules.failures[self._seen :]
        self._seen += len(failures)
        for failure in failures:
            record = self.records[failure.molecule]
            name = int(self.names[failure.molecule])
            record.failures.append(Failure(name, failure.step, failure.reason, failure.positions))
            record.given_up = len(record.failures) > MOST_FAILURES
            what = "is given up" if record.given_up else "starts anew"
            if self._say is not None:
                self._say(f"molecule {name} ({self.structures[failure.molecule].formula}) {what}: {failure.reason}")
            if not record.given_up:
                seed = (s.seed, name, len(record.failures))
                self.molecules.restart(context, failure.molecule, s.temperature, seed)
                record.ready = step + self._equilibration

    def _record(self, context: openmm.Context) -> None:
        """Keep the frame that the last step began with."""
        molecules = self.molecules
        where, energies = molecules.evaluated
        held, frame = molecules.held, molecules.split(where * ANGSTROM_PER_NM)
        velocities = context.getState(velocities=True).getVelocities(asNumpy=True)._value
        twice = np.add.reduceat(molecules.masses * np.square(velocities).sum(axis=1), molecules.offsets[:-1])
        step = context.getStepCount() - 1
        for k, record in enumerate(self.records):
            if held[k] or step < record.ready:
                continue
            record.positions.append(frame[k].copy())
            record.energies.append(float(energies[k]) / KJ_PER_MOL_PER_EV)
            record.temperatures.append(float(twice[k]) / (3 * len(frame[k]) * BOLTZMANN_KJ_PER_MOL))

    def results(self) -> list[MoleculeSamples]:
        """What there is of each molecule, in the order of the batch."""
        made = []
        for k, record in enumerate(self.records):
            shape = (len(record.positions), *self.structures[k].positions.shape)
            made.append(
                MoleculeSamples(
                    positions=np.array(record.positions).reshape(shape),
                    energies=np.array(record.energies),
                    last=self._last[k],
                    velocities=self._velocities[k],
                    temperature=float(np.mean(record.temperatures)) if record.temperatures else float("nan"),
                    failures=tuple(record.failures),
                    finished=self._done and not record.given_up,
                )
            )
        return made
