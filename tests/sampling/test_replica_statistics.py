"""Copies of a kernel model against single molecules, step by step and on average; and against statistical mechanics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app
from openmmml import MLPotential
from scipy import stats

from openmm_gdml import GDMLPotential
from openmm_gdml.descriptors import inverse_distances
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.replica_files import GeometryTable
from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.testing.systems import run_copies
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

from .copies import reference

#: C, N, CA, CB, C, N of capped alanine, nm
BEADS = np.array([
    [-0.1295, -0.0207, -0.0806], [0.0031, -0.0106, -0.0831], [0.0917, -0.0553, 0.0253],
    [0.1306, -0.2022, 0.0004], [0.2157, 0.0347, 0.0403], [0.1981, 0.1660, 0.0197],
])  # fmt: skip
BONDS = {(0, 1): 0.133, (1, 2): 0.147, (2, 4): 0.154, (4, 5): 0.134, (2, 3): 0.154}
ANGLES = {(0, 1, 2): 2.17, (1, 2, 4): 1.96, (2, 4, 5): 2.04, (1, 2, 3): 1.90, (3, 2, 4): 1.95}
KT = 300.0 * BOLTZMANN_KJ_PER_MOL


@pytest.fixture(scope="module")
def topology() -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for symbol in "CNCCCN":
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
    return topology


@pytest.fixture(scope="module")
def coarse(topology: app.Topology) -> openmm.System:
    """A coarse-grained molecule: a kernel model with random coefficients, and harmonic priors."""
    random = np.random.default_rng(0)
    points = torch.from_numpy(BEADS * 10 + random.normal(0, 0.15, (40, 6, 3)))
    x = inverse_distances(points)
    model = GDMLPotential.from_coefficients(
        numbers=(6, 7, 6, 6, 6, 7),
        sigma=2.0,
        descriptors=x,
        coefficients=torch.from_numpy(random.normal(0, 0.3, tuple(x.shape))),
        shift=1.0,
    )
    system = MLPotential("gdml", model=model).createSystem(topology)
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for (i, j), r in BONDS.items():
        bonds.addBond(i, j, r, 2e5)
    for (i, j, k), theta in ANGLES.items():
        angles.addAngle(i, j, k, theta, 600.0)
    system.addForce(bonds)
    system.addForce(angles)
    return system


def test_verlet_copies_of_a_kernel_model_are_single_runs(coarse: openmm.System, topology: app.Topology) -> None:
    n, steps = 20, 500
    replicas = Replicas(coarse, topology, n)
    context = replicas.context(openmm.VerletIntegrator(0.001))
    assert context.getPlatform().getName() == "Reference"
    random = np.random.default_rng(1)
    replicas.set_positions(context, BEADS + random.normal(0, 0.002, (n, 6, 3)))
    replicas.set_velocities(context, 300.0, seeds=2)
    start = replicas.frame(context)
    context.getIntegrator().step(steps)
    end = replicas.frame(context)
    machine = np.ptp([c.energies for c in replicas._learned])
    assert machine > 1.0  # kJ/mol: the kernel model has a part in it
    # without its CMMotionRemover, which a single copy would be slowed by
    single = Replicas(coarse, topology, 1).system
    for k in range(n):
        alone = reference(single, openmm.VerletIntegrator(0.001))
        alone.setPositions(start.positions[k])
        alone.setVelocities(start.velocities[k])
        alone.getIntegrator().step(steps)
        state = alone.getState(positions=True, velocities=True, energy=True)
        # rounding differences of 1e-16 nm grow while bonds vibrate
        np.testing.assert_allclose(end.positions[k], state.getPositions(asNumpy=True)._value, rtol=0, atol=1e-8)
        assert end.potential[k] == pytest.approx(state.getPotentialEnergy()._value, abs=1e-5)
        assert end.kinetic[k] == pytest.approx(state.getKineticEnergy()._value, abs=1e-5)


@pytest.mark.parametrize("name", ["ethanol_M200_S12", "ala2_M180_S27"])
def test_copies_of_a_published_model(shared: Path, name: str) -> None:
    """As many copies as reference geometries, against what the published program predicts for each."""
    model = load_potential(shared / "data" / "gdml" / f"{name}_model.npz", "gdml")
    stored = np.load(shared / "data" / "gdml" / f"{name}_ref.npz", allow_pickle=False)
    positions = stored["R"]
    energies, forces = run_copies(model, Structure(stored["z"], positions[0]), positions)
    # kcal/mol and kcal/mol/angstrom
    np.testing.assert_allclose(energies / 4.184, stored["E_pred"].ravel(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(forces / 41.84, stored["F_pred"].reshape(positions.shape), rtol=0, atol=1e-5)


def test_averages_are_those_of_single_runs(coarse: openmm.System, topology: app.Topology) -> None:
    """Energies, bond lengths, phi and psi: time averages of as many single runs, each one independent sample."""
    n, discard, frames, stride = 40, 400, 40, 25
    table = GeometryTable({"0-1": (0, 1), "2-4": (2, 4)}, {"phi": (0, 1, 2, 4), "psi": (1, 2, 4, 5)})

    def average(copies: Replicas, seed: int) -> np.ndarray:
        integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.002)
        integrator.setRandomNumberSeed(seed)
        context = copies.context(integrator)
        copies.set_positions(context, BEADS)
        copies.set_velocities(context, 300.0, seed)
        integrator.step(discard)
        rows = []
        for _ in range(frames):
            integrator.step(stride)
            frame = copies.frame(context)
            geometry = table(frame.positions)
            angles = np.radians(geometry[2:])
            rows.append(np.stack([frame.potential, frame.kinetic, *geometry[:2], *np.cos(angles), *np.sin(angles)]))
        return np.mean(rows, axis=0)

    together = average(Replicas(coarse, topology, n), 1)
    one = Replicas(coarse, topology, 1)
    apart = np.concatenate([average(one, 100 + k) for k in range(n)], axis=1)
    error = np.sqrt((together.var(axis=1, ddof=1) + apart.var(axis=1, ddof=1)) / n)
    z = (together.mean(axis=1) - apart.mean(axis=1)) / error
    assert np.abs(z).max() < 3.5
    for a, b in zip(together, apart, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_equipartition_and_independence() -> None:
    """Harmonic wells: energies of every copy follow the Gamma distribution, and copies know nothing of one another."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    single = openmm.System()
    well = openmm.CustomExternalForce("0.5*k*(x^2+y^2+z^2)")
    well.addPerParticleParameter("k")
    for i, (mass, strength) in enumerate(((12.0, 4000.0), (2.0, 900.0))):
        topology.addAtom("A", app.Element.getBySymbol("C"), residue)
        single.addParticle(mass)
        well.addParticle(i, [strength])
    single.addForce(well)
    n, frames = 250, 20
    replicas = Replicas(single, topology, n)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 20.0, 0.004)
    integrator.setRandomNumberSeed(3)
    context = replicas.context(integrator)
    replicas.set_positions(context, np.zeros((2, 3)))
    replicas.set_velocities(context, 300.0, seeds=1)
    integrator.step(300)
    found = []
    for _ in range(frames):
        integrator.step(150)
        frame = replicas.frame(context)
        found.append([frame.potential, frame.kinetic])
    energies = np.array(found)
    # two particles in three dimensions: E/kT is Gamma(3), potential and kinetic
    for part in (0, 1):
        values = energies[:, part].ravel() / KT
        assert stats.kstest(values, stats.gamma(3).cdf).pvalue > 1e-3
        standard = (values.reshape(frames, n) - 3.0) / np.sqrt(3.0)
        neighbours = (standard * np.roll(standard, 1, axis=1)).sum() / np.sqrt(frames * n)
        assert abs(neighbours) < 4.0
    assert (2 * energies[:, 1] / (6 * BOLTZMANN_KJ_PER_MOL)).mean() == pytest.approx(300.0, abs=6.0)
