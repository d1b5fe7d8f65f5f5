"""Labels for the two potentials of ReSolv: GFN2-xTB in vacuum and with implicit water (ALPB), made by the project.

    python benchmarks/resolv_vacuum.py --networks f32l2
    python benchmarks/resolv_labels.py [--rounds 1] [--processes 4]

Molecules: the authors' training molecules of FreeSolv, `EXTRA` others of the same elements, put together from common
groups and drawn by a seed, and capped amino acids; no molecule of the test set is among them. Round 0 is simulated at
300, 600 and 1000 K with a network fitted to stored frames, which decides where molecules go and nothing else; round 1
with the network that was fitted to the labels of round 0, so that the places that this network invents are labelled
too. Bonds of frames at 300 K are stretched and pressed as well. Labels that fail, and forces above `LARGEST_FORCE`, are
left out and counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from _common import machine, write
from _resolv import FOLDER, SEED, molecules
from rdkit import Chem, RDLogger

from openmm_mlff.data.datasets import Dataset, concatenate, write_dataset
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import limit_threads, run_tasks
from openmm_mlff.data.labelling import label_block
from openmm_mlff.data.molecules import embed_smiles
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.shards import read_shard, write_shard
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.molecule_runs import LangevinSettings
from openmm_mlff.training.ensembles import sample_groups
from openmm_mlff.training.run import MODEL

PLACE = FOLDER / "gfn2"
METHODS = {"vacuum": TBLite(), "water": TBLite(solvent="water")}
EXTRA = 700
#: K, and the frames of a molecule at each
TEMPERATURES = {300: 10, 600: 10, 1000: 6}
#: ps between two frames
INTERVAL = 0.2
#: eV/angstrom
LARGEST_FORCE = 15.0
#: capped glycine, alanine, serine, valine, and how many starts each has: from round 1 on
CAPPED = ("CC(=O)NCC(=O)NC", "CC(=O)N[C@@H](C)C(=O)NC", "CC(=O)N[C@@H](CO)C(=O)NC", "CC(=O)N[C@@H](C(C)C)C(=O)NC")
CAPPED_STARTS = 8
STRETCHES = (0.85, 1.15, 1.3, 1.5)
LARGEST = 30

RESIDUES = [
    *("C", "CC", "CCC", "C(C)C", "CCCC", "CC(C)C", "C(C)(C)C", "CCCCC", "CCCCCC", "C1CC1", "C1CCC1", "C1CCCC1"),
    *("C1CCCCC1", "C=CC", "C=C", "C#CC", "C(C)=C", "c1ccccc1", "Cc1ccccc1", "CCc1ccccc1", "c1ccccc1C", "c1cccc(C)c1"),
    *("c1ccc(C)cc1", "c1ccc(Cl)cc1", "c1ccccc1Cl", "c1cccc(Cl)c1", "c1ccc(O)cc1", "c1ccc(N)cc1", "c1ccccc1O"),
    *("c1ccncc1", "c1cccnc1", "c1ccccn1", "c1ccco1", "c1cccs1", "c1ccc2ccccc2c1", "CCO", "CCN", "CCS", "CCCl"),
    *("CCOC", "C(Cl)(Cl)Cl", "C(Cl)Cl", "CC(Cl)Cl", "c1ccc(OC)cc1", "c1ccc(S)cc1", "c1cc(Cl)cc(Cl)c1"),
    *("c1ccc(C#N)cc1", "c1ccc([N+](=O)[O-])cc1", "CCSC", "CC(=O)C", "CCC#N", "CC(O)C", "C(=O)C", "C(=O)c1ccccc1"),
    *("CC=O", "c1cnccn1", "c1ncccn1", "C1CCOCC1", "C1CCNCC1"),
]
GROUPS = [
    *("[H]", "O", "N", "NC", "N(C)C", "S", "SC", "SSC", "Cl", "C#N", "[N+](=O)[O-]", "C=O", "C(C)=O", "C(=O)O"),
    *("C(=O)OC", "OC(C)=O", "C(=O)N", "NC(C)=O", "OC", "OCC", "C(Cl)(Cl)Cl", "C(Cl)Cl", "CCl", "O[N+](=O)[O-]"),
    *("S(C)=O", "S(C)(=O)=O", "S(N)(=O)=O", "NC(N)=O", "C#C", "C=C", "OC=O", "N1CCOCC1", "N1CCCCC1", "N1CCNCC1"),
    *("N1CCCC1", "n1ccnc1", "SSCC", "OCCO", "OCCOC", "NO", "ONC", "N=C", "C=NO", "SC#N", "N=C=S", "C(=O)CC"),
    *("C(=O)S", "SC(C)=O", "NN", "OO", "CO", "CN", "CS", "C(N)C(=O)O", "NC=O", "C(=O)NC", "C(=O)N(C)C", "C(O)CO"),
    *("C(Cl)C(Cl)Cl", "C(Cl)=C(Cl)Cl", "c1ncc[nH]1", "OCCCl"),
]


def _hill(molecule: Chem.Mol) -> int:
    return Chem.AddHs(molecule).GetNumAtoms()


@cache
def others() -> tuple[str, ...]:
    """Canonical SMILES of the molecules that are not of FreeSolv, drawn by the seed."""
    taken = {Chem.CanonSmiles(m.smiles) for m in molecules()}
    found = set()
    for residue in RESIDUES:
        for group in GROUPS:
            # the residue's first atom carries the group
            molecule = Chem.MolFromSmiles(f"{group}{residue}" if group == "[H]" else _joined(residue, group))
            if molecule is None or not 4 <= _hill(molecule) <= LARGEST:
                continue
            smiles = Chem.MolToSmiles(molecule)
            if smiles not in taken and "." not in smiles:
                found.add(smiles)
    order = np.random.default_rng(SEED).permutation(sorted(found))
    return tuple(str(s) for s in order[:EXTRA])


def _joined(residue: str, group: str) -> str:
    """SMILES of the residue with the group on its first atom."""
    head = 2 if len(residue) > 1 and residue[1].isdigit() else 1
    return f"{residue[:head]}({group}){residue[head:]}"


def solutes(round_: int) -> dict[str, tuple[str, str]]:
    """SMILES and split of every molecule of a round, by key; a twentieth of the others is for validation, too."""
    found = {m.key: (m.smiles, m.split) for m in molecules() if m.split in ("train", "valid")}
    for k, smiles in enumerate(others()):
        found[f"x{k:03d}"] = (smiles, "valid" if k % 20 == 0 else "train")
    if round_:
        found |= {f"p{k}-{n}": (smiles, "train") for k, smiles in enumerate(CAPPED) for n in range(CAPPED_STARTS)}
    return found


def starts(round_: int) -> dict[str, list[Structure]]:
    """A conformer per temperature for every molecule that rdkit can embed; kept, because embedding takes minutes."""
    path = PLACE / f"round-{round_}" / "starts.safetensors"
    if not path.exists():
        found, failed = [], {}
        for k, (key, (smiles, split)) in enumerate(solutes(round_).items()):
            try:
                conformers = embed_smiles(smiles, len(TEMPERATURES), seed=SEED % 100_000 + 1000 * round_ + k)
            except ValueError as error:
                failed[key] = str(error)
                continue
            found += [s.replace(group=key, info={"split": split}) for s in conformers]
        write_shard(path, found, failed)
    by_key: dict[str, list[Structure]] = {}
    for s in read_shard(path):
        by_key.setdefault(s.group, []).append(s)
    return by_key


def simulate(round_: int, model: Path, processes: int) -> list[Structure]:
    """The frames of a round, with those stretched."""
    begin = starts(round_)
    frames: list[Structure] = []
    for number, (temperature, count) in enumerate(TEMPERATURES.items()):
        structures = {key: several[number % len(several)] for key, several in begin.items()}
        settings = LangevinSettings(
            temperature=float(temperature),
            timestep=0.5,
            equilibration=0.4,
            length=INTERVAL * count,
            interval=INTERVAL,
            minimization_steps=50,
            batch=32,
        )
        made = sample_groups(
            model,
            structures,
            dict.fromkeys(structures),
            settings,
            PLACE / f"round-{round_}" / f"frames-{temperature}K",
            seed=SEED % 100_000 + 10 * round_ + number,
            processes=processes,
        )
        here = [structures[key].replace(positions=x) for key, f in made.items() for x in f.positions]
        # where a molecule was given up is where the network needs labels most
        here += [structures[key].replace(positions=f.last[0]) for key, f in made.items() if f.failure]
        frames += here
        if temperature == min(TEMPERATURES):
            frames += stretched(here, round_)
    return frames


def stretched(frames: Iterable[Structure], round_: int) -> list[Structure]:
    """One frame in three with one of its bonds outside rings longer or shorter by a factor."""
    random = np.random.default_rng([SEED, round_])
    smiles = {key: s for key, (s, _) in solutes(round_).items()}
    found = []
    for s in frames:
        if random.random() > 1 / 3:
            continue
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles[s.group]))
        bonds = [b for b in molecule.GetBonds() if not b.IsInRing()]
        if not bonds:
            continue
        heavy = [b for b in bonds if b.GetBeginAtom().GetAtomicNum() > 1 and b.GetEndAtom().GetAtomicNum() > 1]
        pool = heavy if heavy and random.random() < 0.6 else bonds
        bond = pool[int(random.integers(len(pool)))]
        a, b = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        pieces = Chem.GetMolFrags(Chem.FragmentOnBonds(molecule, [bond.GetIdx()], addDummies=False))
        side = next(p for p in pieces if b in p)
        positions = s.positions.copy()
        factor = STRETCHES[int(random.integers(len(STRETCHES)))]
        positions[list(side)] += (factor - 1.0) * (positions[b] - positions[a])
        found.append(s.replace(positions=positions))
    return found


def label(round_: int, frames: list[Structure], processes: int, block: int = 200) -> dict[str, int]:
    """Label the frames with both methods; shards hold the frames that both could do. Returns counts."""
    folder = PLACE / f"round-{round_}"
    frames = [s.replace(info=dict(s.info) | {"frame": k}) for k, s in enumerate(frames)]
    made: dict[str, dict[int, Structure]] = {}
    for name, method in METHODS.items():
        tasks = {f"block-{k // block:05d}": (method, k, frames[k : k + block]) for k in range(0, len(frames), block)}
        place = folder / f"labels-{name}"
        run_tasks(
            tasks, label_block, place, log=place / "failures.jsonl", processes=processes, progress=False, title=name
        )
        made[name] = {s.info["frame"]: s for task in tasks for s in read_shard(place / f"{task}.safetensors")}
    both = [
        k
        for k in sorted(made["vacuum"].keys() & made["water"].keys())
        if all(np.linalg.norm(np.asarray(m[k].forces), axis=1).max() < LARGEST_FORCE for m in made.values())
    ]
    for name, by_frame in made.items():
        target = folder / name
        if not (target / "card.json").exists():
            write_dataset(
                target,
                [by_frame[k].replace(dipole=None, charges=None) for k in both],
                name=f"resolv-gfn2-{name}-{round_}",
                method=METHODS[name],
                sampling={"how": "Langevin dynamics and stretched bonds", "round": round_, "seed": SEED},
            )
    return {"frames": len(frames), "labelled": len(both)}


def dataset(name: str, rounds: int) -> Dataset:
    """The labels of the first rounds, in one folder."""
    if rounds == 1:
        return Dataset(PLACE / "round-0" / name)
    folder = PLACE / f"{name}-{rounds}-rounds"
    if not (folder / "card.json").exists():
        return concatenate([PLACE / f"round-{k}" / name for k in range(rounds)], folder, f"resolv-gfn2-{name}")
    return Dataset(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    limit_threads()
    RDLogger.DisableLog("rdApp.*")
    counts = {}
    for k in range(args.rounds):
        path = PLACE / f"round-{k}" / "counts.json"
        if not path.exists():
            model = FOLDER / ("vacuum_f32l2" if k == 0 else "gfn2_first") / MODEL
            found = label(k, simulate(k, model, args.processes), args.processes)
            write_atomically(path, (json.dumps(found) + "\n").encode())
        counts[f"round {k}"] = json.loads(path.read_text(encoding="utf-8"))
        print(k, counts[f"round {k}"], flush=True)
    splits = [split for _, split in solutes(0).values()]
    write(
        "resolv_labels",
        {
            "machine": machine(),
            "molecules": {"of FreeSolv": len(splits) - len(others()), "others": len(others()), "capped": len(CAPPED)},
            "by_split": {split: splits.count(split) for split in ("train", "valid")},
            "rounds": counts,
            "methods": {name: method.describe() for name, method in METHODS.items()},
            "temperatures_K": list(TEMPERATURES),
            "largest_force_eV_A": LARGEST_FORCE,
        },
    )


if __name__ == "__main__":
    main()
