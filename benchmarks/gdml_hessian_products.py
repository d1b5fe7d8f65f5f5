"""What Hessian-vector products among the labels of a GDML model save in training geometries: ethanol, GFN2-xTB.

Geometries of the shared MD data (500 K, two trajectories), labelled again with tight convergence; products H v along
random unit vectors v of all 27 coordinates, by five-point differences of the forces (step 0.02 angstrom, good to 1e-5
of the largest). Training, validation and test frames come from separate stretches of both trajectories. sigma and
lambda are chosen on the validation frames for each entry, the error on the test frames is taken once. Rows of the table
with equal M have the same geometries; M (1 + k) is the number of label vectors. The reported equivalent is the number
of geometries with forces alone that give the same error, interpolated in the logarithms. Seeds that are in the JSON
already, with the same settings, are kept.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, SHARED, machine, write
from rich.console import Console
from rich.table import Table

from openmm_gdml.products import KEY
from openmm_gdml.training import GDML
from openmm_mlff.data.structures import Structure
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

NAME = "gdml_hessian_products"
DATA = "gdml/dataset_ethanol.npz"
FRAMES = ("train", "validation", "test")
GEOMETRIES = (12, 25, 50, 100, 200)
PRODUCTS = (0, 1, 3, 9)
SIGMAS, LAMBDAS = (10.0, 20.0, 40.0), (1e-10, 1e-8, 1e-6)
#: frames of each trajectory, with gaps between
TRAIN, VALIDATION, TEST = slice(0, 600), slice(650, 800, 2), slice(850, 1000)
STEP = 0.02


class Reference:
    """GFN2-xTB forces of one molecule, converged tightly, and Hessian-vector products by differences of them."""

    def __init__(self, numbers: np.ndarray) -> None:
        from ase import Atoms
        from tblite.ase import TBLite

        self.atoms = Atoms(numbers, np.zeros((len(numbers), 3)))
        self.atoms.calc = TBLite(method="GFN2-xTB", accuracy=0.01, verbosity=0)

    def forces(self, positions: np.ndarray) -> np.ndarray:
        self.atoms.positions = positions
        return self.atoms.get_forces()

    def label(self, positions: np.ndarray, n_products: int, seed: int) -> Structure:
        """Energy, forces and products along random unit vectors."""
        random, pairs = np.random.default_rng(seed), []
        for _ in range(n_products):
            v = random.normal(size=positions.shape)
            v /= np.linalg.norm(v)
            f = {s: self.forces(positions + s * STEP * v) for s in (-2, -1, 1, 2)}
            pairs.append((v, -(f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / (12 * STEP)))
        self.atoms.positions = positions
        energy = float(self.atoms.get_potential_energy())
        info = {KEY: pairs} if pairs else {}
        return Structure(self.atoms.numbers, positions, energy=energy, forces=self.atoms.get_forces(), info=info)


def with_first(structures: list[Structure], k: int) -> list[Structure]:
    """The structures with the first k of their products."""
    return [s.replace(info={KEY: s.info[KEY][:k]}) for s in structures]


def measure(train: list[Structure], valid: list[Structure], test: list[Structure]) -> dict[str, Any]:
    """Train, choose on validation frames, and take the error on the test frames."""
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*at the edge of those tried.*")
    estimator = GDML(sigma=SIGMAS, lam=LAMBDAS, permutations=None, solver="cholesky", memory="8 GB")
    model = estimator.fit(train, valid)
    _, forces = model.energies_and_forces(torch.from_numpy(np.stack([s.positions for s in test])))
    error = forces.numpy() - np.stack([s.forces for s in test if s.forces is not None])
    return {
        "sigma": model.config.sigma,
        "lam": model.config.lam,
        "force_mae": float(np.abs(error).mean()) / EV_PER_KCAL_PER_MOL,
        "force_rmse": float(np.sqrt((error**2).mean())) / EV_PER_KCAL_PER_MOL,
        "seconds": time.perf_counter() - start,
    }


def equivalent(error: float, geometries: list[int], errors: list[float]) -> float | None:
    """Geometries with forces alone that reach an error; None outside of what was measured."""
    if not min(errors) <= error <= max(errors):
        return None
    return float(np.exp(np.interp(-np.log(error), -np.log(errors), np.log(geometries))))


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, with the equivalent number of geometries."""
    table = []
    for m, k in sorted({(r["geometries"], r["products"]) for r in rows}):
        maes = [r["force_mae"] for r in rows if (r["geometries"], r["products"]) == (m, k)]
        spread = float(np.std(maes, ddof=1)) if len(maes) > 1 else None
        table.append({"geometries": m, "products": k, "vectors": m * (1 + k), "force_mae": float(np.mean(maes)),
                      "spread": spread, "seeds": len(maes)})  # fmt: skip
    alone = [(t["geometries"], t["force_mae"]) for t in table if t["products"] == 0]
    for t in table:
        t["equivalent_geometries"] = equivalent(t["force_mae"], *map(list, zip(*alone, strict=True)))
    return table


def finished(settings: dict[str, Any], frames: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of the seeds that an earlier call with the same settings has measured."""
    path = HERE / f"{NAME}.json"
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if (earlier.get("settings"), earlier.get("frames")) != (settings, frames):
        return []
    return list(earlier["runs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vectors", type=int, default=260, help="label vectors of the largest training set")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(SHARED) / "data" / DATA
    if not path.exists():
        raise SystemExit(f"no {path.name} in the folder of shared data; OPENMM_MLFF_SHARED names that folder")
    with np.load(path, allow_pickle=False) as data:
        numbers, positions, trajectory = data["z"], data["R"], data["traj_id"]
    stretches = {name: np.concatenate([positions[trajectory == t][part] for t in np.unique(trajectory)])
                 for name, part in (("train", TRAIN), ("valid", VALIDATION), ("test", TEST))}  # fmt: skip
    reference, console = Reference(numbers), Console()
    valid = [reference.label(r, 0, 0) for r in stretches["valid"]]
    test = [reference.label(r, 0, 0) for r in stretches["test"]]
    frames = {name: len(part) for name, part in zip(FRAMES, stretches.values(), strict=True)} | {"permutations": 1}
    settings = {"geometries": list(GEOMETRIES), "products": list(PRODUCTS), "vectors": args.vectors,
                "sigma": list(SIGMAS), "lam": list(LAMBDAS), "step": STEP}  # fmt: skip
    rows = finished(settings, frames)
    done = {row["seed"] for row in rows}
    for seed in (k for k in range(args.seeds) if k not in done):
        order = np.random.default_rng(seed).permutation(len(stretches["train"]))[: max(GEOMETRIES)]
        most = {m: max(k for k in PRODUCTS if m * (1 + k) <= args.vectors) for m in GEOMETRIES}
        need = [max(k for m, k in most.items() if n < m) for n in range(len(order))]
        pool = [reference.label(stretches["train"][i], need[n], int(i)) for n, i in enumerate(order)]
        for m in GEOMETRIES:
            for k in (k for k in PRODUCTS if k <= most[m]):
                chosen = with_first(pool[:m], k) if k else [s.replace(info={}) for s in pool[:m]]
                row = {"seed": seed, "geometries": m, "products": k, **measure(chosen, valid, test)}
                rows.append(row)
                console.print(f"seed {seed} M {m} k {k}: {row['force_mae']:.3f} ({row['seconds']:.0f} s)")
        result = {"machine": machine(), "frames": frames, "settings": settings, "table": summarise(rows), "runs": rows}
        write(NAME, result)
    shown = Table("M geometries", "products each", "label vectors", "force MAE, kcal/mol/A", "as forces of so many")
    for t in summarise(rows):
        spread = "" if t["spread"] is None else f" +- {t['spread']:.3f}"
        same = t["equivalent_geometries"]
        shown.add_row(str(t["geometries"]), str(t["products"]), str(t["vectors"]), f"{t['force_mae']:.3f}{spread}",
                      "" if same is None else f"{same:.0f}")  # fmt: skip
    console.print(shown)


if __name__ == "__main__":
    main()
