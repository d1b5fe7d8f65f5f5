"""named tasks -> files, in parallel, resumable: what labelling and sampling have in common.

Each task makes one file. A task whose file exists is done; a task that fails is logged with its traceback and the
others go on; Ctrl-C leaves whole files only, and the next run goes on with what is missing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmm_mlff.data.files import write_atomically

#: ``worker(argument, path)`` writes the file of one task under a temporary name and moves it; it returns the errors
#: (by name) of parts that it had to leave out. A top-level function, because it travels to other processes.
Worker = Callable[[Any, Path], Mapping[str, str]]


@dataclass
class Outcome:
    """Names of the tasks by what happened to them; `failed` maps tasks and parts of tasks to their errors."""

    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def claim_folder(folder: str | Path, configuration: Mapping[str, Any]) -> None:
    """Write ``configuration.json``, or check that the folder was begun with the same configuration.

    Raises `ValueError` naming the first setting that differs, so that one dataset never mixes two of them, and
    `OSError` if the folder cannot be written to.
    """
    path = Path(folder) / "configuration.json"
    wanted = json.loads(json.dumps(configuration))
    try:
        begun = path.exists()
        if not begun:
            write_atomically(path, (json.dumps(wanted, indent=1) + "\n").encode())
    except OSError as error:
        raise type(error)(f"output: expected a folder to write into, got {folder} ({error.strerror})") from error
    if not begun:
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in sorted({*wanted, *found}):
        if wanted.get(key) != found.get(key):
            raise ValueError(
                f"{key}: {folder} was begun with {_short(found.get(key))}, this run has {_short(wanted.get(key))}; "
                "choose another folder"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _guarded(worker: Worker, argument: Any, path: Path) -> tuple[dict[str, str], str | None]:
    """Errors of parts, and the traceback if the whole task failed."""
    try:
        return dict(worker(argument, path)), None
    except Exception:
        return {}, traceback.format_exc()


def _forget(log: Path, tasks: set[str]) -> None:
    """Take the entries of tasks that will run again out of the log."""
    if log.exists():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["task"] not in tasks]
        write_atomically(log, "".join(line + "\n" for line in lines).encode())


def run_tasks(
    tasks: Mapping[str, Any],
    worker: Worker,
    folder: str | Path,
    *,
    log: str | Path,
    suffix: str = ".safetensors",
    processes: int = 1,
    progress: bool = True,
    title: str = "tasks",
) -> Outcome:
    """Run ``worker(argument, folder/name+suffix)`` for every task whose file is missing.

    Args:
        tasks: argument by name; names are file names.
        log: JSON lines with every failure (task, part, error).
        processes: how many at once, one thread each; 1 runs in this process.
        progress: draw a progress bar.

    Raises `ValueError` for `processes` < 1 and `RuntimeError` if a worker process dies; what a task raises is in the
    outcome and in the log.
    """
    if processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    folder, log = Path(folder), Path(log)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}{suffix}" for name in tasks}
    missing = [name for name in tasks if not paths[name].exists()]
    outcome = Outcome(kept=[name for name in tasks if paths[name].exists()])
    _forget(log, set(missing))

    def finish(name: str, result: tuple[dict[str, str], str | None]) -> None:
        parts, error = result
        entries = [{"task": name, "part": part, "error": text} for part, text in parts.items()]
        outcome.failed |= {f"{name}/{part}": text for part, text in parts.items()}
        if error is None:
            outcome.made.append(name)
        else:
            entries.append({"task": name, "part": "", "error": error})
            outcome.failed[name] = error.strip().splitlines()[-1]
        if entries:
            with log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)

    with ProgressBar(title, len(tasks), len(outcome.kept), progress) as bar:
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
    finish: Callable[[str, tuple[dict[str, str], str | None]], None],
    advance: Callable[[], None],
) -> None:
    waiting = list(reversed(missing))
    running: dict[Future[tuple[dict[str, str], str | None]], str] = {}
    with worker_pool(processes) as pool:
        while waiting or running:
            # few at a time, so that an interrupt does not wait for a long queue
            while waiting and len(running) < 2 * processes:
                name = waiting.pop()
                with interrupts_held():
                    future = pool.submit(_guarded, worker, tasks[name], paths[name])
                running[future] = name
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


@contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each, which end with the block; at once if an exception leaves it."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=prepare_worker)
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block is over; processes started in it never see Ctrl-C, not even while they import."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def limit_threads(threads: int = 1) -> None:
    """Let the programs that this process loads later use `threads` threads (tblite reads OMP_NUM_THREADS once)."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


def prepare_worker() -> None:
    """One thread; Ctrl-C is the parent's business, and without the parent there is none."""
    limit_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers; left to themselves they would go on writing into a folder that
    its next run has taken over. Files are written whole, so that nothing is half done."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class ProgressBar:
    """rich progress bar with the number of failures; silent if not wanted."""

    def __init__(self, title: str, total: int, done: int, show: bool) -> None:
        from rich import progress

        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[failed]}"),
            disable=not show,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, failed="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, failed: int) -> None:
        self._progress.update(self._task, advance=1, failed=f"{failed} failed" if failed else "")
