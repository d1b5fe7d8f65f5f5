"""Sums over neighbours: plain differentiation, the form for the compiler, and the C++ kernel give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_mlff.data.structures import Structure
from openmm_mlff.potentials import native
from openmm_mlff.training.batching import LabelledSet
from openmm_mlff.training.force_matching import batch_loss
from openmm_mlff.training.losses import LossWeights
from openmm_spookynet import SpookyNet, SpookyNetConfig, pair_kernel
from openmm_spookynet.activation_kernel import Swish
from openmm_spookynet.pair_kernel import PairSumsKernel
from openmm_spookynet.pair_sums import PairSums
from openmm_spookynet.pair_training import TrainingPairSums

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler (g++ or clang++)")


def plain(
    rbf: Tensor, f: Tensor, p: Tensor, d: Tensor, spd: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    """The definition, pair by pair and feature by feature; autograd differentiates it."""
    received = (rbf @ weight) * spd[index]
    s, pp, dd = received.chunk(3, -1)
    return s.sum(1), torch.einsum("ncs,nsf->ncf", p, pp), torch.einsum("ncs,nsf->ncf", d, dd)


def fused(
    rbf: Tensor, f: Tensor, p: Tensor, d: Tensor, spd: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    return PairSums.apply(rbf, p, d, spd, weight, index)


def neighbourhoods(features: int, radial: int, irreps: bool) -> tuple[list[Tensor], Tensor]:
    """Inputs from a real geometry (the identity behind the gather needs both directions of every pair)."""
    config = SpookyNetConfig(num_features=features, num_basis_functions=radial, num_modules=1, use_irreps=irreps)
    model = SpookyNet(config).double()
    random = np.random.default_rng(5)
    positions = random.uniform(0, 7, (30, 3))
    batch = model.batch(Structure(random.choice([1, 6, 8], 30), positions))
    geometry = model.geometry(batch)
    spd = torch.randn(30, 3 * features, dtype=torch.float64)
    weight = torch.randn(radial, 3 * features, dtype=torch.float64)
    moving = [x.detach() for x in (geometry.rbf, geometry.f, geometry.p, geometry.d, spd)]
    assert bool((~batch.neighbors.mask).any()), "this test wants padding"
    return [*moving, weight, geometry.index], batch.neighbors.mask


@pytest.mark.parametrize(("features", "radial", "irreps"), [(16, 8, True), (5, 6, True), (8, 4, False)])
@pytest.mark.parametrize(
    "form", [fused, pytest.param(lambda *x: PairSumsKernel.apply(*x), marks=needs_compiler, id="kernel")]
)
def test_sums_and_derivatives(
    form: Callable[..., tuple[Tensor, ...]], features: int, radial: int, irreps: bool
) -> None:
    torch.manual_seed(0)
    inputs, mask = neighbourhoods(features, radial, irreps)
    results = []
    for function in (plain, form):
        rbf, f, p, d, spd, weight, index = inputs
        moving = [x.clone().requires_grad_(True) for x in (rbf, p, d, spd)]
        sums = function(moving[0], f, moving[1], moving[2], moving[3], weight, index)
        # weights that treat no component like another
        torch.manual_seed(1)
        total = sum((torch.randn_like(x) * x + 0.1 * x.square()).sum() for x in sums)
        results.append((sums, torch.autograd.grad(total, moving)))
    for mine, theirs in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    (rbf_a, p_a, d_a, spd_a), (rbf_b, p_b, d_b, spd_b) = results[1][1], results[0][1]
    torch.testing.assert_close(spd_a, spd_b, rtol=1e-10, atol=1e-10)
    # derivatives of padding go nowhere: the geometry of padding is constant
    for mine, theirs in (
        (rbf_a, rbf_b),
        (p_a.transpose(1, 2), p_b.transpose(1, 2)),
        (d_a.transpose(1, 2), d_b.transpose(1, 2)),
    ):
        torch.testing.assert_close(mine[mask], theirs[mask], rtol=1e-10, atol=1e-10)


def loss_of_sums_and_derivatives(form: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], mask: Tensor) -> Tensor:
    """What a loss of energies and forces is to the sums: it holds them and their first derivatives, nonlinearly."""
    rbf, f, p, d, spd, weight, index = inputs
    sums = form(rbf, f, p, d, spd, weight, index)
    torch.manual_seed(1)
    total = sum((torch.randn_like(x) * x + 0.1 * x**3).sum() for x in sums)
    assert isinstance(total, Tensor)
    first = torch.autograd.grad(total, [rbf, p, d, spd], create_graph=True)
    torch.manual_seed(2)
    seen = (mask[..., None], mask[:, None], mask[:, None], torch.ones(1, dtype=torch.bool))
    parts = [((torch.randn_like(x) * x + x.square()) * m).sum() for x, m in zip(first, seen, strict=True)]
    return total + torch.stack(parts).sum()


@needs_compiler
@pytest.mark.parametrize(("features", "radial", "irreps"), [(16, 8, True), (5, 6, True), (8, 4, False)])
def test_second_derivatives(features: int, radial: int, irreps: bool) -> None:
    torch.manual_seed(0)
    inputs, mask = neighbourhoods(features, radial, irreps)
    results = []
    for form in (plain, lambda *x: TrainingPairSums.apply(*x)):
        moving = {k: inputs[k].clone().requires_grad_(True) for k in (0, 2, 3, 4, 5)}
        leaves = [moving.get(k, x) for k, x in enumerate(inputs)]
        loss = loss_of_sums_and_derivatives(form, leaves, mask)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(moving.values()))])
    (value_a, rbf_a, p_a, d_a, *rest_a), (value_b, rbf_b, p_b, d_b, *rest_b) = results
    assert float(value_a) == pytest.approx(float(value_b), rel=1e-12)
    pairs = [(rbf_a[mask], rbf_b[mask])]
    pairs += [(a.transpose(1, 2)[mask], b.transpose(1, 2)[mask]) for a, b in ((p_a, p_b), (d_a, d_b))]
    for expected, found in [*pairs, *zip(rest_a, rest_b, strict=True)]:
        assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize(("of_x", "of_alpha"), [((7, 5), (5,)), ((7, 5), (3, 1, 5)), ((3, 7, 5), (3, 1, 5))], ids=str)
def test_second_derivatives_of_the_activation(
    of_x: tuple[int, ...], of_alpha: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    # wide enough for both ends of the logistic function
    x = (20.0 * torch.randn(of_x, dtype=dtype)).requires_grad_(True)
    alpha, beta = (torch.randn(of_alpha, dtype=dtype, requires_grad=True) for _ in range(2))
    results = []
    for form in (lambda x, a, b: a * x * torch.sigmoid(b * x), Swish.apply):
        y = form(x, alpha, beta)
        torch.manual_seed(1)
        (first,) = torch.autograd.grad((y * torch.randn_like(y) + 0.1 * y**2).sum(), x, create_graph=True)
        loss = (first * torch.randn_like(first)).sum() + first.square().sum() + y.square().sum()
        results.append([z.detach() for z in (y, first, *torch.autograd.grad(loss, (x, alpha, beta)))])
    for expected, found in zip(*results, strict=True):
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@needs_compiler
def test_the_activation_lets_nan_through() -> None:
    x = torch.tensor([[float("nan"), 1.0, 1e30, -1e30]])
    y = Swish.apply(x, torch.ones(4), torch.ones(4))
    assert bool(y[0, 0].isnan()) and y[0, 2:].tolist() == [pytest.approx(1e30), pytest.approx(0.0, abs=1e-6)]


@needs_compiler
def test_derivatives_that_the_kernel_does_not_have_are_refused() -> None:
    inputs, _ = neighbourhoods(5, 6, True)
    rbf, f, p, d, spd, weight, index = inputs
    weight = weight.clone().requires_grad_(True)
    rbf = rbf.clone().requires_grad_(True)
    total = torch.stack([x.square().sum() for x in TrainingPairSums.apply(rbf, f, p, d, spd, weight, index)]).sum()
    by_weight, by_rbf = torch.autograd.grad(total, [weight, rbf], create_graph=True)
    with pytest.raises(RuntimeError, match="derivative by the radial weights cannot be differentiated again"):
        torch.autograd.grad(by_weight.sum(), rbf, retain_graph=True)
    with pytest.raises(RuntimeError, match="expected at most two derivatives, got a third"):
        torch.autograd.grad(by_rbf.sum(), rbf, create_graph=True)


@needs_compiler
def test_training_with_the_kernel_follows_the_same_gradient(one_thread: None) -> None:
    config = SpookyNetConfig(num_features=16, num_basis_functions=8, num_modules=2, elements=(1, 6, 8))
    torch.manual_seed(3)
    model = SpookyNet(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    random = np.random.default_rng(5)
    structures = [
        Structure(
            random.choice([1, 6, 8], n), random.uniform(0, 6, (n, 3)), energy=1.0, forces=random.normal(size=(n, 3))
        )
        for n in (20, 9, 40)
    ]
    labelled = LabelledSet(structures, model).batch([0, 1, 2])
    weights = LossWeights().tensor(torch.float64, model.device)
    results = []
    for model.native_training in (False, True):
        assert (model._pair_sums(model.geometry(labelled.batch)) is not None) == model.native_training
        loss, _ = batch_loss(model, labelled, weights)
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append([loss.detach(), *(g for g in found if g is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_compiler
def test_the_kernel_in_single_precision() -> None:
    torch.manual_seed(0)
    inputs, _ = neighbourhoods(16, 8, True)
    exact = pair_kernel.forward_op(*inputs)
    rounded = pair_kernel.forward_op(*(x.float() if x.is_floating_point() else x for x in inputs))
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_compiler_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_kernel, "FLAGS", (*pair_kernel.FLAGS, "-no-such-flag"))
    with pytest.raises(RuntimeError, match=r"compile: .* failed"):
        pair_kernel.library(16, 7, 5, torch.float64)
