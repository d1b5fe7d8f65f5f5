"""Permutations of equal atoms found by matching geometries with one another, without bonds.

Two geometries of one molecule that differ by a permutation have the same table of distances, but for its order. The
magnitudes of the tables' eigenvectors tell which atoms play the same part; an assignment that maximises their overlap
is a permutation, and it is believed if it brings the tables nearer to one another than the given order of atoms does
(Chmiela et al., Nat. Commun. 9, 3887 (2018), following Umeyama, IEEE Trans. Pattern Anal. 10, 695 (1988)). Matches are
made consistent along the shortest tree that joins all geometries, and completed to a group.

It sees only what the data have already explored, and one wrong match spoils the group. `permutations.find` asks the
bonds instead, and is the better choice wherever there are bonds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openmm_mlff.data.structures import Structure

#: more than any overlap of two rows of eigenvectors, so that unlike elements are never matched.
NEVER = 1e3


def find(structures: Sequence[Structure], most_geometries: int = 100, limit: int = 100) -> np.ndarray:
    """The group of permutations that matches of geometries generate, ``(S, N)`` int64, the identity first.

    Args:
        structures: geometries of one open molecule in one order of atoms.
        most_geometries: how many of them are compared, evenly spread; the time grows with the square.
        limit: permutations at most.

    Raises `ValueError` for no structures, periodic ones, or a group larger than `limit`.
    """
    if not structures:
        raise ValueError("structures: expected at least one geometry, got none")
    if any(s.cell is not None for s in structures):
        raise ValueError("structures: expected an open molecule, got a periodic structure (see openmm_gdml.crystals)")
    numbers = structures[0].numbers
    chosen = np.unique(np.linspace(0, len(structures) - 1, min(most_geometries, len(structures))).round().astype(int))
    positions = np.stack([structures[i].positions for i in chosen])
    tables = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
    vectors = np.abs(np.linalg.eigh(tables)[1])
    relative = _along_tree(tables, vectors, numbers)
    return _closure(relative, len(numbers), limit)


def match(a: np.ndarray, b: np.ndarray, va: np.ndarray, vb: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The permutation p that brings ``b[p][:, p]`` nearest to ``a``, or the identity if none is nearer.

    Args:
        a, b: tables of distances ``(N, N)``. va, vb: magnitudes of their eigenvectors, columns by eigenvalue.
    """
    cost = -va @ vb.T + NEVER * (numbers[:, None] != numbers)
    p = assign(cost)
    same = np.arange(len(numbers))
    return p if np.linalg.norm(a - b[np.ix_(p, p)]) < np.linalg.norm(a - b) - 1e-9 else same


def assign(cost: np.ndarray) -> np.ndarray:
    """The column of every row, ``(n,)``, so that the sum of ``cost (n, n)`` is least.

    Shortest augmenting paths with potentials of rows and columns (Kuhn 1955, Munkres 1957): n^3 operations.
    """
    n = len(cost)
    of_row, of_column = np.zeros(n), np.zeros(n + 1)
    row_at = np.full(n + 1, -1)  # the last column is where every search begins
    for row in range(n):
        row_at[n], here = row, n
        reach, came_from, done = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, dtype=bool)
        while row_at[here] >= 0:
            done[here] = True
            reduced = cost[row_at[here]] - of_row[row_at[here]] - of_column[:n]
            nearer = ~done[:n] & (reduced < reach)
            reach[nearer], came_from[nearer] = reduced[nearer], here
            step = np.where(done[:n], np.inf, reach)
            following = int(step.argmin())
            delta = step[following]
            of_row[row_at[done]] += delta
            of_column[done] -= delta
            reach[~done[:n]] -= delta
            here = following
        while here != n:
            row_at[here] = row_at[came_from[here]]
            here = int(came_from[here])
        row_at[n] = -1
    columns = np.empty(n, dtype=np.int64)
    columns[row_at[:n]] = np.arange(n)
    return columns


def _along_tree(tables: np.ndarray, vectors: np.ndarray, numbers: np.ndarray) -> list[np.ndarray]:
    """Every geometry's order relative to the first one's, by Prim's tree of least distances between matched tables."""
    m, n = len(tables), len(numbers)
    orders = [np.arange(n)] * m
    nearest, links = np.full(m, np.inf), np.zeros(m, dtype=int)
    matches = [np.arange(n)] * m
    outside, last = set(range(1, m)), 0
    while outside:
        for k in outside:
            p = match(tables[last], tables[k], vectors[last], vectors[k], numbers)
            distance = float(np.linalg.norm(tables[last] - tables[k][np.ix_(p, p)]))
            if distance < nearest[k]:
                nearest[k], links[k], matches[k] = distance, last, p
        last = min(outside, key=lambda k: nearest[k])
        outside.remove(last)
        # tables[last][p][:, p] ~ tables[link], and that one in its own order ~ the first
        orders[last] = matches[last][orders[links[last]]]
    return orders


def _closure(generators: Sequence[np.ndarray], n: int, limit: int) -> np.ndarray:
    """The group that permutations generate, the identity first, then sorted."""
    identity = tuple(range(n))
    steps = {tuple(int(i) for i in p) for p in generators} - {identity}
    group, new = {identity}, [identity]
    while new:
        found = []
        for p in new:
            for q in steps:
                product = tuple(p[i] for i in q)
                if product not in group:
                    group.add(product)
                    found.append(product)
            if len(group) > limit:
                raise ValueError(
                    f"permutations: the matches generate more than {limit}; some are likely to be wrong. Find them "
                    "from bonds (openmm_gdml.permutations.find), or pass your own"
                )
        new = found
    return np.array([identity, *sorted(group - {identity})], dtype=np.int64)
