"""What molecular dynamics runs for a GDML model: the fused kernel on the CPU, the torch form elsewhere.

A GDML model needs no pair lists and its compiled code belongs to no molecule, so that this evaluator is much lighter
than that of networks: for a small molecule the kernel takes less time than making a handful of tensors.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openmm_gdml.descriptor_graph import CompiledCopies, compiled_copies
from openmm_gdml.native import FusedKernel, library
from openmm_mlff.data.structures import Batch
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.neighbors import VerletPairs
from openmm_mlff.potentials.potential import Evaluation

if TYPE_CHECKING:
    from openmm_gdml.model import GDMLPotential

logger = logging.getLogger(__name__)

#: a run at constant volume may change box vectors by this fraction (rounding), and no more
SAME_BOX = 1e-6


class Orientation(VerletPairs):
    """Stands where other families have pair lists: remembers at which positions the lattice was laid onto the box.

    A symmetric lattice fits its box in several ways (`GDMLPotential.lattice_for`), and only the positions at the first
    step tell which; a resumed run has to ask the same positions.

    Attributes:
        reference, reference_cell: positions ``(n_atoms, 3)`` and box ``(1 or n_structures, 3, 3)`` of the first step of
            a periodic model; always None for an open one. rebuilds: always 0. fixed: always True.
    """

    def __init__(self, evaluator: GDMLEvaluator) -> None:
        self._evaluator = evaluator
        self.fixed = True
        self.rebuilds = 0
        self.reference: Tensor | None = None
        self.reference_cell: Tensor | None = None

    def restore(self, reference: Tensor | None, cell: Tensor | None = None) -> None:
        """Lay the lattice onto the box as at these positions; None: as at the next ones."""
        self.reference = self.reference_cell = None
        if reference is not None and cell is not None and self._evaluator.periodic:
            self._evaluator.orient(np.asarray(reference.cpu()), np.asarray(cell.cpu()))


class GDMLEvaluator(Evaluator):
    """``f(positions, cell=None, potential=None) -> Evaluation`` for one molecule or a batch of copies.

    Args of the constructor: see `Potential.evaluator`. ``compile=False`` runs the torch form; True and 'auto' run the
    fused kernel on the CPU (compiled within seconds, once per machine), and the torch form, with one line that says so,
    where there is no compiler. Other devices always run the torch form. Descriptors that the kernel does not know have
    a compiled graph of their own with True, or 'auto' where the disk holds it (see `descriptor_graph`).

    Attributes:
        pairs: see `Orientation`.
    """

    def __init__(
        self, model: GDMLPotential, batch: Batch, outputs: tuple[str, ...], compile: bool | str = False
    ) -> None:
        model.check_outputs(outputs, compile)
        self.gdml = model.eval()
        self.model = model
        self.outputs = outputs
        self.compile = compile
        self.periodic = model.config.periodic
        self.n_structures = batch.n_structures
        self._shape = (batch.n_atoms, 3)
        self._copies = (batch.n_structures, len(model.config.numbers), 3)
        if batch.n_atoms != self._copies[0] * self._copies[1]:
            raise ValueError(f"batch: expected {self._copies[1]} atoms in each structure, got {batch.n_atoms} in all")
        self.pairs: Orientation = Orientation(self)
        self._batch = batch
        self._on_gpu = model.device.type != "cpu"
        self._native: bool | None = None
        self._graph: CompiledCopies | None = None
        self._lattices: np.ndarray | None = None
        self._single: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
        self._kernels: list[tuple[np.ndarray | slice, FusedKernel]] = []

    @property
    def compiled(self) -> bool | None:
        """Whether the fused kernel or a compiled graph runs; None before the first call."""
        return self._native if self._graph is None else True

    def __call__(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None = None,
        potential: Tensor | np.ndarray | None = None,
    ) -> Evaluation:
        """Evaluate at positions ``(n_atoms, 3)`` angstrom; `cell` ``(3, 3)`` or one for each structure if periodic.

        The box must stay as it was at the first call (`ValueError` otherwise). There are no charges, so that an
        external potential is refused.
        """
        if potential is not None:
            raise ValueError(
                f"external_potential: {self.model.family} predicts no charges, so no potential can act on them"
            )
        if self._on_gpu:
            return self._on_device(positions, cell)
        energies, forces = self.arrays(np.asarray(positions, dtype=np.float64), cell)
        return Evaluation(torch.from_numpy(energies), forces=torch.from_numpy(forces))

    def arrays(self, positions: np.ndarray, cell: Tensor | np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n_structures,)`` eV and forces ``(n_atoms, 3)`` eV/angstrom as numpy arrays."""
        if positions.shape != self._shape:
            raise ValueError(f"positions: expected shape {self._shape}, got {positions.shape}")
        if self.periodic:
            self._check_box(positions, cell)
        if self._on_gpu:
            result = self._on_device(positions, cell)
            assert result.forces is not None
            return result.energy.cpu().numpy(), result.forces.cpu().numpy()
        if self._single is not None:
            energies, forces = self._single(positions)
            return energies, forces[0]
        copies = np.ascontiguousarray(positions).reshape(self._copies)
        if self._native is None:
            self._native = self._decide(copies)
        if self._graph is not None:
            energies, forces = self._graph(copies)
            return energies, forces.reshape(self._shape)
        if not self._native:
            return self._by_torch(copies)
        energies, forces = self._by_kernel(copies)
        if len(copies) == 1:
            self._single = self._kernels[0][1].one
        return energies, forces.reshape(self._shape)

    def place(
        self, positions: Tensor | np.ndarray, cell: Tensor | np.ndarray | None, potential: Tensor | np.ndarray | None
    ) -> Batch:
        """The batch at new positions, as `Potential.evaluate` takes it."""
        box = None if cell is None else torch.as_tensor(cell, dtype=torch.float64).reshape(-1, 3, 3)
        box = box if box is None else box.expand(self.n_structures, 3, 3)
        return self._batch.at(torch.as_tensor(positions, dtype=torch.float64), box)

    def eager(self, batch: Batch) -> Evaluation:
        """The torch form."""
        return self.gdml.evaluate(batch)

    # -- the box -------------------------------------------------------------------------------------------------

    def _check_box(self, positions: np.ndarray, cell: Tensor | np.ndarray | None) -> None:
        if cell is None:
            raise ValueError("cell: expected box vectors, because the model is periodic, got None")
        box = np.asarray(cell, dtype=np.float64)
        box = box[None] if box.ndim == 2 else box
        if box.shape not in ((1, 3, 3), (self.n_structures, 3, 3)):
            raise ValueError(f"cell: expected shape {(self.n_structures, 3, 3)}, got {box.shape}")
        if self._lattices is None:
            self.orient(positions, box)
            return
        if box is not self._box and not np.array_equal(box, self._box):
            change = np.abs(box - self._box).max() / np.abs(self._box).max()
            if not change <= SAME_BOX:
                raise ValueError(
                    "cell: this model describes one lattice at constant volume, but the box has changed from "
                    f"{self._box[0].round(4).tolist()} to {box[0].round(4).tolist()} (angstrom); remove the barostat"
                )

    def orient(self, positions: np.ndarray, cell: np.ndarray) -> None:
        """Lay the training lattice onto the box (or one box for each structure) as it suits these positions best."""
        box = np.array(cell, dtype=np.float64).reshape(-1, 3, 3)
        boxes = np.broadcast_to(box, (self.n_structures, 3, 3))
        copies = positions.reshape(self._copies)
        self._lattices = np.stack([self.gdml.lattice_for(r, b) for r, b in zip(copies, boxes, strict=True)])
        self._box = box
        self._kernels, self._single = [], None
        self.pairs.reference = torch.from_numpy(positions.reshape(self._shape).copy())
        self.pairs.reference_cell = torch.from_numpy(box.copy())

    # -- the ways to compute -------------------------------------------------------------------------------------

    def _on_device(self, positions: Tensor | np.ndarray, cell: Tensor | np.ndarray | None) -> Evaluation:
        self._native = False
        device = self.model.device
        exact = torch.as_tensor(positions, dtype=torch.float64, device=device)
        if exact.shape != self._shape:
            raise ValueError(f"positions: expected shape {self._shape}, got {tuple(exact.shape)}")
        if self.periodic and self._lattices is None:
            box = None if cell is None else torch.as_tensor(cell).cpu()
            self._check_box(exact.cpu().numpy(), box)
        lattices = None if self._lattices is None else torch.from_numpy(self._lattices).to(device)
        energies, forces = self.gdml.energies_and_forces(exact.reshape(self._copies), lattices)
        return Evaluation(energies, forces=forces.reshape(self._shape))

    def _by_torch(self, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lattices = None if self._lattices is None else torch.from_numpy(self._lattices)
        energies, forces = self.gdml.energies_and_forces(torch.from_numpy(copies), lattices)
        return energies.numpy(), forces.numpy().reshape(self._shape)

    def _by_kernel(self, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self._kernels:
            self._kernels = self._make_kernels()
        threads = 1 if len(copies) == 1 else torch.get_num_threads()
        if len(self._kernels) == 1:
            return self._kernels[0][1](copies, threads)
        energies, forces = np.empty(len(copies)), np.empty(copies.shape)
        for which, kernel in self._kernels:
            energies[which], forces[which] = kernel(np.ascontiguousarray(copies[which]), threads)
        return energies, forces

    def _make_kernels(self) -> list[tuple[np.ndarray | slice, FusedKernel]]:
        """One kernel for every lattice among the structures, and the structures that it is for."""
        if self._lattices is None:
            return [(slice(None), self.gdml.fused_kernel(None))]
        unique, index = np.unique(self._lattices, axis=0, return_inverse=True)
        return [
            (np.flatnonzero(index.reshape(-1) == k), self.gdml.fused_kernel(lattice))
            for k, lattice in enumerate(unique)
        ]

    def _decide(self, copies: np.ndarray) -> bool:
        """Whether the fused kernel runs: it must be wanted, compile, and agree with the torch form on this frame."""
        if self.compile is False:
            return False
        if not self.gdml.fusible:
            graph = compiled_copies(self.gdml, copies, self.compile)
            self._graph = graph if graph is not None and self._agrees(*graph(copies), copies) else None
            return False
        try:
            library()
        except (RuntimeError, OSError) as error:
            _no_kernel(str(error).removeprefix("compile: "))
            return False
        return self._agrees(*self._by_kernel(copies), copies)

    def _agrees(self, energies: np.ndarray, forces: np.ndarray, copies: np.ndarray) -> bool:
        """Whether compiled code gives what the torch form gives; a warning if not."""
        exact_energies, exact_forces = self._by_torch(copies)
        # rounding is amplified by the size of the coefficients, which cancel
        tolerance = 1e-6 + 1e-13 * float(self.gdml.coefficients.abs().max())
        scale = max(1.0, float(np.nan_to_num(np.abs(exact_forces)).max()))
        with np.errstate(invalid="ignore"):
            wrong = np.abs(energies - exact_energies).max() > tolerance * (1.0 + 1e-9 * np.abs(exact_energies).max())
            wrong |= np.abs(forces.reshape(self._shape) - exact_forces).max() > tolerance * scale
        if wrong:
            logger.warning("compile: the compiled code and the torch form disagree; running the torch form")
        return not wrong


@functools.cache
def _no_kernel(why: str) -> None:
    """Once per process and reason."""
    logger.warning("compile: %s; running GDML models on torch, which is several times slower for one molecule", why)
