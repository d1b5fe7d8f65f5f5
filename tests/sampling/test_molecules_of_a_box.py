"""Constant pressure where everything is machine-learned: which molecules the barostat moves, and in one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_mlff.potentials.family import save_potential
from openmm_mlff.sampling import systems
from openmm_mlff.sampling.settings import RunSettings
from openmm_spookynet import SpookyNet, SpookyNetConfig

#: angstrom
BOX = np.array([[11.0, 0.0, 0.0], [2.0, 10.0, 0.0], [-2.5, 3.0, 9.5]])
METHANE = np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 1.09 / np.sqrt(3)
#: near faces and corners of the box
SITES = np.array([[0.02, 0.5, 0.5], [0.5, 0.97, 0.03], [0.98, 0.02, 0.99]])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = SpookyNetConfig(
        num_features=8, num_modules=1, num_basis_functions=4, num_random_features=8, use_electrostatics=False,
        elements=(1, 6, 26),
    )  # fmt: skip
    return str(save_potential(SpookyNet(config).eval(), tmp_path_factory.mktemp("model") / "tiny.safetensors"))


def write_pdb(path: Path, symbols: list[str], positions: np.ndarray, box: np.ndarray = BOX) -> str:
    """One residue of no known kind, without bonds, every atom wrapped into the box."""
    topology = app.Topology()
    residue = topology.addResidue("XYZ", topology.addChain())
    for k, symbol in enumerate(symbols):
        topology.addAtom(f"{symbol}{k}", app.Element.getBySymbol(symbol), residue)
    topology.setPeriodicBoxVectors(box * unit.angstrom)
    scaled = positions @ np.linalg.inv(box)
    with open(path, "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, ((scaled - np.floor(scaled)) @ box) * unit.angstrom, file)
    return str(path)


def built(path: str, model_path: str, ensemble: str) -> systems.BuiltSystem:
    settings = RunSettings(
        input=path, model="spookynet", model_path=model_path, ml_region="all", ensemble=ensemble, long_range_cutoff=0.5
    )
    return systems.build(settings)


def molecules(made: systems.BuiltSystem) -> list[list[int]]:
    context = openmm.Context(
        made.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    return [list(m) for m in context.getMolecules()]


def test_molecules_are_found_by_distance_and_made_whole(model_path: str, tmp_path: Path) -> None:
    positions = np.concatenate([METHANE + site @ BOX for site in SITES])
    path = write_pdb(tmp_path / "methane.pdb", ["C", "H", "H", "H", "H"] * 3, positions)
    made = built(path, model_path, "npt")
    assert molecules(made) == [list(range(5 * k, 5 * k + 5)) for k in range(3)]
    parts = 10 * made.positions.reshape(3, 5, 3)
    lengths = np.linalg.norm(parts[:, 1:] - parts[:, :1], axis=-1)
    # PDB files have three decimals
    np.testing.assert_allclose(lengths, 1.09, atol=2e-3)
    shift = (parts.reshape(-1, 3) - positions) @ np.linalg.inv(BOX)
    np.testing.assert_allclose(shift, np.rint(shift), atol=1e-3)
    # at constant volume nothing needs them, and the input stays as it is
    plain = built(path, model_path, "nvt")
    assert len(molecules(plain)) == 15
    assert np.linalg.norm(plain.positions.reshape(3, 5, 3)[:, 1:] - plain.positions.reshape(3, 5, 3)[:, :1]) > 1


def test_a_crystal_has_no_molecules(model_path: str, tmp_path: Path) -> None:
    edge = 2.87
    sites = np.array([[i, j, k] for i in range(3) for j in range(3) for k in range(3)]) * edge
    iron = np.concatenate([sites, sites + edge / 2])
    path = write_pdb(tmp_path / "iron.pdb", ["Fe"] * len(iron), iron, 3 * edge * np.eye(3))
    assert len(molecules(built(path, model_path, "npt"))) == len(iron)
