"""a recipe (TOML) -> the plans of many trajectories -> a dataset.

A recipe names the start structure, the reference method, the torsions and a list of sets of trajectories. All
random choices follow from its seed, so a recipe stands for one dataset::

    name = "ala2-gfn2"
    seed = 20261121

    [start]                      # a PDB file beside the recipe, or smiles = "..."
    file = "capped_alanine.pdb"
    charge = 0
    multiplicity = 1

    [method]                     # optional; GFN2-xTB by default
    method = "GFN2-xTB"

    [torsions]                   # atom indices from zero
    phi = [4, 6, 8, 14]
    psi = [6, 8, 14, 16]

    [[sets]]
    name = "window"              # trajectories are called window-000, window-001, ...
    split = "train"
    grid = 12                    # 12 x 12 start values of the torsions; or random = 16; or starts = [[-80, 75], ...]
    temperatures = [300, 400]    # dealt out evenly and shuffled; every start at every temperature for `starts`
    force_constant = 40          # kJ/mol/rad^2; 0 leaves the trajectory free
    duration = 1000              # fs, and so on: the fields of TrajectoryPlan
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.datasets import write_shard
from openmm_mlff.data.jobs import Outcome, run_tasks
from openmm_mlff.data.reference import ReferenceMethod, TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.dataset_md import TorsionRestraint, TrajectoryPlan, run_trajectory

_SET_FIELDS = {"duration", "discard", "stride", "timestep", "friction"}
_SET_KEYS = _SET_FIELDS | {"name", "split", "grid", "random", "starts", "temperatures", "force_constant"}


def _read_start(table: Mapping[str, Any], folder: Path) -> Structure:
    from openmm.app import PDBFile

    pdb = PDBFile(str(folder / table["file"]))
    numbers = np.array([a.element.atomic_number for a in pdb.topology.atoms()])
    positions = pdb.getPositions(asNumpy=True)._value * 10.0
    return Structure(numbers, positions, table.get("charge", 0), table.get("multiplicity", 1))


def _start_values(table: Mapping[str, Any], n_torsions: int, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Torsions of the starts in degrees: a grid of cell centres, uniformly random ones, or as listed."""
    if "grid" in table:
        n = int(table["grid"])
        axis = (np.arange(n) + 0.5) * 360.0 / n - 180.0
        return list(itertools.product(axis.tolist(), repeat=n_torsions))
    if "random" in table:
        return [tuple(row) for row in rng.uniform(-180.0, 180.0, (int(table["random"]), n_torsions)).round(2).tolist()]
    return [tuple(float(x) for x in row) for row in table["starts"]]


def _plans_of_set(
    table: Mapping[str, Any], start: Structure, torsions: Sequence[tuple[int, ...]], rng: np.random.Generator
) -> list[TrajectoryPlan]:
    unknown = set(table) - _SET_KEYS
    if unknown:
        raise ValueError(f"sets: unknown key {sorted(unknown)[0]!r} in {table.get('name')!r}; known: {sorted(_SET_KEYS)}")
    if sum(key in table for key in ("grid", "random", "starts")) != 1:
        raise ValueError(f"sets: expected one of grid, random, starts in {table.get('name')!r}")
    values = _start_values(table, len(torsions), rng)
    temperatures = [float(t) for t in table["temperatures"]]
    if "starts" in table:
        cases = list(itertools.product(values, temperatures))
    else:
        dealt = np.resize(temperatures, len(values))
        cases = list(zip(values, rng.permutation(dealt).tolist(), strict=True))
    k = float(table.get("force_constant", 0.0))
    fields = {key: float(table[key]) for key in _SET_FIELDS & set(table)}
    seeds = rng.choice(2**31 - 2, size=len(cases), replace=False) + 1
    return [
        TrajectoryPlan(
            name=f"{table['name']}-{n:03d}",
            split=table["split"],
            start=start,
            temperature=temperature,
            seed=int(seed),
            torsions=tuple(
                TorsionRestraint((a[0], a[1], a[2], a[3]), c, k) for a, c in zip(torsions, centers, strict=True)
            ),
            restrained=k > 0,
            **fields,
        )
        for n, ((centers, temperature), seed) in enumerate(zip(cases, seeds, strict=True))
    ]


def read_recipe(path: str | Path) -> tuple[dict[str, Any], list[TrajectoryPlan], ReferenceMethod]:
    """The recipe as it stands, its trajectories in a shuffled order, and its reference method.

    The order is shuffled (by the seed), so that any first part of a run covers the whole plane.
    """
    path = Path(path)
    recipe = tomllib.loads(path.read_text())
    rng = np.random.default_rng(int(recipe["seed"]))
    start = _read_start(recipe["start"], path.parent)
    torsions = [tuple(int(i) for i in atoms) for atoms in recipe.get("torsions", {}).values()]
    plans = [plan for table in recipe["sets"] for plan in _plans_of_set(table, start, torsions, rng)]
    order = rng.permutation(len(plans))
    return recipe, [plans[i] for i in order], TBLite(**recipe.get("method", {}))


def _make_shard(argument: tuple[TrajectoryPlan, ReferenceMethod], path: Path) -> None:
    plan, method = argument
    write_shard(path, run_trajectory(plan, method))


def sample(
    plans: Sequence[TrajectoryPlan], method: ReferenceMethod, output: str | Path, processes: int = 1, progress: bool = True
) -> Outcome:
    """Run the trajectories that ``output/shards`` does not hold yet."""
    tasks = {plan.name: (plan, method) for plan in plans}
    return run_tasks(
        tasks, _make_shard, Path(output) / "shards", processes=processes, progress=progress, title="trajectories"
    )
