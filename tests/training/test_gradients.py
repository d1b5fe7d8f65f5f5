"""The gradient that training follows, against finite differences, and every faster way to it against the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from openmm_mlff.potentials.potential import Potential
from openmm_mlff.training.batching import LabelledSet
from openmm_mlff.training.compiled_loss import CompiledLoss
from openmm_mlff.training.force_matching import ForceMatching, batch_loss
from openmm_mlff.training.losses import LossWeights
from openmm_mlff.training.parallel import ParallelLoss
from openmm_spookynet import SpookyNet, SpookyNetConfig

WEIGHTS = LossWeights(energy=0.7, forces=1.3, dipole=0.4, charges=0.2)


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def test_gradient_of_the_loss_is_its_derivative(tiny, clusters) -> None:
    # forces are a first derivative already, so this is a second one: every operation's double backward counts
    model = tiny(num_modules=2)
    labelled = LabelledSet(clusters([5, 3, 4], seed=1), model).batch([0, 1, 2])
    weights = WEIGHTS.tensor(torch.float64, model.device)
    slopes = gradient(batch_loss(model, labelled, weights)[0], model)
    rng = torch.Generator().manual_seed(3)
    h = 1e-6
    for (name, parameter), slope in zip(model.named_parameters(), slopes, strict=True):
        direction = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                parameter += sign * h * direction
            values.append(float(batch_loss(model, labelled, weights)[0].detach()))
            with torch.no_grad():
                parameter -= sign * h * direction
        numeric = (values[0] - values[1]) / (2 * h)
        # rounding: values of order 10 known to 1e-15 relative, divided by 2e-6
        assert float((slope * direction).sum()) == pytest.approx(numeric, rel=1e-5, abs=2e-7), name


def test_every_term_moves_the_gradient(tiny, clusters) -> None:
    model = tiny()
    labelled = LabelledSet(clusters([4, 4], seed=2), model).batch([0, 1])
    for name in ("energy", "forces", "dipole", "charges"):
        only = LossWeights(**{n: float(n == name) for n in ("energy", "forces", "dipole", "charges")})
        slopes = gradient(batch_loss(model, labelled, only.tensor(torch.float64, model.device))[0], model)
        assert max(float(g.abs().max()) for g in slopes) > 1e-6, name


def test_traced_loss_has_the_same_gradient(tiny, waters) -> None:
    model = tiny()
    labelled = LabelledSet(waters(4, seed=1), model).batch([0, 1, 2, 3])
    weights = WEIGHTS.tensor(torch.float64, model.device)
    traced = CompiledLoss(model, batch_loss, backend="eager")
    for shift in (0.0, 0.05):
        # the second round: parameters have changed since the graph was made
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += shift
        plain, terms = batch_loss(model, labelled, weights)
        found, found_terms = traced(model, labelled, weights)
        assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
        torch.testing.assert_close(found_terms, terms, rtol=1e-12, atol=0)
        for a, b in zip(gradient(found, model), gradient(plain, model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len(traced._graphs) == 1 and None not in traced._graphs.values()


def test_loss_with_dropout_is_not_compiled(tiny, waters) -> None:
    model = tiny(num_modules=2, module_keep_prob=0.5)
    labelled = LabelledSet(waters(4, seed=1), model).batch([0, 1, 2, 3])
    traced = CompiledLoss(model, batch_loss, backend="eager")
    with pytest.warns(UserWarning, match="dropout"):
        loss, _ = traced(model, labelled, WEIGHTS.tensor(torch.float64, model.device))
    assert loss.requires_grad


def untrained() -> Potential:
    """Where a training starts: what the last layers multiply by zero moves nothing."""
    torch.manual_seed(0)
    small = SpookyNetConfig(num_features=8, num_basis_functions=8, num_modules=1, num_random_features=8)
    return SpookyNet(small).double().train()


def compiler_of(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Callable[..., Any]:
    """Stands in for `torch.compile`: the graph as it is, but its results are changed."""
    return lambda graph, **options: lambda *arguments: change(graph(*arguments))


def test_a_graph_that_is_wrong_where_weights_are_zero_is_not_used(waters, monkeypatch) -> None:
    model = untrained()
    labelled = LabelledSet(waters(4, seed=1), model).batch([0, 1, 2, 3])
    weights = WEIGHTS.tensor(torch.float64, model.device)
    plain = gradient(batch_loss(model, labelled, weights)[0], model)
    hidden = [k for k, g in enumerate(plain) if float(g.norm()) == 0.0]
    assert len(hidden) > 3

    def one_per_cent(results: list[torch.Tensor]) -> list[torch.Tensor]:
        return [1.01 * x if k - 2 in hidden else x for k, x in enumerate(results)]

    monkeypatch.setattr(torch, "compile", compiler_of(one_per_cent))
    compiled = CompiledLoss(model, batch_loss)
    with pytest.warns(UserWarning, match=r"compiled and eager gradients differ by 1\.0e-02"):
        compiled(model, labelled, weights)
    assert list(compiled._graphs.values()) == [None]


def test_a_graph_that_goes_wrong_later_is_left(tiny, waters, monkeypatch) -> None:
    model = tiny()
    labelled = LabelledSet(waters(4, seed=1), model).batch([0, 1, 2, 3])
    weights = WEIGHTS.tensor(torch.float64, model.device)
    calls: list[int] = []

    def after_some_steps(results: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(1)
        return [x * (1 + 1e-6) for x in results] if len(calls) > 8 else results

    monkeypatch.setattr(torch, "compile", compiler_of(after_some_steps))
    compiled = CompiledLoss(model, batch_loss)
    plain = gradient(batch_loss(model, labelled, weights)[0], model)
    for _ in range(9):
        compiled(model, labelled, weights)
    with pytest.warns(UserWarning, match="gradients differ by 1.0e-06 after 10 steps"):
        tenth = compiled(model, labelled, weights)[0]
    for loss in (tenth, compiled(model, labelled, weights)[0]):
        for a, b in zip(gradient(loss, model), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_batches_of_many_kinds_run_eagerly(tiny, clusters, monkeypatch) -> None:
    monkeypatch.setattr("openmm_mlff.training.compiled_loss.MAX_KINDS", 0)
    model = tiny()
    data = LabelledSet(clusters([3, 4], seed=1), model)
    weights = WEIGHTS.tensor(torch.float64, model.device)
    traced = CompiledLoss(model, batch_loss, backend="eager")
    with pytest.warns(UserWarning, match="too many kinds") as caught:
        for i in range(2):
            labelled = data.batch([i])
            found, plain = (f(model, labelled, weights)[0].detach() for f in (traced, batch_loss))
            assert float(found) == pytest.approx(float(plain), rel=1e-12)
    assert len(caught) == 1


@pytest.mark.slow
def test_compiled_loss_has_the_same_gradient(tiny, waters) -> None:
    model = tiny(torch.float32)
    labelled = LabelledSet(waters(4, seed=1), model).batch([0, 1, 2, 3])
    weights = WEIGHTS.tensor(torch.float32, model.device)
    compiled = CompiledLoss(model, batch_loss)
    found = compiled(model, labelled, weights)[0]
    assert None not in compiled._graphs.values()
    for a, b in zip(gradient(found, model), gradient(batch_loss(model, labelled, weights)[0], model), strict=True):
        assert float((a - b).norm()) <= 1e-4 * max(float(b.norm()), 1e-3)


def test_parallel_loss_is_the_mean_over_the_batch(tiny, waters) -> None:
    model = tiny()
    data = LabelledSet(waters(7, seed=4), model)
    weights = WEIGHTS.tensor(torch.float64, model.device)
    indices = np.array([4, 0, 6, 2, 5])
    parallel = ParallelLoss(model, data, batch_loss, processes=2, compiled=False)
    try:
        for _ in range(2):
            plain, terms = batch_loss(model, data.batch(indices), weights)
            found, found_terms = parallel(model, indices, weights)
            assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
            torch.testing.assert_close(found_terms, terms, rtol=1e-12, atol=0)
            for a, b in zip(gradient(found, model), gradient(plain, model), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05
        parallel._workers[0].kill()
        parallel._workers[0].join()
        with pytest.raises(RuntimeError, match="died"):
            parallel(model, indices, weights)
    finally:
        parallel.close()


def test_more_processes_than_structures_are_refused(tiny, waters) -> None:
    with pytest.raises(ValueError, match="processes: expected 1 to batch_size = 2, got 3"):
        ForceMatching(tiny(), waters(4, seed=0), [], batch_size=2, processes=3)
