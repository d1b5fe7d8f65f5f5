"""Batches that training takes equal what `Potential.batch` builds, and the order is a function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.training.batching import LabelledSet
from openmm_mlff.training.force_matching import evaluate_batch


def box(seed: int, length: float = 6.0) -> Structure:
    rng = np.random.default_rng(seed)
    grid = np.array([[i, j, 0.5] for i in range(2) for j in range(2)], dtype=np.float64) * 2.5
    positions = grid + rng.normal(0, 0.1, (4, 3))
    cell = length * np.eye(3) + rng.normal(0, 0.2, (3, 3))
    return Structure(np.array([8, 1, 1, 8]), positions, cell=cell, energy=1.0, forces=np.zeros((4, 3)), group=str(seed))


@pytest.mark.parametrize("sizes", [[5, 5, 5], [3, 40, 7], [1, 2, 3]])
def test_a_batch_gives_what_single_structures_give(tiny, clusters, sizes) -> None:
    model = tiny()
    structures = clusters(sizes, seed=2)
    labelled = LabelledSet(structures, model).batch([2, 0, 1])
    for _ in range(2):
        result = evaluate_batch(model, labelled)
        atom = 0
        for k, i in enumerate([2, 0, 1]):
            energy, forces = model.energy_and_forces(structures[i])
            n = len(structures[i])
            assert float(result.energy[k].detach()) == pytest.approx(energy, abs=1e-9)
            np.testing.assert_allclose(result.forces[atom : atom + n].detach().numpy(), forces, atol=1e-9)
            np.testing.assert_array_equal(labelled.labels.forces[atom : atom + n].numpy(), structures[i].forces)
            assert float(labelled.labels.energy[k]) == structures[i].energy
            atom += n


def test_periodic_batches(tiny) -> None:
    model = tiny(long_range_cutoff=6.0)
    structures = [box(1), box(2, 7.5)]
    result = evaluate_batch(model, LabelledSet(structures, model).batch([1, 0]))
    for k, i in enumerate([1, 0]):
        energy, forces = model.energy_and_forces(structures[i])
        assert float(result.energy[k].detach()) == pytest.approx(energy, abs=1e-9)
        np.testing.assert_allclose(result.forces[4 * k : 4 * k + 4].detach().numpy(), forces, atol=1e-9)


def test_dipoles_of_ions_move_with_the_origin(tiny) -> None:
    model = tiny()
    positions = np.array([[10.0, 0.0, 0.0], [10.9, 0.0, 0.0]])
    ion = Structure(np.array([8, 1]), positions, charge=-1, dipole=np.array([-10.0, 0.5, 0.0]), group="a")
    labelled = LabelledSet([ion], model).batch([0])
    # about the mean position (10.45, 0, 0): mu' = mu - Q R0
    np.testing.assert_allclose(labelled.labels.dipole.numpy(), [[0.45, 0.5, 0.0]], atol=1e-12)
    prediction = model(labelled.batch)
    direct = model(model.batch(ion))
    shift = direct.dipole - prediction.dipole
    np.testing.assert_allclose(shift.detach().numpy(), [[-10.45, 0.0, 0.0]], atol=1e-9)


def test_missing_labels_are_nan_in_mixed_sets_and_none_if_nobody_has_them(tiny, waters) -> None:
    structures = waters(3, seed=0)
    structures[1] = structures[1].replace(dipole=None)
    structures = [s.replace(charges=None) for s in structures]
    labels = LabelledSet(structures, tiny()).batch([0, 1]).labels
    assert labels.charges is None
    assert not labels.dipole[0].isnan().any() and labels.dipole[1].isnan().all()


def test_epochs_are_a_function_of_the_seed(tiny, clusters) -> None:
    data = LabelledSet(clusters([4, 9, 4, 9, 4, 4, 9, 4, 4, 4, 4], seed=0), tiny())
    first = data.epoch(seed=3, epoch=0, batch_size=3)
    again = LabelledSet(data.structures, tiny()).epoch(seed=3, epoch=0, batch_size=3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first) == 3 and all(len(b) == 3 for b in first)
    used = np.concatenate(first)
    assert len(set(used.tolist())) == 9
    others = [np.concatenate(data.epoch(3, e, 3)) for e in range(1, 30)]
    assert any(not np.array_equal(used, o) for o in others)
    # what one epoch leaves out comes in another
    assert set(np.concatenate(others).tolist()) == set(range(11))
    # sizes are mixed in no more than one batch, where the two groups of sizes meet
    for batches in (data.epoch(3, e, 3) for e in range(10)):
        assert sum(len({len(data.structures[i]) for i in b}) > 1 for b in batches) <= 1


def test_batches_by_atoms_hold_all_sizes(tiny, clusters) -> None:
    sizes = [3] * 40 + [10] * 20 + [40] * 10
    data = LabelledSet(clusters(sizes, seed=0), tiny())
    for batch_atoms, batch_size in ((150, 100), (400, 100), (150, 5)):
        epochs = [data.epoch(3, e, batch_size, batch_atoms) for e in range(4)]
        assert len({len(batches) for batches in epochs}) == 1, "a resumed run counts on it"
        for batches in epochs:
            assert sorted(np.concatenate(batches).tolist()) == list(range(70))
            atoms = [int(data.sizes[b].sum()) for b in batches]
            assert max(atoms) <= batch_atoms + 40 and max(len(b) for b in batches) <= batch_size
            assert max(atoms) - min(atoms) <= 40
            # every batch has its part of the large ones
            large = [int((data.sizes[b] == 40).sum()) for b in batches]
            assert max(large) - min(large) <= 1
    again = data.epoch(3, 2, 5, 150)
    assert all(np.array_equal(a, b) for a, b in zip(again, epochs[2], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(again, epochs[1], strict=True))


def test_shares_have_about_the_same_work(tiny, clusters) -> None:
    data = LabelledSet(clusters([3, 40, 7, 30, 12, 5, 22, 9], seed=0), tiny())
    parts = data.share(np.arange(8), 3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(8))
    atoms = [int(data.sizes[p].sum()) for p in parts]
    assert max(atoms) - min(atoms) <= 3
    # structures of one size are cut where they are, and there may be too few
    same = LabelledSet(clusters([4, 4, 4], seed=0), tiny())
    assert [p.tolist() for p in same.share(np.array([2, 0, 1]), 2)] == [[2, 0], [1]]
    assert [len(p) for p in data.share(np.array([1, 0]), 3)] == [1, 1, 0]


def test_chunks_by_atoms(tiny, clusters) -> None:
    data = LabelledSet(clusters([3, 40, 7, 30, 12, 5, 22, 9], seed=0), tiny())
    chunks = data.chunks(3, 35)
    assert [data.sizes[c].tolist() for c in chunks] == [[3, 5, 7], [9, 12], [22], [30], [40]]


def test_small_sets_and_chunks_use_everything(tiny, waters) -> None:
    data = LabelledSet(waters(5, seed=0), tiny())
    assert sorted(data.epoch(0, 0, 8)[0].tolist()) == list(range(5))
    assert sorted(np.concatenate(data.chunks(2)).tolist()) == list(range(5))


def test_atoms_that_the_model_does_not_know_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="got Ar"):
        LabelledSet([Structure(np.array([18]), np.zeros((1, 3)))], tiny())
    with pytest.raises(ValueError, match="structures: expected at least one"):
        LabelledSet([], tiny())


def test_positions_keep_their_precision_far_from_the_origin(tiny, waters) -> None:
    model = tiny(torch.float32)
    near = waters(1, seed=1)[0]
    far = near.replace(positions=near.positions + 4096.0)
    found = [float(model(LabelledSet([s], model).batch([0]).batch).energy.detach()) for s in (near, far)]
    assert found[0] == pytest.approx(found[1], abs=2e-5)
