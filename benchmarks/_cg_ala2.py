"""What the benchmarks of six-bead alanine share: data, maps and priors, the simulations, and landscapes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from _common import HERE
from openmm import app
from openmmml import MLPotential

from openmm_mlff.analysis import landscapes
from openmm_mlff.analysis.landscapes import Sample
from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.data.coarse_graining import BeadMap, ForceCovariance, constraints_of, optimised_force_map, save_maps
from openmm_mlff.data.files import write_atomically
from openmm_mlff.forces.handedness import handedness_wall
from openmm_mlff.forces.prior_forces import prior_forces
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.potentials.priors import PriorTerms, fit_priors
from openmm_mlff.sampling.biased_md import Frames, read_frames
from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.units import BOLTZMANN_EV, NM_PER_ANGSTROM

FOLDER = HERE.parent / ".work" / "cg_ala2"
#: atoms of capped_alanine.pdb that become beads: C of ACE; N, CA, CB, C of ALA; N of NME.
BEADS = (4, 6, 8, 10, 14, 16)
TORSIONS = np.array([[0, 1, 2, 4], [1, 2, 4, 5]])
#: CA, N, C, CB: positive in L-alanine.
CHIRAL = (2, 1, 4, 3)
TEMPERATURE = 300.0
KT = BOLTZMANN_EV * TEMPERATURE
#: kcal/mol in eV, for figures beside those of the literature.
KCAL = 0.0433641153
#: blocks per trajectory of 10 ns: 2 ns are many decorrelation times
PIECES = 5


@dataclass
class Beads:
    """Frames of one split on the beads.

    Attributes:
        positions: ``(n, 6, 3)`` angstrom. forces: less the priors, eV/angstrom. torsions: ``(n, 2)`` degrees.
        weights: exp(bias / kT), unbiased averages. trajectory: which one each frame is from.
    """

    positions: np.ndarray
    forces: np.ndarray
    torsions: np.ndarray
    weights: np.ndarray
    trajectory: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def blocks(self) -> list[Sample]:
        whole = [self.trajectory == t for t in np.unique(self.trajectory)]
        samples = [Sample(self.torsions[w, 0], self.torsions[w, 1], self.weights[w]) for w in whole]
        return [piece for sample in samples for piece in sample.pieces(PIECES)]


@dataclass
class Data:
    """Maps and priors from the training trajectories, and all splits."""

    map: BeadMap
    priors: PriorTerms
    train: Beads
    valid: Beads
    test: Beads
    description: dict[str, Any]

    @property
    def topology(self) -> app.Topology:
        return self.map.topology()


def _frames(folder: Path, split: str, number: int | None) -> list[Frames]:
    found = sorted((folder / "frames").glob(f"{split}-*.safetensors"))
    if len(found) < (number or 1):
        needed = f"{number or 1} {split} trajectories are needed, {len(found)} are there"
        raise SystemExit(f"{needed}; benchmarks/cg_gdml_data.py makes them")
    return [read_frames(path) for path in found[:number]]


def load(folder: Path = FOLDER, **numbers: int) -> Data:
    """Map the trajectories that are there; everything that is fitted is fitted to the training trajectories.

    Args:
        numbers: how many trajectories of a split to take, the first ones, for example ``train=4``; without it all.
    """
    splits = {name: _frames(folder, name, numbers.get(name)) for name in ("train", "valid", "test")}
    topology = app.PDBFile(str(HERE.parent / "examples" / "recipes" / "capped_alanine.pdb")).topology
    beads = BeadMap.slice(topology, BEADS)
    system = openmm.XmlSerializer.deserialize((folder / "system.xml").read_text(encoding="utf-8"))
    constraints = constraints_of(system)
    covariance = ForceCovariance(topology.getNumAtoms(), constraints)
    for frames in splits["train"]:
        covariance.add(frames.forces)
    force_map = optimised_force_map(beads, covariance)
    force_map.check(beads, constraints)
    if not numbers:
        save_maps(folder / "maps.safetensors", beads, force_map, TEMPERATURE)
    made = {}
    for name, frames in splits.items():
        made[name] = Beads(
            np.concatenate([beads.positions(f.positions) for f in frames]),
            np.concatenate([force_map.forces(f.forces) for f in frames]),
            np.concatenate([f.torsions for f in frames]).astype(np.float64),
            np.exp((np.concatenate([f.bias for f in frames]) - 0.2) / KT),
            np.repeat(np.arange(len(frames)), [len(f) for f in frames]),
        )
    train = made["train"]
    priors = fit_priors(train.positions, beads.bonds, KT, weights=train.weights)
    if not numbers:
        write_atomically(folder / "priors.json", (json.dumps(priors.to_dict(), indent=1) + "\n").encode())
    for split in made.values():
        split.forces -= priors.forces(split.positions)
    description = {
        "trajectories": {name: len(frames) for name, frames in splits.items()},
        "frames": {name: len(split) for name, split in made.items()},
        "force_rms_kcal_per_mol_angstrom": float(np.sqrt(np.mean(train.forces**2)) / KCAL),
        "bonds": {"r0": priors.bond_lengths.tolist(), "k": (priors.bond_constants / KCAL).tolist()},
        "angles": {
            "theta0": np.degrees(priors.angle_values).tolist(),
            "k": (priors.angle_constants / KCAL).tolist(),
        },
    }
    return Data(beads, priors, made["train"], made["valid"], made["test"], description)


def starts(data: Data, n: int, seed: int) -> np.ndarray:
    """Bead positions ``(n, 6, 3)`` nm from training frames: the first half all from one basin (psi > 100, phi < 0),
    the others from the unbiased distribution.

    Raises `ValueError` if a start has the wrong handedness: distances do not tell a mirror image from the molecule.
    """
    random = np.random.default_rng(seed)
    beads = data.train
    extended = np.flatnonzero((beads.torsions[:, 0] < 0) & (beads.torsions[:, 1] > 100))
    rows = np.concatenate(
        [random.choice(extended, n // 2), random.choice(len(beads), n - n // 2, p=beads.weights / beads.weights.sum())]
    )
    positions = beads.positions[rows]
    check_handedness(positions)
    return positions * NM_PER_ANGSTROM


def check_handedness(positions: np.ndarray) -> None:
    """Refuse starts ``(n, 6, 3)`` that are not L-alanine."""
    volume = landscapes.chiral_volume(positions, CHIRAL)
    if not (volume > 0).all():
        raise ValueError(f"positions: expected L-alanine, got its mirror image in start {int(volume.argmin())}")


@dataclass
class Simulated:
    """What a simulation of many runs gave.

    Attributes:
        torsions: ``(frames, runs, 2)`` degrees. flips: runs that came to the other handedness. stopped: why the runs
            ended early, or None. step_us: wall time of one step of all runs.
    """

    torsions: np.ndarray
    flips: int
    stopped: str | None
    step_us: float
    extremes: dict[str, float]

    def blocks(self, equilibration: float = 0.2) -> list[Sample]:
        """One block per run, without the first part."""
        kept = self.torsions[int(equilibration * len(self.torsions)) :]
        return [Sample(kept[:, k, 0], kept[:, k, 1]) for k in range(kept.shape[1])]


def bead_system(data: Data, model: Path | None) -> openmm.System:
    """One molecule: masses of the atoms, priors and a wall at the mirror image as OpenMM's own forces, a GDML model.

    The wall is zero on all training frames; without it one run in 300 came to the other side within 5 ns.
    """
    if model is None:
        system = openmm.System()
        for mass in data.map.masses:
            system.addParticle(mass)
    else:
        system = MLPotential("gdml", modelPath=str(model)).createSystem(data.topology)
        for i, mass in enumerate(data.map.masses):
            system.setParticleMass(i, mass)
    for force in prior_forces(data.priors):
        system.addForce(force)
    system.addForce(handedness_wall(data.train.positions, CHIRAL))
    return system


def simulate(
    data: Data,
    potential: Potential | Callable[[int], Any] | None,
    path: Path,
    *,
    runs: int = 100,
    picoseconds: float = 300.0,
    timestep: float = 4.0,
    friction: float = 2.0,
    seed: int = 1,
) -> Simulated:
    """Runs side by side in one System, LangevinMiddle; a result that is stored is read.

    Args:
        potential: a GDML model, or a function that makes a callable for `openmm.PythonForce` from a number of runs;
            None if the result is there.
        path: where the torsions of every picosecond are kept (npz).
    """
    if not path.exists():
        system = bead_system(data, _stored(potential, path) if isinstance(potential, Potential) else None)
        replicas = Replicas(system, data.topology, runs)
        if potential is not None and not isinstance(potential, Potential):
            force = openmm.PythonForce(potential(runs))
            replicas.system.addForce(force)
        _run(replicas, starts(data, runs, seed), path, picoseconds, timestep, friction, seed)
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        return Simulated(file["torsions"], about["flips"], about["stopped"], about["step_us"], about["extremes"])


def _stored(model: Potential, path: Path) -> Path:
    return save_potential(model, path.with_suffix(".safetensors"))


def _run(
    replicas: Replicas,
    positions: np.ndarray,
    path: Path,
    picoseconds: float,
    timestep: float,
    friction: float,
    seed: int,
) -> None:
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, friction, timestep * 1e-3)
    integrator.setRandomNumberSeed(seed)
    context = replicas.context(integrator, "Reference")
    replicas.set_positions(context, positions)
    replicas.set_velocities(context, TEMPERATURE, seed)
    torsions, flipped, stopped = [], np.zeros(replicas.n, bool), None
    per_frame, seconds = round(1000 / timestep), 0.0
    extremes = {"longest_bond": 0.0, "least_chiral_volume": 1.0}
    for frame in range(int(picoseconds)):
        start = time.perf_counter()
        try:
            integrator.step(per_frame)
        except openmm.OpenMMException as error:
            stopped = f"after {frame} ps: {str(error).splitlines()[0]}"
            break
        seconds += time.perf_counter() - start
        x = replicas.positions(context) / NM_PER_ANGSTROM
        bonds = np.linalg.norm(x[:, [0, 1, 2, 2, 4]] - x[:, [1, 2, 3, 4, 5]], axis=-1)
        if not np.isfinite(x).all() or bonds.max() > 3.0:
            stopped = f"after {frame} ps: a bond of {bonds.max():.3g} angstrom in run {int(bonds.max(1).argmax())}"
            break
        volume = landscapes.chiral_volume(x, CHIRAL)
        flipped |= volume < 0
        extremes["longest_bond"] = max(extremes["longest_bond"], float(bonds.max()))
        extremes["least_chiral_volume"] = min(extremes["least_chiral_volume"], float(volume.min()))
        torsions.append(dihedral(x, TORSIONS).astype(np.float32))
    about = {
        "flips": int(flipped.sum()),
        "stopped": stopped,
        "step_us": 1e6 * seconds / max(1, len(torsions) * per_frame),
        "extremes": extremes,
    }
    save_npz(path, torsions=np.array(torsions).reshape(-1, replicas.n, 2), about=np.array(json.dumps(about)))


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays under a temporary name and move them."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def measures(blocks: Sequence[Sample], reference: Sequence[Sample]) -> dict[str, Any]:
    """All figures of a landscape against a reference, with 95 % intervals."""
    found = landscapes.compare(blocks, reference, resamples=200)
    positive = landscapes.population(blocks, lambda phi, psi: phi > 0)
    result: dict[str, Any] = {
        name: {"value": getattr(found.value, name), "low": low, "high": high}
        for name, (low, high) in found.intervals.items()
    }
    return result | {"bins": found.value.bins, "phi_positive": {"value": positive.value, "error": positive.error}}


def floor(reference: Sequence[Sample]) -> dict[str, Any]:
    """What half of the reference gives against the other half."""
    found = landscapes.split_half(reference)
    positive = landscapes.population(reference, lambda phi, psi: phi > 0)
    result: dict[str, Any] = {
        name: {"value": getattr(found.value, name), "low": low, "high": high}
        for name, (low, high) in found.intervals.items()
    }
    return result | {"bins": found.value.bins, "phi_positive": {"value": positive.value, "error": positive.error}}


def rounded(value: Any, digits: int = 4) -> Any:
    """Plain data with numbers of a few significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(v, digits) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
