"""What the molecular dynamics of `led_data.py` says by itself: how much there is, populations and times of alanine.

Alanine in implicit solvent: populations by the partition of the reference figures (alphaR has psi between -125 and 50,
of the rest C5 has phi below -110 or above 150, and PII is what remains), the slowest implied timescale of a Markov
model on a grid of 12 degrees in (phi, psi) at several lags, both from the replicas that start in equilibrium at phi < 0
and never leave it; and the mean residence time at phi > 0 from the swarm, by maximum likelihood with the releases that
have not come out counted as such: total time at phi > 0 over the number of exits, with an error of 1 / sqrt(exits).
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
from _led_systems import FOLDER, SPLITS, Replica, load, phi_psi, topology_of
from deeptime.markov import TransitionCountEstimator
from deeptime.markov.msm import MaximumLikelihoodMSM
from rich.console import Console
from rich.table import Table

LAGS = (1, 2, 5, 10)
#: of the Ramachandran grid, degrees
CELL = 12.0
#: figures of earlier runs with the same settings, two replicas of 34.5 ns and ten releases, and their errors
EARLIER = {
    "alphaR": (0.383, 0.014),
    "C5": (0.271, 0.007),
    "PII": (0.346, 0.008),
    "timescale_ps": (21.8, 1.0),
    "residence_ps": (1900.0, 600.0),
}


def basins(torsions: np.ndarray) -> np.ndarray:
    """Per frame 0 for alphaR, 1 for C5, 2 for PII, 3 for phi > 0 (up to 150); torsions ``(n, 2)`` degrees."""
    phi, psi = torsions[:, 0], torsions[:, 1]
    alpha = (psi > -125) & (psi < 50)
    extended = (phi < -110) | (phi >= 150)
    negative = np.where(alpha, 0, np.where(extended, 1, 2))
    return np.where((phi > 0) & (phi < 150), 3, negative)


def timescale(trajectories: Sequence[np.ndarray], lag: int) -> float:
    """Slowest implied timescale in frames of a reversible Markov model on the (phi, psi) grid."""
    n = round(360 / CELL)
    cells = [np.floor((t + 180.0) / CELL).astype(int) % n @ np.array([n, 1]) for t in trajectories]
    counts = TransitionCountEstimator(lag, "sliding").fit_fetch(cells).submodel_largest(connectivity_threshold=0)
    return float(MaximumLikelihoodMSM(reversible=True).fit_fetch(counts).timescales(k=1)[0])


def bootstrap(
    replicas: Sequence[np.ndarray], measure: Callable[[list[np.ndarray]], float], resamples: int, seed: int = 1
) -> dict[str, float]:
    """A measure of all replicas, and its standard deviation over resampled sets of them."""
    random = np.random.default_rng(seed)
    draws = random.integers(len(replicas), size=(resamples, len(replicas)))
    spread = np.std([measure([replicas[k] for k in draw]) for draw in draws], ddof=1)
    return {"value": measure(list(replicas)), "error": float(spread)}


def share(basin: int) -> Callable[[list[np.ndarray]], float]:
    """The population of a basin as a measure."""
    return lambda torsions: float(np.mean(basins(np.concatenate(torsions)) == basin))


def residence(swarm: Sequence[Replica]) -> dict[str, Any]:
    """Mean time at phi > 0 after a release, ps."""
    interval = swarm[0].info["interval_ps"]
    exits = [r.info["exit_ps"] for r in swarm]
    inside = sum(len(r) * interval if e is None else e for r, e in zip(swarm, exits, strict=True))
    n = sum(e is not None for e in exits)
    return {"value": inside / n, "error": inside / n / np.sqrt(n), "exits": n, "releases": len(swarm)}


def alanine_figures(folder: Path, resamples: int, kinds: tuple[str, ...] = ("free", "swarm")) -> dict[str, Any]:
    """Everything about alanine in implicit solvent."""
    topology = topology_of("ala2", folder)
    by_split = {s: load("ala2", s, kind="free", folder=folder) for s in SPLITS}
    torsions = {s: [phi_psi(topology, r.positions) for r in found] for s, found in by_split.items()}
    everything = [t for found in torsions.values() for t in found]
    found: dict[str, Any] = {
        name: bootstrap(everything, share(k), resamples)
        for k, name in enumerate(("alphaR", "C5", "PII", "phi_positive"))
    }
    found["alphaR_by_split"] = {s: bootstrap(ts, share(0), resamples) for s, ts in torsions.items()}
    found["timescale_ps"] = {
        str(lag): bootstrap(everything, partial(timescale, lag=lag), min(resamples, 30)) for lag in LAGS
    }
    swarm = {s: load("ala2", s, kind="swarm", folder=folder) for s in SPLITS}
    found["residence_ps"] = residence([r for split in swarm.values() for r in split])
    found["residence_ps_by_split"] = {s: residence(split) for s, split in swarm.items()}
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
    for name in ("alphaR", "C5", "PII", "phi_positive", "residence_ps"):
        value, error = EARLIER.get(name, (0.0, 0.0))
        mine = figures[name]
        table.add_row(name, f"{mine['value']:.4g} +- {mine['error']:.2g}", f"{value:g} +- {error:g}")
    for lag, mine in figures["timescale_ps"].items():
        value, error = EARLIER["timescale_ps"]
        table.add_row(f"timescale, lag {lag} ps", f"{mine['value']:.1f} +- {mine['error']:.1f}", f"{value} +- {error}")
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
