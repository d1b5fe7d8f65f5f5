"""A molecule in vacuum and in implicit water, and the free energy of going from one to the other.

    python examples/07_implicit_solvent.py --picoseconds 200
    python examples/07_implicit_solvent.py --smiles "OCCO" --picoseconds 200

A ReSolv pair (Roecken, Burnet, Zavadlav, J. Chem. Phys. 161, 234101 (2024)) holds two potentials of the same molecule,
one in vacuum and one in water. OpenMM's parameter lambda_solvation goes from the first (0) to the second (1), so that
one System serves for both runs. Every frame is then asked for both energies, and Bennett's acceptance ratio turns the
differences into the hydration free energy. No water molecule is simulated.

By default the molecule is alanine dipeptide, whose torsions phi and psi tell what water does to a peptide; any small
neutral molecule of the pair's elements will do (--smiles needs rdkit, `pip install "openmm-mlff[label]"`; the estimate
needs pymbar, `pip install "openmm-mlff[analysis]"`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import mdtraj
import numpy as np
from openmm import LangevinMiddleIntegrator, Platform, System, unit
from openmm.app import Element, PDBFile, Simulation, Topology
from openmmml import MLPotential

from openmm_mlff.analysis.free_energy import FreeEnergy, InsufficientOverlap, bar
from openmm_mlff.analysis.observables import mean_with_error
from openmm_resolv import BothEnergies

REPOSITORY = Path(__file__).resolve().parent.parent
PAIR = REPOSITORY / "models" / "resolv-freesolv.safetensors"
ALANINE_DIPEPTIDE = Path(__file__).parent / "recipes" / "capped_alanine.pdb"
TEMPERATURE = 298.15  # K, at which hydration free energies are measured
KT = 8.31446261815324e-3 * TEMPERATURE  # kJ/mol
KCAL = 4.184  # kJ
PHASES = {"vacuum": 0.0, "water": 1.0}
COLORS = {"vacuum": "#c98a2b", "water": "#1f5fa8"}


def from_smiles(smiles: str) -> tuple[Topology, np.ndarray]:
    """Topology with bonds and positions (nm), by rdkit."""
    try:
        from rdkit import Chem
        from rdkit.Chem import AllChem
    except ImportError as error:
        raise SystemExit(f'--smiles needs rdkit ({error}): pip install "openmm-mlff[label]"') from None
    plain = Chem.MolFromSmiles(smiles)
    if plain is None:
        raise SystemExit(f"--smiles: this is no molecule: {smiles}")
    molecule = Chem.AddHs(plain)
    AllChem.EmbedMolecule(molecule, randomSeed=7)
    topology = Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = []
    for atom in molecule.GetAtoms():
        element = Element.getBySymbol(atom.GetSymbol())
        atoms.append(topology.addAtom(f"{atom.GetSymbol()}{atom.GetIdx()}", element, residue))
    for bond in molecule.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    return topology, 0.1 * molecule.GetConformer().GetPositions()


def run(
    topology: Topology, system: System, start: np.ndarray, phase: str, args: argparse.Namespace
) -> tuple[mdtraj.Trajectory, np.ndarray]:
    """Frames of one phase, and U_water - U_vacuum (kJ/mol) of each."""
    integrator = LangevinMiddleIntegrator(TEMPERATURE, 1.0 / unit.picosecond, args.timestep * unit.femtosecond)
    # random numbers of its own for each phase: error bars take the two runs to be independent
    seed = 1 + 2 * args.seed + list(PHASES).index(phase)
    integrator.setRandomNumberSeed(seed)
    simulation = Simulation(topology, system, integrator, Platform.getPlatform("Reference"))
    simulation.context.setParameter("lambda_solvation", PHASES[phase])
    simulation.context.setPositions(start)
    simulation.minimizeEnergy(maxIterations=args.minimization)
    simulation.context.setVelocitiesToTemperature(TEMPERATURE, seed)
    both, frames, differences = BothEnergies(system), [], []
    every = max(1, round(min(100.0, 200.0 * args.picoseconds) / args.timestep))  # 0.1 ps in all but tiny runs
    total = max(5, round(1000.0 * args.picoseconds / args.timestep / every))
    for k in range(total + total // 5):
        simulation.step(every)
        if k >= total // 5:  # what comes before is for the molecule to find its way
            frames.append(simulation.context.getState(positions=True).getPositions(asNumpy=True)._value)
            differences.append(float(both(simulation.context).derivative[0]))
        if (k + 1) % max(1, total // 3) == 0:
            print(f"  {phase}: {(k + 1) * every * args.timestep / 1000:.1f} ps", flush=True)
    trajectory = mdtraj.Trajectory(np.array(frames), mdtraj.Topology.from_openmm(topology))
    trajectory.time = every * args.timestep / 1000.0 * np.arange(len(frames))
    return trajectory, np.array(differences)


def basins(phi: np.ndarray, psi: np.ndarray) -> dict[str, np.ndarray]:
    """Which frames are in which region of the Ramachandran plane; angles in degrees."""
    phi = np.where(phi > 150, phi - 360, phi)  # extended chains reach across 180 degrees
    left = phi >= 0
    helix = ~left & (psi >= -100) & (psi < 30)
    ring = ~left & (psi >= 30) & (psi < 100)
    extended = ~left & ~helix & ~ring
    return {
        "C7eq": ring,
        "C5": extended & (phi < -110),
        "PII": extended & (phi >= -110),
        "alpha R": helix,
        "phi > 0": left,
    }


def torsions(trajectory: mdtraj.Trajectory) -> tuple[np.ndarray, np.ndarray] | None:
    """phi and psi in degrees, ``(frames,)`` each; None for a molecule without them."""
    phi, psi = mdtraj.compute_phi(trajectory)[1], mdtraj.compute_psi(trajectory)[1]
    return (np.degrees(phi[:, 0]), np.degrees(psi[:, 0])) if phi.shape[1] and psi.shape[1] else None


def compare(trajectories: dict[str, mdtraj.Trajectory]) -> None:
    """Print what the two phases do to the molecule, with the error of correlated frames."""
    print(f"{'':24}{'vacuum':>20}{'water':>20}")
    sizes = [mean_with_error(10.0 * mdtraj.compute_rg(t)) for t in trajectories.values()]
    print(f"{'radius of gyration':24}" + "".join(f"{f'{s.value:.3f} +- {s.error:.3f} Å':>20}" for s in sizes))
    angles = [torsions(t) for t in trajectories.values()]
    if angles[0] is None or angles[1] is None:
        return
    found = [basins(*pair) for pair in angles if pair is not None]
    for name in found[0]:
        shares = [mean_with_error(100.0 * basin[name]) for basin in found]
        print(f"{'population of ' + name:24}" + "".join(f"{f'{s.value:.0f} +- {s.error:.0f} %':>20}" for s in shares))


def estimate(differences: dict[str, np.ndarray]) -> FreeEnergy:
    """Hydration free energy in kT."""
    return bar(differences["vacuum"] / KT, -differences["water"] / KT, names=("vacuum", "water"))


def draw(trajectories: dict[str, mdtraj.Trajectory], differences: dict[str, np.ndarray], path: Path) -> None:
    """How far the two ensembles overlap, and beside it the Ramachandran plane or the radius of gyration."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.9), constrained_layout=True)
    everything = np.concatenate(list(differences.values())) / KCAL
    middle, width = everything.mean(), max(np.ptp(everything), 0.5)
    edges = np.linspace(middle - 0.55 * width, middle + 0.55 * width, 41)
    for phase, values in differences.items():
        left.hist(values / KCAL, edges, density=True, color=COLORS[phase], alpha=0.55, label=f"frames in {phase}")
    left.set(xlabel="U(water) - U(vacuum) [kcal/mol]", ylabel="density [mol/kcal]")
    for phase, trajectory in trajectories.items():
        angles = torsions(trajectory)
        if angles is not None:
            right.plot(*angles, ".", color=COLORS[phase], markersize=2.5, alpha=0.5)
            right.set(xlabel="phi [degrees]", ylabel="psi [degrees]", xlim=(-180, 180), ylim=(-180, 180))
            right.set(xticks=range(-180, 181, 60), yticks=range(-180, 181, 60), aspect="equal")
        else:
            size = 10.0 * mdtraj.compute_rg(trajectory)
            right.hist(size, 30, density=True, color=COLORS[phase], alpha=0.55)
            right.set(xlabel="radius of gyration [Å]", ylabel="density [1/Å]")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=PAIR, help="model file with both potentials")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--smiles", help="a small neutral molecule")
    what.add_argument("--pdb", type=Path, default=ALANINE_DIPEPTIDE, help="the same with positions and hydrogens")
    parser.add_argument("--picoseconds", type=float, default=200.0, help="of each run, after a fifth of it unrecorded")
    parser.add_argument("--timestep", type=float, default=1.0, help="fs")
    parser.add_argument("--minimization", type=int, default=100, help="iterations at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("implicit_solvent"), help="folder")
    args = parser.parse_args()
    if not args.pair.is_file():
        raise SystemExit(f"There is no file at {args.pair}; --pair names a model file that save_pair wrote.")
    args.output.mkdir(parents=True, exist_ok=True)

    # 1. The molecule.
    if args.smiles is not None:
        topology, start = from_smiles(args.smiles)
    else:
        file = PDBFile(str(args.pdb))
        topology, start = file.topology, file.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        topology.setPeriodicBoxVectors(None)

    # 2. The potential: both phases in one System, lambda_solvation says where between them.
    try:
        system = MLPotential("resolv", modelPath=str(args.pair)).createSystem(topology, phase="both")
    except ValueError as error:
        raise SystemExit(f"This pair cannot describe the molecule: {error}") from None

    # 3. A run in each phase.
    trajectories, differences = {}, {}
    for phase in PHASES:
        trajectories[phase], differences[phase] = run(topology, system, start, phase, args)
        trajectories[phase].superpose(trajectories[phase])
        trajectories[phase].save_dcd(str(args.output / f"{phase}.dcd"))
    with open(args.output / "start.pdb", "w", encoding="utf-8") as file:
        PDBFile.writeFile(topology, start * unit.nanometer, file)

    # 4. What water does to its shape, and what it costs to get there.
    compare(trajectories)
    draw(trajectories, differences, args.output / "phases.png")
    try:
        found = estimate(differences)
        value, spread = (x / KCAL for x in found.times(KT))
        print(f"hydration free energy: {value:.2f} +- {spread:.2f} kcal/mol")
        assert found.overlap is not None
        print(f"overlap of the two ensembles: {found.overlap[0, 1]:.2f} (0.5 is the most, below 0.03 is too little)")
    except InsufficientOverlap as error:
        print(f"no hydration free energy: {error}")
    print(f"trajectories and plot: {args.output}")


if __name__ == "__main__":
    main()
