"""``openmm-mlff dataset build`` and ``select``: a dataset of many molecules from a recipe, and its further rounds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_mlff.sampling.collection_systems import System

BUILD_HELP = "make a dataset of many molecules from a recipe (YAML)"
SELECT_HELP = "make the next round of a dataset: label the frames that an ensemble is unsure of"


def add_build(actions: Any) -> None:
    """Add the action ``build`` to those of ``openmm-mlff dataset``."""
    parser = actions.add_parser("build", help=BUILD_HELP, description=BUILD_HELP)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path, help="folder of the dataset; a second run goes on with what is missing")
    parser.add_argument("--processes", "-j", type=int, default=1, help="at once, one thread each (default: 1)")
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="make only these classes now")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of each system's structures, to try (default: 1)"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be made, and make nothing")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(func=run_build)


def add_select(actions: Any) -> None:
    """Add the action ``select`` to those of ``openmm-mlff dataset``."""
    parser = actions.add_parser("select", help=SELECT_HELP, description=SELECT_HELP)
    parser.add_argument("dataset", type=Path, help="its training set gives the starts; its card will list the round")
    parser.add_argument("models", type=Path, nargs="+", help="an ensemble, or two and more models of one family")
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder of the round")
    parser.add_argument("--starts", type=int, default=200, help="trajectories (default: %(default)s)")
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="start from these classes only")
    parser.add_argument("--structures", type=int, default=500, help="to keep at most (default: %(default)s)")
    parser.add_argument("--per-group", type=int, default=5, help="of one molecule at most (default: %(default)s)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 500.0, 700.0], metavar="K")
    parser.add_argument("--duration", type=float, default=500.0, help="of a trajectory, fs (default: %(default)s)")
    parser.add_argument("--stride", type=float, default=20.0, help="between frames, fs (default: %(default)s)")
    parser.add_argument("--timestep", type=float, default=0.5, help="fs (default: %(default)s)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="spread of forces, eV/angstrom (default: the ensemble's limit, or a quarter)",
    )
    parser.add_argument("--nonsense", type=float, default=5.0, help="spread that ends a trajectory (default: 5)")
    parser.add_argument("--difference", type=float, default=0.1, help="between frames of one molecule (angstrom)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--processes", "-j", type=int, default=1, help="at once, one thread each (default: 1)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(func=run_select)


def run_select(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from openmm_mlff.sampling.collection_rounds import select_round
    from openmm_mlff.sampling.selection import SelectionSettings

    settings = SelectionSettings(
        structures=args.structures,
        per_group=args.per_group,
        temperatures=tuple(args.temperatures),
        duration=args.duration,
        stride=args.stride,
        timestep=args.timestep,
        threshold=args.threshold,
        nonsense=args.nonsense,
        difference=args.difference,
        seed=args.seed,
    )
    dataset = select_round(
        args.dataset,
        args.models,
        args.output,
        settings,
        starts=args.starts,
        classes=args.classes,
        processes=args.processes,
        progress=not args.no_progress,
    )
    entry = dataset.card["round"]
    print(f"{dataset.path}: {len(dataset)} structures of {entry['candidates']} frames, {entry['trajectories']} runs")
    quantiles = ", ".join(f"{share} {value:.3g}" for share, value in entry["spread_of_candidates"].items())
    print(f"spread of forces from {entry['threshold']:.3g} eV/angstrom on; quantiles of all frames: {quantiles}")
    for reason, count in entry["ended_early"].items():
        print(f"{count} runs ended early: {reason}")
    return 0


def run_build(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from openmm_mlff.data.collection_card import markdown
    from openmm_mlff.sampling.collection_build import build_collection
    from openmm_mlff.sampling.collection_recipe import read_collection

    recipe = read_collection(args.recipe).scaled(args.scale)
    if args.plan:
        _print_plan(recipe.of_classes(args.classes))
        return 0
    dataset = build_collection(recipe, args.output, args.processes, not args.no_progress, args.classes)
    print(markdown(dataset.card))
    return 0


def _print_plan(systems: Sequence[System]) -> None:
    """Systems and structures by family and split."""
    families: dict[str, dict[str, int]] = {}
    for system in systems:
        row = families.setdefault(system.family, {"systems": 0, "train": 0, "valid": 0, "test": 0})
        row["systems"] += 1
        row[system.split] += system.frames
    print(f"{'family':28} {'systems':>8} {'train':>8} {'valid':>8} {'test':>8}")
    for family, row in families.items():
        print(f"{family:28} " + " ".join(f"{row[key]:8d}" for key in ("systems", "train", "valid", "test")))
    totals = {key: sum(row[key] for row in families.values()) for key in ("systems", "train", "valid", "test")}
    print(f"{'all':28} " + " ".join(f"{value:8d}" for value in totals.values()))
