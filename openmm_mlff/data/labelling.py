"""structures -> a labelled dataset on disk, in parallel and resumable.

Structures are labelled in blocks, one shard per block. A structure that cannot be labelled is left out, logged with
its reason in ``failures.jsonl``, and counted in the data card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openmm_mlff.data.datasets import Dataset, digest, finish_dataset
from openmm_mlff.data.jobs import claim_folder, run_tasks
from openmm_mlff.data.reference import LabelError, ReferenceMethod
from openmm_mlff.data.shards import write_shard
from openmm_mlff.data.structures import Structure, check_charge_and_multiplicity


def label_structures(
    structures: Sequence[Structure],
    method: ReferenceMethod,
    output: str | Path,
    *,
    name: str = "labelled",
    sampling: Mapping[str, Any] | None = None,
    processes: int = 1,
    block: int = 50,
    progress: bool = True,
) -> Dataset:
    """Label structures with a reference method and write them as a dataset.

    Args:
        structures: charge and multiplicity are their own.
        output: folder of the dataset; a second run with the same input goes on where the first one stopped.
        sampling: where the structures come from, for the data card.
        processes: how many blocks at once, one thread each.
        block: structures per shard.

    Raises `ValueError` for no structures, or a folder that was begun with other structures or another method;
    `ImportError` if the program is missing; `LabelError` if not one structure could be labelled.
    """
    if len(structures) == 0:
        raise ValueError("structures: expected at least one, got none")
    if block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")
    method.check()
    configuration = {
        "name": name,
        "input_sha256": digest(structures),
        "structures": len(structures),
        "block": block,
        "method": method.describe(),
        "sampling": dict(sampling or {}),
    }
    claim_folder(output, configuration)
    tasks = {
        f"block-{k // block:05d}": (method, k, list(structures[k : k + block]))
        for k in range(0, len(structures), block)
    }
    output = Path(output)
    outcome = run_tasks(
        tasks,
        label_block,
        output / "shards",
        log=output / "failures.jsonl",
        processes=processes,
        progress=progress,
        title="labels (blocks)",
    )
    failed_tasks = {task: error for task, error in outcome.failed.items() if task in tasks}
    if len(outcome.made) + len(outcome.kept) == 0 or len(Dataset(output)) == 0:
        errors = sorted(set(outcome.failed.values())) or sorted(set(Dataset(output).failures.values()))
        raise LabelError(f"not one of {len(structures)} structures could be labelled; the first reason: {errors[0]}")
    return finish_dataset(output, name=name, method=method, sampling=sampling or {}, failed_tasks=failed_tasks)


def label_block(argument: tuple[ReferenceMethod, int, Sequence[Structure]], path: Path) -> dict[str, str]:
    """Label ``(method, index of the first structure, structures)`` into one shard; returns the failures by index."""
    method, first, structures = argument
    labelled: list[Structure] = []
    failures: dict[str, str] = {}
    for index, structure in enumerate(structures, first):
        try:
            check_charge_and_multiplicity(structure.numbers, structure.charge, structure.multiplicity)
            labelled.append(method.label(structure))
        except ValueError as error:
            failures[str(index)] = f"{structure.formula}: {error}"
    write_shard(path, labelled, failures)
    return failures
