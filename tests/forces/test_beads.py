"""Beads without elements through ``MLPotential``: found by their names, and with masses that the user gives."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from openmm import app
from openmmml import MLPotential

from openmm_gdml.model import GDMLPotential
from openmm_mlff.data.coarse_graining import BeadMap
from openmm_mlff.potentials.family import load_potential, save_potential

from .conftest import context_of, energy_of, forces_of

NAMES = ("P", "Q", "R", "S")
#: CODATA: 1 eV in kJ/mol
EV = 96.48533212331002
START = np.array([[0.0, 0, 0], [0.4, 0, 0], [0.5, 0.4, 0], [0.8, 0.5, 0.3]])


@pytest.fixture(scope="module")
def model() -> GDMLPotential:
    rng = np.random.default_rng(0)
    i, j = np.tril_indices(4, -1)
    r = 10 * START + 0.3 * rng.normal(size=(5, 4, 3))
    x = 1 / np.linalg.norm(r[:, i] - r[:, j], axis=-1)
    return GDMLPotential.from_coefficients((1, 2, 3, 4), 2.0, x, rng.normal(size=x.shape), 0.5, beads=NAMES)


def topology_of_beads(names: tuple[str, ...] = NAMES) -> app.Topology:
    """As a map to centres of mass makes it: no bead has an element."""
    n = len(names)
    return BeadMap(
        names, (("X", 1),) * n, np.kron(np.eye(n), [0.5, 0.5]), (0,) * n, np.full(n, 30.0), ((0, 1), (1, 2))
    ).topology()


@pytest.mark.filterwarnings("ignore:masses")
def test_energies_and_forces_of_the_model(model: GDMLPotential, tmp_path: Path) -> None:
    path = save_potential(model, tmp_path / "beads.safetensors")
    assert load_potential(path).beads == NAMES
    expected, forces = model.energies_and_forces(torch.from_numpy(10 * START)[None])
    for given in ({"model": model}, {"modelPath": str(path)}):
        system = MLPotential("gdml", **given).createSystem(topology_of_beads(), removeCMMotion=False)
        context = context_of(system, START)
        assert energy_of(context) == pytest.approx(float(expected[0]) * EV, rel=1e-9)
        np.testing.assert_allclose(forces_of(context), forces[0].numpy() * EV * 10, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("names", [("P", "Q", "S", "R"), ("P", "Q", "R"), ("P", "Q", "R", "T")])
def test_other_names_are_refused(model: GDMLPotential, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"beads: expected P Q R S in this order, got {' '.join(names)}"):
        MLPotential("gdml", model=model).createSystem(topology_of_beads(names))


def test_a_model_of_atoms_still_asks_for_elements(model: GDMLPotential) -> None:
    state = model.state_dict()
    atoms = GDMLPotential.from_coefficients((8, 1, 1, 6), 2.0, state["descriptors"], state["coefficients"], 0.0)
    with pytest.raises(ValueError, match="elements: expected an element for every ML atom, got none for atom 0"):
        MLPotential("gdml", model=atoms).createSystem(topology_of_beads())


def test_beads_without_mass_are_warned_of(model: GDMLPotential) -> None:
    potential = MLPotential("gdml", model=model)
    with pytest.warns(UserWarning, match=r"masses: beads \[0, 1, 2, 3\] have no element and so no mass"):
        potential.createSystem(topology_of_beads())
    # a bead that is one atom has an element, and with it a mass
    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for name in NAMES:
        topology.addAtom(name, app.element.carbon, residue)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system = potential.createSystem(topology)
    expected, _ = model.energies_and_forces(torch.from_numpy(10 * START)[None])
    assert energy_of(context_of(system, START)) == pytest.approx(float(expected[0]) * EV, rel=1e-9)
