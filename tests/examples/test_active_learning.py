"""examples/09_active_learning.py as it stands, with small random members and a small molecule."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openmm_mlff.potentials.ensemble import save_ensemble
from openmm_mlff.potentials.family import find_family, load_potential, save_potential

NAME = "09_active_learning.py"


@pytest.fixture
def ensemble(tmp_path: Path) -> Path:
    """Two members that know capped alanine: the bundled model with small random changes."""
    shipped = find_family("spookynet").bundled[0]
    members = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = load_potential(shipped.path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 0.003 * torch.randn_like(parameter)
        members.append(model)
    return Path(save_ensemble(members, tmp_path / "ensemble.safetensors"))


def test_new_labels_teach_the_members_the_new_molecule(repository: Path, ensemble: Path, tmp_path: Path) -> None:
    pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    small = ("--quick", "--duration", 40, "--steps", 30, "--learning-rate", 1e-3, "--labels", 5, "-j", 1)
    molecules = ("--smiles", "CC(N)=O", "--known", "--rehearse", "CC(=O)NC(C)C(=O)NC")
    words = ("--model", ensemble, *molecules, *small, "--output", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, str(repository / "examples" / NAME), *map(str, words)],
        capture_output=True, text=True, encoding="utf-8", timeout=300, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(rehearsed|new) (before|after) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [(w, t) for w in ("rehearsed", "new") for t in ("before", "after")]
    force = {row[:2]: float(row[3]) for row in rows}
    # it has learned from the peptide what bonds are, but of no primary amide
    assert (
        force["rehearsed", "before"] < 150 < force["new", "before"]
        and force["new", "after"] < 0.8 * force["new", "before"]
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["new after"]["forces"] == pytest.approx(force["new", "after"], abs=0.06)
    assert 1 <= report["labels"]["new"] <= 5 and report["exploring"]["new"] > 0
    assert (tmp_path / "run" / "active_learning.png").stat().st_size > 5000


def test_what_cannot_disagree_is_refused(
    repository: Path, ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = save_potential(next(iter(load_potential(ensemble).members.values())), tmp_path / "one.safetensors")
    for file, words in ((single, "never disagrees with itself"), (tmp_path / "none.safetensors", "There is no file")):
        monkeypatch.setattr(sys, "argv", [NAME, "--model", str(file)])
        with pytest.raises(SystemExit, match=words):
            runpy.run_path(str(repository / "examples" / NAME), run_name="__main__")
