"""start structures and an ensemble -> the frames that it is unsure of, labelled: a round of active learning.

Molecular dynamics with the mean of the members runs from every start; frames on whose forces the members disagree are
candidates (query by committee; J. S. Smith, B. Nebgen, N. Lubbers, O. Isayev, A. E. Roitberg, J. Chem. Phys. 148,
241733 (2018)). Of these the most uncertain are taken, no two of one group alike and no more than a few of each, and
the reference method labels them. A trajectory ends where the members disagree beyond sense, or atoms collide: such a
frame teaches nothing.

Units: angstrom, eV, kelvin, femtoseconds.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm

from openmm_mlff.data.datasets import Dataset, digest, finish_dataset
from openmm_mlff.data.files import read_arrays, sha256_of, write_arrays, write_atomically
from openmm_mlff.data.jobs import claim_folder, run_tasks
from openmm_mlff.data.labelling import label_block
from openmm_mlff.data.reference import Driver, LabelError, ReferenceMethod
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.thermal import dynamics

FORMAT = "openmm-mlff-candidates-1"
#: atoms closer than this share of the sum of their covalent radii have collided
COLLISION = 0.6
_BLOCK = 20


@dataclass(frozen=True)
class SelectionSettings:
    """How a round explores and what it keeps.

    Attributes:
        structures: to keep at most. per_group: of one group at most.
        temperatures: kelvin, taken in turn. duration, stride, timestep: of every trajectory, femtoseconds.
        threshold: frames are candidates from this spread of the force on any atom on, eV/angstrom; None takes that of
            the ensemble's `force_limit`, if it was calibrated, else the most uncertain quarter of all.
        nonsense: a trajectory ends at this spread, eV/angstrom.
        difference: frames of one group differ by at least this, root mean square over interatomic distances, angstrom.
        seed: of velocities and thermostats.
    """

    structures: int = 500
    per_group: int = 5
    temperatures: tuple[float, ...] = (300.0, 500.0, 700.0)
    duration: float = 500.0
    stride: float = 20.0
    timestep: float = 0.5
    threshold: float | None = None
    nonsense: float = 5.0
    difference: float = 0.1
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("structures", "per_group", "duration", "stride", "timestep", "nonsense"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(f"temperatures: expected positive numbers, got {self.temperatures}")
        if self.threshold is not None and not 0 <= self.threshold < self.nonsense:
            raise ValueError(f"threshold: expected at least 0 and less than nonsense, got {self.threshold!r}")
        if self.difference < 0:
            raise ValueError(f"difference: expected at least 0, got {self.difference!r}")


@dataclass(frozen=True)
class Committee:
    """Picklable name of an ensemble: one file of an ensemble, or several of single models.

    Raises `ValueError` when it is loaded, for a single model by itself or members that do not belong together.
    """

    files: tuple[str, ...]

    def load(self) -> Ensemble:
        return _load(self.files)

    def driver(self, structure: Structure) -> Driver:
        """The mean of the members."""
        evaluator = self.load().evaluator(structure, compile="auto")

        def energy_and_forces(positions: np.ndarray) -> tuple[float, np.ndarray]:
            energies, forces = evaluator.arrays(positions)
            return float(energies[0]), forces

        return energy_and_forces

    def describe(self) -> list[dict[str, str]]:
        """Name and checksum of every file."""
        return [{"file": Path(file).name, "sha256": sha256_of(Path(file))} for file in self.files]


@functools.lru_cache(maxsize=2)
def _load(files: tuple[str, ...]) -> Ensemble:
    models = [load_potential(file) for file in files]
    if len(models) == 1 and isinstance(models[0], Ensemble):
        return models[0]
    if len(models) == 1:
        raise ValueError(f"models: expected an ensemble or at least two models, got one {models[0].family} model")
    return Ensemble(models)


@dataclass(frozen=True)
class Candidates:
    """Frames of one trajectory: ``positions`` ``(n, n_atoms, 3)``, ``spreads`` ``(n,)`` of the worst atom, eV/angstrom.

    `ended` says why the trajectory ended before its time, or nothing.
    """

    positions: np.ndarray
    spreads: np.ndarray
    ended: str

    @classmethod
    def read(cls, path: Path) -> Candidates:
        header, arrays = read_arrays(path, FORMAT, "candidates of a selection")
        return cls(arrays["positions"], arrays["spreads"], header["ended"])


def explore(argument: tuple[Structure, Committee, SelectionSettings, int], path: Path) -> dict[str, str]:
    """Run the trajectory number `k` of a round from a start, and write its frames with their spreads."""
    start, committee, settings, k = argument
    evaluator = committee.load().evaluator(start, compile="auto")
    positions: list[np.ndarray] = []
    spreads: list[float] = []
    ended = ""
    run = dynamics(
        start,
        committee,  # type: ignore[arg-type]
        temperature=settings.temperatures[k % len(settings.temperatures)],
        frames=max(1, round(settings.duration / settings.stride)),
        stride=settings.stride,
        discard=0.0,
        seed=int(np.random.default_rng([settings.seed, k]).integers(1, 2**31 - 1)),
        timestep=settings.timestep,
    )
    try:
        for frame in run:
            evaluator.arrays(frame)
            assert evaluator.spreads is not None
            spread = float(evaluator.spreads[1].max())
            if not spread < settings.nonsense:
                ended = f"the members disagree by {spread:.3g} eV/angstrom"
            elif collided(start.numbers, frame):
                ended = "atoms collided"
            if ended:
                break
            positions.append(frame)
            spreads.append(spread)
    except openmm.OpenMMException as error:
        ended = str(error).strip().splitlines()[-1]
    arrays = {"positions": np.array(positions).reshape(-1, len(start), 3), "spreads": np.array(spreads)}
    write_arrays(path, FORMAT, arrays, {"ended": ended})
    return {}


def collided(numbers: np.ndarray, positions: np.ndarray) -> bool:
    """Whether two atoms are closer than any molecule has them."""
    from ase.data import covalent_radii

    radii = covalent_radii[numbers]
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return bool((distances < COLLISION * (radii[:, None] + radii[None])).any())


def choose(
    starts: Sequence[Structure], candidates: Sequence[Candidates], settings: SelectionSettings
) -> tuple[list[tuple[int, int]], float]:
    """The most uncertain frames, as ``(trajectory, frame)``, the most uncertain first, and the threshold that was used.

    Greedy: a frame is taken if its spread reaches the threshold, its group has not had its share yet, and it differs
    from every frame of its group and composition that was taken before.
    """
    every = np.concatenate([c.spreads for c in candidates]) if candidates else np.empty(0)
    if len(every) == 0:
        return [], 0.0
    threshold = float(np.quantile(every, 0.75)) if settings.threshold is None else settings.threshold
    order = sorted(
        ((float(s), i, k) for i, c in enumerate(candidates) for k, s in enumerate(c.spreads) if s >= threshold),
        key=lambda entry: (-entry[0], entry[1:]),
    )
    taken: list[tuple[int, int]] = []
    of_group: Counter[str] = Counter()
    shapes: dict[tuple[str, bytes], list[np.ndarray]] = {}
    for _, i, k in order:
        group = starts[i].group
        if of_group[group] >= settings.per_group:
            continue
        shape = _distances(candidates[i].positions[k])
        alike = shapes.setdefault((group, starts[i].numbers.tobytes()), [])
        if any(np.sqrt(np.mean((shape - other) ** 2)) < settings.difference for other in alike):
            continue
        alike.append(shape)
        of_group[group] += 1
        taken.append((i, k))
        if len(taken) == settings.structures:
            break
    return taken, threshold


def _distances(positions: np.ndarray) -> np.ndarray:
    first, second = np.triu_indices(len(positions), 1)
    return np.asarray(np.linalg.norm(positions[first] - positions[second], axis=1))


def select_frames(
    starts: Sequence[Structure],
    committee: Committee,
    method: ReferenceMethod,
    output: str | Path,
    settings: SelectionSettings,
    *,
    name: str = "selected",
    round_of: Mapping[str, Any] | None = None,
    processes: int = 1,
    progress: bool = True,
) -> Dataset:
    """Explore from every start, keep what the members disagree on, label it, and write it as a dataset.

    Args:
        starts: groups are theirs; charge, multiplicity and ``info`` go on to the frames.
        output: folder; a second run with the same input goes on where the first one stopped.
        round_of: what the round belongs to, for the card.
        processes: trajectories, then blocks of labels, at once.

    The card's ``round`` says how far the members disagreed, how many trajectories ended early, and which models chose.
    Raises `ValueError` for no starts, models that do not belong together, or a folder that was begun with other input;
    `LabelError` if no frame was uncertain enough, or none could be labelled.
    """
    if len(starts) == 0:
        raise ValueError("starts: expected at least one, got none")
    method.check()
    model = committee.load()
    for start in starts:
        model.check(start)
    output = Path(output)
    configuration = {
        "starts_sha256": digest(starts),
        "starts": len(starts),
        "models": committee.describe(),
        "settings": asdict(settings),
        "method": method.describe(),
        "round_of": dict(round_of or {}),
    }
    claim_folder(output, configuration)
    common: dict[str, Any] = {"log": output / "failures.jsonl", "processes": processes, "progress": progress}
    names = {f"trajectory-{k:05d}": (start, committee, settings, k) for k, start in enumerate(starts)}
    outcome = run_tasks(names, explore, output / "candidates", title="trajectories", **common)
    lost = {task: outcome.failed[task] for task in names if task in outcome.failed}
    if len(lost) == len(names):
        raise LabelError(f"not one of {len(names)} trajectories could be run; the first reason: {min(lost.values())}")
    starts = [start for task, (start, *_) in names.items() if task not in lost]
    candidates = [Candidates.read(output / "candidates" / f"{task}.safetensors") for task in names if task not in lost]
    taken, threshold = choose(starts, candidates, _with_limit(settings, model))
    if not taken:
        raise LabelError(f"not one frame of {len(starts)} trajectories reached a spread of {threshold:.3g} eV/angstrom")
    chosen = [_chosen(starts[i], candidates[i], k) for i, k in taken]
    blocks = {f"block-{k // _BLOCK:05d}": (method, k, chosen[k : k + _BLOCK]) for k in range(0, len(chosen), _BLOCK)}
    labels = run_tasks(blocks, label_block, output / "shards", title="labels (blocks)", **common)
    if len(labels.made) + len(labels.kept) == 0 or len(Dataset(output)) == 0:
        raise LabelError(f"not one of {len(chosen)} frames could be labelled; see {output / 'failures.jsonl'}")
    dataset = finish_dataset(
        output,
        name=name,
        method=method,
        sampling=configuration,
        splits={"train": sorted({s.group for s in chosen})},
        seed=settings.seed,
        failed_tasks=lost | {task: error for task, error in labels.failed.items() if task in blocks},
    )
    dataset.card["round"] = {
        **dict(round_of or {}),
        "models": configuration["models"],
        "candidates": int(sum(len(c.spreads) for c in candidates)),
        "trajectories": len(starts),
        "ended_early": dict(Counter(c.ended.split(" by ")[0] for c in candidates if c.ended).most_common(10)),
        "threshold": threshold,
        "spread_of_candidates": _quantiles(np.concatenate([c.spreads for c in candidates])),
        "structures": len(dataset),
    }
    write_atomically(output / "card.json", (json.dumps(dataset.card, indent=1, ensure_ascii=False) + "\n").encode())
    return Dataset(output)


def _with_limit(settings: SelectionSettings, model: Ensemble) -> SelectionSettings:
    """The threshold that the ensemble's card gives, where the settings leave it open: uncertainty = factor * spread."""
    limit = model.config.force_limit
    if settings.threshold is not None or limit is None:
        return settings
    return replace(settings, threshold=min(limit / model.config.force_factor, 0.5 * settings.nonsense))


def _chosen(start: Structure, candidates: Candidates, k: int) -> Structure:
    kept = {key: value for key, value in start.info.items() if key in ("class", "family", "built_as", "held_out")}
    info = {**kept, "split": "train", "source": "selected", "spread": round(float(candidates.spreads[k]), 6)}
    return start.replace(
        positions=candidates.positions[k], energy=None, forces=None, dipole=None, charges=None, info=info
    )


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{100 * q:g} %": round(float(np.quantile(values, q)), 6) for q in (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)}
