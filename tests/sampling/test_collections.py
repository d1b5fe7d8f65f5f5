"""Recipes of many molecules: what they refuse, what they hold out, and what the datasets they make hold."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmm_mlff.data.classes import CLASSES
from openmm_mlff.data.collection_card import shards_sha256
from openmm_mlff.data.datasets import Dataset
from openmm_mlff.data.peptides import AMINO_ACID
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.shards import read_shard
from openmm_mlff.sampling.collection_build import build_collection
from openmm_mlff.sampling.collection_frames import Sampler
from openmm_mlff.sampling.collection_recipe import collection_from_table, read_collection
from openmm_mlff.sampling.collection_systems import System

pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
yaml = pytest.importorskip("yaml", reason="needs PyYAML (extra 'label')")

QUICK = {"conformers": 1, "trajectory": 2, "stride": 2, "discard": 2, "relax": 5}
SCAN = {"shares": {"scan": 1.0}}
TABLE: dict[str, Any] = {
    "name": "tiny",
    "seed": 5,
    "sampling": QUICK,
    "molecules": {"water": "[OH2:1]", "hydroxide": "[OH-:1]", "ammonium": "[NH3+][H:1]"},
    "families": [
        {
            "name": "small",
            "kind": "molecule",
            "class": "neutral organic",
            "structures": 4,
            "molecules": [
                "water",
                "CO",
                {"name": "methylene", "smiles": "[CH2]", "class": "carbene", "multiplicities": [1, 3]},
                {"name": "water-cation", "smiles": "O", "class": "radical", "charge": 1, "multiplicities": [2]},
                {"name": "sodium", "smiles": "[Na+]", "class": "cation"},
            ],
        },
        {
            "name": "wet",
            "kind": "cluster",
            "class": "ion in water",
            "structures": 3,
            "sets": [["hydroxide"], {"parts": [], "class": "water cluster", "name": "pure"}],
            "waters": [2],
        },
        {
            "name": "contact",
            "kind": "pair",
            "class": "ion pair",
            "structures": 4,
            "sets": [["ammonium", "hydroxide"]],
            "sampling": {"shares": {"dynamics": 0.5, "scan": 0.5}, "distances": [1.8, 6.0], "hold": "protons"},
        },
        {
            "name": "far",
            "kind": "apart",
            "class": "separated fragments",
            "structures": 3,
            "sets": [["ammonium", {"water": 2}]],
            "sampling": {**SCAN, "distances": [6.0, 9.0]},
        },
        {
            "name": "pulled",
            "kind": "stretch",
            "class": "bond stretch",
            "structures": 3,
            "molecules": [{"name": "water-oh", "smiles": "[OH:1][H:2]"}],
            "sampling": {**SCAN, "distances": [0.9, 1.2, 1.5], "largest_force": 60},
        },
    ],
    "split": {"test": {"molecules": ["ammonium"]}, "valid": {"systems": ["wet-pure-w2"], "molecules": ["methylene"]}},
}


def changed(**entries: Any) -> dict[str, Any]:
    return {**copy.deepcopy(TABLE), **entries}


def family(k: int, **entries: Any) -> dict[str, Any]:
    table = copy.deepcopy(TABLE)
    table["families"][k] |= entries
    return table


def by_name(table: dict[str, Any]) -> dict[str, System]:
    return {s.name: s for s in collection_from_table(table).systems}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed(sed=1), "unknown key 'sed'"),
        (changed(families=[]), "at least one system"),
        (changed(sampling={"temperature": [300]}), "'temperature'.*temperatures"),
        (changed(sampling={"temperatures": [0]}), "temperatures: expected positive"),
        (changed(sampling={"hold": "everything"}), "hold: expected one of"),
        (changed(sampling={"shares": {"dynamics": 0.5}}), "add up to 1"),
        (changed(sampling={"shares": {"dynamic": 1.0}}), "'dynamic'.*dynamics"),
        (changed(sampling={"conformers": 1.5}), "conformers to be a int, got 1.5"),
        (changed(split={"test": {"residues": ["TRP"]}}), "split: test: residues names 'TRP'"),
        (changed(split={"test": {"systems": ["wet-w3*"]}}), "'wet-w3"),
        (changed(split={"random": {"families": ["smal"]}}), "'smal'"),
        (family(0, kind="molecules"), "small"),
        (family(0, **{"class": "neutral"}), "'neutral'.*neutral organic"),
        (family(0, structures=0), "structures: expected at least 1"),
        (family(0, waters=[1]), "waters are for clusters"),
        (family(0, molecules=["C("]), "small: smiles: expected a molecule"),
        (family(0, molecules=["ACE-XXX-NME"]), "unknown part 'XXX'"),
        (family(1, sets=[["hydroxide"]], waters=[2, 2]), "'wet-hydroxide-w2' twice"),
        (family(2, sets=[["ammonium"]]), "a pair has 2 to 2 parts, got 1"),
        (family(4, sampling={"shares": {"dynamics": 1.0}}), "knows scan only"),
    ],
)
def test_bad_recipes_name_what_is_wrong(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collection_from_table(table)


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        read_collection(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a recipe in YAML"):
        read_collection(bad)


def test_splits_follow_molecules_into_every_system() -> None:
    systems = by_name(TABLE)
    assert {n for n, s in systems.items() if s.split == "test"} == {"contact-ammonium-hydroxide", "far-ammonium-2water"}
    assert {n for n, s in systems.items() if s.split == "valid"} == {
        "wet-pure-w2",
        "small-methylene-m1",
        "small-methylene-m3",
    }
    assert {s.held_out for s in systems.values() if s.split == "test"} == {"molecule"}
    whole = by_name(changed(split={"test": {"families": ["pulled"], "molecules": ["ammonium"]}}))
    assert whole["pulled-water-oh"].held_out == "family"


def test_what_a_system_is_does_not_depend_on_the_others() -> None:
    systems = by_name(TABLE)
    fewer = changed(families=TABLE["families"][:2], split={})
    assert all(systems[name].digest == s.digest for name, s in by_name(fewer).items())
    other_seed = by_name(changed(seed=6))
    assert all(systems[name].digest != s.digest for name, s in other_seed.items())
    assert systems["small-methylene-m1"].also == (3,)


def test_no_molecule_of_the_test_set_is_in_the_training_set_of_the_shipped_recipe(repository: Path) -> None:
    recipe = read_collection(repository / "examples" / "recipes" / "spookynet-gfn2-bio.yaml")
    keys: dict[str, set[str]] = {"train": set(), "valid": set(), "test": set()}
    residues: dict[str, set[str]] = {"train": set(), "valid": set(), "test": set()}
    splits: dict[str, set[str]] = {}
    for s in recipe.systems:
        keys[s.split] |= {p.key for p in s.parts}
        residues[s.split] |= {r for p in s.parts for r in p.residues}
        splits.setdefault(s.group, set()).add(s.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {"TRP", "HIS", "THR"} <= residues["test"] and not {"TRP", "HIS", "THR"} & residues["train"]
    assert not {"MET", "GLN"} & residues["train"] and {"MET", "GLN"} <= residues["valid"]
    assert residues["train"] | residues["test"] | residues["valid"] >= set(AMINO_ACID.values())
    # a single molecule of the test set that nothing but its system's name holds out would be a leak
    alone = {s.parts[0].key for s in recipe.systems if s.split == "test" and s.kind == "molecule"}
    assert not alone & keys["train"]
    tested = {s.built_class for s in recipe.systems if s.split == "test"}
    assert tested == set(CLASSES) - {"proton transfer", "singlet diradical"}
    frames = sum(s.frames for s in recipe.systems)
    assert frames > 20000
    from rdkit import Chem

    charge = {p.smiles: Chem.GetFormalCharge(Chem.MolFromSmiles(p.smiles)) for s in recipe.systems for p in s.parts}
    charges = {sum(charge[p.smiles] if p.charge is None else p.charge for p in s.parts) for s in recipe.systems}
    assert charges == {-2, -1, 0, 1, 2}
    assert {m for s in recipe.systems for m in (s.multiplicity, *s.also) if m is not None} == {1, 2, 3}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")
    folder = tmp_path_factory.mktemp("collection")
    return folder, build_collection(collection_from_table(TABLE), folder, progress=False)


def test_a_built_dataset_holds_what_the_recipe_says(built: tuple[Path, Dataset]) -> None:
    _, dataset = built
    dataset.verify()
    structures = dataset.load()
    found: dict[str, list[Any]] = {}
    for s in structures:
        found.setdefault(s.group, []).append(s)
        assert s.info["split"] in dataset.splits and s.group in dataset.splits[s.info["split"]]
        assert s.info["class"] in CLASSES and s.dipole is not None
    sizes = {group: len(members) for group, members in found.items()}
    # every third frame of a spin state is labelled in the other too: 2 x (4 + 2)
    assert sizes["small-methylene"] == 12 and sizes["small-sodium"] == 1
    assert sizes["far-ammonium-2water"] == sizes["pulled-water-oh"] == 3
    assert {s.multiplicity for s in found["small-methylene"]} == {1, 3}
    (cation,) = {(s.charge, s.multiplicity) for s in found["small-water-cation"]}
    assert cation == (1, 2)
    far = found["far-ammonium-2water"][0]
    gaps = np.linalg.norm(far.positions[:5, None] - far.positions[None, 5:], axis=-1)
    assert gaps.min() >= far.info["distance"] - 0.01 and far.charge == 1
    for s in found["pulled-water-oh"]:
        assert np.linalg.norm(s.positions[1] - s.positions[0]) == pytest.approx(0.96 * s.info["distance"], rel=0.15)
    assert {s.info["source"] for s in found["contact-ammonium-hydroxide"]} <= {"dynamics", "scan"}


def test_labels_are_those_of_the_method(built: tuple[Path, Dataset]) -> None:
    for s in built[1].load()[::7]:
        again = TBLite().label(s)
        assert s.energy == pytest.approx(again.energy, abs=1e-9)
        np.testing.assert_allclose(s.forces, again.forces, atol=1e-9)


def test_cards_count_what_is_there(built: tuple[Path, Dataset]) -> None:
    folder, dataset = built
    classes = dataset.card["collection"]["classes"]
    assert sum(row["all"] for row in classes.values()) == len(dataset)
    for name, row in classes.items():
        members = [s for s in dataset if s.info["class"] == name]
        assert row["all"] == len(members) == sum(row.get(split, 0) for split in ("train", "valid", "test"))
        rms = np.sqrt(np.mean(np.concatenate([s.forces.ravel() for s in members]) ** 2))
        assert row["force_component_rms"] == pytest.approx(rms, abs=1e-4)
    page = (folder / "card.md").read_text(encoding="utf-8")
    assert shards_sha256(dataset.card) in page and "| carbene |" in page


def test_a_second_run_makes_only_what_is_missing_or_changed(built: tuple[Path, Dataset]) -> None:
    folder, dataset = built
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in dataset.shards}
    missing = next(p for p in dataset.shards if p.name.startswith("wet-pure"))
    original = read_shard(missing)
    missing.unlink()
    grown = copy.deepcopy(TABLE)
    grown["families"][0]["molecules"].append("N")
    grown["families"][0]["molecules"].remove("CO")
    grown["split"] = {"test": {"molecules": ["ammonium"]}}
    again = build_collection(collection_from_table(grown), folder, progress=False)
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in again.shards}
    gone, new = set(before) - set(after), set(after) - set(before)
    assert len(gone) == len(new) == 1
    assert [p.name for p in (folder / "stale").iterdir()] == list(gone)
    # remade from its seed: the same frames, but no longer for validation
    remade = [s for s in again if s.group == "wet-pure-w2"]
    assert {s.info["split"] for s in original} == {"valid"} and {s.info["split"] for s in remade} == {"train"}
    for one, other in zip(original, remade, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.forces, other.forces)
    untouched = [name for name in after if name.startswith(("far", "contact", "pulled"))]
    assert untouched and all(after[name] == before[name] for name in untouched)
    assert {s.info["split"] for s in again if s.group == "small-methylene"} == {"train"}
    some = build_collection(collection_from_table(grown), folder, progress=False, classes=["carbene"])
    assert {p.name: p.read_bytes() for p in some.shards} == {name: data for name, (_, data) in after.items()}
    with pytest.raises(ValueError, match="seed"):
        build_collection(collection_from_table(changed(seed=6)), folder, progress=False)
    with pytest.raises(ValueError, match="scale"):
        build_collection(collection_from_table(grown).scaled(0.5), folder, progress=False)


def test_scale_and_classes_choose_a_part() -> None:
    recipe = collection_from_table(TABLE)
    assert sum(s.frames for s in recipe.scaled(0.5).systems) < sum(s.frames for s in recipe.systems)
    assert all(s.frames >= 1 for s in recipe.scaled(0.01).systems)
    assert {s.built_class for s in recipe.of_classes(["carbene"])} == {"carbene"}
    assert recipe.of_classes([]) == recipe.systems
    with pytest.raises(ValueError, match="scale"):
        recipe.scaled(1.5)
    with pytest.raises(ValueError, match="classes: the recipe has no 'carben'"):
        recipe.of_classes(["carben"])


def test_shares_add_up_and_large_systems_have_no_modes() -> None:
    system = by_name(TABLE)["small-water"]
    for frames in (1, 2, 7, 40):
        sampler = Sampler(replace(system, frames=frames), TBLite())
        assert sum(sampler.counts().values()) == frames
    few = replace(system, frames=40, sampling=replace(system.sampling, modes_up_to=2))
    assert "modes" not in Sampler(few, TBLite()).counts()


def test_frames_in_which_an_anion_loses_its_electron_can_be_left_out(tmp_path: Path) -> None:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")
    table = changed(families=[copy.deepcopy(TABLE["families"][3])], split={})
    far = table["families"][0]
    # GFN2-xTB leaves fluoride's electron where it is beside ammonia, and gives 0.3 e of hydroxide's to formaldehyde
    far |= {"sets": [["[F-]", "N"], ["[OH-]", "C=O"]], "structures": 2}
    kept = build_collection(collection_from_table(table), tmp_path / "kept", progress=False)
    leaks = {len(s): s.info["leak"] for s in kept}
    assert leaks[5] < 0.02 < 0.2 < leaks[6]
    far["sampling"]["largest_leak"] = 0.1
    fewer = build_collection(collection_from_table(table), tmp_path / "fewer", progress=False)
    assert {len(s) for s in fewer} == {5} and "leaked" in next(iter(fewer.card["failures"]["reasons"]))


def test_failures_are_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")
    table = changed(families=[copy.deepcopy(TABLE["families"][4])], split={})
    table["families"][0]["sampling"]["largest_force"] = 7.0
    dataset = build_collection(collection_from_table(table), tmp_path, progress=False)
    assert 0 < len(dataset) < 3
    reasons = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(reasons) == 3 - len(dataset) and all("largest_force" in entry["error"] for entry in reasons)
    assert dataset.card["failures"]["count"] == len(reasons)
