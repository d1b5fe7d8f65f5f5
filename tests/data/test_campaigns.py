"""Tasks whose results come back one by one: failures, dying workers and interrupts lose nothing that has come back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openmm_mlff.data.campaigns import run_campaign


def square(argument: int) -> int:
    if argument < 0:
        raise ValueError(f"argument: expected a number >= 0, got {argument}")
    return argument * argument


def die_once(argument: tuple[int, str]) -> int:
    """Kills its own process the first time that it meets its marker."""
    number, marker = argument
    if marker and not os.path.exists(marker):
        Path(marker).touch()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number * number


def die(argument: bool) -> str:
    if argument:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def keep_pairs(kept: list[tuple[str, int]]) -> Any:
    return lambda name, result: kept.append((name, result))


@pytest.mark.parametrize("processes", [1, 2])
def test_results_bring_further_tasks(processes: int) -> None:
    kept: list[tuple[str, int]] = []

    def keep(name: str, result: int) -> dict[str, int] | None:
        kept.append((name, result))
        return {f"{name}'": result} if result < 100 else None

    assert run_campaign({"a": 2, "b": 3}, square, keep, processes=processes, progress=False, total=6) == {}
    assert sorted(kept) == [("a", 4), ("a'", 16), ("a''", 256), ("b", 9), ("b'", 81), ("b''", 6561)]
    if processes == 1:
        assert [name for name, _ in kept] == ["a", "a'", "a''", "b", "b'", "b''"]  # what was begun is ended first


@pytest.mark.parametrize("processes", [1, 2])
def test_results_and_failures(processes: int) -> None:
    kept: dict[str, int] = {}
    tasks = {f"task-{k}": k for k in (3, -1, 4)}
    failed = run_campaign(tasks, square, kept.__setitem__, processes=processes, progress=False)
    assert kept == {"task-3": 9, "task-4": 16}
    assert list(failed) == ["task--1"]
    assert failed["task--1"].error == "ValueError: argument: expected a number >= 0, got -1"
    assert "in square" in failed["task--1"].trace


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills processes")
def test_a_worker_that_dies_loses_only_its_running_task_which_runs_again(tmp_path: Path) -> None:
    kept: list[tuple[str, int]] = []
    tasks = {f"task-{k}": (k, str(tmp_path / "died") if k == 2 else "") for k in range(6)}
    failed = run_campaign(tasks, die_once, keep_pairs(kept), processes=2, progress=False)
    assert failed == {}
    assert sorted(kept) == [(f"task-{k}", k * k) for k in range(6)]  # each once


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills processes")
def test_a_task_that_kills_its_workers_is_given_up_and_the_others_are_done() -> None:
    kept: dict[str, str] = {}
    failed = run_campaign({"a": False, "b": True, "c": False}, die, kept.__setitem__, processes=2, progress=False)
    assert kept == {"a": "done", "c": "done"}
    assert list(failed) == ["b"] and "died, twice" in failed["b"].error


def test_an_interrupt_keeps_what_has_come_back() -> None:
    kept: list[str] = []

    def keep(name: str, result: int) -> None:
        kept.append(name)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_campaign({str(k): k for k in range(5)}, square, keep, progress=False)
    assert kept == ["0", "1"]


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="processes: expected at least 1, got 0"):
        run_campaign({}, square, print, processes=0, progress=False)
    with pytest.raises(ValueError, match="scheduler: expected an address such as"):
        run_campaign({}, square, print, scheduler="myhost", progress=False)
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(ImportError, match=r"openmm-mlff\[cluster\]"):
        run_campaign({}, square, print, scheduler="tcp://127.0.0.1:1", progress=False)


# -- a Dask cluster on this machine ------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason="needs dask.distributed (extra 'cluster')")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as made:
        yield made


def test_a_cluster_gives_the_same_results(cluster: Any) -> None:
    kept: dict[str, int] = {}
    tasks = {f"task-{k}": k for k in (3, -1, 4)}
    failed = run_campaign(tasks, square, kept.__setitem__, scheduler=cluster.scheduler_address, progress=False)
    assert kept == {"task-3": 9, "task-4": 16}
    assert failed["task--1"].error == "ValueError: argument: expected a number >= 0, got -1"


def test_a_lost_worker_of_a_cluster_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    kept: list[tuple[str, int]] = []
    tasks = {f"task-{k}": (k, str(tmp_path / "died") if k == 2 else "") for k in range(8)}
    address = cluster.scheduler_address
    failed = run_campaign(tasks, die_once, keep_pairs(kept), scheduler=address, progress=False)
    assert (tmp_path / "died").exists() and failed == {}
    assert sorted(kept) == [(f"task-{k}", k * k) for k in range(8)]


def test_a_scheduler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="needs dask.distributed (extra 'cluster')")
    monkeypatch.setattr("openmm_mlff.data.campaigns.PATIENCE", 1.0)
    with pytest.raises(OSError):
        run_campaign({"a": 1}, square, print, scheduler="tcp://127.0.0.1:1", progress=False)
