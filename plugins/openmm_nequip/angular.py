"""Spherical harmonics, their Clebsch-Gordan coefficients, and the paths of tensor products.

The convention is e3nn's: component normalisation (the squares of the 2l+1 functions sum to 2l+1), y as the polar axis,
so that the components of degree 1 are x, y, z.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from openmm_nequip.config import NequIPConfig

# -- harmonics and coefficients --------------------------------------------------------------------------------------


def spherical_harmonics(u: Tensor, max_degree: int) -> list[Tensor]:
    """Y_l of unit vectors ``(..., 3)`` for l = 0..max_degree (at most 2): tensors ``(..., 2l+1)``."""
    x, y, z = u.unbind(-1)
    of_degree = [
        lambda: torch.ones_like(x)[..., None],
        lambda: math.sqrt(3.0) * u,
        lambda: torch.stack(
            [
                math.sqrt(15.0) * x * z,
                math.sqrt(15.0) * x * y,
                math.sqrt(5.0) * (y * y - 0.5 * (x * x + z * z)),
                math.sqrt(15.0) * y * z,
                0.5 * math.sqrt(15.0) * (z * z - x * x),
            ],
            -1,
        ),
    ]
    return [harmonics() for harmonics in of_degree[: max_degree + 1]]


def _su2_coefficient(l1: int, m1: int, l2: int, m2: int, l3: int) -> float:
    """<l1 m1 l2 m2 | l3 m1+m2>, Racah's formula (Condon-Shortley phases)."""
    m3 = m1 + m2
    if abs(m3) > l3:
        return 0.0
    f = math.factorial
    norm = Fraction((2 * l3 + 1) * f(l3 + l1 - l2) * f(l3 - l1 + l2) * f(l1 + l2 - l3), f(l1 + l2 + l3 + 1))
    norm *= f(l3 + m3) * f(l3 - m3) * f(l1 - m1) * f(l1 + m1) * f(l2 - m2) * f(l2 + m2)
    total = Fraction(0)
    for k in range(l1 + l2 - l3 + 1):
        others = (l1 + l2 - l3 - k, l1 - m1 - k, l2 + m2 - k, l3 - l2 + m1 + k, l3 - l1 - m2 + k)
        if min(others) >= 0:
            total += Fraction((-1) ** k, f(k) * math.prod(f(x) for x in others))
    return math.sqrt(norm) * float(total)


def _complex_of_real(degree: int) -> np.ndarray:
    """Unitary ``(2l+1, 2l+1)``: rows are complex harmonics m = -l..l, columns the real ones."""
    q = np.zeros((2 * degree + 1, 2 * degree + 1), dtype=np.complex128)
    q[degree, degree] = 1.0
    for m in range(1, degree + 1):
        q[degree - m, [degree + m, degree - m]] = np.array([1.0, -1j]) / math.sqrt(2.0)
        q[degree + m, [degree + m, degree - m]] = np.array([1.0, 1j]) * (-1) ** m / math.sqrt(2.0)
    return (-1j) ** degree * q


@functools.cache
def clebsch_gordan(l1: int, l2: int, l3: int) -> np.ndarray:
    """C ``(2 l1+1, 2 l2+1, 2 l3+1)`` for real harmonics: sum_ij C_ijk a_i b_j is of degree l3; sum C^2 = 1."""
    c = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    for m1 in range(-l1, l1 + 1):
        for m2 in range(-l2, l2 + 1):
            if abs(m1 + m2) <= l3:
                c[l1 + m1, l2 + m2, l3 + m1 + m2] = _su2_coefficient(l1, m1, l2, m2, l3)
    q1, q2, q3 = (_complex_of_real(degree) for degree in (l1, l2, l3))
    real = np.einsum("ai,bj,ck,abc->ijk", q1, q2, q3.conj(), c).real
    return np.asarray(real / np.linalg.norm(real))


# -- which products a network makes ----------------------------------------------------------------------------------


def degree_of(irrep: str) -> int:
    return int(irrep[:-1])


@dataclass(frozen=True)
class Path:
    """One product of features and harmonics: source (x) Y_degree -> target.

    Attributes:
        slot: which block of the radial network's output weighs it, among the products that the irreps allow.
    """

    slot: int
    source: str
    degree: int
    target: str

    @property
    def kind(self) -> tuple[int, int, int]:
        """The degrees of the three."""
        return degree_of(self.source), self.degree, degree_of(self.target)


@dataclass(frozen=True)
class Plan:
    """What one convolution computes.

    Attributes:
        inputs: irreps that the features before it have, in the order of the configuration. outputs: those after it,
            as far as the energy depends on them. gated: the outputs of degree 1 or more.
        paths: products that lead to the outputs.
        num_slots: products that the irreps allow, those of absent features included.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    paths: tuple[Path, ...]
    num_slots: int

    @property
    def gated(self) -> tuple[str, ...]:
        return tuple(x for x in self.outputs if degree_of(x) > 0)

    @property
    def sources(self) -> tuple[str, ...]:
        """Inputs that some path starts from."""
        used = {p.source for p in self.paths}
        return tuple(x for x in self.inputs if x in used)

    def into(self, target: str) -> tuple[Path, ...]:
        return tuple(p for p in self.paths if p.target == target)


def allowed_paths(config: NequIPConfig) -> list[Path]:
    """Every product of hidden features and harmonics that ends in a hidden irrep, in the order of the weights."""
    found: list[Path] = []
    for source in config.irreps:
        for degree in range(config.max_degree + 1):
            parity = "e" if (source[-1] == "e") == (degree % 2 == 0) else "o"
            first = degree_of(source)
            for target in range(abs(first - degree), first + degree + 1):
                if f"{target}{parity}" in config.irreps:
                    found.append(Path(len(found), source, degree, f"{target}{parity}"))
    return found


def plans(config: NequIPConfig) -> list[Plan]:
    """What each layer has to compute.

    Features start as scalars, so the first layers lack some irreps; the energy is read from scalars, so the last layers
    leave out what cannot reach it (NequIP's own program computes that and throws it away).
    """
    everything = allowed_paths(config)
    inputs: tuple[str, ...] = ("0e",)
    forward: list[Plan] = []
    for _ in range(config.num_layers):
        paths = tuple(p for p in everything if p.source in inputs)
        reached = {p.target for p in paths} | set(inputs)
        outputs = tuple(x for x in config.irreps if x in reached)
        forward.append(Plan(inputs, outputs, paths, len(everything)))
        inputs = outputs
    found: list[Plan] = []
    needed = {"0e"}
    for plan in reversed(forward):
        outputs = tuple(x for x in plan.outputs if x in needed)
        paths = tuple(p for p in plan.paths if p.target in needed)
        needed = {p.source for p in paths} | {x for x in outputs if x in plan.inputs}
        found.append(Plan(tuple(x for x in plan.inputs if x in needed), outputs, paths, plan.num_slots))
    return found[::-1]
