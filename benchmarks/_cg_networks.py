"""Neural networks to hold coarse-grained GDML against, on the same beads, frames and priors.

* ``mlp``: a plain network on distances, angles and dihedrals in the manner of CGnet (Wang et al., ACS Cent. Sci. 5, 755
  (2019)): z-scored features, five hidden layers of 160 tanh units, Adam. Written here.
* ``graph``: the graph network of TorchMD-NET 3.1.0 (``TorchMD_GN``, the continuous-filter network of Majewski et al.,
  Nat. Commun. 14, 5739 (2023)), from its own package; only its neighbour search is replaced by the constant list of
  all pairs. Install it beside the project, because its requirements name another PyTorch (its version is taken from
  git, so a source archive needs setuptools-scm)::

      pip install setuptools-scm
      pip install --no-deps --no-build-isolation --target baselines torchmd-net==3.1.0 warp-lang torch_geometric tqdm
      export PYTHONPATH=baselines

Both are trained on the same loss as GDML, mean square force errors, and stopped where validation frames say so.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor, nn

from openmm_mlff.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

ANGLES = ((0, 1, 2), (1, 2, 3), (1, 2, 4), (3, 2, 4), (2, 4, 5))
#: phi, psi, the torsions on either side of CB, and the improper one at CA
DIHEDRALS = ((0, 1, 2, 4), (1, 2, 4, 5), (0, 1, 2, 3), (3, 2, 4, 5), (1, 2, 4, 3))


@dataclass(frozen=True)
class Training:
    """Adam on batches; the learning rate falls to zero along half a cosine."""

    steps: int
    batch: int
    rate: float
    weight_decay: float = 0.0
    look_every: int = 100


RECIPES = {
    "mlp": Training(steps=3000, batch=512, rate=3e-3),
    "graph": Training(steps=2000, batch=256, rate=2e-3),
}


class FeatureNetwork(nn.Module):
    """Energy (eV) of z-scored distances, cosines of angles, and cosines and sines of dihedrals."""

    def __init__(self, positions: Tensor, width: int = 160, depth: int = 5) -> None:
        super().__init__()
        n = positions.shape[1]
        self.register_buffer("pairs", torch.tensor(np.array(np.tril_indices(n, -1))))
        self.register_buffer("angles", torch.tensor(ANGLES).T)
        self.register_buffer("dihedrals", torch.tensor(DIHEDRALS).T)
        features = self.features(positions.float())
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("spread", features.std(0))
        sizes = [features.shape[1], *[width] * depth]
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.network = nn.Sequential(*hidden, nn.Linear(width, 1))

    def features(self, r: Tensor) -> Tensor:
        i, j = self.pairs
        distances = (r[:, i] - r[:, j]).square().sum(-1).sqrt()
        a, b, c = (r[:, k] for k in self.angles)
        u, v = nn.functional.normalize(a - b, dim=-1), nn.functional.normalize(c - b, dim=-1)
        p, q, s, t = (r[:, k] for k in self.dihedrals)
        axis = nn.functional.normalize(s - q, dim=-1)
        m = nn.functional.normalize(torch.linalg.cross(q - p, s - q), dim=-1)
        n = nn.functional.normalize(torch.linalg.cross(s - q, t - s), dim=-1)
        return torch.cat(
            [distances, (u * v).sum(-1), (m * n).sum(-1), (torch.linalg.cross(m, n) * axis).sum(-1)], dim=-1
        )

    def forward(self, r: Tensor) -> Tensor:
        return self.network((self.features(r) - self.mean) / self.spread)[:, 0]


class _AllPairs(nn.Module):
    """Takes the place of TorchMD-NET's neighbour search: every ordered pair of every molecule."""

    def __init__(self, n_beads: int) -> None:
        super().__init__()
        self.n_beads = n_beads
        self.known: dict[int, Tensor] = {}

    def forward(self, pos: Tensor, batch: Tensor, box: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        molecules = len(pos) // self.n_beads
        if molecules not in self.known:
            i, j = torch.where(~torch.eye(self.n_beads, dtype=torch.bool))
            offset = torch.arange(molecules)[:, None] * self.n_beads
            self.known[molecules] = torch.stack([(i + offset).flatten(), (j + offset).flatten()])
        edges = self.known[molecules]
        vectors = pos[edges[0]] - pos[edges[1]]
        return edges, vectors.square().sum(-1).sqrt(), vectors


class GraphNetwork(nn.Module):
    """TorchMD_GN with every bead a type of its own; energy in eV."""

    def __init__(self, n_beads: int = 6) -> None:
        super().__init__()
        try:
            import warp

            warp.config.quiet = True
            from torchmdnet.models.model import create_model
        except ImportError as error:
            raise SystemExit(f"the graph network needs TorchMD-NET ({error}); _cg_networks.py says how") from error
        self.n_beads = n_beads
        self.model: Any = create_model(
            {
                "model": "graph-network", "embedding_dimension": 64, "num_layers": 2, "num_rbf": 32,
                "rbf_type": "expnorm", "trainable_rbf": False, "activation": "silu", "neighbor_embedding": False,
                "cutoff_lower": 0.0, "cutoff_upper": 10.0, "max_z": n_beads + 1, "max_num_neighbors": 32,
                "precision": 32, "aggr": "add", "derivative": False, "atom_filter": -1, "prior_model": None,
                "output_model": "Scalar", "reduce_op": "add",
            }
        )  # fmt: skip
        self.model.representation_model.distance = _AllPairs(n_beads)

    def forward(self, r: Tensor) -> Tensor:
        molecules = len(r)
        kinds = torch.arange(1, self.n_beads + 1).repeat(molecules)
        index = torch.arange(molecules).repeat_interleave(self.n_beads)
        return self.model(kinds, r.reshape(-1, 3), index)[0][:, 0]


def forces(network: nn.Module, positions: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """Energies ``(n,)`` eV and forces ``(n, N, 3)`` eV/angstrom."""
    r = positions.detach().requires_grad_(True)
    energy = network(r)
    (gradient,) = torch.autograd.grad(energy.sum(), r, create_graph=create_graph)
    return energy, -gradient


def mean_square_error(network: nn.Module, positions: Tensor, labels: Tensor) -> float:
    errors = [
        (forces(network, r)[1].detach() - f).square().mean() * len(r)
        for r, f in zip(positions.split(1000), labels.split(1000), strict=True)
    ]
    return float(sum(errors)) / len(positions)


def train(
    kind: str,
    positions: np.ndarray,
    labels: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray],
    path: Path,
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the least validation error of a training run; read from `path` if it is there.

    Args:
        kind: mlp or graph. positions: ``(n, 6, 3)`` angstrom. labels: forces less the priors, eV/angstrom.
    """
    torch.manual_seed(seed)
    recipe = RECIPES[kind]
    r, f = (torch.as_tensor(v, dtype=torch.float32) for v in (positions, labels))
    rv, fv = (torch.as_tensor(v, dtype=torch.float32) for v in validation)
    network = FeatureNetwork(r) if kind == "mlp" else GraphNetwork(r.shape[1])
    if path.exists():
        stored = torch.load(path, weights_only=True)
        network.load_state_dict(stored["network"])
        return network.eval(), stored["about"]
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
    generator = torch.Generator().manual_seed(seed)
    best, kept, best_step = float("inf"), {}, 0
    start = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        rows = torch.randint(len(r), (min(recipe.batch, len(r)),), generator=generator)
        loss = (forces(network, r[rows], create_graph=True)[1] - f[rows]).square().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{kind}: the loss became {float(loss)} at step {step}")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimiser.step()
        schedule.step()
        if step % recipe.look_every == 0:
            error = mean_square_error(network, rv, fv)
            if error < best:
                best, best_step = error, step
                kept = {name: value.clone() for name, value in network.state_dict().items()}
    about = {"validation": best, "step": best_step, "seconds": time.perf_counter() - start}
    network.load_state_dict(kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"network": kept, "about": about}, path)
    return network.eval(), about


def computation(network: nn.Module, n_beads: int = 6) -> Callable[[int], Callable[[openmm.State], Any]]:
    """What `openmm.PythonForce` calls, for a number of runs side by side."""
    network.requires_grad_(False)

    def build(runs: int) -> Callable[[openmm.State], Any]:
        def compute(state: openmm.State) -> tuple[float, np.ndarray]:
            r = torch.as_tensor(state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM).view(runs, n_beads, 3)
            # copies may drift apart; each is centred before its coordinates are rounded to single precision
            energy, force = forces(network, (r - r.mean(1, keepdim=True)).float())
            values = force.detach().double().reshape(-1, 3).numpy() * KJ_PER_MOL_NM_PER_EV_ANGSTROM
            if not np.isfinite(values).all():
                raise FloatingPointError("forces became NaN or infinite")
            return float(energy.detach().double().sum()) * KJ_PER_MOL_PER_EV, values

        return compute

    return build
