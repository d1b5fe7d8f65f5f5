"""settings -> a run in a folder, which can be interrupted and resumed.

The folder of a run::

    run.json         settings, versions, platform, atoms of the machine-learned region, an own uncertainty limit
    start.pdb        what is simulated, with added water     system.xml   the System
    checkpoint.zip   where the run is (see `checkpoints`)
    trajectory.dcd   frames                                  log.csv      energies, temperature, torsions
    final.pdb, final_state.xml, summary.png                  at the end
    uncertainty.csv  of an ensemble (see `uncertainty`)      uncertain/       frames, with on_uncertain = save
    failure/         System, State, integrator and message, if the run was stopped by a guard

A run has three phases: minimisation, equilibration (with a thermostat) and production (recorded).
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.data.files import write_atomically
from openmm_mlff.forces import running
from openmm_mlff.forces.serialization import load_system
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.sampling import checkpoints, guards
from openmm_mlff.sampling.bookkeeping import MinimizationProgress, degrees_of_freedom, programs
from openmm_mlff.sampling.checkpoints import Checkpoint, seed_for
from openmm_mlff.sampling.platforms import PlatformChoice, choose_platform
from openmm_mlff.sampling.reporters import ProgressBar, TableWriter, TrajectoryWriter
from openmm_mlff.sampling.settings import RunSettings, write_json
from openmm_mlff.sampling.systems import build
from openmm_mlff.sampling.uncertainty import UncertaintyTable
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

FORMAT = 1
#: seconds between two looks at Ctrl-C and the progress bar.
GLANCE = 0.25
#: 1/ps at least; a minimised start takes up half of its kinetic energy within a fraction of a picosecond.
EQUILIBRATION_FRICTION = 10.0
#: steps between two attempts of the Monte Carlo barostat.
BAROSTAT_INTERVAL = 25


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        finished: False if a signal stopped it. signal: its name, or empty.
        step: production steps made in all. steps_per_second: in the last phase that made steps; NaN if none did.
    """

    finished: bool
    step: int
    steps_per_second: float
    signal: str = ""


class Simulation:
    """One run in one folder; made by `start` or `resume`, run by `run`.

    Attributes:
        settings, output: what runs, and where its files are.
        facts: what was decided when the run was set up (``resolved`` in run.json).
    """

    def __init__(
        self,
        settings: RunSettings,
        output: Path,
        system: openmm.System,
        topology: app.Topology,
        start: np.ndarray,
        facts: Mapping[str, Any],
        checkpoint: Checkpoint,
        progress: bool = True,
        say: Callable[[str], None] = _say,
    ) -> None:
        self.settings, self.output, self.facts = settings, output, dict(facts)
        self._system, self._topology, self._checkpoint = system, topology, checkpoint
        self._progress, self._say = progress, say
        self._choice = PlatformChoice(facts["platform"], dict(facts["platform_properties"]), facts["inexact"])
        bonds = facts["bonds"] if settings.check_bonds else []
        box = topology.getPeriodicBoxVectors()
        self._periodic = box is not None
        vectors = None if box is None else np.array(box.value_in_unit(unit.nanometer))
        self._guard = guards.Guard(topology, bonds, start, vectors, settings.max_force)
        masses = np.array([system.getParticleMass(i)._value for i in range(system.getNumParticles())])
        self._mass = float(masses.sum())
        self._freedom = degrees_of_freedom(system)
        self._context: openmm.Context | None = None
        self._stop = guards.StopRequest()
        self._chunk = 1
        self._seconds = float("inf")
        self._trajectory: TrajectoryWriter | None = None
        self._table: TableWriter | None = None
        self._unsure: UncertaintyTable | None = None

    # -- set-up ------------------------------------------------------------------------------------------------

    @classmethod
    def start(
        cls, settings: RunSettings, output: str | Path, progress: bool = True, say: Callable[[str], None] = _say
    ) -> Simulation:
        """Build the System and write the folder, with a checkpoint before the first step.

        Raises `ValueError` if the folder holds a run already, and what `systems.build` raises for bad input.
        """
        output = Path(output)
        if (output / "run.json").exists():
            raise ValueError(f"output: {output} holds a run already; resume it, or choose another folder")
        if output.exists() and not output.is_dir():
            raise ValueError(f"output: expected a folder, got the file {output}")
        built = build(settings)
        choice = choose_platform(built.system.getNumParticles(), settings.platform, settings.threads)
        if settings.ensemble == "npt":
            built.system.addForce(openmm.MonteCarloBarostat(settings.pressure, settings.temperature, BAROSTAT_INTERVAL))
        facts = built.description | {
            "platform": choice.name,
            "platform_properties": choice.properties,
            "inexact": choice.inexact,
        }
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "system.xml", openmm.XmlSerializer.serialize(built.system).encode())
        with open(output / "start.pdb", "w", encoding="utf-8") as file:
            app.PDBFile.writeFile(built.topology, built.positions * unit.nanometer, file, keepIds=True)
        context = openmm.Context(built.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
        context.setPositions(built.positions)
        checkpoint = Checkpoint("minimize", 0, _state_xml(context))
        del context
        checkpoint.save(output / checkpoints.NAME)
        configuration = {"format": FORMAT, "settings": settings.to_dict(), "resolved": facts, "programs": programs()}
        # last, because its presence says that the folder is complete
        write_json(output / "run.json", configuration)
        return cls(settings, output, built.system, built.topology, built.positions, facts, checkpoint, progress, say)

    @classmethod
    def resume(
        cls,
        output: str | Path,
        steps: int | None = None,
        progress: bool = True,
        say: Callable[[str], None] = _say,
    ) -> Simulation:
        """Go on with the run of a folder from its checkpoint; `steps` makes it longer (or shorter).

        Raises `FileNotFoundError` if there is no run, `ValueError` if a file of it is damaged.
        """
        output = Path(output)
        if not (output / "run.json").is_file():
            raise FileNotFoundError(f"resume: no run.json in {output}")
        configuration = json.loads((output / "run.json").read_text(encoding="utf-8"))
        if configuration["format"] > FORMAT:
            raise ValueError(
                f"resume: {output} has format {configuration['format']}, this version reads up to {FORMAT}"
            )
        settings = RunSettings.from_dict(configuration["settings"])
        checkpoint = Checkpoint.load(output / checkpoints.NAME)
        system = load_system(output / "system.xml")
        pdb = app.PDBFile(str(output / "start.pdb"))
        start = np.array(pdb.getPositions(asNumpy=True)._value)
        if len(start) != system.getNumParticles():
            raise ValueError(f"resume: start.pdb has {len(start)} atoms, system.xml has {system.getNumParticles()}")
        run = cls(settings, output, system, pdb.topology, start, configuration["resolved"], checkpoint, progress, say)
        if steps is not None:
            run.extend(steps)
        run._explain_resume(configuration["programs"])
        return run

    def extend(self, steps: int) -> None:
        """Set the length of production to `steps`, also in run.json; raises `ValueError` if more are done already."""
        if self._checkpoint.phase == "production" and steps < self._checkpoint.step:
            raise ValueError(f"steps: expected at least {self._checkpoint.step}, which are done already, got {steps}")
        self.settings = self.settings.replace(steps=steps)
        configuration = json.loads((self.output / "run.json").read_text(encoding="utf-8"))
        write_json(self.output / "run.json", configuration | {"settings": self.settings.to_dict()})

    def _explain_resume(self, before: Mapping[str, str]) -> None:
        c = self._checkpoint
        now = programs()
        changed = [name for name in now if now[name] != before.get(name)]
        reasons = [self._choice.inexact] if self._choice.inexact else []
        if changed:
            reasons.append(f"{', '.join(changed)} changed since the run was started")
        if not c.scheduled:
            reasons.append("it was stopped between two regular checkpoints, where the random numbers start anew")
        where = f"resuming {c.phase} at step {c.step}"
        tail = "bit for bit the run without a stop" if not reasons else f"not bit for bit: {'; '.join(reasons)}"
        self._say(f"{where} ({tail})")

    # -- phases ------------------------------------------------------------------------------------------------

    def run(self, seconds: float | None = None) -> RunResult:
        """Run to the end, or until Ctrl-C or SIGTERM, after which a checkpoint is written and the result says so.

        After `seconds` of production it ends at the next checkpoint, as if it had been meant to be so long.

        Raises `guards.RunFailed` if the state stops being physical; System, State and integrator are then in
        ``failure/``, and the last checkpoint stays as it was.
        """
        rate = float("nan")
        self._seconds = float("inf") if seconds is None else seconds
        self._stop = guards.StopRequest()
        with self._stop:
            if self._checkpoint.phase == "minimize" and not self._stop:
                self._minimize()
            if self._checkpoint.phase == "equilibrate" and not self._stop:
                rate = self._dynamics("equilibrate", self.settings.equilibration_steps)
            if self._checkpoint.phase == "production" and not self._stop:
                latest = self._dynamics("production", self.settings.steps)
                rate = latest if latest > 0 else rate
        c = self._checkpoint
        step = c.step if c.phase == "production" else 0
        if self._stop:
            self._say(
                f"stopped by {self._stop.name} in {c.phase} at step {c.step}; resume to go on from its checkpoint"
            )
            return RunResult(False, step, rate, self._stop.name)
        return RunResult(True, step, rate)

    def _minimize(self) -> None:
        s = self.settings
        context = self._enter(self._checkpoint)
        try:
            if s.minimization_steps:
                reporter = MinimizationProgress(self._stop, s.minimization_steps, self._say if self._progress else None)
                with running.without_force_limit(self._system):
                    openmm.LocalEnergyMinimizer.minimize(context, 10.0, s.minimization_steps, reporter)
                if self._stop:
                    return
                reporter.done()
            # velocities of half a step before: the forces of the start count
            context.setVelocitiesToTemperature(s.temperature, seed_for(s.seed, "velocities", 0))
        except openmm.OpenMMException as error:
            raise self._failed("minimize", 0, error) from error
        self._next_phase(context, "equilibrate")

    def _next_phase(self, context: openmm.Context, phase: str) -> None:
        self._checkpoint = Checkpoint(phase, 0, _state_xml(context))
        self._checkpoint.save(self.output / checkpoints.NAME)

    def _dynamics(self, phase: str, total: int) -> float:
        """Integrate one phase to its end or a signal; returns steps per second."""
        s = self.settings
        recorded = phase == "production"
        step = first = self._checkpoint.step
        context = self._enter(self._checkpoint)
        begin = time.monotonic()
        try:
            if recorded:
                self._open_writers(context, step)
                if step == 0:
                    self._report(context, 0)
            with ProgressBar(phase, total, s.timestep * 1e-3, step, self._progress) as bar:
                while step < total and not self._stop:
                    event = min(_after(step, s.report_interval), _after(step, s.checkpoint_interval), total)
                    step = self._integrate(context, phase, step, event, bar)
                    if recorded and step % s.report_interval == 0:
                        self._report(context, step)
                    if step % s.checkpoint_interval == 0 or step == total or self._stop:
                        self._save(context, phase, step)
                        if recorded and step < total and time.monotonic() - begin > self._seconds:
                            self.extend(step)
                            total = step
                        if step < total and not self._stop:
                            context = self._enter(self._checkpoint)
            if recorded and step == total:
                self._finish(context)
        finally:
            self._close_writers()
        if step == total and phase == "equilibrate":
            self._next_phase(context, "production")
        return (step - first) / max(time.monotonic() - begin, 1e-9)

    def _integrate(self, context: openmm.Context, phase: str, step: int, target: int, bar: ProgressBar) -> int:
        integrator = context.getIntegrator()
        while step < target and not self._stop:
            n = min(self._chunk, target - step)
            before = time.monotonic()
            try:
                integrator.step(n)
            except openmm.OpenMMException as error:
                raise self._failed(phase, step, error) from error
            pace = GLANCE / max(time.monotonic() - before, 1e-6)
            self._chunk = int(np.clip(round(n * pace), 1, 2 * self._chunk + 1))
            step += n
            bar.update(step)
        return step

    def _enter(self, checkpoint: Checkpoint) -> openmm.Context:
        """A new Context at a checkpoint: what both the running and the resumed run go on with."""
        s = self.settings
        seed = seed_for(s.seed, checkpoint.phase, checkpoint.step)
        dt = s.timestep * 1e-3
        if s.ensemble == "nve" and checkpoint.phase == "production":
            integrator: openmm.Integrator = openmm.VerletIntegrator(dt)
        else:
            equilibrating = checkpoint.phase == "equilibrate"
            friction = max(s.friction, EQUILIBRATION_FRICTION) if equilibrating else s.friction
            integrator = openmm.LangevinMiddleIntegrator(s.temperature, friction, dt)
            integrator.setRandomNumberSeed(seed)
        for force in self._system.getForces():
            if isinstance(force, openmm.MonteCarloBarostat):
                force.setRandomNumberSeed(seed)
        self._context = None
        try:
            context = openmm.Context(self._system, integrator, self._choice.platform, self._choice.properties)
        except openmm.OpenMMException as error:
            raise ValueError(f"platform: {self._choice.name} cannot run this system ({error})") from error
        context.setState(checkpoint.openmm_state())
        context.setStepCount(checkpoint.step)
        context.setTime(checkpoint.step * dt)
        running.save_uncertain_frames(self._system, self.output / "uncertain")
        if checkpoint.pair_lists:
            running.restore_pair_lists(self._system, checkpoint.pair_lists)
        self._context = context
        return context

    # -- frames and checkpoints --------------------------------------------------------------------------------

    def _open_writers(self, context: openmm.Context, step: int) -> None:
        s, periodic = self.settings, self._periodic
        old = step > 0
        self._trajectory = TrajectoryWriter(
            self.output / "trajectory.dcd",
            self._topology,
            interval=s.report_interval,
            timestep=s.timestep * 1e-3,
            molecules=context.getMolecules() if periodic else None,
            center=self.facts["ml_atoms"],
            keep=step // s.report_interval + 1 if old else None,
        )
        self._table = TableWriter(
            self.output / "log.csv",
            self.facts["torsions"],
            periodic=periodic,
            mass=self._mass,
            keep=step if old else None,
        )
        if any(isinstance(c.model, Ensemble) for c in running.computations(self._system)):
            self._unsure = UncertaintyTable(self.output / "uncertainty.csv", keep=step if old else None)

    def _close_writers(self) -> None:
        for writer in (self._trajectory, self._table, self._unsure):
            if writer is not None:
                writer.close()
        self._trajectory = self._table = self._unsure = None

    def _report(self, context: openmm.Context, step: int) -> None:
        """Check a frame and write it."""
        assert self._trajectory is not None and self._table is not None
        try:
            state = context.getState(positions=True, velocities=True, energy=True, forces=True)
        except openmm.OpenMMException as error:
            raise self._failed("production", step, error) from error
        positions = state.getPositions(asNumpy=True)._value
        forces = state.getForces(asNumpy=True)._value
        potential, kinetic = state.getPotentialEnergy()._value, state.getKineticEnergy()._value
        box = state.getPeriodicBoxVectors(asNumpy=True)._value if self._periodic else None
        wrong = self._guard.check(positions, forces, potential, box)
        if wrong is not None:
            raise self._failed("production", step, wrong)
        temperature = 2.0 * kinetic / (self._freedom * BOLTZMANN_KJ_PER_MOL)
        time_ps = step * self.settings.timestep * 1e-3
        self._trajectory.write(positions, box)
        self._table.write(step, time_ps, potential, kinetic, temperature, positions, box)
        if self._unsure is not None:
            self._unsure.write(step, time_ps, self._system)

    def _save(self, context: openmm.Context, phase: str, step: int) -> None:
        """Write the checkpoint, after the frames that it counts on are on disk."""
        for writer in (self._trajectory, self._table, self._unsure):
            if writer is not None:
                writer.sync()
        positions = context.getState(positions=True).getPositions(asNumpy=True)._value
        if not np.isfinite(positions).all():
            raise self._failed(phase, step, "positions are not numbers")
        regular = step % self.settings.checkpoint_interval == 0
        lists = running.pair_list_state(self._system)
        compiled = next((c.compiled for c in running.computations(self._system)), None)
        before = self._checkpoint.compiled
        if before is not None and compiled is not None and before != compiled:
            words = {True: "compiled", False: "op by op"}
            self._say(
                f"the model ran {words[before]} before and runs {words[compiled]} now: not bit for bit the same run"
            )
        self._checkpoint = Checkpoint(phase, step, _state_xml(context), regular, compiled, lists)
        self._checkpoint.save(self.output / checkpoints.NAME)

    def _finish(self, context: openmm.Context) -> None:
        write_atomically(self.output / "final_state.xml", _state_xml(context).encode())
        assert self._trajectory is not None
        state = context.getState(positions=True)
        positions = state.getPositions(asNumpy=True)._value
        topology = self._topology
        if self._periodic:
            positions = self._trajectory.imaged(positions, state.getPeriodicBoxVectors(asNumpy=True)._value)
            topology = copy.deepcopy(topology)
            topology.setPeriodicBoxVectors(state.getPeriodicBoxVectors())
        with open(self.output / "final.pdb", "w", encoding="utf-8") as file:
            app.PDBFile.writeFile(topology, positions * unit.nanometer, file, keepIds=True)

    def _failed(self, phase: str, step: int, cause: openmm.OpenMMException | str) -> BaseException:
        """The exception to raise, after everything that helps to find out why has been saved."""
        reason = str(cause)
        if not isinstance(cause, str):
            original = running.last_error(self._system)
            if isinstance(original, KeyboardInterrupt | SystemExit):
                return original
            if original is not None:
                reason = str(original)
            elif "NaN" in reason:
                reason = self._where_nan() or reason
        message = f"{phase} stopped near step {step}: {reason}"
        assert self._context is not None
        folder = guards.save_failure(self.output / "failure", self._context, self._topology, message)
        return guards.RunFailed(
            f"{message} (System, State and integrator are in {folder}; the last good state is the checkpoint of "
            f"{self._checkpoint.phase} at step {self._checkpoint.step})",
            folder,
        )

    def _where_nan(self) -> str | None:
        assert self._context is not None
        positions = self._context.getState(positions=True).getPositions(asNumpy=True)._value
        return self._guard.check(positions, np.zeros_like(positions), 0.0, None)


def _after(step: int, interval: int) -> int:
    return (step // interval + 1) * interval


def _state_xml(context: openmm.Context) -> str:
    return openmm.XmlSerializer.serialize(context.getState(positions=True, velocities=True, parameters=True))
