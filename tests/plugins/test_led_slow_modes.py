"""Slow linear functions of inputs: a process whose slow coordinate and relaxation time are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from openmm_led import LED, Features, LEDConfig, LEDLearner, LEDOptions, Trajectories
from openmm_led.slow_modes import SlowModes, slow_modes
from openmm_mlff.sampling.propagators import load_propagator

RHO = 0.95


def runs(n_runs: int, length: int, n_inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs that mix one slow process (autocorrelation `RHO`) with noise; pairs at lag 1; the slow process."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((n_inputs, n_inputs))
    x = np.empty((n_runs, length, n_inputs))
    x[..., 1:] = random.standard_normal((n_runs, length, n_inputs - 1))
    x[:, 0, 0] = random.standard_normal(n_runs)
    for t in range(1, length):
        x[:, t, 0] = RHO * x[:, t - 1, 0] + np.sqrt(1 - RHO**2) * random.standard_normal(n_runs)
    pairs = (np.arange(n_runs)[:, None] * length + np.arange(length - 1)).ravel()
    flat = x.reshape(-1, n_inputs)
    return flat @ mixing, pairs, flat[:, 0]


def fit(train: tuple[np.ndarray, ...], valid: tuple[np.ndarray, ...], latent_dim: int = 1) -> SlowModes:
    return slow_modes(train[0], train[1], valid[0], valid[1], 1, latent_dim)


def test_the_slow_process_is_found_with_its_correlation() -> None:
    train, valid = runs(10, 1000, 6, 0), runs(4, 1000, 6, 1)
    modes = fit(train, valid)
    u = (train[0] - train[0].mean(0)) @ modes.matrix
    assert abs(np.corrcoef(u[:, 0], train[2])[0, 1]) > 0.99
    # the square of the autocorrelation is the score of one coordinate
    assert modes.score == pytest.approx(RHO**2, abs=0.03)
    assert u.std() == pytest.approx(1.0, rel=0.02)


def test_short_runs_of_many_inputs_take_few_components() -> None:
    """With as many directions as frames every run has a constant of its own; validation must not fall for it."""
    random = np.random.default_rng(0)

    def made(seed: int) -> tuple[np.ndarray, np.ndarray]:
        slow, pairs, _ = runs(8, 30, 1, seed)
        return np.hstack([6.0 * slow / slow.std(), random.standard_normal((len(slow), 100))]), pairs

    train, valid = made(2), made(3)
    modes = fit(train, valid)
    a, b = ((x - train[0].mean(0)) @ modes.matrix for x in (valid[0][valid[1]], valid[0][valid[1] + 1]))
    assert np.corrcoef(a[:, 0], b[:, 0])[0, 1] ** 2 == pytest.approx(modes.score, rel=1e-3)
    assert modes.components < 20
    assert modes.score > 0.6


def test_units_of_inputs_do_not_hide_the_slow_one() -> None:
    """The slow input is a thousandth as wide as the others: without scaling it would be the last component."""
    random = np.random.default_rng(0)

    def made(seed: int) -> tuple[np.ndarray, np.ndarray]:
        slow, pairs, _ = runs(4, 500, 1, seed)
        return np.hstack([1e-3 * slow, random.standard_normal((len(slow), 30))]), pairs

    modes = fit(made(4), made(5))
    assert modes.scaled
    assert modes.score > 0.7


def test_rank_is_respected() -> None:
    train = runs(4, 100, 2, 0)
    doubled = (np.hstack([train[0], train[0]]), train[1])
    with pytest.raises(ValueError, match="latent_dim: expected at most the rank of the inputs, got 3"):
        fit(doubled, doubled, latent_dim=3)


def test_a_model_for_few_frames_is_trained_and_kept(tmp_path: Path) -> None:
    """Linear encoder and principal decoder in `LEDLearner`: slow latent, decoded covariance, and the file."""
    runs_of = {}
    for name, seed in (("train", 0), ("valid", 1)):
        flat, _, slow = runs(6, 60, 6, seed)
        runs_of[name] = Trajectories(tuple(flat.reshape(6, 60, 2, 3).astype(np.float32)), 1.0)
        if name == "train":
            x, known = flat, slow
    config = LEDConfig(
        latent_dim=1, encoder_widths=(), decoder_widths=(16,), objective="tica", decoder="principal",
        decoder_kernels=360, decoder_floor=0.4, hidden=4, kernels=1,
    )  # fmt: skip
    options = LEDOptions(autoencoder_steps=200, batch=360, propagator_steps=20, lanes=6, chunk=59, learning_rate=1e-2)
    model = LEDLearner(Features.raw(6, 2), config, options).fit(
        runs_of["train"], runs_of["valid"], tmp_path / "run", progress=False
    )
    z = model.encode(x.reshape(-1, 2, 3))
    assert abs(np.corrcoef(z[:, 0], known)[0, 1]) > 0.95
    assert z.std() == pytest.approx(1.0, rel=0.05)
    decoded = model.decode(np.repeat(z, 20, axis=0), np.random.default_rng(0)).reshape(-1, 6)
    expected = np.cov(x.T)
    assert np.abs(np.cov(decoded.T) - expected).max() < 0.15 * np.diag(expected).max()
    model.save(tmp_path / "model.safetensors")
    again = load_propagator(tmp_path / "model.safetensors")
    assert isinstance(again, LED)
    np.testing.assert_array_equal(again.decode(z, np.random.default_rng(1)), model.decode(z, np.random.default_rng(1)))
    # of several draws the one that is nearest to its latent state: 16 are astray by a sixteenth, as exponentials are
    first = np.abs(again.encode(again.decode(z, np.random.default_rng(2))) - z).mean()
    again.config = dataclasses.replace(again.config, decoder_draws=16)
    nearest = np.abs(again.encode(again.decode(z, np.random.default_rng(2))) - z).mean()
    assert nearest < first / 6


def test_a_linear_encoder_has_no_hidden_layers() -> None:
    with pytest.raises(ValueError, match="objective: 'tica' expects empty encoder_widths"):
        LEDConfig(objective="tica")
    with pytest.raises(ValueError, match="a decoder that is not fixed"):
        LEDConfig(objective="tica", encoder_widths=(), decoder="fixed")
