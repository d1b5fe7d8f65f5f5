"""GDML as a potential: an expansion in kernel derivatives around the training geometries.

Chmiela, Tkatchenko, Sauceda, Poltavsky, Schuett, Mueller, Sci. Adv. 3, e1603015 (2017); with permutations (sGDML):
Chmiela, Sauceda, Mueller, Tkatchenko, Nat. Commun. 9, 3887 (2018). With the descriptor x(r), the training points x_j,
coefficients A_j and the permutations p of equal atoms,

    E(r) = c + sum_{j,p} (5/(3 sigma^2)) (1 + d) e^-d (u . A_j),   u = x(p r) - x_j,   d = sqrt(5) |u| / sigma

The atoms of the query are permuted, not those of the training points. float64 throughout: the coefficients reach 1e8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from openmm_gdml import descriptor_library as _library  # noqa: F401  (registers its descriptors)
from openmm_gdml import expansion, hessians, images, kernel, lattices
from openmm_gdml.atom_order import (
    Bonds,
    as_bonds,
    bonds_from_positions,
    bonds_of_training,
    check_order,
    check_permutations,
)
from openmm_gdml.config import GDMLConfig
from openmm_gdml.descriptors import (
    INVERSE_DISTANCES,
    descriptor,
    descriptor_size,
    gradients_of,
    pair_permutations,
    takes,
)
from openmm_gdml.differentiation import batched
from openmm_gdml.evaluator import GDMLEvaluator
from openmm_gdml.native import FusedKernel
from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials.potential import Evaluation, Potential, Prediction

#: numbers that one temporary array of a batch may hold (32 MB)
TEMPORARY = 1 << 22


class GDMLPotential(Potential):
    """Potential of one molecule (or one supercell) in a fixed order of atoms.

    Attributes:
        descriptors: x_j, ``(M, D)``. coefficients: A_j, ``(M, D)``, eV times the unit of x.
        energy_coefficients: ``(M,)`` eV, only with energy constraints.
        product_points, product_directions, product_coefficients: x_l, a_l, b_l of Hessian-vector products, ``(L, D)``
            each (see `kernel.second_order_energy`), only with such training data.
        shift: constant of the energy, ``()`` eV.
        permutations: of equal atoms, ``(S, N)`` int64; p takes positions r to ``r[p]``.
        lattice: training lattice, rows, ``(3, 3)`` angstrom, only if periodic.
        alphas: ``(M, N, 3)`` with A_j = J_j alpha_j, only if kept.
        pair_gradients: of the descriptor, in closed form; None for one that is known as a function only.
    """

    family = "gdml"

    descriptors: Tensor
    coefficients: Tensor
    shift: Tensor
    permutations: Tensor

    def __init__(self, config: GDMLConfig) -> None:
        super().__init__()
        c = self.config = config
        self.elements = tuple(sorted(set(c.numbers)))
        self.supports_periodic = self.fixed_lattice = c.periodic
        self.supports_charge, self.charges = c.charge != 0, None if c.charge is None else (c.charge,)
        self.supports_multiplicity = c.multiplicity != 1
        self.multiplicities = None if c.multiplicity is None else (c.multiplicity,)
        self.beads, self.bead_numbers = c.beads, c.numbers if c.beads else ()
        n, m = len(c.numbers), c.n_train
        size = descriptor_size(c.descriptor, n, c.descriptor_options)
        self._descriptor = descriptor(c.descriptor, c.descriptor_options)
        self.pair_gradients = gradients_of(c.descriptor, c.descriptor_options)
        if self.pair_gradients is None:
            somewhere = np.random.default_rng(0).normal(scale=2.0, size=(2, n, 3))
            self._descriptor = batched(self._descriptor, torch.from_numpy(somewhere))
        if c.periodic and not takes(descriptor(c.descriptor), "lattice"):
            raise ValueError(
                f"descriptor: expected one with an option `lattice` for a periodic model, got {c.descriptor}"
            )
        shapes = {"descriptors": (m, size), "coefficients": (m, size), "shift": ()}
        shapes |= {"energy_coefficients": (m,)} if c.energy_constraints else {}
        shapes |= {name: (c.n_products, size) for name in hessians.TERMS if c.n_products}
        shapes |= {"lattice": (3, 3)} if c.periodic else {}
        shapes |= {"alphas": (m, n, 3)} if c.keeps_alphas else {}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("permutations", torch.arange(n).repeat(c.n_permutations, 1))
        self._prepared: expansion.Prepared | None = None
        self._bonds: tuple[Bonds, Bonds] | None = None
        self._wrappings: dict[bytes, list[np.ndarray]] = {}
        self.register_load_state_dict_post_hook(GDMLPotential._forget)

    @classmethod
    def from_coefficients(
        cls,
        numbers: Sequence[int] | np.ndarray,
        sigma: float,
        descriptors: Any,
        coefficients: Any,
        shift: float,
        permutations: Any = None,
        energy_coefficients: Any = None,
        lattice: Any = None,
        alphas: Any = None,
        products: Any = None,
        **options: Any,
    ) -> GDMLPotential:
        """A model of given training points and coefficients (arrays or tensors, shapes and units as the attributes).

        Args:
            products: product_points, product_directions and product_coefficients, ``(L, D)`` each, or None.
            options: the other fields of `GDMLConfig` (lam, descriptor, descriptor_options, beads, charge, ...).

        Raises `ValueError` naming the argument whose shape or values are impossible.
        """
        n = len(numbers)
        optional = {"energy_coefficients": energy_coefficients, "lattice": lattice, "alphas": alphas}
        optional |= dict(zip(hessians.TERMS, products or (None, None, None), strict=True))
        given = {"descriptors": descriptors, "coefficients": coefficients, "shift": shift}
        given |= {name: value for name, value in optional.items() if value is not None}
        tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in given.items()}
        perms = torch.arange(n)[None] if permutations is None else torch.as_tensor(np.asarray(permutations))
        tensors["permutations"] = perms.to(torch.int64)
        check_permutations(tensors["permutations"].numpy(), np.asarray(numbers))
        if tensors["descriptors"].dim() != 2:
            raise ValueError(f"descriptors: expected shape (M, D), got {tuple(tensors['descriptors'].shape)}")
        config = GDMLConfig(
            numbers=tuple(int(z) for z in numbers),
            n_train=len(tensors["descriptors"]),
            sigma=sigma,
            n_permutations=len(perms),
            periodic=lattice is not None,
            energy_constraints=energy_coefficients is not None,
            keeps_alphas=alphas is not None,
            n_products=0 if products is None else len(tensors[hessians.TERMS[0]]),
            **options,
        )
        model = cls(config)
        for name, buffer in model.state_dict().items():
            if tensors[name].shape != buffer.shape:
                raise ValueError(f"{name}: expected shape {tuple(buffer.shape)}, got {tuple(tensors[name].shape)}")
            if not bool(torch.isfinite(tensors[name]).all()):
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        model.load_state_dict(tensors, strict=True)
        return model.eval().requires_grad_(False)

    # -- what the coefficients decide --------------------------------------------------------------------------

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GDMLPotential:
        if fn(torch.zeros(1, dtype=torch.float64)).dtype != torch.float64:
            raise ValueError(
                "precision: GDML models run in double precision only (their coefficients reach 1e8 and cancel); "
                "expected 'double' or None, got a lower precision"
            )
        self._prepared = None
        return super()._apply(fn, recurse)

    @staticmethod
    def _forget(module: Any, incompatible: Any) -> None:
        module._prepared = module._bonds = None
        module._wrappings = {}

    @property
    def closed_form(self) -> bool:
        """Whether the descriptor is one of pairs, as inverse distances are, for which everything is written out."""
        return self.pair_gradients is not None

    @property
    def prepared(self) -> expansion.Prepared:
        """Centred training points and what follows from them; made on first use."""
        if self._prepared is None:
            self._prepared = expansion.prepare(self)
        return self._prepared

    # -- structures ----------------------------------------------------------------------------------------------

    def check_electrons(self, numbers: Sequence[int] | np.ndarray, charge: int, multiplicity: int) -> None:
        """Accept any whole numbers: electrons do not enter, and published models do not say how many there were."""
        for name, value, lowest in (("charge", charge, None), ("multiplicity", multiplicity, 1)):
            if int(value) != value or (lowest is not None and value < lowest):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")

    def check(self, structure: Structure) -> None:
        """Refuse a structure with other atoms, another order of atoms or another lattice (`ValueError`).

        ``structure.info`` may hold ``topology_bonds``, pairs of atoms, which tell atoms of one element apart, and
        ``topology_indices``, what the user calls the atoms; messages then offer the right order.
        """
        if structure.cell is not None and not self.config.periodic:
            raise ValueError(
                "cell: this model describes an open molecule, expected no box, got periodic box vectors; for an "
                "isolated molecule remove the box with topology.setPeriodicBoxVectors(None), for one among others use "
                "createMixedSystem"
            )
        super().check(structure)
        self._check_order(structure)
        if structure.cell is None and self.config.periodic:
            raise ValueError(
                "cell: this model was trained in a periodic lattice ("
                f"{lattices.describe(self.lattice_rows)}), expected a structure with box vectors, got an open one "
                "(an ML region given by atoms=... is open)"
            )
        if structure.cell is not None:
            self.wrappings(structure.cell)

    def _check_order(self, structure: Structure) -> None:
        expected, numbers = np.array(self.config.numbers), structure.numbers
        same = np.array_equal(expected, numbers)
        bonds = as_bonds(structure.info.get("topology_bonds", ()))
        # a bond that some training geometry has is right, even if most have not (a proton that moves)
        if same and bonds <= self.bonds[1]:
            return
        if not bonds and structure.cell is None:
            bonds = bonds_from_positions(numbers, structure.positions)
        check_order(expected, self.bonds[0], numbers, bonds, structure.info.get("topology_indices"))

    @property
    def bonds(self) -> tuple[Bonds, Bonds]:
        """Bonds of the mean training geometry, and those that any of them has; none for crystals and beads."""
        if self._bonds is None:
            c = self.config
            atoms = c.descriptor == INVERSE_DISTANCES and not c.periodic and c.beads is None
            x = self.descriptors if atoms else self.descriptors[:0]
            self._bonds = bonds_of_training(np.array(c.numbers), x, self.prepared.permutations)
        return self._bonds

    def examples(self) -> list[Structure]:
        """Atoms of the model at random places in its lattice, three structures."""
        n, cell = len(self.config.numbers), self.lattice_rows if self.config.periodic else None
        places = np.random.default_rng(0).normal(0.0, n ** (1 / 3), (3, n, 3))
        return [self.structure(r, cell) for r in places]

    def structure(self, positions: np.ndarray, cell: np.ndarray | None = None) -> Structure:
        """The model's atoms at positions ``(N, 3)`` angstrom, with the charge and multiplicity that it was made for."""
        c = self.config
        return Structure(np.array(c.numbers), positions, c.charge or 0, c.multiplicity or 1, cell)

    @property
    def lattice_rows(self) -> np.ndarray:
        """The training lattice as numpy rows; `ValueError` for an open model."""
        if not self.config.periodic:
            raise ValueError("lattice: this model describes an open molecule")
        return self.get_buffer("lattice").cpu().numpy()

    def wrappings(self, cell: np.ndarray) -> list[np.ndarray]:
        """The training lattice by the vectors of a box, see `lattices.wrappings`; `ValueError` for another lattice."""
        key = np.ascontiguousarray(cell, dtype=np.float64).tobytes()
        if key not in self._wrappings:
            if len(self._wrappings) > 16:
                self._wrappings.clear()
            self._wrappings[key] = lattices.fitted(self.lattice_rows, np.asarray(cell, dtype=np.float64))
        return self._wrappings[key]

    def lattice_for(self, positions: np.ndarray | Tensor, cell: np.ndarray | Tensor) -> np.ndarray:
        """The wrapping lattice ``(3, 3)`` of one structure, in the frame and by the vectors of its own box.

        A symmetric lattice can be laid onto its box in several ways, between which only the atoms decide: the one whose
        descriptors are nearest to a training point is taken, and the training data's own orientation if it is as good.
        """
        found = self.wrappings(cell if isinstance(cell, np.ndarray) else cell.detach().cpu().double().numpy())
        if len(found) == 1:
            return found[0]
        r = torch.as_tensor(positions, dtype=torch.float64, device=self.device).detach()[None]
        distances = []
        for rows in found:
            x = expansion.permuted(self, r, torch.from_numpy(rows).to(r.device))
            squares, _ = expansion.products(self, x)
            distances.append(float(squares.min()))
        best = int(np.argmin(distances))
        return found[0] if distances[0] <= 1.0001 * distances[best] + 1e-12 else found[best]

    def batch(
        self,
        structures: Sequence[Structure] | Structure,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Batch:
        """Structures as one batch, without pair lists, which GDML does not use."""
        structures = [structures] if isinstance(structures, Structure) else structures
        for structure in structures:
            self.check(structure)
        batch = collate(structures).to(device=device or self.device, dtype=dtype or self.dtype)
        _ = batch.counts, batch.dense_slot
        return batch

    def _geometry(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Positions ``(B, N, 3)`` and the lattice of each structure ``(B, 3, 3)``."""
        n = len(self.config.numbers)
        if batch.n_atoms != n * batch.n_structures:
            raise ValueError(
                f"batch: expected {n} atoms in each of {batch.n_structures} structures, got {batch.n_atoms} atoms"
            )
        positions = batch.positions.to(torch.float64).reshape(-1, n, 3)
        if not self.config.periodic:
            return positions, None
        if batch.cell is None:
            raise ValueError("cell: expected box vectors, because the model is periodic, got None")
        rows = [self.lattice_for(r, c) for r, c in zip(positions, batch.cell, strict=True)]
        return positions, torch.from_numpy(np.stack(rows)).to(positions.device)

    def _chunks(self, n: int) -> Iterator[slice]:
        size = max(1, TEMPORARY // (self.config.n_permutations * max(self.descriptors.shape)))
        return (slice(start, min(start + size, n)) for start in range(0, n, size))

    # -- energies, differentiable --------------------------------------------------------------------------------

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        positions, lattice = self._geometry(batch)
        energies = [
            self.energy_of(positions[part], None if lattice is None else lattice[part])
            for part in self._chunks(len(positions))
        ]
        return Prediction(torch.cat(energies))

    def energy_of(self, positions: Tensor, lattice: Tensor | None = None) -> Tensor:
        """Energies ``(B,)`` eV of positions ``(B, N, 3)`` angstrom, twice differentiable.

        Args:
            lattice: the wrapping lattice, ``(3, 3)`` or one for each, ``(B, 3, 3)``.
        """
        x = expansion.permuted(self, positions, lattice)
        q, v = expansion.products(self, x)
        terms = kernel.energy(q, v, self.config.sigma, self.energy_weights)  # (B, S)
        if self.config.n_products:
            terms = terms + hessians.product_energies(self, x)
        return terms.sum(-1) + self.shift

    @property
    def energy_weights(self) -> Tensor | None:
        """The energy coefficients ``(M,)`` eV; None without energy constraints."""
        return self.get_buffer("energy_coefficients") if self.config.energy_constraints else None

    def describe(self, positions: Tensor, lattice: Tensor | None) -> Tensor:
        """Descriptors ``(..., D)`` of positions ``(..., N, 3)`` in their own order of atoms."""
        return self._descriptor(positions) if lattice is None else self._descriptor(positions, lattice=lattice)

    # -- energies and forces in closed form ----------------------------------------------------------------------

    def evaluate(self, batch: Batch, forces: bool = True, create_graph: bool = False) -> Evaluation:
        """Energies and forces of a batch; with `create_graph` by automatic differentiation, else in closed form."""
        if create_graph or not forces or batch.external_potential is not None:
            return super().evaluate(batch, forces, create_graph)
        positions, lattice = self._geometry(batch)
        energy, force = self.energies_and_forces(positions.detach(), lattice)
        return Evaluation(energy, forces=force.reshape(-1, 3))

    @property
    def fusible(self) -> bool:
        """Whether the fused kernel of `native` knows all that this model consists of."""
        return self.config.descriptor in (INVERSE_DISTANCES, images.IMAGE_SUMS) and not self.config.n_products

    def fused_kernel(self, lattice: np.ndarray | None) -> FusedKernel:
        """The fused kernel of this model on the CPU, for one wrapping lattice ``(3, 3)`` angstrom or none.

        Raises `RuntimeError` if it cannot be compiled.
        """
        pairs = pair_permutations(self.permutations.cpu()).numpy()
        state = {name: tensor.cpu().numpy() for name, tensor in self.state_dict().items()}
        return FusedKernel(
            len(self.config.numbers),
            self.config.sigma,
            float(state["shift"]),
            state["descriptors"],
            state["coefficients"],
            pairs,
            state.get("energy_coefficients"),
            lattice,
            images.fused_terms(lattice, **self.config.descriptor_options)
            if self.config.descriptor == images.IMAGE_SUMS
            else None,
        )

    def evaluator(
        self,
        batch: Batch | Structure | Sequence[Structure],
        outputs: Sequence[str] = ("energy", "forces"),
        compile: bool | str = "auto",
    ) -> GDMLEvaluator:
        """The function that MD calls, for one structure or for copies in one call.

        Args:
            compile: True and 'auto' run the fused kernel on the CPU (compiled within seconds, once per machine); False
                the torch form.
        """
        return cast(GDMLEvaluator, super().evaluator(batch, outputs, compile))

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> GDMLEvaluator:
        return GDMLEvaluator(self, self._as_batch(batch), outputs, compile)

    def energies_and_forces(self, positions: Tensor, lattice: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Energies ``(B,)`` eV and forces ``(B, N, 3)`` eV/angstrom of positions ``(B, N, 3)`` angstrom, no graph.

        Args:
            lattice: the wrapping lattice, ``(3, 3)`` or one for each, ``(B, 3, 3)``.
        """
        results = []
        for part in self._chunks(len(positions)):
            here = lattice if lattice is None or lattice.dim() == 2 else lattice[part]
            results.append(expansion.energies_and_forces(self, positions[part], here))
        energy, force = (torch.cat(values) for values in zip(*results, strict=True))
        return energy, force

    def hessian_products(self, structure: Structure, directions: np.ndarray) -> np.ndarray:
        return hessians.hessian_products(self, structure, directions)
