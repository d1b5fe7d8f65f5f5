"""NequIP keeps the contract of all potentials."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmm_mlff.testing import PotentialContract
from openmm_nequip import NequIP, NequIPConfig


class NequIPContract(PotentialContract):
    # the switch of the radial functions is C1 only: second derivatives jump where a pair crosses its onset or the
    # cutoff, which differences feel in proportion to their step. The contract's is 2e-3 angstrom;
    # `test_forces_in_boxes_with_a_small_step` needs no such room
    gradient_atol = 1e-4


class TestContract(NequIPContract):
    def make(self) -> NequIP:
        torch.manual_seed(1)
        return NequIP(NequIPConfig(num_features=8, num_layers=3, radial_features=16, radial_layers=2))


@pytest.mark.slow
class TestContractWithoutPseudotensors(NequIPContract):
    """As NequIP is used where parity is left out; elements in another order than in the periodic table."""

    def make(self) -> NequIP:
        torch.manual_seed(2)
        options = {"irreps": ("1o", "0e"), "max_degree": 1, "elements": (8, 1, 6), "cutoff": 4.5, "num_layers": 2}
        return NequIP(NequIPConfig(num_features=6, energy_scale=1.3, **options))  # type: ignore[arg-type]


def test_forces_in_boxes_with_a_small_step() -> None:
    contract = TestContract()
    model, h = contract.periodic(), 2e-6
    for box in contract.boxes():
        forces = model.energy_and_forces(box)[1]
        for seed in range(5):
            d = np.random.default_rng(seed).normal(size=box.positions.shape)
            d /= np.linalg.norm(d)
            moved = [box.replace(positions=box.positions + k * h * d) for k in (-1, 1)]
            low, high = model.evaluate(model.batch(moved), forces=False).energy.tolist()
            assert abs((forces * d).sum() - (low - high) / (2 * h)) < 1e-7
