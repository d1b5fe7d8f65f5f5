"""``openmm-mlff simulate``: a structure file -> a trajectory, with any model, in vacuum or in water."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_mlff.sampling.settings import RunSettings
    from openmm_mlff.sampling.simulation import RunResult, Simulation

EXAMPLES = """examples:
  openmm-mlff simulate molecule.pdb --model-path model.safetensors --time 100 --output run
  openmm-mlff simulate peptide.pdb --solvate 1.0 --ensemble npt --time 50 --output run
  openmm-mlff simulate peptide.pdb --model-path ensemble.safetensors --on-uncertain stop --uncertainty-limit own -o run
  openmm-mlff simulate --resume --output run --time 200
"""

#: exit statuses of a run that a signal ended, as shells give them.
SIGNAL_STATUS = {"SIGINT": 130, "SIGTERM": 143}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``simulate``."""
    parser = subparsers.add_parser(
        "simulate",
        help="run molecular dynamics of a PDB file with a machine-learned potential",
        description="Run molecular dynamics of a PDB or mmCIF file (with all hydrogens). Writes trajectory.dcd, "
        "log.csv, checkpoint.zip, run.json, final.pdb and summary.png into the output folder, and uncertainty.csv with "
        "an ensemble. Ctrl-C ends cleanly.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", nargs="?", help="PDB or mmCIF file (not with --resume)")
    parser.add_argument("--output", "-o", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR, or make it longer by --time")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    _add_model(parser.add_argument_group("model"))
    _add_system(parser.add_argument_group("system"))
    _add_dynamics(parser.add_argument_group("dynamics"))
    _add_uncertainty(parser.add_argument_group("uncertainty (of ensembles)"))
    _add_machine(parser.add_argument_group("machine"))
    parser.set_defaults(func=run)


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help="name of a model (see openmm-mlff models), or of a family with "
                       "--model-path; default: spookynet-ala2-gfn2, or the family of the file")  # fmt: skip
    group.add_argument("--model-path", metavar="FILE", help="model file: ours, or one published by others")
    group.add_argument("--charge", type=int, metavar="Q", help="total charge of the machine-learned region (0)")
    group.add_argument("--multiplicity", type=int, metavar="M", help="its spin multiplicity 2S+1 (1)")
    group.add_argument("--ml-region", metavar="SELECTION", help="auto (everything but water and ions), all, none, or "
                       "an mdtraj selection such as 'resname ALA' (auto)")  # fmt: skip
    group.add_argument("--embedding", choices=("mechanical", "electrostatic"), help="of that region in the rest: with "
                       "the force field's charges or the model's (mechanical)")  # fmt: skip
    group.add_argument("--long-range-cutoff", type=float, metavar="NM", help="for periodic systems all learned")
    group.add_argument("--long-range-method", choices=("shifted", "ewald", "pme"), help="of their charges: to zero at "
                       "the cutoff, or with all images where the model can (shifted)")  # fmt: skip
    group.add_argument("--phase", metavar="NAME", help="which energy of a model that offers several, such as water or "
                       "vacuum of resolv (the model's own)")  # fmt: skip


def _add_system(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--solvate", dest="padding", type=float, metavar="NM", help="add TIP3P water with this padding")
    group.add_argument("--forcefield", nargs="+", metavar="XML", help="OpenMM files for what is not learned "
                       "(amber14-all.xml amber14/tip3p.xml)")  # fmt: skip
    group.add_argument("--no-box", dest="use_box", action="store_const", const=False, help="ignore the box of the file")


def _add_dynamics(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ensemble", choices=("nve", "nvt", "npt"), help="(nvt)")
    group.add_argument("--temperature", type=float, metavar="K", help="(300)")
    group.add_argument("--pressure", type=float, metavar="BAR", help="(1)")
    group.add_argument("--friction", type=float, metavar="1/PS", help="of the Langevin thermostat (1)")
    group.add_argument("--timestep", type=float, metavar="FS", help="(1; 0.5 conserves energy better)")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--time", type=float, metavar="PS", help="length of the recorded run (10)")
    length.add_argument("--steps", type=int, metavar="N", help="the same in steps")
    group.add_argument("--equilibrate", type=float, metavar="PS", help="with a thermostat before it, not recorded (0)")
    group.add_argument("--minimize", dest="minimization_steps", type=int, metavar="N", help="most iterations (200)")
    group.add_argument("--report", dest="report_interval", type=int, metavar="STEPS", help="between frames (100)")
    group.add_argument("--checkpoint", dest="checkpoint_interval", type=int, metavar="STEPS", help="(1000)")
    group.add_argument("--torsion", action="append", metavar="NAME=I,J,K,L", help="a column for log.csv; atoms from 0")
    group.add_argument("--seed", type=int, metavar="N", help="(1)")
    group.add_argument("--ignore-bonds", dest="check_bonds", action="store_const", const=False, help="go on when a "
                       "bond breaks")  # fmt: skip
    group.add_argument("--max-force", type=float, metavar="F", help="kJ/mol/nm; more ends the run (1e5)")


def _add_uncertainty(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--on-uncertain", choices=("warn", "save", "stop", "fall_back"), help="what an ensemble does "
                       "when it is unsure of a force: warn; save frames for labelling, in DIR/uncertain; stop; or go "
                       "on with another model, which changes the force field within the run")  # fmt: skip
    group.add_argument("--uncertainty-limit", type=_limit, metavar="EV/ANGSTROM", help="of the force on any atom (that "
                       "of the model file); own: found by 1 ps of this system at its temperature, at most that of the "
                       "file")  # fmt: skip
    group.add_argument("--uncertain-interval", type=int, metavar="STEPS", help="between saved frames, at least (100)")
    group.add_argument("--fall-back", metavar="MODEL", help="model file, or name of a model, to go on with")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--platform", metavar="NAME", help="OpenMM platform; chosen by size if not given")
    group.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU platform; more than one is not reproducible"
    )
    group.add_argument("--precision", choices=("single", "double"), help="of the model; its own if not given")
    group.add_argument("--device", metavar="NAME", help="of the model, such as cpu or cuda")
    group.add_argument("--compile", choices=("auto", "yes", "no"), help="auto compiles for long runs (auto)")


#: options that are settings under the same name.
_DIRECT = (
    *("charge", "multiplicity", "ml_region", "embedding", "long_range_cutoff", "long_range_method", "phase"),
    *("padding", "use_box"),
    *("ensemble", "temperature", "pressure", "friction", "timestep", "minimization_steps", "report_interval"),
    *("checkpoint_interval", "seed"),
    *("on_uncertain", "uncertainty_limit", "uncertain_interval", "fall_back"),
    *("check_bonds", "max_force", "platform", "threads", "precision", "device", "compile"),
)


def settings_from(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line, without defaults; raises `ValueError` for impossible ones."""
    given = {name: getattr(args, name) for name in _DIRECT if getattr(args, name) is not None}
    timestep = given.get("timestep", 1.0)
    if args.steps is not None:
        given["steps"] = args.steps
    elif args.time is not None:
        given["steps"] = steps_of("time", args.time, timestep)
    if args.equilibrate is not None:
        given["equilibration_steps"] = steps_of("equilibrate", args.equilibrate, timestep)
    if args.forcefield is not None:
        given["forcefield"] = tuple(args.forcefield)
    if args.torsion:
        given["torsions"] = dict(_torsion(text) for text in args.torsion)
    return given


def steps_of(name: str, ps: float, timestep: float) -> int:
    """Whole steps of `timestep` fs in a time in ps; raises `ValueError` if it is negative or not a number."""
    if not (0 <= ps < 1e12) or not timestep > 0:
        raise ValueError(f"{name}: expected a time in ps and a positive time step, got {ps} ps and {timestep} fs")
    return round(ps * 1000.0 / timestep)


def _limit(text: str) -> float | str:
    # what is neither is refused by the settings
    try:
        return float(text)
    except ValueError:
        return text


def _torsion(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, atoms = text.partition("=")
    try:
        indices = tuple(int(i) for i in atoms.split(","))
    except ValueError:
        indices = ()
    if not name or "," in name or len(indices) != 4:
        raise ValueError(f"torsion: expected NAME=I,J,K,L with four atom indices, got {text!r}")
    return name, indices


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Model name and path: a file of ours says its family itself, a published one needs it from ``--model``."""
    if args.model_path is None:
        if args.model is not None and Path(args.model).suffix and Path(args.model).is_file():
            raise ValueError(f"model: expected a name, got a file; say --model-path {args.model}")
        return {} if args.model is None else {"model": args.model}
    from openmm_mlff.data import model_file
    from openmm_mlff.potentials.family import families

    path = Path(args.model_path)
    if args.model is not None:
        return {"model": args.model, "model_path": str(path)}
    if not path.is_file():
        raise FileNotFoundError(f"model-path: no file at {path}")
    if model_file.is_model_file(path):
        return {"model": model_file.load_card(path)["family"], "model_path": str(path)}
    readers = [f.name for f in families() if f.recognises(path)]
    if len(readers) != 1:
        raise ValueError(
            f"model: expected the family that reads {path.name} (say --model FAMILY); candidates: {readers}"
        )
    return {"model": readers[0], "model_path": str(path)}


def run(args: argparse.Namespace) -> int:
    """Start or resume a run; returns the exit status."""
    from openmm_mlff.sampling.settings import RunSettings

    progress = not args.quiet
    show_notices(progress)
    if args.resume:
        simulation = _resumed(args, progress)
    else:
        if args.input is None:
            raise ValueError("input: expected a PDB or mmCIF file (or --resume)")
        settings = RunSettings(input=args.input, **model_settings(args), **settings_from(args))
        simulation = _started(settings, args.output, progress)
        print(describe(simulation))
    return carry_out(simulation)[0]


def _started(settings: RunSettings, output: str, progress: bool) -> Simulation:
    from openmm_mlff.sampling.simulation import Simulation

    try:
        return Simulation.start(settings, output, progress)
    except ValueError as error:
        # the message names the keyword that Python users know
        if str(error).startswith("longRangeCutoff"):
            raise ValueError(f"{error} (here: --long-range-cutoff 1.0, or --no-box)") from error
        if str(error).startswith("longRangeMethod"):
            raise ValueError(f"{error} (here: --long-range-method)") from error
        raise


def _resumed(args: argparse.Namespace, progress: bool) -> Simulation:
    import json

    from openmm_mlff.sampling.simulation import Simulation

    given = settings_from(args)
    steps = given.pop("steps", None)
    other = [*given, *model_settings(args)] + (["input"] if args.input is not None else [])
    if other:
        raise ValueError(f"resume: a run goes on with its own settings except --time and --steps, got {other[0]!r}")
    if args.time is not None:
        path = Path(args.output) / "run.json"
        if path.is_file():
            steps = steps_of("time", args.time, json.loads(path.read_text(encoding="utf-8"))["settings"]["timestep"])
    return Simulation.resume(args.output, steps, progress)


def show_notices(progress: bool) -> None:
    """Print what the package logs (that a model is being compiled, say) on standard error; once per process."""
    import logging

    logger = logging.getLogger("openmm_mlff")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if progress else logging.WARNING)


def describe(simulation: Simulation) -> str:
    """What runs, where, in two or three lines."""
    s, facts = simulation.settings, simulation.facts
    learned, everything = len(facts["ml_atoms"]), facts["particles"]
    electrons = f"charge {s.charge:+d}, 2S+1 = {s.multiplicity}"
    what = f"{learned} of {everything} particles by {s.model} ({facts['ml_formula']}, {electrons})"
    if not learned:
        what = f"{everything} particles by the force field alone"
    where = f"{facts['platform']} platform"
    if "Threads" in facts["platform_properties"]:
        where += f", {facts['platform_properties']['Threads']} thread(s)"
    length = f"{s.steps} steps of {s.timestep:g} fs ({s.steps * s.timestep / 1000:g} ps) {s.ensemble.upper()}"
    return f"{what}; {facts['waters']} waters\n{length} at {s.temperature:g} K on the {where} -> {simulation.output}"


def carry_out(
    simulation: Simulation, summary: bool = True, seconds: float | None = None
) -> tuple[int, RunResult | None]:
    """Run, draw the summary, say how it went; returns the exit status and the result."""
    from openmm_mlff.sampling.guards import RunFailed

    try:
        result = simulation.run(seconds)
    except RunFailed as error:
        print(f"openmm-mlff: error: {error}", file=sys.stderr)
        return 1, None
    if result.finished and summary:
        summarise(simulation)
    return (0 if result.finished else SIGNAL_STATUS.get(result.signal, 1)), result


def summarise(simulation: Simulation, title: str | None = None) -> None:
    """Write ``summary.png`` and print averages with error bars."""
    from openmm_mlff.analysis.observables import block_average, energy_drift, mean_with_error, read_table
    from openmm_mlff.units import KJ_PER_MOL_PER_EV

    s = simulation.settings
    columns = read_table(simulation.output / "log.csv")
    rows = len(columns["step"])
    if rows >= 2:
        print(f"temperature {mean_with_error(columns['temperature_K'])} K over {rows} frames")
    if s.ensemble == "nve" and rows >= 3:
        total = columns["total_kJ_mol"] / KJ_PER_MOL_PER_EV
        drift = energy_drift(columns["time_ps"], total, simulation.facts["particles"])
        print(f"energy drift {1000 * drift.value:.4f} +- {1000 * drift.error:.4f} meV/atom/ps")
    elif rows >= 16:
        print(f"potential energy {block_average(columns['potential_kJ_mol'])} kJ/mol")
    try:
        from openmm_mlff.analysis.trajectory_plots import save_summary

        if rows >= 2:
            who = s.model if simulation.facts["ml_atoms"] else "force field"
            heading = title or f"{who}, {s.ensemble.upper()}, {s.steps * s.timestep / 1000:g} ps"
            save_summary(
                columns,
                simulation.output / "summary.png",
                ensemble=s.ensemble,
                temperature=s.temperature,
                title=heading,
            )
    except ImportError as error:
        print(f"no summary.png: {error}")
    print(f"results are in {simulation.output}")
