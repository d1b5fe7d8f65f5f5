"""Verlet lists of the native code: half lists, which the engine searches and keeps, both from one search."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch
from openmm_mlff.potentials.neighbors import COINCIDENT, VerletPairs
from openmm_so3krates.native import Engine

#: angstrom; no atom of a periodic system is farther from the origin, because lattice shifts are kept as short integers
FARTHEST = 1e5


def all_pairs(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs within each structure of an open batch, each once, ``(P,)`` twice."""
    first, second, start = [], [], 0
    for n in counts:
        i, j = np.triu_indices(n, 1)
        first.append(i + start)
        second.append(j + start)
        start += n
    return np.concatenate(first), np.concatenate(second)


def check_finite(positions: np.ndarray) -> None:
    """`ValueError` naming the first atom whose position ``(N, 3)`` is not finite."""
    finite = np.isfinite(positions)
    if not finite.all():
        atom = int(np.flatnonzero(~finite.all(-1))[0])
        raise ValueError(f"positions: expected finite numbers, got NaN or infinity for atom {atom}")


class HalfLists(VerletPairs):
    """The Verlet lists of a batch in an engine, valid as long as those of `VerletPairs`, and restored as these are.

    Attributes:
        reference, reference_cell, rebuilds, fixed: as in the base class.
    """

    def __init__(
        self,
        engine: Engine,
        batch: Batch,
        cutoff: float,
        long_range: bool,
        long_range_cutoff: float | None,
        skin: float,
    ) -> None:
        super().__init__(batch.replace(pairs=None, long_range_pairs=None), cutoff, long_range, long_range_cutoff, skin)
        self._engine = engine
        self._counts = batch.counts.tolist()
        self._given = False

    def give(self, positions: np.ndarray, cell: np.ndarray | None) -> None:
        """Make the engine's lists valid at positions ``(N, 3)`` and cells ``(n_structures, 3, 3)``.

        Raises `ValueError` for positions that are not finite, and for two atoms at the same place.
        """
        if not self._given:
            self._give_all()
        if self.fixed:
            return
        exact, box = torch.from_numpy(positions), None if cell is None else torch.from_numpy(cell)
        if not self._stale(exact, box):
            return
        check_finite(positions)
        # a search that fails leaves the engine without the lists of the old reference
        self.reference = None
        self._search(positions, cell)
        self.reference, self.reference_cell = exact.clone(), None if box is None else box.clone()
        self.rebuilds += 1

    def restore(self, reference: Tensor | None, cell: Tensor | None = None) -> None:
        """Build the lists at the `reference` and `reference_cell` of an earlier run; None forgets the lists."""
        self.reference = None
        if reference is not None:
            self.give(_array(reference), None if cell is None else _array(cell))

    def again(self) -> None:
        """Give the engine, which was used for something else, the lists that it had."""
        self._give_all()
        if self.reference is not None:
            box = self.reference_cell
            self._search(_array(self.reference), None if box is None else _array(box))

    def _give_all(self) -> None:
        """The lists that never change."""
        _, long_range, long_range_cutoff = self._terms
        if self.fixed or (long_range and long_range_cutoff is None):
            pairs = all_pairs(self._counts)
            if self.fixed:
                self._engine.set_pairs(*pairs, None, long_range=False)
            if long_range:
                self._engine.set_pairs(*pairs, None, long_range=True)
        self._given = True

    def _search(self, positions: np.ndarray, cell: np.ndarray | None) -> None:
        if cell is not None and not np.abs(positions).max(initial=0.0) <= FARTHEST:
            raise ValueError(
                f"positions: expected atoms within {FARTHEST:g} angstrom of the origin, got one at "
                f"{np.abs(positions).max():g}"
            )
        cutoff, long_range, long_range_cutoff = self._terms
        reach = 0.0 if not long_range or long_range_cutoff is None else long_range_cutoff + self._skin
        distance, (a, b) = self._engine.search(positions, cell, cutoff + self._skin, reach, torch.get_num_threads())
        if distance < COINCIDENT:
            raise ValueError(f"positions: atoms {a} and {b} are at the same place ({distance:.1e} angstrom)")


def _array(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().to("cpu", torch.float64).numpy())
