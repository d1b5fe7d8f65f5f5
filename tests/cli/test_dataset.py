"""``openmm-mlff dataset`` from the outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.cli import main
from openmm_mlff.data.datasets import Dataset
from openmm_mlff.data.formats import read_structures, write_structures
from openmm_mlff.data.structures import Structure

pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")


def methanes(n: int) -> list[Structure]:
    corners = 0.63 * np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    rng = np.random.default_rng(1)
    geometry = np.concatenate([np.zeros((1, 3)), corners])
    return [Structure([6, 1, 1, 1, 1], geometry + 0.05 * rng.normal(size=(5, 3))) for _ in range(n)]


def dataset_command(*arguments: object) -> int:
    return main(["dataset", *(str(argument) for argument in arguments)])


def test_label_info_split_merge_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_structures(tmp_path / "in.extxyz", methanes(6))
    one, two, both, file = (tmp_path / name for name in ("one", "two", "both", "out.extxyz"))
    options = ("--group-by", "block:2", "--split", "train=0.6,test=0.4", "--block", 4, "--no-progress")
    assert dataset_command("label", tmp_path / "in.extxyz", "-o", one, *options) == 0
    assert "failures  0" in capsys.readouterr().out
    configuration = json.loads((one / "configuration.json").read_text(encoding="utf-8"))
    assert configuration["sampling"]["sources"][0]["input"] == "in.extxyz"
    assert Dataset(one).card["splits"]["structures"] == {"train": 4, "test": 2}
    assert dataset_command("info", one, "--verify") == 0
    assert "every shard agrees" in capsys.readouterr().out
    assert dataset_command("info", one, "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_structures"] == 6
    assert dataset_command("split", one, "--split", "a=0.3,b=0.7", "--split-seed", 9) == 0
    assert set(Dataset(one).splits) == {"a", "b"}
    write_structures(tmp_path / "more.extxyz", [s.replace(group="more") for s in methanes(2)])
    assert dataset_command("label", tmp_path / "more.extxyz", "-o", two, "--no-progress") == 0
    assert dataset_command("merge", one, two, "-o", both) == 0
    assert len(Dataset(both)) == 8
    assert dataset_command("export", both, file) == 0
    assert [s.energy for s in read_structures(file)] == pytest.approx([s.energy for s in Dataset(both)])
    assert (tmp_path / "out.extxyz.configuration.json").exists()
    labels = ("--labelled-by", "GFN2-xTB", "--energy-reference", "free atoms")
    assert dataset_command("import", file, "-o", tmp_path / "three", *labels) == 0
    assert Dataset(tmp_path / "three").card["labels"]["forces"] == 8


def test_smiles_charge_and_trajectories(tmp_path: Path, shared: Path) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    options = ("--conformers", 2, "--no-progress")
    assert dataset_command("label", "smiles:[NH4+]", "smiles:[CH3]", "-o", tmp_path / "a", *options) == 0
    found = [(s.formula, s.charge, s.multiplicity) for s in Dataset(tmp_path / "a")]
    assert found == [("H4N", 1, 1)] * 2 + [("CH3", 0, 2)] * 2
    pdb = shared / "data/alanine-dipeptide-explicit.pdb"
    options = ("--atoms", "resname ALA and name N H CA HA", "--charge", -1, "--multiplicity", 3, "--no-progress")
    assert dataset_command("label", pdb, "--topology", pdb, "-o", tmp_path / "b", *options) == 0
    assert [(s.formula, s.charge, s.multiplicity) for s in Dataset(tmp_path / "b")] == [("CH2N", -1, 3)]


def test_any_ase_calculator(tmp_path: Path) -> None:
    write_structures(tmp_path / "in.extxyz", methanes(2))
    output = str(tmp_path / "a")
    command = ["dataset", "label", str(tmp_path / "in.extxyz"), "-o", output, "--no-progress", "--calculator"]
    assert main([*command, "ase.calculators.emt:EMT"]) == 0
    dataset = Dataset(output)
    from ase import Atoms
    from ase.calculators.emt import EMT

    for s in dataset:
        molecule = Atoms(numbers=s.numbers, positions=s.positions, calculator=EMT())
        alone = sum(Atoms(numbers=[z], calculator=EMT()).get_potential_energy() for z in s.numbers)
        assert s.energy == pytest.approx(molecule.get_potential_energy() - alone, abs=1e-9)
        np.testing.assert_allclose(s.forces, molecule.get_forces(), atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.xyz"], "missing.xyz: no such file"),
        (["smiles:C1CC"], "smiles: expected a molecule, got 'C1CC'"),
        (["smiles:C", "--method", "GFN3"], "method: 'GFN3' is not one of tblite's"),
        (["smiles:C", "--solvent", "wine"], "solvent: expected one that tblite has, for example 'water', got 'wine'"),
        (["smiles:C", "--solvent", "water", "--calculator", "lj"], "--solvent: expected only without --calculator"),
        (["smiles:C", "--charge-keyword", "charge"], "--charge-keyword: expected only together with --calculator"),
        (["smiles:C", "--calculator", "nosuch:Thing"], "calculator: expected 'module:Class'"),
        (["smiles:C", "--charge", "1"], "not one of 1 structures could be labelled"),
        (["smiles:C", "--group-by", "molecule"], "by: expected 'formula'"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    assert main(["dataset", "label", *arguments, "-o", str(tmp_path / "a"), "--no-progress"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("stop", "processes", "status"),
    [(signal.SIGKILL, 1, -signal.SIGKILL), (signal.SIGINT, 2, 130)],
    ids=["kill", "Ctrl-C"],
)
def test_a_stopped_run_goes_on(tmp_path: Path, stop: signal.Signals, processes: int, status: int) -> None:
    write_structures(tmp_path / "in.extxyz", methanes(120))
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    arguments = ["dataset", "label", str(tmp_path / "in.extxyz"), "--block", "3", "--no-progress", "-o"]
    command = [sys.executable, "-m", "openmm_mlff", *arguments, str(stopped), "-j", str(processes)]
    # a group of its own, so that the signal reaches the workers too, as from a terminal
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list((stopped / "shards").glob("*.safetensors"))) < 2:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, stop)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in error
    done = {path.name: path.stat().st_mtime_ns for path in (stopped / "shards").glob("[!.]*.safetensors")}
    assert 2 <= len(done) < 40
    assert not (stopped / "card.json").exists()
    assert main([*arguments, str(stopped)]) == 0
    assert main([*arguments, str(whole)]) == 0
    assert {name: (stopped / "shards" / name).stat().st_mtime_ns for name in done} == done
    assert Dataset(stopped).card["shards"] == Dataset(whole).card["shards"]
    assert len(Dataset(stopped)) == 120
