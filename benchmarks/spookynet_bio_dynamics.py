"""Dynamics of a SpookyNet for biomolecules beside those of its teacher, GFN2-xTB, at 300 K.

    python benchmarks/spookynet_bio_dynamics.py --model ensemble.safetensors [--part zwitterion ...] [--ps 200]
    python benchmarks/spookynet_bio_dynamics.py --model ensemble.safetensors --reference-ps 20   (and runs by GFN2-xTB)

* zwitterion: Gly-Ala-Gly with NH3+ and COO- in a box of 2.45 nm of TIP3P, electrostatic embedding: the water sees the
  model's charges, which follow the geometry. In the run by GFN2-xTB the energy of the peptide is GFN2-xTB's and
  the charges are still the model's, so that the two runs differ in the energy of the peptide and nothing else, and
  frames of one can be reweighted to the other.
* induced: the same run by the model with induced dipoles on the peptide.
* mechanical: the same by mechanical embedding, a few ps, as a warning. The peptide's own energy is then that of the
  vacuum, where GFN2-xTB gives up the zwitterion, and the force field's charges do not change when a proton leaves.
* bridge: methylammonium and acetate in 24 waters; droplet: a sodium ion and a chloride ion in 30 waters each. All atoms
  are the model's or GFN2-xTB's. A wall (100 kJ/mol/nm^2) begins 8.5 angstrom from the middle of the waters' oxygens.
* Langevin, 1/ps, steps of 1 fs; hydrogens weigh 3.024 amu at the cost of their heavy neighbours, which leaves averages
  over positions as they are, and makes O-H swing once in 14 fs instead of once in 9 (TIP3P is rigid). Each run starts
  from the same built geometry, damped for 0.2 ps, then 2 ps with 10/ps. Frames every 25 fs; of runs by the model the
  first 10 ps are left out, of those by GFN2-xTB the first 2 ps. Bonds and protons are looked at in all frames.
* A zwitterion may give up its proton. Its shells are compared with GFN2-xTB's up to the first frame in which one moves
  (`model_until_a_proton_moves`).
* Errors against GFN2-xTB are those on frames of the model's own run, and so is the reweighting: weights exp(-(E_GFN2 -
  E_model)/kT), and the share of frames that averages over them rest on (exp of the entropy of the weights over their
  number). Below some per cent it says nothing, and is not reported further.
* drift: Verlet, 0.5 fs, masses as they are, after the same start: a straight line through the total energy.
* The uncertainty is watched at every step; `guard_would_have_stopped_at_ps` says when it first went beyond the limit.

Every run is made of pieces in the work folder and goes on where it was stopped. Parts can be made at a time by several
processes (--part bridge --runs-only), and looked at when they are there (--analyse). Runs by GFN2-xTB of droplets
belong to no model and are made once; --ps 0 makes nothing else. With --keep, sections whose runs are not in the work
folder stay in the results as they are, if they are of the same weights; `made` says by which file and machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write
from _dynamics import Plan, Record, carry_on, read, write_summary
from _dynamics_figure import draw
from _dynamics_measures import (
    agreement,
    audit,
    basins,
    contact,
    distance_between,
    number,
    protons,
    shape,
    shell,
    soundness,
    sureness,
    work_of,
)
from _dynamics_systems import Subject, subject

from openmm_mlff.analysis.distributions import floor, wasserstein
from openmm_mlff.analysis.observables import energy_drift, mean_with_error
from openmm_mlff.data import model_file
from openmm_mlff.data.files import sha256_of

#: systems of each part; the two droplets can be made at a time, too
PARTS = {
    "zwitterion": ("zwitterion",),
    "induced": ("induced",),
    "mechanical": ("mechanical",),
    "bridge": ("bridge",),
    "droplet": ("sodium", "chloride"),
    "sodium": ("sodium",),
    "chloride": ("chloride",),
}
EVERYTHING = ("zwitterion", "induced", "mechanical", "bridge", "droplet", "drift", "figure")
#: ps that are left out at the start, of runs by the model and by GFN2-xTB
RELAXATION, REFERENCE_RELAXATION = 10.0, 2.0
PIECE, BOX_PIECE, DROPLET_PIECE = 5.0, 1.0, 0.5
#: ps at most, of both runs with mechanical embedding
WARNING = 5.0
#: frames whose labels are made, by system
AUDITED = {"zwitterion": 1000, "induced": 1000, "mechanical": 50, "bridge": 100, "sodium": 100, "chloride": 100}
#: less than this share of frames carries no average
LEAST_SHARE = 0.05
DRIFT = {"peptide": "Ace-Ala-NMe in vacuum, 22 atoms", "sodium": "sodium ion and 30 waters, 91 atoms"}
DRIFT_PS, DRIFT_SEEDS = 20.0, (1, 2)


def carry_out(part: str, model: Path, ps: float, work: Path, runs: Path) -> None:
    """Make what is missing of the model's runs."""
    if part == "drift":
        for name in DRIFT:
            for seed in DRIFT_SEEDS:
                plan = Plan(model, timestep=0.5, frame=10.0, constant_energy=True, seed=seed)
                carry_on(subject(name, work), plan, runs / f"drift-{name}-{seed}", min(ps, DRIFT_PS))
        return
    for name in PARTS[part]:
        carry_on(subject(name, work), Plan(model, piece=PIECE), runs / name, min(ps, most(name)))


def most(name: str) -> float:
    """ps of a system's runs at most."""
    return WARNING if name == "mechanical" else np.inf


def reference_folder(name: str, work: Path, runs: Path) -> Path:
    """Where GFN2-xTB's run is; with electrostatic embedding it belongs to the model whose charges it takes."""
    return runs / "gfn2-zwitterion" if name == "zwitterion" else work / "gfn2" / name


def refer(part: str, ps: float, model: Path, work: Path, runs: Path) -> None:
    """Make what is missing of the runs by GFN2-xTB."""
    for name in PARTS.get(part, ()):
        it = subject(name, work)
        if it.induction:
            continue
        plan = Plan(model, teacher=True, piece=BOX_PIECE if it.mixed else DROPLET_PIECE)
        carry_on(it, plan, reference_folder(name, work, runs), min(ps, most(name)))


# -- what runs say ----------------------------------------------------------------------------------------------------


def later(record: Record, ps: float) -> Record:
    """Without the start; of a run that is too short for that, its second half."""
    end = float(record.table["time_ps"][-1])
    return record.after(ps if end > 2.0 * ps else 0.5 * end)


def common(it: Subject, record: Record, settled: Record) -> dict[str, Any]:
    """What is said of every run, whatever drives it."""
    where, charges = protons(it, record)
    result = {**soundness(it, record), "protons": where}
    if it.mixed:
        hydrogens = 3 + charges[:, 0] - 1
        result["protons"]["frames_with_three_hydrogens_on_the_ammonium"] = int((hydrogens == 3).sum())
        angles, ends = shape(it, settled.positions)
        result["ramachandran"] = basins(angles)
        result["end_to_end_A"] = number(mean_with_error(ends), 2)
        result["rows"] = {"phi_psi": angles.round(1).tolist(), "ends": ends.round(3).tolist()}
    if it.name == "bridge":
        result["protons"]["share_of_frames_as_ion_pair"] = round(float((charges[:, 0] == 1).mean()), 5)
        apart = contact(it, record)
        late = contact(it, settled)
        result["nitrogen_to_nearest_oxygen_A"] = {
            **number(mean_with_error(late)),
            "smallest": round(float(apart.min()), 3),
            "largest": round(float(apart.max()), 3),
            "share_below_3.5": round(float((late < 3.5).mean()), 4),
        }
        result["rows"] = {"ps": record.table["time_ps"].round(3).tolist(), "apart": apart.round(3).tolist()}
    shells: dict[str, Any] = {}
    if it.mixed or it.name == "bridge":
        shells["water O about N of the ammonium"] = shell(it, settled, it.positive(), "N")
        shells["water O about O of the carboxylate"] = shell(it, settled, it.negative(), "O")
    elif it.name == "sodium":
        shells["water O about Na"] = shell(it, settled, it.positive(), "Na")
    else:
        shells["water O about Cl"] = shell(it, settled, it.negative(), "Cl")
    return {**result, "shells": shells}


def reweighted(it: Subject, settled: Record, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Averages of the model's frames with the weights of GFN2-xTB, if enough frames carry them."""
    work = work_of(found)
    weights = np.exp(-(work - work.min()))
    angles, ends = shape(it, settled.positions[found["frames"]])
    mean = float(np.average(ends, weights=weights))
    plain = basins(angles)
    return {
        "ramachandran": basins(angles, weights),
        "ramachandran_of_the_same_frames": plain,
        "end_to_end_A": round(mean, 2),
        "end_to_end_of_the_same_frames_A": round(float(ends.mean()), 2),
        "rows": {"ends": ends.round(3).tolist(), "weights": (weights / weights.sum()).round(8).tolist()},
    }


def compare(it: Subject, ours: Record, theirs: Record) -> dict[str, Any]:
    """How far two runs are apart, beside what two stretches of the model's run as long as the other one are apart."""

    def both(values: np.ndarray, other: np.ndarray) -> dict[str, Any]:
        n = min(len(other), len(values) // 2)
        between = floor([values[: len(values) // 2], values[len(values) // 2 :]], n, wasserstein)
        return {
            "wasserstein": distance_between(values, other),
            "of_two_stretches_of_the_run": round(between.value, 3),
        }

    result: dict[str, Any] = {}
    if it.name == "zwitterion":
        result["end_to_end_A"] = both(shape(it, ours.positions)[1], shape(it, theirs.positions)[1])
    if it.name == "bridge":
        result["nitrogen_to_nearest_oxygen_A"] = both(contact(it, ours), contact(it, theirs))
    return result


def more_waters(section: dict[str, Any]) -> dict[str, Any]:
    """Waters in first shells: the model's run less GFN2-xTB's."""
    found = {}
    for name, ours in section.get("model_until_a_proton_moves", section["model"])["shells"].items():
        a, b = ours["waters_within"], section["gfn2"]["shells"][name]["waters_within"]
        error = float(np.hypot(a["error"], b["error"]))
        found[name] = {"value": round(a["value"] - b["value"], 2), "error": round(error, 2)}
    return found


def analyse(name: str, model: Path, work: Path, runs: Path) -> dict[str, Any]:
    """Everything about one system; sections are missing where their runs are."""
    it, record, reference = subject(name, work), read(runs / name), read(reference_folder(name, work, runs))
    result: dict[str, Any] = {"atoms": len(it.positions), "atoms_of_the_region": len(it.region)}
    settled: Record | None = None
    if record is not None:
        settled = later(record, RELAXATION)
        result["model"] = common(it, record, settled)
        moved = result["model"]["protons"]["first_moved_ps"]
        if it.mixed and moved is not None and moved > 2.0 * RELAXATION:
            result["model_until_a_proton_moves"] = common(it, record.before(moved), settled.before(moved))
        result["model"]["uncertainty"] = sureness(record, model)
        result["model"]["rows_of_uncertainty"] = {
            "rows": {
                "ps": record.table["time_ps"][::4].round(3).tolist(),
                "spread": np.nan_to_num(record.table["force_uncertainty_eV_A"][::4]).round(5).tolist(),
            }
        }
        found = audit(it, settled, model, runs / name / "audit.safetensors", AUDITED[name])
        errors = agreement(it, settled, found)
        result["against_gfn2_on_frames_of_the_run"] = errors
        if name == "zwitterion" and errors["effective_share_of_frames"] > LEAST_SHARE:
            result["reweighted_to_gfn2"] = reweighted(it, settled, found)
    if reference is not None:
        theirs = later(reference, REFERENCE_RELAXATION)
        result["gfn2"] = common(it, reference, theirs)
        if settled is not None:
            result["apart"] = {**compare(it, settled, theirs), "waters_within": more_waters(result)}
    return result


def analyse_drift(runs: Path) -> dict[str, Any]:
    """Drift of the total energy of every run at constant energy."""
    result: dict[str, Any] = {}
    for name, title in DRIFT.items():
        rows = []
        for seed in DRIFT_SEEDS:
            record = read(runs / f"drift-{name}-{seed}")
            if record is None:
                continue
            total = record.table["potential_eV"] + record.table["kinetic_eV"]
            atoms = record.positions.shape[1]
            slope = energy_drift(record.table["time_ps"], total, atoms)
            rows.append(
                {
                    "seed": seed,
                    "ps": round(float(record.table["time_ps"][-1]), 3),
                    "drift_meV_per_atom_per_ps": round(1e3 * slope.value, 6),
                    "error": round(1e3 * slope.error, 6),
                    "scatter_meV_per_atom": round(1e3 * float(total.std()) / atoms, 5),
                    "temperature_K": round(float(record.table["temperature_K"].mean()), 1),
                    "ended_early": record.failure,
                }
            )
        if rows:
            result[name] = {"what": title, "runs": rows}
    return result


# -- tables and files -------------------------------------------------------------------------------------------------


def without_rows(values: Any) -> Any:
    """The same without what is there for the picture."""
    if not isinstance(values, dict):
        return values
    kept = {key: without_rows(value) for key, value in values.items() if key != "rows"}
    return {key: value for key, value in kept.items() if value != {}}


def report(result: dict[str, Any]) -> None:
    """The table that is printed."""
    from rich.console import Console
    from rich.table import Table

    table = Table("system", "by", "ps", "carbon's bonds broken", "protons moved", "waters in first shells")
    for name, section in result.items():
        for driver in ("model", "gfn2"):
            if driver in section:
                row = section[driver]
                shells = ", ".join(
                    f"{s['waters_within']['value']:.2f} ± {s['waters_within']['error']:.2f}"
                    for s in row["shells"].values()
                )
                broken = str(row.get("bonds_of_carbon", {}).get("broken", "-"))
                moved = str(row["protons"]["hydrogens_that_changed_atom"])
                table.add_row(name, driver, f"{row['ps']:g}", broken, moved, shells)
    Console().print(table)
    for name, section in result.get("drift", {}).items():
        for row in section["runs"]:
            print(f"drift, {name}: {row['drift_meV_per_atom_per_ps']:+.2e} ± {row['error']:.1e} meV/atom/ps")


def weights_of(model: Path) -> str:
    """Checksum of the numbers of a model file, whatever its card says."""
    tensors = model_file.load(model)[1]
    content = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(content).hexdigest()


def elsewhere(names: Sequence[str], weights: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sections of the results whose runs were made elsewhere, and by which file and machine.

    Refuses those of other weights.
    """
    path = HERE / "spookynet_bio_dynamics.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"weights": weights, "made": {}}
    if found["weights"] != weights:
        raise SystemExit(f"--keep: expected results of the weights {weights[:8]}, got those of {found['weights'][:8]}")
    kept = [name for name in names if name in found]
    return {name: found[name] for name in kept}, {name: found["made"][name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model file")
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "drift", "figure"], default=EVERYTHING)
    parser.add_argument("--ps", type=float, default=200.0, help="of each run by the model")
    parser.add_argument("--reference-ps", type=float, default=0.0, help="of runs by GFN2-xTB; 0 takes what is there")
    parser.add_argument("--analyse", action="store_true", help="make no runs")
    parser.add_argument("--keep", action="store_true", help="results whose runs were made elsewhere stay in the file")
    parser.add_argument("--runs-only", action="store_true", help="look at none")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".work" / "spookynet_bio_dynamics")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work
    runs = work / f"model-{sha256_of(arguments.model)[:8]}"
    for part in arguments.part:
        if part == "figure":
            continue
        if not arguments.analyse:
            carry_out(part, arguments.model, arguments.ps, work, runs)
            if arguments.reference_ps:
                refer(part, arguments.reference_ps, arguments.model, work, runs)
        if arguments.runs_only:
            continue
        if part == "drift":
            write_summary(runs / "drift.json", analyse_drift(runs))
        for name in PARTS.get(part, ()):
            write_summary(runs / f"{name}.json", analyse(name, arguments.model, work, runs))
    if arguments.runs_only:
        return
    names = ["zwitterion", "induced", "mechanical", "bridge", "sodium", "chloride", "drift"]
    there = [name for name in names if (runs / f"{name}.json").exists()]
    result = {name: json.loads((runs / f"{name}.json").read_text(encoding="utf-8")) for name in there}
    report(result)
    weights = weights_of(arguments.model)
    missing = [name for name in names if name not in there]
    kept, made = elsewhere(missing, weights) if arguments.keep else ({}, {})
    here = {"model": sha256_of(arguments.model), "machine": machine()}
    made |= {name: here for name in there}
    sections = kept | without_rows(result)
    ordered = {name: sections[name] for name in names if name in sections}
    write("spookynet_bio_dynamics", {"what": __doc__, "weights": weights, "made": made, **ordered})
    if "figure" in arguments.part:
        draw(result, HERE / "spookynet_bio_dynamics.png")


if __name__ == "__main__":
    main()
