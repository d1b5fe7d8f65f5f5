"""trajectory -> torsions, free energies, and averages with error bars.

Angles in degrees in [-180, 180); energies in the unit of the input unless stated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

if TYPE_CHECKING:
    from openmm.app import Topology


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error; `samples` is the number of independent samples that it rests on."""

    value: float
    error: float
    samples: float

    def __str__(self) -> str:
        return f"{self.value:.6g} +- {self.error:.2g}"


def dihedral(positions: np.ndarray, atoms: np.ndarray | Iterable[int]) -> np.ndarray:
    """Torsion angles, IUPAC sign (looking along j->k, clockwise from i to l is positive).

    Args:
        positions: ``(..., n_atoms, 3)``, any unit of length, molecules whole.
        atoms: four indices, or ``(n_torsions, 4)``.

    Returns:
        ``(...)`` or ``(..., n_torsions)`` degrees. NaN where three neighbouring atoms are collinear.
    """
    index = np.asarray(atoms, dtype=np.int64)
    i, j, k, m = (np.asarray(positions)[..., index[..., n], :] for n in range(4))
    axis = k - j
    length = np.linalg.norm(axis, axis=-1)
    normal_1, normal_2 = np.cross(j - i, axis), np.cross(axis, m - k)
    sine = np.sum((j - i) * normal_2, axis=-1) * length
    cosine = np.sum(normal_1 * normal_2, axis=-1)
    angle = np.degrees(np.arctan2(sine, cosine))
    degenerate = (sine == 0) & (cosine == 0)
    return np.where(degenerate, np.nan, np.where(angle >= 180.0, angle - 360.0, angle))


def backbone_torsions(topology: Topology, atoms: Iterable[int] | None = None) -> dict[str, tuple[int, int, int, int]]:
    """phi (C-N-CA-C) and psi (N-CA-C-N) of every residue that has them, also between caps such as ACE and NME.

    Neighbouring residues are those that follow one another in a chain. With `atoms`, only torsions whose atoms all
    belong to it. Names are ``phi`` and ``psi`` for a single residue, else ``phi_ALA2`` and so on.
    """
    wanted = None if atoms is None else set(atoms)
    found: list[tuple[str, str, tuple[int, int, int, int]]] = []
    for chain in topology.chains():
        residues = [{a.name: a.index for a in r.atoms()} | {"": r} for r in chain.residues()]
        for n, names in enumerate(residues):
            if not {"N", "CA", "C"} <= set(names):
                continue
            here = (names["N"], names["CA"], names["C"])
            label = f"{names[''].name}{names[''].id}"
            if n > 0 and "C" in residues[n - 1]:
                found.append(("phi", label, (residues[n - 1]["C"], *here)))
            if n + 1 < len(residues) and "N" in residues[n + 1]:
                found.append(("psi", label, (*here, residues[n + 1]["N"])))
    found = [f for f in found if wanted is None or wanted.issuperset(f[2])]
    if len({label for _, label, _ in found}) <= 1:
        return {kind: quartet for kind, _, quartet in found}
    return {f"{kind}_{label}": quartet for kind, label, quartet in found}


def ramachandran_histogram(
    phi: np.ndarray, psi: np.ndarray, bins: int = 36, weights: np.ndarray | None = None
) -> np.ndarray:
    """Probability of each cell of the (phi, psi) plane, ``(bins, bins)``, first axis phi; sums to one.

    Raises `ValueError` if there is no sample or the lengths differ.
    """
    phi, psi = np.asarray(phi, dtype=float), np.asarray(psi, dtype=float)
    if phi.shape != psi.shape or phi.size == 0:
        raise ValueError(f"phi, psi: expected the same positive number of samples, got {phi.shape} and {psi.shape}")
    cell = [np.floor((np.asarray(x) + 180.0) / (360.0 / bins)).astype(int) % bins for x in (phi, psi)]
    counts = np.zeros((bins, bins))
    np.add.at(counts, (cell[0], cell[1]), 1.0 if weights is None else np.asarray(weights, dtype=float))
    return counts / counts.sum()


def ramachandran_free_energy(
    phi: np.ndarray, psi: np.ndarray, temperature: float, bins: int = 36, weights: np.ndarray | None = None
) -> np.ndarray:
    """-kT ln p of each cell in kJ/mol, zero at the minimum, infinite where no sample fell; ``(bins, bins)``."""
    with np.errstate(divide="ignore"):
        energy = -BOLTZMANN_KJ_PER_MOL * temperature * np.log(ramachandran_histogram(phi, psi, bins, weights))
    return energy - energy.min()


def statistical_inefficiency(series: np.ndarray) -> float:
    """g = 1 + 2 tau of a stationary series: how many correlated samples are worth one independent sample.

    The autocorrelation is summed up to its first zero, with a window that shortens as 1 - t/N
    (Chodera et al., J. Chem. Theory Comput. 3, 26 (2007), eq. 20). At least 1; 1 for a constant series.
    """
    x = np.asarray(series, dtype=float)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"series: expected at least two samples in one dimension, got shape {x.shape}")
    n = len(x)
    centred = x - x.mean()
    if not centred.any():
        return 1.0
    size = 2 ** int(np.ceil(np.log2(2 * n)))
    spectrum = np.abs(np.fft.rfft(centred, size)) ** 2
    correlation = np.fft.irfft(spectrum, size)[:n] / np.arange(n, 0, -1)
    correlation /= correlation[0]
    below = np.flatnonzero(correlation[1:] <= 0)
    last = int(below[0]) + 1 if len(below) else n
    lag = np.arange(1, last)
    return max(1.0, float(1.0 + 2.0 * np.sum((1.0 - lag / n) * correlation[1:last])))


def mean_with_error(series: np.ndarray) -> Estimate:
    """Mean of a correlated series and its standard error, sigma sqrt(g / N)."""
    x = np.asarray(series, dtype=float)
    independent = len(x) / statistical_inefficiency(x)
    return Estimate(float(x.mean()), float(x.std(ddof=1) / np.sqrt(independent)), float(independent))


def block_average(series: np.ndarray, least_blocks: int = 8) -> Estimate:
    """Mean and its standard error from blocks of growing length.

    Flyvbjerg and Petersen, J. Chem. Phys. 91, 461 (1989): pairs of neighbours are averaged again and again; the error
    of the mean grows until the blocks are independent. Returned is the largest error among the levels that still
    have `least_blocks` blocks.
    """
    x = np.asarray(series, dtype=float)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"series: expected at least two samples in one dimension, got shape {x.shape}")
    mean, best, blocks = float(x.mean()), 0.0, len(x)
    while len(x) >= max(2, least_blocks) or best == 0.0:
        error = float(x.std(ddof=1) / np.sqrt(len(x)))
        if error >= best:
            best, blocks = error, len(x)
        if len(x) < 4:
            break
        x = x[: len(x) // 2 * 2].reshape(-1, 2).mean(axis=1)
    return Estimate(mean, best, float(blocks))


def energy_drift(time: np.ndarray, energy: np.ndarray, n_atoms: int) -> Estimate:
    """Slope of the total energy of an NVE run by a straight-line fit, per atom.

    Args:
        time: ``(n,)`` ps. energy: ``(n,)`` eV. n_atoms: that the drift is divided by.

    Returns:
        eV/atom/ps. The standard error is that of ordinary least squares times sqrt(g), g being the statistical
        inefficiency of the residuals, because the fluctuations of neighbouring frames are correlated.
    """
    t, e = np.asarray(time, dtype=float), np.asarray(energy, dtype=float)
    if t.shape != e.shape or t.ndim != 1 or len(t) < 3:
        raise ValueError(f"time, energy: expected at least three samples of each, got {t.shape} and {e.shape}")
    centred = t - t.mean()
    spread = float(np.sum(centred**2))
    slope = float(np.sum(centred * e) / spread)
    residual = e - e.mean() - slope * centred
    g = statistical_inefficiency(residual)
    error = np.sqrt(np.sum(residual**2) / (len(t) - 2) / spread * g)
    return Estimate(slope / n_atoms, float(error) / n_atoms, len(t) / g)


def read_table(path: Any) -> dict[str, np.ndarray]:
    """Columns of a ``log.csv`` by name; raises `ValueError` if the file has no rows."""
    with open(path, encoding="utf-8") as file:
        names = file.readline().strip().split(",")
        rows = [[float(x) for x in line.split(",")] for line in file if line.strip()]
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none")
    return dict(zip(names, np.array(rows).T, strict=True))
