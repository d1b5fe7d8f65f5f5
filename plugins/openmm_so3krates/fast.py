"""What molecular dynamics runs for SO3krates on the CPU: native code that gives the numbers of the torch form."""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials import native_evaluator, neighbors
from openmm_mlff.potentials.native_evaluator import Compared, Found
from openmm_mlff.potentials.neighbors import VerletPairs
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


class AtomsInEngine:
    """The atoms of one batch in an engine, and their energy with what the engine leaves out (`potential.Members`).

    Args:
        x: features of the atoms before the first layer (see `SO3krates.fixed`). skin: angstrom, of the half lists.

    Attributes:
        pairs: the half lists that the engine keeps.
        tolerance: eV/angstrom, what forces may differ by from those of the torch form.
    """

    def __init__(self, model: SO3krates, engine: Engine, batch: Batch, x: Tensor, skin: float) -> None:
        self._model, self.engine, self._batch = model, engine, batch
        self._atoms = tuple(t.detach().numpy() for t in (batch.numbers, batch.segment, batch.charge, x))
        engine.set_atoms(*self._atoms)
        terms = (model.cutoff, model.long_range, model.long_range_cutoff)
        self._lists = HalfLists(engine, batch, *terms, skin)
        self.pairs: VerletPairs = self._lists
        self.tolerance = TOLERANCE[model.dtype]

    def again(self) -> None:
        """Give the engine, which held other atoms, these and the lists that it had of them."""
        self.engine.set_atoms(*self._atoms)
        self._lists.again()

    def arrays(
        self, positions: np.ndarray, cell: np.ndarray | None = None, potential: np.ndarray | None = None
    ) -> Found:
        """As `potential.Members.arrays`; a model without charges gives None for them."""
        batch = self._batch
        self._lists.give(positions, cell)
        threads = max(1, min(torch.get_num_threads(), batch.n_atoms // ATOMS_PER_THREAD))
        charges, _ = self.engine.forward(positions, cell, threads)
        extra: list[tuple[np.ndarray, np.ndarray]] = []  # energies and forces beside the engine's
        outside = potential
        if potential is not None:
            energies = np.bincount(batch.segment.numpy(), charges * potential, batch.n_structures)
            extra.append((energies, np.zeros(1)))
        if not in_real_space(self._model) and batch.cell is not None:
            energies, pull, forces = self._lattice(charges, positions, cell)
            extra.append((energies, forces))
            outside = pull if outside is None else outside + pull
        if outside is not None:
            outside = np.ascontiguousarray(outside, dtype=np.float64)
        energies, forces = self.engine.backward(outside)
        for more_energy, more_forces in extra:
            energies, forces = energies + more_energy, forces + more_forces
        return energies[None], forces[None], charges[None].copy() if self._model.predicts_charges else None

    def _lattice(
        self, charges: np.ndarray, positions: np.ndarray, cell: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies of the charges with all their images, dE/dq, and forces at constant charges."""
        batch, dtype = self._batch, self._model.dtype
        q = torch.from_numpy(charges.copy()).requires_grad_(True)
        exact = torch.from_numpy(positions)
        r = exact.clone().requires_grad_(True)
        with torch.enable_grad():
            # a mesh has an origin: atoms are moved to the same centre as in the torch form
            centre = batch.sum_by_structure(exact) / batch.counts[:, None]
            box = None if cell is None else torch.from_numpy(cell).to(dtype)
            moved = batch.at((r - batch.per_atom(centre)).to(dtype), box)
            energy = self._model.lattice_energy(moved, q.to(dtype))
            by_charge, by_position = torch.autograd.grad(energy.sum(), [q, r])
        return energy.detach().double().numpy(), by_charge.numpy(), -by_position.numpy()


class NativeEvaluator(native_evaluator.NativeEvaluator):
    """``f(positions, cell=None, potential=None) -> Evaluation`` by native code where it can run.

    As in the base class, with these differences. The native code is compiled within seconds, once per machine and model
    size; where it cannot run (no compiler, or a model that it does not know, `native.unsupported`), one line says so.
    Of a system of more than `COMPARED_ATOMS` atoms a part is compared, and always without an external potential. The
    torch form is never compiled: the compiler of torch 2.13 makes wrong forces of some sizes of this network, by as
    little as one per cent, which the first frame may not show.
    """

    model: SO3krates
    _native: AtomsInEngine | None

    def _make_native(self) -> AtomsInEngine | None:
        reason = unsupported(self.model)
        if reason is not None:
            self.compile = False
            if self.model.device.type == "cpu":
                _no_native_code(reason)
            return None
        try:
            engine = Engine(self.model, electrostatics=in_real_space(self.model))
        except (RuntimeError, OSError) as error:
            _no_native_code(str(error).removeprefix("compile: "))
            # torch's compiler needs the same program
            self.compile = False
            return None
        return AtomsInEngine(self.model, engine, self._batch, self._fixed.x, self._skin)

    def _check(self, positions: np.ndarray, cell: np.ndarray | None, potential: np.ndarray | None) -> None:
        # the native code looks distances up in tables
        check_finite(positions)

    def _compared(
        self, found: Found, positions: np.ndarray, cell: np.ndarray | None, potential: np.ndarray | None
    ) -> tuple[Compared, Compared]:
        """As in the base class, without the potential; of a large system some atoms of the first structure."""
        whole, native = self._batch, self._native
        assert native is not None
        if whole.n_atoms <= COMPARED_ATOMS:
            bare = found if potential is None else native.arrays(positions, cell)
            return super()._compared(bare, positions, cell, None)
        n = min(int(whole.counts[0]), COMPARED_ATOMS)
        batch = _first_atoms(self.model, whole, positions[:n], None if cell is None else cell[0])
        box = None if cell is None else cell[:1]
        exact = self._by_torch(batch, positions[:n], box, None)
        with torch.no_grad():
            x = self.model.fixed(batch).x
        try:
            part = AtomsInEngine(self.model, native.engine, batch, x, self._skin)
            return part.arrays(positions[:n], box)[:2], exact
        finally:
            native.again()

    def _fall_back(self) -> None:
        self.compile = False
        super()._fall_back()


def in_real_space(model: SO3krates) -> bool:
    """Whether the engine holds all electrostatics: none, or no sums over images."""
    return model.electrostatics is None or model.long_range_method == "shifted"


def _first_atoms(model: SO3krates, whole: Batch, positions: np.ndarray, cell: np.ndarray | None) -> Batch:
    """A batch without the check of what the model was trained for: a part of a system has any number of electrons."""
    charge, multiplicity = int(whole.charge[0]), int(whole.multiplicity[0])
    raw = collate([Structure(whole.numbers[: len(positions)].numpy(), positions, charge, multiplicity, cell)])
    built = neighbors.with_pairs(raw, model.cutoff, model.long_range, model.long_range_cutoff)
    return neighbors.derive(built.to(device=model.device, dtype=model.dtype))


@functools.cache
def _no_native_code(why: str) -> None:
    """Once per process and reason."""
    logger.warning("compile: %s; running SO3krates by torch, which is many times slower", why)
