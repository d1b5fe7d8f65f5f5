"""Checks of one open structure: shapes, symmetries, derivatives, an external potential."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.testing.base import ContractBase, forces_of, joined
from openmm_mlff.testing.systems import close, derivative, raises, rotation, turned


class Mechanics(ContractBase):
    """Energy, forces, charges and dipoles as functions of the positions."""

    def test_shapes_and_dtypes(self) -> None:
        structures = self.structures()
        for dtype in (torch.float64, torch.float32) if self.float32 else (torch.float64,):
            model = copy.deepcopy(self.potential()).to(dtype)
            batch = model.batch(structures)
            result = model.evaluate(batch)
            n, atoms = len(structures), batch.n_atoms
            expected = {"energy": (n,), "forces": (atoms, 3), "charges": (atoms,), "dipole": (n, 3), "spread": (n,)}
            expected["force_spread"] = (atoms,)
            for name, shape in expected.items():
                value = getattr(result, name)
                if value is None:
                    required = name in ("energy", "forces") or (name == "charges" and model.predicts_charges)
                    assert not required, f"{name}: expected a tensor, got None"
                    continue
                assert tuple(value.shape) == shape, f"{name}: expected shape {shape}, got {tuple(value.shape)}"
                # totals of many atoms may be summed in double precision
                allowed = (dtype, torch.float64) if name in ("energy", "spread") else (dtype,)
                assert value.dtype in allowed, f"{name}: expected {dtype}, got {value.dtype}"
                assert bool(torch.isfinite(value).all()), f"{name}: expected finite numbers"
            atol = 1e-9 if dtype == torch.float64 else 1e-4
            if result.terms:
                close("sum of the terms", sum(result.terms.values()), result.energy, atol * atoms)
            if result.charges is not None:
                close("sum of the charges", batch.sum_by_structure(result.charges), batch.charge, atol)
        assert model.cutoff > 0 or not batch.pairs, "cutoff: expected a positive length"

    def test_batch_equals_singles(self) -> None:
        model, structures = self.potential(), self.structures()
        together = self.run(model, *structures[::-1], structures[0])
        alone = [self.run(model, s) for s in (*structures[::-1], structures[0])]
        self.same("batch and singles", together, joined(alone))

    def test_same_call_same_bits(self) -> None:
        model = self.potential()
        first, second = self.run(model, *self.structures()), self.run(model, *self.structures())
        assert torch.equal(first.energy, second.energy), "energy: differs between two identical calls"
        assert torch.equal(forces_of(first), forces_of(second)), "forces: differ between two identical calls"

    def test_forces_are_the_gradient(self) -> None:
        for structure in self.structures():
            self.check_gradient(self.potential(), structure)

    def test_forces_are_the_gradient_in_boxes(self) -> None:
        for structure in self.boxes():
            self.check_gradient(self.periodic(), structure)

    def test_rotation(self) -> None:
        model = self.potential()
        matrix = rotation(seed=1)
        for sign in (1.0, -1.0) if self.mirror_symmetric else (1.0,):
            for structure in self.structures():
                reference = self.run(model, structure)
                rotated = self.run(model, turned(structure, sign * matrix))
                self.same("rotated", rotated, reference, turn=torch.from_numpy(sign * matrix))

    def test_translation(self) -> None:
        model = self.potential()
        shift = np.array([501.3, -230.7, 77.1])
        for structure in self.structures():
            reference = self.run(model, structure)
            moved = self.run(model, structure.replace(positions=structure.positions + shift))
            if reference.dipole is not None:
                # the dipole of an ion follows the origin
                reference.dipole = reference.dipole + structure.charge * torch.from_numpy(shift)
            self.same("translated", moved, reference, loosen=100)

    def test_permutation(self) -> None:
        model, rng = self.potential(), np.random.default_rng(2)
        for structure in self.structures():
            order = rng.permutation(len(structure))
            if self.fixed_composition:  # only like atoms can be exchanged
                order = np.lexsort((rng.permutation(len(structure)), structure.numbers))
                order = order[np.argsort(np.argsort(structure.numbers, kind="stable"), kind="stable")]
            shuffled = structure.replace(numbers=structure.numbers[order], positions=structure.positions[order])
            reference = self.run(model, structure)
            reference.forces = forces_of(reference)[order]
            reference.charges = None if reference.charges is None else reference.charges[order]
            reference.force_spread = None if reference.force_spread is None else reference.force_spread[order]
            self.same("permuted", self.run(model, shuffled), reference)

    def test_forces_can_be_trained(self) -> None:
        """Parameter gradient of a loss of energies and forces, by double backward, against finite differences."""
        self.needs(self.trainable, "is not trained by gradients of its parameters")
        model = copy.deepcopy(self.potential()).requires_grad_(True)
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        generator = torch.Generator().manual_seed(5)
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        batch = model.batch(self.structures())
        weights = torch.randn(batch.n_atoms, 3, generator=generator, dtype=torch.float64)

        def loss() -> Tensor:
            result = model.evaluate(batch, create_graph=True)
            return result.energy.sum() + (weights * forces_of(result)).sum() + forces_of(result).square().sum()

        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        exact = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)

        def shifted(h: float) -> float:
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(h * d)
            value = float(loss().detach())
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(h * d)
            return value

        numeric = derivative(shifted, 1e-5)
        close("parameter gradient of a force loss", exact, numeric, 1e-5 * max(1.0, abs(numeric)))

    def test_external_potential(self) -> None:
        model = self.potential()
        structure = self.structures()[1]
        phi = torch.linspace(-0.8, 1.1, len(structure), dtype=torch.float64)
        batch = model.batch(structure)
        if not model.predicts_charges:
            raises("external_potential", model.evaluate, batch.replace(external_potential=phi))
            return
        free = model.evaluate(batch)
        assert free.charges is not None
        for scale in (-2.0, 0.5, 3.0):
            result = model.evaluate(batch.replace(external_potential=scale * phi))
            expected = free.energy + scale * (free.charges * phi).sum()
            close(f"energy in {scale} times a potential", result.energy, expected, 1e-10)
        self.check_gradient(model, structure, phi)
        moved = model.evaluator(structure, outputs=("energy", "forces", "charges"))(structure.positions, potential=phi)
        self.same("evaluator in a potential", moved, model.evaluate(batch.replace(external_potential=phi)))
