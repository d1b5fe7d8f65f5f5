"""files of structures -> `Structure`s, and back.

`read_structures` and `write_structures` choose by the file's ending:

=============  =========================================================  ============
ending         contents                                                   needs
=============  =========================================================  ============
.xyz .extxyz   extended XYZ through ASE, with charge, multiplicity,       ase
               energy, forces, dipole, charges, group
.npz           sGDML data sets (R, z, E, F and their units)               numpy
.h5 .hdf5      groups of conformations, our own layout or SPICE's         h5py
.pdb .cif      every model of a PDB or mmCIF file (read only)             openmm
.sdf .mol      charge and multiplicity from the molecule (read only)      rdkit
.smi           SMILES and a name per line, embedded in 3D (read only)     rdkit
=============  =========================================================  ============

Trajectories with a topology (DCD, XTC, ...) are read by `openmm_mlff.data.trajectories`. Units are converted to
angstrom, eV and e; files that state no units are taken as angstrom and eV (kcal/mol for sGDML, as its manual says).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff._plugins import near
from openmm_mlff.data.structures import Structure
from openmm_mlff.units import ANGSTROM_PER_BOHR, ANGSTROM_PER_NM, EV_PER_HARTREE, EV_PER_KCAL_PER_MOL, KJ_PER_MOL_PER_EV

#: angstroms in one unit of length, by the names that files use.
LENGTHS = {"angstrom": 1.0, "ang": 1.0, "å": 1.0, "bohr": ANGSTROM_PER_BOHR, "nm": ANGSTROM_PER_NM}
#: eV in one unit of energy, by the names that files use.
ENERGIES = {
    "ev": 1.0,
    "mev": 1e-3,
    "kcal/mol": EV_PER_KCAL_PER_MOL,
    "kj/mol": 1.0 / KJ_PER_MOL_PER_EV,
    "hartree": EV_PER_HARTREE,
}


def unit_factor(name: str, known: Mapping[str, float], what: str) -> float:
    """Factor to this package's unit. Raises `ValueError` for a unit that is not known."""
    key = name.strip().lower().replace(" ", "")
    if key not in known:
        raise ValueError(f"{what}: unknown unit {name!r}; {near(name, known)}")
    return known[key]


def read_structures(path: str | Path, **options: Any) -> list[Structure]:
    """All structures of one file; `options` go to the reader of its format (for example ``charge=1``).

    Raises `FileNotFoundError`, `ValueError` for an unknown ending or damaged contents, and `ImportError` naming the
    extra to install if a package is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _choose(path, READERS)(path, **options)


def write_structures(path: str | Path, structures: Sequence[Structure], **options: Any) -> None:
    """Write structures to one file; it appears only when it is complete.

    Raises `ValueError` for no structures, an unknown ending, or structures that the format cannot hold.
    """
    if len(structures) == 0:
        raise ValueError("structures: expected at least one, got none")
    path = Path(path)
    writer = _choose(path, WRITERS)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        writer(temporary, structures, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _choose(path: Path, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    ending = path.suffix.lower()
    if ending not in table:
        raise ValueError(f"path: expected a file ending in {', '.join(sorted(table))}, got {path.name!r}")
    return table[ending]


def read_extxyz(path: str | Path, charge: int | None = None, multiplicity: int | None = None) -> list[Structure]:
    """Frames of an extended XYZ file.

    Read from each frame: ``charge`` (or ``total_charge``), ``multiplicity`` (or ``spin``, ``spin_multiplicity``),
    ``energy``, ``forces``, ``dipole``, atomic ``charges``, ``group``; also with the prefix ``REF_``. Other per-frame
    values go to ``info``. `charge` and `multiplicity` are for files that do not say.
    """
    import ase.io

    try:
        frames = ase.io.read(path, index=":", format="extxyz")
    except Exception as error:  # ASE's reader raises many kinds
        raise ValueError(f"{path}: expected extended XYZ ({error})") from error
    if not frames:
        raise ValueError(f"{path}: expected at least one frame, found none")
    return [_from_ase(atoms, charge, multiplicity) for atoms in frames]


def _from_ase(atoms: Any, charge: int | None, multiplicity: int | None) -> Structure:
    info = dict(atoms.info)
    results = dict(atoms.calc.results) if atoms.calc is not None else {}

    def take(names: Sequence[str], tables: Sequence[dict[str, Any]]) -> Any:
        found = None
        for table in tables:
            for name in names:
                value = table.pop(name, None)
                found = value if found is None else found
        return found

    arrays = dict(atoms.arrays)
    total = take(("charge", "total_charge"), (info,))
    spin = take(("multiplicity", "spin_multiplicity", "spin"), (info,))
    labels = {
        "energy": take(("REF_energy", "energy"), (info, results)),
        "dipole": take(("REF_dipole", "dipole"), (info, results)),
        "forces": take(("REF_forces", "forces"), (arrays, results)),
        "charges": take(("REF_charges", "charges"), (arrays, results)),
    }
    if not (atoms.pbc.all() or not atoms.pbc.any()):
        raise ValueError(f"pbc: expected a box periodic in all directions or in none, got {atoms.pbc.tolist()}")
    return Structure(
        atoms.numbers,
        atoms.positions,
        int(total if total is not None else charge or 0),
        int(spin if spin is not None else multiplicity or 1),
        cell=np.asarray(atoms.cell) if atoms.pbc.all() else None,
        group=str(info.pop("group", "")),
        info={key: value.tolist() if hasattr(value, "tolist") else value for key, value in info.items()},
        **labels,
    )


def write_extxyz(path: str | Path, structures: Sequence[Structure]) -> None:
    """Extended XYZ with the keys that `read_extxyz` reads; of `info`, plain numbers and strings are kept."""
    import ase.io
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    frames = []
    for s in structures:
        info = {key: value for key, value in s.info.items() if isinstance(value, (bool, int, float, str))}
        info |= {"charge": int(s.charge), "multiplicity": int(s.multiplicity)}
        if s.group:
            info["group"] = s.group
        atoms = Atoms(numbers=s.numbers, positions=s.positions, cell=s.cell, pbc=s.cell is not None, info=info)
        labels = {k: getattr(s, k) for k in ("energy", "forces", "dipole", "charges") if getattr(s, k) is not None}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")


def read_sgdml_npz(path: str | Path, charge: int = 0, multiplicity: int = 1) -> list[Structure]:
    """A data set of one molecule in the layout of sGDML (S. Chmiela et al., Comput. Phys. Commun. 240, 38 (2019)).

    Keys ``z`` (n_atoms,), ``R`` and ``F`` (n, n_atoms, 3), ``E`` (n,) or (n, 1), and optionally ``r_unit``,
    ``e_unit``, ``name`` and a constant ``lattice`` (box vectors as columns). Nothing is unpickled.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {
                key: file[key] for key in ("z", "R", "E", "F", "r_unit", "e_unit", "name", "lattice") if key in file
            }
    except ValueError as error:
        raise ValueError(f"{path}: expected arrays of numbers and strings, got something else ({error})") from error
    if "R" not in data or "z" not in data:
        raise ValueError(f"{path}: expected the keys R and z of an sGDML data set, got {sorted(data)}")
    length = unit_factor(_text(data.get("r_unit", "Ang")), LENGTHS, "r_unit")
    energy = unit_factor(_text(data.get("e_unit", "kcal/mol")), ENERGIES, "e_unit")
    positions = np.asarray(data["R"], dtype=np.float64)
    if positions.ndim != 3 or positions.shape[1:] != (len(data["z"]), 3):
        raise ValueError(f"R: expected shape (n, {len(data['z'])}, 3), got {positions.shape}")
    energies = None if "E" not in data else np.asarray(data["E"], dtype=np.float64).reshape(len(positions)) * energy
    forces = None if "F" not in data else np.asarray(data["F"], dtype=np.float64) * (energy / length)
    cell = None if "lattice" not in data else np.asarray(data["lattice"], dtype=np.float64).T * length
    return [
        Structure(
            data["z"],
            frame * length,
            charge,
            multiplicity,
            cell=cell,
            energy=None if energies is None else energies[k],
            forces=None if forces is None else forces[k],
            group=_text(data.get("name", Path(path).stem)),
        )
        for k, frame in enumerate(positions)
    ]


def _text(value: Any) -> str:
    item = value.item() if isinstance(value, np.ndarray) else value
    return item.decode() if isinstance(item, bytes) else str(item)


def write_sgdml_npz(path: str | Path, structures: Sequence[Structure]) -> None:
    """The layout that `read_sgdml_npz` reads, in angstrom and eV.

    Raises `ValueError` unless all structures have the same atoms in the same order, and energies and forces.
    """
    first = structures[0]
    for s in structures:
        if not np.array_equal(s.numbers, first.numbers):
            raise ValueError(f"structures: expected one molecule in one order, got {first.formula} and {s.formula}")
        if s.energy is None or s.forces is None or s.cell is not None:
            raise ValueError("structures: expected open systems with energies and forces")
    with open(path, "wb") as file:
        np.savez_compressed(
            file,
            type="d",
            name=first.group or first.formula,
            theory="unknown",
            z=first.numbers.astype(np.uint8),
            R=np.stack([s.positions for s in structures]),
            E=np.array([s.energy for s in structures])[:, None],
            F=np.stack([s.forces for s in structures if s.forces is not None]),
            r_unit="Ang",
            e_unit="eV",
        )


def read_pdb(path: str | Path, charge: int = 0, multiplicity: int = 1) -> list[Structure]:
    """Every model of a PDB or mmCIF file; periodic if it states box vectors.

    Raises `ValueError` if an atom has no element.
    """
    from openmm.app import PDBFile, PDBxFile

    path = Path(path)
    try:
        file = PDBFile(str(path)) if path.suffix.lower() == ".pdb" else PDBxFile(str(path))
    except Exception as error:  # OpenMM's readers raise many kinds
        raise ValueError(f"{path}: expected a PDB or mmCIF file with atoms ({error})") from error
    atoms = list(file.topology.atoms())
    nameless = [atom for atom in atoms if atom.element is None]
    if nameless:
        raise ValueError(f"{path}: expected an element for every atom, got none for {nameless[0]}")
    vectors = file.topology.getPeriodicBoxVectors()
    cell = None if vectors is None else np.array([[x._value for x in v] for v in vectors]) * ANGSTROM_PER_NM
    numbers = np.array([atom.element.atomic_number for atom in atoms])
    return [
        Structure(
            numbers,
            np.asarray(file.getPositions(asNumpy=True, frame=k)._value) * ANGSTROM_PER_NM,
            charge,
            multiplicity,
            cell=cell,
            group=path.stem,
        )
        for k in range(file.getNumFrames())
    ]


def _hdf5_reader(path: str | Path, **options: Any) -> list[Structure]:
    from openmm_mlff.data.hdf5 import read_hdf5

    return read_hdf5(path, **options)


def _hdf5_writer(path: str | Path, structures: Sequence[Structure]) -> None:
    from openmm_mlff.data.hdf5 import write_hdf5

    write_hdf5(path, structures)


def _sdf_reader(path: str | Path, **options: Any) -> list[Structure]:
    from openmm_mlff.data.molecules import read_sdf

    return read_sdf(path, **options)


def _smiles_reader(path: str | Path, **options: Any) -> list[Structure]:
    from openmm_mlff.data.molecules import read_smiles

    return read_smiles(path, **options)


READERS: dict[str, Callable[..., list[Structure]]] = {
    ".xyz": read_extxyz,
    ".extxyz": read_extxyz,
    ".npz": read_sgdml_npz,
    ".h5": _hdf5_reader,
    ".hdf5": _hdf5_reader,
    ".pdb": read_pdb,
    ".cif": read_pdb,
    ".sdf": _sdf_reader,
    ".mol": _sdf_reader,
    ".smi": _smiles_reader,
}
WRITERS: dict[str, Callable[..., None]] = {
    ".xyz": write_extxyz,
    ".extxyz": write_extxyz,
    ".npz": write_sgdml_npz,
    ".h5": _hdf5_writer,
    ".hdf5": _hdf5_writer,
}


def with_groups(structures: Iterable[Structure], by: str) -> list[Structure]:
    """Fill in missing groups, so that a split can keep together what belongs together.

    Args:
        by: "formula" (one group per Hill formula), "structure" (each its own), or "block:N" (N in a row, for
            frames of one trajectory, whose neighbours resemble one another).

    Raises `ValueError` for another `by`.
    """
    kind, _, size = by.partition(":")
    if kind not in ("formula", "structure", "block") or (kind == "block" and (not size.isdigit() or int(size) < 1)):
        raise ValueError(f"by: expected 'formula', 'structure' or 'block:N', got {by!r}")
    result = []
    for k, s in enumerate(structures):
        name = {"formula": s.formula, "structure": f"structure-{k}"}.get(kind, f"block-{k // int(size or 1)}")
        result.append(s if s.group else s.replace(group=name))
    return result
