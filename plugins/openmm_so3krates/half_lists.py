"""Half lists of pairs for the native code: every pair once, both lists of a model from one search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList

from openmm_mlff.data.structures import Batch
from openmm_mlff.potentials.neighbors import COINCIDENT, VerletPairs


@dataclass(frozen=True)
class HalfList:
    """Pairs of atoms ``(P,)`` int32, and lattice vectors between them, ``(P, 3)`` int32, or None in open systems."""

    first: np.ndarray
    second: np.ndarray
    shift: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, which: np.ndarray) -> HalfList:
        return HalfList(self.first[which], self.second[which], None if self.shift is None else self.shift[which])


def joined(lists: list[HalfList]) -> HalfList:
    """One list after the other."""
    shifts = [x.shift for x in lists if x.shift is not None]
    first, second = (np.concatenate([getattr(x, name) for x in lists]) for name in ("first", "second"))
    return HalfList(first, second, np.concatenate(shifts) if shifts else None)


def all_pairs(counts: list[int]) -> HalfList:
    """All pairs within each structure of an open batch."""
    lists, start = [], 0
    for n in counts:
        i, j = np.triu_indices(n, 1)
        lists.append(HalfList((i + start).astype(np.int32), (j + start).astype(np.int32)))
        start += n
    return joined(lists)


def check_finite(positions: Tensor) -> None:
    """`ValueError` naming the first atom whose position ``(N, 3)`` is not finite."""
    finite = torch.isfinite(positions)
    if not bool(finite.all()):
        atom = int((~finite.all(-1)).nonzero()[0])
        raise ValueError(f"positions: expected finite numbers, got NaN or infinity for atom {atom}")


class HalfLists(VerletPairs):
    """The Verlet lists of a batch as half lists, valid as long as those of `VerletPairs`, and restored as these are.

    Attributes:
        short, long: pairs within the cutoff and within the long-range cutoff (plus the skin); `long` is None for a
            model without long-range terms. reference, reference_cell, rebuilds, fixed: as in the base class.
    """

    def __init__(
        self, batch: Batch, cutoff: float, long_range: bool, long_range_cutoff: float | None, skin: float
    ) -> None:
        super().__init__(batch.replace(pairs=None, long_range_pairs=None), cutoff, long_range, long_range_cutoff, skin)
        self._counts = batch.counts.tolist()
        self.short: HalfList | None = None
        self.long: HalfList | None = None
        if self.fixed:
            self.short = all_pairs(self._counts)
            self.long = self.short if long_range else None
        elif long_range and long_range_cutoff is None:
            self.long = all_pairs(self._counts)

    def refresh(self, positions: Tensor, cell: Tensor | None) -> bool:
        """Make the lists valid at positions ``(N, 3)`` and cells ``(n_structures, 3, 3)``; whether they changed.

        Raises `ValueError` for positions that are not finite, and for two atoms at the same place.
        """
        if self.fixed or not self._stale(positions, cell):
            return False
        check_finite(positions)
        self._search(positions.numpy(), None if cell is None else cell.numpy())
        self.reference = positions.detach().clone()
        self.reference_cell = None if cell is None else cell.detach().clone()
        self.rebuilds += 1
        return True

    def restore(self, reference: Tensor | None, cell: Tensor | None = None) -> None:
        """Build the lists at the `reference` and `reference_cell` of an earlier run; None forgets the lists."""
        self.reference = None
        if reference is not None:
            self.refresh(reference, cell)

    def _search(self, positions: np.ndarray, cell: np.ndarray | None) -> None:
        cutoff, long_range, long_range_cutoff = self._terms
        both = long_range and long_range_cutoff is not None
        reach = (max(cutoff, long_range_cutoff) if both and long_range_cutoff else cutoff) + self._skin
        found, distances, start = [], [], 0
        for s, n in enumerate(self._counts):
            part = slice(start, start + n)
            pairs, distance = _half_list(positions[part], None if cell is None else cell[s], reach, start)
            found.append(pairs)
            distances.append(distance)
            start += n
        pairs, distance = joined(found), np.concatenate(distances)
        self.short = pairs[distance < cutoff + self._skin] if both else pairs
        if both and long_range_cutoff is not None:
            self.long = pairs if long_range_cutoff >= cutoff else pairs[distance < long_range_cutoff + self._skin]


def _half_list(positions: np.ndarray, box: np.ndarray | None, reach: float, start: int) -> tuple[HalfList, np.ndarray]:
    if box is None:
        # the search is slow where the cutoff is far larger than the molecule
        reach = min(reach, 1.01 * float(np.linalg.norm(np.ptp(positions, axis=0))) + 1.0)
    search = NeighborList(cutoff=reach, full_list=False, n_threads=1)
    lattice = np.zeros((3, 3)) if box is None else box
    i, j, shift, distance = search.compute(positions, lattice, box is not None, "ijSd")
    if len(distance) and distance.min() < COINCIDENT:
        p = int(distance.argmin())
        raise ValueError(
            f"positions: atoms {int(i[p]) + start} and {int(j[p]) + start} are at the same place "
            f"({float(distance[p]):.1e} angstrom)"
        )
    first, second = (np.asarray(x).astype(np.int32) + np.int32(start) for x in (i, j))
    return HalfList(first, second, None if box is None else np.asarray(shift)), np.asarray(distance)
