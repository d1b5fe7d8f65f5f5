"""Parallel, resumable tasks: what is done stays, what fails is logged, what was interrupted goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openmm_mlff.data.jobs import claim_folder, run_tasks

TASKS = {f"task-{k}": k for k in range(6)}


class Worker:
    """Writes its argument; fails or is interrupted where it is told to."""

    def __init__(self, fails: tuple[int, ...] = (), interrupted_at: int | None = None) -> None:
        self.fails = fails
        self.interrupted_at = interrupted_at
        self.calls: list[int] = []

    def __call__(self, argument: Any, path: Path) -> dict[str, str]:
        self.calls.append(argument)
        if argument == self.interrupted_at:
            raise KeyboardInterrupt
        if argument in self.fails:
            raise RuntimeError(f"cannot do {argument}")
        path.write_text(str(argument), encoding="utf-8")
        return {"odd part": "left out"} if argument == 1 else {}


def run(folder: Path, worker: Worker) -> Any:
    return run_tasks(TASKS, worker, folder / "out", log=folder / "failures.jsonl", suffix=".txt", progress=False)


def test_failures_are_logged_and_the_rest_goes_on(tmp_path: Path) -> None:
    outcome = run(tmp_path, Worker(fails=(2, 4)))
    assert outcome.made == ["task-0", "task-1", "task-3", "task-5"]
    assert outcome.failed == {
        "task-1/odd part": "left out",
        "task-2": "RuntimeError: cannot do 2",
        "task-4": "RuntimeError: cannot do 4",
    }
    entries = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["task"] for entry in entries] == ["task-1", "task-2", "task-4"]
    assert "Traceback" in entries[1]["error"]


def test_a_second_run_tries_only_what_is_missing(tmp_path: Path) -> None:
    run(tmp_path, Worker(fails=(2, 4)))
    second = Worker(fails=(4,))
    outcome = run(tmp_path, second)
    assert second.calls == [2, 4]
    assert outcome.made == ["task-2"]
    assert sorted(outcome.kept) == ["task-0", "task-1", "task-3", "task-5"]
    entries = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["task"] for entry in entries] == ["task-1", "task-4"]


def test_an_interrupt_stops_and_the_next_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Worker(interrupted_at=3))
    second = Worker()
    outcome = run(tmp_path, second)
    assert second.calls == [3, 4, 5]
    assert len(outcome.kept) == 3
    assert sorted(path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()) == list("012345")


def test_a_folder_belongs_to_one_configuration(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"method": "GFN2-xTB", "pair": (1, 2)})
    claim_folder(tmp_path, {"method": "GFN2-xTB", "pair": (1, 2)})
    with pytest.raises(ValueError, match=r'method: .* "GFN2-xTB", this run has "GFN1-xTB"'):
        claim_folder(tmp_path, {"method": "GFN1-xTB", "pair": (1, 2)})
    with pytest.raises(ValueError, match="extra: "):
        claim_folder(tmp_path, {"method": "GFN2-xTB", "pair": (1, 2), "extra": 1})


def test_a_folder_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=rf"^output: expected a folder to write into, got {folder} \("):
            claim_folder(folder, {"method": "GFN2-xTB"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Crash:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_worker_that_dies_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a worker process died"):
        run_tasks({"a": Crash()}, Worker(), tmp_path, log=tmp_path / "log", processes=2, progress=False)


def test_no_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes: expected at least 1, got 0"):
        run_tasks(TASKS, Worker(), tmp_path, log=tmp_path / "log", processes=0)


#: tasks that tell their process, and wait
LINGERING = """
import os, sys, time
from pathlib import Path
from openmm_mlff.data.jobs import run_tasks

def linger(argument, path):
    path.with_suffix(".pid").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(300)
    return {}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_tasks({"a": 1, "b": 2}, linger, folder, log=folder / "log", processes=2, progress=False)
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LINGERING, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    deadline = time.monotonic() + 60.0

    def waited_for(condition: Callable[[], bool]) -> bool:
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)
        return condition()

    files = [tmp_path / f"{name}.pid" for name in ("a", "b")]
    assert waited_for(lambda: all(f.exists() and f.read_text(encoding="utf-8") for f in files))
    workers = [int(f.read_text(encoding="utf-8")) for f in files]
    assert all(alive(w) for w in workers)
    parent.kill()
    parent.wait()
    assert waited_for(lambda: not any(alive(w) for w in workers))
