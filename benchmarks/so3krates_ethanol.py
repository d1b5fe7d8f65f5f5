"""SO3krates trained from scratch on ethanol: equivariant against invariant and against sGDML, at equal data.

    python benchmarks/so3krates_ethanol.py [--parts train run report] [--models equivariant] [--minutes 60]

* Data: 2000 frames of ethanol by GFN2-xTB (shared data set; two runs at 500 K, a frame every 8 fs). Neighbouring frames
  are alike, so pieces of 50 frames (0.4 ps) are dealt by a seed to training (1000), validation (200) and test (800).
  All pieces come from the same two runs, so all errors are optimistic alike.
* `equivariant` and `invariant` differ in one setting: the degrees of the Euclidean variables (1, 2, 3, or none). Both
  are energies of atoms alone (no repulsion, charges or dispersion added), trained by the same recipe for the same
  number of steps; the parameters with the least validation loss are kept. sGDML gets the same frames; sigma (15
  or 20) is chosen on the same validation frames. Test frames are used once, for the table.
* Dynamics: six runs (test frames, own velocities) at each temperature, Langevin, 0.5 fs, 1/ps. The training data were
  made at 500 K; 1000 and 2000 K ask what a model does beyond them. A run has failed when a bond is 0.5 angstrom longer
  or shorter than its mean in the training frames (looked at every 5 fs), or when forces are no numbers. `failed_ps`
  has the times of failure; null means none until the end of the run, `length_ps`.

Trainings and runs are kept in the work folder, and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, SHARED, machine, write
from openmm import app
from openmmml import MLPotential

from openmm_mlff.data.datasets import Dataset, split_by_group, write_dataset
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.formats import read_sgdml_npz
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.training.direct import train_directly
from openmm_mlff.training.recipe import Recipe
from openmm_mlff.training.run import MODEL, train
from openmm_mlff.units import ANGSTROM_PER_NM, EV_PER_KCAL_PER_MOL, NM_PER_ANGSTROM

BLOCK, SEED = 50, 1
FRACTIONS = {"train": 0.5, "valid": 0.1, "test": 0.4}
#: kelvin -> ps of every run, at most
TEMPERATURES = {300.0: 50.0, 500.0: 50.0, 1000.0: 25.0, 2000.0: 5.0}
RUNS = 6
PARTS = ("train", "run", "report")
#: of a bond, angstrom
FAILED = 0.5
TIMESTEP, LOOK = 0.5, 10
BONDS = ((0, 1), (1, 2), (2, 8), (0, 3), (0, 4), (0, 5), (1, 6), (1, 7))
COLORS = {"equivariant": "#1f5fa8", "invariant": "#b5472f", "sgdml": "#5a8f3c"}
LABELS = {"equivariant": "SO3krates, l = 1, 2, 3", "invariant": "invariant (no degrees)", "sgdml": "sGDML"}

#: a small one of the kind of Frank et al. 2024: Euclidean variables start as averaged harmonics, no added terms
NETWORK: dict[str, Any] = {
    "num_layers": 2,
    "num_features": 72,
    "num_heads": 4,
    "cutoff": 5.0,
    "initial_euclidean": "neighbors",
    "message_normalization": "sqrt_num_features",
    "avg_num_neighbors": 8.0,
    "elements": [1, 6, 8],
    "charges": [0],
    "multiplicities": [1],
} | dict.fromkeys(
    (
        "use_charge_embed",
        "use_spin_embed",
        "use_zbl_repulsion",
        "use_electrostatics",
        "use_dispersion",
        "predict_charges",
        "predict_hirshfeld",
    ),
    False,
)
DEGREES = {"equivariant": [1, 2, 3], "invariant": []}
LOOP = {
    "steps": 30_000,
    "learning_rate": 1e-3,
    "final_learning_rate": 1e-5,
    "warmup_steps": 500,
    "schedule": "cosine",
    "clip_norm": 10.0,
    "ema_decay": 0.999,
    "validate_every": 1000,
}
RECIPE: dict[str, Any] = {
    "family": "so3krates",
    "seed": SEED,
    "batch_size": 10,
    "threads": 1,
    "compile": True,
    "loss": {"energy": 0.01, "forces": 1.0},
    "loop": LOOP,
}
KERNEL: dict[str, Any] = {
    "family": "gdml",
    "seed": SEED,
    "threads": 1,
    "trainer": {"sigma": [15.0, 20.0], "lam": 1e-10, "memory": "3 GB"},
}


# -- data and trainings ------------------------------------------------------------------------------------------


def dataset(work: Path) -> Dataset:
    """The shared frames with what each is meant for; written on the first call."""
    folder = work / "data"
    if (folder / "card.json").exists():
        return Dataset(folder)
    source = SHARED / "data" / "gdml" / "dataset_ethanol.npz"
    if not source.exists():
        raise SystemExit("no gdml/dataset_ethanol.npz among the shared data; OPENMM_MLFF_SHARED names that folder")
    runs = np.load(source, allow_pickle=False)["traj_id"]
    frames = read_sgdml_npz(source)
    counters = dict.fromkeys(sorted(set(runs.tolist())), 0)
    groups = []
    for run in runs.tolist():
        groups.append(f"run{run}-{counters[run] // BLOCK:02d}")
        counters[run] += 1
    dealt = split_by_group(groups, FRACTIONS, SEED)
    meant = {group: name for name, members in dealt.items() for group in members}
    structures = [s.replace(group=g, info={"split": meant[g]}) for s, g in zip(frames, groups, strict=True)]
    return write_dataset(
        folder, structures, name="ethanol", method={"name": "GFN2-xTB"}, sampling={"source": source.name, "seed": SEED}
    )


def splits(data: Dataset) -> dict[str, list[Structure]]:
    structures = data.load()
    return {name: [s for s in structures if s.info["split"] == name] for name in FRACTIONS}


def fit(name: str, data: Dataset, work: Path) -> None:
    """Train one of the three models, or go on with it; the CPU seconds of all sittings are kept."""
    folder, clock = work / name, work / f"{name}.seconds.json"
    spent = json.loads(clock.read_text(encoding="utf-8"))["cpu_seconds"] if clock.exists() else 0.0
    before = time.process_time()
    resume = (folder / "config.json").exists()
    try:
        if name == "sgdml":
            train_directly(None if resume else Recipe.from_dict(KERNEL), [data.path], folder, resume, progress=False)
        else:
            recipe = RECIPE | {"model": NETWORK | {"degrees": DEGREES[name]}}
            train(None if resume else Recipe.from_dict(recipe), [data.path], folder, resume, progress=False)
    finally:
        spent += time.process_time() - before
        write_atomically(clock, json.dumps({"cpu_seconds": round(spent, 1)}).encode())


def accuracy(name: str, test: list[Structure], work: Path) -> dict[str, Any]:
    """Errors on the test frames, energies less their mean difference (a constant means nothing here)."""
    model = load_potential(work / name / MODEL)
    forces, energies = [], []
    for s in test:
        energy, found = model.energy_and_forces(s)
        forces.append(found - s.forces)
        energies.append(energy - (s.energy or 0.0))
    difference = np.array(forces) / EV_PER_KCAL_PER_MOL
    shifted = (np.array(energies) - np.mean(energies)) / EV_PER_KCAL_PER_MOL
    blocks = np.array([s.group for s in test])
    by_block = [np.abs(difference[blocks == b]).mean() for b in sorted(set(blocks.tolist()))]
    steps = work / name / "history.json"
    clock = work / f"{name}.seconds.json"
    result: dict[str, Any] = {
        "forces_mae_kcal_mol_A": round(float(np.abs(difference).mean()), 4),
        "forces_mae_standard_error": round(float(np.std(by_block, ddof=1) / np.sqrt(len(by_block))), 4),
        "forces_rmse_kcal_mol_A": round(float(np.sqrt((difference**2).mean())), 4),
        "energy_mae_kcal_mol": round(float(np.abs(shifted).mean()), 4),
    }
    if clock.exists():
        seconds = json.loads(clock.read_text(encoding="utf-8"))["cpu_seconds"]
        result["training_cpu_minutes"] = round(seconds / 60, 1)
    if steps.exists():
        result["parameters"] = sum(p.numel() for p in model.parameters())
        history = json.loads(steps.read_text(encoding="utf-8"))
        result["steps"] = int(history[-1]["step"])
        result["validation"] = [[int(row["step"]), round(row["valid_forces_mae"], 3)] for row in history]
    else:
        result["chosen"] = json.loads((work / name / "fit.json").read_text(encoding="utf-8"))["chosen"]
        errors = json.loads((work / name / "valid_errors.json").read_text(encoding="utf-8"))
        result["validation"] = [[0, round(errors["tables"]["all"][0]["forces_mae"], 3)]]
    return result


# -- dynamics ----------------------------------------------------------------------------------------------------


class Runs:
    """Six runs of one model at one temperature in one System; those that have failed stand at their start again."""

    def __init__(self, name: str, temperature: float, data: dict[str, list[Structure]], work: Path) -> None:
        self.name, self.temperature = name, temperature
        self.file = work / f"{name}-{temperature:.0f}K.npz"
        topology = app.Topology()
        residue = topology.addResidue("ETH", topology.addChain())
        for z in data["test"][0].numbers:
            topology.addAtom("A", app.Element.getByAtomicNumber(int(z)), residue)
        family = "gdml" if name == "sgdml" else "so3krates"
        potential = MLPotential(family, modelPath=str(work / name / MODEL))
        system = potential.createSystem(topology, compile=True, device="cpu", removeCMMotion=False)
        self.replicas = Replicas(system, topology, RUNS)
        random = np.random.default_rng(SEED)
        chosen = random.choice(len(data["test"]), RUNS, replace=False)
        self.starts = np.stack([data["test"][i].positions for i in chosen]) * NM_PER_ANGSTROM
        pairs = np.array(BONDS)
        train_frames = np.stack([s.positions for s in data["train"]])
        self.mean = np.linalg.norm(train_frames[:, pairs[:, 0]] - train_frames[:, pairs[:, 1]], axis=-1).mean(axis=0)
        self.pairs = pairs
        self.failed = np.full(RUNS, np.nan)
        self.step = 0

    def broken(self, positions: np.ndarray) -> np.ndarray:
        """Which replicas have a bond out of range, ``(RUNS,)``; NaN counts."""
        apart = positions[:, self.pairs[:, 0]] - positions[:, self.pairs[:, 1]]
        lengths = np.linalg.norm(apart, axis=-1) * ANGSTROM_PER_NM
        return ~(np.abs(lengths - self.mean) <= FAILED).all(axis=1)

    def context(self) -> openmm.Context:
        """A new Context where the runs are; its random numbers are those of this step."""
        integrator = openmm.LangevinMiddleIntegrator(self.temperature, 1.0, TIMESTEP * 1e-3)
        integrator.setRandomNumberSeed(SEED + self.step)
        context = self.replicas.context(integrator, "Reference")
        if self.file.exists() and self.step == 0:
            with np.load(self.file, allow_pickle=False) as kept:
                self.failed, self.step = kept["failed"], int(kept["step"])
                self.replicas.set_positions(context, kept["positions"])
                context.setVelocities(kept["velocities"].reshape(-1, 3))
            integrator.setRandomNumberSeed(SEED + self.step)
            context.reinitialize(preserveState=True)
            return context
        self.replicas.set_positions(context, self.starts)
        self.replicas.set_velocities(context, self.temperature, SEED)
        return context

    def state(self, context: openmm.Context) -> tuple[np.ndarray, np.ndarray]:
        state = context.getState(positions=True, velocities=True)
        return tuple(self.replicas.split(x._value) for x in (state.getPositions(True), state.getVelocities(True)))  # type: ignore[return-value]

    def save(self, context: openmm.Context) -> None:
        positions, velocities = self.state(context)
        temporary = self.file.with_suffix(".tmp.npz")
        np.savez(temporary, positions=positions, velocities=velocities, failed=self.failed, step=self.step)
        temporary.rename(self.file)

    def retire(self, context: openmm.Context, which: np.ndarray, state: tuple[np.ndarray, np.ndarray]) -> None:
        """Note failures now, and put those replicas back to their starts at rest, so that the others go on."""
        positions, velocities = state
        self.failed[which & np.isnan(self.failed)] = self.step * TIMESTEP * 1e-3
        positions[which], velocities[which] = self.starts[which], 0.0
        self.replicas.set_positions(context, positions)
        context.setVelocities(velocities.reshape(-1, 3))

    def run(self, picoseconds: float, deadline: float) -> None:
        """Go on to `picoseconds`, until all have failed, or until the clock says `deadline`."""
        context = self.context()
        total = round(picoseconds * 1e3 / TIMESTEP)
        saved = time.monotonic()
        while self.step < total and np.isnan(self.failed).any() and time.monotonic() < deadline:
            good = self.state(context)
            try:
                context.getIntegrator().step(LOOK)
            except openmm.OpenMMException:
                context = self._slowly(context, good)
                continue
            self.step += LOOK
            now = self.state(context)
            wrong = self.broken(now[0])
            if wrong.any():
                self.retire(context, wrong, now)
            if time.monotonic() > saved + 20.0:
                self.save(context)
                saved = time.monotonic()
        self.save(context)

    def _slowly(self, context: openmm.Context, good: tuple[np.ndarray, np.ndarray]) -> openmm.Context:
        """Step by step from the last good state to the one before the exception; the widest replica is to blame."""
        self.replicas.set_positions(context, good[0])
        context.setVelocities(good[1].reshape(-1, 3))
        now = good
        for _ in range(LOOK):
            wrong = self.broken(now[0])
            if wrong.any():
                break
            try:
                context.getIntegrator().step(1)
            except openmm.OpenMMException:
                speed = np.square(now[1]).sum(axis=(1, 2))
                wrong = speed >= np.nanmax(np.where(np.isfinite(speed), speed, np.inf))
                break
            self.step += 1
            now = self.state(context)
        self.retire(context, wrong, now)
        return context

    def result(self) -> dict[str, Any]:
        return summarised(self.failed, self.step)


def summarised(failed: np.ndarray, step: int) -> dict[str, Any]:
    """Times of failure (None: not until the end) and their mean, to which runs without one add their length."""
    times = [None if np.isnan(t) else round(float(t), 3) for t in failed]
    alive = step * TIMESTEP * 1e-3
    return {
        "failed_ps": times,
        "length_ps": round(alive, 3),
        "survived": sum(t is None for t in times),
        "mean_ps": round(float(np.mean([alive if t is None else t for t in times])), 3),
    }


def outcome(work: Path, name: str, temperature: float) -> dict[str, Any]:
    """What the runs of a model at a temperature have come to so far."""
    path = work / f"{name}-{temperature:.0f}K.npz"
    if not path.exists():
        raise SystemExit(f"{name} has not run at {temperature:.0f} K")
    with np.load(path, allow_pickle=False) as kept:
        return summarised(kept["failed"], int(kept["step"]))


# -- output ------------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), constrained_layout=True)
    for name, row in result["models"].items():
        mae = row["forces_mae_kcal_mol_A"]
        steps, values = np.array(row["validation"]).T
        # meV/angstrom
        values = values * 1e-3 / EV_PER_KCAL_PER_MOL
        if len(steps) > 1:
            left.plot(steps / 1e3, values, color=COLORS[name], label=f"{LABELS[name]}: {mae:.2f} on test")
        else:
            left.axhline(values[0], color=COLORS[name], linestyle="--", label=f"{LABELS[name]}: {mae:.2f} on test")
    left.set(xlabel="thousand steps of training", ylabel="force MAE on validation [kcal/mol/Å]", yscale="log")
    left.set_yticks([0.4, 0.6, 1.0, 2.0, 3.0], ["0.4", "0.6", "1", "2", "3"])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(fontsize=8, frameon=False)
    names = list(result["models"])
    longest = max(row["dynamics"][t]["length_ps"] for row in result["models"].values() for t in row["dynamics"])
    for g, temperature in enumerate(result["temperatures"]):
        for n, name in enumerate(names):
            row = result["models"][name]["dynamics"][f"{temperature:.0f}"]
            middle = g + 0.28 * (n - 0.5 * (len(names) - 1))
            for k, t in enumerate(row["failed_ps"]):
                shift = middle + 0.035 * (k - 0.5 * (RUNS - 1))
                marker = "^" if t is None else "x"
                right.plot(shift, t or row["length_ps"], marker, color=COLORS[name], markersize=5)
            right.annotate(
                f"{row['survived']}/{RUNS}", (middle, 1.5 * longest), ha="center", fontsize=8, color=COLORS[name]
            )
    right.set(yscale="log", ylim=(0.3, 2.4 * longest))
    right.set_yticks([0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0], ["0.5", "1", "2", "5", "10", "25", "50"])
    right.minorticks_off()
    right.set_xticks(range(len(result["temperatures"])), [f"{t:.0f} K" for t in result["temperatures"]])
    right.set_ylabel("time to failure, or length of the run [ps]")
    right.set_title("crosses: a bond failed; triangles: whole at the end", fontsize=9)
    right.grid(alpha=0.3, axis="y")
    figure.savefig(HERE / "so3krates_ethanol.png", dpi=160)


def show(result: dict[str, Any]) -> None:
    print(f"{'model':12s} {'forces MAE':>11s} {'energy MAE':>11s}  runs that survived (mean ps)")
    for name, row in result["models"].items():
        runs = ", ".join(f"{t} K: {r['survived']} of {RUNS} ({r['mean_ps']:g})" for t, r in row["dynamics"].items())
        print(f"{name:12s} {row['forces_mae_kcal_mol_A']:11.3f} {row['energy_mae_kcal_mol']:11.3f}  {runs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="report needs all models")
    parser.add_argument("--models", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--picoseconds", type=float, help="of every run, at most (50, and 25 and 5 at 1000 and 2000 K)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of runs in this sitting, at most")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".work" / "so3krates_ethanol")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, work = dataset(arguments.work), arguments.work
    cases = [(temperature, name) for temperature in arguments.temperatures for name in arguments.models]
    if "train" in arguments.parts:
        for name in arguments.models:
            fit(name, data, work)
    parts = splits(data)
    if "run" in arguments.parts:
        deadline = time.monotonic() + 60 * arguments.minutes
        for temperature, name in cases:
            runs = Runs(name, temperature, parts, work)
            before, begin = runs.step, time.process_time()
            runs.run(arguments.picoseconds or TEMPERATURES.get(temperature, 50.0), deadline)
            ms = 1e3 * (time.process_time() - begin) / max(runs.step - before, 1)
            print(f"{name}, {temperature:.0f} K, {ms:.2f} ms of CPU time per step: {runs.result()}", flush=True)
    if "report" in arguments.parts:
        result: dict[str, Any] = {
            "what": __doc__,
            "machine": machine(),
            "frames": {name: len(members) for name, members in parts.items()},
            "recipe": RECIPE | {"model": NETWORK, "degrees": DEGREES},
            "temperatures": arguments.temperatures,
            "models": {name: accuracy(name, parts["test"], work) | {"dynamics": {}} for name in arguments.models},
        }
        for temperature, name in cases:
            result["models"][name]["dynamics"][f"{temperature:.0f}"] = outcome(work, name, temperature)
        show(result)
        write("so3krates_ethanol", result)
        draw(result)


if __name__ == "__main__":
    main()
