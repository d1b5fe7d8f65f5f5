"""Sampling for datasets: geometry of the starts, restraints outside the labels, reproducible trajectories, recipes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest

from openmm_mlff.data.reference import ASEReference, LabelError, TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.dataset_md import ReferenceForce, TrajectoryPlan, run_trajectory
from openmm_mlff.sampling.recipes import read_recipe, sample
from openmm_mlff.sampling.starts import (
    TorsionRestraint,
    bond_graph,
    set_torsion,
    torsion_angle,
    torsion_force,
    untangle,
)

pytest.importorskip("tblite.interface", reason="needs tblite (extra 'label')")

PEROXIDE = Structure(
    np.array([1, 8, 8, 1]),
    np.array([[0.95, 0.10, 0.00], [0.0, 0.0, 0.0], [0.0, 0.0, 1.45], [0.10, 0.95, 1.50]]),
)


@pytest.fixture(scope="module")
def recipe_file(repository: Path) -> Path:
    return repository / "examples" / "recipes" / "ala2_gfn2.toml"


@pytest.fixture(scope="module")
def alanine(recipe_file: Path) -> Structure:
    return read_recipe(recipe_file).plans[0].start


def plan(**changes: Any) -> TrajectoryPlan:
    settings: dict[str, Any] = {
        "name": "t",
        "split": "train",
        "start": PEROXIDE,
        "temperature": 300.0,
        "seed": 5,
        "torsions": (TorsionRestraint((0, 1, 2, 3), -60.0, 200.0),),
        "duration": 30.0,
        "discard": 10.0,
        "stride": 5.0,
    }
    return TrajectoryPlan(**(settings | changes))


def test_torsion_angles_agree_with_mdtraj(recipe_file: Path, alanine: Structure) -> None:
    frame = mdtraj.load(str(recipe_file.with_name("capped_alanine.pdb")))
    for compute, atoms in ((mdtraj.compute_phi, (4, 6, 8, 14)), (mdtraj.compute_psi, (6, 8, 14, 16))):
        indices, angles = compute(frame)
        assert indices.tolist() == [list(atoms)]
        assert torsion_angle(alanine.positions, atoms) == pytest.approx(math.degrees(angles[0, 0]), abs=1e-3)


@pytest.mark.parametrize("angle", [-179.0, -60.0, 0.0, 75.5, 180.0])
def test_set_torsion_moves_nothing_but_the_torsion(alanine: Structure, angle: float) -> None:
    bonded = bond_graph(alanine.numbers, alanine.positions)
    assert bonded.sum() == 2 * 21
    phi, psi = (4, 6, 8, 14), (6, 8, 14, 16)
    turned = set_torsion(alanine.positions, bonded, phi, angle)
    assert (torsion_angle(turned, phi) - angle + 180) % 360 - 180 == pytest.approx(0.0, abs=1e-8)
    assert torsion_angle(turned, psi) == pytest.approx(torsion_angle(alanine.positions, psi), abs=1e-8)
    lengths = [np.linalg.norm(x[:, None] - x[None], axis=-1)[bonded] for x in (alanine.positions, turned)]
    np.testing.assert_allclose(lengths[0], lengths[1], atol=1e-12)


def test_rings_and_missing_bonds_cannot_be_turned() -> None:
    corners = np.array([[0.0, 0, 0], [1.5, 0, 0], [1.5, 1.5, 0], [0, 1.5, 0]])
    ring = bond_graph(np.full(4, 6), corners)
    with pytest.raises(ValueError, match="part of a ring"):
        set_torsion(corners, ring, (0, 1, 2, 3), 30.0)
    with pytest.raises(ValueError, match="expected a bond between atoms 0 and 2"):
        set_torsion(corners, ring, (1, 0, 2, 3), 30.0)


@pytest.mark.parametrize(("phi", "psi"), [(0.0, 0.0), (75.0, -15.0), (15.0, 165.0)])
def test_clashes_are_removed_and_chirality_is_kept(alanine: Structure, phi: float, psi: float) -> None:
    bonded = bond_graph(alanine.numbers, alanine.positions)
    torsions = (TorsionRestraint((4, 6, 8, 14), phi, 1.0), TorsionRestraint((6, 8, 14, 16), psi, 1.0))
    turned = alanine.positions
    for t in torsions:
        turned = set_torsion(turned, bonded, t.atoms, t.center)
    relaxed = untangle(alanine.numbers, alanine.positions, turned, torsions)
    np.testing.assert_array_equal(bond_graph(alanine.numbers, relaxed), bonded)
    for t in torsions:
        assert abs((torsion_angle(relaxed, t.atoms) - t.center + 180) % 360 - 180) < 12.0
    distances = np.linalg.norm(relaxed[:, None] - relaxed[None], axis=-1)
    steps = np.linalg.matrix_power(bonded + np.eye(22, dtype=int), 3)
    assert distances[steps == 0].min() > 1.8
    n, ca, c, cb = relaxed[[6, 8, 14, 10]]
    # an L amino acid: the chiral volume N-C-CB about CA is positive
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 1.5


@pytest.mark.parametrize(("center", "angle"), [(30.0, 75.0), (170.0, -170.0), (-175.0, 160.0), (200.0, -150.0)])
def test_restraint_is_half_k_d_squared_around_the_circle(center: float, angle: float) -> None:
    restraint = TorsionRestraint((0, 1, 2, 3), center, 40.0)
    system = openmm.System()
    for _ in range(4):
        system.addParticle(1.0)
    system.addForce(torsion_force([restraint]))
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    bonded = bond_graph(PEROXIDE.numbers, PEROXIDE.positions)
    context.setPositions(0.1 * set_torsion(PEROXIDE.positions, bonded, (0, 1, 2, 3), angle))
    energy = context.getState(energy=True).getPotentialEnergy()._value
    difference = math.radians((angle - center + 180) % 360 - 180)
    assert energy == pytest.approx(20.0 * difference**2, rel=1e-6)


def test_openmm_sees_the_labels_energy_and_forces() -> None:
    label = TBLite().label(PEROXIDE)
    system = openmm.System()
    for _ in range(4):
        system.addParticle(1.0)
    system.addForce(openmm.PythonForce(ReferenceForce(TBLite(), PEROXIDE)))
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(0.1 * PEROXIDE.positions)
    state = context.getState(energy=True, forces=True)
    # 1 eV = 96.485332123 kJ/mol (exact SI constants)
    assert state.getPotentialEnergy()._value == pytest.approx(label.energy * 96.485332123, abs=1e-3)
    forces = state.getForces(asNumpy=True)._value / 964.85332123
    np.testing.assert_allclose(forces, label.forces, atol=2e-4)


def test_frames_stay_in_their_window_and_labels_know_nothing_of_it() -> None:
    frames = run_trajectory(plan(), TBLite())
    assert [frame.info["time_fs"] for frame in frames] == [15.0, 20.0, 25.0, 30.0]
    for frame in frames:
        assert abs(torsion_angle(frame.positions, (0, 1, 2, 3)) + 60.0) < 25.0
        assert frame.info["torsions"] == [pytest.approx(torsion_angle(frame.positions, (0, 1, 2, 3)), abs=1e-3)]
        fresh = TBLite().label(PEROXIDE.replace(positions=frame.positions))
        assert frame.energy == fresh.energy
        np.testing.assert_array_equal(frame.forces, fresh.forces)
        assert frame.info["bonds_intact"] is True
        assert (frame.group, frame.info["split"]) == ("t", "train")


def test_the_seed_decides_the_trajectory() -> None:
    one, again, other = (run_trajectory(plan(seed=seed, duration=15.0, discard=5.0), TBLite()) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one[-1].positions, again[-1].positions)
    assert np.abs(one[-1].positions - other[-1].positions).max() > 1e-3


def test_another_method_can_drive() -> None:
    (frame,) = run_trajectory(plan(duration=5.0, discard=0.0), TBLite(), driver=TBLite("GFN1-xTB"))
    assert frame.energy == TBLite().label(PEROXIDE.replace(positions=frame.positions)).energy
    (alone,) = run_trajectory(plan(duration=5.0, discard=0.0), TBLite())
    assert np.abs(alone.positions - frame.positions).max() > 1e-4


def test_a_potential_of_this_package_can_drive(shared: Path) -> None:
    driver = ASEReference(
        "openmm_mlff.forces.ase_calculator:MLFFCalculator",
        {"potential": str(shared / "models/spookynet_parameters.pth")},
        charge_keyword="charge",
        multiplicity_keyword="multiplicity",
    )
    (frame,) = run_trajectory(plan(duration=5.0, discard=0.0), TBLite(), driver=driver)
    fresh = TBLite().label(PEROXIDE.replace(positions=frame.positions))
    assert frame.energy == fresh.energy
    (alone,) = run_trajectory(plan(duration=5.0, discard=0.0), TBLite())
    assert 1e-4 < np.abs(alone.positions - frame.positions).max() < 0.5


@dataclass(frozen=True)
class Failing(TBLite):
    """Fails on the third force."""

    error: type[BaseException] = KeyboardInterrupt

    def driver(self, structure: Structure) -> Any:
        calls = []

        def energy_and_forces(positions: np.ndarray) -> tuple[float, np.ndarray]:
            calls.append(1)
            if len(calls) == 3:
                raise self.error("the reason")
            return 0.0, np.zeros((4, 3))

        return energy_and_forces


def test_an_interrupt_inside_openmm_stays_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_trajectory(plan(), Failing())


def test_a_failure_inside_openmm_keeps_its_traceback() -> None:
    with pytest.raises(openmm.OpenMMException, match=r"(?s)Traceback.*energy_and_forces.*LabelError: the reason"):
        run_trajectory(plan(), Failing(error=LabelError))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a positive number"),
        ({"stride": 5.2}, "stride: expected a whole number of time steps"),
        ({"discard": 27.0}, "discard: expected room"),
        ({"start": PEROXIDE.replace(cell=np.eye(3) * 9)}, "start: expected an open system"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_shipped_recipe_covers_the_plane_and_separates_its_splits(recipe_file: Path, alanine: Structure) -> None:
    recipe = read_recipe(recipe_file)
    windows = [p for p in recipe.plans if p.name.startswith("window")]
    cells = {tuple(int((t.center + 180) // 30) for t in p.torsions) for p in windows}
    assert len(windows) == len(cells) == 144
    assert Counter(p.temperature for p in windows) == {300.0: 36, 400.0: 36, 500.0: 36, 600.0: 36}
    assert len({p.name for p in recipe.plans}) == len({p.seed for p in recipe.plans}) == len(recipe.plans)
    tests = [p for p in recipe.plans if p.split == "test"]
    assert {p.temperature for p in tests} == {300.0, 450.0, 600.0}
    assert len(tests) >= 8
    assert not any(p.restrained for p in tests)
    again = read_recipe(recipe_file)
    assert [(p.name, p.seed, p.temperature, p.torsions) for p in recipe.plans] == [
        (p.name, p.seed, p.temperature, p.torsions) for p in again.plans
    ]
    from openmm.app import ForceField, PDBFile

    pdb = PDBFile(str(recipe_file.with_name("capped_alanine.pdb")))
    assert ForceField("amber14-all.xml").createSystem(pdb.topology).getNumParticles() == 22
    n, ca, c, cb = alanine.positions[[6, 8, 14, 10]]
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 2.0


SMALL = """
name = "peroxide"
seed = 3
[start]
smiles = "OO"
[torsions]
hooh = [2, 0, 1, 3]
[[sets]]
name = "window"
split = "train"
grid = 2
temperatures = [300, 500]
force_constant = 100
duration = 10
discard = 0
stride = 5
[[sets]]
name = "free"
split = "test"
starts = [[120]]
temperatures = [400]
duration = 5
discard = 0
stride = 5
"""


def test_a_recipe_becomes_a_dataset_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    (tmp_path / "r.toml").write_text(SMALL, encoding="utf-8")
    recipe = read_recipe(tmp_path / "r.toml")
    dataset = sample(recipe, tmp_path / "out", progress=False)
    assert dataset.card["splits"]["groups"] == {"train": ["window-000", "window-001"], "test": ["free-000"]}
    assert dataset.card["splits"]["structures"] == {"train": 4, "test": 1}
    assert dataset.card["sampling"]["recipe"]["seed"] == 3
    assert {s.group for s in dataset.load("test")} == {"free-000"}
    dataset.verify()
    lost = tmp_path / "out" / "shards" / "window-001.safetensors"
    lost.unlink()
    kept = tmp_path / "out" / "shards" / "window-000.safetensors"
    before = kept.stat().st_mtime_ns
    again = sample(recipe, tmp_path / "out", progress=False)
    assert kept.stat().st_mtime_ns == before
    assert again.card["shards"] == dataset.card["shards"]
    (tmp_path / "r.toml").write_text(SMALL.replace('smiles = "OO"', 'smiles = "SS"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe: .* was begun with"):
        sample(read_recipe(tmp_path / "r.toml"), tmp_path / "out", progress=False)
    moved = replace(recipe, plans=tuple(replace(p, start=PEROXIDE) for p in recipe.plans))
    with pytest.raises(ValueError, match=r"start_sha256: .* was begun with"):
        sample(moved, tmp_path / "out", progress=False)
    (tmp_path / "r.toml").write_text(SMALL.replace("seed = 3", "seed = 4"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe: .* was begun with"):
        sample(read_recipe(tmp_path / "r.toml"), tmp_path / "out", progress=False)


def test_a_trajectory_that_fails_is_logged_and_the_others_go_on(tmp_path: Path) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    (tmp_path / "r.toml").write_text(SMALL, encoding="utf-8")
    recipe = read_recipe(tmp_path / "r.toml")
    good = [p for p in recipe.plans if p.name != "window-000"]
    # atoms 1 and 3 of this torsion are not bonded to one another
    bad = plan(name="window-000", torsions=(TorsionRestraint((0, 1, 3, 2), 0.0, 1.0),))
    dataset = sample(replace(recipe, plans=(bad, *good)), tmp_path / "out", progress=False)
    assert set(dataset.groups) == {"window-001", "free-000"}
    assert dataset.card["failures"]["count"] == 1
    assert "expected a bond between atoms 1 and 3" in next(iter(dataset.card["failures"]["reasons"]))
    assert "window-000" in (tmp_path / "out" / "failures.jsonl").read_text(encoding="utf-8")
    with pytest.raises(LabelError, match="not one of 1 trajectories"):
        sample(replace(recipe, plans=(bad,), table={}), tmp_path / "none", progress=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 3", "sead = 3", "unknown key 'sead'; did you mean 'seed'"),
        ("seed = 3", "", "the key 'seed' is missing"),
        ("grid = 2", "", "one of grid, random and starts"),
        ("stride = 5\n[[", "stired = 5\n[[", "unknown key 'stired'; did you mean 'stride'"),
        ("[2, 0, 1, 3]", "[2, 0, 1, 4]", "four different atoms from 0 to 3"),
        ("[[120]]", "[[120, 60]]", "expected 1 torsions in every row"),
        ('name = "free"', 'name = "window"', "different name"),
        ('smiles = "OO"', 'smiles = "OO"\ncharge = 1', "2S\\+1 must be"),
        ("[torsions]", "[torsions", "expected a recipe in TOML"),
    ],
)
def test_mistakes_in_recipes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    assert old in SMALL
    (tmp_path / "r.toml").write_text(SMALL.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "r.toml")


def test_recipe_with_an_ase_calculator(tmp_path: Path) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit (extra 'label')")
    (tmp_path / "r.toml").write_text(SMALL + '[method]\ncalculator = "lj"\nkwargs = { rc = 9.0 }\n', encoding="utf-8")
    assert read_recipe(tmp_path / "r.toml").method == ASEReference("lj", {"rc": 9.0})
