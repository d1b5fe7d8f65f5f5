"""Permutations of equal atoms that leave a molecule's energy as it is, found from its bonds.

Every permutation of equal nuclei is a symmetry of the energy, but only those help a model that lead from geometries in
the training data to others that can occur there. A permutation is taken if

* it keeps the bonds (an automorphism of the bond graph with its elements), and
* it keeps the handedness of all centres that the data never invert, or reverses it at all of them: then it is a
  rotation of parts of the molecule, or such a rotation with a mirror image, which distances cannot tell apart, and
* it keeps what is cis and trans about bonds that the data never turn and that are too short to turn.

So three hydrogens of a methyl group rotate but are not exchanged in pairs, unless everything else is mirrored as well:
27 permutations of capped alanine (three methyl groups, one stereo centre), 6 of ethanol, 12 of toluene. The set is a
group, because products of such permutations are such permutations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from openmm_mlff.data.structures import SYMBOLS, Structure, formula

#: two atoms are bonded if nearer than this many sums of their covalent radii, in more than half of the geometries.
BOND = 1.25
#: bonds between flat centres that are shorter than this many sums of covalent radii do not turn by themselves.
STIFF = 0.95
#: a sign that this share of the geometries has is a property of the molecule.
CONSTANT = 0.95
#: sine of the angle out of the plane from which a centre with three neighbours has a handedness.
FLAT = 0.15
LIMIT = 5000


@dataclass(frozen=True)
class MoleculeSymmetry:
    """Permutations of a molecule's equal atoms.

    Attributes:
        group: ``(S, N)`` int64, the identity first; row p belongs to ``positions[p]``.
        numbers: atomic numbers ``(N,)``. bonds: pairs that the permutations keep, ``(n, 2)``.
        n_rotations: how many keep the handedness of every centre; the rest mirror the molecule as well.
        centres: atoms whose handedness the data never invert.
    """

    group: np.ndarray
    numbers: np.ndarray
    bonds: np.ndarray
    n_rotations: int
    centres: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.group)

    @property
    def orbits(self) -> list[list[int]]:
        """Atoms that are exchanged with one another, in sets of at least two."""
        first = [int(column.min()) for column in self.group.T]
        sets = [[i for i, f in enumerate(first) if f == k] for k in sorted(set(first))]
        return [s for s in sets if len(s) > 1]

    def inspect(self) -> str:
        """The group in a few lines, for a person."""
        mirrored = len(self.group) - self.n_rotations
        lines = [f"{formula(self.numbers)}: {len(self.group)} permutations"]
        lines[0] += f" ({self.n_rotations} rotations, {mirrored} with a mirror image)" if mirrored else ""
        lines += ["equal atoms: " + ", ".join(f"{SYMBOLS[self.numbers[i]]}{i}" for i in orbit) for orbit in self.orbits]
        return "\n".join(lines)


def find(structures: Sequence[Structure], bonds: np.ndarray | None = None, limit: int = LIMIT) -> MoleculeSymmetry:
    """The permutations described above.

    Args:
        structures: geometries of one open molecule in one order of atoms; the more they move, the more is known about
            what turns and inverts.
        bonds: pairs of atoms ``(n, 2)``; None finds them by covalent radii.
        limit: permutations at most.

    Raises `ValueError` for no structures, periodic ones, wrong bonds, or a group larger than `limit` (pass
    permutations of your own then).
    """
    if not structures:
        raise ValueError("structures: expected at least one geometry, got none")
    if structures[0].cell is not None:
        raise ValueError("structures: expected an open molecule, got a periodic structure (see openmm_gdml.crystals)")
    numbers = structures[0].numbers
    positions = np.stack([s.positions for s in structures])
    pairs = find_bonds(numbers, positions) if bonds is None else _checked_bonds(bonds, len(numbers))
    shape = _Shape(numbers, positions, pairs)
    rotations = _collect(shape, +1, limit, [])
    group = np.array(_collect(shape, -1, limit, rotations), dtype=np.int64)
    identity = (group == np.arange(len(numbers))).all(1)
    group = np.concatenate([group[identity], group[~identity]])
    return MoleculeSymmetry(group, numbers, pairs, len(rotations), tuple(shape.centres))


def find_bonds(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Pairs ``(n, 2)`` of atoms that are bonded in more than half of the geometries ``(n_geometries, N, 3)``."""
    reach = BOND * _radii_sum(numbers)
    near = np.zeros(reach.shape)
    for r in positions:
        near += np.linalg.norm(r[:, None] - r, axis=-1) < reach
    return np.argwhere(np.triu(near > 0.5 * len(positions), k=1))


def validate(permutations: np.ndarray | Sequence[Sequence[int]], numbers: np.ndarray) -> np.ndarray:
    """Permutations of one's own as ``(S, N)`` int64.

    Raises `ValueError` for another shape, rows that are no permutations or exchange different elements, permutations
    that occur twice, or a set that is no group.
    """
    n = len(numbers)
    found = np.asarray(permutations)
    if found.ndim != 2 or found.shape[1] != n or not len(found) or found.dtype.kind not in "iu":
        raise ValueError(f"permutations: expected whole numbers of shape (S, {n}), got {found.dtype} {found.shape}")
    found = found.astype(np.int64)
    wrong = (np.sort(found, axis=1) != np.arange(n)).any(1)
    if wrong.any():
        raise ValueError(f"permutations: expected each of 0 to {n - 1} once, row {int(wrong.argmax())} has not")
    wrong = (numbers[found] != numbers).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        atom = int((numbers[found[row]] != numbers).argmax())
        raise ValueError(
            f"permutations: row {row} puts {SYMBOLS[numbers[found[row, atom]]]}{found[row, atom]} in the place of "
            f"{SYMBOLS[numbers[atom]]}{atom}; expected equal elements"
        )
    known = {row.tobytes() for row in found}
    if len(known) < len(found):
        raise ValueError("permutations: expected different rows, got some of them twice")
    for p in found:
        missing = next((q for q in found if p[q].tobytes() not in known), None)
        if missing is not None:
            raise ValueError(
                f"permutations: expected a group, but the product of {p.tolist()} and {missing.tolist()} is missing"
            )
    return found


# -- what a permutation has to keep --------------------------------------------------------------------------------


class _Shape:
    """Bonds, handedness and cis/trans of a molecule, as its geometries show them."""

    def __init__(self, numbers: np.ndarray, positions: np.ndarray, bonds: np.ndarray) -> None:
        self.numbers, self.positions = numbers, positions
        self.neighbors: list[list[int]] = [[] for _ in numbers]
        for i, j in bonds:
            self.neighbors[i].append(int(j))
            self.neighbors[j].append(int(i))
        self._hands: dict[tuple[int, ...], int] = {}
        self._sides: dict[tuple[int, ...], int] = {}
        degree = [len(k) for k in self.neighbors]
        self.centres = [a for a, k in enumerate(self.neighbors) if len(k) in (3, 4) and self.hand(a, tuple(k[:3]))]
        radii = _radii_sum(numbers)
        lengths = {
            (int(i), int(j)): np.linalg.norm(positions[:, i] - positions[:, j], axis=-1).mean() for i, j in bonds
        }
        stiff = [(i, j) for (i, j), length in lengths.items() if length < STIFF * radii[i, j]]
        flat = set(range(len(numbers))) - set(self.centres)
        self.torsions = [
            (a, i, j, b)
            for i, j in stiff
            if {i, j} <= flat and degree[i] in (2, 3) and degree[j] in (2, 3)
            for a in self.neighbors[i]
            if a != j
            for b in self.neighbors[j]
            if b not in (i, a)
        ]

    def hand(self, a: int, around: tuple[int, ...]) -> int:
        """+1 or -1 if three neighbours stand around an atom in one sense in the data, else 0."""
        key = (a, *around)
        if key not in self._hands:
            u = self.positions[:, around, :] - self.positions[:, a, None]
            u /= np.linalg.norm(u, axis=-1, keepdims=True)
            self._hands[key] = _constant_sign(np.linalg.det(u), FLAT)
        return self._hands[key]

    def side(self, a: int, i: int, j: int, b: int) -> int:
        """+1 if a and b are always cis about the bond i-j, -1 if always trans, else 0."""
        key = (a, i, j, b)
        if key not in self._sides:
            along = self.positions[:, j] - self.positions[:, i]
            along /= np.linalg.norm(along, axis=-1, keepdims=True)
            u, v = self.positions[:, a] - self.positions[:, i], self.positions[:, b] - self.positions[:, j]
            u, v = (w - (w * along).sum(-1, keepdims=True) * along for w in (u, v))
            self._sides[key] = _constant_sign((u * v).sum(-1), 0.0)
        return self._sides[key]

    def keeps(self, p: Sequence[int], atom: int, sense: int) -> bool:
        """Whether what is complete with this atom's image is kept; images not known yet are -1."""
        for a in (atom, *self.neighbors[atom]):
            if a not in self.centres or p[a] < 0 or any(p[k] < 0 for k in self.neighbors[a]):
                continue
            around = tuple(self.neighbors[a][:3])
            image = self.hand(p[a], tuple(p[k] for k in around))
            if image and image != sense * self.hand(a, around):
                return False
        return True

    def keeps_sides(self, p: Sequence[int]) -> bool:
        """Whether cis stays cis and trans stays trans."""
        for torsion in self.torsions:
            here, there = self.side(*torsion), self.side(*(p[k] for k in torsion))
            if here and there and here != there:
                return False
        return True


def _collect(shape: _Shape, sense: int, limit: int, known: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Permutations that keep (+1) or reverse (-1) every handedness, with those `known`."""
    found = list(known)
    seen = set(known)
    for p in _automorphisms(shape, sense):
        if p in seen or not shape.keeps_sides(p):
            continue
        found.append(p)
        if len(found) > limit:
            raise ValueError(
                f"permutations: {formula(shape.numbers)} has more than {limit}, which makes a model slow; pass those "
                "that matter most, or None, or raise the limit"
            )
    return found


def _automorphisms(shape: _Shape, sense: int) -> Iterator[tuple[int, ...]]:
    """All permutations of equal atoms that keep the bonds and, with the sense, the handedness, by backtracking."""
    n = len(shape.numbers)
    order = _connected_order(shape.neighbors)
    bonded = [set(k) for k in shape.neighbors]
    colours = _colours(shape)
    image, used = [-1] * n, [False] * n

    def extend(depth: int) -> Iterator[tuple[int, ...]]:
        if depth == n:
            yield tuple(image)
            return
        atom = order[depth]
        placed = [k for k in shape.neighbors[atom] if image[k] >= 0]
        candidates = bonded[image[placed[0]]] if placed else range(n)
        for target in sorted(candidates):
            if used[target] or colours[target] != colours[atom]:
                continue
            if any(image[k] not in bonded[target] for k in placed):
                continue
            image[atom], used[target] = target, True
            if shape.keeps(image, atom, sense):
                yield from extend(depth + 1)
            image[atom], used[target] = -1, False

    yield from extend(0)


def _colours(shape: _Shape) -> list[int]:
    """A number for every atom that symmetry keeps: its element, refined by those of its neighbours until it settles."""
    colours = [int(z) for z in shape.numbers]
    while True:
        signatures = [(colours[i], tuple(sorted(colours[k] for k in near))) for i, near in enumerate(shape.neighbors)]
        ranks = {s: r for r, s in enumerate(sorted(set(signatures)))}
        refined = [ranks[s] for s in signatures]
        if len(ranks) == len(set(colours)):
            return refined
        colours = refined


def _connected_order(neighbors: list[list[int]]) -> list[int]:
    """Atoms such that each one, where possible, follows a neighbour; ends before chains, so that checks come early."""
    order: list[int] = []
    seen: set[int] = set()
    for start in sorted(range(len(neighbors)), key=lambda i: -len(neighbors[i])):
        stack = [start]
        while stack:
            atom = stack.pop()
            if atom in seen:
                continue
            seen.add(atom)
            order.append(atom)
            stack.extend(sorted((k for k in neighbors[atom] if k not in seen), key=lambda k: -len(neighbors[k])))
    return order


def _constant_sign(values: np.ndarray, least: float) -> int:
    for sign in (1, -1):
        if (sign * values > least).mean() >= CONSTANT:
            return sign
    return 0


def _radii_sum(numbers: np.ndarray) -> np.ndarray:
    from ase.data import covalent_radii

    radii = covalent_radii[numbers]
    return radii[:, None] + radii


def _checked_bonds(bonds: np.ndarray, n: int) -> np.ndarray:
    pairs = np.asarray(bonds)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise ValueError(f"bonds: expected pairs of atoms, shape (n, 2), got {pairs.dtype} {pairs.shape}")
    if len(pairs) and (pairs.min() < 0 or pairs.max() >= n or (pairs[:, 0] == pairs[:, 1]).any()):
        raise ValueError(f"bonds: expected pairs of different atoms from 0 to {n - 1}, got {pairs.tolist()}")
    return pairs.astype(np.int64)
