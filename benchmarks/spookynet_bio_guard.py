"""Whether the ensemble spookynet-gfn2-bio stops runs that leave its domain, and leaves those at 300 K alone.

    python benchmarks/spookynet_bio_guard.py --model ensemble.safetensors --data FOLDER [--parts hot pulled calm report]

* Molecules that were held out of training: capped tryptophan, capped threonine and protonated capped histidine (+1).
  Runs start from frames of the data set's MD at 300 K (test split).
* Limit: the one that the model file carries from its calibration on validation data. It is not touched here.
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
* The limit of the file is for all that was validated, radicals and pulled bonds included. `own_limit` is what somebody
  with one molecule could set without labels, by the rule of ensemble_guard: twice the largest uncertainty among the
  frames of MD at 300 K. When it would have ended the runs is read off them: the largest uncertainty of all steps
  between two looks is kept. It was added after trial runs of threonine with another model, its factor is not fitted.
* All are closed-shell singlets, for the model and for GFN2-xTB: a bond that is pulled apart breaks into what a
  closed shell describes, so agreement there is agreement with the teacher and not with nature.

Runs are kept in the work folder by the model's checksum, calm ones in pieces of 10 ps, and go on where they were
stopped. Parts and molecules can be made by several processes at a time; report writes the JSON and the picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import HERE, machine, write
from _guard_runs import (
    WRONG,
    Case,
    Run,
    Setting,
    bond_of,
    by_guard,
    compared,
    counted,
    largest,
    molecule_of,
    pair_of_runs,
    reference,
    with_own_limits,
    without_rows,
)

from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure
from openmm_mlff.data.datasets import Dataset
from openmm_mlff.data.files import read_arrays, sha256_of, write_arrays, write_atomically
from openmm_mlff.data.reference import ReferenceMethod, method_from_table
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.checkpoints import seed_for

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

#: of the largest uncertainty among a molecule's own frames
MARGIN = 2.0

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
        "own_limit_eV_A": round(MARGIN * max(uncertainties), 3),
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

    @property
    def own_limits(self) -> dict[str, float]:
        return {name: found["own_limit_eV_A"] for name, found in self.shifts.items()}


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


def pieces_of(bench: Bench, name: str) -> list[Path]:
    return sorted((bench.work / "calm" / name).glob("piece-*.safetensors"))


def keep_calm(bench: Bench, name: str, ps: float) -> None:
    """Make the pieces of the run at 300 K that are missing; one that was stopped is over."""
    wanted = round(ps / PIECE)
    setting = Setting(bench.setting.model, bench.setting.limit, 1.0, CALM_LOOK, hydrogen=HYDROGEN)
    asked = round(1e3 * ASKED / setting.timestep / CALM_LOOK)
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


def report(bench: Bench, ps: float) -> None:
    found = collected(bench, ps)
    summary = {part: counted(found[part], MEASURES) for part in CASES}
    summary["calm"] = {"runs": len(found["calm"]), "stopped": sum(run["stopped"] is not None for run in found["calm"])}
    own = {part: counted(with_own_limits(found[part], bench.own_limits), MEASURES) for part in CASES}
    beyond = [run["largest_uncertainty_eV_A"] > bench.own_limits[run["name"]] for run in found["calm"]]
    own["calm"] = {"runs": len(beyond), "stopped": sum(beyond)}
    result = {
        "what": __doc__,
        "machine": machine(),
        "model": {"file": bench.setting.model.name, "sha256": sha256_of(bench.setting.model)},
        "method": bench.method.describe(),
        "limit_eV_A": bench.setting.limit,
        "molecules": {name: {"group": MOLECULES[name].group, **bench.shifts[name]} for name in MOLECULES},
        "summary": summary,
        "summary_with_own_limits": own,
        **{part: without_rows(found[part]) for part in ("calm", *CASES)},
        "cpu_minutes": {
            part: round(sum(run["cpu_seconds"] for run in found[part]) / 60, 1) for part in ("calm", *CASES)
        },
    }
    write(NAME, result)
    print(json.dumps({"limit of the file": summary, "own limits": own}, indent=1))
    draw(bench, found, HERE / f"{NAME}.png")


def draw(bench: Bench, found: dict[str, Any], path: Path) -> None:
    """Uncertainty above, error of the energy below, by kind of run; a dot is where the guard ended a run.

    Diamonds are where limits from the molecules' own frames would have ended runs.
    """
    plt, limit = pyplot(), bench.setting.limit
    from matplotlib.ticker import LogLocator, NullLocator

    titles = {"calm": f"{CALM:g} K", "hot": f"{HOT:g} K", "pulled": "bonds pulled by 2 Å/ps"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.2), sharex="col", sharey="row", layout="constrained")
        for column, (part, title) in zip(axes.T, titles.items(), strict=True):
            for run in found[part]:
                _draw_run(column, run, limit, thin=part == "calm")
            for run in with_own_limits(found[part], bench.own_limits) if part in CASES else []:
                if run["stopped_ps"] is not None:
                    own = bench.own_limits[molecule_of(run)]
                    diamond = {
                        "color": "white",
                        "markeredgecolor": MOLECULES[molecule_of(run)].color,
                        "ms": 5,
                        "zorder": 4,
                    }
                    column[0].plot([run["stopped_ps"]], [own], "D", **diamond)
                    if run["error_where_stopped_eV"] is not None:
                        column[1].plot([run["stopped_ps"]], [run["error_where_stopped_eV"]], "D", **diamond)
            stopped = sum(run["stopped"] is not None if part == "calm" else by_guard(run) for run in found[part])
            column[0].set_title(f"{title}: {stopped} of {len(found[part])} stopped")
            column[1].set_xlabel("time (ps)")
        for row, level, text in zip(axes, (limit, WRONG), ("the guard's limit", f"{WRONG:g} eV"), strict=True):
            for panel in row:
                panel.axhline(level, color="black", lw=0.8, ls="--")
                panel.set_yscale("log")
            row[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            row[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            row[0].yaxis.set_minor_locator(NullLocator())
            row[0].annotate(text, (0.02, level), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8)
        axes[0, 0].set_ylabel("largest force uncertainty (eV/Å)")
        axes[1, 0].set_ylabel("|energy error| (eV)")
        axes[1, 0].set_ylim(0.01, None)
        # room for the words above the line
        axes[0, 0].set_ylim(None, max(1.6 * limit, axes[0, 0].get_ylim()[1]))
        lines = [plt.Line2D([], [], color=m.color, label=name) for name, m in MOLECULES.items()]
        dot = plt.Line2D([], [], color=GREY, marker="o", markeredgecolor="black", ls="", label="stopped by the guard")
        diamond = plt.Line2D(
            [], [], color="white", marker="D", markeredgecolor=GREY, ls="", label="own limit would stop"
        )
        figure.legend(handles=[*lines, dot, diamond], loc="outside lower center", ncols=5, fontsize=8)
    save_figure(figure, path)


def _draw_run(column: Any, run: dict[str, Any], limit: float, thin: bool) -> None:
    rows, color = run["rows"], MOLECULES[molecule_of(run)].color
    style = {"color": color, "lw": 0.4 if thin else 0.8, "alpha": 0.8}
    error = np.abs(np.array(rows["error"], dtype=float))
    ps = np.array(rows.get("error_ps", rows["ps"]))
    column[0].plot(rows["ps"], rows["uncertainty"], **style)
    column[1].plot(ps, error, **({**style, "lw": 0, "marker": ".", "ms": 3} if thin else style))
    end = run["ps"] if thin and run["stopped"] is not None else run.get("stopped_ps")
    if end is not None and (thin or by_guard(run)):
        dot = {"color": color, "markeredgecolor": "black", "ms": 5, "zorder": 3}
        column[0].plot([end], [limit], "o", **dot)
        if run.get("error_where_stopped_eV") is not None:
            column[1].plot([end], [run["error_where_stopped_eV"]], "o", **dot)


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
