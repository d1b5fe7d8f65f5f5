"""Bead maps and force maps: exact mean forces, consistency with constraints, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.data.coarse_graining import (
    BeadMap,
    ForceCovariance,
    ForceMap,
    basic_force_map,
    constraint_groups,
    constraints_of,
    load_maps,
    optimised_force_map,
    save_maps,
    slice_force_map,
)

KT = 0.02585
SIX = (4, 6, 8, 10, 14, 16)


@pytest.fixture(scope="module")
def alanine(repository: Path) -> app.PDBFile:
    return app.PDBFile(str(repository / "examples" / "recipes" / "capped_alanine.pdb"))


@pytest.fixture(scope="module")
def constraints(alanine: app.PDBFile) -> list[tuple[int, int]]:
    field = app.ForceField("amber99sbildn.xml")
    return constraints_of(field.createSystem(alanine.topology, constraints=app.HBonds))


def chain(n: int) -> BeadMap:
    """Beads 0 and 2 of a chain of n atoms as atoms, one residue."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [topology.addAtom(f"C{i}", app.Element.getBySymbol("C"), residue) for i in range(n)]
    for a, b in itertools.pairwise(atoms):
        topology.addBond(a, b)
    return BeadMap.slice(topology, [0, 2])


def test_six_beads_of_alanine_are_named_and_bonded_as_in_the_molecule(alanine: app.PDBFile) -> None:
    beads = BeadMap.slice(alanine.topology, SIX)
    assert beads.names == ("C", "N", "CA", "CB", "C", "N")
    assert beads.residues == (("ACE", 1), ("ALA", 2), ("ALA", 2), ("ALA", 2), ("ALA", 2), ("NME", 3))
    assert beads.bonds == ((0, 1), (1, 2), (2, 3), (2, 4), (4, 5))
    assert beads.numbers == (6, 7, 6, 6, 6, 7)
    x = np.array(alanine.positions.value_in_unit(unit.angstrom))
    assert np.array_equal(beads.positions(x), x[list(SIX)])


def test_bead_topology_gives_the_backbone_torsions_and_survives_a_pdb_file(
    alanine: app.PDBFile, tmp_path: Path
) -> None:
    mdtraj = pytest.importorskip("mdtraj")
    from openmm_mlff.analysis.observables import backbone_torsions, dihedral

    beads = BeadMap.slice(alanine.topology, SIX)
    topology = beads.topology()
    assert backbone_torsions(topology) == {"phi": (0, 1, 2, 4), "psi": (1, 2, 4, 5)}
    x = np.array(alanine.positions.value_in_unit(unit.angstrom))
    with open(tmp_path / "beads.pdb", "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, beads.positions(x) * unit.angstrom, file)
    loaded = mdtraj.load(str(tmp_path / "beads.pdb"))
    assert [a.name for a in loaded.topology.atoms] == list(beads.names)
    whole = dihedral(x, [4, 6, 8, 14])
    assert np.degrees(mdtraj.compute_dihedrals(loaded, [[0, 1, 2, 4]]))[0, 0] == pytest.approx(whole, abs=0.1)


def test_centres_of_mass(alanine: app.PDBFile) -> None:
    beads = BeadMap.centre_of_mass(alanine.topology, {"ACE": range(6), "MID": range(6, 16), "NH": [16, 17]})
    x = np.array(alanine.positions.value_in_unit(unit.angstrom))
    masses = np.array([a.element.mass.value_in_unit(unit.dalton) for a in alanine.topology.atoms()])
    assert beads.positions(x)[1] == pytest.approx((masses[6:16] @ x[6:16]) / masses[6:16].sum(), abs=1e-12)
    assert beads.masses[0] == pytest.approx(masses[:6].sum())
    assert beads.bonds == ((0, 1), (1, 2)) and beads.numbers == (0, 0, 0)
    assert all(atom.element is None for atom in beads.topology().atoms())


def harmonic(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random harmonic system about the origin: stiffness ``(n, n)``, and Boltzmann frames with their forces."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, n))
    stiffness = a @ a.T + np.eye(n)
    x = rng.multivariate_normal(np.zeros(n), KT * np.linalg.inv(stiffness), size=(40_000, 3)).transpose(0, 2, 1)
    return stiffness, x, -np.einsum("ab,fbx->fax", stiffness, x)


@pytest.mark.parametrize("kind", ["slice", "optimised"])
def test_the_mean_force_of_a_harmonic_system_is_exact(kind: str) -> None:
    # beads R = C x of a Gaussian x are Gaussian, with stiffness (C K^-1 C^T)^-1
    beads = chain(5)
    stiffness, x, f = harmonic(5, seed=1)
    covariance = ForceCovariance(5)
    covariance.add(f)
    made = slice_force_map(beads) if kind == "slice" else optimised_force_map(beads, covariance, 1e-12)
    made.check(beads)
    exact = np.linalg.inv(beads.weights @ np.linalg.inv(stiffness) @ beads.weights.T)
    bead_x, bead_f = beads.positions(x), made.forces(f)
    fitted = -np.linalg.lstsq(
        bead_x.transpose(0, 2, 1).reshape(-1, 2), bead_f.transpose(0, 2, 1).reshape(-1, 2), rcond=None
    )[0]
    assert np.abs(fitted.T - exact).max() < 0.02 * np.abs(exact).max()
    noise = bead_f + np.einsum("ab,fbx->fax", exact, bead_x)
    if kind == "optimised":
        # of a Gaussian system the best linear map leaves no noise: its force is the mean force itself
        assert np.abs(noise).max() < 0.05 * np.abs(bead_f).max()
    else:
        assert np.mean(noise**2) > 0.1 * np.mean(bead_f**2)


def test_the_optimised_map_has_the_least_noise_of_all_that_are_consistent() -> None:
    beads = chain(6)
    _, _, f = harmonic(6, seed=2)
    covariance = ForceCovariance(6, [(0, 1), (3, 4)])
    covariance.add(f[:20_000])
    covariance.add(f[20_000:])
    best = optimised_force_map(beads, covariance, 1e-10)
    least = np.sum(best.forces(f) ** 2)
    rng = np.random.default_rng(0)
    # other solutions of M C^T = 1 with equal weights in the groups {0, 1}, {2}, {3, 4}, {5}: free are those of 3-5
    for _ in range(20):
        change = np.zeros((2, 6))
        change[:, 3:] = np.outer(rng.normal(size=2), [1, 1, 0]) + np.outer(rng.normal(size=2), [0, 0, 1])
        other = ForceMap(best.weights + 0.1 * change)
        other.check(beads, [(0, 1), (3, 4)])
        assert np.sum(other.forces(f) ** 2) > least


def test_maps_of_alanine_are_consistent_with_its_constraints(
    alanine: app.PDBFile, constraints: list[tuple[int, int]]
) -> None:
    beads = BeadMap.slice(alanine.topology, SIX)
    basic = basic_force_map(beads, constraints)
    # N with its H, CA with HA, CB with three H; the two carbonyl C alone
    assert basic.weights.sum(1).tolist() == [1, 2, 2, 4, 1, 2]
    covariance = ForceCovariance(22, constraints)
    covariance.add(np.random.default_rng(0).normal(size=(500, 22, 3)))
    optimised = optimised_force_map(beads, covariance)
    for made in (basic, optimised):
        assert made.weights @ beads.weights.T == pytest.approx(np.eye(6), abs=1e-9)
        made.check(beads, constraints)
    with pytest.raises(ValueError, match=r"bead 1 \(N\) takes 1 of the force on atom 6 but 0 of that on atom 7"):
        slice_force_map(beads).check(beads, constraints)


def test_without_net_force_the_optimised_map_of_a_dimer_is_found_although_the_covariance_is_singular() -> None:
    beads = chain(3)
    f = np.random.default_rng(0).normal(size=(100, 3, 3))
    f -= f.mean(axis=1, keepdims=True)
    covariance = ForceCovariance(3)
    covariance.add(f)
    made = optimised_force_map(beads, covariance)
    # all of the force is on two beads: what is left of it has to vanish in the sum
    assert np.abs(made.forces(f).sum(axis=1)).max() < 1e-4


def test_constraint_groups_are_found_through_chains_of_constraints() -> None:
    assert constraint_groups(6, [(4, 2), (0, 2)]) == [[0, 2, 4], [1], [3], [5]]
    with pytest.raises(ValueError, match=r"constraints: expected pairs of atoms from 0 to 5, got \(2, 6\)"):
        constraint_groups(6, [(2, 6)])


def test_beads_that_share_a_constraint_are_refused(alanine: app.PDBFile, constraints: list[tuple[int, int]]) -> None:
    beads = BeadMap.slice(alanine.topology, [6, 7, 8])
    covariance = ForceCovariance(22, constraints)
    covariance.add(np.random.default_rng(0).normal(size=(50, 22, 3)))
    match = r"beads 0 \(N\) and 1 \(H\) hold atoms that constraints join \(\[6, 7\]\)"
    with pytest.raises(ValueError, match=match):
        basic_force_map(beads, constraints)
    with pytest.raises(ValueError, match=match):
        optimised_force_map(beads, covariance)


def test_wrong_input_is_named(alanine: app.PDBFile) -> None:
    with pytest.raises(ValueError, match="every atom in one bead at most, got 4 more than once"):
        BeadMap.slice(alanine.topology, [4, 6, 4])
    with pytest.raises(ValueError, match="indices from 0 to 21, got 4 to 22"):
        BeadMap.slice(alanine.topology, [4, 22])
    beads = BeadMap.slice(alanine.topology, SIX)
    with pytest.raises(ValueError, match=r"atoms: expected shape \(\.\.\., 22, 3\), got \(6, 3\)"):
        beads.positions(np.zeros((6, 3)))
    with pytest.raises(ValueError, match="weights: expected rows that sum to one, got 2 for bead 0"):
        BeadMap(("A",), (("X", 1),), np.ones((1, 2)), (0,), np.ones(1))
    with pytest.raises(ValueError, match="weights: expected independent beads"):
        BeadMap(("A", "B"), (("X", 1),) * 2, np.full((2, 2), 0.5), (0, 0), np.ones(2))
    with pytest.raises(ValueError, match=r"the push on bead 0 \(C\) moves bead 0 \(C\) by 2, expected 1"):
        ForceMap(2 * beads.weights).check(beads)
    with pytest.raises(ValueError, match="forces: expected at least one frame"):
        optimised_force_map(beads, ForceCovariance(22))
    with pytest.raises(ValueError, match="forces: expected finite numbers"):
        ForceCovariance(2).add(np.full((1, 2, 3), np.nan))


def test_maps_are_kept_with_their_temperature(alanine: app.PDBFile, tmp_path: Path) -> None:
    beads = BeadMap.slice(alanine.topology, SIX)
    forces = basic_force_map(beads, [(6, 7)])
    save_maps(tmp_path / "maps.safetensors", beads, forces, 300.0, {"data": "here"})
    again, force_map, temperature = load_maps(tmp_path / "maps.safetensors")
    assert (again.names, again.residues, again.bonds, again.numbers) == (
        beads.names,
        beads.residues,
        beads.bonds,
        beads.numbers,
    )
    assert np.array_equal(again.weights, beads.weights) and np.array_equal(again.masses, beads.masses)
    assert np.array_equal(force_map.weights, forces.weights) and force_map.kind == "basic" and temperature == 300.0
    with pytest.raises(FileNotFoundError):
        load_maps(tmp_path / "nothing")
    from openmm_mlff.sampling.biased_md import Frames, write_frames

    write_frames(tmp_path / "other", Frames(*(np.zeros((1, 2, 3)),) * 2, np.zeros(1), np.zeros((1, 2)), {}))
    with pytest.raises(ValueError, match="expected a bead map of format"):
        load_maps(tmp_path / "other")


def test_constraints_are_read_from_a_system() -> None:
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    system.addConstraint(2, 0, 0.1)
    assert constraints_of(system) == [(2, 0)]
