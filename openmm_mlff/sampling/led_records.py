"""What a run of latent and molecular dynamics tells its reporters and its user."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: phases of a walker: molecular dynamics before the first latent step, latent steps, molecular dynamics between them
WARMUP, MACRO, MICRO = "warmup", "macro", "micro"


@dataclass(frozen=True)
class Frames:
    """Latent frames of some walkers that were made together.

    Attributes:
        phase: `WARMUP`, `MACRO` or `MICRO`. walkers: ``(n,)``. numbers: of the frames, ``(n, k)``; the first is 1.
        z: latent coordinates, ``(n, k, latent_dim)``.
        doubt: of the model, ``(n, k)``; NaN where it was not looked at.
        positions: of the solute in molecular dynamics, ``(n, k, n_solute, 3)`` nm; None for latent steps.
        energies: potential energies in molecular dynamics, ``(n, k)`` kJ/mol; None for latent steps.
        particles, boxes: all particles in molecular dynamics, ``(n, k, n_particles, 3)`` nm, and the box vectors,
            ``(n, k, 3, 3)`` nm, where a reporter asks for them (`LEDReporter.needs_particles`); else None.
    """

    phase: str
    walkers: np.ndarray
    numbers: np.ndarray
    z: np.ndarray
    doubt: np.ndarray
    positions: np.ndarray | None = None
    energies: np.ndarray | None = None
    particles: np.ndarray | None = None
    boxes: np.ndarray | None = None


@dataclass(frozen=True)
class Return:
    """One return of one walker from latent to molecular dynamics.

    Attributes:
        walker, frame: which, and after which frame. latent_frames: latent steps before it.
        cause: ``schedule``, or ``doubt`` if the model was unsure.
        tries: structures decoded. reasons: why they were refused, in order. fallback: whether the last structure of
            molecular dynamics was taken in the end.
        energies: of the last structure tried, by stage, kJ/mol (see `back_mapping.RelaxationReport`).
        moved: its root-mean-square displacement in minimisation, nm. solvent_moved: solvent molecules put elsewhere.
        z_decoded, z_relaxed: latent coordinates before decoding and of the structure that dynamics go on from.
        seconds: wall time of decoding and relaxing.
    """

    walker: int
    frame: int
    latent_frames: int
    cause: str
    tries: int
    reasons: tuple[str, ...]
    fallback: bool
    energies: dict[str, float]
    moved: float
    solvent_moved: int
    z_decoded: np.ndarray
    z_relaxed: np.ndarray
    seconds: float


@dataclass
class LEDStatistics:
    """Counts and times of a run, over all walkers.

    Attributes:
        latent_frames, md_frames, warmup_frames: frames by phase. dropped_frames: latent frames that the model doubted
            and that were not kept.
        rounds: completed. returns: to molecular dynamics: those with an accepted structure, those that fell back to the
            last one of MD, and those that stayed there because the model was in doubt before the first latent step.
        retries: structures that were decoded beyond the first of a return. refused: reason -> structures.
        doubt_switches: returns before their time. doubtful_blocks: blocks of latent steps whose end was doubted.
        solvent_moved: molecules put elsewhere.
        seconds: wall time by part: ``latent``, ``decode``, ``relax``, ``md``, ``encode``; no second is in two of them.
    """

    latent_frames: int = 0
    md_frames: int = 0
    warmup_frames: int = 0
    dropped_frames: int = 0
    rounds: int = 0
    returns: int = 0
    accepted: int = 0
    fallbacks: int = 0
    stayed: int = 0
    retries: int = 0
    doubt_switches: int = 0
    doubtful_blocks: int = 0
    solvent_moved: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rho(self) -> float:
        """Latent time per time of molecular dynamics, without the warm-up; infinite for a purely latent run."""
        return self.latent_frames / self.md_frames if self.md_frames else float("inf")

    @property
    def accepted_share(self) -> float:
        """Of all structures that were decoded for a return; NaN before the first."""
        tried = self.accepted + sum(self.refused.values())
        return self.accepted / tried if tried else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return dataclasses.asdict(self)

    def count(self, record: Return) -> None:
        """Add one return."""
        self.returns += 1
        self.stayed += record.tries == 0
        self.accepted += record.tries > 0 and not record.fallback
        self.fallbacks += record.fallback
        self.retries += max(0, record.tries - 1)
        self.doubt_switches += record.cause == "doubt"
        self.solvent_moved += record.solvent_moved
        for reason in record.reasons:
            self.refused[reason] = self.refused.get(reason, 0) + 1

    @contextmanager
    def timed(self, part: str, without: str = "") -> Iterator[None]:
        """Add the wall time of a block of code to one part, less what the block adds to the part `without`."""
        begin, other = time.perf_counter(), self.seconds.get(without, 0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - begin - (self.seconds.get(without, 0.0) - other)
            self.seconds[part] = self.seconds.get(part, 0.0) + spent
