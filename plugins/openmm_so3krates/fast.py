"""What molecular dynamics runs for SO3krates on the CPU: native code that gives the numbers of the torch form."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials import neighbors
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.neighbors import DEFAULT_SKIN, VerletPairs
from openmm_mlff.potentials.potential import Evaluation
from openmm_so3krates.half_lists import HalfLists, check_finite
from openmm_so3krates.model import SO3krates
from openmm_so3krates.native import Engine, unsupported

logger = logging.getLogger(__name__)

#: what native code and torch form may differ by in the forces of the first frame, eV/angstrom
TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-8}
#: fewer atoms than this do not keep a thread busy
ATOMS_PER_THREAD = 48
#: a larger system is compared on this many of its atoms, because the torch form takes much memory
COMPARED_ATOMS = 300


@dataclass
class _Result:
    """Energies ``(n_structures,)``, forces ``(N, 3)`` and charges ``(N,)``; float64."""

    energies: np.ndarray
    forces: np.ndarray
    charges: np.ndarray


class NativeEvaluator(Evaluator):
    """``f(positions, cell=None, potential=None) -> Evaluation`` by native code where it can run.

    Args of the constructor: see `Potential.evaluator`. ``compile=False`` runs the torch form op by op; True and 'auto'
    run the native code, which is compiled within seconds, once per machine and model size. Without a compiler, or if
    both differ on the first frame, the torch form runs op by op, with one line that says so; so do models that the
    native code does not know (`native.unsupported`). The torch form is never compiled: the compiler of torch 2.13 makes
    wrong forces of some sizes of this network, by as little as one per cent, which the first frame may not show.

    Attributes:
        pairs: the Verlet lists: half lists for the native code.
    """

    def __init__(
        self,
        model: SO3krates,
        batch: Batch,
        outputs: tuple[str, ...],
        compile: bool | str = False,
        skin: float = DEFAULT_SKIN,
    ) -> None:
        super().__init__(model, batch, outputs, compile, skin)
        self.so3krates = model
        self._skin = skin
        self._proved = False
        self._engine = None if compile is False else self._make_engine()
        if self._engine is not None:
            terms = (model.cutoff, model.long_range, model.long_range_cutoff)
            self.pairs: VerletPairs = HalfLists(self._engine, self._batch, *terms, skin)

    @property
    def compiled(self) -> bool | None:
        """Whether the native code or a compiled graph runs; None before the first call."""
        if self._engine is None:
            return super().compiled
        return True if self._proved else None

    def __call__(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None = None,
        potential: Tensor | np.ndarray | None = None,
    ) -> Evaluation:
        """Evaluate at new positions; arguments as in the base class."""
        result = self._native(positions, cell, potential)
        if result is None:
            return super().__call__(positions, cell, potential)
        charges = dipole = None
        if self.so3krates.predicts_charges:
            charges = torch.from_numpy(result.charges)
            exact = torch.as_tensor(positions, dtype=torch.float64)
            dipole = self._batch.sum_by_structure(charges[:, None] * exact)
        return Evaluation(
            energy=torch.from_numpy(result.energies),
            forces=torch.from_numpy(result.forces) if "forces" in self.outputs else None,
            charges=charges if "charges" in self.outputs else None,
            dipole=dipole if "dipole" in self.outputs else None,
        )

    def arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n_structures,)`` eV and forces ``(n_atoms, 3)`` eV/angstrom, float64."""
        if "forces" in self.outputs:
            result = self._native(positions, cell, None)
            if result is not None:
                return result.energies, result.forces
        return super().arrays(positions, cell)

    # -- the native code ---------------------------------------------------------------------------------------------

    def _make_engine(self) -> Engine | None:
        reason = unsupported(self.so3krates)
        if reason is not None:
            self.compile = False
            if self.so3krates.device.type == "cpu":
                _no_native_code(reason)
            return None
        try:
            engine = Engine(self.so3krates, electrostatics=self._in_real_space)
        except (RuntimeError, OSError) as error:
            _no_native_code(str(error).removeprefix("compile: "))
            # torch's compiler needs the same program
            self.compile = False
            return None
        self._set_atoms(engine, self._batch, self._fixed.x)
        return engine

    @staticmethod
    def _set_atoms(engine: Engine, batch: Batch, x: Tensor) -> None:
        engine.set_atoms(batch.numbers.numpy(), batch.segment.numpy(), batch.charge.numpy(), x.detach().numpy())

    @property
    def _in_real_space(self) -> bool:
        return self.so3krates.electrostatics is None or self.so3krates.long_range_method == "shifted"

    def _native(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None,
        potential: Tensor | np.ndarray | None,
    ) -> _Result | None:
        """The result, or None where the torch form is to run."""
        if self._engine is None:
            return None
        exact, box, phi = self._checked(positions, cell, potential)
        if not self._proved:
            agrees = self._agrees(self._engine, exact, box)
            if agrees is False:
                self._give_up()
                return None
            self._proved = agrees is True
        assert isinstance(self.pairs, HalfLists)
        return self._run_native(self._engine, self.pairs, self._batch, exact, box, phi)

    def _run_native(
        self,
        engine: Engine,
        pairs: HalfLists,
        batch: Batch,
        positions: np.ndarray,
        cell: np.ndarray | None,
        potential: np.ndarray | None,
    ) -> _Result:
        pairs.give(positions, cell)
        threads = max(1, min(torch.get_num_threads(), batch.n_atoms // ATOMS_PER_THREAD))
        charges, _ = engine.forward(positions, cell, threads)
        extra: list[tuple[np.ndarray, np.ndarray]] = []  # energies and forces beside the engine's
        outside = potential
        if potential is not None:
            energies = np.bincount(batch.segment.numpy(), charges * potential, batch.n_structures)
            extra.append((energies, np.zeros(1)))
        if not self._in_real_space and batch.cell is not None:
            energies, pull, forces = self._lattice(batch, charges, positions, cell)
            extra.append((energies, forces))
            outside = pull if outside is None else outside + pull
        if outside is not None:
            outside = np.ascontiguousarray(outside, dtype=np.float64)
        energies, forces = engine.backward(outside)
        for more_energy, more_forces in extra:
            energies, forces = energies + more_energy, forces + more_forces
        return _Result(energies, forces, charges.copy())

    def _lattice(
        self, batch: Batch, charges: np.ndarray, positions: np.ndarray, cell: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies of the charges with all their images, dE/dq, and forces at constant charges."""
        q = torch.from_numpy(charges.copy()).requires_grad_(True)
        exact = torch.from_numpy(positions)
        r = exact.clone().requires_grad_(True)
        dtype = self.so3krates.dtype
        with torch.enable_grad():
            # a mesh has an origin: atoms are moved to the same centre as in the torch form
            centre = batch.sum_by_structure(exact) / batch.counts[:, None]
            box = None if cell is None else torch.from_numpy(cell).to(dtype)
            moved = batch.at((r - batch.per_atom(centre)).to(dtype), box)
            energy = self.so3krates.lattice_energy(moved, q.to(dtype))
            by_charge, by_position = torch.autograd.grad(energy.sum(), [q, r])
        return energy.detach().double().numpy(), by_charge.numpy(), -by_position.numpy()

    def _checked(
        self, positions: Tensor | np.ndarray, cell: Tensor | np.ndarray | None, potential: Tensor | np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Arguments in float64, as the engine takes them; raises `ValueError` as the base class does."""
        batch = self._batch
        exact = _float64(positions)
        if exact.shape != (batch.n_atoms, 3):
            raise ValueError(f"positions: expected shape {(batch.n_atoms, 3)}, got {tuple(exact.shape)}")
        # the native code looks distances up in tables
        check_finite(exact)
        box = None
        if self._periodic:
            if cell is None:
                raise ValueError("cell: expected box vectors, because the batch is periodic, got None")
            box = _float64(cell)
            box = box[None] if box.ndim == 2 else box
            if box.shape != (batch.n_structures, 3, 3):
                raise ValueError(f"cell: expected shape {(batch.n_structures, 3, 3)}, got {tuple(box.shape)}")
        phi = None if potential is None else _float64(potential)
        if phi is not None and phi.shape != (batch.n_atoms,):
            raise ValueError(f"potential: expected shape {(batch.n_atoms,)}, got {phi.shape}")
        if phi is not None and not self.so3krates.predicts_charges:
            raise ValueError(
                f"external_potential: {self.so3krates.family} predicts no charges, so no potential can act on them"
            )
        return exact, box, phi

    # -- proof and fallback ------------------------------------------------------------------------------------------

    def _agrees(self, engine: Engine, positions: np.ndarray, cell: np.ndarray | None) -> bool | None:
        """Whether native code and torch form give the same for this frame, or for some atoms of a large one.

        None where the torch form has no finite forces, so that nothing can be compared.
        """
        model, whole = self.so3krates, self._batch
        n = int(whole.counts[0])
        if whole.n_atoms > COMPARED_ATOMS:
            n = min(n, COMPARED_ATOMS)
            charge, multiplicity = int(whole.charge[0]), int(whole.multiplicity[0])
            lattice = None if cell is None else cell[0]
            part = Structure(whole.numbers[:n].numpy(), positions[:n], charge, multiplicity, lattice)
            batch = _batch_of(model, part)
            moved, box = positions[:n], None if cell is None else cell[:1]
        else:
            batch, moved, box = whole, positions, cell
        with torch.no_grad():
            fixed = model.fixed(batch)
        terms = (model.cutoff, model.long_range, model.long_range_cutoff)
        truth = Evaluator(model, batch, ("energy", "forces"), False, self._skin)(moved, box)
        assert truth.forces is not None
        self._set_atoms(engine, batch, fixed.x)
        mine = self._run_native(engine, HalfLists(engine, batch, *terms, self._skin), batch, moved, box, None)
        self._set_atoms(engine, whole, self._fixed.x)
        assert isinstance(self.pairs, HalfLists)
        self.pairs.again()
        forces = truth.forces.double().numpy()
        if not np.isfinite(forces).all():
            return None
        scale = TOLERANCE[model.dtype] * max(1.0, float(np.abs(forces).max()))
        agrees = np.abs(mine.forces - forces).max(initial=0.0) <= scale
        agrees &= np.abs(mine.energies - truth.energy.double().numpy()).max() <= scale * np.sqrt(batch.n_atoms)
        if not agrees:
            logger.warning("compile: the native code and the torch form disagree; running op by op")
        return bool(agrees)

    def _give_up(self) -> None:
        self._engine, self.compile = None, False
        model, reference, cell = self.so3krates, self.pairs.reference, self.pairs.reference_cell
        self.pairs = VerletPairs(self._batch, model.cutoff, model.long_range, model.long_range_cutoff, self._skin)
        if reference is not None:
            self.pairs.restore(reference, cell)


def _float64(x: Tensor | np.ndarray) -> np.ndarray:
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    # writable, because torch looks at the same memory
    return np.require(array, np.float64, ["C", "W"])


def _batch_of(model: SO3krates, structure: Structure) -> Batch:
    """A batch without the check of what the model was trained for: a part of a system has any number of electrons."""
    raw = collate([structure])
    built = neighbors.with_pairs(raw, model.cutoff, model.long_range, model.long_range_cutoff)
    return neighbors.derive(built.to(device=model.device, dtype=model.dtype))


@functools.cache
def _no_native_code(why: str) -> None:
    """Once per process and reason."""
    logger.warning("compile: %s; running SO3krates by torch, which is many times slower", why)
