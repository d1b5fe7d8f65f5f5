"""The example of a peptide by SO3LR: what it builds, held against geometry, and the whole of it with small settings."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mdtraj
import numpy as np
import pytest

from openmm_mlff.analysis.landscapes import chiral_volume

NAME = "05_so3lr_peptide.py"


@pytest.fixture(scope="module")
def example(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("so3lr_peptide", repository / "examples" / NAME)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(repository: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(repository / "examples" / NAME), *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", timeout=300, env=os.environ | environment, check=False,
    )  # fmt: skip


def test_the_helix_is_one(example: ModuleType, repository: Path) -> None:
    topology, positions = example.peptide(15)
    frame = mdtraj.Trajectory(positions[None] / 10.0, mdtraj.Topology.from_openmm(topology))
    assert frame.n_atoms == 162 and topology.getNumBonds() == 161
    for angles, expected in ((mdtraj.compute_phi(frame), -57.0), (mdtraj.compute_psi(frame), -47.0)):
        assert len(angles[0]) == 15 and np.degrees(angles[1]) == pytest.approx(expected, abs=0.01)
    assert np.abs(np.degrees(mdtraj.compute_omega(frame)[1])) == pytest.approx(180.0, abs=0.05)
    assert "".join(mdtraj.compute_dssp(frame)[0, 1:-1]) == "C" + 13 * "H" + "C"
    # 3.6 residues and 5.4 angstrom per turn (Pauling, Corey, Branson 1951); a 3-10 helix has 2.0 angstrom and 120
    # degrees per residue, a pi helix 1.1 and 87; bends of the chain point to the axis
    step = np.diff(positions[frame.topology.select("name CA")], axis=0)
    bend = np.diff(step, axis=0)
    bend /= np.linalg.norm(bend, axis=1, keepdims=True)
    axis = np.cross(bend[:-1], bend[1:])
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    # right-handed: turning by the twist and rising along the axis go together
    assert np.sum(axis * step[1:-1], axis=1) == pytest.approx(1.5, abs=0.1)
    assert np.degrees(np.arccos(np.sum(bend[:-1] * bend[1:], axis=1))) == pytest.approx(100.0, abs=3.0)
    # nothing closer than a bond, and every residue has the hand of the L-alanine in a file from elsewhere
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1) + 9.0 * np.eye(len(positions))
    assert apart.min() > 1.0 and np.sum(apart < 1.6) == 2 * 161
    other = mdtraj.load(str(repository / "examples" / "recipes" / "capped_alanine.pdb"))
    quartet = [int(other.topology.select(f"resname ALA and name {name}")[0]) for name in ("CA", "N", "C", "CB")]
    hand = np.sign(chiral_volume(other.xyz[0], quartet))
    for k in range(1, 16):
        quartet = [int(frame.topology.select(f"resid {k} and name {name}")[0]) for name in ("CA", "N", "C", "CB")]
        assert np.sign(chiral_volume(positions, quartet)) == hand


def test_points_are_placed_by_internal_coordinates(example: ModuleType) -> None:
    a, b, c = np.random.default_rng(1).normal(size=(3, 3))
    d = example.place(a, b, c, 1.5, 110.0, -73.0)
    frame = mdtraj.Trajectory(np.array([[a, b, c, d]]), None)
    assert np.linalg.norm(d - c) == pytest.approx(1.5)
    assert np.degrees(mdtraj.compute_angles(frame, [[1, 2, 3]])[0, 0]) == pytest.approx(110.0, abs=1e-3)
    assert np.degrees(mdtraj.compute_dihedrals(frame, [[0, 1, 2, 3]])[0, 0]) == pytest.approx(-73.0, abs=1e-3)


def test_a_short_peptide_runs(repository: Path, shared: Path, tmp_path: Path) -> None:
    weights = shared / "models" / "so3lr_params.npz"
    small = ("--residues", 3, "--picoseconds", 0.02, "--frames", 8, "--minimization", 10)
    done = run(repository, "--model", weights, *small, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Ace-Ala3-NMe: 42 atoms, 41 bonds" in done.stdout
    longest = re.search(r"longest bond against its start: ([\d.]+) times", done.stdout)
    assert longest is not None and 1.0 <= float(longest[1]) < 1.25
    trajectory = mdtraj.load(str(tmp_path / "peptide.dcd"), top=str(tmp_path / "peptide.pdb"))
    assert trajectory.n_frames == 9 and trajectory.n_atoms == 42
    # it moves, and carbonyls keep their length
    assert 1e-4 < mdtraj.rmsd(trajectory, trajectory)[-1] < 0.1
    pairs = [[r.atom("C").index, r.atom("O").index] for r in trajectory.topology.residues if r.name in ("ACE", "ALA")]
    assert mdtraj.compute_distances(trajectory, pairs) == pytest.approx(0.123, abs=0.01)
    assert (tmp_path / "helix.png").stat().st_size > 5000


def test_missing_weights_are_explained(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [NAME, "--model", str(tmp_path / "none.npz"), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"There is no file at .*none\.npz"):
        example.main()
    if importlib.util.find_spec("so3krates_torch") is not None:
        pytest.skip("so3krates-torch is installed, so the weights are here")
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [NAME, "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"openmm-mlff\[so3lr\].*fetch so3lr"):
        example.main()
