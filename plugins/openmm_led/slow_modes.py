"""inputs -> the slowest linear functions of them, in closed form, with as many principal components as data can bear.

Time-lagged independent component analysis on the leading principal components of the inputs (Perez-Hernandez et al.,
J. Chem. Phys. 139, 015102 (2013); Schwantes and Pande, J. Chem. Theory Comput. 9, 2000 (2013)). Trajectories shorter
than what happens in them let a network, and TICA of all inputs, find functions that are constant in each trajectory:
their score is perfect and means nothing. How many components are used, and whether inputs are scaled to unit variance
first, is chosen by the VAMP-2 score of validation trajectories (cross-validation: McGibbon and Pande, J. Chem. Phys.
142, 124105 (2015)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from openmm_led.autoencoder import vamp2

#: numbers of principal components that are tried
COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
#: components with less than this share of the largest variance are rounding
LEAST_VARIANCE = 1e-8


@dataclass(frozen=True)
class SlowModes:
    """A linear encoder and how it was chosen.

    Attributes:
        matrix: ``(n_inputs, latent_dim)``, unit variance, slowest first. components: of the inputs that were used.
        scaled: whether inputs were scaled to unit variance first. score: VAMP-2 of the validation trajectories.
    """

    matrix: np.ndarray
    components: int
    scaled: bool
    score: float


def slow_modes(
    train: np.ndarray, pairs: np.ndarray, valid: np.ndarray, valid_pairs: np.ndarray, lag: int, latent_dim: int
) -> SlowModes:
    """The slowest `latent_dim` linear functions of inputs.

    Args:
        train, valid: inputs ``(n, n_inputs)``, one trajectory after the other. pairs, valid_pairs: first frames of all
            pairs that are `lag` apart in one trajectory.

    Raises `ValueError` for inputs of lower rank than `latent_dim`.
    """
    found = [
        candidate
        for scaled in (False, True)
        for candidate in _candidates(train, pairs, valid, valid_pairs, lag, latent_dim, scaled)
    ]
    if not found:
        raise ValueError(f"latent_dim: expected at most the rank of the inputs, got {latent_dim}")
    return max(found, key=lambda modes: modes.score)


def _candidates(
    train: np.ndarray,
    pairs: np.ndarray,
    valid: np.ndarray,
    valid_pairs: np.ndarray,
    lag: int,
    latent_dim: int,
    scaled: bool,
) -> list[SlowModes]:
    mean, width = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = np.where(width > 1e-7, width, 1.0) if scaled else np.ones(len(mean))
    x = (train - mean) / scale
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    rank = int(np.sum(values > LEAST_VARIANCE * values[-1]))
    most = min(rank, max(COUNTS), len(pairs) // 2)
    axes = vectors[:, ::-1][:, :most] / scale[:, None]
    y = (train - mean) @ axes
    a, b = y[pairs] - y.mean(0), y[pairs + lag] - y.mean(0)
    c0, ct = (a.T @ a + b.T @ b) / (2 * len(a)), (a.T @ b + b.T @ a) / (2 * len(a))
    found = []
    for count in (c for c in sorted({latent_dim, *COUNTS, most}) if latent_dim <= c <= most):
        modes = scipy.linalg.eigh(ct[:count, :count], c0[:count, :count])[1][:, ::-1][:, :latent_dim]
        matrix = axes[:, :count] @ modes
        u = torch.as_tensor((valid - mean) @ matrix)
        found.append(SlowModes(matrix, count, scaled, float(vamp2(u[valid_pairs], u[valid_pairs + lag]))))
    return found
