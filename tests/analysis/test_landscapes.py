"""Differences of landscapes by hand, and error bars against known statistics."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_mlff.analysis.landscapes import (
    Histogram,
    Sample,
    chiral_volume,
    compare,
    decorrelation_time,
    difference,
    histogram,
    population,
    split_half,
)


def test_measures_on_a_two_by_two_grid_by_hand() -> None:
    p = np.array([[0.5, 0.3], [0.15, 0.05]])
    q = np.array([[0.4, 0.4], [0.2, 0.0]])
    found = difference(Histogram(q, 100.0), Histogram(p, 100.0), least_counts=10.0)
    # the bin of 5 counts is left out, and both sides are normalised over the other three
    a, b = np.array([0.5, 0.3, 0.15]) / 0.95, np.array([0.4, 0.4, 0.2])
    d = np.log(a / b)
    shifted = d - (a * d).sum()
    assert found.bins == 3
    assert found.mse_weighted == pytest.approx((a * shifted**2).sum(), rel=1e-12)
    assert found.mse == pytest.approx((shifted**2).mean(), rel=1e-12)
    assert found.kl == pytest.approx((a * d).sum(), rel=1e-12)
    m = (p + q) / 2
    js = 0.5 * (p * np.log(p / m)).sum() + 0.5 * sum(
        x * np.log(x / y) for x, y in zip(q.flat, m.flat, strict=True) if x
    )
    assert found.js == pytest.approx(js, rel=1e-12)


def test_bin_that_was_never_entered_counts_half_a_sample() -> None:
    p = np.array([[0.5, 0.5], [0.0, 0.0]])
    q = np.array([[1.0, 0.0], [0.0, 0.0]])
    found = difference(Histogram(q, 50.0), Histogram(p, 100.0))
    b = np.array([1.0, 0.01]) / 1.01
    assert found.kl == pytest.approx((0.5 * np.log(0.5 / b)).sum(), rel=1e-12)


def test_same_and_disjoint_landscapes() -> None:
    p = np.array([[0.5, 0.5], [0.0, 0.0]])
    same = difference(Histogram(p, 100.0), Histogram(p, 100.0))
    assert (same.mse_weighted, same.mse, same.js, same.kl) == (0, 0, 0, 0)
    assert difference(Histogram(p[::-1], 100.0), Histogram(p, 100.0)).js == pytest.approx(np.log(2), rel=1e-12)


def test_histogram_with_weights() -> None:
    s = Sample(np.array([-90.0, 90.0, 90.0]), np.array([-90.0, 90.0, -90.0]), np.array([1.0, 2.0, 3.0]))
    found = histogram([s, Sample(np.array([-90.0]), np.array([90.0]), np.array([4.0]))], bins=2)
    np.testing.assert_allclose(found.probability, np.array([[1.0, 4.0], [3.0, 2.0]]) / 10)
    assert found.samples == pytest.approx(100 / 30)
    np.testing.assert_allclose(found.counts.sum(), 100 / 30)


def von_mises(rng: np.random.Generator, n: int, shift: float = 0.0) -> Sample:
    phi, psi = np.degrees(rng.vonmises([shift, 0.5], 1.0, size=(n, 2))).T
    return Sample(np.where(phi >= 180, -180.0, phi), np.where(psi >= 180, -180.0, psi))


def test_reweighting_gives_the_other_distribution_back() -> None:
    """Samples of exp(kappa cos phi) with weights exp(-kappa cos phi) are uniform in phi."""
    rng = np.random.default_rng(0)
    s = von_mises(rng, 50_000)
    weighted = Sample(s.phi, s.psi, np.exp(-np.cos(np.radians(s.phi))))
    marginal = histogram(weighted, bins=6).probability.sum(1)
    np.testing.assert_allclose(marginal, 1 / 6, atol=0.01)
    assert 0.4 < histogram(weighted).samples / 50_000 < 0.9


def test_comparison_tells_noise_from_difference() -> None:
    rng = np.random.default_rng(1)
    reference = [von_mises(rng, 2000) for _ in range(8)]
    same = compare([von_mises(rng, 2000) for _ in range(8)], reference, bins=12, resamples=60)
    other = compare([von_mises(rng, 2000, shift=0.5) for _ in range(8)], reference, bins=12, resamples=60)
    floor = split_half(reference, bins=12, splits=20)
    assert same.value.mse_weighted < floor.value.mse_weighted
    assert other.intervals["js"][0] > same.intervals["js"][1]
    # d = kappa (cos(phi - shift) - cos phi) is known, and so is its variance under the reference
    phi = np.linspace(-np.pi, np.pi, 3601)[:-1]
    p = np.exp(np.cos(phi)) / np.exp(np.cos(phi)).sum()
    d = np.cos(phi) - np.cos(phi - 0.5)
    exact = p @ d**2 - (p @ d) ** 2
    q = np.exp(np.cos(phi - 0.5)) / np.exp(np.cos(phi)).sum()
    exact_js = 0.5 * (p @ np.log(2 * p / (p + q)) + q @ np.log(2 * q / (p + q)))
    # noise adds the same to both
    assert other.value.js - same.value.js == pytest.approx(exact_js, rel=0.2)
    low, high = other.intervals["mse_weighted"]
    assert 0.85 * exact < other.value.mse_weighted < 1.15 * exact
    assert low < other.value.mse_weighted * 1.1 and high > exact


def test_population_error_is_that_of_independent_samples() -> None:
    """Blocks of independent frames: the jackknife error is sqrt(p (1 - p) / n), known to 1/sqrt(2 blocks)."""
    rng = np.random.default_rng(2)
    blocks, n = 200, 100
    samples = [Sample(np.where(rng.random(n) < 0.2, 90.0, -90.0), np.zeros(n)) for _ in range(blocks)]
    found = population(samples, lambda phi, psi: phi > 0)
    exact = np.sqrt(0.2 * 0.8 / (blocks * n))
    assert abs(found.value - 0.2) < 4 * exact
    assert found.error == pytest.approx(exact, rel=4 / np.sqrt(2 * blocks))
    weighted = [Sample(s.phi, s.psi, np.where(s.phi > 0, 4.0, 1.0)) for s in samples]
    assert population(weighted, lambda phi, psi: phi > 0).value == pytest.approx(0.5, abs=0.01)
    assert np.isnan(population(samples[:1], lambda phi, psi: phi > 0).error)


def test_decorrelation_time_of_a_process_with_known_correlation() -> None:
    """Jumps to a fresh angle with probability q per frame: correlation (1 - q)^t, integral 2/q - 1 frames."""
    rng, q = np.random.default_rng(3), 0.05
    runs = []
    for _ in range(20):
        fresh = rng.uniform(-180, 180, 20_000)
        jumps = np.maximum.accumulate(np.where(rng.random(20_000) < q, np.arange(20_000), 0))
        runs.append(fresh[jumps])
    assert decorrelation_time(runs, 2.0) == pytest.approx(2.0 * (2 / q - 1), rel=0.1)
    assert decorrelation_time([rng.uniform(-180, 180, 50_000)], 2.0) == pytest.approx(2.0, rel=0.1)
    # runs that stay in two basins are correlated as long as they are
    stuck = [np.full(100, -90.0) + rng.normal(size=100), np.full(100, 90.0) + rng.normal(size=100)]
    assert decorrelation_time(stuck, 1.0) > 90


def test_chiral_volume_of_a_tetrahedron() -> None:
    """Unit vectors between which all angles are 109.47 degrees span 16 sqrt(3) / 36."""
    tetrahedron = np.array([[0.0, 0, 0], [1, 1, 1], [-1, -1, 1], [-1, 1, -1]])
    found = chiral_volume(np.stack([tetrahedron, tetrahedron * [1, 1, -1], 3 * tetrahedron]), (0, 1, 2, 3))
    exact = 16 * np.sqrt(3) / 36
    np.testing.assert_allclose(np.abs(found), exact, rtol=1e-12)
    np.testing.assert_allclose(found, found[0] * np.array([1, -1, 1]), rtol=1e-12)
    flat = tetrahedron.copy()
    flat[:, 2] = 0
    assert chiral_volume(flat, (0, 1, 2, 3)) == 0
    # the definition
    a, b, d = tetrahedron[1:] / np.sqrt(3)
    assert found[0] == pytest.approx(np.linalg.det([a, b, d]), rel=1e-12)


def test_pieces_hold_all_frames() -> None:
    s = Sample(np.arange(10.0), np.zeros(10), np.arange(1.0, 11.0))
    parts = s.pieces(3)
    assert np.array_equal(np.concatenate([p.phi for p in parts]), s.phi)
    assert np.array_equal(np.concatenate([p.weights for p in parts if p.weights is not None]), s.weights)
    with pytest.raises(ValueError, match="n: expected from 1 to 10 pieces, got 11"):
        s.pieces(11)


def test_bad_input_is_named() -> None:
    angles = np.zeros(3)
    for arguments, message in (
        ((angles, np.zeros(2)), "phi, psi: expected the same"),
        ((np.full(3, np.nan), angles), "phi, psi: expected finite"),
        ((angles, angles, np.ones(2)), "weights: expected 3"),
        ((angles, angles, -np.ones(3)), "weights: expected finite numbers >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Sample(*arguments)
    p = Histogram(np.full((2, 2), 0.25), 8.0)
    with pytest.raises(ValueError, match="reference: expected bins with at least 5"):
        difference(p, p)
    with pytest.raises(ValueError, match="simulated: expected the reference's grid"):
        difference(Histogram(np.full((3, 3), 1 / 9), 100.0), p)
    with pytest.raises(ValueError, match="blocks: expected at least two"):
        split_half([Sample(angles, angles)])
    with pytest.raises(ValueError, match="samples: expected at least one"):
        histogram([])
    with pytest.raises(ValueError, match="runs: expected"):
        decorrelation_time([], 1.0)


def test_intervals_cover_the_expected_difference() -> None:
    # of two runs of N frames without a real difference: sum p (1/(N p) + 1/(N p)) over the bins, to first order
    rng = np.random.default_rng(5)
    covered = 0
    for k in range(40):
        a, b = ([von_mises(rng, 4000) for _ in range(10)] for _ in range(2))
        found = compare(a, b, bins=10, resamples=60, seed=k)
        low, high = found.intervals["mse_weighted"]
        assert low < found.value.mse_weighted < high
        covered += low <= 2 * found.value.bins / 40_000 <= high
    # 95 % of 40 are 38, with a standard deviation of 1.4
    assert covered >= 32
