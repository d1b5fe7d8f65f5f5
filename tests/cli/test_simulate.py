"""``openmm-mlff simulate`` from end to end, on a network too small to be right."""

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
import torch

from openmm_mlff import cli
from openmm_mlff.analysis.observables import read_table

RESULTS = {
    "run.json", "start.pdb", "system.xml", "checkpoint.zip", "trajectory.dcd", "log.csv", "final.pdb",
    "final_state.xml", "summary.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def alanine(repository: Path) -> str:
    return str(repository / "examples" / "recipes" / "capped_alanine.pdb")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from openmm_mlff.potentials.family import save_potential
    from openmm_spookynet import SpookyNet, SpookyNetConfig

    torch.manual_seed(0)
    config = SpookyNetConfig(
        num_features=8, num_modules=1, num_basis_functions=4, num_random_features=8, use_electrostatics=False,
        elements=(1, 6, 7, 8),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return str(save_potential(SpookyNet(config).eval(), path))


def simulate(*arguments: object) -> int:
    return cli.main(["simulate", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert simulate(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("openmm-mlff simulate: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_run_and_its_continuation(
    alanine: str, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ("--model-path", tiny_model, "--ignore-bonds", "--minimize", 5, "--report", 10, "--seed", 3)
    options += ("--timestep", 0.5, "--time", 0.02, "--torsion", "chi=10,8,6,4", "--compile", "no", "--quiet")
    assert simulate(alanine, "-o", folder, *options) == 0
    said = capsys.readouterr().out
    assert "22 of 22 particles by spookynet (C6H12N2O2, charge +0, 2S+1 = 1)" in said
    assert "40 steps of 0.5 fs (0.02 ps) NVT at 300 K on the Reference platform" in said
    assert "temperature" in said and f"results are in {folder}" in said
    assert {p.name for p in folder.iterdir()} == RESULTS
    table = read_table(folder / "log.csv")
    np.testing.assert_array_equal(table["step"], [0, 10, 20, 30, 40])
    np.testing.assert_allclose(table["time_ps"], [0, 0.005, 0.01, 0.015, 0.02])
    assert {"phi", "psi", "chi"} <= set(table)
    assert simulate("--resume", "-o", folder, "--time", 0.03, "--quiet") == 0
    assert read_table(folder / "log.csv")["step"][-1] == 60
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    assert settings["model"] == "spookynet" and settings["steps"] == 60 and settings["seed"] == 3


def test_nve_reports_its_drift(alanine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ml-region", "none", "--ensemble", "nve", "--steps", 100, "--report", 10, "--timestep", 0.5, "--quiet")
    assert simulate(alanine, "-o", tmp_path / "run", "--equilibrate", 0.1, *options) == 0
    said = capsys.readouterr().out
    assert "energy drift" in said and "meV/atom/ps" in said and "by the force field alone" in said


def test_bad_input_is_one_line(
    alanine: str, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("-o", tmp_path / "run")
    assert "no file at nothing.pdb" in refused(capsys, "nothing.pdb", *out, "--ml-region", "none")
    assert "expected a PDB or mmCIF file" in refused(capsys, *out)
    assert "no run.json" in refused(capsys, "--resume", *out)
    assert "model-path: no file at x.pth" in refused(capsys, alanine, *out, "--model-path", "x.pth")
    assert "say --model-path" in refused(capsys, alanine, *out, "--model", tiny_model)
    assert "temperature: expected a positive number" in refused(capsys, alanine, *out, "--temperature", 0)
    assert "time: expected a time in ps" in refused(capsys, alanine, *out, "--time", -1)
    assert "torsion: expected NAME=I,J,K,L" in refused(capsys, alanine, *out, "--torsion", "phi=1,2")
    assert "must be one of 1, 3, 5" in refused(capsys, alanine, *out, "--model-path", tiny_model, "--multiplicity", 2)
    assert not (tmp_path / "run").exists()
    assert simulate(alanine, *out, "--ml-region", "none", "--steps", 0, "--quiet") == 0
    capsys.readouterr()
    assert "holds a run already" in refused(capsys, alanine, *out, "--ml-region", "none")
    message = refused(capsys, "--resume", *out, "--temperature", 310)
    assert "goes on with its own settings except --time and --steps, got 'temperature'" in message
    with pytest.raises(SystemExit):
        simulate(alanine, *out, "--steps", 1, "--time", 1)


def test_an_unphysical_run_ends_with_a_message(
    alanine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(alanine, "-o", tmp_path / "run", "--ml-region", "none", "--max-force", 1, "--quiet") == 1
    message = capsys.readouterr().err
    assert "error: production stopped near step 0: the force on atom" in message and "Traceback" not in message
    assert (tmp_path / "run" / "failure" / "system.xml").exists()


def test_ctrl_c_gives_a_checkpoint_and_the_status_of_a_shell(alanine: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "openmm_mlff", "simulate", alanine, "-o", str(folder), "--ml-region", "none"]
    process = subprocess.Popen(
        [*command, "--steps", "100000000"], stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace"
    )
    end = time.monotonic() + 60
    while not (folder / "log.csv").exists() or (folder / "log.csv").read_text(encoding="utf-8").count("\n") < 5:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped by SIGINT in production at step" in err and "Traceback" not in err
    step = int(err.split("in production at step ")[1].split(";")[0])
    assert simulate("--resume", "-o", folder, "--steps", step + 7, "--quiet") == 0
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]["steps"] == step + 7
