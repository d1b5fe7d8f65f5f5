"""``openmm-mlff demo``: capped alanine by a neural network, in a box of TIP3P water, in a few minutes."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

#: steps of equilibration, whose speed decides how many can be afforded afterwards.
TRIAL_STEPS = 500
#: steps per frame and per checkpoint.
FRAME, CHECKPOINT = 50, 500
LONGEST = 50_000


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``demo``."""
    parser = subparsers.add_parser(
        "demo",
        help="simulate capped alanine in water (ML/MM), a few minutes",
        description="Capped alanine (ACE-ALA-NME) by a machine-learned potential in TIP3P water (amber14): minimises, "
        "equilibrates, runs NVT molecular dynamics, and draws energy, temperature and Ramachandran plane.",
    )
    parser.add_argument(
        "--output", "-o", required=True, metavar="DIR", help="folder of the run; a former demo there is replaced"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="for the recorded run; decides its length (120)")
    parser.add_argument("--steps", type=int, help="length of the recorded run, instead of --seconds")
    parser.add_argument("--model", default="spookynet-ala2-gfn2", metavar="NAME", help="(spookynet-ala2-gfn2)")
    parser.add_argument("--model-path", metavar="FILE", help="model file, where --model names a family")
    parser.add_argument("--timestep", type=float, default=1.0, metavar="FS", help="(1)")
    parser.add_argument("--temperature", type=float, default=300.0, metavar="K", help="(300)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(func=run)


def start_structure() -> Path:
    """Capped alanine in an equilibrated box of TIP3P water, a PDB file of this package."""
    return Path(__file__).parent.parent / "sampling" / "structures" / "capped_alanine_water.pdb"


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    # small molecules run fastest on one thread; read when torch is first imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from openmm_mlff.cli.simulate import carry_out, describe, model_settings, show_notices
    from openmm_mlff.sampling.settings import RunSettings
    from openmm_mlff.sampling.simulation import Simulation

    if not args.seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {args.seconds}")
    begin = time.monotonic()
    show_notices(not args.quiet)
    output = Path(args.output)
    if is_demo(output):
        remove_run(output)
    settings = RunSettings(
        input=str(start_structure()),
        ensemble="nvt",
        temperature=args.temperature,
        timestep=args.timestep,
        steps=args.steps or 0,
        equilibration_steps=TRIAL_STEPS,
        minimization_steps=100,
        report_interval=FRAME,
        checkpoint_interval=CHECKPOINT,
        seed=args.seed,
        **({"model": args.model} | model_settings(args)),
    )
    simulation = Simulation.start(settings, output, not args.quiet)
    if args.steps is None:
        status, trial = carry_out(simulation, summary=False)
        if status or trial is None:
            return status
        simulation.extend(affordable_steps(trial.steps_per_second, args.seconds))
    print(describe(simulation), flush=True)
    # a machine that becomes busy in between must not make it much longer
    status, result = carry_out(simulation, seconds=None if args.steps else 1.2 * args.seconds)
    if result is not None and result.finished:
        s = simulation.settings
        print(
            f"{result.step} steps ({result.step * s.timestep / 1000:g} ps), {simulation.facts['particles']} particles, "
            f"at {result.steps_per_second:.0f} steps/s; {time.monotonic() - begin:.0f} s in all"
        )
        print(
            f"look at {output / 'summary.png'}, open {output / 'start.pdb'} with {output / 'trajectory.dcd'}, or go on:"
        )
        print(f"  openmm-mlff simulate --resume --output {output} --steps {2 * result.step}")
    return status


def affordable_steps(steps_per_second: float, seconds: float) -> int:
    """Whole checkpoint intervals that fit into a time, at least one and at most `LONGEST` steps."""
    return int(min(max(steps_per_second * seconds // CHECKPOINT, 1) * CHECKPOINT, LONGEST))


def is_demo(folder: Path) -> bool:
    """Whether a folder holds a former demo, which a new one replaces; any other run is left alone."""
    import json

    try:
        return (
            Path(json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]["input"])
            == start_structure()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remove_run(folder: Path) -> None:
    """Remove the files that a run writes, and nothing else, from a folder."""
    results = ("trajectory.dcd", "log.csv", "final.pdb", "final_state.xml", "summary.png")
    failure = ("message.txt", "system.xml", "state.xml", "integrator.xml", "positions.pdb")
    begun = ("run.json", "start.pdb", "system.xml", "checkpoint.zip")
    for name in (*begun, *results, *(f"failure/{n}" for n in failure)):
        (folder / name).unlink(missing_ok=True)
