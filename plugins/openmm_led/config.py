"""Hyperparameters of LED; the defaults are those of this package, `PUBLISHED` those of the paper's scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DECODERS = ("autoregressive", "joint", "diagonal", "principal", "fixed", "fixed_joint")
OBJECTIVES = ("reconstruction", "lagged", "both", "tica")
CELLS = ("lstm", "gru")


@dataclass(frozen=True)
class LEDConfig:
    """Sizes and forms of the autoencoder and of the propagator.

    Attributes:
        latent_dim: latent coordinates, 1 to 8.
        encoder_widths: hidden layers of the encoder. decoder_widths: of the decoder's trunk.
        objective: what the encoder is trained for: "reconstruction" (likelihood under the decoder), "lagged" (VAMP-2
            score, the slow part of the dynamics), "both", or "tica" (a linear encoder, `encoder_widths` empty: the slow
            modes in closed form, for few frames; see `slow_modes`).
        vamp_weight: nats per unit of VAMP-2 score and per coordinate, for "both".
        lag: frames between the two ends of a pair in the VAMP-2 score.
        decoder: "autoregressive" (torsions about rotatable bonds one after the other, then all other coordinates
            together; "joint" where there are no torsions), "joint" (mixture of Gaussians over all coordinates together,
            correlated within a kernel), "diagonal" (a mixture per coordinate, all of whose parameters depend on z),
            "principal" (a mean that depends on z, and residuals along their principal axes or about those of training
            frames nearby; for fewer frames than coordinates need),
            "fixed" or "fixed_joint" (published: constant
            kernels in logit space and von Mises kernels for dihedrals, only the weights depend on z; per coordinate, or
            one mixture over all of them).
        decoder_kernels: per mixture; of "principal", at most as many as there are training frames.
        decoder_floor: least width of a kernel, in standard deviations of the coordinate; with a deterministic encoder
            the likelihood has no bound without it. For "principal" with several kernels their width, in units of the
            spread of the residuals.
        decoder_draws: for each decoded frame; the one is taken whose own latent coordinates are nearest to z. The
            latent state is a function of the positions, which mixtures know only as well as they were learned.
        calibrate: give each decoded coordinate off circles the mean and the standard deviation that it has in the
            training data. Coordinates drawn in turn depend on drawn ones instead of true ones, which widens some.
        cell: "lstm" or "gru". hidden: width of the recurrent layer and of the mixture's trunk. layers: recurrent.
        kernels: of the mixture for the next latent state. floor: least width, in standard deviations of the latent.
        members: propagators trained from different seeds; each step follows one of them, their spread shows doubt.
    """

    latent_dim: int = 2
    encoder_widths: tuple[int, ...] = (64, 64)
    decoder_widths: tuple[int, ...] = (64, 64)
    objective: str = "both"
    vamp_weight: float = 1.0
    lag: int = 1
    decoder: str = "autoregressive"
    decoder_kernels: int = 8
    decoder_floor: float = 0.05
    decoder_draws: int = 1
    calibrate: bool = False
    cell: str = "gru"
    hidden: int = 32
    layers: int = 1
    kernels: int = 8
    floor: float = 0.01
    members: int = 1

    def __post_init__(self) -> None:
        for name in ("encoder_widths", "decoder_widths"):
            object.__setattr__(self, name, tuple(int(w) for w in getattr(self, name)))
        if not 1 <= self.latent_dim <= 8:
            raise ValueError(f"latent_dim: expected 1 to 8, got {self.latent_dim}")
        for name, known in (("decoder", DECODERS), ("objective", OBJECTIVES), ("cell", CELLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.objective == "tica" and (self.encoder_widths or self.decoder.startswith("fixed")):
            raise ValueError(
                "objective: 'tica' expects empty encoder_widths and a decoder that is not fixed, "
                f"got {self.encoder_widths} and {self.decoder!r}"
            )
        for name in ("lag", "decoder_kernels", "decoder_draws", "hidden", "layers", "kernels", "members"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        for name in ("decoder_floor", "floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class LEDOptions:
    """How LED is trained.

    Attributes:
        autoencoder_steps: optimiser steps. batch: frames (pairs of frames) per step.
        restarts: autoencoders trained from different seeds, of which the one with the least validation loss is kept;
            an objective with several maxima is found in a poor one now and then. The closed form "tica" knows only 1.
        propagator_steps: optimiser steps. lanes: trajectories side by side. chunk: frames between truncations of the
            back-propagation through time; the memory is carried on from chunk to chunk.
        learning_rate: at the start of both; it falls to a hundredth along a cosine.
        seed: of parameters, batches and everything else that is random.
    """

    autoencoder_steps: int = 6000
    batch: int = 1024
    restarts: int = 1
    propagator_steps: int = 6000
    lanes: int = 32
    chunk: int = 100
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("autoencoder_steps", "batch", "restarts", "propagator_steps", "lanes", "chunk"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate!r}")


#: the forms of the published scripts (facts of LED-Molecular: Müller-Brown, alanine dipeptide)
PUBLISHED: dict[str, dict[str, Any]] = {
    "mueller_brown": {
        "latent_dim": 1,
        "encoder_widths": (40, 40, 40),
        "decoder_widths": (40, 40, 40),
        "objective": "reconstruction",
        "decoder": "fixed_joint",
        "decoder_kernels": 3,
        "cell": "lstm",
        "hidden": 20,
        "kernels": 3,
    },
    "alanine": {
        "latent_dim": 1,
        "encoder_widths": (50, 50, 50, 50),
        "decoder_widths": (50, 50, 50, 50),
        "objective": "reconstruction",
        "decoder": "fixed",
        "decoder_kernels": 5,
        "cell": "lstm",
        "hidden": 10,
        "kernels": 4,
    },
}
