"""topology -> what features need of it: elements, names, bonds, selections of atoms, tetrahedral centres."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

#: residues that close a peptide chain; their heavy atoms count as backbone
_CAPS = frozenset({"ACE", "FOR", "NH2", "NHE", "NMA", "NME"})
_BACKBONE = ("N", "CA", "C", "O")
#: centres of amino acids by (residue, atom), for topologies without hydrogens, where neighbours cannot be counted
_NAMED_CENTRES = frozenset({("ILE", "CB"), ("THR", "CB"), ("VAL", "CB"), ("LEU", "CG")})


@dataclass(frozen=True)
class Molecule:
    """One molecule, atom by atom.

    Attributes:
        elements: chemical symbols. names: of atoms. residues: name of each atom's residue. numbers: of each atom's
            residue, counted from 1. bonds: pairs of atoms, lower index first, sorted.
    """

    elements: tuple[str, ...]
    names: tuple[str, ...]
    residues: tuple[str, ...]
    numbers: tuple[int, ...]
    bonds: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        n = len(self.elements)
        if n == 0 or not n == len(self.names) == len(self.residues) == len(self.numbers):
            raise ValueError(
                "molecule: expected an element, a name and a residue for every atom, got "
                f"{n}, {len(self.names)}, {len(self.residues)} and {len(self.numbers)} of them"
            )
        for i, j in self.bonds:
            if not 0 <= i < j < n:
                raise ValueError(f"bonds: expected pairs i < j of atoms 0 to {n - 1}, got ({i}, {j})")

    @classmethod
    def of(cls, topology: Any) -> Molecule:
        """From an ``openmm.app.Topology`` or an ``mdtraj.Topology``.

        Raises `ValueError` for particles without an element (virtual sites, beads) and for a topology without bonds.
        """
        if isinstance(topology, cls):
            return topology
        if not hasattr(topology, "atoms") or not hasattr(topology, "bonds"):
            raise ValueError(f"topology: expected an openmm or mdtraj topology, got {type(topology).__name__}")
        atoms = list(topology.atoms() if callable(topology.atoms) else topology.atoms)
        bonds = list(topology.bonds() if callable(topology.bonds) else topology.bonds)
        for atom in atoms:
            if atom.element is None or atom.element.symbol == "VS":
                raise ValueError(
                    f"topology: expected atoms only, got particle {atom.index} ({atom.name}) of no element"
                )
        if len(atoms) > 1 and not bonds:
            raise ValueError(f"topology: expected bonds between its {len(atoms)} atoms, got none")
        return cls(
            tuple(atom.element.symbol for atom in atoms),
            tuple(str(atom.name) for atom in atoms),
            tuple(str(atom.residue.name) for atom in atoms),
            tuple(int(atom.residue.index) + 1 for atom in atoms),
            tuple(sorted({(min(a.index, b.index), max(a.index, b.index)) for a, b in (bond[:2] for bond in bonds)})),
        )

    def __len__(self) -> int:
        return len(self.elements)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {
            "elements": list(self.elements),
            "names": list(self.names),
            "residues": list(self.residues),
            "numbers": list(self.numbers),
            "bonds": [list(bond) for bond in self.bonds],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Molecule:
        """The inverse of `to_dict`; raises `ValueError` for a record that is damaged."""
        try:
            return cls(
                tuple(str(x) for x in record["elements"]),
                tuple(str(x) for x in record["names"]),
                tuple(str(x) for x in record["residues"]),
                tuple(int(x) for x in record["numbers"]),
                tuple((int(i), int(j)) for i, j in record["bonds"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"molecule: expected elements, names, residues, numbers and bonds, got {error}") from error

    @cached_property
    def neighbours(self) -> tuple[tuple[int, ...], ...]:
        """Bonded atoms of each atom, ascending."""
        found: list[list[int]] = [[] for _ in self.elements]
        for i, j in self.bonds:
            found[i].append(j)
            found[j].append(i)
        return tuple(tuple(sorted(atoms)) for atoms in found)

    def heavy(self, atom: int) -> bool:
        """Whether an atom is not hydrogen."""
        return self.elements[atom] not in ("H", "D")

    def label(self, atom: int) -> str:
        """``ALA2-CA``."""
        return f"{self.residues[atom]}{self.numbers[atom]}-{self.names[atom]}"

    @cached_property
    def backbone(self) -> frozenset[int]:
        """N, CA, C and O of amino acids, and the heavy atoms of the caps of a chain."""
        members: dict[int, dict[str, int]] = {}
        for atom, number in enumerate(self.numbers):
            members.setdefault(number, {})[self.names[atom]] = atom
        found: set[int] = set()
        for number, atoms in members.items():
            if {"N", "CA", "C"} <= set(atoms) and self.elements[atoms["CA"]] == "C":
                found |= {atoms[name] for name in _BACKBONE if name in atoms}
            elif self.residues[next(iter(atoms.values()))] in _CAPS:
                found |= {atom for atom, own in enumerate(self.numbers) if own == number and self.heavy(atom)}
        return frozenset(found)

    def select(self, atoms: str | Iterable[int]) -> tuple[int, ...]:
        """Ascending indices of ``"all"``, ``"heavy"``, ``"backbone"`` or ``"CA"`` atoms, or of those in a list.

        Raises `ValueError` for another name, an index that is out of range or twice there, or if there are none.
        """
        if isinstance(atoms, str):
            chosen = {
                "all": range(len(self)),
                "heavy": [i for i in range(len(self)) if self.heavy(i)],
                "backbone": sorted(self.backbone),
                "CA": [i for i in range(len(self)) if self.names[i] == "CA" and self.elements[i] == "C"],
            }.get(atoms)
            if chosen is None:
                raise ValueError(
                    f"atoms: expected 'heavy', 'all', 'backbone', 'CA' or a list of indices, got {atoms!r}"
                )
            found = tuple(chosen)
        else:
            found = tuple(sorted(int(i) for i in atoms))
            if len(set(found)) != len(found):
                raise ValueError(f"atoms: expected every atom once, got {list(found)}")
            if found and not 0 <= found[0] <= found[-1] < len(self):
                raise ValueError(f"atoms: expected indices from 0 to {len(self) - 1}, got {list(found)}")
        if not found:
            raise ValueError(f"atoms: expected at least one atom of the molecule, got none for {atoms!r}")
        return found

    @cached_property
    def centres(self) -> tuple[tuple[int, int, int, int], ...]:
        """Tetrahedral carbons with at least three heavy neighbours: the centre, then three of these by index.

        Such are CA of every amino acid but glycine, and branches such as CB of valine: whether or not two branches are
        chemically the same, atoms that have an index do not change places. Where there are no hydrogens in the
        topology, CA with a CB and the branched atoms of isoleucine, leucine, threonine and valine are taken by name.
        """
        bare = all(self.heavy(i) for i in range(len(self)))
        found = []
        for atom, around in enumerate(self.neighbours):
            heavy = [i for i in around if self.heavy(i)]
            if self.elements[atom] != "C" or len(heavy) < 3:
                continue
            named = (self.residues[atom], self.names[atom]) in _NAMED_CENTRES or (
                self.names[atom] == "CA" and "CB" in {self.names[i] for i in heavy}
            )
            if len(around) == 4 or (bare and named):
                found.append((atom, heavy[0], heavy[1], heavy[2]))
        return tuple(found)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of elements, atom names, residue names and bonds, as 64 hexadecimal digits."""
        record = self.to_dict()
        del record["numbers"]
        return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def check(self, topology: Any) -> None:
        """Raise `ValueError`, naming the first difference, unless a topology has these atoms and bonds, in order."""
        other = Molecule.of(topology)
        if len(other) != len(self):
            raise ValueError(f"topology: expected {len(self)} atoms, got {len(other)}")
        columns: tuple[tuple[str, Sequence[str], Sequence[str]], ...] = (
            ("element", self.elements, other.elements),
            ("name", self.names, other.names),
            ("residue name", self.residues, other.residues),
        )
        for atom in range(len(self)):
            for what, mine, theirs in columns:
                if mine[atom] != theirs[atom]:
                    raise ValueError(f"topology: expected {what} {mine[atom]!r} of atom {atom}, got {theirs[atom]!r}")
        different = set(self.bonds) ^ set(other.bonds)
        if different:
            i, j = min(different)
            here = f"a bond {self.label(i)} - {self.label(j)} (atoms {i}, {j})"
            if (i, j) in set(self.bonds):
                raise ValueError(f"topology: expected {here}, got none")
            raise ValueError(f"topology: expected no bond between atoms {i} and {j}, got {here}")


def fragments(molecule: Molecule, atoms: Iterable[int]) -> list[list[int]]:
    """Sets of atoms that bonds among them join, each ascending, in the order of their first atoms."""
    left = set(atoms)
    found = []
    for first in sorted(left):
        if first not in left:
            continue
        left.discard(first)
        group = [first]
        for atom in group:
            new = [i for i in molecule.neighbours[atom] if i in left]
            left.difference_update(new)
            group += new
        found.append(sorted(group))
    return found
