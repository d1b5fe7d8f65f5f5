"""Radial functions and analytic energy terms of SpookyNet (Unke et al. 2021, Methods; Supplementary Note on D4).

Lengths in angstrom and energies in eV unless a line says bohr or hartree. The constants are those that the published
model was trained with; they are part of the trained function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

COULOMB = 14.399645351950548  # e^2/(4 pi eps0), eV angstrom


def inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def cutoff_function(r: Tensor, cutoff: float) -> Tensor:
    """f(r) = exp(-r^2 / ((rc - r)(rc + r))) inside the cutoff, 0 beyond; infinitely differentiable (eq. 16)."""
    inside = r < cutoff
    safe = torch.where(inside, r, torch.zeros_like(r))
    bump = torch.exp(-safe.square() / ((cutoff - safe) * (cutoff + safe)))
    return torch.where(inside, bump, torch.zeros_like(r))


def switch_off(r: Tensor, on: float, off: float) -> Tensor:
    """1 below `on`, 0 above `off`, infinitely differentiable between."""
    t = (r - on) / (off - on)
    between = (t > 0) & (t < 1)
    safe = torch.where(between, t, torch.full_like(t, 0.5))
    # g(1-t) / (g(t) + g(1-t)) with g(t) = exp(-1/t), as a logistic function of the difference of exponents
    smooth = torch.sigmoid(1.0 / safe - 1.0 / (1.0 - safe))
    return torch.where(between, smooth, (t <= 0).to(r.dtype))


class ExponentialBernstein(nn.Module):
    """rho_v(r) = f(r) exp(-alpha r) C(n, v) (e^{-alpha r})^{n-v} (1 - e^{-alpha r})^v, v = 0..K-1, n = K-1 (eq. 14)."""

    def __init__(self, num_functions: int, exp_weighting: bool) -> None:
        super().__init__()
        n = num_functions - 1
        log_binomial = [math.lgamma(n + 1) - math.lgamma(v + 1) - math.lgamma(n - v + 1) for v in range(num_functions)]
        v = torch.arange(num_functions, dtype=torch.float64)
        self.exp_weighting = exp_weighting
        self.register_buffer("log_binomial", torch.tensor(log_binomial, dtype=torch.float64))
        self.register_buffer("power_far", v)
        self.register_buffer("power_near", n - v)
        self.alpha_raw = nn.Parameter(torch.tensor(inverse_softplus(0.5 / 0.5291772105638411)))

    def forward(self, r: Tensor, f: Tensor) -> Tensor:
        """``(...)`` distances and cutoff values -> ``(..., K)``."""
        x = -softplus(self.alpha_raw) * r[..., None]
        log_rho = self.log_binomial + self.power_near * x + self.power_far * torch.log(-torch.expm1(x))
        if self.exp_weighting:
            log_rho = log_rho + x
        return torch.exp(log_rho) * f[..., None]


def angular_functions(u: Tensor, irreps: bool) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(..., 3)`` -> p functions ``(..., 3)`` and d functions ``(..., 5)`` (or 6 Cartesian products)."""
    x, y, z = u.unbind(-1)
    r3 = math.sqrt(3.0)
    if irreps:
        d = [r3 * x * y, r3 * x * z, r3 * y * z, 0.5 * (3 * z * z - 1), 0.5 * r3 * (x * x - y * y)]
    else:
        r2 = math.sqrt(2.0)
        d = [x * x, y * y, z * z, r2 * x * y, r2 * x * z, r2 * y * z]
    return u, torch.stack(d, -1)


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
        """Charges ``(n_atoms,)``, distances and cutoff values ``(n_atoms, n_slots)`` -> ``(n_atoms,)`` eV."""
        scaled = z ** softplus(self.power_raw) * softplus(self.divisor_raw)
        x = (scaled[:, None] + scaled[index]) * r
        c = softplus(self.weights_raw)
        c = c / c.sum()
        screening = (c * torch.exp(-softplus(self.exponents_raw) * x[..., None])).sum(-1)
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
