"""SO3krates (Frank, Unke, Mueller, Chmiela, Nat. Commun. 15, 6539 (2024)) and SO3LR, top to bottom.

An atom has features x (invariant) and Euclidean variables ev (spherical harmonics of degrees l). Symbols: N atoms,
S slots for neighbours, F features, K radial functions, D degrees, M components of the Euclidean variables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials.electrostatics import refuse_large_ewald, smeared_lattice_energy
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.potential import Potential, Prediction
from openmm_so3krates.config import Z_MAX, SO3kratesConfig
from openmm_so3krates.layers import (
    MLP,
    BernsteinBasis,
    ElectronicEmbedding,
    Geometry,
    Layer,
    PhysNetBasis,
    cutoff_function,
    dense,
    lecun_normal_,
    spherical_harmonics,
)
from openmm_so3krates.terms import COULOMB, Dispersion, Electrostatics, NuclearRepulsion


@dataclass
class Fixed:
    """What atoms, charge and multiplicity decide, for every atom."""

    x: Tensor  # (N, F) initial features
    energy_scale: Tensor  # (N,) float64
    energy_offset: Tensor  # (N,) float64
    charge_bias: Tensor | None  # (N,)
    hirshfeld_shift: Tensor | None  # (N,)
    hirshfeld_query: Tensor | None  # (N, hirshfeld_features)
    free: tuple[Tensor, Tensor] | None  # polarisability and C6 of the free atoms


class SO3krates(Potential):
    """Potential of an equivariant transformer, with charges, repulsion, electrostatics and dispersion where asked for.

    E = sum_i e_i + E_repulsion + E_electrostatics + E_dispersion; charges are shifted to sum to Q; dipole =
    sum_i q_i R_i.

    Attributes:
        long_range_method: how charges interact in a periodic box: 'shifted' (real space, cut off smoothly), 'ewald' or
            'pme' (all images; dispersion keeps its cutoff).
    """

    family = "so3krates"

    def __init__(self, config: SO3kratesConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or SO3kratesConfig()
        self.elements = c.elements
        self.charges, self.multiplicities = c.charges, c.multiplicities
        self.supports_charge, self.supports_multiplicity = c.use_charge_embed, c.use_spin_embed
        self.predicts_charges = c.predict_charges
        self.cutoff = c.cutoff
        self.long_range = c.use_electrostatics or c.use_dispersion
        self.long_range_cutoff = c.long_range_cutoff
        self.long_range_method = "shifted"
        self.long_range_methods = ("shifted", "ewald", "pme") if c.use_electrostatics else ("shifted",)
        features, rows = c.num_features, Z_MAX + 1

        self.element_embedding = nn.Parameter(torch.randn(rows, features) / math.sqrt(features))
        self.charge_embedding = ElectronicEmbedding(features) if c.use_charge_embed else None
        self.spin_embedding = ElectronicEmbedding(features) if c.use_spin_embed else None
        self.radial_basis = BernsteinBasis(c) if c.radial_basis == "bernstein" else PhysNetBasis(c)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))

        self.energy_hidden, self.energy_out = dense(features, features), dense(features, 1)
        self.energy_scale = nn.Parameter(torch.ones(rows))
        self.energy_offset = nn.Parameter(torch.zeros(rows))
        if c.predict_charges:
            self.charge_head = MLP(features, features, 1)
            # without charges at first: random ones would interact by many eV
            nn.init.zeros_(self.charge_head.second.weight)
            self.charge_bias = nn.Parameter(torch.zeros(rows))
        if c.predict_hirshfeld:
            width = c.hirshfeld_features
            self.hirshfeld_head = MLP(features, width, width)
            # free atoms at first
            self.hirshfeld_shift = nn.Parameter(torch.ones(rows))
            self.hirshfeld_query = nn.Parameter(lecun_normal_(torch.empty(rows, width), width))

        self.repulsion = NuclearRepulsion() if c.use_zbl_repulsion else None
        self.electrostatics = Electrostatics(c.electrostatic_sigma) if c.use_electrostatics else None
        self.dispersion = Dispersion(c.dispersion_scale, c.dispersion_damping) if c.use_dispersion else None
        self.to(torch.get_default_dtype())

    def check_electrons(self, numbers: Sequence[int] | np.ndarray, charge: int, multiplicity: int) -> None:
        """Refuse a charge and multiplicity that no number of electrons can have, if this model knows of spin at all."""
        if self.supports_multiplicity:
            super().check_electrons(numbers, charge, multiplicity)
        for name, value in (("charge", charge), ("multiplicity", multiplicity)):
            if int(value) != value:
                raise ValueError(f"{name}: expected a whole number, got {value!r}")

    def check(self, structure: Structure) -> None:
        """Refuse a structure that this model cannot describe (`ValueError` naming the argument)."""
        allowed = self.multiplicities
        if self.supports_multiplicity and allowed == (1,) and structure.multiplicity != 1:
            raise ValueError(
                "multiplicity: this model was trained on singlets only, and its spin embedding still holds the random "
                f"numbers that training started from; expected 1, got {structure.multiplicity}"
            )
        super().check(structure)
        if structure.cell is not None and self.long_range_method == "ewald":
            # known here already, and at the first step nobody looks at a screen any more
            lengths = collate([structure]).box_lengths
            refuse_large_ewald(len(structure), lengths, self.config.electrostatic_sigma, self.dtype)

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> Evaluator:
        """On the CPU, True and 'auto' run native code (see `fast.NativeEvaluator`)."""
        from openmm_so3krates.fast import NativeEvaluator

        if not isinstance(batch, Batch):
            # without pair lists, which are large here: the evaluator makes its own
            batch = collate(batch).to(device=self.device, dtype=self.dtype)
        return NativeEvaluator(self, batch, outputs, compile)

    # -- what atoms, charge and spin decide ------------------------------------------------------------------

    def fixed(self, batch: Batch) -> Fixed:
        z, c = batch.numbers, self.config
        embeddings = [self.element_embedding[z]]
        if self.charge_embedding is not None:
            embeddings.append(self.charge_embedding(batch.charge, batch))
        if self.spin_embedding is not None:
            embeddings.append(self.spin_embedding(batch.multiplicity - 1, batch))
        return Fixed(
            x=torch.stack(embeddings).sum(0) / math.sqrt(len(embeddings)),
            energy_scale=self.energy_scale[z].double(),
            energy_offset=self.energy_offset[z].double(),
            charge_bias=self.charge_bias[z] if c.predict_charges else None,
            hirshfeld_shift=self.hirshfeld_shift[z] if c.predict_hirshfeld else None,
            hirshfeld_query=self.hirshfeld_query[z] if c.predict_hirshfeld else None,
            free=None if self.dispersion is None else self.dispersion.free_atoms(z, self.dtype),
        )

    def shift_atomic_energies(self, shifts: Mapping[int, float]) -> None:
        """Add a constant (eV) to the energy of every atom of an element, in place."""
        with torch.no_grad():
            for number, shift in shifts.items():
                self.energy_offset[number] += shift

    # -- what positions decide -------------------------------------------------------------------------------

    def predict(self, batch: Batch, fixed: Fixed) -> Prediction:
        geometry = self.geometry(batch)
        x, _ = self.features(fixed, geometry)
        terms = {"network": batch.sum_by_structure(self.atomic_energies(x, fixed))}
        if self.repulsion is not None:
            g = geometry
            terms["repulsion"] = batch.sum_by_structure(self.repulsion(batch.numbers, g.r, g.cutoff, g.index))
        charges = self.atomic_charges(x, batch, fixed)
        terms.update(self.long_range_terms(batch, fixed, charges, self.hirshfeld_ratios(x, fixed)))
        dipole = None if charges is None else batch.sum_by_structure(charges[:, None] * batch.positions)
        return Prediction(torch.stack(list(terms.values())).sum(0), charges, dipole, terms=terms)

    def geometry(self, batch: Batch) -> Geometry:
        """Distances, radial functions and spherical harmonics of every atom's neighbourhood."""
        c = self.config
        # empty slots are put beyond the cutoff, where the cutoff function is zero and has no gradient
        beyond = batch.positions.new_tensor([2.0 * self.cutoff, 0.0, 0.0])
        vectors = torch.where(batch.neighbors.mask[..., None], batch.neighbor_vectors(), beyond)  # (N, S, 3)
        # distances in float64: their rounding would be amplified by the powers of exp(-gamma r), and they cost little
        r = vectors.double().square().sum(-1).sqrt()
        cutoff = cutoff_function(c.cutoff_function, r, self.cutoff)
        harmonics = spherical_harmonics(vectors / r[..., None].to(vectors.dtype), c.degrees)
        return Geometry(
            index=batch.neighbors.index,
            r=r,
            cutoff=cutoff,
            phi=(cutoff / self.message_divisor).to(vectors.dtype),
            basis=self.radial_basis(r, vectors.dtype),
            harmonics=harmonics,
        )

    @property
    def message_divisor(self) -> float:
        c = self.config
        if c.message_normalization == "avg_num_neighbors":
            return c.avg_num_neighbors
        return math.sqrt(c.num_features // c.num_heads) if c.message_normalization == "sqrt_num_features" else 1.0

    def features(self, fixed: Fixed, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Final features ``(N, F)`` and Euclidean variables ``(N, M)``."""
        x, ev = fixed.x, self.initial_euclidean(geometry)
        for layer in cast(list[Layer], list(self.layers)):
            x, ev = layer(x, ev, geometry)
        assert ev is not None
        return x, ev

    def initial_euclidean(self, g: Geometry) -> Tensor | None:
        """None stands for zeros; otherwise sum_j phi(r_ij) Y(u_ij) / avg_num_neighbors, ``(N, M)``."""
        if self.config.initial_euclidean == "zeros":
            return None
        weight = (g.cutoff / self.config.avg_num_neighbors).to(g.harmonics.dtype)
        return (weight[..., None] * g.harmonics).sum(1)

    # -- heads -----------------------------------------------------------------------------------------------

    def atomic_energies(self, x: Tensor, fixed: Fixed) -> Tensor:
        """Contributions e_i of the network, ``(N,)`` eV, float64."""
        hidden = silu(self.energy_hidden(x)).double()
        # energies are summed in float64: a float32 sum of hundreds of eV loses more than the network does
        e = linear(hidden, self.energy_out.weight.double(), self.energy_out.bias.double())
        return e[:, 0] * fixed.energy_scale + fixed.energy_offset

    def atomic_charges(self, x: Tensor, batch: Batch, fixed: Fixed) -> Tensor | None:
        """Charges that sum to the total charge, ``(N,)`` e."""
        if fixed.charge_bias is None:
            return None
        q = self.charge_head(x)[:, 0] + fixed.charge_bias
        surplus = (batch.charge - batch.sum_by_structure(q)) / batch.counts
        return q + batch.per_atom(surplus)

    def hirshfeld_ratios(self, x: Tensor, fixed: Fixed) -> Tensor | None:
        """Volume of the atom in its molecule over that of the free atom, ``(N,)``."""
        if fixed.hirshfeld_query is None or fixed.hirshfeld_shift is None:
            return None
        keys = self.hirshfeld_head(x)
        products = (fixed.hirshfeld_query * keys).sum(-1) / math.sqrt(keys.shape[-1])
        return (fixed.hirshfeld_shift + products).abs()

    def long_range_terms(
        self, batch: Batch, fixed: Fixed, charges: Tensor | None, ratios: Tensor | None
    ) -> dict[str, Tensor]:
        """Electrostatics and dispersion, ``(n_structures,)`` eV each."""
        terms: dict[str, Tensor] = {}
        in_k_space = self.long_range_method != "shifted"
        if in_k_space and batch.cell is None:
            raise ValueError(
                f"longRangeMethod: {self.long_range_method!r} sums over periodic images; expected 'shifted' for an "
                "open system"
            )
        if self.electrostatics is not None and in_k_space:
            terms["electrostatics"] = self.lattice_energy(batch, charges)
        pairs = batch.long_range_pairs
        if pairs is None or (self.dispersion is None and in_k_space):
            return terms
        first, second, limit = pairs.first, pairs.second, self.long_range_cutoff
        r = batch.pair_vectors(pairs).norm(dim=-1)
        if self.electrostatics is not None and not in_k_space:
            assert charges is not None
            energy = self.electrostatics(charges[first], charges[second], r, limit)
            terms["electrostatics"] = _sum_pairs(batch, first, energy)
        if self.dispersion is not None:
            energy = self.dispersion(fixed.free, ratios, first, second, r, limit)
            terms["dispersion"] = _sum_pairs(batch, first, energy)
        return terms

    def lattice_energy(self, batch: Batch, charges: Tensor | None) -> Tensor:
        """Electrostatic energy of the charges and all their periodic images, ``(n_structures,)`` eV."""
        assert charges is not None
        sigma = self.config.electrostatic_sigma
        return smeared_lattice_energy(charges, batch, sigma, self.long_range_method, COULOMB).double()


def _sum_pairs(batch: Batch, first: Tensor, energy: Tensor) -> Tensor:
    energy = energy.double()
    if batch.n_structures == 1:
        return energy.sum(0, keepdim=True)
    return energy.new_zeros(batch.n_structures).index_add(0, batch.segment[first], energy)
