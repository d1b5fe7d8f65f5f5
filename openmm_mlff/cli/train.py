"""``openmm-mlff train``: labelled structures -> a model file."""

from __future__ import annotations

import argparse
import json
from typing import Any

from openmm_mlff.cli._training_options import add_device, overrides, set_options, show_table

DESCRIPTION = """\
Train a potential by matching energies, forces, dipoles and charges, with everything that decides the result in one
recipe (--config; the options below override it). The output folder holds the configuration, a checkpoint, the history
with its picture, the model file and its errors on the test trajectories. Ctrl-C stops cleanly; --resume goes on, also
after a crash, with the same numbers as if nothing had happened."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("train", help="labelled structures -> a trained model file", description=DESCRIPTION)
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="dataset folders or structure files")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the run is written")
    parser.add_argument("--family", help="model family (default: the recipe's, else spookynet)")
    parser.add_argument("--config", metavar="FILE", help="recipe: .toml, .json or .yaml")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, with its own recipe")
    parser.add_argument("--init", metavar="MODEL", help="model file to start from (fine-tuning)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any option of the recipe, such as model.num_modules=2, data.block_size=100 or processes=2, or of a "
        "trainer of the family's own, such as sigma=10,20,30 and n_train=200 for gdml; may be repeated",
    )
    parser.add_argument("--steps", type=int, help="optimiser steps in all")
    parser.add_argument("--batch-size", type=int, help="structures per step")
    parser.add_argument("--learning-rate", type=float, help="at the start")
    parser.add_argument("--seed", type=int, help="of initial parameters, data order and splits")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="use a compiled graph")
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        help="processes that share every batch, with a device of the kind --device each; this command is then started "
        "once for each (or by torchrun, with the same number)",
    )
    parser.add_argument("--members", type=int, metavar="N", help="train N models of seeds SEED to SEED+N-1, and join "
                        "them as an ensemble that knows where it is unsure")  # fmt: skip
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="stop then with a checkpoint (--resume)")
    parser.add_argument("--name", help="name of the model, for its card")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_device(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when the training is complete, 130 when it was stopped before."""
    import os
    from pathlib import Path

    from rich.console import Console

    from openmm_mlff.potentials.family import find_family
    from openmm_mlff.training.members import PLAN
    from openmm_mlff.training.recipe import Recipe
    from openmm_mlff.training.run import CONFIG, MODEL, train

    console = Console(stderr=True)
    of_many = (Path(args.output) / PLAN).exists()
    given = overrides(args, "family", "seed", "batch_size", "threads", "compile")
    loop = overrides(args, "steps", "learning_rate")
    recipe: Recipe | None = None
    if args.resume and (of_many or (Path(args.output) / CONFIG).exists()):
        if args.config is not None or given or loop or args.init or args.name or args.set:
            raise ValueError("--resume: the run has its own recipe; leave out --config, --init and what overrides them")
    else:
        content: dict[str, Any] = Recipe.read(args.config).to_dict() if args.config else Recipe().to_dict()
        content |= given
        content["loop"] = content["loop"] | loop | ({"seed": args.seed} if args.seed is not None else {})
        set_options(content, args.set, find_family(str(content["family"])).trainer is not None)
        recipe = Recipe.from_dict(content)
    card = {"name": args.name} if args.name else {}
    if of_many or args.members is not None:
        return _run_members(args, recipe, card)
    family = recipe.family if recipe else _resumed_family(Path(args.output))
    if find_family(family).trainer is not None:
        return _run_directly(args, recipe, card, loop)
    state = train(
        recipe,
        args.data,
        args.output,
        args.resume,
        args.init,
        args.device,
        progress=not args.quiet,
        card=card,
        devices=args.devices,
        time_limit=_seconds(args),
    )
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return 0  # the first process reports
    recipe = Recipe.from_dict(json.loads((Path(args.output) / CONFIG).read_text(encoding="utf-8"))["recipe"])
    if state.step < recipe.loop.steps and not _stopped_early(state, recipe):
        console.print(f"stopped after step {state.step} of {recipe.loop.steps}; --resume goes on")
        return 130
    _show_errors(Path(args.output))
    console.print(f"best step {state.best['step']}; model written to {Path(args.output) / MODEL}")
    return 0


def _run_members(args: argparse.Namespace, recipe: Any, card: dict[str, Any]) -> int:
    """Train the members of an ensemble one after the other."""
    from pathlib import Path

    from rich.console import Console

    from openmm_mlff.training.members import PLAN, train_members
    from openmm_mlff.training.run import MODEL

    if args.devices != 1:
        raise ValueError("--devices: expected 1 with --members; train the members by commands of their own instead")
    states = train_members(
        recipe, args.data, args.output, args.members, args.resume, args.init, args.device, not args.quiet, card,
        _seconds(args),
    )  # fmt: skip
    console, output = Console(stderr=True), Path(args.output)
    if not (output / MODEL).exists():
        n = json.loads((output / PLAN).read_text(encoding="utf-8"))["members"]
        steps = f" after step {states[-1].step}" if states else ""
        console.print(f"stopped in member {max(len(states) - 1, 0)} of {n}{steps}; --resume goes on")
        return 130
    _show_errors(output)
    console.print(f"ensemble of {len(states)} written to {output / MODEL}")
    return 0


def _seconds(args: argparse.Namespace) -> float | None:
    return None if args.time_limit is None else 60.0 * args.time_limit


def _run_directly(args: argparse.Namespace, recipe: Any, card: dict[str, Any], loop: dict[str, Any]) -> int:
    """For families that are fitted by solving equations."""
    from pathlib import Path

    from rich.console import Console

    from openmm_mlff.training.direct import train_directly
    from openmm_mlff.training.run import MODEL

    given = {"--steps": "steps" in loop, "--learning-rate": "learning_rate" in loop, "--init": args.init is not None}
    given |= {"--batch-size": args.batch_size is not None, "--compile": args.compile is not None}
    for option, was_given in given.items():
        if was_given:
            raise ValueError(f"{option}: this family is fitted by solving equations and has no such option")
    report = train_directly(recipe, args.data, args.output, args.resume, not args.quiet, card)
    console = Console(stderr=True)
    for line in report.get("notes", []):
        console.print(line, highlight=False)
    _show_errors(Path(args.output))
    chosen = ", ".join(f"{name} {value:g}" for name, value in report["chosen"].items())
    console.print(f"chosen: {chosen}; model written to {Path(args.output) / MODEL}")
    return 0


def _show_errors(output: Any) -> None:
    for split in ("test", "valid"):
        report = output / f"{split}_errors.json"
        if report.exists():
            show_table(json.loads(report.read_text(encoding="utf-8")), f"{split} split")
            return


def _resumed_family(output: Any) -> str:
    from openmm_mlff.training.run import CONFIG

    return str(json.loads((output / CONFIG).read_text(encoding="utf-8"))["recipe"]["family"])


def _stopped_early(state: Any, recipe: Any) -> bool:
    return recipe.loop.patience is not None and state.since_best > recipe.loop.patience
