"""trajectory frames -> structures, through mdtraj."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.structures import Structure
from openmm_mlff.units import ANGSTROM_PER_NM


def iterate_trajectory(
    path: str | Path,
    topology: str | Path | None = None,
    *,
    atoms: str | Sequence[int] | None = None,
    charge: int = 0,
    multiplicity: int = 1,
    periodic: bool | None = None,
    stride: int = 1,
    chunk: int = 100,
) -> Iterator[Structure]:
    """Stream the frames of a trajectory (PDB, DCD, XTC, NetCDF, HDF5, ...; whatever mdtraj reads).

    Args:
        path: the trajectory. topology: a PDB or other file with the atoms; not needed if the trajectory has them.
        atoms: which to keep: indices, or a selection such as ``"resname ACE ALA NME"``.
        charge, multiplicity: of the atoms kept.
        periodic: whether the box becomes the structures' cell; None: yes if there is a box and all atoms are kept.
        stride: keep every so many frames. chunk: frames in memory at once.

    The group is the file's name without its ending; ``info`` holds the frame. Molecules are taken as they lie in the
    file. Raises `FileNotFoundError`, and `ValueError` for an atom without an element, an empty selection, atom
    indices out of range, a wished box that is not there, or a trajectory and a topology that do not belong together.
    """
    path = Path(path)
    for file in (path, *([Path(topology)] if topology is not None else [])):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    frame = 0
    for part in _chunks(path, topology, chunk, stride):
        indices = select_atoms(part.topology, atoms)
        numbers = _atomic_numbers(part.topology, indices)
        box = part.unitcell_vectors
        if periodic and box is None:
            raise ValueError(f"periodic: expected box vectors in {path}, found none")
        use_box = box is not None and (len(indices) == part.n_atoms if periodic is None else periodic)
        for k in range(part.n_frames):
            yield Structure(
                numbers,
                part.xyz[k, indices].astype(np.float64) * ANGSTROM_PER_NM,
                charge,
                multiplicity,
                cell=box[k].astype(np.float64) * ANGSTROM_PER_NM if use_box else None,
                group=path.stem,
                info={"frame": frame * stride},
            )
            frame += 1


def _chunks(path: Path, topology: str | Path | None, chunk: int, stride: int) -> Iterator[Any]:
    import mdtraj

    options: dict[str, Any] = {} if topology is None else {"top": str(topology)}
    try:
        yield from mdtraj.iterload(str(path), chunk=chunk, stride=stride, **options)
    except GeneratorExit:
        raise
    except Exception as error:  # mdtraj's readers raise many kinds
        raise ValueError(f"{path}: cannot be read with the topology {topology} ({error})") from error


def _atomic_numbers(topology: Any, indices: np.ndarray) -> np.ndarray:
    numbers = []
    for atom in (topology.atom(i) for i in indices):
        # mdtraj gives virtual sites the atomic number 0
        if atom.element is None or atom.element.atomic_number < 1:
            raise ValueError(f"topology: expected an element for every atom, got none for {atom}")
        numbers.append(atom.element.atomic_number)
    return np.array(numbers)


def select_atoms(topology: Any, atoms: str | Sequence[int] | None) -> np.ndarray:
    """Indices of the atoms that a selection in mdtraj's language, a list, or None (all) means, in order.

    Raises `ValueError` for an empty or malformed selection and for indices out of range or repeated.
    """
    if atoms is None:
        return np.arange(topology.n_atoms)
    if isinstance(atoms, str):
        try:
            indices = np.asarray(topology.select(atoms), dtype=np.int64)
        except Exception as error:  # mdtraj raises what its parser raises
            raise ValueError(f"atoms: expected a selection in mdtraj's language, got {atoms!r} ({error})") from error
    else:
        indices = np.asarray(atoms, dtype=np.int64)
        bad = indices[(indices < 0) | (indices >= topology.n_atoms)]
        if len(bad):
            raise ValueError(f"atoms: expected indices from 0 to {topology.n_atoms - 1}, got {int(bad[0])}")
        if len(np.unique(indices)) != len(indices):
            raise ValueError("atoms: expected every index once, got repeated ones")
    if len(indices) == 0:
        raise ValueError(f"atoms: expected at least one atom, got none for {atoms!r}")
    return indices


def read_trajectory(path: str | Path, topology: str | Path | None = None, **options: Any) -> list[Structure]:
    """All frames of `iterate_trajectory` in memory."""
    return list(iterate_trajectory(path, topology, **options))
