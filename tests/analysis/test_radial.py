"""Radial distribution functions against crystals, an ideal gas, and mdtraj."""

from __future__ import annotations

from typing import Any

import mdtraj
import numpy as np
import pytest

from openmm_mlff.analysis.radial import neighbors_within, radial_distribution


def gas(frames: int, atoms: int, side: float, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.0, side, (frames, atoms, 3))


def test_coordination_numbers_of_a_simple_cubic_crystal() -> None:
    side = np.arange(6) * 2.0
    crystal = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(1, -1, 3)
    box, everyone = np.eye(3) * 12.0, np.arange(crystal.shape[1])
    # 6 neighbours at a, 12 at sqrt(2) a, 8 at sqrt(3) a, 6 at 2 a
    for radius, expected in ((2.2, 6), (3.0, 18), (3.6, 26), (4.2, 32)):
        assert neighbors_within(crystal, everyone, everyone, radius, box) == pytest.approx([expected])
    found = radial_distribution(crystal, everyone, everyone, np.array([1.0, 2.2, 3.0, 3.6, 4.2]), box)
    np.testing.assert_allclose(found.coordination, [6, 18, 26, 32])


def test_what_is_below_the_first_edge_counts_as_coordination() -> None:
    dimer = np.array([[[0.0, 0.0, 0.0], [0.9, 0.0, 0.0], [0.0, 2.5, 0.0]]])
    found = radial_distribution(dimer, np.array([0]), np.array([1, 2]), np.array([2.0, 3.0]), density=0.1)
    assert found.coordination == pytest.approx([2.0])
    assert found.g == pytest.approx([1.0 / (4.0 / 3.0 * np.pi * (27.0 - 8.0) * 0.1)])


def test_an_ideal_gas_has_no_structure() -> None:
    box = np.eye(3) * 20.0
    positions, edges = gas(60, 120, 20.0), np.linspace(2.0, 10.0, 9)
    everyone = np.arange(120)
    for others in (everyone, everyone[60:]):
        found = radial_distribution(positions, everyone[:60] if len(others) == 60 else everyone, others, edges, box)
        # each bin has 20,000 pairs at least
        np.testing.assert_allclose(found.g, 1.0, atol=0.05)


def test_agrees_with_mdtraj() -> None:
    side, edges = 16.0, np.linspace(0.0, 8.0, 17)
    positions = gas(5, 60, side, seed=2)
    centers, others = np.arange(20), np.arange(20, 60)
    topology = mdtraj.Topology()
    residue = topology.add_residue("X", topology.add_chain())
    for _ in range(60):
        topology.add_atom("X", mdtraj.element.argon, residue)
    trajectory = mdtraj.Trajectory(
        0.1 * positions, topology, unitcell_lengths=np.full((5, 3), 0.1 * side), unitcell_angles=np.full((5, 3), 90.0)
    )
    pairs = np.array([(i, j) for i in centers for j in others])
    _, g = mdtraj.compute_rdf(trajectory, pairs, r_range=(0.0, 0.8), n_bins=16)
    found = radial_distribution(positions, centers, others, edges, np.eye(3) * side)
    # float32 there: a distance on an edge may fall into the next bin
    np.testing.assert_allclose(found.g, g, rtol=1e-3, atol=1e-3)


def test_in_a_triclinic_box_the_nearest_image_counts() -> None:
    box = np.array([[10.0, 0.0, 0.0], [3.0, 9.0, 0.0], [-2.0, 2.0, 9.5]])
    positions = np.array([[[0.2, 0.3, 0.1], [0.2, 0.3, 0.1]]]) + np.array(
        [[0.0] * 3, box[2] + box[1] + [0.0, 1.5, 0.0]]
    )
    assert neighbors_within(positions, np.array([0]), np.array([1]), 1.6, box) == pytest.approx([1.0])
    assert neighbors_within(positions, np.array([0]), np.array([1]), 1.4, box) == pytest.approx([0.0])
    assert neighbors_within(positions, np.array([0]), np.array([1]), 1.6) == pytest.approx([0.0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positions": np.zeros((4, 3))}, r"positions: expected shape \(n_frames, n_atoms, 3\), got \(4, 3\)"),
        ({"centers": np.array([7])}, "centers: expected indices from 0 to 3"),
        ({"others": np.array([0.5])}, "others: expected indices of atoms"),
        ({"edges": np.array([2.0, 1.0])}, "edges: expected at least two numbers"),
        ({"edges": np.array([0.0, 6.0])}, r"edges: expected at most half of the box \(5.000 angstrom\), got 6.000"),
        ({"box": np.ones(3)}, "box: expected vectors as rows"),
        ({"box": None}, "density: expected a number"),
        ({"density": 0.0}, "density: expected a positive number"),
    ],
)
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "positions": np.zeros((1, 4, 3)),
        "centers": np.array([0]),
        "others": np.array([1, 2]),
        "edges": np.array([0.0, 4.0]),
        "box": 10.0 * np.eye(3),
    }
    with pytest.raises(ValueError, match=message):
        radial_distribution(**(given | changed))
