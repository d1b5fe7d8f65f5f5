"""The fused assembly of `native_blocks.cpp`: compiled once per machine, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openmm_gdml.native import compiled

if TYPE_CHECKING:
    from openmm_gdml.operators import PairTables

SOURCE = Path(__file__).with_name("native_blocks.cpp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The assembly for this machine; None where there is no compiler, or it fails."""
    try:
        code = compiled(SOURCE)
    except (RuntimeError, OSError):
        return None
    code.gdml_blocks.restype = None
    code.gdml_blocks.argtypes = [
        *[ctypes.c_int64] * 4,
        *[ctypes.c_void_p] * 6,
        ctypes.c_double,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
    ]
    return code


def available(out: Tensor) -> bool:
    """Whether the fused assembly can write into this tensor, ``(a, 3N, b, 3N)``."""
    return out.device.type == "cpu" and out.stride(3) == 1 and library() is not None


def fill(a: PairTables, b: PairTables, sigma: float, permutations: Tensor, out: Tensor) -> None:
    """`operators.fill_force_blocks`, on as many threads as torch has."""
    code = library()
    assert code is not None
    xa, ha, xb, hb = (t.contiguous() for t in (a.x, a.h, b.x, b.h))
    forward = permutations.cpu().contiguous()
    inverse = torch.argsort(forward, 1).contiguous()
    n = xa.shape[1]

    def rows(start: int, stop: int) -> None:
        code.gdml_blocks(
            stop - start,
            len(xb),
            n,
            len(forward),
            *(t.data_ptr() for t in (xa[start:stop], ha[start:stop], xb, hb, forward, inverse)),
            sigma,
            out[start:stop].data_ptr(),
            *out.stride()[:3],
        )

    threads = min(torch.get_num_threads(), len(xa))
    edges = [len(xa) * k // threads for k in range(threads + 1)] if threads else []
    if threads == 1:
        rows(0, len(xa))
    elif threads:
        # ctypes releases the interpreter lock
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(rows, edges[:-1], edges[1:]))
