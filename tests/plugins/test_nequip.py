"""NequIP against jax-md's own numbers and a second implementation, through the package and through OpenMM."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openmm
import openmm.unit as unit
import pytest
import torch
from openmmml import MLPotential
from openmmml.models.nequippotential import NequIPPotentialImplFactory

from openmm_mlff.cli import main
from openmm_mlff.data.datasets import split_dataset, write_dataset
from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials.family import load_potential, save_potential
from openmm_mlff.testing.systems import topology_of
from openmm_nequip import NequIP, NequIPConfig
from openmm_nequip.angular import allowed_paths, clebsch_gordan, plans, spherical_harmonics
from openmm_nequip.pretrained import build, config_of, translate

WATER = Structure(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.97, 0, 0], [-0.24, 0.94, 0]]))


def network(arrays: dict[str, np.ndarray], rows: list[int], **settings: Any) -> NequIP:
    """The model of published arrays, with these rows of their element axes."""
    exact = {name: x.astype(np.float64) for name, x in arrays.items()}
    config = config_of(exact, **settings)
    return build(config, translate(exact, config, rows))


@pytest.fixture(scope="session")
def reference(shared: Path) -> dict[str, NequIP]:
    """The networks that jax-md computed the stored energies and forces with; their weights are random."""
    models = {}
    for kind in ("small", "full"):
        with np.load(shared / "data" / "resolv" / f"nequip_{kind}_params.npz") as file:
            models[kind] = network(dict(file), list(range(6)))
    return models


def stored(shared: Path, kind: str) -> list[tuple[list[Structure], np.ndarray, np.ndarray]]:
    """Three structures of every molecule, their energies, and forces ``(3, n_atoms, 3)``."""
    with np.load(shared / "data" / "resolv" / f"nequip_{kind}_visible.npz") as file:
        keys = sorted({name.split("_")[0] for name in file.files})
        return [
            ([Structure(file[f"{k}_Z"], p) for p in file[f"{k}_pos"]], file[f"{k}_energy"], file[f"{k}_force"])
            for k in keys
        ]


@pytest.mark.parametrize("kind", ["small", "full"])
def test_energies_and_forces_are_those_of_jax_md(kind: str, shared: Path, reference: dict[str, NequIP]) -> None:
    model = reference[kind]
    molecules = stored(shared, kind)
    assert len(molecules) == {"small": 15, "full": 4}[kind]
    for structures, energies, forces in molecules:
        result = model.evaluate(model.batch(structures))
        assert result.forces is not None
        np.testing.assert_allclose(result.energy.numpy(), energies, rtol=0, atol=1e-10)
        np.testing.assert_allclose(result.forces.numpy().reshape(forces.shape), forces, rtol=0, atol=1e-10)


def test_single_precision(shared: Path, reference: dict[str, NequIP]) -> None:
    model = NequIP(reference["full"].config)
    model.load_state_dict(reference["full"].state_dict())
    for structures, energies, forces in stored(shared, "full"):
        result = model.evaluate(model.batch(structures))
        assert result.forces is not None and result.forces.dtype == torch.float32
        np.testing.assert_allclose(result.energy.numpy(), energies, rtol=1e-5)
        worst = np.abs(result.forces.numpy().reshape(forces.shape) - forces).max()
        assert worst < 1e-5 * np.abs(forces).max()


def test_double_precision_comes_back_from_single(shared: Path, reference: dict[str, NequIP]) -> None:
    """Coefficients are not rounded when a model goes through float32; jax-md's weights are float32 numbers."""
    model = NequIP(reference["small"].config)
    model.load_state_dict(reference["small"].state_dict())
    model = model.float().double()
    # the only weights that float32 cannot hold
    model.load_state_dict({"atomic_shift": torch.zeros(6)}, strict=False)
    structures, energies, _ = stored(shared, "small")[0]
    np.testing.assert_allclose(model.evaluate(model.batch(structures)).energy.numpy(), energies, rtol=0, atol=1e-10)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_openmm_gives_the_stored_energies_and_forces(
    compile: bool, shared: Path, reference: dict[str, NequIP], tmp_path: Path
) -> None:
    path = save_potential(reference["small"], tmp_path / "small.safetensors")
    structures, energies, forces = stored(shared, "small")[3]
    potential = MLPotential("nequip-jaxmd", modelPath=str(path))
    system = potential.createSystem(topology_of(structures[0]), compile=compile)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    for structure, energy, force in zip(structures, energies, forces, strict=True):
        context.setPositions(structure.positions * unit.angstrom)
        state = context.getState(energy=True, forces=True)
        ev = unit.elementary_charge * unit.volt * unit.AVOGADRO_CONSTANT_NA
        assert state.getPotentialEnergy() / ev == pytest.approx(energy, rel=0, abs=1e-9)
        ours = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.angstrom)
        np.testing.assert_allclose(ours / (1.0 * ev).value_in_unit(unit.kilojoule_per_mole), force, rtol=0, atol=1e-9)


def test_the_name_leaves_that_of_openmm_ml_alone() -> None:
    assert isinstance(MLPotential._implFactories["nequip"], NequIPPotentialImplFactory)


# -- a second implementation -----------------------------------------------------------------------------------------


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # how the arrays are made, what they do not show of the configuration, the same for the second implementation
    "as published": ({"features": 6, "layers": 3}, {}, {}),
    "one layer": ({"features": 4, "layers": 1, "radial": (5,)}, {}, {}),
    "deep, another order, no pseudoscalars": (
        {"features": 2, "layers": 5, "irreps": ("2e", "0e", "1o", "1e", "2o"), "basis": 4, "radial": ()},
        {"irreps": ("2e", "0e", "1o", "1e", "2o")},
        {"irreps": ("2e", "0e", "1o", "1e", "2o")},
    ),
    "vectors only": (
        {"features": 4, "irreps": ("0e", "0o", "1o"), "max_degree": 1, "length": 20},
        {
            "irreps": ("0e", "0o", "1o"),
            "max_degree": 1,
            "cutoff": 5.0,
            "cutoff_onset": 2.0,
            "num_neighbors": 7.0,
            "one_hot_length": 20,
        },
        {
            "irreps": ("0e", "0o", "1o"),
            "max_degree": 1,
            "cutoff": 5.0,
            "onset": 2.0,
            "neighbors": 7.0,
            "length": 20.0,
        },
    ),
    "distances alone": (
        {"features": 4, "irreps": ("0e",), "max_degree": 0},
        {"irreps": ("0e",), "max_degree": 0},
        {"irreps": ("0e",), "max_degree": 0},
    ),
}


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("periodic", [False, True], ids=["open", "in a box"])
def test_a_second_implementation_agrees(name: str, periodic: bool, nequip_plain: ModuleType) -> None:
    make, settings, theirs = VARIANTS[name]
    rng = np.random.default_rng(list(VARIANTS).index(name))
    arrays = nequip_plain.random_arrays(rng.integers(1000), **make)
    elements = (7, 1, 17, 6) if periodic else (1, 6, 7, 8, 16, 17)
    model = network(arrays, list(elements), elements=elements, **settings)
    cell = np.array([[3.9, 0, 0], [0.7, 4.2, 0], [-0.5, 0.3, 4.4]]) if periodic else None
    n = 3 if periodic else 6
    structure = Structure(rng.choice(elements, n), spread(rng, n, cell), cell=cell)
    plain = nequip_plain.PlainNequIP(arrays, {z: z for z in range(20)}, **theirs)
    expected = plain.energy(structure.numbers, structure.positions, cell)
    energy, forces = model.energy_and_forces(structure)
    assert energy == pytest.approx(expected, rel=1e-11, abs=1e-12)
    # one component of the force, by differences of the second implementation
    moved = [structure.positions + h * np.eye(3 * n)[4].reshape(n, 3) for h in (-1e-5, 1e-5)]
    low, high = (plain.energy(structure.numbers, p, cell) for p in moved)
    assert forces[1, 1] == pytest.approx((low - high) / 2e-5, rel=1e-5, abs=1e-8)


def spread(rng: np.random.Generator, n: int, cell: np.ndarray | None) -> np.ndarray:
    """Random positions, none of them close to another or its images."""
    while True:
        positions = rng.uniform(size=(n, 3)) @ (np.eye(3) * 4.0 if cell is None else cell)
        images = [np.zeros(3)] if cell is None else [np.array(s) @ cell for s in np.ndindex(3, 3, 3)]
        shifts = images if cell is None else [x - cell.sum(0) for x in images]
        gaps = [positions[i] - positions[j] - s for i in range(n) for j in range(i + 1, n) for s in shifts]
        if min(np.linalg.norm(gaps, axis=1)) > 0.9:
            return positions


def test_coefficients_are_those_that_rotations_leave_unchanged(nequip_plain: ModuleType) -> None:
    for a, b, c in nequip_plain.SIGNS:
        np.testing.assert_allclose(clebsch_gordan(a, b, c), nequip_plain.coupling(a, b, c), atol=1e-13)


def test_harmonics_are_scipys(nequip_plain: ModuleType) -> None:
    for u in np.random.default_rng(0).normal(size=(20, 3)):
        u /= np.linalg.norm(u)
        for degree, y in enumerate(spherical_harmonics(torch.from_numpy(u), 2)):
            np.testing.assert_allclose(y.numpy(), nequip_plain.harmonics(u, degree), atol=1e-14)


# -- what is computed --------------------------------------------------------------------------------------------------


def test_only_what_the_energy_depends_on_is_kept() -> None:
    config = NequIPConfig()
    assert len(allowed_paths(config)) == 30
    kept = plans(config)
    assert [len(p.paths) for p in kept] == [3, 15, 25, 15, 3]
    assert [p.outputs for p in kept][3:] == [("0e", "1o", "2e"), ("0e",)]
    # and all of it has a gradient
    torch.manual_seed(0)
    model = NequIP(NequIPConfig(num_features=4, radial_features=8)).double()
    rng = np.random.default_rng(0)
    model.forward(model.batch(Structure(np.array([1, 6, 7, 8, 16, 17]), spread(rng, 6, None)))).energy.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum(-1).min() > 0), name


def test_scale_and_shifts() -> None:
    torch.manual_seed(0)
    plain = NequIP(NequIPConfig(num_features=4, num_layers=2, radial_features=8)).double()
    model = NequIP(NequIPConfig(num_features=4, num_layers=2, radial_features=8, energy_scale=2.5, energy_shift=-8e3))
    model.double().load_state_dict(plain.state_dict())
    model.shift_atomic_energies({1: 0.25, 8: -3.0})
    (energy, forces), (raw, pull) = model.energy_and_forces(WATER), plain.energy_and_forces(WATER)
    assert energy == pytest.approx(2.5 * raw - 8e3 + 2 * 0.25 - 3.0, rel=0, abs=1e-10)
    np.testing.assert_allclose(forces, 2.5 * pull, rtol=1e-12)
    # the shift is exact in single precision too
    single = model.float().energy_and_forces(WATER)[0]
    assert single == pytest.approx(energy, rel=0, abs=1e-4 * abs(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": np.array([9, 1, 1])}, "elements: expected atoms among H C N O S Cl"),
        ({"charge": 1}, "charge: nequip-jaxmd describes neutral systems only, got \\+1"),
        ({"multiplicity": 3}, "multiplicity: nequip-jaxmd describes singlets only, got 3"),
    ],
)
def test_refuses_what_it_cannot_describe(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NequIP(NequIPConfig(num_features=2, num_layers=1)).energy_and_forces(WATER.replace(**change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"irreps": ("0o", "1o")}, "irreps: expected '0e'"),
        ({"irreps": ("0e", "3o")}, "irreps"),
        ({"max_degree": 3}, "max_degree: expected 0 to 2, got 3"),
        ({"num_features": 5}, "num_features: expected an even number, got 5"),
        ({"num_layers": 0}, "num_layers: expected a whole number >= 1, got 0"),
        ({"cutoff_onset": 4.0}, "cutoff_onset"),
        ({"elements": (1, 1)}, "elements"),
        ({"energy_shift": float("nan")}, "energy_shift"),
        ({"num_neighbors": -1.0}, "num_neighbors: expected a positive number, got -1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NequIPConfig(**options)


# -- training ----------------------------------------------------------------------------------------------------------


def bent_molecules(n: int) -> list[Structure]:
    """Three atoms on springs, with exact energies (eV) and forces."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        positions = WATER.positions + rng.normal(0.0, 0.08, (3, 3))
        energy, forces = -2000.0, np.zeros((3, 3))
        for a, b, stiffness, length in ((0, 1, 30.0, 0.97), (0, 2, 30.0, 0.97), (1, 2, 8.0, 1.53)):
            bond = positions[b] - positions[a]
            r = float(np.linalg.norm(bond))
            energy += 0.5 * stiffness * (r - length) ** 2
            forces[a] += stiffness * (r - length) * bond / r
            forces[b] -= stiffness * (r - length) * bond / r
        found.append(Structure(WATER.numbers, positions, energy=energy, forces=forces, group=f"g{i // 8}"))
    return found


def test_the_trainer_fits_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", bent_molecules(96), name="springs", method={"method": "exact"}, sampling={})
    split_dataset(tmp_path / "data", {"train": 0.75, "valid": 0.125, "test": 0.125}, seed=1)
    recipe = {
        "family": "nequip-jaxmd",
        "seed": 4,
        "batch_size": 8,
        "model": {"num_features": 8, "num_layers": 2, "radial_features": 16, "num_neighbors": 2.0, "elements": [1, 8]},
        "loop": {"steps": 60, "validate_every": 30, "warmup_steps": 5, "learning_rate": 1e-2, "ema_decay": 0.9},
        "loss": {"energy": 1.0, "forces": 1.0},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    arguments = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--quiet"]
    assert main(["train", *arguments, "--config", str(tmp_path / "recipe.json")]) == 0
    with (tmp_path / "run" / "history.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]
    for name in ("train_energy", "train_forces"):
        assert float(rows[-1][name]) < 0.3 * float(rows[0][name]), name
    trained = load_potential(tmp_path / "run" / "model.safetensors")
    test = [s for s in bent_molecules(96) if s.group == "g0"]
    result = trained.evaluate(trained.batch(test))
    labels = np.concatenate([s.forces for s in test if s.forces is not None])
    assert result.forces is not None
    assert np.abs(result.forces.numpy() - labels).mean() < 0.3 * np.abs(labels).mean()
    assert np.abs(result.energy.numpy() + 2000.0).max() < 1.5
