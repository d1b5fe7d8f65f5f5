"""What the JSON files say of the figures in docs/embedding.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .common import Read, signed


def figures(read: Read) -> Iterator[str]:
    clusters = read("embedding_clusters")
    found = clusters["kcal_per_mol"]
    kinds = ("clusters, neutral", "clusters, ionic", "clusters, all")

    def cell(figure: dict[str, Any]) -> str:
        low, high = figure["interval"]
        return f"{figure['value']:.1f} [{signed(low, 1)}, {high:.1f}]"

    rows = {"mechanical": "mechanical", "electrostatic": "electrostatic",
            "electrostatic, damped (one width, fitted)": "electrostatic, damped",
            "electrostatic + induction (three numbers, fitted)": "electrostatic + induction"}  # fmt: skip
    for label, name in rows.items():
        yield f"| {label} | {' | '.join(cell(found[kind][name]['mean_absolute_error']) for kind in kinds)} |"
    gains = {name: found["clusters, all"][name]["less_than_mechanical_by"] for name in rows.values()}
    yield f"falls by {cell(gains['electrostatic'])}"
    yield f"and by {cell(gains['electrostatic + induction'])} with induction over all clusters"
    pairs = [found["pairs, all"][name]["mean_absolute_error"]["value"] for name in rows.values()]
    yield f"({found['pairs, all']['n']} pairs): {', '.join(f'{x:.2f}' for x in pairs)}"
    keywords = clusters["keywords"]["electrostatic + induction"]
    yield f'"dampingLength": {keywords["dampingLength"]:.3f}'
    yield ", ".join(f'"{symbol}": {x:.3f}' for symbol, x in keywords["polarizabilities"].items())
    yield f'"inductionDamping": {keywords["inductionDamping"]:.2f}'
    drift = read("embedding_nve")["drift"]
    for name, figure in drift.items():
        value, error = figure["meV_per_atom_per_ps"] * 1e5, figure["standard_error"] * 1e5
        yield f"{'−' if value < 0 else '+'}{abs(value):.0f} ± {error:.0f} ({name})"
    cost = read("embedding_cost")["models"]
    for label, name in (("SO3LR", "so3lr"), ("spookynet-ala2-gfn2", "spookynet-ala2-gfn2")):
        small, large = (
            [cost[name][size][way]["ratio"] for way in ("electrostatic", "with induction")] for size in cost[name]
        )
        word = "with induction " if name == "so3lr" else ""
        yield f"| {label} | {small[0]:.2f} ({word}{small[1]:.2f}) | {large[0]:.2f} ({large[1]:.2f}) |"
