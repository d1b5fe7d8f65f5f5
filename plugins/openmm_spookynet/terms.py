"""Radial functions and analytic energy terms of SpookyNet (Unke et al. 2021, Methods; Supplementary Note on D4).

Lengths in angstrom and energies in eV unless a line says bohr or hartree. The constants are those that the published
model was trained with; they are part of the trained function.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

COULOMB = 14.399645351950548  # e^2/(4 pi eps0), eV angstrom


def inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def cutoff_function(r_squared: Tensor, cutoff: float) -> Tensor:
    """f(r) = exp(-r^2 / ((rc - r)(rc + r))) inside the cutoff, 0 beyond; infinitely differentiable (eq. 16).

    Takes r^2 (angstrom^2). Within 0.06 % of the cutoff f is below the smallest float64 number, so clamping r^2 there
    changes no value and keeps every derivative finite.
    """
    x = r_squared.clamp(max=((1.0 - 6e-4) * cutoff) ** 2)
    return torch.exp(x / (x - cutoff**2))


def switch_off(r: Tensor, on: float, off: float) -> Tensor:
    """1 below `on`, 0 above `off`: g(1-t) / (g(t) + g(1-t)) with g(t) = exp(-1/t), t = (r - on)/(off - on).

    Within 0.1 % of either end it differs from 0 or 1 by less than the smallest float64 number.
    """
    t = ((r - on) / (off - on)).clamp(1e-3, 1.0 - 1e-3)
    return torch.sigmoid(1.0 / t - 1.0 / (1.0 - t))


class ExponentialBernstein(nn.Module):
    """rho_v(r) = f(r) [exp(-alpha r)] C(n, v) x^(n-v) (1-x)^v, x = exp(-alpha r), v = 0..K-1, n = K-1 (eq. 14).

    The factor in brackets is there with `exp_weighting`.
    """

    log_binomial: Tensor

    def __init__(self, num_functions: int, exp_weighting: bool) -> None:
        super().__init__()
        n = num_functions - 1
        log_binomial = [math.lgamma(n + 1) - math.lgamma(v + 1) - math.lgamma(n - v + 1) for v in range(num_functions)]
        self.exp_weighting = exp_weighting
        # published checkpoints carry these coefficients rounded to float32: they are part of the trained function
        self.register_buffer("log_binomial", torch.tensor(log_binomial, dtype=torch.float64))
        self.alpha_raw = nn.Parameter(torch.tensor(inverse_softplus(0.5 / 0.5291772105638411)))

    def forward(self, r: Tensor, f: Tensor) -> Tensor:
        """``(...)`` float64 distances and cutoff values -> ``(..., K)`` in the module's precision."""
        dtype = self.alpha_raw.dtype
        exponent = -softplus(self.alpha_raw.double()) * r
        x = torch.exp(exponent)
        weight = (f * x if self.exp_weighting else f).to(dtype)
        near, far = powers(torch.stack([x, -torch.expm1(exponent)]).to(dtype), len(self.log_binomial))  # (..., K)
        return torch.exp(self.log_binomial) * near.flip(-1) * far * weight[..., None]


def powers(x: Tensor, n: int) -> Tensor:
    """1, x, x^2, ..., x^(n-1) in a new last dimension.

    By doubling: fewer roundings than exp(k log x), and derivatives of all orders at x = 0.
    """
    x = x[..., None]
    table = torch.ones_like(x)
    while table.shape[-1] < n:
        table = torch.cat([table, table * x], -1)
        x = x * x
    return table[..., :n]


class AngularFunctions(nn.Module):
    """Unit vectors ``(n_atoms, slots, 3)`` -> p ``(n_atoms, 3, slots)`` and d functions ``(n_atoms, 5|6, slots)``.

    d functions are real spherical harmonics [sqrt3 xy, sqrt3 xz, sqrt3 yz, (3z^2 - 1)/2, (sqrt3/2)(x^2 - y^2)], or with
    ``irreps=False`` the Cartesian products [xx, yy, zz, sqrt2 xy, sqrt2 xz, sqrt2 yz].
    """

    products: Tensor
    constant: Tensor

    def __init__(self, irreps: bool) -> None:
        super().__init__()
        r2, r3 = math.sqrt(2.0), math.sqrt(3.0)
        xx, xy, xz, yy, yz, zz = 0, 1, 2, 4, 5, 8  # places in the outer product of u with itself
        if irreps:
            rows = [{xy: r3}, {xz: r3}, {yz: r3}, {zz: 1.5}, {xx: 0.5 * r3, yy: -0.5 * r3}]
            constant = [0.0, 0.0, 0.0, -0.5, 0.0]
        else:
            rows = [{xx: 1.0}, {yy: 1.0}, {zz: 1.0}, {xy: r2}, {xz: r2}, {yz: r2}]
            constant = [0.0] * 6
        self._exact = torch.zeros(9, len(rows), dtype=torch.float64)
        for column, row in enumerate(rows):
            for place, factor in row.items():
                self._exact[place, column] = factor
        self.register_buffer("products", self._exact.clone(), persistent=False)
        self.register_buffer("constant", torch.tensor(constant, dtype=torch.float64), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> AngularFunctions:
        super()._apply(fn, recurse)
        # a model that was float32 and becomes float64 must not keep square roots rounded to float32
        self.products = self._exact.to(self.products)
        return self

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        outer = (u[..., :, None] * u[..., None, :]).flatten(-2)
        d = self.constant + outer @ self.products
        return u.transpose(1, 2), d.transpose(1, 2)


class NuclearRepulsion(nn.Module):
    """Screened repulsion of nuclei after Ziegler, Biersack and Littmark (ZBL) with trainable screening (eq. 18).

    E_i = sum_j (ke/2) Z_i Z_j / r f(r) sum_k c_k exp(-a_k (Z_i^p + Z_j^p) d r), sum c_k = 1.
    """

    def __init__(self) -> None:
        super().__init__()
        bohr = 0.5291772105638411
        self.divisor_raw = nn.Parameter(torch.tensor(inverse_softplus(1.0 / (0.8854 * bohr))))
        self.power_raw = nn.Parameter(torch.tensor(inverse_softplus(0.23)))
        self.weights_raw = nn.Parameter(torch.tensor([inverse_softplus(c) for c in (0.1818, 0.5099, 0.2802, 0.02817)]))
        self.exponents_raw = nn.Parameter(torch.tensor([inverse_softplus(a) for a in (3.2, 0.9423, 0.4028, 0.2016)]))

    def forward(self, z: Tensor, r: Tensor, f: Tensor, index: Tensor) -> Tensor:
        """Nuclear charges ``(n_atoms,)``, r and f(r) ``(n_atoms, slots)``, all float64 -> ``(n_atoms,)`` eV."""
        power, divisor, c, a = (
            softplus(raw.double()) for raw in (self.power_raw, self.divisor_raw, self.weights_raw, self.exponents_raw)
        )
        scaled = z**power * divisor
        x = (scaled[:, None] + scaled[index]) * r
        screening = torch.exp(x[..., None] * -a) @ (c / c.sum())
        return 0.5 * COULOMB * z * (z[index] / r * f * screening).sum(-1)


class Electrostatics(nn.Module):
    """Coulomb energy of atomic charges, damped at short range: 1/r becomes 1/sqrt(r^2 + 1 angstrom^2) (eq. 19).

    With a long-range cutoff L, potential and force are shifted to zero at L (so energies of different L differ by
    more than the interactions beyond L).
    """

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.on, self.off = 0.25 * cutoff, 0.75 * cutoff

    def forward(self, q_first: Tensor, q_second: Tensor, r: Tensor, long_range_cutoff: float | None) -> Tensor:
        """Energies of the pairs of a half list, ``(n_pairs,)`` eV."""
        s = switch_off(r, self.on, self.off)
        far, near = 1.0 / r, torch.rsqrt(r.square() + 1.0)
        if long_range_cutoff is not None:
            limit = long_range_cutoff
            root = math.sqrt(limit**2 + 1.0)
            far = far + r / limit**2 - 2.0 / limit
            near = near + r * limit / root**3 - (2 * limit**2 + 1.0) / root**3
        energy = COULOMB * q_first * q_second * (s * near + (1.0 - s) * far)
        if long_range_cutoff is not None:
            energy = torch.where(r < long_range_cutoff, energy, torch.zeros_like(energy))
        return energy
