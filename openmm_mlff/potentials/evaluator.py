"""What molecular dynamics runs: a function of positions, with everything that atoms decide computed once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch
from openmm_mlff.potentials.neighbors import DEFAULT_SKIN, VerletPairs
from openmm_mlff.potentials.potential import Evaluation, energy_forces

if TYPE_CHECKING:
    from openmm_mlff.potentials.potential import Potential

logger = logging.getLogger(__name__)


class Evaluator:
    """``f(positions, cell=None, potential=None) -> Evaluation`` for the atoms of one batch.

    Positions and cells are taken in float64 and moved to the centre of the structure before they are rounded to the
    model's precision, so that a molecule far from the origin loses nothing.

    Args of the constructor: see `Potential.evaluator`.

    Attributes:
        pairs: the Verlet lists (`VerletPairs`); their reference positions belong into a checkpoint.
        spreads: uncertainties of the last call, of potentials that have them: of energies ``(n_structures,)`` eV and
            forces ``(n_atoms,)`` eV/angstrom, float64; else None.
    """

    spreads: tuple[np.ndarray, np.ndarray] | None = None

    def __init__(
        self,
        model: Potential,
        batch: Batch,
        outputs: tuple[str, ...],
        compile: bool | str = False,
        skin: float = DEFAULT_SKIN,
    ) -> None:
        model.check_outputs(outputs, compile)
        self.model = model.eval()
        self.outputs = outputs
        self._batch = batch.to(device=model.device, dtype=model.dtype).replace(external_potential=None)
        self._periodic = batch.cell is not None
        self.pairs = VerletPairs(self._batch, model.cutoff, model.long_range, model.long_range_cutoff, skin)
        with torch.no_grad():
            self._fixed = model.fixed(self._batch)
        self.compile = compile
        # what runs without and with an external potential; chosen on the first call of each kind, then for ever
        self._run: dict[bool, Callable[[Batch], Evaluation]] = {}

    def __call__(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None = None,
        potential: Tensor | np.ndarray | None = None,
    ) -> Evaluation:
        """Evaluate at new positions.

        Args:
            positions: ``(n_atoms, 3)`` angstrom.
            cell: ``(n_structures, 3, 3)`` or, for one structure, ``(3, 3)`` angstrom; required if periodic.
            potential: external electrostatic potential on the atoms, ``(n_atoms,)`` V; adds sum_i q_i phi_i.
        """
        batch = self.place(positions, cell, potential)
        field = potential is not None
        if field not in self._run:
            self._run[field] = self._choose(batch)
        result = self._run[field](batch)
        if result.dipole is not None:
            # a charged structure's dipole depends on the origin: back from the centre to the caller's origin
            result.dipole = result.dipole + batch.charge[:, None] * self._centre.to(batch.charge.dtype)
        return result

    def arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n_structures,)`` eV and forces ``(n_atoms, 3)`` eV/angstrom as float64 numpy arrays.

        A family whose evaluation takes no longer than making tensors may write this without them.
        """
        result = self(positions, cell)
        if result.forces is None:
            raise ValueError("outputs: expected an evaluator with forces, got one without")
        energies, forces = (x.detach().to("cpu", torch.float64).numpy() for x in (result.energy, result.forces))
        return energies, forces

    def place(
        self, positions: Tensor | np.ndarray, cell: Tensor | np.ndarray | None, potential: Tensor | np.ndarray | None
    ) -> Batch:
        """The batch at new positions, with valid pair lists, in the model's precision."""
        device, dtype = self._batch.positions.device, self._batch.positions.dtype
        exact = torch.as_tensor(positions, dtype=torch.float64, device=device)
        box = None
        if self._periodic and cell is not None:
            box = torch.as_tensor(cell, dtype=torch.float64, device=device)
        phi = None if potential is None else torch.as_tensor(potential, dtype=dtype, device=device)
        self._check_shapes(exact, box, phi)
        box = None if box is None else box.reshape(-1, 3, 3)
        batch = self.pairs.update(exact, box)
        self._centre = self._batch.sum_by_structure(exact) / self._batch.counts[:, None]
        centred = exact - self._batch.per_atom(self._centre)
        return batch.at(centred.to(dtype), None if box is None else box.to(dtype), phi)

    def _check_shapes(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None,
        potential: Tensor | np.ndarray | None,
    ) -> None:
        """Refuse (`ValueError`) shapes that are not those of the batch, and a periodic batch without a cell."""
        n, n_structures = self._batch.n_atoms, self._batch.n_structures
        if positions.shape != (n, 3):
            raise ValueError(f"positions: expected shape {(n, 3)}, got {tuple(positions.shape)}")
        if self._periodic:
            if cell is None:
                raise ValueError("cell: expected box vectors, because the batch is periodic, got None")
            if cell.shape != (n_structures, 3, 3) and (n_structures > 1 or cell.shape != (3, 3)):
                raise ValueError(f"cell: expected shape {(n_structures, 3, 3)}, got {tuple(cell.shape)}")
        if potential is not None and potential.shape != (n,):
            raise ValueError(f"potential: expected shape {(n,)}, got {tuple(potential.shape)}")

    @property
    def compiled(self) -> bool | None:
        """Whether a compiled graph runs; None before the first call."""
        return None if not self._run else any(run != self.eager for run in self._run.values())

    def _choose(self, batch: Batch) -> Callable[[Batch], Evaluation]:
        """A compiled graph that has proved itself on this frame, or op by op with one line that says why."""
        if self.compile is False:
            return self.eager
        from openmm_mlff.potentials import compile as compilation

        if batch.positions.device.type != "cpu":
            logger.info("compiled graphs are made for the CPU; running op by op on %s", batch.positions.device)
            return self.eager
        graph = compilation.CompiledGraph(self.model, self._fixed, self.outputs, self.pairs.fixed)
        if self.compile == "auto" and not graph.ready(batch):
            _suggest_compiling()
            return self.eager
        if not graph.ready(batch) and not compilation.compiler_found():
            logger.warning("compile: no C++ compiler found (g++ or clang++); running op by op")
            return self.eager
        try:
            result = graph(batch)
        except RuntimeError as error:
            # also a graph from the disk that no longer runs here, for example because the compiler has gone
            logger.warning("compile: %s; running op by op", str(error).removeprefix("compile: "))
            return self.eager
        if not compilation.agree(result, self.eager(batch), self.model.dtype):
            logger.warning("compile: the compiled graph and op-by-op evaluation disagree; running op by op")
            return self.eager
        return graph

    def eager(self, batch: Batch) -> Evaluation:
        """Run op by op, without the compiled graph."""
        model = self.model
        wants_forces = "forces" in self.outputs
        with torch.set_grad_enabled(wants_forces):
            positions = batch.positions.requires_grad_(wants_forces)
            prediction = model.in_field(batch, model.predict(batch, self._fixed))
            forces = energy_forces(prediction.energy, positions) if wants_forces else None
        return Evaluation(
            energy=prediction.energy.detach(),
            forces=forces,
            charges=_wanted(prediction.charges, "charges" in self.outputs),
            dipole=_wanted(prediction.dipole, "dipole" in self.outputs),
            spread=_wanted(prediction.spread, "spread" in self.outputs),
        )


@functools.cache
def _suggest_compiling() -> None:
    """Once per process."""
    logger.warning(
        "the ML potential runs op by op; for long runs, compile=True makes a graph once (about a minute) that is "
        "several times faster, here and in later runs"
    )


def _wanted(value: Tensor | None, wanted: bool) -> Tensor | None:
    return value.detach() if wanted and value is not None else None
