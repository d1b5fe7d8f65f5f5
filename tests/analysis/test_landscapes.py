"""Landscapes: measures by hand, error bars that cover the truth, handedness and decorrelation times."""

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


def two_bins(a: float, b: float, samples: float) -> Histogram:
    p = np.zeros((2, 2))
    p[0, 0], p[1, 1] = a, b
    return Histogram(p, samples)


def test_measures_by_hand() -> None:
    reference, simulated = two_bins(0.75, 0.25, 100), two_bins(0.5, 0.5, 100)
    d = difference(simulated, reference)
    # dF = ln(0.75/0.5) and ln(0.25/0.5), about their mean with weights 3/4 and 1/4
    x, y = np.log(1.5), np.log(0.5)
    mean = 0.75 * x + 0.25 * y
    assert d.mse_weighted == pytest.approx(0.75 * (x - mean) ** 2 + 0.25 * (y - mean) ** 2, abs=1e-14)
    assert d.mse == pytest.approx(0.5 * ((x - mean) ** 2 + (y - mean) ** 2), abs=1e-14)
    assert d.kl == pytest.approx(0.75 * x + 0.25 * y, abs=1e-14)
    entropies = [-np.sum(np.array(p) * np.log(p)) for p in ([0.625, 0.375], [0.75, 0.25], [0.5, 0.5])]
    assert d.js == pytest.approx(entropies[0] - 0.5 * (entropies[1] + entropies[2]), abs=1e-14)
    assert d.bins == 2


def test_bins_of_few_counts_are_left_out_and_empty_ones_count_half() -> None:
    p = np.array([[0.60, 0.36], [0.04, 0.0]])
    reference = Histogram(p, 100)
    assert difference(reference, reference).bins == 2
    simulated = Histogram(np.array([[1.0, 0.0], [0.0, 0.0]]), 50)
    d = difference(simulated, reference)
    # the bin that was never entered holds 0.5 / 50 of the simulation
    q = np.array([1.0, 0.01]) / 1.01
    r = np.array([0.60, 0.36]) / 0.96
    f = np.log(r) - np.log(q)
    f -= r @ f
    assert d.mse_weighted == pytest.approx(r @ f**2, abs=1e-14)
    # disjoint landscapes are ln 2 apart
    apart = difference(Histogram(np.array([[0.0, 0.0], [0.0, 1.0]]), 50), two_bins(1.0, 0.0, 50))
    assert apart.js == pytest.approx(np.log(2), abs=1e-14)
    with pytest.raises(ValueError, match="reference: expected bins with at least"):
        difference(simulated, Histogram(p, 1))
    with pytest.raises(ValueError, match=r"simulated: expected the reference's grid \(2, 2\), got \(3, 3\)"):
        difference(Histogram(np.full((3, 3), 1 / 9), 9), reference)


def test_weights_give_the_unbiased_landscape_and_its_effective_number() -> None:
    rng = np.random.default_rng(0)
    n = 200_000
    flat = rng.uniform(-180, 180, (n, 2))
    weights = np.exp(2.0 * np.cos(np.radians(flat[:, 0])))
    drawn = np.degrees(rng.vonmises(0.0, 2.0, n))
    reweighted = histogram(Sample(flat[:, 0], flat[:, 1], weights))
    direct = histogram(Sample(drawn, flat[:, 1]))
    assert direct.samples == n
    # Kish: n <w>^2 / <w^2> = n I0(2)^2 / I0(4)
    assert reweighted.samples == pytest.approx(n * 2.2795853**2 / 11.3019220, rel=0.01)
    d = difference(direct, reweighted)
    assert d.mse_weighted < 0.02 and d.js < 0.003


def walk(rng: np.random.Generator, n: int, centre: float = 0.0) -> Sample:
    return Sample(np.degrees(rng.vonmises(centre, 1.0, n)), np.degrees(rng.vonmises(0.0, 1.0, n)))


def test_compare_and_split_half_see_noise_as_noise_and_a_shift_as_a_shift() -> None:
    rng = np.random.default_rng(1)
    reference = [walk(rng, 5000) for _ in range(8)]
    same, shifted = [walk(rng, 5000) for _ in range(8)], [walk(rng, 5000, 0.5) for _ in range(8)]
    floor = split_half(reference, splits=20)
    good, bad = (compare(x, reference, resamples=50) for x in (same, shifted))
    # two halves of 20,000 scatter twice as much as two sets of 40,000
    assert 1.3 < floor.value.mse_weighted / good.value.mse_weighted < 3.0
    # sum p (1/(N p) + 1/(N p)) over the bins, to first order
    assert good.value.mse_weighted == pytest.approx(2 * good.value.bins / 40_000, rel=0.25)
    assert bad.intervals["mse_weighted"][0] > 2 * good.value.mse_weighted
    # F of the shifted one differs by cos(phi - 0.5) - cos(phi): its variance under exp(cos phi) / I0 is known
    phi = np.linspace(-np.pi, np.pi, 20001)[:-1]
    p = np.exp(np.cos(phi))
    p /= p.sum()
    f = np.cos(phi - 0.5) - np.cos(phi)
    noise = good.value.mse_weighted
    for found in (good, bad):
        for name, (low, high) in found.intervals.items():
            assert low < getattr(found.value, name) < high
    assert bad.value.mse_weighted == pytest.approx(p @ (f - p @ f) ** 2 + noise, rel=0.1)
    with pytest.raises(ValueError, match="blocks: expected at least two, got 1"):
        split_half(reference[:1])


def test_least_counts_hold_for_the_intervals_too() -> None:
    rng = np.random.default_rng(2)
    a, b = ([walk(rng, 2000) for _ in range(6)] for _ in range(2))
    strict = compare(a, b, least_counts=60, resamples=40)
    loose = compare(a, b, least_counts=1, resamples=40)
    assert strict.value.bins < loose.value.bins
    assert strict.intervals["mse"][1] < loose.intervals["mse"][0]


def test_population_and_its_error_over_blocks() -> None:
    rng = np.random.default_rng(3)
    shares = rng.uniform(0.1, 0.3, 400)
    blocks = [
        Sample(np.where(rng.random(200) < share, 60.0, -60.0), np.zeros(200), np.full(200, 2.0)) for share in shares
    ]
    found = population(blocks, lambda phi, psi: phi > 0)
    truth = np.std([np.mean(b.phi > 0) for b in blocks], ddof=1) / np.sqrt(400)
    assert found.value == pytest.approx(0.2, abs=4 * truth) and found.error == pytest.approx(truth, rel=0.02)
    assert np.isnan(population(blocks[:1], lambda phi, psi: phi > 0).error)


def test_pieces_of_a_block_hold_all_of_it_in_order() -> None:
    block = Sample(np.arange(10.0), np.arange(10.0), np.arange(1.0, 11.0))
    pieces = block.pieces(3)
    assert [len(p) for p in pieces] == [4, 3, 3]
    assert np.concatenate([p.weights for p in pieces]).tolist() == list(range(1, 11))
    with pytest.raises(ValueError, match="n: expected from 1 to 10 pieces, got 11"):
        block.pieces(11)


def test_chirality_of_an_amino_acid_and_its_mirror_image() -> None:
    # L-alanine by the CORN rule: seen with H towards the eye, CO, R, N follow clockwise
    ca, h = np.zeros(3), np.array([0.0, 0.0, 1.0])
    around = [np.array([np.sin(t), np.cos(t), -0.4]) for t in np.radians([0, 120, 240])]  # clockwise from above
    co, r, n = around
    x = np.array([ca, n, co, r, h])
    volume = chiral_volume(x, [0, 1, 2, 3])
    assert volume > 0.5
    assert chiral_volume(x * [1, 1, -1], [0, 1, 2, 3]) == pytest.approx(-volume)
    assert chiral_volume(np.stack([x, x * [-1, 1, 1]]), [0, 1, 2, 3]) == pytest.approx([volume, -volume])


def test_decorrelation_time_of_a_known_process() -> None:
    # a two-state angle that flips with probability p per frame: correlation (1 - 2p)^k, so 1 + 2 tau = 1/p - 1
    rng = np.random.default_rng(4)
    p = 0.05
    runs = [np.where(np.cumsum(rng.random(20_000) < p) % 2 == 0, -60.0, 60.0) for _ in range(20)]
    assert decorrelation_time(runs, 0.5) == pytest.approx(0.5 * (1 / p - 1), rel=0.1)
    # runs that never leave their basin: the common mean shows that they never decorrelate
    stuck = [np.full(500, a) + rng.normal(scale=5.0, size=500) for a in (-60.0, 60.0)]
    assert decorrelation_time(stuck, 1.0) > 400
    assert decorrelation_time([np.full(10, 30.0)], 2.0) == 2.0
    with pytest.raises(ValueError, match="runs: expected one-dimensional series"):
        decorrelation_time([], 1.0)


def test_wrong_samples_are_named() -> None:
    with pytest.raises(ValueError, match="phi, psi: expected the same positive number of samples"):
        Sample(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="phi, psi: expected finite angles"):
        Sample(np.array([np.nan]), np.zeros(1))
    with pytest.raises(ValueError, match="weights: expected 2, one per sample"):
        Sample(np.zeros(2), np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="weights: expected finite numbers >= 0"):
        Sample(np.zeros(2), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="samples: expected at least one block"):
        histogram([])


def test_intervals_cover_the_expected_difference() -> None:
    # the expected value of the measure is known to first order (noise alone), so 95 % of intervals should hold it
    rng = np.random.default_rng(5)
    covered = 0
    for k in range(40):
        a, b = ([walk(rng, 4000) for _ in range(10)] for _ in range(2))
        found = compare(a, b, bins=10, resamples=60, seed=k)
        low, high = found.intervals["mse_weighted"]
        covered += low <= 2 * found.value.bins / 40_000 <= high
    assert covered >= 32
