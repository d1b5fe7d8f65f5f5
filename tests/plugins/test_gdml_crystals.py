"""Symmetry groups of supercells, sums over periodic images, and the fused assembly of kernel matrices."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, graphene
from openmm import app, unit
from openmmml import MLPotential

from openmm_gdml import crystals, images, native_blocks, operators
from openmm_gdml.descriptors import (
    gradients_of,
    inverse_distances,
    pair_permutations,
    times_jacobian,
    times_jacobian_transposed,
)
from openmm_gdml.model import GDMLPotential
from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.path_integrals import (
    RingPolymers,
    ring_dynamics,
    ring_dynamics_frame,
    start_ring_dynamics,
)
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM


def as_structure(atoms: Atoms) -> Structure:
    return Structure(atoms.numbers, atoms.positions, cell=atoms.cell.array)


def rows(permutations: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(int(i) for i in row) for row in permutations}


def hydride() -> Atoms:
    """Hydrogen in an octahedral site of 3x3x3 primitive cells of palladium."""
    atoms = bulk("Pd", "fcc", a=3.88).repeat(3)
    atoms.append("H")
    atoms.positions[-1] = atoms.positions[0] + atoms.cell.array.sum(0) / 6
    return atoms


@pytest.fixture(scope="module")
def copper() -> Atoms:
    return bulk("Cu", "fcc", a=3.61).repeat(3)


@pytest.fixture(scope="module")
def full(copper: Atoms) -> crystals.CrystalSymmetry:
    return crystals.symmetry(copper)


@pytest.fixture(scope="module")
def thermal(shared: Path) -> list[Structure]:
    """The first frames of the shared copper data set."""
    data = np.load(shared / "data/gdml/dataset_cu27.npz", allow_pickle=False)
    return [
        Structure(data["z"], r, cell=data["lattice"].T, energy=float(e), forces=f)
        for r, e, f in zip(data["R"][:200], data["E"], data["F"], strict=False)
    ]


# -- groups --------------------------------------------------------------------------------------------------------


def test_copper_has_27_translations_times_48_point_operations(copper: Atoms, full: crystals.CrystalSymmetry) -> None:
    """Against all signed permutations of the cubic axes about an atom, written down by hand."""
    cell, r = copper.cell.array, copper.positions
    expected = set()
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turned = (r - r[0])[:, axes] * signs
            for to in r:
                fraction = (turned[:, None] + to - r) @ np.linalg.inv(cell)
                distance = np.linalg.norm((fraction - np.rint(fraction)) @ cell, axis=-1)
                assert distance.min(axis=1).max() < 1e-9
                expected.add(tuple(int(i) for i in distance.argmin(axis=1)))
    assert len(expected) == 27 * 48 == len(full)
    assert rows(full.permutations) == expected
    assert full.n_translations == 27 and full.space_group == "Fm-3m (225)" and full.deviation < 1e-9
    assert np.array_equal(full.permutations[0], np.arange(27))
    assert np.array_equal(np.asarray(full), full.permutations)
    assert "27 translations x 48 point operations" in full.inspect()


def test_thermal_geometries_give_the_group_and_the_published_translations(
    thermal: list[Structure], full: crystals.CrystalSymmetry, shared: Path
) -> None:
    found = crystals.symmetry(thermal)
    assert len(found) == 1296 and 0 < found.deviation < 0.1
    # the reference is averaged over the group: it has the symmetry exactly
    distances = crystals.shortest(found.reference.positions[:, None] - found.reference.positions, thermal[0].cell)
    for q in found.permutations[::97]:
        assert np.abs(distances[np.ix_(q, q)] - distances).max() < 1e-9
    published = np.load(shared / "data/gdml/dataset_cu27.npz", allow_pickle=False)["perms"]
    translations = crystals.symmetry(thermal, "translations")
    assert rows(translations.permutations) == rows(published) and len(translations) == 27
    assert crystals.symmetry(thermal, published).n_translations == 27
    assert 0.2 < crystals.check_displacements(found, thermal) < 0.6
    again = crystals.of_training_data(thermal, reference=found.reference)
    assert np.array_equal(again.permutations, found.permutations) and again.deviation < 1e-9


def test_rounding_fractions_loses_symmetry_that_distances_have(full: crystals.CrystalSymmetry) -> None:
    """Pairs on the surface of the Wigner-Seitz cell have several nearest images, of which rounding takes one."""
    assert full.n_kept_by_rounding == 324
    sheet = graphene(size=(5, 5, 1), vacuum=8.0)
    sheet.pbc = True
    flat = crystals.symmetry(sheet)
    # 25 translations x 12; the mirror plane of the sheet moves no atom
    assert (len(flat), flat.n_translations, flat.n_kept_by_rounding) == (300, 25, 100)
    assert "only 100 of them keep" in flat.inspect()
    cubic = crystals.symmetry(bulk("Pd", "fcc", a=3.88, cubic=True).repeat((3, 1, 1)))
    assert cubic.n_kept_by_rounding == len(cubic)


def test_defects_leave_the_point_group_of_their_site(copper: Atoms) -> None:
    vacancy = copper.copy()
    del vacancy[13]
    for atoms in (vacancy, hydride()):
        group = crystals.symmetry(atoms)
        assert (len(group), group.n_translations) == (48, 1)
    hopping = crystals.symmetry(hydride(), mobile=[27])
    assert len(hopping) == 1296 and (hopping.permutations[:, 27] == 27).all()
    slab = fcc111("Cu", (3, 3, 3), vacuum=8.0)
    slab.pbc = True
    assert len(crystals.symmetry(slab)) == 9 * 12
    assert len(crystals.symmetry(slab, "translations")) == 9
    assert len(crystals.symmetry(slab, "none")) == 1


def test_bad_references_and_permutations_are_refused(copper: Atoms, full: crystals.CrystalSymmetry) -> None:
    with pytest.raises(ValueError, match="lattice: expected a periodic supercell"):
        crystals.symmetry(Structure([29, 29], np.eye(3)[:2] * 2.0))
    with pytest.raises(ValueError, match="symmetry: expected one of full, translations, none"):
        crystals.symmetry(copper, "everything")
    with pytest.raises(ValueError, match="tolerance: expected a positive length"):
        crystals.symmetry(copper, tolerance=-1.0)
    with pytest.raises(ValueError, match="mobile: expected some of the atoms"):
        crystals.symmetry(copper, mobile=[27])
    with pytest.raises(ValueError, match="expected a group, but the product"):
        crystals.symmetry(copper, full.permutations[:100])
    with pytest.raises(ValueError, match="the identity is missing"):
        crystals.symmetry(copper, full.permutations[1:2])
    with pytest.raises(ValueError, match="shape"):
        crystals.symmetry(copper, full.permutations[:, :26])
    exchange = np.arange(27)
    exchange[[0, 1]] = 1, 0
    with pytest.raises(ValueError, match="keeps the reference only to"):
        crystals.symmetry(copper, np.array([np.arange(27), exchange]))
    alloy = copper.copy()
    alloy.numbers[0] = 46
    with pytest.raises(ValueError, match="onto their own element, but row 1"):
        crystals.symmetry(alloy, np.array([np.arange(27), exchange]))
    random = np.random.default_rng(0)
    distorted = as_structure(copper).replace(positions=copper.positions + random.normal(scale=0.1, size=(27, 3)))
    assert len(crystals.symmetry(distorted, tolerance=0.01)) == 1


def test_hopping_and_disorder_are_noticed(copper: Atoms, full: crystals.CrystalSymmetry) -> None:
    good = as_structure(copper)
    assert crystals.check_displacements(full, [good.replace(positions=good.positions + 3.0)]) < 1e-9
    hopped = good.positions.copy()
    hopped[5] += 0.6 * (copper.positions[1] - copper.positions[0])
    with pytest.raises(ValueError, match=r"atom 5 of structure 1 is 1\.5"):
        crystals.check_displacements(full, [good, good.replace(positions=hopped)])
    with pytest.raises(ValueError, match="atom 5 of structure 1"):
        crystals.of_training_data([good, good.replace(positions=hopped)], reference=good)
    with pytest.raises(ValueError, match="one cell, but that of structure 1"):
        crystals.mean_structure([good, good.replace(cell=good.cell * 1.01)])


# -- images --------------------------------------------------------------------------------------------------------


def test_image_sums_are_sums_over_the_lattice(copper: Atoms) -> None:
    """Against a plain sum over many cells, also for unreduced lattice vectors and atoms in other cells."""
    random = np.random.default_rng(1)
    cell = copper.cell.array
    r = copper.positions + random.normal(scale=0.1, size=(27, 3))
    cutoff = images.default_cutoff(cell)
    # the octahedral hole of the lattice of supercells is half its cubic constant away
    assert cutoff == pytest.approx(1.5 * 3 * 3.61 / 2, rel=0.01)
    offsets = np.array(list(itertools.product(range(-6, 7), repeat=3))) @ cell
    found = images.image_sums(torch.from_numpy(r), torch.from_numpy(cell), power=2.5).numpy()
    pairs = list(zip(*np.tril_indices(27, -1), strict=True))
    for k in (0, 17, 200, 350):
        i, j = pairs[k]
        distance = np.linalg.norm(r[i] - r[j] + offsets, axis=1)
        distance = distance[distance < cutoff]
        expected = np.sum(distance**-2.5 * (1 - (distance / cutoff) ** 2) ** 3)
        assert found[k] == pytest.approx(expected, rel=1e-12)
    skewed = np.array([[1, 0, 0], [3, 1, 0], [-2, 4, 1]]) @ cell
    elsewhere = r + random.integers(-2, 3, size=(27, 3)) @ cell
    other = images.image_sums(torch.from_numpy(elsewhere), torch.from_numpy(skewed), power=2.5).numpy()
    assert np.abs(other - found).max() < 1e-12


def test_gradients_of_image_sums(copper: Atoms) -> None:
    random = np.random.default_rng(2)
    r = torch.from_numpy(copper.positions + random.normal(scale=0.1, size=(3, 27, 3)))
    w = torch.from_numpy(random.normal(size=(3, 351)))
    for lattice in (None, torch.from_numpy(copper.cell.array), torch.from_numpy(np.stack([copper.cell.array] * 3))):
        x, pull = torch.func.vjp(lambda p, lattice=lattice: images.image_sums(p, lattice), r)
        values, g = images.image_sum_gradients(r, lattice)
        assert torch.equal(values, x) or float((values - x).abs().max()) < 1e-15
        assert float((times_jacobian_transposed(g, w, 27) - pull(w)[0]).abs().max()) < 1e-13
    assert torch.allclose(images.image_sums(r, power=1.0), inverse_distances(r), rtol=1e-14)


def test_image_sums_have_the_symmetry_of_the_crystal(copper: Atoms, full: crystals.CrystalSymmetry) -> None:
    r, cell = torch.from_numpy(copper.positions), torch.from_numpy(copper.cell.array)
    moved = pair_permutations(torch.from_numpy(full.permutations))
    summed, rounded = images.image_sums(r, cell), inverse_distances(r, cell)
    assert float((summed[moved] - summed).abs().max()) < 1e-14
    assert float((rounded[moved] - rounded).abs().max()) > 0.05


def test_image_sums_are_smooth_where_rounding_jumps() -> None:
    """Two atoms half a cell apart, in a cell whose faces are no mirrors of the pair."""
    cell = torch.tensor([[5.0, 0.0, 0.0], [2.0, 5.0, 0.0], [1.0, 1.5, 6.0]], dtype=torch.float64)

    def at(s: float) -> torch.Tensor:
        other = torch.tensor([0.5 + s, 0.2, 0.1], dtype=torch.float64) @ cell
        return torch.stack([torch.zeros(3, dtype=torch.float64), other])

    def jump(function: object) -> float:
        before, after = (function(at(s), cell) for s in (-1e-9, 1e-9))  # type: ignore[operator]
        return float((before - after).abs().max())

    assert jump(inverse_distances) > 1e-3
    assert jump(images.image_sums) < 1e-9
    steps = torch.linspace(-1e-3, 1e-3, 21, dtype=torch.float64)
    slopes = torch.stack([images.image_sum_gradients(at(float(s)), cell)[1][0] for s in steps])
    second = slopes[2:] - 2 * slopes[1:-1] + slopes[:-2]
    assert float(second.abs().max()) < 1e-6 * float(slopes.abs().max())


def test_bad_cutoffs_are_refused(copper: Atoms) -> None:
    r, cell = torch.from_numpy(copper.positions), torch.from_numpy(copper.cell.array)
    with pytest.raises(ValueError, match="cutoff: expected a positive length"):
        images.image_sums(r, cell, cutoff=-1.0)


@pytest.mark.parametrize("lattice", ["periodic", "open"])
def test_fused_kernel_knows_image_sums(lattice: str, copper: Atoms, full: crystals.CrystalSymmetry) -> None:
    random = np.random.default_rng(4)
    cell = copper.cell.array if lattice == "periodic" else None
    r = copper.positions + random.normal(scale=0.1, size=(6, 27, 3))
    for options in ({}, {"power": 2.5, "cutoff": 7.0} if cell is not None else {"power": 2.5}):
        box = None if cell is None else torch.from_numpy(cell)
        x, g = images.image_sum_gradients(torch.from_numpy(r), box, **options)  # type: ignore[arg-type]
        a = times_jacobian(g, torch.from_numpy(random.normal(size=(6, 27, 3))))
        model = GDMLPotential.from_coefficients(
            copper.numbers,
            0.5,
            x,
            a,
            1.0,
            full.permutations[::40],
            lattice=cell,
            descriptor="image_sums",
            descriptor_options=options,
        )
        structure = Structure(copper.numbers, r[0] + 0.02 * random.normal(size=(27, 3)), cell=cell)
        fused, plain = (model.evaluator(structure, compile=c) for c in (True, False))
        one, other = (f(structure.positions, cell) for f in (fused, plain))
        assert fused.compiled or library_missing()
        assert float((one.energy - other.energy).abs()) < 1e-11
        assert one.forces is not None and other.forces is not None
        assert float((one.forces - other.forces).abs().max()) < 1e-11 * float(other.forces.abs().max())
        exact = model.evaluate(model.batch(structure), create_graph=True).forces
        assert exact is not None and float((one.forces - exact.detach()).abs().max()) < 1e-9


def library_missing() -> bool:
    return native_blocks.library() is None


# -- beads ---------------------------------------------------------------------------------------------------------


def test_beads_of_a_crystal_feel_the_model() -> None:
    """The model in a turned box, for beads as replicas and for OpenMM's RPMDIntegrator, against single evaluations."""
    random = np.random.default_rng(5)
    atoms = hydride()
    group = crystals.symmetry(atoms)
    r = torch.from_numpy(atoms.positions + random.normal(scale=0.1, size=(4, 28, 3)))
    x, g = images.image_sum_gradients(r, torch.from_numpy(atoms.cell.array))
    model = GDMLPotential.from_coefficients(
        atoms.numbers,
        0.5,
        x,
        times_jacobian(g, torch.from_numpy(random.normal(size=(4, 28, 3)))),
        0.0,
        group.permutations,
        lattice=atoms.cell.array,
        descriptor="image_sums",
    )
    cell, turn = atoms.cell.standard_form()
    topology = app.Topology()
    residue = topology.addResidue("PDH", topology.addChain())
    for number in atoms.numbers:
        topology.addAtom("X", app.Element.getByAtomicNumber(int(number)), residue)
    box = [openmm.Vec3(*row) for row in np.tril(cell) * 0.1] * unit.nanometer
    topology.setPeriodicBoxVectors(app.internal.unitcell.reducePeriodicBoxVectors(box))
    system = MLPotential("gdml", model=model).createSystem(topology, removeCMMotion=False, compile=True)
    home = atoms.positions @ turn.T * 0.1
    rings = RingPolymers(system, topology, n_beads=3, temperature=300.0)
    together = rings.context(rings.integrator(0.00025, seed=1), "Reference")
    rings.start(together, home, seed=1)
    alone = ring_dynamics(system, 3, 300.0, 0.00025, seed=1)
    start_ring_dynamics(alone, home, rings.masses, seed=1)
    for context, frame in (
        (together, lambda: rings.frame(together)),
        (alone, lambda: ring_dynamics_frame(alone, rings.masses)),
    ):
        context.getIntegrator().step(40)
        found = frame()
        assert found.gyration.min() > 0
        for positions, forces in zip(found.positions, found.forces, strict=True):
            turned = Structure(atoms.numbers, positions * 10 @ turn, cell=atoms.cell.array)
            expected = model.energy_and_forces(turned)[1] @ turn.T * KJ_PER_MOL_NM_PER_EV_ANGSTROM
            assert np.abs(forces - expected).max() < 1e-6 * np.abs(expected).max()


# -- kernel matrices -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(native_blocks.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_fused_blocks_equal_those_of_torch(threads: int, full: crystals.CrystalSymmetry, copper: Atoms) -> None:
    random = np.random.default_rng(3)
    cell = torch.from_numpy(copper.cell.array)
    gradients = gradients_of("image_sums")
    assert gradients is not None
    a, b = (
        operators.PairTables.of(
            torch.from_numpy(copper.positions + random.normal(scale=0.1, size=(n, 27, 3))), cell, gradients
        )
        for n in (3, 10)
    )
    group = torch.from_numpy(full.permutations[::40])
    expected = operators._torch_blocks(a, b, 0.7, group)
    out = torch.full((3, 81, 12, 81), torch.nan, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native_blocks.fill(a, b, 0.7, group, out[:, :, 1:11])
    finally:
        torch.set_num_threads(before)
    assert float((out[:, :, 1:11] - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert bool(out[:, :, [0, 11]].isnan().all())


def test_point_group_saves_training_geometries(thermal: list[Structure]) -> None:
    """The same few geometries: translations alone, all of O_h, and O_h with a descriptor that has its symmetry."""
    train, test = thermal[:100:20], thermal[110::30]
    lattice = train[0].cell
    found = {}
    for name, kind, descriptor in (
        ("translations", "translations", "inverse_distances"),
        ("full", "full", "inverse_distances"),
        ("images", "full", "image_sums"),
    ):
        group = crystals.symmetry(thermal, kind).permutations
        gradients = gradients_of(descriptor)
        assert gradients is not None
        r, q = (np.stack([s.positions for s in part]) for part in (train, test))
        operator = operators.KernelOperator(r, 10.0, group, lattice, gradients=gradients)
        forces = torch.from_numpy(np.stack([s.forces for s in train]).ravel())  # type: ignore[arg-type]
        matrix = operator.dense()
        matrix.diagonal().add_(1e-10)
        alpha = torch.linalg.solve(matrix, forces)
        k = operators.force_blocks(q, r, 10.0, group, lattice, gradients).reshape(81 * len(q), -1)
        error = (k @ alpha).numpy() - np.stack([s.forces for s in test]).ravel()  # type: ignore[arg-type]
        found[name] = float(np.sqrt(np.mean(error**2)))
    # kcal/mol/angstrom
    assert found["images"] < 0.1 < found["full"] < 0.6 < found["translations"] < 2.5
