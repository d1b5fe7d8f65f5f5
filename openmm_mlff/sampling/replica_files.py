"""Runs of many replicas -> files: one table of observables and one trajectory for all, and what reads them.

``observables.npy`` holds ``(frames, observables, replicas)`` and is a valid file at every moment, so it can be looked
at while the run goes on; like the trajectory it can be cut back to any frame. ``trajectory.dcd`` holds all replicas as
one system; `split_trajectory` makes one file per replica of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.lib import format as npy
from openmm import app, unit

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.sampling.reporters import dcd_frames
from openmm_mlff.sampling.settings import write_json
from openmm_mlff.units import NM_PER_ANGSTROM

OBSERVABLES = "observables.npy"
TRAJECTORY = "trajectory.dcd"
MOLECULE = "molecule.json"
#: columns that every table begins with
ENERGIES = ("potential_kJ_mol", "kinetic_kJ_mol", "temperature_K")


class ObservableWriter:
    """Rows ``(observables, replicas)`` of float64 in a numpy file that grows.

    Args:
        keep: number of frames to go on from; None starts a new file.

    Raises `ValueError` if the file to go on from has another shape or fewer frames.
    """

    def __init__(self, path: str | Path, n_observables: int, n: int, keep: int | None = None) -> None:
        self._row = (n_observables, n)
        self._frames = 0
        if keep is not None:
            self._frames = keep
            _truncate(Path(path), self._row, keep)
        self._file = open(path, "w+b" if keep is None else "r+b")  # noqa: SIM115 (lives as long as the run)
        self._write_header()
        self._file.seek(0, os.SEEK_END)

    def write(self, values: np.ndarray) -> None:
        """Append one frame, ``(observables, replicas)``."""
        if values.shape != self._row:
            raise ValueError(f"values: expected shape {self._row}, got {values.shape}")
        self._file.write(np.ascontiguousarray(values, dtype="<f8").tobytes())
        self._frames += 1
        self._write_header()

    def sync(self) -> None:
        """Force everything to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        # numpy leaves room for the first axis to grow, so the header keeps its length
        self._file.seek(0)
        npy.write_array_header_1_0(
            self._file, {"descr": "<f8", "fortran_order": False, "shape": (self._frames, *self._row)}
        )
        self._file.seek(0, os.SEEK_END)


def _truncate(path: Path, row: tuple[int, int], frames: int) -> None:
    with open(path, "r+b") as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"{path}: expected a numpy file of version 1.0")
        shape, _, dtype = npy.read_array_header_1_0(file)
        if shape[1:] != row or dtype != np.dtype("<f8"):
            raise ValueError(
                f"{path}: expected frames of shape {row}, got {shape[1:]}; was it made with other settings?"
            )
        start = file.tell()
        size = 8 * row[0] * row[1]
        found = (file.seek(0, os.SEEK_END) - start) // size
        if found < frames:
            raise ValueError(f"{path}: expected at least {frames} frames, as the checkpoint says, got {found}")
        file.truncate(start + frames * size)


class GeometryTable:
    """Distances and torsions of all replicas.

    Args:
        distances: name -> two atoms. torsions: name -> four atoms.
    """

    def __init__(self, distances: Mapping[str, Sequence[int]], torsions: Mapping[str, Sequence[int]]) -> None:
        self.names = [*distances, *torsions]
        self._pairs = np.array(list(distances.values()), dtype=np.int64).reshape(-1, 2)
        self._quartets = np.array(list(torsions.values()), dtype=np.int64).reshape(-1, 4)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Positions ``(n, n_atoms, 3)`` nm -> ``(names, n)``, nm and degrees."""
        rows = []
        if len(self._pairs):
            bonds = positions[:, self._pairs[:, 1]] - positions[:, self._pairs[:, 0]]
            rows.append(np.linalg.norm(bonds, axis=-1).T)
        if len(self._quartets):
            rows.append(dihedral(positions, self._quartets).T)
        return np.concatenate(rows) if rows else np.empty((0, len(positions)))


def write_molecule(folder: str | Path, topology: app.Topology, positions: np.ndarray) -> None:
    """Write one copy as ``molecule.json`` and, to look at, ``molecule.pdb``; positions ``(n_atoms, 3)`` nm.

    A PDB file alone would not do: coarse-grained beads may have no element, or one name for all.
    """
    folder = Path(folder)
    box = topology.getPeriodicBoxVectors()
    atoms = [
        [a.name, a.element and a.element.symbol, a.residue.index, a.residue.name, a.residue.id, a.residue.chain.index]
        for a in topology.atoms()
    ]
    molecule = {
        "atoms": atoms,
        "bonds": [[bond.atom1.index, bond.atom2.index] for bond in topology.bonds()],
        "box_nm": None if box is None else [list(v) for v in box.value_in_unit(unit.nanometer)],
        "positions_nm": positions.tolist(),
    }
    write_json(folder / MOLECULE, molecule)
    with open(folder / "molecule.pdb", "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file, keepIds=True)


def read_molecule(folder: str | Path) -> tuple[app.Topology, np.ndarray]:
    """Topology and positions ``(n_atoms, 3)`` nm that `write_molecule` wrote."""
    stored = json.loads((Path(folder) / MOLECULE).read_text(encoding="utf-8"))
    topology = app.Topology()
    chains: dict[int, Any] = {}
    residues: dict[int, Any] = {}
    for name, symbol, residue, residue_name, residue_id, chain in stored["atoms"]:
        if chain not in chains:
            chains[chain] = topology.addChain()
        if residue not in residues:
            residues[residue] = topology.addResidue(residue_name, chains[chain], residue_id)
        topology.addAtom(name, symbol and app.Element.getBySymbol(symbol), residues[residue])
    atoms = list(topology.atoms())
    for i, j in stored["bonds"]:
        topology.addBond(atoms[i], atoms[j])
    if stored["box_nm"] is not None:
        topology.setPeriodicBoxVectors([openmm.Vec3(*v) for v in stored["box_nm"]] * unit.nanometer)
    return topology, np.array(stored["positions_nm"])


# -- reading ---------------------------------------------------------------------------------------------------------


def read_observables(folder: str | Path) -> dict[str, np.ndarray]:
    """The table of a run, finished or not: name -> ``(frames, replicas)``, and ``step`` and ``time_ps`` ``(frames,)``.

    Energies in kJ/mol, temperatures in K, distances in nm, torsions in degrees. Raises `FileNotFoundError` if the
    folder holds no run.
    """
    about = _about(folder)
    table = np.load(Path(folder) / OBSERVABLES, mmap_mode="r", allow_pickle=False)
    step = np.arange(len(table)) * about["settings"]["report_interval"]
    found = {name: np.array(table[:, k]) for k, name in enumerate(about["resolved"]["observables"])}
    return {"step": step, "time_ps": step * about["settings"]["timestep"] * 1e-3, **found}


def read_positions(folder: str | Path, stride: int = 1) -> np.ndarray:
    """The trajectory of a run, ``(frames, replicas, n_atoms, 3)`` nm in single precision."""
    about = _about(folder)
    n, size = about["settings"]["n"], about["resolved"]["particles"]
    angstrom = dcd_frames(Path(folder) / TRAJECTORY, n * size, about["resolved"]["periodic"])[::stride]
    return angstrom.reshape(len(angstrom), n, size, 3) * np.float32(NM_PER_ANGSTROM)


def split_trajectory(
    folder: str | Path, replicas: Sequence[int] | None = None, format: str = "dcd", output: str | Path | None = None
) -> list[Path]:
    """Write ``replica-0000.dcd`` and so on beside the trajectory of all, for programs that know single molecules.

    Args:
        replicas: which; None takes all. format: ``dcd`` or ``xtc``. output: another folder.

    Raises `ValueError` for another format or a replica that is not there.
    """
    import mdtraj

    if format not in ("dcd", "xtc"):
        raise ValueError(f"format: expected dcd or xtc, got {format!r}")
    folder = Path(folder)
    output = folder if output is None else Path(output)
    about = _about(folder)
    n = about["settings"]["n"]
    chosen = list(range(n)) if replicas is None else list(replicas)
    for k in chosen:
        if not 0 <= k < n:
            raise ValueError(f"replicas: expected numbers from 0 to {n - 1}, got {k}")
    positions = read_positions(folder)
    topology = mdtraj.Topology.from_openmm(read_molecule(folder)[0])
    time = np.arange(len(positions)) * about["settings"]["frame_interval"] * about["settings"]["timestep"] * 1e-3
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in chosen:
        paths.append(output / f"replica-{k:04d}.{format}")
        mdtraj.Trajectory(positions[:, k], topology, time=time).save(str(paths[-1]))
    return paths


def _about(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"folder: no run.json in {folder}")
    return json.loads(path.read_text(encoding="utf-8"))
