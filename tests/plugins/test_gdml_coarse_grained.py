"""Coarse-grained GDML against toys whose mean force is known, and against the regression written out in full."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import openmm_gdml.coarse_grained as module
from openmm_gdml.coarse_grained import CoarseGrainedGDML, stratified
from openmm_gdml.mean_force import Internal, Representation, kernel_matrix
from openmm_gdml.operators import force_blocks
from openmm_mlff.potentials.family import load_potential, save_potential

SWAP = np.array([[0, 1, 2, 3], [0, 2, 1, 3]])


def mean_forces(positions: np.ndarray) -> np.ndarray:
    """Of E = sum over pairs of (d - d0)^2 / 2 eV: closed form."""
    n = positions.shape[1]
    length = 1.5 + 0.2 * np.add.outer(np.arange(n), np.arange(n)) * (1 - np.eye(n))
    vectors = positions[:, :, None] - positions[:, None]
    distances = np.linalg.norm(vectors, axis=-1) + np.eye(n)
    return -np.einsum("nij,nijx->nix", (distances - length) / distances * (1 - np.eye(n)), vectors)


def toy(n: int, seed: int, beads: int = 4, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of scattered beads, their mean forces, and instantaneous ones: as bare noise on all 3N components."""
    random = np.random.default_rng(seed)
    centre = np.array([[0, 0, 0], [1.6, 0, 0], [0.5, 1.7, 0], [0.6, 0.5, 1.9], [1.8, 1.7, 1.8]])[:beads]
    positions = centre + random.normal(scale=0.12, size=(n, beads, 3))
    mean = mean_forces(positions)
    return positions, mean, mean + noise * random.normal(size=mean.shape)


def predict(model: Any, positions: np.ndarray) -> np.ndarray:
    return model.energies_and_forces(torch.from_numpy(positions))[1].numpy()


@pytest.mark.parametrize("beads", [2, 3, 5])
def test_nothing_but_rigid_motions_is_left_out(beads: int) -> None:
    """Back in Cartesian coordinates the small matrix is the full one."""
    a, b = (torch.from_numpy(toy(n, seed=n, beads=beads)[0]) for n in (4, 3))
    one, other = (Internal.of(r, Representation(beads), permuted=True) for r in (a, b))
    assert one.rank == {2: 1, 3: 3, 5: 9}[beads]
    small = kernel_matrix(one, other, 1.3).view(4, one.rank, 3, one.rank)
    full = torch.einsum("ikr,irjs,jls->ikjl", one.q, small, other.q)
    torch.testing.assert_close(full, force_blocks(a, b, 1.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("permutations", [None, SWAP])
@pytest.mark.parametrize("method", ["reduced_rank", "single", "two_layer"])
def test_all_frames_as_regressors_are_the_full_regression(method: str, permutations: np.ndarray | None) -> None:
    """F = K (K + lambda)^-1 y with the Cartesian matrix of all frames, whichever way it is computed."""
    n, sigma, lam = 25, 0.8, 1e-3
    positions, _, forces = toy(n, seed=1, noise=0.3)
    others, _, _ = toy(10, seed=2)
    scale = forces.std()
    k = force_blocks(positions, positions, sigma, permutations).numpy().reshape(12 * n, 12 * n)
    alpha = np.linalg.solve(k + lam * np.eye(12 * n), forces.ravel() / scale)
    cross = force_blocks(others, positions, sigma, permutations).numpy().reshape(120, 12 * n)
    expected = (scale * cross @ alpha).reshape(others.shape)
    # one batch of all frames is a single model, and a second layer at the same points reproduces it
    settings: dict[str, Any] = {
        "reduced_rank": {"n_inducing": n},
        "single": {"batch_frames": n},
        "two_layer": {
            "n_models": 1, "batch_frames": n, "n_second": n, "second_sigma": sigma, "second_lam": 1e-12,
        },
    }[method]  # fmt: skip
    estimator = CoarseGrainedGDML(method, sigma=sigma, lam=lam, permutations=permutations, **settings)
    model = estimator.fit(positions, forces)
    tolerance = 1e-5 if method == "two_layer" else 1e-8
    np.testing.assert_allclose(predict(model, others), expected, rtol=0, atol=tolerance)
    if permutations is not None:
        np.testing.assert_allclose(
            predict(model, others[:, SWAP[1]]), predict(model, others)[:, SWAP[1]], rtol=0, atol=1e-9
        )


def test_a_wide_kernel_and_a_small_lambda_leave_digits() -> None:
    """Against least squares by orthogonal factors; the condition number is 1e9, and its square would leave no digit."""
    sigma, lam, m = 15.0, 1e-9, 60
    positions, mean, _ = toy(400, seed=12)
    test = toy(100, seed=13)[0]
    scale = mean.std()
    estimator = CoarseGrainedGDML(sigma=sigma, lam=lam, n_inducing=m)
    model = estimator.fit(positions, mean)
    random = np.random.default_rng(estimator.seed)
    points = positions[np.sort(stratified(np.zeros(400), m, random))]
    values, vectors = np.linalg.eigh(force_blocks(points, points, sigma).numpy().reshape(12 * m, -1))
    kept = values > 1e-14 * values[-1]
    basis = vectors[:, kept] / np.sqrt(values[kept])
    columns = force_blocks(positions, points, sigma).numpy().reshape(-1, 12 * m) @ basis
    stacked = np.concatenate([columns, np.sqrt(lam) * np.eye(columns.shape[1])])
    labels = np.concatenate([mean.ravel() / scale, np.zeros(columns.shape[1])])
    b = np.linalg.lstsq(stacked, labels, rcond=None)[0]
    expected = scale * (force_blocks(test, points, sigma).numpy().reshape(-1, 12 * m) @ basis @ b).reshape(test.shape)
    error = np.sqrt(np.mean((predict(model, test) - expected) ** 2))
    assert error < 1e-3 * np.sqrt(np.mean(expected**2))


def test_averaging_finds_the_mean_force_in_the_noise() -> None:
    """Noise stronger than the forces: averaging comes near the exact mean force, a single model does not."""
    positions, mean, forces = toy(6000, seed=3, noise=0.4)
    test, exact, _ = toy(500, seed=4)
    held_out = toy(3000, seed=5, noise=0.4)
    validation = (held_out[0], held_out[2])
    grid = [1e-3, 1e-2, 1e-1, 1.0]
    errors = {}
    for method, extra in {
        "single": {"batch_frames": 100},
        "two_layer": {"n_models": 24, "batch_frames": 100, "n_second": 200, "second_lam": [1e-6, 1e-4]},
        "reduced_rank": {"n_inducing": 60},
    }.items():
        estimator = CoarseGrainedGDML(method, sigma=[0.5, 1.0], lam=grid, second_sigma=1.0, **extra)  # type: ignore[arg-type]
        model = estimator.fit(positions, forces, validation=validation)
        errors[method] = float(np.sqrt(np.mean((predict(model, test) - exact) ** 2)))
        best = min(row["validation"] for row in estimator.report)
        assert best == pytest.approx(np.mean((predict(model, held_out[0]) - held_out[2]) ** 2), rel=1e-9) or (
            method == "two_layer"
        )
    size = float(np.sqrt(np.mean(mean**2)))
    assert errors["reduced_rank"] < 0.12 * size
    assert errors["two_layer"] < 0.2 * size
    assert errors["single"] > 1.5 * max(errors["two_layer"], errors["reduced_rank"])


def test_weights_count_frames() -> None:
    positions, _, forces = toy(80, seed=6, noise=0.2)
    weights = np.where(np.arange(80) < 40, 2.0, 1.0)
    twice = np.concatenate([np.arange(40), np.arange(80)])
    settings: dict[str, Any] = {"sigma": 0.7, "lam": 1e-2, "n_inducing": 80}
    weighted = CoarseGrainedGDML(**settings).fit(positions, forces, weights=weights)
    # the same regressors, as copies add nothing to their span
    repeated = CoarseGrainedGDML(**{**settings, "n_inducing": 120}).fit(positions[twice], forces[twice])
    test = toy(20, seed=7)[0]
    np.testing.assert_allclose(predict(weighted, test), predict(repeated, test), rtol=0, atol=1e-6)


def test_a_stopped_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STORE_EVERY", 0.0)
    monkeypatch.setattr(module, "batch_size", lambda *_: 16)
    positions, _, forces = toy(100, seed=8, noise=0.2)
    seen: list[float] = []

    def stop(what: str, fraction: float) -> None:
        if fraction > 0.4:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"sigma": 0.7, "lam": 1e-2, "n_inducing": 20, "seed": 3}
    whole = CoarseGrainedGDML(**settings).fit(positions, forces)
    with pytest.raises(KeyboardInterrupt):
        CoarseGrainedGDML(**settings, progress=stop).fit(positions, forces, folder=tmp_path)
    resumed = CoarseGrainedGDML(**settings, progress=lambda what, fraction: seen.append(fraction))
    model = resumed.fit(positions, forces, folder=tmp_path)
    assert 0.4 < min(seen) < 0.7 and seen[-1] == 1.0
    torch.testing.assert_close(model.coefficients, whole.coefficients, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"folder: normal_equations_0\.7\.safetensors belongs to other frames"):
        CoarseGrainedGDML(**settings).fit(positions, forces * 1.5, folder=tmp_path)


def test_the_model_is_an_ordinary_potential(tmp_path: Path) -> None:
    positions, _, forces = toy(60, seed=9)
    model = CoarseGrainedGDML(sigma=1.0, lam=1e-8, n_inducing=30).fit(positions, forces, beads=["A", "B", "C", "D"])
    assert model.config.beads == ("A", "B", "C", "D") and model.config.numbers == (1, 2, 3, 4)
    energies, _ = model.energies_and_forces(torch.from_numpy(positions))
    assert abs(float(energies.mean())) < 1e-9
    loaded = load_potential(save_potential(model, tmp_path / "m.safetensors"))
    np.testing.assert_array_equal(predict(loaded, positions), predict(model, positions))


def test_only_a_chiral_descriptor_learns_handedness() -> None:
    """E = 0.2 eV times the sine of a dihedral: a function of distances is even in it and learns nothing."""
    random = np.random.default_rng(11)
    base = np.array([[1.2, 0.9, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.5], [1.1, -0.9, 2.0]])
    positions = base + random.normal(scale=0.12, size=(500, 4, 3))
    positions[::2, :, 1] *= -1.0

    def energy(r: torch.Tensor) -> torch.Tensor:
        a, axis, b = r[:, 0] - r[:, 1], r[:, 2] - r[:, 1], r[:, 3] - r[:, 2]
        m, n = torch.linalg.cross(axis, a), torch.linalg.cross(axis, b)
        sine = (torch.linalg.cross(m, n) * axis).sum(-1) / (m.norm(dim=-1) * n.norm(dim=-1) * axis.norm(dim=-1))
        return 0.2 * sine

    r = torch.from_numpy(positions).requires_grad_(True)
    (gradient,) = torch.autograd.grad(energy(r).sum(), r)
    forces = -gradient.numpy()
    errors = {}
    for name in ("inverse_distances", "distances_and_dihedrals"):
        estimator = CoarseGrainedGDML(sigma=2.0, lam=1e-5, n_inducing=200, descriptor=name)
        model = estimator.fit(positions[:400], forces[:400])
        errors[name] = np.mean((predict(model, positions[400:]) - forces[400:]) ** 2) / np.mean(forces[400:] ** 2)
    assert errors["inverse_distances"] > 0.7
    assert errors["distances_and_dihedrals"] < 0.02


def test_stratified_frames_are_even_over_occupied_bins() -> None:
    random = np.random.default_rng(0)
    # two wells, one with 100 times the frames
    variable = np.concatenate([random.uniform(0, 0.9, 10_000), random.uniform(3, 4, 100)])
    drawn = stratified(variable, 4000, random, bins=4, replace=True)
    # the two occupied bins take turns: binomial, 5 standard deviations
    assert abs(np.mean(variable[drawn] > 2) - 0.5) < 5 * 0.5 / np.sqrt(4000)
    once = stratified(variable, 150, random, bins=4)
    assert len(set(once)) == 150 and 45 <= np.sum(variable[once] > 2) <= 100
    everything = stratified(np.column_stack([variable, variable]), len(variable), random)
    assert sorted(everything) == list(range(len(variable)))


GOOD = toy(40, seed=10)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"method": "magic"}, {}, "method: expected one of reduced_rank, two_layer, single, got 'magic'"),
        ({"sigma": -1.0}, {}, "sigma: expected a positive number or several, got -1.0"),
        ({"lam": 0.0}, {}, "lam: expected a positive number"),
        ({"n_inducing": 41}, {}, "n_inducing: expected at most 40, the number of frames, got 41"),
        ({"n_inducing": 0}, {}, "n_inducing: expected a whole number of at least 1, got 0"),
        ({"memory": "1 kB"}, {"n": 20}, "memory: expected at least .* GB for 20 regressors, got 1e-06 GB"),
        ({"method": "single", "memory": "1 kB"}, {}, "memory: expected at least .* GB for 40 geometries"),
        ({"sigma": [1.0, 2.0]}, {}, "validation: expected frames to choose sigma by, got None"),
        ({}, {"variables": np.zeros(7)}, "variables: expected 40 rows, one per frame, got 7"),
        ({}, {"weights": -np.ones(40)}, "weights: expected 40 numbers >= 0"),
        ({"method": "single"}, {"weights": np.ones(40)}, "weights: single takes frames with equal weights only"),
        ({}, {"beads": ["A"]}, "beads: expected 4 values, one per bead, got 1"),
        ({}, {"forces": np.zeros((40, 4, 3))}, "forces: expected forces that differ"),
        (
            {},
            {"forces": np.full((40, 4, 3), np.nan)},
            "forces: expected finite numbers, got NaN or infinity in frame 0",
        ),
        ({}, {"forces": np.zeros((39, 4, 3))}, "forces: expected shape (40, 4, 3), got (39, 4, 3)"),
        ({}, {"validation": (np.zeros((2, 4)), np.zeros((2, 4)))}, "validation positions: expected shape"),
    ],
)
def test_bad_input_is_named(settings: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    arguments = {"positions": GOOD[0], "forces": GOOD[1], **arguments}
    settings = {"n_inducing": arguments.pop("n", 20), **settings}
    with pytest.raises(ValueError, match=message.replace("(", "[(]").replace(")", "[)]")):
        CoarseGrainedGDML(**settings).fit(**arguments)


def test_equal_geometries_are_named() -> None:
    positions = np.concatenate([GOOD[0], GOOD[0][3:9]])
    forces = np.concatenate([GOOD[1], GOOD[1][3:9]])
    with pytest.raises(ValueError, match=re.escape("lam: the kernel matrix")) as caught:
        CoarseGrainedGDML("single", sigma=100.0, lam=1e-30, batch_frames=46).fit(positions, forces)
    assert "the most similar (0 apart in the descriptor)" in str(caught.value)
