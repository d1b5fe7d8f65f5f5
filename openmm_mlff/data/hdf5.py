"""HDF5 files -> structures, and back: one group per molecule, its conformations stacked.

Our layout, per HDF5 group: ``numbers`` (n_atoms,), ``positions`` (n, n_atoms, 3), and as known ``energy`` (n,),
``forces`` (n, n_atoms, 3), ``dipole`` (n, 3), ``charges`` (n, n_atoms), ``cell`` (n, 3, 3); attributes ``charge``,
``multiplicity`` and ``group``; every data set has the attribute ``units``. SPICE's layout is read too: P. Eastman et
al., Sci. Data 10, 11 (2023): ``atomic_numbers``, ``conformations``, ``formation_energy`` or ``dft_total_energy``,
``dft_total_gradient``, ``scf_dipole``, ``mbis_charges``, ``smiles``, each with its ``units``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.structures import Structure
from openmm_mlff.units import ANGSTROM_PER_BOHR, EV_PER_HARTREE

UNITS = {
    "numbers": "1",
    "positions": "angstrom",
    "cell": "angstrom",
    "energy": "eV",
    "forces": "eV/angstrom",
    "dipole": "e*angstrom",
    "charges": "e",
}


def _require_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"HDF5 files need h5py ({error}); install it with: pip install 'openmm-mlff[label]'"
        ) from error
    return h5py


def read_hdf5(path: str | Path, charge: int | None = None, multiplicity: int | None = None) -> list[Structure]:
    """All conformations of all groups, in our layout or SPICE's.

    `charge` and `multiplicity` are for groups that do not state them; a SPICE group states its charge by its SMILES
    (which needs rdkit), and its molecules are singlets.

    Raises `ValueError` for groups of another layout or other units, `ImportError` without h5py.
    """
    h5py = _require_h5py()
    structures: list[Structure] = []
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: expected an HDF5 file ({error})") from error
    with file:
        for name, group in file.items():
            if "numbers" in group and "positions" in group:
                structures += _own_group(name, group, charge, multiplicity)
            elif "atomic_numbers" in group and "conformations" in group:
                structures += _spice_group(name, group, charge, multiplicity)
            else:
                raise ValueError(f"{path}: the group {name!r} is of no known layout; it holds {sorted(group)}")
    return structures


def _own_group(name: str, group: Any, charge: int | None, multiplicity: int | None) -> list[Structure]:
    for key in group:
        units = group[key].attrs.get("units", UNITS.get(key))
        if key in UNITS and units != UNITS[key]:
            raise ValueError(f"{name}/{key}: expected the unit {UNITS[key]}, got {units!r}")
    labels = {key: group[key][()] for key in ("cell", "energy", "forces", "dipole", "charges") if key in group}
    return [
        Structure(
            group["numbers"][()],
            frame,
            int(group.attrs.get("charge", charge or 0)),
            int(group.attrs.get("multiplicity", multiplicity or 1)),
            group=str(group.attrs.get("group", name)),
            **{key: value[k] for key, value in labels.items()},
        )
        for k, frame in enumerate(group["positions"][()])
    ]


#: SPICE's name, our label, its unit there, factor to ours.
_SPICE_LABELS = (
    ("dft_total_energy", "energy", "hartree", EV_PER_HARTREE),
    ("formation_energy", "energy", "hartree", EV_PER_HARTREE),
    ("dft_total_gradient", "forces", "hartree/bohr", -EV_PER_HARTREE / ANGSTROM_PER_BOHR),
    ("scf_dipole", "dipole", "bohr*elementary_charge", ANGSTROM_PER_BOHR),
    ("mbis_charges", "charges", "elementary_charge", 1.0),
)


def _spice_group(name: str, group: Any, charge: int | None, multiplicity: int | None) -> list[Structure]:
    def convert(key: str, unit: str, factor: float) -> np.ndarray:
        # SPICE writes "bohr*elementary_charge" and "hartree/bohr", some files with spaces
        stated = str(group[key].attrs.get("units", unit)).replace(" ", "")
        if stated != unit:
            raise ValueError(f"{name}/{key}: expected the unit {unit}, got {stated!r}")
        return np.asarray(group[key][()], dtype=np.float64) * factor

    numbers = group["atomic_numbers"][()]
    positions = convert("conformations", "bohr", ANGSTROM_PER_BOHR)
    labels = {}
    for key, label, unit, factor in _SPICE_LABELS:
        if key in group:
            labels[label] = convert(key, unit, factor)
    if "charges" in labels:
        labels["charges"] = labels["charges"].reshape(len(positions), len(numbers))
    if charge is None and "smiles" in group:
        charge = _smiles_charge(group["smiles"][0])
    return [
        Structure(
            numbers,
            frame,
            charge or 0,
            multiplicity or 1,
            group=name,
            **{label: value[k] for label, value in labels.items()},
        )
        for k, frame in enumerate(positions)
    ]


def _smiles_charge(smiles: str | bytes) -> int:
    from openmm_mlff.data.molecules import require_rdkit

    chem = require_rdkit()
    text = smiles.decode() if isinstance(smiles, bytes) else str(smiles)
    molecule = chem.MolFromSmiles(text, sanitize=False)
    if molecule is None:
        raise ValueError(f"smiles: expected a molecule, got {text!r}")
    return int(chem.GetFormalCharge(molecule))


def write_hdf5(path: str | Path, structures: Sequence[Structure]) -> None:
    """Our layout: an HDF5 group per molecule with the same atoms, charge, multiplicity, group and kinds of label.

    Raises `ImportError` without h5py.
    """
    h5py = _require_h5py()
    optional = ("cell", "energy", "forces", "dipole", "charges")
    stacks: dict[tuple[Any, ...], list[Structure]] = {}
    for s in structures:
        known = tuple(key for key in optional if getattr(s, key) is not None)
        stacks.setdefault((s.group, s.charge, s.multiplicity, s.numbers.tobytes(), known), []).append(s)
    with h5py.File(path, "w") as file:
        for k, ((name, charge, multiplicity, _, known), members) in enumerate(stacks.items()):
            group = file.create_group(f"{k:06d}")
            group.attrs.update({"charge": charge, "multiplicity": multiplicity, "group": name})
            data = {"numbers": members[0].numbers, "positions": np.stack([s.positions for s in members])}
            data |= {key: np.stack([np.asarray(getattr(s, key)) for s in members]) for key in known}
            for key, value in data.items():
                group.create_dataset(key, data=value).attrs["units"] = UNITS[key]
