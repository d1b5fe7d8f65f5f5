"""Published SpookyNet weights: where they are, whose they are, and how their file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_mlff.potentials.family import PublishedModel
from openmm_spookynet.config import SpookyNetConfig
from openmm_spookynet.dispersion import TABLES
from openmm_spookynet.model import SpookyNet

CITATION = (
    "Unke, Chmiela, Gastegger, Schuett, Sauceda, Mueller, Nat. Commun. 12, 7273 (2021), doi:10.1038/s41467-021-27504-0"
)

PUBLISHED = PublishedModel(
    name="spookynet-published",
    family="spookynet",
    url="https://raw.githubusercontent.com/OUnke/SpookyNet/main/parameters.pth",
    sha256="604026ed148310d09cd6ae6c0e67e3c8905b5fc35ef3bd30714fd8776985e5cc",
    licence="MIT",
    citation=CITATION,
    domain="GFN2-xTB surrogate for Z = 1..86: neutral closed-shell organic molecules, small ions and radicals; "
    "zwitterions and charged peptides are wrong by several eV, energies are not size-consistent",
)

_RENAMED = {
    "use_d4_dispersion": "use_d4_dispersion",
    "use_zbl_repulsion": "use_zbl_repulsion",
    "use_electrostatics": "use_electrostatics",
    "lr_cutoff": "long_range_cutoff",
}
_UNCHANGED = (
    "activation num_features num_basis_functions num_modules cutoff exp_weighting use_irreps "
    "module_keep_prob num_residual_electron num_residual_pre num_residual_local_x num_residual_local_s "
    "num_residual_local_p num_residual_local_d num_residual_local num_residual_nonlocal_q "
    "num_residual_nonlocal_k num_residual_nonlocal_v num_residual_post num_residual_output "
)


def recognises(path: Path) -> bool:
    """Whether a file can be a published SpookyNet checkpoint (by its ending; reading it decides)."""
    return path.suffix in (".pth", ".pt")


def read(path: Path) -> SpookyNet:
    """Read a checkpoint of the published program (a ``.pth`` dictionary of hyperparameters and ``state_dict``).

    Only tensors and plain values are unpickled. Raises `ValueError` if the file is damaged or is something else.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"modelPath: {path.name} is not a readable SpookyNet checkpoint ({_first_line(error)})"
        ) from error
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise ValueError(
            f"modelPath: {path.name} is not a SpookyNet checkpoint (expected a dictionary with 'state_dict')"
        )
    return build(saved)


def build(saved: dict[str, Any]) -> SpookyNet:
    """The model of a checkpoint dictionary; raises `ValueError` naming what is missing or does not fit."""
    basis = saved.get("basis_functions", "exp-bernstein")
    if basis != "exp-bernstein":
        raise ValueError(f"basis_functions: expected 'exp-bernstein', got {basis!r}")
    options: dict[str, Any] = {name: saved[name] for name in _UNCHANGED.split() if name in saved}
    options |= {ours: saved[theirs] for theirs, ours in _RENAMED.items() if theirs in saved}
    # older files do not have these two keys and mean the older form
    options["use_irreps"] = saved.get("use_irreps", False)
    options["use_nonlinear_embedding"] = saved.get("use_nonlinear_embedding", True)
    state = dict(saved["state_dict"])
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"modelPath: expected tensors in the checkpoint's state_dict, got another thing as {strange[0]!r}"
        )
    omega = state.get("module.0.nonlocal_interaction.attention.omega")
    if omega is not None:
        options["num_random_features"] = int(omega.shape[1])
    try:
        model = SpookyNet(SpookyNetConfig(**options))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"modelPath: the checkpoint's options are not those of a SpookyNet ({_first_line(error)})"
        ) from error
    try:
        translated = translate(state, model.config)
        # a file in double precision is not rounded
        model.to(translated["output.weight"].dtype)
        model.load_state_dict(translated, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"modelPath: the checkpoint does not fit SpookyNet ({' '.join(str(error).split())[:500]})"
        ) from error
    return model.eval().requires_grad_(False)


def translate(state: dict[str, Tensor], c: SpookyNetConfig) -> dict[str, Tensor]:
    """Published state_dict keys and shapes -> ours (stacked networks, row-vector weights)."""
    out: dict[str, Tensor] = {}
    source = _Source(state)
    for name in ("element_bias", "output.weight"):
        out[name] = source.take(name)
    out["element_embedding"] = source.take("nuclear_embedding.element_embedding")
    out["electron_config"] = source.take("nuclear_embedding.electron_config")
    out["config_linear.weight"] = source.take("nuclear_embedding.config_linear.weight")
    for ours, theirs in (("charge_embedding", "charge_embedding"), ("spin_embedding", "magmom_embedding")):
        _electronic(out, source, ours, theirs, c)
    out["radial_basis.alpha_raw"] = source.take("radial_basis_functions._alpha")
    out["radial_basis.log_binomial"] = source.take("radial_basis_functions.logc")
    for t in range(c.num_modules):
        _module(out, source, t, c)
    if c.use_zbl_repulsion:
        zbl = "zbl_repulsion_energy._"
        out["repulsion.divisor_raw"] = source.take(zbl + "adiv").reshape(())
        out["repulsion.power_raw"] = source.take(zbl + "apow").reshape(())
        out["repulsion.weights_raw"] = torch.cat([source.take(f"{zbl}c{k}").reshape(1) for k in (1, 2, 3, 4)])
        out["repulsion.exponents_raw"] = torch.cat([source.take(f"{zbl}a{k}").reshape(1) for k in (1, 2, 3, 4)])
    if c.use_d4_dispersion:
        for name in ("s6", "s8", "a1", "a2", "scaleq"):
            out[f"dispersion.{name}_raw"] = source.take(f"d4_dispersion_energy._{name}").reshape(())
        for name in TABLES:
            out[f"dispersion.{name}"] = source.take(f"d4_dispersion_energy.{name}")
    source.finish()
    return out


class _Source:
    """The published state_dict, with an error that names a missing tensor."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        # what follows from the options or from other tables
        self.taken = {
            "keep_prob",
            "d4_dispersion_energy.alpha",
            "radial_basis_functions.n",
            "radial_basis_functions.v",
        }

    def take(self, name: str) -> Tensor:
        if name not in self.state:
            raise ValueError(f"modelPath: the checkpoint lacks the tensor {name!r}")
        self.taken.add(name)
        tensor = self.state[name]
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"modelPath: the checkpoint's tensor {name!r} holds NaN or infinity")
        return tensor

    def finish(self) -> None:
        """Refuse tensors that nothing used: the options say less than the checkpoint holds."""
        left = sorted(set(self.state) - self.taken)
        if left:
            raise ValueError(
                f"modelPath: the checkpoint's options leave {len(left)} tensors unused, among them {left[0]!r}"
            )


def _gather(source: _Source, names: list[str], single: bool) -> Tensor:
    """One tensor, or several stacked as ``(n, 1, F)``."""
    tensors = [source.take(name) for name in names]
    return tensors[0] if single else torch.stack(tensors)[:, None]


def _linear(
    out: dict[str, Tensor], source: _Source, ours: str, theirs: list[str], single: bool, bias: bool = True
) -> None:
    """Published weights are (out, in); ours (in, out), stacked where several networks run side by side."""
    weights = [source.take(f"{p}.weight").T.contiguous() for p in theirs]
    out[f"{ours}.weight"] = weights[0] if single else torch.stack(weights)
    if bias:
        out[f"{ours}.bias"] = _gather(source, [f"{p}.bias" for p in theirs], single)


def _block(
    out: dict[str, Tensor], source: _Source, ours: str, theirs: list[str], single: bool = True, bias: bool = True
) -> None:
    for k in (1, 2):
        for name in ("alpha", "beta"):
            out[f"{ours}.activation{k}.{name}"] = _gather(source, [f"{p}.activation{k}.{name}" for p in theirs], single)
        _linear(out, source, f"{ours}.linear{k}", [f"{p}.linear{k}" for p in theirs], single, bias)


def _mlp(
    out: dict[str, Tensor],
    source: _Source,
    ours: str,
    theirs: list[str],
    blocks: int,
    single: bool = True,
    bias: bool = True,
) -> None:
    for b in range(blocks):
        _block(out, source, f"{ours}.blocks.{b}", [f"{p}.residual.stack.{b}" for p in theirs], single, bias)
    for name in ("alpha", "beta"):
        out[f"{ours}.activation.{name}"] = _gather(source, [f"{p}.activation.{name}" for p in theirs], single)
    _linear(out, source, f"{ours}.linear", [f"{p}.linear" for p in theirs], single, bias)


def _electronic(out: dict[str, Tensor], source: _Source, ours: str, theirs: str, c: SpookyNetConfig) -> None:
    if c.use_nonlinear_embedding:
        out[f"{ours}.linear_q.weight"] = source.take(f"{theirs}.linear_q.weight")
        for kind, bias in (("k", True), ("v", False)):
            out[f"{ours}.featurize_{kind}.weight"] = source.take(f"{theirs}.featurize_{kind}.weight")
            if bias:
                out[f"{ours}.featurize_{kind}.bias"] = source.take(f"{theirs}.featurize_{kind}.bias")
            _mlp(out, source, f"{ours}.mlp_{kind}", [f"{theirs}.resblock_{kind}"], c.num_residual_electron, bias=bias)
        return
    for name in ("linear_q.weight", "linear_q.bias", "linear_k.weight", "linear_v.weight"):
        out[f"{ours}.{name}"] = source.take(f"{theirs}.{name}")
    _mlp(out, source, f"{ours}.mlp", [f"{theirs}.resblock"], c.num_residual_electron, bias=False)


def _module(out: dict[str, Tensor], source: _Source, t: int, c: SpookyNetConfig) -> None:
    ours, theirs = f"interactions.{t}", f"module.{t}"
    for part, blocks in (("residual_pre", c.num_residual_pre), ("residual_post", c.num_residual_post)):
        for b in range(blocks):
            _block(out, source, f"{ours}.{part}.{b}", [f"{theirs}.{part}.stack.{b}"])
    local, nonlocal_ = f"{theirs}.local_interaction", f"{theirs}.nonlocal_interaction"
    heads = [f"{local}.resblock_{h}" for h in "xspd"] + [f"{nonlocal_}.resblock_{h}" for h in "qkv"]
    depth = [c.num_residual_local_x, c.num_residual_local_s, c.num_residual_local_p, c.num_residual_local_d]
    depth += [c.num_residual_nonlocal_q, c.num_residual_nonlocal_k, c.num_residual_nonlocal_v]
    for g, blocks in enumerate(sorted(set(depth))):
        group = [name for name, n in zip(heads, depth, strict=True) if n == blocks]
        _mlp(out, source, f"{ours}.heads.groups.{g}", group, blocks, single=False)
    out[f"{ours}.attention.omega"] = source.take(f"{nonlocal_}.attention.omega")
    out[f"{ours}.radial.weight"] = torch.cat([source.take(f"{local}.radial_{k}.weight") for k in "spd"]).T.contiguous()
    for kind in "pd":
        out[f"{ours}.projection_{kind}.weight"] = source.take(f"{local}.projection_{kind}.weight")
    _mlp(out, source, f"{ours}.local", [f"{local}.resblock"], c.num_residual_local)
    _mlp(out, source, f"{ours}.output", [f"{theirs}.resblock"], c.num_residual_output)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
