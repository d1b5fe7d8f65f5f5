"""``openmm-mlff dataset build`` and ``select``: a dataset of many molecules from a recipe, and its further rounds."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

BUILD_HELP = "make a dataset of many molecules from a recipe (YAML)"


def add_build(actions: Any) -> None:
    """Add the action ``build`` to those of ``openmm-mlff dataset``."""
    parser = actions.add_parser("build", help=BUILD_HELP, description=BUILD_HELP)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path, help="folder of the dataset; a second run goes on with what is missing")
    parser.add_argument("--processes", "-j", type=int, default=1, help="at once, one thread each (default: 1)")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="only systems of these classes")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of each system's structures, to try (default: 1)"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be made, and make nothing")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(func=run_build)


def run_build(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from openmm_mlff.data.collection_card import markdown
    from openmm_mlff.sampling.collection_build import build_collection
    from openmm_mlff.sampling.collection_recipe import read_collection

    recipe = read_collection(args.recipe)
    if args.classes:
        recipe = recipe.of_classes(args.classes)
    recipe = recipe.scaled(args.scale)
    if args.plan:
        _print_plan(recipe)
        return 0
    dataset = build_collection(recipe, args.output, args.processes, not args.no_progress)
    print(markdown(dataset.card))
    return 0


def _print_plan(recipe: Any) -> None:
    """Systems and structures by family and split."""
    families: dict[str, dict[str, int]] = {}
    for system in recipe.systems:
        row = families.setdefault(system.family, {"systems": 0, "train": 0, "valid": 0, "test": 0})
        row["systems"] += 1
        row[system.split] += system.frames
    print(f"{'family':28} {'systems':>8} {'train':>8} {'valid':>8} {'test':>8}")
    for family, row in families.items():
        print(f"{family:28} " + " ".join(f"{row[key]:8d}" for key in ("systems", "train", "valid", "test")))
    totals = {key: sum(row[key] for row in families.values()) for key in ("systems", "train", "valid", "test")}
    print(f"{'all':28} " + " ".join(f"{value:8d}" for value in totals.values()))
