"""``train --members`` and ``models ensemble`` from end to end, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.cli import main
from openmm_mlff.data.formats import write_structures
from openmm_mlff.data.model_file import load_card
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.training import members
from openmm_mlff.training.members import train_members
from openmm_mlff.training.recipe import Recipe

RECIPE = {
    "seed": 4,
    "batch_size": 4,
    "model": {"num_features": 8, "num_basis_functions": 8, "num_modules": 1, "num_random_features": 8},
    "loop": {"steps": 4, "validate_every": 2, "warmup_steps": 1},
    "loss": {"energy": 1.0, "forces": 1.0},
    "data": {"block_size": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distorted water with arbitrary labels and no split of its own, a recipe, and a finished run of two members."""
    folder = tmp_path_factory.mktemp("members")
    rng = np.random.default_rng(0)
    reference = np.array([[0.0, 0.0, 0.0], [0.97, 0.0, 0.0], [-0.243, 0.939, 0.0]])
    frames = [
        Structure(
            np.array([8, 1, 1]),
            reference + rng.normal(0, 0.05, (3, 3)),
            energy=float(rng.normal()),
            forces=rng.normal(size=(3, 3)),
        )
        for _ in range(40)
    ]
    write_structures(folder / "water.xyz", frames)
    (folder / "recipe.json").write_text(json.dumps(RECIPE), encoding="utf-8")
    assert (
        main([*command(folder, "run"), "--config", str(folder / "recipe.json"), "--members", "2", "--name", "w"]) == 0
    )
    return folder


def command(folder: Path, output: str) -> list[str]:
    return ["train", "--data", str(folder / "water.xyz"), "--output", str(folder / output), "--quiet"]


def test_members_share_the_split_and_differ_in_seeds(folder: Path) -> None:
    configs = [json.loads((folder / "run" / f"member-{k}" / "config.json").read_text(encoding="utf-8")) for k in (0, 1)]
    assert [c["recipe"]["seed"] for c in configs] == [4, 5] == [c["recipe"]["loop"]["seed"] for c in configs]
    assert configs[0]["data"] == configs[1]["data"] and configs[0]["data"]["split"]["seed"] == 4
    ensemble = load_potential(folder / "run" / "model.safetensors")
    assert isinstance(ensemble, Ensemble)
    singles = [load_potential(folder / "run" / f"member-{k}" / "model.safetensors") for k in (0, 1)]
    for joined, alone in zip(ensemble.members.values(), singles, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(joined.parameters(), alone.parameters(), strict=True))
    weights = [m.state_dict()["interactions.0.local.linear.weight"] for m in singles]
    assert not torch.equal(*weights)
    card = load_card(folder / "run" / "model.safetensors")
    assert card["name"] == "w" and set(card["accuracy"]) == {"valid", "test"}
    assert card["members"]["member1"]["training"]["seed"] == 5
    assert (folder / "run" / "test_errors.json").exists()


@pytest.mark.slow
def test_a_run_of_members_is_resumed_to_the_same_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the second member, against a run that was not stopped."""
    recipe = Recipe.read(folder / "recipe.json")
    data, output, train = [folder / "water.xyz"], folder / "stopped", members.train

    def killed(recipe: Recipe, data: list[Path], folder: Path, *more: Any, **options: Any) -> Any:
        if folder.name == "member-1":
            raise KeyboardInterrupt
        return train(recipe, data, folder, *more, **options)

    assert train_members(recipe, data, output, 2, progress=False, time_limit=1e-9, card={"name": "w"}) == []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(members, "train", killed)
        train_members(None, data, output, resume=True, progress=False)
    assert (output / "member-0" / "model.safetensors").exists() and not (output / "model.safetensors").exists()
    assert main([*command(folder, "stopped"), "--resume"]) == 0
    first, second = (load_potential(folder / name / "model.safetensors") for name in ("run", "stopped"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_models_are_joined(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / "run" / f"member-{k}" / "model.safetensors") for k in (0, 1)]
    output = tmp_path / "joined.safetensors"
    arguments = ["models", "ensemble", *files, "-o", str(output), "--force-factor", "1.5", "--force-limit", "0.2"]
    assert main(arguments) == 0
    assert "2 members" in capsys.readouterr().out
    config = load_potential(output).config
    assert (config.n_members, config.force_factor, config.force_limit) == (2, 1.5, 0.2)
    for given, words in (
        (arguments, "exists already"),
        (["models", "ensemble", *files, "-o", str(tmp_path / "joined.txt")], "ending in .safetensors"),
        (["models", "ensemble", files[0], "-o", str(tmp_path / "a.safetensors")], "at least two, got 1"),
        (["models", "ensemble", "no.safetensors", "-o", str(tmp_path / "a.safetensors")], "no file at no.safetensors"),
        (["models", "ensemble", files[0], files[0], "-o", str(tmp_path / "a.safetensors")], "members that differ"),
    ):
        assert main(given) == 1
        assert words in capsys.readouterr().err


def test_what_cannot_be_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(folder / "recipe.json")]
    for more, words in (
        (["run", *config, "--members", "2"], "holds a run of members already"),
        (["run", "--resume", "--members", "3"], "members: expected that of the run"),
        (["one", *config, "--members", "1"], "members: expected a whole number >= 2"),
        (["gdml", "--family", "gdml", "--members", "2"], "fitted by solving equations"),
        (["two", *config, "--members", "2", "--devices", "2"], "--devices: expected 1 with --members"),
    ):
        assert main([*command(folder, more[0]), *more[1:]]) == 1
        assert words in capsys.readouterr().err


def test_a_plan_that_was_never_begun_is_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data that is refused leaves no folder that refuses the next try."""
    given = ["train", "--output", str(folder / "again"), "--config", str(folder / "recipe.json"), "--quiet"]
    for n in ("2", "3"):
        assert main([*given, "--data", str(folder / "nothing"), "--members", n]) == 1
        assert "already" not in capsys.readouterr().err
    assert json.loads((folder / "again" / "members.json").read_text(encoding="utf-8"))["members"] == 3


def test_members_go_on_from_those_of_an_ensemble(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each from its own, at the learning rate 0 of the first step of a warm-up; killed at once, it does so again."""
    ensemble = folder / "run" / "model.safetensors"
    recipe = [
        *("--config", str(folder / "recipe.json"), "--steps", "1", "--learning-rate", "1e-30"),
        *("--init", str(ensemble), "--set", "loop.ema_decay=0.5", "--set", "loop.final_learning_rate=1e-31"),
    ]
    assert main([*command(folder, "on"), *recipe, "--members", "2"]) == 0
    before, after = load_potential(ensemble), load_potential(folder / "on" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    weights = [m.state_dict()["interactions.0.local.linear.weight"] for m in after.members.values()]
    assert not torch.equal(*weights)
    init = json.loads((folder / "on" / "member-1" / "config.json").read_text(encoding="utf-8"))["init"]
    assert init["file"] == "init-1.safetensors"
    # as if it had been killed before there was a checkpoint
    for name in ("checkpoint.pt", "model.safetensors"):
        (folder / "on" / "member-1" / name).unlink()
    (folder / "on" / "model.safetensors").unlink()
    (folder / "on" / "init-1.safetensors").unlink()
    assert main([*command(folder, "on"), "--resume"]) == 0
    again = load_potential(folder / "on" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), again.parameters(), strict=True))
    capsys.readouterr()
    assert main([*command(folder, "three"), *recipe, "--members", "3"]) == 1
    assert "init: expected an ensemble of 3 members, got one of 2" in capsys.readouterr().err
