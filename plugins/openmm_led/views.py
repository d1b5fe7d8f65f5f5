"""positions -> what a molecule is judged by: torsions, slow coordinates, size and shape, and whether it is intact.

What applies is chosen from the topology. Lengths are in nm, torsions in degrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from openmm import app

from openmm_led.features import Features
from openmm_mlff.analysis.kinetics import deeptime_module
from openmm_mlff.analysis.observables import backbone_torsions, dihedral
from openmm_mlff.sampling.structure_checks import StructureChecks

#: up to so many residues with phi and psi, these are the space of the Markov models; above it the slow coordinates
FEW_RESIDUES = 2
#: slow coordinates that are kept
SLOW = 4
#: frames at most that the slow coordinates and the geometry of MD are fitted to
FIT_FRAMES = 200_000
#: frames of one source that are looked at for clashes
CLASH_FRAMES = 500
#: standard deviations of a bond in MD
OFF, FAR_OFF = 4.0, 6.0


@dataclass(frozen=True)
class View:
    """One way to look at frames: some columns of numbers.

    Attributes:
        name: of the view. columns: their names. unit: of all of them. period: of all of them, None on a line.
    """

    name: str
    columns: tuple[str, ...]
    unit: str
    period: float | None = None


class Views:
    """Measures frames of one molecule.

    Args:
        features: of the molecule (for a model potential: ``raw``). topology: of the same, None for a model potential.
        reference: runs of MD ``(n_frames, n_atoms, 3)`` nm that slow coordinates and structure are fitted to.
        lag: frames, of the slow coordinates.

    Attributes:
        views: what `__call__` measures. residues: names of the views that are phi and psi of a residue.
    """

    def __init__(
        self, features: Features, topology: app.Topology | None, reference: Sequence[np.ndarray], lag: int
    ) -> None:
        self.features, self.views = features, []
        self._torsions: dict[str, list[tuple[int, int, int, int]]] = {}
        self._alphas: list[int] = []
        self._tica: Any = None
        self._target = np.asarray(reference[0][0], dtype=np.float64)
        if features.kind == "raw" or topology is None:
            self.views = [View("coordinates", tuple(features.names), "")]
        else:
            self._choose(topology, reference, lag)

    def _choose(self, topology: app.Topology, reference: Sequence[np.ndarray], lag: int) -> None:
        for name, atoms in backbone_torsions(topology).items():
            self._torsions.setdefault(name[4:], []).append(atoms)
        self._torsions = {label: pair for label, pair in self._torsions.items() if len(pair) == 2}
        self.views += [View(_residue(label), ("phi", "psi"), "degrees", 360.0) for label in self._torsions]
        inputs = [self._inputs(_spaced(run, FIT_FRAMES // len(reference))) for run in reference if len(run) > lag]
        estimator = deeptime_module("decomposition").TICA(lagtime=lag, dim=SLOW)
        self._tica = estimator.fit_from_timeseries(inputs).fetch_model()
        n = self._tica.transform(inputs[0][:1]).shape[1]
        self.views.append(View("slow coordinates", tuple(f"TICA {k + 1}" for k in range(n)), ""))
        self._alphas = [a.index for a in topology.atoms() if a.name == "CA" and len(list(a.residue.atoms())) > 1]
        if len(self._alphas) >= 4:
            self.views.append(View("shape", ("RMSD", "radius of gyration", "end to end"), "nm"))

    @property
    def residues(self) -> list[str]:
        return [_residue(label) for label in self._torsions]

    def _inputs(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(self.features.inputs(np.asarray(positions, dtype=np.float64)))

    def __call__(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Columns ``(n, n_columns)`` of every view for positions ``(n, n_atoms, 3)`` nm."""
        found = {_residue(label): dihedral(positions, np.array(pair)) for label, pair in self._torsions.items()}
        if self._tica is None:
            return {"coordinates": np.asarray(self.features.coordinates(positions))}
        found["slow coordinates"] = self._tica.transform(self._inputs(positions))
        if len(self._alphas) >= 4:
            alphas = positions[:, self._alphas]
            found["shape"] = np.stack(
                [
                    _rmsd(alphas, self._target[self._alphas]),
                    np.sqrt(np.mean(np.sum((alphas - alphas.mean(1, keepdims=True)) ** 2, -1), -1)),
                    np.linalg.norm(alphas[:, -1] - alphas[:, 0], axis=-1),
                ],
                axis=-1,
            )
        return found

    def space(self, seen: dict[str, list[np.ndarray]]) -> list[np.ndarray]:
        """Points ``(n_frames, n_dims)`` per run in which Markov models of decoded frames are made.

        Sines and cosines of phi and psi for small peptides, slow coordinates for others, coordinates of a model
        potential as they are.
        """
        if self._tica is None:
            return seen["coordinates"]
        if 1 <= len(self._torsions) <= FEW_RESIDUES:
            angles = [np.radians(np.concatenate(runs, axis=-1)) for runs in zip(*(seen[r] for r in self.residues),
                                                                                strict=True)]  # fmt: skip
            return [np.concatenate([np.cos(a), np.sin(a)], axis=-1) for a in angles]
        return seen["slow coordinates"]


def _residue(label: str) -> str:
    return f"torsions {label}".strip()


def _spaced(run: np.ndarray, most: int) -> np.ndarray:
    """The beginning of a run: slow coordinates need neighbouring frames."""
    return run[: max(most, 2)]


def _rmsd(x: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Of ``(n, n_atoms, 3)`` after superposition (Kabsch), ``(n,)``."""
    a, b = x - x.mean(1, keepdims=True), target - target.mean(0)
    u, s, vt = np.linalg.svd(np.einsum("nai,aj->nij", a, b))
    sign = np.sign(np.linalg.det(u) * np.linalg.det(vt))
    overlap = s[:, 0] + s[:, 1] + sign * s[:, 2]
    square = (a**2).sum((1, 2)) + (b**2).sum() - 2.0 * overlap
    return np.sqrt(np.maximum(square, 0.0) / x.shape[1])


@dataclass
class Geometry:
    """Sums over frames of one source.

    Attributes:
        frames, bonds: looked at. off, far_off: bonds beyond `OFF` and `FAR_OFF` standard deviations of MD's.
        inverted: frames with a centre of the wrong hand. angle, angle_squares: sums of N-CA-CB angles, ``(n_angles,)``
            degrees. looked, faulty: frames looked at for faults (clashes, broken bonds, twisted peptide bonds), and
            those that have one.
    """

    frames: int = 0
    bonds: int = 0
    off: int = 0
    far_off: int = 0
    inverted: int = 0
    angle: np.ndarray = field(default_factory=lambda: np.zeros(0))
    angle_squares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    looked: int = 0
    faulty: int = 0

    def rows(self) -> dict[str, float]:
        """Shares, and the largest standard deviation of an N-CA-CB angle, by name."""
        found = {}
        if self.bonds:
            found["bonds beyond 4 s.d."] = self.off / self.bonds
            found["bonds beyond 6 s.d."] = self.far_off / self.bonds
        found["inverted frames"] = self.inverted / max(self.frames, 1)
        if len(self.angle):
            mean = self.angle / self.frames
            found["s.d. of N-CA-CB"] = float(np.sqrt(np.maximum(self.angle_squares / self.frames - mean**2, 0)).max())
        if self.looked:
            found["frames with clashes or faults"] = self.faulty / self.looked
        return found


class GeometryChecks:
    """Adds frames to `Geometry`, with bonds and hands as MD has them.

    Args:
        features: their chosen atoms are those whose bonds are looked at. topology: of the molecule.
        reference: runs of MD, ``(n_frames, n_atoms, 3)`` nm.
    """

    def __init__(self, features: Features, topology: app.Topology, reference: Sequence[np.ndarray]) -> None:
        each = max(1, 20_000 // len(reference))
        frames = np.concatenate([run[:: max(1, len(run) // each)] for run in reference]).astype(np.float64)
        chosen = set(features.atoms)
        assert features.molecule is not None
        self._features = features
        pairs = [pair for pair in features.molecule.bonds if chosen.issuperset(pair)]
        self._pairs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        lengths = self._lengths(frames)
        self._mean, self._spread = lengths.mean(0), lengths.std(0)
        hands = np.asarray(features.chirality(frames)) if features.centres else np.zeros((1, 0))
        self._signs = np.where(np.median(hands, axis=0) >= 0, 1, -1)
        self._angles = np.array(_beta_angles(topology), dtype=np.int64).reshape(-1, 3)
        self._checks = StructureChecks(topology, frames[0])

    def _lengths(self, positions: np.ndarray) -> np.ndarray:
        return np.linalg.norm(positions[:, self._pairs[:, 1]] - positions[:, self._pairs[:, 0]], axis=-1)

    def add(self, sums: Geometry, positions: np.ndarray, expected: int) -> None:
        """Look at positions ``(n, n_atoms, 3)``; `expected` frames in all, a part of which is searched for clashes."""
        away = np.abs(self._lengths(positions) - self._mean) / self._spread
        sums.frames += len(positions)
        sums.bonds += away.size
        sums.off += int((away > OFF).sum())
        sums.far_off += int((away > FAR_OFF).sum())
        if len(self._signs):
            sums.inverted += int(self._features.inverted(positions, self._signs).sum())
        if len(self._angles):
            angles = _angles(positions, self._angles)
            sums.angle = angles.sum(0) + (sums.angle if len(sums.angle) else 0.0)
            sums.angle_squares = (angles**2).sum(0) + (sums.angle_squares if len(sums.angle_squares) else 0.0)
        for x in positions[:: max(1, expected // CLASH_FRAMES)]:
            sums.looked += 1
            sums.faulty += bool(self._checks(x).reason)


def _beta_angles(topology: app.Topology) -> list[tuple[int, int, int]]:
    """N, CA, CB of every residue that has them."""
    found = []
    for residue in topology.residues():
        atoms = {a.name: a.index for a in residue.atoms()}
        if {"N", "CA", "CB"} <= set(atoms):
            found.append((atoms["N"], atoms["CA"], atoms["CB"]))
    return found


def _angles(positions: np.ndarray, triples: np.ndarray) -> np.ndarray:
    a, b, c = (positions[:, triples[:, k]] for k in range(3))
    u, v = a - b, c - b
    cosine = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))
