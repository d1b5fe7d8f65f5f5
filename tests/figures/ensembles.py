"""What the JSON files say of the figures in docs/ensembles.md."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from .common import NUMBERS, Read

FRACTIONS = {2: "half as long", 3: "a third", 4: "a quarter"}


def figures(read: Read) -> Iterator[str]:
    training = read("spookynet_training_step")
    mixed = training["configs"]["published, F 64, T 3"]["rows"]["mixed"]
    yield (
        f"{training['batch_atoms']} atoms per batch of mixed sizes a step of the published size takes"
        f" {mixed['kernel_us_per_atom']:.0f} µs per atom on one thread with the native code,"
        f" {FRACTIONS[round(mixed['ratio'])]} of what it takes without"
    )
    transfer = read("spookynet_charge_transfer")
    ions = ("C10H3+", "C10H3-")
    off = {way: [abs(transfer[way][ion]["end"] - transfer[way][ion]["end_reference"]) for ion in ions]
           for way in ("told", "not_told")}  # fmt: skip
    # "gets a proton on a long polyyne right where one that is not told cannot": the charge at its far end
    assert max(off["told"]) < 0.02 and min(off["not_told"]) > 0.2
    step = read("ensemble_step")["molecules"]["spookynet-22"]
    yield (
        f"{NUMBERS[step['members']].capitalize()} SpookyNets of {step['atoms']} atoms take"
        f" {step['ensemble']['ratio_cpu']:.1f} times as long as the graph that torch compiles of one"
    )
    yield f"takes {FRACTIONS[round(1 / step['one_natively']['ratio_cpu'])]} as that graph"
    yield from guard(read)


def guard(read: Read) -> Iterator[str]:
    found = read("ensemble_guard")
    calm, summary = found["in_domain"], found["summary"]
    assert summary["in_domain_stopped"] == 0 and not summary["stopped_after_the_energy_was_wrong"]
    yield f"{NUMBERS[len(calm)]} runs of {calm[0]['ps']:.0f} ps at 300 K are not stopped"
    yield f"{NUMBERS[summary['hot_runs_stopped']]} of {NUMBERS[summary['hot_runs']]} at 2000 K are"
    pulled = [run for run in found["runs"] if "pulled" in run["name"]]
    assert len(pulled) == 2 and all(run["stopped_ps"] is not None for run in pulled)
    largest = max(run["largest_error_until_stopped_eV"] for run in found["runs"])
    yield f"within {ceil(10 * largest) / 10:.1f} eV of GFN2-xTB"
    yield f"go wrong by up to {max(run['largest_error_without_guard_eV'] for run in found['runs']):.1f} eV"
    yield f"The rank correlation of uncertainty and error of a force is {found['test']['spearman_force_atoms']:.2f}"
    assert abs(found["limit_eV_A"] / found["largest_validation_uncertainty_eV_A"] - 2) < 1e-3
    yield "(twice the largest uncertainty"
