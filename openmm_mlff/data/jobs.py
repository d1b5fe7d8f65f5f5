"""named tasks -> files, in parallel, resumable: what labelling and sampling have in common.

Each task makes one file. A task whose file exists is done; a task that fails is written to
``failures.jsonl`` with its traceback and the others go on; Ctrl-C leaves whole files only.
"""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmm_mlff.data.reference import limit_threads

#: writes a file for (argument, path of the file); a top-level function, because it travels to other processes.
Worker = Callable[[Any, Path], None]


@dataclass
class Outcome:
    """Names of the tasks by what happened to them; `failed` maps to the last line of the error."""

    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def _guarded(worker: Worker, argument: Any, path: Path) -> str | None:
    try:
        worker(argument, path)
    except Exception:
        return traceback.format_exc()
    return None


def run_tasks(
    tasks: Mapping[str, Any],
    worker: Worker,
    folder: str | Path,
    *,
    suffix: str = ".safetensors",
    processes: int = 1,
    progress: bool = True,
    title: str = "tasks",
) -> Outcome:
    """Run ``worker(argument, folder/name+suffix)`` for every task whose file is missing.

    Args:
        tasks: argument by name; names are file names.
        worker: top-level function that writes its file under a temporary name and moves it.
        processes: how many at once, one thread each. 1 runs in this process.
        progress: draw a progress bar.

    Raises `ValueError` for `processes` < 1. Failures of tasks never raise: they are in the outcome and in
    ``failures.jsonl`` beside the folder's files, which holds the failures of the last run only.
    """
    if processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}{suffix}" for name in tasks}
    outcome = Outcome(kept=[name for name, path in paths.items() if path.exists()])
    missing = [name for name in tasks if not paths[name].exists()]
    log = folder / "failures.jsonl"
    log.unlink(missing_ok=True)

    def finish(name: str, error: str | None) -> None:
        if error is None:
            outcome.made.append(name)
            return
        outcome.failed[name] = error.strip().splitlines()[-1]
        with log.open("a") as file:
            file.write(json.dumps({"task": name, "error": error}) + "\n")

    with _Bar(title, len(tasks), len(outcome.kept), progress) as bar:
        if processes == 1:
            for name in missing:
                finish(name, _guarded(worker, tasks[name], paths[name]))
                bar.advance(len(outcome.failed))
        else:
            _run_in_pool(tasks, missing, paths, worker, processes, finish, lambda: bar.advance(len(outcome.failed)))
    return outcome


def _run_in_pool(
    tasks: Mapping[str, Any],
    missing: list[str],
    paths: Mapping[str, Path],
    worker: Worker,
    processes: int,
    finish: Callable[[str, str | None], None],
    advance: Callable[[], None],
) -> None:
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=limit_threads)
    waiting = list(reversed(missing))
    running: dict[Future[str | None], str] = {}
    try:
        while waiting or running:
            # few at a time, so that an interrupt does not wait for a long queue
            while waiting and len(running) < 2 * processes:
                name = waiting.pop()
                running[pool.submit(_guarded, worker, tasks[name], paths[name])] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                try:
                    finish(name, future.result())
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        f"a worker process died (out of memory, or a crash) while {sorted([name, *running.values()])} "
                        "were running; run again to go on with what is missing"
                    ) from error
                advance()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Bar:
    """rich progress bar with the number of failures; silent if not wanted."""

    def __init__(self, title: str, total: int, done: int, show: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
            disable=not show,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, failed="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, failed: int) -> None:
        self._progress.update(self._task, advance=1, failed=f"{failed} failed" if failed else "")
