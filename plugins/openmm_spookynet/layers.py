"""Building blocks of SpookyNet: residual networks, embeddings, attention (Unke et al. 2021, Methods).

Row-vector convention: features are ``(n_atoms, F)`` and a linear layer computes ``x @ weight + bias``. Blocks exist
for one network (``n=None``, weights ``(F, F)``) and for n networks of one shape side by side (weights ``(n, F, F)``,
features ``(n, n_atoms, F)``): one batched product instead of n small ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from openmm_mlff.data.structures import Batch
from openmm_spookynet import activation_kernel
from openmm_spookynet.pair_training import kernels_run_on


class Activation(nn.Module):
    """Self-adjusting activation with scale alpha and slope beta per feature (eqs. 5 and 6 use Swish).

    ``swish``: alpha x sigmoid(beta x), starts as an approximate GELU (beta = 1.702).
    ``ssp``: alpha (softplus(beta x) - ln 2) / beta.

    Attributes:
        native: compute Swish by a C++ kernel that has second derivatives, where one can run.
    """

    native: bool = False

    def __init__(self, kind: str, n: int | None, features: int) -> None:
        super().__init__()
        self.kind = kind
        shape = (features,) if n is None else (n, 1, features)
        self.alpha = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.full(shape, 1.702 if kind == "swish" else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swish":
            if self.native and kernels_run_on(x):
                return activation_kernel.Swish.apply(x, self.alpha, self.beta)
            return self.alpha * x * torch.sigmoid(self.beta * x)
        flat = self.beta == 0
        beta = torch.where(flat, torch.ones_like(self.beta), self.beta)
        curved = (softplus(beta * x) - math.log(2.0)) / beta
        return self.alpha * torch.where(flat, 0.5 * x, curved)


class Linear(nn.Module):
    """Linear layer, ``(n_atoms, F_in)`` -> ``(n_atoms, F_out)``, or n of them with a leading n in both shapes."""

    def __init__(self, n: int | None, inputs: int, outputs: int, bias: bool = True, zero: bool = False) -> None:
        super().__init__()
        weight = torch.zeros(n or 1, inputs, outputs)
        if not zero:
            for w in weight:
                nn.init.orthogonal_(w)
        self.weight = nn.Parameter(weight[0] if n is None else weight)
        self.bias = nn.Parameter(torch.zeros(outputs) if n is None else torch.zeros(n, 1, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight
        if self.weight.dim() == 2:
            return torch.addmm(self.bias, x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)


class ResidualBlock(nn.Module):
    """x + W2 s2(W1 s1(x) + b1) + b2; starts as the identity."""

    def __init__(self, kind: str, n: int | None, features: int, bias: bool = True) -> None:
        super().__init__()
        self.activation1 = Activation(kind, n, features)
        self.linear1 = Linear(n, features, features, bias)
        self.activation2 = Activation(kind, n, features)
        self.linear2 = Linear(n, features, features, bias, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(self.activation2(self.linear1(self.activation1(x))))


class ResidualStack(nn.Sequential):
    """Residual blocks in sequence, ``(n_atoms, F)`` -> ``(n_atoms, F)``."""

    def __init__(self, kind: str, blocks: int, features: int) -> None:
        super().__init__(*(ResidualBlock(kind, None, features) for _ in range(blocks)))


class ResidualMLP(nn.Module):
    """Residual multilayer perceptron, W s(blocks(x)) + b: ``(n_atoms, F)`` -> ``(n_atoms, F)``.

    With n networks that read one input: ``(n_atoms, F)`` -> ``(n, n_atoms, F)``.
    """

    def __init__(
        self, kind: str, blocks: int, features: int, n: int | None = None, bias: bool = True, zero: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(kind, n, features, bias) for _ in range(blocks))
        self.activation = Activation(kind, n, features)
        self.linear = Linear(n, features, features, bias, zero)
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        if self.n is not None and len(self.blocks) == 0:
            x = x.expand(self.n, -1, -1)
        for block in self.blocks:
            x = block(x)  # the first activation's parameters spread (n_atoms, F) over the n networks
        return self.linear(self.activation(x))


class ElectronicEmbedding(nn.Module):
    """Spreads a total charge or spin over the atoms by attention to the nuclear embedding (eqs. 10 and 11).

    Charge enters as [relu(Q), relu(-Q)], spin as [|S|] with S unpaired electrons, so that zero gives exactly zero.
    With `sharp` the shares are a softmax, in which an atom can have next to nothing; the published ones are not.
    """

    def __init__(self, kind: str, blocks: int, features: int, signed: bool, sharp: bool = False) -> None:
        super().__init__()
        inputs = 2 if signed else 1
        self.signed, self.sharp = signed, sharp
        self.linear_q = nn.Linear(features, features)
        self.linear_k = nn.Linear(inputs, features, bias=False)
        self.linear_v = nn.Linear(inputs, features, bias=False)
        self.mlp = ResidualMLP(kind, blocks, features, bias=False, zero=True)

    def forward(self, z: Tensor, value: Tensor, batch: Batch) -> Tensor:
        e = (
            torch.stack([value.relu(), (-value).relu()], -1) if self.signed else value.abs()[:, None]
        )  # (n_structures, 2|1)
        q = self.linear_q(z)
        k = batch.per_atom(self.linear_k(e / e.clamp(min=1)))
        v = batch.per_atom(self.linear_v(e))
        dot = (q * k).sum(-1) / math.sqrt(q.shape[-1])
        if self.sharp:
            return self.mlp(softmax_by_structure(dot, batch)[:, None] * v)
        a = softplus(dot)
        share = a / batch.per_atom(batch.sum_by_structure(a) + 1e-8)
        return self.mlp(share[:, None] * v)


def softmax_by_structure(x: Tensor, batch: Batch) -> Tensor:
    """exp(x_i) / sum_j exp(x_j) over the atoms j of the same structure, ``(n_atoms,)`` -> ``(n_atoms,)``."""
    # the largest of each structure cancels; it keeps the exponentials finite
    largest = batch.per_atom(batch.to_dense(x.detach(), fill=-math.inf).amax(1))
    a = torch.exp(x - largest)
    return a / batch.per_atom(batch.sum_by_structure(a))


class NonlinearElectronicEmbedding(nn.Module):
    """The embedding of older checkpoints: keys and values are nonlinear functions of the signed charge or spin."""

    def __init__(self, kind: str, blocks: int, features: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(features, features, bias=False)
        self.featurize_k = nn.Linear(1, features)
        self.mlp_k = ResidualMLP(kind, blocks, features)
        self.featurize_v = nn.Linear(1, features, bias=False)
        self.mlp_v = ResidualMLP(kind, blocks, features, bias=False)

    def forward(self, z: Tensor, value: Tensor, batch: Batch) -> Tensor:
        e = value[:, None]
        q = self.linear_q(z)
        k = batch.per_atom(self.mlp_k(self.featurize_k(e)))
        v = batch.per_atom(self.mlp_v(self.featurize_v(e)))
        dot = (q * k).sum(-1)
        largest = batch.per_atom(batch.to_dense(dot, fill=-math.inf).amax(1))
        a = torch.exp((dot - largest) / math.sqrt(q.shape[-1]))
        share = a / batch.per_atom(batch.sum_by_structure(a) + 1e-8)
        return share[:, None] * v


class LinearAttention(nn.Module):
    """Attention between all atoms of a structure at linear cost: FAVOR+ (Choromanski et al. 2021).

    The random features are fixed; they are part of the model.

    phi(X) = (exp(X omega / F^1/4 - |X|^2 / (2 sqrt F) - M) + 1e-4) / sqrt m. Because of the 1e-4 the maxima M do not
    cancel: they belong to the function, and forces include their derivative.
    """

    omega: Tensor

    def __init__(self, features: int, random_features: int) -> None:
        super().__init__()
        self.register_buffer("omega", orthogonal_random_matrix(features, random_features))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        query_log, key_log = self._log_features(q), self._log_features(k)  # (n_atoms, m) each, and their offsets
        query_max = query_log[0].amax(-1, keepdim=True)
        lowest = torch.finfo(k.dtype).min
        key_max = batch.per_atom(first_maximum(batch.to_dense(key_log[0], fill=lowest).flatten(1)))
        phi_q = self._features(query_log, query_max)
        phi_k = self._features(key_log, key_max)
        keys, values, queries = batch.to_dense(phi_k), batch.to_dense(v), batch.to_dense(phi_q)
        summed = torch.bmm(keys.transpose(1, 2), values)  # (n_structures, m, F)
        norm = torch.bmm(queries, keys.sum(1)[:, :, None]) + 1e-8  # (n_structures, max_atoms, 1)
        return batch.from_dense(torch.bmm(queries, summed) / norm)

    def _log_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = x.shape[-1]
        projection = (x / features**0.25) @ self.omega
        return projection, x.square().sum(-1, keepdim=True) / (2.0 * math.sqrt(features))

    def _features(self, log: tuple[Tensor, Tensor], largest: Tensor) -> Tensor:
        projection, half_norm = log
        return (torch.exp(projection - half_norm - largest) + 1e-4) / math.sqrt(projection.shape[-1])


def first_maximum(x: Tensor) -> Tensor:
    """Largest value of each row, ``(rows, n)`` -> ``(rows, 1)``; of entries equal up to rounding the first one.

    Equivalent atoms of a symmetric molecule tie for the maximum. Which of them carries the derivative must not depend
    on how sums were rounded, or forces would differ between batches and machines by up to 1e-4 eV/angstrom.
    """
    with torch.no_grad():
        largest = x.amax(1, keepdim=True)
        near = x >= largest - 8 * torch.finfo(x.dtype).eps * largest.abs()
        first = near.to(torch.uint8).argmax(1, keepdim=True)
    return x.gather(1, first)


def orthogonal_random_matrix(features: int, random_features: int) -> Tensor:
    """``(features, random_features)``: blocks of orthogonal columns with the lengths of Gaussian vectors."""
    blocks = []
    for start in range(0, random_features, features):
        q, _ = torch.linalg.qr(torch.randn(features, features))
        blocks.append(q.T[: min(features, random_features - start)])
    length = torch.randn(random_features, features).norm(dim=1)
    return (torch.cat(blocks) * length[:, None]).T.contiguous()
