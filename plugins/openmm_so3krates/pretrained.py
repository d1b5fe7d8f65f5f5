"""Published weights of SO3LR: where they are, whose they are, and how their files are read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_mlff.potentials.family import PublishedModel, fill
from openmm_mlff.potentials.potential import Potential
from openmm_so3krates.config import Z_MAX, SO3kratesConfig
from openmm_so3krates.model import SO3krates
from openmm_so3krates.module_pickle import read_module
from openmm_so3krates.torch_port import from_port

logger = logging.getLogger(__name__)

CITATION = (
    "Kabylda, Frank, Suarez-Dou, Khabibrakhmanov, Medrano Sandonas, Unke, Chmiela, Mueller, Tkatchenko, "
    "J. Am. Chem. Soc. 147, 33723 (2025), doi:10.1021/jacs.5c09558"
)
#: `fingerprint` of the published model
FINGERPRINT = "120ee7cb757e366dc4d208ba883ed7f24d5080fa9b4708960a09831ae26b289d"

#: options with several values: the published program's name -> ours, and its values -> ours
_CHOICES: dict[str, tuple[str, dict[Any, Any]]] = {
    "radial_basis_fn": ("radial_basis", {"bernstein": "bernstein"}),
    "cutoff_fn": ("cutoff_function", {"phys": "polynomial", "cosine": "cosine"}),
    "message_normalization": (
        "message_normalization",
        {"avg_num_neighbors": "avg_num_neighbors", "sqrt_num_features": "sqrt_num_features", "identity": "none"},
    ),
}
_RENAMED = {
    "num_features": "num_features",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "degrees": "degrees",
    "cutoff": "cutoff",
    "num_radial_basis_fn": "num_basis_functions",
    "layer_normalization_1": "layer_normalization_1",
    "layer_normalization_2": "layer_normalization_2",
    "residual_mlp_1": "residual_mlp_1",
    "residual_mlp_2": "residual_mlp_2",
    "use_charge_embed": "use_charge_embed",
    "use_spin_embed": "use_spin_embed",
    "zbl_repulsion_bool": "use_zbl_repulsion",
    "electrostatic_energy_bool": "use_electrostatics",
    "dispersion_energy_bool": "use_dispersion",
    "electrostatic_energy_scale": "electrostatic_sigma",
    "dispersion_energy_scale": "dispersion_scale",
}
#: options with a single value that this model has
_REQUIRED = {
    "activation_fn": "silu",
    "energy_activation_fn": "silu",
    "qk_non_linearity": "identity",
    "input_convention": "positions",
}


def recognises(path: Path) -> bool:
    """Whether a file can hold published parameters (by its ending and, in an archive, the names; reading decides)."""
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.startswith("feature_embeddings_0/") for name in archive.namelist())
        except (OSError, zipfile.BadZipFile):
            return False
    return path.suffix == ".model"


def stands_alone(path: Path) -> bool:
    """Whether a published file can be read without another one beside it."""
    return path.suffix != ".npz"


def read(path: Path) -> SO3krates:
    """Read published parameters, for the eight elements of SO3LR and singlets.

    Args:
        path: ``NAME_params.npz`` with ``NAME_hyperparameters.json`` beside it (the arrays of the JAX program by their
            names), or the ``.model`` of the PyPI package so3krates-torch, a pickled module that is not loaded but read
            through an allow-list.

    Raises `ValueError` if a file is damaged or is something else, `FileNotFoundError` if the second one is missing.
    """
    options, tensors = from_port(read_module(path)) if path.suffix == ".model" else _arrays(path)
    config = config_of(options)
    model = build(config, translate(tensors, config))
    if is_so3lr(model):
        _say_what_energies_mean()
    return model


def _arrays(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    beside = path.with_name(path.stem.replace("params", "hyperparameters") + ".json")
    if beside.name == path.with_suffix(".json").name or not beside.is_file():
        raise FileNotFoundError(
            f"modelPath: {path.name} holds parameters only; expected NAME_params.npz with NAME_hyperparameters.json "
            "beside it"
        )
    try:
        options = json.loads(beside.read_text(encoding="utf-8"))
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise ValueError(f"modelPath: {path.name} or {beside.name} cannot be read ({error})") from error
    return options, tensors


@functools.cache
def _say_what_energies_mean() -> None:
    """Once per process."""
    logger.warning(
        "SO3LR was trained on forces: only differences between its energies at the same composition mean anything"
    )


def is_so3lr(model: Potential) -> bool:
    """Whether a model is the published SO3LR, whatever file it came from (its long-range cutoff may be any)."""
    if not isinstance(model, SO3krates):
        return False
    config = dataclasses.replace(model.config, long_range_cutoff=None)
    return config == SO3kratesConfig(multiplicities=(1,)) and fingerprint(model) == FINGERPRINT


def fingerprint(model: SO3krates) -> str:
    """SHA-256 over all parameters in single precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def in_package() -> Path | None:
    """The weights in the PyPI package so3krates-torch, if it is installed; the package is not imported."""
    try:
        spec = importlib.util.find_spec("so3krates_torch")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "pretrained" / "so3lr" / "so3lr.model"
        if path.is_file():
            return path
    return None


SO3LR = PublishedModel(
    name="so3lr",
    family="so3krates",
    url="https://raw.githubusercontent.com/tohenkes/So3krates-torch/main/src/so3krates_torch/pretrained/so3lr/"
    "so3lr.model",
    sha256="b5145564911ff983ed076ccb2bca5ce63454b74c9c8291092695463f1e6732be",
    licence="MIT",
    citation=CITATION,
    domain="biomolecules and organic molecules of H C N O F P S Cl, charged or neutral, closed-shell, like PBE0+MBD; "
    "trained on forces, so only differences of energies at the same composition mean anything",
    find=in_package,
    is_it=is_so3lr,
    extra="so3lr",
)


def build(config: SO3kratesConfig, tensors: dict[str, Tensor]) -> SO3krates:
    """The model with these tensors; raises `ValueError` if they do not fit."""
    model = SO3krates(config)
    fill(model, tensors, "the parameters do not fit the hyperparameters")
    return model.eval().requires_grad_(False)


def config_of(options: dict[str, Any]) -> SO3kratesConfig:
    """The published program's options -> ours, for the eight elements of SO3LR and singlets."""
    try:
        model, data = options["model"], options["data"]
        if not isinstance(model, dict) or not isinstance(data, dict):
            raise TypeError("'model' and 'data' are not tables")
        values = {ours: model[theirs] for theirs, ours in _RENAMED.items()}
        for name, (ours, meaning) in _CHOICES.items():
            if model[name] not in meaning:
                raise ValueError(f"{name}: expected one of {', '.join(meaning)}, got {model[name]!r}")
            values[ours] = meaning[model[name]]
        for name, value in _REQUIRED.items():
            if model[name] != value:
                raise ValueError(f"{name}: expected {value!r}, got {model[name]!r}")
        values["avg_num_neighbors"] = data["avg_num_neighbors"]
        return SO3kratesConfig(**values, multiplicities=(1,))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"modelPath: the hyperparameters are not those of a SO3krates model ({error!r})") from error


class _Source:
    """Published tensors by name, with an error for one that is missing, unsound or left over."""

    def __init__(self, tensors: dict[str, Tensor], elements: tuple[int, ...]) -> None:
        self.tensors, self.elements = tensors, list(elements)
        self.taken: set[str] = set()

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"modelPath: the file lacks the tensor {name!r}")
        tensor = self.tensors[name]
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"modelPath: the file's tensor {name!r} holds NaN, infinity or no floating-point numbers")
        self.taken.add(name)
        return tensor

    def dense(self, out: dict[str, Tensor], ours: str, theirs: str, bias: bool = True) -> None:
        """Published kernels are (in, out), ours (out, in)."""
        out[f"{ours}.weight"] = self.take(f"{theirs}/kernel").T.contiguous()
        if bias:
            out[f"{ours}.bias"] = self.take(f"{theirs}/bias")

    def table(self, name: str) -> Tensor:
        """A table by atomic number, zero for other elements than the model's; a single column becomes a vector."""
        rows = self.take(name)
        if len(rows) <= max(self.elements):
            raise ValueError(f"modelPath: the file's table {name!r} ends before element {max(self.elements)}")
        rows = rows[:, 0] if rows.dim() == 2 and rows.shape[1] == 1 else rows
        # the published tables hold untrained numbers for all other elements
        table = rows.new_zeros(Z_MAX + 1, *rows.shape[1:])
        table[self.elements] = rows[self.elements]
        return table

    def finish(self) -> None:
        left = sorted(set(self.tensors) - self.taken)
        if left:
            raise ValueError(f"modelPath: the hyperparameters leave {len(left)} tensors unused, among them {left[0]!r}")


def translate(tensors: dict[str, Tensor], c: SO3kratesConfig) -> dict[str, Tensor]:
    """Published names and shapes (of the JAX program) -> ours."""
    out: dict[str, Tensor] = {}
    source = _Source(tensors, c.elements)
    out["element_embedding"] = source.table("feature_embeddings_0/Embed_0/embedding")
    which = 1
    for ours, used in (("charge_embedding", c.use_charge_embed), ("spin_embedding", c.use_spin_embed)):
        if used:
            _electronic(out, source, ours, f"feature_embeddings_{which}/ChargeSpinEmbedSparse_0")
            which += 1
    for t in range(c.num_layers):
        _layer(out, source, f"layers.{t}", f"layers_{t}", c)
    _heads(out, source, c)
    source.finish()
    return out


def _electronic(out: dict[str, Tensor], source: _Source, ours: str, theirs: str) -> None:
    out[f"{ours}.queries"] = source.table(f"{theirs}/Embed_0/embedding")
    out[f"{ours}.keys"] = source.take(f"{theirs}/Embed_1/embedding")
    out[f"{ours}.values"] = source.take(f"{theirs}/Embed_2/embedding")
    for k, name in enumerate(("first", "second")):
        source.dense(out, f"{ours}.residual.{name}", f"{theirs}/Residual_0/layers_{k}", bias=False)


def _layer(out: dict[str, Tensor], source: _Source, ours: str, theirs: str, c: SO3kratesConfig) -> None:
    block = f"{theirs}/attention_block"
    for f, name in ((1, "features"), (2, "euclidean"))[: 2 if c.degrees else 1]:
        for kind in ("radial", "spherical") if c.degrees else ("radial",):
            for k, part in ((1, "first"), (2, "second")):
                source.dense(
                    out, f"{ours}.attention.filter_{name}.{kind}.{part}", f"{block}/{kind}_filter{f}_layer_{k}"
                )
        out[f"{ours}.attention.attention_{name}.query"] = source.take(f"{block}/Wq{f}")
        out[f"{ours}.attention.attention_{name}.key"] = source.take(f"{block}/Wk{f}")
    out[f"{ours}.attention.value"] = source.take(f"{block}/Wv1")
    source.dense(out, f"{ours}.exchange.linear", f"{theirs}/exchange_block/mlp_layer_2")
    for k, norm, mlp in (
        (1, c.layer_normalization_1, c.residual_mlp_1),
        (2, c.layer_normalization_2, c.residual_mlp_2),
    ):
        if norm:
            for name in ("scale", "bias"):
                out[f"{ours}.norm_{k}.{name}"] = source.take(f"{theirs}/layer_normalization_{k}/{name}")
        if mlp:
            for i, part in ((1, "first"), (2, "second")):
                source.dense(out, f"{ours}.mlp_{k}.{part}", f"{theirs}/res_mlp_{k}_layer_{i}")


def _heads(out: dict[str, Tensor], source: _Source, c: SO3kratesConfig) -> None:
    energy, ratios = "observables_0", "observables_2"
    source.dense(out, "energy_hidden", f"{energy}/energy_dense_regression")
    source.dense(out, "energy_out", f"{energy}/energy_dense_final")
    out["energy_scale"] = source.table(f"{energy}/atomic_scales")
    out["energy_offset"] = source.table(f"{energy}/energy_offset")
    charges = f"{energy}/electrostatic_energy/partial_charges"
    source.dense(out, "charge_head.first", f"{charges}/charge_dense_regression_vec")
    source.dense(out, "charge_head.second", f"{charges}/charge_dense_final_vec")
    out["charge_bias"] = source.table(f"{charges}/Embed_0/embedding")
    source.dense(out, "hirshfeld_head.first", f"{ratios}/hirshfeld_ratios_dense_regression")
    source.dense(out, "hirshfeld_head.second", f"{ratios}/hirshfeld_ratios_dense_final")
    out["hirshfeld_shift"] = source.table(f"{ratios}/Embed_0/embedding")
    out["hirshfeld_query"] = source.table(f"{ratios}/Embed_1/embedding")
    if c.use_zbl_repulsion:
        zbl = f"{energy}/zbl_repulsion"
        out["repulsion.scale_raw"] = source.take(f"{zbl}/d").reshape(())
        out["repulsion.power_raw"] = source.take(f"{zbl}/p").reshape(())
        for ours, letter in (("weights", "c"), ("exponents", "a")):
            parts = [source.take(f"{zbl}/{letter}{k}").reshape(1) for k in (1, 2, 3, 4)]
            out[f"repulsion.{ours}_raw"] = torch.cat(parts)
