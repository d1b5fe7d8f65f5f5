"""Autoencoder and training on processes whose slow coordinates and time scales are known."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_led import LED, Features, LEDConfig, LEDLearner, LEDOptions, Trajectories
from openmm_led.autoencoder import Autoencoder, Scaler, Shapes, vamp2
from openmm_led.propagator import LatentRNN
from openmm_led.training import decorrelation_times
from openmm_led.trajectories import check_separate
from openmm_mlff.data import model_file
from openmm_mlff.sampling.propagators import load_propagator


def slow_and_fast(seed: int, runs: int = 16, frames: int = 1500) -> Trajectories:
    """x jumps between two wells with probability 0.02 per frame (correlation 0.96 per frame), y is noise."""
    random = np.random.default_rng(seed)
    jumps = np.cumsum(random.random((runs, frames)) < 0.02, axis=1) % 2
    x = 2.0 * jumps - 1.0 + 0.2 * random.standard_normal((runs, frames))
    y = random.standard_normal((runs, frames))
    positions = np.stack([x, y, np.zeros_like(x)], -1)[:, :, None]
    return Trajectories(tuple(positions), interval=2.0)


SMALL = LEDConfig(latent_dim=1, encoder_widths=(16,), decoder_widths=(16,), decoder_kernels=3, hidden=8, kernels=3)
QUICK = LEDOptions(autoencoder_steps=250, batch=256, propagator_steps=600, lanes=16, chunk=50, learning_rate=5e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LED, Path]:
    folder = tmp_path_factory.mktemp("led")
    learner = LEDLearner(Features.raw(2), SMALL, QUICK)
    model = learner.fit(slow_and_fast(0), slow_and_fast(1), folder, temperature=300.0, progress=False)
    return model, folder


def correlation(x: np.ndarray, lag: int) -> float:
    """Of runs ``(n, frames)`` about their common mean."""
    x = x - x.mean()
    return float((x[:, :-lag] * x[:, lag:]).mean() / (x * x).mean())


def test_the_latent_coordinate_is_the_slow_one(trained: tuple[LED, Path]) -> None:
    model, _ = trained
    test = np.stack(slow_and_fast(2).frames)
    z = model.encode(test.reshape(-1, 1, 3))[:, 0]
    x, y = test.reshape(-1, 3)[:, 0], test.reshape(-1, 3)[:, 1]
    assert abs(np.corrcoef(z, np.sign(x))[0, 1]) > 0.97
    assert abs(np.corrcoef(z, y)[0, 1]) < 0.1
    assert z.std() == pytest.approx(1.0, abs=0.1)


def test_generated_dynamics_jumps_as_often_as_the_data(trained: tuple[LED, Path]) -> None:
    model, _ = trained
    random = np.random.default_rng(5)
    start = model.encode(np.stack(slow_and_fast(2).frames)[:, :20].reshape(-1, 1, 3)).reshape(16, 20, 1)
    path, _ = model.run(model.start(np.tile(start, (13, 1, 1))), 600, random)
    wells = np.sign(model.decode(path.reshape(-1, 1), random)[:, 0, 0]).reshape(208, 600)
    # two symmetric wells: correlation (1 - 2 p)^lag with p = 0.02
    assert correlation(wells, 15) == pytest.approx(0.96**15, abs=0.12)
    expected = np.sign(np.stack(slow_and_fast(0).frames)[..., 0, 0]).mean()
    assert wells.mean() == pytest.approx(expected, abs=0.25)


def test_walkers_of_a_poor_propagator_stay_where_the_data_are(trained: tuple[LED, Path]) -> None:
    """Random weights: without limits, most steps lead away from the data."""
    model, _ = trained
    torch.manual_seed(3)
    poor = LED(model.config, model.features, model.autoencoder, [LatentRNN(model.config)], interval=2.0)
    assert model.support is not None
    poor.support = model.support
    z = np.stack([model.encode(x) for x in slow_and_fast(0).frames])
    np.testing.assert_allclose(poor.support.limits[:, 0], [z.min(), z.max()], atol=1e-6)
    far = {}
    for confined in (False, True):
        poor.confined = confined
        path, _ = poor.run(poor.start(z[:, :20]), 500, np.random.default_rng(0))
        far[confined] = float(((path < z.min() - 1e-6) | (path > z.max() + 1e-6)).mean())
        assert np.abs(np.diff(path, axis=1)).mean() > 0.05
    assert far[False] > 0.5 and far[True] == 0.0


def test_a_walker_that_starts_beyond_the_data_may_come_back(trained: tuple[LED, Path]) -> None:
    model, _ = trained
    assert model.support is not None
    low, high = model.support.limits[:, 0]
    z, inside = np.array([[high + 1.0]] * 3), 0.5 * (low + high)
    later = np.array([[high + 0.5], [high + 1.5], [inside]])
    assert model.support.beyond(z, later).tolist() == [1]
    assert model.support.beyond(np.full((2, 1), inside), np.array([[low - 0.1], [low + 0.1]])).tolist() == [0]
    path, _ = model.run(model.start(np.full((50, 1, 1), high + 1.0)), 100, np.random.default_rng(1))
    assert path[:, 0].max() <= high + 1.0 and (path[:, -1] <= high).mean() > 0.9


def test_a_model_file_without_limits_confines_less(trained: tuple[LED, Path], tmp_path: Path) -> None:
    model, _ = trained
    tensors = {name: value for name, value in model.tensors().items() if name != "support.limits"}
    read = load_propagator(model_file.save(tmp_path / "before.safetensors", model.card(), tensors))
    assert isinstance(read, LED) and read.support is not None
    assert np.isinf(read.support.limits).all()
    assert np.isfinite(read.run(read.start(np.zeros((2, 1, 1))), 5, np.random.default_rng(0))[0]).all()


def test_decoded_positions_have_the_distribution_of_the_data(trained: tuple[LED, Path]) -> None:
    model, _ = trained
    test = np.stack(slow_and_fast(2).frames).reshape(-1, 1, 3)
    decoded = model.decode(model.encode(test), np.random.default_rng(0))
    assert np.abs(decoded[:, 0, 2]).max() == 0.0
    np.testing.assert_allclose(decoded[:, 0, :2].mean(0), test[:, 0, :2].mean(0), atol=0.08)
    np.testing.assert_allclose(decoded[:, 0, :2].std(0), test[:, 0, :2].std(0), rtol=0.08)


def test_model_file_keeps_everything(trained: tuple[LED, Path], tmp_path: Path) -> None:
    model, _ = trained
    read = load_propagator(model.save(tmp_path / "led.safetensors"))
    assert isinstance(read, LED)
    x = slow_and_fast(3).frames[0][:30]
    np.testing.assert_array_equal(read.encode(x), model.encode(x))
    assert (read.interval, read.temperature, read.n_atoms) == (2.0, 300.0, 1)
    assert read.details["training_data"]["train"]["runs"] == 16
    paths = []
    for m in (model, read):
        random = np.random.default_rng(1)
        path, state = m.run(m.start(m.encode(x)[None]), 40, random)
        paths.append((path, m.decode(state.z, random), m.doubt(state)))
    for a, b in zip(*paths, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_spread_of_one_member_is_null_in_the_card(trained: tuple[LED, Path], tmp_path: Path) -> None:
    model, _ = trained
    assert model.support is not None and model.support.spread == np.inf
    card = model.card()
    json.dumps(card, allow_nan=False)
    assert card["config"]["support"][1] is None
    card["config"]["support"][1] = np.inf  # as it was written at first
    for k, stored in enumerate((model.card(), card)):
        read = load_propagator(model_file.save(tmp_path / f"led_{k}.safetensors", stored, model.tensors()))
        assert isinstance(read, LED) and read.support is not None
        assert (read.support.spread, read.support.distance) == (np.inf, model.support.distance)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("support.accept", None, "'accept' is missing"),
        ("support.pairs", torch.zeros(4, 2, 3), r"support.pairs: expected shape \(4, 2, 1\), got \(4, 2, 3\)"),
        ("support.points", torch.zeros(9, 2), "support"),
        ("rnn_0.trunk.bias", None, "rnn_0|trunk.bias"),
    ],
)
def test_a_damaged_model_file_is_refused(
    trained: tuple[LED, Path], tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    model, _ = trained
    tensors = model.tensors()
    del tensors[name]
    if value is not None:
        tensors[name] = value
    path = model_file.save(tmp_path / "led.safetensors", model.card(), tensors)
    with pytest.raises(ValueError, match=rf"modelPath: .*({message})"):
        load_propagator(path)


def test_a_stopped_training_goes_on_to_the_same_model(trained: tuple[LED, Path], tmp_path: Path) -> None:
    model, folder = trained
    learner = LEDLearner(Features.raw(2), SMALL, QUICK)
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "propagator_0")
    again = learner.fit(slow_and_fast(0), slow_and_fast(1), tmp_path / "again", temperature=300.0, progress=False)
    for name, value in model.tensors().items():
        assert torch.equal(value, again.tensors()[name]), name
    with pytest.raises(ValueError, match="data"):
        learner.fit(slow_and_fast(7), slow_and_fast(1), tmp_path / "again", progress=False)


def test_doubt_exceeds_one_far_from_the_data_only(trained: tuple[LED, Path]) -> None:
    model, _ = trained
    inside = model.encode(slow_and_fast(4).frames[0][:200])
    state = model.start(inside[:, None])
    assert np.mean(model.doubt(state) > 1.0) < 0.02
    assert (model.doubt(model.start(inside[:5, None] * 0 + 30.0)) > 1.0).all()


def test_members_share_their_steps_and_show_their_spread(tmp_path: Path) -> None:
    config = LEDConfig(
        latent_dim=1, encoder_widths=(8,), decoder_widths=(8,), decoder_kernels=2, hidden=6, kernels=2, members=2
    )
    options = LEDOptions(autoencoder_steps=40, batch=128, propagator_steps=40, lanes=4, chunk=30)
    data = slow_and_fast(0, 4, 400), slow_and_fast(1, 2, 400)
    model = LEDLearner(Features.raw(2), config, options).fit(*data, tmp_path, progress=False)
    state = model.start(model.encode(data[1].frames[0][:50])[None].repeat(6, 0))
    assert set(state.memory) == {"memory_0", "memory_1"}
    assert (model.spread(state) > 0).all()
    later = model.step(state, np.random.default_rng(0))
    assert later.z.shape == (6, 1) and np.isfinite(later.z).all()
    assert model.support is not None and np.isfinite(model.support.spread)


def test_the_best_of_several_autoencoders_is_kept(tmp_path: Path) -> None:
    config = LEDConfig(latent_dim=1, encoder_widths=(8,), decoder_widths=(8,), decoder_kernels=2, hidden=6, kernels=2)
    options = LEDOptions(autoencoder_steps=20, batch=128, propagator_steps=10, lanes=4, chunk=30, restarts=4)
    data, said = (slow_and_fast(0, 4, 400), slow_and_fast(1, 2, 400)), list[str]()
    learner = LEDLearner(Features.raw(2), config, options)
    model = learner.fit(*data, tmp_path, progress=False, say=said.append)
    stored = [
        torch.load(tmp_path / f"autoencoder{ending}" / "checkpoint.pt", weights_only=True)["best"]
        for ending in ("", "_1", "_2", "_3")
    ]
    losses = [s["loss"] for s in stored]
    assert [line.split()[-1] for line in said[:4]] == [f"{loss:.4g}" for loss in losses]
    best = int(np.argmin(losses))
    assert best != 0  # of this seed; else taking the first would pass too
    for name in ("encoder.0.weight", "encoder.2.bias"):
        assert torch.equal(model.autoencoder.state_dict()[name], stored[best]["tensors"][name])
    again = learner.fit(*data, tmp_path, progress=False)
    assert all(torch.equal(value, again.tensors()[name]) for name, value in model.tensors().items())
    with pytest.raises(ValueError, match="restarts: expected 1 with the objective 'tica', got 2"):
        LEDLearner(Features.raw(2), LEDConfig(objective="tica", encoder_widths=()), LEDOptions(restarts=2))


def test_decorrelation_times_tell_of_every_coordinate() -> None:
    assert decorrelation_times([1.0, np.exp(-0.5), 0.0, -0.2], 2.0) == ["inf", "4", "< 2", "< 2"]


def test_vamp2_of_a_linear_process_is_the_sum_of_squared_autocorrelations() -> None:
    random, rates = np.random.default_rng(0), np.array([0.95, 0.5])
    x = np.zeros((100_000, 2))
    for k in range(1, len(x)):
        x[k] = rates * x[k - 1] + np.sqrt(1 - rates**2) * random.standard_normal(2)
    mixed = torch.as_tensor(x @ np.array([[1.0, 0.4], [-0.3, 2.0]]))  # the score knows no basis
    assert float(vamp2(mixed[:-1], mixed[1:])) == pytest.approx(0.95**2 + 0.5**2, abs=0.02)


def test_orientation_gives_white_coordinates_in_the_order_of_their_times() -> None:
    random, rates = np.random.default_rng(0), np.array([0.3, 0.9])
    x = np.zeros((20_000, 2))
    for k in range(1, len(x)):
        x[k] = rates * x[k - 1] + np.sqrt(1 - rates**2) * random.standard_normal(2)
    model = Autoencoder(LEDConfig(latent_dim=2), Shapes(3, np.zeros(3, bool), np.zeros(3, bool)))
    u = x @ np.array([[1.0, 0.4], [-0.3, 2.0]]) + 5.0
    slow = model.orient(u[:-1], u[1:])
    np.testing.assert_allclose(slow, [0.9, 0.3], atol=0.03)
    z = (torch.as_tensor(u, dtype=torch.float32) - model.z_mean) @ model.z_turn
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=0.01)
    np.testing.assert_allclose(z @ model.z_back + model.z_mean, u, atol=1e-4)
    with pytest.raises(ValueError, match="latent_dim"):
        model.orient(np.repeat(u[:-1, :1], 2, 1), np.repeat(u[1:, :1], 2, 1))


@pytest.mark.parametrize("form", ["standard", "logit"])
def test_scaled_coordinates_come_back(form: str) -> None:
    random = np.random.default_rng(0)
    x = np.stack([3.0 + 0.01 * random.standard_normal(500), random.uniform(2.9, 3.5, 500)], -1)
    x[:, 1] = np.pi - np.remainder(np.pi - x[:, 1], 2 * np.pi)  # a dihedral that crosses pi
    scaler = Scaler(np.array([False, True]), form)
    scaler.fit(x)
    y = scaler(torch.as_tensor(x)).numpy()
    np.testing.assert_allclose(scaler.back(y), x, atol=1e-5)
    if form == "standard":
        np.testing.assert_allclose(y.std(0), 1.0, atol=0.01)


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good, other = slow_and_fast(0, 3, 200), slow_and_fast(1, 2, 200)
    with pytest.raises(ValueError, match=r"frame 7 of trajectory 0 holds NaN"):
        broken = good.frames[0].copy()
        broken[7, 0, 1] = np.nan
        Trajectories((broken,), 1.0)
    with pytest.raises(ValueError, match="at least one, got none"):
        Trajectories((), 1.0)
    with pytest.raises(ValueError, match="time between frames"):
        check_separate({"train": good, "valid": Trajectories(other.frames, 1.0)})
    with pytest.raises(ValueError, match=r"200 frames of valid are also in train"):
        check_separate({"train": good, "valid": Trajectories(good.frames[1:2], 2.0)})
    learner = LEDLearner(Features.raw(2), LEDConfig(latent_dim=1, lag=200), QUICK)
    with pytest.raises(ValueError, match="lag: expected fewer than the 200 frames"):
        learner.fit(good, other, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="expected the 2 atoms"):
        LEDLearner(Features.raw(2, 2), SMALL, QUICK).fit(good, other, tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="at least 100 training frames, got 60"):
        LEDLearner(Features.raw(2), SMALL, QUICK).fit(slow_and_fast(3, 3, 20), other, tmp_path / "c", progress=False)
    flat = tuple(f * [1.0, 0.0, 0.0] for f in good.frames)
    with pytest.raises(ValueError, match="latent_dim: expected at most 1, the rank"):
        LEDLearner(Features.raw(2), LEDConfig(latent_dim=2), QUICK).fit(
            Trajectories(flat, 2.0), other, tmp_path / "d", progress=False
        )


@pytest.mark.parametrize(
    ("field", "value"), [("latent_dim", 9), ("decoder", "flow"), ("cell", "rnn"), ("lag", 0), ("floor", 0.0)]
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        LEDConfig(**{field: value})  # type: ignore[arg-type]


def test_the_published_decoder_finds_both_wells(tmp_path: Path) -> None:
    config = LEDConfig(
        latent_dim=1, encoder_widths=(16,), decoder_widths=(16,), decoder="fixed_joint", decoder_kernels=2, hidden=6,
        kernels=2, objective="reconstruction",
    )  # fmt: skip
    options = LEDOptions(autoencoder_steps=250, batch=256, propagator_steps=20, lanes=8, chunk=50, learning_rate=5e-3)
    model = LEDLearner(Features.raw(2), config, options).fit(
        slow_and_fast(0, 8, 600), slow_and_fast(1, 4, 600), tmp_path, progress=False
    )
    x = np.concatenate(slow_and_fast(2, 4, 600).frames)
    decoded = model.decode(model.encode(x), np.random.default_rng(0))
    assert np.mean(np.sign(decoded[:, 0, 0]) == np.sign(x[:, 0, 0])) > 0.95
    # a model that is read has its kernels' weights from z too, not those of the first stage
    read = load_propagator(model.save(tmp_path / "led.safetensors"))
    assert isinstance(read, LED)
    z, y = torch.tensor([[-1.0], [1.0]]), torch.as_tensor(x[:2, 0, :2], dtype=torch.float32)
    torch.testing.assert_close(read.autoencoder.nll(z, y), model.autoencoder.nll(z, y))


def test_decoded_coordinates_stay_within_the_range_of_the_data(trained: tuple[LED, Path]) -> None:
    model, _ = trained
    data = np.concatenate(slow_and_fast(0).frames)[:, 0]
    far = model.decode(np.linspace(-60.0, 60.0, 4000)[:, None], np.random.default_rng(0))[:, 0]
    for k in (0, 1):
        assert far[:, k].min() >= data[:, k].min() - 1e-6 and far[:, k].max() <= data[:, k].max() + 1e-6


def test_calibrated_coordinates_have_the_mean_and_width_of_the_data(tmp_path: Path) -> None:
    """A decoder that has hardly been trained is off in both."""
    options = dataclasses.replace(QUICK, autoencoder_steps=20, propagator_steps=5)
    config = dataclasses.replace(SMALL, calibrate=True)
    data = slow_and_fast(0)
    model = LEDLearner(Features.raw(2), config, options).fit(data, slow_and_fast(1), tmp_path / "run", progress=False)
    held = np.concatenate(slow_and_fast(2).frames)
    read = load_propagator(model.save(tmp_path / "led.safetensors"))
    assert isinstance(read, LED)
    decoded = read.decode(read.encode(held), np.random.default_rng(0))[:, 0, :2]
    np.testing.assert_allclose(decoded.mean(0), held[:, 0, :2].mean(0), atol=0.05)
    np.testing.assert_allclose(decoded.std(0), held[:, 0, :2].std(0), rtol=0.04)
    read.moments = None
    before = read.decode(read.encode(held), np.random.default_rng(0))[:, 0, :2]
    assert np.abs(before.std(0) / held[:, 0, :2].std(0) - 1.0).max() > 0.1
    damaged = model.tensors() | {"moments": torch.zeros(2, 3)}
    path = model_file.save(tmp_path / "damaged.safetensors", model.card(), damaged)
    with pytest.raises(ValueError, match=r"moments: expected shape \(2, 2\), got \(2, 3\)"):
        load_propagator(path)
