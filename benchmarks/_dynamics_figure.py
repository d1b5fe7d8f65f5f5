"""The picture of the benchmark of dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MODEL, TEACHER, WEIGHTED = "#1f5fa8", "#b5472f", "#5a8f3c"
SYSTEMS = {"zwitterion": "#5a8f3c", "bridge": "#8a5fa8", "sodium": "#c98a2b", "chloride": "#3a9aa8"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Six panels; those whose runs are missing stay empty."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12.0, 7.2), layout="constrained")
    peptide = result.get("zwitterion", {})
    if "model_until_a_proton_moves" in peptide:
        peptide = {**peptide, "model": peptide["model_until_a_proton_moves"]}
    _ramachandran(axes[0, 0], peptide)
    _ends(axes[0, 1], peptide)
    _shells(axes[0, 2], peptide, "Gly-Ala-Gly, water in the box")
    _bridge(axes[1, 0], result.get("bridge", {}))
    _ions(axes[1, 1], result)
    _uncertainty(axes[1, 2], result)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        if not axis.has_data():
            axis.text(0.5, 0.5, "no run yet", ha="center", va="center", transform=axis.transAxes, color="0.5")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _ramachandran(axis: Any, section: dict[str, Any]) -> None:
    for driver, color, size, layer in (("model", MODEL, 1.5, 1), ("gfn2", TEACHER, 1.5, 2)):
        if driver in section:
            angles = np.array(section[driver]["rows"]["phi_psi"])
            # as many points of each run as the eye can take
            some = angles[:: max(1, len(angles) // 1500)]
            label = f"{_name(driver)}, {section[driver]['ps']:.0f} ps"
            axis.plot(*some.T, ".", ms=size, color=color, alpha=0.6, zorder=layer, label=label)
    ticks = range(-180, 181, 90)
    axis.set(title="Gly-Ala-Gly: Ala", xlabel="φ (°)", ylabel="ψ (°)", xlim=(-180, 180), ylim=(-180, 180))
    axis.set(xticks=ticks, yticks=ticks)
    if axis.has_data():
        axis.legend(frameon=False, fontsize=8, markerscale=6, loc="upper right")


def _ends(axis: Any, section: dict[str, Any]) -> None:
    bins = np.arange(3.0, 12.01, 0.25)
    for driver, color in (("model", MODEL), ("gfn2", TEACHER)):
        if driver in section:
            ends = section[driver]["rows"]["ends"]
            axis.hist(ends, bins, density=True, histtype="step", color=color, lw=1.5, label=_name(driver))
    if "reweighted_to_gfn2" in section:
        rows = section["reweighted_to_gfn2"]["rows"]
        options = {"weights": rows["weights"], "density": True, "histtype": "step", "ls": "--", "lw": 1.2}
        axis.hist(rows["ends"], bins, color=WEIGHTED, label="model, reweighted", **options)
    axis.set(title="Gly-Ala-Gly: N to C of the ends", xlabel="distance (Å)", ylabel="probability (1/Å)")
    if axis.has_data():
        axis.legend(frameon=False, fontsize=8, loc="upper left")


def _shells(axis: Any, section: dict[str, Any], title: str) -> None:
    for driver, style in (("model", "-"), ("gfn2", "--")):
        for (name, found), color in zip(
            section.get(driver, {}).get("shells", {}).items(), ("#1f5fa8", "#b5472f"), strict=False
        ):
            short = "O about N" if "about N " in name else "O about O of COO⁻"
            rows, label = found["rows"], f"{short}, {_name(driver)}"
            axis.plot(rows["r"], rows["g"], style, color=color, lw=1.3, label=label)
    axis.set(title=title, xlabel="r (Å)", ylabel="g(r)", xlim=(2, 6.4), ylim=(0, None))
    if axis.has_data():
        axis.legend(frameon=False, fontsize=8)


def _bridge(axis: Any, section: dict[str, Any]) -> None:
    for driver, color, layer in (("model", MODEL, 1), ("gfn2", TEACHER, 2)):
        if driver in section:
            rows = section[driver]["rows"]
            axis.plot(rows["ps"], rows["apart"], color=color, lw=0.5, zorder=layer, label=_name(driver))
    axis.set(title="methylammonium and acetate, 24 waters", xlabel="time (ps)", ylabel="N to nearest O (Å)")
    if axis.has_data():
        for line in axis.legend(frameon=False, fontsize=8, loc="upper right").get_lines():
            line.set_linewidth(2)


def _ions(axis: Any, result: dict[str, Any]) -> None:
    for name, label in (("sodium", "Na⁺"), ("chloride", "Cl⁻")):
        for driver, style in (("model", "-"), ("gfn2", "--")):
            for found in result.get(name, {}).get(driver, {}).get("shells", {}).values():
                rows = found["rows"]
                axis.plot(rows["r"], rows["g"], style, color=SYSTEMS[name], lw=1.3, label=f"{label}, {_name(driver)}")
    axis.set(title="ion in 30 waters", xlabel="r (Å)", ylabel="density of O / bulk water")
    axis.set(xlim=(1.8, 6.4), ylim=(0, None))
    if axis.has_data():
        axis.legend(frameon=False, fontsize=8)


def _uncertainty(axis: Any, result: dict[str, Any]) -> None:
    limit = None
    for name, color in SYSTEMS.items():
        section = result.get(name, {}).get("model", {})
        rows = section.get("rows_of_uncertainty", {}).get("rows")
        if rows is None:
            continue
        axis.plot(rows["ps"], rows["spread"], color=color, lw=0.4, alpha=0.8, label=name)
        limit = section["uncertainty"]["limit_eV_A"]
    if limit is not None:
        axis.axhline(limit, color="black", ls="--", lw=0.9)
    axis.set(title="uncertainty (limit dashed)", xlabel="time (ps)", ylabel="of the least certain force (eV/Å)")
    axis.set_ylim(bottom=0, top=None if limit is None else 1.35 * max(limit, axis.get_ylim()[1] / 1.05))
    if axis.has_data():
        for line in axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left").get_lines():
            line.set_linewidth(2)


def _name(driver: str) -> str:
    return "GFN2-xTB" if driver == "gfn2" else "model"
