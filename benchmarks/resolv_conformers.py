"""What the water potential does to conformers: populations of three molecules in vacuum and in water.

    python benchmarks/resolv_conformers.py [--pair models/resolv-freesolv.safetensors] [--cases NAME ...]

Cases that are left out keep what the results hold of them for a pair of the same weights.

* 1,2-dichloroethane (a test molecule of the ReSolv split): the trans form has no dipole, and polar solvents favour the
  gauche form (K. B. Wiberg, T. A. Keith, M. J. Frisch, M. Murcko, J. Phys. Chem. 99, 9072 (1995)).
* 1,2-dimethoxyethane (of the training split): water favours gauche about the central bond (N. Goutev, K. Ohno,
  H. Matsuura, J. Phys. Chem. A 104, 9226 (2000)).
* Alanine dipeptide (not in FreeSolv): in vacuum the seven-membered ring C7 with its hydrogen bond; in water the ring
  opens to PII and alpha R (2 ns of our own in explicit TIP3P water, amber14, are beside it where they exist).

64 replicas in one System, half of them from each of two conformers, Langevin dynamics at 298.15 K and 1 fs. A bias
k (1 + cos 3 phi) with k < 0 takes most of the barrier about central bonds away, and frames are reweighted for it.
Errors: standard error over the replicas, by the ratio of weighted means (jackknife).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from _common import HERE, machine, write
from _resolv import FOLDER, TEMPERATURE
from openmm import app
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.data.molecules import embed_smiles
from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.replica_files import read_observables
from openmm_mlff.sampling.replica_runs import ReplicaRun
from openmm_mlff.sampling.replica_settings import ReplicaSettings
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL, NM_PER_ANGSTROM

REPLICAS, TIMESTEP, REPORT = 64, 1.0, 100
KT = BOLTZMANN_KJ_PER_MOL * TEMPERATURE


@dataclass(frozen=True)
class Case:
    """A molecule, its torsions (SMARTS), the bias on the first of them (kJ/mol), and ps of each replica."""

    smiles: str
    torsions: dict[str, str]
    bias: float
    ps: float = 100.0


CASES = {
    "1,2-dichloroethane": Case("ClCCCl", {"ClCCCl": "[Cl:1][C:2][C:3][Cl:4]"}, -8.0, ps=1600.0),
    "1,2-dimethoxyethane": Case("COCCOC", {"OCCO": "[O:1][C:2][C:3][O:4]"}, -6.0),
    "alanine dipeptide": Case(
        "CC(=O)N[C@@H](C)C(=O)NC", {"phi": "[CX3:1](=O)[N:2][CX4:3][CX3:4]", "psi": "[N:1][CX4:2][CX3:3](=O)[N:4]"}, 0.0
    ),
}


def torsions(case: Case) -> dict[str, tuple[int, int, int, int]]:
    """Atom indices of every torsion, in the order of the numbers in its pattern."""
    from rdkit import Chem

    molecule = Chem.AddHs(Chem.MolFromSmiles(case.smiles))
    found = {}
    for name, pattern in case.torsions.items():
        query = Chem.MolFromSmarts(pattern)
        numbered = zip(query.GetAtoms(), molecule.GetSubstructMatches(query)[0], strict=True)
        by_number = {atom.GetAtomMapNum(): index for atom, index in numbered}
        found[name] = (by_number[1], by_number[2], by_number[3], by_number[4])
    return found


def topology_of(case: Case, structure: Structure) -> app.Topology:
    """One residue with the bonds of the SMILES."""
    from rdkit import Chem

    molecule = Chem.AddHs(Chem.MolFromSmiles(case.smiles))
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [
        topology.addAtom(f"{SYMBOLS[z]}{k}", app.Element.getByAtomicNumber(int(z)), residue)
        for k, z in enumerate(structure.numbers)
    ]
    for bond in molecule.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    return topology


def starts(case: Case, atoms: tuple[int, int, int, int]) -> list[Structure]:
    """Two conformers, as different in the first torsion as there are."""
    conformers = embed_smiles(case.smiles, 20, seed=7)
    angles = np.array([dihedral_of(s, atoms) for s in conformers])
    first = int(np.abs(angles).argmax())
    apart = np.abs((angles - angles[first] + np.pi) % (2 * np.pi) - np.pi)
    return [conformers[first], conformers[int(apart.argmax())]]


def dihedral_of(structure: Structure, atoms: tuple[int, int, int, int]) -> float:
    a, b, c, d = structure.positions[list(atoms)]
    u, v, w = b - a, c - b, d - c
    return float(np.arctan2(np.linalg.norm(v) * (u @ np.cross(v, w)), np.cross(u, v) @ np.cross(v, w)))


def weights_of(pair: Path, phase: str) -> str:
    """Checksum of the numbers of the potential of a phase, because the file of a pair holds a card that changes."""
    tensors = getattr(load_potential(pair), phase).state_dict().values()
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in tensors)).hexdigest()[:8]


def run(name: str, phase: str, pair: Path, ps: float) -> Path:
    """The replicas of one molecule in one phase, or what is missing of them; a folder for every pair of potentials."""
    case, folder = CASES[name], FOLDER / "conformers" / f"{name.replace(' ', '_')}_{phase}_{weights_of(pair, phase)}"
    indices = torsions(case)
    first = next(iter(indices.values()))
    steps = round(1e3 * ps / TIMESTEP)
    if (folder / "run.json").exists():
        ReplicaRun.resume(folder, steps=steps, progress=False).run()
        return folder
    ends = starts(case, first)
    topology = topology_of(case, ends[0])
    system = MLPotential("resolv", modelPath=str(pair)).createSystem(topology, phase=phase, compile=True)
    if case.bias:
        force = openmm.PeriodicTorsionForce()
        force.addTorsion(*first, 3, 0.0, case.bias)
        system.addForce(force)
    positions = np.stack([ends[k % 2].positions for k in range(REPLICAS)]) * NM_PER_ANGSTROM
    settings = ReplicaSettings(
        n=REPLICAS,
        steps=steps,
        timestep=TIMESTEP,
        temperature=TEMPERATURE,
        minimization_steps=200,
        equilibration_steps=5000,
        report_interval=REPORT,
        frame_interval=0,
        seed=11 if phase == "vacuum" else 12,
        torsions=indices,
    )
    ReplicaRun.start(system, topology, positions, settings, folder, progress=False).run()
    return folder


def states(name: str, angles: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Indicator of every state ``(frames, replicas)``; angles in degrees."""
    if name != "alanine dipeptide":
        (torsion,) = angles.values()
        return {"gauche": np.abs(torsion) < 120.0}
    phi, psi = angles["phi"], angles["psi"]
    left = (phi < 0) & (phi > -180)
    return {
        "C7 (ring)": left & (phi > -110) & (psi > 20) & (psi < 110),
        "PII, C5": left & ((psi > 110) | (psi < -120)),
        "alpha R": left & (psi > -120) & (psi <= 20),
    }


def populations(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """Share of every state with its standard error, reweighted for the bias; the first tenth is left out."""
    case = CASES[name]
    table = read_observables(folder)
    angles = {key: table[key] for key in case.torsions}
    skip = len(next(iter(angles.values()))) // 10
    angles = {key: values[skip:] for key, values in angles.items()}
    first = np.radians(next(iter(angles.values())))
    weights = np.exp(case.bias * (1.0 + np.cos(3.0 * first)) / KT)
    rows = {}
    for state, member in states(name, angles).items():
        top, bottom = (weights * member).sum(axis=0), weights.sum(axis=0)
        whole = top.sum() / bottom.sum()
        left_out = (top.sum() - top) / (bottom.sum() - bottom)
        n = len(top)
        error = np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
        half = [top[k::2].sum() / bottom[k::2].sum() for k in range(2)]
        rows[state] = {"share": float(whole), "error": float(error), "by_start": [float(x) for x in half]}
    return rows


def explicit_water() -> dict[str, float] | None:
    """Alanine dipeptide in TIP3P (ff99SB-ILDN), from the runs of `led_data.py`, where they are: shares of frames."""
    from _led_systems import FOLDER as LED
    from _led_systems import SPLITS, load, phi_psi, topology_of

    if not (LED / "explicit" / "frames").exists():
        return None
    topology = topology_of("explicit")
    angles = [phi_psi(topology, r.positions) for split in SPLITS for r in load("explicit", split)]
    phi, psi = (np.concatenate([a[:, k] for a in angles]) for k in (0, 1))
    return {state: float(m.mean()) for state, m in states("alanine dipeptide", {"phi": phi, "psi": psi}).items()}


def earlier(weights: dict[str, str]) -> dict[str, Any]:
    """The results there are, if they are of a pair of these weights."""
    path = HERE / "resolv_conformers.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if found.get("settings", {}).get("weights") == weights else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=HERE.parent / "models" / "resolv-freesolv.safetensors")
    parser.add_argument("--ps", type=float, help="of each replica; longer than what there is, or left out")
    parser.add_argument("--only", choices=("vacuum", "water"), help="simulate this phase and report nothing")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    if args.only:
        for name in args.cases:
            print(name, run(name, args.only, args.pair, args.ps or CASES[name].ps), flush=True)
        return
    table = Table("molecule", "state", "vacuum", "water", title="Populations by the pair")
    weights = {phase: weights_of(args.pair, phase) for phase in ("vacuum", "water")}
    known = earlier(weights)
    results: dict[str, Any] = known.get("populations", {})
    for name in args.cases:
        ps = args.ps or CASES[name].ps
        rows = {phase: populations(name, run(name, phase, args.pair, ps)) for phase in ("vacuum", "water")}
        results[name] = {"ps": ps, **rows}
        for state in rows["vacuum"]:
            shares = [f"{rows[p][state]['share']:.3f} +- {rows[p][state]['error']:.3f}" for p in ("vacuum", "water")]
            table.add_row(name, state, *shares)
    Console().print(table)
    settings = {"replicas": REPLICAS, "temperature_K": TEMPERATURE, "pair": args.pair.name, "weights": weights}
    explicit = known.get("alanine_dipeptide_TIP3P")
    if "alanine dipeptide" in args.cases:
        explicit = explicit_water() or explicit
    print("alanine dipeptide in TIP3P:", explicit)
    ordered = {name: results[name] for name in CASES if name in results}
    content = {"machine": machine(), "settings": settings, "populations": ordered, "alanine_dipeptide_TIP3P": explicit}
    write("resolv_conformers", content)


if __name__ == "__main__":
    main()
