"""positions -> what is wrong with them: clashes, inverted centres, twisted peptide bonds, broken bonds.

Everything is judged against a reference structure of the same molecule: handedness, bond lengths and the sides of the
peptide bonds are those that it has. Positions in nm, molecules whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from openmm import app
from scipy.spatial import cKDTree

from openmm_mlff.analysis.landscapes import chiral_volume
from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.sampling.starts import bond_graph
from openmm_mlff.units import ANGSTROM_PER_NM, NM_PER_ANGSTROM

#: atoms more than three bonds apart clash below this share of the sum of their van der Waals radii: 0.19 nm for two
#: carbons, 0.144 nm for the hydrogen and the oxygen of a hydrogen bond (short ones are 0.16 nm)
CLASH = 0.55
#: a bond is broken where it is longer than this many times its length in the reference
STRETCHED = 1.35
#: a peptide bond is twisted where its torsion is further from the reference's, degrees
TWISTED = 90.0
#: centres whose chiral volume is smaller in the reference are planar (tetrahedral centres have 0.77)
PYRAMIDAL = 0.3


@dataclass(frozen=True)
class Faults:
    """What is wrong with one structure.

    Attributes:
        finite: whether all coordinates are numbers; if not, nothing else was looked at.
        clashes: pairs of atoms that overlap, ``(n, 2)``.
        inverted: centres whose heavy neighbours are the wrong way round. misplaced: centres whose heavy neighbours are
            right, but whose hydrogen is on their side.
        twisted: peptide bonds (carbon, nitrogen) on the wrong side, cis instead of trans or the other way round.
        broken: overstretched bonds, ``(n, 2)``.
    """

    finite: bool
    clashes: np.ndarray
    inverted: tuple[int, ...]
    misplaced: tuple[int, ...]
    twisted: tuple[tuple[int, int], ...]
    broken: np.ndarray

    @property
    def reason(self) -> str:
        """The gravest fault in a word, or an empty text."""
        if not self.finite:
            return "not finite"
        found = (
            ("inverted", self.inverted),
            ("twisted", self.twisted),
            ("broken", self.broken),
            ("misplaced", self.misplaced),
        )
        return next((word for word, faults in found if len(faults)), "clash" if len(self.clashes) else "")

    @property
    def lasting(self) -> str:
        """The gravest fault that minimisation cannot mend, or an empty text."""
        return self.reason if self.reason in ("not finite", "inverted", "twisted") else ""


class StructureChecks:
    """Checks structures of one molecule (or several that are kept together).

    Args:
        topology: of the atoms. Where it has no bonds at all, they are taken from the distances in `reference`.
        reference: a sound structure, ``(n_atoms, 3)`` nm.

    Attributes:
        bonds: ``(n, 2)``. neighbours: of each atom. centres: atoms with a hand. peptides: four atoms of each peptide
            torsion, ``(n, 4)``.

    Raises `ValueError` for a reference of another size, or one that has clashes itself.
    """

    def __init__(self, topology: app.Topology, reference: np.ndarray) -> None:
        from ase.data import vdw_alvarez
        from ase.data.vdw import vdw_radii

        n = topology.getNumAtoms()
        reference = np.asarray(reference, dtype=np.float64)
        if reference.shape != (n, 3) or not np.isfinite(reference).all():
            raise ValueError(f"reference: expected finite positions of shape {(n, 3)}, got shape {reference.shape}")
        elements = [atom.element for atom in topology.atoms()]
        self._numbers = np.array([0 if e is None else e.atomic_number for e in elements])
        self.bonds = _bonds(topology, self._numbers, reference)
        self.neighbours: list[list[int]] = [[] for _ in range(n)]
        for i, j in self.bonds:
            self.neighbours[i].append(int(j))
            self.neighbours[j].append(int(i))
        # beads without an element have no radius, and so no clashes
        radii = np.where(np.isnan(vdw_radii), vdw_alvarez.vdw_radii, vdw_radii)[self._numbers]
        self._radii = np.where(self._numbers > 0, np.nan_to_num(radii, nan=2.0), 0.0) * NM_PER_ANGSTROM
        self._near = self._near_pairs()
        self._lengths = _lengths(reference, self.bonds)
        self._quartets = self._find_centres(reference)
        self._hands = np.sign(_volumes(reference, self._quartets))
        self._all_heavy = (self._numbers[self._quartets] != 1).all(axis=1)
        self.centres = tuple(sorted(set(self._quartets[:, 0].tolist())))
        self.peptides = self._find_peptides()
        self._torsions = dihedral(reference, self.peptides) if len(self.peptides) else np.empty(0)
        clashes = self.clashes(reference)
        if len(clashes):
            i, j = clashes[0]
            raise ValueError(f"reference: expected a structure without clashes, got atoms {i} and {j} in contact")

    def __call__(self, positions: np.ndarray) -> Faults:
        """The faults of positions ``(n_atoms, 3)`` nm."""
        nothing = np.empty((0, 2), dtype=np.int64)
        if not np.isfinite(positions).all():
            return Faults(False, nothing, (), (), (), nothing)
        broken = self.bonds[_lengths(positions, self.bonds) > STRETCHED * self._lengths]
        inverted = self.inverted(positions)
        misplaced = tuple(i for i in self._turned(positions, ~self._all_heavy) if i not in inverted)
        return Faults(True, self.clashes(positions), inverted, misplaced, self.twisted(positions), broken)

    def clashes(self, positions: np.ndarray) -> np.ndarray:
        """Pairs of atoms more than three bonds apart that overlap, ``(n, 2)``."""
        reach = 2.0 * CLASH * self._radii.max(initial=0.0)
        pairs = cKDTree(positions).query_pairs(reach, output_type="ndarray")
        close = _lengths(positions, pairs) < CLASH * self._radii[pairs].sum(axis=1)
        return pairs[close & ~np.isin(self._key(pairs), self._near)]

    def inverted(self, positions: np.ndarray) -> tuple[int, ...]:
        """Centres with at least one triple of heavy neighbours the wrong way round."""
        return self._turned(positions, self._all_heavy)

    def mended(self, positions: np.ndarray) -> np.ndarray:
        """Positions with misplaced hydrogens opposite to the heavy neighbours of their centres, at their distance."""
        made = np.array(positions, dtype=np.float64)
        for i in self(positions).misplaced:
            near = np.array(self.neighbours[i])
            hydrogen = int(near[self._numbers[near] == 1][0])
            away = made[i] - made[near[near != hydrogen]].mean(axis=0)
            made[hydrogen] = made[i] + np.linalg.norm(made[hydrogen] - made[i]) * away / np.linalg.norm(away)
        return made

    def _turned(self, positions: np.ndarray, asked: np.ndarray) -> tuple[int, ...]:
        wrong = asked & ~(self._hands * _volumes(positions, self._quartets) > 0.0)
        return tuple(sorted(set(self._quartets[wrong, 0].tolist())))

    def twisted(self, positions: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Peptide bonds whose torsion is on the other side than the reference's."""
        if len(self.peptides) == 0:
            return ()
        apart = np.abs((dihedral(positions, self.peptides) - self._torsions + 180.0) % 360.0 - 180.0)
        return tuple((int(c), int(n)) for _, c, n, _ in self.peptides[~(apart <= TWISTED)])

    def _key(self, pairs: np.ndarray) -> np.ndarray:
        return pairs.min(axis=1) * len(self._numbers) + pairs.max(axis=1)

    def _near_pairs(self) -> np.ndarray:
        """Keys of the pairs at most three bonds apart, sorted."""
        found = set()
        for i in range(len(self._numbers)):
            reached = {i}
            for _ in range(3):
                reached |= {k for j in reached for k in self.neighbours[j]}
            found |= {(i, j) for j in reached if j > i}
        return np.sort(self._key(np.array(sorted(found), dtype=np.int64).reshape(-1, 2)))

    def _find_centres(self, reference: np.ndarray) -> np.ndarray:
        """Centres with every three of their neighbours, ``(n, 4)``.

        Atoms with four neighbours of which at most one is a hydrogen, and pyramidal carbons with three heavy ones. Two
        equivalent neighbours (the methyl groups of valine) count too: molecular dynamics never exchanges them.
        """
        found = []
        for i, near in enumerate(self.neighbours):
            hydrogens = int(np.sum(self._numbers[near] == 1))
            united = len(near) == 3 and hydrogens == 0 and self._numbers[i] == 6
            if united or (len(near) == 4 and hydrogens <= 1):
                quartets = np.array([(i, *three) for three in itertools.combinations(near, 3)])
                if np.abs(_volumes(reference, quartets)).min() > PYRAMIDAL:
                    found.append(quartets)
        return np.concatenate(found) if found else np.empty((0, 4), dtype=np.int64)

    def _find_peptides(self) -> np.ndarray:
        """Torsions X-C(=O)-N-Y of amides; X and Y are heavy, and the first such neighbours."""
        found = []
        for i, j in np.concatenate([self.bonds, self.bonds[:, ::-1]]):
            c, n = int(i), int(j)
            if (self._numbers[c], self._numbers[n]) != (6, 7) or {len(self.neighbours[k]) for k in (c, n)} != {3}:
                continue
            if not any(self._numbers[o] == 8 and len(self.neighbours[o]) == 1 for o in self.neighbours[c]):
                continue
            before = [k for k in self.neighbours[c] if k != n and self._numbers[k] > 1 and self._numbers[k] != 8]
            after = [k for k in self.neighbours[n] if k != c and self._numbers[k] > 1]
            if before and after:
                found.append((min(before), c, n, min(after)))
        return np.array(sorted(set(found)), dtype=np.int64).reshape(-1, 4)


def superpose(moving: np.ndarray, target: np.ndarray, atoms: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Positions turned (never mirrored) and shifted on to others with the least square distance.

    Kabsch, Acta Cryst. A 32, 922 (1976), with the sign of the smallest singular value against reflections.

    Args:
        moving, target: ``(n, 3)``, one unit. atoms: those that are fitted; None takes all. All atoms are moved.
    """
    chosen = np.arange(len(moving)) if atoms is None else np.asarray(atoms, dtype=np.int64)
    centre, goal = moving[chosen].mean(axis=0), target[chosen].mean(axis=0)
    u, _, vt = np.linalg.svd((moving[chosen] - centre).T @ (target[chosen] - goal))
    proper = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return (moving - centre) @ (u @ proper @ vt) + goal


def rms_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root-mean-square distance of positions ``(n, 3)`` after superposition."""
    return float(np.sqrt(np.mean(np.sum((superpose(a, b) - b) ** 2, axis=1))))


def _bonds(topology: app.Topology, numbers: np.ndarray, reference: np.ndarray) -> np.ndarray:
    named = sorted({tuple(sorted((b[0].index, b[1].index))) for b in topology.bonds()})
    if not named and len(numbers) > 1 and (numbers > 0).all():
        graph = bond_graph(numbers, reference * ANGSTROM_PER_NM)
        return np.argwhere(np.triu(graph)).astype(np.int64)
    return np.array(named, dtype=np.int64).reshape(-1, 2)


def _lengths(positions: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return np.linalg.norm(positions[pairs[:, 0]] - positions[pairs[:, 1]], axis=-1)


def _volumes(positions: np.ndarray, quartets: np.ndarray) -> np.ndarray:
    return chiral_volume(positions[quartets], (0, 1, 2, 3))


def whole(topology: app.Topology, positions: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Positions ``(n, 3)`` with every bonded neighbour at its nearest image, and all parts near the first one.

    Args:
        box: vectors as rows in OpenMM's reduced form, ``(3, 3)``, in the unit of the positions.
    """
    near: list[list[int]] = [[] for _ in range(topology.getNumAtoms())]
    for bond in topology.bonds():
        near[bond[0].index].append(bond[1].index)
        near[bond[1].index].append(bond[0].index)
    made = np.array(positions, dtype=np.float64)
    seen = np.zeros(len(near), dtype=bool)
    middle: np.ndarray | None = None
    for first in range(len(near)):
        if seen[first]:
            continue
        seen[first], part = True, [first]
        for i in part:  # grows while it is read
            for j in near[i]:
                if not seen[j]:
                    seen[j] = True
                    made[j] = made[i] + _nearest_image(made[j] - made[i], box)
                    part.append(j)
        here = made[part].mean(axis=0)
        middle = here if middle is None else middle
        made[part] += middle + _nearest_image(here - middle, box) - here
    return made


def _nearest_image(apart: np.ndarray, box: np.ndarray) -> np.ndarray:
    for k in (2, 1, 0):
        apart = apart - np.rint(apart[k] / box[k, k]) * box[k]
    return apart
