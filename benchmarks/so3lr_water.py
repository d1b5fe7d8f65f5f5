"""SO3LR in a periodic box of 64 waters: energy conservation and density, by every long-range method.

Runs of the same start (``water_64`` of the shared data, box of 12.4 angstrom), single precision, time step 0.5 fs:

* NVE after 1 ps with a thermostat: the slope of the total energy, with its error, of a straight line through 6 ps;
* NPT at 300 K and 1 bar with the Monte Carlo barostat, which moves whole molecules: density of what follows the first
  10 ps (the start is no minimum of this model and heats the box to 550 K at first), with an error that counts how often
  it has moved up and down. 64 molecules in some tens of ps say the density to a percent or two, not better.

'shifted' lets electrostatics and dispersion go to zero at the cutoff; 'ewald' and 'pme' sum the charges of all images,
and only dispersion ends at the cutoff. The box is smaller than twice a cutoff of 12 angstrom; pair lists hold every
image, so that this is no approximation.

The methods differ in the pressure. By how much is measured on the frames of the NVE runs, all at the same density.

Runs lie in the work folder and go on where they were stopped: ``so3lr_water.py RUN ...`` makes some of them (in as many
processes as there are cores to spare), and without names the script makes what is missing and reports.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch
from _common import HERE, SHARED, machine, write
from openmm import app, unit
from rich.console import Console
from rich.table import Table

from openmm_mlff.analysis.observables import energy_drift, mean_with_error, read_table
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.settings import RunSettings
from openmm_mlff.sampling.simulation import Simulation
from openmm_mlff.units import KJ_PER_MOL_PER_EV

TIMESTEP = 0.5  # fs
#: ps that the density forgets its start in
RELAXATION = 10.0
#: what pressures are compared with, at which cutoffs (angstrom), and on how many frames of each run
SUM, CUTOFFS, FRAMES = "ewald", (6.0, 9.0, 12.0, 18.0, 27.0), 10
#: bar in eV/angstrom^3
BAR = 1.602176634e6
#: ps
LEAST = {"nve": 5.0, "npt": 20.0}


@dataclass(frozen=True)
class Run:
    """One run: ensemble, long-range method, cutoff (nm), length (ps) and seed."""

    ensemble: str
    method: str
    cutoff: float
    length: float
    seed: int

    def settings(self, start: Path) -> RunSettings:
        return RunSettings(
            input=str(start),
            model="so3krates",
            model_path=str(SHARED / "models" / "so3lr_params.npz"),
            ml_region="all",
            ensemble=self.ensemble,
            long_range_method=self.method,
            long_range_cutoff=self.cutoff,
            temperature=300.0,
            timestep=TIMESTEP,
            steps=round(self.length / TIMESTEP * 1e3),
            equilibration_steps=round(1.0 / TIMESTEP * 1e3) if self.ensemble == "nve" else 0,
            minimization_steps=0,
            report_interval=20,
            checkpoint_interval=1000,
            seed=self.seed,
            precision="single",
            device="cpu",
            compile="yes",
        )


RUNS = {
    "nve_shifted_6": Run("nve", "shifted", 0.6, 6.0, 11),
    "nve_pme_6": Run("nve", "pme", 0.6, 6.0, 11),
    "nve_ewald_12": Run("nve", "ewald", 1.2, 6.0, 11),
    "nve_shifted_12": Run("nve", "shifted", 1.2, 6.0, 11),
    "npt_shifted_12": Run("npt", "shifted", 1.2, 30.0, 21),
    "npt_pme_12": Run("npt", "pme", 1.2, 30.0, 21),
    "npt_pme_12_again": Run("npt", "pme", 1.2, 30.0, 22),
}


def write_start(path: Path) -> Path:
    """The box of 64 waters as a PDB file; molecules are told from the distances of the shared positions."""
    data = np.load(SHARED / "data/so3lr/visible.npz", allow_pickle=False)
    name = "water_64_lr6/"
    numbers, positions, cell = (data[name + key] for key in ("numbers", "positions", "cell"))
    oxygens, hydrogens = np.flatnonzero(numbers == 8), np.flatnonzero(numbers == 1)
    apart = positions[hydrogens, None] - positions[oxygens]
    shift = np.rint(apart @ np.linalg.inv(cell))
    near = np.linalg.norm(apart - shift @ cell, axis=-1)
    owner = near.argmin(axis=1)
    topology, places = app.Topology(), []
    chain = topology.addChain()
    for k, o in enumerate(oxygens):
        residue = topology.addResidue("HOH", chain)
        center = topology.addAtom("O", app.element.oxygen, residue)
        places.append(positions[o])
        own = np.flatnonzero(owner == k)
        if len(own) != 2 or near[own, k].max() > 1.3:
            raise RuntimeError(f"water {k}: expected two hydrogens within 1.3 angstrom, got {near[own, k]}")
        for which, h in enumerate(own):
            topology.addBond(center, topology.addAtom(f"H{which + 1}", app.element.hydrogen, residue))
            places.append(positions[hydrogens[h]] - shift[h, k] @ cell)
    topology.setPeriodicBoxVectors(cell * unit.angstrom)
    with open(path, "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, np.array(places) * unit.angstrom, file)
    return path


def make(name: str, work: Path) -> bool:
    """Start a run or go on with it; False if a signal stopped it."""
    work.mkdir(parents=True, exist_ok=True)
    folder = work / name
    if (folder / "run.json").exists():
        simulation = Simulation.resume(folder)
    else:
        simulation = Simulation.start(RUNS[name].settings(write_start(work / f"{name}.pdb")), folder)
    return simulation.run().finished


def finished(name: str, work: Path) -> bool:
    return (work / name / "summary.png").exists()


def long_enough(name: str, work: Path) -> bool:
    """Whether a run, finished or not, has the length that its figure needs."""
    log = work / name / "log.csv"
    return log.is_file() and read_table(log)["time_ps"][-1] >= LEAST[RUNS[name].ensemble]


def measure(name: str, work: Path) -> dict[str, Any]:
    """What a run says."""
    run, log = RUNS[name], read_table(work / name / "log.csv")
    atoms = 192
    row: dict[str, Any] = {"ensemble": run.ensemble, "method": run.method, "cutoff_nm": run.cutoff, "seed": run.seed}
    row["ps"] = round(float(log["time_ps"][-1]), 3)
    late = log["time_ps"] >= (RELAXATION if run.ensemble == "npt" else 0.0)
    temperature = mean_with_error(log["temperature_K"][late])
    row |= {"temperature_K": temperature.value, "temperature_error_K": temperature.error}
    if run.ensemble == "nve":
        drift = energy_drift(log["time_ps"], log["total_kJ_mol"] / KJ_PER_MOL_PER_EV, atoms)
        row |= {"drift_meV_per_atom_per_ps": 1e3 * drift.value, "drift_error": 1e3 * drift.error}
        row["fluctuation_meV_per_atom"] = 1e3 * float(np.std(log["total_kJ_mol"])) / KJ_PER_MOL_PER_EV / atoms
    else:
        density = mean_with_error(log["density_g_cm3"][late])
        row |= {"density_g_cm3": density.value, "density_error": density.error, "independent": density.samples}
    return row


def pressures(names: list[str], work: Path) -> list[dict[str, Any]]:
    """Pressure by each method and cutoff on the same frames, minus that of the sum over all images.

    Molecules move apart by 0.1 % and together by 0.1 %, box and all; the thermal part is the same for all methods.
    """
    model = load_potential(SHARED / "models" / "so3lr_params.npz", "so3krates").to(torch.float32)
    results: dict[tuple[str, float], list[float]] = {}
    for name in names:
        run = mdtraj.load(str(work / name / "trajectory.dcd"), top=str(work / name / "start.pdb"))
        numbers = np.array([atom.element.atomic_number for atom in run.topology.atoms])
        cell = 10.0 * run.unitcell_vectors[0].astype(float)
        for method, cutoff in ((SUM, 12.0), *((m, c) for c in CUTOFFS for m in ("shifted", "pme"))):
            model.long_range_method, model.long_range_cutoff = method, cutoff
            frames = 10.0 * run.xyz[:: len(run) // FRAMES].astype(float)
            evaluator = model.evaluator(Structure(numbers, frames[0], cell=cell), compile=True)
            for frame in frames:
                molecules = frame.reshape(-1, 3, 3)
                centers = molecules.mean(axis=1, keepdims=True)
                energies = [
                    evaluator.arrays((molecules + (s - 1.0) * centers).reshape(-1, 3), s * cell)[0][0]
                    for s in (0.999, 1.001)
                ]
                slope = (energies[1] - energies[0]) / ((1.001**3 - 0.999**3) * np.linalg.det(cell))
                results.setdefault((method, cutoff), []).append(-slope * BAR)
    reference = np.array(results.pop((SUM, 12.0)))
    rows = []
    for (method, cutoff), values in results.items():
        apart = np.array(values) - reference
        error = float(apart.std(ddof=1) / np.sqrt(len(apart)))
        rows.append({"method": method, "cutoff": cutoff, "bar": float(apart.mean()), "error": error})
        print(f"{method}, {cutoff:.0f} A: {apart.mean():+.0f} +- {error:.0f} bar against {SUM}", flush=True)
    return rows


def force_changes(name: str, work: Path) -> list[dict[str, Any]]:
    """What a cutoff of the shifted form changes of the forces, root mean squares in eV/angstrom.

    Of open molecules against no cutoff, and of the frames of an NVE run against the sum over all images.
    """
    model = load_potential(SHARED / "models" / "so3lr_params.npz", "so3krates").double()
    data = np.load(SHARED / "data/so3lr/visible.npz", allow_pickle=False)
    stretched = 1.02 * np.array([[0.0, 0.0, 0.0], [0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]])
    molecules = {"water, stretched by 2 %": Structure(np.array([8, 1, 1]), stretched)}
    for molecule in ("benzene", "alanine_dipeptide"):
        molecules[molecule] = Structure(data[f"{molecule}/numbers"], data[f"{molecule}/positions"])
    rows = []
    for label, structure in molecules.items():
        forces = []
        for cutoff in (None, 12.0, 6.0):
            model.long_range_cutoff = cutoff
            forces.append(model.energy_and_forces(structure)[1])
        rows.append(_changed(label, forces))
    run = mdtraj.load(str(work / name / "trajectory.dcd"), top=str(work / name / "start.pdb"))
    numbers = np.array([atom.element.atomic_number for atom in run.topology.atoms])
    cell, frames = 10.0 * run.unitcell_vectors[0].astype(float), 10.0 * run.xyz[:: len(run) // FRAMES].astype(float)
    forces = []
    for method, cutoff in ((SUM, 12.0), ("shifted", 12.0), ("shifted", 6.0)):
        model.long_range_method, model.long_range_cutoff = method, cutoff
        evaluator = model.evaluator(Structure(numbers, frames[0], cell=cell), compile=True)
        forces.append(np.array([evaluator.arrays(frame, cell)[1] for frame in frames]))
    return [*rows, _changed("64 waters, against the sum over images", forces)]


def _changed(label: str, forces: list[np.ndarray]) -> dict[str, Any]:
    """Of the first and of the others minus the first."""
    values = [float(np.sqrt(np.mean(np.square(f)))) for f in (forces[0], *(f - forces[0] for f in forces[1:]))]
    row = dict(zip(("all", "changed_by_12_angstrom", "changed_by_6_angstrom"), values, strict=True))
    print(label, row, flush=True)
    return {"system": label, **row}


def report(names: list[str], work: Path) -> None:
    """The table, the JSON file and the picture."""
    rows = {name: measure(name, work) for name in names}
    table = Table("run", "ps", "T, K", "drift, meV/atom/ps", "density, g/cm3", title="64 waters by SO3LR")
    for name, row in rows.items():
        drift = density = ""
        if row["ensemble"] == "nve":
            drift = f"{row['drift_meV_per_atom_per_ps']:+.4f} +- {row['drift_error']:.4f}"
        else:
            density = f"{row['density_g_cm3']:.3f} +- {row['density_error']:.3f}"
        table.add_row(name, f"{row['ps']:.0f}", f"{row['temperature_K']:.0f}", drift, density)
    Console().print(table)
    settings = {"timestep_fs": TIMESTEP, "precision": "single", "atoms": 192, "temperature_K": 300, "pressure_bar": 1}
    constant_energy = [name for name in names if RUNS[name].ensemble == "nve"]
    extra = {"pressure_minus_that_of_ewald": pressures(constant_energy, work), "frames_of_each_run": FRAMES}
    extra["forces_of_the_shifted_form"] = force_changes(constant_energy[0], work)
    write("so3lr_water", {"machine": machine(), "settings": settings, "runs": rows} | extra)
    picture(names, work)


def picture(names: list[str], work: Path) -> None:
    """Total energy over time beside density over time."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.0), layout="constrained")
    for k, name in enumerate(n for n in names if RUNS[n].ensemble == "nve"):
        log = read_table(work / name / "log.csv")
        energy = log["total_kJ_mol"] / KJ_PER_MOL_PER_EV / 192 * 1e3
        run = RUNS[name]
        # one above the other, so that slopes can be compared
        left.plot(log["time_ps"], energy - energy.mean() + 0.25 * k, lw=0.6, color=f"C{k}")
        label = f"{run.method}, {10 * run.cutoff:.0f} Å"
        left.text(log["time_ps"][-1], 0.25 * k + 0.09, label, ha="right", fontsize=8, color=f"C{k}")
    left.margins(y=0.1)
    left.set(xlabel="time (ps)", ylabel="total energy, shifted (meV/atom)", title="NVE, 0.5 fs")
    for k, name in enumerate(n for n in names if RUNS[n].ensemble == "npt"):
        log, run = read_table(work / name / "log.csv"), RUNS[name]
        label = f"{run.method}, {10 * run.cutoff:.0f} Å, seed {run.seed}"
        right.plot(log["time_ps"], log["density_g_cm3"], lw=0.7, color=f"C{k}", label=label)
    right.axhline(0.9966, color="0.3", ls="--", lw=0.8, label="measured, 300 K")
    right.axvline(RELAXATION, color="0.7", lw=0.8)
    right.set(xlabel="time (ps)", ylabel="density (g/cm³)", title="NPT, 300 K, 1 bar")
    # above the curves
    right.set_ylim(top=right.get_ylim()[1] + 0.06)
    right.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    figure.savefig(HERE / "so3lr_water.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"only these, without a report: {', '.join(RUNS)}")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".work" / "so3lr_water")
    parser.add_argument("--report", action="store_true", help="report what is long enough, make nothing")
    args = parser.parse_args()
    unknown = [name for name in args.runs if name not in RUNS]
    if unknown:
        parser.error(f"runs: expected names among {', '.join(RUNS)}, got {unknown[0]}")
    if not args.report:
        for name in args.runs or RUNS:
            if not finished(name, args.work) and not make(name, args.work):
                return
    if args.report or not args.runs:
        report([name for name in RUNS if long_enough(name, args.work)], args.work)


if __name__ == "__main__":
    main()
