"""Trajectory and table: what is written is what mdtraj reads, and both can be cut back to any frame."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest
from openmm import Vec3, app, unit

from openmm_mlff.sampling.reporters import (
    Imager,
    ProgressBar,
    TableWriter,
    TrajectoryWriter,
    count_dcd_frames,
    truncate_dcd,
)

BOX = np.array([[2.0, 0.0, 0.0], [0.5, 2.1, 0.0], [-0.3, 0.4, 1.9]])


def topology(n_atoms: int, periodic: bool) -> app.Topology:
    found = app.Topology()
    residue = found.addResidue("XXX", found.addChain())
    for _ in range(n_atoms):
        found.addAtom("C", app.element.carbon, residue)
    if periodic:
        found.setPeriodicBoxVectors([Vec3(*row) for row in BOX] * unit.nanometer)
    return found


@pytest.mark.parametrize("periodic", [False, True])
def test_frames_survive_a_cut_and_go_on(tmp_path: Path, periodic: bool) -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(6, 5, 3))
    box = BOX if periodic else None
    top, path = topology(5, periodic), tmp_path / "t.dcd"
    writer = TrajectoryWriter(path, top, interval=10, timestep=0.001)
    for frame in frames[:4]:
        writer.write(frame, box)
    writer.close()
    # killed while a frame was written
    with path.open("ab") as file:
        file.write(b"\x07" * 31)
    writer = TrajectoryWriter(path, top, interval=10, timestep=0.001, keep=3)
    for frame in frames[3:]:
        writer.write(frame, box)
    writer.sync()
    writer.close()
    read = mdtraj.load_dcd(str(path), top=mdtraj.Topology.from_openmm(top))
    assert count_dcd_frames(path, 5, periodic) == 6
    np.testing.assert_allclose(read.xyz, frames, atol=1e-6)
    if periodic:
        lengths = np.linalg.norm(BOX, axis=1)
        np.testing.assert_allclose(read.unitcell_lengths, np.tile(lengths, (6, 1)), rtol=1e-5)


def test_a_trajectory_that_lacks_frames_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.dcd"
    writer = TrajectoryWriter(path, topology(5, False), interval=1, timestep=0.001)
    writer.write(np.zeros((5, 3)), None)
    writer.close()
    with pytest.raises(ValueError, match=r"expected at least 2 frames, as the checkpoint says, got 1"):
        truncate_dcd(path, 2, 5, False)
    with pytest.raises(ValueError, match=r"expected 6 atoms, got 5"):
        truncate_dcd(path, 1, 6, False)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"header is damaged"):
        truncate_dcd(path, 1, 5, False)


def row(table: TableWriter, step: int) -> None:
    square = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    table.write(step, step * 0.001, -1.5, 2.0, 300.0, square, None)


def test_rows_survive_a_cut_and_go_on(tmp_path: Path) -> None:
    torsions = {"phi": (0, 1, 2, 3)}
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    table = TableWriter(whole, torsions)
    for step in range(0, 60, 10):
        row(table, step)
    table.close()
    table = TableWriter(cut, torsions)
    for step in range(0, 50, 10):
        row(table, step)
    table.close()
    with cut.open("a") as file:
        file.write("50,0.05")
    table = TableWriter(cut, torsions, keep=30)
    for step in (40, 50):
        row(table, step)
    table.sync()
    table.close()
    assert cut.read_bytes() == whole.read_bytes()
    # a quarter turn, clockwise along the axis
    assert whole.read_text(encoding="utf-8").splitlines()[1].endswith(",90.0000")


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    TableWriter(path, {}).close()
    with pytest.raises(ValueError, match=r"expected the columns .*phi, got others"):
        TableWriter(path, {"phi": (0, 1, 2, 3)}, keep=0)


def test_density_of_a_known_box(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    # 1000 water molecules in 29.9 nm^3 have 1 g/cm^3 (18.0153 amu each)
    table = TableWriter(path, {}, periodic=True, mass=18015.3)
    side = (18015.3 * 1.66053906660e-24 * 1e21) ** (1 / 3)
    table.write(0, 0.0, 0.0, 0.0, 0.0, np.zeros((1, 3)), np.eye(3) * side)
    table.close()
    assert float(path.read_text(encoding="utf-8").splitlines()[1].split(",")[-1]) == pytest.approx(1.0, abs=1e-6)


def test_molecules_are_moved_whole_to_the_image_nearest_to_the_centre() -> None:
    rng = np.random.default_rng(1)
    molecules = [[0, 1, 2], [3], [6, 4, 5], [7, 8]]
    compact = rng.uniform(-0.6, 0.6, size=(9, 3))
    for molecule in molecules:
        # small molecules around one point each
        compact[molecule] = compact[molecule[0]] + rng.normal(0, 0.02, (len(molecule), 3))
    compact[[0, 1, 2]] -= compact[[0, 1, 2]].mean(axis=0)
    scattered = compact.copy()
    for molecule in molecules:
        scattered[molecule] += rng.integers(-3, 4, 3) @ BOX
    moved = Imager(molecules, [0, 1, 2])(scattered, BOX)
    shift = (moved - scattered) @ np.linalg.inv(BOX)
    np.testing.assert_allclose(shift, np.rint(shift), atol=1e-9)
    np.testing.assert_allclose(moved[[0, 1, 2]], scattered[[0, 1, 2]], atol=1e-12)
    centre = scattered[[0, 1, 2]].mean(axis=0)
    images = np.array([[i, j, k] for i in range(-4, 5) for j in range(-4, 5) for k in range(-4, 5)]) @ BOX
    for molecule in molecules:
        middle = moved[molecule].mean(axis=0) - centre
        assert np.linalg.norm(middle) == pytest.approx(np.linalg.norm(middle + images, axis=1).min(), abs=1e-9)
        inside, before = moved[molecule] - moved[molecule[0]], scattered[molecule] - scattered[molecule[0]]
        np.testing.assert_allclose(inside, before, atol=1e-12)


def test_progress_says_how_fast_and_how_far(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("production", 100, 0.001, done=40) as bar:
        bar._begin -= 3.0
        bar.update(100)
    # 60 steps in 3 s: 20 steps/s are 20 * 86400 s * 1e-6 ns
    assert "production: 100/100 steps, 20.0 steps/s, 1.73 ns/day" in capsys.readouterr().err
    with ProgressBar("production", 100, 0.001, show=False) as bar:
        bar.update(100)
    assert capsys.readouterr().err == ""
