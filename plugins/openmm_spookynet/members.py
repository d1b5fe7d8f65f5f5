"""Members of an ensemble in one call of native code: geometry once, each member's network with its derivatives by hand.

``cpp/spookynet.cpp`` is compiled once per model size and precision (seconds) and kept on disk. It gives the numbers of
the torch form to rounding; whether it does is looked at on the first frame of every run.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from openmm_mlff.data.structures import Batch
from openmm_mlff.potentials import native
from openmm_mlff.potentials.neighbors import FIXED_PAIRS_MAX_ATOMS, VerletPairs
from openmm_spookynet.layers import Activation, ElectronicEmbedding, Linear, ResidualBlock, ResidualMLP
from openmm_spookynet.model import Heads, InteractionModule, SpookyNet

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpp") / "spookynet.cpp"
#: what native code and torch form may differ by in the forces of the first frame, eV/angstrom
TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-8}
#: its working memory is about 100 kB per atom
MOST_ATOMS = 1000
#: in the order of the C++ source
CONSERVATIONS = ("uniform", "shared", "local")
_POINTER = ctypes.c_void_p


def unsupported(model: SpookyNet, batch: Batch) -> str | None:
    """Why the native code cannot run a model for these atoms, or None."""
    c, lanes = model.config, 64 // torch.finfo(model.dtype).bits * 8
    if model.device.type != "cpu" or native.compiler() is None:
        return "the native code needs a CPU and a C++ compiler"
    if c.activation != "swish" or c.use_d4_dispersion or not c.use_irreps or c.charge_conservation not in CONSERVATIONS:
        return "the native code knows the swish activation, spherical harmonics and no D4"
    if c.embed_after > 0 and c.use_nonlinear_embedding:
        return "the native code knows no nonlinear embedding after modules"
    if c.num_features % lanes or c.num_random_features % lanes:
        return f"the native code takes features in multiples of {lanes}"
    if model.long_range_method != "shifted":
        return f"the native code knows no {model.long_range_method} sums"
    if int(batch.counts.max()) > MOST_ATOMS:
        return f"the native code takes up to {MOST_ATOMS} atoms"
    if batch.n_structures > 1 and (
        batch.cell is not None or batch.n_atoms > batch.n_structures * FIXED_PAIRS_MAX_ATOMS
    ):
        return "the native code takes one structure, or copies of an open molecule whose pair lists never change"
    if batch.n_structures > 1 and not _alike(batch):
        return "the native code takes one structure, or copies of it"
    return None


def _alike(batch: Batch) -> bool:
    """Whether all structures have the same atoms, charge and multiplicity."""
    if len(set(batch.counts.tolist())) > 1:
        return False
    numbers = batch.numbers.view(batch.n_structures, -1)
    rows = torch.stack([batch.charge, batch.multiplicity], 1)
    return bool((numbers == numbers[:1]).all() and (rows == rows[:1]).all())


@functools.cache
def library(features: int, random: int, radial: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The native code for one model size and precision; raises `RuntimeError` if it cannot be compiled."""
    digest = hashlib.sha256()
    for header in sorted(SOURCE.parent.glob("*.hpp")):
        digest.update(header.read_bytes())
    real = {torch.float32: "float", torch.float64: "double"}[dtype]
    sizes = (f"-DFEATURES={features}", f"-DRANDOM={random}", f"-DRADIAL={radial}", f"-DREAL={real}")
    # headers belong to the key under which the library is kept
    flags = (*native.FLAGS, *sizes, "-Wno-attributes", f"-DHEADERS=0x{digest.hexdigest()[:8]}")
    code = native.library(SOURCE, flags)
    code.spookynet_members.restype = None
    code.spookynet_members.argtypes = [_POINTER, ctypes.c_int64, *[_POINTER] * 4]
    return code


class _Numbers(ctypes.Structure):
    """`Numbers` of the C++ source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "slots", "n_long", "modules", "embed_after", "exp_weighting")),
        *((name, ctypes.c_int64) for name in ("attention", "conservation", "repulsion", "electrostatics")),
        *((name, _POINTER) for name in ("index", "mask", "shifts", "first", "second", "long_shifts")),
        *((name, _POINTER) for name in ("positions", "z", "potential")),
        *((name, ctypes.c_double) for name in ("cutoff", "long_cutoff", "total_charge")),
        ("binomial", _POINTER),
    )


class _Member(ctypes.Structure):
    """`Member` of the C++ source, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("arrays", "blocks", "numbers", "x", "center", "spd", "attended")),
        *((name, _POINTER) for name in ("output", "bias")),
        *((name, _POINTER * 2) for name in ("value", "key")),
    )


class Weights:
    """A member's weights in the order that the native code reads them, and its part without positions.

    Attributes: record: what is handed over; valid as long as this object lives.
    """

    def __init__(self, model: SpookyNet, fixed: dict[str, Any], batch: Batch) -> None:
        self._kept: list[np.ndarray] = []
        self._dtype = model.dtype
        c = model.config
        arrays: list[int] = []
        for t, module in enumerate(cast(list[InteractionModule], list(model.interactions))):
            arrays += self._module(module, first=t == 0)
        depths = [c.num_residual_local_x, c.num_residual_local_s, c.num_residual_local_p, c.num_residual_local_d]
        depths += [c.num_residual_nonlocal_q, c.num_residual_nonlocal_k, c.num_residual_nonlocal_v, c.num_residual_pre]
        depths += [c.num_residual_local, c.num_residual_post, c.num_residual_output, c.num_residual_electron]
        embeddings = (model.charge_embedding, model.spin_embedding) if c.embed_after > 0 else ()
        for embedding in embeddings:
            arrays += self._network(cast(ResidualMLP, embedding.mlp), None)
        messages = fixed["messages"]
        self.record = _Member(
            arrays=self._plain(np.array(arrays, dtype=np.uint64)),
            blocks=self._plain(np.array(depths, dtype=np.int64)),
            numbers=self._plain(_numbers_of(model)),
            x=self._keep(messages.x),
            center=self._keep(messages.center),
            spd=self._keep(messages.spd),
            attended=None if messages.nonlocal_ is None else self._keep(messages.nonlocal_),
            output=self._plain(model.output.weight.detach().double().numpy()),
            bias=self._plain(fixed["bias"].detach().double().numpy()),
        )

        for k, (embedding, amount) in enumerate(zip(embeddings, (batch.charge, batch.multiplicity - 1), strict=False)):
            value, key = _embedded(cast(ElectronicEmbedding, embedding), amount)
            if bool(value.any()):
                self.record.value[k], self.record.key[k] = self._keep(value), self._keep(key)

    def _plain(self, values: np.ndarray) -> int:
        array = np.ascontiguousarray(values)
        self._kept.append(array)
        return int(array.ctypes.data)

    def _keep(self, values: Tensor) -> int:
        """A copy in the model's precision, aligned to cache lines; returns its address."""
        array = values.detach().to(self._dtype).contiguous().numpy()
        raw = np.empty(array.nbytes + 64, dtype=np.uint8)
        start = -raw.ctypes.data % 64
        raw[start : start + array.nbytes].view(array.dtype)[:] = array.ravel()
        self._kept.append(raw)
        return int(raw.ctypes.data + start)

    def _module(self, module: InteractionModule, first: bool) -> list[int]:
        found: list[int] = []
        if not first:
            for block in module.residual_pre:
                found += self._block(cast(ResidualBlock, block), None)
            for group, place in _places(module.heads):
                found += self._network(cast(ResidualMLP, module.heads.groups[group]), place)
            if module.attention is not None:
                omega = module.attention.omega
                found += [self._keep(omega), self._keep(omega.T)]
        radial = module.radial.weight
        # rows of radial functions in whole vectors
        more = -radial.shape[0] % (64 // radial.element_size())
        padded = torch.cat([radial, radial.new_zeros(more, radial.shape[1])])
        found += [self._keep(padded), self._keep(padded.T)]
        for projection in (module.projection_p, module.projection_d):
            found += [self._keep(projection.weight.T), self._keep(projection.weight)]
        found += self._network(module.local, None)
        for block in module.residual_post:
            found += self._block(cast(ResidualBlock, block), None)
        return found + self._network(module.output, None)

    def _network(self, network: ResidualMLP, head: int | None) -> list[int]:
        found: list[int] = []
        for block in network.blocks:
            found += self._block(cast(ResidualBlock, block), head)
        return found + self._activation(network.activation, head) + self._linear(network.linear, head)

    def _block(self, block: ResidualBlock, head: int | None) -> list[int]:
        return [
            *self._activation(block.activation1, head),
            *self._linear(block.linear1, head),
            *self._activation(block.activation2, head),
            *self._linear(block.linear2, head),
        ]

    def _activation(self, activation: Activation, head: int | None) -> list[int]:
        return [self._keep(p if head is None else p[head]) for p in (activation.alpha, activation.beta)]

    def _linear(self, linear: Linear, head: int | None) -> list[int]:
        weight = linear.weight if head is None else linear.weight[head]
        bias = linear.bias if head is None or linear.bias is None else linear.bias[head]
        return [self._keep(weight), self._keep(weight.T), 0 if bias is None else self._keep(bias)]


def _places(heads: Heads) -> list[tuple[int, int]]:
    """For every head in order, which group of networks it is in and at which place."""
    found = {h: (g, k) for g, members in enumerate(heads.members) for k, h in enumerate(members)}
    return [found[h] for h in range(heads.n)]


def _embedded(embedding: ElectronicEmbedding, amount: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a total charge or spin ``(1,)``, and what features are multiplied by for its shares, ``(F,)`` each.

    As in `ElectronicEmbedding.forward` for one structure; what is the same for all atoms is no part of the shares.
    """
    exact = copy.deepcopy(embedding).double()
    a = amount.double()
    e = torch.stack([a.relu(), (-a).relu()], -1) if embedding.signed else a.abs()[:, None]
    key = exact.linear_q.weight.T @ exact.linear_k(e / e.clamp(min=1))[0]
    return exact.linear_v(e)[0], key / math.sqrt(len(key))


def _numbers_of(model: SpookyNet) -> np.ndarray:
    """alpha of the radial functions, then power, divisor, weights and exponents of the repulsion, float64."""
    values = [softplus(model.radial_basis.alpha_raw.detach().double())[None]]
    repulsion = model.repulsion
    if repulsion is not None:
        power, divisor, weights, exponents = (
            softplus(raw.detach().double())
            for raw in (repulsion.power_raw, repulsion.divisor_raw, repulsion.weights_raw, repulsion.exponents_raw)
        )
        values += [power[None], divisor[None], weights / weights.sum(), exponents]
    return torch.cat(values).numpy()


def together(members: Sequence[SpookyNet], batch: Batch) -> Members | Copies | None:
    """`Members`, of copies of a molecule `Copies`, or None where the native code cannot run them."""
    reason = unsupported(members[0], batch)
    if reason is None:
        try:
            return Members(members, batch) if batch.n_structures == 1 else Copies(members, batch)
        except (RuntimeError, OSError) as error:
            reason = str(error).removeprefix("compile: ")
    logger.info("members run one after the other: %s", reason)
    return None


class Members:
    """``arrays(positions, cell, potential)`` of all members for the atoms of one batch.

    Args:
        members: of one config. batch: one structure (see `unsupported`).

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
        with torch.no_grad():
            self._weights = [self._pack(m, exact.to(dtype=m.dtype)) for m in members]
        self._records = (_Member * len(members))(*(w.record for w in self._weights))
        self._shape = (len(members), batch.n_atoms, 3)
        self._periodic = batch.cell is not None
        self._z = batch.numbers.double().numpy()
        self._binomial = first.radial_basis.log_binomial.detach().double().exp().numpy()
        self._listed: Any = None
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

    @staticmethod
    def _pack(model: SpookyNet, batch: Batch) -> Weights:
        return Weights(model, model.fixed(batch), batch)

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
        self._numbers.positions = exact.ctypes.data
        self._numbers.potential = None if phi is None else phi.ctypes.data
        m = self._shape[0]
        energies, forces, charges = np.empty((m, 1)), np.empty(self._shape), np.empty(self._shape[:2])
        outputs = (x.ctypes.data for x in (energies, forces, charges))
        self._code.spookynet_members(ctypes.byref(self._numbers), m, self._records, *outputs)
        return energies, forces, charges

    def _use(self, batch: Batch, box: Tensor | None) -> None:
        """Hand over the lists of a batch, if they are new."""
        # the pair list is the same object until it is rebuilt, which a changed box brings about too
        if batch.pairs is self._listed:
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
        self._listed = batch.pairs


class Copies:
    """`Members` for copies of one open molecule, laid end to end: one copy after the other by the same native code.

    Attributes: pairs, tolerance: see `Members`.
    """

    def __init__(self, members: Sequence[SpookyNet], batch: Batch) -> None:
        self._n, self._size = batch.n_structures, batch.n_atoms // batch.n_structures
        first = Batch(
            numbers=batch.numbers[: self._size],
            positions=batch.positions[: self._size],
            segment=batch.segment[: self._size],
            charge=batch.charge[:1],
            multiplicity=batch.multiplicity[:1],
        )
        self._one = Members(members, first)
        self.pairs, self.tolerance = self._one.pairs, self._one.tolerance

    def arrays(
        self, positions: np.ndarray, cell: np.ndarray | None = None, potential: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Members.arrays`, of all copies: energies ``(n_members, n)``, forces and charges of all atoms."""
        if positions.shape != (self._n * self._size, 3):
            raise ValueError(f"positions: expected shape {(self._n * self._size, 3)}, got {positions.shape}")
        each = [slice(k * self._size, (k + 1) * self._size) for k in range(self._n)]
        found = [self._one.arrays(positions[a], None, None if potential is None else potential[a]) for a in each]
        energies, forces, charges = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return energies, forces, charges
