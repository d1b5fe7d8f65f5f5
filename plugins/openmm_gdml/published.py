"""Reading and writing the ``.npz`` model files of the sgdml program, old and new.

Keys, shapes and conventions: sgdml 1.0.3 as published on PyPI (MIT), and the files of 2018, which lack some of them.
The kernel knows no unit of its own, so that conversion multiplies: lengths enter through x and sigma (1/length), and
energies through c and the coefficients. Nothing is unpickled; arrays of objects are never touched.
"""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_gdml.descriptors import INVERSE_DISTANCES, pair_permutations
from openmm_gdml.model import GDMLPotential
from openmm_mlff.data.files import write_atomically
from openmm_mlff.units import ANGSTROM_PER_BOHR, EV_PER_HARTREE, EV_PER_KCAL_PER_MOL, KJ_PER_MOL_PER_EV

logger = logging.getLogger(__name__)

#: what sgdml assumes where a file does not say
DEFAULT_LENGTH, DEFAULT_ENERGY = "Ang", "kcal/mol"
#: angstrom, by lower-case name
LENGTHS = {
    **dict.fromkeys(("ang", "angstrom", "angstroms", "a", "å", "ångström", "ångstrom"), 1.0),
    **dict.fromkeys(("bohr", "bohrs", "a0", "au", "a.u."), ANGSTROM_PER_BOHR),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre"), 10.0),
    **dict.fromkeys(("pm", "picometer", "picometre"), 0.01),
}
#: eV, by lower-case name without blanks
ENERGIES = {
    **dict.fromkeys(("kcal/mol", "kcalmol-1", "kcal*mol-1", "kcal/mole", "kcal"), EV_PER_KCAL_PER_MOL),
    **dict.fromkeys(("kj/mol", "kjmol-1", "kj*mol-1", "kj/mole", "kj"), 1.0 / KJ_PER_MOL_PER_EV),
    **dict.fromkeys(("ev", "electronvolt", "electronvolts"), 1.0),
    "mev": 1e-3,
    **dict.fromkeys(("hartree", "hartrees", "ha", "eh", "e_h", "au", "a.u."), EV_PER_HARTREE),
    **dict.fromkeys(("rydberg", "ry"), 0.5 * EV_PER_HARTREE),
}


def recognises(path: Path) -> bool:
    """Whether the file is a model of sgdml: a zip of numpy arrays that has its kernel coefficients."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):
        return False
    return {"z", "R_desc", "R_d_desc_alpha"} <= names


def read(path: Path) -> GDMLPotential:
    """The model of an sgdml file, in angstrom and eV.

    Raises `ValueError` naming the key that is missing, or has a shape, type or unit that cannot be.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return _build(_Keys(file, path.name))
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"modelPath: {path.name} is damaged or not an sgdml model ({error})") from error


class _Keys:
    """The arrays of a file by name, each read when it is asked for."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self.name = file, name

    def __contains__(self, key: str) -> bool:
        return key in self._file.files

    def array(self, key: str) -> np.ndarray:
        """An array of numbers as float64."""
        if key not in self:
            raise ValueError(f"modelPath: {self.name} has no {key!r}, which an sgdml model needs")
        try:
            return np.asarray(self._file[key], dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"modelPath: {key!r} in {self.name} is not an array of numbers ({error})") from error

    def integers(self, key: str) -> np.ndarray:
        values = self.array(key)
        if not np.array_equal(values, np.rint(values)):
            raise ValueError(f"modelPath: {key!r} in {self.name}: expected whole numbers")
        return values.astype(np.int64)

    def number(self, key: str, default: float | None = None) -> float:
        if default is not None and key not in self:
            return default
        values = self.array(key)
        if values.size != 1 or not np.isfinite(values).all():
            raise ValueError(f"modelPath: {key!r} in {self.name}: expected one finite number, got {values.tolist()}")
        return float(values.reshape(()))

    def text(self, key: str) -> str | None:
        """A string, which old files hold as bytes; None if there is none."""
        if key not in self:
            return None
        try:
            value = np.asarray(self._file[key])
        except ValueError:  # an array of objects
            return None
        if value.size != 1 or value.dtype.kind not in "SU":
            return None
        item = value.reshape(()).item()
        return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)


def _build(keys: _Keys) -> GDMLPotential:
    kind = keys.text("type")
    if kind is not None and kind != "m":
        what = {"d": "a data set", "t": "a training task"}.get(kind, f"of type {kind!r}")
        raise ValueError(f"modelPath: {keys.name} is {what} of sgdml, expected a model")
    length, energy = _units(keys)
    numbers = keys.integers("z").reshape(-1)
    n_pairs = len(numbers) * (len(numbers) - 1) // 2
    coefficients = _rows(keys, "R_d_desc_alpha", n_pairs, None)
    points = _rows(keys, "R_desc", n_pairs, len(coefficients))
    # without std (2018) coefficients carry it already
    scale = keys.number("std", 1.0) * energy
    optional: dict[str, Any] = {}
    if "alphas_E" in keys:
        optional["energy_coefficients"] = keys.array("alphas_E").reshape(-1) * scale
    if "lattice" in keys:
        # columns are lattice vectors there
        lattice = keys.array("lattice")
        if lattice.shape != (3, 3):
            raise ValueError(f"modelPath: 'lattice' in {keys.name}: expected shape (3, 3), got {lattice.shape}")
        optional["lattice"] = lattice.T * length
    sigma, shift = keys.number("sig") / length, keys.number("c") * energy
    # they permute training points there, queries here
    optional["permutations"] = np.argsort(_permutations(keys, len(numbers)), axis=1)
    # says how the model was made, and is NaN where nobody knows
    lam = keys.array("lam").reshape(-1) if "lam" in keys else np.empty(0)
    optional["lam"] = float(lam[0]) if lam.size == 1 and np.isfinite(lam[0]) else None
    try:
        return GDMLPotential.from_coefficients(
            numbers, sigma, points / length, coefficients * scale / length, shift, **optional
        )
    except ValueError as error:
        raise ValueError(f"modelPath: {keys.name} is not a complete sgdml model ({error})") from error


def _units(keys: _Keys) -> tuple[float, float]:
    """Angstrom and eV in one unit of the file."""
    found = []
    for key, table, default in (("r_unit", LENGTHS, DEFAULT_LENGTH), ("e_unit", ENERGIES, DEFAULT_ENERGY)):
        text = keys.text(key)
        if text is None or not text.strip():
            logger.warning("%s does not say its unit (%s); taking %s, as sgdml does", keys.name, key, default)
            text = default
        name = "".join(text.split()).lower()
        if name not in table:
            raise ValueError(
                f"modelPath: {keys.name} has {key} = {text!r}, which is none of the known units: "
                + ", ".join(sorted(table))
            )
        found.append(table[name])
    return found[0], found[1]


def _rows(keys: _Keys, key: str, n_pairs: int, n_rows: int | None) -> np.ndarray:
    """An array ``(M, D)``, which some files hold as ``(D, M)``.

    sgdml writes R_desc as ``(D, M)``; that is also taken where M = D leaves both possible.
    """
    values = keys.array(key)
    columns_first = key == "R_desc"
    shapes = [(n_rows, n_pairs), (n_pairs, n_rows)]
    if values.ndim == 2:
        fits = [all(want in (None, got) for want, got in zip(shape, values.shape, strict=True)) for shape in shapes]
        if fits[1] and (columns_first or not fits[0]):
            return values.T
        if fits[0]:
            return values
    expected = f"(M, {n_pairs}) or its transpose" if n_rows is None else f"({n_rows}, {n_pairs}) or its transpose"
    raise ValueError(f"modelPath: {key!r} in {keys.name}: expected shape {expected}, got {values.shape}")


def _permutations(keys: _Keys, n_atoms: int) -> np.ndarray:
    """Permutations of atoms ``(S, N)``: as stored, or from those of the pairs, or the identity alone."""
    if "perms" in keys:
        permutations = keys.integers("perms")
        permutations = permutations[None] if permutations.ndim == 1 else permutations
        # counted from one where no atom is 0
        return permutations - 1 if permutations.size and permutations.min() == 1 else permutations
    if "tril_perms_lin" not in keys:
        return np.arange(n_atoms)[None]
    lin, n_pairs = keys.integers("tril_perms_lin").reshape(-1), n_atoms * (n_atoms - 1) // 2
    if lin.size % n_pairs:
        raise ValueError(f"modelPath: 'tril_perms_lin' in {keys.name}: expected a multiple of {n_pairs} numbers")
    n_perms = lin.size // n_pairs
    pairs = lin.reshape(n_pairs, n_perms).T - n_pairs * np.arange(n_perms)[:, None]
    return np.stack([_atoms_of(p, n_atoms, keys.name) for p in pairs])


def _atoms_of(pairs: np.ndarray, n_atoms: int, name: str) -> np.ndarray:
    """The permutation of atoms behind one of pairs: an atom goes to the one atom common to the images of its pairs."""
    i, j = np.tril_indices(n_atoms, -1)
    if np.array_equal(pairs, np.arange(len(pairs))):
        return np.arange(n_atoms)
    result = np.zeros(n_atoms, dtype=np.int64)
    if np.array_equal(np.sort(pairs), np.arange(len(pairs))) and n_atoms > 2:
        for atom in range(n_atoms):
            mine = pairs[(i == atom) | (j == atom)]
            result[atom] = np.bincount(np.concatenate([i[mine], j[mine]]), minlength=n_atoms).argmax()
        if len(set(result.tolist())) == n_atoms and np.array_equal(
            pair_permutations(torch.from_numpy(result)[None])[0].numpy(), pairs
        ):
            return result
    raise ValueError(f"modelPath: 'tril_perms_lin' in {name} is no permutation of atoms")


def write_npz(model: GDMLPotential, path: str | Path, name: str = "openmm-mlff", theory: str = "unknown") -> Path:
    """Write a model as sgdml's own file, in angstrom and kcal/mol, so that its program can run it.

    Raises `ValueError` for models that sgdml does not know: another descriptor, beads, or a sigma that is no whole
    number (its program would round it).
    """
    c = model.config
    if c.descriptor != INVERSE_DISTANCES or c.beads is not None:
        raise ValueError("model: sgdml knows models of atoms with inverse distances only")
    if c.sigma != round(c.sigma):
        raise ValueError(f"sigma: sgdml needs a whole number, got {c.sigma}")
    tensors = {key: tensor.cpu().numpy() for key, tensor in model.state_dict().items()}
    unit = EV_PER_KCAL_PER_MOL
    permutations = np.argsort(tensors["permutations"], axis=1)
    pairs = pair_permutations(torch.from_numpy(permutations)).numpy()
    offsets = pairs.shape[1] * np.arange(len(pairs))[:, None]
    arrays: dict[str, Any] = {
        "type": "m",
        "code_version": "1.0.3",
        "dataset_name": name,
        "dataset_theory": theory,
        "solver_name": "analytic",
        "z": np.array(c.numbers, dtype=np.int64),
        "idxs_train": np.arange(c.n_train),
        "md5_train": np.bytes_("0" * 32),
        "idxs_valid": np.arange(0),
        "md5_valid": np.bytes_("0" * 32),
        "n_test": 0,
        "R_desc": tensors["descriptors"].T,
        "R_d_desc_alpha": tensors["coefficients"] / unit,
        "c": float(tensors["shift"]) / unit,
        "std": 1.0,
        "sig": int(c.sigma),
        "lam": float("nan") if c.lam is None else c.lam,
        "perms": permutations,
        "tril_perms_lin": (pairs + offsets).ravel(order="F"),
        "use_E": True,
        "r_unit": "Ang",
        "e_unit": "kcal/mol",
    }
    arrays |= {"alphas_F": tensors["alphas"].ravel() / unit} if c.keeps_alphas else {}
    arrays |= {"alphas_E": tensors["energy_coefficients"] / unit} if c.energy_constraints else {}
    arrays |= {"lattice": tensors["lattice"].T} if c.periodic else {}
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return write_atomically(path, stream.getvalue())
