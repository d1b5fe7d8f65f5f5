"""What the symmetry of a crystal saves: learning curves of periodic GDML models of Cu27 and of hydrogen in palladium.

Every model is trained on M geometries of one 300 K trajectory. Power, sigma and lambda are chosen by the force error on
40 frames of another one (Cu27: of the end of the shared one, 2.4 ps after the last training frame) for M up to 40, or
10 with the group of 1296, and kept for larger M. The test, made once, are 200 frames of two further trajectories with
other seeds. Groups: none, the translations of the supercell, and translations x point group (in PdH the defect leaves
the point group alone). Descriptors: the published one, inverse distances of the image that rounding of fractional
coordinates takes, and sums over periodic images (`openmm_gdml.images`).
Rows are kept in the work folder as they are made, so that the script goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import _materials as materials
import numpy as np
import torch
from _common import HERE, machine, write
from rich.console import Console
from rich.table import Table

from openmm_gdml import crystals
from openmm_gdml.training import GDML
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import save_potential

SIGMAS = (2.5, 5.0, 10.0, 20.0, 40.0)
#: the first for all sigmas, the others for the best of them
LAMBDAS = (1e-10, 1e-12, 1e-14, 1e-8)
POWERS = (1.0, 2.0, 3.0, 4.0, 6.0)
#: training geometries up to which settings are chosen, for small groups and for those of more than a hundred
CHOOSE_UP_TO, CHOOSE_UP_TO_LARGE = 40, 10
SIZES = (2, 5, 10, 20, 40, 80, 160)
#: two geometries of hydrogen in palladium are too few to see that energies belong to the forces
LEAST = {"Cu27": {"none": 5, "translations": 5, "full": 2}, "PdH": {"none": 5, "full": 5}}
MOST = {"Cu27": {"none": 160, "translations": 160, "full": 40}, "PdH": {"none": 160, "full": 160}}
DESCRIPTORS = {"inverse_distances": "one image by rounding", "image_sums": "sums over images"}
COLOURS = {"none": "tab:grey", "translations": "tab:orange", "full": "tab:blue"}


def evenly(structures: list[Structure], n: int) -> list[Structure]:
    """n structures spread over a trajectory."""
    return [structures[int(k)] for k in np.linspace(0, len(structures) - 1, n)]


def data_of(case: str) -> dict[str, list[Structure]]:
    """Training pool, validation and test frames, each from trajectories of their own."""
    if case == "Cu27":
        # the shared data are one trajectory: its ends are 3 ps apart, and the test is independent of it
        frames, start = materials.shared_copper(), materials.copper()
        test = [s for seed in (1, 2) for s in evenly(materials.trajectory("cu27", start, seed, 200, 3.0), 100)]
        return {"train": frames[:500], "validation": evenly(frames[600:], 40), "test": test}
    start = materials.palladium_hydride()
    runs = [materials.trajectory("pdh", start, seed, 400, 1.0) for seed in (1, 2, 3, 4)]
    return {
        "train": runs[0],
        "validation": evenly(runs[1], 40),
        "test": evenly(runs[2], 100) + evenly(runs[3], 100),
    }


def fit(
    data: dict[str, list[Structure]], group: np.ndarray, descriptor: str, n: int, chosen: dict[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """The model with the least validation error, and its settings."""
    train = evenly(data["train"], n)
    powers: tuple[float | None, ...] = (None,) if descriptor == "inverse_distances" else POWERS
    sigmas: tuple[float, ...] = SIGMAS
    lambdas: tuple[float, ...] = LAMBDAS
    if chosen is not None:
        powers, sigmas, lambdas = (chosen["power"],), (chosen["sigma"],), (chosen["lam"],)
    best: tuple[float, Any, dict[str, Any]] | None = None
    settings = [{"power": power, "sigma": sigma, "lam": lambdas[0]} for power in powers for sigma in sigmas]
    while settings:
        trial = settings.pop(0)
        gdml = GDML(
            sigma=trial["sigma"],
            lam=trial["lam"],
            permutations=group,
            descriptor=descriptor,
            descriptor_options={} if trial["power"] is None else {"power": trial["power"]},
            solver="cholesky",
            memory="6 GB",
        )
        try:
            model = gdml.fit(train, data["validation"])
        except ValueError as error:
            if "positive definite" not in str(error):
                raise
        else:
            error_here = gdml.selection[0]["forces_rmse"]
            if best is None or error_here < best[0]:
                best = error_here, model, trial
        if not settings and best is not None and trial["lam"] == lambdas[0]:
            settings = [best[2] | {"lam": lam} for lam in lambdas[1:]]
    if best is None:
        raise RuntimeError(f"no setting gives a positive definite matrix for {descriptor}, M = {n}")
    return best[1], best[2] | {"validation_forces_rmse_meV_per_A": 1e3 * best[0]}


def errors(model: Any, structures: list[Structure]) -> dict[str, float]:
    """meV/atom and meV/angstrom."""
    lattice = torch.from_numpy(structures[0].cell)
    energies, forces = model.energies_and_forces(torch.from_numpy(np.stack([s.positions for s in structures])), lattice)
    reference = np.stack([s.forces for s in structures])
    energy_error = (energies.numpy() - np.array([s.energy for s in structures])) / len(structures[0])
    force_error = forces.numpy() - reference
    return {
        "energy_mae_meV_per_atom": 1e3 * float(np.abs(energy_error).mean()),
        "energy_rmse_meV_per_atom": 1e3 * float(np.sqrt(np.mean(energy_error**2))),
        "forces_mae_meV_per_A": 1e3 * float(np.abs(force_error).mean()),
        "forces_rmse_meV_per_A": 1e3 * float(np.sqrt(np.mean(force_error**2))),
    }


def curves(case: str, groups: tuple[str, ...], most: int) -> dict[str, Any]:
    """All rows of one material."""
    data = data_of(case)
    reference = data["train"] if case == "Cu27" else [_ideal()]
    found: dict[str, Any] = {"symmetry": {}, "rows": []}
    forces = np.stack([s.forces for s in data["test"]])
    found["test_forces_rms_meV_per_A"] = 1e3 * float(np.sqrt(np.mean(forces**2)))
    found["test_energy_std_meV_per_atom"] = 1e3 * float(np.std([s.energy for s in data["test"]])) / len(data["test"][0])
    for kind in groups:
        group = crystals.symmetry(reference, kind)
        crystals.check_displacements(group, data["train"][::20])
        found["symmetry"][kind] = {
            "permutations": len(group),
            "translations": group.n_translations,
            "space_group": group.space_group,
            "kept_by_rounding": group.n_kept_by_rounding,
        }
        for descriptor in ("inverse_distances", "image_sums"):
            chosen, limit = None, CHOOSE_UP_TO if len(group) < 100 else CHOOSE_UP_TO_LARGE
            for n in (m for m in SIZES if LEAST[case][kind] <= m <= min(most, MOST[case][kind])):
                row = _row(case, kind, descriptor, n, data, group.permutations, chosen)
                if n <= limit:
                    chosen = None if n < limit else {k: row[k] for k in ("power", "sigma", "lam")}
                found["rows"].append(row)
    return found


def _row(
    case: str,
    kind: str,
    descriptor: str,
    n: int,
    data: dict[str, list[Structure]],
    group: np.ndarray,
    chosen: dict[str, Any] | None,
) -> dict[str, Any]:
    path = materials.WORK / "rows" / f"{case}_{kind}_{descriptor}_{n}.json"
    if not path.exists():
        start = time.perf_counter()
        model, settings = fit(data, group, descriptor, n, chosen)
        row = {"group": kind, "descriptor": descriptor, "n_train": n} | settings | errors(model, data["test"])
        row["seconds"] = round(time.perf_counter() - start, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_potential(model, path.with_suffix(".safetensors"))
        write_atomically(path, (json.dumps(row, indent=1) + "\n").encode())
        print(
            f"{case} {kind:12s} {descriptor:17s} M = {n:3d}: {row['energy_mae_meV_per_atom']:.4f} meV/atom, "
            f"{row['forces_rmse_meV_per_A']:.2f} meV/angstrom, {row['seconds']:.0f} s",
            flush=True,
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _ideal() -> Structure:
    atoms = materials.palladium_hydride()
    return Structure(atoms.numbers, atoms.positions, cell=atoms.cell.array)


def draw(result: dict[str, Any], path: Path) -> None:
    """Errors against the number of training geometries."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(result["cases"]), figsize=(9.6, 7.6), squeeze=False, sharex="col")
    keys = ("energy_mae_meV_per_atom", "forces_rmse_meV_per_A")
    for column, (case, found) in enumerate(result["cases"].items()):
        for kind, group in found["symmetry"].items():
            for descriptor, style in (("inverse_distances", "--"), ("image_sums", "-")):
                rows = [r for r in found["rows"] if (r["group"], r["descriptor"]) == (kind, descriptor)]
                name = {"none": "no symmetry", "full": "point group of the site"}.get(kind, kind)
                name = "translations x point group" if group["permutations"] > 100 else name
                label = f"{name} ({group['permutations']}), {DESCRIPTORS[descriptor]}"
                for axis, key in zip(axes[:, column], keys, strict=True):
                    n, values = [r["n_train"] for r in rows], [r[key] for r in rows]
                    axis.loglog(n, values, style, marker="o", ms=4, color=COLOURS[kind], label=label)
        for axis in axes[:, column]:
            axis.grid(alpha=0.25)
        axes[0, column].axhline(1.0, color="black", lw=0.9, ls=":")
        axes[0, column].set_title({"Cu27": "copper, 27 atoms", "PdH": "hydrogen in palladium, 28 atoms"}[case])
        axes[1, column].set_xlabel("training geometries")
        axes[1, column].set_xticks(SIZES, [str(n) for n in SIZES])
        axes[1, column].minorticks_off()
        axes[1, column].legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=1, frameon=False)
    axes[0, 0].set_ylabel("energy MAE [meV/atom] (dotted: 1)")
    axes[1, 0].set_ylabel("force RMSE [meV/Å]")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=160, help="largest number of training geometries")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # the grid is wide enough; its edges are reached only where nothing is learned
    warnings.filterwarnings("ignore", message=".*at the edge of those tried.*")
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "cases": {}}
    result["cases"]["PdH"] = curves("PdH", ("none", "full"), arguments.most)
    result["cases"]["Cu27"] = curves("Cu27", ("none", "translations", "full"), arguments.most)
    result["cases"] = {name: result["cases"][name] for name in ("Cu27", "PdH")}
    for case, found in result["cases"].items():
        table = Table("group", "S", "descriptor", "M", "energy MAE [meV/atom]", "force RMSE [meV/Å]", title=case)
        for row in found["rows"]:
            table.add_row(
                row["group"],
                str(found["symmetry"][row["group"]]["permutations"]),
                row["descriptor"],
                str(row["n_train"]),
                f"{row['energy_mae_meV_per_atom']:.4f}",
                f"{row['forces_rmse_meV_per_A']:.2f}",
            )
        Console().print(table)
    draw(result, HERE / "gdml_materials.png")
    write("gdml_materials", result)


if __name__ == "__main__":
    main()
