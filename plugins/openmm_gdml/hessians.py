"""Second derivatives of a GDML energy, and its terms that come from Hessian-vector products among the training data.

The kernel's derivatives are in closed form, those of the descriptor by forward over reverse mode:
E(r) = sum_p f(x(p r)), so that H v = sum_p J_p^T (grad^2 f) J_p v + (d^2 x[v, .])^T grad f, without a Jacobian.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from openmm_gdml import kernel
from openmm_gdml.differentiation import push
from openmm_gdml.matern_jets import Expansion, SecondOrder
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.hessian import checked_directions

if TYPE_CHECKING:
    from openmm_gdml.model import GDMLPotential

#: buffers of a model with Hessian-vector products: x_l, a_l, b_l, ``(L, D)`` each
TERMS = ("product_points", "product_directions", "product_coefficients")
#: numbers that one temporary array may hold (32 MB)
TEMPORARY = 1 << 22


def product_energies(model: GDMLPotential, x: Tensor) -> Tensor:
    """Differentiable energies ``(B, S)`` eV of those terms for centred queries ``x (B, S, D)``."""
    z, a, b = (model.get_buffer(name) for name in TERMS)
    z = z - model.prepared.centre
    q = (x.square().sum(-1, keepdim=True) + z.square().sum(1) - 2.0 * (x @ z.T)).clamp(min=0.0)
    ua, ub = x @ a.T - (z * a).sum(1), x @ b.T - (z * b).sum(1)
    return kernel.second_order_energy(q, ua, ub, (a * b).sum(1), model.config.sigma)


def product_forces(model: GDMLPotential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies ``(B, S)`` and -dE/dx ``(B, S, D)`` of those terms for centred queries ``x (B, S, D)``."""
    scale = sqrt(5.0) / model.config.sigma
    terms, flat = _second_order(model), scale * (x + model.prepared.centre).flatten(0, 1)
    assert terms is not None
    return terms.value(flat).view(x.shape[:2]), -scale * terms.gradient(flat).view_as(x)


def _second_order(model: GDMLPotential) -> SecondOrder | None:
    scale = sqrt(5.0) / model.config.sigma
    return SecondOrder(*(scale * model.get_buffer(name) for name in TERMS)) if model.config.n_products else None


def expansion_of(model: GDMLPotential) -> Expansion:
    """The model's energy as a function of scaled descriptors, without the sum over permutations and the constant."""
    scale = sqrt(5.0) / model.config.sigma
    return Expansion(scale * model.descriptors, scale * model.coefficients, model.energy_weights, _second_order(model))


def hessian_products(model: GDMLPotential, structure: Structure, directions: np.ndarray) -> np.ndarray:
    """H v for directions ``(k, N, 3)``: ``(k, N, 3)`` eV/angstrom^2 times v (see `Potential.hessian_products`)."""
    model.check(structure)
    vectors = checked_directions(directions, len(structure)).to(model.device)
    r = torch.as_tensor(structure.positions).to(vectors)
    lattice = None
    if structure.cell is not None:
        lattice = torch.from_numpy(model.lattice_for(structure.positions, structure.cell)).to(vectors)
    expansion, scale = expansion_of(model), sqrt(5.0) / model.config.sigma

    def described(positions: Tensor) -> Tensor:
        return scale * model.describe(positions[:, model.permutations], lattice).flatten(0, 1)

    def products(v: Tensor) -> Tensor:
        here = r.repeat(len(v), 1, 1)
        x, a = push(described, (here,), (v,))
        gradient, change = expansion.gradient(x), expansion.hessian_times(x, a)

        def pulled(positions: Tensor, g: Tensor) -> Tensor:
            _, pull_back, *_ = vjp(described, positions)
            return pull_back(g)[0]

        return push(pulled, (here, gradient), (v, change))[1]

    size = max(1, TEMPORARY // (len(model.permutations) * max(model.descriptors.shape)))
    parts = [products(part) for part in vectors.split(size)]
    return torch.cat(parts).cpu().numpy() if parts else np.zeros((0, len(structure), 3))
