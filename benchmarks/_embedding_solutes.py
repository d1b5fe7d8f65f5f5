"""Solutes with force-field parameters, and clusters of each with its nearest waters from molecular dynamics.

Capped amino acids and chain ends with amber14 (ff14SB) charges and Lennard-Jones parameters, in TIP3P water.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

from openmm_mlff.data.files import read_arrays, write_arrays

FORM = "openmm-mlff embedding clusters 1"
FIELD = ("amber14-all.xml", "amber14/tip3p.xml")
CPU = openmm.Platform.getPlatform("CPU")
#: waters of a droplet, and of a cluster
DROPLET, NEAREST = 90, 8
#: snapshots of each solute, and steps of 2 fs before the first and between them
SNAPSHOTS, EQUILIBRATION, INTERVAL = 3, 5000, 5000


@dataclass(frozen=True)
class Solute:
    """A residue (with its protonation) between an acetyl or an ammonium end and a methylamide or a carboxylate end."""

    residue: str
    start: str = "ACE"
    end: str = "NME"

    @property
    def name(self) -> str:
        return f"{self.start or 'NH3+'}-{self.residue}-{self.end or 'COO-'}"

    @property
    def charge(self) -> int:
        own = {"ASP": -1, "GLU": -1, "LYS": 1, "ARG": 1, "HIP": 1}.get(self.residue, 0)
        return own + (not self.start) - (not self.end)


#: what is fitted is fitted on these ...
TRAINING = (
    *(Solute(r) for r in ("ALA", "SER", "CYS", "TYR", "GLN", "PRO", "ILE")),
    *(Solute(r) for r in ("ASP", "LYS")),
    *(Solute("ALA", start=""), Solute("VAL", start=""), Solute("ALA", end=""), Solute("GLN", end="")),
)
#: ... and judged on these: no residue is in both with the same ends
TEST = (
    *(Solute(r) for r in ("GLY", "VAL", "LEU", "THR", "ASN", "MET", "PHE", "TRP", "HIE", "ASH", "GLH")),
    *(Solute(r) for r in ("GLU", "ARG", "HIP")),
    *(Solute(r, start="") for r in ("GLY", "SER", "PHE", "MET")),
    *(Solute(r, end="") for r in ("GLY", "SER", "PHE", "ASN")),
)


def build(solute: Solute) -> app.Modeller:
    """Atoms and bonds of a solute, made from capped alanine by mutation."""
    from pdbfixer import PDBFixer

    template = Path(__file__).parent.parent / "examples" / "recipes" / "capped_alanine.pdb"
    parent = {"HIE": "HIS", "HIP": "HIS", "ASH": "ASP", "GLH": "GLU"}.get(solute.residue, solute.residue)
    modeller = app.Modeller(*_read(template))
    modeller.delete([a for a in modeller.topology.atoms() if a.element == app.element.hydrogen])
    dropped = [r for r in modeller.topology.residues() if r.name in ("ACE", "NME") and r.name not in _ends(solute)]
    modeller.delete(dropped)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heavy.pdb"
        with path.open("w", encoding="utf-8") as file:
            app.PDBFile.writeFile(modeller.topology, modeller.positions, file)
        fixer = PDBFixer(filename=str(path), platform=CPU)
    if parent != "ALA":
        middle = next(r for r in fixer.topology.residues() if r.name == "ALA")
        fixer.applyMutations([f"ALA-{middle.id}-{parent}"], middle.chain.id)
    fixer.findMissingResidues()
    fixer.missingResidues = {}
    fixer.findMissingAtoms()
    if solute.end:
        fixer.missingTerminals = {}
    fixer.addMissingAtoms(seed=1)
    modeller = app.Modeller(fixer.topology, fixer.positions)
    variants = [
        solute.residue if r.name == parent and solute.residue != parent else None for r in modeller.topology.residues()
    ]
    modeller.addHydrogens(app.ForceField(*FIELD), pH=7.0, variants=variants, platform=CPU)
    return modeller


def _ends(solute: Solute) -> tuple[str, str]:
    return solute.start, solute.end


def _read(path: Path) -> tuple[app.Topology, unit.Quantity]:
    pdb = app.PDBFile(str(path))
    return pdb.topology, pdb.positions


def droplet(solute: Solute) -> tuple[app.Modeller, openmm.System, int]:
    """The solute with the waters nearest to it, held together, and how many atoms the solute has."""
    field = app.ForceField(*FIELD)
    modeller = build(solute)
    n = modeller.topology.getNumAtoms()
    modeller.addSolvent(field, model="tip3p", padding=0.8 * unit.nanometer, neutralize=False)
    positions = np.array(modeller.positions.value_in_unit(unit.nanometer))
    box = np.array(modeller.topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer))
    waters = [r for r in modeller.topology.residues() if r.name == "HOH"]
    oxygens = np.array([next(iter(r.atoms())).index for r in waters])
    d = positions[oxygens, None] - positions[None, :n]
    distance = np.linalg.norm(d - np.rint(d / np.diag(box)) * np.diag(box), axis=-1).min(1)
    modeller.delete([waters[k] for k in np.argsort(distance)[DROPLET:]])
    modeller.topology.setPeriodicBoxVectors(None)
    system = field.createSystem(modeller.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds)
    wall = openmm.CustomCentroidBondForce(2, "500*max(0, distance(g1, g2) - 1.15)^2")
    wall.addGroup(list(range(n)))
    for k, residue in enumerate(r for r in modeller.topology.residues() if r.name == "HOH"):
        wall.addGroup([a.index for a in residue.atoms()])
        wall.addBond([0, k + 1])
    system.addForce(wall)
    return modeller, system, n


def snapshots(solute: Solute, folder: Path) -> dict[str, np.ndarray]:
    """Clusters of a solute, made once: numbers ``(n,)``, positions ``(SNAPSHOTS, n, 3)`` in angstrom, n_solute."""
    path = folder / f"{solute.name}.safetensors"
    if path.exists():
        return read_arrays(path, FORM, "clusters")[1]
    modeller, system, n = droplet(solute)
    integrator = openmm.LangevinMiddleIntegrator(300, 2, 0.002)
    integrator.setRandomNumberSeed(11)
    options = {"Threads": "1"}
    context = openmm.Context(system, integrator, CPU, options)
    context.setPositions(modeller.positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=300)
    context.setVelocitiesToTemperature(300, 11)
    integrator.step(EQUILIBRATION)
    frames = []
    for k in range(SNAPSHOTS):
        if k:
            integrator.step(INTERVAL)
        x = context.getState(positions=True).getPositions(asNumpy=True)._value
        waters = np.arange(n, len(x)).reshape(-1, 3)
        distance = np.linalg.norm(x[waters][:, :, None] - x[None, None, :n], axis=-1).min((1, 2))
        chosen = waters[np.argsort(distance)[:NEAREST]].ravel()
        frames.append(10.0 * np.concatenate([x[:n], x[chosen]]))
    numbers = [a.element.atomic_number for a in modeller.topology.atoms()][: n + 3 * NEAREST]
    arrays = {"numbers": np.array(numbers), "positions": np.array(frames), "n_solute": np.array([n])}
    write_arrays(path, FORM, arrays)
    return arrays


def cluster_system(solute: Solute) -> tuple[app.Topology, openmm.System]:
    """Topology and force field of a solute with its nearest waters, open, nothing constrained."""
    field = app.ForceField(*FIELD)
    modeller = build(solute)
    n = modeller.topology.getNumAtoms()
    modeller.addSolvent(field, model="tip3p", numAdded=40, neutralize=False)
    waters = [r for r in modeller.topology.residues() if r.name == "HOH"]
    modeller.delete(waters[NEAREST:])
    modeller.topology.setPeriodicBoxVectors(None)
    assert modeller.topology.getNumAtoms() == n + 3 * NEAREST
    return modeller.topology, field.createSystem(modeller.topology, nonbondedMethod=app.NoCutoff, rigidWater=False)
