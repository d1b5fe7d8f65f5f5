"""Descriptors beside inverse distances: powers of distances, the Coulomb matrix, and distances with dihedral angles.

All are functions of positions alone (`descriptors`); what they need besides are options, which the model file keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from openmm_gdml.descriptors import inverse_distances, pair_indices, pair_vectors, register

INVERSE_POWERS = "inverse_powers"
COULOMB_MATRIX = "coulomb_matrix"
DISTANCES_AND_DIHEDRALS = "distances_and_dihedrals"


def inverse_powers(positions: Tensor, lattice: Tensor | None = None, power: float = 2.0) -> Tensor:
    """1/|r_i - r_j|^power of every pair, ``(..., N, 3)`` angstrom -> ``(..., D)``.

    Raises `ValueError` for a power that is not positive.
    """
    return _power(pair_vectors(positions, lattice), power)[0]


def inverse_power_gradients(
    positions: Tensor, lattice: Tensor | None = None, power: float = 2.0
) -> tuple[Tensor, Tensor]:
    """`inverse_powers` and g = -dx_k/dr_i ``(..., D, 3)``, in closed form."""
    vectors = pair_vectors(positions, lattice)
    x, slope = _power(vectors, power)
    return x, slope[..., None] * vectors


def coulomb_matrix(
    positions: Tensor, lattice: Tensor | None = None, numbers: Sequence[int] = (), power: float = 1.0
) -> Tensor:
    """Z_i Z_j / |r_i - r_j|^power of every pair, ``(..., N, 3)`` angstrom -> ``(..., D)``.

    The elements below the diagonal of the Coulomb matrix (Rupp, Tkatchenko, Mueller, von Lilienfeld, Phys. Rev. Lett.
    108, 058301 (2012)) in the order of the atoms; its diagonal, Z^2.4 / 2, does not depend on positions.

    Args:
        numbers: atomic numbers Z, ``(N,)``.

    Raises `ValueError` for a power that is not positive, or another number of atoms.
    """
    weights = _charge_products(numbers, positions)
    return weights * _power(pair_vectors(positions, lattice), power)[0]


def coulomb_matrix_gradients(
    positions: Tensor, lattice: Tensor | None = None, numbers: Sequence[int] = (), power: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`coulomb_matrix` and g = -dx_k/dr_i ``(..., D, 3)``, in closed form."""
    weights, vectors = _charge_products(numbers, positions), pair_vectors(positions, lattice)
    x, slope = _power(vectors, power)
    return weights * x, (weights * slope)[..., None] * vectors


def _power(vectors: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """r^-p and p r^-(p+2)."""
    if not 0 < power < float("inf"):
        raise ValueError(f"power: expected a positive number, got {power!r}")
    square = vectors.square().sum(-1)
    x = square ** (-0.5 * power)
    return x, power * x / square


def _charge_products(numbers: Sequence[int], positions: Tensor) -> Tensor:
    if len(numbers) != positions.shape[-2]:
        raise ValueError(
            f"numbers: expected the atomic numbers of {positions.shape[-2]} atoms in the options of the descriptor "
            f"{COULOMB_MATRIX!r}, got {len(numbers)}"
        )
    z = torch.tensor([float(n) for n in numbers], dtype=positions.dtype, device=positions.device)
    i, j = (index.to(positions.device) for index in pair_indices(len(numbers)))
    return z[i] * z[j]


def distances_and_dihedrals(
    positions: Tensor,
    quadruples: Sequence[Sequence[int]] | None = None,
    dihedral_weight: float = 0.5,
    distance_weight: float = 1.0,
) -> Tensor:
    """Inverse distances of all pairs, then two numbers for each dihedral angle, ``(..., N, 3)`` -> ``(..., D + 2 Q)``.

    Distances alone cannot tell a molecule from its mirror image; the sine of a dihedral angle can. With the angles t1
    at atom j and t2 at atom k of the quadruple (i, j, k, l), the two numbers are weight * sin t1 sin t2 cos phi and
    weight * sin t1 sin t2 sin phi: unlike cos phi and sin phi they are smooth where three atoms lie on a line. phi is
    zero for cis and has the sign of IUPAC. A quadruple (centre, a, b, c) of three neighbours of one atom is an improper
    dihedral and gives the handedness of the centre.

    Args:
        quadruples: Q rows of four atoms; None takes all of consecutive atoms, (0, 1, 2, 3), (1, 2, 3, 4), ...
        dihedral_weight, distance_weight: of the two kinds, in units of the descriptor (1/angstrom for distances).

    Raises `ValueError` for quadruples that are not four different atoms.
    """
    n = positions.shape[-2]
    rows = [(i, i + 1, i + 2, i + 3) for i in range(n - 3)] if quadruples is None else [tuple(q) for q in quadruples]
    for q in rows:
        if len(q) != 4 or len(set(q)) != 4 or not all(isinstance(a, int) and 0 <= a < n for a in q):
            raise ValueError(f"quadruples: expected four different atoms from 0 to {n - 1} in each, got {list(q)}")
    x = distance_weight * inverse_distances(positions)
    if not rows:
        return x
    i, j, k, last = (positions[..., list(atoms), :] for atoms in zip(*rows, strict=True))
    b1, b2, b3 = (_unit(v) for v in (j - i, k - j, last - k))
    first, second = torch.linalg.cross(b1, b2), torch.linalg.cross(b2, b3)
    cosine, sine = (first * second).sum(-1), (b1 * second).sum(-1)
    return torch.cat([x, dihedral_weight * cosine, dihedral_weight * sine], -1)


def _unit(v: Tensor) -> Tensor:
    return v * v.square().sum(-1, keepdim=True).rsqrt()


def bonded_quadruples(bonds: Iterable[tuple[int, int]], n_atoms: int, impropers: bool = True) -> list[list[int]]:
    """Quadruples of a bond graph for `distances_and_dihedrals`: proper dihedrals i-j-k-l, each once, and impropers.

    Args:
        bonds: pairs of atoms. impropers: add (centre, a, b, c) for the first three neighbours of every branched atom.

    Raises `ValueError` for bonds between atoms that are not there.
    """
    neighbours: dict[int, set[int]] = {a: set() for a in range(n_atoms)}
    for a, b in bonds:
        if a == b or not (0 <= a < n_atoms and 0 <= b < n_atoms):
            raise ValueError(f"bonds: expected pairs of different atoms from 0 to {n_atoms - 1}, got {(a, b)}")
        neighbours[int(a)].add(int(b))
        neighbours[int(b)].add(int(a))
    proper = {
        (i, j, k, last)
        for j in range(n_atoms)
        for k in neighbours[j]
        if j < k
        for i, last in itertools.product(neighbours[j] - {k}, neighbours[k] - {j})
        if i != last
    }
    centres = [c for c in range(n_atoms) if impropers and len(neighbours[c]) > 2]
    return [list(q) for q in sorted(proper)] + [[c, *sorted(neighbours[c])[:3]] for c in centres]


register(INVERSE_POWERS, inverse_powers, inverse_power_gradients)
register(COULOMB_MATRIX, coulomb_matrix, coulomb_matrix_gradients)
register(DISTANCES_AND_DIHEDRALS, distances_and_dihedrals)
