"""What the runs of the benchmark of dynamics say: bonds, protons, shapes, shells of water, uncertainty, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from _dynamics import TEMPERATURE, Record
from _dynamics_systems import Subject, force_limit
from ase.data import covalent_radii

from openmm_mlff.analysis.distributions import jackknife_ratio, populations, units, wasserstein
from openmm_mlff.analysis.free_energy import effective_samples
from openmm_mlff.analysis.observables import Estimate, backbone_torsions, dihedral, mean_with_error
from openmm_mlff.analysis.radial import neighbors_within, radial_distribution
from openmm_mlff.data.classes import protonation
from openmm_mlff.data.files import read_arrays, write_arrays
from openmm_mlff.data.reference import TBLite
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.units import BOLTZMANN_EV

#: molecules in 1 angstrom^3 of liquid water at 300 K: what g(r) in a droplet is relative to
BULK = 0.0333
EDGES = np.arange(1.5, 6.51, 0.1)
#: first minima of g(r), angstrom: where a first shell ends
SHELLS = {"N": 3.5, "O": 3.4, "Na": 3.2, "Cl": 3.9}
#: a bond this many times as long as its mean is broken; a hydrogen so far from any heavy atom (angstrom) is lost
BROKEN, LOST = 1.5, 1.6
AUDIT_FORM = "openmm-mlff dynamics audit 1"
#: regions of the Ramachandran plane
BASINS = {
    "beta and PPII": lambda x: (x[:, 0] < 0) & ((x[:, 1] > 50) | (x[:, 1] < -120)),
    "right-handed alpha": lambda x: (x[:, 0] < 0) & (x[:, 1] <= 50) & (x[:, 1] >= -120),
    "phi > 0": lambda x: x[:, 0] >= 0,
}


def number(estimate: Estimate, digits: int = 3) -> dict[str, float]:
    return {"value": round(estimate.value, digits), "error": round(estimate.error, digits)}


# -- whether it is still the same molecules ---------------------------------------------------------------------------


def soundness(it: Subject, record: Record) -> dict[str, Any]:
    """Bonds, hydrogens and temperature of a run."""
    numbers, x = it.built.numbers, record.positions[:, it.region]
    bonds = np.array([b for b in it.built.bonds.tolist() if 1 not in numbers[b] or 6 in numbers[b]]).reshape(-1, 2)
    result: dict[str, Any] = {
        "ps": round(float(record.table["time_ps"][-1]), 3),
        "frames": len(x),
        "ended_early": record.failure,
        "temperature_K": number(mean_with_error(record.table["temperature_K"]), 1),
        "cpu_ms_per_step": round(record.seconds, 2),
    }
    if len(bonds):
        lengths = np.linalg.norm(x[:, bonds[:, 0]] - x[:, bonds[:, 1]], axis=-1)
        ratios = lengths / lengths.mean(axis=0)
        result["bonds_of_carbon"] = {
            "bonds": len(bonds),
            "broken": int((ratios > BROKEN).any(axis=0).sum()),
            "longest_over_mean": round(float(ratios.max()), 3),
            "shortest_over_mean": round(float(ratios.min()), 3),
        }
    hydrogens, heavy = np.flatnonzero(numbers == 1), np.flatnonzero(numbers > 1)
    furthest = 0.0
    for frame in x:
        apart = np.linalg.norm(frame[hydrogens, None] - frame[None, heavy], axis=-1).min(axis=1)
        furthest = max(furthest, float(apart.max()))
    result["hydrogen_furthest_from_any_heavy_atom_A"] = round(furthest, 3)
    result["hydrogen_lost"] = furthest > LOST
    return result


def protons(it: Subject, record: Record) -> tuple[dict[str, Any], np.ndarray]:
    """Where protons are, frame by frame, and the charge of the cation's atom that was built charged."""
    cation = it.positive()
    states, charges, owners = [], [], []
    polar = it.built.polar_bonds()
    sites = np.flatnonzero(np.isin(it.built.numbers, (7, 8, 16)))
    for frame in record.positions[:, it.region].astype(float):
        found = protonation(it.built, frame)
        states.append(found.state)
        charges.append(found.formal_charges[cation])
        apart = np.linalg.norm(frame[polar[:, 0], None] - frame[None, sites], axis=-1)
        owners.append(sites[np.argmin(apart - covalent_radii[it.built.numbers[sites]], axis=1)])
    each, owner = np.array(states), np.array(owners)
    moves = int((owner[1:] != owner[:-1]).sum()) + int((owner[0] != polar[:, 1]).sum())
    shares = {s: round(float((each == s).mean()), 5) for s in ("as built", "shared", "transferred")}
    away = np.flatnonzero(each != "as built")
    first = round(float(record.table["time_ps"][away[0]]), 3) if len(away) else None
    return {"share_of_frames": shares, "first_moved_ps": first, "hydrogens_that_changed_atom": moves}, np.array(charges)


# -- shells of water --------------------------------------------------------------------------------------------------


def shell(it: Subject, record: Record, centers: np.ndarray, label: str) -> dict[str, Any]:
    """g(r) of water oxygens about some atoms of the region, and how many are in the first shell."""
    water, box = it.water(), it.box()
    vectors = None if box is None else np.diag(box)
    where = it.region[centers]
    density = BULK if box is None else None
    found = radial_distribution(record.positions, where, water, EDGES, vectors, density)
    radius = SHELLS[label]
    counts = neighbors_within(record.positions, where, water, radius, vectors)
    # the first peak lies inside the first shell
    inside = found.middles < radius
    peak = int(np.argmax(np.where(inside, found.g, 0.0)))
    return {
        "first_peak_A": round(float(found.middles[peak]), 2),
        "first_peak_height": round(float(found.g[peak]), 2),
        "within_A": radius,
        "waters_within": number(mean_with_error(counts), 2),
        "rows": {"r": found.middles.round(3).tolist(), "g": found.g.round(4).tolist()},
    }


def contact(it: Subject, record: Record) -> np.ndarray:
    """Distance of the cation's nitrogen to the nearer oxygen of the anion, ``(n_frames,)`` angstrom."""
    x = record.positions[:, it.region]
    return np.asarray(np.linalg.norm(x[:, it.positive(), None] - x[:, None, it.negative()], axis=-1).min(axis=(1, 2)))


# -- shape of the peptide ---------------------------------------------------------------------------------------------


def shape(it: Subject, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """phi and psi of the middle residue, ``(n, 2)`` degrees, and the distance of the chain's ends, ``(n,)`` angstrom.

    The ends are the nitrogen and the carbon of the carboxylate.
    """
    torsions = backbone_torsions(it.topology, it.region.tolist())
    middle = [atoms for name, atoms in torsions.items() if "ALA" in name]
    angles = dihedral(positions, np.array(middle))
    oxygen = it.negative()[0]
    carbon = next(i + j - oxygen for i, j in it.built.bonds.tolist() if oxygen in (i, j))
    ends = np.linalg.norm(positions[:, it.region[it.positive()[0]]] - positions[:, it.region[carbon]], axis=-1)
    return angles, np.asarray(ends)


def basins(angles: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
    """Populations of the Ramachandran plane; with weights, from blocks of the run by the jackknife."""
    if weights is None:
        return {name: number(p) for name, p in populations([angles], BASINS).items()}
    pieces = units([len(angles)])
    found = {}
    for name, region in BASINS.items():
        inside = weights * region(angles)
        top = np.array([inside[a:b].sum() for _, a, b in pieces])
        found[name] = number(jackknife_ratio(top, np.array([weights[a:b].sum() for _, a, b in pieces])))
    return found


def distance_between(a: np.ndarray, b: np.ndarray) -> float:
    return round(wasserstein(a, b), 3)


# -- model against teacher, on the frames of the run ------------------------------------------------------------------


def audit(it: Subject, record: Record, model: Path, path: Path, n: int) -> dict[str, np.ndarray]:
    """Energies of the region (eV) and forces by the model and by GFN2-xTB on `n` frames of a run; kept in a file."""
    chosen = np.unique(np.linspace(0, len(record.positions) - 1, min(n, len(record.positions))).round().astype(int))
    times = record.table["time_ps"][chosen]
    if path.exists():
        kept = read_arrays(path, AUDIT_FORM, "energies of the frames of a run")[1]
        if np.array_equal(kept["times"], times):
            return {**kept, "frames": chosen}
    evaluator = load_potential(model).evaluator(it.structure, compile=True)
    driver = TBLite().driver(it.structure)
    rows: dict[str, list[Any]] = {name: [] for name in ("model", "teacher", "model_forces", "teacher_forces")}
    for frame in record.positions[chosen][:, it.region].astype(float):
        energies, forces = evaluator.arrays(frame)
        energy, true = driver(frame)
        for name, value in zip(rows, (float(energies[0]), energy, np.array(forces), true), strict=True):
            rows[name].append(value)
    arrays = {name: np.array(values) for name, values in rows.items()} | {"times": times}
    write_arrays(path, AUDIT_FORM, arrays)
    return {**arrays, "frames": chosen}


def work_of(found: dict[str, np.ndarray]) -> np.ndarray:
    """(E_GFN2 - E_model) / kT of each frame, without the mean."""
    difference = found["teacher"] - found["model"]
    return np.asarray((difference - difference.mean()) / (BOLTZMANN_EV * TEMPERATURE))


def agreement(it: Subject, record: Record, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Errors against GFN2-xTB along the run, and what reweighting to it could rest on.

    `energy_error_by_protons`: eV, by where the protons are: what the model prefers one of them by, beside GFN2-xTB.
    """
    apart = found["model_forces"] - found["teacher_forces"]
    difference = found["model"] - found["teacher"]
    n = len(difference)
    frames = record.positions[found["frames"]][:, it.region].astype(float)
    states = np.array([protonation(it.built, frame).state for frame in frames])
    by_state = {
        state: {"frames": int((states == state).sum()), **number(mean_with_error(difference[states == state]))}
        for state in sorted(set(states.tolist()))
        if (states == state).sum() > 20
    }
    return {
        "frames": n,
        "energy_error_by_protons": by_state,
        "force_mae_eV_A": round(float(np.abs(apart).mean()), 4),
        "mean_absolute_force_eV_A": round(float(np.abs(found["teacher_forces"]).mean()), 4),
        "energy_mean_error_meV_per_atom": round(1e3 * float(difference.mean()) / len(it.region), 3),
        "energy_scatter_eV": round(float(difference.std()), 4),
        "energy_scatter_kT": round(float(work_of(found).std()), 2),
        "effective_share_of_frames": round(effective_samples(work_of(found)) / n, 4),
    }


def sureness(record: Record, model: Path) -> dict[str, Any]:
    """The uncertainty along a run, and whether the guard would have ended it."""
    spread, limit = record.table["force_uncertainty_eV_A"], force_limit(model)
    if not np.isfinite(spread).all():
        return {"limit_eV_A": limit, "largest_eV_A": None}
    return {
        "limit_eV_A": None if limit is None else round(limit, 4),
        "mean_eV_A": round(float(spread.mean()), 4),
        "largest_in_a_frame_eV_A": round(float(spread.max()), 4),
        "energy_mean_eV": round(float(record.table["energy_uncertainty_eV"].mean()), 4),
        "events_beyond_limit": None if limit is None else len(record.events),
        "guard_would_have_stopped_at_ps": round(record.events[0][0], 4) if record.events else None,
    }
