"""What a solute in implicit water costs: the pair against GBSA and against explicit TIP3P, capped alanine, one thread.

    python benchmarks/resolv_speed.py [--pair models/resolv-freesolv.safetensors]

ns/day of the solute at the time step that each method takes: 1 fs for the machine-learned potential (flexible bonds to
hydrogen), 4 fs for the force fields (rigid bonds, hydrogens of 3 amu). 64 solutes in one System sample as one solute
does in 64 times the time; explicit water has them in boxes of their own, so its figure does not grow. Rounds of all
methods in turn; medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openmm
import torch
from _common import HERE, machine, write
from _led_systems import alanine
from openmm import app
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.sampling.replicas import Replicas

ROUNDS, SECONDS = 5, 4.0
Stepper = Callable[[int], None]


def force_field(system: openmm.System, positions: np.ndarray, platform: str) -> Stepper:
    integrator = openmm.LangevinMiddleIntegrator(298.15, 1.0, 0.004)
    properties = {"Threads": "1"} if platform == "CPU" else {}
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform), properties)
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
    context.setVelocitiesToTemperature(298.15, 1)
    return _steps(context)


def learned(pair: Path, phase: str, topology: app.Topology, positions: np.ndarray, n: int) -> Stepper:
    system = MLPotential("resolv", modelPath=str(pair)).createSystem(topology, phase=phase, compile=True)
    replicas = Replicas(system, topology, n)
    context = replicas.context(openmm.LangevinMiddleIntegrator(298.15, 1.0, 0.001), "Reference")
    replicas.set_positions(context, positions)
    replicas.minimize(context, max_iterations=100)
    replicas.set_velocities(context, 298.15, 1)
    return _steps(context)


def _steps(context: openmm.Context) -> Stepper:
    def go(n: int) -> None:
        context.getIntegrator().step(n)
        # waits for what a platform still computes
        context.getState(positions=True)

    return go


def rate(go: Stepper, n: int) -> float:
    """Steps per second."""
    before = time.perf_counter()
    go(n)
    return n / (time.perf_counter() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=HERE.parent / "models" / "resolv-freesolv.safetensors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    implicit, topology, positions = alanine()
    explicit, _, all_positions = alanine(implicit=False)
    fs = {"OBC2": 4.0, "TIP3P": 4.0}
    solutes = {"OBC2": 1, "TIP3P": 1}
    methods: dict[str, Stepper] = {
        "OBC2": force_field(implicit, positions, "Reference"),
        "TIP3P": force_field(explicit, all_positions, "CPU"),
    }
    for phase in ("water", "both"):
        for n in (1, 64):
            name = f"pair, {phase}, {n} in one System"
            methods[name], fs[name], solutes[name] = learned(args.pair, phase, topology, positions, n), 1.0, n
    steps = {name: max(1, round(SECONDS * rate(go, 20) / 2)) for name, go in methods.items()}
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, go in methods.items():
            found[name].append(rate(go, steps[name]))
    table = Table("method", "steps/s", "us/solute-step", "ns/day of solute", "against TIP3P", title="Capped alanine")
    rows, day = {}, {}
    for name, rates in found.items():
        middle = float(np.median(rates))
        day[name] = middle * solutes[name] * fs[name] * 1e-6 * 86400
        rows[name] = {
            "steps_per_second": round(middle, 1),
            "solutes": solutes[name],
            "timestep_fs": fs[name],
            "us_per_solute_step": round(1e6 / middle / solutes[name], 1),
            "solute_ns_per_day": round(day[name], 3),
        }
    for name, row in rows.items():
        row["over_TIP3P"] = round(day[name] / day["TIP3P"], 2)
        row["over_OBC2"] = round(day[name] / day["OBC2"], 4)
        cells = (f"{row['steps_per_second']:.0f}", f"{row['us_per_solute_step']:.0f}", f"{day[name]:.1f}")
        table.add_row(name, *cells, f"{row['over_TIP3P']:.2f}")
    Console().print(table)
    write("resolv_speed", {"machine": machine(), "threads": 1, "pair": args.pair.name, "methods": rows})


if __name__ == "__main__":
    main()
