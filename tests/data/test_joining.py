"""Molecules joined far apart have the labels that a calculation gives them."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_mlff.data.joining import join_apart
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.structures import Structure

WATER = Structure(
    np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.97, 0, 0], [-0.243, 0.939, 0]]), group="water", info={"class": "w"}
)
AMMONIUM = Structure(
    np.array([7, 1, 1, 1, 1]),
    1.03 / np.sqrt(3) * np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.1]]),
    charge=1, group="ammonium",
)  # fmt: skip
METHYL = Structure(
    np.array([6, 1, 1, 1]), np.array([[0.0, 0, 0.1], [1.08, 0, 0], [-0.54, 0.94, 0], [-0.54, -0.94, 0]]),
    multiplicity=2, group="methyl",
)  # fmt: skip


def test_labels_are_those_of_a_calculation() -> None:
    pytest.importorskip("tblite")
    method = TBLite()
    labelled = [method.label(s) for s in (WATER, AMMONIUM, METHYL)]
    found = join_apart(labelled, 16, seed=1)
    kinds = {(s.charge, s.multiplicity) for s in found}
    assert kinds == {(0, 1), (1, 1), (0, 2)}
    for one in {(s.charge, s.multiplicity): s for s in found}.values():
        expected = method.label(one)
        assert expected.energy is not None and expected.forces is not None and one.forces is not None
        assert one.energy == pytest.approx(expected.energy, abs=1e-3)
        np.testing.assert_allclose(one.forces, expected.forces, atol=2e-3)
        assert one.charges is not None and expected.charges is not None
        np.testing.assert_allclose(one.charges, expected.charges, atol=2e-3)


def test_what_is_joined() -> None:
    labelled = [s.replace(energy=float(k), forces=np.full((len(s), 3), k)) for k, s in enumerate((WATER, AMMONIUM))]
    big = Structure(np.full(20, 6), 3.0 * np.arange(60).reshape(20, 3), energy=7.0, forces=np.zeros((20, 3)))
    bare = WATER.replace(group="bare")
    boxed = labelled[0].replace(cell=9.0 * np.eye(3), group="boxed")
    found = join_apart([*labelled, big, bare, boxed], 40, seed=0)
    assert len(found) == 40 and sum(s.charge == 1 for s in found) >= 20
    for s in found:
        # the water with labels is the only small neutral one
        assert s.info["joined_with"] == "water" and s.numbers[-3:].tolist() == [8, 1, 1] and s.dipole is None
        first = {5: labelled[1], 3: labelled[0], 20: big}[len(s) - 3]
        assert s.energy == first.energy and s.charge == first.charge and s.group == first.group
        np.testing.assert_array_equal(s.positions[:-3], first.positions)
        gap = s.positions[-3:].mean(0) - s.positions[:-3].mean(0)
        assert np.linalg.norm(gap) == pytest.approx(100.0)
    again = join_apart([*labelled, big, bare, boxed], 40, seed=0)
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(found, again, strict=True))
    assert join_apart([big], 0, seed=0) == []
    with pytest.raises(ValueError, match="expected neutral singlets of at most 12 atoms to be joined, found none"):
        join_apart([labelled[1], big], 1, seed=0)
    with pytest.raises(ValueError, match="distance: expected a positive length"):
        join_apart(labelled, 1, seed=0, distance=0.0)
