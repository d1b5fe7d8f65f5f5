"""The PythonForce of electrostatic embedding: an ML region whose charges feel the charges around it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import openmm

from openmm_mlff.forces import checks
from openmm_mlff.forces.copies import CopiesEvaluator
from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.python_force import ForceComputation, _threads, _when
from openmm_mlff.forces.surroundings import Surroundings, SurroundingsSpec
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

#: of the stored options of embedded forces, beside `force_spec.SPEC_VERSION`
EMBEDDED_VERSION = 1


@dataclass(frozen=True)
class EmbeddedSpec:
    """All that a pickled embedded computation carries: the model and its atoms, and what surrounds them."""

    region: ForceSpec
    surroundings: SurroundingsSpec

    def __post_init__(self) -> None:
        atoms = self.region.atoms
        if atoms is None or self.region.replicas != 1 or self.region.region == "periodic":
            raise ValueError("atoms: an embedded region is one open set of atoms")
        if not all(0 <= i < self.surroundings.n_particles for i in atoms):
            raise ValueError(f"atoms: expected indices below {self.surroundings.n_particles}")

    def to_json(self) -> str:
        parts = {"region": json.loads(self.region.to_json()), "surroundings": dataclasses.asdict(self.surroundings)}
        return json.dumps({"version": EMBEDDED_VERSION, **parts}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> EmbeddedSpec:
        """Raises `ValueError` for a text that is not a specification of this version or an older one."""
        try:
            fields = dict(json.loads(text))
            version = fields["version"]
            if version > EMBEDDED_VERSION:
                raise ValueError(f"version {version} is newer than {EMBEDDED_VERSION}, which this package reads")
            return cls(ForceSpec.from_json(json.dumps(fields["region"])), SurroundingsSpec(**fields["surroundings"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"PythonForce: the stored options of an embedded force cannot be read ({error})"
            ) from error


class EmbeddedComputation(ForceComputation):
    """The callable behind the PythonForce: ``State -> (energy in kJ/mol, forces (n_particles, 3) in kJ/mol/nm)``.

    The force acts on all particles of the system, in order. Import path and argument are stored in System XML files, as
    those of `ForceComputation`.

    Attributes:
        spec: of the ML region. embedded: everything that was stored.
        charges: of the ML atoms in the last call that succeeded, ``(n_ml_atoms,)`` e; None before it.
    """

    outputs: ClassVar[tuple[str, ...]] = ("energy", "forces", "charges")

    def __init__(self, spec: str | EmbeddedSpec) -> None:
        self.embedded = EmbeddedSpec.from_json(spec) if isinstance(spec, str) else spec
        self.charges: np.ndarray | None = None
        self._surroundings: Surroundings | None = None
        super().__init__(self.embedded.region)

    def _stored(self) -> str:
        return self.embedded.to_json()

    @classmethod
    def normalized(cls, options: str) -> str:
        return EmbeddedSpec.from_json(options).to_json()

    def _with(self, spec: ForceSpec) -> EmbeddedComputation:
        return EmbeddedComputation(dataclasses.replace(self.embedded, region=spec))

    def particle(self, i: int) -> int:
        atoms = self.embedded.region.atoms
        assert atoms is not None
        return atoms[i] if i < len(atoms) else i - len(atoms)

    def describe(self, i: int) -> str:
        """An ML atom as `ForceComputation` does; beyond them, particle ``i - n_ml_atoms`` of the system."""
        n = len(self._numbers)
        return super().describe(i) if i < n else f"particle {i - n}"

    def _evaluate(self, state: openmm.State) -> tuple[float, np.ndarray]:
        region, n_particles = self.embedded.region, self.embedded.surroundings.n_particles
        positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        if positions.shape != (n_particles, 3):
            raise ValueError(
                f"positions: this force was made for a system of {n_particles} particles, but the system hands it "
                f"{len(positions)}; create the system anew for the changed topology"
            )
        atoms = np.array(region.atoms)
        if not np.isfinite(positions).all():
            raise checks.broken_positions(self._ml_first(positions, atoms), self.describe, _when(state))
        sites, cell = positions[atoms], None
        if region.region == "wrapped":
            cell = state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM
            sites = checks.make_whole(sites, cell)
        with _threads(self._n_threads()):
            try:
                energy, forces = self._energy_and_forces(positions, sites, cell)
            except ValueError as error:
                same_place = checks.coincident(sites, None, self.describe, _when(state))
                if same_place is None:
                    raise
                raise same_place from error
        energy, forces = energy * KJ_PER_MOL_PER_EV, forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM
        limit = np.inf if region.max_force is None or not self.limited else region.max_force
        if not (np.isfinite(energy) and np.abs(forces).max() <= limit):
            raise self._blown_up(energy, forces, positions, sites, limit, _when(state))
        self.energies = np.array([energy])
        assert self._evaluator is not None
        self._note(self._evaluator.spreads, sites)
        return energy, forces

    def _energy_and_forces(
        self, positions: np.ndarray, sites: np.ndarray, cell: np.ndarray | None
    ) -> tuple[float, np.ndarray]:
        """eV and eV/angstrom"""
        spec = self.embedded
        if self._surroundings is None:
            assert spec.region.atoms is not None
            self._surroundings = Surroundings(spec.surroundings, spec.region.atoms)
        phi = self._surroundings.field(positions, sites, cell)
        # the region itself is open: its images are part of the surroundings
        evaluator = self._get_evaluator(sites, None)
        assert not isinstance(evaluator, CopiesEvaluator)
        result = evaluator(sites, None, phi)
        assert result.charges is not None and result.forces is not None
        charges = result.charges.detach().cpu().numpy().astype(np.float64)
        more, site_forces, forces = self._surroundings.react(charges)
        site_forces += result.forces.detach().cpu().numpy()
        forces[list(spec.region.atoms or ())] += site_forces
        self.charges = charges
        return float(result.energy[0]) + more, forces

    # -- only when something is wrong ----------------------------------------------------------------------------------

    def _ml_first(self, values: np.ndarray, atoms: np.ndarray) -> np.ndarray:
        """Rows of the ML atoms, then of all particles, as `describe` counts them."""
        return np.concatenate([values[atoms], values])

    def _blown_up(
        self,
        energy: float,
        forces: np.ndarray,
        positions: np.ndarray,
        sites: np.ndarray,
        limit: float,
        when: str,
    ) -> checks.InstabilityError:
        atoms = np.array(self.embedded.region.atoms)
        same_place = checks.coincident(sites, None, self.describe, when)
        if same_place is not None:
            return same_place
        worst = np.where(np.isfinite(forces).all(1), np.abs(forces).max(1), np.inf)
        here = np.flatnonzero(atoms == int(worst.argmax()))
        i = int(here[0]) if len(here) else len(atoms) + int(worst.argmax())
        nearest = np.linalg.norm(positions[self.particle(i)] - np.delete(positions, self.particle(i), 0), axis=1).min()
        hint = checks.MINIMISER_HINT if when == "step 0" else ""
        return checks.InstabilityError(
            f"forces: {np.array2string(forces[self.particle(i)], precision=4)} kJ/mol/nm on {self.describe(i)}, "
            f"{nearest / 10:.4f} nm from another particle; allowed are {limit:.3g}; the energy is {energy:.6g} kJ/mol "
            f"({when}); the simulation is unstable{hint}",
            i,
        )


def make_embedded_force(computation: EmbeddedComputation, group: int = 0) -> openmm.Force:
    """The OpenMM force, on all particles."""
    force = openmm.PythonForce(computation)
    force.setName(f"{computation.spec.family}, electrostatic embedding (openmm-mlff)")
    force.setUsesPeriodicBoundaryConditions(computation.spec.region == "wrapped")
    force.setForceGroup(group)
    return force
