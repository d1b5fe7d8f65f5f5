"""What the bundled model `spookynet-ala2-gfn2` is worth: errors, energy drift, stability, Ramachandran landscape.

    python benchmarks/spookynet_ala2.py --data DATASET [--parts errors nve nvt ramachandran] [--processes 4]

* errors: test trajectories of the dataset (free runs at 300, 450 and 600 K; neither training nor validation saw them).
* nve: total energy over 50 ps at 0.5 fs from a thermalised start; straight-line fit.
* nvt: 200 ps at 300 K and 0.5 fs; every bond is watched at every 50 fs.
* ramachandran: free energy over (phi, psi) at 300 K. Metadynamics walkers that share their hills first find a bias that
  flattens the plane; it is then frozen, independent walkers sample under it, and their frames are reweighted by
  exp(V/kT). GFN2-xTB's own landscape comes from the same frames by reweighting them once more with
  exp(-(E_GFN2 - E_model)/kT), GFN2-xTB evaluated on each (importance sampling; the effective sample size is reported).
  `divergence` is the Kullback-Leibler divergence D(GFN2 || model) in nats on a 24 x 24 grid with half a count added to
  every visited cell; the floor is the same divergence between the model's own landscapes from one half of the walkers
  and from the other half, averaged over splits.

Every part is kept in the work folder, so an interrupted run goes on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, machine, write
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.analysis.errors import error_tables
from openmm_mlff.analysis.observables import dihedral, energy_drift, mean_with_error, ramachandran_free_energy
from openmm_mlff.data.datasets import Dataset
from openmm_mlff.data.files import sha256_of
from openmm_mlff.data.labelling import label_structures
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.training.evaluation import compare, find_model
from openmm_mlff.units import BOLTZMANN_EV, BOLTZMANN_KJ_PER_MOL, KJ_PER_MOL_PER_EV

MODEL = "spookynet-ala2-gfn2"
START = HERE.parent / "examples" / "recipes" / "capped_alanine.pdb"
PHI, PSI = (4, 6, 8, 14), (6, 8, 14, 16)
TEMPERATURE = 300.0
BASINS = ((-82.0, 75.0), (-155.0, 160.0), (60.0, -60.0), (-75.0, -20.0))
BINS = 24


# -- simulations -----------------------------------------------------------------------------------------------


def make_system() -> tuple[app.Topology, openmm.System, np.ndarray]:
    pdb = app.PDBFile(str(START))
    system = MLPotential(MODEL).createSystem(pdb.topology, compile=True, device="cpu")
    return pdb.topology, system, np.array(pdb.positions.value_in_unit(unit.nanometer))


def thermostat(timestep: float, seed: int, friction: float = 1.0) -> openmm.LangevinMiddleIntegrator:
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, friction, timestep * 1e-3)
    integrator.setRandomNumberSeed(seed)
    return integrator


def relaxed(system: openmm.System, positions: np.ndarray, seed: int, ps: float, timestep: float) -> openmm.Context:
    """A context after minimisation and `ps` of thermostatted dynamics."""
    context = openmm.Context(system, thermostat(timestep, seed, 5.0), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
    context.setVelocitiesToTemperature(TEMPERATURE, seed)
    context.getIntegrator().step(round(ps / timestep * 1e3))
    return context


def part_nve(work: Path, ps: float) -> dict[str, Any]:
    _, system, positions = make_system()
    start = relaxed(system, positions, 11, 5.0, 0.5).getState(positions=True, velocities=True)
    context = openmm.Context(system, openmm.VerletIntegrator(0.5e-3), openmm.Platform.getPlatformByName("Reference"))
    context.setState(start)
    times, energies = [], []
    clock = time.perf_counter()
    for frame in range(round(ps / 0.05)):
        context.getIntegrator().step(100)
        state = context.getState(energy=True)
        times.append(0.05 * (frame + 1))
        energies.append((state.getPotentialEnergy() + state.getKineticEnergy())._value / KJ_PER_MOL_PER_EV)
    np.savez(work / "nve.npz", time=times, energy=energies)
    drift = energy_drift(np.array(times), np.array(energies), len(positions))
    return {
        "ps": ps,
        "timestep_fs": 0.5,
        "drift_meV_per_atom_per_ps": drift.value * 1e3,
        "error_meV_per_atom_per_ps": drift.error * 1e3,
        "fluctuation_meV": float(np.std(energies)) * 1e3,
        "ms_per_step": (time.perf_counter() - clock) / (len(times) * 100) * 1e3,
    }


def part_nvt(work: Path, ps: float) -> dict[str, Any]:
    topology, system, positions = make_system()
    bonds = np.array([(b.atom1.index, b.atom2.index) for b in topology.bonds()])
    context = relaxed(system, positions, 12, 1.0, 0.5)
    context.getIntegrator().setFriction(1.0)
    relaxed_lengths = None
    longest, shortest, temperatures, angles = [], [], [], []
    freedom = 3 * len(positions) - 3
    for _ in range(round(ps / 0.05)):
        context.getIntegrator().step(100)
        state = context.getState(positions=True, energy=True)
        r = state.getPositions(asNumpy=True)._value
        lengths = np.linalg.norm(r[bonds[:, 0]] - r[bonds[:, 1]], axis=1)
        relaxed_lengths = lengths if relaxed_lengths is None else relaxed_lengths
        longest.append(lengths)
        shortest.append(lengths)
        temperatures.append(2 * state.getKineticEnergy()._value / (freedom * BOLTZMANN_KJ_PER_MOL))
        angles.append((float(dihedral(r, PHI)), float(dihedral(r, PSI))))
    lengths = np.array(longest)
    mean = lengths.mean(0)
    np.savez(work / "nvt.npz", temperature=temperatures, angles=angles, lengths=lengths)
    t = mean_with_error(np.array(temperatures))
    return {
        "ps": ps,
        "timestep_fs": 0.5,
        "largest_bond_over_its_mean": float((lengths / mean).max()),
        "smallest_bond_over_its_mean": float((lengths / mean).min()),
        "bonds_broken": int(((lengths / mean) > 1.5).any(0).sum()),
        "temperature_K": t.value,
        "temperature_error_K": t.error,
    }


# -- Ramachandran ------------------------------------------------------------------------------------------------


def _torsion_force(atoms: tuple[int, int, int, int]) -> openmm.CustomTorsionForce:
    force = openmm.CustomTorsionForce("theta")
    force.addTorsion(*atoms)
    return force


def metadynamics_walker(argument: tuple[Path, int, float]) -> None:
    """One of several walkers that share their hills through a folder."""
    work, walker, ps = argument
    torch.set_num_threads(1)
    _, system, positions = make_system()
    variables = [
        app.BiasVariable(_torsion_force(atoms), -np.pi, np.pi, np.radians(15), True, 97) for atoms in (PHI, PSI)
    ]
    folder = work / "hills"
    folder.mkdir(exist_ok=True)
    meta = app.Metadynamics(system, variables, TEMPERATURE, 12.0, 1.2, 50, saveFrequency=500, biasDir=str(folder))
    simulation = app.Simulation(
        app.PDBFile(str(START)).topology, system, thermostat(1.0, 100 + walker, 5.0),
        openmm.Platform.getPlatformByName("Reference"),
    )  # fmt: skip
    simulation.context.setPositions(positions)
    simulation.minimizeEnergy(maxIterations=200)
    simulation.context.setVelocitiesToTemperature(TEMPERATURE, 100 + walker)
    meta.step(simulation, round(ps * 1e3))
    energy = np.array(meta.getFreeEnergy().value_in_unit(unit.kilojoule_per_mole))
    np.save(work / f"estimate-{walker}.npy", energy)


def biased_walker(argument: tuple[Path, int, float]) -> None:
    """One independent walker under the frozen bias; frames with energies are kept."""
    work, walker, ps = argument
    target = work / f"walker-{walker}.npz"
    if target.exists():
        return
    torch.set_num_threads(1)
    _, system, positions = make_system()
    bias = np.load(work / "bias.npy")  # kJ/mol, [psi, phi] on 97 x 97 points, the last repeating the first
    table = openmm.Continuous2DFunction(97, 97, bias.flatten(), -np.pi, np.pi, -np.pi, np.pi, True)
    force = openmm.CustomCVForce("table(phi, psi)")
    force.addCollectiveVariable("phi", _torsion_force(PHI))
    force.addCollectiveVariable("psi", _torsion_force(PSI))
    force.addTabulatedFunction("table", table)
    force.setForceGroup(1)
    for existing in system.getForces():
        existing.setForceGroup(0)
    system.addForce(force)
    # half of the steps of the equilibration pull the walker to its own start
    pull = openmm.CustomTorsionForce("k * (1 - cos(theta - theta0))")
    pull.addGlobalParameter("k", 300.0)
    pull.addPerTorsionParameter("theta0")
    for atoms, angle in zip((PHI, PSI), BASINS[walker % len(BASINS)], strict=True):
        pull.addTorsion(*atoms, [np.radians(angle)])
    pull.setForceGroup(2)
    system.addForce(pull)
    context = relaxed(system, positions, 200 + walker, 2.0, 1.0)
    context.setParameter("k", 0.0)
    context.getIntegrator().step(3000)
    frames, energies, biases = [], [], []
    for _ in range(round(ps / 0.1)):
        context.getIntegrator().step(100)
        state = context.getState(positions=True)
        frames.append(state.getPositions(asNumpy=True)._value.astype(np.float32))
        energies.append(context.getState(energy=True, groups={0}).getPotentialEnergy()._value)
        biases.append(context.getState(energy=True, groups={1}).getPotentialEnergy()._value)
    temporary = target.with_suffix(".tmp.npz")
    np.savez(temporary, positions=np.array(frames), energy=energies, bias=biases)
    temporary.rename(target)


def frozen_bias(work: Path, walkers: int) -> np.ndarray:
    """The bias that flattens the plane up to 45 kJ/mol, from the walkers' estimate of the free energy."""
    estimate = np.mean([np.load(work / f"estimate-{w}.npy") for w in range(walkers)], axis=0)
    estimate = estimate - estimate.min()
    bias = -np.minimum(estimate, 45.0)
    bias[-1], bias[:, -1] = bias[0], bias[:, 0]
    return bias


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Kullback-Leibler divergence D(p || q) in nats of two normalised tables without empty cells where p is not."""
    inside = p > 0
    return float(np.sum(p[inside] * np.log(p[inside] / q[inside])))


def table(angles: np.ndarray, weights: np.ndarray, visited: np.ndarray) -> np.ndarray:
    """Weighted histogram on the visited cells; half of an average sample is added to each."""
    cell = np.floor((angles + 180.0) / (360.0 / BINS)).astype(int) % BINS
    counts = np.zeros((BINS, BINS))
    np.add.at(counts, (cell[:, 0], cell[:, 1]), weights)
    effective = weights.sum() ** 2 / (weights**2).sum()
    counts = counts / counts.sum() + np.where(visited, 0.5 / (effective * visited.sum()), 0.0)
    return counts / counts.sum()


def part_ramachandran(
    work: Path, metadynamics_ps: float, ps: float, walkers: int, labels: int, processes: int
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    n_meta = min(4, walkers)
    with context.Pool(processes) as pool:
        if not all((work / f"estimate-{w}.npy").exists() for w in range(n_meta)):
            pool.map(metadynamics_walker, [(work, w, metadynamics_ps) for w in range(n_meta)], chunksize=1)
        np.save(work / "bias.npy", frozen_bias(work, n_meta))
        pool.map(biased_walker, [(work, w, ps) for w in range(walkers)], chunksize=1)
    runs = [np.load(work / f"walker-{w}.npz") for w in range(walkers)]
    numbers = [a.element.atomic_number for a in app.PDBFile(str(START)).topology.atoms()]
    beta = 1.0 / (BOLTZMANN_KJ_PER_MOL * TEMPERATURE)

    angles = [np.stack([dihedral(r["positions"], PHI), dihedral(r["positions"], PSI)], -1) for r in runs]
    everything = np.concatenate(angles)
    weights = [np.exp(beta * (r["bias"] - max(q["bias"].max() for q in runs))) for r in runs]
    all_weights = np.concatenate(weights)
    visited = table(everything, np.ones(len(everything)), np.ones((BINS, BINS), bool)) > 0
    cell = np.floor((everything + 180.0) / (360.0 / BINS)).astype(int) % BINS
    visited = np.zeros((BINS, BINS), bool)
    visited[cell[:, 0], cell[:, 1]] = True

    # GFN2 on frames spread evenly over the walkers
    stride = max(1, len(everything) // labels)
    chosen = np.arange(0, len(everything), stride)
    positions = np.concatenate([r["positions"] for r in runs])[chosen].astype(float) * 10.0
    energies = np.concatenate([r["energy"] for r in runs])[chosen] / KJ_PER_MOL_PER_EV
    structures = [Structure(numbers, x, group=f"frame-{i}") for i, x in zip(chosen, positions, strict=True)]
    labelled = label_structures(
        structures, TBLite(), work / "labels", name="ramachandran", processes=processes, block=250
    )
    reference = {s.group: s.energy for s in labelled.load()}
    kept = np.array([f"frame-{i}" in reference for i in chosen])
    difference = np.array([reference[f"frame-{i}"] for i in chosen[kept]]) - energies[kept]
    to_gfn2 = np.exp(-(difference - difference.mean()) / (BOLTZMANN_EV * TEMPERATURE))

    model = table(everything, all_weights, visited)
    sub_model = table(everything[chosen[kept]], all_weights[chosen[kept]], visited)
    gfn2_weights = all_weights[chosen[kept]] * to_gfn2
    gfn2 = table(everything[chosen[kept]], gfn2_weights, visited)
    halves = []
    for half in itertools.combinations(range(walkers), walkers // 2):
        if 0 not in half:
            continue
        other = [w for w in range(walkers) if w not in half]
        pair = [
            table(np.concatenate([angles[w] for w in group]), np.concatenate([weights[w] for w in group]), visited)
            for group in (half, other)
        ]
        halves.append(0.5 * (divergence(*pair) + divergence(pair[1], pair[0])))
    np.savez(
        work / "landscapes.npz", model=model, gfn2=gfn2, angles=everything, weights=all_weights,
        chosen=chosen[kept], gfn2_weights=gfn2_weights, difference=difference,
    )  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        reference_map, model_map = (-np.log(p / p.max()) / beta for p in (gfn2, sub_model))  # kJ/mol
        gap = np.abs(reference_map - model_map)[visited & (reference_map < 15.0)]
    return {
        "walkers": walkers,
        "metadynamics_ps": metadynamics_ps,
        "ps_each": ps,
        "timestep_fs": 1.0,
        "frames": len(everything),
        "labelled": int(kept.sum()),
        "grid": [BINS, BINS],
        "visited_cells": int(visited.sum()),
        "energy_difference_std_meV": float(difference.std() * 1e3),
        "effective_samples_model": float(all_weights.sum() ** 2 / (all_weights**2).sum()),
        "effective_samples_gfn2": float(gfn2_weights.sum() ** 2 / (gfn2_weights**2).sum()),
        "divergence_nats": divergence(gfn2, sub_model),
        "floor_nats": float(np.mean(halves)),
        "floor_largest_nats": float(np.max(halves)),
        "mean_difference_below_15_kJ_per_mol": float(gap.mean()),
    }


# -- errors and pictures -----------------------------------------------------------------------------------------


def part_errors(data: Path) -> dict[str, Any]:
    dataset = Dataset(data)
    test = dataset.load("test")
    by_temperature: dict[str, list[Structure]] = {}
    for s in test:
        by_temperature.setdefault(f"{float(s.info['temperature']):.0f} K", []).append(s)
    model = load_potential(find_model(MODEL))
    return {
        "trajectories": len({s.group for s in test}),
        "structures": len(test),
        "tables": error_tables(compare(model, test)),
        "by_temperature": {t: error_tables(compare(model, s))["all"] for t, s in sorted(by_temperature.items())},
    }


def draw(work: Path, result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stored = np.load(work / "landscapes.npz")
    chosen = stored["chosen"]
    maps = (
        ("spookynet-ala2-gfn2", stored["angles"], stored["weights"]),
        ("GFN2-xTB (reweighted)", stored["angles"][chosen], stored["gfn2_weights"]),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), constrained_layout=True)
    levels = np.arange(0, 42, 3)
    for axis, (title, angles, weights) in zip(axes[:2], maps, strict=True):
        energy = ramachandran_free_energy(angles[:, 0], angles[:, 1], TEMPERATURE, BINS, weights)
        edges = np.linspace(-180, 180, BINS + 1)
        shown = np.ma.masked_greater(energy, 42.0).T
        image = axis.pcolormesh(edges, edges, shown, cmap="viridis", vmin=0, vmax=42)
        middle = 0.5 * (edges[1:] + edges[:-1])
        axis.contour(middle, middle, shown, levels=levels, colors="white", linewidths=0.4)
        axis.set(title=title, xlabel=r"$\phi$ [deg]", xticks=range(-180, 181, 90), yticks=range(-180, 181, 90))
        axis.set_aspect("equal")
    axes[0].set_ylabel(r"$\psi$ [deg]")
    figure.colorbar(image, ax=axes[1], label="free energy [kJ/mol]")
    r = result["ramachandran"]
    axes[2].hist((stored["difference"] - stored["difference"].mean()) * 1e3, bins=60, color="tab:blue")
    axes[2].set(
        xlabel="GFN2-xTB - model, shifted [meV]",
        ylabel="frames",
        title=f"divergence {r['divergence_nats']:.4f} nats\nsampling floor {r['floor_nats']:.4f} nats",
    )
    figure.savefig(HERE / "spookynet_ala2.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=HERE.parent / ".work" / "ala2",
        help="folder of the dataset (examples/recipes/ala2_gfn2.toml)",
    )
    parser.add_argument("--work", type=Path, default=HERE.parent / ".work" / "benchmark_ala2")
    parser.add_argument("--parts", nargs="+", default=["errors", "nve", "nvt", "ramachandran"])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--walkers", type=int, default=8)
    parser.add_argument("--metadynamics-ps", type=float, default=75.0)
    parser.add_argument("--walker-ps", type=float, default=200.0)
    parser.add_argument("--nve-ps", type=float, default=50.0)
    parser.add_argument("--nvt-ps", type=float, default=200.0)
    parser.add_argument("--labels", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = find_model(MODEL)
    # results of another model must not be mixed in
    work = arguments.work / sha256_of(model)[:12]
    work.mkdir(parents=True, exist_ok=True)
    parts = {
        "errors": lambda: part_errors(arguments.data),
        "nve": lambda: part_nve(work, arguments.nve_ps),
        "nvt": lambda: part_nvt(work, arguments.nvt_ps),
        "ramachandran": lambda: part_ramachandran(
            work,
            arguments.metadynamics_ps,
            arguments.walker_ps,
            arguments.walkers,
            arguments.labels,
            arguments.processes,
        ),
    }
    result: dict[str, Any] = {
        "what": __doc__,
        "model": MODEL,
        "sha256": sha256_of(model),
        "bytes": model.stat().st_size,
        "machine": machine(),
    }
    for name, run in parts.items():
        kept = work / f"{name}.json"
        if name == "errors" and not kept.exists() and not arguments.data.exists():
            print(f"errors: left out, there is no dataset in {arguments.data} (make reproduce makes it)")
            continue
        if name in arguments.parts and not kept.exists():
            kept.write_text(json.dumps(run()), encoding="utf-8")
        if kept.exists():
            result[name] = json.loads(kept.read_text(encoding="utf-8"))
            if name != "errors":
                print(name, json.dumps(result[name], indent=1))
    if "ramachandran" in result:
        draw(work, result)
    write("spookynet_ala2", result)


if __name__ == "__main__":
    main()
