"""A run in pieces: each is a file with frames, a table and the state that the next one starts from.

Driven by a model file or by GFN2-xTB, with the same integrator, thermostat, masses and frames.
"""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from _dynamics_systems import CPU, Subject, start_positions, system_of

from openmm_mlff.data.files import read_arrays, write_arrays, write_atomically
from openmm_mlff.forces import running
from openmm_mlff.sampling import guards
from openmm_mlff.sampling.bookkeeping import degrees_of_freedom
from openmm_mlff.sampling.checkpoints import seed_for
from openmm_mlff.units import ANGSTROM_PER_NM, BOLTZMANN_KJ_PER_MOL, KJ_PER_MOL_PER_EV

FORM = "openmm-mlff dynamics piece 1"
TEMPERATURE = 300.0
#: 1/ps: while the start forgets how it was built, and afterwards
STRONG, FRICTION = 10.0, 1.0
#: ps at 10 K with a friction of 80/ps, which relax the start, and at 300 K before anything is recorded
DAMPED, SETTLING = 0.2, 2.0
#: columns of the table of a piece
COLUMNS = ("time_ps", "potential_eV", "kinetic_eV", "temperature_K", "energy_uncertainty_eV", "force_uncertainty_eV_A")


@dataclass(frozen=True)
class Plan:
    """How a run is made.

    Attributes:
        model: file; None where GFN2-xTB needs none. teacher: whether GFN2-xTB takes the energy of the region.
        timestep: fs. frame: fs between frames. piece: ps of one file.
        constant_energy: Verlet without a thermostat, and the masses that the elements have.
        seed: of velocities and the thermostat.
    """

    model: Path | None
    teacher: bool = False
    timestep: float = 1.0
    frame: float = 25.0
    piece: float = 5.0
    constant_energy: bool = False
    seed: int = 1

    @property
    def stride(self) -> int:
        return round(self.frame / self.timestep)


@dataclass(frozen=True)
class Record:
    """What the pieces of a run hold together.

    Attributes:
        positions: ``(n_frames, n_atoms, 3)`` angstrom. table: ``(n_frames,)`` by the names of `COLUMNS`.
        events: ``(ps, atom, eV/angstrom)`` at which the uncertainty went beyond the model's limit.
        failure: why the run ended early, or None. seconds: of CPU time per ps.
    """

    positions: np.ndarray
    table: dict[str, np.ndarray]
    events: list[tuple[float, int, float]]
    failure: str | None
    seconds: float

    def after(self, ps: float) -> Record:
        """Without the frames up to a time."""
        late = self.table["time_ps"] > ps + 1e-6
        table = {name: column[late] for name, column in self.table.items()}
        return Record(self.positions[late], table, self.events, self.failure, self.seconds)

    def before(self, ps: float) -> Record:
        """The frames up to a time, that one left out."""
        early = self.table["time_ps"] < ps - 1e-6
        table = {name: column[early] for name, column in self.table.items()}
        return Record(self.positions[early], table, self.events, self.failure, self.seconds)


def pieces_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("piece-*.safetensors"))


def read(folder: Path) -> Record | None:
    """What there is of a run; None before its first piece."""
    found = [read_arrays(path, FORM, "a piece of a run", ("frames", "table")) for path in pieces_of(folder)]
    if not found:
        return None
    table = np.concatenate([arrays["table"] for _, arrays in found])
    failed = folder / "failure" / "message.txt"
    return Record(
        np.concatenate([arrays["frames"] for _, arrays in found]),
        dict(zip(COLUMNS, table.T, strict=True)),
        [tuple(event) for header, _ in found for event in header["events"]],
        failed.read_text(encoding="utf-8").strip() if failed.exists() else None,
        sum(header["seconds"] for header, _ in found) / float(table[-1, 0]),
    )


def carry_on(it: Subject, plan: Plan, folder: Path, ps: float) -> None:
    """Make the pieces that are missing; a run that failed, or that another process makes, stays as it is."""
    wanted = round(ps / plan.piece)
    if len(pieces_of(folder)) >= wanted or (folder / "failure").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"{folder.parent.name}/{folder.name}: another process is at it", flush=True)
            return
        _make(it, plan, folder, wanted)


def _make(it: Subject, plan: Plan, folder: Path, wanted: int) -> None:
    there = len(pieces_of(folder))
    engine = _Engine(it, plan, folder)
    if not (folder / "start.safetensors").exists() and not engine.settle():
        return
    for index in range(there, wanted):
        begin, spent = time.monotonic(), time.process_time()
        if not engine.make(index):
            return
        print(
            f"{folder.parent.name}/{folder.name}: {(index + 1) * plan.piece:g} of {wanted * plan.piece:g} ps "
            f"({time.process_time() - spent:.0f} s of CPU time, {time.monotonic() - begin:.0f} s)",
            flush=True,
        )


class _Engine:
    """A System with everything that its pieces share."""

    def __init__(self, it: Subject, plan: Plan, folder: Path) -> None:
        self.it, self.plan, self.folder = it, plan, folder
        self.system = system_of(it, plan.model, plan.teacher, heavy_hydrogens=not plan.constant_energy)
        self.freedom = degrees_of_freedom(self.system)
        box = it.box()
        vectors = None if box is None else np.diag(box) / ANGSTROM_PER_NM
        # bonds of hydrogens to N and O are no bonds to be watched: protons may move
        numbers = it.built.numbers
        fixed = [
            (i, j)
            for i, j in it.built.bonds.tolist()
            if 1 not in numbers[[i, j]] or 6 in numbers[[i, j]] or not (set(numbers[[i, j]]) & {7, 8})
        ]
        pairs = it.region[np.array(fixed, dtype=np.int64).reshape(-1, 2)]
        self.guard = guards.Guard(it.topology, pairs.tolist(), start_positions(it), vectors, 1e6)

    def context(self, integrator: openmm.Integrator) -> openmm.Context:
        integrator.setConstraintTolerance(1e-7)
        if self.it.mixed:
            return openmm.Context(self.system, integrator, CPU, {"Threads": "1"})
        return openmm.Context(self.system, integrator, openmm.Platform.getPlatform("Reference"))

    def langevin(self, temperature: float, friction: float, phase: str, step: int) -> openmm.Integrator:
        integrator = openmm.LangevinMiddleIntegrator(temperature, friction, 1e-3 * self.plan.timestep)
        integrator.setRandomNumberSeed(seed_for(self.plan.seed, phase, step))
        return integrator

    def settle(self) -> bool:
        """Relax the start and bring it to 300 K; False if that fails."""
        dt = 1e-3 * self.plan.timestep
        state: openmm.State | None = None
        for temperature, friction, ps in ((10.0, 80.0, DAMPED), (TEMPERATURE, STRONG, SETTLING)):
            context = self.context(self.langevin(temperature, friction, f"settle {temperature:g}", 0))
            if state is None:
                context.setPositions(start_positions(self.it))
            else:
                context.setState(state)
            context.setVelocitiesToTemperature(temperature, seed_for(self.plan.seed, "velocities", int(temperature)))
            if (problem := self._advance(context, round(ps / dt))) is not None:
                return self._failed(context, f"equilibration: {problem}")
            state = context.getState(positions=True, velocities=True)
        assert state is not None
        self._write_start(state)
        return True

    def _write_start(self, state: openmm.State) -> None:
        arrays = {
            "positions": state.getPositions(asNumpy=True)._value,
            "velocities": state.getVelocities(asNumpy=True)._value,
        }
        write_arrays(self.folder / "start.safetensors", FORM, arrays)

    def make(self, index: int) -> bool:
        """Write one piece; False if the run fails in it (what it has until then is kept)."""
        plan, first = self.plan, round(index * self.plan.piece * 1e3 / self.plan.timestep)
        last = self.folder / (f"piece-{index - 1:04d}.safetensors" if index else "start.safetensors")
        begin = read_arrays(last, FORM, "a piece of a run", ("positions", "velocities"))[1]
        if plan.constant_energy:
            integrator: openmm.Integrator = openmm.VerletIntegrator(1e-3 * plan.timestep)
        else:
            integrator = self.langevin(TEMPERATURE, FRICTION, "production", first)
        context = self.context(integrator)
        context.setPositions(begin["positions"])
        context.setVelocities(begin["velocities"])
        context.setStepCount(first)
        watches = [c.watch for c in running.computations(self.system) if c.watch is not None]
        for watch in watches:
            watch.events.clear()
        frames, rows, spent = [], [], time.process_time()
        problem: str | None = None
        for step in range(first, first + round(plan.piece * 1e3 / plan.timestep), plan.stride):
            if (problem := self._advance(context, plan.stride)) is not None:
                break
            state = context.getState(positions=True, energy=True, forces=True)
            problem = self._check(state)
            frames.append(state.getPositions(asNumpy=True)._value.astype(np.float32) * ANGSTROM_PER_NM)
            rows.append(self._row(state, (step + plan.stride) * plan.timestep * 1e-3))
            if problem is not None:
                break
        if problem is not None:
            self._failed(context, f"{index * plan.piece + len(rows) * plan.frame * 1e-3:.3f} ps: {problem}")
        if not rows:
            return False
        end = context.getState(positions=True, velocities=True)
        arrays = {
            "frames": np.array(frames, dtype=np.float32),
            "table": np.array(rows),
            "positions": end.getPositions(asNumpy=True)._value,
            "velocities": end.getVelocities(asNumpy=True)._value,
        }
        events = [(s * plan.timestep * 1e-3, a, float(u)) for watch in watches for s, a, u in watch.events]
        header = {"events": events, "seconds": time.process_time() - spent, "seed": plan.seed}
        write_arrays(self.folder / f"piece-{index:04d}.safetensors", FORM, arrays, header)
        return problem is None

    def _advance(self, context: openmm.Context, steps: int) -> str | None:
        """Why the steps could not be made, or None."""
        try:
            context.getIntegrator().step(steps)
        except openmm.OpenMMException as error:
            if running.interrupted(error):
                raise KeyboardInterrupt from None
            return str(running.last_error(self.system) or error).splitlines()[0]
        return None

    def _check(self, state: openmm.State) -> str | None:
        positions, forces = (v._value for v in (state.getPositions(asNumpy=True), state.getForces(asNumpy=True)))
        return self.guard.check(positions, forces, state.getPotentialEnergy()._value, None)

    def _row(self, state: openmm.State, time_ps: float) -> list[float]:
        kinetic = state.getKineticEnergy()._value
        found = running.most_uncertain(self.system)
        return [
            time_ps,
            state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV,
            kinetic / KJ_PER_MOL_PER_EV,
            2.0 * kinetic / (self.freedom * BOLTZMANN_KJ_PER_MOL),
            np.nan if found is None else found[0],
            np.nan if found is None else found[1],
        ]

    def _failed(self, context: openmm.Context, message: str) -> bool:
        print(f"{self.folder.parent.name}/{self.folder.name} ended: {message}", flush=True)
        guards.save_failure(self.folder / "failure", context, self.it.topology, message)
        return False


def write_summary(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
