"""Rings of beads against the harmonic oscillator, for which a ring of P beads is solved exactly."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.analysis.observables import mean_with_error
from openmm_mlff.analysis.path_integrals import (
    harmonic_oscillator,
    primitive_kinetic_energy,
    ring_frequency,
    squared_gyration,
    virial_kinetic_energy,
)
from openmm_mlff.sampling.path_integrals import (
    RingPolymers,
    ring_dynamics,
    ring_dynamics_frame,
    start_ring_dynamics,
)
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL, HBAR_KJ_PER_MOL_PS

MASS, TEMPERATURE, BEADS = 1.008, 300.0, 8
#: 69 meV, hydrogen in palladium
OMEGA = 104.8  # 1/ps
ATOMS = 6


def test_planck_constant_is_that_of_openmm() -> None:
    energy = HBAR_KJ_PER_MOL_PS * unit.kilojoule_per_mole * unit.picosecond / unit.AVOGADRO_CONSTANT_NA
    assert energy.value_in_unit(unit.joule * unit.second) == pytest.approx(1.054571817e-34, rel=1e-9)


def test_exact_averages_of_rings_tend_to_quantum_mechanics() -> None:
    exact = harmonic_oscillator(OMEGA, MASS, TEMPERATURE)
    half = HBAR_KJ_PER_MOL_PS * OMEGA / (2 * BOLTZMANN_KJ_PER_MOL * TEMPERATURE)
    assert exact.kinetic == pytest.approx(HBAR_KJ_PER_MOL_PS * OMEGA / 4 / np.tanh(half), rel=1e-12)
    classical = harmonic_oscillator(OMEGA, MASS, TEMPERATURE, 1)
    assert classical.kinetic == pytest.approx(0.5 * BOLTZMANN_KJ_PER_MOL * TEMPERATURE, rel=1e-12)
    assert classical.gyration == pytest.approx(0.0, abs=1e-15)
    errors = [exact.kinetic - harmonic_oscillator(OMEGA, MASS, TEMPERATURE, p).kinetic for p in (8, 16, 32, 64)]
    # the error of the primitive factorisation falls with the square of the number of beads
    assert np.array(errors[:-1]) / errors[1:] == pytest.approx([4.0, 4.0, 4.0], rel=0.05)


def test_estimators_of_gaussian_rings_are_those_of_the_oscillator() -> None:
    """Rings drawn exactly from their normal modes; no dynamics."""
    random = np.random.default_rng(0)
    k = np.arange(BEADS)
    omega = 2 * ring_frequency(BEADS, TEMPERATURE) * np.sin(np.pi * k / BEADS)
    width = np.sqrt(BEADS * BOLTZMANN_KJ_PER_MOL * TEMPERATURE / (MASS * (omega**2 + OMEGA**2)))
    # real modes of a ring: cosines up to P/2, then sines
    modes = np.where(
        k[:, None] <= BEADS // 2,
        np.cos(2 * np.pi * np.outer(k, k) / BEADS),
        np.sin(2 * np.pi * np.outer(k, k) / BEADS),
    )
    modes /= np.linalg.norm(modes, axis=1, keepdims=True)
    rings = np.einsum("kp,skd->spd", modes, random.standard_normal((20000, BEADS, 3)) * width[:, None])[:, :, None]
    forces = -MASS * OMEGA**2 * rings
    exact = harmonic_oscillator(OMEGA, MASS, TEMPERATURE, BEADS)
    for values, expected in (
        (virial_kinetic_energy(rings, forces, TEMPERATURE), 3 * exact.kinetic),
        (primitive_kinetic_energy(rings, np.array([MASS]), TEMPERATURE), 3 * exact.kinetic),
        (squared_gyration(rings), 3 * exact.gyration),
    ):
        assert values.shape == (20000, 1)
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - expected) < 4 * error
        assert error < 0.01 * expected


@pytest.fixture(scope="module")
def oscillators() -> tuple[openmm.System, app.Topology]:
    """Independent particles, each bound to the origin."""
    system, topology = openmm.System(), app.Topology()
    well = openmm.CustomExternalForce("0.5*stiffness*(x^2+y^2+z^2)")
    well.addGlobalParameter("stiffness", MASS * OMEGA**2)
    residue = topology.addResidue("MOL", topology.addChain())
    for _ in range(ATOMS):
        well.addParticle(system.addParticle(MASS))
        topology.addAtom("H", app.element.hydrogen, residue)
    system.addForce(well)
    return system, topology


def z_scores(frames: list, exact: object) -> dict[str, float]:
    """(mean - exact) / error of everything that has an exact value."""
    expected = {"kinetic": 3 * exact.kinetic, "primitive": 3 * exact.kinetic, "gyration": 3 * exact.gyration}  # type: ignore[attr-defined]
    found = {}
    for name, value in expected.items():
        estimate = mean_with_error(np.array([getattr(f, name).mean() for f in frames]))
        assert estimate.error < 0.05 * value
        found[name] = (estimate.value - value) / estimate.error
    return found


def test_rings_in_one_system_sample_the_oscillator(oscillators: tuple[openmm.System, app.Topology]) -> None:
    rings = RingPolymers(*oscillators, n_beads=BEADS, temperature=TEMPERATURE)
    assert rings.system.getNumParticles() == BEADS * ATOMS
    context = rings.context(rings.integrator(0.00025, friction=50.0, seed=3), "Reference")
    rings.start(context, np.zeros((ATOMS, 3)), seed=3)
    context.getIntegrator().step(1000)
    frames = []
    for _ in range(8000):
        context.getIntegrator().step(20)
        frames.append(rings.frame(context))
    # forces are those of the well alone
    assert frames[-1].forces == pytest.approx(-MASS * OMEGA**2 * frames[-1].positions, rel=1e-9)
    scores = z_scores(frames, harmonic_oscillator(OMEGA, MASS, TEMPERATURE, BEADS))
    assert max(abs(z) for z in scores.values()) < 4, scores


def test_rpmd_integrator_samples_the_same(oscillators: tuple[openmm.System, app.Topology]) -> None:
    context = ring_dynamics(oscillators[0], BEADS, TEMPERATURE, 0.00025, friction=20.0, seed=5)
    masses = np.full(ATOMS, MASS)
    start_ring_dynamics(context, np.zeros((ATOMS, 3)), masses, seed=5)
    context.getIntegrator().step(500)
    frames = []
    for _ in range(400):
        context.getIntegrator().step(10)
        frames.append(ring_dynamics_frame(context, masses))
    scores = z_scores(frames, harmonic_oscillator(OMEGA, MASS, TEMPERATURE, BEADS))
    assert max(abs(z) for z in scores.values()) < 4, scores


def test_one_bead_is_classical(oscillators: tuple[openmm.System, app.Topology]) -> None:
    rings = RingPolymers(*oscillators, n_beads=1, temperature=TEMPERATURE)
    context = rings.context(rings.integrator(0.0005, seed=1), "Reference")
    rings.start(context, np.full((ATOMS, 3), 0.01), seed=1)
    context.getIntegrator().step(10)
    frame = rings.frame(context)
    assert frame.gyration == pytest.approx(np.zeros(ATOMS), abs=1e-20)
    assert frame.kinetic == pytest.approx(np.full(ATOMS, 1.5 * BOLTZMANN_KJ_PER_MOL * TEMPERATURE))


def test_what_has_no_beads_is_refused(oscillators: tuple[openmm.System, app.Topology]) -> None:
    system, topology = oscillators
    with pytest.raises(ValueError, match=r"n_beads: expected a whole number >= 1, got 0"):
        RingPolymers(system, topology, 0, TEMPERATURE)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        RingPolymers(system, topology, 4, -1.0)
    rigid = openmm.XmlSerializer.clone(system)
    rigid.addConstraint(0, 1, 0.1)
    with pytest.raises(ValueError, match="system: expected no constraints"):
        RingPolymers(rigid, topology, 4, TEMPERATURE)
    frozen = openmm.XmlSerializer.clone(system)
    frozen.setParticleMass(2, 0.0)
    with pytest.raises(ValueError, match="particle 2"):
        ring_dynamics(frozen, 4, TEMPERATURE, 0.001)
    taken = openmm.XmlSerializer.clone(system)
    taken.getForce(0).setForceGroup(31)
    with pytest.raises(ValueError, match="group 31"):
        RingPolymers(taken, topology, 4, TEMPERATURE)
