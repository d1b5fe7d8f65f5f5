"""LED: encoder, mixture-density decoder and recurrent propagator, as one propagator of positions.

Everything that runs at simulation time is numpy: for one walker a step of the latent dynamics costs tens of
microseconds, most of which a tensor library would spend on dispatching.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openmm import app

from openmm_led.autoencoder import Autoencoder, Shapes
from openmm_led.config import LEDConfig
from openmm_led.features import Features
from openmm_led.mixtures import FixedKernels, Sampler, pick
from openmm_led.propagator import LatentRNN, Stepper
from openmm_led.support import Support
from openmm_mlff.data import model_file
from openmm_mlff.sampling.propagators import LatentState, Propagator

FAMILY = "led"
#: frames that go through features and encoder at once
BATCH = 4096
#: draws of a step that should stay in its region
TRIALS = 10


class LED(Propagator):
    """A trained model of latent dynamics; made by `openmm_led.training.LEDLearner`, or read by `load_propagator`.

    Attributes:
        config, features, autoencoder, rnns: what it is made of.
        support: of the training data. moments: ``(2, n_coordinates)``, offset and factor that `LEDConfig.calibrate`
            puts drawn coordinates right with, or None.
        details: what the card says beside (training data, accuracy, ...).
        confined: no step leads beyond the range of the training data in any latent coordinate; steps between states
            that exchange rarely are observed ones, taken as often as in the training data; walkers between such states
            go on as the trajectories there did (see `support`).
    """

    confined = True

    def __init__(
        self,
        config: LEDConfig,
        features: Features,
        autoencoder: Autoencoder,
        rnns: list[LatentRNN],
        *,
        interval: float,
        temperature: float | None = None,
        support: Support | None = None,
        moments: np.ndarray | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.features = config, features
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.rnns = [rnn.eval().requires_grad_(False) for rnn in rnns]
        self.latent_dim, self.n_atoms = config.latent_dim, features.n_atoms
        self.interval, self.temperature = float(interval), temperature
        self.support, self.moments, self.details = support, moments, dict(details or {})
        self._steppers = [Stepper(rnn) for rnn in self.rnns]
        self._trunk = _numpy_layers(autoencoder)
        self._draw: Sampler = autoencoder.density.sampler()
        self._range = autoencoder.scaler.range()

    def check_topology(self, topology: app.Topology) -> None:
        self.features.check_topology(topology)

    # -- positions <-> latent --------------------------------------------------------------------------------------

    def encode(self, positions: np.ndarray) -> np.ndarray:
        x = np.asarray(positions, dtype=np.float64)
        if x.ndim != 3 or x.shape[1:] != (self.n_atoms, 3):
            raise ValueError(f"positions: expected shape (n, {self.n_atoms}, 3), got {x.shape}")
        return np.concatenate([self.encode_inputs(self.features.inputs(block)) for block in _blocks(x)])

    def encode_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """Latent coordinates ``(n, latent_dim)`` of encoder inputs ``(n, n_inputs)``."""
        with torch.no_grad():
            z = self.autoencoder.encode(torch.as_tensor(np.asarray(inputs), dtype=torch.float32))
        return z.numpy().astype(np.float64)

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return self.features.positions(self.decode_coordinates(z, random))

    def decode_coordinates(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A sample of the coordinates ``(n, n_coordinates)`` (nm, rad) for latent coordinates ``(n, latent_dim)``.

        Bonds, angles and positions beyond the range of the training data are put to its ends: a decoder that has not
        seen some z may be wrong about their widths, and one stretched bond would waste the frame.
        """
        h = np.asarray(z, dtype=np.float32)
        for weight, bias in self._trunk:
            h = np.tanh(h @ weight + bias)
        best = self._drawn(h, random)
        if self.config.decoder_draws > 1:
            apart = self._astray(best, z)
            for _ in range(self.config.decoder_draws - 1):
                drawn = self._drawn(h, random)
                distance = self._astray(drawn, z)
                nearer = distance < apart
                best[nearer], apart[nearer] = drawn[nearer], distance[nearer]
        return best

    def _drawn(self, h: np.ndarray, random: np.random.Generator) -> np.ndarray:
        x = self.autoencoder.scaler.back(self._draw(h, random))
        if self.moments is not None:
            x = self.moments[0] + self.moments[1] * x
        return np.clip(x, *self._range)

    def _astray(self, coordinates: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance ``(n,)`` of the coordinates' own latent state from the one they were decoded from."""
        own = [self.encode_inputs(np.asarray(self.features.inputs_of(block))) for block in _blocks(coordinates)]
        return np.linalg.norm(np.concatenate(own) - z, axis=1)

    # -- dynamics --------------------------------------------------------------------------------------------------

    def start(self, history: np.ndarray) -> LatentState:
        past = np.asarray(history, dtype=np.float32)
        if past.ndim != 3 or past.shape[2] != self.latent_dim or past.shape[1] < 1:
            raise ValueError(f"history: expected shape (n, n_frames, {self.latent_dim}), got {past.shape}")
        memories = [stepper.blank(len(past)) for stepper in self._steppers]
        for k in range(past.shape[1] - 1):
            memories = [s.remember(past[:, k], m) for s, m in zip(self._steppers, memories, strict=True)]
        return LatentState(past[:, -1].copy(), {f"memory_{i}": m for i, m in enumerate(memories)})

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        z = state.z
        memories = [s.remember(z, state.memory[f"memory_{i}"]) for i, s in enumerate(self._steppers)]
        if len(memories) == 1:
            later = self._moved(self._steppers[0], z, memories[0], random)
        else:
            later = np.empty_like(z)
            for i, walkers in enumerate(self._assigned(len(z), random)):
                if len(walkers):
                    later[walkers] = self._moved(self._steppers[i], z[walkers], memories[i][walkers], random)
        return LatentState(later, {f"memory_{i}": m for i, m in enumerate(memories)})

    def proposals(
        self, state: LatentState, walkers: np.ndarray, z: np.ndarray, n: int, random: np.random.Generator
    ) -> tuple[LatentState, list[np.ndarray]]:
        """Put `walkers` to z ``(len(walkers), latent_dim)``, let them see it, and draw n unconfined next steps of each.

        Returns the state with their memories after z, and the draws, n arrays like z.
        """
        memory = {name: value.copy() for name, value in state.memory.items()}
        for i, stepper in enumerate(self._steppers):
            memory[f"memory_{i}"][walkers] = stepper.remember(z, memory[f"memory_{i}"][walkers])
        draws = []
        for _ in range(n):
            later = np.empty_like(z)
            for i, mine in enumerate(self._assigned(len(z), random)):
                stepper = self._steppers[i]
                features = stepper.features(z[mine], memory[f"memory_{i}"][walkers[mine]])
                later[mine] = z[mine] + stepper.draw(features, random)
            draws.append(later)
        return LatentState(state.z, memory), draws

    def _assigned(self, n: int, random: np.random.Generator) -> list[np.ndarray]:
        """Which walkers take this step from which member; drawn anew for each step."""
        if len(self._steppers) == 1:
            return [np.arange(n)]
        chosen = random.integers(len(self._steppers), size=n)
        return [np.flatnonzero(chosen == i) for i in range(len(self._steppers))]

    def _moved(self, stepper: Stepper, z: np.ndarray, memory: np.ndarray, random: np.random.Generator) -> np.ndarray:
        later = z + stepper.draw(stepper.features(z, memory), random)
        support = self.support
        if not self.confined or support is None:
            return later
        refused, region = support.beyond(z, later), None
        if support.confines:
            regions = support.regions.region(np.concatenate([z, later]))
            region, after = regions[: len(z)], regions[len(z) :]
            leaving = (after != region) & (region != 0)
            leaving[refused] = False
            leaving = np.flatnonzero(leaving)
            if len(leaving):
                accepted = random.random(len(leaving)) < support.accept[region[leaving], after[leaving]]
                jump = leaving[accepted]
                later[jump] = support.jump(region[jump], after[jump], random)
                refused = np.concatenate([refused, leaving[~accepted]])
        if len(refused):
            there = None if region is None else region[refused]
            later[refused] = self._redrawn(stepper, z[refused], memory[refused], there, random)
        if region is not None:
            astray = np.flatnonzero(region == 0)
            if len(astray):
                later[astray] = support.continued(z[astray])
            self._add_jumps(later, region, random)
        return later

    def _add_jumps(self, later: np.ndarray, before: np.ndarray, random: np.random.Generator) -> None:
        """Transitions between regions that the propagator proposes too rarely, at the rate of the training data."""
        assert self.support is not None
        chosen = np.flatnonzero(random.random(len(later)) < self.support.extra_total[before])
        if len(chosen):
            with np.errstate(divide="ignore"):
                after = pick(np.log(self.support.extra[before[chosen]]), random)
            later[chosen] = self.support.jump(before[chosen], after, random)

    def _redrawn(
        self,
        stepper: Stepper,
        z: np.ndarray,
        memory: np.ndarray,
        region: np.ndarray | None,
        random: np.random.Generator,
    ) -> np.ndarray:
        """A step within the limits of the data that ends in the region where the walker is (None for any); z itself
        where there is none in a few trials."""
        assert self.support is not None
        later, left, features = z.copy(), np.arange(len(z)), stepper.features(z, memory)
        for _ in range(TRIALS):
            if not len(left):
                break
            drawn = z[left] + stepper.draw(features[left], random)
            good = np.ones(len(left), bool) if region is None else self.support.regions.region(drawn) == region[left]
            good[self.support.beyond(z[left], drawn)] = False
            later[left[good]] = drawn[good]
            left = left[~good]
        return later

    def doubt(self, state: LatentState) -> np.ndarray:
        """Distance from the training data, and spread of the members' predictions, each over its largest value in
        the validation data; the larger of the two."""
        if self.support is None:
            return np.zeros(len(state))
        found = self.support.far(state.z) / self.support.distance
        if len(self.rnns) > 1:
            found = np.maximum(found, self.spread(state) / self.support.spread)
        return found

    def spread(self, state: LatentState) -> np.ndarray:
        """Root-mean-square difference of the members' mean predictions, ``(n,)``, in units of the latent."""
        means = []
        for i, stepper in enumerate(self._steppers):
            after = stepper.remember(state.z, state.memory[f"memory_{i}"])
            means.append(stepper.mean(stepper.features(state.z, after)))
        return np.sqrt(np.mean(np.var(means, axis=0), axis=-1))

    # -- model file ------------------------------------------------------------------------------------------------

    def card(self) -> dict[str, Any]:
        """The card of the model file."""
        return {
            "kind": "propagator",
            "family": FAMILY,
            "config": {
                "form": "led",
                "led": dataclasses.asdict(self.config),
                "features": self.features.to_dict(),
                "interval": self.interval,
                "temperature": self.temperature,
                "support": None if self.support is None else self._extent(self.support),
            },
            "units": {"length": "nm", "time": "ps", "angle": "rad"},
            **self.details,
        }

    @staticmethod
    def _extent(support: Support) -> list[float | None]:
        """Distance, spread and width of the cells; JSON knows no infinity, the spread of one member is null."""
        return [support.distance, support.spread if np.isfinite(support.spread) else None, support.regions.width]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the card needs beside it."""
        found = {f"autoencoder.{k}": v for k, v in self.autoencoder.state_dict().items()}
        for i, rnn in enumerate(self.rnns):
            found |= {f"rnn_{i}.{k}": v for k, v in rnn.state_dict().items()}
        if self.support is not None:
            found |= {f"support.{name}": torch.as_tensor(value) for name, value in self.support.arrays().items()}
        if self.moments is not None:
            found["moments"] = torch.as_tensor(self.moments)
        return found

    def save(self, path: str | Path) -> Path:
        """Write a model file."""
        return model_file.save(path, self.card(), self.tensors())

    @classmethod
    def from_card(cls, card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LED:
        """The model of a card and its tensors; raises `ValueError` if they do not fit each other."""
        stored = card["config"]
        try:
            config = LEDConfig(**stored["led"])
            features = Features.from_dict(stored["features"])
            autoencoder = Autoencoder(config, Shapes.of(features))
            autoencoder.load_state_dict(_part(tensors, "autoencoder."))
            if isinstance(autoencoder.density, FixedKernels):
                autoencoder.density.freeze()
            rnns = [LatentRNN(config) for _ in range(config.members)]
            for i, rnn in enumerate(rnns):
                rnn.load_state_dict(_part(tensors, f"rnn_{i}."))
            return cls(
                config, features, autoencoder, rnns, interval=stored["interval"], temperature=stored["temperature"],
                support=_read_support(stored.get("support"), tensors, config.latent_dim),
                moments=_read_moments(config, features, tensors),
                details={k: card[k] for k in model_file.CARD_FIELDS if k in card},
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
            raise ValueError(f"modelPath: card and tensors do not describe an LED model ({reason})") from error


def _read_support(
    extent: list[float | None] | None, tensors: dict[str, torch.Tensor], latent_dim: int
) -> Support | None:
    """That of a model file; `extent` is distance, spread and width of the cells, or None for a model without."""
    if extent is None:
        return None
    distance, spread, width = extent
    if distance is None or width is None:
        raise ValueError(f"support: expected distance and width of the cells, got {extent}")
    arrays = {name: value.numpy() for name, value in _part(tensors, "support.").items()}
    support = Support.from_arrays(arrays, distance, np.inf if spread is None else spread, width)
    if support.points.shape[1] != latent_dim:
        raise ValueError(f"support.points: expected {latent_dim} columns, got {support.points.shape[1]}")
    return support


def _read_moments(config: LEDConfig, features: Features, tensors: dict[str, torch.Tensor]) -> np.ndarray | None:
    """Those of a model file with `LEDConfig.calibrate`."""
    if not config.calibrate:
        return None
    moments = tensors["moments"].numpy()
    if moments.shape != (2, len(features.kinds)):
        raise ValueError(f"moments: expected shape (2, {len(features.kinds)}), got {moments.shape}")
    return moments


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, max(len(x), 1), BATCH):
        yield x[start : start + BATCH]


def _numpy_layers(autoencoder: Autoencoder) -> list[tuple[np.ndarray, np.ndarray]]:
    """The decoder's trunk, the rotation of the latent coordinates folded into its first layer."""
    linear = [layer for layer in autoencoder.trunk if isinstance(layer, torch.nn.Linear)]
    layers = [(p.weight.detach().numpy().T, p.bias.detach().numpy()) for p in linear]
    weight, bias = layers[0]
    back, mean = autoencoder.z_back.numpy(), autoencoder.z_mean.numpy()
    layers[0] = (back @ weight, mean @ weight + bias)
    return [(np.ascontiguousarray(w, np.float32), np.asarray(b, np.float32)) for w, b in layers]
