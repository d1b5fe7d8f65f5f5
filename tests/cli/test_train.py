"""``openmm-mlff train`` and ``evaluate`` from end to end on a tiny model, and what they say about bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_mlff.cli import main
from openmm_mlff.data.datasets import split_dataset, write_dataset
from openmm_mlff.data.files import sha256_of
from openmm_mlff.data.formats import read_structures, write_structures
from openmm_mlff.data.model_file import load_card
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential, save_potential

RECIPE = {
    "seed": 4,
    "batch_size": 4,
    "model": {"num_features": 8, "num_basis_functions": 8, "num_modules": 1, "num_random_features": 8},
    "loop": {"steps": 6, "validate_every": 3, "warmup_steps": 1},
    "loss": {"energy": 1.0, "forces": 1.0, "dipole": 0.1},
}


def molecules(n: int) -> list[Structure]:
    """Distorted water with arbitrary labels, two charges, eight groups."""
    rng = np.random.default_rng(0)
    reference = np.array([[0.0, 0.0, 0.0], [0.97, 0.0, 0.0], [-0.243, 0.939, 0.0]])
    return [
        Structure(
            np.array([8, 1, 1]), reference + rng.normal(0, 0.05, (3, 3)), charge=i % 2, multiplicity=1 + i % 2,
            energy=float(rng.normal()), forces=rng.normal(size=(3, 3)), dipole=rng.normal(size=3), group=f"g{i // 4}",
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset (data), a recipe and a finished run (run)."""
    folder = tmp_path_factory.mktemp("train")
    write_dataset(folder / "data", molecules(32), name="waters", method={"method": "random"}, sampling={})
    split_dataset(folder / "data", {"train": 0.5, "valid": 0.25, "test": 0.25}, seed=1)
    (folder / "recipe.json").write_text(json.dumps(RECIPE), encoding="utf-8")
    assert main(command(folder, "run", "--name", "tiny-water")) == 0
    return folder


def command(folder: Path, output: str, *more: str, config: bool = True) -> list[str]:
    arguments = ["train", "--data", str(folder / "data"), "--output", str(folder / output), "--quiet", *more]
    return [*arguments, "--config", str(folder / "recipe.json")] if config else arguments


def test_a_run_leaves_everything_behind(run: Path) -> None:
    names = {"config.json", "checkpoint.pt", "history.csv", "history.json", "loss.png", "model.safetensors"}
    names |= {f"{split}_{what}" for split in ("valid", "test") for what in ("errors.json", "parity.png")}
    assert {p.name for p in (run / "run").iterdir()} == names
    config = json.loads((run / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["recipe"]["seed"] == config["recipe"]["loop"]["seed"] == 4
    assert config["recipe"]["loop"]["optimizer"] == "adamw"


def test_the_card_says_what_the_model_was_made_from(run: Path) -> None:
    card = load_card(run / "run" / "model.safetensors")
    data = card["training_data"]
    shard = next(iter((run / "data" / "shards").iterdir()))
    assert data["sources"][0]["shards"] == {shard.name: sha256_of(shard)}
    recorded = json.loads((run / "data" / "card.json").read_text(encoding="utf-8"))["splits"]["groups"]
    assert data["groups"] == {name: recorded[name] for name in ("train", "valid", "test")}
    assert data["structures"] == {"train": 16, "valid": 8, "test": 8}
    assert card["name"] == "tiny-water" and card["elements"] == [1, 8] and card["training"]["seed"] == 4
    errors = json.loads((run / "run" / "test_errors.json").read_text(encoding="utf-8"))
    assert card["accuracy"]["test"] == {"units": errors["units"], **errors["tables"]["all"][0]}


def test_evaluate_agrees_with_numpy(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_path = run / "run" / "model.safetensors"
    arguments = ["evaluate", "--model", str(model_path), "--data", str(run / "data"), "--split", "test"]
    assert main([*arguments, "--output", str(tmp_path), "--by", "charge", "--precision", "double"]) == 0
    assert "MAE by charge" in capsys.readouterr().out
    report = json.loads((tmp_path / "evaluation_errors.json").read_text(encoding="utf-8"))
    model = load_potential(model_path).double()
    split = json.loads((run / "data" / "card.json").read_text(encoding="utf-8"))["splits"]["groups"]["test"]
    structures = [s for s in molecules(32) if s.group in split]
    energy, force, dipole = [], [], []
    for s in structures:
        e, f = model.energy_and_forces(s)
        mu = model(model.batch(s)).dipole[0].numpy()
        energy.append((e - s.energy) / 3)
        force.append(f - s.forces)
        dipole.append(mu - s.dipole)
    row = report["tables"]["all"][0]
    for name, error in (("energy", energy), ("forces", force), ("dipole", dipole)):
        assert row[f"{name}_mae"] == pytest.approx(1e3 * np.mean(np.abs(error)), rel=1e-9)
        assert row[f"{name}_rmse"] == pytest.approx(1e3 * np.sqrt(np.mean(np.square(error))), rel=1e-9)
    charged = [i for i, s in enumerate(structures) if s.charge == 1]
    table = {r["name"]: r for r in report["tables"]["charge"]}
    assert table["+1"]["structures"] == len(charged)
    assert table["+1"]["forces_mae"] == pytest.approx(1e3 * np.mean(np.abs(np.array(force)[charged])), rel=1e-9)
    config = json.loads((tmp_path / "evaluation_config.json").read_text(encoding="utf-8"))
    assert config["model"]["sha256"] == sha256_of(model_path) and config["split"] == "test"


def test_models_side_by_side(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = {0: "vapour", 1: "ion"}
    structures = [s.replace(info={"class": classes[s.charge]}) for s in molecules(8)]
    write_dataset(tmp_path / "data", structures, name="waters", method={}, sampling={})
    first = run / "run" / "model.safetensors"
    other = load_potential(first)
    with torch.no_grad():
        other.element_bias[8, 0] += 30.0  # type: ignore[attr-defined,operator]
    save_potential(other, tmp_path / "model.safetensors")
    models = ["--model", str(first), "--model", str(tmp_path / "model.safetensors")]
    arguments = ["evaluate", *models, "--data", str(tmp_path / "data"), "--output", str(tmp_path), "--by", "class"]
    assert main([*arguments, "--precision", "double"]) == 0
    shown = capsys.readouterr().out
    assert "MAE of the models by class" in shown and "vapour" in shown
    report = json.loads((tmp_path / "evaluation_models.json").read_text(encoding="utf-8"))
    one, two = report["models"]
    assert one == "run-model" and two == f"{tmp_path.name}-model"
    alone = json.loads((tmp_path / f"evaluation_{two}_errors.json").read_text(encoding="utf-8"))
    table = {row["name"]: row for row in report["tables"]["class"]}
    assert set(table) == {"vapour", "ion"} and table["ion"]["structures"] == 4
    model = load_potential(tmp_path / "model.safetensors").double()
    for row in alone["tables"]["class"]:
        found = table[row["name"]]
        assert found[two]["energy_mae"] == row["energy_mae"]
        picked = [s for s in structures if s.info["class"] == row["name"]]
        errors = [model.energy_and_forces(s)[0] - s.energy for s in picked]
        assert found[two]["energy_mae"] == pytest.approx(1e3 * np.mean(np.abs(errors)) / 3, rel=1e-9)
        # 30 eV for one of three atoms, more than any error of the first model, and forces are the same
        assert 0 < found[two]["energy_mae"] - found[one]["energy_mae"] <= 1e4 + 1e-6
        assert found[two]["forces_mae"] == pytest.approx(found[one]["forces_mae"], rel=1e-9)
    assert main([*arguments[:-1], "colour"]) == 1
    assert "key: expected one of all, formula, charge, multiplicity, group, class" in capsys.readouterr().err


def test_evaluate_reads_files(run: Path, tmp_path: Path) -> None:
    write_structures(tmp_path / "w.extxyz", molecules(4))
    model = str(run / "run" / "model.safetensors")
    assert main(["evaluate", "--model", model, "--data", str(tmp_path / "w.extxyz"), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "evaluation_errors.json").read_text(encoding="utf-8"))
    assert report["tables"]["all"][0]["structures"] == len(read_structures(tmp_path / "w.extxyz"))


def test_training_goes_on_from_a_model(run: Path) -> None:
    model = run / "run" / "model.safetensors"
    assert main(command(run, "tuned", "--init", str(model), "--steps", "2", "--learning-rate", "1e-9")) == 0
    tuned, first = load_potential(run / "tuned" / "model.safetensors"), load_potential(model)
    for (name, a), b in zip(tuned.named_parameters(), first.parameters(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-7, err_msg=name)
    config = json.loads((run / "tuned" / "config.json").read_text(encoding="utf-8"))
    assert config["init"] == {"file": "model.safetensors", "sha256": sha256_of(model)}
    assert main(command(run, "tuned", "--resume", config=False)) == 0


def test_labels_of_another_method_need_energies_of_their_elements(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Energies on the scale of another method are refused, unless what the elements differ by is fitted first."""
    model = run / "run" / "model.safetensors"
    of_element = {1: -13.0, 8: -2000.0}
    shifted = [s.replace(energy=(s.energy or 0.0) + sum(of_element[int(z)] for z in s.numbers)) for s in molecules(32)]
    write_dataset(run / "other", shifted, name="other", method={}, sampling={})
    split_dataset(run / "other", {"train": 0.6, "valid": 0.4}, seed=1)
    begin = [
        "train",
        "--data",
        str(run / "other"),
        "--config",
        str(run / "recipe.json"),
        "--quiet",
        "--init",
        str(model),
    ]
    begin += ["--steps", "1", "--learning-rate", "1e-9"]
    assert main([*begin, "--output", str(run / "refused")]) == 1
    assert "eV/atom away from the model's" in capsys.readouterr().err
    assert main([*begin, "--output", str(run / "moved"), "--set", "fit_energies=true"]) == 0
    moved, first = load_potential(run / "moved" / "model.safetensors"), load_potential(model)
    for s in shifted[:3]:
        difference = moved.energy_and_forces(s)[0] - first.energy_and_forces(s)[0]
        assert difference == pytest.approx(sum(of_element[int(z)] for z in s.numbers), abs=1.5)


@pytest.mark.slow
def test_two_devices_train_what_two_processes_train(run: Path) -> None:
    """Fabric's processes and those of `ParallelLoss` add up the same parts; sizes are mixed in every batch."""
    three = [
        s.replace(numbers=np.array([8, 1]), positions=s.positions[:2], forces=s.forces[:2], charge=-1, multiplicity=1)
        for s in molecules(8)
    ]
    data = run / "mixed"
    write_dataset(data, [*molecules(24), *[s.replace(group="g6") for s in three]], name="m", method={}, sampling={})
    split_dataset(data, {"train": 0.6, "valid": 0.4}, seed=1)
    content = RECIPE | {"batch_atoms": 20, "batch_size": 8, "threads": 1, "native": True}
    (run / "devices.json").write_text(json.dumps(content), encoding="utf-8")
    (run / "processes.json").write_text(json.dumps(content | {"processes": 2}), encoding="utf-8")
    arguments = ["train", "--data", str(data), "--quiet", "--config"]
    command = [sys.executable, "-m", "openmm_mlff", *arguments, str(run / "devices.json"), "--devices", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--output", str(run / "devices")], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert main([*arguments, str(run / "processes.json"), "--output", str(run / "processes")]) == 0
    found, expected = (load_potential(run / n / "model.safetensors").state_dict() for n in ("devices", "processes"))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    curves = [json.loads((run / n / "history.json").read_text(encoding="utf-8")) for n in ("devices", "processes")]
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    for a, b in zip(*curves, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def test_options_of_the_recipe_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(run, "set", "--set", "batch_atoms=9", "--set", "loop.steps=1")) == 0
    recipe = json.loads((run / "set" / "config.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["batch_atoms"] == 9 and recipe["trainer"] == {}
    assert main(command(run, "set2", "--set", "proceses=2")) == 1
    assert "no option is called 'proceses'; did you mean 'processes'" in capsys.readouterr().err


def test_a_run_in_pieces(run: Path) -> None:
    assert main(command(run, "pieces", "--time-limit", "0")) == 130
    assert main(command(run, "pieces", "--resume", config=False)) == 0
    found, expected = (load_potential(run / n / "model.safetensors").state_dict() for n in ("pieces", "run"))
    assert all(bool((found[name] == value).all()) for name, value in expected.items())


def test_a_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(run, "run")) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_resume_refuses_other_data_and_options(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(run, "run", "--resume", "--steps", "9", config=False)) == 1
    assert "the run has its own recipe" in capsys.readouterr().err
    write_dataset(tmp_path / "data", molecules(28), name="waters", method={"method": "random"}, sampling={})
    split_dataset(tmp_path / "data", {"train": 0.5, "valid": 0.25, "test": 0.25}, seed=1)
    arguments = ["train", "--data", str(tmp_path / "data"), "--output", str(run / "run"), "--resume", "--quiet"]
    assert main(arguments) == 1
    assert "resume: the data differ from those of the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_featurs": 8}}, "model: spookynet has no option 'num_featurs'; did you mean 'num_features'"),
        ({"family": "spokynet"}, "did you mean 'spookynet'"),
        ({"loss": {"charges": 1.0}}, "charges has a weight above 0, but no structure in train has a label for it"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_atoms": 0}, "batch_atoms: expected at least 1, got 0"),
        ({"batch_atoms": 9, "compile": True}, "compile: graphs are made for batches of one kind"),
    ],
)
def test_bad_recipes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | change), encoding="utf-8")
    arguments = ["train", "--data", str(run / "data"), "--output", str(tmp_path / "run"), "--quiet"]
    assert main([*arguments, "--config", str(tmp_path / "recipe.json")]) == 1
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(command(run, "gpu", "--device", "cuda")) == 1
    assert "device: expected a CUDA device, found none" in capsys.readouterr().err


def test_bad_models(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, message in (("nowhere.safetensors", "model: no file at"), ("spookynett", "did you mean 'spookynet'")):
        assert main(["evaluate", "--model", model, "--data", str(run / "data"), "--output", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


def test_missing_packages_name_the_extra(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert main(command(run, "other")) == 1
    assert "pip install 'openmm-mlff[train]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    model = str(run / "run" / "model.safetensors")
    assert main(["evaluate", "--model", model, "--data", str(run / "data"), "--output", str(run / "e")]) == 1
    assert "pictures need the package matplotlib" in capsys.readouterr().err
