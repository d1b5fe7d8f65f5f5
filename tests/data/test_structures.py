"""Structures, batches and neighbour tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import (
    NeighborMatrix,
    Pairs,
    Structure,
    check_charge_and_multiplicity,
    collate,
    formula,
)
from openmm_mlff.potentials.neighbors import all_pairs, pairs_within

WATER = Structure([8, 1, 1], [[0.0, 0.0, 0.1], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]])
HYDROXIDE = Structure([8, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.97]], charge=-1)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([1, 8, 1], "H2O"), ([8, 6, 1, 1, 6], "C2H2O"), ([17, 11], "ClNa"), ([1], "H"), ([7, 1, 1, 1], "H3N")],
)
def test_hill_formula(numbers: list[int], expected: str) -> None:
    assert formula(numbers) == expected


@pytest.mark.parametrize(
    ("numbers", "charge", "multiplicity"),
    [([8, 1, 1], 0, 1), ([8, 1, 1], 1, 2), ([8, 8], 0, 3), ([1], 0, 2), ([1], 1, 1), ([2], 2, 1), ([6, 1, 1], 0, 3)],
)
def test_possible_charges_and_spins(numbers: list[int], charge: int, multiplicity: int) -> None:
    check_charge_and_multiplicity(numbers, charge, multiplicity)


@pytest.mark.parametrize(
    ("numbers", "charge", "multiplicity", "message"),
    [
        ([8, 1, 1], 0, 2, "10 electrons.*1, 3, 5"),
        ([8, 1, 1], 1, 1, "9 electrons.*2, 4, 6"),
        ([1], 0, 4, "at most 2"),
        ([1], 2, 1, "at most 1"),
        ([1], 1, 3, "0 electrons"),
        ([8, 1, 1], 0.5, 1, "charge: expected a whole number"),
        ([8, 1, 1], 0, 0, "multiplicity: expected 2S"),
        ([8, 1, 1], 0, 1.5, "multiplicity: expected 2S"),
    ],
)
def test_impossible_charges_and_spins(numbers: list[int], charge: float, multiplicity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_charge_and_multiplicity(numbers, charge, multiplicity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": []}, "numbers: expected shape"),
        ({"numbers": [[8, 1, 1]]}, "numbers: expected shape"),
        ({"numbers": [8, 1, 0]}, "numbers: expected atomic numbers 1 to 118, got 0"),
        ({"numbers": [8, 1, 119]}, "got 119"),
        ({"numbers": [8, 1, 1.5]}, "numbers: expected whole atomic numbers"),
        ({"numbers": ["O", "H", "H"]}, "numbers: expected whole atomic numbers"),
        ({"positions": np.zeros((2, 3))}, r"positions: expected shape \(3, 3\), got \(2, 3\)"),
        ({"positions": np.full((3, 3), np.nan)}, "positions: expected finite"),
        ({"cell": np.ones(3)}, r"cell: expected shape \(3, 3\)"),
        ({"cell": np.ones((3, 3))}, "cell: expected three independent box vectors"),
        ({"forces": np.zeros((3, 2))}, "forces: expected shape"),
        ({"energy": float("inf")}, "energy: expected a finite number"),
        ({"dipole": np.zeros(2)}, "dipole: expected shape"),
        ({"charges": np.zeros(4)}, "charges: expected shape"),
        ({"charge": 0.5}, "charge: expected a whole number, got 0.5"),
        ({"charge": None}, "charge: expected a whole number, got None"),
        ({"charge": float("nan")}, "charge: expected a whole number, got nan"),
        ({"multiplicity": 0}, "multiplicity: expected a whole number, at least 1, got 0"),
        ({"multiplicity": 2.5}, "multiplicity: expected a whole number"),
    ],
    ids=str,
)
def test_impossible_structures_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WATER.replace(**changes)


def test_structure_takes_whole_floats_and_lists() -> None:
    s = Structure([8.0, 1.0], [[0, 0, 0], [0, 0, 1]], charge=np.float64(-1.0), multiplicity=np.int32(1))
    assert s.numbers.dtype == np.int64 and s.positions.dtype == np.float64
    assert s.charge == -1 and type(s.charge) is int and s.multiplicity == 1
    assert len(s) == 2 and s.formula == "HO"


def test_collate_lays_structures_end_to_end() -> None:
    batch = collate([WATER, HYDROXIDE])
    assert batch.numbers.tolist() == [8, 1, 1, 8, 1]
    assert batch.segment.tolist() == [0, 0, 0, 1, 1]
    assert batch.charge.tolist() == [0.0, -1.0] and batch.multiplicity.tolist() == [1.0, 1.0]
    assert batch.n_atoms == 5 and batch.n_structures == 2 and batch.counts.tolist() == [3, 2]
    np.testing.assert_array_equal(batch.positions.numpy(), np.concatenate([WATER.positions, HYDROXIDE.positions]))


def test_collate_refuses_none_and_mixtures() -> None:
    with pytest.raises(ValueError, match="structures: expected at least one"):
        collate([])
    with pytest.raises(ValueError, match="all open or all periodic"):
        collate([WATER, WATER.replace(cell=10 * np.eye(3))])


@pytest.mark.parametrize("structures", [[WATER, HYDROXIDE, WATER], [WATER, WATER], [HYDROXIDE]], ids=len)
def test_dense_tables_go_there_and_back(structures: list[Structure]) -> None:
    batch = collate(structures)
    x = torch.arange(batch.n_atoms * 2, dtype=torch.float64).reshape(-1, 2)
    table = batch.to_dense(x, fill=-7.0)
    assert table.shape == (len(structures), max(map(len, structures)), 2)
    for k, s in enumerate(structures):
        assert torch.equal(table[k, : len(s)], x[batch.segment == k])
        assert bool((table[k, len(s) :] == -7.0).all())
    assert torch.equal(batch.from_dense(table), x)


def test_sums_by_structure() -> None:
    batch = collate([WATER, HYDROXIDE])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 10.0]])
    assert batch.sum_by_structure(x).tolist() == [[9.0, 12.0], [16.0, 18.0]]
    assert collate([WATER]).sum_by_structure(x[:3]).tolist() == [[9.0, 12.0]]


def test_pair_vectors_of_several_boxes() -> None:
    cells = [np.diag([5.0, 6.0, 7.0]), np.array([[4.0, 0, 0], [1.0, 5.0, 0], [0.5, -1.0, 6.0]])]
    batch = collate([WATER.replace(cell=cells[0]), HYDROXIDE.replace(cell=cells[1])])
    pairs = Pairs(
        torch.tensor([0, 3, 4]), torch.tensor([2, 4, 4]), torch.tensor([[1.0, 0, -1], [0, 2, 0], [-1, 1, 1]]).double()
    )
    expected = [
        WATER.positions[2] - WATER.positions[0] + cells[0][0] - cells[0][2],
        HYDROXIDE.positions[1] - HYDROXIDE.positions[0] + 2 * cells[1][1],
        -cells[1][0] + cells[1][1] + cells[1][2],
    ]
    np.testing.assert_allclose(batch.pair_vectors(pairs).numpy(), expected, atol=1e-14)


def test_neighbor_table_holds_the_pairs() -> None:
    rng = np.random.default_rng(0)
    structure = Structure(np.full(12, 6), rng.random((12, 3)) * 5.0, cell=5.0 * np.eye(3))
    batch = collate([structure, structure.replace(positions=rng.random((12, 3)) * 5.0)])
    pairs = pairs_within(batch, 2.7, half=False)
    batch = batch.replace(pairs=pairs)
    table = batch.neighbors
    assert int(table.mask.sum()) == len(pairs)
    assert bool((table.index[~table.mask] == torch.arange(24)[:, None].expand_as(table.index)[~table.mask]).all())
    # row by row, in the order of the list
    vectors = batch.neighbor_vectors()
    assert torch.equal(vectors[table.mask], batch.pair_vectors(pairs))
    assert bool((vectors[~table.mask] == 0).all())
    wider = NeighborMatrix.from_pairs(pairs, 24, n_slots=table.index.shape[1] + 3)
    assert torch.equal(wider.index[:, : table.index.shape[1]], table.index) and int(wider.mask.sum()) == len(pairs)
    with pytest.raises(ValueError, match=rf"n_slots: expected at least {table.index.shape[1]}, got 1"):
        NeighborMatrix.from_pairs(pairs, 24, n_slots=1)


def test_neighbor_table_of_lonely_atoms() -> None:
    batch = collate([Structure([1], np.zeros((1, 3)))])
    table = batch.replace(pairs=all_pairs(batch.counts, half=False)).neighbors
    assert table.index.tolist() == [[0]] and table.mask.tolist() == [[False]]
    with pytest.raises(ValueError, match="pairs: expected a batch with a pair list"):
        _ = batch.neighbors


def test_moved_batches_share_what_was_derived() -> None:
    batch = collate([WATER, HYDROXIDE])
    batch = batch.replace(pairs=all_pairs(batch.counts, half=False))
    table, slot = batch.neighbors, batch.dense_slot
    moved = batch.at(batch.positions + 1.0)
    assert moved.neighbors is table and moved.dense_slot is slot
    assert torch.equal(moved.positions, batch.positions + 1.0)
    other = batch.replace(pairs=all_pairs(batch.counts, half=True))
    assert other.neighbors is not table and int(other.neighbors.mask.sum()) == 4


def test_dtype_changes_spare_the_integers() -> None:
    batch = collate([WATER.replace(cell=9.0 * np.eye(3))])
    single = batch.replace(pairs=pairs_within(batch, 3.0, half=False)).to(dtype=torch.float32)
    assert single.pairs is not None and single.pairs.offsets is not None and single.cell is not None
    assert single.positions.dtype == single.pairs.offsets.dtype == single.cell.dtype == torch.float32
    assert single.numbers.dtype == single.pairs.first.dtype == torch.int64
