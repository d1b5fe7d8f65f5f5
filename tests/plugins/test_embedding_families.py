"""Electrostatic embedding with every family that predicts charges, op by op and by native code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app
from openmmml import MLPotential

from openmm_mlff.forces import running
from openmm_mlff.potentials.potential import Potential
from openmm_so3krates import SO3krates, SO3kratesConfig
from openmm_spookynet import SpookyNet, SpookyNetConfig

POSITIONS = np.array(
    [
        [0.00, 0.00, 0.00], [0.10, 0.02, -0.01], [-0.03, 0.11, 0.02], [0.00, -0.12, 0.04], [0.08, -0.17, 0.03],
        [0.32, 0.05, 0.10], [0.40, 0.02, 0.05], [0.33, 0.15, 0.10], [-0.20, -0.22, -0.21], [-0.29, -0.21, -0.25],
        [-0.15, -0.28, -0.28],
    ]
)  # fmt: skip
ELEMENTS = ["N", "H", "H", "O", "H", "O", "H", "H", "O", "H", "H"]
CHARGES = [-0.9, 0.4, 0.4, -0.3, 0.4, -0.834, 0.417, 0.417, -0.834, 0.417, 0.417]


def model_of(family: str) -> Potential:
    torch.manual_seed(3)
    small: dict[str, object]
    if family == "spookynet":
        small = {"num_features": 16, "num_modules": 1, "num_random_features": 16}
        model: Potential = SpookyNet(SpookyNetConfig(**small))  # type: ignore[arg-type]
    else:
        small = {"num_features": 16, "num_heads": 2, "num_layers": 2, "degrees": (1, 2)}
        model = SO3krates(SO3kratesConfig(**small))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model.double().eval().requires_grad_(False)


def force_field() -> tuple[app.Topology, openmm.System]:
    """Hydroxylamine and two waters: charges and Lennard-Jones terms, nothing bonded."""
    topology, system, force = app.Topology(), openmm.System(), openmm.NonbondedForce()
    chain = topology.addChain()
    residues = [topology.addResidue(name, chain) for name in ("NOH", "HOH", "HOH")]
    owner = [0] * 5 + [1] * 3 + [2] * 3
    for symbol, charge, which in zip(ELEMENTS, CHARGES, owner, strict=True):
        element = app.Element.getBySymbol(symbol)
        topology.addAtom(symbol, element, residues[which])
        system.addParticle(element.mass)
        force.addParticle(charge, 0.3, 0.0 if symbol == "H" else 0.6)
    for group in (range(5), range(5, 8), range(8, 11)):
        for i in group:
            for j in range(group.start, i):
                force.addException(j, i, 0.0, 1.0, 0.0)
    system.addForce(force)
    return topology, system


def context_of(system: openmm.System) -> openmm.Context:
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(POSITIONS)
    return context


def energy_and_forces(context: openmm.Context) -> tuple[float, np.ndarray]:
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, np.array(state.getForces(asNumpy=True)._value)


@pytest.mark.parametrize("family", ["spookynet", "so3krates"])
def test_forces_are_the_slope_of_the_energy(family: str) -> None:
    topology, system = force_field()
    potential = MLPotential(family, model=model_of(family))
    assert "electrostatic" in potential.getSupportedEmbeddings()
    options = {"embedding": "electrostatic", "polarizabilities": {"O": 0.6, "N": 0.8}, "inductionDamping": 2.0}
    plain = context_of(potential.createMixedSystem(topology, system, range(5), compile=False, **options))
    _, forces = energy_and_forces(plain)
    h = 1e-5
    for i in (0, 3, 4, 6):
        for axis in range(3):
            ends = []
            for sign in (1, -1):
                moved = POSITIONS.copy()
                moved[i, axis] += sign * h
                plain.setPositions(moved)
                ends.append(energy_and_forces(plain)[0])
            assert forces[i, axis] == pytest.approx(-(ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-2)
    np.testing.assert_allclose(forces.sum(0), 0.0, atol=1e-6)


def test_so3lr(shared: Path) -> None:
    """The published model on hydroxylamine: charges that sum to zero, and water that feels it."""
    topology, system = force_field()
    potential = MLPotential("so3krates", modelPath=str(shared / "models" / "so3lr_params.npz"))
    found = {}
    for embedding in ("mechanical", "electrostatic"):
        for compile in (False, "auto"):
            mixed = potential.createMixedSystem(
                topology, system, range(5), embedding=embedding, precision="double", compile=compile
            )
            energy, forces = energy_and_forces(context_of(mixed))
            if compile:
                # native code where there is a compiler
                assert energy == pytest.approx(found[embedding][0], abs=1e-5)
                np.testing.assert_allclose(forces, found[embedding][1], atol=1e-3)
            found[embedding] = energy, forces
    (computation,) = running.computations(mixed)
    charges = computation.charges  # type: ignore[attr-defined]
    assert abs(charges.sum()) < 1e-9 and charges[0] < 0 and charges[3] < 0 < charges[4]
    expected = 138.93545764438198 * sum(
        (charges[i] - CHARGES[i]) * CHARGES[j] / np.linalg.norm(POSITIONS[i] - POSITIONS[j])
        for i in range(5)
        for j in range(5, 11)
    )
    assert found["electrostatic"][0] - found["mechanical"][0] == pytest.approx(expected, abs=1e-5)
