"""queries -> energies and forces: descriptors of permuted queries against all training points, in closed form.

Distances and products with the training points are two matrix products for a whole batch; no graph is made, except
through a descriptor that is known as a function only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openmm_gdml import hessians, kernel
from openmm_gdml.descriptors import pair_permutations, times_jacobian_transposed

if TYPE_CHECKING:
    from openmm_gdml.model import GDMLPotential


@dataclass
class Prepared:
    """What follows from the coefficients: centred training points, so that differences lose no digits."""

    permutations: Tensor  # (S, D) of the pairs of atoms where the descriptor is one of pairs, else (S, N) of the atoms
    centre: Tensor  # (D,) mean of the training points
    points: Tensor  # (M, D) x_j - centre
    squares: Tensor  # (M,) |x_j - centre|^2
    products: Tensor  # (M,) (x_j - centre) . A_j


def prepare(model: GDMLPotential) -> Prepared:
    """Centred training points of a model and what follows from them."""
    centre = model.descriptors.mean(0)
    points = model.descriptors - centre
    permutations = pair_permutations(model.permutations) if model.closed_form else model.permutations
    return Prepared(permutations, centre, points, points.square().sum(1), (points * model.coefficients).sum(1))


def permuted(model: GDMLPotential, positions: Tensor, lattice: Tensor | None) -> Tensor:
    """Descriptors of all permuted queries, centred, ``(B, S, D)``.

    Args:
        positions: ``(B, N, 3)`` angstrom. lattice: the wrapping lattice, ``(3, 3)`` or one for each, ``(B, 3, 3)``.
    """
    p = model.prepared
    if model.closed_form:
        return model.describe(positions, lattice)[..., p.permutations] - p.centre
    queries = positions[..., p.permutations, :]  # (B, S, N, 3)
    if lattice is not None and lattice.dim() == 3:
        lattice = lattice[:, None]
    return model.describe(queries, lattice) - p.centre


def products(model: GDMLPotential, x: Tensor) -> tuple[Tensor, Tensor]:
    """|u|^2 and u.A of centred queries ``x (B, S, D)`` with all training points, ``(B, S, M)`` each."""
    p = model.prepared
    q = x.square().sum(-1, keepdim=True) + p.squares - 2.0 * (x @ p.points.T)
    return q.clamp(min=0.0), x @ model.coefficients.T - p.products


def energies_and_forces(model: GDMLPotential, positions: Tensor, lattice: Tensor | None) -> tuple[Tensor, Tensor]:
    """Energies ``(B,)`` eV and forces ``(B, N, 3)`` eV/angstrom of positions ``(B, N, 3)`` angstrom, no graph."""
    return (_closed if model.closed_form else _by_descriptor)(model, positions, lattice)


@torch.no_grad()
def _closed(model: GDMLPotential, positions: Tensor, lattice: Tensor | None) -> tuple[Tensor, Tensor]:
    p, gradients = model.prepared, model.pair_gradients
    assert gradients is not None
    x, g = gradients(positions, lattice)
    energy, f = _descriptor_forces(model, x[..., p.permutations] - p.centre)
    # back from the permuted descriptors to those of the query, summed over permutations
    index = p.permutations.expand_as(f).reshape(len(x), -1)
    force = torch.zeros_like(x).scatter_add_(1, index, f.reshape(len(x), -1))
    return energy, times_jacobian_transposed(g, force, positions.shape[-2])


def _by_descriptor(model: GDMLPotential, positions: Tensor, lattice: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        r = positions.detach().requires_grad_(True)
        x = permuted(model, r, lattice)
        with torch.no_grad():
            energy, f = _descriptor_forces(model, x)
        (force,) = torch.autograd.grad(x, r, f)
    return energy, force


def _descriptor_forces(model: GDMLPotential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies ``(B,)`` and -dE/dx ``(B, S, D)`` of centred queries ``x (B, S, D)``."""
    q, v = products(model, x)
    terms, w1, w2 = kernel.energy_and_weights(q, v, model.config.sigma, model.energy_weights)
    f = w1.sum(-1, keepdim=True) * x - w1 @ model.prepared.points - w2 @ model.coefficients
    if model.config.n_products:
        more, more_f = hessians.product_forces(model, x)
        terms, f = terms + more, f + more_f
    return terms.sum(-1) + model.shift, f
