"""a run of latent and molecular dynamics -> files, which a resumed run continues without a frame twice or missing."""

from __future__ import annotations

import abc
import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openmm import app, unit

from openmm_mlff.sampling.led_records import Frames, Return
from openmm_mlff.sampling.reporters import TrajectoryWriter
from openmm_mlff.sampling.settings import require_whole
from openmm_mlff.sampling.structure_checks import superpose

if TYPE_CHECKING:
    from openmm_mlff.sampling.led_simulation import LEDSimulation


class LEDReporter(abc.ABC):
    """What `LEDSimulation.reporters` holds; the methods do nothing unless a reporter overrides them.

    Attributes:
        name: by which a checkpoint knows the reporter; no two of one simulation may have the same.
        needs_particles: whether it wants the solvent of every frame of molecular dynamics too (`Frames.particles`).
    """

    name: str
    needs_particles: bool = False

    def open(self, simulation: LEDSimulation, saved: dict[str, Any] | None) -> None:  # noqa: B027 (may stay empty)
        """Called before anything else; `saved` is what `state` returned when a checkpoint was written."""

    def frames(self, simulation: LEDSimulation, frames: Frames) -> None:  # noqa: B027 (may stay empty)
        """Called with all latent frames."""

    def returned(self, simulation: LEDSimulation, record: Return) -> None:  # noqa: B027 (may stay empty)
        """Called at every return to molecular dynamics."""

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; everything reported so far is on disk afterwards."""
        return {}

    def close(self) -> None:  # noqa: B027 (may stay empty)
        """Let go of files."""


class _Table(LEDReporter):
    """A CSV file; made anew by a new run, cut back to the checkpoint by a resumed one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = f"{type(self).__name__} {self.path.name}"
        self._file: io.TextIOWrapper | None = None
        self._writer: Any = None

    @abc.abstractmethod
    def _header(self, simulation: LEDSimulation) -> list[str]:
        """Names of the columns."""

    def open(self, simulation: LEDSimulation, saved: dict[str, Any] | None) -> None:
        header = self._header(simulation)
        if saved is not None:
            size = int(saved["bytes"])
            if not self.path.is_file() or self.path.stat().st_size < size:
                raise ValueError(f"{self.path}: expected at least the {size} bytes of the checkpoint, found less")
            os.truncate(self.path, size)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # newline="" leaves the ends of lines to csv; the file lives as long as the run
        self._file = open(self.path, "w" if saved is None else "a", encoding="utf-8", newline="")  # noqa: SIM115
        self._writer = csv.writer(self._file, lineterminator="\n")
        if saved is None:
            self._writer.writerow(header)

    def write(self, rows: list[list[Any]]) -> None:
        """Append rows."""
        assert self._file is not None
        self._writer.writerows(rows)
        self._file.flush()

    def state(self) -> dict[str, Any]:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self.path.stat().st_size}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class LatentReporter(_Table):
    """Latent coordinates as CSV: walker, frame, time (ps), phase, doubt (empty where unknown), z0, z1, ...

    Args:
        path: of the file. every: frames of a walker between two rows.
    """

    def __init__(self, path: str | Path, every: int = 1) -> None:
        super().__init__(path)
        require_whole("every", every, 1)
        self._every = every

    def _header(self, simulation: LEDSimulation) -> list[str]:
        latent = [f"z{k}" for k in range(simulation.model.latent_dim)]
        return ["walker", "frame", "time_ps", "phase", "doubt", *latent]

    def frames(self, simulation: LEDSimulation, frames: Frames) -> None:
        interval = simulation.model.interval
        rows = []
        for i, k in np.argwhere(frames.numbers % self._every == 0):
            number, doubt = int(frames.numbers[i, k]), frames.doubt[i, k]
            values = [int(frames.walkers[i]), number, f"{number * interval:.6f}", frames.phase]
            z = [f"{x:.8g}" for x in frames.z[i, k]]
            rows.append([*values, "" if np.isnan(doubt) else f"{doubt:.4g}", *z])
        if rows:
            self.write(rows)


class RoundReporter(_Table):
    """One row for every return to molecular dynamics (see `led_records.Return`).

    ``refused`` holds the reasons why structures were not taken; energies in kJ/mol, ``moved`` in nm, seconds of the
    return and, since the last row, of all walkers' latent steps and molecular dynamics.
    """

    _ENERGIES = ("decoded", "tight", "minimized", "equilibrated")
    _PARTS = ("latent", "md")

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._before: dict[str, float] = {}

    def open(self, simulation: LEDSimulation, saved: dict[str, Any] | None) -> None:
        super().open(simulation, saved)
        # a new file, or one of an older checkpoint: from here on
        self._before = dict((saved or {}).get("seconds", simulation.statistics.seconds))

    def state(self) -> dict[str, Any]:
        return super().state() | {"seconds": self._before}

    def _header(self, simulation: LEDSimulation) -> list[str]:
        fixed = ["walker", "frame", "time_ps", "latent_frames", "cause", "tries", "refused", "fallback"]
        energies = [f"{stage}_kJ_mol" for stage in self._ENERGIES]
        return [*fixed, *energies, "moved_nm", "solvent_moved", "seconds", *(f"seconds_{p}" for p in self._PARTS)]

    def returned(self, simulation: LEDSimulation, record: Return) -> None:
        seconds = simulation.statistics.seconds
        parts = [seconds.get(p, 0.0) - self._before.get(p, 0.0) for p in self._PARTS]
        self._before = dict(seconds)
        time = f"{record.frame * simulation.model.interval:.6f}"
        energies = [f"{record.energies[s]:.4f}" if s in record.energies else "" for s in self._ENERGIES]
        row = [record.walker, record.frame, time, record.latent_frames, record.cause, record.tries]
        row += [" ".join(record.reasons), int(record.fallback), *energies]
        row += ["" if np.isnan(record.moved) else f"{record.moved:.5f}", record.solvent_moved]
        self.write([[*row, *(f"{s:.4f}" for s in (record.seconds, *parts))]])


class BackMappedReporter(LEDReporter):
    """A trajectory of the solute (DCD or XTC by the ending): decoded frames of latent steps, and those of MD.

    All are superposed on the start by their heavy atoms, because what is decoded has no place of its own (unless the
    simulation says so). Decoded frames are not relaxed.

    Args:
        path: of the file; with several walkers there is one each, ``name-0.dcd`` and so on.
        every: frames of a walker between two frames of the file. seed: of decoding.
    """

    def __init__(self, path: str | Path, every: int = 1, seed: int = 0) -> None:
        require_whole("every", every, 1)
        self.path = Path(path)
        if self.path.suffix not in (".dcd", ".xtc"):
            raise ValueError(f"path: expected a file .dcd or .xtc, got {self.path.name}")
        self.name = f"{type(self).__name__} {self.path.name}"
        self._every = every
        self._random = np.random.default_rng(seed)
        self._files: list[_SoluteFile] = []

    def open(self, simulation: LEDSimulation, saved: dict[str, Any] | None) -> None:
        n = simulation.n_walkers
        stem = self.path.stem
        paths = [self.path] if n == 1 else [self.path.with_name(f"{stem}-{k}{self.path.suffix}") for k in range(n)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if saved is not None:
            self._random.bit_generator.state = saved["random"]
        kept = [None] * n if saved is None else saved["files"]
        topology, interval = simulation.solute_topology, simulation.model.interval
        kind = _DCD if self.path.suffix == ".dcd" else _XTC
        self._files = [kind(p, topology, interval, self._every, k) for p, k in zip(paths, kept, strict=True)]

    def frames(self, simulation: LEDSimulation, frames: Frames) -> None:
        chosen = np.argwhere(frames.numbers % self._every == 0)
        if len(chosen) == 0:
            return
        i, k = chosen.T
        if frames.positions is None:
            positions = simulation.model.decode(frames.z[i, k], self._random)
        else:
            positions = frames.positions[i, k]
        for walker, x in zip(frames.walkers[i], positions, strict=True):
            fitted = superpose(x, simulation.reference, simulation.heavy) if simulation.superpose else x
            self._files[walker].write(fitted)

    def state(self) -> dict[str, Any]:
        files = [f.state() for f in self._files]
        return {"random": self._random.bit_generator.state, "files": files}

    def close(self) -> None:
        for file in self._files:
            file.close()


class _SoluteFile(abc.ABC):
    """The trajectory of one walker."""

    @abc.abstractmethod
    def write(self, positions: np.ndarray) -> None: ...

    @abc.abstractmethod
    def state(self) -> int: ...

    def close(self) -> None:  # noqa: B027 (may stay empty)
        """Let go of the file."""


class _DCD(_SoluteFile):
    def __init__(self, path: Path, topology: app.Topology, interval: float, every: int, keep: int | None) -> None:
        self._writer = TrajectoryWriter(path, topology, interval=every, timestep=interval, keep=keep)
        self._written = keep or 0

    def write(self, positions: np.ndarray) -> None:
        self._writer.write(positions, None)
        self._written += 1

    def state(self) -> int:
        self._writer.sync()
        return self._written

    def close(self) -> None:
        self._writer.close()


class _XTC(_SoluteFile):
    def __init__(self, path: Path, topology: app.Topology, interval: float, every: int, keep: int | None) -> None:
        if keep is None or keep == 0:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.stat().st_size < keep:
            raise ValueError(f"{path}: expected at least the {keep} bytes of the checkpoint, found less")
        else:
            os.truncate(path, keep)
        self._path = path
        self._file = app.XTCFile(str(path), topology, interval, every, every, append=bool(keep))

    def write(self, positions: np.ndarray) -> None:
        self._file.writeModel(positions * unit.nanometer)

    def state(self) -> int:
        if not self._path.is_file():
            return 0
        with open(self._path, "r+b") as file:
            os.fsync(file.fileno())
        return self._path.stat().st_size
