"""Latent dynamics alone: what is left of a run whose model breaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from openmm import app

from openmm_led.latent_run import LatentRun
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.propagators import LatentState, Propagator


class Breaking(Propagator):
    """The place of one atom as a random walk; one walker's becomes NaN in a certain frame."""

    latent_dim, interval, n_atoms, temperature = 3, 1.0, 1, 300.0

    def __init__(self, walker: int | None, frame: int = 0) -> None:
        self.walker, self.frame = walker, frame

    def check_topology(self, topology: app.Topology) -> None:
        assert topology.getNumAtoms() == 1

    def encode(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions[:, 0])

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return z[:, None]

    def start(self, history: np.ndarray) -> LatentState:
        return LatentState(history[:, -1].copy(), {"age": np.zeros((len(history), 1))})

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        age = state.memory["age"] + 1.0
        z = state.z + random.normal(size=state.z.shape)
        if self.walker is not None:
            z[self.walker, 1] = np.where(age[self.walker, 0] >= self.frame, np.nan, z[self.walker, 1])
        return LatentState(z, {"age": age})


def make(model: Breaking, folder: Path) -> LatentRun:
    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    topology.addAtom("C", app.Element.getBySymbol("C"), residue)
    return LatentRun(model, topology, np.zeros((1, 1, 3)), n_walkers=3, seed=4, failure=folder)


def test_the_state_before_numbers_that_are_none_is_kept(tmp_path: Path) -> None:
    run = make(Breaking(walker=1, frame=34), tmp_path / "failure")
    with pytest.raises(
        RunFailed, match=r"walker 1 are not numbers in frame 34 \(1 walkers .* after frame 30 is"
    ) as hurt:
        run.step(50)
    assert hurt.value.replicas == (1,) and hurt.value.folder == tmp_path / "failure"
    assert run.frame == 30 and np.isfinite(run.state.z).all()
    # a model that is whole goes on from there as if nothing had been
    mended, whole = make(Breaking(None), tmp_path), make(Breaking(None), tmp_path)
    mended.loadCheckpoint(tmp_path / "failure" / "before.checkpoint")
    assert mended.frame == 30
    mended.step(20)
    whole.step(50)
    np.testing.assert_array_equal(mended.state.z, whole.state.z)
    # so does the run itself, in the frames that it made before
    run.model.walker = None  # type: ignore[attr-defined]
    run.step(20)
    np.testing.assert_array_equal(run.state.z, whole.state.z)
