"""one batch -> parts of it in several processes -> one gradient.

Small networks gain little from more threads and much from more processes: each computes loss and gradients of its
part of the batch with one thread, and this process adds them up in a fixed order, so that results do not depend on
which process was faster. Parameters and gradients travel through shared memory.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from openmm_mlff.training.batching import LabelledSet
from openmm_mlff.training.compiled_loss import CompiledLoss, LossFunction, StoredGradients


def make_loss(model: Any, loss: LossFunction, compiled: bool) -> LossFunction:
    """The loss itself, or a compiled graph of it."""
    return CompiledLoss(model, loss) if compiled else loss


class ParallelLoss:
    """Loss and gradients of a batch by `processes` processes, this one included.

    A batch's loss is the mean of its parts' losses, weighted by their numbers of structures.

    Args:
        model: on the CPU. data: what batches are taken from. loss: a top-level function.
    """

    def __init__(self, model: nn.Module, data: LabelledSet, loss: LossFunction, processes: int, compiled: bool) -> None:
        if processes < 2:
            raise ValueError(f"processes: expected at least 2, got {processes}")
        self._model, self._data = model, data
        self._loss = make_loss(model, loss, compiled)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        flat = parameters_to_vector([p.detach() for p in self._parameters])
        self._shared = flat.clone().share_memory_()
        self._gradients = torch.zeros(processes - 1, len(flat), dtype=flat.dtype).share_memory_()
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._workers = []
        for rank in range(processes - 1):
            ours, theirs = context.Pipe()
            arguments = (theirs, model, data.structures, loss, compiled, self._shared, self._gradients[rank])
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            self._connections.append(ours)
            self._workers.append(worker)

    def __call__(self, model: Any, indices: np.ndarray, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (its `backward` gives the parameters' gradients) and the unweighted terms.

        Raises `RuntimeError` with the worker's traceback if a part failed, or if a worker died.
        """
        parts = self._data.share(indices, len(self._connections) + 1)
        self._shared.copy_(parameters_to_vector([p.detach() for p in self._parameters]))
        # random numbers of the workers (dropout) follow from this process's, which checkpoints keep
        seeds = torch.randint(2**31, (len(self._connections),)).tolist()
        busy = [k for k, part in enumerate(parts[1:]) if len(part)]
        for k in busy:
            # plain lists: a tensor would be handed over through a server thread, which takes longer than a step
            self._send(k, (parts[1 + k].tolist(), weights.tolist(), seeds[k]))
        share = len(parts[0]) / len(indices)
        own, terms = self._loss(model, self._data.batch(parts[0]), weights)
        gradients = torch.autograd.grad(own, self._parameters, allow_unused=True)
        total, terms = share * own.detach(), share * terms
        flat = share * _flattened(gradients, self._parameters)
        for k in busy:
            share = len(parts[1 + k]) / len(indices)
            part_loss, part_terms = self._receive(k)
            total, terms = total + share * part_loss, terms + share * torch.tensor(part_terms, dtype=terms.dtype)
            flat += share * self._gradients[k]
        pieces = flat.split([p.numel() for p in self._parameters])
        shaped = tuple(g.view_as(p) for g, p in zip(pieces, self._parameters, strict=True))
        return StoredGradients.apply(total, shaped, *self._parameters), terms

    def close(self) -> None:
        """End the worker processes."""
        for connection in self._connections:
            connection.close()
        for worker in self._workers:
            worker.join(timeout=10)
            if worker.is_alive():
                worker.terminate()

    def _send(self, k: int, message: Any) -> None:
        try:
            self._connections[k].send(message)
        except (BrokenPipeError, OSError) as error:
            raise RuntimeError(f"training process {k + 1} died (out of memory, or a crash); resume the run") from error

    def _receive(self, k: int) -> tuple[float, list[float]]:
        try:
            reply = self._connections[k].recv()
        except EOFError as error:
            raise RuntimeError(f"training process {k + 1} died (out of memory, or a crash); resume the run") from error
        if isinstance(reply, str):
            raise RuntimeError(f"training process {k + 1} failed:\n{reply}")
        loss, terms = reply
        return loss, terms


def _flattened(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [
            torch.zeros_like(p).view(-1) if g is None else g.reshape(-1)
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )


def _work(
    connection: Connection,
    model: nn.Module,
    structures: Sequence[Any],
    loss: Callable[..., tuple[Tensor, Tensor]],
    compiled: bool,
    shared: Tensor,
    gradients: Tensor,
) -> None:
    """A worker: parameters from shared memory, part of a batch from the pipe, gradients into shared memory."""
    import traceback

    # Ctrl-C reaches the whole process group; the process that started this one decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    model.train()
    data = LabelledSet(structures, model)  # type: ignore[arg-type]
    function = make_loss(model, loss, compiled)
    parameters = [p for p in model.parameters() if p.requires_grad]
    while True:
        try:
            indices, weights, seed = connection.recv()
        except (EOFError, OSError):
            return
        try:
            torch.manual_seed(seed)
            with torch.no_grad():
                vector_to_parameters(shared.clone(), parameters)
            value, terms = function(model, data.batch(indices), torch.tensor(weights, dtype=data.dtype))
            gradients.copy_(_flattened(torch.autograd.grad(value, parameters, allow_unused=True), parameters))
            reply: Any = (float(value.detach()), terms.tolist())
        except Exception:
            reply = traceback.format_exc()
        try:
            connection.send(reply)
        except (BrokenPipeError, OSError):
            return
