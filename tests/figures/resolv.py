"""What the JSON files say of the figures in docs/resolv.md."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import hypot
from typing import Any

from .common import NUMBERS, Read, rounded, significant, within


def figures(read: Read) -> Iterator[str]:
    return chain(batches(read), training(read), hydration(read), conformers(read), cost(read), nequip(read))


def batches(read: Read) -> Iterator[str]:
    runs = [read("molecules")["speed"][threads]["64"] for threads in ("1", "2", "4")]
    times, gains = [f"{r['step_us']:.0f}" for r in runs], [f"{r['gain']:.1f}" for r in runs]
    yield f"{times[0]}, {times[1]} and {times[2]} µs per molecule and step with 1, 2 and 4 threads"
    yield f"{gains[0]}, {gains[1]} and {gains[2]} times less than runs of one molecule"


def training(read: Read) -> Iterator[str]:
    labels, networks, water = read("resolv_labels"), read("resolv_networks"), read("resolv_water")
    frames = sum(part["labelled"] for part in labels["rounds"].values())
    of, test = labels["molecules"], networks["test"]
    yield f"for {frames:,} structures of {of['of FreeSolv']} training molecules of FreeSolv, {of['others']} others"
    yield f"and {of['capped']} capped amino acids"
    *lower, highest = (str(temperature) for temperature in labels["temperatures_K"])
    yield f"from MD at {', '.join(lower)} and {highest} K"
    features, layers = networks["network"].removeprefix("f").split("l")
    yield f"SO3krates with {NUMBERS[int(layers)]} layers of {features} features"
    yield (
        f"of the {test['molecules']} test molecules at 298 K are off by"
        f" {rounded(test['vacuum_forces_mae_kcal_mol_A'], 1)} kcal/mol/Å"
    )
    yield f"a step of one of 64 molecules takes {rounded(networks['us_per_molecule_step'])} µs on one thread"
    yield f"within {rounded(test['solvation_energy_mae_kcal_mol'], 1)} kcal/mol of GFN2-xTB's on test molecules"
    used, trainings = water["molecules"], water["trainings"]
    last, sampling = trainings[-1], trainings[-1]["options"]["sampling"]
    yield f"{used['train']} measured free energies, with {used['valid']} others to choose the round"
    yield f"{len(water['left_out'])} molecules broke and were left out"
    steps, rounds = (
        sum(part(t) for t in trainings) for part in (lambda t: t["steps"], lambda t: t["options"]["rounds"])
    )
    yield f"{steps:,.0f} steps in {rounds} rounds"
    yield f"ensembles of {sampling['length'] / sampling['interval']:.0f} frames over {sampling['length']:.0f} ps"
    kept = next(r for r in last["rounds"] if r["round"] == last["best_round"])
    yield f"{trainings[0]['rounds'][0]['valid_mae_kt']:.2f} kT at the start"
    yield f"{kept['valid_mae_kt']:.2f} kT in the round kept"
    yield f"own molecules were at {last['rounds'][-1]['train_mae_kt']:.2f} kT"
    yield f"the last {last['options']['rounds']} at a smaller learning rate"
    earlier = read("resolv_vacuum")
    chosen = earlier["networks"][earlier["chosen"]]
    yield f"{rounded(chosen['test']['forces_mae_kcal_mol_A'], 1)} kcal/mol/Å on its test molecules"
    yield f"{NUMBERS[int(earlier['chosen'][-1])]} layers) and started"


def hydration(read: Read) -> Iterator[str]:
    found, known = read("resolv_hydration"), read("resolv_networks")["test"]["molecules"]
    settings, broken = found["settings"], len(found["without_figure"])
    tried = len(found["rows"]) + broken
    yield f"the first {tried} of the {known} test molecules" if tried < known else f"the {known} test molecules"
    yield f"{settings['ps']:.0f} ps in vacuum and {settings['ps']:.0f} ps in water each"
    if broken:
        yield f"{NUMBERS[broken].capitalize()} broke and {'has' if broken == 1 else 'have'} no figure"

    def figure(row: dict[str, Any], quantity: str) -> str:
        return f"{rounded(row[quantity], 2)} ± {rounded(row[f'{quantity}_error'], 2)}"

    names = {
        "this pair": "pair",
        "GAFF in TIP3P (FreeSolv)": "GAFF",
        "this pair, molecules never looked at": "pair, fresh",
        "GAFF, the same molecules": "GAFF, fresh",
    }
    for label, name in names.items():
        row = found["table"][name]
        mean = ("−" if row["mean_error"] < 0 else "+") + rounded(abs(row["mean_error"]), 2)
        errors = f"{figure(row, 'mae')} | {figure(row, 'rmse')} | {mean} | {rounded(row['median_error'], 2)}"
        yield f"| {label} | {row['molecules']} | {errors} |"
    others = {"kernel ridge regression on pair histograms": "kernel_ridge",
              "the published pair, mean energies instead of free energies": "published_pair"}  # fmt: skip
    for label, name in others.items():
        row = found[name]
        yield f"| {label} | {row['molecules']} | {rounded(row['mae'], 2)} | {rounded(row['rmse'], 2)} | | |"
    yield f"| mean experimental uncertainty | | {rounded(found['mean_experimental_uncertainty'], 2)} | | | |"
    gain = found["gaff_minus_pair"]
    low, high = (rounded(gain[end], 2).replace("-", "−") for end in ("low", "high"))
    yield f"by {rounded(abs(gain['mae_difference']), 2)} kcal/mol (95 % interval {low} to {high})"
    off = {row["name"]: abs(row["predicted"] - row["experiment"]) for row in found["rows"]}
    first, second = (rounded(round(off[name], 3), 1) for name in found["worst"][:2])
    yield f"{first} and {second} kcal/mol"
    low = [rounded(off[name], 1) for name in ("1-methylpyrrole", "pyrrole")]
    yield f"and pyrrole are predicted too low by {low[0]} and {low[1]}"
    yield f"Statistical errors are {rounded(found['mean_statistical_error'], 2)} kcal/mol on average"


def conformers(read: Read) -> Iterator[str]:
    found = read("resolv_conformers")
    lengths = {name: f"{rows['ps']:.0f} ps" for name, rows in found["populations"].items()}
    yield (
        f"{found['settings']['replicas']} replicas of {lengths['1,2-dimethoxyethane']}, "
        f"dichloroethane {lengths['1,2-dichloroethane']}), vacuum → water"
    )
    assert lengths["alanine dipeptide"] == lengths["1,2-dimethoxyethane"]

    def share(figure: dict[str, float]) -> str:
        percent, error = 100 * figure["share"], 100 * figure["error"]
        digits = 1 if error < 0.95 else 0
        return f"{percent:.{digits}f} ± {error:.{digits}f} %"

    ends = [found["populations"]["1,2-dichloroethane"][phase]["gauche"] for phase in ("vacuum", "water")]
    apart = 100 * (ends[1]["share"] - ends[0]["share"])
    yield f"by little ({apart:.1f} ± {100 * hypot(ends[0]['error'], ends[1]['error']):.1f} points"

    names = {"1,2-dichloroethane": {"gauche": "gauche 1,2-dichloroethane"},
             "1,2-dimethoxyethane": {"gauche": "gauche 1,2-dimethoxyethane"},
             "alanine dipeptide": {"C7 (ring)": "ring C7", "PII, C5": "PII and C5", "alpha R": "αR"}}  # fmt: skip
    explicit = found["alanine_dipeptide_TIP3P"]
    for molecule, labels in names.items():
        phases = found["populations"][molecule]
        for basin, label in labels.items():
            explicitly = molecule == "alanine dipeptide" and basin != "C7 (ring)"
            beside = f" (TIP3P {rounded(round(100 * explicit[basin], 3))} %)" if explicitly else ""
            yield f"{label} {share(phases['vacuum'][basin])} → {share(phases['water'][basin])}{beside}"


def cost(read: Read) -> Iterator[str]:
    methods = read("resolv_speed")["methods"]
    labels = {"the pair, one solute": "pair, water, 1 in one System",
              "the pair, 64 solutes in one System": "pair, water, 64 in one System",
              "ff99SB-ILDN in TIP3P, PME": "TIP3P", "ff99SB-ILDN with OBC2": "OBC2"}  # fmt: skip
    for label, name in labels.items():
        row = methods[name]
        step, gain = row["us_per_solute_step"], row["over_TIP3P"]
        times = f"{step / 1000:.1f} ms" if step >= 1000 else f"{step:.0f} µs"
        over = "1" if name == "TIP3P" else f"{gain:.{1 if gain < 10 else 0}f}"
        rates = f"{significant(row['steps_per_second'])} | {times} | {significant(row['solute_ns_per_day'])}"
        yield f"| {label} | {row['timestep_fs']:.0f} fs | {rates} | {over} |"


def nequip(read: Read) -> Iterator[str]:
    found = read("nequip_step")
    sizes = found["results"]
    yield f"One energy with forces of {found['atoms']} atoms"
    for precision in ("double", "single"):
        times = [row["median_ms"] for row in sizes["full"][precision].values()]
        yield f"| {precision} | {' | '.join(f'{time:.0f} ms' for time in times)} |"
    yield f"within {largest_difference(read)} of its numbers in double precision"


def largest_difference(read: Read) -> str:
    """The largest difference from jax-md's numbers in double precision."""
    rows = [row for size in read("nequip_step")["results"].values() for row in size["double"].values()]
    return within(max(max(row["energy_error"], row["force_error"]) for row in rows))
