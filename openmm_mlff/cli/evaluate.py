"""``openmm-mlff evaluate``: a model and labelled structures -> error tables and parity plots."""

from __future__ import annotations

import argparse

from openmm_mlff.cli._training_options import add_device, show_table

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

    from openmm_mlff.data.files import write_atomically
    from openmm_mlff.data.model_file import sha256_of
    from openmm_mlff.potentials.family import load_potential
    from openmm_mlff.training.evaluation import compare, find_model, write_report
    from openmm_mlff.training.recipe import load_labelled
    from openmm_mlff.training.run import choose_device

    path = find_model(args.model)
    device = choose_device(args.device)
    model = load_potential(path).to(device=device)
    if args.precision is not None:
        model = model.to(torch.float64 if args.precision == "double" else torch.float32)
    structures, sources = load_labelled(args.data, args.split)
    comparison = compare(model, structures)
    output = Path(args.output)
    title = f"{path.stem}: {', '.join(source['name'] for source in sources)}"
    report = write_report(comparison, output, args.name, title, args.seed)
    config = {
        "command": "evaluate",
        "model": {"file": path.name, "sha256": sha256_of(path)},
        "data": sources,
        "split": args.split,
        "precision": "double" if model.dtype == torch.float64 else "single",
        "device": device.type,
        "seed": args.seed,
    }
    write_atomically(output / f"{args.name}_config.json", (json.dumps(config, indent=1) + "\n").encode())
    show_table(report, path.stem, tuple(args.by or ()))
    print(f"written: {output / f'{args.name}_errors.json'}, {output / f'{args.name}_parity.png'}")
    return 0
