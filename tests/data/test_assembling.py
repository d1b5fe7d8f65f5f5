"""Molecules are put together without clashes and as far apart as asked."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_mlff.data import assembling
from openmm_mlff.data.parts import make_part

pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")


@pytest.mark.parametrize("n", [1, 2, 6])
def test_waters_touch_but_do_not_overlap(n: int) -> None:
    rng = np.random.default_rng(n)
    numbers, x = assembling.add_waters(np.array([11]), np.zeros((1, 3)), np.array([1.0]), n, rng)
    assert numbers.tolist() == [11] + [8, 1, 1] * n
    waters = x[1:].reshape(n, 3, 3)
    for k, water in enumerate(waters):
        np.testing.assert_allclose(np.linalg.norm(water[1:] - water[0], axis=1), 0.96, atol=1e-9)
        others = np.delete(np.arange(len(x)), [1 + 3 * k, 2 + 3 * k, 3 + 3 * k])
        assert not assembling.clash(np.array([8, 1, 1]), water, numbers[others], x[others])
        assert assembling.distances_between(water[:1], x[others][numbers[others] > 1]).min() < 3.2
    # the oxygen of the first water looks at the cation, as its charge wants
    assert np.linalg.norm(waters[0][0]) < np.linalg.norm(waters[0][1:], axis=1).min()


def test_waters_without_a_solute() -> None:
    empty = np.empty(0, dtype=np.int64)
    numbers, x = assembling.add_waters(empty, np.empty((0, 3)), np.empty(0), 4, np.random.default_rng(1))
    assert numbers.tolist() == [8, 1, 1] * 4 and x.shape == (12, 3)


def test_a_water_without_a_place_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembling, "closest_allowed", lambda a, b: np.full((len(a), len(b)), 9.0))
    with pytest.raises(RuntimeError, match="water 1 of 1"):
        assembling.add_waters(np.array([11]), np.zeros((1, 3)), np.ones(1), 1, np.random.default_rng(1))


@pytest.mark.parametrize("distance", [1.7, 2.5, 6.0])
def test_contacts_have_their_distance_and_face_each_other(distance: float) -> None:
    donor, acceptor = make_part("donor", "C[NH2+][H:1]"), make_part("acceptor", "CC(=[O:1])C")
    a, b = ((p.numbers, p.conformers[0], p.bonds, p.marks[1]) for p in (donor, acceptor))
    angles = []
    for seed in range(10):
        moved = assembling.place_in_contact(a, b, distance, np.random.default_rng(seed))
        contact = moved[acceptor.marks[1]] - donor.conformers[0][donor.marks[1]]
        assert np.linalg.norm(contact) == pytest.approx(distance)
        # rigid
        np.testing.assert_allclose(
            assembling.distances_between(moved, moved),
            assembling.distances_between(acceptor.conformers[0], acceptor.conformers[0]),
            atol=1e-9,
        )
        bond = donor.conformers[0][donor.marks[1]] - donor.conformers[0][1]
        angles.append(np.degrees(np.arccos(contact @ bond / np.linalg.norm(contact) / np.linalg.norm(bond))))
    assert np.median(angles) < 45.0


@pytest.mark.parametrize("gap", [4.0, 12.0])
def test_fragments_are_exactly_as_far_apart_as_asked(gap: float) -> None:
    first, second = make_part("a", "CCCO").conformers[0], make_part("b", "c1ccccc1").conformers[0]
    for seed in range(5):
        moved = assembling.place_apart(first, second, gap, np.random.default_rng(seed))
        assert assembling.distances_between(first, moved).min() == pytest.approx(gap, abs=2e-3)


def test_rotations_are_proper_and_uniform() -> None:
    rng = np.random.default_rng(0)
    turns = np.array([assembling.random_rotation(rng) for _ in range(2000)])
    np.testing.assert_allclose(np.einsum("nij,nkj->nik", turns, turns), np.eye(3)[None].repeat(2000, 0), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1.0)
    # every entry of a uniform rotation has mean 0 and mean square 1/3; five standard errors
    assert np.abs(turns.mean(axis=0)).max() < 5 * np.sqrt(1 / 3 / 2000)
    assert np.abs((turns**2).mean(axis=0) - 1 / 3).max() < 5 * np.sqrt(4 / 45 / 2000)
