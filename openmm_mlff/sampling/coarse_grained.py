"""model of beads, priors -> an OpenMM System that can be simulated, alone or as `replicas`.

    beads = BeadMap.slice(topology, [4, 6, 8, 10, 14, 16])
    system = coarse_grained_system("model.safetensors", beads.topology(), beads.masses, priors)
    replicas = Replicas(system, beads.topology(), n=100)

A System that openmm-ml makes of beads without elements has massless particles, which never move; here every bead has
the mass that it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app
from openmmml import MLPotential

from openmm_mlff.data import model_file
from openmm_mlff.forces.prior_forces import prior_forces
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.potentials.priors import PriorTerms

#: force group of the priors; the model is in group 0, so that their energies can be told apart.
PRIOR_GROUP = 1


def coarse_grained_system(
    model: Potential | str | Path | None,
    topology: app.Topology,
    masses: Sequence[float] | np.ndarray | None = None,
    priors: PriorTerms | None = None,
    forces: Iterable[openmm.Force] = (),
    **options: Any,
) -> openmm.System:
    """The System of one molecule of beads.

    Args:
        model: what was learnt, or the path of its model file; None for priors alone. `model.beads` are compared with
            the names of the topology's atoms where these have no elements.
        topology: of the beads, in the model's order (`BeadMap.topology`).
        masses: amu, one per bead; None takes those of the elements. They change how fast beads move, not where they
            are found.
        priors: None takes those in the card of the model file, if there are any; ``PriorTerms()`` takes none.
        forces: others to add, for example `handedness_wall`; they are copied.
        options: of ``MLPotential.createSystem`` (precision, device, maxForce, ...).

    Raises `ValueError` naming the argument for masses that are missing or not positive, priors of beads that are not
    there, and what the model raises for beads that it does not know.
    """
    n = topology.getNumAtoms()
    amu = _masses(topology, masses)
    if model is None:
        system = openmm.System()
        for _ in range(n):
            system.addParticle(0.0)
    else:
        with warnings.catch_warnings():
            # the masses that it misses are set below
            warnings.filterwarnings("ignore", message="masses: ")
            system = _learned(model).createSystem(topology, removeCMMotion=False, **options)
        priors = _stored_priors(model) if priors is None else priors
    for i, mass in enumerate(amu):
        system.setParticleMass(i, mass)
    if priors is not None:
        for name in ("bonds", "angles", "pairs"):
            index = getattr(priors, name)
            if index.size and index.max() >= n:
                raise ValueError(f"priors: expected {name} of beads from 0 to {n - 1}, got {int(index.max())}")
        for force in prior_forces(priors, PRIOR_GROUP):
            system.addForce(force)
    for force in forces:
        system.addForce(openmm.XmlSerializer.clone(force))
    if system.getNumForces() == 0:
        raise ValueError("model: expected a model, priors or forces, got none of them: nothing would hold the beads")
    return system


def _learned(model: Potential | str | Path) -> MLPotential:
    if isinstance(model, Potential):
        return MLPotential(model.family, model=model)
    if not isinstance(model, str | Path):
        raise TypeError(f"model: expected a Potential, the path of a model file or None, got {type(model).__name__}")
    return MLPotential(load_potential(model).family, modelPath=str(model))


def _stored_priors(model: Potential | str | Path) -> PriorTerms | None:
    if isinstance(model, Potential) or not model_file.is_model_file(model):
        return None
    stored = model_file.load_card(model).get("priors")
    return None if stored is None else PriorTerms.from_dict(stored)


def _masses(topology: app.Topology, masses: Sequence[float] | np.ndarray | None) -> list[float]:
    atoms = list(topology.atoms())
    if masses is None:
        for atom in atoms:
            if atom.element is None:
                raise ValueError(
                    f"masses: bead {atom.index} ({atom.name}) has no element to take a mass from; expected "
                    f"{len(atoms)} masses (amu)"
                )
        return [float(atom.element.mass._value) for atom in atoms]
    values = np.asarray(masses, dtype=np.float64)
    if values.shape != (len(atoms),) or not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"masses: expected {len(atoms)} positive numbers (amu), got {np.asarray(masses).tolist()}")
    return values.tolist()
