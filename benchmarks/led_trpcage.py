"""LED of Trp-cage (PDB entry 1L2Y, implicit solvent, 300 K) against molecular dynamics that it has not seen.

    python benchmarks/led_data.py --systems trpcage --time-limit 120
    python benchmarks/led_trpcage.py

Native-basin dynamics: folding takes microseconds and is not in the data. As much as `led_data.py` has made is used
(whole rounds, the same length for every replica), split by replica; how much that is stands in the results, which are
kept in a folder per amount of data. Stopped, it goes on.

Settings are chosen once, by cross-validation over the training and validation replicas (three ways to hold back a third
of them; of fewer frames, to save time, with --choice-frames), and kept in ``choice.json``; the test replicas take no
part. First the forms of encoder and decoder in `CANDIDATES`, then the propagators in `PROPAGATORS`, by `score`:
divergences of what is generated from held-back replicas, in units of those of the dynamics it was trained on, and the
ratio of slow timescales, of decoded frames or of latent coordinates, whichever is further off, to that of all replicas
but the test's. The best are trained from three seeds on the training replicas and compared with the test replicas.
Generated are, from the beginnings of the replicas, 16 trajectories each of their length, every frame decoded. Rows
beside it: a Markov state model and a linear-Gaussian model of the same two slow coordinates, which give back frames of
the training data, and the training data themselves.

Measures: RMSD from the experimental structure (CA, heavy atoms), radius of gyration, end-to-end distance, and the two
slowest coordinates (TICA of distances between CA, fitted to training replicas); Jensen-Shannon divergence (25 bins)
beside its floor, two sets of dynamics as long as the training data; slowest timescale at 10 ps, of decoded frames and
of the latent coordinates as they are propagated. 200 decoded frames are relaxed and followed for 10 ps.

Then all replicas are shared out anew in eight ways, with a model of the same settings for each: how near the test is,
in units of twice the floor, depends on which replicas it happens to be. (The settings were chosen on 36 of these.)
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, machine, write
from _led_systems import FOLDER as DATA
from _led_systems import topology_of
from _led_trpcage import FOLDS, INTERVAL, LAG, MEASURES, TEMPERATURE, Data, picture, timescale
from rich.console import Console
from rich.table import Table

from openmm_led import Features, LEDConfig, LEDLearner, LEDOptions
from openmm_led.baselines import LinearGaussian, MSMPropagator
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import run_tasks
from openmm_mlff.sampling.back_mapping import BackMapper, RelaxationSettings
from openmm_mlff.sampling.propagators import Propagator, load_propagator

FOLDER = HERE.parent / ".work" / "led_trpcage"
SEEDS = (0, 1, 2)
BASELINES = ("MSM", "linear-Gaussian")
WARM_UP = 5
#: trajectories from each beginning: for the choice, and for the results
FEW_WALKERS, WALKERS = 4, 16
#: kernels at training frames at most
KERNELS = 4000
RELAXED, BLOCK = 200, 5
FOLLOWED = 10.0
#: other ways to share out all replicas
OTHER_SPLITS = 8
#: factor between timescales that counts for the score where there is none to compare
NO_TIMESCALE = 10.0

BASE = LEDConfig(
    latent_dim=2, encoder_widths=(), decoder_widths=(32,), objective="tica", lag=LAG, decoder="principal",
    decoder_kernels=1, decoder_floor=0.2, decoder_draws=8, hidden=8, kernels=1, floor=0.1,
)  # fmt: skip
OPTIONS = LEDOptions(autoencoder_steps=500, batch=1024, propagator_steps=1000, lanes=10, chunk=100, learning_rate=2e-3)
#: features, and what differs from `BASE`; 0 kernels stands for one at each training frame
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "distances": ("distances", {"decoder_kernels": 0}),
    "distances, narrow": ("distances", {"decoder_kernels": 0, "decoder_floor": 0.05}),
    "distances, narrow, 4 latent": ("distances", {"decoder_kernels": 0, "decoder_floor": 0.05, "latent_dim": 4}),
    "Cartesian, 4 latent": ("cartesian", {"decoder_kernels": 0, "decoder_floor": 0.05, "latent_dim": 4}),
}
#: what differs from `BASE`
PROPAGATORS: dict[str, dict[str, Any]] = {
    "GRU 16": {"hidden": 16},
    "GRU 32": {"hidden": 32},
    "GRU 16, 3 kernels": {"hidden": 16, "kernels": 3},
    "GRU 32, 3 kernels": {"hidden": 32, "kernels": 3},
    "GRU 32, 5 kernels": {"hidden": 32, "kernels": 5},
    "three GRU 32": {"hidden": 32, "members": 3},
}
DEFAULT = "GRU 16"


@cache
def data(folder: str, frames: int, fold: int | None = None, anew: int | None = None) -> Data:
    """The first frames of every replica, all splits; or those of a fold (see `Data.fold`), or shared out anew."""
    whole = Data.read(Path(folder)).first(frames)
    if anew is not None:
        return whole.shared_anew(anew)
    return whole if fold is None else whole.fold(fold)


# -- models ------------------------------------------------------------------------------------------------------------


def config(candidate: str, propagator: str, source: Data) -> tuple[Features, LEDConfig]:
    kind, changes = CANDIDATES[candidate]
    chosen = changes | PROPAGATORS[propagator]
    if chosen.get("decoder_kernels") == 0:
        chosen["decoder_kernels"] = min(KERNELS, source.trajectories("train").n_frames)
    topology = topology_of("trpcage")
    if kind == "cartesian":
        return Features.cartesian(topology, source.runs["train"][0][0], "heavy"), replace(BASE, **chosen)
    return Features.distances(topology, None, "heavy"), replace(BASE, **chosen)


def trained(task: dict[str, Any], source: Data, path: Path) -> tuple[Propagator, float | None]:
    """The model of a task, and of LED the least validation loss of its propagator; training is kept beside `path`."""
    train = source.trajectories("train")
    if task["name"] == "MSM":
        states = max(10, round(train.n_frames**0.5))
        model = MSMPropagator.fit(source.tica, train, n_states=states, temperature=TEMPERATURE, seed=task["seed"])
        return model, None
    if task["name"] == "linear-Gaussian":
        return LinearGaussian.fit(source.tica, train, temperature=TEMPERATURE, seed=task["seed"]), None
    stored, folder = path.with_suffix(".safetensors"), path.with_suffix("")
    if not stored.exists():
        features, settings = config(task["candidate"], task["propagator"], source)
        learner = LEDLearner(features, settings, replace(OPTIONS, seed=task["seed"]))
        learner.fit(train, source.trajectories("valid"), folder, temperature=TEMPERATURE, progress=False).save(stored)
    history = json.loads((folder / "propagator_0" / "history.json").read_text(encoding="utf-8"))
    return load_propagator(stored), min(row["valid_loss"] for row in history)


def latent_runs(model: Propagator, source: Data, random: np.random.Generator, walkers: int) -> np.ndarray:
    """Latent coordinates ``(n_replicas * walkers, n_frames, d)`` from the beginnings of the test replicas, as long as
    these are."""
    runs = source.runs["test"]
    past = np.stack([model.encode(run[:WARM_UP].astype(np.float64)) for run in runs for _ in range(walkers)])
    return model.run(model.start(past), min(map(len, runs)) - WARM_UP, random)[0]


def generated(model: Propagator, source: Data, seed: int, walkers: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Measures ``(n_frames, 6)`` of decoded frames, and latent coordinates, of `latent_runs`."""
    random = np.random.default_rng([seed, 11])
    path = latent_runs(model, source, random, walkers)
    return [source.measure(model.decode(z, random)) for z in path], list(path)


def small_samples(model: Propagator, source: Data, seed: int) -> dict[str, Any]:
    """Timescales (ps, quantiles) of sets of latent runs, one from each beginning: what as many runs as there are test
    replicas tell. An interval from resampled pieces of a few runs does not know how runs differ."""
    path = latent_runs(model, source, np.random.default_rng([seed, 11]), WALKERS)
    found = [timescale(list(path[k::WALKERS]), 2)["value"] for k in range(WALKERS)]
    values = np.array([t for t in found if t is not None])
    levels = (0.025, 0.25, 0.5, 0.75, 0.975)
    md = timescale([x[:, 4:] for x in source.measured["test"]], 2)["value"]
    quantiles = np.quantile(values, levels).tolist()
    return {
        "sets": len(values),
        "quantiles": dict(zip(map(str, levels), quantiles, strict=True)),
        "share_below_test": None if md is None else float((values < md).mean()),
    }


def evaluate(model: Propagator, source: Data, seed: int, walkers: int) -> dict[str, Any]:
    """Divergences from the test replicas, and timescales beside theirs."""
    measured, latent = generated(model, source, seed, walkers)
    training, reference = (np.concatenate(source.measured[split]) for split in ("train", "test"))
    z = np.concatenate([model.encode(x.astype(np.float64)) for x in source.runs["test"]])
    decoded = model.decode(z.repeat(2, axis=0), np.random.default_rng([seed, 12]))
    return {
        "divergence": source.divergences(np.concatenate(measured), reference),
        "decoder": source.divergences(source.measure(decoded), reference),
        "training_divergence": source.divergences(training, reference),
        "timescale_ps": timescale([x[:, 4:] for x in measured]),
        "latent_timescale_ps": timescale(latent),
        "md_timescale_ps": timescale([x[:, 4:] for x in source.measured["test"]]),
    }


def run(task: dict[str, Any], path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: train one model and measure it."""
    torch.set_num_threads(1)
    source = data(*task["data"])
    model, loss = trained(task, source, path)
    found = {**task, "valid_nll": loss, **evaluate(model, source, task["seed"], task["walkers"])}
    if task.get("floor"):
        found["floor"] = source.floors()
    write_atomically(path, (json.dumps(found) + "\n").encode())
    return {}


def relax(task: dict[str, Any], path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: decode a block of frames, relax each and follow it."""
    torch.set_num_threads(1)
    model = load_propagator(task["model"])
    stored = Path(task["data"][0]) / "trpcage" / "system.xml"
    system = openmm.XmlSerializer.deserialize(stored.read_text(encoding="utf-8"))
    topology, runs = topology_of("trpcage"), data(*task["data"]).runs["test"]
    settings = RelaxationSettings(free=FOLLOWED)
    mapper = BackMapper(
        system, topology, range(topology.getNumAtoms()), runs[0][0], TEMPERATURE, 0.004, settings, platform="CPU"
    )
    found = []
    for k in range(task["first"], task["first"] + BLOCK):
        random = np.random.default_rng([task["seed"], 13, k])
        source = runs[k % len(runs)]
        past = model.encode(source[:WARM_UP].astype(np.float64))[None]
        steps = int(random.integers(1, len(source)))
        path_of, _ = model.run(model.start(past), steps, random)
        decoded = model.decode(path_of[:, -1], random)
        result = mapper.relax(decoded[0], 1000 * task["seed"] + k)
        moved = result.report.moved
        found.append(
            {"reason": result.report.reason, "stage": result.report.stage, "clashes": result.report.clashes,
             "moved": float(moved) if np.isfinite(moved) else None, "energies": dict(result.report.energies)}
        )  # fmt: skip
    write_atomically(path, (json.dumps(found) + "\n").encode())
    return {}


def execute(tasks: dict[str, dict[str, Any]], worker: Any, folder: Path, title: str, processes: int) -> list[Any]:
    """Run tasks and read what they wrote, in order; what failed is said and left out."""
    outcome = run_tasks(tasks, worker, folder, log=folder / "failures.jsonl", suffix=".json", processes=processes,
                        progress=False, title=title)  # fmt: skip
    for name, error in outcome.failed.items():
        print(f"{name}: {error}")
    paths = [folder / f"{name}.json" for name in tasks]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


# -- choice of settings ------------------------------------------------------------------------------------------------


def chosen(folder: Path, where: tuple[str, int], processes: int) -> dict[str, Any]:
    """``choice.json``, made with the data that there are now if it does not exist; best rows first."""
    path = folder / "choice.json"
    if not path.exists():
        work = folder / f"choice_{where[1]}"
        decoders = compared({name: (name, DEFAULT) for name in CANDIDATES}, where, work, "decoder", processes)
        best = decoders[0]["candidate"]
        others = {name: (best, name) for name in PROPAGATORS if name != DEFAULT}
        propagators = [*compared(others, where, work, "propagator", processes), decoders[0] | {"name": DEFAULT}]
        propagators.sort(key=lambda row: row["score"])
        found = {
            "picoseconds_of_each_replica": where[1] * INTERVAL,
            "replicas": sum(len(data(*where).runs[s]) for s in ("train", "valid")), "folds": FOLDS,
            "decoder": best, "propagator": propagators[0]["propagator"],
            "decoders": decoders, "propagators": propagators,
        }  # fmt: skip
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    found = json.loads(path.read_text(encoding="utf-8"))
    for what in ("decoders", "propagators"):
        table = Table(what, "score", "divergence", "of training MD", "timescale", "latent", "of MD", "validation loss")
        for row in found[what]:
            table.add_row(row["name"], *(f"{row[name]:.3g}" for name in SUMMARY))
        Console(width=150).print(table)
    return found


SUMMARY = (
    "score", "mean_divergence", "mean_training_divergence", "timescale_ps", "latent_timescale_ps", "md_timescale_ps",
    "valid_nll",
)  # fmt: skip


def compared(
    candidates: dict[str, tuple[str, str]], where: tuple[str, int], folder: Path, title: str, processes: int
) -> list[dict[str, Any]]:
    """One row per candidate (decoder, propagator) from all folds, the best first."""
    tasks = {
        f"{title}_{k}_{fold}": {"name": name, "candidate": candidate, "propagator": propagator, "seed": 0,
                                "data": [*where, fold], "walkers": FEW_WALKERS}
        for k, (name, (candidate, propagator)) in enumerate(candidates.items()) for fold in range(FOLDS)
    }  # fmt: skip
    rows = execute(tasks, run, folder, title, processes)
    for row in rows:
        row["md_timescale_ps"] = timescale_of_all(*row["data"])
    found = [score([row for row in rows if row["name"] == name]) for name in candidates]
    return sorted(found, key=lambda row: row["score"])


@cache
def timescale_of_all(folder: str, frames: int, fold: int) -> dict[str, float | None]:
    """Slowest timescale (ps) of all replicas in a fold, in its slow coordinates."""
    source = data(folder, frames, fold)
    return timescale([x[:, 4:] for runs in source.measured.values() for x in runs], 2)


def score(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean divergence in units of that of the dynamics trained on, plus the larger |ln| of the ratios of timescales, of
    decoded frames and of latent coordinates, to that of all dynamics in the folds (geometric means over these). They
    are about one and zero for a model that knows what its data say. Latent coordinates that are caught somewhere look
    sound in decoded frames, whose noise hides it; the few replicas held back do not tell the timescale.
    """
    mean = {
        name: float(np.mean([list(row[name].values()) for row in folds]))
        for name in ("divergence", "training_divergence")
    }
    times = {
        name: [row[name]["value"] for row in folds if row[name]["value"] is not None]
        for name in ("timescale_ps", "latent_timescale_ps", "md_timescale_ps")
    }
    typical = {name: float(np.exp(np.mean(np.log(t)))) if t else float("nan") for name, t in times.items()}
    ratios = [typical[name] / typical["md_timescale_ps"] for name in ("timescale_ps", "latent_timescale_ps")]
    apart = float(np.max(np.abs(np.log(ratios))))
    if any(len(t) < len(folds) for t in times.values()):
        apart = float(np.log(NO_TIMESCALE))
    first = {name: folds[0][name] for name in ("name", "candidate", "propagator")}
    return first | {
        "score": mean["divergence"] / mean["training_divergence"] + apart,
        "mean_divergence": mean["divergence"],
        "mean_training_divergence": mean["training_divergence"],
        **typical,
        "valid_nll": float(np.mean([row["valid_nll"] for row in folds])),
        "folds": [{name: row[name] for name in ("divergence", "decoder", "timescale_ps", "latent_timescale_ps",
                                                "md_timescale_ps")} for row in folds],
    }  # fmt: skip


# -- results -----------------------------------------------------------------------------------------------------------


def back_mapping(folder: Path, where: tuple[str, int], blocks: int, processes: int) -> dict[str, Any]:
    """Fates of decoded frames of the first seed's model."""
    model = str(folder / f"led_{SEEDS[0]}.safetensors")
    tasks = {
        f"relaxed_{k}": {"model": model, "data": where, "seed": SEEDS[0], "first": k * BLOCK} for k in range(blocks)
    }
    reports = [r for block in execute(tasks, relax, folder, "relaxation", processes) for r in block]
    fates = Counter(f"{r['reason']} when {r['stage']}" if r["reason"] else "sound" for r in reports)
    moved = [r["moved"] for r in reports if r["moved"] is not None]
    return {
        "frames": len(reports),
        "sound": fates["sound"] / max(len(reports), 1),
        "fates": dict(fates),
        "moved_nm": float(np.mean(moved)) if moved else None,
        "clashing_when_decoded": sum(r["clashes"] > 0 for r in reports),
        "followed_ps": FOLLOWED,
    }


def show(rows: list[dict[str, Any]], level: dict[str, Any], title: str) -> None:
    table = Table("", *MEASURES, "timescale", "latent", title=title)
    for row in rows:
        times = [row.get(name, {}).get("value") for name in ("timescale_ps", "latent_timescale_ps")]
        table.add_row(
            f"{row['name']} {row.get('seed', '')}", *(f"{v:.4f}" for v in row["divergence"].values()),
            *("-" if t is None else f"{t:.0f} ps" for t in times),
        )  # fmt: skip
    table.add_row("2 x floor", *(f"{2 * level[name]['train']:.4f}" for name in MEASURES))
    Console(width=150).print(table)


def verdict(rows: list[dict[str, Any]], level: dict[str, Any], md: dict[str, Any]) -> dict[str, Any]:
    """Which measures are within twice the floor (mean of the seeds), and which timescales within the interval."""
    interval = md["test"] if md["test"]["low"] is not None else md["all"]
    found: dict[str, Any] = {"interval_ps": interval}
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        mean = {m: float(np.mean([row["divergence"][m] for row in mine])) for m in MEASURES}
        values = {kind: [row[kind]["value"] for row in mine] for kind in ("timescale_ps", "latent_timescale_ps")}
        found[name] = {
            "divergence": mean,
            "within_twice_the_floor": {m: mean[m] <= 2 * level[m]["train"] for m in MEASURES},
            "timescale_inside": {
                kind: [t is not None and interval["low"] <= t <= interval["high"] for t in times]
                for kind, times in values.items()
            },
        }
    return found


def compare(folder: Path, where: tuple[str, int], choice: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """LED from all seeds and the other models, against the test replicas."""
    common = {"data": where, "walkers": WALKERS}
    tasks = {
        f"led_{s}": {"name": "LED", "candidate": choice["decoder"], "propagator": choice["propagator"], "seed": s}
        for s in SEEDS
    } | {name: {"name": name, "seed": 0} for name in BASELINES}
    return execute({name: task | common for name, task in tasks.items()}, run, folder, "models", processes)


def other_splits(
    folder: Path, where: tuple[str, int], choice: dict[str, Any], processes: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One seed of LED for each of `OTHER_SPLITS` other ways to share out all replicas, because one pair of a training
    and a test set may differ by more than most do; and the divergences of each in units of twice its floor."""
    common = {"name": "LED", "candidate": choice["decoder"], "propagator": choice["propagator"], "seed": SEEDS[0]}
    tasks = {f"split_{k}": common | {"data": [*where, None, k], "walkers": WALKERS // 2, "floor": True}
             for k in range(OTHER_SPLITS)}  # fmt: skip
    rows = execute(tasks, run, folder, "splits", processes)
    over = {
        kind: {m: [row[kind][m] / (2 * row["floor"][m]["train"]) for row in rows] for m in MEASURES}
        for kind in ("divergence", "training_divergence")
    }
    return rows, over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--frames", type=int, default=RELAXED, help="decoded frames to relax")
    parser.add_argument("--data", type=Path, default=DATA, help="where `led_data.py` wrote to")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--choice-frames", type=int, metavar="N", help="of each replica, for the choice; default: all")
    parser.add_argument("--choose-only", action="store_true", help="choose settings, leave the test replicas alone")
    arguments = parser.parse_args()
    about = machine()
    where = (str(arguments.data), Data.read(arguments.data).frames_each)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    choice = chosen(arguments.folder, (where[0], arguments.choice_frames or where[1]), arguments.processes)
    print(f"chosen: {choice['decoder']}; {choice['propagator']}")
    if arguments.choose_only:
        return
    source, folder = data(*where), arguments.folder / f"{where[1]}_frames"
    amount = {split: source.nanoseconds(split) for split in source.runs}
    print("ns of dynamics:", amount)
    level = source.floors()
    rows = compare(folder, where, choice, arguments.processes)
    slow = {s: [x[:, 4:] for x in runs] for s, runs in source.measured.items()}
    times = {s: timescale(x) for s, x in slow.items()} | {"all": timescale([x for runs in slow.values() for x in runs])}
    training = {"name": "MD, training", "divergence": rows[0]["training_divergence"], "timescale_ps": times["train"]}
    for row in rows:
        if row["name"] == "LED":
            model = load_propagator(folder / f"led_{row['seed']}.safetensors")
            row["timescale_of_small_samples_ps"] = small_samples(model, source, row["seed"])
            print(row["seed"], row["timescale_of_small_samples_ps"])
    show([*rows, training], level, "models, against the test replicas")
    print("timescales of dynamics, ps:", json.dumps(times))
    outcome = verdict(rows, level, times)
    print(json.dumps(outcome["LED"], indent=1))
    shown, _ = generated(load_propagator(folder / f"led_{SEEDS[0]}.safetensors"), source, SEEDS[0], FEW_WALKERS)
    title = f"Trp-cage, native basin, 300 K: {amount['train']:.1f} ns of training, {amount['test']:.1f} ns of test data"
    picture(source, np.concatenate(shown), level, [*rows, training], title)
    mapped = back_mapping(folder, where, -(-arguments.frames // BLOCK), arguments.processes)
    print(json.dumps(mapped))
    others, over = other_splits(folder, where, choice, arguments.processes)
    print(json.dumps({kind: {m: [round(x, 2) for x in v] for m, v in d.items()} for kind, d in over.items()}, indent=1))
    print("timescales, LED and test:", [(r["timescale_ps"]["value"], r["md_timescale_ps"]["value"]) for r in others])
    features, settings = config(choice["decoder"], choice["propagator"], source)
    for row in [*rows, *others]:
        row["data"] = row["data"][1:]
    write("led_trpcage", {
        "what": __doc__, "machine": about, "ns": amount, "interval_ps": INTERVAL, "temperature": TEMPERATURE,
        "chosen": {"features": features.kind, "config": asdict(settings), "options": asdict(OPTIONS)},
        "choice": choice, "lag_ps": LAG * INTERVAL, "models": rows, "training_data": training, "floor": level,
        "md_timescale_ps": times, "verdict": outcome, "back_mapping": mapped,
        "other_splits": {"models": others, "over_twice_the_floor": over},
    })  # fmt: skip


if __name__ == "__main__":
    main()
