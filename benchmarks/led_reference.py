"""What the molecular dynamics of `led_data.py` says by itself: how much there is, populations and times of alanine.

Alanine in implicit solvent: populations by the partition of the reference figures (alphaR has psi between -125 and 50,
of the rest C5 has phi below -110 or above 150, and PII is what remains) and the slowest implied timescale of a Markov
model on a grid of 12 degrees in (phi, psi) at several lags, both from the stretches at phi < 0 of the replicas that
start there. Then the exchange with phi > 0, between cores (phi from 20 to 120, and from -160 to -40): the mean
residence time at phi > 0 from the swarm and from entries, and the mean time of an entry from all time that began at
phi < 0, by maximum likelihood with what has not happened by the end of a run counted as such: total time over the
number of events, with an error of 1 / sqrt(events). Without events that number is a bound of 95 %, a third of the time.
Errors of the others are bootstraps over whole replicas.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import machine, write
from _led_systems import FOLDER, SPLITS, load, phi_psi, topology_of
from deeptime.markov import TransitionCountModel
from deeptime.markov.msm import MaximumLikelihoodMSM
from rich.console import Console
from rich.table import Table

LAGS = (1, 2, 5, 10)
#: degrees, cores of phi
CORE, POSITIVE = (-160.0, -40.0), (20.0, 120.0)
#: of the Ramachandran grid, degrees
CELL = 12.0
#: figures of earlier runs with the same settings, with their errors: two replicas of 34.5 ns, ten releases
EARLIER = {
    "alphaR": (0.383, 0.014),
    "C5": (0.271, 0.007),
    "PII": (0.346, 0.008),
    "timescale": (21.8, 1.0),
    "residence": (1900.0, 600.0),
    "entry": (36000.0, 16000.0),
}


def positive(torsions: np.ndarray) -> np.ndarray:
    """Per frame, whether phi is between 0 and 150 degrees."""
    return (torsions[:, 0] > 0) & (torsions[:, 0] < 150)


def basins(torsions: np.ndarray) -> np.ndarray:
    """Per frame 0 for alphaR, 1 for C5, 2 for PII; torsions ``(n, 2)`` degrees, phi < 0 or beyond 150."""
    phi, psi = torsions[:, 0], torsions[:, 1]
    extended = (phi < -110) | (phi >= 150)
    return np.where((psi > -125) & (psi < 50), 0, np.where(extended, 1, 2))


def negative_pieces(torsions: np.ndarray) -> list[np.ndarray]:
    """The stretches of a trajectory between visits to phi > 0."""
    edges = np.flatnonzero(np.diff(positive(torsions).astype(int))) + 1
    return [piece for piece in np.split(torsions, edges) if not positive(piece[:1])[0]]


def passages(torsions: np.ndarray, begins_positive: bool) -> np.ndarray:
    """Frames spent on each side, and how many of the stays there ended, from core to core.

    Returns:
        ``(2, 2)``: rows phi < 0 and phi > 0; columns frames and events.
    """
    phi = torsions[:, 0]
    there = (phi > POSITIVE[0]) & (phi < POSITIVE[1])
    back = (phi > CORE[0]) & (phi < CORE[1])
    found, side, since = np.zeros((2, 2)), int(begins_positive), 0
    for frame in np.flatnonzero(there | back).tolist():
        if int(there[frame]) != side:
            found[side] += (frame + 1 - since, 1)
            side, since = 1 - side, frame + 1
    found[side, 0] += len(torsions) - since
    return found


def transitions(torsions: np.ndarray, lag: int) -> np.ndarray:
    """Counts between cells of the (phi, psi) grid at a lag (frames), within the stretches at phi < 0; dense."""
    n = round(360 / CELL)
    counts = np.zeros((n * n, n * n))
    for piece in negative_pieces(torsions):
        cells = np.floor((piece + 180.0) / CELL).astype(int) % n @ np.array([n, 1])
        np.add.at(counts, (cells[:-lag], cells[lag:]), 1.0)
    return counts


def timescale(counts: np.ndarray, lag: int) -> float:
    """Slowest implied timescale, in frames, of the reversible Markov model of these counts."""
    model = TransitionCountModel(counts, "sliding", lagtime=lag).submodel_largest()
    return float(MaximumLikelihoodMSM(reversible=True).fit_fetch(model).timescales(k=1)[0])


def basin_counts(torsions: np.ndarray) -> np.ndarray:
    """Frames at phi < 0 in alphaR, C5 and PII, ``(3,)``."""
    return np.bincount(basins(torsions[~positive(torsions)]), minlength=3).astype(float)


def bootstrap(
    replicas: Sequence[np.ndarray], measure: Callable[[np.ndarray], float], resamples: int, seed: int = 1
) -> dict[str, float]:
    """A measure of the sum of what the replicas have, and its standard deviation over resampled sets of replicas."""
    random = np.random.default_rng(seed)
    draws = random.multinomial(len(replicas), np.full(len(replicas), 1 / len(replicas)), size=resamples)
    spread = np.std([measure(np.tensordot(draw.astype(float), np.stack(replicas), 1)) for draw in draws], ddof=1)
    return {"value": measure(np.sum(replicas, axis=0)), "error": float(spread)}


def share(basin: int) -> Callable[[np.ndarray], float]:
    """The population of a basin as a measure of `basin_counts`."""
    return lambda counts: float(counts[basin] / counts.sum())


def exchange(free: Sequence[np.ndarray], swarm: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean times at phi > 0 until an exit and at phi < 0 until an entry, in frames."""
    both = sum((passages(t, begins) for ts, begins in ((free, False), (swarm, True)) for t in ts), np.zeros((2, 2)))
    return {name: mean_time(*row) for name, row in zip(("entry", "residence"), both, strict=True)}


def mean_time(total: float, events: float) -> dict[str, float]:
    """Maximum likelihood of an exponential waiting time from censored observations."""
    if not events:
        return {"at_least": total / 3.0, "total": float(total), "events": 0}
    mean = float(total / events)
    return {"value": mean, "error": mean / float(np.sqrt(events)), "total": float(total), "events": int(events)}


def alanine_figures(folder: Path, resamples: int) -> dict[str, Any]:
    """Everything about alanine in implicit solvent; times in ps, frames being 1 ps apart."""
    topology = topology_of("ala2", folder)
    sets: dict[str, dict[str, list[np.ndarray]]] = {
        kind: {s: [phi_psi(topology, r.positions) for r in load("ala2", s, kind=kind, folder=folder)] for s in SPLITS}
        for kind in ("free", "swarm")
    }
    free = [t for ts in sets["free"].values() for t in ts]
    populations = {split: [basin_counts(t) for t in ts] for split, ts in sets["free"].items()}
    every = [counts for ts in populations.values() for counts in ts]
    found: dict[str, Any] = {n: bootstrap(every, share(k), resamples) for k, n in enumerate(("alphaR", "C5", "PII"))}
    found["alphaR_by_split"] = {split: bootstrap(ts, share(0), resamples) for split, ts in populations.items()}
    found["timescale_ps"] = {
        str(lag): bootstrap([transitions(t, lag) for t in free], partial(timescale, lag=lag), min(resamples, 30))
        for lag in LAGS
    }
    found["phi_positive_share_of_free"] = float(np.mean(positive(np.concatenate(free))))
    found["exchange_ps"] = exchange(free, [t for ts in sets["swarm"].values() for t in ts])
    found["exchange_ps_by_split"] = {s: exchange(sets["free"][s], sets["swarm"][s]) for s in SPLITS}
    return found


def amounts(system: str, folder: Path) -> dict[str, Any]:
    """Replicas, ns and speed of one system by split."""
    found: dict[str, Any] = {}
    for split in SPLITS:
        for kind in ("free", "swarm") if system == "ala2" else ("free",):
            replicas = load(system, split, kind=kind, folder=folder)
            ns = sum(len(r) for r in replicas) * replicas[0].info["interval_ps"] * 1e-3
            cpu = sum(s["cpu_s"] for r in replicas for s in r.info["segments"])
            found[f"{kind}-{split}"] = {"replicas": len(replicas), "ns": ns, "ns_per_cpu_day": ns / cpu * 86400}
    return found


def show(result: dict[str, Any]) -> None:
    table = Table("system", "set", "replicas", "ns", "ns per CPU day")
    for system, sets in result["amounts"].items():
        for name, a in sets.items():
            table.add_row(system, name, str(a["replicas"]), f"{a['ns']:.1f}", f"{a['ns_per_cpu_day']:.0f}")
    Console().print(table)
    table = Table("alanine, implicit", "here", "earlier runs")
    figures = result["alanine"]
    rows = {name: figures[name] for name in ("alphaR", "C5", "PII")}
    rows |= {f"timescale, lag {lag} ps": value for lag, value in figures["timescale_ps"].items()}
    rows |= {
        f"{name} at phi {side} 0, ps": figures["exchange_ps"][name]
        for name, side in (("entry", "<"), ("residence", ">"))
    }
    for name, mine in rows.items():
        earlier = EARLIER.get(name.split(",")[0].split(" ")[0])
        here = f"{mine['value']:.4g} +- {mine['error']:.2g}" if "value" in mine else f"> {mine['at_least']:.4g}"
        table.add_row(name, here, "" if earlier is None else f"{earlier[0]:g} +- {earlier[1]:g}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where led_data.py wrote")
    parser.add_argument("--resamples", type=int, default=100)
    arguments = parser.parse_args()
    present: dict[str, Any] = {}
    for system in ("ala2", "trpcage", "explicit"):
        try:
            present[system] = amounts(system, arguments.folder)
        except SystemExit as error:
            print(f"{system} is left out: {error}")
    result = {
        "machine": machine(),
        "amounts": present,
        "alanine": alanine_figures(arguments.folder, arguments.resamples),
    }
    show(result)
    write("led_reference", result)


if __name__ == "__main__":
    main()
