"""Second derivatives of the energy of any potential, by differentiating its forces once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import energy_forces

if TYPE_CHECKING:
    from openmm_mlff.potentials.potential import Potential


def hessian(model: Potential, structure: Structure) -> np.ndarray:
    """d^2E/dR^2 of one structure, ``(3 n_atoms, 3 n_atoms)`` eV/angstrom^2, symmetric, float64.

    Rows and columns are x, y, z of atom 0, then of atom 1, ...; what a model in single precision knows of it is about
    six digits of the largest element.
    """
    n = 3 * len(structure)
    rows = model.hessian_products(structure, np.eye(n).reshape(n, -1, 3)).reshape(n, n)
    return 0.5 * (rows + rows.T)


def checked_directions(directions: np.ndarray | Tensor, n_atoms: int) -> Tensor:
    """``(k, n_atoms, 3)`` float64; raises `ValueError` for another shape or values that are not finite."""
    v = torch.as_tensor(directions).detach().cpu().to(torch.float64)
    if v.ndim != 3 or v.shape[1:] != (n_atoms, 3):
        raise ValueError(f"directions: expected shape (n_directions, {n_atoms}, 3), got {tuple(v.shape)}")
    if not bool(torch.isfinite(v).all()):
        raise ValueError("directions: expected finite numbers, got NaN or infinity")
    return v


def products_by_autograd(model: Potential, structure: Structure, directions: np.ndarray | Tensor) -> np.ndarray:
    """H v, ``(k, n_atoms, 3)``, as gradients of -F.v: one backward pass through the forces for each direction."""
    vectors = checked_directions(directions, len(structure))
    batch = model.batch(structure)
    with torch.enable_grad():
        positions = batch.positions.detach().requires_grad_(True)
        prediction = model(batch.at(positions, batch.cell, batch.external_potential))
        forces = energy_forces(prediction.energy, positions, create_graph=True)
        if not forces.requires_grad:
            return np.zeros(tuple(vectors.shape))
        rows = []
        for v in vectors.to(forces):
            (row,) = torch.autograd.grad(-(forces * v).sum(), positions, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(positions) if row is None else row)
    return torch.stack(rows).detach().cpu().numpy().astype(np.float64)
