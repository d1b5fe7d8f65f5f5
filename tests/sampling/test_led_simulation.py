"""Latent and molecular dynamics in turn: bookkeeping, statistics, restarts bit for bit, and what can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.sampling.back_mapping import RelaxationSettings
from openmm_mlff.sampling.guards import RunFailed
from openmm_mlff.sampling.implicit_solvent import use_native_obc2
from openmm_mlff.sampling.led_records import MACRO, MICRO, WARMUP, Frames, Return
from openmm_mlff.sampling.led_reporters import BackMappedReporter, LatentReporter, LEDReporter, RoundReporter
from openmm_mlff.sampling.led_simulation import WATCH_EVERY, LEDSimulation
from openmm_mlff.sampling.propagators import LatentState
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

from .copies import Molecule
from .latent_models import TORSIONS, BondModel, PlaceModel, TorsionModel, diatomic, particle

QUICK = RelaxationSettings(restrained=0.02, free=0.08, iterations=100)
Make = Callable[..., LEDSimulation]


class Recorder(LEDReporter):
    """Keeps everything."""

    name = "recorder"

    def __init__(self) -> None:
        self.all: list[Frames] = []
        self.returns: list[Return] = []

    def frames(self, simulation: LEDSimulation, frames: Frames) -> None:
        self.all.append(frames)

    def returned(self, simulation: LEDSimulation, record: Return) -> None:
        self.returns.append(record)

    def of(self, walker: int) -> list[tuple[int, str]]:
        """Number and phase of every frame of a walker, in order."""
        return [
            (int(number), f.phase)
            for f in self.all
            for i in np.flatnonzero(f.walkers == walker)
            for number in f.numbers[i]
        ]


@pytest.fixture(scope="module")
def implicit(molecule: Molecule) -> openmm.System:
    field = app.ForceField("amber99sbildn.xml", "implicit/obc2.xml")
    made = field.createSystem(molecule.topology, constraints=app.HBonds, hydrogenMass=3 * unit.amu)
    use_native_obc2(made)
    return made


@pytest.fixture(scope="module")
def relaxed(implicit: openmm.System, molecule: Molecule) -> np.ndarray:
    context = openmm.Context(implicit, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    return context.getState(positions=True).getPositions(asNumpy=True)._value


@pytest.fixture()
def make(implicit: openmm.System, molecule: Molecule, relaxed: np.ndarray, tmp_path: Path) -> Make:
    def made(model: TorsionModel | None = None, start: bool = True, **options: Any) -> LEDSimulation:
        model = model or TorsionModel(molecule.topology, relaxed)
        given = {"macro_steps": 6, "micro_steps": 3, "warmup": 4, "relaxation": QUICK, "failure": tmp_path / "failure"}
        simulation = LEDSimulation(implicit, molecule.topology, model, **(given | options))
        if start:
            simulation.setPositions(relaxed)
        return simulation

    return made


# -- bookkeeping ---------------------------------------------------------------------------------------------------


def test_phases_follow_one_another(make: Make) -> None:
    simulation, recorder = make(), Recorder()
    simulation.reporters.append(recorder)
    for n in (1, 8, 13, 0, 9):  # cuts through all phases
        simulation.step(n)
    expected = [WARMUP] * 4 + ([MACRO] * 6 + [MICRO] * 3) * 3
    assert recorder.of(0) == list(enumerate(expected, start=1))
    assert simulation.frames.tolist() == [31]
    stats = simulation.statistics
    assert (stats.warmup_frames, stats.latent_frames, stats.md_frames) == (4, 18, 9)
    assert (stats.rounds, stats.returns, stats.accepted, stats.fallbacks) == (3, 3, 3, 0)
    assert stats.rho == pytest.approx(2.0)
    assert [r.frame for r in recorder.returns] == [10, 19, 28]
    assert all(r.cause == "schedule" and r.latent_frames == 6 and r.tries == 1 for r in recorder.returns)
    assert set(stats.seconds) == {"latent", "md", "encode", "decode", "relax"}


def test_rounds_and_walkers(make: Make) -> None:
    simulation, recorder = make(n_walkers=3), Recorder()
    simulation.reporters.append(recorder)
    simulation.run_rounds(1)
    assert simulation.frames.tolist() == [13] * 3
    simulation.run_rounds(1)
    assert simulation.statistics.rounds == 6
    expected = [WARMUP] * 4 + ([MACRO] * 6 + [MICRO] * 3) * 2
    for k in range(3):
        assert recorder.of(k) == list(enumerate(expected, start=1))
    # batched latent steps, and every walker on a way of its own
    assert any(f.phase == MACRO and len(f.walkers) == 3 for f in recorder.all)
    assert simulation.latent is not None
    assert len(np.unique(simulation.latent.z, axis=0)) == 3


def test_the_memory_is_warmed_with_the_frames_of_md(make: Make, molecule: Molecule, relaxed: np.ndarray) -> None:
    model, recorder = TorsionModel(molecule.topology, relaxed), Recorder()
    simulation = make(model)
    simulation.reporters.append(recorder)
    for n in (2, 9, 11):
        simulation.step(n)
    # what was recorded in MD is what the propagator was started with, whole phases at a time
    md = [f for f in recorder.all if f.phase != MACRO]
    assert [h.shape for h in model.histories] == [(1, 4, 2), (1, 3, 2), (1, 3, 2)]
    given = np.concatenate([h[0] for h in model.histories])
    seen = np.concatenate([f.z[0] for f in md])
    np.testing.assert_array_equal(given, seen)
    positions = np.concatenate([f.positions[0] for f in md if f.positions is not None])
    np.testing.assert_allclose(np.radians(dihedral(positions, TORSIONS)), seen, atol=1e-12)
    assert simulation.latent is not None


def test_the_return_starts_at_the_latent_state(make: Make) -> None:
    simulation, recorder = make(), Recorder()
    simulation.reporters.append(recorder)
    simulation.run_rounds(8)
    last = {f.numbers[0, -1]: f.z[0, -1] for f in recorder.all if f.phase == MACRO}
    for record in recorder.returns:
        np.testing.assert_array_equal(record.z_decoded, last[record.frame])
        # 0.1 ps of dynamics away from where it was decoded
        apart = (record.z_relaxed - record.z_decoded + np.pi) % (2 * np.pi) - np.pi
        assert np.abs(apart).max() < np.radians(75)
        assert record.energies["decoded"] > record.energies["minimized"] < record.energies["equilibrated"]


def test_a_purely_latent_run_never_returns(make: Make) -> None:
    simulation, recorder = make(micro_steps=0, watch=False), Recorder()
    simulation.reporters.append(recorder)
    simulation.step(104)
    assert [p for _, p in recorder.of(0)] == [WARMUP] * 4 + [MACRO] * 100
    assert (simulation.statistics.returns, simulation.statistics.rho) == (0, float("inf"))
    assert simulation.statistics.rounds == 16


def test_quantities_are_understood(make: Make, relaxed: np.ndarray) -> None:
    simulation = make(
        start=False,
        temperature=300 * unit.kelvin,
        friction=0.002 / unit.femtosecond,
        timestep=4 * unit.femtosecond,
        equilibration=500 * unit.femtosecond,
        relaxation=None,
    )
    simulation.setPositions(relaxed * unit.nanometer)
    assert simulation.integrator.getStepSize()._value == pytest.approx(0.004)
    assert simulation.integrator.getFriction()._value == pytest.approx(2.0)
    assert simulation._relaxation.restrained + simulation._relaxation.free == pytest.approx(0.5)
    simulation.step(2)


# -- statistics ----------------------------------------------------------------------------------------------------


def test_energies_of_an_exact_model_are_those_of_its_temperature(tmp_path: Path) -> None:
    """The bond's potential energy is kT/2 on average, and its length has the distribution of the model."""
    system, topology, positions = diatomic()
    model, recorder = BondModel(), Recorder()
    relaxation = RelaxationSettings(restrained=0.0, free=0.4)
    simulation = LEDSimulation(
        system, topology, model, timestep=0.002, macro_steps=2, micro_steps=4, warmup=20, relaxation=relaxation,
        failure=tmp_path, seed=5,
    )  # fmt: skip
    simulation.setPositions(positions)
    simulation.reporters.append(recorder)
    simulation.run_rounds(250)
    assert simulation.statistics.fallbacks == 0
    frames = [f for f in recorder.all if f.phase == MICRO]
    energies = np.array([f.energies[0].mean() for f in frames if f.energies is not None])
    lengths = np.array([f.z[0, :, 0].mean() for f in frames])
    half_kt = 0.5 * BOLTZMANN_KJ_PER_MOL * 300.0
    for found, exact in ((energies, half_kt), (lengths, model.mean)):
        # rounds are independent of one another
        assert abs(found.mean() - exact) < 4 * found.std(ddof=1) / np.sqrt(len(found))
    assert energies.std(ddof=1) / np.sqrt(len(energies)) < 0.1 * half_kt


def test_a_particle_in_a_field_keeps_its_place(tmp_path: Path) -> None:
    """Its potential energy is 3 kT/2 on average, and what is decoded is where dynamics go on."""
    system, topology, positions = particle()
    recorder = Recorder()
    # no minimisation to speak of: the well would draw the particle to its middle
    relaxation = RelaxationSettings(tight=1e9, loose=1e9, restrained=0.0, free=0.0)
    simulation = LEDSimulation(
        system, topology, PlaceModel(), timestep=0.002, macro_steps=1, micro_steps=1, warmup=20, relaxation=relaxation,
        failure=tmp_path, seed=3,
    )  # fmt: skip
    simulation.setPositions(positions)
    simulation.reporters += [recorder, BackMappedReporter(tmp_path / "p.dcd")]
    simulation.run_rounds(400)
    assert simulation.statistics.fallbacks == 0
    for record in recorder.returns:
        np.testing.assert_allclose(record.z_relaxed, record.z_decoded, atol=1e-4)
    energies = np.array([f.energies[0, 0] for f in recorder.all if f.phase == MICRO and f.energies is not None])
    kt = BOLTZMANN_KJ_PER_MOL * 300.0
    assert abs(energies.mean() - 1.5 * kt) < 4 * np.sqrt(1.5 / 400) * kt
    frames = mdtraj.load(str(tmp_path / "p.dcd"), top=str(pdb_of(topology, positions, tmp_path)))
    z = np.concatenate([f.z[0] for f in recorder.all])
    np.testing.assert_allclose(frames.xyz[:, 0], z, atol=1e-4)


def pdb_of(topology: app.Topology, positions: np.ndarray, folder: Path) -> Path:
    with open(folder / "top.pdb", "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    return folder / "top.pdb"


def test_energies_of_returns_are_those_of_md(make: Make) -> None:
    simulation, recorder = make(warmup=100, relaxation=RelaxationSettings(), macro_steps=4, micro_steps=1), Recorder()
    simulation.reporters.append(recorder)
    simulation.run_rounds(20)
    md = np.concatenate([f.energies[0] for f in recorder.all if f.phase == WARMUP and f.energies is not None])
    back = np.array([r.energies["equilibrated"] for r in recorder.returns])
    # the spread of MD's energies; their mean is worth about 10 independent ones
    assert abs(back.mean() - md.mean()) < 4 * md.std() * np.sqrt(1 / 10 + 1 / 20)


# -- doubt ---------------------------------------------------------------------------------------------------------


class Doubtful(TorsionModel):
    """Knows nothing of a psi below a limit."""

    limit = np.radians(60.0)

    def doubt(self, state: LatentState) -> np.ndarray:
        return np.where(state.z[:, 1] < self.limit, 2.0, 0.5)


class Sinking(Doubtful):
    """Psi falls by 4 degrees a step."""

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        return LatentState(state.z - np.radians([0.0, 4.0]), state.memory)


def test_doubt_returns_to_md_from_the_last_trusted_state(make: Make, molecule: Molecule, relaxed: np.ndarray) -> None:
    model, recorder = Sinking(molecule.topology, relaxed), Recorder()
    simulation = make(model, macro_steps=1000)
    simulation.reporters.append(recorder)
    simulation.step(60)
    stats = simulation.statistics
    assert stats.doubt_switches == stats.returns > 0
    # blocks are shorter at the end of a call
    assert 0 < stats.dropped_frames <= WATCH_EVERY * stats.doubtful_blocks
    assert stats.returns == stats.accepted + stats.fallbacks + stats.stayed
    assert [number for number, _ in recorder.of(0)] == list(range(1, 61))
    for frames in recorder.all:
        if frames.phase == MACRO:
            assert (frames.z[..., 1] >= model.limit).all()
            assert frames.doubt[0, -1] == 0.5
    assert all(z[1] >= model.limit for z in model.decoded)
    assert {r.cause for r in recorder.returns} == {"doubt"}


def test_a_model_that_doubts_everything_leaves_md_alone(make: Make, molecule: Molecule, relaxed: np.ndarray) -> None:
    """Nothing is decoded, and MD goes on from its own last structure with its own velocities."""

    class Lost(TorsionModel):
        def doubt(self, state: LatentState) -> np.ndarray:
            return np.full(len(state), 7.0)

    model, recorder = Lost(molecule.topology, relaxed), Recorder()
    simulation = make(model)
    simulation.reporters.append(recorder)
    simulation.step(40)
    stats = simulation.statistics
    assert (stats.latent_frames, stats.md_frames, stats.warmup_frames) == (0, 36, 4)
    assert stats.stayed == stats.returns == 12 and model.decoded == []
    assert all(r.tries == 0 and not r.fallback for r in recorder.returns)
    kinetic = simulation.context.getState(energy=True).getKineticEnergy()._value
    assert kinetic > 10.0


def test_without_watching_doubt_is_not_asked(make: Make, molecule: Molecule, relaxed: np.ndarray) -> None:
    simulation = make(Sinking(molecule.topology, relaxed), watch=False)
    simulation.step(40)
    assert simulation.statistics.doubt_switches == 0


def test_in_a_purely_latent_run_doubt_is_only_reported(make: Make, molecule: Molecule, relaxed: np.ndarray) -> None:
    simulation, recorder = make(Sinking(molecule.topology, relaxed), micro_steps=0, macro_steps=50), Recorder()
    simulation.reporters.append(recorder)
    simulation.step(104)
    assert (simulation.statistics.latent_frames, simulation.statistics.dropped_frames) == (100, 0)
    assert simulation.statistics.doubtful_blocks > 0
    assert any((f.doubt[:, -1] == 2.0).any() for f in recorder.all if f.phase == MACRO)


# -- what is decoded badly -----------------------------------------------------------------------------------------


class Mirrored(TorsionModel):
    """Decodes the mirror image until it has been asked `good` times."""

    good = 10**9
    asked = 0

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        self.asked += 1
        found = super().decode(z, random)
        return found if self.asked % self.good == 0 else found * [1.0, 1.0, -1.0]


def test_inverted_structures_are_decoded_again(make: Make, molecule: Molecule, relaxed: np.ndarray) -> None:
    model, recorder = Mirrored(molecule.topology, relaxed), Recorder()
    model.good = 3
    simulation = make(model)
    simulation.reporters.append(recorder)
    simulation.run_rounds(2)
    stats = simulation.statistics
    assert (stats.accepted, stats.retries, stats.refused) == (2, 4, {"inverted": 4})
    assert stats.accepted_share == pytest.approx(1 / 3)
    assert [r.reasons for r in recorder.returns] == [("inverted", "inverted")] * 2


def test_md_goes_on_from_its_last_structure_if_nothing_is_accepted(
    make: Make, molecule: Molecule, relaxed: np.ndarray
) -> None:
    model, recorder = Mirrored(molecule.topology, relaxed), Recorder()
    simulation = make(model)
    simulation.reporters.append(recorder)
    simulation.run_rounds(2)
    stats = simulation.statistics
    assert (stats.fallbacks, stats.accepted, stats.retries) == (2, 0, 8)
    assert all(r.fallback and r.tries == 5 for r in recorder.returns)
    last_before = next(f for f in recorder.all if f.phase == WARMUP)
    for f in recorder.all:
        if f.phase == WARMUP:
            last_before = f
    np.testing.assert_array_equal(recorder.returns[0].z_relaxed, last_before.z[0, -1])


def test_numbers_that_are_not_numbers_are_decoded_again(make: Make, molecule: Molecule, relaxed: np.ndarray) -> None:
    class Broken(TorsionModel):
        def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
            return np.full((len(z), 22, 3), np.nan)

    simulation = make(Broken(molecule.topology, relaxed))
    simulation.run_rounds(1)
    assert simulation.statistics.refused == {"not finite": 5}


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
def test_a_resumed_run_goes_on_bit_for_bit(make: Make, tmp_path: Path, cut: int) -> None:
    """Cut in the warm-up, in latent steps, in MD, and later; with two walkers, and files that go on."""
    folders = tmp_path / "whole", tmp_path / "cut"
    whole = make(n_walkers=2)
    whole.reporters += reporters(folders[0])
    whole.step(cut)
    whole.saveCheckpoint(folders[0] / "led.checkpoint")
    whole.step(17)

    first = make(n_walkers=2)
    first.reporters += reporters(folders[1])
    first.step(cut)
    first.saveCheckpoint(folders[1] / "led.checkpoint")
    first.step(3)  # lost when the run is killed
    second = make(n_walkers=2, start=False)
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


def test_loading_takes_a_running_simulation_back(make: Make, tmp_path: Path) -> None:
    simulation = make()
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


def test_other_settings_and_damaged_files_are_refused(make: Make, tmp_path: Path) -> None:
    simulation = make()
    simulation.step(1)
    simulation.saveCheckpoint(tmp_path / "c")
    with pytest.raises(ValueError, match="expected a checkpoint with macro_steps 7, got 6"):
        make(macro_steps=7).loadCheckpoint(tmp_path / "c")
    with pytest.raises(ValueError, match="expected a checkpoint with walkers 2, got 1"):
        make(n_walkers=2).loadCheckpoint(tmp_path / "c")
    (tmp_path / "d").write_bytes((tmp_path / "c").read_bytes()[:1000])
    with pytest.raises(ValueError, match="d is damaged or no checkpoint"):
        simulation.loadCheckpoint(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        simulation.loadCheckpoint(tmp_path / "e")


def test_files_hold_what_happened(make: Make, tmp_path: Path, relaxed: np.ndarray) -> None:
    simulation, recorder = make(), Recorder()
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


def test_two_reporters_of_one_file_are_refused(make: Make, tmp_path: Path) -> None:
    simulation = make()
    simulation.reporters += [LatentReporter(tmp_path / "l.csv"), LatentReporter(tmp_path / "l.csv")]
    with pytest.raises(ValueError, match="reporters: expected different files"):
        simulation.step(1)
    with pytest.raises(ValueError, match=r"path: expected a file .dcd or .xtc, got x.pdb"):
        BackMappedReporter("x.pdb")


# -- failures ------------------------------------------------------------------------------------------------------


def test_md_that_explodes_is_saved_and_named(make: Make, relaxed: np.ndarray, tmp_path: Path) -> None:
    simulation = make(start=False)
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
    make: Make, molecule: Molecule, relaxed: np.ndarray, tmp_path: Path
) -> None:
    class Runaway(TorsionModel):
        broken = True

        def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
            z = state.z.copy()
            z[-1] = np.nan if self.broken else 0.0
            return LatentState(z, state.memory)

    model = Runaway(molecule.topology, relaxed)
    simulation = make(model, n_walkers=2)
    with pytest.raises(RunFailed, match="latent coordinates of walker 1 are not numbers after frame 4"):
        simulation.step(20)
    again = make(model, n_walkers=2, start=False)
    again.loadCheckpoint(tmp_path / "failure" / "before.checkpoint")
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
        ({"equilibration": -1.0, "relaxation": None}, "equilibration: expected a time >= 0"),
        ({"solute": [0, 99]}, "solute: expected indices from 0 to 21, got 99"),
        ({"solute": "resname XYZ"}, "solute: expected at least one atom"),
        ({"solute": range(10)}, "model: it was trained on 22 atoms, but the solute has 10"),
        ({"platform": "Abacus"}, "platform: expected one of"),
        ({"integrator": openmm.NoseHooverIntegrator(300, 1, 0.004)}, "integrator: expected one of fixed step length"),
        ({"integrator": openmm.LangevinMiddleIntegrator(310, 1, 0.004)}, "integrator: expected a thermostat at"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(start=False, **options)


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


def test_positions_are_needed_and_checked(make: Make, relaxed: np.ndarray) -> None:
    simulation = make(start=False, n_walkers=2)
    with pytest.raises(ValueError, match="positions: expected setPositions or loadCheckpoint"):
        simulation.step(1)
    with pytest.raises(ValueError, match=r"positions: expected shape \(22, 3\) or \(2, 22, 3\), got \(3, 22, 3\)"):
        simulation.setPositions(np.stack([relaxed] * 3))
    with pytest.raises(ValueError, match="positions: expected finite numbers"):
        simulation.setPositions(relaxed * np.nan)


def test_another_temperature_can_be_allowed_and_the_system_stays(
    make: Make, implicit: openmm.System, relaxed: np.ndarray
) -> None:
    before = openmm.XmlSerializer.serialize(implicit)
    simulation = make(temperature=320.0, allow_other_temperature=True)
    simulation.step(14)
    assert openmm.XmlSerializer.serialize(implicit) == before


# -- explicit solvent ----------------------------------------------------------------------------------------------


def test_the_solute_returns_into_its_water(repository: Path, molecule: Molecule, tmp_path: Path) -> None:
    pdb = app.PDBFile(str(repository / "openmm_mlff" / "sampling" / "structures" / "capped_alanine_water.pdb"))
    field = app.ForceField("amber99sbildn.xml", "tip3p.xml")
    system = field.createSystem(
        pdb.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9, constraints=app.HBonds, hydrogenMass=3.0
    )
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0, 10))
    start = pdb.getPositions(asNumpy=True)._value
    model = TorsionModel(molecule.topology, start[:22], width=0.6)
    relaxation = RelaxationSettings(restrained=0.02, free=0.02, iterations=20, collisions=0.02)
    simulation = LEDSimulation(
        system, pdb.topology, model, macro_steps=5, micro_steps=1, warmup=1, relaxation=relaxation, platform="CPU",
        failure=tmp_path,
    )  # fmt: skip
    assert simulation.solute.tolist() == list(range(22))
    # the solute cut in two by the walls of the box comes together again
    edge = np.diag(np.array(pdb.topology.getPeriodicBoxVectors()._value))
    cut = start.copy()
    cut[10:22] += [edge[0], 0.0, -edge[2]]
    simulation.setPositions(cut)
    np.testing.assert_allclose(simulation.reference, start[:22], atol=1e-9)
    recorder = Recorder()
    simulation.reporters += [recorder, LatentReporter(tmp_path / "l.csv")]
    simulation.step(1)
    simulation.saveCheckpoint(tmp_path / "c")
    simulation.run_rounds(1)
    record = recorder.returns[0]
    assert not record.fallback, record
    assert record.energies["minimized"] < -35.0 * 361
    end = simulation._at.walkers[0]
    # water is whole and nobody was lost
    oxygens = np.arange(22, len(start), 3)
    np.testing.assert_allclose(
        np.linalg.norm(end.positions[oxygens + 1] - end.positions[oxygens], axis=1), 0.09572, atol=1e-5
    )
    before = end.positions.copy()
    simulation.loadCheckpoint(tmp_path / "c")
    simulation.run_rounds(1)
    np.testing.assert_array_equal(simulation._at.walkers[0].positions, before)


def test_solvent_needs_a_box(repository: Path, molecule: Molecule) -> None:
    pdb = app.PDBFile(str(repository / "openmm_mlff" / "sampling" / "structures" / "capped_alanine_water.pdb"))
    field = app.ForceField("amber99sbildn.xml", "tip3p.xml")
    system = field.createSystem(pdb.topology)
    model = TorsionModel(molecule.topology, molecule.positions)
    with pytest.raises(ValueError, match="system: expected a periodic box around the solvent"):
        LEDSimulation(system, pdb.topology, model, macro_steps=1, micro_steps=1)
