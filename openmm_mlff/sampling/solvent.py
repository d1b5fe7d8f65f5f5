"""new conformation of the solute -> the box of solvent with that conformation in it, and no molecule lost.

A System has a fixed number of solvent molecules. The new solute is put on to the old one; molecules that it overlaps
move, as rigid bodies, into the largest voids of the box, which are those that the old solute left. Minimisation and
dynamics with the solute held (`back_mapping`) then let the solvent close around it.

Units are nm; box vectors are rows in OpenMM's reduced form, so triclinic boxes are as good as others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from openmm import app
from scipy.spatial import cKDTree

from openmm_mlff.sampling.structure_checks import superpose

#: heavy atoms of solvent and solute that are closer than this overlap, nm
OVERLAP = 0.25
#: spacing of the grid on which voids are looked for, nm; the best point is then refined
SPACING = 0.1
#: distances above this are all alike, nm
REACH = 0.6
#: orientations that are tried for every molecule, and voids for molecules of more than one heavy atom
ORIENTATIONS, VOIDS = 24, 8


@dataclass(frozen=True)
class Insertion:
    """The box with the new solute.

    Attributes:
        positions: of all particles, ``(n_particles, 3)`` nm; molecules that were not moved are where they were.
        moved: indices of the solvent molecules that were moved. gap: smallest distance of heavy atoms of a moved
            molecule from all others, nm; infinite if none was moved.
    """

    positions: np.ndarray
    moved: tuple[int, ...]
    gap: float


class SolventBox:
    """Puts conformations of a solute into its solvent.

    Args:
        topology: of the whole box. solute: indices of the solute's atoms.
        superpose: put new conformations on to the old one; False takes them where they are, which is for particles
            in a field, where the place matters.

    Attributes:
        molecules: atom indices of each solvent molecule (everything that is not the solute: water, ions, cosolvents).

    Raises `ValueError` if a molecule belongs to the solute with some of its atoms only.
    """

    def __init__(self, topology: app.Topology, solute: Sequence[int] | np.ndarray, superpose: bool = True) -> None:
        self._superpose = superpose
        self.solute = np.asarray(solute, dtype=np.int64)
        self._n = topology.getNumAtoms()
        elements = [a.element for a in topology.atoms()]
        alone = np.zeros(self._n, dtype=bool)
        for residue in topology.residues():
            alone[[a.index for a in residue.atoms()]] = len(residue) == 1
        # single beads count; sites without an element in a larger molecule are virtual
        self._heavy = np.array([a if e is None else e.atomic_number > 1 for a, e in zip(alone, elements, strict=True)])
        inside = np.zeros(self._n, dtype=bool)
        inside[self.solute] = True
        self.molecules = [m for m in molecules(topology) if not inside[m].all()]
        for m in self.molecules:
            if inside[m].any():
                atom = list(topology.atoms())[int(m[inside[m]][0])]
                raise ValueError(
                    f"solute: expected whole molecules, got {int(inside[m].sum())} of {len(m)} atoms of one "
                    f"({atom.name} of {atom.residue.name} {atom.residue.id} among them)"
                )
        self._fit = np.flatnonzero(self._heavy[self.solute])
        if len(self._fit) == 0:
            self._fit = np.arange(len(self.solute))

    def insert(
        self, positions: np.ndarray, solute: np.ndarray, box: np.ndarray | None, random: np.random.Generator
    ) -> Insertion:
        """Replace the solute by a new conformation.

        Args:
            positions: of all particles, ``(n_particles, 3)`` nm, molecules whole. solute: of the new conformation,
                ``(n_solute, 3)`` nm; unless told otherwise it is superposed on the old one by its heavy atoms.
            box: vectors, ``(3, 3)`` nm; not needed without solvent. random: for orientations.

        Raises `ValueError` for other shapes, or solvent without a box.
        """
        n = len(self.solute)
        if np.shape(solute) != (n, 3) or np.shape(positions) != (self._n, 3):
            raise ValueError(
                f"positions, solute: expected shapes {(self._n, 3)} and {(n, 3)}, got {np.shape(positions)} and "
                f"{np.shape(solute)}"
            )
        placed = np.array(positions, dtype=np.float64)
        new = np.asarray(solute, dtype=np.float64)
        placed[self.solute] = superpose(new, placed[self.solute], self._fit) if self._superpose else new
        if not self.molecules:
            return Insertion(placed, (), float("inf"))
        if box is None:
            raise ValueError("box: expected box vectors around the solvent, got none")
        return self.displace(placed, box, random)

    def displace(self, positions: np.ndarray, box: np.ndarray, random: np.random.Generator) -> Insertion:
        """Move solvent molecules that overlap the solute into the largest voids."""
        placed = positions.copy()
        overlapping = self._overlapping(placed, box)
        if not overlapping:
            return Insertion(placed, (), float("inf"))
        staying = np.ones(self._n, dtype=bool)
        for k in overlapping:
            staying[self.molecules[k]] = False
        voids = _Voids(placed[staying & self._heavy], box)
        gap = float("inf")
        for k in overlapping:
            atoms = self.molecules[k]
            others = Neighbours(placed[staying], box)
            placed[atoms] = self._place(placed[atoms], self._core(atoms), voids, others, random)
            core = placed[atoms[self._core(atoms)]]
            gap = min(gap, float(Neighbours(placed[staying & self._heavy], box).distances(core).min()))
            staying[atoms] = True
            voids.fill(core)
        return Insertion(placed, tuple(overlapping), gap)

    def _overlapping(self, positions: np.ndarray, box: np.ndarray) -> list[int]:
        solute = np.zeros(self._n, dtype=bool)
        solute[self.solute] = True
        near = Neighbours(positions[solute & self._heavy], box)
        close = np.zeros(self._n, dtype=bool)
        outside = np.flatnonzero(~solute & self._heavy)
        close[outside] = near.distances(positions[outside]) < OVERLAP
        return [k for k, atoms in enumerate(self.molecules) if close[atoms].any()]

    def _core(self, atoms: np.ndarray) -> np.ndarray:
        """The heavy atoms of a molecule, or all if it has none, as indices into it."""
        heavy = np.flatnonzero(self._heavy[atoms])
        return heavy if len(heavy) else np.arange(len(atoms))

    def _place(
        self,
        molecule: np.ndarray,
        core: np.ndarray,
        voids: _Voids,
        others: Neighbours,
        random: np.random.Generator,
    ) -> np.ndarray:
        """The molecule with its core's middle in a void, turned so that it is as far from all others as can be."""
        about = molecule - molecule[core].mean(axis=0)
        best, found = -1.0, molecule
        for centre in voids.largest(1 if len(core) == 1 else VOIDS):
            for turn in _rotations(ORIENTATIONS if len(molecule) > 1 else 1, random):
                trial = about @ turn.T + centre
                distance = float(others.distances(trial).min())
                if distance > best:
                    best, found = distance, trial
        return found


class Neighbours:
    """Distances from points to the nearest of some atoms in a periodic box, up to `REACH`."""

    def __init__(self, atoms: np.ndarray, box: np.ndarray) -> None:
        self._box, self._inverse = box, np.linalg.inv(box)
        # distance between opposite faces, in which the margin is measured
        widths = 1.0 / np.linalg.norm(self._inverse, axis=0)
        self.reach = REACH
        turns = np.ceil(self.reach / widths).astype(int)
        inside = self._wrap(atoms)
        images = []
        for shift in itertools.product(*(range(-t, t + 1) for t in turns)):
            fraction = inside + np.array(shift)
            margin = self.reach / widths
            near = ((fraction > -margin) & (fraction < 1.0 + margin)).all(axis=1)
            images.append(fraction[near] @ box)
        self._tree = cKDTree(np.concatenate(images))

    def distances(self, points: np.ndarray) -> np.ndarray:
        """``(n,)`` nm for points ``(n, 3)``; `reach` stands for everything beyond."""
        found, _ = self._tree.query(self._wrap(points) @ self._box, distance_upper_bound=self.reach)
        return np.minimum(found, self.reach)

    def _wrap(self, points: np.ndarray) -> np.ndarray:
        fraction = points @ self._inverse
        return fraction - np.floor(fraction)


class _Voids:
    """Where there is room between heavy atoms, on a grid over the box."""

    def __init__(self, atoms: np.ndarray, box: np.ndarray) -> None:
        self._box, self._atoms = box, atoms
        counts = np.ceil(np.linalg.norm(box, axis=1) / SPACING).astype(int)
        axes = [(np.arange(c) + 0.5) / c for c in counts]
        self._points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3) @ box
        self._room = Neighbours(atoms, box).distances(self._points)

    def largest(self, n: int) -> list[np.ndarray]:
        """Middles of the `n` roomiest voids that are not the same, refined, the best first."""
        room, found = self._room.copy(), []
        near = Neighbours(self._atoms, self._box)
        for _ in range(n):
            k = int(room.argmax())
            if room[k] <= 0.0:
                break
            point = self._refined(self._points[k], near)
            found.append(point)
            room[Neighbours(point[None], self._box).distances(self._points) < OVERLAP] = 0.0
        return found

    def fill(self, atoms: np.ndarray) -> None:
        """Take the room of atoms that have been put somewhere."""
        self._atoms = np.concatenate([self._atoms, atoms])
        self._room = np.minimum(self._room, Neighbours(atoms, self._box).distances(self._points))

    def _refined(self, point: np.ndarray, near: Neighbours) -> np.ndarray:
        steps = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
        for size in (SPACING / 2, SPACING / 4, SPACING / 8, SPACING / 16):
            for _ in range(8):
                trials = point + size * steps
                best = trials[int(near.distances(trials).argmax())]
                if (best == point).all():
                    break
                point = best
        return point


def molecules(topology: app.Topology) -> list[np.ndarray]:
    """Atoms that belong together by bonds or by their residue, each ascending, in the order of their first atoms."""
    parent = list(range(topology.getNumAtoms()))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    together = [(a.index, b.index) for a, b in ((bond[0], bond[1]) for bond in topology.bonds())]
    for residue in topology.residues():
        atoms = [a.index for a in residue.atoms()]
        together += [(atoms[0], i) for i in atoms[1:]]
    for i, j in together:
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    found: dict[int, list[int]] = {}
    for i in range(len(parent)):
        found.setdefault(root(i), []).append(i)
    return [np.array(atoms, dtype=np.int64) for atoms in found.values()]


def _rotations(n: int, random: np.random.Generator) -> np.ndarray:
    """Random rotation matrices ``(n, 3, 3)``, uniform (from unit quaternions); the first is none."""
    q = random.normal(size=(n, 4))
    q[0] = (1.0, 0.0, 0.0, 0.0)
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    return np.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ],
        axis=-1,
    ).reshape(n, 3, 3)  # fmt: skip
