"""Equilibrium samples of many molecules, held against the exact averages of a harmonic potential."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials.potential import Potential, Prediction
from openmm_mlff.sampling.molecule_runs import LangevinSettings, batches, sample

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


def far(sizes: tuple[int, ...]) -> list[Structure]:
    """Atoms too far apart to count as bonded."""
    return [Structure(np.full(n, 2), np.arange(n)[:, None] * np.array([[1.0, 0.0, 0.0]])) for n in sizes]


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
