"""Positions made whole, and clear errors for what cannot be simulated; atoms are named as the user knows them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from openmm_mlff.potentials.neighbors import COINCIDENT

Describe = Callable[[int], str]
MINIMISER_HINT = " (of a minimiser: pass maxForce=None, or use running.without_force_limit)"


class InstabilityError(RuntimeError):
    """A run that went wrong: NaN or infinite or exploding values, or two atoms at one place.

    Attributes:
        atom: where; the index in the system when it comes out of a `ForceComputation`.
        replica: in which copy, if the force acts on many; else None.
    """

    def __init__(self, message: str, atom: int, replica: int | None = None) -> None:
        super().__init__(message)
        self.atom = atom
        self.replica = replica


class RegionError(ValueError):
    """An open ML region that does not fit into half of the periodic box."""


def make_whole(positions: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """One image of every atom such that an open region in a periodic box is in one piece.

    Every atom is put into the image nearest to the first one along each box vector. If the region spans less than
    half of the box along every box vector in any choice of images, then this finds that choice, and it is the only
    one: no bonds are needed to decide it.

    Args:
        positions: ``(n_atoms, 3)``, in any image, or ``(n_copies, n_atoms, 3)`` for regions that are each made whole
            by themselves. cell: box vectors as rows, ``(3, 3)``; the same unit.

    Raises `RegionError` if the region spans half of the box or more.
    """
    fractional = positions @ np.linalg.inv(cell)
    relative = fractional - fractional[..., :1, :]
    shift = np.rint(relative)
    relative -= shift
    too_wide = (np.ptp(relative, axis=-2) >= 0.5).any(axis=-1)
    if too_wide.any():
        raise _too_wide(fractional if fractional.ndim == 2 else fractional[int(too_wide.argmax())], cell)
    return positions - shift @ cell


def _too_wide(fractional: np.ndarray, cell: np.ndarray) -> RegionError:
    # join nearest images one by one (Prim's tree), to report how wide the region really is
    n = len(fractional)
    whole = fractional.copy()
    joined = np.zeros(n, dtype=bool)
    joined[0] = True
    best = np.full(n, np.inf)
    link = np.zeros((n, 3))
    newest = 0
    for _ in range(n - 1):
        step = fractional - whole[newest]
        step -= np.rint(step)
        distance = np.linalg.norm(step @ cell, axis=1)
        closer = distance < best
        best[closer], link[closer] = distance[closer], whole[newest] + step[closer]
        newest = int(np.where(joined, np.inf, best).argmin())
        whole[newest], joined[newest] = link[newest], True
    span = np.ptp(whole, axis=0)
    axis = int(span.argmax())
    return RegionError(
        f"atoms: the ML region spans {span[axis]:.2f} of the periodic box along box vector {'abc'[axis]} (of length "
        f"{np.linalg.norm(cell[axis]) / 10:.2f} nm), but it is treated as an open molecule and must span less than "
        "half of it; use a larger box or fewer atoms"
    )


def coincident(
    positions: np.ndarray, cell: np.ndarray | None, describe: Describe, when: str
) -> InstabilityError | None:
    """The error for two atoms at the same place, if there are two. Positions and cell in angstrom."""
    if len(positions) < 2:
        return None
    i, j, r = _closest(positions, cell)
    if r >= COINCIDENT:
        return None
    return InstabilityError(f"positions: {describe(i)} and {describe(j)} are at the same place ({when})", i)


def broken_positions(positions: np.ndarray, describe: Describe, when: str) -> InstabilityError:
    """The error for positions that are not finite."""
    i = int(np.argmin(np.isfinite(positions).all(axis=1)))
    return InstabilityError(f"positions: {describe(i)} is at {_vector(positions[i] / 10)} nm ({when})", i)


def unstable(
    energy: float,
    forces: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray | None,
    limit: float,
    describe: Describe,
    when: str,
) -> InstabilityError:
    """The error for an energy (kJ/mol) or forces ``(n_atoms, 3)`` (kJ/mol/nm) that are not finite or too large."""
    same_place = coincident(positions, cell, describe, when)
    if same_place is not None:
        return same_place
    finite = np.isfinite(forces).all(axis=1)
    i = int(np.abs(forces).max(axis=1).argmax()) if finite.all() else int(finite.argmin())
    if finite.all() and np.isfinite(energy):
        what = f"the force of {np.abs(forces[i]).max():.3g} kJ/mol/nm on {describe(i)} exceeds the limit of {limit:.3g}"
    elif finite.all():
        what = f"the energy is {energy}, and the largest force acts on {describe(i)}"
    else:
        what = f"the force on {describe(i)} is {_vector(forces[i])} kJ/mol/nm"
        if not finite.any() and len(positions) > 1:
            # NaN spreads to every atom; the closest two are where it most likely began
            i, j, r = _closest(positions, cell)
            what += f", and on all others too; the closest atoms are {describe(i)} and {describe(j)} ({r / 10:.4f} nm)"
    # the first trial step of OpenMM's minimiser is a long one, which it takes back by itself
    hint = MINIMISER_HINT if when == "step 0" else ""
    return InstabilityError(f"forces: {what} ({when}); the simulation is unstable{hint}", i)


def _closest(positions: np.ndarray, cell: np.ndarray | None) -> tuple[int, int, float]:
    inverse = None if cell is None else np.linalg.inv(cell)
    best = (0, 1, np.inf)
    for i in range(len(positions) - 1):
        d = positions[i + 1 :] - positions[i]
        if cell is not None:
            d -= np.rint(d @ inverse) @ cell
        r = np.linalg.norm(d, axis=1)
        j = int(r.argmin())
        if r[j] < best[2]:
            best = (i, i + 1 + j, float(r[j]))
    return best


def _vector(v: np.ndarray) -> str:
    return "(" + ", ".join(f"{x:.4g}" for x in v) + ")"
