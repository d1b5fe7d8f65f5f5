"""Harmonic bonds and angles, and a repulsion: simple energies that are added to a learnt one.

A coarse-grained model learns what they leave over (Wang et al., ACS Cent. Sci. 5, 755 (2019)): they keep beads that lie
outside the training data together, and take the stiff, easily known part of the forces out of the learning.

Units: angstrom, eV, radian.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: smallest sine of an angle in its gradient; straight angles have none.
_LEAST_SINE = 1e-6


@dataclass(frozen=True)
class PriorTerms:
    """``k/2 (r - r0)^2`` of bonds, ``k/2 (theta - theta0)^2`` of angles, ``(s/r)^n`` eV of repelling pairs.

    Attributes:
        bonds: ``(n, 2)`` particles; bond_lengths ``(n,)`` angstrom; bond_constants ``(n,)`` eV/angstrom^2.
        angles: ``(n, 3)`` particles; angle_values ``(n,)`` rad; angle_constants ``(n,)`` eV/rad^2.
        pairs: ``(n, 2)`` particles; pair_lengths ``(n,)`` s, angstrom. exponent: n of the repulsion.

    Raises `ValueError` naming the argument.
    """

    bonds: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    bond_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bond_constants: np.ndarray = field(default_factory=lambda: np.zeros(0))
    angles: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    angle_values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    angle_constants: np.ndarray = field(default_factory=lambda: np.zeros(0))
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    pair_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0))
    exponent: int = 12

    def __post_init__(self) -> None:
        for name, width, values in (
            ("bonds", 2, ("bond_lengths", "bond_constants")),
            ("angles", 3, ("angle_values", "angle_constants")),
            ("pairs", 2, ("pair_lengths",)),
        ):
            index = np.asarray(getattr(self, name), dtype=np.int64).reshape(-1, width)
            if (index < 0).any() or any(len(set(row)) != width for row in index.tolist()):
                raise ValueError(f"{name}: expected rows of {width} different particles, got {index.tolist()}")
            object.__setattr__(self, name, index)
            for value in values:
                array = np.asarray(getattr(self, value), dtype=np.float64)
                if array.shape != (len(index),) or not (array > 0).all() or not np.isfinite(array).all():
                    raise ValueError(f"{value}: expected {len(index)} positive numbers, got {array.tolist()}")
                object.__setattr__(self, value, array)
        if (self.angle_values > np.pi).any():
            raise ValueError(f"angle_values: expected angles up to pi (rad), got {self.angle_values.tolist()}")
        if isinstance(self.exponent, bool) or int(self.exponent) != self.exponent or self.exponent < 1:
            raise ValueError(f"exponent: expected a whole number of at least 1, got {self.exponent!r}")

    def energy(self, positions: Tensor) -> Tensor:
        """``(..., n_particles, 3)`` angstrom -> ``(...)`` eV, differentiable."""
        energy = positions.new_zeros(positions.shape[:-2])
        if len(self.bonds):
            r = _distance(positions, self.bonds)
            energy = energy + (0.5 * _like(self.bond_constants, r) * (r - _like(self.bond_lengths, r)) ** 2).sum(-1)
        if len(self.angles):
            theta = _angle(positions, self.angles)
            deviation = theta - _like(self.angle_values, theta)
            energy = energy + (0.5 * _like(self.angle_constants, theta) * deviation**2).sum(-1)
        if len(self.pairs):
            r = _distance(positions, self.pairs)
            energy = energy + ((_like(self.pair_lengths, r) / r) ** self.exponent).sum(-1)
        return energy

    def energy_and_forces(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., n_particles, 3)`` angstrom -> ``(...)`` eV and forces like the positions, eV/angstrom; no graph."""
        with torch.enable_grad():
            x = positions.detach().requires_grad_(True)
            energy = self.energy(x)
            if not energy.requires_grad:
                return energy, torch.zeros_like(positions)
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        return energy.detach(), -gradient

    def forces(self, positions: np.ndarray, chunk: int = 50_000) -> np.ndarray:
        """Forces for many frames, ``(n, n_particles, 3)`` angstrom -> eV/angstrom, float64."""
        found = [
            self.energy_and_forces(torch.as_tensor(positions[k : k + chunk], dtype=torch.float64))[1].numpy()
            for k in range(0, len(positions), chunk)
        ]
        return np.concatenate(found) if found else np.zeros(np.shape(positions))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PriorTerms:
        """The inverse of `to_dict`; `ValueError` for a name that this version does not know."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"priors: this version does not know {unknown[0]!r}")
        arguments: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def _like(values: np.ndarray, x: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=x.dtype, device=x.device)


def _distance(positions: Tensor, pairs: np.ndarray) -> Tensor:
    index = torch.as_tensor(pairs, device=positions.device)
    return (positions[..., index[:, 1], :] - positions[..., index[:, 0], :]).norm(dim=-1)


def _angle(positions: Tensor, triples: np.ndarray) -> Tensor:
    index = torch.as_tensor(triples, device=positions.device)
    centre = positions[..., index[:, 1], :]
    u, v = positions[..., index[:, 0], :] - centre, positions[..., index[:, 2], :] - centre
    # atan2 is accurate at all angles, where an arc cosine loses digits near 0 and pi
    sine = torch.linalg.cross(u, v).norm(dim=-1).clamp_min(_LEAST_SINE)
    return torch.atan2(sine, (u * v).sum(-1))


def angles_of(bonds: Iterable[Sequence[int]]) -> np.ndarray:
    """All angles between two bonds that share a particle, ``(n, 3)``, the shared one in the middle."""
    neighbours: dict[int, set[int]] = {}
    for i, j in bonds:
        neighbours.setdefault(int(i), set()).add(int(j))
        neighbours.setdefault(int(j), set()).add(int(i))
    rows = [
        (a, centre, b)
        for centre, around in sorted(neighbours.items())
        for a in sorted(around)
        for b in sorted(around)
        if a < b
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def fit_priors(
    positions: np.ndarray,
    bonds: Iterable[Sequence[int]],
    kT: float,
    angles: Iterable[Sequence[int]] | None = None,
    weights: np.ndarray | None = None,
) -> PriorTerms:
    """Bonds and angles with the means of the data, and the force constants kT / variance.

    Args:
        positions: ``(n, n_particles, 3)`` angstrom. kT: eV, of the data.
        angles: None takes all angles between bonds.
        weights: of the frames, ``(n,)``, for data from a biased run.

    Raises `ValueError` naming the argument; for fewer than two frames, or a distance that never varies.
    """
    positions = np.asarray(positions, dtype=np.float64)
    if positions.ndim != 3 or positions.shape[-1] != 3 or len(positions) < 2:
        raise ValueError(f"positions: expected shape (n, n_particles, 3) with at least 2 frames, got {positions.shape}")
    if not kT > 0:
        raise ValueError(f"kT: expected a positive energy (eV), got {kT!r}")
    if weights is not None and (np.shape(weights) != (len(positions),) or np.min(weights) < 0 or np.sum(weights) == 0):
        raise ValueError(f"weights: expected {len(positions)} weights >= 0, got shape {np.shape(weights)}")
    pairs = np.asarray(list(bonds), dtype=np.int64).reshape(-1, 2)
    triples = angles_of(pairs) if angles is None else np.asarray(list(angles), dtype=np.int64).reshape(-1, 3)
    n = positions.shape[1]
    for name, index in (("bonds", pairs), ("angles", triples)):
        if index.size and (index.min() < 0 or index.max() >= n):
            raise ValueError(f"{name}: expected particles from 0 to {n - 1}, got {index.min()} to {index.max()}")
    x = torch.as_tensor(positions)
    lengths, length_constants = _mean_and_stiffness("bonds", pairs, _distance(x, pairs).numpy(), kT, weights)
    values, value_constants = _mean_and_stiffness("angles", triples, _angle(x, triples).numpy(), kT, weights)
    return PriorTerms(pairs, lengths, length_constants, triples, values, value_constants)


def _mean_and_stiffness(
    name: str, index: np.ndarray, values: np.ndarray, kT: float, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    if not len(index):
        return np.zeros(0), np.zeros(0)
    mean = np.average(values, axis=0, weights=weights)
    variance = np.average((values - mean) ** 2, axis=0, weights=weights)
    stiff = np.flatnonzero(variance < 1e-12)
    if len(stiff):
        raise ValueError(f"{name}: {index[stiff[0]].tolist()} never varies in the data; is it constrained?")
    return mean, kT / variance


def repulsion(
    positions: np.ndarray, pairs: Iterable[Sequence[int]], energy: float, exponent: int = 12, quantile: float = 1e-4
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs and their lengths s such that ``(s/r)^exponent`` is `energy` (eV) where the data hardly ever come.

    Args:
        positions: ``(n, n_particles, 3)`` angstrom. quantile: share of the frames with a smaller distance.

    Returns `pairs` ``(n_pairs, 2)`` and `pair_lengths` ``(n_pairs,)`` for `PriorTerms`.
    """
    if not energy > 0:
        raise ValueError(f"energy: expected a positive number (eV), got {energy!r}")
    index = np.asarray(list(pairs), dtype=np.int64).reshape(-1, 2)
    r = _distance(torch.as_tensor(np.asarray(positions, dtype=np.float64)), index).numpy()
    return index, np.quantile(r, quantile, axis=0) * energy ** (1.0 / exponent)
