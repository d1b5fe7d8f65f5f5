"""``openmm-mlff models``: the list, verification, and fetching from a local server."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from openmm_mlff import cli
from openmm_mlff.data import model_file
from openmm_mlff.potentials import family as families
from openmm_mlff.potentials.family import Family, PublishedModel, find_family
from openmm_spookynet import SpookyNet, SpookyNetConfig
from openmm_spookynet import family as spookynet


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PublishedModel]:
    """A model that is published on a local server, and a cache without it."""
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    torch.manual_seed(0)
    config = SpookyNetConfig(num_features=8, num_modules=1, elements=(1, 6, 7, 8))
    (tmp_path / "www").mkdir()
    path = families.save_potential(SpookyNet(config).eval(), tmp_path / "www" / "tiny.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "www")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    model = PublishedModel(
        name="tiny-published",
        family="spookynet",
        url=f"http://127.0.0.1:{server.server_address[1]}/tiny.safetensors",
        sha256=model_file.sha256_of(path),
        licence="CC0",
        citation="Nobody, 2026",
        domain="nothing at all",
    )
    changed: Family = dataclasses.replace(spookynet, published=(model,), bundled=())
    monkeypatch.setattr(families, "families", lambda: [changed])
    yield model
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_model_is_listed_fetched_and_verified(published: PublishedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(text in listed for text in ("tiny-published", "CC0", "nothing at all", "models fetch tiny-published"))
    assert cli.main(["models", "verify"]) == 0
    assert "tiny-published: not here" in capsys.readouterr().out
    assert cli.main(["models", "fetch", "tiny-published"]) == 0
    said = capsys.readouterr().out
    assert "licence CC0; please cite Nobody, 2026" in said and "checksum verified" in said
    path = model_file.cached(published.sha256)
    assert path is not None and path.suffix == ".safetensors"
    assert cli.main(["models", "verify", "tiny-published"]) == 0
    assert "sound, spookynet, 4 elements" in capsys.readouterr().out
    assert cli.main(["models", "list"]) == 0
    assert "in the cache" in capsys.readouterr().out


def test_damage_is_found(published: PublishedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "verify", "tiny-published"]) == 1
    cli.main(["models", "fetch", "tiny-published"])
    path = model_file.cached(published.sha256)
    assert path is not None
    copy = tmp_path / "copy.safetensors"
    shutil.copy(path, copy)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    assert cli.main(["models", "verify"]) == 1
    assert "NOT SOUND: sha256" in capsys.readouterr().out
    assert cli.main(["models", "verify", str(copy)]) == 0
    copy.write_bytes(data[: len(data) // 2])
    assert cli.main(["models", "verify", str(copy)]) == 1
    assert "NOT SOUND" in capsys.readouterr().out


def test_a_wrong_file_at_another_place_is_refused(
    published: PublishedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "www" / "other").write_bytes(b"something else")
    other = published.url.replace("tiny.safetensors", "other")
    assert cli.main(["models", "fetch", "tiny-published", "--url", other]) == 1
    assert "expected a file with sha256" in capsys.readouterr().err
    assert model_file.cached(published.sha256) is None


def test_other_ways_are_named_where_fetching_fails(
    published: PublishedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = ["--url", published.url.replace("tiny", "none")]
    assert cli.main(["models", "fetch", "tiny-published", *nowhere]) == 1
    said = capsys.readouterr().err
    assert "the server answered 404" in said and "other ways to get tiny-published:" in said
    assert "--url" in said and "MLPotential('spookynet', modelPath=...)" in said and "pip install" not in said
    monkeypatch.setattr(families, "families", lambda: [find_family("so3lr")])
    assert cli.main(["models", "fetch", "so3lr", *nowhere]) == 1
    said = capsys.readouterr().err
    assert "pip install 'openmm-mlff[so3lr]'" in said and "MLPotential('so3lr', modelPath=...)" in said


def test_unknown_names_are_refused(published: PublishedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "fetch", "tiny-publishd"]) == 1
    assert "did you mean 'tiny-published'?" in capsys.readouterr().err
    assert cli.main(["models", "verify", "nothing"]) == 1
    assert "expected a file or a model among tiny-published" in capsys.readouterr().err


def test_what_is_really_known_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    listed = capsys.readouterr().out
    assert "spookynet-published" in listed and "MIT" in listed and "spookynet-ala2-gfn2" in listed
