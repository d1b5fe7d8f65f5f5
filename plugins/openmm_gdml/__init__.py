"""GDML: gradient-domain machine learning, kernel models of energies trained on forces.

GDML: Chmiela, Tkatchenko, Sauceda, Poltavsky, Schuett, Mueller, Sci. Adv. 3, e1603015 (2017). With permutational
symmetry (sGDML): Chmiela, Sauceda, Mueller, Tkatchenko, Nat. Commun. 9, 3887 (2018). Periodic (BIGDML): Sauceda et al.,
Nat. Commun. 13, 3733 (2022). Units: angstrom, eV; descriptors in 1/angstrom; float64 only.
"""

from __future__ import annotations

from typing import Any

from openmm_gdml import published
from openmm_gdml.config import GDMLConfig
from openmm_gdml.model import GDMLPotential
from openmm_gdml.options import GDMLOptions
from openmm_mlff.potentials.family import Family, Trainer


def _fit(*arguments: Any) -> Any:
    # the trainer is loaded when it is needed
    from openmm_gdml.trainer import fit

    return fit(*arguments)


family = Family(
    name="gdml",
    model=GDMLPotential,
    config=GDMLConfig,
    aliases=("sgdml",),
    recognises=published.recognises,
    read=published.read,
    trainer=Trainer(GDMLOptions, _fit),
)

__all__ = ["GDMLConfig", "GDMLOptions", "GDMLPotential", "family"]
