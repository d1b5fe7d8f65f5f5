"""Systems of different molecules -> one System of all of them, which do not see one another.

What can be combined is what `replicate` can copy, and is refused with the same words. Forces of one kind and
definition become one force with the terms of all molecules; machine-learned forces of one model and the same options
become one force that evaluates its molecules together.
"""

from __future__ import annotations

import copy
import dataclasses
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import numpy as np
import openmm

from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.molecule_force import MoleculesComputation, MoleculesSpec
from openmm_mlff.forces.python_force import make_force
from openmm_mlff.sampling.replicate import _TERMS, _shift, _without_forces, replicate_with_computations

#: machine-learned forces with the molecules that each of them acts on
Learned = list[tuple[MoleculesComputation, list[int]]]


def combine(systems: Sequence[openmm.System], batch: int | None = None) -> openmm.System:
    """One System of many molecules: particle i of molecule k is particle ``offsets[k] + i``.

    Global parameters are shared by all molecules. Every molecule keeps the motion of its centre of mass.

    Args:
        systems: one per molecule, for example from ``MLPotential(...).createSystem(topology)``; they stay as they are.
        batch: molecules in one evaluation of a machine-learned force; None takes all.

    Raises `ValueError` naming the molecule for one that is periodic or has a force that cannot be kept apart from the
    others' (see `replicate`).
    """
    return combine_with_computations(systems, batch)[0]


def combine_with_computations(systems: Sequence[openmm.System], batch: int | None) -> tuple[openmm.System, Learned]:
    """As `combine`, with the computations behind the machine-learned forces and the molecules of each."""
    if not systems:
        raise ValueError("systems: expected at least one, got none")
    singles = []
    for k, system in enumerate(systems):
        if system.usesPeriodicBoundaryConditions():
            raise ValueError(f"systems: expected open molecules, got a periodic box for molecule {k}")
        try:
            # checks everything, and leaves only forces whose terms name their particles
            singles.append(replicate_with_computations(system, 1))
        except ValueError as error:
            raise ValueError(f"{error} (molecule {k})") from error
    offsets = np.cumsum([0, *(system.getNumParticles() for system in systems)]).tolist()
    combined = _particles([single for single, _ in singles], offsets)
    native = _Definitions(offsets)
    pieces: dict[tuple[ForceSpec, int], list[tuple[int, ForceSpec]]] = {}
    for k, (single, computations) in enumerate(singles):
        learned = iter(computations)
        for force in single.getForces():
            if isinstance(force, openmm.PythonForce):
                spec = next(learned).spec
                shared = dataclasses.replace(spec, numbers=(), atoms=None, path=None, charge=0, multiplicity=1)
                pieces.setdefault((shared, force.getForceGroup()), []).append((k, spec))
            else:
                native.add(force, k)
    made: Learned = []
    for (_, group), members in pieces.items():
        computation = _learned(members, offsets, batch)
        combined.addForce(make_force(computation, computation.spec.atoms, False, group))
        made.append((computation, [k for k, _ in members]))
    for force in native.merged():
        combined.addForce(force)
    return combined, made


def _learned(
    members: Sequence[tuple[int, ForceSpec]], offsets: Sequence[int], batch: int | None
) -> MoleculesComputation:
    """One computation for the regions of several molecules, all particles in order if that is what they are."""
    placed = []
    for k, spec in members:
        own = range(offsets[k + 1] - offsets[k]) if spec.atoms is None else spec.atoms
        placed.append(dataclasses.replace(spec, atoms=tuple(offsets[k] + i for i in own)))
    joined = MoleculesSpec.joined(placed, batch)
    if joined.common.atoms == tuple(range(offsets[-1])):
        joined = dataclasses.replace(joined, common=dataclasses.replace(joined.common, atoms=None))
    return MoleculesComputation(joined)


def _particles(systems: Sequence[openmm.System], offsets: Sequence[int]) -> openmm.System:
    """Particles, virtual sites and constraints of all systems."""
    whole = openmm.System()
    root = ET.fromstring(openmm.XmlSerializer.serialize(whole))
    for system, offset in zip(systems, offsets[:-1], strict=True):
        one = ET.fromstring(openmm.XmlSerializer.serialize(_without_forces(system, 1)))
        for name, names in (("Particles", r"p\d+"), ("Constraints", r"p\d")):
            source, target = one.find(name), root.find(name)
            assert source is not None and target is not None
            for element in source.iter():
                _shift(element, names, offset)
            target.extend(list(source))
    return openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))


class _Definitions:
    """OpenMM's own forces by what they are apart from their terms; equal ones become one."""

    def __init__(self, offsets: Sequence[int]) -> None:
        self._offsets = offsets
        #: definition, and which one it is of those alike in a molecule -> its XML without terms, and the terms of each
        #: molecule that has it, by place
        self._found: dict[tuple[str, int], tuple[ET.Element, dict[int, dict[str, list[ET.Element]]]]] = {}

    def add(self, force: openmm.Force, molecule: int) -> None:
        """Take in a force of a molecule, as `replicate` makes it."""
        root = ET.fromstring(openmm.XmlSerializer.serialize(force))
        terms = {}
        for place in _terms(root.get("type", "")):
            element = root.find(place)
            assert element is not None
            terms[place] = list(element)
            element[:] = []
        text, n = ET.tostring(root, encoding="unicode"), 0
        while molecule in self._found.setdefault((text, n), (root, {}))[1]:
            n += 1
        self._found[text, n][1][molecule] = terms

    def merged(self) -> list[openmm.Force]:
        """One force per definition, with the terms of all molecules."""
        return [self._merge(copy.deepcopy(root), own) for root, own in self._found.values()]

    def _merge(self, root: ET.Element, own: dict[int, dict[str, list[ET.Element]]]) -> openmm.Force:
        kind, n = root.get("type", ""), len(self._offsets) - 1
        if kind == "AndersenThermostat" and len(own) != n:
            raise ValueError("system: an AndersenThermostat acts on all particles, expected the same in all molecules")
        groups = 0
        for k in range(n):
            terms = own.get(k)
            if terms is None:
                if kind == "CustomNonbondedForce":
                    _pad(root, self._offsets[k + 1] - self._offsets[k])
                continue
            for place, elements in terms.items():
                target, names = root.find(place), _terms(kind)[place]
                assert target is not None
                # the bonds of a CustomCentroidBondForce join groups
                by = groups if names.startswith("g") else self._offsets[k]
                for element in elements:
                    for part in element.iter():
                        _shift(part, names, by)
                target.extend(elements)
            groups += len(terms.get("Groups", ()))
        return openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))


#: terms and their particle indices of forces that have several kinds of terms (see `replicate._TERMS`)
_MORE_TERMS = {
    "CustomCentroidBondForce": {"Groups": r"p", "Bonds": r"g\d+"},
    "CustomNonbondedForce": {"Particles": r"-", "Exclusions": r"p\d", "InteractionGroups": r"index"},
    "AndersenThermostat": {},
}


def _terms(kind: str) -> dict[str, str]:
    return _MORE_TERMS[kind] if kind in _MORE_TERMS else dict([_TERMS[kind]])


def _pad(root: ET.Element, n: int) -> None:
    """Particles that are in no interaction group: OpenMM wants parameters of all."""
    particles, parameters = root.find("Particles"), root.find("PerParticleParameters")
    assert particles is not None and parameters is not None
    values = {f"param{i + 1}": "0" for i in range(len(parameters))}
    particles.extend(ET.Element("Particle", values) for _ in range(n))
