"""labelled structures -> a dataset on disk.

A dataset is a folder: ``shards/*.safetensors`` hold the structures, ``card.json`` says what they are. A shard
is one trajectory or one block of molecules; it is written under a temporary name and moved, so a shard
that exists is complete, and a run that was interrupted goes on with the missing ones.

A shard's tensors (``n`` structures, ``N`` atoms in all; structures laid end to end)::

    counts      (n,)     int32     atoms per structure
    numbers     (N,)     uint8     atomic numbers
    positions   (N, 3)   float64   angstrom
    charge      (n,)     int32     total charge, e
    multiplicity(n,)     int32     2S+1
    cell        (n, 3,3) float64   angstrom, NaN where open           (absent if all are open)
    energy      (n,)     float64   eV, NaN where unknown              (absent if all are unknown)
    forces      (N, 3)   float64   eV/angstrom                        (likewise)
    dipole      (n, 3)   float64   e*angstrom                         (likewise)
    charges     (N,)     float64   e                                  (likewise)

Its metadata hold ``groups`` and ``info`` (JSON lists, one entry per structure). Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from openmm_mlff.data.structures import Structure

FORMAT = "openmm-mlff-dataset-1"
_PER_STRUCTURE = {"cell": (3, 3), "energy": (), "dipole": (3,)}
_PER_ATOM = {"forces": (3,), "charges": ()}


def write_shard(path: str | Path, structures: Sequence[Structure]) -> None:
    """Write structures to one shard; the file appears only when it is complete.

    Raises `ValueError` for no structures.
    """
    if len(structures) == 0:
        raise ValueError("structures: expected at least one, got none")
    counts = np.array([len(s) for s in structures], dtype=np.int32)
    tensors: dict[str, np.ndarray] = {
        "counts": counts,
        "numbers": np.concatenate([s.numbers for s in structures]).astype(np.uint8),
        "positions": np.concatenate([s.positions for s in structures]),
        "charge": np.array([s.charge for s in structures], dtype=np.int32),
        "multiplicity": np.array([s.multiplicity for s in structures], dtype=np.int32),
    }
    for name, shape in (_PER_STRUCTURE | _PER_ATOM).items():
        values = [getattr(s, name) for s in structures]
        if all(v is None for v in values):
            continue
        rows = [1] * len(values) if name in _PER_STRUCTURE else counts.tolist()
        filled = [np.full((r, *shape), np.nan) if v is None else np.asarray(v, dtype=np.float64).reshape(r, *shape)
                  for v, r in zip(values, rows, strict=True)]  # fmt: skip
        tensors[name] = np.ascontiguousarray(np.concatenate(filled))
    metadata = {
        "format": FORMAT,
        "groups": json.dumps([s.group for s in structures]),
        "info": json.dumps([dict(s.info) for s in structures]),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def read_shard(path: str | Path) -> list[Structure]:
    """All structures of one shard. Raises `ValueError` if the file is not a shard of a known format."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: expected a shard of format {FORMAT}, got {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, but it cannot be read ({error})") from error
    groups, info = json.loads(metadata["groups"]), json.loads(metadata["info"])
    ends = np.cumsum(tensors["counts"])
    structures = []
    for k, end in enumerate(ends):
        atoms = slice(int(end - tensors["counts"][k]), int(end))
        labels: dict[str, Any] = {}
        for name in _PER_STRUCTURE | _PER_ATOM:
            if name in tensors:
                value = tensors[name][k if name in _PER_STRUCTURE else atoms]
                labels[name] = None if np.isnan(value).any() else value
        structures.append(
            Structure(
                tensors["numbers"][atoms],
                tensors["positions"][atoms],
                int(tensors["charge"][k]),
                int(tensors["multiplicity"][k]),
                group=groups[k],
                info=info[k],
                **labels,
            )
        )
    return structures


def iterate_shards(paths: Iterable[str | Path]) -> Iterable[Structure]:
    """Structures of many shards, one shard in memory at a time."""
    for path in paths:
        yield from read_shard(path)
