"""Minima of Ace-Ala3-NMe (42 atoms) found with SO3LR: the exploration of an energy surface by minima hopping.

    python benchmarks/so3lr_minima.py [--minima 1000] [--minutes 25] [--parts explore check plot]

* Search: minima hopping (Goedecker, J. Chem. Phys. 120, 9911 (2004)) by independent walkers that share one list of
  minima and one batched evaluation of the model. A walker leaves its minimum by molecular dynamics (1 fs) until the
  energy has passed three minima along its path, and minimises (L-BFGS on a model Hessian, without line search). Its
  kinetic energy grows after every return to a known minimum and shrinks after a new one; a new minimum is accepted if
  it lies not too far above the old one, by a threshold that adapts until half of the moves are accepted.
  A walker that arrives at a known minimum goes on from a random conformation: random phi and psi, half of the peptide
  bonds cis, so that every one of the sixteen isomers has its share. (In the run behind the JSON file, the first 361
  minimisations had three of ten cis and jumps after two known minima in a row, and until about number 2100 the isomer
  was drawn again with phi and psi after an overlap, which favoured trans.)
* A minimum counts when the largest force on an atom is below 0.002 eV/angstrom, all bonds of the molecule are whole, no
  new one has formed, and every alpha carbon has its L hand; others are counted and left out.
* Two minima are one where no torsion differs by 10 degrees (backbone and peptide bonds; methyl groups modulo 120) and
  their energies are within 5 meV. `distinct_by_torsions` says what is left when torsions alone, with wider limits,
  decide.
* Check (independent of the search): minima drawn by a seed are refined in double precision, and the eigenvalues of
  their analytic Hessian are looked at: a minimum has six zeros and no negative one. How far the refinement moved them
  says whether they had converged.

The search is kept in the work folder and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, peptide, so3lr_weights, write
from _minima import CONVERGED, Found, Molecule, Walkers, random_starts
from _minimiser import LBFGS, ModelHessian

from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential


def so3lr(double: bool = False) -> Potential:
    model = load_potential(so3lr_weights(), "so3krates")
    return model.double() if double else model.float()


def explore(molecule: Molecule, work: Path, wanted: int, minutes: float, walkers: int, seed: int) -> Found:
    """Search until `wanted` minima are found or `minutes` of CPU time of this process are spent."""
    from ase.data import atomic_masses

    path = work / "minima.safetensors"
    found = Found.load(molecule, path) if path.exists() else Found(molecule)
    random = np.random.default_rng([seed, found.minimizations, 1])
    starts = random_starts(molecule, walkers, random)
    structures = [molecule.structure.replace(positions=x) for x in starts]
    evaluator = so3lr().evaluator(structures, outputs=("energy", "forces"), compile=True)
    hopping = Walkers(evaluator, found, starts, atomic_masses[molecule.structure.numbers], seed)
    before, spent = time.process_time(), found.seconds
    shown = time.monotonic()
    while len(found.energies) < wanted and time.process_time() - before < 60 * minutes:
        hopping.advance()
        found.seconds = spent + time.process_time() - before
        if time.monotonic() > shown + 30.0:
            shown = time.monotonic()
            found.save(path)
            print(
                f"{len(found.energies)} minima of {found.minimizations} minimisations, {found.evaluations} "
                f"evaluations, {found.seconds:.0f} s; {np.median(hopping.temperature):.0f} K, {found.faults}",
                flush=True,
            )
    found.save(path)
    return found


# -- check and report --------------------------------------------------------------------------------------------------


def check(molecule: Molecule, found: Found, n: int, seed: int) -> dict[str, Any]:
    """Refine minima in double precision and diagonalise their Hessians."""
    model = so3lr(double=True)
    chosen = np.random.default_rng(seed).choice(len(found.energies), min(n, len(found.energies)), replace=False)
    starts = np.array([found.positions[i] for i in chosen])
    evaluator = model.evaluator([molecule.structure.replace(positions=x) for x in starts], compile=True)
    lbfgs, x = LBFGS(len(starts), ModelHessian(molecule.near)), starts.copy()
    everyone = np.arange(len(starts))
    for _ in range(1000):
        forces = evaluator.arrays(x.reshape(-1, 3))[1].reshape(len(x), -1)
        if np.abs(forces).max() < 2e-5:
            break
        x = lbfgs.step(everyone, x.reshape(len(x), -1), forces).reshape(starts.shape)
    rows = []
    for k, i in enumerate(chosen):
        refined = molecule.structure.replace(positions=x[k])
        # by the torch form, which the search did not use
        energy, left = model.energy_and_forces(refined)
        values = np.linalg.eigvalsh(model.hessian(refined))
        zeros = np.sort(np.abs(values))[:6]
        rest = np.delete(values, np.argsort(np.abs(values))[:6])
        row = {"minimum": int(i), "largest_force": float(f"{np.abs(left).max():.2g}")}
        row |= {"zeros_below": float(f"{zeros.max():.2g}"), "least_eigenvalue": float(f"{rest.min():.3g}")}
        row["moved_torsion"] = round(float(molecule.differ(molecule.angles(x[k]), found.angles[i][None])[0]), 2)
        row["fell_meV"] = round(1e3 * (found.energies[i] - energy), 3)
        rows.append(row)
        print(row, flush=True)
    return {
        "seed": seed,
        "rows": rows,
        "minima": sum(row["least_eigenvalue"] > 0 for row in rows),
        "looked_at": len(rows),
        "largest_move_degrees": max(row["moved_torsion"] for row in rows),
        "largest_fall_meV": max(row["fell_meV"] for row in rows),
    }


def distinct(molecule: Molecule, found: Found, limit: float) -> int:
    """How many minima remain when those within `limit` degrees of one of lower energy are left out."""
    kept: list[np.ndarray] = []
    for i in np.argsort(found.energies):
        if not kept or molecule.differ(found.angles[i], np.array(kept)).min() >= limit:
            kept.append(found.angles[i])
    return len(kept)


def hydrogen_bonds(molecule: Molecule, x: np.ndarray) -> int:
    """N-H...O closer than 2.3 angstrom with an angle above 120 degrees."""
    z = molecule.structure.numbers
    polar = [(j, i) for i in range(len(z)) if z[i] == 7 for j in molecule.near[i] if z[j] == 1]
    count = 0
    for (h, n), o in itertools.product(polar, np.flatnonzero(z == 8)):
        a, b = x[n] - x[h], x[o] - x[h]
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        count += bool(np.linalg.norm(b) < 2.3 and cosine < -0.5)
    return count


def summary(molecule: Molecule, found: Found) -> dict[str, Any]:
    energies = np.array(found.energies)
    angles = np.array(found.angles)
    omega = np.array(molecule.names) == "omega"
    cis = (np.abs((angles[:, omega] + 180.0) % 360.0 - 180.0) < 90.0).sum(axis=1)
    relative = energies - energies.min()
    lowest = int(energies.argmin())
    named = {f"{name}{k}": round(float((a + 180.0) % 360.0 - 180.0), 1) for k, (name, a) in
             enumerate(zip(molecule.names, angles[lowest], strict=True)) if name != "methyl"}  # fmt: skip
    return {
        "minima": len(energies),
        "minimisations": found.minimizations,
        "evaluations": found.evaluations,
        "cpu_minutes": round(found.seconds / 60, 1),
        "left_out": found.faults,
        "distinct_by_torsions": {f"{limit:g}": distinct(molecule, found, limit) for limit in (10.0, 20.0, 30.0)},
        "cis_peptide_bonds": {str(n): int((cis == n).sum()) for n in sorted(set(cis.tolist()))},
        "within_eV": {f"{e:g}": int((relative <= e).sum()) for e in (0.1, 0.2, 0.3, 0.5, 1.0)},
        "highest_eV": round(float(relative.max()), 3),
        "lowest": {"torsions": named, "hydrogen_bonds": hydrogen_bonds(molecule, found.positions[lowest])},
    }


def draw(molecule: Molecule, found: Found) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    energies = np.array(found.energies) - min(found.energies)
    angles, names = (np.array(found.angles) + 180.0) % 360.0 - 180.0, np.array(molecule.names)
    ends = [np.flatnonzero(molecule.structure.numbers == 6)[0], np.flatnonzero(molecule.structure.numbers == 6)[-1]]
    length = np.array([np.linalg.norm(x[ends[0]] - x[ends[1]]) for x in found.positions])
    cis = (np.abs(angles[:, names == "omega"]) < 90.0).sum(axis=1)
    bonds = np.array([hydrogen_bonds(molecule, x) for x in found.positions])
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 3.9), constrained_layout=True)
    order = np.argsort(-energies)
    phi, psi = angles[:, names == "phi"], angles[:, names == "psi"]
    for k in range(phi.shape[1]):
        shown = axes[0].scatter(phi[order, k], psi[order, k], c=energies[order], s=5, cmap="viridis_r", linewidths=0)
    axes[0].set(xlabel=r"$\phi$ [deg]", ylabel=r"$\psi$ [deg]", xlim=(-180, 180), ylim=(-180, 180))
    axes[0].set(xticks=range(-180, 181, 90), yticks=range(-180, 181, 90), title="all three residues")
    figure.colorbar(shown, ax=axes[0], label="energy [eV]")
    palette = plt.get_cmap("cividis_r")
    most = int(bonds.max())
    for n in range(most + 1):
        mine = bonds == n
        label = f"{n} hydrogen bond{'s' * (n != 1)}"
        axes[1].scatter(length[mine], energies[mine], s=7, color=palette(n / max(most, 1)), linewidths=0, label=label)
    axes[1].set(xlabel="end to end, C to C [Å]", ylabel="energy above the lowest minimum [eV]")
    axes[1].set_ylim(top=1.35 * energies.max())
    axes[1].legend(fontsize=8, frameon=False, markerscale=2, ncols=2, loc="upper center")
    axes[1].set_title(f"{len(energies)} minima, {int((cis == 0).sum())} of them all trans")
    curve = np.array(found.curve)
    axes[2].plot(curve[:, 0], curve[:, 1], color="#1f5fa8")
    axes[2].plot([0, curve[-1, 0]], [0, curve[-1, 0]], color="0.6", linestyle=":", linewidth=1)
    axes[2].set(xlabel="minimisations", ylabel="distinct minima", ylim=(0, 1.1 * curve[-1, 1]), title="progress")
    axes[2].annotate("every one new", (0.9 * curve[-1, 1], 0.95 * curve[-1, 1]), fontsize=8, color="0.4",
                     xytext=(12, 0), textcoords="offset points")  # fmt: skip
    axes[2].grid(alpha=0.3)
    figure.savefig(HERE / "so3lr_minima.png", dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minima", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=25.0, help="of CPU time for the search in this sitting")
    parser.add_argument("--walkers", type=int, default=16)
    parser.add_argument("--checked", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--parts", nargs="+", default=["explore", "check", "plot"], choices=["explore", "check", "plot"]
    )
    parser.add_argument("--work", type=Path, default=HERE.parent / ".work" / "so3lr_minima")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    molecule = Molecule(peptide(3))
    if "explore" in arguments.parts:
        found = explore(
            molecule, arguments.work, arguments.minima, arguments.minutes, arguments.walkers, arguments.seed
        )
    else:
        found = Found.load(molecule, arguments.work / "minima.safetensors")
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "seed": arguments.seed}
    kept = HERE / "so3lr_minima.json"
    if kept.exists() and "check" not in arguments.parts:
        result["check"] = json.loads(kept.read_text(encoding="utf-8")).get("check")
    result |= {"walkers": arguments.walkers, "converged_eV_per_A": CONVERGED, **summary(molecule, found)}
    if "check" in arguments.parts:
        result["check"] = check(molecule, found, arguments.checked, arguments.seed)
    print(json.dumps({k: v for k, v in result.items() if k not in ("what", "machine", "check")}, indent=1))
    write("so3lr_minima", result)
    if "plot" in arguments.parts:
        draw(molecule, found)


if __name__ == "__main__":
    main()
