"""``longRangeMethod``: charges of a periodic box with all their images, from createSystem to the barostat."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import running
from openmm_mlff.forces.ase_calculator import MLFFCalculator
from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.loading import load_model
from openmm_mlff.forces.serialization import load_system
from openmm_mlff.potentials.family import store_potential
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV
from openmm_so3krates import SO3krates, SO3kratesConfig
from openmm_spookynet import SpookyNet

from .conftest import Box, context_of, energy_of, forces_of, topology_of

#: nm
TRICLINIC = np.array([[1.05, 0.0, 0.0], [0.25, 1.0, 0.0], [-0.2, 0.3, 0.95]])
WATER = np.array([[0.0, 0.0, 0.0], [0.0757, 0.0586, 0.0], [-0.0757, 0.0586, 0.0]])


def small_so3krates(seed: int = 1) -> SO3krates:
    """One narrow layer with random weights, every term alive."""
    torch.manual_seed(seed)
    config = SO3kratesConfig(
        num_features=16, num_layers=1, num_heads=2, degrees=(1, 2), num_basis_functions=8, hirshfeld_features=8
    )
    model = SO3krates(config).double()
    with torch.no_grad():
        model.charge_bias[1], model.charge_bias[8] = 0.4, -0.8
    return model.eval().requires_grad_(False)


def waters(n: int, cell: np.ndarray = TRICLINIC, seed: int = 0) -> tuple[app.Topology, np.ndarray]:
    """n molecules turned at random on a grid of the box, with their bonds; positions in nm."""
    random = np.random.default_rng(seed)
    topology, positions = app.Topology(), []
    chain = topology.addChain()
    sites = np.array([[i, j, k] for i in (0.1, 0.6) for j in (0.1, 0.6) for k in (0.1, 0.6)])[:n]
    for site in sites:
        residue = topology.addResidue("HOH", chain)
        atoms = [topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")]
        topology.addBond(atoms[0], atoms[1])
        topology.addBond(atoms[0], atoms[2])
        turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
        positions.append(WATER @ turn + site @ cell)
    topology.setPeriodicBoxVectors(cell * unit.nanometer)
    return topology, np.concatenate(positions)


def structure_of(topology: app.Topology, positions: np.ndarray, charge: int = 0) -> Structure:
    numbers = np.array([atom.element.atomic_number for atom in topology.atoms()])
    cell = np.array(topology.getPeriodicBoxVectors().value_in_unit(unit.angstrom))
    return Structure(numbers, 10 * positions, charge=charge, cell=cell)


def reference(method: str, topology: app.Topology, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """kJ/mol and kJ/mol/nm of the model itself"""
    model = small_so3krates()
    model.long_range_cutoff, model.long_range_method = 6.0, method
    energy, forces = model.energy_and_forces(structure_of(topology, positions))
    return energy * KJ_PER_MOL_PER_EV, forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM


@pytest.fixture(scope="module")
def potential() -> MLPotential:
    return MLPotential("so3krates", model=small_so3krates())


def spec_of(system: openmm.System) -> ForceSpec:
    return running.computations(system)[0].spec


@pytest.mark.parametrize("method", ["shifted", "ewald", "pme"])
def test_openmm_gets_what_the_model_computes(potential: MLPotential, method: str) -> None:
    topology, positions = waters(3)
    system = potential.createSystem(topology, longRangeCutoff=0.6, longRangeMethod=method)
    energy, forces = reference(method, topology, positions)
    context = context_of(system, positions)
    # the mesh moves with the middle of the atoms
    tolerance = 1e-5 if method == "pme" else 1e-9
    assert energy_of(context) == pytest.approx(energy, rel=1e-10 if method != "pme" else 1e-6)
    assert np.abs(forces_of(context) - forces).max() < tolerance * np.abs(forces).max()
    copy = load_system(openmm.XmlSerializer.serialize(system))
    assert energy_of(context_of(copy, positions)) == energy_of(context)
    assert spec_of(copy).long_range_method == method


def test_methods_differ_and_agree_where_they_should() -> None:
    topology, positions = waters(3)
    (shifted, _), (ewald, f1), (pme, f2) = (reference(m, topology, positions) for m in ("shifted", "ewald", "pme"))
    assert abs(shifted - ewald) > 1.0
    assert pme == pytest.approx(ewald, abs=1e-3)
    assert np.abs(f1 - f2).max() < 1e-2


def test_a_box_too_large_for_ewald_is_refused_at_once(potential: MLPotential) -> None:
    """Before there is a System: a box of a micrometre has 10^8 phases per atom."""
    topology, _ = waters(3, 1000.0 * TRICLINIC)
    with pytest.raises(ValueError, match=r"longRangeMethod: 'ewald' would take .* GiB for 9 atoms .* expected 'pme'"):
        potential.createSystem(topology, longRangeCutoff=0.6, longRangeMethod="ewald")
    for box, method in ((topology, "pme"), (topology, "shifted"), (waters(3)[0], "ewald")):
        potential.createSystem(box, longRangeCutoff=0.6, longRangeMethod=method)


def test_options_that_older_versions_stored() -> None:
    """What has the default is stored, and so compared and counted, as before."""
    old = (
        '{"atoms":null,"charge":0,"compile":"auto","device":null,"family":"so3krates","long_range_cutoff":6.0,'
        '"max_force":10000000.0,"multiplicity":1,"numbers":[8,1,1],"path":null,"precision":null,"region":"periodic",'
        '"sha256":"00","threads":null,"version":1}'
    )
    assert ForceSpec.from_json(old).to_json() == old
    spec = ForceSpec("00", "so3krates", (8, 1, 1), long_range_cutoff=6.0, region="periodic", long_range_method="pme")
    assert json.loads(spec.to_json())["version"] == 3
    assert ForceSpec.from_json(spec.to_json()) == spec
    for text in (spec.to_json().replace('"pme"', '"p3m"'), spec.to_json().replace('"version":3', '"version":99')):
        with pytest.raises(
            ValueError, match=r"long_range_method: expected one of shifted, ewald, pme|99 is newer than 5"
        ):
            ForceSpec.from_json(text)


def test_models_of_two_methods_are_two() -> None:
    sha256 = store_potential(small_so3krates())
    loaded = {m: load_model(sha256, "so3krates", device="cpu", long_range_method=m) for m in ("shifted", "pme")}
    assert {name: model.long_range_method for name, model in loaded.items()} == {"shifted": "shifted", "pme": "pme"}


def test_method_of_a_model_in_memory_holds_where_it_can() -> None:
    model = small_so3krates()
    model.long_range_cutoff, model.long_range_method = 6.0, "ewald"
    potential = MLPotential("so3krates", model=model)
    topology, _ = waters(1)
    assert spec_of(potential.createSystem(topology)).long_range_method == "ewald"
    assert spec_of(potential.createSystem(topology, longRangeMethod="shifted")).long_range_method == "shifted"
    topology.setPeriodicBoxVectors(None)
    assert spec_of(potential.createSystem(topology)).long_range_method == "shifted"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"longRangeMethod": "PME"}, ValueError, "longRangeMethod: expected 'shifted', 'ewald' or 'pme', got 'PME'"),
        ({"longRangeMethod": True}, ValueError, "longRangeMethod: expected 'shifted', 'ewald' or 'pme', got True"),
        ({"nonbondedMethod": "pme"}, TypeError, "nonbondedMethod: .*did you mean 'longRangeMethod'"),
        ({"long_range_method": "pme"}, TypeError, "long_range_method: .*did you mean 'longRangeMethod'"),
        ({"longRangeMethod": "pme", "longRangeCutoff": None}, ValueError, "longRangeCutoff: a periodic system needs"),
        ({"longRangeCutoff": None}, ValueError, "longRangeCutoff: a periodic system needs"),
        ({"longRangeCutoff": 12}, ValueError, "longRangeCutoff: expected at most 5 nm in a periodic box, got 12 nm"),
    ],
)
def test_wrong_options(potential: MLPotential, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        potential.createSystem(waters(1)[0], **{"longRangeCutoff": 0.6, **options})


@pytest.mark.parametrize("method", ["ewald", "pme"])
def test_open_system_has_no_images(potential: MLPotential, method: str) -> None:
    with pytest.raises(ValueError, match=f"longRangeMethod: '{method}' sums over the images .* expected box vectors"):
        potential.createSystem(topology_of(np.array([8, 1, 1])), longRangeMethod=method)


def test_family_without_the_method(model: SpookyNet) -> None:
    topology, _ = waters(1)
    potential = MLPotential("spookynet", model=model)
    with pytest.raises(ValueError, match="longRangeMethod: spookynet offers 'shifted' only, got 'pme'"):
        potential.createSystem(topology, longRangeCutoff=0.6, longRangeMethod="pme")
    with pytest.raises(ValueError, match="long_range_method: spookynet offers 'shifted' only, got 'ewald'"):
        MLFFCalculator(model, long_range_method="ewald")
    with pytest.raises(ValueError, match="long_range_method: expected one of"):
        load_model(store_potential(model), "spookynet", device="cpu", long_range_method="pme")


def test_region_of_a_mixed_system_is_open(potential: MLPotential, solvated: Box) -> None:
    """openmm-ml asks whether the model covers the images of its region: no, the force field goes on to do so."""
    assert potential._impl.getMLLongRange() is False
    with pytest.raises(ValueError, match="longRangeMethod: the ML region of a mixed system is open"):
        potential.createMixedSystem(
            solvated.topology, solvated.system, range(22), longRangeMethod="pme", longRangeCutoff=0.9
        )
    own = small_so3krates()
    own.long_range_method = "pme"
    mixed = MLPotential("so3krates", model=own).createMixedSystem(solvated.topology, solvated.system, range(22))
    assert spec_of(mixed).long_range_method == "shifted"


def test_charged_box_states_its_background(potential: MLPotential) -> None:
    topology, positions = waters(2)
    with pytest.warns(UserWarning, match=r"'pme' neutralises the box of charge \+2 e by a uniform background"):
        potential.createSystem(topology, charge=2, longRangeCutoff=0.6, longRangeMethod="pme")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        potential.createSystem(topology, longRangeCutoff=0.6, longRangeMethod="pme")
        potential.createSystem(topology, charge=2, longRangeCutoff=0.6)
    # the term that follows from leaving k = 0 out does not act on atoms: forces stay balanced
    model = small_so3krates()
    model.long_range_cutoff, model.long_range_method = 6.0, "ewald"
    _, forces = model.energy_and_forces(structure_of(topology, positions, charge=2))
    assert np.abs(forces.sum(0)).max() < 1e-10


def test_ase() -> None:
    topology, positions = waters(3)
    structure = structure_of(topology, positions)
    atoms = Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=True)
    model = small_so3krates()
    energies = {}
    for method in ("shifted", "ewald", "pme"):
        atoms.calc = MLFFCalculator(model, long_range_cutoff=6.0, long_range_method=method)
        energies[method] = atoms.get_potential_energy()
        assert energies[method] * KJ_PER_MOL_PER_EV == pytest.approx(
            reference(method, topology, positions)[0], rel=1e-6 if method == "pme" else 1e-10
        )
    assert model.long_range_method == "shifted"
    with pytest.raises(ValueError, match="long_range_method: expected 'shifted', 'ewald' or 'pme', got 'P3M'"):
        MLFFCalculator(model, long_range_method="P3M")
    atoms.pbc = False
    with pytest.raises(ValueError, match="long_range_method: 'pme' sums over the images"):
        atoms.get_potential_energy()


# -- box vectors and the barostat --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["shifted", "ewald", "pme"])
def test_derivative_of_the_energy_with_respect_to_the_box(method: str) -> None:
    """All nine components of a strain, atoms included, against finite differences."""
    model = small_so3krates()
    model.long_range_cutoff, model.long_range_method = 6.0, method
    topology, positions = waters(3)
    start = structure_of(topology, positions)
    batch = model.batch(start)
    assert batch.cell is not None
    cell, fixed = batch.cell, model.fixed(batch)

    def energy(strain: torch.Tensor) -> torch.Tensor:
        deformed = torch.eye(3, dtype=torch.float64) + strain
        return model.predict(batch.at(batch.positions @ deformed, cell @ deformed), fixed).energy[0]

    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    (stress,) = torch.autograd.grad(energy(strain), strain)
    step = 1e-5
    for a in range(3):
        for b in range(3):
            ends = []
            for sign in (1, -1):
                moved = torch.zeros(3, 3, dtype=torch.float64)
                moved[a, b] = sign * step
                ends.append(float(energy(moved)))
            assert float(stress[a, b]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-7)
    # a turn costs nothing
    assert (stress - stress.T).abs().max() < (1e-10 if method != "pme" else 1e-4)


@pytest.mark.parametrize("method", ["shifted", "pme"])
def test_barostat_moves_whole_molecules(potential: MLPotential, method: str) -> None:
    """In a triclinic box that is all learned: molecules keep their shape in its moves, and are what it counts."""
    topology, positions = waters(8, 1.1 * TRICLINIC)
    system = potential.createSystem(topology, longRangeCutoff=0.6, longRangeMethod=method)
    barostat = openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin, 1)
    barostat.setRandomNumberSeed(5)
    system.addForce(barostat)
    # masses that do not move, so that only the barostat does
    integrator = openmm.VerletIntegrator(1e-12)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    assert [list(m) for m in context.getMolecules()] == [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(8)]
    integrator.step(33)
    state = context.getState(positions=True, energy=True)
    box = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value)
    scale = box[0, 0] / (1.1 * TRICLINIC[0, 0])
    assert abs(scale - 1) > 1e-3
    np.testing.assert_allclose(box, scale * 1.1 * TRICLINIC, rtol=1e-6)
    moved = np.array(state.getPositions(asNumpy=True)._value).reshape(8, 3, 3)
    start = positions.reshape(8, 3, 3)
    np.testing.assert_allclose(moved - moved[:, :1], start - start[:, :1], atol=1e-6)
    # the energy that the barostat decided by is the model's in the new box
    topology.setPeriodicBoxVectors(box * unit.nanometer)
    energy, _ = reference(method, topology, moved.reshape(-1, 3))
    assert state.getPotentialEnergy()._value == pytest.approx(energy, rel=1e-6)
