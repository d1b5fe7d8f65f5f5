"""sgdml's own predictions for its models, stored as ``*_ref.npz``, against the torch form, the fused kernel and OpenMM.

Every model in the folder of shared data is compared at every stored geometry: largest differences of energies in
kcal/mol and of force components in kcal/mol/angstrom. Both must stay below 1e-5 everywhere, or the script fails.
Through OpenMM a periodic model is run in the reduced box that OpenMM wants: box, atoms and forces are rotated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from _common import SHARED, machine, write
from openmm import app, unit
from openmmml import MLPotential
from rich.console import Console
from rich.table import Table

from openmm_gdml.model import GDMLPotential
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

FOLDER = SHARED / "data" / "gdml"
LIMIT = 1e-5


def reduced_box(lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the reduced box in OpenMM's form ``(3, 3)``, and the rotation Q with ``r_openmm = r @ Q``."""
    q, triangular = np.linalg.qr(lattice.T)
    rotation = q * np.sign(np.diag(triangular))
    rows = np.tril(lattice @ rotation)
    vectors = app.internal.unitcell.reducePeriodicBoxVectors([openmm.Vec3(*row) for row in rows] * unit.angstrom)
    return np.array(vectors.value_in_unit(unit.angstrom)), rotation


def make_system(
    path: Path, numbers: np.ndarray, box: np.ndarray | None, **options: Any
) -> tuple[openmm.System, app.Topology]:
    """A System of the model's atoms alone."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in numbers.tolist():
        topology.addAtom("A", app.Element.getByAtomicNumber(z), residue)
    if box is not None:
        topology.setPeriodicBoxVectors([openmm.Vec3(*row) for row in box] * unit.angstrom)
    return MLPotential("sgdml", modelPath=str(path)).createSystem(topology, **options), topology


def differences(energy: np.ndarray, forces: np.ndarray, reference: Any) -> dict[str, float]:
    """Largest differences, kcal/mol and kcal/mol/angstrom."""
    return {
        "energy": float(np.abs(energy - reference["E_pred"]).max()),
        "forces": float(np.abs(forces - reference["F_pred"]).max()),
    }


def evaluated(model: GDMLPotential, reference: Any, compile: bool) -> dict[str, float]:
    """All stored geometries in one call."""
    cell = model.lattice_rows if model.config.periodic else None
    structures = [Structure(reference["z"], r, cell=cell) for r in reference["R"]]
    run = model.evaluator(structures, compile=compile)
    result = run(reference["R"].reshape(-1, 3), cell)
    if run.compiled is not compile:
        raise SystemExit("the fused kernel could not be used: is there a C++ compiler?")
    assert result.forces is not None
    forces = result.forces.numpy().reshape(reference["R"].shape)
    return differences(result.energy.numpy() / EV_PER_KCAL_PER_MOL, forces / EV_PER_KCAL_PER_MOL, reference)


def through_openmm(path: Path, model: GDMLPotential, reference: Any) -> dict[str, float]:
    """All stored geometries, one after another, on the Reference platform."""
    box, rotation = reduced_box(model.lattice_rows) if model.config.periodic else (None, np.eye(3))
    system, _ = make_system(path, reference["z"], box)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    if box is not None:
        context.setPeriodicBoxVectors(*([openmm.Vec3(*row) for row in box] * unit.angstrom))
    energies, forces = [], []
    for positions in reference["R"]:
        context.setPositions((positions @ rotation) * unit.angstrom)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilocalorie_per_mole))
        found = state.getForces(asNumpy=True).value_in_unit(unit.kilocalorie_per_mole / unit.angstrom)
        forces.append(np.asarray(found) @ rotation.T)
    return differences(np.array(energies), np.array(forces), reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where NAME_model.npz and NAME_ref.npz lie")
    folder = parser.parse_args().folder
    paths = sorted(folder.glob("*_model.npz"))
    if not paths:
        raise SystemExit(f"no *_model.npz in {folder}; OPENMM_MLFF_SHARED names the folder of shared data")
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "limit": LIMIT, "models": {}}
    table = Table("model", "atoms", "points", "permutations", "torch dE, dF", "fused dE, dF", "OpenMM dE, dF")
    worst = 0.0
    for path in paths:
        model = load_potential(path)
        assert isinstance(model, GDMLPotential)
        with np.load(path.with_name(path.name.replace("_model", "_ref")), allow_pickle=False) as file:
            reference = dict(file)
        rows = {
            "torch": evaluated(model, reference, compile=False),
            "fused": evaluated(model, reference, compile=True),
            "openmm": through_openmm(path, model, reference),
        }
        worst = max([worst, *(value for row in rows.values() for value in row.values())])
        name, c = path.name.removesuffix("_model.npz"), model.config
        result["models"][name] = {"atoms": len(c.numbers), "points": c.n_train, "permutations": c.n_permutations} | rows
        cells = [f"{row['energy']:.1e}, {row['forces']:.1e}" for row in rows.values()]
        table.add_row(name, str(len(c.numbers)), str(c.n_train), str(c.n_permutations), *cells)
    result["worst"] = worst
    Console(width=150).print(table)
    write("gdml_reference", result)
    if not worst <= LIMIT:
        raise SystemExit(f"the largest difference is {worst:.1e}, allowed {LIMIT:.0e}")


if __name__ == "__main__":
    main()
