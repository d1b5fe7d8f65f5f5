"""Electrostatics between the sites of an ML region and the fixed charges around them, with exact derivatives.

Sites are the ML atoms (and link atoms), sources are all charges that they feel. A charge q_i and a dipole mu_i on
site i have the energy q_i phi_i + mu_i . grad phi_i in the potential of the sources, which is, as OpenMM has it,

    phi_i = ke sum_j s_j g(r_ij)     g = 1/r                                      without cutoff
                                     g = 1/r + k r^2 - c,  r < cutoff             reaction field
                                     g = erfc(alpha r)/r,  r < cutoff, and a mesh  Ewald, by smooth particle mesh

Damping replaces 1/r by erf(r/b)/r: the source is a Gaussian cloud. With a mesh the periodic images of the ML region are
sources too, with fixed reference charges s_i: see `surroundings`.

Two implementations give the same numbers: C++ (`mm_field.cpp`), and numpy where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_mlff.potentials import native

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("mm_field.cpp")
#: of the B-splines, as in OpenMM
ORDER = 5
TWO_BY_SQRT_PI = 2.0 / np.sqrt(np.pi)


@dataclass(frozen=True)
class Kernel:
    """g(r) of the direct sum.

    Attributes:
        cutoff: angstrom; infinite for none. shift, square: c (1/angstrom) and k (1/angstrom^3) of the reaction field.
        alpha: 1/angstrom, of the Ewald sum; 0 for none.
    """

    cutoff: float = np.inf
    shift: float = 0.0
    square: float = 0.0
    alpha: float = 0.0

    @classmethod
    def reaction_field(cls, cutoff: float, dielectric: float) -> Kernel:
        """OpenMM's reaction field (User Guide, 'Coulomb interaction with cutoff'), zero at the cutoff."""
        square = (dielectric - 1.0) / (2.0 * dielectric + 1.0) / cutoff**3
        return cls(cutoff, 3.0 * dielectric / (2.0 * dielectric + 1.0) / cutoff, square)


@dataclass
class Slopes:
    """Of each pair, g'/r and (g'' - g'/r)/r^2 times the charge of the source, both ``(n,)``."""

    first: np.ndarray
    second: np.ndarray


class Pairs:
    """Pairs of a site and a source within the cutoff.

    Attributes:
        site, source: indices ``(n,)``. d: ``(n, 3)`` angstrom, from the source's nearest image to the site.
    """

    def __init__(
        self, source: np.ndarray, positions: np.ndarray, sites: np.ndarray, cell: np.ndarray | None, cutoff: float
    ) -> None:
        library = code()
        self.n_sites = len(sites)
        if library is None:
            self.site, self.source, self.d = _plain_pairs(source, positions, sites, cell, cutoff)
            return
        capacity = len(sites) * len(source) if np.isinf(cutoff) else 512 * len(sites)
        while True:
            self.site, self.source = np.empty(capacity, dtype=np.int32), np.empty(capacity, dtype=np.int32)
            self.d = np.empty((capacity, 3))
            n = library.mm_pairs(
                len(source), _at(source), _at(positions), len(sites), _at(sites), _at(cell), float(cutoff), capacity,
                _at(self.site), _at(self.source), _at(self.d),
            )  # fmt: skip
            if n <= capacity:
                break
            capacity = n + n // 8
        self.site, self.source, self.d = self.site[:n], self.source[:n], self.d[:n]

    def potential(
        self, charges: np.ndarray, kernel: Kernel, damping: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Slopes]:
        """phi ``(n_sites,)`` in e/angstrom, its gradient ``(n_sites, 3)``, and what `react` needs.

        Args:
            charges: of all particles. damping: b of each site in angstrom; 0 for none.
        """
        potential, gradient = np.zeros(self.n_sites), np.zeros((self.n_sites, 3))
        library = code()
        if library is None:
            g, slope, bend = radial(kernel, np.linalg.norm(self.d, axis=1), damping[self.site])
            q = charges[self.source]
            np.add.at(potential, self.site, q * g)
            np.add.at(gradient, self.site, (q * slope)[:, None] * self.d)
            return potential, gradient, Slopes(q * slope, q * bend)
        slopes = Slopes(np.empty(len(self.site)), np.empty(len(self.site)))
        parameters = np.array([kernel.shift, kernel.square, kernel.alpha])
        library.mm_direct(
            len(self.site), _at(self.site), _at(self.source), _at(self.d), _at(charges), _at(parameters), _at(damping),
            _at(potential), _at(gradient), _at(slopes.first), _at(slopes.second),
        )  # fmt: skip
        return potential, gradient, slopes

    def react(
        self,
        slopes: Slopes,
        charges: np.ndarray | None,
        dipoles: np.ndarray | None,
        site_forces: np.ndarray,
        forces: np.ndarray,
    ) -> None:
        """Add the forces between the sources and charges and dipoles on the sites, e^2/angstrom^2.

        Args:
            site_forces: ``(n_sites, 3)``. forces: of all particles ``(n, 3)``; gets those on the sources.
        """
        library = code()
        if library is None:
            f = np.zeros_like(self.d)
            if charges is not None:
                f -= (charges[self.site] * slopes.first)[:, None] * self.d
            if dipoles is not None:
                m = dipoles[self.site]
                f -= slopes.first[:, None] * m + (slopes.second * (m * self.d).sum(1))[:, None] * self.d
            np.add.at(site_forces, self.site, f)
            np.add.at(forces, self.source, -f)
            return
        library.mm_react(
            len(self.site), _at(self.site), _at(self.source), _at(self.d), _at(slopes.first), _at(slopes.second),
            _at(charges), _at(dipoles), _at(site_forces), _at(forces),
        )  # fmt: skip


class Mesh:
    """The reciprocal part of an Ewald sum on a grid (Essmann et al., J. Chem. Phys. 103, 8577 (1995)), B-splines of
    order 5, for one box at a time.

    Args of the constructor: alpha in 1/angstrom; numbers of grid points along the box vectors.
    """

    def __init__(self, alpha: float, grid: tuple[int, int, int]) -> None:
        self.alpha, self.grid = alpha, np.array(grid, dtype=np.int64)
        self._moduli = [_moduli(int(n)) for n in grid]
        self._cell: np.ndarray | None = None

    def set_box(self, cell: np.ndarray) -> None:
        """Box vectors as rows ``(3, 3)`` angstrom."""
        if self._cell is not None and np.array_equal(cell, self._cell):
            return
        self._cell, self.inverse = cell.copy(), np.ascontiguousarray(np.linalg.inv(cell))
        self.volume = abs(float(np.linalg.det(cell)))
        waves = [np.fft.fftfreq(n, 1.0 / n) for n in self.grid[:2]]
        waves.append(np.fft.rfftfreq(int(self.grid[2]), 1.0 / self.grid[2]))
        m = sum(
            w.reshape([-1 if k == axis else 1 for k in range(3)] + [1]) * self.inverse[:, axis]
            for axis, w in enumerate(waves)
        )
        square = np.square(m).sum(-1)
        square[0, 0, 0] = 1.0
        b = self._moduli
        filtered = np.exp(-np.square(np.pi / self.alpha) * square) / (np.pi * self.volume * square)
        filtered *= b[0][:, None, None] * b[1][None, :, None] * b[2][None, None, : m.shape[2]]
        filtered[0, 0, 0] = 0.0
        self._influence = torch.from_numpy(filtered)

    def spread(
        self,
        positions: np.ndarray,
        charges: np.ndarray,
        dipoles: np.ndarray | None = None,
        which: np.ndarray | None = None,
    ) -> np.ndarray:
        """Charges (and dipoles) on the grid; `which` picks rows."""
        values, library = np.zeros(tuple(self.grid)), code()
        if library is None:
            _plain_spread(self, values, positions, charges, dipoles, which)
        else:
            n = len(positions) if which is None else len(which)
            library.mm_spread(
                n, _at(which), _at(positions), _at(charges), _at(dipoles), _at(self.inverse), _at(self.grid),
                _at(values),
            )  # fmt: skip
        return values

    def potential(self, values: np.ndarray) -> np.ndarray:
        """The potential (1/angstrom) on the grid of what was spread, one grid or a stack of them."""
        transformed = torch.fft.rfftn(torch.from_numpy(values), dim=(-3, -2, -1))
        size = [int(n) for n in self.grid]
        return torch.fft.irfftn(transformed * self._influence, s=size, dim=(-3, -2, -1), norm="forward").numpy()

    def gather(
        self, values: np.ndarray, positions: np.ndarray, which: np.ndarray | None = None, second: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Potential ``(n,)``, gradient ``(n, 3)`` and, if asked for, second derivatives ``(n, 3, 3)`` at positions."""
        n = len(positions) if which is None else len(which)
        library = code()
        if library is None:
            return _plain_gather(self, values, positions, which, second)
        phi, gradient, hessian = np.empty(n), np.empty((n, 3)), np.empty((n, 3, 3)) if second else None
        library.mm_gather(
            n, _at(which), _at(positions), _at(self.inverse), _at(self.grid), _at(np.ascontiguousarray(values)),
            _at(phi), _at(gradient), _at(hessian),
        )  # fmt: skip
        return phi, gradient, hessian


# -- C++ ----------------------------------------------------------------------------------------------------------


@functools.cache
def code() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled."""
    try:
        library = native.library(SOURCE)
    except (RuntimeError, OSError) as error:
        logger.warning("electrostatic embedding runs in numpy, several times slower (%s)", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.mm_pairs.restype = number
    library.mm_pairs.argtypes = [
        number, pointer, pointer, number, pointer, pointer, ctypes.c_double, number, *[pointer] * 3
    ]  # fmt: skip
    for function, n in ((library.mm_direct, 10), (library.mm_react, 9), (library.mm_spread, 7), (library.mm_gather, 8)):
        function.restype = None
        function.argtypes = [number, *[pointer] * n]
    return library


def _at(array: np.ndarray | None) -> int | None:
    """The address of a contiguous array."""
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError("expected a C-contiguous array")
    return array.ctypes.data


# -- the same in numpy ----------------------------------------------------------------------------------------------


def radial(kernel: Kernel, r: np.ndarray, damping: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """g, g'/r and (g'' - g'/r)/r^2 at distances r; damping b in angstrom, 0 for none."""

    def erfc_by_r(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        e = torch.erfc(torch.from_numpy(scale * r)).numpy() / r
        gauss = TWO_BY_SQRT_PI * scale * np.exp(-np.square(scale * r))
        slope = -(e + gauss) / r**2
        return e, slope, (2.0 * scale**2 * gauss - 3.0 * slope) / r**2

    if kernel.alpha > 0.0:
        g, slope, bend = erfc_by_r(np.full_like(r, kernel.alpha))
    else:
        g, slope = 1.0 / r + kernel.square * r**2 - kernel.shift, -1.0 / r**3 + 2.0 * kernel.square
        bend = 3.0 / r**5
    b = np.broadcast_to(damping, r.shape)
    less = erfc_by_r(1.0 / np.where(b > 0.0, b, 1.0))
    return tuple(x - np.where(b > 0.0, y, 0.0) for x, y in zip((g, slope, bend), less, strict=True))  # type: ignore[return-value]


def _plain_pairs(
    source: np.ndarray, positions: np.ndarray, sites: np.ndarray, cell: np.ndarray | None, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d = sites[:, None] - positions[source][None]
    if cell is not None:
        for axis in (2, 1, 0):
            d -= np.rint(d[..., axis, None] / cell[axis, axis]) * cell[axis]
    site, index = np.nonzero(np.square(d).sum(-1) < cutoff**2)
    return site, source[index], np.ascontiguousarray(d[site, index])


def _splines(mesh: Mesh, positions: np.ndarray) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Grid indices ``(n, 5)`` along each axis, and the weights ``(n, 5)`` with two derivatives."""
    fractional = positions @ mesh.inverse
    t = (fractional - np.floor(fractional)) * mesh.grid
    first = np.floor(t).astype(np.int64)
    indices, weights = [], []
    for axis in range(3):
        w = t[:, axis] - first[:, axis]
        orders = [np.stack([1.0 - w, w])]
        for order in range(3, ORDER + 1):
            last = np.pad(orders[-1], ((1, 1), (0, 0)))
            k = np.arange(order)[:, None]
            orders.append(((w + order - 1 - k) * last[:-1] + (1 - w + k) * last[1:]) / (order - 1))
        slope = -np.diff(np.pad(orders[-2], ((1, 1), (0, 0))), axis=0)
        bend = np.diff(np.pad(orders[-3], ((2, 2), (0, 0))), n=2, axis=0)
        indices.append((first[:, axis, None] + np.arange(ORDER)) % mesh.grid[axis])
        weights.append([orders[-1].T, slope.T, bend.T])
    return indices, weights


def _flat(mesh: Mesh, indices: list[np.ndarray]) -> np.ndarray:
    """Places ``(n, 5, 5, 5)`` in the flat grid."""
    x, y, z = indices
    rows = x[:, :, None, None] * mesh.grid[1] + y[:, None, :, None]
    return rows * mesh.grid[2] + z[:, None, None, :]


def _product(weights: list[list[np.ndarray]], derivatives: tuple[int, int, int]) -> np.ndarray:
    a, b, c = (weights[axis][d] for axis, d in enumerate(derivatives))
    return a[:, :, None, None] * b[:, None, :, None] * c[:, None, None, :]


def _plain_spread(
    mesh: Mesh,
    values: np.ndarray,
    positions: np.ndarray,
    charges: np.ndarray,
    dipoles: np.ndarray | None,
    which: np.ndarray | None,
) -> None:
    rows = slice(None) if which is None else which
    indices, weights = _splines(mesh, positions[rows])
    amount = charges[rows][:, None, None, None] * _product(weights, (0, 0, 0))
    if dipoles is not None:
        along = dipoles[rows] @ mesh.inverse * mesh.grid
        for axis in range(3):
            unit = tuple(int(axis == k) for k in range(3))
            amount += along[:, axis, None, None, None] * _product(weights, unit)  # type: ignore[arg-type]
    places = _flat(mesh, indices).ravel()
    values += np.bincount(places, amount.ravel(), values.size).reshape(values.shape)


def _plain_gather(
    mesh: Mesh, values: np.ndarray, positions: np.ndarray, which: np.ndarray | None, second: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    indices, weights = _splines(mesh, positions if which is None else positions[which])
    around = values.reshape(-1)[_flat(mesh, indices)]

    def derivative(*axes: int) -> np.ndarray:
        orders: Any = tuple(axes.count(k) for k in range(3))
        return np.einsum("nxyz,nxyz->n", around, _product(weights, orders))

    # grid coordinates by angstrom
    scale = mesh.inverse * mesh.grid
    gradient = np.stack([derivative(k) for k in range(3)], axis=-1) @ scale.T
    if not second:
        return derivative(), gradient, None
    inner = np.stack([np.stack([derivative(a, b) for b in range(3)], axis=-1) for a in range(3)], axis=-2)
    return derivative(), gradient, scale @ inner @ scale.T


def _moduli(n: int) -> np.ndarray:
    """|b(m)|^2 of the Euler exponential splines for n grid points."""
    values = np.array([1.0, 0.0])
    for order in range(3, ORDER + 1):
        last = np.pad(values, 1)
        k = np.arange(order)
        values = ((order - 1 - k) * last[:-1] + (1 + k) * last[1:]) / (order - 1)
    phases = np.exp(2j * np.pi * np.outer(np.arange(n), np.arange(ORDER)) / n)
    square = np.square(np.abs(phases @ values))
    # of odd order, the spline has a zero at half the number of points; OpenMM takes the mean of the neighbours there
    zero = np.flatnonzero(square < 1e-7)
    square[zero] = 0.5 * (square[zero - 1] + square[(zero + 1) % n])
    return 1.0 / square
