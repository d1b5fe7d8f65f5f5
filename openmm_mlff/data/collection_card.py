"""the card of a dataset of many molecules -> a page to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

SPLITS = ("train", "valid", "test")


def shards_sha256(card: Mapping[str, Any]) -> str:
    """One sha256 for the names and checksums of all shards."""
    text = json.dumps({name: entry["sha256"] for name, entry in card["shards"].items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def figures(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card's figures without its lists of formulas, groups and shards."""
    splits = card.get("splits", {})
    return {
        "name": card["name"],
        "made_by": card["made_by"],
        "method": card["method"],
        "versions": card["sampling"].get("versions", {}),
        "structures": card["n_structures"],
        "atoms": card["n_atoms"],
        "groups": card["n_groups"],
        "splits": splits.get("structures", {}),
        "groups_of_splits": {split: len(groups) for split, groups in splits.get("groups", {}).items()},
        "charges": card["charges"],
        "multiplicities": card["multiplicities"],
        "elements": card["elements"],
        "ranges": card["ranges"],
        **card["collection"],
        "held_out_by_recipe": card["sampling"]["recipe"].get("split", {}),
        "failures": card["failures"],
        "shards": len(card["shards"]),
        "bytes": sum(entry["bytes"] for entry in card["shards"].values()),
        "sha256_of_shards": shards_sha256(card),
        **({"rounds": card["rounds"]} if "rounds" in card else {}),
    }


def markdown(card: Mapping[str, Any]) -> str:
    """A page with what the dataset holds, how it was made, what is held out, and its checksum."""
    f = figures(card)
    ranges = f["ranges"]
    splits = ", ".join(f"{f['splits'].get(s, 0)} {s}" for s in SPLITS)
    lines = [
        f"# {f['name']}",
        "",
        f"{f['structures']} structures ({f['atoms']} atoms, {f['groups']} groups), labelled by {f['method']['method']} "
        f"({f['method']['program']}; energies relative to {f['method'].get('energy_reference', 'unknown')}; open "
        f"shells: {f['method'].get('open_shells', 'unknown')}). Split by group: {splits}.",
        "",
        "## Classes",
        "",
        "The class is that of the frame: a zwitterion that has lost its charges on the way counts as what it became. "
        "Forces in eV/Å, per component; `families` are test structures whose whole family was held out.",
        "",
        *_table(
            ["class", "structures", *SPLITS, "families", "force rms", "force max"],
            [
                [
                    name,
                    row["all"],
                    *(row.get(s, 0) for s in SPLITS),
                    row["held out families"],
                    f"{row['force_component_rms']:.2f}",
                    f"{row['force_component_max']:.1f}",
                ]
                for name, row in f["classes"].items()
            ],
        ),
        "",
        "## What else",
        "",
        *_table(
            ["", ""],
            [
                ["charge", _list(f["charges"])],
                ["multiplicity", _list(f["multiplicities"])],
                ["atoms of elements", _list(f["elements"])],
                ["atoms in a structure", _list(f["sizes"])],
                ["made by", _list(f["sources"])],
                ["protons", _list(f["protonation"])],
                [
                    "energy per atom, eV",
                    f"{ranges['energy_per_atom_min']:.2f} to {ranges['energy_per_atom_max']:.2f}, "
                    f"mean {ranges['energy_per_atom_mean']:.2f}",
                ],
                ["force components, eV/Å", f"rms {ranges['force_component_rms']:.2f}"],
                ["left out", f["failures"]["count"]],
                ["shards", f"{f['shards']}, {f['bytes'] / 1e6:.1f} MB"],
                ["sha256 of the list of shards", f"`{f['sha256_of_shards']}`"],
            ],
        ),
        "",
        "## Held out",
        "",
        "No structure that has one of these in any part is in the training set.",
        "",
        "```json",
        json.dumps(f["held_out_by_recipe"], indent=1, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    return [
        "| " + " | ".join(cells[0]) + " |",
        "| " + " | ".join("---" for _ in head) + " |",
        *("| " + " | ".join(row) + " |" for row in cells[1:]),
    ]


def _list(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in table.items())
