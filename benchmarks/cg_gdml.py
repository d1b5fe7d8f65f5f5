"""Coarse-grained GDML of six-bead alanine: from all-atom data to a free-energy landscape with error bars, three seeds.

Stages, each of which goes on where it was stopped (everything is kept in ``.work/cg_ala2``):

1. data: all-atom trajectories (`cg_gdml_data.py`), split by trajectory;
2. select: sigma of the reduced-rank fit by validation frames, on a part of the training frames;
3. final: for each seed a reduced-rank model (the seed draws its regressors) on all training frames, simulated as 100
   runs of 5 ns, half of which start from one basin; and a two-layer model of the same frames, 100 runs of 1 ns;
4. compare: landscapes against the reweighted test trajectories, which nothing else has seen.

Intervals (95 %) come from resampling runs and reference blocks, and over the seeds from Student's t. About 2 hours on
four cores, a third of it for the data.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cg_ala2 import (
    CHIRAL,
    FOLDER,
    KCAL,
    TEMPERATURE,
    Data,
    bead_system,
    check_handedness,
    floor,
    load,
    measures,
    rounded,
    starts,
)
from _common import HERE, machine, write
from rich.console import Console
from rich.table import Table

from openmm_gdml.coarse_grained import CoarseGrainedGDML
from openmm_gdml.model import GDMLPotential
from openmm_mlff.analysis import landscapes
from openmm_mlff.analysis.landscapes import Sample
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import run_tasks
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.sampling.replica_files import read_observables, read_positions
from openmm_mlff.sampling.replica_runs import ReplicaRun
from openmm_mlff.sampling.replica_settings import ReplicaSettings
from openmm_mlff.sampling.replicas import ReplicaFrame
from openmm_mlff.units import ANGSTROM_PER_NM

RUNS, TIMESTEP, FRICTION = 100, 4.0, 2.0
NANOSECONDS = {"reduced_rank": 5.0, "two_layer": 1.0}
LABELS = {"reduced_rank": "reduced rank", "two_layer": "two layers"}
SIGMAS, LAMS = [1.0, 1.5, 2.0, 3.0], [1e-7, 1e-6, 1e-5, 1e-4, 1e-3]
N_INDUCING = 250
SELECTION_FRAMES, VALIDATION_FRAMES = 20_000, 10_000
#: kT, of the picture
HIGHEST = 8.0
#: first part of every run, not counted
EQUILIBRATION = 0.1


def validation_of(data: Data, n: int = VALIDATION_FRAMES) -> tuple[np.ndarray, np.ndarray]:
    rows = np.linspace(0, len(data.valid) - 1, min(n, len(data.valid))).astype(int)
    return data.valid.positions[rows], data.valid.forces[rows]


def select(data: Data, path: Path) -> dict[str, Any]:
    """The sigma with the least error on validation frames, and every candidate."""
    if not path.exists():
        rows = np.random.default_rng(0).permutation(len(data.train))[:SELECTION_FRAMES]
        estimator = CoarseGrainedGDML(sigma=SIGMAS, lam=LAMS, n_inducing=150)
        train = data.train
        model = estimator.fit(
            train.positions[rows], train.forces[rows], train.torsions[rows], validation=validation_of(data)
        )
        zero = float(np.mean(validation_of(data)[1] ** 2))
        chosen = {"sigma": model.config.sigma, "priors_only": zero, "candidates": estimator.report}
        write_atomically(path, (json.dumps(chosen, indent=1) + "\n").encode())
    return json.loads(path.read_text(encoding="utf-8"))


def fit(data: Data, method: str, sigma: float, seed: int, folder: Path) -> Potential:
    """The model of one seed; made if it is not there."""
    path = folder / "model.safetensors"
    if path.exists():
        return load_potential(path)
    grids: dict[str, Any] = {
        "reduced_rank": {"sigma": sigma, "lam": LAMS, "n_inducing": N_INDUCING},
        "two_layer": {
            "sigma": [1.5, 3.0], "lam": [3e-6, 3e-5, 3e-4], "n_models": 64, "batch_frames": 300,
            "n_second": 700, "second_sigma": 2.0, "second_lam": [1e-8, 1e-7, 1e-6],
        },
    }[method]  # fmt: skip
    estimator = CoarseGrainedGDML(method, seed=seed, **grids)
    start = time.perf_counter()
    model = estimator.fit(
        data.train.positions,
        data.train.forces,
        data.train.torsions,
        validation=validation_of(data),
        numbers=data.map.numbers,
        beads=data.map.names,
        folder=folder if method == "reduced_rank" else None,
    )
    about = {"seconds": time.perf_counter() - start, "candidates": estimator.report}
    write_atomically(folder / "fit.json", (json.dumps(about, indent=1) + "\n").encode())
    save_potential(model, path, priors=data.priors.to_dict(), training={"frames": len(data.train)})
    return model


def handedness(frame: ReplicaFrame) -> np.ndarray:
    return landscapes.chiral_volume(frame.positions, CHIRAL)


def run_seed(task: dict[str, Any], path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: fit and simulate one seed of one method."""
    torch.set_num_threads(1)
    data = load(Path(task["data"]))
    method, seed, folder = task["method"], task["seed"], path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    fit(data, method, task["sigma"], seed, folder)
    observables = {"handedness": handedness}
    start, cpu = time.perf_counter(), time.process_time()
    if (folder / "run" / "run.json").exists():
        run = ReplicaRun.resume(folder / "run", observables=observables, progress=False)
    else:
        settings = ReplicaSettings(
            n=RUNS,
            steps=round(task["nanoseconds"] * 1e6 / TIMESTEP),
            timestep=TIMESTEP,
            temperature=TEMPERATURE,
            friction=FRICTION,
            report_interval=250,
            frame_interval=12_500,
            checkpoint_interval=25_000,
            seed=seed + 1,
            platform="Reference",
        )
        system = bead_system(data, folder / "model.safetensors")
        positions = starts(data, RUNS, seed + 1)
        run = ReplicaRun.start(
            system, data.topology, positions, settings, folder / "run", observables=observables, progress=False
        )
    result = run.run()
    if not result.finished:
        raise KeyboardInterrupt
    about = {
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "step_us": 1e6 * RUNS / result.steps_per_second,
    }
    write_atomically(path, (json.dumps(about) + "\n").encode())
    return {}


def blocks_of(folder: Path) -> list[Sample]:
    table = read_observables(folder)
    kept = slice(int(EQUILIBRATION * len(table["phi"])), None)
    return [Sample(table["phi"][kept, k], table["psi"][kept, k]) for k in range(table["phi"].shape[1])]


def one_basin_first(blocks: list[Sample]) -> dict[str, Any]:
    """Shares of the alpha-R region in runs that started in one basin, and in those that started in equilibrium."""

    def alpha(phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
        return (phi < 0) & (psi > -125) & (psi < 50)

    half = len(blocks) // 2
    found = [landscapes.population(part, alpha) for part in (blocks[:half], blocks[half:])]
    return {name: {"value": p.value, "error": p.error} for name, p in zip(("one_basin", "all"), found, strict=True)}


def evaluate(data: Data, method: str, seed: int, folder: Path) -> tuple[dict[str, Any], list[Sample]]:
    """All figures of one seed."""
    run = folder / "run"
    blocks = blocks_of(run)
    table = read_observables(run)
    about = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    candidates = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    last = [c for c in candidates["candidates"] if c["layer"] == candidates["candidates"][-1]["layer"]]
    best = min(last, key=lambda c: c["validation"])
    times = {name: landscapes.decorrelation_time(list(table[name].T), 1.0) for name in ("phi", "psi")}
    simulated = table["phi"].shape[1] * float(table["time_ps"][-1])
    hours = simulated * about["step_us"] * 1e-6 / (TIMESTEP * 1e-3) / RUNS / 3600
    result = {
        "seed": seed,
        "fit": {"seconds": candidates["seconds"], "points": best["points"], "sigma": best["sigma"], "lam": best["lam"]},
        "force_mse_kcal": best["validation"] / KCAL**2,
        **measures(blocks, data.test.blocks()),
        "validation_landscape": measures(blocks, data.valid.blocks()),
        "alpha_R": one_basin_first(blocks),
        "flips": int((table["handedness"] < 0).any(0).sum()),
        "least_chiral_volume": float(table["handedness"].min()),
        "geometry": geometry(data, run),
        "ns": simulated * 1e-3,
        "step_us": about["step_us"],
        "ns_per_day": simulated * 1e-3 / hours * 24,
        "decorrelation_ps": times,
        "decorrelations_per_cpu_hour": {name: simulated / t / hours for name, t in times.items()},
    }
    return result, blocks


def geometry(data: Data, run: Path) -> dict[str, list[float]]:
    """Means of bonds (angstrom) and angles (degrees) less those of the reweighted test trajectories."""
    priors = data.priors
    positions = read_positions(run) * ANGSTROM_PER_NM
    positions = positions[len(positions) // 10 :].reshape(-1, len(data.map), 3)

    def internal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        i, j = priors.bonds.T
        a, b, c = priors.angles.T
        u, v = x[:, a] - x[:, b], x[:, c] - x[:, b]
        cosine = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
        return np.linalg.norm(x[:, i] - x[:, j], axis=-1), np.degrees(np.arccos(cosine))

    simulated = internal(positions)
    reference = internal(data.test.positions)
    difference = [
        s.mean(0) - np.average(r, axis=0, weights=data.test.weights) for s, r in zip(simulated, reference, strict=True)
    ]
    return {"bonds_angstrom": difference[0].tolist(), "angles_degrees": difference[1].tolist()}


def mirror(data: Data, model: GDMLPotential) -> dict[str, Any]:
    """The energy cannot tell a mirror image, so the check at the start has to."""
    r = torch.from_numpy(data.test.positions[:100])
    flipped = r * torch.tensor([1.0, 1.0, -1.0])
    difference = (model.energies_and_forces(flipped)[0] - model.energies_and_forces(r)[0]).abs().max()
    try:
        check_handedness(flipped.numpy())
    except ValueError as error:
        return {"energy_difference_eV": float(difference), "refused": str(error)}
    raise RuntimeError("a mirror-image start was accepted")


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds with its 95 % interval (Student's t)."""
    from scipy.stats import t

    found = {}
    for name in ("mse_weighted", "mse", "js", "kl", "phi_positive"):
        values = np.array([row[name]["value"] for row in rows])
        half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))) if len(rows) > 1 else 0
        found[name] = {
            "mean": float(values.mean()),
            "low": float(values.mean() - half),
            "high": float(values.mean() + half),
        }
    return found


def draw(panels: dict[str, list[Sample]], path: Path) -> None:
    """Free-energy landscapes side by side, all on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * len(panels) + 0.7, 3.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    edges = np.linspace(-180, 180, landscapes.BINS + 1)
    for axes, (title, blocks) in zip(all_axes, panels.items(), strict=True):
        p = landscapes.histogram(blocks).probability
        with np.errstate(divide="ignore"):
            energy = -np.log(p)
        energy -= energy[np.isfinite(energy)].min()
        # white is where nothing was found, or above the scale: the biased reference reaches much higher than a run
        image = axes.pcolormesh(
            edges, edges, np.ma.masked_greater(energy, HIGHEST).T, cmap="viridis", vmin=0, vmax=HIGHEST
        )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("φ (°)")
        axes.set_aspect("equal")
        axes.set_xticks([-180, -90, 0, 90, 180])
        axes.set_yticks([-180, -90, 0, 90, 180])
    all_axes[0].set_ylabel("ψ (°)")
    figure.colorbar(image, ax=all_axes, label="free energy (kT)", shrink=0.85)
    figure.savefig(path, dpi=150)


def show(result: dict[str, Any]) -> None:
    table = Table("model", "seed", "force MSE", "FE MSE [kT²]", "95 %", "JS [nats]", "95 %", "phi > 0 [%]", "flips")

    def row(label: str, seed: str, r: dict[str, Any], force: str = "", flips: str = "") -> None:
        cells = [
            f"{r['mse_weighted']['value']:.3f}",
            f"{r['mse_weighted']['low']:.3f} .. {r['mse_weighted']['high']:.3f}",
        ]
        cells += [f"{r['js']['value']:.4f}", f"{r['js']['low']:.4f} .. {r['js']['high']:.4f}"]
        p = r["phi_positive"]
        table.add_row(label, seed, force, *cells, f"{100 * p['value']:.2f} ± {100 * p['error']:.2f}", flips)

    for method, found in result["methods"].items():
        for r in found["seeds"]:
            row(LABELS[method], str(r["seed"]), r, f"{r['force_mse_kcal']:.2f}", str(r["flips"]))
    row("half of the reference", "", result["floor"])
    Console().print(table)


def compare(data: Data, folder: Path, selection: dict[str, Any]) -> dict[str, Any]:
    reference = data.test.blocks()
    result: dict[str, Any] = {"methods": {}, "floor": floor(reference)}
    panels = {"all-atom reference": reference}
    for method in NANOSECONDS:
        rows = []
        for path in sorted(folder.glob(f"{method}_*.json")):
            row, blocks = evaluate(data, method, int(path.stem.rsplit("_", 1)[1]), path.with_suffix(""))
            rows.append(row)
            panels.setdefault(LABELS[method], []).extend(blocks)
        if rows:
            result["methods"][method] = {"seeds": rows, "over_seeds": over_seeds(rows)}
    first = load_potential(folder / "reduced_rank_0" / "model.safetensors")
    assert isinstance(first, GDMLPotential)
    result["mirror_image"] = mirror(data, first)
    result["selection"] = [{**c, "validation": c["validation"] / KCAL**2} for c in selection["candidates"]] + [
        {"layer": "priors only", "validation": selection["priors_only"] / KCAL**2}
    ]
    draw(panels, HERE / "cg_gdml.png")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(NANOSECONDS), choices=list(NANOSECONDS))
    parser.add_argument(
        "--nanoseconds", type=float, help="of every run, instead of 5 (reduced rank) and 1 (two layers)"
    )
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument(
        "--stages", nargs="+", default=["data", "final", "compare"], choices=["data", "final", "compare"]
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "data" in arguments.stages:
        from cg_gdml_data import RECIPE

        from openmm_mlff.sampling.biased_recipes import read_biased_recipe, sample_biased

        sample_biased(read_biased_recipe(RECIPE), arguments.data, arguments.processes + 1)
    data = load(arguments.data)
    folder = arguments.data / "final"
    folder.mkdir(exist_ok=True)
    selection = select(data, folder / "selection.json")
    if "final" in arguments.stages:
        tasks = {
            f"{method}_{seed}": {
                "method": method,
                "seed": seed,
                "sigma": selection["sigma"],
                "data": str(arguments.data),
                "nanoseconds": arguments.nanoseconds or NANOSECONDS[method],
            }
            for method in arguments.methods
            for seed in range(arguments.seeds)
        }
        outcome = run_tasks(
            tasks, run_seed, folder, log=folder / "failures.jsonl", suffix=".json",
            processes=arguments.processes, title="models",
        )  # fmt: skip
        if outcome.failed:
            raise SystemExit(f"{next(iter(outcome.failed.items()))}; see failures.jsonl in {folder.name}")
    if "compare" in arguments.stages:
        result = {"what": __doc__, "machine": machine(), "data": data.description, **compare(data, folder, selection)}
        show(result)
        write("cg_gdml", rounded(result))


if __name__ == "__main__":
    main()
