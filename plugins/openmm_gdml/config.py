"""Hyperparameters of a GDML model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GDMLConfig:
    """What a GDML model is made for, and the sizes of its tensors.

    Attributes:
        numbers: atomic numbers in the order of the training data; of a coarse-grained model, bead types 1, 2, ...
        n_train: rows M of the expansion (training geometries, or inducing points of a reduced-rank model).
        sigma: length scale of the kernel in units of the descriptor (1/angstrom for inverse distances).
        n_permutations: permutations S of equal atoms, the identity included.
        descriptor: name in `descriptors`. descriptor_options: keywords that are passed to it.
        periodic: whether pair vectors are wrapped by a fixed lattice.
        lam: regularisation lambda that the model was trained with, for the record.
        energy_constraints: whether the expansion has terms for energies too.
        n_products: Hessian-vector products L among the training data, each a term of the expansion.
        keeps_alphas: whether the raw coefficients are kept (needed to train further).
        beads: bead names of a coarse-grained model.
        charge: total charge (e) of the training data, multiplicity: its 2S+1; None: not recorded, any is accepted.
    """

    numbers: tuple[int, ...]
    n_train: int
    sigma: float
    n_permutations: int = 1
    descriptor: str = "inverse_distances"
    descriptor_options: dict[str, Any] = field(default_factory=dict)
    periodic: bool = False
    lam: float | None = None
    energy_constraints: bool = False
    n_products: int = 0
    keeps_alphas: bool = False
    beads: tuple[str, ...] | None = None
    charge: int | None = None
    multiplicity: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", tuple(int(z) for z in self.numbers))
        if self.beads is not None:
            object.__setattr__(self, "beads", tuple(str(name) for name in self.beads))
            if len(self.beads) != len(self.numbers):
                raise ValueError(f"beads: expected {len(self.numbers)} names, got {len(self.beads)}")
        if len(self.numbers) < 2 or min(self.numbers) < 1:
            raise ValueError(f"numbers: expected at least two positive atomic numbers, got {self.numbers}")
        for name in ("n_train", "n_permutations"):
            if int(getattr(self, name)) != getattr(self, name) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")
        if int(self.n_products) != self.n_products or self.n_products < 0:
            raise ValueError(f"n_products: expected a whole number, got {self.n_products!r}")
        object.__setattr__(self, "sigma", float(self.sigma))
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma: expected a positive number, got {self.sigma!r}")
        if not isinstance(self.descriptor_options, Mapping):
            raise ValueError(f"descriptor_options: expected keywords and values, got {self.descriptor_options!r}")
        object.__setattr__(self, "descriptor_options", dict(self.descriptor_options))
