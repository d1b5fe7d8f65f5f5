"""``openmm-mlff evaluate``: a model and labelled structures -> error tables and parity plots."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openmm_mlff.cli._training_options import add_device, show_table

if TYPE_CHECKING:
    from openmm_mlff.data.structures import Structure
    from openmm_mlff.potentials.potential import Potential

DESCRIPTION = """\
Compare a model with labels: MAE and RMSE of energies (per atom), forces, dipoles and charges, over all structures and
by formula, charge, multiplicity and group. Error bars come from resampling whole groups (trajectories). Writes
<name>_errors.json, <name>_parity.png and the configuration into the output folder."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("evaluate", help="a model's errors against labels", description=DESCRIPTION)
    parser.add_argument("--model", required=True, help="model file, or the name of a shipped model")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="dataset folders or structure files")
    parser.add_argument("--split", help="only this split of the datasets (train, valid, test)")
    parser.add_argument("--output", default=".", metavar="FOLDER", help="where results are written (default: here)")
    parser.add_argument("--name", default="evaluation", help="first part of the results' names")
    parser.add_argument("--long-range-cutoff", type=float, metavar="NM", help="for periodic structures")
    parser.add_argument("--long-range-method", choices=("shifted", "ewald", "pme"), help="of their charges (shifted)")
    parser.add_argument("--phase", help="of a model that offers several energies, such as resolv (default: its own)")
    parser.add_argument("--precision", choices=("single", "double"), help="default: that of the model file")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    keys = ("formula", "charge", "multiplicity", "group")
    parser.add_argument("--by", action="append", choices=keys, help="also print a table by this; may be repeated")
    add_device(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import json
    from pathlib import Path

    import torch

    from openmm_mlff.data.files import sha256_of, write_atomically
    from openmm_mlff.potentials.family import load_potential
    from openmm_mlff.training.evaluation import compare, find_model, write_report
    from openmm_mlff.training.recipe import load_labelled
    from openmm_mlff.training.run import choose_device

    path = find_model(args.model)
    device = choose_device(args.device)
    model = load_potential(path).to(device=device)
    if args.phase is not None:
        model = model.in_phase(args.phase)
    if args.precision is not None:
        model = model.to(torch.float64 if args.precision == "double" else torch.float32)
    structures, sources = load_labelled(args.data, args.split)
    _set_long_range(model, args, structures)
    comparison = compare(model, structures)
    output = Path(args.output)
    title = f"{path.stem}: {', '.join(source['name'] for source in sources)}"
    report = write_report(comparison, output, args.name, title, args.seed)
    config = {
        "command": "evaluate",
        "model": {"file": path.name, "sha256": sha256_of(path)},
        "data": sources,
        "split": args.split,
        "long_range_cutoff_angstrom": model.long_range_cutoff,
        "long_range_method": model.long_range_method,
        "phase": args.phase,
        "precision": "double" if model.dtype == torch.float64 else "single",
        "device": device.type,
        "seed": args.seed,
    }
    write_atomically(output / f"{args.name}_config.json", (json.dumps(config, indent=1) + "\n").encode())
    show_table(report, path.stem, tuple(args.by or ()))
    print(f"written: {output / f'{args.name}_errors.json'}, {output / f'{args.name}_parity.png'}")
    return 0


def _set_long_range(model: Potential, args: argparse.Namespace, structures: Sequence[Structure]) -> None:
    """Give the model the long-range terms that were asked for; raises `ValueError` where they are wrong."""
    from openmm_mlff.forces.arguments import check_long_range_method, length

    if args.long_range_cutoff is not None:
        model.long_range_cutoff = length(args.long_range_cutoff)
    if args.long_range_method is not None:
        open_ones = any(structure.cell is None for structure in structures)
        charge = max((structure.charge for structure in structures), key=abs, default=0)
        model.long_range_method = check_long_range_method(
            args.long_range_method, model, "open" if open_ones else "periodic", charge
        )
