"""What a comparison of a model with molecular dynamics is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openmm_led.views import Geometry, View
from openmm_mlff.analysis.chapman_kolmogorov import ChapmanKolmogorov
from openmm_mlff.analysis.kinetics import ImpliedTimescales
from openmm_mlff.analysis.passages import FirstPassages

#: names of the sources that every comparison has
MD, AUTOENCODER, LED = "MD", "autoencoder", "LED"


@dataclass(frozen=True)
class Settings:
    """How a comparison is made.

    Attributes:
        lag: frames, of the figures that need one; None chooses by the length of the runs.
        sets: metastable sets. states: of Markov models. copies: latent runs from the start of each test run.
        history: frames of each test run that the memory of a latent run begins with.
        timescales: how many. resamples: of the bootstrap. bins: of distributions, per dimension.
        baselines: compare a Markov state model and a linear model as well. seed: of everything random.
    """

    lag: int | None = None
    sets: int = 2
    states: int = 100
    copies: int = 4
    history: int = 10
    timescales: int = 2
    resamples: int = 30
    bins: int = 36
    baselines: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"sets": 2, "states": 2, "copies": 1, "history": 1, "timescales": 1, "resamples": 2, "bins": 2}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name}: expected at least {bound}, got {getattr(self, name)!r}")
        if self.lag is not None and not self.lag >= 1:
            raise ValueError(f"lag: expected at least 1 frame, got {self.lag!r}")


@dataclass
class Seen:
    """Frames of one source as they are compared: per run, latent coordinates ``(n_frames, latent_dim)`` and columns of
    every view, and sums over their geometry. A source has `copies` times as many runs as there are test runs."""

    z: list[np.ndarray] = field(default_factory=list)
    views: dict[str, list[np.ndarray]] = field(default_factory=dict)
    geometry: Geometry | None = None

    def copy(self, name: str, k: int, n_runs: int) -> np.ndarray:
        """All frames of one copy in a view, or of the latent coordinates (``latent``), one run after the other."""
        runs = self.z if name == "latent" else self.views[name]
        return np.concatenate(runs[k * n_runs : (k + 1) * n_runs])


@dataclass(frozen=True)
class Kinetics:
    """What states say about one source.

    Attributes:
        timescales: against the lag. tests: Chapman-Kolmogorov, None where the runs are too short. passages: between
            the cores of the metastable sets. shares: of frames in these cores, with errors.
    """

    timescales: ImpliedTimescales
    test: ChapmanKolmogorov | None
    passages: dict[tuple[str, str], FirstPassages]
    shares: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: figures ``(value, error)`` by source; `best` says what a faithful model would have."""

    section: str
    quantity: str
    unit: str
    values: dict[str, tuple[float, float]]


@dataclass
class Comparison:
    """Everything that `validate` found; `report.write_report` makes files of it.

    Attributes:
        rows: of the table. seen: frames by source. kinetics: by space (``latent``, ``decoded``) and source.
        views: that frames were looked at by. floors: JSD of MD against MD by view, with the spread.
        lag: frames. interval: ps. settings, notes: how it was made, and what could not be.
        about: plain facts about model and data.
    """

    rows: list[Row]
    seen: dict[str, Seen]
    kinetics: dict[str, dict[str, Kinetics]]
    views: list[View]
    floors: dict[str, tuple[float, float]]
    lag: int
    interval: float
    settings: Settings
    notes: list[str]
    about: dict[str, Any]
