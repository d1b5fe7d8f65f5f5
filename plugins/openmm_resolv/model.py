"""A ReSolv pair: a potential of the molecule in vacuum and one of the molecule in implicit water.

Roecken, Burnet, Zavadlav, J. Chem. Phys. 161, 234101 (2024): U_water is trained so that the free-energy difference
-kT ln(Z_water / Z_vacuum) is the experimental hydration free energy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from openmm_mlff.data.structures import Batch, Structure, check_charge_and_multiplicity
from openmm_mlff.potentials.composition import Interpolated
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.potential import Potential
from openmm_resolv.config import PHASES, ResolvConfig
from openmm_resolv.molecule import bonds_within_reach, check_one_molecule

#: OpenMM's global parameter of phase 'both'
LAMBDA = "lambda_solvation"


class ResolvPotential(Interpolated):
    """U_water, U_vacuum, or U = (1 - lambda) U_vacuum + lambda U_water, of one neutral closed-shell molecule.

    Args:
        water, vacuum: potentials of any family, or of two.
        phase: 'water', 'vacuum' or 'both'; in phase 'both' `coupling` is lambda, which starts at 1.

    Attributes:
        phases: all three, its own first.

    Raises `TypeError` for members that are no potentials, `ValueError` for another phase or members that share no
    elements.
    """

    family = "resolv"

    def __init__(self, *, water: Potential, vacuum: Potential, phase: str = "water") -> None:
        self._free = True
        super().__init__(vacuum, water)
        self.supports_charge = self.supports_multiplicity = self.supports_periodic = False
        self.charges = self.multiplicities = None
        self._enter(phase)

    def _enter(self, phase: str) -> None:
        self.config: ResolvConfig = ResolvConfig(phase)
        self.phases = (phase, *(name for name in PHASES if name != phase))
        self.implicit_solvent = phase != "vacuum"
        self.coupling_parameter = LAMBDA if phase == "both" else None
        self._free = True
        self.coupling = 0.0 if phase == "vacuum" else 1.0
        self._free = phase == "both"

    @property
    def phase(self) -> str:
        """'water', 'vacuum' or 'both'; `in_phase` makes the others."""
        return self.config.phase

    def in_phase(self, phase: str) -> ResolvPotential:
        """The pair in another phase, with the same two potentials; raises `ValueError` for an unknown one."""
        other = copy.copy(self)
        other._enter(phase)
        return other

    @property
    def coupling(self) -> float:
        return self._coupling

    @coupling.setter
    def coupling(self, value: float) -> None:
        if not self._free:
            raise ValueError(f"coupling: phase {self.phase!r} has none to set; expected phase 'both'")
        Interpolated.coupling.fset(self, value)  # type: ignore[attr-defined]

    @classmethod
    def compose(cls, config: Any, members: Mapping[str, Potential]) -> Self:
        if set(members) != {"vacuum", "water"}:
            raise ValueError(f"members: expected vacuum and water, got {', '.join(members) or 'none'}")
        return cls(water=members["water"], vacuum=members["vacuum"], phase=config.phase)

    def check_electrons(self, numbers: Sequence[int] | np.ndarray, charge: int, multiplicity: int) -> None:
        """Refuse a charge and multiplicity that no number of electrons can have, radicals among them."""
        check_charge_and_multiplicity(numbers, charge, multiplicity)
        super().check_electrons(numbers, charge, multiplicity)

    def check(self, structure: Structure) -> None:
        """Refuse what is not one neutral closed-shell molecule in open space, as far as its positions do not matter.

        ``structure.info`` may hold ``topology_bonds``, pairs of atoms, which say what hangs together.
        """
        if structure.cell is not None:
            raise ValueError(
                "cell: resolv describes one molecule in open space, and a box would put its implicit solvent between "
                "periodic images; expected none (topology.setPeriodicBoxVectors(None)), got periodic box vectors"
            )
        super().check(structure)
        bonds = structure.info.get("topology_bonds", ())
        if len(bonds):
            check_one_molecule(structure.numbers, bonds, "the bonds of the topology")

    def check_geometry(self, structure: Structure) -> None:
        """Refuse positions that are those of more than one molecule."""
        bonds = bonds_within_reach(structure.numbers, structure.positions)
        check_one_molecule(structure.numbers, bonds, "the distances of their atoms")

    def _make_evaluator(
        self, batch: Batch | list[Structure], outputs: tuple[str, ...], compile: bool | str
    ) -> Evaluator:
        """In phase 'water' or 'vacuum' the evaluator of that potential itself."""
        if self._free:
            return super()._make_evaluator(batch, outputs, compile)
        wanted = tuple(name for name in ("energy", "forces") if name in outputs) or ("energy",)
        return self.members[self.phase].evaluator(batch, wanted, compile)
