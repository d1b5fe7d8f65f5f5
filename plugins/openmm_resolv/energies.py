"""Both energies of a running frame, whatever lambda is: U_vacuum, U_water and dU/dlambda = U_water - U_vacuum."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import openmm

from openmm_mlff.forces.molecule_force import MoleculesComputation
from openmm_mlff.forces.python_force import ForceComputation, make_force
from openmm_mlff.forces.running import computations
from openmm_resolv.model import LAMBDA


@dataclass(frozen=True)
class PhaseEnergies:
    """Attributes: vacuum, water: energies of the molecules in the system, or of its copies of one, ``(n,)`` kJ/mol."""

    vacuum: np.ndarray
    water: np.ndarray

    @property
    def derivative(self) -> np.ndarray:
        """dU/dlambda, ``(n,)`` kJ/mol."""
        return self.water - self.vacuum


class BothEnergies:
    """``f(context) -> PhaseEnergies`` for a System with a resolv force of phase 'both', at any depth.

    It evaluates on its own, so that pair lists and forces of the running simulation stay as they are. Other forces of
    the System do not count.

    Args:
        system: from ``createSystem(..., phase='both')``, or many of them in one System (`Replicas`, `Molecules`).

    Raises `ValueError` for a system without such a force.
    """

    def __init__(self, system: openmm.System) -> None:
        found = {c.options: c for c in computations(system) if c.spec.coupling_parameter == LAMBDA}
        if len(found) != 1:
            raise ValueError(f"system: expected one resolv force of phase 'both', got {len(found)}")
        (coupled,) = found.values()
        spec = coupled.spec
        self._computations = {phase: _in_phase(coupled, phase) for phase in ("vacuum", "water")}
        reader = openmm.System()
        for _ in range(system.getNumParticles()):
            reader.addParticle(1.0)
        reader.setDefaultPeriodicBoxVectors(*system.getDefaultPeriodicBoxVectors())
        for group, computation in enumerate(self._computations.values()):
            reader.addForce(make_force(computation, spec.atoms, spec.region != "open", group))
        self._context = openmm.Context(
            reader, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
        )

    def __call__(self, context: openmm.Context) -> PhaseEnergies:
        """Energies at the present positions of `context`, which belongs to the system or to one like it."""
        state = context.getState(positions=True)
        self._context.setPeriodicBoxVectors(*state.getPeriodicBoxVectors())
        self._context.setPositions(state.getPositions(asNumpy=True))
        found = {}
        for group, (phase, computation) in enumerate(self._computations.items()):
            self._context.getState(energy=True, groups={group})
            assert computation.energies is not None
            found[phase] = computation.energies.copy()
        return PhaseEnergies(**found)


def _in_phase(computation: ForceComputation, phase: str) -> ForceComputation:
    """The same atoms by one of the two potentials; forces may be large where the other one has been."""
    spec = dataclasses.replace(computation.spec, phase=phase, coupling_parameter=None, max_force=None)
    if isinstance(computation, MoleculesComputation):
        return MoleculesComputation(dataclasses.replace(computation.molecules, common=spec))
    return ForceComputation(spec)


def both_energies(context: openmm.Context) -> PhaseEnergies:
    """`BothEnergies` once; make one and keep it to ask many frames."""
    return BothEnergies(context.getSystem())(context)
