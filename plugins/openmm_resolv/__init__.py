"""ReSolv: implicit-solvent potentials learned from hydration free energies, as a pair of potentials (water, vacuum).

Roecken, Burnet, Zavadlav, J. Chem. Phys. 161, 234101 (2024), doi:10.1063/5.0235189. The two potentials may be of any
family. Units: angstrom, eV; OpenMM's parameter lambda_solvation goes from 0 (vacuum) to 1 (water).
"""

from __future__ import annotations

from openmm_mlff.potentials.family import Family
from openmm_resolv.config import ResolvConfig
from openmm_resolv.energies import BothEnergies, PhaseEnergies, both_energies
from openmm_resolv.model import LAMBDA, ResolvPotential
from openmm_resolv.pair import save_pair

family = Family(name="resolv", model=ResolvPotential, config=ResolvConfig)

__all__ = [
    "LAMBDA",
    "BothEnergies",
    "PhaseEnergies",
    "ResolvConfig",
    "ResolvPotential",
    "both_energies",
    "family",
    "save_pair",
]
