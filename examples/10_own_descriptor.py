"""A kernel model with a descriptor of your own: ten lines of torch, and everything else follows.

    python examples/10_own_descriptor.py --train 80 --steps 4000

A descriptor is a function of positions. Forces, training and Hessians need its derivatives, which come from automatic
differentiation, so nothing else has to be written. So that this takes seconds, the reference method is a force field
and the molecule N-methylacetamide: GDML models are trained on a few of its geometries, with inverse distances and with
the descriptor below, and the second then runs in OpenMM like any other potential.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from openmm import Context, LangevinMiddleIntegrator, LocalEnergyMinimizer, Platform, System, unit
from openmm.app import ForceField, NoCutoff, PDBFile, Simulation
from openmmml import MLPotential

from openmm_gdml.training import GDML
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

MOLECULE = """\
ATOM      1  H1  ACE A   1       2.524   0.462  -0.709  1.00  0.00           H
ATOM      2  CH3 ACE A   1       1.886  -0.034   0.028  1.00  0.00           C
ATOM      3  H2  ACE A   1       1.917   0.548   0.953  1.00  0.00           H
ATOM      4  H3  ACE A   1       2.265  -1.040   0.226  1.00  0.00           H
ATOM      5  C   ACE A   1       0.487  -0.133  -0.519  1.00  0.00           C
ATOM      6  O   ACE A   1       0.261  -0.502  -1.666  1.00  0.00           O
ATOM      7  N   NME A   2      -0.494   0.209   0.384  1.00  0.00           N
ATOM      8  H   NME A   2      -0.247   0.300   1.360  1.00  0.00           H
ATOM      9  C   NME A   2      -1.888   0.076   0.045  1.00  0.00           C
ATOM     10  H1  NME A   2      -2.170  -0.977   0.131  1.00  0.00           H
ATOM     11  H2  NME A   2      -2.066   0.418  -0.978  1.00  0.00           H
ATOM     12  H3  NME A   2      -2.475   0.673   0.746  1.00  0.00           H
END
"""


def decaying_distances(positions: torch.Tensor) -> torch.Tensor:
    """exp(-r/R) of every pair of atoms, R = 1.5 angstrom: near pairs count most, and far ones hardly.

    Positions ``(..., N, 3)`` in angstrom -> ``(..., N (N - 1) / 2)``. Model files remember a descriptor by its name,
    so a program that loads one imports the module that has the function, and hands it to
    `openmm_gdml.descriptors.register`.
    """
    i, j = torch.tril_indices(positions.shape[-2], positions.shape[-2], -1)
    r = (positions[..., i, :] - positions[..., j, :]).square().sum(-1).sqrt()
    return torch.exp(-r / 1.5)


def integrator(temperature: float, seed: int) -> LangevinMiddleIntegrator:
    made = LangevinMiddleIntegrator(temperature * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
    made.setRandomNumberSeed(seed)
    return made


def labelled(pdb: PDBFile, reference: System, n: int) -> list[Structure]:
    """n geometries of a run at 400 K, 0.25 ps apart, with energies (eV) and forces (eV/angstrom)."""
    numbers = [atom.element.atomic_number for atom in pdb.topology.atoms()]
    context = Context(reference, integrator(400, 1), Platform.getPlatform("Reference"))
    context.setPositions(pdb.positions)
    LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(400 * unit.kelvin, 2)
    context.getIntegrator().step(5000)
    structures = []
    for _ in range(n):
        context.getIntegrator().step(500)
        state = context.getState(positions=True, forces=True, energy=True)
        structures.append(
            Structure(
                numbers,
                state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM,
                energy=state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV,
                forces=state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM,
            )
        )
    return structures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=80, help="training geometries")
    parser.add_argument("--steps", type=int, default=4000, help="steps of 0.5 fs in OpenMM")
    args = parser.parse_args()

    # 1. Labels. Those of a quantum-chemical method would come from `openmm-mlff dataset label`.
    pdb = PDBFile(io.StringIO(MOLECULE))
    reference = ForceField("amber14-all.xml").createSystem(pdb.topology, nonbondedMethod=NoCutoff)
    structures = labelled(pdb, reference, args.train + 90)
    # in the order of time: what a model is tested on comes after what it has seen, and after what sigma is chosen on
    train, valid, test = structures[: args.train], structures[args.train :][:30], structures[-60:]
    print(f"{len(train)} geometries to train on, {len(valid)} to choose sigma with, {len(test)} to test")

    # 2. Training. The function itself says which descriptor; names are those of the package's own.
    models = {}
    for descriptor in ("inverse_distances", decaying_distances):
        model = GDML(sigma=[5, 10, 20, 40], descriptor=descriptor, permutations=None).fit(train, valid)
        errors = [model.energy_and_forces(s)[1] - s.forces for s in test]
        name, sigma = model.config.descriptor, model.config.sigma
        print(f"  {name:20s} sigma {sigma:3.0f}   mean force error {np.abs(errors).mean():.4f} eV/angstrom")
        models[name] = model

    # 3. Dynamics, from the model file.
    with tempfile.TemporaryDirectory() as folder:
        path = save_potential(models["decaying_distances"], Path(folder) / "amide.safetensors")
        system = MLPotential("gdml", modelPath=str(path)).createSystem(pdb.topology)
        simulation = Simulation(pdb.topology, system, integrator(300, 3), Platform.getPlatform("Reference"))
        simulation.context.setPositions(test[0].positions / ANGSTROM_PER_NM)
        simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 4)
        truth = Context(reference, integrator(300, 3), Platform.getPlatform("Reference"))
        print("  step   temperature (K)   potential energy (kJ/mol): model   reference")
        for _ in range(8):
            simulation.step(max(1, args.steps // 8))
            state = simulation.context.getState(energy=True, positions=True)
            temperature = state.getKineticEnergy() / (1.5 * len(train[0]) * unit.MOLAR_GAS_CONSTANT_R)
            truth.setPositions(state.getPositions())
            energies = [c.getState(energy=True).getPotentialEnergy()._value for c in (simulation.context, truth)]
            kelvin = temperature.value_in_unit(unit.kelvin)
            print(f"{simulation.currentStep:6d} {kelvin:17.0f} {energies[0]:34.1f} {energies[1]:11.1f}")


if __name__ == "__main__":
    main()
