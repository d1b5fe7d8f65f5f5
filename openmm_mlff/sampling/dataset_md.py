"""a method that drives -> trajectories in OpenMM -> labelled structures.

Molecular dynamics with a method of `openmm_mlff.data.reference` as the force, through `openmm.PythonForce`, and
optional harmonic restraints on torsions that hold each trajectory in its window of, say, the Ramachandran plane. The
restraints are forces of their own: the labels never contain them. What drives may be cheaper than what labels. Each
trajectory has its own seed and becomes one shard of a dataset.

Units: angstrom, eV, degrees, femtoseconds, kelvin; OpenMM's units stay inside.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import openmm
from openmm import unit
from openmm.app import Element

from openmm_mlff.data.reference import Driver, ReferenceMethod
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.starts import (
    TorsionRestraint,
    bond_graph,
    set_torsion,
    torsion_angle,
    torsion_force,
    untangle,
)
from openmm_mlff.units import (
    ANGSTROM_PER_NM,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
    NM_PER_ANGSTROM,
)

#: restraint that holds the torsions while a start structure relaxes, kJ/mol/rad^2.
START_FORCE_CONSTANT = 500.0


@dataclass(frozen=True)
class TrajectoryPlan:
    """Everything that decides one trajectory.

    Attributes:
        name: of the shard, and the group of its structures.
        split: what the trajectory is meant for ("train", "valid", "test").
        start: atoms, charge and multiplicity, and the geometry whose `torsions` are set.
        temperature: kelvin. seed: of velocities and thermostat.
        torsions: set at the start (their centres), reported for every frame, and held if `restrained`.
        duration, discard, stride, timestep: femtoseconds; a frame every `stride` after `discard`.
        friction: of the Langevin thermostat, 1/ps.

    Raises `ValueError` naming the argument for a number that is not positive, or a time that is no whole number of
    time steps.
    """

    name: str
    split: str
    start: Structure
    temperature: float
    seed: int
    torsions: tuple[TorsionRestraint, ...] = ()
    restrained: bool = True
    duration: float = 1000.0
    discard: float = 200.0
    stride: float = 20.0
    timestep: float = 0.5
    friction: float = 5.0

    def __post_init__(self) -> None:
        for name in ("temperature", "duration", "stride", "timestep", "friction"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        for name in ("duration", "discard", "stride"):
            steps = getattr(self, name) / self.timestep
            if abs(steps - round(steps)) > 1e-6:
                raise ValueError(
                    f"{name}: expected a whole number of time steps of {self.timestep} fs, got {getattr(self, name)} fs"
                )
        if not 0 <= self.discard <= self.duration - self.stride:
            raise ValueError(
                f"discard: expected room for one stride ({self.stride} fs) in {self.duration} fs, got {self.discard} fs"
            )
        if self.start.cell is not None:
            raise ValueError("start: expected an open system, got one with a cell")


class ReferenceForce:
    """Picklable callable for `openmm.PythonForce` that evaluates a reference method."""

    def __init__(self, method: ReferenceMethod, structure: Structure) -> None:
        self._method = method
        self.structure = structure
        self._driver: Driver | None = None
        self.interrupted = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_driver": None}

    def __call__(self, state: Any) -> tuple[float, np.ndarray]:
        try:
            if self._driver is None:
                self._driver = self._method.driver(self.structure)
            energy, forces = self._driver(state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM)
            if not (np.isfinite(energy) and np.isfinite(forces).all()):
                raise FloatingPointError("the reference method returned NaN or infinity")
        except KeyboardInterrupt:
            self.interrupted = True
            raise
        except Exception:
            # OpenMM keeps only the text of an exception
            raise RuntimeError(traceback.format_exc()) from None
        return energy * KJ_PER_MOL_PER_EV, np.ascontiguousarray(forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM)


def positions_of(context: openmm.Context) -> np.ndarray:
    """``(n_atoms, 3)`` angstrom."""
    return context.getState(positions=True).getPositions(asNumpy=True)._value * ANGSTROM_PER_NM


def _system(force: ReferenceForce, torsions: Iterable[TorsionRestraint]) -> openmm.System:
    system = openmm.System()
    for z in force.structure.numbers.tolist():
        system.addParticle(Element.getByAtomicNumber(z).mass)
    system.addForce(openmm.PythonForce(force))
    system.addForce(torsion_force(tuple(torsions)))
    return system


def make_context(
    force: ReferenceForce, torsions: Iterable[TorsionRestraint], integrator: openmm.Integrator, positions: np.ndarray
) -> openmm.Context:
    """A context on the Reference platform at positions ``(n_atoms, 3)`` angstrom; others are slower."""
    platform = openmm.Platform.getPlatform("Reference")
    context = openmm.Context(_system(force, torsions), integrator, platform)
    context.setPositions(positions * NM_PER_ANGSTROM)
    return context


@contextlib.contextmanager
def interruptible(force: ReferenceForce) -> Iterator[None]:
    """Ctrl-C stays Ctrl-C: OpenMM turns what a force raises into its own exception."""
    try:
        yield
    except openmm.OpenMMException:
        if force.interrupted:
            raise KeyboardInterrupt from None
        raise


def _start_positions(plan: TrajectoryPlan, driver: ReferenceMethod) -> np.ndarray:
    """Set the torsions, then relax everything else with the torsions restrained; ``(n_atoms, 3)`` angstrom.

    Raises `RuntimeError` if a bond forms or breaks on the way.
    """
    numbers, positions = plan.start.numbers, plan.start.positions
    bonded = bond_graph(numbers, positions)
    if plan.torsions:
        for t in plan.torsions:
            positions = set_torsion(positions, bonded, t.atoms, t.center)
        positions = untangle(numbers, plan.start.positions, positions, plan.torsions)
    force = ReferenceForce(driver, plan.start)
    # damped dynamics, because a minimiser's first trial step is often too long for a self-consistent cycle
    integrator = openmm.LangevinMiddleIntegrator(10.0, 80.0, 0.0005)
    integrator.setRandomNumberSeed(plan.seed)
    restraints = (replace(t, force_constant=START_FORCE_CONSTANT) for t in plan.torsions)
    context = make_context(force, restraints, integrator, positions)
    with interruptible(force):
        integrator.step(160)
    relaxed = positions_of(context)
    if not np.array_equal(bond_graph(numbers, relaxed), bonded):
        raise RuntimeError(f"{plan.name}: bonds changed while the start structure was relaxed")
    return relaxed


def run_trajectory(
    plan: TrajectoryPlan, method: ReferenceMethod, driver: ReferenceMethod | None = None
) -> list[Structure]:
    """Run one trajectory (LangevinMiddle integrator, Reference platform) and label every frame from scratch.

    Args:
        method: makes the labels.
        driver: drives the dynamics; `method` itself by default.

    Every structure's ``info`` holds the time (fs), the temperature of the thermostat (K), the torsions (degrees),
    whether its bonds are those of the start, and the split. The same plan gives the same trajectory on the same
    machine. Raises what the methods raise when they fail; inside the dynamics as `openmm.OpenMMException`.
    """
    driver = method if driver is None else driver
    positions = _start_positions(plan, driver)
    bonded = bond_graph(plan.start.numbers, plan.start.positions)
    force = ReferenceForce(driver, plan.start)
    integrator = openmm.LangevinMiddleIntegrator(
        plan.temperature, plan.friction / unit.picosecond, plan.timestep * unit.femtosecond
    )
    integrator.setRandomNumberSeed(plan.seed)
    context = make_context(force, plan.torsions if plan.restrained else (), integrator, positions)
    context.setVelocitiesToTemperature(plan.temperature, plan.seed)
    with interruptible(force):
        integrator.step(round(plan.discard / plan.timestep))
    stride = round(plan.stride / plan.timestep)
    frames = []
    for k in range(int((plan.duration - plan.discard) / plan.stride + 1e-9)):
        with interruptible(force):
            integrator.step(stride)
        frame = positions_of(context)
        info = {
            "time_fs": plan.discard + (k + 1) * plan.stride,
            "temperature": plan.temperature,
            "torsions": [round(torsion_angle(frame, t.atoms), 3) for t in plan.torsions],
            "bonds_intact": bool(np.array_equal(bond_graph(plan.start.numbers, frame), bonded)),
            "split": plan.split,
        }
        frames.append(method.label(plan.start.replace(positions=frame, group=plan.name, info=info)))
    return frames
