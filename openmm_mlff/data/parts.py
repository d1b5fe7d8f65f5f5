"""SMILES -> a molecule with what SMILES know and positions do not: bonds, formal charges, marked atoms.

Numbers behind colons mark atoms (``C[NH2+:1][H:2]``): a recipe names with them the atoms that make a contact or the
bond that is stretched. Bonds and formal charges tell later which protonation state a frame has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openmm_mlff.data.molecules import require_rdkit
from openmm_mlff.data.structures import Structure, check_charge_and_multiplicity


@dataclass(frozen=True, eq=False)
class Part:
    """A molecule or ion with one or more conformers.

    Attributes:
        name: in the recipe.
        key: canonical SMILES without marks and stereochemistry: equal for equal molecules.
        numbers: ``(n_atoms,)``. formal_charges: ``(n_atoms,)``, e. bonds: ``(n_bonds, 2)``.
        conformers: positions, each ``(n_atoms, 3)`` angstrom.
        multiplicity: 2S+1. marks: atom index by mark.
    """

    name: str
    key: str
    numbers: np.ndarray
    formal_charges: np.ndarray
    bonds: np.ndarray
    conformers: tuple[np.ndarray, ...]
    multiplicity: int = 1
    marks: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def charge(self) -> int:
        return int(self.formal_charges.sum())

    def structure(self, conformer: int = 0) -> Structure:
        """One conformer, without labels."""
        return Structure(self.numbers, self.conformers[conformer], self.charge, self.multiplicity)


def molecule_key(smiles: str) -> str:
    """Canonical SMILES without marks and stereochemistry. Raises `ValueError` for a SMILES that cannot be read."""
    chem = require_rdkit()
    molecule = _read(smiles)
    for atom in molecule.GetAtoms():
        atom.SetAtomMapNum(0)
    molecule = chem.RemoveHs(molecule)
    chem.RemoveStereochemistry(molecule)
    return str(chem.MolToSmiles(molecule))


def make_part(name: str, smiles: str, conformers: int = 1, seed: int = 1, multiplicity: int | None = None) -> Part:
    """Embed conformers of a molecule (ETKDGv3, then MMFF94 where it has parameters).

    Args:
        conformers: how many to embed; symmetric and rigid molecules give equal ones.
        seed: of the embedding. multiplicity: 2S+1; None takes all unpaired electrons of the SMILES as parallel.

    Raises `ValueError` for a SMILES that cannot be read or embedded, or an impossible multiplicity.
    """
    chem = require_rdkit()
    from rdkit import rdBase
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    molecule = chem.AddHs(_read(smiles))
    marks = {atom.GetAtomMapNum(): atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetAtomMapNum()}
    for atom in molecule.GetAtoms():
        atom.SetAtomMapNum(0)
    parameters = rdDistGeom.ETKDGv3()
    parameters.randomSeed = seed % 2**31
    parameters.useRandomCoords = True
    # ions and radicals have no parameters in its force fields, and it says so for every one
    with rdBase.BlockLogs():
        identifiers = list(rdDistGeom.EmbedMultipleConfs(molecule, conformers, parameters))
        if not identifiers:
            raise ValueError(f"smiles: no conformer of {name} ({smiles}) could be embedded")
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
            rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(molecule, maxIters=500)
    atoms = list(molecule.GetAtoms())
    unpaired = sum(atom.GetNumRadicalElectrons() for atom in atoms)
    part = Part(
        name,
        molecule_key(smiles),
        np.array([atom.GetAtomicNum() for atom in atoms], dtype=np.int64),
        np.array([atom.GetFormalCharge() for atom in atoms], dtype=np.int64),
        np.array(
            [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()], dtype=np.int64
        ).reshape(-1, 2),
        tuple(molecule.GetConformer(k).GetPositions() for k in identifiers),
        unpaired + 1 if multiplicity is None else multiplicity,
        marks,
    )
    check_charge_and_multiplicity(part.numbers, part.charge, part.multiplicity)
    return part


def _read(smiles: str) -> Any:
    """The molecule with the hydrogens that the SMILES writes out kept as atoms."""
    chem = require_rdkit()
    options = chem.SmilesParserParams()
    options.removeHs = False
    molecule = chem.MolFromSmiles(smiles, options)
    if molecule is None:
        raise ValueError(f"smiles: expected a molecule, got {smiles!r}")
    return molecule
