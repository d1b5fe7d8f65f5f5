"""Solvers of GDML's linear system: what preconditioners buy, and a training set that the direct solution cannot hold.

1. Ethanol, sigma 20, lambda 1e-10, 12 permutations (the shared model's): iterations and time of conjugate gradients to
   a relative residual of 1e-4 against the number of inducing columns, for the four choices of columns. Choosing the
   columns and building the preconditioner counts; times are CPU times of one thread. `eigen` uses the eigenvectors of
   the whole matrix and is there as the best that a rank can do. Runs stop at 1500 iterations. Models from every
   converged run are compared with the direct solution at the 200 test geometries, which neither training nor any choice
   has seen.
2. A training set whose direct solution does not fit into 4 GB, solved within that limit in a process of its own, whose
   largest resident memory is measured.

Parts that are in the JSON already are kept with --keep.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from typing import Any

import numpy as np
import torch
from _common import HERE, SHARED, machine, write

from openmm_gdml.model import GDMLPotential
from openmm_gdml.operators import KernelOperator
from openmm_gdml.solvers import Solution, cholesky_memory, solve
from openmm_mlff.data.formats import read_sgdml_npz
from openmm_mlff.data.structures import Structure
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

SIGMA, LAM, TOLERANCE = 20.0, 1e-10, 1e-4
CHOICES = ("uniform", "leverage", "cholesky", "eigen")
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
#: every one costs a diagonalisation of the whole matrix
EIGEN_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
MOST_ITERATIONS = 1500
LIMIT = "4 GB"


class Ethanol:
    """The shared data set with the split and the permutations of the shared model of 200 points."""

    def __init__(self) -> None:
        folder = SHARED / "data" / "gdml"
        if not (folder / "dataset_ethanol.npz").exists():
            raise SystemExit("no gdml/dataset_ethanol.npz among the shared data; OPENMM_MLFF_SHARED names that folder")
        self.all = read_sgdml_npz(folder / "dataset_ethanol.npz")
        model = np.load(folder / "ethanol_M200_S12_model.npz", allow_pickle=False)
        self.train, self.valid = model["idxs_train"].astype(int), model["idxs_valid"].astype(int)
        self.permutations = np.asarray(model["perms"], dtype=np.int64)
        self.test = np.load(folder / "ethanol_M200_S12_ref.npz", allow_pickle=False)["idx"].astype(int)

    def take(self, indices: np.ndarray) -> list[Structure]:
        return [self.all[i] for i in indices]


class Problem:
    """(K + lambda) alpha = y of a training set, and the error of a solution on the test geometries."""

    def __init__(self, data: Ethanol, train: np.ndarray) -> None:
        structures, self.permutations = data.take(train), data.permutations
        self.numbers = structures[0].numbers
        self.positions = torch.from_numpy(np.stack([s.positions for s in structures]))
        forces = torch.from_numpy(np.stack([s.forces for s in structures]))
        self.scale = float(forces.std(correction=0))
        self.y = forces.flatten() / self.scale
        self.operator = KernelOperator(self.positions, SIGMA, self.permutations)
        test = data.take(data.test)
        self.test_positions = torch.from_numpy(np.stack([s.positions for s in test]))
        self.test_forces = torch.from_numpy(np.stack([s.forces for s in test]))

    def forces(self, solution: Solution) -> torch.Tensor:
        """Of the test geometries, kcal/mol/angstrom."""
        first, _, _ = self.operator.model_terms(solution.alpha * self.scale)
        model = GDMLPotential.from_coefficients(
            self.numbers, SIGMA, self.operator.descriptors, first, 0.0, self.permutations, lam=LAM
        )
        return model.energies_and_forces(self.test_positions)[1] / EV_PER_KCAL_PER_MOL

    def mae(self, forces: torch.Tensor) -> float:
        return float((forces - self.test_forces / EV_PER_KCAL_PER_MOL).abs().mean())


def preconditioners(data: Ethanol, kept: list[dict[str, Any]], save: Any) -> dict[str, Any]:
    """The table of part 1; `save` is called after every row."""
    problem = Problem(data, data.train)
    operator = problem.operator
    started = time.process_time()
    direct = solve(operator, problem.y, "cholesky", LAM, memory="8 GB")
    seconds = time.process_time() - started
    exact = problem.forces(direct)
    result: dict[str, Any] = {
        "points": len(data.train),
        "unknowns": operator.n,
        "permutations": len(problem.permutations),
        "direct": {"seconds": round(seconds, 2), "forces_mae": round(problem.mae(exact), 4)},
        "rows": kept,
    }
    done = {(row["choice"], row["fraction"]) for row in kept}
    for fraction in FRACTIONS:
        for choice in CHOICES:
            if (choice, fraction) in done or (choice == "eigen" and fraction not in EIGEN_FRACTIONS):
                continue
            m = round(fraction * operator.n)
            started = time.process_time()
            found = solve(
                operator,
                problem.y,
                "cg",
                LAM,
                preconditioner=choice,
                columns=m,
                enlarge=False,
                memory="8 GB",
                tolerance=TOLERANCE,
                max_iterations=MOST_ITERATIONS,
            )
            row: dict[str, Any] = {"choice": choice, "fraction": fraction, "columns": found.n_columns}
            row |= {"iterations": found.iterations, "converged": found.converged, "restarts": found.restarts}
            row |= {"seconds": round(time.process_time() - started, 2), "residual": float(f"{found.residual:.3g}")}
            if found.converged:
                forces = problem.forces(found)
                row["forces_mae"] = round(problem.mae(forces), 4)
                row["largest_difference_from_direct"] = round(float((forces - exact).abs().max()), 5)
            kept.append(row)
            print(
                f"{choice:9s} {fraction:5.0%} {found.n_columns:6d} columns {found.iterations:5d} iterations"
                f"{'' if found.converged else ' (not converged)'} {row['seconds']:7.1f} s",
                flush=True,
            )
            save(result)
    return result


def _large(n_train: int, queue: Any) -> None:
    """In a process of its own, so that its largest memory is that of the solution."""
    torch.set_num_threads(1)
    data = Ethanol()
    pool = np.setdiff1d(np.arange(len(data.all)), np.concatenate([data.test, data.valid]))
    train = np.sort(np.random.default_rng(0).choice(pool, n_train, replace=False))
    problem = Problem(data, train)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    found = solve(problem.operator, problem.y, "auto", LAM, memory=LIMIT, tolerance=TOLERANCE)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    queue.put(
        {
            "points": n_train,
            "unknowns": problem.operator.n,
            "direct_would_need_gb": round(cholesky_memory(problem.operator) / 1e9, 2),
            "limit": LIMIT,
            "method": found.method,
            "columns": found.n_columns,
            "iterations": found.iterations,
            "converged": found.converged,
            "residual": float(f"{found.residual:.3g}"),
            "planned_gb": round(found.memory / 1e9, 2),
            "peak_resident_gb": round(peak / 1e9, 2),
            "resident_before_gb": round(before / 1e9, 2),
            "seconds": round(seconds, 1),
            "forces_mae": round(problem.mae(problem.forces(found)), 4),
        }
    )


def large(n_train: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_large, args=(n_train, queue))
    process.start()
    result: dict[str, Any] = queue.get()
    process.join()
    return result


def plot(rows: list[dict[str, Any]], direct: float) -> None:
    """Iterations and time against columns, and the seconds of the direct solution; crosses: not converged."""
    import matplotlib.pyplot as plt

    labels = {
        "uniform": "uniform",
        "leverage": "leverage scores",
        "cholesky": "incomplete Cholesky",
        "eigen": "eigenvectors",
    }
    colours = {"uniform": "#b0572b", "leverage": "#2a6f97", "cholesky": "#4c7a34", "eigen": "#777777"}
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), constrained_layout=True)
    for choice in CHOICES:
        mine = sorted((r for r in rows if r["choice"] == choice), key=lambda r: r["fraction"])
        x = [100 * r["fraction"] for r in mine]
        for axis, key in zip(axes, ("iterations", "seconds"), strict=True):
            axis.plot(x, [r[key] for r in mine], "-", color=colours[choice], label=labels[choice], lw=1.5)
            for r in mine:
                marker = "o" if r["converged"] else "x"
                axis.plot(100 * r["fraction"], r[key], marker, color=colours[choice], ms=5)
    for axis, name in zip(axes, ("iterations to a residual of 1e-4", "CPU time in all [s]"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="inducing columns [% of the matrix]", ylabel=name)
        axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(MOST_ITERATIONS, color="0.8", lw=0.8, zorder=0)
    axes[0].legend(frameon=False)
    axes[0].set_yticks([10, 20, 50, 100, 200, 500, 1000], ["10", "20", "50", "100", "200", "500", "1000"])
    axes[1].set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes[1].axhline(direct, color="0.2", lw=1.0, ls=":")
    axes[1].text(1, direct * 1.07, "direct solution", color="0.2", fontsize=9)
    figure.savefig(HERE / "gdml_solvers.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("table", "large"), default=["table", "large"])
    parser.add_argument("--points", type=int, default=900, help="training set of part 2")
    parser.add_argument("--keep", action="store_true", help="go on with what the JSON holds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "gdml_solvers.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if arguments.keep and path.exists() else {}
    result |= {"what": __doc__, "machine": machine(), "sigma": SIGMA, "lam": LAM, "tolerance": TOLERANCE}
    data = Ethanol()

    def save(table: dict[str, Any]) -> None:
        result["table"] = table
        write("gdml_solvers", result)

    if "table" in arguments.parts:
        save(preconditioners(data, result.get("table", {}).get("rows", []), save))
    if "large" in arguments.parts:
        result["large"] = large(arguments.points)
        print(json.dumps(result["large"], indent=1))
        write("gdml_solvers", result)
    plot(result["table"]["rows"], result["table"]["direct"]["seconds"])
    worst = max(r["forces_mae"] for r in result["table"]["rows"] if r["converged"])
    best = result["table"]["direct"]["forces_mae"]
    if abs(worst - best) > 0.02:
        raise SystemExit(f"force errors differ: {best} directly, up to {worst} by iteration")


if __name__ == "__main__":
    main()
