"""LED of alanine dipeptide alternating with OpenMM: what the returns to molecular dynamics do, against rho.

`LEDSimulation` in rounds of 10 x rho latent frames and 10 frames of MD (1 ps each), with the model of seed 0 of
`led_ala2.py` and OBC2; eight walkers begin at the first frames of the test replicas. Beside it the same model alone.
Measures are those of `led_ala2.py`: of the whole sequence of frames of a walker, decoded ones and those of MD in the
order of time; of the stretches between returns, because the 2 ps of equilibration at a return are no frames, so that
pairs of frames across it are 3 ps apart or more; and of the frames of MD alone. The divergence of the Ramachandran maps
is that of the parts at phi < 0, because how often phi > 0 was visited is chance; it has a floor of its own in each row,
which depends on how much was run: c (1/n + 1/m) / 2 for n and m ns, with c from two sets of MD of 20 ns each.

Energies of the System at every stage of a return beside those of MD, and of the k-th frame after it. As minimisation
holds the heavy atoms near where they were decoded, frames of MD that go the same way are the reference for it.

In water (TIP3P, 1.932 nm box): a model trained on what `led_data.py` made of it, or, where there is less than 1 ns of
training data, the model of the implicit solvent, which shows the mechanics of a return but has the populations of
another solvent; walkers from the last States of the test and the validation replica, the water rebuilt around what is
decoded. CPU seconds of one thread throughout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write
from _led_alternation import (
    MICRO_FRAMES,
    PHASES,
    WARM_UP,
    Explicit,
    Implicit,
    Run,
    joined,
    run_explicit,
    run_implicit,
)
from _led_alternation_picture import draw
from _led_systems import FOLDER as DATA
from _led_systems import alanine, load, topology_of
from led_ala2 import CONFIG, TEMPERATURE, beginnings, md_floor, runs, torsions
from led_ala2 import FOLDER as MODELS
from led_reference import basin_counts, bootstrap, passages, positive, share, timescale, transitions
from rich.console import Console
from rich.table import Table

from openmm_led import Features, LEDLearner, LEDOptions, Trajectories
from openmm_mlff.analysis.distributions import jensen_shannon, units, wasserstein
from openmm_mlff.data.jobs import claim_folder, run_tasks
from openmm_mlff.sampling.back_mapping import BackMapper
from openmm_mlff.sampling.led_records import MICRO
from openmm_mlff.sampling.propagators import load_propagator

FOLDER = HERE.parent / ".work" / "led_alternation"
ROUNDS = {1: 100, 10: 80, 100: 40}
SEED = 20261122
LAGS = (1, 5, 10)
RESAMPLES = 30
#: LED alone: walkers and frames of each
ALONE = (40, 5000)
#: frames of MD that are minimised as decoded ones are
MINIMIZED = 400
#: in water: ns of training data below which the model of the implicit solvent is taken, ratio, rounds of each walker,
#: and the shorter training that so few data are worth
LEAST_NS = 1.0
RHO_WATER, ROUNDS_WATER = 10, 8
OPTIONS_WATER = LEDOptions(autoencoder_steps=2000, propagator_steps=2000)
STARTS = ("free-test-00", "free-valid-00")
STAGES = ("decoded", "tight", "minimized", "equilibrated")


# -- measures ----------------------------------------------------------------------------------------------------------


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


# -- implicit solvent --------------------------------------------------------------------------------------------------


def alone(model: Path) -> list[np.ndarray]:
    """Torsions of the same model without MD, from the test replicas."""
    led = load_propagator(model)
    random = np.random.default_rng(SEED)
    path, _ = led.run(led.start(beginnings(led, "test", "free", ALONE[0])), ALONE[1], random)
    return torsions([led.decode(z, random) for z in path])


def minimized_md() -> np.ndarray:
    """Energies of frames of MD (test) after the two minimisations of a return, their hydrogens as they are."""
    system, topology, positions = alanine()
    mapper = BackMapper(system, topology, list(range(len(positions))), positions, TEMPERATURE, 0.004)
    frames = np.concatenate([x for x in runs("test", "free")])
    chosen = frames[np.linspace(0, len(frames) - 1, MINIMIZED).astype(int)].astype(np.float64)
    return np.array([mapper.relax(x, k).report.energies["minimized"] for k, x in enumerate(chosen)])


def implicit(model: Path, folder: Path, processes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, and what the picture shows."""
    claim_folder(folder, {"model": digest(model), "rounds": {str(rho): n for rho, n in ROUNDS.items()}, "seed": SEED})
    tasks = {f"rho_{rho}": Implicit(model, rho, n, SEED + rho) for rho, n in ROUNDS.items()}
    attempt(tasks, run_implicit, folder, processes)
    test = torsions(runs("test", "free"))
    reference = np.concatenate(test)
    level = 20 * md_floor()["20 ns"]
    md = np.concatenate([r.energies for r in load("ala2", "test", kind="free")])
    still = minimized_md()
    rows: dict[str, Any] = {"md": kinetics(test, np.concatenate(torsions(runs("train", "free"))), level)}
    rows["led_alone"] = kinetics(alone(model), reference, level)
    found = {rho: Run.read(folder / f"rho_{rho}.npz") for rho in ROUNDS}
    for rho, run in found.items():
        micro = micro_stretches(run)
        rows[f"rho_{rho}"] = {
            "whole": kinetics(run.torsions, reference, level),
            "between_returns": times(between_returns(run)),
            "md_frames": kinetics(populations_of(run, MICRO), reference, level, micro),
            "energies": energies(run, md, reference),
            "returns": returns(run),
            "speed": speed(run, rho),
        }
    figures = {"md_energies": spread(md) | {"error": block_error(md)}, "md_minimized": spread(still), "rows": rows}
    return figures, {"runs": found, "md": md, "minimized": still, "reference": reference}


# -- water -------------------------------------------------------------------------------------------------------------


def water_model(implicit_model: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model of the data in water, trained if it is not there, if there are `LEAST_NS` of them; and what it is."""
    path = folder / "model.safetensors"
    sets = {s: Trajectories(tuple(r.positions for r in load("explicit", s)), 1.0) for s in ("train", "valid")}
    amounts = {s: sum(map(len, t.frames)) / 1000 for s, t in sets.items()}
    if amounts["train"] < LEAST_NS and not path.exists():
        about = {"trained_on": "implicit solvent", "ns_in_water": amounts}
        return implicit_model, about | {"digest": digest(implicit_model)}
    if not path.exists():
        torch.set_num_threads(1)
        learner = LEDLearner(Features.internal(topology_of("explicit"), "heavy"), CONFIG, OPTIONS_WATER)
        model = learner.fit(sets["train"], sets["valid"], path.with_suffix(""), temperature=TEMPERATURE,
                            progress=False)  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(amounts), encoding="utf-8")
        model.save(path)
    amounts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    options = {"config": asdict(CONFIG), "options": asdict(OPTIONS_WATER)}
    return path, {"trained_on": "TIP3P", "ns_in_water": amounts, "digest": digest(path)} | options


def explicit(implicit_model: Path, folder: Path, processes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, and what the picture shows."""
    model, about = water_model(implicit_model, folder)
    claim_folder(folder, {"model": about["digest"], "rho": RHO_WATER, "rounds": ROUNDS_WATER, "seed": SEED})
    tasks = {}
    for k, name in enumerate(STARTS):
        start = folder / f"{name}.xml"
        if not start.exists():
            shutil.copyfile(max((DATA / "explicit" / "states").glob(f"{name}-*.xml")), start)
        tasks[f"walker_{k}"] = Explicit(model, start, RHO_WATER, ROUNDS_WATER, SEED + 1000 + k)
    attempt(tasks, run_explicit, folder, processes)
    parts = [Run.read(folder / f"{name}.npz") for name in tasks]
    run = joined(parts)
    data = {s: load("explicit", s) for s in ("train", "valid", "test")}
    angles = {s: torsions([r.positions for r in found]) for s, found in data.items()}
    md = np.concatenate([r.energies for found in data.values() for r in found])
    led = load_propagator(model)
    random = np.random.default_rng(SEED)
    again = [led.decode(led.encode(r.positions.astype(np.float64)), random) for r in data["test"]]
    alphas = {f"md, {s}": helix(t) for s, t in angles.items()}
    alphas |= {"decoded test": helix(torsions(again))}
    alphas |= {phase: helix(populations_of(run, phase)) for phase in PHASES}
    figures = {
        "settings": {"rho": RHO_WATER, "rounds": ROUNDS_WATER, "seed": SEED},
        "model": about,
        "md_energies": spread(md) | {"error": block_error(md)},
        "energies": energies(run, md, np.concatenate([t for ts in angles.values() for t in ts])),
        "returns": returns(run) | {"waters_moved": [r["solvent_moved"] for r in run.returned()]},
        "alphaR": alphas,
        "water": water_figures(parts),
        "speed": [speed(part, RHO_WATER) for part in parts],
    }
    return figures, {"run": run, "md": md}


def helix(angles: Sequence[np.ndarray]) -> dict[str, float]:
    """The share of alphaR, and frames."""
    counts = np.sum([basin_counts(a) for a in angles if len(a)], axis=0)
    return {"value": float(counts[0] / counts.sum()), "frames": int(counts.sum())}


def water_figures(parts: Sequence[Run]) -> dict[str, Any]:
    """Oxygens near the solute in the warm-up, and in the k-th frame after a return."""
    rows: dict[str, list[tuple[float, int]]] = {}
    for part in parts:
        back = {r["frame"] for r in part.returned()}
        for frame, nearest, shell in part.facts["water"]:
            name = "warm-up" if frame <= WARM_UP else "first frame" if frame - 1 in back else "later frames"
            rows.setdefault(name, []).append((nearest, shell))
    return {
        name: {
            "frames": len(found),
            "nearest_nm": float(np.mean([d for d, _ in found])),
            "nearest_of_all_nm": float(np.min([d for d, _ in found])),
            "within_shell": float(np.mean([n for _, n in found])),
            "within_shell_sd": float(np.std([n for _, n in found])),
        }
        for name, found in rows.items()
    }


# -- table -------------------------------------------------------------------------------------------------------------


def attempt(tasks: dict[str, Any], worker: Callable[[Any, Path], dict[str, str]], folder: Path, processes: int) -> None:
    """Run what is missing; ends the script with the errors if something failed."""
    torch.set_num_threads(1)
    outcome = run_tasks(tasks, worker, folder, log=folder / "failures.jsonl", suffix=".npz", processes=processes,
                        title="runs")  # fmt: skip
    if outcome.failed:
        raise SystemExit("\n".join(f"{name}: {error}" for name, error in outcome.failed.items()))


def digest(path: Path) -> str:
    """SHA-256 of a file, by which finished runs know their model."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def show(result: dict[str, Any]) -> None:
    table = Table("", "ns", "alphaR", *(f"t {lag} ps" for lag in LAGS), "JSD", "floor", "phi > 0", "entries")
    rows = result["implicit"]["rows"]
    lines = {"MD, test": rows["md"], "LED alone": rows["led_alone"]}
    for rho in ROUNDS:
        row = rows[f"rho_{rho}"]
        lines[f"rho {rho}, all frames"] = row["whole"]
        lines[f"rho {rho}, between returns"] = {**row["whole"], "timescale_ps": row["between_returns"]}
        lines[f"rho {rho}, MD frames"] = row["md_frames"]
    for name, row in lines.items():
        times = [row["timescale_ps"].get(str(lag)) for lag in LAGS]
        table.add_row(
            name, f"{row['ns']:.1f}", f"{row['alphaR']['value']:.3f}±{row['alphaR']['error']:.3f}",
            *("" if t is None else f"{t['value']:.1f}±{t['error']:.1f}" for t in times),
            f"{row['jensen_shannon_phi_negative']:.4f}", f"{row['floor']:.4f}", f"{row['phi_positive']:.4f}",
            str(row["entries"]),
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    table = Table(
        "energies, kJ/mol", "MD", *STAGES, "first frame", "last frame", "accepted", "doubt", "speed-up (bound)"
    )
    blocks = {f"rho {rho}": (result["implicit"], rows[f"rho_{rho}"]) for rho in ROUNDS}
    if "explicit" in result:
        blocks["in water"] = (result["explicit"], {**result["explicit"], "speed": result["explicit"]["speed"][0]})
    for name, (whole, row) in blocks.items():
        e, back, fast = row["energies"], row["returns"], row["speed"]
        md, after = whole["md_energies"], e["after_return"]
        taken = back["accepted_first"] + back["accepted_after_retries"]
        table.add_row(
            name, f"{md['mean']:.1f} ({md['sd']:.1f})", *(f"{e[s]['mean']:.1f} ({e[s]['sd']:.1f})" for s in STAGES),
            *(f"{after['mean_minus_md'][k]:+.2f}±{after['error'][k]:.2f}" for k in (0, -1)),
            f"{taken}/{back['returns']}", str(back["doubt_switches"]), f"{fast['measured']:.1f} ({fast['bound']})",
        )  # fmt: skip
    console.print(table)
    print("minimised frames of MD:", result["implicit"]["md_minimized"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "model_0.safetensors")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--no-water", action="store_true", help="leave out the runs in TIP3P")
    arguments = parser.parse_args()
    if not arguments.model.exists():
        raise SystemExit(f"no {arguments.model.name}; benchmarks/led_ala2.py trains it")
    about = machine()
    figures, shown = implicit(arguments.model, arguments.folder, arguments.processes)
    result: dict[str, Any] = {"what": __doc__, "machine": about, "implicit": figures,
                              "model": {"file": arguments.model.name, "sha256": digest(arguments.model)}}  # fmt: skip
    water = None
    if not arguments.no_water:
        result["explicit"], water = explicit(arguments.model, arguments.folder / "water", arguments.processes)
    show(result)
    write("led_alternation", result)
    draw(result, shown, water, HERE / "led_alternation.png")


if __name__ == "__main__":
    main()
