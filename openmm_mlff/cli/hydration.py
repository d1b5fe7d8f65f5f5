"""``openmm-mlff hydration``: molecules and two potentials -> hydration free energies with error bars."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_mlff.sampling.hydration import HydrationSettings, Outcome

DESCRIPTION = """\
Free energy of a molecule in implicit water minus that in vacuum, between two potentials, from Langevin dynamics of both
(Bennett acceptance ratio; with --windows, MBAR over states between them). Writes results.json, results.csv, pictures of
the convergence and, where measured values are known, of the parity into the output folder. The same command goes on
where a run stopped, and with a greater --length makes it longer; samples that are there are not made again."""

EXAMPLES = """examples:
  openmm-mlff hydration CCO --model pair.safetensors --output ethanol
  openmm-mlff hydration molecules.csv --model pair.safetensors --output campaign --processes 4
  openmm-mlff hydration phenol.sdf --vacuum a.safetensors --water b.safetensors --windows 5 --output phenol

A table has the columns name, smiles and, if known, experiment (kcal/mol).
"""

#: columns of results.csv.
COLUMNS = (
    *("name", "smiles", "status", "free_energy_kcal_mol", "error_kcal_mol", "free_energy_kJ_mol", "error_kJ_mol"),
    *("experiment_kcal_mol", "overlap", "effective_vacuum", "effective_water", "message"),
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``hydration``."""
    parser = subparsers.add_parser(
        "hydration",
        help="hydration free energies between a potential in vacuum and one in water",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help="a SMILES, an SDF, MOL, PDB or mmCIF file, or a CSV table of molecules")
    parser.add_argument("--output", "-o", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--name", help="of a single molecule; names its files")
    models = parser.add_argument_group("potentials")
    models.add_argument("--model", metavar="FILE", help="model file with both potentials (ReSolv)")
    models.add_argument("--vacuum", metavar="FILE", help="model file, or name of a model, in vacuum")
    models.add_argument("--water", metavar="FILE", help="the same in water")
    models.add_argument("--precision", choices=("single", "double"), help="of the dynamics; its own if not given")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--length", type=float, default=200.0, metavar="PS", help="recorded per state (200)")
    sampling.add_argument("--equilibration", type=float, default=20.0, metavar="PS", help="before it (20)")
    sampling.add_argument("--interval", type=float, default=1.0, metavar="PS", help="between frames (1)")
    sampling.add_argument("--temperature", type=float, default=298.15, metavar="K", help="(298.15)")
    sampling.add_argument("--timestep", type=float, default=1.0, metavar="FS", help="(1)")
    sampling.add_argument("--friction", type=float, default=1.0, metavar="1/PS", help="(1)")
    sampling.add_argument("--conformers", type=int, default=1, metavar="N", help="start structures, a run each (1)")
    sampling.add_argument("--windows", type=int, default=2, metavar="N", help="states, both ends included (2)")
    sampling.add_argument("--checkpoint", type=float, default=50.0, metavar="PS", help="kept so often (50)")
    sampling.add_argument("--seed", type=int, default=1, metavar="N", help="of conformers and dynamics (1)")
    sampling.add_argument("--least-overlap", type=float, default=0.03, metavar="X", help="between states (0.03)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--processes", type=int, default=1, metavar="N", help="on this machine (1)")
    machine.add_argument("--scheduler", metavar="URL", help="of a Dask cluster, such as tcp://host:8786")
    machine.add_argument("--batch", type=int, default=64, metavar="N", help="runs in one simulation at most (64)")
    machine.add_argument("--no-pictures", action="store_true", help="tables only")
    machine.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(func=run)


def settings_from(args: argparse.Namespace) -> HydrationSettings:
    """Raises `ValueError` naming the option."""
    from openmm_mlff.sampling.hydration import HydrationSettings
    from openmm_mlff.sampling.molecule_runs import LangevinSettings

    sampling = LangevinSettings(
        temperature=args.temperature,
        timestep=args.timestep,
        friction=args.friction,
        equilibration=args.equilibration,
        length=args.length,
        interval=args.interval,
        seed=args.seed,
        minimization_steps=200,
        batch=args.batch,
    )
    return HydrationSettings(sampling, args.windows, args.precision, args.least_overlap, args.checkpoint)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a molecule has no result."""
    from openmm_mlff.data.solutes import read_solutes
    from openmm_mlff.sampling.hydration import hydrate
    from openmm_mlff.sampling.hydration_runs import PairFiles

    settings = settings_from(args)
    given = {name: getattr(args, name) for name in ("model", "vacuum", "water") if getattr(args, name) is not None}
    pair = PairFiles.read(**{name: _model_path(name, value) for name, value in given.items()})
    solutes = read_solutes(args.input, args.conformers, args.seed, args.name)
    if len(solutes) == 1 and solutes[0].problem:
        raise ValueError(solutes[0].problem)
    progress = not args.no_progress
    output = Path(args.output)
    outcomes = hydrate(
        solutes, pair, settings, output, processes=args.processes, scheduler=args.scheduler, progress=progress
    )
    if len(outcomes) == 1 and outcomes[0].status == "refused":
        raise ValueError(outcomes[0].message)
    write_results(outcomes, settings, output, args, pair.describe())
    if len(outcomes) == 1 and outcomes[0].result is None:
        raise ValueError(f"{outcomes[0].status}: {outcomes[0].message}")
    show(outcomes)
    bad = [o for o in outcomes if o.result is None]
    if bad:
        print(f"openmm-mlff: {len(bad)} of {len(outcomes)} molecules have no result", file=sys.stderr)
    print(f"results are in {output}")
    return 1 if bad else 0


def _model_path(option: str, value: str) -> Path:
    """The file of one of the models; errors name the option."""
    from openmm_mlff.training.evaluation import find_model

    try:
        return find_model(value)
    except (ValueError, FileNotFoundError) as error:
        text = str(error).removeprefix("model: ").removeprefix("name: ")
        raise ValueError(f"{option}: {text}") from error


def write_results(
    outcomes: Sequence[Outcome],
    settings: HydrationSettings,
    output: Path,
    args: argparse.Namespace,
    models: dict[str, Any],
) -> None:
    """``results.json``, ``results.csv`` and the pictures."""
    import dataclasses

    from openmm_mlff import __version__
    from openmm_mlff.data.files import write_atomically

    rows = [_row(outcome) for outcome in outcomes]
    report = {
        "command": "hydration",
        "version": __version__,
        "input": Path(args.input).name if Path(args.input).is_file() else args.input,
        "models": models,
        "settings": dataclasses.asdict(settings),
        "conformers": {"number": args.conformers, "seed": args.seed},
        "molecules": [
            {
                **row,
                **(outcome.result.summary() if outcome.result else {}),
                "samples": {
                    state: {key: header[key] for key in ("planned", "seeds", "temperatures", "failures")}
                    for state, header in outcome.samples.items()
                },
            }
            for row, outcome in zip(rows, outcomes, strict=True)
        ],
    }
    write_atomically(output / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomically(output / "results.csv", text.getvalue().encode())
    if not args.no_pictures:
        _draw(outcomes, settings, output)


def _row(outcome: Outcome) -> dict[str, Any]:
    """The line of one molecule in the table."""
    row: dict[str, Any] = {
        "name": outcome.solute.label,
        "smiles": outcome.solute.smiles,
        "status": outcome.status,
        "message": outcome.message,
        "experiment_kcal_mol": outcome.solute.experiment,
    }
    if outcome.result is not None:
        summary = outcome.result.summary()
        row |= {key: summary[key] for key in COLUMNS if key in summary}
    return row


def _draw(outcomes: Sequence[Outcome], settings: HydrationSettings, output: Path) -> None:
    import numpy as np

    from openmm_mlff.analysis.hydration import plot_hydration, plot_parity

    found = [(o, o.result) for o in outcomes if o.result is not None]
    try:
        for outcome, result in found:
            solute = outcome.solute
            path = output / "convergence" / f"{solute.name}.png"
            title = solute.label + (f" ({outcome.status})" if outcome.status != "ok" else "")
            # more than was asked for now, if the folder holds a longer run
            frames = max(header["planned"] for header in outcome.samples.values())
            plot_hydration(result, path, frames * settings.sampling.interval, title, solute.experiment)
        rows = [_row(o) for o, _ in found if o.solute.experiment is not None]
        if len(rows) > 1:
            names = ("free_energy_kcal_mol", "error_kcal_mol", "experiment_kcal_mol")
            values, errors, experiment = (np.array([row[name] for row in rows]) for name in names)
            plot_parity(values, errors, experiment, output / "parity.png")
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the table."""
    width = max(8, *(len(o.solute.label) for o in outcomes))
    print(f"{'molecule':{width}}  kcal/mol            kJ/mol            experiment  overlap  N_eff/N (vac, wat)")
    for outcome in outcomes:
        name = f"{outcome.solute.label:{width}}"
        if outcome.result is None:
            print(f"{name}  {outcome.status}: {outcome.message}")
            continue
        s = outcome.result.summary()
        measured = outcome.solute.experiment
        print(
            f"{name}  {s['free_energy_kcal_mol']:8.3f} ± {s['error_kcal_mol']:<7.3f}"
            f"  {s['free_energy_kJ_mol']:8.2f} ± {s['error_kJ_mol']:<6.2f}"
            f"  {'' if measured is None else f'{measured:.2f}':>10}  {s['overlap']:7.3f}"
            f"  {s['effective_vacuum']:.2f} {s['effective_water']:.2f}"
            + (f"  {outcome.status}: {outcome.message}" if outcome.message else "")
        )
