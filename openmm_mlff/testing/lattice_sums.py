"""Checks of models that sum their charges over all periodic images (`Potential.long_range_methods`)."""

from __future__ import annotations

import numpy as np

from openmm_mlff.potentials.electrostatics import LONG_RANGE_METHODS
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.testing.base import ContractBase, forces_of
from openmm_mlff.testing.systems import close, raises, supercell


class LatticeSums(ContractBase):
    """Ewald and PME: gradients, images, supercells, each other, and no images where there is no box."""

    def test_long_range_methods_are_known(self) -> None:
        offered = self.potential().long_range_methods
        assert set(offered) <= set(LONG_RANGE_METHODS), f"long_range_methods: got {offered}"
        assert self.potential().long_range_method in offered

    def in_reciprocal_space(self) -> dict[str, Potential]:
        """A model for each of its methods beside 'shifted'; skips the check if there is none."""
        methods = [m for m in self.potential().long_range_methods if m != "shifted"]
        self.needs(bool(methods), "sums nothing in reciprocal space")
        models = {method: self.periodic() for method in methods}
        for method, model in models.items():
            model.long_range_method = method
        return models

    def test_gradients_of_lattice_sums(self) -> None:
        for model in self.in_reciprocal_space().values():
            for structure in self.boxes():
                self.check_gradient(model, structure)

    def test_images_of_lattice_sums(self) -> None:
        """Atoms moved by lattice vectors; for exact sums also another choice of vectors, and supercells."""
        for method, model in self.in_reciprocal_space().items():
            for structure in self.boxes():
                assert structure.cell is not None
                reference = self.run(model, structure)
                reference.dipole = None
                images = np.random.default_rng(7).integers(-2, 3, size=(len(structure), 3)) @ structure.cell
                same = {"wrapped": structure.replace(positions=structure.positions + images)}
                if method == "ewald":
                    skewed = np.array([[1, 0, 0], [1, 1, 0], [-1, 2, 1]]) @ structure.cell
                    same |= {"skewed cell": structure.replace(cell=skewed)}
                    same |= {"left-handed cell": structure.replace(cell=structure.cell[[1, 0, 2]])}
                for name, other in same.items():
                    self.same(f"{method}, {name}", self.run(model, other), reference, loosen=10)
                if method == "ewald" and self.extensive:
                    large = self.run(model, supercell(structure, (2, 1, 1)))
                    atol = 2 * self.extensive_atol * len(structure)
                    close("ewald: energy of a supercell", large.energy, 2 * reference.energy, atol)

    def test_lattice_sums_agree(self) -> None:
        models = self.in_reciprocal_space()
        self.needs({"ewald", "pme"} <= set(models), "has one lattice sum only")
        for structure in self.boxes():
            exact, mesh = (self.run(models[method], structure) for method in ("ewald", "pme"))
            assert exact.charges is not None, "charges: expected the charges that are summed, got None"
            # the energy of smeared charges is about their squares in eV
            squares = exact.charges.square()
            close("PME and Ewald: energy", mesh.energy, exact.energy, 1e-4 * float(squares.sum()) + 1e-12)
            close("PME and Ewald: forces", forces_of(mesh), forces_of(exact), 1e-3 * float(squares.max()) + 1e-12)

    def test_lattice_sums_in_the_evaluator(self) -> None:
        """While the box changes, what molecular dynamics runs is what a fresh start gives."""
        for method, model in self.in_reciprocal_space().items():
            structure = self.boxes()[0]
            assert structure.cell is not None
            for compile in (False, "auto"):
                evaluator = model.evaluator(structure, compile=compile)
                for scale in (1.0, 1.2, 0.9):
                    positions, cell = scale * structure.positions, scale * structure.cell
                    other = self.in_reciprocal_space()[method]
                    fresh = other.evaluator(structure.replace(positions=positions, cell=cell))(positions, cell)
                    result = evaluator(positions, cell)
                    close(f"{method}: energy", result.energy, fresh.energy, 10 * self.energy_atol * len(structure))
                    close(f"{method}: forces", forces_of(result), forces_of(fresh), 10 * self.force_atol)

    def test_open_systems_have_no_images(self) -> None:
        for model in self.in_reciprocal_space().values():
            raises("expected", model, model.batch(self.structures()[0]))
