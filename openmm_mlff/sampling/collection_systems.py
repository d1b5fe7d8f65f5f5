"""What a recipe of many molecules is made of: systems, each with its own seed, and how each is sampled.

A system is one molecule, or several that are kept together, in one spin state. It becomes one shard of the dataset,
and everything random in it follows from its own seed, so that a recipe can grow without changing what it had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from openmm_mlff._plugins import near
from openmm_mlff.data.classes import check_class

KINDS = ("molecule", "cluster", "pair", "apart", "stretch")
#: ways of making frames: what each system does with its share of them.
WAYS = ("dynamics", "modes", "rattle", "release", "scan")
HOLDS = ("nothing", "protons")


@dataclass(frozen=True)
class Sampling:
    """How frames of a system are made.

    Attributes:
        shares: of the frames, by way: "dynamics" and "modes" at the temperatures, "rattle" (random displacements),
            "release" (short dynamics from a held start that is let go: protons move), "scan" (rigid molecules with
            thermal geometries at every distance, or a stretched bond).
        temperatures: kelvin, taken in turn. conformers: how many starts.
        trajectory: frames of one trajectory. stride, discard, timestep: femtoseconds.
        relax: iterations of the minimiser at most.
        rattle: smallest and largest standard deviation of random displacements, angstrom.
        modes_up_to: atoms; larger systems divide the share of modes among dynamics and rattle.
        hold: "protons" keeps hydrogens on the N, O or S that they were built on while frames are made.
        distances: of the marked atoms (pairs), of nearest atoms (fragments apart), angstrom, or stretching factors.
        contact: distance of the marked atoms from which the dynamics of a pair start, angstrom.
        largest_force: frames with a larger force on an atom are left out, eV/angstrom.
        largest_leak: frames are left out in which a part's charge, by the method's own charges, is further than this
            from its formal one, e; None leaves out none. Many methods let electrons of an anion leak to whatever is
            far away, and then energies of separated fragments do not add up.
    """

    shares: Mapping[str, float] = field(default_factory=lambda: {"dynamics": 0.5, "modes": 0.35, "rattle": 0.15})
    temperatures: tuple[float, ...] = (300.0, 450.0, 700.0)
    conformers: int = 6
    trajectory: int = 10
    stride: float = 25.0
    discard: float = 80.0
    timestep: float = 1.0
    relax: int = 80
    rattle: tuple[float, float] = (0.015, 0.07)
    modes_up_to: int = 24
    hold: str = "nothing"
    distances: tuple[float, ...] = ()
    contact: float = 1.9
    largest_force: float = 20.0
    largest_leak: float | None = None

    def __post_init__(self) -> None:
        for way, share in self.shares.items():
            if way not in WAYS:
                raise ValueError(f"shares: unknown way {way!r}; {near(way, list(WAYS))}")
            if not share >= 0.0:
                raise ValueError(f"shares: expected {way} to be at least 0, got {share!r}")
        if abs(sum(self.shares.values()) - 1.0) > 1e-6:
            raise ValueError(f"shares: expected numbers that add up to 1, got {dict(self.shares)}")
        for name in ("conformers", "trajectory", "stride", "timestep", "relax", "contact", "largest_force"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        for name in ("temperatures", "distances"):
            if any(not value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name}: expected positive numbers, got {getattr(self, name)}")
        if not self.temperatures:
            raise ValueError("temperatures: expected at least one, got none")
        if len(self.rattle) != 2 or not 0.0 <= self.rattle[0] <= self.rattle[1]:
            raise ValueError(f"rattle: expected the smallest and the largest width, got {self.rattle}")
        if self.hold not in HOLDS:
            raise ValueError(f"hold: expected one of {', '.join(HOLDS)}, got {self.hold!r}")
        if self.largest_leak is not None and not self.largest_leak > 0.0:
            raise ValueError(f"largest_leak: expected a positive number or none, got {self.largest_leak!r}")
        if self.discard < 0.0:
            raise ValueError(f"discard: expected at least 0 fs, got {self.discard}")
        if self.shares.get("scan", 0.0) > 0.0 and not self.distances:
            raise ValueError("distances: expected some for the share of scan, got none")

    @classmethod
    def from_tables(cls, *tables: Mapping[str, Any]) -> Sampling:
        """Settings from tables of a recipe, later ones first in rank. Raises `ValueError` naming what is wrong."""
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        for table in tables:
            for key, value in table.items():
                if key not in known:
                    raise ValueError(f"sampling: unknown key {key!r}; {near(key, list(known))}")
                values[key] = _plain(key, value, str(known[key].type))
        return cls(**values)


def _plain(key: str, value: Any, kind: str) -> Any:
    """A value of the wanted kind; `ValueError` for another kind."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "int" and number and int(value) == value:
        return int(value)
    if kind.startswith("float") and number:
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("tuple") and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(float(x) for x in value)
    if kind.startswith("Mapping") and isinstance(value, Mapping):
        return {str(k): float(v) for k, v in value.items()}
    raise ValueError(f"sampling: expected {key} to be a {kind}, got {value!r}")


@dataclass(frozen=True)
class PartSpec:
    """A molecule as the recipe gives it.

    Attributes:
        name: in the recipe. smiles: with marks. key: see `openmm_mlff.data.parts.molecule_key`.
        residues: amino acids, for peptides.
        charge: total charge where it is not the sum of the formal ones; None takes that.
    """

    name: str
    smiles: str
    key: str
    residues: tuple[str, ...] = ()
    charge: int | None = None


@dataclass(frozen=True)
class System:
    """One molecule, or several together, in one spin state.

    Attributes:
        name: of its shard, without the digest. group: shared by all spin states.
        family: of the recipe. kind: one of `KINDS`. built_class: one of `openmm_mlff.data.classes.CLASSES`.
        parts: molecules. waters: added around them (kind "cluster").
        multiplicity: 2S+1 of everything together; None takes the SMILES' (one part only).
        also: further multiplicities in which every third frame is labelled.
        frames: how many are wanted. seed: of everything random.
        split: "train", "valid" or "test". held_out: "" (train, valid), "molecule" or "family".
    """

    name: str
    group: str
    family: str
    kind: str
    built_class: str
    parts: tuple[PartSpec, ...]
    frames: int
    seed: int
    sampling: Sampling
    waters: int = 0
    multiplicity: int | None = None
    also: tuple[int, ...] = ()
    split: str = "train"
    held_out: str = ""

    def __post_init__(self) -> None:
        check_class(self.built_class)
        if self.kind not in KINDS:
            raise ValueError(f"kind: unknown kind {self.kind!r}; {near(self.kind, list(KINDS))}")
        if self.frames < 1:
            raise ValueError(f"structures: expected at least 1 for {self.name}, got {self.frames}")
        if self.waters < 0 or (self.waters and self.kind != "cluster"):
            raise ValueError(f"waters: expected none but in clusters, got {self.waters} for {self.name}")
        wanted = {"molecule": (1, 1), "cluster": (0, 99), "pair": (2, 2), "apart": (2, 99), "stretch": (1, 1)}
        low, high = wanted[self.kind]
        if not low <= len(self.parts) <= high or len(self.parts) + self.waters == 0:
            raise ValueError(f"parts: a {self.kind} has {low} to {high} parts, got {len(self.parts)} in {self.name}")
        if self.kind in ("apart", "stretch") and set(self.sampling.shares) != {"scan"}:
            raise ValueError(f"shares: {self.name} is a {self.kind}, which knows scan only")

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of everything that decides the frames."""
        table = asdict(self)
        # where frames go does not change them
        del table["split"], table["held_out"]
        # a setting that came later and is not used changes no digest
        if self.sampling.largest_leak is None:
            del table["sampling"]["largest_leak"]
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:8]
