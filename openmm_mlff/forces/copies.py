"""One call of a model for many copies of a molecule, or many molecules, in batches that suit the model and machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.neighbors import FIXED_PAIRS_MAX_ATOMS
from openmm_mlff.potentials.potential import Evaluation

if TYPE_CHECKING:
    from openmm_mlff.potentials.evaluator import Evaluator
    from openmm_mlff.potentials.potential import Potential

#: atoms in one evaluation of a model with pair lists on the CPU; more of them leave its caches and gain nothing.
ATOMS_PER_BATCH = 200


@dataclass(frozen=True)
class _Part:
    """Structures that are evaluated together: which of all, and which of all atoms."""

    members: slice | np.ndarray
    atoms: slice | np.ndarray
    n: int
    evaluator: Evaluator


class CopiesEvaluator:
    """``f(positions, cell) -> Evaluation`` for structures laid end to end, which do not interact.

    Equal batches whose pair lists never change share one evaluator, and with it one compiled graph.

    Args:
        structures: copies of a molecule, or different molecules; all open, or all periodic in the same box.
        compile: as for `Potential.evaluator`.
        batch: structures in one evaluation; None takes as many as make `ATOMS_PER_BATCH` atoms, or all where batches
            gain nothing (on a GPU, for a model without pair lists), or where they would need a graph each (different
            molecules).
        isolated: evaluate structures whose pair lists change one by one, so that no list, and with it no order of a
            sum, depends on where the atoms of another structure are. Different molecules always are.

    Attributes:
        pairs: where the pair lists of all structures were built (`CopiesPairs`).
        spreads: as `Evaluator.spreads`, of all structures.
    """

    def __init__(
        self,
        model: Potential,
        structures: Sequence[Structure],
        compile: bool | str = False,
        batch: int | None = None,
        isolated: bool = False,
    ) -> None:
        offsets = np.cumsum([0, *(len(s) for s in structures)])
        self._shape = (int(offsets[-1]), 3)
        self._n = len(structures)
        self._parts: list[_Part] = []
        shared: dict[tuple[bytes, ...], Evaluator] = {}
        for members in _groups(model, structures, batch, isolated):
            part = [structures[k] for k in members]
            key = tuple(s.numbers.tobytes() + bytes(f"{s.charge}/{s.multiplicity}", "ascii") for s in part)
            evaluator = shared.get(key)
            if evaluator is None:
                evaluator = model.evaluator(part, outputs=("energy", "forces"), compile=compile)
                if getattr(evaluator.pairs, "fixed", False):
                    shared[key] = evaluator
            atoms = np.concatenate([np.arange(offsets[k], offsets[k + 1]) for k in members])
            self._parts.append(_Part(_as_slice(np.array(members)), _as_slice(atoms), len(members), evaluator))
        self.pairs = CopiesPairs(self._parts, self._shape[0])
        self.spreads: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def compiled(self) -> bool | None:
        """Whether a compiled graph runs; None before the first call."""
        return self._parts[0].evaluator.compiled

    def __call__(self, positions: np.ndarray, cell: np.ndarray | None = None) -> Evaluation:
        """Evaluate at positions ``(n_atoms of all structures, 3)`` angstrom, in one box ``(3, 3)`` angstrom or none."""
        if len(self._parts) == 1 and positions.shape == self._shape:
            evaluator = self._parts[0].evaluator
            result = evaluator(positions, _boxes(cell, self._n))
            self.spreads = evaluator.spreads
            return result
        energies, forces = self.arrays(positions, cell)
        return Evaluation(torch.from_numpy(energies), forces=torch.from_numpy(forces))

    def arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n,)`` eV and forces ``(n_atoms of all structures, 3)`` eV/angstrom, float64."""
        if positions.shape != self._shape:
            raise ValueError(f"positions: expected shape {self._shape}, got {positions.shape}")
        if len(self._parts) == 1:
            evaluator = self._parts[0].evaluator
            result = evaluator.arrays(positions, _boxes(cell, self._n))
            self.spreads = evaluator.spreads
            return result
        energies, forces = np.empty(self._n), np.empty(self._shape)
        spreads = np.empty(self._n), np.empty(self._shape[0])
        for part in self._parts:
            # copied at once: a shared evaluator may write its next result to the same place
            found = part.evaluator.arrays(positions[part.atoms], _boxes(cell, part.n))
            energies[part.members], forces[part.atoms] = found
            if part.evaluator.spreads is not None:
                spreads[0][part.members], spreads[1][part.atoms] = part.evaluator.spreads
        self.spreads = None if self._parts[0].evaluator.spreads is None else spreads
        return energies, forces


class CopiesPairs:
    """The pair lists of all batches seen as one, as a checkpoint wants them."""

    def __init__(self, parts: Sequence[_Part], n_atoms: int) -> None:
        self._parts, self._n_atoms = parts, n_atoms

    @property
    def reference(self) -> Tensor | None:
        """Positions ``(n_atoms of all structures, 3)`` angstrom at the last build; None if no lists are kept.

        Batches without lists that change, among others with such lists, stand with zeros.
        """
        found = [(part.atoms, part.evaluator.pairs.reference) for part in self._parts]
        kept = [(atoms, reference) for atoms, reference in found if reference is not None]
        if not kept:
            return None
        whole = kept[0][1].new_zeros(self._n_atoms, 3)
        for atoms, reference in kept:
            whole[atoms] = reference
        return whole

    def restore(self, reference: Tensor | None, cell: Tensor | None = None) -> None:
        """Build the lists at positions that `reference` gave, in the box ``(1, 3, 3)`` angstrom or none."""
        for part in self._parts:
            box = None if cell is None else cell.expand(part.n, 3, 3)
            part.evaluator.pairs.restore(None if reference is None else reference[part.atoms], box)


def _groups(model: Potential, structures: Sequence[Structure], batch: int | None, isolated: bool) -> list[list[int]]:
    """Which structures are evaluated together."""
    n, sizes = len(structures), [len(s) for s in structures]
    alone: list[list[int]] = []
    if len(set(sizes)) == 1 and not isolated:
        every = list(range(n))
        per_batch = _copies_per_batch(model, sizes[0], n) if batch is None else min(batch, n)
    else:
        every = [k for k in range(n) if sizes[k] <= FIXED_PAIRS_MAX_ATOMS]
        alone = [[k] for k in range(n) if sizes[k] > FIXED_PAIRS_MAX_ATOMS]
        per_batch = n if batch is None else batch
    return [every[k : k + per_batch] for k in range(0, len(every), per_batch)] + alone


def _copies_per_batch(model: Potential, size: int, n: int) -> int:
    if model.device.type != "cpu" or not (model.cutoff or model.long_range):
        return n
    limit = min(n, max(1, ATOMS_PER_BATCH // size))
    # batches of one size need one compiled graph only
    return next((m for m in range(limit, limit // 2, -1) if n % m == 0), limit)


def _as_slice(indices: np.ndarray) -> slice | np.ndarray:
    """Consecutive indices as a slice, which takes no copy."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _boxes(cell: np.ndarray | None, n: int) -> np.ndarray | None:
    return None if cell is None else np.broadcast_to(cell, (n, 3, 3)).copy()
