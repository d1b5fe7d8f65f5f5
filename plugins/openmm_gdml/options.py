"""Options of ``openmm-mlff train --family gdml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openmm_gdml.descriptors import INVERSE_DISTANCES


@dataclass(frozen=True)
class GDMLOptions:
    """Options of the trainer, as they stand in a recipe's ``[trainer]``.

    Attributes:
        n_train, n_valid: geometries to take from the training and validation splits, spread over the energies; None
            takes all of the training split, and up to 1000 for validation.
        sigma, lam: one value, or several to choose from by the force error on the validation geometries.
        permutations: ``auto`` (from bonds; of crystals, ``full``), ``matching`` (of geometries), ``none``, or, of
            crystals, ``full`` or ``translations``; or the permutations themselves, one list of atoms each.
        mobile: atoms of a crystal that hop between sites (see `crystals`).
        the others: as in `training.GDML`.
    """

    n_train: int | None = None
    n_valid: int | None = None
    sigma: float | Sequence[float] = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0)
    lam: float | Sequence[float] = 1e-10
    permutations: str | Sequence[Sequence[int]] = "auto"
    mobile: Sequence[int] = ()
    energy_constraints: bool = False
    solver: str = "auto"
    preconditioner: str = "leverage"
    columns: int | float | None = None
    memory: str | int | float | None = None
    tolerance: float = 1e-4
    descriptor: str = INVERSE_DISTANCES
    descriptor_options: Mapping[str, Any] = field(default_factory=dict)
    keep_alphas: bool = False

    def __post_init__(self) -> None:
        for name, least in (("n_train", 2), ("n_valid", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least} geometries, got {value}")
