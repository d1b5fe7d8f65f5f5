"""Trajectories written by mdtraj come back frame by frame."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest

from openmm_mlff.data.trajectories import iterate_trajectory, read_trajectory


@pytest.fixture
def trajectory(shared: Path, tmp_path: Path) -> tuple[Path, Path, mdtraj.Trajectory]:
    """A DCD of 7 frames of capped alanine in water, its topology, and what was written."""
    first = mdtraj.load(str(shared / "data/alanine-dipeptide-explicit.pdb"))
    rng = np.random.default_rng(3)
    xyz = first.xyz[0] + 0.01 * rng.normal(size=(7, first.n_atoms, 3)).astype(np.float32)
    box = np.tile(first.unitcell_vectors, (7, 1, 1)) * np.linspace(1.0, 1.06, 7)[:, None, None]
    written = mdtraj.Trajectory(xyz, first.topology)
    written.unitcell_vectors = box
    written.save_dcd(str(tmp_path / "run.dcd"))
    first.save_pdb(str(tmp_path / "top.pdb"))
    return tmp_path / "run.dcd", tmp_path / "top.pdb", written


def test_solute_of_every_other_frame(trajectory: tuple[Path, Path, mdtraj.Trajectory]) -> None:
    dcd, pdb, written = trajectory
    frames = read_trajectory(dcd, pdb, atoms="not water", charge=0, stride=2, chunk=2)
    assert len(frames) == 4
    assert [frame.info["frame"] for frame in frames] == [0, 2, 4, 6]
    for k, frame in zip((0, 2, 4, 6), frames, strict=True):
        assert frame.formula == "C6H12N2O2"
        assert frame.cell is None
        assert frame.group == "run"
        np.testing.assert_allclose(frame.positions, 10.0 * written.xyz[k, :22], atol=2e-5)


def test_whole_box_keeps_its_vectors(trajectory: tuple[Path, Path, mdtraj.Trajectory]) -> None:
    dcd, pdb, written = trajectory
    frames = read_trajectory(dcd, pdb)
    assert len(frames[0]) == written.n_atoms
    for k, frame in enumerate(frames):
        np.testing.assert_allclose(frame.cell, 10.0 * written.unitcell_vectors[k], rtol=1e-5)
    assert read_trajectory(dcd, pdb, periodic=False)[0].cell is None
    assert read_trajectory(dcd, pdb, atoms=[0, 1, 2], periodic=True)[0].cell is not None


def test_indices_keep_their_order(trajectory: tuple[Path, Path, mdtraj.Trajectory]) -> None:
    dcd, pdb, written = trajectory
    frame = next(iterate_trajectory(dcd, pdb, atoms=[8, 4, 5], charge=1, multiplicity=3))
    np.testing.assert_allclose(frame.positions, 10.0 * written.xyz[0, [8, 4, 5]], atol=2e-5)
    assert (frame.charge, frame.multiplicity) == (1, 3)


def test_bad_input(trajectory: tuple[Path, Path, mdtraj.Trajectory], shared: Path, tmp_path: Path) -> None:
    dcd, pdb, written = trajectory
    cases = [
        ({"atoms": [0, written.n_atoms]}, f"from 0 to {written.n_atoms - 1}, got {written.n_atoms}"),
        ({"atoms": [1, 1]}, "repeated"),
        ({"atoms": "resname XYZ"}, "at least one atom"),
        ({"atoms": "resname ("}, "mdtraj's language"),
        ({"stride": 0}, "stride: expected at least 1"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            read_trajectory(dcd, pdb, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be read with the topology"):
        read_trajectory(dcd, shared / "data/toluene.pdb")
    with pytest.raises(ValueError, match="cannot be read"):
        read_trajectory(dcd)
    with pytest.raises(ValueError, match="expected box vectors"):
        read_trajectory(shared / "data/alanine-dipeptide-implicit.pdb", periodic=True)
    with pytest.raises(FileNotFoundError, match=r"missing\.dcd"):
        read_trajectory(tmp_path / "missing.dcd", pdb)
