"""Which C++ compiler is called, and how."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from openmm_mlff.potentials import compile as compilation
from openmm_mlff.potentials import native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler (g++ or clang++)")


def program(folder: Path, name: str, text: str = "#!/bin/sh\n") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A search path that holds a compiler, a launcher and nothing else."""
    for name in ("g++", "ccache"):
        program(tmp_path, name)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("cxx", "words", "bare"),
    [
        (None, ["g++"], "g++"),
        ("", ["g++"], "g++"),
        ("g++", ["g++"], "g++"),
        ("ccache g++", ["ccache", "g++"], "g++"),
        ("ccache g++ -m64 '-DNAME=a b'", ["ccache", "g++", "-m64", "-DNAME=a b"], "g++"),
        ("g++ -m64", ["g++", "-m64"], "g++"),
        ("no-such-compiler", None, None),
        ("ccache no-such-compiler", None, None),
        ("ccache", None, None),
        ("no-such-launcher g++", None, None),
        ("'g++", None, None),
    ],
)
def test_cxx_may_hold_a_launcher_and_options(
    cxx: str | None, words: list[str] | None, bare: str | None, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cxx is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", cxx)
    found = native.compiler()
    assert compilation.compiler_found() is (words is not None)
    if words is None or bare is None:
        assert found is None and native.compiler_program() is None
        program(programs, "clang++")
        assert native.compiler() == (str(programs / "clang++"),)
        return
    assert found is not None
    assert [os.path.basename(word) for word in found] == words
    assert native.compiler_program() == str(programs / bare)


@needs_compiler
def test_a_launcher_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is called first, passes the command on, and writes down that it did."""
    real = native.compiler_program()
    assert real is not None
    log = tmp_path / "log"
    launcher = program(tmp_path, "ccache", f'#!/bin/sh\necho "$1" >> {log}\nexec "$@"\n')
    monkeypatch.setenv("CXX", f"{launcher} {real} -DANSWER=42")
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path / "cache" / "models"))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return ANSWER; }\n', encoding="utf-8")
    code = native.library(source, native.FLAGS)
    assert isinstance(code, ctypes.CDLL) and code.answer() == 42
    assert set(log.read_text(encoding="utf-8").splitlines()) == {real}


@needs_compiler
def test_torch_calls_the_compiler_itself(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    import torch._inductor.config as config

    monkeypatch.setenv("CXX", "ccache g++ -m64")
    before = config.cpp.cxx
    with compilation.compiler_for_torch():
        assert config.cpp.cxx == (None, str(programs / "g++"))
    assert config.cpp.cxx == before
    shutil.rmtree(programs)
    with compilation.compiler_for_torch():
        assert config.cpp.cxx == (None, "g++")
