"""ML/MM: end points of the interpolation, periodic images, link atoms, molecules and the barostat."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import checks, running
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV
from openmm_spookynet import SpookyNet

from .conftest import Box, context_of, energy_of, forces_of

ML_ATOMS = list(range(22))
PLATFORMS = ("Reference", "CPU", "OpenCL")


@pytest.fixture(scope="module")
def potential(model: SpookyNet) -> MLPotential:
    return MLPotential("spookynet", model=model)


@pytest.fixture(scope="module")
def mixed(potential: MLPotential, solvated: Box) -> openmm.System:
    return potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS)


def through_the_molecule(positions: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box moved until its boundary goes through the molecule: as it is, and with every atom wrapped by itself."""
    moved = positions - positions[8] + 0.001
    fractional = moved @ np.linalg.inv(vectors)
    wrapped = (fractional - np.floor(fractional)) @ vectors
    assert np.ptp(wrapped[ML_ATOMS], axis=0).max() > 0.9 * np.diag(vectors).min()
    return moved, wrapped


# -- energies ---------------------------------------------------------------------------------------------------


def test_energy_is_the_sum_of_its_parts(
    model: SpookyNet, potential: MLPotential, alanine: app.PDBFile, solvated: Box
) -> None:
    """Without charges and Lennard-Jones on the molecule, E(mixed) - E(water) is the energy of the free molecule."""
    system = openmm.XmlSerializer.clone(solvated.system)
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            for i in ML_ATOMS:
                force.setParticleParameters(i, 0.0, 0.1, 0.0)
            for k in range(force.getNumExceptions()):
                i, j, _, sigma, _ = force.getExceptionParameters(k)
                if i in ML_ATOMS and j in ML_ATOMS:
                    force.setExceptionParameters(k, i, j, 0.0, sigma, 0.0)
    with_ml = context_of(potential.createMixedSystem(solvated.topology, system, ML_ATOMS), solvated.positions)
    for force in system.getForces():
        for kind, terms in ((openmm.HarmonicBondForce, "Bond"), (openmm.HarmonicAngleForce, "Angle")):
            if isinstance(force, kind):
                for k in range(getattr(force, f"getNum{terms}s")()):
                    *parameters, _ = getattr(force, f"get{terms}Parameters")(k)
                    if parameters[0] in ML_ATOMS:
                        getattr(force, f"set{terms}Parameters")(k, *parameters, 0.0)
        if isinstance(force, openmm.PeriodicTorsionForce):
            for k in range(force.getNumTorsions()):
                *parameters, _ = force.getTorsionParameters(k)
                force.setTorsionParameters(k, *parameters, 0.0)
    without = context_of(system, solvated.positions)
    numbers = np.array([a.element.atomic_number for a in alanine.topology.atoms()])
    energy, forces = model.energy_and_forces(Structure(numbers, solvated.positions[ML_ATOMS] * 10))
    assert energy_of(with_ml) - energy_of(without) == pytest.approx(energy * KJ_PER_MOL_PER_EV, abs=1e-6)
    change = (forces_of(with_ml) - forces_of(without)) / KJ_PER_MOL_NM_PER_EV_ANGSTROM
    np.testing.assert_allclose(change[ML_ATOMS], forces, atol=1e-8)
    np.testing.assert_allclose(change[22:], 0.0, atol=1e-8)


def test_interpolation_end_points(potential: MLPotential, solvated: Box, mixed: openmm.System) -> None:
    system = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS, interpolate=True)
    context = context_of(system, solvated.positions)
    ml, mm = context_of(mixed, solvated.positions), context_of(solvated.system, solvated.positions)
    for value, expected in ((1.0, ml), (0.0, mm)):
        context.setParameter("lambda_interpolate", value)
        # openmm-ml rounds 1/(4 pi eps0) to 9 digits in the difference of the exceptions
        assert energy_of(context) == pytest.approx(energy_of(expected), rel=1e-8)
        np.testing.assert_allclose(forces_of(context), forces_of(expected), rtol=1e-6, atol=1e-4)
    context.setParameter("lambda_interpolate", 0.3)
    assert energy_of(context) == pytest.approx(0.3 * energy_of(ml) + 0.7 * energy_of(mm), rel=1e-8)
    assert abs(energy_of(ml) - energy_of(mm)) > 100


# -- images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS)
def test_molecule_cut_by_the_boundary(potential: MLPotential, solvated: Box, platform: str) -> None:
    whole, cut = through_the_molecule(solvated.positions, solvated.vectors)
    system = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS, forceGroup=1)
    context = context_of(system, whole, platform)
    expected = context.getState(energy=True, forces=True, groups={1})
    # single precision resolves 5e-7 nm at 6 nm; the forces are up to 1e4 kJ/mol/nm
    rel, atol = (1e-5, 5.0) if platform == "OpenCL" else (1e-11, 1e-6)
    for positions in (cut, whole + 3 * solvated.vectors[0] - 2 * solvated.vectors[1]):
        context.setPositions(positions)
        state = context.getState(energy=True, forces=True, groups={1})
        assert state.getPotentialEnergy()._value == pytest.approx(expected.getPotentialEnergy()._value, rel=rel)
        np.testing.assert_allclose(
            state.getForces(asNumpy=True)._value, expected.getForces(asNumpy=True)._value, rtol=1e-5, atol=atol
        )


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("interpolate", [False, True])
def test_positions_wrapped_by_openmm(potential: MLPotential, solvated: Box, platform: str, interpolate: bool) -> None:
    """The whole energy, MM included, for positions as OpenMM's own reporters wrap them."""
    system = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS, interpolate=interpolate)
    whole, _ = through_the_molecule(solvated.positions, solvated.vectors)
    whole += 2.3 * solvated.vectors[0]
    context = context_of(system, whole, platform)
    expected, forces = energy_of(context), forces_of(context)
    wrapped = context.getState(positions=True, enforcePeriodicBox=True).getPositions(asNumpy=True)._value
    assert np.abs(wrapped - whole).max() > 4.0
    context.setPositions(wrapped)
    assert energy_of(context) == pytest.approx(expected, rel=1e-5 if platform == "OpenCL" else 1e-9)
    np.testing.assert_allclose(
        forces_of(context), forces, rtol=1e-4, atol={"Reference": 1e-5, "CPU": 0.05, "OpenCL": 5.0}[platform]
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_triclinic_box(model: SpookyNet, potential: MLPotential, alanine: app.PDBFile, platform: str) -> None:
    """Capped alanine and argon in a skewed box; the molecule's energy is that of the free molecule in every image."""
    vectors = np.array([[2.0, 0, 0], [0.9, 1.9, 0], [-0.8, 0.7, 1.8]])
    topology, argon = app.Topology(), app.Element.getBySymbol("Ar")
    chain = topology.addChain()
    for residue in alanine.topology.residues():
        new = topology.addResidue(residue.name, chain)
        for atom in residue.atoms():
            topology.addAtom(atom.name, atom.element, new)
    topology.addAtom("Ar", argon, topology.addResidue("Ar", chain))
    topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    system = openmm.System()
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    nonbonded.setCutoffDistance(0.8)
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
        nonbonded.addParticle(0.0, 0.3, 0.0)
    system.addForce(nonbonded)
    system.setDefaultPeriodicBoxVectors(*vectors)
    whole = np.array(alanine.positions.value_in_unit(unit.nanometer))
    numbers = np.array([a.element.atomic_number for a in alanine.topology.atoms()])
    energy, forces = model.energy_and_forces(Structure(numbers, whole * 10))
    mixed = potential.createMixedSystem(topology, system, ML_ATOMS)
    rng = np.random.default_rng(5)
    context = context_of(mixed, np.vstack([whole, [[1.0, 1.0, 1.0]]]), platform)
    for images in (np.zeros((22, 3)), rng.integers(-2, 3, (22, 3)), rng.integers(-2, 3, (22, 3))):
        context.setPositions(np.vstack([whole + images @ vectors, [[1.0, 1.0, 1.0]]]))
        tolerance = 1e-9 if platform != "OpenCL" else 1e-5
        assert energy_of(context) == pytest.approx(energy * KJ_PER_MOL_PER_EV, rel=tolerance)
        got = forces_of(context)[ML_ATOMS] / KJ_PER_MOL_NM_PER_EV_ANGSTROM
        np.testing.assert_allclose(got, forces, atol=1e-8 if platform != "OpenCL" else 1e-3)


@pytest.mark.parametrize("platform", ["CPU", "OpenCL"])
def test_positions_stay_right_while_atoms_wrap(potential: MLPotential, solvated: Box, platform: str) -> None:
    """A fast molecule crosses the box; GPU platforms wrap and reorder atoms on the way."""
    system = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS)
    context = context_of(system, solvated.positions, platform, step=1e-6)
    # so fast (nm/ps) that everything crosses the box twice while nothing else happens
    context.setVelocities(np.full_like(solvated.positions, 1.0) * [30e3, 20e3, -25e3])
    context.getIntegrator().step(150)
    state = context.getState(positions=True, energy=True, forces=True)
    positions = state.getPositions(asNumpy=True)._value
    again = context_of(system, positions)
    assert state.getPotentialEnergy()._value == pytest.approx(energy_of(again), rel=2e-5)
    np.testing.assert_allclose(
        np.array(state.getForces(asNumpy=True)._value)[ML_ATOMS], forces_of(again)[ML_ATOMS], rtol=1e-3, atol=5.0
    )


def test_region_wider_than_half_the_box(potential: MLPotential, solvated: Box) -> None:
    """Two waters half a box diagonal apart."""
    distance = np.linalg.norm(solvated.positions[22:] - solvated.positions[0], axis=1)
    first = 22 + 3 * (int(distance.argmax()) // 3)
    far = [22, 23, 24, first, first + 1, first + 2]
    system = potential.createMixedSystem(solvated.topology, solvated.system, far)
    positions = solvated.positions.copy()
    positions[first : first + 3] += positions[22] + 0.5 * solvated.vectors.sum(0) - positions[first]
    context = context_of(system, positions)
    with pytest.raises(openmm.OpenMMException, match=r"the ML region spans 0.5. of the periodic box along box vector"):
        energy_of(context)
    assert isinstance(running.last_error(system), checks.RegionError)


# -- link atoms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolate", [False, True])
def test_link_atom(model: SpookyNet, potential: MLPotential, solvated: Box, interpolate: bool) -> None:
    """Cut at the peptide bond ACE-ALA: the ML region sees a hydrogen on the nitrogen."""
    atoms = list(range(6, 22))
    info = potential.createMixedSystem(
        solvated.topology, solvated.system, atoms, interpolate=interpolate, returnInfo=True
    )
    n = len(solvated.positions)
    assert info["topology"].getNumAtoms() == n + 1
    context = context_of(info["system"], np.vstack([solvated.positions, [[0.0, 0.0, 0.0]]]))
    context.computeVirtualSites()
    positions = context.getState(positions=True).getPositions(asNumpy=True)._value
    distance = np.linalg.norm(positions[n] - positions[6])
    assert distance == pytest.approx(0.103, abs=1e-6)  # covalent radii of N and H
    spec = running.computations(info["system"])[0].spec
    assert spec.atoms == (*atoms, n)
    assert spec.numbers[-1] == 1
    assert [len(m) for m in context.getMolecules() if n in m] == [23]
    energy, forces = energy_of(context), forces_of(context)
    # the ML part: change of the energy with the cap's distance, against the free fragment
    free, _ = model.energy_and_forces(Structure(np.array(spec.numbers), positions[list(spec.atoms)] * 10))
    other = potential.createMixedSystem(
        solvated.topology,
        solvated.system,
        atoms,
        interpolate=interpolate,
        linkAtomDistances=[(6, 1, 0.12)],
    )
    moved = context_of(other, np.vstack([solvated.positions, [[0.0, 0.0, 0.0]]]))
    moved.computeVirtualSites()
    at = moved.getState(positions=True).getPositions(asNumpy=True)._value
    assert np.linalg.norm(at[n] - at[6]) == pytest.approx(0.12, abs=1e-6)
    longer, _ = model.energy_and_forces(Structure(np.array(spec.numbers), at[list(spec.atoms)] * 10))
    assert energy_of(moved) - energy == pytest.approx((longer - free) * KJ_PER_MOL_PER_EV, abs=1e-5)
    # the cap hands its force on to the two atoms that place it
    h = 1e-5
    for i, axis in ((1, 0), (6, 2)):
        difference = 0.0
        for sign in (1, -1):
            shifted = np.vstack([solvated.positions, [[0.0, 0.0, 0.0]]])
            shifted[i, axis] += sign * h
            context.setPositions(shifted)
            context.computeVirtualSites()
            difference += sign * energy_of(context)
        assert -difference / (2 * h) == pytest.approx(forces[i, axis], rel=1e-4, abs=0.05)


# -- molecules and the barostat -----------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolate", [False, True])
def test_molecules_stay_molecules(potential: MLPotential, solvated: Box, interpolate: bool) -> None:
    system = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS, interpolate=interpolate)
    mm = {tuple(m) for m in context_of(solvated.system, solvated.positions).getMolecules()}
    assert {tuple(m) for m in context_of(system, solvated.positions).getMolecules()} == mm
    assert tuple(ML_ATOMS) in mm


def test_molecules_of_a_pure_ml_box(potential: MLPotential, solvated: Box) -> None:
    system = potential.createSystem(solvated.topology, longRangeCutoff=0.9)
    molecules = context_of(system, solvated.positions).getMolecules()
    assert sorted(len(m) for m in molecules) == [3] * (len(molecules) - 1) + [22]


@pytest.mark.parametrize("interpolate", [False, True])
def test_constant_pressure(potential: MLPotential, solvated: Box, interpolate: bool) -> None:
    system = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS, interpolate=interpolate)
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 2)
    barostat.setRandomNumberSeed(3)
    system.addForce(barostat)
    context = context_of(system, solvated.positions, "CPU", step=1e-6)
    before = np.linalg.norm(solvated.positions[ML_ATOMS] - solvated.positions[0], axis=1)
    context.getIntegrator().step(20)
    state = context.getState(positions=True)
    after = state.getPositions(asNumpy=True)._value[ML_ATOMS]
    volume = state.getPeriodicBoxVolume()._value
    assert volume != pytest.approx(np.linalg.det(solvated.vectors), rel=1e-6)
    # the molecule is moved as a whole: its own distances do not scale with the box
    np.testing.assert_allclose(np.linalg.norm(after - after[0], axis=1), before, atol=2e-6)
