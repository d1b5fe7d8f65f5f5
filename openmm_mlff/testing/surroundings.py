"""Checks of what lies far away or across a boundary: cutoffs, fragments, single atoms, periodic boxes."""

from __future__ import annotations

import numpy as np
import torch

from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.testing.base import ContractBase, forces_of
from openmm_mlff.testing.systems import (
    close,
    cluster,
    compare_pairs,
    join_fragments,
    multiplicity_of,
    rotation,
    supercell,
    turned,
)


class Surroundings(ContractBase):
    """Cutoffs, fragments far apart, free atoms, periodic images."""

    def test_smooth_at_the_cutoffs(self) -> None:
        self.needs(not self.fixed_composition, "describes one molecule only")
        for name, model in {"open": self.potential(), "with long-range cutoff": self.periodic()}.items():
            for cutoff in {model.cutoff, model.long_range_cutoff or model.cutoff}:
                self.check_cutoff(model, cutoff, f"{name}, cutoff {cutoff:.3f}")

    def check_cutoff(self, model: Potential, cutoff: float, what: str) -> None:
        """A pair that leaves the list takes nothing with it: energy and force are continuous, curvature is bounded."""
        tiny = 1e-7
        sides = [self.run(model, self.pair(cutoff + side)) for side in (-tiny, tiny)]
        slope = float(forces_of(sides[0]).abs().max())
        jump = 2 * tiny * (slope + 1.0)
        close(f"{what}: energy on both sides", sides[0].energy, sides[1].energy, jump + 1e-11)
        close(f"{what}: force on both sides", forces_of(sides[0]), forces_of(sides[1]), 4 * tiny * self.max_curvature)
        step = 2e-3
        scan = [self.pair(cutoff + step * k) for k in range(-30, 31)]
        second = np.diff(self.run(model, *scan).energy.numpy(), 2) / step**2
        assert np.abs(second).max() <= self.max_curvature, (
            f"{what}: second derivative of the energy reaches {np.abs(second).max():.1f} eV/angstrom^2, "
            f"allowed {self.max_curvature}"
        )

    def test_separated_fragments(self) -> None:
        self.needs(not self.fixed_composition, "describes one molecule only")
        model = self.potential()
        a, b = (cluster(model, n, seed=20 + n) for n in (4, 6))
        far = np.array([1e5, 0.0, 0.0])
        reference = self.run(model, join_fragments(a, b, far))
        rotated = self.run(model, join_fragments(a, turned(b, rotation(seed=8)), far))
        close("forces on a fragment when a far one turns", forces_of(rotated)[:4], forces_of(reference)[:4], 1e-7)
        if not self.separable:
            return
        bent = b.replace(positions=b.positions + np.random.default_rng(9).normal(scale=0.05, size=b.positions.shape))
        changed = self.run(model, join_fragments(a, bent, far))
        close("forces on a fragment when a far one bends", forces_of(changed)[:4], forces_of(reference)[:4], 1e-7)
        parts = self.run(model, a).energy + self.run(model, b).energy
        close("energy of two fragments far apart", reference.energy, parts, 1e-5)

    def test_one_atom(self) -> None:
        self.needs(not self.fixed_composition, "describes one molecule only")
        model = self.potential()
        for z in model.elements[:: max(1, len(model.elements) // 4)]:
            charges = (0, 1) if model.supports_charge else (0,)
            for charge in charges:
                multiplicity = multiplicity_of(model, [z], charge)
                atom = Structure(np.array([z]), np.array([[3.0, -2.0, 1.0]]), charge=charge, multiplicity=multiplicity)
                result = self.run(model, atom)
                assert bool(torch.isfinite(result.energy).all()), f"{SYMBOLS[z]}: energy is not finite"
                close(f"{SYMBOLS[z]}: forces on a free atom", forces_of(result), torch.zeros(1, 3), 0.0)
                if result.charges is not None:
                    close(f"{SYMBOLS[z]}: charge of a free atom", result.charges, [charge], 1e-12)
                moved = model.evaluator(atom)(atom.positions + 1.0)
                close(f"{SYMBOLS[z]}: evaluator", moved.energy, result.energy, self.energy_atol)

    # -- periodic boxes --------------------------------------------------------------------------------------------

    def test_pairs_are_all_images(self) -> None:
        model = self.periodic()
        for structure in self.boxes():
            batch = model.batch(structure)
            assert batch.pairs is not None
            compare_pairs(batch.pairs, structure, model.cutoff, half=False)
            if model.long_range:
                assert batch.long_range_pairs is not None and model.long_range_cutoff is not None
                compare_pairs(batch.long_range_pairs, structure, model.long_range_cutoff, half=True)

    def test_periodic_images_and_cells(self) -> None:
        """The same crystal: atoms moved by lattice vectors, the whole shifted, another choice of cell vectors."""
        model, rng = self.periodic(), np.random.default_rng(6)
        for structure in self.boxes():
            assert structure.cell is not None
            reference = self.run(model, structure)
            images = rng.integers(-2, 3, size=(len(structure), 3)) @ structure.cell
            skewed = np.array([[1, 0, 0], [1, 1, 0], [-1, 2, 1]]) @ structure.cell
            same = {
                "wrapped": structure.replace(positions=structure.positions + images),
                "shifted": structure.replace(positions=structure.positions + np.array([0.37, -4.1, 9.9])),
                "skewed cell": structure.replace(cell=skewed),
                "left-handed cell": structure.replace(cell=structure.cell[[1, 0, 2]]),
            }
            for name, other in same.items():
                result = self.run(model, other)
                result.dipole = reference.dipole  # not defined in a periodic system
                self.same(name, result, reference, loosen=10)

    def test_supercells(self) -> None:
        self.needs(self.extensive, "its energy is not extensive")
        model = self.periodic()
        for structure in self.boxes():
            reference = self.run(model, structure)
            for repeat in ((2, 1, 1), (1, 2, 2)):
                n = int(np.prod(repeat))
                large = self.run(model, supercell(structure, repeat))
                close(
                    f"energy of a {repeat} supercell",
                    large.energy,
                    n * reference.energy,
                    self.extensive_atol * n * len(structure),
                )
                copies = forces_of(large).reshape(n, len(structure), 3)
                mean = copies.mean(0)
                close(f"mean forces in a {repeat} supercell", mean, forces_of(reference), self.extensive_atol)
                close(f"forces in a {repeat} supercell", copies, mean.expand_as(copies), self.copies_force_atol)
