"""What OpenMM calls at every step: positions in, energy and forces out, through a PythonForce.

OpenMM pickles the computation into every System XML and every copied force. So `ForceComputation` pickles to one JSON
text (which model, which atoms, which options) and loads the model, by its checksum, when it is first called.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import openmm
import torch

from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.forces import checks
from openmm_mlff.forces.copies import CopiesEvaluator
from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.loading import load_model
from openmm_mlff.forces.uncertainty import FRAMES, Uncertainty, Watch
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

if TYPE_CHECKING:
    from openmm_mlff.potentials.evaluator import Evaluator
    from openmm_mlff.potentials.potential import Potential

logger = logging.getLogger(__name__)

#: number of threads, over the choice by size (environment)
THREADS_VARIABLE = "OPENMM_MLFF_THREADS"
#: below this size more than one thread costs more than it gains
SINGLE_THREAD_MAX_ATOMS = 200
#: in what `ForceComputation.pair_list_state` gives: the other model evaluates
FALLEN_BACK = "fallen_back"


class ForceComputation:
    """The callable behind a PythonForce: ``State -> (energy in kJ/mol, forces (n_atoms, 3) in kJ/mol/nm)``.

    Its import path and its one argument, a JSON text, are stored in System XML files and must stay what they are.

    Attributes:
        spec: what was stored.
        options: `spec` as JSON text.
        offsets: where each copy begins among the atoms of the force, and where the last one ends, ``(replicas + 1,)``.
        energies: of the last call that succeeded, one per copy, ``(replicas,)`` kJ/mol; None before it.
        error: the exception of the last call, without traceback objects; None after a call that succeeded. Its notes
            hold the traceback as text.
        uncertainty: of the last call that succeeded, of an ensemble; else None.
        watch: what follows the uncertainty, if ``spec.uncertainty`` says so; else None.
        other: what evaluates instead since an ensemble that was unsure fell back to another model; else None.
        frames: folder for frames that were uncertain.
        limited: whether large or uncertain forces count (``spec.max_force``, ``spec.uncertainty``); False while a
            minimiser tries steps.
        last_call: when it was called last (`time.monotonic`), 0 before the first call.
    """

    #: what the model is asked for
    outputs: ClassVar[tuple[str, ...]] = ("energy", "forces")

    def __init__(self, spec: str | ForceSpec) -> None:
        self.spec = ForceSpec.from_json(spec) if isinstance(spec, str) else spec
        self.error: BaseException | None = None
        self.options = self._stored()
        self._numbers = np.array(self.spec.numbers, dtype=np.int64)
        self.energies: np.ndarray | None = None
        self._n_atoms = len(self._numbers) * self.spec.replicas
        self.offsets = np.arange(self.spec.replicas + 1) * len(self._numbers)
        self._evaluator: Evaluator | CopiesEvaluator | None = None
        self._own_model: Potential | None = None
        self._cell: np.ndarray | None = None
        self._lock = threading.RLock()
        self.uncertainty: Uncertainty | None = None
        self.watch = None if self.spec.uncertainty is None else Watch(self.spec.uncertainty)
        self.other: ForceComputation | None = None
        self.frames = Path(FRAMES)
        self.limited = True
        self.last_call = 0.0
        _registry.setdefault(self.options, weakref.WeakSet()).add(self)

    def _stored(self) -> str:
        return self.spec.to_json()

    @classmethod
    def normalized(cls, options: str) -> str:
        """Options as this version writes them; raises `ValueError` for a text that holds none."""
        return ForceSpec.from_json(options).to_json()

    def __reduce__(self) -> tuple[Callable[[str], ForceComputation], tuple[str]]:
        return type(self), (self.options,)

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        with self._lock:
            self.last_call = time.monotonic()
            try:
                self.error = None
                self._couple(state)
                return self._watched(state)
            except BaseException as error:
                # OpenMM keeps only the text of an exception, so the text has to hold everything
                text = traceback.format_exc()
                if isinstance(error, checks.InstabilityError):
                    error.atom = self.particle(error.atom)
                self.error = _without_frames(error, text)
            raise _explained(self.error, text)

    def particle(self, i: int) -> int:
        """The index in the system of atom `i` of this force."""
        return i if self.spec.atoms is None else self.spec.atoms[i]

    def describe(self, i: int) -> str:
        """Atom `i` of this force as the user knows it.

        For example ``'atom 17 (C)'`` with the index in the system, or ``'atom 17 (C) of replica 3'`` with the index
        within the copy.
        """
        atoms, n = self.spec.atoms, len(self._numbers)
        replica, inside = divmod(i, n)
        index = self.particle(i)
        symbol = SYMBOLS[self.spec.numbers[inside]]
        if self.spec.replicas == 1:
            return f"atom {index} ({symbol})"
        # copies are laid out alike, so the first one's indices are those within a copy
        return f"atom {inside if atoms is None else atoms[inside]} ({symbol}) of replica {replica}"

    @property
    def model(self) -> Potential:
        """The potential, shared by all computations of this process that ask for the same one.

        One whose energy follows a global parameter is this computation's own, with the parameters of the shared one.
        """
        s = self.spec
        shared = (s.sha256, s.family, s.path, s.precision, s.device, s.long_range_cutoff, s.long_range_method, s.phase)
        if s.coupling_parameter is None:
            return load_model(*shared)
        if self._own_model is None:
            self._own_model = copy.copy(load_model(*shared))
        return self._own_model

    @property
    def compiled(self) -> bool | None:
        """Whether a compiled graph runs; None before the first call."""
        return None if self._evaluator is None else self._evaluator.compiled

    def _evaluate(self, state: openmm.State) -> tuple[float, np.ndarray]:
        positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        if positions.shape != (self._n_atoms, 3):
            raise ValueError(
                f"positions: this force was made for {self._n_atoms} atoms, but the system hands it "
                f"{len(positions)}; create the system anew for the changed topology"
            )
        if not np.isfinite(positions).all():
            raise self._located(checks.broken_positions(positions, self.describe, _when(state)))
        cell = None
        if self.spec.region != "open":
            cell = state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM
            if self.spec.region == "wrapped":
                positions, cell = self._made_whole(positions, cell), None
        self._cell = cell
        with _threads(self._n_threads()):
            try:
                energies, forces = self._get_evaluator(positions, cell).arrays(positions, cell)
            except ValueError as error:
                same_place = self._coincident(positions, cell, _when(state))
                if same_place is None:
                    raise
                raise same_place from error
        energies, forces = energies * KJ_PER_MOL_PER_EV, forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM
        if forces.shape != positions.shape:
            raise ValueError(f"forces: the model returned shape {forces.shape}, expected {positions.shape}")
        limit = np.inf if self.spec.max_force is None or not self.limited else self.spec.max_force
        energy = float(energies.sum())
        # written so that NaN fails too
        if not (np.isfinite(energy) and np.abs(forces).max() <= limit):
            raise self._unstable(energies, forces, positions, cell, limit, _when(state))
        self.energies = energies
        self._note(self._get_evaluator(positions, cell).spreads, positions)
        return energy, np.ascontiguousarray(forces)

    # -- uncertainty -----------------------------------------------------------------------------------------------

    def _watched(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """An evaluation, by the other model if this one has fallen back, or does so now."""
        if self.other is None:
            result = self._evaluate(state)
            if not (self._beyond(state) and self.spec.uncertainty is not None and self.spec.uncertainty.other):
                return result
            self.fall_back()
            instead = self._by_other(state)
            logger.warning(
                "on_uncertain: fell back to %s for the rest of the run; energies go on %+.6g kJ/mol from where they "
                "were (step %d)", self.spec.uncertainty.other.family, instead[0] - result[0], state.getStepCount(),
            )  # fmt: skip
            return instead
        return self._by_other(state)

    def _by_other(self, state: openmm.State) -> tuple[float, np.ndarray]:
        assert self.other is not None
        self.other.limited = self.limited
        result = self.other._evaluate(state)
        self.energies, self.uncertainty = self.other.energies, None
        return result

    def fall_back(self) -> None:
        """Evaluate the model that ``spec.uncertainty`` names instead of this one, from now on."""
        if self.spec.uncertainty is None or self.spec.uncertainty.other is None:
            raise ValueError("fall_back: expected a force made with on_uncertain='fall_back', got another")
        self.other = self._with(other_spec(self.spec))

    def _with(self, spec: ForceSpec) -> ForceComputation:
        """The same force by another model."""
        return ForceComputation(spec)

    def _note(self, spreads: tuple[np.ndarray, np.ndarray] | None, positions: np.ndarray) -> None:
        """Keep how sure the model was of the evaluation at these positions (angstrom)."""
        model = self.model
        if spreads is None or not isinstance(model, Ensemble):
            self.uncertainty = None
            return
        factors = model.config.energy_factor, model.config.force_factor
        self.uncertainty = Uncertainty(factors[0] * spreads[0], factors[1] * spreads[1])
        self._positions = positions

    def _beyond(self, state: openmm.State) -> bool:
        """Whether the last evaluation was too uncertain; what `watch` does about it is done."""
        found, watch, step = self.uncertainty, self.watch, state.getStepCount()
        if found is None or watch is None or not self.limited:
            return False
        try:
            beyond = watch.exceeded(found, step, self.describe)
        except checks.InstabilityError as error:
            raise self._located(error) from None
        if beyond and watch.spec.action == "save" and watch.due(step):
            k = int(np.searchsorted(self.offsets, found.worst, side="right")) - 1
            structure = self._structures(self._positions, self._cell)[k]
            about = {"force_uncertainty": float(found.forces[found.worst]), "step": step, "source": "uncertain"}
            watch.save(self.frames, structure.replace(info={**structure.info, **about}), step)
        return beyond

    def _couple(self, state: openmm.State) -> None:
        """Let the model's coupling follow OpenMM's global parameter, where there is one."""
        if self.spec.coupling_parameter is not None:
            self.model.coupling = state.getParameters()[self.spec.coupling_parameter]

    # -- copies; the slow paths below run only when something is wrong ---------------------------------------------

    def _each(self) -> list[slice]:
        """The atoms of every copy."""
        return [slice(a, b) for a, b in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)]

    def _made_whole(self, positions: np.ndarray, cell: np.ndarray) -> np.ndarray:
        if self.spec.replicas == 1:
            return checks.make_whole(positions, cell)
        copies = positions.reshape(self.spec.replicas, len(self._numbers), 3)
        return checks.make_whole(copies, cell).reshape(-1, 3)

    def _located(self, error: checks.InstabilityError, replica: int | None = None) -> checks.InstabilityError:
        """The error with the index of its atom among all copies, and which copy it is in."""
        if replica is not None:
            error.atom += int(self.offsets[replica])
        if len(self.offsets) > 2:
            error.replica = int(np.searchsorted(self.offsets, error.atom, side="right")) - 1
        return error

    def _describer(self, replica: int) -> checks.Describe:
        return lambda i: self.describe(int(self.offsets[replica]) + i)

    def _coincident(self, positions: np.ndarray, cell: np.ndarray | None, when: str) -> checks.InstabilityError | None:
        for k, atoms in enumerate(self._each()):
            error = checks.coincident(positions[atoms], cell, self._describer(k), when)
            if error is not None:
                return self._located(error, k)
        return None

    def _calm(self, energies: np.ndarray, forces: np.ndarray, limit: float) -> np.ndarray:
        """Which copies have finite energies and forces up to a limit, ``(replicas,)`` bool."""
        largest = np.maximum.reduceat(np.abs(forces).max(axis=1), self.offsets[:-1])
        return np.isfinite(energies) & (largest <= limit)

    def _unstable(
        self,
        energies: np.ndarray,
        forces: np.ndarray,
        positions: np.ndarray,
        cell: np.ndarray | None,
        limit: float,
        when: str,
    ) -> checks.InstabilityError:
        k = int(self._calm(energies, forces, limit).argmin())
        atoms = self._each()[k]
        error = checks.unstable(
            float(energies[k]), forces[atoms], positions[atoms], cell, limit, self._describer(k), when
        )
        return self._located(error, k)

    def _structures(self, positions: np.ndarray, cell: np.ndarray | None) -> list[Structure]:
        """The copies at positions ``(n_atoms of all, 3)`` angstrom."""
        spec = self.spec
        return [
            Structure(self._numbers, positions[atoms], spec.charge, spec.multiplicity, cell) for atoms in self._each()
        ]

    def _get_evaluator(self, positions: np.ndarray, cell: np.ndarray | None) -> Evaluator | CopiesEvaluator:
        if self._evaluator is None:
            spec, model = self.spec, self.model
            structures = self._structures(positions, cell)
            for structure in structures:
                model.check_geometry(structure)
            if spec.replicas == 1:
                self._evaluator = model.evaluator(structures[0], outputs=self.outputs, compile=spec.compile)
            else:
                self._evaluator = CopiesEvaluator(model, structures, spec.compile, spec.batch)
        return self._evaluator

    def _n_threads(self) -> int:
        chosen = os.environ.get(THREADS_VARIABLE) or self.spec.threads
        if chosen is not None:
            return int(chosen)
        return 1 if self._n_atoms <= SINGLE_THREAD_MAX_ATOMS else torch.get_num_threads()

    def pair_list_state(self) -> dict[str, np.ndarray] | None:
        """Positions ``(n_atoms, 3)`` and cell (angstrom) at which the pair lists were built; None if none are kept.

        A resumed run is the same bit for bit only with the same lists: sums have the order of the list. Whether it has
        fallen back to another model is in there too.
        """
        with self._lock:
            if self.other is not None:
                return {**(self.other.pair_list_state() or {}), FALLEN_BACK: np.array(1)}
            pairs = None if self._evaluator is None else self._evaluator.pairs
            reference = None if pairs is None else pairs.reference
            if reference is None:
                return None
            found = {"positions": reference.cpu().numpy().copy()}
            if self._cell is not None:
                # the list is rebuilt whenever the box changes, so the last box is the list's
                found["cell"] = self._cell.copy()
            return found

    def restore_pair_list(self, saved: dict[str, np.ndarray] | None) -> None:
        """Build the pair lists at the positions that `pair_list_state` gave."""
        if saved is None:
            return
        with self._lock:
            if FALLEN_BACK in saved:
                if self.other is None:
                    self.fall_back()
                assert self.other is not None
                self.other.restore_pair_list({k: v for k, v in saved.items() if k != FALLEN_BACK} or None)
                return
            positions = np.array(saved["positions"], dtype=np.float64)
            cell = np.array(saved["cell"], dtype=np.float64) if "cell" in saved else None
            evaluator = self._get_evaluator(positions, cell)
            device = self.model.device
            box = None if cell is None else torch.as_tensor(cell, device=device)[None]
            evaluator.pairs.restore(torch.as_tensor(positions, device=device), box)


_registry: dict[str, weakref.WeakSet[ForceComputation]] = {}


def living(options: str) -> list[ForceComputation]:
    """The computations of this process with these options (JSON), the last called first."""
    return sorted(_registry.get(options, ()), key=lambda c: c.last_call, reverse=True)


def other_spec(spec: ForceSpec) -> ForceSpec:
    """What a force is stored as that evaluates, for the same atoms, the model which `spec` falls back to."""
    assert spec.uncertainty is not None and spec.uncertainty.other is not None
    named = dataclasses.asdict(spec.uncertainty.other)
    return dataclasses.replace(spec, **named, long_range_method="shifted", coupling_parameter=None, uncertainty=None)


class ForceError(RuntimeError):
    """What OpenMM is given when a computation fails; the message holds the original error and its traceback."""


def make_force(
    computation: ForceComputation, particles: Sequence[int] | None = None, periodic: bool = False, group: int = 0
) -> openmm.Force:
    """The OpenMM force that runs a computation; the only place that names a force class.

    This is the seam for openmm-torch's PythonTorchForce (positions and forces as tensors that never leave the GPU):
    it is on openmm-torch's main branch but in no release, so `openmm.PythonForce` is the only choice now.

    Args:
        particles: indices in the system, in the order of the computation's atoms; None for all particles.
        periodic: whether the computation wants box vectors.
        group: the force group.
    """
    parameter = computation.spec.coupling_parameter
    force = openmm.PythonForce(computation, {} if parameter is None else {parameter: 1.0})
    force.setName(f"{computation.spec.family} (openmm-mlff)")
    if particles is not None:
        force.setParticles([int(i) for i in particles])
    force.setUsesPeriodicBoundaryConditions(periodic)
    force.setForceGroup(group)
    return force


# -- details -----------------------------------------------------------------------------------------------------


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if n == before:
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _when(state: openmm.State) -> str:
    return f"step {state.getStepCount()}"


def _without_frames(error: BaseException, text: str) -> BaseException:
    """The error with its traceback as a note, and without the frames that would keep OpenMM's State alive."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    error.add_note(text)
    return error


def _explained(error: BaseException, text: str) -> BaseException:
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt("KeyboardInterrupt: interrupted during the evaluation of the ML potential")
    if isinstance(error, SystemExit):
        return SystemExit(f"SystemExit: {error.code} during the evaluation of the ML potential")
    return ForceError(f"{error}\n({type(error).__name__} in the ML potential)\n\n{text}")
