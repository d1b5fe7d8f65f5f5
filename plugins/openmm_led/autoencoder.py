"""encoder and decoder: inputs (features of positions) -> latent z -> a distribution of coordinates.

The encoder is trained for the likelihood of the coordinates under the decoder, for the slow part of the dynamics, or
both. For the dynamics it maximises the VAMP-2 score of its outputs u(t), u(t + lag),

    R = || C00^-1/2 C0t Ctt^-1/2 ||_F^2,

C being covariances over pairs of frames (Wu and Noé, J. Nonlinear Sci. 30, 23 (2020); VAMPnets: Mardt et al., Nat.
Commun. 9, 5 (2018)): the latent coordinates then span the slowest processes that `latent_dim` functions can hold. The
trained outputs are rotated and scaled once, so that the latent coordinates have unit variance, are uncorrelated, and
come in the order of their time scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from openmm_led.autoregressive import Autoregressive
from openmm_led.config import LEDConfig
from openmm_led.features import Features
from openmm_led.mixtures import Density, DiagonalMixture, FixedKernels, JointMixture, wrapped
from openmm_led.principal import Principal

#: share of the range by which the published scaler widens it; and the largest width of its kernels
SLACK, SIGMA_MAX = 0.1, 0.6


def multilayer(n_in: int, widths: Sequence[int], n_out: int | None = None) -> nn.Sequential:
    """Linear layers with tanh between them; without `n_out` it ends in a tanh."""
    sizes = [n_in, *widths]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        linear = nn.Linear(a, b)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    if n_out is not None:
        layers.append(nn.Linear(sizes[-1], n_out))
    return nn.Sequential(*layers)


class Scaler(nn.Module):
    """Coordinates x -> y of order one, and back.

    "standard": (x - mean) / s.d., on a circle with circular mean and the s.d. of the wrapped difference. "logit"
    (published): ln(u / (1 - u)) of u = (x - min) / (max - min), angles on a circle as they are.
    """

    centre: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    period: Tensor
    circular: Tensor

    def __init__(self, periodic: np.ndarray, form: str) -> None:
        super().__init__()
        self.form = form
        n = len(periodic)
        self.register_buffer("circular", torch.as_tensor(periodic, dtype=torch.bool), persistent=False)
        for name, value in (("centre", 0.0), ("scale", 1.0), ("low", 0.0), ("high", 1.0), ("period", torch.inf)):
            self.register_buffer(name, torch.full((n,), value))

    def fit(self, x: np.ndarray) -> None:
        """Take mean and width from coordinates ``(n, D)``."""
        circular = self.circular.cpu().numpy()
        turn = np.where(circular, 2 * np.pi, np.inf)
        centre = np.where(circular, np.angle(np.exp(1j * x).mean(0)), x.mean(0))
        difference = x - centre
        difference[:, circular] = np.remainder(difference[:, circular] + np.pi, 2 * np.pi) - np.pi
        scale = np.maximum(difference.std(0), 1e-7)
        low, high = x.min(0), x.max(0)
        slack = SLACK * np.maximum(high - low, 1e-7)
        if self.form == "logit":
            centre, scale = np.zeros_like(centre), np.ones_like(scale)
        values = {"centre": centre, "scale": scale, "low": low - slack, "high": high + slack, "period": turn / scale}
        for name, value in values.items():
            getattr(self, name).copy_(torch.as_tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        standard = wrapped((x - self.centre) / self.scale, self.period)
        if self.form == "standard":
            return standard
        # what lies outside the range of the training data goes to its edge
        u = ((x - self.low) / (self.high - self.low)).clamp(1e-6, 1.0 - 1e-6)
        return torch.where(self.circular, standard, torch.logit(u))

    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest coordinates ``(D,)`` of the training data; infinite on circles."""
        low, high = (b.detach().cpu().numpy().astype(np.float64) for b in (self.low, self.high))
        slack, circular = SLACK / (1.0 + 2.0 * SLACK) * (high - low), self.circular.cpu().numpy()
        return np.where(circular, -np.inf, low + slack), np.where(circular, np.inf, high - slack)

    def back(self, y: np.ndarray) -> np.ndarray:
        """Coordinates ``(n, D)`` float64; angles on a circle in (-pi, pi]."""
        centre, scale, low, high = (
            b.detach().cpu().numpy().astype(np.float64) for b in (self.centre, self.scale, self.low, self.high)
        )
        circular = self.circular.cpu().numpy()
        x = centre + scale * y
        if self.form == "logit":
            x = np.where(circular, x, low + (high - low) / (1.0 + np.exp(-np.asarray(y, np.float64))))
        x[:, circular] = np.pi - np.remainder(np.pi - x[:, circular], 2 * np.pi)
        return x


@dataclass(frozen=True)
class Shapes:
    """Sizes of the data.

    Attributes:
        n_inputs: of the encoder. periodic: ``(D,)``, which of the decoded coordinates live on a circle. torsions:
            ``(D,)``, which of them are torsions about rotatable bonds.
    """

    n_inputs: int
    periodic: np.ndarray
    torsions: np.ndarray

    @classmethod
    def of(cls, features: Features) -> Shapes:
        return cls(
            features.n_inputs, np.asarray(features.periodic), np.array([k == "dihedral" for k in features.kinds])
        )


class Autoencoder(nn.Module):
    """Encoder ``z = (u(x) - mean) W``, u a multilayer perceptron; decoder p(coordinates | z)."""

    in_mean: Tensor
    in_std: Tensor
    z_mean: Tensor
    z_turn: Tensor
    z_back: Tensor

    def __init__(self, config: LEDConfig, shapes: Shapes) -> None:
        super().__init__()
        d = config.latent_dim
        self.config = config
        self.register_buffer("in_mean", torch.zeros(shapes.n_inputs))
        self.register_buffer("in_std", torch.ones(shapes.n_inputs))
        for name, value in (("z_mean", torch.zeros(d)), ("z_turn", torch.eye(d)), ("z_back", torch.eye(d))):
            self.register_buffer(name, value)
        self.encoder = multilayer(shapes.n_inputs, config.encoder_widths, d)
        self.trunk = multilayer(d, config.decoder_widths)
        published = config.decoder.startswith("fixed")
        self.scaler = Scaler(shapes.periodic, "logit" if published else "standard")
        self.density = self._density(config, config.decoder_widths[-1], shapes.torsions)

    def _density(self, config: LEDConfig, width: int, torsions: np.ndarray) -> Density:
        period, k = self.scaler.period, config.decoder_kernels
        if config.decoder == "autoregressive" and torsions.any():
            return Autoregressive(width, period, torsions, k, config.decoder_floor)
        if config.decoder in ("autoregressive", "joint"):
            return JointMixture(width, period, k, config.decoder_floor)
        if config.decoder == "diagonal":
            return DiagonalMixture(width, period, k, config.decoder_floor)
        if config.decoder == "principal":
            return Principal(width, period, k, config.decoder_floor)
        circles = torch.where(self.scaler.circular, 2 * torch.pi, torch.inf)
        return FixedKernels(width, circles, k, SIGMA_MAX, joint=config.decoder == "fixed_joint")

    def fit_scales(self, inputs: np.ndarray, coordinates: np.ndarray) -> None:
        """Means and widths of inputs and coordinates, from the training data."""
        self.in_mean.copy_(torch.as_tensor(inputs.mean(0)))
        # a constant input tells nothing; its width must not blow rounding up
        self.in_std.copy_(torch.as_tensor(np.maximum(inputs.std(0), 1e-5)))
        self.scaler.fit(coordinates)
        self.density.set_period(self.scaler.period)
        if isinstance(self.density, FixedKernels):
            spaced = coordinates[np.linspace(0, len(coordinates) - 1, min(len(coordinates), 5000)).astype(int)]
            self.density.place(self.scaler(torch.as_tensor(spaced, dtype=torch.float32)).numpy(), seed=0)

    def set_linear(self, matrix: np.ndarray) -> None:
        """Make the encoder, which has no hidden layer, u = (inputs - mean) matrix ``(n_inputs, latent_dim)``."""
        (layer,) = self.encoder
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight.copy_((self.in_std[:, None] * torch.as_tensor(matrix)).T)
            layer.bias.zero_()

    def raw(self, inputs: Tensor) -> Tensor:
        """u(x) before rotation and scaling, ``(n, latent_dim)``."""
        return self.encoder((inputs - self.in_mean) / self.in_std)

    def encode(self, inputs: Tensor) -> Tensor:
        """Latent coordinates ``(n, latent_dim)``."""
        return (self.raw(inputs) - self.z_mean) @ self.z_turn

    def features_of(self, z: Tensor) -> Tensor:
        """What the decoder's mixture sees, ``(n, width)``."""
        return self.trunk(z @ self.z_back + self.z_mean)

    def nll(self, z: Tensor, coordinates: Tensor) -> Tensor:
        """-ln p(coordinates | z) in nats, ``(n,)``, of the scaled coordinates."""
        return self.density.nll(self.features_of(z), self.scaler(coordinates))

    def orient(self, u: np.ndarray, u_later: np.ndarray) -> np.ndarray:
        """Fix rotation and scale from raw outputs ``(n, d)`` at both ends of pairs of frames; returns autocorrelations.

        Raises `ValueError` if the outputs span fewer dimensions than the latent state.
        """
        both = np.concatenate([u, u_later]).astype(np.float64)
        mean = both.mean(0)
        covariance = np.cov(both.T).reshape(len(mean), len(mean))
        values, vectors = np.linalg.eigh(covariance)
        if values[0] <= 1e-8 * values[-1]:
            raise ValueError(
                f"latent_dim: expected no more than the {int(np.sum(values > 1e-8 * values[-1]))} dimensions that the "
                f"encoder's outputs span, got {len(mean)}"
            )
        whiten = vectors / np.sqrt(values)
        a, b = (u - mean) @ whiten, (u_later - mean) @ whiten
        lagged = (a.T @ b + b.T @ a) / (2 * len(a))
        slow, modes = np.linalg.eigh(lagged)
        turn = whiten @ modes[:, ::-1]
        # signs are free; make the longer tail positive so that training twice gives the same picture
        skew = np.sign(np.mean(((both - mean) @ turn) ** 3, axis=0))
        turn = turn * np.where(skew == 0, 1.0, skew)
        self.z_mean.copy_(torch.as_tensor(mean))
        self.z_turn.copy_(torch.as_tensor(turn))
        self.z_back.copy_(torch.as_tensor(np.linalg.inv(turn)))
        return slow[::-1]


def vamp2(u: Tensor, u_later: Tensor, shrink: float = 1e-4) -> Tensor:
    """VAMP-2 score of ``(n, d)`` outputs at both ends of n pairs, at most d; `shrink` of the variance is added."""
    n, d = u.shape
    a, b = u.double() - u.double().mean(0), u_later.double() - u_later.double().mean(0)
    eye = torch.eye(d, dtype=torch.float64, device=u.device)

    def covariance(x: Tensor, y: Tensor) -> Tensor:
        return x.T @ y / (n - 1)

    c00, ctt = covariance(a, a), covariance(b, b)
    c00, ctt = (c + shrink * c.diagonal().mean() * eye for c in (c00, ctt))
    l0, lt = torch.linalg.cholesky(c00), torch.linalg.cholesky(ctt)
    k = torch.linalg.solve_triangular(l0, covariance(a, b), upper=False)
    k = torch.linalg.solve_triangular(lt, k.T, upper=False)
    return k.square().sum()


class AutoencoderMethod:
    """Batches of pairs of frames and the loss of the autoencoder, for `training.loop.fit`.

    Args:
        inputs: ``(n, n_inputs)`` of all training frames, one trajectory after the other; coordinates alike.
        starts: first frames of all pairs, ``(p,)``; the second is `lag` later in the same trajectory.
        valid: the same three of the validation data.
    """

    def __init__(
        self,
        config: LEDConfig,
        train: tuple[Tensor, Tensor, np.ndarray],
        valid: tuple[Tensor, Tensor, np.ndarray],
        batch: int,
        seed: int,
    ) -> None:
        self.config, self.train, self.batch, self.seed = config, train, batch, seed
        # a few thousand pairs tell one candidate from another
        spaced = np.linspace(0, len(valid[2]) - 1, min(len(valid[2]), 8192)).astype(int)
        self.valid = (valid[0], valid[1], valid[2][spaced])

    def epoch(self, epoch: int) -> Sequence[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.train[2])
        count = max(1, len(order) // self.batch)
        return np.array_split(order[: count * self.batch], count)

    def terms(self, model: Autoencoder, data: tuple[Tensor, Tensor, np.ndarray], at: np.ndarray) -> dict[str, Tensor]:
        """Mean negative log likelihood per coordinate, and VAMP-2 score, of pairs that start at `at`."""
        inputs, coordinates, _ = data
        u = model.raw(inputs[at])
        found = {}
        if self.config.objective != "lagged":
            # batch statistics keep the decoder's input of order one while the encoder's scale drifts
            z = (u - u.mean(0)) / (u.std(0) + 1e-6)
            features = model.trunk(z)
            found["nll"] = model.density.nll(features, model.scaler(coordinates[at])).mean() / coordinates.shape[1]
        if self.config.objective != "reconstruction":
            found["vamp2"] = vamp2(u, model.raw(inputs[at + self.config.lag]))
        return found

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        score = terms.get("vamp2")
        if score is None:
            return terms["nll"]
        weight = 1.0 if self.config.objective == "lagged" else self.config.vamp_weight
        return -weight * score + terms.get("nll", torch.zeros((), dtype=score.dtype))

    def loss(self, model: Autoencoder, indices: np.ndarray, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms(model, self.train, indices)
        return self.total(terms), terms

    def validate(self, model: Autoencoder) -> dict[str, float]:
        with torch.no_grad():
            terms = self.terms(model, self.valid, self.valid[2])
            return {"loss": float(self.total(terms)), **{name: float(value) for name, value in terms.items()}}


class DecoderMethod:
    """Decoder alone on fixed latent coordinates, for `training.loop.fit`.

    Args:
        train, valid: latent coordinates ``(n, d)`` and coordinates ``(n, D)``.
    """

    def __init__(self, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], batch: int, seed: int) -> None:
        self.train, self.batch, self.seed = train, batch, seed
        spaced = torch.linspace(0, len(valid[0]) - 1, min(len(valid[0]), 8192)).long()
        self.valid = (valid[0][spaced], valid[1][spaced])

    def epoch(self, epoch: int) -> Sequence[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.train[0]))
        count = max(1, len(order) // self.batch)
        return np.array_split(order[: count * self.batch], count)

    def loss(self, model: Autoencoder, indices: np.ndarray, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        z, x = self.train
        return model.nll(z[indices], x[indices]).mean() / x.shape[1], {}

    def validate(self, model: Autoencoder) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(model.nll(*self.valid).mean()) / self.valid[1].shape[1]}
