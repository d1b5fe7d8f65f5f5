"""A whole PyTorch module that somebody pickled -> its tensors and settings, without running any of it.

`torch.save(module)` writes a zip archive: a pickle that names the classes of all modules, and one record per tensor. To
load it with torch means to import and call what it names. Here classes become empty shells that hold what their objects
held, tensors are rebuilt by this file, and any other name is refused.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_mlff.data.pickles import AllowListReader, damage_as_errors

#: packages whose classes are read as shells
_SHELLS = ("so3krates_torch.", "torch.nn.modules.")
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "bool": torch.bool}


class Shell:
    """An object of a class that is not imported: `kind` is the class's name, the attributes are the object's own."""

    kind = ""

    def parts(self, which: str) -> dict[str, Any]:
        """One of the tables that PyTorch keeps in every module ('_modules', '_parameters', '_buffers')."""
        table = vars(self).get(which, {})
        return {k: v for k, v in table.items() if v is not None} if isinstance(table, dict) else {}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers by the names that `state_dict` gives them."""
        found: dict[str, Tensor] = {}
        for which in ("_parameters", "_buffers"):
            found |= {prefix + k: v for k, v in self.parts(which).items() if isinstance(v, Tensor)}
        for name, child in self.parts("_modules").items():
            if isinstance(child, Shell):
                found |= child.tensors(f"{prefix}{name}.")
        return found


def read_module(path: Path) -> Shell:
    """The module in a file of `torch.save(module)`; raises `ValueError` if it is damaged or holds anything else."""
    with damage_as_errors(path, "a pickled PyTorch module"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError("it has no single data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        module = _Reader(archive, folder).load()
    if not isinstance(module, Shell):
        raise ValueError(f"modelPath: {path.name} holds a {type(module).__name__}, expected a PyTorch module")
    return module


class _Reader(AllowListReader):
    """Builds shells, tensors and plain containers, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.read(f"{folder}data.pkl"))
        self._archive, self._folder = archive, folder
        self._read: dict[str, Tensor] = {}
        self._classes: dict[str, type[Shell]] = {}

    def known(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("__builtin__", "set"): set,
            ("builtins", "set"): set,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if f"{module}.".startswith(_SHELLS):
            return self._classes.setdefault(f"{module}.{name}", type(name, (Shell,), {"kind": name}))
        return None

    def persistent_load(self, pid: Any) -> Tensor:
        what, dtype, key, _, count = pid
        if what != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to {what!r}, expected a storage of numbers")
        if key not in self._read:
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes, expected {count * dtype.itemsize}")
            self._read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._read[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, Tensor) or math.prod(size) > storage.numel():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    # refuses what reaches beyond the storage
    return torch.as_strided(storage, size, stride, offset).clone()


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data
