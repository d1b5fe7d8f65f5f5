"""SpookyNet: a neural network potential with electronic degrees of freedom (total charge and spin).

Unke, Chmiela, Gastegger, Schuett, Sauceda, Mueller, Nat. Commun. 12, 7273 (2021), doi:10.1038/s41467-021-27504-0.
Units: angstrom, eV, e; spin enters as the multiplicity 2S+1.
"""

from __future__ import annotations

from pathlib import Path

from openmm_mlff.potentials.family import BundledModel, Family
from openmm_spookynet import pretrained
from openmm_spookynet.config import SpookyNetConfig
from openmm_spookynet.model import SpookyNet

WEIGHTS = Path(__file__).parent / "weights"

family = Family(
    name="spookynet",
    model=SpookyNet,
    config=SpookyNetConfig,
    recognises=pretrained.recognises,
    read=pretrained.read,
    published=(pretrained.PUBLISHED,),
    bundled=(
        BundledModel(
            name="spookynet-ala2-gfn2",
            family="spookynet",
            path=WEIGHTS / "spookynet-ala2-gfn2.safetensors",
            domain="capped alanine (ACE-ALA-NME), isolated or as the ML region of ML/MM, 300-600 K, like GFN2-xTB",
        ),
        BundledModel(
            name="spookynet-gfn2-bio",
            family="spookynet",
            path=WEIGHTS / "spookynet-gfn2-bio.safetensors",
            domain="peptides, nucleobases, sugars, small organic molecules, ions, water and clusters of these, "
            "isolated or as the ML region of ML/MM; H Li C N O F Na Mg P S Cl K Ca Br, charges -2 to 2, "
            "multiplicities 1 to 3, 300-700 K, like GFN2-xTB",
        ),
    ),
)

__all__ = ["SpookyNet", "SpookyNetConfig", "family"]
