"""The torch form of SO3krates as a compiled graph: what is recorded, and what becomes of a wrong one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials import compile as compilation
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.potential import Potential
from openmm_so3krates import SO3krates, SO3kratesConfig
from openmm_spookynet import SpookyNet, SpookyNetConfig

needs_compiler = pytest.mark.skipif(not compilation.compiler_found(), reason="no C++ compiler (g++ or clang++)")
#: what evaluation writes to by index
SCATTERS = ("index_put", "index_add", "scatter_add")


def cluster(n: int) -> Structure:
    """Atoms of H, C, N and O on a distorted grid of 1.6 angstrom, with an even number of electrons."""
    random = np.random.default_rng(0)
    side = int(np.ceil(n ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
    numbers = random.choice([1, 6, 7, 8], n)
    positions = 1.6 * grid + random.uniform(-0.3, 0.3, (n, 3))
    numbers[np.flatnonzero(numbers == 7)[0]] += numbers.sum() % 2
    return Structure(numbers, positions)


def alive(model: Potential, dtype: torch.dtype) -> Potential:
    """Every weight random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


def dispersive() -> Potential:
    """Three layers, four degrees and as many radial functions as SO3LR, small otherwise."""
    torch.manual_seed(1)
    config = SO3kratesConfig(
        num_features=16, num_heads=4, degrees=(1, 2, 3, 4), num_basis_functions=32, hirshfeld_features=8,
        use_charge_embed=False, use_spin_embed=False, use_zbl_repulsion=False, use_electrostatics=False,
        predict_charges=False,
    )  # fmt: skip
    return alive(SO3krates(config), torch.float32)


def charged(family: str) -> Potential:
    torch.manual_seed(2)
    if family == "spookynet":
        small = SpookyNetConfig(num_features=8, num_basis_functions=4, num_modules=1, num_random_features=8)
        return alive(SpookyNet(small), torch.float64)
    config = SO3kratesConfig(num_features=12, num_layers=1, num_heads=2, degrees=(), num_basis_functions=6)
    return alive(SO3krates(config), torch.float64)


@needs_compiler
@pytest.mark.slow
def test_a_wrong_graph_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What torch 2.13 compiles of this model has the right energy, and forces that are wrong by 3e-4 eV/angstrom.

    The family never compiles its torch form; the core's evaluator, which would, has to notice.
    """
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(tmp_path))
    torch.set_num_threads(1)
    model, structure = dispersive(), cluster(24)
    batch = model.batch(structure)
    eager = Evaluator(model, batch, ("energy", "forces"))(structure.positions)
    compiled = Evaluator(model, batch, ("energy", "forces"), compile=True)(structure.positions)
    assert eager.forces is not None and compiled.forces is not None
    assert float(eager.forces.abs().max()) > 0.05
    torch.testing.assert_close(compiled.forces, eager.forces, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("family", ["so3krates", "spookynet"])
def test_nothing_is_added_up_in_a_single_place(family: str) -> None:
    """What belongs to the whole molecule is not reached by an index, whose derivative torch cannot compile."""
    model, structure = charged(family), cluster(18)
    evaluator = Evaluator(model, model.batch(structure), ("energy", "forces"))
    batch = evaluator.place(structure.positions, None, None)
    graph = compilation.CompiledGraph(model, evaluator._fixed, evaluator.outputs, evaluator.pairs.fixed)
    inputs = graph._inputs_of(batch)
    example = [x.clone() for x in inputs.tensors(batch)]
    with compilation._first_derivatives_only(model):
        recorded = make_fx(graph._record(inputs))(example[0].requires_grad_(True), *example[1:])
    targets = [
        node.args[0].meta["val"].shape
        for node in recorded.graph.nodes
        if any(name in str(node.target) for name in SCATTERS)
    ]
    assert targets and all(shape[0] > 1 for shape in targets)
