"""What a family says about itself for the contract, and the comparisons that all checks share."""

from __future__ import annotations

import copy
import unittest
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.potential import Evaluation, Potential
from openmm_mlff.testing.systems import close, cluster, crystal, multiplicity_of


class ContractBase:
    """Checks of one `Potential`; a subclass defines `make` and says what its family does not promise.

    Attributes:
        fixed_composition: the model knows one molecule only; `structures` must then be overridden, and checks that
            need other systems (one atom, dimers, clusters, boxes) are skipped.
        separable: the energy of fragments far apart is the sum of theirs, and neither feels the other's internal
            coordinates. Models with features shared by the whole system (attention over all atoms, charge spread over
            all atoms) set False; what is left to check is that a fragment does not feel another one's orientation.
        extensive: n cells of a neutral crystal have n times the energy of one cell.
        mirror_symmetric: mirror images have the same energy.
        float32: the model can be run in single precision. trainable: forces can be differentiated by the parameters.
        energy_atol, force_atol: eV per atom and eV/angstrom, for what should agree to rounding in float64.
        gradient_atol: eV/angstrom, forces against finite differences of the energy (float64).
        float32_energy_atol, float32_force_atol: eV per atom (beside 2e-6 eV) and eV/angstrom, against float64.
        extensive_atol: eV per atom and eV/angstrom, for supercells; looser where a small constant keeps a division by a
            sum over atoms finite.
        copies_force_atol: eV/angstrom, by how much copies in a supercell may differ (their mean may not): where a model
            takes a maximum over atoms, one of several equal copies carries its derivative.
        max_curvature: eV/angstrom^2, bound of the second derivative of a dimer's energy at the cutoffs.
        periodic_long_range_cutoff: angstrom, given to models that have long-range terms without a cutoff.
    """

    fixed_composition: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    extensive: ClassVar[bool] = True
    mirror_symmetric: ClassVar[bool] = True
    float32: ClassVar[bool] = True
    trainable: ClassVar[bool] = True
    energy_atol: ClassVar[float] = 1e-9
    force_atol: ClassVar[float] = 1e-8
    gradient_atol: ClassVar[float] = 1e-6
    float32_energy_atol: ClassVar[float] = 1e-6
    float32_force_atol: ClassVar[float] = 1e-4
    extensive_atol: ClassVar[float] = 1e-8
    copies_force_atol: ClassVar[float] = 1e-6
    max_curvature: ClassVar[float] = 50.0
    periodic_long_range_cutoff: ClassVar[float] = 6.0

    # -- what a subclass says ------------------------------------------------------------------------------------

    def make(self) -> Potential:
        """A model with float64 parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define make() -> Potential")

    def structures(self) -> list[Structure]:
        """Open structures of different sizes that the model can describe; neither symmetric nor at equilibrium."""
        model = self.potential()
        charges = (0, 1, -1) if model.supports_charge else (0, 0, 0)
        return [cluster(model, n, seed=n, charge=q) for n, q in zip((3, 7, 5), charges, strict=True)]

    def pair(self, distance: float) -> Structure:
        """Two atoms at a distance (angstrom), to look at the cutoffs."""
        model = self.potential()
        numbers = np.array([model.elements[0], model.elements[min(5, len(model.elements) - 1)]])
        return Structure(
            numbers, np.array([[0, 0, 0], [distance, 0, 0]]), multiplicity=multiplicity_of(model, numbers, 0)
        )

    # -- helpers -------------------------------------------------------------------------------------------------

    def potential(self) -> Potential:
        """The model of `make`, made once per class."""
        cls = type(self)
        if "_made" not in cls.__dict__:
            cls._made = self.make().to(torch.float64).eval().requires_grad_(False)  # type: ignore[attr-defined]
        return cls._made  # type: ignore[attr-defined]

    def periodic(self) -> Potential:
        """The model with a long-range cutoff where periodic boxes need one."""
        model = copy.deepcopy(self.potential())
        if model.long_range and model.long_range_cutoff is None:
            model.long_range_cutoff = self.periodic_long_range_cutoff
        return model

    def needs(self, condition: bool, why: str) -> None:
        """Skip the running check unless it applies."""
        if not condition:
            raise unittest.SkipTest(f"{self.potential().family}: {why}")

    def boxes(self) -> list[Structure]:
        """A box wider than the cutoffs, and a skewed one that is narrower than them."""
        self.needs(not self.fixed_composition, "describes one molecule only")
        self.needs(self.potential().supports_periodic, "describes open systems only")
        wide = np.diag([12.0, 11.0, 13.0])
        narrow = np.array([[4.1, 0.0, 0.0], [1.3, 3.9, 0.0], [-1.1, 0.8, 4.3]])
        return [
            cluster(self.potential(), 9, seed=3).replace(cell=wide),
            crystal(self.potential(), 5, narrow, seed=4),
        ]

    # -- shared comparisons ----------------------------------------------------------------------------------------

    def run(self, model: Potential, *structures: Structure) -> Evaluation:
        """Energies and forces without a graph."""
        result = model.evaluate(model.batch(structures))
        for name in ("energy", "forces", "charges", "dipole", "spread", "force_spread"):
            value = getattr(result, name)
            setattr(result, name, None if value is None else value.detach())
        return result

    def same(
        self, what: str, actual: Evaluation, expected: Evaluation, turn: Tensor | None = None, loosen: float = 1.0
    ) -> None:
        """Energies, forces, charges, dipoles and spreads agree; vectors of `expected` are turned first."""
        turn = torch.eye(3, dtype=torch.float64) if turn is None else turn
        n = len(forces_of(actual))
        close(f"{what}: energy", actual.energy, expected.energy, self.energy_atol * n * loosen)
        close(f"{what}: forces", forces_of(actual), forces_of(expected) @ turn.T, self.force_atol * loosen)
        if actual.charges is not None and expected.charges is not None:
            close(f"{what}: charges", actual.charges, expected.charges, self.force_atol * loosen)
        if actual.dipole is not None and expected.dipole is not None:
            close(f"{what}: dipole", actual.dipole, expected.dipole @ turn.T, self.force_atol * loosen)
        if actual.spread is not None and expected.spread is not None:
            close(f"{what}: spread of the energy", actual.spread, expected.spread, self.energy_atol * n * loosen)
        if actual.force_spread is not None and expected.force_spread is not None:
            close(f"{what}: spread of the forces", actual.force_spread, expected.force_spread, self.force_atol * loosen)

    def check_gradient(self, model: Potential, structure: Structure, phi: Tensor | None = None) -> None:
        """Forces against fourth-order central differences, along random directions and of two atoms' coordinates."""
        rng = np.random.default_rng(10)
        n, h = len(structure), 2e-3
        directions = [d / np.linalg.norm(d) for d in rng.normal(size=(3, n, 3))]
        directions += [np.eye(3 * n)[k].reshape(n, 3) for k in rng.choice(3 * n, min(6, 3 * n), replace=False)]
        steps = [(k, d) for d in directions for k in (-2, -1, 1, 2)]
        batch = model.batch([structure.replace(positions=structure.positions + k * h * d) for k, d in steps])
        here = model.batch(structure)
        if phi is not None:
            batch = batch.replace(external_potential=phi.repeat(len(steps)))
            here = here.replace(external_potential=phi)
        energies = model.evaluate(batch, forces=False).energy.detach().numpy().reshape(-1, 4)
        numeric = -(energies @ np.array([1.0, -8.0, 8.0, -1.0])) / (12 * h)
        forces = forces_of(model.evaluate(here)).detach().numpy()
        close("forces and finite differences", [(forces * d).sum() for d in directions], numeric, self.gradient_atol)


def forces_of(evaluation: Evaluation) -> Tensor:
    assert evaluation.forces is not None, "forces: expected a tensor, got None"
    return evaluation.forces


def joined(parts: list[Evaluation]) -> Evaluation:
    def cat(name: str) -> Any:
        values = [getattr(p, name) for p in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("energy", "charges", "dipole", "spread", "forces", "force_spread")
    return Evaluation(**{name: cat(name) for name in names})
