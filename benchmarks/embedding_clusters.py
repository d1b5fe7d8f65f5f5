"""Interaction energies of solutes with water by three embeddings, against SO3LR for everything.

For each cluster of a solute S and its eight nearest waters W (`_embedding_solutes.py`: amber14 droplets at 300 K), and
for the pairs of S with each of these waters, the reference is E(SW) - E(S) - E(W), all by SO3LR without cutoff. Against
it stand ML/MM energies with S by SO3LR and W by TIP3P, E(S in W) - E(S and W far apart), with the Lennard-Jones
parameters of amber14 in each:

* mechanical: the fixed charges of amber14 on the solute;
* electrostatic: SO3LR's charges on the solute;
* electrostatic, damped: MM charges as Gaussian clouds of one width, fitted;
* electrostatic + induction: damped, and dipoles on the solute's atoms. Polarisabilities are those of SO3LR (free atom
  times mean Hirshfeld ratio of the element) times one factor, and the MM charges that induce have a width of their own:
  three numbers fitted together.

What is fitted is fitted to the clusters of 13 solutes that are not among the 22 reported. Intervals (95 %) are from
10,000 bootstrap samples of solutes, all clusters of a solute together.

    python benchmarks/embedding_clusters.py            (snapshots are made once and kept in .work/embedding_clusters)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import HERE, SHARED, machine, write
from _embedding_solutes import NEAREST, SNAPSHOTS, TEST, TRAINING, Solute, cluster_system, snapshots
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.forces.surroundings import Surroundings, SurroundingsSpec, pack
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.units import ANGSTROM_PER_BOHR, EV_PER_KCAL_PER_MOL, KJ_PER_MOL_PER_EV
from openmm_so3krates.free_atoms import POLARIZABILITY

WEIGHTS = SHARED / "models" / "so3lr_params.npz"
FAR = 1e5  # angstrom
KCAL = 1.0 / EV_PER_KCAL_PER_MOL
SAMPLES, SEED = 10_000, 5


@dataclass
class Case:
    """One configuration of a solute and waters; energies in eV.

    Attributes:
        waters: which of the cluster's eight. lennard_jones: of solute and waters. model_charges: of the free solute by
            SO3LR. ratios: Hirshfeld ratios of its atoms. water_charges: of TIP3P.
    """

    solute: Solute
    snapshot: int
    waters: tuple[int, ...]
    numbers: np.ndarray
    positions: np.ndarray
    reference: float
    mechanical: float
    lennard_jones: float
    model_charges: np.ndarray
    ratios: np.ndarray
    water_charges: np.ndarray


def reference_energies(
    model: Potential, solute: Solute, numbers: np.ndarray, x: np.ndarray, n: int
) -> dict[Any, float]:
    """E(SW) - E(S) - E(W) of a cluster (key: all waters) and its pairs (key: one water), eV."""

    def energy(atoms: np.ndarray, charge: int) -> float:
        structure = Structure(numbers[atoms], x[atoms], charge=charge)
        return float(model.evaluate(model.batch(structure), forces=False).energy[0])

    inside = np.arange(n)
    alone = energy(inside, solute.charge)
    found = {}
    for waters in choices():
        around = np.concatenate([np.arange(n + 3 * w, n + 3 * w + 3) for w in waters])
        both = np.concatenate([inside, around])
        found[waters] = energy(both, solute.charge) - alone - energy(around, 0)
    return found


def choices() -> list[tuple[int, ...]]:
    return [tuple(range(NEAREST)), *((w,) for w in range(NEAREST))]


def mixed_energies(context: openmm.Context, x: np.ndarray, n: int) -> dict[Any, float]:
    """The same of an ML/MM system: waters that do not count are far away, each by itself."""

    def energy(present: tuple[int, ...], shift: float) -> float:
        moved = x.copy()
        for w in range(NEAREST):
            rows = slice(n + 3 * w, n + 3 * w + 3)
            moved[rows, 0] += shift if w in present else FAR * (w + 2)
        context.setPositions(0.1 * moved)
        return context.getState(energy=True).getPotentialEnergy()._value / KJ_PER_MOL_PER_EV

    return {waters: energy(waters, 0.0) - energy(waters, FAR) for waters in choices()}


def context_of(system: openmm.System) -> openmm.Context:
    return openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))


def mixed_context(potential: MLPotential, solute: Solute, n: int, **options: Any) -> openmm.Context:
    topology, system = cluster_system(solute)
    common = {"charge": solute.charge, "precision": "double", "maxForce": None}
    return context_of(potential.createMixedSystem(topology, system, list(range(n)), **common, **options))


def cases_of(model: Potential, potential: MLPotential, solute: Solute, folder: Path) -> list[Case]:
    """Everything about a solute that does not depend on what is fitted."""
    data = snapshots(solute, folder)
    numbers, n = data["numbers"], int(data["n_solute"][0])
    topology, system = cluster_system(solute)
    assert [a.element.atomic_number for a in topology.atoms()] == numbers.tolist()
    charges = _charges(system)
    mechanical = mixed_context(potential, solute, n)
    cases = []
    for k, x in enumerate(data["positions"]):
        reference = reference_energies(model, solute, numbers, x, n)
        mm = mixed_energies(mechanical, x, n)
        batch = model.batch(Structure(numbers[:n], x[:n], charge=solute.charge))
        fixed = model.fixed(batch)
        with torch.no_grad():
            q = model.predict(batch, fixed).charges
            features, _ = model.features(fixed, model.geometry(batch))  # type: ignore[operator]
            ratios = model.hirshfeld_ratios(features, fixed)  # type: ignore[operator]
        for waters in choices():
            rows = np.concatenate([np.arange(n), *(np.arange(n + 3 * w, n + 3 * w + 3) for w in waters)])
            case = Case(
                solute, k, waters, numbers[:n], x[rows], reference[waters], mm[waters], 0.0,
                q.numpy(), ratios.numpy(), charges[n : n + 3],
            )  # fmt: skip
            case.lennard_jones = case.mechanical - electrostatic(case, charges[:n])
            cases.append(case)
    return cases


def _charges(system: openmm.System) -> np.ndarray:
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    return np.array([force.getParticleParameters(i)[0]._value for i in range(system.getNumParticles())])


def electrostatic(case: Case, charges: np.ndarray, **options: Any) -> float:
    """Energy (eV) of the solute's charges and induced dipoles in the potential of the waters."""
    n = len(case.numbers)
    every = np.concatenate([np.zeros(n), np.tile(case.water_charges, len(case.waters))])
    surroundings = Surroundings(SurroundingsSpec(len(every), pack(every), **options), tuple(range(n)))
    phi = surroundings.field(case.positions, case.positions[:n], None)
    return float(phi @ charges) + surroundings.react(charges)[0]


# -- fits ------------------------------------------------------------------------------------------------------------


def polarizabilities(cases: list[Case]) -> dict[str, float]:
    """Of each element, free atom times the mean Hirshfeld ratio in these solutes, angstrom^3."""
    numbers = np.concatenate([c.numbers for c in cases])
    ratios = np.concatenate([c.ratios for c in cases])
    return {
        SYMBOLS[z]: float(POLARIZABILITY[z - 1] * ANGSTROM_PER_BOHR**3 * ratios[numbers == z].mean())
        for z in np.unique(numbers)
    }


def by_atom(case: Case, table: dict[str, float], factor: float) -> tuple[float, ...]:
    return tuple(factor * table[SYMBOLS[z]] for z in case.numbers)


def fit(cases: list[Case], table: dict[str, float]) -> dict[str, dict[str, float]]:
    """Least mean absolute error of the clusters' energies.

    Returns, for charges alone and with induction: the width of the MM charges (angstrom), the factor of the
    polarisabilities, and the width of the MM charges that induce (in widths of the dipoles).
    """
    clusters = [c for c in cases if len(c.waters) == NEAREST]

    def loss(damping: float, factor: float = 0.0, width: float = 0.0) -> float:
        errors = []
        for c in clusters:
            options: dict[str, Any] = {"damping": abs(damping)}
            if factor:
                options.update(polarizabilities=by_atom(c, table, abs(factor)), induction_damping=abs(width))
            errors.append(c.lennard_jones + electrostatic(c, c.model_charges, **options) - c.reference)
        return float(np.mean(np.abs(errors))) * KCAL

    damping = float(min(np.arange(0.0, 2.01, 0.05), key=loss))
    starts = [[0.0, 0.5, 3.0], [1.0, 0.5, 3.0], [1.0, 1.0, 2.0]]
    options = {"xatol": 0.01, "fatol": 1e-3, "maxiter": 100}
    fits = [minimize(lambda p: loss(*p), start, method="Nelder-Mead", options=options) for start in starts]
    best = min(fits, key=lambda found: found.fun)
    joint, factor, width = (abs(float(x)) for x in best.x)
    return {
        "charges": {"damping": damping, "training_error": loss(damping)},
        "induction": {"damping": joint, "factor": factor, "width": width, "training_error": float(best.fun)},
        "nothing": {"training_error": loss(0.0)},
    }


# -- figures ---------------------------------------------------------------------------------------------------------


def intervals(values: np.ndarray, groups: np.ndarray) -> dict[str, list[float] | float]:
    """Mean of values with its 95 % interval over bootstrap samples of the groups."""
    rng = np.random.default_rng(SEED)
    names = np.unique(groups)
    sums = np.array([values[groups == g].sum() for g in names])
    counts = np.array([(groups == g).sum() for g in names])
    drawn = rng.integers(len(names), size=(SAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": round(float(values.mean()), 3), "interval": [round(float(low), 3), round(float(high), 3)]}


def report(cases: list[Case], energies: dict[str, np.ndarray]) -> dict[str, Any]:
    """Errors in kcal/mol, of clusters and pairs, neutral and ionic solutes apart."""
    whole = np.array([len(c.waters) == NEAREST for c in cases])
    ionic = np.array([c.solute.charge != 0 for c in cases])
    names = np.array([c.solute.name for c in cases])
    reference = np.array([c.reference for c in cases])
    result: dict[str, Any] = {}
    for what, size in (("clusters", whole), ("pairs", ~whole)):
        for kind, chosen in (("neutral", size & ~ionic), ("ionic", size & ionic), ("all", size)):
            rows: dict[str, Any] = {"n": int(chosen.sum()), "solutes": len(set(names[chosen]))}
            rows["mean_reference"] = round(float(reference[chosen].mean()) * KCAL, 2)
            base = np.abs(energies["mechanical"] - reference)[chosen] * KCAL
            for name, found in energies.items():
                error = (found - reference)[chosen] * KCAL
                rows[name] = {
                    "mean_absolute_error": intervals(np.abs(error), names[chosen]),
                    "mean_error": intervals(error, names[chosen]),
                    "less_than_mechanical_by": intervals(base - np.abs(error), names[chosen]),
                }
            result[f"{what}, {kind}"] = rows
    return result


def picture(cases: list[Case], energies: dict[str, np.ndarray], path: Path) -> None:
    from openmm_mlff.analysis.plots import BLUE, ORANGE, STYLE, pyplot, save_figure

    plt = pyplot()
    whole = np.array([len(c.waters) == NEAREST for c in cases])
    ionic = np.array([c.solute.charge != 0 for c in cases])
    reference = np.array([c.reference for c in cases]) * KCAL
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(energies), figsize=(2.6 * len(energies), 2.9), sharex=True, sharey=True)
        for axis, (name, found) in zip(axes, energies.items(), strict=True):
            error = found * KCAL - reference
            for chosen, colour, label in ((~ionic, BLUE, "neutral"), (ionic, ORANGE, "ionic")):
                axis.plot(reference[whole & chosen], error[whole & chosen], "o", ms=3, color=colour, label=label)
            axis.axhline(0.0, color="black", lw=0.6)
            axis.set_title(name)
            axis.set_xlabel("SO3LR (kcal/mol)")
        axes[0].set_ylabel("error of the ML/MM energy (kcal/mol)")
        axes[0].legend(loc="best")
        figure.tight_layout()
        save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".work" / "embedding_clusters")
    arguments = parser.parse_args()
    if not WEIGHTS.exists():
        raise SystemExit(f"no {WEIGHTS.name} in the folder of shared data; OPENMM_MLFF_SHARED names that folder")
    torch.set_num_threads(1)
    model = load_potential(WEIGHTS, "so3krates").double()
    potential = MLPotential("so3krates", modelPath=str(WEIGHTS))
    training = [c for s in TRAINING for c in cases_of(model, potential, s, arguments.folder)]
    table = polarizabilities(training)
    fitted = fit(training, table)
    damped = {"dampingLength": round(0.1 * fitted["charges"]["damping"], 4)}
    induced = {
        "dampingLength": round(0.1 * fitted["induction"]["damping"], 4),
        "polarizabilities": {z: round(fitted["induction"]["factor"] * a, 4) for z, a in table.items()},
        "inductionDamping": round(fitted["induction"]["width"], 3),
    }
    print(fitted)
    kinds = {"electrostatic": {}, "electrostatic, damped": damped, "electrostatic + induction": induced}
    cases, found = [], {"mechanical": [], **{name: [] for name in kinds}}
    for solute in TEST:
        mine = cases_of(model, potential, solute, arguments.folder)
        n = len(mine[0].numbers)
        positions = snapshots(solute, arguments.folder)["positions"]
        cases += mine
        found["mechanical"] += [c.mechanical for c in mine]
        for name, options in kinds.items():
            context = mixed_context(potential, solute, n, embedding="electrostatic", **options)
            for x in positions:
                found[name] += list(mixed_energies(context, x, n).values())
    energies = {name: np.array(values) for name, values in found.items()}
    result = report(cases, energies)
    show(result)
    picture(cases, energies, HERE / "embedding_clusters.png")
    write(
        "embedding_clusters",
        {
            "what": __doc__,
            "machine": machine(),
            "snapshots": SNAPSHOTS,
            "training": [s.name for s in TRAINING],
            "test": [s.name for s in TEST],
            "fitted": {**fitted, "polarizabilities_of_so3lr": {z: round(a, 4) for z, a in table.items()}},
            "keywords": {"electrostatic, damped": damped, "electrostatic + induction": induced},
            "kcal_per_mol": result,
        },
    )


def show(result: dict[str, Any]) -> None:
    table = Table(
        "", "n", "mean", *(k for k in next(iter(result.values())) if k not in ("n", "solutes", "mean_reference"))
    )
    for what, rows in result.items():
        cells = []
        for row in rows.values():
            if isinstance(row, dict):
                value, (low, high) = row["mean_absolute_error"]["value"], row["mean_absolute_error"]["interval"]
                cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        table.add_row(what, str(rows["n"]), f"{rows['mean_reference']:.1f}", *cells)
    Console().print("mean absolute errors (kcal/mol), 95 % intervals")
    Console().print(table)


if __name__ == "__main__":
    main()
