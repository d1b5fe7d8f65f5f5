"""A second sGDML, in numpy from the published formulas, and small random models in sgdml's own file format."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openmm_gdml.model import GDMLPotential


def predict(file: Mapping[str, Any], r: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy and forces ``(N, 3)`` of positions ``(N, 3)``, all in the units of the file.

    Chmiela et al., Nat. Commun. 9, 3887 (2018): training points are permuted, one after another, and forces are put
    together pair by pair.
    """
    n, s2 = len(r), float(file["sig"]) ** 2
    pairs = list(zip(*np.tril_indices(n, -1), strict=True))
    number = {frozenset(pair): k for k, pair in enumerate(pairs)}
    v = np.array([r[i] - r[j] for i, j in pairs])
    if "lattice" in file:
        v -= np.rint(v @ np.linalg.inv(file["lattice"]).T) @ file["lattice"].T
    distance = np.sqrt((v * v).sum(1))
    x = 1.0 / distance
    energy, pull = 0.0, np.zeros(len(x))
    extra = file["alphas_E"] if "alphas_E" in file else np.zeros(len(file["R_d_desc_alpha"]))
    for permutation in np.atleast_2d(file["perms"]):
        moved = [number[frozenset((permutation[i], permutation[j]))] for i, j in pairs]
        for x_j, a, alpha in zip(file["R_desc"].T[:, moved], file["R_d_desc_alpha"][:, moved], extra, strict=True):
            u = x - x_j
            d = np.sqrt(5.0 * (u @ u) / s2)
            energy += np.exp(-d) * (5.0 / (3.0 * s2) * (1.0 + d) * (u @ a) + alpha * (1.0 + d + d * d / 3.0))
            pull += np.exp(-d) * (25.0 / (3.0 * s2**2) * (u @ a) * u - 5.0 / (3.0 * s2) * (1.0 + d) * a)
            pull += np.exp(-d) * alpha * 5.0 / (3.0 * s2) * (1.0 + d) * u
    forces = np.zeros((n, 3))
    for (i, j), f, w, length in zip(pairs, pull, v, distance, strict=True):
        # dx/dr_i = -(r_i - r_j)/d^3
        forces[i] -= f * w / length**3
        forces[j] += f * w / length**3
    scale = float(file.get("std", 1.0))
    return float(file["c"]) + scale * energy, scale * forces


def base_of(n: int) -> np.ndarray:
    """`n` atoms on a jittered grid of 1.5 angstrom, ``(n, 3)``; no two near to each other."""
    side = int(np.ceil(n ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[range(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:n]
    return 1.5 * grid + np.random.default_rng(n).normal(0.0, 0.1, (n, 3))


def random_model(
    numbers: tuple[int, ...],
    permutations: np.ndarray | None = None,
    n_train: int = 7,
    seed: int = 0,
    energies: bool = False,
    **options: Any,
) -> GDMLPotential:
    """Training points near `base_of` and coefficients that give forces of some eV/angstrom."""
    rng, n = np.random.default_rng(seed), len(numbers)
    r = base_of(n) + rng.normal(0.0, 0.1, (n_train, n, 3))
    i, j = np.tril_indices(n, -1)
    x = 1.0 / np.linalg.norm(r[:, i] - r[:, j], axis=-1)
    return GDMLPotential.from_coefficients(
        numbers,
        2.0,
        x,
        rng.normal(size=x.shape) * 20.0 / np.sqrt(n_train * (1 if permutations is None else len(permutations))),
        -31.7,
        permutations=permutations,
        energy_coefficients=rng.normal(size=n_train) if energies else None,
        **options,
    )


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """All arrays of numbers and text of an npz file."""
    found = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            try:
                found[name] = file[name]
            except ValueError:  # pickled objects
                continue
    return found


def archive(arrays: Mapping[str, Any]) -> bytes:
    """The bytes of an npz file."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()
