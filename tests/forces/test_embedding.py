"""Mixed systems with electrostatic embedding: against mechanical embedding, finite differences, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import checks, running
from openmm_mlff.forces.embedded_force import EmbeddedComputation, EmbeddedSpec
from openmm_mlff.forces.serialization import UnsafeXMLError, load_system, stored_options
from openmm_mlff.forces.surroundings import unpack
from openmm_mlff.potentials import neighbors
from openmm_spookynet import SpookyNet

from .conftest import Box, context_of, energy_of, forces_of, small_spookynet

ML_ATOMS = list(range(22))
METHODS = {
    "NoCutoff": openmm.NonbondedForce.NoCutoff,
    "CutoffNonPeriodic": openmm.NonbondedForce.CutoffNonPeriodic,
    "CutoffPeriodic": openmm.NonbondedForce.CutoffPeriodic,
    "Ewald": openmm.NonbondedForce.Ewald,
    "PME": openmm.NonbondedForce.PME,
    "LJPME": openmm.NonbondedForce.LJPME,
}
INDUCED = {"polarizabilities": {"C": 1.1, "O": 0.7, "N": 0.9, "H": 0.4}, "inductionDamping": 3.0}


@pytest.fixture(scope="module")
def potential(model: SpookyNet) -> MLPotential:
    return MLPotential("spookynet", model=model)


def frozen_charges(numbers: list[int]) -> tuple[MLPotential, np.ndarray]:
    """A potential whose charges depend on the elements only, and these charges (e)."""
    model = small_spookynet(seed=4)
    with torch.no_grad():
        model.output.weight[1] = 0.0
        model.element_bias[1, 1], model.element_bias[6, 1], model.element_bias[8, 1] = 0.31, -0.12, -0.55
    structure = Structure(np.array(numbers), 5.0 * np.random.default_rng(0).normal(size=(len(numbers), 3)))
    charges = model.evaluate(model.batch(structure)).charges
    assert charges is not None
    return MLPotential("spookynet", model=model), charges.numpy()


def nonbonded_of(system: openmm.System) -> openmm.NonbondedForce:
    return next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))


def with_charges(system: openmm.System, atoms: list[int], charges: np.ndarray) -> openmm.System:
    """The system with other charges on some atoms (only what they do to other molecules is right then)."""
    system = openmm.XmlSerializer.clone(system)
    force = nonbonded_of(system)
    for i, charge in zip(atoms, charges, strict=True):
        _, sigma, epsilon = force.getParticleParameters(i)
        force.setParticleParameters(i, float(charge), sigma, epsilon)
    return system


def with_method(system: openmm.System, method: str) -> openmm.System:
    system = openmm.XmlSerializer.clone(system)
    force = nonbonded_of(system)
    force.setNonbondedMethod(METHODS[method])
    force.setUseDispersionCorrection(False)
    return system


@pytest.fixture(scope="module")
def small(alanine: app.PDBFile) -> Box:
    """Capped alanine with 40 waters, no box."""
    field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    modeller = app.Modeller(alanine.topology, alanine.positions)
    modeller.addSolvent(field, model="tip3p", numAdded=40, neutralize=False)
    modeller.topology.setPeriodicBoxVectors(None)
    system = field.createSystem(modeller.topology, nonbondedMethod=app.NoCutoff, removeCMMotion=False)
    return Box(modeller.topology, system, np.array(modeller.positions.value_in_unit(unit.nanometer)))


def slopes(context: openmm.Context, positions: np.ndarray, atoms: list[int], h: float = 1e-6) -> np.ndarray:
    """-dE/dR by central differences, ``(n, 3)`` kJ/mol/nm."""
    found = np.zeros((len(atoms), 3))
    for row, i in enumerate(atoms):
        for axis in range(3):
            for sign in (1, -1):
                moved = positions.copy()
                moved[i, axis] += sign * h
                context.setPositions(moved)
                context.computeVirtualSites()
                found[row, axis] -= sign * energy_of(context) / (2 * h)
    context.setPositions(positions)
    context.computeVirtualSites()
    return found


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_frozen_charges_are_mm_electrostatics(solvated: Box, method: str) -> None:
    """Charges that do not move interact as OpenMM's own do in mechanical embedding, images included."""
    numbers = [a.element.atomic_number for a in solvated.topology.atoms()][:22]
    frozen, charges = frozen_charges(numbers)
    assert abs(charges.sum()) < 1e-12 and np.abs(charges).max() > 0.2
    system = with_charges(with_method(solvated.system, method), ML_ATOMS, charges)
    mechanical = frozen.createMixedSystem(solvated.topology, system, ML_ATOMS)
    embedded = frozen.createMixedSystem(solvated.topology, system, ML_ATOMS, embedding="electrostatic")
    # OpenMM's plain Ewald sum leaves out waves by its tolerance, which the mesh does not
    for platform, tolerance in (("Reference", 1e-4 if method == "Ewald" else 1e-6), ("CPU", 1e-4)):
        first, second = (context_of(s, solvated.positions, platform) for s in (mechanical, embedded))
        assert energy_of(second) == pytest.approx(energy_of(first), rel=tolerance)
        expected = forces_of(first)
        np.testing.assert_allclose(forces_of(second), expected, atol=tolerance * np.abs(expected).max())
    # and the charges do something
    nothing = with_charges(system, ML_ATOMS, np.zeros(22))
    without = context_of(frozen.createMixedSystem(solvated.topology, nothing, ML_ATOMS), solvated.positions)
    assert abs(energy_of(without) - energy_of(context_of(mechanical, solvated.positions))) > 1.0


def test_charges_on_virtual_sites(alanine: app.PDBFile, small: Box) -> None:
    """Four-point water: the site's reaction goes to the atoms that carry it."""
    field = app.ForceField("amber14-all.xml", "amber14/tip4pew.xml")
    modeller = app.Modeller(alanine.topology, alanine.positions)
    modeller.addSolvent(field, model="tip4pew", numAdded=30, neutralize=False)
    modeller.topology.setPeriodicBoxVectors(None)
    system = field.createSystem(modeller.topology, nonbondedMethod=app.NoCutoff, rigidWater=False)
    numbers = [a.element.atomic_number for a in alanine.topology.atoms()]
    frozen, charges = frozen_charges(numbers)
    system = with_charges(system, ML_ATOMS, charges)
    found = []
    sites = [a for a in modeller.topology.atoms() if a.element is None]
    assert len(sites) == 30
    for embedding in ("electrostatic", "mechanical"):
        if embedding == "mechanical":
            # openmm-ml asks every atom for its element
            for atom in sites:
                atom.element = app.element.helium
        mixed = frozen.createMixedSystem(modeller.topology, system, ML_ATOMS, embedding=embedding)
        context = context_of(mixed, np.array(modeller.positions.value_in_unit(unit.nanometer)))
        context.computeVirtualSites()
        found.append((energy_of(context), forces_of(context)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-7)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-6 * np.abs(found[1][1]).max())


def test_without_mm_charges_it_is_mechanical(potential: MLPotential, small: Box) -> None:
    bare = with_charges(small.system, list(range(small.system.getNumParticles())), np.zeros(len(small.positions)))
    force = nonbonded_of(bare)
    for k in range(force.getNumExceptions()):
        i, j, _, sigma, epsilon = force.getExceptionParameters(k)
        force.setExceptionParameters(k, i, j, 0.0, sigma, epsilon)
    for options in ({}, INDUCED):
        embedded = potential.createMixedSystem(small.topology, bare, ML_ATOMS, embedding="electrostatic", **options)
        first = context_of(embedded, small.positions)
        second = context_of(potential.createMixedSystem(small.topology, bare, ML_ATOMS), small.positions)
        assert energy_of(first) == pytest.approx(energy_of(second), abs=1e-8)
        np.testing.assert_allclose(forces_of(first), forces_of(second), atol=1e-7)


def test_energy_is_the_sum_of_its_parts(model: SpookyNet, potential: MLPotential, small: Box) -> None:
    """Against the plain sum over pairs of the model's charges and those of TIP3P."""
    numbers = np.array([a.element.atomic_number for a in small.topology.atoms()])[:22]
    structure = Structure(numbers, small.positions[:22] * 10)
    charges = model.evaluate(model.batch(structure)).charges
    assert charges is not None
    force = nonbonded_of(small.system)
    around = np.array([force.getParticleParameters(i)[0]._value for i in range(22, len(small.positions))])
    r = np.linalg.norm(small.positions[:22, None] - small.positions[None, 22:], axis=-1)
    expected = 138.93545764438198 * float(charges.numpy() @ (1 / r) @ around)
    uncharged = with_charges(small.system, ML_ATOMS, np.zeros(22))
    mechanical = context_of(potential.createMixedSystem(small.topology, uncharged, ML_ATOMS), small.positions)
    embedded = potential.createMixedSystem(small.topology, small.system, ML_ATOMS, embedding="electrostatic")
    context = context_of(embedded, small.positions)
    assert energy_of(context) - energy_of(mechanical) == pytest.approx(expected, rel=1e-7)
    (computation,) = running.computations(embedded)
    assert isinstance(computation, EmbeddedComputation) and computation.charges is not None
    np.testing.assert_allclose(computation.charges, charges.numpy(), atol=1e-10)


# -- forces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {**INDUCED, "dampingLength": 0.1}], ids=["charges", "induced"])
@pytest.mark.parametrize("method", ["NoCutoff", "CutoffPeriodic", "PME"])
def test_forces_are_the_slope_of_the_energy(
    potential: MLPotential, solvated: Box, small: Box, method: str, options: dict[str, object]
) -> None:
    box = small if method == "NoCutoff" else solvated
    system = with_method(box.system, method)
    mixed = potential.createMixedSystem(box.topology, system, ML_ATOMS, embedding="electrostatic", **options)
    context = context_of(mixed, box.positions)
    forces = forces_of(context)
    near = np.linalg.norm(box.positions[22:, None] - box.positions[None, :22], axis=-1).min(1)
    atoms = [2, *(int(i) for i in near.argsort()[:1] + 22), 22 + int(near.argsort()[30])]
    np.testing.assert_allclose(forces[atoms], slopes(context, box.positions, atoms), rtol=1e-4, atol=2e-3)
    net = np.abs(forces.sum(0)).max()
    # a mesh is not quite the same everywhere: as much as in OpenMM alone
    allowed = 1.5 * np.abs(forces_of(context_of(system, box.positions)).sum(0)).max() if method == "PME" else 1e-6
    assert net < allowed < 2.0


def test_energy_does_not_see_the_boundary(potential: MLPotential, solvated: Box) -> None:
    mixed = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS, embedding="electrostatic")
    context = context_of(mixed, solvated.positions)
    expected, forces = energy_of(context), forces_of(context)
    rng = np.random.default_rng(1)
    moved = solvated.positions + 0.9 * solvated.vectors[0] + 0.4 * solvated.vectors[2]
    fractional = moved @ np.linalg.inv(solvated.vectors)
    for positions, exact in (
        # shifted by 0.9 and 0.4 of the box, the mesh of PME is not the same to all digits
        ((fractional - np.floor(fractional)) @ solvated.vectors, False),
        (solvated.positions + rng.integers(-2, 3, size=solvated.positions.shape) @ solvated.vectors, True),
    ):
        context.setPositions(positions)
        assert energy_of(context) == pytest.approx(expected, abs=1e-6 if exact else 0.2)
        np.testing.assert_allclose(forces_of(context), forces, atol=1e-5 if exact else 2.0)


@pytest.mark.parametrize("platform", ["CPU", "OpenCL"])
def test_other_platforms(potential: MLPotential, solvated: Box, platform: str) -> None:
    mixed = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS, embedding="electrostatic")
    expected = context_of(mixed, solvated.positions)
    context = context_of(mixed, solvated.positions, platform)
    assert energy_of(context) == pytest.approx(energy_of(expected), rel=2e-5)
    forces = forces_of(expected)
    np.testing.assert_allclose(forces_of(context), forces, atol=1e-3 * np.abs(forces).max())


# -- interpolation, molecules, pressure ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["NoCutoff", "PME"])
def test_interpolation(potential: MLPotential, solvated: Box, small: Box, method: str) -> None:
    box = small if method == "NoCutoff" else solvated
    kwargs = {"embedding": "electrostatic"}
    mixed = potential.createMixedSystem(box.topology, box.system, ML_ATOMS, **kwargs)
    both = potential.createMixedSystem(box.topology, box.system, ML_ATOMS, interpolate=True, **kwargs)
    context = context_of(both, box.positions)
    ends = [context_of(s, box.positions) for s in (box.system, mixed)]
    for value, expected in zip((0.0, 1.0), ends, strict=True):
        context.setParameter("lambda_interpolate", value)
        assert energy_of(context) == pytest.approx(energy_of(expected), rel=1e-9)
        np.testing.assert_allclose(forces_of(context), forces_of(expected), rtol=1e-6, atol=1e-4)
    context.setParameter("lambda_interpolate", 0.3)
    assert energy_of(context) == pytest.approx(0.7 * energy_of(ends[0]) + 0.3 * energy_of(ends[1]), rel=1e-9)
    if method == "PME":
        molecules = {tuple(m) for m in ends[0].getMolecules()}
        assert {tuple(m) for m in context.getMolecules()} == molecules == {tuple(m) for m in ends[1].getMolecules()}


def test_constant_pressure(potential: MLPotential, solvated: Box) -> None:
    """The energy follows the box that the barostat makes: the same as of a system that starts in it."""
    mixed = potential.createMixedSystem(solvated.topology, solvated.system, ML_ATOMS, embedding="electrostatic")
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 1)
    barostat.setRandomNumberSeed(3)
    mixed.addForce(barostat)
    context = context_of(mixed, solvated.positions, "CPU", step=1e-6)
    context.getIntegrator().step(8)
    state = context.getState(positions=True, energy=True)
    box = state.getPeriodicBoxVectors(asNumpy=True)._value
    assert np.abs(np.diag(box) / np.diag(solvated.vectors) - 1.0).max() > 1e-4
    fresh = context_of(mixed, solvated.positions)
    fresh.setPeriodicBoxVectors(*box)
    fresh.setPositions(state.getPositions())
    assert energy_of(fresh) == pytest.approx(state.getPotentialEnergy()._value, rel=2e-5)


# -- link atoms ------------------------------------------------------------------------------------------------------

LINKED = list(range(6, 16))  # ALA of ACE-ALA-NME: two cut peptide bonds
HOSTS = {1: [0, 2], 16: [17, 18]}


def test_link_atoms(potential: MLPotential, solvated: Box) -> None:
    def make(**options: object) -> dict[str, Any]:
        return potential.createMixedSystem(solvated.topology, solvated.system, LINKED, returnInfo=True, **options)

    info, mechanical = make(embedding="electrostatic"), make()
    n = len(solvated.positions)
    assert info["system"].getNumParticles() == info["topology"].getNumAtoms() == n + 2
    assert info["oldToNew"] == list(range(n))
    placed = []
    for system in (info["system"], mechanical["system"]):
        context = context_of(system, np.vstack([solvated.positions, np.zeros((2, 3))]))
        context.computeVirtualSites()
        placed.append(np.array(context.getState(positions=True).getPositions(asNumpy=True)._value))
    np.testing.assert_array_equal(*placed)
    context = context_of(info["system"], placed[0])
    forces = forces_of(context)
    atoms = [6, 1, 40]
    np.testing.assert_allclose(forces[atoms], slopes(context, placed[0], atoms), rtol=1e-4, atol=5e-3)
    between = context_of(make(embedding="electrostatic", interpolate=True)["system"], placed[0])
    assert energy_of(between) == pytest.approx(energy_of(context), rel=1e-9)
    np.testing.assert_allclose(forces_of(between), forces, atol=1e-6 * np.abs(forces).max())


@pytest.mark.parametrize("scheme", ["redistribute", "delete", "keep"])
def test_charges_at_cut_bonds(potential: MLPotential, solvated: Box, scheme: str) -> None:
    mixed = potential.createMixedSystem(
        solvated.topology, solvated.system, LINKED, embedding="electrostatic", boundaryCharges=scheme
    )
    (options,) = {o for f in mixed.getForces() for o in stored_options(f)}
    spec = EmbeddedSpec.from_json(options)
    assert spec.region.atoms == (*LINKED, len(solvated.positions), len(solvated.positions) + 1)
    felt = unpack(spec.surroundings.charges, spec.surroundings.n_particles)
    force = nonbonded_of(solvated.system)
    before = np.array([force.getParticleParameters(i)[0]._value for i in range(force.getNumParticles())])
    assert felt[LINKED].sum() == pytest.approx(0.0, abs=1e-12)
    near = [i for host, others in HOSTS.items() for i in (host, *others)]
    far = np.setdiff1d(np.arange(len(before)), [*near, *LINKED])
    np.testing.assert_array_equal(felt[far], before[far])
    if scheme == "keep":
        np.testing.assert_array_equal(felt[near], before[near])
    else:
        np.testing.assert_array_equal(felt[list(HOSTS)], 0.0)
    if scheme == "redistribute":
        # what the region lost by getting a whole charge stays in the system
        assert felt.sum() == pytest.approx(before.sum(), abs=1e-9)
        for host, others in HOSTS.items():
            moved = felt[others] - before[others]
            assert moved[0] == pytest.approx(moved[1]) and abs(moved.sum() - before[host]) < 0.2
    # the MM atoms keep their charges among themselves
    kept = nonbonded_of(mixed)
    assert [kept.getParticleParameters(i)[0]._value for i in near] == [before[i] for i in near]


# -- storing, resuming -----------------------------------------------------------------------------------------------

FRESH = """
import json, sys
import numpy as np, openmm
from openmm_mlff.forces.serialization import load_system
system = load_system(sys.argv[1])
context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
context.setPositions(np.load(sys.argv[2]))
state = context.getState(energy=True, forces=True)
forces = state.getForces(asNumpy=True)._value
print("RESULT", json.dumps([state.getPotentialEnergy()._value, forces.tolist()]))
"""


def test_xml_in_a_fresh_process(potential: MLPotential, small: Box, tmp_path: Path) -> None:
    mixed = potential.createMixedSystem(
        small.topology, small.system, ML_ATOMS, embedding="electrostatic", interpolate=True, **INDUCED
    )
    text = openmm.XmlSerializer.serialize(mixed)
    (tmp_path / "system.xml").write_text(text, encoding="utf-8")
    np.save(tmp_path / "positions.npy", small.positions)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "system.xml", tmp_path / "positions.npy"],
        env=os.environ, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    assert "RESULT" in done.stdout, done.stderr
    energy, forces = json.loads(done.stdout.rpartition("RESULT")[2])
    context = context_of(mixed, small.positions)
    assert energy == pytest.approx(energy_of(context), abs=1e-7)
    np.testing.assert_allclose(forces, forces_of(context), atol=1e-6)


def test_tampered_xml(potential: MLPotential, small: Box) -> None:
    mixed = potential.createMixedSystem(small.topology, small.system, ML_ATOMS, embedding="electrostatic")
    (options,) = {o for f in mixed.getForces() for o in stored_options(f)}
    text = openmm.XmlSerializer.serialize(mixed)
    assert options.encode().hex() in text
    spec = json.loads(options)
    for change in (
        {**spec, "version": 99},
        {**spec, "surroundings": {**spec["surroundings"], "n_particles": 10**9}},
        {**spec, "region": {**spec["region"], "atoms": [*range(21), 10**6]}},
        {**spec, "more": 1, "surroundings": {**spec["surroundings"], "more": 1}},
    ):
        changed = json.dumps(change).ljust(len(options))
        # a pickled text starts with its length
        old, new = ((t.encode().hex(), len(t).to_bytes(4, "little").hex()) for t in (options, changed))
        tampered = text.replace(old[1] + old[0], new[1] + new[0])
        assert tampered != text
        with pytest.raises(UnsafeXMLError):
            load_system(tampered)


@pytest.mark.parametrize("listed", [False, True], ids=["all pairs", "pair lists"])
def test_runs_resume_bit_for_bit(
    potential: MLPotential, solvated: Box, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pair lists of the first run, in a force that was not called before."""
    if listed:
        monkeypatch.setattr(neighbors, "FIXED_PAIRS_MAX_ATOMS", 10)
    mixed = potential.createMixedSystem(
        solvated.topology, solvated.system, ML_ATOMS, embedding="electrostatic", precision="single"
    )
    context = context_of(mixed, solvated.positions)
    context.getIntegrator().step(3)
    lists, checkpoint = running.pair_list_state(mixed), context.createCheckpoint()
    # the region is open: no box belongs to its lists
    assert [sorted(state) for state in lists] == [["positions"] if listed else []]
    context.getIntegrator().step(3)
    expected = context.getState(positions=True).getPositions(asNumpy=True)._value
    again = context_of(openmm.XmlSerializer.clone(mixed), solvated.positions)
    again.loadCheckpoint(checkpoint)
    running.restore_pair_lists(mixed, lists)
    again.getIntegrator().step(3)
    np.testing.assert_array_equal(again.getState(positions=True).getPositions(asNumpy=True)._value, expected)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_broken_positions(potential: MLPotential, small: Box) -> None:
    mixed = potential.createMixedSystem(small.topology, small.system, ML_ATOMS, embedding="electrostatic")
    context = context_of(mixed, small.positions)
    for i, name in ((3, "atom 3 (H)"), (50, "particle 50")):
        broken = small.positions.copy()
        broken[i] = np.nan
        context.setPositions(broken)
        with pytest.raises(openmm.OpenMMException, match="positions"):
            energy_of(context)
        error = running.last_error(mixed)
        assert isinstance(error, checks.InstabilityError) and error.atom == i and name in str(error)
    close = small.positions.copy()
    close[30] = close[4] + 1e-9
    context.setPositions(close)
    with pytest.raises(openmm.OpenMMException, match="unstable"):
        energy_of(context)
    error = running.last_error(mixed)
    assert isinstance(error, checks.InstabilityError) and error.atom in (4, 30)


def test_arguments(potential: MLPotential, solvated: Box, small: Box) -> None:
    def make(system: openmm.System | None = None, atoms: list[int] = ML_ATOMS, **options: object) -> openmm.System:
        return potential.createMixedSystem(
            small.topology, system or small.system, atoms, embedding="electrostatic", **options
        )

    for options, message in (
        ({"dampingLength": -0.1}, "dampingLength: expected a length"),
        ({"dampingLength": "far"}, "dampingLength: expected a length"),
        ({"dampingLength": 1.0 * unit.kilojoule_per_mole}, "dampingLength: expected a length"),
        ({"linkAtomDistances": [(0, 1, 0.1)]}, "linkAtomDistances: expected cut bonds, got .0, 1."),
        ({"linkAtomDistances": [(0, 1)]}, r"linkAtomDistances: expected \[\(i, j, distance\), ...\]"),
        ({"linkAtomDistances": [(0, 1, -0.1)]}, r"linkAtomDistances: expected \[\(i, j, distance\), ...\]"),
        ({"polarizabilities": {"Xx": 1.0}}, "polarizabilities: expected symbols of elements, got 'Xx'"),
        ({"polarizabilities": [1.0] * 21}, "polarizabilities: expected one for each of the 22 ML atoms, got 21"),
        ({"polarizabilities": 1.0}, "polarizabilities: expected angstrom"),
        ({"inductionDamping": float("nan")}, "inductionDamping"),
        ({"boundaryCharges": "smear"}, "boundaryCharges: expected one of redistribute, delete, keep"),
        ({"mlLongRange": True}, "mlLongRange: not a keyword"),
        ({"dampinglength": 0.1}, "did you mean 'dampingLength'"),
        ({"spin": 2}, "multiplicity"),
        ({"charge": 1}, "charge: the ML atoms carry .0.000 e"),
        ({"charge": 0.5}, "charge: expected a whole number, got 0.5"),
        ({"multiplicity": 2}, "multiplicity"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make(**options)
    with pytest.raises(ValueError, match="particles"):
        make(solvated.system)
    with pytest.raises(ValueError, match="more than once"):
        make(atoms=[0, 0])
    with pytest.raises(ValueError, match=r"linkAtomDistances: expected cut bonds, got .0, 5."):
        make(atoms=LINKED, linkAtomDistances=[(0, 5, 0.1)])
    with pytest.raises(ValueError, match="bonds to two ML atoms"):
        make(atoms=[3, 4, 5])
    scaled = with_charges(small.system, ML_ATOMS, np.full(22, 0.02))
    with pytest.warns(UserWarning, match="carry .0.440 e"):
        make(scaled)


def test_force_fields_that_are_refused(potential: MLPotential, small: Box) -> None:
    def refused(change: object, message: str) -> None:
        system = openmm.XmlSerializer.clone(small.system)
        change(system)  # type: ignore[operator]
        with pytest.raises(ValueError, match=message):
            potential.createMixedSystem(small.topology, system, ML_ATOMS, embedding="electrostatic")

    def extra(force: openmm.Force) -> object:
        return lambda system: system.addForce(force)

    def without(system: openmm.System) -> None:
        system.removeForce([isinstance(f, openmm.NonbondedForce) for f in system.getForces()].index(True))

    def offset(system: openmm.System) -> None:
        force = nonbonded_of(system)
        force.addGlobalParameter("scale", 1.0)
        force.addParticleParameterOffset("scale", 30, 0.1, 0.0, 0.0)

    charged = openmm.CustomNonbondedForce("charge1*charge2/r")
    charged.addPerParticleParameter("charge")
    refused(extra(openmm.GBSAOBCForce()), "GBSAOBCForce")
    refused(extra(openmm.CustomGBForce()), "CustomGBForce")
    refused(extra(openmm.AmoebaMultipoleForce()), "AmoebaMultipoleForce")
    refused(extra(openmm.DrudeForce()), "DrudeForce")
    refused(extra(openmm.NonbondedForce()), "expected one NonbondedForce, got 2")
    refused(extra(charged), "CustomNonbondedForce with parameter 'charge'")
    refused(without, "expected one NonbondedForce, got 0")
    refused(offset, "global parameter")
    for interpolate in (False, True):
        mixed = potential.createMixedSystem(
            small.topology, small.system, ML_ATOMS, embedding="electrostatic", interpolate=interpolate
        )
        with pytest.raises(ValueError, match=r"already|expected one NonbondedForce"):
            potential.createMixedSystem(small.topology, mixed, ML_ATOMS, embedding="electrostatic")


def test_potentials_without_charges_do_not_offer_it(small: Box, model: SpookyNet) -> None:
    class Mute(SpookyNet):
        predicts_charges = False

    mute = MLPotential("spookynet", model=model)
    mute._impl._predicts_charges = False
    assert mute.getSupportedEmbeddings() == ["mechanical"]
    with pytest.raises(ValueError, match="needs a potential that predicts charges"):
        mute.createMixedSystem(small.topology, small.system, ML_ATOMS, embedding="electrostatic")
    with pytest.raises(KeyError, match="'electrostatics' is not known; every potential offers 'mechanical'"):
        mute.createMixedSystem(small.topology, small.system, ML_ATOMS, embedding="electrostatics")


def test_lennard_jones_and_bonded_terms_are_those_of_mechanical_embedding(potential: MLPotential, small: Box) -> None:
    mechanical = potential.createMixedSystem(small.topology, small.system, ML_ATOMS)
    embedded = potential.createMixedSystem(small.topology, small.system, ML_ATOMS, embedding="electrostatic")
    for kind, count in (("HarmonicBond", "Bond"), ("HarmonicAngle", "Angle"), ("PeriodicTorsion", "Torsion")):
        numbers = [
            [getattr(f, f"getNum{count}s")() for f in s.getForces() if type(f).__name__ == f"{kind}Force"]
            for s in (mechanical, embedded)
        ]
        assert numbers[0] == numbers[1]
    first, second = nonbonded_of(mechanical), nonbonded_of(embedded)
    for i in range(first.getNumParticles()):
        assert first.getParticleParameters(i)[1:] == second.getParticleParameters(i)[1:]
    assert mechanical.getNumConstraints() == embedded.getNumConstraints()
