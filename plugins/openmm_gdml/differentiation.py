"""Directional derivatives of descriptors, and descriptors that are written for one geometry made to take many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from openmm_gdml.descriptors import Descriptor


def push(f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivative along a direction (`torch.func.jvp`)."""
    result = torch.func.jvp(f, at, along)
    return result[0], result[1]


def batched(function: Descriptor, example: Tensor) -> Descriptor:
    """A descriptor that takes any number of leading dimensions: itself if it does, else itself mapped over them.

    Args:
        function: positions ``(N, 3)`` or ``(..., N, 3)`` -> ``(D,)`` or ``(..., D)``.
        example: a few different geometries, ``(n, N, 3)``, n >= 1.

    Raises `ValueError` naming what the descriptor does instead.
    """
    if example.ndim != 3 or not len(example):
        raise ValueError(f"example: expected shape (n, n_atoms, 3), got {tuple(example.shape)}")
    pair = example[:1].repeat(2, 1, 1) if len(example) == 1 else example[:2]
    try:
        one = function(pair[0])
    except Exception as error:
        raise ValueError(f"descriptor: it failed for positions {tuple(pair[0].shape)}: {error}") from error
    if not isinstance(one, Tensor) or one.ndim != 1 or one.dtype != torch.float64:
        got = f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
        raise ValueError(f"descriptor: expected one row of float64 numbers for positions (n_atoms, 3), got {got}")
    if not bool(torch.isfinite(one).all()):
        raise ValueError("descriptor: expected finite numbers, got NaN or infinity at the first geometry")
    both = torch.stack([one, function(pair[1])])
    for candidate in (function, mapped(function)):
        try:
            values = candidate(pair)
        except Exception:
            continue
        if isinstance(values, Tensor) and values.shape == both.shape and torch.allclose(values, both):
            return candidate
    raise ValueError(
        f"descriptor: expected shape (n, {len(one)}) for positions (n, n_atoms, 3); it neither takes leading "
        "dimensions nor can torch.func.vmap map it over geometries"
    )


def mapped(function: Descriptor) -> Descriptor:
    """A function of ``(N, 3)`` as one of ``(..., N, 3)``; keywords are handed on."""

    def over_all(positions: Tensor, **options: Any) -> Tensor:
        if positions.ndim == 2:
            return function(positions, **options)
        rows = vmap(functools.partial(function, **options))(positions.flatten(0, -3))
        return rows.unflatten(0, positions.shape[:-2])

    return over_all
