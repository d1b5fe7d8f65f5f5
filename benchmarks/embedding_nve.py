"""Drift of the total energy of capped alanine in water: electrostatic against mechanical embedding.

22 ML atoms (spookynet-ala2-gfn2) in a box of 2.2 nm of TIP3P, PME (tolerance 1e-5, cutoff 0.9 nm, Lennard-Jones
switched from 0.8 nm), rigid water (tolerance 1e-7), nothing constrained on ML atoms, Verlet steps of 0.5 fs, CPU
platform (single precision forces). Runs start from 2 ps at 300 K, each with velocities of its own. The drift is the
slope of the total energy over a run; its error is the standard error over runs.

    python benchmarks/embedding_nve.py                 (finished runs are kept in .work/embedding_nve)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, machine, write
from _embedding_boxes import ML_ATOMS, box, force_field, potentials
from openmm import unit
from rich.console import Console
from rich.table import Table

from openmm_mlff.data.files import write_atomically
from openmm_mlff.units import KJ_PER_MOL_PER_EV

STEP = 0.0005  # ps
KINDS: dict[str, dict[str, Any]] = {
    "mechanical": {},
    "electrostatic": {"embedding": "electrostatic"},
}


def mixed_system(kind: str) -> tuple[openmm.System, np.ndarray]:
    topology, positions = box(2.2)
    field = force_field(topology)
    for force in field.getForces():
        if isinstance(force, openmm.NonbondedForce):
            force.setEwaldErrorTolerance(1e-5)
    (potential,) = potentials(["spookynet-ala2-gfn2"]).values()
    return potential.createMixedSystem(topology, field, ML_ATOMS, compile=True, threads=1, **KINDS[kind]), positions


def context_of(system: openmm.System, integrator: openmm.Integrator) -> openmm.Context:
    integrator.setConstraintTolerance(1e-7)
    return openmm.Context(system, integrator, openmm.Platform.getPlatform("CPU"), {"Threads": "1"})


def run(kind: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Total energies (eV) along one run."""
    system, positions = mixed_system(kind)
    warm = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 5 / unit.picosecond, STEP * unit.picosecond)
    warm.setRandomNumberSeed(seed)
    context = context_of(system, warm)
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
    context.setVelocitiesToTemperature(300, seed)
    warm.step(4000)
    state = context.getState(positions=True, velocities=True)
    free = context_of(system, openmm.VerletIntegrator(STEP))
    free.setPeriodicBoxVectors(*state.getPeriodicBoxVectors())
    free.setPositions(state.getPositions())
    free.setVelocities(state.getVelocities())
    energies = []
    for _ in range(steps // every):
        free.getIntegrator().step(every)
        now = free.getState(energy=True)
        energies.append((now.getPotentialEnergy() + now.getKineticEnergy())._value / KJ_PER_MOL_PER_EV)
    return {"atoms": system.getNumParticles(), "every_ps": every * STEP, "energies": energies}


def drift(found: dict[str, Any]) -> tuple[float, float]:
    """Slope in meV per atom and ps, and the scatter about it in meV per atom."""
    energies = 1e3 * np.array(found["energies"]) / found["atoms"]
    times = found["every_ps"] * np.arange(len(energies))
    line = np.polyfit(times, energies, 1)
    return float(line[0]), float(np.std(energies - np.polyval(line, times)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--picoseconds", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".work" / "embedding_nve")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = round(arguments.picoseconds / STEP)
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "picoseconds": arguments.picoseconds, "drift": {}}
    table = Table("embedding", "runs", "drift [meV/atom/ps]", "scatter [meV/atom]")
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for seed in range(1, arguments.runs + 1):
        for kind in KINDS:
            path = arguments.folder / f"{kind}-{seed}-{steps}.json"
            if not path.exists():
                write_atomically(path, json.dumps(run(kind, seed, steps, 20)).encode())
            found[kind].append(drift(json.loads(path.read_text(encoding="utf-8"))))
    for kind, values in found.items():
        slopes, scatter = np.array(values).T
        error = float(slopes.std(ddof=1) / np.sqrt(len(slopes))) if len(slopes) > 1 else None
        result["drift"][kind] = {
            "meV_per_atom_per_ps": round(float(slopes.mean()), 7),
            "standard_error": None if error is None else round(error, 7),
            "runs": [round(float(s), 7) for s in slopes],
            "scatter_meV_per_atom": round(float(scatter.mean()), 4),
        }
        table.add_row(kind, str(len(slopes)), f"{slopes.mean():+.1e} ± {error or 0:.1e}", f"{scatter.mean():.3f}")
    Console().print(table)
    write("embedding_nve", result)


if __name__ == "__main__":
    main()
