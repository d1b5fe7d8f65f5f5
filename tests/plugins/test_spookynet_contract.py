"""SpookyNet keeps the contract of all potentials."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from openmm_mlff.potentials.family import load_potential
from openmm_mlff.testing import PotentialContract
from openmm_spookynet import SpookyNet, pretrained

from .random_models import spookynet as random_model


class SpookyNetContract(PotentialContract):
    # attention over all atoms, and the charge's and spin's attention, know the composition of the whole system
    separable = False
    # attention is divided by a sum plus 1e-8; without that constant supercells agree to 1e-14
    extensive_atol = 1e-4
    # equal atoms tie for the attention's maximum, and one of them carries its derivative
    copies_force_atol = 1e-2

    # which terms a model has makes no difference to how it is stored; `TestContract` has the fast one
    @pytest.mark.slow
    def test_openmm_in_a_fresh_process(self) -> None:
        super().test_openmm_in_a_fresh_process()


class TestContract(SpookyNetContract):
    def make(self) -> SpookyNet:
        return random_model(0)

    def test_openmm_in_a_fresh_process(self) -> None:
        PotentialContract.test_openmm_in_a_fresh_process(self)


class TestContractWithLongRangeCutoff(SpookyNetContract):
    def make(self) -> SpookyNet:
        return random_model(1, long_range_cutoff=7.0, num_modules=1)


class TestContractOfOtherVariants(SpookyNetContract):
    def make(self) -> SpookyNet:
        return random_model(2, use_irreps=False, use_nonlinear_embedding=True, activation="ssp", num_residual_local_s=2)


class TestContractOfLocalModels(PotentialContract):
    """Without attention, charges exchanged between neighbours only, charge and spin embedded after one module."""

    # the far fragment is a doublet: who has the unpaired electron is a share that random weights do not give to one
    separable = False

    def make(self) -> SpookyNet:
        model = random_model(3, attention="none", charge_conservation="local", embed_after=1)
        # with dozens of neighbours in a narrow box, random exchange makes charges of tens of e, and an energy that is
        # too steep for finite differences
        with torch.no_grad():
            model.output.weight[1] *= 0.1
            model.element_bias[:, 1] *= 0.1
        return model


class TestContractOfSharedCharges(PotentialContract):
    """What charges lack of the total goes by learned shares; attention beside an embedding that is late."""

    separable = False
    # attention is divided by a sum plus 1e-8, and equal atoms tie for its maximum
    extensive_atol = 1e-4
    copies_force_atol = 1e-2

    def make(self) -> SpookyNet:
        return random_model(4, charge_conservation="shared", embed_after=1)


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
