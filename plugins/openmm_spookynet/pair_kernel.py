"""The neighbour sums of `pair_sums` as a small C++ kernel, compiled once per model size and kept on disk.

For molecules whose neighbour table is mostly padding the kernel does a fraction of the work: it skips padding and pairs
beyond the cutoff, and writes nothing per pair but derivatives. It is registered with torch as operators, so that a
compiled graph calls it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_mlff.potentials import native

SOURCE = Path(__file__).with_name("pair_kernel.cpp")
#: sums may be reordered, as in any other product of matrices
FLAGS = (*native.FLAGS, "-fassociative-math", "-fno-signed-zeros")


@functools.cache
def library(features: int, radial: int, angular_d: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for one model size and precision; raises `RuntimeError` if it cannot be compiled."""
    real = {torch.float32: "float", torch.float64: "double"}[dtype]
    sizes = (f"-DFEATURES={features}", f"-DRADIAL={radial}", f"-DANGULAR_D={angular_d}", f"-DREAL={real}")
    return native.library(SOURCE, (*FLAGS, *sizes))


def call(
    name: str, rbf: Tensor, y2: Tensor, spd: Tensor, inputs: list[Tensor], outputs: Sequence[Tensor | None]
) -> None:
    """Run a function of the kernel for the sizes of rbf, y2 and spd; outputs that are None are left out."""
    kernel = library(spd.shape[1] // 3, rbf.shape[2], y2.shape[1], rbf.dtype)
    inputs = [x.contiguous() for x in inputs]  # kept alive until the call returns
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in [*inputs, *outputs]]
    getattr(kernel, name)(ctypes.c_int64(rbf.shape[0]), ctypes.c_int64(rbf.shape[1]), *pointers)


@torch.library.custom_op("openmm_spookynet::pair_sums_forward", mutates_args=(), device_types="cpu")
def forward_op(
    rbf: Tensor, f: Tensor, y1: Tensor, y2: Tensor, spd: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """S ``(n_atoms, F)``, P ``(n_atoms, 3, F)``, D ``(n_atoms, 5, F)``; arguments as in `pair_sums.PairSums`."""
    s, p, d = empty_sums(y2, spd)
    call("pair_sums_forward", rbf, y2, spd, [rbf, f, y1, y2, spd, weight, index], [s, p, d])
    return s, p, d


@torch.library.custom_op("openmm_spookynet::pair_sums_backward", mutates_args=(), device_types="cpu")
def backward_op(
    rbf: Tensor,
    f: Tensor,
    y1: Tensor,
    y2: Tensor,
    spd: Tensor,
    weight: Tensor,
    index: Tensor,
    gs: Tensor,
    gp: Tensor,
    gd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives with respect to rbf, y1, y2 and spd."""
    d_rbf, d_y1, d_y2, d_spd = (torch.zeros(x.shape, dtype=x.dtype) for x in (rbf, y1, y2, spd))
    inputs = [rbf, f, y1, y2, spd, weight, index, gs, gp, gd]
    call("pair_sums_backward", rbf, y2, spd, inputs, [d_rbf, d_y1, d_y2, d_spd, None])
    return d_rbf, d_y1, d_y2, d_spd


@forward_op.register_fake
def _(rbf: Tensor, f: Tensor, y1: Tensor, y2: Tensor, spd: Tensor, weight: Tensor, index: Tensor) -> Any:
    return empty_sums(y2, spd)


@backward_op.register_fake
def _(
    rbf: Tensor, f: Tensor, y1: Tensor, y2: Tensor, spd: Tensor, weight: Tensor, index: Tensor, *gradients: Tensor
) -> Any:
    return tuple(x.new_empty(x.shape) for x in (rbf, y1, y2, spd))


def empty_sums(y2: Tensor, spd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for S, P and D."""
    atoms, features = spd.shape[0], spd.shape[1] // 3
    return (
        spd.new_empty(atoms, features),
        spd.new_empty(atoms, 3, features),
        spd.new_empty(atoms, y2.shape[1], features),
    )


class PairSumsKernel(torch.autograd.Function):
    """`pair_sums.PairSums` with the kernel: ``apply(rbf, f, p, d, spd, weight, index) -> S, P, D``; f is constant."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        return forward_op(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        d_rbf, d_y1, d_y2, d_spd = backward_op(*ctx.saved_tensors, *gradients)
        return d_rbf, None, d_y1, d_y2, d_spd, None, None
