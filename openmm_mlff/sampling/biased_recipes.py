"""a recipe (TOML) -> a frozen bias and many biased trajectories with unbiased forces.

See `openmm_mlff.sampling.biased_md` for the method and ``examples/recipes/cg_ala2.toml`` for a recipe. Every random
choice follows from the recipe's seed. Trajectories come in an order in which every set grows at the same relative pace,
so that any first part of a run can be used.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit
from safetensors.numpy import load_file, save

from openmm_mlff._plugins import near
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import Outcome, claim_folder, run_tasks
from openmm_mlff.sampling.biased_md import (
    BiasedPlan,
    BiasMap,
    Dynamics,
    Frames,
    Metadynamics,
    Torsion,
    make_bias,
    make_frames,
    read_frames,
)
from openmm_mlff.sampling.implicit_solvent import use_native_obc2
from openmm_mlff.sampling.systems import read_structure
from openmm_mlff.units import ANGSTROM_PER_NM

_KEYS = ("name", "seed", "start", "force_field", "torsions", "dynamics", "bias", "sets")
_FORCE_FIELD_KEYS = ("files", "native_obc2", "hydrogen_mass")
_SET_KEYS = ("name", "split", "trajectories", "biased", "duration", "discard", "interval")


@dataclass(frozen=True)
class BiasedSet:
    """Trajectories of one kind: times in ps; `split` says what they are meant for."""

    name: str
    split: str
    trajectories: int
    duration: float
    discard: float
    interval: float
    biased: bool = True

    def __post_init__(self) -> None:
        if self.trajectories < 1:
            raise ValueError(f"trajectories: expected at least 1 in set {self.name!r}, got {self.trajectories}")
        for name in ("duration", "discard", "interval"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}: expected a positive time (ps) in set {self.name!r}, got {getattr(self, name)}"
                )
        if self.duration < self.interval:
            raise ValueError(f"duration: expected room for one interval in set {self.name!r}, got {self.duration} ps")


@dataclass(frozen=True)
class BiasedRecipe:
    """A recipe that has been read.

    Attributes:
        table: as it stands in the file. topology, positions ``(n_atoms, 3)`` angstrom: of the start file.
        system: without bias. torsions: by name, two of them.
    """

    name: str
    seed: int
    table: Mapping[str, Any]
    topology: app.Topology
    positions: np.ndarray
    system: openmm.System
    torsions: Mapping[str, Torsion]
    dynamics: Dynamics
    metadynamics: Metadynamics
    sets: tuple[BiasedSet, ...]


def read_biased_recipe(path: str | Path) -> BiasedRecipe:
    """Read a recipe and build its System.

    Raises `FileNotFoundError`, and `ValueError` naming the key that is missing, unknown or impossible.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected a recipe in TOML ({error})") from error
    _check_keys("recipe", table, _KEYS, required=("name", "seed", "start", "force_field", "torsions", "sets"))
    _check_keys("start", table["start"], ("file",), required=("file",))
    topology, positions = read_structure(path.parent / table["start"]["file"])
    torsions = {name: _torsion(name, atoms, len(positions)) for name, atoms in table["torsions"].items()}
    if len(torsions) != 2:
        raise ValueError(f"torsions: expected two (the axes of the bias), got {len(torsions)}")
    for entry in table["sets"]:
        _check_keys("sets", entry, _SET_KEYS, required=("name", "split", "trajectories", "duration"))
    sets = tuple(BiasedSet(**({"discard": 100.0, "interval": 1.0} | entry)) for entry in table["sets"])
    if not sets or len({s.name for s in sets}) != len(sets):
        raise ValueError("sets: expected at least one, each with a name of its own")
    return BiasedRecipe(
        name=str(table["name"]),
        seed=int(table["seed"]),
        table=table,
        topology=topology,
        positions=positions * ANGSTROM_PER_NM,
        system=_system(table["force_field"], topology),
        torsions=torsions,
        dynamics=_settings("dynamics", Dynamics, table.get("dynamics", {})),
        metadynamics=_settings("bias", Metadynamics, table.get("bias", {})),
        sets=sets,
    )


def _check_keys(where: str, table: Mapping[str, Any], known: Sequence[str], required: Sequence[str] = ()) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {near(key, known)}")
    for key in required:
        if key not in table:
            raise ValueError(f"{where}: the key {key!r} is missing")


def _settings(where: str, kind: type, table: Mapping[str, Any]) -> Any:
    _check_keys(where, table, [f.name for f in dataclasses.fields(kind)])
    return kind(**table)


def _torsion(name: str, atoms: Sequence[int], n_atoms: int) -> Torsion:
    if len(atoms) != 4 or len(set(atoms)) != 4 or not all(0 <= i < n_atoms for i in atoms):
        raise ValueError(f"torsions: {name} expects four different atoms from 0 to {n_atoms - 1}, got {list(atoms)}")
    return int(atoms[0]), int(atoms[1]), int(atoms[2]), int(atoms[3])


def _system(table: Mapping[str, Any], topology: app.Topology) -> openmm.System:
    _check_keys("force_field", table, _FORCE_FIELD_KEYS, required=("files",))
    try:
        system = app.ForceField(*table["files"]).createSystem(
            topology,
            nonbondedMethod=app.NoCutoff,
            constraints=app.HBonds,
            hydrogenMass=float(table.get("hydrogen_mass", 3.0)) * unit.amu,
            removeCMMotion=False,
        )
    except ValueError as error:
        raise ValueError(f"force_field: {error}") from error
    if table.get("native_obc2", False):
        use_native_obc2(system)
    return system


def sample_biased(
    recipe: BiasedRecipe, output: str | Path, processes: int = 1, progress: bool = True, platform: str = "Reference"
) -> Outcome:
    """Make the bias, then run the trajectories that ``output/frames`` does not hold yet.

    Also writes ``configuration.json``, ``bias.safetensors`` (the frozen bias, its free energy, snapshots) and
    ``system.xml``. Raises `ValueError` for a folder that was begun with another recipe; single failures are in
    ``failures.jsonl`` and in the outcome.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    claim_folder(output, {"recipe": recipe.table})
    system = openmm.XmlSerializer.serialize(recipe.system)
    write_atomically(output / "system.xml", system.encode())
    bias, snapshots = _bias(recipe, output / "bias.safetensors", platform)
    plans = plan_trajectories(recipe, bias, snapshots, system, platform)
    return run_tasks(
        {plan.name: plan for plan in plans},
        make_frames,
        output / "frames",
        log=output / "failures.jsonl",
        processes=processes,
        progress=progress,
        title="trajectories",
    )


def _bias(recipe: BiasedRecipe, path: Path, platform: str) -> tuple[BiasMap, np.ndarray]:
    first, second = recipe.torsions.values()
    if not path.exists():
        bias, free_energy, snapshots = make_bias(
            recipe.system,
            recipe.positions,
            (first, second),
            recipe.metadynamics,
            recipe.dynamics,
            recipe.seed % 2**31,
            platform,
        )
        tensors = {"bias": bias.energies, "free_energy": free_energy, "snapshots": snapshots}
        write_atomically(path, save(tensors))
    found = load_file(path)
    return BiasMap((first, second), found["bias"]), found["snapshots"]


def plan_trajectories(
    recipe: BiasedRecipe, bias: BiasMap, snapshots: np.ndarray, system: str, platform: str = "Reference"
) -> list[BiasedPlan]:
    """The trajectories of a recipe; biased ones start from snapshots of the bias run, free ones from the start file."""
    rng = np.random.default_rng(recipe.seed)
    first, second = recipe.torsions.values()
    ordered: list[tuple[float, BiasedPlan]] = []
    for group in recipe.sets:
        starts = rng.integers(len(snapshots), size=group.trajectories)
        seeds = rng.choice(2**31 - 2, size=group.trajectories, replace=False) + 1
        for k in range(group.trajectories):
            plan = BiasedPlan(
                name=f"{group.name}-{k:03d}",
                split=group.split,
                system=system,
                start=snapshots[starts[k]] if group.biased else recipe.positions,
                torsions=(first, second),
                bias=bias if group.biased else None,
                dynamics=recipe.dynamics,
                duration=group.duration,
                discard=group.discard,
                interval=group.interval,
                seed=int(seeds[k]),
                platform=platform,
            )
            ordered.append(((k + 0.5) / group.trajectories, plan))
    return [plan for _, plan in sorted(ordered, key=lambda item: item[0])]


def load_split(output: str | Path, split: str) -> list[Frames]:
    """All trajectories of one split that are there, by name. Raises `ValueError` if there are none."""
    found = [read_frames(path) for path in sorted((Path(output) / "frames").glob("*.safetensors"))]
    found = [frames for frames in found if frames.info["split"] == split]
    if not found:
        raise ValueError(f"split: no trajectories of split {split!r} in {output}")
    return found
