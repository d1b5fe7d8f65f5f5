"""Files: published layouts read in their own units, round trips, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.data.formats import (
    READERS,
    read_sgdml_npz,
    read_structures,
    unit_factor,
    with_groups,
    write_structures,
)
from openmm_mlff.data.structures import Structure

# CODATA 2018 and exact SI values, written out on purpose
EV_PER_KCAL_MOL = 4184.0 / (1.602176634e-19 * 6.02214076e23)
HARTREE = 27.211386245988
BOHR = 0.529177210903


def labelled(periodic: bool = False, n: int = 3) -> list[Structure]:
    rng = np.random.default_rng(11)
    return [
        Structure(
            [8, 1, 1, 1],
            rng.normal(size=(4, 3)),
            charge=1,
            multiplicity=1 + 2 * (k % 2),
            cell=np.diag([9.0, 10.0, 11.0]) + 0.5 if periodic else None,
            energy=float(rng.normal()),
            forces=rng.normal(size=(4, 3)),
            dipole=rng.normal(size=3),
            charges=rng.normal(size=4),
            group=f"run {k}",
            info={"temperature": 300.5, "ok": True},
        )
        for k in range(n)
    ]


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize(("ending", "digits"), [(".extxyz", 1e-8), (".h5", 0.0)])
def test_round_trip(tmp_path: Path, ending: str, digits: float, periodic: bool) -> None:
    if ending == ".h5":
        pytest.importorskip("h5py", reason="needs h5py (extra 'label')")
    before = labelled(periodic)
    write_structures(tmp_path / f"a{ending}", before)
    after = read_structures(tmp_path / f"a{ending}")
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.numbers, other.numbers)
        for name in ("positions", "energy", "forces", "dipole", "charges"):
            np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=0, atol=digits)
        assert (one.charge, one.multiplicity, one.group) == (other.charge, other.multiplicity, other.group)
        assert (one.cell is None) == (other.cell is None)
        if one.cell is not None:
            np.testing.assert_allclose(other.cell, one.cell, atol=1e-12)
    if ending == ".extxyz":
        assert dict(after[0].info) == {"temperature": 300.5, "ok": True}


def test_extxyz_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(
        "2\n"
        'Properties=species:S:1:pos:R:3:REF_forces:R:3 REF_energy=-1.25 total_charge=-1 spin=2 source="a paper"\n'
        "O 0.0 0.0 0.0 0.1 0.0 0.0\n"
        "H 0.0 0.0 0.97 -0.1 0.0 0.0\n",
        encoding="utf-8",
    )
    (structure,) = read_structures(tmp_path / "a.xyz")
    assert (structure.charge, structure.multiplicity, structure.energy) == (-1, 2, -1.25)
    assert structure.forces is not None
    assert structure.forces[1, 0] == -0.1
    assert structure.cell is None
    assert dict(structure.info) == {"source": "a paper"}


def test_options_are_for_files_that_do_not_say(tmp_path: Path) -> None:
    write_structures(tmp_path / "a.extxyz", labelled(n=1))
    assert read_structures(tmp_path / "a.extxyz", charge=5, multiplicity=7)[0].charge == 1
    (tmp_path / "b.xyz").write_text("1\n\nNa 0 0 0\n", encoding="utf-8")
    (ion,) = read_structures(tmp_path / "b.xyz", charge=1)
    assert (ion.charge, ion.multiplicity) == (1, 1)


def test_slabs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(
        '1\nLattice="5 0 0 0 5 0 0 0 5" pbc="T T F" Properties=species:S:1:pos:R:3\nNa 0 0 0\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match="pbc: "):
        read_structures(tmp_path / "a.xyz")


@pytest.mark.parametrize("name", ["ethanol", "ala2"])
def test_published_sgdml_data_set(shared: Path, name: str) -> None:
    path = shared / f"data/gdml/dataset_{name}.npz"
    with np.load(path, allow_pickle=False) as raw:
        structures = read_structures(path)
        assert raw["e_unit"].item() in ("kcal/mol", b"kcal/mol")
        assert len(structures) == len(raw["R"])
        np.testing.assert_array_equal(structures[5].numbers, raw["z"])
        np.testing.assert_array_equal(structures[5].positions, raw["R"][5])
        assert structures[5].energy == pytest.approx(raw["E"][5].item() * EV_PER_KCAL_MOL, rel=1e-12)
        np.testing.assert_allclose(structures[5].forces, raw["F"][5] * EV_PER_KCAL_MOL, rtol=1e-12)


def test_sgdml_lattice_has_its_vectors_in_columns(tmp_path: Path) -> None:
    lattice = np.array([[10.0, 1.0, 2.0], [0.0, 9.0, 3.0], [0.0, 0.0, 8.0]])
    np.savez(
        tmp_path / "a.npz", z=[29], R=np.zeros((1, 1, 3)), lattice=lattice, r_unit="bohr", e_unit="hartree", E=[-1.0]
    )
    (structure,) = read_structures(tmp_path / "a.npz")
    assert structure.cell is not None
    np.testing.assert_allclose(structure.cell[1], np.array([1.0, 9.0, 0.0]) * BOHR, rtol=1e-12)
    assert structure.energy == pytest.approx(-HARTREE, rel=1e-12)
    assert structure.forces is None


def test_sgdml_round_trip_and_its_limits(tmp_path: Path) -> None:
    before = [s.replace(charge=0, multiplicity=1) for s in labelled()]
    write_structures(tmp_path / "a.npz", before)
    for one, other in zip(before, read_structures(tmp_path / "a.npz"), strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.forces, other.forces)
        assert one.energy == other.energy
    other_molecule = Structure([1], np.zeros((1, 3)), energy=0.0, forces=np.zeros((1, 3)))
    with pytest.raises(ValueError, match="expected one molecule"):
        write_structures(tmp_path / "b.npz", [before[0], other_molecule])
    assert not (tmp_path / "b.npz").exists()


def test_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "owned"), "w"))  # type: ignore[return-value]

    np.savez(tmp_path / "a.npz", z=[1], R=np.array([[Bomb()]], dtype=object))
    with pytest.raises(ValueError, match="expected arrays of numbers"):
        read_sgdml_npz(tmp_path / "a.npz")
    assert not (tmp_path / "owned").exists()


def test_spice_layout(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py (extra 'label')")
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    rng = np.random.default_rng(2)
    conformations, gradients = rng.normal(size=(2, 5, 2, 3))
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        group = file.create_group("hydroxide")
        for key, value, units in (
            ("atomic_numbers", np.array([8, 1]), None),
            ("conformations", conformations, "bohr"),
            ("formation_energy", np.arange(5.0), "hartree"),
            ("dft_total_energy", np.arange(5.0) - 70.0, "hartree"),
            ("dft_total_gradient", gradients, "hartree/bohr"),
            ("scf_dipole", np.ones((5, 3)), "bohr*elementary_charge"),
            ("mbis_charges", np.tile([[[-1.2], [0.2]]], (5, 1, 1)), "elementary_charge"),
        ):
            data = group.create_dataset(key, data=value)
            if units:
                data.attrs["units"] = units
        group.create_dataset("smiles", data=["[O-:1][H:2]"], dtype=h5py.string_dtype())
    structures = read_structures(tmp_path / "a.hdf5")
    assert len(structures) == 5
    third = structures[3]
    assert (third.charge, third.group) == (-1, "hydroxide")
    assert third.energy == pytest.approx(3.0 * HARTREE)
    np.testing.assert_allclose(third.positions, conformations[3] * BOHR)
    np.testing.assert_allclose(third.forces, -gradients[3] * HARTREE / BOHR)
    np.testing.assert_allclose(third.dipole, [BOHR] * 3)
    np.testing.assert_allclose(third.charges, [-1.2, 0.2])
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["hydroxide/conformations"].attrs["units"] = "angstrom"
    with pytest.raises(ValueError, match="expected the unit bohr, got 'angstrom'"):
        read_structures(tmp_path / "a.hdf5")


def test_pdb_with_box(shared: Path) -> None:
    (structure,) = read_structures(shared / "data/alanine-dipeptide-explicit.pdb")
    assert structure.cell is not None
    assert structure.cell[0, 0] > 20
    oh = np.linalg.norm(structure.positions[23] - structure.positions[22])
    assert structure.numbers[22:25].tolist() == [8, 1, 1]
    assert oh == pytest.approx(0.957, abs=0.01)


def test_many_models_of_a_pdb(shared: Path) -> None:
    structures = read_structures(shared / "data/1l2y.pdb")
    assert structures[0].group == "1l2y"
    assert len(structures[0]) == 304


def test_smiles_give_charge_multiplicity_and_geometry(tmp_path: Path) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    (tmp_path / "a.smi").write_text("# comment\nC[NH3+] methylammonium\n\n[CH3]\n[O-]C=O formate\n", encoding="utf-8")
    structures = read_structures(tmp_path / "a.smi", conformers=2, seed=5)
    assert [s.formula for s in structures[::2]] == ["CH6N", "CH3", "CHO2"]
    assert [(s.charge, s.multiplicity) for s in structures[::2]] == [(1, 1), (0, 2), (-1, 1)]
    assert structures[0].info["name"] == "methylammonium"
    assert structures[0].group == structures[1].group == "C[NH3+]"
    again = read_structures(tmp_path / "a.smi", conformers=2, seed=5)
    np.testing.assert_array_equal(structures[1].positions, again[1].positions)
    cn = np.linalg.norm(structures[0].positions[1] - structures[0].positions[0])
    assert cn == pytest.approx(1.5, abs=0.05)
    (tmp_path / "b.smi").write_text("CCO\nC1CC\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b.smi, line 2: .*'C1CC'"):
        read_structures(tmp_path / "b.smi")


def test_sdf(tmp_path: Path) -> None:
    chem = pytest.importorskip("rdkit.Chem", reason="needs rdkit (extra 'label')")
    from rdkit.Chem import AllChem

    molecule = chem.AddHs(chem.MolFromSmiles("CC(=O)[O-]"))
    AllChem.EmbedMolecule(molecule, randomSeed=3)
    with chem.SDWriter(str(tmp_path / "a.sdf")) as writer:
        writer.write(molecule)
    (structure,) = read_structures(tmp_path / "a.sdf")
    assert (structure.formula, structure.charge, structure.group) == ("C2H3O2", -1, "CC(=O)[O-]")
    np.testing.assert_allclose(structure.positions, molecule.GetConformer().GetPositions(), atol=1e-4)
    with chem.SDWriter(str(tmp_path / "b.sdf")) as writer:
        writer.write(chem.RemoveHs(molecule))
    with pytest.raises(ValueError, match="molecule 1: expected explicit hydrogens"):
        read_structures(tmp_path / "b.sdf")


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.smi").write_text("C\n", encoding="utf-8")
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "rdkit", None)
    monkeypatch.setitem(sys.modules, "h5py", None)
    for name in ("a.smi", "a.h5"):
        with pytest.raises(ImportError, match=r"pip install 'openmm-mlff\[label\]'"):
            read_structures(tmp_path / name)


@pytest.mark.parametrize("ending", sorted(READERS))
def test_damaged_files_are_value_errors(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"\x00\x01 not what it says\n" * 5)
    with pytest.raises(ValueError, match=r"."):
        read_structures(path)


def test_unknown_files_and_units(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_structures(tmp_path / "missing.xyz")
    (tmp_path / "a.docx").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a file ending in .*got 'a.docx'"):
        read_structures(tmp_path / "a.docx")
    with pytest.raises(ValueError, match="e_unit: unknown unit 'kcal'; did you mean 'kcal/mol'"):
        unit_factor("kcal", {"kcal/mol": 1.0, "ev": 2.0}, "e_unit")


def test_groups_are_filled_in_where_they_are_missing() -> None:
    bare = [s.replace(group="") for s in labelled(n=4)]
    assert {s.group for s in with_groups(bare, "formula")} == {"H3O"}
    assert len({s.group for s in with_groups(bare, "structure")}) == 4
    assert [s.group for s in with_groups(bare, "block:3")] == ["block-0"] * 3 + ["block-1"]
    assert [s.group for s in with_groups(labelled(n=2), "formula")] == ["run 0", "run 1"]
    for by in ("molecule", "block:", "block:0"):
        with pytest.raises(ValueError, match="by: expected"):
            with_groups(bare, by)
