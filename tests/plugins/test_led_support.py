"""The support of training data in latent space."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_led.support import NEIGHBOURS, Support, build, calibration, choose_points


def islands(seed: int, d: int = 3, crossings: bool = True) -> list[np.ndarray]:
    """Two discs of radius 0.5 around (-2, 0) and (2, 0) in the slow plane; one run crosses between them and back."""
    random = np.random.default_rng(seed)
    angle, radius = random.uniform(0, 2 * np.pi, 20_000), 0.5 * np.sqrt(random.uniform(0, 1, 20_000))
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle), *random.standard_normal((d - 2, 20_000))], -1)
    z[:, 0] -= 2.0
    runs = [z[:10_000].copy(), z[10_000:].copy()]
    runs[1][:, 0] += 4.0
    if crossings:
        runs[0][5000] = np.r_[0.1, 0.2, np.zeros(d - 2)]  # on its way
        runs[0][5001:, 0] += 4.0
    return runs


@pytest.fixture(scope="module")
def support() -> Support:
    return build(islands(0), np.concatenate(islands(1, crossings=False)), n_points=3000, seed=0)


def test_regions_are_the_well_sampled_islands(support: Support) -> None:
    valid = np.concatenate(islands(2, crossings=False))
    found = support.regions.region(valid)
    assert (found > 0).mean() >= 0.995
    left = found[valid[:, 0] < 0]
    right = found[valid[:, 0] > 0]
    assert set(left[left > 0]) & set(right[right > 0]) == set()
    assert len(set(left[left > 0])) == len(set(right[right > 0])) == 1
    assert (support.regions.region(np.array([[0.1, 0.2, 0.0], [50.0, 0.0, 0.0], [-2.0, 30.0, 0.0]])) == 0).all()


def test_states_that_exchange_often_are_one() -> None:
    runs = islands(0)
    back_and_forth = runs[0].copy()
    back_and_forth[::40, 0] += 4.0  # 250 visits of one frame each
    support = build([back_and_forth, runs[1]], np.concatenate(islands(1, crossings=False)), n_points=3000, seed=0)
    assert not support.confines
    assert support.regions.region(np.array([[-2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])).tolist() == [1, 1]


def test_jumps_are_observed_transitions(support: Support) -> None:
    run = islands(0)[0]
    random = np.random.default_rng(0)
    left, right = support.regions.region(np.array([[-2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))
    away = support.jump(np.array([left, left]), np.array([0, 0]), random)
    np.testing.assert_allclose(away, [run[5000], run[5000]])
    # outside of the regions the walker goes on as the trajectory did
    np.testing.assert_allclose(support.continued(away)[0], run[5001])
    with pytest.raises(KeyError):
        support.jump(np.array([left]), np.array([right]), random)  # never seen in one step


def test_distance_is_that_of_the_fifth_neighbour(support: Support) -> None:
    z = np.random.default_rng(0).standard_normal((20, 3))
    expected = np.sort(np.linalg.norm(z[:, None] - support.points, axis=-1), axis=1)[:, NEIGHBOURS - 1]
    np.testing.assert_allclose(support.far(z), expected)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_any_dimension_and_sparse_data(d: int) -> None:
    random = np.random.default_rng(d)
    runs = [random.standard_normal((200, d)) for _ in range(3)]
    support = build(runs, random.standard_normal((500, d)), n_points=100, seed=1)
    assert support.points.shape == (100, d)
    assert support.regions.cells.shape[1] == min(d, 2)
    z = random.standard_normal((10, d))
    assert support.continued(z).shape == (10, d)
    assert not support.confines and set(np.unique(support.regions.numbers)) == {1}


def test_data_too_sparse_for_regions_confine_nothing() -> None:
    """A grid of single frames far apart: no cell holds enough of them, and no region a percent of all."""
    x, y = np.meshgrid(np.arange(20) * 5.0, np.arange(20) * 5.0)
    lonely = np.stack([x.ravel(), y.ravel()], -1)
    support = build([lonely], lonely, n_points=100, seed=0)
    assert support.regions.count == 0 and not support.confines
    assert (support.regions.region(lonely) == 0).all()
    crowded = np.repeat(lonely, 5, axis=0)  # a region each, of a quarter of a percent
    support = build([crowded], lonely, n_points=100, seed=0)
    assert support.regions.count == 0 and not support.confines
    assert np.isfinite(support.continued(lonely)).all()


def test_rare_states_keep_their_points() -> None:
    random = np.random.default_rng(0)
    points = np.concatenate([random.normal(0, 0.1, (100_000, 2)), random.normal(5, 0.1, (100, 2))])
    chosen = choose_points(points, 1000, np.random.default_rng(1))
    assert len(chosen) == 1000 and (chosen[:, 0] > 3).sum() > 50
    assert len(choose_points(points[:10], 1000, np.random.default_rng(1))) == 10


def test_transitions_become_as_frequent_as_observed() -> None:
    observed = np.array([[0.0, 3.0, 1.0], [4.0, 900.0, 2.0], [0.0, 5.0, 300.0]])
    proposed = np.array([[0.0, 1.0, 9.0], [8.0, 500.0, 20.0], [3.0, 4.0, 100.0]])
    accept, extra = calibration(observed, proposed)
    np.testing.assert_allclose(accept, [[1.0, 1.0, 1.0], [0.5, 1.0, 0.1], [0.0, 1.0, 1.0]])
    np.testing.assert_allclose(extra, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0 / 305.0, 0.0]])
    frames = observed.sum(1, keepdims=True)
    leaving = ~np.eye(3, dtype=bool)
    leaving[0] = False
    np.testing.assert_allclose((accept * proposed / frames + extra)[leaving], (observed / frames)[leaving])
    # what was neither observed nor proposed has no transition to follow, should the propagator come up with it later
    assert calibration(np.diag([0.0, 9.0, 9.0]), np.diag([0.0, 9.0, 9.0]))[0][1].tolist() == [0.0, 1.0, 0.0]
