"""Learning free energies: on springs, whose free energies are integrals over one length."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openmm_mlff import _plugins
from openmm_mlff.data.structures import Batch, Structure
from openmm_mlff.potentials.family import Family, save_potential
from openmm_mlff.potentials.potential import Potential, Prediction
from openmm_mlff.sampling.molecule_runs import Failure, LangevinSettings, MoleculeSamples
from openmm_mlff.sampling.starts import bond_graph
from openmm_mlff.training import ensembles
from openmm_mlff.training.reweighting import bar_overlap, bar_variance
from openmm_mlff.training.solvation import BEST, SolvationTraining
from openmm_mlff.training.solvation_settings import SolvationOptions, Target
from openmm_mlff.units import BOLTZMANN_EV

TEMPERATURE = 298.15
KT = BOLTZMANN_EV * TEMPERATURE
LENGTHS = np.linspace(0.2, 2.4, 20001)


@dataclass(frozen=True)
class SpringsConfig:
    hydrogen: float = 12.0
    carbon: float = 30.0


class Springs(Potential):
    """Diatomics with E = k/2 (r - 1.1)^2, k in eV/angstrom^2 the mean of the two elements' trained numbers."""

    family = "springs"
    elements = (1, 6)
    cutoff = 5.0
    atom_energies: Tensor

    def __init__(self, config: SpringsConfig) -> None:
        super().__init__()
        self.config = config
        self.stiffness = nn.Parameter(torch.tensor([config.hydrogen, config.carbon], dtype=torch.float64))
        self.register_buffer("atom_energies", torch.zeros(2, dtype=torch.float64))

    def shift_atomic_energies(self, shifts: Mapping[int, float]) -> None:
        self.atom_energies += torch.tensor([shifts.get(1, 0.0), shifts.get(6, 0.0)], dtype=torch.float64)

    def predict(self, batch: Batch, fixed: Any) -> Prediction:
        assert batch.pairs is not None
        r = batch.pair_vectors(batch.pairs).square().sum(-1).sqrt()
        which = (batch.numbers == 6).long()
        k = 0.5 * (self.stiffness[which[batch.pairs.first]] + self.stiffness[which[batch.pairs.second]])
        energy = 0.25 * k * (r - 1.1).square()
        atoms = self.atom_energies[which].index_add(0, batch.pairs.first, energy)
        return Prediction(batch.sum_by_structure(atoms))


def density(stiffness: float) -> np.ndarray:
    return LENGTHS**2 * np.exp(-0.5 * stiffness * (LENGTHS - 1.1) ** 2 / KT)


def exact(model: Springs, structure: Structure, other: Springs) -> float:
    """Free energy of a diatomic in `model` minus that in `other`, kT."""
    means = []
    for potential in (model, other):
        k = potential.stiffness.detach().numpy()[(structure.numbers == 6).astype(int)].mean()
        means.append(np.log(density(float(k)).sum()))
    return float(means[1] - means[0])


def exact_samples(
    potential: Potential,
    structures: Sequence[Structure],
    settings: LangevinSettings,
    *,
    velocities: Any = None,
    **ignored: Any,
) -> list[MoleculeSamples]:
    """Stands in for molecular dynamics: lengths by the inverse of their cumulative distribution."""
    random = np.random.default_rng(settings.seed)
    results = []
    for structure in structures:
        k = float(potential.stiffness.detach().numpy()[(structure.numbers == 6).astype(int)].mean())  # type: ignore[operator]
        cumulative = np.cumsum(density(k))
        n = round(settings.length / settings.interval)
        r = np.interp(random.uniform(size=n), cumulative / cumulative[-1], LENGTHS)
        positions = np.zeros((n, 2, 3))
        positions[:, 1, 0] = r
        last = positions[-1]
        broken: tuple[Failure, ...] = ()
        if "breaks" in structure.info:
            # given up before its first frame
            positions, broken = positions[:0], (Failure(0, 5, "a bond is broken", last),)
        results.append(
            MoleculeSamples(
                positions=positions,
                energies=0.5 * k * (r - 1.1) ** 2,
                velocities=np.zeros((2, 3)),
                last=last,
                temperature=TEMPERATURE,
                failures=broken,
                finished=not broken,
            )
        )
    return results


MOLECULES = {
    "h2": Structure(np.array([1, 1]), np.array([[0.0, 0, 0], [1.1, 0, 0]])),
    "c2": Structure(np.array([6, 6]), np.array([[0.0, 0, 0], [1.1, 0, 0]])),
    "ch": Structure(np.array([6, 1]), np.array([[0.0, 0, 0], [1.1, 0, 0]])),
}
SAMPLING = LangevinSettings(temperature=TEMPERATURE, length=400.0, interval=1.0, equilibration=0.0)
OPTIONS = SolvationOptions(
    sampling=SAMPLING,
    rounds=12,
    epochs=20,
    batch_size=2,
    learning_rate=1.0,
    final_learning_rate=0.1,
    warmup_steps=0,
    seed=3,
    fit_elements=False,
    average=False,
)


@pytest.fixture
def springs(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(name="springs", model=Springs, config=SpringsConfig)
    original = _plugins.load
    monkeypatch.setattr(_plugins, "load", lambda group, name: family if name == "springs" else original(group, name))
    monkeypatch.setattr(ensembles, "sample", exact_samples)


def targets(shifts: dict[str, float]) -> list[Target]:
    splits = {"ch": "valid"}
    return [Target(name, MOLECULES[name], shift * KT, splits.get(name, "train")) for name, shift in shifts.items()]


def test_free_energies_are_learned_over_many_simulations(springs: None, tmp_path: Path) -> None:
    """Goals are 0.8 and 0.5 kT away, further than one ensemble's weights reach; the truth is an integral."""
    vacuum = Springs(SpringsConfig())
    wanted = Springs(SpringsConfig(hydrogen=60.0, carbon=75.0))
    goals = {name: exact(wanted, s, vacuum) for name, s in MOLECULES.items()}
    assert goals["h2"] > 0.75
    training = SolvationTraining(vacuum, targets(goals), OPTIONS, tmp_path / "run", say=lambda line: None)
    learned = training.run()
    rows = json.loads((tmp_path / "run" / "history.json").read_text(encoding="utf-8"))
    assert sum(row["simulated"] > 0 for row in rows) >= 2
    assert isinstance(learned, Springs)
    estimates = training.free_energies()
    for name, structure in MOLECULES.items():
        assert exact(learned, structure, vacuum) == pytest.approx(goals[name], abs=0.1)
        # what is reported of the last parameters is their free energy, within its own error
        error = np.sqrt(training.ensembles[name].variance + 0.1 / 400)
        model = training.model
        assert isinstance(model, Springs)
        assert estimates[name] / KT == pytest.approx(exact(model, structure, vacuum), abs=4 * error)
    assert (tmp_path / "run" / BEST).exists()


def test_a_step_is_halved_until_the_weights_hold(springs: None, tmp_path: Path) -> None:
    vacuum = Springs(SpringsConfig())
    options = dataclasses.replace(OPTIONS, learning_rate=60.0, final_learning_rate=60.0, rounds=1, epochs=1)
    options = dataclasses.replace(options, smallest_effective=0.85)
    training = SolvationTraining(vacuum, targets({"h2": 5.0, "c2": 5.0}), options, tmp_path, say=lambda line: None)
    training.run()
    assert training.history[0]["halved"] >= 1
    for name in ("h2", "c2"):
        assert training._effective_of(name) >= options.smallest_effective


def test_the_gradient_is_the_weighted_mean_of_gradients(springs: None, tmp_path: Path) -> None:
    vacuum = Springs(SpringsConfig())
    training = SolvationTraining(
        vacuum, targets({"h2": 0.5}), dataclasses.replace(OPTIONS, rounds=1, epochs=1), tmp_path
    )
    training.run()
    value = training._free_energy("h2", training._du("h2"))
    assert isinstance(training.model, Springs)
    (found,) = torch.autograd.grad(value, [training.model.stiffness])
    ensemble = training.ensembles["h2"]
    r = np.linalg.norm(ensemble.frames.positions[:, 1] - ensemble.frames.positions[:, 0], axis=-1)
    du = training._du("h2").detach().numpy()
    w = np.exp(-du) / np.exp(-du).sum()
    # dE/dk of H2 is (r - 1.1)^2 / 2 for the hydrogen number, nothing for carbon's
    expected = float((w * 0.5 * (r - 1.1) ** 2).sum()) / KT
    assert found.tolist() == pytest.approx([expected, 0.0], rel=1e-6)


def test_elements_are_fitted_whenever_errors_are_measured(springs: None, tmp_path: Path) -> None:
    """Targets that are sums over atoms are met exactly, before the first step and after the last."""
    goals = targets({"h2": 0.6, "c2": -1.0})
    options = dataclasses.replace(OPTIONS, rounds=1, epochs=1, fit_elements=True)
    training = SolvationTraining(Springs(SpringsConfig()), goals, options, tmp_path, say=lambda line: None)
    training.run()
    assert [row["train_mae_kt"] for row in training.history] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert training.history[0]["steps"] > 0
    found = training.free_energies()
    assert found == pytest.approx({t.name: t.free_energy for t in goals}, abs=1e-9)


def test_water_may_start_elsewhere(springs: None, tmp_path: Path) -> None:
    """Weights of the vacuum frames are uneven at once, so all are simulated again: the free energy is an integral."""
    vacuum, water = Springs(SpringsConfig()), Springs(SpringsConfig(hydrogen=45.0, carbon=110.0))
    goals = targets({name: exact(water, s, vacuum) for name, s in MOLECULES.items()})
    options = dataclasses.replace(OPTIONS, rounds=1, epochs=1, learning_rate=1e-9, final_learning_rate=1e-9)
    training = SolvationTraining(vacuum, goals, options, tmp_path / "run", say=lambda line: None, water=water)
    training.run()
    assert training.history[0]["simulated"] == 3
    for goal in goals:
        error = np.sqrt(training.ensembles[goal.name].variance)
        assert 0 < error < 0.2
        assert training.free_energies()[goal.name] / KT == pytest.approx(goal.free_energy / KT, abs=4 * error)
    with pytest.raises(ValueError, match="water: expected that of the training"):
        SolvationTraining(vacuum, goals, options, tmp_path / "run", resume=True, say=lambda line: None)


def test_a_round_ends_with_the_mean_of_its_later_half(
    springs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that go up and down by one leave their mean behind."""
    options = dataclasses.replace(OPTIONS, rounds=1, epochs=4, batch_size=1, average=True)
    goals = targets({"h2": 0.5, "c2": 0.5})
    training = SolvationTraining(Springs(SpringsConfig()), goals, options, tmp_path, say=lambda line: None)
    moves = iter([100.0, 100.0, -50.0, 70.0, 1.0, -2.0, 1.0, 6.0])

    model = training.model
    assert isinstance(model, Springs)

    def moved(names: Sequence[str], rate: float) -> tuple[list[float], set[str], int]:
        with torch.no_grad():
            model.stiffness.add_(next(moves))
        return [0.0], set(), 0

    monkeypatch.setattr(training, "_step", moved)
    training.run()
    # 12 and 30, moved by 221, 219, 220, 226 over the last two of four epochs
    assert model.stiffness.tolist() == pytest.approx([12 + 221.5, 30 + 221.5])


def test_a_stopped_training_goes_on_to_the_same_end(
    springs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vacuum = Springs(SpringsConfig())
    goals = targets({"h2": 0.8, "c2": 0.4, "ch": 0.6})
    options = dataclasses.replace(OPTIONS, rounds=4)
    whole = SolvationTraining(vacuum, goals, options, tmp_path / "whole", say=lambda line: None)
    whole.run()
    stopped = SolvationTraining(vacuum, goals, options, tmp_path / "parts", say=lambda line: None)
    real = SolvationTraining._train

    def interrupted(self: SolvationTraining, k: int) -> dict[str, float]:
        if k == 2:
            raise KeyboardInterrupt
        return real(self, k)

    monkeypatch.setattr(SolvationTraining, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    monkeypatch.setattr(SolvationTraining, "_train", real)
    again = SolvationTraining(vacuum, goals, options, tmp_path / "parts", resume=True, say=lambda line: None)
    assert len(again.history) == 2
    again.run()
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_broken_molecules_are_left_out(springs: None, tmp_path: Path) -> None:
    vacuum = Springs(SpringsConfig())
    goals = targets({"h2": 0.5, "c2": 0.5})
    broken = dataclasses.replace(goals[1], structure=goals[1].structure.replace(info={"breaks": True}))
    lines: list[str] = []
    training = SolvationTraining(
        vacuum, [goals[0], broken], dataclasses.replace(OPTIONS, rounds=1), tmp_path, say=lines.append
    )
    training.run()
    assert set(training.ensembles) == {"h2"}
    assert "a bond is broken" in training.dropped["c2"] and any("c2" in line for line in lines)


def test_frames_of_something_else_are_not_taken(springs: None, tmp_path: Path) -> None:
    """A folder goes on with its groups whatever the processes, and with nothing else."""
    model = save_potential(Springs(SpringsConfig()), tmp_path / "model.safetensors")
    other = save_potential(Springs(SpringsConfig(carbon=31.0)), tmp_path / "other.safetensors")
    starts: dict[str, Any] = dict.fromkeys(MOLECULES)
    first = ensembles.sample_groups(model, MOLECULES, starts, SAMPLING, tmp_path / "run", seed=1)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.safetensors")}
    again = ensembles.sample_groups(model, MOLECULES, starts, SAMPLING, tmp_path / "run", seed=1, processes=2)
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.safetensors")}
    for name in MOLECULES:
        np.testing.assert_array_equal(first[name].positions, again[name].positions)
    hotter = dataclasses.replace(SAMPLING, temperature=400.0)
    moved = {**starts, "h2": (np.array([[0.0, 0, 0], [1.2, 0, 0]]), np.zeros((2, 3)))}
    fewer = {name: MOLECULES[name] for name in ("h2", "c2")}
    for what, changed in (
        ("model", (other, MOLECULES, starts, SAMPLING)),
        ("settings", (model, MOLECULES, starts, hotter)),
        ("starts", (model, MOLECULES, moved, SAMPLING)),
        ("groups", (model, fewer, starts, SAMPLING)),
    ):
        with pytest.raises(ValueError, match=f"^{what}: .* was begun with"):
            ensembles.sample_groups(*changed, tmp_path / "run", seed=1)
    with pytest.raises(ValueError, match=r"^seed: .* was begun with 1, this run has 2"):
        ensembles.sample_groups(model, MOLECULES, starts, SAMPLING, tmp_path / "run", seed=2)


def test_bonds_are_those_of_the_structure_when_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run goes on, a bond may be stretched beyond what would count as one."""
    seen: list[Structure] = []

    def look(potential: Any, structures: Sequence[Structure], *args: Any, **kwargs: Any) -> list[MoleculeSamples]:
        seen.extend(structures)
        return []

    monkeypatch.setattr(ensembles, "sample", look)
    monkeypatch.setattr(ensembles, "load_potential", lambda path: None)
    h2 = Structure(np.array([1, 1]), np.array([[0.0, 0, 0], [0.74, 0, 0]]))
    stretched = np.array([[0.0, 0, 0], [1.0, 0, 0]])
    task = {"model": "", "structures": [h2], "starts": [(stretched, np.zeros((2, 3)))], "settings": SAMPLING}
    with pytest.raises(ValueError, match="zip"):
        ensembles.simulate_group({**task, "names": ["h2"]}, tmp_path / "group.safetensors")
    assert seen[0].info["topology_bonds"] == [[0, 1]]
    np.testing.assert_array_equal(seen[0].positions, stretched)
    assert not bond_graph(h2.numbers, stretched).any()


def test_ensembles_without_overlap_take_no_part(springs: None, tmp_path: Path) -> None:
    """No silent number is accumulated; the molecule is named with what was found and what was expected."""
    vacuum = Springs(SpringsConfig())
    lines: list[str] = []
    training = SolvationTraining(vacuum, targets({"h2": 0.5, "c2": 0.5}), OPTIONS, tmp_path, say=lines.append)
    training._simulate(["h2", "c2"], -1)
    assert isinstance(training.model, Springs)
    with torch.no_grad():
        training.model.stiffness[1] = 3e6
    training._simulate(["h2", "c2"], 0)
    assert set(training.ensembles) == {"h2"} and training.ensembles["h2"].round == 0
    assert "overlap of at least 0.03 with round -1, got 0.0" in training.dropped["c2"]
    assert any("c2 takes no part" in line for line in lines)


def test_the_overlap_is_that_of_the_overlap_matrix() -> None:
    from openmm_mlff.analysis.free_energy import bar as reference

    random = np.random.default_rng(6)
    for apart, n in ((0.5, 60), (2.0, 200)):
        a, b = random.normal(0.0, 1.0, 100), random.normal(apart, 1.0, n)
        forward, backward = 0.5 * (a - apart) ** 2 - 0.5 * a**2, 0.5 * b**2 - 0.5 * (b - apart) ** 2
        found = reference(forward, backward)
        assert found.overlap is not None
        least = min(found.overlap[0, 1], found.overlap[1, 0])
        assert bar_overlap(torch.as_tensor(forward), torch.as_tensor(backward), found.delta) == pytest.approx(least)


def test_refusals(springs: None, tmp_path: Path) -> None:
    vacuum = Springs(SpringsConfig())
    goals = targets({"h2": 0.5, "c2": 0.5})
    with pytest.raises(ValueError, match="targets: expected a name of its own"):
        SolvationTraining(vacuum, [goals[0], goals[0]], OPTIONS, tmp_path / "a")
    with pytest.raises(ValueError, match="at least one molecule to train with"):
        SolvationTraining(vacuum, targets({"ch": 0.5}), OPTIONS, tmp_path / "b")
    with pytest.raises(ValueError, match="elements"):
        oxygen = Structure(np.array([8, 8]), np.array([[0.0, 0, 0], [1.1, 0, 0]]))
        SolvationTraining(vacuum, [Target("o2", oxygen, 0.0)], OPTIONS, tmp_path / "c")
    SolvationTraining(vacuum, goals, OPTIONS, tmp_path / "d")
    with pytest.raises(FileExistsError, match="holds a training already"):
        SolvationTraining(vacuum, goals, OPTIONS, tmp_path / "d")
    with pytest.raises(ValueError, match="vacuum: expected that of the training"):
        SolvationTraining(Springs(SpringsConfig(carbon=31.0)), goals, OPTIONS, tmp_path / "d", resume=True)
    moved = [
        dataclasses.replace(t, structure=t.structure.replace(positions=1.1 * t.structure.positions)) for t in goals
    ]
    with pytest.raises(ValueError, match="targets: expected that of the training"):
        SolvationTraining(vacuum, moved, OPTIONS, tmp_path / "d", resume=True)
    with pytest.raises(ValueError, match="options: expected that of the training"):
        SolvationTraining(vacuum, goals, dataclasses.replace(OPTIONS, seed=9), tmp_path / "d", resume=True)
    for name, value in (("rounds", 0), ("least_effective", 1.5), ("learning_rate", 0.0), ("fluctuation", -1.0)):
        with pytest.raises(ValueError, match=name):
            SolvationOptions(**{name: value})  # type: ignore[arg-type]


def test_the_variance_of_bennetts_estimate() -> None:
    """Against the scatter of 400 estimates between two Gaussians."""
    from openmm_mlff.training.reweighting import bar

    random = np.random.default_rng(5)
    estimates, variances = [], []
    for _ in range(400):
        a, b = random.normal(0.0, 1.0, 60), random.normal(1.0, 1.0, 60)

        def work(x: np.ndarray) -> Tensor:
            return torch.as_tensor(0.5 * (x - 1.0) ** 2 - 0.5 * x**2)

        estimates.append(float(bar(work(a), -work(b))))
        variances.append(bar_variance(work(a), -work(b), estimates[-1]))
    assert np.mean(variances) == pytest.approx(np.var(estimates), rel=0.25)
