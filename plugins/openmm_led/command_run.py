"""What ``openmm-mlff led run`` does: a model, alone or in turn with OpenMM -> files of a run that can go on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit
from rich.console import Console

from openmm_led.command_train import Molecule, read_model, read_molecule, write_solute
from openmm_led.latent_run import LatentRun
from openmm_led.trajectories import read_trajectories
from openmm_mlff.data.files import write_atomically
from openmm_mlff.forces.serialization import load_system
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.implicit_solvent import use_native_obc2
from openmm_mlff.sampling.led_reporters import BackMappedReporter, LatentReporter, RoundReporter
from openmm_mlff.sampling.led_simulation import LEDSimulation
from openmm_mlff.sampling.propagators import Propagator
from openmm_mlff.sampling.reporters import ProgressBar

CONFIGURATION, CHECKPOINT, SUMMARY = "run.json", "checkpoint", "summary.json"
#: frames between checkpoints: of latent steps alone, and with molecular dynamics
LATENT_STRIDE, STRIDE = 2000, 200
#: nm, direct-space cutoff in a periodic box that is large enough for it
CUTOFF = 0.9


@dataclass(frozen=True)
class RunPlan:
    """Everything that decides a run, as it is kept in ``run.json``; the command's options have the same names.

    Units: temperature K, friction 1/ps, timestep fs, hydrogen_mass amu, equilibration ps; lengths in latent frames.
    """

    model: str
    topology: str
    solute: str = "auto"
    frames: int = 1000
    walkers: int = 1
    every: int = 1
    format: str = "dcd"
    start: str | None = None
    macro: int = 100
    micro: int = 0
    warmup: int = 10
    equilibration: float = 2.0
    watch: bool = True
    forcefield: tuple[str, ...] | None = None
    system: str | None = None
    temperature: float | None = None
    friction: float = 1.0
    timestep: float = 4.0
    hydrogen_mass: float = 3.0
    platform: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("walkers", 1), ("every", 1), ("macro", 1), ("micro", 0), ("warmup", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"--{name}: expected at least {least}, got {getattr(self, name)}")
        if self.micro and not self.with_dynamics:
            raise ValueError("--micro: molecular dynamics need --forcefield or --system")
        if self.start is not None and self.with_dynamics:
            raise ValueError("--start: only for latent steps alone; with molecular dynamics, --topology is the start")

    @property
    def with_dynamics(self) -> bool:
        """Whether there are forces."""
        return self.forcefield is not None or self.system is not None


Runner = LEDSimulation | LatentRun


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 when all frames are made, 130 when it was stopped before."""
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    plan = _resumed(args, output) if args.resume else _new(args, output)
    model = read_model(plan.model)
    molecule = read_molecule(plan.topology, plan.solute)
    runner = make_runner(plan, model, molecule, output)
    runner.reporters += [
        LatentReporter(output / "latent.csv"),
        BackMappedReporter(output / f"trajectory.{plan.format}", plan.every, plan.seed),
        *([RoundReporter(output / "rounds.csv")] if isinstance(runner, LEDSimulation) else []),
    ]
    if args.resume:
        runner.loadCheckpoint(output / CHECKPOINT)
    else:
        _write_json(output / CONFIGURATION, dataclasses.asdict(plan))
        start = runner.reference if isinstance(runner, LatentRun) else molecule.positions[molecule.atoms]
        write_solute(output / "solute.pdb", molecule.solute, start)
    console = Console(stderr=True, soft_wrap=True)
    begin, first = time.perf_counter(), _made(runner)
    stopped = False
    try:
        carry_out(runner, plan, output / CHECKPOINT, not args.quiet)
    except KeyboardInterrupt:
        stopped = True
    except RunFailed as error:
        raise ValueError(str(error)) from error
    if stopped:
        kept = f"the last checkpoint is in {output}; --resume goes on" if (output / CHECKPOINT).exists() else "no frame"
        console.print(f"stopped: {kept}", highlight=False)
        return 130
    seconds = time.perf_counter() - begin
    summary = summarise(runner, (_made(runner) - first) * plan.walkers, seconds)
    _write_json(output / SUMMARY, summary)
    from openmm_led.report_plots import plot_run

    plot_run(output)
    ns = summary["made_ns"]
    console.print(f"{ns:.4g} ns in {seconds:.1f} s ({summary['ns_per_day']:.3g} ns/day over all walkers)",
                  highlight=False)  # fmt: skip
    console.print(f"look at {output / 'summary.png'}; trajectories go with {output / 'solute.pdb'}", highlight=False)
    return 0


def _new(args: argparse.Namespace, output: Path) -> RunPlan:
    for name in ("model", "topology"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name}: expected a file (or --resume)")
    if (output / CONFIGURATION).exists():
        raise ValueError(f"--output: {output} holds a run already; --resume goes on with it, or choose another folder")
    return RunPlan(**_given(args))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of `RunPlan`."""
    names = [field.name for field in dataclasses.fields(RunPlan)]
    found = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "forcefield" in found:
        found["forcefield"] = tuple(found["forcefield"])
    return found


def _resumed(args: argparse.Namespace, output: Path) -> RunPlan:
    for name in (CONFIGURATION, CHECKPOINT):
        if not (output / name).is_file():
            raise FileNotFoundError(f"--resume: no {name} in {output}")
    stored = json.loads((output / CONFIGURATION).read_text(encoding="utf-8"))
    stored["forcefield"] = None if stored["forcefield"] is None else tuple(stored["forcefield"])
    plan = RunPlan(**stored)
    for name, value in _given(args).items():
        defaults = name in ("solute", "seed") and value in ("auto", 0)
        if name != "frames" and value != getattr(plan, name) and not defaults:
            raise ValueError(
                f"--resume: a run goes on with its own settings except --frames; {name} was {getattr(plan, name)!r}, "
                f"got {value!r}"
            )
    return dataclasses.replace(plan, frames=args.frames or plan.frames)


# -- what runs -------------------------------------------------------------------------------------------------


def make_runner(plan: RunPlan, model: Propagator, molecule: Molecule, output: Path) -> Runner:
    """The simulation of a plan, with its start."""
    if not plan.with_dynamics:
        history = molecule.positions[molecule.atoms][None]
        if plan.start is not None:
            read = read_trajectories([plan.start], molecule.topology, molecule.atoms.tolist())
            if len(read.frames[0]) > 1 and abs(read.interval / model.interval - 1.0) > 1e-3:
                raise ValueError(f"--start: expected frames {model.interval:g} ps apart, got {read.interval:g} ps")
            history = read.frames[0]
        return LatentRun(model, molecule.solute, history, plan.walkers, plan.seed, output / "failure")
    temperature = plan.temperature or model.temperature
    if temperature is None:
        raise ValueError("--temperature: expected a temperature in K, because the model does not tell its own")
    simulation = LEDSimulation(
        make_system(plan, molecule), molecule.topology, model, temperature=temperature, friction=plan.friction,
        timestep=1e-3 * plan.timestep, macro_steps=plan.macro, micro_steps=plan.micro, warmup=plan.warmup,
        equilibration=plan.equilibration, solute=molecule.atoms.tolist(), n_walkers=plan.walkers,
        platform=plan.platform, seed=plan.seed, watch=plan.watch, failure=output / "failure",
    )  # fmt: skip
    simulation.setPositions(molecule.positions)
    simulation.minimizeEnergy()
    return simulation


def make_system(plan: RunPlan, molecule: Molecule) -> openmm.System:
    """The System of a plan: from its XML file, or from force-field files.

    Bonds to hydrogen are constrained, hydrogens are heavier, and OBC2 becomes OpenMM's native force. Raises
    `ValueError` naming the option for files that cannot be read or have no parameters for the structure.
    """
    if plan.system is not None:
        return load_system(plan.system)
    assert plan.forcefield is not None
    files = ", ".join(plan.forcefield)
    try:
        field = app.ForceField(*plan.forcefield)
    except Exception as error:
        raise ValueError(f"--forcefield: {files} cannot be loaded ({error})") from error
    options: dict[str, Any] = {"nonbondedMethod": app.NoCutoff}
    box = molecule.topology.getPeriodicBoxVectors()
    if box is not None and len(molecule.atoms) < molecule.topology.getNumAtoms():
        width = min(box[k][k].value_in_unit(unit.nanometer) for k in range(3))
        options = {"nonbondedMethod": app.PME, "nonbondedCutoff": min(CUTOFF, 0.49 * width) * unit.nanometer}
    try:
        system = field.createSystem(
            molecule.topology, constraints=app.HBonds, hydrogenMass=plan.hydrogen_mass * unit.amu, **options
        )
    except ValueError as error:
        raise ValueError(f"--forcefield: {files} has no parameters for this structure ({error})") from error
    if any(name.endswith("implicit/obc2.xml") for name in plan.forcefield):
        use_native_obc2(system)
    return system


def carry_out(runner: Runner, plan: RunPlan, checkpoint: Path, progress: bool) -> None:
    """Make all frames that are missing; checkpoints are at the same frames in a run that was stopped."""
    stride = STRIDE if isinstance(runner, LEDSimulation) else LATENT_STRIDE
    made = _made(runner)
    with ProgressBar("LED", plan.frames, runner.model.interval, made, progress) as bar:
        while made < plan.frames:
            n = min(stride - made % stride, plan.frames - made)
            if isinstance(runner, LEDSimulation):
                runner.step(n, progress=False)
            else:
                runner.step(n)
            made = _made(runner)
            runner.saveCheckpoint(checkpoint)
            bar.update(made)


def _made(runner: Runner) -> int:
    return int(runner.frames.min()) if isinstance(runner, LEDSimulation) else runner.frame


def summarise(runner: Runner, frames: int, seconds: float) -> dict[str, Any]:
    """What was made just now, how fast, and the counts of the whole run."""
    ns = 1e-3 * frames * runner.model.interval
    found: dict[str, Any] = {
        "made_ns": ns, "seconds": seconds, "ns_per_day": ns / max(seconds, 1e-9) * 86400.0,
        "frames": _made(runner), "walkers": runner.n_walkers, "interval_ps": runner.model.interval,
    }  # fmt: skip
    if isinstance(runner, LEDSimulation):
        statistics = runner.statistics
        rho = statistics.rho if np.isfinite(statistics.rho) else None
        return found | {"rho": rho, "statistics": statistics.to_dict()}
    return found | {"doubtful_share": runner.doubtful / max(runner.looks, 1)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
