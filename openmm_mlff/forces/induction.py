"""Dipoles that the field of the surroundings induces on the atoms of an ML region."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

TWO_BY_SQRT_PI = 2.0 / math.sqrt(math.pi)


def widths(polarizabilities: np.ndarray) -> np.ndarray:
    """Widths sigma (angstrom) of Gaussian dipoles whose self-interaction is their polarisability (angstrom^3).

    sigma = (sqrt(2/pi) alpha/3)^(1/3): Mayer, Phys. Rev. B 75, 045407 (2007), eq. 14.
    """
    return np.cbrt(np.sqrt(2.0 / np.pi) * polarizabilities / 3.0)


def induced_dipoles(
    positions: np.ndarray, fields: np.ndarray, polarizabilities: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy of mutually coupled Gaussian dipoles in a field, minimised over the dipoles.

    U = min over mu of sum_i |mu_i|^2/(2 alpha_i) + 1/2 sum_ij mu_i T_ij mu_j - sum_i mu_i f_i, where T is the dipole
    tensor of 1/r damped as erf(r/s)/r, s^2 = sigma_i^2 + sigma_j^2 (`widths`).

    Args:
        positions: ``(n, 3)`` angstrom. fields: ``(n, 3)`` e/angstrom^2. polarizabilities: ``(n,)`` angstrom^3; atoms
            with zero carry no dipole.

    Returns: U in e^2/angstrom, dipoles ``(n, 3)`` e angstrom, and -dU/dR at fixed field ``(n, 3)`` e^2/angstrom^2.
    """
    active = np.flatnonzero(polarizabilities > 0.0)
    dipoles, forces = np.zeros_like(fields), np.zeros_like(positions)
    if not len(active):
        return 0.0, dipoles, forces
    alpha = polarizabilities[active]
    r = torch.from_numpy(positions[active]).requires_grad_(True)
    f = torch.from_numpy(fields[active])
    with torch.enable_grad():
        coupling = _tensors(r, torch.from_numpy(widths(alpha))).permute(0, 2, 1, 3).reshape(3 * len(active), -1)
        matrix = coupling + torch.diag(torch.from_numpy(np.repeat(1.0 / alpha, 3)))
        with torch.no_grad():
            # positive definite: Gaussian dipoles of these widths cannot polarise one another without end
            mu = torch.cholesky_solve(f.reshape(-1, 1), torch.linalg.cholesky(matrix)).reshape(-1)
        # at the minimum, the derivative of U is that of its explicit dependence on R
        (gradient,) = torch.autograd.grad(0.5 * mu @ matrix @ mu, r)
    dipoles[active], forces[active] = mu.reshape(-1, 3).numpy(), -gradient.numpy()
    return float(-0.5 * (mu @ f.reshape(-1))), dipoles, forces


def _tensors(r: Tensor, sigma: Tensor) -> Tensor:
    """Damped dipole tensors T ``(n, n, 3, 3)``; zero on the diagonal."""
    n = len(r)
    eye = torch.eye(n, dtype=r.dtype)
    d = r[:, None] - r[None] + eye[..., None]  # no division by zero on the diagonal
    distance = d.norm(dim=-1)
    scale = 1.0 / torch.sqrt(sigma[:, None] ** 2 + sigma[None] ** 2)
    x = scale * distance
    gauss = TWO_BY_SQRT_PI * scale * torch.exp(-x * x)
    # first and second radial derivatives of g = erf(x)/r: g'/r and (g'' - g'/r)/r^2
    slope = (gauss - torch.erf(x) / distance) / distance**2
    bend = -(3.0 * slope + 2.0 * scale**2 * gauss) / distance**2
    outer = d[..., :, None] * d[..., None, :]
    tensors = -(slope[..., None, None] * torch.eye(3, dtype=r.dtype) + bend[..., None, None] * outer)
    return tensors * (1.0 - eye)[..., None, None]
