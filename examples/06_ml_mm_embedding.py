"""Paracetamol in water by SO3LR: does it feel the charges of the water with a force field's charges or with its own?

    python examples/06_ml_mm_embedding.py --picoseconds 20

The drug is the ML region, the water is TIP3P. Nobody has to parametrise the drug's inside: bonds, angles and torsions
come from the model. What it does to the water needs Lennard-Jones parameters, which are taken from amber14 by element
and neighbours, and charges. Mechanical embedding takes fixed ones, here those of MMFF94 (Halgren, J. Comput. Chem. 17,
490 (1996)) by rdkit. Electrostatic embedding takes the model's, which change with the geometry at every step, and the
drug feels the water in return. The example runs both, and counts what the water does at the two oxygens and the NH.

Needs rdkit (`pip install "openmm-mlff[label]"`) and the weights of SO3LR: found where the package so3krates-torch is
installed (`pip install "openmm-mlff[so3lr]"`), in the cache (`openmm-mlff models fetch so3lr`), or at --model.
"""

from __future__ import annotations

import argparse
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from openmm import LangevinMiddleIntegrator, LocalEnergyMinimizer, Platform, System, Vec3, unit
from openmm.app import PME, DCDReporter, Element, ForceField, HBonds, Modeller, PDBFile, Simulation, Topology
from openmmml import MLPotential

SMILES = "CC(=O)Nc1ccc(O)cc1"
#: sigma (nm) and epsilon (kJ/mol) of amber14; hydrogens by the element they are bonded to
LENNARD_JONES = {
    "sp3 carbon": (0.33997, 0.45773),
    "sp2 carbon": (0.33997, 0.35982),
    "N": (0.32500, 0.71128),
    "carbonyl oxygen": (0.29599, 0.87864),
    "hydroxyl oxygen": (0.30665, 0.88031),
    "H on sp3 carbon": (0.26495, 0.06569),
    "H on sp2 carbon": (0.25996, 0.06276),
    "H on N": (0.10691, 0.06569),
    "H on O": (1.0, 0.0),
}


def molecule() -> Any:
    """An rdkit molecule with hydrogens and a geometry by MMFF94."""
    try:
        from rdkit import Chem
        from rdkit.Chem import AllChem
    except ImportError as error:
        raise SystemExit(f'This example needs rdkit ({error}): pip install "openmm-mlff[label]"') from None
    found = Chem.AddHs(Chem.MolFromSmiles(SMILES))
    AllChem.EmbedMolecule(found, randomSeed=7)
    AllChem.MMFFOptimizeMolecule(found)
    return found


def kind(atom: Any) -> str:
    """The row of `LENNARD_JONES` of an rdkit atom."""

    def carbon(a: Any) -> str:
        return "sp3 carbon" if a.GetTotalDegree() == 4 else "sp2 carbon"

    symbol, first = atom.GetSymbol(), atom.GetNeighbors()[0]
    if symbol == "C":
        return carbon(atom)
    if symbol == "O":
        return "hydroxyl oxygen" if atom.GetTotalNumHs(includeNeighbors=True) else "carbonyl oxygen"
    if symbol == "H":
        return f"H on {carbon(first) if first.GetSymbol() == 'C' else first.GetSymbol()}"
    return symbol


def topology_of(mol: Any) -> tuple[Topology, unit.Quantity]:
    """Topology and positions for OpenMM."""
    topology = Topology()
    residue = topology.addResidue("DRG", topology.addChain())
    atoms = []
    for atom in mol.GetAtoms():
        element = Element.getBySymbol(atom.GetSymbol())
        atoms.append(topology.addAtom(f"{atom.GetSymbol()}{atom.GetIdx()}", element, residue))
    for bond in mol.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    return topology, 0.1 * mol.GetConformer().GetPositions() * unit.nanometer


def force_field(mol: Any) -> ForceField:
    """TIP3P, and the drug with MMFF94 charges and amber14's Lennard-Jones parameters, without any bonded terms."""
    from rdkit.Chem import AllChem

    properties = AllChem.MMFFGetMoleculeProperties(mol)
    types, residue, nonbonded = [], [], []
    for atom in mol.GetAtoms():
        name, i = f"{atom.GetSymbol()}{atom.GetIdx()}", atom.GetIdx()
        mass = Element.getBySymbol(atom.GetSymbol()).mass.value_in_unit(unit.dalton)
        sigma, epsilon = LENNARD_JONES[kind(atom)]
        types.append(f'<Type name="drug-{name}" class="drug-{name}" element="{atom.GetSymbol()}" mass="{mass}"/>')
        residue.append(f'<Atom name="{name}" type="drug-{name}" charge="{properties.GetMMFFPartialCharge(i):.5f}"/>')
        nonbonded.append(f'<Atom type="drug-{name}" sigma="{sigma}" epsilon="{epsilon}"/>')
    for bond in mol.GetBonds():
        residue.append(f'<Bond from="{bond.GetBeginAtomIdx()}" to="{bond.GetEndAtomIdx()}"/>')
    xml = f"""<ForceField>
    <AtomTypes>{"".join(types)}</AtomTypes>
    <Residues><Residue name="DRG">{"".join(residue)}</Residue></Residues>
    <NonbondedForce coulomb14scale="0.8333333333333334" lj14scale="0.5">
    <UseAttributeFromResidue name="charge"/>{"".join(nonbonded)}</NonbondedForce>
    </ForceField>"""
    return ForceField("amber14/tip3p.xml", StringIO(xml))


def potential_of(model: str | None) -> MLPotential:
    if model is not None and not Path(model).is_file():
        raise SystemExit(f"There is no file at {model}.")
    try:
        return MLPotential("so3lr") if model is None else MLPotential("so3krates", modelPath=model)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None


def run(topology: Topology, system: System, positions: Any, picoseconds: float, output: Path) -> np.ndarray:
    """Positions of every atom (nm), 40 frames a picosecond."""
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 2 / unit.picosecond, 0.5 * unit.femtosecond)
    integrator.setRandomNumberSeed(3)
    simulation = Simulation(topology, system, integrator, Platform.getPlatform("CPU"))
    simulation.context.setPositions(positions)
    LocalEnergyMinimizer.minimize(simulation.context, maxIterations=50)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 3)
    every = 50
    simulation.reporters.append(DCDReporter(str(output), every))
    frames = []
    for _ in range(max(2, round(picoseconds / (0.0005 * every)))):
        simulation.step(every)
        frames.append(simulation.context.getState(positions=True).getPositions(asNumpy=True)._value.copy())
    return np.array(frames)


def neighbours(frames: np.ndarray, site: int, others: np.ndarray, box: np.ndarray, within: float) -> float:
    """Mean number of other atoms within a distance (nm) of a site, over the second half of the frames."""
    later = frames[len(frames) // 2 :]
    d = later[:, others] - later[:, site, None]
    d -= box * np.rint(d / box)
    return float((np.linalg.norm(d, axis=-1) < within).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="so3lr_params.npz with its JSON file beside it, or a model file")
    parser.add_argument("--picoseconds", type=float, default=10.0, help="of each run")
    parser.add_argument("--side", type=float, default=2.6, help="of the box of water in nm")
    parser.add_argument("--output", type=Path, default=Path("ml_mm_embedding"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    # 1. The force field: water, and of the drug what the water needs to know.
    mol = molecule()
    field = force_field(mol)
    modeller = Modeller(*topology_of(mol))
    modeller.addSolvent(field, model="tip3p", boxSize=Vec3(args.side, args.side, args.side) * unit.nanometer)
    topology, n = modeller.topology, mol.GetNumAtoms()
    system = field.createSystem(topology, nonbondedMethod=PME, nonbondedCutoff=0.9 * unit.nanometer, constraints=HBonds)
    with (args.output / "start.pdb").open("w", encoding="utf-8") as file:
        PDBFile.writeFile(topology, modeller.positions, file)

    # 2. The same potential and atoms, embedded in two ways.
    potential = potential_of(args.model)
    print("embeddings of this potential:", ", ".join(potential.getSupportedEmbeddings()))
    elements = [a.element.symbol for a in topology.atoms()]
    oxygens = np.array([i for i in range(n, len(elements)) if elements[i] == "O"])
    hydrogens = np.array([i for i in range(n, len(elements)) if elements[i] == "H"])
    donors = {b.GetIdx(): a for a in mol.GetAtoms() for b in a.GetNeighbors() if b.GetSymbol() == "H"}
    sites = {
        "water H at C=O": (next(a.GetIdx() for a in mol.GetAtoms() if kind(a) == "carbonyl oxygen"), hydrogens),
        "water H at OH": (next(a.GetIdx() for a in mol.GetAtoms() if kind(a) == "hydroxyl oxygen"), hydrogens),
        "water O at HO": (next(i for i, a in donors.items() if a.GetSymbol() == "O"), oxygens),
        "water O at HN": (next(i for i, a in donors.items() if a.GetSymbol() == "N"), oxygens),
    }
    box = np.diag(topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer))
    print(f"hydrogen bonds (nearer than 0.25 nm) in {args.picoseconds:g} ps:")
    for embedding in ("mechanical", "electrostatic"):
        mixed = potential.createMixedSystem(topology, system, list(range(n)), embedding=embedding)
        frames = run(topology, mixed, modeller.positions, args.picoseconds, args.output / f"{embedding}.dcd")
        counts = {name: neighbours(frames, i, others, box, 0.25) for name, (i, others) in sites.items()}
        print(f"  {embedding:14s}", "  ".join(f"{name} {count:.2f}" for name, count in counts.items()))
    print(f"trajectories: {args.output}/mechanical.dcd, electrostatic.dcd (atoms: start.pdb)")


if __name__ == "__main__":
    main()
