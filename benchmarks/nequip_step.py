"""Time per energy and forces of NequIP: op by op, with the messages in C++, and as a compiled graph.

The networks are those that jax-md computed stored energies and forces with (random weights): the size that ReSolv
publishes, and a small one. One molecule of 21 atoms, dipropyl sulfide, on one thread; every way runs in turn in every
round, and ratios are taken round by round. Times are those that the processor spent, so that other work on the machine
does not count. The errors beside them are those against jax-md's numbers.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _common import SHARED, machine, rattled, summary, write  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from openmm_mlff.data.structures import Structure  # noqa: E402
from openmm_mlff.potentials.evaluator import Evaluator  # noqa: E402
from openmm_nequip import NequIP  # noqa: E402
from openmm_nequip.pretrained import build, config_of, translate  # noqa: E402

FOLDER = SHARED / "data" / "resolv"
MOLECULE = "m372"
WAYS: dict[str, bool | str] = {"op by op": False, "messages in C++": "auto", "compiled": True}


def network(kind: str, dtype: torch.dtype) -> NequIP:
    with np.load(FOLDER / f"nequip_{kind}_params.npz") as file:
        arrays = {name: file[name].astype(np.float64) for name in file.files}
    config = config_of(arrays)
    return build(config, translate(arrays, config, list(range(len(config.elements))))).to(dtype)


def evaluators(model: NequIP, structure: Structure, compiled: bool) -> dict[str, Evaluator]:
    """Every way to evaluate, after its first call."""
    found = {}
    for name, choice in WAYS.items():
        if choice is True and not compiled:
            continue
        # 'auto' would take a compiled graph that the disk holds
        evaluate = model.evaluator(structure, compile=choice)
        if choice == "auto":
            evaluate._run[False] = evaluate.eager
        evaluate(structure.positions)
        found[name] = evaluate
    return found


def measure(kind: str, dtype: torch.dtype, rounds: int, compiled: bool) -> dict[str, Any]:
    with np.load(FOLDER / f"nequip_{kind}_visible.npz") as file:
        structure = Structure(file[f"{MOLECULE}_Z"], file[f"{MOLECULE}_pos"][0])
        energy, forces = float(file[f"{MOLECULE}_energy"][0]), file[f"{MOLECULE}_force"][0]
    ways = evaluators(network(kind, dtype), structure, compiled)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for positions in rattled(structure, rounds):
        for name, evaluate in ways.items():
            start = time.process_time()
            evaluate(positions)
            seconds[name].append(time.process_time() - start)
    result: dict[str, Any] = {}
    for name, evaluate in ways.items():
        found = evaluate(structure.positions)
        assert found.forces is not None
        faster = np.asarray(seconds["op by op"]) / np.asarray(seconds[name])
        result[name] = summary(seconds[name]) | {
            "faster_than_op_by_op": round(float(np.median(faster)), 2),
            "energy_error": abs(float(found.energy[0]) - energy),
            "force_error": float(np.abs(found.forces.double().numpy() - forces).max()),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled graphs out (minutes each)")
    args = parser.parse_args()
    if not FOLDER.is_dir():
        raise SystemExit(f"no {FOLDER.name} in the folder of shared data; OPENMM_MLFF_SHARED names that folder")
    torch.set_num_threads(1)
    about = machine()
    results: dict[str, Any] = {}
    table = Table("network", "precision", "way", "ms", "faster", "|dE|", "max |dF|", title="NequIP, 21 atoms, 1 thread")
    for kind in ("small", "full"):
        for dtype in (torch.float32, torch.float64):
            precision = {torch.float32: "single", torch.float64: "double"}[dtype]
            found = measure(kind, dtype, args.rounds, not args.no_compile)
            results.setdefault(kind, {})[precision] = found
            for name, x in found.items():
                errors = f"{x['energy_error']:.1e}", f"{x['force_error']:.1e}"
                table.add_row(
                    kind, precision, name, f"{x['median_ms']:.2f}", f"{x['faster_than_op_by_op']:.1f}", *errors
                )
    Console(width=110).print(table)
    write("nequip_step", {"machine": about, "atoms": 21, "rounds": args.rounds, "results": results})


if __name__ == "__main__":
    main()
