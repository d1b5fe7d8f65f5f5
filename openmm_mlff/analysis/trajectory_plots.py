"""table of a run -> one picture: energy, temperature, density and the Ramachandran plane.

Needs matplotlib (extra ``analysis``); nothing here opens a window.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_mlff.analysis.observables import mean_with_error, ramachandran_free_energy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2b6ca3", "#d9772b", "#777777"
#: samples from which a free-energy landscape says more than the points themselves.
LANDSCAPE_FROM = 2000


def torsion_pairs(columns: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The (phi, psi) series of a table by residue label (empty label for a single residue)."""
    pairs = {}
    for name in columns:
        if name == "phi" or name.startswith("phi_"):
            label = name[4:]
            partner = f"psi_{label}" if label else "psi"
            if partner in columns:
                pairs[label] = (columns[name], columns[partner])
    return pairs


def summary_figure(
    columns: Mapping[str, np.ndarray], *, ensemble: str = "nvt", temperature: float = 300.0, title: str = ""
) -> Figure:
    """Draw what a run did.

    Args:
        columns: series by name, as `observables.read_table` gives them.
        ensemble: nve shows the total energy, the others the potential energy.
        temperature: K, of the thermostat; drawn as the reference, and used for the free energy.

    Raises `ImportError` naming the extra if matplotlib is missing, and `ValueError` if there are fewer than two rows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the summary needs matplotlib: pip install 'openmm-mlff[analysis]'") from error
    time = np.asarray(columns["time_ps"])
    if len(time) < 2:
        raise ValueError(f"columns: expected at least two rows to draw, got {len(time)}")
    pairs = torsion_pairs(columns)
    boxed = "volume_nm3" in columns and ensemble == "npt"
    rows = 3 if boxed else 2
    figure = Figure(figsize=(10.5 if pairs else 7.0, 5.6 if rows == 3 else 5.0), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(rows, 2 if pairs else 1, width_ratios=[1.25, 1.0] if pairs else None)
    series = [figure.add_subplot(grid[k, 0]) for k in range(rows)]
    _draw_energy(series[0], columns, time, ensemble)
    _draw_temperature(series[1], columns, time, ensemble, temperature)
    if boxed:
        _draw_density(series[2], columns, time)
    for axes in series[:-1]:
        axes.tick_params(labelbottom=False)
    series[-1].set_xlabel("time (ps)")
    for axes in series:
        axes.set_xlim(time[0], time[-1])
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels(series)
    if pairs:
        _draw_ramachandran(figure, figure.add_subplot(grid[:, 1]), pairs, time, temperature)
    return figure


def save_summary(columns: Mapping[str, np.ndarray], path: str | Path, **options: Any) -> Path:
    """Write `summary_figure` as PNG under a temporary name and move it; returns the path."""
    path = Path(path)
    figure = summary_figure(columns, **options)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
    return path


def _draw_energy(axes: Axes, columns: Mapping[str, np.ndarray], time: np.ndarray, ensemble: str) -> None:
    name, kind = ("total_kJ_mol", "total") if ensemble == "nve" else ("potential_kJ_mol", "potential")
    energy = np.asarray(columns[name])
    axes.plot(time, energy - energy[0], color=BLUE, lw=_width(time))
    axes.axhline(0.0, color=GREY, lw=0.8, ls=":")
    axes.set_ylabel(f"{kind} energy,\nchange (kJ/mol)")


def _draw_temperature(
    axes: Axes, columns: Mapping[str, np.ndarray], time: np.ndarray, ensemble: str, target: float
) -> None:
    values = np.asarray(columns["temperature_K"])
    axes.plot(time, values, color=ORANGE, lw=_width(time))
    if ensemble != "nve":
        axes.axhline(target, color="black", lw=1.0, ls="--", zorder=3, label=f"thermostat {target:g} K")
    mean = mean_with_error(values)
    axes.plot([], [], color=ORANGE, lw=1.5, label=f"mean {mean.value:.1f} ± {mean.error:.1f} K")
    low, high = axes.get_ylim()
    # room for the legend above the curve
    axes.set_ylim(low, high + 0.3 * (high - low))
    axes.set_ylabel("temperature (K)")
    axes.legend(loc="upper right", fontsize=8, frameon=False, ncols=2)


def _width(time: np.ndarray) -> float:
    """Thin lines for long series, which would be a block of colour otherwise."""
    return 1.0 if len(time) < 500 else 0.4


def _draw_density(axes: Axes, columns: Mapping[str, np.ndarray], time: np.ndarray) -> None:
    axes.plot(time, columns["density_g_cm3"], color=BLUE, lw=1.0)
    axes.set_ylabel("density (g/cm³)")


def _draw_ramachandran(
    figure: Figure, axes: Axes, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], time: np.ndarray, temperature: float
) -> None:
    """A landscape where there are many samples of one residue; else the points, coloured by time."""
    axes.set(xlim=(-180, 180), ylim=(-180, 180), xlabel="φ (degrees)", ylabel="ψ (degrees)", aspect="equal")
    axes.set_xticks(range(-180, 181, 60))
    axes.set_yticks(range(-180, 181, 60))
    axes.axhline(0, color=GREY, lw=0.5, ls=":")
    axes.axvline(0, color=GREY, lw=0.5, ls=":")
    if len(pairs) > 1:
        for label, (phi, psi) in pairs.items():
            axes.scatter(phi, psi, s=8, alpha=0.6, lw=0, label=label)
        axes.legend(fontsize=8, markerscale=2)
        return
    phi, psi = next(iter(pairs.values()))
    if len(phi) >= LANDSCAPE_FROM:
        energy = ramachandran_free_energy(phi, psi, temperature)
        edges = np.linspace(-180, 180, len(energy) + 1)
        image: Any = axes.pcolormesh(edges, edges, np.ma.masked_invalid(energy.T), cmap="viridis", rasterized=True)
        label = "free energy (kJ/mol)"
    else:
        image = axes.scatter(phi, psi, c=time, s=12, cmap="viridis", lw=0)
        axes.plot(phi[0], psi[0], marker="o", ms=9, mfc="none", mec="black", ls="none", label="start")
        axes.legend(loc="lower right", fontsize=8)
        label = "time (ps)"
    figure.colorbar(image, ax=axes, label=label, shrink=0.7)
