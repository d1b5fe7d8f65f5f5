"""Energies and forces through OpenMM against the published program's, and the guards of the computation."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmmml import MLPotential

from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import checks, running
from openmm_mlff.forces.force_spec import ForceSpec
from openmm_mlff.forces.loading import load_model
from openmm_mlff.forces.python_force import ForceComputation
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV
from openmm_spookynet import SpookyNet

from .conftest import context_of, energy_of, forces_of, topology_of

SETS = ("visible", "elements_visible", "lrcutoff_visible")
#: exactly symmetric: the maximum in FAVOR+ is a tie, and rounding decides which branch the gradient takes
TIES = ("benzene_anion", "two_waters_12A")
PLATFORMS = ("Reference", "CPU", "OpenCL")


def structures_of(folder: Path, name: str) -> list[dict[str, Any]]:
    arrays = np.load(folder / f"{name}.npz")
    found = []
    for entry in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["structures"]:
        key = entry["key"]
        mine = {n.removeprefix(key): arrays[n] for n in arrays.files if n.startswith(key)}
        found.append({**entry, **mine})
    return found


def through_openmm(
    potential: MLPotential, s: dict[str, Any], platform: str = "Reference", offset: float = 0.0, **options: Any
) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (eV/angstrom) of one reference structure, shifted by `offset` angstrom."""
    box = s["cell"] / 10 if s.get("pbc") is True or "cell" in s else None
    cutoff = s.get("lr_cutoff")
    system = potential.createSystem(
        topology_of(s["numbers"], box),
        charge=int(s["charge"]),
        multiplicity=int(s["magmom"]) + 1,
        longRangeCutoff=None if cutoff is None else float(cutoff) / 10,
        **options,
    )
    context = context_of(system, (s["positions"] + offset) / 10, platform)
    state = context.getState(energy=True, forces=True)
    forces = np.array(state.getForces(asNumpy=True)._value) / KJ_PER_MOL_NM_PER_EV_ANGSTROM
    return state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV, forces


@pytest.fixture(scope="module")
def published(shared: Path) -> MLPotential:
    return MLPotential("spookynet", modelPath=shared / "models" / "spookynet_parameters.pth")


@pytest.mark.parametrize("name", SETS)
def test_agrees_with_the_published_program_in_double(shared: Path, published: MLPotential, name: str) -> None:
    for s in structures_of(shared / "data" / "spookynet", name):
        energy, forces = through_openmm(published, s, precision="double")
        assert energy == pytest.approx(float(s["energy"]), abs=1e-7, rel=0), s["name"]
        tolerance = 1e-5 if s["name"] in TIES else 1e-7
        np.testing.assert_allclose(forces, s["forces"], rtol=0, atol=tolerance, err_msg=s["name"])


def test_agrees_with_the_published_program_in_single(shared: Path, published: MLPotential) -> None:
    for s in structures_of(shared / "data" / "spookynet", "visible"):
        energy, forces = through_openmm(published, s, precision="single")
        assert energy == pytest.approx(float(s["energy"]), abs=1e-6 * len(forces) + 2e-6, rel=0), s["name"]
        if s["name"] not in TIES:
            np.testing.assert_allclose(forces, s["forces"], rtol=0, atol=1e-4, err_msg=s["name"])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_platforms_agree(shared: Path, published: MLPotential, platform: str) -> None:
    s = next(s for s in structures_of(shared / "data" / "spookynet", "visible") if s["name"] == "ethanol")
    energy, forces = through_openmm(published, s, platform, precision="double")
    # OpenCL keeps positions in single precision: 2e-6 angstrom at most within 0.5 nm of the origin
    rounding = 2e-6 * np.abs(s["forces"]).sum() if platform == "OpenCL" else 0.0
    assert energy == pytest.approx(float(s["energy"]), abs=1e-7 + rounding, rel=0)
    np.testing.assert_allclose(forces, s["forces"], rtol=0, atol=2e-4 if platform == "OpenCL" else 1e-7)


@pytest.mark.parametrize("precision", ["single", "double"])
def test_far_from_the_origin(shared: Path, published: MLPotential, precision: str) -> None:
    s = next(s for s in structures_of(shared / "data" / "spookynet", "visible") if s["name"] == "acetate")
    at_origin = through_openmm(published, s, precision=precision)
    far = through_openmm(published, s, offset=500.0, precision=precision)
    # moving by 500 angstrom rounds float64 positions by 1e-13 angstrom, and single precision must not see it
    assert far[0] == pytest.approx(at_origin[0], abs=1e-10 if precision == "double" else 5e-6)
    np.testing.assert_allclose(far[1], at_origin[1], rtol=0, atol=1e-9 if precision == "double" else 1e-4)


# -- the computation --------------------------------------------------------------------------------------------

WATER = np.array([8, 1, 1])
WATER_POSITIONS = np.array([[0.0, 0.0, 0.0], [0.0757, 0.0586, 0.0], [-0.0757, 0.0586, 0.0]])


@pytest.fixture()
def small(model: SpookyNet) -> MLPotential:
    return MLPotential("spookynet", model=model)


def test_energy_is_that_of_the_potential(model: SpookyNet, small: MLPotential) -> None:
    context = context_of(small.createSystem(topology_of(WATER), charge=1, multiplicity=2), WATER_POSITIONS)
    energy, forces = model.energy_and_forces(Structure(WATER, WATER_POSITIONS * 10, charge=1, multiplicity=2))
    assert energy_of(context) == pytest.approx(energy * KJ_PER_MOL_PER_EV, rel=1e-12)
    np.testing.assert_allclose(forces_of(context), forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM, rtol=1e-9, atol=1e-9)


def test_charge_and_multiplicity_matter(small: MLPotential) -> None:
    energies = {
        (charge, multiplicity): energy_of(
            context_of(
                small.createSystem(topology_of(WATER), charge=charge, multiplicity=multiplicity), WATER_POSITIONS
            )
        )
        for charge, multiplicity in [(0, 1), (0, 3), (1, 2), (-1, 2)]
    }
    assert len({round(e, 3) for e in energies.values()}) == 4


def test_pickle_holds_options_and_no_weights(small: MLPotential, model: SpookyNet) -> None:
    system = small.createSystem(topology_of(WATER))
    computation = running.computations(system)[0]
    data = pickle.dumps(computation)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.spec == computation.spec
    assert again is not computation
    assert again.model is computation.model  # loaded once per process


def test_models_are_loaded_once_per_option(model_path: Path) -> None:
    sha256 = model_file.remember(model_path)
    first = load_model(sha256, "spookynet", device="cpu")
    assert load_model(sha256, "spookynet", device="cpu") is first
    single = load_model(sha256, "spookynet", precision="single", device="cpu")
    assert (first.dtype, single.dtype) == (torch.float64, torch.float32)
    limited = load_model(sha256, "spookynet", device="cpu", long_range_cutoff=9.0)
    assert (first.long_range_cutoff, limited.long_range_cutoff) == (None, 9.0)


def test_threads_are_restored(small: MLPotential, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(small.createSystem(topology_of(WATER), threads=2, compile=False), WATER_POSITIONS)
    before = torch.get_num_threads()
    seen = []
    original = SpookyNet.predict

    def spy(self: SpookyNet, *args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return original(self, *args)

    monkeypatch.setattr(SpookyNet, "predict", spy)
    energy_of(context)
    monkeypatch.setenv("OPENMM_MLFF_THREADS", "3")
    energy_of(context)
    assert seen == [2, 3]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "sha256": "x", "what": 1}'])
def test_damaged_options_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="options of an openmm-mlff force cannot be read"):
        ForceComputation(text)


# -- what stops a run -------------------------------------------------------------------------------------------


def error_of(system: openmm.System, positions: np.ndarray, platform: str = "Reference") -> tuple[str, BaseException]:
    context = context_of(system, positions, platform)
    with pytest.raises(openmm.OpenMMException) as caught:
        context.getState(energy=True, forces=True)
    error = running.last_error(system)
    assert error is not None
    return str(caught.value), error


def test_two_atoms_at_one_place(small: MLPotential) -> None:
    positions = WATER_POSITIONS[[0, 1, 1]]
    text, error = error_of(small.createSystem(topology_of(WATER)), positions)
    assert "atom 1 (H) and atom 2 (H) are at the same place" in text
    assert isinstance(error, checks.InstabilityError)
    assert "Traceback" in text
    assert "Traceback" in error.__notes__[0]


def test_two_atoms_at_one_place_in_a_large_molecule(small: MLPotential) -> None:
    """With more than 32 atoms a neighbour list finds them."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3)[:40] * 0.25
    positions = grid + rng.normal(scale=0.01, size=grid.shape)
    positions[33] = positions[7]
    text, error = error_of(small.createSystem(topology_of(np.full(40, 18))), positions)
    assert "atom 7 (Ar) and atom 33 (Ar) are at the same place" in text
    assert isinstance(error, checks.InstabilityError)


def test_atoms_are_named_by_their_index_in_the_system(small: MLPotential) -> None:
    topology = topology_of(np.array([18, 8, 18, 1, 1]))
    system = openmm.System()
    for _ in range(5):
        system.addParticle(1.0)
    mixed = small.createMixedSystem(topology, system, [1, 3, 4])
    positions = np.array([[5.0, 0, 0], WATER_POSITIONS[0], [6.0, 0, 0], WATER_POSITIONS[1], WATER_POSITIONS[1]])
    text, error = error_of(mixed, positions)
    assert "atom 3 (H) and atom 4 (H)" in text
    assert isinstance(error, checks.InstabilityError)
    assert error.atom == 3


@pytest.mark.parametrize("platform", PLATFORMS)
def test_nan_positions(small: MLPotential, platform: str) -> None:
    positions = WATER_POSITIONS.copy()
    positions[2, 1] = np.nan
    system = small.createSystem(topology_of(WATER))
    context = context_of(system, WATER_POSITIONS, platform)
    with pytest.raises(openmm.OpenMMException, match=r"(?s)atom 2 \(H\) is at .*nan|NaN"):
        context.setPositions(positions)
        context.getState(energy=True)


def test_exploding_forces(small: MLPotential) -> None:
    positions = WATER_POSITIONS.copy()
    positions[2] = positions[0] + [0.0005, 0.0, 0.0]
    text, error = error_of(small.createSystem(topology_of(WATER)), positions)
    assert isinstance(error, checks.InstabilityError)
    assert error.atom in (0, 2)
    assert "exceeds the limit of 1e+07" in text
    assert "step 0" in text
    context = context_of(small.createSystem(topology_of(WATER), maxForce=None), positions)
    assert np.abs(forces_of(context)).max() > 1e7


def test_force_limit_of_the_user(small: MLPotential) -> None:
    largest = np.abs(forces_of(context_of(small.createSystem(topology_of(WATER)), WATER_POSITIONS))).max()
    system = small.createSystem(topology_of(WATER), maxForce=0.9 * largest)
    text, _ = error_of(system, WATER_POSITIONS)
    assert "exceeds the limit" in text
    forces_of(context_of(small.createSystem(topology_of(WATER), maxForce=1.1 * largest), WATER_POSITIONS))


def test_minimiser_may_try_what_dynamics_may_not(small: MLPotential) -> None:
    system = small.createSystem(topology_of(WATER), maxForce=1.0)
    context = context_of(system, WATER_POSITIONS)
    with pytest.raises(openmm.OpenMMException, match=r"exceeds the limit of 1 .*without_force_limit"):
        openmm.LocalEnergyMinimizer.minimize(context, 10.0, 3)
    with running.without_force_limit(system):
        before = energy_of(context)
        openmm.LocalEnergyMinimizer.minimize(context, 10.0, 3)
        assert energy_of(context) < before
    with pytest.raises(openmm.OpenMMException, match="exceeds the limit of 1 "):
        energy_of(context)
    # what is not a number is an error all the same
    bad = WATER_POSITIONS.copy()
    bad[1, 2] = np.nan
    context.setPositions(bad)
    with running.without_force_limit(system), pytest.raises(openmm.OpenMMException, match="atom 1"):
        energy_of(context)


def test_nan_of_the_model(small: MLPotential, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SpookyNet.predict

    def broken(self: SpookyNet, batch: Any, fixed: Any) -> Any:
        prediction = original(self, batch, fixed)
        prediction.energy = prediction.energy + 0.0 * torch.log(batch.positions[1, 0] * 0.0)
        return prediction

    monkeypatch.setattr(SpookyNet, "predict", broken)
    text, _ = error_of(small.createSystem(topology_of(WATER)), WATER_POSITIONS)
    assert "atom 1 (H)" in text
    assert "nan" in text


def test_any_error_keeps_its_type_and_traceback(small: MLPotential, monkeypatch: pytest.MonkeyPatch) -> None:
    system = small.createSystem(topology_of(WATER))

    def broken(self: SpookyNet, batch: Any, fixed: Any) -> Any:
        raise KeyError("k")

    with monkeypatch.context() as patch:
        patch.setattr(SpookyNet, "predict", broken)
        text, error = error_of(system, WATER_POSITIONS)
        assert "KeyError" in text
        assert "in broken" in text
        assert type(error) is KeyError
        assert error.__traceback__ is None  # frames would keep OpenMM's State alive
    energy_of(context_of(system, WATER_POSITIONS))
    assert running.last_error(system) is None


def test_ctrl_c_can_be_told_from_other_errors(small: MLPotential, monkeypatch: pytest.MonkeyPatch) -> None:
    system = small.createSystem(topology_of(WATER))
    context = context_of(system, WATER_POSITIONS)

    def interrupted(self: SpookyNet, batch: Any, fixed: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SpookyNet, "predict", interrupted)
    with pytest.raises((openmm.OpenMMException, KeyboardInterrupt)) as caught:
        context.getIntegrator().step(1)
    assert running.interrupted(caught.value)
    assert isinstance(running.last_error(system), KeyboardInterrupt)
    assert not running.interrupted(openmm.OpenMMException("Particle coordinate is NaN"))
    # what OpenMM makes of an exception that has no text, or no object yet
    assert running.interrupted(openmm.OpenMMException("")) and running.interrupted(openmm.OpenMMException("<NULL>"))


def test_ctrl_c_at_any_moment(small: MLPotential) -> None:
    system = small.createSystem(topology_of(WATER))
    # so short that the energy stays what it is, however fast the machine
    context = context_of(system, WATER_POSITIONS, step=1e-8)
    energy = energy_of(context)
    for delay in (0.05, 0.08, 0.11):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises((openmm.OpenMMException, KeyboardInterrupt)) as caught:
            context.getIntegrator().step(1_000_000)
        assert running.interrupted(caught.value)
    # the run can go on
    context.getIntegrator().step(1)
    assert energy_of(context) == pytest.approx(energy, rel=1e-2)


def test_changed_topology_is_noticed(small: MLPotential) -> None:
    system = small.createSystem(topology_of(WATER))
    system.addParticle(1.0)
    text, _ = error_of(system, np.vstack([WATER_POSITIONS, [[1.0, 1.0, 1.0]]]))
    assert "made for 3 atoms, but the system hands it 4" in text


def test_model_that_is_gone(small: MLPotential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ForceSpec(sha256="0" * 64, family="spookynet", numbers=(8, 1, 1), path=str(tmp_path / "gone.safetensors"))
    system = small.createSystem(topology_of(WATER))
    system.removeForce(0)
    system.addForce(openmm.PythonForce(ForceComputation(spec)))
    text, _ = error_of(system, WATER_POSITIONS)
    assert "no model with sha256 0000" in text
    assert "gone.safetensors" in text


# -- whole molecules --------------------------------------------------------------------------------------------


def test_make_whole_recovers_any_compact_region() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        cell = np.diag(rng.uniform(8, 30, 3)) + np.tril(rng.uniform(-4, 4, (3, 3)), -1)
        spans = rng.uniform(0.0, 0.49, 3)
        fractional = rng.uniform(-0.5, 0.5, (12, 3)) * spans + rng.uniform(-3, 3, 3)
        whole = fractional @ cell
        wrapped = (fractional + rng.integers(-3, 4, fractional.shape)) @ cell
        np.testing.assert_allclose(checks.make_whole(wrapped, cell) - wrapped[0], whole - whole[0], atol=1e-9)


def test_region_wider_than_half_the_box_reports_its_width() -> None:
    cell = np.diag([20.0, 30.0, 40.0])
    chain = np.stack([np.linspace(0, 12, 9), np.zeros(9), np.zeros(9)], -1)
    with pytest.raises(checks.RegionError, match=r"spans 0.60 of the periodic box along box vector a .*2.00 nm"):
        checks.make_whole(chain % 20.0 + [0, 30.0, 0], cell)
    # the same chain fits along the longer vectors
    checks.make_whole(chain[:, [1, 0, 2]], cell)


# -- in another process ------------------------------------------------------------------------------------------

RUN = """
import json, sys, openmm
from openmm_mlff.forces.serialization import load_system
system = load_system(sys.argv[1])
context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
context.setPositions(json.loads(sys.argv[2]))
print(repr(context.getState(energy=True).getPotentialEnergy()._value))
"""


def test_xml_runs_in_another_process_after_the_model_has_moved(model_path: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(model_path.read_bytes())
    system = MLPotential("spookynet", modelPath=own).createSystem(topology_of(WATER))
    expected = energy_of(context_of(system, WATER_POSITIONS))
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system), encoding="utf-8")
    own.unlink()
    out = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "system.xml"), json.dumps(WATER_POSITIONS.tolist())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    assert float(out.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-12)


def test_model_is_found_where_it_was_when_the_cache_is_empty(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = model_file.sha256_of(model_path)
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path / "empty"))
    assert load_model(sha256, "spookynet", model_path, device="cpu", long_range_cutoff=7.7).dtype == torch.float64
    with pytest.raises(FileNotFoundError, match=sha256):
        load_model(sha256, "spookynet", tmp_path / "elsewhere", device="cpu", long_range_cutoff=7.8)
