"""A limit of the uncertainty from a short run of a system itself, against runs made here and the members' spread."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_gdml.training import GDML
from openmm_mlff.cli import main
from openmm_mlff.data.formats import read_sgdml_npz
from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import running
from openmm_mlff.forces.serialization import stored_options, without_guards
from openmm_mlff.potentials.ensemble import save_ensemble
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.sampling.molecules import Molecules
from openmm_mlff.sampling.settings import RunSettings
from openmm_mlff.sampling.simulation import Simulation
from openmm_mlff.sampling.uncertainty import limit_of_run, trial_run
from openmm_spookynet import SpookyNet, SpookyNetConfig

FACTOR = 2.5
#: of trial runs: 10 steps that do not count, and 40 that do
SHORT = {"duration": 0.0125, "timestep": 0.25, "platform": "Reference", "seed": 5}
GUARD = {"on_uncertain": "stop", "uncertainty_limit": 1e-6}


@dataclass
class Ethanol:
    """Two kernels from 100 GFN2-xTB frames at 500 K each, as a model file too, and another frame (angstrom)."""

    kernels: list[GDML]
    path: Path
    frame: Structure
    #: beyond all uncertainties (eV/angstrom) of further frames
    limit: float

    @property
    def start(self) -> np.ndarray:
        return 0.1 * self.frame.positions

    @property
    def topology(self) -> app.Topology:
        topology = app.Topology()
        residue = topology.addResidue("ETH", topology.addChain())
        for k, z in enumerate(self.frame.numbers.tolist()):
            topology.addAtom(f"A{k}", app.Element.getByAtomicNumber(z), residue)
        return topology


@pytest.fixture(scope="module")
def ethanol(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Ethanol:
    frames = read_sgdml_npz(shared / "data" / "gdml" / "dataset_ethanol.npz")
    rng = np.random.default_rng(1)
    alike = [
        [0, 1, 2, *methyl, *methylene, 8]
        for methyl in itertools.permutations((3, 4, 5))
        for methylene in ((6, 7), (7, 6))
    ]
    chosen = [rng.choice(1000, 100, replace=False) for _ in range(2)]
    kernels = [GDML(15.0, 1e-10, np.array(alike)).fit([frames[i] for i in rows]) for rows in chosen]
    uncertain = [spreads(kernels, [frame.positions]).max() for frame in frames[1100:1200:2]]
    calibration = {"force_factor": FACTOR, "force_limit": 1.5 * max(uncertain)}
    path = save_ensemble(kernels, tmp_path_factory.mktemp("ensemble") / "two.safetensors", calibration)
    return Ethanol(kernels, path, frames[1050], calibration["force_limit"])


NUMBERS = np.array([6, 6, 8, 1, 1, 1, 1, 1, 1])


def learned(ethanol: Ethanol, path: Path | None = None, **options: Any) -> openmm.System:
    return MLPotential("ensemble", modelPath=str(path or ethanol.path)).createSystem(ethanol.topology, **options)


def mixed(ethanol: Ethanol, **options: Any) -> openmm.System:
    """A rigid TIP3P water, three atoms of no charge, and ethanol by the ensemble from atom 3 on."""
    topology = app.Topology()
    chain = topology.addChain()
    water, alcohol = topology.addResidue("HOH", chain), topology.addResidue("ETH", chain)
    for symbol in ("O", "H", "H"):
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), water)
    for atom in ethanol.topology.atoms():
        topology.addAtom(atom.name, atom.element, alcohol)
    system, field = openmm.System(), openmm.NonbondedForce()
    for mass in (16.0, 1.0, 1.0):
        system.addParticle(mass)
    for k, (charge, sigma, depth) in enumerate([(-0.834, 0.315, 0.636), (0.417, 1.0, 0.0), (0.417, 1.0, 0.0)]):
        field.addParticle(charge, sigma, depth)
        for m in range(k):
            field.addException(k, m, 0.0, 1.0, 0.0)
            system.addConstraint(m, k, 0.1514 if m else 0.0957)
    for z in ethanol.frame.numbers.tolist():
        system.addParticle(app.Element.getByAtomicNumber(z).mass)
        field.addParticle({1: 0.05, 6: 0.0, 8: -0.3}[z], {1: 0.2, 6: 0.34, 8: 0.3}[z], 0.2)
    system.addForce(field)
    region = list(range(3, 12))
    return MLPotential("ensemble", modelPath=str(ethanol.path)).createMixedSystem(topology, system, region, **options)


def mixed_start(ethanol: Ethanol) -> np.ndarray:
    water = np.array([[0.0, 0.0, 0.0], [0.0957, 0.0, 0.0], [-0.02399, 0.09265, 0.0]])
    return np.concatenate([water + ethanol.start.max(axis=0) + 0.2, ethanol.start])


def by_hand(system: openmm.System, positions: np.ndarray, temperature: float) -> list[np.ndarray]:
    """Frames (angstrom) of the run that `limit_of_run` says it makes, after its first fifth."""
    integrator = openmm.LangevinMiddleIntegrator(temperature, 10.0, 0.00025)
    integrator.setRandomNumberSeed(5)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 100)
    context.setVelocitiesToTemperature(temperature, 5)
    integrator.step(10)
    frames = []
    for _ in range(40):
        frames.append(10.0 * context.getState(positions=True).getPositions(asNumpy=True)._value)
        integrator.step(1)
    return frames


def spreads(members: list[GDML], frames: list[np.ndarray]) -> np.ndarray:
    """Uncertainty of the force on each atom, by the members alone, ``(frames, n_atoms)`` eV/angstrom."""
    found = []
    for frame in frames:
        forces = np.stack([m.energy_and_forces(Structure(NUMBERS, frame))[1] for m in members])
        found.append(FACTOR * np.sqrt(forces.var(axis=0, ddof=1).sum(-1)))
    return np.array(found)


def test_the_limit_is_that_of_the_members_in_the_same_run(ethanol: Ethanol) -> None:
    system, start = learned(ethanol), ethanol.start
    expected = spreads(ethanol.kernels, by_hand(system, start, 400.0))
    found = trial_run(system, start * unit.nanometer, temperature=400.0, margin=1.5, **SHORT)
    assert found.largest == pytest.approx(expected.max(), rel=1e-8)
    assert found.limit == 1.5 * found.largest and not found.bounded
    assert found.atom == np.unravel_index(expected.argmax(), expected.shape)[1]
    assert found.of_file == pytest.approx(ethanol.limit)
    assert (found.margin, found.temperature, found.duration, found.seed) == (1.5, 400.0, 0.0125, 5)
    assert limit_of_run(system, start, temperature=400.0, margin=1.5, **SHORT) == found.limit
    assert trial_run(system, start, temperature=400.0, **{**SHORT, "seed": 6}).largest != found.largest


def test_a_region_among_others(ethanol: Ethanol) -> None:
    system, start = mixed(ethanol), mixed_start(ethanol)
    expected = spreads(ethanol.kernels, [x[3:] for x in by_hand(system, start, 300.0)])
    found = trial_run(system, start, **SHORT)
    assert found.largest == pytest.approx(expected.max(), rel=1e-8)
    assert found.atom == 3 + np.unravel_index(expected.argmax(), expected.shape)[1]


@pytest.mark.parametrize("action", ["stop", "save"])
@pytest.mark.parametrize("kind", ["learned", "mixed", "interpolated"])
def test_a_guard_of_the_system_does_not_act(
    ethanol: Ethanol, kind: str, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"interpolate": True} if kind == "interpolated" else {}
    make, start = (learned, ethanol.start) if kind == "learned" else (mixed, mixed_start(ethanol))
    plain, guarded = make(ethanol, **options), make(ethanol, **options, **{**GUARD, "on_uncertain": action})
    before = openmm.XmlSerializer.serialize(guarded)
    assert trial_run(guarded, start, **SHORT) == trial_run(plain, start, **SHORT)
    assert openmm.XmlSerializer.serialize(guarded) == before
    assert not list(tmp_path.iterdir()), "no frame was saved"
    # in a run of its own it acts as before
    context = openmm.Context(guarded, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(start)
    if action == "stop":
        with pytest.raises(openmm.OpenMMException, match="on_uncertain: the force on"):
            context.getState(forces=True)
    else:
        context.getState(forces=True)
        assert [p.name for p in tmp_path.iterdir()] == ["uncertain_frames"]


def test_copies_without_guards_keep_all_other_options(ethanol: Ethanol, tmp_path: Path) -> None:
    def options_of(system: openmm.System) -> list[set[str]]:
        return [stored_options(force) for force in system.getForces()]

    for make, options in ((learned, {}), (mixed, {}), (mixed, {"interpolate": True})):
        plain = without_guards(make(ethanol, **options))
        guarded = without_guards(make(ethanol, **options, **GUARD))
        assert openmm.XmlSerializer.serialize(plain) == openmm.XmlSerializer.serialize(guarded)
        original = make(ethanol, **options)
        assert options_of(plain) == options_of(original) and any(options_of(plain))
    # options of embedded regions and of many molecules lie one level down
    torch.manual_seed(0)
    config = SpookyNetConfig(num_features=8, num_modules=1, num_random_features=8)
    file = save_ensemble([SpookyNet(config), SpookyNet(config)], tmp_path / "charged.safetensors")
    potential, topology, surroundings = MLPotential("ensemble", modelPath=str(file)), app.Topology(), openmm.System()
    residue, field = topology.addResidue("HOH", topology.addChain()), openmm.NonbondedForce()
    for k, symbol in enumerate(("O", "H", "H", "Na")):
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
        surroundings.addParticle(10.0)
        field.addParticle(float(k == 3), 0.3, 0.1)
    surroundings.addForce(field)
    embedded = potential.createMixedSystem(topology, surroundings, [0, 1, 2], embedding="electrostatic", **GUARD)
    found = [json.loads(o) for options in options_of(without_guards(embedded)) for o in options]
    assert [f["region"]["numbers"] for f in found] == [[8, 1, 1]] and "uncertainty" not in found[0]["region"]
    many = Molecules([learned(ethanol, **GUARD)] * 2, [ethanol.topology] * 2)
    found = [json.loads(o) for options in options_of(without_guards(many.system)) for o in options]
    assert [f["sizes"] for f in found] == [[9, 9]] and "uncertainty" not in found[0]["common"]


def test_other_baths_do_not_act(ethanol: Ethanol) -> None:
    system = learned(ethanol)
    limit, n = limit_of_run(system, ethanol.start, **SHORT), system.getNumForces()
    system.addForce(openmm.AndersenThermostat(5000.0, 1000.0))
    assert limit_of_run(system, ethanol.start, **SHORT) == limit
    assert system.getNumForces() == n + 1


def test_the_file_bounds_it_and_says_so(ethanol: Ethanol, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="openmm_mlff.sampling.uncertainty"):
        free = trial_run(learned(ethanol), ethanol.start, **SHORT)
    (record,) = (r for r in caplog.records if "uncertainty_limit" in r.message)
    assert record.levelno == logging.INFO and f"{free.largest:.3g} eV/angstrom" in record.message
    caplog.clear()
    low = {"force_factor": FACTOR, "force_limit": free.largest}
    file = save_ensemble(ethanol.kernels, tmp_path / "low.safetensors", low)
    found = trial_run(learned(ethanol, file), ethanol.start, **SHORT)
    assert found.limit == free.largest == found.of_file and found.bounded
    (record,) = (r for r in caplog.records if "uncertainty_limit" in r.message)
    assert record.levelno == logging.WARNING and "may be outside" in record.message
    unnamed = save_ensemble(ethanol.kernels, tmp_path / "unnamed.safetensors", {"force_factor": FACTOR})
    with caplog.at_level(logging.INFO, logger="openmm_mlff.sampling.uncertainty"):
        found = trial_run(learned(ethanol, unnamed), ethanol.start, **SHORT)
    assert found.of_file is None and found.limit == free.limit and not found.bounded
    assert "names no limit that could bound it" in caplog.text


def test_what_cannot_be_is_refused(ethanol: Ethanol) -> None:
    system, start = learned(ethanol), ethanol.start
    for options, words in (
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"margin": 0.5}, "margin: expected a number >= 1, got 0.5"),
        ({"duration": 0.002}, "duration: expected at least 10 steps of 0.25 fs"),
        ({"seed": 0}, "seed: expected a whole number >= 1"),
        ({"platform": "Abacus"}, "platform: expected one of"),
    ):
        with pytest.raises(ValueError, match=words):
            limit_of_run(system, start, **{**SHORT, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"positions: .*shape \(9, 3\).*got shape \(2, 3\)"):
        limit_of_run(system, start[:2], **SHORT)
    with pytest.raises(ValueError, match=r"positions: .*got NaN"):
        limit_of_run(system, np.full((9, 3), np.nan), **SHORT)
    with pytest.raises(TypeError, match=r"system: expected an openmm\.System"):
        limit_of_run(ethanol.topology, start, **SHORT)  # type: ignore[arg-type]
    single = MLPotential("gdml", model=ethanol.kernels[0]).createSystem(ethanol.topology)
    with pytest.raises(ValueError, match="system: expected a force of an ensemble"):
        limit_of_run(single, start, **SHORT)
    start[1] = start[0]
    with pytest.raises(
        ValueError, match=r"positions: the trial run from them at 300 K broke at step 0 of 50 \(.*atom 0"
    ):
        limit_of_run(system, start, **SHORT)


def test_a_limit_of_the_domain_stops_what_leaves_it(ethanol: Ethanol, caplog: pytest.LogCaptureFixture) -> None:
    limit = limit_of_run(learned(ethanol), ethanol.start, seed=2)
    assert limit < ethanol.limit and not caplog.records
    steps = {}
    for temperature, n in ((300.0, 4000), (2000.0, 2000)):
        system = learned(ethanol, on_uncertain="stop", uncertainty_limit=limit)
        integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.0005)
        integrator.setRandomNumberSeed(3)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
        context.setPositions(ethanol.start)
        # the frame is one at 500 K
        with running.without_force_limit(system):
            openmm.LocalEnergyMinimizer.minimize(context, 10.0, 100)
        context.setVelocitiesToTemperature(temperature, 3)
        try:
            integrator.step(n)
        except openmm.OpenMMException as error:
            assert "on_uncertain" in str(error)
        steps[temperature] = context.getStepCount()
    assert steps[300.0] == 4000 and 0 < steps[2000.0] < 2000
    # what is out of the domain gets no limit of its own
    found = trial_run(learned(ethanol), ethanol.start, temperature=2000.0, duration=0.2, seed=2)
    assert found.limit == found.of_file and found.bounded and "may be outside" in caplog.text


# -- simulate ------------------------------------------------------------------------------------------------------

COMMON = {"steps": 20, "report_interval": 5, "checkpoint_interval": 10, "minimization_steps": 5, "timestep": 0.5,
          "check_bonds": False, "on_uncertain": "stop", "temperature": 250.0, "seed": 3}  # fmt: skip


@pytest.fixture()
def pdb(ethanol: Ethanol, tmp_path: Path) -> str:
    with open(tmp_path / "ethanol.pdb", "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(ethanol.topology, ethanol.start * unit.nanometer, file)
    return str(tmp_path / "ethanol.pdb")


def started(pdb: str, ethanol: Ethanol, folder: Path, **changes: Any) -> Simulation:
    settings = RunSettings(input=pdb, model="ensemble", model_path=str(ethanol.path), **{**COMMON, **changes})
    return Simulation.start(settings, folder, progress=False, say=lambda message: None)


def test_a_run_finds_its_own_limit_once(
    ethanol: Ethanol, pdb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openmm_mlff.sampling.systems.TRIAL_PS", 0.05)
    started(pdb, ethanol, tmp_path / "own", uncertainty_limit="own").run()
    started(pdb, ethanol, tmp_path / "two", uncertainty_limit="own", steps=10).run()
    about = json.loads((tmp_path / "own" / "run.json").read_text(encoding="utf-8"))
    assert about["settings"]["uncertainty_limit"] == "own"
    found = about["resolved"]["uncertainty_limit"]
    assert found["duration"] == 0.05 and found["limit"] == 2.0 * found["largest"] < ethanol.limit
    expected = trial_run(
        learned(ethanol), app.PDBFile(pdb).positions, temperature=250.0, seed=3, timestep=0.5, duration=0.05
    )
    assert found["limit"] == pytest.approx(expected.limit, rel=1e-8)
    # given as a number, or gone on with, no trial run is made, and all is the same
    monkeypatch.setattr("openmm_mlff.sampling.systems.trial_run", None)
    started(pdb, ethanol, tmp_path / "given", uncertainty_limit=found["limit"]).run()
    Simulation.resume(tmp_path / "two", 20, progress=False, say=lambda message: None).run()
    for name in ("system.xml", "log.csv", "uncertainty.csv", "final_state.xml"):
        own = (tmp_path / "own" / name).read_bytes()
        assert own == (tmp_path / "given" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_command_and_its_errors(
    ethanol: Ethanol, pdb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("openmm_mlff.sampling.systems.TRIAL_PS", 0.01)
    single = save_potential(ethanol.kernels[0], tmp_path / "single.safetensors")
    guard = ["--on-uncertain", "stop", "--uncertainty-limit", "own"]

    def run(name: str, model: Path, *arguments: str) -> int:
        begin = ["simulate", pdb, "--model-path", str(model), "--steps", "2", "--timestep", "0.5", "--quiet"]
        return main([*begin, *arguments, "--output", str(tmp_path / name)])

    assert run("run", ethanol.path, *guard) == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert about["resolved"]["uncertainty_limit"]["largest"] > 0
    capsys.readouterr()
    for model, arguments, words in (
        (single, guard, "system: expected a force of an ensemble"),
        (ethanol.path, guard[2:], "uncertainty_limit: expected None without on_uncertain, got 'own'"),
        (ethanol.path, [*guard[:3], "mine"], "expected a positive number (eV/angstrom) or 'own', got 'mine'"),
    ):
        assert run("other", model, *arguments) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "other").exists()
