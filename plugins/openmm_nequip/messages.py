"""The messages of a convolution as a small C++ kernel, compiled once per number of features and kept on disk.

`layers.Convolution.messages` makes tensors of pairs times paths times components; the kernel reads a pair's weights
once, skips pairs beyond the cutoff, and writes nothing per pair but derivatives. It has first derivatives only, and is
registered with torch as operators, so that a compiled graph calls it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_mlff.potentials import native

SOURCE = Path(__file__).with_name("messages.cpp")
#: sums may be reordered, as in any other product of matrices
FLAGS = (*native.FLAGS, "-fassociative-math", "-fno-signed-zeros")


@functools.cache
def library(features: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for one number of features and precision; raises `RuntimeError` if it cannot be compiled."""
    real = {torch.float32: "float", torch.float64: "double"}[dtype]
    return native.library(SOURCE, (*FLAGS, f"-DFEATURES={features}", f"-DREAL={real}"))


def usable(device: torch.device) -> bool:
    """Whether tensors of this device can go through the kernel."""
    return device.type == "cpu" and native.compiler() is not None


def _call(
    name: str, h: Tensor, a: Tensor, table: Tensor, n_outputs: int, inputs: list[Tensor], results: list[Tensor]
) -> None:
    kernel = library(h.shape[2], h.dtype)
    sizes = (*a.shape[:2], h.shape[1], table.shape[0], a.shape[2], n_outputs)
    inputs = [x.contiguous() for x in inputs]  # kept alive until the call returns
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in [*inputs, *results]]
    getattr(kernel, name)(*(ctypes.c_int64(n) for n in sizes), *pointers)


@torch.library.custom_op("openmm_nequip::messages_forward", mutates_args=(), device_types="cpu")
def forward_op(h: Tensor, w: Tensor, a: Tensor, active: Tensor, index: Tensor, table: Tensor, n_outputs: int) -> Tensor:
    """Sums over neighbours, ``(n_atoms, n_outputs, F)``; arguments as in `Messages`."""
    out = h.new_empty(h.shape[0], n_outputs, h.shape[2])
    _call("messages_forward", h, a, table, n_outputs, [h, w, a, active, index, table], [out])
    return out


@torch.library.custom_op("openmm_nequip::messages_backward", mutates_args=(), device_types="cpu")
def backward_op(
    h: Tensor, w: Tensor, a: Tensor, active: Tensor, index: Tensor, table: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives with respect to h, w and a."""
    results = [torch.empty(x.shape, dtype=x.dtype) for x in (h, w, a)]
    inputs = [h, w, a, active, index, table, gradient]
    _call("messages_backward", h, a, table, gradient.shape[1], inputs, results)
    return results[0], results[1], results[2]


@forward_op.register_fake
def _(h: Tensor, w: Tensor, a: Tensor, active: Tensor, index: Tensor, table: Tensor, n_outputs: int) -> Tensor:
    return h.new_empty(h.shape[0], n_outputs, h.shape[2])


@backward_op.register_fake
def _(
    h: Tensor, w: Tensor, a: Tensor, active: Tensor, index: Tensor, table: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), w.new_empty(w.shape), a.new_empty(a.shape)


class Messages(torch.autograd.Function):
    """``apply(h, w, a, active, index, table, n_outputs) -> (n_atoms, n_outputs, F)``.

    h ``(n_atoms, rows, F)`` features of all irreps, one after the other; w ``(n_atoms, slots, paths F)``; a
    ``(n_atoms, slots, couplings)`` blocks ``(2c+1, 2a+1)`` of all kinds of paths; active ``(n_atoms, slots)``, zero
    where a pair does not count; index ``(n_atoms, slots)``; table ``(paths, 6)`` int64, see the C++ source.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs[:-1])
        return forward_op(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*backward_op(*ctx.saved_tensors, *gradients), None, None, None, None)
