"""a vacuum potential, hydration free energies -> the potential in water: what ReSolv learns from (top-down).

S. Röcken, A. F. Burnet, J. Zavadlav, J. Chem. Phys. 161, 234101 (2024). The potential in water starts as the vacuum
potential, or as one that knows something of water already; what it has to get right is the free-energy difference
between the two. All free energies here are in units
of kT::

    u             = U / kT
    dA(theta)     = dA_acc - ln (1/n) sum_i exp(-du_i)      du_i = u_theta(S_i) - u_ref(S_i), frames S_i of u_ref
    d dA/d theta  = sum_i w_i du_theta(S_i)/d theta         w_i = exp(-du_i) / sum
    N_eff         = exp(-sum w ln w)
    loss          = mean over molecules of (dA - dA_experiment)^2

`dA_acc` is zero for frames of the vacuum potential. When the weights of a molecule have become uneven (N_eff below
`least_effective` of its frames), it is simulated again with the parameters as they are, and the free-energy difference
between the old and the new ensemble (Bennett acceptance ratio) is added to its `dA_acc`.

Training goes in rounds: all molecules whose weights are uneven are simulated together, many in one OpenMM System; then
the parameters move, molecule by molecule, as long as the weights allow. A step that would bring a molecule of its batch
below `smallest_effective` is halved until it does not. What a round ends with is the mean of the parameters over its
later steps, because all molecules together swing about their mean error while single batches are fitted; and whenever
errors are measured, what elements can explain of them is taken out exactly, by least squares over the training.
"""

from __future__ import annotations

import copy
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from openmm_mlff.analysis.free_energy import LEAST_OVERLAP
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training import reweighting
from openmm_mlff.training.ensembles import Frames, intact, sample_groups
from openmm_mlff.training.force_matching import fit_atomic_energies
from openmm_mlff.training.solvation_folder import CHECKPOINT, FORMAT, HISTORY, claim_training
from openmm_mlff.training.solvation_settings import SolvationOptions, Target
from openmm_mlff.units import BOLTZMANN_EV

#: the parameters of the round with the least validation error
BEST = "water.safetensors"
#: how often a step is halved
HALVINGS = 5


@dataclass
class Ensemble:
    """The frames of one molecule and the potential that made them.

    Attributes:
        frames: as stored. round: whose parameters made them; -1 is the vacuum potential.
        accumulated: free energy of that potential minus that of vacuum, kT. variance: of `accumulated`.
        batch: all frames with their pair lists. reference: u_ref ``(n,)``, float64.
    """

    frames: Frames
    round: int
    accumulated: float
    variance: float
    batch: Batch
    reference: Tensor


class SolvationTraining:
    """Train a potential in water in a folder; made anew or from the folder's checkpoint, run by `run`.

    The folder::

        config.json        options, targets, and the checksum of the vacuum potential
        vacuum/            the vacuum potential and its frames
        round-000/         parameters and frames of the simulations of a round
        checkpoint.pt      parameters, optimiser, ensembles: the state between two rounds
        history.json       one row per round          water.safetensors   the best round's parameters

    Stopped in a simulation, it goes on with the groups of molecules that are missing; stopped between two steps of the
    optimiser, it goes on from the last simulation.

    Args:
        vacuum: its frames are the first ensembles. water: where the potential in water starts; None is the vacuum one.
        targets: molecules of both splits, with names of their own.
        resume: go on with the folder.
        say: gets a line per round.

    Raises `ValueError` for targets without a training molecule, with equal names, or other than those of the folder;
    `FileExistsError` for a folder that holds a training which is not to be resumed.
    """

    def __init__(
        self,
        vacuum: Potential,
        targets: Sequence[Target],
        options: SolvationOptions,
        folder: str | Path,
        resume: bool = False,
        say: Callable[[str], None] = print,
        water: Potential | None = None,
    ) -> None:
        self.options, self.folder, self.say = options, Path(folder), say
        self.targets = {t.name: t for t in targets}
        if len(self.targets) != len(targets):
            raise ValueError("targets: expected a name of its own for every molecule, got one twice")
        if not any(t.split == "train" for t in targets):
            raise ValueError("targets: expected at least one molecule to train with, got none")
        for potential in (vacuum, water or vacuum):
            for target in targets:
                potential.check(target.structure)
        self._vacuum = vacuum
        self.model = copy.deepcopy(water or vacuum).requires_grad_(True).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.learning_rate)
        self.ensembles: dict[str, Ensemble] = {}
        self.dropped: dict[str, str] = {}
        self.history: list[dict[str, float]] = []
        self._kt = BOLTZMANN_EV * options.sampling.temperature
        claim_training(self.folder, options, targets, vacuum, self.model, resume)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if resume and (self.folder / CHECKPOINT).exists():
            self._load()
        else:
            save_potential(vacuum, self._parameters(-1))

    # -- the training ------------------------------------------------------------------------------------------

    def run(self) -> Potential:
        """Train to the last round; returns the potential of the best round (least validation error).

        Raises `FloatingPointError` if a loss is not finite; the checkpoint is then that of the round before.
        """
        if not self.ensembles:
            self._simulate(list(self.targets), -1)
            self._save()
        while len(self.history) < self.options.rounds:
            self._round(len(self.history))
        if len(self.history) == self.options.rounds:
            self._end()
        return load_potential(self.folder / BEST)

    def _round(self, k: int) -> None:
        started = time.monotonic()
        row = self._measure(k)
        row |= self._train(k) | {"seconds": time.monotonic() - started}
        self.history.append(row)
        self._save()
        self.say(
            f"round {k}: {row['simulated']:.0f} of {len(self.ensembles)} simulated again, errors before its steps: "
            f"training {row['train_mae_kt']:.2f} kT, validation {row['valid_mae_kt']:.2f} kT; "
            f"{row['steps']:.0f} steps, {row['seconds']:.0f} s"
        )

    def _end(self) -> None:
        """What the steps of the last round came to."""
        row = self._measure(self.options.rounds)
        self.history.append(row)
        self._save()
        self.say(f"at the end: training {row['train_mae_kt']:.2f} kT, validation {row['valid_mae_kt']:.2f} kT")

    def _measure(self, k: int) -> dict[str, float]:
        """Simulate where weights are uneven; errors of the parameters as they are, which are kept if they are best."""
        started = time.monotonic()
        uneven = [n for n, value in self._effective().items() if value < self.options.least_effective]
        if uneven:
            self._simulate(uneven, k)
        if self.options.fit_elements:
            self._fit_elements()
        row = {"round": float(k), "simulated": float(len(uneven)), **self._errors()}
        if row["valid_mae_kt"] <= min((r["valid_mae_kt"] for r in self.history), default=math.inf):
            save_potential(self.model, self.folder / BEST)
        return row | {"simulation_seconds": time.monotonic() - started}

    def _fit_elements(self) -> None:
        """Element energies that explain the errors of the training best; they move free energies and no atom."""
        estimates = self.free_energies()
        train = [name for name in self.ensembles if self.targets[name].split == "train"]
        structures = [self.targets[name].structure for name in train]
        shifts = fit_atomic_energies(
            structures, np.array([self.targets[name].free_energy - estimates[name] for name in train])
        )
        with torch.no_grad():
            self.model.shift_atomic_energies(shifts)

    def _train(self, k: int) -> dict[str, float]:
        """The optimiser's steps of one round."""
        options = self.options
        train = [n for n in self.ensembles if self.targets[n].split == "train"]
        random = np.random.default_rng([options.seed, k])
        low, share = min(options.learning_rate, options.final_learning_rate), k / max(options.rounds - 1, 1)
        rate = low + 0.5 * (options.learning_rate - low) * (1.0 + math.cos(math.pi * share))
        waiting: set[str] = set()
        losses, steps, halved = [], 0, 0
        paths: list[Tensor] = []
        for _ in range(options.epochs):
            total, n = torch.zeros_like(self._vector()), 0
            order = [train[i] for i in random.permutation(len(train)) if train[i] not in waiting]
            for start in range(0, len(order), options.batch_size):
                names = [n for n in order[start : start + options.batch_size] if n not in waiting]
                done = sum(row["steps"] for row in self.history) + steps
                rise = min(1.0, (done + 1) / options.warmup_steps) if options.warmup_steps else 1.0
                loss, stale, halvings = self._step(names, rise * rate)
                waiting |= stale
                losses += loss
                steps += bool(loss)
                halved += halvings
                total, n = total + self._vector(), n + 1
            if n:
                paths.append(total / n)
            if len(waiting) >= options.stale * len(train):
                break
        later = paths[len(paths) // 2 :]
        if later and options.average:
            vector_to_parameters(torch.stack(later).mean(dim=0), self.model.parameters())
        return {
            "steps": float(steps),
            "halved": float(halved),
            "waiting": float(len(waiting)),
            "loss_kt2": float(np.mean(losses)) if losses else math.nan,
            "learning_rate": rate,
        }

    def _vector(self) -> Tensor:
        """All parameters, a copy."""
        return parameters_to_vector(self.model.parameters()).detach().clone()

    def _step(self, names: Sequence[str], rate: float) -> tuple[list[float], set[str], int]:
        """One step on the molecules whose weights allow it; squared errors, the others, and how often it was halved."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, used = [], []
        for name in names:
            du = self._du(name)
            weights = reweighting.weights(du.detach(), torch.zeros_like(du))
            if float(reweighting.effective_sample_size(weights)) < self.options.least_effective * len(du):
                continue
            error = self._free_energy(name, du) - self.targets[name].free_energy / self._kt
            loss = error.square() + self.options.fluctuation * du.var()
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the loss of {name} is {float(loss.detach())}")
            (loss / len(names)).backward()
            losses.append(float(error.detach()) ** 2)
            used.append(name)
        stale = set(names) - set(used)
        if not used:
            return [], stale, 0
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = self._vector()
        self.optimizer.step()
        after = self._vector()
        halvings = 0
        while halvings < HALVINGS and not self._weights_hold(used):
            halvings += 1
            vector_to_parameters(before + 0.5**halvings * (after - before), self.model.parameters())
        return losses, stale, halvings

    def _weights_hold(self, names: Sequence[str]) -> bool:
        return all(self._effective_of(name) >= self.options.smallest_effective for name in names)

    # -- free energies -----------------------------------------------------------------------------------------

    def _du(self, name: str, model: Potential | None = None) -> Tensor:
        """u of the parameters as they are, or of another model, minus u_ref over the frames ``(n,)``."""
        ensemble = self.ensembles[name]
        return self._reduced(model or self.model, ensemble.batch) - ensemble.reference

    def _reduced(self, model: Potential, batch: Batch) -> Tensor:
        return model(batch).energy.double() / self._kt

    def _free_energy(self, name: str, du: Tensor) -> Tensor:
        return self.ensembles[name].accumulated + reweighting.zwanzig(du)

    @torch.no_grad()
    def _effective_of(self, name: str) -> float:
        du = self._du(name)
        return float(reweighting.effective_sample_size(reweighting.weights(du, torch.zeros_like(du)))) / len(du)

    def _effective(self) -> dict[str, float]:
        return {name: self._effective_of(name) for name in self.ensembles}

    @torch.no_grad()
    def free_energies(self) -> dict[str, float]:
        """The estimate of every molecule with the parameters as they are, eV."""
        return {name: float(self._free_energy(name, self._du(name))) * self._kt for name in self.ensembles}

    @torch.no_grad()
    def _errors(self) -> dict[str, float]:
        found: dict[str, list[float]] = {"train": [], "valid": []}
        spread = []
        for name, ensemble in self.ensembles.items():
            du = self._du(name)
            target = self.targets[name]
            found[target.split].append(float(self._free_energy(name, du)) - target.free_energy / self._kt)
            spread.append(math.sqrt(ensemble.variance))
        row: dict[str, float] = {}
        for split, errors in found.items():
            # without molecules for validation, those of the training say which round was best
            values = np.array(errors or found["train"])
            row |= {
                f"{split}_mae_kt": float(np.abs(values).mean()),
                f"{split}_rmse_kt": float(np.sqrt((values**2).mean())),
            }
        return row | {"accumulated_error_kt": float(np.mean(spread))}

    # -- simulations -------------------------------------------------------------------------------------------

    def _simulate(self, names: Sequence[str], k: int) -> None:
        """New ensembles from the parameters as they are; those that break or lose overlap are dropped for good."""
        if k >= 0:
            save_potential(self.model, self._parameters(k))
        starts = {n: self.ensembles[n].frames.last if n in self.ensembles else None for n in names}
        structures = {n: self.targets[n].structure for n in names}
        made = sample_groups(
            self._parameters(k),
            structures,
            starts,
            self.options.sampling,
            self._round_folder(k) / "frames",
            seed=self.options.seed + 1 + k,
            processes=self.options.processes,
        )
        older: dict[int, Potential] = {}
        for name in names:
            frames = made[name]
            # a molecule that broke may have no frames at all
            batch = None if frames.failure else self._batch(frames)
            reason = frames.failure if batch is None else intact(frames, batch)
            if batch is not None and not reason:
                reason = self._renew(name, frames, batch, k, older)
            if reason:
                self.dropped[name] = f"round {k}: {reason}"
                self.ensembles.pop(name, None)
                self.say(f"{name} takes no part any more: {reason}")

    @torch.no_grad()
    def _renew(self, name: str, frames: Frames, batch: Batch, k: int, older: dict[int, Potential]) -> str:
        """Replace an ensemble; Bennett's ratio between the two is added to what was accumulated, or why it cannot."""
        reference = self._reduced(self._vacuum if k < 0 else self.model, batch)
        old = self.ensembles.get(name)
        if old is None:
            self.ensembles[name] = Ensemble(frames, k, 0.0, 0.0, batch, reference)
            return ""
        if old.round not in older:
            older[old.round] = load_potential(self._parameters(old.round)).to(self.model.dtype)
        forward = self._du(name)
        backward = self._reduced(older[old.round], batch) - reference
        step = float(reweighting.bar(forward, backward))
        variance = reweighting.bar_variance(forward, backward, step)
        overlap = reweighting.bar_overlap(forward, backward, step)
        if overlap < LEAST_OVERLAP:
            return f"expected an overlap of at least {LEAST_OVERLAP:g} with round {old.round}, got {overlap:.2g}"
        self.ensembles[name] = Ensemble(frames, k, old.accumulated + step, old.variance + variance, batch, reference)
        return ""

    def _batch(self, frames: Frames) -> Batch:
        return self.model.batch([Structure(frames.numbers, x) for x in frames.positions])

    def _parameters(self, k: int) -> Path:
        return self._round_folder(k) / "model.safetensors"

    def _round_folder(self, k: int) -> Path:
        return self.folder / ("vacuum" if k < 0 else f"round-{k:03d}")

    # -- the folder --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        content = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "dropped": self.dropped,
            "ensembles": {
                name: {
                    "file": str(e.frames.file.relative_to(self.folder)),
                    "round": e.round,
                    "accumulated": e.accumulated,
                    "variance": e.variance,
                }
                for name, e in self.ensembles.items()
            },
        }
        stream = io.BytesIO()
        torch.save(content, stream)
        write_atomically(self.folder / CHECKPOINT, stream.getvalue())
        write_atomically(self.folder / HISTORY, (json.dumps(self.history, indent=1) + "\n").encode())

    @torch.no_grad()
    def _load(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"resume: {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if content.get("format") != FORMAT:
            raise ValueError(f"resume: expected a checkpoint of format {FORMAT}, got {content.get('format')!r}")
        models: dict[int, Potential] = {}
        self.history, self.dropped = content["history"], content["dropped"]
        for name, entry in content["ensembles"].items():
            k = entry["round"]
            if k not in models:
                models[k] = load_potential(self._parameters(k)).to(self.model.dtype)
            frames = Frames.read(self.folder / entry["file"], name)
            batch = self._batch(frames)
            reference = self._reduced(models[k], batch)
            self.ensembles[name] = Ensemble(frames, k, entry["accumulated"], entry["variance"], batch, reference)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
