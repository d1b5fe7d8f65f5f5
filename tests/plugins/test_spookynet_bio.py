"""The bundled model of biomolecules: how it gets into the wheel, that its name finds it, and what is there now."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import openmm_spookynet
from openmm_mlff import _plugins, cli
from openmm_mlff._openmmml import Factory
from openmm_mlff.data import model_file
from openmm_mlff.data.datasets import Dataset, finish_dataset, write_dataset
from openmm_mlff.data.files import sha256_of
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import save_ensemble
from openmm_mlff.potentials.family import find_family, load_potential, save_potential
from openmm_mlff.training.evaluation import find_model
from openmm_mlff.training.recipe import DataOptions, load_data

from .random_models import spookynet

NAME = "spookynet-gfn2-bio"
WATER = np.array([[0.0, 0.0, 0.117], [0.0, 0.757, -0.469], [0.0, -0.757, -0.469]])


@dataclasses.dataclass
class Trained:
    """Two members, their calibrated ensemble and their data, as the trainings leave them."""

    folder: Path
    members: list[Path]
    ensemble: Path
    data: Path


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    pytest.importorskip("tblite")
    structures = [
        Structure([8, 1, 1], WATER * (1 + 0.01 * k), group=f"water-{k}", energy=-10.0, forces=np.zeros((3, 3)))
        for k in range(4)
    ]
    data = tmp_path / "data"
    write_dataset(data, structures, name=NAME, method=TBLite(), sampling={})
    splits = {"train": ["water-0", "water-1"], "valid": ["water-2"], "test": ["water-3"]}
    finish_dataset(data, name=NAME, method=TBLite(), sampling={}, splits=splits)
    described = load_data([data], DataOptions(), 0).description
    members = []
    for k, error in enumerate((61.0, 58.0)):
        folder = tmp_path / f"member-{k}"
        accuracy = {"valid": {"forces_mae": error}, "test": {"forces_mae": 1.0 + k}}
        model = spookynet(k).float()
        members.append(folder)
        save_potential(model, folder / "model.safetensors", training_data=described, accuracy=accuracy)
    files = [folder / "model.safetensors" for folder in members]
    factors = {"energy_factor": 1.5, "force_factor": 2.0, "force_limit": 0.7}
    return Trained(tmp_path, members, save_ensemble(files, tmp_path / "all.safetensors", factors), data)


@pytest.fixture
def release(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs the script on a `Trained`, or on other files; returns the root that it wrote to."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    script = importlib.import_module("spookynet_bio_release")

    def run(trained: Trained, **other: Any) -> Path:
        root = trained.folder / "root"
        given = {"members": trained.members, "ensemble": [trained.ensemble], "data": [trained.data], "root": [root]}
        words = [str(w) for name, values in (given | other).items() for w in (f"--{name}", *values)]
        monkeypatch.setattr(sys, "argv", ["spookynet_bio_release.py", *words])
        script.main()
        return root

    yield run
    for name in ("spookynet_bio_release", "_common"):
        sys.modules.pop(name, None)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets the plugin carry its weights in another folder."""

    def carry(folder: Path) -> None:
        family = openmm_spookynet.family
        moved = tuple(
            dataclasses.replace(m, path=folder / m.path.name) if m.name == NAME else m for m in family.bundled
        )
        monkeypatch.setattr(openmm_spookynet, "family", dataclasses.replace(family, bundled=moved))
        points = _plugins.entry_points

        def with_name(*, group: str) -> list[Any]:
            found = list(points(group=group))
            if group == _plugins.POTENTIALS and NAME not in {p.name for p in found}:
                found.append(importlib.metadata.EntryPoint(NAME, "openmm_spookynet:family", group))
            return found

        monkeypatch.setattr(_plugins, "entry_points", with_name)

    return carry


def test_the_better_member_goes_into_the_wheel_and_its_name_finds_it(
    trained: Trained,
    release: Callable[..., Path],
    registered: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = release(trained)
    weights = root / "plugins" / "openmm_spookynet" / "weights"
    file = weights / f"{NAME}.safetensors"
    registered(weights)
    best = load_potential(trained.members[1] / "model.safetensors")
    expected = best.energy_and_forces(Structure([8, 1, 1], WATER))
    for path in (find_model(NAME), Path(Factory().createImpl(NAME)._path)):
        assert path == file
        energy, forces = load_potential(path).energy_and_forces(Structure([8, 1, 1], WATER))
        assert energy == expected[0] and np.array_equal(forces, expected[1])
    capsys.readouterr()
    assert cli.main(["models", "list"]) == 0
    listed = capsys.readouterr().out
    assert NAME in listed and "spookynet-ala2-gfn2" in listed and "missing" not in listed
    assert cli.main(["models", "verify", NAME]) == 0
    assert f"{NAME}: sound, spookynet, 4 elements, sha256 {sha256_of(file)}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"modelPath: '{NAME}' is one particular model"):
        Factory().createImpl(NAME, modelPath=str(file))


def test_the_cards_say_teacher_data_limits_and_licence(trained: Trained, release: Callable[..., Path]) -> None:
    root = release(trained)
    single = model_file.load_card(root / "plugins" / "openmm_spookynet" / "weights" / f"{NAME}.safetensors")
    whole = model_file.load_card(root / "models" / f"{NAME}.safetensors")
    for card in (single, whole):
        assert card["licence"] == "MIT" and card["name"] == NAME and "GFN2-xTB itself moves" in card["limits"]
        assert card["teacher"].startswith("GFN2-xTB by tblite") and "spin-polarization 1.0" in card["teacher"]
        data = card["training_data"]
        assert data["structures"] == {"train": 2, "valid": 1, "test": 1} and data["groups"]["train"] == 2
        assert "water-0" not in json.dumps(data) and len(data["sources"][0]["sha256_of_shards"]) == 64
    assert single["accuracy"]["valid"]["forces_mae"] == 58.0
    assert whole["config"]["force_limit"] == 0.7
    report = json.loads((root / "benchmarks" / "spookynet_bio_release.json").read_text(encoding="utf-8"))
    assert report["member"] == 1
    for place in ("plugins/openmm_spookynet/weights", "models"):
        entry = report[f"{place}/{NAME}.safetensors"]
        path = root / place / f"{NAME}.safetensors"
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    # the whole of it works as before
    one, other = load_potential(trained.ensemble), load_potential(root / "models" / f"{NAME}.safetensors")
    water = Structure([8, 1, 1], WATER)
    assert one.energy_and_forces(water)[0] == other.energy_and_forces(water)[0]
    before = sha256_of(root / "models" / f"{NAME}.safetensors")
    release(trained)
    assert sha256_of(root / "models" / f"{NAME}.safetensors") == before


def test_what_does_not_belong_together_is_refused(trained: Trained, release: Callable[..., Path]) -> None:
    files = [folder / "model.safetensors" for folder in trained.members]
    plain = save_ensemble(files, trained.folder / "plain.safetensors")
    with pytest.raises(SystemExit, match="not calibrated"):
        release(trained, ensemble=[plain])
    with pytest.raises(SystemExit, match="its member 0 differs from --members"):
        release(trained, members=trained.members[::-1])
    with pytest.raises(SystemExit, match="expected an ensemble of the 1 members"):
        release(trained, members=trained.members[:1])
    double = trained.folder / "double.safetensors"
    save_potential(load_potential(files[0]).double(), double)
    with pytest.raises(SystemExit, match=r"expected weights in float32, got torch\.float64"):
        release(trained, members=[double, files[1]])
    card, tensors = model_file.load(files[0])
    begun = {name: value for name, value in card.items() if name != "accuracy"}
    unfinished = model_file.save(trained.folder / "unfinished.safetensors", begun, tensors)
    with pytest.raises(SystemExit, match="its training is not complete"):
        release(trained, members=[unfinished, files[1]])
    other = trained.folder / "other"
    structures = list(Dataset(trained.data))[:3]
    write_dataset(other, structures, name=NAME, method=TBLite(), sampling={})
    with pytest.raises(SystemExit, match="with other shards than are given"):
        release(trained, data=[other])
    assert not (trained.folder / "root" / "models").exists()


def test_a_name_without_its_file_says_so(registered: Callable[[Path], None], tmp_path: Path) -> None:
    registered(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{NAME}: its model file .* is missing from this installation"):
        Factory().createImpl(NAME)


# -- what is shipped now ---------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "benchmarks" / "spookynet_bio_release.json").read_text(encoding="utf-8"))


def test_what_is_shipped_is_what_was_released(shipped: dict[str, Any], repository: Path) -> None:
    wheel, whole = (f"{place}/{NAME}.safetensors" for place in ("plugins/openmm_spookynet/weights", "models"))
    for name in (wheel, whole):
        entry = shipped[name]
        assert entry == {"bytes": (repository / name).stat().st_size, "sha256": sha256_of(repository / name)}
    assert shipped[wheel]["bytes"] <= 8_000_000
    bundled = next(m for m in find_family("spookynet").bundled if m.name == NAME)
    assert bundled.path.samefile(repository / wheel)
    card, tensors = model_file.load(repository / wheel)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
    assert card["domain"] == bundled.domain and card["licence"] == "MIT"
    symbols = {1, 3, 6, 7, 8, 9, 11, 12, 15, 16, 17, 19, 20, 35}
    assert set(card["elements"]) == symbols


def test_what_is_shipped_knows_water_and_its_ions(shipped: dict[str, Any], repository: Path) -> None:
    """Energies of proton transfer between water molecules far apart, against GFN2-xTB; forces are gradients."""
    model = load_potential(repository / f"plugins/openmm_spookynet/weights/{NAME}.safetensors").double()
    water = Structure([8, 1, 1], WATER)
    direction = np.random.default_rng(0).normal(size=(3, 3))
    up, down = (model.energy_and_forces(water.replace(positions=WATER + s * 1e-3 * direction))[0] for s in (1.0, -1.0))
    slope = -np.sum(model.energy_and_forces(water)[1] * direction)
    assert (up - down) / 2e-3 == pytest.approx(slope, rel=1e-4, abs=1e-4)
    pytest.importorskip("tblite")
    hydroxide = Structure([8, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.96]], charge=-1)
    planar = [[0.0, 0.0, 0.0], [0.98, 0.0, 0.2], [-0.49, 0.849, 0.2], [-0.49, -0.849, 0.2]]
    hydronium = Structure([8, 1, 1, 1], planar, charge=1)
    teacher = TBLite()
    found, true = (
        [float(energy(s)) for s in (hydroxide, hydronium, water)]
        for energy in (lambda s: model.energy_and_forces(s)[0], lambda s: teacher.label(s).energy)
    )
    # 10 eV of which a model that is not told the charge knows nothing
    assert found[0] + found[1] - 2 * found[2] == pytest.approx(true[0] + true[1] - 2 * true[2], abs=0.5)
