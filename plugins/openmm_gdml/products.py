"""Labels that are Hessian-vector products: what second derivatives are known of the training geometries.

A structure carries them as ``info["hessian_products"] = [(v, Hv), ...]``: directions v ``(N, 3)`` and products H v
``(N, 3)`` in eV/angstrom^2 times v, with H = d^2E/dR^2, so that H v is minus the change of the forces along v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Potential

KEY = "hessian_products"


@dataclass(frozen=True)
class ProductLabels:
    """Hessian-vector products of a training set.

    Attributes:
        at: which geometry each belongs to, ``(L,)``. directions: v, ``(L, N, 3)``. products: H v, ``(L, N, 3)``.
    """

    at: Tensor
    directions: Tensor
    products: Tensor

    @classmethod
    def of(cls, structures: Sequence[Structure]) -> ProductLabels | None:
        """Those of all structures, None if there are none; raises `ValueError` naming a structure with wrong ones."""
        at, directions, products = [], [], []
        for k, structure in enumerate(structures):
            for pair in structure.info.get(KEY, ()):
                v, hv = (np.asarray(x, dtype=np.float64) for x in _pair(pair, k))
                for name, x in (("direction", v), ("product", hv)):
                    if x.shape != structure.positions.shape or not np.isfinite(x).all():
                        raise ValueError(
                            f"{KEY}: expected a finite {name} of shape {structure.positions.shape}, structure {k} has "
                            f"{x.shape if x.shape != structure.positions.shape else 'NaN or infinity'}"
                        )
                if not np.abs(v).max() > 0:
                    raise ValueError(f"{KEY}: expected directions that are not zero, structure {k} has one")
                at.append(k)
                directions.append(v)
                products.append(hv)
        if not at:
            return None
        return cls(torch.tensor(at), torch.from_numpy(np.stack(directions)), torch.from_numpy(np.stack(products)))


def _pair(pair: Sequence[object], k: int) -> Sequence[object]:
    if len(pair) != 2:
        raise ValueError(f"{KEY}: expected pairs of a direction and a product, structure {k} has {len(pair)} arrays")
    return pair


def with_products(structure: Structure, directions: np.ndarray, reference: Potential) -> Structure:
    """The structure with Hessian-vector products of a reference potential along directions ``(k, N, 3)``."""
    products = reference.hessian_products(structure, directions)
    pairs = [(v, hv) for v, hv in zip(np.asarray(directions, dtype=np.float64), products, strict=True)]
    return structure.replace(info={**structure.info, KEY: pairs})
