"""OpenMM's own forces against the same prior terms in torch."""

from __future__ import annotations

import numpy as np
import openmm
import torch

from openmm_mlff.forces.prior_forces import prior_forces
from openmm_mlff.potentials.priors import PriorTerms

from .conftest import context_of, energy_of, forces_of

#: CODATA: 1 eV in kJ/mol
EV = 96.48533212331002


def test_energies_and_forces_are_those_of_the_terms() -> None:
    terms = PriorTerms(
        bonds=[[0, 1], [1, 2], [3, 2]],
        bond_lengths=[1.3, 1.5, 1.4],
        bond_constants=[40.0, 30.0, 25.0],
        angles=[[0, 1, 2], [1, 2, 3]],
        angle_values=[1.9, 2.1],
        angle_constants=[8.0, 7.0],
        pairs=[[0, 3]],
        pair_lengths=[2.5],
        exponent=9,
    )
    rng = np.random.default_rng(0)
    start = np.array([[0.0, 0, 0], [1.3, 0, 0], [1.8, 1.4, 0], [3.2, 1.5, 0.4]])
    frames = start + 0.2 * rng.normal(size=(6, 4, 3))
    expected, expected_forces = terms.energy_and_forces(torch.from_numpy(frames))
    system = openmm.System()
    for _ in range(4):
        system.addParticle(12.0)
    forces = prior_forces(terms, group=3)
    assert [type(f).__name__ for f in forces] == ["HarmonicBondForce", "HarmonicAngleForce", "CustomBondForce"]
    for force in forces:
        assert force.getForceGroup() == 3
        system.addForce(force)
    context = context_of(system, frames[0] * 0.1)
    for x, e, f in zip(frames, expected, expected_forces, strict=True):
        context.setPositions(x * 0.1)
        np.testing.assert_allclose(energy_of(context), float(e) * EV, rtol=1e-9)
        np.testing.assert_allclose(forces_of(context), f.numpy() * EV * 10, rtol=1e-8, atol=1e-6)


def test_terms_that_are_not_there_make_no_force() -> None:
    assert prior_forces(PriorTerms()) == []
    only = prior_forces(PriorTerms(bonds=[[0, 1]], bond_lengths=[1.0], bond_constants=[1.0]))
    assert [type(f).__name__ for f in only] == ["HarmonicBondForce"]
