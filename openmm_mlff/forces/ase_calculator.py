"""An ASE calculator over any potential: energies in eV, forces in eV/angstrom, charges in e, dipoles in e*angstrom."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.vibrations import VibrationsData

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces.arguments import check_compile, check_long_range_method
from openmm_mlff.forces.force_spec import PRECISIONS
from openmm_mlff.forces.loading import choose_device
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential

ELECTRONS = ("charge", "multiplicity")


class MLFFCalculator(Calculator):
    """Energy, forces, charges and dipole of a potential for ASE.

    Charge and multiplicity (2S+1) are those given here, else ``atoms.info['charge']`` and
    ``atoms.info['multiplicity']``, else 0 and 1; a change of either is noticed. Cells are periodic in all three
    directions or in none.

    Args:
        potential: a `Potential`, or the path of a model file.
        precision: 'single', 'double', or None for that of the model.
        device: torch's name; None takes CUDA where there is one (for a `Potential`: where it is).
        long_range_cutoff: angstrom, of the model's 1/r terms; periodic systems need one.
        long_range_method: of the charges of periodic systems: 'shifted', 'ewald' or 'pme'; None for the model's own.
        compile: as for `Potential.evaluator`.

    Raises `ValueError` or `TypeError` naming the argument, here and when the calculator is asked.
    """

    implemented_properties = ["energy", "free_energy", "forces", "charges", "dipole"]  # noqa: RUF012
    default_parameters = {"charge": None, "multiplicity": None}  # noqa: RUF012
    nolabel = True

    def __init__(
        self,
        potential: Potential | str | Path,
        charge: int | None = None,
        multiplicity: int | None = None,
        precision: str | None = None,
        device: str | None = None,
        long_range_cutoff: float | None = None,
        long_range_method: str | None = None,
        compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision: expected 'single', 'double' or None, got {precision!r}")
        model = _load(potential, precision, device, long_range_cutoff, long_range_method)
        self.potential = model
        self._compile = check_compile(compile)
        self._evaluator: Any = None
        self._evaluated: tuple[Any, ...] | None = None
        if not model.predicts_charges:
            self.implemented_properties = ["energy", "free_energy", "forces"]
        super().__init__(charge=charge, multiplicity=multiplicity, **kwargs)

    def electrons(self, atoms: Atoms) -> tuple[int, int]:
        """Charge and multiplicity that hold for `atoms`; `ValueError` if they are given twice and differently."""
        found = []
        for name, default in zip(ELECTRONS, (0, 1), strict=True):
            given = [value for value in (self.parameters[name], atoms.info.get(name)) if value is not None]
            if len(given) == 2 and given[0] != given[1]:
                raise ValueError(f"{name}: the calculator was given {given[0]}, but atoms.info has {given[1]}")
            found.append(int(given[0]) if given else default)
        return found[0], found[1]

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation; charge and multiplicity count as 'initial_charges'."""
        changes = super().check_state(atoms, tol=tol)
        if self.atoms is not None and self._evaluated is not None and self._evaluated[1:3] != self.electrons(atoms):
            changes.append("initial_charges")
        return changes

    def calculate(
        self, atoms: Atoms | None = None, properties: Sequence[str] = ("energy",), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise ValueError("atoms: expected an Atoms object, got None")
        structure = self._structure(self.atoms)
        if "dipole" in properties and structure.cell is not None:
            raise PropertyNotImplementedError("dipole: a periodic system has none, expected pbc=False")
        key = (structure.numbers.tobytes(), structure.charge, structure.multiplicity, structure.cell is None)
        if key != self._evaluated:
            outputs = ["energy", "forces"] + (["charges", "dipole"] if self.potential.predicts_charges else [])
            self._evaluator = self.potential.evaluator(structure, outputs, self._compile)
            self._evaluated = key
        result = self._evaluator(structure.positions, structure.cell)
        energy = float(result.energy[0])
        self.results = {"energy": energy, "free_energy": energy, "forces": _array(result.forces)}
        if result.charges is not None:
            self.results["charges"] = _array(result.charges)
        if result.dipole is not None and structure.cell is None:
            self.results["dipole"] = _array(result.dipole[0])

    def get_hessian(self, atoms: Atoms) -> np.ndarray:
        """Analytic second derivatives of the energy, ``(3 n_atoms, 3 n_atoms)`` eV/angstrom^2, x, y, z of atom 0 first.

        Charge and multiplicity hold as for energies. Constraints of `atoms` are not applied.
        """
        return self.potential.hessian(self._structure(atoms))

    def get_vibrations(self, atoms: Atoms) -> VibrationsData:
        """Normal modes and frequencies of `atoms`, which should be at a minimum, from the analytic Hessian.

        The masses are those of `atoms`; its frequencies (``get_frequencies()``, 1/cm) include the six of motions of the
        whole molecule, near zero.
        """
        free = atoms.copy()
        free.set_constraint()
        return VibrationsData.from_2d(free, self.get_hessian(atoms))

    def _structure(self, atoms: Atoms) -> Structure:
        if atoms.pbc.any() and not atoms.pbc.all():
            raise ValueError(f"pbc: expected periodic in all three directions or in none, got {atoms.pbc.tolist()}")
        charge, multiplicity = self.electrons(atoms)
        self.potential.check_electrons(atoms.numbers, charge, multiplicity)
        cell = atoms.cell.array if atoms.pbc.all() else None
        structure = Structure(atoms.numbers, atoms.positions, charge, multiplicity, cell)
        self.potential.check(structure)
        region = "open" if cell is None else "periodic"
        check_long_range_method(self.potential.long_range_method, self.potential, region, charge, "long_range_method")
        if cell is not None and self.potential.long_range and self.potential.long_range_cutoff is None:
            raise ValueError(
                "long_range_cutoff: a periodic system needs one, expected a length such as 10.0 (angstrom), got None"
            )
        return structure


def _load(
    potential: Any,
    precision: str | None,
    device: str | None,
    long_range_cutoff: float | None,
    long_range_method: str | None,
) -> Potential:
    if isinstance(potential, (str, Path)):
        model = load_potential(potential).to(choose_device(device))
    elif isinstance(potential, Potential):
        # the caller's model stays as it is
        changed = any(x is not None for x in (precision, device, long_range_cutoff, long_range_method))
        model = copy.deepcopy(potential) if changed else potential
        model = model if device is None else model.to(device)
    else:
        raise TypeError(f"potential: expected a Potential or the path of a model file, got {type(potential).__name__}")
    if precision is not None:
        model = model.to(PRECISIONS[precision])
    if long_range_cutoff is not None:
        if not long_range_cutoff > 0:
            raise ValueError(f"long_range_cutoff: expected a positive length (angstrom), got {long_range_cutoff}")
        model.long_range_cutoff = float(long_range_cutoff)
    if long_range_method is not None:
        check_long_range_method(long_range_method, model, "periodic", 0, "long_range_method")
        model.long_range_method = long_range_method
    return model


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy().astype(np.float64)
