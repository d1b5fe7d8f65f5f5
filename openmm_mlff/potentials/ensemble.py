"""Several models of one kind, trained from different seeds, as one potential that knows where it is unsure.

E = mean_m E_m; where the members disagree, none of them has seen what it is asked about (query by committee: Seung,
Opper, Sompolinsky, COLT 1992; for potentials: Smith et al., J. Chem. Phys. 148, 241733 (2018)). The spread comes from
the evaluation that gives the energy and forces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Batch, Structure, collate
from openmm_mlff.potentials.composition import Composite, CompositeEvaluator, CompositePairs, member_batch
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.family import Family, load_potential, make_card, save_potential
from openmm_mlff.potentials.native_evaluator import Found, NativeEvaluator
from openmm_mlff.potentials.potential import Evaluation, Potential, Prediction


@dataclass(frozen=True)
class EnsembleConfig:
    """What belongs to the ensemble; everything else belongs to its members.

    Attributes:
        n_members: how many there are.
        energy_factor, force_factor: uncertainty = factor * spread, as calibrated on validation data; 1 if it was not.
        force_limit: eV/angstrom; an uncertainty of a force above it means that the model has left its domain. None:
            nobody has said.
    """

    n_members: int = 2
    energy_factor: float = 1.0
    force_factor: float = 1.0
    force_limit: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.n_members, bool) or not isinstance(self.n_members, int) or self.n_members < 2:
            raise ValueError(f"n_members: expected a whole number >= 2, got {self.n_members!r}")
        for name in ("energy_factor", "force_factor", "force_limit"):
            value = getattr(self, name)
            if value is None and name == "force_limit":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")


class Ensemble(Composite):
    """E = mean of the members' energies, with their spread as uncertainty.

    The spread of an energy is the standard deviation over members (of the sample: with M - 1), that of the force on an
    atom the root of the variance summed over x, y and z. Charges and dipoles are means too, so that an ensemble of
    models with charges can be embedded electrostatically: dE/dphi_i = mean q_i.

    Args:
        members: two or more potentials of one family with the same config; their parameters differ.
        energy_factor, force_factor, force_limit: see `EnsembleConfig`.

    Raises `TypeError` for a member that is no potential, `ValueError` for fewer than two members, members that are
    ensembles or pairs themselves, or members of different families or configs.
    """

    family = "ensemble"

    def __init__(
        self,
        members: Sequence[Potential],
        energy_factor: float = 1.0,
        force_factor: float = 1.0,
        force_limit: float | None = None,
    ) -> None:
        every = list(members)
        _check_members(every)
        super().__init__({member_name(k): member for k, member in enumerate(every)})
        self.config: EnsembleConfig = EnsembleConfig(len(every), energy_factor, force_factor, force_limit)
        first = every[0]
        self.predicts_charges = first.predicts_charges
        self.supports_periodic, self.fixed_lattice = first.supports_periodic, first.fixed_lattice

    @property
    def weights(self) -> dict[str, float]:
        return dict.fromkeys(self._names, 1.0 / len(self._names))

    @classmethod
    def compose(cls, config: Any, members: Mapping[str, Potential]) -> Self:
        names = [member_name(k) for k in range(config.n_members)]
        if set(members) != set(names):
            raise ValueError(f"members: expected {', '.join(names)}, got {', '.join(members) or 'none'}")
        return cls([members[name] for name in names], config.energy_factor, config.force_factor, config.force_limit)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch, fixed: dict[str, Any]) -> Prediction:
        every = [m.predict(member_batch(m, batch), fixed[name]) for name, m in self.members.items()]
        return _mean([Evaluation(**vars(p)) for p in every])

    def forward(self, batch: Batch) -> Prediction:
        """As in the base class; the spread is that in the external potential, if there is one."""
        every = [m(member_batch(m, batch)) for m in self.members.values()]
        return _mean([Evaluation(**vars(p)) for p in every])

    def evaluate(self, batch: Batch, forces: bool = True, create_graph: bool = False) -> Evaluation:
        """As in the base class, with every member's own forces. The spreads hold no graph."""
        if batch.external_potential is not None and not self.predicts_charges:
            self._refuse_field(batch.external_potential)
        return _mean([m.evaluate(member_batch(m, batch), forces, create_graph) for m in self.members.values()])

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> Evaluator:
        """Spreads cost nothing more, so they are there whether or not `outputs` names them."""
        return EnsembleEvaluator(self, batch, outputs, compile)


class EnsembleEvaluator(NativeEvaluator, CompositeEvaluator):
    """``f(positions, cell=None, potential=None) -> Evaluation`` of all members: as one, or by their own evaluators.

    Args of the constructor: see `Potential.evaluator`. With ``compile`` True or 'auto' the members run as one where
    their family can do that (`Potential.together`) and this gives the torch form's numbers (see `NativeEvaluator`).

    Attributes:
        evaluators: those of the members, by name; empty while they run as one.
        pairs: the pair lists of what runs (see `CompositePairs`).
        spreads: of the last call.
    """

    model: Ensemble
    pairs: CompositePairs
    _complaint = "the members as one and one by one disagree by %.1e eV/angstrom; running one by one"

    def __init__(
        self, model: Ensemble, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str = False
    ) -> None:
        model.eval()
        model.check_outputs(outputs, compile)
        self.model = model
        self.outputs, self.compile = outputs, compile
        self._given, self._batch = batch, batch if isinstance(batch, Batch) else collate(batch)
        self._periodic = self._batch.cell is not None
        self.evaluators = {}
        if compile is not False:
            self._native = self._models[0].together(self._models, self._batch)
        if self._native is None:
            self._fall_back()
        else:
            self.pairs = self._native.pairs  # type: ignore[assignment]

    @property
    def _models(self) -> list[Potential]:
        return list(self.model.members.values())

    def _fall_back(self) -> None:
        """Run the members one after the other."""
        self._native = None
        wanted = tuple(dict.fromkeys(("energy", *(name for name in self.outputs if name != "spread"))))
        members = self.model.members.items()
        self.evaluators = {name: m.evaluator(self._given, wanted, self.compile) for name, m in members}
        self.pairs = CompositePairs(self.evaluators, self.model.device)

    def __call__(
        self,
        positions: Tensor | np.ndarray,
        cell: Tensor | np.ndarray | None = None,
        potential: Tensor | np.ndarray | None = None,
    ) -> Evaluation:
        """Evaluate at new positions; arguments as in the base class."""
        if potential is not None and not self.model.predicts_charges:
            self.model._refuse_field(potential)
        found = self._natively(positions, cell, potential)
        if found is not None:
            result = self._evaluation(found, positions)
        else:
            active = self.model.weights
            self.pairs.before(active)
            every = [evaluator(positions, cell, potential) for evaluator in self.evaluators.values()]
            self.pairs.after(active, positions, cell)
            result = _mean([dataclasses.replace(r, terms={}) for r in every])
        assert result.spread is not None
        if result.force_spread is not None:
            self.spreads = (_float64(result.spread), _float64(result.force_spread))
        return result

    def arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean energies ``(n_structures,)`` eV and forces ``(n_atoms, 3)`` eV/angstrom, float64; sets `spreads`."""
        energies, forces = self.member_arrays(positions, cell)
        self.spreads = spread_of(energies, forces)
        return energies.mean(axis=0), forces.mean(axis=0)

    def member_arrays(self, positions: np.ndarray, cell: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Every member's energies ``(n_members, n_structures)`` eV and forces ``(n_members, n_atoms, 3)`` eV/angstrom,
        float64."""
        found = self._natively(positions, cell)
        if found is not None:
            return found[:2]
        active = self.model.weights
        self.pairs.before(active)
        every = [evaluator.arrays(positions, cell) for evaluator in self.evaluators.values()]
        self.pairs.after(active, positions, cell)
        return np.stack([e for e, _ in every]), np.stack([f for _, f in every])

    def _evaluation(self, found: Found, positions: Tensor | np.ndarray) -> Evaluation:
        """The means of all members and their spreads, whether or not these are wanted."""
        energies, forces, charges = found
        means = (energies.mean(0)[None], forces.mean(0)[None], None if charges is None else charges.mean(0)[None])
        result = super()._evaluation(means, positions)
        energy_spread, force_spread = spread_of(energies, forces)
        result.spread = torch.from_numpy(energy_spread)
        if result.forces is not None:
            result.force_spread = torch.from_numpy(force_spread)
        return result


# -- means and spreads ---------------------------------------------------------------------------------------------


def spread_of(energies: np.ndarray, forces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread of energies ``(n_members, n)`` and of forces ``(n_members, n_atoms, 3)``: ``(n,)`` and ``(n_atoms,)``.

    The standard deviation over members (with M - 1), and for forces the root of the variance summed over x, y, z.
    """
    return energies.std(axis=0, ddof=1), np.sqrt(forces.var(axis=0, ddof=1).sum(axis=-1))


def _mean(every: Sequence[Evaluation]) -> Evaluation:
    """Means of what all members have, and the spreads of energies and forces."""
    energies = torch.stack([r.energy for r in every])
    result = Evaluation(energies.mean(0), spread=energies.detach().std(0))
    for name in ("charges", "dipole", "forces"):
        values = [getattr(r, name) for r in every]
        if all(v is not None for v in values):
            setattr(result, name, torch.stack(values).mean(0))
    forces = [r.forces.detach() for r in every if r.forces is not None]
    if len(forces) == len(every):
        result.force_spread = torch.stack(forces).var(0).sum(-1).sqrt()
    for name in every[0].terms:
        if all(name in r.terms for r in every):
            result.terms[name] = torch.stack([r.terms[name] for r in every]).mean(0)
    return result


def _float64(values: Tensor) -> np.ndarray:
    return values.detach().to("cpu", torch.float64).numpy()


# -- members and files -----------------------------------------------------------------------------------------------


def member_name(k: int) -> str:
    """The name of member `k`, prefix of its tensors in the model file."""
    return f"member{k}"


def _check_members(members: Sequence[Any]) -> None:
    for k, member in enumerate(members):
        if not isinstance(member, Potential):
            raise TypeError(f"members: expected potentials, got a {type(member).__name__} at place {k}")
        if isinstance(member, Composite):
            raise ValueError(f"members: expected single models, got a {member.family!r} of several at place {k}")
    if len(members) < 2:
        raise ValueError(f"members: expected at least two, got {len(members)}")
    first = members[0]
    for k, member in enumerate(members):
        if member.family != first.family:
            raise ValueError(f"members: expected one family, got {first.family!r} and {member.family!r}")
        mine, other = (dataclasses.asdict(m.config) for m in (first, member))
        differing = [name for name in mine if mine[name] != other.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"members: expected one config, got {name} = {mine[name]!r} for member 0 and {other[name]!r} for "
                f"member {k}"
            )


def save_ensemble(
    members: Sequence[Potential | str | Path],
    path: str | Path,
    calibration: Mapping[str, float] | None = None,
    **card: Any,
) -> Path:
    """Write members as one model file that ``MLPotential('ensemble', modelPath=...)`` runs.

    Args:
        members: potentials, or model files, whose own cards (training data, licence, ...) are then kept.
        calibration: any of ``energy_factor``, ``force_factor``, ``force_limit`` (see `EnsembleConfig`).
        card: fields of the ensemble's card (see `model_file.CARD_FIELDS`).

    Returns the path; raises what `Ensemble` and `load_potential` raise, and `ValueError` for an unknown name in
    `calibration`.
    """
    factors = dict(calibration or {})
    known = [f.name for f in dataclasses.fields(EnsembleConfig) if f.name != "n_members"]
    unknown = sorted(set(factors) - set(known))
    if unknown:
        raise ValueError(f"calibration: expected names among {', '.join(known)}, got {unknown[0]!r}")
    given = list(members)
    models = [load_potential(m) if isinstance(m, str | Path) else m for m in given]
    ensemble = Ensemble(models, **factors)
    cards = {}
    for k, (source, model) in enumerate(zip(given, models, strict=True)):
        own = {}
        if isinstance(source, str | Path) and model_file.is_model_file(source):
            own = {key: value for key, value in model_file.load_card(source).items() if key != "format_version"}
        cards[member_name(k)] = {**make_card(model), **own}
    return save_potential(ensemble, path, members=cards, **card)


family = Family(name="ensemble", model=Ensemble, config=EnsembleConfig)
