"""How much faster LED of alanine dipeptide advances than molecular dynamics, in CPU time of one thread, in one run.

Molecular dynamics: OBC2 by OpenMM's native force (Reference platform, 4 fs), as ``implicit/obc2.xml`` makes it
(`CustomGBForce`, Reference and CPU platform, 2 fs), and TIP3P water with PME (CPU platform, 4 fs). LED: one walker and
1,000, with and without decoding every frame of 1 ps to all atoms; and alternating with the native OBC2 dynamics, where
a round of rho latent frames for each frame of MD cannot gain more than 1 + rho.

What many walkers gain is throughput: molecular dynamics makes as many ps per second in one walker as in many. The cost
of the data and of the training comes on top; the table at the end has the length of simulation after which LED, with
everything that it needs, has cost less than molecular dynamics.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import machine, write
from _led_systems import alanine, explicit_alanine, load
from led_ala2 import FOLDER, WARM_UP, runs
from openmm import app, unit
from rich.console import Console
from rich.table import Table

from openmm_led import LED
from openmm_mlff.sampling.led_simulation import LEDSimulation
from openmm_mlff.sampling.propagators import load_propagator

RHOS = (1, 10, 100)
#: frames of MD in a round of the alternation
MICRO = 10


class Dynamics:
    """An equilibrated context; `advance` returns the ps that it made."""

    def __init__(self, system: openmm.System, positions: np.ndarray, platform: str, timestep: float) -> None:
        integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, timestep)
        properties = {"Threads": "1"} if platform == "CPU" else {}
        self.timestep = timestep
        self.context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform), properties)
        self.context.setPositions(positions)
        openmm.LocalEnergyMinimizer.minimize(self.context, maxIterations=200)
        self.context.setVelocitiesToTemperature(300.0, 1)
        integrator.step(100)

    def advance(self) -> float:
        self.context.getIntegrator().step(50)
        self.context.getState(energy=True)
        return 50 * self.timestep


class Latent:
    """LED walkers; `advance` returns the ps of all of them together."""

    def __init__(self, model: LED, walkers: int, decode: bool) -> None:
        self.model, self.decode, self.random = model, decode, np.random.default_rng(0)
        z = model.encode(runs("valid", "free")[0][:WARM_UP].astype(np.float64))
        self.state = model.start(np.repeat(z[None], walkers, axis=0))

    def advance(self) -> float:
        steps = 50 if len(self.state) == 1 else 5
        for _ in range(steps):
            self.state = self.model.step(self.state, self.random)
            if self.decode:
                self.model.decode(self.state.z, self.random)
        return steps * self.model.interval * len(self.state)


class Alternating:
    """`LEDSimulation` of one walker; `advance` is one round."""

    def __init__(self, model: LED, rho: int) -> None:
        system, topology, positions = alanine()
        self.simulation = LEDSimulation(system, topology, model, macro_steps=rho * MICRO, micro_steps=MICRO, warmup=20,
                                        platform="Reference", seed=1)  # fmt: skip
        self.frame_ps = (rho + 1) * MICRO * model.interval
        self.simulation.setPositions(positions)
        self.simulation.minimizeEnergy()
        self.simulation.run_rounds(1, progress=False)

    def advance(self) -> float:
        self.simulation.run_rounds(1, progress=False)
        return self.frame_ps


def as_shipped() -> openmm.System:
    """Alanine with the `CustomGBForce` of ``implicit/obc2.xml``."""
    _, topology, _ = alanine()
    return app.ForceField("amber99sbildn.xml", "implicit/obc2.xml").createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds, removeCMMotion=False,
        hydrogenMass=3.0 * unit.amu,
    )  # fmt: skip


def contestants(model: LED) -> dict[str, Callable[[], float]]:
    system, _, positions = alanine()
    water, _, water_positions = explicit_alanine()
    found: dict[str, Callable[[], float]] = {
        "MD, native OBC2": Dynamics(system, positions, "Reference", 0.004).advance,
        "MD, CustomGBForce, Reference": Dynamics(as_shipped(), positions, "Reference", 0.002).advance,
        "MD, CustomGBForce, CPU": Dynamics(as_shipped(), positions, "CPU", 0.002).advance,
        "MD, TIP3P": Dynamics(water, water_positions, "CPU", 0.004).advance,
    }
    for walkers in (1, 1000):
        for decode in (False, True):
            name = f"LED, {walkers} walker{'s' if walkers > 1 else ''}{', decoded' if decode else ''}"
            found[name] = Latent(model, walkers, decode).advance
    for rho in RHOS:
        found[f"LED alternating, rho {rho}"] = Alternating(model, rho).advance
    return found


def timed(advance: Callable[[], float], seconds: float) -> float:
    """ps per CPU second over about that CPU time."""
    start, done = time.process_time(), 0.0
    while time.process_time() - start < seconds:
        done += advance()
    return done / (time.process_time() - start)


def costs(stored: Path, rates: dict[str, float]) -> dict[str, Any]:
    """CPU seconds of the data and of the training of the model, and from which length of simulation on they pay."""
    data = sum(s["cpu_s"] for split in ("train", "valid") for r in load("ala2", split) for s in r.info["segments"])
    training = 0.0
    for history in sorted(stored.with_suffix("").glob("*/history.json")):
        training += json.loads(history.read_text(encoding="utf-8"))[-1]["seconds"]
    found: dict[str, Any] = {"data_cpu_s": data, "training_wall_s": training, "pays_after_ns": {}}
    md = rates["MD, native OBC2"]
    for name in ("LED, 1 walker", "LED, 1 walker, decoded", "LED, 1000 walkers", "LED, 1000 walkers, decoded"):
        saved = 1.0 / md - 1.0 / rates[name]  # CPU seconds per ps
        found["pays_after_ns"][name] = (data + training) / saved / 1000.0 if saved > 0 else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER / "model_0.safetensors", help="made by led_ala2.py")
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time of a block")
    parser.add_argument("--blocks", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    model = load_propagator(arguments.model)
    if not isinstance(model, LED):
        raise SystemExit(f"{arguments.model.name} is not an LED model")
    entries = contestants(model)
    blocks: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(arguments.blocks):
        for name, advance in entries.items():
            blocks[name].append(timed(advance, arguments.seconds))
    rates = {name: float(np.median(values)) for name, values in blocks.items()}
    table = Table("", "ps per CPU second", "over native OBC2", "over CustomGB (CPU)", "over TIP3P")
    rows: dict[str, Any] = {}
    against = ("MD, native OBC2", "MD, CustomGBForce, Reference", "MD, CustomGBForce, CPU", "MD, TIP3P")
    for name, rate in rates.items():
        rows[name] = {"ps_per_cpu_s": rate, "blocks": blocks[name], "over": {a: rate / rates[a] for a in against}}
        over = rows[name]["over"]
        table.add_row(name, f"{rate:.4g}", *(f"{over[a]:.4g}" for a in (against[0], against[2], against[3])))
    Console(width=120).print(table)
    total = costs(arguments.model, rates)
    print(json.dumps(total, indent=1))
    write("led_speedup", {"what": __doc__, "machine": about, "rows": rows, "bounds": {r: 1 + r for r in RHOS},
                          "costs": total})  # fmt: skip


if __name__ == "__main__":
    main()
