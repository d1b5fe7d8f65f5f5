"""atoms -> beads: where beads are, which forces act on them, and what they are called in files.

A linear bead map puts the beads at ``R = C r``. The mean force on the beads is the average of ``M f`` over the atomic
configurations that share R, for every force map M that is consistent with C (Noid et al., J. Chem. Phys. 128, 244114
(2008); with constraints Ciccotti, Kapral, Vanden-Eijnden, ChemPhysChem 6, 1809 (2005)):

* ``M C^T = 1``: pushing the atoms of bead I as M says moves bead I and no other;
* equal weights of atoms that a constraint joins, so that the push does not strain the constraint, whose force is not
  among the recorded ones.

All of them have the same mean and different noise; the optimised one has the least (Krämer et al., J. Phys. Chem.
Lett. 14, 3970 (2023)).

Units: angstrom, eV, eV/angstrom, amu.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_mlff.data.files import read_arrays, write_arrays

if TYPE_CHECKING:
    from openmm.app import Topology

FORMAT = "openmm-mlff-bead-map-1"
#: how far M C^T may be from the unit matrix, and weights within a constraint group from one another.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class BeadMap:
    """Beads as weighted averages of atoms.

    Attributes:
        names: of the beads, in order. residues: (name, number) of each bead.
        weights: C, ``(n_beads, n_atoms)``; every row sums to one.
        numbers: atomic number where a bead is one atom, else 0.
        masses: ``(n_beads,)`` amu; those of the dynamics (averages over configurations do not depend on them).
        bonds: pairs of beads.

    Raises `ValueError` naming the argument.
    """

    names: tuple[str, ...]
    residues: tuple[tuple[str, int], ...]
    weights: np.ndarray
    numbers: tuple[int, ...]
    masses: np.ndarray
    bonds: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, dtype=np.float64)
        if weights.ndim != 2 or 0 in weights.shape:
            raise ValueError(f"weights: expected shape (n_beads, n_atoms), got {weights.shape}")
        n = len(weights)
        masses = np.asarray(self.masses, dtype=np.float64)
        for name, values in (("names", self.names), ("residues", self.residues), ("numbers", self.numbers)):
            if len(values) != n:
                raise ValueError(f"{name}: expected {n} values, one per bead, got {len(values)}")
        if masses.shape != (n,) or not (masses > 0).all():
            raise ValueError(f"masses: expected {n} positive masses (amu), got {masses.tolist()}")
        wrong = np.flatnonzero(np.abs(weights.sum(1) - 1.0) > TOLERANCE)
        if len(wrong):
            raise ValueError(
                f"weights: expected rows that sum to one, got {weights[wrong[0]].sum():.6g} for bead {wrong[0]} "
                f"({self.names[wrong[0]]})"
            )
        if np.linalg.matrix_rank(weights) < n:
            raise ValueError("weights: expected independent beads, got one that follows from the others")
        for i, j in self.bonds:
            if not (0 <= i < n and 0 <= j < n and i != j):
                raise ValueError(f"bonds: expected pairs of beads from 0 to {n - 1}, got {(i, j)}")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "masses", masses)

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def slice(cls, topology: Topology, atoms: Sequence[int]) -> BeadMap:
        """One bead at each of some atoms, with their names, residues, elements, masses, and bonds between them."""
        wanted = [int(i) for i in atoms]
        all_atoms = list(topology.atoms())
        _check_atoms(wanted, len(all_atoms))
        weights = np.zeros((len(wanted), len(all_atoms)))
        weights[np.arange(len(wanted)), wanted] = 1.0
        kept = [all_atoms[i] for i in wanted]
        if any(a.element is None for a in kept):
            raise ValueError("topology: expected an element for every atom that becomes a bead")
        place = {i: k for k, i in enumerate(wanted)}
        return cls(
            names=tuple(a.name for a in kept),
            residues=tuple((a.residue.name, a.residue.index + 1) for a in kept),
            weights=weights,
            numbers=tuple(a.element.atomic_number for a in kept),
            masses=np.array([a.element.mass._value for a in kept]),
            bonds=_bonds(topology, place),
        )

    @classmethod
    def centre_of_mass(cls, topology: Topology, groups: Mapping[str, Sequence[int]]) -> BeadMap:
        """One bead at the centre of mass of each group of atoms; the mapping names the beads.

        A bead belongs to the residue of its first atom; two beads are bonded where a bond joins their groups.
        """
        all_atoms = list(topology.atoms())
        members = [int(i) for group in groups.values() for i in group]
        _check_atoms(members, len(all_atoms))
        weights = np.zeros((len(groups), len(all_atoms)))
        place: dict[int, int] = {}
        for k, (name, group) in enumerate(groups.items()):
            if len(group) == 0:
                raise ValueError(f"groups: expected at least one atom in bead {name!r}")
            for i in group:
                if all_atoms[i].element is None:
                    raise ValueError(f"topology: expected an element for every atom of a bead, got none for atom {i}")
                weights[k, i] = all_atoms[i].element.mass._value
                place[int(i)] = k
        masses = weights.sum(1)
        first = [all_atoms[int(group[0])] for group in groups.values()]
        single = [len(group) == 1 for group in groups.values()]
        return cls(
            names=tuple(groups),
            residues=tuple((a.residue.name, a.residue.index + 1) for a in first),
            weights=weights / masses[:, None],
            numbers=tuple(a.element.atomic_number if one else 0 for a, one in zip(first, single, strict=True)),
            masses=masses,
            bonds=_bonds(topology, place),
        )

    def positions(self, atoms: np.ndarray) -> np.ndarray:
        """``(..., n_atoms, 3)`` -> ``(..., n_beads, 3)``, molecules whole; `ValueError` for another number of atoms."""
        return _apply(self.weights, atoms, "atoms")

    def topology(self) -> Topology:
        """The beads as an OpenMM topology in one chain; beads that are no single atom have no element."""
        from openmm import app

        topology = app.Topology()
        chain = topology.addChain()
        atoms, residue, current = [], None, None
        for name, place, z in zip(self.names, self.residues, self.numbers, strict=True):
            if residue is None or place != current:
                residue, current = topology.addResidue(place[0], chain, str(place[1])), place
            element = app.Element.getByAtomicNumber(z) if z else None
            atoms.append(topology.addAtom(name, element, residue))
        for i, j in self.bonds:
            topology.addBond(atoms[i], atoms[j])
        return topology


def _check_atoms(atoms: Sequence[int], n_atoms: int) -> None:
    if not atoms:
        raise ValueError("atoms: expected at least one, got none")
    if len(set(atoms)) != len(atoms):
        repeated = next(i for k, i in enumerate(atoms) if i in atoms[:k])
        raise ValueError(f"atoms: expected every atom in one bead at most, got {repeated} more than once")
    if min(atoms) < 0 or max(atoms) >= n_atoms:
        raise ValueError(f"atoms: expected indices from 0 to {n_atoms - 1}, got {min(atoms)} to {max(atoms)}")


def _bonds(topology: Topology, place: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    found = set()
    for a, b in topology.bonds():
        i, j = place.get(a.index), place.get(b.index)
        if i is not None and j is not None and i != j:
            found.add((min(i, j), max(i, j)))
    return tuple(sorted(found))


def _apply(matrix: np.ndarray, values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim < 2 or values.shape[-1] != 3 or values.shape[-2] != matrix.shape[1]:
        raise ValueError(f"{name}: expected shape (..., {matrix.shape[1]}, 3), got {values.shape}")
    return np.einsum("ba,...ax->...bx", matrix, values.astype(np.float64, copy=False), optimize=True)


# -- forces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForceMap:
    """Forces on beads as weighted sums of forces on atoms.

    Attributes:
        weights: M, ``(n_beads, n_atoms)``. kind: how it was made, for the record.
    """

    weights: np.ndarray
    kind: str = "given"

    def forces(self, atoms: np.ndarray) -> np.ndarray:
        """``(..., n_atoms, 3)`` -> ``(..., n_beads, 3)``, in the unit of the input."""
        return _apply(self.weights, atoms, "atoms")

    def check(self, beads: BeadMap, constraints: Iterable[tuple[int, int]] = ()) -> None:
        """Raise `ValueError` naming beads and atoms unless this map gives the mean force on the beads."""
        if self.weights.shape != beads.weights.shape:
            raise ValueError(f"weights: expected shape {beads.weights.shape}, got {self.weights.shape}")
        product = self.weights @ beads.weights.T
        off = np.abs(product - np.eye(len(beads)))
        if off.max() > TOLERANCE:
            i, j = np.unravel_index(off.argmax(), off.shape)
            raise ValueError(
                f"weights: the push on bead {i} ({beads.names[i]}) moves bead {j} ({beads.names[j]}) by "
                f"{product[i, j]:.6g}, expected {float(i == j):g}; this is no force map for these beads"
            )
        for group in constraint_groups(beads.weights.shape[1], constraints):
            part = self.weights[:, group]
            bead = int(np.ptp(part, axis=1).argmax())
            if np.ptp(part[bead]) > TOLERANCE:
                a, b = group[int(part[bead].argmax())], group[int(part[bead].argmin())]
                raise ValueError(
                    f"weights: bead {bead} ({beads.names[bead]}) takes {part[bead].max():.4g} of the force on atom {a} "
                    f"but {part[bead].min():.4g} of that on atom {b}, which a constraint joins to it; the constraint "
                    "force is not among the forces, so the mean would be wrong: use basic_force_map or "
                    "optimised_force_map"
                )


def constraint_groups(n_atoms: int, constraints: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Sets of atoms that constraints join, directly or in turn; every atom is in exactly one, in ascending order."""
    parent = list(range(n_atoms))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i] = parent[parent[i]]
        return i

    for a, b in constraints:
        if not (0 <= a < n_atoms and 0 <= b < n_atoms and a != b):
            raise ValueError(f"constraints: expected pairs of atoms from 0 to {n_atoms - 1}, got {(a, b)}")
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(n_atoms):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def slice_force_map(beads: BeadMap) -> ForceMap:
    """``(C C^T)^-1 C``, for beads that are atoms the force on those atoms.

    Without constraints only: with them it leaves out the force on the constrained partners and is biased
    (`ForceMap.check` refuses it).
    """
    return ForceMap(np.linalg.solve(beads.weights @ beads.weights.T, beads.weights), "slice")


def basic_force_map(beads: BeadMap, constraints: Iterable[tuple[int, int]]) -> ForceMap:
    """The force on the bead's own atoms and on all that constraints join to them.

    Raises `ValueError` if a constraint joins atoms of two beads, or if the result is no force map for these beads.
    """
    groups = constraint_groups(beads.weights.shape[1], constraints)
    _refuse_shared(beads, groups)
    weights = np.zeros_like(beads.weights)
    for group in groups:
        used = np.flatnonzero((beads.weights[:, group] != 0).any(axis=1))
        weights[np.ix_(used, np.array(group))] = 1.0
    made = ForceMap(weights, "basic")
    made.check(beads, [(g[0], i) for g in groups for i in g[1:]])
    return made


def _refuse_shared(beads: BeadMap, groups: Sequence[Sequence[int]]) -> None:
    for group in groups:
        used = np.flatnonzero((beads.weights[:, group] != 0).any(axis=1))
        if len(used) > 1:
            i, j = int(used[0]), int(used[1])
            raise ValueError(
                f"beads: beads {i} ({beads.names[i]}) and {j} ({beads.names[j]}) hold atoms that constraints join "
                f"({group}); no force moves one without the other. Take both into one bead, or simulate without "
                "these constraints"
            )


class ForceCovariance:
    """Sums that the optimised map needs, gathered over any number of frames.

    Attributes:
        groups: atoms joined by constraints (`constraint_groups`). frames: how many were added.
    """

    def __init__(self, n_atoms: int, constraints: Iterable[tuple[int, int]] = ()) -> None:
        self.groups = constraint_groups(n_atoms, constraints)
        self.indicator = np.zeros((n_atoms, len(self.groups)))
        for k, group in enumerate(self.groups):
            self.indicator[group, k] = 1.0
        self.frames = 0
        self._sum = np.zeros((len(self.groups), len(self.groups)))

    def add(self, forces: np.ndarray) -> None:
        """Add frames ``(n, n_atoms, 3)``."""
        grouped = _apply(self.indicator.T, forces, "forces")
        if not np.isfinite(grouped).all():
            raise ValueError("forces: expected finite numbers, got NaN or infinity")
        flat = np.moveaxis(grouped, -2, 0).reshape(len(self.groups), -1)
        self._sum += flat @ flat.T
        self.frames += int(np.prod(grouped.shape[:-2]))

    @property
    def matrix(self) -> np.ndarray:
        """<F_g F_h>, the mean over frames of the scalar products of group forces, ``(n_groups, n_groups)``."""
        if self.frames == 0:
            raise ValueError("forces: expected at least one frame, got none")
        return self._sum / self.frames


def optimised_force_map(beads: BeadMap, covariance: ForceCovariance, regularisation: float = 1e-6) -> ForceMap:
    """The force map with the least mean square <|M f|^2>, in closed form.

    With a weight per constraint group the problem is quadratic with equality constraints only: W = Q^-1 A^T
    (A Q^-1 A^T)^-1, Q the covariance of group forces and A the bead map summed within groups. Q is singular where the
    total force vanishes (no solvent, or an implicit one), so a small multiple of the group sizes is added.

    Args:
        regularisation: in units of the mean diagonal element of Q.

    Raises `ValueError` if constraints join atoms of two beads.
    """
    if len(covariance.indicator) != beads.weights.shape[1]:
        raise ValueError(f"covariance: expected {beads.weights.shape[1]} atoms, got {len(covariance.indicator)}")
    if not regularisation > 0:
        raise ValueError(f"regularisation: expected a positive number, got {regularisation!r}")
    _refuse_shared(beads, covariance.groups)
    q = covariance.matrix
    n = len(q)
    sizes = np.array([len(g) for g in covariance.groups], dtype=float)
    q = q + regularisation * np.trace(q) / n * np.diag(sizes)
    a = beads.weights @ covariance.indicator
    q_inverse_a = np.linalg.solve(q, a.T)
    w = q_inverse_a @ np.linalg.inv(a @ q_inverse_a)
    made = ForceMap((covariance.indicator @ w).T, "optimised")
    made.check(beads, [(g[0], i) for g in covariance.groups for i in g[1:]])
    return made


def constraints_of(system: Any) -> list[tuple[int, int]]:
    """Pairs of particles that an `openmm.System` constrains."""
    return [tuple(system.getConstraintParameters(i)[:2]) for i in range(system.getNumConstraints())]


# -- files -----------------------------------------------------------------------------------------------------------


def save_maps(
    path: str | Path, beads: BeadMap, forces: ForceMap, temperature: float, info: Mapping[str, Any] | None = None
) -> None:
    """Write both maps beside the data that they belong to (safetensors).

    Args:
        temperature: kelvin, of the data; a mean force belongs to one temperature. info: anything else, plain data.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number (K), got {temperature!r}")
    forces.check(beads)
    header = {
        "names": beads.names,
        "residues": beads.residues,
        "numbers": beads.numbers,
        "bonds": beads.bonds,
        "force_map": forces.kind,
        "temperature": temperature,
        "units": {"length": "angstrom", "energy": "eV", "mass": "amu"},
        "info": dict(info or {}),
    }
    tensors = {"bead_weights": beads.weights, "force_weights": forces.weights, "masses": beads.masses}
    write_arrays(path, FORMAT, {name: np.asarray(value, dtype=np.float64) for name, value in tensors.items()}, header)


def load_maps(path: str | Path) -> tuple[BeadMap, ForceMap, float]:
    """Bead map, force map and temperature (K) that `save_maps` wrote; `ValueError` for another kind of file."""
    header, tensors = read_arrays(path, FORMAT, "a bead map")
    beads = BeadMap(
        names=tuple(header["names"]),
        residues=tuple((name, int(number)) for name, number in header["residues"]),
        weights=tensors["bead_weights"],
        numbers=tuple(header["numbers"]),
        masses=tensors["masses"],
        bonds=tuple((int(i), int(j)) for i, j in header["bonds"]),
    )
    return beads, ForceMap(tensors["force_weights"], header["force_map"]), float(header["temperature"])
