"""The model file: one safetensors file whose metadata holds a JSON card; and the cache that keeps models by checksum.

Nothing in the file is executed when it is read. The cache (``$OPENMM_MLFF_CACHE``, else ``~/.cache/openmm-mlff``) holds
``models/<sha256>.safetensors`` (or another ending for published files), so that a System XML finds its model after the
user's file has moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from openmm_mlff._plugins import near
from openmm_mlff.data.files import sha256_of, write_atomically

FORMAT = "openmm-mlff"
FORMAT_VERSION = 1
KINDS = ("potential", "composite", "propagator")
#: fields that a card may carry beside those that `make_card` fills in
CARD_FIELDS = (
    "name",
    "description",
    "domain",
    "limits",
    "teacher",
    "training_data",
    "training",
    "licence",
    "citation",
    "accuracy",
    "source",
)


def check_card_fields(card: Mapping[str, Any]) -> None:
    """Raise `ValueError` naming a field that is not among `CARD_FIELDS`."""
    for name in card:
        if name not in CARD_FIELDS:
            raise ValueError(f"card: there is no field {name!r}; {near(name, CARD_FIELDS)}")


def verify(path: str | Path, sha256: str) -> None:
    """Raise `ValueError` unless the file has this checksum."""
    actual = sha256_of(path)
    if actual != sha256:
        raise ValueError(f"sha256: {Path(path).name} should have {sha256}, but has {actual}: damaged, or another model")


def encode(card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """Card and tensors as the bytes of a model file (the same input gives the same bytes)."""
    if card.get("kind") not in KINDS:
        raise ValueError(f"card: expected a kind among {', '.join(KINDS)}, got {card.get('kind')!r}")
    text = json.dumps({"format_version": FORMAT_VERSION, **card}, sort_keys=True)
    ordered = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    return _in_order(to_bytes(ordered, metadata={"format": FORMAT, "card": text}))


def _in_order(data: bytes) -> bytes:
    """The file with its metadata sorted: the library writes them in a random order, which would change the sha256."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def save(path: str | Path, card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write a model file."""
    return write_atomically(path, encode(card, tensors))


def is_model_file(path: str | Path) -> bool:
    """Whether the ending says safetensors."""
    return Path(path).suffix == ".safetensors"


def load_card(path: str | Path) -> dict[str, Any]:
    """The card alone; raises `ValueError` if the file is damaged, foreign or of a newer format."""
    return _read(Path(path), tensors=False)[0]


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Card and tensors; raises `ValueError` if the file is damaged, foreign or of a newer format."""
    return _read(Path(path), tensors=True)


def _read(path: Path, tensors: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"modelPath: no file at {path}")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            values = {name: handle.get_tensor(name) for name in handle.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"modelPath: {path.name} is damaged or not a model file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"modelPath: {path.name} is a safetensors file, but not an openmm-mlff model (it has no model card)"
        )
    try:
        card = json.loads(metadata["card"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"modelPath: the model card in {path.name} cannot be read ({error})") from error
    if not isinstance(card, dict) or not isinstance(card.get("format_version"), int):
        raise ValueError(f"modelPath: the model card in {path.name} is incomplete (format_version is needed)")
    if card["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"modelPath: {path.name} has format version {card['format_version']}, but this package reads up to "
            f"{FORMAT_VERSION}; install a newer one"
        )
    if card.get("kind") not in KINDS or "family" not in card or not isinstance(card.get("config"), dict):
        raise ValueError(f"modelPath: the model card in {path.name} is incomplete (kind, family and config are needed)")
    return card, values


# -- cache ---------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Folder of the cached models; made if it does not exist."""
    root = os.environ.get("OPENMM_MLFF_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "openmm-mlff") / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(sha256: str) -> Path | None:
    """The cached file with this checksum, if there is one (the checksum is verified by who reads it)."""
    found = sorted(cache_dir().glob(f"{sha256}.*"))
    return found[0] if found else None


def remember(path: str | Path) -> str:
    """Copy a model file into the cache; returns its sha256."""
    path = Path(path)
    return _remember(path.read_bytes(), path.suffix)


def store(card: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Write card and tensors into the cache; returns the file's sha256."""
    return _remember(encode(card, tensors), ".safetensors")


def _remember(data: bytes, suffix: str) -> str:
    digest = hashlib.sha256(data).hexdigest()
    target = cache_dir() / f"{digest}{suffix}"
    # a damaged copy is mended
    if not target.exists() or sha256_of(target) != digest:
        write_atomically(target, data)
    return digest


def find(sha256: str, hint: str | Path | None = None) -> Path:
    """The file with this checksum: in the cache, or at the path where it was last seen.

    Raises `FileNotFoundError` if neither has it.
    """
    candidates = [cached(sha256), None if hint is None else Path(hint)]
    for path in candidates:
        if path is not None and path.is_file() and sha256_of(path) == sha256:
            return path
    seen = f" or {hint}" if hint else ""
    raise FileNotFoundError(
        f"modelPath: no model with sha256 {sha256} in {cache_dir()}{seen}; put the file back or fetch it"
    )
