"""A molecule the model has not seen: the members disagree, 200 labels of GFN2-xTB are made, and the error falls.

    python examples/09_active_learning.py --model models/spookynet-gfn2-bio.safetensors -j 4     # ten minutes

The molecule is zidovudine (AZT). Neither its azide bound to carbon nor any nucleoside was in the training data. Any
other can be given as SMILES, of the model's elements. What happens:

1. GFN2-xTB runs short trajectories of it and of molecules that the model knows. They are only used to judge.
2. MD by the members explores both. Their disagreement, found in passing, says which is unknown to them.
3. The 200 frames of the new molecule on which they disagree most get labels, and some frames of known ones do too: a
   rehearsal, so that less is forgotten. (The data that the model was made of, if they are here, do that best: --data.)
4. Every member is trained further, from its own weights.

What takes long is kept in --output; the same command goes on. Needs rdkit and tblite (pip install "openmm-mlff[label]")
and for the training the extra "train".
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# every process uses one core
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from openmm_mlff.analysis.plots import BLUE, ORANGE, STYLE, pyplot, save_figure
from openmm_mlff.data.datasets import Dataset, write_dataset
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.jobs import run_tasks
from openmm_mlff.data.molecules import embed_smiles
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.shards import read_shard, write_shard
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.selection import Candidates, Committee, SelectionSettings, select_frames
from openmm_mlff.sampling.thermal import dynamics, relax
from openmm_mlff.training.evaluation import compare
from openmm_mlff.training.members import train_members
from openmm_mlff.training.recipe import Recipe
from openmm_mlff.training.run import MODEL

ZIDOVUDINE = "Cc1cn(C2CC(N=[N+]=[N-])C(CO)O2)c(=O)[nH]c1=O"
#: of the training data of spookynet-gfn2-bio: molecules that are labelled once more, and some that are not
REHEARSED = (
    "CC(=O)NC(C)C(=O)NC", "CC(=O)NCC(=O)NC", "O=c1cc[nH]c(=O)[nH]1", "Nc1ncnc2[nH]cnc12", "OC[C@H]1OC(O)C[C@@H]1O",
    "CC(=O)[O-]", "C[NH3+]", "NC(=[NH2+])N", "OP(=O)(O)[O-]", "C[N+](=O)[O-]", "CC(C)=O", "Oc1ccccc1", "c1ccncc1",
    "CC(=O)O", "NC=O", "CS", "CS(C)=O", "COC", "C=C", "C#N", "CF", "CCl", "CO", "N", "O", "CC",
)  # fmt: skip
KNOWN = (
    "CC(=O)NC", "Nc1cc[nH]c(=O)n1", "OCC(O)CO", "OCC(=O)[O-]", "CNC(N)=[NH2+]", "NC(N)=O", "COC(C)=O", "CNC", "c1ccsc1",
    "CCO",
)  # fmt: skip
TEACHER = TBLite()
SEED = 9
RECIPE: dict[str, Any] = {
    "seed": SEED,
    "batch_size": 8,
    "native": True,
    "threads": 1,
    # a new molecule may be off by a constant, which must not upset the forces at once
    "loss": {"energy": 0.02, "forces": 1.0, "dipole": 0.05, "surplus": 0.5},
    "final_loss": {"energy": 1.0, "forces": 1.0, "dipole": 0.05, "surplus": 0.5},
    "loop": {
        "optimizer": "adamw",
        "final_learning_rate": 2e-6,
        "warmup_steps": 20,
        "schedule": "cosine",
        "clip_norm": 5.0,
        "ema_decay": 0.99,
        "checkpoint_seconds": 60,
    },
}


def judge_frames(argument: tuple[Structure, int, float, int], path: Path) -> dict[str, str]:
    """A trajectory by GFN2-xTB (0.5 fs, a frame every 20 fs after 100 fs), with labels; a task of `run_tasks`."""
    start, frames, temperature, seed = argument
    start = start.replace(positions=relax(start, TEACHER))
    run = dynamics(
        start, TEACHER, temperature=temperature, frames=frames, stride=20.0, discard=100.0, seed=seed, timestep=0.5
    )
    write_shard(path, [TEACHER.label(start.replace(positions=positions)) for positions in run])
    return {}


def starts_of(smiles: Sequence[str], conformers: int, seed: int) -> list[Structure]:
    """Conformers of molecules, a group of its own for each, so that none is in training and validation both."""
    found = []
    for text in smiles:
        for k, conformer in enumerate(embed_smiles(text, conformers, seed)):
            found.append(conformer.replace(group=f"{conformer.group}/{k}", info={"molecule": conformer.group}))
    return found


def judging_set(output: Path, starts: Sequence[Structure], frames: int, processes: int) -> list[Structure]:
    """Labelled frames of trajectories by GFN2-xTB at 300 and 450 K in turn."""
    tasks = {f"{k:03d}": (start, frames, (300.0, 450.0)[k % 2], SEED + k) for k, start in enumerate(starts)}
    done = run_tasks(tasks, judge_frames, output, log=output / "failed.jsonl", processes=processes, title="judging")
    if done.failed:
        raise SystemExit(f"a trajectory by GFN2-xTB failed: {next(iter(done.failed.values()))}")
    return [s for name in tasks for s in read_shard(output / f"{name}.safetensors")]


def explored(
    output: Path, starts: Sequence[Structure], model: Path, n: int, args: argparse.Namespace
) -> tuple[Dataset, np.ndarray]:
    """MD by the members, labels of the `n` frames they disagree on most, and their disagreement on all frames."""
    settings = SelectionSettings(
        structures=n, per_group=max(1, round(1.5 * n / len(starts))), temperatures=(300.0, 450.0), threshold=0.0,
        duration=args.duration, difference=0.05, seed=SEED,
    )  # fmt: skip
    made = select_frames(starts, Committee((str(model),)), TEACHER, output, settings, processes=args.processes)
    found = [Candidates.read(path).spreads for path in sorted((output / "candidates").glob("*.safetensors"))]
    return made, np.concatenate(found)


def labels(output: Path, parts: Sequence[Dataset], valid: int) -> Path:
    """One dataset of all new labels; every `valid`-th conformer is there to choose the best parameters by."""
    if not (output / "card.json").exists():
        structures = [s for part in parts for s in part]
        groups = sorted({s.group for s in structures})
        last = set(groups[::valid])
        meant = [s.replace(info={**s.info, "split": "valid" if s.group in last else "train"}) for s in structures]
        write_dataset(output, meant, name=output.name, method=TEACHER, sampling={"seed": SEED})
    return output


def further(output: Path, model: Path, data: Sequence[Path], args: argparse.Namespace) -> Path:
    """The ensemble whose members were trained further."""
    if not (output / MODEL).exists():
        begun = (output / "members.json").exists()
        ensemble = load_potential(model)
        assert isinstance(ensemble, Ensemble)
        family = next(iter(ensemble.members.values())).family
        loop = {"steps": args.steps, "learning_rate": args.learning_rate, "validate_every": max(1, args.steps // 5)}
        if args.quick:
            loop |= {"validate_every": args.steps, "ema_decay": 0.8}
        content = RECIPE | {"family": family, "processes": args.processes, "loop": RECIPE["loop"] | loop}
        recipe = None if begun else Recipe.from_dict(content)
        n = None if begun else ensemble.config.n_members
        train_members(recipe, data, output, n, begun, None if begun else model)
        if not (output / MODEL).exists():
            raise SystemExit("stopped; the same command goes on")
    return output / MODEL


def errors(model: Path, structures: Sequence[Structure]) -> dict[str, np.ndarray]:
    """Of forces (meV/angstrom, components), energies per atom (meV), and the disagreement (eV/angstrom) of frames."""
    found = compare(load_potential(model), structures)
    starts = np.cumsum(found.counts) - found.counts
    return {
        "forces": 1e3 * np.abs(found.predicted["forces"] - found.reference["forces"]).ravel(),
        "energy": 1e3 * np.abs(found.predicted["energy"] - found.reference["energy"]) / found.counts,
        "disagreement": np.maximum.reduceat(found.spread["forces"], starts),
    }


SETS = {"known": ("known", BLUE), "rehearsed": ("rehearsed", "#3a8f4d"), "new": ("new", ORANGE)}


def draw(path: Path, judged: dict[tuple[str, str], dict[str, np.ndarray]]) -> None:
    """Left: how far the members disagree about frames. Right: what the new labels are worth."""
    plt = pyplot()
    sets = {which: SETS[which] for which in SETS if (which, "before") in judged}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.4))
        for k, (which, (name, colour)) in enumerate(sets.items()):
            for when, style in (("before", "-"), ("after", "--")):
                values = np.sort(judged[which, when]["disagreement"])
                share = 100 * (np.arange(len(values)) + 0.5) / len(values)
                left.plot(values, share, style, color=colour, label=f"{name}, {when}")
            heights = [judged[which, when]["forces"].mean() for when in ("before", "after")]
            bars = right.bar([k - 0.2, k + 0.2], heights, 0.36, color=colour)
            bars[1].set_alpha(0.5)
            right.bar_label(bars, labels=[f"{heights[0]:.0f}\nbefore", f"{heights[1]:.0f}\nafter"], fontsize=8)
        left.set_xscale("log")
        left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_xlabel("disagreement about the worst atom (eV/Å)")
        left.set_ylabel("frames below (%)")
        left.set_ylim(0, 100)
        right.set_xticks(range(len(sets)), [name for name, _ in sets.values()])
        right.set_ylabel("force MAE (meV/Å)")
        right.margins(y=0.2)
        figure.legend(loc="lower center", ncols=len(sets), fontsize=8)
        figure.tight_layout(rect=(0, 0.13, 1, 1))
    save_figure(figure, path)


def table(judged: dict[tuple[str, str], dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Print and return median disagreements and mean errors."""
    print(f"\n{'':18}{'disagreement':>16}{'force error':>16}{'energy error':>16}")
    print(f"{'':18}{'eV/Å':>16}{'meV/Å':>16}{'meV/atom':>16}")
    rows = {}
    for (which, when), found in judged.items():
        row = {name: float(np.median(x) if name == "disagreement" else x.mean()) for name, x in found.items()}
        rows[f"{which} {when}"] = row
        print(f"{which + ' ' + when:18}{row['disagreement']:16.3f}{row['forces']:16.1f}{row['energy']:16.2f}")
    return rows


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent.parent / "models" / "spookynet-gfn2-bio.safetensors"
    parser.add_argument("--model", type=Path, default=default, help="an ensemble")
    parser.add_argument("--smiles", default=ZIDOVUDINE, help="the new molecule (zidovudine)")
    parser.add_argument("--rehearse", nargs="+", default=REHEARSED, metavar="SMILES", help="known ones to label again")
    parser.add_argument("--known", nargs="*", default=KNOWN, metavar="SMILES", help="known ones to look at, no more")
    parser.add_argument("--labels", type=int, default=200, help="of the new molecule")
    parser.add_argument("--steps", type=int, default=1500, help="of training, each member")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="at its start")
    parser.add_argument("--duration", type=float, default=500.0, help="of each trajectory that explores, fs")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="what the model was trained on, if it is here")
    parser.add_argument("--processes", "-j", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a few frames and steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("active_learning"))
    return parser.parse_args()


def main() -> None:
    args = options()
    if not args.model.is_file():
        raise SystemExit(f"There is no file at {args.model}.")
    model = load_potential(args.model)
    if not isinstance(model, Ensemble):
        raise SystemExit(f"{args.model} is a single model, which never disagrees with itself; an ensemble is needed.")
    conformers, frames, again = (3, 2, 4) if args.quick else (24, 15, 200)
    begin = time.monotonic()

    def done(what: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {what}", flush=True)

    # 1. Frames to judge by, from other conformers than what follows.
    starts = {
        "known": starts_of(args.known, 1, SEED + 1),
        "rehearsed": starts_of(args.rehearse, 1, SEED + 1),
        "new": starts_of([args.smiles], 4, SEED + 1),
    }
    for start in starts["new"]:
        model.check(start)
    judging = {}
    for which, some in starts.items():
        if some:
            n = frames if which == "new" else max(1, frames // 3)
            judging[which] = judging_set(args.output / f"judge-{which}", some, n, args.processes)
    done(f"frames by GFN2-xTB to judge by: {', '.join(f'{len(s)} {which}' for which, s in judging.items())}")

    # 2. and 3. The members explore, and what they disagree on is labelled.
    old, calm = explored(args.output / "rehearsed", starts_of(args.rehearse, 1, SEED), args.model, again, args)
    new, wild = explored(args.output / "new", starts_of([args.smiles], conformers, SEED), args.model, args.labels, args)
    done(f"{len(new)} labels of the new molecule, of {len(wild)} frames; {len(old)} of known ones")
    print(f"         disagreement in the members' own MD: known {np.median(calm):.2f}, new {np.median(wild):.2f} eV/Å")

    # 4. Training, and the same frames again.
    data = [labels(args.output / "labels", (old, new), 6), *args.data]
    trained = further(args.output / "trained", args.model, data, args)
    done(f"{model.config.n_members} members trained for {args.steps} steps")
    judged = {
        (which, when): errors(file, structures)
        for which, structures in judging.items()
        for when, file in (("before", args.model), ("after", trained))
    }
    report: dict[str, object] = {**table(judged)}
    report["labels"] = {"new": len(new), "rehearsed": len(old)}
    report["exploring"] = {"rehearsed": float(np.median(calm)), "new": float(np.median(wild))}
    report["seconds"] = round(time.monotonic() - begin, 1)
    write_atomically(args.output / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    draw(args.output / "active_learning.png", judged)
    done(f"picture: {args.output}/active_learning.png; model: {trained}")


if __name__ == "__main__":
    main()
