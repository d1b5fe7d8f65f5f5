"""A SpookyNet's weights, and what its atoms decide without positions, as ``cpp/spookynet.cpp`` reads them."""

from __future__ import annotations

import copy
import ctypes
import math
import weakref
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from openmm_mlff.data.structures import Batch
from openmm_spookynet import dispersion
from openmm_spookynet.layers import Activation, ElectronicEmbedding, Linear, ResidualBlock, ResidualMLP
from openmm_spookynet.model import Heads, InteractionModule, SpookyNet

_POINTER = ctypes.c_void_p


class _D4(ctypes.Structure):
    """`D4` of the C++ source, field by field."""

    _fields_ = (
        ("kinds", ctypes.c_int64),
        *((name, _POINTER) for name in ("kind", "c6", "bond", "polarity", "size_squared", "radius")),
        *((name, _POINTER) for name in ("count_weight", "count_mask", "count")),
        *((name, _POINTER) for name in ("unmatched", "reference_charge", "effective_charge", "hardness")),
        *((name, ctypes.c_double) for name in ("s6", "s8", "bohr", "hartree")),
        *((name, ctypes.c_double) for name in ("count_steepness", "charge_steepness", "switch_width")),
    )


class MemberRecord(ctypes.Structure):
    """`Member` of the C++ source, field by field."""

    _fields_ = (
        *((name, _POINTER) for name in ("arrays", "blocks", "numbers", "x", "center", "spd", "attended")),
        *((name, _POINTER) for name in ("output", "bias")),
        *((name, _POINTER * 2) for name in ("value", "key")),
        ("d4", ctypes.POINTER(_D4)),
    )


class _Kept:
    """Arrays whose addresses are handed to native code; valid as long as this object lives."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._arrays: list[np.ndarray] = []
        self._dtype = dtype

    def plain(self, values: np.ndarray) -> int:
        """The address of an array as it is."""
        array = np.ascontiguousarray(values)
        self._arrays.append(array)
        return int(array.ctypes.data)

    def exact(self, values: Tensor) -> int:
        """The address of a copy in double precision."""
        return self.plain(values.detach().double().numpy())

    def keep(self, values: Tensor) -> int:
        """The address of a copy in the model's precision, aligned to cache lines."""
        array = values.detach().to(self._dtype).contiguous().numpy()
        raw = np.empty(array.nbytes + 64, dtype=np.uint8)
        start = -raw.ctypes.data % 64
        raw[start : start + array.nbytes].view(array.dtype)[:] = array.ravel()
        self._arrays.append(raw)
        return int(raw.ctypes.data + start)


class Weights(_Kept):
    """A model's weights in the order that the native code reads them.

    Attributes: fields: those of `MemberRecord` that all molecules share.
    """

    def __init__(self, model: SpookyNet) -> None:
        super().__init__(model.dtype)
        c = model.config
        arrays: list[int] = []
        for t, module in enumerate(cast(list[InteractionModule], list(model.interactions))):
            arrays += self._module(module, first=t == 0)
        depths = [c.num_residual_local_x, c.num_residual_local_s, c.num_residual_local_p, c.num_residual_local_d]
        depths += [c.num_residual_nonlocal_q, c.num_residual_nonlocal_k, c.num_residual_nonlocal_v, c.num_residual_pre]
        depths += [c.num_residual_local, c.num_residual_post, c.num_residual_output, c.num_residual_electron]
        for embedding in _embeddings(model):
            arrays += self._network(embedding.mlp, None)
        self.fields = {
            "arrays": self.plain(np.array(arrays, dtype=np.uint64)),
            "blocks": self.plain(np.array(depths, dtype=np.int64)),
            "numbers": self.plain(_numbers_of(model)),
            "output": self.exact(model.output.weight),
        }

    def _module(self, module: InteractionModule, first: bool) -> list[int]:
        found: list[int] = []
        if not first:
            for block in module.residual_pre:
                found += self._block(cast(ResidualBlock, block), None)
            for group, place in _places(module.heads):
                found += self._network(cast(ResidualMLP, module.heads.groups[group]), place)
            if module.attention is not None:
                omega = module.attention.omega
                found += [self.keep(omega), self.keep(omega.T)]
        radial = module.radial.weight
        # rows of radial functions in whole vectors
        more = -radial.shape[0] % (64 // radial.element_size())
        padded = torch.cat([radial, radial.new_zeros(more, radial.shape[1])])
        found += [self.keep(padded), self.keep(padded.T)]
        for projection in (module.projection_p, module.projection_d):
            found += [self.keep(projection.weight.T), self.keep(projection.weight)]
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
        return [self.keep(p if head is None else p[head]) for p in (activation.alpha, activation.beta)]

    def _linear(self, linear: Linear, head: int | None) -> list[int]:
        weight = linear.weight if head is None else linear.weight[head]
        bias = linear.bias if head is None or linear.bias is None else linear.bias[head]
        return [self.keep(weight), self.keep(weight.T), 0 if bias is None else self.keep(bias)]


#: weights that were packed last for a model, and the tensors that they came from
_packed: weakref.WeakKeyDictionary[SpookyNet, tuple[tuple[Any, ...], Weights]] = weakref.WeakKeyDictionary()


def packed(model: SpookyNet) -> Weights:
    """`Weights` of a model, made once as long as it does not change."""
    key = tuple((t.data_ptr(), t._version, t.dtype) for t in [*model.parameters(), *model.buffers()])
    found = _packed.get(model)
    if found is None or found[0] != key:
        found = key, Weights(model)
        _packed[model] = found
    return found[1]


class Atoms(_Kept):
    """What a model's atoms decide without positions, for one structure.

    Attributes: record: what is handed over; valid as long as this object lives.
    """

    def __init__(self, model: SpookyNet, batch: Batch) -> None:
        super().__init__(model.dtype)
        with torch.no_grad():
            fixed = model.fixed(batch)
        self._weights = packed(model)
        messages = fixed["messages"]
        self.record = MemberRecord(
            **self._weights.fields,
            x=self.keep(messages.x),
            center=self.keep(messages.center),
            spd=self.keep(messages.spd),
            attended=None if messages.nonlocal_ is None else self.keep(messages.nonlocal_),
            bias=self.exact(fixed["bias"]),
        )
        for k, (embedding, amount) in enumerate(
            zip(_embeddings(model), (batch.charge, batch.multiplicity - 1), strict=False)
        ):
            value, key = _embedded(embedding, amount)
            if bool(value.any()):
                self.record.value[k], self.record.key[k] = self.keep(value), self.keep(key)
        if model.dispersion is not None:
            self.record.d4 = ctypes.pointer(self._dispersion(model.dispersion, fixed["d4"]))

    def _dispersion(self, model: dispersion.D4Dispersion, fixed: dispersion.FixedD4) -> _D4:
        kinds, first = np.unique(fixed.kind.numpy(), return_index=True)
        one = torch.from_numpy(first)  # an atom of each kind
        s6, s8 = (float(softplus(raw.detach().double())) for raw in (model.s6_raw, model.s8_raw))
        return _D4(
            kinds=len(kinds),
            kind=self.plain(fixed.kind.numpy()),
            c6=self.exact(fixed.reference_c6[one]),
            **{name: self.exact(getattr(fixed, name)) for name in ("bond", "polarity", "size_squared", "radius")},
            **{name: self.exact(getattr(fixed, name)[one]) for name in ("count_weight", "count_mask", "count")},
            **{name: self.exact(getattr(fixed, name)[one]) for name in ("unmatched", "reference_charge")},
            **{name: self.exact(getattr(fixed, name)[one]) for name in ("effective_charge", "hardness")},
            s6=s6,
            s8=s8,
            bohr=dispersion.BOHR,
            hartree=dispersion.HARTREE,
            count_steepness=dispersion.KN,
            charge_steepness=dispersion.CHARGE_STEEPNESS,
            switch_width=dispersion.SWITCH_WIDTH,
        )


# -- details -------------------------------------------------------------------------------------------------------


def _embeddings(model: SpookyNet) -> tuple[ElectronicEmbedding, ...]:
    """Those of charge and spin, where they enter after modules."""
    if model.config.embed_after == 0:
        return ()
    return cast(ElectronicEmbedding, model.charge_embedding), cast(ElectronicEmbedding, model.spin_embedding)


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
