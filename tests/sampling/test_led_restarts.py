"""Files and restarts of latent and molecular dynamics bit for bit, and everything that can go wrong."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import unit

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.data.files import read_arrays
from openmm_mlff.sampling import back_mapping, led_checkpoint, led_dynamics
from openmm_mlff.sampling.back_mapping import RelaxationSettings
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.led_records import MACRO, Frames, Return
from openmm_mlff.sampling.led_reporters import BackMappedReporter, LatentReporter, LEDReporter, RoundReporter
from openmm_mlff.sampling.led_simulation import LEDSimulation
from openmm_mlff.sampling.propagators import LatentState

from .copies import Molecule
from .latent_models import (
    TORSIONS,
    MakeLED,
    Recorder,
    TorsionModel,
    diatomic,
)

# -- files and restarts --------------------------------------------------------------------------------------------


def reporters(folder: Path, trajectory: str = "solute.dcd") -> list[LEDReporter]:
    return [
        LatentReporter(folder / "latent.csv"),
        RoundReporter(folder / "rounds.csv"),
        BackMappedReporter(folder / trajectory, every=2),
    ]


def same_state(one: LEDSimulation, other: LEDSimulation) -> None:
    """Everything that a checkpoint holds, bit for bit."""
    for a, b in zip(one._at.pack(), other._at.pack(), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("cut", [2, 7, 12, 25])
def test_a_resumed_run_goes_on_bit_for_bit(make_led: MakeLED, tmp_path: Path, cut: int) -> None:
    """Cut in the warm-up, in latent steps, in MD, and later; with two walkers, and files that go on."""
    folders = tmp_path / "whole", tmp_path / "cut"
    whole = make_led(n_walkers=2)
    whole.reporters += reporters(folders[0])
    whole.step(cut)
    whole.saveCheckpoint(folders[0] / "led.checkpoint")
    whole.step(17)

    first = make_led(n_walkers=2)
    first.reporters += reporters(folders[1])
    first.step(cut)
    first.saveCheckpoint(folders[1] / "led.checkpoint")
    first.step(3)  # lost when the run is killed
    second = make_led(n_walkers=2, start=False)
    second.loadCheckpoint(folders[1] / "led.checkpoint")
    second.reporters += reporters(folders[1])
    second.step(17)

    same_state(whole, second)
    counts = [{k: v for k, v in s.statistics.to_dict().items() if k != "seconds"} for s in (whole, second)]
    assert counts[0] == counts[1]
    texts = [(f / "latent.csv").read_bytes() for f in folders]
    assert texts[0] == texts[1]
    for k in range(2):
        frames = [(f / f"solute-{k}.dcd").read_bytes()[276:] for f in folders]
        assert frames[0] == frames[1]
    rows = [
        [line.split(",")[:13] for line in (f / "rounds.csv").read_text(encoding="utf-8").splitlines()] for f in folders
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 1 + whole.statistics.returns


def test_dynamics_that_are_stopped_after_a_return_do_not_return_again(
    make_led: MakeLED, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the return and its dynamics: what follows is what would have been."""
    whole, stopped, recorder = make_led(), make_led(), Recorder()
    whole.step(16)
    stopped.reporters.append(recorder)
    stopped.step(10)  # the next frame is that of a return

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stopped._dynamics, "run", stop)
        stopped.step(6)
    assert stopped.frames.tolist() == [10] and len(recorder.returns) == 1
    stopped.saveCheckpoint(tmp_path / "c")
    resumed = make_led(start=False)
    resumed.loadCheckpoint(tmp_path / "c")
    for simulation in (stopped, resumed):
        simulation.step(6)
        same_state(whole, simulation)
        assert simulation.statistics.returns == whole.statistics.returns
    assert len(recorder.returns) == whole.statistics.returns


def test_latent_steps_that_are_stopped_are_made_again(
    make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray
) -> None:
    class Interrupted(TorsionModel):
        stop_at = 3

        def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
            later = super().step(state, random)
            self.stop_at -= 1
            if self.stop_at == 0:
                raise KeyboardInterrupt
            return later

    whole, stopped = make_led(), make_led(Interrupted(molecule.topology, relaxed))
    whole.step(20)
    with pytest.raises(KeyboardInterrupt):
        stopped.step(20)
    assert stopped.frames.tolist() == [4]
    stopped.step(16)
    same_state(whole, stopped)


@pytest.mark.parametrize("calls", [2, 3, 4])
def test_ctrl_c_while_reporters_write_loses_no_frame(make_led: MakeLED, tmp_path: Path, calls: int) -> None:
    """In latent steps, at a return and in dynamics: the block is finished first."""

    class Pressed(Recorder):
        left = calls

        def frames(self, simulation: LEDSimulation, frames: Frames) -> None:
            self.press()
            super().frames(simulation, frames)

        def returned(self, simulation: LEDSimulation, record: Return) -> None:
            self.press()
            super().returned(simulation, record)

        def press(self) -> None:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

    whole, stopped, pressed = make_led(), make_led(), Pressed()
    for simulation, folder in ((whole, tmp_path / "whole"), (stopped, tmp_path / "stopped")):
        simulation.reporters += [pressed] if simulation is stopped else []
        simulation.reporters += reporters(folder)
    whole.step(25)
    with pytest.raises(KeyboardInterrupt):
        stopped.step(25)
    stopped.step(25 - int(stopped.frames[0]))
    same_state(whole, stopped)
    assert [number for number, _ in pressed.of(0)] == list(range(1, 26))
    texts = [(tmp_path / name / "latent.csv").read_text(encoding="utf-8") for name in ("whole", "stopped")]
    assert texts[0] == texts[1]
    assert len(pressed.returns) == whole.statistics.returns


def test_seconds_of_a_row_are_those_since_the_row_before_also_after_a_restart(
    make_led: MakeLED, tmp_path: Path
) -> None:
    first = make_led()
    first.reporters.append(RoundReporter(tmp_path / "rounds.csv"))
    first.step(13)
    first.statistics.seconds["md"] += 1000.0  # long ago
    first.step(9)
    first.saveCheckpoint(tmp_path / "c")
    second = make_led(start=False)
    second.loadCheckpoint(tmp_path / "c")
    second.reporters.append(RoundReporter(tmp_path / "rounds.csv"))
    second.step(9)
    rows = np.genfromtxt(tmp_path / "rounds.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert len(rows) == 3 and rows["seconds_md"][1] > 1000.0
    assert rows["seconds_md"][[0, 2]].max() < 500.0


def test_no_second_is_counted_twice(make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray) -> None:
    class Slow(TorsionModel):
        def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
            time.sleep(0.3)
            return super().decode(z, random)

    simulation, begin = make_led(Slow(molecule.topology, relaxed)), time.perf_counter()
    simulation.step(11)
    spent = simulation.statistics.seconds
    assert spent["decode"] >= 0.3
    assert sum(spent.values()) <= time.perf_counter() - begin


def test_loading_takes_a_running_simulation_back(make_led: MakeLED, tmp_path: Path) -> None:
    simulation = make_led()
    simulation.reporters += reporters(tmp_path, "solute.xtc")
    simulation.step(12)
    simulation.saveCheckpoint(tmp_path / "c")
    simulation.step(9)
    end, text = simulation._at.pack()[1], (tmp_path / "latent.csv").read_bytes()
    frames = mdtraj.load(str(tmp_path / "solute.xtc"), top=mdtraj.Topology.from_openmm(simulation.topology)).xyz
    simulation.loadCheckpoint(tmp_path / "c")
    simulation.step(9)
    again = simulation._at.pack()[1]
    for name in end:
        np.testing.assert_array_equal(end[name], again[name])
    assert (tmp_path / "latent.csv").read_bytes() == text
    loaded = mdtraj.load(str(tmp_path / "solute.xtc"), top=mdtraj.Topology.from_openmm(simulation.topology))
    np.testing.assert_array_equal(loaded.xyz, frames)
    assert loaded.n_frames == 10
    np.testing.assert_allclose(loaded.time, 0.2 * np.arange(1, 11), atol=1e-6)


def _without_later_settings(path: Path, older: Path) -> None:
    """The file as it was written before these settings were."""
    header, arrays = read_arrays(path, led_checkpoint.FORMAT, "a checkpoint")
    for name in ("solute", "superpose", "relaxation", "integrator"):
        del header["facts"]["run"][name]
    led_checkpoint.write(older, header["facts"], arrays)


def test_other_settings_and_damaged_files_are_refused(make_led: MakeLED, tmp_path: Path) -> None:
    simulation = make_led()
    simulation.step(1)
    simulation.saveCheckpoint(tmp_path / "c")
    with pytest.raises(ValueError, match="expected a checkpoint with macro_steps 7, got 6"):
        make_led(macro_steps=7).loadCheckpoint(tmp_path / "c")
    with pytest.raises(ValueError, match="expected a checkpoint with walkers 2, got 1"):
        make_led(n_walkers=2).loadCheckpoint(tmp_path / "c")
    with pytest.raises(ValueError, match=r"expected a checkpoint with relaxation .*'free': 0.5"):
        make_led(relaxation=RelaxationSettings(free=0.5)).loadCheckpoint(tmp_path / "c")
    with pytest.raises(ValueError, match=r"expected a checkpoint with integrator Lang.*, got LangevinMiddle"):
        make_led(integrator=openmm.LangevinIntegrator(300, 1, 0.004)).loadCheckpoint(tmp_path / "c")
    _without_later_settings(tmp_path / "c", tmp_path / "old")
    make_led().loadCheckpoint(tmp_path / "old")
    (tmp_path / "d").write_bytes((tmp_path / "c").read_bytes()[:1000])
    with pytest.raises(ValueError, match="d: expected a checkpoint of a LEDSimulation, but the file is damaged"):
        simulation.loadCheckpoint(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match="e: no such file"):
        simulation.loadCheckpoint(tmp_path / "e")


def test_files_hold_what_happened(make_led: MakeLED, tmp_path: Path, relaxed: np.ndarray) -> None:
    simulation, recorder = make_led(), Recorder()
    simulation.reporters += [
        recorder, LatentReporter(tmp_path / "l.csv", every=3), RoundReporter(tmp_path / "r.csv"),
        BackMappedReporter(tmp_path / "b.dcd"),
    ]  # fmt: skip
    simulation.step(31)
    table = np.genfromtxt(tmp_path / "l.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert table.dtype.names == ("walker", "frame", "time_ps", "phase", "doubt", "z0", "z1")
    assert table["frame"].tolist() == list(range(3, 32, 3))
    np.testing.assert_allclose(table["time_ps"], 0.1 * table["frame"], atol=1e-9)
    phases = dict(recorder.of(0))
    assert table["phase"].tolist() == [phases[n] for n in range(3, 32, 3)]
    z = np.concatenate([f.z[0] for f in recorder.all])
    np.testing.assert_allclose(np.stack([table["z0"], table["z1"]], axis=1), z[2::3], rtol=1e-6)
    rounds = np.genfromtxt(tmp_path / "r.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert rounds["frame"].tolist() == [10, 19, 28] and rounds["tries"].tolist() == [1, 1, 1]
    np.testing.assert_allclose(
        rounds["minimized_kJ_mol"], [r.energies["minimized"] for r in recorder.returns], atol=1e-3
    )
    frames = mdtraj.load(str(tmp_path / "b.dcd"), top=mdtraj.Topology.from_openmm(simulation.topology))
    assert frames.n_frames == 31
    # decoded frames have the latent torsions up to the noise of decoding, those of MD exactly
    found = np.radians(dihedral(frames.xyz.astype(float), TORSIONS))
    apart = np.abs((found - z + np.pi) % (2 * np.pi) - np.pi).max(axis=1)
    latent = np.array([phases[n] == MACRO for n in range(1, 32)])
    assert apart[~latent].max() < 1e-4 < 1e-3 < apart[latent].mean() < 0.15
    # and all lie on the start
    heavy = [a.index for a in simulation.topology.atoms() if a.element.symbol != "H"]
    np.testing.assert_allclose(
        frames.xyz[:, heavy].mean(axis=1), np.tile(relaxed[heavy].mean(axis=0), (31, 1)), atol=1e-5
    )


def test_two_reporters_of_one_file_are_refused(make_led: MakeLED, tmp_path: Path) -> None:
    simulation = make_led()
    simulation.reporters += [LatentReporter(tmp_path / "l.csv"), LatentReporter(tmp_path / "l.csv")]
    with pytest.raises(ValueError, match="reporters: expected different files"):
        simulation.step(1)
    with pytest.raises(ValueError, match=r"path: expected a file .dcd or .xtc, got x.pdb"):
        BackMappedReporter("x.pdb")


# -- failures ------------------------------------------------------------------------------------------------------


def test_md_that_explodes_is_saved_and_named(make_led: MakeLED, relaxed: np.ndarray, tmp_path: Path) -> None:
    simulation = make_led(start=False)
    crushed = relaxed.copy()
    crushed[11:] = crushed[:11] + 1e-5
    with pytest.raises(ValueError, match="reference: expected a structure without clashes"):
        simulation.setPositions(crushed)
    simulation.setPositions(relaxed)
    simulation._at.walkers[0].positions[:] = crushed
    with pytest.raises(RunFailed, match=r"molecular dynamics stopped in frame \d"):
        simulation.step(4)
    assert {"system.xml", "state.xml", "message.txt"} <= {p.name for p in (tmp_path / "failure").iterdir()}
    assert simulation.frames.tolist() == [0]


def test_a_model_that_runs_away_is_saved_and_named(
    make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray, tmp_path: Path
) -> None:
    class Runaway(TorsionModel):
        broken = True

        def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
            z = state.z + 0.0 * random.normal(size=state.z.shape)
            z[-1] = np.nan if self.broken else 0.0
            return LatentState(z, state.memory)

    model = Runaway(molecule.topology, relaxed)
    simulation = make_led(model, n_walkers=2)
    with pytest.raises(RunFailed, match="latent coordinates of walker 1 are not numbers after frame 4"):
        simulation.step(20)
    again = make_led(model, n_walkers=2, start=False)
    again.loadCheckpoint(tmp_path / "failure" / "before.checkpoint")
    assert again._at.random.bit_generator.state == np.random.default_rng(0).bit_generator.state  # before the first draw
    model.broken = False
    again.step(3)
    assert again.frames.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macro_steps": 0}, "macro_steps: expected a whole number >= 1, got 0"),
        ({"micro_steps": -1}, "micro_steps: expected a whole number >= 0, got -1"),
        ({"warmup": 0}, "warmup: expected a whole number >= 1, got 0"),
        ({"n_walkers": 0}, "n_walkers: expected a whole number >= 1, got 0"),
        ({"timestep": 0.003}, "timestep: expected a divisor of the model's interval of 0.1 ps, got 0.003 ps"),
        ({"timestep": 1 * unit.nanometer}, "timestep: expected a number or a quantity in picosecond"),
        ({"temperature": 310.0}, "temperature: expected 300 K, at which the model was trained, got 310 K"),
        ({"temperature": -5.0}, "temperature: expected a positive number"),
        ({"equilibration": 1 * unit.nanometer, "relaxation": None}, "equilibration: expected a number or a quantity"),
        ({"equilibration": -1.0, "relaxation": None}, "equilibration: expected a time >= 0"),
        ({"solute": [0, 99]}, "solute: expected indices from 0 to 21, got 99"),
        ({"solute": "resname XYZ"}, "solute: expected at least one atom"),
        ({"solute": range(10)}, "model: it was trained on 22 atoms, but the solute has 10"),
        ({"platform": "Abacus"}, "platform: expected one of"),
        ({"integrator": openmm.NoseHooverIntegrator(300, 1, 0.004)}, "integrator: expected one of fixed step length"),
        ({"integrator": openmm.LangevinMiddleIntegrator(310, 1, 0.004)}, "integrator: expected a thermostat at"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make_led: MakeLED, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_led(start=False, **options)


def test_a_model_of_another_molecule_is_refused(
    implicit: openmm.System, molecule: Molecule, relaxed: np.ndarray, tmp_path: Path
) -> None:
    model = TorsionModel(molecule.topology, relaxed)
    model._names[3] = "XX"
    with pytest.raises(ValueError, match="topology: expected that of the training data"):
        LEDSimulation(implicit, molecule.topology, model, macro_steps=1, micro_steps=1)
    _, topology, _ = diatomic()
    with pytest.raises(ValueError, match="topology: expected 22 atoms, as the System has, got 2"):
        LEDSimulation(implicit, topology, model, macro_steps=1, micro_steps=1)
    with pytest.raises(FileNotFoundError):
        LEDSimulation(implicit, molecule.topology, tmp_path / "no.safetensors", macro_steps=1, micro_steps=1)


def test_positions_are_needed_and_checked(make_led: MakeLED, relaxed: np.ndarray) -> None:
    simulation = make_led(start=False, n_walkers=2)
    with pytest.raises(ValueError, match="positions: expected setPositions or loadCheckpoint"):
        simulation.step(1)
    with pytest.raises(ValueError, match=r"positions: expected shape \(22, 3\) or \(2, 22, 3\), got \(3, 22, 3\)"):
        simulation.setPositions(np.stack([relaxed] * 3))
    with pytest.raises(ValueError, match="positions: expected finite numbers"):
        simulation.setPositions(relaxed * np.nan)


def test_another_temperature_can_be_allowed_and_the_system_stays(
    make_led: MakeLED, implicit: openmm.System, relaxed: np.ndarray
) -> None:
    before = openmm.XmlSerializer.serialize(implicit)
    simulation = make_led(temperature=320.0, allow_other_temperature=True)
    simulation.step(14)
    assert openmm.XmlSerializer.serialize(implicit) == before


# -- platforms and forces ------------------------------------------------------------------------------------------


def test_a_platform_that_cannot_repeat_runs_too(make_led: MakeLED, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the Context is not started anew for every stretch."""
    for module in (led_dynamics, back_mapping):
        monkeypatch.setattr(module, "REPEATABLE", ())
    simulation, recorder = make_led(n_walkers=2), Recorder()
    simulation.reporters.append(recorder)
    simulation.run_rounds(2)
    assert simulation.statistics.accepted == 4
    positions = [w.positions for w in simulation._at.walkers]
    assert np.abs(positions[0] - positions[1]).max() > 0.01


def test_a_learned_force_is_continued_bit_for_bit(system: openmm.System, molecule: Molecule, tmp_path: Path) -> None:
    """A PythonForce in both Contexts; its pair list is built anew at every stretch."""
    options: dict[str, Any] = {
        "macro_steps": 2, "micro_steps": 1, "warmup": 1, "timestep": 0.0005, "failure": tmp_path,
        "relaxation": RelaxationSettings(iterations=5, restrained=0.002, free=0.002, max_moved=1.0), "watch": False,
    }  # fmt: skip
    model = TorsionModel(molecule.topology, molecule.positions)
    model.interval = 0.005
    ends = []
    for resumed in (False, True):
        simulation = LEDSimulation(system, molecule.topology, model, **options)
        if resumed:
            simulation.loadCheckpoint(tmp_path / "c")
        else:
            simulation.setPositions(molecule.positions)
            simulation.run_rounds(1)
            simulation.saveCheckpoint(tmp_path / "c")
        simulation.run_rounds(1)
        assert simulation.frames.tolist() == [7]
        ends.append(simulation)
    same_state(*ends)
