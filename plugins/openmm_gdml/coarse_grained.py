"""Coarse-grained GDML: a free-energy surface of beads learnt from instantaneous forces, which scatter about their mean.

    model = CoarseGrainedGDML(sigma=2.0, n_inducing=150).fit(positions, forces, variables=torsions)

Forces are those of a force map (`openmm_mlff.data.coarse_graining`) less those of the priors
(`openmm_mlff.potentials.priors`). Three methods:

* ``reduced_rank`` (default): one fit to all frames in the space that some stratified frames span (`mean_force`).
* ``two_layer``: Wang, Chmiela, Mueller, Noe, Clementi, J. Chem. Phys. 152, 194106 (2020). Many GDML models, each of a
  few hundred stratified frames; then one GDML model of their averaged forces at stratified configurations.
* ``single``: one GDML model of the given frames, which does not average anything.

Frames may be chosen by variables of the beads (`stratified`), and may have been sampled under a bias on such variables:
the mean force at given bead positions is the same.

Units: angstrom, eV/angstrom.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_gdml.descriptors import INVERSE_DISTANCES
from openmm_gdml.mean_force import Internal, NormalEquations, Representation, batch_size, exact
from openmm_gdml.model import GDMLPotential
from openmm_gdml.solvers import parse_memory

METHODS = ("reduced_rank", "two_layer", "single")
#: models of the first layer by which its sigma and lambda are chosen
SCAN = 16
#: seconds between two stores of the normal equations
STORE_EVERY = 60.0
Progress = Callable[[str, float], None]


def stratified(
    variables: np.ndarray, n: int, random: np.random.Generator, bins: int = 300, replace: bool = False
) -> np.ndarray:
    """Frames spread evenly over the occupied bins of some variables: a bin uniformly, then a frame in it uniformly.

    Args:
        variables: ``(n_frames, k)`` or ``(n_frames,)``. n: how many frames.
        bins: along each variable, between its least and largest value.
        replace: whether a frame may come again; without, bins that are used up drop out.

    Returns indices ``(n,)``. Raises `ValueError` naming the argument.
    """
    values = np.asarray(variables, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"variables: expected finite numbers (n_frames, k), got shape {np.shape(variables)}")
    if not 1 <= n <= (n if replace else len(values)):
        raise ValueError(f"n: expected 1 to {len(values)} frames, got {n}")
    low, width = values.min(0), np.ptp(values, axis=0)
    cell = np.minimum((values - low) / np.where(width > 0, width, 1.0) * bins, bins - 1).astype(np.int64)
    _, place, counts = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
    probability = 1.0 / counts[place.ravel()]
    if replace:
        return random.choice(len(values), n, p=probability / probability.sum())
    # exponential races: the n first arrivals are a draw without replacement (Efraimidis, Spirakis, 2006)
    return np.argpartition(random.exponential(size=len(values)) / probability, n - 1)[:n]


@dataclass
class Frames:
    """What a fit is given, as float64 tensors."""

    positions: Tensor
    forces: Tensor
    weights: Tensor | None

    def __len__(self) -> int:
        return len(self.positions)

    @classmethod
    def checked(cls, positions: Any, forces: Any, weights: Any = None, *, name: str = "") -> Frames:
        r, f = (torch.as_tensor(np.asarray(v, dtype=np.float64)) for v in (positions, forces))
        if r.dim() != 3 or r.shape[2] != 3 or r.shape[1] < 2:
            raise ValueError(f"{name}positions: expected shape (n_frames, n_beads >= 2, 3), got {tuple(r.shape)}")
        if f.shape != r.shape:
            raise ValueError(f"{name}forces: expected shape {tuple(r.shape)}, got {tuple(f.shape)}")
        for label, values in (("positions", r), ("forces", f)):
            bad = torch.nonzero(~torch.isfinite(values).flatten(1).all(1))
            if len(bad):
                raise ValueError(f"{name}{label}: expected finite numbers, got NaN or infinity in frame {int(bad[0])}")
        if weights is None:
            return cls(r, f, None)
        w = torch.as_tensor(np.asarray(weights, dtype=np.float64))
        if w.shape != (len(r),) or not bool((w >= 0).all()) or not 0 < float(w.sum()) < math.inf:
            raise ValueError(f"{name}weights: expected {len(r)} numbers >= 0, not all zero, got shape {tuple(w.shape)}")
        return cls(r, f, w)

    def error(self, predict: Callable[[Tensor], Tensor]) -> float:
        """Weighted mean square difference per component, (eV/angstrom)^2."""
        total = torch.cat([
            (predict(r) - f).square().flatten(1).mean(1)
            for r, f in zip(self.positions.split(1000), self.forces.split(1000), strict=True)
        ])  # fmt: skip
        return float(total.mean() if self.weights is None else (total * self.weights).sum() / self.weights.sum())


@dataclass
class CoarseGrainedGDML:
    """Settings of a coarse-grained fit; `fit` makes the model.

    Where `sigma`, `lam` (and `second_sigma`, `second_lam`) are several values, validation frames choose.

    Attributes:
        method: reduced_rank, two_layer or single. sigma: in the descriptor's unit. lam: for labels of unit variance.
        n_inducing: regressors of the reduced-rank fit.
        n_models, batch_frames: models of the first layer, and frames of each.
        n_second, second_sigma, second_lam: configurations and settings of the second layer.
        bins: along each variable of `stratified`.
        descriptor, descriptor_options: what geometries are compared by. permutations: of equal beads, ``(S, N)``.
        memory: limit for the matrices of the fit. seed: of every random choice.
        progress: called with what is done and the fraction of it.
        report: after `fit`, a row for every candidate with its mean square error (eV/angstrom)^2 on validation frames.
    """

    method: str = "reduced_rank"
    sigma: float | Sequence[float] = 2.0
    lam: float | Sequence[float] = 1e-6
    n_inducing: int = 150
    n_models: int = 64
    batch_frames: int = 300
    n_second: int = 700
    second_sigma: float | Sequence[float] = 2.0
    second_lam: float | Sequence[float] = 1e-7
    bins: int = 300
    descriptor: str = INVERSE_DISTANCES
    descriptor_options: Mapping[str, Any] = field(default_factory=dict)
    permutations: Any = None
    memory: int | float | str | None = "4 GB"
    seed: int = 0
    progress: Progress | None = None
    report: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("n_inducing", "n_models", "batch_frames", "n_second", "bins"):
            value = getattr(self, name)
            if int(value) != value or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("sigma", "lam", "second_sigma", "second_lam"):
            if not all(0 < value < math.inf for value in self._grid(name)) or not self._grid(name):
                raise ValueError(f"{name}: expected a positive number or several, got {getattr(self, name)!r}")
        parse_memory(self.memory)

    def _grid(self, name: str) -> tuple[float, ...]:
        value = getattr(self, name)
        return tuple(float(v) for v in np.atleast_1d(np.asarray(value, dtype=np.float64)))

    def fit(
        self,
        positions: np.ndarray,
        forces: np.ndarray,
        variables: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        validation: tuple[np.ndarray, ...] | None = None,
        numbers: Sequence[int] | None = None,
        beads: Sequence[str] | None = None,
        folder: str | Path | None = None,
    ) -> GDMLPotential:
        """Learn the free energy whose gradients are the mean of the forces.

        Args:
            positions: ``(n_frames, n_beads, 3)`` angstrom. forces: the same, eV/angstrom, without the priors.
            variables: of the beads, ``(n_frames, k)``, for `stratified`; None chooses frames uniformly.
            weights: of the frames in the sum of squares (reduced_rank), ``(n_frames,)``.
            validation: positions and forces (and weights) that choose among several settings; they should come from
                other trajectories than the frames.
            numbers: atomic numbers of the beads, or any that tell their kinds apart; None numbers them.
            beads: names of the beads, under which the model finds them in a topology.
            folder: where the sums are stored now and then, so that a fit that was stopped goes on (reduced_rank).

        Returns a model whose energy averages to zero over the frames. Raises `ValueError` naming the argument.
        """
        frames = Frames.checked(positions, forces, weights)
        held_out = None if validation is None else Frames.checked(*validation[:3], name="validation ")
        n_beads = frames.positions.shape[1]
        if held_out is not None and held_out.positions.shape[1] != n_beads:
            raise ValueError(f"validation: expected {n_beads} beads, got {held_out.positions.shape[1]}")
        several = [n for n in ("sigma", "lam", "second_sigma", "second_lam") if len(self._grid(n)) > 1]
        if held_out is None and several:
            raise ValueError(f"validation: expected frames to choose {several[0]} by, got None")
        if variables is not None and len(variables) != len(frames):
            raise ValueError(f"variables: expected {len(frames)} rows, one per frame, got {len(variables)}")
        chosen = np.zeros(len(frames)) if variables is None else np.asarray(variables)
        if weights is not None and self.method != "reduced_rank":
            raise ValueError(f"weights: {self.method} takes frames with equal weights only")
        representation = Representation(
            n_beads,
            self.descriptor,
            tuple(self.descriptor_options.items()),
            () if self.permutations is None else tuple(tuple(int(i) for i in p) for p in self.permutations),
        )
        kinds = _numbers(numbers, beads, n_beads, self.permutations)
        task = _Fit(self, frames, chosen, held_out, representation, kinds, beads, folder)
        self.report = task.report
        model = getattr(task, self.method)()
        # the constant of the free energy is arbitrary; this one keeps numbers small
        energies, _ = model.energies_and_forces(frames.positions[: min(len(frames), 10_000)])
        model.shift -= energies.mean()
        return model


def _numbers(
    numbers: Sequence[int] | None, beads: Sequence[str] | None, n_beads: int, permutations: Any
) -> tuple[int, ...]:
    for name, given in (("numbers", numbers), ("beads", beads)):
        if given is not None and len(given) != n_beads:
            raise ValueError(f"{name}: expected {n_beads} values, one per bead, got {len(given)}")
    if numbers is not None:
        return tuple(int(z) for z in numbers)
    if permutations is None:
        return tuple(range(1, n_beads + 1))
    # beads that change places are of one kind: that of the first among them
    return tuple(int(k) + 1 for k in np.min(np.asarray(permutations), axis=0))


@dataclass
class _Fit:
    """One call of `CoarseGrainedGDML.fit`."""

    settings: CoarseGrainedGDML
    frames: Frames
    variables: np.ndarray
    held_out: Frames | None
    representation: Representation
    numbers: tuple[int, ...]
    beads: Sequence[str] | None
    folder: str | Path | None
    report: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.settings.seed)
        self.scale = float(self.frames.forces.std())
        self.memory = parse_memory(self.settings.memory)
        if self.scale == 0:
            raise ValueError("forces: expected forces that differ from zero and from one another")

    # -- three methods -------------------------------------------------------------------------------------------

    def reduced_rank(self) -> GDMLPotential:
        chosen = np.sort(self._draw(self.settings.n_inducing, "n_inducing"))
        points = Internal.of(self.frames.positions[chosen], self.representation, permuted=True)
        best: tuple[float, GDMLPotential] | None = None
        for sigma in self.settings._grid("sigma"):
            equations = self._accumulate(points, chosen, sigma)
            solve = equations.solver()
            for lam in self.settings._grid("lam"):
                model = self._model([points], [solve(lam)], sigma, lam)
                best = self._better(best, model, layer="reduced_rank", sigma=sigma, lam=lam)
        assert best is not None
        return best[1]

    def single(self) -> GDMLPotential:
        rows = self._draw(min(self.settings.batch_frames, len(self.frames)), "batch_frames")
        return self._choose(self.frames.positions[rows], self.frames.forces[rows], "single", "sigma", "lam")

    def two_layer(self) -> GDMLPotential:
        s = self.settings
        # a batch holds a frame once; the same frames may be in several batches
        size = min(s.batch_frames, len(self.frames))
        batches = [self._draw(size, "batch_frames") for _ in range(s.n_models)]
        ensemble: tuple[float, GDMLPotential] | None = None
        for sigma in s._grid("sigma"):
            for model in self._ensembles(batches[:SCAN], sigma, s._grid("lam")):
                ensemble = self._better(ensemble, model, layer="ensemble", sigma=sigma, lam=model.config.lam)
        assert ensemble is not None
        chosen = ensemble[1].config
        if s.n_models > SCAN:
            (full,) = self._ensembles(batches, chosen.sigma, (chosen.lam or 0.0,))
            self._better(None, full, layer="whole ensemble", sigma=chosen.sigma, lam=chosen.lam)
        else:
            full = ensemble[1]
        rows = self._draw(min(s.n_second, len(self.frames)), "n_second")
        positions = self.frames.positions[rows]
        averaged = torch.cat([full.energies_and_forces(part)[1] for part in positions.split(50)])
        return self._choose(positions, averaged, "second", "second_sigma", "second_lam")

    # -- their parts ---------------------------------------------------------------------------------------------

    def _draw(self, n: int, name: str) -> np.ndarray:
        if n > len(self.frames):
            raise ValueError(f"{name}: expected at most {len(self.frames)}, the number of frames, got {n}")
        return stratified(self.variables, n, self.random, self.settings.bins)

    def _accumulate(self, points: Internal, chosen: np.ndarray, sigma: float) -> NormalEquations:
        """The sums over all frames; taken up where a stored run stopped."""
        equations = NormalEquations(points, sigma)
        step = batch_size(len(points), points.rank, self.memory)
        path = None if self.folder is None else Path(self.folder) / f"normal_equations_{sigma:g}.safetensors"
        fingerprint = "" if path is None else self._fingerprint(chosen, sigma)
        if path is not None:
            equations.load(path, fingerprint)
        stored = time.monotonic()
        frames, done = self.frames, equations.frames
        while done < len(frames):
            part = slice(done, done + step)
            here = Internal.of(frames.positions[part], self.representation)
            equations.add(
                here, frames.forces[part] / self.scale, None if frames.weights is None else frames.weights[part]
            )
            done = equations.frames
            self._tell(f"frames, sigma {sigma:g}", done / len(frames))
            if path is not None and (done == len(frames) or time.monotonic() - stored > STORE_EVERY):
                equations.save(path, fingerprint)
                stored = time.monotonic()
        return equations

    def _fingerprint(self, chosen: np.ndarray, sigma: float) -> str:
        r = self.representation
        digest = hashlib.sha256(json.dumps([r.name, r.options, r.permutations, sigma], default=str).encode())
        arrays = [self.frames.positions.numpy(), self.frames.forces.numpy(), chosen]
        for values in arrays + ([] if self.frames.weights is None else [self.frames.weights.numpy()]):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def _ensembles(self, batches: list[np.ndarray], sigma: float, lams: tuple[float, ...]) -> list[GDMLPotential]:
        """The mean of one GDML per batch, for each lambda, as one model of all their points."""
        points: list[Internal] = []
        found: dict[float, list[Tensor]] = {lam: [] for lam in lams}
        for k, rows in enumerate(batches):
            here = Internal.of(self.frames.positions[rows], self.representation, permuted=True)
            solved = exact(here, self.frames.forces[rows] / self.scale, sigma, lams, self.memory)
            for lam, a in solved:
                found[lam].append(a / len(batches))
            points.append(here)
            self._tell(f"models, sigma {sigma:g}", (k + 1) / len(batches))
        whole = {lam: a for lam, a in found.items() if len(a) == len(batches)}
        if not whole:
            raise ValueError(
                f"lam: no value of {lams} gives a positive definite matrix in every batch; choose larger ones"
            )
        return [self._model(points, a, sigma, lam) for lam, a in whole.items()]

    def _choose(self, positions: Tensor, forces: Tensor, layer: str, sigmas: str, lams: str) -> GDMLPotential:
        """The best full regression of some frames."""
        points = Internal.of(positions, self.representation, permuted=True)
        best: tuple[float, GDMLPotential] | None = None
        for sigma in self.settings._grid(sigmas):
            for lam, a in exact(points, forces / self.scale, sigma, self.settings._grid(lams), self.memory):
                best = self._better(best, self._model([points], [a], sigma, lam), layer=layer, sigma=sigma, lam=lam)
        assert best is not None
        return best[1]

    def _model(self, points: list[Internal], a: list[Tensor], sigma: float, lam: float) -> GDMLPotential:
        coefficients = [self.scale * p.coefficients(c) for p, c in zip(points, a, strict=True)]
        return GDMLPotential.from_coefficients(
            self.numbers,
            sigma,
            torch.cat([p.x[0] for p in points]),
            torch.cat(coefficients),
            0.0,
            permutations=self.settings.permutations,
            lam=lam,
            descriptor=self.settings.descriptor,
            descriptor_options=dict(self.settings.descriptor_options),
            beads=None if self.beads is None else tuple(self.beads),
        )

    def _better(
        self, best: tuple[float, GDMLPotential] | None, model: GDMLPotential, **row: Any
    ) -> tuple[float, GDMLPotential]:
        """The better of two by validation frames, if there are any; takes note of the candidate."""
        error = math.nan if self.held_out is None else self.held_out.error(lambda r: model.energies_and_forces(r)[1])
        self.report.append({**row, "points": model.config.n_train, "validation": error})
        return (error, model) if best is None or error < best[0] else best

    def _tell(self, what: str, fraction: float) -> None:
        if self.settings.progress is not None:
            self.settings.progress(what, fraction)
