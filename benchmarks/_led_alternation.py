"""Runs of `LEDSimulation` for `led_alternation.py`, as one file each: what every walker did, frame by frame."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from _led_systems import alanine, explicit_alanine, load, phi_psi, solute_atoms
from openmm import app

from openmm_mlff.data.files import write_atomically
from openmm_mlff.forces.serialization import load_state
from openmm_mlff.sampling.led_records import MACRO, MICRO, WARMUP, Frames, Return
from openmm_mlff.sampling.led_reporters import LEDReporter
from openmm_mlff.sampling.led_simulation import LEDSimulation
from openmm_mlff.sampling.platforms import choose_platform

TEMPERATURE, FRICTION, TIMESTEP, INTERVAL = 300.0, 1.0, 0.004, 1.0
STEPS = round(INTERVAL / TIMESTEP)
#: frames of MD in a round, and before the first
MICRO_FRAMES, WARM_UP = 10, 20
PHASES = (WARMUP, MACRO, MICRO)
#: oxygens of water within this distance (nm) of a heavy atom of the solute make its first shell
SHELL = 0.35
#: plain MD is timed between so many parts of a run, over so many frames each time
PARTS, TIMED_FRAMES = 4, 150
#: frames of plain MD in water that are timed
TIMED_IN_WATER = 6


@dataclass(frozen=True)
class Run:
    """What the walkers of one simulation did, frames of 1 ps, the first after `WARM_UP` of MD.

    Attributes:
        torsions: phi and psi in degrees, ``(n_frames, 2)`` per walker, of MD and of decoded frames.
        phases: index into `PHASES`, ``(n_frames,)`` per walker.
        energies: of the System in MD, ``(n_frames,)`` kJ/mol per walker; NaN in latent frames.
        facts: settings, statistics, CPU seconds; ``returns`` (see `led_records.Return`).
    """

    torsions: list[np.ndarray]
    phases: list[np.ndarray]
    energies: list[np.ndarray]
    facts: dict[str, Any]

    def save(self, path: Path) -> None:
        """As npz, under a temporary name first."""
        buffer = io.BytesIO()
        columns = {name: np.concatenate(getattr(self, name)) for name in ("torsions", "phases", "energies")}
        lengths = np.array([len(p) for p in self.phases])
        np.savez(buffer, allow_pickle=False, lengths=lengths, facts=np.array(json.dumps(self.facts)), **columns)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Run:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            edges = np.cumsum(stored["lengths"])[:-1]
            torsions, phases, energies = (np.split(stored[n], edges) for n in ("torsions", "phases", "energies"))
            return cls(torsions, phases, energies, json.loads(str(stored["facts"])))

    def returned(self, accepted: bool = True) -> list[dict[str, Any]]:
        """The returns whose structure was accepted, or all; ``frame`` is the index of the first frame of MD."""
        every = self.facts["returns"]
        return [r for r in every if r["tries"] and not r["fallback"]] if accepted else every

    def after_return(self) -> np.ndarray:
        """Energies of the frames of MD after accepted returns, ``(n_returns, MICRO_FRAMES)`` kJ/mol."""
        rows = [self.energies[r["walker"]][r["frame"] : r["frame"] + MICRO_FRAMES] for r in self.returned()]
        return np.array([row for row in rows if len(row) == MICRO_FRAMES])


class Recorder(LEDReporter):
    """Keeps all frames and returns of a simulation."""

    name = "recorder"

    def __init__(self) -> None:
        self.parts: list[Frames] = []
        self.returns: list[dict[str, Any]] = []

    def frames(self, simulation: LEDSimulation, frames: Frames) -> None:
        self.parts.append(frames)

    def returned(self, simulation: LEDSimulation, record: Return) -> None:
        plain = {k: v for k, v in asdict(record).items() if k not in ("z_decoded", "z_relaxed")}
        shift = float(np.linalg.norm(record.z_relaxed - record.z_decoded))
        self.returns.append({**plain, "latent_shift": shift})

    def run(self, simulation: LEDSimulation, seed: int, facts: dict[str, Any]) -> Run:
        """Everything by walker; latent frames are decoded now, ``facts["cpu_s"]["decode"]`` says in which time."""
        random = np.random.default_rng([seed, 21])
        topology = simulation.solute_topology
        pieces: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(simulation.n_walkers)]
        spent = 0.0
        for part in self.parts:
            positions = part.positions
            if positions is None:
                begin = time.process_time()
                flat = part.z.reshape(-1, simulation.model.latent_dim)
                positions = simulation.model.decode(flat, random).reshape(*part.z.shape[:2], -1, 3)
                spent += time.process_time() - begin
            angles = phi_psi(topology, positions).astype(np.float32)
            energies = np.full(part.numbers.shape, np.nan) if part.energies is None else part.energies
            phase = np.full(part.numbers.shape, PHASES.index(part.phase), dtype=np.int8)
            for i, k in enumerate(part.walkers.tolist()):
                pieces[k].append((part.numbers[i], angles[i], phase[i], energies[i]))
        columns: list[list[np.ndarray]] = [[], [], []]
        for mine in pieces:
            numbers, *values = (np.concatenate(column) for column in zip(*mine, strict=True))
            if (numbers != np.arange(1, len(numbers) + 1)).any():
                raise RuntimeError("frames: expected every frame of a walker once and in order")
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        facts["cpu_s"]["decode"] = spent
        facts |= {"statistics": simulation.statistics.to_dict(), "returns": self.returns}
        return Run(columns[0], columns[1], columns[2], facts)


class PlainMD:
    """MD as one would run it without LED, for its CPU time per frame."""

    def __init__(self, system: openmm.System, positions: np.ndarray, box: np.ndarray | None, seed: int) -> None:
        integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, FRICTION, TIMESTEP)
        integrator.setRandomNumberSeed(seed)
        choice = choose_platform(system.getNumParticles())
        self._context = openmm.Context(system, integrator, choice.platform, choice.properties)
        if box is not None:
            self._context.setPeriodicBoxVectors(*box)
        self._context.setPositions(positions)
        self._context.setVelocitiesToTemperature(TEMPERATURE, seed)

    def seconds(self, frames: int) -> float:
        """CPU seconds per frame, positions and energy of each fetched."""
        begin = time.process_time()
        for _ in range(frames):
            self._context.getIntegrator().step(STEPS)
            self._context.getState(positions=True, energy=True)
        return (time.process_time() - begin) / frames


# -- implicit solvent --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implicit:
    """One run with OBC2; walkers begin at the first frames of the test replicas."""

    model: Path
    rho: int
    rounds: int
    seed: int
    walkers: int = 8


def run_implicit(task: Implicit, path: Path) -> dict[str, str]:
    """Worker of `run_tasks`."""
    system, topology, _ = alanine()
    starts = np.stack([r.positions[0] for r in load("ala2", "test", kind="free")[: task.walkers]]).astype(np.float64)
    simulation = LEDSimulation(
        system, topology, task.model, temperature=TEMPERATURE, friction=FRICTION, timestep=TIMESTEP,
        macro_steps=task.rho * MICRO_FRAMES, micro_steps=MICRO_FRAMES, warmup=WARM_UP, n_walkers=task.walkers,
        platform="Reference", seed=task.seed, failure=path.with_suffix(".failure"),
    )  # fmt: skip
    simulation.setPositions(starts)
    recorder = Recorder()
    simulation.reporters.append(recorder)
    simulation.step(WARM_UP, progress=False)
    plain = PlainMD(system, starts[0], None, task.seed)
    plain.seconds(20)
    rows = []
    for part in range(PARTS):
        alone = plain.seconds(TIMED_FRAMES)
        before, begin = int(simulation.frames.sum()), time.process_time()
        simulation.run_rounds(task.rounds * (part + 1) // PARTS - task.rounds * part // PARTS, progress=False)
        rows.append((alone, (time.process_time() - begin) / (int(simulation.frames.sum()) - before)))
    md, together = np.array(rows).T
    facts = {"settings": {**asdict(task), "model": task.model.name}}
    facts["cpu_s"] = {"md_per_frame": md.tolist(), "alternating_per_frame": together.tolist()}
    recorder.run(simulation, task.seed, facts).save(path)
    return {}


# -- water -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explicit:
    """One walker in TIP3P, from the State after the last segment of a replica.

    Attributes:
        start: the State, as XML.
    """

    model: Path
    start: Path
    rho: int
    rounds: int
    seed: int


class Shell(LEDReporter):
    """Distances of water to the solute in every frame of MD.

    Args:
        topology: of the box; water is what is not in `solute`.

    Attributes:
        seen: number of the frame, the shortest distance of an oxygen from a heavy atom of the solute, nm, and how many
            are within `SHELL`.
    """

    name = "shell"
    needs_particles = True

    def __init__(self, topology: app.Topology, solute: Sequence[int]) -> None:
        inside = set(solute)
        atoms = list(topology.atoms())
        self._solute = np.array([a.index for a in atoms if a.index in inside and a.element.symbol != "H"])
        self._oxygens = np.array([a.index for a in atoms if a.index not in inside and a.element.symbol == "O"])
        self.seen: list[tuple[int, float, int]] = []

    def frames(self, simulation: LEDSimulation, frames: Frames) -> None:
        if frames.particles is None or frames.boxes is None:
            return
        for number, positions, box in zip(frames.numbers[0], frames.particles[0], frames.boxes[0], strict=True):
            edges = np.diag(box)
            apart = positions[self._oxygens, None] - positions[self._solute]
            apart -= edges * np.round(apart / edges)
            nearest = np.linalg.norm(apart, axis=-1).min(axis=1)
            self.seen.append((int(number), float(nearest.min()), int((nearest < SHELL).sum())))


def run_explicit(task: Explicit, path: Path) -> dict[str, str]:
    """Worker of `run_tasks`."""
    system, topology, _ = explicit_alanine()
    state = load_state(task.start.read_text(encoding="utf-8"))
    positions, box = (f(asNumpy=True)._value for f in (state.getPositions, state.getPeriodicBoxVectors))
    simulation = LEDSimulation(
        system, topology, task.model, temperature=TEMPERATURE, friction=FRICTION, timestep=TIMESTEP,
        macro_steps=task.rho * MICRO_FRAMES, micro_steps=MICRO_FRAMES, warmup=WARM_UP,
        solute=solute_atoms(topology).tolist(), platform="CPU", seed=task.seed, failure=path.with_suffix(".failure"),
    )  # fmt: skip
    simulation.setPositions(positions, box)
    recorder, shell = Recorder(), Shell(topology, simulation.solute.tolist())
    simulation.reporters += [recorder, shell]
    alone = PlainMD(system, positions, box, task.seed).seconds(TIMED_IN_WATER)
    simulation.step(WARM_UP, progress=False)
    after_warm_up = time.process_time()
    simulation.run_rounds(task.rounds, progress=False)
    frames = int(simulation.frames[0]) - WARM_UP
    facts: dict[str, Any] = {"settings": {**asdict(task), "model": task.model.name, "start": task.start.name}}
    facts |= {"water": shell.seen, "cpu_s": {
        "md_per_frame": [alone], "alternating_per_frame": [(time.process_time() - after_warm_up) / frames]
    }}  # fmt: skip
    recorder.run(simulation, task.seed, facts).save(path)
    return {}


def joined(runs: Sequence[Run]) -> Run:
    """Several runs of one walker each as one run of several; facts are those of all, as lists."""
    if any(len(run.torsions) != 1 for run in runs):
        raise ValueError(f"runs: expected one walker in each, got {[len(run.torsions) for run in runs]}")
    columns = [[getattr(run, name)[0] for run in runs] for name in ("torsions", "phases", "energies")]
    facts: dict[str, Any] = {"runs": [run.facts for run in runs]}
    facts["returns"] = [{**r, "walker": k} for k, run in enumerate(runs) for r in run.facts["returns"]]
    return replace(runs[0], torsions=columns[0], phases=columns[1], energies=columns[2], facts=facts)
