"""A pickle written by others -> what a reader builds of it, where any name that is not on its list is refused.

Python's unpickling imports and calls what a file names. A reader here gives its own plain stand-ins for the few names
that it knows, so that nothing of the file's choosing runs:

    class Reader(AllowListReader):
        def known(self, module, name):
            return {("numpy", "dtype"): Dtype}.get((module, name))

    with damage_as_errors(path, "a pickled tree of arrays"):
        tree = Reader(path.read_bytes()).load()
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: what unpickling damaged bytes can raise, and reading the archive around them
_DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OSError,
    OverflowError,
    MemoryError,
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class AllowListReader(pickle.Unpickler):
    """Unpickles bytes; subclasses say what stands for each name in `known`.

    Raises `pickle.UnpicklingError` for a name that is not known, and for a memo larger than the bytes can fill.
    """

    def __init__(self, content: bytes) -> None:
        check_memo(content)
        super().__init__(io.BytesIO(content))

    def known(self, module: str, name: str) -> Any:
        """What to call or take where the pickle says ``module.name``; None refuses it."""
        raise NotImplementedError

    def find_class(self, module: str, name: str) -> Any:
        found = self.known(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not on the list of what may be read")
        return found


def check_memo(content: bytes) -> None:
    """Refuse places of the memo beyond any that a pickle of this length can need; Python would make room for them.

    Raises `pickle.UnpicklingError`, and `ValueError` for bytes that are no pickle.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it numbers an object {argument}")


@contextmanager
def damage_as_errors(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever damaged bytes raise into a `ValueError` that names the file and what was expected."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"modelPath: {path.name} is damaged or not {expected} ({error})") from error
