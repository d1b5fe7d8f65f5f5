"""The Swish activation with first and second derivatives in one pass each, for training on the CPU.

With torch's operations a training step spends a third of its time on the dozen elementwise products that
differentiating alpha x sigmoid(beta x) twice is made of.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_mlff.potentials import native
from openmm_spookynet.pair_kernel import FLAGS

SOURCE = Path(__file__).with_name("swish.cpp")


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for one precision; raises `RuntimeError` if it cannot be compiled."""
    real, single = {torch.float32: ("float", 1), torch.float64: ("double", 0)}[dtype]
    return native.library(SOURCE, (*FLAGS, f"-DREAL={real}", f"-DSINGLE={single}"))


def _call(name: str, x: Tensor, alpha: Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """x ``(rows, F)`` or ``(groups, rows, F)``; alpha ``(F,)`` or ``(groups, 1, F)``."""
    rows, features = x.shape[-2:]
    groups = 1 if alpha.dim() == 1 else alpha.shape[0]
    stride = rows * features if x.dim() == 3 else 0
    inputs = [t.contiguous() for t in inputs]  # kept alive until the call returns
    sizes = [ctypes.c_int64(int(n)) for n in (groups, rows, features, stride)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in [*inputs, *outputs]]
    getattr(library(x.dtype), name)(*sizes, *pointers)


class Swish(torch.autograd.Function):
    """``apply(x, alpha, beta) -> alpha x sigmoid(beta x)``, differentiable twice with respect to x.

    x ``(rows, F)`` with alpha and beta ``(F,)`` gives ``(rows, F)``; x ``(rows, F)`` or ``(groups, rows, F)`` with
    alpha and beta ``(groups, 1, F)`` gives ``(groups, rows, F)``. First derivatives by alpha and beta cannot be
    differentiated again (`RuntimeError`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor) -> Any:
        ctx.save_for_backward(x, alpha, beta)
        y = x.new_empty(x.shape if alpha.dim() == 1 else (alpha.shape[0], *x.shape[-2:]))
        _call("swish_forward", x, alpha, [x, alpha, beta], [y])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Backward.apply(*ctx.saved_tensors, *gradients)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor, gradient: Tensor) -> Any:
        ctx.save_for_backward(x, alpha, beta, gradient)
        ctx.set_materialize_grads(False)
        outputs = [torch.zeros(t.shape, dtype=t.dtype) for t in (x, alpha, beta)]
        _call("swish_backward", x, alpha, [x, alpha, beta, gradient], outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        x, alpha, beta, gradient = ctx.saved_tensors
        if vectors[1] is not None or vectors[2] is not None:
            raise RuntimeError("activation: the derivatives by alpha and beta cannot be differentiated again")
        if torch.is_grad_enabled():
            raise RuntimeError(
                "activation: expected at most two derivatives, got a third (create_graph) of the C++ kernel"
            )
        if vectors[0] is None:
            return None, None, None, None
        outputs = [torch.zeros(t.shape, dtype=t.dtype) for t in (x, alpha, beta, gradient)]
        _call("swish_second", x, alpha, [x, alpha, beta, gradient, vectors[0]], outputs)
        return tuple(outputs)
