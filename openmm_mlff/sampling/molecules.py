"""Many different molecules in one System, with one batched evaluation of the model per step.

    molecules = Molecules.from_potential(potential, structures)
    context = molecules.context(openmm.LangevinMiddleIntegrator(298.15, 1, 0.001))
    molecules.set_positions(context)                      # those of the structures
    molecules.set_velocities(context, 298.15, seeds=1)
    context.getIntegrator().step(1000)
    molecules.failures                                    # which molecules broke, when, and why

Particles of molecule k are ``offsets[k]`` to ``offsets[k + 1]``. A molecule that breaks is held: it gets no forces,
stays in the batch at its last good positions and is reported, and `restart` puts it back; the others never notice.
`sampling.molecule_runs.sample` does all this for a set of molecules.

Units are OpenMM's: nm, nm/ps, kJ/mol, kelvin; structures and failures are in angstrom.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.force_spec import DEFAULT_MAX_FORCE, PRECISIONS, ForceSpec
from openmm_mlff.forces.molecule_force import Failure, MoleculeGuard, MoleculesComputation, MoleculesSpec
from openmm_mlff.forces.python_force import make_force
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.sampling.fire import Fire
from openmm_mlff.sampling.guards import BROKEN, STRETCHED
from openmm_mlff.sampling.platforms import PlatformChoice, choose_platform
from openmm_mlff.sampling.starts import bond_graph
from openmm_mlff.units import ANGSTROM_PER_NM, BOLTZMANN_KJ_PER_MOL, NM_PER_ANGSTROM

__all__ = ["Failure", "Molecules"]


class Molecules:
    """Different molecules that do not see one another, and what can be asked about each of them; see `from_potential`.

    Attributes:
        system: all molecules in one System. n: how many. offsets: ``(n + 1,)``. masses: ``(n_particles,)`` amu.
        starts: positions of each molecule at the start, ``(n_atoms, 3)`` nm.
    """

    def __init__(
        self, system: openmm.System, computations: Sequence[MoleculesComputation], starts: Sequence[np.ndarray]
    ) -> None:
        self.system, self._learned = system, list(computations)
        self.starts = [np.array(start, dtype=np.float64) for start in starts]
        self.offsets = np.cumsum([0, *(len(start) for start in starts)])
        self.n = len(self.starts)
        self.masses = np.array([system.getParticleMass(i)._value for i in range(system.getNumParticles())])

    @classmethod
    def from_potential(
        cls,
        potential: Potential,
        structures: Sequence[Structure],
        precision: str | None = "single",
        compile: bool | str = True,
        threads: int | None = None,
        batch: int | None = None,
        max_force: float = DEFAULT_MAX_FORCE,
    ) -> Molecules:
        """Molecules by a potential in memory, without a model file; the System cannot be stored.

        Args:
            potential: a copy is made, so that later changes of its weights do nothing; see `set_potential`.
            structures: open molecules (positions in angstrom).
            precision: 'single', 'double', or None for the potential's own. compile: as for `Potential.evaluator`.
            threads: of torch; None chooses by size.
            batch: molecules in one evaluation; None takes all.
            max_force: kJ/mol/nm; a molecule with a larger force on any atom is held.

        Raises `ValueError` naming the argument for no structures, a periodic one, or one that the potential refuses.
        """
        if not structures:
            raise ValueError("structures: expected at least one molecule, got none")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision: expected 'single', 'double' or None, got {precision!r}")
        for k, structure in enumerate(structures):
            if structure.cell is not None:
                raise ValueError(f"structures: expected open molecules, got periodic box vectors for molecule {k}")
            try:
                potential.check(structure)
            except ValueError as error:
                raise ValueError(f"{error} (molecule {k})") from error
        sizes = tuple(len(s) for s in structures)
        numbers = tuple(int(z) for s in structures for z in s.numbers)
        common = ForceSpec(
            "", potential.family, numbers, precision=precision, compile=compile, threads=threads, batch=batch
        )
        spec = MoleculesSpec(
            common, sizes, tuple(s.charge for s in structures), tuple(s.multiplicity for s in structures)
        )
        computation = MoleculesComputation(spec, _own(potential, precision))
        computation.guard = _guard(structures, max_force)
        system = openmm.System()
        for z in numbers:
            system.addParticle(app.Element.getByAtomicNumber(z).mass)
        system.addForce(make_force(computation))
        return cls(system, [computation], [s.positions * NM_PER_ANGSTROM for s in structures])

    def set_potential(self, potential: Potential) -> None:
        """Go on with another potential in memory for the same molecules; contexts stay as they are."""
        for computation in self._learned:
            computation.use(_own(potential, computation.spec.precision))

    @property
    def failures(self) -> list[Failure]:
        """Every time that a molecule was held, oldest first."""
        found = [failure for c in self._learned if c.guard is not None for failure in c.guard.failures]
        return sorted(found, key=lambda failure: failure.step)

    @property
    def held(self) -> np.ndarray:
        """Which molecules are held, ``(n,)`` bool."""
        held = np.zeros(self.n, dtype=bool)
        for computation in self._learned:
            if computation.guard is not None:
                held |= computation.guard.held
        return held

    @property
    def evaluated(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the potential was evaluated last, ``(n_particles, 3)`` nm, and its energies ``(n,)`` kJ/mol."""
        if len(self._learned) != 1 or self._learned[0].positions is None or self._learned[0].energies is None:
            raise ValueError("evaluated: expected one potential that has been evaluated")
        return self._learned[0].positions / ANGSTROM_PER_NM, self._learned[0].energies

    def platform(self, name: str | None = None, threads: int | None = None) -> PlatformChoice:
        """The platform asked for, or the one for these molecules (see `Replicas.platform`)."""
        choice = choose_platform(self.system.getNumParticles(), name, threads)
        lists = any(isinstance(force, openmm.CustomNonbondedForce) for force in self.system.getForces())
        if name is None and threads is None and choice.name == "CPU" and not lists:
            return choose_platform(self.system.getNumParticles(), "Reference")
        return choice

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
        """Set positions: one array ``(n_atoms, 3)`` nm per molecule, or all ``(n_particles, 3)``; None: `starts`."""
        context.setPositions(self._joined("positions", self.starts if positions is None else positions))

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
        state = context.getState(positions=True, velocities=True)
        where, velocities = (np.array(x._value) for x in (state.getPositions(True), state.getVelocities(True)))
        atoms = self._particles(molecule)
        where[atoms] = self.starts[molecule] if positions is None else positions
        velocities[atoms] = self.thermal_velocities(molecule, temperature, seed)
        context.setPositions(where)
        context.setVelocities(velocities)
        for computation in self._learned:
            if computation.guard is not None:
                computation.guard.release(molecule)

    def minimize(self, context: openmm.Context, tolerance: float = 10.0, max_iterations: int = 500) -> np.ndarray:
        """Minimise every molecule by itself (FIRE, all in one evaluation per iteration); returns energies ``(n,)``.

        E. Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006), with velocities, time step and mixing of its own for every
        molecule, so that none depends on another. A molecule that breaks is held and stays where it was good.

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
        """Of every molecule, ``(n,)`` kJ/mol; costs one evaluation of all forces."""
        context.getState(energy=True)
        energies = np.zeros(self.n)
        for computation in self._learned:
            assert computation.energies is not None
            energies += computation.energies
        return energies

    def _particles(self, molecule: int) -> slice:
        return slice(int(self.offsets[molecule]), int(self.offsets[molecule + 1]))

    def _joined(self, name: str, values: Sequence[np.ndarray] | np.ndarray | unit.Quantity) -> np.ndarray:
        """One array ``(n_particles, 3)``; raises `ValueError` for another shape or numbers that are not finite."""
        if unit.is_quantity(values):
            values = values.value_in_unit(unit.nanometer)  # type: ignore[union-attr]
        pieces: list[np.ndarray] = [np.asarray(v, dtype=np.float64) for v in values]
        if not (len(pieces) == self.offsets[-1] and pieces[0].shape == (3,)):
            shapes = [(int(m), 3) for m in np.diff(self.offsets)]
            if len(pieces) != self.n:
                raise ValueError(f"{name}: expected one array for each of {self.n} molecules, got {len(pieces)}")
            for k, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
                if piece.shape != shape:
                    raise ValueError(f"{name}: expected shape {shape} for molecule {k}, got {piece.shape}")
                if not np.isfinite(piece).all():
                    raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in molecule {k}")
            return np.concatenate(pieces)
        whole = np.array(pieces)
        if not np.isfinite(whole).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        return whole


def _own(potential: Potential, precision: str | None) -> Potential:
    """A copy that nobody trains on, in the precision asked for."""
    mine = copy.deepcopy(potential)
    if precision is not None and mine.dtype != PRECISIONS[precision]:
        mine = mine.to(PRECISIONS[precision])
    return mine.eval().requires_grad_(False)


def _guard(structures: Sequence[Structure], max_force: float) -> MoleculeGuard:
    """Bonds of each molecule by its start, with the lengths beyond which `guards.Guard` calls them broken."""
    from ase.data import covalent_radii

    bonds, longest, first = [np.empty((0, 2), dtype=np.int64)], [np.empty(0)], 0
    for structure in structures:
        own = np.argwhere(np.triu(bond_graph(structure.numbers, structure.positions)))
        natural = covalent_radii[structure.numbers][own].sum(axis=1)
        apart = np.linalg.norm(structure.positions[own[:, 0]] - structure.positions[own[:, 1]], axis=1)
        bonds.append(own + first)
        longest.append(np.maximum(BROKEN * natural, STRETCHED * apart))
        first += len(structure)
    start = np.concatenate([s.positions for s in structures])
    return MoleculeGuard(start, np.concatenate(bonds), np.concatenate(longest), max_force)
