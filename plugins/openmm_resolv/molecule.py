"""Which atoms hang together: an implicit solvent surrounds one molecule."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from openmm_mlff.data.structures import formula

#: times the sum of two covalent radii: longer than any bond of a molecule that vibrates, shorter than any contact
#: (C-C 2.3 angstrom, O-H 1.5 angstrom, Cl-Cl 3.1 angstrom)
LONGEST_BOND = 1.5


def bonds_within_reach(numbers: np.ndarray, positions: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of atoms closer than `LONGEST_BOND` allows; positions ``(n_atoms, 3)`` angstrom."""
    from ase.data import covalent_radii

    radii = covalent_radii[numbers]
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    near = np.argwhere(np.triu(distances < LONGEST_BOND * (radii[:, None] + radii[None]), 1))
    return [(int(i), int(j)) for i, j in near]


def fragments(n: int, bonds: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Atoms that bonds join, each list ascending, the first atom's first."""
    root = list(range(n))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in bonds:
        a, b = find(i), find(j)
        root[max(a, b)] = min(a, b)
    found: dict[int, list[int]] = {}
    for i in range(n):
        found.setdefault(find(i), []).append(i)
    return list(found.values())


def check_one_molecule(numbers: np.ndarray, bonds: Iterable[tuple[int, int]], by: str) -> None:
    """Refuse (`ValueError`) atoms that the bonds do not join to one molecule; `by` says where the bonds come from."""
    parts = fragments(len(numbers), bonds)
    if len(parts) > 1:
        names = ", ".join(formula(numbers[part]) for part in parts[:4]) + (", ..." if len(parts) > 4 else "")
        raise ValueError(
            f"molecule: expected one molecule, because the solvent of resolv surrounds one, got {len(parts)} fragments "
            f"by {by} ({names})"
        )
