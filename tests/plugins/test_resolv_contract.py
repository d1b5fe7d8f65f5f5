"""A pair of potentials keeps the contract of all potentials."""

from __future__ import annotations

import unittest

from openmm_mlff.data.structures import Structure
from openmm_mlff.testing import PotentialContract
from openmm_resolv import ResolvPotential

from .resolv_pairs import AMMONIA, METHANOL, WATER, pair, so3krates, spookynet


class PairContract(PotentialContract):
    gradient_atol = 1e-5  # as SO3krates: its third derivatives jump at the cutoff

    def structures(self) -> list[Structure]:
        """Single molecules: simulations of anything else are refused."""
        return [WATER, METHANOL, AMMONIA]


class TestContractInWater(PairContract):
    def make(self) -> ResolvPotential:
        return pair("water")


class TestContractBetweenTwoFamilies(PairContract):
    separable = False  # as SpookyNet: its charges and embeddings are spread over all atoms
    extensive = False

    def make(self) -> ResolvPotential:
        model = pair("both", water=so3krates(3), vacuum=spookynet(4))
        model.coupling = 0.3
        return model

    def lambda_is_not_stored(self) -> None:
        raise unittest.SkipTest("resolv: files and systems start at lambda = 1; test_resolv.py sets it in OpenMM")

    test_model_file_round_trip = lambda_is_not_stored
    test_openmm_in_a_fresh_process = lambda_is_not_stored
    test_many_copies_in_one_system = lambda_is_not_stored
