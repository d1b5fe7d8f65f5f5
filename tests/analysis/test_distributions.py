"""Distances of distributions that are known, and floors that statistics predict."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from openmm_mlff.analysis.distributions import floor, jensen_shannon, populations, units, wasserstein

RANDOM = np.random.default_rng(0)


def test_jensen_shannon_of_known_distributions() -> None:
    assert jensen_shannon(np.zeros(10), np.ones(10), bins=2) == pytest.approx(np.log(2.0))
    assert jensen_shannon(np.arange(5.0), np.arange(5.0)) == 0.0
    # (3/4, 1/4) against (1/4, 3/4)
    value = jensen_shannon(np.array([0.0, 0, 0, 1]), np.array([0.0, 1, 1, 1]), bins=2)
    assert value == pytest.approx(np.log(2.0) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    # a shift by d of a narrow grid: the integral over densities of two normals, by quadrature
    x = np.linspace(-8, 9, 20001)
    p, q = np.exp(-0.5 * x**2), np.exp(-0.5 * (x - 1.0) ** 2)
    a, b = RANDOM.standard_normal(400_000), 1.0 + RANDOM.standard_normal(400_000)
    assert jensen_shannon(a, b, bins=200) == pytest.approx(jensenshannon(p, q) ** 2, rel=0.02)


def test_jensen_shannon_in_the_plane_and_on_a_torus() -> None:
    a, b = RANDOM.normal(size=(2000, 2)), RANDOM.normal(0.3, 1.0, size=(3000, 2))
    edges = [np.linspace(-3, 3, 11), np.linspace(-2, 4, 9)]
    histograms = [
        np.histogram2d(*np.clip(s, [-3, -2], [3, 4]).T, bins=edges)[0].ravel() for s in (a, b)
    ]  # what is beyond the edges counts in the outermost bins
    expected = jensenshannon(*histograms) ** 2
    assert jensen_shannon(a, b, edges) == pytest.approx(expected)
    assert jensen_shannon(a, b, (10, 8), bounds=[(-3, 3), (-2, 4)]) == pytest.approx(expected)
    angles = RANDOM.uniform(-180, 180, size=(500, 2))
    other = RANDOM.normal(170, 30, size=(500, 2))
    turned = other + 360.0 * RANDOM.integers(-2, 3, size=other.shape)
    assert jensen_shannon(angles, turned, 36, period=360.0) == pytest.approx(
        jensen_shannon(angles, other, 36, period=360.0)
    )


def test_wasserstein_on_a_line() -> None:
    a, b = RANDOM.normal(size=300), RANDOM.gamma(2.0, size=450)
    assert wasserstein(a, b) == pytest.approx(wasserstein_distance(a, b))
    assert wasserstein(a, a + 1.7) == pytest.approx(1.7)


def test_wasserstein_on_a_circle() -> None:
    n = 40
    a, b = np.sort(RANDOM.uniform(0, 360, n)), np.sort(RANDOM.normal(350, 60, n) % 360)
    # equal numbers of points: the best of the cyclic matchings of the sorted points is optimal
    distance = [np.abs((a - np.roll(b, k) + 180) % 360 - 180).mean() for k in range(n)]
    assert wasserstein(a, b, period=360.0) == pytest.approx(min(distance))
    assert wasserstein(a + 720.0, b - 360.0, period=360.0) == pytest.approx(min(distance))
    assert wasserstein(np.full(5, 179.0), np.full(3, -179.0), period=360.0) == pytest.approx(2.0)
    assert wasserstein(np.full(5, 10.0), np.full(3, 190.0), period=360.0) == pytest.approx(180.0)
    assert wasserstein(a, a, period=360.0) == pytest.approx(0.0, abs=1e-12)
    spread = RANDOM.normal(0.0, 5.0, 2000)
    assert wasserstein(spread, spread + 30.0, period=360.0) == pytest.approx(30.0)


def test_populations_have_the_binomial_error_if_frames_are_independent() -> None:
    trajs = list(RANDOM.uniform(size=(100, 400)))
    found = populations(trajs, {"low": lambda x: x < 0.3, "all": lambda x: x < 2})
    assert found["low"].value == pytest.approx(np.mean(np.concatenate(trajs) < 0.3))
    assert found["low"].error == pytest.approx(np.sqrt(0.21 / 40000), rel=0.25)
    assert (found["all"].value, found["all"].error) == (1.0, 0.0)
    single = populations([np.concatenate(trajs)], {"low": lambda x: x < 0.3})
    assert single["low"].value == pytest.approx(found["low"].value)
    assert single["low"].error == pytest.approx(np.sqrt(0.21 / 40000), rel=0.5)
    assert single["low"].samples == 20


def test_units_cover_every_frame_once() -> None:
    for lengths in ([100], [10, 55, 7], [50] * 30):
        found = units(lengths)
        for k, length in enumerate(lengths):
            frames = [i for t, a, b in found if t == k for i in range(a, b)]
            assert frames == list(range(length))
    assert len(units([50] * 30)) == 30
    assert len(units([100])) == 20


def test_the_floor_is_what_counting_noise_makes() -> None:
    n, bins = 2000, 20
    trajs = list(RANDOM.uniform(size=(60, 500)))
    found = floor(trajs, n, lambda a, b: jensen_shannon(a, b, bins, bounds=[(0.0, 1.0)]), splits=200, seed=1)
    # second order in the deviations: (bins - 1) / 8 times twice 1 / n
    assert found.value == pytest.approx((bins - 1) / (4 * n), rel=0.1)
    sizes: list[tuple[int, int]] = []
    floor([np.arange(100.0)], 50, lambda a, b: float(sizes.append((len(a), len(set(a) & set(b)))) or 0), splits=3)
    assert sizes == [(50, 0)] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jensen_shannon(np.zeros(0), np.zeros(3)), "a: expected samples"),
        (lambda: jensen_shannon(np.zeros(3), np.zeros((3, 2))), "b: expected 1 dimensions"),
        (lambda: jensen_shannon(np.zeros(3), np.array([np.nan])), "b: expected finite"),
        (lambda: jensen_shannon(np.zeros(3), np.zeros(3), bins=0), "at least one bin"),
        (lambda: jensen_shannon(np.zeros(3), np.zeros(3), bins=[2, 2]), "bins: expected one entry"),
        (lambda: wasserstein(np.zeros((3, 2)), np.zeros(3)), "one dimension"),
        (lambda: wasserstein(np.zeros(3), np.zeros(3), period=0.0), "period: expected a positive"),
        (lambda: populations([], {}), "trajs: expected at least one"),
        (lambda: populations([np.zeros(3), np.zeros((3, 2))], {}), "alike and not empty"),
        (lambda: floor([np.zeros(10)] * 2, 11, lambda a, b: 0.0), "n_frames: expected two sets"),
        (lambda: floor([np.zeros(10)] * 2, 0, lambda a, b: 0.0), "n_frames: expected at least 1"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
