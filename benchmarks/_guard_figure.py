"""The picture of runs with a guard: uncertainty and error of the energy, and where two limits end the runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _guard_runs import WRONG, by_guard, molecule_of, with_own_limits

from openmm_mlff.analysis.plots import GREY, STYLE, pyplot, save_figure

Runs = Mapping[str, list[dict[str, Any]]]


def draw(found: Runs, titles: Mapping[str, str], colors: Mapping[str, str], limit: float,
         own_limits: Mapping[str, float], path: Path) -> None:  # fmt: skip
    """Uncertainty above, error of the energy below, by kind of run; marks are where the limits end a run.

    Args:
        found: runs with their rows, by kind; those at 300 K are `calm`. titles: by kind. colors: by molecule.
        limit: of the model file. own_limits: by molecule; eV/angstrom.
    """
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullLocator

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.4), sharex="col", sharey="row", layout="constrained")
        for column, (part, title) in zip(axes.T, titles.items(), strict=True):
            owned = with_own_limits(found[part], own_limits)
            for run, own in zip(found[part], owned, strict=True):
                color = colors[molecule_of(run)]
                _draw_run(column, run, color, limit, thin=part == "calm")
                _draw_own(column, own, color, own_limits[molecule_of(run)])
            by_own = sum(run["stopped_ps"] is not None for run in owned)
            by_file = sum(run["stopped"] is not None if part == "calm" else by_guard(run) for run in found[part])
            counts = f"stopped: {by_own} of {len(owned)} by own limits, {by_file} by the file's"
            column[0].set_title(f"{title}\n{counts}", fontsize=8.5)
            column[1].set_xlabel("time (ps)")
            for name, own_limit in own_limits.items():
                column[0].axhline(own_limit, color=colors[name], lw=0.8, ls=":")
        for row, level, text in zip(axes, (limit, WRONG), ("limit of the file", f"{WRONG:g} eV"), strict=True):
            for panel in row:
                panel.axhline(level, color="black", lw=0.8, ls="--")
                panel.set_yscale("log")
            row[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            row[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            row[0].yaxis.set_minor_locator(NullLocator())
            row[0].annotate(text, (0.02, level), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8)
        highest = max(own_limits.values())
        axes[0, 0].annotate(
            "own limits", (0.02, highest), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8
        )
        axes[0, 0].set_ylabel("largest force uncertainty (eV/Å)")
        axes[1, 0].set_ylabel("|energy error| (eV)")
        axes[1, 0].set_ylim(0.01, None)
        # room for the words above the line
        axes[0, 0].set_ylim(None, max(1.6 * limit, axes[0, 0].get_ylim()[1]))
        lines = [plt.Line2D([], [], color=color, label=name) for name, color in colors.items()]
        dot, diamond = (
            plt.Line2D([], [], color=face, marker=marker, markeredgecolor=edge, ls="", label=label)
            for marker, face, edge, label in (
                ("o", GREY, "black", "stopped by the file's limit"),
                ("D", "white", GREY, "by the own limit"),
            )
        )
        figure.legend(handles=[*lines, dot, diamond], loc="outside lower center", ncols=5, fontsize=8)
    save_figure(figure, path)


def _draw_run(column: Any, run: dict[str, Any], color: str, limit: float, thin: bool) -> None:
    rows = run["rows"]
    style = {"color": color, "lw": 0.4 if thin else 0.8, "alpha": 0.8}
    error = np.abs(np.array(rows["error"], dtype=float))
    ps = np.array(rows.get("error_ps", rows["ps"]))
    column[0].plot(rows["ps"], rows["uncertainty"], **style)
    column[1].plot(ps, error, **({**style, "lw": 0, "marker": ".", "ms": 3} if thin else style))
    end = run["ps"] if thin and run["stopped"] is not None else run.get("stopped_ps")
    if end is not None and (thin or by_guard(run)):
        _mark(column, end, limit, run.get("error_where_stopped_eV"), "o", color, "black")


def _draw_own(column: Any, run: dict[str, Any], color: str, limit: float) -> None:
    if run["stopped_ps"] is not None:
        _mark(column, run["stopped_ps"], limit, run["error_where_stopped_eV"], "D", "white", color)


def _mark(column: Any, ps: float, limit: float, error: float | None, marker: str, face: str, edge: str) -> None:
    style = {"marker": marker, "color": face, "markeredgecolor": edge, "ms": 5, "zorder": 3 if marker == "o" else 4}
    column[0].plot([ps], [limit], **style)
    if error is not None:
        column[1].plot([ps], [error], **style)
