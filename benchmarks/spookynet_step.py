"""Time per evaluation and per MD step of SpookyNet: native code, one compiled graph, and the network run op by op.

Water, Ace-Ala-NMe, Ace-Ala5-NMe and Ace-Ala14-NMe (3, 22, 62, 152 atoms), float32, one thread: the published checkpoint
(with D4), and random weights in the form of the model of biomolecules (no attention, shared conservation of charge,
embedding after the first module). Native code is what runs in simulations; graphs, which torch compiles for a minute
each, are what ran before there was any, and are made for the published checkpoint at the sizes that `--graphs` names.

In every round all kinds run the same new geometries in turn; ratios are taken round by round and their median reported.
`cpu` is the time that the thread was running, which other programs on the machine do not lengthen; `wall` is what a
clock shows. Steps are LangevinMiddle steps of 0.25 fs on OpenMM's Reference platform. The operator count is the number
of aten operators that torch's profiler records for one op-by-op evaluation: those called by the model or by autograd
(`aten_ops`), and with those that operators call inside (`aten_ops_nested`).
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
import openmm
import torch
from _common import machine, peptide, published_checkpoint, rattled, write
from _timing import FRAMES, RESIDUES, Times, in_turn, randomised
from openmm import app, unit
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential
from openmm_spookynet import SpookyNet, SpookyNetConfig

BIO = SpookyNetConfig(attention="none", charge_conservation="shared", embed_after=1)


def count_operators(evaluator: Evaluator, positions: np.ndarray) -> tuple[int, int]:
    """aten operators of one call: not inside another one, and all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        evaluator(positions)
    events = [e for e in recorded.events() or [] if e.name.startswith("aten::")]
    outer = [e for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return len(outer), len(events)


def first_call(evaluator: Evaluator, positions: np.ndarray) -> float:
    start = time.perf_counter()
    evaluator(positions)
    return round(time.perf_counter() - start, 2)


def compare(model: Potential, structure: Structure, rounds: int, graph: bool) -> dict[str, Any]:
    """Evaluations, by all kinds of code in turn."""
    kinds = {"native": model.evaluator(structure, compile=True), "op_by_op": model.evaluator(structure)}
    if graph:
        # what a family without native code of its own runs
        kinds["compiled"] = Evaluator(model, model.batch(structure), ("energy", "forces"), compile=True)
    starts = {name: first_call(evaluator, structure.positions) for name, evaluator in kinds.items()}
    for name in set(kinds) - {"op_by_op"}:
        if not kinds[name].compiled:
            raise RuntimeError(f"{name}: expected compiled code to run, but the model ran op by op")
    frames = rattled(structure, FRAMES)
    times = in_turn(kinds, frames, rounds)
    outer, nested = count_operators(kinds["op_by_op"], structure.positions)
    result: dict[str, Any] = {"aten_ops": outer, "aten_ops_nested": nested}
    exact = kinds["op_by_op"].arrays(frames[0])
    for name in kinds:
        result[name] = times.summary(name) | {"first_call_s": starts[name]}
        if name == "op_by_op":
            continue
        again = type(kinds[name])(model, model.batch(structure), ("energy", "forces"), compile=True)
        found = kinds[name].arrays(frames[0])
        result[name] |= {
            "second_start_s": first_call(again, structure.positions),
            "times_faster_than_op_by_op": times.ratio("op_by_op", name),
            "differs_by": {
                "energy_eV": float(np.abs(found[0] - exact[0]).max()),
                "forces_eV_per_angstrom": float(np.abs(found[1] - exact[1]).max()),
            },
        }
    if graph:
        result["native"]["times_faster_than_compiled"] = times.ratio("compiled", "native")
    return result


def time_steps(structure: Structure, compile: bool, steps: int, rounds: int) -> dict[str, dict[str, float]]:
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
    times = Times()
    for _ in range(rounds):
        times.add("step", partial(integrator.step, steps), steps)
    return times.summary("step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, nargs="+", default=list(RESIDUES), choices=list(RESIDUES))
    parser.add_argument("--graphs", type=int, nargs="*", default=list(RESIDUES), choices=list(RESIDUES))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    models = {"published": load_potential(published_checkpoint(), "spookynet"), "bio": randomised(SpookyNet(BIO))}
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "molecules": {}, "bio": {}}
    table = Table("model", "atoms", "op by op [ms]", "compiled [ms]", "native [ms]", "ratio", "step [ms]", "start [s]")
    for name, model in models.items():
        for n in arguments.atoms:
            structure = peptide(RESIDUES[n])
            assert len(structure) == n
            row = compare(model, structure, arguments.rounds, name == "published" and n in arguments.graphs)
            if name == "published":
                row["step_op_by_op"] = time_steps(structure, False, 10, 5)
                row["step_native"] = time_steps(structure, True, 20, 5)
            result["molecules" if name == "published" else "bio"][str(n)] = row
            times = [f"{row[kind]['cpu']['median_ms']:.2f}" if kind in row else "-" for kind in
                     ("op_by_op", "compiled", "native")]  # fmt: skip
            step = f"{row['step_native']['cpu']['median_ms']:.2f}" if "step_native" in row else "-"
            native = row["native"]
            faster = f"{native['times_faster_than_op_by_op']:.1f}"
            table.add_row(name, str(n), *times, faster, step, f"{native['second_start_s']:.2f}")
    Console().print(table)
    write("spookynet_step", result)


if __name__ == "__main__":
    main()
