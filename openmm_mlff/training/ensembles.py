"""molecules, a model file -> frames of every molecule, simulated in groups: what free energies are learned from.

A group is simulated as one OpenMM System (`sampling.molecule_runs`) and kept in one file; a group whose file exists is
not simulated again, so an interrupted simulation goes on. What a folder's frames were made with stands in its
``configuration.json``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from openmm_mlff.data.datasets import digest
from openmm_mlff.data.files import read_arrays, sha256_of, write_arrays
from openmm_mlff.data.jobs import claim_folder, run_tasks
from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.molecule_runs import LangevinSettings, sample
from openmm_mlff.sampling.starts import with_bonds

FORMAT = "openmm-mlff-molecule-frames-1"


@dataclass(frozen=True)
class Frames:
    """Frames of one molecule, and where its simulation can go on.

    Attributes:
        name: of the molecule. file: that it is read from.
        numbers: ``(n_atoms,)``. positions: ``(n, n_atoms, 3)`` angstrom.
        last: positions ``(n_atoms, 3)`` angstrom and velocities ``(n_atoms, 3)`` nm/ps at the end.
        failure: why the frames mean nothing, or empty.
    """

    name: str
    file: Path
    numbers: np.ndarray
    positions: np.ndarray
    last: tuple[np.ndarray, np.ndarray]
    failure: str

    @classmethod
    def read(cls, file: Path, name: str) -> Frames:
        """The frames of one molecule of a group; raises what `read_arrays` raises."""
        header, arrays = read_arrays(
            file,
            FORMAT,
            "frames of molecules",
            [f"{name}/{part}" for part in ("numbers", "positions", "last", "velocities")],
        )
        return cls(
            name,
            file,
            arrays[f"{name}/numbers"],
            arrays[f"{name}/positions"].astype(np.float64),
            (arrays[f"{name}/last"], arrays[f"{name}/velocities"]),
            header["failures"].get(name, ""),
        )


def sample_groups(
    model: Path,
    structures: Mapping[str, Structure],
    starts: Mapping[str, tuple[np.ndarray, np.ndarray] | None],
    settings: LangevinSettings,
    folder: Path,
    seed: int,
    processes: int = 1,
) -> dict[str, Frames]:
    """Simulate molecules with the potential of a model file, in groups of ``settings.batch`` at most.

    Args:
        structures: of the molecules, by name.
        starts: positions (angstrom) and velocities (nm/ps) to go on from; None starts from the structure, minimised.
        folder: for one file per group; one that was begun goes on with its groups, however many processes there are.
        processes: groups at once, one thread each.

    Raises `ValueError` naming what differs if the folder was begun with another model, other settings, molecules or
    starts, and `RuntimeError` with the first group's error if one could not be simulated at all.
    """
    groups = _claim(model, structures, starts, settings, folder, seed, processes)
    tasks = {
        f"group-{k:03d}": {
            "model": str(model),
            "names": group,
            "structures": [structures[n] for n in group],
            "starts": [starts[n] for n in group],
            "settings": dataclasses.replace(settings, seed=seed * 1000 + k),
        }
        for k, group in enumerate(groups)
    }
    outcome = run_tasks(
        tasks, simulate_group, folder, log=folder / "failed.jsonl", processes=processes, progress=False, title="groups"
    )
    if outcome.failed:
        name, error = next(iter(outcome.failed.items()))
        raise RuntimeError(f"{name} in {folder}: {error}")
    found = {}
    for task, group in zip(tasks, groups, strict=True):
        for name in group:
            found[name] = Frames.read(folder / f"{task}.safetensors", name)
    return found


def _claim(
    model: Path,
    structures: Mapping[str, Structure],
    starts: Mapping[str, tuple[np.ndarray, np.ndarray] | None],
    settings: LangevinSettings,
    folder: Path,
    seed: int,
    processes: int,
) -> list[list[str]]:
    """The groups of the folder, which is begun, or refused if it holds frames of anything else."""
    names = sorted(structures, key=lambda n: (-len(structures[n]), n))
    # as many groups as there are processes, if that makes none too small to be worth it
    size = max(min(settings.batch, -(-len(names) // processes)), 1)
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    path = folder / "configuration.json"
    if path.exists():
        begun: list[list[str]] = json.loads(path.read_text(encoding="utf-8"))["groups"]
        if sorted(name for group in begun for name in group) == sorted(names):
            groups = begun
    how = {key: value for key, value in dataclasses.asdict(settings).items() if key not in ("seed", "batch")}
    begin = {n: s if (start := starts[n]) is None else s.replace(positions=start[0]) for n, s in structures.items()}
    digests = {name: digest([structure])[:16] for name, structure in begin.items()}
    claim_folder(
        folder, {"model": sha256_of(model), "settings": how, "seed": seed, "starts": digests, "groups": groups}
    )
    return groups


def simulate_group(task: Mapping[str, Any], path: Path) -> dict[str, str]:
    """One group -> its file; the worker of `run_tasks`. What happens to single molecules stands in the file."""
    structures: Sequence[Structure] = task["structures"]
    starts: Sequence[tuple[np.ndarray, np.ndarray] | None] = task["starts"]
    settings: LangevinSettings = task["settings"]
    velocities = None
    if all(start is not None for start in starts):
        structures = [
            with_bonds(s).replace(positions=start[0]) for s, start in zip(structures, starts, strict=True) if start
        ]
        velocities = [start[1] for start in starts if start]
        settings = dataclasses.replace(settings, minimization_steps=0)
    results = sample(load_potential(task["model"]), structures, settings, velocities=velocities)
    arrays: dict[str, np.ndarray] = {}
    failures: dict[str, str] = {}
    for name, structure, result in zip(task["names"], structures, results, strict=True):
        arrays |= {
            f"{name}/numbers": structure.numbers,
            f"{name}/positions": result.positions.astype(np.float32),
            f"{name}/last": result.last,
            f"{name}/velocities": result.velocities,
        }
        if not result.finished:
            failures[name] = result.failures[-1].reason if result.failures else "it was not simulated to the end"
    write_arrays(path, FORMAT, arrays, {"failures": failures})
    return {}


def intact(frames: Frames, batch: Batch) -> str:
    """Why the frames cannot be of one molecule, or empty: within the cutoff, every frame has to hang together."""
    assert batch.pairs is not None
    first, second = (x.cpu().numpy() for x in (batch.pairs.first, batch.pairs.second))
    graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(batch.n_atoms, batch.n_atoms))
    pieces = connected_components(graph, directed=False, return_labels=False)
    return "" if pieces == len(frames.positions) else "its atoms moved apart"
