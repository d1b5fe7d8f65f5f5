"""The neighbour sums of `pair_sums` with second derivatives, for training: the C++ kernel instead of tensors of pairs.

A loss of forces differentiates the sums twice. Written with torch's operations, each of the two writes a dozen tensors
of pairs times features, padding included, which takes most of the time of a training step. The sums are linear in each
of what they are made of (radial functions, their weights, angular functions, features), so that their derivatives are
sums of the same form, and the kernel needs no more memory for them than for the sums.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from openmm_mlff.potentials import native
from openmm_spookynet.pair_kernel import call, empty_sums


def kernels_run_on(x: Tensor) -> bool:
    """Whether kernels can run: on the CPU, with one thread, with a compiler; a graph that is recorded holds none."""
    return x.device.type == "cpu" and torch.get_num_threads() == 1 and get_proxy_mode() is None and _has_compiler()


@functools.cache
def _has_compiler() -> bool:
    return native.compiler() is not None


def native_pair_sums(
    rbf: Tensor, f: Tensor, p: Tensor, d: Tensor, spd: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """S ``(n_atoms, F)``, P ``(n_atoms, 3, F)`` and D ``(n_atoms, 5, F)``; arguments as in `pair_sums`."""
    return TrainingPairSums.apply(rbf, f.to(rbf.dtype), p, d, spd, weight, index)


class TrainingPairSums(torch.autograd.Function):
    """``apply(rbf, f, p, d, spd, weight, index) -> S, P, D``; arguments as in `pair_sums.fused_pair_sums`.

    Differentiable twice, but not by `weight` in the first derivative and by anything in the second (`RuntimeError`).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        _, _, _, y2, spd, _, _ = inputs
        sums = empty_sums(y2, spd)
        call("pair_sums_forward", inputs[0], y2, spd, list(inputs), sums)
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        d_rbf, d_y1, d_y2, d_spd, d_weight = _Backward.apply(ctx.needs_input_grad[5], *ctx.saved_tensors, *gradients)
        return d_rbf, None, d_y1, d_y2, d_spd, d_weight, None


class _Backward(torch.autograd.Function):
    """The first derivatives, as a function of what the sums were made of and of the derivatives by S, P and D."""

    @staticmethod
    def forward(ctx: Any, by_weight: bool, *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        rbf, _, y1, y2, spd, weight = inputs[:6]
        outputs = [torch.zeros(x.shape, dtype=x.dtype) for x in (rbf, y1, y2, spd)]
        d_weight = torch.zeros(weight.shape, dtype=weight.dtype) if by_weight else None
        call("pair_sums_backward", rbf, y2, spd, list(inputs), [*outputs, d_weight])
        return *outputs, d_weight

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        rbf, _, y1, y2, spd, weight, _, gs, gp, gd = inputs
        if vectors[4] is not None:
            raise RuntimeError("pair sums: the derivative by the radial weights cannot be differentiated again")
        given = [
            torch.zeros(x.shape, dtype=x.dtype) if v is None else v
            for v, x in zip(vectors[:4], (rbf, y1, y2, spd), strict=True)
        ]
        outputs = [torch.zeros(x.shape, dtype=x.dtype) for x in (rbf, y1, y2, spd, weight, gs, gp, gd)]
        _second(list(inputs), given, outputs)
        e_rbf, e_y1, e_y2, e_spd, e_weight, e_gs, e_gp, e_gd = outputs
        return None, e_rbf, None, e_y1, e_y2, e_spd, e_weight, None, e_gs, e_gp, e_gd


def _second(inputs: list[Tensor], vectors: list[Tensor], outputs: list[Tensor]) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("pair sums: expected at most two derivatives, got a third (create_graph) of the C++ kernel")
    call("pair_sums_second", inputs[0], inputs[3], inputs[4], [*inputs, *vectors], outputs)
