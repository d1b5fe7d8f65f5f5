"""GDML keeps the contract of all potentials."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest

from openmm_gdml.model import GDMLPotential
from openmm_mlff.data.structures import Structure
from openmm_mlff.testing import PotentialContract


class GDMLContract(PotentialContract):
    fixed_composition = True
    # coefficients are solved for, and cancel beyond what single precision holds
    float32 = False
    trainable = False
    numbers: tuple[int, ...]

    @pytest.fixture(autouse=True)
    def _plain(self, gdml_plain: ModuleType) -> None:
        type(self).plain = gdml_plain  # type: ignore[attr-defined]

    def structures(self) -> list[Structure]:
        base = self.plain.base_of(len(self.numbers))  # type: ignore[attr-defined]
        rng = np.random.default_rng(1)
        return [Structure(self.numbers, base + rng.normal(0.0, s, base.shape)) for s in (0.05, 0.1, 0.2)]


class TestContract(GDMLContract):
    """All permutations of like atoms, which the contract exchanges."""

    numbers = (6, 1, 1, 1, 8)

    def make(self) -> GDMLPotential:
        permutations = np.array([(0, *p, 4) for p in itertools.permutations((1, 2, 3))])
        return self.plain.random_model(self.numbers, permutations)  # type: ignore[attr-defined]


class TestContractWithEnergyConstraints(GDMLContract):
    numbers = (1, 7, 6, 8)

    def make(self) -> GDMLPotential:
        return self.plain.random_model(self.numbers, n_train=11, seed=1, energies=True)  # type: ignore[attr-defined]

    # what a model was fitted to makes no difference to how it is stored; `TestContract` has the fast one
    @pytest.mark.slow
    def test_openmm_in_a_fresh_process(self) -> None:
        super().test_openmm_in_a_fresh_process()
