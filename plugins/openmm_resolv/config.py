"""Hyperparameters of a ReSolv pair."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("water", "vacuum", "both")


@dataclass(frozen=True)
class ResolvConfig:
    """What belongs to the pair; everything else belongs to its two potentials.

    Attributes:
        phase: 'water', 'vacuum', or 'both': U = (1 - lambda) U_vacuum + lambda U_water.
    """

    phase: str = "water"

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase: expected 'water', 'vacuum' or 'both', got {self.phase!r}")
