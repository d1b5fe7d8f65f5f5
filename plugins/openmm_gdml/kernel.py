"""The Matern-5/2 kernel of GDML in closed form.

kappa(d) = (1 + d + d^2/3) e^-d with d = sqrt(5) |x - x'| / sigma (Chmiela et al., Sci. Adv. 3, e1603015 (2017)). All
functions take q = |x - x'|^2, in which kappa and its first derivative are smooth at zero.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

#: below this d the third derivative of the kernel, which has a cusp at d = 0, is taken as zero
CUSP = 1e-30


def scaled_distance(q: Tensor, sigma: float) -> Tensor:
    """d = sqrt(5 q) / sigma; q below zero (rounding) counts as zero."""
    return q.clamp(min=0.0).sqrt() * (sqrt(5.0) / sigma)


class Matern(torch.autograd.Function):
    """``Matern.apply(q, sigma, order)``: order 2 is kappa, order 1 is (1 + d) e^-d, order 0 is e^-d.

    Each is the derivative of the one before by q, times -6 sigma^2/5 (2 -> 1) and -2 sigma^2/5 (1 -> 0), and is
    differentiated so; automatic differentiation would divide zero by zero at d = 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, sigma: float, order: int) -> Tensor:
        d = scaled_distance(q, sigma)
        factor = 1.0 + d if order == 1 else 1.0 + d + d * d / 3.0 if order == 2 else None
        return torch.exp(-d) if factor is None else torch.exp(-d) * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, ctx.sigma, ctx.order = inputs
        ctx.save_for_backward(q)
        ctx.save_for_forward(q)

    @staticmethod
    def slope(q: Tensor, sigma: float, order: int) -> Tensor:
        """Derivative by q."""
        if order:
            return Matern.apply(q, sigma, order - 1) * (-5.0 / ((6.0 if order == 2 else 2.0) * sigma**2))
        d = scaled_distance(q, sigma)
        return torch.where(d > CUSP, torch.exp(-d) / d.clamp(min=CUSP) * (-5.0 / (2.0 * sigma**2)), 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (q,) = ctx.saved_tensors
        return gradient * Matern.slope(q, ctx.sigma, ctx.order), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:
        (q,) = ctx.saved_tensors
        return tangent * Matern.slope(q, ctx.sigma, ctx.order)


def kappa(q: Tensor, sigma: float) -> Tensor:
    """(1 + d + d^2/3) e^-d, twice differentiable everywhere."""
    return Matern.apply(q, sigma, 2)


def energy(q: Tensor, v: Tensor, sigma: float, energy_coefficients: Tensor | None = None) -> Tensor:
    """Energy of an expansion, summed over its rows: ``q (..., M)``, ``v = u.A (..., M)`` -> ``(...)``.

    E = sum_j (5/(3 sigma^2)) (1 + d) e^-d (u . A_j), and with energy coefficients + sum_j alpha_j kappa.
    """
    total = (Matern.apply(q, sigma, 1) * v).sum(-1) * (5.0 / (3.0 * sigma**2))
    if energy_coefficients is not None:
        total = total + kappa(q, sigma) @ energy_coefficients
    return total


def energy_and_weights(
    q: Tensor, v: Tensor, sigma: float, energy_coefficients: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy ``(...)`` and the weights w1, w2 ``(..., M)`` of the force F = -dE/dx = sum_j (w1_j u_j - w2_j A_j).

    w1 = (25/(3 sigma^4)) e^-d (u . A) (+ alpha_j (5/(3 sigma^2)) (1 + d) e^-d), w2 = (5/(3 sigma^2)) (1 + d) e^-d.
    """
    d = scaled_distance(q, sigma)
    e = torch.exp(-d)
    w2 = (1.0 + d).mul_(e).mul_(5.0 / (3.0 * sigma**2))
    total = torch.linalg.vecdot(w2, v)
    w1 = e * v * (25.0 / (3.0 * sigma**4))
    if energy_coefficients is not None:
        total = total + ((1.0 + d + d * d / 3.0) * e) @ energy_coefficients
        w1 = w1 + w2 * energy_coefficients
    return total, w1, w2


def second_order_energy(q: Tensor, ua: Tensor, ub: Tensor, ab: Tensor, sigma: float) -> Tensor:
    """Energy of the terms of Hessian-vector products, ``(..., L)`` each (``ab (L,)``) -> ``(...)``.

    E = sum_l (a_l . grad)(b_l . grad) kappa = sum_l (25/(3 sigma^4)) e^-d (u.a)(u.b) - (5/(3 sigma^2)) (1 + d) e^-d a.b
    """
    curved = Matern.apply(q, sigma, 0) * ua * ub * (25.0 / (3.0 * sigma**4))
    return (curved - Matern.apply(q, sigma, 1) * ab * (5.0 / (3.0 * sigma**2))).sum(-1)
