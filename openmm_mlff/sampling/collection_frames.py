"""a system and a reference method -> its start structures, its frames, and their labels.

Positions in angstrom, energies in eV, temperatures in kelvin, times in femtoseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm

from openmm_mlff.data import assembling
from openmm_mlff.data.classes import Topology, class_of_frame
from openmm_mlff.data.parts import Part, make_part
from openmm_mlff.data.reference import LabelError, ReferenceMethod
from openmm_mlff.data.shards import write_shard
from openmm_mlff.data.structures import Structure, check_charge_and_multiplicity
from openmm_mlff.sampling.collection_systems import PartSpec, System
from openmm_mlff.sampling.thermal import Held, NormalModes, dynamics, rattled, relax

#: held hydrogens stay this close (angstrom) to their nitrogen or oxygen, or sulfur ...
LONGEST_BOND, LONGEST_SULFUR_BOND = 1.15, 1.5
#: ... and, in two of three conformers, those of cationic groups this far from anionic ones
SHORTEST_CONTACT = 1.85
#: frames of a "release" are this far apart, femtoseconds, and one of them has so many
RELEASE_STRIDE, RELEASE_FRAMES = 4.0, 10
#: modes of a conformer are worth their Hessian from this number of frames on
_FRAMES_PER_HESSIAN = 8


@dataclass(frozen=True)
class Frame:
    """Positions ``(n_atoms, 3)`` with what the data card should know of them."""

    positions: np.ndarray
    info: Mapping[str, Any]


class Sampler:
    """Makes the frames of one system.

    Args:
        system: what to sample. method: drives. Everything random follows from the system's seed.

    Attributes:
        topology: what was built. charge, multiplicity: of every frame.
        failures: what went wrong on the way, by name; the rest goes on.

    Raises `ValueError` for molecules that cannot be built, or an impossible charge or multiplicity.
    """

    def __init__(self, system: System, method: ReferenceMethod) -> None:
        self.system, self.method = system, method
        self.options = system.sampling
        self.parts = [self._part(spec, k) for k, spec in enumerate(system.parts)]
        water = PartSpec("water", "O", "O")
        shapes = [*self.parts, *[self._part(water, -1)] * system.waters]
        self.topology = Topology.of(shapes)
        self.charge = sum(
            part.charge if spec.charge is None else spec.charge
            for part, spec in zip(self.parts, system.parts, strict=True)
        )
        self.multiplicity = system.multiplicity
        if self.multiplicity is None:
            self.multiplicity = self.parts[0].multiplicity if len(self.parts) == 1 else 1
        for multiplicity in (self.multiplicity, *system.also):
            check_charge_and_multiplicity(self.topology.numbers, self.charge, multiplicity)
        self.failures: dict[str, str] = {}
        self._modes = functools.cache(self._find_modes)
        self._thermal_parts = functools.cache(self._find_part_modes)
        self._starts = functools.cache(self._find_start)

    def _part(self, spec: PartSpec, k: int) -> Part:
        """Conformers of a part; the seed is that of the system and the part's place in it."""
        own = dict(zip(("conformers", "seed"), (self.options.conformers, self.system.seed + k), strict=True))
        # the parity of a spin state that the SMILES does not know is checked for everything together
        return make_part(spec.name, spec.smiles, **own)

    def rng(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.system.seed, *what.encode()])

    def structure(self, positions: np.ndarray) -> Structure:
        return Structure(self.topology.numbers, positions, self.charge, self.multiplicity or 1)

    def driver(self, conformer: int) -> ReferenceMethod:
        """The method, with the protons held if the system wants it."""
        if self.options.hold == "nothing":
            return self.method
        bonds = self.topology.polar_bonds()
        sulfur = self.topology.numbers[bonds[:, 1]] == 16
        longest = np.where(sulfur, LONGEST_SULFUR_BOND, LONGEST_BOND)
        contacts = np.empty((0, 2), dtype=np.int64) if self._loose(conformer) else self.topology.opposite_contacts()
        return Held(self.method, bonds, longest, contacts, np.full(len(contacts), SHORTEST_CONTACT))

    def _loose(self, conformer: int) -> bool:
        """Whether protons of this conformer, though held, may come close to where they want to go."""
        conformer %= self.options.conformers
        return conformer % 3 == 2 or conformer == self.options.conformers - 1

    # starts

    def built(self, conformer: int) -> np.ndarray:
        """Positions of a start as it was put together. Raises `RuntimeError` if it cannot be."""
        rng = self.rng(f"built {conformer}")
        shapes = [part.conformers[conformer % len(part.conformers)] for part in self.parts]
        kind = self.system.kind
        if kind in ("molecule", "stretch"):
            return shapes[0]
        if kind == "pair":
            return self._pair(shapes, self.options.contact, rng)
        if kind == "apart":
            return self._apart(shapes, float(rng.choice(self.options.distances)), rng)
        positions = np.empty((0, 3))
        numbers = np.empty(0, dtype=np.int64)
        for part, shape in zip(self.parts, shapes, strict=True):
            if len(positions):
                shape = assembling.place_apart(positions, shape, 2.2, rng)
            positions, numbers = np.concatenate([positions, shape]), np.concatenate([numbers, part.numbers])
        charges = np.concatenate([np.empty(0), *(self._rough_charges(part) for part in self.parts)])
        return assembling.add_waters(numbers, positions, charges, self.system.waters, rng)[1]

    @staticmethod
    def _rough_charges(part: Part) -> np.ndarray:
        """Formal charges, and dipoles along polar bonds, as good as turning waters needs."""
        charges = part.formal_charges.astype(np.float64)
        for i, j in part.bonds.tolist():
            for h, x in ((i, j), (j, i)):
                if part.numbers[h] == 1 and part.numbers[x] in (7, 8):
                    charges[h] += 0.35
                    charges[x] -= 0.35
                elif part.numbers[h] == 6 and part.numbers[x] == 8:
                    charges[h] += 0.3
                    charges[x] -= 0.3
        return charges

    def _pair(self, shapes: list[np.ndarray], distance: float, rng: np.random.Generator) -> np.ndarray:
        first, second = self.parts
        marks = [part.marks.get(1, 0) for part in self.parts]
        moved = assembling.place_in_contact(
            (first.numbers, shapes[0], first.bonds, marks[0]),
            (second.numbers, shapes[1], second.bonds, marks[1]),
            distance,
            rng,
        )
        return np.concatenate([shapes[0], moved])

    def _apart(self, shapes: list[np.ndarray], gap: float, rng: np.random.Generator) -> np.ndarray:
        positions = shapes[0]
        for shape in shapes[1:]:
            positions = np.concatenate([positions, assembling.place_apart(positions, shape, gap, rng)])
        return positions

    def start(self, conformer: int) -> np.ndarray | None:
        """Relaxed positions; None (and a failure) if the method fails."""
        positions: np.ndarray | None = self._starts(conformer % self.options.conformers)
        return positions

    def _find_start(self, conformer: int) -> np.ndarray | None:
        try:
            structure = self.structure(self.built(conformer))
            return relax(structure, self.driver(conformer), self.options.relax)
        except (RuntimeError, ValueError) as error:
            self.failures[f"start {conformer}"] = str(error)
            return None

    # frames

    def frames(self) -> Iterator[Frame]:
        """All frames, way by way; what fails is left out and noted in `failures`."""
        if len(self.topology.numbers) == 1:
            yield Frame(np.zeros((1, 3)), {"source": "free atom"})
            return
        for way, count in self.counts().items():
            yield from getattr(self, f"_by_{way}")(count)

    def counts(self) -> dict[str, int]:
        """Frames by way."""
        shares = dict(self.options.shares)
        if len(self.topology.numbers) > self.options.modes_up_to and "modes" in shares:
            half = shares.pop("modes") / 2.0
            for way in ("dynamics", "rattle"):
                shares[way] = shares.get(way, 0.0) + half
        ends = np.rint(np.cumsum(list(shares.values())) * self.system.frames).astype(int)
        return {way: int(n) for way, n in zip(shares, np.diff([0, *ends]), strict=True) if n}

    def _by_dynamics(self, count: int) -> Iterator[Frame]:
        o = self.options
        for k, first in enumerate(range(0, count, o.trajectory)):
            temperature = o.temperatures[(k + self.system.seed) % len(o.temperatures)]
            many = min(o.trajectory, count - first)
            yield from self._trajectory(f"dynamics {k}", k, temperature, many, o.stride, o.discard, self.driver(k))

    def _by_release(self, count: int) -> Iterator[Frame]:
        loose = [k for k in range(self.options.conformers) if self._loose(k)]
        for k, first in enumerate(range(0, count, RELEASE_FRAMES)):
            many = min(RELEASE_FRAMES, count - first)
            start = loose[k % len(loose)]
            yield from self._trajectory(f"release {k}", start, 300.0, many, RELEASE_STRIDE, 0.0, self.method)

    def _trajectory(
        self,
        name: str,
        conformer: int,
        temperature: float,
        many: int,
        stride: float,
        discard: float,
        driver: ReferenceMethod,
    ) -> Iterator[Frame]:
        start = self.start(conformer)
        if start is None:
            return
        timestep = min(self.options.timestep, stride)
        seed = int(self.rng(name).integers(1, 2**31 - 1))
        try:
            run = dynamics(
                self.structure(start),
                driver,
                temperature=temperature,
                frames=many,
                stride=stride,
                discard=discard,
                seed=seed,
                timestep=timestep,
            )
            found = list(run)
        except (openmm.OpenMMException, ValueError) as error:
            self.failures[name] = str(error).strip().splitlines()[-1]
            return
        for n, positions in enumerate(found, 1):
            time = discard + n * stride
            yield Frame(positions, {"source": name.split()[0], "temperature": temperature, "time_fs": time})

    def _by_modes(self, count: int) -> Iterator[Frame]:
        o = self.options
        used = max(1, min(o.conformers, count // _FRAMES_PER_HESSIAN))
        for k in range(used):
            modes = self._modes(k)
            if modes is None:
                continue
            share = np.diff(np.rint(np.linspace(0, count, used + 1)).astype(int))[k]
            rng = self.rng(f"modes {k}")
            for n in range(int(share)):
                temperature = o.temperatures[n % len(o.temperatures)]
                positions = modes.sample(temperature, 1, rng)[0]
                yield Frame(positions, {"source": "modes", "temperature": temperature})

    def _find_modes(self, conformer: int) -> NormalModes | None:
        start = self.start(conformer)
        if start is None:
            return None
        try:
            return NormalModes.of(self.structure(start), self.driver(conformer))
        except ValueError as error:
            self.failures[f"modes {conformer}"] = str(error)
            return None

    def _by_rattle(self, count: int) -> Iterator[Frame]:
        for k in range(count):
            start = self.start(k)
            if start is not None:
                positions = rattled(start, 1, self.options.rattle, self.rng(f"rattle {k}"))[0]
                yield Frame(positions, {"source": "rattle"})

    # scans

    def _by_scan(self, count: int) -> Iterator[Frame]:
        distances = self.options.distances
        for k in range(count):
            rng = self.rng(f"scan {k}")
            distance = distances[k % len(distances)]
            temperature = self.options.temperatures[k % len(self.options.temperatures)]
            try:
                shapes = [self._thermal(n, k, temperature, rng) for n in range(len(self.parts))]
                if self.system.kind == "stretch":
                    positions = self._stretched(shapes[0], distance)
                elif self.system.kind == "apart":
                    positions = self._apart(shapes, distance, rng)
                else:
                    positions = self._pair(shapes, distance, rng)
            except (RuntimeError, ValueError) as error:
                self.failures[f"scan {k}"] = str(error)
                continue
            yield Frame(positions, {"source": "scan", "temperature": temperature, "distance": distance})

    def _thermal(self, part: int, k: int, temperature: float, rng: np.random.Generator) -> np.ndarray:
        """One part by itself at a temperature: normal modes, or random displacements where it is large."""
        shapes = self._thermal_parts(part, k % min(3, self.options.conformers))
        if isinstance(shapes, NormalModes):
            return shapes.sample(temperature, 1, rng, classical=True)[0]
        return rattled(shapes, 1, (0.02, 0.06), rng)[0] if len(shapes) > 1 else np.zeros((1, 3))

    def _find_part_modes(self, part: int, conformer: int) -> NormalModes | np.ndarray:
        molecule, spec = self.parts[part], self.system.parts[part]
        positions = molecule.conformers[conformer % len(molecule.conformers)]
        if len(molecule) == 1:
            return positions
        charge = molecule.charge if spec.charge is None else spec.charge
        multiplicity = self.multiplicity if self.system.kind == "stretch" else molecule.multiplicity
        structure = Structure(molecule.numbers, positions, charge, multiplicity or 1)
        # by itself a part has nowhere to send its protons, but a zwitterion has
        method = self.method
        if self.options.hold == "protons":
            bonds = Topology.of([molecule]).polar_bonds()
            none = np.empty((0, 2), dtype=np.int64)
            method = Held(method, bonds, np.full(len(bonds), LONGEST_BOND), none, np.empty(0))
        relaxed = structure.replace(positions=relax(structure, method, self.options.relax))
        return NormalModes.of(relaxed, method) if len(molecule) <= self.options.modes_up_to else relaxed.positions

    def _stretched(self, positions: np.ndarray, factor: float) -> np.ndarray:
        """The marked bond (marks 1 and 2) at `factor` times its length; what hangs on mark 2 moves along."""
        molecule = self.parts[0]
        i, j = molecule.marks[1], molecule.marks[2]
        near: dict[int, list[int]] = {}
        for a, b in molecule.bonds.tolist():
            if {a, b} != {i, j}:
                near.setdefault(a, []).append(b)
                near.setdefault(b, []).append(a)
        moving = [j]
        for k in moving:  # grows while it is read
            moving += [n for n in near.get(k, []) if n not in moving]
        if i in moving:
            raise RuntimeError(f"stretch: the marked bond of {molecule.name} is part of a ring")
        moved = positions.copy()
        moved[moving] += (factor - 1.0) * (positions[j] - positions[i])
        return moved


def make_system(argument: tuple[System, ReferenceMethod], path: Path) -> dict[str, str]:
    """Sample and label one system into one shard; returns what failed on the way, by name."""
    system, method = argument
    sampler = Sampler(system, method)
    labelled: list[Structure] = []
    failures: dict[str, str] = {}
    for k, frame in enumerate(sampler.frames()):
        states = (sampler.multiplicity or 1, *(system.also if k % 3 == 0 else ()))
        for multiplicity in states:
            structure = sampler.structure(frame.positions).replace(multiplicity=multiplicity, group=system.group)
            try:
                made = method.label(structure)
            except LabelError as error:
                failures[f"frame {k}"] = str(error)
                continue
            assert made.forces is not None
            largest = float(np.linalg.norm(made.forces, axis=1).max())
            if not largest < system.sampling.largest_force:
                failures[f"frame {k}"] = f"largest_force: more than {system.sampling.largest_force:g} eV/angstrom"
                continue
            info = _info(system, sampler.topology, frame, multiplicity)
            if system.kind in ("pair", "apart") and made.charges is not None:
                leak = _leak(sampler, made.charges)
                if leak > (system.sampling.largest_leak or np.inf):
                    limit = system.sampling.largest_leak
                    failures[f"frame {k}"] = f"largest_leak: more than {limit:g} e leaked from one part to another"
                    continue
                info["leak"] = round(leak, 4)
            labelled.append(made.replace(info=info))
    failures = {**sampler.failures, **failures}
    write_shard(path, labelled, failures or ({} if labelled else {"frames": "no frame could be made"}))
    return failures


def _leak(sampler: Sampler, charges: np.ndarray) -> float:
    """How far the sum of a part's charges is from its own total charge, e; the largest over all parts."""
    parts = sampler.topology.parts
    wanted = [
        part.charge if spec.charge is None else spec.charge
        for part, spec in zip(sampler.parts, sampler.system.parts, strict=True)
    ]
    return float(np.abs(np.bincount(parts, weights=charges) - wanted).max())


def _info(system: System, topology: Topology, frame: Frame, multiplicity: int) -> dict[str, Any]:
    found, state = class_of_frame(system.built_class, topology, frame.positions, multiplicity)
    info: dict[str, Any] = {"class": found, "split": system.split, "family": system.family, **frame.info}
    if system.held_out:
        info["held_out"] = system.held_out
    if found != system.built_class:
        info["built_as"] = system.built_class
    if state != "as built":
        info["protonation"] = state
    return info
