"""``openmm-mlff calibrate``: an ensemble and labelled structures -> the factors of its uncertainties."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from openmm_mlff.cli._training_options import add_device

DESCRIPTION = """\
Compare the spread of an ensemble with its errors. Factors of the spreads of energies and forces, and a limit beyond
which a simulation has left the domain, come from the validation split; calibration curves, rank correlations by class
and the share of bad frames that is noticed come from the test split. Writes <name>.json and pictures into the output
folder and, with --save, the ensemble with its factors."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "calibrate", help="an ensemble's spreads against its errors", description=DESCRIPTION
    )
    parser.add_argument("--model", required=True, help="model file of an ensemble, or the name of a shipped one")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="datasets with splits")
    parser.add_argument("--fit-split", default="valid", help="split that the factors come from (default: valid)")
    parser.add_argument("--test-split", default="test", help="split that judges them (default: test)")
    parser.add_argument("--by", default="all", metavar="KEY", help="key of the structures' info, such as class")
    parser.add_argument(
        "--margin",
        type=float,
        default=2.0,
        help="the limit of a simulation is this times the largest uncertainty in the split of the factors (default: 2)",
    )
    parser.add_argument("--output", default=".", metavar="FOLDER", help="where results are written (default: here)")
    parser.add_argument("--name", default="calibration", help="first part of the results' names")
    parser.add_argument("--save", metavar="FILE", help="write the ensemble with its factors")
    add_device(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import json
    from pathlib import Path

    from openmm_mlff.data.files import sha256_of, write_atomically
    from openmm_mlff.potentials.ensemble import Ensemble
    from openmm_mlff.potentials.family import load_potential
    from openmm_mlff.training.calibrating import calibrate, save_calibrated
    from openmm_mlff.training.evaluation import find_model
    from openmm_mlff.training.recipe import load_labelled
    from openmm_mlff.training.run import choose_device

    if not args.margin > 0:
        raise ValueError(f"--margin: expected a positive number, got {args.margin}")
    path = find_model(args.model)
    model = load_potential(path).to(device=choose_device(args.device))
    if not isinstance(model, Ensemble):
        raise ValueError(f"--model: expected an ensemble, got a {model.family} model in {path.name}")
    valid, sources = load_labelled(args.data, args.fit_split)
    test, _ = load_labelled(args.data, args.test_split)
    output = Path(args.output)
    result = calibrate(model, valid, test, output, args.name, args.by, args.margin)
    config = {
        "command": "calibrate",
        "model": {"file": path.name, "sha256": sha256_of(path)},
        "data": sources,
        "splits": {"fit": args.fit_split, "test": args.test_split},
        "by": args.by,
    }
    text = json.dumps({"config": config, **result}, indent=1) + "\n"
    write_atomically(output / f"{args.name}.json", text.encode())
    _show(result)
    print(f"written: {output / f'{args.name}.json'}, with pictures of forces and energies")
    if args.save:
        print(f"written: {save_calibrated(model, path, args.save, result)}")
    return 0


def _show(result: Mapping[str, Any]) -> None:
    """Print factors and the table by class."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    factors = result["factors"]
    # narrow enough for 80 columns
    table = Table(
        title="force errors and spreads on the test split (root mean squares in eV/Å)", box=box.SIMPLE, padding=0
    )
    table.add_column("", no_wrap=True)
    for column in ("frames", "error", "spread\nrescaled", "area", "area\nrescaled", "rank\ncorr.", "flagged"):
        table.add_column(column, justify="right")
    for row, frames in zip(result["forces"]["rows"], result["frames"]["rows"], strict=True):
        table.add_row(
            row["name"],
            str(frames["n"]),
            f"{row['rmse']:.3g}",
            f"{factors['force_factor'] * row['rms_spread']:.3g}",
            f"{row['area']:.3f}",
            f"{row['area_rescaled']:.3f}",
            "-" if row["spearman"] is None else f"{row['spearman']:.2f}",
            "-" if frames["flagged"] is None else f"{100 * frames['flagged']:.0f} %",
        )
    table.caption = (
        "area: miscalibration; rank corr.: Spearman; flagged: of the worst 5 % of frames at 20 % false alarms"
    )
    console = Console()
    console.print(table)
    console.print(
        f"factors: energies {factors['energy_factor']:.3g}, forces {factors['force_factor']:.3g}; "
        f"limit of a simulation: {factors['force_limit']:.3g} eV/Å",
        highlight=False,
    )
