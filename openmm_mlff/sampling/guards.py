"""What ends a run: numbers that are no longer numbers, forces out of bounds, broken bonds, and the user."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.structures import SYMBOLS
from openmm_mlff.sampling.starts import bond_graph

#: a bond counts as broken when it is longer than this many times the sum of the covalent radii ...
BROKEN = 1.6
#: ... and than this many times its length at the start.
STRETCHED = 1.4


class RunFailed(RuntimeError):
    """A run that was stopped because its state is no longer physical.

    Attributes:
        folder: where System, State and integrator were saved; None if nothing could be.
        replicas: which copies it was, in a run of many.
    """

    def __init__(self, message: str, folder: Path | None = None, replicas: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.folder = folder
        self.replicas = tuple(replicas)


class Guard:
    """Checks one frame after the other.

    Args:
        topology: names the atoms in messages.
        bonds: ``(n, 2)`` pairs that must stay. start: positions ``(n_atoms, 3)`` nm at which they are bonds.
        max_force: kJ/mol/nm on any atom.
    """

    def __init__(
        self,
        topology: app.Topology,
        bonds: Sequence[Sequence[int]],
        start: np.ndarray,
        box: np.ndarray | None,
        max_force: float,
    ) -> None:
        from ase.data import covalent_radii

        self._atoms = list(topology.atoms())
        self._max_force = max_force
        self._bonds = np.array(bonds, dtype=np.int64).reshape(-1, 2)
        numbers = np.array([0 if a.element is None else a.element.atomic_number for a in self._atoms])
        radii = covalent_radii[numbers] * 0.1
        natural = radii[self._bonds].sum(axis=1)
        self._longest = np.maximum(BROKEN * natural, STRETCHED * self._lengths(start, box))

    def describe(self, i: int) -> str:
        """An atom as the user knows it, e.g. ``atom 8 (CA of ALA 2, C)``."""
        if i >= len(self._atoms):
            return f"particle {i}"
        atom = self._atoms[i]
        symbol = SYMBOLS[0] if atom.element is None else atom.element.symbol
        return f"atom {i} ({atom.name} of {atom.residue.name} {atom.residue.id}, {symbol})"

    def check(self, positions: np.ndarray, forces: np.ndarray, energy: float, box: np.ndarray | None) -> str | None:
        """What is wrong with a frame, or None; positions and box in nm, energy in kJ/mol, forces in kJ/mol/nm."""
        for name, values in (("position", positions), ("force", forces)):
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(bad):
                return f"the {name} of {self.describe(int(bad[0]))} is not a number ({len(bad)} atoms in all)"
        if not np.isfinite(energy):
            worst = int(np.argmax(np.abs(forces).max(axis=1)))
            return f"the potential energy is {energy}; the largest force is on {self.describe(worst)}"
        size = np.linalg.norm(forces, axis=1)
        worst = int(size.argmax())
        if size[worst] > self._max_force:
            return (
                f"the force on {self.describe(worst)} is {size[worst]:.3g} kJ/mol/nm, more than max_force = "
                f"{self._max_force:.3g}"
            )
        return self.broken_bond(positions, box)

    def check_copies(
        self, positions: np.ndarray, forces: np.ndarray, energies: np.ndarray, box: np.ndarray | None
    ) -> dict[int, str]:
        """What is wrong with which of many copies of the molecule; empty if nothing is.

        Args:
            positions: ``(n, n_atoms, 3)`` nm. forces: the same, kJ/mol/nm. energies: ``(n,)`` kJ/mol.
        """
        # comparisons with NaN are false, so NaN counts as wrong
        fine = np.isfinite(energies) & np.isfinite(positions).all(axis=(1, 2))
        fine &= (np.square(forces).sum(axis=-1) <= self._max_force**2).all(axis=-1)
        if len(self._bonds):
            fine &= (self._lengths(positions, box) <= self._longest).all(axis=-1)
        wrong = {int(k): self.check(positions[k], forces[k], float(energies[k]), box) for k in np.flatnonzero(~fine)}
        return {k: message for k, message in wrong.items() if message is not None}

    def broken_bond(self, positions: np.ndarray, box: np.ndarray | None) -> str | None:
        """The most overstretched bond, or None if all are whole."""
        if len(self._bonds) == 0:
            return None
        lengths = self._lengths(positions, box)
        k = int(np.argmax(lengths / self._longest))
        if lengths[k] <= self._longest[k]:
            return None
        i, j = (int(x) for x in self._bonds[k])
        return (
            f"the bond between {self.describe(i)} and {self.describe(j)} is broken: {10 * lengths[k]:.2f} angstrom, "
            f"at most {10 * self._longest[k]:.2f} expected"
        )

    def _lengths(self, positions: np.ndarray, box: np.ndarray | None) -> np.ndarray:
        """Of all bonds, ``(..., n_bonds)``, at positions ``(..., n_atoms, 3)``."""
        d = positions[..., self._bonds[:, 1], :] - positions[..., self._bonds[:, 0], :]
        if box is not None:
            for k in (2, 1, 0):
                d = d - np.rint(d[..., k : k + 1] / box[k, k]) * box[k]
        return np.linalg.norm(d, axis=-1)


def watched_bonds(
    numbers: np.ndarray, molecules: Sequence[np.ndarray], bonds: Sequence[Sequence[tuple[int, int]] | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Bonds of many molecules laid end to end, and the lengths beyond which they are broken.

    Args:
        numbers: atomic numbers of all atoms, 0 for beads. molecules: positions at which they are sound, angstrom.
        bonds: of each molecule, by indices within it; None: atoms are bonded that are close enough.

    Returns: pairs ``(n_bonds, 2)`` among all atoms and their longest lengths ``(n_bonds,)`` angstrom.
    """
    from ase.data import covalent_radii

    first, found = 0, [np.empty((0, 2), dtype=np.int64)]
    for positions, given in zip(molecules, bonds, strict=True):
        own = numbers[first : first + len(positions)]
        if given is not None:
            found.append(np.array(given, dtype=np.int64).reshape(-1, 2) + first)
        elif (own > 0).all():
            found.append(np.argwhere(np.triu(bond_graph(own, positions))) + first)
        first += len(positions)
    every, where = np.concatenate(found), np.concatenate(molecules)
    # a bead has no radius: its bonds are known by their lengths alone
    natural = covalent_radii[numbers[every]].sum(axis=1) * (numbers[every] > 0).all(axis=1)
    apart = np.linalg.norm(where[every[:, 0]] - where[every[:, 1]], axis=1)
    return every, np.maximum(BROKEN * natural, STRETCHED * apart)


def save_failure(folder: str | Path, context: openmm.Context, topology: app.Topology, message: str) -> Path:
    """Write ``system.xml``, ``state.xml``, ``integrator.xml``, ``message.txt`` and, if finite, ``positions.pdb``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "message.txt", (message + "\n").encode())
    write_atomically(folder / "integrator.xml", openmm.XmlSerializer.serialize(context.getIntegrator()).encode())
    write_atomically(folder / "system.xml", openmm.XmlSerializer.serialize(context.getSystem()).encode())
    # no energy or forces: they would call the potential that has just failed
    state = context.getState(positions=True, velocities=True, parameters=True, integratorParameters=True)
    write_atomically(folder / "state.xml", openmm.XmlSerializer.serialize(state).encode())
    positions = state.getPositions(asNumpy=True)._value
    if np.isfinite(positions).all() and np.abs(positions).max() < 900:
        with open(folder / "positions.pdb", "w", encoding="utf-8") as file:
            app.PDBFile.writeFile(topology, positions * unit.nanometer, file, keepIds=True)
    return folder


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A block that Ctrl-C does not cut in two: it takes effect when the block is over, a second one at once."""
    stop = StopRequest()
    try:
        with stop:
            yield
    finally:
        if stop.signal is not None:
            signal.raise_signal(stop.signal)


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request that a loop asks about; a second Ctrl-C interrupts at once.

    A context manager; outside the main thread it does nothing, because signals do not arrive there.

    Attributes:
        signal: number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """For example ``SIGINT``."""
        return "" if self.signal is None else signal.Signals(self.signal).name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
