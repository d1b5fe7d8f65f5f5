"""Thermal geometries against analytic oscillators, and protons that stay where they are held."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase.data import atomic_masses

from openmm_mlff.data.reference import Driver, TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.thermal import HBAR, Held, NormalModes, dynamics, rattled, relax
from openmm_mlff.units import BOLTZMANN_EV

K, LENGTH = 35.0, 1.2


class Springs:
    """Harmonic bonds of length `LENGTH` between neighbours in the list, an analytic stand-in for a reference method."""

    def driver(self, structure: Structure) -> Driver:
        def energy_and_forces(x: np.ndarray) -> tuple[float, np.ndarray]:
            d = x[1:] - x[:-1]
            r = np.linalg.norm(d, axis=1)
            pull = (K * (r - LENGTH) / r)[:, None] * d
            forces = np.zeros_like(x)
            forces[:-1] += pull
            forces[1:] -= pull
            return 0.5 * K * float(np.sum((r - LENGTH) ** 2)), forces

        return energy_and_forces

    def label(self, structure: Structure) -> Structure:
        energy, forces = self.driver(structure)(structure.positions)
        return structure.replace(energy=energy, forces=forces)

    def atom_energy(self, number: int) -> float:
        return 0.0

    def check(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"method": "springs"}


def diatomic(length: float = LENGTH) -> Structure:
    return Structure(np.array([6, 8]), np.array([[0.0, 0.0, 0.0], [0.0, 0.6, 0.8]]) * length)


def test_normal_modes_of_a_diatomic_are_analytic() -> None:
    modes = NormalModes.of(diatomic(), Springs())
    m = atomic_masses[[6, 8]]
    reduced = m[0] * m[1] / m.sum()
    np.testing.assert_allclose(modes.curvatures, [K / reduced], rtol=1e-4)
    # carbon monoxide: 1.6 % from 2143 1/cm with its measured force constant of 1902 N/m
    omega = np.sqrt(1902 / 16.02176634 / reduced)
    assert HBAR * omega / 1.239841984e-4 == pytest.approx(2143 + 2 * 13.3, rel=2e-3)


@pytest.mark.parametrize(("temperature", "classical"), [(10.0, False), (3000.0, False), (300.0, True)])
def test_sampled_bonds_have_the_variance_of_the_oscillator(temperature: float, classical: bool) -> None:
    modes = NormalModes.of(diatomic(), Springs())
    frames = np.array(modes.sample(temperature, 4000, np.random.default_rng(5), classical))
    lengths = np.linalg.norm(frames[:, 1] - frames[:, 0], axis=1)
    m = atomic_masses[[6, 8]]
    omega = np.sqrt(K * m.sum() / (m[0] * m[1]))
    quantum = HBAR * omega / (2 * K) / np.tanh(HBAR * omega / (2 * BOLTZMANN_EV * temperature))
    variance = BOLTZMANN_EV * temperature / K if classical else quantum
    # standard error of a variance from 4000 samples is 2.2 %
    assert lengths.var() == pytest.approx(variance, rel=0.1)
    assert lengths.mean() == pytest.approx(LENGTH, abs=0.01)


def test_modes_leave_translations_and_rotations_out() -> None:
    water = Structure(np.array([8, 1, 1]), np.array([[0.0, 0.0, 0.1], [0.76, 0.0, -0.49], [-0.76, 0.0, -0.49]]))
    modes = NormalModes.of(water, Springs())
    assert len(modes.curvatures) == 3 and len(NormalModes.of(diatomic(), Springs()).curvatures) == 1
    weighted = modes.modes * atomic_masses[water.numbers][None, :, None]
    np.testing.assert_allclose(weighted.sum(axis=1), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.cross(water.positions[None], weighted).sum(axis=1), 0.0, atol=1e-9)


def test_relaxation_finds_the_minimum() -> None:
    relaxed = relax(diatomic(1.5), Springs(), steps=300, tolerance=1e-3)
    assert np.linalg.norm(relaxed[1] - relaxed[0]) == pytest.approx(LENGTH, abs=1e-3)


def test_dynamics_reach_the_temperature() -> None:
    def sample(seed: int) -> list[np.ndarray]:
        run = dynamics(diatomic(), Springs(), temperature=600, frames=400, stride=10, discard=200, seed=seed)
        return list(run)

    frames = np.array(sample(3))
    lengths = np.linalg.norm(frames[:, 1] - frames[:, 0], axis=1)
    # classical equipartition, and the Jacobian r^2 of the free rotation, which is small here
    assert lengths.var() == pytest.approx(BOLTZMANN_EV * 600 / K, rel=0.35)
    np.testing.assert_array_equal(frames, np.array(sample(3)))
    assert not np.array_equal(frames, np.array(sample(4)))


def test_random_displacements_have_the_widths_asked_for() -> None:
    frames = rattled(np.zeros((50, 3)), 200, (0.02, 0.02), np.random.default_rng(1))
    assert np.std(frames) == pytest.approx(0.02, rel=0.02)


def test_held_distances_feel_walls_and_nothing_else() -> None:
    one = np.array([[0, 1]])
    none = np.empty((0, 2), dtype=np.int64)
    short = Held(Springs(), one, np.array([1.3]), none, np.empty(0), stiffness=10.0)
    long = Held(Springs(), none, np.empty(0), one, np.array([1.1]), stiffness=10.0)
    free = Springs().driver(diatomic())
    for held, length, wall in ((short, 1.25, 0.0), (short, 1.5, 0.2), (long, 1.15, 0.0), (long, 0.9, 0.2)):
        x = diatomic(length).positions
        driver = held.driver(diatomic())
        energy, forces = driver(x)
        assert energy - free(x)[0] == pytest.approx(0.5 * 10.0 * wall**2, abs=1e-12)
        h = 1e-5
        for k in range(6):
            step = np.zeros(6)
            step[k] = h
            slope = (driver(x + step.reshape(2, 3))[0] - driver(x - step.reshape(2, 3))[0]) / (2 * h)
            assert forces.ravel()[k] == pytest.approx(-slope, abs=1e-6)


def test_held_protons_stay_on_a_zwitterion_that_loses_them_in_vacuum() -> None:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")
    from openmm_mlff.data.classes import Topology, class_of_frame
    from openmm_mlff.data.parts import make_part

    part = make_part("glycine", "[NH3+]CC(=O)[O-]", seed=4)
    topology = Topology.of([part])
    bonds = topology.polar_bonds()
    none = np.empty((0, 2), dtype=np.int64)
    held = Held(TBLite(), bonds, np.full(len(bonds), 1.1), none, np.empty(0))
    ends = [relax(part.structure(), method, steps=120, tolerance=0.05) for method in (held, TBLite())]
    assert class_of_frame("zwitterion", topology, ends[0])[1] != "transferred"
    assert class_of_frame("zwitterion", topology, ends[1]) == ("neutral organic", "transferred")
