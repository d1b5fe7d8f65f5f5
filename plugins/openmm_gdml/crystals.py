"""Symmetry of a periodic supercell as atom permutations: supercell translations x point group.

A symmetry operation of the *reference*, the relaxed, motionless supercell, moves every atom onto the place of another
one of its element, so it is a permutation of atoms. Moving atoms keep that permutation symmetry exactly, whatever the
temperature. This is the group of BIGDML (Sauceda et al., Nat. Commun. 13, 3733 (2022)): a crystal of n cells has n
translations, times its point group (48 for a cubic crystal).

A point defect removes the translations. Two cases differ:

* the defect stays on its site (a vacancy, an adsorbate, an interstitial atom that does not hop within the runs): take
  the symmetry of the relaxed defective supercell, which is the point group of the site;
* the defect hops between equivalent sites: name its atoms as ``mobile``. The group is then that of the host without
  them, translations included, and leaves them where they are in the list. E(p r) = E(r) is exact for these
  permutations, too, but it says only that a hop to another site looks the same; around one site it adds nothing and
  costs a factor of the number of sites.

The permutation q belongs to ``positions[q]``; a group holds its inverses, so either reading of q gives the same set.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_gdml.lattices import minkowski_reduced
from openmm_mlff.data.structures import Structure, formula

if TYPE_CHECKING:
    from ase import Atoms

KINDS = ("full", "translations", "none")
#: angstrom; how far an operation may carry an atom beside the atom that it stands for.
DEFAULT_TOLERANCE = 0.1
#: random elements that a set is multiplied with to see whether it is a group: a set that is none passes each with
#: a probability of at most one half.
GROUP_TRIALS = 64


@dataclass(frozen=True)
class CrystalSymmetry:
    """The permutations of a supercell, and what they were found from.

    Attributes:
        permutations: ``(n, n_atoms)`` int64, the identity first, then in lexical order.
        n_translations: how many of them are pure translations (with the identity).
        kind: 'full', 'translations', 'none' or 'given'.
        space_group: international symbol and number of the reference, e.g. ``'Fm-3m (225)'``; empty if not asked.
        deviation: angstrom; the furthest that an operation carries an atom from the atom that it stands for.
        n_kept_by_rounding: permutations that also keep the distances of the plain minimum-image rule, which rounds
            fractional coordinates; fewer than ``n`` where pairs sit on the surface of the Wigner-Seitz cell.
        reference: the reference, averaged over the group, so that it has the symmetry exactly.
    """

    permutations: np.ndarray
    n_translations: int
    kind: str
    space_group: str
    deviation: float
    n_kept_by_rounding: int
    reference: Structure

    def __len__(self) -> int:
        return len(self.permutations)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # numpy's own protocol, so that the group itself can be passed where permutations are expected
        return np.array(self.permutations, dtype=dtype)

    def inspect(self) -> str:
        """The group in a few lines, for a person."""
        n = len(self)
        lines = [f"{formula(self.reference.numbers)}: {n} permutations ({self.kind})"]
        if n:
            lines.append(f"{self.n_translations} translations x {n / self.n_translations:g} point operations")
        if self.space_group:
            lines.append(f"reference: {self.space_group}, atoms within {self.deviation:.3f} angstrom of the symmetry")
        if self.n_kept_by_rounding < n:
            lines.append(
                f"only {self.n_kept_by_rounding} of them keep the distances of the plain minimum-image rule in this "
                "cell; descriptors that sum over images gain from all"
            )
        return "\n".join(lines)


def symmetry(
    reference: Structure | Atoms | Sequence[Structure],
    kind: str | np.ndarray | Sequence[Sequence[int]] = "full",
    tolerance: float = DEFAULT_TOLERANCE,
    mobile: Iterable[int] = (),
) -> CrystalSymmetry:
    """The symmetry group of a periodic supercell as permutations of its atoms.

    Args:
        reference: the relaxed supercell, with its cell. A list of thermal geometries of one supercell gives their
            mean positions as the reference.
        kind: 'full' (translations x point group), 'translations', 'none' (the identity alone), or permutations
            ``(n, n_atoms)`` of your own, which are checked.
        tolerance: angstrom. mobile: atoms that hop between sites (see the module's text).

    Raises `ValueError` for an open structure, a tolerance that joins different sites, permutations that are no group,
    move an atom onto another element or change the distances of the reference; `ImportError` without spglib.
    """
    ideal = _as_reference(reference)
    assert ideal.cell is not None
    if not (np.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance: expected a positive length in angstrom, got {tolerance}")
    n = len(ideal)
    moving = sorted(set(int(i) for i in mobile))
    if moving and (moving[0] < 0 or moving[-1] >= n or len(moving) == n):
        raise ValueError(f"mobile: expected some of the atoms 0 to {n - 1}, got {moving}")
    host = np.setdiff1d(np.arange(n), moving)
    frozen = Structure(ideal.numbers[host], ideal.positions[host], cell=ideal.cell)
    space_group, translations = "", None
    if isinstance(kind, str):
        if kind not in KINDS:
            raise ValueError(f"symmetry: expected one of {', '.join(KINDS)} or an array, got {kind!r}")
        operations, space_group = _operations(frozen, tolerance) if kind != "none" else ([], "")
        pure = [op for op in operations if np.array_equal(op[0], np.eye(3, dtype=int))]
        found, translations = _permutations(frozen, operations, tolerance), len(pure)
        if kind == "translations":
            found = _permutations(frozen, pure, tolerance)
        if kind == "none":
            found, translations = np.arange(len(frozen))[None], 1
        name = kind
    else:
        found, name = _given(np.asarray(kind), n, host), "given"
    check_group(found)
    permutations = np.tile(np.arange(n), (len(found), 1))
    permutations[:, host] = host[found]
    averaged, deviation = _averaged(frozen, found, tolerance)
    kept = _kept(averaged, found, tolerance)
    if translations is None:
        translations = _count_translations(averaged, found, tolerance)
    positions = ideal.positions.copy()
    positions[host] = averaged.positions
    whole = Structure(ideal.numbers, positions, cell=ideal.cell)
    return CrystalSymmetry(permutations, translations, name, space_group, deviation, kept, whole)


def of_training_data(
    structures: Sequence[Structure],
    kind: str | np.ndarray = "full",
    reference: Structure | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    mobile: Iterable[int] = (),
) -> CrystalSymmetry:
    """The symmetry of the supercell that training geometries come from, checked against them.

    Args:
        structures: thermal geometries of one supercell.
        reference: the relaxed supercell; None takes the mean positions, which some dozens of geometries give well.

    Raises what `symmetry` and `check_displacements` raise.
    """
    moving = list(mobile)
    group = symmetry(structures if reference is None else reference, kind, tolerance, moving)
    check_displacements(group, structures, moving)
    return group


def mean_structure(structures: Sequence[Structure]) -> Structure:
    """Mean positions of thermal geometries of one supercell, with drift and wrapping taken out.

    Atoms may move by less than half a cell vector from where they are in the first geometry. Raises `ValueError` if
    the geometries are open, or differ in atoms or cell.
    """
    if not structures:
        raise ValueError("structures: expected at least one, got none")
    first = structures[0]
    if first.cell is None:
        raise ValueError("lattice: expected a periodic supercell, got an open structure without a cell")
    total = np.zeros_like(first.positions)
    for k, structure in enumerate(structures):
        if not np.array_equal(structure.numbers, first.numbers):
            raise ValueError(f"structures: expected the same atoms in the same order, but {k} differs from 0")
        if structure.cell is None or not np.allclose(structure.cell, first.cell, atol=1e-4):
            raise ValueError(f"structures: expected one cell, but that of structure {k} differs from that of 0")
        step = wrapped(structure.positions - first.positions, first.cell)
        total += step - step.mean(axis=0)
    return Structure(first.numbers, first.positions + total / len(structures), cell=first.cell)


def check_displacements(group: CrystalSymmetry, structures: Sequence[Structure], mobile: Iterable[int] = ()) -> float:
    """The largest displacement from the sites of the reference in angstrom (drift taken out).

    Raises `ValueError` naming the geometry and the atom for an atom that is nearer to another site than to its own:
    it has hopped, or the atoms are not in the order of the reference.
    """
    reference = group.reference
    assert reference.cell is not None
    moving = set(int(i) for i in mobile)
    atoms = np.array([i for i in range(len(reference)) if i not in moving])
    between = shortest(reference.positions[atoms, None] - reference.positions[atoms], reference.cell)
    np.fill_diagonal(between, np.inf)
    nearest = between.min(axis=1)
    largest = 0.0
    for k, structure in enumerate(structures):
        mean_structure([reference, structure])
        step = wrapped(structure.positions - reference.positions, reference.cell)[atoms]
        # the median is not carried away by the atoms that hopped
        step = wrapped(step - np.median(step, axis=0), reference.cell)
        distance = np.linalg.norm(step, axis=1)
        if (distance > nearest / 2).any():
            atom = int(atoms[np.argmax(distance / nearest)])
            raise ValueError(
                f"structures: atom {atom} of structure {k} is {distance.max():.2f} angstrom from its site in the "
                "reference, nearer to another one; name atoms that hop as mobile, or bring the atoms into order"
            )
        largest = max(largest, float(distance.max()))
    return largest


def check_group(permutations: np.ndarray) -> None:
    """Raise `ValueError` unless permutations ``(n, n_atoms)`` are a group (closed, with the identity, none twice)."""
    n, n_atoms = permutations.shape
    if not (np.sort(permutations, axis=1) == np.arange(n_atoms)).all():
        bad = int(np.flatnonzero((np.sort(permutations, axis=1) != np.arange(n_atoms)).any(axis=1))[0])
        raise ValueError(f"permutations: expected every atom once in each row, but row {bad} is no permutation")
    random = np.random.default_rng(0)
    weights = random.integers(1, 2**40, n_atoms)
    marks = np.sort(permutations @ weights)
    if len(np.unique(marks)) != n:
        raise ValueError("permutations: expected each of them once, got repeated ones")
    if np.arange(n_atoms) @ weights not in marks:
        raise ValueError("permutations: expected a group, but the identity is missing")
    trials = np.arange(n) if n <= GROUP_TRIALS else random.choice(n, GROUP_TRIALS, replace=False)
    for k in trials:
        if not np.array_equal(np.sort(permutations[:, permutations[k]] @ weights), marks):
            raise ValueError(
                f"permutations: expected a group, but the product of row {int(k)} with another row is not among them"
            )


# -- geometry ----------------------------------------------------------------------------------------------------


def wrapped(vectors: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Vectors ``(..., 3)`` with fractional coordinates in [-1/2, 1/2], angstrom; ``cell`` has its vectors as rows."""
    fraction = vectors @ np.linalg.inv(cell)
    return (fraction - np.rint(fraction)) @ cell


def shortest(vectors: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Length of the shortest periodic image of vectors ``(..., 3)``, exact also in skewed cells."""
    reduced = minkowski_reduced(cell) @ cell
    base = wrapped(vectors, reduced)
    # in a Minkowski-reduced cell the shortest image is at most one vector away from the wrapped one
    offsets = np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T @ reduced
    squared = np.full(base.shape[:-1], np.inf)
    for offset in offsets:
        np.minimum(squared, np.sum((base + offset) ** 2, axis=-1), out=squared)
    return np.sqrt(squared)


# -- details -----------------------------------------------------------------------------------------------------


def _as_reference(reference: Any) -> Structure:
    if isinstance(reference, Structure):
        reference = [reference]
    if hasattr(reference, "get_atomic_numbers"):
        cell = np.array(reference.get_cell()) if reference.get_pbc().any() else None
        reference = [Structure(reference.get_atomic_numbers(), reference.get_positions(), cell=cell)]
    return mean_structure(list(reference))


def _operations(reference: Structure, tolerance: float) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """Rotations (in fractional coordinates) with translations, and the space group."""
    try:
        import spglib
    except ImportError as error:
        raise ImportError(
            "symmetry: finding the symmetry of a crystal needs spglib: pip install 'openmm-mlff[crystals]'"
        ) from error
    assert reference.cell is not None
    fractions = reference.positions @ np.linalg.inv(reference.cell)
    cell = (reference.cell.tolist(), fractions.tolist(), reference.numbers.tolist())
    try:
        with warnings.catch_warnings():
            # about how spglib itself reports errors, which are handled here
            warnings.simplefilter("ignore", DeprecationWarning)
            found = spglib.get_symmetry(cell, symprec=tolerance)
            name = spglib.get_spacegroup(cell, symprec=tolerance)
    except Exception as error:
        raise ValueError(
            f"reference: spglib finds no symmetry at a tolerance of {tolerance} angstrom ({error})"
        ) from error
    if found is None or name is None:
        raise ValueError(
            f"reference: spglib finds no symmetry at a tolerance of {tolerance} angstrom; atoms may overlap, or the "
            "tolerance may be too large"
        )
    return list(zip(found["rotations"], found["translations"], strict=True)), str(name)


def _permutations(
    reference: Structure, operations: Sequence[tuple[np.ndarray, np.ndarray]], tolerance: float
) -> np.ndarray:
    """``(n, n_atoms)``: the atom on whose place each atom falls, identity first."""
    assert reference.cell is not None
    fractions = reference.positions @ np.linalg.inv(reference.cell)
    found = []
    for rotation, translation in operations:
        moved = (fractions @ rotation.T + translation) @ reference.cell
        # near a multiple of the cell vectors, where a match lies, rounding fractions is exact
        distance = np.linalg.norm(wrapped(moved[:, None] - reference.positions, reference.cell), axis=-1)
        distance[reference.numbers[:, None] != reference.numbers] = np.inf
        image = np.argmin(distance, axis=1)
        furthest = float(distance[np.arange(len(image)), image].max())
        # an operation is found to the tolerance in the primitive cell; in the supercell errors add up
        if len(np.unique(image)) < len(image) or furthest > 3 * tolerance:
            raise ValueError(
                f"reference: an operation found at a tolerance of {tolerance} angstrom misses atoms by "
                f"{furthest:.3f} angstrom; relax the reference, or choose another tolerance"
            )
        found.append(image)
    # several operations can move the atoms alike, as the mirror plane of a flat layer does
    return np.unique(np.array(found, dtype=np.int64).reshape(-1, len(reference)), axis=0)


def _given(permutations: np.ndarray, n_atoms: int, host: np.ndarray) -> np.ndarray:
    if permutations.ndim != 2 or permutations.shape[1] != n_atoms or permutations.dtype.kind not in "iu":
        raise ValueError(
            f"symmetry: expected whole numbers of shape (n_permutations, {n_atoms}), got {permutations.dtype} "
            f"of shape {permutations.shape}"
        )
    check_group(permutations)
    rest = np.setdiff1d(np.arange(n_atoms), host)
    if (permutations[:, rest] != rest).any():
        raise ValueError("mobile: expected permutations that leave the mobile atoms alone")
    inside = np.searchsorted(host, permutations[:, host])
    return np.unique(inside.astype(np.int64), axis=0)


def _averaged(reference: Structure, permutations: np.ndarray, tolerance: float) -> tuple[Structure, float]:
    """The reference averaged over the isometries that the permutations stand for, and the largest deviation."""
    assert reference.cell is not None
    numbers = reference.numbers
    if (numbers[permutations] != numbers).any():
        row = int(np.flatnonzero((numbers[permutations] != numbers).any(axis=1))[0])
        raise ValueError(f"permutations: expected atoms to be moved onto their own element, but row {row} does not")
    total, deviation = np.zeros_like(reference.positions), 0.0
    rotations = _lattice_rotations(reference.cell)
    for q in permutations:
        shift, error = _isometry(reference, q, rotations)
        deviation = max(deviation, error)
        total += shift
    if deviation > 3 * tolerance:
        raise ValueError(
            f"permutations: one of them keeps the reference only to {deviation:.3f} angstrom (tolerance {tolerance}); "
            "relax the reference, choose another tolerance, or leave that permutation out"
        )
    return reference.replace(positions=reference.positions + total / len(permutations)), deviation


def _isometry(reference: Structure, q: np.ndarray, rotations: np.ndarray) -> tuple[np.ndarray, float]:
    """How far the rigid motion that carries ``positions[q]`` onto ``positions`` misses each atom, and the largest miss.

    The motion maps the lattice onto itself, so its rotation is one of `rotations`; the best one is taken.
    """
    assert reference.cell is not None
    difference = reference.positions[q] @ rotations - reference.positions
    miss = wrapped(difference - difference[:, :1], reference.cell)
    miss -= miss.mean(axis=1, keepdims=True)
    largest = np.linalg.norm(miss, axis=2).max(axis=1)
    best = int(np.argmin(largest))
    return miss[best], float(largest[best])


def _lattice_rotations(cell: np.ndarray, tolerance: float = 1e-3) -> np.ndarray:
    """Orthogonal matrices Q (``row @ Q``) that carry the lattice onto itself, ``(n, 3, 3)``."""
    reduced = minkowski_reduced(cell) @ cell
    gram = reduced @ reduced.T
    whole = np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T
    vectors = whole @ reduced
    lengths = np.sum(vectors**2, axis=1)
    close = tolerance * np.diag(gram).max()
    rows = [np.flatnonzero(np.abs(lengths - gram[k, k]) < close) for k in range(3)]
    found = []
    for a in rows[0]:
        for b in rows[1]:
            if abs(vectors[a] @ vectors[b] - gram[0, 1]) > close:
                continue
            for c in rows[2]:
                image = np.array([vectors[a], vectors[b], vectors[c]])
                if np.abs(image @ image.T - gram).max() <= close:
                    found.append(np.linalg.solve(reduced, image))
    return np.array(found)


def _kept(reference: Structure, permutations: np.ndarray, tolerance: float) -> int:
    """How many permutations keep the distances of the rounding rule; `ValueError` if one changes the true ones."""
    assert reference.cell is not None
    between = reference.positions[:, None] - reference.positions
    true, plain = shortest(between, reference.cell), np.linalg.norm(wrapped(between, reference.cell), axis=-1)
    kept = 0
    for row, q in enumerate(permutations):
        error = float(np.abs(true[np.ix_(q, q)] - true).max())
        if error > tolerance:
            raise ValueError(
                f"permutations: expected the distances of the reference to stay the same, but permutation {row} "
                f"changes one by {error:.3f} angstrom"
            )
        kept += bool(np.abs(plain[np.ix_(q, q)] - plain).max() <= tolerance)
    return kept


def _count_translations(reference: Structure, permutations: np.ndarray, tolerance: float) -> int:
    assert reference.cell is not None
    count = 0
    for q in permutations:
        step = reference.positions[q] - reference.positions
        count += bool(np.linalg.norm(wrapped(step - step[0], reference.cell), axis=1).max() <= tolerance)
    return count
