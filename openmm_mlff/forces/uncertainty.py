"""What a running force does when its model is unsure: warn, save the frame for labelling, stop, or fall back.

The uncertainty comes with the energy and forces from one evaluation of an ensemble (`potentials.ensemble`), so watching
it costs nothing. What counts is the largest uncertainty of the force on an atom.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.checks import InstabilityError

logger = logging.getLogger(__name__)

ON_UNCERTAIN = ("warn", "save", "stop", "fall_back")
#: where frames go that nobody has named a folder for, in the working directory
FRAMES = "uncertain_frames"
#: steps within the limit after which going beyond it is a new event, with a warning of its own
CALM_STEPS = 1000


@dataclass(frozen=True)
class OtherModel:
    """The model that takes over.

    Attributes:
        sha256, family, path: as in `ForceSpec`. long_range_cutoff: angstrom, or None for its own. phase: its own.
    """

    sha256: str
    family: str
    path: str | None = None
    long_range_cutoff: float | None = None
    phase: str | None = None


@dataclass(frozen=True)
class UncertaintySpec:
    """What a force does when its model is unsure; plain JSON values.

    Attributes:
        action: 'warn' (once per event: until it has been within the limit for `CALM_STEPS`), 'save' (warn, and write
            the frame), 'stop' (raise `UncertaintyError`), or 'fall_back' (go on with another model, for good).
        limit: of the uncertainty of the force on any atom, eV/angstrom.
        interval: steps between two frames that are saved, at least.
        other: the model to fall back to.
    """

    action: str
    limit: float
    interval: int = 100
    other: OtherModel | None = None

    def __post_init__(self) -> None:
        if self.action not in ON_UNCERTAIN:
            expected = ", ".join(repr(name) for name in ON_UNCERTAIN)
            raise ValueError(f"on_uncertain: expected {expected} or None, got {self.action!r}")
        if isinstance(self.limit, bool) or not isinstance(self.limit, int | float) or not 0 < self.limit < np.inf:
            raise ValueError(
                f"uncertainty_limit: expected a positive number (eV/angstrom) or a Quantity, got {self.limit!r}"
            )
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"uncertain_interval: expected a whole number of steps >= 1, got {self.interval!r}")
        if (self.other is not None) != (self.action == "fall_back"):
            raise ValueError(
                "fall_back: expected a model file or the name of a model with on_uncertain='fall_back', and None else"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UncertaintySpec:
        """The inverse of `dataclasses.asdict`."""
        fields = dict(values)
        if fields.get("other") is not None:
            fields["other"] = OtherModel(**fields["other"])
        return cls(**fields)


@dataclass(frozen=True)
class Uncertainty:
    """How sure a model was in its last evaluation: spreads, times the factors of its calibration.

    Attributes:
        energies: of each copy, ``(replicas,)`` eV. forces: of each atom of the force, ``(n_atoms,)`` eV/angstrom.
    """

    energies: np.ndarray
    forces: np.ndarray

    @property
    def worst(self) -> int:
        """The atom with the most uncertain force."""
        return int(self.forces.argmax())


class UncertaintyError(InstabilityError):
    """A run that was stopped because its model is unsure of it.

    Attributes:
        atom, replica: as in `InstabilityError`. uncertainty, limit: of the force on that atom, eV/angstrom.
    """

    def __init__(self, message: str, atom: int, uncertainty: float, limit: float) -> None:
        super().__init__(message, atom)
        self.uncertainty, self.limit = uncertainty, limit


@dataclass
class Watch:
    """Follows the uncertainty of one force through a run.

    Attributes:
        spec: what to do, and beyond which limit.
        events: ``(step, atom, uncertainty in eV/angstrom)`` at the start of each event, atoms as the force counts them.
        saved: files that were written.
    """

    spec: UncertaintySpec
    events: list[tuple[int, int, float]] = field(default_factory=list)
    saved: list[Path] = field(default_factory=list)
    _last_beyond: int | None = None
    _last_saved: int | None = None

    def exceeded(self, found: Uncertainty, step: int, describe: Callable[[int], str]) -> bool:
        """Whether the uncertainty is beyond the limit; says so once per event, and raises if that is to end the run."""
        atom = found.worst
        value = float(found.forces[atom])
        # written so that NaN counts as beyond it
        if value <= self.spec.limit:
            return False
        text = (
            f"the force on {describe(atom)} is uncertain by {value:.3g} eV/angstrom, more than uncertainty_limit = "
            f"{self.spec.limit:.3g} (step {step})"
        )
        if self.spec.action == "stop":
            # the first trial step of OpenMM's minimiser is a long one, which it takes back by itself
            hint = " (of a minimiser: use running.without_force_limit)" if step == 0 else ""
            message = f"on_uncertain: {text}; the model was not trained for this{hint}"
            raise UncertaintyError(message, atom, value, self.spec.limit)
        before = self._last_beyond
        # steps that go back belong to another run of the same force
        if before is None or not 0 <= step - before < CALM_STEPS:
            self.events.append((step, atom, value))
            logger.warning("on_uncertain: %s", text)
        self._last_beyond = step
        return True

    def due(self, step: int) -> bool:
        """Whether a frame may be saved at this step."""
        return self._last_saved is None or not 0 <= step - self._last_saved < self.spec.interval

    def save(self, folder: Path, structure: Structure, step: int) -> Path:
        """Write a frame for labelling, as a file of its own: ``step-<step>.extxyz`` in the folder."""
        path = write_frame(folder / f"step-{step:09d}.extxyz", structure)
        self._last_saved = step
        self.saved.append(path)
        return path


def write_frame(path: Path, structure: Structure) -> Path:
    """Write one structure as extended XYZ under a temporary name and move it, so that no reader sees half of it."""
    from openmm_mlff.data.formats import write_extxyz

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        written = Path(scratch) / path.name
        write_extxyz(written, [structure])
        os.replace(written, path)
    return path
