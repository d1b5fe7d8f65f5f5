"""What ``openmm-mlff led train`` and ``led validate`` do."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openmm import app, unit
from rich.console import Console

from openmm_led.config import LEDConfig, LEDOptions
from openmm_led.features import Features
from openmm_led.training import LEDLearner
from openmm_led.trajectories import Trajectories, check_separate, describe, read_trajectories
from openmm_mlff._plugins import near
from openmm_mlff.cli._training_options import set_options
from openmm_mlff.data.files import write_atomically
from openmm_mlff.sampling.back_mapping import solute_topology
from openmm_mlff.sampling.led_setup import find_solute
from openmm_mlff.sampling.propagators import Propagator, load_propagator
from openmm_mlff.sampling.systems import read_structure

MODEL = "model.safetensors"


@dataclass(frozen=True)
class Molecule:
    """The file of ``--topology``.

    Attributes:
        topology, positions: of all its atoms (nm). atoms: indices of the solute. solute: its topology.
    """

    topology: app.Topology
    positions: np.ndarray
    atoms: np.ndarray
    solute: app.Topology


def read_molecule(path: str, selection: str) -> Molecule:
    """Read a structure file and find the solute; raises `ValueError` or `FileNotFoundError` naming the option."""
    try:
        topology, positions = read_structure(path)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("input:", "--topology:", 1)) from error
    wanted: str | list[int] | None = None if selection == "auto" else selection
    if selection == "all":
        wanted = list(range(topology.getNumAtoms()))
    atoms = find_solute(topology, wanted)
    return Molecule(topology, positions, atoms, solute_topology(topology, atoms))


def read_model(path: str) -> Propagator:
    """Read ``--model``; raises as `load_propagator`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--model: no file at {path}")
    return load_propagator(path)


def train(args: argparse.Namespace) -> int:
    """Run ``led train``; 0 when everything is done, 130 when it was stopped before."""
    torch.set_num_threads(args.threads)
    console = Console(stderr=True, soft_wrap=True)
    output = Path(args.output)
    config, options = settings(args.set, {"latent_dim": args.latent_dim}, args.seed)
    molecule = read_molecule(args.topology, args.solute)
    files = split_files(args.trajectories, args.valid, args.valid_fraction, args.seed)
    sets = {
        name: read_trajectories(paths, molecule.topology, molecule.atoms.tolist(), args.interval)
        for name, paths in files.items()
    }
    features = make_features(args.features, args.atoms, molecule.solute, sets["train"])
    for name, data in sets.items():
        console.print(f"{name}: {len(data.frames)} runs, {data.n_frames} frames of {data.interval:g} ps")
    console.print(f"{features.n_coordinates} coordinates, {features.n_inputs} inputs of the encoder")
    learner = LEDLearner(features, config, options)
    card = {"training_data": describe(sets) | {"run_sha256": {n: run_checksums(data) for n, data in sets.items()}}}
    try:
        model = learner.fit(
            sets["train"], sets["valid"], output, temperature=args.temperature, progress=not args.quiet,
            say=lambda line: console.print(line, highlight=False), details=card,
        )  # fmt: skip
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    _write_inputs(output, args, files)
    path = model.save(output / MODEL)
    write_solute(output / "solute.pdb", molecule.solute, sets["train"].frames[0][0])
    console.print(f"model written to {path}")
    if args.validate:
        compare(args, model, molecule, sets["valid"], sets["train"], output / "validation")
    return 0


def validate(args: argparse.Namespace) -> int:
    """Run ``led validate``."""
    torch.set_num_threads(args.threads)
    model = read_model(args.model)
    molecule = read_molecule(args.topology, args.solute)
    model.check_topology(molecule.solute)
    names = {"test": args.trajectories} | ({"train": args.train} if args.train else {})
    sets = {
        name: read_trajectories(paths, molecule.topology, molecule.atoms.tolist(), args.interval)
        for name, paths in names.items()
    }
    check_separate(sets)
    check_unseen(model, sets["test"])
    compare(args, model, molecule, sets["test"], sets.get("train"), Path(args.output))
    return 0


def compare(
    args: argparse.Namespace,
    model: Propagator,
    molecule: Molecule,
    test: Trajectories,
    train: Trajectories | None,
    output: Path,
) -> None:
    """Make the report of a model in a folder and print its table."""
    from openmm_led.comparison import Settings
    from openmm_led.report import show, write_report
    from openmm_led.validation import validate

    chosen = Settings(
        lag=args.lag, sets=args.sets, states=args.states, copies=args.copies, baselines=args.baselines, seed=args.seed
    )
    console = Console(stderr=True, soft_wrap=True)
    say = (lambda line: None) if args.quiet else (lambda line: console.print(line, highlight=False))
    comparison = validate(model, test, train, topology=molecule.solute, settings=chosen, say=say)
    write_report(comparison, output)
    show(comparison)
    console.print(f"report and pictures are in {output}")


# -- what is read ----------------------------------------------------------------------------------------------


def settings(assignments: Sequence[str], given: Mapping[str, Any], seed: int) -> tuple[LEDConfig, LEDOptions]:
    """Settings of the model and of the training from ``NAME=VALUE`` texts and what has an option of its own.

    Raises `ValueError` naming the field for unknown names and values of another type.
    """
    content: dict[str, Any] = {}
    set_options(content, assignments)
    values = {**content.pop("trainer", {}), **{name: v for name, v in given.items() if v is not None}}
    if content:
        raise ValueError(f"--set: expected a name without a dot, got {next(iter(content))}.…")
    defaults: dict[str, Any] = {}
    for record in (LEDConfig(), LEDOptions(seed=seed)):
        defaults |= dataclasses.asdict(record)
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(f"--set: no setting is called {name!r}; {near(name, defaults)}")
        defaults[name] = _like(name, defaults[name], value)
    own = {field.name for field in dataclasses.fields(LEDConfig)}
    return (
        LEDConfig(**{name: value for name, value in defaults.items() if name in own}),
        LEDOptions(**{name: value for name, value in defaults.items() if name not in own}),
    )


def _like(name: str, default: Any, value: Any) -> Any:
    """The value in the type of the default."""
    if isinstance(default, tuple):
        parts = value if isinstance(value, list) else [value]
        if all(isinstance(part, int) and part > 0 for part in parts):
            return tuple(parts)
        raise ValueError(f"{name}: expected positive whole numbers such as 64,64, got {value!r}")
    if isinstance(default, float) and isinstance(value, int | float):
        return float(value)
    if type(value) is type(default):
        return value
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[type(default)]
    raise ValueError(f"{name}: expected {kind}, got {value!r}")


def split_files(
    trajectories: Sequence[str], valid: Sequence[str] | None, fraction: float, seed: int
) -> dict[str, list[str]]:
    """Files of training and validation; without `valid`, a fraction of all files, drawn by the seed."""
    if valid:
        return {"train": list(trajectories), "valid": list(valid)}
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"--valid-fraction: expected a number between 0 and 1, got {fraction}")
    if len(trajectories) < 2:
        raise ValueError("--trajectories: expected at least two, so that one can be held back, or --valid; got one")
    n = min(max(1, round(fraction * len(trajectories))), len(trajectories) - 1)
    chosen = set(np.random.default_rng([seed, 3]).permutation(len(trajectories))[:n].tolist())
    return {
        "train": [path for k, path in enumerate(trajectories) if k not in chosen],
        "valid": [path for k, path in enumerate(trajectories) if k in chosen],
    }


def make_features(kind: str, atoms: str, solute: app.Topology, train: Trajectories) -> Features:
    """Features of the solute; positions are laid upon the first training frame."""
    if kind == "internal":
        return Features.internal(solute, atoms)
    if kind == "distances":
        return Features.distances(solute, coordinates=atoms)
    return Features.cartesian(solute, train.frames[0][0].astype(np.float64), atoms)


def run_checksums(data: Trajectories) -> list[str]:
    """One checksum per run: of its frames in single precision."""
    return [hashlib.sha256(np.ascontiguousarray(f, np.float32).tobytes()).hexdigest() for f in data.frames]


def check_unseen(model: Propagator, test: Trajectories) -> None:
    """Refuse test runs that the model's card lists among those of its training."""
    about = getattr(model, "details", {}).get("training_data") or {}
    known = {checksum: name for name, runs in about.get("run_sha256", {}).items() for checksum in runs}
    for name, checksum in zip(test.names, run_checksums(test), strict=True):
        if checksum in known:
            raise ValueError(
                f"trajectories: {name} is one of the runs that the model was made with ({known[checksum]}); training, "
                "validation and test runs must be separate"
            )


def write_solute(path: Path, solute: app.Topology, positions: np.ndarray) -> None:
    """A PDB file that goes with trajectories of the solute."""
    import io

    text = io.StringIO()
    app.PDBFile.writeFile(solute, positions * unit.nanometer, text, keepIds=True)
    write_atomically(path, text.getvalue().encode())


def _write_inputs(output: Path, args: argparse.Namespace, files: Mapping[str, Sequence[str]]) -> None:
    given = {name: value for name, value in vars(args).items() if name not in ("func", "debug", "quiet", "command")}
    text = json.dumps({"command": "led train", "arguments": given, "files": files}, indent=1) + "\n"
    write_atomically(output / "inputs.json", text.encode())
