"""Comparisons with molecular dynamics: models that are right or wrong by a known factor, and known structures."""

from __future__ import annotations

import json
from pathlib import Path

import mdtraj
import numpy as np
import pytest
from openmm import app

from openmm_led import Features, Trajectories
from openmm_led.comparison import AUTOENCODER, LED, MD, Comparison, Row, Settings
from openmm_led.report import shortened, show, to_dict, write_report
from openmm_led.validation import validate
from openmm_led.views import Geometry, GeometryChecks, Views
from openmm_mlff.sampling.propagators import LatentState, Propagator

INTERVAL, JUMP, NOISE = 2.0, 0.02, 0.2


def hops(n_runs: int, n_frames: int, seed: int, jump: float = JUMP) -> Trajectories:
    """One particle in two wells at x = -1 and 1; it changes well with probability `jump` per frame."""
    random = np.random.default_rng(seed)
    well = np.cumsum(random.random((n_runs, n_frames)) < jump, axis=1) + random.integers(2, size=(n_runs, 1))
    x = 2.0 * (well % 2) - 1.0 + NOISE * random.standard_normal((n_runs, n_frames))
    frames = np.zeros((n_runs, n_frames, 1, 3))
    frames[:, :, 0, 0] = x
    frames[:, :, 0, 1] = random.standard_normal(x.shape)  # so that no two frames are the same by chance
    return Trajectories(tuple(frames), INTERVAL)


class Hops(Propagator):
    """The process itself, with a rate of its own; latent coordinate and decoded position are x."""

    latent_dim, interval, n_atoms, temperature = 1, INTERVAL, 1, None

    def __init__(self, jump: float) -> None:
        self.jump, self.features = jump, Features.raw(1)

    def check_topology(self, topology: app.Topology) -> None:
        raise AssertionError("a model potential has no topology")

    def encode(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions)[:, 0, :1]

    def decode(self, z: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return np.concatenate([z, np.zeros((len(z), 2))], axis=1)[:, None]

    def start(self, history: np.ndarray) -> LatentState:
        return LatentState(np.array(history[:, -1]))

    def step(self, state: LatentState, random: np.random.Generator) -> LatentState:
        well = np.sign(state.z) * np.where(random.random(state.z.shape) < self.jump, -1.0, 1.0)
        return LatentState(well + NOISE * random.standard_normal(state.z.shape))


QUICK = Settings(states=12, copies=3, resamples=8, timescales=1, lag=3, bins=20)


@pytest.fixture(scope="module")
def right() -> Comparison:
    return validate(Hops(JUMP), hops(16, 600, 1), hops(24, 600, 2), topology=None, settings=QUICK)


def row(comparison: Comparison, section: str, quantity: str) -> Row:
    found = [r for r in comparison.rows if r.section == section and r.quantity == quantity]
    assert len(found) == 1, [(r.section, r.quantity) for r in comparison.rows]
    return found[0]


@pytest.mark.parametrize("space", ["latent", "decoded"])
def test_a_right_model_agrees_with_the_data_and_with_the_truth(right: Comparison, space: str) -> None:
    # correlation (1 - 2 p) per frame
    truth = -INTERVAL / np.log(1 - 2 * JUMP)
    for source, (value, error) in row(right, f"time scales, {space}", "implied time scale 1").values.items():
        assert 0.02 * truth < error < 0.25 * truth, source
        assert abs(value - truth) < 4 * error, source
    for pair in ("A to B", "B to A"):
        values = row(right, f"time scales, {space}", f"first passage {pair}").values
        for source in (MD, LED):
            assert abs(values[source][0] - INTERVAL / JUMP) < 4 * values[source][1], (source, values)
    shares = [row(right, f"time scales, {space}", f"share of core {c}").values[LED] for c in "AB"]
    assert all(abs(value - 0.5) < 4 * error for value, error in shares)


def test_a_right_model_is_as_near_as_molecular_dynamics(right: Comparison) -> None:
    values = row(right, "distributions", "JSD of coordinates").values
    assert values[LED][0] < 2 * values["MD floor"][0]
    # x is both the latent coordinate and what is decoded: the autoencoder changes nothing
    assert values[AUTOENCODER][0] == 0.0
    widths = row(right, "distributions", "W1 of x").values
    assert widths[LED][0] < 3 * max(widths["training MD"][0], 0.02)


def test_a_wrong_model_is_found_out() -> None:
    fast = 0.1
    found = validate(Hops(fast), hops(16, 600, 1), hops(24, 600, 2), topology=None, settings=QUICK)
    values = row(found, "time scales, latent", "implied time scale 1").values
    truth = -INTERVAL / np.log(1 - 2 * fast)
    assert abs(values[LED][0] - truth) < 4 * values[LED][1]
    assert values[MD][0] > 3 * values[LED][0]
    passages = row(found, "time scales, latent", "first passage A to B").values
    assert abs(passages[LED][0] - INTERVAL / fast) < 4 * passages[LED][1]


def test_states_that_are_only_left_are_a_core_of_their_own() -> None:
    # every run begins in a third well, at x = 6, and leaves it for good with probability 0.01 per frame
    def leaving(seed: int) -> Trajectories:
        inner, random = hops(20, 600, seed), np.random.default_rng(seed)
        frames = []
        for run in inner.frames:
            left = min(int(random.geometric(0.01)), 590)
            moved = run.copy()
            moved[:left, 0, 0] = 6.0 + NOISE * random.standard_normal(left)
            frames.append(moved)
        return Trajectories(tuple(frames), INTERVAL)

    found = validate(Hops(JUMP), leaving(5), leaving(6), topology=None, settings=QUICK)
    passages = found.kinetics["latent"][MD].passages
    assert {name for pair in passages for name in pair} == {"A", "B", "C"}
    assert passages["A", "C"].events == 0
    island = [note for note in found.notes if note.startswith("core C, latent")]
    assert len(island) == 1 and 5.9 < float(island[0].split("x ")[1].split(";")[0]) < 6.1


def test_the_report_is_valid_json_with_every_picture(right: Comparison, tmp_path: Path, capsys) -> None:
    path = write_report(right, tmp_path / "report")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["settings"]["lag_ps"] == 6.0 and content["about"]["test"]["runs"] == 16
    assert {p.name for p in path.parent.iterdir()} == {*content["pictures"], "report.json"}
    expected = {"latent.png", "coordinates.png", "profiles.png"}
    expected |= {f"{what}_{space}.png" for what in ("timescales", "chapman_kolmogorov", "passages")
                 for space in ("latent", "decoded")}  # fmt: skip
    assert expected == set(content["pictures"])
    assert all((path.parent / name).stat().st_size > 5000 for name in expected)
    scales = content["kinetics"]["latent"][LED]["timescales"]
    assert np.shape(scales["values"]) == (len(scales["lags"]), 1)
    show(right)
    printed = capsys.readouterr().out
    assert "first passage A to B" in printed and "MD floor" in printed


def test_numbers_that_are_not_numbers_become_null(right: Comparison) -> None:
    right.rows.append(Row("distributions", "nothing", "", {MD: (float("nan"), float("inf"))}))
    values = to_dict(right)["rows"][-1]["values"]
    right.rows.pop()
    assert values == {MD: {"value": None, "error": None}}
    assert shortened(right) == right.rows


def test_data_that_do_not_fit_are_refused() -> None:
    model, test = Hops(JUMP), hops(3, 60, 1)
    with pytest.raises(ValueError, match=r"120 frames of train are also in test"):
        validate(model, test, Trajectories(test.frames[:2], INTERVAL), topology=None)
    with pytest.raises(ValueError, match=r"expected the model's 2 ps between frames, test has 1 ps"):
        validate(model, Trajectories(test.frames, 1.0), topology=None)
    with pytest.raises(ValueError, match=r"expected the 1 atoms of the model, got 2 \(test\)"):
        validate(model, Trajectories((np.zeros((50, 2, 3)),), INTERVAL), topology=None)
    with pytest.raises(ValueError, match=r"at least 20 frames for a comparison, trajectory 0 has 15"):
        validate(model, hops(2, 15, 1), topology=None)
    with pytest.raises(ValueError, match=r"lag: expected fewer than the 50 frames"):
        validate(model, test, topology=None, settings=Settings(lag=50))
    with pytest.raises(ValueError, match=r"baselines: expected the training runs"):
        validate(model, test, topology=None, settings=Settings(baselines=True))


@pytest.mark.parametrize(("name", "value"), [("sets", 1), ("copies", 0), ("lag", 0), ("history", 0), ("bins", 1)])
def test_settings_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        Settings(**{name: value})


# -- views and geometry of molecules -------------------------------------------------------------------------------


def shaken(path: Path, n: int, width: float) -> tuple[app.Topology, np.ndarray]:
    pdb = app.PDBFile(str(path))
    positions = np.array(pdb.getPositions(asNumpy=True)._value)
    return pdb.topology, positions + width * np.random.default_rng(0).standard_normal((n, *positions.shape))


def test_views_of_a_protein_agree_with_mdtraj(shared: Path) -> None:
    topology, frames = shaken(shared / "data" / "1l2y.pdb", 60, 0.01)
    views = Views(Features.internal(topology, "backbone"), topology, [frames], 1)
    seen = views(frames)
    trajectory = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(topology))
    phi, psi = mdtraj.compute_phi(trajectory)[1], mdtraj.compute_psi(trajectory)[1]
    # mdtraj starts phi at residue 2 and ends psi one residue before the last: residue k has phi[k - 2] and psi[k - 1]
    assert len(views.residues) == 18
    np.testing.assert_allclose(seen["torsions LEU2"], np.degrees(np.stack([phi[:, 0], psi[:, 1]], -1)), atol=1e-2)
    alphas = trajectory.atom_slice(trajectory.topology.select("name CA"))
    rmsd = mdtraj.rmsd(alphas, alphas, 0)
    np.testing.assert_allclose(seen["shape"][:, 0], rmsd, atol=2e-4)
    np.testing.assert_allclose(
        seen["shape"][:, 1], mdtraj.compute_rg(alphas, masses=np.ones(alphas.n_atoms)), rtol=1e-5
    )
    np.testing.assert_allclose(
        seen["shape"][:, 2], mdtraj.compute_distances(alphas, [[0, alphas.n_atoms - 1]])[:, 0], rtol=1e-4
    )
    assert views.space({name: [x] for name, x in seen.items()})[0].shape == (60, 4)


def test_geometry_counts_what_is_wrong(shared: Path) -> None:
    topology, frames = shaken(shared / "data" / "alanine-dipeptide-implicit.pdb", 400, 0.002)
    checks = GeometryChecks(Features.internal(topology), topology, [frames])

    def rows(positions: np.ndarray) -> dict[str, float]:
        sums = Geometry()
        checks.add(sums, positions[:100], len(positions))
        checks.add(sums, positions[100:], len(positions))
        return sums.rows()

    good = rows(frames)
    assert good["bonds beyond 6 s.d."] == good["inverted frames"] == good["frames with clashes or faults"] == 0.0
    assert rows(frames * [-1, 1, 1])["inverted frames"] == 1.0
    names = {a.name: a.index for a in topology.atoms() if a.residue.name == "ALA"}
    broken = frames.copy()
    axis = broken[:40, names["CB"]] - broken[:40, names["CA"]]
    broken[:40, names["CB"]] += axis
    found = rows(broken)
    # one of nine bonds in 40 of 400 frames
    assert found["bonds beyond 6 s.d."] == pytest.approx(40 / (9 * 400))
    assert found["frames with clashes or faults"] == pytest.approx(0.1, abs=0.02)
    trajectory = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(topology))
    angles = np.degrees(mdtraj.compute_angles(trajectory, [[names["N"], names["CA"], names["CB"]]]))
    assert good["s.d. of N-CA-CB"] == pytest.approx(angles.std(), rel=1e-3)
