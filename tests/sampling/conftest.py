"""Small systems to run: capped alanine, a water box, and a network too small to be right but quick."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app
from openmmml import MLPotential

from .copies import Molecule


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
