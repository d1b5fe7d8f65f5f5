"""Whether the ensemble spookynet-gfn2-bio stops runs that leave its domain, and leaves those at 300 K alone.

    python benchmarks/spookynet_bio_guard.py --model ensemble.safetensors --data FOLDER [--parts hot pulled calm report]

* Molecules that were held out of training: capped tryptophan, capped threonine and protonated capped histidine (+1).
  Runs start from frames of the data set's MD at 300 K (test split).
* The limit of the file comes from its calibration on validation data. It is not touched here.
* Runs, Langevin, 1/ps. Hot: 0.5 fs, 2 ps at 2000 K, two a molecule. Pulled: 0.5 fs, 300 K, one bond longer by
  0.02 angstrom each 10 fs, up to 1.5 angstrom. Each of these is made twice with the same random numbers: without a
  guard, with the data set's method (GFN2-xTB) asked every 10 fs, and with on_uncertain='stop'. Calm: capped tryptophan
  and capped threonine, 300 K, `--ps` ps, 1 fs with hydrogens of 3.024 amu, with the guard at every step; GFN2-xTB is
  asked every 2 ps.
* Errors of energies are those less the molecule's own mean error on its frames of MD at 300 K in the data set: dynamics
  sees no constant. `wrong_ps` is when the error first exceeds 0.5 eV in the run without a guard, `nonsense_ps` when it
  first exceeds 50 meV per atom (1.3 to 1.8 eV; the 0.5 eV of the benchmark ensemble_guard are 56 meV per atom of
  ethanol). Both were chosen before the first run.
* `error_where_stopped_eV` is that of the very geometry at which the guard ended a run; other errors are those of looks
  at the run without a guard, every 10 fs.
* Two limits. That of the file is for all that was validated, radicals and pulled bonds included. `own_limit` is what
  `limit_of_run` finds for one molecule without labels: twice the largest uncertainty of a force in 1 ps at 300 K by the
  model, from the frame where its runs start, and at most that of the file. This rule was adopted after trial runs of
  threonine by an earlier model, in which the file's limit stopped nothing; its factor 2 is that of the benchmark
  ensemble_guard, not fitted.
* Runs with a guard are made with the file's limit. When the own limit ends a run is read off the run without a guard,
  of which a guarded run is the beginning, to 10 fs (of calm runs, whose guard has the file's limit, to 50 fs): the
  largest uncertainty of all steps since the look before is kept. `checks` are true runs with the own limit: the first
  hot and the first pulled one of each molecule, and the first 2 ps of calm runs. The report ends with an error if one
  of them stops anywhere else.
* All are closed-shell singlets, for the model and for GFN2-xTB: a bond that is pulled apart breaks into what a
  closed shell describes, so agreement there is agreement with the teacher and not with nature.

Runs are kept in the work folder by the model's checksum, calm ones in pieces of 10 ps, and go on where they stopped.
Parts and molecules can be made by several processes at a time; report writes the JSON and the picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write
from _guard_figure import draw
from _guard_runs import (
    Case,
    Run,
    Setting,
    agrees,
    bond_of,
    compared,
    counted,
    largest,
    pair_of_runs,
    reference,
    system_of,
    with_own_limits,
    without_rows,
)

from openmm_mlff.analysis.plots import BLUE, ORANGE
from openmm_mlff.data.datasets import Dataset
from openmm_mlff.data.files import read_arrays, sha256_of, write_arrays, write_atomically
from openmm_mlff.data.reference import ReferenceMethod, method_from_table
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.checkpoints import seed_for
from openmm_mlff.sampling.uncertainty import trial_run
from openmm_mlff.units import NM_PER_ANGSTROM

NAME = "spookynet_bio_guard"
PARTS = ("hot", "pulled", "calm", "report")
FORM = "openmm-mlff guarded piece 1"
#: eV per atom; the second measure of an energy that means nothing
NONSENSE = 0.05
MEASURES = ("wrong", "nonsense")
HOT, HOT_SEEDS, HOT_PS = 2000.0, (11, 12), 2.0
PULLED_SEED, PULLED_PS = 21, 0.75
CALM, CALM_PS, PIECE, CALM_SEED = 300.0, 200.0, 10.0, 41
#: amu; ps between frames for GFN2-xTB; steps between looks, of calm runs
HYDROGEN, ASKED, CALM_LOOK = 3.024, 2.0, 50

#: of the run that finds a molecule's own limit; ps of the calm runs that are made again with it
OWN_SEED, CALM_CHECK = 51, 2.0
TITLES = {"calm": f"{CALM:g} K", "hot": f"{HOT:g} K", "pulled": "bonds pulled by 2 Å/ps"}
#: bond -> SMARTS (see `bond_of`)
BONDS = {
    "N-CA": "[#7]~[#6D4]~[#6D3]~[#8D1]",
    "C=O": "[#8D1]~[#6D3]~[#6D4]~[#7]",
    "CA-H": "[#1]~[#6D4](~[#7])~[#6D3]~[#8D1]",
    "O-H": "[#1]~[#8D2]",
    "ring N-H": "[#1]~[#7R]",
}


@dataclass(frozen=True)
class Molecule:
    """One that was held out: group of the data set, what is pulled, whether it has a calm run."""

    group: str
    bonds: tuple[str, ...]
    calm: bool
    color: str


MOLECULES = {
    "tryptophan": Molecule("capped-ACE-TRP-NME", ("N-CA", "C=O", "CA-H", "ring N-H"), True, BLUE),
    "threonine": Molecule("capped-ACE-THR-NME", ("N-CA", "C=O", "CA-H", "O-H"), True, ORANGE),
    "histidinium": Molecule("capped-charged-ACE-HIP-NME", ("N-CA", "C=O", "ring N-H"), False, "#3a8f4d"),
}


# -- molecules -----------------------------------------------------------------------------------------------------


def frames_at_300(dataset: Dataset, group: str) -> list[Structure]:
    """Frames of MD at 300 K of a group, which must belong to the test split."""
    if group not in dataset.splits.get("test", []):
        raise SystemExit(
            f"--data: expected {group!r} in the test split of {dataset.path}, which does not have it there"
        )
    every = [dataset[k] for k, name in enumerate(dataset.groups) if name == group]
    found = [s for s in every if s.info.get("source") == "dynamics" and s.info.get("temperature") == CALM]
    if not found:
        raise SystemExit(f"--data: {dataset.path} has no frames of MD at {CALM:g} K of {group!r}")
    return found


def shift_of(model: Ensemble, frames: Sequence[Structure]) -> dict[str, Any]:
    """Mean error of the energies of frames, its spread over them, and their largest uncertainty of a force."""
    evaluator = model.evaluator(frames[0], compile=True)
    errors, uncertainties = [], []
    for s in frames:
        energies, _ = evaluator.arrays(s.positions)
        assert evaluator.spreads is not None and s.energy is not None
        errors.append(float(energies[0]) - s.energy)
        uncertainties.append(model.config.force_factor * float(evaluator.spreads[1].max()))
    return {
        "frames": len(frames),
        "atoms": len(frames[0]),
        "mean_energy_error_eV": round(float(np.mean(errors)), 4),
        "standard_deviation_eV": round(float(np.std(errors)), 4),
        "largest_uncertainty_eV_A": round(max(uncertainties), 3),
    }


# -- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What all runs need.

    Attributes:
        method: that of the data set. frames: of MD at 300 K, by molecule. shifts: what `shift_of` gives, by molecule.
        work: folder of this model's runs.
    """

    setting: Setting
    method: ReferenceMethod
    frames: dict[str, list[Structure]]
    shifts: dict[str, dict[str, Any]]
    work: Path

    def shift(self, name: str) -> float:
        return float(self.shifts[name]["mean_energy_error_eV"])

    def own_limit(self, name: str) -> float:
        """By a run of 1 ps at 300 K from the first frame; eV/angstrom."""
        path = self.work / "own" / f"{name}.json"
        if not path.exists():
            start = self.frames[name][0]
            positions = start.positions * NM_PER_ANGSTROM
            found = trial_run(system_of(self.setting, start), positions, temperature=CALM, seed=OWN_SEED)
            write_atomically(path, json.dumps(asdict(found)).encode())
        return float(json.loads(path.read_text(encoding="utf-8"))["limit"])


def prepared(path: Path, data: Path, work: Path, names: Sequence[str]) -> Bench:
    model = load_potential(path)
    if not isinstance(model, Ensemble) or model.config.force_limit is None:
        raise SystemExit(
            f"--model: expected an ensemble that was calibrated (openmm-mlff calibrate --save), got {path}"
        )
    dataset = Dataset(data)
    frames = {name: frames_at_300(dataset, MOLECULES[name].group) for name in names}
    return Bench(
        Setting(path, model.config.force_limit),
        method_from_table(dataset.card["method"]["settings"]),
        frames,
        {name: shift_of(model, found) for name, found in frames.items()},
        work / sha256_of(path)[:12],
    )


def hot_cases(bench: Bench, name: str) -> list[Case]:
    frames = bench.frames[name]
    starts = [frames[k * len(frames) // len(HOT_SEEDS)] for k in range(len(HOT_SEEDS))]
    return [
        Case(f"{name}, {HOT:g} K, {k + 1}", start, HOT, seed, HOT_PS, bench.shift(name))
        for k, (start, seed) in enumerate(zip(starts, HOT_SEEDS, strict=True))
    ]


def pulled_cases(bench: Bench, name: str) -> list[Case]:
    start = bench.frames[name][0]
    return [
        Case(f"{name}, {bond}", start, CALM, PULLED_SEED, PULLED_PS, bench.shift(name), bond_of(start, BONDS[bond]))
        for bond in MOLECULES[name].bonds
    ]


CASES: dict[str, Callable[[Bench, str], list[Case]]] = {"hot": hot_cases, "pulled": pulled_cases}


def place_of(bench: Bench, part: str, case: Case) -> Path:
    return bench.work / part / f"{case.name.replace(',', '').replace(' ', '-').replace('=', '')}.json"


def driven_out(bench: Bench, case: Case) -> dict[str, Any]:
    """The run without a guard beside the reference, and the same run with one."""
    begin = time.process_time()
    free, guarded = pair_of_runs(bench.setting, case)
    error = np.array(free.record["energy"]) - reference(bench.method, case.start, free.frames) - case.shift
    result = compared(case, bench.setting.limit, free, guarded, error)
    nonsense = np.flatnonzero(~(np.abs(error) <= NONSENSE * len(case.start)))
    result["nonsense_ps"] = None if len(nonsense) == 0 else round(free.record["ps"][nonsense[0]], 4)
    result["ended_without_guard"] = None if free.stopped is None else free.stopped[1]
    result["rows"]["peak"] = free.record["peak"]
    spread = np.array(free.record["peak"])
    for when in MEASURES:
        until = None if result[f"{when}_ps"] is None else np.array(free.record["ps"]) <= result[f"{when}_ps"]
        result[f"largest_uncertainty_until_{when}_eV_A"] = (
            None if until is None else round(float(spread[until].max()), 3)
        )
    if guarded.last is not None:
        truth = reference(bench.method, case.start, [guarded.last])
        result["error_where_stopped_eV"] = largest(free.energy_at(guarded.last) - truth - case.shift)
    result["cpu_seconds"] = round(time.process_time() - begin, 1)
    return result


def drive_out(bench: Bench, part: str, name: str) -> None:
    for case in CASES[part](bench, name):
        path = place_of(bench, part, case)
        if not path.exists():
            result = driven_out(bench, case)
            write_atomically(path, json.dumps(result).encode())
            print(json.dumps(without_rows([result])[0]), flush=True)
    first = CASES[part](bench, name)[0]

    def again(setting: Setting) -> Run:
        return Run(setting, first.start, first.temperature, first.seed, True, first.pulled).go(first.ps)

    check(bench, part, name, again, first.name, first.ps)


def check(bench: Bench, part: str, name: str, made: Callable[[Setting], Run], title: str, ps: float) -> None:
    """Make the beginning of a run with the molecule's own limit, and keep where it stops."""
    path = bench.work / "own" / f"{name}-{part}.json"
    if path.exists():
        return
    limit = bench.own_limit(name)
    run = made(replace(bench.setting, limit=limit))
    stopped = None if run.stopped is None else round(1e-3 * run.setting.timestep * run.stopped[0], 4)
    result = {"kind": part, "name": title, "ps": ps, "limit_eV_A": limit, "stopped_ps": stopped,
              "reason": None if run.stopped is None else run.stopped[1]}  # fmt: skip
    write_atomically(path, json.dumps(result).encode())
    print(json.dumps(result), flush=True)


def pieces_of(bench: Bench, name: str) -> list[Path]:
    return sorted((bench.work / "calm" / name).glob("piece-*.safetensors"))


def keep_calm(bench: Bench, name: str, ps: float) -> None:
    """Make the pieces of the run at 300 K that are missing; one that was stopped is over."""
    wanted = round(ps / PIECE)
    setting = replace(bench.setting, timestep=1.0, look=CALM_LOOK, hydrogen=HYDROGEN)
    asked = round(1e3 * ASKED / setting.timestep / CALM_LOOK)

    def beginning(own: Setting) -> Run:
        again = Run(replace(setting, limit=own.limit), bench.frames[name][0], CALM,
                    seed_for(CALM_SEED, "guarded", 0), guarded=True)  # fmt: skip
        return again.go_on(round(1e3 * CALM_CHECK / setting.timestep))

    check(bench, "calm", name, beginning, name, CALM_CHECK)
    while len(there := pieces_of(bench, name)) < wanted:
        begin, start = time.process_time(), bench.frames[name][0]
        run = Run(setting, start, CALM, seed_for(CALM_SEED, "guarded", len(there)), guarded=True)
        if there:
            header, state = read_arrays(there[-1], FORM, "a piece of a run")
            if header["stopped"] is not None:
                return
            run.context.setPositions(state["positions"])
            run.context.setVelocities(state["velocities"])
        run.go_on(round(1e3 * PIECE / setting.timestep))
        frames = run.frames[asked - 1 :: asked]
        error = np.array(run.record["energy"])[asked - 1 :: asked] - reference(bench.method, start, frames)
        end = run.context.getState(positions=True, velocities=True)
        arrays = {
            "positions": end.getPositions(asNumpy=True)._value,
            "velocities": end.getVelocities(asNumpy=True)._value,
            "uncertainty": np.array(run.record["uncertainty"]),
            "peak": np.array(run.record["peak"]),
            "error": error - bench.shift(name),
        }
        header = {"stopped": run.stopped, "cpu_seconds": time.process_time() - begin}
        write_arrays(bench.work / "calm" / name / f"piece-{len(there):04d}.safetensors", FORM, arrays, header)
        print(
            f"{name}: {(len(there) + 1) * PIECE:g} of {ps:g} ps, {header['cpu_seconds']:.0f} s of CPU time", flush=True
        )


# -- report --------------------------------------------------------------------------------------------------------


def calm_result(bench: Bench, name: str) -> dict[str, Any] | None:
    """What the pieces of a calm run hold together; None before the first."""
    pieces = [read_arrays(path, FORM, "a piece of a run") for path in pieces_of(bench, name)]
    if not pieces:
        return None
    uncertainty, peak, error = (
        np.concatenate([arrays[name] for _, arrays in pieces]) for name in ("uncertainty", "peak", "error")
    )
    stopped = pieces[-1][0]["stopped"]
    before = PIECE * (len(pieces) - 1)
    known = np.abs(error[~np.isnan(error)])
    return {
        "name": name,
        "ps": PIECE * len(pieces) if stopped is None else round(before + 1e-3 * stopped[0], 3),
        "stopped": None if stopped is None else stopped[1],
        "largest_uncertainty_eV_A": round(float(peak.max()), 3),
        "frames_labelled": len(known),
        "frames_without_label": len(error) - len(known),
        "energy_error_mean_eV": round(float(known.mean()), 4),
        "largest_energy_error_eV": largest(error, 4),
        "cpu_seconds": round(sum(header["cpu_seconds"] for header, _ in pieces)),
        "rows": {
            "ps": (1e-3 * CALM_LOOK * np.arange(1, len(uncertainty) + 1)).round(3).tolist(),
            "uncertainty": uncertainty.tolist(),
            "peak": peak.tolist(),
            "error_ps": (ASKED * np.arange(1, len(error) + 1)).tolist(),
            "error": [None if np.isnan(e) else e for e in error.tolist()],
        },
    }


def collected(bench: Bench, ps: float) -> dict[str, Any]:
    """All runs with their rows; ends the script naming what is missing."""
    found: dict[str, Any] = {"calm": []}
    missing = []
    for part, cases in CASES.items():
        places = [place_of(bench, part, case) for name in MOLECULES for case in cases(bench, name)]
        missing += [path.stem for path in places if not path.exists()]
        found[part] = [json.loads(path.read_text(encoding="utf-8")) for path in places if path.exists()]
    for name in (name for name, molecule in MOLECULES.items() if molecule.calm):
        run = calm_result(bench, name)
        if run is None or (run["stopped"] is None and run["ps"] < ps):
            missing.append(f"{name} at {CALM:g} K ({0 if run is None else run['ps']:g} of {ps:g} ps)")
        else:
            found["calm"].append(run)
    if missing:
        raise SystemExit(f"report: these runs are still missing: {'; '.join(missing)}")
    return found


def checks_of(bench: Bench, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The true runs with own limits; ends the script if one is missing or stopped elsewhere than its twin says."""
    result = []
    for path in (bench.work / "own" / f"{run['name'].split(',')[0]}-{part}.json" for part in ("calm", *CASES)
                 for run in found[part]):  # fmt: skip
        if not path.exists():
            raise SystemExit(f"report: the check {path.stem} is still missing")
        made = json.loads(path.read_text(encoding="utf-8"))
        (twin,) = (run for run in found[made["kind"]] if run["name"] == made["name"])
        if not agrees(made, twin):
            raise SystemExit(f"report: expected {made} to stop where the run without a guard is beyond its limit")
        if made not in result:
            result.append(made)
    return result


def report(bench: Bench, ps: float) -> None:
    found = collected(bench, ps)
    own_limits = {name: bench.own_limit(name) for name in MOLECULES}
    checks = checks_of(bench, found)
    summary = {part: counted(found[part], MEASURES) for part in CASES}
    summary["calm"] = {"runs": len(found["calm"]), "stopped": sum(run["stopped"] is not None for run in found["calm"])}
    by_own = {part: with_own_limits(found[part], own_limits) for part in CASES}
    own = {part: counted(runs, MEASURES) for part, runs in by_own.items()}
    beyond = [run["largest_uncertainty_eV_A"] > own_limits[run["name"]] for run in found["calm"]]
    own["calm"] = {"runs": len(beyond), "stopped": sum(beyond)}
    for part, runs in by_own.items():
        for run, with_own in zip(found[part], runs, strict=True):
            run["own_limit_stopped_ps"] = with_own["stopped_ps"]
    result = {
        "what": __doc__,
        "machine": machine(),
        "model": {"file": bench.setting.model.name, "sha256": sha256_of(bench.setting.model)},
        "method": bench.method.describe(),
        "limit_eV_A": bench.setting.limit,
        "molecules": {
            name: {"group": MOLECULES[name].group, **bench.shifts[name], "own_limit_eV_A": round(own_limits[name], 3)}
            for name in MOLECULES
        },
        "summary": summary,
        "summary_with_own_limits": own,
        "checks": checks,
        **{part: without_rows(found[part]) for part in ("calm", *CASES)},
        "cpu_minutes": {part: round(sum(run["cpu_seconds"] for run in found[part]) / 60, 1) for part in found},
    }
    write(NAME, result)
    print(json.dumps({"limit of the file": summary, "own limits": own}, indent=1))
    colors = {name: molecule.color for name, molecule in MOLECULES.items()}
    draw(found, TITLES, colors, bench.setting.limit, own_limits, HERE / f"{NAME}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the calibrated ensemble")
    parser.add_argument(
        "--data", type=Path, default=HERE.parent / ".work" / "bio" / "full", help="the dataset's folder"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--molecules", nargs="+", choices=MOLECULES, default=list(MOLECULES))
    parser.add_argument("--work", type=Path, default=HERE.parent / ".work" / NAME)
    parser.add_argument("--ps", type=float, default=CALM_PS, help=f"of the runs at 300 K, in pieces of {PIECE:g}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    whole = "report" in arguments.parts
    bench = prepared(arguments.model, arguments.data, arguments.work, list(MOLECULES) if whole else arguments.molecules)
    for name in arguments.molecules:
        for part in (part for part in CASES if part in arguments.parts):
            drive_out(bench, part, name)
        if "calm" in arguments.parts and MOLECULES[name].calm:
            keep_calm(bench, name, arguments.ps)
    if whole:
        report(bench, arguments.ps)


if __name__ == "__main__":
    main()
