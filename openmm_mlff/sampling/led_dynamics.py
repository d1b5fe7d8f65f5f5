"""The molecular dynamics between latent steps: one Context that walkers take in turn.

Between two stretches a walker is its positions, velocities and box. Every stretch starts from these with random seeds
of its own, so that a run that goes on from a checkpoint makes the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
from openmm import app

from openmm_mlff.forces import running
from openmm_mlff.sampling import guards
from openmm_mlff.sampling.back_mapping import REPEATABLE, restart
from openmm_mlff.sampling.platforms import PlatformChoice

#: integrators that remember more than positions and velocities
_WITH_MEMORY = (
    openmm.CompoundIntegrator,
    openmm.NoseHooverIntegrator,
    openmm.QTBIntegrator,
    openmm.RPMDIntegrator,
    openmm.VariableLangevinIntegrator,
    openmm.VariableVerletIntegrator,
)


@dataclass
class Walker:
    """Where one walker is in molecular dynamics.

    Attributes:
        positions: ``(n_particles, 3)`` nm, molecules whole. velocities: the same, nm/ps. box: ``(3, 3)`` nm.
    """

    positions: np.ndarray
    velocities: np.ndarray
    box: np.ndarray


@dataclass
class Stretch:
    """Frames of molecular dynamics of one walker.

    Attributes:
        positions: of the solute, ``(frames, n_solute, 3)`` nm. energies: potential ones, ``(frames,)`` kJ/mol.
        walker: at the end of the last frame.
        particles, boxes: all particles, ``(frames, n_particles, 3)`` nm, and box vectors, ``(frames, 3, 3)`` nm; None
            if nobody asked for them.
    """

    positions: np.ndarray
    energies: np.ndarray
    walker: Walker
    particles: np.ndarray | None
    boxes: np.ndarray | None


class MolecularDynamics:
    """Runs walkers for whole frames.

    Args:
        system: of all particles. topology: of the same, for messages. integrator: of fixed step length.
        choice: platform. interval: time between frames, ps. solute: atoms whose positions are recorded.
        failure: folder for the state of a stretch that failed.

    Attributes:
        context: in which they run. steps: per frame.

    Raises `ValueError` for an integrator that cannot take walkers in turn, or whose step does not divide the interval.
    """

    def __init__(
        self,
        system: openmm.System,
        topology: app.Topology,
        integrator: openmm.Integrator,
        choice: PlatformChoice,
        interval: float,
        solute: np.ndarray,
        failure: Path,
    ) -> None:
        if isinstance(integrator, _WITH_MEMORY):
            raise ValueError(
                f"integrator: expected one of fixed step length that remembers positions and velocities only, got a "
                f"{type(integrator).__name__}"
            )
        timestep = integrator.getStepSize()._value
        self.steps = round(interval / timestep)
        if self.steps < 1 or abs(self.steps * timestep - interval) > 1e-6 * interval:
            raise ValueError(
                f"timestep: expected a divisor of the model's interval of {interval:g} ps, got {timestep:g} ps"
            )
        self._system, self._topology, self._integrator = system, topology, integrator
        self._solute, self._failure = solute, failure
        self._fresh = choice.name in REPEATABLE
        try:
            self.context = openmm.Context(system, integrator, choice.platform, choice.properties)
        except openmm.OpenMMException as error:
            raise ValueError(f"platform: {choice.name} cannot run this system ({error})") from error
        self._periodic = system.usesPeriodicBoundaryConditions()

    def run(
        self, walker: Walker, frames: int, seed: int, temperature: float | None = None, everything: bool = False
    ) -> Stretch:
        """Run a walker; a frame is what there is at the end of an interval.

        Args:
            seed: of the stretch. temperature: K, at which new velocities are drawn first; None keeps the walker's.
            everything: keep the positions of all particles too.

        Raises `guards.RunFailed` if coordinates or energies are no longer numbers; the state is saved first.
        """
        self._enter(walker, seed, temperature)
        positions = np.empty((frames, len(self._solute), 3))
        energies = np.empty(frames)
        particles = np.empty((frames, self._system.getNumParticles(), 3)) if everything else None
        boxes = np.empty((frames, 3, 3)) if everything else None
        for k in range(frames):
            try:
                self._integrator.step(self.steps)
                state = self.context.getState(positions=True, energy=True)
            except openmm.OpenMMException as error:
                raise self._failed(k, error) from error
            here = state.getPositions(asNumpy=True)._value
            positions[k] = here[self._solute]
            if particles is not None and boxes is not None:
                particles[k], boxes[k] = here, state.getPeriodicBoxVectors(asNumpy=True)._value
            energies[k] = state.getPotentialEnergy()._value
            if not (np.isfinite(positions[k]).all() and np.isfinite(energies[k])):
                raise self._failed(k, "positions or energy are not numbers")
        return Stretch(positions, energies, self.walker(), particles, boxes)

    def minimize(self, walker: Walker, tolerance: float, max_iterations: int) -> Walker:
        """The walker at a minimum of the energy; force tolerance in kJ/mol/nm."""
        self._enter(walker, 1, None)
        openmm.LocalEnergyMinimizer.minimize(self.context, tolerance, max_iterations)
        return self.walker()

    def walker(self) -> Walker:
        """What the Context holds."""
        state = self.context.getState(positions=True, velocities=True)
        return Walker(
            state.getPositions(asNumpy=True)._value,
            state.getVelocities(asNumpy=True)._value,
            state.getPeriodicBoxVectors(asNumpy=True)._value,
        )

    def _enter(self, walker: Walker, seed: int, temperature: float | None) -> None:
        context = self.context
        if self._fresh:
            restart(context, self._system, self._integrator, seed)
        if self._periodic:
            context.setPeriodicBoxVectors(*walker.box)
        context.setPositions(walker.positions)
        if temperature is None:
            context.setVelocities(walker.velocities)
        else:
            context.setVelocitiesToTemperature(temperature, seed)

    def _failed(self, frame: int, cause: openmm.OpenMMException | str) -> BaseException:
        reason = str(cause)
        if not isinstance(cause, str):
            if running.interrupted(cause):
                return KeyboardInterrupt()
            original = running.last_error(self._system)
            reason = reason if original is None else str(original)
        message = f"molecular dynamics stopped in frame {frame + 1} of a stretch: {reason}"
        folder = guards.save_failure(self._failure, self.context, self._topology, message)
        return guards.RunFailed(f"{message} (System, State and integrator are in {folder})", folder)
