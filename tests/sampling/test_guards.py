"""The guards name the atom; signals become requests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.sampling.guards import Guard, StopRequest, save_failure
from openmm_mlff.sampling.systems import read_structure


@pytest.fixture
def molecule(alanine: str) -> tuple[app.Topology, np.ndarray, list[tuple[int, int]]]:
    topology, positions = read_structure(alanine)
    return topology, positions, [(a.index, b.index) for a, b in topology.bonds()]


def test_a_good_frame_passes_and_each_fault_is_named(molecule: tuple) -> None:
    topology, positions, bonds = molecule
    forces = np.zeros_like(positions)
    guard = Guard(topology, bonds, positions, None, max_force=100.0)
    assert guard.check(positions, forces, -1.0, None) is None
    bad = positions.copy()
    bad[8, 1] = np.nan
    assert "position of atom 8 (CA of ALA 2, C) is not a number" in str(guard.check(bad, forces, -1.0, None))
    wild = forces.copy()
    wild[5] = [80.0, 80.0, 0.0]
    message = str(guard.check(positions, wild, -1.0, None))
    assert "atom 5 (O of ACE 1, O)" in message and "113" in message
    wild[5] = [np.inf, 0.0, 0.0]
    assert "force of atom 5 (O of ACE 1, O) is not a number" in str(guard.check(positions, wild, -1.0, None))
    assert "potential energy is nan" in str(guard.check(positions, forces, float("nan"), None))


def test_a_bond_breaks_when_it_is_pulled_far_and_not_before(molecule: tuple) -> None:
    topology, positions, bonds = molecule
    guard = Guard(topology, bonds, positions, None, max_force=1e5)
    # CB-HB1: the hydrogen carries nothing else
    carbon, hydrogen = 10, 11
    along = positions[hydrogen] - positions[carbon]
    for factor, whole in ((1.2, True), (1.4, True), (1.9, False)):
        pulled = positions.copy()
        pulled[hydrogen] = positions[carbon] + factor * along
        message = guard.check(pulled, np.zeros_like(pulled), 0.0, None)
        assert (message is None) == whole
    assert "atom 10 (CB of ALA 2, C) and atom 11 (HB1 of ALA 2, H) is broken: 2.0" in str(message)


def test_a_bond_across_the_boundary_is_whole(molecule: tuple) -> None:
    topology, positions, bonds = molecule
    box = np.array([[1.5, 0, 0], [0.3, 1.6, 0], [-0.2, 0.1, 1.4]])
    guard = Guard(topology, bonds, positions, box, max_force=1e5)
    moved = positions.copy()
    moved[::2] += box[1] - box[2]
    assert guard.broken_bond(moved, box) is None


def test_a_failure_is_saved_even_with_nan(molecule: tuple, tmp_path: Path) -> None:
    topology, positions, _ = molecule
    system = openmm.System()
    for _ in range(len(positions)):
        system.addParticle(12.0)
    integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    save_failure(tmp_path / "finite", context, topology, "why")
    assert sorted(p.name for p in (tmp_path / "finite").iterdir()) == [
        "integrator.xml", "message.txt", "positions.pdb", "state.xml", "system.xml",
    ]  # fmt: skip
    read = app.PDBFile(str(tmp_path / "finite" / "positions.pdb")).getPositions(asNumpy=True)
    np.testing.assert_allclose(read.value_in_unit(unit.nanometer), positions, atol=1e-4)
    context.setPositions(np.full_like(positions, np.nan))
    save_failure(tmp_path / "nan", context, topology, "why")
    assert not (tmp_path / "nan" / "positions.pdb").exists()
    assert (tmp_path / "nan" / "message.txt").read_text(encoding="utf-8") == "why\n"
    restored = openmm.XmlSerializer.deserialize((tmp_path / "nan" / "integrator.xml").read_text(encoding="utf-8"))
    assert restored.getStepSize()._value == 0.001


def test_signals_become_requests_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
