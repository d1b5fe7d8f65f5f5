"""Time of one evaluation of an ensemble (energies, forces and their spread) against one compiled member.

Four members with random weights, float32, one thread, Ace-Ala-NMe (22 atoms) and other sizes on request. SpookyNet with
its published sizes (no D4): the ensemble runs as one piece of native code, `one_member` as the graph that torch
compiles, `one_natively` as it runs in simulations. SO3krates with the sizes of SO3LR's network: member after member,
each by its native code.

In every round all kinds run the same new geometries in turn; ratios are taken round by round and their median reported.
`cpu` is the time that the thread was running, which other programs on the machine do not lengthen; `wall` is what a
clock shows. `one_by_one` runs the same four SpookyNets one after the other, each by its own native code.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from _common import machine, peptide, rattled, write
from _timing import FRAMES, RESIDUES, in_turn, randomised
from rich.console import Console
from rich.table import Table

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import Ensemble, EnsembleEvaluator
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.potential import Potential
from openmm_so3krates import SO3krates, SO3kratesConfig
from openmm_spookynet import SpookyNet, SpookyNetConfig


def spookynet(seed: int) -> Potential:
    torch.manual_seed(seed)
    return randomised(SpookyNet(SpookyNetConfig()))


def so3krates(seed: int) -> Potential:
    torch.manual_seed(seed)
    return randomised(SO3krates(SO3kratesConfig()))


def compare(members: list[Potential], structure: Structure, rounds: int, separately: bool) -> dict[str, Any]:
    ensemble = Ensemble(members)
    natively = members[0].evaluator(structure, compile=True)
    kinds: dict[str, Evaluator] = {"one_member": natively, "ensemble": ensemble.evaluator(structure, compile=True)}
    if isinstance(members[0], SpookyNet):
        # what ran before a single one had native code
        graph = Evaluator(members[0], members[0].batch(structure), ("energy", "forces"), compile=True)
        kinds |= {"one_member": graph, "one_natively": natively}
    if separately:
        apart = ensemble.evaluator(structure, compile=True)
        assert isinstance(apart, EnsembleEvaluator)
        apart._fall_back()
        kinds["one_by_one"] = apart
    frames = rattled(structure, FRAMES)
    found = {name: evaluator.arrays(frames[0]) for name, evaluator in kinds.items()}
    for name, evaluator in kinds.items():
        if not evaluator.compiled:
            raise RuntimeError(f"{name}: no compiled code was used")
    times = in_turn(kinds, frames, rounds)
    alone = np.stack([m.energy_and_forces(structure.replace(positions=frames[0]))[1] for m in members])
    result: dict[str, Any] = {"members": len(members), "atoms": len(structure)}
    result["forces_differ_from_members_alone_eV_A"] = float(np.abs(found["ensemble"][1] - alone.mean(axis=0)).max())
    for name in kinds:
        result[name] = times.summary(name)
    for name in list(kinds)[1:]:
        result[name] |= {f"ratio_{clock}": times.ratio(name, "one_member", clock) for clock in ("cpu", "wall")}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, nargs="+", default=[22, 62], choices=list(RESIDUES))
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--one-by-one", action="store_true", help="SpookyNets apart as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "molecules": {}}
    table = Table("family", "atoms", "one member [ms]", "ensemble [ms]", "ratio", "ratio (wall)", "one by one")
    for family, make in (("spookynet", spookynet), ("so3krates", so3krates)):
        models = [make(seed) for seed in range(1, arguments.members + 1)]
        for n in arguments.atoms:
            separately = arguments.one_by_one and family == "spookynet"
            row = compare(models, peptide(RESIDUES[n]), arguments.rounds, separately)
            result["molecules"][f"{family}-{n}"] = row
            apart = f"{row['one_by_one']['ratio_cpu']:.2f}" if separately else "-"
            times = [f"{row[kind]['cpu']['median_ms']:.2f}" for kind in ("one_member", "ensemble")]
            ratios = [f"{row['ensemble'][f'ratio_{clock}']:.2f}" for clock in ("cpu", "wall")]
            table.add_row(family, str(n), *times, *ratios, apart)
    Console().print(table)
    write("ensemble_step", result)


if __name__ == "__main__":
    main()
