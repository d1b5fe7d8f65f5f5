"""LED on the Müller-Brown potential against molecular dynamics with the same integrator, time step and frame spacing.

Training and validation: 32 trajectories of 6000 time units each, frames 0.5 apart (`led_mueller_brown_md.py` makes
them). Test: 96 other trajectories of the same length, simulated after all settings had been chosen. Every model is
trained from five seeds and generates 96 trajectories of 6000 units from the first 25 units of the test trajectories.

Rows: LED with one and with two latent coordinates and decoders whose kernels depend on z; LED with the published
decoder, whose kernels are constant, and the published sizes; a Markov state model and a linear-Gaussian model of the
positions. "decoder" rows decode the encoded test trajectories: what the decoder does to the kinetics by itself.

Times are mean first passages between two core ellipses (of completed passages, frames 0.5 apart), and slowest implied
timescales of a 20 x 20 grid. Populations are those of the ellipses and of the side x < y - 0.9.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write
from rich.console import Console
from rich.table import Table

from openmm_led import LED, Features, LEDConfig, LEDLearner, LEDOptions, Trajectories
from openmm_led.baselines import LinearGaussian, MSMPropagator
from openmm_led.config import PUBLISHED
from openmm_led.projections import LinearProjection
from openmm_mlff.analysis.distributions import wasserstein
from openmm_mlff.analysis.kinetics import Grid, implied_timescales
from openmm_mlff.analysis.passages import Ellipse, hitting_times
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import run_tasks
from openmm_mlff.sampling.model_potentials import TEMPERATURE, MuellerBrown, WalkerSettings, run_walkers
from openmm_mlff.sampling.propagators import Propagator, load_propagator

FOLDER = HERE.parent / ".work" / "led_mb"
INTERVAL = 0.5
#: the two core sets of the published evaluation
CORES = (
    Ellipse("upper", (-0.57, 1.45), (0.15, 0.30), -45.0),
    Ellipse("lower", (0.45, 0.05), (0.35, 0.15)),
)
GRID = Grid((-1.6, -0.4), (1.3, 2.1), (20, 20), (False, False))
LAGS = (2, 10, 20, 40)
WARM_UP = 50
TEST_SEED = 20261121
OPTIONS = LEDOptions(autoencoder_steps=5000, propagator_steps=6000)
CONFIGS = {
    "LED, 1 latent coordinate": LEDConfig(latent_dim=1, hidden=64, vamp_weight=3.0),
    "LED, 2 latent coordinates": LEDConfig(latent_dim=2, hidden=64, objective="reconstruction"),
    "published decoder and sizes": LEDConfig(**PUBLISHED["mueller_brown"]),
}
BASELINES = ("Markov state model", "linear-Gaussian")
SEEDS = (0, 1, 2, 3, 4)


def frames(split: str) -> np.ndarray:
    """``(n, 12001, 2)``; the test trajectories are made if they are not there."""
    path = FOLDER / f"{split}.npz"
    if split == "final":
        settings = WalkerSettings(seed=TEST_SEED)
        return run_walkers(MuellerBrown(), n_walkers=96, n_frames=12001, spacing=INTERVAL, settings=settings,
                           folder=FOLDER / "final_run")  # fmt: skip
    if not path.exists():
        raise SystemExit(f"no {path.name}; benchmarks/led_mueller_brown_md.py makes it")
    with np.load(path, allow_pickle=False) as stored:
        return stored["frames"]


def trajectories(split: str) -> Trajectories:
    """As positions of one particle in the plane."""
    runs = np.pad(frames(split), ((0, 0), (0, 0), (0, 1)))[:, :, None]
    return Trajectories(tuple(runs), INTERVAL)


def measures(runs: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Everything that is compared, of trajectories ``(n, n_frames, 2)``."""
    listed = list(runs)
    passages = hitting_times(listed, CORES, INTERVAL)
    states = [GRID.assign(run) for run in listed]
    # errors come from the seeds for models, and from resampled trajectories for the reference
    scales = implied_timescales(states, LAGS, interval=INTERVAL, resamples=20 if runs is reference else 0)
    flat, other = runs.reshape(-1, 2), reference.reshape(-1, 2)
    return {
        "upper_to_lower": passages["upper", "lower"].mean,
        "lower_to_upper": passages["lower", "upper"].mean,
        "passages": {f"{a} to {b}": p.summary() for (a, b), p in passages.items()},
        "timescales": {f"{lag * INTERVAL:g}": float(v) for lag, v in zip(LAGS, scales.values[:, 0], strict=True)},
        "timescale_errors": {f"{lag * INTERVAL:g}": float(v) for lag, v in zip(LAGS, scales.error[:, 0], strict=True)},
        "upper": float(CORES[0](flat).mean()),
        "lower": float(CORES[1](flat).mean()),
        "upper_side": float((flat[:, 1] - flat[:, 0] > 0.9).mean()),
        "w1_x": wasserstein(flat[:, 0], other[:, 0]),
        "w1_y": wasserstein(flat[:, 1], other[:, 1]),
        "mean_energy": float(MuellerBrown().energy(flat).mean()),
    }


def generate(model: Propagator, test: np.ndarray, seed: int) -> np.ndarray:
    """As many trajectories as long as the test's, after its first `WARM_UP` frames."""
    random = np.random.default_rng([seed, 7])
    positions = np.pad(test[:, :WARM_UP], ((0, 0), (0, 0), (0, 1)))
    z = model.encode(positions.reshape(-1, 1, 3)).reshape(len(test), WARM_UP, -1)
    path, _ = model.run(model.start(z), test.shape[1], random)
    return np.stack([model.decode(run, random)[:, 0, :2] for run in path])


def decoded(model: Propagator, test: np.ndarray, seed: int) -> np.ndarray:
    """The test trajectories, encoded and decoded."""
    random = np.random.default_rng([seed, 8])
    positions = np.pad(test, ((0, 0), (0, 0), (0, 1)))[:, :, None]
    return np.stack([model.decode(model.encode(run), random)[:, 0, :2] for run in positions])


def baseline(name: str, train: Trajectories, seed: int) -> Propagator:
    """A model of the positions themselves."""
    encoder = LinearProjection.standardised(Features.raw(2), train)
    if name == "linear-Gaussian":
        return LinearGaussian.fit(encoder, train, temperature=TEMPERATURE, seed=seed)
    return MSMPropagator.fit(encoder, train, n_states=400, temperature=TEMPERATURE, seed=seed)


def run(task: dict[str, Any], path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: train a model from one seed, and measure what it generates."""
    torch.set_num_threads(1)
    name, seed = task["name"], task["seed"]
    train, valid, test = trajectories("train"), trajectories("valid"), frames("final")
    stored = path.with_suffix(".safetensors")
    if stored.exists():
        model = load_propagator(stored)
    elif name in CONFIGS:
        options = LEDOptions(**{**asdict(OPTIONS), "seed": seed})
        learner = LEDLearner(Features.raw(2), CONFIGS[name], options)
        model = learner.fit(train, valid, path.with_suffix(""), temperature=TEMPERATURE, progress=False)
        model.save(stored)
    else:
        model = baseline(name, train, seed)
    found: dict[str, Any] = {"name": name, "seed": seed, "generated": measures(generate(model, test, seed), test)}
    if isinstance(model, LED):
        found["decoder"] = measures(decoded(model, test, seed), test)
    write_atomically(path, (json.dumps(found) + "\n").encode())
    return {}


def collect(folder: Path) -> dict[str, Any]:
    """Every result that is there, by row: each seed, and mean and standard deviation over seeds."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows.setdefault(found["name"], []).append({"seed": found["seed"], **found["generated"]})
        if "decoder" in found:
            rows.setdefault(f"{found['name']}: decoder", []).append({"seed": found["seed"], **found["decoder"]})
    return {name: {"seeds": seeds, "over_seeds": over_seeds(seeds)} for name, seeds in rows.items()}


def over_seeds(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for key in ("upper_to_lower", "lower_to_upper", "upper", "lower", "upper_side", "w1_x", "w1_y", "mean_energy"):
        values = [s[key] for s in seeds]
        found[key] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
    for lag in seeds[0]["timescales"]:
        values = [s["timescales"][lag] for s in seeds]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found[f"timescale_{lag}"] = {"mean": float(np.mean(values)), "sd": sd}
    return found


def show(reference: dict[str, Any], rows: dict[str, Any]) -> None:
    columns = {"upper_to_lower": "1->0", "lower_to_upper": "0->1", "timescale_5": "t (lag 5)",
               "timescale_20": "t (lag 20)", "upper": "upper", "lower": "lower", "upper_side": "upper side",
               "w1_x": "W1 x", "w1_y": "W1 y"}  # fmt: skip
    table = Table("", "seeds", *columns.values())
    own = {**reference, **{f"timescale_{lag}": v for lag, v in reference["timescales"].items()}}
    table.add_row("MD (test)", "", *(f"{own[c]:.4g}" for c in columns))
    for name, row in rows.items():
        cells = []
        for c in columns:
            value = row["over_seeds"][c]
            cells.append(f"{value['mean']:.3g}" + ("" if value["sd"] is None else f" ± {value['sd']:.2g}"))
        table.add_row(name, str(len(row["seeds"])), *cells)
    Console(width=150).print(table)


def draw(reference: dict[str, Any], rows: dict[str, Any], path: Path) -> None:
    """Timescales against the lag, and first-passage times over those of molecular dynamics."""
    from matplotlib.figure import Figure

    styles = {
        "LED, 2 latent coordinates": ("#d9772b", "D"), "LED, 1 latent coordinate": ("#2b6ca3", "o"),
        "published decoder and sizes": ("#8c4fa8", "v"), "Markov state model": ("#3a8f5c", "^"),
        "linear-Gaussian": ("#999999", "s"),
    }  # fmt: skip
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lags = [lag * INTERVAL for lag in LAGS]
    value, error = (
        np.array([reference[what][f"{lag:g}"] for lag in lags]) for what in ("timescales", "timescale_errors")
    )
    left.fill_between(lags, value - 2 * error, value + 2 * error, color="#999999", alpha=0.35, lw=0)
    left.plot(lags, value, "k-", lw=1.4, label="molecular dynamics (± 2 s.e.)")
    width = 0.15
    for k, (name, (color, marker)) in enumerate(styles.items()):
        if name not in rows:
            continue
        found = rows[name]["over_seeds"]
        mean, sd = (np.array([found[f"timescale_{lag:g}"][what] or 0.0 for lag in lags]) for what in ("mean", "sd"))
        left.errorbar(lags, mean, sd, color=color, marker=marker, ms=5, lw=1.2, capsize=2, label=name)
        for x, direction in enumerate(("upper_to_lower", "lower_to_upper")):
            ratio = found[direction]["mean"] / reference[direction]
            spread = (found[direction]["sd"] or 0.0) / reference[direction]
            right.bar(x + (k - 2) * width, ratio, width * 0.9, yerr=spread, color=color, capsize=2)
    left.set(xlabel="lag", ylabel="slowest implied timescale", xscale="log", ylim=(0, None))
    left.set_xticks(lags, [f"{lag:g}" for lag in lags])
    left.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    right.axhspan(0.85, 1.15, color="#999999", alpha=0.25, lw=0)
    right.axhline(1.0, color="black", lw=1.0)
    right.set_xticks([0, 1], ["upper to lower well", "lower to upper well"])
    right.set_ylabel("first-passage time / MD (band: ± 15 %)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[*CONFIGS, *BASELINES])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--collect", action="store_true", help="only read what is there")
    arguments = parser.parse_args()
    about = machine()
    folder = FOLDER / "models"
    test = frames("final")
    if not arguments.collect:
        tasks = {
            f"{name.replace(' ', '_').replace(',', '')}_{seed}": {"name": name, "seed": seed}
            for seed in arguments.seeds
            for name in arguments.rows
        }
        outcome = run_tasks(tasks, run, folder, log=folder / "failures.jsonl", suffix=".json",
                            processes=arguments.processes, title="models")  # fmt: skip
        for name, error in outcome.failed.items():
            print(f"{name}: {error}")
    reference, rows = measures(test, test), collect(folder)
    train = measures(frames("train"), test)
    show(reference, {"MD (training data)": {"seeds": [train], "over_seeds": over_seeds([train])}, **rows})
    draw(reference, rows, HERE / "led_mueller_brown.png")
    settings = {"options": asdict(OPTIONS), "configs": {name: asdict(c) for name, c in CONFIGS.items()}}
    result = {"what": __doc__, "machine": about, "settings": settings, "md_test": reference, "md_train": train}
    write("led_mueller_brown", {**result, "rows": rows})


if __name__ == "__main__":
    main()
