"""Atoms in another order than the training data had them: found by elements and bonds, answered with the permutation.

A GDML model knows its atoms by their places. Atoms of one element in the wrong places (hydrogens, most often) give
wrong energies without any other sign, so that bonds are compared too where both sides know them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from ase.data import covalent_radii
from torch import Tensor

from openmm_mlff.data.structures import SYMBOLS, formula

Bonds = frozenset[tuple[int, int]]

#: two atoms are bonded if nearer than this times the sum of their covalent radii
BOND = 1.25
#: assignments that are tried before a search is given up
TRIALS = 100_000


def symbols(numbers: np.ndarray) -> str:
    """``C C O H ...``, at most twelve."""
    names = [SYMBOLS[z] for z in numbers[:12]]
    return " ".join(names) + (" ..." if len(numbers) > 12 else "")


def as_bonds(pairs: Iterable[Sequence[int]]) -> Bonds:
    """Pairs of atoms, each with the smaller index first."""
    return frozenset((min(int(i), int(j)), max(int(i), int(j))) for i, j in pairs)


def bonds_from_distances(numbers: np.ndarray, distances: np.ndarray) -> Bonds:
    """Bonds by covalent radii; `distances` ``(n_pairs,)`` angstrom in the order of ``numpy.tril_indices(N, -1)``."""
    i, j = np.tril_indices(len(numbers), -1)
    near = distances < BOND * (covalent_radii[numbers[i]] + covalent_radii[numbers[j]])
    return as_bonds(zip(i[near], j[near], strict=True))


def bonds_from_positions(numbers: np.ndarray, positions: np.ndarray) -> Bonds:
    """Bonds of a geometry ``(N, 3)`` angstrom by covalent radii; none if all atoms are at one place."""
    i, j = np.tril_indices(len(numbers), -1)
    distances = np.linalg.norm(positions[i] - positions[j], axis=1)
    return bonds_from_distances(numbers, distances) if distances.size and distances.min() > 0.1 else frozenset()


def bonds_of_training(numbers: np.ndarray, x: Tensor, pair_permutations: Tensor) -> tuple[Bonds, Bonds]:
    """Bonds of the mean of training points, and those that any of them has; none without points.

    Args:
        x: inverse distances, ``(M, D)`` 1/angstrom. pair_permutations: ``(S, D)``, which take points to others that are
            as good.
    """
    if not len(x):
        return frozenset(), frozenset()
    nearest = x.max(0).values[pair_permutations].max(0).values
    kinds = (1.0 / values.clamp(min=1e-9).cpu().numpy() for values in (x.mean(0), nearest))
    mean, some = (bonds_from_distances(numbers, distances) for distances in kinds)
    return mean, some


def find_order(expected: np.ndarray, expected_bonds: Bonds, numbers: np.ndarray, bonds: Bonds) -> list[int] | None:
    """Which of the given atoms belongs to each place of the model; None if no order has the same elements and bonds.

    Atoms are told apart by their surroundings, refined until nothing changes; what is left equal (the hydrogens of a
    methyl group) is assigned by trial.

    Args:
        expected, numbers: atomic numbers ``(N,)``. expected_bonds, bonds: their bonds.
    """
    n = len(expected)
    if n != len(numbers) or len(expected_bonds) != len(bonds):
        return None
    # both molecules as one graph, so that their colours can be compared
    partners: list[set[int]] = [set() for _ in range(2 * n)]
    for shift, edges in ((0, expected_bonds), (n, bonds)):
        for i, j in edges:
            partners[i + shift].add(j + shift)
            partners[j + shift].add(i + shift)
    colours = [int(z) for z in np.concatenate([expected, numbers])]
    while True:
        keys = [(colours[i], tuple(sorted(colours[j] for j in partners[i]))) for i in range(2 * n)]
        names = {key: k for k, key in enumerate(sorted(set(keys)))}
        refined = [names[key] for key in keys]
        if len(set(refined)) == len(set(colours)):
            break
        colours = refined
    if sorted(refined[:n]) != sorted(refined[n:]):
        return None
    return _assign(n, refined, partners)


def _assign(n: int, colours: list[int], partners: list[set[int]]) -> list[int] | None:
    """Places one after another, each next to one that is taken where there is one; goes back where it must."""
    places: list[int] = []
    while len(places) < n:
        rest = [i for i in range(n) if i not in places]
        # rare surroundings first, then neighbours of what is placed
        places.append(min(rest, key=lambda i: (not partners[i] & set(places), colours[:n].count(colours[i]), i)))
    chosen: list[int] = []
    trials = 0

    def extend() -> bool:
        nonlocal trials
        if len(chosen) == n:
            return True
        place = places[len(chosen)]
        for candidate in range(n):
            trials += 1
            if trials > TRIALS:
                return False
            fits = candidate not in chosen and colours[n + candidate] == colours[place]
            if fits and all(
                (p in partners[place]) == (c + n in partners[n + candidate])
                for p, c in zip(places, chosen, strict=False)
            ):
                chosen.append(candidate)
                if extend():
                    return True
                chosen.pop()
        return False

    if not extend():
        return None
    order = [0] * n
    for place, candidate in zip(places, chosen, strict=True):
        order[place] = candidate
    return order


def check_order(
    expected: np.ndarray,
    expected_bonds: Bonds,
    numbers: np.ndarray,
    bonds: Bonds,
    indices: Sequence[int] | None = None,
) -> None:
    """Refuse atoms that are not those of the model or not in its order (`ValueError`, with the order to use).

    Args:
        bonds: of the given atoms, empty if they are not known. indices: what the user calls the given atoms.
    """
    if not np.array_equal(np.sort(expected), np.sort(numbers)):
        raise ValueError(
            f"elements: this model describes {formula(expected)} only, in the order {symbols(expected)}, got "
            f"{formula(numbers)} ({len(numbers)} atoms)"
        )
    known = bool(bonds) and len(bonds) == len(expected_bonds)
    same_elements = np.array_equal(expected, numbers)
    if same_elements and (not known or bonds == expected_bonds):
        return
    order = find_order(expected, expected_bonds, numbers, bonds) if known else None
    if order is None and same_elements:
        return  # bonds by distance and by topology may differ for other reasons than the order
    if same_elements:
        wrong = "the elements are in the training data's order, but atoms of one element are not (by their bonds)"
    else:
        wrong = f"expected the atoms in the training data's order, {symbols(expected)}, got {symbols(numbers)}"
    if order is None:
        raise ValueError(f"elements: {wrong}; reorder the topology or the list of atoms")
    names = order if indices is None else [int(indices[k]) for k in order]
    raise ValueError(
        f"elements: {wrong}; take them as {names} (up to exchanges of equivalent atoms): pass atoms={names} to "
        "createMixedSystem, or reorder the topology so that these atoms come in this order"
    )


def check_permutations(permutations: np.ndarray, numbers: np.ndarray) -> None:
    """Refuse what are not permutations of equal atoms, ``(S, N)`` (`ValueError`)."""
    n = len(numbers)
    if permutations.ndim != 2 or permutations.shape[1] != n or not len(permutations):
        raise ValueError(f"permutations: expected shape (S, {n}), got {permutations.shape}")
    if not np.array_equal(np.sort(permutations, axis=1), np.tile(np.arange(n), (len(permutations), 1))):
        raise ValueError(f"permutations: expected every row to hold each of 0 to {n - 1} once")
    wrong = (numbers[permutations] != numbers).any(axis=1)
    if wrong.any():
        raise ValueError(f"permutations: row {int(wrong.argmax())} exchanges different elements")
