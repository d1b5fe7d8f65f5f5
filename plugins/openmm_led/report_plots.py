"""a comparison, or a run -> pictures (PNG)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openmm_led.comparison import AUTOENCODER, MD, Comparison
from openmm_led.views import View
from openmm_mlff.analysis import kinetics_plots
from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure

#: Ramachandran maps of at most so many residues, the first ones
MAPS = 4
#: share of the frames on each side that may lie beyond the edges of a picture
TAIL = 5e-4


def plot_all(comparison: Comparison, folder: Path) -> list[Path]:
    """Write every picture that applies into a folder."""
    latent = View("latent", tuple(f"z{k}" for k in range(comparison.seen[MD].z[0].shape[1])), "")
    torsions = [v for v in comparison.views if v.name.startswith("torsions")]
    others = [v for v in comparison.views if v not in torsions]
    made = [_landscape(comparison, folder, view) for view in (latent, *torsions[:MAPS], *others)]
    made.append(plot_profiles(comparison, folder / "profiles.png", [latent, *torsions[:2], *others]))
    return [*made, *_kinetics(comparison, folder)]


# -- landscapes ----------------------------------------------------------------------------------------------------


def _samples(comparison: Comparison, view: View) -> dict[str, np.ndarray]:
    """Columns by source; in latent space, decoding changes nothing."""
    return {
        name: np.concatenate(seen.z if view.name == "latent" else seen.views[view.name])
        for name, seen in comparison.seen.items()
        if not (view.name == "latent" and name == AUTOENCODER)
    }


def _bounds(samples: Iterable[np.ndarray], period: float | None) -> tuple[float, float]:
    if period is not None:
        return -0.5 * period, 0.5 * period
    every = [np.quantile(x, [TAIL, 1.0 - TAIL]) for x in samples]
    low, high = min(float(e[0]) for e in every), max(float(e[1]) for e in every)
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _label(view: View, column: int) -> str:
    name = {"phi": "φ", "psi": "ψ"}.get(view.columns[column], view.columns[column])
    return f"{name} ({view.unit})" if view.unit else name


def _landscape(comparison: Comparison, folder: Path, view: View) -> Path:
    """Free energy over the first two columns, or along the only one."""
    samples = _samples(comparison, view)
    path = folder / f"{view.name.replace(' ', '_')}.png"
    title = view.name.removeprefix("torsions").strip() if view.name.startswith("torsions") else view.name
    bounds = [_bounds([x[:, c] for x in samples.values()], view.period) for c in range(min(2, len(view.columns)))]
    if len(view.columns) == 1:
        return kinetics_plots.plot_free_energy(
            {n: x[:, 0] for n, x in samples.items()}, path, label=_label(view, 0), bounds=bounds[0],
            period=view.period, title=title,
        )  # fmt: skip
    return kinetics_plots.plot_free_energy_maps(
        {n: x[:, :2] for n, x in samples.items()}, path, labels=(_label(view, 0), _label(view, 1)), bounds=bounds,
        period=view.period, title=title,
    )  # fmt: skip


def plot_profiles(comparison: Comparison, path: Path, views: list[View], most: int = 8) -> Path:
    """Free energies along single columns, all sources in one panel."""
    panels = [(view, c) for view in views for c in range(min(len(view.columns), 3))][:most]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(rows, columns, figsize=(2.7 * columns, 0.5 + 2.2 * rows), squeeze=False,
                                    layout="constrained")  # fmt: skip
        for axes, (view, column) in zip(grid.flat, panels, strict=False):
            _profile(axes, {n: x[:, column] for n, x in _samples(comparison, view).items()}, view.period, comparison)
            axes.set_xlabel(_label(view, column))
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes in grid[:, 0]:
            axes.set_ylabel("free energy (kT)")
        lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in _colours(comparison).items()]
        figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), fontsize=8)
    return save_figure(figure, path)


def _colours(comparison: Comparison) -> dict[str, str]:
    return dict(zip(comparison.seen, kinetics_plots.COLOURS, strict=False))


def _profile(axes: Any, samples: dict[str, np.ndarray], period: float | None, comparison: Comparison) -> None:
    edges = np.linspace(*_bounds(samples.values(), period), 61)
    for name, x in samples.items():
        counts = np.histogram(x, edges)[0].astype(float)
        counts[counts == 0] = np.nan
        energy = -np.log(counts / np.nanmax(counts))
        axes.plot(0.5 * (edges[1:] + edges[:-1]), energy, color=_colours(comparison)[name], lw=1.6 if name == MD else 1)
    axes.set_ylim(-0.2, kinetics_plots.CEILING)


# -- kinetics ------------------------------------------------------------------------------------------------------


def _kinetics(comparison: Comparison, folder: Path) -> Iterator[Path]:
    for space, sources in comparison.kinetics.items():
        if MD not in sources:
            continue
        times = {name: k.timescales for name, k in sources.items()}
        yield kinetics_plots.plot_implied_timescales(times, folder / f"timescales_{space}.png", title=f"{space} states")
        tests = {name: k.test for name, k in sources.items() if k.test is not None}
        if tests:
            n = next(iter(tests.values())).predicted.shape[1]
            names = [chr(ord("A") + k) for k in range(n)]
            yield kinetics_plots.plot_chapman_kolmogorov(
                tests, folder / f"chapman_kolmogorov_{space}.png", names=names, title=f"{space} states"
            )
        # a passage that no source has made, or whose start none has been in, says nothing
        pairs = [
            pair
            for pair in sources[MD].passages
            if any(k.passages[pair].events for k in sources.values() if k.passages)
            and all(k.passages[pair].time_at_risk > 0 for k in sources.values() if k.passages)
        ]
        if pairs:
            chosen = {name: {p: k.passages[p] for p in pairs} for name, k in sources.items() if k.passages}
            yield kinetics_plots.plot_hitting_times(chosen, folder / f"passages_{space}.png", title=f"{space} states")


# -- runs ----------------------------------------------------------------------------------------------------------


def plot_run(folder: Path) -> Path:
    """``summary.png`` of a run from its ``latent.csv``: latent coordinates in time, and where they were."""
    table = np.atleast_1d(np.genfromtxt(folder / "latent.csv", delimiter=",", names=True, dtype=None, encoding="utf-8"))
    latent = [name for name in table.dtype.names or () if name.startswith("z")]
    first = table[table["walker"] == table["walker"][0]]
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(latent), 2, figsize=(8.0, 1.2 + 1.5 * len(latent)), squeeze=False, width_ratios=[3, 1], sharey="row",
            layout="constrained",
        )  # fmt: skip
        for (trace, side), name in zip(grid, latent, strict=True):
            _trace(trace, first, name)
            counts, edges = np.histogram(table[name], 60)
            known = counts > 0
            middle = 0.5 * (edges[1:] + edges[:-1])
            side.plot(-np.log(counts[known] / counts.max()), middle[known], color=GREY, lw=1.2)
            trace.set_ylabel(name)
        grid[-1, 0].set_xlabel("time (ps)")
        grid[-1, 1].set_xlabel("free energy (kT)")
        grid[0, 0].legend(fontsize=8, markerscale=5, loc="upper right")
        walkers = len(np.unique(table["walker"]))
        grid[0, 0].set_title(f"walker 0 of {walkers}" if walkers > 1 else "latent coordinates")
        grid[0, 1].set_title("all frames")
    return save_figure(figure, folder / "summary.png")


def _trace(axes: Any, rows: np.ndarray, name: str) -> None:
    spaced = rows[:: max(1, len(rows) // 5000)]
    latent = spaced["phase"] == "macro"
    for label, chosen, colour in (("latent", latent, BLUE), ("MD", ~latent, ORANGE)):
        if chosen.any():
            axes.plot(spaced["time_ps"][chosen], spaced[name][chosen], ".", ms=1.5, color=colour, label=label)
