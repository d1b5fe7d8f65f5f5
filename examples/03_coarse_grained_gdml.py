"""Coarse-graining in five minutes: from all-atom forces of capped alanine to a six-bead model that runs in OpenMM.

    python examples/03_coarse_grained_gdml.py

Everything is made here: all-atom trajectories in implicit solvent under a bias on phi and psi (forces are recorded
without it), maps to six beads, harmonic priors, a GDML model of what the priors leave over, and its simulation. The
benchmark ``cg_gdml.py`` does the same with 100 times the data and error bars.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import openmm
from openmm import XmlSerializer, app, unit

from openmm_gdml.coarse_grained import CoarseGrainedGDML
from openmm_mlff.analysis.landscapes import Sample, chiral_volume, difference, histogram, population
from openmm_mlff.analysis.observables import backbone_torsions, dihedral
from openmm_mlff.data.coarse_graining import BeadMap, ForceCovariance, constraints_of, optimised_force_map
from openmm_mlff.forces.handedness import handedness_wall
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.potentials.priors import fit_priors
from openmm_mlff.sampling.biased_md import BiasedPlan, Dynamics, Frames, Metadynamics, make_bias, run_biased
from openmm_mlff.sampling.coarse_grained import coarse_grained_system
from openmm_mlff.sampling.implicit_solvent import use_native_obc2
from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.units import ANGSTROM_PER_NM, NM_PER_ANGSTROM

HERE = Path(__file__).parent
#: names of the atoms that become beads, with their residues
BEADS = [("ACE", "C"), ("ALA", "N"), ("ALA", "CA"), ("ALA", "CB"), ("ALA", "C"), ("NME", "N")]
TEMPERATURE = 300.0


def sample_atoms(topology: app.Topology, positions: np.ndarray, args: argparse.Namespace) -> tuple[str, list[Frames]]:
    """The all-atom System (XML) and trajectories with forces, under a bias that a short metadynamics run makes."""
    field = app.ForceField("amber99sbildn.xml", "implicit/obc2.xml")
    system = field.createSystem(topology, constraints=app.HBonds, hydrogenMass=3 * unit.amu, removeCMMotion=False)
    use_native_obc2(system)
    angles = backbone_torsions(topology)
    torsions = (angles["phi"], angles["psi"])
    dynamics = Dynamics(temperature=TEMPERATURE, timestep=4.0)
    bias, _, snapshots = make_bias(
        system, positions, torsions, Metadynamics(duration=args.metadynamics, height=0.02), dynamics, seed=1
    )
    stored = XmlSerializer.serialize(system)
    trajectories = []
    for k in range(args.trajectories):
        start = snapshots[k * len(snapshots) // args.trajectories]
        plan = BiasedPlan(f"train-{k}", "train", stored, start, torsions, bias, dynamics,
                          duration=args.duration, discard=10.0, interval=0.5, seed=10 + k)  # fmt: skip
        trajectories.append(run_biased(plan))
    return stored, trajectories


def simulate_beads(
    model: Path, beads: BeadMap, wall: openmm.Force, starts: np.ndarray, args: argparse.Namespace
) -> np.ndarray:
    """Positions ``(frames, runs, 6, 3)`` angstrom of many runs side by side."""
    topology = beads.topology()
    # masses are those of the beads, and the priors come with the model file
    system = coarse_grained_system(model, topology, beads.masses, forces=[wall])
    replicas = Replicas(system, topology, len(starts))
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 2 / unit.picosecond, 4 * unit.femtosecond)
    integrator.setRandomNumberSeed(3)
    context = replicas.context(integrator, "Reference")
    replicas.set_positions(context, starts * NM_PER_ANGSTROM)
    replicas.set_velocities(context, TEMPERATURE, seeds=4)
    frames = []
    for _ in range(int(args.picoseconds)):
        integrator.step(250)
        frames.append(replicas.positions(context) * ANGSTROM_PER_NM)
    return np.array(frames)


def write_beads(topology: app.Topology, frames: np.ndarray, output: Path) -> None:
    """One PDB file of the first frame, and all runs one after the other as a DCD trajectory."""
    with open(output / "beads.pdb", "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, frames[0, 0] * unit.angstrom, file)
    with open(output / "beads.dcd", "wb") as file:
        trajectory = app.DCDFile(file, topology, 1 * unit.picosecond)
        for positions in frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:]):
            trajectory.writeModel(positions * unit.angstrom)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadynamics", type=float, default=2000.0, help="ps of the run that makes the bias")
    parser.add_argument("--trajectories", type=int, default=4)
    parser.add_argument("--duration", type=float, default=2000.0, help="ps of each all-atom trajectory")
    parser.add_argument("--inducing", type=int, default=100, help="geometries that the model is expanded around")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--picoseconds", type=float, default=200.0, help="of each bead run")
    parser.add_argument("--output", type=Path, default=Path("coarse_grained"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    # 1. All-atom trajectories. Weights exp(bias / kT) give averages without the bias.
    pdb = app.PDBFile(str(HERE / "recipes" / "capped_alanine.pdb"))
    positions = pdb.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    system, trajectories = sample_atoms(pdb.topology, positions, args)
    kT = Dynamics(temperature=TEMPERATURE).kT
    weights = np.exp(np.concatenate([t.bias for t in trajectories]) / kT)
    print(f"all-atom data: {len(weights)} frames with forces")

    # 2. Beads, and the forces on them: of all maps with the right mean the one with the least noise.
    index = {(a.residue.name, a.name): a.index for a in pdb.topology.atoms()}
    beads = BeadMap.slice(pdb.topology, [index[name] for name in BEADS])
    covariance = ForceCovariance(pdb.topology.getNumAtoms(), constraints_of(XmlSerializer.deserialize(system)))
    for frames in trajectories:
        covariance.add(frames.forces)
    force_map = optimised_force_map(beads, covariance)
    x = np.concatenate([beads.positions(t.positions) for t in trajectories])
    f = np.concatenate([force_map.forces(t.forces) for t in trajectories])
    torsions = np.concatenate([t.torsions for t in trajectories])

    # 3. Priors, and a model of what they leave over. The last trajectory chooses sigma and lambda.
    priors = fit_priors(x, beads.bonds, kT, weights=weights)
    f = f - priors.forces(x)
    train = slice(0, len(x) - len(trajectories[-1]))
    held_out = slice(train.stop, None)
    estimator = CoarseGrainedGDML(sigma=[1.0, 2.0], lam=[1e-6, 1e-5, 1e-4, 1e-3], n_inducing=args.inducing)
    model = estimator.fit(
        x[train], f[train], torsions[train], validation=(x[held_out], f[held_out]), numbers=beads.numbers,
        beads=beads.names,
    )  # fmt: skip
    path = save_potential(model, args.output / "model.safetensors", priors=priors.to_dict())
    error, alone = min(row["validation"] for row in estimator.report), np.mean(f[held_out] ** 2)
    print(f"held-out mean square force: {alone:.4f} eV²/Å² by priors alone, {error:.4f} with the model")

    # 4. Many runs of the beads. Distances do not tell a molecule from its mirror image: a wall that no training frame
    #    feels keeps them apart.
    rows = np.random.default_rng(2).choice(len(x), args.runs, p=weights / weights.sum())
    centre = (2, 1, 4, 3)  # CA and its neighbours N, C, CB
    frames = simulate_beads(path, beads, handedness_wall(x, centre), x[rows], args)
    print(f"smallest chiral volume at CA: {chiral_volume(frames, centre).min():.2f} (L-alanine is positive)")
    write_beads(beads.topology(), frames, args.output)

    # 5. The landscape, against the reweighted all-atom data.
    phi, psi = np.moveaxis(dihedral(frames, [[0, 1, 2, 4], [1, 2, 4, 5]]), -1, 0)
    simulated = Sample(phi.ravel(), psi.ravel())
    reference = Sample(torsions[:, 0], torsions[:, 1], weights)
    d = difference(histogram(simulated), histogram(reference))
    shares = [population([s], lambda phi, psi: psi < 50).value for s in (simulated, reference)]
    print(f"free-energy error {d.mse_weighted:.2f} kT², Jensen-Shannon divergence {d.js:.3f} nats")
    print(f"share with psi < 50: {shares[0]:.2f} of the beads, {shares[1]:.2f} of the atoms")
    print(f"written: model.safetensors, beads.pdb, beads.dcd in {args.output}")


if __name__ == "__main__":
    main()
