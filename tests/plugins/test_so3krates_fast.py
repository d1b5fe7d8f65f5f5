"""SO3krates by native code: the torch form's numbers, exact gradients, and nothing that depends on threads or lists."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials import native as machine
from openmm_mlff.potentials import neighbors
from openmm_mlff.potentials.potential import Evaluation
from openmm_so3krates import SO3krates, fast, tables
from openmm_so3krates.fast import NativeEvaluator
from openmm_so3krates.half_lists import HalfLists
from openmm_so3krates.native import Engine, unsupported

from .random_models import NETWORK_ALONE, so3krates

needs_compiler = pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler (g++ or clang++)")
OUTPUTS = ("energy", "forces", "charges", "dipole")
ELEMENTS = np.array([1, 6, 7, 8, 17])
TRICLINIC = np.array([[5.6, 0.0, 0.0], [1.1, 5.2, 0.0], [-0.7, 0.8, 6.1]])
# heads that are whole vectors in double precision, and heads that are not: one compilation each
WHOLE: dict[str, Any] = {"num_features": 32, "num_heads": 4, "degrees": (1, 2, 3, 4)}
NARROW: dict[str, Any] = {"num_features": 16, "num_heads": 4, "degrees": (2, 3)}
VARIANTS: dict[str, dict[str, Any]] = {
    "as SO3LR": WHOLE,
    "narrow heads": NARROW,
    "as the papers before": WHOLE
    | NETWORK_ALONE
    | {
        "initial_euclidean": "neighbors",
        "avg_num_neighbors": 3.0,
        "message_normalization": "sqrt_num_features",
    },
    "root mean squares": WHOLE
    | {"normalization": "rms", "residual_scalars": True, "residual_mlp_2": True, "cutoff_function": "cosine"},
    "no normalisation": NARROW
    | {"layer_normalization_1": False, "layer_normalization_2": False, "residual_mlp_1": False, "num_layers": 1},
    "charges alone": NARROW
    | {"use_dispersion": False, "predict_hirshfeld": False, "radial_basis": "physnet", "num_basis_functions": 16},
    "long-range cutoff": WHOLE | {"long_range_cutoff": 4.8},
    "long-range cutoff below the other": NARROW | {"long_range_cutoff": 3.0},
}


def random_model(seed: int, **options: Any) -> SO3krates:
    sizes: dict[str, Any] = {"num_basis_functions": 8, "hirshfeld_features": 6}
    return so3krates(seed, **sizes | {"cutoff": 3.5} | options).requires_grad_(False)


def cluster(n: int, seed: int, cell: np.ndarray | None = None, charge: int = 0, spread: float = 2.2) -> Structure:
    """Atoms at random, none closer than 0.8 angstrom to another."""
    random = np.random.default_rng(seed)
    points: list[np.ndarray] = []
    while len(points) < n:
        new = random.uniform(-1, 1, 3) * spread if cell is None else random.uniform(0, 1, 3) @ cell
        if all(np.linalg.norm(new - old) > 0.8 for old in points):
            points.append(new)
    return Structure(random.choice(ELEMENTS, n), np.array(points), charge=charge, cell=cell)


def without_lists(model: SO3krates, structures: list[Structure]) -> Batch:
    """A batch of atoms that nobody counts the electrons of."""
    return collate(structures).to(dtype=model.dtype)


def model_evaluator(model: SO3krates, structure: Structure, compile: bool | str = True) -> NativeEvaluator:
    outputs = OUTPUTS if model.predicts_charges else OUTPUTS[:2]
    return NativeEvaluator(model, without_lists(model, [structure]), outputs, compile)


def both(
    model: SO3krates, structures: list[Structure], potential: np.ndarray | None = None
) -> tuple[Evaluation, Evaluation]:
    """By native code and by torch."""
    positions = np.concatenate([s.positions for s in structures])
    cell = None if structures[0].cell is None else np.stack([s.cell for s in structures if s.cell is not None])
    outputs = OUTPUTS if model.predicts_charges else OUTPUTS[:2]
    batch = without_lists(model, structures)
    results = []
    for compile in (True, False):
        evaluator = NativeEvaluator(model, batch, outputs, compile)
        results.append(evaluator(positions, cell, potential))
        assert bool(evaluator.compiled) is compile
    native, eager = results
    return native, eager


def close(mine: Evaluation, theirs: Evaluation, atol: float) -> None:
    for name in OUTPUTS:
        a, b = getattr(mine, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=0.0, atol=atol, msg=f"{name} differ")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_code_gives_what_torch_gives(variant: str) -> None:
    model = random_model(1, **VARIANTS[variant])
    structures = [cluster(9, 1), cluster(40, 2, spread=3.5), cluster(1, 3)]
    if model.supports_charge:
        structures.append(cluster(7, 4, charge=-2))
    close(*both(model, structures), atol=1e-9)
    if model.long_range and model.long_range_cutoff is None:
        model.long_range_cutoff = 4.8
    boxes = [cluster(14, 5, TRICLINIC), cluster(11, 6, 1.1 * TRICLINIC)]
    close(*both(model, boxes), atol=1e-9)
    if model.predicts_charges:
        phi = np.random.default_rng(0).normal(0.0, 2.0, 25)
        close(*both(model, boxes, phi), atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("method", ["ewald", "pme"])
def test_charges_in_reciprocal_space(method: str) -> None:
    model = random_model(2, **WHOLE | {"long_range_cutoff": 4.8})
    model.long_range_method = method
    box = cluster(14, 7, 1.3 * TRICLINIC)
    close(*both(model, [box]), atol=1e-8)
    close(*both(model, [box], np.linspace(-1.0, 1.0, 14)), atol=1e-8)
    with pytest.raises(ValueError, match="longRangeMethod"):
        model.evaluator(cluster(5, 1), compile=True)(cluster(5, 1).positions)


@needs_compiler
def test_single_precision_and_positions_far_away() -> None:
    model = random_model(3, **WHOLE).float()
    structure = cluster(20, 8, spread=2.8)
    native, eager = both(model, [structure])
    close(native, eager, atol=2e-4)
    exact = both(random_model(3, **WHOLE), [structure])[1]
    close(native, exact, atol=1e-4)
    far = both(model, [structure.replace(positions=structure.positions + np.array([500.0, -300.0, 800.0]))])[0]
    torch.testing.assert_close(far.forces, native.forces, rtol=0.0, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("cell", [None, TRICLINIC], ids=["open", "periodic"])
def test_forces_are_the_gradient_with_lists_that_are_kept(cell: np.ndarray | None) -> None:
    model = random_model(4, **NARROW | {"long_range_cutoff": 4.2})
    structure = cluster(12, 9, cell) if cell is not None else cluster(36, 9, spread=3.0)
    phi = np.linspace(-2.0, 2.0, len(structure))
    evaluator = NativeEvaluator(model, without_lists(model, [structure]), OUTPUTS, True)
    forces = evaluator(structure.positions, cell, phi).forces
    assert forces is not None
    h = 1e-4
    for atom, axis in ((0, 0), (3, 1), (7, 2), (11, 0)):
        step = np.zeros_like(structure.positions)
        step[atom, axis] = h
        # fourth order: E(2h) - 8 E(h) + 8 E(-h) - E(-2h) over 12 h
        e = [float(evaluator(structure.positions + k * step, cell, phi).energy[0]) for k in (2, 1, -1, -2)]
        numeric = (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h)
        assert numeric == pytest.approx(float(forces[atom, axis]), rel=1e-6, abs=1e-6)
    assert evaluator.pairs.rebuilds == 1
    assert float(forces.sum(0).abs().max()) < 1e-9


@needs_compiler
def test_lists_follow_the_atoms_and_the_box() -> None:
    model = random_model(5, **NARROW | {"long_range_cutoff": 4.2})
    structure = cluster(14, 10, TRICLINIC)
    evaluator = model_evaluator(model, structure)
    random = np.random.default_rng(1)
    positions, cell = structure.positions.copy(), TRICLINIC.copy()
    for k in range(6):
        positions = positions + random.normal(0.0, 0.12, positions.shape)
        cell = cell * (1.0 if k % 3 else 1.02)
        moved = structure.replace(positions=positions, cell=cell)
        torch.testing.assert_close(
            evaluator(positions, cell).forces, model_evaluator(model, moved, False)(positions, cell).forces,
            rtol=0.0, atol=1e-9,
        )  # fmt: skip
    assert 1 < evaluator.pairs.rebuilds <= 6


@needs_compiler
def test_threads_and_resumed_lists_give_the_same_bits() -> None:
    model = random_model(6, **WHOLE | {"long_range_cutoff": 5.5})
    structure = cluster(150, 11, 2.6 * TRICLINIC)
    start = structure.positions
    moved = start + np.random.default_rng(2).normal(0.0, 0.05, start.shape)
    first = model_evaluator(model, structure)
    first(start, structure.cell)
    torch.set_num_threads(3)
    expected = first(moved, structure.cell)
    torch.set_num_threads(1)
    second = model_evaluator(model, structure)
    assert first.pairs.reference is not None and first.pairs.reference_cell is not None
    second.pairs.restore(first.pairs.reference, first.pairs.reference_cell)
    for resumed in (first, second):
        again = resumed(moved, structure.cell)
        assert torch.equal(again.energy, expected.energy)
        assert again.forces is not None and expected.forces is not None
        assert torch.equal(again.forces, expected.forces)
    assert second.pairs.rebuilds == 1


@needs_compiler
def test_lists_that_are_restored_reach_the_native_code() -> None:
    """A checkpoint that is loaded by the run which wrote it, after the atoms have gone elsewhere."""
    model = random_model(6, **NARROW)
    structure = cluster(40, 21, spread=3.5)
    evaluator = model_evaluator(model, structure)
    expected = evaluator(structure.positions)
    reference = evaluator.pairs.reference
    evaluator(1.6 * structure.positions)
    evaluator.pairs.restore(reference, None)
    again = evaluator(structure.positions)
    assert torch.equal(again.energy, expected.energy)
    assert again.forces is not None and expected.forces is not None
    assert torch.equal(again.forces, expected.forces)


@needs_compiler
def test_runs_with_many_and_with_few_threads_in_turn() -> None:
    model = random_model(6, **WHOLE | {"long_range_cutoff": 5.5})
    large, small = cluster(150, 11, 2.6 * TRICLINIC), cluster(60, 12, 1.9 * TRICLINIC)
    first, second = model_evaluator(model, large), model_evaluator(model, small)
    torch.set_num_threads(1)
    expected = second(small.positions, small.cell).forces
    for _ in range(2):
        torch.set_num_threads(4)
        first(large.positions, large.cell)
        torch.set_num_threads(2)
        again = second(small.positions, small.cell).forces
        assert again is not None and expected is not None and torch.equal(again, expected)


@needs_compiler
def test_hirshfeld_ratios_and_memory() -> None:
    model = random_model(7, **WHOLE)
    structure = cluster(10, 12)
    batch = without_lists(model, [structure])
    engine = Engine(model)
    fixed = model.fixed(batch)
    engine.set_atoms(batch.numbers.numpy(), batch.segment.numpy(), batch.charge.numpy(), fixed.x.numpy())
    HalfLists(engine, batch, model.cutoff, True, None, 0.6).give(structure.positions, None)
    assert [len(first) for first, _, _ in engine.lists()] == [45, 45]
    _, ratios = engine.forward(structure.positions, None, 1)
    full = neighbors.derive(neighbors.with_pairs(batch, model.cutoff, False, None))
    x, _ = model.features(fixed, model.geometry(full))
    expected = model.hirshfeld_ratios(x, fixed)
    assert expected is not None
    np.testing.assert_allclose(ratios, expected.numpy(), rtol=0.0, atol=1e-12)
    assert 1e4 < engine.memory < 1e7


@needs_compiler
@pytest.mark.parametrize("cell", [None, TRICLINIC, 0.4 * TRICLINIC, np.diag([40.0, 3.0, 9.0])])
def test_lists_are_those_of_vesin(cell: np.ndarray | None) -> None:
    model = random_model(13, **NARROW | {"long_range_cutoff": 5.0})
    random = np.random.default_rng(3)
    n = 60 if cell is None else 20
    positions = random.uniform(-4.0, 4.0, (n, 3)) if cell is None else random.uniform(-3.0, 3.0, (n, 3)) @ cell
    batch = without_lists(model, [Structure(np.full(n, 6), positions, cell=cell)] * 2)
    engine = Engine(model)
    fixed = model.fixed(batch)
    engine.set_atoms(batch.numbers.numpy(), batch.segment.numpy(), batch.charge.numpy(), fixed.x.numpy())
    both_positions = np.concatenate([positions, positions])
    box = None if cell is None else np.stack([cell, cell])
    for short, long in ((2.5, 5.63), (4.1, 3.07)):
        distance, _ = engine.search(both_positions, box, short, long, 2)
        for (first, second, shift), reach in zip(engine.lists(), (short, long), strict=True):
            expected = neighbors.pairs_within(batch, reach, half=True)
            offsets = torch.zeros(len(expected), 3) if expected.offsets is None else expected.offsets
            theirs = torch.column_stack([expected.first, expected.second, offsets]).long().numpy()
            assert directed(np.column_stack([first, second, shift])) == directed(theirs)
        vectors = batch.pair_vectors(neighbors.pairs_within(batch, max(short, long), half=True))
        assert distance == pytest.approx(float(vectors.norm(dim=-1).min()), rel=1e-12)


def directed(rows: np.ndarray) -> list[tuple[int, ...]]:
    """Pairs (first, second, shift) in both directions, sorted."""
    back = np.column_stack([rows[:, 1], rows[:, 0], -rows[:, 2:]])
    return sorted(map(tuple, np.concatenate([rows, back]).tolist()))


def test_hermite_tables_join_fifth_order_polynomials_without_error() -> None:
    coefficients = torch.tensor([0.3, -1.2, 0.7, 2.0, -0.4, 0.9], dtype=torch.float64)

    def polynomial(r: Tensor) -> Tensor:
        return torch.stack([c * r**k for k, c in enumerate(coefficients)]).sum(0)[:, None]

    knots = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    table = tables.hermite_table(polynomial, knots, 0.5)
    slope = sum(k * c * knots ** (k - 1) for k, c in enumerate(coefficients) if k)
    curvature = sum(k * (k - 1) * c * knots ** (k - 2) for k, c in enumerate(coefficients) if k > 1)
    torch.testing.assert_close(table[:, :, 0], torch.stack([polynomial(knots)[:, 0], 0.5 * slope, 0.25 * curvature], 1))


# -- when it cannot run ------------------------------------------------------------------------------------------


def test_without_a_compiler_torch_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "compiler", lambda: None)
    machine.library.cache_clear()
    fast._no_native_code.cache_clear()
    model = random_model(8, num_features=48, num_heads=2, degrees=(1, 2))
    structure = cluster(6, 13)
    with caplog.at_level(logging.WARNING):
        evaluator = model_evaluator(model, structure)
        mine = evaluator(structure.positions)
    assert "no C++ compiler" in caplog.text
    assert evaluator.compiled is False
    assert torch.equal(mine.energy, model_evaluator(model, structure, False)(structure.positions).energy)


@needs_compiler
def test_native_code_that_disagrees_does_not_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # a table of a few knots is not the filter any more
    monkeypatch.setitem(tables.KNOTS_PER_ANGSTROM, torch.float64, 1.5)
    model = random_model(9, **NARROW)
    structure = cluster(40, 14, spread=3.5)
    evaluator = model_evaluator(model, structure)
    evaluator.pairs.restore(torch.from_numpy(structure.positions), None)
    with caplog.at_level(logging.WARNING):
        mine = evaluator(structure.positions)
    assert "disagree" in caplog.text
    assert evaluator.compiled is False and not isinstance(evaluator.pairs, HalfLists)
    assert evaluator.pairs.reference is not None
    assert torch.equal(mine.energy, model_evaluator(model, structure, False)(structure.positions).energy)


@needs_compiler
def test_a_frame_without_finite_forces_proves_nothing() -> None:
    model = random_model(12, **NARROW)
    structure = cluster(8, 20)
    evaluator = model_evaluator(model, structure)
    broken = structure.positions.copy()
    broken[3] = broken[2]
    forces = evaluator(broken).forces
    assert forces is not None and not bool(torch.isfinite(forces).all())
    assert evaluator.compiled is None
    close(evaluator(structure.positions), model_evaluator(model, structure, False)(structure.positions), atol=1e-9)
    assert evaluator.compiled is True


@needs_compiler
def test_a_part_of_a_large_system_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "COMPARED_ATOMS", 10)
    model = random_model(10, **NARROW | {"long_range_cutoff": 4.2})
    for structure in (cluster(45, 15, spread=3.6), cluster(14, 16, TRICLINIC)):
        evaluator = model_evaluator(model, structure)
        mine = evaluator(structure.positions, structure.cell)
        assert evaluator.compiled is True
        close(mine, model_evaluator(model, structure, False)(structure.positions, structure.cell), atol=1e-9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_features": 24, "num_heads": 2, "degrees": (1, 2)}, "multiples of 16"),
        ({"num_features": 16, "num_heads": 2, "degrees": ()}, "degrees from 1 to 4"),
        ({"num_features": 16, "num_heads": 2, "degrees": (0, 1)}, "degrees from 1 to 4"),
        ({"num_features": 16, "num_heads": 2, "degrees": (1, 2), "qk_normalization": True}, "queries and keys"),
    ],
)
def test_models_that_it_does_not_know_run_op_by_op(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is asked for, because torch's compiler makes wrong forces of this network."""
    fast._no_native_code.cache_clear()
    model = random_model(11, **options)
    why = unsupported(model)
    assert why is not None and reason in why
    structure = cluster(5, 17)
    expected = model_evaluator(model, structure, False)(structure.positions).energy
    for compile in ("auto", True):
        evaluator = model_evaluator(model, structure, compile)
        assert torch.equal(evaluator(structure.positions).energy, expected)
        assert evaluator.compiled is False
    assert caplog.text.count(reason) == 1


@needs_compiler
def test_impossible_input() -> None:
    model = random_model(12, **NARROW | {"long_range_cutoff": 4.2})
    structure = cluster(40, 18, spread=3.5)
    evaluator = model_evaluator(model, structure)
    positions = structure.positions
    with pytest.raises(ValueError, match=r"positions: expected shape \(40, 3\), got \(39, 3\)"):
        evaluator(positions[1:])
    with pytest.raises(ValueError, match=r"potential: expected shape \(40,\), got \(39,\)"):
        evaluator(positions, None, np.zeros(39))
    evaluator(positions)
    broken = positions + 1.0
    broken[7, 1] = np.nan
    with pytest.raises(ValueError, match="atom 7"):
        evaluator(broken)
    broken = positions + 1.0
    broken[9] = broken[4]
    with pytest.raises(ValueError, match="atoms 4 and 9 are at the same place"):
        evaluator(broken)
    # a frame that failed leaves nothing behind
    broken = 3.0 * positions
    broken[9] = broken[4]
    with pytest.raises(ValueError, match="at the same place"):
        evaluator(broken)
    close(evaluator(positions), model_evaluator(model, structure, False)(positions), atol=1e-9)
    for number, symbol in ((11, "Na"), (35, "Br")):
        batch = without_lists(model, [Structure(np.array([1, number]), positions[:2])])
        with pytest.raises(ValueError, match=f"elements: expected atoms that the model was made for, got {symbol}"):
            NativeEvaluator(model, batch, OUTPUTS, True)
    # lists that never change are not searched, so nothing else would notice
    small = cluster(8, 19)
    for bad in (np.nan, np.inf):
        broken = small.positions.copy()
        broken[5, 0] = bad
        with pytest.raises(ValueError, match=r"positions: expected finite numbers.*atom 5"):
            model_evaluator(model, small)(broken)
    periodic = model_evaluator(model, cluster(8, 19, TRICLINIC))
    with pytest.raises(ValueError, match="cell: expected box vectors"):
        periodic(cluster(8, 19, TRICLINIC).positions)
