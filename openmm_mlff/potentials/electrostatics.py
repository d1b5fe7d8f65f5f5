"""Charges of a periodic box in reciprocal space: the lattice sum of a smeared Coulomb interaction.

Models whose charges interact by erf(r/sigma)/r (SO3LR: sigma = 4 angstrom) need no sum in real space: the interaction
is finite at r = 0 and its Fourier transform 4 pi exp(-sigma^2 k^2 / 4)/k^2 decays fast, so that few wave vectors hold
the whole energy. Everything here is differentiable, twice too, in charges, positions and box vectors, and has shapes
that depend on the size of the box only, so that it can be part of a compiled graph.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from openmm_mlff.data.structures import Batch

#: what a model with charges can do with them in a periodic box; 'shifted' is a sum in real space with a cutoff
LONG_RANGE_METHODS = ("shifted", "ewald", "pme")
#: sigma |k| / 2 at which the sum of `ewald` ends. The neglected part of the energy of charges without correlation is
#: erfc of this, relative to their self-energy: 8e-9 and 8e-14, below the rounding of either precision.
EWALD_EXTENT = {torch.float32: 4.08, torch.float64: 5.28}
#: largest mesh spacing of `pme` over sigma, and order of its B-splines: energies are then right to 1e-5 of the charges'
#: self-energy, and forces in water to 3e-6 eV/angstrom, about what single precision does to them
PME_SPACING = 0.3
PME_ORDER = 6
#: GiB; `ewald` refuses a box whose table of phases is larger
EWALD_MEMORY = 4.0


def smeared_lattice_energy(charges: Tensor, batch: Batch, sigma: float, method: str, coulomb_constant: float) -> Tensor:
    r"""Energy of smeared charges with all their periodic images, ``(n_structures,)`` eV, float64.

    .. math:: E = \frac{k_e}{2} \sum_{ij} \sum_{\mathbf n}{}' q_i q_j \frac{\mathrm{erf}(r_{ij\mathbf n}/\sigma)}
              {r_{ij\mathbf n}} = \frac{2 \pi k_e}{V} \sum_{\mathbf k \ne 0} \frac{e^{-\sigma^2 k^2/4}}{k^2}
              \Bigl|\sum_j q_j e^{i \mathbf k \cdot \mathbf R_j}\Bigr|^2 - \frac{k_e}{\sigma\sqrt\pi} \sum_i q_i^2

    Leaving k = 0 out means a conducting surrounding and, for a box with a net charge, a uniform background that
    neutralises it and interacts in the same smeared way.

    Args:
        charges: ``(n_atoms,)`` e. batch: periodic; its `Batch.box_lengths` decide the number of wave vectors.
        sigma: angstrom; the charges are Gaussians of width sigma/2 each.
        method: 'ewald' sums over wave vectors, complete to rounding, and costs about n_atoms^2. 'pme' (smooth particle
            mesh Ewald, Essmann et al., J. Chem. Phys. 103, 8577 (1995)) spreads the charges on a mesh and costs about
            n_atoms; its forces are the exact gradient of its energy.
        coulomb_constant: k_e in eV angstrom/e^2.

    Raises `ValueError` for another method, for an open batch, and for a box that is too large for 'ewald'.
    """
    if method not in ("ewald", "pme"):
        raise ValueError(f"method: expected 'ewald' or 'pme', got {method!r}")
    if batch.cell is None:
        raise ValueError(f"cell: expected a periodic batch for {method!r}, got an open one")
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive length (angstrom), got {sigma}")
    reciprocal, volume = reciprocal_vectors(batch.cell)
    scaled = _scaled_positions(batch, reciprocal)
    table, points = batch.to_dense(charges), batch.to_dense(scaled)
    sums = _ewald_sums if method == "ewald" else _mesh_sums
    weighted = sums(table, points, reciprocal, batch.box_lengths, sigma)
    own = batch.sum_by_structure(charges.to(torch.float64).square()) / (sigma * math.sqrt(math.pi))
    return coulomb_constant * (2 * math.pi / volume.to(torch.float64) * weighted - own)


def reciprocal_vectors(cell: Tensor) -> tuple[Tensor, Tensor]:
    """Reciprocal vectors without 2 pi as rows, ``(n_structures, 3, 3)`` 1/angstrom, and volumes ``(n_structures,)``.

    Rows b_a with a_a . b_b = delta_ab for the box vectors a in the rows of `cell`.
    """
    a, b, c = cell.unbind(1)
    across = torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)
    volume = (a * across[0]).sum(-1)
    return torch.stack(across, 1) / volume[:, None, None], volume.abs()


def _scaled_positions(batch: Batch, reciprocal: Tensor) -> Tensor:
    """Coordinates in units of the box vectors, ``(n_atoms, 3)``."""
    if batch.n_structures == 1:
        return batch.positions @ reciprocal[0].T
    return torch.einsum("ia,iba->ib", batch.positions, batch.per_atom(reciprocal))


def _kernel(index: tuple[Tensor, Tensor, Tensor], reciprocal: Tensor, sigma: float) -> Tensor:
    """exp(-sigma^2 k^2/4)/k^2 for all k = 2 pi (i b_1 + j b_2 + h b_3), zero at k = 0: ``(n, |i|, |j|, |h|)``."""
    i, j, h = index
    rows = 2 * math.pi * reciprocal.to(torch.float64)
    wave = (
        i[:, None, None, None] * rows[:, None, None, None, 0]
        + j[:, None, None] * rows[:, None, None, None, 1]
        + h[:, None] * rows[:, None, None, None, 2]
    )  # (n_structures, |i|, |j|, |h|, 3)
    k2 = wave.square().sum(-1)
    zero = (i == 0)[:, None, None] & (j == 0)[:, None] & (h == 0)
    k2 = torch.where(zero, 1.0, k2)
    return torch.where(zero, 0.0, torch.exp(-0.25 * sigma * sigma * k2) / k2)


# -- sum over wave vectors ---------------------------------------------------------------------------------------


def ewald_extent(lengths: tuple[float, float, float], sigma: float, dtype: torch.dtype) -> tuple[int, int, int]:
    """Largest indices of the wave vectors along the three reciprocal vectors, for a box with edges of these lengths.

    They hold every wave vector with sigma |k|/2 <= `EWALD_EXTENT`, because k . a = 2 pi n is at most |k| |a|.
    """
    longest = 2 * EWALD_EXTENT.get(dtype, EWALD_EXTENT[torch.float64]) / sigma
    first, second, third = (max(1, math.ceil(longest * length / (2 * math.pi))) for length in lengths)
    return first, second, third


def _ewald_sums(
    charges: Tensor, scaled: Tensor, reciprocal: Tensor, lengths: tuple[float, float, float], sigma: float
) -> Tensor:
    """sum over k of the kernel times |sum_j q_j exp(i k R_j)|^2 for ``(n, atoms)`` charges: ``(n,)``.

    exp(i k R) is a product of three factors, one per axis. Products of the last two, atoms by (j, h), meet those of the
    first, atoms by i >= 0 (k and -k are alike), in one product of matrices.
    """
    extent = ewald_extent(lengths, sigma, charges.dtype)
    refuse_large_ewald(charges.numel(), lengths, sigma, charges.dtype)
    whole = [torch.arange(-m, m + 1, device=charges.device) for m in extent]
    half = whole[0][extent[0] :]
    turn = 2 * math.pi * scaled
    (c1, s1), (c2, s2), (c3, s3) = (
        (torch.cos(phase), torch.sin(phase))
        for phase in (turn[..., axis, None] * n for axis, n in enumerate((half, whole[1], whole[2])))
    )
    first = torch.cat([c1, s1], -1) * charges[..., None]  # (n, atoms, 2 |i|)
    cosine = c2[..., :, None] * c3[..., None, :] - s2[..., :, None] * s3[..., None, :]
    sine = s2[..., :, None] * c3[..., None, :] + c2[..., :, None] * s3[..., None, :]
    rest = torch.cat([cosine.flatten(2), sine.flatten(2)], -1)  # (n, atoms, 2 |j| |h|)
    product = torch.matmul(first.transpose(1, 2), rest)
    count = len(half)
    cc, cs = product[:, :count].chunk(2, -1)
    sc, ss = product[:, count:].chunk(2, -1)
    squared = ((cc - ss).square() + (cs + sc).square()).unflatten(-1, (len(whole[1]), len(whole[2])))
    weight = torch.where(half > 0, 2.0, 1.0)[:, None, None] * _kernel((half, whole[1], whole[2]), reciprocal, sigma)
    return (weight * squared).sum((1, 2, 3))


def refuse_large_ewald(n_atoms: int, lengths: tuple[float, float, float], sigma: float, dtype: torch.dtype) -> None:
    """Raise `ValueError` where the table of phases of 'ewald' would take more than `EWALD_MEMORY`.

    Args:
        n_atoms: of all structures together. lengths: of the box vectors (`Batch.box_lengths`), angstrom.
        sigma: angstrom. dtype: of the charges.
    """
    _, second, third = ewald_extent(lengths, sigma, dtype)
    gib = n_atoms * 2 * (2 * second + 1) * (2 * third + 1) * dtype.itemsize / 2**30
    if gib > EWALD_MEMORY:
        raise ValueError(
            f"longRangeMethod: 'ewald' would take {gib:.0f} GiB for {n_atoms} atoms in this box; expected "
            "'pme', whose cost grows in proportion to the number of atoms"
        )


# -- particle mesh -----------------------------------------------------------------------------------------------


def mesh_points(lengths: tuple[float, float, float], sigma: float) -> tuple[int, int, int]:
    """Mesh points along the box vectors: even products of 2, 3 and 5, no further apart than `PME_SPACING` sigma."""
    first, second, third = (_smooth(max(length / (PME_SPACING * sigma), PME_ORDER + 2)) for length in lengths)
    return first, second, third


def _smooth(least: float) -> int:
    """The smallest even number with no prime factor above 5 that is not below `least`."""
    n = 2 * math.ceil(least / 2)
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


def _mesh_sums(
    charges: Tensor, scaled: Tensor, reciprocal: Tensor, lengths: tuple[float, float, float], sigma: float
) -> Tensor:
    """As `_ewald_sums`, with the structure factors interpolated from charges on a mesh."""
    points = mesh_points(lengths, sigma)
    mesh = _spread(charges, scaled, points)
    factor = torch.fft.rfftn(mesh, dim=(1, 2, 3))
    squared = torch.view_as_real(factor).square().sum(-1)
    index = tuple(_frequencies(n, half=axis == 2).to(charges.device) for axis, n in enumerate(points))
    kernel = _kernel((index[0], index[1], index[2]), reciprocal, sigma)
    edges = [_spline_factors(n)[: len(m)].to(charges.device) for n, m in zip(points, index, strict=True)]
    # the last axis holds one of k and -k only, except where both are the same
    twice = torch.where((index[2] == 0) | (index[2] == points[2] // 2), 1.0, 2.0)
    weight = edges[0][:, None, None] * edges[1][:, None] * (edges[2] * twice)
    return (weight * kernel * squared).sum((1, 2, 3))


def _frequencies(n: int, half: bool) -> Tensor:
    """Whole wave numbers in the order of the Fourier transform, the largest ones positive."""
    index = torch.arange(n)
    return index[: n // 2 + 1] if half else torch.where(index > n // 2, index - n, index)


def _spread(charges: Tensor, scaled: Tensor, points: tuple[int, int, int]) -> Tensor:
    """Charges ``(n, atoms)`` on the mesh, ``(n, *points)``."""
    size = torch.tensor(points, device=charges.device)
    place = scaled * size
    below = torch.floor(place.detach())
    weights = _spline(place - below)  # (n, atoms, 3, order)
    node = below.to(torch.int64)[..., None] - torch.arange(PME_ORDER, device=charges.device)
    node = torch.remainder(node, size[:, None])
    w1, w2, w3 = (charges[..., None] * weights[..., 0, :]), weights[..., 1, :], weights[..., 2, :]
    spread = w1[..., :, None, None] * w2[..., None, :, None] * w3[..., None, None, :]
    flat = (node[..., 0, :, None, None] * points[1] + node[..., 1, None, :, None]) * points[2]
    flat = flat + node[..., 2, None, None, :]
    total = points[0] * points[1] * points[2]
    flat = flat + total * torch.arange(len(charges), device=charges.device)[:, None, None, None, None]
    mesh = spread.new_zeros(len(charges) * total).index_add(0, flat.flatten(), spread.flatten())
    return mesh.view(len(charges), *points)


def _spline(fraction: Tensor) -> Tensor:
    """Values M_p(f), M_p(f + 1), ..., M_p(f + p - 1) of the cardinal B-spline of order p: ``(..., p)``.

    By the recursion M_p(u) = [u M_{p-1}(u) + (p - u) M_{p-1}(u - 1)]/(p - 1) from the hat function M_2.
    """
    values = [fraction, 1 - fraction]
    for order in range(3, PME_ORDER + 1):
        padded = [torch.zeros_like(fraction), *values, torch.zeros_like(fraction)]
        values = [
            ((fraction + m) * padded[m + 1] + (order - fraction - m) * padded[m]) / (order - 1) for m in range(order)
        ]
    return torch.stack(values, -1)


@functools.cache
def _spline_factors(n: int) -> Tensor:
    """|b(m)|^2 for m = 0 ... n - 1: how the splines' own Fourier transform is divided out, ``(n,)`` float64."""
    at_nodes = _spline(torch.zeros((), dtype=torch.float64))[1:]
    turn = 2 * math.pi * torch.arange(n, dtype=torch.float64)[:, None] * torch.arange(len(at_nodes)) / n
    return 1 / ((at_nodes * torch.cos(turn)).sum(-1).square() + (at_nodes * torch.sin(turn)).sum(-1).square())
