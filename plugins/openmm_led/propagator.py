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


#: walkers that go through a step together: what they need in between stays in the processor's cache
ROWS = 512


class Stepper:
    """One trained propagator in numpy: what the latent dynamics runs on.

    The memory is ``(n, parts, layers, hidden)`` float32, parts = 2 for an LSTM (output, cell) and 1 for a GRU. Every
    matrix acts on rows (memory, 1, input) or on a part of them, so that biases need no work of their own.
    """

    def __init__(self, rnn: LatentRNN) -> None:
        self.config = rnn.config
        self.hidden, self.layers = rnn.config.hidden, rnn.config.layers
        self.parts = 2 if rnn.config.cell == "lstm" else 1

        def array(p: Tensor) -> np.ndarray:
            return p.detach().cpu().numpy().astype(np.float32)

        cell = {name: array(p) for name, p in rnn.cell.named_parameters()}
        gates = _lstm_gates if self.parts == 2 else _gru_gates
        self.inner = [
            gates(*(cell[f"{name}_l{layer}"] for name in ("weight_hh", "bias_hh", "weight_ih", "bias_ih")))
            for layer in range(self.layers)
        ]
        weight = array(rnn.trunk.weight).T
        self.trunk = np.concatenate([weight[: self.hidden], array(rnn.trunk.bias)[None], weight[self.hidden :]])
        self.draw = rnn.density.sampler()
        k, d = rnn.config.kernels, rnn.config.latent_dim
        weight, bias = array(rnn.density.head.weight), array(rnn.density.head.bias)
        self._centres = weight[: k * (1 + d)].T.copy(), bias[: k * (1 + d)]

    def blank(self, n: int) -> np.ndarray:
        return np.zeros((n, self.parts, self.layers, self.hidden), np.float32)

    def remember(self, z: np.ndarray, memory: np.ndarray) -> np.ndarray:
        """The memory after seeing z ``(n, d)``."""
        after = np.empty_like(memory)
        cell = self._lstm if self.parts == 2 else self._gru
        for k in range(0, len(z), ROWS):
            x = z[k : k + ROWS]
            before, later = memory[k : k + ROWS], after[k : k + ROWS]
            for layer, weights in enumerate(self.inner):
                cell(weights, _rows(before[:, 0, layer], x), before[:, :, layer], later[:, :, layer])
                x = later[:, 0, layer]
        return after

    def _gru(self, weights: tuple[np.ndarray, ...], rows: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        reset, update, own, given = weights
        h = self.hidden
        # sigma(x) = (1 + tanh(x / 2)) / 2; the halves of the arguments are in the weights
        r, u = np.tanh(rows @ reset), np.tanh(rows @ update)
        kept = rows[:, : h + 1] @ own  # half of what the memory gives to the new state
        r *= kept
        r += kept
        r += rows[:, h:] @ given
        np.tanh(r, out=r)
        apart = before[:, 0] - r
        apart *= 0.5
        u += 1.0
        u *= apart
        np.add(r, u, out=after[:, 0])

    def _lstm(self, weights: tuple[np.ndarray, ...], rows: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        take, keep, new, give = (np.tanh(rows @ w) for w in weights)
        for gate in (take, keep, give):
            gate *= 0.5
            gate += 0.5
        keep *= before[:, 1]
        take *= new
        np.add(keep, take, out=after[:, 1])
        np.multiply(give, np.tanh(after[:, 1]), out=after[:, 0])

    def features(self, z: np.ndarray, memory: np.ndarray) -> np.ndarray:
        """What the mixture sees, ``(n, hidden)``."""
        raw = _rows(memory[:, 0, -1], z) @ self.trunk
        return np.tanh(raw, out=raw)

    def mean(self, features: np.ndarray) -> np.ndarray:
        """Mean of the step that the mixture predicts, ``(n, d)``."""
        k, d = self.config.kernels, self.config.latent_dim
        raw = features @ self._centres[0] + self._centres[1]
        w = np.exp(raw[:, :k] - raw[:, :k].max(-1, keepdims=True))
        return np.einsum("nk,nkd->nd", w / w.sum(-1, keepdims=True), raw[:, k:].reshape(-1, k, d))


def _rows(memory: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(memory, 1, x) of each walker, float32."""
    h = memory.shape[1]
    rows = np.empty((len(x), h + 1 + x.shape[1]), np.float32)
    rows[:, :h], rows[:, h], rows[:, h + 1 :] = memory, 1.0, x
    return rows


def _gru_gates(wh: np.ndarray, bh: np.ndarray, wi: np.ndarray, bi: np.ndarray) -> tuple[np.ndarray, ...]:
    """Matrices of reset and update gate on whole rows, halved; of the new state on (memory, 1), halved, as the reset
    gate multiplies it, and on (1, input)."""
    h = wh.shape[1]
    both = np.concatenate([wh.T, (bh + bi)[None], wi.T])
    reset, update = (0.5 * both[:, part : part + h] for part in (0, h))
    own, given = np.concatenate([wh.T, bh[None]])[:, 2 * h :], np.concatenate([bi[None], wi.T])[:, 2 * h :]
    return reset, update, 0.5 * own, given.copy()


def _lstm_gates(wh: np.ndarray, bh: np.ndarray, wi: np.ndarray, bi: np.ndarray) -> tuple[np.ndarray, ...]:
    """Matrices of input, forget, cell and output gate on whole rows; all but the cell's halved."""
    h = wh.shape[1]
    both = np.concatenate([wh.T, (bh + bi)[None], wi.T])
    return tuple(factor * both[:, k * h : (k + 1) * h] for k, factor in enumerate((0.5, 0.5, 1.0, 0.5)))
