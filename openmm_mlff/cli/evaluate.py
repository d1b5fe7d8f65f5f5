"""``openmm-mlff evaluate``: a model and labelled structures -> error tables and parity plots."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openmm_mlff.cli._training_options import add_device, show_models, show_table

if TYPE_CHECKING:
    from pathlib import Path

    from openmm_mlff.analysis.errors import Comparison
    from openmm_mlff.data.structures import Structure
    from openmm_mlff.potentials.potential import Potential

DESCRIPTION = """\
Compare a model with labels: MAE and RMSE of energies (per atom), forces, dipoles and charges, over all structures and
by formula, charge, multiplicity and group, or any other key that the structures carry (--by class). Error bars come
from resampling whole groups (trajectories). Writes <name>_errors.json, <name>_parity.png and the configuration into the
output folder; of several models (--model given more than once) such files for each, and all side by side in
<name>_models.json."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("evaluate", help="a model's errors against labels", description=DESCRIPTION)
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        help="model file, or the name of a shipped model; several are shown side by side",
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="dataset folders or structure files")
    parser.add_argument("--split", help="only this split of the datasets (train, valid, test)")
    parser.add_argument("--output", default=".", metavar="FOLDER", help="where results are written (default: here)")
    parser.add_argument("--name", default="evaluation", help="first part of the results' names")
    parser.add_argument("--long-range-cutoff", type=float, metavar="NM", help="for periodic structures")
    parser.add_argument("--long-range-method", choices=("shifted", "ewald", "pme"), help="of their charges (shifted)")
    parser.add_argument("--phase", help="of a model that offers several energies, such as resolv (default: its own)")
    parser.add_argument("--precision", choices=("single", "double"), help="default: that of the model file")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument(
        "--by",
        action="append",
        metavar="KEY",
        help="also print a table by this: formula, charge, multiplicity, group, or any key of the structures' info, "
        "such as class; may be repeated",
    )
    add_device(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from pathlib import Path

    from openmm_mlff.training.evaluation import find_model, write_side_by_side
    from openmm_mlff.training.recipe import load_labelled

    paths = [find_model(model) for model in args.model]
    titles = _titles(paths)
    structures, sources = load_labelled(args.data, args.split)
    comparisons = {}
    for path, title in zip(paths, titles, strict=True):
        name = args.name if len(paths) == 1 else f"{args.name}_{title}"
        comparisons[title] = _evaluate(args, path, name, title, structures, sources)
    if len(paths) > 1:
        output = Path(args.output) / f"{args.name}_models.json"
        report = write_side_by_side(comparisons, output, tuple(args.by or ()), args.seed)
        show_models(report)
        print(f"written: {output}")
    return 0


def _titles(paths: Sequence[Path]) -> list[str]:
    """Short names of models that tell them apart: the file's, with its folder's where several files have one name."""
    stems = [path.stem for path in paths]
    titles = [p.stem if stems.count(p.stem) == 1 else f"{p.resolve().parent.name}-{p.stem}" for p in paths]
    return [t if titles.count(t) == 1 else f"{t}-{k}" for k, t in enumerate(titles)]


def _evaluate(
    args: argparse.Namespace,
    path: Path,
    name: str,
    title: str,
    structures: Sequence[Structure],
    sources: Sequence[dict[str, Any]],
) -> Comparison:
    """Compare one model, write its files and show its tables if it is the only one."""
    import json
    from pathlib import Path

    import torch

    from openmm_mlff.data.files import sha256_of, write_atomically
    from openmm_mlff.potentials.family import load_potential
    from openmm_mlff.training.evaluation import compare, write_report
    from openmm_mlff.training.run import choose_device

    device = choose_device(args.device)
    model = load_potential(path).to(device=device)
    if args.phase is not None:
        model = model.in_phase(args.phase)
    if args.precision is not None:
        model = model.to(torch.float64 if args.precision == "double" else torch.float32)
    _set_long_range(model, args, structures)
    comparison = compare(model, structures)
    output = Path(args.output)
    heading = f"{title}: {', '.join(source['name'] for source in sources)}"
    by = tuple(args.by or ())
    report = write_report(comparison, output, name, heading, args.seed, by)
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
    write_atomically(output / f"{name}_config.json", (json.dumps(config, indent=1) + "\n").encode())
    if len(args.model) == 1:
        show_table(report, title, by)
    print(f"written: {output / f'{name}_errors.json'}, {output / f'{name}_parity.png'}")
    return comparison


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
