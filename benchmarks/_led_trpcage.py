"""Trp-cage for `led_trpcage.py`: what its frames are judged by, dynamics and models alike, and the picture.

nm, ps, K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from _common import HERE
from _led_systems import SPLITS, load, topology_of, trp_cage

from openmm_led import Features, Trajectories
from openmm_led.geometry import superpose
from openmm_led.projections import LinearProjection
from openmm_led.slow_modes import slow_modes
from openmm_mlff.analysis.distributions import floor, jensen_shannon
from openmm_mlff.analysis.kinetics import implied_timescale_of
from openmm_mlff.analysis.plots import pyplot, save_figure

INTERVAL, TEMPERATURE = 2.0, 300.0
#: frames between the two ends of a pair, for slow coordinates and timescales
LAG = 5
BINS = 25
#: ways to share out training and validation replicas for the choice of settings
FOLDS = 3
MEASURES = ("RMSD of CA", "RMSD of heavy atoms", "radius of gyration", "end to end", "TICA 1", "TICA 2")
UNITS = ("nm", "nm", "nm", "nm", "", "")
#: of the bars; LED and dynamics as in the distributions above them
COLOURS = {"LED": "tab:red", "MSM": "tab:blue", "linear-Gaussian": "tab:orange", "MD, training": "0.55"}


@dataclass(frozen=True)
class Data:
    """Replicas by split, whole rounds only, and what they are measured by.

    Attributes:
        runs: by split, ``(n_frames, 304, 3)`` nm each.
    """

    runs: dict[str, list[np.ndarray]]

    @classmethod
    def read(cls, folder: Path) -> Data:
        """What `led_data.py` has written to a folder so far."""
        return cls({s: [r.positions for r in load("trpcage", s, folder=folder)] for s in SPLITS})

    def first(self, frames: int) -> Data:
        """The first so many frames of every replica; raises `ValueError` if one has fewer."""
        if frames > self.frames_each:
            raise ValueError(f"frames: expected at most the {self.frames_each} of every replica, got {frames}")
        return Data({s: [x[:frames] for x in runs] for s, runs in self.runs.items()})

    def fold(self, k: int) -> Data:
        """Training and validation replicas shared out anew for cross-validation, in `FOLDS` ways: a third of them is
        held back as "test", two more are "valid". The test replicas are in none of them."""
        replicas = [*self.runs["train"], *self.runs["valid"]]
        order = np.random.default_rng(0).permutation(len(replicas)).tolist()
        held = order[k::FOLDS]
        rest = [i for i in order if i not in held]
        shares = {"train": rest[len(self.runs["valid"]) :], "valid": rest[: len(self.runs["valid"])], "test": held}
        return Data({s: [replicas[i] for i in sorted(share)] for s, share in shares.items()})

    def shared_anew(self, k: int) -> Data:
        """All replicas, the test's too, shared out at random into splits as large as they are."""
        replicas = [x for split in SPLITS for x in self.runs[split]]
        order, ends = np.random.default_rng([k, 1]).permutation(len(replicas)).tolist(), {}
        for split in SPLITS:
            ends[split], order = sorted(order[: len(self.runs[split])]), order[len(self.runs[split]) :]
        return Data({split: [replicas[i] for i in chosen] for split, chosen in ends.items()})

    def trajectories(self, split: str) -> Trajectories:
        names = tuple(f"{split} {k}" for k in range(len(self.runs[split])))
        return Trajectories(tuple(self.runs[split]), INTERVAL, names)

    def nanoseconds(self, split: str) -> float:
        return sum(map(len, self.runs[split])) * INTERVAL / 1000

    @property
    def frames_each(self) -> int:
        return min(len(run) for runs in self.runs.values() for run in runs)

    @cached_property
    def tica(self) -> LinearProjection:
        """The two slowest coordinates of the distances between CA, fitted to training replicas (see `slow_modes`)."""
        features = Features.distances(topology_of("trpcage"), None, "heavy")
        inputs = {
            s: [np.asarray(features.inputs(x.astype(np.float64))) for x in self.runs[s]] for s in ("train", "valid")
        }
        flat = {s: np.concatenate(x) for s, x in inputs.items()}
        begin = {s: np.cumsum([0, *map(len, x[:-1])]) for s, x in inputs.items()}
        pairs = {
            s: np.concatenate([b + np.arange(len(run) - LAG) for b, run in zip(begin[s], x, strict=True)])
            for s, x in inputs.items()
        }
        modes = slow_modes(flat["train"], pairs["train"], flat["valid"], pairs["valid"], LAG, 2)
        return LinearProjection(features, flat["train"].mean(0), modes.matrix)

    @cached_property
    def _native(self) -> np.ndarray:
        return trp_cage()[2]

    @cached_property
    def _atoms(self) -> tuple[list[int], list[int]]:
        atoms = list(topology_of("trpcage").atoms())
        return [a.index for a in atoms if a.name == "CA"], [a.index for a in atoms if a.element.symbol != "H"]

    def measure(self, positions: np.ndarray) -> np.ndarray:
        """`MEASURES` ``(n, 6)`` of positions ``(n, 304, 3)``; RMSD from PDB entry 1L2Y."""
        x = np.asarray(positions, dtype=np.float64)
        alpha, heavy = self._atoms
        middle = x[:, heavy].mean(1, keepdims=True)
        columns = [
            _rmsd(x[:, alpha], self._native[alpha]),
            _rmsd(x[:, heavy], self._native[heavy]),
            np.sqrt(np.mean(np.sum((x[:, heavy] - middle) ** 2, -1), -1)),
            np.linalg.norm(x[:, alpha[-1]] - x[:, alpha[0]], axis=-1),
        ]
        return np.column_stack([*columns, self.tica.encode(x)])

    @cached_property
    def measured(self) -> dict[str, list[np.ndarray]]:
        """`MEASURES` of all replicas, by split."""
        return {s: [self.measure(x) for x in runs] for s, runs in self.runs.items()}

    @cached_property
    def bounds(self) -> np.ndarray:
        """Lowest and highest value of each measure in all replicas, ``(6, 2)``; beyond them is the outermost bin."""
        every = np.concatenate([x for runs in self.measured.values() for x in runs])
        return np.stack([every.min(0), every.max(0)], axis=1)

    def divergences(self, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        """Jensen-Shannon divergence (nats) of each measure."""
        return {name: self._divergence(k)(a, b) for k, name in enumerate(MEASURES)}

    def _divergence(self, k: int) -> Callable[[np.ndarray, np.ndarray], float]:
        return lambda a, b: jensen_shannon(a[:, k], b[:, k], BINS, bounds=[tuple(self.bounds[k])])

    def floors(self) -> dict[str, Any]:
        """Divergence of two sets of dynamics: half of all replicas each, and extrapolated to the training length.

        Two sets as long as the training data do not fit; the divergence falls as 1 / length once replicas are
        independent draws of the same distribution.
        """
        runs = [x for split in SPLITS for x in self.measured[split]]
        half = len(runs) // 2
        frames = half * self.frames_each
        found = [floor(runs, frames, self._divergence(k)) for k in range(len(MEASURES))]
        share = half / len(self.runs["train"])
        return {
            name: {"half": f.value, "spread": f.error, "train": share * f.value}
            for name, f in zip(MEASURES, found, strict=True)
        }


def timescale(runs: Sequence[np.ndarray], resamples: int = 200) -> dict[str, float | None]:
    """Slowest timescale (ps) of slow coordinates ``(n_frames, 2)`` at `LAG`, with its 95 % interval.

    The interval resamples whole runs (pieces of them where there are fewer than 20).
    """
    found = implied_timescale_of(runs, LAG, interval=INTERVAL, resamples=resamples)
    values = {"value": found.values[0], "low": found.low[0], "high": found.high[0]}
    return {name: float(v) if np.isfinite(v) else None for name, v in values.items()}


def _rmsd(x: np.ndarray, target: np.ndarray) -> np.ndarray:
    apart = np.asarray(superpose(x, target)) - target
    return np.sqrt(np.mean(np.sum(apart**2, -1), -1))


def picture(data: Data, generated: np.ndarray, level: dict[str, Any], rows: list[dict[str, Any]], title: str) -> None:
    """Distributions of the test replicas and of LED; beneath, divergences against the floor.

    Args:
        generated: `MEASURES` of decoded frames of one seed, ``(n, 6)``. rows: ``name`` and ``divergence`` of models.
    """
    plt = pyplot()
    figure = plt.figure(figsize=(10, 8.2), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 1.1))
    sources = {"MD, training": data.measured["train"], "MD, test": data.measured["test"], "LED": [generated]}
    styles = {"MD, training": ("0.55", "--"), "MD, test": ("black", "-"), "LED": ("tab:red", "-")}
    for k, name in enumerate(MEASURES):
        axis = figure.add_subplot(grid[divmod(k, 3)])
        edges = np.linspace(*data.bounds[k], BINS + 1)
        for label, runs in sources.items():
            values = np.clip(np.concatenate(runs)[:, k], *data.bounds[k])
            density = np.histogram(values, edges, density=True)[0]
            colour, line = styles[label]
            axis.stairs(density, edges, color=colour, linestyle=line, label=label, linewidth=1.3)
        axis.set_xlabel(f"{name} ({UNITS[k]})" if UNITS[k] else name)
        axis.set_yticks([])
    figure.axes[0].set_ylabel("density")
    figure.axes[3].set_ylabel("density")
    figure.axes[0].legend(fontsize=8, frameon=False)
    axis = figure.add_subplot(grid[2, :])
    names = list(dict.fromkeys(row["name"] for row in rows))
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        values = np.array([list(row["divergence"].values()) for row in rows if row["name"] == name])
        at = np.arange(len(MEASURES)) + (j - 0.5 * (len(names) - 1)) * width
        spread = values.std(0, ddof=1) if len(values) > 1 else None
        axis.bar(at, values.mean(0), width, yerr=spread, label=name, color=COLOURS[name], error_kw={"linewidth": 1})
    for k, name in enumerate(MEASURES):
        label = "twice the floor" if k == 0 else None
        axis.hlines(2 * level[name]["train"], k - 0.45, k + 0.45, color="black", linewidth=1.5, label=label)
    axis.set_xticks(range(len(MEASURES)), [name.replace(" of ", "\nof ") for name in MEASURES])
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])
    axis.set_ylabel("divergence from test (nats)")
    axis.legend(fontsize=8, frameon=False, ncols=3)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, HERE / "led_trpcage.png")
