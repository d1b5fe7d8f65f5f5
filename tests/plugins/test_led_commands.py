"""``openmm-mlff led train|run|validate`` from end to end on short trajectories, and what they say about bad input."""

from __future__ import annotations

import csv
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_led.command_train import settings, split_files
from openmm_led.trajectories import read_trajectories
from openmm_mlff.cli import main
from openmm_mlff.data.model_file import load_card, sha256_of
from openmm_mlff.sampling.implicit_solvent import use_native_obc2
from openmm_mlff.sampling.propagators import load_propagator

SMALL = ("autoencoder_steps=60", "propagator_steps=60", "encoder_widths=16", "decoder_widths=16", "hidden=8",
         "decoder_kernels=2", "kernels=2", "lanes=4", "chunk=40", "batch=128")  # fmt: skip
FORCES = ("--forcefield", "amber99sbildn.xml", "implicit/obc2.xml")


@pytest.fixture(scope="module")
def data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the topology and five runs of 120 ps, a frame per ps."""
    folder = tmp_path_factory.mktemp("led")
    shutil.copy(shared / "data" / "alanine-dipeptide-implicit.pdb", folder / "ala2.pdb")
    pdb = app.PDBFile(str(folder / "ala2.pdb"))
    field = app.ForceField("amber99sbildn.xml", "implicit/obc2.xml")
    system = field.createSystem(pdb.topology, constraints=app.HBonds, hydrogenMass=3 * unit.amu)
    use_native_obc2(system)
    for k in range(5):
        integrator = openmm.LangevinMiddleIntegrator(300, 1 / unit.picosecond, 0.004)
        integrator.setRandomNumberSeed(k + 1)
        simulation = app.Simulation(pdb.topology, system, integrator, openmm.Platform.getPlatform("Reference"))
        simulation.context.setPositions(pdb.positions)
        simulation.minimizeEnergy()
        simulation.context.setVelocitiesToTemperature(300, k + 1)
        simulation.step(500)
        simulation.reporters.append(app.DCDReporter(str(folder / f"run{k}.dcd"), 250))
        simulation.step(250 * 120)
    return folder


def train_command(folder: Path, *more: str) -> list[str]:
    files = [str(folder / f"run{k}.dcd") for k in range(4)]
    options = [x for text in SMALL for x in ("--set", text)]
    return ["led", "train", "--topology", str(folder / "ala2.pdb"), "--trajectories", *files, "--valid-fraction", "0.3",
            "--temperature", "300", "--output", str(folder / "model"), "--quiet", *options, *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    arguments = ["--states", "8", "--copies", "1", "--lag", "2"]
    assert main(train_command(data, *arguments)) == 0
    return data


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("openmm-mlff led: error: "), lines
    return lines[0].removeprefix("openmm-mlff led: error: ")


def test_training_leaves_everything_behind(trained: Path) -> None:
    folder = trained / "model"
    assert {p.name for p in folder.iterdir()} >= {
        *("model.safetensors", "configuration.json", "inputs.json", "solute.pdb", "validation"),
        *("autoencoder", "decoder", "propagator_0"),
    }
    model, card = load_propagator(folder / "model.safetensors"), load_card(folder / "model.safetensors")
    assert (model.latent_dim, model.temperature, model.n_atoms) == (2, 300.0, 22)
    assert model.interval == pytest.approx(1.0, rel=1e-6)
    assert card["training_data"]["train"]["runs"] == 3 and card["training_data"]["valid"]["frames"] == 120
    files = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))["files"]
    assert len(files["train"]) == 3 and len(files["valid"]) == 1 and not set(files["train"]) & set(files["valid"])
    report = json.loads((folder / "validation" / "report.json").read_text(encoding="utf-8"))
    assert report["about"]["test"] == {"runs": 1, "frames": 120, "names": [Path(files["valid"][0]).name]}
    sections = {row["section"] for row in report["rows"]}
    assert sections >= {"distributions", "time scales, latent", "time scales, decoded", "geometry"}
    assert all((folder / "validation" / name).is_file() for name in report["pictures"])
    assert load_propagator(folder / "model.safetensors").encode(
        mdtraj.load(str(folder / "solute.pdb")).xyz.astype(float)
    ).shape == (1, 2)


def test_the_same_command_goes_on_and_ends_with_the_same_model(trained: Path, tmp_path: Path) -> None:
    folder = trained / "model"
    before = sha256_of(folder / "model.safetensors")
    shutil.rmtree(folder / "propagator_0")
    (folder / "model.safetensors").rename(tmp_path / "first.safetensors")
    assert main(train_command(trained, "--no-validate")) == 0
    assert sha256_of(folder / "model.safetensors") == before


def test_other_settings_need_another_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, train_command(trained, "--set", "hidden=9"))
    assert message.startswith("config: ") and message.endswith("choose another folder")


def validate_command(folder: Path, *more: str) -> list[str]:
    return ["led", "validate", "--model", str(folder / "model" / "model.safetensors"), "--topology",
            str(folder / "ala2.pdb"), "--quiet", "--states", "8", "--copies", "1", *more]  # fmt: skip


def test_validation_on_runs_that_the_model_has_not_seen(trained: Path, tmp_path: Path) -> None:
    training = [str(trained / f"run{k}.dcd") for k in range(4)]
    test = ["--trajectories", str(trained / "run4.dcd"), "--output", str(tmp_path)]
    assert main(validate_command(trained, *test, "--train", *training, "--baselines")) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    distances = next(r for r in report["rows"] if r["quantity"] == "JSD of torsions")["values"]
    assert set(distances) >= {"LED", "MSM", "autoencoder", "training MD", "MD floor"}
    # at most ln 2; what a Markov model of the same data draws are frames of the data
    assert all(0 < entry["value"] < np.log(2) for entry in distances.values())
    geometry = {r["quantity"]: r["values"] for r in report["rows"] if r["section"] == "geometry"}
    assert geometry["inverted frames"]["MD"]["value"] == 0.0
    assert geometry["s.d. of N-CA-CB"]["MD"]["value"] == pytest.approx(3.1, abs=0.6)


def test_runs_that_the_model_was_made_with_are_no_test(trained: Path, tmp_path: Path, capsys) -> None:
    seen = ["--trajectories", str(trained / "run0.dcd"), "--output", str(tmp_path)]
    assert "run0.dcd is one of the runs that the model was made with" in refused(
        capsys, validate_command(trained, *seen)
    )
    both = ["--trajectories", str(trained / "run4.dcd"), "--train", str(trained / "run4.dcd"), "--output",
            str(tmp_path)]  # fmt: skip
    assert "120 frames of train are also in test" in refused(capsys, validate_command(trained, *both))


def run_command(folder: Path, output: Path, *more: str) -> list[str]:
    return ["led", "run", "--model", str(folder / "model" / "model.safetensors"), "--topology",
            str(folder / "ala2.pdb"), "--output", str(output), "--quiet", *more]  # fmt: skip


def test_a_latent_run_that_was_stopped_goes_on_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    options = ("--walkers", "3", "--every", "20", "--seed", "5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(run_command(trained, whole, *options, "--frames", "100")) == 0
    assert main(run_command(trained, parts, *options, "--frames", "40")) == 0
    assert main(["led", "run", "--resume", "--output", str(parts), "--frames", "100", "--quiet"]) == 0
    assert (whole / "latent.csv").read_bytes() == (parts / "latent.csv").read_bytes()
    for k in range(3):
        a, b = (mdtraj.load(str(f / f"trajectory-{k}.dcd"), top=str(f / "solute.pdb")) for f in (whole, parts))
        np.testing.assert_array_equal(a.xyz, b.xyz)
        assert len(a) == 5 and np.isfinite(a.xyz).all()
    names = {"latent.csv", "checkpoint", "run.json", "summary.json", "summary.png", "solute.pdb"}
    assert {p.name for p in parts.iterdir()} == names | {f"trajectory-{k}.dcd" for k in range(3)}
    summary = json.loads((parts / "summary.json").read_text(encoding="utf-8"))
    assert summary["frames"] == 100 and summary["made_ns"] == pytest.approx(0.18, rel=1e-4)


def test_a_latent_run_can_begin_with_a_past(trained: Path, tmp_path: Path) -> None:
    start = ("--start", str(trained / "run4.dcd"), "--frames", "1")
    assert main(run_command(trained, tmp_path / "a", *start)) == 0
    past = read_trajectories([trained / "run4.dcd"], app.PDBFile(str(trained / "ala2.pdb")).topology).frames[0]
    model = load_propagator(trained / "model" / "model.safetensors")
    expected = model.step(model.start(model.encode(past.astype(float))[None]), np.random.default_rng(0)).z[0]
    found = rows(tmp_path / "a" / "latent.csv")[0]
    np.testing.assert_allclose([float(found["z0"]), float(found["z1"])], expected, rtol=1e-6)


def test_latent_steps_and_molecular_dynamics_in_turn(trained: Path, tmp_path: Path) -> None:
    options = ("--macro", "20", "--micro", "4", "--warmup", "5", "--format", "xtc", "--ignore-doubt", *FORCES)
    assert main(run_command(trained, tmp_path / "a", *options, "--frames", "40")) == 0
    assert main(["led", "run", "--resume", "--output", str(tmp_path / "a"), "--frames", "77", "--quiet"]) == 0
    table = rows(tmp_path / "a" / "latent.csv")
    assert [int(row["frame"]) for row in table] == list(range(1, 78))
    phases = [row["phase"] for row in table]
    assert phases[:5] == ["warmup"] * 5 and phases[5:25] == ["macro"] * 20
    summary = json.loads((tmp_path / "a" / "summary.json").read_text(encoding="utf-8"))["statistics"]
    assert summary["returns"] == len(rows(tmp_path / "a" / "rounds.csv")) == 3
    assert summary["warmup_frames"] == 5 and summary["latent_frames"] + summary["md_frames"] == 72
    solute = mdtraj.load(str(tmp_path / "a" / "trajectory.xtc"), top=str(tmp_path / "a" / "solute.pdb"))
    assert len(solute) == 77 and solute.time[-1] == pytest.approx(77.0, rel=1e-4)


def test_runs_that_cannot_be_are_refused(trained: Path, tmp_path: Path, capsys) -> None:
    new = tmp_path / "new"
    assert refused(capsys, run_command(trained, new, "--micro", "5")).startswith("--micro: molecular dynamics need")
    assert refused(capsys, run_command(trained, new, "--frames", "0")) == "--frames: expected at least 1, got 0"
    assert "expected 300 K" in refused(capsys, run_command(trained, new, "--temperature", "350", *FORCES))
    assert refused(capsys, run_command(trained, new, "--forcefield", "none.xml")).startswith("--forcefield: none.xml")
    assert "expected a divisor" in refused(capsys, run_command(trained, new, "--timestep", "3", *FORCES))
    assert refused(capsys, ["led", "run", "--resume", "--output", str(new)]) == f"--resume: no run.json in {new}"
    assert main(run_command(trained, new, "--frames", "5")) == 0
    assert "holds a run already" in refused(capsys, run_command(trained, new, "--frames", "5"))
    assert "walkers was 1, got 2" in refused(capsys, run_command(trained, new, "--resume", "--walkers", "2"))


def test_a_model_of_another_molecule_is_refused(trained: Path, shared: Path, tmp_path: Path, capsys) -> None:
    arguments = run_command(trained, tmp_path / "a")
    arguments[arguments.index("--topology") + 1] = str(shared / "data" / "1l2y.pdb")
    assert refused(capsys, arguments) == "topology: expected 22 atoms, got 304"
    arguments[arguments.index("--topology") + 1] = str(tmp_path / "none.pdb")
    assert refused(capsys, arguments).startswith("--topology: no file at")


def changed(folder: Path, source: str, target: str, change: Any) -> str:
    """A copy of a trajectory, changed."""
    trajectory = mdtraj.load(str(folder / source), top=str(folder / "ala2.pdb"))
    change(trajectory)
    trajectory.save(str(folder / target))
    return str(folder / target)


def test_data_that_do_not_fit_are_refused(trained: Path, shared: Path, tmp_path: Path, capsys) -> None:
    def command(*files: str, more: tuple[str, ...] = ()) -> list[str]:
        return ["led", "train", "--topology", str(trained / "ala2.pdb"), "--output", str(tmp_path), "--quiet",
                "--trajectories", *files, *more]  # fmt: skip

    good = [str(trained / f"run{k}.dcd") for k in range(2)]

    def slower(t: mdtraj.Trajectory) -> None:
        t.time = 2.0 * np.arange(len(t))

    def broken(t: mdtraj.Trajectory) -> None:
        t.xyz[7, 3] = np.nan

    slow = changed(trained, "run1.dcd", "slow.xtc", slower)
    assert "run0.dcd has 1 ps, slow.xtc has 2 ps" in refused(
        capsys, command(*good, slow, more=("--valid", str(trained / "run2.dcd")))
    )
    assert "valid has 2 ps" in refused(capsys, command(*good, more=("--valid", slow)))
    nan = changed(trained, "run1.dcd", "nan.dcd", broken)
    timed = ("--interval", "1")
    assert "frame 7 of nan.dcd holds NaN" in refused(capsys, command(good[0], nan, more=timed))
    same = command(*good, more=("--valid", good[1]))
    assert "120 frames of valid are also in train" in refused(capsys, same)
    assert "lag: expected fewer than the 120 frames" in refused(capsys, command(*good, more=("--set", "lag=120")))
    assert "does not fit the topology of 22 atoms" in refused(capsys, command(str(shared / "data" / "1l2y.pdb"), *good))
    assert refused(capsys, command(good[0])).startswith("--trajectories: expected at least two")
    assert refused(capsys, command("none.dcd", good[0])) == "trajectories: no file at none.dcd"
    few = changed(trained, "run1.dcd", "few.dcd", lambda t: t.__init__(t.xyz[:30], t.topology, t.time[:30]))
    assert "at least 100 training frames, got 30" in refused(
        capsys, command(few, more=("--valid", good[0], "--interval", "1"))
    )


def test_times_that_a_file_does_not_tell_must_be_given(trained: Path) -> None:
    topology = app.PDBFile(str(trained / "ala2.pdb")).topology
    header = (trained / "run0.dcd").read_bytes()[:48]
    every, step = struct.unpack("<i", header[16:20])[0], struct.unpack("<f", header[44:48])[0]
    # OpenMM writes the step in units of 0.04888 ps
    assert every * step * 0.0488882 == pytest.approx(1.0, rel=1e-5)
    assert read_trajectories([trained / "run0.dcd"], topology).interval == 1.0
    # mdtraj does not know the step when it writes, and numbers the frames when it reads
    rewritten = changed(trained, "run0.dcd", "rewritten.dcd", lambda t: None)
    with pytest.raises(ValueError, match=r"rewritten.dcd does not tell the time between its frames"):
        read_trajectories([rewritten], topology)
    assert read_trajectories([rewritten], topology, interval=0.5).interval == 0.5
    with pytest.raises(ValueError, match="trajectories: expected at least one file, got none"):
        read_trajectories([], topology)


def test_settings_by_name() -> None:
    given = ["hidden=48", "encoder_widths=32,16", "learning_rate=1", "calibrate=true"]
    config, options = settings(given, {"latent_dim": 3}, 7)
    assert config.calibrate is True
    assert (config.hidden, config.encoder_widths, config.latent_dim) == (48, (32, 16), 3)
    assert (options.learning_rate, options.seed) == (1.0, 7)
    for text, message in (
        ("hiden=3", "did you mean 'hidden'"),
        ("hidden=few", "hidden: expected a whole number, got 'few'"),
        ("calibrate=1", "calibrate: expected true or false, got 1"),
        ("hidden", "expected NAME=VALUE"),
        ("model.hidden=3", "without a dot"),
        ("decoder=flow", "decoder: expected one of"),
        ("encoder_widths=a", "expected positive whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            settings([text], {}, 0)


def test_whole_trajectories_are_held_back() -> None:
    files = [f"{k}.dcd" for k in range(10)]
    split = split_files(files, None, 0.2, 1)
    assert len(split["valid"]) == 2 and sorted([*split["train"], *split["valid"]]) == files
    assert split == split_files(files, None, 0.2, 1) != split_files(files, None, 0.2, 2)
    assert split_files(files, ["v.dcd"], 0.2, 1) == {"train": files, "valid": ["v.dcd"]}
    with pytest.raises(ValueError, match="--valid-fraction: expected a number between 0 and 1"):
        split_files(files, None, 1.5, 1)
