"""Reference methods and trajectories of the two crystals that `gdml_materials.py` and `gdml_rpmd.py` describe.

* **Cu27**: 3x3x3 primitive cells of fcc copper, ASE's EMT, the shared data set and new trajectories of the same method.
* **PdH**: a hydrogen atom in an octahedral site of 3x3x3 primitive cells of palladium. EMT describes palladium; its
  hydrogen, "for fun" in the words of its source, vibrates at 254 meV, so H-Pd is a Morse potential instead, whose depth
  was chosen to give the measured 69 meV (neutron scattering, Rowe et al., Phys. Rev. Lett. 33, 1297 (1974)).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import HERE, SHARED
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT, beta
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS

from openmm_gdml.crystals import wrapped
from openmm_mlff.data.files import write_atomically
from openmm_mlff.data.structures import Structure
from openmm_mlff.units import EV_PER_KCAL_PER_MOL

WORK = HERE.parent / ".work" / "gdml_materials"
TEMPERATURE = 300.0  # K
#: Morse potential D ((e^-a(r-r0) - 1)^2 - 1), switched off by (1 - r^2/rc^2)^2: eV, 1/angstrom, angstrom, angstrom
MORSE = {"depth": 0.25, "alpha": 1.7, "distance": 1.8, "cutoff": 5.5}
#: fs between frames, and before the first one
INTERVAL, EQUILIBRATION = 25.0, 2000.0


class CrystalEMT(Calculator):
    """ASE's EMT for one element in one crystal, with a list of pairs that is made once: the same numbers, much faster.

    Jacobsen, Stoltze, Norskov, Surf. Sci. 366, 394 (1996). Atoms may move by half of `reach` (angstrom) from where they
    are in `start`.
    """

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012  (ASE's convention)

    def __init__(self, start: Atoms, reach: float = 2.0) -> None:
        super().__init__()
        emt = EMT()
        emt.atoms = start
        emt.initialize(start)
        self._p = {name: float(values[0]) for name, values in emt.par.items()}
        self._p |= {"rc": emt.rc, "list": emt.rc_list, "slope": emt.acut, "e0_sum": len(start) * self._p["E0"]}
        self._i, self._j, shift = neighbor_list("ijS", start, emt.rc_list + reach)
        self._shift = shift @ start.cell.array

    def calculate(
        self, atoms: Any = None, properties: Sequence[str] = ("energy",), system_changes: Sequence[str] = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        p, i, j = self._p, self._i, self._j
        d = atoms.positions[j] - atoms.positions[i] + self._shift
        r = np.sqrt(np.einsum("kx,kx->k", d, d))
        near = r < p["list"]
        i, j, d, r = i[near], j[near], d[near], r[near]
        n = len(atoms)
        w = 1.0 / (1.0 + np.exp(p["slope"] * (r - p["rc"])))
        switch = p["slope"] * (w - 1.0)
        density = np.exp(-p["eta2"] * (r - beta * p["s0"])) * w
        pair = 2.0 * p["neghalfv0overgamma2"] * np.exp(-p["kappa"] * (r / beta - p["s0"])) * w
        sigma = np.bincount(i, density, n)
        s = -np.log(sigma * p["inv12gamma1"]) / (beta * p["eta2"])
        cohesive, atomic = np.exp(-p["lambda"] * s), 6.0 * p["V0"] * np.exp(-p["kappa"] * s)
        energy = np.sum(p["E0"] * (1.0 + p["lambda"] * s) * cohesive + atomic) + 0.5 * pair.sum() - p["e0_sum"]
        by_s = -p["E0"] * p["lambda"] ** 2 * s * cohesive - p["kappa"] * atomic
        by_sigma = by_s / (-beta * p["eta2"] * sigma)
        slope = (by_sigma[i] + by_sigma[j]) * density * (switch - p["eta2"]) + pair * (switch - p["kappa"] / beta)
        pull = (slope / r)[:, None] * d
        forces = np.stack([np.bincount(i, pull[:, k], n) for k in range(3)], axis=1)
        self.results = {"energy": float(energy), "free_energy": float(energy), "forces": forces}


class PalladiumHydride(Calculator):
    """EMT between palladium atoms, a Morse potential between hydrogen and palladium.

    Args:
        metal: what computes the palladium; None takes ASE's EMT.
    """

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012  (ASE's convention)

    def __init__(self, metal: Calculator | None = None) -> None:
        super().__init__()
        self._metal = EMT() if metal is None else metal

    def calculate(
        self, atoms: Any = None, properties: Sequence[str] = ("energy",), system_changes: Sequence[str] = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        metal = np.flatnonzero(atoms.numbers == 46)
        host = atoms[metal]
        host.calc = self._metal
        energy, forces = host.get_potential_energy(), np.zeros((len(atoms), 3))
        forces[metal] = host.get_forces()
        p, cell = MORSE, atoms.cell.array
        images = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ cell
        for i in np.flatnonzero(atoms.numbers == 1):
            vector = wrapped(atoms.positions[metal] - atoms.positions[i], cell)[:, None] + images
            r = np.linalg.norm(vector, axis=-1)
            near = r < p["cutoff"]
            j, r, vector = metal[np.nonzero(near)[0]], r[near], vector[near]
            x = np.exp(-p["alpha"] * (r - p["distance"]))
            inside = 1.0 - (r / p["cutoff"]) ** 2
            value, slope = p["depth"] * (x * x - 2 * x), 2 * p["depth"] * p["alpha"] * (x - x * x)
            energy += float(np.sum(value * inside**2))
            slope = slope * inside**2 - 4 * value * inside * r / p["cutoff"] ** 2
            pull = (slope / r)[:, None] * vector
            forces[i] += pull.sum(axis=0)
            np.add.at(forces, j, -pull)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}


def copper() -> Atoms:
    """The ideal supercell of the shared data set (lattice constant 3.61 angstrom), with its calculator."""
    atoms = bulk("Cu", "fcc", a=3.61).repeat(3)
    atoms.calc = EMT()
    return atoms


def palladium_hydride() -> Atoms:
    """The relaxed supcercell with hydrogen as its last atom, in the lattice of relaxed palladium."""
    host = bulk("Pd", "fcc", a=3.88).repeat(3)
    host.calc = EMT()
    BFGS(FrechetCellFilter(host), logfile=None).run(fmax=1e-4)
    atoms = host.copy()
    atoms.append("H")
    # half a primitive cell along its diagonal
    atoms.positions[-1] = atoms.positions[0] + atoms.cell.array.sum(0) / 6
    atoms.calc = PalladiumHydride()
    BFGS(atoms, logfile=None).run(fmax=1e-4)
    return atoms


def trajectory(name: str, start: Atoms, seed: int, frames: int, step: float) -> list[Structure]:
    """Frames of Langevin dynamics at `TEMPERATURE`, computed once and kept in the work folder.

    Args:
        step: fs. seed: of velocities and of the thermostat.
    """
    path = WORK / f"{name}_{seed}_{frames}.npz"
    if not path.exists():
        random = np.random.default_rng(seed)
        atoms = start.copy()
        atoms.calc = fast_form(start)
        thermalize_momenta(atoms, temperature_K=TEMPERATURE, rng=random)
        friction = 0.01 / units.fs
        # with its default fixcm=True, ASE's thermostat gives every atom the same share of the total momentum: hydrogen
        # beside palladium would be four times too hot
        dynamics = Langevin(
            atoms, step * units.fs, temperature_K=TEMPERATURE, friction=friction, fixcm=False, rng=random
        )
        dynamics.run(round(EQUILIBRATION / step))
        kept: dict[str, list[Any]] = {"R": [], "E": [], "F": []}
        for _ in range(frames):
            dynamics.run(round(INTERVAL / step))
            # the dynamics run on the fast form, the labels are ASE's own
            label = atoms.copy()
            label.calc = start.calc
            kept["R"].append(label.get_positions())
            kept["E"].append(label.get_potential_energy())
            kept["F"].append(label.get_forces())
            np.testing.assert_allclose(atoms.get_forces(), kept["F"][-1], atol=1e-9)
        _save(path, z=atoms.numbers, cell=atoms.cell.array, **{k: np.array(v) for k, v in kept.items()})
    data = np.load(path, allow_pickle=False)
    return [
        Structure(data["z"], r, cell=data["cell"], energy=float(e), forces=f, group=f"{name}-{seed}")
        for r, e, f in zip(data["R"], data["E"], data["F"], strict=True)
    ]


def fast_form(start: Atoms) -> Calculator:
    """The reference method with the metal's pairs listed once."""
    host = start[start.numbers != 1]
    metal = CrystalEMT(host)
    return metal if len(host) == len(start) else PalladiumHydride(metal)


def shared_copper() -> list[Structure]:
    """The shared data set of copper, 700 frames; ends the script with a plain reason where it is not."""
    path = SHARED / "data" / "gdml" / "dataset_cu27.npz"
    if not path.exists():
        raise SystemExit(f"no {path.name} in the folder of shared data; OPENMM_MLFF_SHARED names that folder")
    data = np.load(path, allow_pickle=False)
    to_ev = EV_PER_KCAL_PER_MOL
    return [
        Structure(data["z"], r, cell=data["lattice"].T, energy=float(e) * to_ev, forces=f * to_ev, group="cu27")
        for r, e, f in zip(data["R"], data["E"], data["F"], strict=True)
    ]


def _save(path: Path, **arrays: np.ndarray) -> None:
    import io

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
