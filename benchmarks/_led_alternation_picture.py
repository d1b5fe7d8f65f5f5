"""The picture of `led_alternation.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from _led_alternation import Run

from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure

GREEN, RED = "#3a8f4d", "#a8324a"
COLOURS = {1: ORANGE, 10: GREEN, 100: BLUE}
#: kT, of the maps
CEILING = 7.0


def draw(result: dict[str, Any], shown: dict[str, Any], water: dict[str, Any] | None, path: Path) -> Path:
    """Energies of returns, populations and times against rho, and Ramachandran maps.

    Args:
        result: what the script writes. shown, water: runs and energies of MD, without and in water.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 4, figsize=(14.0, 6.6), layout="constrained")
        _stages(axes[0, 0], shown)
        _after(axes[0, 1], result["implicit"])
        _against_rho(axes[0, 2], result["implicit"]["rows"], "alphaR")
        _against_rho(axes[0, 3], result["implicit"]["rows"], "5")
        runs: dict[int, Run] = shown["runs"]
        maps = {"molecular dynamics (test)": shown["reference"]}
        maps |= {f"rho = {rho}, all frames": np.concatenate(run.torsions) for rho, run in runs.items() if rho != 10}
        for axis, (name, angles) in zip(axes[1], maps.items(), strict=False):
            image = _map(axis, name, angles)
        figure.colorbar(image, ax=list(axes[1, :3]), label="free energy (kT)", shrink=0.9, extend="max")
        if water is None:
            axes[1, 3].set_axis_off()
        else:
            _in_water(axes[1, 3], water, result["explicit"])
    return save_figure(figure, path)


def _stages(axis: Any, shown: dict[str, Any]) -> None:
    """Distributions at rho = 10."""
    run: Run = shown["runs"][10]
    accepted = run.returned()
    stages = {s: np.array([r["energies"][s] for r in accepted]) for s in ("decoded", "minimized")}
    low, high = -150.0, -30.0
    bins = np.linspace(low, high, 81)
    lines = {
        "MD": (shown["md"], GREY, "-"),
        "MD, minimised": (shown["minimized"], GREY, "--"),
        "decoded": (stages["decoded"], RED, "-"),
        "decoded, minimised": (stages["minimized"], ORANGE, "--"),
        "first MD frame": (run.after_return()[:, 0], BLUE, "-"),
    }
    for name, (values, colour, style) in lines.items():
        heights, _ = np.histogram(values, bins)
        heights = heights / heights.max()
        beyond = float(((values < low) | (values > high)).mean())
        label = f"{name} ({beyond:.0%} beyond)" if beyond > 0.005 else name
        middle = 0.5 * (bins[1:] + bins[:-1])
        if name == "MD":
            axis.fill_between(middle, heights, color=colour, alpha=0.45, linewidth=0, step="mid", label=label)
        else:
            axis.step(middle, heights, where="mid", color=colour, linestyle=style, linewidth=1.2, label=label)
    axis.set(xlim=(low, high), ylim=(0.0, 1.5), xlabel="potential energy (kJ/mol)", yticks=[],
             ylabel="density over its maximum")  # fmt: skip
    axis.set_title("stages of a return, rho = 10, OBC2")
    axis.legend(fontsize=7, loc="upper right", ncols=2, handlelength=1.2, columnspacing=0.8, borderaxespad=0.2)


def _after(axis: Any, figures: dict[str, Any]) -> None:
    """Mean energy of the k-th frame after a return."""
    error = figures["md_energies"]["error"]
    axis.axhspan(-error, error, color=GREY, alpha=0.35, linewidth=0)
    for j, (rho, colour) in enumerate(COLOURS.items()):
        after = figures["rows"][f"rho_{rho}"]["energies"]["after_return"]
        frames = np.arange(1, 1 + len(after["error"])) + 0.15 * (j - 1)
        axis.errorbar(frames, after["mean_minus_md"], after["error"], color=colour, fmt="o", markersize=3,
                      linewidth=1.0, label=f"rho = {rho}")  # fmt: skip
    axis.axhline(0.0, color=GREY, linewidth=0.8)
    axis.set(xlabel="frame of MD after a return (ps)", ylabel="mean energy - MD (kJ/mol)", xticks=range(1, 11))
    axis.set_title("after a return, OBC2")
    axis.set_ylim(-1.25 * max(map(abs, axis.get_ylim())), 1.25 * max(map(abs, axis.get_ylim())))
    axis.legend(fontsize=8, ncols=3, loc="upper center", columnspacing=0.8, handletextpad=0.2)
    axis.grid(alpha=0.25, linewidth=0.5)


def _against_rho(axis: Any, rows: dict[str, Any], what: str) -> None:
    """The population of alphaR, or the timescale at a lag, with the value of MD as a band."""

    def of(row: dict[str, Any]) -> tuple[float, float]:
        found = row[what] if what == "alphaR" else row.get("timescale_ps", row).get(what, {})
        return found.get("value", np.nan), found.get("error", np.nan)

    value, error = of(rows["md"])
    axis.axhspan(value - error, value + error, color=GREY, alpha=0.35, linewidth=0)
    axis.axhline(value, color=GREY, linewidth=0.9, label="MD, test replicas")
    kinds = {"all frames": ("whole", BLUE), "MD frames": ("md_frames", ORANGE)}
    if what != "alphaR":
        kinds["between returns"] = ("between_returns", GREEN)
    for j, (name, (key, colour)) in enumerate(kinds.items()):
        values, errors = zip(*(of(rows[f"rho_{rho}"][key]) for rho in COLOURS), strict=True)
        x = np.arange(len(COLOURS)) + 0.12 * (j - 0.5 * (len(kinds) - 1))
        axis.errorbar(x, values, errors, color=colour, fmt="o", markersize=4, label=name)
    value, error = of(rows["led_alone"])
    axis.errorbar([len(COLOURS)], [value], [error], color=RED, fmt="s", markersize=4, label="LED alone")
    axis.set_xticks(range(len(COLOURS) + 1), [*(str(rho) for rho in COLOURS), "∞"])
    axis.set(xlabel="rho", xlim=(-0.5, len(COLOURS) + 0.5))
    axis.set_title("population of alphaR" if what == "alphaR" else f"slowest timescale, lag {what} ps (ps)")
    axis.margins(y=0.35)
    axis.legend(fontsize=7, ncols=2)


def _map(axis: Any, name: str, angles: np.ndarray) -> Any:
    counts, x, y = np.histogram2d(angles[:, 0], angles[:, 1], bins=60, range=[(-180, 180)] * 2)
    with np.errstate(divide="ignore"):
        energy = np.log(counts.max()) - np.log(counts)
    image = axis.pcolormesh(x, y, np.ma.masked_invalid(energy).T, cmap="viridis", vmin=0.0, vmax=CEILING,
                            rasterized=True)  # fmt: skip
    axis.set(xlabel="φ (degrees)", ylabel="ψ (degrees)", xticks=range(-180, 181, 90), yticks=range(-180, 181, 90))
    axis.set_box_aspect(1)
    axis.set_title(name)
    return image


def _in_water(axis: Any, water: dict[str, Any], figures: dict[str, Any]) -> None:
    """Energies of MD and of the frames of MD after returns."""
    run: Run = water["run"]
    after = run.after_return()
    both = np.concatenate([water["md"], after.ravel()])
    bins = np.linspace(both.min(), both.max(), 41)
    for name, values, colour in (("MD", water["md"], GREY), ("all MD frames after returns", after.ravel(), ORANGE)):
        axis.hist(values, bins, density=True, histtype="stepfilled" if name == "MD" else "step", color=colour,
                  alpha=0.45 if name == "MD" else 1.0, linewidth=1.2, label=name)  # fmt: skip
    top = axis.get_ylim()[1]
    axis.plot(after[:, 0], np.full(len(after), -0.04 * top), "|", color=BLUE, label="first frames after returns")
    axis.set(xlabel="potential energy (kJ/mol)", ylabel="density", yticks=[], ylim=(-0.08 * top, 1.35 * top))
    axis.ticklabel_format(axis="x", useOffset=False)
    axis.set_title(f"{len(after)} returns in TIP3P, rho = {figures['settings']['rho']}")
    axis.legend(fontsize=7, loc="upper right")
