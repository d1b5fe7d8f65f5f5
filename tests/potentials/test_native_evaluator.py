"""The frame of native code: compared on the first frame, run once it is proved, left where it is wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials import native
from openmm_mlff.potentials.ensemble import Ensemble
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.native_evaluator import Found, NativeEvaluator
from openmm_mlff.potentials.neighbors import VerletPairs
from openmm_mlff.potentials.potential import Potential, Prediction

CHARGES = {1: 0.4, 8: -0.8}
BOX = 9.0 * np.eye(3)
CUTOFF = 4.0
OUTPUTS = ("energy", "forces", "charges", "dipole")


@dataclass(frozen=True)
class Config:
    """Members of an ensemble have one."""


class Numpy:
    """E = k/2 sum_{i<j} (1 - r_ij / CUTOFF)^3 + sum_i q_i phi_i of one structure in numpy, `Members` of several k."""

    tolerance = 1e-9

    def __init__(self, members: Sequence[Springs], batch: Batch) -> None:
        self.k, self.wrong = [m.k.item() for m in members], members[0].wrong
        self.q = np.array([CHARGES[z] for z in batch.numbers.tolist()])
        self.periodic, self.calls = batch.cell is not None, 0
        self.pairs = VerletPairs(batch, CUTOFF, False, None)

    def arrays(
        self, positions: np.ndarray, cell: np.ndarray | None = None, potential: np.ndarray | None = None
    ) -> Found:
        self.calls += 1
        assert (cell is not None) is self.periodic
        self.pairs.update(torch.from_numpy(positions), None if cell is None else torch.from_numpy(cell))
        d = positions[:, None] - positions[None]
        if cell is not None:
            d -= np.round(d / BOX[0, 0]) * BOX[0, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.sqrt((d**2).sum(-1) + np.diag(np.full(len(d), np.inf)))
            height = np.where(np.isnan(r), r, np.clip(1.0 - r / CUTOFF, 0.0, None))
            push = np.where(np.isinf(r), 0.0, 1.5 * height**2 / (CUTOFF * r))
            forces = (push[..., None] * d).sum(1)
        energy = 0.25 * (height**3).sum()
        field = 0.0 if potential is None else float(self.q @ potential)
        energies, forces = np.array([[k * energy + field] for k in self.k]), np.stack([k * forces for k in self.k])
        if self.wrong == "NaN":
            forces[:] = np.nan
        elif self.wrong:
            {"energy": energies, "forces": forces}[self.wrong][-1, 0] += 1e-4
        return energies, forces, np.tile(self.q, (len(self.k), 1))


class Springs(Potential):
    """The torch form of `Numpy`, which counts how often it runs.

    Attributes:
        wrong: what the native code gives wrong numbers of.
    """

    family = "springs"
    elements, cutoff, predicts_charges = (1, 8), CUTOFF, True

    def __init__(self, k: float = 2.0, wrong: str = "") -> None:
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(k, dtype=torch.float64))
        self.config, self.wrong, self.calls = Config(), wrong, 0

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        self.calls += 1
        assert batch.pairs is not None
        # no `norm`: its derivative at zero is zero, and that of a distance is not defined there
        r = batch.pair_vectors(batch.pairs).square().sum(-1).sqrt()
        energy = 0.25 * self.k * (1.0 - r / CUTOFF).clamp(min=0.0) ** 3
        total = energy.new_zeros(batch.n_structures).index_add(0, batch.segment[batch.pairs.first], energy)
        charges = energy.new_tensor([CHARGES[z] for z in batch.numbers.tolist()])
        dipole = batch.sum_by_structure(charges[:, None] * batch.positions)
        return Prediction(total, charges if self.predicts_charges else None, dipole)

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> Evaluator:
        return NativeEvaluator(self, self._as_batch(batch), outputs, compile)

    @classmethod
    def together(cls, members: Sequence[Springs], batch: Batch) -> Numpy | None:
        return None if native.compiler() is None else Numpy(members, batch)


def waters(n: int, cell: np.ndarray | None = None) -> Structure:
    """n molecules on a grid; 12 of them are more than fixed lists are made for."""
    grid = 3.0 * np.argwhere(np.ones((3, 3, 3)))[:n]
    molecule = np.array([[0.0, 0.0, 0.1], [0.9, 0.1, 0.0], [-0.3, 0.9, 0.1]])
    return Structure(np.tile([8, 1, 1], n), (grid[:, None] + molecule).reshape(-1, 3), cell=cell)


@pytest.fixture(autouse=True)
def _a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda: ("g++",))


def same(evaluator: Evaluator, exact: Evaluator, *frame: Any) -> None:
    found, expected = evaluator(*frame), exact(*frame)
    for name in OUTPUTS:
        value, truth = getattr(found, name), getattr(expected, name)
        assert (value is None) == (truth is None), name
        if truth is not None:
            torch.testing.assert_close(value, truth, rtol=0.0, atol=1e-11, msg=f"{name} differ")


@pytest.mark.parametrize("cell", [None, BOX], ids=["open", "periodic"])
@pytest.mark.parametrize("outputs", [OUTPUTS, ("energy",), ("energy", "forces", "dipole")])
def test_proved_code_runs_and_the_torch_form_no_more(cell: np.ndarray | None, outputs: tuple[str, ...]) -> None:
    model, plain = Springs(), Springs()
    structure = waters(12, cell)
    evaluator, exact = model.evaluator(structure, outputs, "auto"), plain.evaluator(structure, outputs)
    assert isinstance(evaluator, NativeEvaluator) and isinstance(evaluator._native, Numpy)
    assert evaluator.compiled is None and evaluator.pairs is evaluator._native.pairs
    phi, rng = np.linspace(-0.5, 0.5, 36), np.random.default_rng(1)
    for k in range(4):
        moved = structure.positions + rng.normal(scale=0.1, size=(36, 3))
        same(evaluator, exact, moved, cell, None if k % 2 else phi)
        assert evaluator.compiled is True
    assert model.calls == 1 and evaluator._native.calls == 4 and exact.compiled is False
    assert evaluator.pairs.rebuilds == exact.pairs.rebuilds > 1
    if "forces" in outputs:
        for value, truth in zip(evaluator.arrays(moved, cell), exact.arrays(moved, cell), strict=True):
            np.testing.assert_allclose(value, truth, rtol=0.0, atol=1e-11)
        assert model.calls == 1
    else:
        with pytest.raises(ValueError, match="outputs: expected an evaluator with forces"):
            evaluator.arrays(moved, cell)


@pytest.mark.parametrize("wrong", ["forces", "energy", "NaN"])
def test_code_that_disagrees_is_left(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    model, plain = Springs(wrong=wrong), Springs()
    structure = waters(12)
    evaluator, exact = (m.evaluator(structure, OUTPUTS, "auto") for m in (model, plain))
    built = evaluator.pairs
    built.restore(torch.from_numpy(structure.positions))
    moved = structure.positions + 0.05
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            same(evaluator, exact, moved)
    assert caplog.text.count("the native code and the torch form disagree by") == 1
    assert evaluator.compiled is False and exact.compiled is True
    # what the lists were built for is kept, so that a resumed run sums in the same order
    assert evaluator.pairs is not built and evaluator.pairs.reference is not None
    np.testing.assert_array_equal(evaluator.pairs.reference, structure.positions)


def test_a_frame_without_finite_forces_proves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = Springs()
    structure = waters(2)
    broken = structure.positions.copy()
    broken[4] = broken[1]
    evaluator = model.evaluator(structure, OUTPUTS, "auto")
    for calls in (1, 2):
        forces = evaluator(broken).forces
        assert forces is not None and not bool(torch.isfinite(forces).all())
        assert evaluator.compiled is None and model.calls == calls
    same(evaluator, Springs().evaluator(structure, OUTPUTS), structure.positions)
    assert evaluator.compiled is True and not caplog.text


@pytest.mark.parametrize("compile", ["auto", True])
def test_without_a_compiler(compile: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda: None)
    structure = waters(2)
    evaluator = Springs().evaluator(structure, OUTPUTS, compile)
    same(evaluator, Springs().evaluator(structure, OUTPUTS), structure.positions)
    assert evaluator.compiled is False


def test_false_never_runs_it() -> None:
    model = Springs(wrong="forces")
    structure = waters(2)
    evaluator = model.evaluator(structure)
    assert isinstance(evaluator, NativeEvaluator) and evaluator._native is None
    evaluator(structure.positions)
    assert evaluator.compiled is False and model.calls == 1


def test_both_forms_refuse_the_same() -> None:
    structure, box = waters(2), waters(12, BOX)
    charged, neutral = Springs(), Springs()
    neutral.predicts_charges = False
    x, y = structure.positions, box.positions
    cases: list[tuple[Springs, Structure, tuple[Any, ...], str]] = [
        (charged, structure, (x[1:],), r"positions: expected shape \(6, 3\), got \(5, 3\)"),
        (charged, structure, (x, None, np.zeros(5)), r"potential: expected shape \(6,\), got \(5,\)"),
        (charged, box, (y,), "cell: expected box vectors, because the batch is periodic, got None"),
        (charged, box, (y, BOX[:2]), r"cell: expected shape \(1, 3, 3\), got \(2, 3\)"),
        (charged, box, (y, np.stack([BOX, BOX])), r"cell: expected shape \(1, 3, 3\), got \(2, 3, 3\)"),
        (neutral, structure, (x, None, np.zeros(6)), "external_potential: springs predicts no charges"),
    ]
    for model, atoms, frame, message in cases:
        for compile in (False, "auto"):
            evaluator = model.evaluator(atoms, compile=compile)
            with pytest.raises(ValueError, match=message):
                evaluator(*frame)
            # lists of numbers and a box for each structure are taken by both
            one = None if atoms.cell is None else [atoms.cell.tolist()]
            assert evaluator(atoms.positions.tolist(), one).forces is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["", "forces", "energy"])
def test_members_of_an_ensemble(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    models = [Springs(2.0, wrong), Springs(3.0, wrong)]
    structure = waters(12)
    ensemble = Ensemble(models)
    evaluator = ensemble.evaluator(structure, OUTPUTS, "auto")
    exact = ensemble.evaluator(structure, OUTPUTS)
    moved = structure.positions + 0.05
    with caplog.at_level(logging.WARNING):
        same(evaluator, exact, moved)
    # alone, the first one is as wrong as both are together
    assert evaluator.compiled is (not wrong)
    assert caplog.text.count("one by one disagree by") == (1 if wrong else 0)
    assert evaluator.pairs.reference is not None
    np.testing.assert_array_equal(evaluator.pairs.reference, moved)
