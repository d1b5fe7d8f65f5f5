"""Functions of one distance as tables of value, slope and curvature, which quintic Hermite polynomials join."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from openmm_so3krates.layers import Filter, Layer
from openmm_so3krates.model import SO3krates
from openmm_so3krates.terms import COULOMB, switch_off

#: intervals per angstrom for 32 radial functions: the polynomials then differ from the networks by less than rounding
KNOTS_PER_ANGSTROM = {torch.float32: 28.0, torch.float64: 224.0}
#: angstrom, of the tables of long-range functions where a switch is two angstroms long or longer
LONG_STEP = {torch.float32: 0.02, torch.float64: 0.005}
#: of sigma: from here on erf(r / sigma) is 1 in double precision
BARE_FROM = 6.5


def filter_knots(model: SO3krates, dtype: torch.dtype) -> int:
    """Number of intervals of the model's filter tables for evaluation in a precision."""
    # features of Bernstein polynomials are as wide as 1/sqrt(K)
    width = math.sqrt(max(1.0, model.config.num_basis_functions / 32))
    return math.ceil(KNOTS_PER_ANGSTROM[dtype] * width * model.cutoff)


def hermite_table(function: Callable[[Tensor], Tensor], knots: Tensor, step: float) -> Tensor:
    """Value, slope times step and curvature times step^2 of ``(K,) -> (K, C)`` at the knots, ``(K, 3, C)``."""

    def slope(r: Tensor) -> Tensor:
        return torch.func.jvp(function, (r,), (torch.ones_like(r),))[1]

    both: tuple[Tensor, Tensor] = torch.func.jvp(slope, (knots,), (torch.ones_like(knots),))  # type: ignore[assignment]
    first, second = both
    return torch.stack([function(knots), first * step, second * step**2], 1)


def filter_table(model: SO3krates, layer: int, knots: int, without_euclidean: bool) -> Tensor:
    """Filters of both attentions as functions of the distance, ``(knots + 1, 3, 2F)`` float64; `model` in float64.

    Bias of the spherical parts included; with `without_euclidean` (all Euclidean variables are zero) these parts are
    constants, and included as a whole.
    """
    block = cast(Layer, model.layers[layer]).attention
    both = [block.filter_features, cast(Filter, block.filter_euclidean)]
    places = torch.linspace(0.0, model.cutoff, knots + 1, dtype=torch.float64)
    constants = []
    for one in both:
        assert one.spherical is not None
        constants.append(one.spherical.second.bias.detach())
        if without_euclidean:
            constants[-1] = one.spherical(places.new_zeros(len(model.config.degrees))).detach()

    def radial(r: Tensor) -> Tensor:
        basis = model.radial_basis(r, torch.float64)
        return torch.cat([one.radial(basis) + c for one, c in zip(both, constants, strict=True)], -1)

    return hermite_table(radial, places, model.cutoff / knots)


def long_range_table(model: SO3krates, electrostatics: bool, dtype: torch.dtype) -> Tensor:
    """V(r) in 1/angstrom and the switch of the dispersion, ``(K, 3, 2)`` float64, in steps of about `LONG_STEP`.

    `electrostatics` False leaves V out (zero); `dtype` is the precision of the evaluation.
    """
    limit, sigma = model.long_range_cutoff, model.config.electrostatic_sigma
    end = BARE_FROM * sigma if limit is None else limit
    shortest = min(model.config.dispersion_damping or 2.0, 2.0) if limit is not None else 2.0
    n = int(end / (LONG_STEP[dtype] * 0.5 * shortest)) + 1
    knots = torch.linspace(0.0, end, n + 1, dtype=torch.float64)
    if limit is not None:
        # the curvature at the end is that before it; behind it everything is zero
        knots[-1] = math.nextafter(limit, 0.0)
    step = end / n

    def functions(r: Tensor) -> Tensor:
        one = torch.ones_like(r)
        potential = torch.zeros_like(r)
        if electrostatics and model.electrostatics is not None:
            potential = model.electrostatics(one, one, r, limit) / COULOMB
        damping = model.config.dispersion_damping
        switch = one if limit is None or not damping else switch_off(r, limit - damping, limit)
        return torch.stack([potential, switch * one], -1)

    table = hermite_table(functions, knots[1:], step)
    # V is even: from the first knot back to r = 0, where its formula is 0/0
    first = table[0]
    zero = torch.stack([first[0] - 0.5 * first[1], torch.zeros_like(first[1]), first[2]])
    return torch.cat([zero[None], table])
