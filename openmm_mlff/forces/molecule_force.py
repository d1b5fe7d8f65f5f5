"""The PythonForce of many different molecules: one batched evaluation, and a guard that holds those that break.

What breaks in one molecule must not end or change the runs of the others. With a `MoleculeGuard`, a molecule whose
positions or forces are no longer numbers, whose forces exceed the limit or whose bonds are broken is *held*: it stays
in the batch at its last good positions and its forces on OpenMM's particles are zero, until somebody releases it. As
molecules do not share a sum anywhere, the others' energies and forces are the same bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm

from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.forces import checks
from openmm_mlff.forces.copies import CopiesEvaluator
from openmm_mlff.forces.force_spec import DEFAULT_MAX_FORCE, ForceSpec, refuse_fall_back
from openmm_mlff.forces.python_force import ForceComputation, _threads, _when
from openmm_mlff.forces.uncertainty import Uncertainty, UncertaintyError
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

#: of the stored options of forces on many molecules, beside `force_spec.SPEC_VERSION`
MOLECULES_VERSION = 1
#: of a `ForceSpec`: what may differ between the molecules of one force
_OWN = ("numbers", "atoms", "charge", "multiplicity")


@dataclass(frozen=True)
class MoleculesSpec:
    """All that a pickled computation of many molecules carries.

    Attributes:
        common: what holds for all molecules; its `numbers` and `atoms` are those of all of them, one after the other.
        sizes: atoms per molecule. charges, multiplicities: of each molecule.
    """

    common: ForceSpec
    sizes: tuple[int, ...]
    charges: tuple[int, ...]
    multiplicities: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("sizes", "charges", "multiplicities"):
            object.__setattr__(self, name, tuple(int(x) for x in getattr(self, name)))
        n = len(self.sizes)
        if not n or min(self.sizes) < 1 or sum(self.sizes) != len(self.common.numbers):
            raise ValueError(f"sizes: expected sizes of molecules of {len(self.common.numbers)} atoms in all")
        if (len(self.charges), len(self.multiplicities)) != (n, n):
            raise ValueError(f"charges, multiplicities: expected one for each of {n} molecules")
        refuse_fall_back(self.common, "molecules")
        if self.common.replicas != 1 or self.common.region != "open":
            raise ValueError("common: expected open molecules, each of them once")

    @classmethod
    def joined(cls, specs: Sequence[ForceSpec], batch: int | None = None) -> MoleculesSpec:
        """One specification of what single molecules have, with `atoms` as they are in the combined system.

        Raises `ValueError` naming the first option in which they differ.
        """
        first = specs[0]
        for k, spec in enumerate(specs):
            for field in dataclasses.fields(ForceSpec):
                mine, other = getattr(first, field.name), getattr(spec, field.name)
                if field.name not in (*_OWN, "path") and mine != other:
                    raise ValueError(
                        f"{field.name}: expected {mine!r} as for molecule 0, got {other!r} for molecule {k}"
                    )
        atoms = None if any(s.atoms is None for s in specs) else tuple(i for s in specs for i in s.atoms or ())
        numbers = tuple(z for s in specs for z in s.numbers)
        common = dataclasses.replace(first, numbers=numbers, atoms=atoms, charge=0, multiplicity=1, batch=batch)
        own = zip(*((len(s.numbers), s.charge, s.multiplicity) for s in specs), strict=True)
        return cls(common, *own)

    def to_json(self) -> str:
        # the common part has one molecule as far as it knows, and so no batch of its own
        common = json.loads(dataclasses.replace(self.common, batch=None).to_json())
        fields = {name: getattr(self, name) for name in ("sizes", "charges", "multiplicities")}
        stored = {"version": MOLECULES_VERSION, "common": common, "batch": self.common.batch, **fields}
        return json.dumps(stored, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> MoleculesSpec:
        """Raises `ValueError` for a text that is not a specification of this version or an older one."""
        try:
            fields = dict(json.loads(text))
            version = fields["version"]
            if version > MOLECULES_VERSION:
                raise ValueError(f"version {version} is newer than {MOLECULES_VERSION}, which this package reads")
            common = dataclasses.replace(ForceSpec.from_json(json.dumps(fields["common"])), batch=fields["batch"])
            return cls(common, fields["sizes"], fields["charges"], fields["multiplicities"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"PythonForce: the stored options of many molecules cannot be read ({error})") from error


@dataclass(frozen=True)
class Failure:
    """What went wrong with one molecule of many.

    Attributes:
        molecule: which. step: OpenMM's step at which it was noticed. reason: in words, with the atoms' indices within
            the molecule. positions: its last good positions, ``(n_atoms, 3)`` angstrom.
    """

    molecule: int
    step: int
    reason: str
    positions: np.ndarray


@dataclass
class MoleculeGuard:
    """What holds broken molecules, and what it has seen.

    Attributes:
        start: positions of all molecules at which they are sound, ``(n_atoms, 3)`` angstrom.
        bonds: pairs among all atoms, ``(n_bonds, 2)``. longest: length at which each counts as broken, angstrom.
        max_force: kJ/mol/nm. held: which molecules are held, ``(n,)`` bool; whoever puts one back makes it False.
        failures: one for every time that a molecule was held.
    """

    start: np.ndarray
    bonds: np.ndarray
    longest: np.ndarray
    max_force: float = DEFAULT_MAX_FORCE
    held: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=bool))
    failures: list[Failure] = dataclasses.field(default_factory=list)


class MoleculesComputation(ForceComputation):
    """The callable behind the PythonForce of many molecules; import path and argument are stored in System XML files.

    A stored one comes back without a guard, and raises for a broken molecule as `ForceComputation` does.

    Attributes:
        molecules: everything that was stored. spec: its common part.
        guard: what holds broken molecules; None raises for them.
        positions: where the last call evaluated, ``(n_atoms, 3)`` angstrom, as OpenMM gave them.
    """

    def __init__(self, spec: str | MoleculesSpec, potential: Potential | None = None) -> None:
        self.molecules = MoleculesSpec.from_json(spec) if isinstance(spec, str) else spec
        super().__init__(self.molecules.common)
        self.offsets = np.cumsum([0, *self.molecules.sizes])
        self._segment = np.repeat(np.arange(len(self.molecules.sizes)), self.molecules.sizes)
        self._potential = potential
        self._guard: MoleculeGuard | None = None
        self.positions: np.ndarray | None = None
        self._good = np.empty((0, 3))

    def _stored(self) -> str:
        return self.molecules.to_json()

    @classmethod
    def normalized(cls, options: str) -> str:
        return MoleculesSpec.from_json(options).to_json()

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        if self._potential is not None:
            raise TypeError(
                "system: its potential is in memory only, so that it cannot be stored; save_potential and "
                "MLPotential(..., modelPath=...) make one that can"
            )
        return super().__reduce__()

    @property
    def model(self) -> Potential:
        """The potential in memory, or the one that the specification names."""
        return super().model if self._potential is None else self._potential

    def use(self, potential: Potential) -> None:
        """Evaluate another potential in memory from now on, for the same molecules."""
        with self._lock:
            self._potential, self._evaluator = potential, None

    @property
    def guard(self) -> MoleculeGuard | None:
        return self._guard

    @guard.setter
    def guard(self, guard: MoleculeGuard | None) -> None:
        if guard is not None:
            guard.held = np.zeros(len(self.molecules.sizes), dtype=bool)
            self._good = np.array(guard.start)
            self._bond_molecule = self._segment[guard.bonds[:, 0]]
        self._guard = guard

    def describe(self, i: int) -> str:
        """An atom as the user knows it.

        For example ``'atom 17 (C) of molecule 3'`` with the index within the molecule or, of a force on some atoms
        only, ``'particle 170 (C) of molecule 3'`` with the index in the system.
        """
        return f"{self._within(i)} of molecule {self._segment[i]}"

    def _within(self, i: int) -> str:
        own = (
            f"atom {i - self.offsets[self._segment[i]]}" if self.spec.atoms is None else f"particle {self.particle(i)}"
        )
        return f"{own} ({SYMBOLS[self.spec.numbers[i]]})"

    def _within_from(self, first: int, i: int) -> str:
        return self._within(first + i)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, state: openmm.State) -> tuple[float, np.ndarray]:
        guard = self._guard
        if guard is None:
            return super()._evaluate(state)
        positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        self.positions = positions
        for molecule, reason in self._broken(positions, guard).items():
            self._hold(molecule, reason, guard, state)
        # the batch keeps its shape: what is held is evaluated where it was good
        positions = self._sound(positions, guard)
        with _threads(self._n_threads()):
            try:
                energies, forces = self._get_evaluator(positions, None).arrays(positions, None)
            except ValueError as error:
                # a model may refuse atoms at one place; the others go on without that molecule
                if not self._hold_coincident(positions, guard, state):
                    raise error
                positions = self._sound(positions, guard)
                energies, forces = self._get_evaluator(positions, None).arrays(positions, None)
        energies, forces = energies * KJ_PER_MOL_PER_EV, forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM
        if not (np.abs(forces).max() <= guard.max_force and np.isfinite(energies).all()):
            self._hold_unstable(energies, forces, positions, guard, state)
        self._note(self._get_evaluator(positions, None).spreads, positions)
        self._hold_uncertain(guard, state)
        if guard.held.any():
            forces[guard.held[self._segment]] = 0.0
            before = np.zeros_like(energies) if self.energies is None else self.energies
            energies = np.where(guard.held, before, energies)
        self._good, self.energies = self._sound(positions, guard), energies
        return float(energies.sum()), np.ascontiguousarray(forces)

    def _sound(self, positions: np.ndarray, guard: MoleculeGuard) -> np.ndarray:
        """Positions with those of held molecules replaced by their last good ones."""
        return np.where(guard.held[self._segment, None], self._good, positions) if guard.held.any() else positions

    def _broken(self, positions: np.ndarray, guard: MoleculeGuard) -> dict[int, str]:
        """Molecules, not held yet, whose positions are not numbers or whose bonds are broken, with the reason."""
        d = positions[guard.bonds[:, 0]] - positions[guard.bonds[:, 1]]
        square = np.einsum("ij,ij->i", d, d)
        # comparisons with NaN are false, so that NaN counts as wrong
        torn = ~(square <= guard.longest**2)
        lost = ~np.isfinite(positions).all(axis=1)
        if not (torn.any() or lost.any()):
            return {}
        torn &= ~guard.held[self._bond_molecule]
        lost &= ~guard.held[self._segment]
        found: dict[int, str] = {}
        for i in np.flatnonzero(lost).tolist():
            found.setdefault(int(self._segment[i]), f"{self._within(i)} is at {positions[i] / ANGSTROM_PER_NM} nm")
        for b in np.flatnonzero(torn).tolist():
            i, j = guard.bonds[b].tolist()
            text = f"the bond between {self._within(i)} and {self._within(j)} is broken: "
            text += f"{np.sqrt(square[b]):.2f} angstrom, at most {guard.longest[b]:.2f} expected"
            found.setdefault(int(self._bond_molecule[b]), text)
        return found

    def _hold_coincident(self, positions: np.ndarray, guard: MoleculeGuard, state: openmm.State) -> bool:
        """Hold molecules with two atoms at the same place; whether there were any."""
        before = guard.held.sum()
        for k in np.flatnonzero(~guard.held).tolist():
            describe = functools.partial(self._within_from, int(self.offsets[k]))
            error = checks.coincident(positions[self._each()[k]], None, describe, _when(state))
            if error is not None:
                self._hold(k, str(error), guard, state)
        return bool(guard.held.sum() > before)

    def _hold_unstable(
        self,
        energies: np.ndarray,
        forces: np.ndarray,
        positions: np.ndarray,
        guard: MoleculeGuard,
        state: openmm.State,
    ) -> None:
        when, limit = _when(state), guard.max_force
        for k in np.flatnonzero(~self._calm(energies, forces, limit) & ~guard.held).tolist():
            atoms = self._each()[k]
            describe = functools.partial(self._within_from, int(self.offsets[k]))
            own = (float(energies[k]), forces[atoms], positions[atoms])
            error = checks.unstable(*own, None, limit, describe, when)
            self._hold(k, str(error), guard, state)

    def _hold_uncertain(self, guard: MoleculeGuard, state: openmm.State) -> None:
        """Hold molecules that the model is too unsure of, where that is to stop them."""
        found, watch = self.uncertainty, self.watch
        if found is None or watch is None or watch.spec.action != "stop" or not self.limited:
            return
        largest = np.maximum.reduceat(found.forces, self.offsets[:-1])
        for k in np.flatnonzero(~(largest <= watch.spec.limit) & ~guard.held).tolist():
            own = Uncertainty(found.energies[k : k + 1], found.forces[self._each()[k]])
            try:
                watch.exceeded(own, state.getStepCount(), functools.partial(self._within_from, int(self.offsets[k])))
            except UncertaintyError as error:
                self._hold(k, str(error), guard, state)

    def _beyond(self, state: openmm.State) -> bool:
        held = self._guard is not None and self.watch is not None and self.watch.spec.action == "stop"
        return False if held else super()._beyond(state)

    def _hold(self, molecule: int, reason: str, guard: MoleculeGuard, state: openmm.State) -> None:
        last = self._good[self.offsets[molecule] : self.offsets[molecule + 1]].copy()
        guard.failures.append(Failure(molecule, state.getStepCount(), reason, last))
        guard.held[molecule] = True

    def _structures(self, positions: np.ndarray, cell: np.ndarray | None) -> list[Structure]:
        own = zip(self._each(), self.molecules.charges, self.molecules.multiplicities, strict=True)
        return [Structure(self._numbers[a], positions[a], charge, multiplicity) for a, charge, multiplicity in own]

    def _get_evaluator(self, positions: np.ndarray, cell: np.ndarray | None) -> CopiesEvaluator:
        if self._evaluator is None:
            common, structures = self.spec, self._structures(positions, cell)
            # a potential in memory may be exchanged in the middle of a run, whose start was checked
            for structure in structures if self._potential is None else []:
                self.model.check_geometry(structure)
            self._evaluator = CopiesEvaluator(self.model, structures, common.compile, common.batch, isolated=True)
        assert isinstance(self._evaluator, CopiesEvaluator)
        return self._evaluator
