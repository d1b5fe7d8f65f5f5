"""structures -> labels: energies, forces, dipoles and charges from a published method.

A `ReferenceMethod` is a small picklable description; `label` computes one structure from scratch, so that
a label depends on nothing but its geometry, and `driver` gives the fast callable that molecular dynamics
runs (it reuses the last wavefunction). `TBLite` is GFN2-xTB and its relatives; `ASEReference` is any ASE
calculator. Energies are relative to free atoms in their ground states, computed by the same method.

Units: angstrom, eV, e. Free atoms are open shells, so their energies use spin polarisation where the
method has it; molecules use it when their multiplicity is larger than one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np

from openmm_mlff._plugins import near
from openmm_mlff.data.structures import SYMBOLS, Structure, check_charge_and_multiplicity
from openmm_mlff.units import ANGSTROM_PER_BOHR, EV_PER_HARTREE

#: Boltzmann constant in hartree/K, CODATA 2018 (tblite takes the electronic temperature in hartree).
HARTREE_PER_KELVIN = 3.1668115634556e-6

#: spin multiplicity 2S+1 of the free atoms' ground states, Z = 1 to 86 (NIST Atomic Spectra Database, ground levels),
#: one row per row of the periodic table. Cr, Cu, Nb, Mo, Ru, Rh, Pd and Ag are the usual exceptions.
GROUND_STATE_MULTIPLICITY: dict[int, int] = dict(
    enumerate(
        (
            *(2, 1),
            *(2, 1, 2, 3, 4, 3, 2, 1),
            *(2, 1, 2, 3, 4, 3, 2, 1),
            *(2, 1, 2, 3, 4, 7, 6, 5, 4, 3, 2, 1, 2, 3, 4, 3, 2, 1),
            *(2, 1, 2, 3, 6, 7, 6, 5, 4, 1, 2, 1, 2, 3, 4, 3, 2, 1),
            *(2, 1, 2, 1, 4, 5, 6, 7, 8, 9, 6, 5, 4, 3, 2, 1, 2),
            *(3, 4, 5, 6, 5, 4, 3, 2, 1, 2, 3, 4, 3, 2, 1),
        ),
        start=1,
    )
)

#: share of the new charges in each iteration: tblite's default, then what is tried in turn where it does not converge.
MIXING = (0.4, 0.15, 0.3, 0.1)

TBLITE_METHODS = ("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB")

#: energies (eV) and forces ``(n_atoms, 3)`` (eV/angstrom) at positions ``(n_atoms, 3)`` (angstrom).
Driver = Callable[[np.ndarray], tuple[float, np.ndarray]]


class LabelError(ValueError):
    """A structure for which the reference program has no answer (for example, no self-consistent solution)."""


class ReferenceMethod(Protocol):
    """What labels structures; picklable, so that it travels to worker processes."""

    def label(self, structure: Structure) -> Structure:
        """`structure` with energy, forces and, where the method has them, dipole and charges."""

    def driver(self, structure: Structure) -> Driver:
        """A fast callable for the atoms, charge and multiplicity of `structure` (absolute energies may be shifted)."""

    def atom_energy(self, number: int) -> float:
        """Energy of the free atom in eV, on the method's absolute scale."""

    def check(self) -> None:
        """Raise `ImportError` or `ValueError` if the program is missing or its name is wrong."""

    def describe(self) -> dict[str, Any]:
        """Method, program, versions and settings, JSON-like, for the data card."""


def free_atom_energy(method: ReferenceMethod, numbers: np.ndarray) -> float:
    """Sum of the free-atom energies of `numbers` in eV."""
    values, counts = np.unique(numbers, return_counts=True)
    return float(sum(method.atom_energy(int(z)) * int(c) for z, c in zip(values, counts, strict=True)))


def _require_tblite() -> Any:
    try:
        return importlib.import_module("tblite.interface")
    except ImportError as error:
        raise ImportError(
            f"GFN2-xTB labels need the package tblite ({error}); install it with: pip install 'openmm-mlff[label]'"
        ) from error


def _is_4f_in_core(numbers: np.ndarray) -> np.ndarray:
    """Cerium to lutetium."""
    return (numbers >= 58) & (numbers <= 71)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class TBLite:
    """Extended tight binding through tblite, by default GFN2-xTB.

    C. Bannwarth, S. Ehlert, S. Grimme, J. Chem. Theory Comput. 15, 1652 (2019). Spin polarisation of open
    shells: H. Neugebauer et al., J. Comput. Chem. 44, 2120 (2023) (`spin-polarization` with scale 1).
    The energy is the electronic free energy at `electronic_temperature`, to which the forces belong.

    Attributes:
        method: "GFN2-xTB", "GFN1-xTB" or "IPEA1-xTB".
        accuracy: tblite's factor on all thresholds (smaller is tighter); labels use this one.
        electronic_temperature: of the Fermi filling, kelvin.
        max_iterations: of the self-consistent cycle.
        solvent: of the implicit solvent ALPB (S. Ehlert, M. Stahn, S. Spicher, S. Grimme, J. Chem. Theory Comput. 17,
            4250 (2021)), for example "water"; None is vacuum. The energy then holds the free energy of solvation of
            the fixed geometry, from 1 mol/l of gas to 1 mol/l of solution; free atoms stay in vacuum.
    """

    method: str = "GFN2-xTB"
    accuracy: float = 0.1
    electronic_temperature: float = 300.0
    max_iterations: int = 250
    solvent: str | None = None

    def check(self) -> None:
        """Raise `ImportError` without tblite, `ValueError` for a method or a solvent that it does not have."""
        _require_tblite()
        if self.method not in TBLITE_METHODS:
            raise ValueError(f"method: {self.method!r} is not one of tblite's; {near(self.method, TBLITE_METHODS)}")
        if self.solvent is not None:
            self._calculator(Structure(np.array([2]), np.zeros((1, 3))), self.accuracy)

    def _calculator(self, structure: Structure, accuracy: float) -> Any:
        interface = _require_tblite()
        # the methods keep 4f electrons in the core: every lanthanide has lanthanum's three valence electrons
        valence = np.where(_is_4f_in_core(structure.numbers), 57, structure.numbers)
        check_charge_and_multiplicity(valence, structure.charge, structure.multiplicity)
        periodic: dict[str, Any] = {}
        if structure.cell is not None:
            periodic = {"lattice": structure.cell / ANGSTROM_PER_BOHR, "periodic": np.ones(3, dtype=bool)}
        try:
            calculator = interface.Calculator(
                self.method,
                structure.numbers,
                structure.positions / ANGSTROM_PER_BOHR,
                float(structure.charge),
                structure.multiplicity - 1,
                **periodic,
            )
        except RuntimeError as error:
            raise LabelError(f"{self.method} cannot do {structure.formula}: {error}") from error
        calculator.set("verbosity", 0)
        calculator.set("accuracy", accuracy)
        calculator.set("max-iter", self.max_iterations)
        calculator.set("temperature", self.electronic_temperature * HARTREE_PER_KELVIN)
        if structure.multiplicity > 1:
            calculator.add("spin-polarization", 1.0)
        if self.solvent is not None:
            if structure.cell is not None:
                raise LabelError(f"solvent: {self.solvent!r} is for open systems, got a box")
            try:
                calculator.add("alpb-solvation", self.solvent)
            except (RuntimeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"solvent: expected one that tblite has, for example 'water', got {self.solvent!r} ({error})"
                ) from error
        return calculator

    def _single_point(self, calculator: Any, previous: Any = None) -> Any:
        try:
            return calculator.singlepoint(previous)
        except RuntimeError as error:
            reason = error
        # the charges of ions far apart slosh; where any share converges, it is to the same solution
        try:
            for share in MIXING[1:]:
                calculator.set("mixer-damping", share)
                try:
                    return calculator.singlepoint()
                except RuntimeError as error:
                    reason = error
        finally:
            calculator.set("mixer-damping", MIXING[0])
        raise LabelError(f"{self.method} failed: {reason}") from reason

    def label(self, structure: Structure) -> Structure:
        """Energy relative to free atoms, forces, dipole (open systems; about the origin) and Mulliken charges.

        Raises `LabelError` if the self-consistent cycle fails, `ValueError` for a charge and multiplicity
        that no number of electrons can have, and `ImportError` without tblite.
        """
        result = self._single_point(self._calculator(structure, self.accuracy))
        energy = float(result.get("energy")) * EV_PER_HARTREE - free_atom_energy(self, structure.numbers)
        return structure.replace(
            energy=energy,
            forces=-result.get("gradient") * (EV_PER_HARTREE / ANGSTROM_PER_BOHR),
            dipole=result.get("dipole") * ANGSTROM_PER_BOHR if structure.cell is None else None,
            charges=result.get("charges"),
        )

    def driver(self, structure: Structure) -> Driver:
        """Energy relative to free atoms and forces, each call starting from the last wavefunction."""
        calculator = self._calculator(structure, 1.0)
        shift = free_atom_energy(self, structure.numbers)
        result: Any = None

        def energy_and_forces(positions: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal result
            calculator.update(positions / ANGSTROM_PER_BOHR)
            # starts anew where this fails: an old wavefunction can be a bad guess after a large move
            result = self._single_point(calculator, result)
            energy = float(result.get("energy")) * EV_PER_HARTREE - shift
            return energy, -result.get("gradient") * (EV_PER_HARTREE / ANGSTROM_PER_BOHR)

        return energy_and_forces

    def atom_energy(self, number: int) -> float:
        """Spin-polarised free atom in the multiplicity of its ground state, eV (lanthanides: doublet, 4f in the core).

        The multiplicity is the real atom's; for some transition metals the method itself puts another one lower.
        Raises `ValueError` for elements that the methods do not have (above radon).
        """
        return _tblite_atom_energy(self, number)

    def describe(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "program": f"tblite {_version('tblite')}",
            # a setting that came later and is not used is not named, so that folders begun before can go on
            "settings": {key: value for key, value in asdict(self).items() if key != "solvent" or value is not None},
            "open_shells": "spin-polarization 1.0 where the multiplicity is larger than 1",
            "energy_reference": "free atoms, ground-state multiplicity, spin-polarised, same method",
            "charges": "Mulliken",
        }


@functools.cache
def _tblite_atom_energy(method: TBLite, number: int) -> float:
    if number not in GROUND_STATE_MULTIPLICITY:
        raise ValueError(f"number: {method.method} has the elements 1 to 86, got {number}")
    multiplicity = 2 if _is_4f_in_core(np.array(number)) else GROUND_STATE_MULTIPLICITY[number]
    atom = Structure(np.array([number]), np.zeros((1, 3)), multiplicity=multiplicity)
    method = dataclasses.replace(method, solvent=None)
    result = method._single_point(method._calculator(atom, 0.01))
    return float(result.get("energy")) * EV_PER_HARTREE


@dataclass(frozen=True)
class ASEReference:
    """Any ASE calculator.

    Attributes:
        calculator: "module:Class", or a name known to `ase.calculators.calculator.get_calculator_class`.
        kwargs: keyword arguments of its constructor.
        charge_keyword, multiplicity_keyword: constructor keywords that take the total charge and 2S+1
            (for example "charge" and "multiplicity"); None if the calculator reads ``charge``, ``multiplicity`` or
            ``spin`` (= 2S+1) from ``atoms.info``, which are always set.
        atom_energies: free-atom energies in eV by symbol. None lets the calculator compute every free atom in
            its ground-state multiplicity; an empty mapping leaves energies on the calculator's own scale.
    """

    calculator: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    charge_keyword: str | None = None
    multiplicity_keyword: str | None = None
    atom_energies: Mapping[str, float] | None = None

    def check(self) -> None:
        """Raise `ValueError` if there is no such calculator."""
        _ase_calculator_class(self.calculator)

    def _atoms(self, structure: Structure) -> Any:
        from ase import Atoms

        calculator = _ase_calculator_class(self.calculator)
        kwargs = dict(self.kwargs)
        state = {"charge": structure.charge, "spin": structure.multiplicity, "multiplicity": structure.multiplicity}
        if self.charge_keyword is not None:
            kwargs[self.charge_keyword] = int(structure.charge)
        if self.multiplicity_keyword is not None:
            kwargs[self.multiplicity_keyword] = int(structure.multiplicity)
        try:
            made = calculator(**kwargs)
        except Exception as error:  # constructors raise whatever they like
            raise ValueError(f"kwargs: {self.calculator} does not take {kwargs} ({error})") from error
        return Atoms(
            numbers=structure.numbers,
            positions=structure.positions,
            cell=structure.cell,
            pbc=structure.cell is not None,
            info={name: int(value) for name, value in state.items()},
            calculator=made,
        )

    def label(self, structure: Structure) -> Structure:
        """Energy and forces; dipole and charges where the calculator implements them.

        Raises `LabelError` if the calculator fails, `ValueError` if no such calculator exists.
        """
        energy, forces, atoms = self._compute(structure)
        extra: dict[str, np.ndarray] = {}
        implemented = getattr(atoms.calc, "implemented_properties", [])
        if "dipole" in implemented and structure.cell is None:
            extra["dipole"] = np.asarray(atoms.get_dipole_moment())
        if "charges" in implemented:
            extra["charges"] = np.asarray(atoms.get_charges())
        return structure.replace(energy=energy - free_atom_energy(self, structure.numbers), forces=forces, **extra)

    def _compute(self, structure: Structure, atoms: Any = None) -> tuple[float, np.ndarray, Any]:
        atoms = self._atoms(structure) if atoms is None else atoms
        try:
            return float(atoms.get_potential_energy()), np.asarray(atoms.get_forces(), dtype=np.float64), atoms
        except Exception as error:  # calculators raise whatever their programs raise
            raise LabelError(f"{self.calculator} failed: {type(error).__name__}: {error}") from error

    def driver(self, structure: Structure) -> Driver:
        """Energy (on the calculator's own scale) and forces from one calculator object that stays alive."""
        atoms = self._atoms(structure)

        def energy_and_forces(positions: np.ndarray) -> tuple[float, np.ndarray]:
            atoms.positions[:] = positions
            energy, forces, _ = self._compute(structure, atoms)
            return energy, forces

        return energy_and_forces

    def atom_energy(self, number: int) -> float:
        """Free atom, eV: from `atom_energies`, or computed. Raises `ValueError` if `atom_energies` lacks it."""
        if self.atom_energies is None:
            key = (self.calculator, repr(sorted(self.kwargs.items())), number)
            if key not in _ASE_ATOMS:
                atom = Structure(np.array([number]), np.zeros((1, 3)), multiplicity=GROUND_STATE_MULTIPLICITY[number])
                _ASE_ATOMS[key] = self._compute(atom)[0]
            return _ASE_ATOMS[key]
        if not self.atom_energies:
            return 0.0
        symbol = SYMBOLS[number]
        if symbol not in self.atom_energies:
            raise ValueError(f"atom_energies: expected an energy (eV) for {symbol}, got {sorted(self.atom_energies)}")
        return float(self.atom_energies[symbol])

    def describe(self) -> dict[str, Any]:
        own_scale = self.atom_energies is not None and not self.atom_energies
        return {
            "method": self.calculator,
            "program": f"ase {_version('ase')}",
            "settings": {
                "kwargs": dict(self.kwargs),
                "charge_keyword": self.charge_keyword,
                "multiplicity_keyword": self.multiplicity_keyword,
            },
            "energy_reference": "the calculator's own scale" if own_scale else "free atoms",
        }


_ASE_ATOMS: dict[tuple[str, str, int], float] = {}


@functools.cache
def _ase_calculator_class(name: str) -> Any:
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"calculator: expected 'module:Class' that can be imported, got {name!r} ({error})"
            ) from error
    from ase.calculators.calculator import get_calculator_class

    try:
        return get_calculator_class(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"calculator: expected 'module:Class' or a name that ASE knows, got {name!r} ({error})"
        ) from error


def method_from_table(table: Mapping[str, Any]) -> ReferenceMethod:
    """`ASEReference` if the table names a ``calculator``, else `TBLite`; the other keys are their fields.

    Raises `ValueError` for a key that is no field, naming the near ones.
    """
    kind: type[TBLite | ASEReference] = ASEReference if "calculator" in table else TBLite
    known = [f.name for f in fields(kind)]
    for key in table:
        if key not in known:
            raise ValueError(f"method: {kind.__name__} has no setting {key!r}; {near(key, known)}")
    return kind(**table)
