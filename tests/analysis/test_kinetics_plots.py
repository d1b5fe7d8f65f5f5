"""Pictures of kinetics show the numbers that they are given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmm_mlff.analysis import kinetics_plots
from openmm_mlff.analysis.chapman_kolmogorov import ChapmanKolmogorov
from openmm_mlff.analysis.kinetics import ImpliedTimescales
from openmm_mlff.analysis.observables import Estimate
from openmm_mlff.analysis.passages import FirstPassages

LAGS = np.array([1.0, 2.0, 5.0])
TIMES = np.array([0.0, 1.0, 2.0, 4.0])


def scales(first: float) -> ImpliedTimescales:
    values = first * np.array([[20.0, 2.0], [22.0, 2.5], [23.0, 3.0]])
    return ImpliedTimescales(LAGS, values, 0.9 * values, 1.1 * values, 0.05 * values, np.ones(3))


def decay(rate: float, n: int = 2) -> ChapmanKolmogorov:
    stay = np.exp(-rate * TIMES)[:, None, None] * np.eye(n)
    value = stay + (1.0 - np.exp(-rate * TIMES))[:, None, None] / n
    low, high, error = value - 0.05, value + 0.03, np.full_like(value, 0.02)
    return ChapmanKolmogorov(TIMES, value, low, high, error, value + 0.01, low, high, error, np.eye(n))


def passages(mean: float, events: int = 40) -> dict[tuple[str, str], FirstPassages]:
    found = {}
    for start, end, scale in (("a", "b", 1.0), ("b", "a", 10.0)):
        rate = Estimate(scale * mean, 0.1 * scale * mean, 10.0) if events else Estimate(np.nan, np.nan, 10.0)
        found[start, end] = FirstPassages(
            start, end, np.full(events, scale * mean), np.empty(0), scale * mean * max(events, 1), events, rate
        )
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Figures as they are when they are written."""
    plt = kinetics_plots.pyplot()
    figures: list[Any] = []

    def keep(figure: Any, path: Path) -> Path:
        figures.append(figure)
        return path

    monkeypatch.setattr(kinetics_plots, "save_figure", keep)
    yield figures
    for figure in figures:
        plt.close(figure)


def test_timescales_are_drawn_with_their_intervals(drawn: list[Any]) -> None:
    kinetics_plots.plot_implied_timescales({"MD": scales(1.0), "LED": scales(0.8)}, "its.png", unit="ns")
    axis = drawn[0].axes[0]
    lines = [line for line in axis.lines if len(line.get_xdata()) == 3]
    for line, expected in zip(lines, [*scales(1.0).values.T, *scales(0.8).values.T], strict=True):
        np.testing.assert_array_equal(line.get_xdata(), LAGS)
        np.testing.assert_array_equal(line.get_ydata(), expected)
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((18.0, 25.3))
    assert axis.get_xlabel() == "lag (ns)"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["MD", "LED"]


def test_chapman_kolmogorov_panels(drawn: list[Any]) -> None:
    kinetics_plots.plot_chapman_kolmogorov({"MD": decay(0.1), "LED": decay(0.3)}, "ck.png", names=["a", "b"])
    axes = np.array(drawn[0].axes).reshape(2, 2)
    assert [axis.get_title() for axis in axes.ravel()] == ["a → a", "a → b", "b → a", "b → b"]
    for (i, j), axis in np.ndenumerate(axes):
        curves = [line.get_ydata() for line in axis.lines]
        for expected in (decay(0.1), decay(0.3)):
            for values in (expected.predicted, expected.estimated):
                assert any(len(c) == 4 and np.array_equal(c, values[:, i, j]) for c in curves)
    with pytest.raises(ValueError, match="tests: expected 2 sets"):
        kinetics_plots.plot_chapman_kolmogorov({"MD": decay(0.1), "LED": decay(0.1, 3)}, "ck.png")
    with pytest.raises(ValueError, match="names: expected 2"):
        kinetics_plots.plot_chapman_kolmogorov({"MD": decay(0.1)}, "ck.png", names=["a"])


def test_free_energies_are_those_of_the_histogram(drawn: list[Any]) -> None:
    values = np.repeat([-150.0, 30.0, 200.0], [10, 40, 20])
    kinetics_plots.plot_free_energy({"MD": values}, "f.png", label="φ (degrees)", bins=36, period=360.0)
    x, energy = drawn[0].axes[0].lines[0].get_data()
    found = {float(a): float(b) for a, b in zip(x, energy, strict=True) if np.isfinite(b)}
    # 200 degrees are -160, next to -150
    assert found == pytest.approx({-145.0: np.log(4.0), 35.0: 0.0, -155.0: np.log(2.0)})
    pairs = np.column_stack([values, -values])
    kinetics_plots.plot_free_energy_maps(
        {"MD": pairs, "LED": pairs[:50]}, "f.png", labels=("φ", "ψ"), bins=36, period=360.0
    )
    axes = drawn[1].axes
    assert [axis.get_title() for axis in axes[:2]] == ["MD", "LED"]
    image = axes[0].collections[0].get_array().reshape(36, 36)
    assert image[15, 21] == 0.0, "first index is psi"
    assert image.count() == 3
    assert axes[1].collections[0].get_array().count() == 2
    for samples in (np.zeros((0, 2)), np.zeros((4, 3))):
        with pytest.raises(ValueError, match="samples: expected 2 columns"):
            kinetics_plots.plot_free_energy_maps({"MD": samples}, "f.png", labels=("a", "b"))


def test_hitting_times_with_their_errors_and_bounds(drawn: list[Any]) -> None:
    never = passages(5.0, events=0)
    kinetics_plots.plot_hitting_times({"MD": passages(5.0), "LED": passages(7.0), "none": never}, "h.png")
    axis = drawn[0].axes[0]
    bars = {c.get_label(): c for c in axis.containers if not c.get_label().startswith("_")}
    np.testing.assert_allclose(bars["MD"].lines[0].get_ydata(), [5.0, 50.0])
    np.testing.assert_allclose(bars["LED"].lines[0].get_ydata(), [7.0, 70.0])
    segments = bars["MD"].lines[2][0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], [[4.5, 5.5], [45.0, 55.0]])
    bounds = [c.lines[0].get_ydata()[0] for c in axis.containers if c.get_label().startswith("_")]
    assert bounds == pytest.approx([never[pair].residence.low for pair in never])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["a → b", "b → a"]
    with pytest.raises(ValueError, match="passages: expected b to a of LED"):
        kinetics_plots.plot_hitting_times({"MD": passages(5.0), "LED": {("a", "b"): passages(5.0)["a", "b"]}}, "h.png")


def test_pictures_are_files_and_need_a_source(tmp_path: Path) -> None:
    path = kinetics_plots.plot_implied_timescales({"MD": scales(1.0)}, tmp_path / "its.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["its.png"]
    for function in (
        kinetics_plots.plot_implied_timescales, kinetics_plots.plot_chapman_kolmogorov,
        kinetics_plots.plot_hitting_times,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected at least one source"):
            function({}, tmp_path / "none.png")
