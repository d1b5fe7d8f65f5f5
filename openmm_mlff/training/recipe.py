"""a recipe (TOML, JSON or YAML), datasets -> a trained model file with its card.

A recipe holds everything that decides a training but the data::

    family = "spookynet"
    seed = 1                  # of the initial parameters, the order of the data and a split that is made here
    batch_size = 8
    batch_atoms = 512         # for data of many sizes: atoms in a batch, which then holds all sizes
    native = true             # C++ kernels that have second derivatives, where the family has them (CPU, one thread)
    compile = true            # one compiled graph of the loss and its gradients; same numbers, fewer milliseconds
    threads = 1
    processes = 3             # that share each batch, with one thread each
    fit_energies = true       # also where a training starts from a model: needed for labels of another method

    [model]                   # the family's config; `elements` are those of the training set if not given
    num_modules = 2

    [loop]                    # the fields of LoopOptions
    steps = 100000

    [loss]                    # the fields of LossWeights at the start ...
    energy = 0.01
    [final_loss]              # ... and, optionally, at the end
    energy = 5.0

    [trainer]                 # instead of the four above, for families that are fitted by solving equations (gdml):
    sigma = [10, 20, 30]      # the options of the family's trainer

    [data]                    # for datasets without a recorded split
    fractions = { train = 0.8, valid = 0.1, test = 0.1 }
    block_size = 100          # consecutive structures without a group, or of a file's only one, become groups
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from openmm_mlff._plugins import near
from openmm_mlff.data.datasets import Dataset, split_by_group
from openmm_mlff.data.files import sha256_of
from openmm_mlff.data.formats import read_structures
from openmm_mlff.data.joining import join_apart
from openmm_mlff.data.structures import Structure
from openmm_mlff.training.loop_options import LoopOptions
from openmm_mlff.training.losses import LossWeights

SPLITS = ("train", "valid", "test")
T = TypeVar("T")


@dataclass(frozen=True)
class DataOptions:
    """How structures without a recorded split are dealt out.

    Attributes:
        fractions: share of the structures by split; whole groups go to one split.
        block_size: consecutive structures that count as one group, where a file names no groups or a single one; None
            refuses structures without a group, because neighbouring frames in two splits would make errors look small.
        intact_only: leave out structures whose ``info`` says that their bonds are not intact.
        joined: structures of two molecules far apart to be made of the training set and added to it, as a share of it
            (see `data.joining`).
        seed: of this split; None takes the recipe's. Members of an ensemble share it.
    """

    fractions: Mapping[str, float] = field(default_factory=lambda: {"train": 0.8, "valid": 0.1, "test": 0.1})
    block_size: int | None = None
    intact_only: bool = True
    joined: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.fractions if name not in SPLITS]
        if unknown or "train" not in self.fractions or "valid" not in self.fractions:
            raise ValueError(f"fractions: expected train, valid and perhaps test, got {dict(self.fractions)}")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {self.block_size}")
        if not self.joined >= 0:
            raise ValueError(f"joined: expected a share >= 0, got {self.joined!r}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training but the data; see the example above.

    Attributes:
        family: a registered family. model: fields of its config.
        trainer: options of the trainer of families that have one of their own.
        loss, final_loss: weights at the start and at the end; a recipe with [loss] alone keeps those weights.
        seed: of initial parameters, data order and splits. threads: of torch; None leaves them as they are.
        batch_size: structures per step. batch_atoms: atoms per step, see `training.batching.LabelledSet.epoch`.
        native: let the model train with C++ kernels that have second derivatives.
        compile: see `training.compiled_loss`. processes: that share each batch, see `training.parallel`.
        fit_energies: fit energies of elements before the first step; None does so unless training starts from a model.
    """

    family: str = "spookynet"
    model: Mapping[str, Any] = field(default_factory=dict)
    loop: LoopOptions = field(default_factory=LoopOptions)
    loss: LossWeights = field(default_factory=lambda: LossWeights(energy=0.01))
    final_loss: LossWeights | None = field(default_factory=lambda: LossWeights(energy=5.0))
    trainer: Mapping[str, Any] = field(default_factory=dict)
    data: DataOptions = field(default_factory=DataOptions)
    batch_size: int = 8
    batch_atoms: int | None = None
    seed: int = 0
    compile: bool = False
    native: bool = False
    threads: int | None = None
    processes: int = 1
    fit_energies: bool | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """A recipe from plain tables. Raises `ValueError` naming an unknown key or a value of the wrong kind."""
        values = dict(content)
        if "loss" in values:
            values.setdefault("final_loss", None)
        for name, section in _SECTIONS.items():
            if values.get(name) is not None:
                values[name] = options_from(section, values[name], name)
        if "seed" in values and "seed" not in dict(content.get("loop") or {}):
            values["loop"] = dataclasses.replace(values.get("loop", LoopOptions()), seed=values["seed"])
        return options_from(cls, values, "recipe")

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """A recipe from a ``.toml``, ``.json`` or ``.yaml`` file (the last needs PyYAML)."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"config: no file at {path}")
        try:
            if path.suffix == ".toml":
                return cls.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
            if path.suffix == ".json":
                return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"config: {path}: {error}") from error
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(f"config: expected a file ending in .toml, .json, .yaml or .yml, got {path.name!r}")
        try:
            import yaml  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("a YAML recipe needs PyYAML (pip install pyyaml); TOML and JSON need nothing") from error
        return cls.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, as `from_dict` takes them."""
        content = asdict(self)
        if self.data.seed is None:
            # as it was stored before there was a choice
            del content["data"]["seed"]
        if self.fit_energies is None:
            del content["fit_energies"]
        return content


_SECTIONS: dict[str, type] = {"loop": LoopOptions, "loss": LossWeights, "final_loss": LossWeights, "data": DataOptions}


def options_from(kind: type[T], values: Any, where: str) -> T:
    """A dataclass of plain options from a table; `ValueError` naming an unknown key or a value of the wrong kind."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a table, got {values!r}")
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: no option is called {key!r}; {near(key, known)}")
        wanted = str(known[key].type)
        if not _fits(value, wanted):
            raise ValueError(f"{key}: expected {wanted} in [{where}], got {value!r}")
    return kind(**values)


def _fits(value: Any, wanted: str) -> bool:
    """Whether a plain value can be what the annotation says; tables and sections are checked by who builds them."""
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool}
    names = [name.strip() for name in wanted.split("|")]
    if value is None:
        return "None" in names
    simple = [kinds[name] for name in names if name in kinds]
    if any(name not in kinds and name != "None" for name in names):
        return True
    if isinstance(value, bool):
        return "bool" in names
    return any(isinstance(value, kind) for kind in simple)  # type: ignore[arg-type]


# -- data ------------------------------------------------------------------------------------------------------------


@dataclass
class TrainingData:
    """Structures of every split, and the description that goes into the model's card."""

    splits: dict[str, list[Structure]]
    description: dict[str, Any]


def load_data(paths: Sequence[str | Path], options: DataOptions, seed: int) -> TrainingData:
    """Read datasets (folders) and structure files and deal them to splits, whole groups only.

    Datasets with a recorded split keep it; the rest is split by `options` and `seed`. Groups of the same name count as
    one group.

    Raises `FileNotFoundError` and `ValueError` (damaged data; structures without a group and no block size; a group in
    two splits; an empty training or validation set).
    """
    if not paths:
        raise ValueError("data: expected at least one dataset or file, got none")
    seed = seed if options.seed is None else options.seed
    splits: dict[str, list[Structure]] = {name: [] for name in SPLITS}
    rest: list[Structure] = []
    sources = []
    for path in map(Path, paths):
        dataset = Dataset(path) if path.is_dir() else None
        if dataset is not None and dataset.splits:
            for name in SPLITS:
                if name in dataset.splits:
                    splits[name] += dataset.load(name)
        else:
            structures = dataset.load() if dataset is not None else read_structures(path)
            rest += _with_groups(structures, options.block_size, path.stem)
        sources.append(source_of(path, dataset))
    if rest:
        _deal(rest, splits, options, seed)
    dropped = _drop_broken(splits) if options.intact_only else 0
    _check_splits(splits)
    added = round(options.joined * len(splits["train"]))
    splits["train"] += join_apart(splits["train"], added, seed)
    groups = {name: sorted({s.group for s in members}) for name, members in splits.items()}
    description = {
        "sources": sources,
        "structures": {name: len(members) for name, members in splits.items()},
        "groups": groups,
        "left_out_broken": dropped,
        **({"joined": added} if added else {}),
        "split": {"by": "group", "seed": seed, "fractions": dict(options.fractions)} if rest else {"by": "dataset"},
    }
    return TrainingData(splits, description)


def source_of(path: Path, dataset: Dataset | None) -> dict[str, Any]:
    """Name, method and checksums of a dataset or a file, for cards and configurations."""
    if dataset is None:
        return {"name": path.name, "sha256": sha256_of(path)}
    shards = {shard.name: sha256_of(shard) for shard in dataset.shards}
    return {"name": dataset.card.get("name", path.name), "method": dataset.card.get("method"), "shards": shards}


def load_labelled(paths: Sequence[str | Path], split: str | None) -> tuple[list[Structure], list[dict[str, Any]]]:
    """Structures of datasets (only one split, if named) and files, and what they are.

    Raises `FileNotFoundError` for a path where nothing is, `ValueError` if a split is wanted from data that has none,
    or if nothing is left.
    """
    structures: list[Structure] = []
    sources = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"data: no folder or file at {path}")
        dataset = Dataset(path) if path.is_dir() else None
        if dataset is not None:
            recorded = split is None or bool(dataset.splits)
            members = dataset.load(split) if recorded else _meant_for(dataset.load(), str(split), path)
        elif split is not None:
            raise ValueError(f"split: {path.name} is a file without splits, got {split!r}")
        else:
            members = read_structures(path)
        structures += members
        sources.append(source_of(path, dataset))
    if not structures:
        raise ValueError(f"data: expected structures in {', '.join(map(str, paths))}, found none")
    return structures, sources


def _meant_for(structures: list[Structure], split: str, path: Path) -> list[Structure]:
    """A run under way has no card, but its sampling may have noted what each trajectory is meant for."""
    if not all("split" in s.info for s in structures):
        raise ValueError(f"split: {path} has no recorded splits, got {split!r}")
    return [s for s in structures if s.info["split"] == split]


def _with_groups(structures: list[Structure], block_size: int | None, stem: str) -> list[Structure]:
    groups = {s.group for s in structures}
    if "" not in groups and (len(groups) > 1 or block_size is None):
        return structures
    if block_size is None:
        raise ValueError(
            f"data: {stem} has structures without a group, and frames of one trajectory must not be in two splits; "
            "give them groups, or set data.block_size to make groups of consecutive structures"
        )
    # one long trajectory can be dealt out only in pieces
    divided = {""} | (groups if len(groups) == 1 else set())
    return [
        s.replace(group=f"{s.group or stem}/{i // block_size}") if s.group in divided else s
        for i, s in enumerate(structures)
    ]


def _deal(rest: list[Structure], splits: dict[str, list[Structure]], options: DataOptions, seed: int) -> None:
    """Deal structures without a recorded split; their sampling may say in ``info`` what a trajectory is meant for."""
    meant = [s.info.get("split") for s in rest]
    if all(m in SPLITS for m in meant):
        for structure, name in zip(rest, meant, strict=True):
            splits[str(name)].append(structure)
        return
    dealt = split_by_group([s.group for s in rest], options.fractions, seed)
    where = {group: name for name, groups in dealt.items() for group in groups}
    for structure in rest:
        splits[where[structure.group]].append(structure)


def _drop_broken(splits: dict[str, list[Structure]]) -> int:
    dropped = 0
    for name, members in splits.items():
        intact = [s for s in members if s.info.get("bonds_intact", True)]
        dropped += len(members) - len(intact)
        splits[name] = intact
    return dropped


def _check_splits(splits: Mapping[str, Sequence[Structure]]) -> None:
    seen: dict[str, str] = {}
    for name, members in splits.items():
        for group in {s.group for s in members}:
            if seen.setdefault(group, name) != name:
                raise ValueError(f"data: the group {group!r} is in {seen[group]} and in {name}")
    for name in ("train", "valid"):
        if not splits[name]:
            raise ValueError(f"data: expected structures for {name!r}, got none")
