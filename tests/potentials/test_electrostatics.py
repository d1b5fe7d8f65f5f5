"""Charges of a periodic box in reciprocal space: Madelung constants, another splitting, stored numbers, derivatives."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials import compile as compilation
from openmm_mlff.potentials import electrostatics
from openmm_mlff.potentials.electrostatics import mesh_points, smeared_lattice_energy
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.potential import Potential, Prediction

#: eV angstrom/e^2
COULOMB = 14.399645351950548
TRICLINIC = np.array([[9.0, 0.0, 0.0], [-2.5, 8.0, 0.0], [3.0, -2.0, 7.5]])
METHODS = ("ewald", "pme")


def box(n: int, cell: np.ndarray, seed: int = 0, net: float = 0.0) -> tuple[Batch, Tensor]:
    """n atoms anywhere around the box, with random charges that add up to `net`."""
    random = np.random.default_rng(seed)
    positions = random.uniform(-1.0, 2.0, (n, 3)) @ cell
    charges = random.normal(0.0, 0.5, n)
    charges += (net - charges.sum()) / n
    return collate([Structure(np.full(n, 6), positions, cell=cell)]), torch.tensor(charges)


def in_real_space(charges: Tensor, batch: Batch, near: float, far: float, shells: int) -> float:
    """1/2 sum of q_i q_j [erf(r/near) - erf(r/far)]/r over all images but the charges themselves, in e^2/angstrom.

    `near` = 0 stands for point charges.
    """
    assert batch.cell is not None
    images = torch.tensor(list(product(range(-shells, shells + 1), repeat=3)), dtype=torch.float64) @ batch.cell[0]
    r = (batch.positions[:, None, None] - batch.positions[None, :, None] + images).norm(dim=-1)
    own = r < 1e-9
    r = r.masked_fill(own, 1.0)
    inner = torch.erfc(r / near) if near else 0.0
    pairs = ((torch.erfc(r / far) - inner) / r).masked_fill(own, 0.0)
    return float(0.5 * torch.einsum("i,j,ijn->", charges, charges, pairs))


@pytest.mark.parametrize("method", METHODS)
def test_madelung_constant_of_rock_salt(method: str) -> None:
    """Point charges are smeared ones and what erfc(r/sigma)/r leaves, a short-ranged sum in real space."""
    edge, sigma = 5.64, 2.4
    sites = np.array(list(product((0, 1), repeat=3)))
    charges = torch.tensor((-1.0) ** sites.sum(1))
    batch = collate([Structure(np.full(8, 11), sites * edge / 2 + 0.3, cell=edge * np.eye(3))])
    energy = float(smeared_lattice_energy(charges, batch, sigma, method, 1.0)[0])
    energy += in_real_space(charges, batch, 0.0, sigma, shells=4)
    # 1.747564594633182, Borwein, Borwein and Taylor, J. Math. Phys. 26, 2999 (1985), per ion pair
    assert energy / 4 * (edge / 2) == pytest.approx(-1.747564594633182, abs=1e-11 if method == "ewald" else 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_charge_in_a_uniform_background(method: str) -> None:
    """Wigner's lattice: E L = -2.837297 / 2 e^2; the background of smeared charges is the smeared one."""
    edge, sigma = 6.0, 3.0
    batch = collate([Structure(np.array([11]), np.array([[1.0, 2.0, 2.5]]), cell=edge * np.eye(3))])
    charge = torch.ones(1, dtype=torch.float64)
    energy = float(smeared_lattice_energy(charge, batch, sigma, method, 1.0)[0])
    energy += in_real_space(charge, batch, 0.0, sigma, shells=4)
    # the background that meets the difference between point charges and smeared ones
    energy -= 0.5 * math.pi * sigma**2 / edge**3
    assert energy * edge == pytest.approx(-2.837297479 / 2, abs=1e-9 if method == "ewald" else 1e-5)


@pytest.mark.parametrize("net", [0.0, 2.0])
def test_wider_charges_and_their_difference_in_real_space(net: float) -> None:
    batch, charges = box(7, TRICLINIC, net=net)
    near, far = 3.0, 4.5
    narrow = float(smeared_lattice_energy(charges, batch, near, "ewald", 1.0)[0])
    wide = float(smeared_lattice_energy(charges, batch, far, "ewald", 1.0)[0])
    between = in_real_space(charges, batch, near, far, shells=6)
    background = 0.5 * net**2 / np.linalg.det(TRICLINIC) * math.pi * (far**2 - near**2)
    assert narrow == pytest.approx(wide + between - background, abs=1e-10)


def test_stored_energy_of_water(shared: Path) -> None:
    """1536 atoms with the reference charges of SO3LR; the sum was made by another program, over a sphere of k."""
    data = np.load(shared / "data/so3lr/visible.npz", allow_pickle=False)
    cell, charges = data["water_64_lr6/cell"], torch.tensor(np.tile(data["water_64_lr6/partial_charges"], 8))
    copies = [data["water_64_lr6/positions"] + np.array(n) @ cell for n in product((0, 1), repeat=3)]
    batch = collate([Structure(np.tile(data["water_64_lr6/numbers"], 8), np.concatenate(copies), cell=2 * cell)])
    assert float(smeared_lattice_energy(charges, batch, 4.0, "ewald", COULOMB)[0]) == pytest.approx(
        -440.27095663, abs=1e-6
    )
    assert float(smeared_lattice_energy(charges, batch, 4.0, "pme", COULOMB)[0]) == pytest.approx(
        -440.27095663, abs=1e-4
    )


@pytest.mark.parametrize("method", METHODS)
def test_derivatives(method: str) -> None:
    """First and second, of charges, positions and box vectors; finite differences of the energy are the truth."""
    batch, charges = box(3, TRICLINIC, seed=4, net=0.3)
    assert batch.cell is not None

    def energy(q: Tensor, positions: Tensor, cell: Tensor) -> Tensor:
        return smeared_lattice_energy(q, derive_lengths(batch.at(positions, cell)), 4.0, method, 1.0)

    inputs = tuple(x.clone().requires_grad_(True) for x in (charges, batch.positions, batch.cell))
    assert torch.autograd.gradcheck(energy, inputs, rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradgradcheck(energy, inputs, rtol=1e-5, atol=1e-8)


def derive_lengths(batch: Batch) -> Batch:
    """With the number of wave vectors of the box as it is, so that a finite difference does not change it."""
    batch.__dict__["box_lengths"] = (9.0, 9.0, 9.0)
    return batch


@pytest.mark.parametrize("method", METHODS)
def test_structures_of_a_batch_are_independent(method: str) -> None:
    parts = [box(4, TRICLINIC, 1), box(9, 11.0 * np.eye(3), 2), box(1, 1.3 * TRICLINIC, 3, net=-1.0)]
    structures = [
        Structure(b.numbers.numpy(), b.positions.numpy(), cell=b.cell[0].numpy())
        for b, _ in parts
        if b.cell is not None
    ]
    together = smeared_lattice_energy(torch.cat([q for _, q in parts]), collate(structures), 4.0, method, COULOMB)
    alone = torch.cat([smeared_lattice_energy(q, b, 4.0, method, COULOMB) for b, q in parts])
    # meshes differ, because they follow the largest box
    torch.testing.assert_close(together, alone, rtol=1e-12 if method == "ewald" else 1e-5, atol=1e-12)


def test_images_and_other_vectors_of_the_same_lattice() -> None:
    batch, charges = box(6, TRICLINIC, 5)
    energy = smeared_lattice_energy(charges, batch, 4.0, "ewald", COULOMB)
    whole = torch.tensor(np.random.default_rng(0).integers(-2, 3, (6, 3)) @ TRICLINIC)
    moved = batch.replace(positions=batch.positions + whole + torch.tensor([0.3, -1.0, 7.0]))
    torch.testing.assert_close(
        smeared_lattice_energy(charges, moved, 4.0, "ewald", COULOMB), energy, rtol=0, atol=1e-11
    )
    sheared = torch.tensor(np.array([[1, 0, 0], [1, 1, 0], [-1, 2, 1]]) @ TRICLINIC)[None]
    left_handed = sheared[:, [1, 0, 2]]
    for cell in (sheared, left_handed):
        other = smeared_lattice_energy(charges, batch.replace(cell=cell), 4.0, "ewald", COULOMB)
        torch.testing.assert_close(other, energy, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_atoms_that_have_wandered_off(method: str) -> None:
    """Some boxes away, single precision is as good as its coordinates are (steps of 8e-6 angstrom at 100 angstrom)."""
    batch, charges = box(20, TRICLINIC, 9)
    whole = torch.tensor(np.random.default_rng(1).integers(-9, 10, (20, 3)) @ TRICLINIC)
    results = []
    for positions in (batch.positions, batch.positions + whole):
        single = batch.replace(positions=positions).to(dtype=torch.float32)
        r = single.positions.requires_grad_(True)
        energy = smeared_lattice_energy(charges.float(), single.at(r, single.cell), 4.0, method, COULOMB)
        results.append((energy.detach(), torch.autograd.grad(energy.sum(), r)[0]))
    (near, near_force), (far, far_force) = results
    torch.testing.assert_close(far, near, rtol=0, atol=2e-5)
    torch.testing.assert_close(far_force, near_force, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma", [3.0, 4.0])
def test_mesh_is_as_good_as_single_precision(sigma: float) -> None:
    """Forces and potentials of charges without any order, the worst case, in a box of many mesh cells."""
    batch, charges = box(60, 1.7 * TRICLINIC, 7)
    results = []
    for method, dtype in (("ewald", torch.float64), ("pme", torch.float64), ("pme", torch.float32)):
        cast = batch.to(dtype=dtype)
        q, positions = (x.to(dtype).clone().requires_grad_(True) for x in (charges, cast.positions))
        energy = smeared_lattice_energy(q, cast.at(positions, cast.cell), sigma, method, COULOMB)
        results.append([x.double() for x in (energy, *torch.autograd.grad(energy.sum(), (positions, q)))])
    exact, mesh, single = results
    size = [x.abs().max() for x in exact]
    for got, tolerance in ((mesh, 1e-4), (single, 2e-4)):
        for value, truth, scale in zip(got, exact, size, strict=True):
            assert (value - truth).abs().max() < tolerance * scale


def test_no_net_force_on_a_neutral_box() -> None:
    batch, charges = box(20, TRICLINIC, 8)
    positions = batch.positions.clone().requires_grad_(True)
    energy = smeared_lattice_energy(charges, batch.at(positions, batch.cell), 4.0, "ewald", COULOMB)
    (gradient,) = torch.autograd.grad(energy.sum(), positions)
    assert gradient.sum(0).abs().max() < 1e-12


def test_number_of_wave_vectors_does_not_follow_small_changes_of_the_box() -> None:
    lengths = {collate([Structure(np.array([6]), np.zeros((1, 3)), cell=s * 10.0 * np.eye(3))]).box_lengths
               for s in np.linspace(0.99, 1.01, 21)}  # fmt: skip
    assert len(lengths) <= 2
    assert all(9.9 <= x <= 10.1 * 1.05 for x, *_ in lengths)
    for edge in (3.0, 12.4, 28.1, 100.0):
        points = mesh_points((edge, edge, edge), 4.0)[0]
        assert points % 2 == 0 and edge / points <= 4.0 * electrostatics.PME_SPACING and points >= 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "shifted"}, "method: expected 'ewald' or 'pme', got 'shifted'"),
        ({"sigma": 0.0}, "sigma: expected a positive length"),
        ({"batch": collate([Structure(np.full(3, 6), np.eye(3))])}, "cell: expected a periodic batch for 'ewald'"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    batch, charges = box(3, TRICLINIC)
    arguments = {"charges": charges, "batch": batch, "sigma": 4.0, "method": "ewald", "coulomb_constant": 1.0}
    with pytest.raises(ValueError, match=message):
        smeared_lattice_energy(**{**arguments, **change})  # type: ignore[arg-type]


def test_ewald_refuses_a_box_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, charges = box(50, TRICLINIC)
    monkeypatch.setattr(electrostatics, "EWALD_MEMORY", 1e-5)
    with pytest.raises(ValueError, match=r"longRangeMethod: 'ewald' would take .* 50 atoms .* expected 'pme'"):
        smeared_lattice_energy(charges, batch, 4.0, "ewald", COULOMB)
    assert smeared_lattice_energy(charges, batch, 4.0, "pme", COULOMB).isfinite()


# -- inside a model ----------------------------------------------------------------------------------------------


class Responsive(Potential):
    """Charges that depend on the distances to the neighbours, and nothing but their interaction with all images."""

    family = "responsive"
    config = "responsive"
    elements = (6,)
    cutoff = 4.5
    predicts_charges = True
    long_range_methods = ("shifted", "ewald", "pme")

    scale: Tensor

    def __init__(self, method: str) -> None:
        super().__init__()
        self.long_range_method = method
        self.register_buffer("scale", torch.tensor(0.3, dtype=torch.float64))

    def predict(self, batch: Batch, fixed: object) -> Prediction:
        near = batch.neighbor_vectors().square().sum(-1) + 1e-3
        raw = (self.scale * torch.exp(-2 * near) * batch.neighbors.mask).sum(-1)
        charges = raw - (batch.sum_by_structure(raw) / batch.counts)[batch.segment]
        return Prediction(smeared_lattice_energy(charges, batch, 4.0, self.long_range_method, COULOMB), charges)


@pytest.mark.skipif(not compilation.compiler_found(), reason="no C++ compiler (g++ or clang++)")
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One graph while a barostat moves the box a little."""
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path))
    model, structure = Responsive(method), carbon(12)
    compiled, eager = model.evaluator(structure, compile=True), model.evaluator(structure)
    for scale in (1.0, 0.97, 1.01):
        assert_same(compiled, eager, scale * structure.positions, scale * TRICLINIC)
    assert compiled.compiled


def test_a_graph_holds_for_boxes_that_need_no_more_wave_vectors() -> None:
    model, structure = Responsive("ewald"), carbon(12)
    evaluator = model.evaluator(structure)
    batches = [
        evaluator.place(scale * structure.positions, scale * TRICLINIC, None) for scale in (1.0, 0.97, 1.01, 1.07)
    ]
    inputs = compilation.GraphInputs(batches[0], False, None, reciprocal=True)
    assert [inputs.fits(batch) for batch in batches] == [True, True, True, False]
    assert compilation.GraphInputs(batches[0], False, None).fits(batches[3])


@pytest.mark.parametrize("method", METHODS)
def test_evaluator_follows_the_box(method: str) -> None:
    model, structure = Responsive(method), carbon(12)
    evaluator = model.evaluator(structure)
    for scale in (1.0, 2.0, 0.8):
        other = structure.replace(positions=scale * structure.positions, cell=scale * TRICLINIC)
        energies, forces = evaluator.arrays(other.positions, other.cell)
        energy, exact = model.evaluator(other).arrays(other.positions, other.cell)
        assert energies[0] == pytest.approx(energy[0], rel=1e-12)
        np.testing.assert_allclose(forces, exact, rtol=0, atol=1e-12)


def carbon(n: int) -> Structure:
    batch, _ = box(n, TRICLINIC, 3)
    return Structure(batch.numbers.numpy(), batch.positions.numpy(), cell=TRICLINIC)


def assert_same(compiled: Evaluator, eager: Evaluator, positions: np.ndarray, cell: np.ndarray) -> None:
    a, b = compiled(positions, cell), eager(positions, cell)
    assert a.forces is not None and b.forces is not None
    torch.testing.assert_close(a.energy, b.energy, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(a.forces, b.forces, rtol=1e-9, atol=1e-11)


def test_forces_through_geometry_dependent_charges() -> None:
    model, structure = Responsive("ewald"), carbon(8)
    _, forces = model.energy_and_forces(structure)
    step = 1e-4
    for atom, axis in ((0, 0), (3, 1), (7, 2)):
        energies = []
        for sign in (1, -1):
            moved = structure.positions.copy()
            moved[atom, axis] += sign * step
            energies.append(model.energy_and_forces(structure.replace(positions=moved))[0])
        assert forces[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-8)
    assert np.abs(forces).max() > 1e-3
