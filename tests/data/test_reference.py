"""Labels against tblite called directly, finite differences, finite fields and closed formulas."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

from openmm_mlff.data.reference import (
    GROUND_STATE_MULTIPLICITY,
    ASEReference,
    LabelError,
    TBLite,
    free_atom_energy,
    method_from_table,
)
from openmm_mlff.data.structures import Structure, check_charge_and_multiplicity

# not taken from openmm_mlff.units on purpose: CODATA 2018, NIST
HARTREE = 27.211386245988
BOHR = 0.529177210903
HARTREE_IN_KCAL = 627.5094740631

tblite = pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")

METHANOL = Structure(
    np.array([6, 8, 1, 1, 1, 1]),
    np.array(
        [
            [-0.05, 0.67, 0.02],
            [0.00, -0.76, -0.03],
            [-1.05, 1.05, 0.00],
            [0.49, 1.02, 0.88],
            [0.45, 1.06, -0.93],
            [-0.90, -1.08, 0.10],
        ]
    ),
)


def direct_energy(structure: Structure, positions: np.ndarray, spin: bool = False, solvent: str | None = None) -> float:
    """Total energy (eV) from tblite itself, tightly converged."""
    calculator = tblite.Calculator(
        "GFN2-xTB", structure.numbers, positions / BOHR, structure.charge, structure.multiplicity - 1
    )
    calculator.set("verbosity", 0)
    calculator.set("accuracy", 0.001)
    if spin:
        calculator.add("spin-polarization", 1.0)
    if solvent is not None:
        calculator.add("alpb-solvation", solvent)
    return float(calculator.singlepoint().get("energy")) * HARTREE


@pytest.mark.parametrize(
    ("structure", "spin", "solvent"),
    [
        (METHANOL, False, None),
        (METHANOL.replace(charge=1, multiplicity=2), True, None),
        (Structure(METHANOL.numbers[[0, 1, 2, 3, 4]], METHANOL.positions[[0, 1, 2, 3, 4]], charge=-1), False, None),
        (METHANOL, False, "water"),
    ],
    ids=["methanol", "radical cation", "methoxide", "in water"],
)
def test_energy_and_forces_agree_with_tblite(structure: Structure, spin: bool, solvent: str | None) -> None:
    label = TBLite(solvent=solvent).label(structure)
    assert label.forces is not None
    atoms = sum(
        direct_energy(Structure([z], np.zeros((1, 3)), multiplicity=m), np.zeros((1, 3)), spin=True)
        for z, m in zip(structure.numbers, [{1: 2, 6: 3, 8: 3}[int(z)] for z in structure.numbers], strict=True)
    )
    assert label.energy == pytest.approx(direct_energy(structure, structure.positions, spin, solvent) - atoms, abs=2e-6)
    for atom, axis in ((0, 1), (1, 0), (4, 2)):
        step = np.zeros_like(structure.positions)
        step[atom, axis] = 2e-3
        numeric = (
            direct_energy(structure, structure.positions - step, spin, solvent)
            - direct_energy(structure, structure.positions + step, spin, solvent)
        ) / 4e-3
        assert label.forces[atom, axis] == pytest.approx(numeric, abs=2e-4)


def test_dipole_is_the_response_to_an_electric_field() -> None:
    from tblite.library import ffi

    def energy(field: np.ndarray) -> float:
        calculator = tblite.Calculator("GFN2-xTB", METHANOL.numbers, METHANOL.positions / BOHR)
        calculator.set("verbosity", 0)
        calculator.set("accuracy", 0.001)
        calculator.add("electric-field", ffi.new("double[3]", field.tolist()))
        return float(calculator.singlepoint().get("energy"))

    step = 1e-3
    numeric = [-(energy(step * e) - energy(-step * e)) / (2 * step) for e in np.eye(3)]
    np.testing.assert_allclose(TBLite().label(METHANOL).dipole, np.array(numeric) * BOHR, atol=1e-4)


@pytest.mark.parametrize(
    ("smiles", "expected"),
    # measured hydration free energies of FreeSolv, kcal/mol
    [("CCO", -5.0), ("CC(=O)N", -9.71), ("c1ccccc1", -0.9)],
    ids=["ethanol", "acetamide", "benzene"],
)
def test_implicit_water_has_the_right_size(smiles: str, expected: float) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    from openmm_mlff.data.molecules import embed_smiles

    (structure,) = embed_smiles(smiles, 1, 1)
    vacuum, water = TBLite().label(structure), TBLite(solvent="water").label(structure)
    assert vacuum.energy is not None
    assert water.energy is not None
    # a rigid molecule, and a method that was fitted to such numbers: within 1.5 kcal/mol
    assert (water.energy - vacuum.energy) * HARTREE_IN_KCAL / HARTREE == pytest.approx(expected, abs=1.5)
    assert vacuum.charges is not None
    assert water.charges is not None
    # the molecule is polarised by the water that it polarises
    assert np.abs(water.charges).sum() > np.abs(vacuum.charges).sum()


def test_solvents_that_cannot_be_are_refused() -> None:
    for solvent in ("wine", "", 3):
        with pytest.raises(ValueError, match=rf"^solvent: expected one that tblite has, .* got {solvent!r}"):
            TBLite(solvent=solvent).check()  # type: ignore[arg-type]
    TBLite(solvent="water").check()
    box = METHANOL.replace(cell=np.eye(3) * 20)
    for method in (TBLite(solvent="water").label, TBLite(solvent="water").driver):
        with pytest.raises(LabelError, match="solvent: 'water' is for open systems, got a box"):
            method(box)


def test_the_solvent_is_described_where_there_is_one() -> None:
    assert TBLite(solvent="water").describe()["settings"]["solvent"] == "water"
    # folders that were begun before there were solvents compare with this
    settings = {"method": "GFN2-xTB", "accuracy": 0.1, "electronic_temperature": 300.0, "max_iterations": 250}
    assert TBLite().describe()["settings"] == settings
    assert method_from_table({"solvent": "water"}) == TBLite(solvent="water")


def test_free_atoms_are_in_vacuum() -> None:
    for number in (1, 8):
        assert TBLite(solvent="water").atom_energy(number) == TBLite().atom_energy(number)


def test_charges_add_up_to_the_total_charge() -> None:
    for structure in (METHANOL, METHANOL.replace(charge=1, multiplicity=2)):
        charges = TBLite().label(structure).charges
        assert charges is not None
        assert charges.sum() == pytest.approx(structure.charge, abs=1e-6)


@pytest.mark.parametrize("number", [1, 6, 7, 8, 9, 15, 16, 17, 26, 35, 64])
def test_free_atoms_have_no_energy(number: int) -> None:
    multiplicity = 2 if number == 64 else GROUND_STATE_MULTIPLICITY[number]
    atom = Structure(np.array([number]), np.zeros((1, 3)), multiplicity=multiplicity)
    assert TBLite().label(atom).energy == pytest.approx(0.0, abs=1e-4)


def test_ground_state_multiplicities_are_possible_and_cover_the_method() -> None:
    assert sorted(GROUND_STATE_MULTIPLICITY) == list(range(1, 87))
    for number, multiplicity in GROUND_STATE_MULTIPLICITY.items():
        check_charge_and_multiplicity([number], 0, multiplicity)


def test_spin_polarisation_puts_triplet_oxygen_below_singlet() -> None:
    oxygen = Structure(np.array([8, 8]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.21]]))
    singlet, triplet = (TBLite().label(oxygen.replace(multiplicity=m)).energy for m in (1, 3))
    assert singlet is not None
    assert triplet is not None
    # without spin polarisation GFN2-xTB puts the singlet 0.07 eV below the triplet
    assert singlet - triplet > 0.5


def test_periodic_label_does_not_depend_on_wrapping() -> None:
    cell = np.array([[6.0, 0, 0], [1.0, 6.5, 0], [0, 0.5, 7.0]])
    box = METHANOL.replace(cell=cell)
    moved = box.replace(positions=box.positions + np.outer([1, 0, -1, 0, 0, 2], cell[0]) + cell[1])
    one, other = TBLite().label(box), TBLite().label(moved)
    assert one.dipole is None
    assert one.energy == pytest.approx(other.energy, abs=1e-6)
    np.testing.assert_allclose(one.forces, other.forces, atol=1e-5)
    assert abs(one.energy - TBLite().label(METHANOL).energy) > 1e-3


@pytest.mark.parametrize("solvent", [None, "water"])
def test_driver_follows_a_moving_molecule(solvent: str | None) -> None:
    drive = TBLite(solvent=solvent).driver(METHANOL)
    rng = np.random.default_rng(4)
    positions = METHANOL.positions
    for _ in range(3):
        positions = positions + 0.02 * rng.normal(size=positions.shape)
        energy, forces = drive(positions)
        label = TBLite(solvent=solvent).label(METHANOL.replace(positions=positions))
        assert energy == pytest.approx(label.energy, abs=1e-5)
        np.testing.assert_allclose(forces, label.forces, atol=2e-3)


def test_ase_calculator_gives_the_same_labels_as_tblite_itself() -> None:
    ase_method = ASEReference(
        "tblite.ase:TBLite",
        {"method": "GFN2-xTB", "verbosity": 0, "accuracy": 0.1, "spin_polarization": 1.0},
        charge_keyword="charge",
        multiplicity_keyword="multiplicity",
    )
    for structure in (METHANOL, METHANOL.replace(charge=1, multiplicity=2)):
        ours, theirs = TBLite().label(structure), ase_method.label(structure)
        # ASE's own constants are CODATA 2014: relative differences of 1e-8
        assert theirs.energy == pytest.approx(ours.energy, abs=2e-5)
        for name in ("forces", "dipole", "charges"):
            np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), atol=1e-4)


def test_ase_calculator_by_name_and_on_its_own_scale() -> None:
    method = ASEReference("lj", {"sigma": 3.4, "epsilon": 0.0104, "rc": 1e4}, atom_energies={})
    dimer = Structure(np.array([18, 18]), np.array([[0.0, 0, 0], [0, 0, 4.1]]))
    label = method.label(dimer)
    x = (3.4 / 4.1) ** 6
    assert label.energy == pytest.approx(4 * 0.0104 * (x * x - x), rel=1e-9)
    assert label.forces is not None
    assert label.forces[1, 2] == pytest.approx(24 * 0.0104 * (2 * x * x - x) / 4.1, rel=1e-9)
    assert label.dipole is None


def test_given_atom_energies_are_subtracted() -> None:
    method = ASEReference("lj", {"rc": 1e4}, atom_energies={"Ar": -1.5})
    assert free_atom_energy(method, np.array([18, 18, 18])) == pytest.approx(-4.5)
    with pytest.raises(ValueError, match=r"atom_energies: .* for Kr"):
        free_atom_energy(method, np.array([36]))


def test_methods_travel_to_other_processes() -> None:
    for method in (TBLite(accuracy=0.2), ASEReference("lj", {"rc": 5.0})):
        assert pickle.loads(pickle.dumps(method)) == method


def test_failures_are_named() -> None:
    with pytest.raises(LabelError, match="GFN2-xTB failed"):
        TBLite(max_iterations=1).label(METHANOL)
    with pytest.raises(ValueError, match=r"multiplicity: CH4O with charge \+0 has 18 electrons"):
        TBLite().label(METHANOL.replace(multiplicity=2))
    with pytest.raises(LabelError, match="emt failed: NotImplementedError"):
        ASEReference("emt", atom_energies={}).label(METHANOL.replace(numbers=np.array([6, 92, 1, 1, 1, 1])))
    with pytest.raises(ValueError, match=r"kwargs: lj does not take \{'rc': 'wide'\}"):
        ASEReference("lj", {"rc": "wide"}).label(METHANOL)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": "GFN2-xTB", "accurracy": 1.0}, "did you mean 'accuracy'"),
        ({"calculator": "lj", "method": "GFN2-xTB"}, "ASEReference has no setting 'method'"),
    ],
)
def test_unknown_settings_are_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_from_table(table)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'GFN2-xTB'"):
        TBLite("GFN2").check()
    with pytest.raises(ValueError, match=r"'no\.such\.module:Thing'"):
        ASEReference("no.such.module:Thing").check()
    with pytest.raises(ValueError, match="'nosuchcalculator'"):
        ASEReference("nosuchcalculator").check()


def test_missing_tblite_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tblite.interface", None)
    with pytest.raises(ImportError, match=r"pip install 'openmm-mlff\[label\]'"):
        TBLite().check()


def test_ions_far_apart_converge_to_the_energy_between_their_neighbours() -> None:
    ammonium = 0.6 * np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
    formate = np.array([[0.0, 0.0, 0.0], [0.6, 1.1, 0.0], [0.6, -1.1, 0.0], [-1.13, 0.0, 0.0]])
    method = TBLite()

    def pair(distance: float) -> Structure:
        return Structure([7, 1, 1, 1, 1, 6, 8, 8, 1], np.concatenate([ammonium, formate - [distance, 0.0, 0.0]]))

    # with tblite's own mixing these two do not converge in any number of cycles
    with pytest.raises(RuntimeError, match="not converged"):
        method._calculator(pair(9.75), 0.1).singlepoint()
    around = np.array([9.0, 9.25, 10.25, 10.5])
    curve = np.polynomial.Polynomial.fit(around, [method.label(pair(d)).energy for d in around], 3)
    for distance in (9.75, 10.0):
        made = method.label(pair(distance))
        assert made.energy == pytest.approx(curve(distance), abs=1e-3)
        assert made.forces[5:, 0].sum() == pytest.approx(curve.deriv()(distance), abs=2e-3)
