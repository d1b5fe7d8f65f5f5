"""What the benchmark scripts share: molecules, where the published checkpoint is, the machine, and writing results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.structures import Structure

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("OPENMM_MLFF_SHARED", HERE.parent.parent / "shared"))
PUBLISHED = SHARED / "models" / "spookynet_parameters.pth"


def published_checkpoint() -> Path:
    """The published SpookyNet checkpoint; ends the script with a plain reason where it is not."""
    if not PUBLISHED.exists():
        raise SystemExit(f"no {PUBLISHED.name} in the folder of shared data; OPENMM_MLFF_SHARED names that folder")
    return PUBLISHED


def so3lr_weights() -> Path:
    """A file with the published weights of SO3LR; ends the script with a plain reason where there is none."""
    from openmm_mlff.potentials.family import find_family, find_published

    shared = SHARED / "models" / "so3lr_params.npz"
    found = shared if shared.exists() else find_published(find_family("so3lr").published[0])
    if found is None:
        raise SystemExit("no weights of SO3LR: pip install so3krates-torch, or openmm-mlff models fetch so3lr")
    return found


def peptide(residues: int) -> Structure:
    """Ace-Ala_n-NMe (22, 62, 152 atoms for n = 1, 5, 14), or water for 0; built by rdkit with a fixed seed."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    smiles = "O" if residues == 0 else "CC(=O)" + "N[C@@H](C)C(=O)" * residues + "NC"
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(molecule, randomSeed=1, useRandomCoords=True) != 0:
        raise RuntimeError(f"no geometry found for {smiles}")
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=2000)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    return Structure(numbers, molecule.GetConformer().GetPositions())


def rattled(structure: Structure, n: int, seed: int = 0, sigma: float = 0.02) -> list[np.ndarray]:
    """n geometries with Gaussian displacements of `sigma` angstrom."""
    random = np.random.default_rng(seed)
    return [structure.positions + random.normal(0.0, sigma, structure.positions.shape) for _ in range(n)]


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    cpu = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("openmm", "openmmml", "torch", "numpy", "openmm-mlff")},
    }


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median and the quartiles."""
    low, median, high = np.percentile(np.asarray(seconds) * 1e3, [25, 50, 75])
    return {"median_ms": round(float(median), 4), "q1_ms": round(float(low), 4), "q3_ms": round(float(high), 4)}


def write(name: str, result: dict[str, Any]) -> Path:
    """Write ``benchmarks/<name>.json``."""
    path = HERE / f"{name}.json"
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {path.name}")
    return path
