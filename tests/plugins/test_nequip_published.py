"""How the published networks of ReSolv are read, and what is refused. The files here have random weights."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.cli import main
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import find_family, load_potential
from openmm_nequip import NequIP, family, pretrained
from openmm_nequip.array_pickle import read_arrays

MOLECULE = Structure(
    np.array([8, 6, 1, 1, 7, 17, 16]),
    np.array(
        [[0, 0, 0.0], [1.2, 0.1, 0], [-0.8, 0.5, 0.3], [1.5, 1.1, 0.2], [1.8, -1.2, 0.4], [3.9, 1, -0.4], [3, 3, 0]]
    ),
)
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def arrays(nequip_plain: ModuleType) -> Arrays:
    found: Arrays = nequip_plain.random_arrays(5, features=4, layers=3)
    return found


@pytest.mark.parametrize("core", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_energies_are_those_of_the_published_formula(
    core: str, arrays: Arrays, nequip_plain: ModuleType, tmp_path: Path
) -> None:
    """U [kcal/mol] = (E_NN s + m) a b; one-hot vectors have the length 100 and the atomic number as index."""
    path = nequip_plain.write_published(tmp_path / "network.pkl", arrays, core)
    model = load_potential(path)
    assert isinstance(model, NequIP) and model.elements == (1, 6, 7, 8, 16, 17)
    assert model.dtype == torch.float64
    raw = nequip_plain.PlainNequIP(arrays, {z: z for z in range(100)}).energy(MOLECULE.numbers, MOLECULE.positions)
    s, m, a, b = (float(np.float32(x)) for x in (1.3413871350479776, -8705.874526590613, 96.4869, 0.239001))
    kcal = (raw * s + m) * a * b
    # 1 kcal/mol = 4.184 kJ/mol, 1 eV = 96.48533212331 kJ/mol (exact SI constants)
    assert model.energy_and_forces(MOLECULE)[0] == pytest.approx(kcal * 4.184 / 96.48533212331001, rel=1e-13)


def test_only_rows_of_known_elements_are_kept(arrays: Arrays, nequip_plain: ModuleType, tmp_path: Path) -> None:
    model = load_potential(nequip_plain.write_published(tmp_path / "network.pkl", arrays))
    rows = [1, 6, 7, 8, 16, 17]
    np.testing.assert_array_equal(
        model.state_dict()["element_embedding"].numpy(), arrays["Linear_0/w[0,1] 100x0e,4x0e"][rows]
    )
    assert sum(p.numel() for p in model.parameters()) < 0.1 * sum(x.size for x in arrays.values())


def test_names_and_sizes_are_those_of_the_stored_networks(nequip_plain: ModuleType, shared: Path) -> None:
    """What these tests write has the layout of jax-md's own parameters; a full one has 18,189,096 numbers."""
    for kind, options in (("small", {}), ("full", {"features": 64, "layers": 5, "radial": (64, 64, 64)})):
        made = nequip_plain.random_arrays(0, **options)
        with np.load(shared / "data" / "resolv" / f"nequip_{kind}_params.npz") as file:
            # six rows of a hundred are stored
            expected = {name: tuple(100 if n == 6 else n for n in file[name].shape) for name in file.files}
        assert {name: x.shape for name, x in made.items()} == expected
        if kind == "full":
            assert sum(x.size for x in made.values()) == 18_189_096


@pytest.mark.slow
def test_a_file_of_full_size(nequip_plain: ModuleType, tmp_path: Path) -> None:
    made = nequip_plain.random_arrays(0, features=64, layers=5, radial=(64, 64, 64))
    path = nequip_plain.write_published(tmp_path / "network.pkl", made)
    assert abs(path.stat().st_size - 142_890_900) < 1000
    model = load_potential(path)
    assert isinstance(model, NequIP)
    assert model.config == type(model.config)(
        energy_scale=model.config.energy_scale, energy_shift=model.config.energy_shift
    )
    raw = nequip_plain.PlainNequIP(made, {z: z for z in range(100)}).energy(MOLECULE.numbers, MOLECULE.positions)
    expected = model.config.energy_scale * raw + model.config.energy_shift
    assert model.energy_and_forces(MOLECULE)[0] == pytest.approx(expected, rel=0, abs=1e-9)


def test_convert_writes_a_model_file(arrays: Arrays, nequip_plain: ModuleType, tmp_path: Path) -> None:
    path = nequip_plain.write_published(tmp_path / "network.pkl", arrays)
    assert main(["convert", str(path), str(tmp_path / "network.safetensors")]) == 0
    read, converted = (load_potential(tmp_path / f"network.{x}") for x in ("pkl", "safetensors"))
    assert converted.energy_and_forces(MOLECULE)[0] == read.energy_and_forces(MOLECULE)[0]


# -- what is refused -------------------------------------------------------------------------------------------------


def edited(change: Callable[[Arrays], Any]) -> Callable[[Arrays], Arrays]:
    def edit(arrays: Arrays) -> Arrays:
        changed = dict(arrays)
        change(changed)
        return changed

    return edit


NAN = np.full((8,), np.nan)
CONV = "NequIPConvolution_1"
BROKEN: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "a missing array": (edited(lambda a: a.pop("BesselEmbedding_0/frequencies")), "BesselEmbedding_0/frequencies"),
    "no self-connection": (
        edited(lambda a: [a.pop(n) for n in list(a) if f"{CONV}/FullyConnected" in n]),
        f"lacks the arrays of '{CONV}/FullyConnectedTensorProductE3nn_0'",
    ),
    "NaN": (edited(lambda a: a.update({"BesselEmbedding_0/frequencies": NAN})), "holds NaN or infinity"),
    "another shape": (
        edited(lambda a: a.update({f"{CONV}/MLP_0/Dense_0/kernel": np.ones((8, 5), dtype=np.float32)})),
        "does not hold a network of ReSolv",
    ),
    "a shape unlike the name": (
        edited(lambda a: a.update({"Linear_2/w[0,0] 2x0e,1x0e": np.ones((2, 3))})),
        "has the shape \\(2, 3\\)",
    ),
    "another part": (edited(lambda a: a.update({"AllegroLayer_0/kernel": np.ones(3)})), "AllegroLayer_0/kernel"),
    "too few paths": (
        edited(lambda a: a.update({f"{CONV}/MLP_0/Dense_2/kernel": np.ones((16, 4 * 28), dtype=np.float32)})),
        "does not hold a network of ReSolv",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_refuses_other_networks(name: str, arrays: Arrays, nequip_plain: ModuleType, tmp_path: Path) -> None:
    edit, message = BROKEN[name]
    path = nequip_plain.write_published(tmp_path / "network.pkl", edit(arrays))
    with pytest.raises(ValueError, match=message) as error:
        load_potential(path, "nequip-jaxmd")
    assert str(error.value).startswith("modelPath: network.pkl")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"params": {"BesselEmbedding_0": Evil()}}), "mkdir, which is not on the list"),
        (pickle.dumps({"params": {"BesselEmbedding_0": np.array([Evil()], dtype=object)}}), "expected one of f4"),
        (pickle.dumps({"params": {"BesselEmbedding_0": {"frequencies": np.ones(3, dtype=">f8")}}}), "big-endian"),
        (pickle.dumps({"params": {"BesselEmbedding_0": 3.0}}), "is a float, expected a dictionary or an array"),
        (pickle.dumps([1.0, "BesselEmbedding_0"]), "is a list, expected a dictionary or an array"),
        (pickle.dumps({"params": {7: "BesselEmbedding_0"}}), "a key is 7, expected text"),
        (b"\x80\x04X\x11\x00\x00\x00BesselEmbedding_0r\xff\xff\xff\x7f.", "it numbers an object"),
        (b"BesselEmbedding_0", "damaged"),
        (b"", "damaged"),
    ],
)
def test_refuses_other_pickles(content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape("modelPath: network.pkl is damaged or not")) as error:
        pretrained.read(tmp_path / "network.pkl")
    assert message in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_damaged_files_are_refused(arrays: Arrays, nequip_plain: ModuleType, tmp_path: Path) -> None:
    path = nequip_plain.write_published(tmp_path / "network.pkl", arrays)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for k in range(60):
        broken = bytearray(content)
        if k % 3:
            # most bytes are numbers, which nobody can check: hit the structure at the beginning
            broken[int(rng.integers(400))] = int(rng.integers(256))
        else:
            broken = broken[: int(rng.integers(len(content)))]
        path.write_bytes(bytes(broken))
        try:
            pretrained.read(path)
        except ValueError as error:
            assert str(error).startswith("modelPath: network.pkl")
            refused += 1
    assert refused > 25


def test_arrays_of_numpy_and_in_fortran_order(tmp_path: Path) -> None:
    written = {"a": np.arange(6.0).reshape(2, 3), "b": {"c": np.asfortranarray(np.arange(6.0).reshape(3, 2))}}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(written, protocol=4))
    read = read_arrays(tmp_path / "arrays.pkl")
    assert list(read) == ["a", "b/c"]
    np.testing.assert_array_equal(read["a"], written["a"])
    np.testing.assert_array_equal(read["b/c"], written["b"]["c"])  # type: ignore[index]


# -- where they are ----------------------------------------------------------------------------------------------------


def test_the_published_models_are_known() -> None:
    known = {m.name: m for m in family.published}
    assert known["resolv-vacuum-published"].sha256.startswith("83618b7b")
    assert known["resolv-water-published"].sha256.startswith("56a72b33")
    for name, model in known.items():
        assert find_family(name) is family
        assert model.url.startswith("https://") and model.url.endswith(".pkl") and " " not in model.url
        assert model.licence == "Apache-2.0"


def test_recognises(arrays: Arrays, nequip_plain: ModuleType, tmp_path: Path) -> None:
    path = nequip_plain.write_published(tmp_path / "network.pkl", arrays)
    assert pretrained.recognises(path)
    other = tmp_path / "other.pkl"
    other.write_bytes(pickle.dumps({"weights": [1.0, 2.0]}))
    assert not pretrained.recognises(other)
    assert not pretrained.recognises(path.rename(tmp_path / "network.pth"))
