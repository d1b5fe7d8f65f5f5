"""Maps from atoms to beads against Gaussian systems, whose mean forces are known exactly."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app

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


def chain(elements: str = "CHCOH") -> app.Topology:
    """Atoms in a row, each bonded to the next, in two residues."""
    topology = app.Topology()
    c = topology.addChain()
    residues = [topology.addResidue("AAA", c), topology.addResidue("BBB", c)]
    atoms = [topology.addAtom(f"{e}{i}", app.Element.getBySymbol(e), residues[i > 1]) for i, e in enumerate(elements)]
    for a, b in pairwise(atoms):
        topology.addBond(a, b)
    return topology


def beads_of(weights: np.ndarray) -> BeadMap:
    n = len(weights)
    return BeadMap(tuple(f"B{i}" for i in range(n)), (("X", 1),) * n, weights, (0,) * n, np.ones(n))


def gaussian(n_atoms: int, n_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames of exp(-x K x / 2) (kT = 1), their forces, and K."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n_atoms, n_atoms))
    K = root @ root.T + 0.5 * np.eye(n_atoms)
    x = np.einsum("ij,njk->nik", np.linalg.cholesky(np.linalg.inv(K)), rng.normal(size=(n_frames, n_atoms, 3)))
    return x, -np.einsum("ij,njk->nik", K, x), K


def fitted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """B of the least-squares fit y = B x over frames and directions."""
    flat = [np.moveaxis(v, 1, 0).reshape(v.shape[1], -1) for v in (x, y)]
    return np.linalg.lstsq(flat[0].T, flat[1].T, rcond=None)[0].T


# -- beads ---------------------------------------------------------------------------------------------------------


def test_slice_takes_atoms_with_their_names() -> None:
    beads = BeadMap.slice(chain(), [3, 0, 2])
    assert beads.names == ("O3", "C0", "C2") and beads.numbers == (8, 6, 6)
    assert beads.residues == (("BBB", 2), ("AAA", 1), ("BBB", 2))
    assert beads.bonds == ((0, 2),)
    x = np.random.default_rng(0).normal(size=(4, 2, 5, 3))
    assert np.array_equal(beads.positions(x), x[..., [3, 0, 2], :])


def test_centres_of_mass_by_hand() -> None:
    beads = BeadMap.centre_of_mass(chain(), {"P": [1, 0], "Q": [2], "R": [3, 4]})
    x = np.random.default_rng(0).normal(size=(5, 3))
    carbon, hydrogen, oxygen = 12.01078, 1.007947, 15.99943
    expected = (carbon * x[0] + hydrogen * x[1]) / (carbon + hydrogen)
    np.testing.assert_allclose(beads.positions(x)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(beads.masses, [carbon + hydrogen, carbon, oxygen + hydrogen], rtol=1e-5)
    assert beads.numbers == (0, 6, 0) and beads.bonds == ((0, 1), (1, 2))
    topology = beads.topology()
    assert [a.name for a in topology.atoms()] == ["P", "Q", "R"]
    assert [a.element is None for a in topology.atoms()] == [True, False, True]
    assert [r.name for r in topology.residues()] == ["AAA", "BBB"] and topology.getNumBonds() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.array([[1.0, 0.1], [0, 1]])}, r"weights: expected rows that sum to one, got 1.1 for bead 0"),
        ({"weights": np.array([[1.0, 0], [1, 0]])}, "weights: expected independent beads"),
        ({"weights": np.eye(3)}, "names: expected 3 values"),
        ({"masses": np.array([1.0, 0.0])}, "masses: expected 2 positive masses"),
        ({"bonds": ((0, 2),)}, r"bonds: expected pairs of beads from 0 to 1, got \(0, 2\)"),
    ],
)
def test_impossible_beads(change: dict, message: str) -> None:
    given = {
        "names": ("A", "B"),
        "residues": (("X", 1),) * 2,
        "weights": np.eye(2),
        "numbers": (6, 6),
        "masses": np.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        BeadMap(**(given | change))


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        ([], "at least one"),
        ([0, 5], "indices from 0 to 4, got 0 to 5"),
        ([1, 1], "every atom in one bead at most, got 1"),
    ],
)
def test_impossible_atoms(atoms: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeadMap.slice(chain(), atoms)


# -- forces --------------------------------------------------------------------------------------------------------


def test_mean_force_of_a_gaussian_system() -> None:
    """With x ~ exp(-x K x/2) and R = C x, the mean force is exactly -(C K^-1 C^T)^-1 R: every map must find it."""
    x, f, K = gaussian(5, 100_000, seed=3)
    C = np.array([[0.7, 0.3, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0.25, 0.75]])
    beads = beads_of(C)
    exact = -np.linalg.inv(C @ np.linalg.inv(K) @ C.T)
    covariance = ForceCovariance(5)
    covariance.add(f)
    R = beads.positions(x)
    noise = {}
    for force_map in (slice_force_map(beads), optimised_force_map(beads, covariance)):
        np.testing.assert_allclose(force_map.weights @ C.T, np.eye(3), atol=1e-9)
        F = force_map.forces(f)
        found = fitted(R, F)
        noise[force_map.kind] = float(((F - np.einsum("ij,njk->nik", exact, R)) ** 2).mean())
        # standard error of a regression coefficient: rms noise / (rms of R, about 0.3) / sqrt(3e5)
        assert np.abs(found - exact).max() < 5 * np.sqrt(noise[force_map.kind]) / 0.3 / np.sqrt(3e5)
    assert noise["optimised"] < 0.5 * noise["slice"]


def test_optimised_map_is_the_best_of_all() -> None:
    """Exactly: <F F^T> = K, and the least mean square under M C^T = 1 is that of the mean force, tr (C K^-1 C^T)^-1."""
    _, f, K = gaussian(6, 30, seed=5)
    C = np.zeros((2, 6))
    C[0, :2], C[1, 3:5] = 0.5, 0.5
    beads = beads_of(C)
    covariance = ForceCovariance(6)
    covariance.add(f[:10])
    covariance.add(f[10:])
    assert covariance.frames == 30
    np.testing.assert_allclose(covariance.matrix, np.einsum("nix,njx->ij", f, f) / 30, rtol=1e-12)
    covariance._sum = 30 * K
    best = optimised_force_map(beads, covariance, regularisation=1e-12).weights
    least = np.trace(np.linalg.inv(C @ np.linalg.inv(K) @ C.T))
    assert np.trace(best @ K @ best.T) == pytest.approx(least, rel=1e-8)
    rng = np.random.default_rng(0)
    null = np.linalg.svd(C)[2][2:]
    for _ in range(5):
        other = best + 0.1 * rng.normal(size=(2, 4)) @ null
        ForceMap(other).check(beads)
        assert np.trace(other @ K @ other.T) > least * (1 + 1e-6)


def test_constrained_partner_must_not_be_left_out() -> None:
    """A rigid pair: the recorded force on one atom alone lacks the constraint force."""
    beads = BeadMap.slice(chain(), [0, 2])
    constraints = [(0, 1), (3, 4)]
    with pytest.raises(ValueError, match="takes 1 of the force on atom 0 but 0 of that on atom 1, which a constraint"):
        slice_force_map(beads).check(beads, constraints)
    basic = basic_force_map(beads, constraints)
    assert basic.weights.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    covariance = ForceCovariance(5, constraints)
    covariance.add(np.random.default_rng(0).normal(size=(100, 5, 3)))
    optimised = optimised_force_map(beads, covariance)
    optimised.check(beads, constraints)
    assert np.abs(optimised.weights[:, 3]).max() > 0 and np.ptp(optimised.weights[:, 3:], axis=1).max() < 1e-12


def test_mean_force_with_a_constraint() -> None:
    """A rigid pair in a well of its second atom, U = k/2 |r2|^2, |r2 - r1| = 1, and a bead at r1.

    Integration by parts: <F . g(r1)> = -kT <div g(r1)> for the mean force F and any g.
    """
    rng, k, n = np.random.default_rng(0), 2.0, 200_000
    r2 = rng.normal(size=(n, 3)) / np.sqrt(k)
    direction = rng.normal(size=(n, 3))
    r1 = r2 - direction / np.linalg.norm(direction, axis=1, keepdims=True)
    forces = np.stack([np.zeros_like(r1), -k * r2], axis=1)
    beads = beads_of(np.array([[1.0, 0.0]]))
    F = basic_force_map(beads, [(0, 1)]).forces(forces)[:, 0]
    square = (r1**2).sum(1)
    for g, divergence in ((r1, np.full(n, 3.0)), (r1 * square[:, None], 5 * square)):
        residual = (F * g).sum(1) + divergence
        assert abs(residual.mean()) < 4 * residual.std() / np.sqrt(n)
    assert not slice_force_map(beads).forces(forces).any()


def test_constraint_across_beads_is_refused() -> None:
    beads = BeadMap.slice(chain(), [0, 1])
    covariance = ForceCovariance(5, [(0, 1)])
    covariance.add(np.ones((1, 5, 3)))
    for make in (lambda: basic_force_map(beads, [(0, 1)]), lambda: optimised_force_map(beads, covariance)):
        with pytest.raises(ValueError, match=r"beads: beads 0 \(C0\) and 1 \(H1\) hold atoms that constraints join"):
            make()


def test_map_that_pushes_another_bead_is_refused() -> None:
    beads = beads_of(np.eye(2))
    with pytest.raises(ValueError, match=r"push on bead 0 \(B0\) moves bead 1 \(B1\) by 0.5, expected 0"):
        ForceMap(np.array([[1.0, 0.5], [0, 1]])).check(beads)


def test_constraint_groups_join_in_turn() -> None:
    assert constraint_groups(6, [(4, 1), (5, 4), (2, 3)]) == [[0], [1, 4, 5], [2, 3]]
    with pytest.raises(ValueError, match=r"constraints: expected pairs of atoms from 0 to 2, got \(0, 3\)"):
        constraint_groups(3, [(0, 3)])
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    system.addConstraint(2, 0, 0.1)
    assert constraints_of(system) == [(2, 0)]


def test_bad_forces_are_named() -> None:
    covariance = ForceCovariance(3)
    with pytest.raises(ValueError, match="at least one frame"):
        _ = covariance.matrix
    with pytest.raises(ValueError, match=r"forces: expected shape \(..., 3, 3\), got \(2, 4, 3\)"):
        covariance.add(np.zeros((2, 4, 3)))
    with pytest.raises(ValueError, match="forces: expected finite"):
        covariance.add(np.full((1, 3, 3), np.nan))


# -- files ---------------------------------------------------------------------------------------------------------


def test_maps_come_back(tmp_path: Path) -> None:
    beads = BeadMap.centre_of_mass(chain(), {"P": [0, 1], "Q": [3, 4]})
    force_map = basic_force_map(beads, [(0, 1), (3, 4)])
    save_maps(tmp_path / "maps.safetensors", beads, force_map, 300.0)
    read, forces, temperature = load_maps(tmp_path / "maps.safetensors")
    assert (read.names, read.residues, read.numbers, read.bonds) == (
        beads.names,
        beads.residues,
        beads.numbers,
        beads.bonds,
    )
    assert np.array_equal(read.weights, beads.weights) and np.array_equal(read.masses, beads.masses)
    assert np.array_equal(forces.weights, force_map.weights) and (forces.kind, temperature) == ("basic", 300.0)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        save_maps(tmp_path / "other", beads, force_map, 0.0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_maps(tmp_path / "other")
