"""published files -> the content-addressed cache, over unreliable connections.

A download is kept as ``<sha256>.part`` and continued where it stopped (HTTP Range); only a file whose checksum is right
gets its final name.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from openmm_mlff.data import model_file

#: called with (bytes so far, bytes in all or None)
Progress = Callable[[int, int | None], None]

BLOCK = 1 << 16
#: seconds without a byte after which a connection counts as broken.
TIMEOUT = 30.0


class DownloadError(OSError):
    """A file could not be fetched, or what came is not the file that was asked for."""


def fetch(
    url: str,
    sha256: str,
    *,
    suffix: str | None = None,
    retries: int = 4,
    wait: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """Fetch a file into the model cache unless it is there already.

    Args:
        url: http(s) or file address. sha256: hexadecimal checksum that the file must have.
        suffix: ending of the cached file; the url's by default.
        retries: further attempts after a broken connection, each going on where the last one stopped.
        wait: seconds before the first retry; doubled each time.

    Returns:
        Path of the verified file in the cache.

    Raises `ValueError` for an impossible argument and `DownloadError` if the server refuses, the connection breaks
    too often (the part stays for the next call) or the checksum is wrong (the part is removed).
    """
    _check(url, sha256, retries)
    folder = model_file.cache_dir()
    found = model_file.cached(sha256)
    if found is not None:
        if model_file.sha256_of(found) == sha256:
            return found
        # damaged on disk since it was fetched; it would shadow the good one
        found.unlink()
    ending = Path(urlparse(url).path).suffix if suffix is None else suffix
    target, part = folder / f"{sha256}{ending}", folder / f".{sha256}.part"
    for attempt in range(retries + 1):
        try:
            _continue(url, part, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DownloadError(f"{url}: the server answered {error.code} {error.reason}") from error
            reason: Exception = error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        if attempt == retries:
            kept = part.stat().st_size if part.exists() else 0
            raise DownloadError(
                f"{url}: no complete download after {retries + 1} attempts ({reason}); {kept} bytes are kept, "
                "and the next attempt goes on from there"
            ) from reason
        time.sleep(wait * 2**attempt)
    actual = model_file.sha256_of(part)
    if actual != sha256:
        part.unlink()
        raise DownloadError(
            f"{url}: expected a file with sha256 {sha256}, got {actual}; what was fetched has been removed"
        )
    os.replace(part, target)
    return target


def _check(url: str, sha256: str, retries: int) -> None:
    if urlparse(url).scheme not in ("http", "https", "file"):
        raise ValueError(f"url: expected an http, https or file address, got {url!r}")
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError(f"sha256: expected 64 lower-case hexadecimal digits, got {sha256!r}")
    if retries < 0:
        raise ValueError(f"retries: expected at least 0, got {retries}")


def _continue(url: str, part: Path, progress: Progress | None) -> None:
    """Append what is missing to `part`; raises `OSError` if the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:
            # nothing is left to send: the part is whole, or the file has changed; the checksum decides
            return
        raise
    with contextlib.closing(response):
        if have and getattr(response, "status", None) != 206:
            # the server does not know ranges and sends the file from its beginning
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with part.open("ab" if have else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total)
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")
