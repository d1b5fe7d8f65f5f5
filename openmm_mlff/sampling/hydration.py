"""molecules, a potential in vacuum and one in water -> hydration free energies, of one molecule or hundreds.

    pair = PairFiles.read(model="pair.safetensors")
    outcomes = hydrate([solute_from_smiles("CCO")], pair, HydrationSettings(), "run")

Every state (coupling) of every molecule is kept in a file of its own, ``samples/<state>/<name>.safetensors``, with its
frames and their energies under both potentials; what is there is not simulated again, and a longer run goes on from
it. Molecules of one state are simulated together, stretch by stretch: a task of a campaign (`data.campaigns`) is one
stretch of one group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.analysis.free_energy import LEAST_OVERLAP, InsufficientOverlap, pymbar_module
from openmm_mlff.analysis.hydration import Hydration, hydration
from openmm_mlff.data.campaigns import Failed, check_workers, run_campaign
from openmm_mlff.data.jobs import claim_folder
from openmm_mlff.data.solutes import Solute
from openmm_mlff.data.structures import Structure, formula
from openmm_mlff.potentials.composition import Interpolated
from openmm_mlff.sampling.checkpoints import seed_for
from openmm_mlff.sampling.hydration_runs import Group, PairFiles, StateSamples, fingerprint, sample_group, whole
from openmm_mlff.sampling.molecule_runs import LangevinSettings, batches
from openmm_mlff.sampling.starts import bond_graph


@dataclass(frozen=True)
class HydrationSettings:
    """How hydration free energies are computed.

    Attributes:
        sampling: of every state; ``sampling.batch`` runs are simulated together.
        windows: states from vacuum to water, both included; 2 takes Bennett's estimate, more that of MBAR.
        precision: of the potentials in dynamics, 'single' or 'double'; None takes their own. Energies of the frames
            are evaluated in double precision.
        least_overlap: of neighbouring states; below it there is no result.
        checkpoint: ps; what was simulated is kept so often.

    Raises `ValueError` naming the field.
    """

    sampling: LangevinSettings = field(
        default_factory=lambda: LangevinSettings(equilibration=20.0, length=200.0, minimization_steps=200)
    )
    windows: int = 2
    precision: str | None = None
    least_overlap: float = LEAST_OVERLAP
    checkpoint: float = 50.0

    def __post_init__(self) -> None:
        if isinstance(self.windows, bool) or int(self.windows) != self.windows or self.windows < 2:
            raise ValueError(f"windows: expected a whole number >= 2 (both ends count), got {self.windows!r}")
        if self.precision not in (None, "single", "double"):
            raise ValueError(f"precision: expected 'single', 'double' or None, got {self.precision!r}")
        if not 0 <= self.least_overlap < 0.5:
            raise ValueError(f"least_overlap: expected a number from 0 to 0.5, got {self.least_overlap!r}")
        if not self.checkpoint > 0:
            raise ValueError(f"checkpoint: expected a positive time (ps), got {self.checkpoint!r}")

    @property
    def frames(self) -> int:
        """Of every run."""
        return whole(self.sampling.length / self.sampling.interval)

    @property
    def couplings(self) -> tuple[float, ...]:
        """Of the states: 0 (vacuum) to 1 (water)."""
        return tuple(round(float(c), 6) for c in np.linspace(0, 1, self.windows))


# -- what can be hydrated ----------------------------------------------------------------------------------------


def check_solute(structure: Structure, pair: Interpolated) -> None:
    """Refuse (`ValueError`) what is not one neutral molecule in open space that both potentials describe."""
    if structure.cell is not None:
        raise ValueError("cell: expected one molecule in open space, got periodic box vectors")
    if structure.charge:
        raise ValueError(f"charge: expected a neutral molecule, got {structure.charge:+d}")
    fragments = _fragments(structure)
    if len(fragments) > 1:
        raise ValueError(f"molecule: expected one molecule, got {len(fragments)} fragments ({', '.join(fragments)})")
    for name, potential in (("vacuum", pair.vacuum), ("water", pair.water)):
        try:
            potential.check(structure)
            potential.check_electrons(structure.numbers, structure.charge, structure.multiplicity)
        except ValueError as error:
            raise ValueError(f"{error} (potential in {name})") from error


def _fragments(structure: Structure) -> list[str]:
    """Formulas of the atoms that hang together."""
    from scipy.sparse.csgraph import connected_components

    count, label = connected_components(bond_graph(structure.numbers, structure.positions), directed=False)
    return [formula(structure.numbers[label == k]) for k in range(count)]


# -- a campaign --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a molecule.

    Attributes:
        status: 'ok'; 'restarted' (a run broke and began anew; its frames from before and, equilibrated
            again, from after count); 'no overlap'; 'broken'; 'refused'; 'failed' (an error of the program).
        message: why there is no result, or what broke. result: None without one.
        samples: header of each state's samples.
    """

    solute: Solute
    status: str
    message: str = ""
    result: Hydration | None = None
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)


def state_name(coupling: float) -> str:
    """Of the folder of a state's samples."""
    return {0.0: "vacuum", 1.0: "water"}.get(coupling, f"coupling-{coupling:g}")


def hydrate(
    solutes: Sequence[Solute],
    pair: PairFiles,
    settings: HydrationSettings,
    folder: str | Path,
    *,
    processes: int = 1,
    scheduler: str | None = None,
    progress: bool = False,
) -> list[Outcome]:
    """Sample every molecule in every state and estimate its hydration free energy; one outcome each, in their order.

    Args:
        folder: for ``configuration.json`` and the samples; a folder begun before goes on. It may be given other
            molecules, but no other potentials or settings, and no other start structures under an old name. Nothing is
            written if not one molecule can be simulated.
        processes, scheduler: see `run_campaign`.

    Raises `ValueError` naming what differs from the folder, for names that are not unique, `ImportError` without
    pymbar, and what `run_campaign` raises. What is wrong with single molecules stands in their outcomes.
    """
    check_workers(processes, scheduler)
    pymbar_module()  # its estimates come last: hours after a message that it is missing would have been of use
    names = [solute.name for solute in solutes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"name: expected a name of its own for every molecule, got {twice!r} twice")
    folder = Path(folder)
    plain = {**dataclasses.asdict(settings), "models": pair.sha256}
    # the rest may differ: how much is simulated, together or at once, and what the estimate makes of it
    for name in ("least_overlap", "checkpoint"):
        plain.pop(name)
    for name in ("batch", "length"):
        plain["sampling"].pop(name)
    loaded = pair.load()
    checked = [_checked(solute, loaded) for solute in solutes]
    sound = [solute for solute in checked if not solute.problem]
    if sound:
        claim_folder(folder, plain)
    tasks = _tasks(sound, pair, settings, folder)

    def keep(task: str, results: Mapping[str, StateSamples]) -> dict[str, Group]:
        group, going_on = tasks[task], []
        for solute in group.solutes:
            path = _path(folder, state_name(group.coupling), solute.name)
            samples = results.get(solute.name)
            if samples is None:
                continue
            if group.starts is not None:
                samples = StateSamples.read(path).joined(samples)
            samples.write(path)
            if not samples.header["broken"] and samples.header["planned"] < settings.frames:
                going_on.append((solute, samples))
        if not going_on:
            return {}
        name = f"{task.partition('+')[0]}+{going_on[0][1].header['planned']}"
        tasks[name] = _stretch(going_on, group.coupling, pair, settings)
        return {name: tasks[name]}

    total = sum(-(-(settings.frames - group.planned) // group.frames) for group in tasks.values())
    failed = run_campaign(
        dict(tasks),
        sample_group,
        keep,
        processes=processes,
        scheduler=scheduler,
        progress=progress,
        title="stretches of molecules",
        total=total,
    )
    lost = {solute.name: failed[task] for task in failed for solute in tasks[task].solutes}
    return [_outcome(solute, settings, folder, lost.get(solute.name)) for solute in checked]


def _checked(solute: Solute, pair: Interpolated) -> Solute:
    """The solute, with its problem if it has one."""
    try:
        for structure in solute.structures:
            check_solute(structure, pair)
    except ValueError as error:
        return dataclasses.replace(solute, problem=str(error))
    return solute


def _path(folder: Path, state: str, name: str) -> Path:
    return folder / "samples" / state / f"{name}.safetensors"


def _tasks(solutes: Sequence[Solute], pair: PairFiles, settings: HydrationSettings, folder: Path) -> dict[str, Group]:
    """The first stretches that are missing; in a group are molecules of like size that have come equally far."""
    tasks: dict[str, Group] = {}
    for coupling in settings.couplings:
        state = state_name(coupling)
        progress: dict[int, list[tuple[Solute, StateSamples | None]]] = {}
        for solute in solutes:
            samples = _known(solute, _path(folder, state, solute.name))
            planned = 0 if samples is None else samples.header["planned"]
            if planned < settings.frames and not (samples and samples.header["broken"]):
                progress.setdefault(planned, []).append((solute, samples))
        for planned, members in sorted(progress.items(), reverse=True):
            runs_each = max(len(solute.structures) for solute, _ in members)
            most = max(settings.sampling.batch // runs_each, 1)
            for number, indices in enumerate(batches([len(s.structures[0]) for s, _ in members], most)):
                chosen = [members[k] for k in indices]
                tasks[f"{state}-{number:03d}-from-{planned}"] = _stretch(chosen, coupling, pair, settings)
    return tasks


def _known(solute: Solute, path: Path) -> StateSamples | None:
    """What there is of a molecule; raises `ValueError` if it is of another one."""
    if not path.exists():
        return None
    samples = StateSamples.read(path)
    if samples.header["starts"] != fingerprint(solute):
        raise ValueError(
            f"name: {solute.name!r} was another molecule, or another start structure, when {path.parents[2]} was begun"
        )
    return samples


def _stretch(
    members: Sequence[tuple[Solute, StateSamples | None]], coupling: float, pair: PairFiles, settings: HydrationSettings
) -> Group:
    """The next stretch of molecules that have come equally far."""
    samples = [known for _, known in members if known is not None]
    planned = samples[0].header["planned"] if samples else 0
    frames = min(max(whole(settings.checkpoint / settings.sampling.interval), 1), settings.frames - planned)
    text = "/".join((state_name(coupling), str(planned), *(solute.name for solute, _ in members)))
    own = dataclasses.replace(
        settings.sampling,
        length=frames * settings.sampling.interval,
        seed=seed_for(settings.sampling.seed, text, 0),
    )
    starts = None
    if samples:
        own = dataclasses.replace(own, equilibration=0.0, minimization_steps=0)
        starts = tuple((run["last"], run["velocities"]) for known in samples for run in known.runs)
    return Group(pair, coupling, tuple(solute for solute, _ in members), own, settings.precision, planned, starts)


def _outcome(solute: Solute, settings: HydrationSettings, folder: Path, lost: Failed | None) -> Outcome:
    """The estimate of one molecule, or why there is none."""
    if solute.problem:
        return Outcome(solute, "refused", solute.problem)
    if lost is not None:
        return Outcome(solute, "failed", lost.error)
    paths = {state_name(c): _path(folder, state_name(c), solute.name) for c in settings.couplings}
    states = {state: StateSamples.read(path) for state, path in paths.items() if path.exists()}
    headers = {state: samples.header for state, samples in states.items()}
    short = [
        s for s in paths if s not in states or not (headers[s]["broken"] or headers[s]["planned"] >= settings.frames)
    ]
    if short:
        return Outcome(solute, "failed", f"the simulation in state {short[0]!r} was interrupted", samples=headers)
    broken = [f"{state}: {h['broken']}" for state, h in headers.items() if h["broken"]]
    if broken:
        return Outcome(solute, "broken", "; ".join(broken), samples=headers)
    try:
        found = hydration(
            [samples.differences for samples in states.values()],
            settings.couplings,
            settings.sampling.temperature,
            settings.least_overlap,
        )
    except InsufficientOverlap as error:
        return Outcome(solute, "no overlap", str(error), samples=headers)
    except (ValueError, RuntimeError) as error:
        return Outcome(solute, "failed", str(error), samples=headers)
    restarts = [f"{state}: {text}" for state, h in headers.items() for text in h["failures"]]
    return Outcome(solute, "restarted" if restarts else "ok", "; ".join(restarts), found, headers)
