"""numbers -> pictures of a training: loss curves and parity plots (PNG)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.analysis.errors import QUANTITIES, Comparison, error_table

BLUE, ORANGE, GREY = "#1f5fa8", "#d9720b", "#8a8a8a"
#: axis labels of what is compared; energies are plotted relative to the mean reference
_AXES = {
    "energy": ("relative energy", "eV"),
    "forces": ("force component", "eV/Å"),
    "dipole": ("dipole component", "e·Å"),
    "charges": ("atomic charge", "e"),
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.dpi": 150,
}


def pyplot() -> Any:
    """matplotlib.pyplot without windows; raises `ImportError` naming the extra where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"pictures need the package matplotlib ({error}); install it with: pip install 'openmm-mlff[train]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a PNG under a temporary name, move it, and close the figure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot().close(figure)
    return path


def plot_history(history: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """Losses, validation errors and learning rate against the step.

    Args:
        history: rows of `training.loop` (``step``, ``learning_rate``, ``train_loss``, ``valid_loss``, ``valid_*_mae``).

    Raises `ValueError` for an empty history.
    """
    if len(history) == 0:
        raise ValueError("history: expected at least one validation, got none")
    plt = pyplot()
    from matplotlib.ticker import LogLocator

    steps = np.array([row["step"] for row in history])

    def column(name: str) -> np.ndarray:
        return np.array([row.get(name, np.nan) for row in history], dtype=np.float64)

    quantities = [q for q in ("forces", "energy", "dipole") if any(f"valid_{q}_mae" in row for row in history)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 1 + len(quantities), figsize=(3.4 * (1 + len(quantities)), 3.0), squeeze=False)
        _plot_losses(axes[0, 0], steps, column)
        for axis, quantity in zip(axes[0, 1:], quantities, strict=True):
            values = column(f"valid_{quantity}_mae")
            axis.plot(steps, values, color=BLUE, marker="o" if len(steps) < 3 else None)
            axis.set_yscale("log")
            for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            axis.set_title(f"{quantity}: validation MAE")
            axis.set_ylabel(QUANTITIES[quantity][0])
            axis.axhline(np.nanmin(values), color=GREY, linewidth=0.8, linestyle=":")
            axis.annotate(
                f"best {np.nanmin(values):.3g}", (0.02, np.nanmin(values)), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", ha="left", color=GREY, fontsize=8,
            )  # fmt: skip
        for axis in axes[0]:
            axis.set_xlabel("step")
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
        figure.tight_layout()
    return save_figure(figure, path)


def _plot_losses(axis: Any, steps: np.ndarray, column: Any) -> None:
    """Training and validation loss, with the learning rate on a second axis."""
    axis.plot(steps, column("train_loss"), color=ORANGE, label="training")
    axis.plot(steps, column("valid_loss"), color=BLUE, label="validation")
    axis.set_yscale("log")
    axis.set_title("loss")
    rate = axis.twinx()
    rate.plot(steps, column("learning_rate"), color=GREY, linewidth=0.8, linestyle="--")
    rate.set_yscale("log")
    rate.set_ylabel("learning rate (dashed)", color=GREY)
    rate.tick_params(colors=GREY)
    rate.spines["right"].set_visible(True)
    rate.spines["right"].set_color(GREY)
    axis.legend(loc="best", fontsize=8)


def plot_parity(comparison: Comparison, path: str | Path, title: str = "") -> Path:
    """Prediction against reference for every quantity, with the errors' distribution below.

    Raises `ValueError` if nothing can be compared.
    """
    quantities = comparison.quantities
    if not quantities:
        raise ValueError("comparison: expected at least one quantity with predictions and references, got none")
    plt = pyplot()
    row = error_table(comparison, "all", samples=2)[0]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(quantities), figsize=(3.2 * len(quantities), 4.6), squeeze=False, height_ratios=[3, 1.3]
        )
        for (top, bottom), quantity in zip(axes.T, quantities, strict=True):
            _parity_panel(plt, top, comparison, quantity)
            _error_panel(bottom, comparison.errors(quantity).ravel(), quantity, row)
        if title:
            figure.suptitle(title, fontsize=11)
        figure.tight_layout()
    return save_figure(figure, path)


def _parity_panel(plt: Any, axis: Any, comparison: Comparison, quantity: str) -> None:
    x = np.asarray(comparison.reference[quantity], dtype=np.float64).ravel()
    y = np.asarray(comparison.predicted[quantity], dtype=np.float64).ravel()
    known = ~np.isnan(x)
    x, y = x[known], y[known]
    name, unit = _AXES[quantity]
    if quantity == "energy":
        x, y = x - x.mean(), y - x.mean()
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    pad = 0.03 * (high - low) or 1e-3
    limits = (low - pad, high + pad)
    axis.plot(limits, limits, color=GREY, linewidth=0.8, zorder=0)
    if len(x) > 5000:
        axis.hexbin(x, y, gridsize=90, bins="log", cmap="Blues", mincnt=1, extent=(*limits, *limits), linewidths=0.1)
    else:
        axis.plot(x, y, ".", color=BLUE, markersize=2.5, alpha=0.6)
    axis.set_xlim(limits)
    axis.set_ylim(limits)
    axis.set_aspect("equal")
    axis.set_title(name)
    axis.set_xlabel(f"reference ({unit})")
    axis.set_ylabel(f"predicted ({unit})")


def _error_panel(axis: Any, errors: np.ndarray, quantity: str, row: Mapping[str, Any]) -> None:
    errors = errors[~np.isnan(errors)]
    width = np.quantile(np.abs(errors), 0.995) or 1e-6
    axis.hist(np.clip(errors, -width, width), bins=60, color=BLUE, alpha=0.8)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(f"error ({QUANTITIES[quantity][0]})")
    axis.set_title(f"MAE {row[f'{quantity}_mae']:.3g}, RMSE {row[f'{quantity}_rmse']:.3g}", fontsize=8)
