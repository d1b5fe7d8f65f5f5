"""Energy and forces of a model with a descriptor of any kind as one compiled graph (`potentials.compile`).

Op by op, a descriptor and its pull-back are some fifty small operations, which take longer than what they compute.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.potentials.compile import CompiledGraph, GraphInputs, compiler_found

if TYPE_CHECKING:
    from openmm_gdml.model import GDMLPotential

logger = logging.getLogger(__name__)


class DescriptorGraph(CompiledGraph):
    """A compiled graph whose file also depends on what the descriptor computes, wherever its function comes from."""

    def key(self, inputs: GraphInputs) -> str:
        model: Any = self.model
        return hashlib.sha256(super().key(inputs).encode() + recorded(model)).hexdigest()


def recorded(model: GDMLPotential) -> bytes:
    """The operations of the model's descriptor with their constants."""
    from torch.fx.experimental.proxy_tensor import make_fx

    shape = (1, len(model.config.numbers), 3)
    somewhere = torch.from_numpy(np.random.default_rng(0).normal(scale=2.0, size=shape))
    graph = make_fx(lambda r: model.describe(r, None))(somewhere)
    constants = {name: getattr(graph, name) for name in dir(graph) if name.startswith("_tensor_constant")}
    text = graph.code.encode()
    for name in sorted(constants):
        value = constants[name].detach().cpu()
        text += name.encode() + str((value.dtype, value.shape)).encode() + value.contiguous().numpy().tobytes()
    return text


class CompiledCopies:
    """``f(copies (n, N, 3)) -> energies (n,), forces (n, N, 3)`` of an open model, as a compiled graph.

    Raises `RuntimeError` if there is none and none can be made.
    """

    def __init__(self, model: GDMLPotential, copies: np.ndarray) -> None:
        self._batch = model.batch([model.structure(r) for r in copies])
        self._graph = DescriptorGraph(model, None, ("energy", "forces"), fixed_pairs=True)

    def ready(self) -> bool:
        """Whether the disk has it."""
        return self._graph.ready(self._batch)

    def __call__(self, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions: Tensor = torch.from_numpy(copies).reshape(-1, 3)
        result = self._graph(self._batch.at(positions))
        assert result.forces is not None
        return result.energy.numpy(), result.forces.numpy().reshape(copies.shape)


def compiled_copies(model: GDMLPotential, copies: np.ndarray, compile: bool | str) -> CompiledCopies | None:
    """The graph for copies at these positions, or None with one line that says why.

    Args:
        compile: True makes it if it is not there yet (half a minute), 'auto' takes what is there.
    """
    if model.config.periodic or model.device.type != "cpu":
        return None
    run = CompiledCopies(model, copies)
    try:
        ready = run.ready()
        if compile == "auto" and not ready:
            _suggest()
            return None
        if not ready and not compiler_found():
            logger.warning("compile: no C++ compiler found (g++ or clang++); running the descriptor op by op")
            return None
        run(copies)
    except RuntimeError as error:
        logger.warning("compile: %s; running the descriptor op by op", str(error).removeprefix("compile: "))
        return None
    return run


@functools.cache
def _suggest() -> None:
    """Once per process."""
    logger.warning(
        "the descriptor of the GDML model runs op by op; for long runs, compile=True makes a graph once (half a "
        "minute) that is several times faster, here and in later runs"
    )
