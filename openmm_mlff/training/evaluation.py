"""model, labelled structures -> a `Comparison`, its tables and its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.analysis.errors import QUANTITIES, Comparison, error_tables, side_by_side
from openmm_mlff.analysis.plots import plot_parity
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import find_family, find_published
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training.batching import LabelledSet, label_rows

#: atoms in a batch of evaluation
BATCH_ATOMS = 1024
#: quantity -> the field of an evaluation that holds its uncertainty
SPREADS = {"energy": "spread", "forces": "force_spread"}


def compare(model: Potential, structures: Sequence[Structure]) -> Comparison:
    """Predict structures and lay their labels beside the predictions, in the structures' order.

    Raises `ValueError` for structures without any label that the model predicts, or that it cannot describe.
    """
    prepared = LabelledSet(structures, model)
    predicted: dict[str, list[Any]] = {name: [None] * len(structures) for name in QUANTITIES}
    spread: dict[str, list[Any]] = {name: [None] * len(structures) for name in SPREADS}
    for indices in prepared.chunks(BATCH_ATOMS, BATCH_ATOMS):
        labelled = prepared.batch(indices)
        result = model.evaluate(labelled.batch)
        ends = np.cumsum(labelled.batch.counts.cpu().numpy())
        wanted = [(predicted[name], getattr(result, name), unit) for name, (_, unit) in QUANTITIES.items()]
        wanted += [(spread[name], getattr(result, field), QUANTITIES[name][1]) for name, field in SPREADS.items()]
        for found, value, unit in wanted:
            if value is None:
                continue
            rows = value.detach().cpu().numpy().astype(np.float64)
            parts = np.split(rows, ends[:-1]) if unit == "atom" else np.split(rows, len(indices))
            for i, part in zip(indices.tolist(), parts, strict=True):
                found[i] = part
    reference = {name: _references(prepared.structures, name) for name in QUANTITIES}
    shared = [n for n in QUANTITIES if reference[n] is not None and predicted[n][0] is not None]
    if not shared:
        raise ValueError("structures: expected labels (energy, forces, dipole or charges) to compare with, found none")
    return Comparison(
        counts=prepared.sizes,
        groups=[s.group for s in structures],
        formulas=[s.formula for s in structures],
        charges=[s.charge for s in structures],
        multiplicities=[s.multiplicity for s in structures],
        reference={n: reference[n] for n in shared},  # type: ignore[misc]
        predicted={n: np.concatenate(predicted[n]) for n in shared},
        infos=[s.info for s in structures],
        spread={n: np.concatenate(parts) for n, parts in spread.items() if parts[0] is not None},
    )


def find_model(name: str | Path) -> Path:
    """The file of a model: a path, or the name of a model that a plugin ships or that was fetched into the cache.

    Raises `FileNotFoundError` for a path without a file or a model that is not there, `ValueError` for unknown names.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"model: no file at {path}")
    family = find_family(str(name))
    for bundled in family.bundled:
        if bundled.name == str(name) and bundled.path.is_file():
            return bundled.path
    for published in family.published:
        found = find_published(published) if published.name == str(name) else None
        if found is not None:
            return found
    raise FileNotFoundError(f"model: {str(name)!r} names no model file that is here; give a path, or fetch it first")


def _references(structures: Sequence[Structure], name: str) -> np.ndarray | None:
    """Labels laid end to end with NaN for missing ones; None if no structure has one."""
    rows = label_rows(structures, name)
    return None if rows is None else np.concatenate(rows)


def write_report(
    comparison: Comparison, folder: str | Path, name: str, title: str = "", seed: int = 0, by: Sequence[str] = ()
) -> dict[str, Any]:
    """Write ``<name>_errors.json`` (tables, units) and ``<name>_parity.png``; returns what the JSON holds.

    Args:
        by: keys of the structures' info that get a table too.
    """
    folder = Path(folder)
    report: dict[str, Any] = {
        "units": {quantity: QUANTITIES[quantity][0] for quantity in comparison.quantities},
        "error_bars": "standard error by bootstrap over groups (1000 samples)",
        "seed": seed,
        "tables": error_tables(comparison, seed=seed, more=by),
    }
    write_atomically(folder / f"{name}_errors.json", (json.dumps(report, indent=1) + "\n").encode())
    plot_parity(comparison, folder / f"{name}_parity.png", title)
    return report


def write_side_by_side(
    comparisons: Mapping[str, Comparison], path: str | Path, by: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Write the errors of several models on the same structures as JSON; returns what it holds.

    Args:
        by: keys (see `Comparison.labels`) beside "all".
    """
    first = next(iter(comparisons.values()))
    report: dict[str, Any] = {
        "models": list(comparisons),
        "units": {quantity: QUANTITIES[quantity][0] for quantity in first.quantities},
        "error_bars": "standard error by bootstrap over groups (1000 samples)",
        "seed": seed,
        "tables": {key: side_by_side(comparisons, key, seed=seed) for key in ("all", *by)},
    }
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    return report
