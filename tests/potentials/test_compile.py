"""Compiled graphs: the same numbers as op by op, a second start from the disk, and every way to fall back."""

from __future__ import annotations

import locale
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials import compile as compilation
from openmm_mlff.potentials.evaluator import Evaluator
from openmm_mlff.potentials.potential import Evaluation
from openmm_spookynet import SpookyNet, SpookyNetConfig

needs_compiler = pytest.mark.skipif(not compilation.compiler_found(), reason="no C++ compiler (g++ or clang++)")


def small_model(dtype: torch.dtype = torch.float64) -> SpookyNet:
    """With fewer features than its native code takes, which would run instead of a graph."""
    torch.manual_seed(3)
    model = SpookyNet(SpookyNetConfig(num_features=4, num_basis_functions=4, num_modules=1, num_random_features=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


def cluster(n: int, seed: int = 0, edge: float | None = None) -> Structure:
    """n atoms at least 1 angstrom apart; with `edge`, in a periodic cube."""
    random = np.random.default_rng(seed)
    side = int(np.ceil(n ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
    spacing = 2.0 if edge is None else edge / side
    positions = spacing * grid + random.uniform(-0.3, 0.3, (n, 3))
    numbers = random.choice([1, 6, 8], n)
    return Structure(numbers, positions, cell=None if edge is None else edge * np.eye(3))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _one_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMM_MLFF_CACHE", str(cache))


def assert_same(a: Evaluation, b: Evaluation) -> None:
    assert a.forces is not None and b.forces is not None
    torch.testing.assert_close(a.energy, b.energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.forces, b.forces, rtol=1e-9, atol=1e-10)


@needs_compiler
def test_small_molecule_runs_compiled_and_starts_again_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, molecule = small_model(), cluster(5)
    assert Evaluator(model, model.batch(molecule), ("energy", "forces"), compile="auto").compiled is None
    compiled, eager = model.evaluator(molecule, compile=True), model.evaluator(molecule)
    random = np.random.default_rng(1)
    for _ in range(3):
        moved = molecule.positions + random.normal(0, 0.1, (5, 3))
        assert_same(compiled(moved), eager(moved))
    assert compiled.compiled and not eager.compiled

    def never(*arguments: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compilation.CompiledGraph, "_compile", never)
    again = model.evaluator(molecule, compile="auto")
    assert_same(again(molecule.positions), eager(molecule.positions))
    assert again.compiled
    # another charge, another precision and a changed weight are other graphs
    for other in (
        model.evaluator(molecule.replace(charge=1), compile="auto"),
        _changed().evaluator(molecule, compile="auto"),
    ):
        other(molecule.positions)
        assert not other.compiled


def _changed() -> SpookyNet:
    model = small_model()
    model.element_bias[6, 0] += 1e-6
    return model


@needs_compiler
def test_periodic_lists_are_inputs_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables change with every rebuild; a denser frame than the compiled shapes hold compiles a larger graph."""
    model = small_model()
    model.long_range_cutoff = 4.0
    box = cluster(12, edge=7.0)
    compiled, eager = model.evaluator(box, compile=True), model.evaluator(box)
    random = np.random.default_rng(2)
    for step in range(4):
        moved = box.positions + random.normal(0, 0.2 + 0.2 * step, (12, 3)) + 7.0 * random.integers(-1, 2, (12, 3))
        assert_same(compiled(moved, box.cell), eager(moved, box.cell))
    assert compiled.pairs.rebuilds > 1 and compiled.compiled
    # between rebuilds nothing is derived from the list again
    with monkeypatch.context() as watched:
        tables: list[object] = []
        build = compilation.NeighborMatrix.from_pairs
        watched.setattr(compilation.NeighborMatrix, "from_pairs", lambda *x: tables.append(x) or build(*x))
        for shift in (0.0, 1e-3, 2e-3):
            compiled(moved + shift, box.cell)
        assert not tables
        assert compiled.pairs.rebuilds > 1
    compilations = []
    once = compilation.CompiledGraph._compile

    def counted(self: compilation.CompiledGraph, inputs: compilation.GraphInputs, path: Path) -> None:
        compilations.append((inputs.slots, inputs.n_long))
        once(self, inputs, path)

    monkeypatch.setattr(compilation.CompiledGraph, "_compile", counted)
    smaller = 0.8 * box.cell
    assert_same(compiled(0.8 * box.positions, smaller), eager(0.8 * box.positions, smaller))
    assert len(compilations) == 1


@needs_compiler
@pytest.mark.slow
def test_external_potential_is_compiled_too() -> None:
    model, molecule = small_model(), cluster(4)
    compiled, eager = model.evaluator(molecule, compile=True), model.evaluator(molecule)
    phi = np.array([0.3, -0.1, 0.2, 0.5])
    assert_same(compiled(molecule.positions, potential=phi), eager(molecule.positions, potential=phi))
    assert not np.allclose(
        compiled(molecule.positions, potential=phi).energy, eager(molecule.positions).energy, atol=1e-6
    )


def test_no_compiler_is_a_notice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compilation, "compiler_found", lambda: False)
    model, molecule = small_model(), cluster(6)
    evaluator = model.evaluator(molecule, compile=True)
    assert_same(evaluator(molecule.positions), model.evaluator(molecule)(molecule.positions))
    assert evaluator.compiled is False
    assert "no C++ compiler" in caplog.text


def test_failed_compilation_is_a_notice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*arguments: object) -> None:
        raise compilation.CompilationError("compile: no luck")

    monkeypatch.setattr(compilation.CompiledGraph, "_compile", fail)
    monkeypatch.setattr(compilation, "compiler_found", lambda: True)
    model, molecule = small_model(), cluster(6)
    evaluator = model.evaluator(molecule, compile=True)
    assert_same(evaluator(molecule.positions), model.evaluator(molecule)(molecule.positions))
    assert evaluator.compiled is False and "no luck" in caplog.text


@needs_compiler
def test_a_graph_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    load = compilation._load

    def wrong(path: Path) -> object:
        run = load(path)

        def shifted(*values: torch.Tensor) -> list[torch.Tensor]:
            energy, forces = run(*values)
            return [energy, forces + 1e-4]

        return shifted

    monkeypatch.setattr(compilation, "_load", wrong)
    model, molecule = small_model(), cluster(5)
    evaluator = model.evaluator(molecule, compile=True)
    assert_same(evaluator(molecule.positions), model.evaluator(molecule)(molecule.positions))
    assert evaluator.compiled is False and "disagree" in caplog.text


@needs_compiler
def test_a_damaged_package_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, molecule = small_model(), cluster(5)
    first = model.evaluator(molecule, compile=True)
    first(molecule.positions)
    graph = compilation.CompiledGraph(first.model, first._fixed, first.outputs, first.pairs.fixed)
    path = graph._path(graph._inputs_of(first.place(molecule.positions, None, None)))
    package = path.read_bytes()
    path.write_bytes(package[: len(package) // 2])
    # stands for the compiler, which would write the same bytes after half a minute
    monkeypatch.setattr(compilation.CompiledGraph, "_compile", lambda self, inputs, to: to.write_bytes(package))
    again = model.evaluator(molecule, compile=True)
    assert_same(again(molecule.positions), model.evaluator(molecule)(molecule.positions))
    assert again.compiled


def test_compile_takes_three_values() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="compile: expected True, False or 'auto', got 'yes'"):
        model.evaluator(cluster(3), compile="yes")


def test_files_are_read_as_utf8_where_a_library_has_reset_the_locale() -> None:
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        assert locale.getpreferredencoding(False).lower() != "utf-8"
        with compilation.utf8_locale():
            assert locale.getpreferredencoding(False).lower() == "utf-8"
        assert locale.setlocale(locale.LC_CTYPE) == "C"
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
