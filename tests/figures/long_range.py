"""What the JSON files say of the figures in docs/long_range.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .common import Read, power, signed


def figures(read: Read) -> Iterator[str]:
    rows = read("lattice_sums")["rows"]
    ways = [f"{program} {sum_}" for program in ("openmm-mlff", "torch-pme", "mlipops") for sum_ in ("ewald", "pme")]
    for atoms in sorted({row["atoms"] for row in rows}):
        times = {row["way"]: row["median_ms"] for row in rows if row["atoms"] == atoms}
        shown = [f"{times[w]:.{0 if times[w] > 100 else 1}f} ms" if w in times else "" for w in ways]
        yield f"| {atoms} | {' | '.join(shown)} |"
    worst = [max(row["force_error_meV_per_angstrom"] for row in rows if row["way"] == w) for w in ways]
    precise = read("lattice_sums")["double_precision_against_torch_pme"]
    yield f"with torch-pme's to {power(precise['energy_eV'])} eV"
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
    yield from densities({name: run for name, run in water["runs"].items() if run["ensemble"] == "npt"})
    drift = [abs(run["drift_meV_per_atom_per_ps"]) for run in water["runs"].values() if run["ensemble"] == "nve"]
    # "four- to fourteenfold below 0.02 meV/atom/ps"
    assert 4 <= 0.02 / max(drift) < 5 and round(0.02 / min(drift)) == 14
    for label, method in (("shifted", "shifted"), ("PME", "pme")):
        cells = [pressure(p) for p in water["pressure_minus_that_of_ewald"] if p["method"] == method]
        yield f"| {label} | {' | '.join(cells)} |"
    methods = read("so3lr_step")["methods"]
    ratios = {n: (methods[n]["ewald"]["ratio"], methods[n]["pme"]["ratio"]) for n in methods}
    yield f"{ratios['192'][0]:.2f} and PME {ratios['192'][1]:.2f}"
    large = "{:.2f} and {:.2f}".format(*ratios["3456"])
    yield f"{ratios['1536'][0]:.2f} and {ratios['1536'][1]:.2f}, at 3,456 atoms {large}."


def densities(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    pme = [run["density_g_cm3"] for run in runs.values() if run["method"] == "pme"]
    shifted = next(run["density_g_cm3"] for run in runs.values() if run["method"] == "shifted")
    yield f"{min(pme):.2f} and {max(pme):.2f} with PME (two seeds that agree), {shifted:.2f} with the shifted form"
    yield f"differ by {shifted - sum(pme) / len(pme):.2f} g/cm³"
    light = [100 * (1 - density / 0.997) for density in pme]
    yield f"makes water some {min(light):.0f} to {max(light):.0f} % too light"


def pressure(found: dict[str, Any]) -> str:
    """0 where PME is only compared with Ewald at the same cutoff."""
    if round(found["bar"]) == 0 and found["method"] == "pme":
        return "0"
    plus = "+" if found["bar"] > 0 else ""
    return f"{plus}{signed(found['bar'])} ± {found['error']:.0f} bar"
