"""a method (batches, loss, validation) -> a trained model: the one training loop, on Lightning Fabric.

The loop is `init` + `step`; `fit` runs them to the end with validation, checkpoints and a progress bar.

Symbols of the code::

    theta   state.model       parameters that the optimiser moves
    theta'  state.ema         exponential moving average, theta' <- d theta' + (1 - d) theta; what is validated and kept
    d       options.ema_decay, smaller in the first steps: min(d, (1 + n) / (10 + n)) after n steps
    eta     learning_rate(options, state), a function of the step and, for plateaus, of the validations so far

A checkpoint holds all of it with the state of the random numbers, and the order of the data is a function of
(seed, epoch), so a run that was killed goes on bit for bit on the same machine with the same number of threads.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from openmm_mlff.data.files import write_atomically
from openmm_mlff.training.distributed import Team
from openmm_mlff.training.loop_options import LoopOptions

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_FORMAT = 1


class Method(Protocol):
    """What the loop needs to know about the thing that is learned.

    A method may also say how devices share a batch, ``share(indices, n)``: n parts (default: cut it where it is).
    """

    def epoch(self, epoch: int) -> Sequence[np.ndarray]:
        """The batches of an epoch, the same for the same number."""

    def loss(self, model: Any, indices: np.ndarray, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar to minimise and named parts of it; `progress` runs from 0 to 1."""

    def validate(self, model: Any) -> dict[str, float]:
        """Named errors, smaller is better, among them ``loss``."""


@dataclass
class TrainingState:
    """Everything that the next step depends on; see the table above.

    Attributes:
        step: steps done. lowered: plateau reductions so far. since_best: validations since the best one, since_lowered:
            those since the last reduction.
        sums: training terms since the last validation, and how many.
        history: one row per validation. best: step, loss and parameters of the best one, and the
            error by which it was judged.
    """

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    lowered: int = 0
    since_best: int = 0
    since_lowered: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)


def init(model: nn.Module, options: LoopOptions) -> TrainingState:
    """The state before the first step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected parameters that require gradients, got none (a loaded model is frozen)")
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay, amsgrad=options.optimizer == "amsgrad"
    )
    return TrainingState(model, copy.deepcopy(model).requires_grad_(False).eval(), optimizer)


def learning_rate(options: LoopOptions, state: TrainingState) -> float:
    """Of the step that comes next."""
    rise = min(1.0, (state.step + 1) / options.warmup_steps) if options.warmup_steps > 0 else 1.0
    eta, low = options.learning_rate, min(options.learning_rate, options.final_learning_rate)
    if options.schedule == "cosine":
        eta = low + 0.5 * (eta - low) * (1.0 + math.cos(math.pi * min(1.0, state.step / options.steps)))
    elif options.schedule == "plateau":
        eta = max(eta * options.plateau_factor**state.lowered, low)
    return rise * eta


def step(
    team: Team, state: TrainingState, wrapped: Any, method: Method, indices: np.ndarray, options: LoopOptions
) -> float:
    """One optimiser step; returns the loss before it.

    Raises `FloatingPointError` if loss or gradient is not finite; parameters are then those before the step.
    """
    state.optimizer.zero_grad(set_to_none=True)
    losses = _differentiated(team, state, wrapped, method, indices, options)
    value = losses["loss"]
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {state.step}")
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if options.clip_norm is None else options.clip_norm)
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError(f"the gradient is {float(norm)} at step {state.step}")
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(options, state)
    state.optimizer.step()
    state.step += 1
    update_ema(state.ema, state.model, min(options.ema_decay, (1 + state.step) / (10 + state.step)))
    for name, term in losses.items():
        state.sums[name] = state.sums.get(name, 0.0) + term
    state.sums["n"] = state.sums.get("n", 0.0) + 1.0
    return value


def _differentiated(
    team: Team, state: TrainingState, wrapped: Any, method: Method, indices: np.ndarray, options: LoopOptions
) -> dict[str, float]:
    """Put the gradients of a batch's loss into the parameters; the loss and its terms."""
    progress = state.step / options.steps
    if team.size == 1:
        loss, terms = method.loss(wrapped, indices, progress)
        if math.isfinite(float(loss.detach())):
            team.fabric.backward(loss)
        return {name: float(term.detach()) for name, term in {"loss": loss, **terms}.items()}
    # random numbers (dropout) of every process and step, the same in a run that was resumed
    torch.manual_seed(options.seed * 1_000_003 + state.step * team.size + team.rank)
    parts = getattr(method, "share", np.array_split)(indices, team.size)
    # a process without structures of its own computes the first part too, for the names of the terms
    own = len(parts[team.rank]) > 0
    loss, terms = method.loss(wrapped, parts[team.rank] if own else parts[0], progress)
    team.fabric.backward(loss)
    values = torch.stack([loss.detach(), *(t.detach().to(loss.dtype) for t in terms.values())])
    share = len(parts[team.rank]) / len(indices)
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    total = team.add_up(share, parameters, values)
    return dict(zip(("loss", *terms), total.tolist(), strict=True))


def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """theta' <- decay theta' + (1 - decay) theta, in place."""
    with torch.no_grad():
        averages, values = ([p.detach() for p in module.parameters()] for module in (ema, model))
        torch._foreach_lerp_(averages, values, 1.0 - decay)


def record_validation(state: TrainingState, metrics: dict[str, float], options: LoopOptions, seconds: float) -> bool:
    """Add a row to the history, keep the best, lower the rate on a plateau; True if this is the best so far."""
    n = max(state.sums.pop("n", 0.0), 1.0)
    row = {"step": float(state.step), "seconds": seconds, "learning_rate": learning_rate(options, state)}
    row |= {f"train_{name}": total / n for name, total in state.sums.items()}
    row |= {f"valid_{name}": value for name, value in metrics.items()}
    state.sums = {}
    state.history.append(row)
    if not math.isfinite(metrics["loss"]):
        raise FloatingPointError(f"the validation loss is {metrics['loss']} at step {state.step}")
    errors = {**metrics, "last": -float(state.step)}
    if options.best_by not in errors:
        raise ValueError(f"best_by: expected one of {', '.join(errors)}, got {options.best_by!r}")
    judged = errors[options.best_by]
    if not state.best or judged < state.best["judged"]:
        tensors = {name: t.detach().clone() for name, t in state.ema.state_dict().items()}
        state.best = {"step": state.step, "loss": metrics["loss"], "judged": judged, "tensors": tensors}
        state.since_best = state.since_lowered = 0
        return True
    state.since_best += 1
    state.since_lowered += 1
    if options.schedule == "plateau" and state.since_lowered > options.plateau_patience:
        state.lowered += 1
        state.since_lowered = 0
    return False


# -- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: TrainingState, options: LoopOptions) -> None:
    """Write the whole state; the file appears only when it is complete."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    content = {
        "format": CHECKPOINT_FORMAT,
        "options": asdict(options),
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "rng": rng,
        **{name: getattr(state, name) for name in _COUNTERS},
    }
    stream = io.BytesIO()
    torch.save(content, stream)
    write_atomically(path, stream.getvalue())


_COUNTERS = ("step", "lowered", "since_best", "since_lowered", "sums", "history", "best")


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Put a checkpoint into a state made by `init` for the same model.

    Raises `ValueError` if the file is damaged or belongs to another model.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"resume: {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if content.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"resume: expected a checkpoint of format {CHECKPOINT_FORMAT}, got {content.get('format')!r}")
    try:
        state.model.load_state_dict(content["model"])
        state.ema.load_state_dict(content["ema"])
        state.optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"resume: {path} belongs to another model: {str(error).splitlines()[0]}") from error
    torch.set_rng_state(content["rng"]["cpu"])
    if "cuda" in content["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(content["rng"]["cuda"])
    for name in _COUNTERS:
        setattr(state, name, content[name])
    if state.best:
        # files from before there was a choice were judged by the loss
        state.best.setdefault("judged", state.best["loss"])


# -- the whole run ---------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    method: Method,
    options: LoopOptions,
    folder: str | Path,
    resume: bool = False,
    team: Team | None = None,
    progress: bool = True,
    on_validation: Callable[[TrainingState, bool], None] | None = None,
    title: str = "training",
    time_limit: float | None = None,
) -> TrainingState:
    """Train `model` in place; the averaged parameters of the best validation are in ``best`` of the returned state.

    Writes ``checkpoint.pt``, ``history.csv`` and ``history.json`` into `folder`. SIGINT and SIGTERM end the run after
    the step with a checkpoint (``state.step < options.steps`` then, and ``state.best`` may be empty).

    Args:
        resume: go on from ``checkpoint.pt`` in `folder`, if there is one.
        team: the processes that share each batch, with their devices; None is this one alone, on the CPU.
        on_validation: called after each validation with the state and whether it is the best so far, by the first
            process of the team, which alone writes files.
        title: of the progress bar.
        time_limit: seconds from now, after which the run ends as if it had been interrupted.

    Raises `ImportError` without Lightning Fabric, and `FloatingPointError` if a loss is not finite; the state before
    that step is then in ``failed.pt``.
    """
    team = team or Team.of("cpu")
    writes = team.rank == 0
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = init(model.to(team.device), options)
    state.ema.to(team.device)
    if resume and (folder / CHECKPOINT).exists():
        load_checkpoint(folder / CHECKPOINT, state)
    else:
        torch.manual_seed(options.seed)
    # several processes add up gradients themselves (`Team.add_up`), whatever made them
    wrapped: Any = team.fabric.setup(state.model, state.optimizer)[0] if team.size == 1 else state.model
    wrapped.train()
    begun = saved = time.monotonic()
    started = begun - (state.history[-1]["seconds"] if state.history else 0.0)
    with _Interrupt() as interrupt, _Bar(title, options.steps, state, progress and writes) as bar:
        try:
            for indices in _batches(method, state, options):
                loss = step(team, state, wrapped, method, indices, options)
                if state.step % options.validate_every == 0 or state.step == options.steps:
                    better = record_validation(state, method.validate(state.ema), options, time.monotonic() - started)
                    if writes:
                        write_history(folder, state.history)
                        if on_validation is not None:
                            on_validation(state, better)
                bar.update(state, loss)
                now = time.monotonic()
                over = time_limit is not None and now - begun > time_limit
                stops = team.any(interrupt.caught or over)
                if writes and (stops or now - saved > options.checkpoint_seconds):
                    save_checkpoint(folder / CHECKPOINT, state, options)
                    saved = time.monotonic()
                if stops or (options.patience is not None and state.since_best > options.patience):
                    break
        except FloatingPointError as error:
            if writes:
                save_checkpoint(folder / "failed.pt", state, options)
            raise FloatingPointError(f"{error}; the state before it is in {folder / 'failed.pt'}") from error
    if writes:
        save_checkpoint(folder / CHECKPOINT, state, options)
    return state


def _batches(method: Method, state: TrainingState, options: LoopOptions) -> Iterator[np.ndarray]:
    """The batches from the state's step to the last, epoch after epoch."""
    per_epoch = len(method.epoch(0))
    while state.step < options.steps:
        epoch, position = divmod(state.step, per_epoch)
        for indices in method.epoch(epoch)[position:]:
            if state.step >= options.steps:
                return
            yield indices


def write_history(folder: Path, history: list[dict[str, float]]) -> None:
    """``history.csv`` and ``history.json``: one row per validation."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "history.csv", stream.getvalue().encode())
    write_atomically(folder / "history.json", json.dumps(history, indent=1).encode())


class _Interrupt:
    """Notes SIGINT and SIGTERM instead of raising; a second SIGINT raises. Does nothing outside the main thread."""

    def __init__(self) -> None:
        self.caught = False
        self._previous: dict[int, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True

    def __enter__(self) -> _Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Bar:
    """rich progress bar with the loss of the last step and the errors of the last validation."""

    def __init__(self, title: str, steps: int, state: TrainingState, show: bool) -> None:
        from rich import progress

        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            disable=not show,
        )
        self._task = self._progress.add_task(title, total=steps, completed=state.step, text="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, state: TrainingState, loss: float) -> None:
        text = f"loss {loss:.2e}"
        if state.history:
            last = state.history[-1]
            text += f", validation {last['valid_loss']:.2e}"
            if "valid_forces_mae" in last:
                text += f", forces {last['valid_forces_mae']:.1f} meV/Å"
        self._progress.update(self._task, completed=state.step, text=text)


@contextmanager
def averaged(state: TrainingState) -> Iterator[nn.Module]:
    """The averaged model with the best validation's parameters, if there was a validation."""
    kept = {name: t.clone() for name, t in state.ema.state_dict().items()}
    try:
        if state.best:
            state.ema.load_state_dict(state.best["tensors"])
        yield state.ema
    finally:
        state.ema.load_state_dict(kept)
