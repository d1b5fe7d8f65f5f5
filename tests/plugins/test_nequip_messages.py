"""The C++ kernel of NequIP's messages against the same sums op by op, and its derivatives against differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials import native
from openmm_nequip import NequIP, NequIPConfig
from openmm_nequip.angular import plans
from openmm_nequip.layers import Couplings, kernel_table
from openmm_nequip.messages import Messages
from openmm_nequip.pretrained import build, config_of, translate

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


def molecule(n: int, seed: int, **options: Any) -> Structure:
    """Atoms on a distorted lattice: no two at the same place, many beyond one another's cutoff."""
    rng = np.random.default_rng(seed)
    grid = 1.6 * np.stack(np.meshgrid(*[np.arange(4.0)] * 3), -1).reshape(-1, 3)
    positions = rng.permutation(grid)[:n] + rng.normal(scale=0.15, size=(n, 3))
    return Structure(rng.choice([1, 6, 7, 8, 16, 17], n), positions, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_features": 8, "num_layers": 4, "radial_features": 8},
        {"num_features": 8, "num_layers": 2, "irreps": ("1o", "0e", "2e", "0o"), "radial_layers": 1},
        {"num_features": 8, "num_layers": 2, "irreps": ("0e",), "max_degree": 0},
    ],
    ids=["as published", "fewer irreps", "distances alone"],
)
def test_the_kernel_changes_nothing(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = NequIP(NequIPConfig(**options)).double().eval().requires_grad_(False)
    box = np.array([[6.4, 0.0, 0.0], [0.3, 6.4, 0.0], [0.0, -0.2, 6.4]])
    for structures in ([molecule(17, 0), molecule(2, 1), molecule(9, 2), molecule(1, 3)], [molecule(30, 4, cell=box)]):
        batch = model.batch(structures)
        model.first_derivatives_only = False
        expected = model.evaluate(batch)
        model.first_derivatives_only = True
        result = model.evaluate(batch)
        assert expected.forces is not None and result.forces is not None
        torch.testing.assert_close(result.energy, expected.energy, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.forces, expected.forces, rtol=0, atol=1e-12)
        assert float(expected.forces.abs().max()) > 1e-3


def test_derivatives_are_those_of_the_sums() -> None:
    config = NequIPConfig(num_features=2, num_layers=3)
    steps = plans(config)
    couplings = Couplings({p.kind for plan in steps for p in plan.paths})
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(True)

    for plan in steps:
        table, targets = kernel_table(plan, couplings)
        rows = sum({"0": 1, "1": 3, "2": 5}[x[0]] for x in plan.sources)
        n_outputs = sum(n * m for n, m in targets.values())
        atoms, slots = 3, 4
        active = torch.tensor([[1.0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)
        index = torch.tensor([[1, 2, 0, 2], [0, 2, 0, 2], [2, 2, 2, 2]])
        inputs = (
            normal(atoms, rows, 2),
            normal(atoms, slots, 2 * len(plan.paths)),
            normal(atoms, slots, couplings.size),
        )
        assert torch.autograd.gradcheck(
            lambda h, w, a, *fixed: Messages.apply(h, w, a, *fixed),
            (*inputs, active, index, table, n_outputs),
            atol=1e-7,
        )


@pytest.mark.parametrize("kind", ["small", "full"])
def test_md_computes_what_jax_md_does(kind: str, shared: Path) -> None:
    folder = shared / "data" / "resolv"
    with np.load(folder / f"nequip_{kind}_params.npz") as file:
        arrays = {name: file[name].astype(np.float64) for name in file.files}
    config = config_of(arrays)
    model = build(config, translate(arrays, config, list(range(6))))
    with np.load(folder / f"nequip_{kind}_visible.npz") as file:
        for key in ("m031", "m084"):
            numbers, positions = file[f"{key}_Z"], file[f"{key}_pos"]
            evaluate = model.evaluator([Structure(numbers, p) for p in positions], compile="auto")
            result = evaluate(positions.reshape(-1, 3))
            assert evaluate.compiled is False and result.forces is not None
            np.testing.assert_allclose(result.energy.numpy(), file[f"{key}_energy"], rtol=0, atol=1e-10)
            forces = result.forces.numpy().reshape(positions.shape)
            np.testing.assert_allclose(forces, file[f"{key}_force"], rtol=0, atol=1e-10)


def test_without_a_compiler_it_runs_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = NequIP(NequIPConfig(num_features=8, num_layers=2)).double().eval()
    structure = molecule(5, 0)
    expected = model.evaluator(structure, compile="auto")(structure.positions)
    monkeypatch.setattr(native, "compiler", lambda: None)
    result = model.evaluator(structure, compile="auto")(structure.positions)
    assert expected.forces is not None and result.forces is not None
    torch.testing.assert_close(result.forces, expected.forces, rtol=0, atol=1e-13)
