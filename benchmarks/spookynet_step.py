"""Time per evaluation and per MD step of SpookyNet: one compiled graph against the same network run op by op.

Water, Ace-Ala-NMe, Ace-Ala5-NMe and Ace-Ala14-NMe (3, 22, 62, 152 atoms), the published checkpoint (with D4), float32,
one thread. In every round both run the same new geometries in turn; the ratio is taken round by round and its median
reported. Steps are LangevinMiddle steps of 0.25 fs on OpenMM's Reference platform. The operator count is the number of
aten operators that torch's profiler records for one op-by-op evaluation: those called by the model or by autograd
(`aten_ops`), and with those that operators call inside (`aten_ops_nested`).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import openmm
import torch
from _common import machine, peptide, published_checkpoint, rattled, summary, write
from openmm import app, unit
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential

RESIDUES = {3: 0, 22: 1, 62: 5, 152: 14}


def count_operators(evaluator: Evaluator, positions: np.ndarray) -> tuple[int, int]:
    """aten operators of one call: not inside another one, and all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        evaluator(positions)
    events = [e for e in recorded.events() or [] if e.name.startswith("aten::")]
    outer = [e for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return len(outer), len(events)


def time_calls(evaluator: Evaluator, frames: list[np.ndarray]) -> float:
    start = time.perf_counter()
    for positions in frames:
        evaluator(positions)
    return (time.perf_counter() - start) / len(frames)


def compare(model: Potential, structure: Structure, rounds: int) -> dict[str, Any]:
    """Evaluations, compiled against op by op."""
    eager, compiled = model.evaluator(structure), model.evaluator(structure, compile=True)
    start = time.perf_counter()
    a = compiled(structure.positions)
    first = time.perf_counter() - start
    if not compiled.compiled:
        raise RuntimeError("the compiled graph was not used")
    b = eager(structure.positions)
    assert a.forces is not None and b.forces is not None
    frames = rattled(structure, 10)
    time_calls(eager, frames)
    time_calls(compiled, frames)
    slow, fast = [], []
    for _ in range(rounds):
        slow.append(time_calls(eager, frames))
        fast.append(time_calls(compiled, frames))
    again = model.evaluator(structure, compile=True)
    start = time.perf_counter()
    again(structure.positions)
    outer, nested = count_operators(eager, structure.positions)
    return {
        "aten_ops": outer,
        "aten_ops_nested": nested,
        "op_by_op": summary(slow),
        "compiled": summary(fast),
        "ratio": round(float(np.median(np.array(slow) / np.array(fast))), 2),
        "first_call_s": round(first, 1),
        "second_start_s": round(time.perf_counter() - start, 2),
        "difference": {
            "energy_eV": float((a.energy - b.energy).abs().max()),
            "forces_eV_per_angstrom": float((a.forces - b.forces).abs().max()),
        },
    }


def time_steps(structure: Structure, compile: bool, steps: int, rounds: int) -> dict[str, float]:
    """MD steps in OpenMM, Reference platform."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in structure.numbers:
        topology.addAtom("A", app.Element.getByAtomicNumber(int(z)), residue)
    system = MLPotential("spookynet", modelPath=str(published_checkpoint())).createSystem(
        topology, compile=compile, device="cpu"
    )
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.25 * unit.femtosecond)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(structure.positions * 0.1)
    integrator.step(5)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        integrator.step(steps)
        seconds.append((time.perf_counter() - start) / steps)
    return summary(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, nargs="+", default=list(RESIDUES), choices=list(RESIDUES))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_potential(published_checkpoint(), "spookynet")
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "molecules": {}}
    table = Table(
        "atoms", "op by op [ms]", "compiled [ms]", "ratio", "step op by op", "step compiled", "second start [s]"
    )
    for n in arguments.atoms:
        structure = peptide(RESIDUES[n])
        assert len(structure) == n
        row = compare(model, structure, arguments.rounds)
        row["step_op_by_op"] = time_steps(structure, False, 10, 5)
        row["step_compiled"] = time_steps(structure, True, 20, 5)
        result["molecules"][str(n)] = row
        table.add_row(
            str(n),
            f"{row['op_by_op']['median_ms']:.2f}",
            f"{row['compiled']['median_ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['step_op_by_op']['median_ms']:.2f}",
            f"{row['step_compiled']['median_ms']:.2f}",
            f"{row['second_start_s']:.2f}",
        )
    Console().print(table)
    write("spookynet_step", result)


if __name__ == "__main__":
    main()
