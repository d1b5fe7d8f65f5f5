"""First passages of chains whose mean first-passage times solve a linear system."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import poisson

from openmm_mlff.analysis.passages import Ellipse, NamedRegion, PassageWatch, exponential_residence, hitting_times

#: a path 0 - 1 - 2 - 3 with the cores at its ends
CHAIN = np.array([[0.8, 0.2, 0.0, 0.0], [0.3, 0.5, 0.2, 0.0], [0.0, 0.1, 0.6, 0.3], [0.0, 0.0, 0.1, 0.9]])
LEFT, RIGHT = NamedRegion("left", lambda x: x[:, 0] == 0), NamedRegion("right", lambda x: x[:, 0] == 3)


def walks(n_trajs: int, n_frames: int, seed: int) -> list[np.ndarray]:
    """Stationary trajectories ``(n_frames, 1)`` of the chain."""
    random = np.random.default_rng(seed)
    stationary = np.linalg.matrix_power(CHAIN, 3000)[0]
    state = random.choice(4, size=n_trajs, p=stationary / stationary.sum())
    ladder, path = CHAIN.cumsum(axis=1), []
    for _ in range(n_frames):
        path.append(state)
        state = np.minimum((random.uniform(size=(n_trajs, 1)) > ladder[state]).sum(axis=1), 3)
    return list(np.array(path).T[:, :, None].astype(float))


def exact(start: int, end: int) -> float:
    """Mean first-passage time of the chain in steps: (1 - T) m = 1 outside the target."""
    rest = [k for k in range(4) if k != end]
    times = np.linalg.solve(np.eye(3) - CHAIN[np.ix_(rest, rest)], np.ones(3))
    return float(times[rest.index(start)])


def test_first_passages_of_a_chain() -> None:
    found = hitting_times(walks(40, 6000, 0), (LEFT, RIGHT), interval=0.5)
    assert set(found) == {("left", "right"), ("right", "left")}
    for pair, start, end in ((("left", "right"), 0, 3), (("right", "left"), 3, 0)):
        passages, mean = found[pair], 0.5 * exact(start, end)
        assert passages.n > 1000
        assert abs(passages.mean - mean) < 3.5 * passages.sem
        assert passages.sem < 0.03 * mean
        # a core of one state: all its frames have the same future
        for estimate in (passages.rate_time, passages.from_core):
            assert abs(estimate.value - mean) < 3.5 * estimate.error
            assert estimate.error < 0.05 * mean


def test_short_trajectories_bias_the_mean_but_not_the_rate() -> None:
    paths = walks(8000, 60, 1)
    found = hitting_times(paths, (LEFT, RIGHT), burn_in=30.0)["left", "right"]
    mean = exact(0, 3)
    assert abs(found.rate_time.value - mean) < 3.5 * found.rate_time.error
    assert found.rate_time.error < 0.03 * mean
    assert found.mean < 0.7 * mean, "completed passages miss the long ones"
    assert len(found.open_times) > 0
    # what the burn-in is for: in the beginning only those that have found a core count
    without = hitting_times(paths, (LEFT, RIGHT))["left", "right"]
    assert without.rate_time.value > mean + 2.0 * without.rate_time.error


def test_the_rule_frame_by_frame() -> None:
    # b entered at 2; a at 4, left, entered again without b between (no new start), b at 8; a at 10, cut off at 12
    path = np.array(["-", "a", "b", "-", "a", "-", "a", "-", "b", "b", "a", "-", "-"])[:, None]
    cores = [NamedRegion(name, lambda x, name=name: x[:, 0] == {"a": 1.0, "b": 2.0}[name]) for name in "ab"]
    numbers = np.where(path == "a", 1.0, np.where(path == "b", 2.0, 0.0))
    found = hitting_times([numbers, numbers], cores, interval=2.0)
    there, back = found["a", "b"], found["b", "a"]
    np.testing.assert_array_equal(there.times, [8.0, 8.0])
    np.testing.assert_array_equal(back.times, [4.0, 4.0, 4.0, 4.0])
    np.testing.assert_array_equal(there.open_times, [4.0, 4.0])
    # the passage 1 -> 2 counts as an event at risk though its beginning was not seen
    assert (there.events, there.time_at_risk) == (4, 2 * (1 + 4 + 2) * 2.0)
    assert (back.events, back.time_at_risk) == (4, 2 * (2 + 2) * 2.0)
    assert there.from_core.value == pytest.approx(2.0 * (1 + 4 + 2) / 3)
    assert there.residence.mean == pytest.approx(there.time_at_risk / 4)
    assert there.summary()["censored"] == 2


def test_watching_as_it_goes_sees_the_same() -> None:
    paths = walks(30, 500, 2)
    middle = NamedRegion("middle", lambda x: x[:, 0] == 1)
    cores = (LEFT, RIGHT, middle)
    watch = PassageWatch(cores, 30)
    for k, points in enumerate(np.array(paths).transpose(1, 0, 2)):
        watch.update(points, 0.25 * k)
    seen, whole = watch.passages(), hitting_times(paths, cores, 0.25)
    assert set(seen) == set(whole) and len(whole) == 6
    for pair, expected in whole.items():
        np.testing.assert_allclose(np.sort(seen[pair].times), np.sort(expected.times))
        np.testing.assert_allclose(np.sort(seen[pair].open_times), np.sort(expected.open_times))
        assert seen[pair].events == expected.events
        assert seen[pair].time_at_risk == pytest.approx(expected.time_at_risk)
        assert seen[pair].rate_time.error == pytest.approx(expected.rate_time.error)


def test_a_watch_can_start_counting_later() -> None:
    paths = np.array(walks(30, 500, 3)).transpose(1, 0, 2)
    watch = PassageWatch((LEFT, RIGHT), 30)
    early = PassageWatch((LEFT, RIGHT), 30)
    for k, points in enumerate(paths):
        watch.update(points, float(k))
        if k <= 200:
            early.update(points, float(k))
        if k == 200:
            watch.forget()
    whole = hitting_times(list(paths.transpose(1, 0, 2)), (LEFT, RIGHT))
    for pair, expected in whole.items():
        first, later = early.passages()[pair], watch.passages()[pair]
        assert first.events + later.events == expected.events
        assert first.time_at_risk + later.time_at_risk == pytest.approx(expected.time_at_risk)
        assert first.n + later.n == expected.n


def test_ellipses_are_turned_and_wrapped() -> None:
    tilted = Ellipse("t", (1.0, 2.0), (0.5, 0.1), angle=30.0)
    along = np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)])
    across = np.array([-along[1], along[0]])
    points = np.array([1.0, 2.0]) + np.array([0.49 * along, 0.51 * along, 0.09 * across, 0.11 * across, -0.49 * along])
    np.testing.assert_array_equal(tilted(points), [True, False, True, False, True])
    disc = Ellipse("d", (175.0, -175.0), (20.0, 20.0), period=360.0)
    np.testing.assert_array_equal(
        disc(np.array([[-170.0, 175.0], [-160.0, -175.0], [165.0, 550.0]])), [True, False, True]
    )


def test_residence_times_with_censoring() -> None:
    random = np.random.default_rng(4)
    times, limit = random.exponential(3.0, 4000), 2.0
    found = exponential_residence([(min(t, limit), bool(t < limit)) for t in times])
    assert abs(found.mean - 3.0) < 3.0 * found.error
    assert found.error < 0.1
    few = exponential_residence([(5.0, True), (3.0, False), (4.0, True)])
    assert (few.mean, few.events, few.total_time) == (6.0, 2, 12.0)
    # the ends of the interval are where the counts seen become improbable
    assert poisson.cdf(few.events, 12.0 / few.low) == pytest.approx(0.025)
    assert poisson.sf(few.events - 1, 12.0 / few.high) == pytest.approx(0.025)
    none = exponential_residence([(10.0, False)])
    assert none.mean == np.inf and none.high == np.inf
    assert poisson.cdf(0, 10.0 / none.low) == pytest.approx(0.025)


def test_bad_input_is_refused() -> None:
    path = [np.zeros((5, 2))]
    ellipse = Ellipse("a", (0.0, 0.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="cores: expected at least two"):
        hitting_times(path, [ellipse])
    with pytest.raises(ValueError, match="cores: expected at least two with names of their own"):
        hitting_times(path, [ellipse, ellipse])
    with pytest.raises(ValueError, match="not to overlap"):
        hitting_times(path, [ellipse, Ellipse("b", (0.0, 0.0), (1.0, 1.0))])
    with pytest.raises(ValueError, match="interval: expected a positive time"):
        hitting_times(path, [ellipse, Ellipse("b", (9.0, 0.0), (1.0, 1.0))], interval=0.0)
    with pytest.raises(ValueError, match="burn_in: expected a time"):
        hitting_times(path, [ellipse, Ellipse("b", (9.0, 0.0), (1.0, 1.0))], burn_in=5.0)
    with pytest.raises(ValueError, match="semi_axes"):
        Ellipse("a", (0.0, 0.0), (0.0, 1.0))
    with pytest.raises(ValueError, match="runs: expected at least one"):
        exponential_residence([])
    with pytest.raises(ValueError, match="trajs: expected finite numbers"):
        hitting_times([np.full((3, 2), np.inf)], [ellipse, Ellipse("b", (9.0, 0.0), (1.0, 1.0))])
