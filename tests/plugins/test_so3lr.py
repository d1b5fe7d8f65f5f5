"""SO3LR against the published program's numbers (JAX, float64 and float32), and against other programs'."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlff.data.structures import SYMBOLS, Structure
from openmm_mlff.potentials.potential import Evaluation
from openmm_mlff.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV
from openmm_so3krates import SO3krates, pretrained

SHARED = "data/so3lr/visible"
#: of `intermediates_visible`: name there -> submodule here
MODULES = {
    "attention_block/radial_filter1_layer_1": "attention.filter_features.radial.first",
    "attention_block/radial_filter1_layer_2": "attention.filter_features.radial.second",
    "attention_block/radial_filter2_layer_1": "attention.filter_euclidean.radial.first",
    "attention_block/radial_filter2_layer_2": "attention.filter_euclidean.radial.second",
    "attention_block/spherical_filter1_layer_2": "attention.filter_features.spherical.second",
    "attention_block/spherical_filter2_layer_2": "attention.filter_euclidean.spherical.second",
    "layer_normalization_1": "norm_1",
    "res_mlp_1_layer_1": "mlp_1.first",
    "res_mlp_1_layer_2": "mlp_1.second",
    "exchange_block/mlp_layer_2": "exchange.linear",
    "layer_normalization_2": "norm_2",
}
TERMS = {"network": "e_nn", "repulsion": "e_zbl", "electrostatics": "e_elec", "dispersion": "e_disp"}


@pytest.fixture(scope="module")
def parameters(so3lr_parameters: Path) -> Path:
    return so3lr_parameters


@pytest.fixture(scope="module")
def models(parameters: Path) -> dict[torch.dtype, SO3krates]:
    """SO3LR in both precisions, with its spin branch open to tests."""
    found = {dtype: pretrained.read(parameters).to(dtype) for dtype in (torch.float64, torch.float32)}
    for model in found.values():
        model.multiplicities = None
    return found


class Reference:
    """One structure of the shared data and what the published program says of it."""

    def __init__(self, about: dict[str, Any], values: dict[str, np.ndarray]) -> None:
        self.about, self.values = about, values
        self.name: str = about["name"]
        self.long_range_cutoff: float | None = about["lr_cutoff"]
        self.structure = Structure(
            values["numbers"],
            values["positions"],
            int(about["charge"]),
            int(about["num_unpaired_electrons"]) + 1,
            values["cell"] if about["pbc"] else None,
        )

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]


@cache
def _references(folder: Path) -> dict[str, Reference]:
    about = json.loads((folder / "visible.json").read_text(encoding="utf-8"))["structures"]
    with np.load(folder / "visible.npz", allow_pickle=False) as arrays:
        values: dict[str, dict[str, np.ndarray]] = {}
        for key in arrays.files:
            name, _, quantity = key.partition("/")
            values.setdefault(name, {})[quantity] = arrays[key]
    return {a["name"]: Reference(a, values[a["name"]]) for a in about}


@pytest.fixture(scope="module")
def references(shared: Path) -> dict[str, Reference]:
    return _references(shared / "data" / "so3lr")


def evaluate(model: SO3krates, r: Reference, how: str) -> Evaluation:
    """By the batch that training uses, or by the evaluator that MD uses."""
    model.long_range_cutoff = r.long_range_cutoff
    try:
        s = r.structure
        if how == "forward":
            return model.evaluate(model.batch(s))
        return model.evaluator(s, ("energy", "forces", "charges", "dipole"))(s.positions, s.cell)
    finally:
        model.long_range_cutoff = None


def hirshfeld_ratios(model: SO3krates, structure: Structure) -> np.ndarray:
    with torch.no_grad():
        batch = model.batch(structure)
        fixed = model.fixed(batch)
        x, _ = model.features(fixed, model.geometry(batch))
        ratios = model.hirshfeld_ratios(x, fixed)
    assert ratios is not None
    return ratios.numpy()


def each(references: dict[str, Reference]) -> list[Reference]:
    assert len(references) == 35
    return list(references.values())


# -- through the Potential ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["forward", "evaluator"])
def test_double_precision(how: str, models: dict[torch.dtype, SO3krates], references: dict[str, Reference]) -> None:
    """All 35 structures, spin branch included."""
    for r in each(references):
        if how == "evaluator" and r.about["n_atoms"] > 25:
            continue
        result = evaluate(models[torch.float64], r, how)
        assert float(result.energy) == pytest.approx(float(r["energy"]), abs=1e-8), r.name
        np.testing.assert_allclose(result.forces, r["forces"], rtol=0, atol=1e-8, err_msg=r.name)
        np.testing.assert_allclose(result.charges, r["partial_charges"], rtol=0, atol=1e-9, err_msg=r.name)
        assert result.dipole is not None
        np.testing.assert_allclose(result.dipole[0], r["dipole"], rtol=0, atol=1e-8, err_msg=r.name)
        if how == "forward":
            for ours, theirs in TERMS.items():
                assert float(result.terms[ours]) == pytest.approx(r.about[theirs], abs=1e-8), (r.name, ours)


def test_hirshfeld_ratios(models: dict[torch.dtype, SO3krates], references: dict[str, Reference]) -> None:
    for r in each(references):
        if r.about["n_atoms"] <= 60:
            ratios = hirshfeld_ratios(models[torch.float64], r.structure)
            np.testing.assert_allclose(ratios, r["hirshfeld_ratios"], rtol=0, atol=1e-9, err_msg=r.name)


def test_single_precision(models: dict[torch.dtype, SO3krates], references: dict[str, Reference]) -> None:
    """Against float64, also for positions 500 angstrom away (`atat_r04_lr10`), which are centred before rounding."""
    for r in each(references):
        result = evaluate(models[torch.float32], r, "evaluator")
        assert result.forces is not None and result.forces.dtype == torch.float32
        assert float(result.energy) == pytest.approx(float(r["energy"]), abs=5e-4), r.name
        np.testing.assert_allclose(result.forces, r["forces"], rtol=0, atol=1e-4, err_msg=r.name)


def test_every_inner_quantity(
    models: dict[torch.dtype, SO3krates], references: dict[str, Reference], shared: Path
) -> None:
    """Radial functions, harmonics, embeddings, every submodule of every layer, heads."""
    model = models[torch.float64]
    with np.load(shared / "data" / "so3lr" / "intermediates_visible.npz", allow_pickle=False) as arrays:
        stored = {key: arrays[key] for key in arrays.files}
    for name in ("water_r05", "acetate_m1", "alanine_dipeptide"):
        inside = {k.removeprefix(f"{name}/"): v for k, v in stored.items() if k.startswith(f"{name}/")}
        compare_inner_quantities(model, references[name].structure, inside)


def compare_inner_quantities(model: SO3krates, structure: Structure, stored: dict[str, np.ndarray]) -> None:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            batch = model.batch(structure)
            fixed = model.fixed(batch)
            g = model.geometry(batch)
            x, _ = model.features(fixed, g)
            energies = model.atomic_energies(x, fixed)
            charges = model.atomic_charges(x, batch, fixed)
            ratios = model.hirshfeld_ratios(x, fixed)
    finally:
        for hook in hooks:
            hook.remove()
    table = batch.neighbors
    slot = {(int(i), int(table.index[i, s])): (i, s) for i, s in table.mask.nonzero().tolist()}
    places = [slot[int(i), int(j)] for i, j in zip(stored["edge_i"], stored["edge_j"], strict=True)]
    rows, columns = (torch.tensor(p) for p in zip(*places, strict=True))

    def same(ours: torch.Tensor | None, theirs: str, atol: float = 1e-10) -> None:
        assert ours is not None
        values = ours.expand(*g.r.shape, -1)[rows, columns] if ours.dim() == 3 else ours
        np.testing.assert_allclose(values, stored[theirs], rtol=0, atol=atol, err_msg=theirs)

    geometry = "geometry_embeddings_0/__call__"
    same(g.r[rows, columns], f"{geometry}/d_ij")
    same(g.cutoff[rows, columns], f"{geometry}/cut")
    same(g.basis, f"{geometry}/rbf_ij")
    same(g.harmonics, f"{geometry}/ylm_ij")
    same(seen["charge_embedding"], "feature_embeddings_1/__call__")
    same(seen["spin_embedding"], "feature_embeddings_2/__call__")
    for t in range(3):
        for theirs, ours in MODULES.items():
            same(seen[f"layers.{t}.{ours}"], f"layers_{t}/{theirs}/__call__")
        layer_x, layer_ev = seen[f"layers.{t}"]
        same(layer_x, f"layers_{t}/__call__/x")
        same(layer_ev, f"layers_{t}/__call__/ev")
    same(seen["energy_hidden"], "observables_0/energy_dense_regression/__call__")
    same(ratios, "observables_2/__call__/hirshfeld_ratios")
    same(charges, "observables_0/__call__/partial_charges")
    pair_terms = sum(stored[f"__call__/{t}"] for t in ("electrostatic_energy", "dispersion_energy", "zbl_repulsion"))
    np.testing.assert_allclose(energies, stored["__call__/energy"] - pair_terms, rtol=0, atol=1e-10)


def test_many_molecules_in_one_batch(models: dict[torch.dtype, SO3krates], references: dict[str, Reference]) -> None:
    """Sizes from 1 to 23 atoms, charges and multiplicities mixed."""
    chosen = [r for r in each(references) if r.long_range_cutoff == 1000.0 and r.about["n_atoms"] < 30]
    assert len({r.structure.charge for r in chosen}) >= 4 and len({r.structure.multiplicity for r in chosen}) >= 3
    model = models[torch.float64]
    model.long_range_cutoff = 1000.0
    try:
        result = model.evaluate(model.batch([r.structure for r in chosen]))
    finally:
        model.long_range_cutoff = None
    np.testing.assert_allclose(result.energy, [float(r["energy"]) for r in chosen], rtol=0, atol=1e-8)
    np.testing.assert_allclose(result.forces, np.concatenate([r["forces"] for r in chosen]), rtol=0, atol=1e-8)


def test_second_derivatives(models: dict[torch.dtype, SO3krates], references: dict[str, Reference]) -> None:
    """Hessian times a vector against differences of forces."""
    model, s = models[torch.float64], references["methanol"].structure
    v = np.random.default_rng(0).normal(size=s.positions.shape)
    forces = [model.energy_and_forces(s.replace(positions=s.positions + h * v))[1] for h in (-1e-4, 1e-4)]
    expected = (forces[0] - forces[1]) / 2e-4
    scale = np.abs(expected).max()
    np.testing.assert_allclose(model.hessian_products(s, v[None])[0], expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize(
    ("names", "periodic"),
    [(("chloromethane", "dimethylphosphate_m1"), False), (("methanethiol", "fluoroform"), True)],
)
def test_structures_that_nobody_stored(
    names: tuple[str, str],
    periodic: bool,
    models: dict[torch.dtype, SO3krates],
    references: dict[str, Reference],
    so3krates_plain: ModuleType,
) -> None:
    """Two molecules side by side, their atoms displaced at random, against the second implementation."""
    parts = [references[n].structure for n in names]
    rng = np.random.default_rng(7)
    positions = np.concatenate([s.positions - s.positions.mean(0) + [4.5 * k, 0, 0] for k, s in enumerate(parts)])
    numbers = np.concatenate([s.numbers for s in parts])
    cell = np.array([[9.5, 0, 0], [0.8, 7.5, 0], [-0.5, 1.0, 8.0]]) if periodic else None
    s = Structure(numbers, positions + rng.normal(0, 0.05, positions.shape), sum(p.charge for p in parts), 1, cell)
    model = models[torch.float64]
    model.long_range_cutoff = 6.0 if periodic else None
    try:
        result = model.evaluate(model.batch(s))
        expected = so3krates_plain.PlainSO3krates(model).evaluate(s.numbers, s.positions, s.charge, 0, cell)
        assert float(result.energy) == pytest.approx(expected["energy"], abs=1e-8)
        np.testing.assert_allclose(result.charges, expected["charges"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(hirshfeld_ratios(model, s), expected["hirshfeld"], rtol=0, atol=1e-9)
        direction, h = rng.normal(size=positions.shape), 1e-3
        energies = []
        for k in (-1, 1):
            moved = s.positions + k * h * direction
            energies.append(
                so3krates_plain.PlainSO3krates(model).evaluate(s.numbers, moved, s.charge, 0, cell)["energy"]
            )
    finally:
        model.long_range_cutoff = None
    assert result.forces is not None
    slope = float((result.forces.numpy() * direction).sum())
    assert slope == pytest.approx((energies[0] - energies[1]) / (2 * h), rel=1e-3, abs=1e-3)


# -- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 5, 11, 14, 35, 53])
def test_other_elements_are_refused(number: int, parameters: Path) -> None:
    model = pretrained.read(parameters)
    with pytest.raises(ValueError, match=f"elements: expected atoms among H C N O F P S Cl .*got {SYMBOLS[number]}"):
        model.batch(Structure([number, 1], [[0, 0, 0], [1.5, 0, 0]]))  # type: ignore[arg-type]


def test_spin_is_refused_with_the_reason(parameters: Path, references: dict[str, Reference]) -> None:
    model = pretrained.read(parameters)
    spins = [r for r in each(references) if r.structure.multiplicity != 1]
    assert len(spins) == 2
    for r in spins:
        with pytest.raises(ValueError, match=r"multiplicity: .*spin embedding still holds the random numbers"):
            model.batch(r.structure)


def test_energies_come_with_their_meaning_once(parameters: Path, caplog: pytest.LogCaptureFixture) -> None:
    pretrained._say_what_energies_mean.cache_clear()
    with caplog.at_level(logging.WARNING):
        pretrained.read(parameters)
        pretrained.read(parameters)
    assert [m for m in caplog.messages if "differences between its energies" in m] == caplog.messages
    assert len(caplog.messages) == 1


# -- through OpenMM -----------------------------------------------------------------------------------------------


def topology_of(s: Structure) -> app.Topology:
    """Atoms without bonds, which is legal."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for number in s.numbers:
        topology.addAtom(SYMBOLS[number], app.Element.getByAtomicNumber(int(number)), residue)
    if s.cell is not None:
        topology.setPeriodicBoxVectors(s.cell * unit.angstrom)
    return topology


def through_openmm(
    potential: MLPotential, s: Structure, long_range_cutoff: float | None, **options: Any
) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (eV/angstrom) of a whole system on the Reference platform."""
    cutoff = None if long_range_cutoff is None else long_range_cutoff * unit.angstrom
    system = potential.createSystem(
        topology_of(s), charge=s.charge, multiplicity=s.multiplicity, longRangeCutoff=cutoff, **options
    )
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    if s.cell is not None:
        context.setPeriodicBoxVectors(*(s.cell * unit.angstrom))
    context.setPositions(s.positions * unit.angstrom)
    state = context.getState(energy=True, forces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) / KJ_PER_MOL_PER_EV
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return energy, forces / KJ_PER_MOL_NM_PER_EV_ANGSTROM


def test_closed_shells_through_openmm(parameters: Path, references: dict[str, Reference]) -> None:
    potential = MLPotential("so3lr", modelPath=str(parameters))
    compared = 0
    for r in each(references):
        if r.structure.multiplicity != 1 or r.name == "methyl_u0":
            # a methyl radical without unpaired electrons is none of the molecules that there are
            with pytest.raises(ValueError, match=r"multiplicity: (.*spin embedding|CH3 .* has 9 electrons)"):
                through_openmm(potential, r.structure, r.long_range_cutoff)
            continue
        if r.about["n_atoms"] > 25:
            continue
        energy, forces = through_openmm(potential, r.structure, r.long_range_cutoff, precision="double", compile=False)
        assert energy == pytest.approx(float(r["energy"]), abs=1e-8), r.name
        np.testing.assert_allclose(forces, r["forces"], rtol=0, atol=1e-8, err_msg=r.name)
        compared += 1
    assert compared >= 20


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("alanine_dipeptide", "double"),
        ("alanine_dipeptide", "single"),
        ("water_64_lr6", "double"),
        # 192 atoms twice, because the first frame is computed by torch too
        pytest.param("water_64_lr6", "single", marks=pytest.mark.slow),
    ],
)
def test_far_and_wrapped_positions_through_openmm(
    name: str, precision: str, parameters: Path, references: dict[str, Reference]
) -> None:
    r = references[name]
    s = r.structure
    if s.cell is None:
        moved = s.replace(positions=s.positions + np.array([500.0, -300.0, 800.0]))
    else:
        # every atom by its own whole number of boxes
        shifts = np.random.default_rng(4).integers(-3, 4, size=(len(s), 3))
        moved = s.replace(positions=s.positions + shifts @ s.cell)
    potential = MLPotential("so3lr", modelPath=str(parameters))
    energy, forces = through_openmm(potential, moved, r.long_range_cutoff, precision=precision)
    # float64 positions of hundreds of angstrom are rounded themselves, at 1e-13
    energy_atol, force_atol = (1e-8, 1e-8) if precision == "double" else (5e-4, 1e-4)
    assert energy == pytest.approx(float(r["energy"]), abs=energy_atol)
    np.testing.assert_allclose(forces, r["forces"], rtol=0, atol=force_atol)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("toluene.pdb", -2528.8225),
        pytest.param("alanine-dipeptide-explicit.pdb", -399032.75, marks=pytest.mark.slow),
    ],
)
def test_an_independent_port(file: str, expected: float, parameters: Path, shared: Path) -> None:
    """kJ/mol of openmm-jax (single precision): its long-range cutoff is 12 angstrom, in the open molecule too."""
    pdb = app.PDBFile(str(shared / "data" / file))
    system = MLPotential("so3lr", modelPath=str(parameters)).createSystem(
        pdb.topology, longRangeCutoff=1.2, compile=False
    )
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(pdb.positions)
    energy = context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    assert energy == pytest.approx(expected, rel=2e-6)


def test_a_periodic_box_needs_a_cutoff(parameters: Path, references: dict[str, Reference]) -> None:
    potential = MLPotential("so3lr", modelPath=str(parameters))
    with pytest.raises(ValueError, match="longRangeCutoff: a periodic system needs one"):
        potential.createSystem(topology_of(references["water_64_lr6"].structure))
