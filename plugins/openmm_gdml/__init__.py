"""GDML: gradient-domain machine learning, kernel models of energies trained on forces.

GDML: Chmiela, Tkatchenko, Sauceda, Poltavsky, Schuett, Mueller, Sci. Adv. 3, e1603015 (2017). With permutational
symmetry (sGDML): Chmiela, Sauceda, Mueller, Tkatchenko, Nat. Commun. 9, 3887 (2018). Periodic (BIGDML): Sauceda et al.,
Nat. Commun. 13, 3733 (2022). Units: angstrom, eV; descriptors in 1/angstrom; float64 only.
"""

from __future__ import annotations

from openmm_gdml import published
from openmm_gdml.config import GDMLConfig
from openmm_gdml.model import GDMLPotential
from openmm_mlff.potentials.family import Family

family = Family(
    name="gdml",
    model=GDMLPotential,
    config=GDMLConfig,
    aliases=("sgdml",),
    recognises=published.recognises,
    read=published.read,
)

__all__ = ["GDMLConfig", "GDMLPotential", "family"]
