"""Time per MD step of GDML models against sgdml 1.0.3 through openmm-ml, and geometries per second in batches.

Steps are LangevinMiddle steps of 0.5 fs at 300 K on OpenMM's Reference platform, one thread. The baseline is sgdml's
own ASE calculator under openmm-ml's 'ase' potential, with its energy made a float (openmm-ml needs one, and sgdml
returns an array of one): as it is shipped, and with its chunk of training points, which its calculator sets to one,
reset to all of them. In every round all three run in turn; ratios are taken round by round, and their medians reported.
Periodic models run without a box in the baseline, which knows only the lattice in its file. Gates: 15 times as fast as
shipped, 5 times as fast as with the chunk reset, for every model in the folder of shared data.

sgdml is not a dependency: install it beside the project, without its own dependencies, and name the folder:
``pip install --no-deps --target FOLDER sgdml==1.0.3 psutil`` and ``--sgdml FOLDER``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

# read when numpy and torch are imported; sgdml's products otherwise keep other cores busy, and ours waiting
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import openmm  # noqa: E402
import torch  # noqa: E402
from _common import machine, summary, write  # noqa: E402
from gdml_reference import FOLDER, make_system, reduced_box  # noqa: E402
from openmm import unit  # noqa: E402
from openmmml import MLPotential  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from openmm_gdml.model import GDMLPotential  # noqa: E402
from openmm_mlff.potentials.family import load_potential  # noqa: E402

GATES = {"as_shipped": 15.0, "chunk_reset": 5.0}
BATCHES = (1, 8, 64, 512)


def sgdml_calculator(path: Path, folder: Path | None, reset: bool) -> Any:
    """sgdml's calculator; ends the script with a plain reason where sgdml is missing."""
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        from sgdml import __version__
        from sgdml.intf.ase_calc import SGDMLCalculator
    except ImportError as error:
        raise SystemExit(f"sgdml 1.0.3 cannot be imported ({error}); see --help for how to get it") from None
    if __version__ != "1.0.3":
        raise SystemExit(f"the baseline is sgdml 1.0.3, found {__version__}")

    class WithFloatEnergy(SGDMLCalculator):  # type: ignore[misc]
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            self.results["energy"] = float(self.results["energy"][0])

    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        calculator = WithFloatEnergy(str(path))
    logging.disable(logging.NOTSET)
    if reset:
        calculator.gdml_predict._set_num_workers(0)
        calculator.gdml_predict._set_chunk_size(None)
    return calculator


class Stepper:
    """One simulation that can be timed again and again."""

    def __init__(self, system: openmm.System, positions: np.ndarray, box: np.ndarray | None) -> None:
        self.integrator = openmm.LangevinMiddleIntegrator(
            300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond
        )
        self.integrator.setRandomNumberSeed(1)
        platform = openmm.Platform.getPlatformByName("Reference")
        self.context = openmm.Context(system, self.integrator, platform)
        if box is not None:
            self.context.setPeriodicBoxVectors(*([openmm.Vec3(*row) for row in box] * unit.angstrom))
        self.context.setPositions(positions * unit.angstrom)
        self.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
        self.first_energy = self.context.getState(energy=True).getPotentialEnergy()._value
        self.integrator.step(10)

    def time(self, steps: int) -> float:
        """Seconds per step."""
        start = time.perf_counter()
        self.integrator.step(steps)
        return (time.perf_counter() - start) / steps


def steps_of(path: Path, model: GDMLPotential, sgdml: Path | None, rounds: int) -> dict[str, Any]:
    """Times per step and ratios of one model."""
    with np.load(path.with_name(path.name.replace("_model", "_ref")), allow_pickle=False) as file:
        numbers, positions = file["z"], file["R"][0]
    box, rotation = reduced_box(model.lattice_rows) if model.config.periodic else (None, np.eye(3))
    ours, _ = make_system(path, numbers, box)
    runs = {"ours": Stepper(ours, positions @ rotation, box)}
    _, topology = make_system(path, numbers, box)
    topology.setPeriodicBoxVectors(None)
    for name, reset in (("as_shipped", False), ("chunk_reset", True)):
        calculator = sgdml_calculator(path, sgdml, reset)
        system = MLPotential("ase").createSystem(topology, calculator=calculator)
        runs[name] = Stepper(system, positions, None)
    energies = [run.first_energy for run in runs.values()]
    if np.ptp(energies) > 1e-3:
        raise SystemExit(f"{path.name}: the simulations do not run the same system ({energies} kJ/mol)")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    lengths = {"ours": 400, "as_shipped": 15, "chunk_reset": 60}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run.time(lengths[name]))
    fast = np.array(seconds["ours"])
    ratios = {name: round(float(np.median(np.array(seconds[name]) / fast)), 1) for name in GATES}
    return {name: summary(values) for name, values in seconds.items()} | {"ratio": ratios}


def throughput(path: Path, model: GDMLPotential) -> dict[str, dict[str, float]]:
    """Geometries per second, torch form and fused kernel, by batch."""
    with np.load(path.with_name(path.name.replace("_model", "_ref")), allow_pickle=False) as file:
        stored = file["R"]
    lattice = model.lattice_rows if model.config.periodic else None
    rows = None if lattice is None else torch.from_numpy(lattice)
    kernel = model.fused_kernel(lattice)
    found: dict[str, dict[str, float]] = {"torch": {}, "fused": {}}
    for n in BATCHES:
        positions = stored[np.arange(n) % len(stored)]
        tensor = torch.from_numpy(positions)
        calls = {"torch": lambda t=tensor: model.energies_and_forces(t, rows), "fused": lambda p=positions: kernel(p)}
        for name, call in calls.items():
            call()
            seconds = []
            while len(seconds) < 5 or (sum(seconds) < 0.3 and len(seconds) < 200):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            found[name][str(n)] = round(n / float(np.median(seconds)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where NAME_model.npz and NAME_ref.npz lie")
    parser.add_argument("--sgdml", type=Path, default=None, help="folder that sgdml 1.0.3 was installed into")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(arguments.folder.glob("*_model.npz"))
    if not paths:
        raise SystemExit(f"no *_model.npz in {arguments.folder}")
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "gates": GATES, "models": {}}
    table = Table(
        "model", "ours [us]", "sgdml reset [us]", "shipped [us]", "x reset", "x shipped", "torch/s at 1..512", "fused/s"
    )
    for path in paths:
        model = load_potential(path)
        assert isinstance(model, GDMLPotential)
        row = steps_of(path, model, arguments.sgdml, arguments.rounds)
        row["geometries_per_second"] = throughput(path, model)
        name = path.name.removesuffix("_model.npz")
        result["models"][name] = row
        times = [f"{1e3 * row[key]['median_ms']:.0f}" for key in ("ours", "chunk_reset", "as_shipped")]
        ratios = [f"{row['ratio'][key]:.1f}" for key in ("chunk_reset", "as_shipped")]
        rates = [" ".join(str(v) for v in row["geometries_per_second"][key].values()) for key in ("torch", "fused")]
        table.add_row(name, *times, *ratios, *rates)
    result["machine"]["load_after"] = machine()["load_before"]
    Console(width=160).print(table)
    write("gdml_step", result)
    for name, row in result["models"].items():
        for key, gate in GATES.items():
            if row["ratio"][key] < gate:
                raise SystemExit(f"{name}: {row['ratio'][key]} times as fast ({key}), expected at least {gate}")


if __name__ == "__main__":
    main()
