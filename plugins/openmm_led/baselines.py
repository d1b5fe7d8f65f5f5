"""What LED has to beat: a Markov state model and a linear-Gaussian model, from the same data, as propagators.

    encoder = LinearProjection.tica(features, train, latent_dim=2, lag=10)
    model = MSMPropagator.fit(encoder, train, n_states=200)

Both run in the latent space of an encoder (TICA, or that of a trained LED) and give back frames of the training data,
so that whatever is decoded is a structure that molecular dynamics has made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from openmm import app

from openmm_led.model import FAMILY
from openmm_led.projections import Encoder, encoder_card, encoder_tensors, read_encoder
from openmm_led.trajectories import Trajectories, describe
from openmm_mlff.analysis.kinetics import Clusters, Transitions
from openmm_mlff.data import model_file
from openmm_mlff.sampling.propagators import LatentState, Propagator


class _Baseline(Propagator):
    """An encoder, and frames of the training data with their latent coordinates.

    Attributes:
        encoder: positions -> latent coordinates. frames: ``(m, n_atoms, 3)`` nm, single precision. points: their
            latent coordinates, ``(m, latent_dim)``. details: further fields of the model card.
    """

    form: ClassVar[str]

    def __init__(
        self,
        encoder: Encoder,
        frames: np.ndarray,
        points: np.ndarray,
        *,
        interval: float,
        temperature: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        self.encoder = encoder
        self.latent_dim, self.n_atoms = encoder.latent_dim, encoder.n_atoms
        self.frames, self.points = np.asarray(frames, np.float32), np.asarray(points, np.float64)
        if self.frames.shape != (len(self.points), self.n_atoms, 3) or not len(self.points):
            raise ValueError(f"frames: expected shape (m, {self.n_atoms}, 3), m > 0, got {self.frames.shape}")
        if self.points.shape != (len(self.frames), self.latent_dim):
            raise ValueError(f"points: expected shape ({len(self.frames)}, {self.latent_dim}), got {self.points.shape}")
        self.interval, self.temperature, self.details = float(interval), temperature, dict(details or {})

    def check_topology(self, topology: app.Topology) -> None:
        self.encoder.check_topology(topology)

    def encode(self, positions: np.ndarray) -> np.ndarray:
        return self.encoder.encode(positions)

    def start(self, history: np.ndarray) -> LatentState:
        past = np.asarray(history, dtype=np.float64)
        if past.ndim != 3 or past.shape[2] != self.latent_dim or past.shape[1] < 1:
            raise ValueError(f"history: expected shape (n, n_frames, {self.latent_dim}), got {past.shape}")
        return LatentState(past[:, -1].copy())

    def _checked(self, z: np.ndarray) -> np.ndarray:
        """Latent coordinates as double precision; raises `ValueError` for another shape or numbers not finite."""
        values = np.asarray(z, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != self.latent_dim:
            raise ValueError(f"z: expected shape (n, {self.latent_dim}), got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("z: expected finite numbers, got NaN or infinity")
        return values

    # -- model file ------------------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, np.ndarray]:
        """What this form adds to the tensors of the model file."""
        raise NotImplementedError

    def card(self) -> dict[str, Any]:
        """The card of the model file; raises `ValueError` for an encoder of one's own, which no file can hold."""
        return {
            "kind": "propagator",
            "family": FAMILY,
            "config": {
                "form": self.form,
                "encoder": encoder_card(self.encoder),
                "interval": self.interval,
                "temperature": self.temperature,
            },
            "units": {"length": "nm", "time": "ps", "angle": "rad"},
            **self.details,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the card needs beside it."""
        arrays = {"frames": self.frames, "points": self.points, **self._arrays()}
        return {**encoder_tensors(self.encoder), **{k: torch.as_tensor(np.asarray(v)) for k, v in arrays.items()}}

    def save(self, path: str | Path) -> Path:
        """Write a model file."""
        return model_file.save(path, self.card(), self.tensors())

    @classmethod
    def from_card(cls, card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        """The model of a card and its tensors; raises `ValueError` if they do not fit each other."""
        stored = card["config"]
        try:
            if stored["form"] != cls.form:
                raise ValueError(f"model: expected the form {cls.form!r} in the card, got {stored['form']!r}")
            own = {k: v.numpy() for k, v in tensors.items() if not k.startswith("encoder.")}
            return cls(
                read_encoder(stored["encoder"], tensors), own.pop("frames"), own.pop("points"), **own,
                interval=stored["interval"], temperature=stored["temperature"],
                details={k: card[k] for k in model_file.CARD_FIELDS if k in card},
            )  # fmt: skip
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"modelPath: the card does not describe a {cls.form} model ({error})") from error


def _latent(encoder: Encoder, train: Trajectories, lag: int) -> list[np.ndarray]:
    """Latent trajectories; raises `ValueError` for a lag that does not fit, or another number of atoms."""
    if lag < 1:
        raise ValueError(f"lag: expected at least 1 frame, got {lag}")
    train.check_lag(lag)
    if train.frames[0].shape[1] != encoder.n_atoms:
        raise ValueError(
            f"trajectories: expected the {encoder.n_atoms} atoms that the encoder knows, got {train.frames[0].shape[1]}"
        )
    return [np.asarray(encoder.encode(run), dtype=np.float64) for run in train.frames]


class MSMPropagator(_Baseline):
    """A Markov state model on k-means states of the latent space.

    A step draws the next state from the transition matrix, and the latent coordinates of a random training frame in
    it; decoding gives a random training frame of the state of z. There is no memory beside the state.

    Attributes:
        centres: ``(n_states, latent_dim)`` of the connected states. transitions: ``(n_states, n_states)``, rows sum to
            one, per `interval`. kept: share of the counted transitions that lie within the connected states.
    """

    form = "msm"

    def __init__(
        self,
        encoder: Encoder,
        frames: np.ndarray,
        points: np.ndarray,
        *,
        centres: np.ndarray,
        transitions: np.ndarray,
        kept: float | np.ndarray = 1.0,
        interval: float,
        temperature: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, frames, points, interval=interval, temperature=temperature, details=details)
        self.centres = np.asarray(centres, np.float64).reshape(-1, self.latent_dim)
        self.transitions, self.kept = np.asarray(transitions, np.float64), float(kept)
        n = len(self.centres)
        if self.transitions.shape != (n, n) or not np.allclose(self.transitions.sum(axis=1), 1.0, atol=1e-6):
            raise ValueError(f"transitions: expected shape ({n}, {n}) with rows that sum to one")
        # rows end at exactly their number plus one, so that one sorted list serves all states
        ladder = np.cumsum(self.transitions, axis=1)
        self._ladder = (ladder / ladder[:, -1:] + np.arange(n)[:, None]).ravel()
        member = self.states(self.points)
        self._members = np.argsort(member, kind="stable")
        self._first = np.searchsorted(member[self._members], np.arange(n + 1))
        if (np.diff(self._first) == 0).any():
            raise ValueError("frames: expected at least one in every state")

    @classmethod
    def fit(
        cls,
        encoder: Encoder,
        train: Trajectories,
        *,
        n_states: int = 100,
        lag: int = 1,
        reversible: bool = True,
        frames_per_state: int = 100,
        temperature: float | None = None,
        seed: int = 0,
    ) -> MSMPropagator:
        """Cluster the latent trajectories, count, and estimate by maximum likelihood.

        Args:
            n_states: of k-means. lag: frames; the interval of the model is as long. reversible: with detailed balance.
            frames_per_state: at most as many, drawn at random, are kept. temperature: of the data, K.
            seed: of k-means and of the choice of frames.

        Raises `ValueError` naming an argument out of range.
        """
        if frames_per_state < 1:
            raise ValueError(f"frames_per_state: expected at least 1, got {frames_per_state}")
        latent = _latent(encoder, train, lag)
        clusters = Clusters.fit(latent, n_states, seed)
        dtrajs = [clusters.assign(z) for z in latent]
        counted = Transitions(dtrajs, lag, [(k, 0, len(d)) for k, d in enumerate(dtrajs)])
        chain = counted.model(reversible)
        centres = clusters.centres[chain.symbols]
        # frames of states that were never left or never entered go to the nearest state that is modelled
        member = np.concatenate([Clusters(centres).assign(z) for z in latent])
        random = np.random.default_rng(seed)
        order = random.permutation(len(member))
        order = order[np.argsort(member[order], kind="stable")]
        rank = np.arange(len(order)) - np.searchsorted(member[order], member[order])
        chosen = np.sort(order[rank < frames_per_state])
        details = {"training_data": describe({"train": train}),
                   "training": {"n_states": n_states, "lag": lag, "reversible": reversible, "seed": seed}}  # fmt: skip
        return cls(
            encoder, _rows(train.frames, chosen), np.concatenate(latent)[chosen], centres=centres,
            transitions=chain.matrix, kept=chain.kept, interval=lag * train.interval, temperature=temperature,
            details=details,
        )  # fmt: skip

    @cached_property
    def _clusters(self) -> Clusters:
        return Clusters(self.centres)

    def states(self, z: np.ndarray) -> np.ndarray:
        """The state ``(n,)`` of latent coordinates ``(n, latent_dim)``: that of the nearest centre."""
        return self._clusters.assign(self._checked(z))

    def _frame_of(self, states: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A random stored frame of each state, by index."""
        first, size = self._first[states], np.diff(self._first)[states]
        return self._members[first + random.integers(size)]

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return self.frames[self._frame_of(self.states(z), random)].astype(np.float64)

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        now = self.states(state.z)
        n = len(self.centres)
        later = np.searchsorted(self._ladder, now + random.random(len(now)), "right") - n * now
        return LatentState(self.points[self._frame_of(np.minimum(later, n - 1), random)])

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"centres": self.centres, "transitions": self.transitions, "kept": np.array(self.kept)}


class LinearGaussian(_Baseline):
    """A vector autoregression, z' = A z + b + noise, with full covariance of the noise.

    Decoding gives the training frame that is nearest in latent space.

    Attributes:
        matrix: A, ``(latent_dim, latent_dim)``. offset: b, ``(latent_dim,)``. covariance: of the noise.
    """

    form = "linear_gaussian"

    def __init__(
        self,
        encoder: Encoder,
        frames: np.ndarray,
        points: np.ndarray,
        *,
        matrix: np.ndarray,
        offset: np.ndarray,
        covariance: np.ndarray,
        interval: float,
        temperature: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, frames, points, interval=interval, temperature=temperature, details=details)
        self.matrix, self.offset, self.covariance = (np.asarray(x, np.float64) for x in (matrix, offset, covariance))
        d = self.latent_dim
        if self.matrix.shape != (d, d) or self.offset.shape != (d,) or self.covariance.shape != (d, d):
            raise ValueError(f"matrix, offset, covariance: expected shapes ({d}, {d}), ({d},), ({d}, {d})")
        radius = float(np.abs(np.linalg.eigvals(self.matrix)).max())
        if not radius < 1.0:
            raise ValueError(f"matrix: expected eigenvalues below one in size (a stationary process), got {radius:.6g}")
        self._noise = np.linalg.cholesky(self.covariance)

    @classmethod
    def fit(
        cls,
        encoder: Encoder,
        train: Trajectories,
        *,
        lag: int = 1,
        n_frames: int = 20_000,
        temperature: float | None = None,
        seed: int = 0,
    ) -> LinearGaussian:
        """Least squares over all pairs of frames `lag` apart, which is maximum likelihood given the first frames.

        Args:
            lag: frames; the interval of the model is as long. n_frames: at most as many, drawn at random, are kept.

        Raises `ValueError` naming an argument out of range, and for data without a stationary fit.
        """
        if n_frames < 1:
            raise ValueError(f"n_frames: expected at least 1, got {n_frames}")
        latent = _latent(encoder, train, lag)
        before = np.concatenate([z[:-lag] for z in latent])
        after = np.concatenate([z[lag:] for z in latent])
        if len(before) <= 2 * encoder.latent_dim:
            raise ValueError(
                f"trajectories: expected more than {2 * encoder.latent_dim} pairs of frames, got {len(before)}"
            )
        design = np.column_stack([before, np.ones(len(before))])
        solution, _, rank, _ = np.linalg.lstsq(design, after, rcond=None)
        if rank < design.shape[1]:
            raise ValueError(f"latent_dim: expected at most the rank of the data, {rank - 1}, got {encoder.latent_dim}")
        rest = after - design @ solution
        every = np.concatenate(latent)
        chosen = np.sort(np.random.default_rng(seed).permutation(len(every))[:n_frames])
        details = {"training_data": describe({"train": train}), "training": {"lag": lag, "seed": seed}}
        return cls(
            encoder, _rows(train.frames, chosen), every[chosen], matrix=solution[:-1].T, offset=solution[-1],
            covariance=rest.T @ rest / (len(rest) - design.shape[1]), interval=lag * train.interval,
            temperature=temperature, details=details,
        )  # fmt: skip

    @cached_property
    def _nearest(self) -> Clusters:
        return Clusters(self.points)

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return self.frames[self._nearest.assign(self._checked(z))].astype(np.float64)

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        z = self._checked(state.z)
        return LatentState(z @ self.matrix.T + self.offset + random.standard_normal(z.shape) @ self._noise.T)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"matrix": self.matrix, "offset": self.offset, "covariance": self.covariance}


def _rows(runs: Sequence[np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """Frames by their number in all runs together, ascending, without putting the runs together."""
    ends = np.cumsum([len(run) for run in runs])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    begin = ends - [len(run) for run in runs]
    return np.concatenate([run[part - b] for run, part, b in zip(runs, parts, begin, strict=True)])
