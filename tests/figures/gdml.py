"""What the JSON files say of the figures in docs/gdml.md."""

from __future__ import annotations

from collections.abc import Iterator

from .common import Read, within


def agreement(read: Read) -> tuple[str, str]:
    """Largest differences of energies and forces from the sgdml program's."""
    models = read("gdml_reference")["models"].values()
    ways = [model[way] for model in models for way in ("torch", "fused", "openmm") if way in model]
    energy, forces = (within(max(way[what] for way in ways)) for what in ("energy", "forces"))
    return energy, forces


def figures(read: Read) -> Iterator[str]:
    yield "energies within {} kcal/mol and forces within {} kcal/mol/Å".format(*agreement(read))
    steps, trained = read("gdml_step")["models"], read("gdml_training")["models"]
    names = {"ethanol_nosym_M200_S1": "ethanol", "ethanol_M200_S12": "ethanol", "ethanol_M400_S12": "ethanol",
             "ala2_M180_S1": "capped alanine", "ala2_M180_S27": "capped alanine",
             "cu27_M60_S27": "copper, periodic"}  # fmt: skip
    about = read("gdml_reference")["models"]
    for key, name in names.items():
        found, model = steps[key], about[key]
        ratios = [f"{found['ratio'][way]:.0f}×" for way in ("as_shipped", "chunk_reset")]
        sizes = f"{model['atoms']} × {model['points']} × {model['permutations']}"
        yield f"| {name} | {sizes} | {found['ours']['median_ms'] * 1e3:.0f} | {' | '.join(ratios)} |"
        fit = trained[key]
        errors = " | ".join(f"{fit[way]['forces_mae']:.3f}" for way in ("sgdml", "same", "chosen"))
        kept = f"sigma {fit['chosen']['sigma']:.0f}, {fit['chosen']['permutations']} permutations"
        label = f"{name}, {fit['points']} geometries, {fit['permutations']} permutations"
        yield f"| {label} | {errors} | {kept} |"
    large = read("gdml_solvers")["large"]
    yield f"{large['points']} geometries needs {large['direct_would_need_gb']:.1f} GB directly"
    yield f"{large['iterations']} iterations, {large['peak_resident_gb']:.1f} GB and {large['seconds']:.0f} s"
    yield f"(force MAE {large['forces_mae']:.3f})"
    hydrogen = read("gdml_rpmd")
    runs = hydrogen["runs"]
    rpmd, batched = (f"{runs[n]['hydrogen']['mean']:.1f} ± {runs[n]['hydrogen']['error']:.1f}"
                     for n in ("rpmd", "batched_8"))  # fmt: skip
    yield f"{runs['batched_1']['hydrogen']['mean']:.1f} meV classically, {rpmd} with 8 beads"
    yield f"`RPMDIntegrator`, {batched} with the beads batched"
    yield f"gives {hydrogen['rigid_lattice']['kinetic_meV']:.1f} meV"
    yield f"{runs['batched_16']['hydrogen']['mean']:.1f} ± {runs['batched_16']['hydrogen']['error']:.1f} meV"
    table = {(row["geometries"], row["products"]): row for row in read("gdml_hessian_products")["table"]}
    for geometries in sorted({g for g, _ in table}):
        cells = []
        for products in (0, 1, 3, 9):
            row = table.get((geometries, products))
            equal = f" (as {row['equivalent_geometries']:.0f})" if row and products else ""
            cells.append("" if row is None else f"{row['force_mae']:.2f} ± {row['spread']:.2f}{equal}")
        yield f"| {geometries} | {' | '.join(cells)} |"
    speed = read("cg_gdml_speed")["beads_over_all_atom"]["reduced_rank"]
    yield f"make {speed['ns_per_day']:.0f} times the ns/day of all atoms"
    yield f"per CPU hour it is {speed['psi_decorrelations']:.0f} times"
    copies = read("replicas")["speed"]
    many = copies["gdml, 6 beads"]["512"]
    yield f"about {round(many['steps_per_second'], -5):,.0f} steps per second, {many['gain']:.0f} times"
    gains = [row["gain"] for n, row in copies["spookynet-ala2-gfn2"].items() if int(n) > 4]
    yield f"gains {min(gains):.1f} to {max(gains):.1f} times"
