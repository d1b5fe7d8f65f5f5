"""SpookyNets of one config in one call of native code: geometry once, each network with its derivatives by hand.

``cpp/spookynet.cpp`` is compiled once per model size and precision (seconds) and kept on disk. It gives the numbers of
the torch form to rounding; whether it does is looked at on the first frame of every run.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch
from openmm_mlff.potentials import native
from openmm_mlff.potentials.neighbors import VerletPairs
from openmm_spookynet.model import SpookyNet
from openmm_spookynet.native_weights import Atoms, MemberRecord

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpp") / "spookynet.cpp"
#: what native code and torch form may differ by in the forces of the first frame, eV/angstrom
TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-8}
#: its working memory is about 100 kB per atom
MOST_ATOMS = 1000
#: fewer atoms than this do not keep a thread busy
ATOMS_PER_THREAD = 24
#: in the order of the C++ source
CONSERVATIONS = ("uniform", "shared", "local")
_POINTER = ctypes.c_void_p


def unsupported(model: SpookyNet, batch: Batch) -> str | None:
    """Why the native code cannot run a model for these atoms, or None."""
    c, lanes = model.config, 64 // torch.finfo(model.dtype).bits * 8
    if model.device.type != "cpu" or native.compiler() is None:
        return "the native code needs a CPU and a C++ compiler"
    if c.activation != "swish" or not c.use_irreps or c.charge_conservation not in CONSERVATIONS:
        return "the native code knows the swish activation and spherical harmonics only"
    if c.embed_after > 0 and c.use_nonlinear_embedding:
        return "the native code knows no nonlinear embedding after modules"
    if c.num_features % lanes or c.num_random_features % lanes:
        return f"the native code takes features in multiples of {lanes}"
    if model.long_range_method != "shifted":
        return f"the native code knows no {model.long_range_method} sums"
    if int(batch.counts.max()) > MOST_ATOMS:
        return f"the native code takes up to {MOST_ATOMS} atoms"
    return None


@functools.cache
def library(features: int, random: int, radial: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The native code for one model size and precision; raises `RuntimeError` if it cannot be compiled."""
    real = {torch.float32: "float", torch.float64: "double"}[dtype]
    sizes = (f"-DFEATURES={features}", f"-DRANDOM={random}", f"-DRADIAL={radial}", f"-DREAL={real}")
    code = native.library(SOURCE, (*native.FLAGS, *native.with_headers(SOURCE.parent), *sizes, "-Wno-attributes"))
    code.spookynet_members.restype = None
    code.spookynet_members.argtypes = [_POINTER, ctypes.c_int64, *[_POINTER] * 4]
    return code


class _Numbers(ctypes.Structure):
    """`Numbers` of the C++ source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "slots", "n_long", "modules", "embed_after", "exp_weighting")),
        *((name, ctypes.c_int64) for name in ("attention", "conservation", "repulsion", "electrostatics")),
        ("threads", ctypes.c_int64),
        *((name, _POINTER) for name in ("index", "mask", "shifts", "first", "second", "long_shifts")),
        *((name, _POINTER) for name in ("positions", "z", "potential")),
        *((name, ctypes.c_double) for name in ("cutoff", "long_cutoff", "total_charge")),
        ("binomial", _POINTER),
    )


def together(members: Sequence[SpookyNet], batch: Batch) -> Members | Parts | None:
    """`Members` of one structure, `Parts` of several, or None where the native code cannot run them."""
    reason = unsupported(members[0], batch)
    if reason is None:
        try:
            return Members(members, batch) if batch.n_structures == 1 else Parts(members, batch)
        except (RuntimeError, OSError) as error:
            reason = str(error).removeprefix("compile: ")
    logger.info("SpookyNet runs by torch: %s", reason)
    return None


class Members:
    """``arrays(positions, cell, potential)`` of all members for the atoms of one batch.

    Args:
        members: of one config; a single model is one member. batch: one structure (see `unsupported`).

    Attributes:
        pairs: the Verlet lists that all members share.
        tolerance: eV/angstrom, what forces may differ by from those of the torch form on the first frame.

    Raises `RuntimeError` if the code cannot be compiled.
    """

    def __init__(self, members: Sequence[SpookyNet], batch: Batch) -> None:
        first = members[0]
        c = first.config
        self.tolerance = TOLERANCE[first.dtype]
        self._code = library(c.num_features, c.num_random_features, c.num_basis_functions, first.dtype)
        exact = batch.to(dtype=torch.float64).replace(external_potential=None)
        self.pairs = VerletPairs(exact, first.cutoff, first.long_range, first.long_range_cutoff)
        self._atoms = [Atoms(m, exact.to(dtype=m.dtype)) for m in members]
        self._records = (MemberRecord * len(members))(*(a.record for a in self._atoms))
        self._shape = (len(members), batch.n_atoms, 3)
        self._periodic = batch.cell is not None
        self._z = batch.numbers.double().numpy()
        self._binomial = first.radial_basis.log_binomial.detach().double().exp().numpy()
        self._listed: Batch | None = None
        self._tables: dict[str, np.ndarray] = {}
        self._numbers = _Numbers(
            n=batch.n_atoms,
            modules=c.num_modules,
            embed_after=c.embed_after,
            exp_weighting=c.exp_weighting,
            attention=c.attention == "all",
            conservation=CONSERVATIONS.index(c.charge_conservation),
            repulsion=c.use_zbl_repulsion,
            electrostatics=c.use_electrostatics,
            z=self._z.ctypes.data,
            cutoff=first.cutoff,
            long_cutoff=first.long_range_cutoff or 0.0,
            total_charge=float(batch.charge[0]),
            binomial=self._binomial.ctypes.data,
        )

    def arrays(
        self, positions: np.ndarray, cell: np.ndarray | None = None, potential: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies ``(n_members, 1)`` eV, forces ``(n_members, n, 3)`` eV/angstrom, charges ``(n_members, n)`` e.

        Args:
            positions: ``(n, 3)`` angstrom. cell: ``(3, 3)`` or ``(1, 3, 3)`` angstrom, if periodic.
            potential: external electrostatic potential on the atoms, ``(n,)`` V.
        """
        exact = np.ascontiguousarray(positions, dtype=np.float64)
        if exact.shape != self._shape[1:]:
            raise ValueError(f"positions: expected shape {self._shape[1:]}, got {exact.shape}")
        if self._periodic and cell is None:
            raise ValueError("cell: expected box vectors, because the batch is periodic, got None")
        box = torch.as_tensor(cell, dtype=torch.float64).reshape(1, 3, 3) if self._periodic else None
        self._use(self.pairs.update(torch.from_numpy(exact), box), box)
        phi = None if potential is None else np.ascontiguousarray(potential, dtype=np.float64)
        if phi is not None and phi.shape != exact.shape[:1]:
            raise ValueError(f"potential: expected shape {exact.shape[:1]}, got {phi.shape}")
        self._numbers.threads = max(1, min(torch.get_num_threads(), len(exact) // ATOMS_PER_THREAD))
        self._numbers.positions = exact.ctypes.data
        self._numbers.potential = None if phi is None else phi.ctypes.data
        m = self._shape[0]
        energies, forces, charges = np.empty((m, 1)), np.empty(self._shape), np.empty(self._shape[:2])
        outputs = (x.ctypes.data for x in (energies, forces, charges))
        self._code.spookynet_members(ctypes.byref(self._numbers), m, self._records, *outputs)
        return energies, forces, charges

    def _use(self, batch: Batch, box: Tensor | None) -> None:
        """Hand over the lists of a batch, if they are new."""
        # the batch is the same object until its lists are rebuilt, which a changed box brings about too
        if batch is self._listed:
            return
        table, pairs = batch.neighbors, batch.long_range_pairs
        found = {"index": table.index.numpy(), "mask": table.mask.to(torch.uint8).numpy()}
        offsets = {"shifts": table.offsets}
        if pairs is not None:
            found |= {"first": pairs.first.numpy(), "second": pairs.second.numpy()}
            offsets["long_shifts"] = pairs.offsets
        found |= {k: (o.double() @ box[0]).numpy() for k, o in offsets.items() if o is not None and box is not None}
        self._tables = {name: np.ascontiguousarray(values) for name, values in found.items()}
        self._numbers.slots = table.index.shape[1]
        self._numbers.n_long = 0 if pairs is None else len(pairs)
        for name in ("index", "mask", "shifts", "first", "second", "long_shifts"):
            setattr(self._numbers, name, self._tables[name].ctypes.data if name in self._tables else None)
        self._listed = batch


class Parts:
    """`Members` for several structures laid end to end: one after the other by the same native code.

    Equal molecules whose lists never change share what was made for the first of them; others have their own lists.

    Attributes: pairs (`PartsPairs`), tolerance: see `Members`.
    """

    def __init__(self, members: Sequence[SpookyNet], batch: Batch) -> None:
        counts = batch.counts.tolist()
        ends = np.cumsum([0, *counts]).tolist()
        self._slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self._parts: list[Members] = []
        shared: dict[tuple[bytes, float, float], Members] = {}
        for k, atoms in enumerate(self._slices):
            one = Batch(
                numbers=batch.numbers[atoms],
                positions=batch.positions[atoms],
                segment=torch.zeros_like(batch.segment[atoms]),
                charge=batch.charge[k : k + 1],
                multiplicity=batch.multiplicity[k : k + 1],
                cell=None if batch.cell is None else batch.cell[k : k + 1],
            )
            key = one.numbers.numpy().tobytes(), float(one.charge), float(one.multiplicity)
            part = shared.get(key) or Members(members, one)
            if part.pairs.fixed:
                shared[key] = part
            self._parts.append(part)
        self.pairs: VerletPairs = PartsPairs(self._parts, self._slices, batch.positions)
        self.tolerance = self._parts[0].tolerance
        self._shape = (batch.n_atoms, 3)

    def arrays(
        self, positions: np.ndarray, cell: np.ndarray | None = None, potential: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Members.arrays`, of all structures: energies ``(n_members, n_structures)``, forces and charges of all
        atoms; cells ``(n_structures, 3, 3)``."""
        if positions.shape != self._shape:
            raise ValueError(f"positions: expected shape {self._shape}, got {positions.shape}")
        found = [
            part.arrays(
                positions[atoms], None if cell is None else cell[k], None if potential is None else potential[atoms]
            )
            for k, (part, atoms) in enumerate(zip(self._parts, self._slices, strict=True))
        ]
        energies, forces, charges = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return energies, forces, charges


class PartsPairs(VerletPairs):
    """The pair lists of several structures seen as one; each is built when its own atoms have moved.

    Attributes: reference, reference_cell: of all structures whose lists change; `start` stands for others, so that the
        torch form, which has one list of all structures, can be built there too.
    """

    def __init__(self, parts: Sequence[Members], slices: Sequence[slice], start: Tensor) -> None:
        self._start = start.detach().double()
        self._each = [(part.pairs, atoms) for part, atoms in zip(parts, slices, strict=True)]

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        return all(pairs.fixed for pairs, _ in self._each)

    @property
    def rebuilds(self) -> int:  # type: ignore[override]
        return max(pairs.rebuilds for pairs, _ in self._each)

    @property
    def reference(self) -> Tensor | None:  # type: ignore[override]
        found = [(pairs.reference, atoms) for pairs, atoms in self._each]
        if all(reference is None for reference, _ in found):
            return None
        whole = self._start.clone()
        for reference, atoms in found:
            if reference is not None:
                whole[atoms] = reference
        return whole

    @property
    def reference_cell(self) -> Tensor | None:  # type: ignore[override]
        cells = [pairs.reference_cell for pairs, _ in self._each]
        known = [cell for cell in cells if cell is not None]
        return torch.cat(known) if known and len(known) == len(cells) else None

    def restore(self, reference: Tensor | None, cell: Tensor | None = None) -> None:
        """As in the base class."""
        for k, (pairs, atoms) in enumerate(self._each):
            pairs.restore(None if reference is None else reference[atoms], None if cell is None else cell[k : k + 1])
