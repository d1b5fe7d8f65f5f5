"""Torsions against mdtraj; statistics against processes whose answers are known."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest
from openmm import app

from openmm_mlff.analysis import observables
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL


def ar1(rng: np.random.Generator, n: int, rho: float, runs: int = 1) -> np.ndarray:
    """Gaussian series of unit variance whose autocorrelation is rho^t, ``(runs, n)``."""
    x = np.empty((runs, n))
    x[:, 0] = rng.normal(size=runs)
    noise = rng.normal(size=(runs, n)) * np.sqrt(1 - rho**2)
    for t in range(1, n):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    return x


def test_torsions_are_those_of_mdtraj(repository: Path) -> None:
    path = str(repository / "examples" / "recipes" / "capped_alanine.pdb")
    frame = mdtraj.load(path)
    rng = np.random.default_rng(0)
    frames = mdtraj.Trajectory(frame.xyz + rng.normal(0, 0.05, (50, *frame.xyz.shape[1:])), frame.topology)
    quartets = np.array([rng.permutation(22)[:4] for _ in range(10)])
    ours = observables.dihedral(frames.xyz, quartets)
    theirs = np.degrees(mdtraj.compute_dihedrals(frames, quartets, periodic=False))
    difference = (ours - theirs + 180.0) % 360.0 - 180.0
    np.testing.assert_allclose(difference, 0.0, atol=2e-3)
    np.testing.assert_allclose(observables.dihedral(frames.xyz, quartets[3]), ours[:, 3])
    names = observables.backbone_torsions(app.PDBFile(path).topology)
    assert names["phi"] == tuple(mdtraj.compute_phi(frame)[0][0])
    assert names["psi"] == tuple(mdtraj.compute_psi(frame)[0][0])


def test_torsion_range_and_degenerate_cases() -> None:
    trans = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    assert observables.dihedral(trans, (0, 1, 2, 3)) == -180.0
    line = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 1.0, 0.0]])
    assert np.isnan(observables.dihedral(line, (0, 1, 2, 3)))


def test_backbone_torsions_of_a_protein(shared: Path) -> None:
    path = str(shared / "data" / "1l2y.pdb")
    topology = app.PDBFile(path).topology
    names = observables.backbone_torsions(topology)
    frame = mdtraj.load(path)[0]
    phi = {tuple(q) for q in mdtraj.compute_phi(frame)[0].tolist()}
    psi = {tuple(q) for q in mdtraj.compute_psi(frame)[0].tolist()}
    assert {q for name, q in names.items() if name.startswith("phi_")} == phi
    assert {q for name, q in names.items() if name.startswith("psi_")} == psi
    inside = set(range(60))
    some = observables.backbone_torsions(topology, inside)
    assert some and all(inside.issuperset(q) for q in some.values()) and len(some) < len(names)


def test_free_energy_of_a_known_density() -> None:
    rng = np.random.default_rng(2)
    kappa, n, bins = 2.0, 2_000_000, 24
    phi, psi = (np.degrees(rng.vonmises(mu, kappa, n)) for mu in (-1.0, 2.0))
    energy = observables.ramachandran_free_energy(phi, psi, 300.0, bins)
    edges = np.radians(np.linspace(-180, 180, bins * 100 + 1))
    middle = (edges[1:] + edges[:-1]) / 2
    # probability of a cell: the density exp(kappa cos(x - mu)) integrated over it
    cells = [np.exp(kappa * np.cos(middle - mu)).reshape(bins, 100).sum(axis=1) for mu in (-1.0, 2.0)]
    probability = np.outer(cells[0] / cells[0].sum(), cells[1] / cells[1].sum())
    kt = BOLTZMANN_KJ_PER_MOL * 300.0
    often = probability * n > 400
    z = ((energy + kt * np.log(probability)) * np.sqrt(probability * n) / kt)[often]
    # the zero of the energy is that of the lowest cell, the same for all
    z -= (energy + kt * np.log(probability))[often].mean() * np.sqrt(probability * n)[often] / kt
    assert often.sum() > 300 and 0.85 < z.std() < 1.15 and np.abs(z).max() < 5
    assert energy.min() == 0.0
    histogram = observables.ramachandran_histogram(np.array([-180.0, 179.9, 0.0]), np.array([0.0, 0.0, 180.0]), 36)
    # 180 degrees is the same as -180
    assert histogram[0, 18] == histogram[35, 18] == histogram[18, 0] == pytest.approx(1 / 3)
    assert np.isinf(observables.ramachandran_free_energy(np.zeros(3), np.zeros(3), 300.0)).sum() == 36 * 36 - 1


def test_weights_move_the_histogram() -> None:
    histogram = observables.ramachandran_histogram(np.array([0.0, 90.0]), np.zeros(2), 4, np.array([3.0, 1.0]))
    assert histogram[2, 2] == 0.75 and histogram[3, 2] == 0.25


def test_statistical_inefficiency_of_a_known_process() -> None:
    for rho in (0.0, 0.5, 0.9):
        # g of rho^t is (1 + rho) / (1 - rho)
        found = [observables.statistical_inefficiency(x) for x in ar1(np.random.default_rng(3), 20_000, rho, 10)]
        assert np.mean(found) == pytest.approx((1 + rho) / (1 - rho), rel=0.12)
    assert observables.statistical_inefficiency(np.ones(5)) == 1.0
    with pytest.raises(ValueError, match="at least two samples"):
        observables.statistical_inefficiency(np.ones(1))


@pytest.mark.parametrize("estimate", [observables.mean_with_error, observables.block_average])
def test_error_bars_of_means_hold_what_they_say(estimate) -> None:  # type: ignore[no-untyped-def]
    found = [estimate(x + 5.0) for x in ar1(np.random.default_rng(4), 4096, 0.9, 300)]
    z = np.array([(f.value - 5.0) / f.error for f in found])
    # 300 z-scores of unit variance; the blocks' error is the largest of several noisy ones, hence a little too large
    assert abs(z.mean()) < 4 / np.sqrt(300)
    assert 0.7 < z.std() < 1.15


def test_drift_and_its_error_bar() -> None:
    time, slope, n_atoms = np.arange(1000) * 0.05, 2e-4, 22
    noise = ar1(np.random.default_rng(5), 1000, 0.8, 200) * 0.01
    found = [observables.energy_drift(time, 7.0 + slope * time + x, n_atoms) for x in noise]
    values = np.array([f.value for f in found])
    z = (values - slope / n_atoms) / np.array([f.error for f in found])
    assert values.mean() == pytest.approx(slope / n_atoms, abs=4 * values.std() / np.sqrt(200))
    assert 0.85 < z.std() < 1.25
    exact = observables.energy_drift(time, 3.0 - 0.5 * time, 1)
    assert exact.value == pytest.approx(-0.5) and exact.error < 1e-12
    with pytest.raises(ValueError, match="at least three samples"):
        observables.energy_drift(time[:2], time[:2], 1)


def test_a_table_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,x\n0,1.5\n10,-2\n", encoding="utf-8")
    table = observables.read_table(tmp_path / "log.csv")
    np.testing.assert_array_equal(table["step"], [0, 10])
    np.testing.assert_array_equal(table["x"], [1.5, -2.0])
    (tmp_path / "log.csv").write_text("step,x\n", encoding="utf-8")
    with pytest.raises(ValueError, match="at least one row"):
        observables.read_table(tmp_path / "log.csv")
