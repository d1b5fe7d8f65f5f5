"""Rounds of active learning: what is chosen, what is left alone, and what the cards say of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.cli import main
from openmm_mlff.data.datasets import Dataset
from openmm_mlff.data.files import sha256_of
from openmm_mlff.data.reference import LabelError, TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import save_ensemble
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.sampling import selection
from openmm_mlff.sampling.collection_build import build_collection
from openmm_mlff.sampling.collection_recipe import collection_from_table
from openmm_mlff.sampling.collection_rounds import method_of, select_round, starts_of
from openmm_mlff.sampling.selection import Candidates, Committee, SelectionSettings, choose, collided, select_frames
from openmm_mlff.sampling.thermal import dynamics
from openmm_spookynet import SpookyNet, SpookyNetConfig

QUICK = {"conformers": 1, "trajectory": 2, "stride": 2, "discard": 2, "relax": 20, "shares": {"rattle": 1.0}}
TABLE: dict[str, Any] = {
    "name": "tiny",
    "seed": 2,
    "sampling": QUICK,
    "families": [
        {
            "name": "small",
            "kind": "molecule",
            "class": "neutral organic",
            "structures": 3,
            "molecules": ["O", "N", "C", {"name": "hydroxide", "smiles": "[OH-]", "class": "anion"}],
        }
    ],
    "split": {"test": {"molecules": ["N"]}},
}
SETTINGS = SelectionSettings(
    structures=4, per_group=2, temperatures=(300.0,), duration=4.0, stride=1.0, threshold=0.0, nonsense=1e3,
    difference=1e-3, seed=7,
)  # fmt: skip


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    config = SpookyNetConfig(
        num_features=8, num_modules=1, num_basis_functions=4, num_random_features=8, use_electrostatics=False,
        elements=(1, 6, 7, 8),
    )  # fmt: skip
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = SpookyNet(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # untrained output layers are zero, and all members would agree
                parameter += 0.05 * torch.randn_like(parameter)
        files.append(Path(save_potential(model.eval(), folder / f"{seed}.safetensors", licence="MIT")))
    return files


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    return build_collection(collection_from_table(TABLE), tmp_path_factory.mktemp("tiny"), progress=False)


def water(group: str = "water") -> Structure:
    x = np.array([[0.0, 0.0, 0.12], [0.76, 0.0, -0.47], [-0.76, 0.0, -0.47]])
    return Structure(np.array([8, 1, 1]), x, group=group)


def candidates(spreads: list[float], moves: list[float]) -> Candidates:
    """Waters with the first O-H bond stretched by `moves`."""
    x = np.stack([water().positions] * len(spreads))
    x[:, 1, 0] += moves
    return Candidates(x, np.array(spreads), "")


def test_the_most_uncertain_frames_are_taken_first() -> None:
    starts = [water("a"), water("b")]
    found = [candidates([0.1, 0.5, 0.3], [0.0, 0.5, 1.0]), candidates([0.2, 0.9], [0.0, 0.5])]
    settings = SelectionSettings(threshold=0.15, per_group=5, difference=0.01)
    assert choose(starts, found, settings) == ([(1, 1), (0, 1), (0, 2), (1, 0)], 0.15)
    few = SelectionSettings(structures=2, threshold=0.15, difference=0.01)
    assert choose(starts, found, few)[0] == [(1, 1), (0, 1)]


def test_groups_have_their_share_and_no_twins() -> None:
    found = [candidates([0.9, 0.8, 0.7, 0.6], [0.0, 0.001, 0.5, 1.0])]
    alike = SelectionSettings(threshold=0.0, per_group=5, difference=0.05)
    assert choose([water()], found, alike)[0] == [(0, 0), (0, 2), (0, 3)]
    capped = SelectionSettings(threshold=0.0, per_group=1, difference=0.0)
    assert choose([water("a")] * 2, found * 2, capped)[0] == [(0, 0)]
    assert choose([water("a"), water("b")], found * 2, capped)[0] == [(0, 0), (1, 0)]


def test_without_a_threshold_the_most_uncertain_quarter_is_asked_for() -> None:
    spreads = np.linspace(0.0, 1.0, 101).tolist()
    taken, threshold = choose(
        [water()], [candidates(spreads, spreads)], SelectionSettings(per_group=1000, difference=0.0)
    )
    assert threshold == pytest.approx(0.75) and len(taken) == 26


def test_collisions_are_seen() -> None:
    assert not collided(water().numbers, water().positions)
    squeezed = water().positions.copy()
    squeezed[1] = squeezed[0] + [0.5, 0.0, 0.0]
    assert collided(water().numbers, squeezed)


def test_a_committee_drives_with_the_mean_of_its_members(members: list[Path]) -> None:
    committee = Committee(tuple(map(str, members)))
    energy, forces = committee.driver(water())(water().positions)
    each = [load_potential(file).energy_and_forces(water()) for file in members]
    assert energy == pytest.approx(np.mean([e for e, _ in each]), abs=1e-5)
    np.testing.assert_allclose(forces, np.mean([f for _, f in each], axis=0), atol=1e-5)
    with pytest.raises(ValueError, match="at least two models"):
        Committee((str(members[0]),)).load()


def test_a_round_labels_what_the_members_disagree_on(dataset: Dataset, members: list[Path], tmp_path: Path) -> None:
    data = shutil.copytree(dataset.path, tmp_path / "data")
    made = select_round(data, members, tmp_path / "round-1", SETTINGS, starts=4, progress=False)
    assert 0 < len(made) <= 4
    trained = set(dataset.splits["train"])
    for s in made:
        # the molecule held out for the test is never explored
        assert s.group in trained and "small-" in s.group and s.info["split"] == "train"
        assert s.info["source"] == "selected" and s.info["class"] in ("neutral organic", "anion")
        again = TBLite().label(s)
        assert s.energy == pytest.approx(again.energy, abs=1e-9)
        forces = np.stack([load_potential(file).energy_and_forces(s)[1] for file in members])
        spread = np.sqrt(forces.var(axis=0, ddof=1).sum(axis=-1)).max()
        assert s.info["spread"] == pytest.approx(spread, rel=1e-2) and spread > 1e-3
    made.verify()
    entry = made.card["round"]
    assert entry["structures"] == len(made) and entry["trajectories"] == 4 and entry["candidates"] == 16
    assert [m["sha256"] for m in entry["models"]] == [sha256_of(file) for file in members]
    (listed,) = Dataset(data).card["rounds"]
    assert listed["name"] == "round-1" and listed["card_sha256"] == sha256_of(tmp_path / "round-1" / "card.json")
    # building the dataset again keeps what its card says of rounds
    assert build_collection(collection_from_table(TABLE), data, progress=False).card["rounds"] == [listed]


def test_a_round_goes_on_where_it_stopped(dataset: Dataset, members: list[Path], tmp_path: Path) -> None:
    starts = starts_of(dataset, 3, seed=1)
    committee = Committee(tuple(map(str, members)))
    first = select_frames(starts, committee, TBLite(), tmp_path, SETTINGS, progress=False)
    shards = {p.name: p.read_bytes() for p in first.shards}
    gone = tmp_path / "candidates" / "trajectory-00001.safetensors"
    before = gone.read_bytes()
    gone.unlink()
    again = select_frames(starts, committee, TBLite(), tmp_path, SETTINGS, progress=False)
    assert gone.read_bytes() == before
    assert {p.name: p.read_bytes() for p in again.shards} == shards
    with pytest.raises(ValueError, match="starts"):
        select_frames(starts[:2], committee, TBLite(), tmp_path, SETTINGS, progress=False)


def test_a_nonsensical_start_ends_its_trajectory_and_is_counted(members: list[Path], tmp_path: Path) -> None:
    committee = Committee(tuple(map(str, members)))
    strict = SelectionSettings(temperatures=(300.0,), duration=4.0, stride=1.0, threshold=0.0, nonsense=1e-9)
    with pytest.raises(LabelError, match="not one frame of 2 trajectories"):
        select_frames([water("a"), water("b")], committee, TBLite(), tmp_path, strict, progress=False)
    found = Candidates.read(tmp_path / "candidates" / "trajectory-00000.safetensors")
    assert len(found.spreads) == 0 and "members disagree" in found.ended


def test_a_calibrated_ensemble_brings_its_own_threshold(members: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")
    open_end = replace(SETTINGS, threshold=None)
    calibration = {"force_factor": 2.0, "force_limit": 1e-4}
    file = save_ensemble(members, tmp_path / "ensemble.safetensors", calibration, licence="MIT")
    made = select_frames([water()], Committee((str(file),)), TBLite(), tmp_path / "1", open_end, progress=False)
    assert made.card["round"]["threshold"] == pytest.approx(5e-5)
    plain = select_frames(
        [water()], Committee(tuple(map(str, members))), TBLite(), tmp_path / "2", open_end, progress=False
    )
    entry = plain.card["round"]
    assert entry["threshold"] == pytest.approx(entry["spread_of_candidates"]["75 %"], abs=1e-6) and len(plain) < 4


def test_a_trajectory_that_fails_is_noted_and_the_others_go_on(
    members: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")

    def sometimes(start: Structure, *arguments: Any, **options: Any) -> Iterator[np.ndarray]:
        if start.group == "b":
            raise ValueError("no trajectory for b")
        return dynamics(start, *arguments, **options)

    monkeypatch.setattr(selection, "dynamics", sometimes)
    committee = Committee(tuple(map(str, members)))
    made = select_frames([water("a"), water("b")], committee, TBLite(), tmp_path, SETTINGS, progress=False)
    assert set(made.groups) == {"a"} and made.card["failures"]["count"] == 1
    assert "no trajectory for b" in (tmp_path / "failures.jsonl").read_text(encoding="utf-8")


def test_starts_cover_the_groups_in_turn(dataset: Dataset) -> None:
    starts = starts_of(dataset, 3, seed=3)
    assert len({s.group for s in starts}) == 3 and not any(s.numbers.tolist().count(7) for s in starts)
    assert {s.info["class"] for s in starts_of(dataset, 2, seed=1, classes=["anion"])} == {"anion"}
    with pytest.raises(ValueError, match="no frames of radical"):
        starts_of(dataset, 2, seed=1, classes=["radical"])
    assert method_of(dataset) == TBLite()


@pytest.mark.parametrize("change", [{"threshold": 9.0}, {"structures": 0}, {"temperatures": ()}, {"difference": -1.0}])
def test_settings_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        SelectionSettings(**change)


def test_the_commands_build_and_select(members: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")
    pytest.importorskip("yaml", reason="needs PyYAML (extra 'label')")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(TABLE), encoding="utf-8")
    data = tmp_path / "data"
    assert main(["dataset", "build", str(recipe), str(data), "--plan"]) == 0
    assert not data.exists() and "small" in capsys.readouterr().out
    assert main(["dataset", "build", str(recipe), str(data), "--no-progress", "--scale", "0.4"]) == 0
    assert "| neutral organic |" in capsys.readouterr().out
    numbers = {"--starts": 2, "--structures": 2, "--duration": 2, "--stride": 1, "--threshold": 0, "--nonsense": 1000}
    options = ["--no-progress", *(str(word) for pair in numbers.items() for word in pair)]
    assert main(["dataset", "select", str(data), *map(str, members), "-o", str(tmp_path / "r1"), *options]) == 0
    assert "structures of 4 frames" in capsys.readouterr().out
    assert main(["dataset", "build", str(recipe), str(data), "--classes", "radical"]) != 0
    assert "radical" in capsys.readouterr().err
