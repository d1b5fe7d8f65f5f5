"""Analytic Hessians and normal modes: against a known spring, and against finite differences of forces."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from ase.units import _amu, _c, _e
from ase.vibrations import Vibrations

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.forces.ase_calculator import MLFFCalculator
from openmm_mlff.potentials.potential import Potential, Prediction
from openmm_spookynet import SpookyNet, SpookyNetConfig


@dataclass(frozen=True)
class SpringConfig:
    stiffness: float = 30.0


class Spring(Potential):
    """E = k/2 sum over pairs (|r_ij| - 1)^2: what its second derivatives are is known."""

    family = "spring"
    elements = (1,)
    cutoff = 5.0

    def __init__(self, config: SpringConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("stiffness", torch.tensor(config.stiffness, dtype=torch.float64))

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        assert batch.pairs is not None
        length = batch.pair_vectors(batch.pairs).square().sum(-1).sqrt()
        energy = 0.25 * self.get_buffer("stiffness") * (length - 1.0).square()
        return Prediction(batch.sum_by_structure(torch.zeros(batch.n_atoms, dtype=torch.float64).index_add(
            0, batch.pairs.first, energy)))  # fmt: skip


def spookynet(dtype: torch.dtype = torch.float64) -> SpookyNet:
    torch.manual_seed(3)
    model = SpookyNet(SpookyNetConfig(num_features=16, num_modules=2)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
    return model.eval()


def test_a_spring() -> None:
    """k along the bond, k (1 - 1/r) across it, and the frequency sqrt(k/mu) at the minimum."""
    model = Spring(SpringConfig())
    hessian = model.hessian(Structure([1, 1], [[0, 0, 0], [1.2, 0, 0]]))
    block = np.diag([30.0, 30.0 * (1 - 1 / 1.2), 30.0 * (1 - 1 / 1.2)])
    np.testing.assert_allclose(hessian, np.block([[block, -block], [-block, block]]), atol=1e-12)

    atoms = Atoms("H2", [[0, 0, 0], [1.0, 0, 0]], calculator=MLFFCalculator(model))
    atoms.set_constraint(FixAtoms([0]))
    frequencies = atoms.calc.get_vibrations(atoms).get_frequencies()
    omega = sqrt(30.0 * _e * 1e20 / (0.5 * atoms.get_masses()[0] * _amu))
    assert frequencies[-1].real == pytest.approx(omega / (2 * pi * _c * 100), rel=1e-6)
    assert np.abs(frequencies[:-1]).max() < 1.0


def test_a_network() -> None:
    """Every element against central differences of the forces."""
    model = spookynet()
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=2)
    structure = Structure(atoms.numbers, atoms.positions)
    hessian = model.hessian(structure)
    assert np.abs(hessian).max() > 0.1
    step, n = 1e-4, len(hessian)
    differences = np.empty((n, n))
    for k in range(n):
        shift = np.zeros(n)
        shift[k] = step
        ends = [model.energy_and_forces(structure.replace(positions=structure.positions + s * shift.reshape(-1, 3)))[1]
                for s in (1, -1)]  # fmt: skip
        differences[k] = -(ends[0] - ends[1]).ravel() / (2 * step)
    np.testing.assert_allclose(hessian, differences, atol=1e-6 * np.abs(hessian).max())
    assert np.array_equal(hessian, hessian.T)
    # moving the whole molecule changes nothing
    np.testing.assert_allclose(hessian.reshape(n, -1, 3).sum(1), 0.0, atol=1e-10)

    v = np.random.default_rng(0).normal(size=(2, len(structure), 3))
    np.testing.assert_allclose(model.hessian_products(structure, v), (v.reshape(2, -1) @ hessian).reshape(v.shape),
                               atol=1e-10)  # fmt: skip


def test_normal_modes_through_ase(tmp_path: Path) -> None:
    """The frequencies of ASE's own finite differences."""
    atoms = molecule("H2O")
    atoms.calc = MLFFCalculator(spookynet())
    by_differences = Vibrations(atoms, name=str(tmp_path / "vib"), delta=1e-3, nfree=4)
    by_differences.run()
    analytic = atoms.calc.get_vibrations(atoms)
    np.testing.assert_allclose(analytic.get_energies() ** 2, by_differences.get_energies() ** 2, atol=1e-8)
    np.testing.assert_allclose(atoms.calc.get_hessian(atoms), analytic.get_hessian_2d(), atol=1e-12)


def test_bad_input() -> None:
    model, structure = spookynet(), Structure([8, 1, 1], molecule("H2O").positions)
    with pytest.raises(ValueError, match=r"directions: expected shape \(n_directions, 3, 3\), got \(3, 3\)"):
        model.hessian_products(structure, np.ones((3, 3)))
    with pytest.raises(ValueError, match="directions: expected finite numbers"):
        model.hessian_products(structure, np.full((1, 3, 3), np.nan))
