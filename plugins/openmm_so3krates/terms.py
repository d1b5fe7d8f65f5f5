"""Analytic energy terms of SO3LR (Kabylda et al., J. Am. Chem. Soc. 147, 33723 (2025), Methods).

Lengths in angstrom and energies in eV unless a line says atomic units. The constants are those that the published
model was trained with; they are part of the trained function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from openmm_so3krates.free_atoms import C6, POLARIZABILITY

COULOMB = 14.399645351950548  # e^2/(4 pi eps0), eV angstrom
BOHR = 0.5291772105638411  # angstrom
HARTREE = 27.211386024367243  # eV
FINE_STRUCTURE = 0.007297352566206496
#: angstrom; the screened repulsion of nuclei is switched off from 0 to here
REPULSION_REACH = 1.5


def switch_off(r: Tensor, on: float, off: float) -> Tensor:
    """1 below `on`, 0 above `off`: s(1-c) / (s(1-c) + s(c)) with s(u) = exp(-1/u), c = (r - on)/(off - on).

    Within 0.1 % of either end it differs from 0 or 1 by less than the smallest float64 number.
    """
    c = ((r - on) / (off - on)).clamp(1e-3, 1.0 - 1e-3)
    return torch.sigmoid(1.0 / c - 1.0 / (1.0 - c))


def inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))


class NuclearRepulsion(nn.Module):
    """Screened repulsion of nuclei after Ziegler, Biersack and Littmark with trained screening.

    E_i = 1/2 sum_j w(r) phi(r) ke Z_i Z_j / r sum_k c_k exp(-a_k r (Z_i^p + Z_j^p) D), sum c_k = 1; the switch w ends
    at 1.5 angstrom. All numbers are kept as inverse softplus.
    """

    def __init__(self) -> None:
        super().__init__()
        # Ziegler, Biersack, Littmark 1985: screening length 0.8854 bohr / (Z_i^0.23 + Z_j^0.23)
        self.scale_raw = nn.Parameter(torch.tensor(inverse_softplus(1.0 / (0.8854 * BOHR))))
        self.power_raw = nn.Parameter(torch.tensor(inverse_softplus(0.23)))
        self.weights_raw = nn.Parameter(torch.tensor([inverse_softplus(c) for c in (0.1818, 0.5099, 0.2802, 0.02817)]))
        self.exponents_raw = nn.Parameter(torch.tensor([inverse_softplus(a) for a in (3.2, 0.9423, 0.4028, 0.2016)]))

    def forward(self, numbers: Tensor, r: Tensor, cutoff: Tensor, index: Tensor) -> Tensor:
        """Atomic numbers ``(N,)``, float64 r and phi(r) ``(N, S)``, neighbours ``(N, S)`` -> ``(N,)`` eV."""
        power, scale, c, a = (
            softplus(raw.double()) for raw in (self.power_raw, self.scale_raw, self.weights_raw, self.exponents_raw)
        )
        z = numbers.double()
        reach = z**power * scale
        x = (reach[:, None] + reach[index]) * r
        screening = torch.exp(x[..., None] * -a) @ (c / c.sum())
        weight = switch_off(r, 0.0, REPULSION_REACH) * cutoff
        return 0.5 * COULOMB * z * (z[index] / r * weight * screening).sum(-1)


class Electrostatics(nn.Module):
    """Coulomb energy of charges smeared at short range: 1/r becomes V(r) = erf(r / sigma) / r.

    With a long-range cutoff L the potential is shifted: from f = 1 at 0.45 L to f = 0 at L the form
    f [V(r) - V(L)] + (1-f) [V(r) - V(L) - V'(L) (r - L)] leads energy and force to zero at L. Energies of different L
    therefore differ by more than the interactions beyond L.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, q_first: Tensor, q_second: Tensor, r: Tensor, limit: float | None) -> Tensor:
        """Energies of the pairs of a half list, ``(n_pairs,)`` eV, from charges (e) and distances."""
        potential = torch.erf(r / self.sigma) / r
        if limit is not None:
            near = switch_off(r, 0.45 * limit, limit)
            at_limit, slope = self.at(limit)
            potential = potential - at_limit - (1.0 - near) * slope * (r - limit)
            potential = torch.where(r < limit, potential, torch.zeros_like(potential))
        return COULOMB * q_first * q_second * potential

    def at(self, r: float) -> tuple[float, float]:
        """V(r) and V'(r)."""
        x = r / self.sigma
        v = math.erf(x) / r
        return v, (2.0 / (math.sqrt(math.pi) * self.sigma) * math.exp(-x * x) - v) / r


class Dispersion(nn.Module):
    """Van der Waals dispersion of quantum Drude oscillators from Hirshfeld ratios, two-body, to order r^-10.

    An atom's polarisability and C6 are those of the free atom times its Hirshfeld ratio h and h^2; combination rules,
    C8, C10 and the damping radius follow from them (Khabibrakhmanov, Fedorov, Tkatchenko, JCTC 19, 7895 (2023)).
    Atomic units inside.
    """

    def __init__(self, scale: float, damping: float) -> None:
        super().__init__()
        self.scale, self.damping = scale, damping

    def free_atoms(self, numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Polarisabilities (bohr^3) and C6 coefficients (hartree bohr^6) of free atoms, ``(N,)`` each."""
        # nothing has the atomic number 0
        alpha, c6 = (torch.tensor((0.0, *t), dtype=dtype, device=numbers.device) for t in (POLARIZABILITY, C6))
        return alpha[numbers], c6[numbers]

    def forward(
        self, free: tuple[Tensor, Tensor], ratios: Tensor, first: Tensor, second: Tensor, r: Tensor, limit: float | None
    ) -> Tensor:
        """Energies of the pairs of a half list, ``(n_pairs,)`` eV.

        Args:
            free: of `free_atoms`. ratios: Hirshfeld ratios, ``(N,)``.
            first, second, r: atoms and distances of the pairs, ``(n_pairs,)``.
            limit: long-range cutoff (angstrom) or None.
        """
        alpha, c6 = free[0] * ratios, free[1] * ratios.square()
        alpha_i, alpha_j, c6_i, c6_j = alpha[first], alpha[second], c6[first], c6[second]
        mean = 0.5 * (alpha_i + alpha_j)
        c6_ij = 2.0 * c6_i * c6_j * alpha_i * alpha_j / (alpha_i.square() * c6_j + alpha_j.square() * c6_i)
        root = mean ** (1.0 / 7.0)
        # twice the squared width of the Drude oscillators' wave functions, fitted to the van der Waals radius
        radius = FINE_STRUCTURE ** (-4.0 / 21.0) * root
        width = -0.00433008 + radius * (0.24428889 + radius * (0.04125273 - 0.00078893 * radius))
        width2 = 2.0 * width.square()  # 1 / gamma
        damped = self.scale * 2.0 * 2.54 * root
        x2, d2 = (r / (BOHR * damped)).square(), damped.square()
        # orders 6, 8 and 10 with x = r / P, so that no power of a distance overflows single precision
        x6 = x2 * x2 * x2
        shape = 1.0 / (x6 + 1.0)
        ratio = 5.0 * width2 / d2
        shape = shape + ratio / (x6 * x2 + 1.0) + 1.225 * ratio.square() / (x6 * x2.square() + 1.0)
        energy = -HARTREE * c6_ij / (d2 * d2 * d2) * shape
        if limit is None:
            return energy
        return energy * switch_off(r, limit - self.damping, limit) if self.damping else energy * (r < limit)
