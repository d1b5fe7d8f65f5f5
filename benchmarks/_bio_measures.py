"""Measures of the benchmark of SpookyNets for biomolecules, each a function of models by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from _bio_molecules import CARBENES, GFN2, SOLUTES, SPLITTINGS, bent, optimised, solute, with_far_waters

from openmm_mlff.analysis.errors import Comparison, side_by_side
from openmm_mlff.data.classes import OPEN_SHELL
from openmm_mlff.data.reference import LabelError
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training.evaluation import compare

Models = Mapping[str, Potential]
#: classes whose energies are looked at beside those of their neutral isomers
CHARGED = ("zwitterion", "charged peptide")
NEUTRAL = ("neutral organic", "neutral peptide")


def energies(model: Potential, structures: Sequence[Structure]) -> np.ndarray:
    """Of every structure, ``(n,)`` eV; NaN where the model refuses its atoms, charge or multiplicity."""
    found = []
    for structure in structures:
        try:
            with torch.no_grad():
                found.append(float(model(model.batch(structure)).energy[0]))
        except ValueError:
            found.append(float("nan"))
    return np.array(found)


def comparisons(models: Models, structures: Sequence[Structure]) -> dict[str, Comparison]:
    """Every model on the structures, which all models must know."""
    return {name: compare(model, structures) for name, model in models.items()}


def known_to_all(models: Models, structures: Sequence[Structure]) -> list[Structure]:
    """The structures that no model refuses."""
    kept = []
    for structure in structures:
        try:
            for model in models.values():
                model.check(structure)
        except ValueError:
            continue
        kept.append(structure)
    return kept


def class_table(found: Mapping[str, Comparison]) -> dict[str, Any]:
    """Errors by class, and all closed-shell and all open-shell classes together."""
    first = next(iter(found.values()))
    shells = ["open shells" if label in OPEN_SHELL else "closed shells" for label in first.labels("class")]
    grouped = {}
    for name, comparison in found.items():
        infos = [{**info, "shell": shell} for info, shell in zip(comparison.infos, shells, strict=True)]
        grouped[name] = Comparison(**{**vars(comparison), "infos": infos})
    return {key: side_by_side(grouped, key) for key in ("all", "shell", "class")}


def _key(structure: Structure, formula: bool) -> tuple[tuple[int, int], ...]:
    """Composition, with as many protons taken off as the charge (so that acids and bases have one key)."""
    numbers, counts = np.unique(structure.numbers, return_counts=True)
    composition = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    if not formula:
        composition[1] = composition.get(1, 0) - structure.charge
    return tuple(sorted(composition.items()))


def relative_energies(found: Mapping[str, Comparison], structures: Sequence[Structure]) -> dict[str, Any]:
    """Energies of zwitterions relative to neutral isomers, and of charged peptides relative to their neutral forms.

    The error of a relative energy is the difference of the mean errors of all frames of the two forms.
    """
    labels = [str(s.info.get("class", "-")) for s in structures]
    neutral: dict[Any, list[int]] = defaultdict(list)
    charged: dict[Any, list[int]] = defaultdict(list)
    for i, (s, label) in enumerate(zip(structures, labels, strict=True)):
        if label in NEUTRAL and s.charge == 0:
            neutral[_key(s, False)].append(i)
        elif label in CHARGED:
            charged[(label, s.charge, _key(s, False))].append(i)
    rows = []
    for (label, charge, key), members in sorted(charged.items(), key=lambda item: str(item[0])):
        others = neutral.get(key)
        if not others:
            continue
        row: dict[str, Any] = {
            "class": label,
            "formula": structures[members[0]].formula,
            "charge": charge,
            "frames": len(members),
            "neutral_frames": len(others),
        }
        for name, comparison in found.items():
            error = comparison.predicted["energy"] - comparison.reference["energy"]
            row[name] = float(error[members].mean() - error[others].mean())
        rows.append(row)
    mean = {
        label: {
            name: float(np.mean([abs(r[name]) for r in rows if r["class"] == label]))
            for name in found
            if any(r["class"] == label for r in rows)
        }
        for label in CHARGED
    }
    return {"unit": "eV", "mean_absolute": mean, "rows": rows}


def size_consistency(models: Models, waters: Sequence[int] = (1, 2, 5, 10)) -> dict[str, Any]:
    """E(solute and n far waters) - E(solute) - n E(water), eV, 60 angstrom apart; GFN2-xTB beside the models."""
    rows = []
    alone = optimised("O", 0, 1)
    for name in SOLUTES:
        molecule = solute(name)
        for n in waters:
            together = with_far_waters(molecule, n)
            row: dict[str, Any] = {"solute": name, "charge": molecule.charge, "waters": n}
            try:
                found = [GFN2.label(s).energy for s in (together, molecule, alone)]
                row["GFN2-xTB"] = _excess([float(e) for e in found if e is not None], n)
            except LabelError:
                row["GFN2-xTB"] = None
            for model_name, model in models.items():
                value = _excess(energies(model, [together, molecule, alone]), n)
                row[model_name] = None if np.isnan(value) else value
            rows.append(row)
    return {"unit": "eV", "distance_angstrom": 60.0, "rows": rows}


def _excess(values: Sequence[float] | np.ndarray, n: int) -> float:
    together, molecule, water = values
    return float(together - molecule - n * water)


def splittings(models: Models) -> dict[str, Any]:
    """E(triplet) - E(singlet), eV, each at its own GFN2-xTB minimum, spin-polarised; signs against experiment."""
    rows = []
    for entry in SPLITTINGS:
        try:
            states = [optimised(entry.smiles, 0, m) for m in (1, 3)]
        except LabelError as error:
            rows.append({"name": entry.name, "failed": str(error)})
            continue
        singlet, triplet = (float(s.energy) for s in states if s.energy is not None)
        row: dict[str, Any] = {"name": entry.name, "ground_by_experiment": entry.ground, "GFN2-xTB": triplet - singlet}
        for name, model in models.items():
            value = energies(model, states)
            row[name] = None if np.isnan(value).any() else float(value[1] - value[0])
        rows.append(row)
    return {"unit": "eV", "rows": rows, "models": {name: _judged(rows, name) for name in ("GFN2-xTB", *models)}}


def _judged(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Mean and largest difference from GFN2-xTB, and how often the sign is that of experiment."""
    known = [r for r in rows if r.get(name) is not None]
    errors = [abs(r[name] - r["GFN2-xTB"]) for r in known]
    signs = [(r[name] < 0) == (r["ground_by_experiment"] == 3) for r in known if r["ground_by_experiment"] is not None]
    return {
        "n": len(known),
        "mae": float(np.mean(errors)) if errors else None,
        "largest": float(np.max(errors)) if errors else None,
        "within_0.1_eV": int(np.sum(np.array(errors) <= 0.1)),
        "signs_of_experiment": f"{sum(signs)} of {len(signs)}",
    }


def carbene_scans(models: Models) -> dict[str, Any]:
    """Energies along the angle of carbenes in both spin states, eV relative to free atoms."""
    angles = np.arange(90.0, 181.0, 5.0)
    result: dict[str, Any] = {"unit": "eV", "angles": angles.tolist(), "scans": {}}
    for name, (numbers, lengths) in CARBENES.items():
        curves: dict[str, dict[str, Any]] = {}
        for multiplicity, state in ((1, "singlet"), (3, "triplet")):
            frames = [bent(numbers, lengths, angle, multiplicity) for angle in angles]
            curves[state] = {"GFN2-xTB": [float(GFN2.label(f).energy or 0.0) for f in frames]}
            for model_name, model in models.items():
                values = energies(model, frames)
                curves[state][model_name] = None if np.isnan(values).any() else values.tolist()
        errors = {
            model_name: float(np.sqrt(np.mean([_deviation(c[model_name], c["GFN2-xTB"]) for c in curves.values()])))
            for model_name in models
            if all(c[model_name] is not None for c in curves.values())
        }
        result["scans"][name] = {"curves": curves, "rmse": errors}
    return result


def _deviation(values: Sequence[float], reference: Sequence[float]) -> float:
    return float(np.mean(np.square(np.array(values) - np.array(reference))))
