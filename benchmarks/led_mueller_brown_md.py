"""Müller-Brown walkers in OpenMM against exact averages and reference kinetics; makes the data of the LED runs.

kT = 15 kJ/mol, mass 1 amu, friction 1/ps, LangevinMiddle with steps of 0.002 ps, OpenMM's Reference platform, one
thread. Data, in ``.work/led_mb``: ``train.npz`` and ``valid.npz`` with 32 trajectories of 6000 ps each, ``test.npz``
with 96, frames every 0.5 ps, from the Boltzmann distribution and after 100 ps that are dropped. What is there is kept.

Then 1000 walkers in one System, whose core sets are watched after every step. Times of first passage are total time at
risk over events; means of completed passages miss those longer than the run. Errors are jackknives over walkers, those
of the implied timescale (Markov model on a 20 x 20 grid of all data) a bootstrap over trajectories.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from typing import Any

import numpy as np
from _common import HERE, SHARED, machine, write
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from openmm_mlff.analysis.distributions import populations
from openmm_mlff.analysis.kinetics import Grid, implied_timescales
from openmm_mlff.analysis.passages import hitting_times
from openmm_mlff.data.files import write_atomically
from openmm_mlff.sampling.model_potentials import ELLIPSES, MuellerBrown, WalkerSettings, run_walkers, watch_cores

FOLDER = HERE.parent / ".work" / "led_mb"
#: trajectories and seed of each set
SETS = {"train": (32, 20261), "valid": (32, 20262), "test": (96, 20263)}
FRAMES, SPACING = 12001, 0.5
LAGS = (2, 4, 10, 20, 40)
WATCH_SEED = 20264
POTENTIAL = MuellerBrown()


def data() -> dict[str, np.ndarray]:
    """The sets of trajectories ``(n, 12001, 2)``, made where they are missing."""
    sets = {}
    with Progress() as progress:
        for name, (n, seed) in SETS.items():
            path = FOLDER / f"{name}.npz"
            if not path.exists():
                bar = progress.add_task(name, total=FRAMES)
                frames = run_walkers(
                    POTENTIAL, n_walkers=n, n_frames=FRAMES, spacing=SPACING, settings=WalkerSettings(seed),
                    folder=FOLDER / f"{name}_run", progress=lambda k, _, bar=bar: progress.update(bar, completed=k),
                )  # fmt: skip
                buffer = io.BytesIO()
                np.savez(buffer, frames=frames)
                write_atomically(path, buffer.getvalue())
            with np.load(path, allow_pickle=False) as stored:
                sets[name] = stored["frames"]
    return sets


def stationary_points(reference: dict[str, Any]) -> dict[str, Any]:
    """Each point, and the largest deviation from the stored ones."""
    labels = {"A": "min_A", "B": "min_B", "C": "min_C", "AC": "saddle_AC", "CB": "saddle_CB"}
    stored = reference["potential"]["stationary_points"]
    points = POTENTIAL.stationary_points()
    deviation = {
        "xy": max(float(np.abs(p.xy - stored[labels[k]]["xy"]).max()) for k, p in points.items()),
        "energy": max(abs(p.energy - stored[labels[k]]["V"]) for k, p in points.items()),
        "eigenvalues_relative": max(
            float(np.abs(p.eigenvalues / stored[labels[k]]["hess_eig"] - 1.0).max()) for k, p in points.items()
        ),
    }
    found = {
        k: {"xy": p.xy.tolist(), "energy": p.energy, "eigenvalues": p.eigenvalues.tolist()} for k, p in points.items()
    }
    return {"points": found, "largest_deviation": deviation}


def watched(n_walkers: int, duration: float) -> dict[str, Any]:
    """Core sets looked at after every step, and what that costs."""
    settings = WalkerSettings(WATCH_SEED)
    context = settings.context(POTENTIAL, n_walkers)
    start = time.process_time()
    context.getIntegrator().step(3000)
    plain_rate = n_walkers * 3000 / (time.process_time() - start)
    start = time.process_time()
    with Progress() as progress:
        bar = progress.add_task("watching", total=1)
        found = watch_cores(
            POTENTIAL, ELLIPSES, n_walkers=n_walkers, duration=duration, settings=settings,
            progress=lambda k, total: progress.update(bar, completed=k, total=total),
        )  # fmt: skip
    steps = round((duration + settings.discard) / settings.timestep)
    return {
        "n_walkers": n_walkers,
        "duration": duration,
        "seed": WATCH_SEED,
        "mean_energy": {"value": found.energy.value, "error": found.energy.error},
        "passages": {f"{a} to {b}": p.summary() for (a, b), p in found.passages.items()},
        "particle_steps_per_cpu_second": {
            "stepping": plain_rate,
            "watched_every_step": n_walkers * steps / (time.process_time() - start),
        },
    }


def of_frames(sets: dict[str, np.ndarray]) -> dict[str, Any]:
    """Kinetics of the stored frames, all sets together and each by itself."""
    found: dict[str, Any] = {}
    for name, frames in {"all": np.concatenate(list(sets.values())), **sets}.items():
        trajs = list(frames)
        grid = Grid.spanning(trajs, 20)
        scales = implied_timescales([grid.assign(t) for t in trajs], LAGS, interval=SPACING, resamples=40)
        passages = hitting_times(trajs, ELLIPSES, SPACING)
        energy = POTENTIAL.energy(frames).mean(axis=1)
        shares = populations(trajs, {core.name: core for core in ELLIPSES})
        found[name] = {
            "trajectories": len(trajs),
            "time": len(trajs) * (FRAMES - 1) * SPACING,
            "mean_energy": {"value": float(energy.mean()), "error": float(energy.std(ddof=1) / np.sqrt(len(energy)))},
            "populations": {k: {"value": e.value, "error": e.error} for k, e in shares.items()},
            "passages": {f"{a} to {b}": p.summary() for (a, b), p in passages.items()},
            "slowest_timescale": {
                f"{lag:g}": {"value": float(v), "error": float(e)}
                for lag, v, e in zip(scales.lags, scales.values[:, 0], scales.error[:, 0], strict=True)
            },
        }
    return found


def judge(result: dict[str, Any], reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Every required figure: what was found, what was wanted, and whether that is met."""
    deviation = result["stationary_points"]["largest_deviation"]
    rows = [
        {"figure": "stationary points, largest deviation", "found": max(deviation["xy"], deviation["energy"]),
         "error": None, "wanted": "below 1e-5", "met": max(deviation.values()) < 1e-5},
        {"figure": "<V> of 1000 walkers", "found": result["watched"]["mean_energy"]["value"],
         "error": result["watched"]["mean_energy"]["error"], "wanted": "-125.15 ± 0.3",
         "met": abs(result["watched"]["mean_energy"]["value"] + 125.15) < 0.3},
    ]  # fmt: skip
    for pair, label in (("1 to 0", "1->0"), ("0 to 1", "0->1")):
        ours = result["watched"]["passages"][pair]
        theirs = reference["converged_dt0p002"]["every_step_core_set"][label]
        sigma = float(np.hypot(ours["rate_time_error"], theirs["sem"]))
        rows.append({
            "figure": f"core-set time {pair}, every step", "found": ours["rate_time"],
            "error": ours["rate_time_error"], "wanted": f"{theirs['mean']:.1f} ± {theirs['sem']:.1f} within 3 sigma",
            "met": abs(ours["rate_time"] - theirs["mean"]) < 3.0 * sigma,
            "sigmas": (ours["rate_time"] - theirs["mean"]) / sigma,
        })  # fmt: skip
    slowest = result["frames"]["all"]["slowest_timescale"]["20"]
    rows.append({"figure": "slowest timescale, lag 20", "found": slowest["value"], "error": slowest["error"],
                 "wanted": "25.4 ± 1", "met": abs(slowest["value"] - 25.4) < 1.0})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walkers", type=int, default=1000)
    parser.add_argument("--duration", type=float, default=2000.0, help="watched time of each walker, ps")
    parser.add_argument("--data-only", action="store_true", help="make the trajectories and stop")
    arguments = parser.parse_args()
    about = machine()
    sets = data()
    if arguments.data_only:
        return
    reference = json.loads((SHARED / "data" / "led" / "mueller_brown.json").read_text(encoding="utf-8"))
    points, probability = POTENTIAL.boltzmann(bins=4000)
    result: dict[str, Any] = {
        "what": __doc__,
        "machine": about,
        "seeds": {name: seed for name, (_, seed) in SETS.items()},
        "stationary_points": stationary_points(reference),
        "exact": {
            "mean_energy": float(np.sum(probability * POTENTIAL.energy(points))),
            "populations": {core.name: float(probability[core(points)].sum()) for core in ELLIPSES},
        },
        "frames": of_frames(sets),
        "watched": watched(arguments.walkers, arguments.duration),
    }
    result["required"] = judge(result, reference)
    table = Table("figure", "found", "wanted", "met")
    for row in result["required"]:
        error = "" if row["error"] is None else f" ± {row['error']:.2g}"
        table.add_row(row["figure"], f"{row['found']:.6g}{error}", row["wanted"], "yes" if row["met"] else "no")
    Console(width=120).print(table)
    write("led_mueller_brown_md", result)


if __name__ == "__main__":
    main()
