"""SpookyNet (Unke, Chmiela, Gastegger, Schuett, Sauceda, Mueller, Nat. Commun. 12, 7273 (2021)), top to bottom.

Symbols of the paper: F features, K radial functions, T modules; Z nuclear charges, Q total charge, S unpaired
electrons. Shapes: `slots` is the largest number of neighbours of an atom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.native_evaluator import NativeEvaluator
from openmm_mlff.potentials.potential import Members, Potential, Prediction
from openmm_spookynet.config import SpookyNetConfig
from openmm_spookynet.dispersion import D4Dispersion
from openmm_spookynet.electron_configuration import Z_MAX, electron_configuration_table
from openmm_spookynet.layers import (
    Activation,
    ElectronicEmbedding,
    Linear,
    LinearAttention,
    NonlinearElectronicEmbedding,
    ResidualMLP,
    ResidualStack,
    softmax_by_structure,
)
from openmm_spookynet.pair_sums import PairSumsFunction, fused_pair_sums
from openmm_spookynet.pair_training import kernels_run_on, native_pair_sums
from openmm_spookynet.terms import (
    AngularFunctions,
    Electrostatics,
    ExponentialBernstein,
    NuclearRepulsion,
    cutoff_function,
)


@dataclass
class Geometry:
    """Neighbourhoods of all atoms: distances, cutoff values, radial, p and d functions."""

    index: Tensor  # (n_atoms, slots)
    r: Tensor  # (n_atoms, slots)
    f: Tensor  # (n_atoms, slots), zero for padding
    rbf: Tensor  # (n_atoms, slots, K)
    p: Tensor  # (n_atoms, 3, slots)
    d: Tensor  # (n_atoms, 5, slots)


@dataclass
class Messages:
    """What a module derives from the atoms' features alone."""

    x: Tensor  # (n_atoms, F) after the first residual stack
    center: Tensor  # (n_atoms, F) the atom's own contribution
    spd: Tensor  # (n_atoms, 3F) what neighbours receive through s, p and d functions
    nonlocal_: Tensor | None  # (n_atoms, F) attention over all atoms of the structure


class Heads(nn.Module):
    """The networks of a module that read the same features: x, s, p, d (local) and, with attention, q, k, v."""

    def __init__(self, c: SpookyNetConfig) -> None:
        super().__init__()
        depth = [c.num_residual_local_x, c.num_residual_local_s, c.num_residual_local_p, c.num_residual_local_d]
        if c.attention == "all":
            depth += [c.num_residual_nonlocal_q, c.num_residual_nonlocal_k, c.num_residual_nonlocal_v]
        self.n = len(depth)
        # one batched product for all networks of the same depth
        self.members = [[h for h in range(self.n) if depth[h] == n] for n in sorted(set(depth))]
        self.groups = nn.ModuleList(
            ResidualMLP(c.activation, depth[heads[0]], c.num_features, n=len(heads)) for heads in self.members
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        out: dict[int, Tensor] = {}
        for heads, network in zip(self.members, self.groups, strict=True):
            out.update(zip(heads, network(x).unbind(0), strict=True))
        return [out[h] for h in range(self.n)]


class InteractionModule(nn.Module):
    """One refinement of the atomic features by local and nonlocal interactions (Fig. 2; eqs. 2-9)."""

    def __init__(self, c: SpookyNetConfig) -> None:
        super().__init__()
        features = c.num_features
        self.residual_pre = ResidualStack(c.activation, c.num_residual_pre, features)
        self.heads = Heads(c)
        self.attention = LinearAttention(features, c.num_random_features) if c.attention == "all" else None
        self.radial = Linear(None, c.num_basis_functions, 3 * features, bias=False)  # K -> G_s, G_p, G_d
        self.projection_p = nn.Linear(features, 2 * features, bias=False)
        self.projection_d = nn.Linear(features, 2 * features, bias=False)
        self.local = ResidualMLP(c.activation, c.num_residual_local, features)
        self.residual_post = ResidualStack(c.activation, c.num_residual_post, features)
        self.output = ResidualMLP(c.activation, c.num_residual_output, features)

    def messages(self, x: Tensor, batch: Batch) -> Messages:
        """The part that positions do not enter directly."""
        x = self.residual_pre(x)
        center, s, p, d, *qkv = self.heads(x)
        nonlocal_ = None if self.attention is None else self.attention(*qkv, batch)
        return Messages(x, center, torch.cat([s, p, d], -1), nonlocal_)

    def interact(self, m: Messages, g: Geometry, sums: PairSumsFunction | None = None) -> tuple[Tensor, Tensor]:
        """New features and this module's contribution to the descriptor, ``(n_atoms, F)`` each."""
        local = self.local(self.local_features(m, g, sums))
        x = m.x + local if m.nonlocal_ is None else m.x + local + m.nonlocal_
        x = self.residual_post(x)
        return x, self.output(x)

    def local_features(self, m: Messages, g: Geometry, sums: PairSumsFunction | None = None) -> Tensor:
        """s + <P, P> + <D, D>: rotationally invariant products of s-, p- and d-type sums over neighbours (eqs. 3-5)."""
        if sums is not None:
            s, p, d = sums(g.rbf, g.f, g.p, g.d, m.spd, self.radial.weight, g.index)
        else:
            received = self.radial(g.rbf) * m.spd[g.index]  # (n_atoms, slots, 3F)
            s, p, d = received.chunk(3, -1)
            s, p, d = s.sum(1), torch.bmm(g.p, p), torch.bmm(g.d, d)  # (n_atoms, F), (n_atoms, 3, F), (n_atoms, 5, F)
        total = m.center + s
        for moments, projection in ((p, self.projection_p), (d, self.projection_d)):
            left, right = projection(moments).chunk(2, -1)
            total = total + (left * right).sum(1)
        return total


class SpookyNet(Potential):
    """Potential with atomic charges, total charge and spin.

    E = sum_i e_i + E_repulsion + E_electrostatics (+ E_D4); charges are shifted to sum to Q; dipole = sum q_i R_i.
    As published, the energy of a molecule depends on what else there is, however far away. With ``attention='none'``
    and ``charge_conservation='local'`` neutral singlets far apart have the sum of their energies, and their Coulomb
    interaction; ``embed_after=1`` lets the network learn which of them a total charge and unpaired electrons belong to.
    Ions far apart whose charges add up to zero need ``charge_conservation='shared'``.
    """

    family = "spookynet"
    predicts_charges = True
    supports_charge = True
    supports_multiplicity = True

    _native = False
    electron_config: Tensor
    repulsion: NuclearRepulsion | None
    electrostatics: Electrostatics | None
    dispersion: D4Dispersion | None

    def __init__(self, config: SpookyNetConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or SpookyNetConfig()
        self.elements = c.elements
        self.charges, self.multiplicities = c.charges, c.multiplicities
        self.cutoff = c.cutoff
        self.long_range = c.use_electrostatics or c.use_d4_dispersion
        self.long_range_cutoff = c.long_range_cutoff
        features = c.num_features

        self.element_embedding = nn.Parameter(torch.zeros(Z_MAX + 1, features))
        self.register_buffer("electron_config", electron_configuration_table())
        self.config_linear = nn.Linear(self.electron_config.shape[1], features, bias=False)
        if c.use_nonlinear_embedding:
            self.charge_embedding: nn.Module = NonlinearElectronicEmbedding(
                c.activation, c.num_residual_electron, features
            )
            self.spin_embedding: nn.Module = NonlinearElectronicEmbedding(
                c.activation, c.num_residual_electron, features
            )
        else:
            self.charge_embedding, self.spin_embedding = (
                ElectronicEmbedding(c.activation, c.num_residual_electron, features, signed, sharp=c.embed_after > 0)
                for signed in (True, False)
            )

        self.radial_basis = ExponentialBernstein(c.num_basis_functions, c.exp_weighting)
        self.angular = AngularFunctions(c.use_irreps)
        self.interactions = nn.ModuleList(InteractionModule(c) for _ in range(c.num_modules))
        # e_i, q_i (with local conservation, how much charge neighbours draw from i), and the logarithm of i's share
        self.output = nn.Linear(features, 2 if c.charge_conservation == "uniform" else 3, bias=False)
        nn.init.zeros_(self.output.weight)
        self.element_bias = nn.Parameter(torch.zeros(Z_MAX + 1, self.output.out_features))

        self.repulsion = NuclearRepulsion() if c.use_zbl_repulsion else None
        self.electrostatics = Electrostatics(c.cutoff) if c.use_electrostatics else None
        self.dispersion = D4Dispersion() if c.use_d4_dispersion else None
        self.to(torch.get_default_dtype())

    @property
    def native_training(self) -> bool:
        """See `Potential`; the kernels are those of the sums over neighbours and of the activations."""
        return self._native

    @native_training.setter
    def native_training(self, wanted: bool) -> None:
        self._native = wanted
        for module in self.modules():
            if isinstance(module, Activation):
                module.native = wanted

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> Evaluator:
        """On the CPU, True and 'auto' run the native code of `together`."""
        return NativeEvaluator(self, self._as_batch(batch), outputs, compile)

    @classmethod
    def together(cls, members: Sequence[SpookyNet], batch: Batch) -> Members | None:
        """Members of an ensemble in one call of native code, where it can run them (see `members.Members`)."""
        from openmm_spookynet import members as native_members

        return native_members.together(members, batch)

    # -- what atoms, charge and spin decide ------------------------------------------------------------------

    def fixed(self, batch: Batch) -> dict[str, Any]:
        """Embedding and the first module's messages (attention included), which positions do not enter."""
        z = self.element_embedding[batch.numbers] + self.config_linear(self.electron_config)[batch.numbers]
        x = z if self.config.embed_after > 0 else self.electronic(z, batch)
        return {
            "messages": cast(InteractionModule, self.interactions[0]).messages(x, batch),
            "bias": self.element_bias[batch.numbers],
            "d4": None if self.dispersion is None else self.dispersion.fixed(batch.numbers),
        }

    def electronic(self, x: Tensor, batch: Batch) -> Tensor:
        """Features with the embedding of total charge and spin, ``(n_atoms, F)``; neither sees the other's."""
        return x + self.charge_embedding(x, batch.charge, batch) + self.spin_embedding(x, batch.multiplicity - 1, batch)

    def shift_atomic_energies(self, shifts: Mapping[int, float]) -> None:
        """Add a constant (eV) to the energy of every atom of an element, in place."""
        with torch.no_grad():
            for number, shift in shifts.items():
                self.element_bias[number, 0] += shift

    # -- what positions decide -------------------------------------------------------------------------------

    def predict(self, batch: Batch, fixed: dict[str, Any]) -> Prediction:
        geometry = self.geometry(batch)
        f = self.descriptor(batch, fixed["messages"], geometry)
        # energies are summed in float64: a float32 sum of hundreds of eV loses more than the network does
        e, *q = (linear(f.double(), self.output.weight.double()) + fixed["bias"]).unbind(-1)
        charges, surplus = self.atomic_charges([x.to(f.dtype) for x in q], batch, geometry)
        terms = {"network": batch.sum_by_structure(e)}
        if self.repulsion is not None:
            z = batch.numbers.double()
            terms["repulsion"] = batch.sum_by_structure(self.repulsion(z, geometry.r, geometry.f, geometry.index))
        terms.update(self.long_range_terms(batch, fixed, charges))
        dipole = batch.sum_by_structure(charges[:, None] * batch.positions)
        return Prediction(torch.stack(list(terms.values())).sum(0), charges, dipole, surplus=surplus, terms=terms)

    def atomic_charges(self, outputs: list[Tensor], batch: Batch, g: Geometry) -> tuple[Tensor, Tensor | None]:
        """Charges that add up to the total of each structure, ``(n_atoms,)`` e, and what had to be added for that,
        ``(n_structures,)`` e, from the network's outputs."""
        if self.config.charge_conservation == "local":
            # q_i = sum_j f(r_ij) (c_j - c_i) + Q softmax(s)_i: what i gains its neighbours lose
            c, s = outputs
            exchanged = (g.f.to(c.dtype) * (c[g.index] - c[:, None])).sum(1)
            return exchanged + batch.per_atom(batch.charge) * softmax_by_structure(s, batch), None
        q = outputs[0]
        surplus = batch.charge - batch.sum_by_structure(q)
        if self.config.charge_conservation == "shared":
            return q + batch.per_atom(surplus) * softmax_by_structure(outputs[1], batch), surplus
        return q + batch.per_atom(surplus / batch.counts), surplus

    def geometry(self, batch: Batch) -> Geometry:
        """Distances, radial and angular functions of every atom's neighbourhood."""
        mask = batch.neighbors.mask
        # padding is put beyond the cutoff, where every function is zero and has no gradient
        beyond = batch.positions.new_tensor([2.0 * self.cutoff, 0.0, 0.0])
        vectors = torch.where(mask[..., None], batch.neighbor_vectors(), beyond)  # (n_atoms, slots, 3)
        # distances in float64: their rounding would be amplified by the powers of exp(-alpha r), and they cost little
        r_squared = vectors.double().square().sum(-1)
        r = r_squared.sqrt()
        f = cutoff_function(r_squared, self.cutoff)
        p, d = self.angular(vectors / r[..., None].to(vectors.dtype))
        return Geometry(batch.neighbors.index, r, f, self.radial_basis(r, f), p, d)

    def descriptor(self, batch: Batch, messages: Messages, geometry: Geometry) -> Tensor:
        """Sum of the modules' contributions, ``(n_atoms, F)``; `messages` are the first module's."""
        sums = self._pair_sums(geometry)
        keep = None
        first, *others = cast(list[InteractionModule], list(self.interactions))
        x, total = first.interact(messages, geometry, sums)
        for t, module in enumerate(others, start=1):
            if t == self.config.embed_after:
                x = self.electronic(x, batch)
            x, y = module.interact(module.messages(x, batch), geometry, sums)
            if self.training and self.config.module_keep_prob < 1:
                keep = self._drop(keep, y, batch)
                y = y * keep
            total = total + y
        return total

    def _pair_sums(self, geometry: Geometry) -> PairSumsFunction | None:
        """What sums over neighbours instead of torch's operations, or None."""
        if self.first_derivatives_only:
            return fused_pair_sums
        if self.native_training and kernels_run_on(geometry.rbf):
            return native_pair_sums
        return None

    def _drop(self, keep: Tensor | None, y: Tensor, batch: Batch) -> Tensor:
        """Structures whose later modules still count: the last one is kept with probability `module_keep_prob`."""
        probability = self.config.module_keep_prob ** (1.0 / max(self.config.num_modules - 1, 1))
        draw = torch.bernoulli(y.new_full((batch.n_structures, 1), probability))[batch.segment]
        return draw if keep is None else keep * draw

    def long_range_terms(self, batch: Batch, fixed: dict[str, Any], charges: Tensor) -> dict[str, Tensor]:
        """Electrostatics and dispersion over the half list."""
        pairs = batch.long_range_pairs
        if pairs is None:
            return {}
        r = batch.pair_vectors(pairs).norm(dim=-1)
        limit = self.long_range_cutoff
        energies = {}
        if self.electrostatics is not None:
            energies["electrostatics"] = self.electrostatics(charges[pairs.first], charges[pairs.second], r, limit)
        if self.dispersion is not None:
            energies["dispersion"] = self.dispersion(fixed["d4"], batch, charges, r, limit)
        return {name: _sum_pairs(batch, pairs.first, e.double()) for name, e in energies.items()}


def _sum_pairs(batch: Batch, first: Tensor, energy: Tensor) -> Tensor:
    if batch.n_structures == 1:
        return energy.sum(0, keepdim=True)
    return energy.new_zeros(batch.n_structures).index_add(0, batch.segment[first], energy)
