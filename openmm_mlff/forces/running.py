"""What a running simulation can be asked: why an ML force failed, and which pair lists belong into a checkpoint.

OpenMM gives no way from a force to its Python function, and a CustomCVForce copies its inner forces for every Context.
So the computations of a system are those of this process that carry the same options as its forces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openmm

from openmm_mlff.forces.python_force import ForceComputation, living
from openmm_mlff.forces.serialization import stored_options
from openmm_mlff.forces.uncertainty import Uncertainty


def computations(source: openmm.System | openmm.Force) -> list[ForceComputation]:
    """The computations behind the ML forces of a system, or behind one force, the last called first."""
    found = [c for options in _options(source) for c in living(options)]
    return sorted(found, key=lambda c: c.last_call, reverse=True)


def last_error(source: openmm.System | openmm.Force) -> BaseException | None:
    """The exception that stopped the last evaluation of an ML force in `source`, with its real type.

    OpenMM turns every exception of a PythonForce into an `OpenMMException`, `KeyboardInterrupt` too. The traceback is
    in the exception's ``__notes__``. None if the last evaluation succeeded, or if there was none.
    """
    called = computations(source)
    return called[0].error if called else None


@contextmanager
def without_force_limit(source: openmm.System | openmm.Force) -> Iterator[None]:
    """Let the ML forces of a system be as large as they like meanwhile, as long as they are finite.

    For minimisers: their first trial step may press atoms into one another, and they go back by themselves.
    """
    affected = computations(source)
    for computation in affected:
        computation.limited = False
    try:
        yield
    finally:
        for computation in affected:
            computation.limited = True


def interrupted(error: BaseException) -> bool:
    """Whether an exception of OpenMM is a Ctrl-C in disguise.

    A `KeyboardInterrupt` that comes while a PythonForce is called leaves OpenMM as an `OpenMMException`: with our text
    if it came inside `ForceComputation`, with no text, or that of a missing object, if it came at its door.
    """
    text = str(error)
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, openmm.OpenMMException) and (text in ("", "<NULL>") or text.startswith("KeyboardInterrupt"))
    )


def pair_list_state(source: openmm.System | openmm.Force) -> list[dict[str, np.ndarray]]:
    """Where the pair lists of all ML forces were built, for a checkpoint: arrays ``positions`` and ``cell`` (angstrom).

    Empty dictionaries stand for forces that keep no list. See `ForceComputation.pair_list_state`.
    """
    # the last called one is that of the Context which ran
    return [c.pair_list_state() or {} for c in _last_called(source)]


def restore_pair_lists(source: openmm.System | openmm.Force, saved: Sequence[dict[str, np.ndarray]]) -> None:
    """Give the ML forces of a system the pair lists of a checkpoint; call it when the Context exists.

    Raises `ValueError` if `saved` comes from another number of ML forces.
    """
    stored = [options for options in _options(source) if living(options)]
    if len(stored) != len(saved):
        raise ValueError(f"saved: expected the pair lists of {len(stored)} ML forces, got {len(saved)}")
    for options, state in zip(stored, saved, strict=True):
        for computation in living(options):
            computation.restore_pair_list(state or None)


def uncertainty(source: openmm.System | openmm.Force) -> Uncertainty | None:
    """How sure the ML forces of a system were in their last evaluation: energies (eV) and forces (eV/angstrom).

    Of several forces, the one whose force on an atom is the most uncertain; None if none of them has an uncertainty.
    """
    found = [c.uncertainty for c in _last_called(source) if c.uncertainty is not None]
    return max(found, key=lambda u: float(u.forces.max()), default=None)


def most_uncertain(source: openmm.System | openmm.Force) -> tuple[float, float, int] | None:
    """Uncertainty of the energy (eV, the largest of all copies) and of the worst force (eV/angstrom), and its atom.

    The atom's index is that in the system. None where `uncertainty` is None.
    """
    called = [c for c in _last_called(source) if c.uncertainty is not None]
    if not called:
        return None
    worst = max(called, key=lambda c: float(c.uncertainty.forces.max()))  # type: ignore[union-attr]
    found = worst.uncertainty
    assert found is not None
    return float(found.energies.max()), float(found.forces.max()), worst.particle(found.worst)


def save_uncertain_frames(source: openmm.System | openmm.Force, folder: str | Path) -> None:
    """Where forces made with on_uncertain='save' write frames; call it when the Context exists.

    Without it they go to ``uncertain_frames`` in the working directory.
    """
    for computation in computations(source):
        computation.frames = Path(folder)


def _last_called(source: openmm.System | openmm.Force) -> list[ForceComputation]:
    """Of each ML force, the computation that was called last: that of the Context which ran."""
    return [living(options)[0] for options in _options(source) if living(options)]


def _options(source: openmm.System | openmm.Force) -> list[str]:
    forces = source.getForces() if isinstance(source, openmm.System) else [source]
    return sorted({options for force in forces for options in stored_options(force)})
