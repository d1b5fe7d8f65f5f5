"""Molecular dynamics for the LED benchmarks: alanine dipeptide (implicit and explicit solvent) and Trp-cage.

    python benchmarks/led_data.py --systems ala2
    python benchmarks/led_data.py --systems trpcage explicit --time-limit 120

Files go to ``.work/led_data/<system>/frames``, one per replica and segment; started again, it goes on with what is
missing. ``ala2`` is a fixed set: replicas of 5 ns from equilibrium, and a swarm released at phi > 0, which the others
never come to: each runs until 1 ns after it has come to the basin at phi < 0, or 6 ns. ``trpcage`` and ``explicit``
grow in rounds of one segment for every replica, so that all splits have the same length whenever it is stopped.
Every replica is meant for one split.

Steps of 4 fs with hydrogens of 3 amu, LangevinMiddle with a friction of 1/ps at 300 K. Frames every 1 ps for alanine,
whose fastest resolved motion, C5 to PII, takes 7 ps; every 2 ps for Trp-cage, whose slow coordinates take tens of ps
and more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import openmm
from _led_systems import FOLDER, alanine, explicit_alanine, phi_psi, solute_atoms, trp_cage, write_segment
from openmm import app

from openmm_mlff.analysis.observables import backbone_torsions
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import claim_folder, run_tasks
from openmm_mlff.forces.serialization import load_state
from openmm_mlff.sampling.checkpoints import seed_for
from openmm_mlff.sampling.platforms import choose_platform
from openmm_mlff.sampling.starts import TorsionRestraint, bond_graph, set_torsion, torsion_force

SYSTEMS = {"ala2": alanine, "trpcage": trp_cage, "explicit": explicit_alanine}
#: degrees: where the swarm is released, and the core of phi < 0 that ends it (the barrier at phi = 0 is recrossed)
RELEASE = {"phi": 60.0, "psi": 40.0}
CORE = (-160.0, -40.0)


@dataclass(frozen=True)
class Settings:
    """How the replicas of one system are run.

    Attributes:
        replicas: how many by ``kind-split``. platform: with one thread.
        interval: ps between frames. segment: ps in one file. equilibration: ps of every replica that are not kept.
        shared_equilibration: ps of the run from whose end all replicas start, with velocities of their own.
        grows: whether segments are added until the time is over.
        after_exit, restrained: of the swarm, ps. restraint: kJ/mol/rad^2.
        seed: of all random numbers of the system, by replica and purpose.
    """

    replicas: Mapping[str, int]
    platform: str
    interval: float
    segment: float
    equilibration: float
    shared_equilibration: float = 0.0
    grows: bool = False
    swarm_segment: float = 6000.0
    after_exit: float = 1000.0
    restrained: float = 50.0
    restraint: float = 200.0
    temperature: float = 300.0
    friction: float = 1.0
    timestep: float = 0.004
    seed: int = 20261121

    def names(self) -> dict[str, list[str]]:
        """Replicas by ``kind-split``."""
        return {group: [f"{group}-{k:02d}" for k in range(n)] for group, n in self.replicas.items()}

    def interleaved(self) -> list[str]:
        """All replicas, those of every group spread evenly, so that there is something of each early."""
        ordered = [((k + 0.5) / len(names), name) for names in self.names().values() for k, name in enumerate(names)]
        return [name for _, name in sorted(ordered)]


SETTINGS = {
    "ala2": Settings(
        {
            "free-train": 12,
            "free-valid": 4,
            "free-test": 8,
            "swarm-train": 24,
            "swarm-valid": 8,
            "swarm-test": 16,
        },
        platform="Reference",
        interval=1.0,
        segment=5000.0,
        equilibration=100.0,
    ),
    # many runs rather than long ones: a run stays in a substate for ns, and sets of few runs differ by where theirs
    # stayed; as much for the test as for training, as a small test set differs from any model by its sampling error
    "trpcage": Settings(
        {"free-train": 28, "free-valid": 8, "free-test": 28},
        platform="CPU",
        interval=2.0,
        segment=50.0,
        equilibration=50.0,
        shared_equilibration=100.0,
        grows=True,
        seed=20261122,
    ),
    "explicit": Settings(
        {"free-train": 2, "free-valid": 1, "free-test": 1},
        platform="CPU",
        interval=1.0,
        segment=100.0,
        equilibration=50.0,
        shared_equilibration=50.0,
        grows=True,
    ),
}


@dataclass(frozen=True)
class Segment:
    """One file: a stretch of one replica.

    Attributes:
        replica: ``kind-split-number``. number: of the segment; 0 starts the replica.
    """

    system: str
    replica: str
    number: int
    folder: Path
    settings: Settings = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.replica}-{self.number:03d}"

    @property
    def kind(self) -> str:
        return self.replica.split("-")[0]

    def seed(self, purpose: str) -> int:
        return seed_for(self.settings.seed, f"{self.system}/{self.replica}/{purpose}", self.number)

    def state(self, number: int) -> Path:
        """Where the State after a segment is kept."""
        return self.folder / "states" / f"{self.replica}-{number:03d}.xml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=sorted(SYSTEMS), default=["ala2"], help="in this order")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="MINUTES")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--rounds", type=int, default=200, help="at most so many segments of systems that grow")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.time_limit
    rounds = [(system, k) for k in range(arguments.rounds) for system in arguments.systems]
    for system in arguments.systems:
        prepare(system, arguments.output / system)
    for system, number in rounds:
        if number == 0 or SETTINGS[system].grows:
            produce(system, number, arguments.output / system, arguments.processes, deadline)
        if time.monotonic() > deadline:
            print(f"time is over in round {number} of {system}; started again, it goes on", flush=True)
            break


def prepare(name: str, folder: Path) -> None:
    """Write what all replicas share: configuration, system, topology of the solute, and the start."""
    settings = SETTINGS[name]
    folder.mkdir(parents=True, exist_ok=True)
    claim_folder(folder, asdict(settings) | {"system": name, "replicas": settings.names()})
    if (folder / "start.xml").exists():
        return
    system, topology, positions = SYSTEMS[name]()
    solute = solute_atoms(topology)
    modeller = app.Modeller(topology, positions)
    modeller.delete([atom for atom in topology.atoms() if atom.index not in set(solute.tolist())])
    with (folder / "solute.pdb").open("w", encoding="utf-8") as file:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, file, keepIds=True)
    write_atomically(folder / "system.xml", openmm.XmlSerializer.serialize(system).encode())
    context = _context(system, settings, seed_for(settings.seed, f"{name}/start", 0))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    if settings.shared_equilibration:
        context.setVelocitiesToTemperature(settings.temperature, seed_for(settings.seed, f"{name}/start", 1))
        context.getIntegrator().step(round(settings.shared_equilibration / settings.timestep))
    _save_state(context, folder / "start.xml")


def produce(name: str, number: int, folder: Path, processes: int, deadline: float) -> None:
    """One segment of every replica that does not have it yet; stops after the deadline."""
    settings = SETTINGS[name]
    segments = [Segment(name, replica, number, folder, settings) for replica in settings.interleaved()]
    missing = [s for s in segments if not (folder / "frames" / f"{s.name}.safetensors").exists()]
    for k in range(0, len(missing), processes):
        if time.monotonic() > deadline:
            return
        started = time.monotonic()
        tasks = {s.name: s for s in missing[k : k + processes]}
        log = folder / "failures.jsonl"
        outcome = run_tasks(
            tasks, run_segment, folder / "frames", log=log, processes=processes, progress=False, title=name
        )
        print(f"{name}: {', '.join(tasks)} in {time.monotonic() - started:.0f} s", flush=True)
        if outcome.failed:
            raise SystemExit(f"{name}: {outcome.failed}")


def run_segment(segment: Segment, path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: go on from the State of the segment before, write frames and the new State.

    Raises `FloatingPointError` for energies that are not finite; the State of the segment before is kept.
    """
    settings = segment.settings
    system = openmm.XmlSerializer.deserialize((segment.folder / "system.xml").read_text(encoding="utf-8"))
    topology = app.PDBFile(str(segment.folder / "solute.pdb")).topology
    wall, cpu = time.perf_counter(), time.process_time()
    context = _context(system, settings, segment.seed("integrator"))
    if segment.number:
        context.setState(_read_state(segment.state(segment.number - 1)))
    elif segment.kind == "swarm":
        context.setState(_released(segment, system, topology))
    else:
        context.setState(_read_state(segment.folder / "start.xml"))
        context.setVelocitiesToTemperature(settings.temperature, segment.seed("velocities"))
        context.getIntegrator().step(round(settings.equilibration / settings.timestep))
    swarm = segment.kind == "swarm"
    length = settings.swarm_segment if swarm else settings.segment
    positions, energies, exit_frame = _frames(
        context, topology, settings, length, settings.after_exit if swarm else None
    )
    if not (np.isfinite(positions).all() and np.isfinite(energies).all()):
        raise FloatingPointError(f"{segment.name}: positions or energies became NaN or infinite")
    info = {
        "system": segment.system,
        "replica": segment.replica,
        "kind": segment.kind,
        "split": segment.replica.split("-")[1],
        "segment": segment.number,
        "seed": segment.seed("integrator"),
        "interval_ps": settings.interval,
        "temperature": settings.temperature,
        "friction": settings.friction,
        "timestep": settings.timestep,
        "platform": context.getPlatform().getName(),
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }
    if swarm:
        info["exit_ps"] = None if exit_frame is None else (exit_frame + 1) * settings.interval
    _save_state(context, segment.state(segment.number))
    write_segment(path, positions, energies, info)
    if segment.number:
        segment.state(segment.number - 1).unlink(missing_ok=True)
    return {}


def _frames(
    context: openmm.Context, topology: app.Topology, settings: Settings, length: float, after_exit: float | None
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Centred solute positions and energies every interval, and the first frame in `CORE`.

    Args:
        after_exit: ps after that frame at which to stop; None goes on for the whole length.
    """
    per_frame = round(settings.interval / settings.timestep)
    solute = np.arange(topology.getNumAtoms())
    positions, energies, exit_frame = [], [], None
    for frame in range(round(length / settings.interval)):
        context.getIntegrator().step(per_frame)
        state = context.getState(positions=True, energy=True)
        x = state.getPositions(asNumpy=True)._value[solute]
        positions.append((x - x.mean(axis=0)).astype(np.float32))
        energies.append(state.getPotentialEnergy()._value)
        if after_exit is None:
            continue
        if exit_frame is None and CORE[0] < phi_psi(topology, x)[0] < CORE[1]:
            exit_frame = frame
        if exit_frame is not None and frame - exit_frame >= after_exit / settings.interval:
            break
    return np.array(positions), np.array(energies), exit_frame


def _released(segment: Segment, system: openmm.System, topology: app.Topology) -> openmm.State:
    """A State at phi > 0 after equilibration under restraints, which act no more."""
    settings = segment.settings
    start = _read_state(segment.folder / "start.xml").getPositions(asNumpy=True)._value
    numbers = np.array([atom.element.atomic_number for atom in topology.atoms()])
    torsions = backbone_torsions(topology)
    turned = 10.0 * start
    for name, angle in RELEASE.items():
        turned = set_torsion(turned, bond_graph(numbers, 10.0 * start), torsions[name], angle)
    restraints = [TorsionRestraint(torsions[name], angle, settings.restraint) for name, angle in RELEASE.items()]
    restrained = openmm.XmlSerializer.clone(system)
    restrained.addForce(torsion_force(restraints))
    context = _context(restrained, settings, segment.seed("restrained"))
    context.setPositions(0.1 * turned)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(settings.temperature, segment.seed("velocities"))
    context.getIntegrator().step(round(settings.restrained / settings.timestep))
    phi = phi_psi(topology, context.getState(positions=True).getPositions(asNumpy=True)._value)[0]
    if not 0.0 < phi < 150.0:
        raise RuntimeError(
            f"{segment.name}: expected phi near {RELEASE['phi']:g} degrees at the release, got {phi:.0f}"
        )
    return context.getState(positions=True, velocities=True)


def _context(system: openmm.System, settings: Settings, seed: int) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(settings.temperature, settings.friction, settings.timestep)
    integrator.setRandomNumberSeed(seed)
    choice = choose_platform(system.getNumParticles(), settings.platform, 1 if settings.platform == "CPU" else None)
    return openmm.Context(system, integrator, choice.platform, choice.properties)


def _save_state(context: openmm.Context, path: Path) -> None:
    state = context.getState(positions=True, velocities=True)
    write_atomically(path, openmm.XmlSerializer.serialize(state).encode())


def _read_state(path: Path) -> openmm.State:
    return load_state(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
