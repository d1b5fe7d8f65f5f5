"""A single SpookyNet by native code: published numbers, exact gradients, the torch form's numbers, where it stops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from openmm import app
from openmmml import MLPotential

from openmm_mlff.data.structures import Structure
from openmm_mlff.forces import running
from openmm_mlff.forces.ase_calculator import MLFFCalculator
from openmm_mlff.forces.copies import CopiesEvaluator
from openmm_mlff.potentials import compile as compilation
from openmm_mlff.potentials import native
from openmm_mlff.potentials.family import save_potential
from openmm_mlff.potentials.native_evaluator import NativeEvaluator
from openmm_mlff.testing.systems import cluster, crystal
from openmm_mlff.units import KJ_PER_MOL_PER_EV
from openmm_spookynet import SpookyNet, members

from .test_spookynet import SYMMETRIC, reference, structure_of
from .test_spookynet_members import BIO, OTHER, model

OUTPUTS = ("energy", "forces", "charges", "dipole")
TRICLINIC = np.array([[6.1, 0.0, 0.0], [1.3, 5.9, 0.0], [-1.1, 0.8, 6.3]])


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if native.compiler() is None:
        pytest.skip("no C++ compiler")


def no_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the torch form ran")

    monkeypatch.setattr(SpookyNet, "predict", refuse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_published_numbers(dtype: torch.dtype, published: dict[torch.dtype, SpookyNet]) -> None:
    """Z = 1 to 86, charges, spins, cutoffs and boxes, with D4."""
    net = published[dtype]
    assert net.dispersion is not None
    for name, r in list(reference().items())[:: 1 if dtype == torch.float64 else 3]:
        net.long_range_cutoff = float(r["lr_cutoff"]) if "lr_cutoff" in r else None
        try:
            structure = structure_of(r)
            found = members.Members([net], net.batch(structure)).arrays(structure.positions, structure.cell)
        finally:
            net.long_range_cutoff = None
        exact = dtype == torch.float64
        energy = 1e-7 if exact else 1e-6 * len(structure) + 2e-6
        np.testing.assert_allclose(found[0], [[r["energy"]]], rtol=0, atol=energy, err_msg=name)
        forces = (1e-5 if name in SYMMETRIC else 1e-7) if exact else 5e-5
        np.testing.assert_allclose(found[1][0], r["forces"], rtol=0, atol=forces, err_msg=name)
        np.testing.assert_allclose(found[2][0], r["charges"], rtol=0, atol=1e-7 if exact else 1e-6, err_msg=name)


@pytest.mark.parametrize("cutoff", [None, 6.0])
def test_forces_are_derivatives(cutoff: float | None, published: dict[torch.dtype, SpookyNet]) -> None:
    """By positions and by an external potential, D4 and its smooth end included; differences of the energy."""
    net = published[torch.float64]
    structure = structure_of(reference()["visible/ethanol"])
    rng = np.random.default_rng(1)
    # two molecules, so that pairs lie on both sides of the cutoff
    positions = np.concatenate([structure.positions, structure.positions + np.array([5.2, 1.0, 0.5])])
    positions += 0.05 * rng.normal(size=positions.shape)
    pair = Structure(np.tile(structure.numbers, 2), positions, charge=1, multiplicity=2)
    net.long_range_cutoff = cutoff
    try:
        one = members.Members([net], net.batch(pair))
    finally:
        net.long_range_cutoff = None
    phi = rng.normal(size=len(pair))
    _, forces, charges = one.arrays(positions, None, phi)
    h = 5e-5  # longer ways cross places where another maximum of the attention takes over
    for _ in range(6):
        way = rng.normal(size=positions.shape)
        e = {s: one.arrays(positions + s * h * way, None, phi)[0][0, 0] for s in (-2, -1, 1, 2)}
        slope = (8 * (e[1] - e[-1]) - (e[2] - e[-2])) / (12 * h)
        assert slope == pytest.approx(-float((forces[0] * way).sum()), rel=0, abs=1e-8)
        push = rng.normal(size=len(pair))
        up, down = (one.arrays(positions, None, phi + s * h * push)[0][0, 0] for s in (1, -1))
        assert (up - down) / (2 * h) == pytest.approx(float(charges[0] @ push), abs=1e-8)


@pytest.mark.parametrize("options", [{}, OTHER, BIO], ids=["published", "other", "bio"])
def test_evaluator_gives_the_torch_form(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(1, **options)
    structure = cluster(net, 40, seed=5, charge=1)
    phi = np.linspace(-0.5, 0.5, 40)
    evaluator, exact = (net.evaluator(structure, OUTPUTS, compile) for compile in ("auto", False))
    assert isinstance(evaluator, NativeEvaluator) and evaluator.compiled is None
    rng = np.random.default_rng(1)
    for potential in (None, phi):
        for _ in range(3):
            moved = structure.positions + rng.normal(scale=0.2, size=(40, 3))
            found, expected = (e(moved, potential=potential) for e in (evaluator, exact))
            for name in OUTPUTS:
                torch.testing.assert_close(
                    getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9, msg=name
                )
    assert evaluator.compiled and not exact.compiled and evaluator.pairs.rebuilds > 1
    # lists of the same frame give the same bits
    again = net.evaluator(structure, OUTPUTS, "auto")
    again.pairs.restore(evaluator.pairs.reference, None)
    for first, second in zip(evaluator.arrays(moved), again.arrays(moved), strict=True):
        np.testing.assert_array_equal(first, second)
    no_torch_form(monkeypatch)
    evaluator.arrays(structure.positions)
    assert net.evaluator(structure, ("energy",), "auto").outputs == ("energy",)


def test_boxes() -> None:
    net = model(1, long_range_cutoff=6.0)
    structure = crystal(net, 6, TRICLINIC, seed=3)
    evaluator, exact = (net.evaluator(structure, OUTPUTS, compile) for compile in (True, False))
    for strain in (1.0, 1.02):
        found, expected = (e(strain * structure.positions, strain * TRICLINIC) for e in (evaluator, exact))
        for name in ("energy", "forces", "charges"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9, msg=name)
    assert evaluator.compiled
    with pytest.raises(ValueError, match=r"cell: expected shape \(1, 3, 3\), got \(2, 3\)"):
        evaluator(structure.positions, TRICLINIC[:2])
    with pytest.raises(ValueError, match="cell: expected box vectors"):
        evaluator(structure.positions)


@pytest.mark.parametrize("periodic", [False, True], ids=["open", "boxes"])
def test_different_structures_in_one_call(periodic: bool) -> None:
    """Equal small molecules, others, and some whose lists change; each keeps its own lists."""
    net = model(1, long_range_cutoff=7.0) if periodic else model(1)
    if periodic:
        many = [crystal(net, n, TRICLINIC, seed=n) for n in (5, 7)]
    else:
        many = [cluster(net, n, seed=n, charge=q) for n, q in ((5, 0), (36, 1), (5, 1), (40, 0), (5, 0))]
        many[4] = many[0].replace(positions=many[0].positions + 0.1)
    evaluator = net.evaluator(many, compile="auto")
    assert len(evaluator._native._parts) == len(many)  # type: ignore[attr-defined]
    positions = np.concatenate([s.positions for s in many])
    cells = np.stack([TRICLINIC] * len(many)) if periodic else None
    ends = np.cumsum([0, *(len(s) for s in many)])
    rng = np.random.default_rng(3)
    for _ in range(3):
        positions = positions + rng.normal(scale=0.15, size=positions.shape)
        energies, forces = evaluator.arrays(positions, cells)
        for k, s in enumerate(many):
            energy, force = net.energy_and_forces(s.replace(positions=positions[ends[k] : ends[k + 1]]))
            assert energies[k] == pytest.approx(energy, abs=1e-9)
            np.testing.assert_allclose(forces[ends[k] : ends[k + 1]], force, rtol=0, atol=1e-9)
    assert evaluator.compiled and evaluator.pairs.rebuilds > 1 and not evaluator.pairs.fixed
    again = net.evaluator(many, compile="auto")
    again.pairs.restore(evaluator.pairs.reference, evaluator.pairs.reference_cell)
    for first, second in zip(evaluator.arrays(positions, cells), again.arrays(positions, cells), strict=True):
        np.testing.assert_array_equal(first, second)


def test_copies_with_lists_of_their_own() -> None:
    net = model(1)
    first = cluster(net, 36, seed=3)
    copies = [first.replace(positions=first.positions + 0.1 * k) for k in range(7)]
    evaluator = CopiesEvaluator(net, copies, compile="auto")
    energies, _ = evaluator.arrays(np.concatenate([s.positions for s in copies]))
    assert evaluator.compiled
    np.testing.assert_allclose(energies, net.energy_and_forces(first)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, BIO], ids=["published", "bio"])
def test_no_number_depends_on_threads(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "ATOMS_PER_THREAD", 5)
    net = model(1, **options)
    structure = cluster(net, 37, seed=2, charge=1)
    one = members.Members([net], net.batch(structure))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(one.arrays(structure.positions, None, np.linspace(-1.0, 1.0, 37)))
            assert one._numbers.threads == threads
    finally:
        torch.set_num_threads(before)
    for others in zip(*found, strict=True):
        for other in others[1:]:
            np.testing.assert_array_equal(other, others[0])


def test_changed_weights_are_packed_again() -> None:
    net = model(1)
    structure = cluster(net, 5, seed=1)
    before = net.evaluator(structure, compile="auto").arrays(structure.positions)[1]
    with torch.no_grad():
        net.interactions[1].radial.weight.mul_(1.5)  # type: ignore[union-attr, operator]
    after = net.evaluator(structure, compile="auto").arrays(structure.positions)[1]
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, net.energy_and_forces(structure)[1], rtol=0, atol=1e-9)


# -- where it stops ------------------------------------------------------------------------------------------------


def test_wrong_code_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    arrays = members.Members.arrays
    monkeypatch.setattr(members.Members, "arrays", lambda self, *a: tuple(1.001 * x for x in arrays(self, *a)))
    net = model(1)
    structure = cluster(net, 36, seed=6)
    evaluator = net.evaluator(structure, compile="auto")
    with caplog.at_level(logging.WARNING):
        forces = evaluator.arrays(structure.positions)[1]
    assert "the native code and the torch form disagree by" in caplog.text and evaluator.compiled is False
    np.testing.assert_allclose(forces, net.energy_and_forces(structure)[1], rtol=0, atol=1e-10)


def test_wrong_code_for_structures_with_lists_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = members.Members.arrays
    monkeypatch.setattr(members.Members, "arrays", lambda self, *a: tuple(1.001 * x for x in arrays(self, *a)))
    net = model(1)
    many = [cluster(net, 5, seed=1), cluster(net, 36, seed=2)]
    evaluator = net.evaluator(many, compile="auto")
    energies, _ = evaluator.arrays(np.concatenate([s.positions for s in many]))
    assert evaluator.compiled is False
    np.testing.assert_allclose(energies, [net.energy_and_forces(s)[0] for s in many], rtol=0, atol=1e-9)


def test_nothing_is_proved_by_a_frame_without_forces() -> None:
    net = model(1)
    structure = cluster(net, 6, seed=6)
    evaluator = net.evaluator(structure, compile="auto")
    broken = structure.positions.copy()
    broken[1] = broken[0]
    assert not np.isfinite(evaluator.arrays(broken)[1]).all() and evaluator.compiled is None
    forces = evaluator.arrays(structure.positions)[1]
    assert evaluator.compiled
    np.testing.assert_allclose(forces, net.energy_and_forces(structure)[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"activation": "ssp"}, {"num_features": 12}, {"use_irreps": False}])
def test_unknown_options_run_by_torch(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "compiler_found", lambda: False)
    net = model(1, **options)
    structure = cluster(net, 5, seed=1)
    for compile in ("auto", True):
        evaluator = net.evaluator(structure, compile=compile)
        forces = evaluator.arrays(structure.positions)[1]
        assert evaluator.compiled is False
        np.testing.assert_allclose(forces, net.energy_and_forces(structure)[1], rtol=0, atol=1e-10)


# -- where it runs -------------------------------------------------------------------------------------------------


def test_openmm_and_ase_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(1, elements=(1, 6, 7, 8), **BIO)
    structure = cluster(net, 9, seed=4, charge=-1)
    energy, forces = net.energy_and_forces(structure)
    path = save_potential(net, tmp_path / "model.safetensors")
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for z in structure.numbers:
        topology.addAtom("A", app.Element.getByAtomicNumber(int(z)), residue)
    system = MLPotential("spookynet", modelPath=str(path)).createSystem(topology, charge=-1)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(0.1 * structure.positions)
    found = context.getState(getEnergy=True).getPotentialEnergy()._value
    assert found == pytest.approx(energy * KJ_PER_MOL_PER_EV, rel=1e-10)
    (computation,) = running.computations(system)
    assert computation.compiled
    atoms = Atoms(structure.numbers, structure.positions)
    atoms.calc = MLFFCalculator(net, charge=-1)
    np.testing.assert_allclose(atoms.get_forces(), forces, rtol=0, atol=1e-9)
    no_torch_form(monkeypatch)
    atoms.rattle(0.01)
    assert np.isfinite(atoms.get_forces()).all()
    context.setPositions(0.1 * atoms.positions)
    assert np.isfinite(context.getState(getEnergy=True).getPotentialEnergy()._value)
