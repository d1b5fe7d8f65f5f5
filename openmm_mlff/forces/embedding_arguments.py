"""Arguments of electrostatic embedding: keywords, the force field it is asked for, and who carries which charge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.data.structures import SYMBOLS
from openmm_mlff.forces.arguments import in_units, whole_number

#: keywords of createMixedSystem beside those of the model
EMBEDDING_KEYWORDS = ("dampingLength", "polarizabilities", "inductionDamping", "boundaryCharges", "linkAtomDistances")
NM = unit.nanometer
BOUNDARY_CHARGES = ("redistribute", "delete", "keep")
#: forces that have charges of their own, which the model's would have to replace
OTHER_ELECTROSTATICS = (
    *("AmoebaMultipoleForce", "AmoebaGeneralizedKirkwoodForce", "HippoNonbondedForce", "DrudeForce"),
    *("GBSAOBCForce", "CustomGBForce", "ConstantPotentialForce", "MPIDForce"),
)


@dataclass(frozen=True)
class Settings:
    """Keywords of electrostatic embedding, in this package's units.

    Attributes:
        damping (keyword dampingLength, nm or a Quantity): angstrom; MM charges act on ML charges as erf(r/b)/r. 0: no.
        polarizabilities (angstrom^3, or Quantities): by element symbol (others do not polarise), or of each ML atom in
            order. None: no induction.
        induction_damping (inductionDamping): MM charges make the field that induces dipoles as erf(r/b)/r, where b is
            this many widths of the Gaussian dipole (`induction.widths`).
        boundary (boundaryCharges): of the MM atom of a cut bond. 'redistribute': spread over the MM atoms bonded to it,
            with what the ML region's charges in the force field differ from its charge; 'delete': not felt; 'keep'.
        link_atom_distances (linkAtomDistances): ``[(i, j, distance), ...]`` as in openmm-ml; nm.
    """

    damping: float = 0.0
    polarizabilities: Mapping[str, float] | tuple[float, ...] | None = None
    induction_damping: float = 0.0
    boundary: str = "redistribute"
    link_atom_distances: tuple[tuple[int, int, float], ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """From keywords; raises `ValueError` or `TypeError` naming the keyword."""
        boundary = given.get("boundaryCharges", "redistribute")
        if boundary not in BOUNDARY_CHARGES:
            raise ValueError(f"boundaryCharges: expected one of {', '.join(BOUNDARY_CHARGES)}, got {boundary!r}")
        return cls(
            10.0 * _not_negative("dampingLength", given.get("dampingLength"), "a length (nm or a Quantity)", NM),
            _polarizabilities(given.get("polarizabilities")),
            _not_negative("inductionDamping", given.get("inductionDamping"), "a number of widths"),
            boundary,
            _link_atom_distances(given.get("linkAtomDistances")),
        )

    def polarizabilities_of(self, numbers: Sequence[int], n_caps: int) -> tuple[float, ...] | None:
        """Of each ML atom, angstrom^3; the last `n_caps` are link atoms, of which a list of values knows nothing."""
        if self.polarizabilities is None:
            return None
        if isinstance(self.polarizabilities, Mapping):
            return tuple(self.polarizabilities.get(SYMBOLS[z], 0.0) for z in numbers)
        n_atoms = len(numbers) - n_caps
        if len(self.polarizabilities) != n_atoms:
            raise ValueError(
                f"polarizabilities: expected one for each of the {n_atoms} ML atoms, got {len(self.polarizabilities)}"
            )
        return (*self.polarizabilities, *[0.0] * n_caps)


def _not_negative(name: str, value: Any, what: str, units: Any = None) -> float:
    """0 for None; a Quantity counts in `units`."""
    number = 0.0 if value is None else in_units(value, units)
    if math.isnan(number) and not isinstance(value, float):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    if not (math.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name}: expected {what}, not negative, got {value!r}")
    return number


def _link_atom_distances(value: Any) -> tuple[tuple[int, int, float], ...]:
    try:
        found = tuple((whole_number("i", i), whole_number("j", j), in_units(d, NM)) for i, j, d in value or ())
    except (TypeError, ValueError):
        found = None
    if found is None or not all(0.0 < distance < math.inf for _, _, distance in found):
        raise ValueError(
            f"linkAtomDistances: expected [(i, j, distance), ...] with lengths in nm or Quantities, got {value!r}"
        )
    return found


def _polarizabilities(value: Any) -> Mapping[str, float] | tuple[float, ...] | None:
    if value is None:
        return None

    def one(x: Any) -> float:
        return _not_negative("polarizabilities", x, "numbers in angstrom^3 or Quantities", unit.angstrom**3)

    if isinstance(value, Mapping):
        unknown = [symbol for symbol in value if symbol not in SYMBOLS]
        if unknown:
            raise ValueError(f"polarizabilities: expected symbols of elements, got {unknown[0]!r}")
        return {symbol: one(x) for symbol, x in value.items()}
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise TypeError(
            "polarizabilities: expected angstrom^3 by element symbol, such as {'C': 1.0, 'H': 0.4}, or one for each "
            f"ML atom, got {type(value).__name__}"
        )
    return tuple(one(x) for x in value)


# -- the force field -------------------------------------------------------------------------------------------------


def check_forces(system: openmm.System) -> openmm.NonbondedForce:
    """The one NonbondedForce of a system that electrostatic embedding can be made for; else `ValueError`."""
    found = []
    for force in system.getForces():
        kind = type(force).__name__
        if kind in OTHER_ELECTROSTATICS:
            raise ValueError(
                f"system: expected fixed charges in a NonbondedForce, got a {kind}, whose charges the ML region would "
                "not feel"
            )
        if isinstance(force, openmm.NonbondedForce):
            found.append(force)
        elif isinstance(force, openmm.CustomNonbondedForce):
            names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
            if {"q", "charge"} & {name.lower() for name in names}:
                raise ValueError(
                    "system: expected all charges in the NonbondedForce, got a CustomNonbondedForce with parameter "
                    f"{next(n for n in names if n.lower() in ('q', 'charge'))!r}"
                )
        elif isinstance(force, openmm.CustomCVForce):
            inner = [force.getCollectiveVariable(k) for k in range(force.getNumCollectiveVariables())]
            if any(isinstance(f, (openmm.NonbondedForce, openmm.PythonForce)) for f in inner):
                raise ValueError("system: expected a force field, got a system that is mixed or interpolated already")
        elif isinstance(force, openmm.PythonForce):
            raise ValueError("system: expected a force field, got a system that has a PythonForce already")
    if len(found) != 1:
        raise ValueError(f"system: expected one NonbondedForce, got {len(found)}")
    (nonbonded,) = found
    for what in ("Particle", "Exception"):
        for k in range(getattr(nonbonded, f"getNum{what}ParameterOffsets")()):
            _, _, scale, _, _ = getattr(nonbonded, f"get{what}ParameterOffset")(k)
            if scale != 0.0:
                raise ValueError("system: expected fixed charges, got charges that depend on a global parameter")
    return nonbonded


def region_charges(
    force: openmm.NonbondedForce,
    topology: app.Topology,
    atoms: list[int],
    links: list[tuple[int, int]],
    charge: int,
    settings: Settings,
) -> np.ndarray:
    """Charges (e) of all particles as the ML region feels them, and on ML atoms the reference charges of their images.

    These are the force field's, moved together until they add up to the charge of the region. Raises `ValueError` where
    a region without cut bonds has another charge in the force field.
    """
    charges = np.array([force.getParticleParameters(k)[0]._value for k in range(force.getNumParticles())])
    missing = charge - charges[atoms].sum()
    if not links and abs(missing) > 0.01:
        whole = round(float(charges[atoms].sum()))
        if whole != charge:
            raise ValueError(
                f"charge: the ML atoms carry {charges[atoms].sum():+.3f} e in the force field, got charge={charge}; "
                "what is around them neutralises the former"
            )
        warnings.warn(
            f"charge: the ML atoms carry {charges[atoms].sum():+.3f} e in the force field, not {charge}", stacklevel=6
        )
    charges[atoms] += missing / len(atoms)
    if settings.boundary == "keep":
        return charges
    inside, bonded = set(atoms), _neighbours(topology)
    for _, host in links:
        share = charges[host]
        others = [k for k in bonded[host] if k not in inside]
        if settings.boundary == "delete":
            charges[host] = 0.0
        elif others:
            charges[host] = 0.0
            # what the region gains or loses by getting a whole charge comes from here, so that the system keeps its own
            charges[others] += (share - missing / len(links)) / len(others)
        else:
            charges[host] -= missing / len(links)
    return charges


def _neighbours(topology: app.Topology) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {atom.index: [] for atom in topology.atoms()}
    for bond in topology.bonds():
        found[bond.atom1.index].append(bond.atom2.index)
        found[bond.atom2.index].append(bond.atom1.index)
    return found
