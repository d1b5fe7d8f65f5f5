"""Whether two sets of box vectors span the same lattice, up to a rotation, and which choices of vectors do.

A periodic model wraps pair vectors by the lattice vectors of its training data. OpenMM wants a reduced box whose first
vector lies along x, so that the same crystal comes rotated and with other vectors.
"""

from __future__ import annotations

import itertools

import numpy as np

#: two lattices are the same if scalar products of their vectors agree to this fraction of the vectors' lengths
TOLERANCE = 1e-3


def minkowski_reduced(lattice: np.ndarray) -> np.ndarray:
    """Unimodular integer matrix T ``(3, 3)`` such that the rows of ``T @ lattice`` are Minkowski-reduced.

    Semaev's algorithm for three dimensions: the longest vector is shortened by the closest point of the plane of the
    other two, until nothing becomes shorter.
    """
    steps = np.array(list(itertools.product((-1, 0, 1), repeat=2)))
    t = np.eye(3, dtype=np.int64)
    for _ in range(1000):
        t = t[np.argsort(np.linalg.norm(t @ lattice, axis=1), kind="stable")]
        # the two shortest first (Lagrange-Gauss)
        for _ in range(1000):
            a, b = t[:2] @ lattice
            n = round(float(a @ b / (a @ a)))
            t[1] -= n * t[0]
            if np.linalg.norm(t[1] @ lattice) >= np.linalg.norm(t[0] @ lattice) * (1 - 1e-12):
                break
            t[[0, 1]] = t[[1, 0]]
        plane, c = t[:2] @ lattice, t[2] @ lattice
        # coordinates of the foot of c in the plane; the closest lattice point is among its neighbours
        foot = np.rint(np.linalg.lstsq(plane.T, c, rcond=None)[0]).astype(np.int64)
        candidates = t[2] - (foot + steps) @ t[:2]
        lengths = np.linalg.norm(candidates @ lattice, axis=1)
        best = int(lengths.argmin())
        if lengths[best] >= np.linalg.norm(c) * (1 - 1e-12):
            return t
        t[2] = candidates[best]
    raise ValueError(f"cell: expected box vectors that can be reduced, got {lattice.tolist()}")


def equivalents(lattice: np.ndarray, cell: np.ndarray, tolerance: float = TOLERANCE) -> list[np.ndarray]:
    """All integer matrices U such that the rows of ``U @ cell`` have the lengths and angles of those of `lattice`.

    Args:
        lattice, cell: lattice vectors as rows, ``(3, 3)``, in the same unit. tolerance: see `TOLERANCE`.

    Each stands for a rotation (or reflection) that takes one lattice to the other; U and others that only exchange
    or reverse vectors wrap alike, but turn the atoms differently. Empty if the lattices differ.
    """
    if abs(abs(np.linalg.det(cell)) / abs(np.linalg.det(lattice)) - 1.0) > 3 * tolerance:
        return []
    t = minkowski_reduced(cell)
    # coefficients of a vector of length l in a reduced basis are bounded: |n_k| <= l / (height along k)
    reduced = t @ cell
    heights = 1.0 / np.linalg.norm(np.linalg.inv(reduced), axis=0)
    lengths = np.linalg.norm(lattice, axis=1)
    reach = np.floor(lengths.max() * (1 + tolerance) / heights).astype(int)
    points = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))))
    vectors = points @ reduced
    norms = np.linalg.norm(vectors, axis=1)
    shells = [np.flatnonzero(np.abs(norms - length) <= tolerance * length) for length in lengths]
    gram = lattice @ lattice.T
    allowed = 2 * tolerance * np.outer(lengths, lengths)
    found = []
    for a in shells[0]:
        for b in shells[1][np.abs(vectors[shells[1]] @ vectors[a] - gram[0, 1]) <= allowed[0, 1]]:
            close = np.abs(vectors[shells[2]] @ vectors[[a, b]].T - gram[2, :2]) <= allowed[2, :2]
            for c in shells[2][close.all(axis=1)]:
                u = points[[a, b, c]]
                if abs(round(np.linalg.det(u))) == 1:
                    found.append(u @ t)
    return found


def wrappings(lattice: np.ndarray, cell: np.ndarray, tolerance: float = TOLERANCE) -> list[np.ndarray]:
    """The different lattices (rows, ``(3, 3)``) among `equivalents`, as vectors of `cell`'s lattice.

    Wrapping by rounding of fractions does not depend on the order and the signs of the vectors, so that of those that
    differ by them one is kept. If the lattices are not only equal but also equally oriented, that choice comes first.
    """
    unique: dict[frozenset[tuple[int, ...]], np.ndarray] = {}
    for u in equivalents(lattice, cell, tolerance):
        key = frozenset(max(tuple(int(n) for n in row), tuple(-int(n) for n in row)) for row in u)
        here = u @ cell
        if key not in unique or _misfit(here, lattice) < _misfit(unique[key], lattice):
            unique[key] = here
    return sorted(unique.values(), key=lambda rows: _misfit(rows, lattice))


def fitted(lattice: np.ndarray, cell: np.ndarray) -> list[np.ndarray]:
    """`wrappings`; raises `ValueError` with lengths and angles if the box has another lattice."""
    found = wrappings(lattice, cell)
    if not found:
        raise ValueError(
            f"cell: this model was trained for the lattice with {describe(lattice)}, and describes no other; got the "
            f"lattice with {describe(cell)}"
        )
    return found


def _misfit(a: np.ndarray, b: np.ndarray) -> float:
    # in steps, so that equally bad ones keep their order on every machine
    return round(float(np.abs(a - b).max()), 6)


def describe(lattice: np.ndarray) -> str:
    """Lengths and angles of the reduced vectors, for messages: ``a b c = ... angstrom, angles ... degrees``."""
    rows = minkowski_reduced(lattice) @ lattice
    lengths = np.linalg.norm(rows, axis=1)
    cosines = np.array([rows[1] @ rows[2], rows[0] @ rows[2], rows[0] @ rows[1]]) / (lengths.prod() / lengths)
    # of a reduced basis and its sign changes, the one with angles up to 90 degrees where there is one
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    angles = np.where(angles > 90, 180 - angles, angles)
    return (
        "lengths "
        + " ".join(f"{length:.3f}" for length in lengths)
        + " angstrom, angles "
        + " ".join(f"{angle:.2f}" for angle in angles)
        + f" degrees, volume {abs(np.linalg.det(lattice)):.2f} angstrom^3"
    )
