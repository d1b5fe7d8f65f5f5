"""What a force of this package is stored as: which model, which atoms, which options, as one JSON text."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch

from openmm_mlff.forces.uncertainty import UncertaintySpec
from openmm_mlff.potentials.electrostatics import LONG_RANGE_METHODS

#: of options that older versions of this package read as well; options of many copies are of version 2, those with a
#: long-range method of version 3, those with a phase of version 4, those that watch their uncertainty of version 5.
SPEC_VERSION = 5
PRECISIONS = {"single": torch.float32, "double": torch.float64}
REGIONS = ("open", "wrapped", "periodic")
#: kJ/mol/nm; under such a force a carbon atom moves by two angstroms in one step of 0.5 fs.
DEFAULT_MAX_FORCE = 1e7


@dataclass(frozen=True)
class ForceSpec:
    """All that a pickled computation carries; plain JSON values.

    Attributes:
        sha256: of the model file. path: where it was last seen. family: which family reads a file that is not ours.
        numbers: atomic numbers of one copy, in the order of the force's particles. atoms: indices in the system of
            all copies, one copy after the other; None means all particles, in order.
        replicas: number of independent copies, which are evaluated together and do not see one another.
        batch: copies in one evaluation of the model; None chooses.
        charge: total charge of a copy in e. multiplicity: 2S+1.
        precision: 'single', 'double', or None for that of the model file. device: torch's name, None to choose.
        long_range_cutoff: angstrom, or None for the model's own. long_range_method: 'shifted', 'ewald' or 'pme'.
        region: 'open' (no box), 'wrapped' (an open region in a periodic box: made whole first), 'periodic'.
        compile: 'auto', True or False. threads: torch threads; None chooses by size.
        max_force: kJ/mol/nm; a larger force on any atom stops the run. None switches this off.
        phase: one of the model's `Potential.phases`, or None for a model with one energy.
        coupling_parameter: OpenMM's global parameter (0 to 1, at first 1) behind the model's ``coupling``, or None.
        uncertainty: what happens when the model is unsure; None watches nothing.
    """

    sha256: str
    family: str
    numbers: tuple[int, ...]
    path: str | None = None
    atoms: tuple[int, ...] | None = None
    charge: int = 0
    multiplicity: int = 1
    precision: str | None = None
    device: str | None = None
    long_range_cutoff: float | None = None
    region: str = "open"
    compile: bool | str = "auto"
    threads: int | None = None
    max_force: float | None = DEFAULT_MAX_FORCE
    replicas: int = 1
    batch: int | None = None
    long_range_method: str = "shifted"
    phase: str | None = None
    coupling_parameter: str | None = None
    uncertainty: UncertaintySpec | None = None

    def __post_init__(self) -> None:
        for name in ("numbers", "atoms"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(i) for i in value))
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected 'single', 'double' or None, got {self.precision!r}")
        if self.region not in REGIONS:
            raise ValueError(f"region: expected one of {', '.join(REGIONS)}, got {self.region!r}")
        if self.long_range_method not in LONG_RANGE_METHODS:
            expected = ", ".join(LONG_RANGE_METHODS)
            raise ValueError(f"long_range_method: expected one of {expected}, got {self.long_range_method!r}")
        for name in ("replicas", "batch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        if self.replicas > 1:
            refuse_fall_back(self, "copies")
        if self.atoms is not None and len(self.atoms) != self.replicas * len(self.numbers):
            raise ValueError(
                f"atoms: expected {self.replicas * len(self.numbers)} indices ({self.replicas} copies of "
                f"{len(self.numbers)} atoms), got {len(self.atoms)}"
            )

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        # what has its default is stored as it was before there was a choice
        version = 1 if self.replicas == 1 else 2
        if version == 1:
            del fields["replicas"], fields["batch"]
        if self.long_range_method == "shifted":
            del fields["long_range_method"]
        else:
            version = 3
        for name in ("phase", "coupling_parameter"):
            if fields[name] is None:
                del fields[name]
            elif isinstance(fields[name], str):
                version = 4
            else:
                raise ValueError(f"{name}: expected a name or None, got {fields[name]!r}")
        if fields["uncertainty"] is None:
            del fields["uncertainty"]
        else:
            version = 5
        return json.dumps({"version": version, **fields}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ForceSpec:
        """Raises `ValueError` for a text that is not a specification of this version or an older one."""
        try:
            fields = dict(json.loads(text))
            version = fields.pop("version")
            if version > SPEC_VERSION:
                raise ValueError(f"version {version} is newer than {SPEC_VERSION}, which this package reads")
            if fields.get("uncertainty") is not None:
                fields["uncertainty"] = UncertaintySpec.from_dict(fields["uncertainty"])
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"PythonForce: the stored options of an openmm-mlff force cannot be read ({error})"
            ) from error


def refuse_fall_back(spec: ForceSpec, what: str) -> None:
    """`ValueError` if a force on many molecules would fall back: it is one model for all of them."""
    if spec.uncertainty is not None and spec.uncertainty.action == "fall_back":
        raise ValueError(
            f"on_uncertain: 'fall_back' exchanges the model of a whole force, so that one of many {what} would change "
            "the others; expected 'warn', 'save' or 'stop'"
        )
