"""learned latent dynamics: positions -> latent state -> many steps later -> positions.

A propagator knows a low-dimensional latent state of a molecule: it encodes positions, advances latent states by a fixed
interval of time, and samples positions that belong to a latent state. It is trained on trajectories and kept in a model
file of kind ``propagator``; plugins that can read one register in the entry-point group ``openmm_mlff.propagators``.

Units are OpenMM's: nm, ps; arrays have the walker as their first axis.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_mlff import _plugins
from openmm_mlff.data import model_file

if TYPE_CHECKING:
    import torch
    from openmm import app

#: entry-point group: name of a family -> its `PropagatorFamily`
GROUP = "openmm_mlff.propagators"


@dataclass(frozen=True)
class LatentState:
    """Where walkers are, and what they remember.

    Attributes:
        z: latent coordinates, ``(n, latent_dim)``.
        memory: hidden states by name, first axis n; empty for a propagator without memory.
    """

    z: np.ndarray
    memory: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.z)

    def select(self, walkers: np.ndarray) -> LatentState:
        """Some of the walkers, by index or mask."""
        return LatentState(self.z[walkers], {name: value[walkers] for name, value in self.memory.items()})

    def replace(self, walkers: np.ndarray, other: LatentState) -> LatentState:
        """The same with these walkers taken from `other`, which has as many."""
        z = self.z.copy()
        z[walkers] = other.z
        memory = {name: value.copy() for name, value in self.memory.items()}
        for name, value in memory.items():
            value[walkers] = other.memory[name]
        return LatentState(z, memory)


class Propagator(abc.ABC):
    """Latent dynamics of one molecule.

    Attributes:
        latent_dim: of the latent state. interval: time of one step, ps. n_atoms: of the positions that go in and out
            (all atoms of the molecule, hydrogens included, without solvent). temperature: of the training data, K, or
            None if unknown.
    """

    latent_dim: int
    interval: float
    n_atoms: int
    temperature: float | None

    @abc.abstractmethod
    def check_topology(self, topology: app.Topology) -> None:
        """Raise `ValueError` unless this is the topology of the training data (elements, names, bonds, in order)."""

    @abc.abstractmethod
    def encode(self, positions: np.ndarray) -> np.ndarray:
        """Latent coordinates ``(n, latent_dim)`` of positions ``(n, n_atoms, 3)`` nm, molecules whole."""

    @abc.abstractmethod
    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A sample of positions ``(n, n_atoms, 3)`` nm for latent coordinates ``(n, latent_dim)``."""

    @abc.abstractmethod
    def start(self, history: np.ndarray) -> LatentState:
        """The state after a known past: ``(n, n_frames, latent_dim)``, one `interval` apart, the last one now."""

    @abc.abstractmethod
    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        """A sample of the state one `interval` later."""

    def run(self, state: LatentState, n_steps: int, random: np.random.Generator) -> tuple[np.ndarray, LatentState]:
        """`n_steps` steps; returns the latent coordinates after each, ``(n, n_steps, latent_dim)``, and the state."""
        path = np.empty((len(state), n_steps, self.latent_dim))
        for k in range(n_steps):
            state = self.step(state, random)
            path[:, k] = state.z
        return path, state

    def doubt(self, state: LatentState) -> np.ndarray:
        """How little the training data support each walker, ``(n,)``; above 1 the model should not be trusted."""
        return np.zeros(len(state))


@dataclass(frozen=True)
class PropagatorFamily:
    """What a plugin registers: `read` makes a propagator from the card and the tensors of a model file."""

    name: str
    read: Callable[[dict[str, Any], dict[str, torch.Tensor]], Propagator]


def load_propagator(path: str | Path) -> Propagator:
    """Read a model file of kind ``propagator``.

    Raises `FileNotFoundError`, or `ValueError` for a file that is damaged, foreign, or a model of another kind.
    """
    card, tensors = model_file.load(path)
    if card["kind"] != "propagator":
        raise ValueError(f"model: {Path(path).name} is of kind {card['kind']!r}, expected 'propagator'")
    family = _plugins.load(GROUP, card["family"])
    if not isinstance(family, PropagatorFamily):
        raise ImportError(
            f"model: the plugin of {card['family']!r} registers a {type(family).__name__}, expected a PropagatorFamily"
        )
    return family.read(card, tensors)
