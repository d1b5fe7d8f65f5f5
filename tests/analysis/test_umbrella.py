"""Umbrella windows against exact integrals of a double well, sampled without correlation, and against pymbar."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pymbar
import pytest

from openmm_mlff.analysis import free_energy
from openmm_mlff.analysis.free_energy import InsufficientOverlap, thermal_energy
from openmm_mlff.analysis.umbrella import Bias, Reweighted, Window, reduced_biases

TEMPERATURE = 300.0
KT = thermal_energy(TEMPERATURE)
X = np.linspace(-3.0, 3.0, 6001)
WINDOWS: list[Window] = [(Bias.umbrella(c, 20 * KT),) for c in np.linspace(-1.5, 1.5, 9)]


def double_well(x: np.ndarray) -> np.ndarray:
    """kT; a barrier of 8, and the right well above the left one."""
    return 8.0 * (x**2 - 1) ** 2 + 1.5 * x


def probability(low: float, high: float) -> float:
    density = np.exp(-double_well(X))
    inside = (low <= X) & (high > X)
    return float(density[inside].sum() / density.sum())


def sample(bias: Bias | None, n: int, rng: np.random.Generator) -> np.ndarray:
    """Independent frames ``(n, 1)`` from the cumulative distribution."""
    u = double_well(X) + (0.0 if bias is None else bias.energy(X) / KT)
    cumulative = np.cumsum(np.exp(u.min() - u))
    return np.interp(rng.random(n), cumulative / cumulative[-1], X)[:, None]


def reweighted(seed: int, n: int = 300) -> Reweighted:
    rng = np.random.default_rng(seed)
    return Reweighted.of(WINDOWS, [sample(w[0], n, rng) for w in WINDOWS], TEMPERATURE)


def test_a_flat_bottom_and_a_period() -> None:
    wall = Bias(1.0, 2.0, 4.0)
    np.testing.assert_allclose(wall.energy(np.array([0.5, 1.0, 1.7, 2.0, 3.0])), [0.5, 0, 0, 0, 2.0])
    torsion = Bias.umbrella(170.0, 0.02, period=360.0)
    np.testing.assert_allclose(
        torsion.energy(np.array([-170.0, 150.0, 170.0, 530.0])), [4.0, 4.0, 0.0, 0.0], atol=1e-12
    )


def test_differences_of_a_double_well_and_their_errors() -> None:
    exact = -math.log(probability(0, 3) / probability(-3, 0))
    found = [s.difference(s.values[:, 0] < 0, s.values[:, 0] >= 0) for s in map(reweighted, range(60))]
    deviations = np.array([(f.delta - exact) / f.error for f in found])
    # 60 standardised deviations: their mean within 4 standard errors, their spread within 4 of its own
    assert abs(deviations.mean()) < 4 / math.sqrt(60)
    assert abs(deviations.std() - 1) < 4 / math.sqrt(120)


def test_profile_of_a_double_well() -> None:
    edges = np.linspace(-1.4, 1.4, 15)
    s = reweighted(7, 2000)
    profile = s.profile(s.values[:, 0], edges)
    exact = np.array([-math.log(probability(a, b)) for a, b in itertools.pairwise(edges)])
    lowest = int(np.argmin(exact))
    assert profile.delta[lowest] == 0 and profile.error[lowest] == 0
    others = np.arange(len(exact)) != lowest
    deviations = (profile.delta - (exact - exact[lowest]))[others] / profile.error[others]
    assert np.abs(deviations).max() < 4 and 0.3 < deviations.std() < 2
    assert profile.error.max() < 0.2 and profile.delta.max() > 7.5
    np.testing.assert_allclose(profile.centers, edges[:-1] + 0.1)


def test_errors_are_those_of_pymbar_for_independent_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    # pymbar takes frames as independent; the estimated g of such frames is not always 1
    monkeypatch.setattr(free_energy, "statistical_inefficiency", lambda runs: 1.0)
    rng = np.random.default_rng(3)
    values = [sample(w[0], 5000, rng) for w in WINDOWS]
    s = Reweighted.of(WINDOWS, values, TEMPERATURE)
    u = np.concatenate(reduced_biases(WINDOWS, values, TEMPERATURE), axis=1)
    x = np.concatenate(values)[:, 0]
    outside = np.stack([np.where(x < -0.5, 0.0, 1e4), np.where(x > 0.6, 0.0, 1e4)])
    theirs = pymbar.MBAR(u, [5000] * len(WINDOWS)).compute_perturbed_free_energies(outside)
    ours = s.difference(x < -0.5, x > 0.6)
    assert ours.delta == pytest.approx(theirs["Delta_f"][0, 1], abs=1e-6)
    assert ours.error == pytest.approx(theirs["dDelta_f"][0, 1], rel=0.03)


def test_correlated_frames_have_larger_errors() -> None:
    rng = np.random.default_rng(5)
    values = [np.repeat(sample(w[0], 200, rng), 5, axis=0) for w in WINDOWS]
    repeated = Reweighted.of(WINDOWS, values, TEMPERATURE)
    single = Reweighted.of(WINDOWS, [v[::5] for v in values], TEMPERATURE)
    a, b = (s.difference(s.values[:, 0] < 0, s.values[:, 0] >= 0) for s in (repeated, single))
    assert a.delta == pytest.approx(b.delta, abs=1e-6) and a.error == pytest.approx(b.error, rel=0.15)
    assert min(a.inefficiency) > 3


def test_means_and_profiles_with_another_zero() -> None:
    s = reweighted(11, 2000)
    x = s.values[:, 0]
    density = np.exp(-double_well(X))
    assert s.mean(x) == pytest.approx(float((X * density).sum() / density.sum()), abs=0.03)
    right = X > 0
    expected = float((X * density)[right].sum() / density[right].sum())
    assert s.mean(x, x > 0) == pytest.approx(expected, abs=0.02)
    edges = np.array([-1.5, -0.5, 0.5, 1.5])
    profile = s.profile(x, edges, zero=x < 0)
    exact = -math.log(probability(0.5, 1.5) / probability(-3, 0))
    assert abs(profile.delta[2] - exact) < 4 * profile.error[2]
    beyond = s.profile(x, np.array([-1.0, 0.0, 5.0, 6.0]))
    assert np.isnan(beyond.delta[2]) and np.isfinite(beyond.delta[:2]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bias(1.0, 0.0, 1.0), "low, high: expected finite numbers in this order, got 1.0 and 0.0"),
        (lambda: Bias(0.0, 1.0, 0.0), "stiffness: expected a positive number, got 0.0"),
        (lambda: Bias(0.0, 400.0, 1.0, 360.0), "period: expected more than high - low = 400"),
        (lambda: reduced_biases(WINDOWS, [np.zeros((3, 1))], 300), "values: expected an array for each of 9 windows"),
        (lambda: reduced_biases(WINDOWS[:1], [np.zeros((3, 2))], 300), r"values\[0\]: expected shape \(n, 1\)"),
        (lambda: reweighted(0).difference(np.ones(3, dtype=bool), np.ones(3, dtype=bool)), "start: expected a boolean"),
        (lambda: reweighted(0).difference(*2 * [np.zeros(2700, dtype=bool)]), "start: expected at least one frame"),
        (lambda: reweighted(0).profile(np.zeros(2700), np.array([1.0, 0.0])), "edges: expected at least two ascending"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_windows_that_share_no_frames_are_named() -> None:
    rng = np.random.default_rng(0)
    windows: list[Window] = [(Bias.umbrella(-1.0, 2000 * KT),), (Bias.umbrella(1.0, 2000 * KT),)]
    values = [sample(w[0], 100, rng) for w in windows]
    with pytest.raises(InsufficientOverlap, match="between the ensembles 'left' and 'right'"):
        Reweighted.of(windows, values, TEMPERATURE, names=("left", "right"))
