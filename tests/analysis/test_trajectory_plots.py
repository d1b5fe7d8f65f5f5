"""The summary shows the series that it is given."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.analysis.trajectory_plots import LANDSCAPE_FROM, save_summary, summary_figure, torsion_pairs


def columns(n: int, **more: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ("potential_kJ_mol", "total_kJ_mol", "temperature_K")
    return {"step": np.arange(n), "time_ps": np.arange(n) * 0.1} | {k: rng.normal(300, 9, n) for k in names} | more


def angles(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"phi": rng.uniform(-180, 180, n), "psi": rng.uniform(-180, 180, n)}


def test_the_curves_are_the_data() -> None:
    data = columns(50, **angles(50))
    for ensemble, name in (("nve", "total_kJ_mol"), ("nvt", "potential_kJ_mol")):
        axes = summary_figure(data, ensemble=ensemble).axes
        x, y = axes[0].lines[0].get_data()
        np.testing.assert_array_equal(x, data["time_ps"])
        np.testing.assert_array_equal(y, data[name] - data[name][0])
        np.testing.assert_array_equal(axes[1].lines[0].get_ydata(), data["temperature_K"])
    points = axes[2].collections[0].get_offsets()
    np.testing.assert_array_equal(points, np.stack([data["phi"], data["psi"]], axis=1))


def test_panels_follow_what_there_is() -> None:
    def labels(**options: object) -> list[str]:
        return [a.get_ylabel() for a in summary_figure(**options).axes]  # type: ignore[arg-type]

    plain, box = columns(10), {"volume_nm3": np.ones(10), "density_g_cm3": np.ones(10)}
    assert len(labels(columns=plain)) == 2
    assert "density (g/cm³)" in labels(columns=plain | box, ensemble="npt")
    assert "density (g/cm³)" not in labels(columns=plain | box, ensemble="nvt")
    many = LANDSCAPE_FROM
    assert "free energy (kJ/mol)" in labels(columns=columns(many, **angles(many)))
    assert "time (ps)" in labels(columns=columns(10, **angles(10)))
    with pytest.raises(ValueError, match="at least two rows"):
        summary_figure(columns(1))


def test_torsions_are_paired_by_residue() -> None:
    x = np.zeros(2)
    found = torsion_pairs({"phi_ALA2": x, "psi_ALA2": x + 1, "psi_ALA1": x, "phi_GLY3": x, "phi_angle": x})
    assert list(found) == ["ALA2"]
    assert list(torsion_pairs({"phi": x, "psi": x})) == [""]


def test_the_picture_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_summary(columns(20, **angles(20)), tmp_path / "summary.png", title="test")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"openmm-mlff\[analysis\]"):
        summary_figure(columns(20))
