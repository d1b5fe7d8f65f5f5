"""Models that know their charge and multiplicity, with descriptors inside and outside the fused kernel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from openmm_gdml import GDMLPotential
from openmm_gdml.descriptors import descriptor
from openmm_mlff.data.structures import Structure
from openmm_mlff.testing import PotentialContract

#: ammonium, and its radical with one electron less in the same frame
NUMBERS = np.array([7, 1, 1, 1, 1])
POSITIONS = np.array([[0.0, 0.02, 0.0], [0.6, 0.6, 0.58], [-0.6, -0.57, 0.6], [-0.61, 0.6, -0.6], [0.6, -0.6, -0.61]])
PERMUTATIONS = np.array([[0, *p] for p in itertools.permutations(range(1, 5))])


def random_model(name: str, seed: int, charge: int, multiplicity: int) -> GDMLPotential:
    """Random coefficients around eleven rattled geometries."""
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(POSITIONS + rng.normal(scale=0.1, size=(11, *POSITIONS.shape)))
    x = descriptor(name)(points)
    return GDMLPotential.from_coefficients(
        NUMBERS,
        2.0,
        x,
        rng.normal(size=x.shape),
        -3.0,
        permutations=PERMUTATIONS,
        descriptor=name,
        charge=charge,
        multiplicity=multiplicity,
    )


class Ion(PotentialContract):
    fixed_composition = True
    float32 = False
    trainable = False
    charge, multiplicity = 1, 1

    def structures(self) -> list[Structure]:
        rng = np.random.default_rng(3)
        moved = [POSITIONS + rng.normal(scale=0.08, size=POSITIONS.shape) for _ in range(3)]
        return [Structure(NUMBERS, positions, self.charge, self.multiplicity) for positions in moved]


class TestRadicalDicationWithPowers(Ion):
    charge, multiplicity = 2, 2

    def make(self) -> GDMLPotential:
        return random_model("inverse_powers", 1, 2, 2)


class TestCationWithDihedrals(Ion):
    # the sines of dihedrals change sign in a mirror
    mirror_symmetric = False

    def make(self) -> GDMLPotential:
        return random_model("distances_and_dihedrals", 2, 1, 1)

    # how an ion is stored does not depend on its descriptor; the radical above has the fast one
    @pytest.mark.slow
    def test_openmm_in_a_fresh_process(self) -> None:
        super().test_openmm_in_a_fresh_process()


def test_hessian_is_the_derivative_of_the_forces() -> None:
    model = random_model("inverse_distances", 5, 1, 1)
    hessian = torch.autograd.functional.hessian(
        lambda r: model.energy_of(r.reshape(1, -1, 3))[0], torch.from_numpy(POSITIONS.ravel())
    )
    h = 1e-4
    for k in (0, 7, 14):
        step = h * np.eye(POSITIONS.size)[k].reshape(POSITIONS.shape)
        plus, minus = (model.energy_and_forces(model.structure(POSITIONS + s * step))[1] for s in (1, -1))
        numeric = -(plus - minus).ravel() / (2 * h)
        np.testing.assert_allclose(hessian[k].numpy(), numeric, rtol=0, atol=1e-6 * np.abs(numeric).max())


def test_another_charge_is_refused() -> None:
    model = random_model("inverse_distances", 0, 1, 1)
    for changes, name in (({"charge": 0}, "charge"), ({"multiplicity": 3}, "multiplicity")):
        with pytest.raises(ValueError, match=f"{name}: "):
            model.batch(model.structure(POSITIONS).replace(**changes))
