"""Permutations by matching geometries: assignments against all of them, and data whose symmetry is known."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from openmm_gdml import matching
from openmm_gdml.permutations import find, validate
from openmm_gdml.training import GDML
from openmm_mlff.data.formats import read_sgdml_npz
from openmm_mlff.data.structures import Structure


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_assignments_are_the_best_of_all(n: int) -> None:
    rng = np.random.default_rng(n)
    rows = np.arange(n)
    for _ in range(10):
        cost = rng.normal(size=(n, n))
        found = matching.assign(cost)
        assert sorted(found) == list(range(n))
        best = min(cost[rows, list(p)].sum() for p in itertools.permutations(range(n)))
        assert cost[rows, found].sum() == pytest.approx(best, abs=1e-12)


def test_the_group_of_sgdml_for_ethanol(shared: Path) -> None:
    structures = read_sgdml_npz(shared / "data" / "gdml" / "dataset_ethanol.npz")
    known = np.load(shared / "data" / "gdml" / "ethanol_M200_S12_model.npz", allow_pickle=False)["perms"]
    found = matching.find(structures, 40)
    assert {tuple(p) for p in found} == {tuple(int(i) for i in p) for p in known}
    assert np.array_equal(validate(found, structures[0].numbers), found)


def test_one_trajectory_of_capped_alanine_has_the_group_of_its_bonds(shared: Path) -> None:
    structures = read_sgdml_npz(shared / "data" / "gdml" / "dataset_ala2.npz")[:300]
    matched = matching.find(structures, 40)
    assert {tuple(p) for p in matched} == {tuple(p) for p in find(structures).group}
    assert len(matched) == 27


def test_training_takes_matches(shared: Path) -> None:
    structures = read_sgdml_npz(shared / "data" / "gdml" / "dataset_ethanol.npz")[::100]
    assert GDML(20.0, 1e-8, "matching").fit(structures).config.n_permutations == len(matching.find(structures))


def test_a_shuffled_copy_is_matched_back() -> None:
    rng = np.random.default_rng(3)
    numbers = np.array([6, 1, 1, 1, 1, 8])
    positions = rng.normal(0, 1.5, (6, 3))
    order = np.array([0, 3, 1, 2, 4, 5])
    copy = Structure(numbers, positions[order])
    found = matching.find([Structure(numbers, positions), copy])
    assert {tuple(p) for p in found} == {(0, 1, 2, 3, 4, 5), (0, 3, 1, 2, 4, 5), (0, 2, 3, 1, 4, 5)}


def test_what_cannot_be_matched() -> None:
    atom = Structure([1, 1], [[0.0, 0, 0], [1.0, 0, 0]])
    with pytest.raises(ValueError, match="at least one geometry"):
        matching.find([])
    with pytest.raises(ValueError, match="open molecule"):
        matching.find([atom.replace(cell=np.eye(3) * 9)])
    rng = np.random.default_rng(0)
    cloud = [Structure(np.ones(8, dtype=int), rng.normal(0, 2.0, (8, 3))) for _ in range(12)]
    with pytest.raises(ValueError, match="more than 100"):
        matching.find(cloud)
