"""Priors -> OpenMM's own forces."""

from __future__ import annotations

import openmm

from openmm_mlff.potentials.priors import PriorTerms
from openmm_mlff.units import KJ_PER_MOL_PER_EV, NM_PER_ANGSTROM


def prior_forces(priors: PriorTerms, group: int = 0) -> list[openmm.Force]:
    """`HarmonicBondForce`, `HarmonicAngleForce` and, for a repulsion, `CustomBondForce`; those that have terms."""
    forces: list[openmm.Force] = []
    if len(priors.bonds):
        bonds = openmm.HarmonicBondForce()
        per_nm2 = KJ_PER_MOL_PER_EV / NM_PER_ANGSTROM**2
        for (i, j), r0, k in zip(priors.bonds.tolist(), priors.bond_lengths, priors.bond_constants, strict=True):
            bonds.addBond(i, j, float(r0) * NM_PER_ANGSTROM, float(k) * per_nm2)
        forces.append(bonds)
    if len(priors.angles):
        angles = openmm.HarmonicAngleForce()
        for atoms, theta, k in zip(priors.angles.tolist(), priors.angle_values, priors.angle_constants, strict=True):
            angles.addAngle(*atoms, float(theta), float(k) * KJ_PER_MOL_PER_EV)
        forces.append(angles)
    if len(priors.pairs):
        pairs = openmm.CustomBondForce(f"{KJ_PER_MOL_PER_EV!r}*(s/r)^{priors.exponent}")
        pairs.addPerBondParameter("s")
        for (i, j), s in zip(priors.pairs.tolist(), priors.pair_lengths, strict=True):
            pairs.addBond(i, j, [float(s) * NM_PER_ANGSTROM])
        forces.append(pairs)
    for force in forces:
        force.setName(f"prior ({force.getName()})")
        force.setForceGroup(group)
    return forces
