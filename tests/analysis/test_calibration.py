"""Calibration of uncertainties on errors whose distribution is known, against scipy and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.analysis.calibration import (
    binned,
    calibration_curve,
    chi_probability,
    fit_factor,
    flagged,
    largest_by_structure,
    miscalibration_area,
    probabilities,
    report,
    roc,
    spearman,
)
from openmm_mlff.analysis.calibration_plots import plot_calibration


def gaussian(n: int, dimensions: int, factor: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Errors whose spread is `factor` times what is claimed; spreads over two orders of magnitude."""
    rng = np.random.default_rng(seed)
    spreads = 10.0 ** rng.uniform(-2, 0, n)
    components = rng.normal(size=(n, dimensions)) * (factor * spreads / np.sqrt(dimensions))[:, None]
    return np.linalg.norm(components, axis=1), spreads


@pytest.mark.parametrize("dimensions", [1, 3])
def test_chi_is_that_of_scipy(dimensions: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    x = np.array([0.0, 1e-3, 0.3, 1.0, 2.5, 7.0, 40.0])
    np.testing.assert_allclose(chi_probability(x, dimensions), stats.chi(dimensions).cdf(x), rtol=1e-6, atol=1e-10)
    assert chi_probability(np.array([np.inf]), dimensions)[0] == 1.0
    with pytest.raises(ValueError, match="dimensions: expected 1"):
        chi_probability(x, 2)


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("factor", [1.0, 0.4, 3.0])
def test_the_factor_of_gaussian_errors_is_recovered(dimensions: int, factor: float) -> None:
    errors, spreads = gaussian(20000, dimensions, factor)
    found = fit_factor(errors, spreads)
    assert found == pytest.approx(factor, rel=0.03)
    # what is uniformly distributed deviates by about 0.3 / sqrt(n) on average
    assert miscalibration_area(errors, spreads, found, dimensions) < 0.01
    before = miscalibration_area(errors, spreads, 1.0, dimensions)
    assert before < 0.01 if factor == 1.0 else before > 0.1
    expected, observed = calibration_curve(errors, spreads, found, dimensions, points=9)
    np.testing.assert_allclose(expected, np.arange(1, 10) / 10)
    np.testing.assert_allclose(observed, expected, atol=0.02)


def test_area_has_its_extremes() -> None:
    ones = np.ones(100)
    assert miscalibration_area(1e9 * ones, ones) == pytest.approx(0.5, abs=0.006)
    assert miscalibration_area(0 * ones, ones) == pytest.approx(0.5, abs=0.006)
    # half of the errors within, half beyond: the curve is 1/2 throughout
    assert miscalibration_area(np.repeat([0.0, 1e9], 50), ones) == pytest.approx(0.25, abs=0.006)


def test_no_spread_is_no_division_by_zero() -> None:
    np.testing.assert_array_equal(probabilities(np.array([0.0, 1.0]), np.zeros(2)), [0.0, 1.0])


def test_rank_correlation_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    x = rng.integers(0, 20, 300).astype(float)
    y = x + rng.normal(0, 8, 300)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert spearman(x, np.exp(x)) == pytest.approx(1.0) and spearman(x, -(x**3)) == pytest.approx(-1.0)
    errors, spreads = gaussian(20000, 3)
    assert spearman(errors, spreads) > 0.8
    assert abs(spearman(errors, rng.permutation(spreads))) < 0.03
    assert np.isnan(spearman(np.ones(5), np.arange(5))) and np.isnan(spearman(np.ones(2), np.ones(2)))


def test_bins_agree_where_spreads_are_right() -> None:
    errors, spreads = gaussian(20000, 3)
    found = binned(errors, spreads, bins=8)
    assert found["n"].tolist() == [2500] * 8 and bool((np.diff(found["spread"]) > 0).all())
    np.testing.assert_allclose(found["error"], found["spread"], rtol=0.05)
    assert binned(errors[:3], spreads[:3], bins=8)["n"].sum() == 3


def test_worst_frames_by_hand() -> None:
    errors = np.array([9.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    spreads = np.array([5.0, 1.0, 6.0, 2.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    alarms, hits = roc(errors, spreads, worst=0.2)
    np.testing.assert_allclose(alarms, [0, 1 / 8, 1 / 8, 2 / 8, 2 / 8, 1])
    np.testing.assert_allclose(hits, [0, 0, 1 / 2, 1 / 2, 1, 1])
    assert flagged(errors, spreads, 0.2, false_alarms=0.2) == 0.5
    assert flagged(errors, spreads, 0.2, false_alarms=0.25) == 1.0
    assert flagged(errors, errors, 0.2) == 1.0
    # spreads that know nothing flag as many of the worst as of the others
    rng = np.random.default_rng(3)
    assert flagged(rng.random(20000), rng.random(20000), 0.05, 0.2) == pytest.approx(0.2, abs=0.03)
    with pytest.raises(ValueError, match="worst: expected a share that leaves bad and other entries"):
        roc(errors[:2], spreads[:2], 1.0)


def test_largest_by_structure() -> None:
    np.testing.assert_array_equal(largest_by_structure(np.array([1, 5, 2, 7, 0.5, 3]), np.array([2, 1, 3])), [5, 2, 7])


def test_a_report_has_a_row_for_every_class(tmp_path: Path) -> None:
    errors, spreads = gaussian(4000, 3, factor=2.0)
    classes = np.where(np.arange(4000) % 4 == 0, "anion", "cation")
    errors = np.where(classes == "anion", 3.0 * errors, errors)
    found = report(errors, spreads, classes.tolist(), factor=2.0, dimensions=3)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["all", "anion", "cation"] and [r["n"] for r in rows.values()] == [4000, 1000, 3000]
    assert rows["cation"]["area_rescaled"] < 0.02 < rows["cation"]["area"]
    assert rows["anion"]["best_factor"] == pytest.approx(6.0, rel=0.1)
    assert rows["cation"]["best_factor"] == pytest.approx(2.0, rel=0.1)
    assert rows["cation"]["rmse"] == pytest.approx(np.sqrt(np.mean(errors[classes == "cation"] ** 2)))
    path = plot_calibration(found, tmp_path / "c.png", "eV/Å", (errors, spreads), "title")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20000


@pytest.mark.parametrize(
    ("errors", "spreads", "message"),
    [
        ([], [], "errors: expected shape"),
        ([1.0], [1.0, 2.0], r"spreads: expected shape \(1,\), got \(2,\)"),
        ([np.nan], [1.0], "errors: expected finite numbers"),
        ([1.0], [-1.0], "spreads: expected finite numbers >= 0"),
        ([0.0], [1.0], "spreads: expected errors and spreads above zero, got only zeros"),
    ],
)
def test_what_cannot_be_calibrated(errors: list[float], spreads: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_factor(np.array(errors), np.array(spreads))
