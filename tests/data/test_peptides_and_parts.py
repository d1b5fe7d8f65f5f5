"""Peptides by name against rdkit's own sequence reader; parts keep charges, bonds and marks."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_mlff.data.parts import make_part, molecule_key
from openmm_mlff.data.peptides import AMINO_ACID, SIDE_CHAINS, amino_acids, peptide_smiles

Chem = pytest.importorskip("rdkit.Chem", reason="needs rdkit (extra 'label')")

NAMES = ("ALA", "ARN", "ASN", "ASH", "CYS", "GLN", "GLH", "GLY", "HIE", "ILE", "LEU", "LYN", "MET", "PHE", "PRO")
NAMES += ("SER", "THR", "TRP", "TYR", "VAL")
LETTERS = dict(zip(NAMES, "ARNDCQEGHILKMFPSTWYV", strict=True))
CHARGES = {"ARG": 1, "LYS": 1, "HIP": 1, "ASP": -1, "GLU": -1, "CYM": -1, "TYM": -1}


@pytest.mark.parametrize("residue", LETTERS)
def test_neutral_residues_are_the_l_amino_acids_of_rdkit(residue: str) -> None:
    ours = Chem.MolFromSmiles(peptide_smiles(f"NH2-{residue}-ALA-COOH"))
    theirs = Chem.MolFromSequence(LETTERS[residue] + "A")
    assert Chem.MolToSmiles(ours) == Chem.MolToSmiles(theirs)


@pytest.mark.parametrize("residue", SIDE_CHAINS)
def test_protonation_states_differ_by_their_charge_and_hydrogens_only(residue: str) -> None:
    molecule = Chem.AddHs(Chem.MolFromSmiles(peptide_smiles(f"ACE-{residue}-NME")))
    charge = CHARGES.get(residue, 0)
    assert Chem.GetFormalCharge(molecule) == charge
    neutral = {"HIS": "HIE", "ASP": "ASH", "GLU": "GLH", "LYS": "LYN", "ARG": "ARN"}
    parent = neutral.get(AMINO_ACID[residue], AMINO_ACID[residue])
    other = Chem.AddHs(Chem.MolFromSmiles(peptide_smiles(f"ACE-{parent}-NME")))
    hydrogens = [sum(a.GetAtomicNum() == 1 for a in m.GetAtoms()) for m in (molecule, other)]
    assert hydrogens[0] - hydrogens[1] == charge
    assert molecule.GetNumHeavyAtoms() == other.GetNumHeavyAtoms()


@pytest.mark.parametrize(
    ("name", "charge"),
    [("NH3-GLY-COO", 0), ("NH2-GLY-COO", -1), ("NH3-PRO-COOH", 1), ("NH3-LYS-COOH", 2), ("NH2-ASP-COO", -2)],
)
def test_ends_decide_the_charge(name: str, charge: int) -> None:
    assert make_part(name, peptide_smiles(name)).charge == charge
    assert amino_acids("NH3-HIP-GLY-COO") == ("HIS", "GLY")


def test_an_unknown_residue_is_named_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"'HIA'.*HI"):
        peptide_smiles("ACE-HIA-NME")
    with pytest.raises(ValueError, match="END-RESIDUE"):
        peptide_smiles("ALA")


def test_parts_keep_marks_charges_and_bonds() -> None:
    part = make_part("methylammonium", "C[NH2+:1][H:2]", conformers=2, seed=3)
    assert part.key == molecule_key("C[NH3+]") == "C[NH3+]"
    assert (part.numbers[part.marks[1]], part.numbers[part.marks[2]]) == (7, 1)
    assert part.charge == 1 and part.formal_charges[part.marks[1]] == 1
    assert len(part.bonds) == len(part) - 1 == 7
    assert any({part.marks[1], part.marks[2]} == set(bond) for bond in part.bonds.tolist())
    assert len(part.conformers) == 2 and part.structure().charge == 1
    again = make_part("methylammonium", "C[NH2+:1][H:2]", conformers=2, seed=3)
    np.testing.assert_array_equal(part.conformers[1], again.conformers[1])


def test_spin_states_of_parts() -> None:
    assert make_part("methylene", "[CH2]").multiplicity == 3
    assert make_part("methylene", "[CH2]", multiplicity=1).multiplicity == 1
    assert make_part("sodium", "[Na+]").bonds.shape == (0, 2)
    with pytest.raises(ValueError, match="multiplicity"):
        make_part("methyl", "[CH3]", multiplicity=1)
    with pytest.raises(ValueError, match="smiles"):
        make_part("nothing", "C(")


def test_stereoisomers_and_marked_molecules_share_a_key() -> None:
    assert molecule_key("C[C@H](N)C(=O)O") == molecule_key("C[C@@H](N)C(=O)O") == molecule_key("CC(N)[C:1](=O)O")
