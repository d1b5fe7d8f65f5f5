"""bytes -> a file that is always whole; its checksum; arrays and a JSON header <-> such a file.

Files of arrays are safetensors: nothing in them is executed when they are read. Their metadata have the one key
``openmm-mlff`` (several would be written in a random order, and equal contents should be equal files): a JSON object
with ``format`` and whatever the kind of file needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

METADATA_KEY = "openmm-mlff"


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write under a temporary name in the same folder, force it to disk, then move it: no reader sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; this one should be as readable as any other new file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_arrays(
    path: str | Path, form: str, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any] | None = None
) -> None:
    """Write arrays, and a header of plain data.

    Args:
        form: of the file, with a version; `read_arrays` asks for it.
    """
    text = json.dumps({"format": form, **(header or {})})
    ordered = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    write_atomically(path, save(ordered, metadata={METADATA_KEY: text}))


def read_arrays(
    path: str | Path, form: str, what: str, names: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a file of a known format.

    Args:
        what: the file should be, for messages. names: of the arrays wanted; None takes all.

    Raises `FileNotFoundError`, and `ValueError` for a file that is damaged, of another kind or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            if header.get("format") != form:
                raise ValueError(f"{path}: expected {what} of format {form}, got {header.get('format')!r}")
            wanted = file.keys() if names is None else names
            return header, {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected {what}, but the file is damaged or of another kind ({error})") from error
