"""ring polymers -> quantum averages: kinetic energy, spread, and the exact harmonic oscillator to compare with.

A quantum particle at temperature T is equivalent to a ring of P beads, bound to their neighbours by springs of
frequency omega_P = P k T / hbar and each in the physical potential, that is sampled at the temperature P T (Ceriotti,
Parrinello, Markland, Manolopoulos, J. Chem. Phys. 133, 124104 (2010), eqs. 2 to 4):

    H_P = sum_k [ p_k^2 / 2m + m omega_P^2 (q_k - q_(k+1))^2 / 2 + V(q_k) ]

`openmm.RPMDIntegrator` has the same convention. Units are OpenMM's: nm, kJ/mol, amu, ps, kelvin; positions and forces
are ``(..., n_beads, n_atoms, 3)``, with rings that are not torn apart by periodic wrapping.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL, HBAR_KJ_PER_MOL_PS


def ring_frequency(n_beads: int, temperature: float) -> float:
    """omega_P = P k T / hbar in 1/ps.

    Raises `ValueError` for fewer than one bead or a temperature (K) that is not positive.
    """
    if isinstance(n_beads, bool) or int(n_beads) != n_beads or n_beads < 1:
        raise ValueError(f"n_beads: expected a whole number >= 1, got {n_beads!r}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number (K), got {temperature!r}")
    return int(n_beads) * BOLTZMANN_KJ_PER_MOL * temperature / HBAR_KJ_PER_MOL_PS


def centroids(positions: np.ndarray) -> np.ndarray:
    """Mean over the beads, ``(..., n_atoms, 3)`` nm."""
    return np.asarray(positions).mean(axis=-3)


def squared_gyration(positions: np.ndarray) -> np.ndarray:
    """Mean squared distance of an atom's beads from its centroid, ``(..., n_atoms)`` nm^2; classically zero."""
    beads = np.asarray(positions)
    return np.sum((beads - centroids(beads)[..., None, :, :]) ** 2, axis=-1).mean(axis=-2)


def virial_kinetic_energy(positions: np.ndarray, forces: np.ndarray, temperature: float) -> np.ndarray:
    """Centroid virial estimator of each atom's kinetic energy, ``(..., n_atoms)`` kJ/mol.

    K = 3 k T / 2 - (1 / 2P) sum_k (q_k - q_c) . F_k, with physical forces F_k (Herman, Bruskin, Berne,
    J. Chem. Phys. 76, 5150 (1982)). Its fluctuations do not grow with the number of beads.
    """
    beads = np.asarray(positions)
    work = np.sum((beads - centroids(beads)[..., None, :, :]) * np.asarray(forces), axis=-1).mean(axis=-2)
    return 1.5 * BOLTZMANN_KJ_PER_MOL * temperature - 0.5 * work


def primitive_kinetic_energy(positions: np.ndarray, masses: np.ndarray, temperature: float) -> np.ndarray:
    """Primitive estimator of each atom's kinetic energy, ``(..., n_atoms)`` kJ/mol.

    K = 3 P k T / 2 - sum_k m omega_P^2 (q_k - q_(k+1))^2 / (2 P) (Barker, J. Chem. Phys. 70, 2914 (1979)). Needs no
    forces, but fluctuates the more, the more beads there are.

    Args:
        masses: ``(n_atoms,)`` amu.
    """
    beads = np.asarray(positions)
    n_beads = beads.shape[-3]
    omega = ring_frequency(n_beads, temperature)
    stretch = np.sum((beads - np.roll(beads, -1, axis=-3)) ** 2, axis=-1).mean(axis=-2)
    return 1.5 * n_beads * BOLTZMANN_KJ_PER_MOL * temperature - 0.5 * np.asarray(masses) * omega**2 * stretch


@dataclass(frozen=True)
class HarmonicOscillator:
    """Averages of one harmonic degree of freedom.

    Attributes:
        kinetic: kJ/mol; the potential energy is the same. variance: of the position, nm^2.
        gyration: the part of the variance that lies within a ring, nm^2; the centroid has the classical variance.
    """

    kinetic: float
    variance: float
    gyration: float


def harmonic_oscillator(
    frequency: float, mass: float, temperature: float, n_beads: int | None = None
) -> HarmonicOscillator:
    """The exact averages for so many beads, or of quantum mechanics (`n_beads` None).

    The normal modes of a ring have the frequencies omega_k = 2 omega_P sin(pi k / P), and add
    k T / (m (omega_k^2 + omega^2)) each to the variance; the sum tends to hbar coth(hbar omega / 2 k T) / (2 m omega).

    Args:
        frequency: angular, 1/ps. mass: amu. temperature: K.
    """
    thermal = BOLTZMANN_KJ_PER_MOL * temperature
    classical = thermal / (mass * frequency**2)
    if n_beads is None:
        half = HBAR_KJ_PER_MOL_PS * frequency / (2 * thermal)
        variance = HBAR_KJ_PER_MOL_PS / (2 * mass * frequency) / np.tanh(half)
    else:
        omega = 2 * ring_frequency(n_beads, temperature) * np.sin(np.pi * np.arange(n_beads) / n_beads)
        variance = float(np.sum(thermal / (mass * (omega**2 + frequency**2))))
    return HarmonicOscillator(0.5 * mass * frequency**2 * variance, float(variance), float(variance - classical))
