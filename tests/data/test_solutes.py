"""SMILES, tables and files -> solutes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.data.solutes import file_name, read_solutes

Chem = pytest.importorskip("rdkit.Chem", reason="needs rdkit (extra 'label')")


def test_a_smiles_is_embedded_with_the_seed() -> None:
    (one,) = read_solutes("CCO", conformers=2, seed=3)
    assert (one.name, one.label, one.smiles, one.problem) == ("CCO", "CCO", "CCO", "")
    assert [len(s) for s in one.structures] == [9, 9]
    (again,) = read_solutes("CCO", conformers=2, seed=3)
    np.testing.assert_array_equal(again.structures[1].positions, one.structures[1].positions)
    (other,) = read_solutes("CCO", seed=4, name="ethanol, dry")
    assert (other.name, other.label) == ("ethanol_dry", "ethanol, dry")
    assert np.abs(other.structures[0].positions - one.structures[0].positions).max() > 1e-3


@pytest.mark.parametrize(
    ("smiles", "problem"),
    [
        ("CC.O", r"molecule: expected one molecule, got 2 fragments \(CC, O\)"),
        ("C(C", "smiles: expected a molecule, got 'C\\(C'"),
    ],
)
def test_what_is_wrong_with_a_smiles_is_its_problem(smiles: str, problem: str) -> None:
    import re

    (solute,) = read_solutes(smiles)
    assert solute.structures == () and re.match(problem, solute.problem)


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    text = '\ufeffsmiles,name,experiment,more\nO,water,-6.3,x\nCC.O,"two, apart",,\nC,methane,2.0,\n'
    path.write_text(text, encoding="utf-8")
    water, two, methane = read_solutes(str(path))
    assert (water.name, water.experiment, len(water.structures[0])) == ("water", -6.3, 3)
    assert (two.name, two.label, two.experiment) == ("two_apart", "two, apart", None) and "2 fragments" in two.problem
    assert methane.experiment == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,structure\na,C\n", "expected the columns name and smiles, got name, structure"),
        ("name,smiles\n", "expected at least one molecule"),
        ("name,smiles\n,C\n", "line 2: expected a name and a SMILES"),
        ("name,smiles,experiment\na,C,about two\n", r"line 2: expected a number \(kcal/mol\) as experiment"),
        ("name,smiles,experiment\na,C,nan\n", "line 2: expected a number"),
    ],
)
def test_bad_tables_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_solutes(str(tmp_path / "t.csv"))


def test_files_with_coordinates(tmp_path: Path) -> None:
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles("CO"))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    Chem.MolToPDBFile(molecule, str(tmp_path / "methanol.pdb"))
    with Chem.SDWriter(str(tmp_path / "two.sdf")) as writer:
        writer.write(molecule)
        writer.write(molecule)
    (pdb,) = read_solutes(str(tmp_path / "methanol.pdb"), name="wood alcohol")
    assert (pdb.name, pdb.label, pdb.structures[0].formula) == ("wood_alcohol", "wood alcohol", "CH4O")
    first, second = read_solutes(str(tmp_path / "two.sdf"))
    assert (first.name, second.name, first.smiles) == ("two-1", "two-2", "CO")
    with pytest.raises(ValueError, match=r"conformers: expected 1 for two\.sdf"):
        read_solutes(str(tmp_path / "two.sdf"), conformers=2)
    with pytest.raises(ValueError, match="name: expected none for 2 molecules"):
        read_solutes(str(tmp_path / "two.sdf"), name="one")
    with pytest.raises(FileNotFoundError, match=r"none\.sdf: no such file"):
        read_solutes(str(tmp_path / "none.sdf"))


def test_file_names() -> None:
    assert file_name("1,2-dichloroethane (cis)/x") == "1_2-dichloroethane_cis_x"
    with pytest.raises(ValueError, match="name: expected letters or digits"):
        file_name("../")
