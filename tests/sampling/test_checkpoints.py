"""A checkpoint keeps every bit, and a damaged one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest

from openmm_mlff.sampling.checkpoints import Checkpoint, seed_for


@pytest.fixture
def context() -> openmm.Context:
    system = openmm.System()
    for _ in range(5):
        system.addParticle(12.0)
    rng = np.random.default_rng(0)
    made = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    made.setPositions(rng.normal(size=(5, 3)) / 3)
    made.setVelocities(rng.normal(size=(5, 3)) / 7)
    return made


def state_xml(context: openmm.Context) -> str:
    return openmm.XmlSerializer.serialize(context.getState(positions=True, velocities=True, parameters=True))


def test_every_bit_comes_back(context: openmm.Context, tmp_path: Path) -> None:
    lists = [{"positions": np.random.default_rng(1).normal(size=(3, 3)) / 3, "cell": np.eye(3) / 3}, {}]
    Checkpoint("production", 70, state_xml(context), False, True, lists).save(tmp_path / "c.zip")
    read = Checkpoint.load(tmp_path / "c.zip")
    assert (read.phase, read.step, read.scheduled, read.compiled) == ("production", 70, False, True)
    for name in ("positions", "cell"):
        np.testing.assert_array_equal(read.pair_lists[0][name], lists[0][name])
    assert read.pair_lists[1] == {}
    before = context.getState(positions=True, velocities=True)
    after = read.openmm_state()
    np.testing.assert_array_equal(after.getPositions(asNumpy=True)._value, before.getPositions(asNumpy=True)._value)
    np.testing.assert_array_equal(after.getVelocities(asNumpy=True)._value, before.getVelocities(asNumpy=True)._value)


def test_damaged_and_missing_files_are_refused(context: openmm.Context, tmp_path: Path) -> None:
    path = tmp_path / "c.zip"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at"):
        Checkpoint.load(path)
    Checkpoint("production", 70, state_xml(context)).save(path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"PK\x03\x04 nonsense"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"damaged or no checkpoint"):
            Checkpoint.load(path)


def test_a_state_with_a_foreign_pickle_is_not_read(tmp_path: Path) -> None:
    evil = '<State type="State" version="2"><IntegratorParameters type="PythonForce" function="80049528"/></State>'
    Checkpoint("production", 0, evil).save(tmp_path / "c.zip")
    with pytest.raises((ValueError, ImportError)):
        Checkpoint.load(tmp_path / "c.zip").openmm_state()


def test_seeds_are_those_of_openmm_and_differ() -> None:
    seeds = {seed_for(s, phase, step) for s in (1, 2) for phase in ("equilibrate", "production") for step in range(500)}
    assert len(seeds) == 2000
    assert min(seeds) >= 1 and max(seeds) < 2**31
    # the same for ever, because a resumed run depends on it (by sha256sum and a pocket calculator)
    assert seed_for(1, "production", 1000) == 1907124796
