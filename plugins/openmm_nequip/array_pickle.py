"""A pickled tree of arrays, as JAX programs save parameters -> numpy arrays, without running any of it.

The pickle names functions of jax and numpy that would rebuild the arrays. Here this file rebuilds them from the bytes,
and any other name is refused; neither jax nor numpy's own reconstruction runs.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlff.data.pickles import AllowListReader, damage_as_errors

#: what a checkpoint of parameters can be made of
_DTYPES: dict[str, np.dtype[Any]] = {
    "f4": np.dtype("<f4"),
    "f8": np.dtype("<f8"),
    "i4": np.dtype("<i4"),
    "i8": np.dtype("<i8"),
}
_NUMPY_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a nested dictionary by their keys joined with '/'.

    Raises `ValueError` if the file is damaged, or names anything but dictionaries and arrays of numbers.
    """
    with damage_as_errors(path, "a pickled tree of arrays"):
        return dict(_leaves(_Reader(path.read_bytes()).load(), ""))


def _leaves(tree: Any, prefix: str) -> Any:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is {key!r}, expected text")
            yield from _leaves(value, f"{prefix}/{key}" if prefix else key)
    elif isinstance(tree, _Array):
        yield prefix, tree.values()
    else:
        raise TypeError(f"{prefix or 'it'} is a {type(tree).__name__}, expected a dictionary or an array")


class _Dtype:
    """What the pickle says of a numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _DTYPES:
            raise pickle.UnpicklingError(f"an array holds {code!r}, expected one of {', '.join(_DTYPES)}")
        self.dtype = _DTYPES[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise pickle.UnpicklingError("an array was written on a big-endian machine")


class _Array:
    """What the pickle says of a numpy.ndarray: an empty one that is filled by its state."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array's state is not that of an array of numbers")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"an array of shape {shape} has {len(data)} bytes")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")

    def values(self) -> np.ndarray:
        if self.array is None:
            raise pickle.UnpicklingError("an array has no contents")
        return self.array


def _jax_array(build: Any, arguments: Any, state: tuple[Any, ...], _: Any) -> _Array:
    """jax's ``_reconstruct_array(build, arguments, state of the numpy array, kind of the abstract value)``."""
    if build is not _Array:
        raise pickle.UnpicklingError("a jax array is not built from a numpy array")
    array = _Array()
    array.__setstate__(state)
    return array


class _Reader(AllowListReader):
    """Builds dictionaries and arrays, and nothing else."""

    def known(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "dtype"): _Dtype,
            ("numpy", "ndarray"): _Array,
            ("jax._src.array", "_reconstruct_array"): _jax_array,
            ("jax._src.device_array", "reconstruct_device_array"): _jax_array,
            ("flax.core.frozen_dict", "FrozenDict"): dict,
        } | {(core, "_reconstruct"): _Array for core in _NUMPY_CORE}
        return allowed.get((module, name))
