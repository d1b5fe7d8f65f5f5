"""What the dataset of `examples/recipes/spookynet-gfn2-bio.yaml` holds: counts, ranges, what is held out, checksums.

    python benchmarks/bio_dataset.py DATASET [ROUND ...]

Prints the dataset's page and copies the figures of its card to ``bio_dataset.json``: the dataset itself is too large
for the repository. Rounds of active learning (folders that ``openmm-mlff dataset select`` made) are added one by one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _common import write

from openmm_mlff.data.collection_card import figures, markdown, shards_sha256
from openmm_mlff.data.datasets import Dataset


def round_figures(path: Path) -> dict[str, Any]:
    """A round's own account of itself, and its counts by class."""
    card = Dataset(path).card
    return {
        "name": card["name"],
        **card["round"],
        "classes": {name: row["all"] for name, row in card["collection"]["classes"].items()},
        "failures": card["failures"]["count"],
        "sha256_of_shards": shards_sha256(card),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("rounds", type=Path, nargs="*")
    args = parser.parse_args()
    dataset = Dataset(args.dataset)
    dataset.verify()
    print(markdown(dataset.card))
    found = figures(dataset.card)
    if args.rounds:
        found["rounds"] = [round_figures(path) for path in args.rounds]
    write("bio_dataset", found)


if __name__ == "__main__":
    main()
