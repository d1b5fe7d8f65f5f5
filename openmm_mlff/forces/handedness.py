"""A wall that keeps a chiral centre from turning into its mirror image, as OpenMM's own force.

Functions of distances have the same energy for a molecule and its mirror image. Where beads may pass through the plane
of a centre and its neighbours, a model of distances lets them stay on the other side. The wall acts on the improper
torsion of the centre and is zero wherever the data are, so it takes no part in what is learnt from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openmm

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.units import KJ_PER_MOL_PER_EV


def handedness_wall(
    positions: np.ndarray, atoms: Sequence[int], height: float = 0.65, share: float = 0.7, group: int = 0
) -> openmm.CustomTorsionForce:
    """``k/2 max(0, theta0 - s theta)^2`` on the improper torsion theta of three neighbours and their centre.

    Args:
        positions: data that must not feel the wall, ``(n, n_particles, 3)``, any unit of length.
        atoms: centre and its three neighbours.
        height: eV where the four lie in a plane (0.65 eV are 25 kT at 300 K); k follows from it.
        share: theta0 as a share of the smallest |theta| in the data.

    Raises `ValueError` naming the argument, also for data that hold both mirror images.
    """
    if len(set(atoms)) != 4:
        raise ValueError(f"atoms: expected a centre and three neighbours, got {list(atoms)}")
    if not height > 0:
        raise ValueError(f"height: expected a positive energy (eV), got {height!r}")
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")
    centre, *neighbours = (int(i) for i in atoms)
    theta = np.radians(dihedral(np.asarray(positions), [*neighbours, centre]))
    sign = float(np.sign(theta.mean()))
    wrong = np.flatnonzero(~(sign * theta > 0))
    if len(wrong):
        raise ValueError(f"positions: expected one handedness, but frame {int(wrong[0])} is the mirror image of others")
    limit = share * float(np.abs(theta).min())
    force = openmm.CustomTorsionForce("0.5*k*max(0, limit - sign*theta)^2")
    for name in ("k", "limit", "sign"):
        force.addPerTorsionParameter(name)
    force.addTorsion(*neighbours, centre, [2.0 * height * KJ_PER_MOL_PER_EV / limit**2, limit, sign])
    force.setName("handedness wall")
    force.setForceGroup(group)
    return force
