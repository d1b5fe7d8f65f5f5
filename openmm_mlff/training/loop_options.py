"""How the training loop runs: steps, optimiser, learning rate, validation and what is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopOptions:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        optimizer: "adamw" or "amsgrad" (Adam with the maximum of second moments, as in the SpookyNet paper). The
            maximum never forgets the first steps, when forces of an untrained repulsion term can be a hundred times
            larger than all later ones; then it learns slowly.
        learning_rate, final_learning_rate: at the start, and at the end ("cosine") or the least ("plateau").
        warmup_steps: over which the learning rate rises linearly from zero.
        weight_decay: decoupled (AdamW) or added to the gradient (AMSGrad).
        schedule: "cosine", "plateau" (times `plateau_factor` after `plateau_patience` validations without a better
            one) or "constant".
        clip_norm: largest 2-norm of the gradient; None for no limit.
        ema_decay: 0 keeps the last parameters themselves.
        validate_every: steps between validations. best_by: the validation error whose least value decides what is kept,
            "loss" or another of the history, such as "forces_mae" (a squared loss follows the few worst frames); "last"
            keeps the end of a schedule whatever validation says.
        patience: stop after so many validations without a better one; None trains to the end.
        checkpoint_seconds: between checkpoints.
        seed: of the initial parameters and dropout.
    """

    steps: int = 100_000
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 500
    weight_decay: float = 0.0
    schedule: str = "cosine"
    plateau_factor: float = 0.5
    plateau_patience: int = 10
    clip_norm: float | None = 10.0
    ema_decay: float = 0.999
    validate_every: int = 1000
    best_by: str = "loss"
    patience: int | None = None
    checkpoint_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("optimizer", ("amsgrad", "adamw")), ("schedule", ("cosine", "plateau", "constant"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("steps", "learning_rate", "validate_every", "checkpoint_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay!r}")
        if not 0 < self.plateau_factor < 1:
            raise ValueError(f"plateau_factor: expected a number in (0, 1), got {self.plateau_factor!r}")
