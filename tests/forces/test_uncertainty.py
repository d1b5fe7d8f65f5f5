"""Ensembles in OpenMM: what a force does when its model is unsure, in open, embedded, copied and stored systems."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
from openmm import unit
from openmmml import MLPotential

from openmm_mlff.data.formats import read_structures
from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import running
from openmm_mlff.forces.embedded_force import EmbeddedComputation
from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.python_force import ForceComputation
from openmm_mlff.forces.serialization import load_system, stored_options
from openmm_mlff.forces.uncertainty import CALM_STEPS, Uncertainty, UncertaintyError, UncertaintySpec, Watch
from openmm_mlff.potentials.ensemble import Ensemble, save_ensemble
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.sampling.molecules import Molecules
from openmm_mlff.sampling.replicas import Replicas
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV
from openmm_spookynet import SpookyNet

from .conftest import Box, context_of, energy_of, forces_of, small_spookynet, topology_of

WATER = Structure(np.array([8, 1, 1]), np.array([[0.0, 0.02, 0.0], [0.95, 0.1, 0.03], [-0.24, 0.93, -0.05]]))
TOPOLOGY = topology_of(WATER.numbers)
NM = WATER.positions * 0.1
FACTORS = {"energy_factor": 3.0, "force_factor": 2.0}


@pytest.fixture(scope="module")
def members() -> list[SpookyNet]:
    return [small_spookynet(seed, num_features=8, num_modules=1) for seed in (1, 2)]


@pytest.fixture(scope="module")
def path(members: list[SpookyNet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ensemble(members, tmp_path_factory.mktemp("ensemble") / "two.safetensors", FACTORS)


def system_of(path: Path, **options: Any) -> openmm.System:
    return MLPotential("ensemble", modelPath=str(path)).createSystem(TOPOLOGY, compile=False, **options)


def expected(members: list[SpookyNet], structure: Structure = WATER) -> tuple[float, np.ndarray, float, np.ndarray]:
    """Mean energy and forces in OpenMM's units, and the calibrated uncertainties in eV and eV/angstrom."""
    found = [m.energy_and_forces(structure) for m in members]
    energies, forces = np.array([e for e, _ in found]), np.stack([f for _, f in found])
    return (
        energies.mean() * KJ_PER_MOL_PER_EV,
        forces.mean(axis=0) * KJ_PER_MOL_NM_PER_EV_ANGSTROM,
        3.0 * abs(energies[0] - energies[1]) / np.sqrt(2.0),
        2.0 * np.linalg.norm(forces[0] - forces[1], axis=1) / np.sqrt(2.0),
    )


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_mean_and_uncertainty_in_openmm(path: Path, members: list[SpookyNet], platform: str) -> None:
    system = system_of(path)
    context = context_of(system, NM, platform)
    assert running.most_uncertain(system) is None
    energy, forces, energy_uncertainty, force_uncertainty = expected(members)
    # OpenMM's CPU platform hands positions over in single precision
    loose = 1e-9 if platform == "Reference" else 1e-4
    assert energy_of(context) == pytest.approx(energy, rel=loose)
    np.testing.assert_allclose(forces_of(context), forces, rtol=0, atol=loose * np.abs(forces).max())
    found = running.uncertainty(system)
    assert found is not None
    np.testing.assert_allclose(found.energies, [energy_uncertainty], rtol=10 * loose)
    np.testing.assert_allclose(found.forces, force_uncertainty, rtol=100 * loose)
    worst = running.most_uncertain(system)
    assert worst == (found.energies[0], found.forces.max(), int(force_uncertainty.argmax()))


@pytest.mark.parametrize("precision", ["single", "double"])
def test_precisions(path: Path, members: list[SpookyNet], precision: str) -> None:
    system = system_of(path, precision=precision)
    forces_of(context_of(system, NM))
    found = running.uncertainty(system)
    assert found is not None
    np.testing.assert_allclose(found.forces, expected(members)[3], rtol=1e-8 if precision == "double" else 1e-3)


def test_the_uncertainty_comes_from_the_same_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    predict = SpookyNet.predict
    monkeypatch.setattr(SpookyNet, "predict", lambda self, *a: (calls.append(1), predict(self, *a))[1])
    system = system_of(path, on_uncertain="warn", uncertainty_limit=1e-6)
    context = context_of(system, NM)
    forces_of(context)
    assert running.uncertainty(system) is not None
    assert len(calls) == 2, "one evaluation of two members"


def test_stop_names_step_atom_uncertainty_and_limit(path: Path, members: list[SpookyNet]) -> None:
    uncertain = expected(members)[3]
    worst = int(uncertain.argmax())
    limit = 0.5 * float(uncertain[worst])
    system = system_of(path, on_uncertain="stop", uncertainty_limit=limit)
    context = context_of(system, NM)
    context.setStepCount(17)
    with pytest.raises(
        openmm.OpenMMException, match=rf"atom {worst} .*{uncertain[worst]:.3g} eV.*{limit:.3g} \(step 17"
    ):
        forces_of(context)
    error = running.last_error(system)
    assert isinstance(error, UncertaintyError)
    assert error.atom == worst and error.limit == limit and error.uncertainty == pytest.approx(uncertain[worst])
    # a little below the limit the same frame is fine
    fine = system_of(path, on_uncertain="stop", uncertainty_limit=1.01 * float(uncertain[worst]))
    forces_of(context_of(fine, NM))
    # a minimiser may try what it likes
    with running.without_force_limit(system):
        forces_of(context)


def options_of(system: openmm.System) -> str:
    (options,) = (o for force in system.getForces() for o in stored_options(force))
    return options


def test_limits_have_units_and_come_from_the_file(members: list[SpookyNet], path: Path, tmp_path: Path) -> None:
    given = 48.24266608 * unit.kilojoule_per_mole / unit.nanometer  # 0.05 eV/angstrom
    system = system_of(path, on_uncertain="warn", uncertainty_limit=given)
    assert json.loads(options_of(system))["uncertainty"]["limit"] == pytest.approx(0.05, rel=1e-6)
    named = save_ensemble(members, tmp_path / "named.safetensors", {"force_limit": 0.123})
    system = system_of(named, on_uncertain="stop")
    spec = ForceSpec.from_json(options_of(system))
    assert spec.uncertainty == UncertaintySpec("stop", 0.123)
    assert json.loads(options_of(system))["version"] == 5 and spec.to_json() == options_of(system)


def test_warnings_come_once_per_event(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(UncertaintySpec("warn", 1.0))
    unsure, sure = (Uncertainty(np.zeros(1), np.array([0.2, x])) for x in (1.5, 0.5))
    with caplog.at_level(logging.WARNING):
        for step in (10, 11, 500):
            assert watch.exceeded(unsure, step, str)
        assert not watch.exceeded(sure, 501, str)
        assert watch.exceeded(unsure, 500 + CALM_STEPS, str)
        assert watch.exceeded(unsure, 3, str), "another run"
    assert [step for step, _, _ in watch.events] == [10, 500 + CALM_STEPS, 3]
    assert len(caplog.records) == 3 and "uncertain by 1.5 eV/angstrom" in caplog.messages[0]
    nan = Uncertainty(np.zeros(1), np.array([np.nan]))
    assert watch.exceeded(nan, 4, str)


def test_frames_are_saved_for_labelling(path: Path, members: list[SpookyNet], tmp_path: Path) -> None:
    system = system_of(path, on_uncertain="save", uncertainty_limit=1e-6, uncertain_interval=5)
    integrator = openmm.VerletIntegrator(0.0002)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(NM)
    running.save_uncertain_frames(system, tmp_path / "frames")
    integrator.step(12)
    files = sorted((tmp_path / "frames").iterdir())
    assert [f.name for f in files] == [f"step-{step:09d}.extxyz" for step in (0, 5, 10)]
    (first,) = read_structures(files[0])
    np.testing.assert_allclose(first.positions, WATER.positions, atol=1e-7)
    np.testing.assert_array_equal(first.numbers, WATER.numbers)
    assert (first.charge, first.multiplicity) == (0, 1)
    assert first.info["force_uncertainty"] == pytest.approx(expected(members)[3].max())
    assert running.computations(system)[0].watch.saved == files  # type: ignore[union-attr]


def test_falling_back_is_for_good_and_is_stored(
    path: Path, members: list[SpookyNet], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    third = small_spookynet(7, num_features=8, num_modules=1)
    other = save_potential(third, tmp_path / "other.safetensors")
    bent = WATER.replace(positions=WATER.positions + np.array([[0.0, 0.0, 0.0], [0.25, 0.05, 0.0], [0.0, 0.1, 0.0]]))
    calm, wild = sorted((WATER, bent), key=lambda s: float(expected(members, s)[3].max()))
    limit = 0.5 * sum(float(expected(members, s)[3].max()) for s in (calm, wild))
    system = system_of(path, on_uncertain="fall_back", uncertainty_limit=limit, fall_back=str(other))
    context = context_of(system, 0.1 * calm.positions)
    assert energy_of(context) == pytest.approx(expected(members, calm)[0])
    with caplog.at_level(logging.WARNING):
        context.setPositions(0.1 * wild.positions)
        energy, forces = third.energy_and_forces(wild)
        assert energy_of(context) == pytest.approx(energy * KJ_PER_MOL_PER_EV)
        np.testing.assert_allclose(forces_of(context), forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM, atol=1e-6)
    jump = energy * KJ_PER_MOL_PER_EV - expected(members, wild)[0]
    assert f"energies go on {jump:+.6g} kJ/mol" in caplog.text
    assert running.uncertainty(system) is None
    # back within the limit the other model stays, and in a resumed run too
    context.setPositions(0.1 * calm.positions)
    energy = third.energy_and_forces(calm)[0] * KJ_PER_MOL_PER_EV
    assert energy_of(context) == pytest.approx(energy)
    saved = running.pair_list_state(system)
    again = load_system(openmm.XmlSerializer.serialize(system))
    resumed = context_of(again, 0.1 * calm.positions)
    running.restore_pair_lists(again, saved)
    assert energy_of(resumed) == pytest.approx(energy)


def test_embedded_regions(path: Path, members: list[SpookyNet], solvated: Box, tmp_path: Path) -> None:
    """Means of energies and charges in the field of the surroundings, and the members' spread there."""

    def embedded(name: str, file: Path, **options: Any) -> openmm.System:
        return MLPotential(name, modelPath=str(file)).createMixedSystem(
            solvated.topology, solvated.system, list(range(22)), embedding="electrostatic", compile=False, **options
        )

    files = [save_potential(m, tmp_path / f"{k}.safetensors") for k, m in enumerate(members)]
    energies, forces = [], []
    for file in files:
        context = context_of(embedded("spookynet", file), solvated.positions)
        energies.append(energy_of(context))
        forces.append(forces_of(context))
    system = embedded("ensemble", path)
    context = context_of(system, solvated.positions)
    assert energy_of(context) == pytest.approx(np.mean(energies), rel=1e-9)
    np.testing.assert_allclose(forces_of(context), np.mean(forces, axis=0), rtol=0, atol=1e-5)
    found = running.uncertainty(system)
    assert found is not None and found.forces.shape == (22,)
    stopped = embedded("ensemble", path, on_uncertain="stop", uncertainty_limit=0.5 * float(found.forces.max()))
    with pytest.raises(openmm.OpenMMException, match="uncertain by"):
        forces_of(context_of(stopped, solvated.positions))
    changed = embedded("ensemble", path, on_uncertain="fall_back", uncertainty_limit=1e-6, fall_back=str(files[1]))
    assert energy_of(context_of(changed, solvated.positions)) == pytest.approx(energies[1], rel=1e-9)
    (computation,) = running.computations(changed)
    assert isinstance(computation.other, EmbeddedComputation)


def test_copies_and_molecules(path: Path, members: list[SpookyNet]) -> None:
    moved = np.stack([WATER.positions, WATER.positions + 0.05 * np.eye(3)])
    each = [expected(members, WATER.replace(positions=x)) for x in moved]
    replicas = Replicas(system_of(path), TOPOLOGY, 2)
    context = replicas.context(openmm.VerletIntegrator(0.001), "Reference")
    replicas.set_positions(context, moved * 0.1)
    forces_of(context)
    found = running.uncertainty(replicas.system)
    assert found is not None
    np.testing.assert_allclose(found.energies, [e[2] for e in each], rtol=1e-6)
    np.testing.assert_allclose(found.forces, np.concatenate([e[3] for e in each]), rtol=1e-6)
    worst = int(np.argmax([e[3].max() for e in each]))
    limit = float(np.mean([e[3].max() for e in each]))
    guarded = system_of(path, on_uncertain="stop", uncertainty_limit=limit)
    copies = Replicas(guarded, TOPOLOGY, 2)
    context = copies.context(openmm.VerletIntegrator(0.001), "Reference")
    copies.set_positions(context, moved * 0.1)
    with pytest.raises(openmm.OpenMMException, match=f"of replica {worst} is uncertain"):
        forces_of(context)
    # many molecules: the one that is uncertain is held, the others go on
    molecules = Molecules([guarded, guarded], [TOPOLOGY, TOPOLOGY])
    context = molecules.context(openmm.LangevinMiddleIntegrator(300, 1, 0.0001))
    start = [moved[1 - worst] * 0.1, moved[1 - worst] * 0.1]
    molecules.set_positions(context, start)
    assert np.abs(forces_of(context)).max() > 0 and not molecules.failures
    start[1] = moved[worst] * 0.1
    context.setPositions(np.concatenate(start))
    forces = forces_of(context)
    (failure,) = molecules.failures
    assert failure.molecule == 1 and "uncertain by" in failure.reason
    assert not forces[3:].any() and forces[:3].any()


def test_what_cannot_be_is_refused(path: Path, members: list[SpookyNet], tmp_path: Path) -> None:
    alone = save_potential(members[0], tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"on_uncertain: expected an ensemble.*'spookynet' model"):
        MLPotential("spookynet", modelPath=str(alone)).createSystem(TOPOLOGY, on_uncertain="stop", uncertainty_limit=1)
    for options, words in (
        ({"on_uncertain": "panic", "uncertainty_limit": 1.0}, "on_uncertain: expected 'warn'"),
        ({"on_uncertain": "stop"}, "uncertainty_limit: the model file names none"),
        ({"on_uncertain": "stop", "uncertainty_limit": -1.0}, "uncertainty_limit: expected a positive number"),
        ({"on_uncertain": "stop", "uncertainty_limit": "much"}, "uncertainty_limit: expected a positive number"),
        ({"on_uncertain": "save", "uncertainty_limit": 1.0, "uncertain_interval": 0}, "uncertain_interval: expected"),
        ({"on_uncertain": "fall_back", "uncertainty_limit": 1.0}, "fall_back: expected a model file"),
        ({"on_uncertain": "stop", "uncertainty_limit": 1.0, "fall_back": str(alone)}, "fall_back: expected"),
        ({"uncertainty_limit": 1.0}, "uncertainty_limit: expected None without on_uncertain"),
    ):
        with pytest.raises(ValueError, match=words):
            system_of(path, **options)
    with pytest.raises(FileNotFoundError, match="fall_back: no file"):
        system_of(path, on_uncertain="fall_back", uncertainty_limit=1.0, fall_back=str(tmp_path / "no.safetensors"))
    with pytest.raises(TypeError, match="did you mean 'on_uncertain'"):
        system_of(path, onUncertain="stop")
    falling = system_of(path, on_uncertain="fall_back", uncertainty_limit=1.0, fall_back=str(alone))
    with pytest.raises(ValueError, match=r"'fall_back' exchanges the model of a whole force.*copies"):
        Replicas(falling, TOPOLOGY, 2)
    with pytest.raises(ValueError, match=r"'fall_back' exchanges the model of a whole force.*molecules"):
        Molecules([falling, falling], [TOPOLOGY, TOPOLOGY])
    plain = system_of(path)
    options = options_of(plain)
    with pytest.raises(ValueError, match="made with on_uncertain='fall_back'"):
        ForceComputation(options).fall_back()


def test_in_memory(members: list[SpookyNet]) -> None:
    system = MLPotential("ensemble", model=Ensemble(members)).createSystem(TOPOLOGY, compile=False)
    assert energy_of(context_of(system, NM)) == pytest.approx(expected(members)[0])
