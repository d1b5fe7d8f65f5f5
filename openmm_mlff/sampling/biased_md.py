"""force field -> trajectories with a frozen bias on two torsions, and the unbiased forces of every frame.

A bias that depends on coarse-grained coordinates only leaves the mean force at fixed coarse-grained coordinates as it
is, so that forces recorded *without* the bias train a coarse-grained model everywhere that the bias leads to, while
weights exp(V/kT) give the unbiased distribution back. The bias comes from a well-tempered metadynamics run (Barducci,
Bussi, Parrinello, Phys. Rev. Lett. 100, 020603 (2008)), is then capped and frozen, and is a `CMAPTorsionForce`: a
periodic bicubic spline that every platform evaluates natively.

Units: angstrom, eV, degrees, kelvin, picoseconds; OpenMM's units stay inside.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.data.files import read_arrays, write_arrays
from openmm_mlff.units import (
    ANGSTROM_PER_NM,
    BOLTZMANN_EV,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
    NM_PER_ANGSTROM,
)

FORMAT = "openmm-mlff-frames-1"
#: force group of the bias; its forces are never recorded.
BIAS_GROUP = 31
Torsion = tuple[int, int, int, int]


@dataclass(frozen=True)
class BiasMap:
    """A bias on two torsions.

    Attributes:
        torsions: two times four atom indices.
        energies: ``(n, n)`` eV at the angles -180 + 360 k / n degrees, first axis the first torsion; n even.

    Raises `ValueError` naming the argument.
    """

    torsions: tuple[Torsion, Torsion]
    energies: np.ndarray

    def __post_init__(self) -> None:
        shape = np.shape(self.energies)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 4 or shape[0] % 2:
            raise ValueError(f"energies: expected a square map with an even number of rows, at least 4, got {shape}")
        if not np.isfinite(self.energies).all():
            raise ValueError("energies: expected finite numbers (eV), got NaN or infinity")
        if len(self.torsions) != 2 or any(len(set(t)) != 4 for t in self.torsions):
            raise ValueError(f"torsions: expected two times four different atoms, got {self.torsions}")

    def force(self, group: int = BIAS_GROUP) -> openmm.CMAPTorsionForce:
        """The bias as an OpenMM force."""
        force = openmm.CMAPTorsionForce()
        force.addMap(len(self.energies), _cmap_values(self.energies))
        force.addTorsion(0, *self.torsions[0], *self.torsions[1])
        force.setForceGroup(group)
        return force


def _cmap_values(energies: np.ndarray) -> list[float]:
    # OpenMM's map starts at angle 0, and its first index runs fastest
    half = len(energies) // 2
    return np.ravel(np.roll(energies, (-half, -half), (0, 1)) * KJ_PER_MOL_PER_EV, order="F").tolist()


@dataclass(frozen=True)
class Dynamics:
    """Settings of the Langevin dynamics: kelvin, 1/ps, femtoseconds. Raises `ValueError` for a number <= 0."""

    temperature: float = 300.0
    friction: float = 1.0
    timestep: float = 4.0

    def __post_init__(self) -> None:
        for name in ("temperature", "friction", "timestep"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")

    @property
    def kT(self) -> float:
        """eV."""
        return BOLTZMANN_EV * self.temperature

    def steps(self, name: str, picoseconds: float) -> int:
        """Number of time steps in a time; `ValueError` naming it unless that is a whole number >= 1."""
        steps = picoseconds * 1000.0 / self.timestep
        if round(steps) < 1 or abs(steps - round(steps)) > 1e-6:
            raise ValueError(
                f"{name}: expected a whole number of time steps of {self.timestep} fs, got {picoseconds} ps"
            )
        return round(steps)

    def context(self, system: openmm.System, positions: np.ndarray, seed: int, platform: str) -> openmm.Context:
        """A context with positions ``(n_atoms, 3)`` angstrom on the constraints, and velocities of the temperature."""
        integrator = openmm.LangevinMiddleIntegrator(
            self.temperature, self.friction / unit.picosecond, self.timestep * unit.femtosecond
        )
        integrator.setRandomNumberSeed(seed)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform))
        context.setPositions(positions * NM_PER_ANGSTROM)
        context.applyConstraints(integrator.getConstraintTolerance())
        context.setVelocitiesToTemperature(self.temperature, seed)
        return context


@dataclass(frozen=True)
class Metadynamics:
    """Settings of the run that makes the bias.

    Attributes:
        duration: ps. pace: ps between two Gaussians. height: of the first Gaussians, eV. width: degrees.
        bias_factor: gamma > 1 of the well-tempered scheme. grid: rows of the map.
        flattening: how much of the free energy the frozen bias takes away, 0 to 1.
        cap: eV above the minimum up to which it does; higher regions keep the rest as a barrier.
        snapshot: ps between the configurations that are kept as starts, from the second half of the run.
    """

    duration: float = 10000.0
    pace: float = 2.0
    height: float = 0.01
    width: float = 15.0
    bias_factor: float = 10.0
    grid: int = 48
    flattening: float = 0.85
    cap: float = 0.22
    snapshot: float = 50.0

    def __post_init__(self) -> None:
        for name in ("duration", "pace", "height", "width", "cap", "snapshot"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if not self.bias_factor > 1:
            raise ValueError(f"bias_factor: expected a number > 1, got {self.bias_factor!r}")
        if not 0 <= self.flattening <= 1:
            raise ValueError(f"flattening: expected a number from 0 to 1, got {self.flattening!r}")


def make_bias(
    system: openmm.System,
    positions: np.ndarray,
    torsions: tuple[Torsion, Torsion],
    settings: Metadynamics,
    dynamics: Dynamics,
    seed: int,
    platform: str = "Reference",
) -> tuple[BiasMap, np.ndarray, np.ndarray]:
    """Well-tempered metadynamics on two torsions, then the capped bias to be frozen.

    Args:
        system: force field, without the bias; stays as it is. positions: ``(n_atoms, 3)`` angstrom.

    Returns:
        The frozen bias; the free energy that it rests on, ``(grid, grid)`` eV, zero at the minimum; and snapshots
        ``(n, n_atoms, 3)`` angstrom.
    """
    n, kT = settings.grid, dynamics.kT
    deposited = BiasMap(torsions, np.zeros((n, n)))
    biased = copy.deepcopy(system)
    force_index = biased.addForce(deposited.force())
    context = dynamics.context(biased, positions, seed, platform)
    force = biased.getForce(force_index)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(dynamics.temperature, seed)
    angles = -180.0 + 360.0 * np.arange(n) / n
    pace = dynamics.steps("pace", settings.pace)
    n_gaussians = int(settings.duration / settings.pace)
    keep_every = max(1, round(settings.snapshot / settings.pace))
    energies = np.zeros((n, n))
    snapshots = []
    for k in range(n_gaussians):
        context.getIntegrator().step(pace)
        here = _positions(context)
        centre = dihedral(here, np.array(torsions))
        cell = np.rint((centre + 180.0) * n / 360.0).astype(int) % n
        height = settings.height * np.exp(-energies[cell[0], cell[1]] / (kT * (settings.bias_factor - 1)))
        rows = [np.exp(-0.5 * (((angles - c + 180.0) % 360.0 - 180.0) / settings.width) ** 2) for c in centre]
        energies += height * np.outer(*rows)
        force.setMapParameters(0, n, _cmap_values(energies))
        force.updateParametersInContext(context)
        if 2 * k >= n_gaussians and k % keep_every == 0:
            snapshots.append(here)
    free_energy = -energies * settings.bias_factor / (settings.bias_factor - 1)
    free_energy -= free_energy.min()
    return BiasMap(torsions, frozen_bias(free_energy, settings, kT)), free_energy, np.array(snapshots)


def frozen_bias(free_energy: np.ndarray, settings: Metadynamics, kT: float) -> np.ndarray:
    """``-flattening * min(F, cap)`` with an edge rounded over kT, so that forces stay smooth; eV, zero at the cap."""
    softened = -kT * np.logaddexp(-free_energy / kT, -settings.cap / kT)
    return settings.flattening * (settings.cap - softened)


@dataclass(frozen=True)
class Frames:
    """Frames of one trajectory with the forces of the force field.

    Attributes:
        positions: ``(n, n_atoms, 3)`` angstrom, float32. forces: eV/angstrom, float32; without bias and constraints.
        bias: ``(n,)`` eV, energy of the frozen bias; weights for the unbiased ensemble are exp(bias / kT).
        torsions: ``(n, n_torsions)`` degrees, float32.
        info: plain data: name, seed, temperature, interval (ps), and what the caller added.
    """

    positions: np.ndarray
    forces: np.ndarray
    bias: np.ndarray
    torsions: np.ndarray
    info: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.positions)


def write_frames(path: str | Path, frames: Frames) -> None:
    """Write one file (safetensors, moved into place when it is complete)."""
    arrays = {name: np.asarray(getattr(frames, name), np.float32) for name in ("positions", "forces", "torsions")}
    arrays["bias"] = np.asarray(frames.bias, np.float64)
    write_arrays(path, FORMAT, arrays, {"info": dict(frames.info)})


def read_frames(path: str | Path) -> Frames:
    """Read what `write_frames` wrote. Raises `FileNotFoundError`, and `ValueError` for another kind of file."""
    header, tensors = read_arrays(path, FORMAT, "frames")
    return Frames(**tensors, info=header["info"])


@dataclass(frozen=True)
class BiasedPlan:
    """Everything that decides one trajectory.

    Attributes:
        name: of the trajectory. split: what it is meant for.
        system: serialised `openmm.System` without bias. start: ``(n_atoms, 3)`` angstrom.
        bias: None leaves the trajectory free; its torsions are recorded all the same.
        duration, discard, interval: ps; a frame every `interval` after `discard`.
    """

    name: str
    split: str
    system: str
    start: np.ndarray
    torsions: tuple[Torsion, Torsion]
    bias: BiasMap | None
    dynamics: Dynamics
    duration: float
    discard: float
    interval: float
    seed: int
    platform: str = "Reference"


def run_biased(plan: BiasedPlan) -> Frames:
    """Run one trajectory. Raises `ValueError` naming a time that does not fit, `FloatingPointError` for NaN."""
    stride = plan.dynamics.steps("interval", plan.interval)
    system = openmm.XmlSerializer.deserialize(plan.system)
    for force in system.getForces():
        if force.getForceGroup() == BIAS_GROUP:
            raise ValueError(
                f"system: expected force group {BIAS_GROUP} to be free for the bias, got {force.getName()}"
            )
    if plan.bias is not None:
        system.addForce(plan.bias.force())
    context = plan.dynamics.context(system, plan.start, plan.seed, plan.platform)
    context.getIntegrator().step(plan.dynamics.steps("discard", plan.discard))
    n = int(plan.duration / plan.interval + 1e-9)
    shape = (n, system.getNumParticles(), 3)
    positions, forces, bias = np.empty(shape, np.float32), np.empty(shape, np.float32), np.zeros(n)
    unbiased = 0xFFFFFFFF & ~(1 << BIAS_GROUP)
    for k in range(n):
        context.getIntegrator().step(stride)
        state = context.getState(positions=True, forces=True, groups=unbiased)
        positions[k] = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        forces[k] = state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
        if plan.bias is not None:
            state = context.getState(energy=True, groups=1 << BIAS_GROUP)
            bias[k] = state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV
    if not (np.isfinite(positions).all() and np.isfinite(forces).all()):
        raise FloatingPointError(f"{plan.name}: positions or forces became NaN or infinite")
    torsions = dihedral(positions.astype(np.float64), np.array(plan.torsions)).astype(np.float32)
    info = {
        "name": plan.name,
        "split": plan.split,
        "seed": plan.seed,
        "interval_ps": plan.interval,
        "biased": plan.bias is not None,
        **asdict(plan.dynamics),
    }
    return Frames(positions, forces, bias, torsions, info)


def _positions(context: openmm.Context) -> np.ndarray:
    return context.getState(positions=True).getPositions(asNumpy=True)._value * ANGSTROM_PER_NM


def make_frames(plan: BiasedPlan, path: Path) -> dict[str, str]:
    """Worker of `openmm_mlff.data.jobs.run_tasks`: run one trajectory and write it."""
    write_frames(path, run_biased(plan))
    return {}
