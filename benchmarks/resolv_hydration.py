"""Hydration free energies of molecules that the water potential has not seen, by Bennett's acceptance ratio.

    python benchmarks/resolv_hydration.py [--water .work/resolv/water_fused2/water.safetensors] [--processes 4]

The 170 test molecules of the ReSolv split, in an order drawn by a seed before any training; as many of them as there is
time for. Each is simulated in vacuum and in water by Langevin dynamics of our own (298.15 K, 1 fs, 1/ps) from the
conformer of least vacuum energy among eight, and one BAR estimate between the two ensembles is its free energy (what
``openmm-mlff hydration`` does); errors count correlated frames. A molecule that breaks for good, or whose ensembles do
not overlap, is named and has no figure. The first 128 were the test of an earlier pair, whose errors told what to mend;
the other 42 nobody had looked at, and they have a table of their own. The folder of a pair goes on where it stopped,
with more molecules or more ps.

Beside it: GAFF in TIP3P of FreeSolv, kernel ridge regression on pair histograms (0.595 / 1.176 kcal/mol on 161 of
these molecules, facts of the project) and the mean experimental uncertainty.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from _common import HERE, machine, write
from _resolv import FOLDER, SEED, TEMPERATURE, Molecule, molecules
from resolv_water import starts, vacuum_folder
from rich.console import Console

from openmm_mlff.data.solutes import Solute
from openmm_mlff.sampling.hydration import HydrationSettings, Outcome, hydrate
from openmm_mlff.sampling.hydration_runs import PairFiles
from openmm_mlff.sampling.molecule_runs import LangevinSettings
from openmm_mlff.training.run import MODEL
from openmm_mlff.training.solvation import BEST

#: molecules in one simulation at most; fewer where processes would have nothing to do
GROUP = 32
#: of the drawn order: the test of an earlier pair
SEEN = 128
#: of what is compared: kernel ridge regression of averaged pair-distance histograms, 161 molecules (kcal/mol)
KERNEL_RIDGE = {"mae": 0.595, "rmse": 1.176, "molecules": 161}
#: <U_wat>_wat - <U_vac>_vac of the published potentials over their authors' long runs: dA + T dS, not dA
PUBLISHED = {"mae": 0.429, "rmse": 0.561, "molecules": 24}


def order() -> list[Molecule]:
    """The test molecules in the order in which they are simulated."""
    test = [m for m in molecules() if m.split == "test"]
    return [test[i] for i in np.random.default_rng(SEED).permutation(len(test))]


def outcomes(
    chosen: list[Molecule], trained: Path, water: Path, place: Path, ps: float, processes: int
) -> list[Outcome]:
    """Every molecule in vacuum and in water, in a folder of the two potentials that is gone on with."""
    sampling = LangevinSettings(
        temperature=TEMPERATURE,
        equilibration=10.0,
        length=ps,
        interval=0.5,
        minimization_steps=100,
        seed=SEED,
        batch=max(min(GROUP, -(-len(chosen) // (2 * processes))), 1),
    )
    solutes = [
        Solute(m.key, (start,), m.smiles, m.experiment, label=m.name)
        for m, start in zip(chosen, starts(chosen, trained), strict=True)
    ]
    pair = PairFiles.read(vacuum=trained / MODEL, water=water)
    folder = place / f"{trained.name}-{water.parent.name}"
    return hydrate(
        solutes, pair, HydrationSettings(sampling, precision="single"), folder, processes=processes, progress=True
    )


def row_of(molecule: Molecule, outcome: Outcome) -> dict[str, Any]:
    """One molecule: free energy in kcal/mol with its error and overlap, or the reason why there is none."""
    row: dict[str, Any] = {
        "name": molecule.name,
        "smiles": molecule.smiles,
        "experiment": molecule.experiment,
        "uncertainty": molecule.uncertainty,
        "gaff": molecule.gaff,
    }
    if outcome.result is None:
        return row | {"failure": outcome.message}
    found = outcome.result.summary()
    row |= {
        "predicted": round(found["free_energy_kcal_mol"], 3),
        "error": round(found["error_kcal_mol"], 3),
        "overlap": round(found["overlap"], 3),
        "effective_share": [round(found[name], 3) for name in ("effective_vacuum", "effective_water")],
    }
    return row | ({"restarted": outcome.message} if outcome.status == "restarted" else {})


def summary(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    """MAE and RMSE (kcal/mol) with standard errors by bootstrap over molecules, and the median of absolute errors."""
    apart = np.array([row[column] - row["experiment"] for row in rows])
    draws = np.random.default_rng(1).integers(0, len(apart), (2000, len(apart)))
    maes, rmses = np.abs(apart[draws]).mean(axis=1), np.sqrt((apart[draws] ** 2).mean(axis=1))
    return {
        "mae": round(float(np.abs(apart).mean()), 3),
        "mae_error": round(float(maes.std()), 3),
        "rmse": round(float(np.sqrt((apart**2).mean())), 3),
        "rmse_error": round(float(rmses.std()), 3),
        "mean_error": round(float(apart.mean()), 3),
        "median_error": round(float(np.median(np.abs(apart))), 3),
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
    parser.add_argument("--water", type=Path, default=FOLDER / "water_fused2" / BEST, help="the water potential")
    parser.add_argument("--vacuum", type=Path, help="folder of the vacuum training (default: the chosen one)")
    parser.add_argument("--molecules", type=int, default=170, help="how many, in the drawn order")
    parser.add_argument("--split", choices=("test", "valid"), default="test", help="valid: to choose between trainings")
    parser.add_argument("--ps", type=float, default=100.0)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    trained = args.vacuum or vacuum_folder()
    chosen = order() if args.split == "test" else [m for m in molecules() if m.split == "valid"]
    chosen = chosen[: args.molecules]
    place = FOLDER / f"hydration_{args.split}"
    found = outcomes(chosen, trained, args.water, place, args.ps, args.processes)
    rows = [row_of(m, outcome) for m, outcome in zip(chosen, found, strict=True)]
    sound = [row for row in rows if "failure" not in row]
    worst = sorted(sound, key=lambda row: -abs(row["predicted"] - row["experiment"]))[:10]
    table = {name: summary(sound, column) for name, column in (("pair", "predicted"), ("GAFF", "gaff"))}
    fresh = [row for row in rows[SEEN:] if "failure" not in row]
    if fresh and args.split == "test":
        table |= {
            f"{name}, fresh": summary(fresh, column) for name, column in (("pair", "predicted"), ("GAFF", "gaff"))
        }
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
