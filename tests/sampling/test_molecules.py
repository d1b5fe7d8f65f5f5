"""Different molecules in one System: each has the energies, forces and trajectory that it has alone."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable

import numpy as np
import openmm
import pytest
import torch
from openmm import app
from openmmml import MLPotential
from torch import nn

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.forces.molecule_force import MoleculesComputation, MoleculesSpec
from openmm_mlff.forces.serialization import load_system, stored_options
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential, Prediction
from openmm_mlff.sampling.combine import combine
from openmm_mlff.sampling.molecules import Molecules
from openmm_mlff.sampling.replicate import join_topologies, replicate

from .copies import Molecule, reference, spread
from .test_replicate import FORCES


def shortened(topology: app.Topology, keep: int) -> app.Topology:
    """The first atoms of a molecule, with the bonds between them."""
    atoms = list(topology.atoms())
    modeller = app.Modeller(topology, np.zeros((len(atoms), 3)) * openmm.unit.nanometer)
    modeller.delete(atoms[keep:])
    return modeller.topology


@pytest.fixture(scope="module")
def three(molecule: Molecule) -> tuple[list[app.Topology], list[np.ndarray]]:
    """Alanine dipeptide, two of them as one molecule of 44 atoms, and the first 13 atoms of it."""
    topologies = [molecule.topology, join_topologies([molecule.topology] * 2), shortened(molecule.topology, 13)]
    x = spread(molecule, 4, 0.006)
    return topologies, [x[0], np.concatenate([x[1], x[2] + [0.0, 0.0, 1.0]]), x[3, :13]]


def alone(system: openmm.System, positions: np.ndarray) -> tuple[float, np.ndarray]:
    context = reference(system)
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


def agrees(
    systems: list[openmm.System], topologies: list[app.Topology], positions: list[np.ndarray], digits: float
) -> Molecules:
    """Assert that every molecule has the energy and forces that it has alone."""
    molecules = Molecules(systems, topologies)
    context = molecules.context(openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0005), "Reference")
    molecules.set_positions(context, positions)
    frame = molecules.frame(context)
    for k, system in enumerate(systems):
        energy, forces = alone(system, positions[k])
        assert frame.potential[k] == pytest.approx(energy, rel=digits, abs=digits)
        np.testing.assert_allclose(frame.forces[k], forces, rtol=digits, atol=digits * max(1.0, np.abs(forces).max()))
    return molecules


def learned_systems(learned: MLPotential, topologies: list[app.Topology]) -> list[openmm.System]:
    return [learned.createSystem(t, compile=False, precision="double") for t in topologies]


# -- combined systems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FORCES)
def test_native_forces(
    three: tuple[list[app.Topology], list[np.ndarray]], make: Callable[[openmm.System], openmm.Force]
) -> None:
    """One definition in two molecules of different size, and none in the third."""
    topologies, positions = three
    systems = []
    for topology in topologies:
        system = openmm.System()
        for atom in topology.atoms():
            system.addParticle(atom.element.mass)
        if system.getNumParticles() > 13:
            system.addForce(make(system))
        systems.append(system)
    molecules = agrees(systems, topologies, positions, 1e-9)
    assert molecules.system.getNumForces() == 1


def test_learned_forces(learned: MLPotential, three: tuple[list[app.Topology], list[np.ndarray]]) -> None:
    topologies, positions = three
    molecules = agrees(learned_systems(learned, topologies), topologies, positions, 1e-8)
    assert molecules.system.getNumForces() == 1
    assert molecules.degrees_of_freedom.tolist() == [66, 132, 39]


def test_force_fields_with_constraints_and_a_learned_part(
    learned: MLPotential, three: tuple[list[app.Topology], list[np.ndarray]]
) -> None:
    topologies, positions = three[0][:2], three[1][:2]
    field = app.ForceField("amber99sbildn.xml")
    systems = [field.createSystem(t, nonbondedMethod=app.NoCutoff, constraints=app.HBonds) for t in topologies]
    region = list(range(6, 16))
    systems[1] = learned.createMixedSystem(
        topologies[1], field.createSystem(topologies[1]), region, compile=False, precision="double"
    )
    size = systems[1].getNumParticles()
    extra = app.Topology()
    residue = extra.addResidue("LNK", extra.addChain())
    for _ in range(size - 44):
        extra.addAtom("H", app.Element.getBySymbol("H"), residue)
    context = reference(systems[1])
    context.setPositions(np.concatenate([positions[1], np.zeros((size - 44, 3))]))
    context.computeVirtualSites()
    whole = context.getState(positions=True).getPositions(asNumpy=True)._value
    molecules = agrees(systems, [topologies[0], join_topologies([topologies[1], extra])], [positions[0], whole], 1e-7)
    assert molecules.degrees_of_freedom[0] == 66 - systems[0].getNumConstraints()


def test_what_couples_molecules_is_refused(system: openmm.System, molecule: Molecule) -> None:
    """In the words of `replicate`, and with the molecule."""
    bad = openmm.System()
    bad.addParticle(1.0)
    bad.addForce(openmm.HarmonicBondForce())
    bad.getForce(0).setUsesPeriodicBoundaryConditions(True)
    with pytest.raises(ValueError, match="periodic box for molecule 1"):
        combine([system, bad])
    bad.removeForce(0)
    bad.addForce(openmm.RMSDForce([openmm.Vec3(0, 0, 0)]))
    with pytest.raises(ValueError) as copied:
        replicate(bad, 2)
    with pytest.raises(ValueError) as combined:
        combine([system, bad])
    assert str(combined.value) == f"{copied.value} (molecule 1)"
    with pytest.raises(ValueError, match="expected at least one"):
        combine([])
    with pytest.raises(ValueError, match=r"topologies: expected \[22\] atoms"):
        Molecules([system], [join_topologies([molecule.topology] * 2)])
    with pytest.raises(ValueError, match="AndersenThermostat acts on all"):
        plain = openmm.System()
        plain.addParticle(1.0)
        hot = openmm.XmlSerializer.clone(plain)
        hot.addForce(openmm.AndersenThermostat(300.0, 1.0))
        combine([plain, hot])


def test_xml_and_pickle(learned: MLPotential, three: tuple[list[app.Topology], list[np.ndarray]]) -> None:
    topologies, positions = three
    combined = combine(learned_systems(learned, topologies))
    again = load_system(openmm.XmlSerializer.serialize(combined))
    whole = np.concatenate(positions)
    assert alone(again, whole)[0] == alone(combined, whole)[0]
    options = stored_options(again.getForce(0)).pop()
    spec = MoleculesSpec.from_json(options)
    assert (spec.sizes, spec.multiplicities) == ((22, 44, 13), (1, 1, 1))
    assert pickle.loads(pickle.dumps(MoleculesComputation(options))).molecules == spec
    for text in (
        "{}",
        options.replace('"sizes":[22,', '"sizes":[21,'),
        options.replace('"version":1}', '"version":9}'),
    ):
        with pytest.raises(ValueError, match="stored options of many molecules"):
            MoleculesSpec.from_json(text)


def test_a_stored_system_names_what_breaks(
    learned: MLPotential, three: tuple[list[app.Topology], list[np.ndarray]]
) -> None:
    """Without a driver that looks at failures, a broken molecule is an error."""
    topologies, positions = three
    system = combine(learned_systems(learned, topologies))
    clash = [x.copy() for x in positions]
    clash[2][4] = clash[2][8]
    # molecules may lie on top of one another
    clash[0] = clash[1][:22].copy()
    with pytest.raises(openmm.OpenMMException, match=r"atom 4 \(.\) of molecule 2 and atom 8 .* at the same place"):
        alone(system, np.concatenate(clash))


# -- dynamics --------------------------------------------------------------------------------------------------------


def test_trajectories_are_the_single_ones(
    learned: MLPotential, three: tuple[list[app.Topology], list[np.ndarray]]
) -> None:
    topologies, positions = three
    systems = learned_systems(learned, topologies)
    molecules = Molecules(systems, topologies)
    context = molecules.context(openmm.VerletIntegrator(0.0001), "Reference")
    molecules.set_positions(context, positions)
    molecules.set_velocities(context, 300.0, seeds=3)
    start = molecules.frame(context)
    context.getIntegrator().step(30)
    end = molecules.frame(context)
    assert not molecules.failures
    for k, system in enumerate(systems):
        for force in reversed(range(system.getNumForces())):
            if isinstance(system.getForce(force), openmm.CMMotionRemover):
                system.removeForce(force)
        single = reference(system, openmm.VerletIntegrator(0.0001))
        single.setPositions(positions[k])
        single.setVelocities(start.velocities[k])
        single.getIntegrator().step(30)
        state = single.getState(positions=True, energy=True)
        np.testing.assert_allclose(end.positions[k], state.getPositions(asNumpy=True)._value, rtol=0, atol=1e-9)
        assert end.kinetic[k] == pytest.approx(state.getKineticEnergy()._value, rel=1e-6)
        assert end.potential[k] == pytest.approx(state.getPotentialEnergy()._value, rel=1e-7)


def test_velocities_belong_to_the_molecule(tiny_model: str, three: tuple[list[app.Topology], list[np.ndarray]]) -> None:
    potential = load_potential(tiny_model)
    structures = [_structure(t, x) for t, x in zip(*three, strict=True)]
    found = []
    for chosen in (structures[:2], structures):
        molecules = Molecules.from_potential(potential, chosen, compile=False)
        context = molecules.context(openmm.VerletIntegrator(0.0005))
        molecules.set_velocities(context, 300.0, seeds=4)
        found.append(molecules.velocities(context))
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][1], molecules.thermal_velocities(1, 300.0, (4, 1)))
    with pytest.raises(ValueError, match="seeds: expected one number, or one for each of 3 molecules, got 2"):
        molecules.set_velocities(context, 300.0, seeds=[1, 2])


def _structure(topology: app.Topology, positions: np.ndarray) -> Structure:
    numbers = np.array([atom.element.atomic_number for atom in topology.atoms()])
    bonds = [(b.atom1.index, b.atom2.index) for b in topology.bonds()]
    return Structure(numbers, positions * 10, info={"topology_bonds": bonds})


# -- a potential in memory -------------------------------------------------------------------------------------------


def test_in_memory(tiny_model: str, three: tuple[list[app.Topology], list[np.ndarray]]) -> None:
    potential = load_potential(tiny_model).double()
    structures = [_structure(t, x) for t, x in zip(*three, strict=True)]
    molecules = Molecules.from_potential(potential, structures, precision=None, compile=False)
    context = molecules.context(openmm.VerletIntegrator(0.0005))
    molecules.set_positions(context)

    def compare(potential: Potential) -> np.ndarray:
        energies = molecules.potential_energies(context)
        forces = molecules.split(context.getState(forces=True).getForces(asNumpy=True)._value)
        for k, structure in enumerate(structures):
            energy, force = potential.energy_and_forces(structure)
            assert energies[k] / 96.48533212331 == pytest.approx(energy, rel=1e-9)
            np.testing.assert_allclose(forces[k] / 964.8533212331, force, rtol=0, atol=1e-8)
        return energies

    before = compare(potential)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.1)
    np.testing.assert_array_equal(molecules.potential_energies(context), before)
    molecules.set_potential(potential)
    assert np.abs(compare(potential) - before).min() > 1.0
    with pytest.raises(openmm.OpenMMException):
        openmm.XmlSerializer.serialize(molecules.system)


def test_bad_input(tiny_model: str, three: tuple[list[app.Topology], list[np.ndarray]]) -> None:
    potential = load_potential(tiny_model)
    structure = _structure(three[0][0], three[1][0])
    for structures, message in (
        ([], "at least one molecule"),
        ([structure, structure.replace(cell=np.eye(3) * 20)], "periodic box vectors for molecule 1"),
        ([structure, Structure(np.array([9, 1]), np.eye(3)[:2])], r"elements: .*got F \(molecule 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Molecules.from_potential(potential, structures, compile=False)
    molecules = Molecules.from_potential(potential, [structure] * 2, compile=False)
    context = molecules.context(openmm.VerletIntegrator(0.0005))
    x = structure.positions / 10
    for positions, message in (
        ([x], "one array for each of 2 molecules, got 1"),
        ([x, x[:5]], r"expected shape \(22, 3\) for molecule 1, got \(5, 3\)"),
        ([x, x * np.nan], "NaN or infinity in molecule 1"),
    ):
        with pytest.raises(ValueError, match=message):
            molecules.set_positions(context, positions)


# -- the guard -------------------------------------------------------------------------------------------------------


class Wells(Potential):
    """A harmonic well for every atom about the centre of its molecule, and NaN for a molecule beyond a wall."""

    family = "wells"
    elements = (1, 2, 6)
    cutoff = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def predict(self, batch: Batch, fixed: object) -> Prediction:
        centre = batch.sum_by_structure(batch.positions) / batch.counts[:, None]
        square = (batch.positions - centre[batch.segment]).square().sum(-1)
        # a root that is there for its NaN
        beyond = 0.0 * (81.0 - square).sqrt()
        return Prediction(batch.sum_by_structure(0.5 * self.strength * square + beyond))


def atoms(*counts: int) -> list[Structure]:
    """Helium atoms in a row: no bonds."""
    return [Structure(np.full(n, 2), np.arange(n)[:, None] * np.array([[1.1, 0.2, 0.1]])) for n in counts]


def run(
    molecules: Molecules, sabotage: Callable[[openmm.Context], None] | None, steps: int = 200
) -> tuple[list[list[np.ndarray]], openmm.Context]:
    """Frames of all molecules; one is sabotaged after a quarter of the steps and starts anew after half of them."""
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.0005)
    integrator.setRandomNumberSeed(8)
    context = molecules.context(integrator)
    molecules.set_positions(context)
    molecules.set_velocities(context, 300.0, seeds=2)
    frames = []
    for k in range(4):
        for _ in range(5):
            integrator.step(steps // 20)
            frames.append(molecules.positions(context))
        if k == 0 and sabotage is not None:
            sabotage(context)
        if k == 1 and sabotage is not None:
            molecules.restart(context, 1, 300.0, seed=9)
    return frames, context


def move(molecules: Molecules, value: float) -> Callable[[openmm.Context], None]:
    """Put the first atom of molecule 1 somewhere else."""

    def sabotage(context: openmm.Context) -> None:
        where = np.concatenate(molecules.positions(context))
        where[molecules.offsets[1]] += value
        context.setPositions(where)

    return sabotage


@pytest.mark.parametrize(
    ("shift", "reason"),
    [
        (2.0, r"the force on atom . \(He\) is \(nan, nan, nan\)"),
        (0.65, r"exceeds the limit"),
        (np.nan, r"atom 0 \(He\) is at \[nan nan nan\] nm"),
    ],
)
def test_others_do_not_notice(shift: float, reason: str) -> None:
    """A molecule that breaks is held, reported and put back; every other one moves the same bit for bit."""
    structures = atoms(5, 4, 6, 3)
    untouched, _ = run(Molecules.from_potential(Wells(), structures, None, False, max_force=2e3), None)
    molecules = Molecules.from_potential(Wells(), structures, None, False, max_force=2e3)
    frames, context = run(molecules, move(molecules, shift))
    (failure,) = molecules.failures
    assert (failure.molecule, failure.step) == (1, 50)
    np.testing.assert_allclose(failure.positions / 10, untouched[4][1], rtol=0, atol=5e-3)
    for before, after in zip(untouched, frames, strict=True):
        for k in (0, 2, 3):
            np.testing.assert_array_equal(before[k], after[k])

    assert re.search(reason, failure.reason)
    assert not molecules.held.any()
    assert np.abs(frames[6][1] - untouched[6][1]).max() > 0.1 or not np.isfinite(frames[6][1]).all()
    # put back, it moves and has energies of its own again
    assert np.isfinite(frames[-1][1]).all() and np.abs(frames[-1][1] - frames[-2][1]).max() > 1e-5
    energy = Wells().energy_and_forces(structures[1].replace(positions=frames[-1][1] * 10))[0]
    assert molecules.potential_energies(context)[1] / 96.48533212331 == pytest.approx(energy, rel=1e-9)


def test_a_held_molecule_has_no_forces() -> None:
    molecules = Molecules.from_potential(Wells(), atoms(5, 4), None, False)
    context = molecules.context(openmm.VerletIntegrator(0.0005))
    molecules.set_positions(context)
    before = molecules.potential_energies(context)
    move(molecules, 2.0)(context)
    frame = molecules.frame(context)
    assert molecules.held.tolist() == [False, True]
    assert not frame.forces[1].any() and frame.forces[0].any()
    np.testing.assert_array_equal(frame.potential, before)
    # it stays held, and is reported once
    context.setPositions(np.concatenate(molecules.starts or []))
    assert not molecules.frame(context).forces[1].any()
    assert len(molecules.failures) == 1


def test_atoms_at_one_place(tiny_model: str, three: tuple[list[app.Topology], list[np.ndarray]]) -> None:
    """Where the model itself refuses a molecule, the others still have their energies and forces."""
    structures = [_structure(t, x).replace(info={"topology_bonds": []}) for t, x in zip(*three, strict=True)]
    molecules = Molecules.from_potential(load_potential(tiny_model), structures, compile=False)
    context = molecules.context(openmm.VerletIntegrator(0.0005))
    molecules.set_positions(context)
    before = molecules.frame(context)
    clash = [s.positions / 10 for s in structures]
    clash[1] = clash[1].copy()
    clash[1][30] = clash[1][8]
    molecules.set_positions(context, clash)
    after = molecules.frame(context)
    assert molecules.held.tolist() == [False, True, False]
    assert "atom 8 (C) and atom 30 (C) are at the same place" in molecules.failures[0].reason
    for k in (0, 2):
        np.testing.assert_array_equal(before.forces[k], after.forces[k])
    np.testing.assert_array_equal(before.potential, after.potential)


def test_broken_bonds() -> None:
    """Methane: a hydrogen 1.8 angstrom from its carbon has left it; one that was given no bond may go."""
    tetrahedron = np.array([[0, 0, 0], [1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]]) * 1.09 / np.sqrt(3)
    methane = Structure(np.array([6, 1, 1, 1, 1]), tetrahedron)
    partly = methane.replace(info={"topology_bonds": [(0, 2), (0, 3), (0, 4)]})
    molecules = Molecules.from_potential(Wells(), [methane, partly, methane], None, False)
    context = molecules.context(openmm.VerletIntegrator(0.0005))
    stretched = [s.positions.copy() / 10 for s in (methane, partly, methane)]
    for k, factor in enumerate((1.8, 1.8, 1.5)):
        stretched[k][1] *= factor / 1.09
    molecules.set_positions(context, stretched)
    molecules.potential_energies(context)
    assert molecules.held.tolist() == [True, False, False]
    assert (
        "bond between atom 0 (C) and atom 1 (H) is broken: 1.80 angstrom, at most 1.71" in molecules.failures[0].reason
    )


def test_minimise() -> None:
    """Every molecule reaches a minimum by itself: what the others are changes nothing."""
    molecules = Molecules.from_potential(Wells(), atoms(5, 4, 7), None, False)
    context = molecules.context(openmm.VerletIntegrator(0.0005))
    molecules.set_positions(context)
    energies = molecules.minimize(context, tolerance=1e-3)
    forces = molecules.frame(context).forces
    assert max(np.sqrt(np.square(f).sum(axis=1).mean()) for f in forces) <= 1e-3
    # every atom at the bottom of its well
    np.testing.assert_allclose(energies, 0.0, atol=1e-6)
    single = Molecules.from_potential(Wells(), atoms(4), None, False)
    context = single.context(openmm.VerletIntegrator(0.0005))
    single.set_positions(context)
    single.minimize(context, tolerance=1e-3)
