"""Minima hopping of one molecule by many walkers at once: its torsions, the list of minima and the search itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _minimiser import LBFGS, ModelHessian

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.data.files import read_arrays, write_arrays
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.units import BOLTZMANN_EV, KJ_PER_MOL_PER_EV

FORM = "so3lr-minima-1"
CONVERGED = 0.002
SAME_TORSION, SAME_ENERGY = 10.0, 0.005
#: acceleration in angstrom/fs^2 by 1 eV/angstrom on 1 amu
ACCELERATION = KJ_PER_MOL_PER_EV * 1e-4
TIMESTEP = 1.0
#: minima of the energy along the path before a walker minimises
PASSES = 3
LONGEST_ESCAPE, LONGEST_MINIMIZATION = 400, 1500
#: angstrom, in a random conformation that is drawn again; share of cis peptide bonds
OVERLAP, CIS = 1.1, 0.5
#: kelvin, of a walker's first escape
WARM = 1200.0
#: factors of the kinetic energy after a known and a new minimum; of the threshold of acceptance
GROW, SHRINK, THRESHOLD = 1.05, 1 / 1.05, 1.02


# -- the molecule --------------------------------------------------------------------------------------------------


@dataclass
class Molecule:
    """Bonds, torsions and hands of Ace-Ala3-NMe, from its own first geometry."""

    structure: Structure
    bonds: np.ndarray = field(init=False)
    torsions: np.ndarray = field(init=False)
    centres: np.ndarray = field(init=False)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        from ase.data import covalent_radii

        x, z = self.structure.positions, self.structure.numbers
        radii = covalent_radii[z]
        self._reach = radii[:, None] + radii[None]
        apart = np.linalg.norm(x[:, None] - x[None], axis=-1)
        self.bonds = np.argwhere(np.triu(apart < 1.25 * self._reach, 1))
        self._bonded = np.zeros_like(apart, bool)
        self._bonded[tuple(self.bonds.T)] = True
        self.near: list[list[int]] = [[] for _ in z]
        for i, j in self.bonds:
            self.near[i].append(int(j))
            self.near[j].append(int(i))
        self._find_torsions()

    def _find_torsions(self) -> None:
        z, near = self.structure.numbers, self.near
        carbonyl = [i for i in range(len(z)) if z[i] == 6 and any(z[j] == 8 for j in near[i])]
        alpha = [
            i for i in range(len(z)) if z[i] == 6 and any(z[j] == 7 for j in near[i]) and set(near[i]) & set(carbonyl)
        ]
        found: list[tuple[str, tuple[int, ...]]] = []
        centres = []
        for c in carbonyl:
            for n in (j for j in near[c] if z[j] == 7):
                before = next(j for j in near[c] if z[j] == 6)
                after = next(j for j in near[n] if z[j] == 6 and j != c)
                found.append(("omega", (before, c, n, after)))
        for a in alpha:
            n = next(j for j in near[a] if z[j] == 7)
            c = next(j for j in near[a] if j in carbonyl)
            b = next(j for j in near[a] if z[j] == 6 and j != c)
            found.append(("phi", (next(j for j in near[n] if j in carbonyl), n, a, c)))
            found.append(("psi", (n, a, c, next(j for j in near[c] if z[j] == 7))))
            centres.append((a, n, c, b))
        for m in (i for i in range(len(z)) if z[i] == 6 and sum(z[j] == 1 for j in near[i]) == 3):
            root = next(j for j in near[m] if z[j] != 1)
            other = next(j for j in near[root] if j != m and z[j] != 1)
            found.append(("methyl", (other, root, m, next(j for j in near[m] if z[j] == 1))))
        self.names = [name for name, _ in found]
        self.torsions = np.array([atoms for _, atoms in found])
        self.centres = np.array(centres)
        self._period = np.where(np.array(self.names) == "methyl", 120.0, 360.0)
        self._hands = np.sign(self._volumes(self.structure.positions))

    def _volumes(self, x: np.ndarray) -> np.ndarray:
        a, b, c, d = (x[self.centres[:, k]] for k in range(4))
        return np.einsum("ci,ci->c", np.cross(b - a, c - a), d - a)

    def fault(self, x: np.ndarray) -> str:
        """Why these positions are not this molecule, or an empty text."""
        apart = np.linalg.norm(x[:, None] - x[None], axis=-1)
        bonded = np.triu(apart < 1.25 * self._reach, 1)
        if (self._bonded & ~bonded).any():
            return "bond broken"
        if (bonded & ~self._bonded).any():
            return "bond formed"
        return "" if (np.sign(self._volumes(x)) == self._hands).all() else "hand inverted"

    def angles(self, x: np.ndarray) -> np.ndarray:
        """Torsions, ``(n_torsions,)`` degrees; those of methyl groups modulo 120."""
        return np.mod(dihedral(x, self.torsions), self._period)

    def differ(self, angles: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Largest difference of a torsion to each of many, ``(n,)`` degrees."""
        d = np.abs(known - angles)
        return np.minimum(d, self._period - d).max(axis=-1)


def random_starts(molecule: Molecule, n: int, random: np.random.Generator) -> np.ndarray:
    """Random phi, psi and peptide bonds, a share `CIS` of them cis; ``(n, n_atoms, 3)`` without overlapping atoms.

    The peptide bonds are drawn first and kept until phi and psi fit, so that every isomer has its share.
    """
    starts = []
    for _ in range(n):
        cis = random.random(len(molecule.names)) < CIS
        while True:
            x = molecule.structure.positions.copy()
            for name, atoms, turned in zip(molecule.names, molecule.torsions, cis, strict=True):
                if name in ("phi", "psi"):
                    x = turn(x, molecule.near, atoms[1], atoms[2], random.uniform(0.0, 2.0 * np.pi))
                elif name == "omega" and turned:
                    x = turn(x, molecule.near, atoms[1], atoms[2], np.pi)
            apart = np.linalg.norm(x[:, None] - x[None], axis=-1) + 10.0 * np.eye(len(x))
            apart[tuple(molecule.bonds.T)] = apart[tuple(molecule.bonds[:, ::-1].T)] = 10.0
            if apart.min() > OVERLAP:
                break
        starts.append(x)
    return np.array(starts)


def turn(x: np.ndarray, near: list[list[int]], i: int, j: int, angle: float) -> np.ndarray:
    """Turn everything behind j around the bond i-j (Rodrigues)."""
    moved, stack = {int(j)}, [int(j)]
    while stack:
        for k in near[stack.pop()]:
            if k not in moved and k != i:
                moved.add(k)
                stack.append(k)
    axis = (x[j] - x[i]) / np.linalg.norm(x[j] - x[i])
    which = sorted(moved)
    v = x[which] - x[j]
    x = x.copy()
    x[which] = (
        x[j] + v * np.cos(angle) + np.cross(axis, v) * np.sin(angle) + np.outer(v @ axis, axis) * (1 - np.cos(angle))
    )
    return x


# -- search ------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """The minima so far: positions (angstrom), energies (eV), torsions; and what was not counted."""

    molecule: Molecule
    positions: list[np.ndarray] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    angles: list[np.ndarray] = field(default_factory=list)
    minimizations: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    curve: list[tuple[int, int]] = field(default_factory=list)

    def add(self, x: np.ndarray, energy: float) -> tuple[int, bool]:
        """Number of this minimum, and whether it is new; -1 for what is not the molecule any more."""
        self.minimizations += 1
        fault = self.molecule.fault(x)
        if fault:
            self.count(fault)
            return -1, False
        angles = self.molecule.angles(x)
        if self.energies:
            near = np.abs(np.array(self.energies) - energy) < SAME_ENERGY
            same = np.flatnonzero(near & (self.molecule.differ(angles, np.array(self.angles)) < SAME_TORSION))
            if len(same):
                return int(same[0]), False
        self.positions.append(x.copy())
        self.energies.append(float(energy))
        self.angles.append(angles)
        self.curve.append((self.minimizations, len(self.energies)))
        return len(self.energies) - 1, True

    def count(self, fault: str) -> None:
        self.faults[fault] = self.faults.get(fault, 0) + 1

    def save(self, path: Path) -> None:
        header = {"minimizations": self.minimizations, "evaluations": self.evaluations, "seconds": self.seconds}
        arrays = {"positions": np.array(self.positions), "energies": np.array(self.energies)}
        write_arrays(path, FORM, arrays | {"curve": np.array(self.curve)}, header | {"faults": self.faults})

    @classmethod
    def load(cls, molecule: Molecule, path: Path) -> Found:
        header, arrays = read_arrays(path, FORM, "minima of the search")
        found = cls(molecule, list(arrays["positions"]), arrays["energies"].tolist())
        found.angles = [molecule.angles(x) for x in found.positions]
        found.curve = [tuple(row) for row in arrays["curve"].tolist()]
        found.minimizations, found.evaluations = header["minimizations"], header["evaluations"]
        found.seconds, found.faults = header["seconds"], header["faults"]
        return found


class Walkers:
    """Minima hopping of many walkers; every call of `advance` evaluates all of them once."""

    def __init__(self, evaluator: Evaluator, found: Found, starts: np.ndarray, masses: np.ndarray, seed: int) -> None:
        n = len(starts)
        self.evaluator, self.found, self.masses = evaluator, found, masses
        self.random = np.random.default_rng([seed, found.minimizations])
        self.x, self.v = starts.copy(), np.zeros_like(starts)
        self.minimizing = np.ones(n, bool)
        self.steps, self.passes = np.zeros((2, n), int)
        self.previous = np.full((2, n), np.inf)
        self.home = np.full(n, -1)
        # of the escape in kelvin, and of acceptance in eV
        self.temperature, self.threshold = np.full(n, WARM), np.full(n, 0.1)
        self.lbfgs = LBFGS(n, ModelHessian(found.molecule.near))

    def advance(self) -> None:
        n, size = len(self.x), self.x[0].size
        energies, forces = self.evaluator.arrays(self.x.reshape(-1, 3))
        forces = forces.reshape(self.x.shape)
        self.found.evaluations += n
        self.steps += 1
        largest = np.linalg.norm(forces, axis=-1).max(axis=1)
        # an exploded escape starts again from its minimum, an exploded minimisation from elsewhere
        lost = ~(np.isfinite(energies) & (largest < 200.0))
        for k in np.flatnonzero(lost):
            self._escape(k)
        done = self.minimizing & ~lost & (largest < CONVERGED)
        for k in np.flatnonzero(done):
            self._arrived(k, float(energies[k]))
        stuck = self.minimizing & ~done & ~lost & (self.steps > LONGEST_MINIMIZATION)
        for k in np.flatnonzero(stuck):
            self.found.count("not converged")
            self._escape(k)
        left = lost | done | stuck
        going = np.flatnonzero(self.minimizing & ~left)
        if len(going):
            flat = self.lbfgs.step(going, self.x[going].reshape(-1, size), forces[going].reshape(-1, size))
            self.x[going] = flat.reshape(-1, *self.x.shape[1:])
        self._move(np.flatnonzero(~self.minimizing & ~left), energies, forces)

    def _move(self, moving: np.ndarray, energies: np.ndarray, forces: np.ndarray) -> None:
        """One leapfrog step; the first kick is half a one."""
        if not len(moving):
            return
        a = ACCELERATION * forces[moving] / self.masses[:, None]
        half = np.where(self.steps[moving] > 1, 1.0, 0.5)[:, None, None]
        self.v[moving] += half * TIMESTEP * a
        e = energies[moving]
        dip = (self.previous[1, moving] > self.previous[0, moving]) & (self.previous[0, moving] < e)
        self.passes[moving] += dip & np.isfinite(self.previous[1, moving])
        self.previous[1, moving], self.previous[0, moving] = self.previous[0, moving], e
        self.x[moving] += TIMESTEP * self.v[moving]
        ended = moving[(self.passes[moving] >= PASSES) | (self.steps[moving] > LONGEST_ESCAPE)]
        self.minimizing[ended], self.steps[ended] = True, 0
        self.lbfgs.forget(ended)

    def _arrived(self, k: int, energy: float) -> None:
        number, new = self.found.add(self.x[k], energy)
        home = int(self.home[k])
        if home >= 0:
            self.temperature[k] = min(self.temperature[k] * (SHRINK if new else GROW), 3000.0)
        if not new:
            self._restart(k)
            return
        if home < 0:
            self.home[k] = number
        else:
            accepted = energy - self.found.energies[home] < self.threshold[k]
            self.threshold[k] *= 1 / THRESHOLD if accepted else THRESHOLD
            self.home[k] = number if accepted else home
        self._escape(k)

    def _restart(self, k: int) -> None:
        """A random conformation, which is minimised."""
        self.x[k] = random_starts(self.found.molecule, 1, self.random)[0]
        self.home[k], self.steps[k], self.minimizing[k] = -1, 0, True
        self.lbfgs.forget(np.array([k]))

    def _escape(self, k: int) -> None:
        """Back to the minimum that the walker stands at, with new velocities."""
        if self.home[k] < 0:
            self._restart(k)
            return
        self.x[k] = self.found.positions[self.home[k]]
        width = np.sqrt(BOLTZMANN_EV * self.temperature[k] * ACCELERATION / self.masses)
        self.v[k] = self.random.standard_normal(self.x[k].shape) * width[:, None]
        self.v[k] -= np.average(self.v[k], axis=0, weights=self.masses)
        self.minimizing[k], self.steps[k], self.passes[k], self.previous[:, k] = False, 0, 0, np.inf
