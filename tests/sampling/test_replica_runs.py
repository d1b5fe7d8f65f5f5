"""Runs of many replicas in a folder: files, resuming bit for bit, and what stops them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.replica_files import (
    ObservableWriter,
    read_molecule,
    read_observables,
    read_positions,
    split_trajectory,
    write_molecule,
)
from openmm_mlff.sampling.replica_runs import ReplicaRun
from openmm_mlff.sampling.replica_settings import ReplicaSettings
from openmm_mlff.sampling.replicas import ReplicaFrame
from openmm_mlff.sampling.replicate import replicate_topology

from .copies import Molecule, N, spread

PHI = (4, 6, 8, 14)
SETTINGS = ReplicaSettings(
    n=N, steps=40, timestep=0.5, minimization_steps=5, equilibration_steps=6, report_interval=4, frame_interval=8,
    checkpoint_interval=12, seed=3, batch=2, distances={"C-N": (1, 6)}, check_bonds=False, max_force=1e9,
)  # fmt: skip


def app_topology(molecule: Molecule) -> mdtraj.Topology:
    return mdtraj.Topology.from_openmm(replicate_topology(molecule.topology, N))


def radius(frame: ReplicaFrame) -> np.ndarray:
    """Radius of gyration without masses, nm."""
    centred = frame.positions - frame.positions.mean(axis=1, keepdims=True)
    return np.sqrt(np.square(centred).sum(axis=-1).mean(axis=-1))


@pytest.fixture()
def start(system: openmm.System, molecule: Molecule) -> Callable[..., ReplicaRun]:
    # bonds hold the molecule together: the network has random weights
    field = app.ForceField("amber99sbildn.xml").createSystem(molecule.topology, nonbondedMethod=app.NoCutoff)
    for force in field.getForces():
        if isinstance(force, openmm.HarmonicBondForce | openmm.HarmonicAngleForce):
            system.addForce(openmm.XmlSerializer.clone(force))

    def make(output: Path, settings: ReplicaSettings = SETTINGS, say: Callable[[str], None] = print) -> ReplicaRun:
        return ReplicaRun.start(
            system, molecule.topology, spread(molecule), settings, output, {"radius": radius}, False, say
        )

    return make


def test_files(start: Callable[..., ReplicaRun], molecule: Molecule, tmp_path: Path) -> None:
    said: list[str] = []
    result = start(tmp_path, say=said.append).run()
    assert (result.finished, result.step) == (True, 40)
    assert any("motion of its centre of mass" in line for line in said)
    table = read_observables(tmp_path)
    assert list(table) == [
        "step", "time_ps", "potential_kJ_mol", "kinetic_kJ_mol", "temperature_K", "C-N", "phi", "psi", "radius",
    ]  # fmt: skip
    np.testing.assert_array_equal(table["step"], np.arange(0, 44, 4))
    np.testing.assert_allclose(table["time_ps"], table["step"] * 5e-4)
    positions = read_positions(tmp_path)
    assert positions.shape == (6, N, 22, 3)
    # frames are every second row; single precision
    np.testing.assert_allclose(table["phi"][::2], dihedral(positions, PHI), atol=1e-2)
    length = np.linalg.norm(positions[:, :, 6] - positions[:, :, 1], axis=-1)
    np.testing.assert_array_equal(read_positions(tmp_path, stride=2), positions[::2])
    everything = mdtraj.load_dcd(str(tmp_path / "trajectory.dcd"), top=app_topology(molecule))
    np.testing.assert_allclose(everything.xyz.reshape(positions.shape), positions, rtol=0, atol=1e-7)
    np.testing.assert_allclose(table["C-N"][::2], length, atol=1e-6)
    # all replicas differ
    assert len(np.unique(table["potential_kJ_mol"][-1])) == N
    paths = split_trajectory(tmp_path, replicas=[3], format="xtc")
    alone = mdtraj.load(str(paths[0]), top=str(tmp_path / "molecule.pdb"))
    np.testing.assert_allclose(alone.xyz, positions[:, 3], atol=6e-4)
    np.testing.assert_allclose(alone.time, np.arange(6) * 0.004, atol=1e-6)


def test_resumed_runs_are_the_same_bit_for_bit(
    start: Callable[..., ReplicaRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(whole).run()
    run = start(cut)

    class Killed(Exception):
        pass

    original = ReplicaRun._report

    def killed(self: ReplicaRun, context: openmm.Context, step: int) -> None:
        original(self, context, step)
        # beyond the checkpoint at 24, with rows and frames on disk that it does not count on
        if step == 32:
            raise Killed

    monkeypatch.setattr(ReplicaRun, "_report", killed)
    with pytest.raises(Killed):
        run.run()
    monkeypatch.undo()
    said: list[str] = []
    again = ReplicaRun.resume(cut, observables={"radius": radius}, progress=False, say=said.append)
    assert "resuming production at step 24 (bit for bit" in said[-1]
    again.run()
    # the header of a DCD holds the time of day
    for name, header in (("observables.npy", 0), ("trajectory.dcd", 276), ("final_state.xml", 0)):
        assert (cut / name).read_bytes()[header:] == (whole / name).read_bytes()[header:], name


def test_a_signal_leaves_a_checkpoint(system: openmm.System, molecule: Molecule, tmp_path: Path) -> None:
    def stopping(frame: ReplicaFrame) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGTERM)
        return frame.potential

    settings = ReplicaSettings(n=2, steps=5, timestep=0.01, report_interval=1, check_bonds=False, max_force=1e9)
    arguments = (system, molecule.topology, molecule.positions, settings, tmp_path)
    result = ReplicaRun.start(*arguments, {"e": stopping}, False, print).run()
    assert (result.finished, result.signal, result.step) == (False, "SIGTERM", 0)
    run = ReplicaRun.resume(tmp_path, observables={"e": lambda frame: frame.potential}, progress=False, say=print)
    assert run.run().finished
    table = read_observables(tmp_path)
    np.testing.assert_array_equal(table["step"], np.arange(6))
    np.testing.assert_array_equal(table["e"], table["potential_kJ_mol"])


def test_longer(start: Callable[..., ReplicaRun], tmp_path: Path) -> None:
    start(tmp_path).run()
    run = ReplicaRun.resume(tmp_path, steps=48, observables={"radius": radius}, progress=False, say=print)
    assert run.run().step == 48
    assert len(read_observables(tmp_path)["phi"]) == 13
    with pytest.raises(ValueError, match="expected at least 48"):
        ReplicaRun.resume(tmp_path, steps=10, observables={"radius": radius}, progress=False)
    with pytest.raises(ValueError, match="observables: expected those of the run"):
        ReplicaRun.resume(tmp_path, progress=False, say=print)
    with pytest.raises(ValueError, match="holds a run already"):
        start(tmp_path)


def test_a_broken_bond_names_its_replica(system: openmm.System, molecule: Molecule, tmp_path: Path) -> None:
    positions = spread(molecule)
    # a methyl hydrogen torn off in one replica
    positions[3, 0] += [0.0, 0.3, 0.0]
    settings = ReplicaSettings(n=N, steps=4, timestep=0.01, report_interval=1, frame_interval=0, max_force=1e12)
    run = ReplicaRun.start(system, molecule.topology, positions, settings, tmp_path, progress=False, say=print)
    with pytest.raises(RunFailed, match=r"replica 3: the bond between .* is broken") as failed:
        run.run()
    assert failed.value.replicas == (3,)
    assert (tmp_path / "failure" / "system.xml").is_file()
    assert not (tmp_path / "trajectory.dcd").exists()


def test_a_failing_force_names_its_replica(system: openmm.System, molecule: Molecule, tmp_path: Path) -> None:
    positions = spread(molecule)
    positions[1, 5] = positions[1, 4]
    settings = ReplicaSettings(n=N, steps=4)
    run = ReplicaRun.start(system, molecule.topology, positions, settings, tmp_path, progress=False, say=print)
    with pytest.raises(RunFailed, match="of replica 1 are at the same place") as failed:
        run.run()
    assert failed.value.replicas == (1,)


def test_molecules_of_any_naming(molecule: Molecule, tmp_path: Path) -> None:
    """Beads without elements and with one name, which a PDB file cannot tell apart."""
    beads = app.Topology()
    chain = beads.addChain()
    for residue_id in ("7", "8"):
        residue = beads.addResidue("CG", chain, residue_id)
        for _ in range(3):
            beads.addAtom("B", None, residue)
    atoms = list(beads.atoms())
    beads.addBond(atoms[0], atoms[4])
    beads.setUnitCellDimensions(openmm.Vec3(2, 3, 4) * unit.nanometer)
    for topology in (beads, molecule.topology):
        positions = np.random.default_rng(0).normal(size=(topology.getNumAtoms(), 3))
        write_molecule(tmp_path, topology, positions)
        again, same = read_molecule(tmp_path)
        np.testing.assert_array_equal(same, positions)
        assert again.getUnitCellDimensions() == topology.getUnitCellDimensions()
        pairs = zip(again.atoms(), topology.atoms(), strict=True)
        for a, b in pairs:
            assert (a.name, a.element, a.index) == (b.name, b.element, b.index)
            assert (a.residue.name, a.residue.id, a.residue.index) == (b.residue.name, b.residue.id, b.residue.index)
        assert [(x.index, y.index) for x, y in again.bonds()] == [(x.index, y.index) for x, y in topology.bonds()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "n: expected a whole number >= 1, got 0"),
        ({"timestep": -1.0}, "timestep: expected a positive number, got -1.0"),
        ({"ensemble": "npt"}, "ensemble: expected nve or nvt, got 'npt'"),
        ({"distances": {"d": (1, 1)}}, "distances: expected 2 different atom indices for 'd'"),
        ({"frame_interval": 1.5}, "frame_interval: expected a whole number"),
    ],
)
def test_bad_settings(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReplicaSettings(**{"n": 2, "steps": 1, **changes})  # type: ignore[arg-type]


def test_bad_atoms(system: openmm.System, molecule: Molecule, tmp_path: Path) -> None:
    settings = ReplicaSettings(n=2, steps=1, torsions={"chi": (1, 2, 3, 22)})
    with pytest.raises(ValueError, match="expected indices below 22 for 'chi', got 22"):
        ReplicaRun.start(system, molecule.topology, molecule.positions, settings, tmp_path, progress=False)


def test_table_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    random = np.random.default_rng(0)
    rows = random.normal(size=(1200, 3, 4))
    writer = ObservableWriter(path, 3, 4)
    for k, row in enumerate(rows[:1100]):
        writer.write(row)
        if k in (0, 98, 999):
            writer.sync()
            # a valid file at every moment
            np.testing.assert_array_equal(np.load(path), rows[: k + 1])
    writer.close()
    writer = ObservableWriter(path, 3, 4, keep=7)
    for row in rows[7:]:
        writer.write(row)
    writer.close()
    np.testing.assert_array_equal(np.load(path), rows)
    with pytest.raises(ValueError, match="expected at least 1201 frames"):
        ObservableWriter(path, 3, 4, keep=1201)
    with pytest.raises(ValueError, match=r"expected frames of shape \(3, 5\)"):
        ObservableWriter(path, 3, 5, keep=1)
