"""The molecules of the LED benchmarks as OpenMM Systems, and the trajectories that `led_data.py` made of them.

nm, ps, kJ/mol, K, amu; torsions in degrees. All Systems have rigid bonds to hydrogen and hydrogens of 3 amu, for steps
of 4 fs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from _common import HERE, SHARED
from openmm import app, unit

from openmm_mlff.analysis.observables import backbone_torsions, dihedral
from openmm_mlff.data.files import read_arrays, write_arrays
from openmm_mlff.sampling.implicit_solvent import use_native_obc2

FOLDER = HERE.parent / ".work" / "led_data"
FORMAT = "openmm-mlff-led-frames-1"
SPLITS = ("train", "valid", "test")
HYDROGEN_MASS = 3.0
#: nm, edge of the cube that `explicit_alanine` fills with water, and the one it is brought to (`equilibrated_edge`)
FILLED_EDGE = 2.0
EDGE = 1.932

Prepared = tuple[openmm.System, app.Topology, np.ndarray]


def _structure(name: str) -> app.PDBFile:
    found = [path for path in (SHARED / "data" / name, SHARED / name) if path.exists()]
    if not found:
        raise SystemExit(f"no {name} in the folder of shared data; OPENMM_MLFF_SHARED names that folder")
    return app.PDBFile(str(found[0]))


def _nanometres(positions: Any) -> np.ndarray:
    return np.array(positions.value_in_unit(unit.nanometer), dtype=np.float64)


def _implicit(name: str, *files: str) -> Prepared:
    pdb = _structure(name)
    system = app.ForceField(*files, "implicit/obc2.xml").createSystem(
        pdb.topology,
        nonbondedMethod=app.NoCutoff,
        constraints=app.HBonds,
        hydrogenMass=HYDROGEN_MASS * unit.amu,
        removeCMMotion=False,
    )
    use_native_obc2(system)
    return system, pdb.topology, _nanometres(pdb.positions)


def alanine(implicit: bool = True) -> Prepared:
    """Capped alanine, ff99SB-ILDN with OBC2 by OpenMM's native force, or in TIP3P (`explicit_alanine`).

    Returns:
        System, topology, positions ``(n_atoms, 3)`` nm.
    """
    return _implicit("alanine-dipeptide-implicit.pdb", "amber99sbildn.xml") if implicit else explicit_alanine()


def trp_cage() -> Prepared:
    """Trp-cage TC5b (PDB entry 1L2Y, model 1, 304 atoms), ff14SB with OBC2 by OpenMM's native force."""
    return _implicit("1l2y.pdb", "amber14-all.xml")


def explicit_alanine(edge: float = EDGE) -> Prepared:
    """Capped alanine (the atoms of `alanine` in the same order), then water: ff99SB-ILDN in TIP3P, PME, 0.9 nm cutoff.

    Args:
        edge: of the cubic box, nm; a water box of 2 nm is brought to it molecule by molecule.
    """
    pdb = _structure("alanine-dipeptide-implicit.pdb")
    field = app.ForceField("amber99sbildn.xml", "tip3p.xml")
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.addSolvent(field, model="tip3p", boxSize=openmm.Vec3(*3 * [FILLED_EDGE]) * unit.nanometer)
    topology = modeller.topology
    positions = _nanometres(modeller.positions)
    waters = [[atom.index for atom in r.atoms()] for r in topology.residues() if r.name == "HOH"]
    for molecule in (solute_atoms(topology).tolist(), *waters):
        positions[molecule] += (edge / FILLED_EDGE - 1.0) * positions[molecule].mean(axis=0)
    topology.setPeriodicBoxVectors(np.eye(3) * edge * unit.nanometer)
    system = field.createSystem(
        topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=0.9 * unit.nanometer,
        constraints=app.HBonds,
        hydrogenMass=HYDROGEN_MASS * unit.amu,
        removeCMMotion=False,
    )
    return system, topology, positions


def solute_atoms(topology: app.Topology) -> np.ndarray:
    """Indices of all atoms that are not water."""
    return np.array([atom.index for atom in topology.atoms() if atom.residue.name != "HOH"])


def equilibrated_edge(picoseconds: float = 200.0, seed: int = 1) -> float:
    """Mean edge (nm) of the box of `explicit_alanine` at 300 K and 1 bar, over the second half of a run."""
    system, _, positions = explicit_alanine(FILLED_EDGE)
    barostat = openmm.MonteCarloBarostat(1.0 * unit.bar, 300.0 * unit.kelvin, 25)
    barostat.setRandomNumberSeed(seed)
    system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.004)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("CPU"), {"Threads": "1"})
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(300.0, seed)
    volumes = []
    for _ in range(int(picoseconds)):
        integrator.step(250)
        volumes.append(context.getState().getPeriodicBoxVolume().value_in_unit(unit.nanometer**3))
    return float(np.mean(volumes[len(volumes) // 2 :]) ** (1 / 3))


def phi_psi(topology: app.Topology, positions: np.ndarray) -> np.ndarray:
    """phi and psi of a single residue, ``(..., 2)`` degrees, from positions ``(..., n_atoms, 3)``."""
    torsions = backbone_torsions(topology)
    return dihedral(positions, np.array([torsions["phi"], torsions["psi"]]))


@dataclass(frozen=True)
class Replica:
    """One trajectory.

    Attributes:
        positions: of the solute, ``(n_frames, n_atoms, 3)`` nm float32, its centroid at the origin.
        energies: potential energy of the whole System, ``(n_frames,)`` kJ/mol.
        info: replica, kind, split, seed, interval_ps, temperature, ...; ``segments`` holds what differs between them.
    """

    positions: np.ndarray
    energies: np.ndarray
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.positions)


def write_segment(path: Path, positions: np.ndarray, energies: np.ndarray, info: Mapping[str, Any]) -> None:
    """Write one file (safetensors) under a temporary name and move it."""
    arrays = {"positions": np.asarray(positions, np.float32), "energies": np.asarray(energies, np.float64)}
    write_arrays(path, FORMAT, arrays, {"info": dict(info)})


def read_segment(path: Path) -> Replica:
    """Read what `write_segment` wrote; raises `ValueError` for another kind of file."""
    header, arrays = read_arrays(path, FORMAT, "frames")
    return Replica(arrays["positions"], arrays["energies"], header["info"])


def topology_of(system: str, folder: Path = FOLDER) -> app.Topology:
    """The topology of the solute, as the frames have it."""
    path = folder / system / "solute.pdb"
    if not path.exists():
        raise SystemExit(f"no data of {system}; benchmarks/led_data.py --systems {system} makes them")
    return app.PDBFile(str(path)).topology


def load(
    system: str, split: str, *, kind: str | None = None, folder: Path = FOLDER, whole_rounds: bool = True
) -> list[Replica]:
    """Trajectories of one split, by name.

    Args:
        system: ``ala2``, ``trpcage`` or ``explicit``.
        kind: ``free`` (from equilibrium) or ``swarm`` (released at phi > 0, ala2 only); None for all.
        whole_rounds: leave out the segments that not all replicas have yet, so that all have the same length.

    Raises `ValueError` for an unknown split, `SystemExit` if there are no data.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    plan = folder / system / "configuration.json"
    if not plan.exists():
        raise SystemExit(f"no data of {system}; benchmarks/led_data.py --systems {system} makes them")
    settings = json.loads(plan.read_text(encoding="utf-8"))
    names = {name for names in settings["replicas"].values() for name in names}
    files: dict[str, list[Path]] = {name: [] for name in names}
    for path in sorted((folder / system / "frames").glob("*.safetensors")):
        files[path.stem.rsplit("-", 1)[0]].append(path)
    rounds = min(len(found) for found in files.values()) if whole_rounds and settings["grows"] else None
    wanted = sorted(n for n in names if n.split("-")[1] == split and kind in (None, n.split("-")[0]) and files[n])
    loaded = [_joined(files[name][:rounds]) for name in wanted if files[name][:rounds]]
    if not loaded:
        raise SystemExit(f"no {kind or ''} {split} trajectories of {system} yet; benchmarks/led_data.py makes them")
    return loaded


def _joined(paths: list[Path]) -> Replica:
    parts = [read_segment(path) for path in paths]
    varying = ("segment", "seed", "wall_s", "cpu_s", "platform")
    segments = [{key: part.info[key] for key in varying} for part in parts]
    info = {key: value for key, value in parts[0].info.items() if key not in varying}
    positions = np.concatenate([part.positions for part in parts])
    return Replica(positions, np.concatenate([part.energies for part in parts]), info | {"segments": segments})
