"""What `led_alternation.py` measures of its runs: populations, times, energies, how returns went, and speed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from _led_alternation import MICRO_FRAMES, PHASES, Run
from led_reference import basin_counts, bootstrap, passages, positive, share, timescale, transitions

from openmm_mlff.analysis.distributions import jensen_shannon, units, wasserstein
from openmm_mlff.sampling.led_records import MICRO

LAGS = (1, 5, 10)
RESAMPLES = 30
STAGES = ("decoded", "tight", "minimized", "equilibrated")


def kinetics(
    walkers: Sequence[np.ndarray], reference: np.ndarray, level: float, pieces: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """Populations, slowest timescale (ps) by lag and distance of the map.

    Args:
        walkers: torsions ``(n_frames, 2)``, for populations. reference: of the test replicas, ``(m, 2)``.
        level: c of the divergence's floor, ns. pieces: stretches without a gap, for times; None: the walkers' own.
    """
    blocks = [walkers[k][a:b] for k, a, b in units([len(w) for w in walkers])]
    counts = [basin_counts(b) for b in blocks]
    found: dict[str, Any] = {
        name: bootstrap(counts, share(k), RESAMPLES) for k, name in enumerate(("alphaR", "C5", "PII"))
    }
    found["timescale_ps"] = times(blocks if pieces is None else pieces)
    flat = np.concatenate(walkers)
    found["ns"] = len(flat) / 1000
    found["phi_positive"] = float(positive(flat).mean())
    found["entries"] = int(sum(passages(w, False)[0, 1] for w in walkers))
    inside, other = (x[~positive(x)] for x in (flat, reference))
    found["jensen_shannon_phi_negative"] = jensen_shannon(inside, other, 36, period=360.0)
    found["floor"] = 0.5 * level * (1000 / len(inside) + 1000 / len(other))
    return found


def times(pieces: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Slowest implied timescale (ps) by lag, of stretches in the order of time; errors from 20 groups of them."""
    # transitions are counted within stretches at phi < 0, so a frame at phi > 0 keeps two pieces apart
    apart = np.array([[75.0, 0.0]])
    edges = np.linspace(0, len(pieces), 21).astype(int)
    groups = [pieces[a:b] for a, b in pairwise(edges) if b > a]
    joint = [np.concatenate([x for piece in group for x in (piece, apart)]) for group in groups]
    found = {}
    for lag in LAGS:
        if max(len(p) for p in pieces) > lag:
            counts = [transitions(t, lag) for t in joint]
            # deeptime refuses counts without a connected set: too few frames for this lag
            with suppress(ValueError):
                found[str(lag)] = bootstrap(counts, partial(timescale, lag=lag), RESAMPLES // 3)
    return found


def between_returns(run: Run) -> list[np.ndarray]:
    """Torsions of the stretches from one return to the next."""
    edges: dict[int, list[int]] = {k: [] for k in range(len(run.torsions))}
    for r in run.returned(accepted=False):
        edges[r["walker"]].append(r["frame"])
    return [piece for k, t in enumerate(run.torsions) for piece in np.split(t, edges[k]) if len(piece)]


def micro_stretches(run: Run) -> list[np.ndarray]:
    """Torsions of the frames of MD after each return, warm-up left out."""
    found = []
    for t, phase in zip(run.torsions, run.phases, strict=True):
        inside = phase == PHASES.index(MICRO)
        edges = np.flatnonzero(np.diff(inside.astype(int))) + 1
        found += [p for p, i in zip(np.split(t, edges), np.split(inside, edges), strict=True) if i[0]]
    return found


def populations_of(run: Run, phase: str) -> list[np.ndarray]:
    """Torsions of the frames of one phase, per walker."""
    return [t[p == PHASES.index(phase)] for t, p in zip(run.torsions, run.phases, strict=True)]


def spread(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation and quantiles of energies, kJ/mol."""
    quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    return {"n": len(values), "mean": float(values.mean()), "sd": float(values.std()),
            "quantiles": dict(zip(("5", "25", "50", "75", "95"), quantiles.tolist(), strict=True))}  # fmt: skip


def block_error(values: np.ndarray, blocks: int = 20) -> float:
    """Standard error of the mean of a correlated series, from blocks of it."""
    means = [part.mean() for part in np.array_split(values, blocks)]
    return float(np.std(means, ddof=1) / np.sqrt(blocks))


def energies(run: Run, md: np.ndarray, angles: np.ndarray) -> dict[str, Any]:
    """Of every stage of accepted returns and of the frames of MD after them, against those of MD.

    Args:
        md: energies ``(m,)`` of the reference. angles: its torsions ``(m, 2)``, because energies at phi > 0 are higher
            and how often it was visited is chance.
    """
    accepted = run.returned()
    found: dict[str, Any] = {s: spread(np.array([r["energies"][s] for r in accepted])) for s in STAGES}
    after = run.after_return()
    found["first_frame"] = spread(after[:, 0]) | {"w1_to_md": wasserstein(after[:, 0], md)}
    found["all_frames"] = spread(after.ravel()) | {"w1_to_md": wasserstein(after.ravel(), md)}
    error = after.std(axis=0, ddof=1) / np.sqrt(len(after)) if len(after) > 1 else np.full(MICRO_FRAMES, np.nan)
    micro = np.concatenate([e[p == PHASES.index(MICRO)] for e, p in zip(run.energies, run.phases, strict=True)])
    inside, other = ~positive(np.concatenate(populations_of(run, MICRO))), ~positive(angles)
    found["phi_negative"] = spread(micro[inside]) | {"md": spread(md[other])}
    found["after_return"] = {"mean_minus_md": (after.mean(axis=0) - md.mean()).tolist(), "error": error.tolist()}
    return found


def returns(run: Run) -> dict[str, Any]:
    """How returns went, by count, and why."""
    every = run.returned(accepted=False)
    reasons = [reason for r in every for reason in r["reasons"]]
    early = [r for r in every if r["cause"] == "doubt"]
    phi = np.array([run.torsions[r["walker"]][r["frame"] - 1, 0] for r in early])
    moved = [r["moved"] for r in run.returned()]
    return {
        "returns": len(every),
        "accepted_first": sum(r["tries"] == 1 and not r["fallback"] for r in every),
        "accepted_after_retries": sum(r["tries"] > 1 and not r["fallback"] for r in every),
        "fallbacks": sum(r["fallback"] for r in every),
        "stayed": sum(r["tries"] == 0 for r in every),
        "refused": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "doubt_switches": len(early),
        "doubt_at_phi_positive": int(((phi > 0) & (phi < 150)).sum()) if len(phi) else 0,
        "moved_nm": float(np.mean(moved)) if moved else float("nan"),
    }


def speed(run: Run, rho: int) -> dict[str, Any]:
    """CPU seconds per frame of plain MD over those of the alternation: median and range of parts of the run."""
    cpu = run.facts["cpu_s"]
    ratios = np.array(cpu["md_per_frame"]) / np.array(cpu["alternating_per_frame"])
    decoding = cpu["decode"] / max(1, run.facts["statistics"]["latent_frames"])
    decoded = np.array(cpu["md_per_frame"]) / (np.array(cpu["alternating_per_frame"]) + decoding * rho / (1 + rho))
    seconds = run.facts["statistics"]["seconds"]
    return {
        "bound": 1 + rho,
        "measured": float(np.median(ratios)),
        "range": [float(ratios.min()), float(ratios.max())],
        "every_frame_decoded": float(np.median(decoded)),
        "share_of_time": {k: v / sum(seconds.values()) for k, v in seconds.items()},
    }
