"""a molecule and a reference method -> geometries that it has at a temperature.

Three ways, from cheap to costly: random displacements, normal modes about a relaxed geometry, and molecular dynamics.
`Held` keeps protons where they were built: in vacuum many methods move the proton of a zwitterion at once.

Units: angstrom, eV, kelvin, femtoseconds; masses in amu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_mlff.data.reference import Driver, ReferenceMethod
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.dataset_md import ReferenceForce, interruptible, make_context, positions_of
from openmm_mlff.sampling.fire import Fire
from openmm_mlff.units import (
    ANGSTROM_PER_NM,
    AVOGADRO,
    BOLTZMANN_EV,
    ELEMENTARY_CHARGE,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    PLANCK,
)

#: hbar in eV^(1/2) amu^(1/2) angstrom: hbar omega is an energy in eV if omega^2 is in eV/angstrom^2/amu.
HBAR = PLANCK / (2.0 * np.pi) / np.sqrt(ELEMENTARY_CHARGE * 1e-3 / AVOGADRO) * 1e10
#: modes softer than this, or with a negative curvature, are displaced as if they had this wave number, 1/cm
SOFTEST = 80.0
#: speed of light, cm/s, exact
_LIGHT = 2.99792458e10
#: no mode moves an atom farther than this, angstrom
FARTHEST = 0.25
#: finite difference of Hessians, angstrom
DISPLACEMENT = 0.01


@dataclass(frozen=True)
class Held:
    """A reference method whose dynamics keep some distances short and others long; labels do not know of it.

    ``k/2 (d - limit)^2`` beyond the limit, nothing within.

    Attributes:
        method: drives.
        short: pairs whose distance stays below `longest`, ``(n, 2)``. long: pairs that stay above `shortest`.
        stiffness: k, eV/angstrom^2.
    """

    method: ReferenceMethod
    short: np.ndarray
    longest: np.ndarray
    long: np.ndarray
    shortest: np.ndarray
    stiffness: float = 40.0

    def driver(self, structure: Structure) -> Driver:
        inner = self.method.driver(structure)
        pairs = np.concatenate([self.short, self.long]).astype(np.int64).reshape(-1, 2)
        limits = np.concatenate([self.longest, self.shortest])
        sign = np.repeat([1.0, -1.0], [len(self.short), len(self.long)])

        def energy_and_forces(positions: np.ndarray) -> tuple[float, np.ndarray]:
            energy, forces = inner(positions)
            vectors = positions[pairs[:, 1]] - positions[pairs[:, 0]]
            distances = np.linalg.norm(vectors, axis=1)
            beyond = np.maximum(sign * (distances - limits), 0.0)
            pull = (self.stiffness * sign * beyond / distances)[:, None] * vectors
            forces = forces.copy()
            np.add.at(forces, pairs[:, 0], pull)
            np.add.at(forces, pairs[:, 1], -pull)
            return energy + 0.5 * self.stiffness * float(np.sum(beyond**2)), forces

        return energy_and_forces

    def label(self, structure: Structure) -> Structure:
        return self.method.label(structure)

    def atom_energy(self, number: int) -> float:
        return self.method.atom_energy(number)

    def check(self) -> None:
        self.method.check()

    def describe(self) -> dict[str, Any]:
        return self.method.describe()


def relax(structure: Structure, method: ReferenceMethod, steps: int = 80, tolerance: float = 0.15) -> np.ndarray:
    """Positions ``(n_atoms, 3)`` after at most `steps` iterations of FIRE, or at an RMS force below `tolerance` (eV/A).

    Raises `LabelError` if the method fails on the way.
    """
    driver = method.driver(structure)
    n = len(structure)
    fire = Fire(np.array([0, n]), np.ones(n, dtype=bool))
    positions = structure.positions.copy()
    for _ in range(steps):
        forces = driver(positions)[1] * KJ_PER_MOL_NM_PER_EV_ANGSTROM
        if fire.rms(forces)[0] < tolerance * KJ_PER_MOL_NM_PER_EV_ANGSTROM:
            break
        positions = positions + fire.step(forces, np.ones(1, dtype=bool)) * ANGSTROM_PER_NM
    return positions


def rattled(positions: np.ndarray, n: int, widths: tuple[float, float], rng: np.random.Generator) -> list[np.ndarray]:
    """Gaussian displacements of every atom, with standard deviations (angstrom) uniform between two widths."""
    return [positions + rng.normal(0.0, rng.uniform(*widths), positions.shape) for _ in range(n)]


@dataclass(frozen=True)
class NormalModes:
    """Harmonic vibrations about a geometry.

    Attributes:
        positions: ``(n_atoms, 3)`` angstrom.
        curvatures: eigenvalues of the mass-weighted Hessian, ``(n_modes,)`` eV/angstrom^2/amu.
        modes: Cartesian displacements per mass-weighted unit, ``(n_modes, n_atoms, 3)`` 1/amu^(1/2).
    """

    positions: np.ndarray
    curvatures: np.ndarray
    modes: np.ndarray

    @classmethod
    def of(cls, structure: Structure, method: ReferenceMethod) -> NormalModes:
        """By central differences of forces; translations and rotations are projected out.

        Raises `LabelError` if the method fails.
        """
        from ase.data import atomic_masses

        driver, x = method.driver(structure), structure.positions
        hessian = np.empty((x.size, x.size))
        for k in range(x.size):
            step = np.zeros(x.size)
            step[k] = DISPLACEMENT
            up, down = (driver(x + sign * step.reshape(x.shape))[1].ravel() for sign in (1.0, -1.0))
            hessian[k] = (down - up) / (2.0 * DISPLACEMENT)
        weight = np.repeat(1.0 / np.sqrt(atomic_masses[structure.numbers]), 3)
        basis = _vibrations(x, atomic_masses[structure.numbers])
        weighted = basis.T @ (weight[:, None] * (hessian + hessian.T) / 2.0 * weight[None]) @ basis
        curvatures, vectors = np.linalg.eigh(weighted)
        modes = (weight[:, None] * (basis @ vectors)).T.reshape(-1, *x.shape)
        return cls(x, curvatures, modes)

    def sample(self, temperature: float, n: int, rng: np.random.Generator, classical: bool = False) -> list[np.ndarray]:
        """Positions from the harmonic distribution at a temperature (kelvin).

        Quantum: <Q^2> = hbar/(2 omega) coth(hbar omega/2kT) (E. Wigner, Phys. Rev. 40, 749 (1932), positions only);
        classical: <Q^2> = kT/omega^2, as molecular dynamics have it.
        """
        softest = 2.0 * np.pi * _LIGHT * SOFTEST * np.sqrt(1e-3 / AVOGADRO / ELEMENTARY_CHARGE) * 1e-10
        omega = np.sqrt(np.maximum(self.curvatures, softest**2))
        thermal = BOLTZMANN_EV * temperature
        quantum = HBAR / (2.0 * omega) / np.tanh(HBAR * omega / (2.0 * thermal))
        width = np.sqrt(thermal / omega**2 if classical else quantum)
        largest = np.linalg.norm(self.modes, axis=-1).max(axis=1, initial=1e-12)
        frames = []
        for _ in range(n):
            q = np.clip(rng.normal(size=len(width)) * width, -FARTHEST / largest, FARTHEST / largest)
            frames.append(self.positions + np.einsum("m,mik->ik", q, self.modes))
        return frames


def _vibrations(positions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Orthonormal mass-weighted vectors without translations and rotations, ``(3 n_atoms, n_modes)``."""
    root = np.sqrt(masses)[:, None]
    centred = positions - np.average(positions, axis=0, weights=masses)
    rigid = [np.broadcast_to(axis, positions.shape) * root for axis in np.eye(3)]
    rigid += [np.cross(axis, centred) * root for axis in np.eye(3)]
    u, s, _ = np.linalg.svd(np.stack([v.ravel() for v in rigid], axis=1), full_matrices=True)
    return np.asarray(u[:, int(np.sum(s > 1e-6 * s[0])) :])


def dynamics(
    structure: Structure,
    method: ReferenceMethod,
    *,
    temperature: float,
    frames: int,
    stride: float,
    discard: float,
    seed: int,
    timestep: float = 1.0,
    friction: float = 10.0,
) -> Iterator[np.ndarray]:
    """Positions along one trajectory (LangevinMiddle, Reference platform), each ``(n_atoms, 3)`` angstrom, as it goes.

    The start should be relaxed: velocities are drawn at twice the temperature, half of which becomes potential energy.

    Args:
        temperature: kelvin. frames: how many. stride, discard: between frames and before the first, femtoseconds.
        seed: of velocities and thermostat. timestep: femtoseconds. friction: 1/ps.

    Raises `openmm.OpenMMException` if the method fails on the way.
    """
    force = ReferenceForce(method, structure)
    integrator = openmm.LangevinMiddleIntegrator(temperature, friction / unit.picosecond, timestep * unit.femtosecond)
    integrator.setRandomNumberSeed(seed)
    context = make_context(force, (), integrator, structure.positions)
    context.setVelocitiesToTemperature(2.0 * temperature, seed)
    with interruptible(force):
        integrator.step(round(discard / timestep))
    for _ in range(frames):
        with interruptible(force):
            integrator.step(max(1, round(stride / timestep)))
        yield positions_of(context)
