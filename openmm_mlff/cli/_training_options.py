"""What the commands train and evaluate share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"), help="default: cpu")


def overrides(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options among `names` that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def set_options(content: dict[str, Any], assignments: Sequence[str], own_trainer: bool = True) -> None:
    """Put ``NAME=VALUE`` texts into a recipe's tables.

    Names without a dot are options of the family's trainer if it has one of its own, or else of the recipe itself.
    Values are JSON, or lists with commas, or else texts. Raises `ValueError` for a text without ``=``.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"--set: expected NAME=VALUE, got {assignment!r}")
        section, dot, key = name.partition(".")
        if not dot and not own_trainer:
            content[name] = _value(text)
            continue
        table = content.setdefault(section if dot else "trainer", {})
        if not isinstance(table, dict):
            raise ValueError(f"--set: {section!r} is no table of the recipe, in {assignment!r}")
        table[key if dot else name] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [_value(part) for part in text.split(",")] if "," in text else text


def show_table(report: Mapping[str, Any], title: str, keys: tuple[str, ...] = (), limit: int = 40) -> None:
    """Print a report (see `training.evaluation.write_report`) with rich: all structures, then tables by `keys`.

    Args:
        keys: ways to take structures together; those that the report does not have are left out.
        limit: rows that are shown of each.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    row = report["tables"]["all"][0]
    table = Table(title=f"{title}: {row['structures']} structures in {row['groups']} groups")
    table.add_column("")
    for column in ("MAE", "RMSE", "largest", "unit"):
        table.add_column(column, justify="left" if column == "unit" else "right")
    for quantity, unit in report["units"].items():
        if f"{quantity}_mae" in row:
            cells = [_number(row, f"{quantity}_mae"), _number(row, f"{quantity}_rmse"), f"{row[f'{quantity}_max']:.3g}"]
            table.add_row(quantity, *cells, unit)
    console.print(table)
    for key in (k for k in keys if k in report["tables"]):
        table = Table(title=f"{title}: MAE by {key}")
        table.add_column(key)
        for column in ("n", *(f"{quantity} ({unit})" for quantity, unit in report["units"].items())):
            table.add_column(column, justify="right")
        rows = report["tables"][key]
        for row in rows[:limit]:
            table.add_row(row["name"], str(row["structures"]), *(_number(row, f"{q}_mae") for q in report["units"]))
        if len(rows) > limit:
            table.caption = f"{len(rows) - limit} more rows are in the JSON file"
        console.print(table)


def show_models(report: Mapping[str, Any], limit: int = 40) -> None:
    """Print errors of several models side by side (see `training.evaluation.write_side_by_side`): MAE by key."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for key, rows in report["tables"].items():
        table = Table(title="MAE of the models" if key == "all" else f"MAE of the models by {key}")
        table.add_column("" if key == "all" else key)
        table.add_column("n", justify="right")
        columns = [(q, unit) for q, unit in report["units"].items() if q in ("energy", "forces")]
        for quantity, unit in columns:
            for model in report["models"]:
                table.add_column(f"{quantity} ({unit})\n{model}", justify="right")
        for row in rows[:limit]:
            cells = [_number(row[model], f"{quantity}_mae") for quantity, _ in columns for model in report["models"]]
            table.add_row(row["name"], str(row["structures"]), *cells)
        if len(rows) > limit:
            table.caption = f"{len(rows) - limit} more rows are in the JSON file"
        console.print(table)


def _number(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    error = row.get(f"{name}_error")
    return f"{row[name]:.3g}" if error is None else f"{row[name]:.3g} ± {error:.1g}"
