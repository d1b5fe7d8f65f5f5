"""The fused kernel of `native_kernel.cpp`: compiled once per machine, called through ctypes, for MD on the CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openmm_mlff.potentials import native

SOURCE = Path(__file__).with_name("native_kernel.cpp")
FLAGS = (*native.FLAGS, "-fopenmp-simd", "-Wno-psabi")
#: alignment of vectors in bytes
ALIGNMENT = 64
#: additions that put one variant together for one permutation cost about this many sums of one pair
COST_OF_ADDITION = 2
#: work (units of pairs and variants times training points) below which a second thread costs more than it gains
WORK_PER_THREAD = 2_000_000


def compiled(source: Path) -> ctypes.CDLL:
    """A C++ file compiled for this machine, once; raises `RuntimeError` if it cannot be compiled."""
    return native.library(source, FLAGS)


@functools.cache
def library() -> ctypes.CDLL:
    """The fused kernel for this machine; raises `RuntimeError` if it cannot be compiled."""
    code = compiled(SOURCE)
    code.gdml_lanes.restype = code.gdml_work.restype = ctypes.c_int64
    code.gdml_work.argtypes = [ctypes.c_void_p]
    code.gdml_evaluate.restype = code.gdml_descriptors.restype = None
    code.gdml_evaluate.argtypes = code.gdml_descriptors.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        *[ctypes.c_void_p] * 4,
    ]
    return code


# -- classes of pairs ----------------------------------------------------------------------------------------------


@dataclass
class Classes:
    """Pairs of atoms that the permutations move alike.

    Attributes:
        pairs: of each class, pair indices ``(n_pairs,)``. variant: of each permutation and class, which of the class's
            variants it makes, ``(S, n_classes)``. source: of each class, where each variant takes its pairs from,
            ``(n_pairs, n_variants)``.
    """

    pairs: list[np.ndarray]
    variant: np.ndarray
    source: list[np.ndarray]


def classes_of(pair_permutations: np.ndarray) -> Classes:
    """Sort pairs into classes so that little is computed twice.

    A class of n pairs with v variants costs n v sums over training points, and S additions that put the variants
    together. Starting from pairs with equal partitions of the permutations, the two classes whose union saves most are
    joined until none saves anything.

    Args:
        pair_permutations: ``(S, D)``, permutation s takes pair k of the permuted query from pair [s, k].
    """
    n_perms = len(pair_permutations)
    members: dict[bytes, list[int]] = {}
    labels: dict[bytes, np.ndarray] = {}
    for k, moved in enumerate(pair_permutations.T):
        label = _label(moved)
        labels.setdefault(label.tobytes(), label)
        members.setdefault(label.tobytes(), []).append(k)
    groups = [(np.array(members[key]), labels[key]) for key in members]
    saved = np.full((len(groups), len(groups)), -1)
    for k in range(1, len(groups)):
        saved[k, :k] = _saved(groups[k], groups[:k])
    while len(groups) > 1 and saved.max() > 0:
        a, b = (int(i) for i in np.unravel_index(saved.argmax(), saved.shape))
        joint = _label(groups[a][1] * n_perms + groups[b][1])
        groups[b] = np.sort(np.concatenate([groups[a][0], groups[b][0]])), joint
        del groups[a]
        saved = np.delete(np.delete(saved, a, 0), a, 1)
        saved[b, :b] = _saved(groups[b], groups[:b])
        saved[b + 1 :, b] = _saved(groups[b], groups[b + 1 :])
    source = []
    for pairs, label in groups:
        first = np.array([int(np.flatnonzero(label == v)[0]) for v in range(label.max() + 1)])
        source.append(pair_permutations[np.ix_(first, pairs)].T)
    return Classes([g[0] for g in groups], np.stack([g[1] for g in groups], axis=1), source)


def _saved(one: tuple[np.ndarray, np.ndarray], others: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Sums over training points that are saved if a class of pairs is joined to each of the others."""
    pairs, label = one
    if not others:
        return np.zeros(0, dtype=np.int64)
    codes = np.sort((label * len(label) + np.stack([other for _, other in others])).astype(np.int32), axis=1)
    joint = 1 + np.count_nonzero(np.diff(codes, axis=1), axis=1)
    sizes = np.array([len(other) for other, _ in others])
    parts = len(pairs) * (label.max() + 1) + sizes * np.array([other.max() + 1 for _, other in others])
    return parts + COST_OF_ADDITION * len(label) - (len(pairs) + sizes) * joint


def _label(values: np.ndarray) -> np.ndarray:
    """Values renamed 0, 1, 2, ... in the order of their first appearance."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


# -- the kernel ------------------------------------------------------------------------------------------------------


class _Model(ctypes.Structure):
    """`Model` of the C++ source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("atoms", "pairs", "blocks", "perms", "classes", "variants", "units")),
        *((name, ctypes.c_double) for name in ("sigma", "shift")),
        *((name, ctypes.c_void_p) for name in ("points", "coefficients", "energies")),
        *(
            (name, ctypes.c_void_p)
            for name in ("class_pairs", "class_variants", "variant", "members", "ends", "source", "centre")
        ),
        *((name, ctypes.c_void_p) for name in ("lattice", "inverse", "images")),
        ("n_images", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("power", "square")),
    )


class FusedKernel:
    """``kernel(positions (B, N, 3)) -> energies (B,), forces (B, N, 3)`` in numpy, eV and angstrom.

    Args of the constructor: numpy arrays as the attributes of `GDMLPotential`, pair permutations ``(S, D)``, and the
    lattice that wraps pair vectors, rows ``(3, 3)``, or None. `image_sums` holds what `images.fused_terms` gives if the
    descriptor is sums over images.

    Raises `RuntimeError` if the kernel cannot be compiled.
    """

    def __init__(
        self,
        n_atoms: int,
        sigma: float,
        shift: float,
        descriptors: np.ndarray,
        coefficients: np.ndarray,
        pair_permutations: np.ndarray,
        energy_coefficients: np.ndarray | None = None,
        lattice: np.ndarray | None = None,
        image_sums: tuple[np.ndarray | None, float, float] | None = None,
    ) -> None:
        self._library = library()
        self._lanes = int(self._library.gdml_lanes())
        classes = classes_of(pair_permutations)
        order = np.concatenate(classes.pairs)
        centre = descriptors.mean(0)
        n_variants = np.array([s.shape[1] for s in classes.source])
        starts = np.cumsum(n_variants) - n_variants
        members = [np.flatnonzero(classes.variant[:, c] == v) for c, n in enumerate(n_variants) for v in range(n)]
        n_blocks = -(-len(descriptors) // self._lanes)
        arrays = {
            "points": self._blocks((descriptors - centre)[:, order], n_blocks),
            "coefficients": self._blocks(coefficients[:, order], n_blocks),
            "class_pairs": _aligned(np.array([len(p) for p in classes.pairs], dtype=np.int64)),
            "class_variants": _aligned(n_variants.astype(np.int64)),
            "variant": _aligned((classes.variant + starts).astype(np.int64)),
            "members": _aligned(np.concatenate(members).astype(np.int64)),
            "ends": _aligned(np.cumsum([len(m) for m in members]).astype(np.int64)),
            "source": _aligned(np.concatenate([s.ravel() for s in classes.source]).astype(np.int32)),
            "centre": _aligned(
                np.concatenate(
                    [np.repeat(centre[p], n) for p, n in zip(classes.pairs, n_variants.tolist(), strict=True)]
                )
            ),
        }
        if energy_coefficients is not None:
            arrays["energies"] = self._blocks(energy_coefficients[:, None], n_blocks)
        if lattice is not None:
            arrays["lattice"] = _aligned(np.array(lattice, dtype=np.float64))
            arrays["inverse"] = _aligned(np.linalg.inv(lattice))
        shifts, power, cutoff = image_sums or (None, 0.0, 0.0)
        if shifts is not None:
            arrays["images"] = _aligned(shifts)
        self.n_atoms, self.n_pairs = n_atoms, len(order)
        self.n_units = len(arrays["source"])
        self._arrays = arrays  # kept alive: the C++ side holds their addresses
        self._model = _Model(
            n_atoms,
            len(order),
            n_blocks,
            len(pair_permutations),
            len(n_variants),
            int(n_variants.sum()),
            self.n_units,
            sigma,
            shift,
            n_images=0 if shifts is None else len(shifts),
            power=power,
            square=cutoff**2,
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        self._address = ctypes.addressof(self._model)
        self._cost = self.n_units * len(descriptors)
        self._work = [self._workspace()]
        self._energies, self._inputs, self._forces = np.zeros(1), np.zeros((1, n_atoms, 3)), np.zeros((1, n_atoms, 3))
        arrays_of_one = (self._inputs, self._energies, self._forces, self._work[0])
        self._addresses = (self._address, 1, *(array.ctypes.data for array in arrays_of_one))

    def _blocks(self, rows: np.ndarray, n_blocks: int) -> np.ndarray:
        """``(M, D)`` -> ``(blocks, D, lanes)``, padded with zeros."""
        padded = np.zeros((n_blocks * self._lanes, rows.shape[1]))
        padded[: len(rows)] = rows
        return _aligned(padded.reshape(n_blocks, self._lanes, -1).transpose(0, 2, 1))

    def _workspace(self) -> np.ndarray:
        return _aligned(np.zeros(int(self._library.gdml_work(self._address))))

    def __call__(self, positions: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces; `positions` ``(B, N, 3)`` float64, C-contiguous."""
        n = len(positions)
        if n == 1:
            return self.one(positions)
        energies, forces = np.empty(n), np.empty(positions.shape)
        self._run(self._library.gdml_evaluate, positions, energies, forces, threads)
        return energies, forces

    def one(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energy ``(1,)`` and forces ``(1, N, 3)`` of one geometry ``(N, 3)``, at the least cost; not thread-safe."""
        # asking an array for its address takes as long as the kernel needs for a small molecule: these stay in place
        self._inputs[...] = positions
        self._library.gdml_evaluate(*self._addresses)
        return self._energies.copy(), self._forces.copy()

    def descriptor_forces(self, x: np.ndarray, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(B,)`` and -dE/dx ``(B, D)`` of descriptors ``(B, D)`` that were computed elsewhere."""
        energies, forces = np.empty(len(x)), np.empty(x.shape)
        self._run(self._library.gdml_descriptors, x, energies, forces, threads)
        return energies, forces

    def _run(
        self, function: Callable[..., None], inputs: np.ndarray, energies: np.ndarray, forces: np.ndarray, threads: int
    ) -> None:
        n = len(inputs)
        parts = max(1, min(threads, n, n * self._cost // WORK_PER_THREAD))
        while len(self._work) < parts:
            self._work.append(self._workspace())
        if parts == 1:
            work = self._work[0].ctypes.data
            function(self._address, n, inputs.ctypes.data, energies.ctypes.data, forces.ctypes.data, work)
            return
        edges = [n * k // parts for k in range(parts + 1)]

        def run(k: int) -> None:
            part = slice(edges[k], edges[k + 1])
            addresses = [array[part].ctypes.data for array in (inputs, energies, forces)]
            function(self._address, edges[k + 1] - edges[k], *addresses, self._work[k].ctypes.data)

        # ctypes releases the interpreter lock
        list(_pool(threads).map(run, range(parts)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gdml")


def _aligned(array: np.ndarray) -> np.ndarray:
    """A contiguous copy whose data start at a multiple of `ALIGNMENT` bytes."""
    raw = np.empty(array.nbytes + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    result = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result
