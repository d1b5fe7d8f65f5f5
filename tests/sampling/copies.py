"""A molecule, copies of it in different geometries, and what single copies of it do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openmm
import pytest
from openmm import app

from openmm_mlff.sampling.replicas import Replicas

N = 5


@dataclass
class Molecule:
    topology: app.Topology
    positions: np.ndarray


def spread(molecule: Molecule, n: int = N, sigma: float = 0.004, seed: int = 1) -> np.ndarray:
    """Different geometries for all copies, on top of one another, (n, n_atoms, 3) nm."""
    random = np.random.default_rng(seed)
    return molecule.positions + random.normal(0.0, sigma, (n, *molecule.positions.shape))


def reference(system: openmm.System, integrator: openmm.Integrator | None = None) -> openmm.Context:
    platform = openmm.Platform.getPlatform("Reference")
    return openmm.Context(system, integrator or openmm.VerletIntegrator(0.0005), platform)


def one_by_one(system: openmm.System, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies (n,) and forces (n, n_atoms, 3) of every geometry in a System of one copy."""
    context = reference(system)
    energies, forces = [], []
    for x in positions:
        context.setPositions(x)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy()._value)
        forces.append(state.getForces(asNumpy=True)._value)
    return np.array(energies), np.array(forces)


def agrees(single: openmm.System, topology: app.Topology, positions: np.ndarray, digits: float = 1e-9) -> Replicas:
    """Assert that energies and forces of the copies are those of single copies."""
    replicas = Replicas(single, topology, len(positions))
    context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
    replicas.set_positions(context, positions)
    energies, forces = one_by_one(single, positions)
    frame = replicas.frame(context)
    assert np.ptp(energies) > 0.1
    np.testing.assert_allclose(frame.potential, energies, rtol=digits, atol=digits)
    np.testing.assert_allclose(frame.forces, forces, rtol=digits, atol=digits * np.abs(forces).max())
    total = context.getState(energy=True).getPotentialEnergy()._value
    assert total == pytest.approx(energies.sum(), rel=digits)
    return replicas
