"""Bonds of start structures."""

from __future__ import annotations

import numpy as np

from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.starts import bond_graph, with_bonds


def test_bonds_stay_with_a_structure_whose_atoms_move() -> None:
    water = Structure(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]))
    bonded = with_bonds(water)
    assert bonded.info["topology_bonds"] == [[0, 1], [0, 2]]
    stretched = bonded.replace(positions=1.4 * water.positions)
    assert not bond_graph(stretched.numbers, stretched.positions).any()
    assert with_bonds(stretched).info["topology_bonds"] == [[0, 1], [0, 2]]
    assert "topology_bonds" not in water.info


def test_given_bonds_are_kept() -> None:
    atoms = Structure(np.array([1, 1]), np.array([[0.0, 0, 0], [0.74, 0, 0]]), info={"topology_bonds": []})
    assert with_bonds(atoms).info["topology_bonds"] == []
