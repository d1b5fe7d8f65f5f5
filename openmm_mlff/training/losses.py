"""labels, predictions -> how far apart they are: the weighted squares that training minimises.

Missing labels are NaN in the tensors and count nowhere, so sets in which only some structures have, say, a dipole can
be trained together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_mlff.potentials.potential import Evaluation

#: names of the terms that compare with labels
TERMS = ("energy", "forces", "dipole", "charges")
#: names of all terms, in the order of `LossWeights.tensor`
ALL_TERMS = (*TERMS, "surplus")


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term of `weighted_loss`.

    Attributes:
        energy: of the mean of (E - E_ref)^2 / n_atoms, 1/eV^2 (an extensive quantity's variance grows with its size).
        forces: of the mean square of force components, angstrom^2/eV^2.
        dipole: of the mean square of dipole components, 1/(e*angstrom)^2; it trains the charges.
        charges: of the mean square of atomic charges, 1/e^2 (reference charges depend on the partitioning).
        surplus: of the mean square of `Prediction.surplus`, 1/e^2: what a network's own charges lack of the total. Only
            structures of several molecules far apart can teach it otherwise.
    """

    energy: float = 1.0
    forces: float = 1.0
    dipole: float = 0.0
    charges: float = 0.0
    surplus: float = 0.0

    def __post_init__(self) -> None:
        for name in ALL_TERMS:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a weight >= 0, got {getattr(self, name)!r}")
        if not any(getattr(self, name) > 0 for name in TERMS):
            raise ValueError("weights: expected at least one weight above 0, got none")

    def towards(self, final: LossWeights | None, progress: float) -> LossWeights:
        """The weights at `progress` (0 to 1) on the way from these to `final`: geometric, linear from or to 0.

        All parameters together shift the energy of a batch in one direction, so at a large learning rate a large weight
        of energies makes them swing; a geometric way keeps the weight small until the learning rate has come down.
        """
        if final is None:
            return self
        progress = min(max(progress, 0.0), 1.0)
        mixed = {}
        for name in ALL_TERMS:
            start, end = getattr(self, name), getattr(final, name)
            if start > 0 and end > 0:
                mixed[name] = start * (end / start) ** progress
            else:
                mixed[name] = (1.0 - progress) * start + progress * end
        return LossWeights(**mixed)

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``(5,)`` in the order of `ALL_TERMS`."""
        return torch.tensor(dataclasses.astuple(self), dtype=dtype, device=device)


@dataclass
class Labels:
    """Reference values of a batch; NaN where unknown, None where no structure has any.

    Attributes:
        energy: ``(n_structures,)`` eV. forces: ``(n_atoms, 3)`` eV/angstrom.
        dipole: ``(n_structures, 3)`` e*angstrom. charges: ``(n_atoms,)`` e.
    """

    energy: Tensor | None = None
    forces: Tensor | None = None
    dipole: Tensor | None = None
    charges: Tensor | None = None


def mean_square(prediction: Tensor, reference: Tensor, scale: Tensor | None = None) -> Tensor:
    """Mean of ``(prediction - reference)^2 * scale`` over the known references; 0 if none is known."""
    known = ~torch.isnan(reference)
    # the difference is masked before it is squared, so that no gradient is NaN
    error = torch.where(known, prediction - reference, torch.zeros_like(prediction)).square()
    if scale is not None:
        error = error * scale
    return error.sum() / known.sum().clamp(min=1)


def loss_terms(prediction: Evaluation, labels: Labels, counts: Tensor) -> Tensor:
    """The unweighted terms, ``(5,)`` in the order of `ALL_TERMS`; 0 where labels or predictions are missing.

    Args:
        counts: atoms per structure, ``(n_structures,)``.
    """
    scale = {"energy": 1.0 / counts.to(prediction.energy.dtype)}
    terms = []
    for name in TERMS:
        predicted, reference = getattr(prediction, name), getattr(labels, name)
        if predicted is None or reference is None:
            terms.append(prediction.energy.new_zeros(()))
        else:
            terms.append(mean_square(predicted, reference, scale.get(name)))
    surplus = prediction.surplus
    terms.append(prediction.energy.new_zeros(()) if surplus is None else surplus.square().mean())
    return torch.stack([term.to(terms[0].dtype) for term in terms])


def weighted_loss(prediction: Evaluation, labels: Labels, counts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The scalar to minimise, and its unweighted terms ``(5,)``, detached."""
    terms = loss_terms(prediction, labels, counts)
    return (weights * terms).sum(), terms.detach()
