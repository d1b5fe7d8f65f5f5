"""superposition, signed volumes, and typical values of internal coordinates."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from openmm_led.zmatrix import Array, check_array, on_torch


def superpose(positions: Array, reference: np.ndarray) -> Array:
    """Positions moved and turned (never mirrored) onto a reference with the least root mean square deviation.

    Kabsch, Acta Cryst. A 32, 922 (1976), without weights.

    Args:
        positions: ``(n, n_atoms, 3)``. reference: ``(n_atoms, 3)``, same unit.
    """
    target = np.asarray(reference, dtype=np.float64)
    check_array("reference", target[None], *positions.shape[1:])
    check_array("positions", positions, len(target), 3)
    centre = target.mean(0)
    return on_torch(
        lambda x: (
            superpose_centred(x, torch.from_numpy(target - centre).to(x.device)) + torch.from_numpy(centre).to(x.device)
        ),
        positions,
    )


def superpose_centred(positions: Tensor, centred: Tensor) -> Tensor:
    """Onto a centred reference ``(n_atoms, 3)``; differentiable (once)."""
    moved = positions - positions.mean(1, keepdim=True)
    covariance = moved.transpose(1, 2) @ centred
    with torch.no_grad():
        u, _, vt = torch.linalg.svd(covariance)
        sign = torch.ones_like(u[:, 0])
        sign[:, 2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vt))
        rotation = (u * sign[:, None]) @ vt
    if covariance.requires_grad:
        rotation = rotation @ _turned(rotation.transpose(1, 2) @ covariance)
    return moved @ rotation


def _turned(stretch: Tensor) -> Tensor:
    """1 + W with W = 0 to rounding, and the gradient of the best rotation, for ``R^T C = S``, ``(n, 3, 3)``.

    Where C changes, so does its rotation by R W, with the antisymmetric W from W S + S W = A, A the antisymmetric part
    R^T dC - dC^T R; as axial vectors, (tr S - S) w = a. Unlike the derivative of the singular vectors, this stays
    finite where singular values are equal.
    """
    with torch.no_grad():
        eye = torch.eye(3, dtype=stretch.dtype, device=stretch.device)
        stiffness = stretch.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] * eye - stretch
    odd = stretch - stretch.transpose(1, 2)
    axial = torch.stack([odd[:, 2, 1], odd[:, 0, 2], odd[:, 1, 0]], -1)
    w = torch.linalg.solve(stiffness, axial[..., None])[..., 0]
    zero = torch.zeros_like(w[:, 0])
    rows = [zero, -w[:, 2], w[:, 1], w[:, 2], zero, -w[:, 0], -w[:, 1], w[:, 0], zero]
    return eye + torch.stack(rows, -1).unflatten(1, (3, 3))


def signed_volumes(positions: Tensor, index: np.ndarray) -> Tensor:
    """``(a - c) . ((b - c) x (d - c))`` of rows (c, a, b, d) of atoms, ``(n, n_rows)``."""
    centre, a, b, d = (positions[:, torch.from_numpy(index[:, k]).to(positions.device)] for k in range(4))
    return ((a - centre) * torch.linalg.cross(b - centre, d - centre)).sum(-1)


def typical(values: np.ndarray, kind: str) -> float:
    """One value for many ``(n,)``: the mean of bonds and angles, the circular mean of improper offsets, and the most
    populated value of dihedrals; rad."""
    if kind in ("bond", "angle"):
        return float(values.mean())
    if kind == "improper":
        return float(np.angle(np.exp(1j * values).mean()))
    # most populated: the 5 degree cell with most samples within three cells, then the circular mean around it
    counts = np.bincount(((values + math.pi) / (2 * math.pi) * 72).astype(int) % 72, minlength=72)
    around = sum(np.roll(counts, shift) for shift in range(-3, 4))
    peak = (int(np.argmax(around)) + 0.5) * 2 * math.pi / 72 - math.pi
    apart = np.angle(np.exp(1j * (values - peak)))
    return float(np.angle(np.exp(1j * (peak + apart[np.abs(apart) <= 3.5 * 2 * math.pi / 72].mean()))))
