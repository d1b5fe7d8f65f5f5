"""Small systems to run: capped alanine, a water box, and a network too small to be right but quick."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


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
