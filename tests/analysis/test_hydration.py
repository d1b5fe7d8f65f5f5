"""Hydration free energies from differences of energies whose exact answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.analysis.free_energy import InsufficientOverlap, thermal_energy
from openmm_mlff.analysis.hydration import hydration, plot_hydration, plot_parity
from openmm_mlff.units import EV_PER_KCAL_PER_MOL, KJ_PER_MOL_PER_EV

pytest.importorskip("pymbar")
KT = thermal_energy(298.15)
MEAN, WIDTH = -0.2, 0.03  # eV, of dU in vacuum


def gaussian_states(couplings: np.ndarray, n: int, seed: int, width: float = WIDTH) -> list[list[np.ndarray]]:
    """Where dU is Gaussian in vacuum, it is so at every coupling: mean - c width^2 / kT, with the same width."""
    rng = np.random.default_rng(seed)
    return [[rng.normal(MEAN - c * width**2 / KT, width, n // 2) for _ in range(2)] for c in couplings]


@pytest.mark.parametrize("windows", [2, 4])
def test_gaussian_differences_have_the_exact_free_energy(windows: int) -> None:
    """F = mean - width^2 / (2 kT), the cumulant expansion that ends at its second term."""
    couplings, exact = np.linspace(0, 1, windows), MEAN - WIDTH**2 / (2 * KT)
    found = [hydration(gaussian_states(couplings, 400, seed), couplings, 298.15, points=2) for seed in range(12)]
    z = np.array([(h.value - exact) / h.error for h in found])
    assert abs(z.mean()) < 3 / np.sqrt(len(z)) and 0.5 < z.std() < 1.5
    assert found[0].frames == [400] * windows
    for side, (value, error) in zip(("vacuum", "water"), found[0].one_sided, strict=True):
        assert abs(value - exact) < 5 * error, side
    # of Gaussian work: N_eff / N tends to exp(-width^2 / (2 kT^2))
    np.testing.assert_allclose(found[0].effective, np.exp(-0.5 * (WIDTH / KT) ** 2), atol=0.12)


def test_units_of_the_summary() -> None:
    found = hydration(gaussian_states(np.array([0, 1]), 200, 1), (0, 1), 298.15)
    summary = found.summary()
    assert summary["free_energy_kcal_mol"] * 4.184 == pytest.approx(summary["free_energy_kJ_mol"], rel=1e-9)
    assert summary["free_energy_kJ_mol"] == pytest.approx(found.value * KJ_PER_MOL_PER_EV)
    assert summary["estimator"] == "BAR" and summary["overlap"] == pytest.approx(found.neighbour_overlap)
    last = summary["convergence_kcal_mol"]["from_start"][-1]
    assert last[0] == pytest.approx(found.value / EV_PER_KCAL_PER_MOL)


def test_no_overlap_and_bad_input_are_named() -> None:
    far = gaussian_states(np.array([0, 1]), 100, 1, width=0.3)
    with pytest.raises(InsufficientOverlap, match="'vacuum' and 'water'"):
        hydration(far, (0, 1), 298.15)
    states = gaussian_states(np.array([0, 0.25, 1]), 200, 1, width=0.16)
    with pytest.raises(InsufficientOverlap, match=r"'coupling 0\.25' and 'water'"):
        hydration(states, (0, 0.25, 1), 298.15)
    with pytest.raises(ValueError, match="at least 10 of the ensemble 'water', got 4"):
        hydration([[np.zeros(20)], [np.zeros(4)]], (0, 1), 298.15)
    with pytest.raises(ValueError, match="couplings: expected 2 numbers"):
        hydration(far, (0, 0.5, 1), 298.15)


@pytest.mark.parametrize("windows", [2, 5])
def test_pictures_are_drawn(windows: int, tmp_path: Path) -> None:
    couplings = np.linspace(0, 1, windows)
    found = hydration(gaussian_states(couplings, 60, 3), couplings, 298.15, points=3)
    path = plot_hydration(found, tmp_path / "a" / "molecule.png", 30.0, "molecule", experiment=-4.9)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    values = np.array([-1.0, -3.0, 2.0])
    assert plot_parity(values, 0.1 * np.ones(3), values + 0.3, tmp_path / "parity.png").stat().st_size > 5000
