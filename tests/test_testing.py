"""The contract suite passes a right potential and catches wrong ones."""

from __future__ import annotations

import unittest
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openmm_mlff.data.structures import Batch, Pairs
from openmm_mlff.potentials.electrostatics import smeared_lattice_energy
from openmm_mlff.potentials.potential import Evaluation, Potential, Prediction
from openmm_mlff.testing import PotentialContract


@dataclass(frozen=True)
class MorseConfig:
    cutoff: float = 4.0


class Morse(Potential):
    """Morse pairs and charge transfer between neighbours, both ending smoothly at the cutoff."""

    family = "morse"
    predicts_charges = True
    elements = (1, 6, 8)

    def __init__(self, config: MorseConfig | None = None) -> None:
        super().__init__()
        self.config = config or MorseConfig()
        self.cutoff = self.config.cutoff
        self.depth = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.width = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))

    def pair_terms(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Directed pairs: distances, Morse energies, and the switch from 1 to 0 at the cutoff."""
        assert batch.pairs is not None
        r = batch.pair_vectors(batch.pairs).square().sum(-1).sqrt()
        t = (r / self.cutoff).clamp(max=0.999)
        switch = torch.exp(1.0 - 1.0 / (1.0 - t**2))
        decay = torch.exp(-self.width * (r - 1.2))
        return r, self.depth * (decay**2 - 2.0 * decay), switch

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        assert batch.pairs is not None
        i, j = batch.pairs.first, batch.pairs.second
        _, morse, switch = self.pair_terms(batch)
        energy = torch.zeros_like(batch.positions[:, 0]).index_add(0, i, 0.5 * morse * switch)
        difference = (batch.numbers[j] - batch.numbers[i]).to(switch.dtype)
        charges = torch.zeros_like(energy).index_add(0, i, 0.01 * difference * switch)
        dipole = batch.sum_by_structure(charges[:, None] * batch.positions)
        return Prediction(batch.sum_by_structure(energy), charges, dipole)


class TestMorse(PotentialContract):
    def make(self) -> Potential:
        return Morse()

    def test_model_file_round_trip(self) -> None:
        """No plugin registers this family, which the contract has to notice."""
        with pytest.raises(ValueError, match="morse"):
            super().test_model_file_round_trip()

    def test_openmm_in_a_fresh_process(self) -> None:
        with pytest.raises(Exception, match="morse"):
            super().test_openmm_in_a_fresh_process()

    def test_many_copies_in_one_system(self) -> None:
        with pytest.raises(Exception, match="morse"):
            super().test_many_copies_in_one_system()


class SharpCutoff(Morse):
    def pair_terms(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        r, morse, switch = super().pair_terms(batch)
        return r, morse, torch.ones_like(switch)


class KinkAtCutoff(Morse):
    def pair_terms(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        r, morse, _ = super().pair_terms(batch)
        return r, morse, (1.0 - r / self.cutoff).clamp(min=0)


class MixesStructures(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        prediction.energy = prediction.energy + 1e-6 * prediction.energy.sum()
        return prediction


class WrongForces(Morse):
    def evaluate(self, batch: Batch, forces: bool = True, create_graph: bool = False) -> Evaluation:
        result = super().evaluate(batch, forces, create_graph)
        result.forces = None if result.forces is None else 1.00001 * result.forces
        return result


class PrefersAnAxis(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        assert batch.pairs is not None
        vectors = batch.pair_vectors(batch.pairs)
        prediction.energy = prediction.energy + 1e-6 * vectors[:, 0].square().sum()
        return prediction


class KnowsTheOrigin(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        prediction.energy = prediction.energy + 1e-6 * batch.sum_by_structure(batch.positions.square().sum(-1))
        return prediction


class KnowsTheOrder(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        start = torch.cumsum(batch.counts, 0) - batch.counts
        assert prediction.charges is not None
        prediction.energy = prediction.energy + 1e-3 * prediction.charges[start]
        return prediction


class Handed(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        start = torch.cumsum(batch.counts, 0) - batch.counts
        a, b, c = (
            batch.positions[(start + k).clamp(max=batch.n_atoms - 1)] - batch.positions[start] for k in (1, 2, 3)
        )
        volume = (torch.linalg.cross(a, b) * c).sum(-1)
        prediction.energy = prediction.energy + 1e-4 * volume * (batch.counts > 3)
        return prediction


class FeelsEverything(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        prediction.energy = prediction.energy + 1e-3 * prediction.energy**2
        return prediction


class LosesCharge(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        assert prediction.charges is not None
        prediction.charges = prediction.charges + 1e-3
        return prediction


class NearestImageOnly(Morse):
    def batch(self, *args: Any, **kwargs: Any) -> Batch:
        batch = super().batch(*args, **kwargs)
        assert batch.pairs is not None
        seen: dict[tuple[int, int], tuple[float, int]] = {}
        length = batch.pair_vectors(batch.pairs).norm(dim=-1).tolist()
        for p, (i, j) in enumerate(zip(batch.pairs.first.tolist(), batch.pairs.second.tolist(), strict=True)):
            if (i, j) not in seen or length[p] < seen[i, j][0]:
                seen[i, j] = (length[p], p)
        keep = torch.tensor(sorted(p for _, p in seen.values()), dtype=torch.int64)
        offsets = batch.pairs.offsets
        chosen = Pairs(batch.pairs.first[keep], batch.pairs.second[keep], None if offsets is None else offsets[keep])
        return batch.replace(pairs=chosen)


class ChargesIgnoreForces(Morse):
    def in_field(self, batch: Batch, prediction: Prediction) -> Prediction:
        if prediction.charges is not None:
            prediction.charges = prediction.charges.detach()
        return super().in_field(batch, prediction)


class RoundsToSingle(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        rounded = batch.at(batch.positions.float().to(batch.positions.dtype), batch.cell)
        return super().predict(rounded, fixed)


class FreezesWhatMoves(Morse):
    def fixed(self, batch: Batch) -> Any:
        return self.pair_terms(batch)[0].sum() * 1e-4

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        prediction.energy = prediction.energy + fixed.detach()
        return prediction


class CutsTheGraph(Morse):
    def pair_terms(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        r, morse, switch = super().pair_terms(batch)
        # the value is right; its derivative by the positions does not know that it depends on the depth
        return r, morse.detach() + (morse / self.depth - (morse / self.depth).detach()) * self.depth.detach(), switch


class NotANumberAlone(Morse):
    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        prediction.energy = prediction.energy * (batch.counts - 1) / (batch.counts - 1)
        return prediction


class Lattice(Morse):
    """Its charges also interact with all their images, where it is asked for."""

    long_range_methods = ("shifted", "ewald", "pme")

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        prediction = super().predict(batch, fixed)
        if self.long_range_method != "shifted":
            assert prediction.charges is not None
            prediction.energy = prediction.energy + self.lattice_energy(batch, prediction.charges)
        return prediction

    def lattice_energy(self, batch: Batch, charges: Tensor) -> Tensor:
        return smeared_lattice_energy(charges, batch, 4.0, self.long_range_method, 14.4)


class TestLattice(TestMorse):
    def make(self) -> Potential:
        return Lattice()


class FreezesCharges(Lattice):
    def lattice_energy(self, batch: Batch, charges: Tensor) -> Tensor:
        return super().lattice_energy(batch, charges.detach())


class KnowsTheCell(Lattice):
    def lattice_energy(self, batch: Batch, charges: Tensor) -> Tensor:
        assert batch.cell is not None
        return super().lattice_energy(batch, charges) + 1e-4 * batch.cell.square().sum((1, 2))


class CoarseMesh(Lattice):
    def lattice_energy(self, batch: Batch, charges: Tensor) -> Tensor:
        return super().lattice_energy(batch, charges) * (1.001 if self.long_range_method == "pme" else 1.0)


class ForgetsTheBox(Lattice):
    def lattice_energy(self, batch: Batch, charges: Tensor) -> Tensor:
        self.kept = getattr(self, "kept", batch.cell)
        return super().lattice_energy(batch.at(batch.positions, self.kept), charges)


class IgnoresTheLackOfABox(Lattice):
    def lattice_energy(self, batch: Batch, charges: Tensor) -> Tensor:
        return charges.sum()[None] if batch.cell is None else super().lattice_energy(batch, charges)


CAUGHT_BY = {
    FreezesCharges: "test_gradients_of_lattice_sums",
    KnowsTheCell: "test_images_of_lattice_sums",
    CoarseMesh: "test_lattice_sums_agree",
    ForgetsTheBox: "test_lattice_sums_in_the_evaluator",
    IgnoresTheLackOfABox: "test_open_systems_have_no_images",
    SharpCutoff: "test_smooth_at_the_cutoffs",
    KinkAtCutoff: "test_smooth_at_the_cutoffs",
    MixesStructures: "test_batch_equals_singles",
    WrongForces: "test_forces_are_the_gradient",
    PrefersAnAxis: "test_rotation",
    KnowsTheOrigin: "test_translation",
    KnowsTheOrder: "test_permutation",
    Handed: "test_rotation",
    FeelsEverything: "test_separated_fragments",
    LosesCharge: "test_shapes_and_dtypes",
    NearestImageOnly: "test_pairs_are_all_images",
    ChargesIgnoreForces: "test_external_potential",
    RoundsToSingle: "test_translation",
    FreezesWhatMoves: "test_evaluator_equals_forward",
    CutsTheGraph: "test_forces_can_be_trained",
    NotANumberAlone: "test_one_atom",
}


def contract_of(model: type[Morse]) -> PotentialContract:
    class Contract(PotentialContract):
        def make(self) -> Potential:
            return model()

    return Contract()


@pytest.mark.parametrize("model", CAUGHT_BY, ids=lambda m: m.__name__)
def test_wrong_potentials_are_caught(model: type[Morse]) -> None:
    with pytest.raises(AssertionError):
        getattr(contract_of(model), CAUGHT_BY[model])()


@pytest.mark.parametrize(
    ("model", "check"),
    [
        (FeelsEverything, "test_supercells"),
        (NearestImageOnly, "test_supercells"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_more_checks_catch_them(model: type[Morse], check: str) -> None:
    with pytest.raises(AssertionError):
        getattr(contract_of(model), check)()


def test_a_family_says_what_it_does_not_promise() -> None:
    contract = contract_of(FeelsEverything)
    type(contract).separable = False
    type(contract).extensive = False
    contract.test_separated_fragments()
    with pytest.raises(unittest.SkipTest):
        contract.test_supercells()


def test_make_is_required() -> None:
    with pytest.raises(NotImplementedError, match="make"):
        PotentialContract().potential()
