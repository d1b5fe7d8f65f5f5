"""SpookyNets for biomolecules against GFN2-xTB, beside the published checkpoint on the same structures.

    python benchmarks/spookynet_bio.py --data FOLDER --model bio=FILE [--model other=FILE] [--part classes ...]

Parts, each in a section of spookynet_bio.json:

* classes: force and energy errors on the test split, by class, with standard errors by bootstrap over molecules;
  `half` counts the closed-shell classes in which a model's force MAE is at most half of the published one's;
* relative: energies of zwitterions and charged peptides relative to their neutral forms;
* far_waters: what 1 to 10 waters 60 angstrom away add to the energy of a peptide or an ion;
* splittings: singlets and triplets of small molecules, and the signs of experiment;
* carbenes: bending of carbenes in both spin states;
* transfers: frames of zwitterions and salt bridges, minimised: whether the proton moves where GFN2-xTB moves it.

The published checkpoint was fitted without spin polarisation, so that open shells have a row of their own, and that its
energies are shifted by those of free atoms without less with polarisation before they are compared. Labels of
far_waters, splittings and carbenes are made here. Parts that were not asked for stay in the JSON as they were.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bio_measures import (
    Models,
    carbene_scans,
    class_table,
    comparisons,
    known_to_all,
    relative_energies,
    size_consistency,
    splittings,
)
from _bio_molecules import unpolarised_shifts
from _bio_transfer import TRAINED, transfers
from _common import HERE, PUBLISHED, machine, write
from rich.console import Console
from rich.table import Table

from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure
from openmm_mlff.data.classes import OPEN_SHELL
from openmm_mlff.data.files import sha256_of
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.training.evaluation import find_model
from openmm_mlff.training.recipe import load_labelled

NAME = "spookynet_bio"
BIO_ELEMENTS = (1, 6, 7, 8, 9, 11, 12, 15, 16, 17, 19, 20, 35)
OTHER = "published"
console = Console(width=150)


def load_models(given: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models by name (``NAME=FILE``, or a shipped model's name), and what they are; the published one if it is here."""
    models, described = {}, {}
    for text in given:
        name, _, place = text.rpartition("=")
        path = find_model(place)
        models[name or path.stem] = load_potential(path)
        described[name or path.stem] = {"file": path.name, "sha256": sha256_of(path)}
    if PUBLISHED.exists():
        models[OTHER] = load_potential(PUBLISHED)
        # its energies are relative to atoms without spin polarisation
        models[OTHER].shift_atomic_energies(unpolarised_shifts(BIO_ELEMENTS))
        described[OTHER] = {"file": PUBLISHED.name, "sha256": sha256_of(PUBLISHED)}
    else:
        console.print(f"no {PUBLISHED.name} in the folder of shared data: nothing to compare with")
        described[OTHER] = {"skipped": "the checkpoint is not here"}
    return models, described


def part_classes(models: Models, structures: Sequence[Structure]) -> dict[str, Any]:
    found = comparisons(models, structures)
    tables = class_table(found)
    table = Table(title="mean absolute errors on the test split")
    for column in ("", "n", *(f"forces (meV/Å)\n{m}" for m in models), *(f"energy (meV/atom)\n{m}" for m in models)):
        table.add_column(column, justify="left" if not column else "right")
    for row in [r for rows in tables.values() for r in rows]:
        cells = [_cell(row[m], q) for q in ("forces_mae", "energy_mae") for m in models]
        table.add_row(row["name"], str(row["structures"]), *cells)
    console.print(table)
    result: dict[str, Any] = {"tables": tables, "half": _halved(tables["class"], list(models))}
    for name, (n, of) in result["half"].items():
        console.print(f"{name}: force MAE at most half of the published one's in {n} of {of} closed-shell classes")
    plot_classes(tables["class"], list(models))
    result["relative"] = relative_energies(found, structures)
    console.print(f"relative energies, mean absolute errors (eV): {result['relative']['mean_absolute']}")
    return result


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    error = row.get(f"{name}_error")
    return f"{row[name]:.1f}" if error is None else f"{row[name]:.1f} ± {error:.1f}"


def _halved(rows: Sequence[Mapping[str, Any]], names: list[str]) -> dict[str, list[int]]:
    if OTHER not in names:
        return {}
    closed = [row for row in rows if row["name"] not in OPEN_SHELL and "forces_mae" in row[OTHER]]
    return {
        name: [sum(2 * row[name]["forces_mae"] <= row[OTHER]["forces_mae"] for row in closed), len(closed)]
        for name in names
        if name != OTHER
    }


def part_far_waters(models: Models, structures: Sequence[Structure]) -> dict[str, Any]:
    result = size_consistency(models)
    names = ["GFN2-xTB", *models]
    table = Table(title="energy of n far waters beside a solute, less that of all apart (meV)")
    for column in ("solute", "n", *names):
        table.add_column(column, justify="left" if column == "solute" else "right")
    for row in result["rows"]:
        cells = ["-" if row[name] is None else f"{1e3 * row[name]:.1f}" for name in names]
        table.add_row(row["solute"], str(row["waters"]), *cells)
    console.print(table)
    return result


def part_splittings(models: Models, structures: Sequence[Structure]) -> dict[str, Any]:
    result = splittings(models)
    names = ["GFN2-xTB", *models]
    table = Table(title="E(triplet) - E(singlet), eV")
    for column in ("molecule", "ground state (experiment)", *names):
        table.add_column(column, justify="left" if column == "molecule" else "right")
    for row in result["rows"]:
        if "failed" in row:
            table.add_row(row["name"], row["failed"][:40])
            continue
        ground = {1: "singlet", 3: "triplet"}.get(row["ground_by_experiment"], "-")
        table.add_row(row["name"], ground, *("-" if row[n] is None else f"{row[n]:+.2f}" for n in names))
    console.print(table)
    for name, judged in result["models"].items():
        console.print(f"{name}: {judged}", highlight=False)
    return result


def part_carbenes(models: Models, structures: Sequence[Structure]) -> dict[str, Any]:
    result = carbene_scans(models)
    plot_carbenes(result, list(models))
    for name, scan in result["scans"].items():
        console.print(f"{name}: RMS deviation from GFN2-xTB (eV) {scan['rmse']}", highlight=False)
    return result


def part_transfers(models: Models, structures: Sequence[Structure]) -> dict[str, Any]:
    trained = [s for s in structures if s.group in TRAINED]
    result = transfers(models, [s for s in structures if s.group not in TRAINED], trained)
    table = Table(title="minima from frames whose protons were held (by the model too / by GFN2-xTB)")
    for column in ("", "groups", *(f"{what}\n{m}" for m in models for what in ("moved", "left"))):
        table.add_column(column, justify="right" if column else "left")
    for kind, row in result["kinds"].items():
        cells = [f"{row[m][what + '_too']} / {row[what + '_by_gfn2']}" for m in models for what in ("moved", "left")]
        table.add_row(kind, str(row["groups"]), *cells)
    console.print(table)
    return result


PARTS: dict[str, Callable[[Models, Sequence[Structure]], dict[str, Any]]] = {
    "classes": part_classes,
    "far_waters": part_far_waters,
    "splittings": part_splittings,
    "carbenes": part_carbenes,
    "transfers": part_transfers,
}
OF_DATA = ("classes", "transfers")


def plot_classes(rows: Sequence[Mapping[str, Any]], names: list[str]) -> None:
    """Force errors of every class and model, largest of the first model on top."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator

    shown = sorted(
        (r for r in rows if all("forces_mae" in r[n] for n in names)), key=lambda r: r[names[0]]["forces_mae"]
    )
    lines = np.arange(len(shown))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 0.27 * len(shown) + 1.2))
        errors = {name: np.array([r[name]["forces_mae"] for r in shown]) for name in names}
        if OTHER in names:
            axis.plot(errors[OTHER] / 2, lines, "|", color=GREY, markersize=9, label="half of published")
            axis.hlines(lines, errors[names[0]], errors[OTHER], color=GREY, linewidth=0.8, alpha=0.6, zorder=0)
        for k, name in reversed(list(enumerate(names))):
            colour = GREY if name == OTHER else (BLUE, ORANGE, "#3a8f4d", "#8055a8")[k % 4]
            axis.plot(errors[name], lines, "s" if name == OTHER else "o", color=colour, markersize=5, label=name)
        axis.set_yticks(lines, [f"{r['name']} ({r['structures']})" for r in shown])
        axis.set_ylim(-0.7, len(shown) - 0.3)
        axis.set_xscale("log")
        axis.set_xlabel("force MAE (meV/Å), molecules not seen in training")
        axis.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        for formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            formatter(lambda value, _: f"{value:g}")
        axis.grid(alpha=0.25, linewidth=0.5, which="both")
        axis.legend(loc="lower right", fontsize=8)
        figure.tight_layout()
    save_figure(figure, HERE / f"{NAME}_classes.png")


def plot_carbenes(result: Mapping[str, Any], names: list[str]) -> None:
    """Energies along the angle, GFN2-xTB as lines and models as symbols, each relative to its own lowest singlet."""
    plt = pyplot()
    scans = result["scans"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(scans), figsize=(3.1 * len(scans), 3.1), squeeze=False)
        for axis, (molecule, scan) in zip(axes[0], scans.items(), strict=True):
            for name in ["GFN2-xTB", *names[:2]]:
                if scan["curves"]["singlet"][name] is None:
                    continue
                lowest = min(scan["curves"]["singlet"][name])
                for state, colour in (("singlet", BLUE), ("triplet", ORANGE)):
                    style = {"GFN2-xTB": "-"}.get(name, "o" if name == names[0] else "x")
                    values = np.array(scan["curves"][state][name]) - lowest
                    axis.plot(result["angles"], values, style, color=colour, markersize=3.5, label=f"{state}, {name}")
            axis.set_title(molecule)
            axis.set_xlabel("angle (degrees)")
        axes[0, 0].set_ylabel("energy (eV)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=min(6, len(labels)), fontsize=8)
        figure.tight_layout(rect=(0, 0.09, 1, 1))
    save_figure(figure, HERE / f"{NAME}_carbenes.png")


def _digest(shards: Mapping[str, str]) -> str:
    """One checksum of the names and checksums of all shards."""
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="PATH", help="dataset folders; their test split is used")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models, described = load_models(args.model)
    path = HERE / f"{NAME}.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if result.get("models") != described:
        result = {}
    structures: list[Structure] = []
    if args.data:
        every, sources = load_labelled([Path(p) for p in args.data], "test")
        structures = known_to_all(models, every)
        result["data"] = {
            "sources": [
                {**source, "shards": len(source["shards"]), "sha256_of_shards": _digest(source["shards"])}
                for source in sources
            ],
            "structures": len(structures),
            "unknown_to_a_model": len(every) - len(structures),
        }
    result |= {"models": described, "machine": machine()}
    for name in args.part or PARTS:
        if name in OF_DATA and not args.data:
            parser.error(f"--data: the part {name} needs a dataset")
        more: list[Structure] = []
        if name == "transfers":
            more = [s for s in load_labelled([Path(p) for p in args.data], "train")[0] if s.group in TRAINED]
        result[name] = PARTS[name](models, [*structures, *more])
    write(NAME, result)


if __name__ == "__main__":
    main()
