"""Checks of structures: what is sound passes, and every single fault is found and named."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest
from openmm import app

from openmm_mlff.sampling.starts import set_torsion
from openmm_mlff.sampling.structure_checks import StructureChecks, rms_distance, superpose

from .copies import Molecule


@pytest.fixture(scope="module")
def checks(molecule: Molecule) -> StructureChecks:
    return StructureChecks(molecule.topology, molecule.positions)


def index(topology: app.Topology, residue: str, name: str) -> int:
    return next(a.index for a in topology.atoms() if (a.residue.name, a.name) == (residue, name))


def graph(checks: StructureChecks, n: int) -> np.ndarray:
    bonded = np.zeros((n, n), dtype=bool)
    for i, j in checks.bonds:
        bonded[i, j] = bonded[j, i] = True
    return bonded


def test_a_sound_structure_has_no_faults(checks: StructureChecks, molecule: Molecule) -> None:
    found = checks(molecule.positions)
    assert (found.reason, found.lasting) == ("", "")
    ca = index(molecule.topology, "ALA", "CA")
    assert checks.centres == (ca,)
    assert len(checks.peptides) == 2


def test_a_mirror_image_is_inverted(checks: StructureChecks, molecule: Molecule) -> None:
    found = checks(molecule.positions * [1, 1, -1])
    assert found.inverted == (index(molecule.topology, "ALA", "CA"),)
    assert found.reason == found.lasting == "inverted"


def test_two_neighbours_that_change_places_are_an_inversion(checks: StructureChecks, molecule: Molecule) -> None:
    x = molecule.positions.copy()
    ca, cb, ha = (index(molecule.topology, "ALA", name) for name in ("CA", "CB", "HA"))
    x[[cb, ha]] = x[[ha, cb]]
    assert checks(x).inverted == (ca,)


def test_a_hydrogen_between_the_heavy_neighbours_is_misplaced(checks: StructureChecks, molecule: Molecule) -> None:
    x = molecule.positions.copy()
    ca, ha = (index(molecule.topology, "ALA", name) for name in ("CA", "HA"))
    x[ha] = 2 * x[ca] - x[ha]
    found = checks(x)
    assert (found.inverted, found.misplaced, found.reason, found.lasting) == ((), (ca,), "misplaced", "")


def test_a_cis_peptide_is_twisted(checks: StructureChecks, molecule: Molecule) -> None:
    top = molecule.topology
    quartet = [
        index(top, "ALA", "CA"), index(top, "ALA", "C"), index(top, "NME", "N"), index(top, "NME", "C"),
    ]  # fmt: skip
    bonded = graph(checks, top.getNumAtoms())
    x = set_torsion(molecule.positions, bonded, quartet, 10.0)
    found = checks(x)
    assert found.twisted == ((quartet[1], quartet[2]),)
    assert found.lasting == "twisted"
    assert checks(set_torsion(molecule.positions, bonded, quartet, 150.0)).twisted == ()


def test_a_stretched_bond_is_broken(checks: StructureChecks, molecule: Molecule) -> None:
    i, j = checks.bonds[0]
    x = molecule.positions.copy()
    x[i] += 0.4 * (x[i] - x[j])
    found = checks(x)
    assert [i, j] in found.broken.tolist()
    assert (found.reason, found.lasting) == ("broken", "")


def test_overlapping_atoms_clash_unless_they_are_near_in_the_graph(checks: StructureChecks, molecule: Molecule) -> None:
    top = molecule.topology
    first, last = index(top, "ACE", "CH3"), index(top, "NME", "C")
    x = molecule.positions.copy()
    x[last] = x[first] + [0.185, 0.0, 0.0]  # the sum of the radii is 0.34 nm, 0.55 times that 0.187
    assert [first, last] in checks.clashes(x).tolist()
    x[last] = x[first] + [0.189, 0.0, 0.0]
    assert [first, last] not in checks.clashes(x).tolist()
    for i, j in checks.bonds:  # 0.1 nm apart and no clash
        assert [i, j] not in checks.clashes(molecule.positions).tolist()


def test_nan_is_named(checks: StructureChecks, molecule: Molecule) -> None:
    x = molecule.positions.copy()
    x[3, 1] = np.nan
    assert checks(x).lasting == "not finite"


def test_trp_cage_is_sound(shared: Path) -> None:
    """The structure in the PDB; centres are all alpha carbons but those of glycine, and three in side chains."""
    traj = mdtraj.load(str(shared / "data" / "1l2y.pdb"))
    checks = StructureChecks(traj.topology.to_openmm(), traj.xyz[0].astype(float))
    names = sorted(f"{traj.topology.atom(i).residue.name}{traj.topology.atom(i).name}" for i in checks.centres)
    alpha = [r.name for r in traj.topology.residues if r.name != "GLY"]
    assert names == sorted([*(f"{r}CA" for r in alpha), "ILECB", "LEUCG", "LEUCG"])
    assert len(checks.peptides) == 19
    x = traj.xyz[0].astype(float)
    assert checks(x).reason == ""
    assert checks(-x).inverted == checks.centres


def test_a_reference_with_clashes_is_refused(molecule: Molecule) -> None:
    x = molecule.positions.copy()
    x[-1] = x[0] + 0.01
    with pytest.raises(ValueError, match="reference: expected a structure without clashes"):
        StructureChecks(molecule.topology, x)
    with pytest.raises(ValueError, match=r"reference: expected finite positions of shape \(22, 3\)"):
        StructureChecks(molecule.topology, x[:-1])


def test_bonds_come_from_distances_where_the_topology_has_none(molecule: Molecule, checks: StructureChecks) -> None:
    bare = app.Topology()
    residue = bare.addResidue("MOL", bare.addChain())
    for atom in molecule.topology.atoms():
        bare.addAtom(atom.name, atom.element, residue)
    assert StructureChecks(bare, molecule.positions).bonds.tolist() == checks.bonds.tolist()


def test_superposition_turns_and_never_mirrors(molecule: Molecule) -> None:
    random = np.random.default_rng(3)
    q, r = np.linalg.qr(random.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    q[:, 0] *= np.linalg.det(q)
    moved = molecule.positions @ q.T + [1.0, -2.0, 0.5]
    np.testing.assert_allclose(superpose(moved, molecule.positions), molecule.positions, atol=1e-12)
    noisy = moved + random.normal(0.0, 0.02, moved.shape)
    pair = mdtraj.Trajectory(np.stack([molecule.positions, noisy]), None)
    assert rms_distance(noisy, molecule.positions) == pytest.approx(float(mdtraj.rmsd(pair, pair)[1]), rel=1e-4)
    assert rms_distance(-molecule.positions, molecule.positions) > 0.05
    part = [0, 1, 4, 6]
    fitted = superpose(noisy, molecule.positions, part)
    np.testing.assert_allclose(fitted[part].mean(axis=0), molecule.positions[part].mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(fitted[1:] - fitted[:-1], axis=1), np.linalg.norm(noisy[1:] - noisy[:-1], axis=1), atol=1e-12
    )
