"""GDML models run: against sgdml's stored predictions, a second implementation, and through OpenMM."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_gdml import evaluator, native
from openmm_gdml.model import GDMLPotential
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials import native as building
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.sampling.settings import RunSettings
from openmm_mlff.sampling.systems import build
from openmm_mlff.units import EV_PER_KCAL_PER_MOL, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

SHARED_MODELS = (
    "ala2_M180_S1",
    "ala2_M180_S27",
    "cu27_M60_S27",
    "ethanol_M200_S12",
    "ethanol_M400_S12",
    "ethanol_nosym_M200_S1",
)
# two implementations in double precision agree to about 1e-6: the coefficients reach 1e8 and cancel
LIMIT = 1e-5  # kcal/mol, kcal/mol/angstrom
ETHANOL_BONDS = [(0, 1), (0, 3), (0, 4), (0, 5), (1, 2), (1, 6), (1, 7), (2, 8)]


def files(shared: Path, name: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A model file, and sgdml's predictions for it."""
    folder = shared / "data" / "gdml"
    with np.load(folder / f"{name}_ref.npz", allow_pickle=False) as file:
        return folder / f"{name}_model.npz", dict(file)


def loaded(path: Path) -> GDMLPotential:
    model = load_potential(path)
    assert isinstance(model, GDMLPotential)
    return model


def topology_of(numbers: np.ndarray, box: np.ndarray | None = None, bonds: Any = ()) -> app.Topology:
    """One residue; `box` in angstrom."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [topology.addAtom("A", app.Element.getByAtomicNumber(int(z)), residue) for z in numbers]
    for i, j in bonds:
        topology.addBond(atoms[i], atoms[j])
    if box is not None:
        topology.setPeriodicBoxVectors([openmm.Vec3(*row) for row in box] * unit.angstrom)
    return topology


def context_of(system: openmm.System) -> openmm.Context:
    platform = openmm.Platform.getPlatformByName("Reference")
    return openmm.Context(system, openmm.LangevinMiddleIntegrator(300, 1, 0.0005), platform)


def results(context: openmm.Context, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """eV and eV/angstrom at `positions` in angstrom."""
    context.setPositions(positions * unit.angstrom)
    state = context.getState(energy=True, forces=True)
    forces = np.asarray(state.getForces(asNumpy=True)._value) / KJ_PER_MOL_NM_PER_EV_ANGSTROM
    return state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV, forces


def reduced(lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reduced box that OpenMM wants, rows in angstrom, and the rotation Q with ``r_openmm = r @ Q``."""
    q, triangular = np.linalg.qr(lattice.T)
    q = q * np.sign(np.diag(triangular))
    rows = [openmm.Vec3(*row) for row in np.tril(lattice @ q)] * unit.angstrom
    return np.array(app.internal.unitcell.reducePeriodicBoxVectors(rows).value_in_unit(unit.angstrom)), q


# -- published models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_predictions_of_sgdml(name: str, shared: Path) -> None:
    """All stored geometries, by torch and by the fused kernel."""
    path, reference = files(shared, name)
    model = loaded(path)
    cell = model.lattice_rows if model.config.periodic else None
    structures = [Structure(reference["z"], r, cell=cell) for r in reference["R"]]
    for compile in (False, True):
        run = model.evaluator(structures, compile=compile)
        energy, forces = run.arrays(reference["R"].reshape(-1, 3), cell)
        assert run.compiled is compile
        assert np.abs(energy / EV_PER_KCAL_PER_MOL - reference["E_pred"]).max() < LIMIT
        errors = forces.reshape(reference["R"].shape) / EV_PER_KCAL_PER_MOL - reference["F_pred"]
        assert np.abs(errors).max() < LIMIT


@pytest.mark.parametrize("name", ["ethanol_nosym_M200_S1", "ethanol_M200_S12", "cu27_M60_S27"])
def test_second_implementation(name: str, shared: Path, gdml_plain: ModuleType) -> None:
    """Which itself agrees with sgdml."""
    path, reference = files(shared, name)
    arrays, model = gdml_plain.arrays_of(path), loaded(path)
    cell = model.lattice_rows if model.config.periodic else None
    # the second geometry is far from those that sgdml was asked for
    distorted = reference["R"][1] + np.random.default_rng(0).normal(0.0, 0.05, reference["R"][1].shape)
    for k, r in enumerate((reference["R"][0], distorted)):
        energy, forces = gdml_plain.predict(arrays, r)
        if k == 0:
            assert abs(energy - reference["E_pred"][0]) < LIMIT
            assert np.abs(forces - reference["F_pred"][0]).max() < LIMIT
        e, f = model.energy_and_forces(Structure(reference["z"], r, cell=cell))
        assert abs(e / EV_PER_KCAL_PER_MOL - energy) < LIMIT
        assert np.abs(f / EV_PER_KCAL_PER_MOL - forces).max() < LIMIT


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("name", ["ethanol_M200_S12", "cu27_M60_S27"])
def test_predictions_through_openmm(name: str, compile: bool, shared: Path) -> None:
    """The lattice of the copper model is not reduced: box, atoms and forces are rotated."""
    path, reference = files(shared, name)
    model = loaded(path)
    box, rotation = reduced(model.lattice_rows) if model.config.periodic else (None, np.eye(3))
    if box is not None:
        assert np.abs(box - model.lattice_rows).max() > 1.0
    potential = MLPotential("sgdml", modelPath=str(path))
    context = context_of(potential.createSystem(topology_of(reference["z"], box), compile=compile))
    for r, energy, forces in zip(reference["R"][:10], reference["E_pred"], reference["F_pred"], strict=False):
        e, f = results(context, r @ rotation)
        assert abs(e / EV_PER_KCAL_PER_MOL - energy) < LIMIT
        assert np.abs(f @ rotation.T / EV_PER_KCAL_PER_MOL - forces).max() < LIMIT


# -- the fused kernel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energies", [False, True])
@pytest.mark.parametrize(("n", "n_train", "n_perms"), [(2, 1, 1), (5, 13, 6), (8, 3, 120), (12, 30, 2)])
def test_fused_kernel_equals_torch(
    n: int, n_train: int, n_perms: int, energies: bool, gdml_plain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for permutations that form no group, several batches, threads, and a lattice."""
    monkeypatch.setattr(native, "WORK_PER_THREAD", 1)
    rng = np.random.default_rng(n)
    permutations = np.stack([np.arange(n), *(rng.permutation(n) for _ in range(n_perms - 1))])
    for lattice in (None, np.diag([4.0, 5.0, 6.0]) + 0.3 * rng.normal(size=(3, 3))):
        model = gdml_plain.random_model((6,) * n, permutations, n_train, n, energies, lattice=lattice)
        kernel = model.fused_kernel(lattice)
        wrapping = None if lattice is None else torch.from_numpy(lattice)
        for size in (1, 2, 33):
            r = gdml_plain.base_of(n) + rng.normal(0.0, 0.15, (size, n, 3))
            expected_energies, expected = model.energies_and_forces(torch.from_numpy(r), wrapping)
            assert float(expected.abs().max()) > 0.1
            for threads in (1, 2):
                energy, forces = kernel(r, threads)
                np.testing.assert_allclose(energy, expected_energies, rtol=0, atol=1e-9)
                np.testing.assert_allclose(forces, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_torch_runs_without_a_compiler(
    gdml_plain: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, r = gdml_plain.random_model((8, 1, 1)), gdml_plain.base_of(3)
    expected = model.energy_and_forces(Structure(np.array([8, 1, 1]), r))
    caches = (building.library, native.library, evaluator._no_kernel)
    monkeypatch.setattr(building, "compiler", lambda: None)
    for cache in caches:
        cache.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                run = model.evaluator(Structure(np.array([8, 1, 1]), r), compile="auto")
                energy, forces = run.arrays(r)
                assert run.compiled is False
                assert energy[0] == pytest.approx(expected[0], rel=1e-13)
                np.testing.assert_allclose(forces, expected[1], atol=1e-11)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert caplog.text.count("no C++ compiler found") == 1


# -- what is refused -------------------------------------------------------------------------------------------------


def test_single_precision_is_refused(gdml_plain: ModuleType) -> None:
    model = gdml_plain.random_model((8, 1, 1))
    for lower in (model.float, model.half, lambda: model.to(torch.float32), lambda: model.to(dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="precision: GDML models run in double precision only"):
            lower()
    assert model.double().dtype == torch.float64
    with pytest.raises(ValueError, match="precision: GDML models run in double precision only"):
        MLPotential("gdml", model=model).createSystem(topology_of(np.array([8, 1, 1])), precision="single")


def test_other_atoms_are_refused(gdml_plain: ModuleType) -> None:
    potential = MLPotential("gdml", model=gdml_plain.random_model((8, 1, 1)))
    for numbers in ([8, 1], [8, 8, 1], [8, 1, 1, 1]):
        with pytest.raises(ValueError, match="elements: this model describes H2O only, in the order O H H, got"):
            potential.createSystem(topology_of(np.array(numbers)))
    with pytest.raises(ValueError, match="elements: expected atoms among H O"):
        potential.createSystem(topology_of(np.array([16, 1, 1])))


@pytest.mark.parametrize("shuffled", [[2, 1, 0, 8, 7, 6, 5, 4, 3], [0, 1, 2, 3, 4, 8, 6, 7, 5]])
def test_wrong_order_is_answered_with_the_right_one(shuffled: list[int], shared: Path) -> None:
    """Other elements, or hydrogens in wrong places; the offered list makes a mixed system with the right energy."""
    path, reference = files(shared, "ethanol_M200_S12")
    numbers, positions = reference["z"][shuffled], reference["R"][3][shuffled]
    place = {atom: k for k, atom in enumerate(shuffled)}
    bonds = [(place[i], place[j]) for i, j in ETHANOL_BONDS]
    potential = MLPotential("sgdml", modelPath=str(path))
    with pytest.raises(ValueError, match=r"elements: .* pass atoms=\[[\d, ]+\] to createMixedSystem"):
        potential.createSystem(topology_of(numbers, bonds=bonds))
    # behind two atoms of the surroundings, which have no interactions
    topology = topology_of(np.concatenate([[18, 18], numbers]), bonds=[(i + 2, j + 2) for i, j in bonds])
    system, surroundings = openmm.System(), openmm.NonbondedForce()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
        surroundings.addParticle(0.0, 0.3, 0.0)
    system.addForce(surroundings)
    with pytest.raises(ValueError, match="elements: ") as error:
        potential.createMixedSystem(topology, system, list(range(2, 11)))
    found = re.search(r"pass atoms=\[([\d, ]+)\]", str(error.value))
    assert found is not None
    atoms = [int(i) for i in found[1].split(",")]
    assert sorted(atoms) == list(range(2, 11))
    context = context_of(potential.createMixedSystem(topology, system, atoms))
    energy, forces = results(context, np.concatenate([[[0.0, 0, 20], [0, 20, 0]], positions]))
    assert abs(energy / EV_PER_KCAL_PER_MOL - reference["E_pred"][3]) < LIMIT
    expected = reference["F_pred"][3][shuffled] * EV_PER_KCAL_PER_MOL
    np.testing.assert_allclose(forces[2:], expected, rtol=0, atol=LIMIT)
    assert not forces[:2].any()


def test_atoms_in_the_right_order_are_accepted(shared: Path) -> None:
    """With bonds, without, and with one that only some training geometries have."""
    path, reference = files(shared, "ethanol_M200_S12")
    model = loaded(path)
    for bonds in (ETHANOL_BONDS, (), ETHANOL_BONDS[:3]):
        MLPotential("gdml", model=model).createSystem(topology_of(reference["z"], bonds=bonds))
    # a proton between two atoms: nearer to the first in most geometries
    left, right = np.array([1.0, 0.4, 0.6]), np.array([0.6, 0.4, 1.0])  # pairs (1,0), (2,0), (2,1): O H O
    shared_proton = GDMLPotential.from_coefficients((8, 1, 8), 1.0, np.stack([left, left, right]), np.ones((3, 3)), 0.0)
    assert shared_proton.bonds == (frozenset({(0, 1)}), frozenset({(0, 1), (1, 2)}))
    for bond in ((0, 1), (1, 2)):
        MLPotential("gdml", model=shared_proton).createSystem(topology_of(np.array([8, 1, 8]), bonds=[bond]))


def test_order_by_positions(shared: Path) -> None:
    """Structures have no bonds of their own, but distances."""
    path, reference = files(shared, "ethanol_M200_S12")
    order = [2, 0, 1, 3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match=r"take them as \[1, 2, 0, "):
        loaded(path).check(Structure(reference["z"][order], reference["R"][0][order]))


# -- boxes -----------------------------------------------------------------------------------------------------------


def test_boxes_that_do_not_fit_are_refused(shared: Path) -> None:
    path, reference = files(shared, "cu27_M60_S27")
    model = loaded(path)
    box, _ = reduced(model.lattice_rows)
    potential, numbers = MLPotential("sgdml", modelPath=str(path)), reference["z"]
    with pytest.raises(
        ValueError, match=r"trained for the lattice with lengths 7\.658 .* got the lattice with lengths"
    ):
        potential.createSystem(topology_of(numbers, 1.05 * box))
    with pytest.raises(ValueError, match=r"cell: this model was trained in a periodic lattice .* got an open one"):
        potential.createSystem(topology_of(numbers))
    ethanol, reference = files(shared, "ethanol_M200_S12")
    with pytest.raises(ValueError, match=r"cell: this model describes an open molecule, .* createMixedSystem"):
        MLPotential("sgdml", modelPath=str(ethanol)).createSystem(topology_of(reference["z"], 20 * np.eye(3)))


@pytest.mark.parametrize("how", ["barostat", "by hand"])
def test_boxes_that_change_are_refused(how: str, shared: Path) -> None:
    path, reference = files(shared, "cu27_M60_S27")
    box, rotation = reduced(loaded(path).lattice_rows)
    system = MLPotential("sgdml", modelPath=str(path)).createSystem(topology_of(reference["z"], box))
    if how == "barostat":
        system.addForce(openmm.MonteCarloBarostat(1.0, 300.0, 1))
    context = context_of(system)
    results(context, reference["R"][0] @ rotation)
    with pytest.raises(Exception, match=r"constant volume, but the box has changed .* remove the barostat"):
        if how == "barostat":
            context.getIntegrator().step(5)
        else:
            context.setPeriodicBoxVectors(*([openmm.Vec3(*row) for row in 1.001 * box] * unit.angstrom))
            context.getState(energy=True)


def test_constant_pressure_is_refused_before_a_run_of_one_lattice(tmp_path: Path) -> None:
    lattice, numbers = 15.0 * np.eye(3), (29, 29, 29)
    random = np.random.default_rng(0)
    points, coefficients = random.uniform(0.2, 0.5, (4, 3)), random.normal(size=(4, 3))
    model = GDMLPotential.from_coefficients(numbers, 10.0, points, coefficients, 0.0, lattice=lattice)
    path = save_potential(model, tmp_path / "model.safetensors", licence="none", description="test")
    start = tmp_path / "start.pdb"
    topology, positions = topology_of(np.array(numbers), lattice), np.eye(3) * 2.5
    for k, atom in enumerate(topology.atoms()):
        atom.name = f"CU{k}"
    with open(start, "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, positions * unit.angstrom, file)

    def settings(ensemble: str) -> RunSettings:
        return RunSettings(input=str(start), model="gdml", model_path=str(path), ml_region="all", ensemble=ensemble)

    assert build(settings("nvt")).system.usesPeriodicBoundaryConditions()
    with pytest.raises(ValueError, match=r"^ensemble: expected nve or nvt, got 'npt'; .* describes no other"):
        build(settings("npt"))
