"""a recipe (TOML) -> many trajectories -> a dataset.

A recipe names the start structure, the methods, the torsions and sets of trajectories. Every random choice follows
from its seed, so a recipe stands for one dataset::

    name = "ala2-gfn2"
    seed = 20261121

    [start]                        # a file beside the recipe (first structure), or smiles = "..."
    file = "capped_alanine.pdb"
    charge = 0
    multiplicity = 1

    [method]                       # makes the labels: fields of TBLite, or of ASEReference with calculator = "..."
    method = "GFN2-xTB"

    [driver]                       # optional: another method that drives the dynamics, here a model of this package
    calculator = "openmm_mlff.forces.ase_calculator:MLFFCalculator"
    kwargs = { potential = "model.safetensors" }

    [torsions]                     # atom indices from zero
    phi = [4, 6, 8, 14]
    psi = [6, 8, 14, 16]

    [[sets]]
    name = "window"                # trajectories are called window-000, window-001, ...
    split = "train"
    grid = 12                      # centres of 12 x 12 cells; or random = 16; or starts = [[-80, 75], ...]
    temperatures = [300, 400]      # K; dealt out evenly and shuffled; with starts: every start at every temperature
    force_constant = 40            # kJ/mol/rad^2 towards the start values; 0 (default) leaves the trajectory free
    duration = 1000                # fs; also discard, stride, timestep (fs) and friction (1/ps)
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff._plugins import near
from openmm_mlff.data.datasets import Dataset, digest, finish_dataset
from openmm_mlff.data.formats import read_structures
from openmm_mlff.data.jobs import claim_folder, run_tasks
from openmm_mlff.data.molecules import embed_smiles
from openmm_mlff.data.reference import LabelError, ReferenceMethod, method_from_table
from openmm_mlff.data.shards import write_shard
from openmm_mlff.data.structures import Structure, check_charge_and_multiplicity
from openmm_mlff.sampling.dataset_md import TrajectoryPlan, run_trajectory
from openmm_mlff.sampling.starts import TorsionRestraint

_PLAN_KEYS = ("duration", "discard", "stride", "timestep", "friction")
_SET_KEYS = ("name", "split", "grid", "random", "starts", "temperatures", "force_constant", *_PLAN_KEYS)
_RECIPE_KEYS = ("name", "seed", "start", "method", "driver", "torsions", "sets")
_START_KEYS = ("file", "smiles", "charge", "multiplicity")


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been read: `table` as it stands in the file, and what follows from it."""

    name: str
    seed: int
    table: Mapping[str, Any]
    plans: tuple[TrajectoryPlan, ...]
    method: ReferenceMethod
    driver: ReferenceMethod | None


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe. Its trajectories come in a shuffled order, so that any first part of a run covers the whole.

    Raises `FileNotFoundError`, and `ValueError` naming the key that is missing, unknown or impossible.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected a recipe in TOML ({error})") from error
    _check_keys("recipe", table, _RECIPE_KEYS, required=("name", "seed", "start", "sets"))
    rng = np.random.default_rng(int(table["seed"]))
    start = _read_start(table["start"], path.parent, int(table["seed"]))
    torsions = _read_torsions(table.get("torsions", {}), len(start))
    plans = [plan for entry in table["sets"] for plan in _plans_of_set(entry, start, torsions, rng)]
    if not plans:
        raise ValueError("sets: expected at least one trajectory, got none")
    names = [plan.name for plan in plans]
    if len(set(names)) != len(names):
        raise ValueError("sets: expected a different name for every set")
    return Recipe(
        name=str(table["name"]),
        seed=int(table["seed"]),
        table=table,
        plans=tuple(plans[i] for i in rng.permutation(len(plans))),
        method=method_from_table(table.get("method", {})),
        driver=method_from_table(table["driver"]) if "driver" in table else None,
    )


def _check_keys(where: str, table: Mapping[str, Any], known: Sequence[str], required: Sequence[str] = ()) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {near(key, known)}")
    for key in required:
        if key not in table:
            raise ValueError(f"{where}: the key {key!r} is missing")


def _read_start(table: Mapping[str, Any], folder: Path, seed: int) -> Structure:
    _check_keys("start", table, _START_KEYS)
    if ("file" in table) == ("smiles" in table):
        raise ValueError("start: expected one of file and smiles")
    options = {key: int(table[key]) for key in ("charge", "multiplicity") if key in table}
    if "smiles" in table:
        start = embed_smiles(table["smiles"], seed=seed % 2**31, **options)[0]
    else:
        start = read_structures(folder / table["file"], **options)[0]
    check_charge_and_multiplicity(start.numbers, start.charge, start.multiplicity)
    return start


def _read_torsions(table: Mapping[str, Any], n_atoms: int) -> list[tuple[int, int, int, int]]:
    torsions = []
    for name, atoms in table.items():
        if len(atoms) != 4 or len(set(atoms)) != 4 or not all(0 <= i < n_atoms for i in atoms):
            raise ValueError(f"torsions: {name} expects four different atoms from 0 to {n_atoms - 1}, got {atoms}")
        torsions.append((int(atoms[0]), int(atoms[1]), int(atoms[2]), int(atoms[3])))
    return torsions


def _start_values(table: Mapping[str, Any], n_torsions: int, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Torsions of the starts in degrees: a grid of cell centres, uniformly random ones, or as listed."""
    if "grid" in table:
        n = int(table["grid"])
        axis = (np.arange(n) + 0.5) * 360.0 / n - 180.0
        return list(itertools.product(axis.tolist(), repeat=n_torsions))
    if "random" in table:
        return [tuple(row) for row in rng.uniform(-180.0, 180.0, (int(table["random"]), n_torsions)).round(2).tolist()]
    rows = [tuple(float(x) for x in row) for row in table["starts"]]
    if any(len(row) != n_torsions for row in rows):
        raise ValueError(f"starts: expected {n_torsions} torsions in every row, got {table['starts']}")
    return rows


def _plans_of_set(
    table: Mapping[str, Any], start: Structure, torsions: Sequence[tuple[int, int, int, int]], rng: np.random.Generator
) -> list[TrajectoryPlan]:
    _check_keys("sets", table, _SET_KEYS, required=("name", "split", "temperatures"))
    if sum(key in table for key in ("grid", "random", "starts")) != 1:
        raise ValueError(f"sets: expected one of grid, random and starts in {table['name']!r}")
    values = _start_values(table, len(torsions), rng)
    temperatures = [float(t) for t in table["temperatures"]]
    if "starts" in table:
        cases = list(itertools.product(values, temperatures))
    else:
        dealt = np.resize(temperatures, len(values))
        cases = list(zip(values, rng.permutation(dealt).tolist(), strict=True))
    k = float(table.get("force_constant", 0.0))
    fields = {key: float(table[key]) for key in _PLAN_KEYS if key in table}
    seeds = rng.choice(2**31 - 2, size=len(cases), replace=False) + 1
    return [
        TrajectoryPlan(
            name=f"{table['name']}-{n:03d}",
            split=str(table["split"]),
            start=start,
            temperature=temperature,
            seed=int(seed),
            torsions=tuple(TorsionRestraint(a, c, k) for a, c in zip(torsions, centers, strict=True)),
            restrained=k > 0,
            **fields,
        )
        for n, ((centers, temperature), seed) in enumerate(zip(cases, seeds, strict=True))
    ]


def make_shard(argument: tuple[TrajectoryPlan, ReferenceMethod, ReferenceMethod | None], path: Path) -> dict[str, str]:
    """Run and write one trajectory; nothing is left out of a trajectory that ends."""
    plan, method, driver = argument
    write_shard(path, run_trajectory(plan, method, driver))
    return {}


def sample(recipe: Recipe, output: str | Path, processes: int = 1, progress: bool = True) -> Dataset:
    """Run the trajectories that ``output/shards`` does not hold yet, and write the data card.

    Raises `ValueError` for a folder that was begun with another recipe, `ImportError` if a program is missing, and
    `LabelError` if no trajectory could be run; single failures are in ``failures.jsonl`` and in the card.
    """
    for method in (recipe.method, recipe.driver):
        if method is not None:
            method.check()
    output = Path(output)
    configuration = {
        "recipe": recipe.table,
        "start_sha256": digest([recipe.plans[0].start]),
        "method": recipe.method.describe(),
    }
    if recipe.driver is not None:
        configuration["driver"] = recipe.driver.describe()
    claim_folder(output, configuration)
    outcome = run_tasks(
        {plan.name: (plan, recipe.method, recipe.driver) for plan in recipe.plans},
        make_shard,
        output / "shards",
        log=output / "failures.jsonl",
        processes=processes,
        progress=progress,
        title="trajectories",
    )
    done = {*outcome.made, *outcome.kept}
    if not done:
        first = next(iter(outcome.failed.values()))
        raise LabelError(f"not one of {len(recipe.plans)} trajectories could be run; the first reason: {first}")
    splits: dict[str, list[str]] = {}
    for plan in recipe.plans:
        if plan.name in done:
            splits.setdefault(plan.split, []).append(plan.name)
    return finish_dataset(
        output,
        name=recipe.name,
        method=recipe.method,
        sampling=configuration,
        splits=splits,
        seed=recipe.seed,
        failed_tasks=outcome.failed,
    )
