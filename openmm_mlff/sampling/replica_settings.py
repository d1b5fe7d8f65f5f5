"""Everything that decides one run of many replicas, as one record that is written beside its output."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openmm_mlff.sampling.settings import require_positive, require_whole


@dataclass(frozen=True)
class ReplicaSettings:
    """How many replicas run, and how.

    Attributes:
        n: replicas. steps: of production, of every replica. timestep: fs.
        ensemble: nve or nvt. temperature: K. friction: 1/ps.
        minimization_steps: largest number of iterations; 0 leaves the start as it is.
        equilibration_steps: before production, with a thermostat, not recorded.
        report_interval, frame_interval, checkpoint_interval: steps between rows of the table, frames of the trajectory
            (0 writes none) and checkpoints.
        seed: of velocities and thermostat.
        platform: OpenMM platform; None chooses by size. threads: of the CPU platform; None chooses by size.
        batch: replicas in one evaluation of the model; None chooses.
        distances, torsions: name -> atoms of one copy, for the table; backbone torsions are added if `torsions` is
            empty.
        check_bonds: stop when a bond of the topology breaks. max_force: kJ/mol/nm on any atom.

    Raises `ValueError` naming the argument, what was expected and what came.
    """

    n: int
    steps: int
    timestep: float = 1.0
    ensemble: str = "nvt"
    temperature: float = 300.0
    friction: float = 1.0
    minimization_steps: int = 0
    equilibration_steps: int = 0
    report_interval: int = 100
    frame_interval: int = 1000
    checkpoint_interval: int = 10_000
    seed: int = 1
    platform: str | None = None
    threads: int | None = None
    batch: int | None = None
    distances: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    torsions: Mapping[str, tuple[int, int, int, int]] = dataclasses.field(default_factory=dict)
    check_bonds: bool = True
    max_force: float = 1e5

    def __post_init__(self) -> None:
        if self.ensemble not in ("nve", "nvt"):
            raise ValueError(f"ensemble: expected nve or nvt, got {self.ensemble!r}")
        for name in ("timestep", "temperature", "friction", "max_force"):
            require_positive(name, getattr(self, name))
        least = {"n": 1, "report_interval": 1, "checkpoint_interval": 1, "seed": 1}
        for name in ("steps", "minimization_steps", "equilibration_steps", "frame_interval", *least):
            require_whole(name, getattr(self, name), least.get(name, 0))
        for name, length in (("distances", 2), ("torsions", 4)):
            chosen = {key: tuple(int(i) for i in atoms) for key, atoms in getattr(self, name).items()}
            for key, atoms in chosen.items():
                if len(atoms) != length or len(set(atoms)) != length or min(atoms) < 0:
                    raise ValueError(f"{name}: expected {length} different atom indices for {key!r}, got {list(atoms)}")
            object.__setattr__(self, name, chosen)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))
