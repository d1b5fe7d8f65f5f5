"""Error tables against plain numpy, and error bars against what statistics says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmm_mlff.analysis.errors import Comparison, Sums, bootstrap, error_table, error_tables
from openmm_mlff.analysis.plots import plot_history, plot_parity


def comparison(n: int = 12, seed: int = 0, **changes: Any) -> Comparison:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, n)
    atoms = int(counts.sum())
    reference = {
        "energy": rng.normal(size=n),
        "forces": rng.normal(size=(atoms, 3)),
        "dipole": rng.normal(size=(n, 3)),
        "charges": rng.normal(size=atoms),
    }
    values: dict[str, Any] = {
        "counts": counts,
        "groups": [f"t{i % 3}" for i in range(n)],
        "formulas": [f"C{i % 2 + 1}" for i in range(n)],
        "charges": [i % 2 for i in range(n)],
        "multiplicities": [1] * n,
        "reference": reference,
        "predicted": {k: v + 0.01 * rng.normal(size=v.shape) for k, v in reference.items()},
    }
    return Comparison(**(values | changes))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("by", ["all", "group", "formula", "charge"])
def test_tables_are_plain_means(by: str) -> None:
    c = comparison()
    keys = {
        "all": ["all"] * 12,
        "group": c.groups,
        "formula": c.formulas,
        "charge": ["+1" if q else "0" for q in c.charges],
    }
    rows = error_table(c, by)
    assert [r["name"] for r in rows] == sorted(set(keys[by]))
    atom_key = np.repeat(keys[by], c.counts)
    for row in rows:
        picked = np.array(keys[by]) == row["name"]
        assert row["structures"] == picked.sum() and row["groups"] == len({c.groups[i] for i in np.flatnonzero(picked)})
        for q in ("energy", "forces", "dipole", "charges"):
            error = 1000 * (c.predicted[q] - c.reference[q])
            if q == "energy":
                error = error / c.counts
            error = error[picked if q in ("energy", "dipole") else atom_key == row["name"]]
            assert row[f"{q}_mae"] == pytest.approx(np.mean(np.abs(error)), rel=1e-12)
            assert row[f"{q}_rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-12)
            assert row[f"{q}_max"] == np.abs(error).max()
            assert (row[f"{q}_mae_error"] is None) == (row["groups"] == 1)


def test_missing_labels_count_nowhere() -> None:
    c = comparison()
    c.reference["dipole"][2] = np.nan
    c.reference["energy"][:] = np.nan
    row = error_table(c)[0]
    error = 1000 * np.delete(c.predicted["dipole"] - c.reference["dipole"], 2, axis=0)
    assert row["dipole_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert "energy_mae" not in row


def test_bootstrap_error_is_that_of_independent_groups() -> None:
    # G groups of equal size whose mean absolute errors differ: the standard error is their spread / sqrt(G)
    rng = np.random.default_rng(3)
    means = rng.gamma(4.0, 1.0, 50)
    per_group = 20
    absolute = np.repeat(means, per_group)
    sums = Sums(absolute, absolute**2, np.ones_like(absolute))
    groups = np.repeat([f"g{i}" for i in range(50)], per_group).tolist()
    error, _ = bootstrap(sums, groups, samples=4000, seed=0)
    assert error == pytest.approx(means.std() / np.sqrt(50), rel=0.05)
    # taking frames for independent would give an error bar too small by sqrt(per_group)
    naive, _ = bootstrap(sums, [str(i) for i in range(len(absolute))], samples=500, seed=0)
    assert naive == pytest.approx(error / np.sqrt(per_group), rel=0.1)
    assert bootstrap(sums, groups, 100, seed=1) == bootstrap(sums, groups, 100, seed=1)


def test_only_tables_that_tell_something() -> None:
    tables = error_tables(comparison())
    assert set(tables) == {"all", "formula", "charge", "group"}
    assert set(error_tables(comparison(groups=[""] * 12, formulas=["C"] * 12))) == {"all", "charge"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ["a"]}, "groups: expected 12 values, one per structure, got 1"),
        ({"reference": {"energy": np.zeros(3)}}, "reference: expected 12 rows of energy, got 3"),
        ({"predicted": {"stress": np.zeros(12)}}, "predicted: expected quantities among energy"),
        ({"predicted": {"energy": np.full(12, np.nan)}}, "predicted: expected finite energy"),
        ({"counts": np.zeros(0, dtype=int)}, "counts: expected at least one structure"),
    ],
)
def test_lengths_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison(**changes)
    with pytest.raises(ValueError, match="key: expected one of all, formula"):
        error_table(comparison(), "colour")


def test_pictures(tmp_path: Path) -> None:
    c = comparison(40)
    c.reference["dipole"][3] = np.nan
    width, height = png_size(plot_parity(c, tmp_path / "parity.png", "title"))
    assert width > 1000 and height > 500
    row = {"step": 1.0, "learning_rate": 1e-3, "train_loss": 1.0, "valid_loss": 2.0, "valid_forces_mae": 30.0}
    narrow, _ = png_size(plot_history([row, row | {"step": 2.0}], tmp_path / "loss.png"))
    wide, _ = png_size(plot_history([row | {"valid_energy_mae": 1.0}, row], tmp_path / "loss2.png"))
    assert wide > narrow
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "loss2.png", "parity.png"]
    with pytest.raises(ValueError, match="history: expected at least one"):
        plot_history([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="comparison: expected at least one quantity"):
        plot_parity(comparison(predicted={}), tmp_path / "x.png")
