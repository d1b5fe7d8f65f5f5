"""Pickles that others wrote: only what a reader knows is built, and nothing that they name runs."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from openmm_mlff.data.pickles import AllowListReader, damage_as_errors


class Reader(AllowListReader):
    """Reads ordered dictionaries as plain ones."""

    def known(self, module: str, name: str) -> Any:
        return dict if (module, name) == ("collections", "OrderedDict") else None


class Hostile:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_known_names_are_built_as_the_reader_says(protocol: int) -> None:
    written = collections.OrderedDict(a=[1.5, None], b=(2, "x"))
    read = Reader(pickle.dumps(written, protocol)).load()
    assert type(read) is dict and read == {"a": [1.5, None], "b": (2, "x")}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_names_are_refused_before_anything_runs(protocol: int, tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match=rf"it names {os.mkdir.__module__}\.mkdir, which is not on"):
        Reader(pickle.dumps({"it": Hostile(tmp_path / "made")}, protocol)).load()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"\x80\x02}r\xff\xff\xff\x7f.", b"(dp2000000000\n."], ids=["long binary", "text"])
def test_a_huge_memo_is_refused(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it numbers an object"):
        Reader(content)


@pytest.mark.parametrize("content", [b"", b"nothing", pickle.dumps([1, 2])[:-3], b"\x80\x02}\x86."])
def test_damage_is_one_clear_error(content: bytes) -> None:
    with (
        pytest.raises(ValueError, match=r"^modelPath: x\.pkl is damaged or not a list \("),
        damage_as_errors(Path("folder/x.pkl"), "a list"),
    ):
        Reader(content).load()
