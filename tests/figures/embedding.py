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
        # an interval that only just leaves zero out shows it
        return f"{figure['value']:.1f} [{signed(low, 2 if 0 < low < 0.05 else 1)}, {high:.1f}]"

    neutral, ionic, every = (found[kind] for kind in kinds)
    yield f"{every['n']} clusters of {every['solutes']} solutes"
    means = [signed(kind["mean_reference"]) for kind in (neutral, ionic)]
    yield f"| {neutral['n']} clusters of neutral solutes (mean {means[0]}) | {ionic['n']} of ions (mean {means[1]}) |"

    rows = {"mechanical": "mechanical", "electrostatic": "electrostatic",
            "electrostatic, damped (one width, fitted)": "electrostatic, damped",
            "electrostatic + induction (three numbers, fitted)": "electrostatic + induction"}  # fmt: skip
    for label, name in rows.items():
        yield f"| {label} | {' | '.join(cell(found[kind][name]['mean_absolute_error']) for kind in kinds)} |"
    gains = {name: found["clusters, all"][name]["less_than_mechanical_by"] for name in rows.values()}
    yield f"falls by {cell(gains['electrostatic'])}"
    yield f"and by {cell(gains['electrostatic + induction'])} with induction over all clusters"
    alone = [neutral[name]["less_than_mechanical_by"] for name in ("electrostatic", "electrostatic + induction")]
    yield f"for neutral solutes alone by {cell(alone[0])} and {cell(alone[1])}, so there {neutral['solutes']} solutes"
    yield f"fitted to {len(clusters['training'])} other solutes"
    pairs = [found["pairs, all"][name]["mean_absolute_error"]["value"] for name in rows.values()]
    yield f"({found['pairs, all']['n']} pairs): {', '.join(f'{x:.2f}' for x in pairs)}"
    keywords = clusters["keywords"]["electrostatic + induction"]
    yield f'"dampingLength": {keywords["dampingLength"]:.3f}'
    yield ", ".join(f'"{symbol}": {x:.3f}' for symbol, x in keywords["polarizabilities"].items())
    yield f'"inductionDamping": {keywords["inductionDamping"]:.2f}'
    runs = read("embedding_nve")
    drift = runs["drift"]
    yield f"four runs of {runs['picoseconds']:.0f} ps each"
    assert {len(figure["runs"]) for figure in drift.values()} == {4}
    scatter = {f"{figure['scatter_meV_per_atom']:.3f}" for figure in drift.values()}
    yield f"both with a scatter of {scatter.pop()} meV per atom"
    assert not scatter
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
