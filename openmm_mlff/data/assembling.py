"""molecules -> clusters: waters around a solute, two molecules in contact, fragments far apart.

Everything is placed by trial and rejection from one random number generator; molecules stay rigid. Positions in
angstrom.
"""

from __future__ import annotations

import numpy as np

from openmm_mlff.units import COULOMB_EV_ANGSTROM

#: atoms of different molecules never come closer than this share of the sum of their van der Waals radii ...
CLASH = 0.72
#: ... or than this, where one of them is a hydrogen (short hydrogen bonds have 0.6)
CLASH_HYDROGEN = 0.56
#: charges of oxygen and hydrogen that turn waters towards their neighbours, e (TIP3P; W. L. Jorgensen et al., J. Chem.
#: Phys. 79, 926 (1983))
WATER_CHARGES = np.array([-0.834, 0.417, 0.417])
#: O-H (angstrom) and the angle (degrees) of a water molecule before it relaxes.
WATER_BOND, WATER_ANGLE = 0.96, 104.5
#: how many places are tried for a water; the best one by electrostatics is taken
TRIALS = 60
_ATTEMPTS = 4000


def water_molecule() -> np.ndarray:
    """O, H, H; ``(3, 3)`` angstrom, oxygen at the origin."""
    half = np.radians(WATER_ANGLE) / 2.0
    x, z = WATER_BOND * np.sin(half), WATER_BOND * np.cos(half)
    return np.array([[0.0, 0.0, 0.0], [x, 0.0, z], [-x, 0.0, z]])


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation matrix, uniform over all (QR of normal numbers with positive diagonal and determinant)."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    q[:, 0] *= np.sign(np.linalg.det(q))
    return np.asarray(q)


def random_direction(rng: np.random.Generator) -> np.ndarray:
    """A unit vector, uniform over the sphere."""
    v = rng.normal(size=3)
    return np.asarray(v / np.linalg.norm(v))


def closest_allowed(numbers: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Shortest distances between atoms of different molecules, ``(n, m)`` angstrom."""
    from ase.data import vdw_alvarez
    from ase.data.vdw import vdw_radii

    radii = np.where(np.isnan(vdw_radii), vdw_alvarez.vdw_radii, vdw_radii)
    share = np.where((numbers[:, None] == 1) | (others[None] == 1), CLASH_HYDROGEN, CLASH)
    # ions are smaller than the atoms whose radii these are
    is_metal = np.isin(numbers, (3, 11, 12, 19, 20))[:, None] | np.isin(others, (3, 11, 12, 19, 20))[None]
    share = np.where(is_metal, 0.5, share)
    return np.asarray(share * (radii[numbers][:, None] + radii[others][None]))


def distances_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``(n, m)`` of positions ``(n, 3)`` and ``(m, 3)``."""
    return np.asarray(np.linalg.norm(a[:, None] - b[None], axis=-1))


def clash(numbers: np.ndarray, a: np.ndarray, others: np.ndarray, b: np.ndarray) -> bool:
    """Whether any atom of one molecule is too close to one of another."""
    return bool((distances_between(a, b) < closest_allowed(numbers, others)).any())


def add_waters(
    numbers: np.ndarray, positions: np.ndarray, charges: np.ndarray, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Put waters one by one where they touch what is there, turned as its charges like.

    Of many random places in contact with a heavy atom, the one with the lowest Coulomb energy is taken, with a pull
    to the centre that keeps the cluster round.

    Args:
        numbers: ``(n_atoms,)``, may be empty. positions: ``(n_atoms, 3)``.
        charges: on the atoms, e (formal ones do).

    Returns numbers and positions of everything, waters last. Raises `RuntimeError` if a water finds no place.
    """
    kinds = np.array([8, 1, 1], dtype=np.int64)
    for k in range(n):
        if len(numbers) == 0:
            numbers, positions, charges = kinds, water_molecule() @ random_rotation(rng).T, WATER_CHARGES
            continue
        limits = closest_allowed(kinds, numbers)
        heavy = np.flatnonzero(numbers > 1)
        centre = positions.mean(axis=0)
        best: tuple[float, np.ndarray] | None = None
        found = 0
        for _ in range(_ATTEMPTS):
            contact = positions[rng.choice(heavy)] + rng.uniform(2.3, 3.1) * random_direction(rng)
            water = water_molecule() @ random_rotation(rng).T + contact
            apart = distances_between(water, positions)
            if (apart < limits).any():
                continue
            coulomb = COULOMB_EV_ANGSTROM * float(np.sum(WATER_CHARGES[:, None] * charges[None] / apart))
            score = coulomb + 0.1 * float(np.linalg.norm(contact - centre))
            if best is None or score < best[0]:
                best = score, water
            found += 1
            if found == TRIALS:
                break
        if best is None:
            raise RuntimeError(f"waters: water {k + 1} of {n} found no place in {_ATTEMPTS} attempts")
        numbers, positions = np.concatenate([numbers, kinds]), np.concatenate([positions, best[1]])
        charges = np.concatenate([charges, WATER_CHARGES])
    return numbers, positions


def outward(positions: np.ndarray, bonds: np.ndarray, atom: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vector from an atom away from its bonded neighbours; a random one where these leave none."""
    neighbours = [int(j if i == atom else i) for i, j in bonds if atom in (i, j)]
    if not neighbours:
        return random_direction(rng)
    vectors = positions[neighbours] - positions[atom]
    away = -(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).sum(axis=0)
    length = np.linalg.norm(away)
    if length > 0.3:
        return np.asarray(away / length)
    # flat or tetrahedral surroundings: perpendicular to the plane of two of them
    second = vectors[1] if len(vectors) > 1 else random_direction(rng)
    across = np.cross(vectors[0], second)
    if np.linalg.norm(across) < 1e-3:
        across = np.cross(vectors[0], random_direction(rng))
    return np.asarray(across / np.linalg.norm(across))


def _turned(vector: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A rotation matrix that takes one unit vector to another, with a random turn about the latter."""

    def frame(z: np.ndarray, x: np.ndarray) -> np.ndarray:
        x = x - z * np.dot(x, z)
        x = x / np.linalg.norm(x)
        return np.stack([x, np.cross(z, x), z], axis=1)

    return np.asarray(frame(target, random_direction(rng)) @ frame(vector, random_direction(rng)).T)


def place_in_contact(
    first: tuple[np.ndarray, np.ndarray, np.ndarray, int],
    second: tuple[np.ndarray, np.ndarray, np.ndarray, int],
    distance: float,
    rng: np.random.Generator,
    tilt: float = 15.0,
) -> np.ndarray:
    """Positions of the second molecule with its atom `distance` from that of the first, facing each other.

    Args:
        first, second: numbers, positions, bonds and the index of the atom that makes the contact.
        distance: of these two atoms, angstrom. tilt: standard deviation of the angle off the axis, degrees.

    Raises `RuntimeError` if the molecules overlap in every orientation tried.
    """
    numbers, positions, bonds, i = first
    others, moved, its_bonds, j = second
    limits = closest_allowed(numbers, others)
    limits[i, j] = 0.0
    for attempt in range(300):
        spread = np.radians(tilt) * (1.0 + attempt / 30.0)
        axis = outward(positions, bonds, i, rng) + spread * rng.normal(size=3)
        axis = axis / np.linalg.norm(axis)
        facing = outward(moved, its_bonds, j, rng) + spread * rng.normal(size=3)
        facing = facing / np.linalg.norm(facing)
        turned = (moved - moved[j]) @ _turned(facing, -axis, rng).T + positions[i] + distance * axis
        if not (distances_between(positions, turned) < limits).any():
            return np.asarray(turned)
    raise RuntimeError(f"contact: two molecules overlap in every orientation at {distance:.2f} angstrom")


def place_apart(positions: np.ndarray, moved: np.ndarray, gap: float, rng: np.random.Generator) -> np.ndarray:
    """A molecule turned at random and moved out in a random direction until its nearest atom is `gap` angstrom away.

    Args:
        positions: of everything that is there, ``(n, 3)``. moved: of the molecule, ``(m, 3)``.
    """
    direction = random_direction(rng)
    turned = (moved - moved.mean(axis=0)) @ random_rotation(rng).T + positions.mean(axis=0)
    way = gap + float(np.ptp(positions, axis=0).sum() + np.ptp(turned, axis=0).sum())
    # from outside inwards: the distance to the nearest atom shrinks by no more than the way gone
    while True:
        free = float(distances_between(positions, turned + way * direction).min()) - gap
        if free < 1e-3:
            return np.asarray(turned + way * direction)
        way -= free
