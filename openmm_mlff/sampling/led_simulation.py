"""learned latent dynamics and OpenMM in turn: latent steps are fast, molecular dynamics keep them honest.

    simulation = LEDSimulation(system, topology, "led.safetensors", macro_steps=100, micro_steps=10, warmup=20)
    simulation.setPositions(positions)
    simulation.minimizeEnergy()
    simulation.reporters.append(LatentReporter("latent.csv"))
    simulation.reporters.append(BackMappedReporter("solute.dcd", every=10))
    simulation.step(10_000)

A frame is the time of one latent step (``model.interval``). Every walker starts with `warmup` frames of molecular
dynamics (MD). Then rounds follow: `macro_steps` latent frames; the return (decode, put into the solvent, relax,
equilibrate: see `back_mapping`); `micro_steps` frames of MD, which are encoded and give the propagator its memory.
The ratio rho of latent time to time of MD bounds the gain by 1 + rho (Vlachas, Zavadlav, Praprotnik, Koumoutsakos,
J. Chem. Theory Comput. 18, 538 (2022), couple the same way in principle, without an MD engine).

Units are OpenMM's: nm, ps, kJ/mol, K; quantities are understood too.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.sampling import guards, led_checkpoint
from openmm_mlff.sampling.back_mapping import BackMapper, RelaxationReport, RelaxationSettings, solute_topology
from openmm_mlff.sampling.checkpoints import seed_for
from openmm_mlff.sampling.led_checkpoint import LEDState
from openmm_mlff.sampling.led_dynamics import MolecularDynamics, Walker
from openmm_mlff.sampling.led_records import MACRO, MICRO, WARMUP, Frames, LEDStatistics, Return
from openmm_mlff.sampling.led_reporters import LEDReporter
from openmm_mlff.sampling.led_return import Rebuilder
from openmm_mlff.sampling.led_setup import (
    check_model,
    check_temperature,
    find_solute,
    make_integrator,
    positive,
    relaxation_settings,
    start_positions,
)
from openmm_mlff.sampling.platforms import choose_platform
from openmm_mlff.sampling.propagators import LatentState, Propagator, load_propagator
from openmm_mlff.sampling.reporters import ProgressBar
from openmm_mlff.sampling.settings import require_whole
from openmm_mlff.sampling.solvent import SolventBox
from openmm_mlff.sampling.structure_checks import whole
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

#: latent steps between two looks at the model's doubt
WATCH_EVERY = 10
#: above it the model should not be trusted
DOUBT = 1.0
#: a decoded and minimised structure may lie so many kT above the highest energy that MD has had
MARGIN = 10.0


class LEDSimulation:
    """Walkers that alternate between latent and molecular dynamics.

    Args:
        system: of all particles, solvent included; it is copied. topology: of the same.
        model: a `Propagator` of the solute, or the path of a model file.
        temperature: K. friction: 1/ps. timestep: ps, of MD, a divisor of the model's interval.
        macro_steps: latent frames in a round. micro_steps: frames of MD in a round; 0 never returns to MD.
        equilibration: ps of MD after a return that are not recorded. relaxation: everything about a return; replaces
            `equilibration`.
        warmup: frames of MD at the start.
        solute: atoms that the model knows, as indices or an mdtraj selection; None: all but water and ions.
        n_walkers: latent steps are made for all walkers at once, MD for one after the other.
        platform: of OpenMM, by name or as an object; None chooses by size. seed: of everything.
        watch: return to MD early where the model's doubt is above 1. Latent steps of a block of `WATCH_EVERY` whose end
            is doubted are dropped, and MD goes on from the block's start.
        integrator: for MD instead of the Langevin one of `temperature`, `friction` and `timestep`.
        allow_other_temperature: accept a model that was trained at another temperature.
        superpose: put what is decoded on to the last structure of MD; False leaves it where it is decoded, which is
            for particles in a field. None: unless the solute is a single particle.
        failure: folder for the state of a run that failed.

    Attributes:
        model, topology, solute, solute_topology: what is simulated. system, integrator, context: those of MD.
        reporters: `LEDReporter`s. statistics: counts and times.
        reference: solute positions at the start, ``(n_solute, 3)`` nm. heavy: its heavy atoms.

    Raises `ValueError` naming the argument, what was expected and what came; `FileNotFoundError` for a missing model.
    """

    def __init__(
        self,
        system: openmm.System,
        topology: app.Topology,
        model: Propagator | str | Path,
        *,
        temperature: float | unit.Quantity = 300.0,
        friction: float | unit.Quantity = 1.0,
        timestep: float | unit.Quantity = 0.004,
        macro_steps: int,
        micro_steps: int,
        equilibration: float | unit.Quantity = 2.0,
        relaxation: RelaxationSettings | None = None,
        warmup: int = 10,
        solute: Sequence[int] | str | None = None,
        n_walkers: int = 1,
        platform: str | openmm.Platform | None = None,
        seed: int = 0,
        watch: bool = True,
        integrator: openmm.Integrator | None = None,
        allow_other_temperature: bool = False,
        superpose: bool | None = None,
        failure: str | Path = "failure",
    ) -> None:
        for name, value, least in (("macro_steps", macro_steps, 1), ("micro_steps", micro_steps, 0),
                                   ("warmup", warmup, 1), ("n_walkers", n_walkers, 1), ("seed", seed, 0)):  # fmt: skip
            require_whole(name, value, least)
        if topology.getNumAtoms() != system.getNumParticles():
            raise ValueError(
                f"topology: expected {system.getNumParticles()} atoms, as the System has, got {topology.getNumAtoms()}"
            )
        self.model = model if isinstance(model, Propagator) else load_propagator(model)
        self.topology = topology
        self.temperature = positive("temperature", temperature, unit.kelvin)
        check_temperature(self.model, self.temperature, allow_other_temperature)
        self.solute = find_solute(topology, solute)
        self.solute_topology = solute_topology(topology, self.solute)
        check_model(self.model, self.solute_topology)
        self.macro_steps, self.micro_steps, self.warmup, self.n_walkers = macro_steps, micro_steps, warmup, n_walkers
        self._watch, self._seed, self._failure = watch, seed, Path(failure)
        self.superpose = len(self.solute) > 1 if superpose is None else superpose
        self._solvent = SolventBox(topology, self.solute, self.superpose)
        if self._solvent.molecules and not system.usesPeriodicBoundaryConditions():
            raise ValueError("system: expected a periodic box around the solvent, got none")
        self._relaxation = relaxation or relaxation_settings(equilibration)
        self.integrator = make_integrator(integrator, self.temperature, friction, timestep)
        self.system = openmm.XmlSerializer.clone(system)
        named = platform.getName() if isinstance(platform, openmm.Platform) else platform
        self._choice = choose_platform(system.getNumParticles(), named)
        self._dynamics = MolecularDynamics(
            self.system, topology, self.integrator, self._choice, self.model.interval, self.solute, self._failure
        )
        self.reporters: list[LEDReporter] = []
        self.statistics = LEDStatistics()
        self.reference, self.heavy = np.empty((0, 3)), np.empty(0, dtype=np.int64)
        self._opened: list[LEDReporter] = []
        self._saved_reporters: dict[str, Any] = {}
        self._mapper: BackMapper | None = None
        self._at = LEDState.start([], warmup, seed)

    @property
    def context(self) -> openmm.Context:
        """The Context of MD; between stretches it holds the walker that was the last to run."""
        return self._dynamics.context

    @property
    def frames(self) -> np.ndarray:
        """Frames that each walker has made, ``(n_walkers,)``."""
        return self._at.frame.copy()

    @property
    def latent(self) -> LatentState | None:
        """The latent state of all walkers; None before the first warm-up is over."""
        return self._at.latent

    # -- what goes in ----------------------------------------------------------------------------------------------

    def setPositions(self, positions: np.ndarray | unit.Quantity, box: np.ndarray | None = None) -> None:
        """Start anew from positions ``(n_particles, 3)``, or ``(n_walkers, n_particles, 3)``, nm or a Quantity.

        Args:
            box: vectors ``(3, 3)`` nm; None takes those of the System.

        Raises `ValueError` for another shape, numbers that are not finite, or a solute with clashes.
        """
        start = start_positions(positions, self.n_walkers, self.system.getNumParticles())
        if box is None:
            box = np.array([v.value_in_unit(unit.nanometer) for v in self.system.getDefaultPeriodicBoxVectors()])
        if self.system.usesPeriodicBoundaryConditions():
            for x in start:
                x[self.solute] = whole(self.solute_topology, x[self.solute], box)
        self._set_reference(start[0][self.solute])
        walkers = [Walker(x, np.zeros_like(x), np.array(box)) for x in start]
        self._at = LEDState.start(walkers, self.warmup, self._seed)
        self.statistics = LEDStatistics()

    def _set_reference(self, reference: np.ndarray) -> None:
        self.reference = np.array(reference)
        self._mapper = BackMapper(
            self.system, self.topology, self.solute.tolist(), self.reference, self.temperature,
            self.integrator.getStepSize()._value, self._relaxation, self._choice,
        )  # fmt: skip
        self.heavy = self._mapper.heavy

    def minimizeEnergy(self, tolerance: float | unit.Quantity = 10.0, maxIterations: int = 0) -> None:
        """Minimise every walker's start; force tolerance in kJ/mol/nm."""
        self._require_positions()
        limit = positive("tolerance", tolerance, unit.kilojoule_per_mole / unit.nanometer)
        self._at.walkers = [self._dynamics.minimize(w, limit, maxIterations) for w in self._at.walkers]

    # -- running ---------------------------------------------------------------------------------------------------

    def step(self, n_frames: int, progress: bool | None = None) -> None:
        """Make `n_frames` frames with every walker, latent ones and those of MD, the warm-up included.

        Args:
            progress: show a bar; None shows it on a terminal.

        Raises `guards.RunFailed` if MD or the model give numbers that are not numbers; the state is saved first.
        """
        require_whole("n_frames", n_frames, 0)
        self._require_positions()
        target = self._at.frame + n_frames
        self._advance(lambda: target - self._at.frame, n_frames * self.n_walkers, progress)

    def run_rounds(self, n: int, progress: bool | None = None) -> None:
        """Run until every walker has completed `n` more rounds; what is left of one that was begun counts as one."""
        require_whole("n", n, 0)
        self._require_positions()
        target = self._at.rounds + n
        total = n * (self.macro_steps + self.micro_steps) * self.n_walkers
        self._advance(lambda: np.where(self._at.rounds < target, self._at.left, 0), total, progress)

    def _advance(self, room: Callable[[], np.ndarray], total: int, progress: bool | None) -> None:
        """Go on as long as there is `room`, in frames per walker."""
        at = self._at
        begin = int(at.frame.sum())
        show = sys.stderr.isatty() if progress is None else progress
        with ProgressBar("LED", total, self.model.interval, 0, show) as bar:
            while (room() > 0).any():
                free = room()
                latent = np.flatnonzero((at.phase == MACRO) & (free > 0))
                dynamic = np.flatnonzero((at.phase != MACRO) & (free > 0))
                if len(latent):
                    self._latent_block(latent, int(np.minimum(free, at.left)[latent].min()))
                for k in dynamic.tolist():
                    self._md_block(k, int(min(free[k], at.left[k])))
                bar.update(int(at.frame.sum()) - begin)

    def _latent_block(self, walkers: np.ndarray, n: int) -> None:
        """At most `n` latent frames of some walkers."""
        at, stats = self._at, self.statistics
        assert at.latent is not None
        n = min(n, WATCH_EVERY) if self._watch else n
        drawn = at.random.bit_generator.state
        try:
            with stats.timed("latent"):
                path, after = self.model.run(at.latent.select(walkers), n, at.random)
                doubt = np.asarray(self.model.doubt(after)) if self._watch else np.full(len(walkers), np.nan)
        except BaseException:
            # so that the same frames are made when it goes on
            at.random.bit_generator.state = drawn
            raise
        self._check_latent(walkers, path, drawn)
        with guards.interrupts_held():
            self._keep_latent(walkers, n, path, after, doubt)

    def _keep_latent(
        self, walkers: np.ndarray, n: int, path: np.ndarray, after: LatentState, doubt: np.ndarray
    ) -> None:
        """Go to the end of a block with the walkers whose end is trusted, and tell the reporters."""
        at, stats = self._at, self.statistics
        assert at.latent is not None
        # a doubt that is no number is no trust
        doubtful = ~(doubt <= DOUBT) & self._watch
        kept = ~doubtful if self.micro_steps else np.ones(len(walkers), dtype=bool)
        everything = kept.all() and len(walkers) == self.n_walkers
        at.latent = after if everything else at.latent.replace(walkers[kept], after.select(kept))
        stats.doubtful_blocks += int(doubtful.sum())
        stats.latent_frames += n * int(kept.sum())
        stats.dropped_frames += n * int((~kept).sum())
        good, bad = walkers[kept], walkers[~kept]
        numbers = at.made(good, n)
        at.since[good] += n
        if len(good):
            seen = np.full((len(good), n), np.nan)
            seen[:, -1] = doubt[kept]
            self._report(Frames(MACRO, good, numbers, path[kept], seen))
        at.cause[good], at.cause[bad] = "schedule", "doubt"
        ended = np.concatenate([good[at.left[good] == 0], bad])
        if self.micro_steps:
            at.phase[ended], at.left[ended] = MICRO, self.micro_steps
        else:
            at.left[ended] = self.macro_steps
            self._complete(ended)

    def _md_block(self, k: int, n: int) -> None:
        """`n` frames of MD of one walker, after its return if it comes from latent steps."""
        at, stats, phase = self._at, self.statistics, str(self._at.phase[k])
        if phase == MICRO and at.since[k] >= 0:
            self._return(k)
        # returns bring velocities with them, and one that stayed or fell back has those of its last MD
        new = phase == WARMUP and at.since[k] == 0
        seed = seed_for(self._seed, f"dynamics of walker {k}", int(at.frame[k]))
        everything = any(reporter.needs_particles for reporter in self.reporters)
        with stats.timed("md"):
            ran = self._dynamics.run(at.walkers[k], n, seed, self.temperature if new else None, everything)
        with stats.timed("encode"):
            z = np.asarray(self.model.encode(ran.positions), dtype=np.float64)
        me = np.array([k])
        self._check_latent(me, z[None], at.random.bit_generator.state)
        with guards.interrupts_held():
            at.walkers[k], at.since[k] = ran.walker, -1
            at.highest = max(at.highest, float(ran.energies.max()))
            at.history[k].append(z)
            numbers = at.made(me, n)
            stats.warmup_frames += n if phase == WARMUP else 0
            stats.md_frames += n if phase == MICRO else 0
            seen = [None if x is None else x[None] for x in (ran.positions, ran.energies, ran.particles, ran.boxes)]
            self._report(Frames(phase, me, numbers, z[None], np.full((1, n), np.nan), *seen))
            if at.left[k] == 0:
                self._leave(k)

    def _leave(self, k: int) -> None:
        """From MD to latent steps, with the memory that the frames of MD give."""
        at = self._at
        with self.statistics.timed("latent"):
            state = self.model.start(np.concatenate(at.history[k])[None])
        if at.latent is None:
            at.latent = state.select(np.zeros(self.n_walkers, dtype=np.int64))
        at.latent = at.latent.replace(np.array([k]), state)
        if at.phase[k] == MICRO:
            self._complete(np.array([k]))
        at.history[k], at.phase[k], at.left[k], at.since[k] = [], MACRO, self.macro_steps, 0

    def _complete(self, walkers: np.ndarray) -> None:
        self._at.rounds[walkers] += 1
        self.statistics.rounds += len(walkers)

    def _return(self, k: int) -> None:
        """Give a walker the structure that its latent state stands for, or leave it its last one of MD."""
        at = self._at
        assert self._mapper is not None and at.latent is not None
        begin = time.perf_counter()
        z, moved, walker = at.latent.z[k].copy(), 0, at.walkers[k]
        reports: tuple[RelaxationReport, ...] = ()
        if at.since[k] > 0:
            seed = seed_for(self._seed, f"return of walker {k}", int(at.frame[k]))
            rebuild = Rebuilder(self.model, self._solvent, self._mapper, self.statistics)
            limit = at.highest + MARGIN * BOLTZMANN_KJ_PER_MOL * self.temperature
            found = rebuild(z, at.walkers[k], seed, dict(self.context.getParameters()), limit)
            reports, moved = found.reports, found.solvent_moved
            walker = found.walker or walker
        with guards.interrupts_held():
            at.walkers[k] = walker
            record = self._record(k, z, reports, moved, time.perf_counter() - begin)
            # whatever stops the dynamics that follow, the walker has returned
            at.since[k] = -1
            self.statistics.count(record)
            for reporter in self._reporters():
                reporter.returned(self, record)

    def _record(
        self, k: int, z: np.ndarray, reports: tuple[RelaxationReport, ...], moved: int, seconds: float
    ) -> Return:
        at = self._at
        return Return(
            walker=k, frame=int(at.frame[k]), latent_frames=int(at.since[k]), cause=str(at.cause[k]),
            tries=len(reports), reasons=tuple(r.reason for r in reports if not r.accepted),
            fallback=bool(reports) and not reports[-1].accepted,
            energies=dict(reports[-1].energies) if reports else {},
            moved=reports[-1].moved if reports else float("nan"), solvent_moved=moved, z_decoded=z,
            z_relaxed=np.asarray(self.model.encode(at.walkers[k].positions[self.solute][None])[0]), seconds=seconds,
        )  # fmt: skip

    # -- reporters and checkpoints ---------------------------------------------------------------------------------

    def _reporters(self) -> list[LEDReporter]:
        for reporter in self.reporters:
            if not any(reporter is r for r in self._opened):
                if any(reporter.name == r.name for r in self._opened):
                    raise ValueError(f"reporters: expected different files, got {reporter.name} twice")
                reporter.open(self, self._saved_reporters.pop(reporter.name, None))
                self._opened.append(reporter)
        return self.reporters

    def _report(self, frames: Frames) -> None:
        for reporter in self._reporters():
            reporter.frames(self, frames)

    def saveCheckpoint(self, path: str | Path) -> None:
        """Write everything that the rest of the run depends on, in one file, under a temporary name, and move it.

        A run that is resumed from it goes on bit for bit on the Reference platform, and on the CPU platform with one
        thread, if the same calls of `step` and `run_rounds` follow.
        """
        self._require_positions()
        facts, arrays = self._at.pack()
        facts |= {
            "run": self._identity(),
            "parameters": dict(self.context.getParameters()),
            "statistics": self.statistics.to_dict(),
            "reporters": {r.name: r.state() for r in self._reporters()},
        }
        led_checkpoint.write(path, facts, arrays | {"reference": self.reference})

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that wrote its checkpoint."""
        model = self.model
        return {
            "particles": self.system.getNumParticles(), "walkers": self.n_walkers, "seed": self._seed,
            "latent_dim": model.latent_dim, "interval": model.interval, "temperature": self.temperature,
            "timestep": self.integrator.getStepSize()._value, "macro_steps": self.macro_steps,
            "micro_steps": self.micro_steps, "warmup": self.warmup, "watch": self._watch,
            "solute": self.solute.tolist(), "superpose": self.superpose,
            "relaxation": dataclasses.asdict(self._relaxation), "integrator": type(self.integrator).__name__,
        }  # fmt: skip

    def loadCheckpoint(self, path: str | Path) -> None:
        """Go on from a checkpoint; reporters of the same file names cut their files back to it and append.

        Raises `FileNotFoundError`, or `ValueError` for a file that is damaged or of a run with other settings.
        """
        facts, arrays = led_checkpoint.read(path, self._identity())
        self._set_reference(arrays["reference"])
        self._at = LEDState.unpack(facts, arrays)
        for name, value in facts["parameters"].items():
            self.context.setParameter(name, value)
        self.statistics = LEDStatistics(**facts["statistics"])
        for reporter in self._opened:
            reporter.close()
        self._opened, self._saved_reporters = [], dict(facts["reporters"])

    # -- guards ----------------------------------------------------------------------------------------------------

    def _require_positions(self) -> None:
        if self._mapper is None:
            raise ValueError("positions: expected setPositions or loadCheckpoint before anything else")

    def _check_latent(self, walkers: np.ndarray, path: np.ndarray, drawn: Mapping[str, Any]) -> None:
        """Stop if latent coordinates are not numbers; the state before them is saved, with the generator's, `drawn`."""
        wrong = np.flatnonzero(~np.isfinite(path).all(axis=(1, 2)))
        if len(wrong) == 0:
            return
        self._at.random.bit_generator.state = drawn
        self._failure.mkdir(parents=True, exist_ok=True)
        target = self._failure / "before.checkpoint"
        self.saveCheckpoint(target)
        hurt = tuple(int(walkers[k]) for k in wrong)
        raise guards.RunFailed(
            f"latent coordinates of walker {hurt[0]} are not numbers after frame {self._at.frame[hurt[0]]} "
            f"({len(hurt)} walkers in all; the checkpoint before is {target})",
            self._failure,
            hurt,
        )
