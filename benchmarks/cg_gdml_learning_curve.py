"""How good a free-energy landscape of six-bead alanine becomes with the number of training frames, method by method.

A single GDML model, the two-layer scheme, the reduced-rank fit, a plain network on distances, angles and dihedrals, and
TorchMD-NET's graph network: the same beads, force map, priors, training frames and validation frames for all. Every
model is simulated alike (100 runs of 200 ps, LangevinMiddle, 300 K, 4 fs, half of them started from one basin) and its
landscape compared with the reweighted test trajectories.

Every model and simulation is kept in ``.work/cg_ala2/learning_curve``; started again, the script goes on with what is
missing. It takes about six hours of one core. The frames are subsets of the first
four training trajectories (40,000 frames); a single GDML model of more than 1000 frames does not fit into 4 GB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cg_ala2 import FOLDER, KCAL, Data, floor, load, measures, rounded, simulate
from _common import HERE, machine, write
from rich.console import Console
from rich.table import Table

from openmm_gdml.coarse_grained import CoarseGrainedGDML
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import run_tasks
from openmm_mlff.potentials.family import load_potential, save_potential

SIZES = (300, 1000, 3000, 10_000, 30_000)
METHODS = ("reduced_rank", "mlp", "two_layer", "graph", "single")
NAMES = {
    "single": "single GDML",
    "two_layer": "two-layer GDML",
    "reduced_rank": "reduced-rank GDML",
    "mlp": "MLP (CGnet-like)",
    "graph": "graph network (TorchMD-NET)",
}
VALIDATION_FRAMES = 3000
LARGEST_SINGLE = 1000
PICOSECONDS = 200.0
TRAJECTORIES = {"train": 4, "valid": 1}


def gdml(method: str, size: int, seed: int) -> CoarseGrainedGDML:
    """Grids from which validation frames choose."""
    settings: dict[str, Any] = {
        "reduced_rank": {
            "sigma": [1.0, 2.0], "lam": [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2], "n_inducing": min(250, size // 2),
        },
        "two_layer": {
            "sigma": [1.5, 3.0], "lam": [3e-6, 3e-5, 3e-4, 3e-3], "n_models": 32, "batch_frames": min(300, size // 2),
            "n_second": min(500, size), "second_sigma": 2.0, "second_lam": [1e-8, 1e-7, 1e-6],
        },
        "single": {"sigma": [1.5, 3.0], "lam": [1e-4, 1e-3, 1e-2], "batch_frames": size},
    }[method]  # fmt: skip
    return CoarseGrainedGDML(method, seed=seed, **settings)


def run(task: dict[str, Any], path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: train and simulate one model; what exists is kept."""
    torch.set_num_threads(1)
    data = load(Path(task["data"]), **TRAJECTORIES)
    method, size, seed = task["method"], task["size"], task["seed"]
    folder, name = path.parent, path.stem
    about_path = folder / f"{name}.json"
    # nested subsets: a larger one holds the smaller ones of the same seed
    rows = np.random.default_rng([seed, 17]).permutation(len(data.train))[:size]
    positions, forces = data.train.positions[rows], data.train.forces[rows]
    spaced = np.linspace(0, len(data.valid) - 1, VALIDATION_FRAMES).astype(int)
    validation = (data.valid.positions[spaced], data.valid.forces[spaced])
    if method in ("mlp", "graph"):
        import _cg_networks

        network, about = _cg_networks.train(method, positions, forces, validation, folder / f"{name}.pt", seed)
        potential: Any = _cg_networks.computation(network)
    else:
        stored = folder / f"{name}.safetensors"
        if about_path.exists() and stored.exists():
            potential, about = load_potential(stored), json.loads(about_path.read_text(encoding="utf-8"))
        else:
            estimator = gdml(method, size, seed)
            torsions = data.train.torsions[rows]
            potential = estimator.fit(positions, forces, torsions, validation=validation, numbers=data.map.numbers)
            last = [row for row in estimator.report if row["layer"] == estimator.report[-1]["layer"]]
            about = min(last, key=lambda row: row["validation"]) | {"candidates": len(estimator.report)}
            save_potential(potential, stored)
    write_atomically(about_path, (json.dumps(about) + "\n").encode())
    simulate(data, potential, path, picoseconds=PICOSECONDS, seed=seed + 1)
    return {}


def collect(data: Data, folder: Path) -> dict[str, Any]:
    """Every result that is there, against the test trajectories."""
    reference = data.test.blocks()
    results: dict[str, Any] = {}
    for method in METHODS:
        for size in SIZES:
            rows = []
            for path in sorted(folder.glob(f"{method}_{size}_*.npz")):
                simulated = simulate(data, None, path)
                about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                row = {
                    "seed": int(path.stem.split("_")[-1]),
                    "force_mse": about["validation"] / KCAL**2,
                    "stopped": simulated.stopped,
                    "flips": simulated.flips,
                }
                if simulated.stopped is None:
                    row |= measures(simulated.blocks(), reference)
                rows.append(row)
            if rows:
                results.setdefault(method, {})[str(size)] = rows
    return {"methods": results, "floor": floor(reference)}


def draw(collected: dict[str, Any], path: Path) -> None:
    """Mean over seeds, bars from the least to the largest."""
    from matplotlib.figure import Figure

    styles = {"single": ("#777777", "s"), "two_layer": ("#2b6ca3", "o"), "reduced_rank": ("#d9772b", "D"),
              "mlp": ("#3a8f5c", "^"), "graph": ("#8c4fa8", "v")}  # fmt: skip
    figure = Figure(figsize=(12.0, 4.3), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {
        "mse_weighted": "free-energy error (kT²)",
        "js": "Jensen-Shannon divergence (nats)",
        "force_mse": "force error on validation frames (kcal/mol/Å)²",
    }
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        for shift, method in enumerate(("single", "two_layer", "reduced_rank", "mlp", "graph")):
            points = []
            for size, rows in collected["methods"].get(method, {}).items():
                found = [row[quantity] for row in rows if quantity in row]
                values = [v["value"] if isinstance(v, dict) else v for v in found]
                if values:
                    points.append((int(size) * 1.05 ** (shift - 2), np.mean(values), min(values), max(values)))
            if points:
                x, mean, low, high = np.array(sorted(points)).T
                color, marker = styles[method]
                axes.errorbar(x, mean, [mean - low, high - mean], color=color, marker=marker, ms=5, lw=1.4,
                              capsize=2, label=NAMES[method])  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axes.minorticks_off()
        if quantity != "force_mse":
            axes.set_yscale("log")
        axes.set_xlabel("training frames")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity in collected["floor"]:
            level = collected["floor"][quantity]["value"]
            axes.axhline(level, color="black", lw=0.8, ls=":")
            axes.text(SIZES[0] * 0.85, level * 1.06, "half of the reference against the other", fontsize=7.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def show(collected: dict[str, Any]) -> None:
    table = Table("method", "frames", "seeds", "force MSE", "free-energy MSE [kT²]", "JS [nats]", "phi > 0", "stopped")
    for method, sizes in collected["methods"].items():
        for size, rows in sizes.items():
            good = [row for row in rows if row["stopped"] is None]
            cells = [" ".join(f"{row[q]['value']:.3g}" for row in good) for q in ("mse_weighted", "js", "phi_positive")]
            mse = " ".join(f"{row['force_mse']:.2f}" for row in rows)
            table.add_row(NAMES[method], size, str(len(rows)), mse, *cells, str(len(rows) - len(good)))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--collect", action="store_true", help="only read what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load(arguments.data, **TRAJECTORIES)
    folder = arguments.data / "learning_curve"
    folder.mkdir(exist_ok=True)
    if not arguments.collect:
        tasks = {
            f"{method}_{size}_{seed}": {"method": method, "size": size, "seed": seed, "data": str(arguments.data)}
            for seed in arguments.seeds
            for method in arguments.methods
            for size in arguments.sizes
            if method != "single" or size <= LARGEST_SINGLE
        }
        outcome = run_tasks(
            tasks, run, folder, log=folder / "failures.jsonl", suffix=".npz", processes=arguments.processes,
            title="models",
        )  # fmt: skip
        for name, error in outcome.failed.items():
            print(f"{name}: {error}")
    collected = collect(data, folder)
    show(collected)
    draw(collected, HERE / "cg_gdml_learning_curve.png")
    result = {"what": __doc__, "machine": machine(), "data": data.description, **collected}
    write("cg_gdml_learning_curve", rounded(result))


if __name__ == "__main__":
    main()
