"""The kernel matrix of any descriptor against differentiation of the plain formula, and against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from openmm_gdml.algorithmic import AlgorithmicOperator
from openmm_gdml.descriptors import inverse_distances
from openmm_gdml.differentiation import batched
from openmm_gdml.operators import KernelOperator

SIGMA = 1.3
PERMUTATIONS = np.array([[0, 1, 2, 3], [0, 2, 1, 3]])
AT = [0, 0, 2, 1]
ROWS = [("force", i) for i in range(3)] + [("energy", i) for i in range(3)] + [("product", i) for i in range(4)]
START = np.cumsum([0] + [12] * 3 + [1] * 3 + [12] * 4)


def geometries(n: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    shape = np.array([[0, 0, 0], [1.1, 0, 0], [0, 1.2, 0], [0.3, 0.4, 1.5]])
    return shape + random.normal(0, 0.1, (n, 4, 3))


def plain_kernel(r: Tensor, other: Tensor) -> Tensor:
    """sum over permutations of (1 + d + d^2/3) e^-d, as it is written."""
    x, y = inverse_distances(r), inverse_distances(other[torch.from_numpy(PERMUTATIONS)])
    d = (5 * ((x - y) ** 2).sum(-1)).sqrt() / SIGMA
    return ((1 + d + d * d / 3) * torch.exp(-d)).sum()


@pytest.fixture(scope="module")
def operator() -> AlgorithmicOperator:
    directions = np.random.default_rng(1).normal(size=(4, 4, 3))
    return AlgorithmicOperator(geometries(3), SIGMA, inverse_distances, PERMUTATIONS, True, directions, AT)


def observed(
    operator: AlgorithmicOperator, kind: str, i: int, surface: Callable[[Tensor], Tensor], r: Tensor
) -> Tensor:
    """What is observed of an energy surface at a geometry."""
    if kind == "energy":
        return surface(r)[None]
    if kind == "force":
        return -grad(surface)(r).flatten()
    return jvp(grad(surface), (r,), (operator.directions[i],))[1].flatten()


def test_blocks_are_derivatives_of_the_kernel(operator: AlgorithmicOperator) -> None:
    """Every kind of block between different geometries, by differentiating the written formula up to four times."""
    k = operator.dense()
    for (a, (kind, i)), (b, (other, j)) in product(enumerate(ROWS), enumerate(ROWS)):
        at = operator.point(int(START[a])), operator.point(int(START[b]))
        if at[0] == at[1]:
            continue
        r, s = operator.positions[at[0]], operator.positions[at[1]]

        def column(x: Tensor, component: int, other: str = other, j: int = j, s: Tensor = s) -> Tensor:
            return observed(operator, other, j, lambda y: plain_kernel(x, y), s)[component]

        width = int(START[b + 1] - START[b])
        block = torch.stack(
            [observed(operator, kind, i, lambda x, c=c: column(x, c), r) for c in range(width)],
            1,  # type: ignore[misc]
        )
        assert torch.allclose(k[START[a] : START[a + 1], START[b] : START[b + 1]], block, rtol=1e-9, atol=1e-10)


def test_no_singularity_at_one_geometry() -> None:
    """The block of a geometry with itself is the limit of that with a very near one, and everything is p.s.d."""
    r, near = geometries(1), geometries(1) + 1e-6 * geometries(1, seed=3)
    directions = np.random.default_rng(1).normal(size=(2, 4, 3))
    directions[1] = directions[0]
    two = AlgorithmicOperator(np.concatenate([r, near]), SIGMA, inverse_distances, None, True, directions, [0, 1])
    k = two.dense()
    assert bool(torch.isfinite(k).all())
    for start in (0, 26):
        one, both = k[start : start + 12, start : start + 12], k[start : start + 12, start + 12 : start + 24]
        assert float(one.abs().max()) > 0.5
        assert torch.allclose(one, both, rtol=1e-4, atol=1e-4)
    assert float(torch.linalg.eigvalsh(k)[0]) > -1e-11 * float(k.abs().max())


def test_products_with_the_matrix(operator: AlgorithmicOperator) -> None:
    """Without and with the matrix: two derivations, one through predictions, one through blocks."""
    k = operator.dense()
    v = torch.from_numpy(np.random.default_rng(2).normal(size=operator.n))
    assert torch.allclose(operator.matvec(v), k @ v, rtol=1e-10, atol=1e-10)
    assert torch.allclose(operator.diagonal(), k.diagonal(), rtol=1e-12)
    some = np.random.default_rng(3).permutation(operator.n)[:25]
    assert torch.allclose(operator.columns(some), k[:, some], rtol=1e-12, atol=1e-13)
    assert torch.allclose(k, k.T, atol=1e-12)


def test_closed_form_of_inverse_distances(operator: AlgorithmicOperator) -> None:
    closed = KernelOperator(geometries(3), SIGMA, PERMUTATIONS, energies=True).dense()
    n = len(closed)
    assert torch.allclose(operator.dense()[:n, :n], closed, rtol=0, atol=1e-13)


def test_a_descriptor_of_one_geometry_is_mapped() -> None:
    def lengths(r: Tensor) -> Tensor:
        return torch.stack([(r[1] - r[0]).norm(), (r[2] - r[0]).norm()])

    r = torch.from_numpy(geometries(3))
    f = batched(lengths, r)
    assert torch.equal(f(r[None]), torch.stack([lengths(x) for x in r])[None])
    with pytest.raises(ValueError, match=r"descriptor: expected one row of float64 numbers.*float32"):
        batched(lambda x: lengths(x).float(), r)
    with pytest.raises(ValueError, match="descriptor: it failed for positions"):
        batched(lambda x: x[:, 7], r)


def test_bad_input() -> None:
    r = geometries(2)
    with pytest.raises(ValueError, match="derivative is not finite at geometry 0"):
        AlgorithmicOperator(r, 1.0, lambda x: (x[..., :1, :] - x).square().sum(-1).sqrt())
    with pytest.raises(ValueError, match="sigma: expected a positive number"):
        AlgorithmicOperator(r, -1.0, inverse_distances)
    with pytest.raises(ValueError, match="permutations: expected the identity among them once, got 0"):
        AlgorithmicOperator(r, 1.0, inverse_distances, [[1, 0, 2, 3]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"directions: expected shape \(1, 4, 3\)"):
        AlgorithmicOperator(r, 1.0, inverse_distances, directions=np.ones((2, 4, 3)), at=[0])
    with pytest.raises(ValueError, match="at: expected geometries 0 to 1"):
        AlgorithmicOperator(r, 1.0, inverse_distances, directions=np.ones((1, 4, 3)), at=[2])
