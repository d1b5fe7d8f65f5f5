"""Cost of a training step of SpookyNet on one CPU thread, by size of the network and of the molecules.

Loss of energies, forces and dipoles and all parameter gradients of a batch of about 512 atoms, float32. The molecules
are random gases of H, C, N and O atoms with the density of organic molecules, so that the number of neighbours is what
it is in molecules. Written with torch's operations and with the C++ kernel of the sums over neighbours, in turn; the
ratio is taken round by round and its median reported. Milliseconds are CPU time, which other programs on the machine
disturb less than wall time. `mixed` is a batch of all sizes (``batch_atoms`` of a recipe).

    python benchmarks/spookynet_training_step.py --structures 20000 --atoms 30 --epochs 50 --processes 4

also prints the hours that a training of that size takes with that many processes that have a core each.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from _common import machine, write
from rich.console import Console
from rich.table import Table

from openmm_mlff.data.structures import Structure
from openmm_mlff.training.batching import LabelledBatch, LabelledSet
from openmm_mlff.training.force_matching import batch_loss
from openmm_mlff.training.losses import LossWeights
from openmm_spookynet import SpookyNet, SpookyNetConfig

BATCH_ATOMS = 512
DENSITY = 0.095  # atoms per cubic angstrom
LOCAL: dict[str, Any] = {"attention": "none", "charge_conservation": "shared", "embed_after": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "published, F 64, T 3": {"num_features": 64, "num_modules": 3},
    "shared, F 64, T 3": {"num_features": 64, "num_modules": 3, **LOCAL},
    "shared, F 64, T 2": {"num_features": 64, "num_modules": 2, **LOCAL},
    "shared, F 48, T 3": {"num_features": 48, "num_modules": 3, **LOCAL},
    "shared, F 32, T 3": {"num_features": 32, "num_modules": 3, **LOCAL},
}


def gas(n: int, seed: int) -> Structure:
    """n atoms at least 1 angstrom apart in a cube, with labels."""
    random = np.random.default_rng(seed)
    length = (n / DENSITY) ** (1.0 / 3.0)
    placed: list[np.ndarray] = []
    while len(placed) < n:
        trial = random.random(3) * length
        if all(np.linalg.norm(trial - p) > 1.0 for p in placed):
            placed.append(trial)
    numbers = random.choice([1, 1, 6, 7, 8], n)
    if numbers.sum() % 2:
        numbers[0] = 7 if numbers[0] != 7 else 6
    return Structure(
        numbers,
        np.array(placed),
        energy=0.0,
        forces=random.normal(size=(n, 3)),
        dipole=np.zeros(3),
        group=f"{n}-{seed}",
    )


def step(model: SpookyNet, labelled: LabelledBatch, weights: torch.Tensor) -> float:
    """CPU seconds of the loss and its gradients."""
    start = time.process_time()
    loss, _ = batch_loss(model, labelled, weights)
    torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return time.process_time() - start


def measure(options: dict[str, Any], sizes: list[int], rounds: int) -> dict[str, Any]:
    """Both ways on one batch; milliseconds per structure and microseconds per atom of each."""
    torch.manual_seed(0)
    model = SpookyNet(SpookyNetConfig(elements=(1, 6, 7, 8), **options)).train()
    structures = [gas(n, seed) for seed, n in enumerate(sizes)]
    labelled = LabelledSet(structures, model).batch(range(len(structures)))
    weights = LossWeights(1.0, 1.0, 0.05).tensor(torch.float32, model.device)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for k in range(rounds + 1):
        for native in seconds:
            model.native_training = native
            spent = step(model, labelled, weights)
            if k > 0:
                seconds[native].append(spent)
    plain, kernel = (np.array(seconds[native]) for native in (False, True))
    atoms = sum(sizes)
    return {
        "structures": len(sizes),
        "atoms": atoms,
        "slots": int(labelled.batch.neighbors.index.shape[1]),
        "torch_us_per_atom": round(1e6 * float(np.median(plain)) / atoms, 1),
        "kernel_us_per_atom": round(1e6 * float(np.median(kernel)) / atoms, 1),
        "kernel_ms_per_structure": round(1e3 * float(np.median(kernel)) / len(sizes), 2),
        "ratio": round(float(np.median(plain / kernel)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--structures", type=int, default=20000)
    parser.add_argument("--atoms", type=float, default=30.0, help="mean number of atoms")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    batches = {str(n): [n] * (BATCH_ATOMS // n) for n in (10, 25, 60)}
    batches["mixed"] = random.choice([6, 12, 18, 25, 32, 45, 60, 90], 17).tolist()
    result: dict[str, Any] = {"machine": machine(), "batch_atoms": BATCH_ATOMS, "configs": {}}
    table = Table(title="training step on one thread: microseconds of CPU time per atom (torch / kernel)")
    table.add_column("network")
    for name in (*batches, "parameters", "hours"):
        table.add_column(name, justify="right")
    for name, options in CONFIGS.items():
        rows = {batch: measure(options, sizes, args.rounds) for batch, sizes in batches.items()}
        n_parameters = sum(p.numel() for p in SpookyNet(SpookyNetConfig(**options)).parameters())
        atoms = args.structures * args.atoms * args.epochs
        hours = atoms * rows["mixed"]["kernel_us_per_atom"] * 1e-6 / 3600.0 / args.processes
        result["configs"][name] = {
            "options": options,
            "parameters": n_parameters,
            "hours": round(hours, 2),
            "rows": rows,
        }
        cells = [f"{r['torch_us_per_atom']:.0f} / {r['kernel_us_per_atom']:.0f}" for r in rows.values()]
        table.add_row(name, *cells, str(n_parameters), f"{hours:.1f}")
    result["hours_for"] = {
        "structures": args.structures,
        "atoms": args.atoms,
        "epochs": args.epochs,
        "processes": args.processes,
    }
    Console(width=140).print(table)
    write("spookynet_training_step", result)


if __name__ == "__main__":
    main()
