"""a recipe (YAML) of many molecules -> systems with seeds and splits.

::

    name: small
    seed: 1
    method: {method: GFN2-xTB}            # makes labels and drives; fields of TBLite, or of ASEReference
    sampling: {temperatures: [300, 450]}  # see `collection_systems.Sampling`; families may say otherwise
    molecules:                            # names for what several families use; numbers mark contact atoms
      acetate: "CC(=O)[O-:1]"
    families:
      - name: capped
        kind: molecule                    # one at a time
        class: neutral peptide            # see `openmm_mlff.data.classes.CLASSES`
        structures: 40                    # of each
        molecules: [ACE-ALA-NME, acetate, {name: methylene, smiles: "[CH2]", multiplicities: [1, 3]}, CCO]
      - name: hydrated
        kind: cluster                     # parts with waters around them
        class: ion in water
        structures: 20
        sets: [[acetate], []]             # every set ...
        waters: [4, 8]                    # ... with every number of waters
      - name: salt-bridges
        kind: pair                        # two parts in contact, and a scan of distances
        sets: [[lysine, acetate]]         # also: apart (fragments with gaps between them)
        ...
    split:
      test: {residues: [TRP], molecules: [acetate], systems: ["hydrated-*-w8"], families: [tripeptides]}
      valid: {residues: [MET]}
      random: {families: [fragments], test: 0.1, valid: 0.05, seed: 1}

A molecule is a name from ``molecules``, a peptide (`openmm_mlff.data.peptides`), a SMILES, or a table with ``name``,
``smiles`` and more. A system is in the test set if anything in it is held out for the test; then in the validation
set, if anything in it is held out for that; else it is for training. So nothing that is held out is ever trained on.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff._plugins import near
from openmm_mlff.data.parts import molecule_key
from openmm_mlff.data.peptides import N_ENDS, amino_acids, peptide_smiles
from openmm_mlff.data.reference import ReferenceMethod, method_from_table
from openmm_mlff.sampling.collection_systems import PartSpec, Sampling, System

_RECIPE = ("name", "seed", "method", "sampling", "molecules", "families", "split")
_FAMILY = ("name", "kind", "class", "structures", "molecules", "sets", "waters", "sampling")
_MOLECULE = ("name", "smiles", "class", "charge", "multiplicities", "structures")
_SET = ("parts", "class", "structures", "name")
_HELD_OUT = ("residues", "molecules", "systems", "families")
_RANDOM = ("families", "test", "valid", "seed")


@dataclass(frozen=True)
class CollectionRecipe:
    """A recipe that has been read: `table` as it stands in the file, and what follows from it.

    Attributes:
        systems: all of them, in a shuffled order. method: drives and labels.
        scale: share of the frames that the file asks for.
    """

    name: str
    seed: int
    table: Mapping[str, Any]
    systems: tuple[System, ...]
    method: ReferenceMethod
    scale: float = 1.0

    def scaled(self, fraction: float) -> CollectionRecipe:
        """The same systems with a fraction of their frames, at least one. Raises `ValueError` outside (0, 1]."""
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"scale: expected a fraction above 0 and up to 1, got {fraction!r}")
        systems = tuple(replace(s, frames=max(1, round(s.frames * fraction))) for s in self.systems)
        return replace(self, systems=systems, scale=self.scale * fraction)

    def of_classes(self, classes: Sequence[str]) -> tuple[System, ...]:
        """Systems that were built as one of some classes (none named: all). Raises `ValueError` for an unknown one."""
        known = sorted({s.built_class for s in self.systems})
        for name in classes:
            if name not in known:
                raise ValueError(f"classes: the recipe has no {name!r}; {near(name, known)}")
        return tuple(s for s in self.systems if not classes or s.built_class in classes)


def read_collection(path: str | Path) -> CollectionRecipe:
    """Read a recipe in YAML; its systems come in a shuffled order, so that any first part of a run covers the whole.

    Raises `FileNotFoundError`, `ImportError` without PyYAML, and `ValueError` naming what is missing, unknown or
    impossible.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"a YAML recipe needs PyYAML ({error}); install it with: pip install 'openmm-mlff[label]'"
        ) from error
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected a recipe in YAML ({error})") from error
    if not isinstance(table, Mapping):
        raise ValueError(f"{path}: expected a recipe in YAML, got {type(table).__name__}")
    return collection_from_table(table)


def collection_from_table(table: Mapping[str, Any]) -> CollectionRecipe:
    """The recipe that a table stands for; raises the `ValueError` of `read_collection`."""
    _check_keys("recipe", table, _RECIPE, required=("name", "seed", "families"))
    named = {str(k): str(v) for k, v in table.get("molecules", {}).items()}
    systems: list[System] = []
    for family in table["families"]:
        systems += _systems_of_family(family, table, named)
    if not systems:
        raise ValueError("families: expected at least one system, got none")
    names = [s.name for s in systems]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"families: expected a different name for every system, got {twice!r} twice")
    systems = _with_splits(systems, table.get("split", {}), named, int(table["seed"]))
    order = np.random.default_rng(int(table["seed"])).permutation(len(systems))
    return CollectionRecipe(
        str(table["name"]),
        int(table["seed"]),
        table,
        tuple(systems[i] for i in order),
        method_from_table(table.get("method", {})),
    )


def _check_keys(where: str, table: Any, known: Sequence[str], required: Sequence[str] = ()) -> None:
    if not isinstance(table, Mapping):
        raise ValueError(f"{where}: expected a table with {', '.join(known)}, got {table!r}")
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {near(str(key), known)}")
    for key in required:
        if key not in table:
            raise ValueError(f"{where}: the key {key!r} is missing")


def _systems_of_family(family: Any, recipe: Mapping[str, Any], named: Mapping[str, str]) -> Iterator[System]:
    _check_keys("families", family, _FAMILY, required=("name", "kind", "class", "structures"))
    where = f"families: {family['name']}"
    try:
        sampling = Sampling.from_tables(recipe.get("sampling", {}), family.get("sampling", {}))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    one_part = family["kind"] in ("molecule", "stretch")
    if one_part == ("sets" in family) or one_part != ("molecules" in family):
        raise ValueError(f"{where}: a {family['kind']} has {'molecules' if one_part else 'sets'}, and nothing else")
    if ("waters" in family) != (family["kind"] == "cluster"):
        raise ValueError(f"{where}: waters are for clusters, and clusters need them")
    for entry in family["molecules"] if one_part else family["sets"]:
        try:
            if one_part:
                yield from _one_part_systems(entry, family, sampling, named, int(recipe["seed"]))
            else:
                yield from _many_part_systems(entry, family, sampling, named, int(recipe["seed"]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _part(text: str, named: Mapping[str, str]) -> PartSpec:
    """A molecule by name, peptide or SMILES."""
    name, smiles, residues = text, named.get(text, text), tuple[str, ...]()
    if smiles.split("-")[0] in N_ENDS and "-" in smiles:
        residues, smiles = amino_acids(smiles), peptide_smiles(smiles)
    key = molecule_key(smiles)
    if name == smiles:
        # a file name cannot hold a SMILES
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return PartSpec(name, smiles, key, residues)


def _one_part_systems(
    entry: Any, family: Mapping[str, Any], sampling: Sampling, named: Mapping[str, str], seed: int
) -> Iterator[System]:
    if isinstance(entry, Mapping):
        _check_keys("molecules", entry, _MOLECULE, required=("name",))
        part = replace(_part(str(entry.get("smiles", entry["name"])), named), name=str(entry["name"]))
    else:
        part, entry = _part(str(entry), named), {}
    if "charge" in entry:
        part = replace(part, charge=int(entry["charge"]))
    states: list[int | None] = [int(m) for m in entry.get("multiplicities", [])]
    group = f"{family['name']}-{part.name}"
    for state in states or [None]:
        name = group if state is None else f"{group}-m{state}"
        yield System(
            name=name,
            group=group,
            family=str(family["name"]),
            kind=str(family["kind"]),
            built_class=str(entry.get("class", family["class"])),
            parts=(part,),
            frames=int(entry.get("structures", family["structures"])),
            seed=_seed(seed, name),
            sampling=sampling,
            multiplicity=state,
            also=tuple(m for m in states if m is not None and m != state),
        )


def _many_part_systems(
    entry: Any, family: Mapping[str, Any], sampling: Sampling, named: Mapping[str, str], seed: int
) -> Iterator[System]:
    if not isinstance(entry, Mapping):
        entry = {"parts": entry}
    _check_keys("sets", entry, _SET, required=("parts",))
    parts = tuple(_part(text, named) for text in _repeated(entry["parts"]))
    stem = str(entry.get("name", "-".join(_counted([part.name for part in parts]))))
    for waters in family.get("waters", [0]):
        ending = f"-w{waters}" if waters else ""
        name = "-".join(word for word in (str(family["name"]), stem) if word) + ending
        yield System(
            name=name,
            group=name,
            family=str(family["name"]),
            kind=str(family["kind"]),
            built_class=str(entry.get("class", family["class"])),
            parts=parts,
            frames=int(entry.get("structures", family["structures"])),
            seed=_seed(seed, name),
            sampling=sampling,
            waters=int(waters),
        )


def _repeated(parts: Any) -> list[str]:
    """``[a, {water: 3}]`` as ``[a, water, water, water]``."""
    found: list[str] = []
    for part in parts:
        if isinstance(part, Mapping):
            for name, count in part.items():
                found += [str(name)] * int(count)
        else:
            found.append(str(part))
    return found


def _counted(names: Iterable[str]) -> list[str]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [name if n == 1 else f"{n}{name}" for name, n in counts.items()]


def _seed(seed: int, name: str) -> int:
    """Of a system: its name and the recipe's seed decide it, and no other system."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little") % (2**31 - 1000) + 1


@dataclass(frozen=True)
class _HeldOut:
    """What one split keeps for itself."""

    residues: frozenset[str]
    keys: frozenset[str]
    systems: tuple[str, ...]
    families: frozenset[str]

    @classmethod
    def read(cls, where: str, table: Any, named: Mapping[str, str], systems: Sequence[System]) -> _HeldOut:
        _check_keys(where, table, _HELD_OUT)
        residues = frozenset(str(r) for r in table.get("residues", []))
        keys = frozenset(key for m in table.get("molecules", []) for key in _keys(str(m), named, systems))
        patterns = tuple(str(p) for p in table.get("systems", []))
        families = frozenset(str(f) for f in table.get("families", []))
        found = cls(residues, keys, patterns, families)
        for kind, wanted, there in (
            ("residues", residues, {r for s in systems for p in s.parts for r in p.residues}),
            ("molecules", keys, {p.key for s in systems for p in s.parts}),
            ("families", families, {s.family for s in systems}),
        ):
            missing = sorted(wanted - there)
            if missing:
                raise ValueError(f"{where}: {kind} names {missing[0]!r}, which no system has")
        for pattern in patterns:
            if not any(fnmatch.fnmatch(s.name, pattern) for s in systems):
                raise ValueError(f"{where}: systems names {pattern!r}, which no system matches")
        return found

    def __call__(self, system: System) -> str:
        """Why a system is held out ("family", "molecule"), or an empty text."""
        if system.family in self.families:
            return "family"
        inside = any(p.key in self.keys or self.residues.intersection(p.residues) for p in system.parts)
        return "molecule" if inside or any(fnmatch.fnmatch(system.name, p) for p in self.systems) else ""


def _keys(name: str, named: Mapping[str, str], systems: Sequence[System]) -> set[str]:
    """Keys of the molecules that some family calls by a name, or that a SMILES or a name of the recipe stands for."""
    found = {part.key for system in systems for part in system.parts if part.name == name}
    return found or {_part(name, named).key}


def _with_splits(systems: list[System], table: Any, named: Mapping[str, str], seed: int) -> list[System]:
    _check_keys("split", table, ("test", "valid", "random"))
    held = {
        split: _HeldOut.read(f"split: {split}", table.get(split, {}), named, systems) for split in ("test", "valid")
    }
    for split, keys in _random_keys(table.get("random", {}), systems, held, seed).items():
        held[split] = replace(held[split], keys=held[split].keys | keys)
    # a spin state follows the others of its group
    by_group: dict[str, tuple[str, str]] = {}
    for split in ("valid", "test"):
        for system in systems:
            why = held[split](system)
            if why:
                by_group[system.group] = (split, why)
    made = []
    for system in systems:
        split, why = by_group.get(system.group, ("train", ""))
        made.append(replace(system, split=split, held_out=why if split == "test" else ""))
    return made


def _random_keys(
    table: Any, systems: Sequence[System], held: Mapping[str, _HeldOut], seed: int
) -> dict[str, frozenset[str]]:
    """Molecules of some families that are dealt to the test and validation sets at random, family by family."""
    _check_keys("split: random", table, _RANDOM)
    rng = np.random.default_rng(int(table.get("seed", seed)))
    found: dict[str, set[str]] = {"test": set(), "valid": set()}
    for family in table.get("families", []):
        members = [s for s in systems if s.family == family]
        if not members:
            raise ValueError(f"split: random: families names {family!r}, which no system has")
        keys = sorted({p.key for s in members for p in s.parts if not held["test"](s) and not held["valid"](s)})
        order = [keys[i] for i in rng.permutation(len(keys))]
        n_test, n_valid = (round(float(table.get(split, 0.0)) * len(keys)) for split in ("test", "valid"))
        found["test"] |= set(order[:n_test])
        found["valid"] |= set(order[n_test : n_test + n_valid])
    return {split: frozenset(keys) for split, keys in found.items()}
