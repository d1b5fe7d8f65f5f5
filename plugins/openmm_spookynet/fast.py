"""What molecular dynamics runs for SpookyNet on the CPU: native code that gives the numbers of the torch form."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.neighbors import DEFAULT_SKIN
from openmm_mlff.potentials.potential import Evaluation
from openmm_spookynet.members import Members, Parts, together
from openmm_spookynet.model import SpookyNet

logger = logging.getLogger(__name__)

_Found = tuple[np.ndarray, np.ndarray, np.ndarray]


class NativeEvaluator(Evaluator):
    """``f(positions, cell=None, potential=None) -> Evaluation`` by native code where it can run.

    Args of the constructor: see `Potential.evaluator`. ``compile=False`` runs the torch form op by op; True and 'auto'
    run the native code, which is compiled within seconds, once per machine and model size. Without a compiler, for
    models that it does not know (`members.unsupported`), or if its forces on the first frame are not those of the torch
    form, the torch form runs: as one compiled graph or op by op, as `compile` says.

    Attributes:
        pairs: the pair lists of what runs.
    """

    def __init__(
        self,
        model: SpookyNet,
        batch: Batch,
        outputs: tuple[str, ...],
        compile: bool | str = False,
        skin: float = DEFAULT_SKIN,
    ) -> None:
        super().__init__(model, batch, outputs, compile, skin)
        self._skin = skin
        self._torch_pairs = self.pairs
        self._native: Members | Parts | None = None if compile is False else together([model], self._batch)
        self._proved = False
        if self._native is not None:
            self.pairs = self._native.pairs

    @property
    def compiled(self) -> bool | None:
        """Whether the native code or a compiled graph runs; None before the first call."""
        if self._native is None:
            return super().compiled
        return True if self._proved else None

    def __call__(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None = None,
        potential: Tensor | np.ndarray | None = None,
    ) -> Evaluation:
        """Evaluate at new positions; arguments as in the base class."""
        found = self._natively(positions, cell, potential)
        if found is None:
            return super().__call__(positions, cell, potential)
        energies, forces, charges = (torch.from_numpy(x[0]) for x in found)
        dipole = None
        if "dipole" in self.outputs:
            exact = torch.as_tensor(positions, dtype=torch.float64, device="cpu")
            dipole = self._batch.sum_by_structure(charges[:, None] * exact)
        return Evaluation(
            energy=energies,
            forces=forces if "forces" in self.outputs else None,
            charges=charges if "charges" in self.outputs else None,
            dipole=dipole,
        )

    def arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n_structures,)`` eV and forces ``(n_atoms, 3)`` eV/angstrom, float64."""
        if "forces" in self.outputs:
            found = self._natively(positions, cell, None)
            if found is not None:
                return found[0][0], found[1][0]
        return super().arrays(positions, cell)

    def _natively(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None,
        potential: Tensor | np.ndarray | None,
    ) -> _Found | None:
        """Energies, forces and charges with a first axis of one; None where the torch form is to run."""
        if self._native is None:
            return None
        exact, box, phi = (_float64(x) for x in (positions, cell, potential))
        assert exact is not None
        if box is not None and box.size != 9 * self._batch.n_structures:
            raise ValueError(f"cell: expected shape {(self._batch.n_structures, 3, 3)}, got {box.shape}")
        found = self._native.arrays(exact, None if box is None else box.reshape(-1, 3, 3), phi)
        if not self._proved:
            agrees = self._agrees(found, exact, box, phi)
            if agrees is False:
                self._give_up()
                return None
            self._proved = agrees is True
        return found

    def _agrees(
        self, found: _Found, positions: np.ndarray, cell: np.ndarray | None, potential: np.ndarray | None
    ) -> bool | None:
        """Whether native code and torch form give the same; None where neither has finite forces."""
        assert self._native is not None
        truth = Evaluator(self.model, self._batch, ("energy", "forces"), False, self._skin)(positions, cell, potential)
        assert truth.forces is not None
        forces, energies = truth.forces.double().numpy(), truth.energy.double().numpy()
        if not np.isfinite(forces).all() and not np.isfinite(found[1]).all():
            return None
        limit = self._native.tolerance * max(1.0, float(np.abs(forces).max(initial=0.0)))
        off = float(np.abs(found[1][0] - forces).max(initial=0.0))
        # written so that NaN fails too
        agrees = off <= limit and np.abs(found[0][0] - energies).max() <= limit * np.sqrt(self._batch.n_atoms)
        if not agrees:
            logger.warning(
                "compile: the native code and the torch form disagree by %.1e eV/angstrom; the torch form runs", off
            )
        return bool(agrees)

    def _give_up(self) -> None:
        reference, cell = self.pairs.reference, self.pairs.reference_cell
        self._native, self.pairs = None, self._torch_pairs
        if reference is not None:
            self.pairs.restore(reference, cell)


def _float64(x: Tensor | np.ndarray | None) -> np.ndarray | None:
    if x is None:
        return None
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    # writable, because torch looks at the same memory
    return np.require(array, np.float64, ["C", "W"])
