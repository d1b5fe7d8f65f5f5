"""Whether ions keep their protons when they are let go: minima by a model and by GFN2-xTB from the same frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from _bio_molecules import GFN2
from ase.data import covalent_radii
from scipy.optimize import minimize

from openmm_mlff.data.reference import LabelError
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Potential

#: named by the plan of the data, because GFN2-xTB moves their protons; they were trained on
TRAINED = ("zwitterion-NH3-GLY-COO", "salt-bridge-ammonium-acetate", "salt-bridge-guanidinium-acetate")
KINDS = {
    "zwitterions": lambda group: group.startswith(("zwitterion-NH", "dipeptide-zwitterion", "dipeptide-charged")),
    "salt bridges": lambda group: group.startswith("salt-bridge"),
    "zwitterions with nine waters": lambda group: group.startswith("zwitterion-in-water") and group.endswith("-w9"),
}
#: frames of each group, and how far salt bridges may be apart (angstrom) at the start
FRAMES, FARTHEST = 8, 3.5
STEPS = 500

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


def owners(numbers: np.ndarray, positions: np.ndarray) -> dict[int, int]:
    """The heavy atom whose surface is nearest, of every hydrogen."""
    heavy = np.flatnonzero(numbers > 1)
    hydrogens = np.flatnonzero(numbers == 1)
    distances = np.linalg.norm(positions[hydrogens, None] - positions[heavy][None], axis=-1)
    nearest = heavy[np.argmin(distances - covalent_radii[numbers[heavy]], axis=1)]
    return dict(zip(hydrogens.tolist(), nearest.tolist(), strict=True))


def moved(numbers: np.ndarray, start: np.ndarray, end: np.ndarray) -> set[tuple[int, str]]:
    """Hydrogens that have another heavy atom at the end, with the element that they went to ('N', 'O', ...)."""
    from ase.data import chemical_symbols

    before, after = owners(numbers, start), owners(numbers, end)
    return {(h, chemical_symbols[numbers[x]]) for h, x in after.items() if x != before[h]}


def relaxed(start: np.ndarray, function: Function) -> np.ndarray:
    """A minimum of ``function(positions) -> energy (eV), forces (eV/angstrom)``, ``(n_atoms, 3)``."""

    def flat(x: np.ndarray) -> tuple[float, np.ndarray]:
        energy, forces = function(x.reshape(-1, 3))
        return energy, -forces.ravel()

    found = minimize(flat, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    return found.x.reshape(-1, 3)


def by_model(model: Potential, structure: Structure) -> Function:
    evaluator = model.evaluator(structure, compile=True)

    def function(positions: np.ndarray) -> tuple[float, np.ndarray]:
        energies, forces = evaluator.arrays(positions)
        return float(energies[0]), forces

    return function


def starts(test: Sequence[Structure], train: Sequence[Structure]) -> dict[str, list[Structure]]:
    """Frames with their protons still held, evenly drawn from each group, by kind."""
    found: dict[str, list[Structure]] = {}
    for name, is_of in KINDS.items():
        found[name] = _drawn([s for s in test if is_of(s.group)])
    found["trained on"] = _drawn([s for s in train if s.group in TRAINED])
    return found


def _drawn(structures: Sequence[Structure]) -> list[Structure]:
    groups: dict[str, list[Structure]] = {}
    for s in structures:
        held = s.info.get("class") in ("zwitterion", "ion pair") and s.info.get("protonation", "as built") == "as built"
        if held and float(s.info.get("distance", 0.0)) <= FARTHEST and s.info.get("source") != "release":
            groups.setdefault(s.group, []).append(s)
    picked = []
    for group in sorted(groups):
        members = groups[group]
        places = np.linspace(0, len(members) - 1, min(FRAMES, len(members))).round().astype(int)
        picked += [members[k] for k in places]
    return picked


def transfers(models: Mapping[str, Potential], test: Sequence[Structure], train: Sequence[Structure]) -> dict[str, Any]:
    """Minima from the same frames: how often GFN2-xTB moves a proton, and whether each model does where it does."""
    rows = []
    for kind, structures in starts(test, train).items():
        for s in structures:
            bare = s.replace(energy=None, forces=None, dipole=None, charges=None)
            row: dict[str, Any] = {"kind": kind, "group": s.group}
            try:
                end = relaxed(bare.positions, GFN2.driver(bare))
            except LabelError as error:
                rows.append(row | {"failed": str(error)[:80]})
                continue
            there = moved(bare.numbers, bare.positions, end)
            row["GFN2-xTB"] = _row(there)
            for name, model in models.items():
                try:
                    mine = relaxed(bare.positions, by_model(model, bare))
                except ValueError:
                    continue
                row[name] = _row(moved(bare.numbers, bare.positions, mine))
            rows.append(row)
    names = list(models)
    kinds = [*KINDS, "trained on"]
    return {
        "frames_per_group": FRAMES,
        "rows": rows,
        "kinds": {kind: _counts([r for r in rows if r["kind"] == kind], names) for kind in kinds},
    }


def _row(found: set[tuple[int, str]]) -> list[str]:
    return sorted(f"H{h} to {element}" for h, element in found)


def _counts(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Frames that GFN2-xTB changes and leaves, and of them those that each model changes and leaves, too."""
    known = [r for r in rows if "GFN2-xTB" in r]
    changed, left = [r for r in known if r["GFN2-xTB"]], [r for r in known if not r["GFN2-xTB"]]
    result: dict[str, Any] = {
        "groups": len({r["group"] for r in known}),
        "moved_by_gfn2": len(changed),
        "left_by_gfn2": len(left),
    }
    for name in names:
        result[name] = {
            "moved_too": sum(bool(r.get(name)) for r in changed),
            "the_same_hydrogens": sum(r.get(name) == r["GFN2-xTB"] for r in changed),
            "left_too": sum(name in r and not r[name] for r in left),
        }
    return result
