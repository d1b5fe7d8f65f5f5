"""Many different molecules by SO3krates' native code: each is alone, and stays so when another one breaks."""

from __future__ import annotations

import numpy as np
import openmm
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.molecules import Molecules
from openmm_so3krates import SO3krates, SO3kratesConfig

# sizes that other tests compile as well
SMALL = SO3kratesConfig(
    num_features=16, num_layers=2, num_heads=4, degrees=(2, 3), num_basis_functions=8, cutoff=4.0, elements=(1, 6, 8),
    use_charge_embed=False, use_spin_embed=False, use_electrostatics=False, use_dispersion=False,
    predict_charges=False, predict_hirshfeld=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SO3krates:
    torch.manual_seed(3)
    return SO3krates(SMALL).double().eval().requires_grad_(False)


def molecules_of(*sizes: int) -> list[Structure]:
    """Atoms on a grid of 1.4 angstrom, shaken; nothing counts as bonded."""
    random = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), axis=-1).reshape(-1, 3) * 1.4
    return [
        Structure(
            random.choice(SMALL.elements, n), grid[:n] + random.normal(0, 0.05, (n, 3)), multiplicity=1,
            info={"topology_bonds": []},
        )
        for n in sizes
    ]  # fmt: skip


def run(model: SO3krates, structures: list[Structure], lost: bool) -> tuple[list[list[np.ndarray]], Molecules]:
    """Frames of 30 steps; `lost` throws atoms of molecule 1 away after 10 and puts the molecule back after 20."""
    molecules = Molecules.from_potential(model, structures, precision="double", threads=1, max_force=1e6)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0001)
    integrator.setRandomNumberSeed(4)
    context = molecules.context(integrator, "Reference")
    molecules.set_positions(context)
    molecules.set_velocities(context, 300.0, seeds=7)
    frames = []
    for k in range(6):
        if lost and k == 2:
            where = np.concatenate(molecules.positions(context))
            where[molecules.offsets[1]] = np.nan
            where[molecules.offsets[1] + 1] += 500.0
            context.setPositions(where)
        if lost and k == 4:
            molecules.restart(context, 1, 300.0, seed=9)
        integrator.step(5)
        frames.append(molecules.positions(context))
    return frames, molecules


def test_others_do_not_notice(model: SO3krates) -> None:
    """Also next to a molecule whose pair lists change."""
    structures = molecules_of(12, 17, 9, 35, 20)
    before, undisturbed = run(model, structures, False)
    after, molecules = run(model, structures, True)
    assert not undisturbed.failures
    assert [f.molecule for f in molecules.failures] == [1]
    for a, b in zip(before, after, strict=True):
        for k in (0, 2, 3, 4):
            np.testing.assert_array_equal(a[k], b[k])
    assert np.isfinite(after[-1][1]).all() and np.abs(after[-1][1] - before[-1][1]).max() > 1e-4


def test_energies_and_forces_are_those_of_single_molecules(model: SO3krates) -> None:
    structures = molecules_of(12, 17, 9, 35)
    molecules = Molecules.from_potential(model, structures, precision="double")
    context = molecules.context(openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0001))
    molecules.set_positions(context)
    frame = molecules.frame(context)
    for k, structure in enumerate(structures):
        energy, forces = model.energy_and_forces(structure)
        assert frame.potential[k] / 96.48533212331 == pytest.approx(energy, rel=1e-9)
        np.testing.assert_allclose(frame.forces[k] / 964.8533212331, forces, rtol=0, atol=1e-6)
