"""torsions one after the other, then everything else together: a density of internal coordinates.

    p(y | h) = prod_i p(t_i | h, t_1 ... t_(i-1)) * p(rest | h, t),

t the torsions about rotatable bonds, whose distributions have several peaks and sharp edges: each a mixture of
Gaussians wrapped around the circle. The rest (bonds, angles, impropers) is one `JointMixture`, given all torsions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openmm_led.mixtures import Density, JointMixture, Sampler, pick, softplus, wrapped

#: width of the layer between the trunk and the mixture of one torsion
WIDTH = 32
#: torsions before it, in the order of the tree, on which one depends directly
REACH = 12
#: kernels whose weight is less than this part of the largest one are not drawn from: likelihood does not bring weights
#: of states that z excludes below some 1e-4, and one decoded frame in thousands would be in another state than its z
LEAST_WEIGHT = 0.03


class Autoregressive(Density):
    """Torsions in a chain, the rest together.

    Args:
        torsions: ``(n_out,)``, which coordinates are torsions. kernels: of each torsion's mixture, and of the rest.
    """

    trunk: nn.Linear
    rest: JointMixture
    torsion_index: Tensor
    rest_index: Tensor

    def __init__(self, n_in: int, period: Tensor, torsions: np.ndarray, kernels: int, floor: float) -> None:
        super().__init__(n_in, period)
        self.kernels, self.floor = kernels, floor
        for name, index in (("torsion_index", np.flatnonzero(torsions)), ("rest_index", np.flatnonzero(~torsions))):
            self.register_buffer(name, torch.as_tensor(index), persistent=False)
        n = len(self.torsion_index)
        heads = [nn.Linear(WIDTH, 3 * kernels) for _ in range(n)]
        self.hidden = nn.ModuleList(nn.Linear(n_in + 2 * min(i, REACH), WIDTH) for i in range(n))
        self.heads = nn.ModuleList(heads)
        self.trunk = nn.Linear(n_in + 2 * n, n_in)
        self.rest = JointMixture(n_in, period[self.rest_index], max(1, kernels // 4), floor)
        with torch.no_grad():
            for head in heads:
                head.bias.zero_()
                # centres spread over the circle, in units of the torsion's own width
                head.bias[kernels : 2 * kernels] = torch.linspace(-1.5, 1.5, kernels)

    def set_period(self, period: Tensor) -> None:
        super().set_period(period)
        self.rest.set_period(period[self.rest_index])

    def _circle(self, t: Tensor) -> Tensor:
        """Sines and cosines ``(n, n_torsions, 2)`` of scaled torsions ``(n, n_torsions)``."""
        angle = 2 * math.pi * t / self.period[self.torsion_index]
        return torch.stack([angle.sin(), angle.cos()], -1)

    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        t = y[:, self.torsion_index]
        circle, total = self._circle(t), torch.zeros_like(h[:, 0])
        for i, (hidden, head) in enumerate(zip(self.hidden, self.heads, strict=True)):
            before = circle[:, max(0, i - REACH) : i].flatten(1)
            w, m, s = head(torch.tanh(hidden(torch.cat([h, before], -1)))).chunk(3, -1)
            sigma = self.floor + F.softplus(s)
            period = self.period[self.torsion_index[i]]
            r = wrapped(t[:, i : i + 1] - m, period)
            # a kernel as wide as this one can get is seen in its next images as well
            images = torch.stack([r - period, r, r + period]) / sigma
            logp = torch.logsumexp(-0.5 * images.square(), 0) - sigma.log() - 0.5 * math.log(2 * math.pi)
            total = total - torch.logsumexp(F.log_softmax(w, -1) + logp, -1)
        if len(self.rest_index):
            features = torch.tanh(self.trunk(torch.cat([h, circle.flatten(1)], -1)))
            total = total + self.rest.nll(features, y[:, self.rest_index])
        return total

    def sampler(self) -> Sampler:
        layers = [_arrays(a) + _arrays(b) for a, b in zip(self.hidden, self.heads, strict=True)]
        trunk = _arrays(self.trunk)
        draw_rest = self.rest.sampler() if len(self.rest_index) else None
        torsion, rest = self.torsion_index.cpu().numpy(), self.rest_index.cpu().numpy()
        turn = (2 * np.pi / self.period[self.torsion_index].cpu().numpy()).astype(np.float32)
        k, n_out, floor = self.kernels, self.n_out, self.floor

        def draw(h: np.ndarray, random: np.random.Generator) -> np.ndarray:
            n = len(h)
            y = np.empty((n, n_out), h.dtype)
            circle = np.empty((n, 2 * len(torsion)), h.dtype)
            e = random.standard_normal((n, len(torsion)), dtype=np.float32)
            row = np.arange(n)
            for i, (w0, b0, w1, b1) in enumerate(layers):
                before = circle[:, 2 * max(0, i - REACH) : 2 * i]
                hidden = np.tanh(h @ w0[: h.shape[1]] + before @ w0[h.shape[1] :] + b0)
                raw = hidden @ w1 + b1
                chosen = pick(raw[:, :k], random, LEAST_WEIGHT)
                t = raw[row, k + chosen] + (floor + softplus(raw[row, 2 * k + chosen])) * e[:, i]
                y[:, torsion[i]] = t
                circle[:, 2 * i], circle[:, 2 * i + 1] = np.sin(turn[i] * t), np.cos(turn[i] * t)
            if draw_rest is not None:
                features = np.tanh(h @ trunk[0][: h.shape[1]] + circle @ trunk[0][h.shape[1] :] + trunk[1])
                y[:, rest] = draw_rest(features, random)
            return y

        return draw


def _arrays(linear: nn.Module) -> list[np.ndarray]:
    """Weight, transposed, and bias."""
    return [p.detach().cpu().numpy().T.copy() for p in linear.parameters()]
