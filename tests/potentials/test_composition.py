"""Interpolated potentials against closed forms, and against their members evaluated alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials.composition import CompositeEvaluator, Interpolated
from openmm_mlff.potentials.family import make_card, save_potential
from openmm_mlff.potentials.potential import Potential, Prediction
from openmm_mlff.testing.systems import cluster
from openmm_so3krates import SO3krates, SO3kratesConfig
from openmm_spookynet import SpookyNet, SpookyNetConfig


class Springs(Potential):
    """E = k/2 sum_{i<j} (r_ij - 1)^2 within a structure; counts how often it is asked."""

    family = "springs"

    def __init__(self, k: float, elements: tuple[int, ...] = (1, 6, 8), dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(k, dtype=dtype))
        self.elements, self.cutoff, self.calls = elements, 5.0, 0

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        self.calls += 1
        assert batch.pairs is not None and batch.positions.dtype == self.k.dtype
        stretch = batch.pair_vectors(batch.pairs).norm(dim=-1) - 1.0
        energy = 0.25 * self.k * stretch.square()  # directed pairs: each is there twice
        return Prediction(energy.new_zeros(batch.n_structures).index_add(0, batch.segment[batch.pairs.first], energy))


def closed_form(k: float, x: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy and forces of `Springs`."""
    d = x[:, None] - x[None]
    r = np.linalg.norm(d, axis=-1) + np.eye(len(x))
    forces = -k * ((1.0 - 1.0 / r)[..., None] * d).sum(1)
    return 0.25 * k * float(((r - 1.0) ** 2).sum()), forces


@pytest.fixture
def water() -> Structure:
    return Structure(np.array([8, 1, 1]), np.array([[0.0, 0.1, 0.0], [0.95, 0.2, 0.1], [-0.24, 0.93, -0.2]]))


@pytest.fixture(scope="module")
def networks() -> tuple[SO3krates, SpookyNet]:
    """One with native code and a short cutoff, one with long-range terms."""
    torch.manual_seed(1)
    off = dict.fromkeys(("use_electrostatics", "use_dispersion", "predict_charges", "predict_hirshfeld"), False)
    # sizes whose native code other tests compile too
    small: dict[str, Any] = {"num_features": 16, "num_layers": 1, "num_heads": 4, "num_basis_functions": 6, **off}
    so3krates = SO3krates(SO3kratesConfig(degrees=(2, 3), elements=(1, 6, 7, 8), **small)).double().eval()
    spookynet = SpookyNet(SpookyNetConfig(num_features=8, num_modules=1)).double().eval()
    return so3krates, spookynet


@pytest.mark.parametrize("c", [0.0, 0.25, 1.0])
def test_energy_forces_and_second_derivatives(water: Structure, c: float) -> None:
    model = Interpolated(Springs(2.0), Springs(6.0), c)
    energy, forces = closed_form(2.0 + 4.0 * c, water.positions)
    found = model.energy_and_forces(water)
    assert found[0] == pytest.approx(energy, abs=1e-12)
    np.testing.assert_allclose(found[1], forces, atol=1e-12)
    batch = model.batch([water, water])
    torch.testing.assert_close(model(batch).energy, torch.full((2,), energy, dtype=torch.float64))
    assert model.evaluate(batch, forces=False).forces is None
    evaluator = model.evaluator(water)
    assert float(evaluator(water.positions).energy) == pytest.approx(energy, abs=1e-12)
    arrays = evaluator.arrays(water.positions)
    np.testing.assert_allclose(arrays[0], [energy], atol=1e-12)
    np.testing.assert_allclose(arrays[1], forces, atol=1e-12)
    np.testing.assert_allclose(model.hessian(water), (1 + 2 * c) * Springs(2.0).hessian(water), atol=1e-10)


def test_only_what_counts_is_evaluated(water: Structure) -> None:
    vacuum, solvated = Springs(2.0), Springs(6.0)
    model = Interpolated(vacuum, solvated)
    evaluator, calls = model.evaluator(water), []
    for c in (1.0, 0.0, 0.5):
        model.coupling = c
        before = vacuum.calls, solvated.calls
        evaluator(water.positions)
        calls.append((vacuum.calls - before[0], solvated.calls - before[1]))
    assert calls == [(0, 1), (1, 0), (1, 1)]
    model.coupling = 0.0
    before_water = solvated.calls
    model.evaluate(model.batch(water))
    model(model.batch(water))
    assert solvated.calls == before_water


def test_gradients_reach_both_members(water: Structure) -> None:
    """dE/dk of each is its weight times its energy over k."""
    model = Interpolated(Springs(2.0), Springs(6.0), 0.3)
    unit_energy = closed_form(1.0, water.positions)[0]
    gradients = torch.autograd.grad(model(model.batch(water)).energy.sum(), list(model.parameters()))
    np.testing.assert_allclose([float(g) for g in gradients], [0.7 * unit_energy, 0.3 * unit_energy], atol=1e-12)
    force_loss = model.evaluate(model.batch(water), create_graph=True).forces
    assert force_loss is not None
    (by_water,) = torch.autograd.grad(force_loss.square().sum(), [model.water.k])
    k = 0.7 * 2.0 + 0.3 * 6.0
    expected = 2 * 0.3 * k * (closed_form(1.0, water.positions)[1] ** 2).sum()
    assert float(by_water) == pytest.approx(expected, rel=1e-10)


def test_each_member_keeps_its_precision(water: Structure) -> None:
    model = Interpolated(Springs(2.0, dtype=torch.float32), Springs(6.0), 0.5)
    assert model.dtype == torch.float64
    energy, forces = closed_form(4.0, water.positions)
    found = model.energy_and_forces(water)
    assert found[0] == pytest.approx(energy, abs=1e-6)
    np.testing.assert_allclose(found[1], forces, atol=1e-6)
    assert float(model.evaluator(water)(water.positions).energy) == pytest.approx(energy, abs=1e-6)
    assert model.float().dtype == torch.float32


@pytest.mark.parametrize("compile", [False, True])
def test_two_families_by_their_own_code(networks: tuple[SO3krates, SpookyNet], compile: bool) -> None:
    so3krates, spookynet = networks
    # SpookyNet compiles for a minute, so the network with native code stands on both sides there
    model = Interpolated(so3krates if compile else spookynet, so3krates, 0.4)
    structures = [cluster(model, n, seed=n) for n in (4, 7)]
    positions = np.concatenate([s.positions for s in structures])
    evaluator = model.evaluator(structures, compile=compile)
    assert isinstance(evaluator, CompositeEvaluator) and evaluator.compiled is None
    energies, forces = evaluator.arrays(positions)
    assert evaluator.compiled is compile
    parts = [m.evaluate(m.batch(structures)) for m in (model.vacuum, model.water)]
    expected = 0.6 * parts[0].energy + 0.4 * parts[1].energy
    np.testing.assert_allclose(energies, expected.detach().numpy(), atol=1e-10)
    assert parts[0].forces is not None and parts[1].forces is not None
    np.testing.assert_allclose(forces, 0.6 * parts[0].forces + 0.4 * parts[1].forces, atol=1e-10)


@pytest.mark.parametrize("compile", [False, True])
def test_lists_of_both_are_built_at_the_same_positions(networks: tuple[SO3krates, SpookyNet], compile: bool) -> None:
    """So a checkpoint needs one set of positions, and a run resumed between any two steps has the same bits."""
    rng = np.random.default_rng(5)
    model = Interpolated(networks[1] if not compile else networks[0], networks[0], 1.0)
    molecule = cluster(model, 40, seed=1)
    x, evaluator = molecule.positions, model.evaluator(molecule, compile=compile)
    built = set()
    for step, c in enumerate([1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.7, 0.7, 1.0, 0.2] * 3):
        x = x + rng.normal(scale=0.06, size=x.shape)
        model.coupling = c
        resumed = model.evaluator(molecule, compile=compile)
        if step:
            resumed.pairs.restore(evaluator.pairs.reference)
        first = evaluator.arrays(x)
        if c not in (0.0, 1.0):
            one, other = (e.pairs.reference for e in evaluator.evaluators.values())
            assert one is not None and other is not None and torch.equal(one, other)
        second = resumed.arrays(x)
        assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
        built.add(evaluator.pairs.rebuilds)
    assert 3 <= len(built) <= 25


def test_long_range_terms_are_set_for_both(networks: tuple[SO3krates, SpookyNet]) -> None:
    model = Interpolated(networks[1], networks[0])
    assert model.long_range and model.long_range_cutoff is None and model.long_range_method == "shifted"
    model.long_range_cutoff = 9.0
    assert networks[1].long_range_cutoff == 9.0 and networks[0].long_range_cutoff is None
    assert model.long_range_cutoff == 9.0
    model.long_range_cutoff = None


@pytest.mark.parametrize("value", [-0.1, 1.0001, float("nan"), True, "half"])
def test_couplings_that_mean_nothing(value: Any) -> None:
    with pytest.raises(ValueError, match="coupling: expected a number from 0"):
        Interpolated(Springs(1.0), Springs(2.0), value)


def test_members_that_do_not_fit(water: Structure, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="water: expected a Potential, got str"):
        Interpolated(Springs(1.0), "water.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="water: expected one potential, got a pair of family 'interpolated'"):
        Interpolated(Springs(1.0), Interpolated(Springs(1.0), Springs(2.0)))
    with pytest.raises(ValueError, match="expected potentials that share elements"):
        Interpolated(Springs(1.0, (1, 6)), Springs(1.0, (7, 8)))
    beads = Springs(1.0)
    beads.beads = ("CA", "CB")
    with pytest.raises(ValueError, match="expected potentials of the same particles"):
        Interpolated(Springs(1.0), beads)
    model = Interpolated(Springs(1.0, (1, 6, 8)), Springs(1.0, (8, 1)))
    assert model.elements == (1, 8)
    with pytest.raises(ValueError, match="elements: expected atoms among H O"):
        model.batch(Structure(np.array([6]), np.zeros((1, 3))))
    for build in (lambda: make_card(model), lambda: save_potential(model, tmp_path / "x.safetensors")):
        with pytest.raises(TypeError, match="interpolated potentials live in memory only"):
            build()


def test_what_an_interpolation_does_not_have(water: Structure) -> None:
    model = Interpolated(Springs(1.0), Springs(2.0), 0.5)
    with pytest.raises(ValueError, match="interpolated predicts no charges"):
        model.evaluator(water, outputs=("energy", "charges"))
    with pytest.raises(ValueError, match="outputs: expected names among"):
        model.evaluator(water, outputs=("stress",))
    with pytest.raises(ValueError, match="external_potential: interpolated predicts no charges"):
        model.evaluator(water)(water.positions, potential=np.zeros(3))
    with pytest.raises(ValueError, match="external_potential: interpolated predicts no charges"):
        model.evaluate(model.batch(water).replace(external_potential=torch.zeros(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match="phase: interpolated has one energy only"):
        model.in_phase("water")
