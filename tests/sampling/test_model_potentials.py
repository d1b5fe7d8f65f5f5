"""The Mueller-Brown potential is the published one, in numpy and in OpenMM, and walkers sample it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openmm
import pytest

from openmm_mlff.analysis.passages import hitting_times
from openmm_mlff.sampling import model_potentials
from openmm_mlff.sampling.model_potentials import (
    ELLIPSES,
    KT,
    TEMPERATURE,
    MuellerBrown,
    WalkerSettings,
    run_walkers,
    watch_cores,
)

POTENTIAL = MuellerBrown()
POINTS = np.random.default_rng(0).uniform([-1.5, -0.5], [1.2, 2.0], size=(50, 2))


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict:
    return json.loads((shared / "data/led/mueller_brown.json").read_text(encoding="utf-8"))


def test_stationary_points(reference: dict) -> None:
    names = {"min_A": "A", "min_B": "B", "min_C": "C", "saddle_AC": "AC", "saddle_CB": "CB"}
    stored = reference["potential"]["stationary_points"]
    assert set(stored) == set(names)
    for label, expected in stored.items():
        found = POTENTIAL.stationary_points()[names[label]]
        np.testing.assert_allclose(found.xy, expected["xy"], atol=1e-5)
        assert found.energy == pytest.approx(expected["V"], abs=1e-5)
        np.testing.assert_allclose(found.eigenvalues, expected["hess_eig"], rtol=1e-5)
        assert (found.eigenvalues[0] > 0) == label.startswith("min")
        assert np.linalg.norm(POTENTIAL.gradient(found.xy)) < 1e-9


def test_derivatives_are_finite_differences() -> None:
    h = 1e-5
    for axis in (0, 1):
        step = h * np.eye(2)[axis]
        slope = (POTENTIAL.energy(POINTS + step) - POTENTIAL.energy(POINTS - step)) / (2 * h)
        np.testing.assert_allclose(POTENTIAL.gradient(POINTS)[:, axis], slope, rtol=1e-6, atol=1e-4)
        bend = (POTENTIAL.gradient(POINTS + step) - POTENTIAL.gradient(POINTS - step)) / (2 * h)
        np.testing.assert_allclose(POTENTIAL.hessian(POINTS)[:, axis], bend, rtol=1e-5, atol=1e-3)


def test_openmm_computes_the_same() -> None:
    context = openmm.Context(
        POTENTIAL.system(len(POINTS)), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    z = np.linspace(-0.1, 0.2, len(POINTS))
    context.setPositions(np.column_stack([POINTS, z]))
    state = context.getState(energy=True, forces=True)
    energy = POTENTIAL.energy(POINTS).sum() + 500.0 * np.sum(z**2)
    assert state.getPotentialEnergy()._value == pytest.approx(energy, rel=1e-12)
    forces = state.getForces(asNumpy=True)._value
    np.testing.assert_allclose(forces[:, :2], -POTENTIAL.gradient(POINTS), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(forces[:, 2], -1000.0 * z)


def test_boltzmann_averages_are_the_exact_ones(reference: dict) -> None:
    exact = reference["exact_boltzmann_kT15"]
    points, probability = POTENTIAL.boltzmann(bins=1500)
    # the stored figures come from a slightly smaller box
    assert np.sum(probability * POTENTIAL.energy(points)) == pytest.approx(exact["mean_V"], abs=5e-4)
    for ellipse, name in zip(ELLIPSES, ("pop_ellipse0_lower_right", "pop_ellipse1_upper_left"), strict=True):
        assert probability[ellipse(points)].sum() == pytest.approx(exact[name], abs=2e-4)
    edge = max(p.sum() for p in (probability[0], probability[-1], probability[:, 0], probability[:, -1]))
    assert edge < 1e-12
    draws = POTENTIAL.sample(20000, np.random.default_rng(1))
    assert draws[:, 0].mean() == pytest.approx(exact["mean_x"], abs=4 * np.sqrt(exact["var_x"] / 20000))
    assert draws[:, 1].mean() == pytest.approx(exact["mean_y"], abs=4 * np.sqrt(exact["var_y"] / 20000))


def test_the_temperature_is_that_of_the_benchmark(reference: dict) -> None:
    assert pytest.approx(reference["openmm_mapping"]["temperature_K"], rel=1e-9) == TEMPERATURE


def test_walkers_keep_the_boltzmann_distribution() -> None:
    frames = run_walkers(POTENTIAL, n_walkers=400, n_frames=8, spacing=1.0, settings=WalkerSettings(1, discard=2.0))
    assert frames.shape == (400, 8, 2)
    points, probability = POTENTIAL.boltzmann()
    exact = np.sum(probability * POTENTIAL.energy(points))
    means = POTENTIAL.energy(frames).mean(axis=1)
    # the means of a walker's frames scatter by about kT
    assert abs(means.mean() - exact) < 4 * means.std(ddof=1) / np.sqrt(400)
    assert means.std(ddof=1) / np.sqrt(400) < 0.06 * KT


def test_velocities_are_maxwellian() -> None:
    context = WalkerSettings(3, mass=2.0).context(POTENTIAL, 3000)
    context.getIntegrator().step(500)
    velocities = context.getState(velocities=True).getVelocities(asNumpy=True)._value
    assert 2.0 * np.mean(velocities[:, :2] ** 2) == pytest.approx(KT, rel=4 * np.sqrt(2 / 6000))


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_potentials, "CHUNK", 4)
    options = {"n_walkers": 3, "spacing": 0.1, "settings": WalkerSettings(4, discard=0.2)}
    whole = run_walkers(POTENTIAL, n_frames=11, **options)  # type: ignore[arg-type]
    calls: list[tuple[int, int]] = []
    run_walkers(POTENTIAL, n_frames=8, folder=tmp_path, **options)  # type: ignore[arg-type]
    resumed = run_walkers(
        POTENTIAL, n_frames=11, folder=tmp_path, progress=lambda *a: calls.append(a), **options  # type: ignore[arg-type]
    )  # fmt: skip
    np.testing.assert_array_equal(resumed, whole)
    assert calls == [(11, 11)]
    again = run_walkers(POTENTIAL, n_frames=5, folder=tmp_path, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again, whole[:, :5])
    with pytest.raises(ValueError, match=r"folder: .* holds a run of walkers with other settings"):
        run_walkers(POTENTIAL, n_walkers=3, n_frames=5, spacing=0.1, settings=WalkerSettings(5), folder=tmp_path)


def test_cores_watched_as_the_walkers_run_are_those_of_the_frames() -> None:
    settings = WalkerSettings(6, discard=0.0)
    frames = run_walkers(POTENTIAL, n_walkers=40, n_frames=801, spacing=0.05, settings=settings)
    expected = hitting_times(list(frames[:, 1:]), ELLIPSES, 0.05)
    steps: list[int] = []
    watched = watch_cores(
        POTENTIAL, ELLIPSES, n_walkers=40, duration=40.0, settings=settings, every=25,
        progress=lambda done, _: steps.append(done),
    )  # fmt: skip
    assert expected["0", "1"].n >= 5
    for pair, passages in expected.items():
        np.testing.assert_allclose(np.sort(watched.passages[pair].times), np.sort(passages.times))
        assert watched.passages[pair].events == passages.events
        assert watched.passages[pair].time_at_risk == pytest.approx(passages.time_at_risk)
    assert watched.energy.value == pytest.approx(POTENTIAL.energy(frames[:, 1::10]).mean(), rel=1e-9)
    assert steps[-1] <= 20000


def test_bad_input_is_refused() -> None:
    good = WalkerSettings(1)
    with pytest.raises(ValueError, match="timestep: expected a positive number"):
        WalkerSettings(1, timestep=0.0)
    with pytest.raises(ValueError, match="discard: expected a time"):
        WalkerSettings(1, discard=-1.0)
    with pytest.raises(ValueError, match="n_walkers: expected at least 1, got 0"):
        run_walkers(POTENTIAL, n_walkers=0, n_frames=1, spacing=0.5, settings=good)
    with pytest.raises(ValueError, match="spacing: expected a multiple of the time step"):
        run_walkers(POTENTIAL, n_walkers=1, n_frames=1, spacing=0.0031, settings=good)
    with pytest.raises(ValueError, match="spacing: expected at least one time step"):
        run_walkers(POTENTIAL, n_walkers=1, n_frames=1, spacing=0.0, settings=good)
    with pytest.raises(ValueError, match="duration: expected at least"):
        watch_cores(POTENTIAL, ELLIPSES, n_walkers=1, duration=0.0, settings=good)
    with pytest.raises(ValueError, match="xy: expected points of shape"):
        POTENTIAL.energy(np.zeros(3))
    with pytest.raises(ValueError, match="mass: expected a positive"):
        POTENTIAL.system(1, mass=0.0)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        run_walkers(POTENTIAL, n_walkers=2, n_frames=3, spacing=50.0, settings=WalkerSettings(1, timestep=0.5))
