"""Recipes say what they cannot understand, and no split cuts through a group."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.data.datasets import split_dataset, write_dataset
from openmm_mlff.data.formats import write_structures
from openmm_mlff.training.recipe import DataOptions, Recipe, load_data, load_labelled


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {"seed": 3, "loop": {"steps": 7}, "final_loss": {"energy": 2.0}, "model": {"num_modules": 2}}
    )
    assert recipe.loop.seed == 3 and recipe.final_loss.energy == 2.0
    (tmp_path / "a.json").write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
    assert Recipe.read(tmp_path / "a.json") == recipe
    (tmp_path / "a.toml").write_text(
        "seed = 3\n[loop]\nsteps = 7\n[final_loss]\nenergy = 2.0\n[model]\nnum_modules = 2\n", encoding="utf-8"
    )
    assert Recipe.read(tmp_path / "a.toml") == recipe


def test_weights_stay_as_given_unless_final_ones_are() -> None:
    assert Recipe.from_dict({"loss": {"energy": 0.3}}).final_loss is None
    assert Recipe.from_dict({"seed": 1}).final_loss.energy > Recipe.from_dict({}).loss.energy
    ramp = Recipe.from_dict({"loss": {"energy": 0.3}, "final_loss": {"energy": 0.6}})
    assert (ramp.loss.energy, ramp.final_loss.energy) == (0.3, 0.6)
    assert Recipe.from_dict(Recipe.from_dict({"loss": {"energy": 0.3}}).to_dict()).final_loss is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sed": 1}, "recipe: no option is called 'sed'; did you mean 'seed'"),
        ({"loop": {"stepps": 1}}, "loop: no option is called 'stepps'; did you mean 'steps'"),
        ({"loop": {"steps": "many"}}, r"steps: expected int in \[loop\], got 'many'"),
        ({"loop": 3}, "loop: expected a table, got 3"),
        ({"compile": 1}, r"compile: expected bool in \[recipe\], got 1"),
        ({"loss": {"energy": -1.0}}, "energy: expected a weight >= 0"),
        ({"data": {"fractions": {"train": 1.0}}}, "fractions: expected train, valid"),
        ({"data": {"block_size": 0}}, "block_size: expected at least 1, got 0"),
    ],
)
def test_misspelt_and_impossible_options_are_named(content: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(content)


def test_recipe_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config: no file"):
        Recipe.read(tmp_path / "none.toml")
    (tmp_path / "a.ini").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a file ending in"):
        Recipe.read(tmp_path / "a.ini")
    (tmp_path / "a.toml").write_text("seed = ", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config: .*a\.toml"):
        Recipe.read(tmp_path / "a.toml")


@pytest.mark.parametrize("seed", range(5))
def test_splits_never_share_a_group(waters, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    structures = [s.replace(group=f"g{rng.integers(9)}") for s in waters(60, seed)]
    write_dataset(tmp_path / "data", structures, name="w", method={"method": "analytic"}, sampling={})
    data = load_data([tmp_path / "data"], DataOptions(), seed)
    groups = {name: {s.group for s in members} for name, members in data.splits.items()}
    assert all(groups.values())
    assert not groups["train"] & groups["valid"] and not groups["train"] & groups["test"]
    assert not groups["valid"] & groups["test"]
    assert sum(len(m) for m in data.splits.values()) == 60
    assert data.description["groups"] == {name: sorted(g) for name, g in groups.items()}
    again = load_data([tmp_path / "data"], DataOptions(), seed)
    assert again.description == data.description


def test_a_recorded_split_is_kept(waters, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", waters(40, 0, groups=8), name="w", method={"method": "analytic"}, sampling={})
    recorded = split_dataset(tmp_path / "data", {"train": 0.5, "valid": 0.25, "test": 0.25}, seed=9).splits
    for seed in (0, 1):
        data = load_data([tmp_path / "data"], DataOptions(), seed)
        assert {n: sorted({s.group for s in m}) for n, m in data.splits.items()} == recorded
    structures, sources = load_labelled([tmp_path / "data"], "test")
    assert {s.group for s in structures} == set(recorded["test"])
    assert len(sources[0]["shards"]) == 1 and len(next(iter(sources[0]["shards"].values()))) == 64


def test_a_group_in_two_splits_is_refused(waters, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_dataset(tmp_path / name, waters(40, 0, groups=8), name=name, method={"method": "analytic"}, sampling={})
        split_dataset(tmp_path / name, {"train": 0.5, "valid": 0.25, "test": 0.25}, seed=seed)
    with pytest.raises(ValueError, match=r"data: the group 'g[0-7]' is in .* and in"):
        load_data([tmp_path / "a", tmp_path / "b"], DataOptions(), 0)


def test_structures_without_a_group_need_a_block_size(waters, tmp_path: Path) -> None:
    structures = [s.replace(group="") for s in waters(40, 0)]
    write_structures(tmp_path / "w.extxyz", structures)
    with pytest.raises(ValueError, match="w has structures without a group"):
        load_data([tmp_path / "w.extxyz"], DataOptions(), 0)
    data = load_data([tmp_path / "w.extxyz"], DataOptions(block_size=4), 0)
    energies = [s.energy for s in structures]
    for members in data.splits.values():
        places = sorted(int(np.argmin(np.abs(np.array(energies) - s.energy))) for s in members)
        # whole blocks of consecutive frames
        assert len(places) % 4 == 0 and all(p // 4 == places[4 * (i // 4)] // 4 for i, p in enumerate(places))


def test_broken_molecules_are_left_out(waters, tmp_path: Path) -> None:
    structures = waters(40, 0, groups=8)
    structures[3] = structures[3].replace(info={"bonds_intact": False})
    write_dataset(tmp_path / "data", structures, name="w", method={"method": "analytic"}, sampling={})
    data = load_data([tmp_path / "data"], DataOptions(), 0)
    assert sum(len(m) for m in data.splits.values()) == 39 and data.description["left_out_broken"] == 1
    assert sum(len(m) for m in load_data([tmp_path / "data"], DataOptions(intact_only=False), 0).splits.values()) == 40


def test_molecules_far_apart_join_the_training_set_alone(waters, tmp_path: Path) -> None:
    structures = [s.replace(group=f"g{i // 4}") for i, s in enumerate(waters(40, seed=0))]
    write_dataset(tmp_path / "d", structures, name="d", method={"method": "analytic"}, sampling={})
    without = load_data([tmp_path / "d"], DataOptions(), seed=1)
    found = load_data([tmp_path / "d"], DataOptions(joined=0.5), seed=1)
    n = len(without.splits["train"])
    assert len(found.splits["train"]) == n + round(0.5 * n) and found.description["joined"] == round(0.5 * n)
    assert {len(s) for s in found.splits["train"][n:]} == {6} and "joined" not in without.description
    for split in ("valid", "test"):
        assert [len(s) for s in found.splits[split]] == [len(s) for s in without.splits[split]]
    assert found.description["groups"] == without.description["groups"]
    with pytest.raises(ValueError, match="joined: expected a share >= 0"):
        DataOptions(joined=-0.1)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: expected at least one"):
        load_data([], DataOptions(), 0)
    with pytest.raises(FileNotFoundError):
        load_data([tmp_path / "none.extxyz"], DataOptions(), 0)
