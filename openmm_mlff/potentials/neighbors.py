"""Pair lists: the thin door to the neighbour-list libraries, and the Verlet list that MD keeps between steps.

Small open molecules use all their pairs, once and for ever, and lists of many of them are made together; everything
else goes through vesin, on the CPU and on CUDA. Every periodic image within the cutoff is a pair, so boxes smaller than
the cutoff are right.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList

from openmm_mlff.data.structures import Batch, Pairs

#: Open molecules up to this size use all their pairs within the short cutoff too: no list is ever rebuilt.
FIXED_PAIRS_MAX_ATOMS = 32
#: Open structures up to this size are searched pair by pair, many at once: one by one, vesin's start costs more.
DENSE_MAX_ATOMS = 48
#: pairs that are looked at together
DENSE_PAIRS = 1 << 20
#: angstrom; a Verlet list is rebuilt when an atom has moved by half of it.
DEFAULT_SKIN = 0.6
#: angstrom; closer than this, two atoms are at the same place.
COINCIDENT = 1e-3


def all_pairs(counts: Tensor, half: bool) -> Pairs:
    """Every pair within each structure of an open batch.

    Args:
        counts: atoms per structure, ``(n_structures,)`` int64.
        half: every unordered pair once; otherwise both directions.
    """
    first, second = [], []
    start = 0
    for n in counts.tolist():
        i, j = (torch.triu_indices(n, n, 1) if half else _off_diagonal(n)).to(counts.device)
        first.append(i + start)
        second.append(j + start)
        start += n
    return Pairs(torch.cat(first), torch.cat(second))


def _off_diagonal(n: int) -> Tensor:
    i = torch.arange(n).repeat_interleave(max(n - 1, 0))
    slot = torch.arange(max(n - 1, 0)).repeat(n)
    return torch.stack([i, slot + (slot >= i)])


def pairs_within(batch: Batch, cutoff: float, half: bool) -> Pairs:
    """All pairs of images within `cutoff` (angstrom), in the device's memory.

    Open structures of up to `DENSE_MAX_ATOMS` atoms are searched together, pair by pair; others one by one by vesin.

    Raises `ValueError` naming two atoms that are at the same place.
    """
    positions = batch.positions.detach().to(torch.float64)
    if batch.cell is None and int(batch.counts.max()) <= DENSE_MAX_ATOMS:
        return _dense(positions, batch.counts, cutoff, half)
    first, second, offsets = [], [], []
    start = 0
    for s, n in enumerate(batch.counts.tolist()):
        box = None if batch.cell is None else batch.cell[s].detach().to(torch.float64)
        i, j, shift = _vesin(positions[start : start + n], box, cutoff, half)
        first.append(i + start)
        second.append(j + start)
        offsets.append(shift)
        start += n
    shifts = torch.cat(offsets).to(batch.positions.dtype) if batch.cell is not None else None
    return Pairs(torch.cat(first), torch.cat(second), shifts)


def _dense(positions: Tensor, counts: Tensor, cutoff: float, half: bool) -> Pairs:
    """The pairs of open structures among all their pairs, which are looked at some structures at a time."""
    starts = torch.cumsum(counts, 0) - counts
    _check_finite(positions, starts)
    share = torch.div(torch.cumsum(counts * counts, 0), DENSE_PAIRS, rounding_mode="floor")
    first, second = [], []
    for own in torch.split(torch.arange(len(counts), device=counts.device), torch.bincount(share).tolist()):
        n, start = counts[own], starts[own]
        width = n.repeat_interleave(n * n)
        place = torch.arange(len(width), device=counts.device)
        place = place - (torch.cumsum(n * n, 0) - n * n).repeat_interleave(n * n)
        i, j = torch.div(place, width, rounding_mode="floor"), place % width
        kept = i < j if half else i != j
        i, j, start = i[kept], j[kept], start.repeat_interleave(n * n)[kept]
        distance = (positions[i + start] - positions[j + start]).square().sum(-1).sqrt()
        _check_apart(i, j, distance)
        near = distance < cutoff
        first.append((i + start)[near])
        second.append((j + start)[near])
    return Pairs(torch.cat(first), torch.cat(second))


def _check_finite(positions: Tensor, starts: Tensor | None = None) -> None:
    """Refuse NaN and infinity; atoms are counted from the first one of their structure."""
    finite = torch.isfinite(positions).all(-1)
    if not bool(finite.all()):
        atom = int((~finite).nonzero()[0])
        if starts is not None:
            atom -= int(starts[starts <= atom].max())
        raise ValueError(f"positions: expected finite numbers, got NaN or infinity for atom {atom}")


def _check_apart(i: Tensor, j: Tensor, distance: Tensor) -> None:
    if len(distance) and bool((distance < COINCIDENT).any()):
        p = int(distance.argmin())
        raise ValueError(
            f"positions: atoms {int(i[p])} and {int(j[p])} are at the same place ({float(distance[p]):.1e} angstrom)"
        )


def _vesin(positions: Tensor, box: Tensor | None, cutoff: float, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    device = positions.device
    _check_finite(positions)
    on_cpu = device.type == "cpu"
    if box is None:
        # vesin takes seconds where the cutoff is hundreds of times the size of an open molecule
        extent = float((positions.amax(0) - positions.amin(0)).norm())
        cutoff = min(cutoff, 1.01 * extent + 1.0)
    lattice = torch.zeros(3, 3, dtype=torch.float64, device=device) if box is None else box
    search = NeighborList(cutoff=cutoff, full_list=not half, n_threads=1)
    points, lattice = (positions.numpy(), lattice.numpy()) if on_cpu else (positions, lattice)  # type: ignore[assignment]
    # vesin folds a pair back into the cell it starts from only if asked with exact boxes; shifts are whole numbers.
    i, j, shift, distance = (
        torch.as_tensor(np.asarray(x).astype(np.float64) if on_cpu else x, device=device)
        for x in search.compute(points, lattice, box is not None, "ijSd")
    )
    i, j, shift = i.to(torch.int64), j.to(torch.int64), shift.to(torch.int64).reshape(-1, 3)
    _check_apart(i, j, distance)
    span = int(shift.abs().max()) + 1 if len(shift) else 1
    key = i * len(positions) + j
    for axis in range(3):
        key = key * (2 * span + 1) + (shift[:, axis] + span)
    order = torch.argsort(key)
    return i[order], j[order], shift[order]


def with_pairs(
    batch: Batch, cutoff: float, long_range: bool, long_range_cutoff: float | None, skin: float = 0.0
) -> Batch:
    """The batch with its directed list within ``cutoff + skin`` and, if asked, the half list of long-range pairs.

    Long-range pairs are all pairs of an open structure without `long_range_cutoff`, else those within
    ``long_range_cutoff + skin``. Raises `ValueError` for a periodic batch with long-range terms and no cutoff.
    """
    return batch.replace(
        pairs=pairs_within(batch, cutoff + skin, half=False),
        long_range_pairs=_long_range(batch, long_range, long_range_cutoff, skin),
    )


def _long_range(batch: Batch, wanted: bool, cutoff: float | None, skin: float) -> Pairs | None:
    if not wanted:
        return None
    if cutoff is not None:
        return pairs_within(batch, cutoff + skin, half=True)
    if batch.cell is not None:
        raise ValueError(
            "longRangeCutoff: a periodic system needs one, because cutting this model's 1/r terms off unsmoothed is "
            "wrong; expected a length (for example 1.0 nm), got None"
        )
    return all_pairs(batch.counts, half=True)


class VerletPairs:
    """Pair lists that stay valid while atoms move, for one batch whose atoms do not change.

    ``update(positions, cell)`` returns the batch with valid pair lists; the lists are rebuilt when an atom has moved
    by more than half the skin since they were built, or the box has changed. Small open molecules never rebuild.

    Attributes:
        rebuilds: how often the lists were built.
        reference, reference_cell: positions ``(n_atoms, 3)`` float64 and cell at the last build, None before it; a
            checkpoint stores them, and `restore` builds the same lists again.
    """

    def __init__(
        self, batch: Batch, cutoff: float, long_range: bool, long_range_cutoff: float | None, skin: float = DEFAULT_SKIN
    ) -> None:
        self._terms = (cutoff, long_range, long_range_cutoff)
        self._skin = skin
        self._batch = batch
        self.fixed = batch.cell is None and int(batch.counts.max()) <= FIXED_PAIRS_MAX_ATOMS
        self.rebuilds = 0
        self.reference: Tensor | None = None
        self.reference_cell: Tensor | None = None
        if self.fixed:
            # a long-range cutoff needs no list either: its terms vanish smoothly beyond it
            self._batch = batch.replace(
                pairs=all_pairs(batch.counts, half=False),
                long_range_pairs=all_pairs(batch.counts, half=True) if long_range else None,
            )
            derive(self._batch)

    def update(self, positions: Tensor, cell: Tensor | None) -> Batch:
        """The batch with lists valid at `positions` ``(n_atoms, 3)`` and `cell`; its own positions are stale."""
        if self.fixed:
            return self._batch
        if self._stale(positions, cell):
            moved = self._batch.replace(positions=positions, cell=cell)
            built = with_pairs(moved, *self._terms, skin=self._skin)
            dtype = self._batch.positions.dtype
            self._batch = self._batch.replace(
                pairs=_cast(built.pairs, dtype),
                long_range_pairs=_cast(built.long_range_pairs, dtype),
                cell=None if cell is None else cell.to(dtype),
            )
            self.reference = positions.detach().clone()
            self.reference_cell = None if cell is None else cell.detach().clone()
            self.rebuilds += 1
            derive(self._batch)
        return self._batch

    def restore(self, reference: Tensor | None, cell: Tensor | None = None) -> None:
        """Build the lists at the `reference` and `reference_cell` of an earlier run, whatever lists are kept now.

        The same lists in the same order give the same bits; None (nothing was built yet) forgets the lists.
        """
        self.reference = None
        if reference is not None:
            self.update(reference, cell)

    def _stale(self, positions: Tensor, cell: Tensor | None) -> bool:
        if self.reference is None:
            return True
        if cell is not None and not torch.equal(cell, self.reference_cell):  # type: ignore[arg-type]
            return True
        moved = (positions - self.reference).square().sum(-1).max()
        return not bool(moved <= (0.5 * self._skin) ** 2)


def derive(batch: Batch) -> Batch:
    """Compute what follows from atoms and pairs, so that `Batch.at` carries it to every step."""
    _ = batch.counts, batch.dense_slot, batch.neighbors
    if batch.cell is not None:
        _ = batch.box_lengths
    return batch


def _cast(pairs: Pairs | None, dtype: torch.dtype) -> Pairs | None:
    if pairs is None or pairs.offsets is None:
        return pairs
    return Pairs(pairs.first, pairs.second, pairs.offsets.to(dtype))
