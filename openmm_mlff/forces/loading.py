"""Models of the running process: each is read once, by the checksum of its file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from openmm_mlff.data import model_file
from openmm_mlff.forces.force_spec import PRECISIONS
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.potentials.potential import Potential

MAX_LOADED_MODELS = 8

_models: OrderedDict[tuple[Any, ...], Potential] = OrderedDict()
_models_lock = threading.Lock()


def choose_device(device: str | None) -> str:
    """The device to run on: what was asked for, else CUDA where there is one, else the CPU."""
    return device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    sha256: str,
    family: str,
    path: str | Path | None = None,
    precision: str | None = None,
    device: str | None = None,
    long_range_cutoff: float | None = None,
    long_range_method: str = "shifted",
    phase: str | None = None,
) -> Potential:
    """A potential by the checksum of its file, loaded once per process for the same options.

    Args:
        path: where the file was last seen, if it is not in the cache. long_range_cutoff: angstrom.
        long_range_method: one of the model's `Potential.long_range_methods`. phase: one of its `Potential.phases`.

    Raises `FileNotFoundError` if no file has this checksum, `ValueError` for a method or phase that the family does not
    offer, and what `load_potential` raises.
    """
    place = choose_device(device)
    key = (sha256, precision, place, long_range_cutoff, long_range_method, phase)
    with _models_lock:
        if key in _models:
            _models.move_to_end(key)
            return _models[key]
        model = load_potential(model_file.find(sha256, path), family)
        if phase is not None:
            model = model.in_phase(phase)
        model.to(device=place, dtype=PRECISIONS[precision] if precision else None)
        if long_range_cutoff is not None:
            model.long_range_cutoff = long_range_cutoff
        if long_range_method not in model.long_range_methods:
            raise ValueError(
                f"long_range_method: expected one of {model.long_range_methods}, got {long_range_method!r}"
            )
        model.long_range_method = long_range_method
        _models[key] = model.eval().requires_grad_(False)
        while len(_models) > MAX_LOADED_MODELS:
            _models.popitem(last=False)
        return _models[key]
