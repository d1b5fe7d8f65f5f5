"""The data behind six-bead alanine: noise of the force maps, the priors, and the reweighted reference landscape.

* Root-mean-square force on every bead (kcal/mol/angstrom, vector length) by the slice, basic and optimised force map,
  root mean square per component, and net force per component, which no model of distances can describe; over the
  training frames as they were sampled (`biased`) and with weights that undo the bias (`reweighted`). Beside them the
  figures of 61,600 unbiased frames of the same force field that were made and mapped by other programs (`unbiased`).
* Mean force along phi by each consistent map: averages of different maps have to agree, only their noise may differ.
* phi > 0 in the reweighted test trajectories with its error over trajectories, and whether unbiased trajectories agree
  with the reweighted landscape where they go.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from _cg_ala2 import BEADS, FOLDER, KCAL, KT, rounded
from _common import HERE, machine, write
from openmm import app
from rich.console import Console
from rich.table import Table

from openmm_mlff.analysis import landscapes
from openmm_mlff.analysis.landscapes import Sample
from openmm_mlff.data.coarse_graining import (
    BeadMap,
    ForceCovariance,
    ForceMap,
    basic_force_map,
    constraints_of,
    optimised_force_map,
    slice_force_map,
)
from openmm_mlff.potentials.priors import fit_priors
from openmm_mlff.sampling.biased_md import Frames
from openmm_mlff.sampling.biased_recipes import load_split

#: root-mean-square forces per bead in 61,600 unbiased frames, of an independent calculation
UNBIASED = {
    "slice": [51.0, 41.5, 45.9, 33.0, 50.9, 41.1],
    "basic": [51.0, 38.6, 43.2, 24.2, 50.9, 38.0],
    "optimised": [28.7, 38.4, 43.2, 24.2, 38.7, 28.8],
}


def noise(force_map: ForceMap, frames: list[Frames], weighted: bool) -> dict[str, Any]:
    """Root-mean-square forces by one map; `weighted` undoes the bias."""
    total, per_bead, component, net = 0.0, np.zeros(len(BEADS)), 0.0, 0.0
    for part in frames:
        w = np.exp((part.bias - 0.2) / KT) if weighted else np.ones(len(part))
        f = force_map.forces(part.forces) / KCAL
        total += w.sum()
        per_bead += np.einsum("f,fbx->b", w, f**2)
        component += w @ (f**2).mean(axis=(1, 2))
        net += w @ (f.sum(axis=1) ** 2).mean(axis=1)
    return {
        "per_bead": np.sqrt(per_bead / total).tolist(),
        "per_component": float(np.sqrt(component / total)),
        "net_force": float(np.sqrt(net / total)),
    }


def torque_about_phi(beads: BeadMap, force_map: ForceMap, frames: list[Frames], bins: int = 12) -> dict[str, Any]:
    """Mean generalised force on phi, sum_b f_b . dr_b/dphi (turning the C-terminal side), by bins of phi.

    Errors of the mean come from the scatter over trajectories.
    """
    means = []
    for part in frames:
        x, f = beads.positions(part.positions), force_map.forces(part.forces) / KCAL
        axis = x[:, 2] - x[:, 1]
        axis /= np.linalg.norm(axis, axis=1, keepdims=True)
        # everything beyond the bond N-CA turns: CB, C and the N of NME
        force = sum(np.einsum("fx,fx->f", f[:, b], np.cross(axis, x[:, b] - x[:, 1])) for b in (3, 4, 5))
        cell = ((part.torsions[:, 0] + 180) // (360 / bins)).astype(int) % bins
        count = np.bincount(cell, minlength=bins)
        with np.errstate(invalid="ignore"):
            means.append(np.bincount(cell, weights=force, minlength=bins) / np.where(count >= 50, count, np.nan))
    values = np.array(means)
    seen = np.isfinite(values).sum(axis=0)
    enough = seen >= 4
    mean = np.nanmean(values[:, enough], axis=0)
    error = np.nanstd(values[:, enough], axis=0, ddof=1) / np.sqrt(seen[enough])
    centres = (-180 + 360 / bins * (np.arange(bins) + 0.5))[enough]
    return {"phi": centres.tolist(), "mean": mean.tolist(), "error": error.tolist()}


def agreement(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Root-mean-square difference of two mean forces in units of their common error (about 1 if they agree)."""
    difference = np.array(a["mean"]) - np.array(b["mean"])
    return float(np.sqrt(np.mean(difference**2 / (np.array(a["error"]) ** 2 + np.array(b["error"]) ** 2))))


def reference(folder: Path) -> dict[str, Any]:
    """The reweighted landscape of the test trajectories, and unbiased trajectories beside it."""
    test = [
        Sample(f.torsions[:, 0].astype(float), f.torsions[:, 1].astype(float), np.exp((f.bias - 0.2) / KT))
        for f in load_split(folder, "test")
    ]
    free = [Sample(f.torsions[:, 0].astype(float), f.torsions[:, 1].astype(float)) for f in load_split(folder, "free")]
    positive = landscapes.population(test, lambda phi, psi: phi > 0)

    def negative(samples: list[Sample]) -> list[Sample]:
        # unbiased runs of 10 ns do not cross to phi > 0, so they are compared with the part that they can reach
        kept = []
        for s in samples:
            rows = s.phi < 0
            kept.append(Sample(s.phi[rows], s.psi[rows], None if s.weights is None else s.weights[rows]))
        return kept

    compared = landscapes.compare(
        [p for s in negative(free) for p in s.pieces(5)],
        [p for s in negative(test) for p in s.pieces(5)],
        resamples=200,
    )
    floor = landscapes.split_half([p for s in negative(free) for p in s.pieces(5)])
    shares = {
        name: landscapes.population(negative(s), lambda phi, psi: (psi > -125) & (psi < 50))
        for name, s in (("reweighted", test), ("free", free))
    }
    whole = landscapes.histogram(test)
    return {
        "frames": int(sum(len(s) for s in test)),
        "effective_frames": whole.samples,
        "phi_positive": {
            "value": positive.value,
            "error": positive.error,
            "relative_error": positive.error / positive.value,
        },
        "free_phi_positive_frames": int(sum((s.phi > 0).sum() for s in free)),
        "free_against_reweighted_phi_negative": {
            "mse_weighted": compared.value.mse_weighted,
            "interval": compared.intervals["mse_weighted"],
            "js": compared.value.js,
            "floor_of_free_halves": floor.value.mse_weighted,
        },
        "alpha_share_phi_negative": {n: {"value": e.value, "error": e.error} for n, e in shares.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    topology = app.PDBFile(str(HERE.parent / "examples" / "recipes" / "capped_alanine.pdb")).topology
    system = openmm.XmlSerializer.deserialize((arguments.data / "system.xml").read_text(encoding="utf-8"))
    constraints = constraints_of(system)
    beads, frames = BeadMap.slice(topology, BEADS), load_split(arguments.data, "train")
    covariance = ForceCovariance(topology.getNumAtoms(), constraints)
    for part in frames:
        covariance.add(part.forces)
    maps = {
        "slice": slice_force_map(beads),
        "basic": basic_force_map(beads, constraints),
        "optimised": optimised_force_map(beads, covariance),
    }
    found = {
        name: {"biased": noise(m, frames, False), "reweighted": noise(m, frames, True)} for name, m in maps.items()
    }
    along_phi = {name: torque_about_phi(beads, m, frames) for name, m in maps.items()}
    positions = np.concatenate([beads.positions(f.positions) for f in frames])
    weights = np.exp((np.concatenate([f.bias for f in frames]) - 0.2) / KT)
    priors = fit_priors(positions, beads.bonds, KT, weights=weights)
    result: dict[str, Any] = {
        "what": __doc__,
        "machine": machine(),
        "frames": len(positions),
        "force_maps": found,
        "unbiased_per_bead": UNBIASED,
        "optimised_weights": [[i, j, float(w)] for i, row in enumerate(maps["optimised"].weights)
                              for j, w in enumerate(row) if abs(w) > 0.02],
        "mean_force_along_phi_kcal_per_mol_rad": along_phi,
        "difference_over_error": {
            "basic_optimised": agreement(along_phi["basic"], along_phi["optimised"]),
            "slice_optimised": agreement(along_phi["slice"], along_phi["optimised"]),
        },
        "priors": {
            "bonds": priors.bonds.tolist(),
            "r0_angstrom": priors.bond_lengths.tolist(),
            "k_kcal_per_mol_angstrom2": (priors.bond_constants / KCAL).tolist(),
            "angles": priors.angles.tolist(),
            "theta0_degrees": np.degrees(priors.angle_values).tolist(),
            "k_kcal_per_mol_rad2": (priors.angle_constants / KCAL).tolist(),
        },
        "reference": reference(arguments.data),
    }  # fmt: skip
    table = Table("map", *(f"{n}{i}" for i, n in enumerate(beads.names)), "component", "net", title="reweighted frames")
    for name, rows in found.items():
        row = rows["reweighted"]
        table.add_row(
            name, *(f"{v:.1f}" for v in row["per_bead"]), f"{row['per_component']:.1f}", f"{row['net_force']:.1f}"
        )
    Console().print(table)
    Console().print(result["difference_over_error"], result["reference"])
    write("cg_gdml_maps", rounded(result))


if __name__ == "__main__":
    main()
