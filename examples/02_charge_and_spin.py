"""Charge and spin: one network describes CH2 and O2 as singlet and triplet, and phenol with and without its proton.

    python examples/02_charge_and_spin.py

`charge` is the total charge in e and `multiplicity` is 2S+1, as everywhere in openmm-ml. A combination that no number
of electrons can have is refused.

The published SpookyNet model was trained on GFN2-xTB, and it repeats what its teacher says, not what experiment says.
Both gaps below come out with the singlet lowest, as with plain GFN2 (without spin polarisation); in nature CH2 and O2
are triplets (by 0.39 and 0.98 eV). Trust a sign as far as you trust the reference method that a model was trained on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from openmm import Context, LocalEnergyMinimizer, Platform, VerletIntegrator
from openmm.app import Element, Topology
from openmmml import MLPotential

from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import Family, find_family, load_potential
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

#: benzene ring, C-C 1.40 and C-H 1.09 angstrom
_ANGLES = np.radians(np.arange(0, 360, 60))
_RING = np.stack([np.cos(_ANGLES), np.sin(_ANGLES), np.zeros(6)], axis=1)

Molecule = tuple[list[int], np.ndarray]


def methylene() -> Molecule:
    """CH2, angstrom."""
    return [6, 1, 1], np.array([[0.0, 0.0, 0.1], [0.0, 0.9, -0.5], [0.0, -0.9, -0.5]])


def dioxygen() -> Molecule:
    """O2, angstrom."""
    return [8, 8], np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.21]])


def phenol(proton: bool) -> Molecule:
    """C6H5OH or C6H5O, angstrom."""
    oxygen = _RING[0] * (1.40 + 1.36)
    hydrogens = [*(_RING[1:] * 2.49), *([oxygen + np.array([0.32, 0.91, 0.0])] if proton else [])]
    return [6] * 6 + [8] + [1] * len(hydrogens), np.array([*(1.40 * _RING), oxygen, *hydrogens])


def hydroxyl(hydrogens: int) -> Molecule:
    """H2O or OH, angstrom."""
    positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.76, 0.59], [0.0, -0.76, 0.59]])
    return [8] + [1] * hydrogens, positions[: 1 + hydrogens]


def relaxed(potential: MLPotential, molecule: Molecule, charge: int, multiplicity: int) -> Structure:
    """The nearest minimum of this electronic state, found by OpenMM."""
    numbers, positions = molecule
    topology = Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in numbers:
        element = Element.getByAtomicNumber(z)
        topology.addAtom(element.symbol, element, residue)
    system = potential.createSystem(topology, charge=charge, multiplicity=multiplicity, precision="double")
    context = Context(system, VerletIntegrator(0.001), Platform.getPlatform("Reference"))
    context.setPositions(positions / ANGSTROM_PER_NM)
    LocalEnergyMinimizer.minimize(context, 1.0)
    state = context.getState(positions=True, energy=True)
    return Structure(
        numbers,
        state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM,
        charge,
        multiplicity,
        energy=state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV,
    )


def find_model(given: str | None, family: Family) -> Path:
    """A model file: the path given, the published model in the cache, or the one in $OPENMM_MLFF_SHARED."""
    if given is not None:
        return Path(given)
    published = family.published[0]
    shared = Path(os.environ.get("OPENMM_MLFF_SHARED", "")) / "models" / "spookynet_parameters.pth"
    for path in (model_file.cached(published.sha256), shared):
        if path is not None and path.is_file():
            return path
    raise SystemExit(
        f"The published model is not here. Fetch it with\n    openmm-mlff models fetch {published.name}\n"
        "or give the path of a model that knows charge and spin with --model."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path of a SpookyNet file (the published model if not given)")
    parser.add_argument("--only", choices=("spin", "charge"), help="half of the example")
    args = parser.parse_args()
    path = find_model(args.model, find_family("spookynet"))
    if not path.is_file():
        raise SystemExit(f"There is no file at {path}.")
    potential = MLPotential("spookynet", modelPath=str(path))

    if args.only != "charge":
        print("Adiabatic gaps, E(triplet) - E(singlet), each state in its own geometry:")
        for name, molecule in (("CH2", methylene()), ("O2", dioxygen())):
            singlet, triplet = (relaxed(potential, molecule, 0, multiplicity) for multiplicity in (1, 3))
            assert singlet.energy is not None and triplet.energy is not None
            shape = f"bond {bond(singlet):.3f} and {bond(triplet):.3f} angstrom"
            if name == "CH2":
                shape += f", angle {angle(singlet):.0f} and {angle(triplet):.0f} degrees"
            print(f"  {name:4s} {triplet.energy - singlet.energy:+7.3f} eV   {shape} (singlet and triplet)")
        try:
            relaxed(potential, dioxygen(), 0, 2)
        except ValueError as error:
            print(f"  a doublet O2 is refused: {error}")

    if args.only != "spin":
        acid, anion = relaxed(potential, phenol(True), 0, 1), relaxed(potential, phenol(False), -1, 1)
        water, hydroxide = relaxed(potential, hydroxyl(2), 0, 1), relaxed(potential, hydroxyl(1), -1, 1)
        energies = [s.energy or 0.0 for s in (acid, hydroxide, anion, water)]
        reaction = energies[2] + energies[3] - energies[0] - energies[1]
        print("A proton moves, phenol + OH- -> phenoxide + water:")
        print(f"  {reaction:+.2f} eV (experiment, from gas-phase acidities: -1.8 eV)")
        model = load_potential(path)
        for name, structure in (("phenol", acid), ("phenoxide", anion)):
            charges = model.evaluate(model.batch(structure), forces=False).charges
            assert charges is not None
            length = np.linalg.norm(structure.positions[6] - structure.positions[0])
            total = f"charge of O {float(charges[6]):+.3f} e, of all {float(charges.sum()):+.3f} e"
            print(f"  {name:9s} {total}; C-O {length:.3f} angstrom")


def bond(structure: Structure) -> float:
    """Distance of the first two atoms, angstrom."""
    return float(np.linalg.norm(structure.positions[1] - structure.positions[0]))


def angle(structure: Structure) -> float:
    """Angle at the first atom between the next two, degrees."""
    a, b = structure.positions[1] - structure.positions[0], structure.positions[2] - structure.positions[0]
    return float(np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))))


if __name__ == "__main__":
    main()
