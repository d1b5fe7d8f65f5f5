"""Electrostatic embedding: mixed systems whose ML region feels the MM charges with the model's own charges.

What the MM force field keeps: everything among MM atoms, the Lennard-Jones interactions between ML and MM atoms, and
bonded terms across a cut bond. What the model takes over: the ML region, and its electrostatics with the MM charges.
Cut bonds are capped by hydrogens and bonded terms removed as in openmm-ml's mechanical embedding, whose helpers are
used.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import app, unit
from openmmml.embeddings import utilities

from openmm_mlff.forces.arguments import OPTIONS, atom_list, refuse_unknown, whole_number
from openmm_mlff.forces.embedded_force import EmbeddedComputation, EmbeddedSpec, make_embedded_force
from openmm_mlff.forces.embedding_arguments import (
    EMBEDDING_KEYWORDS,
    Settings,
    check_forces,
    region_charges,
)
from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.python_force import ForceComputation, other_spec
from openmm_mlff.forces.serialization import stored_options
from openmm_mlff.forces.surroundings import SurroundingsSpec, pack
from openmm_mlff.units import ANGSTROM_PER_NM

AddForces = Callable[..., None]


@dataclass
class Mixed:
    """A mixed system and its topology: the atoms that were there, in their order, and after them the link atoms."""

    system: openmm.System
    topology: app.Topology


def create_mixed_system(
    add_forces: AddForces,
    topology: app.Topology,
    system: openmm.System,
    atoms: list[int],
    group: int,
    interpolate: bool,
    arguments: dict[str, Any],
) -> Mixed:
    """Build the system; the arguments are those of ``MLPotential.createMixedSystem``.

    Args:
        add_forces: `MLPotentialImpl.addForces` of a potential that predicts charges.
        arguments: keywords of the model and of the embedding (`embedding_arguments.Settings`).

    Raises `ValueError` or `TypeError` naming the argument.
    """
    refuse_unknown(arguments, (*OPTIONS, *EMBEDDING_KEYWORDS), "createMixedSystem", elsewhere=("modelPath", "model"))
    model_arguments = {k: v for k, v in arguments.items() if k not in EMBEDDING_KEYWORDS}
    settings = Settings.read({k: v for k, v in arguments.items() if k in EMBEDDING_KEYWORDS})
    atoms = atom_list(topology, atoms)
    if topology.getNumAtoms() != system.getNumParticles():
        raise ValueError(
            f"system: expected {topology.getNumAtoms()} particles as the topology has atoms, got "
            f"{system.getNumParticles()}"
        )
    nonbonded = check_forces(system)
    links = utilities.findLinkBonds(topology, atoms)
    charge = whole_number("charge", arguments.get("charge", 0))
    charges = region_charges(nonbonded, topology, atoms, links, charge, settings)

    mixed = utilities.removeBonds(system, topology, atoms, True)
    surroundings = _surroundings(nonbonded, system, settings)
    for force in mixed.getForces():
        if isinstance(force, openmm.NonbondedForce):
            _leave_to_the_model(force, atoms, surroundings)
        elif isinstance(force, openmm.CustomNonbondedForce):
            utilities.addCustomNonbondedExclusions(force, atoms)

    capped = copy.deepcopy(topology)
    plain = openmm.XmlSerializer.clone(system) if interpolate else None
    systems = [mixed] if plain is None else [plain, mixed]
    caps = add_caps(capped, systems, links, settings.link_atom_distances)
    region = [*atoms, *caps]

    spec = _region(add_forces, capped, region, group, model_arguments, surroundings.method, nonbonded)
    surroundings = dataclasses.replace(
        surroundings,
        n_particles=mixed.getNumParticles(),
        charges=pack(np.concatenate([charges, np.zeros(len(caps))])),
        polarizabilities=settings.polarizabilities_of(spec.numbers, len(caps)),
    )
    force = make_embedded_force(EmbeddedComputation(EmbeddedSpec(spec, surroundings)), group)
    if plain is None:
        mixed.addForce(force)
    else:
        _interpolate(mixed, plain, force, topology, atoms, surroundings)
    return Mixed(mixed, capped)


def _region(
    add_forces: AddForces,
    topology: app.Topology,
    atoms: list[int],
    group: int,
    arguments: dict[str, Any],
    method: str,
    nonbonded: openmm.NonbondedForce,
) -> ForceSpec:
    """What the potential would store for these atoms; it checks its own arguments."""
    scratch = openmm.System()
    add_forces(topology, scratch, atoms, group, **arguments)
    (options,) = (o for force in scratch.getForces() for o in stored_options(force))
    spec = ForceSpec.from_json(options)
    if spec.uncertainty is not None and spec.uncertainty.other is not None:
        other = ForceComputation(other_spec(spec)).model
        if not other.predicts_charges:
            raise ValueError(
                f"fall_back: electrostatic embedding needs a model that predicts charges, got a {other.family!r} model"
            )
    periodic = nonbonded.usesPeriodicBoundaryConditions()
    # a box in the topology means nothing to a force field without periodic boundaries
    return dataclasses.replace(spec, region="wrapped" if periodic else "open")


# -- link atoms ------------------------------------------------------------------------------------------------------


def add_caps(
    topology: app.Topology,
    systems: list[openmm.System],
    links: list[tuple[int, int]],
    distances: Sequence[tuple[int, int, float]],
) -> list[int]:
    """Put a hydrogen without mass on every cut bond (ML atom, MM atom), at the end of topology and systems, in place.

    As `openmmml.embeddings.utilities.addLinkAtomSites`, which refuses topologies whose virtual sites have no element.

    Args:
        distances: ``(i, j, distance)`` in nm where it is not at the sum of the covalent radii.

    Returns: the indices of the hydrogens.
    """
    given = {frozenset((i, j)): distance for i, j, distance in distances}
    unknown = set(given) - {frozenset(link) for link in links}
    if unknown:
        raise ValueError(f"linkAtomDistances: expected cut bonds, got {sorted(min(unknown, key=sorted))}")
    if not links:
        return []
    hosts = [host for _, host in links]
    if len(set(hosts)) < len(hosts):
        twice = next(h for k, h in enumerate(hosts) if h in hosts[:k])
        raise ValueError(
            f"atoms: MM atom {twice} has bonds to two ML atoms; both their link atoms would be where it is"
        )
    elements = [atom.element for atom in topology.atoms()]
    chain, caps = topology.addChain(), []
    for k, link in enumerate(links):
        distance = given.get(frozenset(link))
        if distance is None:
            radii = utilities.COVALENT_RADII
            distance = radii[elements[link[0]].atomic_number] + radii[1]
        hydrogen = topology.addAtom(f"V{k}", app.element.hydrogen, topology.addResidue(f"V{k}", chain))
        caps.append(hydrogen.index)
        for system in systems:
            site = openmm.LocalCoordinatesSite(link, [1.0, 0.0], [-1.0, 1.0], [0.0, 0.0], [distance, 0.0, 0.0])
            system.setVirtualSite(system.addParticle(0.0), site)
            _without_interactions(system)
    return caps


def _without_interactions(system: openmm.System) -> None:
    """Enter the newest particle into the nonbonded forces."""
    newest = system.getNumParticles() - 1
    custom = [f for f in system.getForces() if isinstance(f, openmm.CustomNonbondedForce)]
    plain = [f for f in system.getForces() if isinstance(f, openmm.NonbondedForce)]
    for force in plain:
        force.addParticle(0.0, 1.0, 0.0)
    for force in custom:
        force.addParticle([0.0] * force.getNumPerParticleParameters())
    if custom:
        # a custom force may act without parameters, and OpenMM wants the same exclusions of all
        for i in range(newest):
            for force in plain:
                force.addException(i, newest, 0.0, 1.0, 0.0)
            for force in custom:
                force.addExclusion(i, newest)


# -- the nonbonded force ---------------------------------------------------------------------------------------------


def _surroundings(force: openmm.NonbondedForce, system: openmm.System, settings: Settings) -> SurroundingsSpec:
    """The same electrostatics as the force field's, without its charges."""
    method, kinds = force.getNonbondedMethod(), openmm.NonbondedForce
    open_space = SurroundingsSpec(
        0, pack(np.zeros(0)), damping=settings.damping, induction_damping=settings.induction_damping
    )
    if method == kinds.NoCutoff:
        return open_space
    cutoff = force.getCutoffDistance().value_in_unit(unit.angstrom)
    if method in (kinds.CutoffNonPeriodic, kinds.CutoffPeriodic):
        dielectric = force.getReactionFieldDielectric()
        return dataclasses.replace(open_space, method="reaction field", cutoff=cutoff, dielectric=dielectric)
    # an Ewald sum without mesh is matched by a mesh that is finer than its tolerance asks for
    tolerance = force.getEwaldErrorTolerance() * (0.1 if method == kinds.Ewald else 1.0)
    alpha, grid = mesh_parameters(force, system, tolerance)
    return dataclasses.replace(open_space, method="mesh", cutoff=cutoff, alpha=alpha / ANGSTROM_PER_NM, grid=grid)


def mesh_parameters(
    force: openmm.NonbondedForce, system: openmm.System, tolerance: float
) -> tuple[float, tuple[int, int, int]]:
    """alpha (1/nm) and grid that OpenMM uses: those set, or its rule for the cutoff, tolerance and default box.

    OpenMM User Guide, 'Particle Mesh Ewald'.
    """
    alpha, *grid = force.getPMEParameters()
    alpha = alpha.value_in_unit(unit.nanometer**-1) if unit.is_quantity(alpha) else float(alpha)
    if alpha > 0.0 and force.getNonbondedMethod() != openmm.NonbondedForce.Ewald:
        return alpha, (grid[0], grid[1], grid[2])
    cutoff = force.getCutoffDistance().value_in_unit(unit.nanometer)
    alpha = math.sqrt(-math.log(2.0 * force.getEwaldErrorTolerance())) / cutoff
    box = system.getDefaultPeriodicBoxVectors()
    sides = [box[k][k].value_in_unit(unit.nanometer) for k in range(3)]
    x, y, z = (max(6, math.ceil(2.0 * alpha * side / (3.0 * tolerance**0.2))) for side in sides)
    return alpha, (x, y, z)


def _fix_mesh(force: openmm.NonbondedForce, surroundings: SurroundingsSpec) -> None:
    """Write down the mesh that OpenMM would choose, so that a later box does not choose another."""
    if force.getNonbondedMethod() in (openmm.NonbondedForce.PME, openmm.NonbondedForce.LJPME):
        assert surroundings.grid is not None
        force.setPMEParameters(surroundings.alpha * ANGSTROM_PER_NM, *surroundings.grid)


def _leave_to_the_model(force: openmm.NonbondedForce, atoms: list[int], surroundings: SurroundingsSpec) -> None:
    """Take the charges off the ML atoms, and everything between two of them."""
    _fix_mesh(force, surroundings)
    inside = set(atoms)
    for k in range(force.getNumExceptions()):
        i, j, _, sigma, epsilon = force.getExceptionParameters(k)
        if i in inside or j in inside:
            force.setExceptionParameters(k, i, j, 0.0, sigma, epsilon)
    for i in atoms:
        _, sigma, epsilon = force.getParticleParameters(i)
        force.setParticleParameters(i, 0.0, sigma, epsilon)
    for a, i in enumerate(atoms):
        for j in atoms[:a]:
            force.addException(i, j, 0.0, 1.0, 0.0, True)
    if force.usesPeriodicBoundaryConditions():
        # molecules may arrive in pieces
        force.setExceptionsUsePeriodicBoundaryConditions(True)


def _interpolate(
    mixed: openmm.System,
    plain: openmm.System,
    force: openmm.Force,
    topology: app.Topology,
    atoms: list[int],
    surroundings: SurroundingsSpec,
) -> None:
    """Between the force field at lambda_interpolate = 0 and the embedded region at 1, linear in energy."""
    for other in plain.getForces():
        if isinstance(other, openmm.NonbondedForce):
            _fix_mesh(other, surroundings)
    helper = utilities.InterpolationHelper()
    helper.addMLTerm(copy.deepcopy(force))
    helper.addMMBondedTerms(plain, topology, atoms)
    helper.setupNonbonded(mixed, plain)
    helper.setupInterpolation(mixed)
