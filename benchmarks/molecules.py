"""Different molecules in one System: molecule-steps per second of all, and whether statistics are those of single runs.

Molecules of FreeSolv with 14 to 16 atoms, a small SO3krates (32 features) in native code,
LangevinMiddle steps on OpenMM's Reference platform.

Speed: 1 to 512 molecules in one System, with 1, 2 and 4 threads, against runs of one molecule at a time as
``MLPotential.createSystem`` sets them up (native code, one thread). Single runs and batches take turns within every
round; the gain is the median over rounds. "model" is what the model alone takes per molecule and step, "overhead" all
that OpenMM, Python and the guards add.

Statistics (with ``--model``): every molecule once in a batch, and once alone, by as many runs with seeds of their own.
The time average of one run is one independent sample: z of the mean energy of each molecule, and of all temperatures.

Without ``--model`` the weights are random, and time steps so short that nothing moves: a step costs the same.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, machine, write
from _resolv import TEMPERATURE, stored_frames
from _resolv import molecules as published
from openmm import app
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.sampling.molecule_runs import LangevinSettings, sample
from openmm_mlff.sampling.molecules import Molecules
from openmm_mlff.units import KJ_PER_MOL_PER_EV, NM_PER_ANGSTROM

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
THREADS = (1, 2, 4)
SIZES = (14, 16)
#: molecules that run alone; all counts begin with these
SINGLE = 8
SEED = 6


def random_model() -> Potential:
    """The network of ReSolv's fast pair with random weights."""
    from openmm_so3krates import SO3krates, SO3kratesConfig

    torch.manual_seed(SEED)
    names = ("charge_embed", "spin_embed", "electrostatics", "dispersion")
    off: dict[str, Any] = {f"use_{name}": False for name in names}
    return SO3krates(
        SO3kratesConfig(
            num_features=32, num_layers=2, degrees=(1, 2), num_heads=2, cutoff=5.0, elements=(1, 6, 7, 8, 16, 17),
            predict_charges=False, predict_hirshfeld=False, **off,
        )
    ).eval()  # fmt: skip


@cache
def frames_of_molecules() -> dict[int, list[Structure]]:
    """Stored frames of all sound molecules of the sizes, by index."""
    sound = {molecule.index for molecule in published() if molecule.sound}
    stored = stored_frames("vac")
    return {k: found for k, found in stored.items() if k in sound and SIZES[0] <= len(found[0]) <= SIZES[1]}


def chosen(n: int) -> list[Structure]:
    """Frames of `n` molecules in random order; beyond their number, further frames of the same."""
    frames = frames_of_molecules()
    order = np.random.default_rng(SEED).permutation(sorted(frames)).tolist()
    return [frames[order[i % len(order)]][i // len(order)] for i in range(n)]


class Alone:
    """Runs of one molecule each, as a user sets them up."""

    def __init__(self, potential: Potential, structures: list[Structure], timestep: float) -> None:
        made = MLPotential(potential.family, model=potential)
        self.contexts = []
        for k, structure in enumerate(structures):
            topology = app.Topology()
            residue = topology.addResidue("MOL", topology.addChain())
            for z in structure.numbers.tolist():
                topology.addAtom("A", app.Element.getByAtomicNumber(z), residue)
            system = made.createSystem(topology, compile=True, precision="single", threads=1, removeCMMotion=False)
            context = openmm.Context(system, integrator(k, timestep), openmm.Platform.getPlatform("Reference"))
            context.setPositions(structure.positions * NM_PER_ANGSTROM)
            context.setVelocitiesToTemperature(TEMPERATURE, k + 1)
            context.getIntegrator().step(2)
            self.contexts.append(context)

    def rate(self, seconds: float) -> float:
        """Molecule-steps per second: all of them in turn, as many steps of each."""
        return 1.0 / float(np.mean([1.0 / rate(c, seconds / len(self.contexts)) for c in self.contexts]))


def integrator(seed: int, timestep: float) -> openmm.Integrator:
    made = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, timestep * 1e-3)
    made.setRandomNumberSeed(seed + 1)
    return made


def rate(context: openmm.Context, seconds: float) -> float:
    """Steps per second, over about so many seconds."""
    run = context.getIntegrator().step
    begin = time.perf_counter()
    run(1)
    steps = max(1, round(seconds / max(time.perf_counter() - begin, 1e-7)))
    begin = time.perf_counter()
    run(steps)
    return steps / (time.perf_counter() - begin)


def together(potential: Potential, n: int, threads: int, timestep: float) -> tuple[Molecules, openmm.Context]:
    """`n` molecules after a few steps."""
    molecules = Molecules.from_potential(potential, chosen(n), threads=threads)
    context = molecules.context(integrator(0, timestep), "Reference")
    molecules.set_positions(context)
    molecules.set_velocities(context, TEMPERATURE, 1)
    context.getIntegrator().step(3)
    return molecules, context


def model_seconds(potential: Potential, n: int) -> float:
    """What one evaluation of `n` molecules takes without OpenMM; call it with the threads that are meant."""
    structures = chosen(n)
    evaluator = potential.evaluator(structures, compile=True)
    positions = np.concatenate([s.positions for s in structures])
    evaluator.arrays(positions)
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.2 or calls < 3:
        evaluator.arrays(positions)
        calls += 1
    return (time.perf_counter() - begin) / calls


def speed(
    potential: Potential, counts: list[int], threads: int, rounds: int, seconds: float, timestep: float
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    alone, rows = Alone(potential, chosen(SINGLE), timestep), {}
    for n in counts:
        molecules, context = together(potential, n, threads, timestep)
        rate(context, seconds / 4)
        one, many, bare = [], [], []
        for _ in range(rounds):
            one.append(alone.rate(seconds))
            many.append(n * rate(context, seconds))
            bare.append(1e6 * model_seconds(potential, n) / n)
        # a broken molecule is held and costs what it did before
        if len(molecules.failures) > 0.05 * n:
            raise RuntimeError(f"{len(molecules.failures)} of {n} molecules broke: {molecules.failures[0].reason}")
        ratios, step = np.array(many) / np.array(one), 1e6 / np.array(many)
        rows[str(n)] = {
            "held": len(molecules.failures),
            "molecule_steps_per_second": round(float(np.median(many)), 1),
            "single_steps_per_second": round(float(np.median(one)), 1),
            "gain": round(float(np.median(ratios)), 2),
            "gain_quartiles": [round(float(q), 2) for q in np.percentile(ratios, [25, 75])],
            "step_us": round(float(np.median(step)), 2),
            "model_us": round(float(np.median(bare)), 2),
            "overhead_us": round(float(np.median(step - np.array(bare))), 2),
        }
        print(f"{threads} threads", n, rows[str(n)], flush=True)
    return rows


# -- statistics ------------------------------------------------------------------------------------------------------


def statistics(potential: Potential, runs: int, picoseconds: float, discard: float) -> dict[str, Any]:
    """`runs` runs of each of `SINGLE` molecules in one System, and as many one by one by OpenMM alone."""
    torch.set_num_threads(1)
    interval, structures = 0.05, chosen(SINGLE)
    settings = LangevinSettings(
        temperature=TEMPERATURE, equilibration=discard, length=picoseconds, interval=interval, seed=SEED,
        batch=SINGLE * runs,
    )  # fmt: skip
    many = sample(potential, [s for s in structures for _ in range(runs)], settings)
    broken = sum(len(found.failures) for found in many)
    batch = np.array([[found.energies.mean(), found.temperature] for found in many]).reshape(SINGLE, runs, 2)
    single, begin = np.empty_like(batch), time.monotonic()
    for r in range(runs):
        for k, context in enumerate(Alone(potential, structures, settings.timestep).contexts):
            context.getIntegrator().setRandomNumberSeed(1000 * r + k + 1)
            context.reinitialize(preserveState=True)
            context.setVelocitiesToTemperature(TEMPERATURE, 1000 * r + k + 1)
            context.getIntegrator().step(settings.steps(discard))
            single[k, r] = average(context, settings, 3 * len(structures[k]))
        print(f"single runs {r + 1} of {runs}, {time.monotonic() - begin:.0f} s", flush=True)
    error = np.sqrt((batch.var(axis=1, ddof=1) + single.var(axis=1, ddof=1)) / runs)
    z = (batch.mean(axis=1) - single.mean(axis=1)) / error
    rows = {
        s.formula: {
            "batch_meV": round(1e3 * float(b[:, 0].mean() - a[:, 0].mean()), 2),
            "error_meV": round(1e3 * float(e[0]), 2),
            "z_energy": round(float(zs[0]), 2),
            "z_temperature": round(float(zs[1]), 2),
        }
        for s, b, a, e, zs in zip(structures, batch, single, error, z, strict=True)
    }
    return {
        "molecules": rows, "z_root_mean_square": round(float(np.sqrt(np.mean(z**2))), 2),
        # z is a t variable of 2 runs - 2 degrees of freedom
        "expected": round(float(np.sqrt((runs - 1) / (runs - 2))), 2), "runs": runs, "picoseconds": picoseconds,
        "discarded": discard, "broken": broken,
    }  # fmt: skip


def average(context: openmm.Context, settings: LangevinSettings, freedom: int) -> tuple[float, float]:
    """Mean potential energy (eV) and temperature (K) of the frames that `sample` takes."""
    found = []
    for _ in range(round(settings.length / settings.interval)):
        context.getIntegrator().step(settings.steps(settings.interval))
        state = context.getState(energy=True)
        kinetic = state.getKineticEnergy() / openmm.unit.MOLAR_GAS_CONSTANT_R / openmm.unit.kelvin
        found.append((state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV, 2.0 * kinetic / freedom))
    energy, temperature = np.mean(found, axis=0)
    return float(energy), float(temperature)


# -- output ----------------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any]) -> None:
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.5), constrained_layout=True)
        for color, (threads, rows) in zip((BLUE, ORANGE, "#3c8d5a"), result["speed"].items(), strict=False):
            counts = np.array([int(n) for n in rows])
            label = f"{threads} thread" + ("s" if threads != "1" else "")
            rates = np.array([row["molecule_steps_per_second"] for row in rows.values()])
            left.plot(counts, 1e-3 * rates, "o-", color=color, markersize=4, label=label)
        alone = np.median([r["single_steps_per_second"] for rows in result["speed"].values() for r in rows.values()])
        left.axhline(1e-3 * alone, color=GREY, linestyle="--", linewidth=1)
        left.annotate("one molecule at a time", (COUNTS[-1], 1e-3 * alone), xytext=(0, -11), ha="right", color="0.35",
                      textcoords="offset points", fontsize=8)  # fmt: skip
        rows = result["speed"].get("1", next(iter(result["speed"].values())))
        counts = np.array([int(n) for n in rows])
        model, step = (np.array([row[name] for row in rows.values()]) for name in ("model_us", "step_us"))
        right.fill_between(counts, 0, model, color=BLUE, alpha=0.25, linewidth=0, label="the model")
        right.fill_between(counts, model, np.maximum(step, model), color=ORANGE, alpha=0.6, linewidth=0,
                           label="OpenMM, Python, guards")  # fmt: skip
        right.plot(counts, step, "o-", color=BLUE, markersize=4)
        left.set_ylabel("1000 molecule-steps per second")
        right.set_ylabel("µs per molecule and step, one thread")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
            axes.set_xlabel("molecules in one System")
            axes.grid(alpha=0.3)
            axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
            axes.set_xlim(0.8, 1.25 * COUNTS[-1])
        left.legend(loc="upper left")
        right.legend(loc="upper right")
        save_figure(figure, HERE / "molecules.png")


def show(result: dict[str, Any]) -> None:
    console = Console()
    for threads, rows in result["speed"].items():
        table = Table("molecules", "molecule-steps/s", "gain", "µs per molecule-step", "model", "overhead",
                      title=f"{threads} threads")  # fmt: skip
        for n, row in rows.items():
            values = [
                row["molecule_steps_per_second"],
                row["gain"],
                row["step_us"],
                row["model_us"],
                row["overhead_us"],
            ]
            table.add_row(n, *(f"{value:g}" for value in values))
        console.print(table)
    found = result.get("statistics")
    if found:
        title = f"z: root mean square {found['z_root_mean_square']}, expected {found['expected']}"
        table = Table("molecule", "batch - single, meV", "error", "z energy", "z temperature", title=title)
        for name, row in found["molecules"].items():
            table.add_row(name, *(f"{value:g}" for value in row.values()))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model file; without it the weights are random")
    parser.add_argument("--parts", nargs="+", default=["speed", "statistics"], choices=["speed", "statistics"])
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of every timing")
    parser.add_argument("--runs", type=int, default=12, help="of each molecule, for the statistics")
    parser.add_argument("--length", type=float, default=4.0, help="ps of each, after 2 ps that are discarded")
    parser.add_argument("--keep", action="store_true", help="keep what molecules.json has of other parts")
    arguments = parser.parse_args()
    potential = random_model() if arguments.model is None else load_potential(arguments.model)
    timestep = 1e-3 if arguments.model is None else 1.0
    weights = "random" if arguments.model is None else arguments.model.name
    sizes = [len(s) for s in chosen(64)]
    about = {"weights": weights, "timestep_fs": timestep, "mean_atoms": round(float(np.mean(sizes)), 2)}
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), **about, "speed": {}}
    if arguments.keep and (HERE / "molecules.json").exists():
        result = json.loads((HERE / "molecules.json").read_text(encoding="utf-8")) | {"machine": result["machine"]}
    if "speed" in arguments.parts:
        for threads in arguments.threads:
            result["speed"][str(threads)] = speed(
                potential, arguments.counts, threads, arguments.rounds, arguments.seconds, timestep
            )
            write("molecules", result)
    if "statistics" in arguments.parts and arguments.model is not None:
        result["statistics"] = statistics(potential, arguments.runs, arguments.length, discard=2.0)
        write("molecules", result)
    show(result)
    draw(result)


if __name__ == "__main__":
    main()
