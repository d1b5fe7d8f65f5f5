"""bonds, formal charges and positions of a frame -> its protonation state and its class.

The class of a frame follows from the frame. In vacuum a zwitterion hands its proton over; what was built as a
zwitterion and has lost its charges on the way is a neutral molecule, and counts as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openmm_mlff._plugins import near
from openmm_mlff.data.parts import Part

#: every class of structures, in the order of tables.
CLASSES = (
    "neutral organic",
    "neutral peptide",
    "anion",
    "cation",
    "zwitterion",
    "charged peptide",
    "water cluster",
    "ion in water",
    "ion pair",
    "hydrogen bonded",
    "dispersion bound",
    "separated fragments",
    "proton transfer",
    "bond stretch",
    "radical",
    "triplet",
    "singlet diradical",
    "carbene",
)
#: classes whose reference values are those of open shells, or may be.
OPEN_SHELL = ("radical", "triplet", "singlet diradical", "carbene")
#: a hydrogen is shared if it is this close (angstrom) to being as near to another heavy atom, radii taken off
SHARED = 0.3
#: charges this many bonds apart cancel: resonance structures and tautomers (nitro, carboxyl, imidazole), no zwitterions
RESONANCE = 2


def check_class(name: str) -> str:
    """The name itself. Raises `ValueError` naming the near ones if there is no such class."""
    if name not in CLASSES:
        raise ValueError(f"class: unknown class {name!r}; {near(name, list(CLASSES))}")
    return name


@dataclass(frozen=True)
class Topology:
    """What a structure was built as.

    Attributes:
        numbers: ``(n_atoms,)``. formal_charges: ``(n_atoms,)``. bonds: ``(n_bonds, 2)``.
        parts: the part that each atom belongs to, ``(n_atoms,)``.
    """

    numbers: np.ndarray
    formal_charges: np.ndarray
    bonds: np.ndarray
    parts: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Topology:
        """Of parts laid end to end."""
        starts = np.cumsum([0, *(len(part) for part in parts)])
        return cls(
            np.concatenate([part.numbers for part in parts]),
            np.concatenate([part.formal_charges for part in parts]),
            np.concatenate([part.bonds + start for part, start in zip(parts, starts, strict=False)]),
            np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        )

    def hydrogens(self) -> dict[int, int]:
        """The heavy atom that each hydrogen is bonded to, by index; hydrogens without one are left out."""
        found = {}
        for i, j in self.bonds.tolist():
            for hydrogen, other in ((i, j), (j, i)):
                if self.numbers[hydrogen] == 1 and self.numbers[other] > 1:
                    found[hydrogen] = other
        return found

    def opposite_contacts(self) -> np.ndarray:
        """Hydrogens of cationic groups with N, O and S of anionic ones more than two bonds away, ``(n, 2)``.

        A group is a charged atom with what is up to two bonds away: guanidinium and carboxylate are whole groups.
        """
        charges = _without_resonance(self.formal_charges, self.bonds)
        bonded = np.eye(len(self.numbers), dtype=np.int64)
        bonded[self.bonds[:, 0], self.bonds[:, 1]] = bonded[self.bonds[:, 1], self.bonds[:, 0]] = 1
        near = np.asarray(bonded @ bonded > 0)
        cationic = np.asarray(near[:, charges > 0].any(axis=1))
        anionic = np.asarray(near[:, charges < 0].any(axis=1))
        acceptors = np.flatnonzero(anionic & np.isin(self.numbers, (7, 8, 16)))
        rows = [
            (h, x)
            for h, donor in self.polar_bonds().tolist()
            if cationic[donor]
            for x in acceptors.tolist()
            if not near[h, x]
        ]
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def polar_bonds(self) -> np.ndarray:
        """Bonds of hydrogens to N, O and S: ``(n, 2)``, hydrogen first."""
        rows = [(h, x) for h, x in sorted(self.hydrogens().items()) if self.numbers[x] in (7, 8, 16)]
        return np.array(rows, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Protonation:
    """Where the hydrogens of a frame are.

    Attributes:
        state: "as built", "shared" (a hydrogen between two heavy atoms) or "transferred".
        formal_charges: with hydrogens where they are now, resonance taken out, ``(n_atoms,)``.
    """

    state: str
    formal_charges: np.ndarray

    @property
    def opposite(self) -> bool:
        """Whether there are charges of both signs."""
        return bool((self.formal_charges > 0).any() and (self.formal_charges < 0).any())


def protonation(topology: Topology, positions: np.ndarray) -> Protonation:
    """Assign every hydrogen of ``positions`` ``(n_atoms, 3)`` angstrom to the heavy atom whose surface is nearest.

    A hydrogen that has moved takes its charge along: the formal charge of an atom is the one that it was built with,
    plus the hydrogens it has gained. Hydrogens on carbon are taken to stay (they move in reactions only).
    """
    from ase.data import covalent_radii

    numbers = topology.numbers
    heavy = np.flatnonzero(numbers > 1)
    polar = topology.polar_bonds()
    charges = topology.formal_charges.copy()
    state = "as built"
    sites = heavy[np.isin(numbers[heavy], (7, 8, 16))]
    if len(polar) and len(sites) > 1:
        distances = np.linalg.norm(positions[polar[:, 0], None] - positions[sites][None], axis=-1)
        distances -= covalent_radii[numbers[sites]]
        order = np.argsort(distances, axis=1)
        nearest = sites[order[:, 0]]
        rows = np.arange(len(polar))
        gap = distances[rows, order[:, 1]] - distances[rows, order[:, 0]]
        np.subtract.at(charges, polar[:, 1], 1)
        np.add.at(charges, nearest, 1)
        if (nearest != polar[:, 1]).any():
            state = "transferred"
        if (gap < SHARED).any():
            state = "shared"
    return Protonation(state, _without_resonance(charges, topology.bonds))


def _without_resonance(charges: np.ndarray, bonds: np.ndarray) -> np.ndarray:
    charges = charges.copy()
    near_atoms: dict[int, set[int]] = {}
    for i, j in bonds.tolist():
        near_atoms.setdefault(i, set()).add(j)
        near_atoms.setdefault(j, set()).add(i)
    for start in np.flatnonzero(charges > 0).tolist():
        reached = {start}
        for _ in range(RESONANCE):
            reached |= {k for j in reached for k in near_atoms.get(j, ())}
            for k in sorted(reached):
                taken = min(int(charges[start]), -int(charges[k]))
                if taken > 0:
                    charges[start] -= taken
                    charges[k] += taken
    return charges


def class_of_frame(
    built: str, topology: Topology, positions: np.ndarray, multiplicity: int | None = None
) -> tuple[str, str]:
    """Class and protonation state of a frame of something that was built as class `built`.

    A triplet in its singlet state (`multiplicity` 1) is a singlet diradical. Otherwise only classes that name a
    protonation state change: a zwitterion or an ion pair with a hydrogen under way is a "proton transfer", one without
    charges of both signs a neutral molecule, an ion, or hydrogen bonded. A neutral molecule that has charges of both
    signs is a zwitterion, and hydrogen-bonded molecules that have are an ion pair.
    """
    found = protonation(topology, positions)
    if built == "triplet" and multiplicity == 1:
        return "singlet diradical", found.state
    if built in ("zwitterion", "ion pair") and found.state == "shared":
        return "proton transfer", found.state
    if built == "zwitterion" and not found.opposite:
        total = int(topology.formal_charges.sum())
        amide = _has_amide(topology)
        if total:
            return "charged peptide" if amide else ("cation" if total > 0 else "anion"), found.state
        return "neutral peptide" if amide else "neutral organic", found.state
    if built == "ion pair" and found.state == "transferred" and not found.opposite:
        return "hydrogen bonded", found.state
    if found.state == "transferred" and found.opposite:
        if built in ("neutral organic", "neutral peptide"):
            return "zwitterion", found.state
        if built == "hydrogen bonded":
            return "ion pair", found.state
    return built, found.state


def _has_amide(topology: Topology) -> bool:
    """A peptide bond: a carbon with a bare oxygen, bonded to a nitrogen that has another heavy neighbour."""
    numbers = topology.numbers
    near_atoms: list[list[int]] = [[] for _ in numbers]
    for i, j in topology.bonds.tolist():
        near_atoms[i].append(j)
        near_atoms[j].append(i)
    carbonyls = [
        i
        for i in np.flatnonzero(numbers == 6).tolist()
        if any(numbers[j] == 8 and len(near_atoms[j]) == 1 for j in near_atoms[i])
    ]
    nitrogens = {j for i in carbonyls for j in near_atoms[i] if numbers[j] == 7}
    return any(np.sum(numbers[near_atoms[j]] > 1) > 1 for j in nitrogens)
