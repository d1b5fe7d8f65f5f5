"""Six beads of capped alanine: names, torsions, files for mdtraj, and force maps under the constraints of hydrogens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from openmm import app, unit

from openmm_mlff.analysis.observables import backbone_torsions, dihedral
from openmm_mlff.data.coarse_graining import (
    BeadMap,
    ForceCovariance,
    basic_force_map,
    constraints_of,
    optimised_force_map,
    slice_force_map,
)

#: C of ACE; N, CA, CB, C of ALA; N of NME
SIX = (4, 6, 8, 10, 14, 16)


@pytest.fixture(scope="module")
def alanine(repository: Path) -> app.PDBFile:
    return app.PDBFile(str(repository / "examples" / "recipes" / "capped_alanine.pdb"))


@pytest.fixture(scope="module")
def constraints(alanine: app.PDBFile) -> list[tuple[int, int]]:
    field = app.ForceField("amber99sbildn.xml")
    return constraints_of(field.createSystem(alanine.topology, constraints=app.HBonds))


def positions(file: app.PDBFile) -> np.ndarray:
    return np.array(file.positions.value_in_unit(unit.angstrom))


def test_beads_are_named_and_bonded_as_in_the_molecule(alanine: app.PDBFile) -> None:
    beads = BeadMap.slice(alanine.topology, SIX)
    assert beads.names == ("C", "N", "CA", "CB", "C", "N")
    assert beads.residues == (("ACE", 1), ("ALA", 2), ("ALA", 2), ("ALA", 2), ("ALA", 2), ("NME", 3))
    assert beads.bonds == ((0, 1), (1, 2), (2, 3), (2, 4), (4, 5))
    assert beads.numbers == (6, 7, 6, 6, 6, 7)
    assert np.array_equal(beads.positions(positions(alanine)), positions(alanine)[list(SIX)])


def test_beads_keep_the_backbone_torsions_also_in_a_pdb_file_for_mdtraj(alanine: app.PDBFile, tmp_path: Path) -> None:
    mdtraj = pytest.importorskip("mdtraj")
    beads = BeadMap.slice(alanine.topology, SIX)
    assert backbone_torsions(beads.topology()) == {"phi": (0, 1, 2, 4), "psi": (1, 2, 4, 5)}
    with open(tmp_path / "beads.pdb", "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(beads.topology(), beads.positions(positions(alanine)) * unit.angstrom, file)
    loaded = mdtraj.load(str(tmp_path / "beads.pdb"))
    assert [a.name for a in loaded.topology.atoms] == list(beads.names)
    found = np.degrees(mdtraj.compute_dihedrals(loaded, [[0, 1, 2, 4], [1, 2, 4, 5]]))[0]
    # mdtraj gives the angle of the same sign; a PDB file has three decimals
    assert found == pytest.approx(dihedral(positions(alanine), [[4, 6, 8, 14], [6, 8, 14, 16]]), abs=0.1)


def test_force_maps_are_consistent_with_the_constraints(
    alanine: app.PDBFile, constraints: list[tuple[int, int]]
) -> None:
    beads = BeadMap.slice(alanine.topology, SIX)
    basic = basic_force_map(beads, constraints)
    # the two N with a hydrogen each, CA with HA, CB with three; the carbonyl carbons alone
    assert basic.weights.sum(1).tolist() == [1, 2, 2, 4, 1, 2]
    covariance = ForceCovariance(22, constraints)
    covariance.add(np.random.default_rng(0).normal(size=(500, 22, 3)))
    for made in (basic, optimised_force_map(beads, covariance)):
        assert made.weights @ beads.weights.T == pytest.approx(np.eye(6), abs=1e-9)
        made.check(beads, constraints)
    with pytest.raises(ValueError, match=r"bead 1 \(N\) takes 1 of the force on atom 6 but 0 of that on atom 7"):
        slice_force_map(beads).check(beads, constraints)


def test_a_bead_on_a_constrained_hydrogen_and_one_on_its_partner_are_refused(
    alanine: app.PDBFile, constraints: list[tuple[int, int]]
) -> None:
    beads = BeadMap.slice(alanine.topology, [6, 7, 8])
    with pytest.raises(ValueError, match=r"beads 0 \(N\) and 1 \(H\) hold atoms that constraints join \(\[6, 7\]\)"):
        basic_force_map(beads, constraints)
