"""latent state -> a structure of all atoms in its solvent, from which molecular dynamics go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from openmm_mlff.sampling.back_mapping import BackMapper, RelaxationReport
from openmm_mlff.sampling.led_dynamics import Walker
from openmm_mlff.sampling.led_records import LEDStatistics
from openmm_mlff.sampling.propagators import Propagator
from openmm_mlff.sampling.solvent import SolventBox


@dataclass(frozen=True)
class Rebuilt:
    """What became of one latent state.

    Attributes:
        walker: the structure, with velocities; None if none was accepted. reports: of all that were decoded.
        solvent_moved: solvent molecules that made way in the last of them.
    """

    walker: Walker | None
    reports: tuple[RelaxationReport, ...]
    solvent_moved: int


@dataclass(frozen=True)
class Rebuilder:
    """Decodes, puts the solute into the solvent of the walker's last structure of MD, and relaxes it."""

    model: Propagator
    solvent: SolventBox
    mapper: BackMapper
    statistics: LEDStatistics

    def __call__(
        self,
        z: np.ndarray,
        last: Walker,
        seed: int,
        parameters: Mapping[str, float],
        energy_limit: float,
    ) -> Rebuilt:
        """Rebuild a walker.

        Args:
            z: latent coordinates, ``(latent_dim,)``. last: structure of MD from before the latent steps.
            seed: of decoding and relaxing. parameters, energy_limit: see `BackMapper.relax`.
        """
        random = np.random.default_rng(seed)
        moved: list[int] = []

        def draw(attempt: int) -> np.ndarray:
            with self.statistics.timed("decode"):
                decoded = np.asarray(self.model.decode(z[None], random)[0], dtype=np.float64)
            if not np.isfinite(decoded).all():
                moved.append(0)
                return np.full_like(last.positions, np.nan)
            inserted = self.solvent.insert(last.positions, decoded, last.box, random)
            moved.append(len(inserted.moved))
            return inserted.positions

        with self.statistics.timed("relax", without="decode"):
            found = self.mapper.back_map(draw, seed, box=last.box, parameters=parameters, energy_limit=energy_limit)
        if found.found is None:
            return Rebuilt(None, found.reports, 0)
        walker = Walker(found.found.positions, found.found.velocities, last.box)
        return Rebuilt(walker, found.reports, moved[-1])
