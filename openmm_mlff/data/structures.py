"""One molecule or box (`Structure`, numpy) and many of them (`Batch`, torch).

Units: positions and cells in angstrom, energies in eV, forces in eV/angstrom, charges in e, dipoles in
e*angstrom. `multiplicity` is the spin multiplicity 2S+1 (1 singlet, 2 doublet, 3 triplet).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb "
    "Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf "
    "Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og "
)
SYMBOLS = tuple(_SYMBOLS.split())


def formula(numbers: Sequence[int] | np.ndarray) -> str:
    """Hill formula of the atomic numbers, e.g. ``C6H12N2O2``."""
    values, counts = np.unique(np.asarray(numbers, dtype=np.int64), return_counts=True)
    count = {SYMBOLS[z]: int(c) for z, c in zip(values, counts, strict=True)}
    first = [s for s in ("C", "H") if s in count] if "C" in count else []
    order = first + sorted(s for s in count if s not in first)
    return "".join(s + (str(count[s]) if count[s] > 1 else "") for s in order)


def check_charge_and_multiplicity(numbers: Sequence[int] | np.ndarray, charge: int, multiplicity: int) -> None:
    """Refuse a total charge and spin multiplicity that no number of electrons can have.

    Raises `ValueError` if the atoms have fewer electrons than ``charge`` takes away, or if 2S+1 has the
    wrong parity or is larger than the number of electrons allows.
    """
    if int(charge) != charge:
        raise ValueError(f"charge: expected a whole number of elementary charges, got {charge!r}")
    if int(multiplicity) != multiplicity or multiplicity < 1:
        raise ValueError(f"multiplicity: expected 2S+1 as a whole number >= 1, got {multiplicity!r}")
    electrons = int(np.sum(np.asarray(numbers))) - int(charge)
    if electrons < 0:
        raise ValueError(f"charge: expected at most {electrons + int(charge)} for {formula(numbers)}, got {charge:+d}")
    unpaired = int(multiplicity) - 1
    if unpaired > electrons or (electrons - unpaired) % 2:
        possible = "1, 3, 5, ..." if electrons % 2 == 0 else "2, 4, 6, ..."
        raise ValueError(
            f"multiplicity: {formula(numbers)} with charge {int(charge):+d} has {electrons} electrons, so 2S+1 must be "
            f"one of {possible} (at most {electrons + 1}), got {int(multiplicity)}"
        )


@dataclass(frozen=True, eq=False)
class Structure:
    """Atoms of one molecule, cluster or periodic box, with the labels that are known for them.

    Attributes:
        numbers: atomic numbers, ``(n_atoms,)`` int64.
        positions: ``(n_atoms, 3)`` float64, angstrom.
        charge: total charge in e.
        multiplicity: spin multiplicity 2S+1.
        cell: box vectors as rows, ``(3, 3)`` angstrom, periodic in all three directions; None for an open system.
        energy: eV. forces: ``(n_atoms, 3)`` eV/angstrom. dipole: ``(3,)`` e*angstrom. charges: ``(n_atoms,)`` e.
        group: the molecule or trajectory it comes from; no split may cut through a group.
        info: anything else, JSON-like.

    Raises `ValueError` naming the argument if a shape, a value or a periodicity is impossible.
    """

    numbers: np.ndarray
    positions: np.ndarray
    charge: int = 0
    multiplicity: int = 1
    cell: np.ndarray | None = None
    energy: float | None = None
    forces: np.ndarray | None = None
    dipole: np.ndarray | None = None
    charges: np.ndarray | None = None
    group: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = np.ascontiguousarray(self.numbers)
        if numbers.dtype.kind not in "iu" and not (numbers.dtype.kind == "f" and np.all(numbers == np.rint(numbers))):
            raise ValueError(f"numbers: expected whole atomic numbers, got {numbers.tolist()[:10]}")
        numbers = numbers.astype(np.int64)
        if numbers.ndim != 1 or len(numbers) == 0:
            raise ValueError(f"numbers: expected shape (n_atoms,) with at least one atom, got {numbers.shape}")
        if numbers.min() < 1 or numbers.max() >= len(SYMBOLS):
            bad = int(numbers[(numbers < 1) | (numbers >= len(SYMBOLS))][0])
            raise ValueError(f"numbers: expected atomic numbers 1 to {len(SYMBOLS) - 1}, got {bad}")
        object.__setattr__(self, "numbers", numbers)
        for name, lowest in (("charge", -np.inf), ("multiplicity", 1)):
            value = getattr(self, name)
            whole = isinstance(value, (int, float, np.number)) and np.isfinite(value) and int(value) == value
            if not whole or value < lowest:
                bound = ", at least 1" if name == "multiplicity" else ""
                raise ValueError(f"{name}: expected a whole number{bound}, got {value!r}")
            object.__setattr__(self, name, int(value))
        n = len(numbers)
        shapes = {"positions": (n, 3), "cell": (3, 3), "forces": (n, 3), "dipole": (3,), "charges": (n,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None and name != "positions":
                continue
            array = np.ascontiguousarray(value, dtype=np.float64)
            if array.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
            object.__setattr__(self, name, array)
        if self.cell is not None and abs(np.linalg.det(self.cell)) < 1e-6:
            raise ValueError(f"cell: expected three independent box vectors (angstrom), got {self.cell.tolist()}")
        if self.energy is not None:
            if not np.isfinite(self.energy):
                raise ValueError(f"energy: expected a finite number (eV), got {self.energy}")
            object.__setattr__(self, "energy", float(self.energy))

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def formula(self) -> str:
        return formula(self.numbers)

    def replace(self, **changes: Any) -> Structure:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Pairs:
    """A list of atom pairs; the vector of pair p is ``R[second] - R[first] + offset @ cell``.

    Directed lists hold i->j and j->i; half lists hold every unordered pair of images once. Every periodic
    image counts as a pair of its own. Sorted by first, second, offset, so that sums have one order.

    Attributes:
        first, second: atom indices in the batch, ``(n_pairs,)`` int64.
        offsets: whole lattice vectors, ``(n_pairs, 3)`` in the batch's dtype; None in open systems.
    """

    first: Tensor
    second: Tensor
    offsets: Tensor | None = None

    def __len__(self) -> int:
        return int(self.first.shape[0])


@dataclass(frozen=True)
class NeighborMatrix:
    """A directed pair list as a table with one row per atom, padded to the longest row.

    Attributes:
        index: neighbours, ``(n_atoms, n_slots)`` int64; padding points to the atom itself.
        mask: True for real neighbours, ``(n_atoms, n_slots)``.
        offsets: ``(n_atoms, n_slots, 3)`` or None.
    """

    index: Tensor
    mask: Tensor
    offsets: Tensor | None = None

    @classmethod
    def from_pairs(cls, pairs: Pairs, n_atoms: int, n_slots: int | None = None) -> NeighborMatrix:
        """Table of a list sorted by `first`; `n_slots` pads further, to keep a shape (`ValueError` if too small)."""
        count = torch.bincount(pairs.first, minlength=n_atoms)
        needed = int(count.max()) if len(count) else 0
        slots = max(needed, 1) if n_slots is None else n_slots
        if slots < needed:
            raise ValueError(f"n_slots: expected at least {needed}, got {slots}")
        start = torch.cumsum(count, 0) - count
        slot = torch.arange(len(pairs), device=pairs.first.device) - start[pairs.first]
        index = torch.arange(n_atoms, device=pairs.first.device)[:, None].repeat(1, slots)
        index[pairs.first, slot] = pairs.second
        mask = torch.zeros_like(index, dtype=torch.bool)
        mask[pairs.first, slot] = True
        offsets = None
        if pairs.offsets is not None:
            offsets = pairs.offsets.new_zeros(n_atoms, slots, 3)
            offsets[pairs.first, slot] = pairs.offsets
        return cls(index, mask, offsets)


@dataclass
class Batch:
    """Structures laid end to end, with the pair lists that a potential asked for.

    Attributes:
        numbers: ``(n_atoms,)`` int64.
        positions: ``(n_atoms, 3)`` angstrom.
        segment: which structure each atom belongs to, ``(n_atoms,)`` int64, ascending.
        charge: total charges, ``(n_structures,)``. multiplicity: 2S+1, ``(n_structures,)``.
        cell: ``(n_structures, 3, 3)`` angstrom, or None if all are open (a batch is all open or all periodic).
        pairs: directed list within the potential's cutoff (or a little more).
        long_range_pairs: half list for terms between all atoms, or within the long-range cutoff; None if not needed.
        external_potential: electrostatic potential phi on the atoms, ``(n_atoms,)`` in V (eV/e), or None.
    """

    numbers: Tensor
    positions: Tensor
    segment: Tensor
    charge: Tensor
    multiplicity: Tensor
    cell: Tensor | None = None
    pairs: Pairs | None = None
    long_range_pairs: Pairs | None = None
    external_potential: Tensor | None = None

    @property
    def n_atoms(self) -> int:
        return int(self.numbers.shape[0])

    @property
    def n_structures(self) -> int:
        return int(self.charge.shape[0])

    @cached_property
    def counts(self) -> Tensor:
        """Atoms per structure, ``(n_structures,)``."""
        return torch.bincount(self.segment, minlength=self.n_structures)

    @cached_property
    def neighbors(self) -> NeighborMatrix:
        """`pairs` as a table with one row per atom."""
        if self.pairs is None:
            raise ValueError("pairs: expected a batch with a pair list, got none (Potential.batch builds it)")
        return NeighborMatrix.from_pairs(self.pairs, self.n_atoms)

    @cached_property
    def dense_slot(self) -> Tensor | None:
        """Position of each atom in a ``(n_structures * max_atoms)`` table; None if all have the same size."""
        counts = self.counts
        largest = int(counts.max())
        if bool((counts == largest).all()):
            return None
        start = torch.cumsum(counts, 0) - counts
        return self.segment * largest + torch.arange(self.n_atoms, device=counts.device) - start[self.segment]

    @cached_property
    def box_lengths(self) -> tuple[float, float, float]:
        """Lengths of the three box vectors, angstrom, rounded up to steps of 5 %, the longest of all structures.

        What follows from them (how many wave vectors) stays as it is while a barostat moves the box a little.
        """
        assert self.cell is not None
        longest = self.cell.detach().norm(dim=-1).amax(0).tolist()
        a, b, c = (1.05 ** math.ceil(math.log(length, 1.05)) for length in longest)
        return a, b, c

    def to_dense(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``(n_atoms, ...)`` -> ``(n_structures, max_atoms, ...)``, empty places filled with `fill`."""
        if self.dense_slot is None:
            return x.view(self.n_structures, -1, *x.shape[1:])
        largest = int(self.counts.max())
        table = x.new_full((self.n_structures * largest, *x.shape[1:]), fill)
        return table.index_copy(0, self.dense_slot, x).view(self.n_structures, largest, *x.shape[1:])

    def from_dense(self, x: Tensor) -> Tensor:
        """The inverse of `to_dense`."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.dense_slot is None else flat[self.dense_slot]

    def sum_by_structure(self, x: Tensor) -> Tensor:
        """``(n_atoms, ...)`` -> ``(n_structures, ...)``."""
        if self.n_structures == 1:
            return x.sum(0, keepdim=True)
        return x.new_zeros(self.n_structures, *x.shape[1:]).index_add(0, self.segment, x)

    def per_atom(self, x: Tensor) -> Tensor:
        """``(n_structures, ...)`` -> ``(n_atoms, ...)``: every atom gets the value of its structure."""
        if self.n_structures == 1:
            # an index would be differentiated into a scatter to one place, which torch's compiler cannot vectorise
            return x.expand(self.n_atoms, *x.shape[1:])
        return x[self.segment]

    def lattice_shift(self, offsets: Tensor, structure: Tensor) -> Tensor:
        """Cartesian shift of lattice offsets ``(..., 3)`` for the structures ``(...)`` that they belong to."""
        assert self.cell is not None
        if self.n_structures == 1:
            return offsets @ self.cell[0]
        return torch.einsum("...a,...ab->...b", offsets, self.cell[structure])

    def pair_vectors(self, pairs: Pairs) -> Tensor:
        """``R[second] - R[first]`` with periodic offsets, ``(n_pairs, 3)`` angstrom."""
        vectors = self.positions[pairs.second] - self.positions[pairs.first]
        if pairs.offsets is not None:
            vectors = vectors + self.lattice_shift(pairs.offsets, self.segment[pairs.first])
        return vectors

    def neighbor_vectors(self) -> Tensor:
        """Vectors from each atom to its neighbours, ``(n_atoms, n_slots, 3)`` angstrom; zero for padding."""
        table = self.neighbors
        vectors = self.positions[table.index] - self.positions[:, None]
        if table.offsets is not None:
            vectors = vectors + self.lattice_shift(table.offsets, self.segment[:, None].expand_as(table.index))
        return vectors

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields changed (what was derived from the old fields is derived anew)."""
        return dataclasses.replace(self, **changes)

    def at(self, positions: Tensor, cell: Tensor | None = None, external_potential: Tensor | None = None) -> Batch:
        """The same atoms and pairs at other positions; what was derived from atoms and pairs is kept."""
        moved = copy.copy(self)
        moved.positions, moved.cell, moved.external_potential = positions, cell, external_potential
        return moved

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """A copy on another device, floating-point fields in another dtype."""

        def move(x: Any) -> Any:
            if isinstance(x, Pairs):
                return Pairs(*(move(getattr(x, f.name)) for f in dataclasses.fields(x)))
            if isinstance(x, Tensor):
                return x.to(device=device, dtype=dtype if x.is_floating_point() else None)
            return x

        return Batch(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})


def collate(structures: Sequence[Structure], dtype: torch.dtype = torch.float64) -> Batch:
    """Lay structures end to end, without pair lists (`Potential.batch` adds those).

    Raises `ValueError` for no structures, or for a mixture of open and periodic ones.
    """
    if len(structures) == 0:
        raise ValueError("structures: expected at least one, got none")
    periodic = {s.cell is not None for s in structures}
    if len(periodic) != 1:
        raise ValueError("structures: expected all open or all periodic, got a mixture")
    sizes = torch.tensor([len(s) for s in structures])
    cell = torch.tensor(np.stack([s.cell for s in structures]), dtype=dtype) if periodic == {True} else None  # type: ignore[misc]
    return Batch(
        numbers=torch.from_numpy(np.concatenate([s.numbers for s in structures])),
        positions=torch.tensor(np.concatenate([s.positions for s in structures]), dtype=dtype),
        segment=torch.repeat_interleave(torch.arange(len(structures)), sizes),
        charge=torch.tensor([float(s.charge) for s in structures], dtype=dtype),
        multiplicity=torch.tensor([float(s.multiplicity) for s in structures], dtype=dtype),
        cell=cell,
    )
