"""labelled structures -> a potential whose energies, forces, dipoles and charges match them.

Forces are -dE/dR of the network, so their part of the loss is differentiated twice. Element energies are fitted by
least squares before the first step (to what the untrained network leaves over), so that training starts from the
scale of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Evaluation, Potential, energy_forces
from openmm_mlff.training.batching import EVALUATION_ATOMS, LabelledBatch, LabelledSet
from openmm_mlff.training.compiled_loss import LossFunction
from openmm_mlff.training.losses import ALL_TERMS, TERMS, LossWeights, weighted_loss
from openmm_mlff.training.parallel import ParallelLoss, make_loss

#: eV per atom between labels and a trained model's energies, beyond which the labels are of another method
FOREIGN = 1.0


def fit_atomic_energies(structures: Sequence[Structure], residuals: np.ndarray) -> dict[int, float]:
    """Energy per element that explains `residuals` best, by least squares (the smallest solution if not unique).

    What a positive or negative charge and unpaired electrons cost is fitted along where structures differ in them, so
    that it does not end up in the elements of ions; it is left for the network to learn.

    Args:
        residuals: energy of each structure that has to be explained, ``(n_structures,)`` eV.

    Returns:
        eV by atomic number.
    """
    elements = sorted({int(z) for s in structures for z in s.numbers})
    counts = np.array([[np.count_nonzero(s.numbers == z) for z in elements] for s in structures], dtype=np.float64)
    charge, unpaired = (np.array([getattr(s, n) for s in structures]) for n in ("charge", "multiplicity"))
    costs = [c for c in (charge.clip(min=0), -charge.clip(max=0), unpaired - 1) if (c == 0).any() and (c > 0).any()]
    solution = np.linalg.lstsq(np.column_stack([counts, *costs]), residuals, rcond=None)[0]
    return dict(zip(elements, solution[: len(elements)].tolist(), strict=True))


class ForceMatching:
    """The method that `loop.fit` runs: batches, loss and validation.

    Args:
        model: an untrained or trained potential.
        train, valid: labelled structures; no group may be in both (`ValueError`).
        weights: of the loss at the start; final_weights: at the end (None: no change), and of validation.
        batch_size: structures per step. seed: of the data's order.
        batch_atoms: atoms per step, for data of many sizes (see `LabelledSet.epoch`); `batch_size` is then a bound.
        compile: compute loss and gradients by a compiled graph (`CompiledLoss`); eager where that cannot be done.
        processes: share each batch between so many processes with one thread each (`ParallelLoss`; CPU only).
        fit_energies: fit element energies before training (not for a model that was trained before on labels of the
            same method; `ValueError` if the labels are more than `FOREIGN` eV/atom away from such a model).
        native: let the model use C++ kernels that have second derivatives, where its family has them.
    """

    def __init__(
        self,
        model: Potential,
        train: Sequence[Structure],
        valid: Sequence[Structure],
        weights: LossWeights | None = None,
        final_weights: LossWeights | None = None,
        batch_size: int = 8,
        seed: int = 0,
        compile: bool = False,
        fit_energies: bool = True,
        processes: int = 1,
        batch_atoms: int | None = None,
        native: bool = False,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("batch_atoms", batch_atoms)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if processes < 1 or processes > batch_size:
            raise ValueError(f"processes: expected 1 to batch_size = {batch_size}, got {processes}")
        if compile and batch_atoms is not None:
            raise ValueError(
                "compile: graphs are made for batches of one kind; expected false with batch_atoms, got true"
            )
        if processes > 1 and model.device.type != "cpu":
            raise ValueError(f"processes: expected 1 on a {model.device.type} device, got {processes}")
        shared = {s.group for s in train} & {s.group for s in valid} - {""}
        if shared:
            raise ValueError(f"valid: expected groups that are not in train, got {sorted(shared)[0]!r} in both")
        self.weights = weights or LossWeights()
        self.final_weights = final_weights
        for name in TERMS:
            wanted = getattr(self.weights, name) > 0 or (final_weights is not None and getattr(final_weights, name) > 0)
            if wanted and all(getattr(s, name) is None for s in train):
                raise ValueError(f"weights: {name} has a weight above 0, but no structure in train has a label for it")
            if wanted and name in ("dipole", "charges") and not model.predicts_charges:
                raise ValueError(f"weights: {name} has a weight above 0, but {model.family} predicts no charges")
        self.batch_size, self.batch_atoms, self.seed = batch_size, batch_atoms, seed
        model.native_training = native
        self._meet_energies(model, train, fit_energies)
        self.train_set, self.valid_set = LabelledSet(train, model), LabelledSet(valid, model)
        self._compile, self._processes = compile, processes
        self._single: LossFunction | None = None
        self._parallel: ParallelLoss | None = None

    # -- what the loop asks for ------------------------------------------------------------------------------

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch, as indices."""
        return self.train_set.epoch(self.seed, epoch, self.batch_size, self.batch_atoms)

    def share(self, indices: np.ndarray, n: int) -> list[np.ndarray]:
        """A batch in n parts, for processes that share it."""
        return self.train_set.share(indices, n)

    def loss(self, model: Any, indices: np.ndarray, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch and its unweighted terms; `progress` runs from 0 to 1."""
        data = self.train_set
        weights = self.weights.towards(self.final_weights, progress).tensor(data.dtype, data.device)
        # Fabric's wrapper hides the module whose parameters a graph or other processes need
        module = getattr(model, "_forward_module", model)
        if self._processes > 1:
            if self._parallel is None:
                self._parallel = ParallelLoss(module, self.train_set, batch_loss, self._processes, self._compile)
            total, terms = self._parallel(module, indices, weights)
        else:
            if self._single is None:
                self._single = make_loss(module, batch_loss, self._compile)
            total, terms = self._single(model, self.train_set.batch(indices), weights)
        return total, dict(zip(ALL_TERMS, terms, strict=True))

    def close(self) -> None:
        """End the processes that share the work, if there are any."""
        if self._parallel is not None:
            self._parallel.close()
            self._parallel = None

    def validate(self, model: Any) -> dict[str, float]:
        """Errors over the validation set: ``loss`` with the final weights, and MAE and RMSE of what has labels.

        Energies in meV/atom, forces in meV/angstrom, dipoles in me*angstrom, charges in me.
        """
        weights = self.final_weights or self.weights
        sums: dict[str, list[float]] = {}
        extensive = 0.0
        for indices in self.valid_set.chunks(4 * self.batch_size, EVALUATION_ATOMS):
            labelled = self.valid_set.batch(indices)
            result = evaluate_batch(model, labelled)
            for name in TERMS:
                error = _errors(name, result, labelled)
                if error is not None:
                    total = sums.setdefault(name, [0.0, 0.0, 0.0])
                    total[0] += float(error.abs().sum())
                    total[1] += float(error.square().sum())
                    total[2] += error.numel()
                    if name == "energy":
                        counts = labelled.batch.counts[~torch.isnan(labelled.labels.energy)]  # type: ignore[arg-type]
                        extensive += float((error.square() * counts).sum())
        metrics: dict[str, float] = {"loss": 0.0}
        for name, (absolute, square, n) in sums.items():
            if n:
                metrics[f"{name}_mae"] = 1e3 * absolute / n
                metrics[f"{name}_rmse"] = 1e3 * (square / n) ** 0.5
                metrics["loss"] += getattr(weights, name) * (extensive if name == "energy" else square) / n
        return metrics

    # -- before the first step -------------------------------------------------------------------------------

    def _meet_energies(self, model: Potential, train: Sequence[Structure], fit: bool) -> None:
        """Shift the energies of elements to those of the labels, or refuse labels of another method."""
        known = [s for s in train if s.energy is not None]
        if not known:
            return
        rng = np.random.default_rng(self.seed)
        known = [known[i] for i in rng.permutation(len(known))[:2000]]
        labelled = LabelledSet(known, model)
        residuals = np.zeros(len(known))
        for indices in labelled.chunks(64, EVALUATION_ATOMS):
            part = labelled.batch(indices)
            assert part.labels.energy is not None
            with torch.no_grad():
                predicted = model(part.batch).energy
            residuals[indices] = (part.labels.energy - predicted).cpu().numpy()
        if fit:
            model.shift_atomic_energies(fit_atomic_energies(known, residuals))
            return
        off = float(np.median(np.abs(residuals) / [len(s) for s in known]))
        if off > FOREIGN:
            raise ValueError(
                f"fit_energies: energies of the labels are {off:.3g} eV/atom away from the model's, as those of "
                "another method are; expected true (energies of elements are fitted first) or labels of the model's "
                "method, got false"
            )


def evaluate_batch(model: Any, labelled: LabelledBatch, create_graph: bool = False) -> Evaluation:
    """Energies, forces and charges of a prepared batch; differentiable with `create_graph`."""
    with torch.enable_grad():
        positions = labelled.batch.positions
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_(True)
        batch = labelled.batch.at(positions, labelled.batch.cell, labelled.batch.external_potential)
        prediction = model(batch)
        forces = energy_forces(prediction.energy, positions, create_graph)
    return Evaluation(**vars(prediction), forces=forces)


def batch_loss(model: Any, labelled: LabelledBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted loss of a batch, ready for `backward`, and its unweighted terms."""
    result = evaluate_batch(model, labelled, create_graph=True)
    return weighted_loss(result, labelled.labels, labelled.batch.counts, weights)


def _errors(name: str, result: Evaluation, labelled: LabelledBatch) -> Tensor | None:
    """Prediction minus label in double precision, flat; energies per atom; None without labels or predictions."""
    predicted, reference = getattr(result, name), getattr(labelled.labels, name)
    if predicted is None or reference is None:
        return None
    known = ~torch.isnan(reference)
    error = (predicted.detach() - reference).double()
    if name == "energy":
        error = error / labelled.batch.counts
    return error[known]
