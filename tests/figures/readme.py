"""What the JSON files say of the figures in README.md."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from .common import NUMBERS, Read, power, rounded, within
from .gdml import agreement
from .led import splits_that_meet_all
from .resolv import largest_difference


def figures(read: Read) -> Iterator[str]:
    return chain(
        *(reference(read), step(read), bundled(read), bio(read), gdml(read), so3lr(read)),
        *(embedding(read), solvation(read), led(read)),
    )


def reference(read: Read) -> Iterator[str]:
    groups = read("spookynet_reference")["difference"]
    count = sum(max(g["float32"]["structures"], g["float64"]["structures"]) for g in groups.values())
    elements = groups["elements_visible"]["float64"]["structures"]
    yield f"(`spookynet_reference.json`, {count} structures, Z = 1 to {elements}"
    labels = {"float64": "float64", "float64, two structures with tied attention maxima": "tied",
              "float64, through OpenMM (Reference platform)": "through_openmm",
              "float32 against the float64 numbers": "float32_against_float64"}  # fmt: skip
    for label, kind in labels.items():
        rows = [group[kind] for group in groups.values() if kind in group]
        worst = (power(max(row[what] for row in rows)) for what in ("energy", "forces", "charges") if what in rows[0])
        yield f"| {label} | {' | '.join(worst)} |"
    assert groups["visible"]["tied"]["structures"] == 2


def step(read: Read) -> Iterator[str]:
    for atoms, found in read("spookynet_step")["molecules"].items():
        ways = (("op_by_op", 1), ("compiled", 2), ("native", 2))
        times = " | ".join(f"{found[way]['cpu']['median_ms']:.{digits}f}" for way, digits in ways)
        ratio, md = found["native"]["times_faster_than_compiled"], found["step_native"]["cpu"]["median_ms"]
        yield f"| {atoms} | {times} | {ratio:.1f} | {md:.2f} |"


def bundled(read: Read) -> Iterator[str]:
    found = read("spookynet_ala2")
    errors, by = found["errors"]["tables"]["all"][0], found["errors"]["by_temperature"]
    yield f"on {NUMBERS[found['errors']['trajectories']]} free trajectories at 300, 450 and 600 K"
    parts = ", ".join(f"{rows[0]['forces_mae']:.1f} at {temperature}" for temperature, rows in by.items())
    yield f"| force MAE | {errors['forces_mae']:.1f} ± {errors['forces_mae_error']:.1f} meV/Å ({parts}) |"
    yield f"| energy MAE | {errors['energy_mae']:.2f} ± {errors['energy_mae_error']:.2f} meV/atom |"
    yield f"| dipole MAE | {errors['dipole_mae']:.0f} ± {errors['dipole_mae_error']:.0f} me·Å |"
    nve, nvt, maps = found["nve"], found["nvt"], found["ramachandran"]
    drift = f"{nve['drift_meV_per_atom_per_ps']:.4f} ± {nve['error_meV_per_atom_per_ps']:.4f} meV/atom/ps"
    yield f"| NVE drift, {nve['ps']:.0f} ps at {nve['timestep_fs']} fs | {drift} |"
    assert nvt["bonds_broken"] == 0
    longest = 100 * (nvt["largest_bond_over_its_mean"] - 1)
    yield f"| NVT, {nvt['ps']:.0f} ps at 300 K | no broken bond; the longest stretch of any bond is {longest:.0f} % |"
    yield f"divergence from GFN2-xTB's own {maps['divergence_nats']:.3f} nats"
    yield f"sampling floor {maps['floor_nats']:.3f} nats |"


def bio(read: Read) -> Iterator[str]:
    data, tables = read("bio_dataset"), read("spookynet_bio")["classes"]
    rows = {row["name"]: row for table in tables["tables"].values() for row in table}
    yield f"{NUMBERS[read('spookynet_bio_release')['calibration']['n_members']]} SpookyNets trained on"
    yield f"trained on {data['splits']['train']:,} structures of GFN2-xTB"
    yield f"on {rows['all']['structures']:,} structures of molecules held out"

    def forces(name: str) -> str:
        return " against ".join(f"{rows[name][model]['forces_mae']:.0f}" for model in ("ensemble", "published"))

    yield f"force MAE {forces('all')} meV/Å"
    yield "at most half in {} of {} closed-shell classes".format(*tables["half"]["ensemble"])
    yield f"(zwitterions {forces('zwitterion')})"
    free = [read("spookynet_bio")["transfers"]["kinds"][kind] for kind in ("zwitterions", "salt bridges")]
    own, published = (sum(row[model]["moved_too"] for row in free) for model in ("ensemble", "published"))
    yield f"({own} of {sum(row['moved_by_gfn2'] for row in free)} unseen frames; {published})"
    isomers = tables["relative"]["mean_absolute"]["zwitterion"]
    yield f"within {isomers['ensemble']:.2f} eV on average ({isomers['published']:.1f})"
    yield f"its energies ({rows['all']['ensemble']['energy_mae']:.0f} meV/atom)"


def gdml(read: Read) -> Iterator[str]:
    yield "numbers within {} kcal/mol and {} kcal/mol/Å".format(*agreement(read))
    ratios = [model["ratio"] for model in read("gdml_step")["models"].values()]
    fair, shipped = ([ratio[way] for ratio in ratios] for way in ("chunk_reset", "as_shipped"))
    yield f"takes {min(fair):.0f} to {max(fair):.0f} times less than with that program's own calculator"
    yield f"{min(shipped):.0f} to {max(shipped):.0f} times less than as it is shipped"
    found = read("cg_gdml")["methods"]["reduced_rank"]
    seeds, over = found["seeds"], found["over_seeds"]
    yield f"within {over['mse_weighted']['mean']:.2f} kT² ({over['js']['mean']:.3f} nats)"
    yield f"{NUMBERS[len(seeds)]} seeds of {seeds[0]['ns']:.0f} ns"


def so3lr(read: Read) -> Iterator[str]:
    stored = read("so3lr_reference")["stored"]

    def worst(*kinds: str) -> tuple[str, str]:
        groups = [group for kind in kinds for group in stored[kind].values()]
        energy, forces = (within(max(group[what] for group in groups)) for what in ("energy", "forces"))
        return energy, forces

    count = sum(group["structures"] for group in stored["float64"].values())
    yield "{} structures within {} eV and {} eV/Å in double precision".format(count, *worst("float64"))
    yield "{} eV and {} eV/Å in single".format(*worst("float32", "float32, native"))
    compared = read("so3lr_step")["compared"]
    found = [compared[name] for name in ("alanine dipeptide", "water box 192, 6 A", "water droplet 600")]
    times = [f["native"]["wall"]["median_ms"] for f in found]
    ratios = [f["ratio"]["median"] for f in found]
    yield "takes {}, {} and {} ms at 22, 192 and 600 atoms".format(*(f"{x:.{0 if x > 10 else 1}f}" for x in times))
    yield "{:.0f}, {:.0f} and {:.0f} times less".format(*ratios)
    systems = read("so3lr_stability")["systems"]
    small, large = systems["dipeptide"], systems["peptide"]
    assert small["bonds_broken"] == large["bonds_broken"] == 0
    yield f"{small['ps']:.0f} ps of capped alanine and {large['ps']:.0f} ps of a helix of {large['atoms']} atoms"
    runs = [run for run in read("so3lr_water")["runs"].values() if run["ensemble"] == "nve"]
    drift = [abs(run["drift_meV_per_atom_per_ps"]) for run in runs]
    yield f"drifts by {min(drift):.3f} to {max(drift):.3f} meV/atom/ps"


def embedding(read: Read) -> Iterator[str]:
    found = read("embedding_clusters")["kcal_per_mol"]["clusters, all"]
    yield f"{found['n']} clusters of {found['solutes']} solutes"
    ways = {"mechanical": "mechanical", "electrostatic": "electrostatic",
            "with induced dipoles": "electrostatic + induction"}  # fmt: skip
    for label, name in ways.items():
        error = found[name]["mean_absolute_error"]
        yield "{} {:.1f} ({:.1f} to {:.1f})".format(label, error["value"], *error["interval"])
    small, large = read("embedding_cost")["models"]["so3lr"].values()
    yield (
        f"costs {small['electrostatic']['ratio']:.1f} times one of mechanical embedding with 22 ML atoms among"
        f" {small['atoms']}, {large['electrostatic']['ratio']:.1f} times among {large['atoms']:,}"
    )


def solvation(read: Read) -> Iterator[str]:
    table = read("resolv_hydration")["table"]
    pair, gaff = table["pair"], table["GAFF"]
    error, other = (f"{rounded(row['mae'], 2)} ± {rounded(row['mae_error'], 2)}" for row in (pair, gaff))
    yield f"{pair['molecules']} molecules that it has not seen"
    yield f"mean absolute error of {error} kcal/mol (median {rounded(pair['median_error'], 2)})"
    yield f"where GAFF in TIP3P has {other} ({rounded(gaff['median_error'], 2)}"
    faster = read("resolv_speed")["methods"]["pair, water, 64 in one System"]["over_TIP3P"]
    yield f"at {faster:.1f} times the ns/day of explicit water per solute"
    yield f"NequIP agrees with jax-md's numbers within {largest_difference(read)} in double precision"


def led(read: Read) -> Iterator[str]:
    found = read("led_ala2")
    models, md = [m for m in found["models"] if m["name"] == "LED"], found["md"]

    def between(values: list[float], digits: int) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    yield f"{NUMBERS[len(models)]} seeds against molecular dynamics"
    populations = [m["alphaR"]["value"] for m in models]
    yield f"population of αR {between(populations, 2)} (MD {md['alphaR']['value']:.2f})"
    slow = [m["timescale_ps"]["5"]["value"] for m in models]
    yield f"slow time scale {between(slow, 0)} ps at a lag of 5 ps (MD {md['timescale_ps']['5']['value']:.0f})"
    maps = between([m["jensen_shannon"] for m in models], 3)
    yield f"{maps} nats (two sets of MD as long as the training data: {found['floor']['train']:.3f})"
    shapes = [m["geometry"] for m in models]
    assert not any(shape["inverted"] for shape in shapes)
    yield f"no inverted centre in {sum(shape['frames'] for shape in shapes):,} decoded frames"
    rows = read("led_speedup")["rows"]
    alone, decoded = (rows[name]["over"]["MD, native OBC2"] for name in ("LED, 1 walker", "LED, 1 walker, decoded"))
    yield f"advances {alone:.0f} times as fast as MD with the native GB force"
    yield f"{decoded:.0f} times with every frame decoded"
    trpcage = read("led_trpcage")
    verdict = trpcage["verdict"]["LED"]
    assert all(verdict["timescale_inside"]["timescale_ps"])
    within = verdict["within_twice_the_floor"]
    assert all(within.values())
    yield f"all {NUMBERS[len(within)]} distributions are within twice what two sets of MD differ by"
    met = splits_that_meet_all(trpcage)
    yield f"with other runs as the test they are in {NUMBERS[sum(met)]} cases of {NUMBERS[len(met)]}"
