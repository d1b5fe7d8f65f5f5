"""Resumed runs, several Contexts, and what a running simulation can be asked."""

from __future__ import annotations

import threading

import numpy as np
import openmm
import pytest
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import running
from openmm_mlff.units import KJ_PER_MOL_PER_EV
from openmm_spookynet import SpookyNet

from .conftest import Box, context_of, energy_of, forces_of, small_spookynet, topology_of


@pytest.fixture(scope="module")
def cluster(solvated: Box) -> tuple[np.ndarray, np.ndarray]:
    """Capped alanine with its eight nearest waters: numbers and positions ``(46, 3)`` in nm, more than 32 atoms."""
    oxygens = solvated.positions[22::3]
    distance = np.linalg.norm(oxygens[:, None] - solvated.positions[None, :22], axis=-1).min(1)
    first = 22 + 3 * np.argsort(distance)[:8]
    atoms = [*range(22), *(i + k for i in first for k in range(3))]
    elements = [a.element.atomic_number for a in solvated.topology.atoms()]
    return np.array([elements[i] for i in atoms]), solvated.positions[atoms]


@pytest.fixture(scope="module")
def system(cluster: tuple[np.ndarray, np.ndarray]) -> openmm.System:
    model = small_spookynet(seed=4).float()
    system = MLPotential("spookynet", model=model).createSystem(topology_of(cluster[0]), removeCMMotion=False)
    # a random network binds nothing: springs keep the atoms within about 0.3 angstrom
    springs = openmm.CustomExternalForce("5e5*((x-x0)^2 + (y-y0)^2 + (z-z0)^2)")
    for name in ("x0", "y0", "z0"):
        springs.addPerParticleParameter(name)
    for i, place in enumerate(cluster[1]):
        springs.addParticle(i, place)
    system.addForce(springs)
    return system


def langevin(system: openmm.System) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.0005)
    integrator.setRandomNumberSeed(7)
    return openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))


def test_resumed_run_is_the_same_bit_for_bit(system: openmm.System, cluster: tuple[np.ndarray, np.ndarray]) -> None:
    context = langevin(system)
    context.setPositions(cluster[1])
    context.setVelocitiesToTemperature(300.0, 5)
    context.getIntegrator().step(150)
    checkpoint, lists = context.createCheckpoint(), running.pair_list_state(system)
    # the list in use was not built where the checkpoint was taken
    at = context.getState(positions=True).getPositions(asNumpy=True)._value * 10
    (saved,) = lists
    assert saved["positions"].shape == at.shape
    assert not np.array_equal(saved["positions"], at)
    context.getIntegrator().step(150)
    expected = context.getState(positions=True, velocities=True)

    fresh = openmm.XmlSerializer.clone(system)
    again = langevin(fresh)
    again.loadCheckpoint(checkpoint)
    running.restore_pair_lists(fresh, lists)
    np.testing.assert_array_equal(running.pair_list_state(fresh)[0]["positions"], saved["positions"])
    again.getIntegrator().step(150)
    got = again.getState(positions=True, velocities=True)
    for part in ("getPositions", "getVelocities"):
        np.testing.assert_array_equal(
            getattr(got, part)(asNumpy=True)._value, getattr(expected, part)(asNumpy=True)._value
        )


def test_periodic_pair_lists_are_restored_with_their_box(model: SpookyNet) -> None:
    numbers = np.array([8, 1, 1] * 4)
    rng = np.random.default_rng(2)
    water = np.array([[0.0, 0.0, 0.0], [0.0757, 0.0586, 0.0], [-0.0757, 0.0586, 0.0]])
    positions = np.concatenate(
        [water + shift for shift in 0.5 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])]
    )
    box = np.diag([1.0, 1.1, 1.2])
    system = MLPotential("spookynet", model=model).createSystem(topology_of(numbers, box), longRangeCutoff=0.8)
    context = context_of(system, positions)
    energy_of(context)
    context.setPositions(positions + rng.normal(scale=0.001, size=positions.shape))
    expected = energy_of(context)
    lists = running.pair_list_state(system)
    np.testing.assert_allclose(lists[0]["cell"], box * 10)
    np.testing.assert_allclose(lists[0]["positions"], positions * 10)
    fresh = openmm.XmlSerializer.clone(system)
    again = context_of(fresh, context.getState(positions=True).getPositions(asNumpy=True)._value)
    running.restore_pair_lists(fresh, lists)
    assert energy_of(again) == expected
    np.testing.assert_allclose(running.pair_list_state(fresh)[0]["positions"], positions * 10)


def test_pair_lists_of_another_system(system: openmm.System) -> None:
    with pytest.raises(ValueError, match="expected the pair lists of 1 ML forces, got 2"):
        running.restore_pair_lists(system, [{}, {}])


def test_small_molecules_keep_no_list(model: SpookyNet) -> None:
    system = MLPotential("spookynet", model=model).createSystem(topology_of(np.array([8, 1])), charge=-1)
    energy_of(context_of(system, np.array([[0.0, 0, 0], [0.1, 0, 0]])))
    assert running.pair_list_state(system) == [{}]
    running.restore_pair_lists(system, [{}])


def test_two_contexts_of_one_system(system: openmm.System, cluster: tuple[np.ndarray, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    places = [cluster[1], cluster[1] + rng.normal(scale=0.02, size=cluster[1].shape)]
    alone = [energy_of(context_of(openmm.XmlSerializer.clone(system), p)) for p in places]
    contexts = [context_of(system, p) for p in places]
    for _ in range(2):
        for context, expected in zip(contexts, alone, strict=True):
            assert energy_of(context) == pytest.approx(expected, rel=1e-6)
    assert alone[0] != pytest.approx(alone[1], rel=1e-4)


def test_two_contexts_in_two_threads(system: openmm.System, cluster: tuple[np.ndarray, np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    contexts = [context_of(system, cluster[1] + rng.normal(scale=0.02, size=cluster[1].shape)) for _ in range(2)]
    expected = [energy_of(c) for c in contexts]
    found: list[list[float]] = [[], []]

    def work(k: int) -> None:
        for _ in range(5):
            found[k].append(energy_of(contexts[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert found[k] == pytest.approx([expected[k]] * 5, rel=1e-6)


def test_errors_inside_an_interpolated_system(alanine: app.PDBFile, model: SpookyNet) -> None:
    """CustomCVForce copies the ML force for each Context; its error is found all the same."""
    field = app.ForceField("amber14-all.xml")
    mm = field.createSystem(alanine.topology)
    system = MLPotential("spookynet", model=model).createMixedSystem(
        alanine.topology, mm, list(range(22)), interpolate=True
    )
    positions = np.array(alanine.positions.value_in_unit(unit.nanometer))
    context = context_of(system, positions)
    energy = energy_of(context)
    numbers = np.array([a.element.atomic_number for a in alanine.topology.atoms()])
    free, _ = model.energy_and_forces(Structure(numbers, positions * 10))
    assert energy == pytest.approx(free * KJ_PER_MOL_PER_EV, rel=1e-8)
    assert running.last_error(system) is None
    positions[4] = positions[3]
    context.setPositions(positions)
    with pytest.raises(openmm.OpenMMException, match=r"atom 3 \(H\) and atom 4 \(H\) are at the same place"):
        energy_of(context)
    error = running.last_error(system)
    assert error is not None
    assert "at the same place" in str(error)


def test_minimisation_with_the_published_model(shared: object, alanine: app.PDBFile) -> None:
    path = shared / "models" / "spookynet_parameters.pth"  # type: ignore[operator]
    system = MLPotential("spookynet", modelPath=path).createSystem(alanine.topology)
    context = context_of(system, np.array(alanine.positions.value_in_unit(unit.nanometer)))
    before = np.abs(forces_of(context)).max()
    openmm.LocalEnergyMinimizer.minimize(context, tolerance=50.0, maxIterations=30)
    assert np.abs(forces_of(context)).max() < 0.2 * before
