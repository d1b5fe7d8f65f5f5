"""Many copies in one System against as many Systems of one copy."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.forces import running
from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.python_force import ForceComputation
from openmm_mlff.forces.serialization import load_system, stored_options
from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.sampling.replicate import replicate_topology

from .copies import Molecule, N, agrees, one_by_one, reference, spread

# -- the machine-learned force --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1, 2, N])
def test_learned_energies_and_forces(learned: MLPotential, molecule: Molecule, batch: int | None) -> None:
    single = learned.createSystem(molecule.topology, compile=False, precision="double")
    positions = spread(molecule)
    replicas = Replicas(single, molecule.topology, N, batch)
    context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
    replicas.set_positions(context, positions)
    energies, forces = one_by_one(single, positions)
    frame = replicas.frame(context)
    np.testing.assert_allclose(frame.potential, energies, rtol=1e-12)
    np.testing.assert_allclose(frame.forces, forces, rtol=0, atol=1e-8)


def test_one_evaluation_per_step(system: openmm.System, molecule: Molecule, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = ForceComputation._evaluate

    def counted(self: ForceComputation, state: Any) -> Any:
        calls.append(self.spec.replicas)
        return original(self, state)

    monkeypatch.setattr(ForceComputation, "_evaluate", counted)
    replicas = Replicas(system, molecule.topology, N)
    context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
    replicas.set_positions(context, spread(molecule))
    context.getIntegrator().step(4)
    assert calls == [N] * 4
    replicas.frame(context)
    assert calls == [N] * 5


def test_part_of_a_molecule(learned: MLPotential, molecule: Molecule) -> None:
    """A machine-learned region in a force-field surrounding, in an order of its own."""
    field = app.ForceField("amber99sbildn.xml").createSystem(molecule.topology, nonbondedMethod=app.NoCutoff)
    names = [a.residue.name for a in molecule.topology.atoms()]
    region = [i for i, name in enumerate(names) if name == "ALA"]
    single = learned.createMixedSystem(molecule.topology, field, region, compile=False, precision="double")
    # link atoms are virtual sites behind the molecule's own atoms
    extra = single.getNumParticles() - len(names)
    topology = molecule.topology
    if extra:
        info = learned.createMixedSystem(
            molecule.topology, field, region, compile=False, precision="double", returnInfo=True
        )
        single, topology = info["system"], info["topology"]
    positions = np.concatenate([spread(molecule), np.zeros((N, extra, 3))], axis=1)
    context = reference(single)
    for k in range(N):
        context.setPositions(positions[k])
        context.computeVirtualSites()
        positions[k] = context.getState(positions=True).getPositions(asNumpy=True)._value
    assert extra == 2
    agrees(single, topology, positions, 1e-8)


def test_whole_periodic_systems(learned: MLPotential, molecule: Molecule) -> None:
    """Copies of a periodic system share one box; positions in any image."""
    topology = replicate_topology(molecule.topology, 1)
    topology.setPeriodicBoxVectors(np.diag([1.6, 1.5, 1.7]) * unit.nanometer)
    single = learned.createSystem(topology, compile=False, precision="double", longRangeCutoff=0.7)
    agrees(single, topology, spread(molecule) + 0.9, 1e-8)


def test_pickle_and_xml(system: openmm.System, molecule: Molecule) -> None:
    replicas = Replicas(system, molecule.topology, N)
    positions = spread(molecule)
    before = reference(replicas.system)
    before.setPositions(positions.reshape(-1, 3))
    again = load_system(openmm.XmlSerializer.serialize(replicas.system))
    after = reference(again)
    after.setPositions(positions.reshape(-1, 3))
    energies = [c.getState(energy=True).getPotentialEnergy()._value for c in (before, after)]
    assert energies[0] == energies[1]
    options = stored_options(next(f for f in again.getForces() if isinstance(f, openmm.PythonForce))).pop()
    assert ForceSpec.from_json(options).replicas == N
    computation = pickle.loads(pickle.dumps(ForceComputation(options)))
    assert computation.spec == ForceSpec.from_json(options)


def test_a_single_copy_is_stored_as_before() -> None:
    assert '"version":1' in ForceSpec("0" * 64, "spookynet", (1, 1)).to_json()
    assert "replicas" not in ForceSpec("0" * 64, "spookynet", (1, 1)).to_json()
    assert '"version":2' in ForceSpec("0" * 64, "spookynet", (1, 1), replicas=2).to_json()


def test_pair_lists_of_a_checkpoint(system: openmm.System, molecule: Molecule) -> None:
    """Molecules too large for fixed lists: a restored list is the old one, batch by batch."""
    many = replicate_topology(molecule.topology, 2)
    atoms = [np.concatenate([x, x + np.array([0, 0, 1.0])]) for x in spread(molecule)]
    options = stored_options(next(f for f in system.getForces() if isinstance(f, openmm.PythonForce))).pop()
    single = ForceSpec.from_json(options)
    learned = MLPotential("spookynet", modelPath=single.path).createSystem(many, compile=False)
    replicas = Replicas(learned, many, N, batch=2)
    context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
    replicas.set_positions(context, np.array(atoms))
    context.getState(energy=True)
    saved = running.pair_list_state(replicas.system)
    np.testing.assert_array_equal(saved[0]["positions"], np.array(atoms).reshape(-1, 3) * 10)
    moved = np.array(atoms) + 0.003
    replicas.set_positions(context, moved)
    context.getState(energy=True)
    running.restore_pair_lists(replicas.system, saved)
    restored = running.pair_list_state(replicas.system)
    np.testing.assert_array_equal(restored[0]["positions"], saved[0]["positions"])


# -- dynamics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraints", [None, app.HBonds])
def test_deterministic_trajectories_are_the_single_ones(
    learned: MLPotential, molecule: Molecule, constraints: object
) -> None:
    """Verlet: every copy follows the trajectory that it follows alone, and has its energies on the way."""
    field = app.ForceField("amber99sbildn.xml")
    single = field.createSystem(molecule.topology, nonbondedMethod=app.NoCutoff, constraints=constraints)
    machine = learned.createSystem(molecule.topology, compile=False, precision="double", removeCMMotion=False)
    single.addForce(openmm.XmlSerializer.clone(machine.getForce(0)))
    single.removeForce(next(i for i, f in enumerate(single.getForces()) if isinstance(f, openmm.CMMotionRemover)))
    n, steps = 3, 40
    replicas = Replicas(single, molecule.topology, n)
    # constraints are solved by iteration, for all copies as long as the slowest needs
    integrator = openmm.VerletIntegrator(0.0005)
    integrator.setConstraintTolerance(1e-11)
    context = replicas.context(integrator, "Reference")
    replicas.set_positions(context, spread(molecule, n))
    context.applyConstraints(1e-11)
    replicas.set_velocities(context, 300.0, seeds=7)
    start = replicas.frame(context)
    context.getIntegrator().step(steps)
    end = replicas.frame(context)
    assert np.abs(end.positions - start.positions).max() > 0.01
    for k in range(n):
        alone = reference(single)
        alone.getIntegrator().setConstraintTolerance(1e-11)
        alone.setPositions(start.positions[k])
        alone.setVelocities(start.velocities[k])
        state = alone.getState(energy=True)
        assert start.kinetic[k] == pytest.approx(state.getKineticEnergy()._value, rel=1e-6)
        alone.getIntegrator().step(steps)
        state = alone.getState(positions=True, velocities=True, energy=True)
        np.testing.assert_allclose(end.positions[k], state.getPositions(asNumpy=True)._value, rtol=0, atol=1e-8)
        np.testing.assert_allclose(end.velocities[k], state.getVelocities(asNumpy=True)._value, rtol=0, atol=1e-5)
        assert end.potential[k] == pytest.approx(state.getPotentialEnergy()._value, rel=1e-7)
        assert end.kinetic[k] == pytest.approx(state.getKineticEnergy()._value, rel=1e-6)


@pytest.mark.parametrize("kind", ["LangevinMiddle", "Langevin", "NoseHoover", "VariableVerlet", "VariableLangevin"])
def test_kinetic_energies_add_up(system: openmm.System, molecule: Molecule, kind: str) -> None:
    made = getattr(openmm, f"{kind}Integrator")
    arguments = {"VariableVerlet": (1e-5,), "VariableLangevin": (300, 1, 1e-5)}.get(kind, (300, 1, 0.0005))
    system.addConstraint(0, 3, 0.11)
    replicas = Replicas(system, molecule.topology, N)
    context = replicas.context(made(*arguments), "Reference")
    replicas.set_positions(context, molecule.positions)
    context.applyConstraints(1e-8)
    replicas.set_velocities(context, 300.0, seeds=1)
    context.getIntegrator().step(3)
    total = context.getState(energy=True).getKineticEnergy()._value
    assert replicas.kinetic_energies(context).sum() == pytest.approx(total, rel=1e-6)


def test_velocities_belong_to_the_replica(system: openmm.System, molecule: Molecule) -> None:
    found = {}
    for n in (3, 60):
        replicas = Replicas(system, molecule.topology, n)
        context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
        replicas.set_positions(context, molecule.positions)
        replicas.set_velocities(context, 250.0, seeds=5)
        found[n] = replicas.split(context.getState(velocities=True).getVelocities(asNumpy=True)._value)
    np.testing.assert_array_equal(found[3], found[60][:3])
    # 60 copies of 66 degrees of freedom: the mean temperature has a relative error of sqrt(2 / 3960)
    energy = 0.5 * np.einsum("a,kax,kax->k", replicas.masses, found[60], found[60])
    temperature = 2 * energy.mean() / (66 * 8.31446261815324e-3)
    assert temperature == pytest.approx(250.0, abs=4 * 250 * np.sqrt(2 / 3960))
    with pytest.raises(ValueError, match="seeds: expected one number, or one for each of 60"):
        replicas.set_velocities(context, 300.0, seeds=[1, 2])


def test_minimise(molecule: Molecule) -> None:
    field = app.ForceField("amber99sbildn.xml")
    single = field.createSystem(molecule.topology, nonbondedMethod=app.NoCutoff, removeCMMotion=False)
    replicas = Replicas(single, molecule.topology, N)
    context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
    replicas.set_positions(context, spread(molecule))
    before = replicas.potential_energies(context)
    after = replicas.minimize(context, tolerance=5.0)
    assert (after < before).all()
    forces = replicas.frame(context).forces
    assert np.sqrt((forces**2).mean(axis=(1, 2))).max() <= 5.0


def test_bad_input(system: openmm.System, molecule: Molecule) -> None:
    replicas = Replicas(system, molecule.topology, N)
    context = replicas.context(openmm.VerletIntegrator(0.0005))
    with pytest.raises(ValueError, match=r"positions: expected shape \(5, 22, 3\) or \(22, 3\)"):
        replicas.set_positions(context, np.zeros((4, 22, 3)))
    broken = spread(molecule)
    broken[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match="replica 3"):
        replicas.set_positions(context, broken)
    with pytest.raises(ValueError, match="topology: expected 22 atoms"):
        Replicas(system, replicate_topology(molecule.topology, 2), N)


def test_a_broken_replica_is_named(system: openmm.System, molecule: Molecule) -> None:
    replicas = Replicas(system, molecule.topology, N)
    context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
    positions = spread(molecule)
    positions[2, 8] = positions[2, 4]
    replicas.set_positions(context, positions)
    with pytest.raises(openmm.OpenMMException, match=r"replica 2 and atom . .* of replica 2 are at the same place"):
        context.getState(energy=True)
    error = running.last_error(replicas.system)
    assert (error.replica, error.atom) in ((2, 48), (2, 52))  # type: ignore[union-attr]
    # atoms of different replicas may be where they like
    positions = spread(molecule)
    positions[2] = positions[1]
    replicas.set_positions(context, positions)
    energies = replicas.potential_energies(context)
    assert energies[1] == pytest.approx(energies[2], rel=1e-6)


def test_torch_threads_are_left_alone(system: openmm.System, molecule: Molecule) -> None:
    before = torch.get_num_threads()
    replicas = Replicas(system, molecule.topology, 12)
    context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
    replicas.set_positions(context, molecule.positions)
    context.getIntegrator().step(2)
    assert torch.get_num_threads() == before
