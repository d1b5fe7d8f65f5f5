"""SpookyNet keeps the contract of all potentials."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from openmm_mlff.potentials.family import load_potential
from openmm_mlff.testing import PotentialContract
from openmm_spookynet import SpookyNet, pretrained

from .random_models import spookynet


class SpookyNetContract(PotentialContract):
    # attention over all atoms, and the charge's and spin's attention, know the composition of the whole system
    separable = False
    # attention is divided by a sum plus 1e-8; without that constant supercells agree to 1e-14
    extensive_atol = 1e-4
    # equal atoms tie for the attention's maximum, and one of them carries its derivative
    copies_force_atol = 1e-2


class TestContract(SpookyNetContract):
    def make(self) -> SpookyNet:
        return spookynet(0)


class TestContractWithLongRangeCutoff(SpookyNetContract):
    def make(self) -> SpookyNet:
        return spookynet(1, long_range_cutoff=7.0, num_modules=1)


class TestContractOfOtherVariants(SpookyNetContract):
    def make(self) -> SpookyNet:
        return spookynet(2, use_irreps=False, use_nonlinear_embedding=True, activation="ssp", num_residual_local_s=2)


class TestContractWithDispersion(SpookyNetContract):
    """Random D4 tables."""

    @pytest.fixture(autouse=True)
    def _plain(self, plain: ModuleType) -> None:
        type(self).plain = plain  # type: ignore[attr-defined]

    def make(self) -> SpookyNet:
        return pretrained.build(self.plain.random_checkpoint(10, use_d4_dispersion=True, num_modules=1))  # type: ignore[attr-defined]


class TestContractOfThePublishedModel(SpookyNetContract):
    @pytest.fixture(autouse=True)
    def _checkpoint(self, checkpoint: Path) -> None:
        type(self).path = checkpoint  # type: ignore[attr-defined]

    def make(self) -> SpookyNet:
        return load_potential(self.path)  # type: ignore[attr-defined,return-value]
