"""Copies of OpenMM's own forces: every copy has the energy and forces that it has alone; the rest is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openmm
import pytest
from openmm import app

from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.sampling.replicate import replicate

from .copies import Molecule, N, agrees, spread


def _bond(system: openmm.System) -> openmm.Force:
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.13, 1e4)
    force.addBond(9, 3, 0.2, 2e3)
    return force


def _angle(system: openmm.System) -> openmm.Force:
    force = openmm.HarmonicAngleForce()
    force.addAngle(1, 6, 7, 1.9, 400.0)
    return force


def _torsion(system: openmm.System) -> openmm.Force:
    force = openmm.PeriodicTorsionForce()
    force.addTorsion(1, 6, 7, 9, 2, 0.3, 40.0)
    return force


def _rb(system: openmm.System) -> openmm.Force:
    force = openmm.RBTorsionForce()
    force.addTorsion(6, 7, 9, 16, 1.0, 20.0, 3.0, 4.0, 5.0, 6.0)
    return force


def _cmap(system: openmm.System) -> openmm.Force:
    force = openmm.CMAPTorsionForce()
    values = np.random.default_rng(0).normal(0, 50.0, 36)
    force.addMap(6, values.tolist())
    force.addTorsion(0, 1, 6, 7, 9, 6, 7, 9, 16)
    return force


def _custom_bond(system: openmm.System) -> openmm.Force:
    force = openmm.CustomBondForce("s*k*(r-0.4)^4")
    force.addGlobalParameter("s", 3.0)
    force.addPerBondParameter("k")
    force.addBond(0, 16, [1e5])
    return force


def _custom_angle(system: openmm.System) -> openmm.Force:
    force = openmm.CustomAngleForce("k*cos(theta)")
    force.addPerAngleParameter("k")
    force.addAngle(1, 6, 7, [900.0])
    return force


def _custom_torsion(system: openmm.System) -> openmm.Force:
    force = openmm.CustomTorsionForce("k*(1-cos(theta-t0))")
    force.addPerTorsionParameter("k")
    force.addPerTorsionParameter("t0")
    force.addTorsion(1, 6, 7, 9, [90.0, 0.4])
    return force


def _compound(system: openmm.System) -> openmm.Force:
    """A bias on two torsions from a table, as enhanced sampling writes it."""
    force = openmm.CustomCompoundBondForce(5, "bias(dihedral(p1,p2,p3,p4), dihedral(p2,p3,p4,p5))")
    values = np.random.default_rng(1).normal(0, 100.0, 64).tolist()
    table = openmm.Continuous2DFunction(8, 8, values, -np.pi, np.pi, -np.pi, np.pi)
    force.addTabulatedFunction("bias", table)
    force.addBond([1, 6, 7, 9, 16], [])
    return force


def _centroid(system: openmm.System) -> openmm.Force:
    force = openmm.CustomCentroidBondForce(2, "k*(distance(g1,g2)-0.1)^2")
    force.addPerBondParameter("k")
    force.addGroup([0, 1, 2])
    force.addGroup([16, 17], [0.3, 0.7])
    force.addBond([0, 1], [5000.0])
    return force


def _external(system: openmm.System) -> openmm.Force:
    force = openmm.CustomExternalForce("k*(x^2+y^2)")
    force.addPerParticleParameter("k")
    force.addParticle(7, [3000.0])
    return force


def _custom_nonbonded(system: openmm.System) -> openmm.Force:
    force = openmm.CustomNonbondedForce("100*a1*a2*exp(-r/0.2)")
    force.addPerParticleParameter("a")
    for i in range(system.getNumParticles()):
        force.addParticle([0.5 + 0.1 * i])
    force.addExclusion(0, 1)
    force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffNonPeriodic)
    force.setCutoffDistance(0.5)
    return force


def _groups(system: openmm.System) -> openmm.Force:
    force = _custom_nonbonded(system)
    force.addInteractionGroup([0, 1, 2], [7, 8, 9, 20])
    return force


def _nonbonded(system: openmm.System) -> openmm.Force:
    random = np.random.default_rng(2)
    force = openmm.NonbondedForce()
    for _ in range(system.getNumParticles()):
        force.addParticle(random.normal(0, 0.3), random.uniform(0.1, 0.2), random.uniform(0, 0.5))
    force.addException(0, 1, 0.0, 0.1, 0.0)
    force.addException(9, 3, 0.1, 0.15, 0.2)
    return force


FORCES = [
    _bond, _angle, _torsion, _rb, _cmap, _custom_bond, _custom_angle, _custom_torsion, _compound, _centroid,
    _external, _custom_nonbonded, _groups, _nonbonded,
]  # fmt: skip


@pytest.mark.parametrize("make", FORCES)
def test_native_forces(molecule: Molecule, make: Callable[[openmm.System], openmm.Force]) -> None:
    single = openmm.System()
    for atom in molecule.topology.atoms():
        single.addParticle(atom.element.mass)
    force = make(single)
    force.setForceGroup(3)
    force.setName("mine")
    single.addForce(force)
    replicas = agrees(single, molecule.topology, spread(molecule, sigma=0.01))
    assert replicas.system.getForce(0).getForceGroup() == 3
    assert replicas.system.getForce(0).getName().startswith("mine")


def test_all_forces_together(system: openmm.System, molecule: Molecule) -> None:
    for make in FORCES:
        system.addForce(make(system))
    agrees(system, molecule.topology, spread(molecule), 2e-6)


def test_global_parameters_reach_the_energies(molecule: Molecule) -> None:
    single = openmm.System()
    for _ in range(22):
        single.addParticle(1.0)
    single.addForce(_custom_bond(single))
    replicas = Replicas(single, molecule.topology, N)
    context = replicas.context(openmm.VerletIntegrator(0.0005), "Reference")
    replicas.set_positions(context, spread(molecule))
    before = replicas.potential_energies(context)
    context.setParameter("s", 6.0)
    np.testing.assert_allclose(replicas.potential_energies(context), 2 * before, rtol=1e-12)


def test_what_couples_copies_is_refused(molecule: Molecule) -> None:
    field = app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    with pytest.raises(ValueError, match=r"GBSAOBCForce.*Born radii"):
        replicate(field.createSystem(molecule.topology), 2)
    for force, words in (
        (openmm.MonteCarloBarostat(1.0, 300.0), "share one box"),
        (openmm.RMSDForce([openmm.Vec3(0, 0, 0)]), "RMSDForce"),
        (openmm.CustomCVForce("0"), "CustomTorsionForce"),
        (openmm.PythonForce(_zero), "Python function evaluates one copy"),
    ):
        single = openmm.System()
        single.addParticle(1.0)
        single.addForce(force)
        with pytest.raises(ValueError, match=words):
            replicate(single, 2)
    single = openmm.System()
    single.addParticle(1.0)
    nonbonded = openmm.NonbondedForce()
    nonbonded.addParticle(0.0, 0.1, 0.0)
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.PME)
    single.addForce(nonbonded)
    with pytest.raises(ValueError, match="NoCutoff"):
        replicate(single, 2)
    for n in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="n: expected a whole number of copies"):
            replicate(openmm.System(), n)  # type: ignore[arg-type]


def _zero(state: Any) -> tuple[float, np.ndarray]:
    return 0.0, np.zeros((1, 3))


def test_copies_of_copies_are_refused(system: openmm.System) -> None:
    with pytest.raises(ValueError, match="a System of 2 copies already"):
        replicate(replicate(system, 2), 2)
