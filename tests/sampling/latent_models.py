"""Small propagators whose statistics are known: torsions of capped alanine, and the length of a diatomic molecule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openmm
from openmm import app

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.sampling.back_mapping import RelaxationSettings
from openmm_mlff.sampling.led_records import Frames, Return
from openmm_mlff.sampling.led_reporters import LEDReporter
from openmm_mlff.sampling.led_simulation import LEDSimulation
from openmm_mlff.sampling.propagators import LatentState, Propagator
from openmm_mlff.sampling.starts import set_torsion
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

#: a return in a hundredth of a second
QUICK = RelaxationSettings(restrained=0.02, free=0.08, iterations=100)
MakeLED = Callable[..., LEDSimulation]
#: phi and psi of ACE-ALA-NME
TORSIONS = np.array([[4, 6, 8, 14], [6, 8, 14, 16]])


class TorsionModel(Propagator):
    """phi and psi (radians) as a random walk with a pull to a point; decoding turns the torsions of a template.

    The memory counts the frames that it has seen, and enters every step, so that a run which loses it goes elsewhere.
    """

    latent_dim, interval, n_atoms, temperature = 2, 0.1, 22, 300.0
    centre = np.radians([-80.0, 140.0])

    def __init__(self, topology: app.Topology, template: np.ndarray, width: float = 0.1) -> None:
        self._names = [a.name for a in topology.atoms()]
        self._bonded = np.zeros((22, 22), dtype=bool)
        for a, b in topology.bonds():
            self._bonded[a.index, b.index] = self._bonded[b.index, a.index] = True
        self._template, self._width = template, width
        self.histories: list[np.ndarray] = []
        self.decoded: list[np.ndarray] = []

    def check_topology(self, topology: app.Topology) -> None:
        if [a.name for a in topology.atoms()] != self._names:
            raise ValueError("topology: expected that of the training data, capped alanine")

    def encode(self, positions: np.ndarray) -> np.ndarray:
        return np.radians(dihedral(positions, TORSIONS))

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        self.decoded += list(z.copy())
        found = []
        for phi, psi in np.degrees(z):
            x = set_torsion(self._template, self._bonded, TORSIONS[0].tolist(), float(phi))
            found.append(set_torsion(x, self._bonded, TORSIONS[1].tolist(), float(psi)))
        return np.array(found) + random.normal(0.0, 0.005, (len(z), 22, 3))

    def start(self, history: np.ndarray) -> LatentState:
        self.histories.append(history.copy())
        n, frames, _ = history.shape
        return LatentState(history[:, -1].copy(), {"seen": np.full((n, 1), float(frames))})

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        apart = (state.z - self.centre + np.pi) % (2 * np.pi) - np.pi
        drift = 0.05 * apart + 1e-3 * np.sin(state.memory["seen"])
        z = state.z - drift + self._width * random.normal(size=state.z.shape)
        return LatentState((z + np.pi) % (2 * np.pi) - np.pi, {"seen": state.memory["seen"] + 1.0})


class BondModel(Propagator):
    """The length (nm) of a diatomic molecule with a harmonic bond, drawn anew in every step.

    The distribution of the length r is r^2 exp(-k (r - r0)^2 / 2kT), whatever the dynamics; at this stiffness its mean
    is r0 + 2 kT/(k r0) and its variance kT/k, up to (kT / k r0^2)^2.
    """

    latent_dim, interval, n_atoms = 1, 0.05, 2
    length, stiffness = 0.2, 50_000.0

    def __init__(self, temperature: float = 300.0) -> None:
        self.temperature: float | None = temperature
        kt = BOLTZMANN_KJ_PER_MOL * temperature
        self.mean = self.length + 2.0 * kt / (self.stiffness * self.length)
        self.deviation = float(np.sqrt(kt / self.stiffness))

    def check_topology(self, topology: app.Topology) -> None:
        pass

    def encode(self, positions: np.ndarray) -> np.ndarray:
        return np.linalg.norm(positions[:, 1] - positions[:, 0], axis=-1)[:, None]

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        found = np.zeros((len(z), 2, 3))
        found[:, 1, 0] = z[:, 0]
        return found

    def start(self, history: np.ndarray) -> LatentState:
        return LatentState(history[:, -1].copy())

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        return LatentState(random.normal(self.mean, self.deviation, state.z.shape))


def diatomic() -> tuple[openmm.System, app.Topology, np.ndarray]:
    """The molecule of `BondModel`: two chlorine atoms."""
    system, topology = openmm.System(), app.Topology()
    residue = topology.addResidue("CL2", topology.addChain())
    atoms = [topology.addAtom(f"CL{k}", app.element.chlorine, residue) for k in (1, 2)]
    topology.addBond(*atoms)
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, BondModel.length, BondModel.stiffness)
    for _ in atoms:
        system.addParticle(35.45)
    system.addForce(bond)
    return system, topology, np.array([[0.0, 0, 0], [BondModel.length, 0, 0]])


class PlaceModel(Propagator):
    """Where a particle is in a harmonic well, drawn anew in every step from its Gaussian."""

    latent_dim, interval, n_atoms, temperature = 3, 0.05, 1, 300.0
    centre, stiffness = np.array([3.0, -2.0, 5.0]), 5000.0

    def check_topology(self, topology: app.Topology) -> None:
        pass

    def encode(self, positions: np.ndarray) -> np.ndarray:
        return positions[:, 0]

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return z[:, None]

    def start(self, history: np.ndarray) -> LatentState:
        return LatentState(history[:, -1].copy())

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        width = np.sqrt(BOLTZMANN_KJ_PER_MOL * 300.0 / self.stiffness)
        return LatentState(self.centre + width * random.normal(size=state.z.shape))


def particle() -> tuple[openmm.System, app.Topology, np.ndarray]:
    """The particle of `PlaceModel`, without an element."""
    system, topology = openmm.System(), app.Topology()
    topology.addAtom("P", None, topology.addResidue("P", topology.addChain()))
    x, y, z = PlaceModel.centre
    well = openmm.CustomExternalForce(f"0.5*{PlaceModel.stiffness}*((x-{x})^2+(y-({y}))^2+(z-{z})^2)")
    well.addParticle(0)
    system.addParticle(40.0)
    system.addForce(well)
    return system, topology, PlaceModel.centre[None].copy()


class Recorder(LEDReporter):
    """Keeps everything."""

    name = "recorder"

    def __init__(self) -> None:
        self.all: list[Frames] = []
        self.returns: list[Return] = []

    def frames(self, simulation: LEDSimulation, frames: Frames) -> None:
        self.all.append(frames)

    def returned(self, simulation: LEDSimulation, record: Return) -> None:
        self.returns.append(record)

    def of(self, walker: int) -> list[tuple[int, str]]:
        """Number and phase of every frame of a walker, in order."""
        return [
            (int(number), f.phase)
            for f in self.all
            for i in np.flatnonzero(f.walkers == walker)
            for number in f.numbers[i]
        ]
