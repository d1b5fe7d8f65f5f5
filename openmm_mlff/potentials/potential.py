"""The interface of every trained potential: `forward(batch)` for training, `evaluator(batch)` for MD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from openmm_mlff.data.structures import SYMBOLS, Batch, Structure, check_charge_and_multiplicity, collate
from openmm_mlff.potentials import neighbors

if TYPE_CHECKING:
    from openmm_mlff.potentials.evaluator import Evaluator
    from openmm_mlff.potentials.neighbors import VerletPairs

#: what an evaluation can give
OUTPUTS = ("energy", "forces", "charges", "dipole", "spread")


@dataclass
class Prediction:
    """What a network predicts for a batch (before differentiation).

    Attributes:
        energy: ``(n_structures,)`` eV; float64 where sums over atoms would lose digits in the model's precision.
        charges: ``(n_atoms,)`` e, or None. dipole: ``(n_structures, 3)`` e*angstrom, or None.
        spread: uncertainty of the energy, ``(n_structures,)`` eV, or None.
        surplus: what the network's own charges lacked of the total charge before they were shifted, ``(n_structures,)``
            e, where they are; or None.
        terms: named parts of the energy, each ``(n_structures,)`` eV, where the family has them.
    """

    energy: Tensor
    charges: Tensor | None = None
    dipole: Tensor | None = None
    spread: Tensor | None = None
    surplus: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Evaluation(Prediction):
    """A prediction with its forces, ``(n_atoms, 3)`` eV/angstrom (None if they were not asked for).

    Attributes:
        force_spread: uncertainty of the forces, ``(n_atoms,)`` eV/angstrom, from potentials that have one; or None.
    """

    forces: Tensor | None = None
    force_spread: Tensor | None = None

    def detach(self) -> Evaluation:
        """The same numbers without the graph that they were computed by."""
        values: dict[str, Any] = {name: v.detach() if isinstance(v, Tensor) else v for name, v in vars(self).items()}
        values["terms"] = {name: term.detach() for name, term in self.terms.items()}
        return Evaluation(**values)


class Members(Protocol):
    """Several models of one config for the atoms of one batch, evaluated in one call (see `Potential.together`).

    Attributes:
        pairs: the pair lists that all of them share.
        tolerance: eV/angstrom, what their forces may differ by from those of the torch form.
    """

    pairs: VerletPairs
    tolerance: float

    def arrays(
        self, positions: np.ndarray, cell: np.ndarray | None = None, potential: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Energies ``(n_members, n_structures)`` eV, forces ``(n_members, n_atoms, 3)`` eV/angstrom, and charges
        ``(n_members, n_atoms)`` e of models that predict them, all float64; arguments as of an `Evaluator`."""


class Potential(nn.Module):
    """Base of every family's model.

    A family sets the attributes below, writes `predict`, and may write `fixed` for what the atoms, charge and
    multiplicity decide without the positions, so that MD computes it once.

    Attributes:
        family: the name under which the plugin registers.
        config: the family's frozen dataclass of hyperparameters.
        elements: atomic numbers that the model was made for.
        cutoff: angstrom, of the directed pair list.
        long_range: whether `predict` needs `Batch.long_range_pairs`.
        long_range_cutoff: angstrom; None takes all pairs of open systems (periodic ones need a value).
        long_range_method: what becomes of charges beyond the cutoff in periodic systems: 'shifted' (nothing, the
            interaction goes to zero there), 'ewald' or 'pme' (all images, in reciprocal space).
        long_range_methods: the methods that the family offers.
        first_derivatives_only: set while a graph is recorded that is differentiated once; `predict` may then use
            forms that have no second derivatives.
        native_training: set by a training that asks for it (``native = true`` of a recipe); `predict` may then use C++
            kernels that have second derivatives.
        charges, multiplicities: total charges and spin multiplicities that the model was trained on; None means any.
        predicts_charges, supports_charge, supports_multiplicity, supports_periodic: what the model can do.
        fixed_lattice: whether a periodic model describes the lattice of its training data and no other.
        beads: names of the particles of a coarse-grained model, in order; None for atoms.
        bead_numbers: what stands for these beads in `Batch.numbers`.
        phases: names of the energies that it has to offer (see `in_phase`), its default first; most have one, unnamed.
        implicit_solvent: whether its energy holds that of surroundings which it does not see as atoms.
        coupling_parameter: OpenMM's global parameter that becomes ``coupling``, the attribute through which the energy
            goes from one potential to another; None where there is none.
    """

    family: ClassVar[str] = ""
    config: Any
    elements: tuple[int, ...] = ()
    cutoff: float = 0.0
    long_range: bool = False
    long_range_cutoff: float | None = None
    long_range_method: str = "shifted"
    long_range_methods: tuple[str, ...] = ("shifted",)
    first_derivatives_only: bool = False
    native_training: bool = False
    charges: tuple[int, ...] | None = None
    multiplicities: tuple[int, ...] | None = None
    predicts_charges: bool = False
    supports_charge: bool = False
    supports_multiplicity: bool = False
    supports_periodic: bool = True
    fixed_lattice: bool = False
    beads: tuple[str, ...] | None = None
    bead_numbers: tuple[int, ...] = ()
    phases: tuple[str, ...] = ()
    implicit_solvent: bool = False
    coupling_parameter: str | None = None

    def fixed(self, batch: Batch) -> Any:
        """Everything that `predict` needs and the positions do not change."""
        return None

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        """Energies of the batch, differentiable with respect to ``batch.positions``."""
        raise TypeError(f"{type(self).__name__} does not define predict(batch, fixed)")

    def examples(self) -> list[Structure]:
        """Structures to try the model with, from one that describes a single composition; none where any will do."""
        return []

    def shift_atomic_energies(self, shifts: Mapping[int, float]) -> None:
        """Add a constant (eV) to the energy of every atom of an element, in place; what training starts with."""
        raise TypeError(f"{type(self).__name__} does not define shift_atomic_energies(shifts)")

    def forward(self, batch: Batch) -> Prediction:
        """Predict a batch that has its pair lists (see `batch`); adds sum_i q_i phi_i for an external potential."""
        return self.in_field(batch, self.predict(batch, self.fixed(batch)))

    def in_field(self, batch: Batch, prediction: Prediction) -> Prediction:
        """Add the energy of the predicted charges in ``batch.external_potential``, sum_i q_i phi_i."""
        phi = batch.external_potential
        if phi is None:
            return prediction
        if prediction.charges is None:
            raise ValueError(f"external_potential: {self.family} predicts no charges, so no potential can act on them")
        interaction = batch.sum_by_structure(prediction.charges * phi)
        prediction.energy = prediction.energy + interaction
        prediction.terms["external"] = interaction
        return prediction

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for t in [*self.parameters(), *self.buffers()] if t.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(t.device for t in [*self.parameters(), *self.buffers()])

    def check_electrons(self, numbers: Sequence[int] | np.ndarray, charge: int, multiplicity: int) -> None:
        """Refuse a charge and multiplicity that no number of electrons can have (`ValueError`).

        A family that knows no electrons overrides this; `check` then says which charges its models were trained for.
        """
        check_charge_and_multiplicity(numbers, charge, multiplicity)

    def check(self, structure: Structure) -> None:
        """Refuse a structure that this model cannot describe (`ValueError` naming the argument)."""
        unknown = sorted(set(structure.numbers.tolist()) - set(self.elements))
        if unknown:
            known = " ".join(SYMBOLS[z] for z in self.elements[:12]) + (" ..." if len(self.elements) > 12 else "")
            raise ValueError(
                f"elements: expected atoms among {known} ({len(self.elements)} elements), got "
                + ", ".join(SYMBOLS[z] for z in unknown)
            )
        if structure.charge and not self.supports_charge:
            raise ValueError(f"charge: {self.family} describes neutral systems only, got {structure.charge:+d}")
        if structure.multiplicity != 1 and not self.supports_multiplicity:
            raise ValueError(f"multiplicity: {self.family} describes singlets only, got {structure.multiplicity}")
        for name, trained in (("charge", self.charges), ("multiplicity", self.multiplicities)):
            if trained is not None and getattr(structure, name) not in trained:
                raise ValueError(
                    f"{name}: this model was trained for {name} {', '.join(map(str, trained))} only, "
                    f"got {getattr(structure, name)}"
                )
        if structure.cell is not None and not self.supports_periodic:
            raise ValueError(f"cell: {self.family} describes open systems only, got periodic box vectors")

    def check_geometry(self, structure: Structure) -> None:
        """Refuse positions that no simulation by this model should start from (`ValueError`); none by default."""

    def in_phase(self, phase: str) -> Potential:
        """The potential of one of `phases`, with the same parameters; `ValueError` for another name."""
        raise ValueError(f"phase: {self.family} has one energy only, expected None, got {phase!r}")

    def batch(
        self,
        structures: Sequence[Structure] | Structure,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Batch:
        """Structures as one batch with exact pair lists, in the model's dtype and on its device by default."""
        if isinstance(structures, Structure):
            structures = [structures]
        for structure in structures:
            self.check(structure)
        raw = collate(structures)
        built = neighbors.with_pairs(raw, self.cutoff, self.long_range, self.long_range_cutoff)
        return neighbors.derive(built.to(device=device or self.device, dtype=dtype or self.dtype))

    def evaluate(self, batch: Batch, forces: bool = True, create_graph: bool = False) -> Evaluation:
        """Energies and, by automatic differentiation, forces -dE/dR of a batch with pair lists.

        With `create_graph` the results can be differentiated again (force matching); otherwise they hold no graph.
        """
        if not forces:
            with torch.set_grad_enabled(create_graph):
                return Evaluation(**vars(self(batch)))
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_(True)
            prediction = self(batch.at(positions, batch.cell, batch.external_potential))
            gradient = energy_forces(prediction.energy, positions, create_graph)
        result = Evaluation(**vars(prediction), forces=gradient)
        return result if create_graph else result.detach()

    def evaluator(
        self,
        batch: Batch | Structure | Sequence[Structure],
        outputs: Sequence[str] = ("energy", "forces"),
        compile: bool | str = False,
    ) -> Evaluator:
        """The function that MD calls: ``f(positions, cell=None, potential=None) -> Evaluation``.

        Args:
            batch: which atoms, charges and multiplicities; positions only shape the first pair list. A single
                molecule is a batch of one, replicas are a batch of many.
            outputs: what is wanted among energy, forces, charges, dipole, spread.
            compile: True runs energy and forces as one compiled graph (made on the first call, about a minute, and
                kept on disk), 'auto' does so if the disk has it, False runs op by op. Families with native code of
                their own run that with True and 'auto'.

        Raises `ValueError` for a structure that the model cannot describe and for outputs that it does not have.
        """
        self.check_outputs(outputs, compile)
        if not isinstance(batch, Batch):
            batch = [batch] if isinstance(batch, Structure) else list(batch)
            for structure in batch:
                self.check(structure)
        return self._make_evaluator(batch, tuple(outputs), compile)

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> Evaluator:
        """What `evaluator` returns, for a batch or checked structures; families with their own evaluator write this."""
        from openmm_mlff.potentials.evaluator import Evaluator

        return Evaluator(self, self._as_batch(batch), outputs, compile)

    def _as_batch(self, batch: Batch | list[Structure]) -> Batch:
        """What `_make_evaluator` was given, as a batch with pair lists."""
        return batch if isinstance(batch, Batch) else self.batch(batch)

    def check_outputs(self, outputs: Sequence[str], compile: bool | str = False) -> None:
        """Refuse (`ValueError`) names that are no output, charges where there are none, and unknown ways to compile."""
        unknown = [name for name in outputs if name not in OUTPUTS]
        if unknown:
            raise ValueError(f"outputs: expected names among {', '.join(OUTPUTS)}, got {unknown[0]!r}")
        if "charges" in outputs and not self.predicts_charges:
            raise ValueError(f"outputs: {self.family or type(self).__name__} predicts no charges")
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}")

    @classmethod
    def together(cls, members: Sequence[Self], batch: Batch) -> Members | None:
        """What evaluates models of one config for the atoms of a batch faster than one after the other, or None.

        `batch` may have no pair lists. What comes back is checked against the torch form on its first frame.
        """
        return None

    def energy_and_forces(self, structure: Structure) -> tuple[float, np.ndarray]:
        """Energy (eV) and forces ``(n_atoms, 3)`` (eV/angstrom, float64) of one structure; no pair list is kept."""
        result = self.evaluate(self.batch(structure))
        assert result.forces is not None
        return float(result.energy[0]), result.forces.detach().cpu().numpy().astype(np.float64)

    def hessian_products(self, structure: Structure, directions: np.ndarray) -> np.ndarray:
        """H v for directions v ``(k, n_atoms, 3)``, H = d^2E/dR^2: ``(k, n_atoms, 3)`` eV/angstrom^2 times v, float64.

        Raises `ValueError` for directions of another shape.
        """
        from openmm_mlff.potentials.hessian import products_by_autograd

        return products_by_autograd(self, structure, directions)

    def hessian(self, structure: Structure) -> np.ndarray:
        """d^2E/dR^2, ``(3 n_atoms, 3 n_atoms)`` eV/angstrom^2, float64; x, y, z of atom 0 first."""
        from openmm_mlff.potentials.hessian import hessian

        return hessian(self, structure)


def energy_forces(energy: Tensor, positions: Tensor, create_graph: bool = False) -> Tensor:
    """Forces ``-d(sum of energies)/d(positions)``, zero where the energy does not depend on the positions."""
    if not energy.requires_grad:
        return torch.zeros_like(positions)
    (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(positions) if gradient is None else -gradient
