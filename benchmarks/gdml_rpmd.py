"""Quantum hydrogen in palladium: rings of 8 beads beside classical dynamics, at 300 K.

The model is the one of `gdml_materials.py` with the whole symmetry of the site and image sums (its file lies in the
work folder). Runs of the same system:

* classical Langevin dynamics (a ring of one bead);
* 8 beads with OpenMM's `RPMDIntegrator`, which calls the model for one bead after the other;
* 8 beads as replicas in one System (`openmm_mlff.sampling.path_integrals`), whose model evaluates all beads at once;
* the same with other numbers of beads, for the convergence.

Kinetic energies by the centroid virial estimator with their standard errors stand beside those of a harmonic oscillator
with the same number of beads and beside the exact quantum average of one hydrogen atom in the rigid lattice of the
reference method, from its Schroedinger equation on a grid. Since quantum hydrogen goes where classical training data
hardly are, whole rings are labelled by the reference method: force errors on beads, and what they change of the kinetic
energy. Speed: the two ways in turn, one thread, and the batched one on two threads.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _materials as materials
import numpy as np
import openmm
import torch
from _common import HERE, machine, summary, write
from openmm import app, unit
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.analysis.observables import mean_with_error
from openmm_mlff.analysis.path_integrals import harmonic_oscillator, virial_kinetic_energy
from openmm_mlff.data.files import write_atomically
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.path_integrals import (
    RingFrame,
    RingPolymers,
    ring_dynamics,
    ring_dynamics_frame,
    start_ring_dynamics,
)
from openmm_mlff.units import BOLTZMANN_EV, HBAR_KJ_PER_MOL_PS, KJ_PER_MOL_PER_EV

BEADS, TEMPERATURE = 8, materials.TEMPERATURE
COUNTS = (1, 2, 4, 8, 16)
HYDROGEN, MASS = 27, 1.008
FRICTION = 10.0  # 1/ps
SAMPLE_EVERY = 10.0  # fs
MODEL = "PdH_full_image_sums_{}.safetensors"


def crystal() -> tuple[app.Topology, np.ndarray, np.ndarray]:
    """Topology, positions (nm) and masses of the relaxed supercell, turned so that OpenMM accepts its box."""
    atoms = materials.palladium_hydride()
    cell, turn = atoms.cell.standard_form()
    positions = atoms.positions @ turn.T
    topology = app.Topology()
    residue = topology.addResidue("PDH", topology.addChain())
    for number in atoms.numbers:
        element = app.Element.getByAtomicNumber(int(number))
        topology.addAtom(element.symbol, element, residue)
    # OpenMM compares with the exact limits of a reduced box, which this cell reaches
    box = np.array(cell) * 0.1
    rows = [openmm.Vec3(*row) for row in np.tril(box)] * unit.nanometer
    topology.setPeriodicBoxVectors(app.internal.unitcell.reducePeriodicBoxVectors(rows))
    return topology, positions * 0.1, atoms.get_masses()


def step_for(n_beads: int) -> float:
    """Time step in fs: a twentieth of the period of the stiffest spring, at most 0.5 fs."""
    period = np.pi * HBAR_KJ_PER_MOL_PS / (BOLTZMANN_EV * KJ_PER_MOL_PER_EV * TEMPERATURE * n_beads) * 1e3
    return float(min(0.5, 0.05 * round(period / 20 / 0.05)))


def observables(frame: RingFrame, home: np.ndarray) -> dict[str, Any]:
    """What is kept of one frame, meV and angstrom."""
    metal = np.delete(np.arange(frame.positions.shape[1]), HYDROGEN)
    # displacement of every bead of hydrogen from its site, relative to the metal's centroid
    displacement = frame.positions - home
    drift = displacement[:, metal].mean(axis=(0, 1))
    to_mev = 1e3 / KJ_PER_MOL_PER_EV
    return {
        "hydrogen": frame.kinetic[HYDROGEN] * to_mev,
        "hydrogen_primitive": frame.primitive[HYDROGEN] * to_mev,
        "metal": frame.kinetic[metal].mean() * to_mev,
        "gyration": frame.gyration[HYDROGEN] * 100,
        "displacement": (displacement[:, HYDROGEN] - drift) * 10,
    }


def sample(
    advance: Callable[[int], None], frame: Callable[[], RingFrame], home: np.ndarray, step: float, picoseconds: float
) -> dict[str, np.ndarray]:
    """Run 1 ps without and `picoseconds` with observation."""
    every = max(1, round(SAMPLE_EVERY / step))
    advance(round(1000 / step))
    rows = []
    for _ in range(round(picoseconds * 1000 / step / every)):
        advance(every)
        rows.append(observables(frame(), home))
    return {key: np.array([row[key] for row in rows]) for row in rows[:1] for key in row}


def batched(
    system: openmm.System, topology: app.Topology, home: np.ndarray, n_beads: int, seed: int
) -> tuple[RingPolymers, openmm.Context]:
    rings = RingPolymers(system, topology, n_beads, TEMPERATURE)
    context = rings.context(rings.integrator(step_for(n_beads) * 1e-3, FRICTION, seed), "Reference")
    rings.start(context, home, seed)
    return rings, context


def run(name: str, make: Callable[[], dict[str, np.ndarray]], folder: Path) -> dict[str, np.ndarray]:
    """A run, or what an earlier call has kept of it."""
    import io

    path = folder / f"{name}.npz"
    if not path.exists():
        start = time.perf_counter()
        found = make()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **found, seconds=time.perf_counter() - start)  # type: ignore[arg-type]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    return dict(np.load(path, allow_pickle=False))


def averages(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means with standard errors, meV and angstrom^2."""
    rows = {}
    for key in ("hydrogen", "hydrogen_primitive", "metal", "gyration"):
        estimate = mean_with_error(found[key])
        rows[key] = {"mean": estimate.value, "error": estimate.error}
    spread = mean_with_error(np.sum(found["displacement"] ** 2, axis=-1).mean(axis=-1))
    rows["hydrogen_squared_displacement"] = {"mean": spread.value, "error": spread.error}
    return rows | {"seconds": float(found["seconds"]), "samples": len(found["hydrogen"])}


def frequency(forces: Callable[[np.ndarray], np.ndarray], delta: float = 0.01) -> float:
    """Angular frequency of hydrogen in the rigid lattice by central differences of its forces, 1/ps.

    Args:
        forces: positions ``(n_atoms, 3)`` angstrom -> eV/angstrom. delta: angstrom.
    """
    home, stiffness = materials.palladium_hydride().positions, []
    for k in range(3):
        moved = [home.copy(), home.copy()]
        for positions, sign in zip(moved, (1, -1), strict=True):
            positions[HYDROGEN, k] += sign * delta
        upper, lower = (forces(positions)[HYDROGEN, k] for positions in moved)
        stiffness.append(float(lower - upper) / (2 * delta))
    # eV/angstrom^2 -> kJ/mol/nm^2
    return float(np.sqrt(np.mean(stiffness) * KJ_PER_MOL_PER_EV * 100 / MASS))


def rigid_lattice(spacing: float = 0.1, points: int = 19, states: int = 80) -> dict[str, float]:
    """Exact quantum averages of hydrogen in the rigid lattice of the reference method, meV and angstrom^2.

    The Schroedinger equation in sinc functions on `points`^3 points (Colbert, Miller, J. Chem. Phys. 96, 1982 (1992)).

    Args:
        spacing: angstrom. states: lowest eigenstates that the thermal average takes.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    atoms = materials.palladium_hydride()
    atoms.calc = materials.fast_form(atoms)
    home = atoms.positions.copy()
    axis = (np.arange(points) - points // 2) * spacing
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    energies = np.empty(len(grid))
    for k, displacement in enumerate(grid):
        atoms.positions = home
        atoms.positions[HYDROGEN] += displacement
        energies[k] = atoms.get_potential_energy()
    potential = (energies - energies.min()).reshape(points, points, points)
    apart = np.subtract.outer(np.arange(points), np.arange(points))
    with np.errstate(divide="ignore"):
        kinetic = np.where(apart == 0, np.pi**2 / 3, 2.0 / apart.astype(float) ** 2) * (-1.0) ** apart
    # hbar^2 / 2m in eV angstrom^2
    kinetic *= (HBAR_KJ_PER_MOL_PS**2 / (2 * MASS) * 100 / KJ_PER_MOL_PER_EV) / spacing**2

    def apply(vector: np.ndarray) -> np.ndarray:
        psi = vector.reshape(points, points, points)
        moved = np.einsum("ai,ijk->ajk", kinetic, psi) + np.einsum("aj,ijk->iak", kinetic, psi)
        return (moved + np.einsum("ak,ijk->ija", kinetic, psi) + potential * psi).ravel()

    size = points**3
    levels, vectors = eigsh(LinearOperator((size, size), matvec=apply, dtype=np.float64), k=states, which="SA")
    weights = np.exp(-(levels - levels.min()) / (BOLTZMANN_EV * TEMPERATURE))
    weights /= weights.sum()
    density = vectors**2
    return {
        "kinetic_meV": 1e3 * float(weights @ (levels - density.T @ potential.ravel())),
        "squared_displacement_A2": float(weights @ (density.T @ np.sum(grid**2, axis=1))),
        "first_excitation_meV": 1e3 * float(levels[1] - levels[0]),
        "weight_of_last_state": float(weights[-1]),
        "probability_at_the_edge": float(weights @ density.T @ (np.abs(grid).max(axis=1) == axis.max())),
    }


def bead_errors(model: Any, rings: np.ndarray) -> dict[str, float]:
    """Errors of the model on rings that it has made itself, ``(n, n_beads, n_atoms, 3)`` angstrom, by the reference."""
    atoms = materials.palladium_hydride()
    lattice = torch.from_numpy(atoms.cell.array)
    labels = np.empty_like(rings)
    for index in np.ndindex(rings.shape[:2]):
        atoms.positions = rings[index]
        labels[index] = atoms.get_forces()
    predicted = model.energies_and_forces(torch.from_numpy(rings.reshape(-1, *rings.shape[2:])), lattice)[1]
    predicted = predicted.numpy().reshape(rings.shape)
    difference = predicted - labels
    # the virial is linear in the forces: that of the difference, in eV
    change = mean_with_error(1e3 * virial_kinetic_energy(rings, difference, 0.0)[:, HYDROGEN])
    return {
        "rings": len(rings),
        "forces_rmse_meV_per_A": 1e3 * float(np.sqrt(np.mean(difference**2))),
        "hydrogen_forces_rmse_meV_per_A": 1e3 * float(np.sqrt(np.mean(difference[:, :, HYDROGEN] ** 2))),
        "hydrogen_forces_rms_meV_per_A": 1e3 * float(np.sqrt(np.mean(labels[:, :, HYDROGEN] ** 2))),
        "hydrogen_kinetic_change_by_the_model_meV": change.value,
        "its_error_meV": change.error,
    }


def speed(
    system: openmm.System, threaded: openmm.System, topology: app.Topology, home: np.ndarray, masses: np.ndarray
) -> dict[str, Any]:
    """Time per step of all beads, both ways in turn; `threaded` is the same system on two threads."""
    single = ring_dynamics(system, BEADS, TEMPERATURE, step_for(BEADS) * 1e-3, FRICTION, 1)
    start_ring_dynamics(single, home, masses, 1)
    _, together = batched(system, topology, home, BEADS, 1)
    _, faster = batched(threaded, topology, home, BEADS, 1)
    _, classical = batched(system, topology, home, 1, 1)
    ways = {"classical": classical, "one_by_one": single, "batched": together, "two_threads": faster}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(16):
        for name, context in ways.items():
            start = time.perf_counter()
            context.getIntegrator().step(20)
            if turn:
                times[name].append((time.perf_counter() - start) / 20)
    ratios = {
        f"one_by_one_over_{name}": round(float(np.median(np.array(times["one_by_one"]) / np.array(times[name]))), 2)
        for name in ("batched", "two_threads")
    }
    return {name: summary(values) for name, values in times.items()} | ratios


def draw(runs: dict[str, dict[str, np.ndarray]], result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.2))
    edges = np.linspace(-0.72, 0.72, 37)
    styles = {
        "batched_1": ("classical", "tab:grey", "-"),
        "rpmd": ("8 beads, RPMDIntegrator", "tab:red", "-"),
        f"batched_{BEADS}": ("8 beads, in one System", "tab:blue", "--"),
    }
    for name, (label, colour, style) in styles.items():
        # the site has inversion symmetry
        values = runs[name]["displacement"].ravel()
        density, _ = np.histogram(np.concatenate([values, -values]), edges, density=True)
        left.plot(0.5 * (edges[1:] + edges[:-1]), density, style, color=colour, label=label)
    left.set_xlabel("hydrogen: displacement along x, y or z [Å]")
    left.set_ylabel("probability density [1/Å]")
    left.legend(fontsize=8)
    beads = sorted(int(n.split("_")[1]) for n in runs if n.startswith("batched_"))
    rows = [result["runs"][f"batched_{n}"] for n in beads]
    right.errorbar(
        beads,
        [r["hydrogen"]["mean"] for r in rows],
        [r["hydrogen"]["error"] for r in rows],
        fmt="o",
        color="tab:blue",
        capsize=3,
        label="in one System",
    )
    rpmd = result["runs"]["rpmd"]["hydrogen"]
    right.errorbar(
        [BEADS * 1.06], rpmd["mean"], rpmd["error"], fmt="s", color="tab:red", capsize=3, label="RPMDIntegrator"
    )
    curve = [result["harmonic"][n] for n in beads]
    right.plot(beads, curve, "-", color="black", lw=0.9, label="harmonic oscillator, exact for so many beads")
    exact = result["rigid_lattice"]["kinetic_meV"]
    right.axhline(exact, color="black", lw=0.9, ls="--", label="exact, rigid lattice of the reference method")
    right.set_xscale("log", base=2)
    right.set_xticks(beads, [str(n) for n in beads])
    right.set_xlabel("beads")
    right.set_ylabel("kinetic energy of hydrogen [meV]")
    right.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=160, help="training geometries of the model")
    parser.add_argument("--picoseconds", type=float, default=20.0)
    parser.add_argument("--rpmd-picoseconds", type=float, default=8.0, help="its integrator is slow on this platform")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = materials.WORK / "rows" / MODEL.format(arguments.train)
    if not file.exists():
        raise SystemExit(f"no {file.name} in the work folder; run gdml_materials.py first")
    model = load_potential(file)
    folder = materials.WORK / f"rings_{arguments.train}"
    topology, home, masses = crystal()
    potential = MLPotential("gdml", modelPath=str(file))
    system, threaded = (
        potential.createSystem(topology, removeCMMotion=False, compile=True, threads=threads) for threads in (1, 2)
    )
    ps = arguments.picoseconds

    def together(n_beads: int, length: float) -> dict[str, np.ndarray]:
        rings, context = batched(system, topology, home, n_beads, 10 + n_beads)
        return sample(context.getIntegrator().step, lambda: rings.frame(context), home, step_for(n_beads), length)

    def one_by_one() -> dict[str, np.ndarray]:
        context = ring_dynamics(system, BEADS, TEMPERATURE, step_for(BEADS) * 1e-3, FRICTION, 7)
        start_ring_dynamics(context, home, masses, 7)
        integrator = context.getIntegrator()
        frame = functools.partial(ring_dynamics_frame, context, masses)
        return sample(integrator.step, frame, home, step_for(BEADS), arguments.rpmd_picoseconds)

    runs = {}
    for n in COUNTS:
        runs[f"batched_{n}"] = run(f"batched_{n}", functools.partial(together, n, ps / max(1, n // BEADS)), folder)
    runs["rpmd"] = run("rpmd", one_by_one, folder)
    rings = run("rings", functools.partial(_rings, system, topology, home), folder)["positions"]
    turn = materials.palladium_hydride().cell.standard_form()[1]
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "runs": {k: averages(v) for k, v in runs.items()}}
    result |= compared(model, result["runs"])
    result["errors_on_beads"] = bead_errors(model, rings * 10 @ turn)
    result["speed"] = speed(system, threaded, topology, home, masses)
    table = Table("run", "K(H) [meV]", "K(H), primitive", "K(Pd) [meV]", "rg^2(H) [Å²]", "<u²>(H) [Å²]")
    for name, row in result["runs"].items():
        cells = ("hydrogen", "hydrogen_primitive", "metal", "gyration", "hydrogen_squared_displacement")
        table.add_row(name, *(f"{row[c]['mean']:.4g} +- {row[c]['error']:.1g}" for c in cells))
    Console(width=120).print(table)
    for key, value in result.items():
        if key not in ("what", "machine", "runs"):
            print(key, json.dumps(value))
    draw(runs, result, HERE / "gdml_rpmd.png")
    write("gdml_rpmd", result)


def compared(model: Any, runs: dict[str, Any]) -> dict[str, Any]:
    """What the runs are held against: harmonic oscillator, exact quantum mechanics, and one another."""
    atoms = materials.palladium_hydride()
    lattice = torch.from_numpy(atoms.cell.array)

    def learned(positions: np.ndarray) -> np.ndarray:
        return model.energies_and_forces(torch.from_numpy(positions[None]), lattice)[1][0].numpy()

    def reference(positions: np.ndarray) -> np.ndarray:
        atoms.positions = positions
        return atoms.get_forces()

    to_mev = 1e3 / KJ_PER_MOL_PER_EV
    omega = frequency(reference)
    found: dict[str, Any] = {
        "hydrogen_frequency_meV": {
            "model": HBAR_KJ_PER_MOL_PS * frequency(learned) * to_mev,
            "reference": HBAR_KJ_PER_MOL_PS * omega * to_mev,
        },
        "harmonic": {n: 3 * harmonic_oscillator(omega, MASS, TEMPERATURE, n).kinetic * to_mev for n in COUNTS},
        "rigid_lattice": rigid_lattice(),
        "z_scores_rpmd_against_batched": {},
    }
    for key in ("hydrogen", "metal", "gyration"):
        one, other = runs["rpmd"][key], runs[f"batched_{BEADS}"][key]
        z = (one["mean"] - other["mean"]) / float(np.hypot(one["error"], other["error"]))
        found["z_scores_rpmd_against_batched"][key] = round(z, 2)
    return found


def _rings(system: openmm.System, topology: app.Topology, home: np.ndarray) -> dict[str, np.ndarray]:
    """Whole rings, ``(n, n_beads, n_atoms, 3)`` nm."""
    rings, context = batched(system, topology, home, BEADS, 99)
    frames = []
    for k in range(60):
        context.getIntegrator().step(round(100 / step_for(BEADS)))
        if k >= 10:
            frames.append(rings.frame(context).positions)
    return {"positions": np.array(frames)}


if __name__ == "__main__":
    main()
