"""a dataset and an ensemble -> the next round of that dataset.

Starts are frames of the training set, one or a few per group; validation and test molecules are never explored. The
round has a folder of its own, and the dataset's card lists it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.classes import Topology, class_of_frame
from openmm_mlff.data.datasets import Dataset
from openmm_mlff.data.files import sha256_of, write_atomically
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.shards import read_header, read_shard, write_shard
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.collection_build import collection_summary
from openmm_mlff.sampling.collection_frames import Sampler
from openmm_mlff.sampling.collection_recipe import collection_from_table
from openmm_mlff.sampling.collection_systems import System
from openmm_mlff.sampling.selection import Committee, SelectionSettings, select_frames


def starts_of(dataset: Dataset, n: int, seed: int, classes: Sequence[str] = ()) -> list[Structure]:
    """`n` frames of the training set, dealt over its groups in turn, in random order.

    Args:
        classes: only frames of these; empty takes all. Single atoms are left out.

    Raises `ValueError` for a dataset without a training set, or one without such frames.
    """
    by_group: dict[str, list[int]] = defaultdict(list)
    wanted = set(dataset.indices("train").tolist())
    kept: dict[int, Structure] = {}
    for k, structure in enumerate(dataset):
        if k in wanted and len(structure) > 1 and (not classes or structure.info.get("class") in classes):
            by_group[structure.group].append(k)
            kept[k] = structure
    if not by_group:
        raise ValueError(f"classes: the training set of {dataset.path} has no frames of {', '.join(classes) or 'any'}")
    rng = np.random.default_rng(seed)
    names = [sorted(by_group)[i] for i in rng.permutation(len(by_group))]
    found: list[Structure] = []
    while len(found) < n and any(by_group.values()):
        for name in names:
            if by_group[name] and len(found) < n:
                index = by_group[name].pop(int(rng.integers(len(by_group[name]))))
                found.append(kept[index])
    return found


def method_of(dataset: Dataset) -> TBLite:
    """The method that labelled a dataset. Raises `ValueError` if it was not one of tblite's."""
    described = dataset.card.get("method", {})
    if not str(described.get("program", "")).startswith("tblite"):
        raise ValueError(f"method: expected a dataset labelled by tblite, got {described.get('method')!r}")
    method = TBLite(**described["settings"])
    if method.describe() != described:
        raise ValueError(f"method: {dataset.path} was labelled by {described}, here it would be {method.describe()}")
    return method


def select_round(
    path: str | Path,
    files: Sequence[str | Path],
    output: str | Path,
    settings: SelectionSettings,
    starts: int = 200,
    classes: Sequence[str] = (),
    processes: int = 1,
    progress: bool = True,
) -> Dataset:
    """Make the next round of a dataset: see `openmm_mlff.sampling.selection`.

    Args:
        path: the dataset. files: an ensemble's file, or those of its members. output: folder of the round.
        starts: trajectories. classes: only from frames of these.

    Raises what `starts_of`, `method_of` and `select_frames` raise.
    """
    dataset = Dataset(path)
    output = Path(output)
    committee = Committee(tuple(str(file) for file in files))
    chosen = starts_of(dataset, starts, settings.seed, classes)
    method = method_of(dataset)
    # a round that is begun again has its number already
    known = [entry for entry in dataset.card.get("rounds", []) if entry["name"] != output.name]
    made = select_frames(
        chosen,
        committee,
        method,
        output,
        settings,
        name=output.name,
        round_of={"dataset": dataset.card["name"], "classes": list(classes)},
        processes=processes,
        progress=progress,
    )
    _reclassify(made, dataset.card)
    made = _with_summary(output)
    entry = {"name": output.name, "card_sha256": sha256_of(output / "card.json"), **made.card["round"]}
    dataset.card["rounds"] = [*known, entry]
    _write(dataset.path / "card.json", dataset.card)
    return made


def _reclassify(made: Dataset, card: Mapping[str, Any]) -> None:
    """Frames take the class that they have now: dynamics move protons."""
    recipe = card.get("sampling", {}).get("recipe")
    if not isinstance(recipe, Mapping) or "families" not in recipe:
        return
    method = method_of(made)
    systems: dict[str, System] = {s.group: s for s in collection_from_table(recipe).systems}
    topologies: dict[str, Topology] = {}
    for shard in made.shards:
        renewed = []
        for s in read_shard(shard):
            system = systems[s.group]
            if s.group not in topologies:
                topologies[s.group] = Sampler(system, method).topology
            found, state = class_of_frame(system.built_class, topologies[s.group], s.positions, s.multiplicity)
            info = {**s.info, "class": found}
            info.pop("built_as", None)
            if found != system.built_class:
                info["built_as"] = system.built_class
            if state != "as built":
                info["protonation"] = state
            renewed.append(s.replace(info=info))
        write_shard(shard, renewed, read_header(shard).failures)


def _with_summary(output: Path) -> Dataset:
    """The round with the checksums of its shards as they are now, and its figures by class."""
    dataset = Dataset(output)
    for shard in dataset.shards:
        dataset.card["shards"][shard.name] |= {"bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    dataset.card["collection"] = collection_summary(dataset)
    _write(output / "card.json", dataset.card)
    return Dataset(output)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
