"""A minimiser of many conformations of one molecule at once: L-BFGS on top of a model Hessian of its bonds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

#: eV/angstrom^2, eV/rad^2, eV/rad^2: about the constants of Lindh, Bernhardsson, Karlstroem, Malmqvist, Chem. Phys.
#: Lett. 241, 423 (1995) at equilibrium
BOND, ANGLE, TORSION = 40.0, 4.0, 0.14
#: eV/angstrom^2: of everything else, also translations and rotations
REST = 0.5


class ModelHessian:
    """A force field without minima: springs at the present bonds, angles and torsions.

    What makes molecules slow to minimise is that bonds are a thousand times stiffer than torsions, which this knows.
    """

    def __init__(self, near: Sequence[Sequence[int]]) -> None:
        self.n = len(near)
        pairs = [(i, j) for i in range(self.n) for j in near[i] if i < j]
        triples = [(i, j, k) for j in range(self.n) for i, k in itertools.combinations(near[j], 2)]
        quartets = [
            (i, j, k, m) for j, k in pairs for i in near[j] for m in near[k] if i != k and m != j and m != i
        ]  # fmt: skip
        self.bonds, self.angles, self.torsions = (np.array(x) for x in (pairs, triples, quartets))
        # a bond with many torsions around it is no stiffer than one with few
        around = np.array([(len(near[j]) - 1) * (len(near[k]) - 1) for _, j, k, _ in quartets])
        self.constants = np.concatenate(
            [np.full(len(pairs), BOND), np.full(len(triples), ANGLE), TORSION * 3.0 / around]
        )

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """Inverse of B^T k B + `REST` at positions ``(n, 3)``: ``(3 n, 3 n)`` angstrom^2/eV."""
        b = self.derivatives(x)
        return np.linalg.inv((b * self.constants[:, None]).T @ b + REST * np.eye(3 * self.n))

    def derivatives(self, x: np.ndarray) -> np.ndarray:
        """Wilson's B: derivatives of bond lengths, angles and torsions, ``(n_coordinates, 3 n)``."""
        kinds = (
            (self.bonds, _of_bonds(x, self.bonds)),
            (self.angles, _of_angles(x, self.angles)),
            (self.torsions, _of_torsions(x, self.torsions)),
        )
        rows = []
        for atoms, gradients in kinds:
            b = np.zeros((len(atoms), self.n, 3))
            for k, gradient in enumerate(gradients):
                b[np.arange(len(atoms)), atoms[:, k]] = gradient
            rows.append(b.reshape(len(atoms), -1))
        return np.concatenate(rows)


def _of_bonds(x: np.ndarray, atoms: np.ndarray) -> list[np.ndarray]:
    u = _unit(x[atoms[:, 0]] - x[atoms[:, 1]])
    return [u, -u]


def _of_angles(x: np.ndarray, atoms: np.ndarray) -> list[np.ndarray]:
    one, two = (x[atoms[:, k]] - x[atoms[:, 1]] for k in (0, 2))
    u, v = _unit(one), _unit(two)
    cosine = np.sum(u * v, axis=1, keepdims=True)
    sine = np.sqrt(np.maximum(1.0 - cosine**2, 1e-4))
    first = (cosine * u - v) / (sine * _length(one))
    last = (cosine * v - u) / (sine * _length(two))
    return [first, -first - last, last]


def _of_torsions(x: np.ndarray, atoms: np.ndarray) -> list[np.ndarray]:
    """Blondel, Karplus, J. Comput. Chem. 17, 1132 (1996), eq. 27, with the sign of `dihedral`."""
    f, g, h = (x[atoms[:, i]] - x[atoms[:, j]] for i, j in ((0, 1), (1, 2), (3, 2)))
    a, b, axis = np.cross(f, g), np.cross(h, g), _length(g)
    aa, bb = (np.maximum(np.sum(v * v, axis=1, keepdims=True), 1e-4) for v in (a, b))
    first, last = -axis * a / aa, axis * b / bb
    fg, hg = (np.sum(v * g, axis=1, keepdims=True) for v in (f, h))
    middle = fg / (aa * axis) * a - hg / (bb * axis) * b
    return [first, -first + middle, -last - middle, last]


def _length(v: np.ndarray) -> np.ndarray:
    return np.linalg.norm(v, axis=1, keepdims=True)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / _length(v)


class LBFGS:
    """Limited-memory BFGS of many structures, each with its own history (Nocedal, Math. Comp. 35, 773 (1980)).

    The model Hessian is where the history starts from; it is made again every `refresh` steps. No line search: steps
    longer than `longest` (angstrom, of the atom that moves most) are shortened. Pairs of steps without positive
    curvature are left out.
    """

    def __init__(self, n: int, model: ModelHessian, memory: int = 30, longest: float = 0.15, refresh: int = 25) -> None:
        size = 3 * model.n
        self.model, self.refresh, self.longest = model, refresh, longest
        self.s, self.y = np.zeros((2, memory, n, size))
        self.rho = np.zeros((memory, n))
        self.x, self.f = np.zeros((2, n, size))
        self.inverse = np.zeros((n, size, size))
        self.age = np.full(n, -1)

    def forget(self, which: np.ndarray) -> None:
        """Start anew."""
        self.rho[:, which], self.age[which] = 0.0, -1

    def step(self, which: np.ndarray, x: np.ndarray, forces: np.ndarray) -> np.ndarray:
        """New positions of the structures `which` ``(k,)`` from positions and forces ``(k, size)``."""
        old = self.age[which] >= 0
        self.age[which] += 1
        for k, i in enumerate(which):
            if self.age[i] % self.refresh == 0:
                self.inverse[i] = self.model.inverse(x[k].reshape(-1, 3))
        s, y = x - self.x[which], self.f[which] - forces
        curvature = np.einsum("ki,ki->k", s, y)
        good = old & (curvature > 1e-10)
        for store in (self.s, self.y, self.rho):
            store[:, which] = np.roll(store[:, which], 1, axis=0)
        self.s[0, which], self.y[0, which] = s, y
        self.rho[0, which] = np.where(good, 1.0 / np.where(good, curvature, 1.0), 0.0)
        self.x[which], self.f[which] = x, forces
        direction = self._direction(which, forces)
        longest = np.linalg.norm(direction.reshape(len(which), -1, 3), axis=-1).max(axis=1)
        return x + direction * np.minimum(1.0, self.longest / np.maximum(longest, 1e-12))[:, None]

    def _direction(self, which: np.ndarray, forces: np.ndarray) -> np.ndarray:
        """H f, H being the inverse Hessian from model and history."""
        q, s, y, rho = forces.copy(), self.s[:, which], self.y[:, which], self.rho[:, which]
        a = np.zeros_like(rho)
        for m in range(len(rho)):
            a[m] = rho[m] * np.einsum("ki,ki->k", s[m], q)
            q -= a[m][:, None] * y[m]
        z = np.einsum("kij,kj->ki", self.inverse[which], q)
        for m in reversed(range(len(rho))):
            z += s[m] * (a[m] - rho[m] * np.einsum("ki,ki->k", y[m], z))[:, None]
        return z
