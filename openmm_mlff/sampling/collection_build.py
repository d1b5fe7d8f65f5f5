"""a recipe of many molecules -> a dataset: sample, label, check, write the card.

Each system is one task and one shard, named after the system and a digest of all that decides its frames. So a run
goes on where it stopped, and when the recipe has changed, only what it changes is made anew; shards that the recipe
no longer has are moved to ``stale/``. Classes and splits stand in every structure's ``info``.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.classes import CLASSES
from openmm_mlff.data.collection_card import markdown
from openmm_mlff.data.datasets import Dataset, finish_dataset
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import claim_folder, run_tasks
from openmm_mlff.data.reference import LabelError
from openmm_mlff.data.shards import read_header, read_shard, write_shard
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.collection_frames import make_system
from openmm_mlff.sampling.collection_recipe import CollectionRecipe
from openmm_mlff.sampling.collection_systems import System


def build_collection(
    recipe: CollectionRecipe,
    output: str | Path,
    processes: int = 1,
    progress: bool = True,
    classes: Sequence[str] = (),
) -> Dataset:
    """Make the systems whose shards are not there yet, and write the data card (``card.json`` and ``card.md``).

    Args:
        processes: systems at once, one thread each.
        classes: make only systems that are built as one of these; what is there of others stays.

    Raises `ValueError` for a folder that was begun with another name, seed, scale or method, or a class that the recipe
    has not; `ImportError` if a program is missing, and `LabelError` if not one structure could be made. Single failures
    are in ``failures.jsonl`` and in the card.
    """
    recipe.method.check()
    tasks = {f"{s.name}-{s.digest}": s for s in recipe.of_classes(classes)}
    output = Path(output)
    configuration = {"recipe": recipe.name, "seed": recipe.seed, "scale": recipe.scale}
    claim_folder(output, {**configuration, "method": recipe.method.describe()})
    _set_stale_aside(output, {f"{s.name}-{s.digest}" for s in recipe.systems})
    outcome = run_tasks(
        {name: (system, recipe.method) for name, system in tasks.items()},
        make_system,
        output / "shards",
        log=output / "failures.jsonl",
        processes=processes,
        progress=progress,
        title="systems",
    )
    for name in outcome.kept:
        _renew_split(output / "shards" / f"{name}.safetensors", tasks[name])
    failed = {name: error for name, error in outcome.failed.items() if name in tasks}
    if len(failed) == len(tasks) or len(Dataset(output)) == 0:
        first = next(iter(outcome.failed.values()), "no frames")
        raise LabelError(f"not one of {len(tasks)} systems could be made; the first reason: {first}")
    return finish_collection(output, recipe, failed)


def finish_collection(output: Path, recipe: CollectionRecipe, failed: dict[str, str]) -> Dataset:
    """Write the cards of a folder whose shards are there; `failed` names systems without a shard, with the reason.

    Rounds that an earlier card lists stay listed.
    """
    rounds = Dataset(output).card.get("rounds", [])
    splits: dict[str, list[str]] = defaultdict(list)
    present = set(Dataset(output).groups)
    for group, split in {s.group: s.split for s in recipe.systems}.items():
        if group in present:
            splits[split].append(group)
    dataset = finish_dataset(
        output,
        name=recipe.name,
        method=recipe.method,
        sampling={
            "recipe": recipe.table,
            "scale": recipe.scale,
            "systems": len(recipe.systems),
            "versions": _versions(),
        },
        splits=splits,
        seed=recipe.seed,
        failed_tasks=failed,
    )
    dataset.card["collection"] = collection_summary(dataset)
    if rounds:
        dataset.card["rounds"] = rounds
    write_atomically(output / "card.json", (json.dumps(dataset.card, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(output / "card.md", markdown(dataset.card).encode())
    return Dataset(output)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("rdkit", "openmm", "numpy")}


def _set_stale_aside(output: Path, wanted: set[str]) -> None:
    """Move shards that the recipe no longer has out of the dataset; nothing is deleted."""
    for shard in sorted((output / "shards").glob("[!.]*.safetensors")):
        if shard.stem not in wanted:
            (output / "stale").mkdir(exist_ok=True)
            shard.replace(output / "stale" / shard.name)


def _renew_split(shard: Path, system: System) -> None:
    """A shard made before the recipe's splits changed takes the new ones."""
    structures = read_shard(shard)
    wanted = {"split": system.split} | ({"held_out": system.held_out} if system.held_out else {})
    if not structures or {k: structures[0].info[k] for k in ("split", "held_out") if k in structures[0].info} == wanted:
        return
    renewed = []
    for structure in structures:
        kept = {key: value for key, value in structure.info.items() if key not in ("split", "held_out")}
        renewed.append(structure.replace(info={**kept, **wanted}))
    write_shard(shard, renewed, read_header(shard).failures)


def collection_summary(structures: Iterable[Structure]) -> dict[str, Any]:
    """What the card says by class, in one pass: counts by split, sizes, forces, and how frames were made."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in CLASSES}
    squares: Counter[str] = Counter()
    components: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    tables: dict[str, Counter[str]] = {key: Counter() for key in ("sources", "protonation", "held_out", "families")}
    sizes: list[int] = []
    for s in structures:
        name = str(s.info["class"])
        sizes.append(len(s))
        counts[name]["all"] += 1
        counts[name][str(s.info["split"])] += 1
        counts[name]["held out families"] += s.info.get("held_out") == "family"
        for key, label in (("sources", "source"), ("protonation", "protonation"), ("held_out", "held_out")):
            tables[key][str(s.info.get(label, "as built" if key == "protonation" else ""))] += 1
        tables["families"][str(s.info["family"])] += 1
        if s.forces is not None:
            squares[name] += float(np.sum(s.forces**2))  # type: ignore[assignment]
            components[name] += s.forces.size
            largest[name] = max(largest[name], float(np.abs(s.forces).max()))  # type: ignore[assignment]
    del tables["held_out"][""]
    return {
        "classes": {
            name: {
                **counter,
                "force_component_rms": round(float(np.sqrt(squares[name] / max(1, components[name]))), 4),
                "force_component_max": round(float(largest[name]), 3),
            }
            for name, counter in counts.items()
            if counter
        },
        **{key: dict(sorted(counter.items())) for key, counter in tables.items()},
        "sizes": _histogram(sizes),
    }


def _histogram(sizes: Sequence[int]) -> dict[str, int]:
    """Structures by atom count, in tens."""
    bins = Counter((n - 1) // 10 for n in sizes)
    return {f"{10 * k + 1}-{10 * k + 10}": bins[k] for k in sorted(bins)}
