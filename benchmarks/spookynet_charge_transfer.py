"""Does a SpookyNet know the total charge? Polyynes that differ by a charge, learned with and without it.

    python benchmarks/spookynet_charge_transfer.py [--steps 1500] [--processes 2]

C10H2, C10H3+ and C10H3- are chains of ten carbon atoms; a proton (or a hydride) at one end changes the bonds and
charges of the whole chain (after Ko, Finkler, Goedecker, Behler, Nat. Commun. 12, 398 (2021), whose set has the first
two). C10H3+ and C10H3- have the same atoms at nearly the same places, so that what tells them apart is the total
charge alone. Two networks of one size are trained on the same frames, one of which is told that every charge is zero.
Frames are GFN2-xTB minima with Gaussian displacements; errors are those of frames that were not trained on. `end` is
the charge of the far end (CCCH), which the reference gives by Mulliken and the networks by what dipoles taught them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bio_molecules import GFN2
from _common import HERE, machine, write
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from openmm_mlff.analysis.errors import error_table
from openmm_mlff.data.structures import Structure
from openmm_mlff.training import loop
from openmm_mlff.training.evaluation import compare
from openmm_mlff.training.force_matching import ForceMatching
from openmm_mlff.training.loop_options import LoopOptions
from openmm_mlff.training.losses import LossWeights
from openmm_spookynet import SpookyNet, SpookyNetConfig

SIGMA = 0.04  # angstrom
NUMBERS = {"train": 150, "valid": 30, "test": 60}
KINDS = {"C10H2": (2, 0), "C10H3+": (3, 1), "C10H3-": (3, -1)}
FAR_END = [7, 8, 9, 11]  # the last three carbon atoms and their hydrogen


def chain(hydrogens: int, charge: int) -> Structure:
    """The minimum of a chain along x: atoms 0 to 9 are carbon, 10 is the first atom's hydrogen, 11 the last one's."""
    bonds = [1.22 if k % 2 == 0 else 1.35 for k in range(9)]
    x = np.concatenate([[0.0], np.cumsum(bonds)])
    positions = np.zeros((10 + hydrogens, 3))
    positions[:10, 0] = x
    positions[11] = [x[-1] + 1.06, 0.02, 0.0]
    if hydrogens == 2:
        positions[10] = [-1.06, 0.0, 0.02]
    else:
        positions[10], positions[12] = [-0.55, 0.93, 0.0], [-0.55, -0.93, 0.0]
    start = Structure(np.array([6] * 10 + [1] * hydrogens), positions, charge=charge)
    driver = GFN2.driver(start)

    def function(y: np.ndarray) -> tuple[float, np.ndarray]:
        energy, forces = driver(y.reshape(-1, 3))
        return energy, -forces.ravel()

    found = minimize(function, start.positions.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 400})
    return start.replace(positions=found.x.reshape(-1, 3))


def frames() -> dict[str, list[Structure]]:
    """Labelled frames of all kinds by split."""
    random = np.random.default_rng(11)
    result: dict[str, list[Structure]] = {split: [] for split in NUMBERS}
    for name, (hydrogens, charge) in KINDS.items():
        lowest = chain(hydrogens, charge)
        for split, n in NUMBERS.items():
            for _ in range(n):
                moved = lowest.replace(
                    positions=lowest.positions + random.normal(0.0, SIGMA, lowest.positions.shape),
                    group=f"{name}/{split}",
                    info={"kind": name},
                )
                result[split].append(GFN2.label(moved))
    return result


def blind(structures: Sequence[Structure]) -> list[Structure]:
    """The same frames with every charge said to be zero; dipoles, which then depend on the origin, are left out."""
    return [s.replace(charge=0, dipole=None if s.charge else s.dipole) for s in structures]


def train(data: dict[str, list[Structure]], steps: int, processes: int, folder: Path) -> loop.TrainingState:
    """The network of both, from one seed."""
    torch.manual_seed(0)
    config = SpookyNetConfig(
        num_features=32,
        attention="none",
        charge_conservation="local",
        embed_after=1,
        elements=(1, 6),
        charges=(-1, 0, 1),
    )
    model = SpookyNet(config).train()
    weights = [LossWeights(energy=e, forces=1.0, dipole=0.1) for e in (0.05, 2.0)]
    method = ForceMatching(
        model, data["train"], data["valid"], *weights, batch_size=64, processes=processes, batch_atoms=256, native=True
    )
    options = LoopOptions(
        steps=steps, learning_rate=2e-3, final_learning_rate=2e-5, warmup_steps=100, validate_every=250, ema_decay=0.99
    )
    try:
        return loop.fit(model, method, options, folder, resume=True, title=folder.name)
    finally:
        method.close()


def judge(state: loop.TrainingState, structures: list[Structure], truth: list[Structure]) -> dict[str, Any]:
    """Errors of energies and forces by kind, and the mean charge of the far end."""
    with loop.averaged(state) as model:
        rows = {row["name"]: row for row in error_table(compare(model, structures), "kind")}  # type: ignore[arg-type]
        result: dict[str, Any] = {}
        for kind in KINDS:
            picked = [i for i, s in enumerate(truth) if s.info["kind"] == kind]
            ends = [model(model.batch(structures[i])).charges[FAR_END].sum().item() for i in picked]  # type: ignore[operator]
            mulliken = [float(charges[FAR_END].sum()) for i in picked if (charges := truth[i].charges) is not None]
            result[kind] = {
                "forces_mae": rows[kind]["forces_mae"],
                "energy_mae": rows[kind]["energy_mae"],
                "end": float(np.mean(ends)),
                "end_reference": float(np.mean(mulliken)),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE.parent / ".work" / "charge_transfer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = frames()
    sighted = judge(train(data, args.steps, args.processes, args.output / "with-charge"), data["test"], data["test"])
    unseeing = {split: blind(members) for split, members in data.items()}
    state = train(unseeing, args.steps, args.processes, args.output / "without-charge")
    blinded = judge(state, unseeing["test"], data["test"])
    table = Table(title="errors on frames not trained on: told the charge / not told")
    for column in ("", "forces (meV/Å)", "energy (meV/atom)", "charge of the far end (e)", "Mulliken"):
        table.add_column(column, justify="right")
    for kind in KINDS:
        a, b = sighted[kind], blinded[kind]
        table.add_row(
            kind,
            f"{a['forces_mae']:.0f} / {b['forces_mae']:.0f}",
            f"{a['energy_mae']:.1f} / {b['energy_mae']:.1f}",
            f"{a['end']:+.2f} / {b['end']:+.2f}",
            f"{a['end_reference']:+.2f}",
        )
    Console().print(table)
    result = {"steps": args.steps, "frames": NUMBERS, "told": sighted, "not_told": blinded, "machine": machine()}
    write("spookynet_charge_transfer", result)


if __name__ == "__main__":
    main()
