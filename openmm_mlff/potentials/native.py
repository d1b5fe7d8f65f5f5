"""C++ sources compiled for the machine they run on, once, and kept on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from openmm_mlff.data.model_file import cache_dir

#: no flag here changes what NaN and infinity do
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-std=c++17", "-shared", "-fPIC"),
)
#: where headers lie that families share
INCLUDE = Path(__file__).parent
#: programs that are written before a compiler and start it
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


def compiler() -> tuple[str, ...] | None:
    """The C++ compiler as the words of a command, or None.

    It is what ``CXX`` says, launcher and options included (``ccache g++ -m64``), g++ without ``CXX``, and clang++ where
    that is not installed.
    """
    for command in (os.environ.get("CXX") or "g++", "clang++"):
        try:
            words = shlex.split(command)
        except ValueError:
            continue
        n = _program_at(words)
        programs = [shutil.which(word) for word in words[: n + 1]]
        if len(programs) == n + 1 and None not in programs:
            return (*[p for p in programs if p is not None], *words[n + 1 :])
    return None


def compiler_program() -> str | None:
    """The path of the compiler itself, for those who take no launcher and no options; or None."""
    command = compiler()
    return None if command is None else command[_program_at(command)]


def _program_at(words: Sequence[str]) -> int:
    """Which word of a command is the compiler."""
    return next((k for k, word in enumerate(words) if os.path.basename(word) not in LAUNCHERS), len(words))


def with_headers(folder: Path) -> tuple[str, ...]:
    """Flags for a source that includes the headers of its folder and those that families share (``pool.hpp``).

    What is in them belongs to the key under which a library is kept, so it is among the flags.
    """
    digest = hashlib.sha256()
    for header in [*sorted(folder.glob("*.hpp")), *sorted(INCLUDE.glob("*.hpp"))]:
        digest.update(header.read_bytes())
    return "-pthread", f"-I{INCLUDE}", f"-DHEADERS=0x{digest.hexdigest()[:8]}"


@functools.cache
def library(source: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The shared library of one C++ file; raises `RuntimeError` if it cannot be compiled."""
    found = compiler()
    if found is None:
        raise RuntimeError("compile: no C++ compiler found (g++ or clang++)")
    # -march=native: what the compiler makes of it belongs to the key
    native = subprocess.run([*found, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True).stdout
    about = source.read_bytes() + native + " ".join([*found, *flags]).encode()
    folder = cache_dir().parent / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(about).hexdigest()}.so"
    if not path.exists():
        # under a temporary name first: a killed compilation leaves no half file
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            target = os.path.join(temporary, "library.so")
            run = subprocess.run(
                [*found, *flags, str(source), "-o", target],
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
            if run.returncode:
                raise RuntimeError(f"compile: {' '.join(found)} failed: {run.stderr.strip()}")
            os.replace(target, path)
    return ctypes.CDLL(str(path))
