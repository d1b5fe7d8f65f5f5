"""Labelling many structures: parallel equals serial, failures are skipped and counted, runs resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.data.labelling import label_structures
from openmm_mlff.data.reference import ASEReference, LabelError, TBLite
from openmm_mlff.data.structures import Structure

pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")


def waters(n: int) -> list[Structure]:
    rng = np.random.default_rng(7)
    water = np.array([[0.0, 0.0, 0.12], [0.76, 0.0, -0.47], [-0.76, 0.0, -0.47]])
    return [Structure([8, 1, 1], water + 0.03 * rng.normal(size=(3, 3)), group=f"w{k // 2}") for k in range(n)]


def test_parallel_equals_serial_and_both_equal_single_labels(tmp_path: Path) -> None:
    structures = waters(7)
    serial = label_structures(structures, TBLite(), tmp_path / "1", block=2, progress=False)
    parallel = label_structures(structures, TBLite(), tmp_path / "2", block=2, processes=2, progress=False)
    assert len(serial) == len(parallel) == 7
    for given, one, other in zip(structures, serial, parallel, strict=True):
        np.testing.assert_array_equal(given.positions, one.positions)
        assert one.energy == other.energy == TBLite().label(given).energy
        np.testing.assert_array_equal(one.forces, other.forces)
        assert given.group == one.group == other.group
    parallel.verify()
    assert parallel.card["atom_energies"].keys() == {"H", "O"}
    assert parallel.card["atom_energies"]["H"] == pytest.approx(-0.4292952639 * 27.211386245988, abs=1e-6)


def test_a_structure_that_fails_is_logged_counted_and_skipped(tmp_path: Path) -> None:
    structures = waters(5)
    structures[1] = structures[1].replace(multiplicity=2)
    # neptunium is beyond the elements of GFN2-xTB
    structures[3] = Structure([93, 1], np.array([[0.0, 0, 0], [0, 0, 2.0]]), multiplicity=1)
    dataset = label_structures(structures, TBLite(), tmp_path, block=2, progress=False)
    kept = [structures[k].positions for k in (0, 2, 4)]
    assert len(dataset) == 3
    for expected, found in zip(kept, dataset, strict=True):
        np.testing.assert_array_equal(expected, found.positions)
    log = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["part"] for entry in log] == ["1", "3"]
    assert "2S+1 must be" in log[0]["error"]
    assert "HNp" in log[1]["error"]
    assert dataset.card["failures"]["count"] == 2
    again = label_structures(structures, TBLite(), tmp_path, block=2, progress=False)
    assert again.card["failures"]["count"] == 2


def test_an_interrupted_run_goes_on_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structures = waters(8)
    label = TBLite.label
    calls = []

    def interrupted(self: TBLite, structure: Structure) -> Structure:
        calls.append(structure)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return label(self, structure)

    monkeypatch.setattr(TBLite, "label", interrupted)
    with pytest.raises(KeyboardInterrupt):
        label_structures(structures, TBLite(), tmp_path / "a", block=2, progress=False)
    first = (tmp_path / "a" / "shards" / "block-00000.safetensors").stat().st_mtime_ns
    dataset = label_structures(structures, TBLite(), tmp_path / "a", block=2, progress=False)
    # 5 labels and the interrupt, then the third and fourth block from their beginnings
    assert len(calls) == 6 + 4
    assert (tmp_path / "a" / "shards" / "block-00000.safetensors").stat().st_mtime_ns == first
    monkeypatch.undo()
    whole = label_structures(structures, TBLite(), tmp_path / "b", block=2, progress=False)
    assert dataset.card["shards"] == whole.card["shards"]


def test_another_input_or_method_needs_another_folder(tmp_path: Path) -> None:
    label_structures(waters(2), TBLite(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="input_sha256: "):
        label_structures(waters(3)[1:], TBLite(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="method: "):
        label_structures(waters(2), TBLite(accuracy=1.0), tmp_path, progress=False)


def test_nothing_labelled_is_an_error(tmp_path: Path) -> None:
    bad = [s.replace(multiplicity=2) for s in waters(2)]
    with pytest.raises(LabelError, match="not one of 2 structures"):
        label_structures(bad, TBLite(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="structures: expected at least one"):
        label_structures([], TBLite(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="nosuch"):
        label_structures(waters(1), ASEReference("nosuch:Calculator"), tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
