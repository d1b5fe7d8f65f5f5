"""a run of latent and molecular dynamics <-> one file that is always whole.

A file of arrays with all their digits, and plain data (counters, random generators, what reporters have written) in its
header (see `data.files`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.files import read_arrays, write_arrays
from openmm_mlff.sampling.led_dynamics import Walker
from openmm_mlff.sampling.led_records import WARMUP
from openmm_mlff.sampling.propagators import LatentState

FORMAT = "openmm-mlff-led-checkpoint-1"
_COUNTERS = ("frame", "rounds", "left", "since")
#: settings that the first files do not name
_LATER = ("solute", "superpose", "relaxation", "integrator")


@dataclass
class LEDState:
    """Where all walkers are; everything that the rest of a run depends on, its settings apart.

    Attributes:
        walkers: in molecular dynamics (MD), or where they left it. latent: state of all; None before the first start.
        random: of latent steps. highest: potential energy seen in MD, kJ/mol.
        frame, rounds: made by each walker, ``(n,)``. phase: `WARMUP`, `MACRO` or `MICRO`. left: frames of the phase.
        since: latent frames since MD; -1 while MD is under way. cause: of the latest change to MD.
        history: latent coordinates of the frames of MD under way, ``(k, latent_dim)`` arrays per walker.
    """

    walkers: list[Walker]
    random: np.random.Generator
    frame: np.ndarray
    rounds: np.ndarray
    left: np.ndarray
    since: np.ndarray
    phase: np.ndarray
    cause: np.ndarray
    history: list[list[np.ndarray]]
    latent: LatentState | None = None
    highest: float = -float("inf")

    @classmethod
    def start(cls, walkers: list[Walker], warmup: int, seed: int) -> LEDState:
        """Before the first frame."""
        n = len(walkers)
        zero = np.zeros(n, dtype=np.int64)
        return cls(
            walkers, np.random.default_rng(seed), zero.copy(), zero.copy(), zero + warmup, zero.copy(),
            np.full(n, WARMUP, dtype=object), np.full(n, "start", dtype=object), [[] for _ in range(n)],
        )  # fmt: skip

    def made(self, walkers: np.ndarray, n: int) -> np.ndarray:
        """Count `n` frames of some walkers; returns their numbers, ``(len(walkers), n)``."""
        numbers = self.frame[walkers, None] + np.arange(1, n + 1)
        self.frame[walkers] += n
        self.left[walkers] -= n
        return numbers

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain data and arrays."""
        arrays = {
            name: np.stack([getattr(w, name) for w in self.walkers]) for name in ("positions", "velocities", "box")
        }
        arrays |= {name: getattr(self, name) for name in _COUNTERS}
        arrays |= {f"history/{k}": np.concatenate(h) for k, h in enumerate(self.history) if h}
        if self.latent is not None:
            arrays |= {"z": self.latent.z} | {f"memory/{name}": m for name, m in self.latent.memory.items()}
        facts = {
            "phase": self.phase.tolist(),
            "cause": self.cause.tolist(),
            "random": self.random.bit_generator.state,
            "highest": float(self.highest),
        }
        return facts, arrays

    @classmethod
    def unpack(cls, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> LEDState:
        """The inverse of `pack`."""
        poses = zip(arrays["positions"], arrays["velocities"], arrays["box"], strict=True)
        walkers = [Walker(*(np.array(a) for a in pose)) for pose in poses]
        random = np.random.default_rng()
        random.bit_generator.state = facts["random"]
        memory = {name.removeprefix("memory/"): np.array(m) for name, m in arrays.items() if name.startswith("memory/")}
        histories = [f"history/{k}" for k in range(len(walkers))]
        frame, rounds, left, since = (np.array(arrays[name]) for name in _COUNTERS)
        phase, cause = (np.array(facts[name], dtype=object) for name in ("phase", "cause"))
        history = [[np.array(arrays[h])] if h in arrays else [] for h in histories]
        latent = LatentState(np.array(arrays["z"]), memory) if "z" in arrays else None
        highest = float(facts["highest"])
        return cls(walkers, random, frame, rounds, left, since, phase, cause, history, latent, highest)


def write(path: str | Path, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write under a temporary name and move."""
    write_arrays(path, FORMAT, arrays, {"facts": dict(facts)})


def read(path: str | Path, run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and arrays of a checkpoint.

    Args:
        run: what the run must have in common with the one that wrote it.

    Raises `ValueError` naming the setting that differs, and as `data.files.read_arrays` does.
    """
    header, arrays = read_arrays(path, FORMAT, "a checkpoint of a LEDSimulation")
    facts: dict[str, Any] = header["facts"]
    for name, value in run.items():
        found = facts["run"].get(name, value if name in _LATER else None)
        if found != value:
            raise ValueError(f"path: expected a checkpoint with {name} {value}, got {found}")
    return facts, arrays
