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
decoded. Its measures are held against those two replicas, beside the training data and the model alone. CPU seconds of
one thread throughout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write
from _led_alternation import (
    PHASES,
    WARM_UP,
    Explicit,
    Implicit,
    Run,
    joined,
    run_explicit,
    run_implicit,
)
from _led_alternation_measures import (
    LAGS,
    STAGES,
    between_returns,
    block_error,
    energies,
    kinetics,
    micro_stretches,
    populations_of,
    returns,
    speed,
    spread,
    times,
)
from _led_alternation_picture import draw
from _led_systems import FOLDER as DATA
from _led_systems import alanine, load, topology_of
from led_ala2 import FOLDER as MODELS
from led_ala2 import TEMPERATURE, beginnings, md_floor, runs, torsions
from led_reference import basin_counts, positive
from rich.console import Console
from rich.table import Table

from openmm_led import Features, LEDConfig, LEDLearner, LEDOptions, Trajectories
from openmm_mlff.analysis.distributions import floor, jensen_shannon
from openmm_mlff.data.jobs import claim_folder, run_tasks
from openmm_mlff.sampling.back_mapping import BackMapper
from openmm_mlff.sampling.led_records import MICRO
from openmm_mlff.sampling.propagators import Propagator, load_propagator

FOLDER = HERE.parent / ".work" / "led_alternation"
ROUNDS = {1: 100, 10: 80, 100: 40}
SEED = 20261122
#: LED alone: walkers and frames of each, without and in water
ALONE = (40, 5000)
ALONE_IN_WATER = (40, 1000)
#: frames of MD that are minimised as decoded ones are
MINIMIZED = 400
#: in water: ns of training data below which the implicit solvent's model is taken, ratio, rounds of each walker
LEAST_NS = 1.0
RHO_WATER, ROUNDS_WATER = 10, 16
#: what so few data can bear: the encoder of `led_ala2.py` scores 3.6 on the training and 0.5 on the validation replica.
#: Two latent coordinates let helix and strand mix (three times too fast on training and validation replicas)
CONFIG_WATER = LEDConfig(
    latent_dim=3, encoder_widths=(), objective="tica", lag=2, decoder_widths=(32,), decoder_kernels=4,
    decoder_floor=0.1, hidden=8, kernels=3, floor=0.1,
)  # fmt: skip
OPTIONS_WATER = LEDOptions(autoencoder_steps=1000, propagator_steps=1000, lanes=4)
STARTS = ("free-test-00", "free-valid-00")


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
        learner = LEDLearner(Features.internal(topology_of("explicit"), "heavy"), CONFIG_WATER, OPTIONS_WATER)
        model = learner.fit(sets["train"], sets["valid"], path.with_suffix(""), temperature=TEMPERATURE,
                            progress=False)  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(amounts), encoding="utf-8")
        model.save(path)
    amounts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    options = {"config": asdict(CONFIG_WATER), "options": asdict(OPTIONS_WATER)}
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
        "rows": water_rows(run, angles, led),
        "water": water_figures(parts),
        "speed": [speed(part, RHO_WATER) for part in parts],
    }
    return figures, {"run": run, "md": md}


def water_rows(run: Run, angles: dict[str, list[np.ndarray]], led: Propagator) -> dict[str, Any]:
    """`kinetics` in water, against the replicas that were not trained on.

    Args:
        angles: torsions of MD by split, ``(n_frames, 2)`` per replica.
    """
    held = [*angles["valid"], *angles["test"]]
    every = [*angles["train"], *held]
    inside = [t[~positive(t)] for t in every]
    frames = 2 * min(map(len, inside))
    level = frames / 1000 * floor(inside, frames, lambda a, b: jensen_shannon(a, b, 36, period=360.0)).value
    reference = np.concatenate(held)
    random = np.random.default_rng(SEED)
    starts = [x for s in ("valid", "test") for x in (r.positions for r in load("explicit", s))]
    past = np.stack([led.encode(x[:WARM_UP].astype(np.float64)) for x in starts])
    path, _ = led.run(led.start(past.repeat(ALONE_IN_WATER[0] // len(past), axis=0)), ALONE_IN_WATER[1], random)
    return {
        "md_training": kinetics(angles["train"], reference, level),
        "md_held_back": kinetics(held, np.concatenate(angles["train"]), level),
        "led_alone": kinetics(torsions([led.decode(z, random) for z in path]), reference, level),
        "whole": kinetics(run.torsions, reference, level),
        "between_returns": times(between_returns(run)),
        "md_frames": kinetics(populations_of(run, MICRO), reference, level, micro_stretches(run)),
    }


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
    if "explicit" in result and "rows" in result["explicit"]:
        lines |= {f"water, {name}": row for name, row in result["explicit"]["rows"].items() if "alphaR" in row}
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
