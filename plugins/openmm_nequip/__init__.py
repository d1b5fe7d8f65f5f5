"""NequIP: an equivariant message-passing network, in the form that ReSolv's implicit-solvent potentials have.

Batzner, Musaelian, Sun, Geiger, Mailoa, Kornbluth, Molinari, Smidt, Kozinsky, Nat. Commun. 13, 2453 (2022),
doi:10.1038/s41467-022-29939-5; Roecken, Burnet, Zavadlav, J. Chem. Phys. 161, 234101 (2024), doi:10.1063/5.0235189.
Units: angstrom, eV.
"""

from __future__ import annotations

from openmm_mlff.potentials.family import Family
from openmm_nequip import pretrained
from openmm_nequip.config import NequIPConfig
from openmm_nequip.model import NequIP

# openmm-ml has a potential 'nequip' of its own, for models of the nequip package, which this name leaves alone
family = Family(
    name="nequip-jaxmd",
    model=NequIP,
    config=NequIPConfig,
    recognises=pretrained.recognises,
    read=pretrained.read,
    published=pretrained.PUBLISHED,
)

__all__ = ["NequIP", "NequIPConfig", "family"]
