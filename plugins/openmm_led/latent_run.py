"""latent dynamics alone: a model and where walkers come from -> latent coordinates, decoded frames, a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from openmm import app

from openmm_mlff.sampling import guards, led_checkpoint
from openmm_mlff.sampling.led_records import MACRO, Frames
from openmm_mlff.sampling.led_reporters import LEDReporter
from openmm_mlff.sampling.led_simulation import WATCH_EVERY, LEDSimulation
from openmm_mlff.sampling.propagators import LatentState, Propagator


class LatentRun:
    """Walkers of a model without molecular dynamics, with the reporters of `LEDSimulation`.

    Args:
        model: of the molecule. topology: of the same. history: positions ``(n_frames, n_atoms, 3)`` nm, one interval
            apart, that all walkers remember; the last ones are their start. n_walkers, seed: of the run.
        failure: folder for the state of a run that failed.

    Attributes:
        frame: that all walkers have made. doubtful: looks at walkers, every `WATCH_EVERY` frames, that found the model
            unsure (doubt above 1). looks: in all. reporters: `LEDReporter`s.

    Raises `ValueError` for a model of another molecule or positions of another shape.
    """

    def __init__(
        self,
        model: Propagator,
        topology: app.Topology,
        history: np.ndarray,
        n_walkers: int = 1,
        seed: int = 0,
        failure: str | Path = "failure",
    ) -> None:
        if n_walkers < 1:
            raise ValueError(f"n_walkers: expected at least 1, got {n_walkers}")
        model.check_topology(topology)
        self.model, self.solute_topology, self.n_walkers, self.seed = model, topology, n_walkers, seed
        self.reference = np.array(history[-1], dtype=np.float64)
        self.superpose = model.n_atoms > 1
        numbers = [0 if a.element is None else a.element.atomic_number for a in topology.atoms()]
        self.heavy = np.flatnonzero(np.array(numbers) != 1)
        z = model.encode(np.asarray(history, dtype=np.float64))
        self.state: LatentState = model.start(np.tile(z[None], (n_walkers, 1, 1)))
        self.random = np.random.default_rng(seed)
        self.frame = self.doubtful = self.looks = 0
        self._failure = Path(failure)
        self.reporters: list[LEDReporter] = []
        self._opened: list[LEDReporter] = []
        self._saved: dict[str, Any] = {}

    def step(self, n_frames: int) -> None:
        """Make `n_frames` frames with every walker.

        Raises `guards.RunFailed` if latent coordinates are not numbers; the state before them is saved first.
        """
        left = n_frames
        while left > 0:
            n = min(left, WATCH_EVERY)
            drawn = self.random.bit_generator.state
            path, state = self.model.run(self.state, n, self.random)
            wrong = np.flatnonzero(~np.isfinite(path).all(axis=(1, 2)))
            if len(wrong):
                self.random.bit_generator.state = drawn
                raise self._failed(wrong, path)
            self.state = state
            doubt = np.full(path.shape[:2], np.nan)
            doubt[:, -1] = self.model.doubt(state)
            self.looks += self.n_walkers
            self.doubtful += int((doubt[:, -1] > 1.0).sum())
            walkers = np.arange(self.n_walkers)
            numbers = np.broadcast_to(self.frame + np.arange(1, n + 1), path.shape[:2])
            self.frame += n
            left -= n
            for reporter in self._ready():
                reporter.frames(self._as_simulation(), Frames(MACRO, walkers, numbers, path, doubt))

    def _failed(self, wrong: np.ndarray, path: np.ndarray) -> guards.RunFailed:
        """Save the state before the block in which walkers went wrong, from which the same frames are made again."""
        self._failure.mkdir(parents=True, exist_ok=True)
        target = self._failure / "before.checkpoint"
        self.saveCheckpoint(target)
        first = int(np.flatnonzero(~np.isfinite(path[wrong]).all(axis=(0, 2)))[0])
        hurt = tuple(int(k) for k in wrong)
        return guards.RunFailed(
            f"latent coordinates of walker {hurt[0]} are not numbers in frame {self.frame + first + 1} ({len(hurt)} "
            f"walkers in all; the checkpoint after frame {self.frame} is {target})",
            self._failure,
            hurt,
        )

    def _as_simulation(self) -> LEDSimulation:
        """What reporters read (model, walkers, topology, reference, heavy atoms) is here under the same names."""
        return cast(LEDSimulation, self)

    def _ready(self) -> list[LEDReporter]:
        for reporter in self.reporters:
            if not any(reporter is r for r in self._opened):
                reporter.open(self._as_simulation(), self._saved.pop(reporter.name, None))
                self._opened.append(reporter)
        return self.reporters

    def saveCheckpoint(self, path: str | Path) -> None:
        """Write everything that the rest of the run depends on."""
        facts = {
            "run": self._identity(), "frame": self.frame, "doubtful": self.doubtful, "looks": self.looks,
            "random": self.random.bit_generator.state, "reporters": {r.name: r.state() for r in self._ready()},
        }  # fmt: skip
        memory = {f"memory/{name}": value for name, value in self.state.memory.items()}
        led_checkpoint.write(path, facts, {"z": self.state.z, "reference": self.reference} | memory)

    def _identity(self) -> dict[str, Any]:
        return {
            "walkers": self.n_walkers, "seed": self.seed, "latent_dim": self.model.latent_dim,
            "interval": self.model.interval, "atoms": self.model.n_atoms, "latent": True,
        }  # fmt: skip

    def loadCheckpoint(self, path: str | Path) -> None:
        """Go on bit for bit; raises `ValueError` for a checkpoint of a run with other settings."""
        facts, arrays = led_checkpoint.read(path, self._identity())
        self.frame, self.doubtful, self.looks = (int(facts[n]) for n in ("frame", "doubtful", "looks"))
        self.random.bit_generator.state = facts["random"]
        memory = {n.removeprefix("memory/"): np.array(m) for n, m in arrays.items() if n.startswith("memory/")}
        self.state, self.reference = LatentState(np.array(arrays["z"]), memory), np.array(arrays["reference"])
        for reporter in self._opened:
            reporter.close()
        self._opened, self._saved = [], dict(facts["reporters"])
