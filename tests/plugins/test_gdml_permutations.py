"""Symmetry of molecules from their bonds: molecular symmetry groups of textbooks, and what users may pass instead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openmm_gdml import permutations
from openmm_gdml.permutations import find, validate
from openmm_mlff.data.formats import read_sgdml_npz
from openmm_mlff.data.molecules import embed_smiles
from openmm_mlff.data.structures import Structure


def rattled(smiles: str, n: int = 30, sigma: float = 0.04) -> list[Structure]:
    pytest.importorskip("rdkit")
    molecule = embed_smiles(smiles, 1, seed=1)[0]
    rng = np.random.default_rng(0)
    return [molecule.replace(positions=molecule.positions + rng.normal(0, sigma, (len(molecule), 3))) for _ in range(n)]


@pytest.mark.parametrize(
    ("smiles", "order", "rotations"),
    [
        ("CCO", 6, 3),  # methyl rotation, and the mirror plane
        ("Cc1ccccc1", 12, 6),  # methyl rotation x ring flip, and mirror images
        ("c1ccccc1", 12, 12),  # D6h without inversions of distances: the twelve symmetries of a hexagon
        ("C=C", 4, 4),  # no rotation about the double bond
        ("CC", 36, 18),  # the molecular symmetry group of ethane, G36
        ("C", 24, 12),
        ("CC(C)(C)C", 1944, 972),
        ("NC=O", 1, 1),  # the amide bond does not turn
        ("CC(=O)NC", 18, 9),
        ("C[C@H](N)C(=O)O", 3, 3),  # a stereo centre excludes mirror images
    ],
)
def test_known_groups(smiles: str, order: int, rotations: int) -> None:
    # a pyramidal amine that does not invert is seen as such only if it is rattled gently
    found = find(rattled(smiles, sigma=0.02 if "N)" in smiles else 0.04))
    assert (len(found), found.n_rotations) == (order, rotations)
    assert np.array_equal(found.group[0], np.arange(len(found.numbers)))
    if order < 100:
        assert np.array_equal(validate(found.group, found.numbers), found.group)
    assert str(order) in found.inspect()


def test_capped_alanine_has_27_where_matching_finds_one(shared: Path) -> None:
    structures = read_sgdml_npz(shared / "data" / "gdml" / "dataset_ala2.npz")[:300]
    known = np.load(shared / "data" / "gdml" / "ala2_M180_S27_model.npz", allow_pickle=False)["perms"]
    found = find(structures)
    assert {tuple(p) for p in found.group} == {tuple(int(i) for i in p) for p in known}
    assert [len(orbit) for orbit in found.orbits] == [3, 3, 3]


def test_data_in_both_hands_exchange_hydrogens(shared: Path) -> None:
    # the second trajectory of the shared ethanol data has the two hydrogens of its CH2 group exchanged
    structures = read_sgdml_npz(shared / "data" / "gdml" / "dataset_ethanol.npz")
    known = np.load(shared / "data" / "gdml" / "ethanol_M200_S12_model.npz", allow_pickle=False)["perms"]
    assert len(find(structures[:200])) == 6
    both = find(structures[::20])
    assert {tuple(p) for p in both.group} == {tuple(int(i) for i in p) for p in known}


def test_bonds_of_ones_own_decide() -> None:
    molecule = rattled("CCO")
    assert len(find(molecule, bonds=np.array([[0, 1], [1, 2]]))) > 6
    with pytest.raises(ValueError, match="bonds: expected pairs"):
        find(molecule, bonds=np.array([[0, 99]]))


def test_what_cannot_be_searched() -> None:
    molecule = rattled("CC(C)(C)C", 3)
    with pytest.raises(ValueError, match="more than 100"):
        find(molecule, limit=100)
    with pytest.raises(ValueError, match="at least one geometry"):
        find([])
    with pytest.raises(ValueError, match="periodic"):
        find([molecule[0].replace(cell=np.eye(3) * 9)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1]], "shape"),
        ([[0.0, 1.0, 2.0]], "whole numbers"),
        ([[0, 0, 2]], "row 0 has not"),
        ([[0, 1, 2], [1, 0, 2]], "in the place of"),
        ([[0, 1, 2], [0, 1, 2]], "twice"),
        ([[0, 2, 1]], "expected a group"),
    ],
)
def test_wrong_permutations_are_named(rows: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(np.array(rows), np.array([8, 1, 1]))


def test_a_bond_that_breaks_in_few_frames_is_kept() -> None:
    r = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    far = r.copy()
    far[1] *= 3
    frames = np.stack([r] * 5 + [far])
    assert permutations.find_bonds(np.array([8, 1, 1]), frames).tolist() == [[0, 1], [0, 2]]
