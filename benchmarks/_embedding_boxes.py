"""Capped alanine in boxes of TIP3P water: the 2,269 atoms of openmm-ml's test data, or as many as asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
from _common import HERE, SHARED
from openmm import app, unit
from openmmml import MLPotential

ML_ATOMS = list(range(22))
FIELD = ("amber14-all.xml", "amber14/tip3p.xml")
EXPLICIT = SHARED / "data" / "alanine-dipeptide-explicit.pdb"
SO3LR = SHARED / "models" / "so3lr_params.npz"


def box(side: float | None = None) -> tuple[app.Topology, np.ndarray]:
    """Topology and positions (nm); a cube with this side in nm, or the file."""
    if side is None:
        if not EXPLICIT.exists():
            raise SystemExit(f"no {EXPLICIT.name} in the shared data; OPENMM_MLFF_SHARED names the folder")
        pdb = app.PDBFile(str(EXPLICIT))
        return pdb.topology, np.array(pdb.positions.value_in_unit(unit.nanometer))
    solute = app.PDBFile(str(Path(HERE).parent / "examples" / "recipes" / "capped_alanine.pdb"))
    modeller = app.Modeller(solute.topology, solute.positions)
    size = openmm.Vec3(side, side, side) * unit.nanometer
    modeller.addSolvent(app.ForceField(*FIELD), model="tip3p", boxSize=size, neutralize=False)
    return modeller.topology, np.array(modeller.positions.value_in_unit(unit.nanometer))


def force_field(topology: app.Topology, cutoff: float = 0.9) -> openmm.System:
    """amber14 with PME, rigid water and bonds to hydrogen; Lennard-Jones switched off smoothly."""
    return app.ForceField(*FIELD).createSystem(
        topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=cutoff * unit.nanometer,
        switchDistance=(cutoff - 0.1) * unit.nanometer,
        constraints=app.HBonds,
        removeCMMotion=False,
    )


def potentials(names: list[str]) -> dict[str, MLPotential]:
    """By name: bundled models, and so3lr from its published weights."""
    found = {}
    for name in names:
        if name == "so3lr":
            if not SO3LR.exists():
                raise SystemExit(f"no {SO3LR.name} in the shared data; OPENMM_MLFF_SHARED names the folder")
            found[name] = MLPotential("so3krates", modelPath=str(SO3LR))
        else:
            found[name] = MLPotential(name)
    return found
