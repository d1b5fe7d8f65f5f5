"""Umbrella sampling of systems whose free energy is known: a bond with two minima, and a free torsion."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app
from openmmml import MLPotential

from openmm_mlff.analysis.free_energy import thermal_energy
from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.analysis.umbrella import Bias, Reweighted
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.umbrella import UmbrellaSettings, WindowRun, sample_windows
from openmm_mlff.sampling.umbrella_bias import (
    BIAS_GROUP,
    Coordinate,
    UmbrellaWindow,
    biased_system,
    distance,
    proton_transfer,
    set_window,
    torsion,
)
from openmm_mlff.units import KJ_PER_MOL_PER_EV
from openmm_spookynet import SpookyNet, SpookyNetConfig

START = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
#: kJ/mol as a function of r in nm: minima at 2 and 3 angstrom, 15 between them
WELL = "15*((r-0.25)^2/0.0025-1)^2"
WINDOWS = [UmbrellaWindow(f"r{k}", (Bias.umbrella(1.9 + 0.2 * k, 3.0),)) for k in range(7)]
SETTINGS = UmbrellaSettings(
    temperature=300.0, timestep=2.0, friction=10.0, pull=0.4, equilibration=1.0, length=32.0, interval=0.04,
    stretch=16.0, seed=3, minimization_steps=0, platform="Reference",
)  # fmt: skip


def particles(n: int) -> openmm.System:
    system = openmm.System()
    for _ in range(n):
        system.addParticle(12.0)
    return system


def two_wells(expression: str = WELL) -> openmm.System:
    system = particles(2)
    force = openmm.CustomBondForce(expression)
    force.addBond(0, 1)
    system.addForce(force)
    return system


def exact(low: float, high: float, kT: float) -> float:
    """-ln of the integral of r^2 exp(-u/kT) over a range in angstrom."""
    r = np.linspace(low, high, 20001)
    u = 15 * ((0.1 * r - 0.25) ** 2 / 0.0025 - 1) ** 2 / KJ_PER_MOL_PER_EV
    return -float(np.log(np.trapezoid(r**2 * np.exp(-u / kT), r)))


def test_free_energy_of_a_bond_with_two_minima(tmp_path: Path) -> None:
    runs = sample_windows(two_wells(), START, [distance(0, 1)], WINDOWS, SETTINGS, tmp_path, record=[1])
    samples = Reweighted.of([w.biases for w in WINDOWS], [run.values for run in runs], SETTINGS.temperature)
    kT, r = thermal_energy(SETTINGS.temperature), samples.values[:, 0]
    wells = samples.difference((r > 1.6) & (r < 2.5), (r >= 2.5) & (r < 3.4))
    assert 0.01 < wells.error < 0.2
    assert abs(wells.delta - (exact(2.5, 3.4, kT) - exact(1.6, 2.5, kT))) < 3.5 * wells.error
    top = samples.difference((r > 1.6) & (r < 2.5), (r > 2.45) & (r < 2.55))
    # 15 kJ/mol are 6 kT, and a tenth of an angstrom is narrow
    assert top.delta > 5 and abs(top.delta - (exact(2.45, 2.55, kT) - exact(1.6, 2.5, kT))) < 3.5 * top.error
    assert all(len(run.values) == SETTINGS.frames == 800 for run in runs)
    assert all(run.recorded.shape == (800, 1, 3) and np.isnan(run.spreads).all() for run in runs)
    assert runs[0].header["time"] == pytest.approx(33.0)


def test_biases_are_those_of_the_analysis() -> None:
    coordinates = [proton_transfer(0, 1, 2), torsion(0, 1, 2, 3)]
    biased = biased_system(particles(4), coordinates)
    context = openmm.Context(biased, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    names = [c.name for c in coordinates]
    rng = np.random.default_rng(0)
    windows = [
        UmbrellaWindow("both", (Bias(-0.6, 0.2, 7.0), Bias.umbrella(175.0, 3e-4, 360.0))),
        UmbrellaWindow("one", (None, Bias(-200.0, -170.0, 3e-4, 360.0))),
        UmbrellaWindow("other", (Bias.umbrella(0.3, 2.0), None)),
    ]
    for _ in range(20):
        x = rng.normal(size=(4, 3)) * 1.5
        context.setPositions(0.1 * x)
        transfer = np.linalg.norm(x[0] - x[1]) - np.linalg.norm(x[2] - x[1])
        values = np.array([transfer, dihedral(x[None], np.array([[0, 1, 2, 3]]))[0, 0]])
        for window in windows:
            set_window(context, names, window)
            found = context.getState(energy=True, groups=1 << BIAS_GROUP).getPotentialEnergy()._value
            expected = sum(
                float(b.energy(v[None])[0]) for b, v in zip(window.biases, values, strict=True) if b is not None
            )
            assert found / KJ_PER_MOL_PER_EV == pytest.approx(expected, abs=1e-6)
            cv = biased.getForce(biased.getNumForces() - 1).getCollectiveVariableValues(context)
            np.testing.assert_allclose(cv, values, atol=1e-5)
    # half of the way from one window to another: a bias that goes away does so in its place
    set_window(context, names, windows[1], 0.5, windows[0])
    parameters = {name: context.getParameter(name) for name in context.getParameters()}
    assert parameters["umbrella_center_transfer"] == pytest.approx(-0.2)
    assert parameters["umbrella_stiffness_transfer"] == pytest.approx(3.5 * KJ_PER_MOL_PER_EV)
    assert parameters["umbrella_center_torsion"] == pytest.approx(-5.0)


def test_a_longer_run_goes_on_and_windows_may_be_put_between(tmp_path: Path) -> None:
    short = dataclasses.replace(SETTINGS, length=0.8, stretch=0.4)
    ends = [WINDOWS[0], WINDOWS[2]]
    first = sample_windows(two_wells(), START, [distance(0, 1)], ends, short, tmp_path)
    longer = dataclasses.replace(short, length=1.2)
    again = sample_windows(two_wells(), START, [distance(0, 1)], WINDOWS[:3], longer, tmp_path)
    assert [len(run.values) for run in again] == [30, 30, 30]
    np.testing.assert_array_equal(again[0].values[:20], first[0].values)
    np.testing.assert_array_equal(again[2].values[:20], first[1].values)
    assert len(set(again[0].header["seeds"])) == 3
    # without a stop: the same numbers
    whole = sample_windows(two_wells(), START, [distance(0, 1)], ends, longer, tmp_path / "whole")
    np.testing.assert_array_equal(whole[0].values, again[0].values)
    changed = [UmbrellaWindow("r0", (Bias.umbrella(1.9, 4.0),)), WINDOWS[1]]
    with pytest.raises(ValueError, match="'r0' had other biases"):
        sample_windows(two_wells(), START, [distance(0, 1)], changed, longer, tmp_path)
    with pytest.raises(ValueError, match="timestep"):
        sample_windows(two_wells(), START, [distance(0, 1)], ends, dataclasses.replace(short, timestep=1.0), tmp_path)


def test_a_run_goes_on_with_its_model_file_in_another_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SpookyNet(SpookyNetConfig(num_features=8, num_modules=1, num_random_features=8))
    topology = app.Topology()
    residue = topology.addResidue("H2", topology.addChain())
    for name in ("H1", "H2"):
        topology.addAtom(name, app.Element.getBySymbol("H"), residue)
    short = dataclasses.replace(SETTINGS, timestep=0.5, pull=0.01, equilibration=0.01, length=0.08, stretch=0.04)
    window, runs = [UmbrellaWindow("r", (Bias.umbrella(1.0, 30.0),))], []
    for place, length in (("here", 0.04), ("moved", 0.08)):
        (tmp_path / place).mkdir()
        file = save_potential(model, tmp_path / place / "model.safetensors")
        system = MLPotential("spookynet", modelPath=str(file)).createSystem(topology)
        start = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        how = dataclasses.replace(short, length=length)
        runs += sample_windows(system, start, [distance(0, 1)], window, how, tmp_path / "run")
    assert [len(run.values) for run in runs] == [1, 2]
    np.testing.assert_array_equal(runs[1].values[:1], runs[0].values)


def test_a_window_that_breaks_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    # no number beyond 3.05 angstrom
    system = two_wells("2000*(r-0.2)^2+1e-9*sqrt(0.305-r)")
    windows = [WINDOWS[0], UmbrellaWindow("edge", (Bias.umbrella(2.9, 5.0),))]
    settings = dataclasses.replace(SETTINGS, pull=0.08, length=4.0, equilibration=0.0, stretch=0.4)
    with pytest.raises(RunFailed, match=r"window 'edge' broke after \d\.\d\d ps"):
        sample_windows(system, START, [distance(0, 1)], windows, settings, tmp_path)
    assert len(WindowRun.read(tmp_path / "windows" / "r0.safetensors").values) == settings.frames
    assert (tmp_path / "starts" / "edge.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.zeros((3, 3))}, r"positions: expected shape \(2, 3\), got \(3, 3\)"),
        ({"windows": [WINDOWS[0], WINDOWS[0]]}, "windows: expected at least one, with different names"),
        ({"windows": [UmbrellaWindow("a", (None, None))]}, "windows: expected a bias with the period"),
        ({"windows": [UmbrellaWindow("a", (Bias.umbrella(2.0, 1.0, 360.0),))]}, "windows: expected a bias with"),
        ({"record": [2]}, "record: expected indices of atoms below 2"),
        ({"coordinates": [distance(0, 1), distance(0, 1)]}, "windows: expected a bias|coordinates: expected"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict, message: str, tmp_path: Path) -> None:
    given = {"positions": START, "coordinates": [distance(0, 1)], "windows": WINDOWS[:2], "record": [], **change}
    with pytest.raises(ValueError, match=message):
        sample_windows(
            two_wells(), given["positions"], given["coordinates"], given["windows"], SETTINGS, tmp_path,
            record=given["record"],
        )  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_bad_coordinates_and_settings_are_named() -> None:
    with pytest.raises(ValueError, match="donor, proton, acceptor: expected indices of different atoms"):
        proton_transfer(0, 1, 0)
    with pytest.raises(ValueError, match="name: expected letters"):
        Coordinate("a b", openmm.CustomBondForce("r"))
    with pytest.raises(ValueError, match="timestep: expected a positive number, got 0"):
        UmbrellaSettings(timestep=0)
    with pytest.raises(ValueError, match=r"interval: expected from a time step to length = 1\.0"):
        UmbrellaSettings(length=1.0, interval=2.0)
    taken = two_wells()
    taken.getForce(0).setForceGroup(BIAS_GROUP)
    with pytest.raises(ValueError, match="system: expected force group 31 to be free"):
        biased_system(taken, [distance(0, 1)])
