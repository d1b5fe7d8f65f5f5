"""The solute returns into its solvent: nothing is lost, nothing overlaps, molecules stay rigid, and MD goes on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.sampling.back_mapping import BackMapper, RelaxationSettings
from openmm_mlff.sampling.solvent import OVERLAP, Neighbours, SolventBox, molecules
from openmm_mlff.sampling.starts import set_torsion
from openmm_mlff.sampling.structure_checks import StructureChecks

#: strongly skewed, but reduced as OpenMM wants it
SKEWED = np.array([[2.4, 0.0, 0.0], [1.1, 2.0, 0.0], [-1.0, 0.9, 2.2]])
SOLUTE = np.arange(22)


def argon(n: int) -> app.Topology:
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(n):
        topology.addAtom("AR", app.element.argon, topology.addResidue("AR", chain))
    return topology


@pytest.fixture(scope="module")
def box_of_water(repository: Path) -> app.PDBFile:
    """Capped alanine in 361 waters, a frame of MD at 1 bar."""
    return app.PDBFile(str(repository / "openmm_mlff" / "sampling" / "structures" / "capped_alanine_water.pdb"))


def vectors(pdb: app.PDBFile) -> np.ndarray:
    return np.array(pdb.topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer))


def turned(pdb: app.PDBFile, phi: float, psi: float) -> np.ndarray:
    """The solute with other torsions, somewhere else."""
    x = pdb.getPositions(asNumpy=True)._value[SOLUTE]
    bonded = np.zeros((22, 22), dtype=bool)
    for i, j in StructureChecks(_solute(pdb), x).bonds:
        bonded[i, j] = bonded[j, i] = True
    x = set_torsion(x, bonded, (4, 6, 8, 14), phi)
    x = set_torsion(x, bonded, (6, 8, 14, 16), psi)
    return x + np.array([3.0, -7.0, 1.0])


def _solute(pdb: app.PDBFile) -> app.Topology:
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.deleteWater()
    return modeller.topology


# -- distances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [SKEWED, np.diag([0.9, 2.0, 1.5])], ids=["skewed", "narrow"])
def test_distances_to_the_nearest_image(box: np.ndarray) -> None:
    random = np.random.default_rng(1)
    atoms, points = random.uniform(-4, 4, (20, 3)), random.uniform(-4, 4, (50, 3))
    shifts = np.array(list(itertools.product(range(-9, 10), repeat=3))) @ box
    images = (atoms[:, None] + shifts).reshape(-1, 3)
    exact = np.array([np.linalg.norm(images - p, axis=1).min() for p in points])
    near = Neighbours(atoms, box)
    np.testing.assert_allclose(near.distances(points), np.minimum(exact, near.reach), atol=1e-12)
    assert (exact < near.reach).any()


# -- voids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [SKEWED, np.diag([2.4, 2.4, 2.4])], ids=["skewed", "cubic"])
def test_an_atom_in_the_way_goes_to_the_vacancy(box: np.ndarray) -> None:
    """A lattice of 216 sites with one vacancy: the atom that the solute sits on can only go there."""
    sites = np.array(list(itertools.product(range(6), repeat=3))) / 6.0 @ box
    solute, taken, vacant = 0, 100, 57
    positions = np.delete(sites, vacant, axis=0)
    positions[solute] = positions[taken] + [0.05, 0.0, 0.0]  # the solute's own site is vacant, too
    made = SolventBox(argon(215), [solute])
    found = made.displace(positions, box, np.random.default_rng(0))
    assert found.moved == (taken - 1,)
    offsets = np.array([(found.positions[taken] - sites[k]) @ np.linalg.inv(box) for k in (vacant, solute)])
    # the roomiest point of a vacancy in a skewed lattice is near its site, and not less roomy than the site itself
    assert np.linalg.norm((offsets - np.rint(offsets)) @ box, axis=1).min() < 0.1
    others = np.delete(positions, [solute, taken], axis=0)
    at_sites = Neighbours(others, box).distances(sites[[vacant, solute]])
    assert found.gap >= at_sites.max() - 1e-3 > OVERLAP
    staying = np.delete(np.arange(215), taken)
    assert (found.positions[staying] == positions[staying]).all()


def test_two_atoms_in_the_way_take_two_vacancies() -> None:
    box = np.diag([2.4, 2.4, 2.4])
    sites = np.array(list(itertools.product(range(6), repeat=3))) / 6.0 @ box
    positions = np.delete(sites, [57, 150], axis=0)
    positions[0] = 0.5 * (positions[98] + positions[99])
    positions[1] = positions[2] + [0.0, 0.2, 0.2]  # a solute of two atoms, the second between sites
    found = SolventBox(argon(214), [0, 1]).displace(positions, box, np.random.default_rng(0))
    assert {96, 97} <= set(found.moved)
    everything = found.positions
    for k in found.moved:
        others = np.delete(everything, k + 2, axis=0)
        assert Neighbours(others, box).distances(everything[k + 2][None])[0] > OVERLAP


def test_nothing_moves_where_nothing_overlaps(box_of_water: app.PDBFile) -> None:
    x = box_of_water.getPositions(asNumpy=True)._value
    found = SolventBox(box_of_water.topology, SOLUTE).insert(
        x, x[SOLUTE], vectors(box_of_water), np.random.default_rng(0)
    )
    assert found.moved == () and found.gap == float("inf")
    np.testing.assert_allclose(found.positions, x, atol=1e-12)


# -- water ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phi", "psi", "shift", "least"), [(-60.0, -45.0, 0.0, 0), (60.0, 40.0, 0.0, 1), (-150.0, 150.0, 0.35, 3)]
)
def test_a_new_conformation_in_the_old_water(
    box_of_water: app.PDBFile, phi: float, psi: float, shift: float, least: int
) -> None:
    """At the old place, where few waters are in the way, and shifted into the water, where many are."""
    pdb, box = box_of_water, vectors(box_of_water)
    x = pdb.getPositions(asNumpy=True)._value
    solvent = SolventBox(pdb.topology, SOLUTE)
    assert [len(m) for m in solvent.molecules] == [3] * 361
    new = turned(pdb, phi, psi)
    found = solvent.insert(x, new, box, np.random.default_rng(0))
    after = found.positions
    if shift:
        moved_there = found.positions
        moved_there[SOLUTE] += [shift, 0.0, 0.0]
        found = solvent.displace(moved_there, box, np.random.default_rng(0))
        after = found.positions
    assert least <= len(found.moved) < 15
    # the solute: the same body as was given, on the old one's place
    internal = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (after[SOLUTE], new)]
    np.testing.assert_allclose(internal[0], internal[1], atol=1e-9)
    heavy = np.array([a.element.symbol != "H" for a in pdb.topology.atoms()])
    here = heavy[SOLUTE]
    middle = after[SOLUTE][here].mean(axis=0) - x[SOLUTE][here].mean(axis=0)
    np.testing.assert_allclose(middle, [shift, 0.0, 0.0], atol=1e-9)
    assert StructureChecks(_solute(pdb), x[SOLUTE]).inverted(after[SOLUTE]) == ()
    # the water: rigid where it was moved, untouched elsewhere, and nowhere in the way
    moved = np.zeros(len(x), dtype=bool)
    for k in found.moved:
        atoms = solvent.molecules[k]
        moved[atoms] = True
        sides = [np.linalg.norm(p[atoms][[1, 2, 2]] - p[atoms][[0, 0, 1]], axis=-1) for p in (x, after)]
        np.testing.assert_allclose(sides[0], sides[1], atol=1e-9)
    moved[SOLUTE] = True
    assert (after[~moved] == x[~moved]).all()
    oxygens = np.flatnonzero(heavy)[here.sum() :]
    gaps = Neighbours(after[SOLUTE][here], box).distances(after[oxygens])
    assert gaps.min() >= OVERLAP
    for i in oxygens[moved[oxygens]]:
        others = np.setdiff1d(np.flatnonzero(heavy), [i])
        assert Neighbours(after[others], box).distances(after[i][None])[0] >= min(found.gap, OVERLAP) - 1e-9
    # the voids that the solute left are roomy enough
    assert found.gap > 0.22


def test_molecular_dynamics_accepts_the_box(box_of_water: app.PDBFile) -> None:
    pdb, box = box_of_water, vectors(box_of_water)
    field = app.ForceField("amber99sbildn.xml", "tip3p.xml")
    system = field.createSystem(
        pdb.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9 * unit.nanometer, constraints=app.HBonds
    )
    x = pdb.getPositions(asNumpy=True)._value
    found = SolventBox(pdb.topology, SOLUTE).insert(x, turned(pdb, -60, -45), box, np.random.default_rng(0))
    settings = RelaxationSettings(iterations=20, restrained=0.02, free=0.02)
    mapper = BackMapper(system, pdb.topology, SOLUTE, x[SOLUTE], settings=settings, platform="CPU")
    report = mapper.relax(found.positions, seed=1, box=box).report
    assert report.accepted, report
    # TIP3P at 300 K has about -40 kJ/mol per molecule; one overlap that was left would be worth more than all of it
    assert report.energies["minimized"] < -35.0 * 361
    assert report.energies["decoded"] < 0.0


def test_without_solvent_the_solute_is_put_on_to_the_old_one(box_of_water: app.PDBFile) -> None:
    topology = _solute(box_of_water)
    x = box_of_water.getPositions(asNumpy=True)._value[SOLUTE]
    found = SolventBox(topology, SOLUTE).insert(x, x[:, [1, 2, 0]] + 5.0, None, np.random.default_rng(0))
    np.testing.assert_allclose(found.positions, x, atol=1e-9)


# -- other molecules and bad input ---------------------------------------------------------------------------------


def test_a_cosolvent_and_an_ion_move_as_a_whole() -> None:
    topology = argon(1)
    chain = topology.addChain()
    methanol = topology.addResidue("MOH", chain)
    atoms = [topology.addAtom(n, app.element.Element.getBySymbol(n[0]), methanol) for n in ("C", "O", "H")]
    for a, b in itertools.pairwise(atoms):
        topology.addBond(a, b)
    topology.addAtom("NA", app.element.sodium, topology.addResidue("NA", chain))
    assert [m.tolist() for m in molecules(topology)] == [[0], [1, 2, 3], [4]]
    positions = np.array([[1.0, 1, 1], [1.1, 1, 1], [1.24, 1, 1], [1.3, 1.05, 1], [1.0, 1.1, 1.1]])
    box = np.diag([2.5, 2.5, 2.5])
    found = SolventBox(topology, [0]).displace(positions, box, np.random.default_rng(0))
    assert found.moved == (0, 1)
    sides = [np.linalg.norm(p[[1, 2, 1]] - p[[2, 3, 3]], axis=-1) for p in (positions, found.positions)]
    np.testing.assert_allclose(sides[0], sides[1], atol=1e-12)
    assert found.gap > 0.4


def test_bad_input_is_named(box_of_water: app.PDBFile) -> None:
    topology = box_of_water.topology
    with pytest.raises(ValueError, match=r"solute: expected whole molecules, got 2 of 3 atoms .* of HOH"):
        SolventBox(topology, [*range(22), 22, 23])
    solvent = SolventBox(topology, SOLUTE)
    x = box_of_water.getPositions(asNumpy=True)._value
    with pytest.raises(ValueError, match="positions, solute: expected shapes"):
        solvent.insert(x, x[:21], vectors(box_of_water), np.random.default_rng(0))
    with pytest.raises(ValueError, match="box: expected box vectors"):
        solvent.insert(x, x[SOLUTE], None, np.random.default_rng(0))


def test_a_barostat_and_the_box_of_the_moment(box_of_water: app.PDBFile) -> None:
    """The box of the walker counts, not the default one of the System."""
    topology = argon(2)
    system = openmm.System()
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    for _ in range(2):
        system.addParticle(40.0)
        nonbonded.addParticle(0.0, 0.34, 1.0)
    system.addForce(nonbonded)
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    system.setDefaultPeriodicBoxVectors(*np.diag([3.0, 3.0, 3.0]))
    positions = np.array([[0.1, 0.0, 0.0], [3.3, 0.0, 0.0]])
    settings = RelaxationSettings(restrained=0.0, free=0.0)
    mapper = BackMapper(system, topology, [0], positions[:1], settings=settings)
    wide = mapper.relax(positions, seed=1, box=np.diag([3.6, 3.6, 3.6])).report.energies["decoded"]
    tight = mapper.relax(positions, seed=1, box=np.diag([3.0, 3.0, 3.0])).report.energies["decoded"]
    assert tight > 1000.0 > 0.0 > wide
