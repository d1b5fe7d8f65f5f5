"""shards -> a dataset: labels, groups, splits, checksums and a data card.

A dataset is a folder. ``shards/*.safetensors`` hold the structures (see `openmm_mlff.data.shards`) and ``card.json``
says what they are: method and versions, elements, formulas, charges, multiplicities, units, energy reference, how
they were sampled, with which seeds, the split, and the sha256 of every shard. A folder whose card is not there yet
(a run under way) can be read as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff import __version__
from openmm_mlff.data.files import sha256_of, write_atomically
from openmm_mlff.data.reference import LabelError, ReferenceMethod
from openmm_mlff.data.shards import FORMAT, read_header, read_shard, write_shard
from openmm_mlff.data.structures import SYMBOLS, Structure

UNITS = {
    "positions": "angstrom",
    "energy": "eV",
    "forces": "eV/angstrom",
    "dipole": "e*angstrom, about the origin of the coordinates",
    "charges": "e",
    "charge": "e",
    "multiplicity": "2S+1",
}


class Dataset:
    """Structures of a folder, in the order of its shards' names; a shard is read when one of its structures is needed.

    Attributes:
        path: the folder.
        card: the data card; empty while there is none.
        shards: paths of the shards.
        groups: group of every structure, ``(n_structures,)``.

    Raises `FileNotFoundError` if there are no shards, `ValueError` if one is damaged or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shards = sorted((self.path / "shards").glob("[!.]*.safetensors"))
        if not self.shards:
            raise FileNotFoundError(f"{self.path}: expected a dataset (a folder with shards/*.safetensors), found none")
        card = self.path / "card.json"
        self.card: dict[str, Any] = json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
        headers = [read_header(shard) for shard in self.shards]
        self.failures = {
            f"{p.stem}/{k}": v for p, h in zip(self.shards, headers, strict=True) for k, v in h.failures.items()
        }
        self.groups = [group for header in headers for group in header.groups]
        self._ends = np.cumsum([len(header) for header in headers])
        self._shard = functools.lru_cache(maxsize=4)(read_shard)

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path]]:
        return Dataset, (self.path,)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Structure:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected less than {len(self)} structures, got {index}")
        index %= len(self)
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self._shard(self.shards[k])[index - (int(self._ends[k - 1]) if k else 0)]

    def __iter__(self) -> Iterator[Structure]:
        for shard in self.shards:
            yield from read_shard(shard)

    @property
    def splits(self) -> dict[str, list[str]]:
        """Groups of every split, as the card records them."""
        return dict(self.card.get("splits", {}).get("groups", {}))

    def indices(self, split: str) -> np.ndarray:
        """Which structures belong to a split. Raises `ValueError` for a split that the card does not have."""
        if split not in self.splits:
            raise ValueError(f"split: {self.path} has {sorted(self.splits) or 'no splits'}, got {split!r}")
        members = set(self.splits[split])
        return np.flatnonzero([group in members for group in self.groups])

    def structures(self, split: str | None = None) -> Iterator[Structure]:
        """Stream the structures of a split (or all), one shard in memory at a time."""
        if split is None:
            yield from self
            return
        members = set(self.splits[split]) if len(self.indices(split)) else set()
        for structure in self:
            if structure.group in members:
                yield structure

    def load(self, split: str | None = None) -> list[Structure]:
        """The structures of a split (or all) in memory."""
        return list(self.structures(split))

    def verify(self) -> None:
        """Compare every shard with the card's checksum.

        Raises `ValueError` naming the first shard that is missing, changed or unknown to the card.
        """
        recorded: dict[str, Any] = self.card.get("shards", {})
        if not recorded:
            raise ValueError(f"{self.path}: expected a card.json with checksums, found none")
        for shard in self.shards:
            if shard.name not in recorded:
                raise ValueError(f"{shard}: the card does not know this shard")
            if sha256_of(shard) != recorded[shard.name]["sha256"]:
                raise ValueError(f"{shard}: the contents have changed (sha256 differs from the card)")
        missing = set(recorded) - {shard.name for shard in self.shards}
        if missing:
            raise ValueError(f"{self.path}: the shard {sorted(missing)[0]} is missing")


def digest(structures: Iterable[Structure]) -> str:
    """sha256 over atoms, positions, cell, charge, multiplicity and group: tells one input from another."""
    total = hashlib.sha256()
    for s in structures:
        cell = b"" if s.cell is None else s.cell.tobytes()
        state = f"{s.charge},{s.multiplicity},{s.group}".encode()
        for part in (s.numbers.tobytes(), s.positions.tobytes(), cell, state):
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def split_by_group(groups: Sequence[str], fractions: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Deal whole groups (molecules, trajectories) to splits.

    Groups are shuffled; every split gets one, the smallest first, and each further group goes to the split that lacks
    most structures.

    Args:
        groups: group of every structure.
        fractions: wanted share of the structures by split; they must add up to one.
        seed: of the shuffle.

    Returns the groups of every split. Raises `ValueError` for fractions that do not add up to one, structures without
    a group, or fewer groups than splits.
    """
    if abs(sum(fractions.values()) - 1.0) > 1e-6 or min(fractions.values()) <= 0:
        raise ValueError(f"fractions: expected positive numbers that add up to 1, got {dict(fractions)}")
    if "" in groups:
        raise ValueError("groups: expected a group for every structure, got structures without one")
    counts = Counter(groups)
    names = np.random.default_rng(seed).permutation(sorted(counts)).tolist()
    if len(names) < len(fractions):
        raise ValueError(
            f"groups: expected at least {len(fractions)} groups for {len(fractions)} splits, got {len(names)}"
        )
    lacking = {split: share * len(groups) for split, share in fractions.items()}
    result: dict[str, list[str]] = {split: [] for split in fractions}
    empty = sorted(fractions, key=lambda split: fractions[split], reverse=True)
    for name in names:
        split = empty.pop() if empty else max(lacking, key=lambda s: lacking[s])
        result[split].append(name)
        lacking[split] -= counts[name]
    return {split: sorted(members) for split, members in result.items()}


def _splits_entry(dataset: Dataset, groups: Mapping[str, Sequence[str]], how: str, seed: int | None) -> dict[str, Any]:
    counts = Counter(dataset.groups)
    return {
        "how": how,
        "seed": seed,
        "structures": {split: sum(counts[g] for g in members) for split, members in groups.items()},
        "groups": {split: sorted(members) for split, members in groups.items()},
    }


def split_dataset(path: str | Path, fractions: Mapping[str, float], seed: int) -> Dataset:
    """Record a new split by group in the card of a finished dataset. Raises what `split_by_group` raises."""
    dataset = Dataset(path)
    if not dataset.card:
        raise ValueError(f"{path}: expected a finished dataset with a card.json, found none")
    groups = split_by_group(dataset.groups, fractions, seed)
    dataset.card["splits"] = _splits_entry(dataset, groups, "whole groups, shuffled", seed)
    _write_json(dataset.path / "card.json", dataset.card)
    return dataset


def summarize(structures: Iterable[Structure]) -> dict[str, Any]:
    """Counts and ranges for the card, in one pass."""
    counters: dict[str, Counter[str]] = {k: Counter() for k in ("formulas", "charges", "multiplicities", "labels")}
    elements: Counter[int] = Counter()
    n, energies, squares, largest = 0, [], 0.0, 0.0
    force_components = 0
    for s in structures:
        n += 1
        elements.update(s.numbers.tolist())
        counters["formulas"][s.formula] += 1
        counters["charges"][str(s.charge)] += 1
        counters["multiplicities"][str(s.multiplicity)] += 1
        counters["labels"].update(
            k for k in ("energy", "forces", "dipole", "charges", "cell") if getattr(s, k) is not None
        )
        if s.energy is not None:
            energies.append(s.energy / len(s))
        if s.forces is not None:
            squares += float(np.sum(s.forces**2))
            force_components += s.forces.size
            largest = max(largest, float(np.abs(s.forces).max()))
    ranges: dict[str, float] = {}
    if energies:
        ranges |= {
            "energy_per_atom_min": float(np.min(energies)),
            "energy_per_atom_mean": float(np.mean(energies)),
            "energy_per_atom_max": float(np.max(energies)),
        }
    if force_components:
        ranges |= {"force_component_rms": float(np.sqrt(squares / force_components)), "force_component_max": largest}
    return {
        "n_structures": n,
        "n_atoms": sum(elements.values()),
        "elements": {SYMBOLS[z]: c for z, c in sorted(elements.items())},
        **{name: dict(sorted(counter.items())) for name, counter in counters.items()},
        "ranges": ranges,
    }


def finish_dataset(
    path: str | Path,
    *,
    name: str,
    method: ReferenceMethod | Mapping[str, Any],
    sampling: Mapping[str, Any],
    splits: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
    failed_tasks: Mapping[str, str] | None = None,
) -> Dataset:
    """Write the data card of a folder whose shards are there.

    Args:
        method: what made the labels, or its description.
        sampling: how the structures were made, JSON-like (a recipe, or the files).
        splits: groups by split, if the sampling decides them.
        failed_tasks: shards that could not be made, with the reason.

    Raises `FileNotFoundError` if there are no shards.
    """
    dataset = Dataset(path)
    summary = summarize(dataset)
    failures = dataset.failures | dict(failed_tasks or {})
    described: Mapping[str, Any] = method if isinstance(method, Mapping) else method.describe()
    card: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "made_by": f"openmm-mlff {__version__}",
        "method": dict(described),
        "atom_energies": _atom_energies(method, summary["elements"]),
        "units": UNITS,
        **summary,
        "n_groups": len(set(dataset.groups)),
        "sampling": dict(sampling),
        "failures": {"count": len(failures), "reasons": dict(Counter(failures.values()).most_common(20))},
        "shards": {
            shard.name: {
                "structures": len(read_header(shard)),
                "bytes": shard.stat().st_size,
                "sha256": sha256_of(shard),
            }
            for shard in dataset.shards
        },
    }
    if splits:
        card["splits"] = _splits_entry(dataset, splits, "by the sampling recipe", seed)
    _write_json(dataset.path / "card.json", card)
    return Dataset(path)


def _atom_energies(method: ReferenceMethod | Mapping[str, Any], elements: Iterable[str]) -> dict[str, float]:
    energies: dict[str, float] = {}
    if isinstance(method, Mapping):
        return energies
    for symbol in elements:
        try:
            energies[symbol] = method.atom_energy(SYMBOLS.index(symbol))
        except LabelError:
            continue
    return energies


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_dataset(
    path: str | Path,
    structures: Iterable[Structure],
    *,
    name: str,
    method: ReferenceMethod | Mapping[str, Any],
    sampling: Mapping[str, Any],
    shard_size: int = 1000,
) -> Dataset:
    """Write structures that already have labels (or need none) as a dataset.

    Raises `FileExistsError` if the folder holds shards already, `ValueError` for no structures.
    """
    folder = Path(path) / "shards"
    if any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{path}: there is a dataset already")
    block: list[Structure] = []
    k = 0
    for structure in structures:
        block.append(structure)
        if len(block) == shard_size:
            write_shard(folder / f"block-{k:05d}.safetensors", block)
            block, k = [], k + 1
    if block or k == 0:
        write_shard(folder / f"block-{k:05d}.safetensors", block)
    return finish_dataset(path, name=name, method=method, sampling=sampling)


def concatenate(paths: Sequence[str | Path], output: str | Path, name: str) -> Dataset:
    """Join finished datasets of one method into a new folder; shards are copied as they are.

    Splits are kept if every part has them. Groups of the same name count as one group.

    Raises `ValueError` if methods or energy references differ, or if a group would be in two splits;
    `FileExistsError` if the output holds shards already.
    """
    parts = [Dataset(path) for path in paths]
    output = Path(output)
    if any((output / "shards").glob("*.safetensors")):
        raise FileExistsError(f"{output}: there is a dataset already")
    for part in parts:
        if not part.card:
            raise ValueError(f"{part.path}: expected a finished dataset with a card.json, found none")
        for key in ("method", "atom_energies"):
            if not _agree(part.card[key], parts[0].card[key]):
                raise ValueError(f"{key}: {part.path} and {parts[0].path} differ, so their energies cannot be mixed")
    splits: dict[str, list[str]] = {}
    if all(part.splits for part in parts):
        for part in parts:
            for split, members in part.splits.items():
                splits[split] = sorted({*splits.get(split, []), *members})
        twice = [g for g, c in Counter(g for members in splits.values() for g in members).items() if c > 1]
        if twice:
            raise ValueError(f"splits: the group {twice[0]!r} would be in two splits")
    (output / "shards").mkdir(parents=True, exist_ok=True)
    for k, part in enumerate(parts):
        for shard in part.shards:
            shutil.copyfile(shard, output / "shards" / f"{k:02d}-{shard.name}")
    joined = finish_dataset(
        output,
        name=name,
        method=parts[0].card["method"],
        sampling={"concatenated": [part.card["name"] for part in parts], "parts": [p.card["sampling"] for p in parts]},
        splits=splits or None,
    )
    atoms: dict[str, float] = {}
    for part in parts:
        atoms |= part.card["atom_energies"]
    joined.card["atom_energies"] = atoms
    _write_json(joined.path / "card.json", joined.card)
    return joined


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Equal in every key that both have (two datasets may hold different elements)."""
    return all(one[key] == other[key] for key in set(one) & set(other))
