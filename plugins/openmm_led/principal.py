"""a density for few frames of many coordinates: a mean that depends on the features, and residuals as they were seen.

    p(y | h) = sum_k w_k(h) N(y; m(h) + sqrt(1 - b^2) r_k, b^2 C),   w_k ~ exp(-|h - h_k|^2 / 2 s^2),

r_k = y_k - m(h_k) the residuals of training frames, C their covariance about m, h_k their features. With one kernel
it is a Gaussian, b = 1. C is never inverted to draw: samples have, in every direction, the variance of the data, so
that coordinates that compensate each other along a chain (lever arms) still do, with fewer frames than coordinates.
With many kernels it is a smoothed bootstrap (Efron, Ann. Stat. 7, 1 (1979); shrunk so that the covariance stays C:
Silverman, Density Estimation (1986), section 6.4): neighbours in latent space, each spread along the principal axes.

The mean is learned by least squares; `settle` finds the rest in closed form.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from openmm_led.mixtures import Density, Sampler, pick, wrapped

#: added to the variance along every principal axis, in units of the coordinates' variance
LEAST_VARIANCE = 1e-4
#: kernels whose weights say how far they reach
TYPICAL = 500
#: frames whose likelihood is found at once
ROWS = 64


class Principal(Density):
    """Mean, principal axes of the residuals, and kernels at residuals of training frames.

    Args:
        kernels: how many; 1 for a Gaussian. width: b, of one kernel against the spread of the residuals, below 1.

    Attributes:
        axes: ``(n_out, n_out)``, C = axes.T axes. residuals: ``(kernels, n_out)``. places: ``(kernels, n_in)``, h_k.
        reach: s. settled: whether `settle` was called; before, the density is a Gaussian of unit width.
    """

    axes: Tensor
    residuals: Tensor
    places: Tensor
    reach: Tensor
    settled: Tensor

    def __init__(self, n_in: int, period: Tensor, kernels: int, width: float) -> None:
        super().__init__(n_in, period)
        if kernels > 1 and not 0 < width < 1:
            raise ValueError(f"decoder_floor: expected a width between 0 and 1 for 'principal', got {width!r}")
        self.kernels = kernels
        self.width = width if kernels > 1 else 1.0
        self.head = nn.Linear(n_in, self.n_out)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("axes", torch.eye(self.n_out))
        self.register_buffer("residuals", torch.zeros(kernels, self.n_out))
        self.register_buffer("places", torch.zeros(kernels, n_in))
        self.register_buffer("reach", torch.ones(()))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))

    @property
    def _shrink(self) -> float:
        return math.sqrt(1.0 - self.width**2)

    def settle(self, h: Tensor, y: Tensor) -> None:
        """Residuals, principal axes and reach from training data h ``(n, n_in)``, y ``(n, n_out)``.

        The reach is such that the weights of a typical frame count as sqrt(kernels) equal ones.

        Raises `ValueError` for fewer frames than kernels.
        """
        if len(y) < max(2, self.kernels):
            raise ValueError(f"decoder_kernels: expected at most the {len(y)} training frames, got {self.kernels}")
        with torch.no_grad():
            r = wrapped(y - self.head(h), self.period)
            c = (r.double().T @ r.double()) / len(r)
            values, vectors = torch.linalg.eigh(c)
            self.axes.copy_((values.clamp(min=0.0) + LEAST_VARIANCE).sqrt()[:, None] * vectors.T)
            if self.kernels > 1:
                chosen = torch.linspace(0, len(r) - 1, self.kernels).round().long()
                self.residuals.copy_(r[chosen])
                self.places.copy_(h[chosen])
                some = torch.linspace(0, self.kernels - 1, min(self.kernels, TYPICAL)).round().long()
                self.reach.fill_(_reach(torch.cdist(self.places[some].double(), self.places.double()).square()))
            self.settled.fill_(True)

    def _log_weights(self, h: Tensor) -> Tensor:
        return torch.log_softmax(-0.5 * torch.cdist(h, self.places).square() / self.reach**2, -1)

    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        mean = self.head(h)
        constant = 0.5 * self.n_out * math.log(2 * math.pi)
        if not bool(self.settled):
            return 0.5 * wrapped(y - mean, self.period).square().sum(-1) + constant
        squares = self.axes.square().sum(-1)
        inverse = (self.axes / squares[:, None]).T / self.width
        # every frame against every kernel: a few frames at a time
        logp = torch.cat([self._log_kernels(block, inverse) for block in (y - mean).split(ROWS)])
        constant = constant + self.n_out * math.log(self.width) + 0.5 * float(squares.log().sum())
        return constant - torch.logsumexp(self._log_weights(h) + logp, -1)

    def _log_kernels(self, residual: Tensor, inverse: Tensor) -> Tensor:
        """Logarithms ``(n, kernels)`` of the kernels without their constant, at residuals ``(n, n_out)``."""
        r = wrapped(residual[:, None] - self._shrink * self.residuals, self.period)
        return -0.5 * (r @ inverse).square().sum(-1)

    def sampler(self) -> Sampler:
        weight, bias, axes, residuals, places = (
            p.detach().cpu().numpy() for p in (self.head.weight, self.head.bias, self.axes, self.residuals, self.places)
        )
        weight, axes, residuals = weight.T.copy(), self.width * axes, self._shrink * residuals
        scale, size = 1.0 / float(self.reach) ** 2, 0.5 * np.sum(places**2, -1)

        def draw(h: np.ndarray, random: np.random.Generator) -> np.ndarray:
            y = h @ weight + bias + random.standard_normal((len(h), len(axes)), dtype=np.float32) @ axes
            if len(residuals) > 1:
                # |h|^2 is the same for all kernels
                y = y + residuals[pick(scale * (h @ places.T - size), random)]
            return y

        return draw


def _reach(squares: Tensor) -> float:
    """The width s at which exp(-squares / 2 s^2) ``(n, k)`` has a median perplexity of sqrt(k) per row."""
    wanted = 0.5 * math.log(squares.shape[1])
    low, high = -12.0, 6.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        logw = torch.log_softmax(-0.5 * squares / math.exp(2 * middle), -1)
        entropy = -(logw.exp() * logw).sum(-1).median()
        low, high = (middle, high) if entropy < wanted else (low, middle)
    return math.exp(high)
