"""GDML trained by this project against models that sgdml trained on the same geometries.

Every shared model is trained again from its own training geometries: with its permutations, sigma 20 and lambda 1e-10
(`same`), and as a user would (`chosen`): permutations found from bonds, sigma out of 10, 15, 20, 30 and lambda out of
1e-10, 1e-8 by the force error on its validation geometries. Errors are of the 200 stored test geometries, against the
labels (kcal/mol, kcal/mol/angstrom), once for the chosen model; sgdml's are those of its stored predictions. The test
geometries stand 8 fs apart in the same trajectories as the training data, so all errors are optimistic alike.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import SHARED, machine, write

from openmm_gdml.training import GDML
from openmm_gdml.training_set import TrainingSet
from openmm_mlff.data.formats import read_sgdml_npz
from openmm_mlff.data.structures import Structure
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

SIGMAS, LAMBDAS = (10.0, 15.0, 20.0, 30.0), (1e-10, 1e-8)


def dataset_of(name: str) -> Path:
    return SHARED / "data" / "gdml" / f"dataset_{name.split('_')[0]}.npz"


def errors(model: Any, test: TrainingSet) -> dict[str, float]:
    found = {key: value / EV_PER_KCAL_PER_MOL for key, value in test.errors(model).items()}
    return {key: round(found[key], 4) for key in ("forces_mae", "forces_rmse", "energy_mae")}


def published(reference: Any) -> dict[str, float]:
    difference = reference["F_pred"] - reference["F_true"]
    energy = reference["E_pred"].ravel() - reference["E_true"].ravel()
    return {
        "forces_mae": round(float(np.abs(difference).mean()), 4),
        "forces_rmse": round(float(np.sqrt((difference**2).mean())), 4),
        "energy_mae": round(float(np.abs(energy).mean()), 4),
    }


def one(name: str, structures: list[Structure]) -> dict[str, Any]:
    folder = SHARED / "data" / "gdml"
    stored = np.load(folder / f"{name}_model.npz", allow_pickle=False)
    reference = np.load(folder / f"{name}_ref.npz", allow_pickle=False)
    train = [structures[i] for i in stored["idxs_train"].astype(int)]
    valid = [structures[i] for i in stored["idxs_valid"].astype(int)]
    data = TrainingSet.of(train)
    test = TrainingSet.of([structures[i] for i in reference["idx"].astype(int)], like=data)
    group = np.asarray(stored["perms"], dtype=np.int64)
    result: dict[str, Any] = {"points": len(train), "permutations": len(group), "sgdml": published(reference)}
    trainer = GDML(float(stored["sig"]), float(stored["lam"]), group)
    result["same"] = errors(trainer.fit(train), test)
    periodic = data.lattice is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lambda at the edge of its two values
        trainer = GDML(SIGMAS, LAMBDAS, group if periodic else "auto")
        model = trainer.fit(train, valid)
    result["chosen"] = errors(model, test) | {
        "sigma": model.config.sigma,
        "lam": model.config.lam,
        "permutations": model.config.n_permutations,
        "validation_forces_rmse": round(min(row["forces_rmse"] for row in trainer.selection) / EV_PER_KCAL_PER_MOL, 4),
    }
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    names = sorted(p.name.removesuffix("_model.npz") for p in (SHARED / "data" / "gdml").glob("*_model.npz"))
    names = [name for name in names if dataset_of(name).exists()]
    if not names:
        raise SystemExit("no models with data sets in gdml/ of the shared data; OPENMM_MLFF_SHARED names that folder")
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "models": {}}
    print(
        f"{'model':22s} {'S':>3s}  {'sgdml':>7s} {'same':>7s} {'chosen':>7s}  force MAE, kcal/mol/angstrom", flush=True
    )
    worse = []
    for name in names:
        row = result["models"][name] = one(name, read_sgdml_npz(dataset_of(name)))
        maes = [row[key]["forces_mae"] for key in ("sgdml", "same", "chosen")]
        print(
            f"{name:22s} {row['permutations']:3d}  "
            + " ".join(f"{x:7.3f}" for x in maes)
            + f"  (sigma {row['chosen']['sigma']:g}, S {row['chosen']['permutations']})",
            flush=True,
        )
        if maes[1] > 1.01 * maes[0]:
            worse.append(name)
        write("gdml_training", result)
    if worse:
        raise SystemExit(f"worse than sgdml with the same settings: {', '.join(worse)}")


if __name__ == "__main__":
    main()
