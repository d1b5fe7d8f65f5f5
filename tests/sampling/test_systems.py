"""What is built from a structure file: regions, boxes, water, link atoms; and bad input by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import Vec3, app, unit

from openmm_mlff.sampling.platforms import choose_platform
from openmm_mlff.sampling.settings import RunSettings
from openmm_mlff.sampling.systems import bonds_by_distance, build, read_structure, select


def learned(tiny_model: str, path: str, **changes: object) -> RunSettings:
    return RunSettings(input=path, model="spookynet", model_path=tiny_model, **changes)  # type: ignore[arg-type]


def force_names(system: openmm.System) -> list[str]:
    return sorted(type(f).__name__ for f in system.getForces())


def test_a_molecule_alone_is_all_learned(alanine: str, tiny_model: str) -> None:
    built = build(learned(tiny_model, alanine))
    assert built.ml_atoms == list(range(22))
    assert not built.system.usesPeriodicBoundaryConditions()
    assert built.description["ml_formula"] == "C6H12N2O2"
    # every atom of the molecule has its usual number of bonds: 21 in an acyclic molecule of 22 atoms
    assert len(built.bonds) == 21
    assert built.torsions == {"phi": (4, 6, 8, 14), "psi": (6, 8, 14, 16)}
    assert "NonbondedForce" not in force_names(built.system)


def test_a_molecule_in_added_water_is_a_region(alanine: str, tiny_model: str) -> None:
    built = build(learned(tiny_model, alanine, padding=0.95, torsions={"chi": (10, 8, 6, 4)}))
    assert built.ml_atoms == list(range(22))
    waters = built.description["waters"]
    assert waters > 150 and built.system.getNumParticles() == 22 + 3 * waters
    assert {"PythonForce", "NonbondedForce"} <= set(force_names(built.system))
    assert built.torsions["chi"] == (10, 8, 6, 4)
    # waters stay rigid, the learned region is free
    held = {i for k in range(built.system.getNumConstraints()) for i in built.system.getConstraintParameters(k)[:2]}
    assert held == set(range(22, built.system.getNumParticles()))


def test_a_cut_bond_gets_a_link_atom_in_its_place(alanine: str, tiny_model: str) -> None:
    built = build(learned(tiny_model, alanine, ml_region="resname ALA NME"))
    assert built.system.getNumParticles() == 23 and built.ml_atoms == [*range(6, 22), 22]
    assert built.system.isVirtualSite(22)
    nitrogen, carbon, cap = built.positions[6], built.positions[4], built.positions[22]
    toward, bond = cap - nitrogen, carbon - nitrogen
    cosine = toward @ bond / np.linalg.norm(toward) / np.linalg.norm(bond)
    assert cosine == pytest.approx(1.0, abs=1e-6)
    # an N-H bond
    assert 0.09 < np.linalg.norm(toward) < 0.12


def test_embedding(alanine: str, tiny_model: str) -> None:
    names = []
    for embedding in ("mechanical", "electrostatic"):
        built = build(learned(tiny_model, alanine, ml_region="resname ALA NME", embedding=embedding))
        names.append([f.getName() for f in built.system.getForces() if isinstance(f, openmm.PythonForce)])
        assert built.ml_atoms == [*range(6, 22), 22]
    assert names == [["spookynet (openmm-mlff)"], ["spookynet, electrostatic embedding (openmm-mlff)"]]
    with pytest.raises(ValueError, match="embedding: expected one of mechanical, electrostatic, got 'both'"):
        learned(tiny_model, alanine, embedding="both")


def test_selections(alanine: str, tmp_path: Path) -> None:
    topology, _ = read_structure(alanine)
    residue = topology.addResidue("NA", topology.addChain())
    topology.addAtom("NA", app.element.sodium, residue)
    assert select(topology, "auto") == list(range(22))
    assert select(topology, "all") == list(range(23))
    assert select(topology, "none") == []
    assert select(topology, "resname NME") == list(range(16, 22))
    assert select(topology, "index 3 to 5") == [3, 4, 5]
    with pytest.raises(ValueError, match=r"'resname XYZ' selects no atom; residues here: ACE, ALA, NA, NME"):
        select(topology, "resname XYZ")
    with pytest.raises(ValueError, match=r"ml_region: expected auto, all, none or a selection"):
        select(topology, "resname ==")
    water = app.Topology()
    residue = water.addResidue("HOH", water.addChain())
    for name, element in (("O", app.element.oxygen), ("H1", app.element.hydrogen), ("H2", app.element.hydrogen)):
        water.addAtom(name, element, residue)
    # with nothing else there, the water is what is simulated
    assert select(water, "auto") == [0, 1, 2]


def test_bonds_by_distance_are_those_of_the_topology(alanine: str) -> None:
    topology, positions = read_structure(alanine)
    numbers = np.array([a.element.atomic_number for a in topology.atoms()])
    known = sorted((a.index, b.index) if a.index < b.index else (b.index, a.index) for a, b in topology.bonds())
    assert sorted(bonds_by_distance(numbers, positions * 10, range(22))) == known


def test_water_is_added_the_same_way_every_time(alanine: str) -> None:
    settings = RunSettings(input=alanine, ml_region="none", padding=0.9)
    first, second = build(settings), build(settings)
    np.testing.assert_array_equal(first.positions, second.positions)


def boxed(alanine: str, path: Path, width: float) -> str:
    topology, positions = read_structure(alanine)
    topology.setPeriodicBoxVectors((Vec3(width, 0, 0), Vec3(0, width, 0), Vec3(0, 0, width)) * unit.nanometer)
    with open(path, "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    return str(path)


def test_the_box_of_the_file_counts_unless_told_otherwise(alanine: str, tiny_model: str, tmp_path: Path) -> None:
    path = boxed(alanine, tmp_path / "box.pdb", 3.0)
    assert build(learned(tiny_model, path)).system.usesPeriodicBoundaryConditions()
    assert not build(learned(tiny_model, path, use_box=False)).system.usesPeriodicBoundaryConditions()


def test_bad_input_is_refused_by_name(alanine: str, tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"input: no file at"):
        build(RunSettings(input=str(tmp_path / "none.pdb")))
    (tmp_path / "empty.pdb").write_text("END\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^input: "):
        build(RunSettings(input=str(tmp_path / "empty.pdb")))
    (tmp_path / "bad.cif").write_text("no cif at all", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^input: bad.cif cannot be read"):
        build(RunSettings(input=str(tmp_path / "bad.cif")))
    with pytest.raises(ValueError, match=r"^ensemble: npt needs a periodic box"):
        build(learned(tiny_model, alanine, ensemble="npt"))
    with pytest.raises(ValueError, match=r"^forcefield: no-such.xml cannot be loaded"):
        build(RunSettings(input=alanine, ml_region="none", forcefield=("no-such.xml",)))
    with pytest.raises(ValueError, match=r"^forcefield: amber14/tip3p.xml has no parameters for this structure"):
        build(RunSettings(input=alanine, ml_region="none", forcefield=("amber14/tip3p.xml",)))
    with pytest.raises(ValueError, match=r"^torsions: expected atom indices below 22 for 'chi', got 22"):
        build(learned(tiny_model, alanine, torsions={"chi": (0, 1, 2, 22)}))
    with pytest.raises(ValueError, match=r"at least 1.35 nm wide"):
        build(RunSettings(input=boxed(alanine, tmp_path / "small.pdb", 1.2), ml_region="none"))
    with pytest.raises(ValueError, match=r"multiplicity"):
        build(learned(tiny_model, alanine, multiplicity=2))
    with pytest.raises(ValueError, match=r"spookynet"):
        build(RunSettings(input=alanine, model="spookynat"))


def test_the_platform_follows_the_size() -> None:
    assert choose_platform(22, "reference").name == "Reference"
    assert choose_platform(1000, "CPU").properties["Threads"] == "1"
    assert choose_platform(1000, "CPU").inexact == ""
    many = choose_platform(1000, "CPU", threads=2)
    assert many.properties["Threads"] == "2" and "random order" in many.inexact
    with pytest.raises(ValueError, match=r"^platform: expected one of .*Reference.*, got 'abacus'"):
        choose_platform(22, "abacus")
    with pytest.raises(ValueError, match=r"^threads: "):
        choose_platform(22, "Reference", threads=2)
    names = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    for name in names:
        chosen = choose_platform(1000, name)
        # every platform takes its own properties only
        assert set(chosen.properties) <= set(openmm.Platform.getPlatform(name).getPropertyNames())
    if not {"CUDA", "HIP"} & set(names):
        assert [choose_platform(n).name for n in (22, 99, 100, 5000)] == ["Reference", "Reference", "CPU", "CPU"]
