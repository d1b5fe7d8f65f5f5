"""a reference method -> trajectories in OpenMM -> labelled structures.

Molecular dynamics with the reference method itself as the force, through `openmm.PythonForce`, and optional
harmonic restraints on torsions that hold each trajectory in its window of, say, the Ramachandran plane. The
restraints are forces of their own: the labels never contain them. Each trajectory has its own seed and
becomes one shard of a dataset.

Units here: angstrom, eV, degrees for restraint centres, femtoseconds, kelvin; OpenMM's units stay inside.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit
from openmm.app import Element

from openmm_mlff.data.reference import Driver, ReferenceMethod
from openmm_mlff.data.structures import Structure
from openmm_mlff.units import (
    ANGSTROM_PER_NM,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
    NM_PER_ANGSTROM,
)


@dataclass(frozen=True)
class TorsionRestraint:
    """Harmonic restraint ``k/2 d^2`` on a torsion, d the distance to `center` around the circle.

    Attributes:
        atoms: four atom indices.
        center: degrees. force_constant: kJ/mol/rad^2.
    """

    atoms: tuple[int, int, int, int]
    center: float
    force_constant: float


@dataclass(frozen=True)
class TrajectoryPlan:
    """Everything that decides one trajectory.

    Attributes:
        name: of the shard, and the group of its structures.
        split: what the trajectory is meant for ("train", "valid", "test").
        start: atoms, charge and multiplicity, and the positions from which `torsions` are set.
        temperature: kelvin. seed: of velocities and of the thermostat.
        torsions: atoms and start values in degrees; rotated rigidly, then minimised with restraints.
        restraints: kept during the whole trajectory.
        duration, discard, stride, timestep: femtoseconds; frames before `discard` are not kept.
        friction: 1/ps.
    """

    name: str
    split: str
    start: Structure
    temperature: float
    seed: int
    torsions: tuple[TorsionRestraint, ...] = ()
    restrained: bool = True
    duration: float = 1000.0
    discard: float = 150.0
    stride: float = 20.0
    timestep: float = 0.5
    friction: float = 2.0

    def __post_init__(self) -> None:
        for name in ("temperature", "duration", "stride", "timestep", "friction"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        for name in ("duration", "discard", "stride"):
            steps = getattr(self, name) / self.timestep
            if abs(steps - round(steps)) > 1e-6:
                raise ValueError(f"{name}: expected a whole number of time steps of {self.timestep} fs, got "
                                 f"{getattr(self, name)} fs")  # fmt: skip
        if self.discard >= self.duration:
            raise ValueError(f"discard: expected less than duration = {self.duration} fs, got {self.discard} fs")


class ReferenceForce:
    """Picklable callable for `openmm.PythonForce` that evaluates a reference method."""

    def __init__(self, method: ReferenceMethod, structure: Structure) -> None:
        self._method = method
        self._structure = structure
        self._driver: Driver | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_driver": None}

    def __call__(self, state: Any) -> tuple[float, np.ndarray]:
        try:
            if self._driver is None:
                self._driver = self._method.driver(self._structure)
            energy, forces = self._driver(state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM)
            if not (np.isfinite(energy) and np.isfinite(forces).all()):
                raise FloatingPointError("the reference method returned NaN or infinity")
        except Exception:
            # OpenMM keeps only the text of an exception
            raise RuntimeError(traceback.format_exc()) from None
        return energy * KJ_PER_MOL_PER_EV, np.ascontiguousarray(forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM)


def bond_graph(numbers: np.ndarray, positions: np.ndarray, scale: float = 1.25) -> np.ndarray:
    """Which atoms are bonded, ``(n_atoms, n_atoms)`` bool: closer than `scale` times the sum of covalent radii."""
    from ase.data import covalent_radii

    radii = covalent_radii[numbers]
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bonded = distances < scale * (radii[:, None] + radii[None])
    np.fill_diagonal(bonded, False)
    return bonded


def torsion_angle(positions: np.ndarray, atoms: Sequence[int]) -> float:
    """Torsion of four atoms in degrees, IUPAC sign, in (-180, 180]."""
    a, b, c, d = positions[list(atoms)]
    axis = (c - b) / np.linalg.norm(c - b)
    n1, n2 = np.cross(b - a, axis), np.cross(axis, d - c)
    return float(np.degrees(np.arctan2(np.dot(np.cross(n1, n2), axis), np.dot(n1, n2))))


def set_torsion(positions: np.ndarray, bonded: np.ndarray, atoms: Sequence[int], angle: float) -> np.ndarray:
    """Rotate everything on the far side of the central bond so that the torsion is `angle` degrees.

    Raises `ValueError` if the central atoms are not bonded or belong to a ring.
    """
    _, b, c, _ = atoms
    if not bonded[b, c]:
        raise ValueError(f"atoms: expected a bond between atoms {b} and {c} of torsion {tuple(atoms)}, found none")
    far, queue = {c}, [c]
    while queue:
        i = queue.pop()
        for j in np.flatnonzero(bonded[i]).tolist():
            if (i, j) != (c, b) and j not in far:
                far.add(j)
                queue.append(j)
    if b in far:
        raise ValueError(f"atoms: the bond {b}-{c} of torsion {tuple(atoms)} is part of a ring and cannot be rotated")
    turn = np.radians(angle - torsion_angle(positions, atoms))
    axis = positions[c] - positions[b]
    axis = axis / np.linalg.norm(axis)
    moving = np.array(sorted(far))
    v = positions[moving] - positions[c]
    # Rodrigues' rotation formula
    rotated = (
        v * np.cos(turn) + np.cross(axis, v) * np.sin(turn) + np.outer(v @ axis, axis) * (1 - np.cos(turn))
    )
    result = positions.copy()
    result[moving] = positions[c] + rotated
    return result


def _system(structure: Structure, method: ReferenceMethod) -> openmm.System:
    system = openmm.System()
    for z in structure.numbers.tolist():
        system.addParticle(Element.getByAtomicNumber(z).mass)
    system.addForce(openmm.PythonForce(ReferenceForce(method, structure)))
    return system


def _torsion_force(torsions: Sequence[TorsionRestraint]) -> openmm.CustomTorsionForce:
    pi = float(np.pi)
    force = openmm.CustomTorsionForce(f"0.5*k*min(d, {2 * pi}-d)^2; d=abs(theta-theta0)")
    force.addPerTorsionParameter("k")
    force.addPerTorsionParameter("theta0")
    for t in torsions:
        center = (np.radians(t.center) + pi) % (2 * pi) - pi
        force.addTorsion(*t.atoms, [t.force_constant, center])
    return force


def _bonds_apart(bonded: np.ndarray, longest: int) -> np.ndarray:
    """Number of bonds between atoms, ``(n_atoms, n_atoms)``; ``longest + 1`` where it is more than `longest`."""
    n = len(bonded)
    apart = np.where(np.eye(n, dtype=bool), 0, longest + 1)
    reached = np.eye(n, dtype=bool)
    for k in range(1, longest + 1):
        reached = reached | (reached.astype(int) @ bonded.astype(int) > 0)
        apart[reached & (apart > k)] = k
    return apart


def _untangle(
    numbers: np.ndarray, start: np.ndarray, positions: np.ndarray, torsions: Sequence[TorsionRestraint]
) -> np.ndarray:
    """Remove clashes that rigid rotation made, keeping bond lengths, angles and the other torsions of `start`.

    A purely geometric force field: harmonic 1-2, 1-3 and 1-4 distances (1-4 only across bonds that were not
    rotated), harmonic torsions, and a soft repulsion below 0.85 times the sum of the van der Waals radii.
    """
    from ase.data.vdw import vdw_radii

    bonded = bond_graph(numbers, start)
    apart = _bonds_apart(bonded, 3)
    rotated = {frozenset(t.atoms[1:3]) for t in torsions}
    radii = np.nan_to_num(vdw_radii[numbers], nan=2.0)
    system = openmm.System()
    for _ in numbers:
        system.addParticle(12.0)
    keep = openmm.HarmonicBondForce()
    repel = openmm.CustomBondForce("2e4*step(r0-r)*(r0-r)^2")
    repel.addPerBondParameter("r0")
    for i, j in zip(*np.triu_indices(len(numbers), 1), strict=True):
        i, j = int(i), int(j)
        across = {
            frozenset((int(b), int(c)))
            for b in np.flatnonzero(bonded[i])
            for c in np.flatnonzero(bonded[j])
            if bonded[b, c]
        }
        if apart[i, j] < 3 or (apart[i, j] == 3 and not across & rotated):
            keep.addBond(i, j, float(np.linalg.norm(start[i] - start[j])) * NM_PER_ANGSTROM, 5e4 / apart[i, j])
        else:
            repel.addBond(i, j, [0.85 * float(radii[i] + radii[j]) * NM_PER_ANGSTROM])
    for force in (keep, repel, _torsion_force([TorsionRestraint(t.atoms, t.center, 500.0) for t in torsions])):
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions * NM_PER_ANGSTROM)
    openmm.LocalEnergyMinimizer.minimize(context, 1.0, 2000)
    return context.getState(positions=True).getPositions(asNumpy=True)._value * ANGSTROM_PER_NM


def _start_positions(plan: TrajectoryPlan, method: ReferenceMethod) -> np.ndarray:
    """Set the torsions, then relax everything else with the torsions restrained; ``(n_atoms, 3)`` angstrom."""
    numbers, positions = plan.start.numbers, plan.start.positions
    bonded = bond_graph(numbers, positions)
    if plan.torsions:
        for t in plan.torsions:
            positions = set_torsion(positions, bonded, t.atoms, t.center)
        positions = _untangle(numbers, plan.start.positions, positions, plan.torsions)
    system = _system(plan.start, method)
    system.addForce(_torsion_force([TorsionRestraint(t.atoms, t.center, 500.0) for t in plan.torsions]))
    # damped dynamics, because a minimiser's first trial step is often too long for a self-consistent cycle
    integrator = openmm.LangevinMiddleIntegrator(10.0, 80.0, 0.0005)
    integrator.setRandomNumberSeed(plan.seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions * NM_PER_ANGSTROM)
    integrator.step(160)
    relaxed = context.getState(positions=True).getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    if not np.array_equal(bond_graph(numbers, relaxed), bonded):
        raise RuntimeError(f"{plan.name}: bonds changed while the start structure was relaxed")
    return relaxed


def run_trajectory(plan: TrajectoryPlan, method: ReferenceMethod) -> list[Structure]:
    """Run one trajectory (LangevinMiddle integrator) and label every kept frame from scratch.

    Every structure's `info` holds the time (fs), the temperature of the thermostat (K), the torsions (degrees),
    whether its bonds are those of the start, and the split. Raises what the method raises when it fails.
    """
    positions = _start_positions(plan, method)
    bonded = bond_graph(plan.start.numbers, plan.start.positions)
    system = _system(plan.start, method)
    if plan.restrained and plan.torsions:
        system.addForce(_torsion_force(plan.torsions))
    integrator = openmm.LangevinMiddleIntegrator(
        plan.temperature, plan.friction / unit.picosecond, plan.timestep * unit.femtosecond
    )
    integrator.setRandomNumberSeed(plan.seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions * NM_PER_ANGSTROM)
    context.setVelocitiesToTemperature(plan.temperature, plan.seed)
    stride = round(plan.stride / plan.timestep)
    integrator.step(round(plan.discard / plan.timestep))
    frames = []
    for k in range(int((plan.duration - plan.discard) / plan.stride + 1e-9)):
        integrator.step(stride)
        frame = context.getState(positions=True).getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        info = {
            "time_fs": plan.discard + (k + 1) * plan.stride,
            "temperature": plan.temperature,
            "torsions": [round(torsion_angle(frame, t.atoms), 3) for t in plan.torsions],
            "bonds_intact": bool(np.array_equal(bond_graph(plan.start.numbers, frame), bonded)),
            "split": plan.split,
        }
        frames.append(method.label(plan.start.replace(positions=frame, group=plan.name, info=info)))
    return frames
