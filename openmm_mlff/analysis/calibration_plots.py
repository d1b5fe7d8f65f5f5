"""what `calibration` measures -> one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.analysis.calibration import roc
from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure


def plot_calibration(
    report: Mapping[str, Any],
    path: str | Path,
    unit: str,
    frames: tuple[np.ndarray, np.ndarray] | None = None,
    title: str = "",
    worst: float = 0.05,
) -> Path:
    """Calibration curve, error against spread in bins, rank correlation by class and, with `frames`, flagged frames.

    Args:
        report: of `calibration.report`. unit: of errors and spreads.
        frames: errors and spreads of whole frames, ``(n,)`` each, for the curve of hits against false alarms.
        worst: share of the frames that counts as bad.
    """
    plt = pyplot()
    panels = 3 + (frames is not None)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(3.5 * panels, 3.4))
        _curve(axes[0], report)
        _bins(axes[1], report, unit)
        _classes(axes[2], report)
        if frames is not None:
            _roc(axes[3], *frames, worst)
        if title:
            figure.suptitle(title, fontsize=11)
        figure.tight_layout()
    return save_figure(figure, path)


def _curve(axis: Any, report: Mapping[str, Any]) -> None:
    row = report["rows"][0]
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    axis.plot(*report["curve"], color=ORANGE, label=f"as it is: area {row['area']:.2f}")
    factor = f"spread x {report['factor']:.2g}"
    axis.plot(*report["curve_rescaled"], color=BLUE, label=f"{factor}: area {row['area_rescaled']:.2f}")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_aspect("equal")
    axis.set_xlabel("expected share of errors")
    axis.set_ylabel("found")
    axis.set_title("calibration")
    axis.legend(fontsize=8, loc="upper left" if np.mean(report["curve"][1]) < 0.5 else "lower right")


def _bins(axis: Any, report: Mapping[str, Any], unit: str) -> None:
    spread, error = (np.asarray(report["bins"][name]) for name in ("spread", "error"))
    shown = (spread > 0) & (error > 0)
    if shown.any():
        low = min(spread[shown].min(), error[shown].min()) / 1.5
        high = max(spread[shown].max(), error[shown].max()) * 1.5
        axis.plot([low, high], [low, high], color=GREY, linewidth=0.8)
        axis.loglog(spread[shown], error[shown], "o-", color=BLUE, markersize=4)
        axis.set_xlim(low, high)
        axis.set_ylim(low, high)
    axis.set_aspect("equal")
    axis.set_xlabel(f"rescaled spread ({unit})")
    axis.set_ylabel(f"error ({unit})")
    axis.set_title("root mean squares, by tenths")


def _classes(axis: Any, report: Mapping[str, Any]) -> None:
    rows = [row for row in reversed(report["rows"]) if row["spearman"] is not None]
    values = [row["spearman"] for row in rows]
    axis.barh(range(len(rows)), values, color=[ORANGE if row["name"] == "all" else BLUE for row in rows], height=0.7)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axis.set_xlim(min(0.0, *values, 0.0), 1.0)
    axis.axvline(0.0, color=GREY, linewidth=0.8)
    axis.set_xlabel("Spearman, error and spread")
    axis.set_title("rank correlation")


def _roc(axis: Any, errors: np.ndarray, spreads: np.ndarray, worst: float) -> None:
    alarms, hits = roc(errors, spreads, worst)
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    axis.plot(alarms, hits, color=BLUE)
    found = float(np.interp(0.2, alarms, hits))
    axis.plot([0.2], [found], "o", color=ORANGE)
    axis.annotate(f"{100 * found:.0f} % at 20 % false alarms", (0.23, found - 0.07), fontsize=8, color=ORANGE)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.set_aspect("equal")
    axis.set_xlabel("false alarms")
    axis.set_ylabel("flagged")
    axis.set_title(f"worst {100 * worst:g} % of the frames")
