"""Agreement of SO3LR with the published program, with its PyTorch port and with another port's stored energies.

`stored`: the program's own numbers (JAX; float64 and float32) for 35 structures: energies, forces, charges, Hirshfeld
ratios; `difference` is ours minus theirs, the largest absolute value over a set of structures. `native` are the
compiled routines that MD runs; `through_openmm` repeats float64 through MLPotential on the Reference platform for the
closed shells. `unseen`: molecules made here by rdkit and displaced at random, against the PyPI package so3krates-torch
(``--port FOLDER`` if it was installed with ``pip install --target FOLDER``), whose "float64" keeps constants in single
precision; energies after its shift per atom, which the JAX program does not add. `openmm_jax`: energies from the tests
of openmm-jax (CUDA, single precision), which use a long-range cutoff of 12 angstrom.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from _common import SHARED, machine, so3lr_weights, write
from openmm import app, unit
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV
from openmm_so3krates import SO3krates

SEED = 20261121
SETS = ("closed shells, open", "closed shells, periodic", "spin branch")
#: SMILES and what is particular about them; total charges follow from the formal ones
UNSEEN = {
    "CC(=O)Oc1ccccc1C(=O)O": "aspirin",
    "Cn1cnc2c1c(=O)n(C)c(=O)n2C": "caffeine",
    "CSCC[C@@H](C(=O)NC)NC(C)=O": "capped methionine",
    "C[NH+](C)CCc1c[nH]c2ccccc12": "protonated dimethyltryptamine",
    "CC(=O)N[C@@H](CC(=O)[O-])C(=O)NC": "capped aspartate",
    "COP(=O)([O-])OC[C@H]1OC=C[C@H]1O": "a nucleotide's sugar and phosphate",
    "FC(F)(F)c1ccc(Cl)cc1S(N)(=O)=O": "a sulfonamide with F and Cl",
    "NC(=[NH2+])NCCC[C@H](N)C(=O)[O-]": "zwitterionic arginine",
    "C1CC2CCC1C2": "norbornane",
    "CP(C)(=O)C#N": "a phosphine oxide",
    "O=C1NC(=O)C=CN1": "uracil",
    "C#CC=C=CC=O": "unsaturated chain",
}
OPENMM_JAX = {"toluene.pdb": -2528.8225, "alanine-dipeptide-explicit.pdb": -399032.75}


def stored() -> list[tuple[dict[str, Any], dict[str, np.ndarray], Structure]]:
    """The structures of the shared data, and what the published program says of them."""
    folder = SHARED / "data" / "so3lr"
    about = json.loads((folder / "visible.json").read_text(encoding="utf-8"))["structures"]
    found = []
    with np.load(folder / "visible.npz", allow_pickle=False) as arrays:
        for a in about:
            prefix = a["name"] + "/"
            r = {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}
            cell = r["cell"] if a["pbc"] else None
            spin = int(a["num_unpaired_electrons"]) + 1
            found.append((a, r, Structure(r["numbers"], r["positions"], int(a["charge"]), spin, cell)))
    return found


def set_of(about: dict[str, Any]) -> str:
    if about["name"].startswith(("methyl_", "O2_")):
        return "spin branch"
    return "closed shells, periodic" if about["pbc"] else "closed shells, open"


def model_in(dtype: torch.dtype) -> SO3krates:
    """SO3LR with its spin branch open."""
    model = load_potential(so3lr_weights(), "so3krates").to(dtype)
    assert isinstance(model, SO3krates)
    model.multiplicities = None
    return model


def by_torch(model: SO3krates, s: Structure, r: dict[str, np.ndarray]) -> dict[str, float]:
    batch = model.batch(s)
    result = model.evaluate(batch)
    assert result.forces is not None and result.charges is not None
    with torch.no_grad():
        fixed = model.fixed(batch)
        ratios = model.hirshfeld_ratios(model.features(fixed, model.geometry(batch))[0], fixed)
    assert ratios is not None
    return {
        "energy": abs(float(result.energy[0]) - float(r["energy"])),
        "forces": largest(result.forces.numpy() - r["forces"]),
        "charges": largest(result.charges.numpy() - r["partial_charges"]),
        "hirshfeld_ratios": largest(ratios.numpy() - r["hirshfeld_ratios"]),
    }


def by_evaluator(model: SO3krates, s: Structure, r: dict[str, np.ndarray], compile: bool | str) -> dict[str, float]:
    result = model.evaluator(s, compile=compile)(s.positions, s.cell)
    assert result.forces is not None
    return {
        "energy": abs(float(result.energy[0]) - float(r["energy"])),
        "forces": largest(result.forces.numpy() - r["forces"]),
    }


def through_openmm(s: Structure, r: dict[str, np.ndarray], cutoff: float | None) -> dict[str, float]:
    energy, forces = in_openmm(topology_of(s), s.positions * unit.angstrom, s.charge, cutoff, "double")
    return {
        "energy": abs(energy / KJ_PER_MOL_PER_EV - float(r["energy"])),
        "forces": largest(forces / KJ_PER_MOL_NM_PER_EV_ANGSTROM - r["forces"]),
    }


def topology_of(s: Structure) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in s.numbers:
        topology.addAtom(SYMBOLS[z], app.Element.getByAtomicNumber(int(z)), residue)
    if s.cell is not None:
        topology.setPeriodicBoxVectors(s.cell * unit.angstrom)
    return topology


def in_openmm(
    topology: app.Topology, positions: Any, charge: int, cutoff: float | None, precision: str
) -> tuple[float, np.ndarray]:
    """Energy (kJ/mol) and forces (kJ/mol/nm) of a whole system."""
    system = MLPotential("so3lr", modelPath=str(so3lr_weights())).createSystem(
        topology,
        charge=charge,
        precision=precision,
        longRangeCutoff=None if cutoff is None else cutoff * unit.angstrom,
        removeCMMotion=False,
    )
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def compare_stored() -> dict[str, Any]:
    """Largest differences per way of running and set of structures."""
    double, single = model_in(torch.float64), model_in(torch.float32)
    found: dict[str, dict[str, Any]] = {}
    for about, r, s in stored():
        cutoff, name = about["lr_cutoff"], set_of(about)
        double.long_range_cutoff = single.long_range_cutoff = cutoff
        ways = {
            "float64": by_torch(double, s, r),
            "float64, native": by_evaluator(double, s, r, "auto"),
            "float32": by_evaluator(single, s, r, False),
            "float32, native": by_evaluator(single, s, r, "auto"),
        }
        if name != "spin branch":
            ways["float64, through OpenMM"] = through_openmm(s, r, cutoff)
        for way, differences in ways.items():
            worst = found.setdefault(way, {}).setdefault(name, {"structures": 0})
            worst["structures"] += 1
            for quantity, value in differences.items():
                if value >= worst.get(quantity, -1.0):
                    worst[quantity] = value
                    worst[f"worst_{quantity}"] = about["name"]
    return found


def unseen_structures() -> dict[str, Structure]:
    """Conformers from rdkit, atoms displaced by 0.05 angstrom."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    rng = np.random.default_rng(SEED)
    found = {}
    for smiles, name in UNSEEN.items():
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        if AllChem.EmbedMolecule(molecule, randomSeed=SEED % 2**31) != 0:
            raise RuntimeError(f"no geometry found for {smiles}")
        numbers = np.array([a.GetAtomicNum() for a in molecule.GetAtoms()])
        positions = np.array(molecule.GetConformer().GetPositions())
        positions = positions + rng.normal(0.0, 0.05, positions.shape)
        found[name] = Structure(numbers, positions, charge=Chem.GetFormalCharge(molecule))
    return found


def compare_unseen(port: str | None) -> dict[str, Any] | None:
    """Against so3krates-torch; None if it is not installed."""
    if port is not None:
        sys.path.append(port)
    try:
        from ase import Atoms
        from so3krates_torch.calculator.so3 import SO3LRCalculator
    except ImportError as error:
        print(f"so3krates-torch is left out ({error})")
        return None
    rows: dict[str, Any] = {}
    model = model_in(torch.float64)
    for cutoff in (1000.0, 12.0):
        model.long_range_cutoff = cutoff
        theirs = SO3LRCalculator(r_max_lr=cutoff, dispersion_energy_cutoff_lr_damping=2.0, default_dtype="float64")
        # added to every atom, in single precision
        shift = float(np.float32(-163.6181213551537))
        for name, s in unseen_structures().items():
            atoms = Atoms(s.numbers, s.positions, info={"charge": float(s.charge), "total_spin": 0.0})
            theirs.reset()
            atoms.calc = theirs
            energy = atoms.get_potential_energy() - shift * len(s)
            ours = model.energy_and_forces(s)
            rows[f"{name}, {cutoff:g} A"] = {
                "atoms": len(s),
                "charge": s.charge,
                "energy": ours[0],
                "energy_difference": abs(ours[0] - float(energy)),
                "force_difference": largest(ours[1] - atoms.get_forces()),
            }
    return {"so3krates_torch": version("so3krates-torch"), "molecules": rows}


def compare_openmm_jax() -> dict[str, Any]:
    rows = {}
    for file, expected in OPENMM_JAX.items():
        pdb = app.PDBFile(str(SHARED / "data" / file))
        energy, _ = in_openmm(pdb.topology, pdb.positions, 0, 12.0, "single")
        rows[file] = {"kJ/mol": energy, "openmm_jax": expected, "relative": abs(energy / expected - 1.0)}
    return rows


def show(result: dict[str, Any]) -> None:
    table = Table("SO3LR", "structures", "n", "energy (eV)", "forces (eV/A)", "charges (e)", "Hirshfeld")
    for way, sets in result["stored"].items():
        for name in SETS:
            if name in sets:
                worst = sets[name]
                numbers = (worst.get(q) for q in ("energy", "forces", "charges", "hirshfeld_ratios"))
                texts = ("" if x is None else f"{x:.1e}" for x in numbers)
                table.add_row(way, name, str(worst["structures"]), *texts)
    for name, row in (result["unseen"] or {"molecules": {}})["molecules"].items():
        differences = (f"{row['energy_difference']:.1e}", f"{row['force_difference']:.1e}")
        table.add_row("so3krates-torch", name, str(row["atoms"]), *differences, "", "")
    for name, row in result["openmm_jax"].items():
        table.add_row("openmm-jax", name, "", f"relative {row['relative']:.1e}", "", "", "")
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", metavar="FOLDER", help="where so3krates-torch was installed with pip --target")
    arguments = parser.parse_args()
    if arguments.port is not None and not Path(arguments.port).is_dir():
        raise SystemExit(f"--port: no folder at {arguments.port}")
    torch.set_num_threads(1)
    result = {
        "machine": machine(),
        "seed": SEED,
        "stored": compare_stored(),
        "openmm_jax": compare_openmm_jax(),
        "unseen": compare_unseen(arguments.port),
    }
    show(result)
    write("so3lr_reference", result)


if __name__ == "__main__":
    main()
