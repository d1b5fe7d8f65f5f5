"""a comparison of a model with molecular dynamics -> a table, JSON and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from openmm_led.comparison import Comparison, Kinetics
from openmm_mlff.data.files import write_atomically

REPORT = "report.json"


def write_report(comparison: Comparison, folder: str | Path) -> Path:
    """Write ``report.json`` and the pictures into a folder; returns the path of the report."""
    from openmm_led.report_plots import plot_all

    folder = Path(folder)
    pictures = plot_all(comparison, folder)
    content = to_dict(comparison) | {"pictures": [p.name for p in pictures]}
    return write_atomically(folder / REPORT, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison without its frames, as plain data; numbers that are not numbers become null."""
    rows = [
        {"section": row.section, "quantity": row.quantity, "unit": row.unit,
         "values": {name: {"value": value, "error": error} for name, (value, error) in row.values.items()}}
        for row in comparison.rows
    ]  # fmt: skip
    kinetics = {
        space: {source: _kinetics(k) for source, k in sources.items()} for space, sources in comparison.kinetics.items()
    }
    return _plain(
        {
            "about": comparison.about,
            "settings": dataclasses.asdict(comparison.settings) | {"lag_ps": comparison.lag * comparison.interval},
            "notes": comparison.notes,
            "rows": rows,
            "kinetics": kinetics,
        }
    )


def _kinetics(k: Kinetics) -> dict[str, Any]:
    found: dict[str, Any] = {"timescales": dataclasses.asdict(k.timescales)}
    found["passages"] = [p.summary() for p in k.passages.values()]
    if k.test is not None:
        found["chapman_kolmogorov"] = {n: v for n, v in dataclasses.asdict(k.test).items() if n != "memberships"}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def show(comparison: Comparison) -> None:
    """Print the table with rich, a column per source."""
    from rich.console import Console
    from rich.table import Table

    order = ["MD", "LED", "autoencoder", "training MD", "MD floor"]
    there = {name for row in comparison.rows for name in row.values}
    sources = [n for n in order if n in there] + sorted(there - set(order))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    section = ""
    table = Table()
    for row in shortened(comparison):
        if row.section != section:
            if section:
                console.print(table)
            section = row.section
            title = f"{section}, lag {comparison.lag * comparison.interval:g} ps" if "time" in section else section
            shown = [n for n in sources if any(n in r.values for r in comparison.rows if r.section == section)]
            table = Table(title=title, title_justify="left")
            table.add_column("")
            for name in shown:
                table.add_column(name, justify="right")
            table.add_column("")
        table.add_row(row.quantity, *(_cell(row.values.get(n)) for n in shown), row.unit)
    if section:
        console.print(table)
    for note in comparison.notes:
        console.print(note, highlight=False)


def shortened(comparison: Comparison, most: int = 6) -> list[Any]:
    """The rows, with those of single residues left out where there are many of them (they are in the JSON file)."""
    residues = [v.name for v in comparison.views if v.name.startswith("torsions")]
    if len(residues) <= most:
        return comparison.rows
    labels = {name.removeprefix("torsions ") for name in residues}
    return [row for row in comparison.rows if row.quantity.rpartition(" ")[2] not in labels]


def _cell(value: tuple[float, float] | None) -> str:
    if value is None or not math.isfinite(value[0]):
        return "-"
    if not math.isfinite(value[1]):
        return f"{value[0]:.3g}"
    return f"{value[0]:.3g} ± {value[1]:.2g}"
