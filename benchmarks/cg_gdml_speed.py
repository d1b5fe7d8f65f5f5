"""What coarse-graining buys: all-atom dynamics of capped alanine beside its six-bead GDML model, per CPU hour.

Timed here, in CPU time of one thread (4 fs, hydrogens of 3 amu): the force field of the training data, ff99SB-ILDN with
OBC2 (native force, Reference platform), the same with explicit TIP3P water (PME, CPU platform), and 100 bead runs side
by side. How long a run takes for one independent sample of psi comes from ``cg_gdml.json`` for the beads, and from the
unbiased trajectories of `cg_gdml_data.py` for all atoms in implicit solvent; explicit water has no such figure here,
only ns/day.

phi needs care: these trajectories may never come to phi > 0, where the reweighted biased ones spend a few per cent of
their time. Their autocorrelation then knows the fast motion in one basin only, and says nothing of the exchange. In
that case phi gets a bound instead: no entry in a time T means fewer than 3 expected ones (95 %), so that the exchange
of two states with the share p of the second decorrelates in no less than 2 p (1 - p) T / 3.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from _cg_ala2 import TEMPERATURE, bead_system, load, rounded, starts
from _common import HERE, machine, write
from openmm import app, unit
from rich.console import Console
from rich.table import Table

from openmm_mlff.analysis.landscapes import decorrelation_time
from openmm_mlff.sampling.biased_md import read_frames
from openmm_mlff.sampling.biased_recipes import read_biased_recipe
from openmm_mlff.sampling.replicas import Replicas

FOLDER = HERE.parent / ".work" / "cg_ala2"
RECIPE = HERE.parent / "examples" / "recipes" / "cg_ala2.toml"
TIMESTEP = 4.0
#: bead runs side by side
COPIES = 100
#: nm of water between the molecule and the faces of the box
PADDING = 1.0
#: degrees of phi, well inside the basin of left-handed conformations
POSITIVE = (20.0, 120.0)


class Timed:
    """A context that has been equilibrated, and the CPU seconds of its blocks of steps, summed over copies."""

    def __init__(self, system: openmm.System, positions: Any, platform: str, friction: float, copies: int = 1) -> None:
        integrator = openmm.LangevinMiddleIntegrator(
            TEMPERATURE, friction / unit.picosecond, TIMESTEP * unit.femtosecond
        )
        integrator.setRandomNumberSeed(1)
        properties = {"Threads": "1"} if platform == "CPU" else {}
        self.context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform), properties)
        self.context.setPositions(positions)
        if copies == 1:
            openmm.LocalEnergyMinimizer.minimize(self.context, maxIterations=200)
        self.copies = copies
        self.context.setVelocitiesToTemperature(TEMPERATURE, 1)
        self.ns_per_day: list[float] = []
        integrator.step(500)
        self.steps = 500

    def block(self, seconds: float) -> None:
        """Run for about that CPU time."""
        integrator = self.context.getIntegrator()
        start, done = time.process_time(), 0
        while time.process_time() - start < seconds:
            integrator.step(self.steps)
            done += self.steps
        # the state is asked for, so that nothing is left in a queue
        self.context.getState(energy=True)
        used = time.process_time() - start
        self.ns_per_day.append(self.copies * done * TIMESTEP * 1e-6 / used * 86400)


def explicit() -> tuple[openmm.System, Any, int]:
    """Capped alanine in TIP3P: System, positions and number of atoms."""
    pdb = app.PDBFile(str(HERE.parent / "examples" / "recipes" / "capped_alanine.pdb"))
    field = app.ForceField("amber99sbildn.xml", "tip3p.xml")
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.addSolvent(field, model="tip3p", padding=PADDING * unit.nanometer)
    system = field.createSystem(
        modeller.topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=0.9 * unit.nanometer,
        constraints=app.HBonds,
        hydrogenMass=3 * unit.amu,
    )
    return system, modeller.positions, system.getNumParticles()


def decorrelation(folder: Path) -> dict[str, Any]:
    """Times of psi, and of phi if it was sampled, from the unbiased trajectories, and without each of them in turn."""
    frames = [read_frames(path) for path in sorted((folder / "frames").glob("free-*.safetensors"))]
    if not frames:
        raise SystemExit("no unbiased trajectories; benchmarks/cg_gdml_data.py makes them")
    interval = float(frames[0].info["interval_ps"])
    total = sum(len(f) for f in frames) * interval
    found: dict[str, Any] = {"ns": total * 1e-3, "trajectories": len(frames)}
    for k, name in enumerate(("phi", "psi")):
        series = [f.torsions[:, k].astype(float) for f in frames]
        parts = [decorrelation_time(series[:i] + series[i + 1 :], interval) for i in range(len(series))]
        found[name] = {"ps": decorrelation_time(series, interval), "without_one": parts}
    inside = [(f.torsions[:, 0] > POSITIVE[0]) & (f.torsions[:, 0] < POSITIVE[1]) for f in frames]
    entries = sum(int((np.diff(x.astype(int)) == 1).sum() + x[0]) for x in inside)
    share = _results()["floor"]["phi_positive"]["value"]
    found["phi"] |= {"entries_to_phi_positive": entries, "share_of_phi_positive": share}
    if entries == 0:
        found["phi"]["one_basin_only_ps"] = found["phi"].pop("ps")
        found["phi"]["at_least_ps"] = 2 * share * (1 - share) * total / 3
    return found


def _results() -> dict[str, Any]:
    path = HERE / "cg_gdml.json"
    if not path.exists():
        raise SystemExit("no cg_gdml.json; benchmarks/cg_gdml.py makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def bead_runs(folder: Path, friction: float) -> dict[str, Timed]:
    """`COPIES` bead runs side by side with the first model of each method."""
    data = load(folder, train=1, valid=1, test=1)
    found = {}
    for method in _results()["methods"]:
        model = folder / "final" / f"{method}_0" / "model.safetensors"
        replicas = Replicas(bead_system(data, model), data.topology, COPIES)
        positions = starts(data, COPIES, 1).reshape(-1, 3)
        found[method] = Timed(replicas.system, positions, "Reference", friction, COPIES)
    return found


def beads(runs: dict[str, Timed]) -> dict[str, Any]:
    """Speed as timed here; decorrelation seed by seed from cg_gdml.json, and both together per CPU hour."""
    found: dict[str, Any] = {}
    for method, values in _results()["methods"].items():
        speed = float(np.median(runs[method].ns_per_day))
        times = [seed["decorrelation_ps"] for seed in values["seeds"]]
        found[method] = {
            "copies": COPIES,
            "ns_per_day": [speed],
            "blocks": runs[method].ns_per_day,
            "decorrelation_ps": times,
            "decorrelations_per_cpu_hour": [{name: speed / 24 * 1e3 / t for name, t in seed.items()} for seed in times],
        }
    return found


def ratios(models: dict[str, Any], ns_per_day: float, per_hour: dict[str, float]) -> dict[str, Any]:
    """Medians over seeds of the bead runs over the all-atom run in implicit solvent."""
    found: dict[str, Any] = {}
    for method, rows in models.items():
        found[method] = {"ns_per_day": float(np.median(rows["ns_per_day"])) / ns_per_day}
        for name, reference in per_hour.items():
            counts = [row[name] for row in rows["decorrelations_per_cpu_hour"]]
            found[method][f"{name}_decorrelations"] = float(np.median(counts)) / reference
    return found


def show(result: dict[str, Any]) -> None:
    table = Table("", "ns/day", "phi: ps", "psi: ps", "phi per CPU hour", "psi per CPU hour")
    implicit, times = result["all_atom"]["implicit"], result["decorrelation"]
    per_hour = implicit["ns_per_day"] / 24 * 1e3
    bound = times["phi"].get("at_least_ps")
    phi = times["phi"].get("ps", bound)
    row = [f"{phi:.0f}", f"{times['psi']['ps']:.0f}", f"{per_hour / phi:.0f}", f"{per_hour / times['psi']['ps']:.0f}"]
    if bound is not None:
        row[0], row[2] = f"> {row[0]}", f"< {row[2]}"
    table.add_row("all atoms, OBC2", f"{implicit['ns_per_day']:.0f}", *row)
    for method, values in result["beads"].items():
        middle = [
            float(np.median([seed[name] for seed in values[kind]]))
            for kind in ("decorrelation_ps", "decorrelations_per_cpu_hour")
            for name in ("phi", "psi")
        ]
        table.add_row(f"six beads, {method}", f"{np.median(values['ns_per_day']):.0f}", *(f"{v:.0f}" for v in middle))
    table.add_row("all atoms, TIP3P", f"{result['all_atom']['explicit']['ns_per_day']:.1f}", "", "", "", "")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where cg_gdml_data.py wrote")
    parser.add_argument("--seconds", type=float, default=12.0, help="CPU time of a block")
    parser.add_argument("--blocks", type=int, default=5)
    arguments = parser.parse_args()
    about = machine()
    recipe = read_biased_recipe(RECIPE)
    system, positions, n_atoms = explicit()
    friction = recipe.dynamics.friction
    runs = {
        "implicit": Timed(recipe.system, recipe.positions * 0.1, "Reference", friction),
        "explicit": Timed(system, positions, "CPU", friction),
        **bead_runs(arguments.folder, friction),
    }
    for _ in range(arguments.blocks):
        for run in runs.values():
            run.block(arguments.seconds)
    times = decorrelation(arguments.folder)
    speeds = {
        name: {"ns_per_day": float(np.median(runs[name].ns_per_day)), "blocks": runs[name].ns_per_day}
        for name in ("implicit", "explicit")
    }
    ns_per_hour = speeds["implicit"]["ns_per_day"] / 24
    per_hour = {name: ns_per_hour * 1e3 / times[name]["ps"] for name in ("phi", "psi") if "ps" in times[name]}
    result: dict[str, Any] = {
        "what": __doc__,
        "machine": about,
        "all_atom": {
            "implicit": {
                "atoms": recipe.system.getNumParticles(),
                "platform": "Reference",
                **speeds["implicit"],
                "decorrelations_per_cpu_hour": per_hour,
            },
            "explicit": {"atoms": n_atoms, "platform": "CPU", **speeds["explicit"]},
        },
        "decorrelation": times,
        "beads": beads(runs),
    }
    result["beads_over_all_atom"] = ratios(result["beads"], speeds["implicit"]["ns_per_day"], per_hour)
    result["explicit_over_implicit_ns_per_day"] = speeds["explicit"]["ns_per_day"] / speeds["implicit"]["ns_per_day"]
    write("cg_gdml_speed", rounded(result))
    show(result)


if __name__ == "__main__":
    main()
