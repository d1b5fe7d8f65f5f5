"""trajectories -> a trained `LED`: autoencoder, decoder, then propagators, each a resumable run of the one loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_led import support
from openmm_led.autoencoder import Autoencoder, AutoencoderMethod, DecoderMethod, Shapes
from openmm_led.config import LEDConfig, LEDOptions
from openmm_led.features import Features
from openmm_led.mixtures import FixedKernels
from openmm_led.model import BATCH, LED
from openmm_led.principal import Principal
from openmm_led.propagator import LatentRNN, PropagatorMethod, StatefulRNN
from openmm_led.slow_modes import slow_modes
from openmm_led.support import Support
from openmm_led.trajectories import Trajectories, check_separate, describe
from openmm_mlff.data.jobs import claim_folder
from openmm_mlff.training.loop import averaged, fit
from openmm_mlff.training.loop_options import LoopOptions

#: latent points of the training data that the model keeps to know its support
SUPPORT_POINTS = 20_000
#: steps that the propagator proposes from each training frame to find how often it leaves a region
DRAWS = 5
#: training frames from which means and widths of decoded coordinates are found: widths to half a percent
MOMENT_FRAMES = 20_000
#: training frames below which there is nothing to learn from: not even covariances of the encoder's inputs are known
LEAST_FRAMES = 100
#: between the seeds of restarts
_RESTART = 10_000


@dataclasses.dataclass
class _Encoded:
    """Inputs and coordinates of one set, all runs one after the other, and where runs begin."""

    inputs: np.ndarray
    coordinates: np.ndarray
    lengths: list[int]

    def pairs(self, lag: int) -> np.ndarray:
        """First frames of all pairs that are `lag` apart."""
        begin = np.cumsum([0, *self.lengths[:-1]])
        return np.concatenate([b + np.arange(max(n - lag, 0)) for b, n in zip(begin, self.lengths, strict=True)])

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, np.cumsum(self.lengths)[:-1])


@dataclasses.dataclass(frozen=True)
class LEDLearner:
    """Trains LED on runs of one molecule.

        model = LEDLearner(features, LEDConfig(latent_dim=2)).fit(train, valid, folder="led-run", temperature=300.0)

    Attributes:
        features: of the molecule. config: sizes and forms. options: how long and with which seed.
    """

    features: Features
    config: LEDConfig = dataclasses.field(default_factory=LEDConfig)
    options: LEDOptions = dataclasses.field(default_factory=LEDOptions)

    def __post_init__(self) -> None:
        if self.config.objective == "tica" and self.options.restarts > 1:
            raise ValueError(f"restarts: expected 1 with the objective 'tica', got {self.options.restarts}")

    def fit(
        self,
        train: Trajectories,
        valid: Trajectories,
        folder: str | Path,
        *,
        temperature: float | None = None,
        progress: bool = True,
        say: Callable[[str], None] = lambda line: None,
        details: dict[str, Any] | None = None,
    ) -> LED:
        """Train, or go on where a run in `folder` was stopped.

        Args:
            train, valid: separate runs. temperature: of the data, K.
            say: told one line per stage. details: further fields of the model card.

        Raises `ValueError` for data that do not fit (see `Trajectories`, `check_separate`), fewer frames than the lag
        or `LEAST_FRAMES`, a latent dimension above the rank of the data, and a `folder` of other settings;
        `FloatingPointError` if a loss is not finite; `KeyboardInterrupt` after an interrupt, with everything saved.
        """
        folder = Path(folder)
        self._check(train, valid)
        about = describe({"train": train, "valid": valid})
        settings = {"config": dataclasses.asdict(self.config), "options": dataclasses.asdict(self.options)}
        claim_folder(folder, settings | {"features": self.features.to_dict(), "data": about})
        features = self.features
        if features.kind != "raw":
            features = features.fit_template(np.concatenate(_spaced(train.frames, 5000)).astype(np.float64))
        sets = {"train": _encoded(features, train), "valid": _encoded(features, valid)}
        check_rank(sets["train"].inputs, self.config.latent_dim)
        autoencoder, slow = self._train_autoencoder(Shapes.of(features), sets, folder, progress, say)
        times = decorrelation_times(slow, train.interval * self.config.lag)
        say(f"latent coordinates decorrelate in {', '.join(times)} ps (one exponential each)")
        z = {name: _latent(autoencoder, s) for name, s in sets.items()}
        rnns = [self._train_propagator(k, z, folder, progress) for k in range(self.config.members)]
        model = LED(
            self.config, features, autoencoder, rnns, interval=train.interval, temperature=temperature,
            details={"training_data": about, "training": settings["options"], **(details or {})},
        )  # fmt: skip
        model.support = _support(model, z, self.options.seed)
        if self.config.calibrate:
            model.moments = _moments(model, np.concatenate(z["train"]), sets["train"].coordinates, self.options.seed)
        return model

    def _check(self, train: Trajectories, valid: Trajectories) -> None:
        for t in (train, valid):
            t.check_lag(max(self.config.lag, 1))
            if t.frames[0].shape[1] != self.features.n_atoms:
                raise ValueError(
                    f"trajectories: expected the {self.features.n_atoms} atoms of the features' topology, "
                    f"got {t.frames[0].shape[1]}"
                )
        if train.n_frames < LEAST_FRAMES:
            raise ValueError(f"trajectories: expected at least {LEAST_FRAMES} training frames, got {train.n_frames}")
        check_separate({"train": train, "valid": valid})

    def _loop(self, steps: int, seed: int) -> LoopOptions:
        rate = self.options.learning_rate
        return LoopOptions(
            steps=steps, learning_rate=rate, final_learning_rate=rate / 100, warmup_steps=min(100, steps // 5),
            validate_every=max(1, min(500, steps // 10)), ema_decay=0.99, clip_norm=10.0, seed=seed,
        )  # fmt: skip

    def _run(self, model: nn.Module, method: Any, steps: int, folder: Path, seed: int, progress: bool) -> float:
        """Train `model`, which then has the parameters of the best validation; returns its loss."""
        loop = self._loop(steps, seed)
        state = fit(model, method, loop, folder, resume=True, progress=progress, title=folder.name.replace("_", " "))
        if state.step < steps:
            raise KeyboardInterrupt
        with averaged(state) as best:
            model.load_state_dict(best.state_dict())
        return float(state.best["loss"])

    def _train_autoencoder(
        self, shapes: Shapes, sets: dict[str, _Encoded], folder: Path, progress: bool, say: Callable[[str], None]
    ) -> tuple[Autoencoder, np.ndarray]:
        """Encoder (with a decoder), rotation of the latent coordinates, decoder; returns their autocorrelations too."""
        c, o = self.config, self.options
        inputs, x = ({n: torch.as_tensor(getattr(s, what), dtype=torch.float32) for n, s in sets.items()}
                     for what in ("inputs", "coordinates"))  # fmt: skip
        data = {n: (inputs[n], x[n], s.pairs(c.lag)) for n, s in sets.items()}
        found = []
        for k in range(o.restarts):
            torch.manual_seed(o.seed + k * _RESTART)
            model = Autoencoder(c, shapes)
            model.fit_scales(sets["train"].inputs, sets["train"].coordinates)
            found.append((self._train_encoder(model, data, folder, k, progress), k, model))
            if o.restarts > 1:
                say(f"autoencoder {k + 1} of {o.restarts}: validation loss {found[k][0]:.4g}")
        model = min(found, key=lambda one: one[:2])[2]
        with torch.no_grad():
            u = torch.cat([model.raw(block) for block in inputs["train"].split(BATCH)]).numpy()
        at = data["train"][2]
        slow = model.orient(u[at], u[at + c.lag])
        # the decoder has seen outputs of the encoder scaled batch by batch; now they have their final scale
        z = {n: torch.as_tensor(np.concatenate(_latent(model, s)), dtype=torch.float32) for n, s in sets.items()}
        known = ((z["train"], x["train"]), (z["valid"], x["valid"]))
        self._run(model, DecoderMethod(*known, o.batch, o.seed), o.autoencoder_steps, folder / "decoder", o.seed,
                  progress)  # fmt: skip
        if isinstance(model.density, Principal):
            with torch.no_grad():
                model.density.settle(model.features_of(z["train"]), model.scaler(x["train"]))
        return model, slow

    def _train_encoder(
        self,
        model: Autoencoder,
        data: dict[str, tuple[Tensor, Tensor, np.ndarray]],
        folder: Path,
        restart: int,
        progress: bool,
    ) -> float:
        """Encoder, with the decoder that its objective asks for; returns the validation loss."""
        c, o = self.config, self.options
        if c.objective == "tica":
            (inputs, _, pairs), (valid, _, valid_pairs) = data["train"], data["valid"]
            modes = slow_modes(inputs.numpy(), pairs, valid.numpy(), valid_pairs, c.lag, c.latent_dim)
            model.set_linear(modes.matrix)
            return 0.0
        seed, ending = o.seed + restart * _RESTART, f"_{restart}" if restart else ""
        method = AutoencoderMethod(c, data["train"], data["valid"], o.batch, seed)
        if isinstance(model.density, FixedKernels):
            self._run(model, method, o.autoencoder_steps, folder / f"kernels{ending}", seed, progress)
            model.density.freeze()
        return self._run(model, method, o.autoencoder_steps, folder / f"autoencoder{ending}", seed, progress)

    def _train_propagator(self, member: int, z: dict[str, list[np.ndarray]], folder: Path, progress: bool) -> LatentRNN:
        o = self.options
        seed = o.seed + 1000 * member
        torch.manual_seed(seed)
        lanes = min(o.lanes, len(z["train"]))
        chunk = min(o.chunk, max(len(t) for t in z["train"]) - 1)
        model = StatefulRNN(LatentRNN(self.config), lanes)
        method = PropagatorMethod(z["train"], z["valid"], lanes, chunk, seed)
        self._run(model, method, o.propagator_steps, folder / f"propagator_{member}", seed, progress)
        return model.rnn


def decorrelation_times(autocorrelations: Sequence[float] | np.ndarray, lag: float) -> list[str]:
    """Times in the unit of `lag`, for a reader: ``inf`` for no decay, ``< lag`` where nothing is left after one lag."""
    return [
        "inf" if c >= 1 else f"< {lag:.3g}" if c <= 0 else f"{-lag / np.log(c):.3g}"
        for c in map(float, autocorrelations)
    ]


def check_rank(inputs: np.ndarray, latent_dim: int) -> None:
    """Raise `ValueError` if the inputs ``(n, n_inputs)`` vary in fewer than `latent_dim` directions."""
    spread = inputs.std(0)
    standard = (inputs - inputs.mean(0))[:, spread > 1e-6] / spread[spread > 1e-6]
    values = np.linalg.eigvalsh(np.cov(standard.T).reshape(standard.shape[1], -1)) if standard.size else np.zeros(1)
    rank = int(np.sum(values > 1e-8 * max(float(values[-1]), 1e-300)))
    if latent_dim > rank:
        raise ValueError(f"latent_dim: expected at most {rank}, the rank of the data's features, got {latent_dim}")


def _spaced(frames: tuple[np.ndarray, ...], total: int) -> list[np.ndarray]:
    each = max(1, total // len(frames))
    return [f[np.linspace(0, len(f) - 1, min(each, len(f))).astype(int)] for f in frames]


def _encoded(features: Features, data: Trajectories) -> _Encoded:
    inputs, coordinates = [], []
    for run in data.frames:
        for start in range(0, len(run), BATCH):
            block = run[start : start + BATCH].astype(np.float64)
            inputs.append(np.asarray(features.inputs(block), dtype=np.float32))
            coordinates.append(np.asarray(features.coordinates(block), dtype=np.float64))
    return _Encoded(np.concatenate(inputs), np.concatenate(coordinates), [len(run) for run in data.frames])


def _latent(model: Autoencoder, data: _Encoded) -> list[np.ndarray]:
    with torch.no_grad():
        blocks = torch.as_tensor(data.inputs).split(BATCH)
        z = torch.cat([model.encode(block) for block in blocks]).numpy()
    return data.split(z)


def _moments(model: LED, z: np.ndarray, coordinates: np.ndarray, seed: int) -> np.ndarray:
    """Offset and factor ``(2, n_coordinates)`` between coordinates drawn for latent states of the training data and
    their own; 0 and 1 on circles, whose range is not a line, and for those that do not vary."""
    spaced = np.linspace(0, len(z) - 1, min(len(z), MOMENT_FRAMES)).astype(int)
    drawn = model.decode_coordinates(z[spaced], np.random.default_rng([seed, 4]))
    straight = ~np.asarray(model.features.periodic) & (coordinates.std(0) > 0) & (drawn.std(0) > 0)
    factor = np.divide(coordinates.std(0), drawn.std(0), out=np.ones(len(straight)), where=straight)
    return np.stack([np.where(straight, coordinates.mean(0) - factor * drawn.mean(0), 0.0), factor])


def _support(model: LED, z: dict[str, list[np.ndarray]], seed: int) -> Support:
    """Regions and transitions of the training data, and the largest distance and spread of validation frames."""
    valid = np.concatenate(z["valid"])
    spaced = valid[np.linspace(0, len(valid) - 1, min(len(valid), 50_000)).astype(int)]
    found = support.build(z["train"], spaced, n_points=SUPPORT_POINTS, seed=seed)
    distance = float(found.far(spaced).max())
    if not distance > 0:
        raise ValueError(
            f"trajectories: expected validation frames that differ, got {support.NEIGHBOURS} or more equal ones"
        )
    if found.confines:
        accept, extra = _calibrated(model, found, z["train"], seed)
        found = dataclasses.replace(found, accept=accept, extra=extra)
    spread = np.inf
    if len(model.rnns) > 1:
        history = np.stack([run[:200] for run in z["valid"] if len(run) >= 200] or [z["valid"][0]])
        ends = range(1, history.shape[1] + 1, 10)
        spread = float(max(model.spread(model.start(history[:, :end])).max() for end in ends))
    return dataclasses.replace(found, distance=distance, spread=spread)


def _calibrated(model: LED, found: Support, runs: list[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps between regions in the training data against those that the propagator makes from the same frames."""
    n = len(found.accept)
    observed, proposed = np.zeros((n, n)), np.zeros((n, n))
    random = np.random.default_rng([seed, 3])
    state = model.start(np.stack([run[:1] for run in runs]))
    for t in range(max(len(run) for run in runs) - 1):
        going = np.array([k for k, run in enumerate(runs) if t + 1 < len(run)])
        now, later = (np.stack([runs[k][t + s] for k in going]).astype(np.float32) for s in (0, 1))
        before = found.regions.region(now)
        np.add.at(observed, (before, found.regions.region(later)), 1.0)
        state, draws = model.proposals(state, going, now, DRAWS, random)
        for drawn in draws:
            np.add.at(proposed, (before, found.regions.region(drawn)), 1.0 / DRAWS)
    return support.calibration(observed, proposed)
