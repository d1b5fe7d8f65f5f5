"""labelled structures -> one file of a dataset (a shard), and back.

A shard is a safetensors file (see `files`) with the tensors below, ``n`` structures laid end to end, ``N`` atoms in
all::

    counts        (n,)      int32    atoms per structure
    numbers       (N,)      uint8    atomic numbers
    positions     (N, 3)    float64  angstrom
    charge        (n,)      int32    total charge, e
    multiplicity  (n,)      int32    2S+1
    cell          (n, 3, 3) float64  angstrom, NaN where open     (absent if all are open)
    energy        (n,)      float64  eV, NaN where unknown        (absent if all are unknown)
    forces        (N, 3)    float64  eV/angstrom                  (likewise)
    dipole        (n, 3)    float64  e*angstrom                   (likewise)
    charges       (N,)      float64  e                            (likewise)

Its header has ``format``, ``groups`` and ``info`` (an entry per structure), ``failures`` (structures that the shard
should have held and could not, with the reason).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.files import read_arrays, write_arrays
from openmm_mlff.data.structures import Structure

FORMAT = "openmm-mlff-dataset-1"
#: optional tensors and the shape of one entry.
PER_STRUCTURE: dict[str, tuple[int, ...]] = {"cell": (3, 3), "energy": (), "dipole": (3,)}
PER_ATOM: dict[str, tuple[int, ...]] = {"forces": (3,), "charges": ()}


@dataclass(frozen=True)
class ShardHeader:
    """What a shard holds, read without its tensors."""

    groups: tuple[str, ...]
    failures: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.groups)


def write_shard(path: str | Path, structures: Sequence[Structure], failures: Mapping[str, str] | None = None) -> None:
    """Write structures to one shard; the file appears only when it is complete.

    Args:
        failures: structures that are missing from the shard, by name, with the reason.

    Raises `ValueError` for no structures and no failures either.
    """
    if len(structures) == 0 and not failures:
        raise ValueError("structures: expected at least one, got none")
    counts = np.array([len(s) for s in structures], dtype=np.int32)
    tensors: dict[str, np.ndarray] = {
        "counts": counts,
        "numbers": np.concatenate([np.empty(0, np.uint8), *(s.numbers.astype(np.uint8) for s in structures)]),
        "positions": np.concatenate([np.empty((0, 3)), *(s.positions for s in structures)]),
        "charge": np.array([s.charge for s in structures], dtype=np.int32),
        "multiplicity": np.array([s.multiplicity for s in structures], dtype=np.int32),
    }
    for name, shape in (PER_STRUCTURE | PER_ATOM).items():
        values = [getattr(s, name) for s in structures]
        if all(v is None for v in values):
            continue
        rows = [1] * len(values) if name in PER_STRUCTURE else counts.tolist()
        filled = [
            np.full((r, *shape), np.nan) if v is None else np.asarray(v, dtype=np.float64).reshape(r, *shape)
            for v, r in zip(values, rows, strict=True)
        ]
        tensors[name] = np.ascontiguousarray(np.concatenate(filled))
    header = {
        "groups": [s.group for s in structures],
        "info": [dict(s.info) for s in structures],
        "failures": dict(failures or {}),
    }
    write_arrays(path, FORMAT, tensors, header)


def read_header(path: str | Path) -> ShardHeader:
    """Groups and failures of a shard. Raises `ValueError` if the file is not a shard of a known format."""
    header, _ = read_arrays(path, FORMAT, "a shard", names=())
    return ShardHeader(tuple(header["groups"]), header["failures"])


def read_shard(path: str | Path) -> list[Structure]:
    """All structures of one shard. Raises `ValueError` if the file is not a shard of a known format."""
    header, tensors = read_arrays(path, FORMAT, "a shard")
    ends = np.cumsum(tensors["counts"])
    structures = []
    for k, end in enumerate(ends):
        atoms = slice(int(end - tensors["counts"][k]), int(end))
        labels: dict[str, Any] = {}
        for name in PER_STRUCTURE | PER_ATOM:
            if name in tensors:
                value = tensors[name][k if name in PER_STRUCTURE else atoms]
                labels[name] = None if np.isnan(value).any() else value
        structures.append(
            Structure(
                tensors["numbers"][atoms],
                tensors["positions"][atoms],
                int(tensors["charge"][k]),
                int(tensors["multiplicity"][k]),
                group=header["groups"][k],
                info=header["info"][k],
                **labels,
            )
        )
    return structures
