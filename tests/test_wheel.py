"""The built wheel, installed where only its dependencies are, imports and computes an energy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from openmm.app import PDBFile

pytest.importorskip("hatchling", reason="the build backend is not installed")

#: what an editable install leaves in site-packages; hidden from the environment under test.
OWN = ("openmm_mlff", "_openmm_mlff", "__editable__", "openmm_gdml", "openmm_spookynet")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_REQUIRE_VIRTUALENV")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=repository)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a new environment: the wheel, and of the present environment everything but this project."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv/bin/python"
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(OWN) and entry.suffix != ".pth":
            (dependencies / entry.name).symlink_to(entry)
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    (Path(site_packages) / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def test_the_wheel_holds_code_weights_and_metadata(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    sources = {}
    for root in (repository, repository / "plugins"):
        for top in root.glob("openmm_*"):
            for pattern in ("*.py", "*.cpp", "*.hpp", "py.typed", "*.safetensors", "*.json", "*.pdb"):
                sources |= {str(p.relative_to(root)): p.read_bytes() for p in top.rglob(pattern)}
    assert {"openmm_mlff/py.typed", "openmm_mlff/cli/__init__.py", "openmm_spookynet/__init__.py"} <= sources.keys()
    assert {n for n in content if ".dist-info/" not in n} == sources.keys()
    assert all(content[name] == data for name, data in sources.items())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in content)
    assert sum(map(len, content.values())) < 12e6, "the wheel has grown beyond what its weights account for"


def test_every_package_imports_first_in_a_fresh_interpreter(wheel: Path, python: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packages = [n.removesuffix("/__init__.py").replace("/", ".") for n in archive.namelist() if "__init__" in n]
    assert {"openmm_mlff", "openmm_mlff.forces", "openmm_spookynet"} <= set(packages)
    inside = str(python.parent.parent)

    def first(package: str) -> None:
        where = run(python, "-P", "-c", f"import {package} as p; print(p.__file__)", cwd=tmp_path).strip()
        assert where.startswith(inside), f"{package} came from {where}"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(first, packages))


def test_the_command_line_is_installed(python: Path, tmp_path: Path) -> None:
    import openmm_mlff

    command = python.with_name("openmm-mlff")
    assert run(command, "--version", cwd=tmp_path).split() == ["openmm-mlff", openmm_mlff.__version__]
    assert "simulate" in run(command, "--help", cwd=tmp_path)


ENERGY = """
import json, sys
import openmm, openmmml, openmm.app as app
from openmm import unit
options, charge, multiplicity, numbers, positions = json.loads(sys.argv[1])
topology = app.Topology()
residue = topology.addResidue("MOL", topology.addChain())
for i, z in enumerate(numbers):
    topology.addAtom(f"A{i}", app.Element.getByAtomicNumber(z), residue)
system = openmmml.MLPotential(**options).createSystem(
    topology, charge=charge, multiplicity=multiplicity, precision="double", compile=False)
context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
context.setPositions([openmm.Vec3(*(0.1 * x for x in r)) for r in positions])
state = context.getState(getEnergy=True, getForces=True)
forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
print(json.dumps([state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), forces.tolist()]))
"""


def openmm_energy(python: Path, folder: Path, *arguments: object) -> tuple[float, list[list[float]]]:
    """(kJ/mol, kJ/mol/nm) of a molecule, computed by the installed wheel through openmm-ml."""
    energy, forces = json.loads(run(python, "-P", "-c", ENERGY, json.dumps(arguments), cwd=folder))
    return energy, forces


def test_energy_of_the_published_model(python: Path, shared: Path, tmp_path: Path) -> None:
    checkpoint = shared / "models/spookynet_parameters.pth"
    numbers = np.load(shared / "data/spookynet/visible.npz")
    # the largest doublet: charged, open-shell, and without the symmetry that makes a maximum ambiguous
    doublets = [k.removesuffix("_magmom") for k in numbers.files if k.endswith("_magmom") and numbers[k] == 1]
    doublet = max(doublets, key=lambda k: len(numbers[f"{k}_numbers"]))
    reference = {k: numbers[f"{doublet}_{k}"] for k in ("numbers", "positions", "charge", "energy", "forces")}
    energy, forces = openmm_energy(
        python,
        tmp_path,
        {"name": "spookynet", "modelPath": str(checkpoint)},
        int(reference["charge"]),
        2,
        reference["numbers"].tolist(),
        reference["positions"].tolist(),
    )
    ev = 96.48533212331002  # kJ/mol, exact e * N_A
    assert energy / ev == pytest.approx(float(reference["energy"]), abs=1e-7)
    assert np.array(forces) / (10 * ev) == pytest.approx(reference["forces"], abs=1e-7)


def test_energy_of_a_bundled_model(python: Path, repository: Path, tmp_path: Path) -> None:
    """Weights inside the wheel are found by name, and the forces are the gradient of the energy."""
    pdb = PDBFile(str(repository / "examples/recipes/capped_alanine.pdb"))
    numbers = [a.element.atomic_number for a in pdb.topology.atoms()]
    positions = 10 * np.array(pdb.getPositions(asNumpy=True)._value)
    model = {"name": "spookynet-ala2-gfn2"}
    _, forces = openmm_energy(python, tmp_path, model, 0, 1, numbers, positions.tolist())
    direction = np.random.default_rng(0).normal(size=positions.shape)
    h = 1e-3  # angstrom
    (up, _), (down, _) = (
        openmm_energy(python, tmp_path, model, 0, 1, numbers, (positions + s * h * direction).tolist()) for s in (1, -1)
    )
    slope = (up - down) / (2 * 0.1 * h)  # kJ/mol/nm
    assert -np.sum(np.array(forces) * direction) == pytest.approx(slope, rel=1e-4, abs=0.1)
