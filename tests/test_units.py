"""Conversion factors against the SI definitions and against OpenMM's own units."""

from __future__ import annotations

import ase.units
import openmm.unit as omm
import pytest

from openmm_mlff import units


def test_factors_follow_from_the_exact_constants() -> None:
    # BIPM 2019: e = 1.602176634e-19 C, N_A = 6.02214076e23 1/mol, k = 1.380649e-23 J/K
    assert pytest.approx(96.48533212331001, rel=1e-15) == units.KJ_PER_MOL_PER_EV
    assert pytest.approx(8.617333262145179e-05, rel=1e-15) == units.BOLTZMANN_EV
    assert pytest.approx(0.00831446261815324, rel=1e-15) == units.BOLTZMANN_KJ_PER_MOL
    assert pytest.approx(0.0433641, rel=1e-6) == units.EV_PER_KCAL_PER_MOL
    # CODATA 2018: e^2/(4 pi eps0) = 1.43996454784... eV nm
    assert pytest.approx(14.3996454784, rel=1e-10) == units.COULOMB_EV_ANGSTROM


def test_lengths_and_forces_fit_together() -> None:
    assert units.NM_PER_ANGSTROM * units.ANGSTROM_PER_NM == 1.0
    # 1 eV/angstrom = 96.485 kJ/mol per 0.1 nm
    assert units.KJ_PER_MOL_NM_PER_EV_ANGSTROM == units.KJ_PER_MOL_PER_EV / units.NM_PER_ANGSTROM


def test_openmm_agrees_to_its_precision() -> None:
    joule = (1.0 * omm.elementary_charge * omm.volt).value_in_unit(omm.joule)
    per_mole = joule * omm.AVOGADRO_CONSTANT_NA.value_in_unit(omm.mole**-1) / 1000.0
    assert pytest.approx(per_mole, rel=1e-6) == units.KJ_PER_MOL_PER_EV
    gas = omm.MOLAR_GAS_CONSTANT_R.value_in_unit(omm.kilojoule_per_mole / omm.kelvin)
    assert pytest.approx(gas, rel=1e-6) == units.BOLTZMANN_KJ_PER_MOL


def test_ase_agrees() -> None:
    # ASE uses CODATA 2014, older than the exact constants
    assert pytest.approx(1.0 / (ase.units.kJ / ase.units.mol), rel=1e-7) == units.KJ_PER_MOL_PER_EV
    assert pytest.approx(ase.units.Bohr, rel=1e-8) == units.ANGSTROM_PER_BOHR
    assert pytest.approx(ase.units.Hartree, rel=1e-7) == units.EV_PER_HARTREE
