"""coordinates and windows -> one bias on a System, whose parameters say which window acts.

The biases of all coordinates are one `openmm.CustomCVForce`. Lengths in angstrom, angles in degrees, biases in eV;
OpenMM's units stay inside.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import openmm

from openmm_mlff.analysis.umbrella import Bias
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

#: force group of the biases.
BIAS_GROUP = 31


# -- coordinates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coordinate:
    """What windows hold.

    Attributes:
        name: an identifier, for the parameters of the bias. force: its energy in OpenMM's units is the value.
        period: of the value; None for one without.
    """

    name: str
    force: openmm.Force = field(repr=False)
    period: float | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name: expected letters, digits and underscores, got {self.name!r}")

    def parameter(self, what: str) -> str:
        """Name of the global parameter: center, reach (half the flat width) or stiffness (kJ/mol per square)."""
        return f"umbrella_{what}_{self.name}"


def proton_transfer(donor: int, proton: int, acceptor: int, name: str = "transfer") -> Coordinate:
    """d(donor, proton) - d(acceptor, proton) in angstrom: negative while the proton is at the donor."""
    _different("donor, proton, acceptor", (donor, proton, acceptor))
    force = openmm.CustomCompoundBondForce(3, f"{ANGSTROM_PER_NM}*(distance(p1,p2)-distance(p2,p3))")
    force.addBond([donor, proton, acceptor])
    return Coordinate(name, force)


def distance(i: int, j: int, name: str = "distance") -> Coordinate:
    """Distance of two atoms in angstrom."""
    _different("i, j", (i, j))
    force = openmm.CustomBondForce(f"{ANGSTROM_PER_NM}*r")
    force.addBond(i, j)
    return Coordinate(name, force)


def torsion(i: int, j: int, k: int, m: int, name: str = "torsion") -> Coordinate:
    """Torsion of four atoms in degrees, IUPAC sign, from -180 to 180."""
    _different("i, j, k, m", (i, j, k, m))
    force = openmm.CustomTorsionForce(f"theta*{180 / np.pi!r}")
    force.addTorsion(i, j, k, m)
    return Coordinate(name, force, 360.0)


def _different(name: str, atoms: tuple[int, ...]) -> None:
    if len(set(atoms)) < len(atoms) or min(atoms) < 0:
        raise ValueError(f"{name}: expected indices of different atoms, got {atoms}")


@dataclass(frozen=True)
class UmbrellaWindow:
    """A window: its name (of a file) and, for each coordinate, a bias or None."""

    name: str
    biases: tuple[Bias | None, ...]

    def plain(self) -> list[list[float | None] | None]:
        return [None if b is None else [b.low, b.high, b.stiffness, b.period] for b in self.biases]


# -- the bias ----------------------------------------------------------------------------------------------------


def biased_system(system: openmm.System, coordinates: Sequence[Coordinate]) -> openmm.System:
    """A copy of the system with one `openmm.CustomCVForce` for the biases, none of which acts yet.

    Raises `ValueError` for two coordinates of one name or a force group that is taken.
    """
    names = [c.name for c in coordinates]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"coordinates: expected at least one, with different names, got {names}")
    if any(force.getForceGroup() == BIAS_GROUP for force in system.getForces()):
        raise ValueError(f"system: expected force group {BIAS_GROUP} to be free for the bias")
    terms, definitions = [], []
    for c in coordinates:
        away = f"{c.name}-{c.parameter('center')}"
        if c.period is not None:
            away = f"({away})-{c.period!r}*floor(({away})/{c.period!r}+0.5)"
        terms.append(f"0.5*{c.parameter('stiffness')}*outside_{c.name}^2")
        definitions.append(f"outside_{c.name}=max(abs({away})-{c.parameter('reach')},0)")
    force = openmm.CustomCVForce("; ".join(["+".join(terms), *definitions]))
    for c in coordinates:
        force.addCollectiveVariable(c.name, copy.deepcopy(c.force))
        for what in ("center", "reach", "stiffness"):
            force.addGlobalParameter(c.parameter(what), 0.0)
    force.setForceGroup(BIAS_GROUP)
    force.setName("umbrella")
    biased = openmm.XmlSerializer.clone(system)
    biased.addForce(force)
    return biased


def _parameters(coordinates: Sequence[str], window: UmbrellaWindow) -> dict[str, tuple[float, float, float] | None]:
    return {
        name: None if b is None else (b.center, 0.5 * (b.high - b.low), b.stiffness * KJ_PER_MOL_PER_EV)
        for name, b in zip(coordinates, window.biases, strict=True)
    }


def set_window(context: openmm.Context, coordinates: Sequence[str], window: UmbrellaWindow, share: float = 1.0,
               before: UmbrellaWindow | None = None) -> None:  # fmt: skip
    """Let the bias of a window act, or a share of the way to it from the one before.

    Args:
        coordinates: their names.
    """
    new = _parameters(coordinates, window)
    old = new if before is None else _parameters(coordinates, before)
    for name in coordinates:
        end, start = new[name], old[name]
        # a bias that comes or goes does so where it is, by its stiffness
        end = (*(start or (0.0, 0.0))[:2], 0.0) if end is None else end
        start = (*end[:2], 0.0) if start is None else start
        values = (1.0 - share) * np.array(start) + share * np.array(end)
        for what, value in zip(("center", "reach", "stiffness"), values, strict=True):
            context.setParameter(f"umbrella_{what}_{name}", float(value))
