"""Make the model file of a family for the present format, once, before it is released: ``python make.py <family>``.

Writes ``<family>-v<format version>.safetensors`` (random weights of a recorded seed) and beside it a JSON file with the
energies and forces of two structures in float64. Files that were released are never made anew: a model that no longer
loads, or gives another energy, is a defect of the package and not of the file.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_mlff.data.model_file import FORMAT_VERSION, sha256_of
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.composition import Composite
from openmm_mlff.potentials.family import find_family, save_potential
from openmm_mlff.potentials.potential import Potential

SEED = 20261121
OPTIONS: dict[str, dict[str, Any]] = {
    "spookynet": {"num_features": 8, "num_modules": 1, "elements": (1, 6, 7, 8)},
    "so3krates": {
        "num_features": 8,
        "num_layers": 1,
        "num_heads": 2,
        "num_basis_functions": 6,
        "hirshfeld_features": 4,
        "elements": (1, 6, 7, 8),
    },
    "gdml": {"numbers": (6, 8, 1, 1, 1, 1), "n_train": 5, "sigma": 3.0, "n_permutations": 6},
    "nequip-jaxmd": {
        "num_features": 4,
        "num_layers": 2,
        "irreps": ("0o", "0e", "1o", "1e"),
        "max_degree": 1,
        "radial_layers": 2,
        "radial_features": 8,
        "elements": (1, 6, 7, 8),
    },
    "resolv": {"phase": "water"},
    "ensemble": {"n_members": 2, "energy_factor": 1.5, "force_factor": 2.0, "force_limit": 0.3},
}
STRUCTURES = [
    Structure(
        np.array([6, 8, 1, 1, 1, 1]),
        np.array(
            [
                [-0.046, 0.661, 0.021],
                [-0.053, -0.758, -0.017],
                [-1.086, 0.981, 0.064],
                [0.877, -1.064, 0.033],
                [0.431, 1.083, 0.902],
                [0.458, 1.065, -0.871],
            ]
        ),
    ),
    Structure(
        np.array([7, 1, 1, 1, 1]),
        np.array([[0.0, 0.02, 0.0], [0.6, 0.6, 0.58], [-0.6, -0.57, 0.6], [-0.61, 0.6, -0.6], [0.6, -0.6, -0.61]]),
        charge=1,
    ),
]


def make(family: str, seed: int = SEED) -> Potential:
    """A small model of the family with every parameter random."""
    torch.manual_seed(seed)
    found = find_family(family)
    if family == "ensemble":
        members = {f"member{k}": make("spookynet", SEED + k) for k in range(2)}
        return found.model.compose(found.config(**OPTIONS[family]), members).eval()  # type: ignore[attr-defined]
    if issubclass(found.model, Composite):
        # two members of different families, so that the file holds both kinds of tensors and cards
        members = {"vacuum": make("gdml"), "water": make("so3krates")}
        return found.model.compose(found.config(**OPTIONS[family]), members).eval()
    model = found.model(found.config(**OPTIONS[family])).double()
    if family == "gdml":
        return fill_gdml(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "raw" not in name:
                parameter += 0.3 * torch.randn_like(parameter) / max(1.0, math.sqrt(parameter.shape[-1]))
    return model.eval()


def fill_gdml(model: Potential) -> Potential:
    """Random training points around the first structure, and all permutations of its methyl hydrogens."""
    atoms = torch.from_numpy(STRUCTURES[0].positions)
    points = atoms + 0.1 * torch.randn(model.config.n_train, *atoms.shape, dtype=torch.float64)
    first, second = torch.tril_indices(len(atoms), len(atoms), -1)
    x = 1.0 / (points[:, first] - points[:, second]).norm(dim=-1)
    hydrogens = torch.tensor(list(itertools.permutations((2, 4, 5))))
    permutations = torch.arange(len(atoms)).repeat(len(hydrogens), 1)
    permutations[:, [2, 4, 5]] = hydrogens
    model.load_state_dict(
        {
            "descriptors": x,
            "coefficients": 3.0 * torch.randn(x.shape, dtype=torch.float64),
            "shift": torch.tensor(-7.5, dtype=torch.float64),
            "permutations": permutations,
        }
    )
    return model.eval()


def structures_of(family: str) -> list[Structure]:
    """Two structures that the model can describe."""
    if family not in ("gdml", "nequip-jaxmd", "resolv"):
        return STRUCTURES
    moved = STRUCTURES[0].positions + np.random.default_rng(SEED).normal(scale=0.1, size=(6, 3))
    return [STRUCTURES[0], STRUCTURES[0].replace(positions=moved)]


def main(family: str) -> None:
    path = Path(__file__).with_name(f"{family}-v{FORMAT_VERSION}.safetensors")
    if path.exists():
        raise SystemExit(f"{path.name} exists; released files stay as they are")
    model = make(family)
    save_potential(model, path, name=f"continuity-{family}", description=f"random weights, seed {SEED}", licence="MIT")
    results = []
    for s in structures_of(family):
        energy, forces = model.energy_and_forces(s)
        results.append(
            {
                "numbers": s.numbers.tolist(),
                "positions": s.positions.tolist(),
                "charge": s.charge,
                "multiplicity": s.multiplicity,
                "energy": energy,
                "forces": forces.tolist(),
            }
        )
    path.with_suffix(".json").write_text(
        json.dumps({"sha256": sha256_of(path), "seed": SEED, "structures": results}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1])
