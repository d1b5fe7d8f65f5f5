"""A run of many replicas in a folder, which can be interrupted and resumed.

    run = ReplicaRun.start(system, topology, positions, ReplicaSettings(n=64, steps=100_000), "run")
    run.run()
    phi = read_observables("run")["phi"]            # (frames, replicas)

The folder::

    run.json         settings, versions, platform       system.xml, molecule.json, molecule.pdb   one copy
    checkpoint.zip   where the run is (see `checkpoints`)
    observables.npy  energies, temperature, distances and torsions of every replica (see `replica_files`)
    trajectory.dcd   frames of all replicas              final_state.xml            at the end
    failure/         System, State, integrator and message, if the run was stopped by a guard

As with a run of one molecule, a checkpoint is a fresh start for the run that writes it and for the one that resumes,
so both are the same bit for bit on a platform that is deterministic.
"""

from __future__ import annotations

import dataclasses
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

from openmm_mlff.analysis.observables import backbone_torsions
from openmm_mlff.data.files import write_atomically
from openmm_mlff.forces import running
from openmm_mlff.forces.serialization import load_system
from openmm_mlff.sampling import checkpoints, guards, replica_files
from openmm_mlff.sampling.bookkeeping import MinimizationProgress, programs
from openmm_mlff.sampling.checkpoints import Checkpoint, seed_for
from openmm_mlff.sampling.platforms import PlatformChoice
from openmm_mlff.sampling.replica_settings import ReplicaSettings
from openmm_mlff.sampling.replicas import ReplicaFrame, Replicas
from openmm_mlff.sampling.reporters import ProgressBar, TrajectoryWriter
from openmm_mlff.sampling.settings import write_json

FORMAT = 1
#: seconds between two looks at Ctrl-C and the progress bar.
GLANCE = 0.25
#: 1/ps at least; a minimised start takes up half of its kinetic energy within a fraction of a picosecond.
EQUILIBRATION_FRICTION = 10.0

#: all replicas at one moment -> one number per replica
Observable = Callable[[ReplicaFrame], np.ndarray]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class ReplicaResult:
    """How a run ended.

    Attributes:
        finished: False if a signal stopped it. signal: its name, or empty.
        step: production steps of every replica. steps_per_second: of all replicas together; NaN if none were made.
    """

    finished: bool
    step: int
    steps_per_second: float
    signal: str = ""


class ReplicaRun:
    """One run of many replicas in one folder; made by `start` or `resume`, run by `run`.

    Attributes:
        replicas: the copies. settings, output: what runs, and where its files are.
    """

    def __init__(
        self,
        replicas: Replicas,
        settings: ReplicaSettings,
        output: Path,
        facts: Mapping[str, Any],
        checkpoint: Checkpoint,
        observables: Mapping[str, Observable],
        progress: bool,
        say: Callable[[str], None],
    ) -> None:
        self.replicas, self.settings, self.output, self.facts = replicas, settings, output, dict(facts)
        self._checkpoint, self._observables, self._progress, self._say = checkpoint, dict(observables), progress, say
        self._choice = PlatformChoice(facts["platform"], dict(facts["platform_properties"]), facts["inexact"])
        self._table = replica_files.GeometryTable(settings.distances, facts["torsions"])
        names = [*replica_files.ENERGIES, *self._table.names, *self._observables]
        if facts["observables"] != names:
            raise ValueError(f"observables: expected those of the run ({', '.join(facts['observables'])}), got {names}")
        topology, start = replica_files.read_molecule(output)
        bonds = facts["bonds"] if settings.check_bonds else []
        self._periodic = replicas.single.usesPeriodicBoundaryConditions()
        box = replicas.single.getDefaultPeriodicBoxVectors()
        vectors = np.array([list(v._value) for v in box]) if self._periodic else None
        self._guard = guards.Guard(topology, bonds, start, vectors, settings.max_force)
        self._context: openmm.Context | None = None
        self._stop = guards.StopRequest()
        self._chunk = 1
        self._rows: replica_files.ObservableWriter | None = None
        self._frames: TrajectoryWriter | None = None

    # -- set-up ------------------------------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        system: openmm.System,
        topology: app.Topology,
        positions: np.ndarray | unit.Quantity,
        settings: ReplicaSettings,
        output: str | Path,
        observables: Mapping[str, Observable] | None = None,
        progress: bool = True,
        say: Callable[[str], None] = _say,
    ) -> ReplicaRun:
        """Write the folder, with a checkpoint before the first step.

        Args:
            system, topology: of one copy.
            positions: ``(size, 3)`` for all replicas, or ``(n, size, 3)``, nm or a Quantity.
            observables: name -> function of a frame that gives ``(n,)`` numbers; they join the table. A run that is
                resumed has to be given them again.

        Raises `ValueError` if the folder holds a run already, and what `Replicas` raises.
        """
        output = Path(output)
        if (output / "run.json").exists():
            raise ValueError(f"output: {output} holds a run already; resume it, or choose another folder")
        if output.exists() and not output.is_dir():
            raise ValueError(f"output: expected a folder, got the file {output}")
        replicas = Replicas(system, topology, settings.n, settings.batch)
        start = replicas.checked_positions(positions)
        observables = observables or {}
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "system.xml", openmm.XmlSerializer.serialize(system).encode())
        replica_files.write_molecule(output, topology, start[0])
        facts = _facts(replicas, settings, list(observables))
        for note in replicas.notes:
            say(f"replicas: {note}")
        context = openmm.Context(
            replicas.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
        )
        replicas.set_positions(context, start)
        context.computeVirtualSites()
        checkpoint = Checkpoint("minimize", 0, _state_xml(context))
        del context
        checkpoint.save(output / checkpoints.NAME)
        # last, because its presence says that the folder is complete
        configuration = {"format": FORMAT, "settings": settings.to_dict(), "resolved": facts, "programs": programs()}
        write_json(output / "run.json", configuration)
        return cls(replicas, settings, output, facts, checkpoint, observables, progress, say)

    @classmethod
    def resume(
        cls,
        output: str | Path,
        steps: int | None = None,
        observables: Mapping[str, Observable] | None = None,
        progress: bool = True,
        say: Callable[[str], None] = _say,
    ) -> ReplicaRun:
        """Go on from the checkpoint of a folder; `steps` makes the run longer (or shorter).

        Raises `FileNotFoundError` if there is no run, `ValueError` if a file of it is damaged, or if `observables` are
        not those that the run was started with.
        """
        output = Path(output)
        if not (output / "run.json").is_file():
            raise FileNotFoundError(f"resume: no run.json in {output}")
        about = json.loads((output / "run.json").read_text(encoding="utf-8"))
        if about["format"] > FORMAT:
            raise ValueError(f"resume: {output} has format {about['format']}, this version reads up to {FORMAT}")
        settings = ReplicaSettings(**about["settings"])
        checkpoint = Checkpoint.load(output / checkpoints.NAME)
        topology, _ = replica_files.read_molecule(output)
        replicas = Replicas(load_system(output / "system.xml"), topology, settings.n, settings.batch)
        run = cls(replicas, settings, output, about["resolved"], checkpoint, observables or {}, progress, say)
        if steps is not None:
            run.extend(steps)
        now = programs()
        changed = [name for name in now if now[name] != about["programs"].get(name)]
        reasons = [run._choice.inexact] * bool(run._choice.inexact)
        reasons += [f"{', '.join(changed)} changed since the run was started"] * bool(changed)
        reasons += ["it was stopped between two regular checkpoints"] * (not checkpoint.scheduled)
        tail = "bit for bit the run without a stop" if not reasons else f"not bit for bit: {'; '.join(reasons)}"
        say(f"resuming {checkpoint.phase} at step {checkpoint.step} ({tail})")
        return run

    def extend(self, steps: int) -> None:
        """Set the length of production to `steps`, also in run.json; raises `ValueError` if more are done already."""
        if self._checkpoint.phase == "production" and steps < self._checkpoint.step:
            raise ValueError(f"steps: expected at least {self._checkpoint.step}, which are done already, got {steps}")
        self.settings = dataclasses.replace(self.settings, steps=steps)
        about = json.loads((self.output / "run.json").read_text(encoding="utf-8"))
        write_json(self.output / "run.json", about | {"settings": self.settings.to_dict()})

    # -- phases ------------------------------------------------------------------------------------------------

    def run(self) -> ReplicaResult:
        """Run to the end, or until Ctrl-C or SIGTERM, after which a checkpoint is written and the result says so.

        Raises `guards.RunFailed` naming the replicas if their state stops being physical; System, State and integrator
        are then in ``failure/``, and the last checkpoint stays as it was.
        """
        rate = float("nan")
        self._stop = guards.StopRequest()
        with self._stop:
            if self._checkpoint.phase == "minimize":
                self._minimize()
            for phase, total in (
                ("equilibrate", self.settings.equilibration_steps),
                ("production", self.settings.steps),
            ):
                if self._checkpoint.phase == phase and not self._stop:
                    latest = self._dynamics(phase, total)
                    rate = latest if latest > 0 else rate
        c = self._checkpoint
        step = c.step if c.phase == "production" else 0
        if self._stop:
            self._say(f"stopped by {self._stop.name} in {c.phase} at step {c.step}; resume to go on")
        return ReplicaResult(not self._stop, step, rate, self._stop.name)

    def _minimize(self) -> None:
        s = self.settings
        context = self._enter(self._checkpoint)
        if s.minimization_steps:
            reporter = MinimizationProgress(self._stop, s.minimization_steps, self._say if self._progress else None)
            try:
                self.replicas.minimize(context, max_iterations=s.minimization_steps, reporter=reporter)
            except openmm.OpenMMException as error:
                raise self._failed("minimize", 0, error) from error
            if self._stop:
                return
            reporter.done()
        if self.replicas.n_constraints:
            context.applyConstraints(1e-6)
        self.replicas.set_velocities(context, s.temperature, s.seed)
        self._next_phase(context, "equilibrate")

    def _next_phase(self, context: openmm.Context, phase: str) -> None:
        self._checkpoint = Checkpoint(phase, 0, _state_xml(context))
        self._checkpoint.save(self.output / checkpoints.NAME)

    def _dynamics(self, phase: str, total: int) -> float:
        """Integrate one phase to its end or a signal; returns steps per second of all replicas together."""
        s = self.settings
        recorded = phase == "production"
        step = first = self._checkpoint.step
        context = self._enter(self._checkpoint)
        begin = time.monotonic()
        intervals = [s.checkpoint_interval, s.report_interval, *([s.frame_interval] if s.frame_interval else [])]
        try:
            if recorded:
                self._open_writers(step)
                if step == 0:
                    self._report(context, 0)
            with ProgressBar(f"{phase}, {s.n} replicas", total, s.timestep * 1e-3, step, self._progress) as bar:
                while step < total and not self._stop:
                    event = min([total, *((step // i + 1) * i for i in intervals)])
                    step = self._integrate(context, phase, step, event, bar)
                    if recorded:
                        self._report(context, step)
                    if step % s.checkpoint_interval == 0 or step == total or self._stop:
                        self._save(context, phase, step)
                        if step < total and not self._stop:
                            context = self._enter(self._checkpoint)
            if recorded and step == total:
                write_atomically(self.output / "final_state.xml", _state_xml(context).encode())
        finally:
            for writer in (self._rows, self._frames):
                if writer is not None:
                    writer.close()
            self._rows = self._frames = None
        if step == total and phase == "equilibrate":
            self._next_phase(context, "production")
        return s.n * (step - first) / max(time.monotonic() - begin, 1e-9)

    def _integrate(self, context: openmm.Context, phase: str, step: int, target: int, bar: ProgressBar) -> int:
        while step < target and not self._stop:
            n = min(self._chunk, target - step)
            before = time.monotonic()
            try:
                context.getIntegrator().step(n)
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
        dt = s.timestep * 1e-3
        if s.ensemble == "nve" and checkpoint.phase == "production":
            integrator: openmm.Integrator = openmm.VerletIntegrator(dt)
        else:
            equilibrating = checkpoint.phase == "equilibrate"
            friction = max(s.friction, EQUILIBRATION_FRICTION) if equilibrating else s.friction
            integrator = openmm.LangevinMiddleIntegrator(s.temperature, friction, dt)
            integrator.setRandomNumberSeed(seed_for(s.seed, checkpoint.phase, checkpoint.step))
        self._context = None
        context = openmm.Context(self.replicas.system, integrator, self._choice.platform, self._choice.properties)
        context.setState(checkpoint.openmm_state())
        context.setStepCount(checkpoint.step)
        context.setTime(checkpoint.step * dt)
        if checkpoint.pair_lists:
            running.restore_pair_lists(self.replicas.system, checkpoint.pair_lists)
        self._context = context
        return context

    # -- frames and checkpoints --------------------------------------------------------------------------------

    def _open_writers(self, step: int) -> None:
        s = self.settings
        names = self.facts["observables"]
        keep = step // s.report_interval + 1 if step else None
        self._rows = replica_files.ObservableWriter(self.output / replica_files.OBSERVABLES, len(names), s.n, keep)
        if s.frame_interval:
            self._frames = TrajectoryWriter(
                self.output / replica_files.TRAJECTORY,
                self.replicas.all_topology(),
                interval=s.frame_interval,
                timestep=s.timestep * 1e-3,
                keep=step // s.frame_interval + 1 if step else None,
            )

    def _report(self, context: openmm.Context, step: int) -> None:
        """Check a frame, and write what is due."""
        s = self.settings
        row, frame = step % s.report_interval == 0, s.frame_interval and step % s.frame_interval == 0
        if not (row or frame):
            return
        try:
            now = self.replicas.frame(context)
        except openmm.OpenMMException as error:
            raise self._failed("production", step, error) from error
        box = None
        if self._periodic:
            box = context.getState().getPeriodicBoxVectors(asNumpy=True)._value
        wrong = self._guard.check_copies(now.positions, now.forces, now.potential, box)
        if wrong:
            raise self._failed("production", step, wrong)
        if row and self._rows is not None:
            own = [np.asarray(function(now), dtype=np.float64) for function in self._observables.values()]
            for name, values in zip(self._observables, own, strict=True):
                if values.shape != (s.n,):
                    raise ValueError(f"observables: expected shape {(s.n,)} from {name!r}, got {values.shape}")
            energies = [now.potential, now.kinetic, now.temperature]
            self._rows.write(np.concatenate([np.stack(energies), self._table(now.positions), *(v[None] for v in own)]))
        if frame and self._frames is not None:
            # an open copy drifts without end, and single precision would lose its geometry far from the origin
            centre = 0.0 if self._periodic else now.positions.mean(axis=1, keepdims=True)
            self._frames.write((now.positions - centre).reshape(-1, 3), box)

    def _save(self, context: openmm.Context, phase: str, step: int) -> None:
        """Write the checkpoint, after the frames that it counts on are on disk."""
        for writer in (self._rows, self._frames):
            if writer is not None:
                writer.sync()
        positions = self.replicas.positions(context)
        broken = np.flatnonzero(~np.isfinite(positions).all(axis=(1, 2)))
        if len(broken):
            raise self._failed(phase, step, {int(k): "positions are not numbers" for k in broken})
        regular = step % self.settings.checkpoint_interval == 0
        lists = running.pair_list_state(self.replicas.system)
        compiled = next((c.compiled for c in running.computations(self.replicas.system)), None)
        self._checkpoint = Checkpoint(phase, step, _state_xml(context), regular, compiled, lists)
        self._checkpoint.save(self.output / checkpoints.NAME)

    def _failed(self, phase: str, step: int, cause: openmm.OpenMMException | Mapping[int, str]) -> BaseException:
        """The exception to raise, after everything that helps to find out why has been saved."""
        assert self._context is not None
        replicas: list[int] = []
        if isinstance(cause, Mapping):
            replicas = sorted(cause)
            shown = [f"replica {k}: {cause[k]}" for k in replicas[:5]]
            reason = "; ".join(shown) + (f"; and {len(replicas) - 5} more" if len(replicas) > 5 else "")
        else:
            original = running.last_error(self.replicas.system)
            if isinstance(original, KeyboardInterrupt | SystemExit):
                return original
            reason = str(cause if original is None else original)
            replica = getattr(original, "replica", None)
            positions = self.replicas.positions(self._context)
            broken = np.flatnonzero(~np.isfinite(positions).all(axis=(1, 2))).tolist()
            replicas = [replica] if replica is not None else broken
            if original is None and broken:
                reason = f"replica {broken[0]}: positions are not numbers"
        message = f"{phase} stopped near step {step}: {reason}"
        topology = self.replicas.all_topology()
        folder = guards.save_failure(self.output / "failure", self._context, topology, message)
        where = f"{self._checkpoint.phase} at step {self._checkpoint.step}"
        saved = f"System, State and integrator are in {folder}; the last good state is the checkpoint of {where}"
        return guards.RunFailed(f"{message} ({saved})", folder, replicas)


def _facts(replicas: Replicas, settings: ReplicaSettings, functions: list[str]) -> dict[str, Any]:
    """What is decided when a run is set up, as plain data."""
    choice = replicas.platform(settings.platform, settings.threads)
    torsions = dict(settings.torsions) or backbone_torsions(replicas.topology)
    for name, atoms in (*settings.distances.items(), *torsions.items()):
        if max(atoms) >= replicas.size:
            raise ValueError(
                f"torsions, distances: expected indices below {replicas.size} for {name!r}, got {max(atoms)}"
            )
    names = [*replica_files.ENERGIES, *settings.distances, *torsions, *functions]
    if len(set(names)) != len(names):
        raise ValueError(f"observables: expected every name once, got {names}")
    return {
        "particles": replicas.size,
        "periodic": replicas.single.usesPeriodicBoundaryConditions(),
        "platform": choice.name,
        "platform_properties": choice.properties,
        "inexact": choice.inexact,
        "bonds": sorted(sorted((bond.atom1.index, bond.atom2.index)) for bond in replicas.topology.bonds()),
        "torsions": {name: list(atoms) for name, atoms in torsions.items()},
        "observables": names,
        "notes": replicas.notes,
    }


def _state_xml(context: openmm.Context) -> str:
    return openmm.XmlSerializer.serialize(context.getState(positions=True, velocities=True, parameters=True))
