"""Covariances of energies, forces and Hessian-vector products under the Matern-5/2 kernel, in closed form.

Observations at a geometry r are linear functionals of the energy surface E(r) = f(x(r)). In terms of the descriptor x,
scaled by sqrt(5)/sigma, along a direction w of the 3N coordinates:

    energy                        f
    force                 F.w =  -(b.grad) f                      b = J w
    Hessian-vector        w.H v = (a.grad)(b.grad) f + (c.grad) f    a = J v, c = d^2 x[v, w]

With u = x - x' and h_0 = kappa = (1 + d + d^2/3) e^-d, d = |u|, h_(k+1) = (1/d) dh_k/dd,

    h_1 = -(1 + d) e^-d / 3    h_2 = e^-d / 3    h_3 = -e^-d / (3 d)    h_4 = (1 + d) e^-d / (3 d^3)

so that all derivatives up to the fourth, which two Hessian-vector products need, are sums of products of u, a, b, c:

    grad^2 kappa [x, y]       = h_1 x.y + h_2 (u.x)(u.y)
    grad^3 kappa [x, y, z]    = h_2 ((x.y)(u.z) + 2 more) + h_3 (u.x)(u.y)(u.z)
    grad^4 kappa [x, y, z, w] = h_2 ((x.y)(z.w) + 2 more) + h_3 ((x.y)(u.z)(u.w) + 5 more) + h_4 (u.x)(u.y)(u.z)(u.w)

h_3 and h_4 only occur with more factors of u than they have poles, so at u = 0, where differentiating the formula of
kappa by rote gives 0/0, those terms are zero. The kernel has no fifth derivative there: products of the Hessian with
two directions are the most that can be learned from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: scaled distances below this count as this in h_3 and h_4, where they multiply a u that was subtracted ...
NEAREST = 1e-30
#: ... and where |u|^2 = |x|^2 + |x'|^2 - 2 x.x', so that rounding leaves up to 1e-8 of a distance that is zero
NEAREST_EXPANDED = 1e-7
#: below this part of |x|^2 + |x'|^2 it is computed from the subtracted u after all
CANCELLED = 1e-6


def radial(square: Tensor, nearest: float = NEAREST) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h_0, ..., h_4 at squared scaled distances ``|u|^2``."""
    d = square.clamp_min(0.0).sqrt()
    e = torch.exp(-d)
    near = d.clamp_min(nearest)
    third = e / 3
    return (1 + d + d * d / 3) * e, -(1 + d) * third, third, -third / near, (1 + d) * third / near**3


@dataclass(frozen=True)
class Jets:
    """Scaled descriptors of n geometries in S orders of equal atoms, with derivatives by the 3N = m coordinates.

    Attributes:
        x: ``(n, S, D)``. jacobian: J, ``(n, S, D, m)``.
        along: a = J v of a direction v that belongs to each geometry, ``(n, S, D)``; None where there is none.
        curvature: dJ[v], ``(n, S, D, m)``, so that c = curvature @ w.
    """

    x: Tensor
    jacobian: Tensor
    along: Tensor | None = None
    curvature: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, chosen: slice | Tensor) -> Jets:
        return Jets(*(None if t is None else t[chosen] for t in (self.x, self.jacobian, self.along, self.curvature)))  # type: ignore[arg-type]


class PairProducts:
    """The products of u, J, a and dJ that blocks between two sets of jets are made of.

    The first set has one order of atoms each (S = 1). Letters: i and j geometries, s orders, d components, m and n
    coordinates of the first and second geometry.
    """

    def __init__(self, left: Jets, right: Jets) -> None:
        self.left, self.right = left, right
        self.jacobian, self.other = left.jacobian[:, 0], right.jacobian
        self.u = left.x[:, 0, None, None] - right.x[None]
        self.h = radial((self.u * self.u).sum(-1))
        self.p = torch.einsum("idm,ijsd->ijsm", self.jacobian, self.u)
        self.p_other = torch.einsum("jsdn,ijsd->ijsn", self.other, self.u)

    def weighted(self, weight: Tensor, second: Tensor) -> Tensor:
        """sum_s weight_ijs second_js: ``(i, j, d, n)`` from ``(j, s, d, n)``."""
        return torch.einsum("ijs,jsdn->ijdn", weight, second)

    def mixed(self, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """sum_s weight_ijs first_i^T second_js: ``(i, j, m, n)`` from ``(i, d, m)`` and ``(j, s, d, n)``."""
        return first.transpose(1, 2)[:, None] @ self.weighted(weight, second)

    def force_force(self) -> Tensor:
        """cov(F.w, F'.w'), ``(i, j, m, n)``."""
        _, h1, h2, _, _ = self.h
        return -self.mixed(h1, self.jacobian, self.other) - outer(h2, self.p, self.p_other)

    def force_product(self) -> Tensor:
        """cov(F.w, w'.H'v'), ``(i, j, m, n)``."""
        _, h1, h2, h3, _ = self.h
        a, curvature = self.right.along, self.right.curvature
        assert a is not None and curvature is not None
        ua = torch.einsum("ijsd,jsd->ijs", self.u, a)
        r = torch.einsum("idm,jsd->ijsm", self.jacobian, a)
        s = torch.einsum("jsdn,jsd->jsn", self.other, a)[None].expand_as(self.p_other)
        q = torch.einsum("jsdn,ijsd->ijsn", curvature, self.u)
        return (
            self.mixed(h1, self.jacobian, curvature)
            - self.mixed(h2 * ua, self.jacobian, self.other)
            + outer(h2, self.p, q - s)
            - outer(h2, r, self.p_other)
            - outer(h3 * ua, self.p, self.p_other)
        )

    def product_force(self) -> Tensor:
        """cov(w.H v, F'.w'), ``(i, j, m, n)``."""
        _, h1, h2, h3, _ = self.h
        a, curvature = self.left.along, self.left.curvature
        assert a is not None and curvature is not None
        a, curvature = a[:, 0], curvature[:, 0]
        ua = torch.einsum("ijsd,id->ijs", self.u, a)
        r = torch.einsum("jsdn,id->ijsn", self.other, a)
        s = torch.einsum("idm,id->im", self.jacobian, a)[:, None, None].expand_as(self.p)
        q = torch.einsum("idm,ijsd->ijsm", curvature, self.u)
        return (
            self.mixed(h1, curvature, self.other)
            + self.mixed(h2 * ua, self.jacobian, self.other)
            + outer(h2, s + q, self.p_other)
            + outer(h2, self.p, r)
            + outer(h3 * ua, self.p, self.p_other)
        )

    def product_product(self) -> Tensor:
        """cov(w.H v, w'.H'v'), ``(i, j, m, n)``."""
        _, h1, h2, h3, h4 = self.h
        left, right = self.left, self.right
        assert left.along is not None and left.curvature is not None
        assert right.along is not None and right.curvature is not None
        a, a2, curved, curved2 = left.along[:, 0], right.along, left.curvature[:, 0], right.curvature
        ua, ua2 = torch.einsum("ijsd,id->ijs", self.u, a), torch.einsum("ijsd,jsd->ijs", self.u, a2)
        aa = torch.einsum("id,jsd->ijs", a, a2)
        s = torch.einsum("idm,id->im", self.jacobian, a)[:, None, None].expand_as(self.p)
        s2 = torch.einsum("jsdn,jsd->jsn", self.other, a2)[None].expand_as(self.p_other)
        r, r2 = torch.einsum("idm,jsd->ijsm", self.jacobian, a2), torch.einsum("jsdn,id->ijsn", self.other, a)
        t, t2 = torch.einsum("idm,jsd->ijsm", curved, a2), torch.einsum("jsdn,id->ijsn", curved2, a)
        q, q2 = torch.einsum("idm,ijsd->ijsm", curved, self.u), torch.einsum("jsdn,ijsd->ijsn", curved2, self.u)
        p, p2 = self.p, self.p_other
        # grad^4 [a, b, a', b']
        fourth = outer(h2, s, s2) + outer(h2, r, r2) + outer(h4 * ua * ua2 + h3 * aa, p, p2)
        fourth = fourth + outer(h3 * ua2, s, p2) + outer(h3 * ua2, p, r2) + outer(h3 * ua, r, p2)
        fourth = fourth + outer(h3 * ua, p, s2)
        # grad^3 [c, a', b'] - grad^3 [a, b, c']
        third = outer(h2, t, p2) + outer(h2, q, s2) + outer(h3 * ua2, q, p2)
        third = third - outer(h2, s, q2) - outer(h2, p, t2) - outer(h3 * ua, p, q2)
        # what multiplies J and dJ of the first geometry from the right, with -grad^2 [c, c']
        by_jacobian = self.weighted(h2 * aa + h3 * ua * ua2, self.other) - self.weighted(h2 * ua, curved2)
        by_curvature = self.weighted(h2 * ua2, self.other) - self.weighted(h1, curved2)
        products = self.jacobian.transpose(1, 2)[:, None] @ by_jacobian + curved.transpose(1, 2)[:, None] @ by_curvature
        return products + fourth + third - outer(h2, q, q2)

    def energy_force(self) -> Tensor:
        """cov(E, F'.w'), ``(i, j, n)``."""
        return (self.h[1][..., None] * self.p_other).sum(2)

    def force_energy(self) -> Tensor:
        """cov(F.w, E'), ``(i, j, m)``."""
        return -(self.h[1][..., None] * self.p).sum(2)

    def energy_product(self) -> Tensor:
        """cov(E, w'.H'v'), ``(i, j, n)``."""
        _, h1, h2, _, _ = self.h
        a, curvature = self.right.along, self.right.curvature
        assert a is not None and curvature is not None
        ua = torch.einsum("ijsd,jsd->ijs", self.u, a)
        s = torch.einsum("jsdn,jsd->jsn", self.other, a)
        q = torch.einsum("jsdn,ijsd->ijsn", curvature, self.u)
        return (h1[..., None] * (s - q) + (h2 * ua)[..., None] * self.p_other).sum(2)

    def product_energy(self) -> Tensor:
        """cov(w.H v, E'), ``(i, j, m)``."""
        _, h1, h2, _, _ = self.h
        a, curvature = self.left.along, self.left.curvature
        assert a is not None and curvature is not None
        ua = torch.einsum("ijsd,id->ijs", self.u, a[:, 0])
        s = torch.einsum("idm,id->im", self.jacobian, a[:, 0])[:, None, None]
        q = torch.einsum("idm,ijsd->ijsm", curvature[:, 0], self.u)
        return (h1[..., None] * (s + q) + (h2 * ua)[..., None] * self.p).sum(2)

    def energy_energy(self) -> Tensor:
        """cov(E, E'), ``(i, j)``."""
        return self.h[0].sum(2)


def outer(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """sum_s weight_ijs first_ijsm second_ijsn: ``(i, j, m, n)``."""
    return torch.einsum("ijsm,ijsn->ijmn", weight[..., None] * first, second)


@dataclass(frozen=True)
class Expansion:
    """f(x) = sum_k e_k kappa(u_k) + A_k.grad' kappa + (a_k.grad')(b_k.grad') kappa, with u_k = x - x_k, grad' = -grad.

    Attributes:
        x: ``(K, D)``, scaled. energies: e, ``(K,)`` or None. first: A, ``(K, D)``.
        second: terms of Hessian-vector products, or None.
    """

    x: Tensor
    first: Tensor
    energies: Tensor | None = None
    second: SecondOrder | None = None

    def value(self, x: Tensor) -> Tensor:
        """f, ``(n, D)`` -> ``(n,)``."""
        u, (h0, h1, _, _, _) = _between(x, self.x)
        total = -(h1 * u.dot(self.first)).sum(1)
        if self.energies is not None:
            total = total + h0 @ self.energies
        return total if self.second is None else total + self.second.value(x)

    def gradient(self, x: Tensor) -> Tensor:
        """grad f, ``(n, D)``."""
        u, (_, h1, h2, _, _) = _between(x, self.x)
        along = -h2 * u.dot(self.first)
        if self.energies is not None:
            along = along + h1 * self.energies
        result = u.times(along) - h1 @ self.first
        return result if self.second is None else result + self.second.gradient(x)

    def hessian_times(self, x: Tensor, w: Tensor) -> Tensor:
        """grad^2 f . w, one direction per point: ``(n, D)``, ``(n, D)`` -> ``(n, D)``."""
        u, (_, h1, h2, h3, _) = _between(x, self.x)
        uw, wa = u.along(w), w @ self.first.T
        ua = u.dot(self.first)
        along, own = -(h2 * wa + h3 * ua * uw), -(h2 * ua)
        if self.energies is not None:
            along, own = along + h2 * uw * self.energies, own + h1 * self.energies
        result = u.times(along) - (h2 * uw) @ self.first + own.sum(1, keepdim=True) * w
        return result if self.second is None else result + self.second.hessian_times(x, w)


@dataclass(frozen=True)
class SecondOrder:
    """sum_l (a_l.grad)(b_l.grad) kappa(x - z_l), the terms of Hessian-vector products; ``(L, D)`` each, scaled."""

    z: Tensor
    a: Tensor
    b: Tensor

    def value(self, x: Tensor) -> Tensor:
        """``(n, D)`` -> ``(n,)``."""
        u, (_, h1, h2, _, _) = _between(x, self.z)
        return (h1 * (self.a * self.b).sum(1) + h2 * u.dot(self.a) * u.dot(self.b)).sum(1)

    def gradient(self, x: Tensor) -> Tensor:
        """``(n, D)``."""
        u, (_, _, h2, h3, _) = _between(x, self.z)
        ua, ub = u.dot(self.a), u.dot(self.b)
        along = h2 * (self.a * self.b).sum(1) + h3 * ua * ub
        return u.times(along) + (h2 * ub) @ self.a + (h2 * ua) @ self.b

    def hessian_times(self, x: Tensor, w: Tensor) -> Tensor:
        """Times one direction per point: ``(n, D)``, ``(n, D)`` -> ``(n, D)``."""
        a, b = self.a, self.b
        u, (_, _, h2, h3, h4) = _between(x, self.z)
        uw, ua, ub, wa, wb, ab = u.along(w), u.dot(a), u.dot(b), w @ a.T, w @ b.T, (a * b).sum(1)
        result = (h2 * ab + h3 * ua * ub).sum(1, keepdim=True) * w
        result = result + (h2 * wb + h3 * uw * ub) @ a + (h2 * wa + h3 * uw * ua) @ b
        return result + u.times(h3 * (ab * uw + wa * ub + ua * wb) + h4 * ua * ub * uw)


class _Differences:
    """u_nk = x_n - z_k without the array ``(n, K, D)``."""

    def __init__(self, x: Tensor, z: Tensor) -> None:
        self.x, self.z = x, z

    def dot(self, a: Tensor) -> Tensor:
        """u_nk . a_k, ``(n, K)``."""
        return self.x @ a.T - (self.z * a).sum(1)

    def along(self, w: Tensor) -> Tensor:
        """u_nk . w_n, ``(n, K)``."""
        return (self.x * w).sum(1, keepdim=True) - w @ self.z.T

    def times(self, weight: Tensor) -> Tensor:
        """sum_k weight_nk u_nk, ``(n, D)``."""
        return weight.sum(1, keepdim=True) * self.x - weight @ self.z


def _between(x: Tensor, z: Tensor) -> tuple[_Differences, tuple[Tensor, ...]]:
    centre = z.mean(0)
    x, z = x - centre, z - centre
    lengths = (x * x).sum(1, keepdim=True) + (z * z).sum(1)
    square = lengths - 2 * (x @ z.T)
    # the cusp of h_2 makes second derivatives linear in d, so that a d of 1e-8 for equal points would cost eight digits
    n, k = torch.nonzero(square < CANCELLED * lengths, as_tuple=True)
    square[n, k] = (x[n] - z[k]).square().sum(1)
    return _Differences(x, z), radial(square, NEAREST_EXPANDED)
