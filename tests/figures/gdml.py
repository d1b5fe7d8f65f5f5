"""What the JSON files say of the figures in docs/gdml.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from .common import NUMBERS, Read, floored, rounded, significant, value, within


def agreement(read: Read) -> tuple[str, str]:
    """Largest differences of energies and forces from the sgdml program's."""
    models = read("gdml_reference")["models"].values()
    ways = [model[way] for model in models for way in ("torch", "fused", "openmm") if way in model]
    energy, forces = (within(max(way[what] for way in ways)) for what in ("energy", "forces"))
    return energy, forces


def figures(read: Read) -> Iterator[str]:
    return chain(
        *(models(read), solvers(read), crystals(read), hydrogen(read), derivatives(read)),
        *(coarse_grained(read), replicas(read)),
    )


def models(read: Read) -> Iterator[str]:
    yield "energies within {} kcal/mol and forces within {} kcal/mol/Å".format(*agreement(read))
    steps, trained = read("gdml_step")["models"], read("gdml_training")["models"]
    names = {"ethanol_nosym_M200_S1": "ethanol", "ethanol_M200_S12": "ethanol", "ethanol_M400_S12": "ethanol",
             "ala2_M180_S1": "capped alanine", "ala2_M180_S27": "capped alanine",
             "cu27_M60_S27": "copper, periodic"}  # fmt: skip
    about = read("gdml_reference")["models"]
    yield f"{NUMBERS[len(about)]} sgdml models, open and periodic"
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


def solvers(read: Read) -> Iterator[str]:
    table, large = read("gdml_solvers")["table"], read("gdml_solvers")["large"]
    direct = table["direct"]["forces_mae"]
    # "Below 2 % of columns nothing is gained"; "All converged runs have the force error of the direct solution"
    assert not any(row["converged"] for row in table["rows"] if row["fraction"] < 0.02)
    assert max(abs(row["forces_mae"] - direct) for row in table["rows"] if row["converged"]) <= 0.001
    yield f"ethanol, {table['points']} geometries. Below 2 % of columns nothing is gained"
    yield f"the force error of the direct solution, {direct:.3f} kcal/mol/Å, to 0.001"
    yield f"{large['points']} geometries needs {large['direct_would_need_gb']:.1f} GB directly"
    yield (
        f"within a limit of {large['limit']} it takes {large['iterations']} iterations,"
        f" {large['peak_resident_gb']:.1f} GB and {large['seconds']:.0f} s"
    )
    yield f"(force MAE {large['forces_mae']:.3f})"


def crystals(read: Read) -> Iterator[str]:
    cases = read("gdml_materials")["cases"]

    def energy(case: str, points: int) -> str:
        rows = [row for row in cases[case]["rows"] if row["group"] == "full" and row["n_train"] == points]
        return f"{min(row['energy_mae_meV_per_atom'] for row in rows):.2g}"

    group = cases["Cu27"]["symmetry"]["full"]["permutations"]
    yield f"within {energy('Cu27', 2)} meV/atom after two training geometries with all {group} permutations"
    yield f"of hydrogen in palladium within {energy('PdH', 5)} after five"


def hydrogen(read: Read) -> Iterator[str]:
    found = read("gdml_rpmd")
    runs, exact, speed, model = found["runs"], found["rigid_lattice"], found["speed"], found["errors_on_beads"]

    def mean(run: str, what: str, digits: int) -> str:
        return value({"value": runs[run][what]["mean"], "error": runs[run][what]["error"]}, digits)

    classical = runs["batched_1"]["hydrogen"]["mean"]
    yield f"{classical:.1f} meV classically, {mean('rpmd', 'hydrogen', 1)} with 8 beads under `RPMDIntegrator`"
    yield f"{mean('batched_8', 'hydrogen', 1)} with the beads batched"
    times = [speed[way]["median_ms"] for way in ("batched", "one_by_one")]
    yield "takes half the time per step ({:.1f} against {:.1f} ms)".format(*times)
    yield (
        f"gives {exact['kinetic_meV']:.1f} meV and a mean square displacement of"
        f" {exact['squared_displacement_A2']:.3f} Å²"
    )
    spread = "hydrogen_squared_displacement"
    yield f"with 8 beads have {mean('rpmd', spread, 3)} and {mean('batched_8', spread, 3)}"
    most = runs["batched_16"]["hydrogen"]
    above = (most["mean"] - exact["kinetic_meV"]) / most["error"]
    yield f"With 16 beads the kinetic energy is {mean('batched_16', 'hydrogen', 1)} meV, {above:.1f} errors above it"
    yield f"adds {model['hydrogen_kinetic_change_by_the_model_meV']:.1f} ± {model['its_error_meV']:.1f} meV"


def derivatives(read: Read) -> Iterator[str]:
    found = read("gdml_descriptors")
    yield f"agree with the closed form within {within(found['largest_difference'])} kcal/mol/Å"
    yield f"are at least {floored(found['least_ratio'])} times as fast as by dense Hessians"
    products = min(model["training"]["forward_over_reverse"]["ratio"] for model in found["models"].values())
    yield f"products with the kernel matrix at least {floored(products)} times"
    table = {(row["geometries"], row["products"]): row for row in read("gdml_hessian_products")["table"]}
    for geometries in sorted({g for g, _ in table}):
        cells = []
        for count in (0, 1, 3, 9):
            row = table.get((geometries, count))
            equal = f" (as {row['equivalent_geometries']:.0f})" if row and count else ""
            cells.append("" if row is None else f"{row['force_mae']:.2f} ± {row['spread']:.2f}{equal}")
        yield f"| {geometries} | {' | '.join(cells)} |"


def coarse_grained(read: Read) -> Iterator[str]:
    found = read("cg_gdml")
    methods, floor = found["methods"], found["floor"]
    yield f"{NUMBERS[len(methods['reduced_rank']['seeds'])]} seeds of 100 runs of 5 ns (two-layer: 1 ns)"
    yield f"against {found['data']['trajectories']['test']} reweighted all-atom trajectories"
    for label, name, digits in (("reduced rank", "reduced_rank", (3, 4)), ("two layers", "two_layer", (2, 3))):
        over, cells = methods[name]["over_seeds"], []
        for (what, scale), (mean, bounds) in zip(
            (("mse_weighted", 1), ("js", 1), ("phi_positive", 100)),
            ((digits[0], digits[0]), (digits[1], 3), (1, 1)),
            strict=True,
        ):
            figure = {key: scale * x for key, x in over[what].items()}
            low = rounded(figure["low"], bounds) if figure["low"] > 0 else "0"
            cells.append(f"{rounded(figure['mean'], mean)} ({low}–{rounded(figure['high'], bounds)})")
        yield f"| {label} | {' | '.join(cells)} |"
    reference = {key: 100 * x for key, x in floor["phi_positive"].items()}
    yield f"{floor['mse_weighted']['value']:.3f} | {floor['js']['value']:.4f} | {value(reference, 2)} |"
    seeds = methods["reduced_rank"]["seeds"]
    # "No run of 300 blew up or came to the mirror image": 100 runs of 5 ns from each seed
    assert not any(seed["flips"] for seed in seeds)
    yield f"No run of {sum(seed['ns'] for seed in seeds) / 5:.0f} blew up"
    positive = [100 * seed["phi_positive"]["value"] for seed in seeds]
    yield "φ > 0 of the three reduced-rank models is {:.1f}, {:.1f} and {:.1f} %".format(*positive)
    limits = methods["two_layer"]["over_seeds"]
    assert limits["mse_weighted"]["mean"] > 0.25 and limits["js"]["mean"] > 0.03
    speed = read("cg_gdml_speed")
    gain, explicit = speed["beads_over_all_atom"]["reduced_rank"], speed["explicit_over_implicit_ns_per_day"]
    yield (
        f"{speed['beads']['reduced_rank']['copies']} bead runs side by side make {gain['ns_per_day']:.0f} times the"
        f" ns/day of all atoms with OBC2, and {significant(gain['ns_per_day'] / explicit, 2)} times those of all atoms"
    )
    yield f"per CPU hour it is {gain['psi_decorrelations']:.0f} times"
    learning_curves_stand_as_told(read)


def learning_curves_stand_as_told(read: Read) -> None:
    """The reduced rank has the least error from 3000 frames on, the MLP the smaller force error with 30,000."""
    curve = read("cg_gdml_learning_curve")["methods"]

    def mean(name: str, frames: str, error: Callable[[dict[str, Any]], float]) -> float:
        return sum(map(error, curve[name][frames])) / len(curve[name][frames])

    for frames in ("3000", "10000", "30000"):
        errors = {n: mean(n, frames, lambda seed: seed["mse_weighted"]["value"]) for n in curve if frames in curve[n]}
        assert min(errors, key=errors.__getitem__) == "reduced_rank"
    assert mean("mlp", "30000", lambda s: s["force_mse"]) < mean("reduced_rank", "30000", lambda s: s["force_mse"])


def replicas(read: Read) -> Iterator[str]:
    copies = read("replicas")["speed"]
    many = copies["gdml, 6 beads"]["512"]
    yield f"about {round(many['steps_per_second'], -5):,.0f} steps per second, {many['gain']:.0f} times"
    gains = [row["gain"] for n, row in copies["spookynet-ala2-gfn2"].items() if int(n) > 4]
    yield f"gains {min(gains):.1f} to {max(gains):.1f} times"
