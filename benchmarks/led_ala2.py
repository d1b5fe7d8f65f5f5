"""LED of alanine dipeptide in implicit solvent against molecular dynamics that it has not seen.

Data: `led_data.py` (replicas of 5 ns from equilibrium, which never come to phi > 0, and a swarm released there), split
by replica. Each model is trained on the training replicas, from three seeds; settings were chosen on the validation
replicas. From the beginnings of the test replicas it then generates 40 trajectories of 5 ns each, and 200 of 8 ns from
releases at phi > 0. Rows beside it: a Markov state model and a linear-Gaussian model of the same latent coordinates
(their frames are frames of the training data), and molecular dynamics itself.

Measures: population of alphaR; slowest implied timescale on a grid of 12 degrees in (phi, psi) at several lags, within
phi < 0; Jensen-Shannon divergence of the Ramachandran maps (36 x 36) against the test replicas, beside the floor (two
sets of molecular dynamics as long as the equilibrium part of the training data, extrapolated as 1 / length); geometry
of the decoded frames, and of such without the calibration of their coordinates; mean time at phi > 0 and until an
entry there, by maximum likelihood.
"""

from __future__ import annotations

import argparse
import json
import time
from copy import copy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write
from _led_systems import SPLITS, load, phi_psi, topology_of
from led_reference import basin_counts, bootstrap, mean_time, passages, positive, share, timescale, transitions
from rich.console import Console
from rich.table import Table

from openmm_led import LED, Features, LEDConfig, LEDLearner, LEDOptions, Trajectories
from openmm_mlff.analysis.distributions import floor, jensen_shannon
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import run_tasks
from openmm_mlff.sampling.propagators import Propagator, load_propagator

FOLDER = HERE.parent / ".work" / "led_ala2"
INTERVAL, TEMPERATURE = 1.0, 300.0
LAGS = (1, 2, 5, 10)
WARM_UP = 20
WALKERS, LENGTH = 40, 5000
RELEASES, RELEASE_LENGTH = 200, 8000
CONFIG = LEDConfig(latent_dim=5, vamp_weight=0.3, kernels=16, hidden=48, calibrate=True)
OPTIONS = LEDOptions(autoencoder_steps=6000, propagator_steps=8000)
SEEDS = (0, 1, 2)


@cache
def runs(split: str, kind: str | None = None) -> list[np.ndarray]:
    """Positions ``(n_frames, 22, 3)`` nm of the replicas of a split."""
    return [replica.positions for replica in load("ala2", split, kind=kind)]


def trajectories(split: str) -> Trajectories:
    return Trajectories(tuple(runs(split)), INTERVAL)


def torsions(positions: list[np.ndarray] | np.ndarray) -> list[np.ndarray]:
    """phi and psi ``(n_frames, 2)`` degrees per trajectory."""
    topology = topology_of("ala2")
    return [phi_psi(topology, np.asarray(x, dtype=np.float64)) for x in positions]


# -- measures ----------------------------------------------------------------------------------------------------------


def kinetics(angles: list[np.ndarray], reference: np.ndarray, resamples: int = 30) -> dict[str, Any]:
    """Populations, timescales and the distance of the maps, of trajectories that start at phi < 0."""
    counts = [basin_counts(t) for t in angles]
    found: dict[str, Any] = {
        name: bootstrap(counts, share(k), resamples) for k, name in enumerate(("alphaR", "C5", "PII"))
    }
    found["timescale_ps"] = {
        str(lag): bootstrap(
            [transitions(t, lag) for t in angles], lambda c, lag=lag: timescale(c, lag), resamples if lag == 5 else 2
        )
        for lag in LAGS
    }
    flat = np.concatenate(angles)
    found["phi_positive"] = float(positive(flat).mean())
    found["jensen_shannon"] = jensen_shannon(flat, reference, 36, period=360.0)
    return found


def exchange(free: list[np.ndarray], releases: list[np.ndarray]) -> dict[str, Any]:
    """Mean times (ps) until an entry to phi > 0 and until an exit from it."""
    both = sum((passages(t, begins) for ts, begins in ((free, False), (releases, True)) for t in ts), np.zeros((2, 2)))
    return {name: mean_time(*row) for name, row in zip(("entry", "residence"), both, strict=True)}


def geometry(positions: np.ndarray, features: Features) -> dict[str, Any]:
    """Angle N-CA-CB, inverted centres, bonds beyond 4 and 6 standard deviations of the training data's, and the largest
    standard deviation of one in units of these."""
    topology = topology_of("ala2")
    names = {(a.residue.name, a.name): a.index for a in topology.atoms()}
    n, ca, cb = (names["ALA", name] for name in ("N", "CA", "CB"))
    a, b = positions[:, n] - positions[:, ca], positions[:, cb] - positions[:, ca]
    cosine = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    angle = np.degrees(np.arccos(cosine))
    pairs = [(x.index, y.index) for x, y in topology.bonds() if "H" not in (x.element.symbol, y.element.symbol)]
    mean, sd = bond_statistics(tuple(pairs))
    lengths = bond_lengths(positions, pairs)
    off = np.abs(lengths - mean) / sd
    signs = np.sign(features.chirality(runs("train")[0][:1].astype(np.float64)))[0]
    return {
        "frames": len(positions),
        "n_ca_cb_mean": float(angle.mean()),
        "n_ca_cb_sd": float(angle.std()),
        "inverted": int(features.inverted(positions, signs).sum()),
        "bonds_beyond_4_sd": float((off > 4).mean()),
        "bonds_beyond_6_sd": int((off > 6).sum()),
        "largest_deviation_sd": float(off.max()),
        "widest_bond_sd_over_training": float((lengths.std(0) / sd).max()),
    }


def bond_lengths(positions: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    i, j = np.array(pairs).T
    return np.linalg.norm(positions[:, i].astype(np.float64) - positions[:, j], axis=-1)


@cache
def bond_statistics(pairs: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (nm) in the training data."""
    lengths = np.concatenate([bond_lengths(x, list(pairs)) for x in runs("train")])
    return lengths.mean(0), lengths.std(0)


def md_floor() -> dict[str, float]:
    """Divergence of two sets of molecular dynamics, at 20 ns and extrapolated to the training length."""
    free = torsions([x for split in SPLITS for x in runs(split, "free")])

    def measure(a: np.ndarray, b: np.ndarray) -> float:
        return jensen_shannon(a, b, 36, period=360.0)

    lengths = {
        ns: floor(free, 1000 * ns, measure).value for ns in (5, 10, 20, 40, 60) if 2000 * ns <= sum(map(len, free))
    }
    longest = max(lengths)
    train = sum(len(x) for x in runs("train", "free")) / 1000
    return {**{f"{ns} ns": v for ns, v in lengths.items()}, "train_ns": train,
            "train": lengths[longest] * longest / train}  # fmt: skip


# -- models ------------------------------------------------------------------------------------------------------------


def beginnings(model: Propagator, split: str, kind: str, n: int) -> np.ndarray:
    """Latent histories ``(n, WARM_UP, latent_dim)`` from the replicas in turn; releases at their first frames."""
    random = np.random.default_rng(3)
    found = []
    for k in range(n):
        run = runs(split, kind)[k % len(runs(split, kind))]
        first = 0 if kind == "swarm" else int(random.integers(len(run) - WARM_UP))
        found.append(model.encode(run[first : first + WARM_UP].astype(np.float64)))
    return np.stack(found)


def evaluate(model: Propagator, features: Features, split: str, seed: int, keep: Path) -> dict[str, Any]:
    """Everything that is compared, of what the model generates; torsions for the picture go to `keep`."""
    random = np.random.default_rng([seed, 11])
    reference = np.concatenate(torsions(runs(split, "free")))
    start = time.perf_counter()
    path, _ = model.run(model.start(beginnings(model, split, "free", WALKERS)), LENGTH, random)
    seconds = time.perf_counter() - start
    positions = [model.decode(z, random) for z in path]
    free = torsions(positions)
    np.savez_compressed(keep, torsions=np.stack(free)[:, ::5].astype(np.float32))
    found = kinetics(free, reference)
    found["geometry"] = geometry(np.concatenate([x[::10] for x in positions]), features)
    found["step_us"] = 1e6 * seconds / LENGTH
    if isinstance(model, LED):
        plain = copy(model)
        plain.moments = None
        other = np.random.default_rng([seed, 12])
        found["uncalibrated"] = geometry(np.concatenate([plain.decode(z[::10], other) for z in path]), features)
    path, _ = model.run(model.start(beginnings(model, split, "swarm", RELEASES)), RELEASE_LENGTH, random)
    released = [torsions([model.decode(z, random)])[0] for z in path]
    found["exchange_ps"] = exchange(free, released)
    if isinstance(model, LED):
        decoded = [model.decode(model.encode(x.astype(np.float64)), random) for x in runs(split, "free")]
        found["decoder"] = kinetics(torsions(decoded), reference, 2)
    return found


def molecular_dynamics(split: str) -> dict[str, Any]:
    """The same measures of molecular dynamics; its map is compared with that of the training replicas."""
    topology = topology_of("ala2")
    free, train = torsions(runs(split, "free")), np.concatenate(torsions(runs("train", "free")))
    found = kinetics(free, train)
    found["exchange_ps"] = exchange(free, torsions(runs(split, "swarm")))
    everything = {kind: [x for s in SPLITS for x in torsions(runs(s, kind))] for kind in ("free", "swarm")}
    found["exchange_ps_all_splits"] = exchange(everything["free"], everything["swarm"])
    features = Features.internal(topology, "heavy")
    found["geometry"] = geometry(np.concatenate(runs(split)).astype(np.float64), features)
    return found


def run(task: dict[str, Any], path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: train one model and measure it on one split."""
    torch.set_num_threads(1)
    features = Features.internal(topology_of("ala2"), "heavy")
    stored = path.parent / f"model_{task['seed']}.safetensors"
    if stored.exists():
        model = load_propagator(stored)
    else:
        options = LEDOptions(**{**asdict(OPTIONS), "seed": task["seed"]})
        learner = LEDLearner(features, CONFIG, options)
        model = learner.fit(trajectories("train"), trajectories("valid"), stored.with_suffix(""),
                            temperature=TEMPERATURE, progress=False)  # fmt: skip
        model.save(stored)
    figures = evaluate(model, features, task["split"], task["seed"], path.with_suffix(".npz"))
    found = {"name": task["name"], "seed": task["seed"], **figures}
    write_atomically(path, (json.dumps(found) + "\n").encode())
    return {}


def show(md: dict[str, Any], rows: list[dict[str, Any]], level: dict[str, float]) -> None:
    table = Table("", "seed", "alphaR", "t 1 ps", "t 5 ps", "t 10 ps", "JSD", "N-CA-CB sd", "inverted", "> 4 sd",
                  "> 6 sd", "residence", "entry")  # fmt: skip
    for row in ({"name": "MD", "seed": "", **md}, *rows):
        times = row["timescale_ps"]
        out = {k: f"{v['value']:.0f}±{v['error']:.0f}" if "value" in v else f">{v['at_least']:.0f}"
               for k, v in row["exchange_ps"].items()}  # fmt: skip
        g = row["geometry"]
        table.add_row(
            row["name"], str(row["seed"]), f"{row['alphaR']['value']:.3f}±{row['alphaR']['error']:.3f}",
            *(f"{times[lag]['value']:.1f}" for lag in ("1", "5", "10")), f"{row['jensen_shannon']:.4f}",
            f"{g['n_ca_cb_sd']:.2f}", str(g["inverted"]), f"{g['bonds_beyond_4_sd']:.1e}",
            str(g["bonds_beyond_6_sd"]), out["residence"], out["entry"],
        )  # fmt: skip
    Console(width=160).print(table)
    print("floor of the divergence:", {k: round(v, 5) for k, v in level.items()})


def draw(md: dict[str, Any], rows: list[dict[str, Any]], folder: Path, path: Path) -> None:
    """Ramachandran free energies of the test replicas and of the first model, and timescales against the lag."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    with np.load(folder / f"led_{rows[0]['seed']}_test.npz", allow_pickle=False) as stored:
        generated = stored["torsions"].reshape(-1, 2)
    maps = {"molecular dynamics, test": np.concatenate(torsions(runs("test", "free"))), "LED": generated}
    for axes, (title, angles) in zip(panels[:2], maps.items(), strict=True):
        counts = np.histogram2d(angles[:, 0], angles[:, 1], 36, [[-180, 180]] * 2)[0]
        with np.errstate(divide="ignore"):
            energy = -np.log(counts.T / counts.max())
        image = axes.pcolormesh(*[np.linspace(-180, 180, 37)] * 2, np.where(counts.T > 0, energy, np.nan), vmax=8)
        axes.set(title=title, xlabel="φ (°)", ylabel="ψ (°)", aspect="equal", xticks=range(-180, 181, 90),
                 yticks=range(-180, 181, 90))  # fmt: skip
    figure.colorbar(image, ax=panels[1], label="free energy (kT)")
    lags, axes = np.array(LAGS), panels[2]
    for k, row in enumerate(rows):
        values = [row["timescale_ps"][str(lag)]["value"] for lag in LAGS]
        axes.plot(lags, values, "o-", color="#d9772b", ms=4, lw=1.2, label="LED, three seeds" if k == 0 else None)
    value, error = (np.array([md["timescale_ps"][str(lag)][what] for lag in LAGS]) for what in ("value", "error"))
    error = np.full(len(LAGS), error[LAGS.index(5)])  # the others were not resampled
    axes.fill_between(lags, value - 2 * error, value + 2 * error, color="#999999", alpha=0.35, lw=0)
    axes.plot(lags, value, "s-", color="#444444", ms=4, lw=1.2, label="molecular dynamics (± 2 s.e.)")
    axes.set(title="slowest timescale at φ < 0", xlabel="lag (ps)", ylabel="ps", ylim=(0, 32))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    about = machine()
    tasks = {
        f"led_{s}_{arguments.split}": {"name": "LED", "seed": s, "split": arguments.split} for s in arguments.seeds
    }
    outcome = run_tasks(tasks, run, arguments.folder, log=arguments.folder / "failures.jsonl", suffix=".json",
                        processes=arguments.processes, title="models")  # fmt: skip
    for name, error in outcome.failed.items():
        print(f"{name}: {error}")
    found = sorted(arguments.folder.glob(f"*_{arguments.split}.json"))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    md, level = molecular_dynamics(arguments.split), md_floor()
    show(md, rows, level)
    if arguments.split == "test" and rows:
        draw(md, rows, arguments.folder, HERE / "led_ala2.png")
        settings = {"config": asdict(CONFIG), "options": asdict(OPTIONS)}
        write("led_ala2", {"what": __doc__, "machine": about, "settings": settings, "md": md, "floor": level,
                           "models": rows})  # fmt: skip


if __name__ == "__main__":
    main()
