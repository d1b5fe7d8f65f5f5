"""a group of molecules, a state between vacuum and water -> frames, with their energies under both potentials.

`sample_group` is a task of a campaign (`data.campaigns`): all that it needs travels with it, the model files included.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_mlff.data.files import read_arrays, write_arrays
from openmm_mlff.data.solutes import Solute
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.composition import Interpolated
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.sampling.molecule_runs import LangevinSettings, MoleculeSamples, sample
from openmm_mlff.sampling.starts import with_bonds

FORMAT = "openmm-mlff-hydration-samples-1"
#: frames in one evaluation of both potentials.
CHUNK = 64


@dataclass(frozen=True)
class PairFiles:
    """The two potentials as they travel to other machines: the bytes of their files.

    Attributes:
        files: (name, bytes) of one model file that holds a pair, or of those of the potentials in vacuum and in water.
    """

    files: tuple[tuple[str, bytes], ...] = field(repr=False)

    @classmethod
    def read(
        cls, model: str | Path | None = None, vacuum: str | Path | None = None, water: str | Path | None = None
    ) -> PairFiles:
        """From one file with a pair, or from two files; raises `ValueError` for anything else, or `OSError`."""
        if (model is None) == (vacuum is None and water is None) or (vacuum is None) != (water is None):
            raise ValueError("model: expected one model file that holds a pair, or two (vacuum and water)")
        paths = [Path(path) for path in (model, vacuum, water) if path is not None]
        pair = cls(tuple((path.name, path.read_bytes()) for path in paths))
        pair.load()
        return pair

    @functools.cached_property
    def sha256(self) -> tuple[str, ...]:
        return tuple(hashlib.sha256(data).hexdigest() for _, data in self.files)

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the files: 'model', or 'vacuum' and 'water'."""
        return ("model",) if len(self.files) == 1 else ("vacuum", "water")

    def describe(self) -> dict[str, dict[str, str]]:
        """Name and checksum of each file."""
        return {
            role: {"file": name, "sha256": digest}
            for role, (name, _), digest in zip(self.roles, self.files, self.sha256, strict=True)
        }

    def load(self) -> Interpolated:
        """The pair; raises `ValueError` naming the file if they do not hold one."""
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for role, (name, data) in zip(self.roles, self.files, strict=True):
                path = Path(folder) / name
                path.write_bytes(data)
                try:
                    found.append(load_potential(path))
                except ValueError as error:
                    raise ValueError(f"{role}: {str(error).removeprefix('modelPath: ')}") from error
        if len(found) == 2:
            return Interpolated(found[0], found[1])
        if not isinstance(found[0], Interpolated):
            raise ValueError(
                f"model: expected a pair of potentials (vacuum and water), got one of family {found[0].family!r}; "
                "give two model files instead"
            )
        return Interpolated(found[0].vacuum, found[0].water)


@functools.lru_cache(maxsize=2)
def _loaded(pair: PairFiles) -> Interpolated:
    """Once per process."""
    return pair.load()


@dataclass(frozen=True)
class Group:
    """Molecules that are simulated together for a stretch, and how; a task of a campaign.

    Attributes:
        settings: of this stretch. planned: frames before it, of a run that does not break.
        starts: where each run goes on, positions ``(n_atoms, 3)`` angstrom and velocities ``(n_atoms, 3)`` nm/ps; None
            begins with the start structures.
    """

    pair: PairFiles
    coupling: float
    solutes: tuple[Solute, ...]
    settings: LangevinSettings
    precision: str | None
    planned: int = 0
    starts: tuple[tuple[np.ndarray, np.ndarray], ...] | None = None

    @property
    def frames(self) -> int:
        """Of a run that does not break."""
        return whole(self.settings.length / self.settings.interval)


def whole(ratio: float) -> int:
    """Rounded down, but not by errors of rounding."""
    return int(ratio + 1e-6)


@dataclass(frozen=True)
class StateSamples:
    """Frames of one molecule in one state.

    Attributes:
        runs: for each, ``positions`` ``(n, n_atoms, 3)`` angstrom (float32), ``vacuum`` and ``water`` ``(n,)`` eV (the
            frames' energies under both potentials), and ``last`` ``(n_atoms, 3)`` angstrom and ``velocities``
            ``(n_atoms, 3)`` nm/ps to go on from.
        header: numbers, starts (a checksum), coupling, seeds of the stretches, planned (frames of a run that does not
            break), temperatures of the runs, failures (what broke and when), broken (why there is nothing to use).
    """

    runs: tuple[dict[str, np.ndarray], ...]
    header: dict[str, Any]

    @property
    def differences(self) -> list[np.ndarray]:
        """U_water - U_vacuum of each run, eV."""
        return [run["water"] - run["vacuum"] for run in self.runs]

    def joined(self, later: StateSamples) -> StateSamples:
        """These samples and those of the stretch that follows."""
        runs, temperatures = [], []
        for k, (a, b) in enumerate(zip(self.runs, later.runs, strict=True)):
            frames = {name: np.concatenate([a[name], b[name]]) for name in ("positions", "vacuum", "water")}
            runs.append({**b, **frames})
            parts = [(len(r["vacuum"]), s.header["temperatures"][k]) for r, s in ((a, self), (b, later))]
            known = [(n, t) for n, t in parts if t is not None]
            temperatures.append(sum(n * t for n, t in known) / sum(n for n, _ in known) if known else None)
        header = {
            **self.header,
            "temperatures": temperatures,
            "planned": self.header["planned"] + later.header["planned"],
            "broken": later.header["broken"],
            **{name: self.header[name] + later.header[name] for name in ("seeds", "failures")},
        }
        return StateSamples(tuple(runs), header)

    def write(self, path: Path) -> None:
        """See `write_arrays`."""
        arrays = {f"{k}/{name}": values for k, run in enumerate(self.runs) for name, values in run.items()}
        write_arrays(path, FORMAT, arrays, self.header)

    @classmethod
    def read(cls, path: Path) -> StateSamples:
        """Raises what `read_arrays` raises."""
        header, arrays = read_arrays(path, FORMAT, "samples of a molecule")
        names = ("positions", "vacuum", "water", "last", "velocities")
        runs = ({name: arrays[f"{k}/{name}"] for name in names} for k in range(len(header["temperatures"])))
        return cls(tuple(runs), header)


def sample_group(group: Group) -> dict[str, StateSamples]:
    """Simulate a group and evaluate its frames under both potentials; by name of the molecule.

    Empty if the simulation was interrupted.
    """
    pair = _loaded(group.pair)
    ends: dict[float, Potential] = {0.0: pair.vacuum, 1.0: pair.water}
    potential = ends.get(group.coupling) or Interpolated(pair.vacuum, pair.water, group.coupling)
    structures = [structure for solute in group.solutes for structure in solute.structures]
    velocities = None
    if group.starts is not None:
        structures = [with_bonds(s).replace(positions=x) for s, (x, _) in zip(structures, group.starts, strict=True)]
        velocities = [v for _, v in group.starts]
    results = iter(
        sample(potential, structures, group.settings, velocities=velocities, precision=group.precision, threads=1)
    )
    exact = {name: copy.deepcopy(p).double() for name, p in (("vacuum", pair.vacuum), ("water", pair.water))}
    found = {}
    for solute in group.solutes:
        own = [next(results) for _ in solute.structures]
        failures = [_failure(k, run) for k, run in enumerate(own) if run.failures]
        given_up = [_failure(k, run) for k, run in enumerate(own) if run.failures and not run.finished]
        if not given_up and not all(run.finished for run in own):
            return {}
        found[solute.name] = StateSamples(
            tuple(_frames(exact, solute.structures[k], run) for k, run in enumerate(own)),
            {
                "numbers": solute.structures[0].numbers.tolist(),
                "starts": fingerprint(solute),
                "coupling": group.coupling,
                "seeds": [group.settings.seed],
                "planned": group.frames,
                "temperatures": [run.temperature if len(run.positions) else None for run in own],
                "failures": failures,
                "broken": "; ".join(given_up),
            },
        )
    return found


def _frames(exact: dict[str, Potential], structure: Structure, run: MoleculeSamples) -> dict[str, np.ndarray]:
    """What is kept of a run."""
    positions = run.positions.astype(np.float32)
    energies = {name: _energies(potential, structure, positions) for name, potential in exact.items()}
    return {"positions": positions, **energies, "last": run.last, "velocities": run.velocities}


def _failure(run: int, samples: MoleculeSamples) -> str:
    first = samples.failures[0]
    return f"run {run} broke {len(samples.failures)} time(s), first at step {first.step}: {first.reason}"


def _energies(potential: Potential, structure: Structure, frames: np.ndarray) -> np.ndarray:
    """Energies ``(n,)`` eV of frames ``(n, n_atoms, 3)`` angstrom."""
    parts = [np.zeros(0)]
    for start in range(0, len(frames), CHUNK):
        moved = [structure.replace(positions=x) for x in frames[start : start + CHUNK].astype(np.float64)]
        with torch.no_grad():
            parts.append(potential.evaluate(potential.batch(moved), forces=False).energy.double().cpu().numpy())
    return np.concatenate(parts)


def fingerprint(solute: Solute) -> str:
    """A checksum of atoms and start positions, rounded to 1e-6 angstrom."""
    digest = hashlib.sha256()
    for structure in solute.structures:
        digest.update(structure.numbers.tobytes())
        digest.update(np.round(structure.positions, 6).tobytes())
    return digest.hexdigest()[:16]
