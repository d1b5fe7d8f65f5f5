"""The ASE calculator: the potential's own numbers, and no stale ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.ase_calculator import MLFFCalculator
from openmm_spookynet import SpookyNet

from .conftest import small_spookynet


@pytest.fixture()
def water() -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=1)
    return atoms


def reference(model: SpookyNet, atoms: Atoms, charge: int = 0, multiplicity: int = 1) -> tuple[float, np.ndarray]:
    return model.energy_and_forces(Structure(atoms.numbers, atoms.positions, charge, multiplicity))


def test_energy_and_forces(model: SpookyNet, model_path: Path, water: Atoms) -> None:
    energy, forces = reference(model, water)
    for potential in (model, model_path, str(model_path)):
        water.calc = MLFFCalculator(potential)
        assert water.get_potential_energy() == pytest.approx(energy, abs=1e-10)
        np.testing.assert_allclose(water.get_forces(), forces, atol=1e-10)
    np.testing.assert_allclose(calculate_numerical_forces(water, 1e-5), forces, atol=1e-6)


def test_charges_and_dipole(model: SpookyNet, water: Atoms) -> None:
    water.info.update(charge=-1, multiplicity=2)
    water.calc = MLFFCalculator(model)
    charges = water.get_charges()
    assert charges.sum() == pytest.approx(-1.0, abs=1e-9)
    np.testing.assert_allclose(water.get_dipole_moment(), charges @ water.positions, atol=1e-9)


def test_follows_moving_atoms(model: SpookyNet, water: Atoms) -> None:
    water.calc = MLFFCalculator(model)
    first = water.get_potential_energy()
    water.positions[1] += [0.1, 0.0, 0.05]
    assert water.get_potential_energy() == pytest.approx(reference(model, water)[0], abs=1e-10)
    assert water.get_potential_energy() != first


def test_notices_charge_and_multiplicity(model: SpookyNet, water: Atoms) -> None:
    energies = {(q, m): reference(model, water, q, m)[0] for q, m in [(0, 1), (0, 3), (1, 2), (-1, 2)]}
    water.calc = MLFFCalculator(model)
    for (charge, multiplicity), energy in energies.items():
        water.info.update(charge=charge, multiplicity=multiplicity)
        assert water.get_potential_energy() == pytest.approx(energy, abs=1e-10)
    water.info.clear()
    for (charge, multiplicity), energy in energies.items():
        water.calc.set(charge=charge, multiplicity=multiplicity)
        assert water.get_potential_energy() == pytest.approx(energy, abs=1e-10)
    water.calc = MLFFCalculator(model, charge=1, multiplicity=2)
    assert water.get_potential_energy() == pytest.approx(energies[1, 2], abs=1e-10)


def test_unchanged_atoms_are_not_calculated_again(
    model: SpookyNet, water: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = SpookyNet.predict
    monkeypatch.setattr(SpookyNet, "predict", lambda *a: calls.append(1) or original(*a))
    water.calc = MLFFCalculator(model)
    for _ in range(3):
        water.get_potential_energy()
        water.get_forces()
    assert len(calls) == 1


def test_other_atoms(model: SpookyNet, water: Atoms) -> None:
    calculator = MLFFCalculator(model)
    for atoms in (water, molecule("CH4"), water, water[[1, 0, 2]]):
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(reference(model, atoms)[0], abs=1e-10)


def test_precision_leaves_the_model_as_it_is(model: SpookyNet, water: Atoms) -> None:
    water.calc = MLFFCalculator(model, precision="single")
    assert water.calc.potential.dtype == torch.float32
    assert model.dtype == torch.float64
    energy, forces = reference(model, water)
    assert water.get_potential_energy() == pytest.approx(energy, abs=1e-4)
    assert water.get_potential_energy() != energy
    assert water.get_forces().dtype == np.float64
    np.testing.assert_allclose(water.get_forces(), forces, atol=1e-3)


def test_periodic_cells(water: Atoms) -> None:
    model = small_spookynet()
    water.set_cell([[9, 0, 0], [2, 8, 0], [1, -1, 9]])
    water.pbc = True
    water.calc = MLFFCalculator(model, long_range_cutoff=8.0)
    assert model.long_range_cutoff is None
    periodic = small_spookynet()
    periodic.long_range_cutoff = 8.0
    expected, _ = periodic.energy_and_forces(Structure(water.numbers, water.positions, cell=water.cell.array))
    assert water.get_potential_energy() == pytest.approx(expected, abs=1e-9)
    water.set_cell(water.cell.array * 1.05)
    larger, _ = periodic.energy_and_forces(Structure(water.numbers, water.positions, cell=water.cell.array))
    assert water.get_potential_energy() == pytest.approx(larger, abs=1e-9)
    assert larger != pytest.approx(expected, abs=1e-6)
    with pytest.raises(PropertyNotImplementedError, match="dipole: a periodic system has none"):
        water.get_dipole_moment()
    water.pbc = False
    free, _ = periodic.energy_and_forces(Structure(water.numbers, water.positions))
    assert water.get_potential_energy() == pytest.approx(free, abs=1e-9)


def test_wrong_input(model: SpookyNet, water: Atoms) -> None:
    def energy(atoms: Atoms, **options: Any) -> None:
        atoms.calc = MLFFCalculator(model, **options)
        atoms.get_potential_energy()

    for pbc in ([True, True, False], [False, False, True]):
        slab = water.copy()
        slab.set_cell([9, 9, 9])
        slab.pbc = pbc
        with pytest.raises(ValueError, match="pbc: expected periodic in all three directions or in none"):
            energy(slab)
    box = water.copy()
    box.set_cell([9, 9, 9])
    box.pbc = True
    with pytest.raises(ValueError, match=r"long_range_cutoff: .*10.0 \(angstrom\), got None"):
        energy(box)
    with pytest.raises(ValueError, match="multiplicity: H2O with charge"):
        energy(water, multiplicity=2)
    water.info["charge"] = 1
    with pytest.raises(ValueError, match=r"charge: the calculator was given 0, but atoms.info has 1"):
        energy(water, charge=0)
    with pytest.raises(ValueError, match="precision: expected 'single', 'double' or None, got 'half'"):
        MLFFCalculator(model, precision="half")
    with pytest.raises(ValueError, match="long_range_cutoff: expected a positive length"):
        MLFFCalculator(model, long_range_cutoff=-1.0)
    with pytest.raises(TypeError, match="potential: expected a Potential or the path"):
        MLFFCalculator(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="no file at"):
        MLFFCalculator("none.safetensors")
    carbon = MLFFCalculator(small_spookynet(elements=(1, 6)))
    water.info.clear()
    water.calc = carbon
    with pytest.raises(ValueError, match=r"elements: expected atoms among H C .*got O"):
        water.get_potential_energy()
