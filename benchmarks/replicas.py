"""Many copies in one System: steps per second of all copies together, and whether their statistics are those of one.

Speed: a 6-bead GDML model (130 training points, random coefficients, harmonic bonds and angles as priors) and the
bundled SpookyNet for Ace-Ala-NMe, from 1 to 512 replicas, LangevinMiddle steps on OpenMM's Reference platform, one
thread. Each is compared with a run of one molecule by the same model in its fastest form (native kernel; compiled
graph), in turn within every round; the gain is the median over rounds of (steps/s of all replicas) / (steps/s of that
run).

Statistics: as many replicas as single runs from the same start, each with its own seeds. The time average of an
observable over one run is one independent sample. For energies, temperature, bond lengths, and the sines and cosines of
phi and psi: z = difference of the means over its standard error, and the p-value of the Kolmogorov-Smirnov test.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, machine, peptide, write
from openmm import app
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.forces import running
from openmm_mlff.sampling.replica_files import GeometryTable
from openmm_mlff.sampling.replicas import ReplicaFrame, Replicas
from openmm_mlff.units import NM_PER_ANGSTROM

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: C, N, CA, CB, C, N of capped alanine: bead i, bond lengths (nm) and angles (rad) of the priors
BEADS = (6, 7, 6, 6, 6, 7)
BONDS = {(0, 1): 0.133, (1, 2): 0.147, (2, 4): 0.154, (4, 5): 0.134, (2, 3): 0.154}
ANGLES = {(0, 1, 2): 2.17, (1, 2, 4): 1.96, (2, 4, 5): 2.04, (1, 2, 3): 1.90, (3, 2, 4): 1.95}


@dataclass
class Case:
    """One model with everything that is run."""

    name: str
    single: openmm.System
    topology: app.Topology
    start: np.ndarray
    timestep: float
    friction: float
    bonds: dict[str, tuple[int, int]]
    torsions: dict[str, tuple[int, int, int, int]]
    compiled: bool = False

    def integrator(self, seed: int) -> openmm.Integrator:
        made = openmm.LangevinMiddleIntegrator(300.0, self.friction, self.timestep)
        made.setRandomNumberSeed(seed)
        return made

    def replicas(self, n: int, seed: int) -> tuple[Replicas, openmm.Context]:
        """`n` copies with their own velocities, after a few steps."""
        replicas = Replicas(self.single, self.topology, n)
        context = replicas.context(self.integrator(seed), "Reference")
        replicas.set_positions(context, self.start)
        replicas.set_velocities(context, 300.0, seed)
        context.getIntegrator().step(5)
        return replicas, context

    def alone(self, seed: int) -> openmm.Context:
        """A run of one molecule as a user sets it up."""
        context = openmm.Context(self.single, self.integrator(seed), openmm.Platform.getPlatform("Reference"))
        context.setPositions(self.start)
        context.setVelocitiesToTemperature(300.0, seed)
        context.getIntegrator().step(5)
        return context


def topology_of(numbers: tuple[int, ...]) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in numbers:
        topology.addAtom("A", app.Element.getByAtomicNumber(int(z)), residue)
    return topology


def beads() -> Case:
    """A coarse-grained model of capped alanine as the reduced-rank fit makes them, with random coefficients."""
    from openmm_gdml import GDMLPotential
    from openmm_gdml.descriptors import inverse_distances

    molecule = peptide(1)
    # heavy atoms of the backbone and CB in the order of the beads, by their bonds in rdkit's numbering
    centre = relax(molecule.positions[[1, 3, 4, 5, 6, 8]] * NM_PER_ANGSTROM)
    random = np.random.default_rng(0)
    points = centre / NM_PER_ANGSTROM + random.normal(0.0, 0.15, (130, len(BEADS), 3))
    descriptors = inverse_distances(torch.from_numpy(points))
    # eV angstrom; forces of a few kcal/mol/angstrom, as a landscape of a few kT has
    coefficients = torch.from_numpy(random.normal(0.0, 0.2, tuple(descriptors.shape)))
    model = GDMLPotential.from_coefficients(
        numbers=BEADS, sigma=2.0, descriptors=descriptors, coefficients=coefficients, shift=0.0
    )
    topology = topology_of(BEADS)
    single = MLPotential("gdml", model=model).createSystem(topology, removeCMMotion=False)
    for force in priors():
        single.addForce(force)
    bonds = {f"bond {i}-{j}": (i, j) for i, j in BONDS}
    torsions = {"phi": (0, 1, 2, 4), "psi": (1, 2, 4, 5)}
    return Case("gdml, 6 beads", single, topology, centre, 0.002, 5.0, bonds, torsions)


def priors() -> list[openmm.Force]:
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for (i, j), r in BONDS.items():
        bonds.addBond(i, j, r, 2.5e5)
    for (i, j, k), theta in ANGLES.items():
        angles.addAngle(i, j, k, theta, 800.0)
    return [bonds, angles]


def relax(positions: np.ndarray) -> np.ndarray:
    """Positions (nm) at the minimum of the priors."""
    system = openmm.System()
    for _ in positions:
        system.addParticle(12.0)
    for force in priors():
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, 1.0)
    return context.getState(positions=True).getPositions(asNumpy=True)._value


def spookynet() -> Case:
    """The model that the package ships, compiled."""
    molecule = peptide(1)
    topology = topology_of(tuple(molecule.numbers.tolist()))
    single = MLPotential("spookynet-ala2-gfn2").createSystem(topology, compile=True, device="cpu", removeCMMotion=False)
    start = molecule.positions * NM_PER_ANGSTROM
    context = openmm.Context(single, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(start)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
    start = context.getState(positions=True).getPositions(asNumpy=True)._value
    bonds = {"bond C-CA": (4, 6), "bond N-CA": (3, 4), "bond C-O": (1, 2)}
    return Case(
        "spookynet-ala2-gfn2", single, topology, start, 0.001, 1.0, bonds,
        {"phi": (1, 3, 4, 6), "psi": (3, 4, 6, 8)}, compiled=True,
    )  # fmt: skip


#: of the statistics: ps of every run, ps of it that are discarded, frames
LENGTHS = {"gdml": (50.0, 10.0, 100), "spookynet": (2.0, 1.0, 20)}
CASES: dict[str, Callable[[], Case]] = {"gdml": beads, "spookynet": spookynet}


# -- speed -----------------------------------------------------------------------------------------------------------


def rate(context: openmm.Context, seconds: float) -> float:
    """Steps per second, over about so many seconds."""
    integrator = context.getIntegrator()
    begin = time.perf_counter()
    integrator.step(1)
    steps = max(1, round(seconds / max(time.perf_counter() - begin, 1e-7)))
    begin = time.perf_counter()
    integrator.step(steps)
    return steps / (time.perf_counter() - begin)


def speed(case: Case, counts: list[int], rounds: int, seconds: float) -> dict[str, Any]:
    alone = case.alone(1)
    rows = {}
    for n in counts:
        replicas, context = case.replicas(n, 1)
        # a warm-up that also compiles
        rate(alone, seconds / 4), rate(context, seconds / 4)
        for system in (case.single, replicas.system):
            if case.compiled and not running.computations(system)[0].compiled:
                raise RuntimeError(f"{case.name}: runs op by op, so there is nothing to compare")
        one, many = [], []
        for _ in range(rounds):
            one.append(rate(alone, seconds))
            many.append(n * rate(context, seconds))
        ratios = np.array(many) / np.array(one)
        rows[str(n)] = {
            "steps_per_second": round(float(np.median(many)), 1),
            "single_steps_per_second": round(float(np.median(one)), 1),
            "gain": round(float(np.median(ratios)), 2),
            "gain_quartiles": [round(float(q), 2) for q in np.percentile(ratios, [25, 75])],
            "step_ms": round(1e3 * n / float(np.median(many)), 4),
        }
        print(case.name, n, rows[str(n)], flush=True)
    return rows


# -- statistics ------------------------------------------------------------------------------------------------------


def statistics(case: Case, n: int, picoseconds: float, discard: float, frames: int) -> dict[str, Any]:
    """Averages over `n` replicas against those over `n` single runs."""
    table = GeometryTable(case.bonds, case.torsions)
    names = ["potential_kJ_mol", "kinetic_kJ_mol", "temperature_K", *table.names]
    steps = max(1, round((picoseconds - discard) / frames / case.timestep))
    replicas, context = case.replicas(n, 11)
    one = Replicas(case.single, case.topology, 1)

    def average(copies: Replicas, context: openmm.Context) -> np.ndarray:
        """Time averages, ``(observables, replicas)``; angles as sine and cosine."""
        context.getIntegrator().step(round(discard / case.timestep))
        found = []
        for _ in range(frames):
            context.getIntegrator().step(steps)
            found.append(observe(copies.frame(context), table, len(case.bonds)))
        return np.mean(found, axis=0)

    together = average(replicas, context)
    apart = []
    for k in range(n):
        alone = one.context(case.integrator(1000 + k), "Reference")
        one.set_positions(alone, case.start)
        one.set_velocities(alone, 300.0, 5000 + k)
        apart.append(average(one, alone))
        print(case.name, "single run", k + 1, "of", n, flush=True)
    rows = names[: 3 + len(case.bonds)] + [f"{f} {name}" for f in ("cos", "sin") for name in case.torsions]
    return compare(rows, together, np.concatenate(apart, axis=1)) | {
        "runs": n, "picoseconds": picoseconds, "discarded": discard, "frames": frames,
    }  # fmt: skip


def observe(frame: ReplicaFrame, table: GeometryTable, n_bonds: int) -> np.ndarray:
    geometry = table(frame.positions)
    angles = np.radians(geometry[n_bonds:])
    energies = np.stack([frame.potential, frame.kinetic, frame.temperature])
    return np.concatenate([energies, geometry[:n_bonds], np.cos(angles), np.sin(angles)])


def compare(names: list[str], together: np.ndarray, apart: np.ndarray) -> dict[str, Any]:
    from scipy.stats import ks_2samp

    found = {}
    for name, a, b in zip(names, together, apart, strict=True):
        error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
        found[name] = {
            "replicas": float(a.mean()),
            "single_runs": float(b.mean()),
            "z": round(float((a.mean() - b.mean()) / error), 2),
            "ks_p": round(float(ks_2samp(a, b).pvalue), 3),
        }
    return {"observables": found}


# -- output ----------------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.8), constrained_layout=True)
    for color, (name, rows) in zip(("#1f5fa8", "#b5472f"), result["speed"].items(), strict=False):
        counts = np.array([int(n) for n in rows])
        together = [row["steps_per_second"] for row in rows.values()]
        alone = float(np.median([row["single_steps_per_second"] for row in rows.values()]))
        gains = np.array([row["gain"] for row in rows.values()])
        quartiles = np.array([row["gain_quartiles"] for row in rows.values()])
        left.plot(counts, together, "o-", color=color, markersize=4, label=name)
        left.axhline(alone, color=color, linestyle="--", linewidth=1, label=f"one molecule: {alone:,.0f} steps/s")
        right.plot(counts, gains, "o-", color=color, markersize=4)
        right.fill_between(counts, quartiles[:, 0], quartiles[:, 1], color=color, alpha=0.25, linewidth=0)
        right.annotate(
            f"{gains[-1]:.1f}x", (counts[-1], gains[-1]), xytext=(4, 7),
            textcoords="offset points", ha="right", color=color, fontsize=9,
        )  # fmt: skip
    right.plot(COUNTS, COUNTS, color="0.6", linewidth=1, linestyle=":")
    right.annotate("as many times", (64, 64), xytext=(-6, 0), textcoords="offset points", ha="right", color="0.4",
                   fontsize=8)  # fmt: skip
    left.set_ylabel("steps per second, all replicas together")
    right.set_ylabel("gain over a run of one molecule")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axes.set_xlabel("replicas in one System")
        axes.grid(alpha=0.3, which="major")
        axes.margins(y=0.12)
    right.set_yticks([1, 10, 100], ["1", "10", "100"])
    low, high = left.get_ylim()
    left.set_ylim(low, high * 12)
    left.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(HERE / "replicas.png", dpi=160)


def show(result: dict[str, Any]) -> None:
    console = Console()
    for name, rows in result["speed"].items():
        table = Table("replicas", "steps/s together", "ms per step", "one molecule, steps/s", "gain", title=name)
        for n, row in rows.items():
            one, gain = f"{row['single_steps_per_second']:.0f}", f"{row['gain']:.2f}"
            table.add_row(n, f"{row['steps_per_second']:.0f}", f"{row['step_ms']:.3f}", one, gain)
        console.print(table)
    for name, found in result["statistics"].items():
        title = f"{name}: {found['runs']} replicas and {found['runs']} single runs of {found['picoseconds']} ps"
        table = Table("observable", "replicas", "single runs", "z", "KS p", title=title)
        for observable, row in found["observables"].items():
            values = f"{row['replicas']:.5g}", f"{row['single_runs']:.5g}", f"{row['z']:.2f}", f"{row['ks_p']:.3f}"
            table.add_row(observable, *values)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--parts", nargs="+", default=["speed", "statistics"], choices=["speed", "statistics"])
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of every timing")
    parser.add_argument("--runs", type=int, default=64, help="replicas, and single runs, of the statistics")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep what replicas.json has of other parts and models")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "speed": {}, "statistics": {}}
    if arguments.keep and (HERE / "replicas.json").exists():
        result |= json.loads((HERE / "replicas.json").read_text(encoding="utf-8")) | {"machine": result["machine"]}
    for part in arguments.parts:
        for key in arguments.models:
            case = CASES[key]()
            if part == "speed":
                found = speed(case, arguments.counts, arguments.rounds, arguments.seconds)
            else:
                found = statistics(case, arguments.runs, *LENGTHS[key])
            result[part][case.name] = found
            # each part takes minutes: what is done is kept
            write("replicas", result)
    show(result)
    draw(result)


if __name__ == "__main__":
    main()
