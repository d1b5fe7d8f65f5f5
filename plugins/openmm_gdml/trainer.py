"""What ``openmm-mlff train --family gdml`` runs: choose geometries, find symmetry, choose sigma and lambda, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_gdml import crystals, matching
from openmm_gdml import permutations as symmetry
from openmm_gdml.model import GDMLPotential
from openmm_gdml.options import GDMLOptions
from openmm_gdml.training import GDML
from openmm_gdml.training_set import stratified
from openmm_mlff.data.structures import Structure


def fit(
    options: GDMLOptions,
    train: Sequence[Structure],
    valid: Sequence[Structure],
    folder: Path,
    seed: int,
    progress: bool,
) -> tuple[GDMLPotential, dict[str, Any]]:
    """See `openmm_mlff.potentials.family.Trainer`."""
    rng = np.random.default_rng(seed)
    train = _chosen(train, options.n_train, rng, "n_train")
    valid = _chosen(valid, min(1000, len(valid)) if options.n_valid is None else options.n_valid, rng, "n_valid")
    group, about = _group(options, train)
    trainer = GDML(
        sigma=options.sigma,
        lam=options.lam,
        permutations=group,
        energy_constraints=options.energy_constraints,
        solver=options.solver,
        preconditioner=options.preconditioner,
        columns=options.columns,
        memory=options.memory,
        tolerance=options.tolerance,
        descriptor=options.descriptor,
        descriptor_options=options.descriptor_options,
        keep_alphas=options.keep_alphas,
        seed=seed,
        progress=progress,
    )
    model = trainer.fit(train, valid, folder)
    chosen = {"sigma": model.config.sigma, "lam": model.config.lam, "permutations": model.config.n_permutations}
    chosen |= {"geometries": len(train), "validation_geometries": len(valid)}
    return model, {
        "chosen": chosen,
        "notes": about.splitlines(),
        "candidates": trainer.selection,
        "units": "eV, angstrom",
    }


def _chosen(structures: Sequence[Structure], n: int | None, rng: np.random.Generator, name: str) -> list[Structure]:
    if n is None:
        return list(structures)
    if n > len(structures):
        raise ValueError(f"{name}: expected at most the {len(structures)} geometries of the split, got {n}")
    energies = [s.energy for s in structures]
    if None in energies:
        indices = np.sort(rng.choice(len(structures), n, replace=False))
    else:
        indices = stratified(np.array(energies, dtype=np.float64), n, rng)
    return [structures[i] for i in indices]


def _group(options: GDMLOptions, train: Sequence[Structure]) -> tuple[np.ndarray | None, str]:
    """The permutations and a line that says where they come from."""
    wanted = options.permutations
    if not isinstance(wanted, str):
        return symmetry.validate(np.asarray(wanted, dtype=np.int64), train[0].numbers), "permutations as given"
    if wanted == "none":
        return None, "no permutations"
    if train[0].cell is not None:
        found = crystals.of_training_data(train, "full" if wanted == "auto" else wanted, mobile=options.mobile)
        return found.permutations, found.inspect()
    if wanted == "matching":
        matched = matching.find(train)
        return matched, f"{len(matched)} permutations by matching geometries"
    if wanted != "auto":
        raise ValueError(
            f"permutations: expected auto, matching, none or the permutations of an open molecule, got {wanted!r}"
        )
    molecule = symmetry.find(train)
    return molecule.group, molecule.inspect()
