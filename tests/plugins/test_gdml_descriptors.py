"""Descriptors of any kind: their formulas, models and training with them, Hessian-vector labels, and use in OpenMM."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from openmm import Context, Platform, VerletIntegrator
from openmm.app import Element, Topology
from openmmml import MLPotential
from torch import Tensor

from openmm_gdml import GDMLPotential, descriptors
from openmm_gdml.descriptor_graph import recorded
from openmm_gdml.descriptor_library import (
    bonded_quadruples,
    coulomb_matrix,
    coulomb_matrix_gradients,
    distances_and_dihedrals,
    inverse_power_gradients,
    inverse_powers,
)
from openmm_gdml.products import KEY
from openmm_gdml.training import GDML
from openmm_mlff import _plugins
from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.potentials.hessian import products_by_autograd
from openmm_mlff.sampling.replicate import replicate
from openmm_mlff.testing import PotentialContract
from openmm_mlff.units import ANGSTROM_PER_NM, EV_PER_KCAL_PER_MOL, KJ_PER_MOL_NM_PER_EV_ANGSTROM

NUMBERS = [6, 1, 1, 8, 7]
SHAPE = np.array([[0, 0, 0], [1.1, 0, 0], [0, 1.2, 0], [0.3, 0.4, 1.5], [-0.9, -0.7, 0.6]])


def surface(r: Tensor) -> Tensor:
    """Energies (eV) of a molecule ``(..., 5, 3)`` with springs between all atoms and a dihedral barrier."""
    rest = torch.pdist(torch.from_numpy(SHAPE))
    i, j = torch.triu_indices(5, 5, 1)
    length = (r[..., i, :] - r[..., j, :]).square().sum(-1).sqrt()
    a, b, c = r[..., 1, :] - r[..., 0, :], r[..., 3, :] - r[..., 0, :], r[..., 4, :] - r[..., 0, :]
    triple = (torch.linalg.cross(a, b) * c).sum(-1)
    return (1 - torch.exp(-(length - rest))).square().sum(-1) + 0.2 * torch.sin(triple)


def labelled(n: int, seed: int, n_products: int = 0) -> list[Structure]:
    """Exact energies, forces and Hessian-vector products of `surface` near its minimum."""
    random = np.random.default_rng(seed)
    structures = []
    for _ in range(n):
        r = torch.from_numpy(SHAPE + random.normal(0, 0.08, SHAPE.shape)).requires_grad_(True)
        energy = surface(r)
        (gradient,) = torch.autograd.grad(energy, r, create_graph=True)
        pairs = []
        for _ in range(n_products):
            v = random.normal(size=SHAPE.shape)
            (product,) = torch.autograd.grad((gradient * torch.from_numpy(v)).sum(), r, retain_graph=True)
            pairs.append((v, product.numpy()))
        structures.append(
            Structure(NUMBERS, r.detach().numpy(), energy=float(energy.detach()), forces=-gradient.detach().numpy(),
                      info={KEY: pairs} if pairs else {})
        )  # fmt: skip
    return structures


def shifted_distances(positions: Tensor) -> Tensor:
    """A user's descriptor, for one geometry only."""
    i, j = torch.triu_indices(len(positions), len(positions), 1)
    return 1.0 / ((positions[i] - positions[j]).square().sum(1).sqrt() + 0.5)


@pytest.fixture(scope="module")
def own_model() -> GDMLPotential:
    return GDML(sigma=3.0, descriptor=shifted_distances, permutations=None).fit(labelled(25, 0))


def force_error(model: GDMLPotential, test: list[Structure]) -> float:
    return float(np.mean([np.abs(model.energy_and_forces(s)[1] - s.forces).mean() for s in test]))


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_powers_and_coulomb_matrix() -> None:
    r = torch.from_numpy(SHAPE)
    x, y = inverse_powers(r, power=3.0), coulomb_matrix(r, numbers=NUMBERS, power=2.0)
    k = 0
    for i in range(5):
        for j in range(i):
            distance = np.linalg.norm(SHAPE[i] - SHAPE[j])
            assert float(x[k]) == pytest.approx(distance**-3)
            assert float(y[k]) == pytest.approx(NUMBERS[i] * NUMBERS[j] / distance**2)
            k += 1
    assert len(x) == len(y) == k
    with pytest.raises(ValueError, match="numbers: expected the atomic numbers of 5 atoms"):
        coulomb_matrix(r)
    with pytest.raises(ValueError, match="power: expected a positive number"):
        inverse_powers(r, power=0.0)


@pytest.mark.parametrize("lattice", [None, torch.tensor([[4.0, 0, 0], [0.5, 4.2, 0], [0.1, 0.3, 4.1]]).double()])
def test_closed_gradients_of_pair_descriptors(lattice: Tensor | None) -> None:
    r = torch.from_numpy(np.stack([SHAPE, SHAPE + 0.1])).requires_grad_(True)
    for f, gradients, options in (
        (inverse_powers, inverse_power_gradients, {"power": 2.5}),
        (coulomb_matrix, coulomb_matrix_gradients, {"numbers": NUMBERS}),
    ):
        x, g = gradients(r, lattice, **options)  # type: ignore[operator]
        y = f(r, lattice, **options)  # type: ignore[operator]
        assert torch.equal(x, y)
        w = torch.from_numpy(np.random.default_rng(0).normal(size=x.shape))
        (expected,) = torch.autograd.grad(y, r, w)
        assert torch.allclose(descriptors.times_jacobian_transposed(g, w, 5), expected, atol=1e-12)


def test_dihedrals() -> None:
    """Cosine and sine of the angle that `analysis` computes, damped by the sines of the two bond angles."""
    quadruples = [[0, 1, 2, 3], [0, 1, 3, 4]]
    x = distances_and_dihedrals(torch.from_numpy(SHAPE), quadruples, dihedral_weight=0.3, distance_weight=2.0).numpy()
    phi = np.radians(dihedral(SHAPE, np.array(quadruples)))
    damping = []
    for i, j, k, m in quadruples:
        sines = [np.linalg.norm(np.cross(a, b)) / np.linalg.norm(a) / np.linalg.norm(b)
                 for a, b in ((SHAPE[i] - SHAPE[j], SHAPE[k] - SHAPE[j]),
                              (SHAPE[j] - SHAPE[k], SHAPE[m] - SHAPE[k]))]  # fmt: skip
        damping.append(np.prod(sines))
    np.testing.assert_allclose(x[10:12], 0.3 * np.cos(phi) * damping, atol=1e-14)
    np.testing.assert_allclose(x[12:], 0.3 * np.sin(phi) * damping, atol=1e-14)
    mirrored = distances_and_dihedrals(torch.from_numpy(SHAPE * [1, 1, -1]), quadruples, 0.3, 2.0).numpy()
    np.testing.assert_allclose(mirrored, [*x[:12], *-x[12:]], atol=1e-14)
    # on a line the angle is undefined, but the numbers are smooth
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 1, 0]], dtype=torch.float64)
    jacobian = torch.func.jacfwd(distances_and_dihedrals)(line)
    assert bool(torch.isfinite(jacobian).all())
    with pytest.raises(ValueError, match="quadruples: expected four different atoms from 0 to 4"):
        distances_and_dihedrals(torch.from_numpy(SHAPE), [[0, 1, 2, 2]])


def test_quadruples_of_bonds() -> None:
    butane = bonded_quadruples([(0, 1), (1, 2), (2, 3)], 4)
    assert butane == [[0, 1, 2, 3]]
    # the six beads of alanine dipeptide: phi, psi and the others around them, and the handedness of CA
    beads = bonded_quadruples([(0, 1), (1, 2), (2, 3), (2, 4), (4, 5)], 6)
    assert beads == [[0, 1, 2, 3], [0, 1, 2, 4], [1, 2, 4, 5], [3, 2, 4, 5], [2, 1, 3, 4]]
    with pytest.raises(ValueError, match="bonds: expected pairs of different atoms"):
        bonded_quadruples([(0, 9)], 4)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ethanol_M200_S12", "ala2_M180_S1"])
def test_published_models_by_differentiation(shared: Path, name: str) -> None:
    """Inverse distances as a plain function, of which only the value is known, give the forces of the closed form."""
    model = load_potential(shared / "data" / "gdml" / f"{name}_model.npz")
    assert isinstance(model, GDMLPotential)

    def plain(r: Tensor) -> Tensor:
        i, j = torch.tril_indices(r.shape[-2], r.shape[-2], -1)
        return 1 / (r[..., i, :] - r[..., j, :]).square().sum(-1).sqrt()

    state = model.state_dict()
    plain.__name__ = f"plain_{name}"
    other = GDMLPotential.from_coefficients(
        model.config.numbers, model.config.sigma, state["descriptors"], state["coefficients"], float(state["shift"]),
        state["permutations"], descriptor=descriptors.name_of(plain),
    )  # fmt: skip
    with np.load(shared / "data" / "gdml" / f"{name}_ref.npz", allow_pickle=False) as data:
        r = torch.from_numpy(data["R"][:20])
    closed, differentiated = model.energies_and_forces(r), other.energies_and_forces(r)
    atol = 1e-7 * EV_PER_KCAL_PER_MOL
    assert torch.allclose(differentiated[0], closed[0], rtol=0, atol=atol)
    assert torch.allclose(differentiated[1], closed[1], rtol=0, atol=atol)


def test_own_descriptor_learns(own_model: GDMLPotential) -> None:
    test = labelled(10, 1)
    assert own_model.config.descriptor == "shifted_distances"
    typical = float(np.mean([np.abs(s.forces).mean() for s in test]))  # type: ignore[arg-type]
    assert force_error(own_model, test) < 0.15 * typical
    energies = [own_model.energy_and_forces(s)[0] - s.energy for s in test]  # type: ignore[operator]
    assert np.abs(energies).mean() < 0.02


def test_atomic_numbers_are_filled_in() -> None:
    model = GDML(sigma=50.0, descriptor="coulomb_matrix", permutations=None).fit(labelled(10, 0))
    assert model.config.descriptor_options == {"numbers": NUMBERS}


def test_handedness() -> None:
    """The surface has a handed term, which distances cannot express and dihedrals can."""
    train = labelled(25, 0)
    train += [s.replace(positions=-s.positions, **_exact(-s.positions)) for s in labelled(25, 2)]
    test = labelled(10, 1)
    options = {"quadruples": [*bonded_quadruples([(0, k) for k in range(1, 5)], 5), [0, 1, 3, 4]]}
    errors = {}
    for name, chosen in (("inverse_distances", {}), ("distances_and_dihedrals", options)):
        model = GDML(sigma=3.0, lam=1e-6, descriptor=name, descriptor_options=chosen, permutations=None).fit(train)
        errors[name] = force_error(model, test)
        mirrored = test[0].replace(positions=-test[0].positions)
        difference = abs(model.energy_and_forces(test[0])[0] - model.energy_and_forces(mirrored)[0])
        assert difference < 1e-9 if name == "inverse_distances" else difference > 0.01
    assert errors["distances_and_dihedrals"] < 0.5 * errors["inverse_distances"]


def _exact(positions: np.ndarray) -> dict[str, object]:
    r = torch.from_numpy(positions.copy()).requires_grad_(True)
    energy = surface(r)
    (gradient,) = torch.autograd.grad(energy, r)
    return {"energy": float(energy.detach()), "forces": -gradient.numpy()}


@pytest.mark.parametrize("constraints", [False, True])
def test_hessian_vector_labels(constraints: bool, tmp_path: Path) -> None:
    """The model reproduces the products it was given, and learns more from as many geometries."""
    with_products, test = labelled(12, 0, n_products=2), labelled(10, 1)
    alone = [s.replace(info={}) for s in with_products]
    estimator = GDML(sigma=3.0, permutations=None, energy_constraints=constraints)
    model, without = estimator.fit(with_products), estimator.fit(alone)
    assert model.config.n_products == 24 and not model.fusible
    for s in with_products[:3]:
        v, product = (np.stack(x) for x in zip(*s.info[KEY], strict=True))
        np.testing.assert_allclose(model.hessian_products(s, v), product, atol=1e-4 * np.abs(product).max())
        np.testing.assert_allclose(model.energy_and_forces(s)[1], s.forces, atol=1e-4)
    assert force_error(model, test) < 0.6 * force_error(without, test)

    # forces are derivatives of the energy, in closed form, by autograd, by differences, and after a round trip
    again = load_potential(save_potential(model, tmp_path / "m.safetensors"))
    structure, step = test[0], 1e-4
    energy, forces = again.energy_and_forces(structure)
    by_autograd = model.evaluate(model.batch(structure), create_graph=True)
    assert by_autograd.forces is not None
    np.testing.assert_allclose(by_autograd.forces.detach().numpy(), forces, atol=1e-9)
    assert float(by_autograd.energy[0]) == pytest.approx(energy, abs=1e-9)
    for k in range(3):
        shift = np.zeros_like(structure.positions)
        shift[1, k] = step
        ends = [
            model.energy_and_forces(structure.replace(positions=structure.positions + s * shift))[0] for s in (1, -1)
        ]
        assert -(ends[0] - ends[1]) / (2 * step) == pytest.approx(forces[1, k], abs=1e-5)


@pytest.mark.parametrize("products", [0, 1])
def test_hessians(own_model: GDMLPotential, products: int) -> None:
    """Kernel in closed form and descriptor forward over reverse, against backward passes and differences."""
    model = own_model
    if products:
        model = GDML(sigma=3.0, permutations=None).fit(labelled(6, 0, n_products=1))
    for structure in (labelled(1, 5)[0], labelled(6, 0)[3]):
        eye = np.eye(15).reshape(15, 5, 3)
        hessian = model.hessian(structure)
        np.testing.assert_allclose(hessian, hessian.T, atol=0)
        if structure is not labelled(6, 0)[3] and not products:
            np.testing.assert_allclose(
                hessian, products_by_autograd(model, structure, eye).reshape(15, 15), atol=1e-8 * np.abs(hessian).max()
            )
        step = 1e-4
        ends = [model.energy_and_forces(structure.replace(positions=structure.positions + s * step * eye[4]))[1]
                for s in (1, -1)]  # fmt: skip
        np.testing.assert_allclose(
            hessian[4], -(ends[0] - ends[1]).ravel() / (2 * step), atol=1e-3 * np.abs(hessian).max()
        )


def test_bad_input() -> None:
    structures = labelled(6, 0)
    with pytest.raises(ValueError, match=r"descriptor: no descriptor is called 'inverse_distance' \(did you mean"):
        GDML(descriptor="inverse_distance", permutations=None).fit(structures)
    with pytest.raises(ValueError, match="descriptor: expected the name of a descriptor or a function with a name"):
        GDML(descriptor=lambda r: r.flatten(-2), permutations=None).fit(structures)
    # hydrogens 1 and 2 are not alike in this descriptor
    with pytest.raises(ValueError, match=r"permutations: the order of atoms .* changes how far geometries are"):
        GDML(descriptor="distances_and_dihedrals", permutations=[[0, 1, 2, 3, 4], [0, 2, 1, 3, 4]]).fit(structures)
    wrong = structures[0].replace(info={KEY: [(np.ones((4, 3)), np.ones((5, 3)))]})
    with pytest.raises(
        ValueError, match=r"hessian_products: expected a finite direction of shape \(5, 3\), structure 0"
    ):
        GDML(permutations=None).fit([wrong, *structures[1:]])
    descriptors.register("by_pdist", torch.pdist)
    with pytest.raises(ValueError, match="descriptor: torch cannot differentiate one of its operations"):
        GDML(descriptor="by_pdist", permutations=None).fit(structures)
    with pytest.raises(ValueError, match="descriptor: expected one with an option `lattice`"):
        GDMLPotential.from_coefficients(
            NUMBERS, 1.0, np.zeros((2, 14)), np.zeros((2, 14)), 0.0, lattice=np.eye(3) * 9,
            descriptor="distances_and_dihedrals",
        )  # fmt: skip


# -- use ---------------------------------------------------------------------------------------------------------------


def _topology() -> Topology:
    topology = Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in NUMBERS:
        topology.addAtom("X", Element.getByAtomicNumber(z), residue)
    return topology


def test_in_openmm_and_in_copies(own_model: GDMLPotential, tmp_path: Path) -> None:
    path = save_potential(own_model, tmp_path / "own.safetensors")
    system = MLPotential("gdml", modelPath=str(path)).createSystem(_topology(), compile=False)
    test = labelled(3, 4)
    copies = replicate(system, 3)
    for made, structures in ((system, test[:1]), (copies, test)):
        context = Context(made, VerletIntegrator(0.001), Platform.getPlatform("Reference"))
        context.setPositions(np.concatenate([s.positions for s in structures]) / ANGSTROM_PER_NM)
        forces = context.getState(forces=True).getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
        expected = np.concatenate([own_model.energy_and_forces(s)[1] for s in structures])
        np.testing.assert_allclose(forces, expected, atol=1e-10)


LOADING = """
import sys, torch
from openmm_mlff.potentials.family import load_potential
if sys.argv[2] == "registered":
    from openmm_gdml.descriptors import register
    i, j = torch.triu_indices(5, 5, 1)
    register("shifted_distances", lambda r: 1.0 / ((r[..., i, :] - r[..., j, :]).square().sum(-1).sqrt() + 0.5))
model = load_potential(sys.argv[1])
print(repr(float(model.energy_of(torch.tensor(eval(sys.argv[3]), dtype=torch.float64)[None])[0])))
"""


def test_another_process_has_to_register(own_model: GDMLPotential, tmp_path: Path) -> None:
    path, structure = save_potential(own_model, tmp_path / "own.safetensors"), labelled(1, 4)[0]
    done = {
        how: subprocess.run(
            [sys.executable, "-c", LOADING, str(path), how, repr(structure.positions.tolist())],
            capture_output=True, text=True, encoding="utf-8", env=os.environ, check=False,
        )
        for how in ("registered", "not")
    }  # fmt: skip
    assert done["registered"].returncode == 0, done["registered"].stderr
    assert float(done["registered"].stdout) == pytest.approx(own_model.energy_and_forces(structure)[0], abs=1e-10)
    assert "no descriptor is called 'shifted_distances'" in done["not"].stderr
    assert "openmm_gdml.descriptors.register" in done["not"].stderr


def test_descriptors_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def heights(r: Tensor) -> Tensor:
        return r[..., 2]

    point = EntryPoint("heights_of_a_package", "some.module:heights", descriptors.ENTRY_POINTS)
    monkeypatch.setattr(EntryPoint, "load", lambda self: heights)
    monkeypatch.setattr(_plugins, "entry_points", lambda group: [point] if group == descriptors.ENTRY_POINTS else [])
    assert descriptors.descriptor("heights_of_a_package") is heights
    with pytest.raises(ValueError, match="descriptor: no descriptor is called 'heights'"):
        descriptors.descriptor("heights")


def test_graphs_depend_on_what_a_descriptor_computes() -> None:
    """Two functions under one name must not share a compiled graph."""

    def model(constant: float, register: bool = True) -> GDMLPotential:
        def f(r: Tensor) -> Tensor:
            return torch.exp(-(r[..., 1:, :] - r[..., :1, :]).square().sum(-1) * torch.tensor(constant).double())

        name, zeros = f"gaussians_{constant}", np.zeros((2, 4))
        if register:
            descriptors.register(name, f)
        return GDMLPotential.from_coefficients(NUMBERS, 1.0, zeros, zeros, 0.0, descriptor=name)

    first = model(1.0)
    assert recorded(first) != recorded(model(2.0))
    assert recorded(first) == recorded(model(1.0, register=False))


@pytest.mark.slow
def test_compiled_graph(own_model: GDMLPotential) -> None:
    test = labelled(3, 6)
    evaluator = own_model.evaluator(test, compile=True)
    result = evaluator(np.concatenate([s.positions for s in test]))
    assert evaluator.compiled and result.forces is not None
    np.testing.assert_allclose(
        result.forces.numpy(), np.concatenate([own_model.energy_and_forces(s)[1] for s in test]), atol=1e-9
    )


class TestContract(PotentialContract):
    """A model with handed features keeps the contract of all potentials, but for mirror images."""

    fixed_composition = True
    float32 = False
    trainable = False
    mirror_symmetric = False

    def make(self) -> GDMLPotential:
        return GDML(sigma=3.0, descriptor="distances_and_dihedrals", permutations=None).fit(labelled(8, 0))

    def structures(self) -> list[Structure]:
        return [s.replace(energy=None, forces=None) for s in labelled(2, 3)]
