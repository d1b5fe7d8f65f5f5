"""the latent propagator: a recurrent network whose memory feeds a mixture density for the next latent state.

    m(t) = cell(z(t), m(t - dt));   p(z(t + dt) | past) = sum_k w_k N(z; z(t) + d_k, S_k A_k^-1 A_k^-T S_k),

w, d, S, A functions of (m(t), z(t)) (mixture density network on an LSTM or GRU; Bishop 1994; Vlachas et al. 2022).
Trained by maximum likelihood with teacher forcing along the trajectories; the memory is carried on from chunk to chunk
and the gradient is not (stateful truncated back-propagation through time).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from openmm_led.config import LEDConfig
from openmm_led.mixtures import JointMixture


class LatentRNN(nn.Module):
    """Cell, trunk and mixture of one propagator."""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__()
        d, h = config.latent_dim, config.hidden
        self.config = config
        cell = nn.LSTM if config.cell == "lstm" else nn.GRU
        self.cell = cell(d, h, config.layers, batch_first=True)
        for name, p in self.cell.named_parameters():
            if "weight_hh" in name:
                for block in p.data.split(h):
                    nn.init.orthogonal_(block)
        self.trunk = nn.Linear(h + d, h)
        self.density = JointMixture(h, torch.full((d,), math.inf), config.kernels, config.floor, coupling="input")
        with torch.no_grad():
            # steps are shorter than the latent space is wide
            self.density.head.bias[config.kernels :].mul_(0.3)

    def blank(self, n: int) -> tuple[Tensor, ...]:
        """The memory of walkers without a past: one ``(layers, n, hidden)`` tensor, two for an LSTM."""
        zero = torch.zeros(self.config.layers, n, self.config.hidden)
        return (zero, zero.clone()) if self.config.cell == "lstm" else (zero,)

    def remember(self, z: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs ``(n, t, hidden)`` of the cell along z ``(n, t, d)``, and the memory after it."""
        given = memory if self.config.cell == "lstm" else memory[0]
        out, after = self.cell(z, given)
        return out, after if self.config.cell == "lstm" else (after,)

    def nll(self, z: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """-ln p of z[:, 1:] ``(n, t - 1)`` given what came before, along z ``(n, t, d)``, and the memory at the end."""
        out, after = self.remember(z[:, :-1], memory)
        features = torch.tanh(self.trunk(torch.cat([out, z[:, :-1]], -1)))
        now, later = z[:, :-1].reshape(-1, z.shape[-1]), z[:, 1:].reshape(-1, z.shape[-1])
        value = self.density.nll(features.reshape(len(now), -1), later, now)
        return value.view(z.shape[0], -1), after


class StatefulRNN(nn.Module):
    """A `LatentRNN` with the memory of its training lanes, which so becomes part of every checkpoint."""

    def __init__(self, rnn: LatentRNN, lanes: int) -> None:
        super().__init__()
        self.rnn = rnn
        for k, value in enumerate(rnn.blank(lanes)):
            self.register_buffer(f"memory_{k}", value)

    @property
    def memory(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"memory_{k}") for k in range(2 if self.rnn.config.cell == "lstm" else 1))

    def forward(self, z: Tensor, fresh: Tensor) -> Tensor:
        """-ln p along the chunks ``(lanes, t, d)``; lanes that are `fresh` begin without a past."""
        keep = (~fresh)[None, :, None]
        value, after = self.rnn.nll(z, tuple(m * keep for m in self.memory))
        for k, m in enumerate(after):
            getattr(self, f"memory_{k}").copy_(m.detach())
        return value


class PropagatorMethod:
    """Chunks of latent trajectories in lanes, for `training.loop.fit` of a `StatefulRNN`.

    Every lane holds whole trajectories one after the other; the last chunk of one is filled up and masked. An index is
    ``trajectory * stride + first frame``, -1 where a lane has run out.
    """

    def __init__(
        self, train: Sequence[np.ndarray], valid: Sequence[np.ndarray], lanes: int, chunk: int, seed: int
    ) -> None:
        self.train = [torch.as_tensor(t, dtype=torch.float32) for t in train]
        self.lanes, self.chunk, self.seed = lanes, chunk, seed
        self.stride = max(len(t) for t in train)
        # shared out once, long ones first, so that all epochs have the same number of chunks
        chunks = [-(-(len(t) - 1) // chunk) for t in train]
        self.shared: list[list[int]] = [[] for _ in range(lanes)]
        filled = [0] * lanes
        for t in sorted(range(len(train)), key=lambda t: -chunks[t]):
            k = filled.index(min(filled))
            self.shared[k].append(t)
            filled[k] += chunks[t]
        self.rows = max(filled)
        self.valid = _validation_block(valid)

    def epoch(self, epoch: int) -> Sequence[np.ndarray]:
        """Rows of a table of chunks, a column per lane; the order of the trajectories in a lane changes."""
        random = np.random.default_rng([self.seed, epoch])
        table = np.full((self.rows, self.lanes), -1)
        for k, lane in enumerate(self.shared):
            starts = [
                t * self.stride + s
                for t in random.permutation(np.array(lane, dtype=np.int64)).tolist()
                for s in range(0, len(self.train[t]) - 1, self.chunk)
            ]
            table[: len(starts), k] = starts
        return list(table)

    def chunks(self, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Frames ``(lanes, chunk + 1, d)``, which of the predictions count ``(lanes, chunk)``, and fresh lanes."""
        d = self.train[0].shape[1]
        z = torch.zeros(self.lanes, self.chunk + 1, d)
        counts = torch.zeros(self.lanes, self.chunk, dtype=torch.bool)
        for lane, index in enumerate(indices.tolist()):
            if index >= 0:
                t, start = divmod(index, self.stride)
                piece = self.train[t][start : start + self.chunk + 1]
                z[lane, : len(piece)] = piece
                counts[lane, : len(piece) - 1] = True
        return z, counts, torch.as_tensor((indices < 0) | (indices % self.stride == 0))

    def loss(self, model: nn.Module, indices: np.ndarray, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        z, counts, fresh = self.chunks(indices)
        value = model(z, fresh)
        return value[counts].mean(), {}

    def validate(self, model: StatefulRNN) -> dict[str, float]:
        z, counts = self.valid
        with torch.no_grad():
            value, _ = model.rnn.nll(z, model.rnn.blank(len(z)))
            return {"loss": float(value[counts].mean())}


def _validation_block(valid: Sequence[np.ndarray], frames: int = 60_000, longest: int = 2001) -> tuple[Tensor, Tensor]:
    """Beginnings of the validation trajectories, `frames` in all, filled up to one length, and what counts."""
    length = min(longest, max(len(t) for t in valid))
    pieces = [t[s : s + length] for t in valid for s in range(0, len(t) - 1, length) if len(t) - s > 1]
    spaced = np.linspace(0, len(pieces) - 1, min(len(pieces), max(1, frames // length))).astype(int)
    chosen = [pieces[k] for k in np.unique(spaced)]
    z = torch.zeros(len(chosen), length, chosen[0].shape[1])
    counts = torch.zeros(len(chosen), length - 1, dtype=torch.bool)
    for k, piece in enumerate(chosen):
        z[k, : len(piece)] = torch.as_tensor(piece, dtype=torch.float32)
        counts[k, : len(piece) - 1] = True
    return z, counts


class Stepper:
    """One trained propagator in numpy: what the latent dynamics runs on.

    The memory is ``(n, parts, layers, hidden)`` float32, parts = 2 for an LSTM (output, cell) and 1 for a GRU.
    """

    def __init__(self, rnn: LatentRNN) -> None:
        self.config = rnn.config
        self.hidden, self.layers = rnn.config.hidden, rnn.config.layers
        self.parts = 2 if rnn.config.cell == "lstm" else 1

        def array(p: Tensor) -> np.ndarray:
            return p.detach().cpu().numpy().astype(np.float32)

        cell = dict(rnn.cell.named_parameters())
        self.inner = [
            tuple(array(cell[f"{name}_l{layer}"]) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            for layer in range(self.layers)
        ]
        self.inner = [(wi.T.copy(), wh.T.copy(), bi, bh) for wi, wh, bi, bh in self.inner]
        if self.parts == 2:  # both biases always come together
            self.inner = [(wi, wh, bi + bh, bh) for wi, wh, bi, bh in self.inner]
        weight = array(rnn.trunk.weight).T
        self.trunk_m, self.trunk_z = weight[: self.hidden].copy(), weight[self.hidden :].copy()
        self.trunk_bias = array(rnn.trunk.bias)
        self.draw = rnn.density.sampler()
        k, d = rnn.config.kernels, rnn.config.latent_dim
        weight, bias = array(rnn.density.head.weight), array(rnn.density.head.bias)
        self._centres = weight[: k * (1 + d)].T.copy(), bias[: k * (1 + d)]

    def blank(self, n: int) -> np.ndarray:
        return np.zeros((n, self.parts, self.layers, self.hidden), np.float32)

    def remember(self, z: np.ndarray, memory: np.ndarray) -> np.ndarray:
        """The memory after seeing z ``(n, d)``."""
        after = np.empty_like(memory)
        x = z.astype(np.float32, copy=False)
        h = self.hidden
        for layer, (wi, wh, bi, bh) in enumerate(self.inner):
            out = memory[:, 0, layer]
            if self.parts == 2:
                gates = x @ wi + out @ wh + bi
                s = _sigmoid(gates)
                cell = s[:, h : 2 * h] * memory[:, 1, layer] + s[:, :h] * np.tanh(gates[:, 2 * h : 3 * h])
                after[:, 1, layer] = cell
                x = s[:, 3 * h :] * np.tanh(cell)
            else:
                a, b = x @ wi + bi, out @ wh + bh
                s = _sigmoid(a[:, : 2 * h] + b[:, : 2 * h])
                new = np.tanh(a[:, 2 * h :] + s[:, :h] * b[:, 2 * h :])
                x = new + s[:, h:] * (out - new)
            after[:, 0, layer] = x
        return after

    def features(self, z: np.ndarray, memory: np.ndarray) -> np.ndarray:
        """What the mixture sees, ``(n, hidden)``."""
        z = z.astype(np.float32, copy=False)
        return np.tanh(memory[:, 0, -1] @ self.trunk_m + z @ self.trunk_z + self.trunk_bias)

    def mean(self, features: np.ndarray) -> np.ndarray:
        """Mean of the step that the mixture predicts, ``(n, d)``."""
        k, d = self.config.kernels, self.config.latent_dim
        raw = features @ self._centres[0] + self._centres[1]
        w = np.exp(raw[:, :k] - raw[:, :k].max(-1, keepdims=True))
        return np.einsum("nk,nkd->nd", w / w.sum(-1, keepdims=True), raw[:, k:].reshape(-1, k, d))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)
