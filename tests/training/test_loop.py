"""The training loop: average of weights, schedules, stopping, failures, and resuming as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from openmm_mlff.data.datasets import write_dataset
from openmm_mlff.training import loop
from openmm_mlff.training.force_matching import ForceMatching
from openmm_mlff.training.loop import TrainingState
from openmm_mlff.training.loop_options import LoopOptions
from openmm_mlff.training.losses import LossWeights


class Parabola:
    """A method with one parameter: loss (theta - target_i)^2 / 2, one target per step."""

    def __init__(self, n: int = 10, bad_at: int | None = None) -> None:
        self.calls = 0
        self.bad_at = bad_at
        self.n = n
        self.validations = iter(range(10**6))

    def epoch(self, epoch: int) -> list[np.ndarray]:
        return [np.array([i]) for i in np.random.default_rng(epoch).permutation(self.n)]

    def loss(
        self, model: nn.Module, indices: np.ndarray, progress: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = 0.5 * (model(torch.ones(1)).squeeze() - float(indices[0])) ** 2
        if self.calls == self.bad_at:
            value = value * math.nan
        self.calls += 1
        return value, {"square": value.detach() * 2}

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(model.weight.detach())}


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(1, 1, bias=False)


def options(**changes: object) -> LoopOptions:
    settings = {"steps": 20, "warmup_steps": 0, "validate_every": 5, "checkpoint_seconds": 1e9, "learning_rate": 0.1}
    return LoopOptions(**(settings | changes))


def test_average_of_weights(tmp_path: Path) -> None:
    model = line()
    seen = [float(model.weight.detach())]

    class Watched(Parabola):
        def loss(self, model, indices, progress):  # type: ignore[no-untyped-def]
            seen.append(float(model.weight.detach()))
            return super().loss(model, indices, progress)

    state = loop.fit(model, Watched(), options(ema_decay=0.9), tmp_path, progress=False)
    seen = [*seen[1:], float(model.weight.detach())]
    expected = seen[0]
    for n, theta in enumerate(seen[1:], start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * theta
    assert float(state.ema.weight) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - seen[-1]) > 1e-3


def test_history_holds_means_since_the_last_validation(tmp_path: Path) -> None:
    losses = []

    class Watched(Parabola):
        def loss(self, model, indices, progress):  # type: ignore[no-untyped-def]
            value, terms = super().loss(model, indices, progress)
            losses.append(float(value.detach()))
            return value, terms

    state = loop.fit(line(), Watched(), options(steps=12), tmp_path, progress=False)
    assert [row["step"] for row in state.history] == [5, 10, 12]
    expected = [np.mean(losses[:5]), np.mean(losses[5:10]), np.mean(losses[10:])]
    np.testing.assert_allclose([row["train_loss"] for row in state.history], expected, rtol=1e-6)
    np.testing.assert_allclose([row["train_square"] for row in state.history], 2 * np.array(expected), rtol=1e-6)
    assert json.loads((tmp_path / "history.json").read_text(encoding="utf-8")) == state.history
    lines = (tmp_path / "history.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split(",")[:3] == ["step", "seconds", "learning_rate"] and len(lines) == 4


def test_cosine_schedule() -> None:
    settings = LoopOptions(steps=1000, learning_rate=1e-2, final_learning_rate=1e-4, warmup_steps=10)
    state = TrainingState(line(), line(), None)  # type: ignore[arg-type]
    rates = []
    for step in (0, 4, 500, 1000):
        state.step = step
        rates.append(loop.learning_rate(settings, state))
    assert rates[0] == pytest.approx(1e-3, rel=1e-6)
    assert rates[1] == pytest.approx(0.5e-2, rel=1e-4)
    assert rates[2] == pytest.approx(0.5 * (1e-2 + 1e-4)) and rates[3] == pytest.approx(1e-4)


def test_plateaus_lower_the_rate_and_early_stopping_ends() -> None:
    plateau = {"schedule": "plateau", "plateau_patience": 1, "plateau_factor": 0.5}
    settings = options(**plateau, learning_rate=1.0, final_learning_rate=0.2)
    state = TrainingState(line(), line(), None)  # type: ignore[arg-type]
    rates, best = [], []
    for loss in (1.0, 0.9, 0.95, 0.93, 0.91, 0.92, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9):
        best.append(loop.record_validation(state, {"loss": loss}, settings, 0.0))
        rates.append(loop.learning_rate(settings, state))
    # two validations in a row without a better one halve the rate, never below the final one
    assert rates == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert [i for i, b in enumerate(best) if b] == [0, 1, 6]
    assert state.best["loss"] == 0.8 and state.since_best == 6


def test_early_stopping(tmp_path: Path) -> None:
    class Worse(Parabola):
        def validate(self, model: nn.Module) -> dict[str, float]:
            return {"loss": float(next(self.validations))}

    state = loop.fit(line(), Worse(), options(steps=1000, validate_every=1, patience=3), tmp_path, progress=False)
    assert state.step == 5 and state.best["step"] == 1


def test_best_parameters_are_those_of_the_best_validation(tmp_path: Path) -> None:
    kept: dict[int, float] = {}

    class Vee(Parabola):
        def validate(self, model: nn.Module) -> dict[str, float]:
            return {"loss": abs(next(self.validations) - 2.0)}

    def note(state: TrainingState, better: bool) -> None:
        kept[state.step] = float(state.ema.weight)
        assert better == (state.step <= 15)

    state = loop.fit(line(), Vee(), options(steps=30), tmp_path, progress=False, on_validation=note)
    assert state.best["step"] == 15
    last = float(state.ema.weight)
    with loop.averaged(state) as model:
        assert float(model.weight) == kept[15] != last
    assert float(state.ema.weight) == last


def test_another_error_than_the_loss_may_decide_what_is_kept(tmp_path: Path) -> None:
    """The loss grows while the other error falls: by it the last is the best, also after a checkpoint."""
    settings = options(best_by="forces_mae")
    state = loop.init(line(), settings)
    for step, (loss, error) in enumerate([(1.0, 5.0), (2.0, 4.0), (3.0, 4.5)]):
        state.step = step
        loop.record_validation(state, {"loss": loss, "forces_mae": error}, settings, 0.0)
    assert state.best["step"] == 1 and state.best["judged"] == 4.0 and state.best["loss"] == 2.0
    loop.save_checkpoint(tmp_path / "c.pt", state, settings)
    again = loop.init(line(), settings)
    loop.load_checkpoint(tmp_path / "c.pt", again)
    assert loop.record_validation(again, {"loss": 9.0, "forces_mae": 3.9}, settings, 0.0)
    with pytest.raises(ValueError, match="best_by: expected one of loss, forces_mae, last, got 'forces'"):
        loop.record_validation(again, {"loss": 9.0, "forces_mae": 3.9}, options(best_by="forces"), 0.0)
    state.step = 7
    state.best = {}
    for step in (7, 8):
        state.step = step
        loop.record_validation(state, {"loss": float(step)}, options(best_by="last"), 0.0)
    assert state.best["step"] == 8


def test_gradients_are_clipped(tmp_path: Path) -> None:
    model = line()
    before = float(model.weight.detach())
    settings = options(steps=1, validate_every=1, clip_norm=1e-12)
    loop.fit(model, Parabola(), settings, tmp_path, progress=False)
    # Adam divides by |g| + 1e-8: with |g| = 1e-12 the step is 1e-4 of the learning rate
    assert abs(float(model.weight.detach()) - before) == pytest.approx(0.1 * 1e-12 / 1e-8, rel=1e-2)


def test_nan_stops_the_run_with_the_state_before_it(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7; the state before it is in .*failed\.pt"):
        loop.fit(line(), Parabola(bad_at=7), options(), tmp_path, progress=False)
    saved = TrainingState(line(), line(), None)  # type: ignore[arg-type]
    saved = loop.init(line(), options())
    loop.load_checkpoint(tmp_path / "failed.pt", saved)
    assert saved.step == 7
    good = loop.fit(line(), Parabola(), options(steps=7, schedule="constant"), tmp_path / "a", progress=False)
    bad = line()
    with pytest.raises(FloatingPointError):
        loop.fit(bad, Parabola(bad_at=7), options(schedule="constant"), tmp_path / "b", progress=False)
    assert torch.equal(bad.weight, good.model.weight)


def test_interrupt_ends_cleanly_and_resume_gives_the_same_curve(tmp_path: Path) -> None:
    whole = loop.fit(line(), Parabola(), options(), tmp_path / "whole", progress=False)

    class Interrupted(Parabola):
        def loss(self, model, indices, progress):  # type: ignore[no-untyped-def]
            if self.calls == 12:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, indices, progress)

    part = loop.fit(line(), Interrupted(), options(), tmp_path / "part", progress=False)
    assert part.step == 13
    model = line()
    with torch.no_grad():
        model.weight.fill_(7.0)
    rest = loop.fit(model, Parabola(), options(), tmp_path / "part", resume=True, progress=False)
    assert torch.equal(rest.model.weight, whole.model.weight) and torch.equal(rest.ema.weight, whole.ema.weight)
    assert without_time(rest.history) == without_time(whole.history)


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def test_a_time_limit_ends_cleanly_and_resume_gives_the_same_curve(tmp_path: Path) -> None:
    whole = loop.fit(line(), Parabola(), options(), tmp_path / "whole", progress=False)
    # a limit that is over at once lets each piece do one step
    pieces = 0
    while True:
        part = loop.fit(line(), Parabola(), options(), tmp_path / "part", True, progress=False, time_limit=0.0)
        pieces += 1
        if part.step == 20:
            break
        assert part.step == pieces
    assert pieces == 20
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in part.history] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in whole.history
    ]
    assert torch.equal(part.model.weight, whole.model.weight) and torch.equal(part.ema.weight, whole.ema.weight)


def test_foreign_and_damaged_checkpoints(tmp_path: Path) -> None:
    state = loop.init(line(), options())
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"resume: .*a\.pt cannot be read"):
        loop.load_checkpoint(tmp_path / "a.pt", state)
    loop.save_checkpoint(tmp_path / "b.pt", loop.init(nn.Linear(2, 1), options()), options())
    with pytest.raises(ValueError, match="belongs to another model"):
        loop.load_checkpoint(tmp_path / "b.pt", state)
    with pytest.raises(ValueError, match="parameters that require gradients"):
        loop.init(line().requires_grad_(False), options())


def test_amsgrad_keeps_the_largest_second_moment(tmp_path: Path) -> None:
    kept = {}
    for name in ("adamw", "amsgrad"):
        settings = options(optimizer=name, clip_norm=None, steps=200, learning_rate=1.0, validate_every=100)
        state = loop.fit(line(), Parabola(), settings, tmp_path / name, progress=False)
        kept[name] = next(iter(state.optimizer.state_dict()["state"].values()))
    assert float(kept["amsgrad"]["max_exp_avg_sq"]) > float(kept["amsgrad"]["exp_avg_sq"])
    assert "max_exp_avg_sq" not in kept["adamw"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected one of amsgrad, adamw, got 'sgd'"),
        ({"schedule": "step"}, "schedule: expected one of"),
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"ema_decay": 1.0}, r"ema_decay: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_options(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**change)


def test_learns_an_analytic_energy(tiny, waters, tmp_path: Path) -> None:
    model = tiny(torch.float32)
    method = ForceMatching(
        model, waters(48, seed=1), [s.replace(group="v") for s in waters(16, seed=2)],
        LossWeights(1.0, 1.0, 10.0), batch_size=8, seed=5,
    )  # fmt: skip
    before = method.validate(model)
    settings = LoopOptions(steps=500, learning_rate=1e-2, warmup_steps=20, validate_every=100, ema_decay=0.98)
    state = loop.fit(model, method, settings, tmp_path, progress=False)
    after = state.history[-1]
    spread = 1e3 * np.concatenate([s.forces.ravel() for s in waters(16, seed=2)]).std()
    # 48 molecules of three atoms are enough for a few per cent of the forces' spread
    assert after["valid_forces_rmse"] < 0.1 * spread < before["forces_rmse"]
    assert after["valid_dipole_rmse"] < 0.1 * before["dipole_rmse"]
    assert after["valid_energy_rmse"] < 0.1 * before["energy_rmse"]


def test_dropout_acts_in_training_only(tiny, waters, tmp_path: Path) -> None:
    model = tiny(torch.float32, num_modules=3, module_keep_prob=0.3)
    structures = waters(8, seed=1)
    method = ForceMatching(model, structures, [s.replace(group="v") for s in structures], batch_size=8)
    losses = {float(method.loss(model, np.arange(8), 0.0)[0].detach()) for _ in range(6)}
    assert len(losses) > 1
    state = loop.init(model, options())
    assert len({method.validate(state.ema)["loss"] for _ in range(4)}) == 1


def test_killed_run_goes_on_as_if_nothing_had_happened(waters, tmp_path: Path) -> None:
    structures = waters(24, seed=3, groups=6)
    write_dataset(tmp_path / "data", structures, name="waters", method={"method": "analytic"}, sampling={})
    recipe = {
        "seed": 2, "batch_size": 4, "threads": 1,
        "model": {"num_features": 8, "num_basis_functions": 8, "num_modules": 2, "num_random_features": 8,
                  "module_keep_prob": 0.8},
        "loop": {"steps": 90, "validate_every": 10, "warmup_steps": 5, "checkpoint_seconds": 0.05},
        "loss": {"energy": 1.0, "forces": 1.0, "dipole": 0.1},
        "data": {"fractions": {"train": 0.6, "valid": 0.2, "test": 0.2}},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")

    def start(output: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "openmm_mlff", "train", "--data", str(tmp_path / "data"), "--quiet"]
        return subprocess.Popen(
            [*command, "--output", str(tmp_path / output), *more],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = start("whole", "--config", str(tmp_path / "recipe.json"))
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    killed = start("killed", "--config", str(tmp_path / "recipe.json"))
    history = tmp_path / "killed" / "history.json"
    for _ in range(3000):
        if history.exists() and len(json.loads(history.read_text(encoding="utf-8"))) >= 3:
            break
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    checkpoint = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["step"] < 90 and not (tmp_path / "killed" / "test_errors.json").exists()
    resumed = start("killed", "--resume")
    assert resumed.wait(timeout=300) == 0, resumed.stderr.read()
    curves = [
        without_time(json.loads((tmp_path / n / "history.json").read_text(encoding="utf-8")))
        for n in ("whole", "killed")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 9
    states = [torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "killed")]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "killed")]
    assert files[0] == files[1]
