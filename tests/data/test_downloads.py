"""Downloads from a local server that lies, breaks off, and goes on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from openmm_mlff.data import downloads, model_file

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`; breaks off after `break_after` bytes of a response, as often as `breaks` says."""

    content = CONTENT
    breaks = 0
    break_after = 100_000
    ranges = True
    errors: list[int]
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.path != "/model.pth":
            return self.send_error(404)
        if self.server.errors:
            return self.send_error(self.server.errors.pop())
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        data = self.server.content[start:]
        if asked and self.server.ranges and not data:
            return self.send_error(416)
        self.send_response(206 if asked and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.breaks:
            self.server.breaks -= 1
            data = data[: self.server.break_after]
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    made = Server(("127.0.0.1", 0), Handler)
    made.errors, made.asked = [], []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def url(server: Server, path: str = "/model.pth") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def files() -> list[str]:
    return sorted(p.name for p in model_file.cache_dir().iterdir())


def test_a_file_is_fetched_once(server: Server) -> None:
    seen: list[tuple[int, int | None]] = []
    path = downloads.fetch(url(server), SHA256, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT and path == model_file.cached(SHA256)
    assert files() == [f"{SHA256}.pth"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 2
    assert downloads.fetch(url(server), SHA256) == path
    assert server.asked == [None]


def test_broken_connections_are_continued(server: Server) -> None:
    server.breaks = 2
    path = downloads.fetch(url(server), SHA256, wait=0.01)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]


def test_an_abandoned_download_is_continued_by_the_next_call(server: Server) -> None:
    server.breaks = 1
    with pytest.raises(downloads.DownloadError, match=r"100000 bytes are kept"):
        downloads.fetch(url(server), SHA256, retries=0)
    assert files() == [f".{SHA256}.part"]
    assert downloads.fetch(url(server), SHA256, retries=0).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"] and files() == [f"{SHA256}.pth"]


def test_a_server_without_ranges_sends_all_again(server: Server) -> None:
    server.breaks, server.ranges = 1, False
    assert downloads.fetch(url(server), SHA256, wait=0.01).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]


def test_a_whole_part_needs_only_its_checksum(server: Server) -> None:
    (model_file.cache_dir() / f".{SHA256}.part").write_bytes(CONTENT)
    assert downloads.fetch(url(server), SHA256, wait=0.01).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_removed(server: Server) -> None:
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(downloads.DownloadError, match=f"expected a file with sha256 {SHA256}, got .* removed"):
        downloads.fetch(url(server), SHA256)
    assert files() == []


def test_a_damaged_file_in_the_cache_is_replaced(server: Server) -> None:
    path = model_file.cache_dir() / f"{SHA256}.old"
    path.write_bytes(b"damaged")
    assert downloads.fetch(url(server), SHA256).read_bytes() == CONTENT
    assert files() == [f"{SHA256}.pth"]


def test_server_errors(server: Server) -> None:
    server.errors = [503, 500]
    assert downloads.fetch(url(server), SHA256, wait=0.01).read_bytes() == CONTENT
    with pytest.raises(downloads.DownloadError, match=r"the server answered 404"):
        downloads.fetch(url(server, "/nothing"), "0" * 64)
    # a missing file is not asked for again and again
    assert len(server.asked) == 4
    server.shutdown()
    server.server_close()
    with pytest.raises(downloads.DownloadError, match=r"no complete download after 2 attempts"):
        downloads.fetch(url(server), "1" * 64, retries=1, wait=0.01)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^url: expected"):
        downloads.fetch("ftp://host/file", SHA256)
    with pytest.raises(ValueError, match=r"^sha256: expected 64"):
        downloads.fetch("http://host/file", "abc")
    with pytest.raises(ValueError, match=r"^retries: expected"):
        downloads.fetch("http://host/file", SHA256, retries=-1)
