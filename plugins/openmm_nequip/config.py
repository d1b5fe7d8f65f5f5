"""Hyperparameters of NequIP."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_MAX = 118
MAX_DEGREE = 2


@dataclass(frozen=True)
class NequIPConfig:
    """Hyperparameters; the defaults are those of ReSolv's two networks (Roecken, Burnet, Zavadlav 2024).

    Attributes:
        num_features: channels F of every irrep. num_layers: convolutions.
        irreps: degree and parity of the hidden features, '0e' among them; the order is that of the weights in a
            published file. Degrees 0 to 2.
        max_degree: of the spherical harmonics of an edge, 0 to 2.
        cutoff, cutoff_onset: angstrom; radial functions are switched off between the onset and the cutoff.
        num_basis_functions: Bessel functions. radial_layers, radial_features: hidden layers, and their width, of the
            network that makes the weights of messages from them.
        num_neighbors: what sums over neighbours are divided by.
        one_hot_length: length of the one-hot vectors that stood for elements in training. Rows of elements that a
            model does not know are dropped, but products with one-hot vectors keep the factor 1/sqrt(length).
        energy_scale, energy_shift: eV; the energy of a structure is scale * (sum of the network's output) + shift.
        elements: atomic numbers that the model was made for.
    """

    num_features: int = 64
    num_layers: int = 5
    irreps: tuple[str, ...] = ("0o", "0e", "1o", "1e", "2o", "2e")
    max_degree: int = 2
    cutoff: float = 4.0
    cutoff_onset: float = 3.5
    num_basis_functions: int = 8
    radial_layers: int = 3
    radial_features: int = 64
    num_neighbors: float = 15.0
    one_hot_length: int = 100
    energy_scale: float = 1.0
    energy_shift: float = 0.0
    elements: tuple[int, ...] = (1, 6, 7, 8, 16, 17)

    def __post_init__(self) -> None:
        object.__setattr__(self, "irreps", tuple(str(x) for x in self.irreps))
        object.__setattr__(self, "elements", tuple(int(x) for x in self.elements))
        lowest = {"num_features": 2, "num_layers": 1, "num_basis_functions": 1, "radial_layers": 0}
        lowest |= {"radial_features": 1, "max_degree": 0, "one_hot_length": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if not value >= least or int(value) != value:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
        if self.num_features % 2:
            raise ValueError(f"num_features: expected an even number, got {self.num_features}")
        if self.max_degree > MAX_DEGREE:
            raise ValueError(f"max_degree: expected 0 to {MAX_DEGREE}, got {self.max_degree}")
        known = [f"{degree}{parity}" for degree in range(MAX_DEGREE + 1) for parity in "oe"]
        if "0e" not in self.irreps or len(set(self.irreps)) < len(self.irreps) or not set(self.irreps) <= set(known):
            raise ValueError(f"irreps: expected '0e' and others among {', '.join(known)}, each once, got {self.irreps}")
        for name in ("cutoff", "num_neighbors", "energy_scale"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if not math.isfinite(self.energy_shift):
            raise ValueError(f"energy_shift: expected a finite energy (eV), got {self.energy_shift!r}")
        if not 0 <= self.cutoff_onset < self.cutoff:
            raise ValueError(
                f"cutoff_onset: expected a length from 0 to below the cutoff of {self.cutoff} angstrom, "
                f"got {self.cutoff_onset!r}"
            )
        distinct = sorted(set(self.elements))
        if not distinct or len(distinct) < len(self.elements) or distinct[0] < 1 or distinct[-1] > Z_MAX:
            raise ValueError(f"elements: expected atomic numbers 1 to {Z_MAX}, each once, got {self.elements}")
