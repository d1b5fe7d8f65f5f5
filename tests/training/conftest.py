"""What training tests learn from: small molecules with an analytic energy, and a tiny SpookyNet with random weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Potential

#: Morse bonds (eV, 1/angstrom, angstrom), a harmonic angle (eV/rad^2, degrees) and point charges, like water
DEPTH, STEEPNESS, LENGTH = 4.5, 2.0, 0.97
STIFFNESS, ANGLE = 4.0, np.radians(104.5)
CHARGES = np.array([-0.6, 0.3, 0.3])
NUMBERS = np.array([8, 1, 1])
REFERENCE = np.array([[0.0, 0.0, 0.0], [0.97, 0.0, 0.0], [-0.243, 0.939, 0.0]])


def energy(positions: np.ndarray) -> float:
    """Two Morse bonds and one harmonic angle, eV."""
    a, b = positions[1] - positions[0], positions[2] - positions[0]
    r = np.array([np.linalg.norm(a), np.linalg.norm(b)])
    angle = np.arccos(np.dot(a, b) / r.prod())
    bonds = DEPTH * ((1.0 - np.exp(-STEEPNESS * (r - LENGTH))) ** 2 - 1.0)
    return float(bonds.sum() + 0.5 * STIFFNESS * (angle - ANGLE) ** 2)


def forces(positions: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Minus the gradient by central differences, ``(3, 3)`` eV/angstrom (error below 1e-8)."""
    gradient = np.zeros_like(positions)
    for index in np.ndindex(*positions.shape):
        shift = np.zeros_like(positions)
        shift[index] = h
        gradient[index] = (energy(positions + shift) - energy(positions - shift)) / (2 * h)
    return -gradient


def make_waters(n: int, seed: int, groups: int = 4, spread: float = 0.08) -> list[Structure]:
    """Distorted molecules with labels, dealt to groups called g0, g1, ..."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        positions = REFERENCE + rng.normal(0.0, spread, (3, 3))
        found.append(
            Structure(
                NUMBERS,
                positions,
                energy=energy(positions),
                forces=forces(positions),
                dipole=CHARGES @ positions,
                charges=CHARGES,
                group=f"g{i % groups}",
            )
        )
    return found


def make_clusters(sizes: list[int], seed: int) -> list[Structure]:
    """Random open clusters of hydrogen and oxygen with arbitrary labels (for bookkeeping, not for learning)."""
    rng = np.random.default_rng(seed)
    found = []
    for k, n in enumerate(sizes):
        grid = np.array([[i % 3, (i // 3) % 3, i // 9] for i in range(n)], dtype=np.float64) * 1.4
        numbers = rng.choice([1, 8], n)
        electrons = int(numbers.sum())
        found.append(
            Structure(
                numbers,
                grid + rng.normal(0.0, 0.1, (n, 3)) + 5.0,
                multiplicity=1 + electrons % 2,
                energy=float(rng.normal()),
                forces=rng.normal(size=(n, 3)),
                dipole=rng.normal(size=3),
                charges=rng.normal(size=n),
                group=f"cluster-{k}",
            )
        )
    return found


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **options: object) -> Potential:
    """SpookyNet with 8 features and one module, all weights moved away from their initial zeros."""
    from openmm_spookynet import SpookyNet, SpookyNetConfig

    torch.manual_seed(seed)
    settings = {"num_features": 8, "num_basis_functions": 8, "num_modules": 1, "num_random_features": 8}
    model = SpookyNet(SpookyNetConfig(**(settings | {"elements": (1, 6, 7, 8)} | options))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


@pytest.fixture
def tiny() -> Callable[..., Potential]:
    return tiny_model


@pytest.fixture
def waters() -> Callable[..., list[Structure]]:
    return make_waters


@pytest.fixture
def clusters() -> Callable[..., list[Structure]]:
    return make_clusters
