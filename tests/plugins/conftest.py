"""The published SpookyNet, and second implementations beside the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from openmm_mlff.potentials.family import load_potential
from openmm_spookynet import SpookyNet


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """``spookynet_plain``: the second SpookyNet, and checkpoints with random weights."""
    return _beside("spookynet_plain")


@pytest.fixture(scope="session")
def gdml_plain() -> ModuleType:
    """``gdml_plain``: the second sGDML, and random models."""
    return _beside("gdml_plain")


@pytest.fixture(scope="session")
def so3lr_parameters(shared: Path) -> Path:
    """The published parameters of SO3LR, hyperparameters beside them; not part of this repository."""
    _ = shared / "models" / "so3lr_hyperparameters.json"
    return Path(shared / "models" / "so3lr_params.npz")


@pytest.fixture(scope="session")
def so3krates_plain() -> ModuleType:
    """``so3krates_plain``: the second SO3krates."""
    return _beside("so3krates_plain")


@pytest.fixture(scope="session")
def nequip_plain() -> ModuleType:
    """``nequip_plain``: the second NequIP, and published files with random weights."""
    return _beside("nequip_plain")


def _beside(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Path:
    """The published file; not part of this repository."""
    return shared / "models" / "spookynet_parameters.pth"


@pytest.fixture(scope="session")
def published(checkpoint: Path) -> dict[torch.dtype, SpookyNet]:
    """The published model in both precisions."""
    models = {dtype: load_potential(checkpoint).to(dtype) for dtype in (torch.float64, torch.float32)}
    return models  # type: ignore[return-value]
