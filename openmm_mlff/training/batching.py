"""labelled structures -> batches: pair lists are built once, and a seed decides the order.

A batch holds structures of similar atom counts, because networks with attention work on padded tables; or, for data
of many sizes, a cross-section of all sizes with a given number of atoms in all. The order of an epoch is a function of
(seed, epoch), so that a resumed run needs nothing but its step number.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch, Pairs, Structure, collate
from openmm_mlff.potentials.neighbors import FIXED_PAIRS_MAX_ATOMS, all_pairs, with_pairs
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training.losses import TERMS, Labels

#: atoms in a batch where nothing is differentiated twice (validation, fits before training)
EVALUATION_ATOMS = 2048
#: batches whose tables of atoms and pairs are kept
_KEPT_SKELETONS = 32


@dataclass
class LabelledBatch:
    """A batch with pair lists, its labels, and the kind of batch it is.

    Attributes:
        kind: batches of one kind differ only in positions and labels; None where no other batch is alike.
    """

    batch: Batch
    labels: Labels
    kind: tuple[str, ...] | None


class LabelledSet:
    """Structures prepared for one potential, on its device and in its dtype.

    Positions are moved to the centre of each structure (dipoles with them), so that single precision loses nothing.
    Small open structures use all their pairs; others keep the list that was built here.
    """

    def __init__(self, structures: Sequence[Structure], potential: Potential) -> None:
        if len(structures) == 0:
            raise ValueError("structures: expected at least one, got none")
        for structure in structures:
            potential.check(structure)
        self.structures = [_centred(s) for s in structures]
        self.sizes = np.array([len(s) for s in structures])
        self.dtype, self.device = potential.dtype, potential.device
        self._terms = (potential.cutoff, potential.long_range, potential.long_range_cutoff)
        self._fixed = [s.cell is None and len(s) <= FIXED_PAIRS_MAX_ATOMS for s in self.structures]
        self._ids = [_identity(s) if fixed else "" for s, fixed in zip(self.structures, self._fixed, strict=True)]
        # pair lists of single structures, built when they are first asked for
        self._lists: list[_Lists | None] = [None] * len(self.structures)
        self._skeletons: OrderedDict[tuple[str, ...], Batch] = OrderedDict()
        # values that every batch gathers, in the model's precision
        self._positions = [torch.tensor(s.positions, dtype=self.dtype) for s in self.structures]
        self._labels = {name: self._label_tensors(name) for name in TERMS}

    def __len__(self) -> int:
        return len(self.structures)

    def epoch(self, seed: int, epoch: int, batch_size: int, batch_atoms: int | None = None) -> list[np.ndarray]:
        """Indices of each batch of one epoch, in the order in which they are used.

        Structures are shuffled, sorted by atom count (structures of one size stay shuffled), cut into batches, and
        the batches are shuffled. Of a size group, what is left over after full batches goes on with the next size.
        If there is at least one full batch, the one that is not full is left out; each epoch leaves out others.

        With `batch_atoms` every batch holds all sizes instead, and every structure is used: the sorted structures are
        dealt out to as many batches as are needed for about `batch_atoms` atoms (by no more than the largest structure
        above it) and at most `batch_size` structures in each.
        """
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self))
        order = order[np.argsort(self.sizes[order], kind="stable")]
        if batch_atoms is not None:
            n = max(-(-int(self.sizes.sum()) // batch_atoms), -(-len(order) // batch_size))
            return _dealt(order[::-1], n, rng)
        full = len(order) // batch_size
        if full == 0:
            return [order]
        left_over = len(order) - full * batch_size
        order = np.delete(order, rng.choice(len(order), left_over, replace=False))
        batches = np.split(order, full)
        return [batches[i] for i in rng.permutation(full)]

    def chunks(self, batch_size: int, batch_atoms: int | None = None) -> list[np.ndarray]:
        """Every structure once, in order of atom count; at most `batch_atoms` atoms (or one structure) in each."""
        order = np.argsort(self.sizes, kind="stable")
        chunks: list[list[int]] = []
        atoms = 0
        for i in order.tolist():
            size = int(self.sizes[i])
            full = not chunks or len(chunks[-1]) == batch_size
            if full or (batch_atoms is not None and atoms + size > batch_atoms):
                chunks.append([])
                atoms = 0
            chunks[-1].append(i)
            atoms += size
        return [np.array(chunk) for chunk in chunks]

    def share(self, indices: np.ndarray, n: int) -> list[np.ndarray]:
        """A batch in n parts of about the same work, some of them empty if there are fewer structures."""
        sizes = self.sizes[indices]
        if len(indices) == 0 or sizes.min() == sizes.max():
            return np.array_split(indices, n)
        parts: list[list[int]] = [[] for _ in range(n)]
        atoms = [0] * n
        # the largest first, each to the part that has least
        for k in np.argsort(-sizes, kind="stable").tolist():
            least = atoms.index(min(atoms))
            parts[least].append(int(indices[k]))
            atoms[least] += int(sizes[k])
        return [np.array(part, dtype=np.int64) for part in parts]

    def batch(self, indices: Sequence[int] | np.ndarray) -> LabelledBatch:
        """The structures with these indices as one batch."""
        picked = [int(i) for i in indices]
        fixed = all(self._fixed[i] for i in picked)
        kind = tuple(self._ids[i] for i in picked) if fixed else None
        skeleton = self._skeleton(kind, picked) if kind is not None else self._join(picked)
        positions = torch.cat([self._positions[i] for i in picked]).to(self.device)
        labels = {}
        for name in TERMS:
            rows = self._labels[name]
            labels[name] = None if rows is None else torch.cat([rows[i] for i in picked]).to(self.device)
        return LabelledBatch(skeleton.at(positions, skeleton.cell), Labels(**labels), kind)

    def _label_tensors(self, name: str) -> list[Tensor] | None:
        rows = label_rows(self.structures, name)
        return None if rows is None else [torch.tensor(row, dtype=self.dtype) for row in rows]

    def _skeleton(self, kind: tuple[str, ...], picked: list[int]) -> Batch:
        """Atoms and all pairs of small open structures, kept for the next batch of the same kind."""
        if kind in self._skeletons:
            self._skeletons.move_to_end(kind)
            return self._skeletons[kind]
        raw = collate([self.structures[i] for i in picked])
        batch = raw.replace(
            pairs=all_pairs(raw.counts, half=False),
            long_range_pairs=all_pairs(raw.counts, half=True) if self._terms[1] else None,
        ).to(device=self.device, dtype=self.dtype)
        # computed now, so that `Batch.at` hands them on
        _ = batch.counts, batch.neighbors, batch.dense_slot
        self._skeletons[kind] = batch
        if len(self._skeletons) > _KEPT_SKELETONS:
            self._skeletons.popitem(last=False)
        return batch

    def _join(self, picked: list[int]) -> Batch:
        """Lists that were built structure by structure, laid end to end."""
        raw = collate([self.structures[i] for i in picked])
        lists = [self._lists_of(i) for i in picked]
        starts = np.cumsum([0, *(self.sizes[picked[:-1]])]).tolist()
        pairs = _laid_end_to_end([one.pairs for one in lists], starts)
        far = [one.long_range_pairs for one in lists if one.long_range_pairs is not None]
        long_range = None
        if self._terms[1]:
            long_range = _laid_end_to_end(far, starts) if far else all_pairs(raw.counts, half=True)
        return raw.replace(pairs=pairs, long_range_pairs=long_range).to(device=self.device, dtype=self.dtype)

    def _lists_of(self, i: int) -> _Lists:
        kept = self._lists[i]
        if kept is None:
            cutoff, long_range, limit = self._terms
            structure = self.structures[i]
            # long-range pairs of open structures without a cutoff are all pairs: quicker made than kept
            listed = long_range and (limit is not None or structure.cell is not None)
            batch = with_pairs(collate([structure]), cutoff, listed, limit)
            assert batch.pairs is not None
            kept = _Lists(
                _small(batch.pairs), None if batch.long_range_pairs is None else _small(batch.long_range_pairs)
            )
            self._lists[i] = kept
        return kept


@dataclass(frozen=True)
class _Lists:
    """Pair lists of one structure, with small indices: a training set keeps those of every structure."""

    pairs: Pairs
    long_range_pairs: Pairs | None


def _small(pairs: Pairs) -> Pairs:
    kind = torch.int16 if len(pairs) == 0 or int(pairs.first.max()) < 2**15 else torch.int32
    return Pairs(pairs.first.to(kind), pairs.second.to(kind), pairs.offsets)


def _dealt(order: np.ndarray, n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal out an order to n batches: of each n that follow one another, every batch gets one, by chance."""
    batches: list[list[int]] = [[] for _ in range(n)]
    for start in range(0, len(order), n):
        for batch, i in zip(rng.permutation(n).tolist(), order[start : start + n].tolist(), strict=False):
            batches[batch].append(i)
    return [np.array(batch) for batch in batches]


def label_rows(structures: Sequence[Structure], name: str) -> list[np.ndarray] | None:
    """One label of every structure, NaN where unknown; None if no structure has it.

    Shapes: energy ``(1,)``, forces ``(n_atoms, 3)``, dipole ``(1, 3)``, charges ``(n_atoms,)``.
    """
    values = [getattr(s, name) for s in structures]
    if all(v is None for v in values):
        return None
    rows = []
    for value, structure in zip(values, structures, strict=True):
        n = len(structure)
        shape = {"energy": (1,), "forces": (n, 3), "dipole": (1, 3), "charges": (n,)}[name]
        rows.append(np.full(shape, np.nan) if value is None else np.asarray(value, dtype=np.float64).reshape(shape))
    return rows


def _laid_end_to_end(lists: list[Pairs], starts: list[int]) -> Pairs:
    offsets = [pairs.offsets for pairs in lists if pairs.offsets is not None]
    return Pairs(
        torch.cat([pairs.first.to(torch.int64) + start for pairs, start in zip(lists, starts, strict=True)]),
        torch.cat([pairs.second.to(torch.int64) + start for pairs, start in zip(lists, starts, strict=True)]),
        torch.cat(offsets) if offsets else None,
    )


def _centred(structure: Structure) -> Structure:
    if structure.cell is not None:
        return structure
    centre = structure.positions.mean(0)
    dipole = None if structure.dipole is None else structure.dipole - structure.charge * centre
    return structure.replace(positions=structure.positions - centre, dipole=dipole)


def _identity(structure: Structure) -> str:
    """Short name of what positions do not decide: the same for structures with the same atoms in the same order."""
    text = f"{structure.charge} {structure.multiplicity} {structure.numbers.tolist()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
