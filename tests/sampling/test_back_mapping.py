"""Back-mapping: good structures come out at the right temperature, bad ones are refused for the right reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.sampling.back_mapping import (
    STRENGTH,
    BackMapper,
    RelaxationSettings,
    restraint,
    solute_topology,
)
from openmm_mlff.sampling.implicit_solvent import use_native_obc2
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

from .copies import Molecule, reference

KT = BOLTZMANN_KJ_PER_MOL * 300.0


@pytest.fixture(scope="module")
def mapper(implicit: openmm.System, molecule: Molecule) -> BackMapper:
    return BackMapper(implicit, molecule.topology, range(22), molecule.positions, timestep=0.004)


@pytest.fixture(scope="module")
def dynamics(implicit: openmm.System, molecule: Molecule) -> tuple[np.ndarray, np.ndarray]:
    """Positions (120, 22, 3) nm and energies (120,) kJ/mol of 120 ps of MD."""
    integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.004)
    integrator.setRandomNumberSeed(7)
    context = reference(implicit, integrator)
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(300, 1)
    integrator.step(2500)
    positions, energies = [], []
    for _ in range(120):
        integrator.step(250)
        state = context.getState(positions=True, energy=True)
        positions.append(state.getPositions(asNumpy=True)._value)
        energies.append(state.getPotentialEnergy()._value)
    return np.array(positions), np.array(energies)


def mirrored(positions: np.ndarray) -> np.ndarray:
    return positions * [1.0, 1.0, -1.0]


def independent(number: int, force: openmm.Force | None = None) -> tuple[openmm.System, app.Topology]:
    """Argon atoms that do not see one another, in one System."""
    made, topology = openmm.System(), app.Topology()
    chain = topology.addChain()
    for _ in range(number):
        made.addParticle(40.0)
        topology.addAtom("AR", app.element.argon, topology.addResidue("AR", chain))
    if force is not None:
        made.addForce(force)
    return made, topology


# -- what comes out ------------------------------------------------------------------------------------------------


def test_noisy_frames_come_back_with_the_energies_of_md(
    mapper: BackMapper, dynamics: tuple[np.ndarray, np.ndarray]
) -> None:
    positions, energies = dynamics
    random = np.random.default_rng(0)
    found = []
    for k in range(0, 120, 4):
        noisy = positions[k] + random.normal(0.0, 0.01, (22, 3))
        result = mapper.relax(noisy, seed=k)
        assert result.report.accepted, result.report
        stages = result.report.energies
        assert stages["decoded"] > stages["tight"] > stages["minimized"]
        assert stages["minimized"] < stages["equilibrated"]
        assert 0 < result.report.moved < 0.04
        assert mapper.checks(result.positions).reason == ""
        found.append(stages["equilibrated"])
    # 30 frames that are 4 ps apart on both sides, which is more than the energy remembers
    error = energies.std() * np.sqrt(1 / 30 + 1 / 30)
    assert abs(np.mean(found) - energies.mean()) < 3.5 * error
    assert 0.6 < np.std(found) / energies.std() < 1.5


def test_constraints_hold_afterwards(mapper: BackMapper, dynamics: tuple[np.ndarray, np.ndarray]) -> None:
    noisy = dynamics[0][0] + np.random.default_rng(1).normal(0.0, 0.01, (22, 3))
    found = mapper.relax(noisy, seed=1).positions
    lengths = [mapper.system.getConstraintParameters(k) for k in range(mapper.system.getNumConstraints())]
    assert len(lengths) == 12
    for i, j, length in lengths:
        assert np.linalg.norm(found[i] - found[j]) == pytest.approx(length._value, rel=1e-5)


def test_overlapping_hydrogens_are_mended(mapper: BackMapper, dynamics: tuple[np.ndarray, np.ndarray]) -> None:
    x = dynamics[0][3].copy()
    # one hydrogen of the first methyl group on the last one's
    x[0] = x[21] + [0.02, 0.0, 0.0]
    result = mapper.relax(x, seed=1)
    assert result.report.clashes >= 1
    assert result.report.accepted
    assert mapper.checks(result.positions).reason == ""


def test_a_hydrogen_on_the_wrong_side_is_mended(mapper: BackMapper, dynamics: tuple[np.ndarray, np.ndarray]) -> None:
    x = dynamics[0][3].copy()
    ca, ha = 8, 9
    x[ha] = 2 * x[ca] - x[ha]
    assert mapper.checks(x).misplaced == (ca,)
    mended = mapper.checks.mended(x)
    assert mapper.checks(mended).reason == ""
    assert np.linalg.norm(mended[ha] - x[ca]) == pytest.approx(np.linalg.norm(x[ha] - x[ca]))
    assert (np.delete(mended, ha, axis=0) == np.delete(x, ha, axis=0)).all()
    result = mapper.relax(x, seed=1)
    assert result.report.accepted, result.report
    assert result.report.misplaced == 1
    assert mapper.checks(result.positions).misplaced == ()


def test_the_same_seed_gives_the_same_bits(mapper: BackMapper, dynamics: tuple[np.ndarray, np.ndarray]) -> None:
    a, b, c = (mapper.relax(dynamics[0][0], seed=s).positions for s in (5, 5, 6))
    assert (a == b).all()
    assert np.abs(a - c).max() > 1e-3


@pytest.mark.parametrize("stiffness", [5e3, 1e7])
def test_dynamics_heat_to_the_temperature(stiffness: float) -> None:
    """Harmonic wells: the mean potential energy is 3/2 kT per atom, with a variance of 3/2 (kT)^2.

    At the larger force constant a step is 1/6 of a period: a leapfrog's energies would be a third too high, and so
    would those after velocities from the Maxwell-Boltzmann distribution.
    """
    well = openmm.CustomExternalForce(f"0.5*{stiffness}*(x^2+y^2+z^2)")
    n = 900
    for i in range(n):
        well.addParticle(i)
    made, topology = independent(n, well)
    grid = np.zeros((n, 3))
    grid[:, 0] = np.arange(n)
    settings = RelaxationSettings(restrained=0.0, free=4.0, max_moved=1e6)
    mapper = BackMapper(made, topology, range(n), grid, settings=settings, platform="Reference")
    # the atoms do not see one another, but all are at the origin
    mapper.checks._radii[:] = 0.0
    result = mapper.relax(np.zeros((n, 3)), seed=2)
    error = np.sqrt(1.5 * n) * KT
    assert abs(result.report.energies["equilibrated"] - 1.5 * n * KT) < 4 * error
    # and stay there, in dynamics of another friction that go on from positions and velocities
    context = reference(made, openmm.LangevinMiddleIntegrator(300, 1, mapper.timestep))
    context.setPositions(result.positions)
    context.setVelocities(result.velocities)
    for _ in range(6):
        context.getIntegrator().step(10)
        assert abs(context.getState(energy=True).getPotentialEnergy()._value - 1.5 * n * KT) < 4 * error


def test_restraints_hold_during_the_first_part() -> None:
    """Free atoms with restraints only: each coordinate has the variance kT/k about the decoded one."""
    n, k = 400, 1000.0
    made, topology = independent(n)
    grid = np.zeros((n, 3))
    grid[:, 0] = np.arange(n)
    settings = RelaxationSettings(restrained=4.0, free=0.0, loose=k)
    mapper = BackMapper(made, topology, range(n), grid, settings=settings, platform="Reference")
    apart = mapper.relax(grid, seed=3).positions - grid
    spread = np.mean(apart**2)
    assert abs(spread / (KT / k) - 1) < 4 * np.sqrt(2 / (3 * n))


@pytest.mark.slow
def test_trp_cage_is_relaxed(shared: Path) -> None:
    """304 atoms in implicit solvent, each displaced by 0.01 nm in every direction."""
    pdb = app.PDBFile(str(shared / "data" / "1l2y.pdb"))
    field = app.ForceField("amber14-all.xml", "implicit/obc2.xml")
    system = field.createSystem(pdb.topology, constraints=app.HBonds, hydrogenMass=3 * unit.amu)
    use_native_obc2(system)
    x = pdb.getPositions(asNumpy=True)._value
    mapper = BackMapper(system, pdb.topology, range(304), x, timestep=0.004, platform="CPU")
    report = mapper.relax(x + np.random.default_rng(0).normal(0.0, 0.01, x.shape), seed=1).report
    assert report.accepted, report
    assert report.energies["decoded"] > report.energies["tight"] > report.energies["minimized"]
    # a quarter kT per degree of freedom and more is stored in bonds, angles and torsions at 300 K
    assert report.energies["equilibrated"] - report.energies["minimized"] > 0.25 * KT * (3 * 304 - 150)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_reasons(mapper: BackMapper, dynamics: tuple[np.ndarray, np.ndarray]) -> None:
    good = dynamics[0][0]
    wrong = mapper.relax(mirrored(good), seed=1).report
    assert (wrong.reason, wrong.stage, wrong.inverted, wrong.energies) == ("inverted", "decoded", 1, {})
    lost = good.copy()
    lost[5] = np.nan
    assert mapper.relax(lost, seed=1).report.reason == "not finite"
    assert mapper.relax(np.full_like(good, np.inf), seed=1).report.reason == "not finite"
    torn = good.copy()
    along = torn[18] - torn[16]  # the last methyl group half a nanometre away from its nitrogen
    torn[18:] += 0.5 * along / np.linalg.norm(along)
    report = mapper.relax(torn, seed=1).report
    assert (report.reason, report.stage) == ("moved", "minimized")
    assert report.moved > mapper.settings.max_moved
    high = mapper.relax(good, seed=1, energy_limit=-1000.0).report
    assert (high.reason, high.stage) == ("energy", "minimized")
    assert not high.accepted


def test_dynamics_that_explode_are_unstable_not_an_error(molecule: Molecule, implicit: openmm.System) -> None:
    wild = BackMapper(implicit, molecule.topology, range(22), molecule.positions, timestep=0.05)
    report = wild.relax(molecule.positions, seed=1).report
    assert report.reason in ("unstable", "broken", "inverted", "clash")
    assert report.stage in ("minimized", "equilibrated")
    # and the mapper can be used again
    wild._integrator.setStepSize(0.002)
    wild.timestep = 0.002
    assert wild.relax(molecule.positions, seed=1).report.accepted


def test_an_interrupt_is_not_taken_for_an_unstable_structure(
    mapper: BackMapper, molecule: Molecule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C inside a learned force reaches Python as an exception of OpenMM."""

    def interrupted(*arguments: object) -> None:
        raise openmm.OpenMMException("KeyboardInterrupt")

    monkeypatch.setattr(openmm.LocalEnergyMinimizer, "minimize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mapper.relax(molecule.positions, seed=1)


def test_refused_structures_are_decoded_again(mapper: BackMapper, dynamics: tuple[np.ndarray, np.ndarray]) -> None:
    good = dynamics[0][0]
    asked = []

    def draw(k: int) -> np.ndarray:
        asked.append(k)
        return good if k == 2 else mirrored(good)

    found = mapper.back_map(draw, seed=4)
    assert asked == [0, 1, 2]
    assert [r.reason for r in found.reports] == ["inverted", "inverted", ""]
    assert found.found is not None and mapper.checks(found.found.positions).reason == ""
    nothing = mapper.back_map(lambda k: mirrored(good), seed=4)
    assert nothing.found is None
    assert len(nothing.reports) == mapper.settings.tries == 5


# -- the System ----------------------------------------------------------------------------------------------------


def test_the_system_stays_as_it_is(implicit: openmm.System, molecule: Molecule) -> None:
    with_thermostat = openmm.XmlSerializer.clone(implicit)
    with_thermostat.addForce(openmm.AndersenThermostat(300, 1))
    before = openmm.XmlSerializer.serialize(with_thermostat)
    mapper = BackMapper(with_thermostat, molecule.topology, range(22), molecule.positions)
    mapper.relax(molecule.positions, seed=1)
    assert openmm.XmlSerializer.serialize(with_thermostat) == before
    names = [type(f).__name__ for f in mapper.system.getForces()]
    assert "AndersenThermostat" not in names and "CustomExternalForce" in names


def test_the_restraint_takes_the_nearest_image() -> None:
    made, _ = independent(2)
    box = np.array([[2.0, 0, 0], [0.6, 2.0, 0], [-0.5, 0.7, 2.0]])
    made.setDefaultPeriodicBoxVectors(*box)
    force = restraint([0, 1], periodic=True)
    centres = np.array([[0.1, 0.2, 0.3], [1.9, 1.8, 1.7]])
    for k in range(2):
        force.setParticleParameters(k, k, centres[k])
    made.addForce(force)
    context = reference(made)
    apart = np.array([[0.05, -0.1, 0.02], [0.1, 0.03, -0.07]])
    context.setPositions(centres + apart + [box[0] - box[2], box[1] + 2 * box[2]])
    context.setParameter(STRENGTH, 300.0)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert energy == pytest.approx(0.5 * 300.0 * np.sum(apart**2), rel=1e-9)
    context.setParameter(STRENGTH, 0.0)
    assert context.getState(energy=True).getPotentialEnergy()._value == 0.0


def test_global_parameters_of_the_system_are_taken_over() -> None:
    field = openmm.CustomExternalForce("slope*x")
    field.addGlobalParameter("slope", 0.0)
    field.addParticle(0)
    made, topology = independent(1, field)
    settings = RelaxationSettings(restrained=0.0, free=0.0)
    mapper = BackMapper(made, topology, [0], np.zeros((1, 3)), settings=settings)
    report = mapper.relax(np.full((1, 3), 2.0), seed=1, parameters={"slope": 3.0, "another": 1.0}).report
    assert report.energies["decoded"] == pytest.approx(6.0)
    # the minimum of slope x + k/2 (x - 2)^2 lies slope / k to the left
    assert report.energies["tight"] == pytest.approx(3.0 * (2.0 - 3.0 / settings.tight), abs=1e-3)


def test_part_of_a_topology(molecule: Molecule) -> None:
    atoms = [4, 5, 6, 7, 8, 9, 10, 16, 17]
    part = solute_topology(molecule.topology, atoms)
    whole = list(molecule.topology.atoms())
    assert [(a.name, a.element, a.residue.name) for a in part.atoms()] == [
        (whole[i].name, whole[i].element, whole[i].residue.name) for i in atoms
    ]
    position = {i: k for k, i in enumerate(atoms)}
    expected = {
        (position[b[0].index], position[b[1].index])
        for b in molecule.topology.bonds()
        if b[0].index in position and b[1].index in position
    }
    assert {(b[0].index, b[1].index) for b in part.bonds()} == expected


@pytest.mark.parametrize("atoms", [[], [3, 2], [1, 1], [0, 22], [-1, 0]])
def test_impossible_solutes_are_refused(molecule: Molecule, atoms: list[int]) -> None:
    with pytest.raises(ValueError, match="solute: expected"):
        solute_topology(molecule.topology, atoms)


@pytest.mark.parametrize(
    ("name", "value"), [("tight", 0.0), ("free", -1.0), ("tries", 0), ("iterations", 1.5), ("max_moved", np.nan)]
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        RelaxationSettings(**{name: value})  # type: ignore[arg-type]


def test_positions_of_another_size_are_refused(mapper: BackMapper) -> None:
    with pytest.raises(ValueError, match=r"positions: expected shape \(22, 3\), got \(21, 3\)"):
        mapper.relax(np.zeros((21, 3)), seed=1)
