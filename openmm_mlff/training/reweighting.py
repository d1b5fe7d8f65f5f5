"""stored frames, energies under other parameters -> weights, averages and free energies that can be differentiated.

Pure functions of reduced (dimensionless) energies u = U/kT, in PyTorch, with float64 inside. Frames x_i were sampled
with the old potential; under the new one they count with the weights

    w_i = exp(-(u_new(x_i) - u_old(x_i))) / sum_j exp(-(u_new(x_j) - u_old(x_j)))

(S. Thaler, J. Zavadlav, Nat. Commun. 12, 6884 (2021), eqs. 4 to 6). The same frames give the difference of free
energies df = -ln <exp(-(u_new - u_old))>_old (R. W. Zwanzig, J. Chem. Phys. 22, 1420 (1954)), whose gradient is
sum_i w_i du_new(x_i)/dtheta: no trajectory is differentiated. Estimates with error bars are in `analysis.free_energy`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _series(name: str, values: Tensor) -> Tensor:
    """The values in float64, or a `ValueError` naming the argument."""
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name}: expected shape (n,) with n >= 1, got {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name}: expected finite numbers, got {bad} of {len(values)} that are not")
    return values.double()


def weights(u_new: Tensor, u_old: Tensor) -> Tensor:
    """Weights of frames under the new potential, ``(n,)`` float64 with sum 1; differentiable.

    Args:
        u_new: reduced energies of the frames under the new potential, ``(n,)``.
        u_old: under the potential that sampled them, ``(n,)``; any constant may be missing from both.

    Raises `ValueError` for other shapes, or energies that are not finite.
    """
    new, old = _series("u_new", u_new), _series("u_old", u_old)
    if new.shape != old.shape:
        raise ValueError(f"u_old: expected shape {tuple(new.shape)} as u_new, got {tuple(old.shape)}")
    return torch.softmax(old - new, dim=0)


def effective_sample_size(w: Tensor) -> Tensor:
    """exp(-sum_i w_i ln w_i), a scalar between 1 and n: how many frames carry the weights ``(n,)``; differentiable."""
    w = _series("w", w)
    # w ln w goes to 0 with w; the bound keeps its gradient finite there
    return torch.exp(-(w * torch.log(w.clamp_min(torch.finfo(w.dtype).tiny))).sum())


def average(w: Tensor, values: Tensor) -> Tensor:
    """sum_i w_i values_i, shape ``(...)``, for values ``(n, ...)``; differentiable in both."""
    w = _series("w", w)
    if values.shape[:1] != w.shape:
        raise ValueError(f"values: expected {len(w)} rows, one per weight, got shape {tuple(values.shape)}")
    return torch.tensordot(w, values.double(), dims=1)


def zwanzig(du: Tensor) -> Tensor:
    """f_new - f_old = -ln <exp(-du)>_old, a scalar; its gradient is sum_i w_i ddu_i/dtheta.

    Args:
        du: u_new - u_old of frames sampled with the old potential, reduced, ``(n,)``.
    """
    du = _series("du", du)
    return math.log(len(du)) - torch.logsumexp(-du, dim=0)


@torch.no_grad()
def bar(w_f: Tensor, w_r: Tensor, tolerance: float = 1e-12) -> Tensor:
    """f_1 - f_0 by Bennett's acceptance ratio, a float64 scalar without gradient.

    Solves sum_F 1/(1 + exp(ln(n_F/n_R) + w_F - df)) = sum_R 1/(1 + exp(-ln(n_F/n_R) + w_R + df)) by bisection
    (C. H. Bennett, J. Comput. Phys. 22, 245 (1976), eqs. 12a and 12b); the difference of the two sides rises with df,
    so that there is one root.

    Args:
        w_f: u_1 - u_0 of frames sampled in state 0, ``(n_f,)``. w_r: u_0 - u_1 of frames of state 1, ``(n_r,)``.
        tolerance: width of the last bracket.
    """
    w_f, w_r = _series("w_f", w_f), _series("w_r", w_r)
    shift = math.log(len(w_f) / len(w_r))

    def imbalance(df: Tensor) -> Tensor:
        return torch.sigmoid(df - shift - w_f).sum() - torch.sigmoid(shift - df - w_r).sum()

    ends = torch.cat([w_f, -w_r])
    low, high = ends.min() + shift - 1.0, ends.max() + shift + 1.0
    step = high - low
    while imbalance(low) > 0:
        low, step = low - step, 2 * step
    while imbalance(high) < 0:
        high, step = high + step, 2 * step
    # float64 cannot tell apart numbers closer than this
    width = max(tolerance, 4 * torch.finfo(torch.float64).eps * float(ends.abs().max()))
    while high - low > width:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if imbalance(middle) > 0:
            high = middle
        else:
            low = middle
    return 0.5 * (low + high)


def _fermi(w_f: Tensor, w_r: Tensor, df: float) -> tuple[Tensor, Tensor]:
    """Probability of every frame to come from the other ensemble."""
    shift = math.log(len(w_f) / len(w_r))
    return torch.sigmoid(df - shift - w_f), torch.sigmoid(shift - df - w_r)


def bar_overlap(w_f: Tensor, w_r: Tensor, df: float) -> float:
    """Least off-diagonal element of the overlap matrix of two ensembles, as `analysis.free_energy.bar` finds it."""
    return float(sum((f * (1.0 - f)).sum() for f in _fermi(w_f, w_r, df))) / max(len(w_f), len(w_r))


def bar_variance(w_f: Tensor, w_r: Tensor, df: float) -> float:
    """Variance of Bennett's estimate `df` from uncorrelated frames.

    C. H. Bennett, J. Comput. Phys. 22, 245 (1976), eq. 10b, with Fermi functions at the estimate; arguments as for
    `bar`.
    """
    total = 0.0
    for f in _fermi(w_f, w_r, df):
        mean = float(f.mean())
        total += (float(f.square().mean()) / max(mean, 1e-300) ** 2 - 1.0) / len(f)
    return total
