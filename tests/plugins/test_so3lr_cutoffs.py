"""Pairs that cross a cutoff: no term of SO3LR makes a step in the forces, in either precision, open or periodic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential
from openmm_so3krates import SO3krates

WATER = np.array([[0.0, 0.0, 0.0], [0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]])
NUMBERS = np.array([8, 1, 1, 8, 1, 1])
#: eV/angstrom, what rounding to single precision makes of forces of up to 4 eV/angstrom
SINGLE_NOISE = 6e-5


@pytest.fixture(scope="module")
def so3lr(shared: Path) -> SO3krates:
    model = load_potential(shared / "models/so3lr_params.npz", "so3krates")
    assert isinstance(model, SO3krates)
    return model


def dimer(distance: float, atom: int, cell: np.ndarray | None = None) -> Structure:
    """Two waters, the first one's oxygen and one atom of the second (3 O, 4 H) this far apart."""
    direction = np.array([0.6, -0.64, 0.48])
    turned = WATER[:, [2, 0, 1]] * [1, -1, 1]
    other = turned - turned[atom - 3] + distance * direction
    return Structure(NUMBERS, np.concatenate([WATER, other]), cell=cell)


def forces(model: SO3krates, structure: Structure) -> np.ndarray:
    """eV/angstrom"""
    return model.evaluator(structure).arrays(structure.positions, structure.cell)[1]


@pytest.mark.parametrize("box", [None, np.array([[16.0, 0, 0], [3.0, 15.0, 0], [-4.0, 2.0, 17.0]])])
@pytest.mark.parametrize(("limit", "atom"), [(1.5, 4), (4.5, 3), (4.5, 4), (6.0, 3), (10.0, 3)])
def test_no_step_in_the_forces(so3lr: SO3krates, limit: float, atom: int, box: np.ndarray | None) -> None:
    """At the reach of the repulsion, of the messages and of the long-range terms."""
    so3lr.long_range_cutoff = 10.0 if limit == 10.0 else 6.0
    so3lr.long_range_method = "shifted"
    for dtype, apart, noise in ((torch.float64, 1e-7, 1e-11), (torch.float32, 1e-5, SINGLE_NOISE)):
        so3lr.to(dtype)
        inner, outer = (
            forces(so3lr, dimer(limit + k * apart, atom, box)) - forces(so3lr, dimer(limit - k * apart, atom, box))
            for k in (1, 2)
        )
        # what is left of the difference when the slope is taken away
        step = 2 * inner - outer
        largest = np.abs(forces(so3lr, dimer(limit, atom, box))).max()
        assert largest > 0.5
        assert np.abs(step).max() < noise * max(1.0, largest / 4)


@pytest.mark.parametrize("limit", [1.5, 4.5, 6.0])
def test_energy_across_a_cutoff_is_the_integral_of_the_force(so3lr: SO3krates, limit: float) -> None:
    so3lr.to(torch.float64)
    so3lr.long_range_cutoff, so3lr.long_range_method = 6.0, "shifted"
    direction, half = np.array([0.6, -0.64, 0.48]), 1e-3
    nodes, weights = np.polynomial.legendre.leggauss(6)
    work = 0.0
    # the slope of the force, but not the force, may have a step at the cutoff
    for middle in (limit - half / 2, limit + half / 2):
        for x, weight in zip(nodes, weights, strict=True):
            on_second = so3lr.energy_and_forces(dimer(middle + half / 2 * x, 3))[1][3:].sum(0)
            work += half / 2 * weight * float(on_second @ direction)
    ends = [so3lr.energy_and_forces(dimer(limit + side * half, 3))[0] for side in (-1, 1)]
    assert ends[1] - ends[0] == pytest.approx(-work, abs=1e-11)
    assert abs(work) > 1e-8


@pytest.mark.parametrize("method", ["shifted", "ewald", "pme"])
def test_water_box_in_both_precisions(so3lr: SO3krates, shared: Path, method: str) -> None:
    """The stored energy of 64 waters; in reciprocal space the network, repulsion and dispersion are the same."""
    data = np.load(shared / "data/so3lr/visible.npz", allow_pickle=False)
    name = "water_64_lr6/"
    box = Structure(data[name + "numbers"], data[name + "positions"], cell=data[name + "cell"])
    so3lr.to(torch.float64)
    so3lr.long_range_cutoff, so3lr.long_range_method = 6.0, method
    batch = so3lr.batch(box)
    terms = {k: float(v) for k, v in so3lr(batch).terms.items()}
    energy, exact = so3lr.energy_and_forces(box)
    if method == "shifted":
        assert energy == pytest.approx(float(data[name + "energy"]), abs=1e-6)
    else:
        rest = float(data[name + "energy"]) - sum(terms[k] for k in terms if k != "electrostatics")
        assert abs(terms["electrostatics"] - rest) > 1.0
        # an eighth of the lattice sum of 2x2x2 such boxes, which another program made
        assert terms["electrostatics"] == pytest.approx(-440.27095663 / 8, abs=1e-6 if method == "ewald" else 1e-5)
    single = so3lr.to(torch.float32).evaluator(box).arrays(box.positions, box.cell)[1]
    assert np.abs(single - exact).max() < 1e-4
