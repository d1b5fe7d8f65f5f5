"""loss -> one compiled graph of the loss and all its parameter gradients, second derivatives included.

torch.compile cannot differentiate a compiled graph twice, and a traced energy-and-forces graph that is differentiated
afterwards silently loses second-order terms. Here the derivative is taken *inside* the trace: make_fx records loss,
forces and parameter gradients as one list of operations, which is then compiled like an inference graph.

The compiler of torch 2.13 makes wrong derivatives of some networks. So gradients are compared with eager ones before a
graph is used, also at parameters that were moved at random: where a network starts, whole branches are multiplied by
zero, and what is wrong in them would not show. They are compared again while the training goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_mlff.training.batching import LabelledBatch
from openmm_mlff.training.losses import TERMS, Labels

#: largest relative difference (2-norm) between a compiled and an eager gradient that is accepted, by precision
TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-9}
#: parameters are moved by this part of their size before gradients are compared
MOVED = 0.1
#: kinds of batches that get a graph of their own; each takes minutes to compile
MAX_KINDS = 2

#: (model, batch with labels, weights) -> (loss, unweighted terms)
LossFunction = Callable[[Any, LabelledBatch, Tensor], tuple[Tensor, Tensor]]


class StoredGradients(torch.autograd.Function):
    """A loss whose gradients with respect to the parameters are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        return None, None, *(outputs[0] * g for g in ctx.saved_tensors)


class _Wrapped(nn.Module):
    """Makes a loss callable by `functional_call`, which replaces the parameters of `model`."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, labelled: LabelledBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(self.model, labelled, weights)


class CompiledLoss:
    """Stands in for an eager loss; batches of kinds that cannot be compiled run eagerly, with one warning.

    The result's `backward` hands over gradients that were computed together with the loss.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, backend: str = "inductor") -> None:
        self._backend = backend
        self._wrapped = _Wrapped(model, loss)
        self._loss = loss
        self._names = [name for name, p in self._wrapped.named_parameters() if p.requires_grad]
        self._graphs: dict[Any, Callable[..., list[Tensor]] | None] = {}
        self._steps: dict[Any, Callable[..., list[Tensor]]] = {}
        self._calls: dict[Any, int] = {}
        self._warned = False

    def __call__(self, model: Any, labelled: LabelledBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (its `backward` gives the parameters' gradients) and the unweighted terms."""
        key = (labelled.kind, tuple(getattr(labelled.labels, n) is None for n in TERMS))
        if labelled.kind is not None and key not in self._graphs and len(self._graphs) < MAX_KINDS:
            self._graphs[key] = self._build(key, labelled, weights)
        graph = self._graphs.get(key)
        if graph is None:
            if not self._warned and key not in self._graphs:
                self._warn(f"structures of too many kinds for compiled graphs (at most {MAX_KINDS})")
            return self._loss(model, labelled, weights)
        parameters = self._parameters()
        arguments = ([p.detach() for p in parameters], *_inputs(labelled), weights)
        with torch.no_grad():
            found = graph(*arguments)
        self._calls[key] = self._calls.get(key, 0) + 1
        if _is_due(self._calls[key]):
            expected = self._steps[key](*_differentiable(arguments))
            try:
                _compare(expected, found)
            except RuntimeError as error:
                self._warn(f"{error} after {self._calls[key]} steps")
                self._graphs[key] = None
                found = expected
        loss, terms, *gradients = found
        return StoredGradients.apply(loss, tuple(gradients), *parameters), terms

    def _parameters(self) -> list[Tensor]:
        found = dict(self._wrapped.named_parameters())
        return [found[name] for name in self._names]

    def _warn(self, reason: str) -> None:
        self._warned = True
        warnings.warn(f"training runs without a compiled graph: {reason}", stacklevel=3)

    def _build(self, key: Any, labelled: LabelledBatch, weights: Tensor) -> Callable[..., list[Tensor]] | None:
        """Trace, compile, and compare with eager gradients; None (and a warning) if any of it fails."""
        skeleton, present = labelled.batch, [getattr(labelled.labels, n) is not None for n in TERMS]

        def step(parameters: list[Tensor], positions: Tensor, labels: list[Tensor], weights: Tensor) -> list[Tensor]:
            given = iter(labels)
            filled = Labels(*(next(given) if p else None for p in present))
            at = LabelledBatch(skeleton.at(positions, skeleton.cell), filled, labelled.kind)
            named = dict(zip(self._names, parameters, strict=True))
            loss, terms = functional_call(self._wrapped, named, (at, weights))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            full = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
            return [loss.detach(), terms, *full]

        own = [p.detach() for p in self._parameters()]
        inputs = (*_inputs(labelled), weights)
        try:
            graph = make_fx(step)(*_differentiable((own, *inputs)))
            if any("bernoulli" in str(node.target) or "rand" in str(node.target) for node in graph.graph.nodes):
                raise RuntimeError("the loss draws random numbers (dropout)")
            with torch.no_grad():
                compiled = torch.compile(graph, dynamic=False, backend=self._backend)
            for parameters in (own, _moved(own)):
                expected = step(*_differentiable((parameters, *inputs)))
                with torch.no_grad():
                    found = compiled(parameters, *inputs)
                # moved parameters may lie where the loss has no value
                if parameters is own or all(bool(torch.isfinite(x).all()) for x in expected):
                    _compare(expected, found)
        except Exception as error:
            self._warn(" ".join(str(error).split())[:300] or type(error).__name__)
            return None
        self._steps[key] = step
        return compiled


def _is_due(call: int) -> bool:
    """10, 100, 1000, and every thousandth call."""
    return call in (10, 100) or call % 1000 == 0


def _differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Parameters and positions (of parameters, positions, labels, weights) as leaves of a graph."""
    parameters, positions, *rest = arguments
    leaves = [p.detach().requires_grad_(True) for p in parameters]
    return leaves, positions.detach().requires_grad_(True), *rest


def _moved(parameters: list[Tensor]) -> list[Tensor]:
    """Parameters of which none is zero, by random numbers of their own."""
    generator = torch.Generator().manual_seed(0)
    moved = []
    for p in parameters:
        size = max(float(p.square().mean().sqrt()), p.shape[-1] ** -0.5 if p.dim() else 0.0)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        moved.append(p + (MOVED * size * noise).to(dtype=p.dtype, device=p.device))
    return moved


def _inputs(labelled: LabelledBatch) -> tuple[Tensor, list[Tensor]]:
    labels = [getattr(labelled.labels, n) for n in TERMS]
    return labelled.batch.positions.detach(), [x for x in labels if x is not None]


def _compare(expected: list[Tensor], found: list[Tensor]) -> None:
    """Raise `RuntimeError` unless loss and gradients agree (tiny gradients are measured against the largest)."""
    # of the gradients: the loss is a sum in float64 whatever the precision
    tolerance = TOLERANCE.get(expected[2].dtype, TOLERANCE[torch.float32])
    largest = max(float(x.norm()) for x in expected[2:])
    for a, b in zip(expected, found, strict=True):
        error = float((a - b).norm()) / max(float(a.norm()), 1e-3 * largest, 1e-12)
        if not error <= tolerance:
            raise RuntimeError(f"compiled and eager gradients differ by {error:.1e}")
