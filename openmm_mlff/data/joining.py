"""labelled structures -> labelled structures of two molecules so far apart that their labels add up.

What a total charge or unpaired electrons do is known to a model for the whole system only. That they belong to one of
two molecules and not to the other has to be learned, and costs no new labels: energies and forces of a molecule, ion or
radical and of a neutral singlet far away are the sums and the union of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openmm_mlff.data.structures import Structure

#: angstrom; an ion and a dipole of 1 e angstrom attract one another by less than 2 meV here
DISTANCE = 100.0


def join_apart(
    structures: Sequence[Structure], n: int, seed: int, distance: float = DISTANCE, largest: int = 12
) -> list[Structure]:
    """n structures made of any of `structures` and a neutral singlet among them, `distance` angstrom apart.

    Half of the first ones are charged or have unpaired electrons, if there are such.

    Args:
        structures: open, with energies and forces; others are left alone.
        largest: atoms of the neutral singlets at most.

    They keep group and info of the first one, and have no dipole (a misplaced charge would weigh `distance` in it).
    Raises `ValueError` if there is no such neutral singlet, and for a distance that is not positive.
    """
    if not distance > 0:
        raise ValueError(f"distance: expected a positive length (angstrom), got {distance!r}")
    labelled = [s for s in structures if s.cell is None and s.energy is not None and s.forces is not None]
    neutral = [s for s in labelled if s.charge == 0 and s.multiplicity == 1 and len(s) <= largest]
    if n > 0 and not neutral:
        raise ValueError(f"structures: expected neutral singlets of at most {largest} atoms to be joined, found none")
    special = [s for s in labelled if s.charge or s.multiplicity > 1]
    random = np.random.default_rng(seed)
    joined = []
    for k in range(n):
        source = special if special and k % 2 == 0 else labelled
        first = source[int(random.integers(len(source)))]
        second = neutral[int(random.integers(len(neutral)))]
        direction = random.normal(size=3)
        joined.append(_joined(first, second, distance * direction / np.linalg.norm(direction)))
    return joined


def _joined(first: Structure, second: Structure, shift: np.ndarray) -> Structure:
    """Centre of the second one `shift` from that of the first one."""
    assert first.energy is not None and second.energy is not None
    assert first.forces is not None and second.forces is not None
    moved = second.positions - second.positions.mean(0) + first.positions.mean(0) + shift
    charges = None
    if first.charges is not None and second.charges is not None:
        charges = np.concatenate([first.charges, second.charges])
    return Structure(
        np.concatenate([first.numbers, second.numbers]),
        np.concatenate([first.positions, moved]),
        first.charge,
        first.multiplicity,
        energy=first.energy + second.energy,
        forces=np.concatenate([first.forces, second.forces]),
        charges=charges,
        group=first.group,
        info={**first.info, "joined_with": second.group},
    )
