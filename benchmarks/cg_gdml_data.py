"""All-atom data for the coarse-grained model of capped alanine, from examples/recipes/cg_ala2.toml.

About 310 ns of dynamics in trajectories of 10 ns; started again, it goes on with the trajectories that are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _common import HERE

from openmm_mlff.sampling.biased_recipes import read_biased_recipe, sample_biased

RECIPE = HERE.parent / "examples" / "recipes" / "cg_ala2.toml"
OUTPUT = HERE.parent / ".work" / "cg_ala2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--processes", type=int, default=4)
    arguments = parser.parse_args()
    outcome = sample_biased(read_biased_recipe(arguments.recipe), arguments.output, arguments.processes)
    print(f"{len(outcome.made)} trajectories made, {len(outcome.kept)} were there, {len(outcome.failed)} failed")
    if outcome.failed:
        raise SystemExit(next(iter(outcome.failed.values())))


if __name__ == "__main__":
    main()
