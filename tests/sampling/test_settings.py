"""The record of settings: bad values are refused by name, and JSON gives the same record back."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from openmm_mlff.data.files import write_atomically
from openmm_mlff.sampling.settings import RunSettings, write_json


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ensemble", "nph"), ("compile", "maybe"), ("precision", "half"), ("temperature", 0.0), ("temperature", -1),
        ("timestep", float("nan")), ("timestep", float("inf")), ("friction", 0), ("padding", -1.0),
        ("long_range_cutoff", 0.0), ("long_range_method", "p3m"), ("steps", -1), ("steps", 1.5), ("steps", True),
        ("report_interval", 0), ("checkpoint_interval", 0), ("seed", 0), ("seed", 2**31), ("threads", 0),
        ("max_force", "big"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got "):
        RunSettings(input="x.pdb", **{name: value})


@pytest.mark.parametrize("atoms", [(0, 1, 2), (0, 1, 1, 2), (0, 1, 2, -3), (0, 1, 2, 3, 4)])
def test_a_bad_torsion_is_refused(atoms: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^torsions: expected four different"):
        RunSettings(input="x.pdb", torsions={"chi": atoms})  # type: ignore[dict-item]


def test_json_gives_the_same_record() -> None:
    settings = RunSettings(input="x.pdb", torsions={"chi": (0, 1, 2, 3)}, padding=1.0, forcefield=("a.xml",), seed=5)
    assert RunSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ValueError, match=r"does not know 'colour'"):
        RunSettings.from_dict(settings.to_dict() | {"colour": 1})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(TypeError):
        write_atomically(path, "text")  # type: ignore[arg-type]
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    # as readable as a file that is written the ordinary way
    (tmp_path / "other").write_text("x", encoding="utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
