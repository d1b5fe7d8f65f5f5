"""Estimators against exact free energies, z-scores against N(0, 1), and pymbar where it does the same."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from openmm_mlff.analysis import free_energy
from openmm_mlff.analysis.free_energy import AccumulatedFreeEnergy, InsufficientOverlap, bar, mbar, zwanzig

pymbar = pytest.importorskip("pymbar")

REPEATS = 200


def normal_series(rng: np.random.Generator, n: int, correlation: float) -> np.ndarray:
    """A stationary AR(1) series of unit variance; its statistical inefficiency is (1 + c) / (1 - c)."""
    x = rng.normal(size=n)
    x[1:] *= np.sqrt(1 - correlation**2)
    for i in range(1, n):
        x[i] += correlation * x[i - 1]
    return x


class Harmonic:
    """u(x) = k (x - b)^2 / 2 + c, with f = -ln(2 pi / k) / 2 + c."""

    def __init__(self, k: float, b: float, c: float = 0.0) -> None:
        self.k, self.b, self.c = k, b, c

    def u(self, x: np.ndarray) -> np.ndarray:
        return 0.5 * self.k * (x - self.b) ** 2 + self.c

    @property
    def f(self) -> float:
        return -0.5 * float(np.log(2 * np.pi / self.k)) + self.c

    def sample(self, rng: np.random.Generator, n: int, correlation: float = 0.0) -> np.ndarray:
        return self.b + normal_series(rng, n, correlation) / np.sqrt(self.k)


class DoubleWell:
    """u(x) = h (x^2 - 1)^2 + s x, f by quadrature; correlated samples are a normal series through the quantiles."""

    def __init__(self, h: float, s: float) -> None:
        self.h, self.s = h, s
        self.grid = np.linspace(-3.5, 3.5, 20_001)
        density = np.exp(-self.u(self.grid))
        self.f = -float(np.log(np.trapezoid(density, self.grid)))
        self.cumulative = np.cumsum(density) / density.sum()

    def u(self, x: np.ndarray) -> np.ndarray:
        return self.h * (x**2 - 1) ** 2 + self.s * x

    def sample(self, rng: np.random.Generator, n: int, correlation: float = 0.0) -> np.ndarray:
        return np.interp(stats.norm.cdf(normal_series(rng, n, correlation)), self.cumulative, self.grid)


PAIRS = {
    "shifted": (Harmonic(1.0, 0.0), Harmonic(1.0, 1.2, 5.0)),
    "harmonic": (Harmonic(1.0, 0.0), Harmonic(3.0, 0.7)),
    "double well": (DoubleWell(2.0, 0.0), DoubleWell(4.0, 0.7)),
}


def work(pair: tuple, rng: np.random.Generator, n: int, m: int, correlation: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = pair
    x, y = a.sample(rng, n, correlation), b.sample(rng, m, correlation)
    return b.u(x) - a.u(x), a.u(y) - b.u(y)


def assert_standard_normal(z: np.ndarray) -> None:
    """Neither the distribution (Kolmogorov-Smirnov) nor the spread (chi-square, two-sided) is refused at p = 1e-3."""
    assert stats.kstest(z, "norm").pvalue > 1e-3, (z.mean(), z.std())
    assert 5e-4 < stats.chi2(len(z)).cdf(float(z @ z)) < 1 - 5e-4, (z.mean(), z.std())


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("system", PAIRS)
def test_bar_and_its_error_bar_hold_the_exact_result(system: str, correlation: float) -> None:
    pair, rng = PAIRS[system], np.random.default_rng(11)
    n = 300 if correlation == 0 else 1500
    found = [bar(*work(pair, rng, n, n // 2, correlation)) for _ in range(REPEATS)]
    exact = pair[1].f - pair[0].f
    assert_standard_normal(np.array([(e.delta - exact) / e.error for e in found]))


@pytest.mark.parametrize("reverse", [False, True])
def test_zwanzig_both_ways(reverse: bool) -> None:
    """Between ensembles that cover each other from either side."""
    pair, rng = (Harmonic(1.0, 0.0), Harmonic(1.15, 0.2)), np.random.default_rng(5)
    exact = pair[1].f - pair[0].f
    found = [zwanzig(work(pair, rng, 2000, 2000, 0.5)[reverse], reverse=reverse) for _ in range(REPEATS)]
    assert_standard_normal(np.array([(e.delta - exact) / e.error for e in found]))


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_mbar_over_windows(correlation: float) -> None:
    ends, rng = PAIRS["double well"], np.random.default_rng(8)
    coupling = np.linspace(0, 1, 4)
    states = [DoubleWell((1 - c) * ends[0].h + c * ends[1].h, c * ends[1].s) for c in coupling]
    n = 150 if correlation == 0 else 500
    z = []
    for _ in range(REPEATS // 2):
        samples = [state.sample(rng, n, correlation) for state in states]
        found = mbar([np.array([state.u(x) for state in states]) for x in samples])
        z.append((found.delta[-1] - (states[-1].f - states[0].f)) / found.error[-1])
    assert_standard_normal(np.array(z))


def test_uncorrelated_frames_have_the_errors_and_overlap_of_pymbar(monkeypatch: pytest.MonkeyPatch) -> None:
    """With g held at 1 the influence functions give pymbar's asymptotic errors up to terms of order 1/n."""
    monkeypatch.setattr(free_energy, "statistical_inefficiency", lambda values: 1.0)
    rng, pair = np.random.default_rng(2), PAIRS["double well"]
    forward, reverse = work(pair, rng, 4000, 2500, 0.0)
    ours, theirs = bar(forward, reverse), pymbar.bar(forward, reverse)
    assert ours.delta == pytest.approx(theirs["Delta_f"], abs=1e-9)
    assert ours.error == pytest.approx(theirs["dDelta_f"], rel=0.03)
    assert ours.overlap is not None
    assert ours.overlap[0, 1] + ours.overlap[1, 0] == pytest.approx(pymbar.bar_overlap(forward, reverse), abs=1e-5)
    states = [Harmonic(k, b) for k, b in ((1.0, 0.0), (1.5, 0.4), (2.5, 0.6))]
    energies = [np.array([s.u(x) for s in states]) for x in (s.sample(rng, 3000) for s in states)]
    found, reference = mbar(energies), pymbar.MBAR(np.concatenate(energies, axis=1), [3000] * 3)
    differences = reference.compute_free_energy_differences()
    np.testing.assert_allclose(found.delta, differences["Delta_f"][0], atol=1e-7)
    np.testing.assert_allclose(found.error[1:], differences["dDelta_f"][0, 1:], rtol=0.03)
    np.testing.assert_allclose(found.overlap, reference.compute_overlap()["matrix"], atol=1e-6)
    np.testing.assert_allclose(found.overlap.sum(axis=1), 1.0, atol=1e-6)


def test_statistical_inefficiency_of_a_known_series() -> None:
    x = normal_series(np.random.default_rng(4), 100_000, 0.8)
    assert free_energy.statistical_inefficiency(x) == pytest.approx(9.0, rel=0.1)
    assert free_energy.statistical_inefficiency(np.full(50, -3.2)) == 1.0
    chosen = free_energy.decorrelated(x[:5000])
    assert 5000 / 14 < len(chosen) < 5000 / 6
    apart = [x[:500] - 20, x[500:1000] + 20]  # two runs that never visit each other: hardly two independent frames
    assert free_energy.statistical_inefficiency(apart) > 100


def test_bootstrap_of_correlated_samples() -> None:
    """Student's t, because each error comes from 25 resamplings; blocks of 40 frames miss little of g = 4."""
    pair, rng = (Harmonic(1.0, 0.0), Harmonic(1.15, 0.2)), np.random.default_rng(6)
    exact, z = pair[1].f - pair[0].f, []

    def estimator(w: np.ndarray) -> float:
        return -float(np.log(np.exp(-w).mean()))

    for repeat in range(REPEATS):
        forward, _ = work(pair, rng, 1500, 2, 0.6)
        error = free_energy.block_bootstrap(estimator, forward, samples=25, seed=repeat, block=40)
        z.append((estimator(forward) - exact) / error)
    assert stats.kstest(z, stats.t(24).cdf).pvalue > 1e-3, (np.mean(z), np.std(z))


def test_bootstrap_of_bar_agrees_with_the_influence_of_the_frames() -> None:
    forward, reverse = work(PAIRS["harmonic"], np.random.default_rng(6), 1500, 1500, 0.6)
    error = bar(forward, reverse).error

    def bootstrap(**options: int) -> float:
        return free_energy.block_bootstrap(lambda f, r: bar(f, r).delta, forward, reverse, samples=80, **options)

    assert bootstrap() == pytest.approx(error, rel=0.3)
    assert bootstrap(block=1) < 0.75 * error  # neighbours that are torn apart look independent


def test_bootstrap_of_windows() -> None:
    rng = np.random.default_rng(7)
    states = [Harmonic(k, b) for k, b in ((1.0, 0.0), (1.5, 0.4), (2.5, 0.6))]
    energies = [np.array([s.u(x) for s in states]) for x in (s.sample(rng, 300) for s in states)]
    error = free_energy.block_bootstrap(lambda *u: float(mbar(u).delta[-1]), *energies, samples=40)
    assert error == pytest.approx(mbar(energies).error[-1], rel=0.35)


def test_effective_samples() -> None:
    assert free_energy.effective_samples(np.full(40, 3.0)) == pytest.approx(40.0)
    assert free_energy.effective_samples(np.array([0.0, 500.0, 500.0])) == pytest.approx(1.0)
    w = np.array([0.5, 0.3, 0.2])
    assert free_energy.effective_samples(-np.log(w)) == pytest.approx(np.exp(-np.sum(w * np.log(w))))


def test_accumulation_counts_the_ensembles_that_steps_share() -> None:
    """Harmonic wells that move along: the sum is exact within its error, which sees the covariance of the steps."""
    rng = np.random.default_rng(9)
    states = [Harmonic(1.0 + 0.3 * i, 0.3 * i, 0.2 * i) for i in range(5)]
    z, naive = [], []
    for _ in range(REPEATS // 2):
        samples, total, variance = [s.sample(rng, 400, 0.5) for s in states], AccumulatedFreeEnergy(), 0.0
        for i in range(4):
            a, b, x, y = states[i], states[i + 1], samples[i], samples[i + 1]
            step = bar(b.u(x) - a.u(x), a.u(y) - b.u(y))
            total.add(step)
            variance += step.error**2
            total = AccumulatedFreeEnergy.from_state(total.state())
        z.append((total.delta - (states[-1].f - states[0].f)) / total.error)
        naive.append(np.sqrt(variance) / total.error)
    assert_standard_normal(np.array(z))
    assert abs(np.mean(naive) - 1) > 0.03  # the steps are not independent


def test_independent_steps_add_their_variances() -> None:
    rng, total, steps = np.random.default_rng(10), AccumulatedFreeEnergy(), []
    for n in (300, 400):
        steps.append(bar(*work(PAIRS["harmonic"], rng, n, n + 50, 0.0)))
        total.add(steps[-1], shared=False)
    assert total.error == pytest.approx(np.hypot(steps[0].error, steps[1].error), rel=1e-9)
    assert total.delta == pytest.approx(steps[0].delta + steps[1].delta)
    with pytest.raises(ValueError, match="expected 450 forward frames, as the last step had, got 300"):
        total.add(steps[0])
    with pytest.raises(ValueError, match="got a one-sided one"):
        total.add(zwanzig(np.zeros(5)))


def test_runs_of_a_state_may_be_several() -> None:
    forward, reverse = work(PAIRS["harmonic"], np.random.default_rng(1), 400, 300, 0.0)
    whole, parts = bar(forward, reverse), bar([forward[:250], forward[250:]], [reverse[:100], reverse[100:]])
    assert parts.delta == whole.delta
    assert parts.error == pytest.approx(whole.error, rel=0.1)


def test_convergence_ends_at_the_whole_result() -> None:
    forward, reverse = work(PAIRS["harmonic"], np.random.default_rng(1), 500, 500, 0.5)

    def estimator(f: list[np.ndarray], r: list[np.ndarray]) -> tuple[float, float]:
        found = bar(f, r)
        return found.delta, found.error

    table, whole, half = (
        free_energy.convergence(estimator, forward, [reverse], points=4),
        estimator([forward], [reverse]),
        estimator([forward[250:]], [reverse[250:]]),
    )
    np.testing.assert_allclose(table["fraction"], [0.25, 0.5, 0.75, 1.0])
    for name in ("from_start", "from_end"):
        np.testing.assert_allclose(table[name][-1], whole)
    np.testing.assert_allclose(table["from_end"][1], half)
    assert not np.array_equal(table["from_start"][1], table["from_end"][1])
    few = free_energy.convergence(estimator, forward[:2], reverse[:2], points=4)
    assert np.isnan(few["from_start"][0]).all()

    def unsolved(f: list[np.ndarray], r: list[np.ndarray]) -> tuple[float, float]:
        if len(f[0]) < 500:
            raise RuntimeError("the equations were not solved")
        return estimator(f, r)

    table = free_energy.convergence(unsolved, forward, reverse, points=2)
    assert np.isnan(table["from_start"][0]).all()
    np.testing.assert_allclose(table["from_start"][1], whole)


def test_ensembles_without_overlap_are_an_error_that_says_which_and_by_how_much() -> None:
    rng = np.random.default_rng(0)
    pair = (Harmonic(50.0, 0.0), Harmonic(50.0, 1.0))
    with pytest.raises(
        InsufficientOverlap, match=r"at least 0\.03 between the ensembles 'vacuum' and 'water'"
    ) as caught:
        bar(*work(pair, rng, 300, 300, 0.0), names=("vacuum", "water"))
    assert caught.value.pair == ("vacuum", "water")
    assert 0 <= caught.value.overlap < caught.value.least == 0.03
    states = [Harmonic(20.0, b) for b in (0.0, 0.3, 2.5)]
    energies = [np.array([s.u(x) for s in states]) for x in (s.sample(rng, 200) for s in states)]
    with pytest.raises(InsufficientOverlap, match="'1' and '2'"):
        mbar(energies)
    far = (Harmonic(1e5, 0.0), Harmonic(1e5, 10.0))
    with pytest.raises(InsufficientOverlap):  # not a number from an overflow
        bar(*work(far, rng, 50, 50, 0.0), least_overlap=None)


@pytest.mark.parametrize("noise", [0.0, 1e-15, 1e-10, 1e-5])
@pytest.mark.parametrize("constant", [-3.0, 0.0, 2e4])
def test_equal_ensembles_overlap_wholly(constant: float, noise: float) -> None:
    """Work that is one constant, up to rounding, is the free energy, however many frames each side has."""
    rng = np.random.default_rng(4)
    for n_f, n_r in ((5, 5), (4, 40)):
        found = bar(constant + noise * rng.normal(size=n_f), -constant + noise * rng.normal(size=n_r))
        assert found.delta == pytest.approx(constant, abs=5 * noise + 1e-9)
        assert found.overlap is not None and found.error < 5 * noise + 1e-9
        np.testing.assert_allclose(found.overlap, [[n_f, n_r], [n_f, n_r]] / np.array(n_f + n_r), atol=1e-4)


def test_a_common_constant_changes_nothing() -> None:
    """Total energies are large: a constant of 1e5 kT shifts the result and leaves its error."""
    forward, reverse = work(PAIRS["harmonic"], np.random.default_rng(1), 300, 300, 0.0)
    plain, shifted = bar(forward, reverse), bar(forward + 1e5, reverse - 1e5)
    assert shifted.delta - 1e5 == pytest.approx(plain.delta, abs=1e-7)
    assert shifted.error == pytest.approx(plain.error, rel=1e-6)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="reverse: expected finite numbers, got 1 that are not"):
        bar(np.zeros(3), np.array([0.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="forward: expected at least 2 frames, got 1"):
        bar(np.zeros(1), np.zeros(3))
    with pytest.raises(ValueError, match=r"energies\[1\]: expected runs of shape \(2, n\)"):
        mbar([np.zeros((2, 3)), [np.zeros((3, 3))]])
    with pytest.raises(ValueError, match=r"temperature: expected a positive number \(K\), got 0"):
        free_energy.thermal_energy(0)


def test_kT() -> None:
    assert free_energy.thermal_energy(298.15) == pytest.approx(
        0.02569258, abs=1e-8
    )  # CODATA 2018: k = 8.617333e-5 eV/K
    estimate = free_energy.FreeEnergy(2.0, 0.5, (1.0,))
    assert estimate.times(0.0257) == pytest.approx((0.0514, 0.01285))
