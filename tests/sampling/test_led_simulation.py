"""Latent and molecular dynamics in turn: bookkeeping, statistics, restarts bit for bit, and what can go wrong."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlff.analysis.observables import dihedral
from openmm_mlff.sampling.back_mapping import RelaxationSettings
from openmm_mlff.sampling.led_records import MACRO, MICRO, WARMUP
from openmm_mlff.sampling.led_reporters import BackMappedReporter, LatentReporter
from openmm_mlff.sampling.led_simulation import WATCH_EVERY, LEDSimulation
from openmm_mlff.sampling.propagators import LatentState
from openmm_mlff.units import BOLTZMANN_KJ_PER_MOL

from .copies import Molecule
from .latent_models import (
    TORSIONS,
    BondModel,
    MakeLED,
    PlaceModel,
    Recorder,
    TorsionModel,
    diatomic,
    particle,
)

# -- bookkeeping ---------------------------------------------------------------------------------------------------


def test_phases_follow_one_another(make_led: MakeLED) -> None:
    simulation, recorder = make_led(), Recorder()
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


def test_rounds_and_walkers(make_led: MakeLED) -> None:
    simulation, recorder = make_led(n_walkers=3), Recorder()
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


def test_the_memory_is_warmed_with_the_frames_of_md(make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray) -> None:
    model, recorder = TorsionModel(molecule.topology, relaxed), Recorder()
    simulation = make_led(model)
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


def test_the_return_starts_at_the_latent_state(make_led: MakeLED) -> None:
    simulation, recorder = make_led(), Recorder()
    simulation.reporters.append(recorder)
    simulation.run_rounds(8)
    last = {f.numbers[0, -1]: f.z[0, -1] for f in recorder.all if f.phase == MACRO}
    for record in recorder.returns:
        np.testing.assert_array_equal(record.z_decoded, last[record.frame])
        # 0.1 ps of dynamics away from where it was decoded
        apart = (record.z_relaxed - record.z_decoded + np.pi) % (2 * np.pi) - np.pi
        assert np.abs(apart).max() < np.radians(75)
        assert record.energies["decoded"] > record.energies["minimized"] < record.energies["equilibrated"]


def test_a_purely_latent_run_never_returns(make_led: MakeLED) -> None:
    simulation, recorder = make_led(micro_steps=0, watch=False), Recorder()
    simulation.reporters.append(recorder)
    simulation.step(104)
    assert [p for _, p in recorder.of(0)] == [WARMUP] * 4 + [MACRO] * 100
    assert (simulation.statistics.returns, simulation.statistics.rho) == (0, float("inf"))
    assert simulation.statistics.rounds == 16


def test_quantities_are_understood(make_led: MakeLED, relaxed: np.ndarray) -> None:
    simulation = make_led(
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
    simulation.run_rounds(150)
    assert simulation.statistics.fallbacks == 0
    frames = [f for f in recorder.all if f.phase == MICRO]
    energies = np.array([f.energies[0].mean() for f in frames if f.energies is not None])
    lengths = np.array([f.z[0, :, 0].mean() for f in frames])
    half_kt = 0.5 * BOLTZMANN_KJ_PER_MOL * 300.0
    for found, exact in ((energies, half_kt), (lengths, model.mean)):
        # rounds are independent of one another
        assert abs(found.mean() - exact) < 4 * found.std(ddof=1) / np.sqrt(len(found))
    assert energies.std(ddof=1) / np.sqrt(len(energies)) < 0.15 * half_kt


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
    simulation.run_rounds(200)
    assert simulation.statistics.fallbacks == 0
    for record in recorder.returns:
        np.testing.assert_allclose(record.z_relaxed, record.z_decoded, atol=1e-4)
    energies = np.array([f.energies[0, 0] for f in recorder.all if f.phase == MICRO and f.energies is not None])
    kt = BOLTZMANN_KJ_PER_MOL * 300.0
    assert abs(energies.mean() - 1.5 * kt) < 4 * np.sqrt(1.5 / 200) * kt
    frames = mdtraj.load(str(tmp_path / "p.dcd"), top=str(pdb_of(topology, positions, tmp_path)))
    z = np.concatenate([f.z[0] for f in recorder.all])
    np.testing.assert_allclose(frames.xyz[:, 0], z, atol=1e-4)


def pdb_of(topology: app.Topology, positions: np.ndarray, folder: Path) -> Path:
    with open(folder / "top.pdb", "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    return folder / "top.pdb"


def test_energies_of_returns_are_those_of_md(make_led: MakeLED) -> None:
    simulation, recorder = (
        make_led(warmup=100, relaxation=RelaxationSettings(), macro_steps=4, micro_steps=1),
        Recorder(),
    )
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


def test_doubt_returns_to_md_from_the_last_trusted_state(
    make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray
) -> None:
    model, recorder = Sinking(molecule.topology, relaxed), Recorder()
    simulation = make_led(model, macro_steps=1000)
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


class Watcher(Recorder):
    """Sees the solvent too."""

    name = "watcher"
    needs_particles = True


def test_a_reporter_can_see_all_particles_of_every_frame_of_md(
    make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray
) -> None:
    """Doubt ends blocks of latent steps anywhere; no frame of MD may pass unseen."""
    recorder = Watcher()
    simulation = make_led(Sinking(molecule.topology, relaxed), macro_steps=1000)
    simulation.reporters.append(recorder)
    for _ in range(4):
        simulation.step(15)
    dynamic = [f for f in recorder.all if f.phase != MACRO]
    stats = simulation.statistics
    assert stats.doubt_switches > 0
    assert sum(f.numbers.size for f in dynamic) == stats.md_frames + stats.warmup_frames
    for frames in dynamic:
        assert frames.particles is not None and frames.boxes is not None and frames.positions is not None
        n = frames.numbers.shape[1]
        assert frames.particles.shape == (1, n, 22, 3) and frames.boxes.shape == (1, n, 3, 3)
        np.testing.assert_array_equal(frames.particles[:, :, simulation.solute], frames.positions)
    assert dynamic[-1].particles is not None
    here = simulation.context.getState(positions=True).getPositions(asNumpy=True)._value
    np.testing.assert_array_equal(dynamic[-1].particles[0, -1], here)
    latent = [f for f in recorder.all if f.phase == MACRO]
    assert latent and all(f.particles is None and f.boxes is None for f in latent)


def test_a_model_that_doubts_everything_leaves_md_alone(
    make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray
) -> None:
    """Nothing is decoded, and MD goes on from its own last structure with its own velocities."""

    class Lost(TorsionModel):
        def doubt(self, state: LatentState) -> np.ndarray:
            return np.full(len(state), 7.0)

    model, recorder = Lost(molecule.topology, relaxed), Recorder()
    simulation = make_led(model)
    simulation.reporters.append(recorder)
    simulation.step(40)
    stats = simulation.statistics
    assert (stats.latent_frames, stats.md_frames, stats.warmup_frames) == (0, 36, 4)
    assert stats.stayed == stats.returns == 12 and model.decoded == []
    assert all(r.tries == 0 and not r.fallback for r in recorder.returns)
    kinetic = simulation.context.getState(energy=True).getKineticEnergy()._value
    assert kinetic > 10.0


def test_a_doubt_that_is_no_number_is_doubt(make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray) -> None:
    class Mute(TorsionModel):
        def doubt(self, state: LatentState) -> np.ndarray:
            return np.full(len(state), np.nan)

    simulation = make_led(Mute(molecule.topology, relaxed))
    simulation.step(13)
    assert simulation.statistics.latent_frames == 0 < simulation.statistics.doubtful_blocks


def test_without_watching_doubt_is_not_asked(make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray) -> None:
    simulation = make_led(Sinking(molecule.topology, relaxed), watch=False)
    simulation.step(40)
    assert simulation.statistics.doubt_switches == 0


def test_in_a_purely_latent_run_doubt_is_only_reported(
    make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray
) -> None:
    simulation, recorder = make_led(Sinking(molecule.topology, relaxed), micro_steps=0, macro_steps=50), Recorder()
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


def test_inverted_structures_are_decoded_again(make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray) -> None:
    model, recorder = Mirrored(molecule.topology, relaxed), Recorder()
    model.good = 3
    simulation = make_led(model)
    simulation.reporters.append(recorder)
    simulation.run_rounds(2)
    stats = simulation.statistics
    assert (stats.accepted, stats.retries, stats.refused) == (2, 4, {"inverted": 4})
    assert stats.accepted_share == pytest.approx(1 / 3)
    assert [r.reasons for r in recorder.returns] == [("inverted", "inverted")] * 2


def test_md_goes_on_from_its_last_structure_if_nothing_is_accepted(
    make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray
) -> None:
    model, recorder = Mirrored(molecule.topology, relaxed), Recorder()
    simulation = make_led(model)
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


def test_numbers_that_are_not_numbers_are_decoded_again(
    make_led: MakeLED, molecule: Molecule, relaxed: np.ndarray
) -> None:
    class Broken(TorsionModel):
        def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
            return np.full((len(z), 22, 3), np.nan)

    simulation = make_led(Broken(molecule.topology, relaxed))
    simulation.run_rounds(1)
    assert simulation.statistics.refused == {"not finite": 5}


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
    relaxation = RelaxationSettings(restrained=0.02, free=0.02, iterations=20)
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
