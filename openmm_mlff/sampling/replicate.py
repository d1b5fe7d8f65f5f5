"""System of one molecule -> System of many independent copies of it.

Copies do not interact, and every energy term of one copy is there once per copy, so the energy of the System is the
sum of the copies' energies and the force on a copy is what it feels alone. Copies may lie on top of one another.

What can be copied: our own machine-learned forces (one force that evaluates all copies together), bonded and custom
bonded forces with everything they carry, `CustomCentroidBondForce`, `CustomExternalForce` (in the same place for every
copy), `CustomNonbondedForce` (interaction groups keep copies apart), `NonbondedForce` without cutoff (becomes an exact
sum over the pairs of every copy), `AndersenThermostat`, constraints and virtual sites. A `CMMotionRemover` is left out:
it would stop the common motion of all copies, which no copy has a part in when it runs alone; so every copy keeps the
motion of its centre of mass. All else is refused: a barostat would couple the copies through their box, and generalised
Born radii, Ewald sums or collective variables have no form that leaves other copies out.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence

import numpy as np
import openmm
from openmm import app

from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.python_force import ForceComputation, make_force
from openmm_mlff.forces.serialization import stored_options
from openmm_mlff.units import COULOMB_EV_ANGSTROM, KJ_PER_MOL_PER_EV, NM_PER_ANGSTROM

#: where a force keeps its terms, and which of their attributes are particle indices (OpenMM's XML)
_TERMS = {
    "HarmonicBondForce": ("Bonds", r"p\d"),
    "HarmonicAngleForce": ("Angles", r"p\d"),
    "PeriodicTorsionForce": ("Torsions", r"p\d"),
    "RBTorsionForce": ("Torsions", r"p\d"),
    "CMAPTorsionForce": ("Torsions", r"[ab]\d"),
    "CustomBondForce": ("Bonds", r"p\d"),
    "CustomAngleForce": ("Angles", r"p\d"),
    "CustomTorsionForce": ("Torsions", r"p\d"),
    "CustomCompoundBondForce": ("Bonds", r"p\d+"),
    "CustomExternalForce": ("Particles", r"index"),
}
#: e^2/(4 pi eps0) in kJ/mol nm
_COULOMB = COULOMB_EV_ANGSTROM * KJ_PER_MOL_PER_EV * NM_PER_ANGSTROM

_ADVICE = {
    "GBSAOBCForce": "Born radii depend on all particles; simulate the copies one by one",
    "CustomGBForce": "its values depend on all particles; simulate the copies one by one",
    "CustomCVForce": "write the bias with CustomTorsionForce or CustomCompoundBondForce, which are copied",
    "CustomVolumeForce": "the box is one for all copies",
    "RMSDForce": "it is one number for all particles; use CustomExternalForce or CustomCompoundBondForce restraints",
}


def replicate(system: openmm.System, n: int, batch: int | None = None) -> openmm.System:
    """A System of `n` copies, one after the other: particle i of copy k is particle ``k * n_particles + i``.

    Global parameters are shared by all copies; what differs between them has to be a parameter of a bond or particle.

    Args:
        system: of one molecule, for example from ``MLPotential(...).createSystem(topology)``; it stays as it is.
        batch: copies in one evaluation of a machine-learned force; None chooses.

    Raises `ValueError` naming the argument for `n` below 1 and for a force that cannot be copied.
    """
    return replicate_with_computations(system, n, batch)[0]


def replicate_with_computations(
    system: openmm.System, n: int, batch: int | None = None
) -> tuple[openmm.System, list[ForceComputation]]:
    """As `replicate`, with the computations behind the machine-learned forces of the copies."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n: expected a whole number of copies >= 1, got {n!r}")
    n, size = int(n), system.getNumParticles()
    if size == 0:
        raise ValueError("system: expected at least one particle, got none")
    copies, computations = _without_forces(system, n), []
    for force in system.getForces():
        kind = type(force).__name__
        if kind == "CMMotionRemover":
            continue
        if isinstance(force, openmm.PythonForce):
            computation = _learned(force, size, n, batch)
            computations.append(computation)
            atoms, periodic = computation.spec.atoms, force.usesPeriodicBoundaryConditions()
            copies.addForce(make_force(computation, atoms, periodic, force.getForceGroup()))
        elif kind in _TERMS:
            copies.addForce(_bonded(force, size, n))
        elif kind in _SPECIAL:
            copies.addForce(_SPECIAL[kind](force, size, n))
        else:
            raise _refused(force, _ADVICE.get(kind, "nothing is known about how its copies could be kept apart"))
    return copies, computations


def replicate_topology(topology: app.Topology, n: int) -> app.Topology:
    """The topology of `n` copies, one after the other, with the box of the first."""
    copies = join_topologies([topology] * n)
    copies.setPeriodicBoxVectors(topology.getPeriodicBoxVectors())
    return copies


def join_topologies(topologies: Sequence[app.Topology]) -> app.Topology:
    """All topologies, one after the other, without a box."""
    joined = app.Topology()
    for topology in topologies:
        atoms: dict[app.topology.Atom, app.topology.Atom] = {}
        for chain in topology.chains():
            new_chain = joined.addChain()
            for residue in chain.residues():
                new = joined.addResidue(residue.name, new_chain, residue.id, residue.insertionCode)
                for atom in residue.atoms():
                    atoms[atom] = joined.addAtom(atom.name, atom.element, new, atom.id)
        for bond in topology.bonds():
            joined.addBond(atoms[bond.atom1], atoms[bond.atom2], bond.type, bond.order)
    return joined


def _without_forces(system: openmm.System, n: int) -> openmm.System:
    """Particles, virtual sites, constraints and the box."""
    root = ET.fromstring(openmm.XmlSerializer.serialize(system))
    forces = root.find("Forces")
    if forces is not None:
        forces.clear()
    size = system.getNumParticles()
    particles, constraints = root.find("Particles"), root.find("Constraints")
    assert particles is not None
    for site in particles.iter():
        if len(site) == 0 and site.tag not in ("Particle", "Particles") and "p1" not in site.attrib:
            raise ValueError(f"system: a virtual site of type {site.tag} cannot be copied")
    _repeat(particles, n, lambda site, k: _shift(site, r"p\d+", k * size))
    if constraints is not None:
        _repeat(constraints, n, lambda term, k: _shift(term, r"p\d", k * size))
    return openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))


def _learned(force: openmm.PythonForce, size: int, n: int, batch: int | None) -> ForceComputation:
    options = stored_options(force)
    if not options:
        raise _refused(force, "its Python function evaluates one copy; only forces of this package evaluate many")
    spec = ForceSpec.from_json(options.pop())
    if spec.replicas != 1:
        raise ValueError(f"system: expected one molecule, got a System of {spec.replicas} copies already")
    atoms = None
    if spec.atoms is not None:
        atoms = tuple(k * size + i for k in range(n) for i in spec.atoms)
    return ForceComputation(dataclasses.replace(spec, atoms=atoms, replicas=n, batch=batch if n > 1 else None))


# -- forces of OpenMM ------------------------------------------------------------------------------------------------


def _edited(force: openmm.Force, edit: Callable[[ET.Element], None]) -> openmm.Force:
    """The force with its XML changed; whatever `edit` does not touch is carried along as it is."""
    root = ET.fromstring(openmm.XmlSerializer.serialize(force))
    edit(root)
    return openmm.XmlSerializer.deserialize(ET.tostring(root, encoding="unicode"))


def _repeat(terms: ET.Element, n: int, change: Callable[[ET.Element, int], None]) -> None:
    """Put `n` copies of all children in the place of the children; ``change(child, k)`` makes them those of copy k."""
    texts = [ET.tostring(term, encoding="unicode") for term in terms]
    terms[:] = []
    for k in range(n):
        for text in texts:
            copy = ET.fromstring(text)
            for element in copy.iter():
                change(element, k)
            terms.append(copy)


def _shift(element: ET.Element, names: str, offset: int) -> None:
    for name in element.attrib:
        if re.fullmatch(names, name):
            element.set(name, str(int(element.attrib[name]) + offset))


def _bonded(force: openmm.Force, size: int, n: int) -> openmm.Force:
    place, names = _TERMS[type(force).__name__]

    def edit(root: ET.Element) -> None:
        terms = root.find(place)
        assert terms is not None
        _repeat(terms, n, lambda term, k: _shift(term, names, k * size))

    return _edited(force, edit)


def _centroid(force: openmm.CustomCentroidBondForce, size: int, n: int) -> openmm.Force:
    def edit(root: ET.Element) -> None:
        groups, bonds = root.find("Groups"), root.find("Bonds")
        assert groups is not None and bonds is not None
        n_groups = len(groups)
        _repeat(groups, n, lambda member, k: _shift(member, "p", k * size))
        _repeat(bonds, n, lambda bond, k: _shift(bond, r"g\d+", k * n_groups))

    return _edited(force, edit)


def _custom_nonbonded(force: openmm.CustomNonbondedForce, size: int, n: int) -> openmm.Force:
    if force.getUseLongRangeCorrection():
        raise _refused(force, "its long-range correction counts the particles of all copies; switch that off")

    def edit(root: ET.Element) -> None:
        particles, exclusions, groups = (root.find(x) for x in ("Particles", "Exclusions", "InteractionGroups"))
        assert particles is not None and exclusions is not None and groups is not None
        if len(groups) == 0:
            group = ET.SubElement(groups, "InteractionGroup")
            for name in ("Set1", "Set2"):
                members = ET.SubElement(group, name)
                members.extend(ET.Element("Particle", index=str(i)) for i in range(size))
        _repeat(particles, n, lambda particle, k: None)
        _repeat(exclusions, n, lambda pair, k: _shift(pair, r"p\d", k * size))
        _repeat(groups, n, lambda member, k: _shift(member, "index", k * size))

    return _edited(force, edit)


def _pairs(force: openmm.NonbondedForce, size: int, n: int) -> openmm.Force:
    """Coulomb and Lennard-Jones terms of all pairs within a copy: what `NonbondedForce` is without a cutoff."""
    if force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
        raise _refused(force, "it has a cutoff or Ewald sums; use nonbondedMethod=NoCutoff, or simulate one by one")
    if force.getNumParticleParameterOffsets() or force.getNumExceptionParameterOffsets():
        raise _refused(force, "it has parameter offsets")
    own = [[x._value for x in force.getParticleParameters(i)] for i in range(size)]
    terms = {
        (i, j): (own[i][0] * own[j][0], (own[i][1] + own[j][1]) / 2, float(np.sqrt(own[i][2] * own[j][2])))
        for i, j in itertools.combinations(range(size), 2)
    }
    for e in range(force.getNumExceptions()):
        i, j, *values = force.getExceptionParameters(e)
        terms[min(i, j), max(i, j)] = tuple(x._value for x in values)
    pairs = openmm.CustomBondForce(f"{_COULOMB!r}*qq/r + 4*epsilon*x*(x-1); x=(sigma/r)^6")
    for name in ("qq", "sigma", "epsilon"):
        pairs.addPerBondParameter(name)
    pairs.setName(f"{force.getName()} (pairs within each copy)")
    pairs.setForceGroup(force.getForceGroup())
    alive = [(pair, values) for pair, values in terms.items() if values[0] or values[2]]
    for k in range(n):
        for (i, j), values in alive:
            pairs.addBond(k * size + i, k * size + j, values)
    return pairs


def _thermostat(force: openmm.AndersenThermostat, size: int, n: int) -> openmm.Force:
    return _edited(force, lambda root: None)


_SPECIAL: dict[str, Callable[..., openmm.Force]] = {
    "CustomCentroidBondForce": _centroid,
    "CustomNonbondedForce": _custom_nonbonded,
    "NonbondedForce": _pairs,
    "AndersenThermostat": _thermostat,
}


def _refused(force: openmm.Force, why: str) -> ValueError:
    kind = type(force).__name__
    name = force.getName()
    label = kind if name == kind else f"{kind} {name!r}"
    known = ", ".join(sorted([*_TERMS, *_SPECIAL]))
    if "Barostat" in kind:
        why = "the copies share one box, so it would couple them"
    return ValueError(f"system: the force {label} cannot be copied ({why}); forces that can: {known}")
