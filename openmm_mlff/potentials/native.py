"""C++ sources compiled for the machine they run on, once, and kept on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from openmm_mlff.data.model_file import cache_dir

#: no flag here changes what NaN and infinity do
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-std=c++17", "-shared", "-fPIC"),
)


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@functools.cache
def library(source: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The shared library of one C++ file; raises `RuntimeError` if it cannot be compiled."""
    found = compiler()
    if found is None:
        raise RuntimeError("compile: no C++ compiler found (g++ or clang++)")
    # -march=native: what the compiler makes of it belongs to the key
    native = subprocess.run([found, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True).stdout
    about = source.read_bytes() + native + " ".join([found, *flags]).encode()
    folder = cache_dir().parent / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(about).hexdigest()}.so"
    if not path.exists():
        # under a temporary name first: a killed compilation leaves no half file
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
            target = os.path.join(temporary, "library.so")
            run = subprocess.run(
                [found, *flags, str(source), "-o", target],
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
            if run.returncode:
                raise RuntimeError(f"compile: {found} failed: {run.stderr.strip()}")
            os.replace(target, path)
    return ctypes.CDLL(str(path))
