"""The vacuum potential of ReSolv: a small SO3krates fitted to stored frames of the published vacuum potential.

    python benchmarks/resolv_vacuum.py [--networks f32l3 f64l2] [--with-test]

Frames: 40 per molecule from the authors' 250 ps runs at 298.15 K (shared data), molecules with broken bonds left out.
Of the authors' training molecules a tenth, drawn by a seed, is for validation. The frames of the test molecules take no
part; their forces are compared once, with the network that was chosen: the one whose step with 64 molecules of 15 atoms
takes less than the 60 microseconds per molecule that training the water potential can afford. With ``--with-test``
the frames of the test molecules are used for training as well, a model for the ablation of `resolv_hydration.py`.

Energies are less their mean over the frames of a molecule: one constant per molecule cancels in what the pair is for.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import machine, write
from _resolv import FOLDER, SEED, TEMPERATURE, molecules, stored_frames

from openmm_mlff.data.datasets import Dataset, write_dataset
from openmm_mlff.data.files import write_atomically
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.training.recipe import Recipe
from openmm_mlff.training.run import MODEL, train
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

BASE: dict[str, Any] = {
    "degrees": [1, 2],
    "cutoff": 5.0,
    "avg_num_neighbors": 11.0,
    "elements": [1, 6, 7, 8, 16, 17],
    "charges": [0],
    "multiplicities": [1],
} | dict.fromkeys(
    (
        "use_charge_embed",
        "use_spin_embed",
        "use_electrostatics",
        "use_dispersion",
        "predict_charges",
        "predict_hirshfeld",
    ),
    False,
)
NETWORKS: dict[str, dict[str, Any]] = {
    "f32l2": BASE | {"num_features": 32, "num_layers": 2, "num_heads": 2},
    "f32l3": BASE | {"num_features": 32, "num_layers": 3, "num_heads": 2},
    "f64l2": BASE | {"num_features": 64, "num_layers": 2, "num_heads": 4},
}
#: by `step_time`
CHOSEN = "f32l2"
RECIPE: dict[str, Any] = {
    "family": "so3krates",
    "seed": SEED,
    "batch_size": 16,
    "threads": 1,
    "loss": {"energy": 0.01, "forces": 1.0},
    "final_loss": {"energy": 0.1, "forces": 1.0},
    "loop": {
        "learning_rate": 2e-3,
        "final_learning_rate": 1e-5,
        "warmup_steps": 300,
        "schedule": "cosine",
        "clip_norm": 10.0,
        "ema_decay": 0.998,
        "validate_every": 1000,
    },
}


def dataset(with_test: bool) -> Dataset:
    """Sound vacuum frames with their split; written on the first call."""
    folder = FOLDER / ("vacuum_frames_with_test" if with_test else "vacuum_frames")
    if (folder / "card.json").exists():
        return Dataset(folder)
    frames = stored_frames("vac")
    structures = []
    for molecule in molecules():
        split = "train" if with_test and molecule.split == "test" else molecule.split
        if molecule.sound and molecule.index in frames:
            structures += [s.replace(info={"split": split}) for s in frames[molecule.index]]
    sampling = {"source": "stored frames of ReSolv's vacuum potential", "temperature_K": TEMPERATURE, "seed": SEED}
    return write_dataset(folder, structures, name="resolv-vacuum", method={"name": "PBE0+MBD"}, sampling=sampling)


def fit(name: str, steps: int, with_test: bool) -> Path:
    """Train one network, or go on with it."""
    folder, clock = FOLDER / f"vacuum_{name}{'_with_test' * with_test}", FOLDER / f"vacuum_{name}.seconds.json"
    spent = json.loads(clock.read_text(encoding="utf-8"))["cpu_seconds"] if clock.exists() else 0.0
    before = time.process_time()
    resume = (folder / "config.json").exists()
    recipe = Recipe.from_dict(RECIPE | {"model": NETWORKS[name], "loop": RECIPE["loop"] | {"steps": steps}})
    try:
        train(recipe, [dataset(with_test).path], folder, resume, progress=False)
    finally:
        spent += time.process_time() - before
        write_atomically(clock, json.dumps({"cpu_seconds": round(spent, 1)}).encode())
    return folder


def forces_mae(folder: Path, split: str, data: Dataset) -> dict[str, float]:
    """Errors over one split, kcal/mol/angstrom, with an error over molecules."""
    model = load_potential(folder / MODEL)
    frames = [s for s in data.load() if s.info["split"] == split]
    by_molecule: dict[str, list[float]] = {}
    for s in frames:
        _, forces = model.energy_and_forces(s)
        by_molecule.setdefault(s.group, []).append(float(np.abs(forces - s.forces).mean()) / EV_PER_KCAL_PER_MOL)
    means = np.array([np.mean(values) for values in by_molecule.values()])
    return {
        "forces_mae_kcal_mol_A": round(float(means.mean()), 4),
        "standard_error": round(float(means.std(ddof=1) / np.sqrt(len(means))), 4),
        "molecules": len(means),
        "frames": len(frames),
    }


def step_time(folder: Path, data: Dataset) -> float:
    """Microseconds of one evaluation per molecule: 64 molecules of 14 to 16 atoms in one batch, one thread, float32."""
    torch.set_num_threads(1)
    model = load_potential(folder / MODEL).float()
    first = {s.group: s for s in data.load() if 14 <= len(s) <= 16}
    several = (list(first.values()) * 64)[:64]
    evaluator = model.evaluator(several, compile=True)
    positions = np.concatenate([s.positions for s in several])
    seconds = []
    for _ in range(60):
        before = time.perf_counter()
        evaluator.arrays(positions)
        seconds.append(time.perf_counter() - before)
    return round(1e6 * float(np.median(seconds[10:])) / len(several), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--with-test", action="store_true")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not args.report:
        for name in args.networks:
            fit(name, args.steps, args.with_test)
    if args.with_test:
        return
    data = dataset(False)
    rows: dict[str, Any] = {}
    for name in NETWORKS:
        folder = FOLDER / f"vacuum_{name}"
        if (folder / MODEL).exists():
            history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
            rows[name] = {
                "parameters": sum(p.numel() for p in load_potential(folder / MODEL).parameters()),
                "steps": int(history[-1]["step"]),
                "valid": forces_mae(folder, "valid", data),
                "us_per_molecule_step": step_time(folder, data),
            }
            print(name, rows[name], flush=True)
    chosen = CHOSEN
    rows[chosen]["test"] = forces_mae(FOLDER / f"vacuum_{chosen}", "test", data)
    print(chosen, rows[chosen])
    write("resolv_vacuum", {"machine": machine(), "networks": rows, "chosen": chosen, "recipe": RECIPE})


if __name__ == "__main__":
    main()
