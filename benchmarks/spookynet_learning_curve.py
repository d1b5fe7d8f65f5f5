"""Learning curve of a SpookyNet: error against data and against time.

    python benchmarks/spookynet_learning_curve.py --data FOLDER --config RECIPE --output FOLDER --fractions 0.1 0.3 1

Trains the recipe's model on nested parts of the training set, whole molecules each (the first of one shuffled order),
with the same number of steps and the same validation and test molecules, and compares each with the test split, all of
it and by class. Trainings are kept in --output and resumed from there; --time-limit stops in the middle of one. Time is
that of the training, validations included. Writes spookynet_learning_curve.json and .png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write

from openmm_mlff.analysis.errors import error_table
from openmm_mlff.analysis.plots import STYLE, pyplot, save_figure
from openmm_mlff.data.structures import Structure
from openmm_mlff.training import loop
from openmm_mlff.training.evaluation import compare
from openmm_mlff.training.force_matching import ForceMatching
from openmm_mlff.training.recipe import Recipe, TrainingData, load_data
from openmm_spookynet import SpookyNet, SpookyNetConfig

NAME = "spookynet_learning_curve"


def part_of(structures: Sequence[Structure], fraction: float, seed: int) -> list[Structure]:
    """Structures of the first groups of a shuffled order that hold at least this share: parts of larger parts."""
    groups = np.random.default_rng(seed).permutation(sorted({s.group for s in structures})).tolist()
    size = {g: 0 for g in groups}
    for s in structures:
        size[s.group] += 1
    ends = np.cumsum([size[g] for g in groups])
    n = int(np.searchsorted(ends, fraction * len(structures) - 1e-9)) + 1
    kept = set(groups[:n])
    return [s for s in structures if s.group in kept]


def train_part(
    recipe: Recipe, data: TrainingData, fraction: float, folder: Path, deadline: float
) -> dict[str, Any] | None:
    """Errors of the model of one part; None if the time is over before it is trained."""
    train = part_of(data.splits["train"], fraction, recipe.seed)
    # every part knows all elements of the whole set, or parts could not be compared on the same molecules
    elements = tuple(sorted({int(z) for members in data.splits.values() for s in members for z in s.numbers}))
    torch.manual_seed(recipe.seed)
    model = SpookyNet(SpookyNetConfig(**{"elements": elements, **recipe.model})).train()
    method = ForceMatching(
        model,
        train,
        data.splits["valid"],
        recipe.loss,
        recipe.final_loss,
        recipe.batch_size,
        recipe.seed,
        False,
        True,
        recipe.processes,
        recipe.batch_atoms,
        recipe.native,
    )
    left = deadline - time.monotonic()
    try:
        state = loop.fit(
            model, method, recipe.loop, folder, resume=True, title=f"{len(train)} structures", time_limit=max(left, 0.0)
        )
    finally:
        method.close()
    if state.step < recipe.loop.steps:
        return None
    with loop.averaged(state) as best:
        comparison = compare(best, data.splits["test"])  # type: ignore[arg-type]
    return {
        "fraction": fraction,
        "structures": len(train),
        "molecules": len({s.group for s in train}),
        "seconds": state.history[-1]["seconds"],
        "history": [
            {k: row[k] for k in row if k in ("step", "seconds") or k.endswith("_mae")} for row in state.history
        ],
        "test": error_table(comparison)[0],
        "test_by_class": error_table(comparison, "class"),
    }


def draw(parts: Sequence[dict[str, Any]]) -> None:
    """Test errors against structures, and validation errors against hours."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator

    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.8, len(parts)))
    with plt.rc_context(STYLE):
        figure, (data, clock) = plt.subplots(1, 2, figsize=(7.6, 3.3))
        n = [p["structures"] for p in parts]
        data.loglog(n, [p["test"]["forces_mae"] for p in parts], "o-", color="#1f5fa8", label="forces (meV/Å)")
        data.loglog(n, [p["test"]["energy_mae"] for p in parts], "s-", color="#d9720b", label="energy (meV/atom)")
        data.set_xlabel("training structures")
        data.set_ylabel("MAE on molecules not seen")
        data.legend(fontsize=8)
        for part, colour in zip(parts, colours, strict=True):
            hours = [row["seconds"] / 3600.0 for row in part["history"]]
            values = [row["valid_forces_mae"] for row in part["history"]]
            clock.plot(hours, values, "o-", color=colour, markersize=3, label=f"{part['structures']} structures")
        clock.set_yscale("log")
        clock.set_xlabel("hours")
        clock.set_ylabel("validation force MAE (meV/Å)")
        clock.legend(fontsize=8)
        for axis in (data.xaxis, data.yaxis, clock.yaxis):
            axis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
                formatter(lambda value, _: f"{value:g}")
        for panel in (data, clock):
            panel.grid(alpha=0.25, linewidth=0.5)
        figure.tight_layout()
    save_figure(figure, HERE / f"{NAME}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--config", required=True, metavar="RECIPE")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.1, 0.3, 1.0])
    parser.add_argument("--time-limit", type=float, default=1e9, metavar="MINUTES")
    args = parser.parse_args()
    recipe = Recipe.read(args.config)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    data = load_data(args.data, recipe.data, recipe.seed)
    deadline = time.monotonic() + 60.0 * args.time_limit
    parts = []
    for fraction in sorted(args.fractions):
        part = train_part(recipe, data, fraction, args.output / f"part-{fraction:g}", deadline)
        if part is None:
            print(f"stopped in the part {fraction:g}; the same command goes on")
            return
        parts.append(part)
        test = part["test"]
        print(
            f"{part['structures']} structures of {part['molecules']} molecules: forces {test['forces_mae']:.1f} meV/Å, "
            f"energy {test['energy_mae']:.2f} meV/atom, {part['seconds'] / 60:.1f} min"
        )
    draw(parts)
    sources = [source["name"] for source in data.description["sources"]]
    result = {"data": sources, "recipe": recipe.to_dict(), "machine": machine(), "parts": parts}
    write(NAME, result)


if __name__ == "__main__":
    main()
