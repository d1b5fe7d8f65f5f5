"""Whether an ensemble stops a run that leaves its domain, before energies mean nothing, and leaves others alone.

    python benchmarks/ensemble_guard.py [--parts train run figure] [--ps 200]

* Data: 2000 frames of ethanol by GFN2-xTB at 500 K (shared data set), dealt in pieces of 50 frames by a seed. Four
  small SO3krates networks are trained on 500 of them from different seeds (`openmm-mlff train --members 4`).
* Limit: twice the largest uncertainty of a force among the 200 validation frames, as `openmm-mlff calibrate` sets it.
  (With 1.5 times, the first choice here, one of the 400,000 steps of a run at 300 K went beyond it, after 166 ps; the
  runs below have other random numbers.) Test frames are used once: error of the forces, and how it goes with the
  uncertainty (Spearman, atom by atom).
* Runs, Langevin, 0.5 fs: two at 300 K for `--ps` ps, which must not be stopped; six heated to 2000 K; the
  O-H and the C-O bond pulled apart by 0.02 angstrom per 10 fs. Each of these is made twice with the same random
  numbers: without a guard, with GFN2-xTB asked about frames along the way, and with on_uncertain='stop'.
* `stopped`: when the guard ended the run, and the error of the energy there (against GFN2-xTB, less the mean
  difference of the validation frames). `wrong`: when that error first exceeded 0.5 eV in the run without a guard.

Trainings and runs are kept in the work folder, and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from _common import HERE, SHARED, machine, write
from _guard_runs import Case, Run, Setting, compared, in_time, pair_of_runs, reference, without_rows
from scipy.stats import spearmanr

from openmm_mlff.data.datasets import Dataset, split_by_group, write_dataset
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.formats import read_sgdml_npz
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.training.members import train_members
from openmm_mlff.training.recipe import Recipe
from openmm_mlff.training.run import MODEL

PARTS = ("train", "run", "figure")
SEED, BLOCK, MEMBERS = 1, 50, 4
FRACTIONS = {"train": 0.25, "valid": 0.1, "test": 0.65}
#: of the largest uncertainty among the validation frames
MARGIN = 2.0
TIMESTEP, LOOK = 0.5, 20
HOT, HOT_RUNS, HOT_PS = 2000.0, 6, 2.0
CALM_SEEDS = (41, 42)
BONDS = {"O-H": (2, 8), "C-O": (1, 2)}

NETWORK: dict[str, Any] = {
    "num_layers": 2,
    "num_features": 32,
    "num_heads": 2,
    "degrees": [1, 2],
    "cutoff": 5.0,
    "initial_euclidean": "neighbors",
    "message_normalization": "sqrt_num_features",
    "avg_num_neighbors": 8.0,
    "elements": [1, 6, 8],
    "charges": [0],
    "multiplicities": [1],
} | dict.fromkeys(
    (
        "use_charge_embed",
        "use_spin_embed",
        "use_zbl_repulsion",
        "use_electrostatics",
        "use_dispersion",
        "predict_charges",
        "predict_hirshfeld",
    ),
    False,
)
RECIPE: dict[str, Any] = {
    "family": "so3krates",
    "seed": SEED,
    "batch_size": 8,
    "threads": 1,
    "model": NETWORK,
    "loss": {"energy": 0.05, "forces": 1.0},
    "loop": {
        "steps": 1500,
        "learning_rate": 3e-3,
        "final_learning_rate": 1e-5,
        "warmup_steps": 100,
        "schedule": "cosine",
        "clip_norm": 10.0,
        "ema_decay": 0.99,
        "validate_every": 250,
    },
}


# -- data and training -------------------------------------------------------------------------------------------


def dataset(work: Path) -> Dataset:
    """The shared frames with what each is meant for; written on the first call."""
    folder = work / "data"
    if (folder / "card.json").exists():
        return Dataset(folder)
    source = SHARED / "data" / "gdml" / "dataset_ethanol.npz"
    if not source.exists():
        raise SystemExit("no gdml/dataset_ethanol.npz among the shared data; OPENMM_MLFF_SHARED names that folder")
    frames = read_sgdml_npz(source)
    runs = np.load(source, allow_pickle=False)["traj_id"].tolist()
    groups = [f"run{run}-{k // BLOCK:02d}" for k, run in enumerate(runs)]
    dealt = split_by_group(groups, FRACTIONS, SEED)
    meant = {group: name for name, members in dealt.items() for group in members}
    structures = [s.replace(group=g, info={"split": meant[g]}) for s, g in zip(frames, groups, strict=True)]
    return write_dataset(folder, structures, name="ethanol", method={"name": "GFN2-xTB"}, sampling={"seed": SEED})


def splits(work: Path) -> dict[str, list[Structure]]:
    structures = dataset(work).load()
    return {name: [s for s in structures if s.info["split"] == name] for name in FRACTIONS}


def fit(work: Path) -> None:
    resume = (work / "members" / "members.json").exists()
    recipe = None if resume else Recipe.from_dict(RECIPE)
    train_members(recipe, [dataset(work).path], work / "members", None if resume else MEMBERS, resume, progress=False)


# -- uncertainty against error ---------------------------------------------------------------------------------------


def evaluated(work: Path, structures: list[Structure]) -> dict[str, np.ndarray]:
    """Errors of energies (eV, ``(n,)``) and forces (norms, eV/angstrom, ``(n, n_atoms)``), and their uncertainties."""
    model = load_potential(work / "members" / MODEL)
    evaluator = model.evaluator(structures[0], compile=True)
    rows: dict[str, list[Any]] = {name: [] for name in ("energy", "forces", "energy_spread", "force_spread")}
    for s in structures:
        energies, forces = evaluator.arrays(s.positions)
        assert evaluator.spreads is not None
        rows["energy"].append(float(energies[0]) - (s.energy or 0.0))
        rows["forces"].append(np.linalg.norm(forces - s.forces, axis=1))
        rows["energy_spread"].append(evaluator.spreads[0][0])
        rows["force_spread"].append(evaluator.spreads[1])
    return {name: np.array(values) for name, values in rows.items()}


def shift_of(work: Path, structures: list[Structure]) -> float:
    """Mean difference of energies from GFN2-xTB's as `reference` gives them, eV; the data's have another zero."""
    model = load_potential(work / "members" / MODEL)
    truth = np.concatenate([reference(TBLite(), s, [s.positions]) for s in structures])
    return float(np.mean(np.array([model.energy_and_forces(s)[0] for s in structures]) - truth))


# -- runs --------------------------------------------------------------------------------------------------------


def setting_of(work: Path, limit: float) -> Setting:
    return Setting(work / "members" / MODEL, limit, TIMESTEP, LOOK, compile=True)


def driven_out(setting: Setting, case: Case) -> dict[str, Any]:
    """The run without a guard beside GFN2-xTB, and the same run with one."""
    free, guarded = pair_of_runs(setting, case)
    error = np.array(free.record["energy"]) - reference(TBLite(), case.start, free.frames) - case.shift
    result = compared(case, setting.limit, free, guarded, error)
    print(json.dumps(without_rows([result])[0]), flush=True)
    return result


def measure(work: Path, ps: float) -> dict[str, Any]:
    frames = splits(work)
    valid = evaluated(work, frames["valid"])
    limit = round(MARGIN * float(valid["force_spread"].max()), 4)
    shift = shift_of(work, frames["valid"][::5])
    test = evaluated(work, frames["test"])
    result: dict[str, Any] = {
        "limit_eV_A": limit,
        "largest_validation_uncertainty_eV_A": round(float(valid["force_spread"].max()), 4),
        "test": {
            "frames": len(test["energy"]),
            "force_error_mean_norm_eV_A": round(float(test["forces"].mean()), 4),
            "mean_force_spread_eV_A": round(float(test["force_spread"].mean()), 4),
            "spearman_force_atoms": round(float(spearmanr(test["force_spread"].ravel(), test["forces"].ravel())[0]), 3),
            "frames_beyond_limit": int((test["force_spread"].max(axis=1) > limit).sum()),
        },
    }
    print(json.dumps(result), flush=True)
    setting, start = setting_of(work, limit), frames["test"][0]
    runs = []
    for name, temperature, seed, length, pulled in [
        *[(f"{HOT:g} K, {k + 1}", HOT, 11 + k, HOT_PS, None) for k in range(HOT_RUNS)],
        *[(f"{bond} pulled", 300.0, 21, 0.75, atoms) for bond, atoms in BONDS.items()],
    ]:
        path = work / f"run-{name.replace(' ', '-').replace(',', '')}.json"
        if not path.exists():
            begin = frames["test"][(97 * seed) % len(frames["test"])] if pulled is None else start
            found = driven_out(setting, Case(name, begin, temperature, seed, length, shift, pulled, BONDS["O-H"]))
            write_atomically(path, json.dumps(found).encode())
        runs.append(json.loads(path.read_text(encoding="utf-8")))
    result["in_domain"] = [
        calm_run(work, setting, frames["test"][200 * k], seed, ps, shift) for k, seed in enumerate(CALM_SEEDS)
    ]
    result["runs"] = runs
    return result


def calm_run(work: Path, setting: Setting, start: Structure, seed: int, ps: float, shift: float) -> dict[str, Any]:
    """A guarded run at 300 K, with the error of the energy of 200 frames of it."""
    path = work / f"run-300K-{ps:g}ps-{seed}.json"
    if not path.exists():
        calm = Run(setting, start, 300.0, seed, guarded=True).go(ps)
        some = slice(None, None, max(1, len(calm.frames) // 200))
        truth = reference(TBLite(), start, calm.frames[some])
        error = np.abs(np.array(calm.record["energy"])[some] - truth - shift)
        found = {
            "seed": seed,
            "ps": round(calm.record["ps"][-1], 3),
            "stopped": calm.stopped,
            "largest_uncertainty_eV_A": round(max(calm.record["uncertainty"]), 4),
            "energy_error_mean_eV": round(float(error.mean()), 4),
            "largest_energy_error_eV": round(float(error.max()), 4),
            "rows": {"ps": calm.record["ps"][::10], "uncertainty": calm.record["uncertainty"][::10]},
        }
        write_atomically(path, json.dumps(found).encode())
        print(json.dumps({k: v for k, v in found.items() if k != "rows"}), flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def summary_of(result: dict[str, Any]) -> dict[str, Any]:
    """Without the rows, which are in the picture."""
    short = {k: v for k, v in result.items() if k not in ("runs", "in_domain")}
    short["in_domain"], short["runs"] = without_rows(result["in_domain"]), without_rows(result["runs"])
    hot = [run for run in result["runs"] if run["temperature"] == HOT]
    late = [r["name"] for r in result["runs"] if r["wrong_ps"] is not None and not in_time(r)]
    short["summary"] = {
        "hot_runs_stopped": sum(run["stopped_ps"] is not None for run in hot),
        "hot_runs": len(hot),
        "stopped_after_the_energy_was_wrong": late,
        "in_domain_stopped": sum(run["stopped"] is not None for run in result["in_domain"]),
    }
    return short


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for run, color in zip(result["in_domain"], ("#1f5fa8", "#9cc3e8"), strict=True):
        axes[0].plot(run["rows"]["ps"], run["rows"]["uncertainty"], color=color, lw=0.4)
    stopped = sum(run["stopped"] is not None for run in result["in_domain"])
    axes[0].set(
        title=f"300 K: {stopped} of {len(result['in_domain'])} runs stopped",
        xlabel="time (ps)",
        ylim=(0, 1.1 * result["limit_eV_A"]),
    )
    axes[0].set_ylabel("largest force uncertainty (eV/Å)")
    hot = [run for run in result["runs"] if run["temperature"] == HOT]
    pulled = [run for run in result["runs"] if run["temperature"] != HOT]
    for run in hot:
        axes[1].plot(run["rows"]["ps"], run["rows"]["uncertainty"], color="#b5472f", lw=0.5, alpha=0.6)
        if run["stopped_ps"] is not None:
            axes[1].plot([run["stopped_ps"]], [result["limit_eV_A"]], "o", color="black", ms=4, zorder=3)
    stopped = sum(run["stopped_ps"] is not None for run in hot)
    axes[1].set(title=f"{HOT:g} K: {stopped} of {len(hot)} runs stopped (dots)", xlabel="time (ps)", yscale="log")
    for run, color in zip(pulled, ("#5a8f3c", "#8a5fa8"), strict=True):
        rows = run["rows"]
        ps = np.array(rows["ps"])
        axes[2].plot(ps, rows["uncertainty"], color=color, lw=1, label=run["name"])
        axes[2].plot(
            ps, np.abs(np.array(rows["error"], dtype=float)), color=color, lw=1, ls=":", label="its energy error (eV)"
        )
        if run["stopped_ps"] is not None:
            axes[2].plot([run["stopped_ps"]], [result["limit_eV_A"]], "o", color="black", ms=4, zorder=3)
    axes[2].set(title="bonds pulled by 2 Å/ps", xlabel="time (ps)", yscale="log")
    axes[2].legend(frameon=False, fontsize=8, loc="lower right")
    for axis in axes:
        axis.axhline(result["limit_eV_A"], color="black", lw=0.8, ls="--")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, default=HERE.parent / ".work" / "ensemble_guard")
    parser.add_argument("--ps", type=float, default=200.0, help="of the run at 300 K")
    arguments = parser.parse_args()
    work = arguments.work
    if "train" in arguments.parts:
        fit(work)
    if "run" in arguments.parts:
        result = measure(work, arguments.ps)
        write_atomically(work / "result.json", json.dumps(result).encode())
        write("ensemble_guard", {"what": __doc__, "machine": machine(), **summary_of(result)})
    if "figure" in arguments.parts:
        draw(json.loads((work / "result.json").read_text(encoding="utf-8")), HERE / "ensemble_guard.png")


if __name__ == "__main__":
    main()
