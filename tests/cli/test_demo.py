"""The demo: its start structure, how long it runs, and the whole of it with the published or the bundled model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import mdtraj
import numpy as np
import pytest

from openmm_mlff import cli
from openmm_mlff.analysis.observables import read_table
from openmm_mlff.cli import demo
from openmm_mlff.potentials.family import find_family


def test_the_start_is_capped_alanine_in_equilibrated_water() -> None:
    frame = mdtraj.load(str(demo.start_structure()))
    solute = frame.topology.select("not water")
    assert [str(r) for r in frame.topology.residues][:3] == ["ACE1", "ALA2", "NME3"] and len(solute) == 22
    waters = len(frame.topology.select("name O and water"))
    assert 250 < waters <= 500
    # TIP3P at 300 K and 1 bar has 0.98 g/cm^3
    assert mdtraj.density(frame)[0] / 1000.0 == pytest.approx(0.985, abs=0.02)
    # an L residue: N, C and CB turn clockwise around CA, seen from HA
    at = {a.name: frame.xyz[0, a.index] for a in frame.topology.atoms if a.residue.index == 1}
    n, c, cb, ha = (at[name] - at["CA"] for name in ("N", "C", "CB", "HA"))
    assert np.dot(np.cross(n, c), cb) > 0 and np.dot(ha, n + c + cb) < 0


def test_the_length_follows_the_speed() -> None:
    assert demo.affordable_steps(50.0, 120.0) == 6000
    assert demo.affordable_steps(50.7, 120.0) == 6000
    assert demo.affordable_steps(0.1, 10.0) == demo.CHECKPOINT
    assert demo.affordable_steps(1e6, 1e6) == demo.LONGEST


def test_only_the_files_of_a_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "failure").mkdir()
    for name in ("run.json", "log.csv", "failure/state.xml", "mine.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    demo.remove_run(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["failure", "mine.txt"]
    demo.remove_run(tmp_path / "nothing")


def test_a_former_demo_is_told_from_another_run(tmp_path: Path) -> None:
    assert not demo.is_demo(tmp_path)
    for text, expected in (
        (json.dumps({"settings": {"input": str(demo.start_structure())}}), True),
        (json.dumps({"settings": {"input": "mine.pdb"}}), False),
        ("no json", False),
        ("[]", False),
    ):
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
        assert demo.is_demo(tmp_path) == expected


def test_the_demo_runs(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TRIAL_STEPS", 50)
    shipped = find_family("spookynet").bundled[0]
    model: list[str] = []
    if not shipped.path.is_file():
        path = shared / "models" / "spookynet_parameters.pth"
        model = ["--model", "spookynet", "--model-path", str(path)]
    assert cli.main(["demo", "--output", str(tmp_path), "--steps", "100", "--quiet", *model]) == 0
    said = capsys.readouterr().out
    assert "22 of 1105 particles" in said and "361 waters" in said and "100 steps (0.1 ps)" in said
    assert "openmm-mlff simulate --resume" in said
    table = read_table(tmp_path / "log.csv")
    assert 150 < table["temperature_K"].mean() < 450 and {"phi", "psi"} <= set(table)
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    frames = mdtraj.load(str(tmp_path / "trajectory.dcd"), top=str(tmp_path / "start.pdb"))
    assert frames.n_atoms == 1105 and demo.is_demo(tmp_path)


def test_a_bad_budget_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--output", str(tmp_path), "--seconds", "-1"]) == 1
    assert "seconds: expected a positive number" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_installs_what_a_model_needs(repository: Path) -> None:
    def plan(*arguments: str) -> str:
        # a folder that is not there, so that everything has to be made; -n only prints
        command = ["make", "-n", "VENV=no-such-venv", "demo", *arguments]
        return subprocess.run(command, cwd=repository, capture_output=True, encoding="utf-8", check=True).stdout

    plain, so3lr = plan(), plan("MODEL=so3lr", "DEMO_ARGS=--seconds 5")
    assert "--model spookynet-ala2-gfn2" in plain and "so3lr" not in plain
    assert "--model so3lr --seconds 5" in so3lr
    steps = [line.strip() for line in so3lr.splitlines()]
    weights = next(k for k, line in enumerate(steps) if line.endswith('-c constraints.txt -e ".[so3lr]"'))
    assert weights < next(k for k, line in enumerate(steps) if "openmm-mlff demo" in line)
