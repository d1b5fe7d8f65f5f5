"""Native code for ensembles of SpookyNet against its torch form, member by member, and where it stands aside."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure, collate
from openmm_mlff.potentials import native
from openmm_mlff.potentials.ensemble import Ensemble, EnsembleEvaluator
from openmm_mlff.testing.systems import cluster, crystal
from openmm_spookynet import SpookyNet, SpookyNetConfig, members

SMALL: dict[str, Any] = {"num_features": 16, "num_random_features": 16, "num_modules": 2, "num_basis_functions": 8}
OTHER = {
    "exp_weighting": False, "long_range_cutoff": 5.0, "charge_conservation": "local", "num_residual_local": 2,
    "num_residual_post": 0, "num_residual_local_p": 2, "num_residual_pre": 2, "num_residual_nonlocal_v": 0,
}  # fmt: skip
BIO = {"attention": "none", "num_modules": 3, "charge_conservation": "shared", "embed_after": 1}
NETWORK_ALONE = {"use_zbl_repulsion": False, "use_electrostatics": False}
OPTIONS = [{}, OTHER, BIO, BIO | {"embed_after": 2, "attention": "all"}, NETWORK_ALONE]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if native.compiler() is None:
        pytest.skip("no C++ compiler")


def model(seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> SpookyNet:
    """Random weights so large that every part of the network matters for the forces."""
    torch.manual_seed(seed)
    made = SpookyNet(SpookyNetConfig(**SMALL | options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            width = 0.02 if "raw" in name else 0.8 / math.sqrt(parameter.shape[-1])
            parameter += width * torch.randn_like(parameter)
    return made.to(dtype).eval().requires_grad_(False)


def alone(models: list[SpookyNet], s: Structure, phi: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Energies, forces and charges, op by op."""
    found = []
    for m in models:
        batch = m.batch(s)
        found.append(
            m.evaluate(batch.replace(external_potential=None if phi is None else torch.tensor(phi, dtype=m.dtype)))
        )
    stacked = (np.stack([np.asarray(getattr(r, name)) for r in found]) for name in ("energy", "forces", "charges"))
    return tuple(x.astype(np.float64) for x in stacked)


@pytest.mark.parametrize("options", OPTIONS, ids=["published", "other", "bio", "late", "network alone"])
def test_numbers_of_the_torch_form(options: dict[str, Any]) -> None:
    models = [model(seed, **options) for seed in (1, 2)]
    for n, charge, more, seed in ((9, 1, 0, 1), (9, -2, 2, 4), (1, 0, 0, 2), (40, 0, 0, 3)):
        structure = cluster(models[0], n, seed=seed, charge=charge)
        structure = structure.replace(multiplicity=structure.multiplicity + more)
        together = members.Members(models, models[0].batch(structure))
        for phi in (None, np.linspace(-1.0, 2.0, n)):
            expected = alone(models, structure, phi)
            scale = max(1.0, float(np.abs(expected[1]).max()))
            assert n == 1 or np.abs(expected[1][0] - expected[1][1]).max() > 1e-3, "members should differ"
            for value, truth in zip(together.arrays(structure.positions, None, phi), expected, strict=True):
                np.testing.assert_allclose(value, truth, rtol=0, atol=1e-10 * scale)


def test_the_network_matters_in_this_test() -> None:
    """Without repulsion and charges there is nothing but the network, and its forces are not small."""
    m = model(1, **OPTIONS[-1])
    assert np.abs(m.energy_and_forces(cluster(m, 9, seed=1))[1]).max() > 0.05


def test_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A skewed box narrower than the cutoff, moved and strained."""
    models = [model(seed, long_range_cutoff=6.0) for seed in (1, 2)]
    cell = np.array([[5.1, 0.0, 0.0], [1.3, 4.9, 0.0], [-1.1, 0.8, 5.3]])
    structure = crystal(models[0], 6, cell, seed=3)
    together = members.Members(models, models[0].batch(structure))
    rng = np.random.default_rng(0)
    for strain in (1.0, 1.0, 1.02):
        structure = structure.replace(
            positions=structure.positions + rng.normal(scale=0.05, size=(6, 3)), cell=cell * strain
        )
        expected = alone(models, structure)
        for value, truth in zip(together.arrays(structure.positions, structure.cell), expected, strict=True):
            np.testing.assert_allclose(value, truth, rtol=0, atol=1e-9 * max(1.0, np.abs(expected[1]).max()))


def test_single_precision() -> None:
    exact = [model(seed) for seed in (1, 2)]
    single = [model(seed, torch.float32) for seed in (1, 2)]
    structure = cluster(exact[0], 12, seed=4)
    found = members.Members(single, single[0].batch(structure)).arrays(structure.positions)
    torch_form, truth = alone(single, structure), alone(exact, structure)
    scale = max(1.0, float(np.abs(truth[1]).max()))
    # as near to the exact numbers as the torch form in the same precision
    assert np.abs(found[1] - truth[1]).max() <= 2 * np.abs(torch_form[1] - truth[1]).max() + 1e-6 * scale
    np.testing.assert_allclose(found[0], truth[0], rtol=0, atol=1e-4)


def test_evaluators_run_members_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [model(seed) for seed in (1, 2, 3)]
    ensemble = Ensemble(models)
    structure = cluster(ensemble, 40, seed=5)
    evaluator = ensemble.evaluator(structure, ("energy", "forces", "charges", "dipole"), "auto")
    assert isinstance(evaluator, EnsembleEvaluator) and evaluator.compiled is None
    rng = np.random.default_rng(1)
    phi = np.linspace(-0.5, 0.5, 40)
    for _ in range(6):
        structure = structure.replace(positions=structure.positions + rng.normal(scale=0.05, size=(40, 3)))
        result = evaluator(structure.positions, potential=phi)
        expected = ensemble.evaluate(ensemble.batch(structure).replace(external_potential=torch.from_numpy(phi)))
        for name in ("energy", "forces", "charges", "dipole", "spread", "force_spread"):
            torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-9, atol=1e-9, msg=name)
    assert evaluator.compiled and not evaluator.evaluators
    assert 1 < evaluator.pairs.rebuilds < 6
    again = ensemble.evaluator(structure, compile="auto")
    again.pairs.restore(evaluator.pairs.reference, None)
    for first, second in zip(evaluator.arrays(structure.positions), again.arrays(structure.positions), strict=True):
        np.testing.assert_array_equal(first, second)


def test_copies_of_a_molecule() -> None:
    models = [model(seed) for seed in (1, 2)]
    first = cluster(models[0], 7, seed=7, charge=1)
    copies = [
        first.replace(positions=first.positions + 0.1 * np.random.default_rng(k).normal(size=(7, 3))) for k in range(3)
    ]
    evaluator = Ensemble(models).evaluator(copies, compile="auto")
    energies, forces = evaluator.arrays(np.concatenate([s.positions for s in copies]))
    assert evaluator.compiled and evaluator.spreads is not None and evaluator.spreads[1].shape == (21,)
    for k, structure in enumerate(copies):
        expected = alone(models, structure)
        assert energies[k] == pytest.approx(expected[0].mean(), abs=1e-9)
        np.testing.assert_allclose(forces[7 * k : 7 * k + 7], expected[1].mean(axis=0), atol=1e-9)
        assert evaluator.spreads[0][k] == pytest.approx(expected[0].std(ddof=1), abs=1e-9)
    with pytest.raises(ValueError, match="positions: expected shape"):
        evaluator.arrays(first.positions)


def test_wrong_code_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The first frame is compared with the torch form; after that the members run one by one."""
    arrays = members.Members.arrays
    monkeypatch.setattr(members.Members, "arrays", lambda self, *a: tuple(1.001 * x for x in arrays(self, *a)))
    models = [model(seed) for seed in (1, 2)]
    structure = cluster(models[0], 6, seed=6)
    evaluator = Ensemble(models).evaluator(structure, compile="auto")
    with caplog.at_level(logging.WARNING):
        forces = evaluator.arrays(structure.positions)[1]
    assert "one by one disagree" in caplog.text and evaluator.compiled is False
    np.testing.assert_allclose(forces, alone(models, structure)[1].mean(axis=0), atol=1e-10)


def test_where_it_stands_aside() -> None:
    structures = [cluster(model(1), 5, seed=k) for k in (1, 2)]
    for options in ({"activation": "ssp"}, {"num_features": 12}, {"use_irreps": False}):
        models = [model(seed, **options) for seed in (1, 2)]
        assert members.together(models, models[0].batch(structures[0])) is None
        energies, _ = Ensemble(models).evaluator(structures[0], compile="auto").arrays(structures[0].positions)
        assert energies[0] == pytest.approx(alone(models, structures[0])[0].mean(), abs=1e-9)
    models = [model(seed) for seed in (1, 2)]
    grid = 1.5 * np.argwhere(np.ones((11, 11, 11)))[: members.MOST_ATOMS + 1]
    assert members.together(models, collate([Structure(np.ones(len(grid), dtype=int), grid)])) is None


def test_bad_input() -> None:
    models = [model(seed, long_range_cutoff=6.0) for seed in (1, 2)]
    structure = crystal(models[0], 4, 6.0 * np.eye(3), seed=1)
    together = members.Members(models, models[0].batch(structure))
    with pytest.raises(ValueError, match="positions: expected shape"):
        together.arrays(structure.positions[:3], structure.cell)
    with pytest.raises(ValueError, match="cell: expected box vectors"):
        together.arrays(structure.positions)
    with pytest.raises(ValueError, match="potential: expected shape"):
        together.arrays(structure.positions, structure.cell, np.zeros(3))
