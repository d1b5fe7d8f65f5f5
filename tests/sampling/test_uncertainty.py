"""Runs of an ensemble: the table of uncertainties against the members' own numbers, and what ends or changes a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app
from openmmml import MLPotential

from openmm_mlff.analysis.observables import read_table
from openmm_mlff.cli import main
from openmm_mlff.data.formats import read_structures
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.ensemble import save_ensemble
from openmm_mlff.potentials.family import load_potential
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.reporters import dcd_frames
from openmm_mlff.sampling.settings import RunSettings
from openmm_mlff.sampling.simulation import Simulation
from openmm_mlff.sampling.uncertainty import UncertaintyReporter
from openmm_spookynet import SpookyNet, SpookyNetConfig

from .copies import Molecule

COMMON = {"steps": 20, "report_interval": 5, "checkpoint_interval": 10, "minimization_steps": 0, "timestep": 0.5,
          "check_bonds": False, "compile": "no"}  # fmt: skip


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SpookyNets with random weights; repulsive at short range, so that dynamics stay finite."""
    config = SpookyNetConfig(
        num_features=8, num_modules=1, num_basis_functions=4, num_random_features=8, use_electrostatics=False,
        elements=(1, 6, 7, 8),
    )  # fmt: skip
    members = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        members.append(SpookyNet(config).double().eval())
        with torch.no_grad():
            for name, parameter in members[-1].named_parameters():
                if "raw" not in name:
                    parameter += 0.3 * torch.randn_like(parameter)
    return save_ensemble(members, tmp_path_factory.mktemp("ensemble") / "two.safetensors")


def settings(alanine: str, ensemble: Path, **changes: object) -> RunSettings:
    return RunSettings(input=alanine, model="ensemble", model_path=str(ensemble), **{**COMMON, **changes})  # type: ignore[arg-type]


def start(settings: RunSettings, folder: Path) -> Simulation:
    return Simulation.start(settings, folder, progress=False, say=lambda message: None)


def member_spread(ensemble: Path, numbers: np.ndarray, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """eV and eV/angstrom, from the members evaluated alone."""
    members = load_potential(ensemble).members.values()  # type: ignore[union-attr, operator]
    found = [m.energy_and_forces(Structure(numbers, positions)) for m in members]
    energies, forces = np.array([e for e, _ in found]), np.stack([f for _, f in found])
    return energies.std(ddof=1), np.sqrt(forces.var(axis=0, ddof=1).sum(-1))


def test_the_table_belongs_to_the_frames(alanine: str, ensemble: Path, tmp_path: Path) -> None:
    start(settings(alanine, ensemble), tmp_path / "run").run()
    table = read_table(tmp_path / "run" / "uncertainty.csv")
    np.testing.assert_array_equal(table["step"], [0, 5, 10, 15, 20])
    np.testing.assert_allclose(table["time_ps"], 0.0005 * table["step"])
    frames = dcd_frames(tmp_path / "run" / "trajectory.dcd", 22, False)
    numbers = np.array([a.element.atomic_number for a in app.PDBFile(alanine).topology.atoms()])
    for row, positions in enumerate(frames):
        energy, forces = member_spread(ensemble, numbers, positions.astype(np.float64))
        # a trajectory has single precision
        assert table["energy_uncertainty_eV"][row] == pytest.approx(energy, rel=1e-4)
        assert table["largest_force_uncertainty_eV_A"][row] == pytest.approx(forces.max(), rel=1e-3)
        assert table["atom"][row] == forces.argmax()


def test_a_resumed_run_has_the_same_table(alanine: str, ensemble: Path, tmp_path: Path) -> None:
    start(settings(alanine, ensemble), tmp_path / "whole").run()
    start(settings(alanine, ensemble, steps=10), tmp_path / "two").run()
    Simulation.resume(tmp_path / "two", 20, progress=False, say=lambda message: None).run()
    whole, two = ((tmp_path / name / "uncertainty.csv").read_text(encoding="utf-8") for name in ("whole", "two"))
    assert whole == two


def test_a_run_is_stopped_with_its_state(alanine: str, ensemble: Path, tmp_path: Path) -> None:
    hot = {"temperature": 4000.0, "steps": 40}
    start(settings(alanine, ensemble, **hot), tmp_path / "free").run()
    worst = read_table(tmp_path / "free" / "uncertainty.csv")["largest_force_uncertainty_eV_A"]
    assert worst.max() > 1.02 * worst[0], "the test needs a run that gets less certain"
    limit = float(0.5 * (worst[0] + worst.max()))
    run = start(settings(alanine, ensemble, **hot, on_uncertain="stop", uncertainty_limit=limit), tmp_path / "stop")
    with pytest.raises(RunFailed, match=r"atom \d+ \(\w\) is uncertain by .* eV/angstrom, more than uncertainty_limit"):
        run.run()
    failure = tmp_path / "stop" / "failure"
    assert {"state.xml", "system.xml", "integrator.xml", "message.txt"} <= {p.name for p in failure.iterdir()}
    assert "(step " in (failure / "message.txt").read_text(encoding="utf-8")
    table = read_table(tmp_path / "stop" / "uncertainty.csv")
    assert (table["largest_force_uncertainty_eV_A"] <= limit).all()


def test_the_command_saves_frames(alanine: str, ensemble: Path, tmp_path: Path) -> None:
    arguments = ["simulate", alanine, "--model-path", str(ensemble), "--output", str(tmp_path / "run"), "--quiet"]
    arguments += [
        "--steps",
        "8",
        "--timestep",
        "0.5",
        "--minimize",
        "0",
        "--report",
        "4",
        "--compile",
        "no",
        "--ignore-bonds",
    ]
    arguments += ["--on-uncertain", "save", "--uncertainty-limit", "1e-6", "--uncertain-interval", "3"]
    assert main(arguments) == 0
    files = sorted((tmp_path / "run" / "uncertain").iterdir())
    assert [f.stem for f in files] == ["step-000000000", "step-000000003", "step-000000006"]
    for file in files:
        (frame,) = read_structures(file)
        spread = member_spread(ensemble, frame.numbers, frame.positions)[1].max()
        assert frame.info["force_uncertainty"] == pytest.approx(spread, rel=1e-4)


def test_a_run_that_fell_back_stays_so_when_resumed(
    alanine: str, ensemble: Path, tiny_model: str, tmp_path: Path
) -> None:
    falling = {"on_uncertain": "fall_back", "uncertainty_limit": 1e-6, "fall_back": tiny_model}
    start(settings(alanine, ensemble, **falling, steps=10), tmp_path / "run").run()
    resumed = Simulation.resume(tmp_path / "run", 20, progress=False, say=lambda message: None)
    resumed.run()
    start(settings(alanine, ensemble, **falling), tmp_path / "whole").run()
    logs = [(tmp_path / name / "log.csv").read_text(encoding="utf-8") for name in ("run", "whole")]
    assert logs[0] == logs[1]
    table = read_table(tmp_path / "run" / "uncertainty.csv")
    assert np.isnan(table["energy_uncertainty_eV"]).all()
    alone = RunSettings(input=alanine, model="spookynet", model_path=tiny_model, **COMMON)  # type: ignore[arg-type]
    start(alone, tmp_path / "alone").run()
    # the other model from the first step on: the same run as its own
    log = read_table(tmp_path / "alone" / "log.csv")
    np.testing.assert_allclose(read_table(tmp_path / "run" / "log.csv")["potential_kJ_mol"], log["potential_kJ_mol"])


def test_reporter(molecule: Molecule, ensemble: Path, tiny_model: str, tmp_path: Path) -> None:
    def simulation(name: str, path: object) -> app.Simulation:
        system = MLPotential(name, modelPath=str(path)).createSystem(molecule.topology, compile=False)
        made = app.Simulation(
            molecule.topology, system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatform("Reference")
        )
        made.context.setPositions(molecule.positions)
        return made

    run = simulation("ensemble", ensemble)
    reporter = UncertaintyReporter(tmp_path / "u.csv", 4)
    run.reporters.append(reporter)
    run.step(8)
    run.reporters[0] = UncertaintyReporter(tmp_path / "u.csv", 4, append=True)
    run.step(4)
    table = read_table(tmp_path / "u.csv")
    np.testing.assert_array_equal(table["step"], [4, 8, 12])
    positions = 10.0 * run.context.getState(positions=True).getPositions(asNumpy=True)._value
    numbers = np.array([a.element.atomic_number for a in molecule.topology.atoms()])
    energy, forces = member_spread(ensemble, numbers, positions)
    assert table["energy_uncertainty_eV"][-1] == pytest.approx(energy, rel=1e-5)
    assert table["largest_force_uncertainty_eV_A"][-1] == pytest.approx(forces.max(), rel=1e-5)
    with pytest.raises(ValueError, match="reportInterval: expected"):
        UncertaintyReporter(tmp_path / "v.csv", 0)
    other = simulation("spookynet", tiny_model)
    other.reporters.append(UncertaintyReporter(tmp_path / "w.csv", 1))
    with pytest.raises(ValueError, match="expected a force of an ensemble"):
        other.step(1)


def test_settings_are_checked(alanine: str) -> None:
    for name, value in (("on_uncertain", "panic"), ("uncertainty_limit", -1.0), ("uncertain_interval", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            RunSettings(input=alanine, **{name: value})  # type: ignore[arg-type]
