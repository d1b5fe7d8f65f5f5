"""Rounds of active learning: what SpookyNets of biomolecules learn from the frames on which they disagree.

    python benchmarks/spookynet_active_learning.py --data FOLDER --models FILE FILE --output FOLDER [--rounds 3] [-j 3]

Each round begins with MD by the members (300, 500 and 700 K, from frames of the training set); frames on whose forces
they disagree most are labelled (`openmm-mlff dataset select`), and the members are trained further, each from its own
weights, on all labels with those of the rounds so far (the new ones --repeat times, since they are few).

* held: new frames of a fifth of the molecules, drawn by a hash of their names, of which no new label is ever trained on
  (older ones are). Errors on them, before and after, say what the new labels of other molecules are worth.
* any: frames of the same MD drawn at random, labelled to judge and never trained on: the errors that simulations meet.
* valid: the validation molecules of the data. They must not get worse. Test molecules are not looked at.
* noticed: share of the 5 % worst frames that the members' spread finds at 20 % false alarms.
* kept: the frames that were added, by the first members and by the last. Do they learn what they are shown?
* --baseline trains the first members as long without any new label: what of it is more training?

Everything is kept in --output and goes on where it was stopped (also by --time-limit). JSON and picture go to --report.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import HERE, machine
from rich.console import Console
from rich.table import Table

from openmm_mlff.analysis import calibration
from openmm_mlff.analysis.plots import BLUE, GREY, ORANGE, STYLE, pyplot, save_figure
from openmm_mlff.data.datasets import Dataset, finish_dataset
from openmm_mlff.data.files import sha256_of, write_atomically
from openmm_mlff.data.jobs import claim_folder
from openmm_mlff.data.labelling import label_structures
from openmm_mlff.data.model_file import load_card
from openmm_mlff.data.shards import write_shard
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import save_ensemble
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.collection_rounds import method_of, select_round, starts_of
from openmm_mlff.sampling.selection import Candidates, SelectionSettings
from openmm_mlff.training.calibrating import FALSE_ALARMS, WORST, Uncertainties
from openmm_mlff.training.evaluation import compare
from openmm_mlff.training.members import train_members
from openmm_mlff.training.recipe import Recipe
from openmm_mlff.training.run import MODEL

NAME = "spookynet_active_learning"
#: share of the molecules of which no new label is trained on
HELD = 0.2
console = Console(width=130)


class TimeUp(SystemExit):
    """The time limit has passed; what is done is kept."""


def judged(model: Path, structures: Sequence[Structure]) -> dict[str, Any]:
    """Errors and spreads: of force components (meV/angstrom), energies (meV/atom), and each frame's worst atom."""
    found = compare(load_potential(model), structures)
    forces = np.abs(found.predicted["forces"] - found.reference["forces"])
    energies = np.abs(found.predicted["energy"] - found.reference["energy"]) / found.counts
    by_frame = Uncertainties.of(found, "all").frames()
    many = len(by_frame[0]) >= 20
    return {
        "frames": len(structures),
        "force_mae": round(1e3 * float(forces.mean()), 2),
        "energy_mae": round(1e3 * float(energies.mean()), 3),
        "worst_atom_error": round(float(by_frame[0].mean()), 4),
        "worst_atom_spread": round(float(by_frame[1].mean()), 4),
        "spearman": round(calibration.spearman(*by_frame), 3) if many else None,
        "noticed": round(calibration.flagged(*by_frame, WORST, FALSE_ALARMS), 3) if many else None,
    }


def is_held(group: str) -> bool:
    """Whether new frames of a molecule are kept from training, the same in every round."""
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD * 2**64


@dataclass
class Rounds:
    """The work folder of a run.

    Attributes:
        data: the dataset that everything starts from. output: the folder. options: of the command line.
        recipe: of the further training. deadline: of this call, seconds of `time.monotonic`, or None.
    """

    data: Path
    output: Path
    options: argparse.Namespace
    recipe: Recipe
    deadline: float | None

    def model(self, k: int) -> Path:
        """The ensemble after round `k`; 0 is what the rounds start from."""
        return self.output / "start.safetensors" if k == 0 else self.output / f"members-{k}" / MODEL

    def check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeUp("time is up; the same command goes on")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON of a step, which is made if it is not there."""
        path = self.output / f"{name}.json"
        if not path.exists():
            self.check_time()
            begin = time.monotonic()
            made = make()
            content = {"result": made, "seconds": round(time.monotonic() - begin, 1)}
            write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        return json.loads(path.read_text(encoding="utf-8"))

    # -- new frames ----------------------------------------------------------------------------------------------

    def settings(self, k: int) -> SelectionSettings:
        o = self.options
        return SelectionSettings(
            structures=o.structures, temperatures=tuple(o.temperatures), duration=o.duration, seed=o.seed + k
        )

    def select(self, k: int) -> dict[str, Any]:
        """Round `k` of the dataset, its parts, and random frames of the same MD; what the card says of the round."""
        o = self.options
        made = select_round(
            self.data, [self.model(k - 1)], self.output / f"round-{k}", self.settings(k), o.starts, (), o.processes
        )
        parts = {"kept": [s for s in made if not is_held(s.group)], "held": [s for s in made if is_held(s.group)]}
        for name, structures in parts.items():
            self._write_part(made, f"{name}-{k}", structures)
        self._label_any(k)
        entry = {key: value for key, value in made.card["round"].items() if key not in ("models", "dataset")}
        counts = {name: len(structures) for name, structures in parts.items()}
        molecules = {f"{name}_molecules": len({s.group for s in structures}) for name, structures in parts.items()}
        return entry | counts | molecules | {"failures": made.card["failures"]["count"]}

    def _write_part(self, made: Dataset, name: str, structures: list[Structure]) -> None:
        if structures:
            write_shard(self.output / name / "shards" / "all.safetensors", structures)
            splits = {"train": sorted({s.group for s in structures})}
            finish_dataset(
                self.output / name,
                name=name,
                method=made.card["method"],
                sampling={"of": made.card["name"]},
                splits=splits,
            )

    def _label_any(self, k: int) -> None:
        """Frames drawn from all trajectories of the round, whatever their spread."""
        dataset = Dataset(self.data)
        starts = starts_of(dataset, self.options.starts, self.options.seed + k)
        frames = []
        for n, start in enumerate(starts):
            path = self.output / f"round-{k}" / "candidates" / f"trajectory-{n:05d}.safetensors"
            if path.exists():
                bare = start.replace(energy=None, forces=None, dipole=None, charges=None)
                frames += [bare.replace(positions=positions) for positions in Candidates.read(path).positions]
        rng = np.random.default_rng([self.options.seed, k])
        chosen = sorted(rng.permutation(len(frames))[: self.options.any].tolist())
        folder, method = self.output / f"any-{k}", method_of(dataset)
        label_structures([frames[i] for i in chosen], method, folder, name=f"any-{k}", processes=self.options.processes)

    def load(self, name: str) -> list[Structure]:
        """The structures of a part of a round; empty if it has none."""
        return Dataset(self.output / name).load() if (self.output / name).exists() else []

    # -- training and judging ------------------------------------------------------------------------------------

    def train(self, folder: Path, recipe: Recipe, data: list[Path], start: Path) -> None:
        if (folder / MODEL).exists():
            return
        self.check_time()
        begun = (folder / "members.json").exists()
        limit = None if self.deadline is None else max(self.deadline - time.monotonic(), 1.0)
        n = len(self.options.models)
        train_members(
            None if begun else recipe, data, folder, None if begun else n, begun, None if begun else start,
            progress=False, time_limit=limit,
        )  # fmt: skip
        if not (folder / MODEL).exists():
            raise TimeUp(f"time is up within the training in {folder}; the same command goes on")

    def train_round(self, k: int) -> None:
        """The members of round `k - 1` on all labels so far; new ones several times, since they are few."""
        new = [path for i in range(1, k + 1) if (path := self.output / f"kept-{i}").exists()]
        seed = self.recipe.seed + 10 * k
        recipe = dataclasses.replace(self.recipe, seed=seed, loop=dataclasses.replace(self.recipe.loop, seed=seed))
        self.train(self.output / f"members-{k}", recipe, [self.data, *new * self.options.repeat], self.model(k - 1))

    def steps_kept(self, k: int) -> list[int]:
        """Of every member of round `k`, the step whose weights were kept (of least validation loss by the recipe)."""
        files = sorted((self.output / f"members-{k}").glob(f"member-*/{MODEL}"))
        return [int(load_card(file)["best"]["step"]) for file in files]

    def judge(self, k: int, model: Path) -> dict[str, Any]:
        """A model on the validation split and on the held frames of the rounds up to `k`."""
        found = {"valid": judged(model, Dataset(self.data).load("valid"))}
        for i in range(1, k + 1):
            if held := self.load(f"held-{i}"):
                found[f"held-{i}"] = judged(model, held)
        return found

    def judge_new(self, k: int) -> dict[str, Any]:
        """The members that chose the frames of round `k` on these frames, and on others of the same MD."""
        parts = {"selected": self.load(f"round-{k}"), "held": self.load(f"held-{k}"), "any": self.load(f"any-{k}")}
        return {name: judged(self.model(k - 1), structures) for name, structures in parts.items() if structures}

    def go(self) -> dict[str, Any]:
        """All rounds; what is reported of them."""
        start = self.once("judged-0", lambda: self.judge(0, self.model(0)))["result"]
        rows = []
        for k in range(1, self.options.rounds + 1):
            selected = self.once(f"selected-{k}", lambda k=k: self.select(k))
            before = self.once(f"before-{k}", lambda k=k: self.judge_new(k))["result"]
            show(f"round {k}, before", before)
            begin = time.monotonic()
            self.train_round(k)
            after = self.once(f"after-{k}", lambda k=k: self.judge(k, self.model(k)))
            show(f"round {k}, after", after["result"])
            seconds = {"selection": selected["seconds"], "training_in_this_call": round(time.monotonic() - begin, 1)}
            rows.append({"round": k, "selected": selected["result"], "before": before, "after": after["result"]})
            rows[-1]["steps_kept"] = self.steps_kept(k)
            rows[-1]["seconds"] = seconds
        result = {"start": start, "rounds": rows, "kept": self.once("kept", self.judge_kept)["result"]}
        show("the frames that were added, by the first and the last members", result["kept"])
        if self.options.baseline:
            result["baseline"] = self.once("baseline", self.judge_baseline)["result"]
            show("trained as long without new labels", result["baseline"])
        return result

    def judge_kept(self) -> dict[str, Any]:
        """The first members and the last ones on all frames that were added to the training."""
        n = self.options.rounds
        added = [s for k in range(1, n + 1) for s in self.load(f"kept-{k}")]
        return {"start": judged(self.model(0), added), "end": judged(self.model(n), added)}

    def judge_baseline(self) -> dict[str, Any]:
        n, folder = self.options.rounds, self.output / "members-baseline"
        steps = n * self.recipe.loop.steps
        recipe = dataclasses.replace(self.recipe, loop=dataclasses.replace(self.recipe.loop, steps=steps))
        self.train(folder, recipe, [self.data], self.model(0))
        return self.judge(n, folder / MODEL)


def show(title: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    columns = ("frames", "force_mae", "energy_mae", "worst_atom_error", "worst_atom_spread", "spearman", "noticed")
    table = Table(title=f"{title} (meV/Å, meV/atom; worst atoms in eV/Å)")
    for column in ("", *columns):
        table.add_column(column.replace("_", " "), justify="right" if column else "left")
    for name, row in found.items():
        table.add_row(name, *("-" if row[c] is None else f"{row[c]:g}" for c in columns))
    console.print(table)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Force errors on new frames before and after each round, on validation molecules, and what the spread notices."""
    plt = pyplot()
    rows = result["rounds"]
    k = np.array([row["round"] for row in rows])
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.2))
        left.plot(
            k, [r["before"]["selected"]["force_mae"] for r in rows], "o-", color=GREY, label="chosen frames, before"
        )
        left.plot(
            k, [r["before"]["any"]["force_mae"] for r in rows], "s-", color=BLUE, label="any frames of the MD, before"
        )
        held = [r for r in rows if "held" in r["before"]]
        for n, r in enumerate(held):
            x = np.full(2, r["round"] + 0.14)
            y = np.array([r["before"]["held"]["force_mae"], r["after"][f"held-{r['round']}"]["force_mae"]])
            left.plot(x, y, color=ORANGE, linewidth=1.6)
            left.plot(x[:1], y[:1], "o", color=ORANGE, markerfacecolor="white", markersize=5)
            name = None if n else "molecules held back, before (open) and after"
            left.plot(x[1:], y[1:], "o", color=ORANGE, markersize=5, label=name)
        valid = [result["start"]["valid"], *(r["after"]["valid"] for r in rows)]
        left.plot(
            [0, *k], [v["force_mae"] for v in valid], "^--", color="black", markersize=4, label="validation molecules"
        )
        left.set_ylabel("force MAE (meV/Å)")
        left.set_ylim(bottom=0)
        right.plot(
            [0, *k], [_percent(v["noticed"]) for v in valid], "^--", color="black", markersize=4, label="validation"
        )
        right.plot(
            k, [_percent(r["before"]["any"]["noticed"]) for r in rows], "s-", color=BLUE, label="any frames of the MD"
        )
        right.axhline(100 * FALSE_ALARMS, color=GREY, linewidth=0.8, linestyle=":")
        right.annotate("by chance", (0.02, 100 * FALSE_ALARMS + 1.5), color=GREY, fontsize=8)
        right.set_ylabel(f"noticed of the worst {100 * WORST:g} % (%)")
        right.set_ylim(-3, 104)
        for axis in (left, right):
            axis.set_xlabel("round")
            axis.set_xticks([0, *k])
            axis.set_xlim(-0.2, k[-1] + 0.35)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=8)
        figure.tight_layout(rect=(0, 0.14, 1, 1))
    save_figure(figure, path)


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def prepare(args: argparse.Namespace) -> Rounds:
    """The work folder, which holds the options that decide the result; another run's folder is refused."""
    recipe = Recipe.read(args.config)
    wanted = {"steps": args.steps, "learning_rate": args.learning_rate}
    loop = dataclasses.replace(recipe.loop, **{name: value for name, value in wanted.items() if value is not None})
    if args.steps is not None:
        # a short trial is validated at its end at least
        loop = dataclasses.replace(
            loop,
            validate_every=min(loop.validate_every, args.steps),
            warmup_steps=min(loop.warmup_steps, args.steps // 4),
        )
    processes = recipe.processes if args.training_processes is None else args.training_processes
    recipe = dataclasses.replace(recipe, loop=loop, processes=processes)
    names = ("starts", "structures", "duration", "temperatures", "any", "repeat", "seed")
    described = {name: getattr(args, name) for name in names}
    described |= {"recipe": recipe.to_dict() | {"processes": None}, "models": [sha256_of(file) for file in args.models]}
    claim_folder(args.output, described | {"data": Dataset(args.data).card["name"]})
    if not (args.output / "start.safetensors").exists():
        save_ensemble(args.models, args.output / "start.safetensors")
    deadline = None if args.time_limit is None else time.monotonic() + 60.0 * args.time_limit
    return Rounds(args.data, args.output, args, recipe, deadline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the dataset that the members were trained on")
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="FILE", help="the members")
    parser.add_argument("--output", type=Path, required=True, help="work folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", "-j", type=int, default=3, help="of MD and labels")
    parser.add_argument("--starts", type=int, default=300, help="trajectories of a round")
    parser.add_argument("--structures", type=int, default=500, help="new frames of a round at most")
    parser.add_argument("--duration", type=float, default=500.0, help="of a trajectory, fs")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 500.0, 700.0], metavar="K")
    parser.add_argument("--any", type=int, default=150, help="frames of the MD that are labelled to judge")
    parser.add_argument("--repeat", type=int, default=4, help="how often each new frame is in an epoch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", type=Path, default=HERE.parent / "examples/recipes/spookynet_bio_finetune.toml")
    parser.add_argument("--steps", type=int, help="of the further training (the recipe's)")
    parser.add_argument("--learning-rate", type=float, help="at its start (the recipe's)")
    parser.add_argument("--training-processes", type=int, help="that share each batch (the recipe's)")
    parser.add_argument("--baseline", action="store_true", help="train the first members as long without new labels")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="stop then; the same command goes on")
    parser.add_argument("--report", type=Path, default=HERE, help="folder of JSON and picture")
    args = parser.parse_args()
    rounds = prepare(args)
    result = {
        "machine": machine(),
        "data": Dataset(args.data).card["name"],
        "models": {str(k): sha256_of(file) for k, file in enumerate(args.models)},
        "held_share": HELD,
        "worst": WORST,
        "false_alarms": FALSE_ALARMS,
        "settings": dataclasses.asdict(rounds.settings(0)) | {"starts": args.starts, "repeat": args.repeat},
        "training": {"steps": rounds.recipe.loop.steps, "learning_rate": rounds.recipe.loop.learning_rate},
        **rounds.go(),
    }
    args.report.mkdir(parents=True, exist_ok=True)
    write_atomically(args.report / f"{NAME}.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(result, args.report / f"{NAME}.png")
    print(f"wrote {NAME}.json and {NAME}.png")


if __name__ == "__main__":
    main()
