"""positions -> latent coordinates, by what the baselines use in place of a trained autoencoder, or by its encoder."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from openmm import app

from openmm_led.features import Features
from openmm_led.model import BATCH, LED
from openmm_led.trajectories import Trajectories

#: directions of the inputs with less than this share of the largest variance are noise of rounding
LEAST_VARIANCE = 1e-10


class Encoder(Protocol):
    """Positions ``(n, n_atoms, 3)`` nm -> latent coordinates ``(n, latent_dim)``; `LED` is one as well."""

    latent_dim: int
    n_atoms: int

    def encode(self, positions: np.ndarray) -> np.ndarray: ...

    def check_topology(self, topology: app.Topology) -> None: ...


class LinearProjection:
    """A linear map of the inputs of `Features`: z = (inputs - mean) matrix.

    Attributes:
        features: of the molecule. mean: ``(n_inputs,)``. matrix: ``(n_inputs, latent_dim)``.

    Raises `ValueError` for other shapes.
    """

    def __init__(self, features: Features, mean: np.ndarray, matrix: np.ndarray) -> None:
        self.features = features
        self.mean, self.matrix = np.asarray(mean, dtype=np.float64), np.asarray(matrix, dtype=np.float64)
        n = features.n_inputs
        if self.mean.shape != (n,) or self.matrix.ndim != 2 or self.matrix.shape[0] != n or not self.matrix.shape[1]:
            raise ValueError(
                f"mean, matrix: expected shapes ({n},) and ({n}, latent_dim), "
                f"got {self.mean.shape} and {self.matrix.shape}"
            )
        self.latent_dim, self.n_atoms = self.matrix.shape[1], features.n_atoms

    @classmethod
    def standardised(cls, features: Features, train: Trajectories) -> LinearProjection:
        """Every input by itself, with zero mean and unit variance in the training data."""
        inputs = np.concatenate(_inputs(features, train))
        width = inputs.std(axis=0)
        if not (width > 0).all():
            raise ValueError(f"features: expected inputs that vary, {int((width == 0).sum())} of them are constant")
        return cls(features, inputs.mean(axis=0), np.diag(1.0 / width))

    @classmethod
    def tica(cls, features: Features, train: Trajectories, latent_dim: int, lag: int = 1) -> LinearProjection:
        """The slowest linear combinations of the inputs at a lag in frames, with unit variance.

        Source: Perez-Hernandez et al., J. Chem. Phys. 2013, 139, 015102 (deeptime, extra ``led``).

        Raises `ValueError` for a lag that does not fit, or more dimensions than the inputs' rank.
        """
        try:
            from deeptime.decomposition import TICA
        except ImportError as error:
            raise ImportError(
                f"TICA needs the package deeptime ({error}); install it with: pip install 'openmm-mlff[led]'"
            ) from error
        train.check_lag(lag)
        if latent_dim < 1 or lag < 1:
            raise ValueError(f"latent_dim, lag: expected at least 1, got {latent_dim} and {lag}")
        runs = _inputs(features, train)
        every = np.concatenate(runs)
        mean, width = every.mean(axis=0), every.std(axis=0)
        # inputs have different units: scaled first, so that one threshold can tell noise from variance
        scale = np.where(width > 0, width, 1.0)
        estimator = TICA(lagtime=lag, epsilon=LEAST_VARIANCE, scaling=None)
        fitted = estimator.fit([(run - mean) / scale for run in runs], lagtime=lag).fetch_model()
        vectors, rank = fitted.instantaneous_coefficients, int((np.abs(fitted.singular_values) > 0).sum())
        if latent_dim > min(rank, vectors.shape[1]):
            raise ValueError(f"latent_dim: expected at most the rank of the inputs, {rank}, got {latent_dim}")
        matrix = vectors[:, :latent_dim] / scale[:, None]
        return cls(features, mean, matrix / ((every - mean) @ matrix).std(axis=0))

    def encode(self, positions: np.ndarray) -> np.ndarray:
        """Latent coordinates ``(n, latent_dim)``; raises `ValueError` for another shape or bad numbers."""
        x = np.asarray(positions, dtype=np.float64)
        blocks = [x[k : k + BATCH] for k in range(0, max(len(x), 1), BATCH)]
        return np.concatenate([(self.features.inputs(b) - self.mean) @ self.matrix for b in blocks])

    def check_topology(self, topology: app.Topology) -> None:
        """Raise `ValueError` unless this is the topology of the features."""
        self.features.check_topology(topology)


def _inputs(features: Features, train: Trajectories) -> list[np.ndarray]:
    return [np.asarray(features.inputs(np.asarray(run, dtype=np.float64))) for run in train.frames]


def encoder_card(encoder: Encoder) -> dict[str, Any]:
    """What a model card says about an encoder; the rest is in `encoder_tensors`."""
    if isinstance(encoder, LED):
        return {"kind": "led", "card": encoder.card()}
    if isinstance(encoder, LinearProjection):
        return {"kind": "linear", "features": encoder.features.to_dict()}
    raise ValueError(
        f"encoder: expected a LinearProjection or an LED model to be written, got {type(encoder).__name__}"
    )


def encoder_tensors(encoder: Encoder) -> dict[str, torch.Tensor]:
    """The arrays of an encoder, by names that begin with ``encoder.``."""
    if isinstance(encoder, LED):
        return {f"encoder.{name}": value for name, value in encoder.tensors().items()}
    assert isinstance(encoder, LinearProjection)
    return {"encoder.mean": torch.as_tensor(encoder.mean), "encoder.matrix": torch.as_tensor(encoder.matrix)}


def read_encoder(card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Encoder:
    """The inverse of `encoder_card` and `encoder_tensors`; raises `ValueError` for a kind that is not known."""
    own = {k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")}
    if card.get("kind") == "led":
        return LED.from_card(card["card"], own)
    if card.get("kind") == "linear":
        return LinearProjection(Features.from_dict(card["features"]), own["mean"].numpy(), own["matrix"].numpy())
    raise ValueError(f"encoder: expected the kind linear or led, got {card.get('kind')!r}")
