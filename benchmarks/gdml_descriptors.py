"""Descriptors by algorithmic differentiation: the numbers of the closed form, and faster than dense Hessians.

The published GDML models of the shared data, whose descriptor is inverse distances, run once in closed form and once
with the same descriptor as a plain function of positions that only `torch.func` and autograd know. Both routes of the
comparison use one thread and float64. Routes, for the forces at one geometry and for K alpha of training (M = 20):

* dense: every block d^2 k / dr dr' by `jacfwd(grad)`, ``3N x 3N``, then times alpha;
* forward over reverse: the pull-back of the query and the push of alpha, without a block or a Jacobian
  (`AlgorithmicOperator.matvec`; for one query `jvp(grad)`, mapped over the training geometries);
* contracted: A_j = J_j alpha_j once for the model, then one pull-back for each query, which is what MD runs;
* closed: the written-out form on torch.

Ratios are taken round by round and their median reported.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import SHARED, machine, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

from openmm_gdml.algorithmic import AlgorithmicOperator
from openmm_gdml.descriptors import register
from openmm_gdml.kernel import kappa
from openmm_gdml.model import GDMLPotential
from openmm_gdml.operators import KernelOperator
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

TRAINING = 20


def plain_inverse_distances(positions: Tensor) -> Tensor:
    """1/|r_i - r_j| as anybody would write it."""
    i, j = torch.tril_indices(positions.shape[-2], positions.shape[-2], -1)
    return (positions[..., i, :] - positions[..., j, :]).square().sum(-1).rsqrt()


register("plain_inverse_distances", plain_inverse_distances)


def by_differentiation(model: GDMLPotential) -> GDMLPotential:
    """The same model with a descriptor of which nothing but its value is known."""
    state = model.state_dict()
    return GDMLPotential.from_coefficients(
        model.config.numbers, model.config.sigma, state["descriptors"], state["coefficients"], float(state["shift"]),
        state["permutations"], state.get("energy_coefficients"), descriptor="plain_inverse_distances",
    )  # fmt: skip


def kernel(model: GDMLPotential) -> Callable[[Tensor, Tensor], Tensor]:
    """k(r, r') of flat positions, summed over permutations of r'."""
    permutations, sigma = model.permutations, model.config.sigma

    def k(r: Tensor, other: Tensor) -> Tensor:
        x, y = (plain_inverse_distances(z) for z in (r.view(-1, 3), other.view(-1, 3)[permutations]))
        return kappa((x - y).square().sum(-1), sigma).sum()

    return k


def dense(model: GDMLPotential) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Forces at queries ``(n, 3N)`` from geometries ``(M, 3N)`` and alphas, by blocks ``3N x 3N``."""
    block = jacfwd(grad(kernel(model), argnums=0), argnums=1)

    def forces(query: Tensor, r: Tensor, alpha: Tensor) -> Tensor:
        return torch.stack([(vmap(block, (None, 0))(q, r) @ alpha[..., None]).sum(0)[:, 0] for q in query])

    return forces


def forward_over_reverse(model: GDMLPotential) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same, each alpha pushed through the gradient by the query."""
    k = kernel(model)

    def one(query: Tensor, r: Tensor, alpha: Tensor) -> Tensor:
        return jvp(lambda other: grad(k)(query, other), (r,), (alpha,))[1]

    def forces(query: Tensor, r: Tensor, alpha: Tensor) -> Tensor:
        return torch.stack([vmap(one, (None, 0, 0))(q, r, alpha).sum(0) for q in query])

    return forces


def seconds(run: Callable[[], Any], least: float = 0.2) -> float:
    """Of one call, of as many as take `least` seconds."""
    run()
    calls, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < least:
        run()
        calls += 1
    return spent / calls


def ratios(routes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of each route, and median ratio of the dense route to it."""
    times = {name: [] for name in routes}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, run in routes.items():
            times[name].append(seconds(run))
    slow = np.array(times["dense"])
    return {name: {"ms": round(1e3 * float(np.median(t)), 4), "ratio": round(float(np.median(slow / t)), 1)}
            for name, t in times.items()}  # fmt: skip


def agreement(model: GDMLPotential, other: GDMLPotential, positions: Tensor) -> dict[str, float]:
    """Largest differences from the closed form, kcal/mol and kcal/mol/angstrom."""
    energy, forces = model.energies_and_forces(positions)
    contracted = other.energies_and_forces(positions)
    r = positions.clone().requires_grad_(True)
    differentiated = other.energy_of(r)
    (gradient,) = torch.autograd.grad(differentiated.sum(), r)
    unit = EV_PER_KCAL_PER_MOL
    return {
        "energy": float((contracted[0] - energy).abs().max()) / unit,
        "forces": float((contracted[1] - forces).abs().max()) / unit,
        "energy_by_autograd": float((differentiated.detach() - energy).abs().max()) / unit,
        "forces_by_autograd": float((-gradient - forces).abs().max()) / unit,
    }


def measure(path: Any, rounds: int) -> dict[str, Any]:
    """One model: agreement over its reference geometries, and times."""
    model = load_potential(path)
    assert isinstance(model, GDMLPotential)
    other = by_differentiation(model)
    with np.load(str(path).replace("_model", "_ref"), allow_pickle=False) as data:
        positions = torch.from_numpy(data["R"])
    r, n = positions[:TRAINING], 3 * len(model.config.numbers)
    random = torch.from_numpy(np.random.default_rng(0).normal(size=(TRAINING, n)))
    flat, m = r.flatten(1), model.config.n_train
    # training geometries are not in the files; as many others take the same time
    many = positions[torch.arange(m) % len(positions)].flatten(1)
    alpha = torch.from_numpy(np.random.default_rng(1).normal(size=(m, n)))
    operator = AlgorithmicOperator(r, model.config.sigma, plain_inverse_distances, model.permutations)
    closed = KernelOperator(r, model.config.sigma, model.permutations)
    v = random.flatten()
    by_blocks = dense(model)(flat, flat, random).flatten()
    product = float((operator.matvec(v) - by_blocks).abs().max() / by_blocks.abs().max())
    query = positions[:1]
    prediction = ratios({
        "dense": lambda: dense(model)(query.flatten(1), many, alpha),
        "forward_over_reverse": lambda: forward_over_reverse(model)(query.flatten(1), many, alpha),
        "contracted": lambda: other.energies_and_forces(query),
        "closed": lambda: model.energies_and_forces(query),
    }, rounds)  # fmt: skip
    training = ratios({
        "dense": lambda: dense(model)(flat, flat, random),
        "forward_over_reverse": lambda: operator.matvec(v),
        "closed": lambda: closed.matvec(v),
    }, rounds)  # fmt: skip
    return {
        "atoms": n // 3, "geometries": m, "permutations": model.config.n_permutations,
        "difference": agreement(model, other, positions), "difference_of_matvec_from_dense": product,
        "prediction": prediction, "training": training,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = SHARED / "data" / "gdml"
    paths = sorted(p for p in folder.glob("*_model.npz") if not p.name.startswith("cu27"))
    if not paths:
        raise SystemExit(f"no models in {folder.name} of the folder of shared data; OPENMM_MLFF_SHARED names it")
    results, console = {}, Console(width=120)
    shown = Table("model", "dE", "dF", "F: dense ms", "f-o-r", "contr.", "closed", "K: dense ms",
                  "f-o-r", "closed")  # fmt: skip
    for path in paths:
        row = results[path.name.removesuffix("_model.npz")] = measure(path, args.rounds)
        console.print(path.name, row)
        p, t = row["prediction"], row["training"]
        shown.add_row(
            path.name.removesuffix("_model.npz"), f"{row['difference']['energy']:.0e}",
            f"{row['difference']['forces']:.0e}", f"{p['dense']['ms']:.1f}",
            *(f"{p[name]['ratio']:.0f}x" for name in ("forward_over_reverse", "contracted", "closed")),
            f"{t['dense']['ms']:.0f}", *(f"{t[name]['ratio']:.0f}x" for name in ("forward_over_reverse", "closed")),
        )  # fmt: skip
    console.print(shown)
    largest = max(r["difference"]["forces"] for r in results.values())
    least = min(r[kind][route]["ratio"] for r in results.values()
                for kind, route in (("prediction", "contracted"), ("training", "forward_over_reverse")))  # fmt: skip
    console.print(
        f"largest difference of forces {largest:.1e} kcal/mol/angstrom (gate 1e-7); least ratio {least:.0f} (20)"
    )
    write("gdml_descriptors", {"machine": machine(), "largest_difference": largest, "least_ratio": least,
                               "models": results})  # fmt: skip


if __name__ == "__main__":
    main()
