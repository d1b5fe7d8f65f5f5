"""LED of Trp-cage (PDB entry 1L2Y, implicit solvent, 300 K) against molecular dynamics that it has not seen.

    python benchmarks/led_data.py --systems trpcage --time-limit 120
    python benchmarks/led_trpcage.py

Native-basin dynamics: folding takes microseconds and is not in the data. As much as `led_data.py` has made is used
(whole rounds, the same length for every replica), split by replica; how much that is stands in the results, which are
kept in a folder per amount of data. Stopped, it goes on.

The forms of features and decoder in `CANDIDATES` are compared on the validation replicas, then the propagators in
`PROPAGATORS` by their likelihood there; the best are trained from three seeds and compared with the test replicas.
Generated are, from the beginnings of the replicas, 32 trajectories each of their length, every frame decoded. Rows
beside it: a Markov state model and a linear-Gaussian model of the same two slow coordinates, which give back frames of
the training data, and the training data themselves.

Measures: RMSD from the experimental structure (CA, heavy atoms), radius of gyration, end-to-end distance, and the two
slowest coordinates (TICA of distances between CA, fitted to training replicas); Jensen-Shannon divergence (25 bins)
beside its floor, two sets of dynamics as long as the training data; slowest timescale at 10 ps, of decoded frames and
of the latent coordinates as they are propagated. 200 decoded frames are relaxed and followed for 10 ps.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, machine, write
from _led_systems import FOLDER as DATA
from _led_systems import topology_of
from _led_trpcage import INTERVAL, LAG, MEASURES, TEMPERATURE, Data, picture, timescale
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
WARM_UP, WALKERS = 5, 32
#: kernels at training frames at most
KERNELS = 2000
RELAXED, BLOCK = 200, 5
FOLLOWED = 10.0

BASE = LEDConfig(
    latent_dim=2, encoder_widths=(), decoder_widths=(32,), objective="tica", lag=LAG, decoder="principal",
    decoder_kernels=1, decoder_draws=8, hidden=16, kernels=1, floor=0.2,
)  # fmt: skip
OPTIONS = LEDOptions(autoencoder_steps=1000, batch=1024, propagator_steps=1000, lanes=10, chunk=100, learning_rate=2e-3)
#: features, and what differs from `BASE`; 0 kernels stands for one at each training frame
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "principal axes": ("distances", {}),
    "principal axes, kernels 0.2": ("distances", {"decoder_kernels": 0, "decoder_floor": 0.2}),
    "principal axes, kernels 0.35": ("distances", {"decoder_kernels": 0, "decoder_floor": 0.35}),
    "principal axes, kernels 0.5": ("distances", {"decoder_kernels": 0, "decoder_floor": 0.5}),
    "Cartesian principal axes": ("cartesian", {}),
    "Cartesian, kernels 0.35": ("cartesian", {"decoder_kernels": 0, "decoder_floor": 0.35}),
    "autoregressive torsions": ("distances", {"decoder": "autoregressive", "decoder_kernels": 4}),
    "joint": ("distances", {"decoder": "joint", "decoder_floor": 0.05}),
    "principal axes, VAMP": ("distances", {"objective": "both", "encoder_widths": (32,)}),
}
#: what differs from `BASE`; all forget the past slowly enough only if the data say so
PROPAGATORS: dict[str, dict[str, Any]] = {
    "GRU 16": {},
    "GRU 4": {"hidden": 4},
    "GRU 64": {"hidden": 64},
    "GRU 16, narrower": {"floor": 0.05},
    "GRU 16, 3 kernels": {"kernels": 3},
    "GRU 64, 3 kernels": {"hidden": 64, "kernels": 3, "floor": 0.05},
}
DEFAULT = "GRU 16"
_data: list[Data] = []


def data() -> Data:
    """Read once; `main` says from which folder."""
    if not _data:
        _data.append(Data.read(DATA))
    return _data[0]


def features(kind: str) -> Features:
    topology = topology_of("trpcage")
    if kind == "cartesian":
        return Features.cartesian(topology, data().runs["train"][0][0], "heavy")
    return Features.distances(topology, None, "heavy")


def config(candidate: str, propagator: str) -> tuple[Features, LEDConfig]:
    kind, changes = CANDIDATES[candidate]
    chosen = changes | PROPAGATORS[propagator]
    if chosen.get("decoder_kernels") == 0:
        chosen["decoder_kernels"] = min(KERNELS, data().trajectories("train").n_frames)
    return features(kind), replace(BASE, **chosen)


def trained(candidate: str, propagator: str, seed: int, path: Path) -> Propagator:
    """The model file, or training that ends with it."""
    if not path.exists():
        chosen, settings = config(candidate, propagator)
        learner = LEDLearner(chosen, settings, replace(OPTIONS, seed=seed))
        sets = [data().trajectories(s) for s in ("train", "valid")]
        learner.fit(*sets, path.with_suffix(""), temperature=TEMPERATURE, progress=False).save(path)
    return load_propagator(path)


def baseline(name: str, seed: int) -> Propagator:
    train = data().trajectories("train")
    if name == "MSM":
        states = max(10, round(train.n_frames**0.5))
        return MSMPropagator.fit(data().tica, train, n_states=states, temperature=TEMPERATURE, seed=seed)
    return LinearGaussian.fit(data().tica, train, temperature=TEMPERATURE, seed=seed)


def generated(model: Propagator, split: str, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Measures ``(n_frames, 6)`` of decoded frames, and latent coordinates, of trajectories from the beginnings of
    the replicas and as long as they are."""
    random = np.random.default_rng([seed, 11])
    runs = data().runs[split]
    past = np.stack([model.encode(run[:WARM_UP].astype(np.float64)) for run in runs for _ in range(WALKERS)])
    path, _ = model.run(model.start(past), min(map(len, runs)) - WARM_UP, random)
    return [data().measure(model.decode(z, random)) for z in path], list(path)


def evaluate(model: Propagator, split: str, seed: int) -> dict[str, Any]:
    """Divergences from the replicas of a split, and timescales."""
    measured, latent = generated(model, split, seed)
    reference = np.concatenate(data().measured[split])
    runs = data().runs[split]
    decoded = model.decode(
        np.concatenate([model.encode(x.astype(np.float64)) for x in runs]).repeat(5, axis=0),
        np.random.default_rng([seed, 12]),
    )
    return {
        "divergence": data().divergences(np.concatenate(measured), reference),
        "decoder": data().divergences(data().measure(decoded), reference),
        "timescale_ps": timescale([x[:, 4:] for x in measured]),
        "latent_timescale_ps": timescale(latent),
    }


def run(task: dict[str, Any], path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: train one model and measure it on one split."""
    torch.set_num_threads(1)
    if task["name"] in ("MSM", "linear-Gaussian"):
        model = baseline(task["name"], task["seed"])
    else:
        stored = path.parent / f"{task['model']}.safetensors"
        model = trained(task["candidate"], task["propagator"], task["seed"], stored)
    found = {**task, **evaluate(model, task["split"], task["seed"])}
    write_atomically(path, (json.dumps(found) + "\n").encode())
    return {}


def relax(task: dict[str, Any], path: Path) -> dict[str, str]:
    """Worker of `run_tasks`: decode a block of frames, relax each and follow it."""
    model = load_propagator(task["model"])
    system = openmm.XmlSerializer.deserialize((DATA / "trpcage" / "system.xml").read_text(encoding="utf-8"))
    topology, runs = topology_of("trpcage"), data().runs["test"]
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


def execute(tasks: dict[str, dict[str, Any]], worker: Any, folder: Path, title: str) -> list[Any]:
    """Run tasks one after the other and read what they wrote, in order; what failed is said and left out."""
    outcome = run_tasks(tasks, worker, folder, log=folder / "failures.jsonl", suffix=".json", progress=False,
                        title=title)  # fmt: skip
    for name, error in outcome.failed.items():
        print(f"{name}: {error}")
    paths = [folder / f"{name}.json" for name in tasks]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def choose(folder: Path) -> list[dict[str, Any]]:
    """All candidates on the validation replicas, the best (least mean divergence of generated frames) first."""
    tasks = {
        f"valid_{k}": {"name": name, "candidate": name, "propagator": DEFAULT, "model": f"candidate_{k}", "seed": 0,
                       "split": "valid"}
        for k, name in enumerate(CANDIDATES)
    }  # fmt: skip
    return sorted(execute(tasks, run, folder, "candidates"), key=mean_divergence)


def mean_divergence(row: dict[str, Any]) -> float:
    return float(np.mean(list(row["divergence"].values())))


def choose_propagator(folder: Path, candidate: str) -> list[dict[str, Any]]:
    """All propagators with one decoder, the best (most likely validation replicas) first."""
    tasks = {
        f"propagator_{k}": {"name": name, "candidate": candidate, "propagator": name, "model": f"propagator_{k}_model",
                            "seed": 0, "split": "valid"}
        for k, name in enumerate(PROPAGATORS)
    }  # fmt: skip
    rows = execute(tasks, run, folder, "propagators")
    for row in rows:
        with (folder / row["model"] / "propagator_0" / "history.csv").open(encoding="utf-8", newline="") as file:
            row["nll"] = min(float(line["valid_loss"]) for line in csv.DictReader(file))
    return sorted(rows, key=lambda row: row["nll"])


def back_mapping(folder: Path, blocks: int) -> dict[str, Any]:
    """Fates of the decoded frames of the first seed's model that were relaxed so far."""
    model = str(folder / "led_0.safetensors")
    tasks = {f"relaxed_{k}": {"model": model, "seed": 0, "first": k * BLOCK} for k in range(blocks)}
    reports = [r for block in execute(tasks, relax, folder, "relaxation") for r in block]
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
            f"{row['name']} {row.get('seed', '')}", *(f"{v:.3f}" for v in row["divergence"].values()),
            *("-" if t is None else f"{t:.0f} ps" for t in times),
        )  # fmt: skip
    table.add_row("2 x floor", *(f"{2 * level[name]['train']:.3f}" for name in MEASURES))
    Console(width=150).print(table)


def verdict(rows: list[dict[str, Any]], level: dict[str, Any], md: dict[str, Any]) -> dict[str, Any]:
    """Which measures are within twice the floor (mean of the seeds), and which timescales within the interval."""
    led = [row for row in rows if row["name"] == "LED"]
    mean = {name: float(np.mean([row["divergence"][name] for row in led])) for name in MEASURES}
    interval = md["test"] if md["test"]["low"] is not None else md["all"]
    inside = {
        kind: [
            row[kind]["value"] is not None and interval["low"] <= row[kind]["value"] <= interval["high"] for row in led
        ]
        for kind in ("timescale_ps", "latent_timescale_ps")
    }
    return {
        "divergence": mean,
        "within_twice_the_floor": {name: mean[name] <= 2 * level[name]["train"] for name in MEASURES},
        "interval_ps": interval,
        "timescale_inside": inside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--frames", type=int, default=RELAXED, help="decoded frames to relax")
    parser.add_argument("--data", type=Path, default=DATA, help="where `led_data.py` wrote to")
    arguments = parser.parse_args()
    about = machine()
    _data[:] = [Data.read(arguments.data)]
    folder = arguments.folder / f"{data().frames_each}_frames"
    folder.mkdir(parents=True, exist_ok=True)
    amount = {split: data().nanoseconds(split) for split in data().runs}
    print("ns of dynamics:", amount)
    level = data().floors()
    candidates = choose(folder)
    show(candidates, level, "candidates, against the validation replicas")
    best = candidates[0]["name"]
    propagators = choose_propagator(folder, best)
    fitting = propagators[0]["name"]
    print(f"chosen: {best}, {fitting};", {row["name"]: round(row["nll"], 3) for row in propagators})
    tasks = {
        f"test_{s}": {"name": "LED", "candidate": best, "propagator": fitting, "model": f"led_{s}", "seed": s,
                      "split": "test"}
        for s in SEEDS
    }  # fmt: skip
    tasks |= {name: {"name": name, "seed": 0, "split": "test"} for name in ("MSM", "linear-Gaussian")}
    rows = execute(tasks, run, folder, "models")
    test = np.concatenate(data().measured["test"])
    slow = {s: [x[:, 4:] for x in runs] for s, runs in data().measured.items()}
    times = {s: timescale(x) for s, x in slow.items()} | {"all": timescale([x for runs in slow.values() for x in runs])}
    training = np.concatenate(data().measured["train"])
    reference = {"name": "MD, training", "divergence": data().divergences(training, test),
                 "timescale_ps": times["train"]}  # fmt: skip
    show([*rows, reference], level, "models, against the test replicas")
    print("timescales of dynamics, ps:", json.dumps(times))
    outcome = verdict(rows, level, times)
    print(json.dumps(outcome, indent=1))
    shown, _ = generated(load_propagator(folder / "led_0.safetensors"), "test", 0)
    title = f"Trp-cage, native basin, 300 K: {amount['train']:.1f} ns of training, {amount['test']:.1f} ns of test data"
    picture(data(), np.concatenate(shown), level, [*rows, reference], title)
    mapped = back_mapping(folder, -(-arguments.frames // BLOCK))
    print(json.dumps(mapped))
    chosen, settings = config(best, fitting)
    result = {
        "what": __doc__, "machine": about, "ns": amount, "interval_ps": INTERVAL, "temperature": TEMPERATURE,
        "chosen": {"decoder": best, "propagator": fitting, "features": chosen.kind, "config": asdict(settings),
                   "options": asdict(OPTIONS)},
        "lag_ps": LAG * INTERVAL, "candidates": candidates, "propagators": propagators, "models": rows,
        "training_data": reference, "floor": level,
        "md_timescale_ps": times, "verdict": outcome, "back_mapping": mapped,
    }  # fmt: skip
    write("led_trpcage", result)


if __name__ == "__main__":
    main()
