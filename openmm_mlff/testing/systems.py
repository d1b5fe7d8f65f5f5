"""Random systems, brute-force pair lists and comparisons for the contract in `openmm_mlff.testing`."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_mlff.data.structures import Pairs, Structure
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.potentials.potential import Potential
from openmm_mlff.units import NM_PER_ANGSTROM

#: elements that clusters are made of, as far as the model knows them
COMMON = (1, 6, 7, 8)


# -- comparisons ---------------------------------------------------------------------------------------------------


def close(what: str, actual: Any, expected: Any, atol: float) -> None:
    """Raise `AssertionError` with the largest difference unless both have one shape and agree to `atol`."""
    a, b = (
        np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (actual, expected)
    )
    if a.shape != b.shape:
        raise AssertionError(f"{what}: expected shape {b.shape}, got {a.shape}")
    error = float(np.abs(a - b).max()) if a.size else 0.0
    # written so that NaN fails
    if not error <= atol:
        raise AssertionError(f"{what}: differs by {error:.3e}, allowed {atol:.1e}\nactual {a}\nexpected {b}")


def raises(naming: str, call: Callable[..., Any], *arguments: Any) -> None:
    """Raise `AssertionError` unless the call raises a `ValueError` whose message holds `naming`."""
    try:
        call(*arguments)
    except ValueError as error:
        if naming not in str(error):
            raise AssertionError(f"expected an error that names {naming!r}, got: {error}") from error
        return
    raise AssertionError(f"expected a ValueError that names {naming!r}, got none")


def derivative(function: Callable[[float], float], h: float) -> float:
    """Fourth-order central difference of a function at zero."""
    return (8.0 * (function(h) - function(-h)) - (function(2 * h) - function(-2 * h))) / (12.0 * h)


# -- systems -------------------------------------------------------------------------------------------------------


def multiplicity_of(model: Potential, numbers: Sequence[int] | np.ndarray, charge: int) -> int:
    """The lowest multiplicity that the number of electrons allows; 1 for models without spin."""
    return 1 + (int(np.sum(numbers)) - charge) % 2 if model.supports_multiplicity else 1


def cluster(model: Potential, n: int, seed: int, charge: int = 0, closest: float = 0.95) -> Structure:
    """`n` atoms at random places, none closer than `closest` (angstrom), about as dense as a molecule."""
    return _scatter(model, n, np.eye(3) * (6.0 * n) ** (1 / 3), seed, charge, closest, periodic=False)


def crystal(model: Potential, n: int, cell: np.ndarray, seed: int, closest: float = 1.0) -> Structure:
    """`n` atoms at random places in a periodic cell, no two images closer than `closest` (angstrom)."""
    return _scatter(model, n, cell, seed, 0, closest, periodic=True)


def _scatter(
    model: Potential, n: int, cell: np.ndarray, seed: int, charge: int, closest: float, periodic: bool
) -> Structure:
    rng = np.random.default_rng(seed)
    known = [z for z in COMMON if z in model.elements] or list(model.elements[:4])
    numbers = rng.choice(known, size=n)
    shifts = np.array(list(itertools.product((-1, 0, 1), repeat=3)) if periodic else [[0, 0, 0]]) @ cell
    placed: list[np.ndarray] = []
    for _ in range(100_000):
        trial = rng.random(3) @ cell
        if all(np.linalg.norm(trial + s - p) >= closest for p in placed for s in shifts):
            placed.append(trial)
        if len(placed) == n:
            spin = multiplicity_of(model, numbers, charge)
            return Structure(numbers, np.array(placed), charge, spin, cell if periodic else None)
    raise ValueError(f"n: expected fewer than {n} atoms, so that they can be {closest} angstrom apart")


def supercell(structure: Structure, repeat: tuple[int, int, int]) -> Structure:
    """A crystal with its cell repeated along each vector, one copy after another."""
    assert structure.cell is not None
    shifts = np.array(list(itertools.product(*(range(k) for k in repeat)))) @ structure.cell
    return Structure(
        np.tile(structure.numbers, len(shifts)),
        np.concatenate([structure.positions + s for s in shifts]),
        cell=structure.cell * np.array(repeat)[:, None],
    )


def join_fragments(a: Structure, b: Structure, shift: np.ndarray) -> Structure:
    """Two open structures as one, the second moved by `shift`; charges and unpaired electrons add up."""
    return Structure(
        np.concatenate([a.numbers, b.numbers]),
        np.concatenate([a.positions, b.positions + shift]),
        charge=a.charge + b.charge,
        multiplicity=a.multiplicity + b.multiplicity - 1,
    )


def rotation(seed: int) -> np.ndarray:
    """A random proper rotation, ``(3, 3)``."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def turned(structure: Structure, matrix: np.ndarray) -> Structure:
    """The structure with all positions multiplied by an orthogonal matrix."""
    return structure.replace(positions=structure.positions @ matrix.T)


# -- pair lists ----------------------------------------------------------------------------------------------------


def brute_force_pairs(structure: Structure, cutoff: float) -> set[tuple[int, int, int, int, int]]:
    """Every directed pair of images within the cutoff as ``(i, j, shift of j in cells)``, by looking at all of them."""
    x, cell = structure.positions, structure.cell
    reach = [0, 0, 0]
    if cell is not None:
        fractional = x @ np.linalg.inv(cell)
        spread = np.ptp(fractional, axis=0)
        heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)  # distance between opposite faces
        reach = np.ceil(cutoff / heights + spread).astype(int).tolist()
    found: set[tuple[int, int, int, int, int]] = set()
    for shift in itertools.product(*(range(-m, m + 1) for m in reach)):
        moved = x if cell is None else x + np.array(shift) @ cell
        distance = np.linalg.norm(moved[None] - x[:, None], axis=-1)  # (i, j)
        for i, j in np.argwhere(distance < cutoff):
            if i != j or any(shift):
                found.add((int(i), int(j), shift[0], shift[1], shift[2]))
    return found


def compare_pairs(pairs: Pairs, structure: Structure, cutoff: float, half: bool) -> None:
    """Raise `AssertionError` unless the list holds what brute force finds: directed, or each unordered pair once."""
    shifts = torch.zeros(len(pairs), 3) if pairs.offsets is None else pairs.offsets
    listed = list(zip(pairs.first.tolist(), pairs.second.tolist(), *shifts.long().T.tolist(), strict=True))
    found = set(listed)
    assert len(found) == len(listed), f"pair list: {len(listed) - len(found)} pairs are listed twice"
    if half:
        mirrored = {(j, i, -a, -b, -c) for i, j, a, b, c in found}
        assert not found & mirrored, f"half list: {len(found & mirrored) // 2} pairs are listed in both directions"
        found |= mirrored
    expected = brute_force_pairs(structure, cutoff)
    assert found == expected, (
        f"pair list: {len(expected - found)} pairs are missing, {len(found - expected)} are too many"
    )


# -- OpenMM in another process --------------------------------------------------------------------------------------

_FRESH_PROCESS = """
import json, pickle, sys
import openmm
from openmm_mlff.forces import serialization
folder, positions = sys.argv[1], json.loads(sys.argv[2])

def evaluate(system):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value.tolist()

from_xml = serialization.load_system(f"{folder}/system.xml")
found = {"System XML": evaluate(from_xml)}
with open(f"{folder}/force.pkl", "rb") as stream:
    callable_ = pickle.load(stream)
system = openmm.System()
for i in range(from_xml.getNumParticles()):
    system.addParticle(1.0)
system.addForce(openmm.PythonForce(callable_))
found["pickle"] = evaluate(system)
print("RESULT" + json.dumps(found))
"""


def topology_of(structure: Structure) -> Any:
    """One residue with the structure's atoms and no bonds, as an `openmm.app.Topology`."""
    from openmm.app import Element, Topology

    topology = Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for k, z in enumerate(structure.numbers.tolist()):
        topology.addAtom(f"A{k}", Element.getByAtomicNumber(z), residue)
    return topology


def run_copies(model: Potential, structure: Structure, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies ``(n,)`` kJ/mol and forces ``(n, n_atoms, 3)`` kJ/mol/nm of `n` copies in one OpenMM System.

    Args:
        positions: of the copies, ``(n, n_atoms, 3)`` angstrom.
    """
    import openmm
    from openmmml import MLPotential

    from openmm_mlff.sampling.replicas import Replicas

    topology = topology_of(structure)
    single = MLPotential(model.family, model=model).createSystem(
        topology, charge=structure.charge, multiplicity=structure.multiplicity, precision="double", maxForce=None
    )
    replicas = Replicas(single, topology, len(positions))
    context = replicas.context(openmm.VerletIntegrator(0.001), "Reference")
    replicas.set_positions(context, positions * NM_PER_ANGSTROM)
    frame = replicas.frame(context)
    return frame.potential, frame.forces


def run_in_fresh_process(model: Potential, structure: Structure) -> dict[str, tuple[float, list[list[float]]]]:
    """Energy (kJ/mol) and forces (kJ/mol/nm) of a System XML and of a pickled force, both read by a new interpreter.

    The System is made with ``MLPotential(family, modelPath=...)``, and the model file is deleted before it is read.
    Raises `AssertionError` with the other interpreter's output if that fails.
    """
    import openmm
    from openmmml import MLPotential

    from openmm_mlff.forces.python_force import ForceComputation
    from openmm_mlff.forces.serialization import stored_options

    topology = topology_of(structure)
    with tempfile.TemporaryDirectory() as folder:
        path = save_potential(model, Path(folder) / "model.safetensors")
        system = MLPotential(model.family, modelPath=str(path)).createSystem(
            topology, charge=structure.charge, multiplicity=structure.multiplicity, precision="double", maxForce=None
        )
        (options,) = {o for force in system.getForces() for o in stored_options(force)}
        (Path(folder) / "system.xml").write_text(openmm.XmlSerializer.serialize(system), encoding="utf-8")
        (Path(folder) / "force.pkl").write_bytes(pickle.dumps(ForceComputation(options)))
        path.unlink()
        positions = json.dumps((structure.positions * NM_PER_ANGSTROM).tolist())
        done = subprocess.run(
            [sys.executable, "-c", _FRESH_PROCESS, folder, positions],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0 and "RESULT" in done.stdout, f"the fresh process failed:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.rpartition("RESULT")[2])
