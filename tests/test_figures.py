"""The figures on the pages are those of the JSON files beside the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Read = Callable[[str], dict[str, Any]]


def signed(x: float, digits: int = 0) -> str:
    """With a minus sign as it is printed, and thousands apart."""
    return f"{x:,.{digits}f}".replace("-", "−")


def so3krates(read: Read) -> Iterator[str]:
    stored = read("so3lr_reference")["stored"]

    def worst(kind: str, what: str) -> float:
        return max(group[what] for group in stored[kind].values())

    exact, native, single = "float64", "float64, native", ("float32", "float32, native")
    yield f"energies within {worst(exact, 'energy'):.0e} eV, forces within {worst(exact, 'forces'):.0e}".replace(
        "-", "-"
    )
    yield f"native code within {worst(native, 'forces'):.0e} eV/Å".replace("e-0", "e-")
    energy, forces = (max(worst(kind, what) for kind in single) for what in ("energy", "forces"))
    yield f"single precision {energy:.0e} eV and {forces:.0e} eV/Å".replace("e-0", "e-")
    speed = read("so3lr_step")
    places = {"alanine dipeptide": "{} ms against {} at 22 atoms ({} times faster)",
              "water box 192, 6 A": "{} against {} in a box of 192 ({} times)",
              "water droplet 600": "{} against {} in a droplet of 600 ({} times)"}  # fmt: skip
    for name, sentence in places.items():
        found = speed["compared"][name]
        own, port = (found[way]["wall"]["median_ms"] for way in ("native", "port"))
        yield sentence.format(f"{own:.{0 if own > 10 else 1}f}", f"{port:.0f}", f"{found['ratio']['median']:.0f}")
    yield f"power {speed['exponent']['wall']:.2f} of the number of atoms"
    yield f"10,368 atoms ({speed['sizes']['water box 10368']['wall']['median_ms']:.0f} ms"
    systems = read("so3lr_stability")["systems"]
    longest = max(s["largest_bond_over_its_mean"] for s in systems.values())
    shortest = min(s["smallest_bond_over_its_mean"] for s in systems.values())
    assert longest <= 1.13 and shortest >= 0.89 and not any(s["bonds_broken"] for s in systems.values())
    yield "13 % longer or 11 % shorter"
    helix = systems["peptide"]["helix_percent_by_fifths"]
    yield f"{min(helix):.0f} to {max(helix):.0f} % of its residues"
    minima = read("so3lr_minima")
    yield f"{minima['minima']} minima"
    yield f"{minima['minimisations']} minimisations, {minima['cpu_minutes']} minutes"
    yield f"{minima['distinct_by_torsions']['20']} of them differ by 20 degrees"
    yield f"{minima['cis_peptide_bonds']['0']} have trans peptide bonds only, and {minima['within_eV']['0.5']} lie"
    assert minima["check"]["largest_move_degrees"] < 2 and minima["check"]["largest_fall_meV"] <= 0.03
    models = read("so3krates_ethanol")["models"]
    rows = {"SO3krates, degrees 1, 2, 3": "equivariant", "the same without degrees": "invariant",
            "sGDML, σ = 15, 12 permutations": "sgdml"}  # fmt: skip
    for label, name in rows.items():
        survived = [models[name]["dynamics"][t]["survived"] for t in ("300", "500", "1000", "2000")]
        yield f"| {label} | {models[name]['forces_mae_kcal_mol_A']:.2f} | {' | '.join(map(str, survived))} |"


def embedding(read: Read) -> Iterator[str]:
    clusters = read("embedding_clusters")
    found = clusters["kcal_per_mol"]
    kinds = ("clusters, neutral", "clusters, ionic", "clusters, all")

    def cell(figure: dict[str, Any]) -> str:
        low, high = figure["interval"]
        return f"{figure['value']:.1f} [{signed(low, 1)}, {high:.1f}]"

    rows = {"mechanical": "mechanical", "electrostatic": "electrostatic",
            "electrostatic, damped (one width, fitted)": "electrostatic, damped",
            "electrostatic + induction (three numbers, fitted)": "electrostatic + induction"}  # fmt: skip
    for label, name in rows.items():
        yield f"| {label} | {' | '.join(cell(found[kind][name]['mean_absolute_error']) for kind in kinds)} |"
    gains = {name: found["clusters, all"][name]["less_than_mechanical_by"] for name in rows.values()}
    yield f"falls by {cell(gains['electrostatic'])}"
    yield f"and by {cell(gains['electrostatic + induction'])} with induction over all clusters"
    pairs = [found["pairs, all"][name]["mean_absolute_error"]["value"] for name in rows.values()]
    yield f"({found['pairs, all']['n']} pairs): {', '.join(f'{x:.2f}' for x in pairs)}"
    keywords = clusters["keywords"]["electrostatic + induction"]
    yield f'"dampingLength": {keywords["dampingLength"]:.3f}'
    yield ", ".join(f'"{symbol}": {x:.3f}' for symbol, x in keywords["polarizabilities"].items())
    yield f'"inductionDamping": {keywords["inductionDamping"]:.2f}'
    drift = read("embedding_nve")["drift"]
    for name, figure in drift.items():
        value, error = figure["meV_per_atom_per_ps"] * 1e5, figure["standard_error"] * 1e5
        yield f"{'−' if value < 0 else '+'}{abs(value):.0f} ± {error:.0f} ({name})"
    cost = read("embedding_cost")["models"]
    for label, name in (("SO3LR", "so3lr"), ("spookynet-ala2-gfn2", "spookynet-ala2-gfn2")):
        small, large = (
            [cost[name][size][way]["ratio"] for way in ("electrostatic", "with induction")] for size in cost[name]
        )
        word = "with induction " if name == "so3lr" else ""
        yield f"| {label} | {small[0]:.2f} ({word}{small[1]:.2f}) | {large[0]:.2f} ({large[1]:.2f}) |"


def long_range(read: Read) -> Iterator[str]:
    rows = read("lattice_sums")["rows"]
    ways = [f"{program} {sum_}" for program in ("openmm-mlff", "torch-pme", "mlipops") for sum_ in ("ewald", "pme")]
    for atoms in sorted({row["atoms"] for row in rows}):
        times = {row["way"]: row["median_ms"] for row in rows if row["atoms"] == atoms}
        shown = [f"{times[w]:.{0 if times[w] > 100 else 1}f} ms" if w in times else "" for w in ways]
        yield f"| {atoms} | {' | '.join(shown)} |"
    worst = [max(row["force_error_meV_per_angstrom"] for row in rows if row["way"] == w) for w in ways]
    yield f"| largest force error, meV/Å | {' | '.join(f'{x:.{2 if x > 0.1 else 3}f}' for x in worst)} |"
    water = read("so3lr_water")
    for run in water["runs"].values():
        start = f"{run['cutoff_nm']} nm | {run['ps']:.0f} | {run['temperature_K']:.0f} K |"
        if run["ensemble"] == "nve":
            yield f"{start} {signed(run['drift_meV_per_atom_per_ps'], 4)} ± {run['drift_error']:.4f} |  |"
        else:
            yield f"{start}  | {run['density_g_cm3']:.3f} ± {run['density_error']:.3f} |"
    for label, row in zip(
        ("a water molecule, stretched by 2 %", "benzene", "alanine dipeptide", "liquid water, against Ewald"),
        water["forces_of_the_shifted_form"],
        strict=True,
    ):
        figures = (row[name] for name in ("all", "changed_by_12_angstrom", "changed_by_6_angstrom"))
        yield f"| {label} | {' | '.join(f'{x:.2f}' for x in figures)} |"
    shifted = [p for p in water["pressure_minus_that_of_ewald"] if p["method"] == "shifted"]
    pressures = [f"{signed(p['bar'])} ± {p['error']:.0f} bar" for p in shifted]
    yield f"| shifted | {' | '.join(pressures)} |"
    methods = read("so3lr_step")["methods"]
    ratios = {n: (methods[n]["ewald"]["ratio"], methods[n]["pme"]["ratio"]) for n in methods}
    yield f"{ratios['192'][0]:.2f} and PME {ratios['192'][1]:.2f}"
    yield f"{ratios['1536'][0]:.2f} and {ratios['1536'][1]:.2f}, at 3,456 atoms {ratios['3456'][0]:.2f}"


def gdml(read: Read) -> Iterator[str]:
    worst = read("gdml_reference")["models"].values()
    energy, forces = (max(m[way][what] for m in worst for way in m if way in ("torch", "fused", "openmm"))
                      for what in ("energy", "forces"))  # fmt: skip
    assert energy <= 3e-7 and forces <= 1.05e-6
    yield "energies within 3e-7 kcal/mol and forces within 1e-6 kcal/mol/Å"
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


def spookynet_bio(read: Read) -> Iterator[str]:
    data, bio, calibration = (read(n) for n in ("bio_dataset", "spookynet_bio", "spookynet_bio_calibration"))
    yield f"{data['structures']:,} structures of {data['groups']:,} molecules and complexes"
    yield "({train:,} train, {valid:,} valid, {test:,} test;".format(**data["splits"])

    def cell(row: dict[str, Any], quantity: str, digits: int) -> str:
        error = row.get(f"{quantity}_error")
        return f"{row[quantity]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    for row in [r for table in bio["classes"]["tables"].values() for r in table]:
        own, published = row["ensemble"], row["published"]
        forces = f"{row['structures']} | {cell(own, 'forces_mae', 0)} | {cell(published, 'forces_mae', 0)}"
        yield f"| {forces} | {cell(own, 'energy_mae', 1)} | {cell(published, 'energy_mae', 0)} |"
    yield "({} of {})".format(*bio["classes"]["half"]["ensemble"])
    errors = bio["classes"]["relative"]["mean_absolute"]
    for label, words in (("zwitterion", "mean error"), ("charged peptide", "relative to neutral ones")):
        count = sum(r["class"] == label for r in bio["classes"]["relative"]["rows"])
        yield f"{words} {errors[label]['ensemble']:.2f} eV over {count}"
        yield f"(published: {errors[label]['published']:.1f})"
    spins = {r["name"]: abs(r["ensemble"] - r["GFN2-xTB"]) for r in bio["splittings"]["rows"]}
    unseen = ("butadiene", "CHF", "phenylnitrene")
    trained = [error for name, error in spins.items() if name not in unseen]
    near = sum(error <= 0.1 for error in trained)
    yield f"of {len(trained)} singlet-triplet splittings of molecules that were trained on, {near}"
    yield "butadiene {:.2f}, CHF {:.2f}, phenylnitrene {:.1f} eV".format(*(spins[name] for name in unseen))
    far = bio["far_waters"]["rows"]
    for solute in {row["solute"] for row in far}:
        values = [1e3 * row["ensemble"] for row in far if row["solute"] == solute]
        yield f"| {solute} | {' | '.join(signed(x, 1) for x in values)} |"
    forces = calibration["forces"]["rows"][0]
    yield f"the rank correlation is {forces['spearman']:.2f}"
    yield f"{100 * calibration['frames']['rows'][0]['flagged']:.0f} % are noticed"
    yield f"{calibration['factors']['force_limit']:.1f} eV/Å, is the largest uncertainty"
    parts = [part["test"] for part in read("spookynet_learning_curve")["parts"]]
    yield "forces {:.0f}, {:.0f}, {:.0f} meV/Å".format(*(part["forces_mae"] for part in parts))
    yield "energies {:.0f}, {:.0f}, {:.0f} meV/atom".format(*(part["energy_mae"] for part in parts))


PAGES = [so3krates, embedding, long_range, gdml, spookynet_bio]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
def test_figures_are_those_of_the_benchmarks(page: Callable[[Read], Iterator[str]], repository: Path) -> None:
    text = (repository / "docs" / f"{page.__name__}.md").read_text(encoding="utf-8")

    def read(name: str) -> dict[str, Any]:
        return json.loads((repository / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))

    # a line may end anywhere
    words = " ".join(text.split())
    assert [figure for figure in page(read) if " ".join(figure.split()) not in words] == []
