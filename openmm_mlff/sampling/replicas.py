"""Many independent copies of one molecule in one System, with one batched evaluation of the model per step.

    replicas = Replicas(MLPotential("spookynet-ala2-gfn2").createSystem(topology), topology, n=64)
    context = replicas.context(openmm.LangevinMiddleIntegrator(300, 1, 0.001))
    replicas.set_positions(context, positions)
    replicas.set_velocities(context, temperature=300, seeds=1)
    context.getIntegrator().step(1000)
    replicas.frame(context).potential

`replicas.system` is an ordinary OpenMM System, which `openmm.app.Simulation` takes as well; `replicate` says what it
holds. `sampling.replica_runs` runs it in a folder, with files for every observable and a checkpoint to resume from.

Units are OpenMM's: nm, nm/ps, kJ/mol, kelvin; arrays have the replica as their first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.forces import running
from openmm_mlff.forces.python_force import ForceComputation
from openmm_mlff.sampling.bookkeeping import degrees_of_freedom
from openmm_mlff.sampling.platforms import PlatformChoice, choose_for_many
from openmm_mlff.sampling.replicate import replicate_topology, replicate_with_computations
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

#: forces without energy, or whose energy belongs to no copy
_WITHOUT_ENERGY = ("CMMotionRemover", "AndersenThermostat", "PythonForce")


@dataclass(frozen=True)
class ReplicaFrame:
    """All replicas at one moment.

    Attributes:
        positions: ``(n, n_particles, 3)`` nm. velocities: the same, nm/ps. forces: the same, kJ/mol/nm.
        potential, kinetic: energies, ``(n,)`` kJ/mol. temperature: ``(n,)`` K.
    """

    positions: np.ndarray
    velocities: np.ndarray
    forces: np.ndarray
    potential: np.ndarray
    kinetic: np.ndarray
    temperature: np.ndarray


@dataclass
class Replicas:
    """`n` copies of a molecule, and what can be asked about each of them.

    Args:
        single: the System of one molecule.
        topology: of one molecule.
        n: how many copies.
        batch: copies in one evaluation of a machine-learned force; None chooses.

    Attributes:
        system: the System of all copies (`replicate`). size: particles per copy. masses: of a copy, ``(size,)`` amu.
        degrees_of_freedom: of one copy, 3 per massive particle less constraints; its centre of mass moves.
        notes: what is different from a run of a single copy, in words.

    Raises `ValueError` naming the argument for what cannot be copied, or a topology of another size.
    """

    single: openmm.System
    topology: app.Topology
    n: int
    batch: int | None = None
    system: openmm.System = field(init=False)
    notes: list[str] = field(init=False)
    _learned: list[ForceComputation] = field(init=False, repr=False)
    _native: openmm.Context | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.size = self.single.getNumParticles()
        if self.topology.getNumAtoms() != self.size:
            raise ValueError(
                f"topology: expected {self.size} atoms, as the System has, got {self.topology.getNumAtoms()}"
            )
        self.system, self._learned = replicate_with_computations(self.single, self.n, self.batch)
        self.masses = np.array([self.single.getParticleMass(i)._value for i in range(self.size)])
        self.degrees_of_freedom = degrees_of_freedom(self.system) // self.n
        self.notes = []
        if any(isinstance(force, openmm.CMMotionRemover) for force in self.single.getForces()):
            self.notes.append("every copy keeps the motion of its centre of mass (no CMMotionRemover)")
        self._has_native = any(_has_energy(force) for force in self.single.getForces())

    @property
    def n_constraints(self) -> int:
        """Constraints per copy."""
        return self.single.getNumConstraints()

    def all_topology(self) -> app.Topology:
        """The topology of all copies, one after the other."""
        return replicate_topology(self.topology, self.n)

    def platform(self, name: str | None = None, threads: int | None = None) -> PlatformChoice:
        """The platform asked for, or the one for these copies (see `platforms.choose_for_many`)."""
        return choose_for_many(self.system, name, threads)

    def context(
        self, integrator: openmm.Integrator, platform: str | None = None, threads: int | None = None
    ) -> openmm.Context:
        """A Context of all copies (see `platform`)."""
        choice = self.platform(platform, threads)
        return openmm.Context(self.system, integrator, choice.platform, choice.properties)

    # -- what goes in ----------------------------------------------------------------------------------------------

    def set_positions(self, context: openmm.Context, positions: np.ndarray | unit.Quantity) -> None:
        """Set positions ``(n, size, 3)``, or ``(size, 3)`` for all copies alike, in nm or a Quantity.

        Copies may overlap in space: they do not see one another.
        """
        values = self.checked_positions(positions)
        context.setPositions(values.reshape(-1, 3))

    def checked_positions(self, positions: np.ndarray | unit.Quantity) -> np.ndarray:
        """Positions ``(n, size, 3)`` nm; raises `ValueError` for another shape or numbers that are not finite."""
        given: Any = positions
        values = np.asarray(given.value_in_unit(unit.nanometer) if unit.is_quantity(given) else given, dtype=np.float64)
        if values.shape not in ((self.size, 3), (self.n, self.size, 3)):
            raise ValueError(
                f"positions: expected shape {(self.n, self.size, 3)} or {(self.size, 3)}, got {values.shape}"
            )
        if not np.isfinite(values).all():
            bad = "" if values.ndim == 2 else f" in replica {int(np.argmin(np.isfinite(values).all(axis=(1, 2))))}"
            raise ValueError(f"positions: expected finite numbers, got NaN or infinity{bad}")
        return np.ascontiguousarray(np.broadcast_to(values, (self.n, self.size, 3)))

    def set_velocities(self, context: openmm.Context, temperature: float, seeds: int | Sequence[int]) -> None:
        """Draw velocities from the Maxwell-Boltzmann distribution at `temperature` (K).

        Every replica has a random generator of its own, so its velocities do not depend on how many others there are.

        Args:
            seeds: one per replica, or one number from which replica k takes ``(seeds, k)``.
        """
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number (K), got {temperature!r}")
        streams = [(seeds, k) for k in range(self.n)] if isinstance(seeds, int) else list(seeds)
        if len(streams) != self.n:
            raise ValueError(f"seeds: expected one number, or one for each of {self.n} replicas, got {len(streams)}")
        moves = self.masses > 0
        width = np.sqrt(BOLTZMANN_KJ_PER_MOL * temperature / np.where(moves, self.masses, 1.0)) * moves
        draws = np.stack([np.random.default_rng(s).standard_normal((self.size, 3)) for s in streams])
        context.setVelocities((draws * width[:, None]).reshape(-1, 3))
        if self.n_constraints:
            context.applyVelocityConstraints(1e-8)

    def minimize(
        self,
        context: openmm.Context,
        tolerance: float = 10.0,
        max_iterations: int = 0,
        reporter: openmm.MinimizationReporter | None = None,
    ) -> np.ndarray:
        """Minimise all replicas together; returns their energies ``(n,)`` kJ/mol.

        Together they are one function of all positions, so the root-mean-square force of all copies is brought down
        to ``tolerance / sqrt(n)``, which no single copy can then exceed by itself.

        Args:
            tolerance: root-mean-square force on the particles of any one copy, kJ/mol/nm.
            max_iterations: 0 goes on until the tolerance is reached.
        """
        with running.without_force_limit(self.system):
            openmm.LocalEnergyMinimizer.minimize(context, tolerance / np.sqrt(self.n), max_iterations, reporter)
        return self.potential_energies(context)

    # -- what comes out --------------------------------------------------------------------------------------------

    def positions(self, context: openmm.Context) -> np.ndarray:
        """``(n, size, 3)`` nm."""
        return self.split(context.getState(positions=True).getPositions(asNumpy=True)._value)

    def split(self, values: np.ndarray) -> np.ndarray:
        """``(n * size, ...)`` -> ``(n, size, ...)``, without a copy."""
        return values.reshape(self.n, self.size, *values.shape[1:])

    def potential_energies(self, context: openmm.Context) -> np.ndarray:
        """Of every replica, ``(n,)`` kJ/mol; costs one evaluation of all forces.

        Machine-learned energies come out of the batched evaluation copy by copy; those of OpenMM's own forces are
        computed by OpenMM for one copy after the other.
        """
        state = context.getState(positions=True, energy=True)
        return self._potential(context, self.split(state.getPositions(asNumpy=True)._value))

    def kinetic_energies(self, context: openmm.Context) -> np.ndarray:
        """Of every replica, ``(n,)`` kJ/mol, from velocities at the time of the positions."""
        state = context.getState(positions=True, velocities=True, forces=True)
        return self._kinetic(context, state)

    def frame(self, context: openmm.Context) -> ReplicaFrame:
        """Positions, velocities, forces and energies of all replicas; costs one evaluation of all forces."""
        state = context.getState(positions=True, velocities=True, forces=True, energy=True)
        positions = self.split(state.getPositions(asNumpy=True)._value)
        kinetic = self._kinetic(context, state)
        return ReplicaFrame(
            positions=positions,
            velocities=self.split(state.getVelocities(asNumpy=True)._value),
            forces=self.split(state.getForces(asNumpy=True)._value),
            potential=self._potential(context, positions),
            kinetic=kinetic,
            temperature=2.0 * kinetic / (self.degrees_of_freedom * BOLTZMANN_KJ_PER_MOL),
        )

    def _kinetic(self, context: openmm.Context, state: openmm.State) -> np.ndarray:
        velocities = self.split(state.getVelocities(asNumpy=True)._value)
        integrator = context.getIntegrator()
        if isinstance(integrator, _LEAPFROG):
            # a leapfrog keeps velocities half a step behind the positions; OpenMM reports energies in step
            half_step = 0.5 * integrator.getStepSize()._value
            forces = self.split(state.getForces(asNumpy=True)._value)
            velocities = velocities + half_step * forces * self._inverse_masses()[:, None]
            if self.n_constraints:
                positions = self.split(state.getPositions(asNumpy=True)._value)
                velocities = self._constrained(positions, velocities)
        return 0.5 * np.einsum("a,kax,kax->k", self.masses, velocities, velocities)

    def _inverse_masses(self) -> np.ndarray:
        return np.divide(1.0, self.masses, out=np.zeros_like(self.masses), where=self.masses > 0)

    def _constrained(self, positions: np.ndarray, velocities: np.ndarray) -> np.ndarray:
        """Velocities without their components along the constraints, by one linear system per replica."""
        pairs = np.array([self.single.getConstraintParameters(c)[:2] for c in range(self.n_constraints)])
        along = positions[:, pairs[:, 0]] - positions[:, pairs[:, 1]]
        jacobian = np.zeros((self.n, self.n_constraints, self.size, 3))
        rows = np.arange(self.n_constraints)
        jacobian[:, rows, pairs[:, 0]], jacobian[:, rows, pairs[:, 1]] = along, -along
        weighted = jacobian * self._inverse_masses()[:, None]
        matrix = np.einsum("kcax,kdax->kcd", jacobian, weighted)
        rates = np.einsum("kcax,kax->kc", jacobian, velocities)
        return velocities - np.einsum("kcax,kc->kax", weighted, np.linalg.solve(matrix, rates[..., None])[..., 0])

    def _potential(self, context: openmm.Context, positions: np.ndarray) -> np.ndarray:
        """Energies at the positions of the evaluation that has just been made."""
        energies = np.zeros(self.n)
        for computation in self._learned:
            assert computation.energies is not None
            energies += computation.energies
        return energies + self._native_energies(context, positions) if self._has_native else energies

    def _native_energies(self, context: openmm.Context, positions: np.ndarray) -> np.ndarray:
        if self._native is None:
            self._native = _native_context(self.single)
        native = self._native
        if self.single.usesPeriodicBoundaryConditions():
            native.setPeriodicBoxVectors(*context.getState().getPeriodicBoxVectors())
        parameters = context.getParameters()
        for name in native.getParameters():
            native.setParameter(name, parameters[name])
        found = np.empty(self.n)
        for k in range(self.n):
            native.setPositions(positions[k])
            found[k] = native.getState(energy=True).getPotentialEnergy()._value
        return found


#: velocities are half a step behind
_LEAPFROG = (openmm.VerletIntegrator, openmm.VariableVerletIntegrator, openmm.VariableLangevinIntegrator)


def _has_energy(force: openmm.Force) -> bool:
    if type(force).__name__ in _WITHOUT_ENERGY:
        return False
    if isinstance(force, openmm.HarmonicBondForce):
        # openmm-mlff adds bonds of zero strength that only tell OpenMM what a molecule is
        return any(force.getBondParameters(b)[3]._value for b in range(force.getNumBonds()))
    return True


def _native_context(single: openmm.System) -> openmm.Context:
    """One copy with OpenMM's own forces only."""
    system = openmm.System()
    for i in range(single.getNumParticles()):
        system.addParticle(single.getParticleMass(i))
    system.setDefaultPeriodicBoxVectors(*single.getDefaultPeriodicBoxVectors())
    for force in single.getForces():
        if _has_energy(force):
            system.addForce(openmm.XmlSerializer.clone(force))
    return openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
