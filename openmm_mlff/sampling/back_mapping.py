"""decoded positions -> a structure that molecular dynamics accepts, or the reason why not.

What a model decodes has bonds, angles and contacts that are only nearly right, and random hydrogens. It is checked,
minimised with its heavy atoms held (first tightly, so that hydrogens and solvent give way, then loosely), checked
again, and brought to temperature: velocities from the Maxwell-Boltzmann distribution and Langevin dynamics of strong
friction, with the heavy atoms held at first and then free. What fails is decoded again.

Units are OpenMM's: nm, ps, kJ/mol, K.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import openmm
from openmm import app

from openmm_mlff.forces import running
from openmm_mlff.sampling.checkpoints import seed_for
from openmm_mlff.sampling.platforms import PlatformChoice, choose_platform
from openmm_mlff.sampling.settings import require_positive, require_whole
from openmm_mlff.sampling.structure_checks import StructureChecks

#: global parameter of the restraint: its force constant, kJ/mol/nm^2
STRENGTH = "back_mapping_restraint"
#: the first so many steps of dynamics are divided into so many shorter ones
GENTLE, DIVIDED = 25, 4
#: platforms whose forces have the same bits every time, and whose random numbers a new start can repeat
REPEATABLE = ("Reference", "CPU")
#: relative, of constrained distances
CONSTRAINT_TOLERANCE = 1e-6
#: what must not act while a structure is relaxed
_LEFT_OUT = (
    openmm.AndersenThermostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloBarostat,
    openmm.MonteCarloFlexibleBarostat,
    openmm.MonteCarloMembraneBarostat,
)


@dataclass(frozen=True)
class RelaxationSettings:
    """How a decoded structure is relaxed.

    Attributes:
        tight, loose: force constants of the restraints in the two minimisations, kJ/mol/nm^2; the loose one also holds
            during the first part of the dynamics.
        iterations: at most, of each minimisation. tolerance: root-mean-square force at its end, kJ/mol/nm.
        restrained, free: lengths of the two parts of the dynamics, ps. 0 leaves a part out.
        friction: of the dynamics, 1/ps.
        max_moved: largest root-mean-square displacement of the heavy atoms in minimisation, nm.
        tries: how many structures are decoded before the last one of MD is taken instead.
    """

    tight: float = 2e4
    loose: float = 1e3
    iterations: int = 200
    tolerance: float = 10.0
    restrained: float = 0.5
    free: float = 1.5
    friction: float = 10.0
    max_moved: float = 0.1
    tries: int = 5

    def __post_init__(self) -> None:
        for name in ("tight", "loose", "tolerance", "friction", "max_moved"):
            require_positive(name, getattr(self, name))
        for name in ("restrained", "free"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a time >= 0 (ps), got {getattr(self, name)!r}")
        for name in ("iterations", "tries"):
            require_whole(name, getattr(self, name), 1)


@dataclass(frozen=True)
class RelaxationReport:
    """What happened to one decoded structure.

    Attributes:
        reason: empty if it was accepted, else ``not finite``, ``inverted``, ``twisted``, ``broken``, ``misplaced``,
            ``clash`` (see `structure_checks.Faults`), ``moved``, ``energy`` or ``unstable``.
        stage: where it was found: ``decoded``, ``minimized`` or ``equilibrated``.
        energies: potential energy of the whole System without restraints, kJ/mol, by stage: ``decoded``, ``tight``,
            ``minimized`` (after the loose minimisation) and ``equilibrated``, as far as it came.
        moved: root-mean-square displacement of heavy atoms in minimisation, nm; NaN if it did not come so far.
        clashes: pairs that overlapped when decoded. inverted: centres of the wrong hand when decoded. misplaced:
            centres whose hydrogen was put on the right side before minimisation.
    """

    reason: str
    stage: str
    energies: Mapping[str, float]
    moved: float
    clashes: int
    inverted: int
    misplaced: int

    @property
    def accepted(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Relaxation:
    """A structure and its report.

    Attributes:
        positions: of all particles, ``(n_particles, 3)`` nm, as far as relaxation came. velocities: the same, nm/ps;
            zero unless it was accepted. Dynamics of the same time step that go on from both are stationary at once;
            newly drawn velocities would heat stiff bonds by a share of (angular frequency x time step / 2)^2.
    """

    report: RelaxationReport
    positions: np.ndarray
    velocities: np.ndarray


@dataclass(frozen=True)
class BackMapped:
    """The first accepted of several decoded structures.

    Attributes:
        found: None if none was accepted. reports: of all that were tried, in order.
    """

    found: Relaxation | None
    reports: tuple[RelaxationReport, ...]


@dataclass
class BackMapper:
    """Relaxes decoded structures of one System, in a Context of its own; the System stays as it is.

    Args:
        system: of all particles, solvent included. topology: of the same.
        solute: indices of the atoms that are decoded, ascending.
        reference: a sound structure of the solute, ``(n_solute, 3)`` nm, molecules whole.
        temperature: K. timestep: of the dynamics, ps.
        platform: name, or a choice made before; None chooses by size.

    Attributes:
        system: the copy that relaxes structures, with restraints and without barostat and thermostat.
        checks: of the solute. heavy: solute atoms that are held, as indices into the solute.

    Raises `ValueError` naming the argument for sizes that do not fit or a reference that has clashes.
    """

    system: openmm.System
    topology: app.Topology
    solute: Sequence[int]
    reference: np.ndarray
    temperature: float = 300.0
    timestep: float = 0.002
    settings: RelaxationSettings = field(default_factory=RelaxationSettings)
    platform: str | PlatformChoice | None = None

    def __post_init__(self) -> None:
        require_positive("temperature", self.temperature)
        require_positive("timestep", self.timestep)
        self._n = self.system.getNumParticles()
        self._solute = np.asarray(self.solute, dtype=np.int64)
        self.checks = StructureChecks(solute_topology(self.topology, self._solute), self.reference)
        self._periodic = self.system.usesPeriodicBoundaryConditions()
        given = self.system
        self.system = openmm.XmlSerializer.clone(given)
        for k in reversed(range(self.system.getNumForces())):
            if isinstance(self.system.getForce(k), _LEFT_OUT):
                self.system.removeForce(k)
        atoms = [list(self.topology.atoms())[i] for i in self._solute]
        self.heavy = np.array(
            [
                k
                for k, (i, atom) in enumerate(zip(self._solute.tolist(), atoms, strict=True))
                if given.getParticleMass(i)._value > 0 and (atom.element is None or atom.element.atomic_number > 1)
            ],
            dtype=np.int64,
        )
        self._restraint = restraint(self._solute[self.heavy].tolist(), self._periodic)
        self.system.addForce(self._restraint)
        choice = self.platform
        if not isinstance(choice, PlatformChoice):
            choice = choose_platform(self._n, choice)
        # its positions have the right distribution at long steps; a leapfrog's are too hot in stiff bonds
        self._integrator = openmm.LangevinMiddleIntegrator(self.temperature, self.settings.friction, self.timestep)
        self._integrator.setConstraintTolerance(CONSTRAINT_TOLERANCE)
        self._context = openmm.Context(self.system, self._integrator, choice.platform, choice.properties)
        self._repeatable = choice.name in REPEATABLE

    def relax(
        self,
        positions: np.ndarray,
        seed: int,
        *,
        box: np.ndarray | None = None,
        parameters: Mapping[str, float] | None = None,
        energy_limit: float = float("inf"),
    ) -> Relaxation:
        """Relax one structure.

        Args:
            positions: of all particles, ``(n_particles, 3)`` nm, the solute whole. box: vectors, ``(3, 3)`` nm.
            parameters: global parameters of the System that differ from their defaults.
            energy_limit: kJ/mol, which the energy must not exceed after minimisation; for example the highest that MD
                has, because a minimised structure lies well below it.
        """
        start = np.asarray(positions, dtype=np.float64)
        if start.shape != (self._n, 3):
            raise ValueError(f"positions: expected shape {(self._n, 3)}, got {start.shape}")
        attempt = _Attempt(self, start, seed)
        try:
            reason, stage = attempt.run(box, parameters or {}, energy_limit)
        except openmm.OpenMMException as error:
            if running.interrupted(error):
                raise KeyboardInterrupt from error
            reason, stage = "unstable", attempt.stage
        return attempt.result(reason, stage)

    def back_map(
        self,
        draw: Callable[[int], np.ndarray],
        seed: int,
        *,
        box: np.ndarray | None = None,
        parameters: Mapping[str, float] | None = None,
        energy_limit: float = float("inf"),
    ) -> BackMapped:
        """Relax one structure after the other until one is accepted, at most `settings.tries`.

        Args:
            draw: ``try -> positions`` of all particles, ``(n_particles, 3)`` nm.
        """
        reports: list[RelaxationReport] = []
        for k in range(self.settings.tries):
            result = self.relax(
                draw(k),
                seed_for(seed, "relax", k),
                box=box,
                parameters=parameters,
                energy_limit=energy_limit,
            )
            reports.append(result.report)
            if result.report.accepted:
                return BackMapped(result, tuple(reports))
        return BackMapped(None, tuple(reports))


class _Attempt:
    """One structure on its way through the stages."""

    def __init__(self, mapper: BackMapper, start: np.ndarray, seed: int) -> None:
        self._mapper, self._start, self._seed = mapper, start, seed
        self._context = mapper._context
        self._solute = mapper._solute
        self._faults = mapper.checks(start[self._solute])
        self._last = start
        self.stage = "decoded"
        self._gentle = GENTLE
        self._energies: dict[str, float] = {}
        self._moved = float("nan")

    def run(self, box: np.ndarray | None, parameters: Mapping[str, float], limit: float) -> tuple[str, str]:
        """Reason of rejection, or an empty text, and the stage where it was found."""
        settings = self._mapper.settings
        if not np.isfinite(self._start).all():
            return "not finite", self.stage
        if self._faults.lasting:
            return self._faults.lasting, self.stage
        if self._faults.misplaced:
            self._start = self._start.copy()
            self._start[self._solute] = self._mapper.checks.mended(self._start[self._solute])
        self._enter(box, parameters)
        self._note("decoded")
        self._minimize(settings.tight)
        self._note("tight")
        self._minimize(settings.loose)
        self._note("minimized")
        heavy = self._solute[self._mapper.heavy]
        reason = self._look("minimized")
        if not reason and len(heavy):
            apart = self._last[heavy] - self._start[heavy]
            self._moved = float(np.sqrt(np.mean(np.sum(apart**2, axis=1))))
            reason = "moved" if self._moved > settings.max_moved else ""
        if not reason and self._energies["minimized"] > limit:
            reason = "energy"
        if reason:
            return reason, self.stage
        self.stage = "equilibrated"
        self._context.setVelocitiesToTemperature(self._mapper.temperature, self._seed)
        self._dynamics(settings.restrained, settings.loose)
        self._dynamics(settings.free, 0.0)
        self._note("equilibrated")
        return self._look("equilibrated"), self.stage

    def result(self, reason: str, stage: str) -> Relaxation:
        faults = self._faults
        counts = (len(f) for f in (faults.clashes, faults.inverted, faults.misplaced))
        report = RelaxationReport(reason, stage, self._energies, self._moved, *counts)
        velocities = np.zeros_like(self._start)
        if not reason:
            velocities = self._context.getState(velocities=True).getVelocities(asNumpy=True)._value
        return Relaxation(report, self._last, velocities)

    def _enter(self, box: np.ndarray | None, parameters: Mapping[str, float]) -> None:
        mapper, context = self._mapper, self._context
        force = mapper._restraint
        for k, i in enumerate(self._solute[mapper.heavy]):
            force.setParticleParameters(k, int(i), self._start[i])
        if mapper._repeatable:
            restart(context, mapper.system, mapper._integrator, self._seed)
        else:
            force.updateParametersInContext(context)
        if box is not None and mapper._periodic:
            context.setPeriodicBoxVectors(*box)
        known = context.getParameters()
        for name, value in parameters.items():
            if name in known:
                context.setParameter(name, value)
        context.setParameter(STRENGTH, 0.0)
        context.setPositions(self._start)
        context.computeVirtualSites()

    def _minimize(self, strength: float) -> None:
        settings = self._mapper.settings
        self._context.setParameter(STRENGTH, strength)
        openmm.LocalEnergyMinimizer.minimize(self._context, settings.tolerance, settings.iterations)
        self._context.applyConstraints(CONSTRAINT_TOLERANCE)
        self._context.setParameter(STRENGTH, 0.0)

    def _dynamics(self, length: float, strength: float) -> None:
        """Dynamics with restraints; the very first steps are shorter."""
        integrator, timestep = self._mapper._integrator, self._mapper.timestep
        self._context.setParameter(STRENGTH, strength)
        left = round(length / timestep)
        gentle = min(self._gentle, left)
        if gentle:
            integrator.setStepSize(timestep / DIVIDED)
            try:
                integrator.step(DIVIDED * gentle)
            finally:
                integrator.setStepSize(timestep)
        integrator.step(left - gentle)
        self._gentle -= gentle
        self._context.setParameter(STRENGTH, 0.0)

    def _note(self, stage: str) -> None:
        state = self._context.getState(positions=True, energy=True)
        self._energies[stage] = state.getPotentialEnergy()._value
        self._last = state.getPositions(asNumpy=True)._value

    def _look(self, stage: str) -> str:
        self.stage = stage
        if not (np.isfinite(self._last).all() and np.isfinite(self._energies[stage])):
            return "unstable"
        return self._mapper.checks(self._last[self._solute]).reason


def restart(context: openmm.Context, system: openmm.System, integrator: openmm.Integrator, seed: int) -> None:
    """Start a Context anew with random seeds of its own; its parameters stay, positions and velocities have to be set.

    What the platform remembers (random numbers, neighbour lists, pair lists of learned forces) is gone, so that the
    steps that follow depend on what is set and on the seed alone.
    """
    parameters = dict(context.getParameters())
    for thing in (integrator, *system.getForces()):
        if hasattr(thing, "setRandomNumberSeed"):
            thing.setRandomNumberSeed(seed)
    context.reinitialize()
    for name, value in parameters.items():
        context.setParameter(name, value)
    running.restore_pair_lists(system, [{} for _ in running.pair_list_state(system)])


def restraint(atoms: Sequence[int], periodic: bool) -> openmm.CustomExternalForce:
    """``k/2 |r - r0|^2`` on each atom; k is the global parameter `STRENGTH`, 0 at first, and r0 has to be set."""
    distance = "periodicdistance(x, y, z, x0, y0, z0)^2" if periodic else "((x-x0)^2 + (y-y0)^2 + (z-z0)^2)"
    force = openmm.CustomExternalForce(f"0.5*{STRENGTH}*{distance}")
    force.addGlobalParameter(STRENGTH, 0.0)
    for name in ("x0", "y0", "z0"):
        force.addPerParticleParameter(name)
    for i in atoms:
        force.addParticle(i, [0.0, 0.0, 0.0])
    force.setName("back-mapping restraint")
    return force


def solute_topology(topology: app.Topology, atoms: Sequence[int] | np.ndarray) -> app.Topology:
    """The topology of some atoms, in order, with the bonds among them and without a box.

    Raises `ValueError` for indices that are out of range, repeated or not ascending, and for none.
    """
    chosen = [int(i) for i in atoms]
    n = topology.getNumAtoms()
    if not chosen:
        raise ValueError("solute: expected at least one atom, got none")
    if chosen[0] < 0 or chosen[-1] >= n or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ValueError(f"solute: expected ascending atom indices from 0 to {n - 1}, got {chosen[:8]}")
    wanted, made = set(chosen), app.Topology()
    twins: dict[int, app.topology.Atom] = {}
    for chain in topology.chains():
        new_chain = None
        for residue in chain.residues():
            inside = [atom for atom in residue.atoms() if atom.index in wanted]
            if not inside:
                continue
            new_chain = new_chain or made.addChain(chain.id)
            new_residue = made.addResidue(residue.name, new_chain, residue.id, residue.insertionCode)
            for atom in inside:
                twins[atom.index] = made.addAtom(atom.name, atom.element, new_residue, atom.id)
    for bond in topology.bonds():
        if bond[0].index in twins and bond[1].index in twins:
            made.addBond(twins[bond[0].index], twins[bond[1].index], bond.type, bond.order)
    return made
