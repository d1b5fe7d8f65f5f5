"""Cost of a step with electrostatic over mechanical embedding: capped alanine (22 ML atoms) in boxes of TIP3P.

2,269 and about 22,000 atoms, PME at OpenMM's default tolerance with a cutoff of 0.9 nm, Langevin steps of 0.5 fs, CPU
platform. In every round each system makes the same number of steps in turn; the ratio is taken round by round and its
median reported. `own` is what the embedding itself takes (potential at the ML atoms, reaction on all), `model` what
remains of the ML force.

    python benchmarks/embedding_cost.py --models so3lr spookynet-ala2-gfn2
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import openmm
import torch
from _common import machine, summary, write
from _embedding_boxes import ML_ATOMS, box, force_field, potentials
from openmm import unit
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.forces import running
from openmm_mlff.forces.embedded_force import EmbeddedComputation
from openmm_mlff.forces.surroundings import Surroundings

#: nm; None is the box of 2,269 atoms
SIDES = {"2269": None, "22000": 6.03}
INDUCED = {"polarizabilities": {"C": 1.0, "H": 0.3, "N": 0.8, "O": 0.6}, "inductionDamping": 3.0}


def kinds(potential: MLPotential, topology: Any, field: openmm.System, compile: bool) -> dict[str, openmm.System]:
    options = {"compile": compile, "threads": 1}
    make = potential.createMixedSystem
    return {
        "mechanical": make(topology, field, ML_ATOMS, **options),
        "electrostatic": make(topology, field, ML_ATOMS, embedding="electrostatic", **options),
        "with induction": make(topology, field, ML_ATOMS, embedding="electrostatic", **options, **INDUCED),
    }


def context_of(system: openmm.System, positions: np.ndarray, threads: int) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
    integrator.setRandomNumberSeed(1)
    options = {"Threads": str(threads)}
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("CPU"), options)
    context.setPositions(positions)
    return context


def own_cost(system: openmm.System, context: openmm.Context, repeats: int = 20) -> dict[str, float]:
    """The embedding without model and OpenMM."""
    (computation,) = running.computations(system)
    assert isinstance(computation, EmbeddedComputation) and computation.charges is not None
    spec = computation.embedded
    state = context.getState(positions=True)
    positions = 10.0 * state.getPositions(asNumpy=True)._value
    cell = 10.0 * state.getPeriodicBoxVectors(asNumpy=True)._value
    surroundings = Surroundings(spec.surroundings, spec.region.atoms or ())
    sites, seconds = positions[ML_ATOMS], []
    for _ in range(repeats):
        start = time.perf_counter()
        surroundings.field(positions, sites, cell)
        surroundings.react(computation.charges)
        seconds.append(time.perf_counter() - start)
    return summary(seconds)


def compare(potential: MLPotential, side: float | None, steps: int, rounds: int, threads: int, compile: bool) -> Any:
    topology, positions = box(side)
    systems = kinds(potential, topology, force_field(topology), compile)
    contexts = {name: context_of(system, positions, threads) for name, system in systems.items()}
    openmm.LocalEnergyMinimizer.minimize(contexts["mechanical"], maxIterations=30)
    relaxed = contexts["mechanical"].getState(positions=True).getPositions()
    for context in contexts.values():
        context.setPositions(relaxed)
        context.getIntegrator().step(3)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, context in contexts.items():
            start = time.perf_counter()
            context.getIntegrator().step(steps)
            seconds[name].append((time.perf_counter() - start) / steps)
    result: dict[str, Any] = {"atoms": topology.getNumAtoms()}
    for name, values in seconds.items():
        ratio = np.array(values) / np.array(seconds["mechanical"])
        result[name] = {**summary(values), "ratio": round(float(np.median(ratio)), 3)}
        if name != "mechanical":
            result[name]["own"] = own_cost(systems[name], contexts[name])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["so3lr", "spookynet-ala2-gfn2"])
    parser.add_argument("--sizes", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1, help="of OpenMM")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "openmm_threads": arguments.threads, "models": {}}
    table = Table("model", "atoms", "mechanical [ms]", "electrostatic [ms]", "ratio", "own [ms]", "induction", "ratio")
    for name, potential in potentials(arguments.models).items():
        rows = result["models"][name] = {}
        for size in arguments.sizes:
            steps = 10 if size == "2269" else 3
            row = rows[size] = compare(
                potential, SIDES[size], steps, arguments.rounds, arguments.threads, not arguments.no_compile
            )
            plain, charged, induced = row["mechanical"], row["electrostatic"], row["with induction"]
            table.add_row(
                name,
                str(row["atoms"]),
                f"{plain['median_ms']:.2f}",
                f"{charged['median_ms']:.2f}",
                f"{charged['ratio']:.2f}",
                f"{charged['own']['median_ms']:.2f}",
                f"{induced['median_ms']:.2f}",
                f"{induced['ratio']:.2f}",
            )
    Console().print(table)
    write("embedding_cost", result)


if __name__ == "__main__":
    main()
