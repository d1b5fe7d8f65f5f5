"""Lattice sums of smeared charges: this package's Ewald and PME beside torch-pme's and mlipops', in water boxes.

The sum is that of SO3LR's charges, erf(r/sigma)/r with sigma = 4 angstrom over all images, in n x n x n copies of a box
of 64 waters with the model's own reference charges, moved a little at random (a copy would hide errors). Time: energy
with its gradients of positions and charges, one thread, median; errors: against the package's Ewald in double precision
and (once) against torch-pme's with a cutoff of 1 angstrom in wave length. torch-pme is not one of this package's
dependencies: ``pip install torch-pme mlipops``; what is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from _common import SHARED, machine, summary, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials.electrostatics import smeared_lattice_energy

SIGMA, COULOMB = 4.0, 14.399645351950548
Energy = Callable[[Tensor, Tensor], Tensor]


def water(copies: int, seed: int = 1) -> tuple[Batch, Tensor]:
    """``copies``^3 boxes of 64 waters, atoms displaced by 0.05 angstrom, and their charges."""
    data = np.load(SHARED / "data/so3lr/visible.npz", allow_pickle=False)
    name = "water_64_lr6/"
    cell = data[name + "cell"]
    shifts = [np.array(n) @ cell for n in product(range(copies), repeat=3)]
    positions = np.concatenate([data[name + "positions"] + shift for shift in shifts])
    positions = positions + np.random.default_rng(seed).normal(0.0, 0.05, positions.shape)
    structure = Structure(np.tile(data[name + "numbers"], len(shifts)), positions, cell=copies * cell)
    return collate([structure]), torch.tensor(np.tile(data[name + "partial_charges"], len(shifts)))


def ours(batch: Batch, method: str) -> Energy:
    return lambda positions, charges: smeared_lattice_energy(
        charges, batch.at(positions, batch.cell), SIGMA, method, COULOMB
    )


def torch_pme(batch: Batch, method: str, spacing: float, nodes: int = 5) -> Energy:
    import torchpme

    assert batch.cell is not None
    dtype, cell = batch.positions.dtype, batch.cell[0]
    # its Gaussians have a width of sigma / sqrt(2); an empty list of neighbours leaves the sum in reciprocal space
    potential = torchpme.CoulombPotential(smearing=SIGMA / 2**0.5).to(dtype)
    if method == "ewald":
        calculator = torchpme.EwaldCalculator(potential, lr_wavelength=spacing).to(dtype)
    else:
        calculator = torchpme.PMECalculator(potential, mesh_spacing=spacing, interpolation_nodes=nodes).to(dtype)
    nobody, nowhere = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=dtype)

    def energy(positions: Tensor, charges: Tensor) -> Tensor:
        q = charges[:, None]
        return COULOMB * (q * calculator(q, cell, positions, nobody, nowhere)).sum()

    return energy


def mlipops(batch: Batch, method: str, size: int) -> Energy:
    from mlipops.coulombewald import CoulombEwald
    from mlipops.coulombpme import CoulombPME
    from mlipops.neighborlist import NeighborList

    assert batch.cell is not None
    cell = batch.cell[0]
    neighbors = NeighborList(1.0)
    kinds: dict[str, Any] = {"ewald": (CoulombEwald, ()), "pme": (CoulombPME, (5,))}
    kind, order = kinds[method]
    calculator = kind(neighbors, None, size, size, size, *order, 1 / SIGMA, COULOMB)
    return lambda positions, charges: calculator(positions, charges, cell, include_direct=False)


def timed(energy: Energy, batch: Batch, charges: Tensor, repeats: int) -> tuple[list[Tensor], dict[str, float]]:
    """Energy and gradients in double precision, and the time that one takes."""
    positions, q = (x.to(batch.positions.dtype).clone().requires_grad_(True) for x in (batch.positions, charges))
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        value = energy(positions, q).sum()
        gradient = torch.autograd.grad(value, (positions, q))
        seconds.append(time.perf_counter() - begin)
    return [x.detach().double() for x in (value, *gradient)], summary(seconds[1:] or seconds)


def candidates(batch: Batch) -> dict[str, Energy]:
    """Every way to the sum whose library is installed; meshes and wave vectors of about the same fineness."""
    assert batch.cell is not None
    edge = float(batch.cell[0, 0, 0])
    ways = {"openmm-mlff ewald": ours(batch, "ewald"), "openmm-mlff pme": ours(batch, "pme")}
    if importlib.util.find_spec("torchpme"):
        ways["torch-pme ewald"] = torch_pme(batch, "ewald", 3.0)
        ways["torch-pme pme"] = torch_pme(batch, "pme", 1.5)
    if importlib.util.find_spec("mlipops"):
        ways["mlipops ewald"] = mlipops(batch, "ewald", max(3, round(2.04 * edge / (2 * np.pi))))
        ways["mlipops pme"] = mlipops(batch, "pme", 2 * round(edge / 1.25 / 2))
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2, 3, 4], help="of the box of 192 atoms, each way")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, rows = machine(), []
    for copies in args.copies:
        exact_batch, charges = water(copies)
        exact, _ = timed(ours(exact_batch, "ewald"), exact_batch, charges, 0)
        batch = exact_batch.to(dtype=torch.float32)
        for name, energy in candidates(batch).items():
            # the slowest ways would take all day in the largest boxes
            if "ewald" in name and "openmm" not in name and batch.n_atoms > 6000:
                continue
            value, cost = timed(energy, batch, charges, args.repeats)
            row = {"atoms": batch.n_atoms, "way": name, **cost}
            row["energy_error_meV_per_atom"] = 1e3 * abs(float(value[0] - exact[0])) / batch.n_atoms
            row["force_error_meV_per_angstrom"] = 1e3 * float((value[1] - exact[1]).abs().max())
            row["potential_error_mV"] = 1e3 * float((value[2] - exact[2]).abs().max())
            rows.append(row)
            print(row, flush=True)
    result: dict[str, Any] = {"machine": about, "sigma": SIGMA, "dtype": "float32", "rows": rows}
    if importlib.util.find_spec("torchpme"):
        batch, charges = water(2)
        theirs, _ = timed(torch_pme(batch, "ewald", 1.0), batch, charges, 0)
        own, _ = timed(ours(batch, "ewald"), batch, charges, 0)
        result["double_precision_against_torch_pme"] = {
            "energy_eV": abs(float(theirs[0] - own[0])),
            "force_eV_per_angstrom": float((theirs[1] - own[1]).abs().max()),
        }
    show(rows)
    write("lattice_sums", result)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("atoms", "way", "ms", "energy error, meV/atom", "force error, meV/A", title="float32, one thread")
    for row in rows:
        errors = (f"{row[k]:.1e}" for k in ("energy_error_meV_per_atom", "force_error_meV_per_angstrom"))
        table.add_row(str(row["atoms"]), row["way"], f"{row['median_ms']:.1f}", *errors)
    Console().print(table)


if __name__ == "__main__":
    main()
