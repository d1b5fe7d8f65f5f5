"""The wall between a chiral centre and its mirror image."""

from __future__ import annotations

import copy

import numpy as np
import openmm
import pytest

from openmm_mlff.forces.handedness import handedness_wall

CENTRE = np.array([[0.0, 0.0, 0.3], [1.4, 0.0, 0.0], [-0.7, 1.2, 0.0], [-0.7, -1.2, 0.0]])


def frames(n: int, seed: int = 0) -> np.ndarray:
    positions = CENTRE + np.random.default_rng(seed).normal(scale=0.03, size=(n, 4, 3))
    assert (positions[:, 0, 2] > positions[:, 1:, 2].max(axis=1)).all()
    return positions


def energies(force: openmm.Force, positions: np.ndarray) -> np.ndarray:
    system = openmm.System()
    for _ in range(4):
        system.addParticle(12.0)
    system.addForce(copy.deepcopy(force))
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    found = []
    for x in positions:
        context.setPositions(x * 0.1)
        found.append(context.getState(energy=True).getPotentialEnergy()._value / 96.48533212)
    return np.array(found)


def test_the_data_do_not_feel_it_and_the_mirror_image_does() -> None:
    data = frames(200)
    wall = handedness_wall(data, (0, 1, 2, 3), height=0.5)
    assert not energies(wall, data).any()
    flat = CENTRE * [1, 1, 0]
    mirror = frames(5, seed=1) * [1, 1, -1]
    assert energies(wall, flat[None])[0] == pytest.approx(0.5, rel=1e-9)
    assert energies(wall, mirror).min() > 1.0


@pytest.mark.parametrize("side", [1, -1])
def test_either_hand_can_be_the_right_one(side: int) -> None:
    data = frames(50) * [1, 1, side]
    wall = handedness_wall(data, (0, 1, 2, 3))
    assert not energies(wall, data[:5]).any() and energies(wall, data[:5] * [1, 1, -1]).min() > 1.0


def test_nothing_crosses_it() -> None:
    """Free particles pushed through the plane at 1000 K come back."""
    wall = handedness_wall(frames(200), (0, 1, 2, 3), height=3.0)
    system = openmm.System()
    bonds = openmm.HarmonicBondForce()
    for i in range(4):
        system.addParticle(12.0)
        for j in range(i):
            bonds.addBond(j, i, 0.1 * np.linalg.norm(CENTRE[i] - CENTRE[j]), 2e4)
    system.addForce(wall)
    system.addForce(bonds)
    integrator = openmm.LangevinMiddleIntegrator(1000.0, 1.0, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    volumes = []
    context.setPositions(CENTRE * 0.1)
    context.setVelocitiesToTemperature(1000.0, 1)
    for _ in range(500):
        integrator.step(10)
        x = context.getState(positions=True).getPositions(asNumpy=True)._value
        volumes.append(np.dot(x[1] - x[0], np.cross(x[2] - x[0], x[3] - x[0])))
    assert np.max(volumes) < 0 or np.min(volumes) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"atoms": (0, 1, 2, 2)}, "atoms: expected a centre and three neighbours"),
        ({"height": 0.0}, "height: expected a positive energy"),
        ({"share": 1.0}, "share: expected a number between 0 and 1"),
        (
            {"positions": np.stack([CENTRE, CENTRE, CENTRE * [1, 1, -1]])},
            "positions: expected one handedness, but frame 2",
        ),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    arguments = {"positions": frames(5), "atoms": (0, 1, 2, 3), **arguments}
    with pytest.raises(ValueError, match=message):
        handedness_wall(**arguments)
