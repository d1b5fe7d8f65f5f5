"""The two potentials that ReSolv starts from: small SO3krates fitted to the labels of `resolv_labels.py`.

    python benchmarks/resolv_labels.py
    python benchmarks/resolv_networks.py first        # on the labels of round 0
    python benchmarks/resolv_labels.py --rounds 2
    python benchmarks/resolv_networks.py vacuum       # from there, on both rounds
    python benchmarks/resolv_networks.py water        # from the vacuum network, on what implicit water changes
    python benchmarks/resolv_networks.py report

The water network is fitted to the vacuum *network* plus what ALPB changes in the labels, so that the difference of the
two networks, which free energies are made of, does not carry the error of the vacuum network. Its validation errors are
those of that difference. Test molecules of FreeSolv take no part; their geometries are seen once, in the report, where
MD by the vacuum network makes frames that GFN2-xTB labels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import machine, write
from _resolv import FOLDER, SEED, TEMPERATURE, molecules
from resolv_labels import LARGEST_FORCE, METHODS, PLACE, dataset
from resolv_vacuum import NETWORKS, step_time

from openmm_mlff.data.datasets import Dataset, write_dataset
from openmm_mlff.data.labelling import label_structures
from openmm_mlff.data.model_file import load_card
from openmm_mlff.data.molecules import embed_smiles
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.molecule_runs import LangevinSettings, sample
from openmm_mlff.training.recipe import Recipe
from openmm_mlff.training.run import MODEL, train
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

NETWORK = "f32l3"
RECIPE: dict[str, Any] = {
    "family": "so3krates",
    "seed": SEED,
    "batch_size": 32,
    "loss": {"energy": 0.01, "forces": 1.0},
    "final_loss": {"energy": 0.3, "forces": 1.0},
}
#: of the water network, whose energies are what free energies begin with
WATER_LOSS: dict[str, Any] = {
    "loss": {"energy": 0.3, "forces": 1.0},
    "final_loss": {"energy": 10.0, "forces": 1.0},
}
LOOP: dict[str, Any] = {
    "final_learning_rate": 1e-5,
    "warmup_steps": 200,
    "schedule": "cosine",
    "clip_norm": 10.0,
    "ema_decay": 0.998,
    "validate_every": 500,
}
#: steps and first learning rate of the trainings
TRAININGS = {"first": (6000, 2e-3), "vacuum": (12000, 1e-3), "water": (5000, 5e-4)}


def folder(name: str) -> Path:
    return FOLDER / f"gfn2_{name}"


def evaluated(name: str, structures: list[Structure]) -> Iterator[tuple[float, np.ndarray]]:
    """Energy (eV) and forces (eV/angstrom) of every structure by a network, many in one batch."""
    model = load_potential(folder(name) / MODEL).float()
    for start in range(0, len(structures), 64):
        block = structures[start : start + 64]
        energies, forces = model.evaluator(block, compile=True).arrays(np.concatenate([s.positions for s in block]))
        ends = np.cumsum([len(s) for s in block])[:-1]
        yield from zip(energies.tolist(), np.split(forces, ends), strict=True)


def differences() -> Dataset:
    """The vacuum network plus what implicit water changes in the labels, over all frames."""
    place = PLACE / "water-on-network"
    if (place / "card.json").exists():
        return Dataset(place)

    def labelled() -> Iterator[Structure]:
        vacuum, water = (dataset(name, 2).load() for name in METHODS)
        for v, w, (energy, forces) in zip(vacuum, water, evaluated("vacuum", vacuum), strict=True):
            assert np.array_equal(v.positions, w.positions)
            yield w.replace(energy=energy + w.energy - v.energy, forces=forces + w.forces - v.forces)

    return write_dataset(
        place,
        labelled(),
        name="resolv-gfn2-water-on-network",
        method={"name": "a network of GFN2-xTB in vacuum, plus ALPB(water) less vacuum by GFN2-xTB"},
        sampling={"how": "as resolv-gfn2-water"},
    )


def fit(name: str, processes: int) -> None:
    """Train a network, or go on with it."""
    steps, rate = TRAININGS[name]
    data = {
        "first": lambda: dataset("vacuum", 1),
        "vacuum": lambda: dataset("vacuum", 2),
        "water": differences,
    }[name]()
    before = {"first": None, "vacuum": folder("first"), "water": folder("vacuum")}[name]
    resume = (folder(name) / "config.json").exists()
    content = RECIPE | {"loop": LOOP | {"steps": steps, "learning_rate": rate}, "processes": processes, "threads": 1}
    if name == "water":
        content |= WATER_LOSS
    if before is None:
        content |= {"model": NETWORKS[NETWORK] | {"avg_num_neighbors": 12.0}}
    elif not resume:
        content |= {"model": load_card(before / MODEL)["config"]}
    recipe = None if resume else Recipe.from_dict(content)
    start = None if before is None or resume else before / MODEL
    train(recipe, [data.path], folder(name), resume, start, progress=False)


def test_frames() -> dict[str, list[Structure]]:
    """Frames of the test molecules at 298.15 K by the vacuum network, labelled by both methods."""
    chosen = [m for m in molecules() if m.split == "test"]
    starts = [embed_smiles(m.smiles, 1, seed=SEED % 100_000 + m.index)[0].replace(group=m.key) for m in chosen]
    settings = LangevinSettings(
        temperature=TEMPERATURE, equilibration=2.0, length=10.0, interval=0.5, minimization_steps=100, seed=7
    )
    place = PLACE / "test"
    if not (place / "frames" / "card.json").exists():
        made = sample(load_potential(folder("vacuum") / MODEL), starts, settings)
        frames = [s.replace(positions=x) for s, m in zip(starts, made, strict=True) for x in m.positions]
        write_dataset(
            place / "frames", frames, name="frames", method={"name": "none"}, sampling={"how": "vacuum network"}
        )
    frames = Dataset(place / "frames").load()
    found = {}
    for name, method in METHODS.items():
        found[name] = label_structures(frames, method, place / name, processes=4, block=200, progress=False).load()
    return found


def errors(frames: dict[str, list[Structure]]) -> dict[str, float]:
    """Of forces in vacuum and of the free energy of solvation of a geometry; means over molecules.

    Args:
        frames: the same geometries with labels of both methods.
    """
    by_molecule: dict[str, list[tuple[float, float, float]]] = {}
    predicted = [evaluated(name, frames["vacuum"]) for name in ("vacuum", "water")]
    for v, w, (e_v, f_v), (e_w, f_w) in zip(frames["vacuum"], frames["water"], *predicted, strict=True):
        assert v.energy is not None and v.forces is not None and w.energy is not None and w.forces is not None
        if max(np.linalg.norm(forces, axis=1).max() for forces in (v.forces, w.forces)) > LARGEST_FORCE:
            continue
        by_molecule.setdefault(v.group, []).append(
            (
                float(np.abs(f_v - v.forces).mean()) / EV_PER_KCAL_PER_MOL,
                float(np.abs(f_w - f_v - (w.forces - v.forces)).mean()) / EV_PER_KCAL_PER_MOL,
                (e_w - e_v - (w.energy - v.energy)) / EV_PER_KCAL_PER_MOL,
            )
        )
    means = np.array([np.mean(np.abs(rows), axis=0) for rows in by_molecule.values()])
    names = ("vacuum_forces_mae_kcal_mol_A", "solvation_forces_mae_kcal_mol_A", "solvation_energy_mae_kcal_mol")
    found = {name: round(float(x), 4) for name, x in zip(names, means.mean(axis=0), strict=True)}
    return found | {"molecules": len(means), "frames": sum(len(rows) for rows in by_molecule.values())}


def report() -> None:
    """Errors on the molecules for validation, and on those of the test set."""
    torch.set_num_threads(1)
    valid = {name: [s for s in dataset(name, 2).load() if s.info["split"] == "valid"] for name in METHODS}
    rows: dict[str, Any] = {"valid": errors(valid), "test": errors(test_frames())}
    model = load_potential(folder("vacuum") / MODEL)
    rows["parameters"] = sum(p.numel() for p in model.parameters())
    rows["us_per_molecule_step"] = step_time(folder("vacuum"), dataset("vacuum", 1))
    for name in TRAININGS:
        history = json.loads((folder(name) / "history.json").read_text(encoding="utf-8"))
        rows[name] = {"steps": int(history[-1]["step"]), "rate": TRAININGS[name][1]}
    print(json.dumps(rows, indent=1))
    about = {"network": NETWORK, "recipe": RECIPE, "water_loss": WATER_LOSS, "loop": LOOP, "labels": TBLite().method}
    write("resolv_networks", {"machine": machine()} | about | rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=(*TRAININGS, "report"))
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    for name in args.what:
        if name == "report":
            report()
        else:
            fit(name, args.processes)


if __name__ == "__main__":
    main()
