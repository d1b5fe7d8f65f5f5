"""A second NequIP, with loops over atoms, pairs and paths in numpy and float64; published files with random weights.

It reads arrays by the names they have in a published file and shares no code with the package. It computes everything
that the published program does, whether or not the energy depends on it. Spherical harmonics come from scipy;
Clebsch-Gordan coefficients are what rotations leave unchanged, with signs as in e3nn.
"""

from __future__ import annotations

import itertools
import math
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y

#: sign of the first coefficient, in the order of indices, that is not zero
SIGNS = {
    (0, 0, 0): 1, (0, 1, 1): 1, (0, 2, 2): 1, (1, 0, 1): 1, (1, 1, 0): 1, (1, 1, 1): 1, (1, 1, 2): -1, (1, 2, 1): 1,
    (1, 2, 2): -1, (2, 0, 2): 1, (2, 1, 1): 1, (2, 1, 2): 1, (2, 2, 0): 1, (2, 2, 1): -1, (2, 2, 2): -1,
}  # fmt: skip
ALL = ("0o", "0e", "1o", "1e", "2o", "2e")


def harmonics(u: np.ndarray, degree: int) -> np.ndarray:
    """Real harmonics with the square sum 2l+1; the polar axis is y, and m = -1, 0, 1 of l = 1 are x, y, z."""
    theta, phi = math.acos(np.clip(u[1], -1, 1)), math.atan2(u[0], u[2])
    values = []
    for m in range(-degree, degree + 1):
        y = sph_harm_y(degree, abs(m), theta, phi) * (-1.0) ** m
        values.append(y.real if m == 0 else math.sqrt(2) * (y.real if m > 0 else y.imag))
    return math.sqrt(4 * math.pi) * np.array(values)


def rotated(degree: int, turn: np.ndarray) -> np.ndarray:
    """D with Y(turn u) = D Y(u), fitted to the harmonics themselves."""
    points = np.random.default_rng(0).normal(size=(20, 3))
    points /= np.linalg.norm(points, axis=1)[:, None]
    before, after = (np.array([harmonics(p, degree) for p in x]) for x in (points, points @ turn.T))
    return np.linalg.lstsq(before, after, rcond=None)[0].T


@cache
def coupling(a: int, b: int, c: int) -> np.ndarray:
    """The tensor (2a+1, 2b+1, 2c+1) of norm 1 that no rotation changes."""
    conditions = []
    for seed in range(3):
        turn = Rotation.random(random_state=seed).as_matrix()
        d = np.kron(np.kron(rotated(a, turn), rotated(b, turn)), rotated(c, turn))
        conditions.append(d - np.eye(len(d)))
    values, vectors = np.linalg.svd(np.concatenate(conditions))[1:]
    assert values[-1] < 1e-12 and (len(values) == 1 or values[-2] > 1e-3)
    found = vectors[-1]
    first = found[np.abs(found) > 1e-9][0]
    return (found * np.sign(first) * SIGNS[a, b, c]).reshape(2 * a + 1, 2 * b + 1, 2 * c + 1)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def paths(irreps: tuple[str, ...], max_degree: int) -> list[tuple[str, int, str]]:
    found = []
    for a, b in itertools.product(irreps, range(max_degree + 1)):
        parity = (1 if a[1] == "e" else -1) * (-1) ** b
        for c in range(abs(int(a[0]) - b), int(a[0]) + b + 1):
            if f"{c}{'e' if parity > 0 else 'o'}" in irreps:
                found.append((a, b, f"{c}{'e' if parity > 0 else 'o'}"))
    return found


class PlainNequIP:
    """``energy(numbers, positions, cell)``: what the network puts out, before any scale and shift.

    `rows` says which row of the element axes belongs to which atomic number.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        rows: dict[int, int],
        irreps: tuple[str, ...] = ALL,
        max_degree: int = 2,
        cutoff: float = 4.0,
        onset: float = 3.5,
        neighbors: float = 15.0,
        length: float = 100.0,
    ) -> None:
        self.arrays, self.rows, self.irreps, self.max_degree = arrays, rows, irreps, max_degree
        self.cutoff, self.onset, self.neighbors, self.length = cutoff, onset, neighbors, length
        self.paths = paths(irreps, max_degree)
        self.layers = 1 + max(int(m[1]) for name in arrays if (m := re.match(r"NequIPConvolution_(\d+)", name)))

    def weight(self, group: str, irrep: str, slot: int = 0) -> np.ndarray:
        """The array of a group whose input is `irrep`; of several, the one with the `slot`-th output."""
        found = [
            n for n in self.arrays if n.startswith(f"{group}/w") and f"x{irrep}," in n.split()[-1].split(",")[0] + ","
        ]
        found.sort(key=lambda n: int(n.split("]")[0].split(",")[-1]))
        return self.arrays[found[slot]]

    def basis(self, r: float) -> np.ndarray:
        rc, ro = self.cutoff, self.onset
        f = self.arrays["BesselEmbedding_0/frequencies"]
        s = 1.0 if r < ro else (rc**2 - r**2) ** 2 * (rc**2 + 2 * r**2 - 3 * ro**2) / (rc**2 - ro**2) ** 3
        return 2 / rc * np.sin(f * r / rc) / r * s

    def energy(self, numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray | None = None) -> float:
        rows = [self.rows[int(z)] for z in numbers]
        edges = []
        for i, j, d in pairs(positions, cell, self.cutoff):
            r = float(np.linalg.norm(d))
            edges.append((i, j, self.basis(r), [harmonics(d / r, b) for b in range(self.max_degree + 1)]))
        table = self.weight("Linear_0", f"{0}e")
        h = {"0e": np.array([table[row][:, None] for row in rows]) / math.sqrt(self.length)}  # (atoms, channels, m)
        for t in range(self.layers):
            h = self.layer(f"NequIPConvolution_{t}", h, rows, edges)
        first, second = self.weight("Linear_1", "0e"), self.weight("Linear_2", "0e")
        x = h["0e"][:, :, 0] @ first / math.sqrt(first.shape[0]) @ second / math.sqrt(second.shape[0])
        return float(x.sum())

    def layer(self, name: str, h: dict[str, np.ndarray], rows: list[int], edges: list[Any]) -> dict[str, np.ndarray]:
        n, features = len(rows), h["0e"].shape[1]
        gated = [x for x in self.irreps if x[0] != "0"]
        sums = {
            x: [np.zeros((n, features, 2 * int(x[0]) + 1)) for p in self.paths if p[2] == x and p[0] in h]
            for x in self.irreps
        }
        g = {
            x: np.einsum("uv,num->nvm", self.weight(f"{name}/Linear_0", x) / math.sqrt(features), v)
            for x, v in h.items()
        }
        dense = sorted(k for k in self.arrays if k.startswith(f"{name}/MLP_0/"))
        for i, j, basis, y in edges:
            w = basis
            for k in dense[:-1]:
                w = silu(w @ self.arrays[k])
            w = (w @ self.arrays[dense[-1]]).reshape(len(self.paths), features)
            seen = dict.fromkeys(self.irreps, 0)
            for p, (a, b, c) in enumerate(self.paths):
                if a in h:
                    block = math.sqrt(2 * int(c[0]) + 1) * coupling(int(a[0]), b, int(c[0]))
                    sums[c][seen[c]][i] += (
                        w[p][:, None] * np.einsum("ijk,ui,j->uk", block, g[a][j], y[b]) / self.neighbors
                    )
                    seen[c] += 1
        out: dict[str, list[np.ndarray]] = {}
        for x in self.irreps:
            blocks = 1 + len(gated) if x == "0e" else 1
            parts = [np.zeros((n, features, 2 * int(x[0]) + 1)) for _ in range(blocks)]
            if sums[x]:
                received = np.concatenate(sums[x], 1)
                for k in range(blocks):
                    weight = self.weight(f"{name}/Linear_1", x, k) / math.sqrt(received.shape[1])
                    parts[k] = parts[k] + np.einsum("uv,num->nvm", weight, received)
            if x in h:
                whole = self.weight(f"{name}/FullyConnectedTensorProductE3nn_0", x) / math.sqrt(features * self.length)
                for k, atom in itertools.product(range(blocks), range(n)):
                    weight = whole[:, rows[atom], k * features : (k + 1) * features]
                    parts[k][atom] += weight.T @ h[x][atom]
            if sums[x] or x in h:
                out[x] = parts
        new = {"0e": silu(out["0e"][0]) / 0.5964586854233045}
        if "0o" in out:
            new["0o"] = np.tanh(out["0o"][0]) / 0.6279282481638502
        for k, x in enumerate(gated):
            if x in out:
                new[x] = out[x][0] * silu(out["0e"][1 + k]) / 0.5964586854233045
        return {x: new[x] for x in self.irreps if x in new}


def pairs(positions: np.ndarray, cell: np.ndarray | None, cutoff: float) -> Iterator[tuple[int, int, np.ndarray]]:
    """Receiver, sender and R_receiver - R_sender of every pair of images within the cutoff, by brute force."""
    images = [np.zeros(3)]
    if cell is not None:
        span = np.ceil(cutoff * np.linalg.norm(np.linalg.inv(cell), axis=0)).astype(int) + 1
        images = [np.array(s) @ cell for s in itertools.product(*(range(-k, k + 1) for k in span))]
    for i, j, shift in itertools.product(range(len(positions)), range(len(positions)), images):
        d = positions[i] - positions[j] - shift
        if 1e-9 < np.linalg.norm(d) < cutoff:
            yield i, j, d


# -- published files -------------------------------------------------------------------------------------------------


def random_arrays(
    seed: int,
    features: int = 8,
    layers: int = 3,
    radial: tuple[int, ...] = (16, 16),
    basis: int = 8,
    irreps: tuple[str, ...] = ALL,
    max_degree: int = 2,
    length: int = 100,
) -> dict[str, np.ndarray]:
    """Arrays with the names, shapes and types of a published file; the numbers are random, of the published sizes."""
    rng = np.random.default_rng(seed)
    every, f = paths(irreps, max_degree), features
    gated = [x for x in irreps if x[0] != "0"]
    # outputs of a convolution: pseudoscalars, scalars and the gates' scalars, then the rest
    slots = [*(x for x in irreps if x == "0o"), "0e", *["0e"] * len(gated), *gated]
    merged = [x for x in irreps if x[0] == "0"] + gated
    out = {
        "BesselEmbedding_0/frequencies": np.pi * np.arange(1.0, basis + 1),
        f"Linear_0/w[0,{merged.index('0e')}] {length}x0e,{f}x0e": 10.0 * rng.normal(size=(length, f)),
    }
    present = ["0e"]
    for t in range(layers):
        name = f"NequIPConvolution_{t}"
        for i, x in enumerate(present):
            width = f * (1 + len(gated)) if x == "0e" else f
            label = f"w[{i},0,{merged.index(x)}] {f}x{x},{length}x0e,{width}x{x}"
            out[f"{name}/FullyConnectedTensorProductE3nn_0/{label}"] = 10.0 * rng.normal(size=(f, length, width))
            out[f"{name}/Linear_0/w[{i},{merged.index(x)}] {f}x{x},{f}x{x}"] = rng.normal(size=(f, f))
        ends = [c for a, _, c in every if a in present]
        for i, x in enumerate(x for x in ("0e", "0o", "1o", "1e", "2e", "2o") if x in ends):
            k = f * ends.count(x)
            for o in [o for o, slot in enumerate(slots) if slot == x]:
                out[f"{name}/Linear_1/w[{i},{o}] {k}x{x},{f}x{x}"] = rng.normal(size=(k, f))
        widths = [basis, *radial, f * len(every)]
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            gain = 1.0 if k == len(radial) else 2.0
            kernel = gain / math.sqrt(a) * rng.normal(size=(a, b))
            out[f"{name}/MLP_0/Dense_{k}/kernel"] = kernel.astype(np.float32)
        present = [x for x in merged if x in ends or x in present]
    out[f"Linear_1/w[{present.index('0e')},0] {f}x0e,{f // 2}x0e"] = rng.normal(size=(f, f // 2))
    out[f"Linear_2/w[0,0] {f // 2}x0e,1x0e"] = rng.normal(size=(f // 2, 1))
    return out


def write_published(path: Path, arrays: dict[str, np.ndarray], core: str = "numpy.core.multiarray") -> Path:
    """A pickle of the flax dictionary of jax arrays, as jax and a numpy with this name of its core write it."""
    tree: dict[str, Any] = {}
    with _modules_of_jax(core) as leaf:
        for name, array in arrays.items():
            *folders, last = name.split("/")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = leaf(array)
        path.write_bytes(pickle.dumps({"params": tree}, protocol=4))
    return path


@contextmanager
def _modules_of_jax(core: str) -> Iterator[Any]:
    """A class whose objects are pickled as jax pickles its arrays; modules that the pickle names exist meanwhile."""

    def _reconstruct_array(*arguments: Any) -> None:
        raise AssertionError("a reader called the function that the file names")

    def _reconstruct(*arguments: Any) -> None:
        raise AssertionError("a reader called the function that the file names")

    functions: dict[str, Any] = {"jax._src.array": _reconstruct_array, core: _reconstruct}
    before = {name: sys.modules.get(name) for name in ("jax", "jax._src", *functions)}
    for name in ("jax", "jax._src"):
        sys.modules.setdefault(name, ModuleType(name))
    for name, function in functions.items():
        function.__module__, function.__qualname__ = name, function.__name__
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        sys.modules[name] = module

    class Leaf:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __reduce__(self) -> Any:
            _, arguments, state = self.array.__reduce__()
            return _reconstruct_array, (_reconstruct, arguments, state, {"weak_type": False})

    try:
        yield Leaf
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
