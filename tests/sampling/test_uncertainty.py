"""Runs of an ensemble: the table of uncertainties against the members' own numbers, and what ends or changes a run."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app
from openmmml import MLPotential

from openmm_gdml.training import GDML
from openmm_mlff.analysis.observables import read_table
from openmm_mlff.cli import main
from openmm_mlff.data.formats import read_sgdml_npz, read_structures
from openmm_mlff.data.reference import TBLite
from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import running
from openmm_mlff.forces.uncertainty import UncertaintyError
from openmm_mlff.potentials.ensemble import Ensemble, save_ensemble
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


def test_a_start_that_is_too_uncertain_is_a_failure_too(alanine: str, ensemble: Path, tmp_path: Path) -> None:
    """Where the minimiser ends, before the first step."""
    run = start(settings(alanine, ensemble, on_uncertain="stop", uncertainty_limit=1e-9), tmp_path / "run")
    with pytest.raises(RunFailed, match=r"minimize stopped .*on_uncertain: the force on atom"):
        run.run()
    assert (tmp_path / "run" / "failure").is_dir()


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


@pytest.fixture(scope="module")
def ethanol(shared: Path) -> tuple[Ensemble, list[Structure], float]:
    """Three kernels of ethanol from 150 GFN2-xTB frames at 500 K each, other frames, and a limit that these set."""
    frames = read_sgdml_npz(shared / "data" / "gdml" / "dataset_ethanol.npz")
    rng = np.random.default_rng(1)
    alike = [
        [0, 1, 2, *methyl, *methylene, 8]
        for methyl in itertools.permutations((3, 4, 5))
        for methylene in ((6, 7), (7, 6))
    ]
    chosen = [rng.choice(1000, 150, replace=False) for _ in range(3)]
    ensemble = Ensemble([GDML(15.0, 1e-10, np.array(alike)).fit([frames[i] for i in rows]) for rows in chosen])
    evaluator, uncertain = ensemble.evaluator(frames[0]), []
    for frame in frames[1100:1200:2]:
        evaluator.arrays(frame.positions)
        assert evaluator.spreads is not None
        uncertain.append(evaluator.spreads[1].max())
    return ensemble, frames[1050:1060], 1.5 * float(max(uncertain))


def test_a_run_is_stopped_where_it_leaves_its_domain_and_not_before(
    ethanol: tuple[Ensemble, list[Structure], float],
) -> None:
    ensemble, frames, limit = ethanol
    topology = app.Topology()
    residue = topology.addResidue("ETH", topology.addChain())
    for z in frames[0].numbers.tolist():
        topology.addAtom("A", app.Element.getByAtomicNumber(z), residue)
    stopped = {}
    for temperature, steps in ((300.0, 4000), (2000.0, 2000)):
        system = MLPotential("ensemble", model=ensemble).createSystem(
            topology, on_uncertain="stop", uncertainty_limit=limit
        )
        integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.0005)
        integrator.setRandomNumberSeed(3)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
        context.setPositions(0.1 * frames[0].positions)
        context.setVelocitiesToTemperature(temperature, 3)
        try:
            integrator.step(steps)
        except openmm.OpenMMException:
            error = running.last_error(system)
            assert isinstance(error, UncertaintyError) and error.uncertainty > limit
            positions = 10.0 * context.getState(positions=True).getPositions(asNumpy=True)._value
            stopped[temperature] = (context.getStepCount(), positions)
    assert list(stopped) == [2000.0], "2 ps at 300 K are inside, 2000 K is not"
    step, positions = stopped[2000.0]
    assert 0 < step < 2000
    assert abs(energy_error(ensemble, frames[0], [frames[0].positions, positions])[1]) < 0.25


def test_a_bond_that_is_pulled_is_noticed_before_the_energy_is_wrong(
    ethanol: tuple[Ensemble, list[Structure], float],
) -> None:
    """O-H from where it is to 2.5 angstrom: the first length beyond the limit, and the first error of 0.5 eV."""
    ensemble, frames, limit = ethanol
    start, evaluator = frames[0].positions, ensemble.evaluator(frames[0])
    along = (start[8] - start[2]) / np.linalg.norm(start[8] - start[2])
    lengths = np.arange(np.linalg.norm(start[8] - start[2]), 2.5, 0.05)
    scan = [start.copy() for _ in lengths]
    beyond = []
    for positions, length in zip(scan, lengths, strict=True):
        positions[8] = start[2] + length * along
        evaluator.arrays(positions)
        assert evaluator.spreads is not None
        beyond.append(evaluator.spreads[1].max() > limit)
    wrong = np.abs(energy_error(ensemble, frames[0], scan)) > 0.5
    assert not beyond[0] and wrong.any() and int(np.argmax(beyond)) < int(np.argmax(wrong))


def energy_error(ensemble: Ensemble, structure: Structure, frames: list[np.ndarray]) -> np.ndarray:
    """eV, of the energies relative to that of the first frame, against GFN2-xTB."""
    pytest.importorskip("tblite")
    both = []
    for positions in frames:
        moved = structure.replace(positions=positions, energy=None, forces=None)
        both.append(ensemble.energy_and_forces(moved)[0] - float(TBLite().label(moved).energy))  # type: ignore[arg-type]
    return np.array(both) - both[0]
