"""generalised Born forces as `ForceField` writes them -> OpenMM's native ones, which run many times faster.

``implicit/obc1.xml`` and ``implicit/obc2.xml`` make a `CustomGBForce`, which the Reference platform interprets. The
native `GBSAOBCForce` holds the same equations (Onufriev, Bashford, Case, Proteins 55, 383 (2004), model II).
"""

from __future__ import annotations

import re

import openmm

#: nm, subtracted from the intrinsic radii by the OBC models.
OFFSET = 0.009
#: kJ/mol/nm^2, surface-area term of both forms.
SURFACE_AREA_ENERGY = 2.25936


def use_native_obc2(system: openmm.System) -> None:
    """Replace the `CustomGBForce` of ``implicit/obc2.xml`` by a `GBSAOBCForce` with the same parameters, in place.

    Args:
        system: made with ``implicit/obc2.xml``, without cutoff and without salt.

    Raises `ValueError` if there is no such force, or if the energies of the two forces could differ.
    """
    found = [i for i, force in enumerate(system.getForces()) if isinstance(force, openmm.CustomGBForce)]
    if len(found) != 1:
        raise ValueError(f"system: expected one CustomGBForce (from implicit/obc2.xml), got {len(found)}")
    custom = system.getForce(found[0])
    parameters = [custom.getPerParticleParameterName(i) for i in range(custom.getNumPerParticleParameters())]
    if parameters != ["charge", "or", "sr"]:
        raise ValueError(f"system: expected the parameters charge, or, sr of an OBC model, got {parameters}")
    if custom.getNonbondedMethod() != openmm.CustomGBForce.NoCutoff:
        raise ValueError("system: expected generalised Born without a cutoff")
    constants = _constants(custom)
    native = openmm.GBSAOBCForce()
    native.setSolventDielectric(constants["solventDielectric"])
    native.setSoluteDielectric(constants["soluteDielectric"])
    native.setSurfaceAreaEnergy(SURFACE_AREA_ENERGY)
    native.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    native.setForceGroup(custom.getForceGroup())
    for i in range(custom.getNumParticles()):
        charge, offset_radius, scaled_radius = custom.getParticleParameters(i)
        native.addParticle(charge, offset_radius + OFFSET, scaled_radius / offset_radius)
    system.removeForce(found[0])
    system.addForce(native)


def _constants(force: openmm.CustomGBForce) -> dict[str, float]:
    """Named constants in the expressions; `ValueError` unless they are those of OBC2 without salt."""
    born = " ".join(force.getComputedValueParameters(i)[1] for i in range(force.getNumComputedValues()))
    energies = " ".join(force.getEnergyTermParameters(i)[0] for i in range(force.getNumEnergyTerms()))
    if "psi-0.8*psi^2+4.85*psi^3" not in born.replace(" ", ""):
        raise ValueError("system: expected the OBC2 model, got other coefficients of the Born radii")
    if "28.3919551*(radius+0.14)^2" not in energies.replace(" ", ""):
        raise ValueError(
            "system: expected the ACE surface-area term of 2.25936 kJ/mol/nm^2 that obc2.xml sets by default"
        )
    constants = {name: float(value) for name, value in re.findall(r"(\w+)\s*=\s*([0-9.eE+-]+)\s*(?:;|$)", energies)}
    if constants.get("kappa", 0.0) != 0.0:
        raise ValueError(f"system: expected no salt, got a screening constant kappa of {constants['kappa']} 1/nm")
    return constants
