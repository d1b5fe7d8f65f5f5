"""A first simulation: capped alanine by a neural network, with nothing but OpenMM's own application layer.

    python examples/01_first_simulation.py --steps 2000

A model of this package is used like any other potential of openmm-ml: `MLPotential(name)` makes the System, and
everything else is OpenMM. (`openmm-mlff simulate` does the same with checkpoints, guards and resuming.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from openmm import LangevinMiddleIntegrator, Platform, unit
from openmm.app import DCDReporter, PDBFile, Simulation
from openmmml import MLPotential

from openmm_mlff.analysis.observables import backbone_torsions, dihedral

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="spookynet-ala2-gfn2", help="name of a model, or path of a SpookyNet file")
    parser.add_argument("--steps", type=int, default=2000, help="of 0.5 fs")
    parser.add_argument("--output", type=Path, default=Path("first_simulation.dcd"))
    args = parser.parse_args()

    # 1. The molecule. Any PDB file with all hydrogens will do; bonds are not needed.
    pdb = PDBFile(str(HERE / "recipes" / "capped_alanine.pdb"))

    # 2. The potential. A file of your own needs the name of its family.
    if Path(args.model).is_file():
        potential = MLPotential("spookynet", modelPath=args.model)
    else:
        potential = MLPotential(args.model)
    system = potential.createSystem(pdb.topology, charge=0, multiplicity=1)

    # 3. The dynamics. A molecule of this size is fastest on the Reference platform. No bond is constrained, so the
    #    time step is 0.5 fs.
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
    integrator.setRandomNumberSeed(1)
    simulation = Simulation(pdb.topology, system, integrator, Platform.getPlatform("Reference"))
    simulation.context.setPositions(pdb.positions)
    simulation.minimizeEnergy(maxIterations=100)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)

    # 4. Run, and watch the backbone torsions.
    simulation.reporters.append(DCDReporter(str(args.output), max(1, args.steps // 20)))
    # each atom has three degrees of freedom; the motion of the whole is taken away
    freedom = 3 * system.getNumParticles() - 3
    torsions = backbone_torsions(pdb.topology)
    print("   step   potential (kJ/mol)   temperature (K)      phi      psi")
    for _ in range(10):
        simulation.step(max(1, args.steps // 10))
        state = simulation.context.getState(energy=True, positions=True)
        phi, psi = dihedral(state.getPositions(asNumpy=True)._value, np.array([torsions["phi"], torsions["psi"]]))
        potential_energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        temperature = (2 * state.getKineticEnergy() / freedom / unit.MOLAR_GAS_CONSTANT_R).value_in_unit(unit.kelvin)
        print(f"{simulation.currentStep:7d} {potential_energy:20.2f} {temperature:17.1f} {phi:8.1f} {psi:8.1f}")
    print(f"trajectory: {args.output}")


if __name__ == "__main__":
    main()
