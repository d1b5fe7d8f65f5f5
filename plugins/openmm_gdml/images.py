"""Sums over periodic images: a pair descriptor that has the symmetry of the crystal.

The published periodic descriptor takes one image of every pair, by rounding fractional coordinates (BIGDML: Sauceda et
al., Nat. Commun. 13, 3733 (2022)). Where a pair lies on the surface of the Wigner-Seitz cell, as third neighbours in a
3x3x3 supercell of fcc do, several images are equally near and rounding takes one of them: the descriptor then lacks
most of the point group, and jumps when the atoms move across the surface. Here all images contribute,

    x_k = sum_T f(|r_i - r_j + T|),   f(r) = r^-n (1 - r^2/R^2)^3 for r < R, else 0

over the lattice vectors T. f and its first two derivatives are continuous, so x is smooth everywhere and has every
symmetry of the lattice. In an open system T = 0 is the only image, and f = r^-n.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from openmm_gdml.descriptors import pair_vectors, register
from openmm_gdml.lattices import minkowski_reduced

IMAGE_SUMS = "image_sums"
#: n. The first image of a pair decides for large n, many of them for small n; both extremes fit worse (docs).
DEFAULT_POWER = 3.0
#: R in radii of the Wigner-Seitz cell; above 1, so that every pair has an image within R.
CUTOFF_IN_RADII = 1.5
#: numbers that one temporary array may hold (16 MB)
TEMPORARY = 1 << 21


def image_sums(
    positions: Tensor, lattice: Tensor | None = None, power: float = DEFAULT_POWER, cutoff: float | None = None
) -> Tensor:
    """x_k of every pair, ``(..., N, 3)`` angstrom -> ``(..., D)`` angstrom^-power, differentiable.

    Args:
        lattice: lattice vectors as rows, ``(3, 3)`` or ``(..., 3, 3)`` angstrom, or None.
        power: n. cutoff: R in angstrom; None is `default_cutoff` of the lattice.
    """
    vectors = pair_vectors(positions, lattice)
    if lattice is None:
        return _radial(vectors.square().sum(-1), power, None)[0]
    images, radius = _images(vectors, lattice, cutoff)
    return _radial(images.square().sum(-1), power, radius)[0].sum(-1)


def image_sum_gradients(
    positions: Tensor, lattice: Tensor | None = None, power: float = DEFAULT_POWER, cutoff: float | None = None
) -> tuple[Tensor, Tensor]:
    """`image_sums` x ``(..., D)`` and their compressed Jacobian g = -dx_k/dr_i = dx_k/dr_j ``(..., D, 3)``."""
    vectors = pair_vectors(positions, lattice)
    if lattice is None:
        x, slope = _radial(vectors.square().sum(-1), power, None)
        return x, -2.0 * slope[..., None] * vectors
    if vectors.dim() == 2:
        return _summed(vectors, lattice, power, cutoff)
    flat = vectors.flatten(0, -3)
    rows = lattice.expand(*vectors.shape[:-2], 3, 3).flatten(0, -3)
    size = max(1, TEMPORARY // (3 * flat.shape[1] * len(_offsets(lattice, cutoff)[0])))
    parts = [
        _summed(flat[k : k + size], rows[k : k + size], power, cutoff, offsets_of=lattice)
        for k in range(0, len(flat), size)
    ]
    x, g = (torch.cat(values) for values in zip(*parts, strict=True))
    return x.unflatten(0, vectors.shape[:-2]), g.unflatten(0, vectors.shape[:-2])


def default_cutoff(lattice: np.ndarray | Tensor) -> float:
    """R in angstrom for a lattice (rows, ``(3, 3)``): `CUTOFF_IN_RADII` times the radius of the Wigner-Seitz cell.

    The radius is that of the farthest point of a fine grid, which is within some percent of the exact one.
    """
    rows = np.asarray(lattice, dtype=np.float64)
    return _default_cutoff(tuple(np.round(rows @ rows.T, 4).ravel()))


@functools.lru_cache(maxsize=64)
def _default_cutoff(gram: tuple[float, ...]) -> float:
    # the Gram matrix decides, so that a rotated lattice has the same cutoff to the last digit
    rows = np.linalg.cholesky(np.array(gram).reshape(3, 3))
    rows = minkowski_reduced(rows) @ rows
    grid = np.array(list(itertools.product(np.linspace(0.0, 1.0, 25), repeat=3)))
    corners = np.array(list(itertools.product((-1, 0, 1, 2), repeat=3))) @ rows
    squared = np.full(len(grid), np.inf)
    for corner in corners:
        np.minimum(squared, np.sum((grid @ rows - corner) ** 2, axis=1), out=squared)
    return round(CUTOFF_IN_RADII * float(np.sqrt(squared.max())), 3)


def image_vectors(lattice: np.ndarray, cutoff: float) -> np.ndarray:
    """Whole-number offsets ``(n, 3)`` of all images that a wrapped pair vector can have within `cutoff` (angstrom).

    Wrapped means: fractional coordinates by the rows of `lattice` in [-1/2, 1/2].
    """
    heights = 1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    reach = np.ceil(cutoff / heights + 0.5).astype(int)
    offsets = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))))
    # the point of the cell nearest to the negative of each offset: a convex problem, solved axis by axis
    gram = lattice @ lattice.T
    nearest = np.clip(-offsets.astype(float), -0.5, 0.5)
    for _ in range(200):
        for k in range(3):
            rest = (nearest + offsets) @ gram[k] - nearest[:, k] * gram[k, k]
            nearest[:, k] = np.clip(-rest / gram[k, k], -0.5, 0.5)
    distance = np.linalg.norm((nearest + offsets) @ lattice, axis=1)
    return offsets[distance < cutoff * (1 + 1e-3)]


def fused_terms(
    lattice: np.ndarray | None, power: float = DEFAULT_POWER, cutoff: float | None = None
) -> tuple[np.ndarray | None, float, float]:
    """What the fused kernel needs: lattice vectors ``(n, 3)`` of all images, n and R; None and R = 0 if open."""
    if lattice is None:
        return None, float(power), 0.0
    offsets, radius = _offsets(torch.from_numpy(np.ascontiguousarray(lattice)), cutoff)
    return offsets.numpy() @ lattice, float(power), radius


# -- details -----------------------------------------------------------------------------------------------------


def _radial(square: Tensor, power: float, radius: float | None) -> tuple[Tensor, Tensor]:
    """f and df/d(r^2) of squared distances."""
    value = square.pow(-0.5 * power)
    if radius is None:
        return value, (-0.5 * power) * value / square
    inside = (1.0 - square / radius**2).clamp(min=0.0)
    switched = value * inside**3
    return switched, (-0.5 * power) * switched / square - (3.0 / radius**2) * value * inside**2


def _offsets(lattice: Tensor, cutoff: float | None) -> tuple[Tensor, float]:
    # as plain numbers: inside torch.func's transforms a tensor operation would return a wrapped tensor
    one = np.array(lattice.tolist()).reshape(-1, 3, 3)[0]
    radius = default_cutoff(one) if cutoff is None else float(cutoff)
    if not radius > 0:
        raise ValueError(f"cutoff: expected a positive length in angstrom, got {cutoff}")
    return _cached_offsets(tuple(np.round(one @ one.T, 4).ravel()), radius), radius


@functools.lru_cache(maxsize=64)
def _cached_offsets(gram: tuple[float, ...], radius: float) -> Tensor:
    rows = np.linalg.cholesky(np.array(gram).reshape(3, 3))
    return torch.from_numpy(image_vectors(rows, radius).astype(np.float64))


def _images(
    vectors: Tensor, lattice: Tensor, cutoff: float | None, offsets_of: Tensor | None = None
) -> tuple[Tensor, float]:
    """All images of pair vectors ``(..., D, 3)`` that can lie within R, ``(..., D, T, 3)``, and R."""
    offsets, radius = _offsets(lattice if offsets_of is None else offsets_of, cutoff)
    shifts = offsets.to(vectors) @ lattice.to(vectors)  # (T, 3) or (..., T, 3)
    return vectors[..., :, None, :] + shifts[..., None, :, :], radius


def _summed(
    vectors: Tensor, lattice: Tensor, power: float, cutoff: float | None, offsets_of: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    images, radius = _images(vectors, lattice, cutoff, offsets_of)
    values, slopes = _radial(images.square().sum(-1), power, radius)
    return values.sum(-1), -2.0 * (slopes[..., None] * images).sum(-2)


register(IMAGE_SUMS, image_sums, image_sum_gradients)
