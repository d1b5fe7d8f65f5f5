"""run <-> checkpoint: one file that is always whole, from which a run goes on.

A zip archive with ``meta.json`` (phase, step, pair lists of the potential) and ``state.xml`` (OpenMM's State: positions
and velocities with all their digits, box, parameters). It is portable between machines and platforms.

A checkpoint is a fresh start for both the run that writes it and the run that resumes from it: both make a new Context
from the State and draw new random seeds from (seed, phase, step). So neighbour lists, the random generators of every
platform and the adaptive step of the barostat, none of which OpenMM's own checkpoints hold on all platforms, cannot
differ, and an interrupted run ends where an uninterrupted one does, bit for bit, on platforms that are deterministic.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openmm

from openmm_mlff.data.files import write_atomically
from openmm_mlff.forces.serialization import load_state

FORMAT = 1
NAME = "checkpoint.zip"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is.

    Attributes:
        phase: minimize, equilibrate or production. step: steps of the phase that are done.
        state: XML of an OpenMM State with positions, velocities and parameters.
        scheduled: False for one that was written because the run was stopped: going on from it is correct, but not
            bit for bit the run that was never stopped.
        compiled: whether the machine-learned forces ran as compiled graphs; None if there are none.
        pair_lists: of the machine-learned forces, as `forces.running.pair_list_state` gives them.
    """

    phase: str
    step: int
    state: str
    scheduled: bool = True
    compiled: bool | None = None
    pair_lists: Sequence[dict[str, np.ndarray]] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write the file under a temporary name and move it."""
        meta = {
            "format": FORMAT,
            "phase": self.phase,
            "step": self.step,
            "scheduled": self.scheduled,
            "compiled": self.compiled,
            # JSON keeps all digits of a double
            "pair_lists": [{k: np.asarray(v).tolist() for k, v in lists.items()} for lists in self.pair_lists],
        }
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("meta.json", json.dumps(meta))
            archive.writestr("state.xml", self.state)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read the file; raises `FileNotFoundError`, or `ValueError` if it is damaged or of a newer format."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"resume: no checkpoint at {path}")
        try:
            with zipfile.ZipFile(path) as archive:
                meta = json.loads(archive.read("meta.json"))
                state = archive.read("state.xml").decode()
            lists = [{k: np.array(v) for k, v in entry.items()} for entry in meta["pair_lists"]]
            found = cls(meta["phase"], int(meta["step"]), state, bool(meta["scheduled"]), meta["compiled"], lists)
        except (zipfile.BadZipFile, KeyError, ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"resume: {path} is damaged or no checkpoint ({error})") from error
        if meta["format"] > FORMAT:
            raise ValueError(f"resume: {path} has format {meta['format']}, this version reads up to {FORMAT}")
        return found

    def openmm_state(self) -> openmm.State:
        """The State, read without executing anything that a stranger may have put into it."""
        return load_state(self.state)


def seed_for(seed: int, phase: str, step: int) -> int:
    """A random seed between 1 and 2^31 - 1 that belongs to one stretch between two checkpoints of one run."""
    digest = hashlib.sha256(f"{seed}/{phase}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 1) + 1
