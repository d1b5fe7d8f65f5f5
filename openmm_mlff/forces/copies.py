"""One call of a model for many copies of a molecule, in batches that suit the model and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Evaluation

if TYPE_CHECKING:
    from openmm_mlff.potentials.evaluator import Evaluator
    from openmm_mlff.potentials.potential import Potential

#: atoms in one evaluation of a model with pair lists on the CPU; more of them leave its caches and gain nothing.
ATOMS_PER_BATCH = 200


class CopiesEvaluator:
    """``f(positions, cell) -> Evaluation`` for structures of equal size laid end to end, which do not interact.

    Batches of equal size whose pair lists never change share one evaluator, and with it one compiled graph.

    Args:
        structures: the copies, with equal numbers of atoms, all open or all periodic in the same box.
        compile: as for `Potential.evaluator`.
        batch: copies in one evaluation; None takes as many as make `ATOMS_PER_BATCH` atoms, or all where batches gain
            nothing (on a GPU, or for a model without pair lists).

    Attributes:
        pairs: where the pair lists of all copies were built (`CopiesPairs`).

    Raises `ValueError` for copies of different sizes.
    """

    def __init__(
        self, model: Potential, structures: Sequence[Structure], compile: bool | str = False, batch: int | None = None
    ) -> None:
        n, size = len(structures), len(structures[0])
        if any(len(s) != size for s in structures):
            raise ValueError(f"structures: expected copies of equal size, got {sorted({len(s) for s in structures})}")
        per_batch = _copies_per_batch(model, size, n) if batch is None else min(batch, n)
        self._shape = (n * size, 3)
        self._parts: list[tuple[slice, slice, Evaluator]] = []
        shared: dict[tuple[bytes, ...], Evaluator] = {}
        for start in range(0, n, per_batch):
            part = structures[start : start + per_batch]
            key = tuple(s.numbers.tobytes() + bytes(f"{s.charge}/{s.multiplicity}", "ascii") for s in part)
            evaluator = shared.get(key)
            if evaluator is None:
                evaluator = model.evaluator(part, outputs=("energy", "forces"), compile=compile)
                if getattr(evaluator.pairs, "fixed", False):
                    shared[key] = evaluator
            stop = start + len(part)
            self._parts.append((slice(start, stop), slice(start * size, stop * size), evaluator))
        self.pairs = CopiesPairs(self._parts)

    @property
    def compiled(self) -> bool | None:
        """Whether a compiled graph runs; None before the first call."""
        return self._parts[0][2].compiled

    def __call__(self, positions: np.ndarray, cell: np.ndarray | None = None) -> Evaluation:
        """Evaluate at positions ``(n_atoms of all copies, 3)`` angstrom, in one box ``(3, 3)`` angstrom or none."""
        if positions.shape != self._shape:
            raise ValueError(f"positions: expected shape {self._shape}, got {positions.shape}")
        if len(self._parts) == 1:
            copies, _, evaluator = self._parts[0]
            return evaluator(positions, _boxes(cell, copies))
        energy = torch.empty(self._parts[-1][0].stop, dtype=torch.float64)
        forces = torch.empty(self._shape, dtype=torch.float64)
        for copies, atoms, evaluator in self._parts:
            result = evaluator(positions[atoms], _boxes(cell, copies))
            assert result.forces is not None
            # copied at once: a shared evaluator may write its next result to the same place
            energy[copies], forces[atoms] = result.energy, result.forces
        return Evaluation(energy, forces=forces)

    def arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies of the copies ``(n,)`` eV and forces ``(n_atoms of all copies, 3)`` eV/angstrom, float64."""
        if len(self._parts) == 1 and positions.shape == self._shape:
            copies, _, evaluator = self._parts[0]
            return evaluator.arrays(positions, _boxes(cell, copies))
        result = self(positions, cell)
        assert result.forces is not None
        energies, forces = (x.detach().to("cpu", torch.float64).numpy() for x in (result.energy, result.forces))
        return energies, forces


class CopiesPairs:
    """The pair lists of all batches seen as one, as a checkpoint wants them."""

    def __init__(self, parts: Sequence[tuple[slice, slice, Evaluator]]) -> None:
        self._parts = parts

    @property
    def reference(self) -> Tensor | None:
        """Positions ``(n_atoms of all copies, 3)`` angstrom at the last build; None if no lists are kept."""
        found = [evaluator.pairs.reference for _, _, evaluator in self._parts]
        kept = [r for r in found if r is not None]
        return torch.cat(kept) if len(kept) == len(found) else None

    def restore(self, reference: Tensor | None, cell: Tensor | None = None) -> None:
        """Build the lists at positions that `reference` gave, in the box ``(1, 3, 3)`` angstrom or none."""
        for copies, atoms, evaluator in self._parts:
            box = None if cell is None else cell.expand(copies.stop - copies.start, 3, 3)
            evaluator.pairs.restore(None if reference is None else reference[atoms], box)


def _copies_per_batch(model: Potential, size: int, n: int) -> int:
    if model.device.type != "cpu" or not (model.cutoff or model.long_range):
        return n
    limit = min(n, max(1, ATOMS_PER_BATCH // size))
    # batches of one size need one compiled graph only
    return next((m for m in range(limit, limit // 2, -1) if n % m == 0), limit)


def _boxes(cell: np.ndarray | None, copies: slice) -> np.ndarray | None:
    return None if cell is None else np.broadcast_to(cell, (copies.stop - copies.start, 3, 3)).copy()
