"""Potentials made of other potentials: their members, evaluated by the members' own code and kept in one model file.

A composite is a `Potential` like any other. Its members stay what they are: each runs by its own evaluator (native code
included), has its own hyperparameters and, in the model file (kind 'composite'), a card of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.neighbors import VerletPairs
from openmm_mlff.potentials.potential import Evaluation, Potential, Prediction


class Composite(Potential):
    """E = sum_k w_k E_k over named members; a subclass says which members there are and what they weigh.

    What all members can describe, the composite can. It predicts no charges: those of the members need not be those of
    the sum. Members with a lattice of their own are used in open systems only.

    Attributes:
        long_range_cutoff, long_range_method: of all members that have long-range terms; the longest cutoff when read.
    """

    def __init__(self, members: Mapping[str, Potential]) -> None:
        super().__init__()
        for name, member in members.items():
            if not isinstance(member, Potential):
                raise TypeError(f"{name}: expected a Potential, got {type(member).__name__}")
            self.add_module(name, member)
        self._names = tuple(members)
        every = list(members.values())
        self.elements = tuple(z for z in every[0].elements if all(z in m.elements for m in every))
        if not self.elements:
            raise ValueError(f"{', '.join(members)}: expected potentials that share elements, got none in common")
        if len({(m.beads, tuple(m.bead_numbers)) for m in every}) > 1:
            raise ValueError(f"{', '.join(members)}: expected potentials of the same particles, got different beads")
        self.beads, self.bead_numbers = every[0].beads, every[0].bead_numbers
        self.cutoff = max(m.cutoff for m in every)
        self.long_range = any(m.long_range for m in every)
        self.charges = _common([m.charges for m in every])
        self.multiplicities = _common([m.multiplicities for m in every])
        self.supports_charge = all(m.supports_charge for m in every)
        self.supports_multiplicity = all(m.supports_multiplicity for m in every)
        self.supports_periodic = all(m.supports_periodic and not m.fixed_lattice for m in every)
        ranged = [m.long_range_methods for m in every if m.long_range]
        methods = [name for name in ranged[0] if all(name in offered for offered in ranged)] if ranged else []
        self.long_range_methods = tuple(methods) or ("shifted",)

    # -- what a subclass says ------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        """w_k by member."""
        raise TypeError(f"{type(self).__name__} does not define weights")

    @classmethod
    def compose(cls, config: Any, members: Mapping[str, Potential]) -> Self:
        """The composite that a model file describes; `ValueError` or `TypeError` if it holds other members."""
        raise TypeError(f"{cls.__name__} does not define compose(config, members)")

    # -- members ---------------------------------------------------------------------------------------------------

    @property
    def members(self) -> dict[str, Potential]:
        """The members by name; their names are the prefixes of their tensors in the model file."""
        return {name: getattr(self, name) for name in self._names}

    def active(self) -> dict[str, float]:
        """The weights that are not zero: only these members are evaluated."""
        return {name: w for name, w in self.weights.items() if w != 0.0}

    @property
    def dtype(self) -> torch.dtype:
        """The highest precision of the members, each of which keeps its own."""
        return reduce(torch.promote_types, (m.dtype for m in self.members.values()))

    @property
    def long_range_cutoff(self) -> float | None:
        cutoffs = [m.long_range_cutoff for m in self.members.values() if m.long_range]
        known = [c for c in cutoffs if c is not None]
        return max(known) if known and len(known) == len(cutoffs) else None

    @long_range_cutoff.setter
    def long_range_cutoff(self, value: float | None) -> None:
        for member in self.members.values():
            if member.long_range:
                member.long_range_cutoff = value

    @property
    def long_range_method(self) -> str:
        ranged = [m.long_range_method for m in self.members.values() if m.long_range]
        return ranged[0] if ranged else "shifted"

    @long_range_method.setter
    def long_range_method(self, value: str) -> None:
        for member in self.members.values():
            if member.long_range:
                member.long_range_method = value

    # -- evaluation ------------------------------------------------------------------------------------------------

    def check(self, structure: Structure) -> None:
        """Refuse a structure that the composite or one of its members cannot describe."""
        super().check(structure)
        for member in self.members.values():
            member.check(structure)

    def check_electrons(self, numbers: Sequence[int] | np.ndarray, charge: int, multiplicity: int) -> None:
        """Refuse what one of the members refuses."""
        for member in self.members.values():
            member.check_electrons(numbers, charge, multiplicity)

    def examples(self) -> list[Structure]:
        return [s for member in self.members.values() for s in member.examples()]

    def shift_atomic_energies(self, shifts: Mapping[int, float]) -> None:
        """Add a constant (eV) to the energy of every atom of an element, in every member."""
        for member in self.members.values():
            member.shift_atomic_energies(shifts)

    def fixed(self, batch: Batch) -> dict[str, Any]:
        return {name: m.fixed(member_batch(m, batch)) for name, m in self.members.items()}

    def predict(self, batch: Batch, fixed: dict[str, Any]) -> Prediction:
        energy: Tensor | None = None
        for name, w in self.active().items():
            member = self.members[name]
            term = w * member.predict(member_batch(member, batch), fixed[name]).energy
            energy = term if energy is None else energy + term
        return Prediction(batch.positions.new_zeros(batch.n_structures) if energy is None else energy)

    def evaluate(self, batch: Batch, forces: bool = True, create_graph: bool = False) -> Evaluation:
        """As in the base class, with every member's own forces (some have closed forms)."""
        self._refuse_field(batch.external_potential)
        energy, force = batch.positions.new_zeros(batch.n_structures), None
        for name, w in self.active().items():
            member = self.members[name]
            result = member.evaluate(member_batch(member, batch), forces, create_graph)
            energy = energy + w * result.energy
            if result.forces is not None:
                force = w * result.forces if force is None else force + w * result.forces
        if forces and force is None:
            force = torch.zeros_like(batch.positions)
        return Evaluation(energy, forces=force)

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> Evaluator:
        """The members' own evaluators, whose weights may change between calls."""
        return CompositeEvaluator(self, batch, outputs, compile)

    def hessian_products(self, structure: Structure, directions: np.ndarray) -> np.ndarray:
        """As in the base class, by every member's own way."""
        total = np.zeros(np.shape(directions))
        for name, w in self.active().items():
            total += w * self.members[name].hessian_products(structure, directions)
        return total

    def _refuse_field(self, potential: Any) -> None:
        if potential is not None:
            name = self.family or type(self).__name__
            raise ValueError(f"external_potential: {name} predicts no charges, so no potential can act on them")


class Interpolated(Composite):
    """U = (1 - c) U_vacuum + c U_water; at c = 0 and c = 1 only one of the two is evaluated.

    Any two potentials of the same particles will do, of one family or two; dU/dc = U_water - U_vacuum. It lives in
    memory only; a family that keeps such a pair in model files derives from it.

    Attributes:
        vacuum, water: the potentials at c = 0 and c = 1.
        coupling: c; may be set between calls, of evaluators too (`ValueError` unless from 0 to 1).
    """

    family = "interpolated"
    vacuum: Potential
    water: Potential

    def __init__(self, vacuum: Potential, water: Potential, coupling: float = 1.0) -> None:
        for name, member in (("vacuum", vacuum), ("water", water)):
            if isinstance(member, Interpolated):
                raise ValueError(f"{name}: expected one potential, got a pair of family {member.family!r}")
        super().__init__({"vacuum": vacuum, "water": water})
        self.coupling = coupling

    @property
    def coupling(self) -> float:
        return self._coupling

    @coupling.setter
    def coupling(self, value: float) -> None:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
        # written so that NaN fails too
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"coupling: expected a number from 0 (vacuum) to 1 (water), got {value!r}")
        self._coupling = number

    @property
    def weights(self) -> dict[str, float]:
        return {"vacuum": 1.0 - self.coupling, "water": self.coupling}


class CompositeEvaluator(Evaluator):
    """``f(positions, cell=None) -> Evaluation`` by the evaluators of the members, weighted as the model says then.

    Args of the constructor: see `Potential.evaluator`.

    Attributes:
        model: the composite; its weights are read at every call.
        evaluators: those of the members, by name.
        pairs: see `CompositePairs`.
    """

    def __init__(
        self, model: Composite, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str = False
    ) -> None:
        model.eval()
        self.model: Composite = model
        self.outputs = outputs
        self.compile = compile
        wanted = tuple(name for name in ("energy", "forces") if name in outputs) or ("energy",)
        self.evaluators = {name: m.evaluator(batch, wanted, compile) for name, m in model.members.items()}
        self.pairs: CompositePairs = CompositePairs(self.evaluators, model.device)

    @property
    def compiled(self) -> bool | None:
        """Whether compiled code runs for all members that have been called; None before the first call."""
        known = [c for e in self.evaluators.values() if (c := e.compiled) is not None]
        return all(known) if known else None

    def __call__(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None = None,
        potential: Tensor | np.ndarray | None = None,
    ) -> Evaluation:
        """Evaluate at new positions; arguments as in the base class, without external potentials (`ValueError`)."""
        self.model._refuse_field(potential)
        active = self.model.active()
        self.pairs.before(active)
        energy, forces = None, None
        for name, w in active.items():
            result = self.evaluators[name](positions, cell)
            energy = w * result.energy if energy is None else energy + w * result.energy
            if result.forces is not None:
                forces = w * result.forces if forces is None else forces + w * result.forces
        self.pairs.after(active, positions, cell)
        assert energy is not None
        return Evaluation(energy, forces=forces)

    def arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n_structures,)`` eV and forces ``(n_atoms, 3)`` eV/angstrom, float64."""
        active = self.model.active()
        self.pairs.before(active)
        total: tuple[np.ndarray, np.ndarray] | None = None
        for name, w in active.items():
            energies, forces = self.evaluators[name].arrays(positions, cell)
            # new arrays: a member may write its next result where this one is
            total = (w * energies, w * forces) if total is None else (total[0] + w * energies, total[1] + w * forces)
        self.pairs.after(active, positions, cell)
        assert total is not None
        return total


class CompositePairs(VerletPairs):
    """The pair lists of the members seen as one: all that are in use are built at the same positions.

    So one set of reference positions restores them all. Members that need no lists are left alone.

    Attributes:
        rebuilds: the largest number of the members'. reference, reference_cell: of the members in use. fixed: whether
            no member ever rebuilds.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator], device: torch.device) -> None:
        self._evaluators, self._device = evaluators, device
        self._used: tuple[str, ...] = ()

    def _lists(self, names: Sequence[str] | None = None) -> list[VerletPairs]:
        chosen = self._evaluators if names is None else names
        return [self._evaluators[name].pairs for name in chosen if not self._evaluators[name].pairs.fixed]

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        return not self._lists()

    @property
    def rebuilds(self) -> int:  # type: ignore[override]
        return max((e.pairs.rebuilds for e in self._evaluators.values()), default=0)

    @property
    def _first(self) -> VerletPairs | None:
        found = [p for p in self._lists(self._used or None) if p.reference is not None]
        return found[0] if found else None

    @property
    def reference(self) -> Tensor | None:  # type: ignore[override]
        return None if self._first is None else self._first.reference

    @property
    def reference_cell(self) -> Tensor | None:  # type: ignore[override]
        return None if self._first is None else self._first.reference_cell

    def restore(self, reference: Tensor | None, cell: Tensor | None = None) -> None:
        """Build the lists of all members as at the `reference` and `reference_cell` of an earlier run."""
        for pairs in self._lists():
            pairs.restore(reference, cell)

    def before(self, active: Mapping[str, float]) -> None:
        """Give members that come into use the reference of those that were in use before."""
        names = tuple(active)
        if names != self._used:
            reference, cell = self.reference, self.reference_cell
            self._used = names
            if reference is not None:
                self._align(reference, cell)

    def after(self, active: Mapping[str, float], positions: Tensor | np.ndarray, cell: Any) -> None:
        """If some members have rebuilt their lists at these positions, so do the others."""
        lists = self._lists(self._used)
        if len(active) > 1 and any(not _same(lists[0].reference, p.reference) for p in lists[1:]):
            exact = torch.as_tensor(positions, dtype=torch.float64, device=self._device)
            box = None if cell is None else torch.as_tensor(cell, dtype=torch.float64, device=self._device)
            self._align(exact, box[None] if box is not None and box.dim() == 2 else box)

    def _align(self, reference: Tensor, cell: Tensor | None) -> None:
        for pairs in self._lists(self._used):
            if not _same(pairs.reference, reference):
                pairs.restore(reference, cell)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def member_batch(member: Potential, batch: Batch) -> Batch:
    """The batch in the precision of a member."""
    return batch if batch.positions.dtype == member.dtype else batch.to(dtype=member.dtype)


def _common(trained: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """What all have seen; None stands for anything."""
    known = [set(values) for values in trained if values is not None]
    return tuple(sorted(set.intersection(*known))) if known else None
