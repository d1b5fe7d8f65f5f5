"""The water potential of ReSolv: trained from hydration free energies.

    python benchmarks/resolv_networks.py first vacuum water      (see there)
    python benchmarks/resolv_water.py [--name fused] [--learning-rate 2e-5] [--processes 4] [--threads 4]
    python benchmarks/resolv_water.py --name fused2 --start fused --learning-rate 1.2e-5 --rounds 12

It starts as the network that knows what implicit water (ALPB) changes in GFN2-xTB; with ``--start vacuum`` as the
vacuum potential itself, as the authors of ReSolv do, and with the name of another training as what that one kept. The
two commands, one after the other, made the pair in `models/`: errors still fell when the learning rate of the first had
run out. Learning rates were chosen by validation errors of short trials, of which nothing is kept. How every round went
is written to ``resolv_water.json``, with the trainings that went before, also by ``--report`` alone.

Experimental hydration free energies of the authors' training molecules (FreeSolv), less the tenth of them that says
which round and which of several trainings is best; test molecules take no part. Every simulation is Langevin dynamics
of our own at 298.15 K, 1 fs, 1/ps; conformers by rdkit with a seed, the one of least energy in vacuum.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import machine, write
from _resolv import FOLDER, SEED, TEMPERATURE, Molecule, molecules

from openmm_mlff.data.molecules import embed_smiles
from openmm_mlff.data.shards import read_shard, write_shard
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.molecule_runs import LangevinSettings
from openmm_mlff.training.run import MODEL
from openmm_mlff.training.solvation import BEST, SolvationTraining
from openmm_mlff.training.solvation_folder import CHECKPOINT, CONFIG, HISTORY, checksum
from openmm_mlff.training.solvation_settings import SolvationOptions, Target
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

CONFORMERS = 8


def vacuum_folder() -> Path:
    """The training of the vacuum potential."""
    return FOLDER / "gfn2_vacuum"


def water_start() -> Path:
    """The training of the network that knows of implicit water."""
    return FOLDER / "gfn2_water"


def starts(chosen: Sequence[Molecule], vacuum: Path) -> list[Structure]:
    """Of every molecule the conformer of least energy in vacuum among a few; kept beside the vacuum potential."""
    model, folder = load_potential(vacuum / MODEL), vacuum / "starts"
    found = []
    for m in chosen:
        path = folder / f"{m.key}.safetensors"
        if not path.exists():
            conformers = embed_smiles(m.smiles, CONFORMERS, seed=SEED % 100_000 + m.index)
            energies = [model.energy_and_forces(s)[0] for s in conformers]
            write_shard(path, [conformers[int(np.argmin(energies))].replace(group=m.key)])
        found += read_shard(path)
    return found


def before(folder: Path) -> Path | None:
    """The folder of the training whose potential this one started as; None if it began with the labels."""
    started = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["water"]
    for path in sorted(FOLDER.glob(f"water_*/{BEST}")):
        if path.parent != folder and checksum(load_potential(path)) == started:
            return path.parent
    return None


def training_of(folder: Path) -> dict[str, Any]:
    """How one training went, round by round."""
    history = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    return {
        "options": json.loads((folder / CONFIG).read_text(encoding="utf-8"))["options"],
        "steps": sum(row.get("steps", 0.0) for row in history),
        "best_round": min(history, key=lambda row: row["valid_mae_kt"])["round"],
        "rounds": history,
    }


def report(folder: Path) -> None:
    """How the trainings that led to the potential of a folder went, the first one first, and what was left out."""
    targets = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["targets"]
    splits = [t["split"] for t in targets.values()]
    dropped = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["dropped"]
    trainings, place = [], folder
    while True:
        trainings.insert(0, training_of(place))
        earlier = before(place)
        if earlier is None:
            break
        place = earlier
    content = {
        "machine": machine(),
        "molecules": {split: splits.count(split) for split in ("train", "valid")},
        "left_out": dropped,
        "trainings": trainings,
    }
    write("resolv_water", content)
    last = trainings[-1]
    best = next(row for row in last["rounds"] if row["round"] == last["best_round"])
    print(f"best round {best['round']:.0f}: validation {best['valid_mae_kt']:.2f} kT, {len(dropped)} left out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="fused", help="of this training, a folder")
    parser.add_argument("--vacuum", type=Path, help="folder of the vacuum training (default: that of the labels)")
    parser.add_argument("--start", default="labels", help="labels, vacuum, name of a training, or model file")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--fluctuation", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--least-effective", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--ps", type=float, default=24.0)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--equilibration", type=float, default=4.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--molecules", type=int, help="only so many of each split, to try it")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    args = parser.parse_args()
    if args.report:
        report(FOLDER / f"water_{args.name}")
        return
    place = args.vacuum or vacuum_folder()
    vacuum = load_potential(place / MODEL)
    chosen = [m for m in molecules() if m.split in ("train", "valid")]
    if args.molecules:
        by_split = [[m for m in chosen if m.split == split][: args.molecules] for split in ("train", "valid")]
        chosen = [m for group in by_split for m in group]
    targets = [
        Target(m.key, structure, m.experiment * EV_PER_KCAL_PER_MOL, m.split)
        for m, structure in zip(chosen, starts(chosen, place), strict=True)
    ]
    sampling = LangevinSettings(
        temperature=TEMPERATURE,
        length=args.ps,
        interval=args.ps / args.frames,
        equilibration=args.equilibration,
        minimization_steps=100,
    )
    options = dataclasses.replace(
        SolvationOptions(),
        sampling=sampling,
        rounds=args.rounds,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        final_learning_rate=0.1 * args.learning_rate,
        least_effective=args.least_effective,
        fluctuation=args.fluctuation,
        processes=args.processes,
        threads=args.threads,
        seed=SEED % 100_000,
    )
    folder = FOLDER / f"water_{args.name}"
    known = {"labels": water_start() / MODEL, "vacuum": place / MODEL}
    beginning = known.get(args.start, FOLDER / f"water_{args.start}" / BEST)
    beginning = beginning if beginning.exists() else Path(args.start)
    water = load_potential(beginning)
    training = SolvationTraining(
        vacuum,
        targets,
        options,
        folder,
        resume=(folder / CONFIG).exists(),
        say=lambda s: print(s, flush=True),
        water=water,
    )
    training.run()
    report(folder)


if __name__ == "__main__":
    main()
