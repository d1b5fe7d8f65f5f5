"""Stability of molecular dynamics with SO3LR: capped alanine for 200 ps, a helix of 162 atoms for 50 ps.

    python benchmarks/so3lr_stability.py [--systems dipeptide peptide] [--minutes 60]

Vacuum, all pairs (no long-range cutoff), single precision, Langevin at 300 K with 1/ps, 0.5 fs, no constraints. Frames
are kept every 50 fs; a run that loses a bond, or whose forces are no numbers, stops at once (the guard of
`openmm-mlff simulate`). Reported are the largest and smallest ratio of any bond in any frame to its mean over the run,
whether any two atoms that are not bonded came as close as a bond, the temperature and, for the peptide, the helix
content by DSSP in five parts of the run.

A run goes on where it was stopped, in the work folder, which holds the trajectories.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch
from _common import HERE, machine, so3lr_weights, write
from openmm import app, unit

from openmm_mlff.analysis.observables import mean_with_error, read_table
from openmm_mlff.sampling.settings import RunSettings
from openmm_mlff.sampling.simulation import Simulation

EXAMPLES = HERE.parent / "examples"
PICOSECONDS = {"dipeptide": 200.0, "peptide": 50.0}
TITLES = {"dipeptide": "Ace-Ala-NMe, 22 atoms", "peptide": "Ace-Ala15-NMe, 162 atoms"}
TIMESTEP, REPORT, CHECKPOINT = 0.5, 100, 2000
#: a bond that is this many times as long as its mean would be broken
BROKEN = 1.5


def start_of(system: str, work: Path) -> Path:
    """PDB file of the start."""
    if system == "dipeptide":
        return EXAMPLES / "recipes" / "capped_alanine.pdb"
    spec = importlib.util.spec_from_file_location("so3lr_peptide", EXAMPLES / "05_so3lr_peptide.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    topology, positions = example.peptide(15)
    path = work / "helix.pdb"
    if not path.exists():
        with open(path, "w", encoding="utf-8") as file:
            app.PDBFile.writeFile(topology, positions * unit.angstrom, file)
    return path


def carry_out(system: str, work: Path, seconds: float) -> None:
    """Start the run or go on with it, for so many seconds at most."""
    folder, steps = work / system, round(PICOSECONDS[system] / TIMESTEP * 1e3)
    if (folder / "run.json").exists():
        run = Simulation.resume(folder, steps, progress=False)
    else:
        settings = RunSettings(
            input=str(start_of(system, work)),
            model="so3krates",
            model_path=str(so3lr_weights()),
            timestep=TIMESTEP,
            steps=steps,
            equilibration_steps=2000,
            minimization_steps=300,
            report_interval=REPORT,
            checkpoint_interval=CHECKPOINT,
            platform="Reference",
            compile="yes",
            seed=1,
        )
        run = Simulation.start(settings, folder, progress=False)
    begin, before = time.process_time(), done(folder)
    run.run(seconds)
    spent = (time.process_time() - begin) / max(done(folder) - before, 1)
    print(f"{system}: {1e3 * spent:.2f} ms of CPU time per step", flush=True)


def done(folder: Path) -> int:
    """Steps that the table of a run has."""
    try:
        return int(read_table(folder / "log.csv")["step"][-1])
    except (OSError, ValueError, KeyError):
        return 0


def analyse(system: str, work: Path) -> dict[str, Any]:
    folder = work / system
    topology = app.PDBFile(str(folder / "start.pdb")).topology
    trajectory = mdtraj.load(str(folder / "trajectory.dcd"), top=str(folder / "start.pdb"))
    bonds = np.array([(b.atom1.index, b.atom2.index) for b in topology.bonds()])
    lengths = mdtraj.compute_distances(trajectory, bonds)
    ratios = lengths / lengths.mean(axis=0)
    table = read_table(folder / "log.csv")
    temperature = mean_with_error(table["temperature_K"])
    result: dict[str, Any] = {
        "atoms": trajectory.n_atoms,
        "ps": round((trajectory.n_frames - 1) * REPORT * TIMESTEP * 1e-3, 3),
        "timestep_fs": TIMESTEP,
        "frames": trajectory.n_frames,
        "bonds": len(bonds),
        "bonds_broken": int((ratios > BROKEN).any(axis=0).sum()),
        "largest_bond_over_its_mean": round(float(ratios.max()), 3),
        "smallest_bond_over_its_mean": round(float(ratios.min()), 3),
        "closest_without_a_bond_A": round(10.0 * closest(trajectory, bonds), 3),
        "temperature_K": round(temperature.value, 2),
        "temperature_error_K": round(temperature.error, 2),
        "stopped_by_guard": (folder / "failure").exists(),
    }
    if system == "peptide":
        codes = mdtraj.compute_dssp(trajectory)[:, 1:-1]
        parts = np.array_split(100.0 * (codes == "H").mean(axis=1), 5)
        result["helix_percent_by_fifths"] = [round(float(part.mean()), 1) for part in parts]
    return result


def closest(trajectory: mdtraj.Trajectory, bonds: np.ndarray) -> float:
    """Smallest distance (nm) in any frame of two atoms that are three bonds apart or more."""
    n = trajectory.n_atoms
    steps = np.full((n, n), np.inf)
    steps[bonds[:, 0], bonds[:, 1]] = steps[bonds[:, 1], bonds[:, 0]] = 1
    near = np.isfinite(steps)
    near |= (near.astype(int) @ near.astype(int)) > 0
    pairs = np.argwhere(np.triu(~near, 1))
    smallest = np.inf
    for frames in np.array_split(trajectory.xyz, max(1, len(trajectory) * len(pairs) // 2_000_000)):
        smallest = min(smallest, float(np.linalg.norm(frames[:, pairs[:, 0]] - frames[:, pairs[:, 1]], axis=-1).min()))
    return smallest


def draw(work: Path, systems: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.6 * len(systems), 6.4)
    figure, axes = plt.subplots(3, len(systems), figsize=size, sharex="col", constrained_layout=True, squeeze=False)
    for column, system in zip(axes.T, systems, strict=True):
        folder = work / system
        table = read_table(folder / "log.csv")
        trajectory = mdtraj.load(str(folder / "trajectory.dcd"), top=str(folder / "start.pdb"))
        bonds = np.array([(a.index, b.index) for a, b in trajectory.topology.bonds])
        lengths = mdtraj.compute_distances(trajectory, bonds)
        ratios = lengths / lengths.mean(axis=0)
        times = np.arange(len(ratios)) * REPORT * TIMESTEP * 1e-3
        column[0].plot(times, ratios.max(axis=1), color="#b5472f", linewidth=0.5, label="longest")
        column[0].plot(times, ratios.min(axis=1), color="#1f5fa8", linewidth=0.5, label="shortest")
        column[0].set(title=TITLES[system], ylabel="bond over its mean", ylim=(0.7, 1.3))
        column[1].plot(table["time_ps"], table["temperature_K"], color="0.7", linewidth=0.4)
        width = max(1, len(table["time_ps"]) // 40)
        smooth = np.convolve(table["temperature_K"], np.full(width, 1.0 / width), mode="valid")
        column[1].plot(table["time_ps"][width // 2 :][: len(smooth)], smooth, color="black", linewidth=1.2)
        column[1].axhline(300.0, color="#5a8f3c", linestyle="--", linewidth=1)
        column[1].set(ylabel="temperature [K]")
        if system == "peptide":
            codes = mdtraj.compute_dssp(trajectory)[:, 1:-1]
            column[2].plot(times, 100.0 * (codes == "H").mean(axis=1), color="#1f5fa8", linewidth=0.6)
            column[2].set(ylabel="helix content [%]", ylim=(0, 100))
        else:
            for name, color in (("phi", "#1f5fa8"), ("psi", "#c98a2b")):
                column[2].plot(table["time_ps"], table[name], ".", color=color, markersize=1.2, label=name)
            # room for the legend above what angles can be
            column[2].set(ylabel="torsion [deg]", ylim=(-180, 250), yticks=range(-180, 181, 90))
            column[2].legend(fontsize=8, frameon=False, markerscale=8, ncols=2, loc="upper left")
        column[2].set(xlabel="time [ps]")
        for axis in column:
            axis.set_xlim(0, times[-1])
            axis.grid(alpha=0.3)
    legend = axes[0, 0].legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    for line in legend.get_lines():
        line.set_linewidth(2)
    figure.savefig(HERE / "so3lr_stability.png", dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(PICOSECONDS), choices=list(PICOSECONDS))
    parser.add_argument("--minutes", type=float, default=60.0, help="of each run in this sitting, at most")
    parser.add_argument("--analyse", action="store_true", help="only look at what is there")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".work" / "so3lr_stability")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.analyse:
        for system in arguments.systems:
            carry_out(system, arguments.work, 60 * arguments.minutes)
    there = [system for system in PICOSECONDS if (arguments.work / system / "trajectory.dcd").exists()]
    result = {"what": __doc__, "machine": machine(), "systems": {s: analyse(s, arguments.work) for s in there}}
    print(json.dumps(result["systems"], indent=1))
    write("so3lr_stability", result)
    draw(arguments.work, there)


if __name__ == "__main__":
    main()
