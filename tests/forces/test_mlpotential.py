"""``MLPotential`` and ``createSystem``: every wrong input has its own error."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.data import model_file
from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import running
from openmm_mlff.forces.mlpotential import MLFFPotentialImpl
from openmm_mlff.units import KJ_PER_MOL_PER_EV
from openmm_spookynet import SpookyNet

from .conftest import context_of, energy_of, small_spookynet, topology_of

WATER = np.array([8, 1, 1])
WATER_POSITIONS = np.array([[0.0, 0.0, 0.0], [0.0757, 0.0586, 0.0], [-0.0757, 0.0586, 0.0]])


@pytest.fixture(scope="module")
def potential(model: SpookyNet) -> MLPotential:
    return MLPotential("spookynet", model=model)


def spec_of(system: openmm.System) -> Any:
    return running.computations(system)[0].spec


# -- MLPotential(...) ---------------------------------------------------------------------------------------------


def test_file_and_model_in_memory_are_the_same(model: SpookyNet, model_path: Path) -> None:
    energies = [
        energy_of(context_of(MLPotential("spookynet", **given).createSystem(topology_of(WATER)), WATER_POSITIONS))
        for given in ({"modelPath": model_path}, {"modelPath": str(model_path)}, {"model": model})
    ]
    assert len(set(energies)) == 1


def test_long_range_cutoff_of_a_model_in_memory_is_kept() -> None:
    model = small_spookynet()
    model.long_range_cutoff = 8.0
    system = MLPotential("spookynet", model=model).createSystem(topology_of(WATER))
    assert spec_of(system).long_range_cutoff == 8.0


def test_family_without_model() -> None:
    with pytest.raises(
        ValueError, match="modelPath: 'spookynet' needs a model file, got None; ready-made models: 'spooky"
    ):
        MLPotential("spookynet")


def test_name_that_does_not_exist() -> None:
    with pytest.raises((ValueError, KeyError), match=r"'spokynet'.*did you mean 'spookynet'"):
        MLPotential("spokynet")


def test_published_model_that_was_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="spookynet-published: not in the cache"):
        MLPotential("spookynet-published")


def test_particular_model_takes_no_file(model_path: Path) -> None:
    with pytest.raises(ValueError, match="modelPath: 'spookynet-published' is one particular model"):
        MLPotential("spookynet-published", modelPath=model_path)


def test_wrong_kind_of_model(model_path: Path, model: SpookyNet) -> None:
    with pytest.raises(TypeError, match="model: expected a 'spookynet' potential, got Linear"):
        MLPotential("spookynet", model=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="modelPath: expected the path of a model file, got int"):
        MLPotential("spookynet", modelPath=3)
    with pytest.raises(ValueError, match="expected either model or modelPath, got both"):
        MLPotential("spookynet", modelPath=model_path, model=model)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("modelpath", r"modelpath: .*did you mean MLPotential\(modelPath=...\)"),
        ("checkpoint", r"did you mean MLPotential\(modelPath=...\)"),
        ("charge", "charge: .*pass it to createSystem or createMixedSystem"),
        ("spin", "spin: .*did you mean 'multiplicity'"),
        ("flavour", "known keywords: modelPath, model, sha256"),
    ],
)
def test_wrong_keyword_of_the_constructor(model_path: Path, keyword: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MLPotential("spookynet", **{"modelPath": model_path, keyword: 1})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"modelPath: no file at .*nowhere.safetensors"):
        MLPotential("spookynet", modelPath=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_truncated_file(model_path: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(model_path.read_bytes()[:keep])
    before = set(model_file.cache_dir().iterdir())
    with pytest.raises(ValueError, match=r"modelPath: cut.safetensors is damaged or not a model file"):
        MLPotential("spookynet", modelPath=path)
    assert set(model_file.cache_dir().iterdir()) == before


@pytest.mark.parametrize("ending", ["safetensors", "pth", "txt"])
def test_foreign_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"notes.{ending}"
    path.write_text("not a model", encoding="utf-8")
    with pytest.raises(ValueError, match=r"modelPath: notes\.\w+ is (damaged|not a|neither)"):
        MLPotential("spookynet", modelPath=path)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_malicious_file(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    data = pickle.dumps(Payload(marker), protocol=2)
    pickle.loads(data)
    assert marker.exists()
    marker.unlink()
    (tmp_path / "plain.pth").write_bytes(data)
    torch.save({"state_dict": {"x": Payload(marker)}}, tmp_path / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(ValueError, match="is not a readable SpookyNet checkpoint"):
            MLPotential("spookynet", modelPath=tmp_path / name)
    assert not marker.exists()


def test_wrong_sha256(model_path: Path) -> None:
    MLPotential("spookynet", modelPath=model_path, sha256=model_file.sha256_of(model_path))
    with pytest.raises(ValueError, match=r"sha256: small.safetensors should have 00000"):
        MLPotential("spookynet", modelPath=model_path, sha256="0" * 64)


# -- createSystem(...) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("spin", r"spin: not a keyword of createSystem; did you mean 'multiplicity' \(2S\+1"),
        ("total_spin", "did you mean 'multiplicity'"),
        ("multiplicty", "multiplicty: .*did you mean 'multiplicity'"),
        ("Charge", "did you mean 'charge'"),
        ("total_charge", "did you mean 'charge'"),
        ("precison", "did you mean 'precision'"),
        ("long_range_cutoff", "did you mean 'longRangeCutoff'"),
        ("cutoff", "did you mean 'longRangeCutoff'"),
        ("modelPath", r"modelPath: .*pass it to MLPotential\(modelPath=...\)"),
        ("mlLongRange", "known keywords: charge, multiplicity"),
        ("temperature", "known keywords: charge, multiplicity"),
    ],
)
def test_unknown_keyword(potential: MLPotential, keyword: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        potential.createSystem(topology_of(WATER), **{keyword: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiplicity": 2}, r"multiplicity: H2O with charge \+0 has 10 electrons"),
        ({"charge": 1}, r"multiplicity: H2O with charge \+1 has 9 electrons, so 2S\+1 must be one of 2, 4, 6"),
        ({"charge": 11}, "charge: expected at most 10 for H2O, got"),
        ({"charge": 0.5}, "charge: expected a whole number, got 0.5"),
        ({"charge": "+1"}, "charge: expected a whole number, got '[+]1'"),
        ({"charge": None}, "charge: expected a whole number, got None"),
        ({"multiplicity": True}, "multiplicity: expected a whole number, got True"),
        ({"charge": float("nan")}, "charge: expected a whole number, got nan"),
        ({"multiplicity": 0}, r"multiplicity: expected 2S\+1 as a whole number >= 1, got 0"),
        ({"multiplicity": 13}, "at most 11"),
        ({"precision": "half"}, "precision: expected 'single', 'double' or None, got 'half'"),
        ({"device": "gpu"}, "device: expected one of cpu.*got 'gpu'"),
        ({"device": "cuda:99"}, "device: expected one of cpu.*got 'cuda:99'"),
        ({"compile": "yes"}, "compile: expected 'auto', True or False, got 'yes'"),
        ({"threads": 0}, "threads: expected a whole number >= 1 or None, got 0"),
        ({"threads": "two"}, "threads: expected a whole number >= 1 or None, got 'two'"),
        ({"maxForce": -1.0}, "maxForce: expected a positive force"),
        ({"longRangeCutoff": 0.0}, "longRangeCutoff: expected a positive length"),
        ({"longRangeCutoff": "1 nm"}, "longRangeCutoff: expected a positive length .*, got 1 nm"),
        ({"longRangeCutoff": True}, "longRangeCutoff: expected a positive length .*, got True"),
        ({"longRangeCutoff": 1.0 * unit.kilojoule_per_mole}, "longRangeCutoff: expected a positive length .*kJ/mol"),
        ({"longRangeCutoff": float("nan")}, "longRangeCutoff: expected a positive length"),
    ],
)
def test_impossible_value(potential: MLPotential, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        potential.createSystem(topology_of(WATER), **options)


def test_unknown_element() -> None:
    potential = MLPotential("spookynet", model=small_spookynet(elements=(1, 6)))
    with pytest.raises(ValueError, match=r"elements: expected atoms among H C .*got O"):
        potential.createSystem(topology_of(WATER))
    with pytest.raises(ValueError, match="got O"):
        potential.createMixedSystem(topology_of(np.array([1, 1, 8])), bare(3), [0, 2], charge=-1)


def test_atom_without_element(potential: MLPotential) -> None:
    topology = topology_of(WATER)
    topology.addAtom("EP", None, next(topology.residues()))
    with pytest.raises(ValueError, match="elements: expected an element for every ML atom, got none for atom 3"):
        potential.createSystem(topology)


def test_no_atoms(potential: MLPotential) -> None:
    with pytest.raises(ValueError, match="atoms: expected at least one atom, got none"):
        potential.createSystem(app.Topology())
    with pytest.raises(ValueError, match="atoms: expected at least one atom, got none"):
        potential.createMixedSystem(topology_of(WATER), bare(3), [])


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        ([0, 1, 3], "atoms: expected indices from 0 to 2, got 3"),
        ([-1, 1, 2], "atoms: expected indices from 0 to 2, got -1"),
        ([0, 1, 1], "atoms: expected every index once, got 1 more than once"),
        ([0, 1.5], "atoms: expected whole numbers, got 1.5"),
    ],
)
def test_impossible_atoms(potential: MLPotential, atoms: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        potential.createMixedSystem(topology_of(WATER), bare(3), atoms)


def bare(n: int) -> openmm.System:
    """A system without forces."""
    system = openmm.System()
    for _ in range(n):
        system.addParticle(1.0)
    return system


def test_mixed_systems_warn_of_what_may_be_the_embeddings(potential: MLPotential) -> None:
    with pytest.warns(UserWarning, match="bondLengths: not a keyword of the ML potential"):
        potential.createMixedSystem(topology_of(WATER), bare(3), [0, 1, 2], bondLengths=3)
    with pytest.raises(TypeError, match=r"multiplicty: .*did you mean 'multiplicity'"):
        potential.createMixedSystem(topology_of(WATER), bare(3), [0, 1, 2], multiplicty=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        potential.createMixedSystem(topology_of(WATER), bare(3), [0, 1, 2], linkAtomDistances=[])


def test_options_arrive(potential: MLPotential) -> None:
    system = potential.createSystem(
        topology_of(WATER),
        charge=-1,
        multiplicity=2,
        precision="single",
        device="cpu",
        longRangeCutoff=12 * unit.angstrom,
        compile=False,
        maxForce=2 * unit.kilocalorie_per_mole / unit.angstrom,
        threads=1,
    )
    spec = spec_of(system)
    assert (spec.charge, spec.multiplicity, spec.precision, spec.device) == (-1, 2, "single", "cpu")
    assert spec.long_range_cutoff == pytest.approx(12.0)
    assert spec.max_force == pytest.approx(2 * 4.184 * 10)
    assert (spec.compile, spec.threads, spec.region) == (False, 1, "open")


def test_embeddings_and_range() -> None:
    potential = MLPotential("spookynet", model=small_spookynet())
    assert isinstance(potential._impl, MLFFPotentialImpl)
    assert potential._impl.getMLLongRange() is False
    assert potential.getSupportedEmbeddings() == ["electrostatic", "mechanical"]


def test_force_group(potential: MLPotential) -> None:
    system = potential.createMixedSystem(topology_of(WATER), bare(3), [0, 1, 2], forceGroup=7)
    assert [f.getForceGroup() for f in system.getForces()] == [7]


def test_one_atom(model: SpookyNet, potential: MLPotential) -> None:
    system = potential.createSystem(topology_of(np.array([1])), multiplicity=2, removeCMMotion=False)
    energy, _ = model.energy_and_forces(Structure(np.array([1]), np.zeros((1, 3)), multiplicity=2))
    assert energy_of(context_of(system, np.zeros((1, 3)))) == pytest.approx(energy * KJ_PER_MOL_PER_EV, rel=1e-12)


def test_periodic_system_needs_a_long_range_cutoff(model: SpookyNet, potential: MLPotential) -> None:
    box = np.array([[1.3, 0, 0], [0.3, 1.2, 0], [-0.2, 0.4, 1.1]])
    topology = topology_of(WATER, box)
    with pytest.raises(ValueError, match=r"longRangeCutoff: a periodic system needs one.*longRangeCutoff=1.0 \(nm\)"):
        potential.createSystem(topology)
    system = potential.createSystem(topology, longRangeCutoff=0.9)
    periodic = small_spookynet()
    periodic.long_range_cutoff = 9.0
    expected, _ = periodic.energy_and_forces(Structure(WATER, WATER_POSITIONS * 10, cell=box * 10))
    assert energy_of(context_of(system, WATER_POSITIONS)) == pytest.approx(expected * KJ_PER_MOL_PER_EV, rel=1e-10)
    # every image of every atom is the same
    moved = WATER_POSITIONS + np.array([[1, 0, -1], [0, 2, 0], [-1, -1, 3]]) @ box
    assert energy_of(context_of(system, moved)) == pytest.approx(expected * KJ_PER_MOL_PER_EV, rel=1e-10)
