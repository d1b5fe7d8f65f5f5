"""SO3krates keeps the contract of all potentials."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmm_mlff.testing import PotentialContract
from openmm_so3krates import SO3krates, pretrained

from .random_models import NETWORK_ALONE, so3krates


def random_model(seed: int, **options: Any) -> SO3krates:
    return so3krates(seed, **{"elements": (1, 6, 7, 8)} | options)


class SO3kratesContract(PotentialContract):
    # third derivatives jump where a pair crosses the cutoff, which differences with the contract's step (2e-3 angstrom)
    # feel; `test_forces_in_boxes_with_a_small_step` needs no such room
    gradient_atol = 1e-5


class TestContractOfTheNetworkAlone(SO3kratesContract):
    """As in the papers before SO3LR: nothing but atomic energies, so fragments far apart do not see one another."""

    def make(self) -> SO3krates:
        return random_model(0, initial_euclidean="neighbors", degrees=(1, 2), **NETWORK_ALONE)

    # which terms a model has makes no difference to how it is stored; `TestContract` has the fast one
    @pytest.mark.slow
    def test_openmm_in_a_fresh_process(self) -> None:
        super().test_openmm_in_a_fresh_process()


class SO3LRContract(SO3kratesContract):
    # the charge that is left over, and the embedded charge and spin, are spread over all atoms of the system
    separable = False


class TestContract(SO3LRContract):
    def make(self) -> SO3krates:
        return random_model(1)


class TestContractWithLongRangeCutoff(SO3LRContract):
    def make(self) -> SO3krates:
        return random_model(2, long_range_cutoff=7.0, num_layers=1, normalization="rms", qk_normalization=True)

    @pytest.mark.slow
    def test_openmm_in_a_fresh_process(self) -> None:
        super().test_openmm_in_a_fresh_process()


@pytest.mark.slow
class TestContractOfSO3LR(SO3LRContract):
    @pytest.fixture(autouse=True)
    def _parameters(self, so3lr_parameters: Path) -> None:
        type(self).path = so3lr_parameters  # type: ignore[attr-defined]

    def make(self) -> SO3krates:
        """With the spin branch open: the contract's clusters are singlets and doublets."""
        published = pretrained.read(self.path)  # type: ignore[attr-defined]
        model = SO3krates(dataclasses.replace(published.config, multiplicities=None))
        model.load_state_dict(published.state_dict())
        return model


def test_forces_in_boxes_with_a_small_step() -> None:
    contract = TestContract()
    model, h = contract.periodic(), 2e-4
    for box in contract.boxes():
        forces = model.energy_and_forces(box)[1]
        for seed in range(5):
            d = np.random.default_rng(seed).normal(size=box.positions.shape)
            d /= np.linalg.norm(d)
            moved = [box.replace(positions=box.positions + k * h * d) for k in (-2, -1, 1, 2)]
            energies = model.evaluate(model.batch(moved), forces=False).energy.numpy()
            numeric = -(energies @ np.array([1.0, -8.0, 8.0, -1.0])) / (12 * h)
            assert (forces * d).sum() == pytest.approx(numeric, abs=1e-7)
