"""Markov models of chains whose timescales and probabilities are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from openmm_mlff.analysis.chapman_kolmogorov import chapman_kolmogorov, metastable_sets
from openmm_mlff.analysis.kinetics import Clusters, Grid, implied_timescale_of, implied_timescales

pytest.importorskip("deeptime")

#: two metastable pairs of states, with detailed balance
CHAIN = np.array([[0.90, 0.10, 0.00, 0.00], [0.09, 0.90, 0.01, 0.00], [0.00, 0.02, 0.88, 0.10], [0.0, 0.0, 0.2, 0.8]])


def walk(matrix: np.ndarray, n_trajs: int, n_frames: int, seed: int = 0) -> list[np.ndarray]:
    """Trajectories of a chain that start in its stationary distribution."""
    values, vectors = np.linalg.eig(matrix.T)
    stationary = np.real(vectors[:, np.argmax(values.real)])
    stationary /= stationary.sum()
    random = np.random.default_rng(seed)
    state = random.choice(len(matrix), size=n_trajs, p=stationary)
    ladder = matrix.cumsum(axis=1)
    path = np.empty((n_trajs, n_frames), dtype=np.int64)
    for k in range(n_frames):
        path[:, k] = state
        state = np.minimum((random.uniform(size=(n_trajs, 1)) > ladder[state]).sum(axis=1), len(matrix) - 1)
    return list(path)


def exact_timescales(matrix: np.ndarray) -> np.ndarray:
    values = np.sort(np.linalg.eigvals(matrix).real)[::-1]
    return -1.0 / np.log(values[1:])


def test_timescales_of_a_chain_are_its_eigenvalues() -> None:
    dtrajs = walk(CHAIN, 40, 4000)
    found = implied_timescales(dtrajs, [1, 3, 6], n=2, interval=0.5, resamples=30)
    exact = 0.5 * exact_timescales(CHAIN)[:2]
    np.testing.assert_allclose(found.lags, [0.5, 1.5, 3.0])
    assert (np.abs(found.values - exact) < 3.5 * found.error).all()
    assert (found.error / exact < 0.12).all()
    assert (found.low < found.values).all() and (found.values < found.high).all()
    np.testing.assert_array_equal(found.kept, 1.0)


def test_the_bootstrap_error_is_the_scatter_of_independent_data() -> None:
    sets = [walk(CHAIN, 25, 1500, seed) for seed in range(40)]
    single = [implied_timescales(s, [1], resamples=0).values[0, 0] for s in sets]
    errors = [implied_timescales(s, [1], resamples=60).error[0, 0] for s in sets[:5]]
    # forty values know their standard deviation to 11 %, sixty resamples to 9 %
    assert np.mean(errors) == pytest.approx(np.std(single, ddof=1), rel=0.4)


@pytest.mark.parametrize("reversible", [True, False])
def test_models_are_those_of_deeptime(reversible: bool) -> None:
    from deeptime.markov.msm import MaximumLikelihoodMSM

    dtrajs = walk(CHAIN, 6, 700, seed=4)
    for lag in (1, 5):
        theirs = MaximumLikelihoodMSM(reversible=reversible, lagtime=lag).fit(dtrajs, lagtime=lag).fetch_model()
        ours = implied_timescales(dtrajs, [lag], n=3, reversible=reversible, resamples=0)
        np.testing.assert_allclose(ours.values[0], theirs.timescales(), rtol=1e-5)
        assert np.isnan(ours.error).all()


def test_only_the_connected_states_are_modelled_and_the_rest_is_told() -> None:
    dtrajs = [*walk(CHAIN, 20, 500), np.full(500, 4)]
    found = implied_timescales(dtrajs, [1], n=4, resamples=0)
    assert found.kept[0] == pytest.approx(20 / 21)
    assert np.isnan(found.values[0, 3]), "four connected states have three timescales"


def test_the_chapman_kolmogorov_test_is_passed_by_a_chain() -> None:
    dtrajs = walk(CHAIN, 40, 3000, seed=1)
    sets = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=float)
    found = chapman_kolmogorov(dtrajs, 2, [1, 3, 8], memberships=sets, interval=0.5, resamples=30)
    np.testing.assert_allclose(found.times, [0.0, 1.0, 3.0, 8.0])
    stationary = np.linalg.matrix_power(CHAIN, 4000)[0]
    for k, steps in enumerate((0, 2, 6, 16)):
        start = stationary[:, None] * sets
        exact = start.T @ np.linalg.matrix_power(CHAIN, steps) @ sets / start.sum(0)[:, None]
        for values, error in ((found.predicted, found.predicted_error), (found.estimated, found.estimated_error)):
            assert (np.abs(values[k] - exact) <= 3.5 * error[k] + 1e-9).all()
        np.testing.assert_allclose(found.predicted[k].sum(axis=1), 1.0)
    np.testing.assert_allclose(found.predicted[1], found.estimated[1], atol=1e-6)
    assert found.worst < 4.0


def test_states_without_a_row_belong_to_no_set() -> None:
    dtrajs = walk(CHAIN, 10, 1000, seed=8)
    short = chapman_kolmogorov(dtrajs, 1, [2], memberships=np.eye(4)[:3, :2], resamples=0)
    whole = chapman_kolmogorov(dtrajs, 1, [2], memberships=np.eye(4)[:, :2], resamples=0)
    np.testing.assert_array_equal(short.predicted, whole.predicted)
    assert (short.predicted[1].sum(axis=1) < 1.0).all()


def test_the_chapman_kolmogorov_test_finds_memory() -> None:
    # states 1 and 2 look alike: the lumped process is not Markovian
    hidden = [np.array([0, 1, 1, 2])[d] for d in walk(CHAIN, 40, 3000, seed=2)]
    found = chapman_kolmogorov(hidden, 1, [2, 5, 10], memberships=np.eye(3), resamples=30)
    assert found.worst > 8.0


def test_metastable_sets_and_their_test_are_those_of_deeptime() -> None:
    from deeptime.markov.msm import MaximumLikelihoodMSM

    dtrajs = walk(CHAIN, 10, 2000, seed=3)
    models = [MaximumLikelihoodMSM(lagtime=k).fit(dtrajs, lagtime=k).fetch_model() for k in (1, 2, 4)]
    sets = models[0].pcca(2).memberships
    ours = metastable_sets(dtrajs, 1, 2)
    np.testing.assert_allclose(ours, sets, atol=1e-5)
    np.testing.assert_array_equal(ours.argmax(axis=1)[[0, 2]], ours.argmax(axis=1)[[1, 3]])
    assert ours.argmax(axis=1)[0] != ours.argmax(axis=1)[2]
    np.testing.assert_array_equal(metastable_sets(dtrajs, 1, 2, crisp=True), np.eye(2)[sets.argmax(axis=1)])
    theirs = models[0].ck_test(models, 2)
    found = chapman_kolmogorov(dtrajs, 1, [1, 2, 4], 2, resamples=0)
    # deeptime takes the identity at time zero, which fuzzy sets do not have
    np.testing.assert_allclose(found.predicted[1:], theirs.predictions[1:], atol=1e-5)
    np.testing.assert_allclose(found.estimated[1:], theirs.estimates[1:], atol=1e-5)


def autoregression(slopes: np.ndarray, n_trajs: int, n_frames: int) -> list[np.ndarray]:
    """Stationary unit-variance AR(1) processes, mixed linearly: ``(n_frames, n)`` each."""
    random = np.random.default_rng(5)
    x = random.standard_normal((n_trajs, len(slopes)))
    mix = np.array([[1.0, 0.4], [-0.3, 2.0]])[: len(slopes), : len(slopes)]
    path = []
    for _ in range(n_frames):
        path.append(x @ mix)
        x = slopes * x + np.sqrt(1.0 - slopes**2) * random.standard_normal(x.shape)
    return list(np.array(path).transpose(1, 0, 2))


def test_linear_timescales_of_ornstein_uhlenbeck_processes_and_of_deeptime() -> None:
    from deeptime.decomposition import TICA

    slopes = np.exp(-1.0 / np.array([20.0, 3.0]))
    trajs = autoregression(slopes, 30, 4000)
    for lag in (1, 4):
        found = implied_timescale_of(trajs, lag, 2, interval=0.1)
        assert (np.abs(found.values - [2.0, 0.3]) < 3.5 * found.error).all()
        assert (found.error < [0.15, 0.01]).all()
        theirs = TICA(lagtime=lag).fit(trajs, lagtime=lag).fetch_model().timescales(lagtime=lag)
        np.testing.assert_allclose(found.values, 0.1 * theirs, rtol=1e-6)
    one = implied_timescale_of([t[:, 0] for t in trajs], 1, resamples=0)
    assert one.values.shape == (1,)
    with pytest.raises(ValueError, match="n: expected at most 1 timescales"):
        implied_timescale_of([np.stack([t[:, 0], 2.0 * t[:, 0]], axis=1) for t in trajs], 1, 2)


def test_a_grid_holds_its_points() -> None:
    random = np.random.default_rng(6)
    trajs = [random.uniform(-1, 3, size=(100, 2)) for _ in range(3)]
    grid = Grid.spanning(trajs, (4, 5))
    assert grid.n_states == 20
    centres = np.array([[grid.low[k] + (grid.high[k] - grid.low[k]) * (i[k] + 0.5) / grid.bins[k] for k in (0, 1)]
                        for i in np.ndindex(4, 5)])  # fmt: skip
    np.testing.assert_array_equal(grid.assign(centres), np.arange(20))
    np.testing.assert_array_equal(grid.assign(np.array([grid.high, (9.0, 9.0), (-9.0, -9.0)])), [19, 19, 0])
    around = Grid.spanning([np.zeros((1, 1))], 8, periods=[360.0])
    np.testing.assert_array_equal(around.assign(np.array([-180.0, 179.9, 180.0, 540.1, -181.0])), [0, 7, 0, 0, 7])
    line = Grid((0.0,), (1.0,), (10,), (False,))
    np.testing.assert_array_equal(line.assign(np.array([0.05, 0.95])), [0, 9])


def test_clusters_are_found_where_the_points_are() -> None:
    random = np.random.default_rng(7)
    middles = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    label = random.integers(3, size=600)
    points = middles[label] + 0.3 * random.standard_normal((600, 2))
    clusters = Clusters.fit([points[:300], points[300:]], 3, seed=1)
    assigned = clusters.assign(points)
    assert len({(a, b) for a, b in zip(label, assigned, strict=True)}) == 3
    nearest = np.linalg.norm(points[:, None] - clusters.centres, axis=2).argmin(axis=1)
    np.testing.assert_array_equal(assigned, nearest)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: implied_timescales(d, [0]), "lag: expected at least 1 frame, got 0"),
        (lambda d: implied_timescales(d, [100]), "lag: expected less than the longest trajectory"),
        (lambda d: implied_timescales(d, []), "at least one lag"),
        (lambda d: implied_timescales([], [1]), "dtrajs: expected at least one trajectory"),
        (lambda d: implied_timescales([d[0] - 5], [1]), "dtrajs: expected integers >= 0"),
        (lambda d: implied_timescales([d[0] * 1.0], [1]), "dtrajs: expected integers >= 0"),
        (lambda d: implied_timescale_of([np.full(10, np.nan)], 1), "trajs: expected finite numbers"),
        (lambda d: implied_timescale_of(d, 100), "lag: expected from 1 to 99 frames"),
        (lambda d: chapman_kolmogorov(d, 1, [0]), "multiples: expected"),
        (lambda d: chapman_kolmogorov(d, 1, [2], memberships=np.ones(4)), "memberships: expected shape"),
        (lambda d: metastable_sets(d, 1, 9), r"n_sets: expected from 2 to the \d connected"),
        (lambda d: Grid((0.0,), (0.0,), (3,), (False,)), "expected low < high"),
        (lambda d: Grid((0.0,), (1.0,), (0,), (False,)), "bins: expected at least one"),
        (lambda d: Grid((0.0,), (1.0,), (3,), (False,)).assign(np.zeros((4, 2))), "points: expected shape"),
        (lambda d: Clusters.fit(d, 1000), "n_states: expected from 1"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(walk(CHAIN, 3, 100))  # type: ignore[operator]


def test_without_deeptime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deeptime.markov", None)
    with pytest.raises(ImportError, match=r"openmm-mlff\[led\]"):
        implied_timescales(walk(CHAIN, 3, 100), [1])
