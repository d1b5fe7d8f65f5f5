"""The evaluator's door: what it takes, what it refuses, what it keeps and what it computes once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Batch, NeighborMatrix, Structure
from openmm_mlff.testing.systems import cluster, crystal
from openmm_spookynet import SpookyNet, SpookyNetConfig


@pytest.fixture(scope="module")
def model() -> SpookyNet:
    torch.manual_seed(1)
    config = SpookyNetConfig(num_features=8, num_modules=2, num_random_features=8, elements=(1, 6, 7, 8))
    network = SpookyNet(config).double().requires_grad_(False).eval()
    network.output.weight.normal_()
    return network


@pytest.fixture(scope="module")
def periodic() -> SpookyNet:
    torch.manual_seed(2)
    config = SpookyNetConfig(num_features=8, num_modules=1, long_range_cutoff=6.0, elements=(1, 6, 7, 8))
    network = SpookyNet(config).double().requires_grad_(False).eval()
    network.output.weight.normal_()
    return network


def test_bad_input_is_named(model: SpookyNet, periodic: SpookyNet) -> None:
    structure = cluster(model, 5, seed=1)
    function = model.evaluator(structure)
    with pytest.raises(ValueError, match=r"positions: expected shape \(5, 3\), got \(4, 3\)"):
        function(structure.positions[:4])
    with pytest.raises(ValueError, match=r"potential: expected shape \(5,\), got \(5, 1\)"):
        function(structure.positions, potential=np.zeros((5, 1)))
    with pytest.raises(ValueError, match=r"outputs: expected names among energy, forces, .*, got 'stress'"):
        model.evaluator(structure, outputs=("energy", "stress"))
    box = crystal(periodic, 5, 8.0 * np.eye(3), seed=2)
    inside = periodic.evaluator(box)
    with pytest.raises(ValueError, match="cell: expected box vectors"):
        inside(box.positions)
    with pytest.raises(ValueError, match=r"cell: expected shape \(1, 3, 3\), got \(2, 3, 3\)"):
        inside(box.positions, np.stack([box.cell, box.cell]))  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"cell: expected shape \(1, 3, 3\), got \(3,\)"):
        inside(box.positions, np.full(3, 8.0))


def test_only_what_is_asked_for(model: SpookyNet) -> None:
    structure = cluster(model, 5, seed=1)
    energy = model.evaluator(structure, outputs=("energy",))(structure.positions)
    assert energy.forces is None and energy.charges is None and energy.dipole is None
    full = model.evaluator(structure, outputs=("energy", "forces", "charges", "dipole"))(structure.positions)
    assert full.forces is not None and full.charges is not None and full.dipole is not None
    assert torch.equal(energy.energy, full.energy)
    assert not any(t.requires_grad for t in (full.energy, full.forces, full.charges, full.dipole))


def test_callers_arrays_are_left_alone(model: SpookyNet) -> None:
    structure = cluster(model, 5, seed=1)
    function = model.evaluator(structure)
    for positions in (structure.positions.copy(), torch.from_numpy(structure.positions.copy())):
        before = np.array(positions.tolist())
        result = function(positions)
        np.testing.assert_array_equal(np.asarray(positions), before)
        assert not isinstance(positions, torch.Tensor) or not positions.requires_grad
        assert result.forces is not None
        kept = result.forces.clone()
        function(structure.positions + 0.1 * np.arange(5)[:, None] ** 2)
        assert torch.equal(result.forces, kept), "an earlier result changed"


def test_lists_and_tables_of_numbers(model: SpookyNet) -> None:
    structure = cluster(model, 5, seed=1)
    function = model.evaluator([structure])
    listed = function(structure.positions.tolist(), potential=[0.1] * 5)  # type: ignore[arg-type]
    assert torch.equal(listed.energy, function(torch.from_numpy(structure.positions), potential=np.full(5, 0.1)).energy)
    # a constant potential moves the energy by the total charge
    close = function(structure.positions).energy + 0.1 * structure.charge
    np.testing.assert_allclose(listed.energy, close, atol=1e-10)


@pytest.mark.parametrize("n", [6, 40], ids=["fixed pairs", "Verlet list"])
def test_what_does_not_move_is_computed_once(model: SpookyNet, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = cluster(model, n, seed=3)
    function = model.evaluator(structure)
    calls = {"tables": 0, "fixed": 0}
    table, fixed = NeighborMatrix.from_pairs, SpookyNet.fixed

    def count_tables(*args: object, **kwargs: object) -> NeighborMatrix:
        calls["tables"] += 1
        return table(*args, **kwargs)  # type: ignore[arg-type]

    def count_fixed(self: SpookyNet, batch: Batch) -> object:
        calls["fixed"] += 1
        return fixed(self, batch)

    monkeypatch.setattr(NeighborMatrix, "from_pairs", count_tables)
    monkeypatch.setattr(SpookyNet, "fixed", count_fixed)
    rng = np.random.default_rng(0)
    for _ in range(5):
        function(structure.positions + rng.uniform(-0.1, 0.1, (n, 3)))
    assert calls["fixed"] == 0
    assert calls["tables"] == function.pairs.rebuilds <= 1


def test_far_from_the_origin_single_precision_loses_nothing(model: SpookyNet) -> None:
    structure = cluster(model, 12, seed=4, charge=1)
    single = SpookyNet(model.config)
    single.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    function = single.eval().evaluator(structure, outputs=("energy", "forces", "dipole"))
    here, far = function(structure.positions), function(structure.positions + np.array([1e4, -5e3, 2e4]))
    assert here.forces is not None and far.forces is not None and here.dipole is not None and far.dipole is not None
    np.testing.assert_allclose(far.forces, here.forces, atol=2e-5)
    np.testing.assert_allclose(far.energy, here.energy, atol=2e-5)
    np.testing.assert_allclose(far.dipole - here.dipole, [[1e4, -5e3, 2e4]], rtol=1e-6)


def test_replicas_in_one_batch(periodic: SpookyNet) -> None:
    """Copies that differ in positions and box, evaluated together."""
    boxes = [crystal(periodic, 6, 7.0 * np.eye(3) * (1 + 0.05 * k), seed=5) for k in range(3)]
    boxes = [b.replace(numbers=boxes[0].numbers, multiplicity=boxes[0].multiplicity) for b in boxes]
    function = periodic.evaluator(boxes)
    result = function(np.concatenate([b.positions for b in boxes]), np.stack([np.asarray(b.cell) for b in boxes]))
    alone = [periodic.energy_and_forces(b) for b in boxes]
    np.testing.assert_allclose(result.energy, [e for e, _ in alone], atol=1e-9)
    np.testing.assert_allclose(result.forces, np.concatenate([f for _, f in alone]), atol=1e-8)


def test_energy_and_forces_of_one_structure(model: SpookyNet) -> None:
    structure = Structure([8, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.97]], charge=-1)
    energy, forces = model.energy_and_forces(structure)
    result = model.evaluate(model.batch(structure))
    assert energy == float(result.energy[0]) and forces.dtype == np.float64
    assert forces.shape == (2, 3) and not result.energy.requires_grad
