"""SO3krates: equivariant transformer potentials, and SO3LR, the general force field for molecules built on it.

Frank, Unke, Mueller, Chmiela, Nat. Commun. 15, 6539 (2024), doi:10.1038/s41467-024-50620-6; Kabylda et al.,
J. Am. Chem. Soc. 147, 33723 (2025), doi:10.1021/jacs.5c09558. Units: angstrom, eV, e; spin is the multiplicity 2S+1.
"""

from __future__ import annotations

from openmm_mlff.potentials.family import Family
from openmm_so3krates import pretrained
from openmm_so3krates.config import SO3kratesConfig
from openmm_so3krates.model import SO3krates

family = Family(
    name="so3krates",
    model=SO3krates,
    config=SO3kratesConfig,
    recognises=pretrained.recognises,
    read=pretrained.read,
    stands_alone=pretrained.stands_alone,
    published=(pretrained.SO3LR,),
)

__all__ = ["SO3krates", "SO3kratesConfig", "family"]
