"""Molecules of the benchmark of SpookyNets for biomolecules: what they are, and their geometries by GFN2-xTB."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from openmm_mlff.data.molecules import embed_smiles
from openmm_mlff.data.reference import GROUND_STATE_MULTIPLICITY, LabelError, TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.units import EV_PER_HARTREE

GFN2 = TBLite()


@dataclass(frozen=True)
class Splitting:
    """A molecule with a singlet and a triplet.

    Attributes:
        ground: multiplicity of the ground state by experiment (textbook knowledge; None where there is no single
            answer).
    """

    name: str
    smiles: str
    ground: int | None


#: ground states: CH2 and nitrenes by electron spin resonance, halocarbenes by spectroscopy; the rest
#: are closed-shell molecules, and O2, NH, SO with their triplet ground states
SPLITTINGS = (
    Splitting("CH2", "[CH2]", 3),
    Splitting("CHF", "[CH]F", 1),
    Splitting("CF2", "F[C]F", 1),
    Splitting("CHCl", "[CH]Cl", 1),
    Splitting("CCl2", "Cl[C]Cl", 1),
    Splitting("imidazol-2-ylidene", "C1=CN[C]N1", 1),
    Splitting("O2", "O=O", 3),
    Splitting("NH", "[NH]", 3),
    Splitting("methylnitrene", "C[N]", 3),
    Splitting("phenylnitrene", "c1ccccc1[N]", 3),
    Splitting("formaldehyde", "C=O", 1),
    Splitting("acetone", "CC(=O)C", 1),
    Splitting("ethylene", "C=C", 1),
    Splitting("butadiene", "C=CC=C", 1),
    Splitting("benzene", "c1ccccc1", 1),
    Splitting("formamide", "NC=O", 1),
)


@functools.cache
def optimised(smiles: str, charge: int, multiplicity: int, steps: int = 300) -> Structure:
    """A GFN2-xTB minimum (near rdkit's geometry), energy and forces included; `LabelError` if none is found."""
    start = _start(smiles).replace(charge=charge, multiplicity=multiplicity)
    for seed in (3, 4, 5, 6):
        # off the symmetric geometries that rdkit gives what it does not know, such as linear carbenes
        shift = np.random.default_rng(seed).normal(0.0, 0.08, start.positions.shape)
        try:
            return _minimised(start.replace(positions=start.positions + shift), steps)
        except LabelError as error:
            failure = error
    raise failure


def _minimised(start: Structure, steps: int) -> Structure:
    driver = GFN2.driver(start)

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        energy, forces = driver(x.reshape(-1, 3))
        return energy, -forces.ravel()

    found = minimize(function, start.positions.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return GFN2.label(start.replace(positions=found.x.reshape(-1, 3)))


def _start(smiles: str) -> Structure:
    fixed = {"[NH]": (np.array([7, 1]), 1.04), "O=O": (np.array([8, 8]), 1.21)}
    if smiles in fixed:
        numbers, length = fixed[smiles]
        return Structure(numbers, np.array([[0.0, 0.0, 0.0], [length, 0.0, 0.0]]))
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(smiles)
    radicals = sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms())
    multiplicity = 3 if radicals % 2 == 0 and radicals else 1 + radicals % 2
    return embed_smiles(smiles, seed=7, multiplicity=multiplicity)[0]


def bent(numbers: tuple[int, int, int], lengths: tuple[float, float], angle: float, multiplicity: int) -> Structure:
    """A molecule of three atoms, the central one first; angle in degrees."""
    theta = np.radians(angle)
    positions = np.array(
        [[0.0, 0.0, 0.0], [lengths[0], 0.0, 0.0], [lengths[1] * np.cos(theta), lengths[1] * np.sin(theta), 0.0]]
    )
    return Structure(np.array(numbers), positions, multiplicity=multiplicity)


#: name -> atoms and bond lengths (angstrom; between those of singlet and triplet)
CARBENES = {
    "CH2": ((6, 1, 1), (1.09, 1.09)),
    "CHF": ((6, 1, 9), (1.11, 1.31)),
    "CF2": ((6, 9, 9), (1.31, 1.31)),
    "CCl2": ((6, 17, 17), (1.70, 1.70)),
}

#: what far waters are put around: name -> SMILES and charge
SOLUTES = {
    "capped alanine": ("CC(=O)N[C@@H](C)C(=O)NC", 0),
    "capped alanylalanine": ("CC(=O)N[C@@H](C)C(=O)N[C@@H](C)C(=O)NC", 0),
    "lysine side chain (butylammonium)": ("CCCC[NH3+]", 1),
    "acetate": ("CC(=O)[O-]", -1),
    "ammonium": ("[NH4+]", 1),
}


def solute(name: str) -> Structure:
    """One of `SOLUTES`, minimised."""
    smiles, charge = SOLUTES[name]
    return optimised(smiles, charge, 1, steps=60)


def with_far_waters(molecule: Structure, n: int, distance: float = 60.0) -> Structure:
    """The molecule with n waters, `distance` angstrom from it and at least as far from one another."""
    water = optimised("O", 0, 1)
    places = [np.array([k + 1.0, 0.4 * k, 0.3 * k]) * distance for k in range(n)]
    positions = np.concatenate([molecule.positions, *(water.positions + place for place in places)])
    numbers = np.concatenate([molecule.numbers, *[water.numbers] * n])
    return Structure(numbers, positions, molecule.charge, molecule.multiplicity)


def unpolarised_shifts(elements: tuple[int, ...]) -> dict[int, float]:
    """E(atom) without spin polarisation less E(atom) with it, eV by atomic number.

    The published checkpoint gives energies relative to atoms without, labels are relative to atoms with it; these
    differences turn the one into the other. Atoms for which GFN2-xTB fails are left out.
    """
    from tblite.interface import Calculator

    shifts = {}
    for z in elements:
        polarised = GFN2.atom_energy(z)
        calculator = Calculator("GFN2-xTB", np.array([z]), np.zeros((1, 3)), 0.0, GROUND_STATE_MULTIPLICITY[z] - 1)
        calculator.set("verbosity", 0)
        try:
            plain = float(calculator.singlepoint().get("energy")) * EV_PER_HARTREE
        except RuntimeError:
            continue
        shifts[z] = plain - polarised
    return shifts
