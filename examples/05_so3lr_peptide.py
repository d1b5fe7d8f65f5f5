"""A peptide of 162 atoms in vacuum by SO3LR: Ace-Ala15-NMe starts as a helix, and the plot says how much of it stays.

    python examples/05_so3lr_peptide.py --picoseconds 10

The peptide is built here, atom by atom, from bond lengths, angles and torsions. SO3LR is trained on small molecules
with long-range electrostatics and dispersion, so nothing has to be assigned: no atom types, no charges, no bonds.
Helix content is the share of the fifteen residues that DSSP (Kabsch, Sander, Biopolymers 22, 2577 (1983)) calls
helical; it needs a hydrogen bond on either side, so the first and the last residue never count.

The weights of SO3LR are found where the package so3krates-torch is installed (`pip install "openmm-mlff[so3lr]"`), in
the cache (`openmm-mlff models fetch so3lr`), or at the path given by --model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import mdtraj
import numpy as np
from openmm import LangevinMiddleIntegrator, Platform, unit
from openmm.app import Element, PDBFile, Simulation, Topology
from openmmml import MLPotential

#: alpha helix, degrees
PHI, PSI, OMEGA = -57.0, -47.0, 180.0


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle: float, torsion: float) -> np.ndarray:
    """The point d with |cd| = length (angstrom), angle b-c-d and torsion a-b-c-d (degrees)."""
    theta, chi = np.radians([angle, torsion])
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    frame = np.stack([-along, np.cross(normal, along), normal])
    return c + length * np.array([np.cos(theta), np.sin(theta) * np.cos(chi), np.sin(theta) * np.sin(chi)]) @ frame


def methyl(a: np.ndarray, b: np.ndarray, c: np.ndarray, names: tuple[str, str, str]) -> dict[str, np.ndarray]:
    """Three hydrogens on carbon c, staggered against a."""
    return {name: place(a, b, c, 1.09, 109.5, torsion) for name, torsion in zip(names, (60, 180, 300), strict=True)}


def peptide(residues: int) -> tuple[Topology, np.ndarray]:
    """Ace-Ala_n-NMe with the backbone torsions above: a topology with standard names and positions in angstrom.

    Lengths and angles of peptides: Engh, Huber, Acta Cryst. A 47, 392 (1991).
    """
    methyl_carbon, carbon = np.zeros(3), np.array([1.51, 0.0, 0.0])
    nitrogen = carbon + 1.33 * np.array([-np.cos(np.radians(117.0)), np.sin(np.radians(117.0)), 0.0])
    atoms: list[tuple[str, dict[str, np.ndarray]]] = []
    cap = {"CH3": methyl_carbon, "C": carbon} | methyl(nitrogen, carbon, methyl_carbon, ("H1", "H2", "H3"))
    atoms.append(("ACE", cap))
    before = methyl_carbon
    for k in range(residues + 1):
        # before - carbon - nitrogen - alpha: the peptide bond to this residue
        alpha = place(before, carbon, nitrogen, 1.46, 122.0, OMEGA)
        hydrogen = place(before, carbon, nitrogen, 1.01, 119.0, OMEGA + 180.0)
        atoms[-1][1]["O"] = place(alpha, nitrogen, carbon, 1.23, 122.7, OMEGA + 180.0)
        if k == residues:
            cap = {"N": nitrogen, "H": hydrogen, "C": alpha} | methyl(carbon, nitrogen, alpha, ("H1", "H2", "H3"))
            atoms.append(("NME", cap))
            break
        beta = place(carbon, nitrogen, alpha, 1.53, 110.0, PHI - 122.0)
        residue = {"N": nitrogen, "H": hydrogen, "CA": alpha, "CB": beta}
        residue["HA"] = place(carbon, nitrogen, alpha, 1.09, 109.0, PHI + 118.0)
        residue |= methyl(nitrogen, alpha, beta, ("HB1", "HB2", "HB3"))
        residue["C"] = place(carbon, nitrogen, alpha, 1.53, 111.0, PHI)
        atoms.append(("ALA", residue))
        before, carbon, nitrogen = alpha, residue["C"], place(nitrogen, alpha, residue["C"], 1.33, 117.0, PSI)
    return topology_of(atoms), np.array([x for _, residue in atoms for x in residue.values()])


def topology_of(atoms: list[tuple[str, dict[str, np.ndarray]]]) -> Topology:
    topology = Topology()
    chain = topology.addChain()
    for name, members in atoms:
        residue = topology.addResidue(name, chain)
        for atom in members:
            topology.addAtom(atom, Element.getBySymbol(atom[0]), residue)
    topology.createStandardBonds()
    return topology


def potential_of(model: str | None) -> MLPotential:
    """SO3LR by name, or from a file."""
    if model is not None and not Path(model).is_file():
        raise SystemExit(f"There is no file at {model}.")
    try:
        return MLPotential("so3lr") if model is None else MLPotential("so3krates", modelPath=model)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"The weights of SO3LR are not here: {error}") from error


def draw(codes: np.ndarray, times: np.ndarray, path: Path) -> None:
    """Helix content over time, and below it which residues are helical (H), extended (E) or neither (C)."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 4.6), sharex=True, constrained_layout=True)
    top.plot(times, 100.0 * (codes == "H").mean(axis=1), color="#1f5fa8", linewidth=1.2)
    top.set(ylabel="helix content [%]", ylim=(0, 100))
    top.grid(alpha=0.3)
    kinds = {"H": ("helix", "#1f5fa8"), "E": ("extended", "#c98a2b"), "C": ("coil", "#e4e4e4")}
    index = np.select([codes == "H", codes == "E"], [0, 1], 2)
    n = codes.shape[1]
    colors = ListedColormap([color for _, color in kinds.values()])
    span = (0.0, float(times[-1]), 0.5, n + 0.5)
    bottom.imshow(
        index.T, aspect="auto", origin="lower", cmap=colors, vmin=0, vmax=2, extent=span, interpolation="none"
    )
    bottom.set(xlabel="time [ps]", ylabel="residue", yticks=range(1, n + 1, 2), xlim=(0, times[-1]))
    patches = [Patch(color=color, label=label) for label, color in kinds.values()]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="so3lr_params.npz with its JSON file beside it, or a model file")
    parser.add_argument("--residues", type=int, default=15, help="alanines between the caps")
    parser.add_argument("--picoseconds", type=float, default=10.0)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--minimization", type=int, default=200, help="iterations at most")
    parser.add_argument("--output", type=Path, default=Path("so3lr_peptide"), help="folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    # 1. The molecule.
    topology, positions = peptide(args.residues)
    bonds = np.array([(b.atom1.index, b.atom2.index) for b in topology.bonds()])
    print(f"Ace-Ala{args.residues}-NMe: {topology.getNumAtoms()} atoms, {len(bonds)} bonds")

    # 2. The potential: an open system, all pairs of atoms see each other's charges (no longRangeCutoff).
    system = potential_of(args.model).createSystem(topology, charge=0, multiplicity=1)

    # 3. The dynamics. Bonds to hydrogen vibrate, so the time step is 0.5 fs.
    integrator = LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
    integrator.setRandomNumberSeed(1)
    simulation = Simulation(topology, system, integrator, Platform.getPlatform("Reference"))
    simulation.context.setPositions(positions * unit.angstrom)
    simulation.minimizeEnergy(maxIterations=args.minimization)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)

    # 4. Run; keep frames.
    frames, steps = [], max(1, round(args.picoseconds * 2000 / args.frames))
    begin = time.perf_counter()
    for k in range(args.frames + 1):
        if k:
            simulation.step(steps)
        frames.append(simulation.context.getState(positions=True).getPositions(asNumpy=True)._value)
        if k and k % max(1, args.frames // 10) == 0:
            ms = 1e3 * (time.perf_counter() - begin) / (k * steps)
            print(f"{k * steps * 0.5e-3:8.3f} ps, {ms:.1f} ms per step", flush=True)
    trajectory = mdtraj.Trajectory(np.array(frames), mdtraj.Topology.from_openmm(topology))
    trajectory.time = np.arange(len(frames)) * steps * 0.5e-3

    # 5. Look at it.
    lengths = mdtraj.compute_distances(trajectory, bonds)
    print(f"longest bond against its start: {(lengths / lengths[0]).max():.2f} times")
    codes = mdtraj.compute_dssp(trajectory)[:, 1:-1]
    print(f"helix content: {100 * (codes[0] == 'H').mean():.0f} % at the start, "
          f"{100 * (codes == 'H').mean():.0f} % on average")  # fmt: skip
    trajectory.superpose(trajectory, atom_indices=trajectory.topology.select("backbone"))
    trajectory.save_dcd(str(args.output / "peptide.dcd"))
    with open(args.output / "peptide.pdb", "w", encoding="utf-8") as file:
        PDBFile.writeFile(topology, trajectory.xyz[0] * unit.nanometer, file)
    draw(codes, trajectory.time, args.output / "helix.png")
    print(f"trajectory and plot: {args.output}")


if __name__ == "__main__":
    main()
