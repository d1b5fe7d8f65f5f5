"""SMILES and SDF -> structures, through rdkit.

Charges come from formal charges, multiplicities from unpaired electrons (all parallel); both can be overridden.
Embedding: S. Riniker, G. A. Landrum, J. Chem. Inf. Model. 55, 2562 (2015) and J. Chem. Inf. Model. 60, 2044 (2020)
(ETKDGv3), then MMFF94 where it has parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.structures import Structure


def require_rdkit() -> Any:
    """The module ``rdkit.Chem``. Raises `ImportError` naming the extra to install."""
    try:
        from rdkit import Chem
    except ImportError as error:
        raise ImportError(
            f"SMILES and SDF need rdkit ({error}); install it with: pip install 'openmm-mlff[label]'"
        ) from error
    return Chem


def _structure(molecule: Any, conformer: int, charge: int | None, multiplicity: int | None, group: str) -> Structure:
    unpaired = sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms())
    return Structure(
        np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()]),
        molecule.GetConformer(conformer).GetPositions(),
        require_rdkit().GetFormalCharge(molecule) if charge is None else charge,
        unpaired + 1 if multiplicity is None else multiplicity,
        group=group,
    )


def embed_smiles(
    smiles: str,
    conformers: int = 1,
    seed: int = 1,
    charge: int | None = None,
    multiplicity: int | None = None,
) -> list[Structure]:
    """Conformers of a molecule with explicit hydrogens, in the order of the SMILES, hydrogens last.

    Args:
        conformers: how many to embed.
        seed: of the embedding; the same seed gives the same conformers.
        charge, multiplicity: override what the SMILES says.

    The group is the canonical SMILES. Raises `ValueError` for a SMILES that cannot be read or embedded.
    """
    chem = require_rdkit()
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    if conformers < 1:
        raise ValueError(f"conformers: expected at least 1, got {conformers}")
    molecule = chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"smiles: expected a molecule, got {smiles!r}")
    group = chem.MolToSmiles(molecule)
    molecule = chem.AddHs(molecule)
    parameters = rdDistGeom.ETKDGv3()
    parameters.randomSeed = seed
    parameters.useRandomCoords = True
    identifiers = list(rdDistGeom.EmbedMultipleConfs(molecule, conformers, parameters))
    if not identifiers:
        raise ValueError(f"smiles: no conformer of {smiles!r} could be embedded")
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
        rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(molecule, maxIters=2000)
    return [_structure(molecule, k, charge, multiplicity, group) for k in identifiers]


def read_smiles(
    path: str | Path,
    conformers: int = 1,
    seed: int = 1,
    charge: int | None = None,
    multiplicity: int | None = None,
) -> list[Structure]:
    """A text file with a SMILES per line and an optional name behind it; ``#`` begins a comment line.

    Raises `ValueError` naming the line that cannot be read.
    """
    structures: list[Structure] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        try:
            found = embed_smiles(words[0], conformers, seed, charge, multiplicity)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        structures += [s.replace(info={"name": words[1].strip()}) if len(words) > 1 else s for s in found]
    if not structures:
        raise ValueError(f"{path}: expected a SMILES per line, found none")
    return structures


def read_sdf(path: str | Path, charge: int | None = None, multiplicity: int | None = None) -> list[Structure]:
    """Molecules of an SDF or MOL file with 3D coordinates and explicit hydrogens; the group is the canonical SMILES.

    Raises `ValueError` naming the entry that cannot be read, is flat, or lacks hydrogens.
    """
    chem = require_rdkit()
    structures = []
    for number, molecule in enumerate(chem.SDMolSupplier(str(path), removeHs=False), 1):
        where = f"{path}, molecule {number}"
        if molecule is None:
            raise ValueError(f"{where}: expected a molecule, but it cannot be read")
        if not molecule.GetConformer().Is3D():
            raise ValueError(f"{where}: expected 3D coordinates, got a drawing")
        if any(atom.GetNumImplicitHs() for atom in molecule.GetAtoms()):
            raise ValueError(f"{where}: expected explicit hydrogens, some are missing")
        group = chem.MolToSmiles(chem.RemoveHs(molecule))
        structures.append(_structure(molecule, -1, charge, multiplicity, group))
    if not structures:
        raise ValueError(f"{path}: expected at least one molecule, found none")
    return structures
