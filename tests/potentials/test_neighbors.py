"""Pair lists against a search of all images, and the Verlet list against fresh lists."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials import neighbors
from openmm_mlff.potentials.neighbors import VerletPairs, all_pairs, pairs_within, with_pairs
from openmm_mlff.testing.systems import brute_force_pairs, compare_pairs

BOXES = {
    "open": None,
    "cubic": np.eye(3) * 9.0,
    "orthorhombic": np.diag([6.0, 9.0, 14.0]),
    "triclinic": np.array([[8.0, 0.0, 0.0], [2.0, 7.5, 0.0], [-3.0, 2.5, 8.2]]),
    "strongly skewed": np.array([[8.0, 0.0, 0.0], [23.0, 7.0, 0.0], [-15.0, 30.0, 9.0]]),
    "not in OpenMM's form": np.array([[3.0, 5.0, 1.0], [-4.0, 4.0, 2.0], [1.0, -2.0, 7.0]]),
    "left-handed": np.diag([7.0, 8.0, -9.0]),
    "narrower than the cutoff": np.diag([3.0, 20.0, 4.0]),
    "tiny": np.array([[1.9, 0.0, 0.0], [0.7, 2.0, 0.0], [-0.3, 0.6, 2.1]]),
}


def system(box: str, n: int = 14, seed: int = 0) -> Structure:
    """Random points, some of them several boxes away from the first one."""
    rng = np.random.default_rng(seed)
    cell = BOXES[box]
    n = 2 if box == "tiny" else n
    scale = np.eye(3) * 7.0 if cell is None else cell
    positions = (rng.random((n, 3)) + rng.integers(-1, 3, (n, 3)) * (cell is not None)) @ scale
    return Structure(np.full(n, 6), positions, cell=cell)


@pytest.mark.parametrize("half", [False, True], ids=["directed", "half"])
@pytest.mark.parametrize("cutoff", [1.5, 4.3, 5.3])
@pytest.mark.parametrize("box", BOXES)
def test_all_images_are_found(box: str, cutoff: float, half: bool) -> None:
    structure = system(box)
    pairs = pairs_within(collate([structure]), cutoff, half)
    assert (pairs.offsets is None) == (structure.cell is None)
    compare_pairs(pairs, structure, cutoff, half)


def test_brute_force_on_a_lattice() -> None:
    """The judge itself: coordination shells of simple cubic, 6 + 12 + 8 neighbours; and of fcc, 12 + 6."""
    cubic = Structure([6], np.zeros((1, 3)), cell=2.0 * np.eye(3))
    for cutoff, count in [(2.01, 6), (2.84, 18), (3.47, 26), (4.01, 32)]:
        assert len(brute_force_pairs(cubic, cutoff)) == count
    fcc = Structure([6], np.zeros((1, 3)), cell=2.0 * np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]]))
    assert len(brute_force_pairs(fcc, 2.0 * np.sqrt(2) + 0.01)) == 12
    assert len(brute_force_pairs(fcc, 4.01)) == 18


@pytest.mark.parametrize("half", [False, True], ids=["directed", "half"])
def test_lists_are_sorted_and_lie_within_the_cutoff(half: bool) -> None:
    batch = collate([system("triclinic", seed=s) for s in (1, 2)])
    pairs = pairs_within(batch, 4.0, half)
    assert pairs.offsets is not None
    keys = list(zip(pairs.first.tolist(), pairs.second.tolist(), *pairs.offsets.T.tolist(), strict=True))
    assert keys == sorted(keys)
    assert float(batch.pair_vectors(pairs).norm(dim=-1).max()) < 4.0
    assert bool((batch.segment[pairs.first] == batch.segment[pairs.second]).all())


def test_batches_are_lists_of_their_structures() -> None:
    structures = [system("cubic", n) for n in (3, 9, 1)]
    together = pairs_within(collate(structures), 5.0, half=False)
    start = 0
    for structure in structures:
        alone = pairs_within(collate([structure]), 5.0, half=False)
        here = (together.first >= start) & (together.first < start + len(structure))
        assert torch.equal(together.first[here] - start, alone.first)
        assert torch.equal(together.second[here] - start, alone.second)
        assert together.offsets is not None and alone.offsets is not None
        assert torch.equal(together.offsets[here], alone.offsets)
        start += len(structure)


@pytest.mark.parametrize("half", [False, True], ids=["directed", "half"])
@pytest.mark.parametrize("share", [1, 700, 1 << 20], ids=["one by one", "some", "all at once"])
def test_many_small_structures_have_the_lists_of_one_by_one(
    share: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate([system("open", n, seed=n) for n in (30, 3, 12, 1, 1, 25, 12)])
    monkeypatch.setattr(neighbors, "DENSE_PAIRS", share)
    together = pairs_within(batch, 4.0, half)
    monkeypatch.setattr(neighbors, "DENSE_MAX_ATOMS", 0)
    by_vesin = pairs_within(batch, 4.0, half)
    assert len(together) > 100
    assert together.offsets is None
    assert torch.equal(together.first, by_vesin.first) and torch.equal(together.second, by_vesin.second)


@pytest.mark.parametrize("dense", [0, 64], ids=["vesin", "together"])
def test_atoms_are_counted_within_their_structure(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "DENSE_MAX_ATOMS", dense)
    batch = collate([system("open", n) for n in (7, 5, 6)])
    positions = batch.positions.clone()
    batch.positions[7 + 3] = batch.positions[7 + 1]
    with pytest.raises(ValueError, match="positions: atoms 1 and 3 are at the same place"):
        pairs_within(batch, 3.0, half=True)
    with pytest.raises(ValueError, match="got NaN or infinity for atom 4"):
        positions[7 + 4, 0] = float("inf")
        pairs_within(batch.replace(positions=positions), 3.0, half=False)


@pytest.mark.parametrize("half", [False, True], ids=["directed", "half"])
def test_all_pairs(half: bool) -> None:
    structures = [system("open", n) for n in (4, 1, 3)]
    pairs = all_pairs(collate(structures).counts, half)
    expected = {(i, j) for a, b in ((0, 4), (4, 5), (5, 8)) for i in range(a, b) for j in range(a, b) if i != j}
    listed = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert listed == sorted(p for p in expected if not half or p[0] < p[1])


@pytest.mark.parametrize("box", ["open", "cubic", "tiny"])
def test_atoms_at_the_same_place_are_named(box: str) -> None:
    structure = system(box, 5)
    positions = structure.positions.copy()
    i, j = (0, 1) if box == "tiny" else (2, 4)
    # the other atom, or its image
    positions[j] = positions[i] + (0 if structure.cell is None else structure.cell[0] - 2 * structure.cell[2])
    with pytest.raises(ValueError, match=rf"positions: atoms ({i} and {j}|{j} and {i}) are at the same place"):
        pairs_within(collate([structure.replace(positions=positions)]), 3.0, half=True)


def test_positions_that_are_not_numbers_are_named() -> None:
    batch = collate([system("open", 40)])
    batch.positions[17, 1] = float("nan")
    with pytest.raises(ValueError, match="positions: expected finite numbers, got NaN or infinity for atom 17"):
        pairs_within(batch, 3.0, half=False)


def test_periodic_long_range_terms_need_a_cutoff() -> None:
    with pytest.raises(ValueError, match="longRangeCutoff: a periodic system needs one"):
        with_pairs(collate([system("cubic")]), 4.0, long_range=True, long_range_cutoff=None)


def test_a_cutoff_far_beyond_an_open_molecule_takes_no_time() -> None:
    batch = collate([Structure(np.array([8, 1, 1]), np.array([[0, 0, 0], [0.9, 0, 0], [-0.3, 0.9, 0]]))])
    started = time.perf_counter()
    pairs = pairs_within(batch, 1e5, half=True)
    assert time.perf_counter() - started < 2.0
    assert [*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)] == [(0, 1), (0, 2), (1, 2)]


def test_open_long_range_pairs_are_all_pairs() -> None:
    structure = system("open", 6).replace(positions=np.random.default_rng(3).random((6, 3)) * 500.0)
    batch = with_pairs(collate([structure]), 4.0, long_range=True, long_range_cutoff=None)
    assert batch.long_range_pairs is not None and len(batch.long_range_pairs) == 15
    batch = with_pairs(collate([structure]), 4.0, long_range=False, long_range_cutoff=None)
    assert batch.long_range_pairs is None


# -- Verlet lists --------------------------------------------------------------------------------------------------


def close_pairs(batch: Batch, structure: Structure, cutoff: float) -> set[tuple[int, ...]]:
    """The listed pairs that are really within the cutoff at the structure's positions."""
    assert batch.pairs is not None
    here = batch.at(
        torch.from_numpy(structure.positions),
        None if structure.cell is None else torch.from_numpy(structure.cell)[None],
    )
    near = here.pair_vectors(batch.pairs).norm(dim=-1) < cutoff
    shifts = torch.zeros(len(near), 3) if batch.pairs.offsets is None else batch.pairs.offsets
    columns = (batch.pairs.first, batch.pairs.second, *shifts.long().T)
    return set(zip(*(c[near].tolist() for c in columns), strict=True))


@pytest.mark.parametrize("box", ["open", "triclinic", "tiny"])
def test_verlet_lists_never_miss_a_pair(box: str) -> None:
    structure, rng = system(box, 40 if box == "open" else 14), np.random.default_rng(4)
    structure = structure.replace(positions=structure.positions * (1.6 if box == "open" else 1.0))
    verlet = VerletPairs(collate([structure]), 3.0, False, None, skin=0.5)
    for step in range(30):
        moved = structure.positions + rng.normal(scale=0.03, size=structure.positions.shape)
        if box == "triclinic" and step == 20:  # an atom is wrapped to the other side of the box
            moved[3] += BOXES[box][1] - BOXES[box][0]
        structure = structure.replace(positions=moved)
        cell = None if structure.cell is None else torch.from_numpy(structure.cell)[None]
        batch = verlet.update(torch.from_numpy(moved), cell)
        assert close_pairs(batch, structure, 3.0) == brute_force_pairs(structure, 3.0), f"step {step}"
    assert 2 < verlet.rebuilds < 20


def test_verlet_lists_follow_the_box() -> None:
    structure = system("cubic")
    verlet = VerletPairs(collate([structure]), 3.0, False, None)
    positions = torch.from_numpy(structure.positions)
    cells = [torch.from_numpy(BOXES["cubic"] * s)[None] for s in (1.0, 1.0, 1.0 + 1e-9, 0.8)]
    rebuilds = []
    for cell in cells:
        batch = verlet.update(positions, cell)
        rebuilds.append(verlet.rebuilds)
        now = structure.replace(cell=cell[0].numpy())
        assert close_pairs(batch, now, 3.0) == brute_force_pairs(now, 3.0)
    assert rebuilds == [1, 1, 2, 3]


@pytest.mark.parametrize("moved", [0.0, 0.24, 0.26])
def test_verlet_lists_are_rebuilt_after_half_the_skin(moved: float) -> None:
    structure = system("cubic")
    verlet = VerletPairs(collate([structure]), 3.0, False, None, skin=0.5)
    cell = torch.from_numpy(BOXES["cubic"])[None]
    positions = torch.from_numpy(structure.positions)
    verlet.update(positions, cell)
    other = positions.clone()
    other[5, 2] += moved
    verlet.update(other, cell)
    assert verlet.rebuilds == (2 if moved > 0.25 else 1)
    assert torch.equal(verlet.reference, other if moved > 0.25 else positions)  # type: ignore[arg-type]


def test_verlet_lists_with_nan_are_rebuilt_and_refused() -> None:
    structure = system("cubic")
    verlet = VerletPairs(collate([structure]), 3.0, False, None)
    positions, cell = torch.from_numpy(structure.positions), torch.from_numpy(BOXES["cubic"])[None]
    verlet.update(positions, cell)
    broken = positions.clone()
    broken[5] = float("nan")
    with pytest.raises(ValueError, match="atom 5"):
        verlet.update(broken, cell)


def test_restored_lists_are_the_same() -> None:
    structure = system("cubic")
    cell = torch.from_numpy(BOXES["cubic"])[None]
    start = torch.from_numpy(structure.positions)
    later = start + 0.1
    first, second = (VerletPairs(collate([structure]), 3.0, True, 5.0) for _ in range(2))
    first.update(start, cell)
    kept = first.update(later, cell)
    # a list that was built a little later holds other pairs
    second.update(later + 0.05 * torch.sin(torch.arange(42.0)).reshape(14, 3), cell)
    assert second.update(later, cell).pairs is not kept.pairs and second.rebuilds == 1
    second.restore(first.reference, first.reference_cell)
    restored = second.update(later, cell)
    assert second.rebuilds == 2 and restored.pairs is not None and kept.pairs is not None
    for a, b in ((kept.pairs, restored.pairs), (kept.long_range_pairs, restored.long_range_pairs)):
        assert a is not None and b is not None and a.offsets is not None and b.offsets is not None
        assert torch.equal(a.first, b.first) and torch.equal(a.second, b.second) and torch.equal(a.offsets, b.offsets)
    second.restore(None)
    assert second.reference is None
    second.update(later, cell)
    assert second.rebuilds == 3


def test_small_open_molecules_never_rebuild() -> None:
    structure = system("open", neighbors.FIXED_PAIRS_MAX_ATOMS)
    verlet = VerletPairs(collate([structure]), 3.0, True, 5.0)
    first = verlet.update(torch.from_numpy(structure.positions), None)
    again = verlet.update(torch.from_numpy(structure.positions * 3.0), None)
    assert verlet.fixed and verlet.rebuilds == 0 and again is first
    n = neighbors.FIXED_PAIRS_MAX_ATOMS
    assert first.pairs is not None and first.long_range_pairs is not None
    assert len(first.pairs) == n * (n - 1) and len(first.long_range_pairs) == n * (n - 1) // 2
    larger = VerletPairs(collate([system("open", n + 1)]), 3.0, True, 5.0)
    assert not larger.fixed


def test_lists_come_in_the_batch_s_precision() -> None:
    batch = collate([system("triclinic")]).to(dtype=torch.float32)
    verlet = VerletPairs(batch, 3.0, True, 5.0)
    assert batch.cell is not None
    built = verlet.update(batch.positions.double(), batch.cell.double())
    assert built.pairs is not None and built.pairs.offsets is not None and built.long_range_pairs is not None
    assert built.pairs.offsets.dtype == built.long_range_pairs.offsets.dtype == torch.float32  # type: ignore[union-attr]
