"""Descriptors: what two geometries are compared by. Inverse distances in closed form, and a registry for any other.

A descriptor is a function ``f(positions (..., N, 3) float64, **options) -> (..., D)`` of differentiable torch code.
Pairs (i, j), i > j, are in the order of ``numpy.tril_indices(N, -1)``: (1,0), (2,0), (2,1), (3,0), ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_mlff._plugins import load, near, registered

INVERSE_DISTANCES = "inverse_distances"
#: installed packages name descriptors of their own in this group of entry points
ENTRY_POINTS = "openmm_gdml.descriptors"
Descriptor = Callable[..., Tensor]
#: what `pair_gradients` is to `inverse_distances`: x ``(..., D)`` and the compressed Jacobian g ``(..., D, 3)``
Gradients = Callable[..., tuple[Tensor, Tensor]]

_registry: dict[str, Descriptor] = {}
_gradients: dict[str, Gradients] = {}


def register(name: str, function: Descriptor, gradients: Gradients | None = None) -> Descriptor:
    """Make a descriptor known under a name, which model files carry; returns the function.

    Args:
        gradients: of a descriptor with one component for every pair of atoms, which depends on r_i - r_j alone: the
            same keywords -> x and g = -dx_k/dr_i, which puts it on the fast path of inverse distances.

    Raises `ValueError` if the name belongs to another function.
    """
    if _registry.setdefault(name, function) is not function:
        raise ValueError(f"name: the descriptor {name!r} is registered already")
    if gradients is not None:
        _gradients[name] = gradients
    return function


def gradients_of(name: str, options: Mapping[str, Any] | None = None) -> Gradients | None:
    """The closed-form gradients of a pair descriptor with its options bound; None for any other descriptor."""
    found = _gradients.get(name)
    return functools.partial(found, **options) if found is not None and options else found


def descriptor(name: str, options: Mapping[str, Any] | None = None) -> Descriptor:
    """The descriptor of a name with its options bound: one of this package, a registered one, or an entry point.

    Raises `ValueError` naming what is known, and how a descriptor of one's own becomes so.
    """
    if name not in _registry and name in registered(ENTRY_POINTS):
        register(name, load(ENTRY_POINTS, name))
    if name not in _registry:
        raise ValueError(
            f"descriptor: no descriptor is called {name!r} ({near(name, _registry)}). A model file holds only the "
            "name: before it is loaded, import the module that calls openmm_gdml.descriptors.register with name and "
            f"function, or install a package with an entry point of that name in the group {ENTRY_POINTS!r}"
        )
    return functools.partial(_registry[name], **options) if options else _registry[name]


def name_of(function: Descriptor | str) -> str:
    """The name under which a descriptor is registered; a named function that is not yet is registered by its name.

    Raises `ValueError` for a function without a name of its own, or whose name belongs to another one.
    """
    if isinstance(function, str):
        return function
    known = [name for name, other in _registry.items() if other is function]
    if known:
        return known[0]
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise ValueError(
            f"descriptor: expected the name of a descriptor or a function with a name, got {function!r}; give it one "
            "with openmm_gdml.descriptors.register"
        )
    register(name, function)
    return name


def takes(function: Descriptor, keyword: str) -> bool:
    """Whether a descriptor has an option of this name."""
    try:
        return keyword in inspect.signature(function).parameters
    except ValueError:  # functions of C++ have no signature
        return False


def descriptor_size(name: str, n_atoms: int, options: Mapping[str, Any] | None = None) -> int:
    """Number D of components that a descriptor has for `n_atoms` atoms."""
    if name in _gradients:
        return n_atoms * (n_atoms - 1) // 2
    somewhere = torch.from_numpy(np.random.default_rng(0).normal(scale=2.0, size=(n_atoms, 3)))
    return int(descriptor(name, options)(somewhere).shape[-1])


@functools.lru_cache(maxsize=64)
def pair_indices(n_atoms: int) -> tuple[Tensor, Tensor]:
    """Atoms i and j of every pair, ``(D,)`` int64 each."""
    i, j = np.tril_indices(n_atoms, -1)
    return torch.from_numpy(i.astype(np.int64)), torch.from_numpy(j.astype(np.int64))


def pair_vectors(positions: Tensor, lattice: Tensor | None = None) -> Tensor:
    """r_i - r_j of every pair, ``(..., D, 3)``.

    With a lattice (rows are lattice vectors, ``(3, 3)`` or ``(..., 3, 3)``) every vector v becomes
    v - round(v L^-1) L: fractions are rounded to [-1/2, 1/2], which in skewed cells is not the shortest image.
    """
    i, j = (index.to(positions.device) for index in pair_indices(positions.shape[-2]))
    vectors = positions[..., i, :] - positions[..., j, :]
    if lattice is None:
        return vectors
    lattice = lattice.to(vectors)
    with torch.no_grad():
        shift = torch.round(vectors @ torch.linalg.inv(lattice))
    return vectors - shift @ lattice


def inverse_distances(positions: Tensor, lattice: Tensor | None = None) -> Tensor:
    """x_k = 1/|r_i - r_j| for every pair, ``(..., N, 3)`` angstrom -> ``(..., D)`` 1/angstrom.

    Chmiela et al., Sci. Adv. 3, e1603015 (2017), eq. 3; periodic: Sauceda et al., Nat. Commun. 13, 3733 (2022), eq. 3.
    """
    return pair_vectors(positions, lattice).square().sum(-1).rsqrt()


def pair_gradients(positions: Tensor, lattice: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inverse distances x ``(..., D)`` and their compressed Jacobian g = (r_i - r_j)/|r_ij|^3 ``(..., D, 3)``.

    dx_k/dr_i = -g_k and dx_k/dr_j = +g_k; all other derivatives are zero.
    """
    vectors = pair_vectors(positions, lattice)
    x = vectors.square().sum(-1).rsqrt()
    return x, vectors * (x * x * x)[..., None]


def times_jacobian(g: Tensor, v: Tensor) -> Tensor:
    """J v: ``g (..., D, 3)``, ``v (..., N, 3)`` -> ``(..., D)``, (J v)_k = g_k . (v_j - v_i)."""
    i, j = (index.to(v.device) for index in pair_indices(v.shape[-2]))
    return (g * (v[..., j, :] - v[..., i, :])).sum(-1)


def times_jacobian_transposed(g: Tensor, w: Tensor, n_atoms: int) -> Tensor:
    """J^T w: ``g (..., D, 3)``, ``w (..., D)`` -> ``(..., N, 3)``; atom j gets +g_k w_k and atom i gets -g_k w_k."""
    i, j = (index.to(w.device) for index in pair_indices(n_atoms))
    gw = g * w[..., None]
    result = gw.new_zeros(*gw.shape[:-2], n_atoms, 3)
    return result.index_add(-2, j, gw).index_add(-2, i, gw, alpha=-1)


def pair_permutations(permutations: Tensor) -> Tensor:
    """Permutations of atoms ``(S, N)`` as permutations of pairs ``(S, D)``: (P x)_(i,j) = x_(p_i, p_j)."""
    permutations = torch.as_tensor(permutations)
    i, j = (index.to(permutations.device) for index in pair_indices(permutations.shape[1]))
    a, b = permutations[:, i], permutations[:, j]
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return high * (high - 1) // 2 + low


register(INVERSE_DISTANCES, inverse_distances, pair_gradients)
