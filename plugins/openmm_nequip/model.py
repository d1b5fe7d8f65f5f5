"""NequIP (Batzner et al., Nat. Commun. 13, 2453 (2022)) as jax-md 0.2.8 computes it and ReSolv uses it, top to bottom.

Symbols: N atoms, S slots for neighbours, F features, B Bessel functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.potential import Evaluation, Potential, Prediction
from openmm_nequip import messages
from openmm_nequip.angular import plans, spherical_harmonics
from openmm_nequip.config import Z_MAX, NequIPConfig
from openmm_nequip.layers import BesselBasis, ByElement, Convolution, Couplings, Features, Geometry, element_table


@dataclass
class Fixed:
    """What the elements decide, for every atom."""

    embedding: Tensor  # (N, 1, F)
    elements: ByElement
    energy_shift: Tensor  # (N,) float64


class NequIPEvaluator(Evaluator):
    """As every evaluator; what compile='auto' runs op by op uses the C++ kernel of the messages where it can."""

    def eager(self, batch: Batch) -> Evaluation:
        model = self.model
        before = model.first_derivatives_only
        # compiled graphs hold the kernel too, and are compared with a run without it
        model.first_derivatives_only = self.compile == "auto"
        try:
            return super().eager(batch)
        finally:
            model.first_derivatives_only = before


class NequIP(Potential):
    """Potential of an equivariant network without charges or spin: E = scale * sum_i e_i + shift + sum_i shift[Z_i].

    Only what the energy depends on is kept of a network: the first convolutions have no features of most irreps, and
    the last one needs only products that end in scalars.
    """

    family = "nequip-jaxmd"
    element_row: Tensor

    def __init__(self, config: NequIPConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or NequIPConfig()
        self.elements, self.cutoff = c.elements, c.cutoff
        features = c.num_features
        self.register_buffer("element_row", element_table(c.elements, Z_MAX), persistent=False)
        # unit variance after the division by the root of one_hot_length
        self.element_embedding = nn.Parameter(math.sqrt(c.one_hot_length) * torch.randn(len(c.elements), features))
        self.radial_basis = BesselBasis(c)
        steps = plans(c)
        self.couplings = Couplings({path.kind for plan in steps for path in plan.paths})
        self.layers = nn.ModuleList(Convolution(c, plan, self.couplings) for plan in steps)
        self.energy_hidden = nn.Parameter(torch.randn(features, features // 2))
        self.energy_out = nn.Parameter(torch.randn(features // 2, 1))
        self.atomic_shift = nn.Parameter(torch.zeros(len(c.elements)))
        self.to(torch.get_default_dtype())

    def check_electrons(self, numbers: Sequence[int] | np.ndarray, charge: int, multiplicity: int) -> None:
        """Whole numbers are all that a model without electrons can ask for; `check` refuses ions and open shells."""
        for name, value in (("charge", charge), ("multiplicity", multiplicity)):
            if int(value) != value:
                raise ValueError(f"{name}: expected a whole number, got {value!r}")

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> Evaluator:
        """'auto' without a compiled graph runs the messages in C++ (see `messages`)."""
        return NequIPEvaluator(self, self._as_batch(batch), outputs, compile)

    # -- what the elements decide ----------------------------------------------------------------------------

    def fixed(self, batch: Batch) -> Fixed:
        rows = self.element_row[batch.numbers]
        present = rows.unique().tolist()
        atoms = [(rows == row).nonzero()[:, 0] for row in present]
        embedding = self.element_embedding[rows] / math.sqrt(self.config.one_hot_length)
        return Fixed(
            embedding=embedding[:, None],
            elements=ByElement(present, atoms, torch.cat(atoms).argsort()),
            energy_shift=self.atomic_shift[rows].double(),
        )

    def shift_atomic_energies(self, shifts: Mapping[int, float]) -> None:
        """Add a constant (eV) to the energy of every atom of an element, in place."""
        with torch.no_grad():
            for number, shift in shifts.items():
                self.atomic_shift[self.config.elements.index(number)] += shift

    # -- what positions decide -------------------------------------------------------------------------------

    def predict(self, batch: Batch, fixed: Fixed) -> Prediction:
        geometry = self.geometry(batch)
        h: Features = {"0e": fixed.embedding}
        for layer in cast(list[Convolution], list(self.layers)):
            h = layer(h, fixed.elements, geometry)
        network = batch.sum_by_structure(self.atomic_energies(h["0e"][:, 0]))
        constant = batch.sum_by_structure(fixed.energy_shift) + self.config.energy_shift
        return Prediction(self.config.energy_scale * network + constant)

    def geometry(self, batch: Batch) -> Geometry:
        """Radial functions and spherical harmonics of every atom's neighbourhood."""
        # empty slots are put beyond the cutoff, where radial functions are zero and have no gradient
        beyond = batch.positions.new_tensor([2.0 * self.cutoff, 0.0, 0.0])
        vectors = torch.where(batch.neighbors.mask[..., None], batch.neighbor_vectors(), beyond)  # (N, S, 3)
        r = vectors.square().sum(-1).sqrt()
        # a message to i from j is a function of R_i - R_j
        harmonics = spherical_harmonics(-vectors / r[..., None], self.config.max_degree)
        geometry = Geometry(
            index=batch.neighbors.index,
            basis=self.radial_basis(r),
            harmonics=[y.transpose(1, 2).contiguous() for y in harmonics],
            couplings=self.couplings,
        )
        if self.first_derivatives_only and messages.usable(r.device):
            geometry.active = (r.detach() < self.cutoff).to(r.dtype)
            geometry.pair_couplings = self.couplings.of_pairs(harmonics)
        return geometry

    def atomic_energies(self, scalars: Tensor) -> Tensor:
        """Contributions e_i of the network before scaling, ``(N, F)`` -> ``(N,)`` float64."""
        hidden = scalars @ self.energy_hidden / math.sqrt(self.energy_hidden.shape[0])
        # summed in float64, where the sum over atoms loses nothing
        return (hidden.double() @ self.energy_out.double())[:, 0] / math.sqrt(self.energy_out.shape[0])
