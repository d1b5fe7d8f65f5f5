"""Shards, splits, cards and checksums: what goes in comes out, and damage is noticed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.data.datasets import (
    Dataset,
    concatenate,
    digest,
    finish_dataset,
    split_by_group,
    split_dataset,
    write_dataset,
)
from openmm_mlff.data.shards import read_header, read_shard, write_shard
from openmm_mlff.data.structures import Structure

METHOD = {"method": "made up", "program": "none", "energy_reference": "free atoms"}


def structures(n: int = 12, seed: int = 0) -> list[Structure]:
    """Molecules and boxes of many sizes, with all, some or no labels."""
    rng = np.random.default_rng(seed)
    result = []
    for k in range(n):
        size = int(rng.integers(1, 7))
        known = rng.integers(0, 2, 5).astype(bool)
        result.append(
            Structure(
                rng.integers(1, 87, size),
                rng.normal(size=(size, 3)) * 10.0 ** rng.integers(-8, 5),
                int(rng.integers(-3, 4)),
                int(rng.integers(1, 5)),
                cell=rng.normal(size=(3, 3)) + 5 * np.eye(3) if known[0] else None,
                energy=float(rng.normal()) if known[1] else None,
                forces=rng.normal(size=(size, 3)) if known[2] else None,
                dipole=rng.normal(size=3) if known[3] else None,
                charges=rng.normal(size=size) if known[4] else None,
                group=f"group-{k % 4}",
                info={"frame": k, "angles": [1.5, -2.0], "name": "Å"},
            )
        )
    return result


def assert_same(one: Structure, other: Structure) -> None:
    for name in ("numbers", "positions", "cell", "forces", "dipole", "charges"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b)
    for name in ("charge", "multiplicity", "energy", "group", "info"):
        assert getattr(one, name) == getattr(other, name), name


def test_a_shard_gives_back_every_bit(tmp_path: Path) -> None:
    before = structures(40)
    write_shard(tmp_path / "a.safetensors", before, {"41": "did not converge"})
    for one, other in zip(before, read_shard(tmp_path / "a.safetensors"), strict=True):
        assert_same(one, other)
    header = read_header(tmp_path / "a.safetensors")
    assert len(header) == 40
    assert header.failures == {"41": "did not converge"}


def test_a_shard_that_is_not_finished_does_not_exist(tmp_path: Path) -> None:
    unwritable = structures(2)[0].replace(info={"not": {"json": object()}})
    with pytest.raises(TypeError):
        write_shard(tmp_path / "a.safetensors", [unwritable])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="structures: expected at least one"):
        write_shard(tmp_path / "a.safetensors", [])


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "a.safetensors"
    write_shard(path, structures())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        Dataset(tmp_path)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected a shard of format"):
        read_shard(path)
    with pytest.raises(FileNotFoundError, match="expected a dataset"):
        Dataset(tmp_path / "elsewhere")


def test_indexing_streaming_and_loading_agree(tmp_path: Path) -> None:
    before = structures(23)
    dataset = write_dataset(tmp_path, before, name="d", method=METHOD, sampling={}, shard_size=5)
    assert len(dataset.shards) == 5
    assert len(dataset) == 23
    for k, one in enumerate(before):
        assert_same(one, dataset[k])
        assert_same(one, dataset[k - 23])
    for one, other in zip(before, dataset, strict=True):
        assert_same(one, other)
    assert_same(before[7], pickle.loads(pickle.dumps(dataset))[7])
    with pytest.raises(IndexError, match="less than 23"):
        dataset[23]
    with pytest.raises(FileExistsError, match="a dataset already"):
        write_dataset(tmp_path, before, name="d", method=METHOD, sampling={})


def test_card_counts_what_is_there(tmp_path: Path) -> None:
    water = Structure(np.array([8, 1, 1]), np.eye(3), energy=-9.0, forces=np.full((3, 3), 2.0), group="water")
    ion = Structure(np.array([8, 1]), np.eye(3)[:2], charge=-1, energy=-4.0, group="hydroxide")
    card = write_dataset(tmp_path, [water, ion, ion], name="d", method=METHOD, sampling={"how": "by hand"}).card
    assert (card["n_structures"], card["n_atoms"], card["n_groups"]) == (3, 7, 2)
    assert card["elements"] == {"H": 4, "O": 3}
    assert card["formulas"] == {"H2O": 1, "HO": 2}
    assert card["charges"] == {"-1": 2, "0": 1}
    assert card["multiplicities"] == {"1": 3}
    assert card["labels"] == {"energy": 3, "forces": 1}
    assert card["ranges"]["energy_per_atom_min"] == -3.0
    assert card["ranges"]["energy_per_atom_mean"] == pytest.approx(-7 / 3)
    assert card["ranges"]["force_component_rms"] == 2.0
    assert card["units"]["forces"] == "eV/angstrom"
    assert card["sampling"] == {"how": "by hand"}
    assert card["method"] == METHOD


@pytest.mark.parametrize("seed", range(20))
def test_a_split_never_cuts_a_group(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, int(rng.integers(3, 60)))
    groups = [f"g{k}" for k, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(groups)
    fractions = {"train": 0.7, "valid": 0.2, "test": 0.1}
    split = split_by_group(groups, fractions, seed)
    members = [g for part in split.values() for g in part]
    assert sorted(members) == sorted(set(groups))
    assert all(split.values())
    for name, share in fractions.items():
        count = sum(g in set(split[name]) for g in groups)
        # whole groups: off by less than one of the largest, or one group where there are hardly any
        assert abs(count - share * len(groups)) <= sizes.max()
    assert split == split_by_group(groups, fractions, seed)


def test_another_seed_is_another_split() -> None:
    groups = [f"g{k}" for k in range(40)]
    halves = {"a": 0.5, "b": 0.5}
    assert split_by_group(groups, halves, 1) != split_by_group(groups, halves, 2)


@pytest.mark.parametrize(
    ("groups", "fractions", "message"),
    [
        (["a", "b"], {"train": 0.5, "test": 0.4}, "add up to 1"),
        (["a", "b"], {"train": 1.2, "test": -0.2}, "add up to 1"),
        (["a", "a"], {"train": 0.5, "test": 0.5}, "at least 2 groups"),
        (["a", ""], {"train": 0.5, "test": 0.5}, "without one"),
    ],
)
def test_impossible_splits_are_refused(groups: list[str], fractions: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_by_group(groups, fractions, 1)


def test_splits_are_recorded_and_selected(tmp_path: Path) -> None:
    write_dataset(tmp_path, structures(30), name="d", method=METHOD, sampling={}, shard_size=7)
    dataset = split_dataset(tmp_path, {"train": 0.75, "test": 0.25}, seed=3)
    again = Dataset(tmp_path)
    assert again.card["splits"]["seed"] == 3
    train, test = again.load("train"), again.load("test")
    assert len(train) + len(test) == 30
    assert not {s.group for s in train} & {s.group for s in test}
    assert [s.info["frame"] for s in train] == again.indices("train").tolist()
    assert again.card["splits"]["structures"] == {"train": len(train), "test": len(test)}
    with pytest.raises(ValueError, match=r"split: .* \['test', 'train'\], got 'valid'"):
        dataset.load("valid")


def test_checksums_notice_change_loss_and_addition(tmp_path: Path) -> None:
    write_dataset(tmp_path, structures(20), name="d", method=METHOD, sampling={}, shard_size=5)
    Dataset(tmp_path).verify()
    shard = tmp_path / "shards" / "block-00001.safetensors"
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"block-00001.*have changed"):
        Dataset(tmp_path).verify()
    shard.unlink()
    with pytest.raises(ValueError, match=r"block-00001.* missing"):
        Dataset(tmp_path).verify()
    shard.write_bytes(content)
    write_shard(tmp_path / "shards" / "extra.safetensors", structures(1))
    with pytest.raises(ValueError, match="does not know"):
        Dataset(tmp_path).verify()


def test_a_run_under_way_can_be_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards" / "b.safetensors", structures(3, seed=1))
    write_shard(tmp_path / "shards" / "a.safetensors", structures(2, seed=2))
    (tmp_path / "shards" / ".c.safetensors.123.tmp").write_bytes(b"half")
    dataset = Dataset(tmp_path)
    assert len(dataset) == 5
    assert dataset.card == {}
    assert dataset.splits == {}
    with pytest.raises(ValueError, match="finished dataset"):
        split_dataset(tmp_path, {"train": 0.5, "test": 0.5}, 1)


def test_failures_are_in_the_card(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards" / "a.safetensors", structures(2), {"3": "no SCF", "4": "no SCF"})
    card = finish_dataset(tmp_path, name="d", method=METHOD, sampling={}, failed_tasks={"b": "crash"}).card
    assert card["failures"] == {"count": 3, "reasons": {"no SCF": 2, "crash": 1}}


def test_datasets_of_one_method_are_joined(tmp_path: Path) -> None:
    first, second = structures(8, seed=1), [s.replace(group="other") for s in structures(5, seed=2)]
    write_dataset(tmp_path / "one", first, name="one", method=METHOD, sampling={"how": "md"})
    write_dataset(tmp_path / "two", second, name="two", method=METHOD, sampling={"how": "file"})
    joined = concatenate([tmp_path / "one", tmp_path / "two"], tmp_path / "both", "both")
    for one, other in zip(first + second, joined, strict=True):
        assert_same(one, other)
    joined.verify()
    assert joined.card["sampling"]["concatenated"] == ["one", "two"]
    assert joined.splits == {}


def test_joining_keeps_splits_and_refuses_to_mix(tmp_path: Path) -> None:
    for name, method in (("one", METHOD), ("two", METHOD), ("three", METHOD | {"method": "another"})):
        made = [s.replace(group=f"{name}-{s.group}") for s in structures(8)]
        write_dataset(tmp_path / name, made, name=name, method=method, sampling={})
        split_dataset(tmp_path / name, {"train": 0.5, "test": 0.5}, 1)
    joined = concatenate([tmp_path / "one", tmp_path / "two"], tmp_path / "both", "both")
    assert len(joined.load("train")) + len(joined.load("test")) == 16
    assert not {s.group for s in joined.load("train")} & {s.group for s in joined.load("test")}
    with pytest.raises(ValueError, match=r"method: .* differ"):
        concatenate([tmp_path / "one", tmp_path / "three"], tmp_path / "bad", "bad")
    card = json.loads((tmp_path / "two" / "card.json").read_text(encoding="utf-8"))
    card["splits"]["groups"]["train"].append(joined.splits["test"][0])
    (tmp_path / "two" / "card.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(ValueError, match="in two splits"):
        concatenate([tmp_path / "one", tmp_path / "two"], tmp_path / "bad", "bad")


def test_digest_tells_inputs_apart() -> None:
    one = structures(4)
    changed = [*one[:3], one[3].replace(charge=one[3].charge + 1)]
    moved = [*one[:3], one[3].replace(positions=one[3].positions + 1e-12)]
    assert digest(one) == digest(structures(4))
    assert len({digest(one), digest(changed), digest(moved), digest(one[:3])}) == 4
