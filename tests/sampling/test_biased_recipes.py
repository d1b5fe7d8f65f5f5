"""Recipes of biased runs: what is planned, what is made, and going on after a stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.sampling.biased_md import BiasMap
from openmm_mlff.sampling.biased_recipes import load_split, plan_trajectories, read_biased_recipe, sample_biased

RECIPE = """
name = "small"
seed = 7
[start]
file = "start.pdb"
[force_field]
files = ["amber99sbildn.xml", "implicit/obc2.xml"]
native_obc2 = true
[torsions]
phi = [4, 6, 8, 14]
psi = [6, 8, 14, 16]
[dynamics]
temperature = 310.0
[bias]
duration = 4.0
pace = 0.2
grid = 12
snapshot = 0.4
[[sets]]
name = "train"
split = "train"
trajectories = 2
duration = 0.4
discard = 0.2
interval = 0.1
[[sets]]
name = "free"
split = "free"
trajectories = 1
biased = false
duration = 0.2
discard = 0.2
interval = 0.1
"""


@pytest.fixture
def folder(tmp_path: Path, repository: Path) -> Path:
    source = repository / "examples" / "recipes" / "capped_alanine.pdb"
    (tmp_path / "start.pdb").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def test_run_stop_and_go_on(folder: Path) -> None:
    recipe = read_biased_recipe(folder / "recipe.toml")
    assert recipe.positions.shape == (22, 3) and recipe.dynamics.temperature == 310.0
    output = folder / "output"
    first = sample_biased(recipe, output, progress=False)
    names = ["free-000", "train-000", "train-001"]
    assert sorted(first.made) == names and not first.failed
    bias = load_file(output / "bias.safetensors")
    assert bias["bias"].shape == (12, 12) and bias["snapshots"].shape[1:] == (22, 3)
    train = load_split(output, "train")
    assert [len(t) for t in train] == [4, 4] and all(t.bias.any() for t in train)
    assert not np.array_equal(train[0].positions, train[1].positions)
    for frames in train:
        np.testing.assert_allclose(
            frames.torsions,
            dihedral(frames.positions.astype(float), np.array(list(recipe.torsions.values()))),
            atol=1e-3,
        )
    (free,) = load_split(output, "free")
    assert not free.bias.any() and not free.info["biased"]

    # one trajectory and the bias are kept, the other is made again, frame by frame the same
    (output / "frames" / "train-001.safetensors").unlink()
    before = (output / "bias.safetensors").stat().st_mtime_ns
    second = sample_biased(read_biased_recipe(folder / "recipe.toml"), output, progress=False)
    assert list(second.made) == ["train-001"] and sorted(second.kept) == names[:2]
    assert (output / "bias.safetensors").stat().st_mtime_ns == before
    assert np.array_equal(load_split(output, "train")[1].positions, train[1].positions)

    with pytest.raises(ValueError, match="split: no trajectories of split 'test'"):
        load_split(output, "test")
    (folder / "recipe.toml").write_text(RECIPE.replace("seed = 7", "seed = 8"), encoding="utf-8")
    with pytest.raises(ValueError, match="seed"):
        sample_biased(read_biased_recipe(folder / "recipe.toml"), output, progress=False)


def test_any_first_part_of_the_plan_holds_all_sets(folder: Path) -> None:
    text = RECIPE.replace("trajectories = 2", "trajectories = 8").replace("trajectories = 1", "trajectories = 4")
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    recipe = read_biased_recipe(folder / "recipe.toml")
    bias = BiasMap((recipe.torsions["phi"], recipe.torsions["psi"]), np.zeros((4, 4)))
    snapshots = np.arange(5.0)[:, None, None] + recipe.positions
    plans = plan_trajectories(recipe, bias, snapshots, "<System/>")
    assert len({p.name for p in plans}) == 12 and len({p.seed for p in plans}) == 12
    for n in (3, 6, 9):
        assert sum(p.split == "train" for p in plans[:n]) == 2 * n // 3
    for p in plans:
        starts = snapshots if p.split == "train" else recipe.positions[None]
        assert (np.abs(starts - p.start).max((1, 2)) == 0).any() and (p.bias is None) == (p.split == "free")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 7", "sead = 7", "recipe: unknown key 'sead'.*seed"),
        ("seed = 7\n", "", "recipe: the key 'seed' is missing"),
        ("seed = 7", "seed = ", "expected a recipe in TOML"),
        ("psi = [6, 8, 14, 16]\n", "", r"torsions: expected two \(the axes of the bias\), got 1"),
        ("[6, 8, 14, 16]", "[6, 8, 14, 22]", "torsions: psi expects four different atoms from 0 to 21"),
        ("temperature = 310.0", "temperature = -1", "temperature: expected a positive number, got -1"),
        ("pace = 0.2", "pase = 0.2", "bias: unknown key 'pase'"),
        ("trajectories = 2", "trajectories = 0", "trajectories: expected at least 1 in set 'train', got 0"),
        ("duration = 0.4", "duration = 0.05", "duration: expected room for one interval in set 'train'"),
        ('name = "free"', 'name = "train"', "sets: expected at least one, each with a name of its own"),
        ('split = "free"', "splits = 1", "sets: unknown key 'splits'"),
        ("amber99sbildn.xml", "tip3p.xml", "force_field: "),
        ("obc2.xml", "obc1.xml", "system: expected the OBC2 model"),
    ],
)
def test_recipes_that_cannot_be_run(folder: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    (folder / "recipe.toml").write_text(RECIPE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_biased_recipe(folder / "recipe.toml")


def test_recipe_that_is_not_there(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        read_biased_recipe(folder / "other.toml")


def test_the_recipe_in_the_repository_can_be_read(repository: Path) -> None:
    recipe = read_biased_recipe(repository / "examples" / "recipes" / "cg_ala2.toml")
    assert {s.split for s in recipe.sets} == {"train", "valid", "test", "free"}
    assert recipe.system.getNumConstraints() == 12
