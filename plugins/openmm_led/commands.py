"""``openmm-mlff led train|run|validate``: trajectories -> a trained LED, its runs, and how both compare with MD.

Imports of anything heavy are inside the functions that run, so that the help is quick.
"""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Learn the effective dynamics of a molecule from its trajectories, by an autoencoder and a recurrent mixture-density
network (Vlachas et al., J. Chem. Theory Comput. 18, 538 (2022)); run it alone or in turn with OpenMM; hold it against
molecular dynamics."""

TRAIN = """\
Train a model on trajectories of one molecule: topology and times between frames must be the same in all of them. Whole
trajectories are held back for validation. Run again with the same arguments, a stopped training goes on."""

RUN = """\
Run a trained model: latent steps alone (--micro 0, no force field needed), or in turn with molecular dynamics in OpenMM
(--micro N and --forcefield or --system). Writes latent.csv, the trajectory of the solute, rounds.csv, checkpoint,
run.json, summary.json and summary.png. Ctrl-C stops cleanly; --resume goes on."""

VALIDATE = """\
Compare a trained model with molecular dynamics that it has not seen: latent runs as long as the test trajectories, from
their beginnings; distributions, time scales, passages between metastable states and the geometry of decoded frames, as
a table, JSON and pictures."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``led`` with its three parts."""
    parser = subparsers.add_parser("led", help="learned latent dynamics: train, run, validate", description=DESCRIPTION)
    parts = parser.add_subparsers(dest="part", metavar="PART", title="parts", required=True)
    _add_train(parts)
    _add_run(parts)
    _add_validate(parts)


def _part(parts: argparse._SubParsersAction, name: str, text: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parts.add_parser(name, help=text, description=description)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--topology", required=name != "run", metavar="FILE", help="PDB or mmCIF of all atoms")
    parser.add_argument("--solute", metavar="SELECTION", default="auto", help="auto (everything but water and ions), "
                        "all, or an mdtraj selection (auto)")  # fmt: skip
    parser.add_argument("--output", "-o", required=True, metavar="FOLDER", help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is random (0)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (1)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _add_train(parts: argparse._SubParsersAction) -> None:
    parser = _part(parts, "train", "trajectories -> a model file", TRAIN)
    parser.add_argument("--trajectories", nargs="+", required=True, metavar="FILE", help="whatever mdtraj reads")
    held_back = parser.add_mutually_exclusive_group()
    held_back.add_argument("--valid", nargs="+", metavar="FILE", help="trajectories for validation")
    held_back.add_argument("--valid-fraction", type=float, default=0.2, metavar="X",
                           help="of whole --trajectories, held back for validation (0.2)")  # fmt: skip
    parser.add_argument("--interval", type=float, metavar="PS", help="between frames; the files' if not given")
    parser.add_argument("--temperature", type=float, metavar="K", help="of the trajectories")
    parser.add_argument("--features", choices=("internal", "distances", "cartesian"), default="internal",
                        help="what the encoder sees (internal)")  # fmt: skip
    parser.add_argument("--atoms", choices=("heavy", "backbone", "all"), default="heavy",
                        help="that are learned; others are put back by a template (heavy)")  # fmt: skip
    parser.add_argument("--latent-dim", type=int, metavar="N", help="1 to 8 (2)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="any field of LEDConfig or LEDOptions, such as hidden=64, decoder_widths=128,128 or "
                        "propagator_steps=20000; may be repeated")  # fmt: skip
    parser.add_argument("--no-validate", dest="validate", action="store_false", help="leave out the report")
    _add_comparison(parser)
    parser.set_defaults(func=_train)


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("comparison with molecular dynamics")
    group.add_argument("--lag", type=int, metavar="FRAMES", help="at which time scales are compared (by length)")
    group.add_argument("--sets", type=int, default=2, metavar="N", help="metastable sets of states (2)")
    group.add_argument("--states", type=int, default=100, metavar="N", help="of Markov models (100)")
    group.add_argument("--copies", type=int, default=4, metavar="N", help="latent runs per trajectory (4)")
    group.add_argument("--baselines", action="store_true", help="beside a Markov state model and a linear model")


def _add_run(parts: argparse._SubParsersAction) -> None:
    parser = _part(parts, "run", "a model file -> latent dynamics, alone or in turn with OpenMM", RUN)
    parser.add_argument("--model", metavar="FILE", help="model file of kind propagator")
    parser.add_argument("--frames", type=int, metavar="N", help="of each walker, warm-up included (1000)")
    parser.add_argument("--walkers", type=int, metavar="N", help="side by side (1)")
    parser.add_argument("--every", type=int, metavar="N", help="frames between two of the trajectory (1)")
    parser.add_argument("--format", choices=("dcd", "xtc"), help="of the trajectory (dcd)")
    parser.add_argument("--start", metavar="FILE", help="trajectory whose frames are the past of all walkers of a "
                        "purely latent run; the structure of --topology if not given")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in FOLDER, up to --frames")
    group = parser.add_argument_group("alternation")
    group.add_argument("--macro", type=int, metavar="N", help="latent frames per round (100)")
    group.add_argument("--micro", type=int, metavar="N", help="frames of MD per round; 0: latent steps alone (0)")
    group.add_argument("--warmup", type=int, metavar="N", help="frames of MD at the start (10)")
    group.add_argument("--equilibration", type=float, metavar="PS", help="of MD after a return, not recorded (2)")
    group.add_argument("--ignore-doubt", dest="watch", action="store_const", const=False,
                       help="do not return to MD where the model is unsure")  # fmt: skip
    group = parser.add_argument_group("molecular dynamics")
    force = group.add_mutually_exclusive_group()
    force.add_argument("--forcefield", nargs="+", metavar="XML", help="such as amber14-all.xml implicit/obc2.xml "
                       "(which becomes OpenMM's native force)")  # fmt: skip
    force.add_argument("--system", metavar="XML", help="a serialized System of all atoms of --topology")
    group.add_argument("--temperature", type=float, metavar="K", help="the model's if not given")
    group.add_argument("--friction", type=float, metavar="1/PS", help="(1)")
    group.add_argument("--timestep", type=float, metavar="FS", help="(4)")
    group.add_argument("--hydrogen-mass", type=float, metavar="AMU", help="(3)")
    group.add_argument("--platform", metavar="NAME", help="of OpenMM; chosen by size if not given")
    parser.set_defaults(func=_run)


def _add_validate(parts: argparse._SubParsersAction) -> None:
    parser = _part(parts, "validate", "a model against molecular dynamics it has not seen", VALIDATE)
    parser.add_argument("--model", required=True, metavar="FILE", help="model file of kind propagator")
    parser.add_argument("--trajectories", nargs="+", required=True, metavar="FILE", help="for the test")
    parser.add_argument("--train", nargs="+", metavar="FILE", help="trajectories of the training: refused if they "
                        "overlap with the test; needed for --baselines")  # fmt: skip
    parser.add_argument("--interval", type=float, metavar="PS", help="between frames; the files' if not given")
    _add_comparison(parser)
    parser.set_defaults(func=_validate)


def _train(args: argparse.Namespace) -> int:
    from openmm_led.command_train import train

    return train(args)


def _run(args: argparse.Namespace) -> int:
    from openmm_led.command_run import run

    return run(args)


def _validate(args: argparse.Namespace) -> int:
    from openmm_led.command_train import validate

    return validate(args)
