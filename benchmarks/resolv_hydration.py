"""Hydration free energies of molecules that the water potential has not seen, by Bennett's acceptance ratio.

    python benchmarks/resolv_hydration.py [--water .work/resolv/water_first/water.safetensors] [--processes 4]

The 170 test molecules of the ReSolv split, in an order drawn by a seed before any training; as many groups of 64 as
there is time for. Each is simulated in vacuum and in water by Langevin dynamics of our own (298.15 K, 1 fs, 1/ps) from
the conformer of least vacuum energy among eight, and one BAR estimate between the two ensembles is its free energy;
errors count correlated frames. A molecule that breaks, or whose ensembles do not overlap, is named and has no figure.

Beside it: GAFF in TIP3P of FreeSolv, kernel ridge regression on pair histograms (0.595 / 1.176 kcal/mol on 161 of
these molecules, facts of the project) and the mean experimental uncertainty.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write
from _resolv import FOLDER, SEED, TEMPERATURE, Molecule, molecules
from resolv_water import starts, vacuum_folder
from rich.console import Console

from openmm_mlff.analysis import free_energy
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.sampling.molecule_runs import LangevinSettings
from openmm_mlff.training.ensembles import Frames, intact, sample_groups
from openmm_mlff.training.run import MODEL
from openmm_mlff.training.solvation import BEST
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

GROUP = 64
#: added to the seeds in water: the same random numbers in both ensembles would correlate them, which no error bar sees
WATER_SEED = 1000
KT = free_energy.thermal_energy(TEMPERATURE)
#: of what is compared: kernel ridge regression of averaged pair-distance histograms, 161 molecules (kcal/mol)
KERNEL_RIDGE = {"mae": 0.595, "rmse": 1.176, "molecules": 161}
#: <U_wat>_wat - <U_vac>_vac of the published potentials over their authors' long runs: dA + T dS, not dA
PUBLISHED = {"mae": 0.429, "rmse": 0.561, "molecules": 24}


def order() -> list[Molecule]:
    """The test molecules in the order in which they are simulated."""
    test = [m for m in molecules() if m.split == "test"]
    return [test[i] for i in np.random.default_rng(SEED).permutation(len(test))]


def frames_of(
    chosen: list[Molecule],
    model: Path,
    vacuum: Path,
    folder: Path,
    settings: LangevinSettings,
    processes: int,
    seed: int,
) -> dict[str, Frames]:
    """Simulations with one potential, in groups of molecules that are kept; another potential takes another seed."""
    found: dict[str, Frames] = {}
    for first in range(0, len(chosen), GROUP):
        group = chosen[first : first + GROUP]
        structures = {m.key: s for m, s in zip(group, starts(group, vacuum), strict=True)}
        nothing = dict.fromkeys(structures)
        place = folder / f"molecules-{first:03d}"
        found |= sample_groups(model, structures, nothing, settings, place, seed + first + 1, processes)
        print(f"{folder.name}: {first + len(group)} molecules", flush=True)
    return found


@torch.no_grad()
def reduced(model: Potential, frames: Frames) -> tuple[np.ndarray, Any]:
    batch = model.batch([Structure(frames.numbers, x) for x in frames.positions])
    return model(batch).energy.double().numpy() / KT, batch


def estimate(vacuum: Potential, water: Potential, ensembles: tuple[Frames, Frames]) -> dict[str, Any]:
    """One molecule: free energy in kcal/mol with its error and overlap, or the reason why there is none."""
    work = []
    for sign, frames in zip((1.0, -1.0), ensembles, strict=True):
        if frames.failure:
            return {"failure": frames.failure}
        in_vacuum, batch = reduced(vacuum, frames)
        if reason := intact(frames, batch):
            return {"failure": reason}
        work.append(sign * (reduced(water, frames)[0] - in_vacuum))
    try:
        found = free_energy.bar(*work, names=("vacuum", "water"))
    except free_energy.InsufficientOverlap as error:
        return {"failure": str(error)}
    value, error = found.times(KT / EV_PER_KCAL_PER_MOL)
    return {
        "predicted": round(value, 3),
        "error": round(error, 3),
        "overlap": round(float(found.overlap[0, 1]), 3) if found.overlap is not None else None,
        "effective_share": [round(free_energy.effective_samples(w) / len(w), 3) for w in work],
    }


def summary(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    """MAE and RMSE (kcal/mol) with standard errors by bootstrap over molecules."""
    apart = np.array([row[column] - row["experiment"] for row in rows])
    draws = np.random.default_rng(1).integers(0, len(apart), (2000, len(apart)))
    maes, rmses = np.abs(apart[draws]).mean(axis=1), np.sqrt((apart[draws] ** 2).mean(axis=1))
    return {
        "mae": round(float(np.abs(apart).mean()), 3),
        "mae_error": round(float(maes.std()), 3),
        "rmse": round(float(np.sqrt((apart**2).mean())), 3),
        "rmse_error": round(float(rmses.std()), 3),
        "mean_error": round(float(apart.mean()), 3),
        "molecules": len(rows),
    }


def gain(rows: list[dict[str, Any]]) -> dict[str, float]:
    """MAE of GAFF minus that of the pair on the same molecules (kcal/mol), by bootstrap over molecules."""
    apart = np.array([abs(r["gaff"] - r["experiment"]) - abs(r["predicted"] - r["experiment"]) for r in rows])
    means = apart[np.random.default_rng(1).integers(0, len(apart), (2000, len(apart)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mae_difference": round(float(apart.mean()), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def picture(rows: list[dict[str, Any]], worst: list[dict[str, Any]]) -> None:
    """Predicted against measured, the ten worst by name."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 6.0), layout="constrained")
    x, y = (np.array([row[key] for row in rows]) for key in ("experiment", "predicted"))
    low, high = min(x.min(), y.min()) - 0.7, max(x.max(), y.max()) + 0.7
    axis.fill_between([low, high], [low - 1, high - 1], [low + 1, high + 1], color="0.93", label="within 1 kcal/mol")
    axis.plot([low, high], [low, high], color="0.5", lw=0.8)
    axis.plot(x, [row["gaff"] for row in rows], "x", ms=4, color="#c48a3f", label="GAFF, TIP3P (FreeSolv)")
    errors = [row["error"] for row in rows]
    axis.errorbar(x, y, yerr=errors, fmt="o", ms=4, lw=0.8, color="#1f5fa8", label="this pair, by BAR")
    for k, row in enumerate(worst):
        axis.annotate(
            str(k + 1), (row["experiment"], row["predicted"]), xytext=(4, 3), textcoords="offset points", fontsize=7
        )
    names = "\n".join(f"{k + 1}  {row['name']}" for k, row in enumerate(worst))
    axis.text(0.98, 0.02, names, transform=axis.transAxes, fontsize=6.5, ha="right", va="bottom")
    axis.set(xlim=(low, high), ylim=(low, high), xlabel="measured (kcal/mol)", ylabel="predicted (kcal/mol)")
    axis.set_title(f"Hydration free energies, {len(rows)} molecules not seen in training", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(HERE / "resolv_hydration.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--water", type=Path, default=FOLDER / "water_first" / BEST, help="the water potential")
    parser.add_argument("--vacuum-only", action="store_true", help="simulate in vacuum, and no more")
    parser.add_argument("--vacuum", type=Path, help="folder of the vacuum training (default: the chosen one)")
    parser.add_argument("--molecules", type=int, default=170, help="how many, in the drawn order")
    parser.add_argument("--split", choices=("test", "valid"), default="test", help="valid: to choose between trainings")
    parser.add_argument("--ps", type=float, default=100.0)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    trained = args.vacuum or vacuum_folder()
    vacuum = load_potential(trained / MODEL).double()
    settings = LangevinSettings(
        temperature=TEMPERATURE, equilibration=10.0, length=args.ps, interval=0.5, minimization_steps=100, batch=GROUP
    )
    chosen = order() if args.split == "test" else [m for m in molecules() if m.split == "valid"]
    chosen = chosen[: args.molecules]
    place = FOLDER / f"hydration_{args.split}"
    in_vacuum = frames_of(chosen, trained / MODEL, trained, place / trained.name, settings, args.processes, 0)
    if args.vacuum_only:
        return
    water = load_potential(args.water).double()
    in_water = frames_of(
        chosen, args.water, trained, place / args.water.parent.name, settings, args.processes, WATER_SEED
    )
    rows: list[dict[str, Any]] = []
    for m in chosen:
        about = {"name": m.name, "smiles": m.smiles, "experiment": m.experiment, "uncertainty": m.uncertainty}
        rows.append(about | {"gaff": m.gaff} | estimate(vacuum, water, (in_vacuum[m.key], in_water[m.key])))
    sound = [row for row in rows if "failure" not in row]
    worst = sorted(sound, key=lambda row: -abs(row["predicted"] - row["experiment"]))[:10]
    table = {name: summary(sound, column) for name, column in (("pair", "predicted"), ("GAFF", "gaff"))}
    Console().print(table)
    for row in worst:
        print(f"{row['name']:40s} {row['predicted']:7.2f} +- {row['error']:.2f}, measured {row['experiment']:.2f}")
    for row in rows:
        if "failure" in row:
            print(f"{row['name']}: {row['failure']}")
    if args.split != "test":
        return
    content = {
        "machine": machine(),
        "settings": {
            "ps": args.ps,
            "equilibration_ps": 10.0,
            "frame_ps": 0.5,
            "temperature_K": TEMPERATURE,
            "seed": SEED,
        },
        "table": table,
        "gaff_minus_pair": gain(sound),
        "kernel_ridge": KERNEL_RIDGE,
        "published_pair": PUBLISHED,
        "mean_experimental_uncertainty": round(float(np.mean([row["uncertainty"] for row in sound])), 3),
        "mean_statistical_error": round(float(np.mean([row["error"] for row in sound])), 3),
        "without_figure": [row for row in rows if "failure" in row],
        "worst": [row["name"] for row in worst],
        "rows": sound,
    }
    write("resolv_hydration", content)
    picture(sound, worst)


if __name__ == "__main__":
    main()
