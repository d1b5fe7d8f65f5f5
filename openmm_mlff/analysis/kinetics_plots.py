"""kinetics of several sources, molecular dynamics and models -> pictures side by side (PNG).

Every function takes what `analysis.kinetics` and its neighbours return, by the name of the source; the first one is the
reference and drawn in black. Needs matplotlib (extra ``analysis``); nothing here opens a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.analysis.chapman_kolmogorov import ChapmanKolmogorov
from openmm_mlff.analysis.kinetics import ImpliedTimescales
from openmm_mlff.analysis.passages import FirstPassages
from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure

COLOURS = ("black", ORANGE, BLUE, "#3b8f4a", "#8a4fa3", "#b03a3a")
#: free energies above this are drawn like it, kT
CEILING = 8.0


def _checked(values: Mapping[str, Any], name: str) -> list[tuple[str, Any, str]]:
    """Label, value and colour of every source; raises `ValueError` if there is none."""
    if not values:
        raise ValueError(f"{name}: expected at least one source by name, got none")
    return [(label, value, COLOURS[k % len(COLOURS)]) for k, (label, value) in enumerate(values.items())]


def plot_implied_timescales(
    scales: Mapping[str, ImpliedTimescales], path: str | Path, *, unit: str = "ps", title: str = ""
) -> Path:
    """Timescales against the lag, with their 95 % intervals; below the grey diagonal a process is faster than the lag.

    Raises `ValueError` if there is no source.
    """
    sources = _checked(scales, "scales")
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 3.4))
        for label, found, colour in sources:
            for k in range(found.values.shape[1]):
                style = {"alpha": 1.0, "label": label} if k == 0 else {"alpha": 0.5}
                axis.plot(found.lags, found.values[:, k], "o-", ms=3, lw=1.2, color=colour, **style)
                axis.fill_between(found.lags, found.low[:, k], found.high[:, k], color=colour, alpha=0.15, lw=0)
        lags = np.unique(np.concatenate([found.lags for _, found, _ in sources]))
        axis.set_xscale("log")
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        ends = np.array([lags[0] / 1.15, lags[-1] * 1.15])
        axis.fill_between(ends, low, ends, color=GREY, alpha=0.15, lw=0, zorder=0)
        axis.set(xlim=ends, ylim=(low, high), xlabel=f"lag ({unit})", ylabel=f"implied timescale ({unit})")
        _plain_ticks(axis)
        axis.set_title(title)
        axis.legend(fontsize=8)
        figure.tight_layout()
    return save_figure(figure, path)


def _plain_ticks(axis: Any) -> None:
    """Numbers such as 0.5 and 20 on logarithmic axes, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for one in (axis.xaxis, axis.yaxis):
        low, high = sorted(one.get_view_interval())
        subs = (1.0, 2.0, 5.0) if high < 300.0 * low else (1.0,)
        one.set_major_locator(LogLocator(subs=subs))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(NullFormatter())


def plot_chapman_kolmogorov(
    tests: Mapping[str, ChapmanKolmogorov],
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    unit: str = "ps",
    title: str = "",
) -> Path:
    """Probability to be in set j after having been in set i: lines predicted with their 95 % bands, points estimated.

    Args:
        names: of the sets, by default their numbers.

    Raises `ValueError` if there is no source, if they differ in the number of sets, or for other numbers of names.
    """
    sources = _checked(tests, "tests")
    n = sources[0][1].predicted.shape[1]
    if any(test.predicted.shape[1] != n for _, test, _ in sources):
        raise ValueError(f"tests: expected {n} sets in every source, got others")
    labels = [str(k + 1) for k in range(n)] if names is None else list(names)
    if len(labels) != n:
        raise ValueError(f"names: expected {n}, one per set, got {len(labels)}")
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            n, n, figsize=(1.0 + 2.0 * n, 1.3 + 1.75 * n), sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for (i, j), axis in np.ndenumerate(axes):
            for label, test, colour in sources:
                axis.plot(test.times, test.predicted[:, i, j], color=colour, lw=1.2, label=label)
                axis.fill_between(test.times, test.predicted_low[:, i, j], test.predicted_high[:, i, j], color=colour,
                                  alpha=0.15, lw=0)  # fmt: skip
                error = np.nan_to_num(_around(test.estimated, test.estimated_low, test.estimated_high)[:, :, i, j])
                axis.errorbar(
                    test.times, test.estimated[:, i, j], error, fmt="o", ms=3, lw=0.8, capsize=2, color=colour
                )
            axis.set_title(f"{labels[i]} → {labels[j]}")
            axis.grid(alpha=0.25, linewidth=0.5)
        axes[0, 0].set_ylim(-0.03, 1.03)
        for axis in axes[-1]:
            axis.set_xlabel(f"time ({unit})")
        for axis in axes[:, 0]:
            axis.set_ylabel("probability")
        figure.suptitle(f"{title}\nlines predicted, points estimated".strip(), fontsize=9)
        handles, found = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, found, loc="outside lower center", ncols=min(len(found), 3), fontsize=8)
    return save_figure(figure, path)


def _around(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths of error bars below and above; a value outside its interval gets none on that side."""
    return np.maximum(np.stack([value - low, high - value]), 0.0)


def plot_free_energy(
    samples: Mapping[str, np.ndarray],
    path: str | Path,
    *,
    label: str,
    bins: int = 60,
    bounds: tuple[float, float] | None = None,
    period: float | None = None,
    title: str = "",
) -> Path:
    """Free energies -ln p of one coordinate, in kT, each with its minimum at zero.

    Args:
        samples: ``(n,)`` by source. label: of the coordinate, with its unit. bounds: of the axis; by default those of
            all samples. period: of the coordinate, which is then drawn from -period/2 to period/2.

    Raises `ValueError` for no source or one without samples.
    """
    sources = _checked(samples, "samples")
    wrapped = [_wrapped(values, period, 1) for _, values, _ in sources]
    low, high = _span(wrapped, period, None if bounds is None else [bounds])[0]
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 3.2))
        for (name, _, colour), values in zip(sources, wrapped, strict=True):
            counts, edges = np.histogram(values[:, 0], bins=bins, range=(low, high))
            axis.plot(0.5 * (edges[1:] + edges[:-1]), _free_energy(counts), color=colour, lw=1.3, label=name)
        axis.set(xlim=(low, high), xlabel=label, ylabel="free energy (kT)")
        axis.set_ylim(bottom=0.0)
        axis.set_title(title)
        axis.legend(fontsize=8)
        figure.tight_layout()
    return save_figure(figure, path)


def plot_free_energy_maps(
    samples: Mapping[str, np.ndarray],
    path: str | Path,
    *,
    labels: tuple[str, str],
    bins: int = 60,
    bounds: Sequence[tuple[float, float]] | None = None,
    period: float | None = None,
    title: str = "",
) -> Path:
    """Free energies of two coordinates, one panel per source, on one scale of colours in kT.

    Args:
        samples: ``(n, 2)`` by source. labels: of the coordinates. period: of both; 360 gives a Ramachandran plot.

    Raises `ValueError` for no source, or samples of another shape.
    """
    sources = _checked(samples, "samples")
    wrapped = [_wrapped(values, period, 2) for _, values, _ in sources]
    span = _span(wrapped, period, bounds)
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(sources), figsize=(1.3 + 2.8 * len(sources), 3.2), sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for (name, _, _), values, axis in zip(sources, wrapped, axes[0], strict=True):
            counts, x, y = np.histogram2d(values[:, 0], values[:, 1], bins=bins, range=span)
            energy = np.ma.masked_invalid(_free_energy(counts)).T
            image = axis.pcolormesh(x, y, energy, cmap="viridis", vmin=0.0, vmax=CEILING, rasterized=True)
            axis.set(xlim=span[0], ylim=span[1], xlabel=labels[0])
            axis.set_title(name)
            axis.set_box_aspect(1)
            if period == 360.0:
                axis.set(xticks=range(-180, 181, 90), yticks=range(-180, 181, 90))
        axes[0, 0].set_ylabel(labels[1])
        figure.colorbar(image, ax=list(axes[0]), label="free energy (kT)", shrink=0.85, extend="max")
        if title:
            figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)


def _wrapped(values: np.ndarray, period: float | None, n_dims: int) -> np.ndarray:
    points = np.asarray(values, dtype=np.float64)
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim != 2 or points.shape[1] != n_dims or not len(points):
        raise ValueError(f"samples: expected {n_dims} columns and at least one row, got shape {np.shape(values)}")
    return points if period is None else np.mod(points + 0.5 * period, period) - 0.5 * period


def _span(
    samples: Sequence[np.ndarray], period: float | None, bounds: Sequence[tuple[float, float]] | None
) -> list[tuple[float, float]]:
    """Lowest and highest value to be drawn, per column."""
    n_dims = samples[0].shape[1]
    if bounds is not None:
        return [(float(low), float(high)) for low, high in bounds]
    if period is not None:
        return [(-0.5 * period, 0.5 * period)] * n_dims
    low, high = (np.array([getattr(s, side)(axis=0) for s in samples]) for side in ("min", "max"))
    return [(float(a), float(b) if b > a else float(a) + 1.0) for a, b in zip(low.min(0), high.max(0), strict=True)]


def _free_energy(counts: np.ndarray) -> np.ndarray:
    """-ln of the counts with the minimum at zero; infinite in empty bins."""
    with np.errstate(divide="ignore"):
        energy = -np.log(counts)
    return energy - energy.min()


def plot_hitting_times(
    passages: Mapping[str, Mapping[tuple[str, str], FirstPassages]],
    path: str | Path,
    *,
    unit: str = "ps",
    title: str = "",
) -> Path:
    """Mean times of first passage (total time at risk over events) with standard errors, on a logarithmic axis.

    Raises `ValueError` if there is no source, or a source lacks a passage that the first one has.
    """
    sources = _checked(passages, "passages")
    pairs = list(sources[0][1])
    for label, found, _ in sources:
        missing = [pair for pair in pairs if pair not in found]
        if missing:
            raise ValueError(f"passages: expected {missing[0][0]} to {missing[0][1]} of {label}, got {list(found)}")
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(1.8 + 0.55 * len(pairs) * (len(sources) + 1), 3.2))
        for k, (label, found, colour) in enumerate(sources):
            means = np.array([found[pair].rate_time.value for pair in pairs])
            errors = np.nan_to_num([found[pair].rate_time.error for pair in pairs])
            places = np.arange(len(pairs)) + (k - 0.5 * (len(sources) - 1)) * 0.8 / len(sources)
            axis.errorbar(places, means, errors, fmt="o", ms=5, lw=1.2, capsize=4, color=colour, label=label)
            for place, mean, pair in zip(places, means, pairs, strict=True):
                if not np.isfinite(mean):
                    bound = found[pair].residence.low
                    axis.errorbar(place, bound, 0.3 * bound, lolims=True, fmt="_", lw=1.2, color=colour)
        for k in range(1, len(pairs)):
            axis.axvline(k - 0.5, color=GREY, lw=0.5, ls=":")
        axis.set_yscale("log")
        axis.set_xticks(range(len(pairs)), [f"{start} → {end}" for start, end in pairs])
        axis.set_xlim(-0.5, len(pairs) - 0.5)
        axis.set_ylabel(f"mean first passage ({unit})")
        axis.grid(axis="y", which="both", alpha=0.25, linewidth=0.5)
        low, high = axis.get_ylim()
        axis.set_ylim(low / 1.2, high * 1.2)
        _plain_y(axis)
        axis.set_title(title)
        axis.legend(fontsize=8, loc="best")
        figure.tight_layout()
    return save_figure(figure, path)


def _plain_y(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
