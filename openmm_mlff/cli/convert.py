"""``openmm-mlff convert``: a file published by others -> a model file with a card, proved to give the same energies."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_mlff.data.structures import Structure
    from openmm_mlff.potentials.potential import Potential

#: eV; the converted file holds the same numbers, so nothing but the last digits may differ.
TOLERANCE = 1e-9


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command ``convert``."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a published model file into a model file of this package",
        description="Read a file that a family knows (such as a SpookyNet checkpoint) and write a .safetensors model "
        "file with a card. The file is read back and must give the same energies and forces.",
    )
    parser.add_argument("source", help="published file")
    parser.add_argument("target", help="model file to write (.safetensors)")
    parser.add_argument("--family", metavar="NAME", help="family that reads the source; found by itself if not given")
    parser.add_argument("--licence", metavar="TEXT", help="of the weights; known for published models")
    parser.add_argument("--citation", metavar="TEXT", help="known for published models")
    parser.add_argument("--name", metavar="TEXT", help="name on the card")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")
    parser.set_defaults(func=convert)


def convert(args: argparse.Namespace) -> int:
    """Convert one file; raises `ValueError` if it cannot be read or the copy does not agree."""
    from openmm_mlff.data import model_file
    from openmm_mlff.potentials.family import families, load_potential, save_potential

    source, target = Path(args.source), Path(args.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"target: expected a name that ends in .safetensors, got {target.name!r}")
    if target.exists() and not args.overwrite:
        raise ValueError(f"target: {target} exists already (use --overwrite)")
    if not source.is_file():
        raise FileNotFoundError(f"source: no file at {source}")
    model = load_potential(source, args.family)
    sha256 = model_file.sha256_of(source)
    published = [m for f in families() for m in f.published]
    known = next((m for m in published if m.sha256 == sha256 or (m.is_it is not None and m.is_it(model))), None)
    details: dict[str, Any] = {"source": {"file": source.name, "sha256": sha256}}
    if known is not None:
        details["source"]["url"] = known.url
        details |= {"name": known.name, "licence": known.licence, "citation": known.citation, "domain": known.domain}
    details |= {k: v for k in ("name", "licence", "citation") if (v := getattr(args, k)) is not None}
    partial = target.with_name(f".{target.stem}.unverified.safetensors")
    try:
        save_potential(model, partial, **details)
        worst = largest_difference(model, load_potential(partial))
        if not worst <= TOLERANCE:
            raise ValueError(f"target: the converted model differs from the source by {worst:.3g} eV or eV/angstrom")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{target}: {model.family}, {len(model.elements)} elements, {target.stat().st_size / 1e6:.1f} MB")
    print(f"read back: energies and forces agree within {worst:.1g} eV and eV/angstrom")
    if "licence" not in details:
        print("no licence is known for these weights; add one with --licence")
    return 0


def largest_difference(first: Potential, second: Potential) -> float:
    """Largest difference of energies (eV) and forces (eV/angstrom) over `probes`, in float64 and all phases."""
    if first.phases and first.phases == second.phases:
        return max(_difference(first.in_phase(phase), second.in_phase(phase)) for phase in first.phases)
    return _difference(first, second)


def _difference(first: Potential, second: Potential) -> float:
    import copy

    import torch

    worst = 0.0
    pair = [copy.deepcopy(m).to(torch.float64) for m in (first, second)]
    for structure in probes(first):
        a, b = (m.evaluate(m.batch(structure)) for m in pair)
        assert a.forces is not None and b.forces is not None
        for x, y in ((a.energy, b.energy), (a.forces, b.forces)):
            # NaN counts as a difference
            worst = max(worst, float((x - y).abs().max().nan_to_num(nan=float("inf"))))
    return worst


def probes(model: Potential) -> list[Structure]:
    """The model's own examples, or clusters of all its elements, with charge and spin where the model knows them."""
    import numpy as np

    from openmm_mlff.data.structures import Structure

    if found := model.examples():
        return found
    rng = np.random.default_rng(0)
    grid = 1.6 * np.stack(np.meshgrid(range(2), range(2), range(2)), axis=-1).reshape(-1, 3)
    elements = list(model.elements)
    found = []
    for start in range(0, len(elements), 8):
        numbers = np.array((elements[start : start + 8] + elements)[: len(grid)])
        positions = grid[: len(numbers)] + rng.normal(0.0, 0.1, (len(numbers), 3))
        electrons = int(numbers.sum())
        charge = electrons % 2
        if charge and not model.supports_charge:
            continue
        found.append(Structure(numbers, positions, charge=charge))
        if model.supports_charge:
            found.append(Structure(numbers, positions, charge=charge - 2))
        if model.supports_multiplicity and (model.multiplicities is None or 3 in model.multiplicities):
            found.append(Structure(numbers, positions, charge=charge, multiplicity=3))
    return found
