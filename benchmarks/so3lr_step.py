"""Time per MD step of SO3LR in OpenMM: native code against the PyTorch port so3krates-torch, and 3 to 10,000 atoms.

Steps are LangevinMiddle steps of 0.5 fs at 300 K on OpenMM's CPU platform, two threads for everything, float32. The
port (0.2.1, extra ``openmm-mlff[so3lr]``) runs as its users run it in OpenMM: its ASE calculator in openmm-ml's 'ase'
potential. In every round both run in turn, each in a run of its own from the same start; the ratio is taken round by
round and its median reported. Beside wall-clock times stand times of the processor (all threads together): what other
programs of a shared machine take away is in the first and not in the second.

The table by size runs every system in a process of its own, whose peak memory it reports, with that of a process that
has only imported the packages and read the model. Water at 0.99 g/cm^3 in periodic boxes, long-range cutoff 12 angstrom
(72 neighbours within the short cutoff and its skin, 830 within the long one), except where another is given; molecules
and the droplet in open space, molecules with the 1000 angstrom that the authors recommend there. The exponent of the
growth is fitted to the boxes. The three long-range methods run in turn in boxes of water.

Threads of OpenMP wait as they do by default, which is fastest for the port on a machine that nobody else uses (on a
busy one it is several times slower so); run the comparison there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, SHARED, machine, summary, write
from openmm import app, unit
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table
from vesin import NeighborList

from openmm_mlff.data.structures import Structure, collate
from openmm_mlff.potentials.electrostatics import LONG_RANGE_METHODS
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.neighbors import DEFAULT_SKIN
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM
from openmm_so3krates import SO3krates
from openmm_so3krates.native import Engine

THREADS = 2
#: angstrom; what the authors recommend for molecules in open space
VACUUM = 1000.0
PARAMETERS = SHARED / "models" / "so3lr_params.npz"
COMPARED = ("water", "alanine dipeptide", "water box 192, 6 A", "water droplet 600")
#: copies of the 12.4 angstrom box of 64 waters along each axis
BOXES = {192: (1, 1, 1), 768: (1, 2, 2), 1536: (2, 2, 2), 3456: (2, 3, 3), 10368: (3, 3, 6)}
#: atoms of the boxes in which the ways to treat charges are compared
METHOD_BOXES = (192, 1536, 3456)
PARTS = ("compare", "sizes", "methods", "lists")
#: ms per step of the published JAX calculator under openmm-ml, two cores of such a machine, measured on another day
JAX = {"alanine dipeptide": "6.1", "water box 192, 6 A": "151-164"}


@dataclass(frozen=True)
class Case:
    """A system and its long-range cutoff in angstrom."""

    structure: Structure
    cutoff: float


def cases() -> dict[str, Case]:
    """All systems by name, the smallest first."""
    with np.load(SHARED / "data" / "so3lr" / "visible.npz", allow_pickle=False) as arrays:
        stored = {
            name: {key: arrays[f"{name}/{key}"] for key in ("numbers", "positions", "cell")}
            for name in ("water", "alanine_dipeptide", "bb_lr12", "ala15_lr12", "water_64_lr6")
        }

    def molecule(name: str) -> Structure:
        return Structure(stored[name]["numbers"], stored[name]["positions"])

    water = stored["water_64_lr6"]

    def box(copies: tuple[int, int, int]) -> Structure:
        cells = np.stack(np.meshgrid(*map(np.arange, copies), indexing="ij"), -1).reshape(-1, 3)
        positions = (water["positions"] + (cells @ water["cell"])[:, None]).reshape(-1, 3)
        return Structure(
            np.tile(water["numbers"], len(cells)), positions, cell=water["cell"] * np.array(copies)[:, None]
        )

    found = {
        "water": Case(molecule("water"), VACUUM),
        "alanine dipeptide": Case(molecule("alanine_dipeptide"), VACUUM),
        "buckyball catcher": Case(molecule("bb_lr12"), VACUUM),
        "Ace-Ala15-NMe": Case(molecule("ala15_lr12"), VACUUM),
        "water box 192, 6 A": Case(box(BOXES[192]), 6.0),
        "water droplet 600": Case(droplet(box(BOXES[1536]), 200), 12.0),
    }
    return found | {f"water box {n}": Case(box(copies), 12.0) for n, copies in BOXES.items()}


def droplet(box: Structure, molecules: int) -> Structure:
    """The molecules of a box of water (atoms O H H, molecules whole) that are nearest to its middle."""
    assert box.cell is not None
    waters = box.positions.reshape(-1, 3, 3)
    order = np.argsort(np.linalg.norm(waters[:, 0] - 0.5 * box.cell.sum(0), axis=1), kind="stable")[:molecules]
    return Structure(box.numbers.reshape(-1, 3)[order].ravel(), waters[order].reshape(-1, 3))


def topology_of(structure: Structure) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in structure.numbers:
        topology.addAtom("A", app.Element.getByAtomicNumber(int(z)), residue)
    if structure.cell is not None:
        topology.setPeriodicBoxVectors(structure.cell * 0.1 * unit.nanometer)
    return topology


class Run:
    """An MD run of one program."""

    def __init__(self, case: Case, potential: MLPotential, **arguments: Any) -> None:
        self.structure = case.structure
        system = potential.createSystem(topology_of(case.structure), **arguments)
        self.integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0005)
        self.integrator.setRandomNumberSeed(1)
        platform = openmm.Platform.getPlatformByName("CPU")
        self.context = openmm.Context(system, self.integrator, platform, {"Threads": str(THREADS)})
        self.context.setPositions(case.structure.positions * 0.1)

    def forces(self) -> np.ndarray:
        """eV/angstrom, at the positions of the run."""
        value = self.context.getState(forces=True).getForces(asNumpy=True)
        return np.asarray(value.value_in_unit(unit.kilojoule_per_mole / unit.nanometer)) / KJ_PER_MOL_NM_PER_EV_ANGSTROM

    def warm_up(self, steps: int) -> None:
        self.context.setVelocitiesToTemperature(300.0, 1)
        self.integrator.step(steps)

    def time(self, steps: int) -> tuple[float, float]:
        """Seconds per step, on the wall and of the processor."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.integrator.step(steps)
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def ours(case: Case) -> Run:
    potential = MLPotential("so3lr", modelPath=str(PARAMETERS))
    return Run(case, potential, longRangeCutoff=0.1 * case.cutoff, compile=True, threads=THREADS)


def theirs(case: Case) -> Run:
    from so3krates_torch.calculator.so3 import SO3LRCalculator  # type: ignore[import-not-found]

    calculator = SO3LRCalculator(r_max_lr=case.cutoff, default_dtype="float32", device="cpu")
    return Run(case, MLPotential("ase"), calculator=calculator)


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Both programs in turn."""
    runs = {"native": ours(case), "port": theirs(case)}
    start = {name: run.forces() for name, run in runs.items()}
    steps = {}
    for name, run in runs.items():
        run.warm_up(3)
        # rounds of about a second, at least two steps
        steps[name] = max(2, round(1.0 / run.time(2)[0]))
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            a, b = run.time(steps[name])
            wall[name].append(a)
            cpu[name].append(b)
    result: dict[str, Any] = {
        "atoms": len(case.structure),
        "long_range_cutoff_angstrom": case.cutoff,
        "largest_force_difference_eV_per_angstrom": float(np.abs(start["native"] - start["port"]).max()),
        "steps_per_round": steps,
    }
    for name in runs:
        result[name] = {"wall": summary(wall[name]), "processor": summary(cpu[name])}
    for what, times in (("ratio", wall), ("ratio_processor", cpu)):
        ratios = np.array(times["port"]) / np.array(times["native"])
        result[what] = {
            k: round(float(v), 2)
            for k, v in zip(("q1", "median", "q3"), np.percentile(ratios, [25, 50, 75]), strict=True)
        }
    return result


def memory() -> int:
    """Largest memory that this process has held so far, MiB."""
    # what getrusage says holds the parent's memory, too
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)


def alone(name: str, rounds: int) -> dict[str, Any]:
    """One system in this process: times and peak memory."""
    case = cases()[name]
    MLPotential("so3lr", modelPath=str(PARAMETERS))
    before = memory()
    run = ours(case)
    begin = time.perf_counter()
    run.forces()
    first = time.perf_counter() - begin
    run.warm_up(2)
    # long enough for lists to be made anew
    steps = max(20, round(1.0 / run.time(4)[0]))
    times = [run.time(steps) for _ in range(rounds)]
    return {
        "atoms": len(case.structure),
        "long_range_cutoff_angstrom": case.cutoff,
        "first_evaluation_s": round(first, 2),
        "wall": summary([w for w, _ in times]),
        "processor": summary([c for _, c in times]),
        "peak_memory_MiB": memory(),
        "memory_before_MiB": before,
    }


def searches(rounds: int) -> dict[str, Any]:
    """Milliseconds of the processor that half lists within both cutoffs and the skin take, on one thread.

    By the native code, by vesin, and by mlipops where it is installed (pairs of nearest images only).
    """
    try:
        from mlipops import NeighborList as NearestImages
    except ImportError:
        NearestImages = None
    found = {}
    for n in (192, 1536, 10368):
        structure = cases()[f"water box {n}"].structure
        model = load_potential(PARAMETERS, "so3krates")
        assert isinstance(model, SO3krates) and structure.cell is not None
        engine = Engine(model)
        batch = collate([structure]).to(dtype=model.dtype)
        charge, features = batch.charge.numpy(), model.fixed(batch).x.detach().numpy()
        engine.set_atoms(structure.numbers, batch.segment.numpy(), charge, features)
        positions, cell = structure.positions, structure.cell[None].copy()
        short, long = 4.5 + DEFAULT_SKIN, 12.0 + DEFAULT_SKIN
        vesin = NeighborList(cutoff=long, full_list=False, n_threads=1)
        names = ("native", "vesin") if NearestImages is None else ("native", "vesin", "mlipops")
        times: dict[str, list[float]] = {name: [] for name in names}
        torch.set_num_threads(1)
        for _ in range(rounds):
            start = time.process_time()
            engine.search(positions, cell, short, long, 1)
            middle = time.process_time()
            pairs = len(vesin.compute(positions, structure.cell, True, "ijSd")[0])
            end = time.process_time()
            times["native"].append(middle - start)
            times["vesin"].append(end - middle)
            if NearestImages is not None:
                # without its cache, and in the precision of the model
                box = torch.from_numpy(structure.cell).float()
                NearestImages(cutoff=long)(torch.from_numpy(positions).float(), box)
                times["mlipops"].append(time.process_time() - end)
        assert len(engine.lists()[1][0]) == pairs
        found[str(n)] = {"pairs": pairs, **{name: summary(values) for name, values in times.items()}}
    return found


def in_own_process(name: str, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--alone", name, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def growth(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Exponent of the time per step with the number of atoms in the water boxes with one cutoff."""
    boxes = [row for row in rows.values() if row["long_range_cutoff_angstrom"] == 12.0 and row["atoms"] in BOXES]
    atoms = np.log([row["atoms"] for row in boxes])
    found = {}
    for clock in ("wall", "processor"):
        ms = np.log([row[clock]["median_ms"] for row in boxes])
        found[clock] = round(float(np.polyfit(atoms, ms, 1)[0]), 3) if len(boxes) > 1 else None
    return found


def show_comparison(rounds: int) -> dict[str, Any]:
    title = f"{THREADS} threads"
    table = Table("system", "atoms", "port [ms]", "native [ms]", "ratio", "ratio, processor", "JAX [ms]", title=title)
    found = {}
    for name in COMPARED:
        row = found[name] = compare(cases()[name], rounds)
        times = [f"{row[k]['wall']['median_ms']:.2f}" for k in ("port", "native")]
        ratios = [f"{row[k]['median']:.1f}" for k in ("ratio", "ratio_processor")]
        table.add_row(name, str(row["atoms"]), *times, *ratios, JAX.get(name, ""))
    Console().print(table)
    return found


def methods(rounds: int) -> dict[str, Any]:
    """Milliseconds per step of the three ways to treat charges in a box, in turn, and their ratios to 'shifted'."""
    found: dict[str, Any] = {}
    for n in METHOD_BOXES:
        case = cases()[f"water box {n}"]
        potential = MLPotential("so3lr", modelPath=str(PARAMETERS))
        runs = {
            name: Run(case, potential, longRangeCutoff=0.1 * case.cutoff, longRangeMethod=name, threads=THREADS)
            for name in LONG_RANGE_METHODS
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run.warm_up(3)
        steps = max(4, round(1.0 / runs["shifted"].time(2)[0]))
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(run.time(steps)[0])
        found[str(n)] = {name: summary(values) for name, values in times.items()}
        for name in runs:
            ratios = np.array(times[name]) / np.array(times["shifted"])
            found[str(n)][name]["ratio"] = round(float(np.median(ratios)), 2)
    return found


def show_methods(rounds: int) -> dict[str, Any]:
    found = methods(rounds)
    table = Table("atoms", *LONG_RANGE_METHODS, title=f"ms per step, over 'shifted'; {THREADS} threads, 12 A")
    for n, row in found.items():
        table.add_row(n, *(f"{row[k]['median_ms']:.1f}, {row[k]['ratio']:.2f}" for k in LONG_RANGE_METHODS))
    Console().print(table)
    return found


def show_sizes(rounds: int, largest: int) -> dict[str, Any]:
    table = Table("system", "atoms", "ms/step", "processor ms/step", "ns/day", "peak memory [MiB]", "before [MiB]")
    found = {}
    for name, case in cases().items():
        if len(case.structure) > largest:
            continue
        row = found[name] = in_own_process(name, rounds)
        row["ns_per_day"] = round(0.5e-6 * 86400e3 / row["wall"]["median_ms"], 3)
        figures = [f"{row[k]['median_ms']:.2f}" for k in ("wall", "processor")]
        held = [str(row[k]) for k in ("peak_memory_MiB", "memory_before_MiB")]
        table.add_row(name, str(row["atoms"]), *figures, f"{row['ns_per_day']:.3f}", *held)
    Console().print(table)
    Console().print(f"growth of the time per step with the atoms, exponent: {growth(found)}")
    return found


def show_searches(rounds: int) -> dict[str, Any]:
    found = searches(rounds)
    libraries = [k for k in next(iter(found.values())) if k != "pairs"]
    columns = [f"{k} [ms]" for k in libraries]
    table = Table("atoms", "pairs", *columns, title="half lists, one thread, processor time")
    for n, row in found.items():
        table.add_row(n, str(row["pairs"]), *(f"{row[k]['median_ms']:.1f}" for k in libraries))
    Console().print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--largest", type=int, default=10368, help="atoms of the largest system")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if not PARAMETERS.exists():
        raise SystemExit(f"no {PARAMETERS.name} in the folder of shared data; OPENMM_MLFF_SHARED names that folder")
    if arguments.alone:
        print(json.dumps(alone(arguments.alone, arguments.rounds)))
        return
    kept = HERE / "so3lr_step.json"
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    about = machine()
    if "compare" in arguments.parts:
        result["compared"] = show_comparison(arguments.rounds)
    if "sizes" in arguments.parts:
        result["sizes"] = show_sizes(arguments.rounds, arguments.largest)
        result["exponent"] = growth(result["sizes"])
    if "methods" in arguments.parts:
        result["methods"] = show_methods(arguments.rounds)
    if "lists" in arguments.parts:
        result["lists"] = show_searches(arguments.rounds)
    machines = result.get("machine", {}) | {part: about for part in arguments.parts}
    write("so3lr_step", {"what": __doc__, "jax_ms_per_step": JAX, **result, "machine": machines})


if __name__ == "__main__":
    main()
