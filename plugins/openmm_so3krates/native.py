"""The engine of ``cpp/so3krates.cpp``: a model's weights packed for it, and its functions called through ctypes."""

from __future__ import annotations

import copy
import ctypes
import functools
import math
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from openmm_mlff.data.structures import SYMBOLS
from openmm_mlff.potentials import native
from openmm_so3krates import tables, terms
from openmm_so3krates.layers import MLP, Attention, Layer, Norm
from openmm_so3krates.model import SO3krates

SOURCE = Path(__file__).with_name("cpp") / "so3krates.cpp"
#: features come in multiples of this
FEATURES_MULTIPLE = 16
_POINTER = ctypes.c_void_p


def unsupported(model: SO3krates) -> str | None:
    """Why the engine cannot run a model, or None."""
    c = model.config
    if model.device.type != "cpu":
        return f"the native code runs on the CPU, not on {model.device}"
    if c.num_features % FEATURES_MULTIPLE:
        return f"the native code takes features in multiples of {FEATURES_MULTIPLE}, not {c.num_features}"
    if not c.degrees or c.degrees[0] == 0:
        return f"the native code takes degrees from 1 to 4, not {c.degrees}"
    if c.qk_normalization:
        return "the native code does not normalise queries and keys"
    return None


@functools.cache
def library(features: int, heads: int, degrees: tuple[int, ...], dtype: torch.dtype) -> ctypes.CDLL:
    """The engine for one model size and precision; raises `RuntimeError` if it cannot be compiled."""
    flags = (
        *native.FLAGS,
        *native.with_headers(SOURCE.parent),
        "-Wno-psabi",
        f"-DREAL={'float' if dtype == torch.float32 else 'double'}",
        *(f"-DFEATURES={features}", f"-DHEADS={heads}", f"-DDEGREES={','.join(map(str, degrees))}"),
    )
    code = native.library(SOURCE, flags)
    for name in ("layer_arrays", "lanes", "forward", "backward", "bytes"):
        getattr(code, f"so3krates_{name}").restype = ctypes.c_int64
    code.so3krates_new.restype = _POINTER
    code.so3krates_new.argtypes = [_POINTER] * 3
    code.so3krates_delete.argtypes = code.so3krates_bytes.argtypes = [_POINTER]
    code.so3krates_atoms.argtypes = [_POINTER, ctypes.c_int64, ctypes.c_int64, *[_POINTER] * 4]
    code.so3krates_pairs.argtypes = [_POINTER, ctypes.c_int64, ctypes.c_int64, *[_POINTER] * 3]
    code.so3krates_search.restype = ctypes.c_double
    code.so3krates_search.argtypes = [_POINTER] * 3 + [ctypes.c_double] * 2 + [ctypes.c_int64, _POINTER]
    code.so3krates_listed.argtypes = [_POINTER] * 2
    code.so3krates_list.argtypes = [_POINTER, ctypes.c_int64, *[_POINTER] * 3]
    code.so3krates_listed.restype = code.so3krates_list.restype = None
    code.so3krates_forward.argtypes = [_POINTER, ctypes.c_int64, *[_POINTER] * 4]
    code.so3krates_backward.argtypes = [_POINTER] * 4
    return code


class _Numbers(ctypes.Structure):
    """`Numbers` of the C++ source, field by field."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("cutoff", "divisor", "initial_divisor")),
        *((name, ctypes.c_int64) for name in ("knots", "cosine", "rms", "n_layers", "group", "types")),
        *((name, ctypes.c_int64) for name in ("energy_width", "charge_width", "hirshfeld_width")),
        *((name, _POINTER) for name in ("head", "head_back", "head_bias", "last", "last_bias", "nuclear")),
        ("screening", ctypes.c_double * 8),
        *((name, ctypes.c_double) for name in ("repulsion_reach", "coulomb")),
        ("pair_table", _POINTER),
        ("long_knots", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("long_step", "long_limit")),
        ("free_atoms", _POINTER),
        *((name, ctypes.c_double) for name in ("hartree", "bohr", "radius_factor", "damping_factor")),
    )


class Weights:
    """A model's weights in the order and shapes that the engine takes; kept alive as long as the engine.

    Attributes:
        types: row of each element in the tables, by atomic number.
    """

    def __init__(self, model: SO3krates, lanes: int, electrostatics: bool) -> None:
        self.dtype, self.lanes = model.dtype, lanes
        self.kept: list[np.ndarray] = []
        exact = copy.deepcopy(model).double()
        c = model.config
        elements = list(c.elements)
        self.types = np.full(max(elements) + 1, -1, dtype=np.int32)
        self.types[elements] = np.arange(len(elements))
        size = math.lcm(c.num_features // c.num_heads, c.num_features // len(c.degrees), lanes)
        self.group = size if c.num_features % size == 0 else c.num_features
        self.knots = tables.filter_knots(model, model.dtype)
        self.spherical = [t > 0 or c.initial_euclidean != "zeros" for t in range(c.num_layers)]
        layers = [self._layer(exact, t) for t in range(c.num_layers)]
        self.layers = np.array(layers, dtype=np.uintp)
        self.numbers = _Numbers(
            cutoff=model.cutoff,
            divisor=model.message_divisor,
            initial_divisor=0.0 if c.initial_euclidean == "zeros" else c.avg_num_neighbors,
            knots=self.knots,
            cosine=c.cutoff_function == "cosine",
            rms=c.normalization == "rms",
            n_layers=c.num_layers,
            group=self.group,
            types=len(elements),
            **self._heads(exact, elements),
            **self._pairs(exact, elements, electrostatics),
        )

    # -- packing -------------------------------------------------------------------------------------------------

    def _keep(self, values: Tensor, dtype: torch.dtype | None = None) -> int:
        """A copy in the engine's precision, aligned to cache lines; returns its address."""
        array = values.detach().to(dtype or self.dtype).contiguous().numpy()
        raw = np.empty(array.nbytes + 64, dtype=np.uint8)
        start = -raw.ctypes.data % 64
        raw[start : start + array.nbytes].view(array.dtype)[:] = array.ravel()
        self.kept.append(raw)
        return int(raw.ctypes.data + start)

    def _padded(self, values: Tensor, *axes: int) -> Tensor:
        """Zeros behind the given axes, up to whole vectors."""
        for axis in axes:
            shape = list(values.shape)
            shape[axis] = -shape[axis] % self.lanes
            values = torch.cat([values, values.new_zeros(shape)], axis)
        return values

    def _layer(self, model: SO3krates, t: int) -> list[int]:
        layer = cast(Layer, model.layers[t])
        block, scalars = layer.attention, layer.scalars
        weights = [1.0] * 4 if scalars is None else [float(x) for x in scalars]
        filters = [f.spherical for f in (block.filter_features, block.filter_euclidean) if f is not None]
        first = [cast(MLP, f).first for f in filters]
        second = [self._padded(cast(MLP, f).second.weight.T, 0) for f in filters]  # (HIDDEN, F)
        table = tables.filter_table(model, t, self.knots, not self.spherical[t])
        packed = [
            self._keep(table),
            self._keep(torch.cat([self._padded(f.weight.T, 1) for f in first], 1)),
            self._keep(torch.cat([self._padded(f.bias, 0) for f in first])),
            self._keep(torch.stack(second)),
            self._keep(torch.stack([s.T for s in second])),
        ]
        features, euclidean = block.attention_features, cast(Attention, block.attention_euclidean)
        projections = [features.query, euclidean.query, features.key, euclidean.key, block.value * weights[0]]
        groups = torch.stack([self._grouped(p) for p in projections])  # (5, groups, in, out)
        packed += [self._keep(groups), self._keep(groups.transpose(-1, -2))]
        packed += self._norm(layer.norm_1) + self._mlp(layer.mlp_1, weights[1])
        scale = torch.ones(model.config.num_features + len(model.config.degrees), dtype=torch.float64)
        scale[: model.config.num_features] = weights[2]
        w, bias = layer.exchange.linear.weight * scale[:, None], layer.exchange.linear.bias * scale
        packed += [self._keep(self._padded(w.T, 1)), self._keep(self._padded(w, 1)), self._keep(self._padded(bias, 0))]
        return packed + self._norm(layer.norm_2) + self._mlp(layer.mlp_2, weights[3])

    def _grouped(self, weight: Tensor) -> Tensor:
        """Blocks (head, out, in) on a diagonal -> blocks (group, in, out) of whole vectors."""
        whole = torch.block_diag(*weight)
        n = len(whole) // self.group
        return torch.stack(
            [whole[k * self.group : (k + 1) * self.group, k * self.group : (k + 1) * self.group].T for k in range(n)]
        )

    def _norm(self, norm: Norm | None) -> list[int]:
        if norm is None:
            return [0, 0]
        return [self._keep(norm.scale), 0 if norm.bias is None else self._keep(norm.bias)]

    def _mlp(self, mlp: MLP | None, weight: float) -> list[int]:
        if mlp is None:
            return [0] * 6
        a, b = mlp.first, mlp.second
        return [
            *(self._keep(a.weight.T), self._keep(a.weight), self._keep(a.bias)),
            *(self._keep(b.weight.T * weight), self._keep(b.weight * weight), self._keep(b.bias * weight)),
        ]

    def _heads(self, model: SO3krates, elements: list[int]) -> dict[str, Any]:
        """First layers of all heads as one, and last layers with what belongs to the element."""
        scale, offset = model.energy_scale[elements], model.energy_offset[elements]
        first = [model.energy_hidden]
        last = [model.energy_out.weight * scale[:, None]]  # (types, width)
        constant = [model.energy_out.bias * scale + offset]
        c = model.config
        if c.predict_charges:
            first.append(model.charge_head.first)
            last.append(model.charge_head.second.weight.expand(len(elements), -1))
            constant.append(model.charge_head.second.bias + model.charge_bias[elements])
        if c.predict_hirshfeld:
            out, query = model.hirshfeld_head.second, model.hirshfeld_query[elements] / math.sqrt(c.hirshfeld_features)
            first.append(model.hirshfeld_head.first)
            last.append(query @ out.weight)
            constant.append(query @ out.bias + model.hirshfeld_shift[elements])
        widths = [self._padded(f.bias, 0).numel() for f in first]
        hidden = torch.cat([self._padded(f.weight.T, 1) for f in first], 1)
        values = torch.zeros(len(elements), 3, dtype=torch.float64)
        columns = [0, *([1] if c.predict_charges else []), *([2] if c.predict_hirshfeld else [])]
        for k, value in zip(columns, constant, strict=True):
            values[:, k] = value.detach()
        by_column = dict(zip(columns, widths, strict=True))
        return {
            "energy_width": by_column[0],
            "charge_width": by_column.get(1, 0),
            "hirshfeld_width": by_column.get(2, 0),
            "head": self._keep(hidden),
            "head_back": self._keep(hidden.T),
            "head_bias": self._keep(torch.cat([self._padded(f.bias, 0) for f in first])),
            "last": self._keep(torch.cat([self._padded(x, 1) for x in last], 1)),
            "last_bias": self._keep(values, torch.float64),
        }

    def _pairs(self, model: SO3krates, elements: list[int], electrostatics: bool) -> dict[str, Any]:
        """Repulsion, electrostatics and dispersion."""
        z = torch.tensor(elements, dtype=torch.float64)
        table = tables.long_range_table(model, electrostatics, self.dtype)
        free = torch.ones(len(elements), 2, dtype=torch.float64)
        if model.dispersion is not None:
            alpha, c6 = model.dispersion.free_atoms(torch.tensor(elements), torch.float64)
            free = torch.stack([alpha, c6 / alpha.square()], 1)
        nuclear, screening = 0, [0.0] * 8
        if model.repulsion is not None:
            r = model.repulsion
            power, scale, weights, rates = (
                softplus(raw.detach()) for raw in (r.power_raw, r.scale_raw, r.weights_raw, r.exponents_raw)
            )
            nuclear = self._keep(torch.stack([z, z**power * scale], 1), torch.float64)
            screening = [*rates.tolist(), *(weights / weights.sum()).tolist()]
        limit = model.long_range_cutoff
        n = len(table) - 1
        end = tables.BARE_FROM * model.config.electrostatic_sigma if limit is None else limit
        return {
            "nuclear": nuclear,
            "screening": (ctypes.c_double * 8)(*screening),
            "repulsion_reach": terms.REPULSION_REACH,
            "coulomb": terms.COULOMB,
            "pair_table": self._keep(table),
            "long_knots": n,
            "long_step": end / n,
            "long_limit": limit or 0.0,
            "free_atoms": self._keep(free),
            "hartree": 0.0 if model.dispersion is None else terms.HARTREE,
            "bohr": terms.BOHR,
            "radius_factor": terms.FINE_STRUCTURE ** (-4.0 / 21.0),
            "damping_factor": model.config.dispersion_scale * 2.0 * 2.54,
        }


#: weights that were packed last for a model, and what they depend on
_packed: weakref.WeakKeyDictionary[SO3krates, tuple[tuple[Any, ...], Weights]] = weakref.WeakKeyDictionary()


def packed(model: SO3krates, lanes: int, electrostatics: bool) -> Weights:
    """`Weights` of a model, made once as long as it does not change."""
    tensors = tuple((t.data_ptr(), t._version) for t in model.parameters())
    key = (lanes, electrostatics, model.dtype, model.long_range_cutoff, tensors)
    found = _packed.get(model)
    if found is None or found[0] != key:
        found = key, Weights(model, lanes, electrostatics)
        _packed[model] = found
    return found[1]


class Engine:
    """One model in native code, for the atoms of one batch.

    Args:
        electrostatics: False where the energy of the charges is computed elsewhere (k-space).

    Raises `RuntimeError` if the code cannot be compiled.
    """

    def __init__(self, model: SO3krates, electrostatics: bool = True) -> None:
        c = model.config
        self._code = library(c.num_features, c.num_heads, c.degrees, model.dtype)
        self._weights = packed(model, int(self._code.so3krates_lanes()), electrostatics)
        assert self._weights.layers.shape == (c.num_layers, self._code.so3krates_layer_arrays())
        spherical = np.array(self._weights.spherical, dtype=np.int64)
        numbers = ctypes.addressof(self._weights.numbers)
        self._engine = self._code.so3krates_new(numbers, self._weights.layers.ctypes.data, spherical.ctypes.data)
        if not self._engine:
            raise RuntimeError("compile: not enough memory for the native code")
        self._release = weakref.finalize(self, self._code.so3krates_delete, self._engine)

    def set_atoms(self, numbers: np.ndarray, segment: np.ndarray, charge: np.ndarray, x0: np.ndarray) -> None:
        """Atomic numbers and structures ``(N,)``, total charges ``(n_structures,)``, initial features ``(N, F)``.

        Raises `ValueError` for an element that the model was not made for.
        """
        known = self._weights.types
        strange = [int(z) for z in numbers if z >= len(known) or known[z] < 0]
        if strange:
            raise ValueError(f"elements: expected atoms that the model was made for, got {SYMBOLS[strange[0]]}")
        types, segment = known[numbers], segment.astype(np.int32)
        charge = np.ascontiguousarray(charge, dtype=np.float64)
        x0 = np.ascontiguousarray(x0, dtype=np.float32 if self._weights.dtype == torch.float32 else np.float64)
        self._charges, self._ratios = np.empty(len(numbers)), np.empty(len(numbers))
        self._energies, self._forces = np.empty(len(charge)), np.empty((len(numbers), 3))
        self._out = [x.ctypes.data for x in (self._charges, self._ratios, self._energies, self._forces)]
        addresses = [x.ctypes.data for x in (types, segment, charge, x0)]
        self._code.so3krates_atoms(self._engine, len(numbers), len(charge), *addresses)

    def set_pairs(self, first: np.ndarray, second: np.ndarray, shift: np.ndarray | None, long_range: bool) -> None:
        """A half list ``(P,)`` with lattice shifts ``(P, 3)``; `long_range` or within the cutoff (and a skin)."""
        first, second = (np.ascontiguousarray(x, dtype=np.int32) for x in (first, second))
        shift = None if shift is None else np.ascontiguousarray(shift, dtype=np.int16)
        addresses = [None if x is None else x.ctypes.data for x in (first, second, shift)]
        self._code.so3krates_pairs(self._engine, int(long_range), len(first), *addresses)

    def search(
        self, positions: np.ndarray, cell: np.ndarray | None, reach: float, long_reach: float, threads: int
    ) -> tuple[float, tuple[int, int]]:
        """Make both lists: all pairs within `reach` and, where it is not 0, within `long_reach` (angstrom).

        Positions and cells as for `forward`. Returns the smallest distance (infinite without pairs), and its atoms.
        """
        box = None if cell is None else cell.ctypes.data
        closest = (ctypes.c_int64 * 2)()
        distance = self._code.so3krates_search(
            self._engine, positions.ctypes.data, box, reach, long_reach, threads, ctypes.addressof(closest)
        )
        self._check(distance < 0)
        return float(distance), (closest[0], closest[1])

    def lists(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """First and second atoms ``(P,)`` and lattice shifts ``(P, 3)`` of both lists; shifts are 0 in open systems."""
        sizes = (ctypes.c_int64 * 2)()
        self._code.so3krates_listed(self._engine, ctypes.addressof(sizes))
        found = []
        for which, n in enumerate(sizes):
            first, second = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32)
            shift = np.zeros((n, 3), dtype=np.int16)
            addresses = [x.ctypes.data for x in (first, second, shift)]
            self._code.so3krates_list(self._engine, which, *addresses)
            found.append((first, second, shift))
        return found

    def forward(self, positions: np.ndarray, cell: np.ndarray | None, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Charges (e) and Hirshfeld ratios ``(N,)``, valid until the next call.

        Args: positions ``(N, 3)`` and cells ``(n_structures, 3, 3)`` angstrom, float64, contiguous.
        """
        box = None if cell is None else cell.ctypes.data
        self._check(
            self._code.so3krates_forward(self._engine, threads, positions.ctypes.data, box, self._out[0], self._out[1])
        )
        return self._charges, self._ratios

    def backward(self, outside: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n_structures,)`` eV and forces ``(N, 3)`` eV/angstrom of what `forward` saw.

        `outside`: dE/dq ``(N,)`` V of energies that act on the charges and are not in the result; the forces hold
        what these do through the charges.
        """
        address = None if outside is None else outside.ctypes.data
        self._check(self._code.so3krates_backward(self._engine, address, self._out[2], self._out[3]))
        return self._energies.copy(), self._forces.copy()

    @property
    def memory(self) -> int:
        """Bytes that the engine holds for one evaluation."""
        return int(self._code.so3krates_bytes(self._engine))

    def _check(self, failed: bool | int) -> None:
        if failed:
            raise MemoryError(f"the native code of {SO3krates.family} ran out of memory")
