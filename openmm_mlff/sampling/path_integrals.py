"""Path-integral molecular dynamics: nuclear quantum effects from rings of beads.

    rings = RingPolymers(potential.createSystem(topology), topology, n_beads=8, temperature=300)
    context = rings.context(rings.integrator(step=0.00025))
    rings.start(context, positions, seed=1)
    context.getIntegrator().step(1000)
    rings.frame(context).kinetic

All beads are replicas in one System (see `replicas`), so a machine-learned force evaluates them together, and the
springs are a force of OpenMM. This samples quantum averages. `ring_dynamics` makes OpenMM's own `RPMDIntegrator` for
the same molecule: ring-polymer dynamics, whose time correlations have a meaning, one bead evaluated after the other.

Units are OpenMM's: nm, ps, kJ/mol, amu, kelvin. `analysis.path_integrals` has the equations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.analysis.path_integrals import (
    primitive_kinetic_energy,
    ring_frequency,
    squared_gyration,
    virial_kinetic_energy,
)
from openmm_mlff.sampling.replicas import Replicas

#: force group of the springs
SPRINGS = 31


@dataclass(frozen=True)
class RingFrame:
    """All beads of one molecule at one moment, with the estimators of `analysis.path_integrals`.

    Attributes:
        positions: ``(n_beads, n_atoms, 3)`` nm. forces: physical ones, without springs, kJ/mol/nm, the same shape.
        kinetic, primitive: kinetic energy of each atom by the centroid virial and by the primitive estimator,
            ``(n_atoms,)`` kJ/mol. gyration: squared radius of gyration of each atom's ring, ``(n_atoms,)`` nm^2.
    """

    positions: np.ndarray
    forces: np.ndarray
    kinetic: np.ndarray
    primitive: np.ndarray
    gyration: np.ndarray


@dataclass
class RingPolymers:
    """A molecule of quantum particles as rings of beads in one System.

    Args:
        single: the System of one molecule, without constraints or virtual sites.
        topology: of one molecule.
        n_beads: P. The highest frequency of the potential needs P well above hbar omega / k T.
        temperature: K.
        batch: beads in one evaluation of a machine-learned force; None chooses.

    Attributes:
        replicas: the beads as `Replicas`. system: theirs, with the springs in force group `SPRINGS`.

    Raises `ValueError` naming the argument for constraints, virtual sites or frozen atoms, and what `Replicas` raises.
    """

    single: openmm.System
    topology: app.Topology
    n_beads: int
    temperature: float
    batch: int | None = None
    replicas: Replicas = field(init=False)

    def __post_init__(self) -> None:
        omega = ring_frequency(self.n_beads, self.temperature)
        _check_particles(self.single)
        if any(force.getForceGroup() == SPRINGS for force in self.single.getForces()):
            raise ValueError(f"system: expected no force in group {SPRINGS}, which the springs take")
        self.replicas = Replicas(self.single, self.topology, self.n_beads, self.batch)
        if self.n_beads > 1:
            self.system.addForce(springs(self.replicas.masses, self.n_beads, omega))

    @property
    def system(self) -> openmm.System:
        """All beads, with springs."""
        return self.replicas.system

    @property
    def masses(self) -> np.ndarray:
        """``(n_atoms,)`` amu."""
        return self.replicas.masses

    def integrator(self, step: float, friction: float = 1.0, seed: int = 0) -> openmm.Integrator:
        """Langevin dynamics at the temperature P T of the beads.

        The stiffest springs have a period of pi hbar / (P k T), 10 fs for 8 beads at 300 K; the step has to be some
        twenty times shorter.

        Args:
            step: ps. friction: 1/ps. seed: of the random forces; 0 takes a new one.
        """
        integrator = openmm.LangevinMiddleIntegrator(self.n_beads * self.temperature, friction, step)
        integrator.setRandomNumberSeed(seed)
        return integrator

    def context(
        self, integrator: openmm.Integrator, platform: str | None = None, threads: int | None = None
    ) -> openmm.Context:
        """A Context of all beads, on the platform asked for or the one for this size."""
        return self.replicas.context(integrator, platform, threads)

    def start(self, context: openmm.Context, positions: np.ndarray | unit.Quantity, seed: int) -> None:
        """Set positions ``(n_atoms, 3)`` nm for all beads alike, or ``(n_beads, n_atoms, 3)``, and draw velocities.

        Beads that start in one place open into rings within some periods of the springs.
        """
        self.replicas.set_positions(context, positions)
        self.replicas.set_velocities(context, self.n_beads * self.temperature, seed)

    def frame(self, context: openmm.Context) -> RingFrame:
        """The beads now, with the physical forces; costs one evaluation."""
        state = context.getState(positions=True, forces=True, groups=set(range(32)) - {SPRINGS})
        positions = self.replicas.split(state.getPositions(asNumpy=True)._value)
        forces = self.replicas.split(state.getForces(asNumpy=True)._value)
        return _frame(positions, forces, self.masses, self.temperature)


def springs(masses: np.ndarray, n_beads: int, omega: float) -> openmm.HarmonicBondForce:
    """The springs m omega^2 (q_k - q_(k+1))^2 / 2 between neighbouring beads of every atom.

    Args:
        masses: ``(n_atoms,)`` amu; bead k of atom i is particle ``k * n_atoms + i``. omega: 1/ps.
    """
    force = openmm.HarmonicBondForce()
    force.setName("ring-polymer springs")
    force.setForceGroup(SPRINGS)
    size = len(masses)
    for k in range(n_beads):
        following = (k + 1) % n_beads
        for i, mass in enumerate(masses):
            force.addBond(k * size + i, following * size + i, 0.0, float(mass) * omega**2)
    return force


def ring_dynamics(
    system: openmm.System,
    n_beads: int,
    temperature: float,
    step: float,
    friction: float = 1.0,
    seed: int = 0,
    platform: str = "Reference",
) -> openmm.Context:
    """A Context with `openmm.RPMDIntegrator` for one molecule, whose model it calls once per bead and step.

    Args:
        system: of one molecule, without constraints or virtual sites. temperature: K. step: ps. friction: 1/ps.

    Raises `ValueError` for constraints, virtual sites or frozen atoms.
    """
    ring_frequency(n_beads, temperature)
    _check_particles(system)
    integrator = openmm.RPMDIntegrator(n_beads, temperature, friction, step)
    integrator.setRandomNumberSeed(seed)
    return openmm.Context(system, integrator, openmm.Platform.getPlatform(platform))


def start_ring_dynamics(context: openmm.Context, positions: np.ndarray, masses: np.ndarray, seed: int) -> None:
    """Put all beads of a `ring_dynamics` Context in one place, ``(n_atoms, 3)`` nm, or give each its own
    ``(n_beads, n_atoms, 3)``, and draw velocities at P T."""
    integrator = context.getIntegrator()
    n_beads = integrator.getNumCopies()
    everywhere = np.broadcast_to(positions, (n_beads, *np.shape(positions)[-2:]))
    random = np.random.default_rng(seed)
    thermal = n_beads * unit.MOLAR_GAS_CONSTANT_R * integrator.getTemperature()
    width = np.sqrt(thermal.value_in_unit(unit.kilojoule_per_mole) / np.asarray(masses))[:, None]
    # the integrator refuses to run before the Context itself has positions
    context.setPositions(everywhere[0])
    for k in range(n_beads):
        integrator.setPositions(k, everywhere[k])
        integrator.setVelocities(k, width * random.standard_normal(everywhere[k].shape))


def ring_dynamics_frame(context: openmm.Context, masses: np.ndarray) -> RingFrame:
    """The beads of a `ring_dynamics` Context now; costs one evaluation per bead."""
    integrator = context.getIntegrator()
    states = [integrator.getState(k, getPositions=True, getForces=True) for k in range(integrator.getNumCopies())]
    positions = np.array([state.getPositions(asNumpy=True)._value for state in states])
    forces = np.array([state.getForces(asNumpy=True)._value for state in states])
    return _frame(positions, forces, masses, integrator.getTemperature()._value)


def _frame(positions: np.ndarray, forces: np.ndarray, masses: np.ndarray, temperature: float) -> RingFrame:
    return RingFrame(
        positions,
        forces,
        virial_kinetic_energy(positions, forces, temperature),
        primitive_kinetic_energy(positions, masses, temperature),
        squared_gyration(positions),
    )


def _check_particles(system: openmm.System) -> None:
    if system.getNumConstraints():
        raise ValueError("system: expected no constraints, because rigid bonds have no beads; build it without them")
    for i in range(system.getNumParticles()):
        if system.isVirtualSite(i) or system.getParticleMass(i)._value <= 0:
            raise ValueError(f"system: expected particles with masses, but particle {i} is a virtual site or frozen")
