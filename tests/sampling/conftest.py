"""Small systems to run: capped alanine, a water box, and a network too small to be right but quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.sampling.implicit_solvent import use_native_obc2
from openmm_mlff.sampling.led_simulation import LEDSimulation

from .copies import Molecule
from .latent_models import QUICK, MakeLED, TorsionModel


@pytest.fixture(scope="session")
def alanine(repository: Path) -> str:
    """PDB file of ACE-ALA-NME, 22 atoms, no box."""
    return str(repository / "examples" / "recipes" / "capped_alanine.pdb")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SpookyNet with random weights as a model file; repulsive at short range, so that dynamics stay finite."""
    from openmm_mlff.potentials.family import save_potential
    from openmm_spookynet import SpookyNet, SpookyNetConfig

    torch.manual_seed(0)
    config = SpookyNetConfig(
        num_features=8, num_modules=1, num_basis_functions=4, num_random_features=8, use_electrostatics=False,
        elements=(1, 6, 7, 8),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return str(save_potential(SpookyNet(config).eval(), path, licence="MIT"))


@pytest.fixture(scope="module")
def molecule(alanine: str) -> Molecule:
    pdb = app.PDBFile(alanine)
    return Molecule(pdb.topology, np.array(pdb.getPositions(asNumpy=True)._value))


@pytest.fixture(scope="module")
def learned(tiny_model: str) -> MLPotential:
    return MLPotential("spookynet", modelPath=tiny_model)


@pytest.fixture()
def system(learned: MLPotential, molecule: Molecule) -> openmm.System:
    return learned.createSystem(molecule.topology, compile=False)


@pytest.fixture(scope="module")
def implicit(molecule: Molecule) -> openmm.System:
    """Capped alanine in implicit solvent with heavy hydrogens."""
    field = app.ForceField("amber99sbildn.xml", "implicit/obc2.xml")
    made = field.createSystem(molecule.topology, constraints=app.HBonds, hydrogenMass=3 * unit.amu)
    use_native_obc2(made)
    return made


@pytest.fixture(scope="module")
def relaxed(implicit: openmm.System, molecule: Molecule) -> np.ndarray:
    """Its positions at a minimum of the energy, nm."""
    context = openmm.Context(implicit, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    return context.getState(positions=True).getPositions(asNumpy=True)._value


@pytest.fixture()
def make_led(implicit: openmm.System, molecule: Molecule, relaxed: np.ndarray, tmp_path: Path) -> MakeLED:
    """Makes a LEDSimulation of it: 4 frames of warm-up, then 6 latent frames and 3 of MD in turn."""

    def made(model: TorsionModel | None = None, start: bool = True, **options: Any) -> LEDSimulation:
        model = model or TorsionModel(molecule.topology, relaxed)
        given = {"macro_steps": 6, "micro_steps": 3, "warmup": 4, "relaxation": QUICK, "failure": tmp_path / "failure"}
        simulation = LEDSimulation(implicit, molecule.topology, model, **(given | options))
        if start:
            simulation.setPositions(relaxed)
        return simulation

    return made
