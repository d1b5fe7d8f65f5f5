"""Many different molecules in one System, with one batched evaluation of the model per step.

    molecules = Molecules([potential.createSystem(t) for t in topologies], topologies)
    molecules = Molecules.from_potential(potential, structures)            # of a potential in memory
    context = molecules.context(openmm.LangevinMiddleIntegrator(298.15, 1, 0.001))
    molecules.set_positions(context, positions)
    molecules.set_velocities(context, 298.15, seeds=1)
    context.getIntegrator().step(1000)
    molecules.failures                                                     # which molecules broke, when, and why

Particles of molecule k are ``offsets[k]`` to ``offsets[k + 1]``. A molecule that breaks is held: its machine-learned
forces are zero, it stays in the batch at its last good positions and is reported, and `restart` puts it back. The
others are the same bit for bit as if it had not broken. `sampling.molecule_runs.sample` does all this for a set of
molecules.

Units are OpenMM's: nm, nm/ps, kJ/mol, kelvin; structures and failures are in angstrom.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.force_spec import DEFAULT_MAX_FORCE, PRECISIONS, ForceSpec
from openmm_mlff.forces.molecule_force import Failure, MoleculeGuard, MoleculesComputation, MoleculesSpec
from openmm_mlff.forces.python_force import make_force
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.sampling.combine import combine_with_computations
from openmm_mlff.sampling.fire import Fire
from openmm_mlff.sampling.guards import watched_bonds
from openmm_mlff.sampling.platforms import PlatformChoice, choose_for_many
from openmm_mlff.sampling.replicas import _LEAPFROG, _has_energy, _native_context
from openmm_mlff.units import ANGSTROM_PER_NM, BOLTZMANN_KJ_PER_MOL, NM_PER_ANGSTROM

__all__ = ["Failure", "Molecules", "MoleculesFrame"]


@dataclass(frozen=True)
class MoleculesFrame:
    """All molecules at one moment.

    Attributes:
        positions: ``(n_atoms, 3)`` nm of each molecule. velocities: the same, nm/ps. forces: the same, kJ/mol/nm.
        potential, kinetic: energies, ``(n,)`` kJ/mol. temperature: ``(n,)`` K.
    """

    positions: list[np.ndarray]
    velocities: list[np.ndarray]
    forces: list[np.ndarray]
    potential: np.ndarray
    kinetic: np.ndarray
    temperature: np.ndarray


@dataclass
class _Learned:
    """A machine-learned force, and which molecule each of its pieces belongs to."""

    computation: MoleculesComputation
    members: np.ndarray


class Molecules:
    """Different molecules that do not see one another, and what can be asked about each of them.

    Args:
        systems: one per molecule, for example from ``MLPotential(...).createSystem(topology)`` (see `combine`).
        topologies: of the molecules. Their bonds are those that must stay whole; where a molecule has none, atoms are
            bonded that are close enough at the start.
        batch: molecules in one evaluation of a machine-learned force; None takes all.

    Attributes:
        system: all molecules in one System. n: how many. offsets: ``(n + 1,)``. masses: ``(n_particles,)`` amu.
        starts: the first positions that were set, ``(n_atoms, 3)`` nm of each molecule; None before.
        degrees_of_freedom: of each molecule, 3 per massive particle less constraints; centres of mass move.

    Raises `ValueError` naming the argument for what cannot be combined, or a topology of another size.
    """

    def __init__(
        self, systems: Sequence[openmm.System], topologies: Sequence[app.Topology], batch: int | None = None
    ) -> None:
        sizes = [system.getNumParticles() for system in systems]
        if [topology.getNumAtoms() for topology in topologies] != sizes:
            raise ValueError(
                f"topologies: expected {sizes} atoms, as the systems have, got {[t.getNumAtoms() for t in topologies]}"
            )
        system, learned = combine_with_computations(systems, batch)
        atoms = [atom for topology in topologies for atom in topology.atoms()]
        numbers = [0 if atom.element is None else atom.element.atomic_number for atom in atoms]
        bonds = [[(b.atom1.index, b.atom2.index) for b in topology.bonds()] or None for topology in topologies]
        self._set_up(system, sizes, [_Learned(c, np.array(k)) for c, k in learned], np.array(numbers), bonds, systems)

    def _set_up(
        self,
        system: openmm.System,
        sizes: Sequence[int],
        learned: list[_Learned],
        numbers: np.ndarray,
        bonds: Sequence[Sequence[tuple[int, int]] | None],
        singles: Sequence[openmm.System] = (),
    ) -> None:
        self.system, self._learned, self._numbers, self._bonds = system, learned, numbers, bonds
        self.offsets = np.cumsum([0, *sizes])
        self.n = len(sizes)
        self.masses = np.array([system.getParticleMass(i)._value for i in range(system.getNumParticles())])
        self.starts: list[np.ndarray] | None = None
        self._segment = np.repeat(np.arange(self.n), sizes)
        pairs = [system.getConstraintParameters(c)[:2] for c in range(system.getNumConstraints())]
        held = [self._segment[a] for a, b in pairs if self.masses[a] > 0 or self.masses[b] > 0]
        free = 3 * np.add.reduceat((self.masses > 0).astype(np.int64), self.offsets[:-1])
        self.degrees_of_freedom = np.maximum(1, free - np.bincount(held, minlength=self.n).astype(np.int64))
        self._singles = list(singles)
        self._native: dict[int, openmm.Context] = {}
        self._has_native = any(_has_energy(force) for single in singles for force in single.getForces())

    @classmethod
    def from_potential(
        cls,
        potential: Potential,
        structures: Sequence[Structure],
        precision: str | None = "single",
        compile: bool | str = True,
        threads: int | None = None,
        batch: int | None = None,
        max_force: float | None = DEFAULT_MAX_FORCE,
    ) -> Molecules:
        """Molecules by a potential in memory, without a model file; the System cannot be stored.

        Args:
            potential: a copy is made, so that later changes of its weights do nothing; see `set_potential`.
            structures: open molecules, positions in angstrom; they are the `starts`. ``info["topology_bonds"]``
                (pairs of indices, or an empty list) are the bonds that must stay whole; where it is missing, atoms are
                bonded that are close enough.
            precision: 'single', 'double', or None for the potential's own. compile: as for `Potential.evaluator`.
            threads: of torch; None chooses by size.
            batch: molecules in one evaluation; None takes all.
            max_force: kJ/mol/nm; a molecule with a larger force on any atom is held. None: no limit.

        Raises `ValueError` naming the argument for no structures, a periodic one, or one that the potential refuses.
        """
        if not structures:
            raise ValueError("structures: expected at least one molecule, got none")
        for k, structure in enumerate(structures):
            if structure.cell is not None:
                raise ValueError(f"structures: expected open molecules, got periodic box vectors for molecule {k}")
            try:
                potential.check(structure)
                potential.check_geometry(structure)
            except ValueError as error:
                raise ValueError(f"{error} (molecule {k})") from error
        sizes = [len(s) for s in structures]
        numbers = np.concatenate([s.numbers for s in structures])
        common = ForceSpec(
            sha256="",
            family=potential.family,
            numbers=tuple(numbers.tolist()),
            precision=precision,
            compile=compile,
            threads=threads,
            batch=batch,
            max_force=max_force,
        )
        electrons = zip(*((s.charge, s.multiplicity) for s in structures), strict=True)
        computation = MoleculesComputation(MoleculesSpec(common, tuple(sizes), *electrons), _own(potential, precision))
        system = openmm.System()
        for z in numbers.tolist():
            system.addParticle(app.Element.getByAtomicNumber(z).mass)
        system.addForce(make_force(computation))
        bonds = [s.info.get("topology_bonds") for s in structures]
        molecules = cls.__new__(cls)
        learned = [_Learned(computation, np.arange(len(sizes)))]
        molecules._set_up(system, sizes, learned, numbers, bonds)
        molecules._arm([s.positions * NM_PER_ANGSTROM for s in structures])
        return molecules

    def set_potential(self, potential: Potential) -> None:
        """Go on with another potential in memory for the same molecules; contexts stay as they are."""
        for learned in self._learned:
            learned.computation.use(_own(potential, learned.computation.spec.precision))

    # -- broken molecules --------------------------------------------------------------------------------------------

    def _arm(self, starts: Sequence[np.ndarray]) -> None:
        """Let the guards know what the molecules look like when they are sound."""
        self.starts = [np.array(start) for start in starts]
        where = np.concatenate(starts) * ANGSTROM_PER_NM
        every, longest = watched_bonds(self._numbers, self.split(where), self._bonds)
        for learned in self._learned:
            spec = learned.computation.spec
            place = np.full(len(where), -1)
            atoms = np.arange(len(where)) if spec.atoms is None else np.array(spec.atoms)
            place[atoms] = np.arange(len(atoms))
            inside = (place[every] >= 0).all(axis=1)
            limit = np.inf if spec.max_force is None else spec.max_force
            learned.computation.guard = MoleculeGuard(where[atoms], place[every[inside]], longest[inside], limit)

    @property
    def failures(self) -> list[Failure]:
        """Every time that a molecule was held, oldest first."""
        found = [
            Failure(int(learned.members[failure.molecule]), failure.step, failure.reason, failure.positions)
            for learned in self._learned
            if learned.computation.guard is not None
            for failure in learned.computation.guard.failures
        ]
        return sorted(found, key=lambda failure: failure.step)

    @property
    def held(self) -> np.ndarray:
        """Which molecules are held, ``(n,)`` bool."""
        held = np.zeros(self.n, dtype=bool)
        for learned in self._learned:
            if learned.computation.guard is not None:
                held[learned.members[learned.computation.guard.held]] = True
        return held

    @property
    def last_error(self) -> BaseException | None:
        """The exception that stopped the last evaluation, with its real type; None if nothing did."""
        return next((x.computation.error for x in self._learned if x.computation.error is not None), None)

    def restart(
        self,
        context: openmm.Context,
        molecule: int,
        temperature: float,
        seed: int | Sequence[int],
        positions: np.ndarray | None = None,
    ) -> None:
        """Put one molecule at `positions` (nm; None: its start) with fresh velocities, and let it move again.

        Nothing of the other molecules changes, not by a bit on the Reference and CPU platforms.
        """
        assert self.starts is not None
        state = context.getState(positions=True, velocities=True)
        where, velocities = (np.array(x._value) for x in (state.getPositions(True), state.getVelocities(True)))
        atoms = self._particles(molecule)
        where[atoms] = self.starts[molecule] if positions is None else positions
        velocities[atoms] = self.thermal_velocities(molecule, temperature, seed)
        context.setPositions(where)
        context.setVelocities(velocities)
        for learned in self._learned:
            if learned.computation.guard is not None:
                learned.computation.guard.held[learned.members == molecule] = False

    # -- contexts ------------------------------------------------------------------------------------------------------

    def platform(self, name: str | None = None, threads: int | None = None) -> PlatformChoice:
        """The platform asked for, or the one for these molecules (see `platforms.choose_for_many`)."""
        return choose_for_many(self.system, name, threads)

    def context(
        self, integrator: openmm.Integrator, platform: str | None = None, threads: int | None = None
    ) -> openmm.Context:
        """A Context of all molecules (see `platform`)."""
        choice = self.platform(platform, threads)
        return openmm.Context(self.system, integrator, choice.platform, choice.properties)

    # -- what goes in ----------------------------------------------------------------------------------------------

    def set_positions(
        self, context: openmm.Context, positions: Sequence[np.ndarray] | np.ndarray | unit.Quantity | None = None
    ) -> None:
        """Set positions: one array ``(n_atoms, 3)`` nm per molecule, or all ``(n_particles, 3)``; None: `starts`.

        The first positions that are set become the `starts`. Molecules may overlap in space.
        """
        if positions is None:
            if self.starts is None:
                raise ValueError("positions: expected those of all molecules, because none have been set, got None")
            positions = np.concatenate(self.starts)
        values = self._joined("positions", positions)
        if self.starts is None:
            self._arm(self.split(values))
        context.setPositions(values)

    def set_velocities(
        self, context: openmm.Context, temperature: float, seeds: int | Sequence[int | Sequence[int]]
    ) -> None:
        """Draw velocities from the Maxwell-Boltzmann distribution at `temperature` (K).

        Args:
            seeds: one per molecule, or one number from which molecule k takes ``(seeds, k)``.
        """
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number (K), got {temperature!r}")
        streams = [(seeds, k) for k in range(self.n)] if isinstance(seeds, int) else list(seeds)
        if len(streams) != self.n:
            raise ValueError(f"seeds: expected one number, or one for each of {self.n} molecules, got {len(streams)}")
        drawn = [self.thermal_velocities(k, temperature, stream) for k, stream in enumerate(streams)]
        context.setVelocities(np.concatenate(drawn))
        if self.system.getNumConstraints():
            context.applyVelocityConstraints(1e-8)

    def thermal_velocities(self, molecule: int, temperature: float, seed: int | Sequence[int]) -> np.ndarray:
        """Velocities of one molecule, ``(n_atoms, 3)`` nm/ps, from a random generator of its own."""
        masses = self.masses[self._particles(molecule)]
        width = np.sqrt(BOLTZMANN_KJ_PER_MOL * temperature / np.where(masses > 0, masses, 1.0)) * (masses > 0)
        return np.random.default_rng(seed).standard_normal((len(masses), 3)) * width[:, None]

    def minimize(self, context: openmm.Context, tolerance: float = 10.0, max_iterations: int = 500) -> np.ndarray:
        """Minimise every molecule by itself (`Fire`, one evaluation of all per iteration); returns energies ``(n,)``.

        A molecule that breaks is held and stays where it was good. Constraints are kept.

        Args:
            tolerance: root-mean-square force on the particles of each molecule, kJ/mol/nm. max_iterations: at most.
        """
        where = np.concatenate(self.positions(context))
        search = Fire(self.offsets, self.masses > 0)
        for _ in range(max_iterations):
            forces = context.getState(forces=True).getForces(asNumpy=True)._value
            moving = (search.rms(forces) > tolerance) & ~self.held
            if not moving.any():
                break
            where = where + search.step(forces, moving)
            context.setPositions(where)
            if self.system.getNumConstraints():
                context.applyConstraints(1e-6)
                where = np.concatenate(self.positions(context))
        return self.potential_energies(context)

    # -- what comes out --------------------------------------------------------------------------------------------

    def positions(self, context: openmm.Context) -> list[np.ndarray]:
        """``(n_atoms, 3)`` nm of each molecule."""
        return self.split(context.getState(positions=True).getPositions(asNumpy=True)._value)

    def velocities(self, context: openmm.Context) -> list[np.ndarray]:
        """``(n_atoms, 3)`` nm/ps of each molecule."""
        return self.split(context.getState(velocities=True).getVelocities(asNumpy=True)._value)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """``(n_particles, ...)`` -> one array ``(n_atoms, ...)`` per molecule, without a copy."""
        return np.split(values, self.offsets[1:-1])

    def potential_energies(self, context: openmm.Context) -> np.ndarray:
        """Of every molecule, ``(n,)`` kJ/mol; costs one evaluation of all forces. Of a held one: its last good one."""
        state = context.getState(positions=True, energy=True)
        return self._potential(context, state.getPositions(asNumpy=True)._value)

    def frame(self, context: openmm.Context) -> MoleculesFrame:
        """Positions, velocities, forces and energies of all molecules; costs one evaluation of all forces.

        Raises `ValueError` for a leapfrog integrator with constraints, whose kinetic energies it cannot say.
        """
        state = context.getState(positions=True, velocities=True, forces=True, energy=True)
        positions, velocities, forces = (
            x._value for x in (state.getPositions(True), state.getVelocities(True), state.getForces(True))
        )
        kinetic = self.kinetic_energies(context, velocities, forces)
        return MoleculesFrame(
            positions=self.split(positions),
            velocities=self.split(velocities),
            forces=self.split(forces),
            potential=self._potential(context, positions),
            kinetic=kinetic,
            temperature=2.0 * kinetic / (self.degrees_of_freedom * BOLTZMANN_KJ_PER_MOL),
        )

    @property
    def evaluated(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the only potential was evaluated last, ``(n_particles, 3)`` nm, and its energies ``(n,)`` kJ/mol.

        Raises `ValueError` where molecules have several potentials, or before the first evaluation.
        """
        computation = self._learned[0].computation
        if len(self._learned) != 1 or self._has_native or computation.positions is None or computation.energies is None:
            raise ValueError("evaluated: expected one potential that has been evaluated")
        return computation.positions / ANGSTROM_PER_NM, computation.energies

    def kinetic_energies(self, context: openmm.Context, velocities: np.ndarray, forces: np.ndarray) -> np.ndarray:
        """Of every molecule, ``(n,)`` kJ/mol, from velocities nm/ps and forces kJ/mol/nm, both ``(n_particles, 3)``."""
        integrator = context.getIntegrator()
        if isinstance(integrator, _LEAPFROG):
            if self.system.getNumConstraints():
                raise ValueError(
                    "system: kinetic energies of a leapfrog integrator with constraints are not known here"
                )
            # a leapfrog keeps velocities half a step behind the positions
            inverse = np.divide(1.0, self.masses, out=np.zeros_like(self.masses), where=self.masses > 0)
            velocities = velocities + 0.5 * integrator.getStepSize()._value * forces * inverse[:, None]
        return 0.5 * np.add.reduceat(self.masses * np.square(velocities).sum(axis=1), self.offsets[:-1])

    def _potential(self, context: openmm.Context, positions: np.ndarray) -> np.ndarray:
        """Energies at the positions of the evaluation that has just been made."""
        energies = np.zeros(self.n)
        for learned in self._learned:
            assert learned.computation.energies is not None
            np.add.at(energies, learned.members, learned.computation.energies)
        if self._has_native:
            parameters = context.getParameters()
            for k, single in enumerate(self._singles):
                energies[k] += self._native_energy(k, single, positions[self._particles(k)], parameters)
        return energies

    def _native_energy(self, k: int, single: openmm.System, positions: np.ndarray, parameters: Any) -> float:
        if k not in self._native:
            self._native[k] = _native_context(single)
        native = self._native[k]
        for name in native.getParameters():
            native.setParameter(name, parameters[name])
        native.setPositions(positions)
        return float(native.getState(energy=True).getPotentialEnergy()._value)

    def _particles(self, molecule: int) -> slice:
        return slice(int(self.offsets[molecule]), int(self.offsets[molecule + 1]))

    def _joined(self, name: str, values: Sequence[np.ndarray] | np.ndarray | unit.Quantity) -> np.ndarray:
        """One array ``(n_particles, 3)``; raises `ValueError` for another shape or numbers that are not finite."""
        given: Any = values
        if unit.is_quantity(given):
            given = given.value_in_unit(unit.nanometer)
        if isinstance(given, np.ndarray) and given.shape == (self.offsets[-1], 3):
            given = self.split(given)
        pieces = [np.asarray(piece, dtype=np.float64) for piece in given]
        if len(pieces) != self.n:
            raise ValueError(f"{name}: expected one array for each of {self.n} molecules, got {len(pieces)}")
        for k, piece in enumerate(pieces):
            size = int(self.offsets[k + 1] - self.offsets[k])
            if piece.shape != (size, 3):
                raise ValueError(f"{name}: expected shape {(size, 3)} for molecule {k}, got {piece.shape}")
            if not np.isfinite(piece).all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in molecule {k}")
        return np.concatenate(pieces)


def _own(potential: Potential, precision: str | None) -> Potential:
    """A copy that nobody trains on, in the precision asked for."""
    mine = copy.deepcopy(potential)
    if precision is not None and mine.dtype != PRECISIONS[precision]:
        mine = mine.to(PRECISIONS[precision])
    return mine.eval().requires_grad_(False)
