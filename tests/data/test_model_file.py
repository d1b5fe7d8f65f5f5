"""Model files: what is written comes back, what is damaged or malicious is refused, the cache survives moves."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from openmm_mlff.data import model_file
from openmm_mlff.potentials import family

CARD: dict[str, Any] = {"kind": "potential", "family": "spookynet", "config": {"num_features": 8}, "name": "test"}
TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(3, dtype=torch.int64), "c": torch.zeros(0, 4)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return model_file.save(tmp_path / "model.safetensors", CARD, TENSORS)


def write(path: Path, text: str) -> Path:
    """A model file with any text as its card."""
    save_file({"x": torch.ones(2)}, path, metadata={"format": "openmm-mlff", "card": text})
    return path


def test_round_trip(path: Path) -> None:
    card, tensors = model_file.load(path)
    assert card == CARD | {"format_version": model_file.FORMAT_VERSION} == model_file.load_card(path)
    assert sorted(tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def test_same_content_same_bytes(tmp_path: Path) -> None:
    shuffled = {name: TENSORS[name] for name in reversed(TENSORS)}
    card = {name: CARD[name] for name in reversed(CARD)}
    assert len({model_file.encode(*given) for given in [(card, shuffled), (CARD, TENSORS)] * 10}) == 1


def test_unknown_kind_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"kind.*potential, composite, propagator.*'weights'"):
        model_file.encode(CARD | {"kind": "weights"}, TENSORS)


def test_no_half_written_files(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        model_file.save(path, CARD | {"name": "other"}, TENSORS)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_permissions_are_those_of_any_new_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x", encoding="utf-8")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_truncated(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    for read in (model_file.load, model_file.load_card, family.load_potential):
        with pytest.raises(ValueError, match=r"modelPath: model\.safetensors is damaged or not a model file"):
            read(path)


def test_corrupt_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged or not a model file"):
        model_file.load(path)


def test_header_that_claims_to_be_huge(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="damaged or not a model file"):
        model_file.load(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"modelPath: no file at .*nowhere"):
        model_file.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="modelPath: no file at"):
        model_file.load(tmp_path)  # a folder
    with pytest.raises(FileNotFoundError, match="modelPath: no file at"):
        family.load_potential(tmp_path / "nowhere.pth")


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "executed"))


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("how", ["pickle", "torch", "nested"])
def test_malicious_pickles_are_not_executed(tmp_path: Path, name: str, how: str) -> None:
    target, path = tmp_path / "proof", tmp_path / name
    payload = Payload(target)
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    elif how == "torch":
        torch.save(payload, path)
    else:
        torch.save({"num_features": 8, "state_dict": {"output.weight": payload}}, path)
    with pytest.raises(ValueError, match=rf"modelPath: {name}"):
        family.load_potential(path)
    assert not target.exists()
    # the payload is real
    pickle.loads(pickle.dumps(payload))
    assert target.read_text(encoding="utf-8") == "executed"


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not an openmm-mlff model"):
        model_file.load(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (CARD | {"format_version": 99}, "format version 99"),
        (CARD, "format_version is needed"),
        (CARD | {"format_version": "1"}, "format_version is needed"),
        ([1, 2], "format_version is needed"),
        ({"format_version": 1, "family": "spookynet", "config": {}}, "incomplete"),
        ({"format_version": 1, "kind": "potential", "config": {}}, "incomplete"),
        ({"format_version": 1, "kind": "potential", "family": "spookynet"}, "incomplete"),
        (CARD | {"format_version": 1, "config": [1]}, "incomplete"),
        (CARD | {"format_version": 1, "kind": "nonsense"}, "incomplete"),
    ],
    ids=str,
)
def test_impossible_cards(tmp_path: Path, card: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"modelPath: .*{message}"):
        model_file.load_card(write(tmp_path / "card.safetensors", json.dumps(card)))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000], ids=["empty", "open", "deep"])
def test_cards_that_are_not_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"the model card in .* cannot be read"):
        model_file.load_card(write(tmp_path / "card.safetensors", text))


def test_checksums(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model_file.sha256_of(path) == digest
    model_file.verify(path, digest)
    with pytest.raises(ValueError, match=rf"sha256: model.safetensors should have {'0' * 64}, but has {digest}"):
        model_file.verify(path, "0" * 64)
    with pytest.raises(ValueError, match="sha256"):
        family.load_potential(path, sha256="0" * 64)


def test_cache_finds_a_model_after_its_file_has_moved(path: Path, cache: Path) -> None:
    digest = model_file.remember(path)
    assert model_file.cached(digest) == cache / f"{digest}.safetensors" == model_file.find(digest)
    path.unlink()
    assert model_file.load_card(model_file.find(digest, hint=path))["name"] == "test"


def test_cache_follows_the_hint_when_it_was_emptied(path: Path, cache: Path) -> None:
    digest = model_file.remember(path)
    (cache / f"{digest}.safetensors").unlink()
    assert model_file.find(digest, hint=path) == path
    path.write_bytes(path.read_bytes() + b"changed")
    with pytest.raises(FileNotFoundError, match=rf"no model with sha256 {digest} in .* or .*model.safetensors"):
        model_file.find(digest, hint=path)


def test_cache_mends_a_damaged_copy(path: Path, cache: Path) -> None:
    digest = model_file.remember(path)
    copy = cache / f"{digest}.safetensors"
    copy.write_bytes(b"damaged")
    assert model_file.find(digest, hint=path) == path
    with pytest.raises(FileNotFoundError):
        model_file.find(digest)
    assert model_file.remember(path) == digest
    assert model_file.find(digest) == copy and copy.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in cache.iterdir()) == [copy.name]


def test_cache_keeps_the_ending_of_published_files(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "parameters.pth"
    path.write_bytes(b"whatever")
    assert model_file.find(model_file.remember(path)).suffix == ".pth"


def test_store_writes_what_encode_says(cache: Path) -> None:
    digest = model_file.store(CARD, TENSORS)
    assert digest == hashlib.sha256(model_file.encode(CARD, TENSORS)).hexdigest()
    assert torch.equal(model_file.load(model_file.find(digest))[1]["b"], TENSORS["b"])
