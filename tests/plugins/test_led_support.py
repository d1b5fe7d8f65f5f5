"""The support of training data in latent space."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_led.support import NEIGHBOURS, Support, cell_width, choose_points


@pytest.mark.parametrize("d", [1, 2, 4, 6])
def test_points_near_the_data_are_inside_and_others_not(d: int) -> None:
    random = np.random.default_rng(d)
    points = random.uniform(-1, 1, (3000, d)) * np.where(np.arange(d) < 2, 1.0, 0.05)
    points[: len(points) // 2, 0] += 5.0  # two islands
    support = Support(points, 1.0, np.inf, 0.2)
    assert support.inside(points).all()
    near = points[:500] + random.uniform(-1, 1, (500, d)) * (0.19 if d <= 4 else 0.02)
    assert support.inside(near).mean() > (0.999 if d <= 4 else 0.9)
    between = points[:500].copy()
    between[:, 0] = 2.5
    assert not support.inside(between).any()
    assert not support.inside(np.full((3, d), [[1e3], [-1e3], [50.0]])).any()


def test_distance_is_that_of_the_fifth_neighbour() -> None:
    random = np.random.default_rng(0)
    points, z = random.standard_normal((200, 3)), random.standard_normal((20, 3))
    expected = np.sort(np.linalg.norm(z[:, None] - points, axis=-1), axis=1)[:, NEIGHBOURS - 1]
    np.testing.assert_allclose(Support(points, 1.0, np.inf, 0.1).far(z), expected)


def test_cells_are_as_narrow_as_validation_data_allow() -> None:
    random = np.random.default_rng(0)
    dense, sparse = random.uniform(0, 1, (20_000, 2)), random.uniform(0, 1, (20, 2))
    valid = random.uniform(0, 1, (2000, 2))
    assert cell_width(dense, valid) == 0.1
    wide = cell_width(sparse, valid)
    assert wide > 0.1
    assert Support(sparse, 1.0, np.inf, wide).inside(valid).mean() >= 0.999


def test_rare_states_keep_their_points() -> None:
    random = np.random.default_rng(0)
    points = np.concatenate([random.normal(0, 0.1, (100_000, 2)), random.normal(5, 0.1, (100, 2))])
    chosen = choose_points(points, 1000, seed=1)
    assert len(chosen) == 1000 and (chosen[:, 0] > 3).sum() > 50
    np.testing.assert_array_equal(chosen, choose_points(points, 1000, seed=1))
    assert len(choose_points(points[:10], 1000, seed=1)) == 10
