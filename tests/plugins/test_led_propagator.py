"""The recurrent propagator: numpy against torch, and stateful chunks against whole trajectories."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmm_led import LED, Features
from openmm_led.autoencoder import Autoencoder, Shapes
from openmm_led.config import LEDConfig
from openmm_led.propagator import ROWS, LatentRNN, PropagatorMethod, StatefulRNN, Stepper


def network(cell: str, layers: int = 1, seed: int = 0) -> LatentRNN:
    torch.manual_seed(seed)
    return LatentRNN(LEDConfig(latent_dim=2, cell=cell, hidden=6, layers=layers, kernels=3, floor=0.05)).eval()


@pytest.mark.parametrize(("cell", "layers"), [("lstm", 1), ("gru", 1), ("lstm", 2), ("gru", 3)])
def test_numpy_memory_is_that_of_torch(cell: str, layers: int) -> None:
    rnn = network(cell, layers)
    stepper = Stepper(rnn)
    z = torch.randn(4, 7, 2)
    with torch.no_grad():
        out, after = rnn.remember(z, rnn.blank(4))
        features = torch.tanh(rnn.trunk(torch.cat([out[:, -1], z[:, -1]], -1)))
        logw, centres, _, _ = rnn.density.parts(features)
        mean = (logw.exp()[..., None] * centres).sum(1)
    memory = stepper.blank(4)
    for k in range(7):
        memory = stepper.remember(z[:, k].numpy(), memory)
    for part, expected in enumerate(after):
        np.testing.assert_allclose(memory[:, part], expected.transpose(0, 1), atol=2e-6)
    found = stepper.features(z[:, -1].numpy(), memory)
    np.testing.assert_allclose(found, features, atol=2e-6)
    np.testing.assert_allclose(stepper.mean(found), mean, atol=2e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_many_walkers_remember_what_each_would_alone(cell: str) -> None:
    stepper, random = Stepper(network(cell, layers=2)), np.random.default_rng(0)
    n = 2 * ROWS + 3
    z, memory = random.standard_normal((n, 2)), random.standard_normal(stepper.blank(n).shape).astype(np.float32)
    kept = memory.copy()
    after = stepper.remember(z, memory)
    for k in (0, ROWS - 1, ROWS, n - 1):
        np.testing.assert_allclose(after[k], stepper.remember(z[k : k + 1], memory[k : k + 1])[0], atol=1e-6)
    np.testing.assert_array_equal(memory, kept)


def test_a_step_adds_a_sample_of_the_mixture_to_where_the_walker_is() -> None:
    config = LEDConfig(latent_dim=2, hidden=6, kernels=3, floor=0.05)
    torch.manual_seed(0)
    features, rnn = Features.raw(2), LatentRNN(config)
    model = LED(config, features, Autoencoder(config, Shapes.of(features)), [rnn], interval=1.0)
    z = np.tile(np.array([[0.4, -0.7]], np.float32), (20_000, 1))
    begin = model.start(np.stack([z - 0.1, z], axis=1))
    after = model.step(begin, np.random.default_rng(0))
    stepper = Stepper(rnn)
    memory = stepper.remember(z, stepper.remember(z - 0.1, stepper.blank(len(z))))
    np.testing.assert_allclose(after.memory["memory_0"], memory, atol=1e-6)
    expected = z[0] + stepper.mean(stepper.features(z[:1], memory[:1]))[0]
    np.testing.assert_allclose(after.z.mean(0), expected, atol=4 * after.z.std(0).max() / np.sqrt(len(z)))


def lengths_and_runs() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.standard_normal((n, 2)).astype(np.float32) for n in (23, 8, 15, 41, 2)]


def test_an_epoch_counts_every_step_of_every_trajectory_once() -> None:
    runs = lengths_and_runs()
    method = PropagatorMethod(runs, runs[:1], lanes=3, chunk=7, seed=0)
    counted = 0
    seen: set[tuple[float, ...]] = set()
    for indices in method.epoch(4):
        z, counts, _ = method.chunks(indices)
        counted += int(counts.sum())
        seen |= {tuple(row) for row in z[:, 1:][counts].tolist()}
    assert counted == sum(len(r) - 1 for r in runs)
    assert seen == {tuple(row) for r in runs for row in r[1:].tolist()}
    assert {len(method.epoch(e)) for e in range(20)} == {len(method.epoch(0))}
    orders = [np.concatenate(method.epoch(e)).tolist() for e in (0, 0, 1, 2, 3, 4, 5)]
    assert orders[0] == orders[1]
    assert any(order != orders[0] for order in orders)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_carried_memory_gives_the_likelihood_of_whole_trajectories(cell: str) -> None:
    runs = lengths_and_runs()
    rnn = network(cell)
    model = StatefulRNN(rnn, lanes=2)
    method = PropagatorMethod(runs, runs, lanes=2, chunk=5, seed=1)
    total, count = 0.0, 0
    with torch.no_grad():
        for indices in method.epoch(0):
            z, counts, fresh = method.chunks(indices)
            value = model(z, fresh)
            total += float(value[counts].sum())
            count += int(counts.sum())
        whole = [rnn.nll(torch.as_tensor(r)[None], rnn.blank(1))[0].sum() for r in runs]
    assert total == pytest.approx(float(sum(whole)), rel=1e-5)
    assert method.validate(model)["loss"] == pytest.approx(total / count, rel=1e-4)


def test_memory_of_the_lanes_is_part_of_the_state() -> None:
    model = StatefulRNN(network("lstm"), lanes=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(4, 6, 2), torch.ones(4, dtype=torch.bool))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"memory_0", "memory_1"}
