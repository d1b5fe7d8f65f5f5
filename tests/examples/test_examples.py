"""The examples run as they stand, with small settings, each in an interpreter of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mdtraj
import pytest

from openmm_mlff.potentials.family import find_family


def run(repository: Path, name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(repository / "examples" / name), *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", timeout=300, env=os.environ | environment, check=False,
    )  # fmt: skip


def test_every_example_has_a_number_of_its_own(repository: Path) -> None:
    scripts = [path.name for path in (repository / "examples").glob("*.py")]
    numbers = sorted(name.split("_")[0] for name in scripts)
    assert len(numbers) >= 7 and all(re.fullmatch(r"\d\d", number) for number in numbers)
    assert len(set(numbers)) == len(numbers)


def test_first_simulation(repository: Path, shared: Path, tmp_path: Path) -> None:
    shipped = find_family("spookynet").bundled[0]
    model = shipped.name if shipped.path.is_file() else shared / "models" / "spookynet_parameters.pth"
    trajectory = tmp_path / "t.dcd"
    done = run(repository, "01_first_simulation.py", "--model", model, "--steps", 40, "--output", trajectory)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert [int(row[0]) for row in rows] == list(range(4, 44, 4))
    temperatures = [float(row[2]) for row in rows]
    # half of what the minimised molecule starts with goes into its bonds
    assert all(80 < t < 450 for t in temperatures)
    pdb = repository / "examples" / "recipes" / "capped_alanine.pdb"
    assert len(mdtraj.load(str(trajectory), top=str(pdb))) == 20


def test_charge_and_spin(repository: Path, shared: Path) -> None:
    path = shared / "models" / "spookynet_parameters.pth"
    done = run(repository, "02_charge_and_spin.py", "--model", path)
    assert done.returncode == 0, done.stderr
    gaps = {m[1]: float(m[2]) for m in re.finditer(r"^  (CH2|O2) +([+-][\d.]+) eV", done.stdout, re.MULTILINE)}
    # vertical gaps of the published program at other geometries: 0.99 and 0.97 eV, singlet below triplet
    assert gaps["CH2"] == pytest.approx(0.99, abs=0.15) and gaps["O2"] == pytest.approx(0.97, abs=0.15)
    assert "2S+1 must be one of 1, 3, 5" in done.stdout
    charges = [float(x) for x in re.findall(r"of all ([+-][\d.]+) e", done.stdout)]
    assert charges == [0.0, -1.0]
    reaction = re.search(r"^  ([+-][\d.]+) eV \(experiment", done.stdout, re.MULTILINE)
    assert reaction is not None and float(reaction[1]) < 0


def test_a_missing_model_is_explained(repository: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path)
    done = run(repository, "02_charge_and_spin.py", OPENMM_MLFF_CACHE=nowhere, OPENMM_MLFF_SHARED=nowhere)
    assert done.returncode == 1 and "openmm-mlff models fetch spookynet-published" in done.stderr
    done = run(repository, "02_charge_and_spin.py", "--model", tmp_path / "none.pth")
    assert done.returncode == 1 and "There is no file at" in done.stderr


def test_coarse_grained_gdml(repository: Path, tmp_path: Path) -> None:
    small = ("--metadynamics", 60, "--trajectories", 2, "--duration", 60, "--inducing", 30, "--runs", 4)
    done = run(repository, "03_coarse_grained_gdml.py", *small, "--picoseconds", 3, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    errors = re.search(r"([\d.]+) eV²/Å² by priors alone, ([\d.]+) with the model", done.stdout)
    assert errors is not None and float(errors[2]) < float(errors[1])
    handedness = re.search(r"chiral volume at CA: (-?[\d.]+)", done.stdout)
    assert handedness is not None and float(handedness[1]) > 0.3
    beads = mdtraj.load(str(tmp_path / "beads.dcd"), top=str(tmp_path / "beads.pdb"))
    assert beads.n_frames == 12 and [a.name for a in beads.topology.atoms] == ["C", "N", "CA", "CB", "C", "N"]
    # the peptide bonds stay near 1.34 angstrom
    assert abs(mdtraj.compute_distances(beads, [[0, 1], [4, 5]]).mean() - 0.134) < 0.01


def test_led(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "04_led.py", "--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    frames = re.search(r"alternation: (\d+) latent frames and (\d+) of MD, (\d+) returns", done.stdout)
    assert frames is not None
    latent, dynamic, returns = (int(n) for n in frames.groups())
    # 350 frames, 20 of them warm-up; 10 of MD after 100 latent ones, or earlier where the model is in doubt
    assert latent + dynamic == 330 and 3 <= returns <= 12 and latent >= 200
    gain = re.search(r"([\d.]+) times as fast as MD alone; the bound is 1 \+ rho = ([\d.]+)", done.stdout)
    assert gain is not None and float(gain[2]) == pytest.approx(1 + latent / dynamic, abs=0.06)
    assert 0 < float(gain[1]) <= float(gain[2])
    pdb = repository / "examples" / "recipes" / "capped_alanine.pdb"
    solute = mdtraj.load(str(tmp_path / "alternation.dcd"), top=str(pdb))
    assert len(solute) == 35
    # decoded or not, every carbonyl has its length
    assert abs(mdtraj.compute_distances(solute, [[4, 5]]).mean() - 0.123) < 0.01
    assert {p.name for p in (tmp_path / "validation").iterdir()} >= {"report.json", "torsions.png", "latent.png"}


def test_ml_mm_embedding(repository: Path, shared: Path, tmp_path: Path) -> None:
    weights = shared / "models" / "so3lr_params.npz"
    small = ("--picoseconds", 0.05, "--side", 1.9, "--output", tmp_path)
    done = run(repository, "06_ml_mm_embedding.py", "--model", weights, *small, OPENMM_CPU_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "electrostatic, mechanical" in done.stdout
    rows = re.findall(r"^  (mechanical|electrostatic) +water H at C=O ([\d.]+)", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["mechanical", "electrostatic"]
    assert all(0 <= float(row[1]) < 5 for row in rows)
    for name in ("mechanical", "electrostatic"):
        drug = mdtraj.load(str(tmp_path / f"{name}.dcd"), top=str(tmp_path / "start.pdb"))
        assert len(drug) == 2
        # the model holds the phenol and the amide together
        bonds = [[b[0].index, b[1].index] for b in drug.topology.bonds if b[0].residue.name == "DRG"]
        lengths = mdtraj.compute_distances(drug, bonds)
        assert len(bonds) == 20 and lengths.min() > 0.09 and lengths.max() < 0.165
    done = run(repository, "06_ml_mm_embedding.py", "--model", tmp_path / "none.npz")
    assert done.returncode == 1 and "There is no file at" in done.stderr
