"""Models whose weights are all random, for tests of several families."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import nn

from openmm_so3krates import SO3krates, SO3kratesConfig
from openmm_spookynet import SpookyNet, SpookyNetConfig

Model = TypeVar("Model", bound=nn.Module)

#: SO3krates as in the papers before SO3LR: a sum of atomic energies, which knows no charges
NETWORK_ALONE: dict[str, Any] = {
    "use_charge_embed": False,
    "use_spin_embed": False,
    "use_zbl_repulsion": False,
    "use_electrostatics": False,
    "use_dispersion": False,
    "predict_charges": False,
    "predict_hirshfeld": False,
}


def randomised(model: Model) -> Model:
    """All weights random, of the size that training gives; but not the raw numbers of the repulsion."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "raw" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter) / max(1.0, math.sqrt(parameter.shape[-1])))
    return model.eval()


def so3krates(seed: int, **options: Any) -> SO3krates:
    """Two small layers, in float64, with all of SO3LR's terms unless options say otherwise."""
    torch.manual_seed(seed)
    small: dict[str, Any] = {"num_features": 8, "num_layers": 2, "num_heads": 2, "num_basis_functions": 6}
    small |= {"hirshfeld_features": 4, "avg_num_neighbors": 4.0}
    return randomised(SO3krates(SO3kratesConfig(**small | options)).double())


def spookynet(seed: int, **options: Any) -> SpookyNet:
    """Two small modules, in float64."""
    torch.manual_seed(seed)
    small: dict[str, Any] = {"num_features": 8, "num_modules": 2, "num_basis_functions": 8, "num_random_features": 8}
    return randomised(SpookyNet(SpookyNetConfig(**small | {"elements": (1, 6, 7, 8)} | options)).double())
