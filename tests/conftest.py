"""What all tests share: few threads, a private cache, and the folder of shared reference data."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# read by torch and OpenMM when they are imported, so they are set before any test module is
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENMM_CPU_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

_cache: list[str] = []


def pytest_configure() -> None:
    """Give the whole run (with its worker processes, which inherit it) a model cache of its own, and Ctrl-C a meaning.

    A script's background jobs start with SIGINT ignored, and so would every program that a test interrupts.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "OPENMM_MLFF_CACHE" not in os.environ:
        _cache.append(tempfile.mkdtemp(prefix="openmm-mlff-tests-"))
        os.environ["OPENMM_MLFF_CACHE"] = _cache[0]


def pytest_unconfigure() -> None:
    for folder in _cache:
        shutil.rmtree(folder, ignore_errors=True)


class SharedData(type(Path())):  # type: ignore[misc]
    """A path below the shared folder; joining on to something that is not there skips the test (or fails it)."""

    def __truediv__(self, key: str | os.PathLike[str]) -> SharedData:
        path = super().__truediv__(key)
        if not path.exists():
            unavailable(f"no {path.name!r} in the shared data; OPENMM_MLFF_SHARED names the folder that holds them")
        return path


def unavailable(reason: str) -> NoReturn:
    """Skip the test for want of something outside the repository; with ``CI=true`` that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of published models and reference numbers: OPENMM_MLFF_SHARED, by default beside the repository.

    ``shared / "relative/path"`` skips the test with a plain reason where the file is missing and fails it where
    ``CI=true``.
    """
    return SharedData(os.environ.get("OPENMM_MLFF_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY
