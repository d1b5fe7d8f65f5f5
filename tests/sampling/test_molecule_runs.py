"""Equilibrium samples of many molecules, held against the exact averages of a harmonic potential."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from torch import nn

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.forces.molecule_force import MoleculeGuard, MoleculesComputation
from openmm_mlff.potentials.potential import Potential, Prediction
from openmm_mlff.sampling import guards
from openmm_mlff.sampling.molecule_runs import MOST_FAILURES, LangevinSettings, SamplingStopped, batches, sample

KT = 298.15 * 8.617333262e-5


class Springs(Potential):
    """U = k/2 sum_i |r_i - c|^2 about the mean c: equipartition gives <U> = 3 (n - 1) kT / 2."""

    family = "springs"
    elements = (2, 10)
    cutoff = 3.0

    def __init__(self, strength: float = 0.5) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength))

    def predict(self, batch: Batch, fixed: object) -> Prediction:
        centre = batch.sum_by_structure(batch.positions) / batch.counts[:, None]
        square = (batch.positions - centre[batch.segment]).square().sum(-1)
        return Prediction(0.5 * self.strength * batch.sum_by_structure(square))


class Walls(Springs):
    """With atoms that are lost beyond 9 angstrom: an error, or NaN."""

    def __init__(self, raises: bool = True) -> None:
        super().__init__()
        self.raises = raises

    def predict(self, batch: Batch, fixed: object) -> Prediction:
        centre = batch.sum_by_structure(batch.positions) / batch.counts[:, None]
        square = (batch.positions - centre[batch.segment]).square().sum(-1)
        if self.raises and bool((square > 81.0).any()):
            raise ValueError("an atom is lost")
        found = super().predict(batch, fixed)
        # a root that is there for its NaN
        return Prediction(found.energy + batch.sum_by_structure(0.0 * (81.0 - square).sqrt()))


def far(sizes: tuple[int, ...]) -> list[Structure]:
    """Atoms in a row that are not bonded, wherever they are."""
    row = np.array([[1.0, 0.0, 0.0]])
    return [Structure(np.full(n, 2), np.arange(n)[:, None] * row, info={"topology_bonds": []}) for n in sizes]


def test_energies_temperature_and_order() -> None:
    sizes = (3, 6, 34, 2)
    settings = LangevinSettings(equilibration=0.5, length=4.0, interval=0.2, friction=20.0, timestep=10.0, batch=2)
    found = sample(Springs(), far(sizes), settings, compile=False)
    assert [s.positions.shape for s in found] == [(20, n, 3) for n in sizes]
    assert all(s.finished and not s.failures for s in found)
    reduced = np.concatenate([s.energies / KT for s in found])
    freedom = sum(3 * (n - 1) for n in sizes)
    # 20 nearly independent frames of every molecule
    assert reduced.reshape(4, 20).mean(axis=1).sum() == pytest.approx(freedom / 2, abs=4 * np.sqrt(freedom / 2 / 10))
    temperature = np.average([s.temperature for s in found], weights=sizes)
    assert temperature == pytest.approx(298.15, abs=4 * 298.15 * np.sqrt(2 / (135 * 10)))


def test_energies_are_those_of_the_frames() -> None:
    potential = Springs().double()
    settings = LangevinSettings(equilibration=0.0, length=0.1, interval=0.02)
    for structure, found in zip(
        far((3, 5)), sample(potential, far((3, 5)), settings, precision=None, compile=False), strict=True
    ):
        energies = [potential.energy_and_forces(structure.replace(positions=x))[0] for x in found.positions]
        np.testing.assert_allclose(found.energies, energies, rtol=1e-12)


def test_the_seed_decides() -> None:
    def run(seed: int) -> list[np.ndarray]:
        settings = LangevinSettings(equilibration=0.01, length=0.05, interval=0.01, seed=seed)
        return [s.positions for s in sample(Springs(), far((3, 5)), settings, compile=False)]

    first, again, other = run(1), run(1), run(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_batches() -> None:
    found = batches([3, 9, 4, 4, 7], 2)
    assert found == [[1, 4], [2, 3], [0]]
    assert batches([], 4) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 0.0, "temperature: expected a positive"),
        ("interval", 60.0, "interval: expected at most length = 50"),
        ("batch", 0, "batch: expected a whole number >= 1"),
        ("equilibration", -1.0, "equilibration: expected a time >= 0"),
    ],
)
def test_bad_settings(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LangevinSettings(**{field: value})  # type: ignore[arg-type]


def test_going_on() -> None:
    """Without a thermostat, two runs are one: the second starts one step after the last frame of the first."""
    structures = far((3, 5))
    step = 0.002
    calm: dict[str, Any] = {"equilibration": 0.0, "interval": step, "timestep": 2.0, "friction": 1e-12}
    whole = sample(Springs(), structures, LangevinSettings(length=40 * step, **calm), compile=False)
    first = sample(Springs(), structures, LangevinSettings(length=19 * step, **calm), compile=False)
    moved = [s.replace(positions=found.last) for s, found in zip(structures, first, strict=True)]
    settings = LangevinSettings(length=20 * step, seed=5, **calm)
    second = sample(Springs(), moved, settings, velocities=[f.velocities for f in first], compile=False)
    for a, b, c in zip(whole, first, second, strict=True):
        np.testing.assert_array_equal(a.positions[19], b.last)
        np.testing.assert_allclose(a.positions[20:], c.positions, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="velocities: expected an array"):
        sample(Springs(), structures, settings, velocities=[np.zeros((3, 3))], compile=False)


def test_a_molecule_that_breaks_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LangevinSettings(equilibration=0.1, length=0.8, interval=0.05, friction=5.0)
    undisturbed = sample(Springs(), far((3, 5, 4)), settings, compile=False)
    whole = MoleculesComputation._broken

    def sabotaged(self: MoleculesComputation, positions: np.ndarray, guard: MoleculeGuard) -> dict[int, str]:
        calls.append(len(calls))
        # molecules of a batch are in the order of their sizes: this is the one of 4 atoms
        return {1: "sabotage"} if calls[-1] == 330 else whole(self, positions, guard)

    calls: list[int] = []
    monkeypatch.setattr(MoleculesComputation, "_broken", sabotaged)
    said: list[str] = []
    found = sample(Springs(), far((3, 5, 4)), settings, compile=False, say=said.append)
    assert said == ["molecule 2 (He4) starts anew: sabotage"]
    for k in (0, 1):
        np.testing.assert_array_equal(found[k].positions, undisturbed[k].positions)
        assert not found[k].failures
    broken = found[2]
    assert [(f.molecule, f.step) for f in broken.failures] == [(2, 330)]
    # it is noticed at the frame of step 350 at the latest, and has to equilibrate again for 100 steps
    n, later = len(broken.positions), 9
    assert n == 4 + later and broken.finished
    np.testing.assert_array_equal(broken.positions[:4], undisturbed[2].positions[:4])
    assert np.abs(broken.positions[4:] - undisturbed[2].positions[-later:]).max(axis=(1, 2)).min() > 0.01
    assert broken.energies.shape == (n,)


def test_a_molecule_that_goes_on_breaking_is_given_up() -> None:
    settings = LangevinSettings(equilibration=0.0, length=0.5, interval=0.1)
    fine = far((3, 4, 5))
    torn = fine[1].positions.copy()
    torn[2] += 40.0
    bad = [fine[0], fine[1].replace(positions=torn), fine[2]]
    with pytest.raises(ValueError, match="lost"):
        Walls().energy_and_forces(bad[1])
    found = sample(Walls(raises=False), bad, settings, compile=False)
    good = sample(Walls(raises=False), fine, settings, compile=False)
    assert [f.finished for f in found] == [True, False, True]
    assert len(found[1].failures) == MOST_FAILURES + 1
    assert found[1].positions.shape == (0, 4, 3) and np.isnan(found[1].temperature)
    np.testing.assert_array_equal(found[1].last, bad[1].positions)
    for k in (0, 2):
        np.testing.assert_array_equal(found[k].positions, good[k].positions)


@pytest.mark.parametrize("handled", [False, True])
def test_stop_signals(handled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever handles Ctrl-C gets the results; where nobody does, the exception has them."""
    whole = MoleculesComputation._evaluate
    calls: list[int] = []

    def interrupted(self: MoleculesComputation, state: openmm.State) -> tuple[float, np.ndarray]:
        calls.append(0)
        if len(calls) == 130:
            signal.raise_signal(signal.SIGINT)
        return whole(self, state)

    monkeypatch.setattr(MoleculesComputation, "_evaluate", interrupted)
    settings = LangevinSettings(equilibration=0.0, length=500.0, interval=0.02, batch=2)
    structures = far((3, 5, 4))
    outer = guards.StopRequest()
    if handled:
        with outer:
            found = sample(Springs(), structures, settings, compile=False)
        assert outer.signal == signal.SIGINT
    else:
        with pytest.raises(SamplingStopped) as stopped:
            sample(Springs(), structures, settings, compile=False)
        found = stopped.value.samples
    assert not any(f.finished for f in found)
    # the batch of the two large ones was running, the third had not begun
    assert len(found[1].positions) == len(found[2].positions) >= 6
    assert found[0].positions.shape == (0, 3, 3)
    np.testing.assert_array_equal(found[0].last, structures[0].positions)


def test_unexpected_errors_keep_their_type() -> None:
    with pytest.raises(ValueError, match="lost"):
        sample(Walls(), far((3, 22)), LangevinSettings(equilibration=0.0, length=1.0), compile=False)
