"""Learned latent dynamics in five minutes: from a topology and trajectories to a model that runs in turn with OpenMM.

    python examples/04_led.py                                         # makes its own trajectories of capped alanine
    python examples/04_led.py --topology my.pdb --trajectories *.xtc --temperature 310 --forcefield amber14-all.xml ...

The trajectories train an autoencoder with two latent coordinates and a recurrent network that propagates them (LED).
One run that the training has not seen tells how far to trust it. Then latent steps and molecular dynamics alternate.
Real work needs more trajectories, which cross between all states several times: see docs/led.md.
"""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

from openmm_led import Features, LEDConfig, LEDLearner, LEDOptions, read_trajectories
from openmm_led.comparison import Settings
from openmm_led.report import show, write_report
from openmm_led.validation import validate
from openmm_mlff.sampling.back_mapping import solute_topology
from openmm_mlff.sampling.implicit_solvent import use_native_obc2
from openmm_mlff.sampling.led_reporters import BackMappedReporter, LatentReporter, RoundReporter
from openmm_mlff.sampling.led_simulation import LEDSimulation
from openmm_mlff.sampling.systems import select

HERE = Path(__file__).parent


def make_system(topology: app.Topology, files: list[str]) -> openmm.System:
    """The molecular dynamics between latent steps: heavy hydrogens allow steps of 4 fs."""
    boxed = topology.getPeriodicBoxVectors() is not None
    method = {"nonbondedMethod": app.PME, "nonbondedCutoff": 0.9 * unit.nanometer} if boxed else {}
    system = app.ForceField(*files).createSystem(
        topology, constraints=app.HBonds, hydrogenMass=3 * unit.amu, removeCMMotion=False, **method
    )
    if "implicit/obc2.xml" in files:
        use_native_obc2(system)  # the same energies, forty times faster
    return system


def make_trajectories(pdb: app.PDBFile, system: openmm.System, args: argparse.Namespace) -> list[str]:
    """Independent runs from one structure, a frame per ps, as DCD files."""
    files = []
    for k in range(args.runs):
        integrator = openmm.LangevinMiddleIntegrator(args.temperature, 1 / unit.picosecond, 0.004)
        integrator.setRandomNumberSeed(1 + k)
        platform = openmm.Platform.getPlatform("Reference")  # the fastest for so few atoms
        simulation = app.Simulation(pdb.topology, system, integrator, platform)
        simulation.context.setPositions(pdb.positions)
        simulation.minimizeEnergy()
        simulation.context.setVelocitiesToTemperature(args.temperature, 1 + k)
        simulation.step(2500)  # 10 ps that are not recorded
        files.append(str(args.output / f"md-{k}.dcd"))
        simulation.reporters.append(app.DCDReporter(files[-1], 250))
        simulation.step(250 * args.picoseconds)
    return files


def find(patterns: list[str]) -> list[str]:
    """The files that file names and patterns stand for."""
    found = []
    for pattern in patterns:
        files = sorted(glob.glob(pattern))
        if not files:
            raise SystemExit(f"--trajectories: no file is called {pattern}")
        found += files
    if len(found) < 3:
        raise SystemExit(f"--trajectories: expected three or more, to train, to validate and to test; got {len(found)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default=str(HERE / "recipes" / "capped_alanine.pdb"))
    parser.add_argument("--trajectories", nargs="+", help="three or more; the last one is for the test")
    parser.add_argument("--interval", type=float, help="ps between their frames, if the files do not tell")
    parser.add_argument("--forcefield", nargs="+", default=["amber99sbildn.xml", "implicit/obc2.xml"])
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--runs", type=int, default=7, help="trajectories to make, three or more")
    parser.add_argument("--picoseconds", type=int, default=1200, help="of each")
    parser.add_argument("--steps", type=int, default=2000, help="of the optimiser, per stage")
    parser.add_argument("--quick", action="store_true", help="so little of everything that nothing is learned")
    parser.add_argument("--output", type=Path, default=Path("led"))
    args = parser.parse_args()
    if args.quick:
        args.runs, args.picoseconds, args.steps = 4, 120, 100
    if args.runs < 3:
        parser.error(f"--runs: expected three or more, got {args.runs}")
    args.output.mkdir(parents=True, exist_ok=True)

    # 1. Topology and trajectories. Solvent is left out; molecules are made whole.
    pdb = app.PDBFile(args.topology)
    system = make_system(pdb.topology, args.forcefield)
    files = find(args.trajectories) if args.trajectories else make_trajectories(pdb, system, args)
    solute = solute_topology(pdb.topology, select(pdb.topology, "auto"))
    train, valid, test = (
        read_trajectories(chosen, pdb.topology, interval=args.interval)
        for chosen in (files[:-2], files[-2:-1], files[-1:])
    )  # splits are by whole runs
    print(f"training on {train.n_frames} frames, {train.interval:g} ps apart")

    # 2. The model. A second call with the same folder goes on where the first one was stopped.
    learner = LEDLearner(
        Features.internal(solute, "heavy"),
        LEDConfig(latent_dim=2),
        LEDOptions(autoencoder_steps=args.steps, propagator_steps=args.steps),
    )
    model = learner.fit(train, valid, args.output / "training", temperature=args.temperature, say=print)
    path = model.save(args.output / "model.safetensors")

    # 3. Is it right? Latent runs beside the run that was held back, and a table of what differs.
    settings = Settings(copies=2, states=40, resamples=10) if args.quick else Settings()
    comparison = validate(model, test, train, topology=solute, settings=settings)
    write_report(comparison, args.output / "validation")
    show(comparison)

    # 4. Latent steps and molecular dynamics in turn: 100 latent frames, then 10 of MD that put the walkers right.
    simulation = LEDSimulation(
        system, pdb.topology, path, temperature=args.temperature, macro_steps=100, micro_steps=10, warmup=20
    )
    simulation.setPositions(pdb.positions)
    simulation.minimizeEnergy()
    simulation.reporters.append(LatentReporter(args.output / "latent.csv"))
    simulation.reporters.append(RoundReporter(args.output / "rounds.csv"))
    simulation.reporters.append(BackMappedReporter(args.output / "alternation.dcd", every=10))
    simulation.step(350 if args.quick else 5000)
    done = simulation.statistics
    seconds = {part: round(value, 2) for part, value in done.seconds.items()}
    print(f"alternation: {done.latent_frames} latent frames and {done.md_frames} of MD, {done.returns} returns")
    print(f"structures that MD took: {done.accepted} of {done.accepted + done.fallbacks} returns; seconds: {seconds}")
    share = done.seconds["md"] / (done.md_frames + done.warmup_frames)
    everything = sum(done.seconds.values())
    gain = share * np.sum([done.latent_frames, done.md_frames, done.warmup_frames]) / everything
    print(f"{gain:.1f} times as fast as MD alone; the bound is 1 + rho = {1 + done.rho:.1f}")
    print(f"written: model.safetensors, validation/, latent.csv, rounds.csv, alternation.dcd in {args.output}")


if __name__ == "__main__":
    main()
