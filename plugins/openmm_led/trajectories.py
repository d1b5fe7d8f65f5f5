"""trajectories (files or arrays) -> what LED is trained and tested on, checked.

Trajectories of one molecule, one time step, whole molecules, nm. Training, validation and test trajectories are
separate runs; a frame that is in two of them is refused.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openmm import app

#: relative difference of frame spacings that counts as the same
TIME_TOLERANCE = 1e-3
#: endings of files that hold the time of every frame
TIMED = frozenset({".xtc", ".trr", ".nc", ".ncdf", ".netcdf", ".h5", ".hdf5", ".gro"})
#: ps, CHARMM's unit of time
AKMA_PS = 0.0488882129


@dataclass(frozen=True)
class Trajectories:
    """Runs of one molecule.

    Attributes:
        frames: per run ``(n_frames, n_atoms, 3)`` nm, molecules whole. interval: between frames, ps.
        names: one per run, for messages and cards.
    """

    frames: tuple[np.ndarray, ...]
    interval: float
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError("trajectories: expected at least one, got none")
        if not self.interval > 0:
            raise ValueError(f"interval: expected a positive time between frames (ps), got {self.interval!r}")
        names = self.names or tuple(f"trajectory {k}" for k in range(len(self.frames)))
        object.__setattr__(self, "names", names)
        if len(names) != len(self.frames):
            raise ValueError(f"names: expected {len(self.frames)}, one per trajectory, got {len(names)}")
        n_atoms = np.shape(self.frames[0])[1] if np.ndim(self.frames[0]) == 3 else None
        for name, frames in zip(names, self.frames, strict=True):
            if np.ndim(frames) != 3 or frames.shape[1:] != (n_atoms, 3) or not len(frames):
                raise ValueError(
                    f"trajectories: expected arrays of shape (n_frames, {n_atoms}, 3), {name} has {np.shape(frames)}"
                )
            bad = np.flatnonzero(~np.isfinite(frames).all((1, 2)))
            if len(bad):
                raise ValueError(f"trajectories: frame {bad[0]} of {name} holds NaN or infinity")

    @property
    def n_frames(self) -> int:
        """Of all runs together."""
        return sum(len(f) for f in self.frames)

    def check_lag(self, lag: int) -> None:
        """Raise `ValueError` unless every run is longer than `lag` frames, so that each holds a pair."""
        for name, frames in zip(self.names, self.frames, strict=True):
            if len(frames) <= lag:
                raise ValueError(f"lag: expected fewer than the {len(frames)} frames of {name}, got {lag}")

    def fingerprints(self) -> set[bytes]:
        """A checksum of every frame (positions in single precision)."""
        return {
            hashlib.blake2b(np.ascontiguousarray(x, np.float32).tobytes(), digest_size=12).digest()
            for frames in self.frames
            for x in frames
        }


def check_separate(sets: Mapping[str, Trajectories]) -> None:
    """Raise `ValueError` if two sets share a frame, or differ in interval or number of atoms."""
    seen: dict[bytes, str] = {}
    first = next(iter(sets.items()))
    for name, trajectories in sets.items():
        if abs(trajectories.interval / first[1].interval - 1.0) > TIME_TOLERANCE:
            raise ValueError(
                f"trajectories: expected one time between frames, {first[0]} has {first[1].interval:g} ps, "
                f"{name} has {trajectories.interval:g} ps"
            )
        atoms = [t.frames[0].shape[1] for t in (first[1], trajectories)]
        if atoms[0] != atoms[1]:
            raise ValueError(f"trajectories: {first[0]} has {atoms[0]} atoms, {name} has {atoms[1]}")
        own = trajectories.fingerprints()
        shared = own & seen.keys()
        if shared:
            others = sorted({seen[f] for f in shared})
            raise ValueError(
                f"trajectories: {len(shared)} frames of {name} are also in {', '.join(others)}; "
                "training, validation and test runs must be separate"
            )
        seen |= dict.fromkeys(own, name)


def read_trajectories(
    paths: Sequence[str | Path],
    topology: app.Topology,
    atoms: Sequence[int] | None = None,
    interval: float | None = None,
) -> Trajectories:
    """Read trajectory files (whatever mdtraj reads) of one topology.

    Args:
        topology: of the files, solvent included. atoms: the solute; None takes everything that is not solvent.
        interval: ps between frames; None takes it from the files.

    Raises `ValueError` for no paths, other numbers of atoms, uneven or different times between frames, and NaN frames;
    `FileNotFoundError` for a path without a file.
    """
    if not paths:
        raise ValueError("trajectories: expected at least one file, got none")
    import mdtraj

    from openmm_mlff.sampling.systems import select

    whole = mdtraj.Topology.from_openmm(topology)
    keep = np.asarray(select(topology, "auto") if atoms is None else list(atoms))
    found, spacings = [], []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"trajectories: no file at {path}")
        try:
            read = mdtraj.load(str(path), top=whole)
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(
                f"trajectories: {path.name} does not fit the topology of {whole.n_atoms} atoms, or cannot be read "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        if read.unitcell_lengths is not None and len(list(whole.bonds)):
            read.make_molecules_whole(inplace=True)
        spacing = None if interval is not None else _spacing(path, np.asarray(read.time, dtype=np.float64))
        if spacing is not None:
            spacings.append((path.name, spacing))
        found.append(read.xyz[:, keep].astype(np.float32))
    if interval is None:
        if not spacings:
            raise ValueError("interval: the files do not tell the time between frames; give it in ps")
        interval = spacings[0][1]
        for name, spacing in spacings:
            if abs(spacing / interval - 1.0) > TIME_TOLERANCE:
                raise ValueError(
                    f"trajectories: expected one time between frames, {spacings[0][0]} has {interval:g} ps, "
                    f"{name} has {spacing:g} ps"
                )
    return Trajectories(tuple(found), float(interval), tuple(Path(p).name for p in paths))


def _spacing(path: Path, times: np.ndarray) -> float | None:
    """ps between the frames of a file that was read, or None if it has one frame or none.

    Raises `ValueError` for uneven times, and where the file does not tell: mdtraj then numbers the frames.
    """
    if len(times) < 2:
        return None
    suffix = path.suffix.lower()
    found = _dcd_spacing(path) if suffix == ".dcd" else None
    if found is None and suffix not in TIMED:
        raise ValueError(f"interval: {path.name} does not tell the time between its frames; give it in ps")
    if found is not None:
        return found
    steps = np.diff(times)
    uneven = np.flatnonzero(np.abs(steps / np.median(steps) - 1.0) > 10 * TIME_TOLERANCE)
    if np.median(steps) <= 0 or len(uneven):
        where = f" between frames {uneven[0]} and {uneven[0] + 1}" if len(uneven) else ""
        raise ValueError(f"trajectories: uneven times{where} of {path.name}; give interval if they are wrong")
    return float(np.median(steps))


def _dcd_spacing(path: Path) -> float | None:
    """ps between frames by the header of a DCD file: steps between frames, times the step in AKMA units.

    None where the step is missing, or is 1 unit, as writers put it that do not know it (mdtraj, for one).
    """
    with open(path, "rb") as file:
        header = file.read(48)
    order = "<" if header[:4] == b"\x54\0\0\0" else ">"
    if len(header) < 48 or header[4:8] != b"CORD":
        return None
    _, _, every, *_ = struct.unpack(f"{order}9i", header[8:44])
    (step,) = struct.unpack(f"{order}f", header[44:48])
    known = every > 0 and np.isfinite(step) and step > 0 and step != 1.0
    # single precision has seven digits
    return float(f"{every * step * AKMA_PS:.6g}") if known else None


def describe(sets: Mapping[str, Trajectories]) -> dict[str, Any]:
    """What a model card says about the data."""
    return {
        name: {
            "runs": len(t.frames),
            "frames": t.n_frames,
            "interval_ps": t.interval,
            "sha256": hashlib.sha256(b"".join(sorted(t.fingerprints()))).hexdigest(),
        }
        for name, t in sets.items()
    }
