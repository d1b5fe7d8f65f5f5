"""Biased sampling of a chain whose torsions have a known free energy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest

from openmm_mlff.data.jobs import run_tasks
from openmm_mlff.sampling.biased_md import (
    BiasedPlan,
    BiasMap,
    Dynamics,
    Frames,
    Metadynamics,
    frozen_bias,
    make_bias,
    make_frames,
    read_frames,
    run_biased,
    write_frames,
)
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

TORSIONS = ((0, 1, 2, 3), (1, 2, 3, 4))
START = np.array([[0.0, 1.2, 0.0], [1.0, 0.0, 0.0], [2.4, 0.3, 0.2], [3.3, -0.8, 0.5], [4.6, -0.3, 1.2]])
#: kJ/mol, of the barrier terms of the two torsions
HEIGHTS = (6.0, 3.0)
DYNAMICS = Dynamics(temperature=300.0, friction=10.0, timestep=4.0)


def chain() -> openmm.System:
    """Stiff bonds and angles: the torsions then have the free energy of their own terms, exactly."""
    system = openmm.System()
    bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for _ in range(5):
        system.addParticle(15.0)
    for i in range(4):
        bonds.addBond(i, i + 1, 0.15, 5e4)
    for i in range(3):
        angles.addAngle(i, i + 1, i + 2, 1.95, 400.0)
    for quartet, height, n in zip(TORSIONS, HEIGHTS, (2, 1), strict=True):
        torsions.addTorsion(*quartet, n, 0.0, height)
    for force in (bonds, angles, torsions):
        system.addForce(force)
    return system


def free_energy(phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """eV."""
    return (HEIGHTS[0] * np.cos(2 * np.radians(phi)) + HEIGHTS[1] * np.cos(np.radians(psi))) / KJ_PER_MOL_PER_EV


def bias_map(n: int = 24) -> BiasMap:
    angles = -180 + 360 * np.arange(n) / n
    return BiasMap(TORSIONS, -0.9 * free_energy(*np.meshgrid(angles, angles, indexing="ij")) + 0.02)


def plan(**changes: object) -> BiasedPlan:
    values = {
        "name": "a",
        "split": "train",
        "system": openmm.XmlSerializer.serialize(chain()),
        "start": START,
        "torsions": TORSIONS,
        "bias": bias_map(),
        "dynamics": DYNAMICS,
        "duration": 100.0,
        "discard": 2.0,
        "interval": 0.2,
        "seed": 1,
    }
    return BiasedPlan(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def frames() -> Frames:
    return run_biased(plan(duration=500.0))


def test_recorded_forces_and_energies_are_those_without_and_with_the_bias(frames: Frames) -> None:
    context = openmm.Context(chain(), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    for k in range(0, len(frames), 500):
        context.setPositions(frames.positions[k].astype(float) * 0.1)
        forces = context.getState(forces=True).getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
        # positions are kept in single precision, and bonds are stiff
        assert np.abs(frames.forces[k] - forces).max() < 1e-3
    # the spline through the cosines is good to a part in 10^4
    expected = -0.9 * free_energy(frames.torsions[:, 0], frames.torsions[:, 1]) + 0.02
    assert np.abs(frames.bias - expected).max() < 5e-5
    assert frames.positions.dtype == frames.forces.dtype == np.float32 and len(frames) == 2500
    assert frames.info["biased"] is True and frames.info["interval_ps"] == 0.2


def test_weights_give_the_unbiased_averages(frames: Frames) -> None:
    angle = np.radians(np.linspace(-180, 180, 3601)[:-1])
    weights = np.exp(frames.bias / DYNAMICS.kT)
    for k, (height, n) in enumerate(zip(HEIGHTS, (2, 1), strict=True)):
        p = np.exp(-height / (DYNAMICS.kT * KJ_PER_MOL_PER_EV) * np.cos(n * angle))
        exact = float(p @ np.cos(n * angle) / p.sum())
        series = np.cos(n * np.radians(frames.torsions[:, k]))
        # error over ten blocks of the trajectory
        blocks = [np.average(s, weights=w) for s, w in zip(np.split(series, 10), np.split(weights, 10), strict=True)]
        error = np.std(blocks, ddof=1) / np.sqrt(10)
        assert error < 0.05 and abs(np.average(series, weights=weights) - exact) < 4 * error
        # flattened to a tenth, it is nearly zero without them
        assert abs(series.mean()) < 0.35 * abs(exact)


def test_without_a_bias_the_trajectory_is_free() -> None:
    found = run_biased(plan(bias=None))
    assert not found.bias.any() and found.info["biased"] is False and np.isfinite(found.torsions).all()


def test_metadynamics_finds_the_free_energy_and_leaves_the_system_alone() -> None:
    system = chain()
    settings = Metadynamics(duration=600.0, pace=0.4, height=0.015, width=20.0, bias_factor=6.0, grid=24, snapshot=10.0)
    bias, found, snapshots = make_bias(system, START, TORSIONS, settings, DYNAMICS, seed=2)
    angles = -180 + 360 * np.arange(24) / 24
    exact = free_energy(*np.meshgrid(angles, angles, indexing="ij"))
    p = np.exp(-exact / DYNAMICS.kT)
    difference = found - exact
    difference -= (p * difference).sum() / p.sum()
    assert np.sqrt((p * difference**2).sum() / p.sum()) < 0.5 * DYNAMICS.kT
    assert np.ptp(exact) > 6 * DYNAMICS.kT and np.ptp(found) > 4.5 * DYNAMICS.kT
    assert system.getNumForces() == 3
    assert len(snapshots) == 30 and snapshots.shape[1:] == (5, 3)
    assert np.array_equal(bias.energies, frozen_bias(found, settings, DYNAMICS.kT))


def test_frozen_bias_flattens_up_to_its_cap() -> None:
    kT = 0.02
    f = np.array([0.0, 0.1, 0.2, 1.0])
    v = frozen_bias(f, Metadynamics(flattening=0.8, cap=0.5), kT)
    assert v[:3] - v[0] == pytest.approx(-0.8 * f[:3], abs=1e-6)
    # F + V: a fifth of F below the cap; above it the rest of F stays as a barrier
    total = f + v - v[0]
    assert total[2] == pytest.approx(0.04, abs=1e-6) and total[3] == pytest.approx(0.1 + 0.5, abs=1e-6)


def test_same_plan_same_frames_other_seed_other_frames() -> None:
    a, b, c = (run_biased(plan(duration=4.0, seed=s)) for s in (1, 1, 2))
    assert np.array_equal(a.positions, b.positions) and not np.array_equal(a.positions, c.positions)


def test_frames_come_back(tmp_path: Path) -> None:
    found = run_biased(plan(duration=1.0))
    write_frames(tmp_path / "a.safetensors", found)
    again = read_frames(tmp_path / "a.safetensors")
    for name in ("positions", "forces", "bias", "torsions"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    assert again.info == found.info
    with pytest.raises(FileNotFoundError):
        read_frames(tmp_path / "b.safetensors")


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="energies: expected a square map with an even number of rows"):
        BiasMap(TORSIONS, np.zeros((5, 5)))
    with pytest.raises(ValueError, match="energies: expected finite numbers"):
        BiasMap(TORSIONS, np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="torsions: expected two times four different atoms"):
        BiasMap(((0, 1, 2, 2), TORSIONS[1]), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="timestep: expected a positive number, got 0"):
        Dynamics(timestep=0)
    with pytest.raises(ValueError, match="bias_factor: expected a number > 1"):
        Metadynamics(bias_factor=1.0)
    with pytest.raises(ValueError, match="flattening: expected a number from 0 to 1, got 2"):
        Metadynamics(flattening=2)
    with pytest.raises(ValueError, match=r"interval: expected a whole number of time steps of 4.0 fs, got 0.001 ps"):
        run_biased(plan(interval=0.001))
    taken = chain()
    taken.getForce(0).setForceGroup(31)
    with pytest.raises(ValueError, match="system: expected force group 31 to be free"):
        run_biased(plan(system=openmm.XmlSerializer.serialize(taken)))


def test_a_trajectory_that_breaks_is_reported(tmp_path: Path) -> None:
    broken = plan(start=np.full((5, 3), np.nan), duration=1.0)
    outcome = run_tasks({"a": broken}, make_frames, tmp_path, log=tmp_path / "log", progress=False)
    assert outcome.made == [] and list(outcome.failed) == ["a"] and not (tmp_path / "a.safetensors").exists()
