"""The folder of a training in water: what it was begun with, so that no other training goes on in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from openmm_mlff.data.datasets import digest
from openmm_mlff.data.files import write_atomically
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training.solvation_settings import SolvationOptions, Target

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.json"
CONFIG = "config.json"
FORMAT = 1
#: options that decide how much of the machine is used, and nothing that was computed
OF_THE_MACHINE = ("processes", "threads")


def claim_training(
    folder: Path,
    options: SolvationOptions,
    targets: Sequence[Target],
    vacuum: Potential,
    water: Potential,
    resume: bool,
) -> None:
    """Write ``config.json``, or check that the folder was begun with the same potentials, targets and options.

    Args:
        water: the potential in water as it starts.

    Raises `FileExistsError` for a folder in use without `resume`, `ValueError` naming what differs.
    """
    wanted = {
        "format": FORMAT,
        "options": asdict(options),
        "vacuum": checksum(vacuum),
        "water": checksum(water),
        "targets": {
            t.name: {
                "split": t.split,
                "free_energy_eV": t.free_energy,
                "atoms": t.structure.formula,
                "start": digest([t.structure])[:16],
            }
            for t in targets
        },
    }
    path = folder / CONFIG
    if path.exists():
        if not resume:
            raise FileExistsError(f"folder: {folder} holds a training already; resume it, or choose another")
        found = json.loads(path.read_text(encoding="utf-8"))
        plain = json.loads(json.dumps(wanted))
        for side in (found, plain):
            for key in OF_THE_MACHINE:
                side["options"].pop(key)
        changed = [key for key in plain if found.get(key) != plain[key]]
        if changed:
            raise ValueError(f"{changed[0]}: expected that of the training in {folder}, got another")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(wanted, indent=1) + "\n").encode())


def checksum(model: Potential) -> str:
    """SHA-256 of all tensors of a potential, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return total.hexdigest()
