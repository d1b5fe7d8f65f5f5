"""run -> files: the trajectory (DCD), the table (CSV), and a progress bar.

Both files can be cut back to any recorded frame, so that a run that was killed at any moment goes on with no frame or
row twice and none missing.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from openmm import app, unit

from openmm_mlff.analysis.observables import dihedral

_DCD_HEADER = 276  # bytes: three records, with the comments that OpenMM writes


class TrajectoryWriter:
    """Frames of one run in a DCD file; molecules are whole, and nearest to the region of interest if there is a box.

    Args:
        interval: steps between frames. timestep: ps.
        molecules: atom indices of each molecule; None writes positions as they are.
        center: atoms around which the others are put.
        keep: number of frames to go on from; None starts a new file.

    Raises `ValueError` if the file to go on from is another one or holds fewer frames.
    """

    def __init__(
        self,
        path: str | Path,
        topology: app.Topology,
        *,
        interval: int,
        timestep: float,
        molecules: Sequence[Sequence[int]] | None = None,
        center: Sequence[int] = (),
        keep: int | None = None,
    ) -> None:
        self._periodic = topology.getPeriodicBoxVectors() is not None
        self._imager = Imager(molecules, center) if self._periodic and molecules is not None else None
        if keep is not None:
            truncate_dcd(path, keep, topology.getNumAtoms(), self._periodic)
        self._file = open(path, "w+b" if keep is None else "r+b")  # noqa: SIM115 (lives as long as the run)
        self._dcd = app.DCDFile(self._file, topology, timestep, 0, interval, append=keep is not None)

    def write(self, positions: np.ndarray, box: np.ndarray | None) -> None:
        """Append one frame: positions ``(n, 3)`` nm, box vectors ``(3, 3)`` nm or None."""
        vectors = None if box is None else box * unit.nanometer
        self._dcd.writeModel(self.imaged(positions, box), periodicBoxVectors=vectors)

    def imaged(self, positions: np.ndarray, box: np.ndarray | None) -> np.ndarray:
        """Positions as they are written: molecules whole and nearest to the centre."""
        return positions if self._imager is None or box is None else self._imager(positions, box)

    def sync(self) -> None:
        """Force everything to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def count_dcd_frames(path: str | Path, n_atoms: int, periodic: bool) -> int:
    """Number of whole frames; raises `ValueError` if the file is not a DCD of that many atoms by OpenMM."""
    with open(path, "rb") as file:
        header = file.read(_DCD_HEADER)
        size = file.seek(0, os.SEEK_END)
    if len(header) < _DCD_HEADER or header[4:8] != b"CORD":
        raise ValueError(f"{path}: expected a DCD trajectory, but its header is damaged")
    atoms = struct.unpack("<i", header[_DCD_HEADER - 8 : _DCD_HEADER - 4])[0]
    if atoms != n_atoms:
        raise ValueError(f"{path}: expected {n_atoms} atoms, got {atoms}")
    return (size - _DCD_HEADER) // _frame_bytes(n_atoms, periodic)


def truncate_dcd(path: str | Path, frames: int, n_atoms: int, periodic: bool) -> None:
    """Keep the first `frames` frames; raises `ValueError` if there are fewer."""
    found = count_dcd_frames(path, n_atoms, periodic)
    if found < frames:
        raise ValueError(f"{path}: expected at least {frames} frames, as the checkpoint says, got {found}")
    with open(path, "r+b") as file:
        file.truncate(_DCD_HEADER + frames * _frame_bytes(n_atoms, periodic))
        file.seek(8)
        file.write(struct.pack("<i", frames))


def dcd_frames(path: str | Path, n_atoms: int, periodic: bool) -> np.ndarray:
    """All whole frames, ``(frames, n_atoms, 3)`` angstrom, float32; also of a file that is being written.

    Raises `ValueError` if the file is not a DCD of that many atoms by OpenMM.
    """
    frames = count_dcd_frames(path, n_atoms, periodic)
    axis = np.dtype([("before", "<i4"), ("values", "<f4", (n_atoms,)), ("after", "<i4")])
    record = np.dtype(([("box", "V56")] if periodic else []) + [(name, axis) for name in "xyz"])
    with open(path, "rb") as file:
        file.seek(_DCD_HEADER)
        read = np.fromfile(file, dtype=record, count=frames)
    return np.stack([read[name]["values"] for name in "xyz"], axis=-1)


def _frame_bytes(n_atoms: int, periodic: bool) -> int:
    return (56 if periodic else 0) + 3 * (4 * n_atoms + 8)


class Imager:
    """Moves whole molecules by box vectors to the image nearest to a centre; coordinates are not shifted otherwise."""

    def __init__(self, molecules: Sequence[Sequence[int]], center: Sequence[int]) -> None:
        self._order = np.concatenate([np.asarray(m, dtype=np.int64) for m in molecules])
        sizes = np.array([len(m) for m in molecules])
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._sizes = sizes
        self._center = np.asarray(center, dtype=np.int64)

    def __call__(self, positions: np.ndarray, box: np.ndarray) -> np.ndarray:
        """Positions ``(n, 3)`` and box vectors as rows ``(3, 3)`` in one unit -> positions ``(n, 3)``."""
        ordered = positions[self._order]
        middle = np.add.reduceat(ordered, self._starts) / self._sizes[:, None]
        reference = positions[self._center].mean(axis=0) if len(self._center) else box.sum(axis=0) / 2
        offset = middle - reference
        # reduced box vectors: c, then b, then a gives the nearest image for all but strongly skewed boxes
        shift = np.zeros_like(middle)
        for k in (2, 1, 0):
            turns = np.rint((offset - shift)[:, k] / box[k, k])
            shift += turns[:, None] * box[k]
        imaged = np.empty_like(positions)
        imaged[self._order] = ordered - np.repeat(shift, self._sizes, axis=0)
        return imaged


class Table:
    """A CSV file that grows while a run goes on.

    Args:
        header: names of the columns.
        keep: rows up to this step stay; None starts a new file.

    Raises `ValueError` if the file to go on from has other columns.
    """

    def __init__(self, path: str | Path, header: str, keep: int | None = None) -> None:
        if keep is not None:
            truncate_table(path, keep, header)
        self._file = open(path, "w" if keep is None else "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)
        if keep is None:
            self._append(header)

    def _append(self, row: str) -> None:
        self._file.write(row + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force everything to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TableWriter(Table):
    """One row per frame: step, time, energies (kJ/mol), temperature (K), volume and torsions (degrees).

    Args:
        torsions: name -> four atom indices.
        periodic: whether there is a volume (nm^3) and density (g/cm^3; needs `mass` in amu).
        keep: rows up to this step stay; None starts a new file.

    Raises `ValueError` if the file to go on from has other columns.
    """

    def __init__(
        self,
        path: str | Path,
        torsions: Mapping[str, Sequence[int]],
        *,
        periodic: bool = False,
        mass: float = 0.0,
        keep: int | None = None,
    ) -> None:
        self._atoms = np.array(list(torsions.values()), dtype=np.int64).reshape(-1, 4)
        self._mass, self._periodic = mass, periodic
        energies = ["potential_kJ_mol", "kinetic_kJ_mol", "total_kJ_mol", "temperature_K"]
        box = ["volume_nm3", "density_g_cm3"] if periodic else []
        super().__init__(path, ",".join(["step", "time_ps", *energies, *box, *torsions]), keep)

    def write(self, step: int, time_ps: float, potential: float, kinetic: float, temperature: float,
              positions: np.ndarray, box: np.ndarray | None) -> None:  # fmt: skip
        """Append one row; positions ``(n, 3)`` and box ``(3, 3)`` in nm, energies in kJ/mol."""
        values = [f"{step}", f"{time_ps:.6f}"]
        values += [f"{x:.6f}" for x in (potential, kinetic, potential + kinetic)] + [f"{temperature:.4f}"]
        if self._periodic and box is not None:
            volume = float(abs(np.linalg.det(box)))
            values += [f"{volume:.6f}", f"{self._mass / volume * 1.66053906660e-3:.6f}"]
        if len(self._atoms):
            values += [f"{angle:.4f}" for angle in dihedral(positions, self._atoms)]
        self._append(",".join(values))


def truncate_table(path: str | Path, last_step: int, header: str) -> None:
    """Keep the rows up to a step, and drop a row that was cut off while it was written."""
    with open(path, "r+b") as file:
        if file.readline() != (header + "\n").encode():
            raise ValueError(f"{path}: expected the columns {header}, got others; was it made with other settings?")
        end = file.tell()
        for line in file:
            if not line.endswith(b"\n") or int(line.partition(b",")[0]) > last_step:
                break
            end += len(line)
        file.truncate(end)


class ProgressBar:
    """Steps done, steps/s, ns/day and remaining time; a line now and then where the output is not a terminal.

    Args:
        timestep: ps. done: steps that a former run has made. show: False stays silent.
    """

    def __init__(self, title: str, total: int, timestep: float, done: int = 0, show: bool = True) -> None:
        self._title, self._total, self._timestep, self._first = title, total, timestep, done
        self._show = show and total > done
        self._begin = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(file=sys.stderr)
        self._begin = self._last_line = time.monotonic()
        if self._show and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._first, speed="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._show and kind is None:
            self._line(self._done)

    _done = 0

    def update(self, done: int) -> None:
        """Show that `done` steps of all are made."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, speed=self.speed(done))
        elif self._show and time.monotonic() - self._last_line > 15.0:
            self._line(done)

    def speed(self, done: int) -> str:
        """For example ``52.3 steps/s, 2.26 ns/day``."""
        rate = (done - self._first) / max(time.monotonic() - self._begin, 1e-9)
        return f"{rate:.1f} steps/s, {rate * self._timestep * 86.4:.3g} ns/day"

    def _line(self, done: int) -> None:
        self._last_line = time.monotonic()
        rate = (done - self._first) / max(self._last_line - self._begin, 1e-9)
        left = f", {(self._total - done) / rate:.0f} s left" if rate > 0 and done < self._total else ""
        print(f"{self._title}: {done}/{self._total} steps, {self.speed(done)}{left}", file=sys.stderr, flush=True)
