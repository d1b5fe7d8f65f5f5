"""tasks -> results, one by one as they come: in this process, in processes of this machine, or on a Dask cluster.

The results come back to the caller, who keeps them, so that the machines of a cluster need no common disk and what has
come back is safe. A worker that dies takes only its running task along, which runs again elsewhere.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openmm_mlff.data.jobs import ProgressBar, interrupts_held, worker_pool

#: seconds to wait for the scheduler of a cluster.
PATIENCE = 20.0


@dataclass(frozen=True)
class Failed:
    """What a task raised: the last line, and the whole traceback of the process where it ran."""

    error: str
    trace: str


#: ``keep(name, result)`` runs where the campaign was started; it may return further tasks (argument by name), which
#: then come first.
Keep = Callable[[str, Any], Mapping[str, Any] | None]


def run_campaign(
    tasks: Mapping[str, Any],
    work: Callable[[Any], Any],
    keep: Keep,
    *,
    processes: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
    title: str = "tasks",
    total: int | None = None,
) -> dict[str, Failed]:
    """Call ``keep(name, work(argument))`` for every task, in the order in which they end.

    Args:
        tasks: argument by name; arguments and results travel to other processes.
        work: a top-level function. keep: see `Keep`.
        processes: on this machine, one thread each; 1 works in this process.
        scheduler: address of a Dask scheduler, such as ``tcp://host:8786``, whose workers then do the work; they need
            this package.
        progress: draw a progress bar. total: tasks in all, where `keep` returns more.

    Returns the tasks that failed. Raises `ValueError` for an impossible `processes` or address, `ImportError` without
    dask (extra ``cluster``), `OSError` if the scheduler does not answer; what `keep` raises is passed on. After an
    interrupt no result that was kept is lost.
    """
    check_workers(processes, scheduler)
    failed: dict[str, Failed] = {}
    left = dict(tasks)
    with ProgressBar(title, len(tasks) if total is None else total, 0, progress) as bar:

        def finish(name: str, result: Any) -> None:
            further: Mapping[str, Any] | None = None
            if isinstance(result, Failed):
                failed[name] = result
            else:
                further = keep(name, result)
            left.pop(name)
            if further:
                rest = dict(left)
                left.clear()
                left.update({**further, **rest})
            bar.advance(len(failed))

        if scheduler is not None:
            with _dask_executor(scheduler) as executor:
                _collect(executor, left, work, finish, at_once=None)
        elif processes == 1:
            while left:
                name = next(iter(left))
                finish(name, _guarded(work, left[name]))
        else:
            _run_in_pools(left, work, finish, processes)
    return failed


def check_workers(processes: int, scheduler: str | None) -> None:
    """Raise `ValueError` for fewer than one process or what cannot be the address of a scheduler."""
    if processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    if scheduler is not None and "://" not in scheduler:
        raise ValueError(f"scheduler: expected an address such as tcp://host:8786, got {scheduler!r}")


def _guarded(work: Callable[[Any], Any], argument: Any) -> Any:
    """The result, or what it raised: exceptions of other packages do not always survive the way between processes."""
    try:
        return work(argument)
    except Exception as error:
        lines = traceback.format_exception_only(error)
        return Failed(lines[-1].strip(), traceback.format_exc())


def _run_in_pools(
    left: dict[str, Any], work: Callable[[Any], Any], finish: Callable[[str, Any], None], processes: int
) -> None:
    """A pool that breaks is replaced; what ran in it runs again, one by one, because one of them may be the cause."""
    while left:
        with worker_pool(processes) as pool:
            lost = _collect(pool, left, work, finish, at_once=processes)
        for name in lost:
            with worker_pool(1) as pool:
                again = _collect(pool, {name: left[name]}, work, finish, at_once=1)
            if again:
                finish(name, Failed("its worker process died, twice (out of memory, or a crash)", ""))


def _collect(
    executor: Executor,
    left: Mapping[str, Any],
    work: Callable[[Any], Any],
    finish: Callable[[str, Any], None],
    at_once: int | None,
) -> list[str]:
    """Submit what is left, `at_once` at a time, and hand over what comes back.

    `finish` takes a task out of `left` and may put others in. Returns the tasks that were lost with a local pool.
    """
    running: dict[Future[Any], str] = {}
    lost: list[str] = []
    handed: set[str] = set()
    while True:
        waiting = [name for name in left if name not in handed]
        for name in waiting[: None if at_once is None else max(at_once - len(running), 0)]:
            if lost:
                break
            handed.add(name)
            try:
                with interrupts_held():
                    running[executor.submit(_guarded, work, left[name])] = name
            except BrokenProcessPool:
                lost.append(name)
        if not running:
            return lost
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            name = running.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                lost.append(name)
                continue
            except Exception as error:
                # of the cluster itself: Dask gives a task up when several of its workers died
                result = Failed(f"{type(error).__name__}: {error}", "")
            finish(name, result)


@contextmanager
def _dask_executor(address: str) -> Iterator[Executor]:
    """The cluster as an executor; tasks that are left when the block ends are cancelled."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            f"a cluster needs the package dask.distributed ({error}); install it with: "
            "pip install 'openmm-mlff[cluster]'"
        ) from error
    with Client(address, timeout=PATIENCE, set_as_default=False) as client:
        executor = client.get_executor(pure=False)
        try:
            yield executor
        finally:
            executor.shutdown(wait=False)
