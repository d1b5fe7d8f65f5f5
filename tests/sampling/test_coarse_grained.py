"""Systems of beads: masses, names instead of elements, priors from the model file, and dynamics in replicas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app
from openmmml import MLPotential

from openmm_gdml.model import GDMLPotential
from openmm_mlff.data.coarse_graining import BeadMap
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.potentials.priors import PriorTerms, angles_of
from openmm_mlff.sampling.coarse_grained import PRIOR_GROUP, coarse_grained_system
from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV, NM_PER_ANGSTROM

NAMES = ("BB", "SC", "BB", "TAIL")
BONDS = ((0, 1), (0, 2), (2, 3))
POSITIONS = np.array([[0.0, 0.0, 0.0], [2.5, 0.4, 0.0], [-1.0, 3.1, 0.3], [-3.9, 3.6, -0.8]])
MASSES = [60.0, 45.0, 60.0, 72.0]


def beads(names: tuple[str, ...] = NAMES) -> BeadMap:
    # the weights play no part: every bead is one of four atoms
    return BeadMap(names, (("A", 1), ("A", 1), ("B", 2), ("B", 2)), np.eye(4), (0,) * 4, np.array(MASSES), BONDS)


def model(**options: object) -> GDMLPotential:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.15, 0.45, (5, 6))
    options = {"beads": NAMES, "numbers": (1, 2, 1, 3)} | options
    return GDMLPotential.from_coefficients(
        sigma=1.0, descriptors=x, coefficients=rng.normal(scale=0.3, size=(5, 6)), shift=0.1, **options
    )


def priors() -> PriorTerms:
    angles = angles_of(BONDS)
    return PriorTerms(
        bonds=np.array(BONDS),
        bond_lengths=np.array([2.5, 3.2, 3.0]),
        bond_constants=np.array([2.0, 1.5, 1.0]),
        angles=angles,
        angle_values=np.full(len(angles), 2.0),
        angle_constants=np.full(len(angles), 0.5),
    )


def context_of(system: openmm.System, seed: int = 1) -> openmm.Context:
    integrator = openmm.LangevinMiddleIntegrator(300, 5, 0.005)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(POSITIONS * NM_PER_ANGSTROM)
    return context


@pytest.mark.filterwarnings("error")
def test_energy_and_forces_are_those_of_model_and_priors_and_every_bead_has_its_mass() -> None:
    gdml, prior = model(), priors()
    system = coarse_grained_system(gdml, beads().topology(), MASSES, prior)
    assert [system.getParticleMass(i)._value for i in range(4)] == MASSES
    state = context_of(system).getState(energy=True, forces=True)
    x = torch.from_numpy(POSITIONS)[None]
    learnt, harmonic = gdml.energies_and_forces(x), prior.energy_and_forces(x)
    energy = state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV
    assert energy == pytest.approx(float(learnt[0] + harmonic[0]), abs=1e-9)
    forces = state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
    assert forces == pytest.approx((learnt[1] + harmonic[1])[0].numpy(), abs=1e-9)
    only = context_of(system).getState(energy=True, groups={PRIOR_GROUP}).getPotentialEnergy()._value
    assert only / KJ_PER_MOL_PER_EV == pytest.approx(float(harmonic[0]), abs=1e-9)


def test_openmm_ml_alone_would_leave_such_beads_without_mass() -> None:
    with pytest.warns(UserWarning, match="no element and so no mass"):
        system = MLPotential("gdml", model=model()).createSystem(beads().topology())
    assert [system.getParticleMass(i)._value for i in range(4)] == [0.0] * 4


def test_beads_in_another_order_or_unknown_ones_are_refused() -> None:
    swapped = beads(("SC", "BB", "BB", "TAIL")).topology()
    with pytest.raises(ValueError, match="beads: expected BB SC BB TAIL in this order, got SC BB BB TAIL"):
        coarse_grained_system(model(), swapped, MASSES)
    with pytest.raises(ValueError, match="elements: expected an element for every ML atom, got none for atom 0"):
        coarse_grained_system(model(beads=None, numbers=(6, 7, 6, 8)), beads().topology(), MASSES)


def test_beads_with_elements_need_no_names() -> None:
    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for symbol in ("C", "N", "C", "O"):
        topology.addAtom("?", app.Element.getBySymbol(symbol), residue)
    system = coarse_grained_system(model(numbers=(6, 7, 6, 8)), topology)
    assert system.getParticleMass(1)._value == pytest.approx(14.00672)


def test_priors_come_from_the_model_file_unless_others_are_given(tmp_path: Path) -> None:
    path = save_potential(model(), tmp_path / "model.safetensors", priors=priors().to_dict())
    topology = beads().topology()
    stored, given = (
        coarse_grained_system(path, topology, MASSES),
        coarse_grained_system(model(), topology, MASSES, priors()),
    )
    none = coarse_grained_system(path, topology, MASSES, PriorTerms())
    energies = [context_of(s).getState(energy=True).getPotentialEnergy()._value for s in (stored, given, none)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-9) and abs(energies[0] - energies[2]) > 0.1
    assert none.getNumForces() == 1


def test_other_forces_are_copied() -> None:
    wall = openmm.CustomExternalForce("0.5*x^2")
    wall.addParticle(0, [])
    first = coarse_grained_system(None, beads().topology(), MASSES, priors(), [wall])
    second = coarse_grained_system(None, beads().topology(), MASSES, forces=[wall])
    assert (first.getNumForces(), second.getNumForces()) == (3, 1)


def test_wrong_input_is_named() -> None:
    topology = beads().topology()
    with pytest.raises(
        ValueError, match=r"masses: bead 0 \(BB\) has no element to take a mass from; expected 4 masses"
    ):
        coarse_grained_system(model(), topology)
    for masses in ([1.0] * 3, [1.0, 0.0, 1.0, 1.0], [1.0, np.nan, 1.0, 1.0]):
        with pytest.raises(ValueError, match="masses: expected 4 positive numbers"):
            coarse_grained_system(model(), topology, masses)
    far = PriorTerms(bonds=np.array([[0, 4]]), bond_lengths=np.ones(1), bond_constants=np.ones(1))
    with pytest.raises(ValueError, match="priors: expected bonds of beads from 0 to 3, got 4"):
        coarse_grained_system(None, topology, MASSES, far)
    with pytest.raises(ValueError, match="model: expected a model, priors or forces"):
        coarse_grained_system(None, topology, MASSES)
    with pytest.raises(TypeError, match="model: expected a Potential, the path of a model file or None, got int"):
        coarse_grained_system(3, topology, MASSES)  # type: ignore[arg-type]


def test_replicas_of_harmonic_beads_have_the_distribution_of_boltzmann() -> None:
    # a single bond: p(r) ~ r^2 exp(-k (r - r0)^2 / 2 kT); and 3/2 kT of kinetic energy in every bead
    k, r0 = 1.0, 3.0
    pair = BeadMap(("A", "B"), (("X", 1),) * 2, np.eye(2), (0, 0), np.array([40.0, 80.0]), ((0, 1),))
    prior = PriorTerms(bonds=np.array([[0, 1]]), bond_lengths=np.array([r0]), bond_constants=np.array([k]))
    system = coarse_grained_system(None, pair.topology(), pair.masses, prior)
    replicas = Replicas(system, pair.topology(), 400)
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.01)
    integrator.setRandomNumberSeed(1)
    context = replicas.context(integrator, "Reference")
    replicas.set_positions(context, np.array([[0.0, 0.0, 0.0], [0.3, 0.0, 0.0]]))
    replicas.set_velocities(context, temperature=300, seeds=1)
    integrator.step(100)
    distances, kinetic = [], []
    for _ in range(60):
        integrator.step(20)
        frame = replicas.frame(context)
        distances.append(np.linalg.norm(frame.positions[:, 1] - frame.positions[:, 0], axis=1) / NM_PER_ANGSTROM)
        kinetic.append(frame.kinetic)
    kT = BOLTZMANN_KJ_PER_MOL * 300 / KJ_PER_MOL_PER_EV
    grid = np.linspace(1.5, 5, 10001)
    p = grid**2 * np.exp(-k * (grid - r0) ** 2 / (2 * kT))
    p /= p.sum()
    mean, spread = p @ grid, np.sqrt(p @ grid**2 - (p @ grid) ** 2)
    r = np.concatenate(distances)
    # 24,000 samples, correlated over about one frame
    assert r.mean() == pytest.approx(mean, abs=6 * spread / np.sqrt(len(r)))
    assert r.std() == pytest.approx(spread, rel=0.03)
    assert np.mean(kinetic) == pytest.approx(3 * BOLTZMANN_KJ_PER_MOL * 300, rel=0.03)


def test_replicas_of_a_learnt_model_agree_with_single_evaluations() -> None:
    gdml, prior = model(), priors()
    topology = beads().topology()
    replicas = Replicas(coarse_grained_system(gdml, topology, MASSES, prior), topology, 5)
    context = replicas.context(openmm.LangevinMiddleIntegrator(300, 5, 0.005), "Reference")
    x = POSITIONS + np.random.default_rng(0).normal(scale=0.1, size=(5, 4, 3))
    replicas.set_positions(context, x * NM_PER_ANGSTROM)
    frame = replicas.frame(context)
    r = torch.from_numpy(x)
    expected = gdml.energies_and_forces(r)[0] + prior.energy_and_forces(r)[0]
    assert frame.potential / KJ_PER_MOL_PER_EV == pytest.approx(expected.numpy(), abs=1e-9)
