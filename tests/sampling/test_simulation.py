"""Runs: killed, interrupted and resumed ones end where an uninterrupted one does; unphysical ones are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app

from openmm_mlff.analysis.observables import mean_with_error, read_table
from openmm_mlff.forces.serialization import load_integrator, load_state, load_system
from openmm_mlff.sampling.bookkeeping import degrees_of_freedom
from openmm_mlff.sampling.checkpoints import Checkpoint
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.settings import RunSettings
from openmm_mlff.sampling.simulation import Simulation

RUN = """
import sys, json
from openmm_mlff.sampling.settings import RunSettings
from openmm_mlff.sampling.simulation import Simulation
mode, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
start = lambda: Simulation.start(RunSettings.from_dict(settings), folder)
simulation = Simulation.resume(folder) if mode == "resume" else start()
result = simulation.run()
print(result.step, result.finished, result.signal)
"""


def quiet(message: str) -> None:
    pass


def run(settings: RunSettings, folder: Path) -> Simulation:
    simulation = Simulation.start(settings, folder, progress=False, say=quiet)
    assert simulation.run().finished
    return simulation


def spawn(mode: str, folder: Path, settings: RunSettings) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, mode, str(folder), json.dumps(settings.to_dict())]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace"
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended too early: {process.stderr.read() if process.stderr else ''}"
        assert time.monotonic() < end, "the run makes no progress"
        time.sleep(0.005)


def rows(folder: Path) -> int:
    path = folder / "log.csv"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def same_run(one: Path, other: Path) -> None:
    """Tables byte for byte; frames and final states bit for bit."""
    assert (one / "log.csv").read_bytes() == (other / "log.csv").read_bytes()
    # the header holds the hour of its making
    assert (one / "trajectory.dcd").read_bytes()[276:] == (other / "trajectory.dcd").read_bytes()[276:]
    assert (one / "final_state.xml").read_text(encoding="utf-8") == (other / "final_state.xml").read_text(
        encoding="utf-8"
    )


def gas(alanine: str, **changes: Any) -> RunSettings:
    values = {"ml_region": "none", "report_interval": 20, "checkpoint_interval": 100, "minimization_steps": 5}
    return RunSettings(input=alanine, **(values | changes))  # type: ignore[arg-type]


def small_network(alanine: str, tiny_model: str, **changes: Any) -> RunSettings:
    """All by the tiny network, which knows no chemistry: bonds may go."""
    options = {
        "model": "spookynet",
        "model_path": tiny_model,
        "ml_region": "all",
        "check_bonds": False,
        "compile": "no",
    }
    return gas(alanine, **(options | changes))


@pytest.fixture(scope="module")
def water_box(alanine: str) -> dict[str, Any]:
    """Settings of capped alanine in water at constant pressure, short but with everything that has random numbers."""
    return {"padding": 0.95, "ensemble": "npt", "timestep": 2.0, "platform": "CPU"}


def test_a_run_that_is_killed_twice_ends_like_one_that_is_not(alanine: str, tmp_path: Path) -> None:
    settings = gas(alanine, steps=30_000, checkpoint_interval=1000, report_interval=50, equilibration_steps=100)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(settings, whole)
    for mode, some in (("start", 100), ("resume", 300)):
        process = spawn(mode, killed, settings)
        wait_for(lambda n=some: rows(killed) > n, process)  # type: ignore[misc]
        process.kill()
        process.communicate()
        assert not (killed / "final.pdb").exists()
    said: list[str] = []
    simulation = Simulation.resume(killed, progress=False, say=said.append)
    assert simulation.run().finished
    assert "bit for bit the run without a stop" in said[0] and "not" not in said[0]
    same_run(killed, whole)
    table = read_table(killed / "log.csv")
    np.testing.assert_array_equal(table["step"], np.arange(0, 30_001, 50))
    assert len(mdtraj.load(str(killed / "trajectory.dcd"), top=str(killed / "start.pdb"))) == 601


def interrupted_after(settings: RunSettings, folder: Path, checkpoints: int) -> None:
    """Start a run and kill it, as far as its files can tell, right after some checkpoint and some frames more."""
    simulation = Simulation.start(settings, folder, progress=False, say=quiet)
    save, report, seen = simulation._save, simulation._report, []

    class Killed(BaseException):
        pass

    def counted_save(context: openmm.Context, phase: str, step: int) -> None:
        save(context, phase, step)
        seen.append(step)

    def counted_report(context: openmm.Context, step: int) -> None:
        report(context, step)
        if len(seen) > checkpoints:
            raise Killed

    simulation._save, simulation._report = counted_save, counted_report  # type: ignore[method-assign]
    with pytest.raises(Killed):
        simulation.run()


@pytest.mark.parametrize(
    "kind", ["npt water", "network", "periodic network", "network in water", "embedded network", "nve"]
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    kind: str, alanine: str, tiny_model: str, water_box: dict[str, Any], tmp_path: Path
) -> None:
    # box vectors as CRYST1 has them, so small that the pair lists hold images and change
    boxed = tmp_path / "boxed.pdb"
    boxed.write_text(
        "CRYST1   13.000   14.000   12.500  90.00  90.00  90.00 P 1           1\n"
        + Path(alanine).read_text(encoding="utf-8")
    )
    settings = {
        "periodic network": small_network(
            str(boxed), tiny_model, steps=240, checkpoint_interval=80, report_interval=40, temperature=2000.0,
            timestep=2.0, max_force=1e7,
        ),
        "npt water": gas(
            alanine, steps=100, report_interval=10, checkpoint_interval=30, equilibration_steps=30, **water_box
        ),
        "network": small_network(alanine, tiny_model, steps=120, checkpoint_interval=40, equilibration_steps=40),
        "network in water": small_network(
            alanine, tiny_model, steps=60, report_interval=10, checkpoint_interval=20,
            **(water_box | {"timestep": 0.1, "ml_region": "resname ACE", "max_force": 1e7}),
        ),
        "embedded network": small_network(
            alanine, tiny_model, steps=60, report_interval=10, checkpoint_interval=20, embedding="electrostatic",
            **(water_box | {"timestep": 0.1, "ml_region": "resname ACE", "max_force": 1e7}),
        ),
        "nve": gas(alanine, steps=300, ensemble="nve", equilibration_steps=50),
    }[kind]  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(settings, whole)
    interrupted_after(settings, stopped, checkpoints=1)
    simulation = Simulation.resume(stopped, progress=False, say=quiet)
    assert simulation.run().finished
    same_run(stopped, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_with_a_checkpoint(number: signal.Signals, alanine: str, tmp_path: Path) -> None:
    settings = gas(alanine, steps=10_000_000, report_interval=50)
    folder = tmp_path / "run"
    process = spawn("start", folder, settings)
    wait_for(lambda: rows(folder) > 20, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    step, finished, name = out.split()
    assert (finished, name) == ("False", number.name)
    checkpoint = Checkpoint.load(folder / "checkpoint.zip")
    assert checkpoint.phase == "production" and checkpoint.step == int(step)
    assert f"stopped by {number.name} in production at step {step}" in err
    said: list[str] = []
    more = (int(step) // 100 + 3) * 100
    simulation = Simulation.resume(folder, steps=more, progress=False, say=said.append)
    assert simulation.run().finished
    if int(step) % settings.checkpoint_interval:
        assert "not bit for bit: it was stopped between two regular checkpoints" in said[0]
    np.testing.assert_array_equal(read_table(folder / "log.csv")["step"], np.arange(0, more + 1, 50))
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]["steps"] == more


def test_a_signal_during_minimisation_starts_it_again(alanine: str, tmp_path: Path) -> None:
    settings = gas(alanine, steps=20, minimization_steps=100_000)
    simulation = Simulation.start(settings, tmp_path / "run", progress=False, say=quiet)
    minimize = openmm.LocalEnergyMinimizer.minimize

    def with_signal(context: openmm.Context, tolerance: float, iterations: int, reporter: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        minimize(context, tolerance, iterations, reporter)

    openmm.LocalEnergyMinimizer.minimize = with_signal
    try:
        result = simulation.run()
    finally:
        openmm.LocalEnergyMinimizer.minimize = minimize
    assert not result.finished and result.signal == "SIGTERM"
    assert Checkpoint.load(tmp_path / "run" / "checkpoint.zip").phase == "minimize"
    assert Simulation.resume(tmp_path / "run", progress=False, say=quiet).run().finished


def test_a_run_works_outside_the_main_thread(alanine: str, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(gas(alanine, steps=40), tmp_path / "run"))
    thread.start()
    thread.join()
    assert rows(tmp_path / "run") == 3


def test_seeds_decide_the_run(alanine: str, tmp_path: Path) -> None:
    for name, seed in (("one", 7), ("same", 7), ("other", 8)):
        run(gas(alanine, steps=60, seed=seed), tmp_path / name)
    same_run(tmp_path / "one", tmp_path / "same")
    assert (tmp_path / "one" / "log.csv").read_bytes() != (tmp_path / "other" / "log.csv").read_bytes()


def test_an_nve_run_conserves_energy_and_nvt_reaches_its_temperature(alanine: str, tmp_path: Path) -> None:
    run(gas(alanine, steps=4000, ensemble="nve", timestep=0.5, equilibration_steps=500), tmp_path / "nve")
    table = read_table(tmp_path / "nve" / "log.csv")
    total, kinetic = table["total_kJ_mol"], table["kinetic_kJ_mol"]
    # the leapfrog error at 0.5 fs is small against what flows between kinetic and potential energy
    assert kinetic.std() > 3.0 and total.std() < 0.02 * kinetic.std() and abs(total[-1] - total[0]) < 1.0
    run(gas(alanine, steps=25_000, friction=20.0, equilibration_steps=1000), tmp_path / "nvt")
    temperature = read_table(tmp_path / "nvt" / "log.csv")["temperature_K"]
    # 22 atoms with 12 constrained hydrogens; the width is T sqrt(2 / degrees of freedom)
    freedom = degrees_of_freedom(load_system(tmp_path / "nvt" / "system.xml"))
    assert freedom == 3 * 22 - 12 - 3
    mean = mean_with_error(temperature)
    assert mean.error < 5.0 and abs(mean.value - 300.0) < 4 * mean.error
    assert temperature.std() == pytest.approx(300.0 * np.sqrt(2 / freedom), rel=0.1)


def test_the_table_agrees_with_the_trajectory(alanine: str, water_box: dict[str, Any], tmp_path: Path) -> None:
    run(gas(alanine, steps=60, report_interval=20, **water_box), tmp_path / "run")
    table = read_table(tmp_path / "run" / "log.csv")
    frames = mdtraj.load(str(tmp_path / "run" / "trajectory.dcd"), top=str(tmp_path / "run" / "start.pdb"))
    # single precision of the DCD
    np.testing.assert_allclose(table["volume_nm3"], frames.unitcell_volumes, rtol=1e-5)
    np.testing.assert_allclose(table["density_g_cm3"], mdtraj.density(frames) / 1000.0, rtol=1e-4)
    assert len(set(table["volume_nm3"])) > 1
    _, phi = mdtraj.compute_phi(frames, periodic=False)
    _, psi = mdtraj.compute_psi(frames, periodic=False)
    np.testing.assert_allclose(table["phi"], np.degrees(phi[:, 0]), atol=0.05)
    np.testing.assert_allclose(table["psi"], np.degrees(psi[:, 0]), atol=0.05)
    # the solute is in the middle, and every molecule is whole
    bonds = np.array([(a.index, b.index) for a, b in frames.topology.bonds])
    assert mdtraj.compute_distances(frames, bonds, periodic=False).max() < 0.2


def test_exploding_forces_stop_the_run_and_save_it(alanine: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    simulation = Simulation.start(gas(alanine, steps=500, max_force=50.0), folder, progress=False, say=quiet)
    with pytest.raises(RunFailed, match=r"force on atom \d+ \(\w+ of (ACE|ALA|NME) \d, \w+\) is .* max_force = 50"):
        simulation.run()
    failure = folder / "failure"
    system, state = load_system(failure / "system.xml"), load_state(failure / "state.xml")
    assert system.getNumParticles() == len(state.getPositions()) == 22
    assert isinstance(load_integrator(failure / "integrator.xml"), openmm.LangevinMiddleIntegrator)
    assert len(app.PDBFile(str(failure / "positions.pdb")).positions) == 22
    assert "max_force" in (failure / "message.txt").read_text(encoding="utf-8")


def test_nan_from_the_network_stops_the_run_and_names_the_atom(
    alanine: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openmm_spookynet import SpookyNet

    folder, calls, predict = tmp_path / "run", [], SpookyNet.predict

    def predict_nan_at_last(self: SpookyNet, batch: Any, fixed: Any) -> Any:
        calls.append(None)
        found = predict(self, batch, fixed)
        found.energy = found.energy * (float("nan") if len(calls) > 150 else 1.0)
        return found

    monkeypatch.setattr(SpookyNet, "predict", predict_nan_at_last)
    settings = small_network(alanine, tiny_model, steps=500, checkpoint_interval=40)
    simulation = Simulation.start(settings, folder, progress=False, say=quiet)
    with pytest.raises(RunFailed, match=r"production stopped near step \d+: .*atom \d+ \(") as caught:
        simulation.run()
    assert len(calls) == 151
    assert caught.value.folder == folder / "failure"
    assert {"system.xml", "state.xml", "integrator.xml"} <= {p.name for p in (folder / "failure").iterdir()}
    assert load_state(folder / "failure" / "state.xml").getStepCount() > 40
    # the checkpoint is from before, and whole
    positions = Checkpoint.load(folder / "checkpoint.zip").openmm_state().getPositions(asNumpy=True)._value
    assert np.isfinite(positions).all()


def test_a_broken_bond_stops_the_run_unless_that_is_allowed(alanine: str, tiny_model: str, tmp_path: Path) -> None:
    # a repulsive network has no bonds: the molecule falls apart
    settings = small_network(alanine, tiny_model, steps=2000, check_bonds=True, temperature=1500.0)
    simulation = Simulation.start(settings, tmp_path / "guarded", progress=False, say=quiet)
    with pytest.raises(RunFailed, match=r"the bond between atom .* is broken"):
        simulation.run()
    run(settings.replace(check_bonds=False, steps=200), tmp_path / "free")


def test_a_run_with_a_time_limit_ends_at_a_checkpoint(alanine: str, tmp_path: Path) -> None:
    settings = gas(alanine, steps=100_000_000, checkpoint_interval=300, report_interval=50)
    simulation = Simulation.start(settings, tmp_path / "limited", progress=False, say=quiet)
    begin = time.monotonic()
    result = simulation.run(seconds=0.5)
    assert 0.5 < time.monotonic() - begin < 30 and result.finished
    assert 0 < result.step < settings.steps and result.step % 300 == 0
    assert (
        json.loads((tmp_path / "limited" / "run.json").read_text(encoding="utf-8"))["settings"]["steps"] == result.step
    )
    run(settings.replace(steps=result.step), tmp_path / "planned")
    same_run(tmp_path / "limited", tmp_path / "planned")


def test_folders_are_not_mixed_up(alanine: str, tmp_path: Path) -> None:
    settings = gas(alanine, steps=40)
    run(settings, tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a run already"):
        Simulation.start(settings, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"no run.json"):
        Simulation.resume(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"^steps: expected at least 40"):
        Simulation.resume(tmp_path / "run", steps=20, say=quiet)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a folder"):
        Simulation.start(settings, tmp_path / "file")
    # a finished run can be made longer
    longer = Simulation.resume(tmp_path / "run", steps=80, progress=False, say=quiet)
    assert longer.run().step == 80 and rows(tmp_path / "run") == 5


def test_the_configuration_says_what_ran(alanine: str, tiny_model: str, tmp_path: Path) -> None:
    settings = small_network(alanine, tiny_model, steps=20)
    run(settings, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert RunSettings.from_dict(found["settings"]) == settings
    assert found["resolved"]["platform"] and found["resolved"]["ml_atoms"] == list(range(22))
    assert {"openmm", "torch", "openmm-mlff"} <= set(found["programs"])
