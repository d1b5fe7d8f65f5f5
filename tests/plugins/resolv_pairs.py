"""Small random pairs and molecules for the tests of resolv."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Potential
from openmm_resolv import ResolvPotential
from openmm_so3krates import SO3krates, SO3kratesConfig
from openmm_spookynet import SpookyNet, SpookyNetConfig

from .random_models import NETWORK_ALONE, randomised

METHANOL = Structure(
    np.array([6, 8, 1, 1, 1, 1]),
    np.array(
        [
            [-0.046, 0.661, 0.021],
            [-0.053, -0.758, -0.017],
            [-1.086, 0.981, 0.064],
            [0.877, -1.064, 0.033],
            [0.431, 1.083, 0.902],
            [0.458, 1.065, -0.871],
        ]
    ),
)
WATER = Structure(np.array([8, 1, 1]), np.array([[0.0, 0.02, 0.0], [0.95, 0.1, 0.03], [-0.24, 0.93, -0.05]]))
AMMONIA = Structure(
    np.array([7, 1, 1, 1]), np.array([[0.0, 0.1, 0.0], [0.94, 0.35, 0.1], [-0.5, 0.4, 0.8], [-0.45, 0.38, -0.85]])
)
METHANOL_BONDS = [(0, 1), (0, 2), (1, 3), (0, 4), (0, 5)]


def so3krates(seed: int, **options: Any) -> SO3krates:
    """A fast network of the kind that ReSolv is trained with, in float64."""
    torch.manual_seed(seed)
    # sizes whose native code other tests compile too
    small: dict[str, Any] = {"num_features": 16, "num_layers": 1, "num_heads": 4, "num_basis_functions": 6}
    small |= {"degrees": (2, 3), "avg_num_neighbors": 4.0, "elements": (1, 6, 7, 8)}
    return randomised(
        SO3krates(SO3kratesConfig(**NETWORK_ALONE | {"use_zbl_repulsion": True} | small | options)).double()
    )


def spookynet(seed: int) -> SpookyNet:
    """Another family, with charges and long-range terms of its own, in float64."""
    torch.manual_seed(seed)
    config = SpookyNetConfig(num_features=8, num_modules=1, elements=(1, 6, 7, 8, 9))
    return randomised(SpookyNet(config).double())


def pair(phase: str = "water", water: Potential | None = None, vacuum: Potential | None = None) -> ResolvPotential:
    """Two small networks of one family unless others are given."""
    return ResolvPotential(water=water or so3krates(2), vacuum=vacuum or so3krates(1, cutoff=4.0), phase=phase)
