"""Checks of the ways a potential is used: precision, the evaluator of MD, model files, OpenMM, bad input."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

from openmm_mlff.data import model_file
from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.potentials.neighbors import FIXED_PAIRS_MAX_ATOMS
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.testing.base import ContractBase, forces_of
from openmm_mlff.testing.systems import close, cluster, raises, run_copies, run_in_fresh_process
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV


class Usage(ContractBase):
    """Evaluators, precision, model files, OpenMM."""

    def test_float32_against_float64(self) -> None:
        self.needs(self.float32, "runs in double precision only")
        exact, single = self.potential(), copy.deepcopy(self.potential()).float()
        for structure in self.structures():
            reference = self.run(exact, structure)
            atol = self.float32_energy_atol * len(structure) + 2e-6
            for shift in (0.0, 400.0):  # far from the origin nothing may be lost
                result = single.evaluator(structure)(structure.positions + shift)
                close(f"float32 energy at {shift}", result.energy.double(), reference.energy, atol)
                close("float32 forces", forces_of(result).double(), forces_of(reference), self.float32_force_atol)

    def test_evaluator_equals_forward(self) -> None:
        """One evaluator through many moves against fresh pair lists; the list's reference restores the same bits."""
        model = self.potential()
        self.check_evaluator(model, self.structures())
        if not self.fixed_composition:
            rebuilt = self.check_evaluator(model, [cluster(model, FIXED_PAIRS_MAX_ATOMS + 4, seed=11)])
            assert 1 < rebuilt < 12, f"pair lists: expected a few rebuilds in 12 moves, got {rebuilt}"

    def test_evaluator_equals_forward_in_boxes(self) -> None:
        for structure in self.boxes():
            self.check_evaluator(self.periodic(), [structure], strain=0.01)

    def check_evaluator(self, model: Potential, structures: list[Structure], strain: float = 0.0) -> int:
        """Compare along a random walk; returns how often the pair lists were built."""
        rng = np.random.default_rng(12)
        outputs = ["energy", "forces", "dipole"] + (["charges"] if model.predicts_charges else [])
        function = model.evaluator(structures, outputs=outputs)
        for step in range(12):
            structures = [
                s.replace(
                    positions=s.positions + rng.normal(scale=0.04, size=s.positions.shape),
                    cell=None if s.cell is None else s.cell * (1.0 + strain * (step % 3 == 2)),
                )
                for s in structures
            ]
            positions = np.concatenate([s.positions for s in structures])
            cell = None if structures[0].cell is None else np.stack([np.asarray(s.cell) for s in structures])
            result, reference = function(positions, cell), self.run(model, *structures)
            reference.dipole = result.dipole if cell is not None else reference.dipole
            self.same(f"evaluator after {step + 1} moves", result, reference, loosen=10)
        self.check_restart(model, structures, function, positions, cell)
        return function.pairs.rebuilds

    def check_restart(
        self,
        model: Potential,
        structures: list[Structure],
        function: Evaluator,
        positions: np.ndarray,
        cell: np.ndarray | None,
    ) -> None:
        """A new evaluator whose lists are restored from the old one's reference positions gives the same bits."""
        again = model.evaluator(structures, outputs=function.outputs)
        again.pairs.restore(function.pairs.reference, function.pairs.reference_cell)
        first, second = function(positions, cell), again(positions, cell)
        assert torch.equal(first.energy, second.energy), "energy: differs after the pair lists were restored"
        assert torch.equal(forces_of(first), forces_of(second)), "forces: differ after the pair lists were restored"

    def test_model_file_round_trip(self) -> None:
        model, structures = self.potential(), self.structures()
        with tempfile.TemporaryDirectory() as folder:
            path = save_potential(model, Path(folder) / "model.safetensors", licence="none", description="contract")
            card = model_file.load_card(path)
            loaded = load_potential(path, sha256=model_file.sha256_of(path))
        assert card["family"] == model.family and card["elements"] == list(model.elements), "card: does not fit"
        assert type(loaded) is type(model), f"expected a {type(model).__name__}, got {type(loaded).__name__}"
        first, second = self.run(model, *structures), self.run(loaded.double(), *structures)
        assert torch.equal(first.energy, second.energy), "energy: differs after saving and loading"
        assert torch.equal(forces_of(first), forces_of(second)), "forces: differ after saving and loading"

    def test_openmm_in_a_fresh_process(self) -> None:
        """A System written as XML and the pickled force run in another process, after the model file has gone."""
        model, structure = self.potential(), self.structures()[0]
        expected = self.run(model, structure)
        forces = forces_of(expected).numpy() * KJ_PER_MOL_NM_PER_EV_ANGSTROM
        for name, (energy, found) in run_in_fresh_process(model, structure).items():
            close(f"{name}: energy (kJ/mol)", energy, float(expected.energy[0]) * KJ_PER_MOL_PER_EV, 1e-5)
            close(f"{name}: forces (kJ/mol/nm)", found, forces, 1e-4)

    def test_many_copies_in_one_system(self) -> None:
        """Copies in different geometries have the energies and forces of single molecules, copy by copy."""
        model, rng = self.potential(), np.random.default_rng(14)
        for structure in self.structures():
            moved = structure.positions + rng.normal(scale=0.02, size=(5, *structure.positions.shape))
            expected = self.run(model, *(structure.replace(positions=x) for x in moved))
            energies, forces = run_copies(model, structure, moved)
            atol = 1e-7 * len(structure)
            close("copies: energies (kJ/mol)", energies, expected.energy.numpy() * KJ_PER_MOL_PER_EV, atol)
            reference = forces_of(expected).numpy().reshape(moved.shape) * KJ_PER_MOL_NM_PER_EV_ANGSTROM
            close("copies: forces (kJ/mol/nm)", forces, reference, 1e-5)

    def test_refuses_what_it_cannot_describe(self) -> None:
        model, structure = self.potential(), self.structures()[0]
        stranger = next(z for z in range(1, len(SYMBOLS)) if z not in model.elements)
        raises("elements", model.batch, Structure(np.array([stranger]), np.zeros((1, 3))))
        if not model.supports_charge:
            raises("charge", model.batch, structure.replace(charge=2))
        if not model.supports_multiplicity:
            raises("multiplicity", model.batch, structure.replace(multiplicity=3))
        box = structure.replace(cell=20.0 * np.eye(3))
        if not model.supports_periodic:
            raises("cell", model.batch, box)
        elif model.long_range and model.long_range_cutoff is None:
            raises("longRangeCutoff", model.batch, box)
        if not model.predicts_charges:
            raises("charges", model.evaluator, structure, ("energy", "charges"))
