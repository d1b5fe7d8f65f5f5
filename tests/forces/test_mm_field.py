"""Electrostatics between an ML region and charges: against OpenMM, mlipops, finite differences and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch

from openmm_mlff.forces import induction, mm_field
from openmm_mlff.forces.mm_field import Kernel, Mesh, Pairs, radial
from openmm_mlff.forces.surroundings import Surroundings, SurroundingsSpec, pack, unpack
from openmm_mlff.potentials import native
from openmm_mlff.units import COULOMB_EV_ANGSTROM as KE
from openmm_mlff.units import KJ_PER_MOL_PER_EV

SITES = 6
CELL = np.array([[22.0, 0, 0], [3.0, 20.0, 0], [-4.0, 2.5, 24.0]])
POLARIZABILITIES = (0.4, 1.1, 0.8, 0.0, 0.9, 0.5)
KINDS = {
    "open": ({}, None),
    "open, damped, induced": ({"damping": 1.2, "polarizabilities": POLARIZABILITIES, "induction_damping": 2.0}, None),
    "reaction field": ({"method": "reaction field", "cutoff": 8.0}, None),
    "periodic reaction field, induced": (
        {"method": "reaction field", "cutoff": 8.0, "polarizabilities": POLARIZABILITIES},
        CELL,
    ),
    "mesh": ({"method": "mesh", "cutoff": 9.0, "alpha": 0.3, "grid": (26, 24, 30)}, CELL),
    "mesh, damped, induced": (
        {
            **{"method": "mesh", "cutoff": 9.0, "alpha": 0.3, "grid": (26, 24, 30), "damping": 1.0},
            **{"polarizabilities": POLARIZABILITIES, "induction_damping": 1.5},
        },
        CELL,
    ),
}


def charged(n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of a small region and of charges around it (angstrom), all charges, and the region's own (e)."""
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0.0, 22.0, (n, 3))
    positions[:SITES] = rng.normal(scale=1.5, size=(SITES, 3)) + 10.0
    return positions, rng.normal(size=n), rng.normal(size=SITES)


def energy_and_forces(
    spec: SurroundingsSpec, positions: np.ndarray, q: np.ndarray, cell: np.ndarray | None
) -> tuple[float, np.ndarray]:
    surroundings = Surroundings(spec, tuple(range(SITES)))
    phi = surroundings.field(positions, positions[:SITES].copy(), cell)
    more, site_forces, forces = surroundings.react(q)
    forces[:SITES] += site_forces
    return float(phi @ q) + more, forces


def openmm_reciprocal(
    positions: np.ndarray, q: np.ndarray, alpha: float, grid: tuple[int, int, int]
) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (eV/angstrom) of OpenMM's reciprocal sum, self energy included."""
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*(CELL / 10))
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    force.setCutoffDistance(0.9)
    force.setPMEParameters(alpha * 10, *grid)
    force.setReciprocalSpaceForceGroup(1)
    for charge in q:
        system.addParticle(1.0)
        force.addParticle(charge, 1.0, 0.0)
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions / 10)
    state = context.getState(energy=True, forces=True, groups={1})
    forces = np.array(state.getForces(asNumpy=True)._value) / KJ_PER_MOL_PER_EV / 10
    return state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV, forces


@pytest.mark.parametrize("grid", [(26, 24, 30), (21, 25, 27)])
def test_mesh_is_that_of_openmm(grid: tuple[int, int, int]) -> None:
    positions, q, _ = charged()
    mesh, alpha = Mesh(0.3, grid), 0.3
    mesh.set_box(CELL)
    phi, gradient, _ = mesh.gather(mesh.potential(mesh.spread(positions, q)), positions)
    energy, forces = openmm_reciprocal(positions, q, alpha, grid)
    # OpenMM adds the energy of each charge in its own cloud, and of the neutralising background
    own = -alpha / math.sqrt(math.pi) * np.square(q).sum()
    background = -math.pi / (2 * mesh.volume * alpha**2) * q.sum() ** 2
    assert KE * (0.5 * q @ phi + own + background) == pytest.approx(energy, rel=1e-9)
    np.testing.assert_allclose(-KE * q[:, None] * gradient, forces, atol=1e-8 * np.abs(forces).max())


@pytest.mark.parametrize("kind", KINDS)
def test_forces_are_the_slope_of_the_energy(kind: str) -> None:
    """At fixed charges of the region, on its atoms and on those around it."""
    options, cell = KINDS[kind]
    positions, charges, q = charged()
    spec = SurroundingsSpec(len(positions), pack(charges), **options)
    _, forces = energy_and_forces(spec, positions, q, cell)
    h = 1e-5
    for i in (0, 3, SITES - 1, *np.argsort(-np.abs(forces[SITES:]).sum(1))[:4] + SITES, 100):
        for axis in range(3):
            ends = []
            for sign in (1, -1):
                moved = positions.copy()
                moved[i, axis] += sign * h
                ends.append(energy_and_forces(spec, moved, q, cell)[0])
            slope = (ends[0] - ends[1]) / (2 * h)
            assert forces[i, axis] == pytest.approx(-slope, rel=1e-6, abs=1e-6)
    if options.get("method") != "mesh":
        np.testing.assert_allclose(forces.sum(0), 0.0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_compiled_code_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.compiler() is None:
        pytest.skip("no C++ compiler here")
    options, cell = KINDS[kind]
    positions, charges, q = charged(seed=1)
    spec = SurroundingsSpec(len(positions), pack(charges), **options)
    assert mm_field.code() is not None
    energy, forces = energy_and_forces(spec, positions, q, cell)
    monkeypatch.setattr(mm_field, "code", lambda: None)
    other, expected = energy_and_forces(spec, positions, q, cell)
    assert energy == pytest.approx(other, rel=1e-12)
    np.testing.assert_allclose(forces, expected, atol=1e-12 * np.abs(forces).max())


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "compiler", lambda: None)
    mm_field.code.cache_clear()
    native.library.cache_clear()
    try:
        assert mm_field.code() is None
        assert "numpy" in caplog.text and "compiler" in caplog.text
    finally:
        mm_field.code.cache_clear()
        native.library.cache_clear()


def test_damaged_source_is_reported(tmp_path: Path) -> None:
    (tmp_path / "broken.cpp").write_text("this is not C++", encoding="utf-8")
    if native.compiler() is None:
        pytest.skip("no C++ compiler here")
    with pytest.raises(RuntimeError, match="failed"):
        native.library(tmp_path / "broken.cpp")


def test_against_mlipops() -> None:
    """Potential and field of charges in a skewed box at sites that are none of them."""
    mlipops = pytest.importorskip("mlipops")
    positions, charges, _ = charged()
    sites, outside = positions[:SITES], positions[SITES:]
    q = charges[SITES:] - charges[SITES:].mean()
    alpha, grid, cutoff = 0.4, (40, 36, 45), 9.0
    neighbors = mlipops.NeighborList(cutoff)
    pme = mlipops.CoulombPME(neighbors, None, *grid, 5, alpha, 1.0)
    # its grid is in single precision
    tensors = [torch.from_numpy(x).float() for x in (sites, outside, q, CELL)]
    phi = pme.compute_potential(*tensors)
    field = pme.compute_field(*tensors)
    spec = SurroundingsSpec(
        len(positions), pack(np.concatenate([np.zeros(SITES), q])), "mesh", cutoff, alpha=alpha, grid=grid
    )
    surroundings = Surroundings(spec, tuple(range(SITES)))
    found = surroundings.field(positions, sites, CELL) / KE
    np.testing.assert_allclose(found, phi.numpy(), atol=2e-5)
    _, forces, _ = surroundings.react(np.ones(SITES))
    np.testing.assert_allclose(forces / KE, field.numpy(), atol=2e-5)
    assert np.abs(found).max() > 0.1 and np.abs(forces / KE).max() > 0.1


def test_large_box_becomes_a_cluster() -> None:
    """What is left of the images of a neutral region and neutral surroundings is -2 pi M^2/3V of their dipoles."""
    rng = np.random.default_rng(3)
    positions = rng.normal(scale=2.0, size=(20, 3))
    charges = rng.normal(size=20)
    charges[:SITES] -= charges[:SITES].mean()
    charges[SITES:] -= charges[SITES:].mean()
    q = charges[:SITES] + 0.1 * np.array([1, -1, 2, -2, 1, -1])
    around = charges[SITES:] @ positions[SITES:]
    own, reference = q @ positions[:SITES], charges[:SITES] @ positions[:SITES]
    squares = 2 * own @ around + 2 * own @ reference - reference @ reference
    cluster, forces = energy_and_forces(SurroundingsSpec(20, pack(charges)), positions, q, None)
    for side in (50.0, 100.0):
        spec = SurroundingsSpec(20, pack(charges), "mesh", 20.0, alpha=0.2, grid=(int(side),) * 3)
        energy, found = energy_and_forces(spec, positions, q, side * np.eye(3))
        left = -KE * 2 * math.pi / (3 * side**3) * squares
        # the next term is smaller by the square of size and box
        assert energy - cluster == pytest.approx(left, rel=0.1 * (50.0 / side) ** 2) and abs(left) > 1e-3
    np.testing.assert_allclose(found, forces, atol=1e-3 * np.abs(forces).max())


def test_images_of_a_frozen_region_are_those_of_openmm() -> None:
    """With the reference charges themselves, the whole lattice energy is OpenMM's, less what is in one cell."""
    positions, charges, _ = charged(40, seed=4)
    alpha, grid = 0.3, (26, 24, 30)

    def lattice(q: np.ndarray) -> float:
        system_energy, _ = openmm_reciprocal(positions, q, alpha, grid)
        d = positions[:, None] - positions[None]
        for axis in (2, 1, 0):
            d -= np.rint(d[..., axis, None] / CELL[axis, axis]) * CELL[axis]
        r = np.linalg.norm(d, axis=-1)[np.triu_indices(len(q), 1)]
        pairs = (q[:, None] * q[None])[np.triu_indices(len(q), 1)]
        g = torch.erfc(torch.from_numpy(alpha * r)).numpy() / r
        return system_energy + KE * float((pairs * g)[r < 9.0].sum())

    inside, outside = charges.copy(), charges.copy()
    inside[SITES:] = 0.0
    outside[:SITES] = 0.0
    r = np.linalg.norm(positions[:SITES, None] - positions[None, :SITES], axis=-1)[np.triu_indices(SITES, 1)]
    one_cell = KE * float((np.outer(charges, charges)[:SITES, :SITES][np.triu_indices(SITES, 1)] / r).sum())
    expected = lattice(charges) - lattice(outside) - one_cell
    spec = SurroundingsSpec(len(charges), pack(charges), "mesh", 9.0, alpha=alpha, grid=grid)
    energy, _ = energy_and_forces(spec, positions, charges[:SITES], CELL)
    assert energy == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "kernel", [Kernel(), Kernel.reaction_field(9.0, 78.3), Kernel(9.0, alpha=0.35)], ids=["1/r", "field", "erfc"]
)
@pytest.mark.parametrize("damping", [0.0, 1.7])
def test_radial_derivatives(kernel: Kernel, damping: float) -> None:
    r, h = np.array([0.8, 2.5, 6.0]), 1e-4
    (low, _, _), (g, slope, bend), (high, _, _) = (radial(kernel, r + k * h, damping) for k in (-1, 0, 1))
    np.testing.assert_allclose(slope * r, (high - low) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(bend * r**2 + slope, (high - 2 * g + low) / h**2, rtol=1e-5)


def test_reaction_field_ends_at_the_cutoff() -> None:
    g, _, _ = radial(Kernel.reaction_field(9.0, 78.3), np.array([9.0]), 0.0)
    assert g[0] == pytest.approx(0.0, abs=1e-15)


def test_pairs_in_narrow_and_wide_skewed_boxes() -> None:
    """Against all images, in boxes where the search may leave out what is far from the region's centre or may not."""
    narrow = np.array([[9.1, 0, 0], [4.0, 8.5, 0], [-3.9, 3.5, 9.0]])
    rng = np.random.default_rng(2)
    images = np.stack(np.meshgrid(*[np.arange(-8, 9)] * 3), -1).reshape(-1, 3)
    for cell, cutoff in ((narrow, 4.2), (3 * narrow, 4.2)):
        positions, sites = rng.uniform(-10, 20, (150, 3)), 2 * rng.normal(size=(5, 3))
        pairs = Pairs(np.arange(150), positions, sites, cell, cutoff)
        d = sites[:, None, None] - positions[None, :, None] + (images @ cell)[None, None]
        r = np.linalg.norm(d, axis=-1)
        expected = {(i, j, round(float(r[i, j, k]), 9)) for i, j, k in zip(*np.nonzero(r < cutoff), strict=True)}
        found = np.linalg.norm(pairs.d, axis=1)
        assert {(i, j, round(float(x), 9)) for i, j, x in zip(pairs.site, pairs.source, found, strict=True)} == expected
        assert len(expected) > 5


# -- induced dipoles -------------------------------------------------------------------------------------------------


def test_induced_dipoles_in_closed_form() -> None:
    field = np.array([[0.02, -0.01, 0.03]])
    energy, dipoles, forces = induction.induced_dipoles(np.zeros((1, 3)), field, np.array([1.3]))
    assert energy == pytest.approx(-0.5 * 1.3 * np.square(field).sum(), rel=1e-12)
    np.testing.assert_allclose(dipoles, 1.3 * field, rtol=1e-12)
    np.testing.assert_array_equal(forces, 0.0)
    # two far atoms in a field along their axis: alpha/(1 - 2 alpha/r^3) each (Applequist)
    r, alpha = 9.0, 1.3
    ends = np.array([[0.0, 0, 0], [0, 0, r]])
    along = np.array([[0.0, 0, 0.02]] * 2)
    _, dipoles, _ = induction.induced_dipoles(ends, along, np.full(2, alpha))
    np.testing.assert_allclose(dipoles[:, 2], 0.02 * alpha / (1 - 2 * alpha / r**3), rtol=1e-9)
    # at one place, Gaussian dipoles stay finite
    close = np.array([[0.0, 0, 0], [0, 0, 0.05]])
    energy, _, _ = induction.induced_dipoles(close, along, np.full(2, alpha))
    assert -2.0 * alpha * 0.02**2 < energy < 0.0


def test_no_polarisation_catastrophe() -> None:
    """Point dipoles of such a chain would grow without bound (r^3 < 2 alpha); these have a minimum."""
    chain = np.array([[0.0, 0, 0.3 * k] for k in range(12)])
    energy, dipoles, _ = induction.induced_dipoles(chain, np.full((12, 3), 0.02), np.full(12, 2.0))
    assert np.isfinite(dipoles).all() and -0.5 * 12 * 2.0 * 12 * 3 * 0.02**2 < energy < 0.0


# -- what is stored --------------------------------------------------------------------------------------------------


def test_charges_are_stored_exactly_and_shortly() -> None:
    water = np.tile([-0.834, 0.417, 0.417], 7000)
    assert len(pack(water)) < 1000
    np.testing.assert_array_equal(unpack(pack(water), len(water)), water)
    for n in (len(water) - 1, len(water) + 1):
        with pytest.raises(ValueError, match="charges"):
            unpack(pack(water), n)
    with pytest.raises(ValueError, match="charges"):
        unpack("no base64!", 3)


def test_bad_specifications() -> None:
    good = SurroundingsSpec(3, pack(np.ones(3)), "mesh", 9.0, alpha=0.3, grid=(20, 20, 20))
    for change in ({"method": "tree"}, {"cutoff": None}, {"grid": None}, {"grid": (20, 20)}, {"grid": (20, 20, 10**6)}):
        with pytest.raises(ValueError):
            replace(good, **change)
    with pytest.raises(ValueError, match="field"):
        Surroundings(good, (0,)).react(np.ones(1))
    with pytest.raises(ValueError, match="twice the cutoff"):
        Surroundings(good, (0,)).field(np.zeros((3, 3)), np.zeros((1, 3)), 17.0 * np.eye(3))
