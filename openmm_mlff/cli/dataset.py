"""``openmm-mlff dataset``: make, join, split, inspect and export labelled datasets."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmm_mlff.cli.dataset_build import add_build, add_select

if TYPE_CHECKING:
    from openmm_mlff.data.datasets import Dataset
    from openmm_mlff.data.reference import ReferenceMethod
    from openmm_mlff.data.structures import Structure

DESCRIPTION = """
Labelled structures for training. A dataset is a folder with shards (safetensors) and a data card (card.json).
Runs go on where they stopped when they are started again with the same settings; structures that cannot be
labelled are left out and listed in failures.jsonl.
"""

SAMPLE_HELP = "run the molecular dynamics of a recipe (TOML) and label its frames"
LABEL_HELP = "label structures from files or SMILES"
#: endings that mdtraj reads and that need a topology.
TRAJECTORIES = (".dcd", ".xtc", ".trr", ".nc", ".netcdf", ".ncdf")


def add_parser(subparsers: Any) -> None:
    """Add the command to the subparsers of `openmm_mlff.cli`."""
    parser = subparsers.add_parser("dataset", help="make and inspect labelled datasets", description=DESCRIPTION)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_build(actions)
    add_select(actions)
    _add_sample(actions)
    _add_label(actions)
    _add_import(actions)

    info = actions.add_parser("info", help="print the data card")
    info.add_argument("dataset", type=Path)
    info.add_argument("--json", action="store_true", help="the whole card as JSON")
    info.add_argument("--verify", action="store_true", help="compare every shard with its sha256")
    info.set_defaults(func=run_info)

    split = actions.add_parser("split", help="record a new split by group (molecule or trajectory)")
    split.add_argument("dataset", type=Path)
    _add_split_options(split, default="train=0.8,valid=0.1,test=0.1")
    split.set_defaults(func=run_split)

    merge = actions.add_parser("merge", help="join datasets of one method")
    merge.add_argument("datasets", type=Path, nargs="+")
    merge.add_argument("--output", "-o", type=Path, required=True, help="new folder")
    merge.add_argument("--name", default="merged")
    merge.set_defaults(func=run_merge)

    export = actions.add_parser("export", help="write structures to a file (.extxyz, .h5, .npz)")
    export.add_argument("dataset", type=Path)
    export.add_argument("file", type=Path)
    export.add_argument("--split", help="only this split")
    export.set_defaults(func=run_export)


def _add_split_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--split",
        type=parse_fractions,
        default=default,
        metavar="NAME=SHARE,...",
        help="shares of the structures, e.g. train=0.8,valid=0.1,test=0.1",
    )
    parser.add_argument("--split-seed", type=int, default=1, help="default: %(default)s")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", "-o", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--processes", "-j", type=int, default=1, help="at once, one thread each (default: 1)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _add_sample(actions: Any) -> None:
    parser = actions.add_parser("sample", help=SAMPLE_HELP, description=SAMPLE_HELP)
    parser.add_argument("recipe", type=Path)
    _add_run_options(parser)
    parser.set_defaults(func=run_sample)


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE|smiles:SMILES",
        help=".extxyz, .npz, .h5, .pdb, .cif, .sdf, .smi, a trajectory, or a SMILES",
    )
    parser.add_argument("--charge", type=int, help="total charge, for inputs that do not say (default: 0)")
    parser.add_argument("--multiplicity", type=int, help="2S+1, for inputs that do not say (default: 1)")
    parser.add_argument("--topology", type=Path, help="topology of trajectories, e.g. a PDB file")
    parser.add_argument("--atoms", help="atoms of trajectories, in mdtraj's selection language")
    parser.add_argument("--stride", type=int, default=1, help="keep every so many frames of trajectories")
    parser.add_argument("--conformers", type=int, default=1, help="per SMILES (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the embedding of SMILES (default: %(default)s)")
    parser.add_argument(
        "--group-by",
        default="formula",
        metavar="formula|structure|block:N",
        help="groups of structures that have none (default: %(default)s)",
    )
    parser.add_argument("--name", help="of the dataset (default: the name of its folder)")
    _add_split_options(parser, default=None)


def _add_label(actions: Any) -> None:
    parser = actions.add_parser("label", help=LABEL_HELP, description=LABEL_HELP)
    _add_input_options(parser)
    parser.add_argument("--method", default="GFN2-xTB", help="of tblite (default: %(default)s)")
    parser.add_argument("--solvent", help="implicit solvent (ALPB) of tblite, for example water (default: vacuum)")
    parser.add_argument("--calculator", metavar="MODULE:CLASS", help="an ASE calculator instead, also by ASE's name")
    parser.add_argument("--calculator-kwargs", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--charge-keyword", help="keyword of the calculator that takes the total charge")
    parser.add_argument("--multiplicity-keyword", help="keyword of the calculator that takes 2S+1")
    parser.add_argument(
        "--no-atom-energies",
        action="store_true",
        help="leave energies on the calculator's own scale instead of relative to free atoms",
    )
    parser.add_argument("--block", type=int, default=50, help="structures per shard (default: %(default)s)")
    _add_run_options(parser)
    parser.set_defaults(func=run_label)


def _add_import(actions: Any) -> None:
    text = "store structures whose files hold labels already"
    parser = actions.add_parser("import", help=text, description=text)
    _add_input_options(parser)
    parser.add_argument("--labelled-by", required=True, metavar="TEXT", help="method and program, for the data card")
    parser.add_argument("--energy-reference", required=True, metavar="TEXT", help="what energies are relative to")
    parser.add_argument("--output", "-o", type=Path, required=True, help="new folder")
    parser.set_defaults(func=run_import)


def parse_fractions(text: str) -> dict[str, float]:
    """``train=0.8,valid=0.2`` as a mapping; `argparse.ArgumentTypeError` for anything else."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        fractions = {name.strip(): float(share) for name, share in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NAME=SHARE,NAME=SHARE,... got {text!r}") from error
    return fractions


def run_sample(args: argparse.Namespace) -> int:
    _one_thread()
    from openmm_mlff.sampling.recipes import read_recipe, sample

    dataset = sample(read_recipe(args.recipe), args.output, args.processes, not args.no_progress)
    return _report(dataset)


def _one_thread() -> None:
    """Threads only slow small molecules down; OMP_NUM_THREADS, where it is set, has the last word."""
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"


def _read_inputs(args: argparse.Namespace) -> tuple[list[Structure], dict[str, Any]]:
    """Structures of all inputs, and what the data card says of where they come from."""
    from openmm_mlff.data.files import sha256_of
    from openmm_mlff.data.formats import read_structures, with_groups
    from openmm_mlff.data.molecules import embed_smiles
    from openmm_mlff.data.trajectories import read_trajectory

    state = {key: getattr(args, key) for key in ("charge", "multiplicity") if getattr(args, key) is not None}
    structures: list[Structure] = []
    sources = []
    for text in args.inputs:
        path = Path(text)
        source: dict[str, Any] = {"input": text if text.startswith("smiles:") else path.name}
        if text.startswith("smiles:"):
            found = embed_smiles(text.removeprefix("smiles:"), args.conformers, args.seed, **state)
            source |= {"conformers": args.conformers, "seed": args.seed}
        elif args.topology is not None or path.suffix.lower() in TRAJECTORIES:
            found = read_trajectory(path, args.topology, atoms=args.atoms, stride=args.stride, **state)
            source |= {"sha256": sha256_of(path), "atoms": args.atoms, "stride": args.stride}
        else:
            smiles = path.suffix.lower() == ".smi"
            options = {"conformers": args.conformers, "seed": args.seed} if smiles else {}
            found = read_structures(path, **options, **state)
            source |= {"sha256": sha256_of(path), **options}
        sources.append(source | state | {"structures": len(found)})
        structures += found
    return with_groups(structures, args.group_by), {"how": "from files", "sources": sources, "group_by": args.group_by}


def _reference_method(args: argparse.Namespace) -> ReferenceMethod:
    from openmm_mlff.data.reference import ASEReference, TBLite

    if args.calculator is None:
        for option in ("calculator_kwargs", "charge_keyword", "multiplicity_keyword", "no_atom_energies"):
            if getattr(args, option):
                raise ValueError(f"--{option.replace('_', '-')}: expected only together with --calculator")
        return TBLite(args.method, solvent=args.solvent)
    if args.solvent is not None:
        raise ValueError("--solvent: expected only without --calculator, whose own settings name its solvent")
    if not isinstance(args.calculator_kwargs, dict):
        raise ValueError(f"--calculator-kwargs: expected a JSON object, got {args.calculator_kwargs!r}")
    return ASEReference(
        args.calculator,
        args.calculator_kwargs,
        args.charge_keyword,
        args.multiplicity_keyword,
        {} if args.no_atom_energies else None,
    )


def run_label(args: argparse.Namespace) -> int:
    _one_thread()
    from openmm_mlff.data.labelling import label_structures

    structures, sampling = _read_inputs(args)
    dataset = label_structures(
        structures,
        _reference_method(args),
        args.output,
        name=args.name or args.output.resolve().name,
        sampling=sampling,
        processes=args.processes,
        block=args.block,
        progress=not args.no_progress,
    )
    return _report(_with_split(dataset, args))


def run_import(args: argparse.Namespace) -> int:
    from openmm_mlff.data.datasets import write_dataset
    from openmm_mlff.data.jobs import claim_folder

    structures, sampling = _read_inputs(args)
    method = {"method": args.labelled_by, "program": "as stated by the user", "energy_reference": args.energy_reference}
    name = args.name or args.output.resolve().name
    dataset = write_dataset(args.output, structures, name=name, method=method, sampling=sampling)
    claim_folder(args.output, {"name": name, "method": method, "sampling": sampling})
    return _report(_with_split(dataset, args))


def _with_split(dataset: Dataset, args: argparse.Namespace) -> Dataset:
    from openmm_mlff.data.datasets import split_dataset

    return split_dataset(dataset.path, args.split, args.split_seed) if args.split else dataset


def run_info(args: argparse.Namespace) -> int:
    from openmm_mlff.data.datasets import Dataset

    dataset = Dataset(args.dataset)
    if args.verify:
        dataset.verify()
    if args.json:
        print(json.dumps(dataset.card, indent=1))
        return 0
    _report(dataset)
    if args.verify:
        print("every shard agrees with its checksum")
    return 0


def run_split(args: argparse.Namespace) -> int:
    from openmm_mlff.data.datasets import split_dataset

    return _report(split_dataset(args.dataset, args.split, args.split_seed))


def run_merge(args: argparse.Namespace) -> int:
    from openmm_mlff.data.datasets import concatenate
    from openmm_mlff.data.jobs import claim_folder

    dataset = concatenate(args.datasets, args.output, args.name)
    claim_folder(args.output, {"name": args.name, "merged": [str(path) for path in args.datasets]})
    return _report(dataset)


def run_export(args: argparse.Namespace) -> int:
    from openmm_mlff.data.datasets import Dataset
    from openmm_mlff.data.files import write_atomically
    from openmm_mlff.data.formats import write_structures

    structures = Dataset(args.dataset).load(args.split)
    write_structures(args.file, structures)
    configuration = {"dataset": str(args.dataset), "split": args.split, "structures": len(structures)}
    beside = args.file.with_name(args.file.name + ".configuration.json")
    write_atomically(beside, (json.dumps(configuration, indent=1) + "\n").encode())
    print(f"{args.file}: {len(structures)} structures")
    return 0


def _report(dataset: Dataset) -> int:
    """Print what a dataset holds, and any failures."""
    if not dataset.card:
        print(f"{dataset.path}: {len(dataset)} structures in {len(dataset.shards)} shards, no data card yet")
        return 0
    card = dataset.card
    lines: dict[str, str] = {
        "dataset": f"{card['name']} in {dataset.path}",
        "structures": f"{card['n_structures']} in {card['n_groups']} groups, {len(dataset.shards)} shards",
        "method": f"{card['method'].get('method')} ({card['method'].get('program')})",
        "energies": f"relative to: {card['method'].get('energy_reference')}",
        "formulas": _counts(card["formulas"]),
        "charges": _counts(card["charges"]),
        "multiplicities": _counts(card["multiplicities"]),
        "labels": _counts(card["labels"]),
        "splits": _counts(card.get("splits", {}).get("structures", {})) or "none",
        "failures": str(card["failures"]["count"]),
    }
    for key, value in lines.items():
        print(f"{key:>15}  {value}")
    for reason, count in card["failures"]["reasons"].items():
        print(f"{'':>15}  {count} x {reason}")
    return 0


def _counts(table: Mapping[str, int], most: int = 8) -> str:
    shown = [f"{key}: {count}" for key, count in list(table.items())[:most]]
    return ", ".join(shown) + (f", and {len(table) - most} more" if len(table) > most else "")
