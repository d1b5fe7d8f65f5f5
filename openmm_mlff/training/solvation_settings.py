"""What a potential in water is trained with: molecules with their hydration free energies, and options."""

from __future__ import annotations

from dataclasses import dataclass, field

from openmm_mlff.data.structures import Structure
from openmm_mlff.sampling.molecule_runs import LangevinSettings


@dataclass(frozen=True)
class Target:
    """A molecule and what its free energy in water, minus that in vacuum, should be.

    Attributes:
        name: a file name. structure: where its simulation starts. free_energy: eV.
        split: 'train', or 'valid', whose molecules are simulated too and only say which round was best.
    """

    name: str
    structure: Structure
    free_energy: float
    split: str = "train"


@dataclass(frozen=True)
class SolvationOptions:
    """How a potential in water is trained.

    Attributes:
        sampling: of every simulation; its frames are what averages are taken over.
        rounds: simulations followed by steps of the optimiser. epochs: passes over the molecules in a round at most.
        least_effective: of N_eff / n; a molecule below it waits for the next round, where it is simulated again.
        smallest_effective: of N_eff / n of the molecules of a batch, that a step may bring them to.
        stale: share of waiting molecules that ends a round.
        batch_size: molecules per step. learning_rate, final_learning_rate: of Adam, in the first and the last round.
        warmup_steps: over which the learning rate rises: Adam's first steps are large in every parameter.
        average: a round ends with the mean of the parameters over the steps of its later half, not with the last ones.
        fit_elements: before errors are measured, add to the energy of each element what explains those of the training
            best (least squares). That moves free energies and no atom.
        clip_norm: largest 2-norm of the gradient. fluctuation: weight of the mean variance of du over the frames in
            the loss; keeps the potential in water near that in vacuum.
        processes: simulations at once, one thread each. threads: of torch for everything else.
        seed: of the simulations and the order of the molecules.
    """

    sampling: LangevinSettings = field(default_factory=LangevinSettings)
    rounds: int = 10
    epochs: int = 4
    least_effective: float = 0.9
    smallest_effective: float = 0.5
    stale: float = 0.5
    batch_size: int = 4
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 50
    average: bool = True
    fit_elements: bool = True
    clip_norm: float = 1000.0
    fluctuation: float = 0.0
    processes: int = 1
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs", "batch_size", "processes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        for name in ("least_effective", "smallest_effective", "stale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number above 0, up to 1, got {getattr(self, name)!r}")
        for name in ("learning_rate", "final_learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if not self.fluctuation >= 0:
            raise ValueError(f"fluctuation: expected a weight >= 0, got {self.fluctuation!r}")
