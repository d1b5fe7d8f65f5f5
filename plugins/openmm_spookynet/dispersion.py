"""Two-body D4 dispersion with the network's own charges (Caldeweyher et al. 2019), for published checkpoints.

The reference tables come with the checkpoint that was trained with them. Lengths in bohr inside this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from openmm_mlff.data.structures import Batch
from openmm_spookynet.terms import inverse_softplus, switch_off

BOHR = 0.5291772105638411  # angstrom
HARTREE = 27.211386024367243  # eV

# constants of the D4 coordination number and charge scaling
K2, K4, K5, K6, KN = 4.0 / 3.0, 4.10451, 19.08857, 254.5553148552, 7.5
CHARGE_STEEPNESS, WEIGHT_STEEPNESS = 3.0, 6.0
SWITCH_WIDTH = 1.0 / 1.8897261246  # bohr; as published: 0.53 bohr

#: name -> shape of the tables; the first index is the atomic number unless it says otherwise
TABLES: dict[str, tuple[int, ...]] = {
    "refsys": (87, 7),
    "zeff": (87,),
    "refh": (87, 7),
    "sscale": (18,),
    "secaiw": (18, 23),
    "gam": (87,),
    "ascale": (87, 7),
    "alphaiw": (87, 7, 23),
    "hcount": (87, 7),
    "casimir_polder_weights": (23,),
    "rcov": (87,),
    "en": (87,),
    "ncount_mask": (87, 7, 3),
    "ncount_weight": (87, 7, 3),
    "cn": (87, 7, 3),
    "fixgweights": (87, 7),
    "refq": (87, 7),
    "sqrt_r4r2": (87,),
}


@dataclass
class FixedD4:
    """What the elements decide. `kind` numbers the distinct elements; tables of pairs are ``(n_kinds * n_kinds,)``."""

    kind: Tensor  # (n_atoms,)
    reference_c6: Tensor  # (n_atoms, n_kinds, 7, 7) hartree bohr^6, first index already the atom's element
    bond: Tensor  # sum of covalent radii, scaled
    polarity: Tensor  # weight of a bond by its electronegativity difference
    size_squared: Tensor  # R^2 = 3 r4r2_i r4r2_j squared
    radius: Tensor  # r0 = a1 R + a2
    count_weight: Tensor  # (n_atoms, 7, 3) exponents of the Gaussians in the coordination number
    count_mask: Tensor
    count: Tensor
    unmatched: Tensor  # (n_atoms, 7) weights where no reference is near
    reference_charge: Tensor  # (n_atoms, 7) effective nuclear charge plus reference charge
    effective_charge: Tensor  # (n_atoms,)
    hardness: Tensor  # (n_atoms, 1)


class D4Dispersion(nn.Module):
    """E = -sum over pairs of C6 [s6 / (r^6 + r0^6) + s8 R^2 / (r^8 + r0^8)].

    r0 = a1 R + a2 with R = sqrt(3) r4r2_i r4r2_j from the atoms' sizes.
    """

    s6_raw: Tensor
    s8_raw: Tensor
    a1_raw: Tensor
    a2_raw: Tensor
    scaleq_raw: Tensor
    refsys: Tensor
    zeff: Tensor
    refh: Tensor
    sscale: Tensor
    secaiw: Tensor
    gam: Tensor
    ascale: Tensor
    alphaiw: Tensor
    hcount: Tensor
    casimir_polder_weights: Tensor
    rcov: Tensor
    en: Tensor
    ncount_mask: Tensor
    ncount_weight: Tensor
    cn: Tensor
    fixgweights: Tensor
    refq: Tensor
    sqrt_r4r2: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, value in {"s6": 1.0, "s8": 1.61679827, "a1": 0.44959224, "a2": 3.35743605, "scaleq": 1.0}.items():
            self.register_parameter(f"{name}_raw", nn.Parameter(torch.tensor(inverse_softplus(value))))
        for name, shape in TABLES.items():
            dtype = torch.int64 if name == "refsys" else torch.float64
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def fixed(self, numbers: Tensor) -> FixedD4:
        """Reference C6 coefficients of the elements present, by Casimir-Polder quadrature over 23 frequencies."""
        elements, kind = torch.unique(numbers, return_inverse=True)
        system = self.refsys[elements]  # (n_kinds, 7)
        zeff = self.zeff[system]
        scaling = _charge_scaling(zeff, zeff + self.refh[elements] * softplus(self.scaleq_raw), self.gam[system])
        screened = (self.hcount[elements] * self.sscale[system] * scaling)[..., None] * self.secaiw[system]
        alpha = (self.ascale[elements][..., None] * (self.alphaiw[elements] - screened)).clamp(
            min=0
        )  # (n_kinds, 7, 23)
        c6 = (3.0 / math.pi) * torch.einsum("w,iaw,jbw->ijab", self.casimir_polder_weights, alpha, alpha)
        r4r2, rcov, en = self.sqrt_r4r2[elements], self.rcov[elements], self.en[elements]
        size = math.sqrt(3.0) * r4r2[:, None] * r4r2
        return FixedD4(
            kind=kind,
            reference_c6=c6[kind],
            bond=(K2 * (rcov[:, None] + rcov)).flatten(),
            polarity=(K4 * torch.exp(-((en[:, None] - en).abs() + K5).square() / K6)).flatten(),
            size_squared=size.square().flatten(),
            radius=(softplus(self.a1_raw) * size + softplus(self.a2_raw)).flatten(),
            count_weight=-WEIGHT_STEEPNESS * self.ncount_weight[numbers],
            count_mask=self.ncount_mask[numbers],
            count=self.cn[numbers],
            unmatched=self.fixgweights[numbers],
            reference_charge=self.zeff[numbers][:, None] + self.refq[numbers] * softplus(self.scaleq_raw),
            effective_charge=self.zeff[numbers],
            hardness=self.gam[numbers][:, None],
        )

    def forward(
        self, fixed: FixedD4, batch: Batch, charges: Tensor, distances: Tensor, long_range_cutoff: float | None
    ) -> Tensor:
        """Energies of the pairs of the half list, ``(n_pairs,)`` eV, from charges (e) and distances (angstrom)."""
        assert batch.long_range_pairs is not None
        i, j = batch.long_range_pairs.first, batch.long_range_pairs.second
        r = distances / BOHR
        limit = None if long_range_cutoff is None else long_range_cutoff / BOHR
        pair = fixed.kind[i] * fixed.reference_c6.shape[1] + fixed.kind[j]
        coordination = self._coordination(fixed, batch, pair, r, limit)
        weights = self._reference_weights(fixed, charges, coordination)  # (n_atoms, 7)
        # C6_ij = zeta_i . c6[kind_i, kind_j] . zeta_j, contracted over i's references once per atom and element
        half = (weights[:, None, None] @ fixed.reference_c6)[:, :, 0]  # (n_atoms, n_kinds, 7)
        c6 = (half[i, fixed.kind[j]] * weights[j]).sum(-1)
        r0 = fixed.radius[pair]
        s6, s8 = softplus(self.s6_raw), softplus(self.s8_raw)
        shape = s6 * _damped_power(r, r0, 6, limit) + s8 * fixed.size_squared[pair] * _damped_power(r, r0, 8, limit)
        energy = -HARTREE * c6 * shape
        return energy if limit is None else torch.where(r < limit, energy, torch.zeros_like(energy))

    def _coordination(self, fixed: FixedD4, batch: Batch, pair: Tensor, r: Tensor, limit: float | None) -> Tensor:
        """Fractional coordination numbers weighted by electronegativity difference, ``(n_atoms,)``."""
        assert batch.long_range_pairs is not None
        count = 0.5 * fixed.polarity[pair] * torch.erfc(KN * (r / fixed.bond[pair] - 1.0))
        if limit is not None:
            count = count * switch_off(r, limit - SWITCH_WIDTH, limit)
        ends = torch.cat([batch.long_range_pairs.first, batch.long_range_pairs.second])
        return count.new_zeros(batch.n_atoms).index_add(0, ends, torch.cat([count, count]))

    def _reference_weights(self, fixed: FixedD4, charges: Tensor, coordination: Tensor) -> Tensor:
        """zeta: how much of each reference system an atom resembles, scaled by its charge, ``(n_atoms, 7)``."""
        distance = (coordination[:, None, None] - fixed.count).square()
        gauss = (fixed.count_mask * torch.exp(fixed.count_weight * distance)).sum(-1)
        norm = gauss.sum(-1, keepdim=True)
        weights = torch.where(norm > 1e-8, gauss / norm.clamp(min=1e-8), fixed.unmatched)
        actual = (fixed.effective_charge + charges)[:, None]
        return weights * _charge_scaling(fixed.reference_charge, actual, fixed.hardness)


def _charge_scaling(reference: Tensor, actual: Tensor, hardness: Tensor) -> Tensor:
    """exp(3 (1 - exp(2 gam (1 - reference / actual)))), and exp(3) where no electrons are left to be removed."""
    scaled = torch.exp(
        CHARGE_STEEPNESS * (1.0 - torch.exp(2.0 * hardness * (1.0 - reference / actual.clamp(min=1e-8))))
    )
    return torch.where(actual > 1e-8, scaled, torch.full_like(scaled, math.exp(CHARGE_STEEPNESS)))


def _damped_power(r: Tensor, r0: Tensor, n: int, limit: float | None) -> Tensor:
    """1 / (r^n + r0^n) shifted so that value and slope vanish at the cutoff."""
    value = 1.0 / (r**n + r0**n)
    if limit is None:
        return value
    at_limit = 1.0 / (limit**n + r0**n)
    return value - at_limit + n * limit**n * at_limit.square() * (r / limit - 1.0)
