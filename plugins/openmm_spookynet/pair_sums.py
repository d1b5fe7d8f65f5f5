"""Sums over neighbours in the form that a compiler fuses: no tensor of pairs times features is ever written.

For every atom i, with neighbours j, radial functions rho_k and angular functions Y::

    S_i = sum_j (W_s rho_ij) s_j,   P_i = sum_j Y1_ij (W_p rho_ij) p_j,   D_i = sum_j Y2_ij (W_d rho_ij) d_j

The derivative with respect to s_j, p_j, d_j is a sum over the same neighbourhoods seen from j, because the directed
list holds every pair in both directions: rho and Y2 are even and Y1 is odd under exchange. That replaces a scatter
by a gather. First derivatives only; training differentiates twice and uses `InteractionModule.local_features` as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openmm_mlff.potentials import native
from openmm_spookynet.pair_kernel import PairSumsKernel

#: (rbf, f, p, d, spd, weight, index) -> S, P, D
PairSumsFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
#: from this many neighbours on the hand-written kernel beats what the compiler makes of the sums
KERNEL_MIN_SLOTS = 24


def _radial_products(rbf: Tensor, weight: Tensor) -> Tensor:
    """``(n_atoms, slots, K)``, ``(K, F)`` -> ``(n_atoms, slots, F)``, as K products that fuse into their use."""
    total = rbf[..., 0, None] * weight[0]
    for k in range(1, weight.shape[0]):
        total = total + rbf[..., k, None] * weight[k]
    return total


def _contract(functions: Tensor, values: Tensor) -> Tensor:
    """``(n_atoms, m, slots)`` with ``(n_atoms, slots, F)`` -> ``(n_atoms, m, F)``."""
    return torch.stack([(functions[:, c, :, None] * values).sum(1) for c in range(functions.shape[1])], 1)


def fused_pair_sums(
    rbf: Tensor, f: Tensor, p: Tensor, d: Tensor, spd: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """S ``(n_atoms, F)``, P ``(n_atoms, 3, F)`` and D ``(n_atoms, 5, F)`` by the fastest of the two ways.

    Args: as in `PairSums`, and f ``(n_atoms, slots)``, zero where a pair does not count.
    """
    if index.shape[1] >= KERNEL_MIN_SLOTS and torch.get_num_threads() == 1 and native.compiler() is not None:
        return PairSumsKernel.apply(rbf, f.to(rbf.dtype), p, d, spd, weight, index)
    return PairSums.apply(rbf, p, d, spd, weight, index)


class PairSums(torch.autograd.Function):
    """``apply(rbf, p, d, spd, weight, index) -> S (n_atoms, F), P (n_atoms, 3, F), D (n_atoms, 5, F)``.

    rbf ``(n_atoms, slots, K)``, p ``(n_atoms, 3, slots)``, d ``(n_atoms, 5, slots)``, spd ``(n_atoms, 3F)``,
    weight ``(K, 3F)`` (constant), index ``(n_atoms, slots)``; padding has rbf = 0.
    """

    @staticmethod
    def forward(ctx: Any, rbf: Tensor, p: Tensor, d: Tensor, spd: Tensor, weight: Tensor, index: Tensor) -> Any:
        ctx.save_for_backward(rbf, p, d, spd, weight, index)
        features = spd.shape[1] // 3
        sums = []
        for t, functions in enumerate((None, p, d)):
            block = slice(t * features, (t + 1) * features)
            received = _radial_products(rbf, weight[:, block]) * spd[:, block][index]
            sums.append(received.sum(1) if functions is None else _contract(functions, received))
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rbf, p, d, spd, weight, index = ctx.saved_tensors
        features = spd.shape[1] // 3
        d_spd, d_functions = [], []
        d_rbf = torch.zeros_like(rbf)
        for t, (functions, gradient) in enumerate(zip((None, p, d), gradients, strict=True)):
            block = slice(t * features, (t + 1) * features)
            w = weight[:, block]
            g = _radial_products(rbf, w)
            source = spd[:, block][index]
            if functions is None:
                here, there = gradient[:, None], gradient[index]
            else:
                sign = -1.0 if t == 1 else 1.0  # Y_ji = (-1)^l Y_ij
                terms = range(functions.shape[1])
                here = sum(functions[:, c, :, None] * gradient[:, None, c] for c in terms)
                there = sum(sign * functions[:, c, :, None] * gradient[:, c][index] for c in terms)
                moved = g * source
                d_functions.append(torch.stack([(moved * gradient[:, None, c]).sum(-1) for c in terms], 1))
            d_spd.append((g * there).sum(1))
            d_rbf = d_rbf + (here * source) @ w.T
        return d_rbf, d_functions[0], d_functions[1], torch.cat(d_spd, 1), None, None
