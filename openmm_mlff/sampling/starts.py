"""torsion angles -> start structures: set torsions, remove the clashes, hold them with restraints.

Units: positions in angstrom, angles in degrees, force constants in kJ/mol/rad^2 (they only ever go to OpenMM).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import openmm

from openmm_mlff.data.structures import Structure
from openmm_mlff.units import ANGSTROM_PER_NM, NM_PER_ANGSTROM


@dataclass(frozen=True)
class TorsionRestraint:
    """Harmonic restraint ``k/2 d^2`` on a torsion, d the distance to `center` around the circle.

    Attributes:
        atoms: four atom indices.
        center: degrees. force_constant: kJ/mol/rad^2.
    """

    atoms: tuple[int, int, int, int]
    center: float
    force_constant: float


def bond_graph(numbers: np.ndarray, positions: np.ndarray, scale: float = 1.25) -> np.ndarray:
    """Which atoms are bonded, ``(n_atoms, n_atoms)`` bool: closer than `scale` times the sum of covalent radii."""
    from ase.data import covalent_radii

    radii = covalent_radii[numbers]
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bonded = distances < scale * (radii[:, None] + radii[None])
    np.fill_diagonal(bonded, False)
    return bonded


def torsion_angle(positions: np.ndarray, atoms: Sequence[int]) -> float:
    """Torsion of four atoms in degrees, IUPAC sign, in (-180, 180]."""
    a, b, c, d = positions[list(atoms)]
    axis = (c - b) / np.linalg.norm(c - b)
    n1, n2 = np.cross(b - a, axis), np.cross(axis, d - c)
    return float(np.degrees(np.arctan2(np.dot(np.cross(n1, n2), axis), np.dot(n1, n2))))


def with_bonds(structure: Structure) -> Structure:
    """The structure with its bonds in ``info["topology_bonds"]``, there already or from where its atoms are now.

    Positions from the middle of a run may then take its place: a bond that is stretched in them stays a bond.
    """
    if structure.info.get("topology_bonds") is not None:
        return structure
    bonds = np.argwhere(np.triu(bond_graph(structure.numbers, structure.positions))).tolist()
    return structure.replace(info={**structure.info, "topology_bonds": bonds})


def set_torsion(positions: np.ndarray, bonded: np.ndarray, atoms: Sequence[int], angle: float) -> np.ndarray:
    """Rotate everything on the far side of the central bond so that the torsion is `angle` degrees.

    Raises `ValueError` if the central atoms are not bonded or belong to a ring.
    """
    _, b, c, _ = atoms
    if not bonded[b, c]:
        raise ValueError(f"atoms: expected a bond between atoms {b} and {c} of torsion {tuple(atoms)}, found none")
    far, queue = {c}, [c]
    while queue:
        i = queue.pop()
        for j in np.flatnonzero(bonded[i]).tolist():
            if (i, j) != (c, b) and j not in far:
                far.add(j)
                queue.append(j)
    if b in far:
        raise ValueError(f"atoms: the bond {b}-{c} of torsion {tuple(atoms)} is part of a ring and cannot be rotated")
    turn = np.radians(angle - torsion_angle(positions, atoms))
    axis = positions[c] - positions[b]
    axis = axis / np.linalg.norm(axis)
    moving = np.array(sorted(far))
    v = positions[moving] - positions[c]
    # Rodrigues' rotation formula
    rotated = v * np.cos(turn) + np.cross(axis, v) * np.sin(turn) + np.outer(v @ axis, axis) * (1 - np.cos(turn))
    result = positions.copy()
    result[moving] = positions[c] + rotated
    return result


def torsion_force(torsions: Sequence[TorsionRestraint]) -> openmm.CustomTorsionForce:
    """The restraints as an OpenMM force, periodic in the angle."""
    pi = float(np.pi)
    force = openmm.CustomTorsionForce(f"0.5*k*min(d, {2 * pi}-d)^2; d=abs(theta-theta0)")
    force.addPerTorsionParameter("k")
    force.addPerTorsionParameter("theta0")
    for t in torsions:
        center = (np.radians(t.center) + pi) % (2 * pi) - pi
        force.addTorsion(*t.atoms, [t.force_constant, center])
    return force


def _bonds_apart(bonded: np.ndarray, longest: int) -> np.ndarray:
    """Number of bonds between atoms, ``(n_atoms, n_atoms)``; ``longest + 1`` where it is more than `longest`."""
    n = len(bonded)
    apart = np.where(np.eye(n, dtype=bool), 0, longest + 1)
    reached = np.eye(n, dtype=bool)
    for k in range(1, longest + 1):
        reached = reached | (reached.astype(int) @ bonded.astype(int) > 0)
        apart[reached & (apart > k)] = k
    return apart


def untangle(
    numbers: np.ndarray, start: np.ndarray, positions: np.ndarray, torsions: Sequence[TorsionRestraint]
) -> np.ndarray:
    """Remove clashes that rigid rotation made, keeping bond lengths, angles and the other torsions of `start`.

    A purely geometric force field: harmonic 1-2, 1-3 and 1-4 distances (1-4 only across bonds that were not
    rotated), harmonic torsions, and a soft repulsion below 0.85 times the sum of the van der Waals radii.
    """
    from ase.data.vdw import vdw_radii

    bonded = bond_graph(numbers, start)
    apart = _bonds_apart(bonded, 3)
    rotated = {frozenset(t.atoms[1:3]) for t in torsions}
    radii = np.nan_to_num(vdw_radii[numbers], nan=2.0)
    system = openmm.System()
    for _ in numbers:
        system.addParticle(12.0)
    keep = openmm.HarmonicBondForce()
    repel = openmm.CustomBondForce("2e4*step(r0-r)*(r0-r)^2")
    repel.addPerBondParameter("r0")
    for i, j in itertools.combinations(range(len(numbers)), 2):
        across = {
            frozenset((int(b), int(c)))
            for b in np.flatnonzero(bonded[i])
            for c in np.flatnonzero(bonded[j])
            if bonded[b, c]
        }
        if apart[i, j] < 3 or (apart[i, j] == 3 and not across & rotated):
            keep.addBond(i, j, float(np.linalg.norm(start[i] - start[j])) * NM_PER_ANGSTROM, 5e4 / apart[i, j])
        else:
            repel.addBond(i, j, [0.85 * float(radii[i] + radii[j]) * NM_PER_ANGSTROM])
    for force in (keep, repel, torsion_force([TorsionRestraint(t.atoms, t.center, 500.0) for t in torsions])):
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions * NM_PER_ANGSTROM)
    openmm.LocalEnergyMinimizer.minimize(context, 1.0, 2000)
    return context.getState(positions=True).getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
