"""Files that are always whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.data.files import read_arrays, write_arrays, write_atomically

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2]), "scalar": np.array(2.5)}


def test_arrays_and_header_come_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.safetensors"
    write_arrays(path, "kind-1", {**ARRAYS, "turned": ARRAYS["a"].T}, {"note": "ä", "n": [1, None]})
    header, arrays = read_arrays(path, "kind-1", "a kind")
    assert header == {"format": "kind-1", "note": "ä", "n": [1, None]}
    for name, value in {**ARRAYS, "turned": ARRAYS["a"].T}.items():
        np.testing.assert_array_equal(arrays[name], value)
        assert arrays[name].dtype == value.dtype
    assert list(read_arrays(path, "kind-1", "a kind", names=["b"])[1]) == ["b"]
    first = path.read_bytes()
    write_arrays(path, "kind-1", {**ARRAYS, "turned": ARRAYS["a"].T}, {"note": "ä", "n": [1, None]})
    assert path.read_bytes() == first


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_arrays(tmp_path / "x", "kind-1", "a kind")
    write_arrays(tmp_path / "x", "kind-1", ARRAYS)
    with pytest.raises(ValueError, match="expected frames of format kind-2, got 'kind-1'"):
        read_arrays(tmp_path / "x", "kind-2", "frames")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:40])
    with pytest.raises(ValueError, match="expected a kind, but the file is damaged"):
        read_arrays(tmp_path / "x", "kind-1", "a kind")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "x", b"old")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
