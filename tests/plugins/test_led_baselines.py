"""Baselines of LED on chains and linear processes whose parameters are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

from openmm_led import LED, Features, LEDConfig, Trajectories
from openmm_led.autoencoder import Autoencoder, Shapes
from openmm_led.baselines import LinearGaussian, MSMPropagator
from openmm_led.projections import LinearProjection
from openmm_led.propagator import LatentRNN
from openmm_mlff.data import model_file

pytest.importorskip("deeptime")

#: three states with detailed balance, and where they are in the plane
CHAIN = np.array([[0.95, 0.05, 0.0], [0.10, 0.85, 0.05], [0.0, 0.10, 0.90]])
PLACES = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 3.0]])
#: z' = A z + b + noise
SLOPES = np.array([[0.90, 0.05], [-0.10, 0.60]])
OFFSET = np.array([0.2, -0.1])
NOISE = np.array([[0.04, 0.01], [0.01, 0.09]])
FEATURES = Features.raw(2)


def walk(random: np.random.Generator, state: np.ndarray, n_frames: int) -> np.ndarray:
    ladder, path = CHAIN.cumsum(axis=1), []
    for _ in range(n_frames):
        path.append(state)
        state = np.minimum((random.uniform(size=(len(state), 1)) > ladder[state]).sum(axis=1), 2)
    return np.array(path).T


def as_trajectories(xy: np.ndarray, interval: float = 2.0) -> Trajectories:
    return Trajectories(tuple(np.pad(xy, ((0, 0), (0, 0), (0, 1)))[:, :, None]), interval)


@pytest.fixture(scope="module")
def jumps() -> Trajectories:
    """Points scattered closely about the places of the three states."""
    random = np.random.default_rng(0)
    states = walk(random, random.integers(3, size=30), 2000)
    return as_trajectories(PLACES[states] + 0.3 * random.standard_normal((*states.shape, 2)))


@pytest.fixture(scope="module")
def msm(jumps: Trajectories) -> MSMPropagator:
    encoder = LinearProjection.standardised(FEATURES, jumps)
    return MSMPropagator.fit(encoder, jumps, n_states=3, frames_per_state=50, temperature=300.0, seed=1)


def order_of(model: MSMPropagator) -> np.ndarray:
    """The model's number of each of the three states."""
    return model.states(model.encode(np.pad(PLACES, ((0, 0), (0, 1)))[:, None]))


def linear(seed: int = 0, n_trajs: int = 20, n_frames: int = 3000) -> Trajectories:
    random = np.random.default_rng(seed)
    factor = np.linalg.cholesky(NOISE)
    z = np.linalg.solve(np.eye(2) - SLOPES, OFFSET) + random.standard_normal((n_trajs, 2))
    path = []
    for _ in range(n_frames + 50):
        z = z @ SLOPES.T + OFFSET + random.standard_normal(z.shape) @ factor.T
        path.append(z)
    return as_trajectories(np.array(path[50:]).transpose(1, 0, 2))


@pytest.fixture(scope="module")
def gaussian() -> LinearGaussian:
    train = linear()
    identity = LinearProjection(FEATURES, np.zeros(2), np.eye(2))
    return LinearGaussian.fit(identity, train, n_frames=5000, temperature=300.0)


def test_a_state_model_finds_the_chain(msm: MSMPropagator, jumps: Trajectories) -> None:
    found = msm.transitions[np.ix_(order_of(msm), order_of(msm))]
    visits = np.linalg.matrix_power(CHAIN, 500)[0] * jumps.n_frames
    error = np.sqrt(CHAIN * (1 - CHAIN) / visits[:, None])
    assert (np.abs(found - CHAIN) <= 4.0 * error + 1e-9).all()
    assert (msm.kept, msm.interval, msm.temperature, msm.latent_dim, msm.n_atoms) == (1.0, 2.0, 300.0, 2, 1)


def test_a_state_model_is_that_of_deeptime(msm: MSMPropagator, jumps: Trajectories) -> None:
    from deeptime.markov.msm import MaximumLikelihoodMSM

    dtrajs = [msm.states(msm.encode(run)) for run in jumps.frames]
    theirs = MaximumLikelihoodMSM(lagtime=1).fit(dtrajs, lagtime=1).fetch_model()
    np.testing.assert_allclose(msm.transitions, theirs.transition_matrix, atol=1e-7)


def test_a_state_model_generates_its_chain(msm: MSMPropagator) -> None:
    random = np.random.default_rng(2)
    start = msm.start(msm.points[random.integers(len(msm.points), size=(500, 1))])
    path, after = msm.run(start, 400, random)
    states = msm.states(path.reshape(-1, 2)).reshape(500, 400)
    counts = np.zeros((3, 3))
    np.add.at(counts, (states[:, :-1].ravel(), states[:, 1:].ravel()), 1.0)
    total = counts.sum(axis=1, keepdims=True)
    error = np.sqrt(msm.transitions * (1 - msm.transitions) / total)
    assert (np.abs(counts / total - msm.transitions) <= 4.0 * error + 1e-9).all()
    assert total.min() > 5000
    np.testing.assert_array_equal(after.z, path[:, -1])


def test_what_a_state_model_decodes_are_training_frames_of_the_state(msm: MSMPropagator, jumps: Trajectories) -> None:
    random = np.random.default_rng(3)
    z = random.normal(size=(400, 2))
    positions = msm.decode(z, random)
    assert positions.shape == (400, 1, 3)
    known = {row.tobytes() for run in jumps.frames for row in run.astype(np.float32)}
    assert all(row.astype(np.float32).tobytes() in known for row in positions)
    np.testing.assert_array_equal(msm.states(msm.encode(positions)), msm.states(z))
    one = msm.decode(np.repeat(z[:1], 300, axis=0), random)
    assert len(np.unique(one[:, 0, 0])) > 40, "every stored frame of the state may come"
    assert np.bincount(msm.states(msm.points)).max() <= 50


def test_states_that_are_not_connected_are_left_out() -> None:
    random = np.random.default_rng(4)
    xy = PLACES[walk(random, np.zeros(10, dtype=int), 500)] + 0.2 * random.standard_normal((10, 500, 2))
    far = np.full((1, 500, 2), 20.0) + 0.2 * random.standard_normal((1, 500, 2))
    train = as_trajectories(np.concatenate([xy, far]))
    model = MSMPropagator.fit(LinearProjection.standardised(FEATURES, train), train, n_states=4, seed=2)
    assert len(model.centres) == 3
    assert model.kept == pytest.approx(10 / 11)
    assert ((model.states(model.encode(train.frames[-1])) >= 0) & (model.states(model.encode(far_of(train))) < 3)).all()


def far_of(train: Trajectories) -> np.ndarray:
    return train.frames[-1]


def test_a_linear_model_finds_its_parameters(gaussian: LinearGaussian) -> None:
    n = 20 * 2999
    stationary = solve_discrete_lyapunov(SLOPES, NOISE)
    error = np.sqrt(np.outer(np.diag(NOISE), np.diag(np.linalg.inv(stationary))) / n)
    assert (np.abs(gaussian.matrix - SLOPES) < 4.0 * error).all()
    spread = np.sqrt((np.outer(np.diag(NOISE), np.diag(NOISE)) + NOISE**2) / n)
    assert (np.abs(gaussian.covariance - NOISE) < 4.0 * spread).all()
    mean = np.linalg.solve(np.eye(2) - SLOPES, OFFSET)
    np.testing.assert_allclose(np.linalg.solve(np.eye(2) - gaussian.matrix, gaussian.offset), mean, atol=0.03)


def test_a_linear_model_generates_its_stationary_process(gaussian: LinearGaussian) -> None:
    random = np.random.default_rng(5)
    path, _ = gaussian.run(gaussian.start(np.zeros((400, 3, 2))), 300, random)
    late = path[:, 100:]
    exact = solve_discrete_lyapunov(gaussian.matrix, gaussian.covariance)
    flat = late.reshape(-1, 2) - late.mean(axis=(0, 1))
    np.testing.assert_allclose(np.cov(flat.T), exact, atol=0.05 * exact.max())
    lagged = flat.reshape(late.shape)[:, :-5].reshape(-1, 2).T @ flat.reshape(late.shape)[:, 5:].reshape(-1, 2)
    expected = exact @ np.linalg.matrix_power(gaussian.matrix, 5).T
    np.testing.assert_allclose(lagged / (400 * 195), expected, atol=0.03 * exact.max())


def test_a_linear_model_decodes_the_nearest_frame(gaussian: LinearGaussian) -> None:
    z = np.random.default_rng(6).normal(size=(30, 2))
    nearest = np.linalg.norm(z[:, None] - gaussian.points, axis=2).argmin(axis=1)
    positions = gaussian.decode(z, np.random.default_rng(0))
    np.testing.assert_array_equal(positions, gaussian.frames[nearest])
    np.testing.assert_allclose(gaussian.encode(positions), gaussian.points[nearest], atol=1e-6)


@pytest.mark.parametrize("which", ["msm", "gaussian"])
def test_a_model_file_gives_the_same_model(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    path = model.save(tmp_path / "baseline.safetensors")
    card, tensors = model_file.load(path)
    assert (card["kind"], card["family"], card["config"]["form"]) == ("propagator", "led", model.form)
    again = type(model).from_card(card, tensors)
    assert again.details["training_data"] == model.details["training_data"]
    start = model.start(np.zeros((20, 1, 2)))
    for one, two in zip(
        model.run(start, 10, np.random.default_rng(7))[0],
        again.run(start, 10, np.random.default_rng(7))[0],
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(
        again.decode(start.z, np.random.default_rng(8)), model.decode(start.z, np.random.default_rng(8))
    )
    assert (again.interval, again.temperature) == (2.0, 300.0)
    other = LinearGaussian if which == "msm" else MSMPropagator
    with pytest.raises(ValueError, match="expected the form"):
        other.from_card(card, tensors)
    del tensors["points"]
    with pytest.raises(ValueError, match="does not describe"):
        type(model).from_card(card, tensors)


def test_an_encoder_of_ones_own_cannot_be_written(msm: MSMPropagator, jumps: Trajectories) -> None:
    nested = MSMPropagator.fit(msm, jumps, n_states=4)
    np.testing.assert_array_equal(nested.encode(jumps.frames[0]), msm.encode(jumps.frames[0]))
    with pytest.raises(ValueError, match="encoder: expected a LinearProjection or an LED model"):
        nested.card()


def test_the_interval_is_the_lag(msm: MSMPropagator, jumps: Trajectories) -> None:
    assert MSMPropagator.fit(msm.encoder, jumps, n_states=3, lag=4).interval == 8.0
    assert LinearGaussian.fit(msm.encoder, jumps, lag=3).interval == 6.0


def test_an_led_model_can_be_the_encoder(jumps: Trajectories, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LEDConfig(latent_dim=1, encoder_widths=(8,), decoder_widths=(8,), decoder_kernels=2, hidden=4, kernels=2)
    autoencoder = Autoencoder(config, Shapes.of(FEATURES))
    points = np.concatenate(jumps.frames)[:, 0, :2]
    autoencoder.fit_scales(points, points)
    led = LED(config, FEATURES, autoencoder, [LatentRNN(config)], interval=2.0)
    for model in (MSMPropagator.fit(led, jumps, n_states=10), LinearGaussian.fit(led, jumps)):
        again = type(model).from_card(*model_file.load(model.save(tmp_path / "baseline.safetensors")))
        np.testing.assert_array_equal(again.encode(jumps.frames[0]), led.encode(jumps.frames[0]))
        start = model.start(np.zeros((5, 1, 1)))
        np.testing.assert_array_equal(
            again.run(start, 20, np.random.default_rng(1))[0], model.run(start, 20, np.random.default_rng(1))[0]
        )


def test_the_tica_projection_separates_slow_from_fast() -> None:
    random = np.random.default_rng(9)
    slopes = np.array([0.98, 0.5])
    x, path = random.standard_normal((20, 2)), []
    for _ in range(3000):
        path.append(x)
        x = slopes * x + np.sqrt(1 - slopes**2) * random.standard_normal(x.shape)
    hidden = np.array(path).transpose(1, 0, 2)
    train = as_trajectories(hidden @ np.array([[0.2, 0.5], [3.0, -1.0]]))
    z = LinearProjection.tica(FEATURES, train, 2, lag=5).encode(np.concatenate(train.frames))
    for k in (0, 1):
        assert abs(np.corrcoef(z[:, k], hidden[..., k].ravel())[0, 1]) > 0.98
    np.testing.assert_allclose(z.std(axis=0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=1e-6)
    flat = as_trajectories(np.repeat(hidden[..., :1], 2, axis=2))
    with pytest.raises(ValueError, match="latent_dim: expected at most the rank"):
        LinearProjection.tica(FEATURES, flat, 2, lag=5)


def refusals() -> list[Any]:
    return [
        (lambda e, t: MSMPropagator.fit(e, t, lag=0), "lag: expected at least 1"),
        (lambda e, t: MSMPropagator.fit(e, t, lag=5000), "lag: expected fewer"),
        (lambda e, t: MSMPropagator.fit(e, t, n_states=0), "n_states: expected from 1"),
        (lambda e, t: MSMPropagator.fit(e, t, frames_per_state=0), "frames_per_state: expected at least 1"),
        (lambda e, t: LinearGaussian.fit(e, t, n_frames=0), "n_frames: expected at least 1"),
        (lambda e, t: LinearGaussian.fit(e, as_trajectories(np.ones((3, 50, 2)))), "latent_dim: expected at most the"),
        (lambda e, t: LinearGaussian.fit(LinearProjection(Features.raw(4, 2), np.zeros(4), np.eye(4)), t), "2 atoms"),
        (lambda e, t: LinearProjection.tica(FEATURES, t, 3), "latent_dim: expected at most the rank"),
        (lambda e, t: LinearProjection(FEATURES, np.zeros(3), np.eye(2)), "mean, matrix: expected shapes"),
    ]


@pytest.mark.parametrize(("call", "message"), refusals())
def test_bad_input_is_refused(call: Any, message: str, jumps: Trajectories, msm: MSMPropagator) -> None:
    with pytest.raises(ValueError, match=message):
        call(msm.encoder, jumps)


def test_bad_latent_coordinates_are_refused(msm: MSMPropagator, gaussian: LinearGaussian) -> None:
    random = np.random.default_rng(0)
    for model in (msm, gaussian):
        with pytest.raises(ValueError, match="history: expected shape"):
            model.start(np.zeros((3, 2)))
        with pytest.raises(ValueError, match="z: expected shape"):
            model.decode(np.zeros((3, 5)), random)
        with pytest.raises(ValueError, match="z: expected finite numbers"):
            model.step(model.start(np.full((1, 1, 2), np.nan)), random)
    with pytest.raises(ValueError, match="eigenvalues below one"):
        LinearGaussian(
            gaussian.encoder, gaussian.frames, gaussian.points, matrix=1.01 * np.eye(2), offset=np.zeros(2),
            covariance=np.eye(2), interval=1.0,
        )  # fmt: skip
