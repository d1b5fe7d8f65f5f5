"""Everything that decides one simulation, as one record that is written beside its output."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmm_mlff.data.files import write_atomically
from openmm_mlff.forces.uncertainty import ON_UNCERTAIN
from openmm_mlff.potentials.electrostatics import LONG_RANGE_METHODS

ENSEMBLES = ("nve", "nvt", "npt")
COMPILE = ("auto", "yes", "no")
EMBEDDINGS = ("mechanical", "electrostatic")
#: an uncertainty limit that comes from a short run of the system itself
OWN = "own"


@dataclass(frozen=True)
class RunSettings:
    """What to simulate and how. The units here are those that users type.

    Attributes:
        input: PDB or mmCIF file with all hydrogens (water can be added, see `padding`).
        model: name as in ``MLPotential(name)``. model_path: model file, for a bare family name.
        charge, multiplicity: total charge (e) and 2S+1 of the machine-learned region.
        ml_region: ``auto`` (everything but water and ions, or everything if there is nothing else), ``all``,
            ``none`` (force field only) or an mdtraj selection such as ``resname ALA`` or ``index 0 to 21``.
        embedding: of a machine-learned region in its surroundings, ``mechanical`` or ``electrostatic``.
        forcefield: OpenMM force-field files for what is not machine-learned.
        padding: nm of water around the solute; None adds no water.
        use_box: whether the box of the file (CRYST1) counts.
        long_range_cutoff: nm, for fully machine-learned periodic systems. long_range_method: of their charges:
            shifted, ewald or pme; None takes the model's own.
        phase: which energy of a model that offers several, such as water or vacuum of resolv; None takes its own.
        ensemble: nve, nvt or npt. temperature: K. pressure: bar. friction: 1/ps.
        timestep: fs. steps: of production. equilibration_steps: before it, with a thermostat, not recorded.
        minimization_steps: largest number of iterations; 0 leaves the start as it is.
        report_interval, checkpoint_interval: steps.
        seed: of velocities, thermostat and barostat.
        platform: OpenMM platform; None chooses by size. threads: of the CPU platform; None chooses by size.
        precision: of the model, ``single`` or ``double``; None takes the model's own. device: of the model.
        compile: ``yes``, ``no`` or ``auto`` (`yes` for runs that are long enough to win the time back).
        torsions: name -> four atom indices, written to the table beside phi and psi.
        check_bonds: stop when a bond of the machine-learned region breaks.
        max_force: kJ/mol/nm; a larger force on any atom stops the run.
        on_uncertain: what an ensemble does when it is unsure of a force: warn, save (frames, in ``uncertain``), stop or
            fall_back; None watches nothing. uncertainty_limit: eV/angstrom; None takes that of the model file, ``own``
            finds one by a short run of the system first (`sampling.uncertainty.limit_of_run`).
        uncertain_interval: steps between two saved frames, at least. fall_back: model file or name of a model.

    Raises `ValueError` naming the argument, what was expected and what came.
    """

    input: str
    model: str = "spookynet-ala2-gfn2"
    model_path: str | None = None
    charge: int = 0
    multiplicity: int = 1
    ml_region: str = "auto"
    embedding: str = "mechanical"
    forcefield: tuple[str, ...] = ("amber14-all.xml", "amber14/tip3p.xml")
    padding: float | None = None
    use_box: bool = True
    long_range_cutoff: float | None = None
    long_range_method: str | None = None
    phase: str | None = None
    ensemble: str = "nvt"
    temperature: float = 300.0
    pressure: float = 1.0
    friction: float = 1.0
    timestep: float = 1.0
    steps: int = 10000
    equilibration_steps: int = 0
    minimization_steps: int = 200
    report_interval: int = 100
    checkpoint_interval: int = 1000
    seed: int = 1
    platform: str | None = None
    threads: int | None = None
    precision: str | None = None
    device: str | None = None
    compile: str = "auto"
    torsions: Mapping[str, tuple[int, int, int, int]] = dataclasses.field(default_factory=dict)
    check_bonds: bool = True
    max_force: float = 1e5
    on_uncertain: str | None = None
    uncertainty_limit: float | str | None = None
    uncertain_interval: int = 100
    fall_back: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "forcefield", tuple(self.forcefield))
        object.__setattr__(self, "torsions", {name: tuple(atoms) for name, atoms in self.torsions.items()})
        for name, allowed in (("ensemble", ENSEMBLES), ("compile", COMPILE), ("embedding", EMBEDDINGS),
                              ("precision", (None, "single", "double")),
                              ("long_range_method", (None, *LONG_RANGE_METHODS)),
                              ("on_uncertain", (None, *ON_UNCERTAIN))):  # fmt: skip
            if getattr(self, name) not in allowed:
                words = ", ".join(str(a) for a in allowed if a is not None)
                raise ValueError(f"{name}: expected one of {words}, got {getattr(self, name)!r}")
        for name in ("temperature", "timestep", "friction", "max_force"):
            require_positive(name, getattr(self, name))
        for name in ("padding", "long_range_cutoff"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        self._check_uncertainty_limit()
        for name, least in (("steps", 0), ("equilibration_steps", 0), ("minimization_steps", 0), ("seed", 1),
                            ("report_interval", 1), ("checkpoint_interval", 1),
                            ("uncertain_interval", 1)):  # fmt: skip
            require_whole(name, getattr(self, name), least)
        if self.threads is not None:
            require_whole("threads", self.threads, 1)
        if self.seed >= 2**31:
            raise ValueError(f"seed: expected less than 2^31, got {self.seed}")
        for name, atoms in self.torsions.items():
            if len(atoms) != 4 or len(set(atoms)) != 4 or any(int(a) != a or a < 0 for a in atoms):
                raise ValueError(
                    f"torsions: expected four different atom indices from 0 for {name!r}, got {list(atoms)}"
                )

    def _check_uncertainty_limit(self) -> None:
        limit = self.uncertainty_limit
        if isinstance(limit, str) and limit != OWN:
            raise ValueError(f"uncertainty_limit: expected a positive number (eV/angstrom) or {OWN!r}, got {limit!r}")
        if limit == OWN and self.on_uncertain is None:
            raise ValueError(f"uncertainty_limit: expected None without on_uncertain, got {OWN!r}")
        if limit is not None and not isinstance(limit, str):
            require_positive("uncertainty_limit", limit)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSettings:
        """The inverse of `to_dict`; raises `ValueError` for a setting that this version does not know."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"settings: this version does not know {unknown[0]!r}")
        return cls(**values)

    def replace(self, **changes: Any) -> RunSettings:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)


def require_positive(name: str, value: float) -> None:
    """Raises `ValueError` naming the argument if it is not a positive finite number."""
    if not (isinstance(value, int | float) and 0 < value < float("inf")):
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def require_whole(name: str, value: int, least: int) -> None:
    """Raises `ValueError` naming the argument if it is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name and move it."""
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
