"""What molecular dynamics runs where a family has native code: that code once it is proved, else the torch form."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.neighbors import DEFAULT_SKIN
from openmm_mlff.potentials.potential import Evaluation, Members, Potential

logger = logging.getLogger(__name__)

#: energies ``(n_models, n_structures)`` eV and forces ``(n_models, n_atoms, 3)`` eV/angstrom, float64
Compared = tuple[np.ndarray, np.ndarray]
#: these, and charges ``(n_models, n_atoms)`` e or None
Found = tuple[np.ndarray, np.ndarray, np.ndarray | None]


class NativeEvaluator(Evaluator):
    """``f(positions, cell=None, potential=None) -> Evaluation`` by native code where it can run.

    Args of the constructor: see `Potential.evaluator`. ``compile=False`` runs the torch form op by op; True and 'auto'
    run the native code. Where there is none, or if it does not give the torch form's numbers on the first frame with
    finite forces, the torch form runs: as one compiled graph or op by op, as `compile` says.

    Native code that `Potential.together` makes needs nothing more than this class; other families write `_make_native`,
    and may write `_check`, `_compared` and `_fall_back`.

    Attributes:
        pairs: the pair lists of what runs.
    """

    _native: Members | None = None
    _proved = False
    _skin = DEFAULT_SKIN
    #: what is said about native code that gives other numbers; takes the largest difference of the forces
    _complaint: ClassVar[str] = "the native code and the torch form disagree by %.1e eV/angstrom; the torch form runs"

    def __init__(
        self,
        model: Potential,
        batch: Batch,
        outputs: tuple[str, ...],
        compile: bool | str = False,
        skin: float = DEFAULT_SKIN,
    ) -> None:
        super().__init__(model, batch, outputs, compile, skin)
        self._skin = skin
        self._torch_pairs = self.pairs
        if compile is not False:
            self._native = self._make_native()
        if self._native is not None:
            self.pairs = self._native.pairs

    @property
    def compiled(self) -> bool | None:
        """Whether native code or a compiled graph runs; None before the first call."""
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
        return super().__call__(positions, cell, potential) if found is None else self._evaluation(found, positions)

    def arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n_structures,)`` eV and forces ``(n_atoms, 3)`` eV/angstrom, float64."""
        if "forces" in self.outputs:
            found = self._natively(positions, cell)
            if found is not None:
                return found[0][0], found[1][0]
        return super().arrays(positions, cell)

    # -- what a family may write -------------------------------------------------------------------------------------

    def _make_native(self) -> Members | None:
        """The native code for `model` and the atoms of `_batch`, as `Members` of one; None where it cannot run."""
        return self.model.together([self.model], self._batch)

    @property
    def _models(self) -> Sequence[Potential]:
        """Those that the native code evaluates, in its order."""
        return [self.model]

    def _check(self, positions: np.ndarray, cell: np.ndarray | None, potential: np.ndarray | None) -> None:
        """Refuse (`ValueError`) what the native code cannot take, and the torch form might; shapes are right."""

    def _compared(
        self, found: Found, positions: np.ndarray, cell: np.ndarray | None, potential: np.ndarray | None
    ) -> tuple[Compared, Compared]:
        """What native code and torch form give for this frame, of which `found` is the former, or for a part of it."""
        return found[:2], self._by_torch(self._batch, positions, cell, potential)

    def _fall_back(self) -> None:
        """Let the torch form run from now on."""
        self.pairs = self._torch_pairs

    # -- the native code ---------------------------------------------------------------------------------------------

    def _natively(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None,
        potential: Tensor | np.ndarray | None = None,
    ) -> Found | None:
        """What the native code gives; None where the torch form is to run."""
        if self._native is None:
            return None
        exact, box, phi = self._checked(positions, cell, potential)
        found = self._native.arrays(exact, box, phi)
        if not self._proved:
            agrees = self._agrees(found, exact, box, phi)
            if agrees is False:
                self._give_up()
                return None
            self._proved = agrees is True
        return found

    def _checked(
        self, positions: Tensor | np.ndarray, cell: Tensor | np.ndarray | None, potential: Tensor | np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Positions ``(n_atoms, 3)``, cells ``(n_structures, 3, 3)`` if periodic, and potential ``(n_atoms,)``."""
        exact = _float64(positions)
        box = None if cell is None or not self._periodic else _float64(cell)
        phi = None if potential is None else _float64(potential)
        self._check_shapes(exact, box, phi)
        if phi is not None and not self.model.predicts_charges:
            raise ValueError(
                f"external_potential: {self.model.family} predicts no charges, so no potential can act on them"
            )
        self._check(exact, box, phi)
        return exact, None if box is None else box.reshape(-1, 3, 3), phi

    def _agrees(
        self, found: Found, positions: np.ndarray, cell: np.ndarray | None, potential: np.ndarray | None
    ) -> bool | None:
        """Whether native code and torch form give the same; None where neither has finite forces."""
        assert self._native is not None
        (energies, forces), (exact_energies, exact) = self._compared(found, positions, cell, potential)
        if not np.isfinite(exact).all() and not np.isfinite(forces).all():
            return None
        limit = self._native.tolerance * max(1.0, float(np.abs(exact).max(initial=0.0)))
        off = float(np.abs(forces - exact).max(initial=0.0))
        # written so that NaN fails too
        agrees = off <= limit and np.abs(energies - exact_energies).max() <= limit * np.sqrt(exact.shape[1])
        if not agrees:
            logger.warning("compile: " + self._complaint, off)
        return bool(agrees)

    def _by_torch(
        self, batch: Batch, positions: np.ndarray, cell: np.ndarray | None, potential: np.ndarray | None
    ) -> Compared:
        """What the models give op by op, with lists of their own."""
        every = []
        for model in self._models:
            result = Evaluator(model, batch, ("energy", "forces"), False, self._skin)(positions, cell, potential)
            assert result.forces is not None
            every.append((result.energy.double().numpy(), result.forces.double().numpy()))
        return np.stack([e for e, _ in every]), np.stack([f for _, f in every])

    def _give_up(self) -> None:
        """The torch form from now on, with lists built where those of the native code were."""
        reference, cell = self.pairs.reference, self.pairs.reference_cell
        self._native = None
        self._fall_back()
        if reference is not None:
            self.pairs.restore(reference, cell)

    def _evaluation(self, found: Found, positions: Tensor | np.ndarray) -> Evaluation:
        """The results of the first model, as far as they are wanted."""
        energies, forces, charges = (None if x is None else torch.from_numpy(x[0]) for x in found)
        assert energies is not None
        dipole = None
        if charges is not None and "dipole" in self.outputs:
            exact = torch.as_tensor(positions, dtype=torch.float64, device="cpu")
            dipole = self._batch.sum_by_structure(charges[:, None] * exact)
        return Evaluation(
            energy=energies,
            forces=forces if "forces" in self.outputs else None,
            charges=charges if "charges" in self.outputs else None,
            dipole=dipole,
        )


def _float64(x: Tensor | np.ndarray) -> np.ndarray:
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    # writable, because torch looks at the same memory
    return np.require(array, np.float64, ["C", "W"])
