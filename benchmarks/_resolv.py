"""What the ReSolv benchmarks share: FreeSolv with its split, and stored frames of the published potentials."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cache

import numpy as np
from _common import HERE, SHARED

from openmm_mlff.data.structures import Structure
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

FOLDER = HERE.parent / ".work" / "resolv"
#: molecules whose stored vacuum frames hold a broken bond or a lost proton, beside the authors' own lists
BROKEN = frozenset({6, 13, 75, 83, 88, 89, 93, 106, 248, 283, 363, 484})
#: of the split of the authors' training molecules, and what part of them chooses hyperparameters
SEED, VALIDATION = 20261121, 0.1
TEMPERATURE = 298.15


@dataclass(frozen=True)
class Molecule:
    """A molecule of FreeSolv that the authors of ReSolv used.

    Attributes:
        index: theirs. split: 'train', 'valid' (both theirs of training) or 'test'.
        experiment, uncertainty, gaff: hydration free energy, kcal/mol. sound: whether the stored frames are whole.
    """

    index: int
    name: str
    smiles: str
    split: str
    experiment: float
    uncertainty: float
    gaff: float
    sound: bool

    @property
    def key(self) -> str:
        return f"m{self.index:03d}"


@cache
def molecules() -> tuple[Molecule, ...]:
    """The 559 molecules, by index; a tenth of the authors' training molecules is for validation."""
    source = SHARED / "data" / "freesolv"
    if not (source / "freesolv.csv").exists():
        raise SystemExit("no freesolv among the shared data; OPENMM_MLFF_SHARED names that folder")
    about = json.loads((source / "resolv_split.json").read_text(encoding="utf-8"))
    failed = set(about["failed_U_vac"]) | set(about["failed_U_wat"]) | BROKEN
    with open(source / "freesolv.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["resolv_index"]]
    usable = sorted(int(r["resolv_index"]) for r in rows if r["resolv_split"] == "train")
    usable = [k for k in usable if k not in failed]
    chosen = np.random.default_rng(SEED).permutation(usable)[: round(VALIDATION * len(usable))]
    valid = set(chosen.tolist())
    found = []
    for row in rows:
        k = int(row["resolv_index"])
        found.append(
            Molecule(
                index=k,
                name=row["iupac"] or row["compound_id"],
                smiles=row["smiles"],
                split="valid" if k in valid else row["resolv_split"],
                experiment=float(row["expt_kcal_mol"]),
                uncertainty=float(row["d_expt_kcal_mol"]),
                gaff=float(row["gaff_calc_kcal_mol"]),
                sound=k not in failed,
            )
        )
    return tuple(sorted(found, key=lambda m: m.index))


def stored_frames(phase: str) -> dict[int, list[Structure]]:
    """Frames of the published model by index of the molecule: positions, energies (less their mean) and forces.

    Args:
        phase: 'vac' or 'wat', the potential whose trajectory and labels these are.
    """
    found: dict[int, list[Structure]] = {}
    for name in ("pool_250ps.npz", "visible.npz"):
        path = SHARED / "data" / "resolv" / name
        if not path.exists():
            raise SystemExit(f"no resolv/{name} among the shared data; OPENMM_MLFF_SHARED names that folder")
        with np.load(path, allow_pickle=False) as data:
            for key in (k.removesuffix("_Z") for k in data.files if k.endswith("_Z")):
                numbers = data[f"{key}_Z"].astype(np.int64)
                positions, forces = (data[f"{key}_{phase}_{what}"].astype(float) for what in ("pos", "force"))
                # one constant per molecule means nothing here: it cancels between the two potentials
                energies = data[f"{key}_{phase}_energy"] - data[f"{key}_{phase}_energy"].mean()
                found[int(key[1:])] = [
                    Structure(
                        numbers, x, energy=float(e) * EV_PER_KCAL_PER_MOL, forces=f * EV_PER_KCAL_PER_MOL, group=key
                    )
                    for x, e, f in zip(positions, energies, forces, strict=True)
                ]
    return found
