"""several devices -> one gradient: what a training run by more than one process needs, on Lightning Fabric.

Fabric starts this program once for each device (or finds out that ``torchrun`` has), and the processes find one
another. Each computes loss and gradients of its part of a batch; the parts are added up with the weights of their
numbers of structures, as `parallel.ParallelLoss` does with processes of one machine. So every process makes the same
step, and only the first one writes files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Team:
    """The processes of a run; one alone is a team too.

    Attributes:
        fabric: Lightning Fabric, launched. rank: of this process, from 0. size: how many there are.
        device: of this process.
    """

    def __init__(self, fabric: Any) -> None:
        self.fabric = fabric
        self.rank, self.size = int(fabric.global_rank), int(fabric.world_size)
        self.device: torch.device = fabric.device

    @classmethod
    def of(cls, accelerator: str, devices: int = 1) -> Team:
        """Start or join the team.

        Args:
            accelerator: of Lightning Fabric: "cpu", "cuda" or "auto".
            devices: processes on this machine; under ``torchrun``, as many as it starts here.

        Raises `ImportError` without Lightning Fabric, and `ValueError` for fewer devices than one.
        """
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise ImportError(
                f"training needs the package lightning-fabric ({error}); install it with: "
                "pip install 'openmm-mlff[train]'"
            ) from error
        if devices < 1:
            raise ValueError(f"devices: expected at least 1, got {devices}")
        fabric = Fabric(accelerator=accelerator, devices=devices, strategy="ddp" if devices > 1 else "auto")
        if devices > 1:
            fabric.launch()
        return cls(fabric)

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process runs the block before the others do."""
        if self.rank > 0:
            self.fabric.barrier()
        yield
        if self.rank == 0 and self.size > 1:
            self.fabric.barrier()

    def any(self, condition: bool) -> bool:
        """Whether it holds in any process."""
        if self.size == 1:
            return condition
        return bool(self._sum(torch.tensor([float(condition)], device=self.device)) > 0)

    def add_up(self, share: float, parameters: Sequence[Tensor], values: Tensor) -> Tensor:
        """Weight the gradients of `parameters` (in place) and `values` by `share` and add them up over all processes.

        Gradients that are None count as zero.
        """
        if self.size == 1:
            return values
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients] + [values.to(gradients[0].dtype)]) * share
        flat = self._sum(flat)
        pieces = flat.split([p.numel() for p in parameters] + [len(values)])
        for parameter, piece in zip(parameters, pieces[:-1], strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        return pieces[-1]

    def _sum(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values
