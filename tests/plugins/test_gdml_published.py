"""Model files of the sgdml program: old and new, all units, damaged and hostile ones."""

from __future__ import annotations

import json
import logging
import operator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from openmm_gdml.model import GDMLPotential
from openmm_gdml.published import write_npz
from openmm_mlff.cli import main
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential

EV = 627.509474 / 27.211386245988  # kcal/mol
#: angstrom or kcal/mol in one unit
LENGTHS = {"Ang": 1.0, "Bohr": 0.529177210903, "nm": 10.0, "a.u.": 0.529177210903}
ENERGIES = {"kcal/mol": 1.0, "eV": EV, "Hartree": 627.509474, "kJ/mol": 1 / 4.184, "kcal mol-1": 1.0}
NUMBERS = (6, 1, 1, 1, 8)
# no group, so that a permutation taken for its inverse shows
TURNS = np.array([[0, 1, 2, 3, 4], [0, 2, 3, 1, 4]])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.methodcaller("touch"), (self.marker,)


@pytest.fixture()
def arrays(gdml_plain: ModuleType, tmp_path: Path) -> dict[str, np.ndarray]:
    """A file of a random model with energy constraints."""
    model = gdml_plain.random_model(NUMBERS, TURNS, energies=True)
    return gdml_plain.arrays_of(write_npz(model, tmp_path / "written.npz"))


@pytest.fixture()
def read(gdml_plain: ModuleType, tmp_path: Path) -> Any:
    def from_arrays(arrays: dict[str, Any]) -> GDMLPotential:
        (tmp_path / "model.npz").write_bytes(gdml_plain.archive(arrays))
        model = load_potential(tmp_path / "model.npz")
        assert isinstance(model, GDMLPotential)
        return model

    return from_arrays


def kcal(model: GDMLPotential, r: np.ndarray) -> tuple[float, np.ndarray]:
    cell = model.lattice_rows if model.config.periodic else None
    energy, forces = model.energy_and_forces(Structure(np.array(model.config.numbers), r, cell=cell))
    return energy * EV, forces * EV


def check(model: GDMLPotential, expected: tuple[float, np.ndarray], r: np.ndarray, rtol: float = 1e-9) -> None:
    energy, forces = kcal(model, r)
    assert energy == pytest.approx(expected[0], rel=rtol)
    np.testing.assert_allclose(forces, expected[1], rtol=0, atol=10 * rtol * np.abs(expected[1]).max())


def test_written_file_is_read_as_the_formulas_say(
    gdml_plain: ModuleType, arrays: dict[str, np.ndarray], read: Any
) -> None:
    """Also the other way: what `write_npz` writes is the same model by the second implementation."""
    r = gdml_plain.base_of(5) + 0.05
    expected = gdml_plain.predict(arrays, r)
    assert np.abs(expected[1]).max() > 10.0
    check(read(arrays), expected, r)
    check(gdml_plain.random_model(NUMBERS, TURNS, energies=True), expected, r)
    without = {k: v for k, v in arrays.items() if k != "alphas_E"}
    assert abs(gdml_plain.predict(without, r)[0] - expected[0]) > 1.0
    check(read(without), gdml_plain.predict(without, r), r)


@pytest.mark.parametrize("name", ["ethanol_nosym_M200_S1", "cu27_M60_S27"])
def test_published_files_round_trip(name: str, gdml_plain: ModuleType, shared: Path, tmp_path: Path) -> None:
    stored = gdml_plain.arrays_of(shared / "data" / "gdml" / f"{name}_model.npz")
    model = load_potential(shared / "data" / "gdml" / f"{name}_model.npz")
    assert isinstance(model, GDMLPotential)
    written = gdml_plain.arrays_of(write_npz(model, tmp_path / "back.npz"))
    assert written["type"] == "m" and written["R_desc"].shape == stored["R_desc"].shape
    for key in ("z", "R_desc", "sig", "perms", "tril_perms_lin", "lattice"):
        assert (key in written) == (key in stored)
        np.testing.assert_allclose(written.get(key, 0), stored.get(key, 0), rtol=1e-14)
    scaled = [x["R_d_desc_alpha"] * float(x["std"]) for x in (written, stored)]
    np.testing.assert_allclose(scaled[0], scaled[1], rtol=1e-12)
    assert float(written["c"]) == pytest.approx(float(stored["c"]), rel=1e-14)


def test_files_of_2018(gdml_plain: ModuleType, arrays: dict[str, np.ndarray], read: Any) -> None:
    """Names as bytes, no std (the coefficients hold it), no permutations of atoms, other names of the rest."""
    r = gdml_plain.base_of(5) + 0.05
    arrays["std"] = np.array(3.7)
    expected = gdml_plain.predict(arrays, r)
    check(read(arrays), expected, r)
    old: dict[str, Any] = {k: arrays[k] for k in ("z", "R_desc", "sig", "c", "tril_perms_lin")}
    old |= {"type": np.bytes_(b"m"), "train_idxs": np.arange(7), "r_unit": b"Ang", "e_unit": b"kcal/mol"}
    old |= {"R_d_desc_alpha": arrays["R_d_desc_alpha"] * 3.7, "alphas_E": arrays["alphas_E"] * 3.7}
    check(read(old), expected, r)
    # points as rows, permutations counted from one
    rows = {k: v for k, v in old.items() if k != "tril_perms_lin"} | {"perms": arrays["perms"] + 1}
    check(read(rows | {"R_desc": arrays["R_desc"].T}), expected, r)


def test_permutations_are_rebuilt(gdml_plain: ModuleType, shared: Path, read: Any) -> None:
    stored = gdml_plain.arrays_of(shared / "data" / "gdml" / "ethanol_M200_S12_model.npz")
    perms = stored.pop("perms")
    np.testing.assert_array_equal(np.argsort(read(stored).permutations.numpy(), axis=1), perms)
    stored.pop("tril_perms_lin")
    assert read(stored).config.n_permutations == 1


@pytest.mark.parametrize(("r_unit", "e_unit"), list(zip(["Ang", *LENGTHS], ENERGIES, strict=True)))
def test_units(r_unit: str, e_unit: str, gdml_plain: ModuleType, arrays: dict[str, np.ndarray], read: Any) -> None:
    r, length, energy = gdml_plain.base_of(5) + 0.05, LENGTHS[r_unit], ENERGIES[e_unit]
    expected = gdml_plain.predict(arrays, r)
    arrays |= {"r_unit": np.array(r_unit), "e_unit": np.array(e_unit), "c": arrays["c"] / energy}
    arrays |= {"R_desc": arrays["R_desc"] * length, "sig": arrays["sig"] * length}
    arrays |= {"R_d_desc_alpha": arrays["R_d_desc_alpha"] * length / energy, "alphas_E": arrays["alphas_E"] / energy}
    e, f = gdml_plain.predict(arrays, r / length)
    assert e * energy == pytest.approx(expected[0], rel=1e-10)
    np.testing.assert_allclose(f * energy / length, expected[1], rtol=1e-8, atol=1e-8)
    # constants of CODATA editions differ in the ninth digit
    check(read(arrays), expected, r, rtol=1e-8)


def test_missing_and_unknown_units(
    arrays: dict[str, np.ndarray], read: Any, caplog: pytest.LogCaptureFixture, gdml_plain: ModuleType
) -> None:
    r = gdml_plain.base_of(5) + 0.05
    bare = {k: v for k, v in arrays.items() if k not in ("r_unit", "e_unit")}
    with caplog.at_level(logging.WARNING):
        check(read(bare), gdml_plain.predict(arrays, r), r)
    assert "taking Ang" in caplog.text and "taking kcal/mol" in caplog.text
    for key in ("r_unit", "e_unit"):
        with pytest.raises(ValueError, match=f"{key} = 'furlong', which is none of the known units: "):
            read(arrays | {key: np.array("furlong")})


def test_nothing_is_unpickled(arrays: dict[str, np.ndarray], read: Any, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = np.empty((), dtype=object)
    payload[()] = Payload(marker)
    # what is not needed is not touched, and what is needed is refused
    assert read(arrays | {"f_err": payload, "e_err": payload, "dataset_name": payload}).config.numbers == NUMBERS
    for key in ("c", "R_desc", "perms", "alphas_E"):
        with pytest.raises(ValueError, match=f"'{key}' in model.npz is not an array of numbers"):
            read(arrays | {key: payload})
    assert not marker.exists()


def test_damaged_and_incomplete_files(
    arrays: dict[str, np.ndarray], read: Any, tmp_path: Path, gdml_plain: ModuleType
) -> None:
    for key in ("c", "sig"):
        with pytest.raises(ValueError, match=f"has no '{key}', which an sgdml model needs"):
            read({k: v for k, v in arrays.items() if k != key})
    wrong = {
        "type": (np.array("t"), "a training task"),
        "R_desc": (arrays["R_desc"][:, 1:], "'R_desc' in model.npz: expected shape"),
        "R_d_desc_alpha": (arrays["R_d_desc_alpha"] * np.nan, "coefficients: expected finite numbers"),
        "alphas_E": (arrays["alphas_E"][1:], "energy_coefficients: expected shape"),
        "sig": (np.array(-3), "sigma: expected a positive number"),
        "z": (np.array([6.5, 1, 1, 1, 8]), "expected whole numbers"),
        "perms": (np.array([[0, 1, 2, 4, 3]]), "exchanges different elements"),
        "lattice": (np.eye(2), "expected shape"),
    }
    for key, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            read(arrays | {key: value})
    whole = gdml_plain.archive(arrays)
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.npz"):
        load_potential(tmp_path / "cut.npz", "sgdml")


def test_commands_take_published_files(
    arrays: dict[str, np.ndarray],
    gdml_plain: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``convert`` proves that its copy has the same energies; ``evaluate`` runs in the precision of the file."""
    source, target, data = (tmp_path / name for name in ("model.npz", "model.safetensors", "data.extxyz"))
    source.write_bytes(gdml_plain.archive(arrays))
    assert main(["convert", str(source), str(target), "--licence", "MIT"]) == 0, capsys.readouterr().err
    r = gdml_plain.base_of(5) + 0.05
    energy, forces = kcal(load_potential(source), r)  # type: ignore[arg-type]
    check(load_potential(target), (energy, forces), r)  # type: ignore[arg-type]
    atoms = Atoms(numbers=NUMBERS, positions=r)
    atoms.calc = SinglePointCalculator(atoms, energy=(energy + 2.0) / EV, forces=forces / EV)
    write(data, [atoms, atoms], format="extxyz")
    for model in (source, target):
        done = main(["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "report")])
        assert done == 0, capsys.readouterr().err
        config = json.loads((tmp_path / "report" / "evaluation_config.json").read_text(encoding="utf-8"))
        assert config["precision"] == "double"
        errors = json.loads((tmp_path / "report" / "evaluation_errors.json").read_text(encoding="utf-8"))
        (everything,) = errors["tables"]["all"]
        assert everything["energy_mae"] == pytest.approx(1000 * 2.0 / EV / 5, rel=1e-6)  # meV/atom
        assert everything["forces_mae"] < 1e-3  # meV/angstrom, the digits of the file


def test_what_sgdml_does_not_know_is_not_written(gdml_plain: ModuleType, tmp_path: Path) -> None:
    model = gdml_plain.random_model(NUMBERS)
    object.__setattr__(model.config, "sigma", 2.5)
    with pytest.raises(ValueError, match=r"sigma: sgdml needs a whole number, got 2\.5"):
        write_npz(model, tmp_path / "x.npz")
    beads = gdml_plain.random_model((1, 2, 3), beads=("A", "B", "C"))
    with pytest.raises(ValueError, match="models of atoms"):
        write_npz(beads, tmp_path / "x.npz")
